"""Conjugate gradients: relative at every scale, and honest about what they reached."""

import pytest
import torch

from nngeo_lazy.errors import NonFiniteError, NotPositiveDefiniteError
from nngeo_lazy.linalg import cg


def matrix(n=40, cond=1e4, dtype=torch.float64):
    q, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))
    values = torch.logspace(0, torch.tensor(cond).log10().item(), n, dtype=torch.float64)
    return ((q * values) @ q.mT).to(dtype)


def residuals(A, x, b):
    norms = b.norm(dim=0)
    return (b - A @ x).norm(dim=0) / torch.where(norms > 0, norms, 1.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1.0, 1e6, 1e12])
@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_any_scale(dtype, scale, size):
    A = matrix(cond=5.0, dtype=dtype) * scale
    b = torch.randn(40, 3, dtype=dtype) * size
    found = cg(lambda v: A @ v, b)
    tol = 1e-10 if dtype == torch.float64 else 1e-6
    assert found.converged
    assert (residuals(A.double(), found.x.double(), b.double()) < 3 * tol).all()
    torch.testing.assert_close(
        found.residual.double(),
        residuals(A.double(), found.x.double(), b.double()),
        rtol=0.0,
        atol=2 * tol,
    )


def test_columns_of_very_different_size():
    A = matrix()
    b = torch.randn(40, 3, dtype=torch.float64) * torch.logspace(-200, 200, 3, dtype=torch.float64)
    found = cg(lambda v: A @ v, b)
    assert found.converged
    relative = (A @ (found.x / b[0]) - b / b[0]).norm(dim=0) / (b / b[0]).norm(dim=0)
    assert (relative < 1e-9).all()


def test_zero_columns_give_zero():
    A = matrix()
    b = torch.randn(40, 2, dtype=torch.float64)
    b[:, 0] = 0
    found = cg(lambda v: A @ v, b)
    assert (found.x[:, 0] == 0).all()
    assert found.residual[0] == 0
    assert found.converged
    nothing = cg(lambda v: A @ v, torch.zeros(40, 1, dtype=torch.float64))
    assert nothing.iterations == 0
    assert nothing.converged


def test_exact_start_takes_no_iteration():
    A = matrix(cond=10.0)
    x = torch.randn(40, 2, dtype=torch.float64)
    found = cg(lambda v: A @ v, A @ x, x0=x)
    assert found.iterations == 0
    assert found.converged


def test_preconditioner_saves_iterations():
    A = matrix(cond=1e6)
    d = torch.logspace(-3, 3, 40, dtype=torch.float64)
    B = d[:, None] * A * d
    b = torch.randn(40, 1, dtype=torch.float64)
    inverse = torch.linalg.inv(B)
    plain = cg(lambda v: B @ v, b, max_iter=50)
    helped = cg(lambda v: B @ v, b, max_iter=50, preconditioner=lambda r: inverse @ r, tol=1e-3)
    assert not plain.converged
    assert helped.converged
    assert helped.iterations < 5


def test_early_stop_tells_the_true_residual():
    A = matrix()
    b = torch.randn(40, 2, dtype=torch.float64)
    found = cg(lambda v: A @ v, b, max_iter=7)
    assert not found.converged
    assert found.iterations == 7
    torch.testing.assert_close(found.residual, residuals(A, found.x, b))


def test_unreachable_tolerance_stops():
    A = matrix(cond=10.0, dtype=torch.float32)
    found = cg(lambda v: A @ v, torch.randn(40, 1), tol=1e-30)
    assert not found.converged
    assert found.stalled
    assert found.iterations < 400


def test_negative_curvature():
    A = matrix() - 50 * torch.eye(40, dtype=torch.float64)
    with pytest.raises(NotPositiveDefiniteError, match="the matrix is not positive definite"):
        cg(lambda v: A @ v, torch.randn(40, 1, dtype=torch.float64))
    B = matrix()
    with pytest.raises(NotPositiveDefiniteError, match="the preconditioner is not"):
        cg(lambda v: B @ v, torch.ones(40, 1, dtype=torch.float64), preconditioner=lambda r: -r)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite(bad):
    b = torch.ones(40, 2, dtype=torch.float64)
    with pytest.raises(NonFiniteError, match="a product with the matrix"):
        cg(lambda v: v * bad, b)
    b[3, 1] = bad
    with pytest.raises(NonFiniteError, match="the right-hand side"):
        cg(lambda v: v, b)
