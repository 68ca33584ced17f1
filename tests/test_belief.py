"""A plan is believed for what it was proved on: models whose batches do different things."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import nngeo_lazy as ng
from nngeo_lazy.errors import StochasticModelError, UnsupportedLayerError
from nngeo_lazy.representations import Mixed

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


class DroppedByNumbers(Dropped):
    """Whole branches, by the generators of Python or NumPy."""

    numbers = (random.random,)

    def between(self, x, h):
        return h + self.r(h) * (self.numbers[0]() > self.p)


@pytest.mark.parametrize("numbers", [random.random, np.random.random])
@pytest.mark.parametrize("representation", ["kfac", "implicit"])
def test_branches_that_other_generators_drop(numbers, representation):
    for seed in range(4):
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - what such models draw from
        model = DroppedByNumbers()
        model.p, model.numbers = 0.3, (numbers,)
        with pytest.raises(StochasticModelError, match="two forward passes of the same batch"):
            ng.FIM(model, (torch.randn(6, 3), torch.arange(6) % 3), representation)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("n", [1, 2, 5])
def test_random_branches_of_small_batches(seed, n):
    """Two passes of one draw alike in nine of ten cases."""
    x, y = torch.randn(n, 3), torch.randint(3, (n,))
    for representation in ("kfac", "dense", "implicit"):
        torch.manual_seed(seed)
        model = Dropped()
        model.p = 0.3
        with pytest.raises(StochasticModelError, match="two forward passes of the same batch"):
            ng.FIM(model, (x, y), representation)
        torch.manual_seed(seed)
        with pytest.raises(StochasticModelError, match="two forward passes of the same batch"):
            ng.Hessian(model, (x, y), loss="categorical")


def test_random_numbers_that_change_nothing():
    class Idle(Two):
        def between(self, x, h):
            torch.rand(3)
            return h

    x, y, model = torch.randn(9, 3), torch.randint(3, (9,)), Idle()
    for representation in ("dense", "implicit"):
        close(ng.FIM(model, (x, y), representation).to_dense(), truth(model, x, y))


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


OTHERWISE = {"transposed", "matmul", "einsum", "another function", "convolution", "table"}


@pytest.mark.parametrize("kind", ENTRIES)
@pytest.mark.parametrize("representation", ["kfac", "diagonal"])
def test_a_training_batch_that_uses_other_entries(kind, representation):
    """Its curvature is its own; of the same entries, used otherwise, the step says it has none.

    A product with some of the entries has rows of all of them, so that another batch has its place.
    """
    model, y = Chosen(kind), torch.randint(3, (24,))
    x = torch.randn(24, 4) + torch.tensor([0.0, 100.0]).repeat_interleave(12)[:, None]
    options = {"estimator": "exact", "factor_decay": 0.0, "update_every": 1, "seed": 0}
    optimizer = ng.optim.NaturalGradient(model, representation, "categorical", **options)
    for at in (slice(0, 12), slice(12, 24)):
        optimizer.zero_grad()
        like = Mixed(representation, {"w": "diagonal"}) if kind == "halves" else representation
        own, refused = ng.FIM(model, (x[at], y[at]), like), None
        try:
            F.cross_entropy(model(x[at]), y[at]).backward()
            optimizer.step()
        except UnsupportedLayerError as error:
            refused = str(error)
        assert (refused is not None) == (kind in OTHERWISE and at.start == 12)
        if refused is not None:
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


class Lengths(nn.Module):
    """A language model with a learnt table of positions, or one that starts elsewhere."""

    def __init__(self, shape=(8, 4), later=0):
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 4), nn.Linear(4, 5)
        self.mix = nn.TransformerEncoderLayer(4, 2, 4, dropout=0.0, batch_first=True)
        self.table, self.later = nn.Parameter(torch.randn(shape)), later

    def forward(self, ids):
        t = ids.shape[1]
        first = self.later if t == 3 else 0
        return self.head(self.mix(self.embed(ids) + self.table[..., first : first + t, :]))


def of_table(model, ids):
    """The Fisher of the whole table, a mean over examples: one example after the other."""
    other = Lengths(model.table.shape, model.later)  # whose passes no optimizer watches
    other.load_state_dict(model.state_dict())
    one = other.table
    total = torch.zeros(one.numel(), one.numel())
    for n in range(len(ids)):
        for row in other(ids[n : n + 1])[0]:
            p = row.detach().softmax(-1)
            for label in range(len(p)):
                loss = torch.nn.functional.cross_entropy(row[None], torch.tensor([label]))
                (g,) = torch.autograd.grad(loss, one, retain_graph=True)
                total += p[label] * torch.outer(g.flatten(), g.flatten())
    return total / len(ids)


def batch_of(n, t):
    return torch.randint(5, (n, t)), torch.randint(5, (n, t))


@pytest.mark.parametrize("representation", ["kfac", "ekfac", "diagonal", "block_diagonal"])
@pytest.mark.parametrize(("lengths", "later"), [((8, 5, 3), 0), ((5, 8, 3), 0), ((5, 3, 7), 4)])
def test_training_at_several_lengths(representation, lengths, later):
    """The average over steps is that of each batch's own Fisher, over all of the table."""
    model, decay = Lengths(later=later), 0.8
    options = {"estimator": "exact", "factor_decay": decay, "update_every": 1, "seed": 0}
    optimizer = ng.optim.NaturalGradient(model, representation, "categorical", **options)
    expected = torch.zeros(32, 32)
    for step, (n, t) in enumerate(zip((4, 3, 5), lengths, strict=True), 1):
        ids, y = batch_of(n, t)
        fresh = of_table(model, ids)
        expected = expected + (1 - decay) / (1 - decay**step) * (fresh - expected)
        optimizer.zero_grad()
        F.cross_entropy(model(ids).flatten(0, 1), y.flatten()).backward()
        optimizer.step()
        found = optimizer.operator.block("table").to_dense()
        wanted = expected if representation == "block_diagonal" else expected.diagonal().diag()
        close(found, wanted)


@pytest.mark.parametrize("shape", [(8, 4), (1, 8, 4)])
def test_lengths_within_one_step_and_between_refreshes(shape):
    """Batches that are summed for one step are one batch; other lengths come unseen in between."""
    model = Lengths(shape)
    options = {"estimator": "exact", "factor_decay": 0.0, "update_every": 2, "seed": 0}
    optimizer = ng.optim.NaturalGradient(model, "kfac", "categorical", **options)
    for step, lengths in enumerate([(5, 8), (3, 6), (7, 2, 4), (8, 1)]):
        batches = [batch_of(n, t) for n, t in zip((4, 3, 2), lengths, strict=False)]
        count = sum(len(ids) for ids, _ in batches)
        fresh = sum(len(ids) * of_table(model, ids) for ids, _ in batches) / count
        optimizer.zero_grad()
        for ids, y in batches:
            F.cross_entropy(model(ids).flatten(0, 1), y.flatten(), reduction="sum").backward()
        optimizer.step()
        if step % 2 == 0:
            close(optimizer.operator.block("table").diagonal(), fresh.diagonal())


@pytest.mark.parametrize("make", [ng.optim.NaturalGradient, ng.optim.Preconditioner])
def test_a_language_model_of_several_lengths_trains(make):
    """On defaults and under autocast; what was learnt of a position is known of no other."""
    torch.set_default_dtype(torch.float32)
    model = Lengths()
    optimizer = make(model, seed=0)
    descent = torch.optim.SGD(model.parameters(), 0.3)
    losses = []
    for step in range(32):
        t = (5, 8, 3, 6)[step % 4]
        ids = torch.randint(5, (6, t))
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(ids)
        loss = F.cross_entropy(outputs.float().flatten(0, 1), (ids.flatten() + 1) % 5)
        loss.backward()
        optimizer.step()
        if make is ng.optim.Preconditioner:
            descent.step()
        losses.append(loss.item())
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    (row,) = [row for row in optimizer.report() if row.parameter == "table"]
    assert (row.block, row.note) == ("diagonal 32", "batches may use other entries of it")


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 2, 5))
        self.bias = nn.Parameter(torch.zeros(3, 2))

    def forward(self, x, task):
        return F.linear(x, self.weight[task], self.bias[task])


class Tasks(nn.Module):
    """A head for each task, which a batch chooses."""

    def __init__(self):
        super().__init__()
        self.body, self.heads = nn.Linear(4, 5), Heads()

    def forward(self, x, task):
        return self.heads(torch.tanh(self.body(x)), task)


def test_a_head_that_each_batch_chooses():
    """Kronecker blocks of all heads, from the first batch on; those not used yet are zero.

    A batch that does not use a head has no gradient there, and tells nothing of its inputs.
    """
    model, decay = Tasks(), 0.5
    options = {"estimator": "exact", "factor_decay": decay, "update_every": 1, "seed": 0}
    optimizer = ng.optim.NaturalGradient(model, "kfac", "categorical", **options)
    left, right, used = torch.zeros(3, 2, 2), torch.zeros(3, 6, 6), torch.zeros(3, 1, 1)
    for step, task in enumerate([1, 0, 1, 2], 1):
        x, y = torch.randn(6, 4), torch.randint(2, (6,))
        with torch.no_grad():
            h = torch.cat([torch.tanh(model.body(x)), torch.ones(6, 1)], 1)
            p = model(x, task).softmax(-1)
        weight = (1 - decay) / (1 - decay**step)
        fresh = torch.zeros(3, 2, 2), torch.zeros(3, 6, 6), torch.zeros(3, 1, 1)
        fresh[0][task] = (p.diag_embed() - p[:, :, None] * p[:, None]).mean(0)
        fresh[1][task], fresh[2][task] = h.mT @ h / 6, 1.0
        left, right = left.lerp(fresh[0], weight), right.lerp(fresh[1], weight)
        used = used.lerp(fresh[2], weight)
        optimizer.zero_grad()
        F.cross_entropy(model(x, task), y).backward()
        optimizer.step()
        found = optimizer.operator
        dense = found.to_dense()
        w, b = (found.space.slices[f"heads.{name}"].start for name in ("weight", "bias"))
        for k in range(3):
            rows = [[*range(w + 5 * i, w + 5 * i + 5), b + i] for i in (2 * k, 2 * k + 1)]
            at = torch.tensor(rows).flatten()
            inputs = right[k] / used[k].clamp_min(1e-9)
            close(dense[at][:, at], torch.kron(left[k], inputs))


class Scaled(nn.Module):
    """Constants of sizes that a batch may have, and others that each example has one of."""

    def __init__(self):
        super().__init__()
        self.low, self.head = nn.Parameter(torch.randn(4, 4) / 2), nn.Linear(4, 3)

    def forward(self, x):
        weight = torch.tril(self.low, -1) + torch.eye(4)
        at = (torch.arange(4)[None] - torch.arange(4)[:, None]) % 4
        first = torch.zeros(len(x), 4) @ self.low  # a state that begins at zero
        return self.head(torch.tanh(x @ weight + x @ self.low[0][at] + first))


@pytest.mark.parametrize("sizes", [(3, 2, 4), (4, 3, 4), (1, 4, 3), (5, 1, 4)])
def test_batches_as_long_as_a_constant(sizes):
    """A constant that was as long as no batch is none of the examples' in a batch of its length."""
    model = Scaled()
    data = [(torch.randn(n, 4), torch.randint(3, (n,))) for n in sizes]
    options = {"estimator": "exact", "factor_decay": 0.0, "update_every": 1, "seed": 0}
    optimizer = ng.optim.NaturalGradient(model, "diagonal", "categorical", **options)
    for x, y in data:
        other = Scaled()
        other.load_state_dict(model.state_dict())
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        close(optimizer.operator.diagonal(), truth(other, x, y).diagonal())
        assert "low" in optimizer.operator.space.names
    report = ng.FIM(model, data, "kfac").report()
    assert not any("general" in row.form for row in report)
