"""bfloat16 and autocast: the forms of float32, and its trace up to rounding."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import nngeo_lazy as ng
from nngeo_lazy import precision as precisions
from nngeo_lazy.likelihoods import Categorical

TRACE = 0.02  # how far the trace may be from that of float32


class Transformer(nn.Module):
    """Two pre-norm blocks with causal attention, a scale of its own, a position table."""

    def __init__(self, vocabulary=11, width=32, heads=4, length=8):
        super().__init__()
        self.words, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(nn.Module() for _ in range(2))
        for block in self.blocks:
            block.first, block.second = nn.LayerNorm(width), nn.LayerNorm(width)
            block.mix, block.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            block.up, block.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
            block.scale = nn.Parameter(torch.rand(width) + 0.5)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)
        self.heads = heads

    def forward(self, ids):
        x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        for block in self.blocks:
            q, k, v = block.mix(block.first(x)).unflatten(-1, (3, self.heads, -1)).unbind(2)
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + block.out(a.transpose(1, 2).flatten(2)) * block.scale
            x = x + block.down(F.gelu(block.up(block.second(x))))
        return self.head(self.norm(x))


class Residual(nn.Module):
    """Convolutions with batch and group norm, a depthwise one, a skip, a mean over positions."""

    def __init__(self, width=16):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.point, self.group = nn.Conv2d(width, width, 1), nn.GroupNorm(4, width)
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = x + F.silu(self.group(self.point(self.depthwise(x))))
        return self.head(x.mean((2, 3)))


class Adapter(nn.Module):
    """LoRA (Hu et al. 2021) beside a frozen linear layer."""

    def __init__(self, base, rank=4):
        super().__init__()
        self.base, self.scale = base.requires_grad_(False), 2.0
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.scale * self.up(self.down(x))


def adapted():
    model = Transformer().requires_grad_(False)
    for block in model.blocks:
        block.mix, block.up = Adapter(block.mix), Adapter(block.up)
    return model


def images():
    model = Residual()
    model.train()(torch.randn(32, 3, 8, 8))  # running statistics
    return model


NETS = {
    "transformer": (Transformer, lambda: torch.randint(0, 11, (16, 8))),
    "convolutions": (images, lambda: torch.randn(16, 3, 8, 8)),
    "adapters": (adapted, lambda: torch.randint(0, 11, (16, 8))),
    "perceptron": (
        lambda: nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 5)),
        lambda: torch.randn(32, 12),
    ),
}
PRECISIONS = ("bfloat16", "autocast", "autocast, outputs float32")


def autocast(wide):
    def forward(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(batch[0] if isinstance(batch, (tuple, list)) else batch)
        return outputs.float() if wide else outputs

    return forward


def built(name, precision, representation, estimator):
    make, batch = NETS[name]
    torch.manual_seed(0)
    model, x = make().eval(), batch()
    options = {"likelihood": Categorical(class_dim=-1), "estimator": estimator}
    if precision == "bfloat16":
        model, x = model.bfloat16(), x.bfloat16() if x.is_floating_point() else x
    elif precision != "float32":
        options["forward"] = autocast("float32" in precision)
    if estimator == "empirical":
        with torch.no_grad():
            shape = model(x).shape[:-1]
        x = (x, torch.randint(0, 5, shape, generator=torch.Generator().manual_seed(1)))
    return ng.FIM(model, x, representation, **options)


@pytest.mark.parametrize(
    ("representation", "estimator"),
    [("kfac", "exact"), ("kfac", "empirical"), ("ekfac", "empirical"), ("diagonal", "empirical")],
)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", NETS)
def test_forms_and_trace_are_those_of_float32(name, precision, representation, estimator):
    found = {}
    for each in ("float32", precision):
        matrix = built(name, each, representation, estimator)
        forms = [(row.parameter, row.form, row.block, row.note) for row in matrix.report()]
        found[each] = forms, float(matrix.trace())
    (forms, trace), (other, near) = found.values()
    assert other == forms
    assert not any("general" in form for _, form, *_ in forms)
    assert abs(near - trace) <= TRACE * trace, near / trace - 1


@pytest.fixture
def mixed(monkeypatch):
    """A CPU that adds up products of bfloat16 in float32, as CUDA does: the shapes that it met."""
    shapes = []

    def product(x, y, out_dtype):
        assert x.dtype == y.dtype == torch.bfloat16
        shapes.append((x.shape[0], y.shape[1]))
        return x.to(out_dtype) @ y.to(out_dtype)

    library = torch.library.Library("aten", "IMPL")
    library.impl("mm.dtype", product, "CPU")
    monkeypatch.setattr(precisions, "_mixes", lambda device: True)
    yield shapes
    library._destroy()


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("masked", [False, True])
def test_products_of_half_precision_are_added_up_in_float32(mixed, monkeypatch, sharing, masked):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 8), nn.Tanh(), nn.Linear(8, 5)).bfloat16()
    x = torch.randn(16, 6, 300).bfloat16()
    y = torch.randint(0, 5, (16, 6))
    if masked:
        y[:, 4:] = -100
    kfac = ng.representations.KFAC(sharing=sharing)
    options = {"likelihood": Categorical(class_dim=-1), "estimator": "empirical"}
    near = ng.FIM(model, (x, y), kfac, **options).to_dense()
    if sharing == "expand":  # means over positions are float32, and so are their products
        assert {(150, 150), (8, 8), (5, 5)} <= set(mixed)
    monkeypatch.setattr(precisions, "_mixes", lambda device: False)
    count = len(mixed)
    expected = ng.FIM(model, (x, y), kfac, **options).to_dense()
    assert len(mixed) == count
    assert near.dtype == torch.float32
    torch.testing.assert_close(near, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))
