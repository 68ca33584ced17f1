"""Solvers on any operator: `ng.solve`, preconditioners, sample space, Nystrom, scipy."""

import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg as sla
import torch
from linear_operator.operators import ToeplitzLinearOperator
from sklearn.datasets import load_digits
from torch import nn

import nngeo_lazy as ng
from nngeo_lazy.errors import (
    ConvergenceWarning,
    NonFiniteError,
    NotPositiveDefiniteError,
    SpaceMismatchError,
)
from nngeo_lazy.operators import DenseLinearOperator, FromScipyLinearOperator
from nngeo_lazy.representations import Implicit

from cases import close

pytestmark = pytest.mark.usefixtures("float64")


@pytest.fixture(scope="module")
def digits():
    """A trained CNN, its data, and its matrices."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x[:600] / 16).view(-1, 1, 8, 8), torch.tensor(y[:600])
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2),
        nn.ReLU(),
        nn.Conv2d(4, 8, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8, 10),
    )
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    F = ng.FIM(net, (x, y), "implicit")
    dense, g = ng.FIM(net, (x, y), "dense").to_dense(), F.space.grad(net)
    torch.set_default_dtype(default)
    return net, (x, y), F, dense, g


def damped(dense, d):
    return dense + d * torch.eye(len(dense))


# --- preconditioners ------------------------------------------------------------------------------


def test_kfac_preconditions(digits):
    """Fewer iterations at small damping, where the scales of the layers matter."""
    net, batch, F, dense, g = digits
    d = 1e-4
    expected = torch.linalg.solve(damped(dense, d), g)
    counts = {}
    for name in (None, "kfac", "ekfac", "diagonal", "block_diagonal"):
        K = None if name is None else ng.FIM(net, batch, name)
        found = ng.solve(F, g, damping=d, preconditioner=K)
        counts[name] = found.iterations
        assert found.converged
        assert found.method == "cg"
        close(found.x, expected, 1e-7)
        close(F.solve(g, damping=d, preconditioner=K), found.x, 1e-12)
        true = (damped(dense, d) @ found.x - g).norm() / g.norm()
        assert abs(float(true) - float(found.residual)) < 1e-12
    print("iterations:", counts)
    assert counts["kfac"] < counts[None]
    assert counts["block_diagonal"] < counts["kfac"]


def test_nystrom(digits):
    _, _, F, dense, g = digits
    d = 1e-3
    values = torch.linalg.eigvalsh(dense)
    rank = 2 * int(np.ceil(1.5 * float((values / (values + d)).sum()))) + 1
    K = ng.nystrom(F, rank, seed=0)
    assert K.space == F.space
    assert torch.linalg.eigvalsh(dense - K.to_dense()).min() > -1e-9 * values.max()
    plain, helped = (ng.solve(F, g, damping=d, preconditioner=P) for P in (None, K))
    close(helped.x, plain.x, 1e-6)
    assert helped.iterations < plain.iterations / 3
    with pytest.raises(ValueError, match="rank from 1 to"):
        ng.nystrom(F, 0)
    H = -torch.eye(3)
    with pytest.raises(NotPositiveDefiniteError, match="not positive semidefinite"):
        ng.nystrom(H, 2)


def test_bad_preconditioners(digits):
    net, batch, F, _, g = digits
    with pytest.raises(SpaceMismatchError, match="expected a preconditioner of shape"):
        F.solve(g, damping=0.1, preconditioner=ng.FIM(net, batch, "kfac", params="0.*"))
    with pytest.raises(SpaceMismatchError, match=r"preconditioner of torch\.float64"):
        ng.solve(F, g, preconditioner=ng.identity(F.space).to(torch.float32))
    for method in ("cg", "minres"):
        with pytest.raises(NotPositiveDefiniteError, match="the preconditioner is not positive"):
            ng.solve(F, g, method=method, preconditioner=-ng.identity(F.space))


# --- methods --------------------------------------------------------------------------------------


def test_indefinite(digits):
    net, batch, _, _, g = digits
    H = ng.Hessian(net, batch, loss="categorical")
    dense = H.to_dense()
    assert torch.linalg.eigvalsh(dense)[0] < -0.01
    d = 1e-2
    with pytest.raises(NotPositiveDefiniteError, match="method='minres'"):
        H.solve(g, damping=d)
    with pytest.raises(NotPositiveDefiniteError, match="is not positive definite"):
        ng.solve(H, g, damping=d, method="cg")
    expected = torch.linalg.solve(damped(dense, d), g)
    for method in ("minres", "auto"):
        found = ng.solve(H, g, damping=d, method=method, tol=1e-9, max_iter=20000)
        assert found.method == "minres"
        assert found.converged
        close(found.x, expected, 1e-5)
    F = ng.FIM(net, batch, "kfac").damped(0.1)
    helped = ng.solve(H.damped(d), g, method="minres", preconditioner=F, tol=1e-6)
    close(helped.x, expected, 1e-2)


def test_a_definite_product_of_indefinite_factors():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    data = torch.randn(20, 3).double(), torch.randint(2, (20,))
    H = ng.Hessian(model, data, loss="categorical").damped(0.02)
    A, b = H.to_dense(), torch.randn(H.shape[0]).double()
    assert torch.linalg.eigvalsh(A)[0] < 0
    close((H @ H).solve(b), torch.linalg.solve(A @ A, b), 1e-5)
    G = ng.FIM(model, data, "dense", likelihood="categorical").damped(0.1)
    for product in (H @ G, H @ H):
        with pytest.raises(NotPositiveDefiniteError, match="of a product's factors"):
            product.solve(b.clone().requires_grad_())
    inner = ng.solve(H, b, method="minres").x  # the remedy, one factor after the other
    close(ng.solve(G, inner).x, torch.linalg.solve(A @ G.to_dense(), b), 1e-5)


def test_rectangular(digits):
    net, (x, _), _, _, _ = digits
    x = x[:20]
    for representation in ("implicit", "factored", "dense"):
        J = ng.Jacobian(net, x, representation)
        dense = J.to_dense()
        b = torch.randn(J.shape[0], 2)
        found = ng.solve(J, b, damping=0.1)
        assert found.method == "lsmr"
        expected = torch.linalg.solve(damped(dense.mT @ dense, 0.1), dense.mT @ b)
        close(found.x, expected, 1e-6)
        start = ng.solve(J, b, damping=0.1, x0=found.x)
        assert start.iterations == 0
    one = ng.solve(J, b[:, 0], damping=0.1)
    assert one.x.shape == (J.shape[1],)
    skew = torch.tensor([[1.0, 5.0], [0.0, 2.0]])
    assert ng.solve(skew, torch.ones(2)).method == "lsmr"  # square, and not symmetric
    close(ng.solve(skew, torch.ones(2)).x, torch.linalg.solve(skew, torch.ones(2)), 1e-8)
    for method in ("cg", "direct"):
        with pytest.raises(ValueError, match="needs a symmetric matrix"):
            ng.solve(J, b, method=method)
    with pytest.raises(ValueError, match="takes no preconditioner="):
        ng.solve(J, b, preconditioner=ng.identity(J.space))
    with pytest.raises(ValueError, match="takes a number as damping="):
        ng.solve(J, b, damping=torch.ones(J.shape[1]))


def test_structure_decides_and_not_size(digits):
    net, batch, F, dense, g = digits
    for name in ("dense", "kfac", "ekfac", "diagonal", "low_rank", "quasi_diagonal"):
        found = ng.solve(ng.FIM(net, batch, name), g, damping=0.1)
        assert found.method == "direct"
        assert found.iterations == 0
        assert found.residual.max() < 1e-8
    assert ng.solve(F, g, damping=0.1).method == "cg"
    assert ng.solve(2 * F, g, damping=0.1).method == "cg"
    assert ng.solve(torch.eye(2000), torch.ones(2000)).method == "direct"
    with pytest.raises(ValueError, match="needs a closed form"):
        ng.solve(F, g, method="direct")
    with pytest.raises(ValueError, match="expected method to be one of"):
        ng.solve(F, g, method="gmres")
    named = ng.solve(F, F.space.unravel(g), damping=0.1)
    close(F.space.ravel(named.x), torch.linalg.solve(damped(dense, 0.1), g), 1e-8)
    columns = ng.solve(F, torch.stack([g, torch.zeros_like(g), 1e-9 * g], 1), damping=0.1)
    assert columns.residual.shape == (3,)
    assert not columns.x[:, 1].any()  # a zero right-hand side gives zero
    close(columns.x[:, 2] * 1e9, columns.x[:, 0], 1e-8)


def test_warm_start_limits_and_nan(digits):
    _, _, F, _, g = digits
    d = 1e-3
    full = ng.solve(F, g, damping=d)
    assert ng.solve(F, g, damping=d, x0=full.x).iterations == 0
    near = ng.solve(F, 1.001 * g, damping=d, x0=full.x)
    assert near.iterations < full.iterations
    for method in ("cg", "minres"):
        with pytest.warns(ConvergenceWarning, match="short of tol=1e-10") as caught:
            short = ng.solve(F, g, damping=d, method=method, max_iter=5)
        assert caught[0].filename == __file__
        assert not short.converged
        assert short.iterations == 5
        assert caught[0].message.residual == float(short.residual)
    with pytest.warns(ConvergenceWarning, match="conjugate gradients stopped") as caught:
        F.solve(g, damping=d, max_iter=5)
    assert caught[0].filename == __file__
    broken = g.clone()
    broken[0] = float("nan")
    with pytest.raises(NonFiniteError, match="NaN or infinity in the right-hand side"):
        F.solve(broken, damping=d)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_any_scale(digits, scale):
    """No tolerance is absolute: at every scale the relative residual that was asked for."""
    _, _, F, dense, g = digits
    small = scale * F
    found = ng.solve(small, scale * g, damping=1e-3 * scale)
    assert found.converged
    assert found.residual.max() <= 1e-10
    close(found.x, torch.linalg.solve(damped(dense, 1e-3), g), 1e-7)


# --- sample space ---------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["exact", "mc", "empirical"])
def test_sample_space(digits, estimator):
    """(J^T S S^T J / N + d)^-1 g by the Gram matrix of the rows, where they are few."""
    net, (x, y), _, _, g = digits
    options = {"estimator": estimator, "seed": 0}
    batch = (x[:20], y[:20])
    F = ng.FIM(net, batch, "factored", **options)
    dense = ng.FIM(net, batch, "dense", **options).to_dense()
    for d in (1e-1, 1e-4, 1e-7):
        close_form = F.damped(d)
        assert close_form.in_sample_space == (20 * (9 if estimator == "exact" else 1) * 2 <= len(g))
        assert close_form.in_sample_space != close_form.iterates
        found = ng.solve(F, g, damping=d, tol=1e-10 / d**0.5)
        assert found.method == "direct"
        assert found.converged
        close(found.x, torch.linalg.solve(damped(dense, d), g), 1e-9 / d**0.5)
        close(close_form.logdet(), torch.logdet(damped(dense, d)), 1e-9)
    many = ng.FIM(net, (x[:100], y[:100]), "factored", **{**options, "estimator": "exact"})
    assert many.damped(0.1).iterates  # more rows than half of the parameters: no gain
    assert ng.solve(many, g, damping=0.1).method == "cg"


def test_sample_space_is_differentiable():
    net, x = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)), torch.randn(2, 2)
    F = ng.FIM(net, x, "factored", likelihood="gaussian")
    v, d = torch.randn(17, requires_grad=True), torch.tensor(0.3, requires_grad=True)
    assert F.damped(0.3).in_sample_space
    assert torch.autograd.gradcheck(lambda v, d: F.solve(v, damping=d), (v, d))
    assert torch.autograd.gradgradcheck(lambda v, d: F.solve(v, damping=d), (v, d))


# --- scipy ----------------------------------------------------------------------------------------


def test_scipy_solvers(digits):
    net, (x, y), F, dense, g = digits
    d, b = 1e-2, g.numpy()
    S, A = F.damped(d).to_scipy(), damped(dense, d).numpy()
    expected = np.linalg.solve(A, b)
    K = ng.FIM(net, (x, y), "kfac").inverse(damping=d).to_scipy()
    for x_ in (
        sla.cg(S, b, rtol=1e-12)[0],
        sla.cg(S, b, rtol=1e-12, M=K)[0],
        sla.minres(S, b, rtol=1e-14)[0],
        sla.lsmr(S, b, atol=1e-14, btol=1e-14, conlim=0, maxiter=20000)[0],
    ):
        assert np.linalg.norm(x_ - expected) < 1e-5 * np.linalg.norm(expected)
    H = ng.Hessian(net, (x, y), loss="categorical")
    for operator, matrix in ((F, dense), (H, H.to_dense())):
        values = np.linalg.eigvalsh(matrix.numpy())
        found = np.sort(sla.eigsh(operator.to_scipy(), 3, which="LA")[0])
        np.testing.assert_allclose(found, values[-3:], rtol=1e-8)
        start = np.random.default_rng(0).standard_normal((len(values), 3))
        found = np.sort(sla.lobpcg(operator.to_scipy(), start, tol=1e-6, maxiter=500)[0])
        np.testing.assert_allclose(found, values[-3:], rtol=1e-6)
    J = ng.Jacobian(net, x[:20])
    found = np.sort(sla.svds(J.to_scipy(), 3, random_state=0)[1])
    np.testing.assert_allclose(found, np.linalg.svd(J.to_dense().numpy())[1][2::-1], rtol=1e-8)
    smallest = sla.eigsh(H.to_scipy(), 1, which="SA")[0]
    np.testing.assert_allclose(smallest, np.linalg.eigvalsh(H.to_dense().numpy())[:1], rtol=1e-6)


def test_float32_network_in_float64_scipy():
    net, x = nn.Linear(3, 2).float(), torch.randn(8, 3, dtype=torch.float32)
    F = ng.FIM(net, x, "implicit", likelihood="gaussian")
    S = F.damped(0.1).to_scipy(np.float64)
    assert S.dtype == np.float64
    b = np.ones(8)
    assert np.linalg.norm(S @ sla.cg(S, b, rtol=1e-5)[0] - b) < 1e-4


def test_aslinearoperator(digits):
    _, _, F, dense, g = digits
    matrix = dense.numpy()
    expected = torch.linalg.solve(damped(dense, 0.1), g)
    for given in (
        dense,
        matrix,
        sla.aslinearoperator(matrix),
        scipy.sparse.csr_array(matrix),
        ToeplitzLinearOperator(torch.tensor([2.0, 1.0])),
    ):
        A = ng.aslinearoperator(given)
        if A.shape == F.shape:
            close(A @ g, dense @ g, 1e-12)
            close(A.mT @ g, dense @ g, 1e-12)
            close(ng.solve(given, g, damping=0.1).x, expected, 1e-7)
            close((F + A) @ g, 2 * dense @ g, 1e-9)
    assert ng.aslinearoperator(F.to_scipy()) is F
    assert ng.aslinearoperator(F) is F
    assert isinstance(ng.aslinearoperator(matrix), DenseLinearOperator)
    rectangular = np.arange(6.0).reshape(2, 3)
    wide = ng.aslinearoperator(sla.aslinearoperator(rectangular))
    close(wide.to_dense(), torch.tensor(rectangular), 1e-12)
    close(wide.mT.to_dense(), torch.tensor(rectangular.T), 1e-12)
    with pytest.raises(TypeError, match="expected a tensor or a linear operator, got str"):
        ng.aslinearoperator("matrix")


def test_scipy_operators_are_differentiable():
    matrix = torch.randn(4, 4)
    matrix = matrix @ matrix.mT + torch.eye(4)
    A = ng.aslinearoperator(sla.aslinearoperator(matrix.numpy()))
    assert isinstance(A, FromScipyLinearOperator)
    v = torch.randn(4, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: A @ v, (v,))
    assert torch.autograd.gradgradcheck(lambda v: A.vTMv(v), (v,))
    assert torch.autograd.gradcheck(lambda v: A.solve(v), (v,))
    close(torch.func.vmap(lambda v: A @ v)(torch.eye(4)), matrix, 1e-12)


def test_posterior_without_a_matrix(digits):
    """Perturb and solve, preconditioned or not, whitened by the true matrix."""
    net, (x, y), _, _, _ = digits
    head = ng.FIM(net, (x[:100], y[:100]), Implicit(), params="5.*")
    dense, d = head.to_dense(), 0.05
    draws = head.inverse(damping=d).sample(3000, seed=0)
    white = draws @ torch.linalg.cholesky(damped(dense, d))
    moment = white.mT @ white / 3000
    assert (moment - torch.eye(len(moment))).abs().max() < 7 / 3000**0.5
