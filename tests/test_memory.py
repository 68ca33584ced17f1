"""What a build holds at its peak, and factors that are kept small."""

import gc

import pytest
import torch
from torch import nn

import nngeo_lazy as ng
from nngeo_lazy.errors import DataError
from nngeo_lazy.representations import EKFAC, KFAC

from cases import close

pytestmark = pytest.mark.usefixtures("float64")


def held(size):
    """How many square tensors of this size are alive."""
    everything = (each for each in gc.get_objects() if issubclass(type(each), torch.Tensor))
    return sum(1 for t in everything if t.shape[-2:] == (size, size))


class Watching:
    """One batch, and how many factors are alive whenever it is read."""

    def __init__(self, size):
        self.batch = torch.randn(9, size), torch.randn(9, 2)
        self.size, self.found = size + 1, []  # with the bias's column

    def __iter__(self):
        gc.collect()
        self.found.append(held(self.size))
        yield self.batch


def test_factors_and_bases_are_never_alive_twice(monkeypatch):
    monkeypatch.setattr("nngeo_lazy.kept.KEPT_BYTES", 0)  # so that the second pass reads the data
    data = Watching(36)
    before = held(37)
    E = ng.FIM(nn.Linear(36, 2), data, "ekfac", likelihood="gaussian")
    assert len(data.found) == 2
    assert data.found[1] - before == 1  # the eigenvectors, and no factor beside them
    gc.collect()
    assert held(37) - before == 1
    del E


@pytest.mark.parametrize("kind", [KFAC, EKFAC])
def test_factors_past_a_limit_are_diagonal(kind):
    model, x = nn.Linear(6, 3), torch.randn(8, 6)
    F = ng.FIM(model, x, kind(max_factor=4), likelihood="gaussian")
    assert F.members[0]._kind().endswith("Kronecker (3x3) x (diagonal 7)")
    assert F.info.quantity["representation"] == f"{kind.__name__}(sharing='expand', max_factor=4)"
    whole = ng.FIM(model, x, "kfac", likelihood="gaussian").members[0]
    if kind is KFAC:
        close(F.members[0].left, whole.left)
        close(F.members[0].right, whole.right.diagonal(dim1=-2, dim2=-1))
    else:  # the basis is the identity on both sides, in which the diagonal is exact
        exact = ng.FIM(model, x, "dense", likelihood="gaussian")
        close(F.diagonal(), exact.diagonal())
    assert repr(kind()) == f"{kind.__name__}(sharing='expand')"
    assert kind(max_factor=10).described() != kind().described()


@pytest.mark.parametrize("limit", [0, 2.5, True])
def test_bad_limits_of_factors(limit):
    with pytest.raises(DataError, match=r"expected max_factor to be an? (positive )?integer, got"):
        KFAC(max_factor=limit)
