"""Solves by Kronecker products whose factors are regular need no eigenvectors."""

import pytest
import torch
from torch import nn

import nngeo_lazy as ng
from nngeo_lazy.errors import NotPositiveDefiniteError
from nngeo_lazy.operators import KroneckerLinearOperator

pytestmark = pytest.mark.usefixtures("float64")


@pytest.fixture
def no_eigenvectors(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("an eigendecomposition")

    monkeypatch.setattr(torch.linalg, "eigh", refuse)
    monkeypatch.setattr(torch.linalg, "eigvalsh", refuse)


def spd(n, groups=1, least=0.0, dtype=torch.float64):
    x = torch.randn(groups, n, n + 1)
    return (x @ x.mT + least * torch.eye(n)).to(dtype)


def solved(matrix, v):
    return torch.linalg.solve(matrix.double(), v.double())


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("columns", [None, 2])
def test_a_factored_damping(columns, diagonal, groups, no_eigenvectors):
    left = torch.rand(groups, 4) if diagonal else spd(4, groups)
    K = KroneckerLinearOperator(left, spd(5, groups))
    v = torch.randn(20 * groups, *(() if columns is None else (columns,)))
    F = K.damped(1e-2, method="factored")
    torch.testing.assert_close(F.solve(v), solved(F.to_dense(), v))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_left_to_float64(dtype):
    """A condition number of 10^8 takes digits that float32 does not have."""
    left = torch.diag(torch.logspace(0, -4, 4))[None]
    Q = torch.linalg.qr(torch.randn(4, 4)).Q
    left = (Q @ left @ Q.mT).to(dtype)
    K = KroneckerLinearOperator(left, left)
    if dtype == torch.bfloat16:
        K = K.damped(1e-2, method="factored")
    v = torch.randn(16).to(dtype)
    want = solved(K.to(torch.float64).to_dense(), v)
    torch.testing.assert_close(K.solve(v).double(), want, rtol=0.02, atol=0.02 * want.abs().max())


def test_a_singular_one_is_still_refused():
    zero = torch.diag(torch.tensor([1.0, 0.0]))[None]
    with pytest.raises(NotPositiveDefiniteError, match="the matrix is singular"):
        KroneckerLinearOperator(zero, spd(3)).solve(torch.ones(6))
    with pytest.raises(NotPositiveDefiniteError, match="the matrix is singular"):
        KroneckerLinearOperator(torch.tensor([[1.0, 0.0]]), spd(3)).solve(torch.ones(6))


def test_an_indefinite_one_is_solved():
    K = KroneckerLinearOperator(torch.diag(torch.tensor([1.0, -2.0]))[None], spd(3))
    v = torch.randn(6)
    torch.testing.assert_close(K.solve(v), solved(K.to_dense(), v))


def test_factors_that_are_changed_in_place_are_inverted_again(no_eigenvectors):
    left = spd(3, least=1.0)
    K, v = KroneckerLinearOperator(left, spd(2, least=1.0)), torch.randn(6)
    K.solve(v)
    left.mul_(2)
    torch.testing.assert_close(K.solve(v), solved(K.to_dense(), v))


def test_a_build(no_eigenvectors):
    model, x = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(6, 4)
    F = ng.FIM(model, x, "kfac", likelihood="gaussian").damped(1e-2, method="factored")
    v = torch.randn(F.shape[0])
    torch.testing.assert_close(F.solve(v), solved(F.to_dense(), v))
