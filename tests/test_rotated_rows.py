"""Squared rows in a Kronecker basis: both orders of the products give the definition's numbers."""

import pytest
import torch
from torch import nn

import nngeo_lazy as ng
import nngeo_lazy.statistics as statistics
from nngeo_lazy.jacobian.forms import Outer
from nngeo_lazy.jacobian.inputs import DenseInputs
from nngeo_lazy.jacobian.rotated_rows import rows_first, squares_of_rows


def form(r, n, groups, t, o, i, bias):
    torch.manual_seed(0)
    g = torch.randn(r, n, groups, t, o, dtype=torch.float64)
    return Outer(g, DenseInputs(torch.randn(n, groups, t, i, dtype=torch.float64)), bias)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_squares_are_those_of_the_definition(groups, bias):
    outer = form(2, 3, groups, 9, 4, 3, bias)
    w = outer.width
    left = torch.linalg.qr(torch.randn(groups, 4, 4, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(groups, w, w, dtype=torch.float64))[0]
    x = outer.inputs.x
    x = torch.cat([x, x.new_ones(*x.shape[:-1], 1)], -1) if bias else x
    projected = torch.einsum("rngto,goa,ngti,gib->rngab", outer.g, left, x, right)
    expected = projected.square().sum((0, 1)).flatten()
    torch.testing.assert_close(squares_of_rows(outer, left, right), expected)


@pytest.mark.parametrize(("t", "width", "first"), [(1, 3, False), (4, 32, False), (256, 3, True)])
def test_rows_are_made_first_if_positions_are_many(t, width, first):
    outer = form(1, 2, 1, t, 8, width, False)
    assert rows_first(outer, torch.eye(8)[None], torch.eye(width)[None], True) == first


@pytest.mark.parametrize("estimator", ["exact", "empirical"])
def test_a_build_does_not_depend_on_the_order(estimator, monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 3)).double()
    batch = torch.randn(5, 2, 6, 6, dtype=torch.float64), torch.randint(3, (5,))
    taken = []

    def build(first):
        monkeypatch.setattr(statistics, "rows_first", lambda form, *_: taken.append(first) or first)
        return ng.FIM(model, batch, "ekfac", estimator=estimator, params="0").to_dense()

    torch.testing.assert_close(build(True), build(False))
    assert set(taken) == {True, False}
