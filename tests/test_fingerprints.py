"""Data that are not what they were on the first pass are refused, and shuffling repeats."""

import random

import numpy
import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import nngeo_lazy as ng
from nngeo_lazy.errors import DataError
from nngeo_lazy.fingerprints import fingerprint
from nngeo_lazy.representations import Implicit

X, Y = torch.randn(22, 4, dtype=torch.float64), torch.arange(22) % 3
DATA = TensorDataset(X, Y)


class Augmented(Dataset):
    """Noise on every example, drawn anew each time."""

    def __init__(self, draw):
        self.draw = draw

    def __len__(self):
        return 22

    def __getitem__(self, k):
        return X[k] + self.draw(), Y[k]


class Drawn(Sampler):
    """An order that something else than torch draws."""

    def __init__(self, draw):
        self.draw = draw

    def __len__(self):
        return 22

    def __iter__(self):
        order = list(range(22))
        self.draw(order)
        return iter(order)


class Stream(IterableDataset):
    def __iter__(self):
        return iter([DATA[k] for k in torch.randperm(22)])


def model():
    return nn.Linear(4, 3).double()


REPEATED = {
    "shuffled": lambda: DataLoader(DATA, 8, shuffle=True),
    "a part": lambda: DataLoader(DATA, 8, shuffle=True, drop_last=True),
    "generator": lambda: DataLoader(
        DATA, 8, shuffle=True, drop_last=True, generator=torch.Generator().manual_seed(3)
    ),
    "augmented": lambda: DataLoader(Augmented(lambda: torch.randn(4)), 8),
    "stream": lambda: DataLoader(Stream(), 8, drop_last=True),
}
CHANGED = {
    "numpy": lambda: DataLoader(Augmented(numpy.random.randn), 8),
    "python": lambda: DataLoader(Augmented(random.random), 8),
    "order": lambda: DataLoader(DATA, 8, sampler=Drawn(random.shuffle)),
    "numpy's order": lambda: DataLoader(DATA, 8, sampler=Drawn(numpy.random.shuffle)),
}


@pytest.mark.parametrize("name", REPEATED)
def test_torchs_random_numbers_repeat(name):
    loader = REPEATED[name]()
    own = loader.generator
    net = model()
    before = torch.get_rng_state(), None if own is None else own.get_state()
    F = ng.FIM(net, loader, Implicit(cache=False))
    v = torch.randn(15, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(F @ v, F @ v)
    assert F.solve(v, damping=0.1).isfinite().all()
    assert torch.equal(before[0], torch.get_rng_state())
    assert own is None or torch.equal(before[1], own.get_state())


@pytest.mark.parametrize("name", CHANGED)
def test_what_changes_is_refused(name):
    loader = CHANGED[name]()
    F = ng.FIM(model(), loader, Implicit(cache=False))
    with pytest.raises(DataError, match=r"batch \d changed since the first pass .*list\(\.\.\.\)"):
        F @ torch.ones(15, dtype=torch.float64)
    G = ng.FIM(model(), list(loader), Implicit(cache=False))  # the remedy
    v = torch.ones(15, dtype=torch.float64)
    assert torch.equal(G @ v, G @ v)


def test_what_changed_is_named():
    class Twice:
        def __init__(self):
            self.passes = 0

        def __iter__(self):
            self.passes += 1
            yield {"x": X, "labels": Y + (self.passes > 1)}

    F = ng.FIM(model(), Twice(), Implicit(cache=False), forward=lambda m, b: m(b["x"]))
    with pytest.raises(DataError, match=r"other contents in batch\['labels'\]"):
        F @ torch.ones(15, dtype=torch.float64)


ROWS = {
    "shuffle": lambda: DataLoader(DATA, 8, shuffle=True),
    "subset": lambda: DataLoader(DATA, 8, sampler=SubsetRandomSampler(range(22))),
    "weighted": lambda: DataLoader(DATA, 8, sampler=WeightedRandomSampler(torch.ones(22), 22)),
    "batches": lambda: DataLoader(DATA, batch_sampler=BatchSampler(RandomSampler(DATA), 8, False)),
    "numpy": lambda: DataLoader(DATA, 8, sampler=Drawn(numpy.random.shuffle)),
    "stream": lambda: DataLoader(Stream(), 8),
}


def numpys_state():
    return numpy.random.get_state()[1].tolist()  # noqa: NPY002 - the one of the process


@pytest.mark.parametrize("name", ROWS)
def test_rows_need_an_order(name):
    net, loader = model(), ROWS[name]()
    states = torch.get_rng_state(), random.getstate(), numpys_state()
    for build in (ng.NTK, ng.Jacobian):
        with pytest.raises(DataError, match="the loader shuffles: pass shuffle=False"):
            build(net, loader)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), numpys_state())


def test_an_order_that_repeats_is_accepted():
    net = model()
    expected = ng.Jacobian(net, X, "dense").to_dense()
    backwards = Drawn(list.reverse)
    J = ng.Jacobian(net, DataLoader(DATA, 8, sampler=backwards), "dense")
    assert torch.allclose(J.to_dense().view(22, 3, -1).flip(0), expected.view(22, 3, -1))


def test_fingerprints_see_everything():
    class Graph:
        def __init__(self, x):
            self.x = x

    x = torch.randn(3, 2)
    other = x.clone()
    other[2, 1] += 1e-6
    for make in (
        lambda t: t,
        lambda t: {"a": [t, 1]},
        lambda t: Graph(t),
        lambda t: t.bfloat16() if t is x else t.bfloat16() + 1,
        lambda t: t.to_sparse(),
        lambda t: t.numpy(),
        lambda t: nn.utils.rnn.pack_sequence([t]),
        lambda t: t[0, 0] if t is x else t[2, 1],
    ):
        assert fingerprint(make(x)) == fingerprint(make(x))
        assert fingerprint(make(x)) != fingerprint(make(other))
    assert fingerprint(x) != fingerprint(x.view(2, 3))


def test_texts_and_mappings_for_each_example():
    net = model()
    expected = ng.FIM(net, (X, Y), "dense").to_dense()
    cuts = (slice(0, 10), slice(10, 22))
    texts = [(X[c], Y[c], [f"name {k}" for k in range(22)[c]]) for c in cuts]
    boxes = [(X[c], [{"box": y} for y in Y[c]]) for c in cuts]
    pieces = [(list(X[c]), list(Y[c])) for c in cuts]

    def stacked(m, batch):
        return m(torch.stack(batch[0]))

    for F in (
        ng.FIM(net, texts, "dense"),
        ng.FIM(net, boxes, "dense", forward=lambda m, b: m(b[0]), likelihood="categorical"),
        ng.FIM(
            net,
            pieces,
            "dense",
            forward=stacked,
            likelihood="categorical",
            target=lambda b: torch.stack(b[1]),
        ),
    ):
        assert torch.allclose(F.to_dense(), expected)
