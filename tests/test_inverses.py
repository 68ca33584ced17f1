"""Inverses by an iteration of one's choice: against dense algebra, and against curvlinops."""

import pytest
import torch
from torch import nn

import nngeo_lazy as ng
from nngeo_lazy.errors import ConvergenceWarning, NotPositiveDefiniteError, UnsupportedLayerError

from cases import close


def problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    return model, torch.randn(20, 4).double(), torch.randint(3, (20,))


def spd(n=12, low=0.1):
    torch.manual_seed(1)
    q = torch.linalg.qr(torch.randn(n, n).double())[0]
    return (q * torch.linspace(low, 1.7, n).double()) @ q.mT


@pytest.mark.parametrize("method", ["cg", "minres", "lsmr"])
@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_each_iteration(method, damping):
    A = spd()
    M = ng.inverse(A, method=method, damping=damping)
    eye = torch.eye(12).double()
    want = torch.linalg.inv(A + damping * eye)
    if method == "lsmr":
        want = torch.linalg.solve(A.mT @ A + damping * eye, A.mT)
    close(M.to_dense(), want, 1e-7)
    v = torch.randn(12, 3).double()
    close(M @ v, want @ v, 1e-7)
    close(M @ v[:, 0], want @ v[:, 0], 1e-7)
    close(M.mT @ v, want.mT @ v, 1e-7)


@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (6, 6)])
def test_the_pseudo_inverse_of_any_matrix(shape):
    A = torch.randn(*shape).double()
    M = ng.inverse(A, method="lsmr")
    assert M.shape == shape[::-1]
    close(M.to_dense(), torch.linalg.pinv(A), 1e-7)
    close(M.mT.to_dense(), torch.linalg.pinv(A).mT, 1e-7)
    model, x, _ = problem()
    J = ng.Jacobian(model, x)
    rows = torch.randn(60).double()
    want = torch.linalg.lstsq(J.to_dense(), rows[:, None], driver="gelsd").solution[:, 0]
    found = ng.inverse(J, method="lsmr", tol=1e-9) @ rows
    close(J @ found, J.to_dense() @ want, 1e-5)


def series(A, scale, terms):
    step = torch.eye(len(A)).double() - scale * A
    return scale * sum(torch.linalg.matrix_power(step, k) for k in range(terms + 1))


@pytest.mark.parametrize("terms", [0, 1, 7, 100])
@pytest.mark.parametrize("scale", [0.3, 1.0])
def test_a_neumann_series(terms, scale):
    A = spd()
    M = ng.inverse(A, method="neumann", terms=terms, scale=scale)
    close(M.to_dense(), series(A, scale, terms), 1e-10)
    close(M.mT.to_dense(), series(A, scale, terms), 1e-10)
    damped = ng.inverse(A, method="neumann", terms=terms, scale=scale, damping=0.1)
    close(damped.to_dense(), series(A + 0.1 * torch.eye(12).double(), scale, terms), 1e-10)


def test_its_scale_is_found():
    model, x, y = problem()
    F = ng.FIM(model, (x, y), "implicit")
    M = ng.inverse(F, method="neumann", damping=0.5, terms=60)
    v = F.space.randn()
    step, want = F.to_dense() + 0.5 * torch.eye(43), F.solve(v, damping=0.5)
    assert 0.9 < M.settings["scale"] * float(torch.linalg.eigvalsh(step)[-1]) <= 1
    close(M @ v, want, 1e-6)
    close(F.space.ravel(M @ F.space.unravel(v)), want, 1e-6)


@pytest.mark.parametrize("low", [-0.5, 0.1])
def test_a_series_that_diverges_is_named(low):
    A, v = spd(low=low), torch.randn(12).double()
    scale = 1.0 if low < 0 else 1.3  # 1.3 * 1.7 > 2
    M = ng.inverse(A, method="neumann", scale=scale, terms=1000)
    with pytest.raises(NotPositiveDefiniteError, match=r"diverges: term .*2 / scale = .*smaller"):
        M @ v
    if low > 0:
        close(ng.inverse(A, method="neumann", scale=1.1, terms=1000) @ v, torch.linalg.solve(A, v))
    else:  # the other remedy that the message names
        damped = ng.inverse(A, method="neumann", damping=1.0, terms=1000)
        close(damped @ v, torch.linalg.solve(A + torch.eye(12).double(), v), 1e-6)


def test_divergence_that_shows_late_is_named():
    """Most of the vector is well; a part of 1e-6 of it grows."""
    A = torch.diag(torch.tensor([1.0, 2.2])).double()
    M = ng.inverse(A, method="neumann", scale=1.0, terms=200)
    with pytest.raises(NotPositiveDefiniteError, match="diverges"):
        M @ torch.tensor([1.0, 1e-6]).double()


def test_a_tolerance_of_a_series():
    A, v = spd(), torch.randn(12).double()
    M = ng.inverse(A, method="neumann", scale=1.0, terms=5, tol=1e-6)
    with pytest.warns(ConvergenceWarning, match="the Neumann series"):
        M @ v
    M = ng.inverse(A, method="neumann", scale=1.0, terms=1000, tol=1e-6)
    assert float((A @ (M @ v) - v).norm() / v.norm()) < 1e-6


def test_gradients():
    A, v = spd(), torch.randn(12).double().requires_grad_()
    M = ng.inverse(A, method="neumann", scale=1.0, terms=7)
    (slope,) = torch.autograd.grad((M @ v).square().sum(), v)
    want = series(A, 1.0, 7)
    close(slope, 2 * want.mT @ want @ v.detach(), 1e-10)
    with pytest.raises(UnsupportedLayerError, match=r"no gradient: take F\.inverse\(\)"):
        ng.inverse(A, method="lsmr") @ v
    close(ng.aslinearoperator(A).inverse() @ v, torch.linalg.solve(A, v), 1e-9)


def test_bad_settings():
    A = spd()
    with pytest.raises(ValueError, match="'cg', 'minres', 'lsmr', 'neumann'"):
        ng.inverse(A, method="jacobi")
    with pytest.raises(ValueError, match=r"needs a symmetric matrix, got \(3, 2\): take 'lsmr'"):
        ng.inverse(torch.ones(3, 2), method="cg")
    with pytest.raises(ValueError, match="takes terms= in place of max_iter="):
        ng.inverse(A, method="neumann", max_iter=3)
    with pytest.raises(ValueError, match="expected scale= to be positive, got -1"):
        ng.inverse(A, method="neumann", scale=-1.0)
    with pytest.raises(ValueError, match="takes a number as damping="):
        ng.inverse(A, method="lsmr", damping=torch.ones(12).double())
    with pytest.raises(UnsupportedLayerError, match="add damping="):
        ng.inverse(-A, method="neumann")
    with pytest.raises(NotPositiveDefiniteError):
        ng.inverse(spd(low=-0.5), method="cg") @ torch.ones(12).double()


# --- curvlinops -----------------------------------------------------------------------------------


@pytest.mark.peers
@pytest.mark.parametrize("kind", ["CG", "LSMR", "Neumann"])
def test_their_inverses(kind):
    curvlinops = pytest.importorskip("curvlinops")
    examples = pytest.importorskip("curvlinops.examples")
    model, x, y = problem()
    loss, parameters = nn.CrossEntropyLoss(), list(model.parameters())
    H = curvlinops.GGNLinearOperator(model, loss, parameters, [(x, y)])
    damped = H + 0.1 * examples.IdentityLinearOperator(
        [p.shape for p in parameters], x.device, x.dtype
    )
    F = ng.GGN(model, (x, y), loss=loss)
    v = F.space.randn()
    if kind == "Neumann":
        theirs = curvlinops.NeumannInverseLinearOperator(damped, num_terms=30, scale=0.5)
        ours = ng.inverse(F, method="neumann", damping=0.1, terms=30, scale=0.5)
        close(ours @ v, theirs @ v, 1e-10)
        return
    if kind == "CG":
        theirs = curvlinops.CGInverseLinearOperator(damped, tolerance=1e-10, max_iter=200, eps=0)
        ours = ng.inverse(F, method="cg", damping=0.1)
    else:
        theirs = curvlinops.LSMRInverseLinearOperator(damped, atol=1e-12, btol=1e-12, maxiter=500)
        ours = ng.inverse(F.damped(0.1), method="lsmr")
    close(ours @ v, theirs @ v, 1e-6)
