"""Statistics that are updated layer by layer, while a backward pass goes by."""

import gc

import pytest
import torch
from torch import nn

import nngeo_lazy as ng
from nngeo_lazy.errors import DataError
from nngeo_lazy.jacobian import passes
from nngeo_lazy.jacobian.passes import Recorded
from nngeo_lazy.statistics import KroneckerFactors

import zoo
from cases import Case

pytestmark = [
    pytest.mark.usefixtures("float64"),
    # torch's own, on padding="same" with an even kernel
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
]
DEPTH, WIDTH, BATCH = 6, 37, 41


@pytest.fixture
def always(monkeypatch):
    """Directions are passed back one by one, as if they were large."""
    monkeypatch.setattr(passes, "CHUNK_BYTES", 1)


@pytest.mark.parametrize("make", zoo.NETS, ids=lambda make: make.__name__)
def test_every_network_to_the_last_bit(make, always, monkeypatch):
    for representation, estimator in (("ekfac", "exact"), ("dense", "mc")):
        torch.manual_seed(1)
        case = Case(make(), "categorical", estimator)
        streamed = case.build(representation)
        monkeypatch.setattr(Recorded, "streams", False)
        at_once = case.build(representation)
        monkeypatch.undo()
        monkeypatch.setattr(passes, "CHUNK_BYTES", 1)
        for one, other in zip(streamed.representation(), at_once.representation(), strict=True):
            assert torch.equal(one, other)
        assert str(streamed.report()) == str(at_once.report())


def deep():
    layers = [layer for _ in range(DEPTH) for layer in (nn.Linear(WIDTH, WIDTH), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 2))


def alive():
    """How many tensors of a layer's inputs or output gradients there are."""
    tensors = (each for each in gc.get_objects() if issubclass(type(each), torch.Tensor))
    return len({t.data_ptr() for t in tensors if t.numel() == BATCH * WIDTH})


def counted(monkeypatch, dtype=torch.float64):
    """How many are alive whenever a layer's factors are updated, in the order of updates."""
    found, update = [], KroneckerFactors.update

    def watched(self, *args):
        update(self, *args)
        found.append(alive())

    model, x = deep().to(dtype), torch.randn(BATCH, WIDTH, dtype=dtype)
    target = torch.randint(2, (BATCH,))
    ng.FIM(model, (x[:4], target[:4]), "kfac", estimator="empirical")
    with monkeypatch.context() as patched:
        patched.setattr(KroneckerFactors, "update", watched)
        ng.FIM(model, (x, target), "kfac", estimator="empirical")
    return found


def test_no_more_than_a_layer_is_held_at_once(always, monkeypatch):
    streamed = counted(monkeypatch)
    monkeypatch.setattr(Recorded, "streams", False)
    at_once = counted(monkeypatch)
    assert len(streamed) == len(at_once) == DEPTH + 1
    # inputs that the backward pass has not come to; none at the end but that of the first layer
    assert streamed == sorted(streamed, reverse=True)
    assert streamed[0] <= DEPTH + 4
    assert streamed[-1] <= 4
    assert min(at_once) >= 2 * DEPTH


def test_low_precision_is_converted_one_layer_at_a_time(always, monkeypatch):
    streamed = counted(monkeypatch, torch.bfloat16)
    assert streamed[-1] <= 5


def test_an_error_in_a_layer_leaves_no_hook(always, monkeypatch):
    update = KroneckerFactors.update

    def broken(self, *args):
        if self.indices == (1,):
            raise DataError("broken on the way")
        update(self, *args)

    case = Case(zoo.mlp(), "categorical", "exact")
    before = case.build("kfac").to_dense()
    monkeypatch.setattr(KroneckerFactors, "update", broken)
    with pytest.raises(DataError, match="broken on the way"):
        case.build("kfac")
    monkeypatch.setattr(KroneckerFactors, "update", update)
    assert torch.equal(case.build("kfac").to_dense(), before)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_interrupts_arrive_as_they_are(error, always, monkeypatch):
    def broken(self, *args):
        raise error

    monkeypatch.setattr(KroneckerFactors, "update", broken)
    with pytest.raises(error):
        Case(zoo.mlp(), "categorical", "exact").build("kfac")
