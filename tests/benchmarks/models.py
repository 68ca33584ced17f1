"""The two networks that build times are compared on, each with one batch of random data."""

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


INPUTS = {"mlp": (1024, 784), "cnn": (256, 3, 32, 32)}  # the whole data set is one batch
TITLES = {
    "mlp": "MLP 784-512-256-10, 1024 examples",
    "cnn": "CNN 3-32-64-64 on 32x32, 256 examples",
}


def setup(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """The model and its batch (inputs, labels), the same in every process."""
    torch.manual_seed(0)
    model = mlp() if name == "mlp" else CNN()
    x = torch.randn(INPUTS[name])
    return model, x, torch.randint(CLASSES, x.shape[:1])
