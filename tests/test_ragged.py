"""Positions that the examples of a batch own in different numbers: packed, selected, routed."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import nngeo_lazy as ng
from nngeo_lazy.representations import KFAC

from cases import close


class Taped(nn.Module):
    """Notes what its linear layers are given and give, for the oracle."""

    tape = None

    def note(self, name, x, z):
        if self.tape is not None:
            self.tape.append((name, x.detach(), z))
        return z


class Packed(Taped):
    """Tokens of all examples in one row, as unpadded kernels want them."""

    def __init__(self):
        super().__init__()
        self.table, self.body, self.norm = nn.Embedding(7, 4), nn.Linear(4, 6), nn.LayerNorm(6)
        self.shift, self.head = nn.Parameter(torch.rand(5, 6)), nn.Linear(6, 3)

    def forward(self, ids, mask):
        x = self.table(ids[mask])
        h = self.norm(self.note("body", x, self.body(x)).tanh())
        h = h * self.shift[mask.nonzero()[:, 1]]  # a row of a table for each token
        owner = mask.nonzero()[:, 0]
        return self.head(h.new_zeros(len(ids), 6).index_add(0, owner, h))


class Selected(Taped):
    """A head that reads the positions of a mask alone."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        self.scale = nn.Parameter(torch.rand(6))

    def forward(self, x, mask):
        h = self.body(x).tanh()[mask] * self.scale
        picked = self.note("head", h, self.head(h))
        out = picked.new_zeros(*mask.shape, 3)
        out[mask] = picked
        return out


class Recurrent(Taped):
    """A cell without a closed form on the tokens of a mask."""

    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.LSTMCell(4, 5), nn.Linear(5, 3)

    def forward(self, x, mask):
        h, _ = self.cell(x[mask])
        owner = mask.nonzero()[:, 0]
        return self.head(h.new_zeros(len(x), 5).index_add(0, owner, h))


class Experts(Taped):
    """Tokens that go to the best of four experts, as modules or as matrices of one weight."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.gate, self.head = kind, nn.Linear(4, 4), nn.Linear(4, 3)
        nn.init.eye_(self.gate.weight)
        if kind == "modules":
            self.experts = nn.ModuleList(nn.Linear(4, 8, bias=False) for _ in range(4))
        else:
            self.weight = nn.Parameter(torch.randn(4, 8, 4) / 2)
        self.down = nn.Parameter(torch.randn(8, 4) / 2)

    def routed(self, x, best):
        if self.kind in ("modules", "slices"):
            out = x.new_zeros(len(x), 8)
            for k in best.unique():
                where = (best == k).nonzero()[:, 0]
                slices = self.kind == "slices"
                z = F.linear(x[where], self.weight[k]) if slices else self.experts[k](x[where])
                out = out.index_add(0, where, self.note(k.item(), x[where], z))
            return out
        if self.kind == "bmm":
            return torch.bmm(self.weight[best], x.unsqueeze(-1)).squeeze(-1)
        if self.kind == "einsum":
            return torch.einsum("ti,toi->to", x, self.weight[best])
        if self.kind == "matmul":  # of transposed matrices: no product that is known
            return (x.unsqueeze(1) @ self.weight[best].mT).squeeze(1)
        order = best.argsort(stable=True)
        ends = torch.bincount(best, minlength=4).cumsum(0).int()
        made = F.grouped_mm(x[order], self.weight.mT, offs=ends)
        return torch.zeros_like(made).index_copy(0, order, made)

    def forward(self, x):
        n, x = len(x), x.flatten(0, 1)  # (N T, i)
        p = self.gate(x).softmax(-1)
        best = p.argmax(-1)
        h = self.routed(x, best).tanh() * p.gather(1, best[:, None])
        return self.head(x + h @ self.down).view(n, -1, 3).sum(1)


def _packed():
    mask = torch.arange(5) < torch.tensor([5, 1, 3, 2, 4, 1])[:, None]
    return Packed(), {"ids": torch.randint(7, mask.shape), "mask": mask}


def _selected(model):
    return model, {"x": torch.randn(6, 5, 4), "mask": torch.rand(6, 5) < 0.5}


def _experts(kind):
    return Experts(kind), {"x": torch.randn(6, 5, 4)}


NETS = {
    "packed": _packed,
    "selected": lambda: _selected(Selected()),
    "recurrent": lambda: _selected(Recurrent()),
    **{k: (lambda k=k: _experts(k)) for k in ("modules", "slices", "bmm", "einsum", "matmul")},
}


def _examples(batch):
    n = len(next(iter(batch.values())))
    return [{name: t[k : k + 1] for name, t in batch.items()} for k in range(n)]


def _fisher(model, batch):
    """The exact Gaussian Fisher, from a loop over examples and outputs."""
    parameters, examples = list(model.parameters()), _examples(batch)
    total = 0
    for example in examples:
        for f in model(**example).flatten():
            g = torch.autograd.grad(f, parameters, retain_graph=True, allow_unused=True)
            pairs = zip(g, parameters, strict=True)
            row = torch.cat([(p * 0 if a is None else a).flatten() for a, p in pairs]).detach()
            total = total + torch.outer(row, row) / len(examples)
    return total


def _factors(model, batch):
    """KFAC's factors (G, A) of what the model notes, and how many tokens each has."""
    left, right, count = {}, {}, {}
    examples = _examples(batch)
    for example in examples:
        model.tape = []
        outputs, tape = model(**example).flatten(), model.tape
        model.tape = None
        for name, x, _ in tape:
            right[name] = right.get(name, 0) + x.mT @ x
            count[name] = count.get(name, 0) + len(x)
        for f in outputs:
            for name, _, z in tape:
                (g,) = torch.autograd.grad(f, z, retain_graph=True)
                left[name] = left.get(name, 0) + g.mT @ g / len(examples)
    return {name: (left[name], right[name] / count[name]) for name in left}, count


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("net", NETS)
def test_exact(net):
    model, batch = NETS[net]()
    expected = _fisher(model, batch)
    dense = ng.FIM(model, batch, "dense", likelihood="gaussian")
    close(dense.to_dense(), expected)
    assert all("general" not in row.form or net == "matmul" for row in dense.report())
    diagonal = ng.FIM(model, batch, "diagonal", likelihood="gaussian")
    close(diagonal.diagonal(), expected.diagonal())
    halves = [{k: t[a:b] for k, t in batch.items()} for a, b in ((0, 2), (2, 6))]
    close(ng.FIM(model, halves, "dense", likelihood="gaussian").to_dense(), expected)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", ["modules", "slices", "bmm", "einsum"])
@pytest.mark.parametrize("pieces", [1, 3])
def test_kronecker_factors_of_experts(kind, pieces):
    model, batch = _experts(kind)
    plain = Experts("slices")
    noted = model if kind == "modules" else plain
    if kind != "modules":
        plain.load_state_dict(model.state_dict())
    factors, _ = _factors(noted, batch)
    assert len(factors) == 4
    parts = [{"x": x} for x in batch["x"].chunk(pieces)]
    F_ = ng.FIM(model, parts, KFAC(), likelihood="gaussian")
    by_name = F_.block("experts" if kind == "modules" else "weight").to_dense()
    close(by_name, torch.block_diag(*(torch.kron(*factors[k]) for k in range(4))))


@pytest.mark.usefixtures("float64")
def test_an_expert_without_a_token_has_a_zero_block():
    model, batch = _experts("slices")
    with torch.no_grad():
        model.gate.bias[2] = -1e3
    F_ = ng.FIM(model, batch, "kfac", likelihood="gaussian")
    block = F_.block("weight").to_dense().view(4, 32, 4, 32)
    assert not block[2].any()
    assert bool((block[[0, 1, 3], :, [0, 1, 3]].diagonal(dim1=1, dim2=2).sum(1) > 0).all())


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("net", "name"), [("packed", "body"), ("selected", "head")])
def test_kronecker_factors_of_packed_and_selected_tokens(net, name):
    model, batch = NETS[net]()
    model.tape = []
    model(**batch)
    ((_, x, _),), model.tape = model.tape, None
    homogeneous = torch.cat([x, x.new_ones(len(x), 1)], 1)
    factors, count = _factors(model, batch)
    assert count[name] == len(x) < batch["mask"].numel()
    right = homogeneous.mT @ homogeneous / len(x)
    F_ = ng.FIM(model, batch, "kfac", likelihood="gaussian")
    assert F_.info.origins[f"{name}.weight"].positions == len(x)
    block = F_.block(name).to_dense()  # in flat order: the bias behind the weight
    o, w = len(factors[name][0]), len(right)
    place = torch.arange(o * w).view(o, w)
    place = torch.cat([place[:, :-1].flatten(), place[:, -1]])
    close(block, torch.kron(factors[name][0], right)[place][:, place])


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="torch has no grouped product")
def test_grouped_products():
    model, batch = _experts("grouped")
    plain = Experts("slices")
    plain.load_state_dict(model.state_dict())
    for representation in ("dense", "diagonal", "kfac"):
        ours, theirs = (
            ng.FIM(m, batch, representation, likelihood="gaussian") for m in (model, plain)
        )
        torch.testing.assert_close(ours.to_dense(), theirs.to_dense(), rtol=1e-4, atol=1e-5)
        assert all("general" not in row.form for row in ours.report())


@pytest.mark.parametrize("kind", ["modules", "slices", "bmm"])
def test_an_optimizer_steps_on_experts(kind):
    model, batch = _experts(kind)
    y = torch.randint(3, (6,))
    optimizer = ng.optim.NaturalGradient(model, "kfac", "categorical")
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(**batch), y)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert losses[-1] < losses[0] / 2
    assert "down" in optimizer.operator.space.names
