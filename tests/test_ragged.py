"""Positions that the examples of a batch own in different numbers: packed, selected, routed."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import nngeo_lazy as ng

from cases import close

pytestmark = pytest.mark.usefixtures("float64")


class Packed(nn.Module):
    """Tokens of all examples in one row, as unpadded kernels want them."""

    def __init__(self):
        super().__init__()
        self.table, self.body, self.norm = nn.Embedding(7, 4), nn.Linear(4, 6), nn.LayerNorm(6)
        self.head = nn.Linear(6, 3)

    def forward(self, ids, mask):
        h = self.norm(self.body(self.table(ids[mask])).tanh())
        owner = mask.nonzero()[:, 0]
        return self.head(h.new_zeros(len(ids), 6).index_add(0, owner, h))


class Selected(nn.Module):
    """A head that reads the positions of a mask alone."""

    def __init__(self):
        super().__init__()
        self.body, self.head, self.scale = nn.Linear(4, 6), nn.Linear(6, 3), nn.Parameter(torch.rand(6))

    def forward(self, x, mask):
        h = self.body(x).tanh()
        picked = self.head(h[mask] * self.scale)
        out = picked.new_zeros(*mask.shape, 3)
        out[mask] = picked
        return out


class Experts(nn.Module):
    """Tokens that go to the best of four experts: modules, or slices of one weight."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.gate, self.head = kind, nn.Linear(5, 4), nn.Linear(5, 3)
        if kind == "modules":
            self.experts = nn.ModuleList(nn.Linear(5, 5) for _ in range(4))
        elif kind != "gathered":
            self.weight = nn.Parameter(torch.randn(4, 5, 5) / 2)

    def expert(self, k, x):
        if self.kind == "modules":
            return self.experts[k](x)
        return F.linear(x, self.weight[k])

    def forward(self, x):
        n, x = len(x), x.flatten(0, 1)  # (N T, i)
        p = self.gate(x).softmax(-1)
        best = p.argmax(-1)
        out = torch.zeros_like(x)
        for k in best.unique():
            where = (best == k).nonzero()[:, 0]
            own = self.expert(k, x[where]).tanh() * p[where, k, None]
            out = out.index_add(0, where, own)
        return self.head(x + out).view(n, -1, 3).sum(1)


def _packed():
    mask = torch.arange(5) < torch.tensor([5, 1, 3, 2, 4, 1])[:, None]
    return Packed(), {"ids": torch.randint(7, mask.shape), "mask": mask}


def _selected():
    return Selected(), {"x": torch.randn(6, 5, 4), "mask": torch.rand(6, 5) < 0.5}


def _experts(kind):
    return Experts(kind), {"x": torch.randn(6, 4, 5)}


NETS = {
    "packed": _packed,
    "selected": _selected,
    "modules": lambda: _experts("modules"),
    "slices": lambda: _experts("slices"),
}


def _fisher(model, batch):
    """The exact Gaussian Fisher from a loop over examples, and its diagonal."""
    parameters = list(model.parameters())
    total = 0
    n = len(next(iter(batch.values())))
    for k in range(n):
        outputs = model(**{name: t[k : k + 1] for name, t in batch.items()}).flatten()
        for f in outputs:
            g = torch.autograd.grad(f, parameters, retain_graph=True, allow_unused=True)
            pairs = zip(g, parameters, strict=True)
            row = torch.cat([(p * 0 if a is None else a).flatten() for a, p in pairs]).detach()
            total = total + torch.outer(row, row) / n
    return total


@pytest.mark.parametrize("net", NETS)
def test_exact(net):
    model, batch = NETS[net]()
    expected = _fisher(model, batch)
    dense = ng.FIM(model, batch, "dense", likelihood="gaussian")
    close(dense.to_dense(), expected)
    assert not any("general" in row.form for row in dense.report())
    diagonal = ng.FIM(model, batch, "diagonal", likelihood="gaussian")
    close(diagonal.diagonal(), expected.diagonal())
