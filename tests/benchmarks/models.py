"""The networks that times are compared on, each with one batch of random data."""

import torch
from torch import Tensor, nn
from torch.nn import functional

CLASSES = 10


def mlp() -> nn.Module:
    """784-512-256-10, ReLU: matrix products only."""
    return nn.Sequential(
        nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, CLASSES)
    )


class CNN(nn.Module):
    """Convolutions 3-32-64-64, the last two of stride 2, then a mean over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1, stride=2)
        self.conv3 = nn.Conv2d(64, 64, 3, padding=1, stride=2)
        self.head = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.conv1(x))  # (N, 32, 32, 32)
        x = functional.relu(self.conv2(x))  # (N, 64, 16, 16)
        x = functional.relu(self.conv3(x))  # (N, 64, 8, 8)
        return self.head(x.mean((2, 3)))  # (N, 10)


class Block(nn.Module):
    """Causal attention and a perceptron, each behind a layer norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        qkv = self.qkv(self.norm1(x)).view(n, t, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (N, heads, T, d / heads) each
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(n, t, d))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Four blocks of width 128, characters in and logits out."""

    def __init__(self, vocabulary: int = 65, width: int = 128, length: int = 64) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, 4) for _ in range(4))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, index: Tensor) -> Tensor:
        x = self.token(index) + self.position(torch.arange(index.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))  # (N, T, V)


INPUTS = {"mlp": (1024, 784), "cnn": (256, 3, 32, 32)}  # the whole data set is one batch
GPT_INPUTS = (32, 64)
TITLES = {
    "mlp": "MLP 784-512-256-10, 1024 examples",
    "cnn": "CNN 3-32-64-64 on 32x32, 256 examples",
}


def setup(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """The model and its batch (inputs, labels), the same in every process."""
    torch.manual_seed(0)
    if name == "gpt":
        x, y = torch.randint(65, (2, *GPT_INPUTS))
        return GPT(), x, y
    model = mlp() if name == "mlp" else CNN()
    x = torch.randn(INPUTS[name])
    return model, x, torch.randint(CLASSES, x.shape[:1])


def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy, the mean over examples and positions."""
    return functional.cross_entropy(model(x).flatten(0, -2), y.flatten())
