"""What a loader may be."""

import dataclasses
from collections import ChainMap, OrderedDict, UserDict, namedtuple
from types import MappingProxyType, SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader, TensorDataset

import nngeo_lazy as ng
from nngeo_lazy.data import Batches
from nngeo_lazy.errors import DataError

X, Y = torch.arange(8.0).view(4, 2), torch.arange(4)
Pair = namedtuple("Pair", "inputs target")


class Sum(nn.Module):
    """Adds up whatever it is called with."""

    def forward(self, *args, **kwargs):
        return sum((*args, *kwargs.values()))


def read(loader, **options):
    batches = Batches(loader, device="cpu", **options)
    first = [(batches.forward(Sum(), b.raw), b.target) for b in batches]
    again = [(batches.forward(Sum(), b.raw), b.target) for b in batches]
    assert len(first) == len(again)
    return first


ONE = [
    ("tensor", X, X, None),
    ("pair", (X, Y), X, Y),
    ("list", [X, Y], X, Y),
    ("named tuple", Pair(X, Y), X, Y),
    ("inputs and more", (X, Y, torch.ones(3)), X, Y),
    ("inputs alone", (X,), X, None),
    ("labels", {"a": X, "labels": Y}, X, Y),
    ("label", {"a": X, "b": X, "label": Y}, 2 * X, Y),
    ("no labels", {"a": X}, X, None),
    ("several inputs", ((X, X), Y), 2 * X, Y),
    ("inputs by name", ({"a": X, "b": X}, Y), 2 * X, Y),
]


@pytest.mark.parametrize(
    ("batch", "outputs", "target"), [c[1:] for c in ONE], ids=[c[0] for c in ONE]
)
def test_one_batch(batch, outputs, target):
    for loader, count in ((batch, 1), ([batch, batch], 2), (DataLoaderLike(batch), 3)):
        if isinstance(batch, torch.Tensor) and count == 2:
            continue  # a sequence of tensors is one batch
        if isinstance(batch, tuple) and isinstance(batch[0], (tuple, dict)) and count == 2:
            loader = DataLoaderLike(batch, 2)
        got = read(loader)
        assert len(got) == count
        for f, y in got:
            assert torch.equal(f, outputs)
            assert (y is None) if target is None else torch.equal(y, target)


class DataLoaderLike:
    """A re-iterable that is neither a sequence nor a DataLoader."""

    def __init__(self, batch, count=3):
        self.batch, self.count = batch, count

    def __iter__(self):
        return iter([self.batch] * self.count)


def test_data_loader():
    got = read(DataLoader(TensorDataset(X, Y), batch_size=3))
    assert [y.tolist() for _, y in got] == [[0, 1, 2], [3]]


def test_forward_and_target():
    batches = {"x": X, "weights": Y}
    got = read(batches, forward=lambda model, b: model(b["x"]), target=lambda b: b["weights"])
    assert torch.equal(got[0][0], X)
    assert torch.equal(got[0][1], Y)


def test_outputs_with_logits():
    batches = Batches(X, device="cpu")
    for wrap in (lambda x: SimpleNamespace(logits=x), lambda x: {"logits": x}):
        assert torch.equal(batches.forward(wrap, X), X)


def test_tensors_are_moved():
    (batch,) = Batches({"a": [X, {"b": X}], "labels": Y}, device="meta")
    leaves = [batch.raw["a"][0], batch.raw["a"][1]["b"], batch.target]
    assert all(leaf.device.type == "meta" for leaf in leaves)


@pytest.mark.parametrize("size", [0, 1])
def test_integer_and_0d_outputs(size):
    batches = Batches(X, device="cpu")
    wrong = (lambda x: x.sum()) if size == 0 else (lambda x: x.long())
    with pytest.raises(DataError, match=r"floating-point outputs \(N, ...\)"):
        batches.forward(wrong, X)


@pytest.mark.parametrize("batch", [3, "text", None, (X, "label")])
def test_a_batch_that_is_none(batch):
    with pytest.raises(DataError, match="expected"):
        list(Batches(DataLoaderLike(batch), device="cpu"))


def test_a_mixed_sequence():
    with pytest.raises(
        DataError, match=r"expected a DataLoader.*got a sequence of \['int', 'tensor'\]"
    ):
        Batches([X, 3], device="cpu")


def test_progress(capsys):
    list(Batches([(X, Y)] * 3, device="cpu", progress=True))
    assert "3/3" in capsys.readouterr().err
    list(Batches([(X, Y)] * 3, device="cpu"))
    assert not capsys.readouterr().err


def test_iterable_dataset():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(zip(X, Y, strict=True))

    assert len(read(DataLoader(Stream(), batch_size=2))) == 2


def test_callables_read_what_the_default_cannot():
    batch = {"x": X, "meta": "text"}
    got = read([batch], forward=lambda model, b: model(b["x"]))
    assert torch.equal(got[0][0], X)
    got = read(DataLoaderLike((X, "label")), target=lambda b: None)
    assert got[0][1] is None


def test_a_mapping_keeps_its_class():
    (batch,) = Batches(UserDict(a=X, labels=Y), device="meta")
    assert isinstance(batch.raw, UserDict)
    assert batch.raw["a"].device.type == "meta"


@dataclasses.dataclass
class Example:
    """A batch that is an object of the user's own."""

    x: torch.Tensor
    labels: torch.Tensor


def test_batches_that_are_dataclasses():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            return self.head(x)

    model, x, y = Model(), torch.randn(6, 4), torch.randint(3, (6,))
    wanted = ng.FIM(model, (x, y), "dense", estimator="empirical").to_dense()
    batches = [Example(a, b) for a, b in zip(x.split(3), y.split(3), strict=True)]
    for data in (Example(x, y), batches):
        F = ng.FIM(model, data, "dense", estimator="empirical", likelihood="categorical")
        torch.testing.assert_close(F.to_dense(), wanted)


class Recurrent(nn.Module):
    """An LSTM over sequences of different lengths, and a linear layer over all of their steps."""

    def __init__(self):
        super().__init__()
        self.steps, self.cell = nn.Linear(3, 4), nn.LSTM(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, sequences):
        steps = sequences._replace(data=torch.tanh(self.steps(sequences.data)))
        return self.head(self.cell(steps)[1][0][-1])


def packed(sequences):
    return pack_sequence(list(sequences), enforce_sorted=False)


@pytest.mark.usefixtures("float64")
def test_packed_sequences_in_every_place():
    """Alone, with labels, in a mapping, and from a loader: a batch of as many examples."""
    model = Recurrent()
    sequences = [torch.randn(n, 3) for n in (5, 2, 4, 3)]
    labels = torch.randint(0, 2, (4,))
    rows = []
    for sequence in sequences:
        for f in model(packed([sequence]))[0]:
            found = torch.autograd.grad(f, list(model.parameters()), retain_graph=True)
            rows.append(torch.cat([g.flatten() for g in found]))
    want = torch.stack(rows).mT @ torch.stack(rows) / 4
    loader = DataLoader(sequences, batch_size=2, collate_fn=packed)
    for data in (
        packed(sequences),
        (packed(sequences), labels),
        {"sequences": packed(sequences), "labels": labels},
        [(packed(sequences[:3]), labels[:3]), (packed(sequences[3:]), labels[3:])],
        loader,
    ):
        for representation in ("dense", "implicit"):
            F = ng.FIM(model, data, representation, likelihood="gaussian")
            torch.testing.assert_close(F.to_dense(), want)
            assert F.num_examples == 4
    report = ng.FIM(model, loader, "kfac", likelihood="gaussian").report()
    (row,) = [row for row in report if row.parameter == "steps.weight"]
    assert row.block == "Kronecker (4x4) x (4x4)"


@pytest.mark.parametrize(
    "as_mapping",
    [OrderedDict, UserDict, ChainMap, MappingProxyType],
)
def test_mappings_of_every_kind(as_mapping):
    model, x, y = nn.Linear(4, 3), torch.randn(6, 4), torch.randint(3, (6,))
    options = {"estimator": "empirical", "likelihood": "categorical"}
    wanted = ng.FIM(model, (x, y), "dense", **options).to_dense()
    whole = as_mapping({"input": x, "labels": y})
    parts = [as_mapping({"input": x[s], "labels": y[s]}) for s in (slice(0, 4), slice(4, 6))]
    for data in (whole, parts):
        found = ng.FIM(model, data, "dense", **options).to_dense()
        torch.testing.assert_close(found, wanted)
