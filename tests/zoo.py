"""Networks that exercise one thing each: a layer, a layout, a way of being called."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


@dataclass
class Net:
    """A model, one batch, and how one example is called: `call(model, example)`."""

    model: nn.Module
    batch: Any
    examples: list
    call: Callable[[Any, Any], Tensor]
    forward: Callable[[nn.Module, Any], Tensor] | None = None
    general: tuple[str, ...] = ()  # parameters that have no form of their own


def simple(model: nn.Module, x: Tensor, general: tuple[str, ...] = ()) -> Net:
    return Net(model.eval(), x, list(x), lambda f, one: f(one.unsqueeze(0)), general=general)


def mlp() -> Net:
    return simple(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(6, 4))


def no_bias() -> Net:
    net = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Sigmoid(), nn.Linear(3, 2, bias=False))
    return simple(net, torch.randn(5, 4))


def sequence() -> Net:
    """Linear layers over (N, A, B, .) positions, outputs (N, A, C) by position."""

    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.b(torch.tanh(self.a(x)).mean(2))

    return simple(M(), torch.randn(5, 3, 2, 3))


def convolutions() -> Net:
    """Groups, stride, dilation, every padding mode, stride 1 with many channels; in-place ReLU."""
    net = nn.Sequential(
        nn.Conv2d(2, 4, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 8, 3, padding="same", padding_mode="circular"),
        nn.Tanh(),
        nn.Conv2d(8, 4, 3, padding=1, bias=False),  # by correlations
        nn.Conv2d(4, 4, 2, padding=1, padding_mode="reflect"),
        nn.Conv2d(4, 2, 2, padding="same", padding_mode="replicate"),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2, 3),
    )
    return simple(net, torch.randn(4, 2, 7, 6))


def correlations() -> Net:
    """Stride 1, 16 channels in 2 groups, dilation, uneven and one-sided borders."""
    net = nn.Sequential(
        nn.Conv2d(2, 16, 1),
        nn.Tanh(),
        nn.Conv2d(16, 4, (3, 2), padding="same", dilation=(2, 1), groups=2),
        nn.Flatten(),
        nn.Linear(4 * 5 * 4, 2),
    )
    return simple(net, torch.randn(3, 2, 5, 4))


def conv1d() -> Net:
    net = nn.Sequential(
        nn.Conv1d(2, 8, 3, padding=2, dilation=2),
        nn.ReLU(),
        nn.Conv1d(8, 4, 4, padding="same", groups=2),
        nn.Tanh(),
        nn.Conv1d(4, 2, 3, stride=2, padding=1, padding_mode="circular"),
        nn.Flatten(),
        nn.Linear(8, 2),
    )
    return simple(net, torch.randn(5, 2, 7))


def time_distributed() -> Net:
    """A convolution over frames folded into the batch: (N F, C, H, W)."""

    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.out = nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.Linear(3, 2)

        def forward(self, x):
            h = torch.tanh(self.norm(self.conv(x.flatten(0, 1)))).mean((2, 3))
            return self.out(h.view(x.shape[0], x.shape[1], 3).sum(1))

    return simple(M(), torch.randn(4, 3, 1, 3, 3))


def norms() -> Net:
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.gn = nn.Conv2d(2, 4, 2), nn.BatchNorm2d(4), nn.GroupNorm(2, 4)
            self.a, self.ln, self.rms = nn.Linear(4, 6), nn.LayerNorm((2, 3)), nn.RMSNorm(6)
            self.bn1, self.out = nn.BatchNorm1d(6), nn.Linear(6, 3)
            for module in (self.bn, self.gn, self.ln, self.rms, self.bn1):
                for p in module.parameters():
                    nn.init.normal_(p)
            self.bn.running_mean.normal_()
            self.bn.running_var.uniform_(0.5, 2)

        def forward(self, x):
            h = torch.tanh(self.gn(self.bn(self.conv(x)))).flatten(2).mT
            h = self.ln(self.a(h).unflatten(-1, (2, 3))).flatten(-2)
            return self.out(self.bn1(torch.tanh(self.rms(h)).sum(1)))

    return simple(M(), torch.randn(4, 2, 4, 3))


class Block(nn.Module):
    """One block of a GPT: token and position embeddings, causal attention, a loss by position."""

    def __init__(self, width=4, heads=2, vocabulary=7, length=5):
        super().__init__()
        self.heads = heads
        self.token = nn.Embedding(vocabulary, width, padding_idx=0)
        self.position = nn.Embedding(length, width)
        self.norm, self.qkv = nn.LayerNorm(width), nn.Linear(width, 3 * width)
        self.mix, self.head = nn.Linear(width, width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, index):
        x = self.token(index) + self.position(torch.arange(index.shape[1]))
        n, t, d = x.shape
        q, k, v = self.qkv(self.norm(x)).view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(x + self.mix(y.transpose(1, 2).reshape(n, t, d)))


def gpt() -> Net:
    # With N = T: an example axis that is guessed from shapes would be wrong.
    return simple(Block(length=3), torch.randint(0, 7, (3, 3)))  # as many positions as examples


class Conv1D(nn.Module):
    """Hugging Face's layer: a weight stored (in, out), applied by addmm."""

    def __init__(self, outputs, inputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x):
        y = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight)
        return y.view(*x.shape[:-1], -1)


def conv1d_addmm() -> Net:
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = Conv1D(4, 3), Conv1D(2, 4)

        def forward(self, x):
            return self.b(torch.tanh(self.a(x))).sum(1)

    return simple(M(), torch.randn(5, 3, 3))


def transposed() -> Net:
    """Batch first outside, (T, N, .) and (T N, .) inside, with T = N."""

    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            h = torch.tanh(self.a(x.transpose(0, 1)))
            h = torch.tanh(self.b(h.reshape(-1, 4))).view_as(h)
            return self.c(h.sum(0))

    return simple(M(), torch.randn(4, 4, 3))


def time_first() -> Net:
    """Inputs (T, N, .): the batch cannot be cut along its first dimension, and T = N."""

    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.w, self.c = nn.Linear(3, 4), nn.Parameter(torch.randn(4)), nn.Linear(4, 2)

        def forward(self, x):
            return self.c((self.w * torch.tanh(self.a(x))).sum(0))

    x = torch.randn(4, 4, 3)
    return Net(M(), x, [x[:, k] for k in range(4)], lambda f, one: f(one.unsqueeze(1)))


def residual() -> Net:
    """In-place activation, `h += skip`, a layer used twice, keyword calls."""

    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
            self.act = nn.ReLU(inplace=True)

        def forward(self, x):
            h = self.act(self.a(input=x))
            r = self.b(h)
            r += h
            r = self.act(r)
            s = self.a(torch.tanh(r))
            s += r
            return self.out(s)

    return simple(M(), torch.randn(5, 4))


def checkpointed() -> Net:
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 2)

        def segment(self, h):
            return torch.tanh(self.b(torch.tanh(h)))

        def forward(self, x):
            h = self.a(x)
            # torch.func cannot follow a checkpoint: the oracle calls the segment plainly.
            plain = torch._C._functorch.is_gradtrackingtensor(h)
            h = self.segment(h) if plain else checkpoint(self.segment, h, use_reentrant=False)
            return self.c(h)

    return simple(M(), torch.randn(5, 4))


def tied() -> Net:
    """One weight as embedding (V, d) and as head (V, d): opposite layouts."""

    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, index):
            return self.head(torch.tanh(self.embed(index)).mean(1))

    return simple(M(), torch.randint(0, 5, (5, 4)))


def shared_bias() -> Net:
    """A bias that two weights share, a weight with and without its bias."""

    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 3))
            self.v = nn.Parameter(torch.randn(3, 3))
            self.b = nn.Parameter(torch.randn(3))

        def forward(self, x):
            return F.linear(
                torch.tanh(F.linear(F.linear(x, self.w, self.b), self.v, self.b)), self.w
            )

    return simple(M(), torch.randn(4, 3))


def parametrised() -> Net:
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    nn.utils.parametrizations.weight_norm(net[0])
    return simple(net, torch.randn(5, 4))


def recurrent() -> Net:
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.out = nn.LSTM(3, 2, batch_first=True), nn.Linear(2, 2)

        def forward(self, x):
            return self.out(self.rnn(x)[0][:, -1])

    return simple(M(), torch.randn(4, 3, 3))


def raw() -> Net:
    """Raw parameters, and one that the outputs do not depend on."""

    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.unused = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(2))
            self.a, self.query = nn.Linear(3, 3), nn.Parameter(torch.randn(2, 3))

        def forward(self, x):
            return self.scale * torch.tanh(self.a(x)) + self.a(self.query).sum(0)

    return simple(M(), torch.randn(5, 3))


def mapping() -> Net:
    """A batch that is a mapping, an output with `.logits`, T positions."""

    class Output:
        def __init__(self, logits):
            self.logits = logits

    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.out = nn.Embedding(5, 3), nn.Linear(3, 4)

        def forward(self, tokens=None, mask=None):
            return Output(self.out(torch.tanh(self.embed(tokens)) * mask.unsqueeze(-1)))

    tokens, mask = torch.randint(0, 5, (4, 3)), torch.randint(0, 2, (4, 3)).double()
    examples = list(zip(tokens, mask, strict=True))

    def call(f, one):
        return f(tokens=one[0].unsqueeze(0), mask=one[1].unsqueeze(0)).logits

    return Net(M(), {"tokens": tokens, "mask": mask}, examples, call)


def conv3d() -> Net:
    net = nn.Sequential(
        nn.Conv3d(2, 2, (2, 1, 2), stride=(1, 2, 1), padding=(1, 0, 0), groups=2),
        nn.Tanh(),
        nn.Conv3d(2, 1, 2, dilation=(1, 1, 2)),
        nn.Flatten(),
        nn.Linear(3, 2),
    )
    return simple(net, torch.randn(4, 2, 3, 3, 4))


def conv_transpose() -> Net:
    """One, two and three dimensions; groups, stride, dilation, output padding, cropping borders."""

    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.ConvTranspose1d(2, 2, 3, stride=2, padding=3, bias=False)
            self.two = nn.ConvTranspose2d(
                4, 2, (2, 3), stride=(3, 2), padding=1, output_padding=1, groups=2, dilation=(1, 2)
            )
            self.three = nn.ConvTranspose3d(2, 1, (1, 2, 2), stride=(2, 1, 1), padding=(0, 1, 0))

        def forward(self, x):  # (N, 2, 4)
            h = torch.tanh(self.one(x))  # (N, 2, 3)
            h = torch.tanh(self.two(torch.cat([x, -x], 1).unflatten(2, (2, 2))))
            h = h.mean(2) + torch.tanh(self.one(x)).sum((1, 2))[:, None, None]
            h = self.three(h[:, :, :4].reshape(len(x), 2, 1, 2, 2))
            return h.flatten(1)

    return simple(M(), torch.randn(4, 2, 4))


def conv_transpose_wide() -> Net:
    """Stride 1 and many channels: the moment by correlations, with its taps reversed."""
    net = nn.Sequential(
        nn.Conv1d(1, 8, 1), nn.Tanh(), nn.ConvTranspose1d(8, 1, 3, padding=1, output_padding=0)
    )
    return simple(net, torch.randn(4, 1, 3))


def instance_norm() -> Net:
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.own = nn.Conv2d(1, 3, 2), nn.InstanceNorm2d(3, affine=True)
            self.tracked = nn.InstanceNorm1d(3, affine=True, track_running_stats=True)
            for p in (*self.own.parameters(), *self.tracked.parameters()):
                nn.init.normal_(p)
            self.tracked.running_mean.normal_()
            self.tracked.running_var.uniform_(0.5, 2)

        def forward(self, x):
            h = torch.tanh(self.own(torch.tanh(self.conv(x)))).flatten(2)
            return torch.tanh(self.tracked(h)).sum(2)

    return simple(M(), torch.randn(4, 1, 4, 3))


def self_attention() -> Net:
    """Two heads, batch first and causal; then time first, with its weights, T = N; no biases."""

    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.MultiheadAttention(4, 2, batch_first=True)
            self.b = nn.MultiheadAttention(4, 1, bias=False, add_zero_attn=True)
            nn.init.normal_(self.a.in_proj_bias)

        def forward(self, x):
            mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
            h = self.a(x, x, x, attn_mask=mask, need_weights=False, is_causal=True)[0]
            h = torch.tanh(h).transpose(0, 1)
            h, weights = self.b(h, h, h)
            return h.sum(0)[:, :3] + weights.square().sum((1, 2))[:, None]

    return simple(M(), torch.randn(3, 3, 4))


def cross_attention() -> Net:
    """Packed with one and with two other inputs, separate projections, masked and added keys."""

    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.packed = nn.MultiheadAttention(2, 1, batch_first=True)
            self.separate = nn.MultiheadAttention(2, 2, kdim=3, vdim=1, batch_first=True)
            self.added = nn.MultiheadAttention(2, 1, add_bias_kv=True, batch_first=True)
            for m in (self.packed, self.separate, self.added):
                nn.init.normal_(m.in_proj_bias)

        def forward(self, x, keep):
            past = x[:, 1:, :2]
            hidden = keep[:, 1:] == 0
            h = self.packed(x[:, :, :2], past, past, key_padding_mask=hidden)[0]
            h = h + self.packed(h, past, -past)[0]
            h = torch.tanh(h + self.separate(h, x, x[..., :1])[0])
            return self.added(h, h, h)[0].sum(1)

    x, keep = torch.randn(4, 4, 3), torch.randint(0, 2, (4, 4))
    keep[:, 1] = 1  # no example without a key
    return Net(
        M().eval(),
        {"x": x, "keep": keep},
        list(zip(x, keep, strict=True)),
        lambda f, one: f(x=one[0].unsqueeze(0), keep=one[1].unsqueeze(0)),
        general=("added.bias_k", "added.bias_v"),
    )


def transformer() -> Net:
    """An encoder's and a decoder's layer; the encoder's would take a fused path."""

    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.TransformerEncoderLayer(4, 2, 2, batch_first=True)
            self.decoder = nn.TransformerDecoderLayer(4, 2, 1, batch_first=False)

        def forward(self, x):
            memory = self.encoder(x).transpose(0, 1)
            return self.decoder(x.transpose(0, 1)[:2], memory).sum(0)[:, :3]

    return simple(M(), torch.randn(4, 3, 4))


def prelu() -> Net:
    """One slope for all, one for each channel."""
    net = nn.Sequential(
        nn.Conv2d(1, 3, 2),
        nn.PReLU(),
        nn.Conv2d(3, 3, 1),
        nn.PReLU(3, init=0.3),
        nn.Flatten(),
        nn.Linear(12, 2),
        nn.PReLU(2),
    )
    return simple(net, torch.randn(4, 1, 3, 3))


def bilinear() -> Net:
    """Of two inputs, by position; and without a bias."""

    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Bilinear(3, 2, 3), nn.Bilinear(3, 3, 2, bias=False)

        def forward(self, x):
            h = torch.tanh(self.a(x, x[..., :2].contiguous()))
            return self.b(h.sum(1), x.sum(1))

    return simple(M(), torch.randn(4, 2, 3))


def matmul() -> Net:
    """x @ W with raw weights (in, out), and a weight from the left, which has no form."""

    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.v = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(3, 2))
            self.left = nn.Parameter(torch.randn(2, 2))

        def forward(self, x):  # (N,T,4)
            h = torch.tanh(x @ self.w)
            y = torch.matmul(h.flatten(0, 1), self.v).view(*h.shape[:2], 2)
            return (self.left @ y.mT).mT

    return simple(M(), torch.randn(5, 3, 4))


def gru() -> Net:
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.out = nn.GRU(2, 2, batch_first=True), nn.Linear(2, 2)

        def forward(self, x):
            return self.out(self.rnn(x)[0][:, -1])

    return simple(M(), torch.randn(4, 3, 2))


NETS = [
    mlp,
    no_bias,
    sequence,
    convolutions,
    correlations,
    conv1d,
    time_distributed,
    norms,
    gpt,
    conv1d_addmm,
    transposed,
    time_first,
    residual,
    checkpointed,
    tied,
    shared_bias,
    parametrised,
    recurrent,
    raw,
    mapping,
    conv3d,
    conv_transpose,
    conv_transpose_wide,
    instance_norm,
    self_attention,
    cross_attention,
    transformer,
    prelu,
    bilinear,
    matmul,
    gru,
]
