"""A plan is believed for what it was proved on: models whose batches do different things."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import nngeo_lazy as ng
from nngeo_lazy.errors import StochasticModelError, UnsupportedLayerError

import oracle

pytestmark = pytest.mark.usefixtures("float64")

EXACT = ("dense", "low_rank", "factored")


class Two(nn.Module):
    """Two layers, and what happens between them."""

    def __init__(self):
        super().__init__()
        self.a, self.r, self.b = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.b(self.between(x, torch.tanh(self.a(x))))


class Gain(Two):
    """A weight that only loud examples are divided by."""

    def between(self, x, h):
        loud = x.abs().amax(1) > 3
        return torch.where(loud[:, None], h / self.a.weight.norm(), h) if loud.any() else h


class AlwaysGain(Two):
    """The same without a branch: the calls do not tell."""

    def between(self, x, h):
        loud = x.abs().amax(1) > 3
        return torch.where(loud[:, None], h / self.a.weight.norm(), h)


class Refined(Two):
    """A layer that only batches with a loud example call."""

    def between(self, x, h):
        loud = x.abs().amax(1) > 3
        return torch.where(loud[:, None], h + self.r(h), h) if loud.any() else h


class Routed(Two):
    """A layer that is called on loud examples alone, of which there may be none."""

    def between(self, x, h):
        loud = (x.abs().amax(1) > 3).nonzero().squeeze(1)
        return h.index_add(0, loud, self.r(h[loud]).relu())


class Sorted(Two):
    """Examples in the order of their first number, and put back."""

    def forward(self, x):
        order = x[:, 0].argsort()
        h = self.r(torch.tanh(self.a(x[order])))
        return self.b(h[order.argsort()])


class Tokens(nn.Module):
    """Layers that see real tokens alone, one after the other."""

    def __init__(self):
        super().__init__()
        self.e, self.a, self.b = nn.Embedding(6, 3), nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x):
        kept = x != 0
        h = torch.tanh(self.a(self.e(x[kept])))
        out = h.new_zeros(*x.shape, 4).masked_scatter(kept[..., None], h)
        return self.b(out).sum(1)


def loud_data(loud=(4, 6)):
    x = torch.randn(9, 3).clamp(-1, 1)
    x[list(loud)] *= torch.tensor(4.0) / x[list(loud)].abs().amax(1, keepdim=True)
    return x, torch.randint(3, (9,))


def in_order():
    """Numbers that are sorted at the places that a check of few examples would look at."""
    x = torch.randn(9, 3)
    x[[0, 4, 8], 0] = torch.tensor([-3.0, 0.0, 3.0])
    return x, torch.randint(3, (9,))


def tokens():
    """Lengths 1, 3 and 2 of at most 3; then padding that comes first."""
    x = torch.tensor([[5, 0, 0], [3, 1, 2], [1, 1, 0], [0, 2, 4], [0, 0, 3], [1, 2, 3]])
    return x, torch.randint(3, (6,))


MODELS = {
    "gain": (Gain, loud_data),
    "gain without a branch": (AlwaysGain, loud_data),
    "refined": (Refined, loud_data),
    "routed": (Routed, loud_data),
    "sorted": (Sorted, in_order),
    "tokens": (Tokens, tokens),
}
SPLITS = {"one": None, "halves": 0.5, "one example first": 1, "two examples first": 2}


def batches(x, y, split):
    if split is None:
        return [(x, y)]
    k = split if isinstance(split, int) else int(len(x) * split)
    return [(x[:k], y[:k]), (x[k:], y[k:])]


def truth(model, x, y):
    return oracle.fisher(model, lambda m, e: m(e), x.split(1), "categorical", "exact", y)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", MODELS)
def test_batches_that_do_different_things(name, split):
    make, data = MODELS[name]
    model, (x, y) = make(), data()
    given = batches(x, y, SPLITS[split])
    expected = truth(model, x, y)
    for representation in EXACT:
        close(ng.FIM(model, given, representation).to_dense(), expected)
    close(ng.FIM(model, given, "diagonal").diagonal(), expected.diagonal())
    implicit = ng.FIM(model, given, "implicit")
    close(implicit.trace(), expected.trace())
    J = ng.Jacobian(model, given, "dense").to_dense()
    close(ng.Jacobian(model, given, "factored").to_dense(), J)
    rows = [oracle.jacobian(model, lambda m, e: m(e), [e]) for e in x.split(1)]
    close(J, torch.cat([r.flatten(0, -2) for r in rows]))


@pytest.mark.parametrize("representation", ["kfac", "ekfac", "quasi_diagonal", "block_diagonal"])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_a_layer_that_some_batches_leave_out(representation, sharing):
    x, y = loud_data((0, 2))
    order = torch.tensor([1, 3, 4, 5, 0, 2, 6, 7, 8])
    model, x, y = Refined(), x[order], y[order]
    given = representation
    if representation in ("kfac", "ekfac"):
        name = {"kfac": "KFAC", "ekfac": "EKFAC"}[representation]
        given = getattr(ng.representations, name)(sharing=sharing)
    both = ng.FIM(model, [(x[:4], y[:4]), (x[4:], y[4:])], given)
    alone = ng.FIM(model, (x[4:], y[4:]), given)
    here = both.space.slices["r.weight"]
    close(both.to_dense()[here, here], alone.to_dense()[here, here] * 5 / 9)
    assert both.diagonal()[here].sum() > 0
    assert {row.form for row in both.report() if row.layer == "r"} == {"linear: outer"}


def test_a_layer_that_batches_use_differently_is_rows():
    class Doubled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 3)

        def forward(self, x):
            return self.a(x) if (x > 2).any() else x @ (2 * self.a.weight.mT) + self.a.bias

    x, y, model = torch.randn(8, 3).clamp(-1, 1), torch.randint(3, (8,)), Doubled()
    x[:4, 0] = 3
    F = ng.FIM(model, [(x[:4], y[:4]), (x[4:], y[4:])], "diagonal")
    close(F.diagonal(), truth(model, x, y).diagonal())
    notes = {row.parameter: row.note for row in F.report()}
    assert notes["a.weight"] == "batches use it in different ways"


def test_a_batch_that_uses_no_parameter():
    class Adapted(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Linear(3, 3)

        def forward(self, x):
            return self.w(x) if (x > 2).any() else x * 1.0

    x, y, model = torch.randn(6, 3).clamp(-1, 1), torch.randint(3, (6,)), Adapted()
    x[:3, 0] = 3
    F = ng.FIM(model, [(x[:3], y[:3]), (x[3:], y[3:])], "dense")
    close(F.to_dense(), ng.FIM(model, (x[:3], y[:3]), "dense").to_dense() / 2)


class Dropped(Two):
    """Branches that are dropped at random."""

    p = 0.05

    def between(self, x, h):
        return h + self.r(h) * (torch.rand(len(x), 1) > self.p)


@pytest.mark.parametrize("seed", range(8))
def test_random_branches_are_found(seed):
    x, y = torch.randn(64, 3), torch.randint(3, (64,))
    torch.manual_seed(seed)
    for representation in ("kfac", "dense"):
        with pytest.raises(StochasticModelError, match="two forward passes of the same batch"):
            ng.FIM(Dropped(), (x, y), representation)


def test_random_numbers_that_change_nothing():
    class Idle(Two):
        def between(self, x, h):
            torch.rand(3)
            return h

    x, y, model = torch.randn(9, 3), torch.randint(3, (9,)), Idle()
    close(ng.FIM(model, (x, y), "dense").to_dense(), truth(model, x, y))


MIXED = {
    "flipped": lambda h: h.flip(0),
    "centered": lambda h: h - h.mean(0),
    "a little": lambda h: h + 1e-5 * h.mean(0),
}


@pytest.mark.parametrize("how", MIXED)
def test_examples_that_meet_in_a_later_batch(how):
    class Meeting(Two):
        def between(self, x, h):
            return MIXED[how](h) if (x > 9).any() else h

    x, y = torch.randn(8, 3).clamp(-2, 2), torch.randint(3, (8,))
    x[5] *= 20
    x[5, 0] = 10
    with pytest.raises(StochasticModelError, match="treats each example on its own"):
        ng.FIM(Meeting(), [(x[:4], y[:4]), (x[4:], y[4:])], "dense")


def test_examples_that_meet_unseen():
    """The functions are the same in both batches; an index tells which examples meet."""

    class Meeting(Two):
        def between(self, x, h):
            index = torch.arange(len(x))
            index[x[:, 0] > 9] = 0
            return h + h[index]

    x, y = torch.randn(8, 3).clamp(-2, 2), torch.randint(3, (8,))
    x[6, 0] = 10
    with pytest.raises(StochasticModelError, match="treats each example on its own"):
        ng.FIM(Meeting(), [(x[:4], y[:4]), (x[4:], y[4:])], "dense")


# --- another part of a parameter ------------------------------------------------------------------

linear, normalised, prelu = F.linear, F.layer_norm, F.prelu
ENTRIES = {
    "transposed": (lambda x, w: linear(x, w), lambda x, w: linear(x, w.mT)),
    "matmul": (lambda x, w: x @ w, lambda x, w: x @ w.mT),
    "einsum": (
        lambda x, w: torch.einsum("ni,io->no", x, w),
        lambda x, w: torch.einsum("ni,oi->no", x, w),
    ),
    "another function": (lambda x, w: linear(x, w), lambda x, w: linear(x, w.flip(0))),
    "convolution": (
        lambda x, w: F.conv1d(x[..., None], w[..., None]).squeeze(-1),
        lambda x, w: F.conv1d(x[..., None], w.mT[..., None]).squeeze(-1),
    ),
    "halves": (lambda x, w: x[:, :2] @ w[:2], lambda x, w: x[:, :2] @ w[2:]),
    "row and column": (lambda x, w: x * w[0], lambda x, w: x * w[:, 0]),
    "rows": (lambda x, w: x + w[0], lambda x, w: x + w[2]),
    "offsets": (lambda x, w: x * w.flatten()[:4], lambda x, w: x * w.flatten()[3:7]),
    "sums": (lambda x, w: (x[..., None] + w).sum(1), lambda x, w: (x[..., None] + w.mT).sum(1)),
    "scalars": (lambda x, w: x * w[0, 0], lambda x, w: x * w[1, 1]),
    "norms": (
        lambda x, w: normalised(x, (4,), w[0], w[1]),
        lambda x, w: normalised(x, (4,), w[1], w[0]),
    ),
    "prelu": (lambda x, w: prelu(x, w[0]), lambda x, w: prelu(x, w[1])),
    "concatenated": (
        lambda x, w: torch.cat([x[:, :2], w[0, :2].expand(len(x), 2)], 1),
        lambda x, w: torch.cat([x[:, :2], w[1, :2].expand(len(x), 2)], 1),
    ),
    "bias": (lambda x, w: linear(x, w, w[0]), lambda x, w: linear(x, w, w[:, 0])),
    "table": (
        lambda x, w: F.embedding((x[:, 0] > 0).long(), w),
        lambda x, w: F.embedding((x[:, 0] > 0).long(), w.mT),
    ),
}


class Chosen(nn.Module):
    """A parameter of which loud batches use other entries, by the same function."""

    def __init__(self, kind):
        super().__init__()
        self.soft, self.loud = ENTRIES[kind]
        self.w, self.head = nn.Parameter(torch.randn(4, 4) / 2), nn.Linear(4, 3)

    def forward(self, x):
        use = self.loud if float(x[0, 0].detach()) > 50 else self.soft
        return self.head(torch.tanh(use(x.where(x < 50, x - 100), self.w)))


@pytest.mark.parametrize("kind", ENTRIES)
def test_batches_that_use_other_entries_of_a_parameter(kind):
    model, y = Chosen(kind), torch.randint(3, (24,))
    x = torch.randn(24, 4) + torch.tensor([0.0, 100.0]).repeat_interleave(12)[:, None]
    exact = truth(model, x, y)
    batches = [(x[:12], y[:12]), (x[12:], y[12:])]
    for given in (batches, batches[::-1]):
        close(ng.FIM(model, given, "dense").to_dense(), exact)
        close(ng.FIM(model, given, "diagonal").diagonal(), exact.diagonal())


@pytest.mark.parametrize("kind", ENTRIES)
@pytest.mark.parametrize("representation", ["kfac", "diagonal"])
def test_a_training_batch_that_uses_other_entries(kind, representation):
    """Its curvature is its own, or the step says that it has none."""
    model, y = Chosen(kind), torch.randint(3, (24,))
    x = torch.randn(24, 4) + torch.tensor([0.0, 100.0]).repeat_interleave(12)[:, None]
    options = {"estimator": "exact", "factor_decay": 0.0, "update_every": 1, "seed": 0}
    optimizer = ng.optim.NaturalGradient(model, representation, "categorical", **options)
    for at in (slice(0, 12), slice(12, 24)):
        optimizer.zero_grad()
        own, refused = ng.FIM(model, (x[at], y[at]), representation), None
        try:
            F.cross_entropy(model(x[at]), y[at]).backward()
            optimizer.step()
        except UnsupportedLayerError as error:
            refused = str(error)
        if refused is not None:
            assert at.start == 12
            assert "a later batch uses ['w']" in refused
            return
        found = optimizer.operator
        close(found.to_dense(), own.block(list(found.space.names)).to_dense())


@pytest.mark.parametrize("offset", [0, 3])
def test_a_table_of_positions_and_batches_of_several_lengths(offset):
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Parameter(torch.randn(9, 4)), nn.Linear(4, 3)

        def forward(self, x):
            first = offset if x.shape[1] == 5 else 0
            return self.head(torch.tanh(x + self.table[first : first + x.shape[1]]).mean(1))

    model = Positions()
    batches = [(torch.randn(6, t, 4), torch.randint(3, (6,))) for t in (4, 6, 4, 3, 5)]
    exact = sum(truth(model, x, y) for x, y in batches) / len(batches)
    close(ng.FIM(model, batches, "dense").to_dense(), exact)
    close(ng.FIM(model, batches, "diagonal").diagonal(), exact.diagonal())
