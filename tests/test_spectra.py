"""Eigenpairs, singular triplets and densities against dense decompositions."""

import math
import warnings

import linear_operator
import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from torch import nn

import nngeo_lazy as ng
from nngeo_lazy import linalg
from nngeo_lazy.errors import ConvergenceWarning, DataError, NonFiniteError, SpaceMismatchError
from nngeo_lazy.linalg.krylov import norms
from nngeo_lazy.testing import LargestTensor

import zoo
from cases import close
from operators import examples

pytestmark = pytest.mark.usefixtures("float64")

SCALES = [1e-12, 1.0, 1e12]


def symmetric(values):
    values = torch.as_tensor(values, dtype=torch.float64)
    q = torch.linalg.qr(torch.randn(len(values), len(values))).Q
    return (q * values) @ q.mT


def products_only(A):
    """The matrix, of which only products are known."""
    return ng.aslinearoperator(scipy.sparse.linalg.aslinearoperator(A.numpy()))


def network():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


def hessian(n=30):
    return ng.Hessian(network(), (torch.randn(n, 6), torch.randint(4, (n,))), loss="categorical")


def chosen(values, k, which):
    """The wanted eigenvalues, by another road than the package's."""
    ordered = sorted(values.tolist())
    if which == "LA":
        return ordered[len(ordered) - k :]
    if which == "SA":
        return ordered[:k]
    if which == "LM":
        return sorted(sorted(ordered, key=abs)[len(ordered) - k :])
    return ordered[: k // 2] + ordered[len(ordered) - (k - k // 2) :]


def require_pairs(found, A, expected, tolerance):
    values, vectors = found
    size = float(torch.linalg.matrix_norm(A, 2))
    torch.testing.assert_close(
        values, torch.as_tensor(expected).to(values), rtol=0, atol=tolerance * size
    )
    eye = torch.eye(len(values), dtype=values.dtype)
    torch.testing.assert_close(vectors.mT @ vectors, eye, rtol=0, atol=100 * tolerance)
    residuals = torch.linalg.vector_norm(A @ vectors - vectors * values, dim=0)
    torch.testing.assert_close(found.residuals, residuals, rtol=0.1, atol=tolerance * size)
    assert found.converged


# --- eigenpairs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["LA", "SA", "LM", "BE"])
@pytest.mark.parametrize("block_size", [1, 3])
def test_both_ends_of_an_indefinite_hessian(which, block_size):
    H = hessian()
    dense = H.to_dense()
    values = torch.linalg.eigvalsh(dense)
    assert values[0] < -1e-3 < 1e-3 < values[-1]
    found = ng.eigsh(H, 5, which, block_size=block_size, seed=0)
    require_pairs(found, dense, chosen(values, 5, which), 1e-8)
    assert 0 < found.matvecs < 10 * len(dense)


@pytest.mark.parametrize("which", ["LA", "SA", "LM", "BE"])
def test_equals_scipy(which):
    H = hessian()
    values = scipy.sparse.linalg.eigsh(H.to_scipy(), 6, which=which)[0]
    found = ng.eigsh(H, 6, which, seed=0)
    torch.testing.assert_close(found.eigenvalues, torch.from_numpy(np.sort(values)))


@pytest.mark.parametrize("which", ["LA", "SA", "LM", "BE"])
@pytest.mark.parametrize("k", [1, 2, 11])
def test_restarts(which, k):
    values = torch.cat([torch.linspace(-5, -4, 20), torch.linspace(-1, 1, 260), 3 + torch.rand(20)])
    A = symmetric(values)
    found = ng.eigsh(products_only(A), k, which, subspace=k + 12, seed=1)
    assert found.matvecs > k + 12
    require_pairs(found, A, chosen(values, k, which), 1e-9)


@pytest.mark.parametrize("multiplicity", [2, 4])
def test_blocks_find_repeated_eigenvalues(multiplicity):
    values = torch.cat([torch.linspace(0, 1, 100), torch.full((multiplicity,), 3.0)])
    A = symmetric(values)
    k = multiplicity + 1
    found = ng.eigsh(products_only(A), k, block_size=multiplicity, seed=0)
    require_pairs(found, A, [1.0] + [3.0] * multiplicity, 1e-9)


def test_clustered_eigenvalues():
    values = torch.cat([torch.linspace(0, 1, 100), 3 + 1e-7 * torch.arange(4.0)])
    A = symmetric(values)
    found = ng.eigsh(products_only(A), 4, block_size=4, tol=1e-11, seed=0)
    require_pairs(found, A, values[-4:], 1e-9)


@pytest.mark.parametrize("block_size", [1, 3])
@pytest.mark.parametrize("k", [2, 4, 9])
def test_low_rank_is_an_invariant_subspace(block_size, k):
    root = torch.linalg.qr(torch.randn(50, 4)).Q
    A = (root * torch.tensor([1.0, 2.0, 3.0, 4.0])) @ root.mT
    found = ng.eigsh(products_only(A), k, block_size=block_size, seed=0)
    require_pairs(found, A, chosen(torch.linalg.eigvalsh(A), k, "LA"), 1e-9)


@pytest.mark.parametrize("A", [torch.zeros(7, 7), torch.eye(7) * 3, torch.eye(1) * -2])
@pytest.mark.parametrize("which", ["LA", "BE"])
def test_trivial_matrices_have_all_pairs(A, which):
    found = ng.eigsh(products_only(A.double()), len(A), which, seed=0)
    require_pairs(found, A.double(), A.diagonal().double(), 1e-12)


def test_a_subspace_as_large_as_the_matrix():
    A = symmetric(torch.linspace(-1, 2, 12))
    found = ng.eigsh(products_only(A), 12, seed=0)
    require_pairs(found, A, torch.linalg.eigvalsh(A), 1e-12)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_any_scale(scale, dtype):
    A = (symmetric(torch.linspace(-1, 3, 120)) * scale).to(dtype)
    found = ng.eigsh(products_only(A), 3, "BE", seed=0)
    assert found.eigenvectors.dtype == dtype
    require_pairs(found, A, chosen(torch.linalg.eigvalsh(A), 3, "BE"), 3e-6)


def test_warm_start_takes_fewer_products():
    A = symmetric(torch.cat([torch.linspace(0, 1, 200), torch.tensor([1.5, 1.7, 2.0])]))
    change = symmetric(1e-4 * torch.randn(203))
    first = ng.eigsh(products_only(A), 3, tol=1e-6, seed=0)
    moved = products_only(A + change)
    cold = ng.eigsh(moved, 3, tol=1e-6, seed=1)
    warm = ng.eigsh(moved, 3, tol=1e-6, start=first.eigenvectors, seed=1)
    assert warm.matvecs < cold.matvecs
    torch.testing.assert_close(warm.eigenvalues, cold.eigenvalues, rtol=1e-8, atol=0)


def test_warm_start_from_names():
    H = hessian()
    first = ng.eigsh(H, 2, seed=0)
    again = ng.eigsh(H, 2, start=first.by_name(), seed=0)
    close(again.eigenvalues, first.eigenvalues)
    assert again.matvecs < first.matvecs


def test_no_more_products_than_scipy():
    values = torch.cat([torch.randn(400), 4 + torch.rand(8)])
    A = symmetric(values)
    count = 0

    def counted(v):
        nonlocal count
        count += 1
        return A.numpy() @ v

    ours = 0
    for seed in range(5):
        v0 = np.random.default_rng(seed).standard_normal(len(A))
        theirs = scipy.sparse.linalg.LinearOperator(A.shape, counted, dtype=np.float64)
        scipy.sparse.linalg.eigsh(theirs, 10, which="LA", tol=1e-3, v0=v0)
        ours += ng.eigsh(products_only(A), 10, tol=1e-3, seed=seed).matvecs
    assert ours <= count


def test_eigenvectors_by_name():
    H = hessian()
    found = ng.eigsh(H, 2, seed=0)
    by_name = found.by_name()
    assert {name: tuple(v.shape) for name, v in by_name.items()} == {
        "0.weight": (2, 8, 6),
        "0.bias": (2, 8),
        "2.weight": (2, 4, 8),
        "2.bias": (2, 4),
    }
    torch.testing.assert_close(H.space.ravel(by_name).mT, found.eigenvectors)


def test_no_names_without_a_space():
    with pytest.raises(SpaceMismatchError, match="this one has none"):
        ng.eigsh(torch.eye(3), 1).by_name()


def test_seeded():
    A = products_only(symmetric(torch.randn(60)))
    a, b = ng.eigsh(A, 2, seed=5), ng.eigsh(A, 2, seed=5)
    assert torch.equal(a.eigenvectors, b.eigenvectors)
    before = torch.get_rng_state()
    ng.eigsh(A, 2, seed=5)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("make", [*examples.CLOSED.values(), *examples.LAZY.values()])
@pytest.mark.parametrize("which", ["LA", "SA", "LM", "BE"])
def test_every_operator(make, which):
    op = make()
    dense = op.to_dense()
    if not (op.is_square and torch.allclose(dense, dense.mT)):
        pytest.skip("not symmetric")
    found = ng.eigsh(op, 3, which, block_size=2, seed=0)
    require_pairs(found, dense, chosen(torch.linalg.eigvalsh(dense), 3, which), 1e-9)


REPRESENTATIONS = [
    "dense",
    "block_diagonal",
    "diagonal",
    "quasi_diagonal",
    "kfac",
    "ekfac",
    "low_rank",
    "implicit",
    "factored",
]


@pytest.mark.parametrize("representation", REPRESENTATIONS)
def test_the_same_call_on_every_representation(representation):
    model, x = network(), torch.randn(30, 6)
    F = ng.FIM(model, x, representation, likelihood="categorical")
    dense = F.to_dense()
    found = ng.eigsh(F, 4, seed=0)
    require_pairs(found, dense, torch.linalg.eigvalsh(dense)[-4:], 1e-9)
    by_scipy = scipy.sparse.linalg.eigsh(F.to_scipy(), 4, which="LA")[0]
    torch.testing.assert_close(found.eigenvalues, torch.from_numpy(by_scipy))
    structured = {"dense", "block_diagonal", "diagonal", "kfac", "ekfac", "low_rank"}
    if representation in structured:
        assert found.matvecs == 0


def test_operators_of_linear_operator():
    A = symmetric(torch.linspace(1, 4, 40))
    op = linear_operator.to_linear_operator(A) + linear_operator.operators.DiagLinearOperator(
        torch.linspace(0, 1, 40)
    )
    dense = op.to_dense()
    found = ng.eigsh(op, 3, seed=0)
    require_pairs(found, dense, torch.linalg.eigvalsh(dense)[-3:], 1e-9)


def test_nothing_is_formed():
    model = nn.Sequential(nn.Linear(30, 60), nn.Tanh(), nn.Linear(60, 4))
    H = ng.Hessian(model, (torch.randn(20, 30), torch.randint(4, (20,))), loss="categorical")
    P = H.shape[0]
    with LargestTensor() as largest:
        ng.eigsh(H, 2, tol=1e-3, seed=0)
        ng.spectral_density(H, probes=3, steps=10, seed=0)
    assert largest.numel < 50 * P


def test_yardstick_12_lanczos_on_a_wishart_matrix():
    d, n = 2000, 4000
    g = d / n
    X = torch.randn(d, n)

    def matvec(v):
        return X @ (X.mT @ v) / n

    run = linalg.Lanczos(matvec, torch.randn(d, 1), 8, reorthogonalize=True, method="lanczos")
    for _ in range(8):
        run.step()
    T = run.tridiagonal()[0]
    alpha, beta = T.diagonal(), T.diagonal(1)
    assert abs(float(alpha[0]) - 1) < 0.06
    torch.testing.assert_close(alpha[1:], torch.full((7,), 1 + g), atol=0.1, rtol=0)
    torch.testing.assert_close(beta, torch.full((7,), g**0.5), atol=0.1, rtol=0)


# --- singular values ------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(70, 40), (40, 70), (5, 60), (60, 1)])
@pytest.mark.parametrize("scale", SCALES)
def test_singular_triplets(shape, scale):
    A = torch.randn(shape) * scale
    k = min(4, *shape)
    U, S, Vh = found = ng.svds(products_only(A), k, seed=0)
    expected = torch.linalg.svdvals(A)[:k].flip(0)
    torch.testing.assert_close(S, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(A @ Vh.mT, U * S, rtol=0, atol=1e-8 * float(S[-1]))
    torch.testing.assert_close(A.mT @ U, Vh.mT * S, rtol=0, atol=1e-8 * float(S[-1]))
    torch.testing.assert_close(U.mT @ U, torch.eye(k))
    assert found.converged
    assert found.matvecs > 0


def test_singular_values_restart():
    A = torch.randn(300, 200)
    found = ng.svds(products_only(A), 3, subspace=15, seed=0)
    assert found.converged
    torch.testing.assert_close(found.S, torch.linalg.svdvals(A)[:3].flip(0))


def test_singular_values_of_low_rank():
    A = torch.randn(50, 3) @ torch.randn(3, 30)
    found = ng.svds(products_only(A), 5, seed=0)
    expected = torch.linalg.svdvals(A)[:5].flip(0)
    torch.testing.assert_close(found.S, expected, rtol=1e-9, atol=1e-9 * float(expected[-1]))


def test_singular_values_of_a_jacobian_by_name():
    model, x = network(), torch.randn(20, 6)
    J = ng.Jacobian(model, x)
    found = ng.svds(J, 3, seed=0)
    torch.testing.assert_close(found.S, torch.linalg.svdvals(J.to_dense())[:3].flip(0))
    torch.testing.assert_close(J.space.ravel(found.by_name()), found.Vh)
    by_scipy = scipy.sparse.linalg.svds(J.to_scipy(), 3)[1]
    torch.testing.assert_close(found.S, torch.from_numpy(np.sort(by_scipy)))


def test_an_adjoint_that_is_not_one():
    A, B = torch.randn(2, 9, 9)
    with pytest.raises(ValueError, match="svds needs products with A and with its transpose: here"):
        linalg.svds(lambda v: A @ v, lambda u: B @ u, (9, 9), 2, A[:0, 0], linalg.Search())


def test_spectral_norm_has_a_gradient():
    model = network().requires_grad_()
    w = torch.rand(10, requires_grad=True)
    x = torch.randn(10, 6)
    J = ng.Jacobian(model, x)
    dense = J.to_dense()
    root = w.repeat_interleave(4)
    lazy = J.mT @ (ng.operators.DiagonalLinearOperator(root) @ J)
    torch.manual_seed(0)
    (found,) = torch.autograd.grad(lazy.norm(2), w)
    (expected,) = torch.autograd.grad(
        torch.linalg.matrix_norm(dense.mT @ (root[:, None] * dense), 2), w
    )
    close(found, expected, 1e-6)


# --- densities ------------------------------------------------------------------------------------


def test_moments_are_exact_where_probes_are():
    A = symmetric(torch.linspace(-2, 3, 30))
    found = ng.spectral_density(products_only(A), probes=400, steps=20, seed=0)
    for power in (1, 2, 3):
        exact = float(torch.linalg.matrix_power(A, power).trace()) / 30
        error = float(found.expectation(lambda t, p=power: t**p)) - exact
        assert abs(error) < 4 * (2 / 400 / 30) ** 0.5 * 3**power
    assert float(found.weights.sum()) == pytest.approx(1)
    assert found.matvecs == 400 * 20


def test_quadrature_is_exact_to_degree_2m_minus_1():
    A = symmetric(torch.linspace(-1, 1, 60))
    found = ng.spectral_density(products_only(A), probes=1, steps=6, seed=3)
    more = ng.spectral_density(products_only(A), probes=1, steps=40, seed=3)
    for power in range(12):
        torch.testing.assert_close(
            found.expectation(lambda t, p=power: t**p), more.expectation(lambda t, p=power: t**p)
        )
    at_12 = [float(d.expectation(lambda t: t**12)) for d in (found, more)]
    assert abs(at_12[0] - at_12[1]) > 1e-9


@pytest.mark.parametrize("reorthogonalize", [True, False])
def test_density_is_that_of_the_eigenvalues(reorthogonalize):
    values = torch.cat([torch.randn(990), torch.full((10,), 8.0)])
    A = products_only(symmetric(values))
    found = ng.spectral_density(A, probes=10, steps=60, reorthogonalize=reorthogonalize, seed=0)
    grid = found.grid(400)
    exact = torch.exp(-0.5 * ((grid - values[:, None]) / 0.3).square()) / (
        0.3 * (2 * math.pi) ** 0.5
    )
    shown = found.density(grid, 0.3)
    assert float(torch.trapezoid(shown, grid)) == pytest.approx(1, abs=1e-3)
    within = (shown - exact.mean(0)).abs() < 5 * found.standard_error(grid, 0.3) + 1e-3
    assert within.double().mean() > 0.97


def test_log_density_integrates_to_the_share_of_its_sign():
    values = torch.cat([torch.logspace(-4, 2, 150), -torch.logspace(-2, 0, 50)])
    found = ng.spectral_density(products_only(symmetric(values)), probes=40, steps=150, seed=0)
    grid = torch.logspace(-6, 4, 2000)
    share = torch.trapezoid(found.density(grid, 0.2, log=True), grid.log10())
    assert float(share) == pytest.approx(0.75, abs=0.03)
    share = torch.trapezoid(found.density(-grid, 0.2, log=True), grid.log10())
    assert float(share) == pytest.approx(0.25, abs=0.03)


def test_deflation_counts_outliers_exactly():
    values = torch.cat([torch.linspace(0, 1, 197), torch.tensor([50.0, -60.0, 70.0])])
    A = products_only(symmetric(values))
    plain = ng.spectral_density(A, probes=3, steps=30, seed=0)
    found = ng.spectral_density(A, probes=3, steps=30, deflate=3, seed=0)
    torch.testing.assert_close(found.outliers, torch.tensor([-60.0, 50.0, 70.0]))
    exact = values.mean()
    assert abs(found.expectation(lambda t: t) - exact) < 0.1 * abs(
        plain.expectation(lambda t: t) - exact
    )
    assert float(found.weights.sum()) == pytest.approx(1)
    assert float(found.weights[found.probe < 0].sum()) == pytest.approx(3 / 200)
    known = ng.spectral_density(A, probes=3, steps=30, deflate=ng.eigsh(A, 3, "LM"), seed=0)
    torch.testing.assert_close(known.outliers, found.outliers)


def test_everything_deflated():
    A = symmetric(torch.tensor([1.0, 2.0, 3.0]))
    found = ng.spectral_density(A, deflate=3, seed=0)
    torch.testing.assert_close(found.nodes, torch.tensor([1.0, 2.0, 3.0]))
    assert float(found.weights.sum()) == pytest.approx(1)


def test_probes_in_parts_are_the_same_probes():
    A = products_only(symmetric(torch.linspace(-1, 1, 40)))
    found = ng.spectral_density(A, probes=5, steps=10, probes_at_once=2, seed=0)
    assert found.probes == 5
    assert len(found.nodes) == 50
    assert float(found.weights.sum()) == pytest.approx(1)
    assert found.samples(found.grid()).shape == (5, 500)


@pytest.mark.parametrize("scale", SCALES)
def test_density_at_any_scale(scale):
    A = symmetric(torch.linspace(-1, 3, 50))
    base = ng.spectral_density(products_only(A), probes=2, steps=20, seed=0)
    found = ng.spectral_density(products_only(scale * A), probes=2, steps=20, seed=0)
    torch.testing.assert_close(found.nodes / scale, base.nodes)
    torch.testing.assert_close(found.weights, base.weights, atol=1e-8, rtol=1e-6)


def test_density_of_a_multiple_of_the_identity():
    found = ng.spectral_density(products_only(3 * torch.eye(20)), probes=2, seed=0)
    torch.testing.assert_close(found.nodes, torch.full((2,), 3.0))
    grid = found.grid()
    assert float(torch.trapezoid(found.density(grid), grid)) == pytest.approx(1, abs=1e-6)


# --- long work ------------------------------------------------------------------------------------


class Interrupting:
    """Products that the user interrupts after so many."""

    def __init__(self, A, after):
        self.A, self.left = A, after

    def __call__(self, v):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        return torch.from_numpy(self.A.numpy() @ v.numpy())

    def operator(self):
        n = len(self.A)

        def product(v):
            return self(torch.from_numpy(np.ascontiguousarray(v))).numpy()

        return ng.aslinearoperator(
            scipy.sparse.linalg.LinearOperator(
                (n, n), matvec=product, matmat=product, rmatvec=product, dtype=np.float64
            )
        )


def test_interrupted_eigsh_returns_what_it_has():
    A = symmetric(torch.cat([torch.linspace(0, 1, 300), torch.tensor([1.2, 2.0])]))
    with pytest.warns(ConvergenceWarning, match="interrupted after 15 products"):
        found = ng.eigsh(Interrupting(A, 15).operator(), 2, seed=0)
    assert not found.converged
    assert abs(float(found.eigenvalues[-1]) - 2.0) < 1e-3
    true = torch.linalg.vector_norm(A @ found.eigenvectors - found.eigenvectors * found.eigenvalues)
    assert float(found.residuals.norm()) == pytest.approx(float(true), rel=1e-3)


def test_interrupted_svds_returns_what_it_has():
    A = symmetric(torch.cat([torch.linspace(0, 1, 300), torch.tensor([1.2, 2.0])]))
    with pytest.warns(ConvergenceWarning, match=r"interrupted after \d+ products"):
        found = ng.svds(Interrupting(A, 20).operator(), 1, seed=0)
    assert abs(float(found.S[-1]) - 2.0) < 1e-2


def test_interrupted_density_is_that_of_what_there_was():
    A = symmetric(torch.linspace(0, 1, 100))
    with pytest.warns(ConvergenceWarning, match="interrupted after 60 products"):
        found = ng.spectral_density(
            Interrupting(A, 60).operator(), probes=4, steps=25, probes_at_once=1, seed=0
        )
    assert found.interrupted
    assert found.probes == 3
    assert float(found.weights.sum()) == pytest.approx(1)


def test_interrupted_before_the_first_product():
    A = symmetric(torch.linspace(0, 1, 100))
    for call in (lambda F: ng.eigsh(F, 1), lambda F: ng.svds(F, 1), ng.spectral_density):
        with pytest.raises(KeyboardInterrupt):
            call(Interrupting(A, 0).operator())


def test_progress_bar(capsys):
    A = products_only(symmetric(torch.linspace(0, 1, 60)))
    ng.eigsh(A, 2, seed=0)
    assert capsys.readouterr().err == ""
    ng.eigsh(A, 2, seed=0, progress=True)
    assert "eigsh" in capsys.readouterr().err
    ng.svds(A, 2, seed=0, progress=True)
    assert "svds" in capsys.readouterr().err
    ng.spectral_density(A, seed=0, progress=True)
    assert "spectral density" in capsys.readouterr().err


def test_products_that_are_not_linear_have_true_residuals():
    A = symmetric(torch.cat([torch.linspace(0, 1, 60), torch.tensor([2.0])]))
    noise = torch.Generator().manual_seed(0)

    def noisy(v):
        return A @ v + 1e-7 * torch.randn(v.shape, generator=noise)

    options = linalg.Search(tol=1e-10, max_matvecs=60)
    found = linalg.eigsh(noisy, 61, 1, "LA", A[:0, 0], options)
    true = torch.linalg.vector_norm(A @ found.vectors - found.vectors * found.values, dim=0)
    assert not found.converged
    torch.testing.assert_close(found.residuals, true, rtol=0, atol=3e-6)
    assert float(found.residuals) > 1e-8


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [0, -1, 4])
def test_k_out_of_range(k):
    with pytest.raises(ValueError, match=rf"expected k from 1 to 3, the size .*, got {k}"):
        ng.eigsh(torch.eye(3), k)
    with pytest.raises(ValueError, match=rf"expected k from 1 to 3, the size .*, got {k}"):
        ng.eigsh(products_only(torch.eye(3).double()), k)
    with pytest.raises(ValueError, match=rf"expected k from 1 to 3, the smaller side.*, got {k}"):
        ng.svds(torch.randn(3, 5), k)
    with pytest.raises(ValueError, match=rf"expected k from 1 to 3, the smaller side.*, got {k}"):
        ng.svds(products_only(torch.randn(3, 5)), k)


def test_unknown_end():
    with pytest.raises(ValueError, match=r"expected which to be one of \['LA', .* got 'SM'"):
        ng.eigsh(torch.eye(3), 1, "SM")


def test_subspace_and_block_out_of_range():
    A = products_only(torch.eye(30).double())
    with pytest.raises(
        ValueError, match=r"subspace of at least k \+ 2 block_size = 7 vectors, got 6"
    ):
        ng.eigsh(A, 5, subspace=6)
    with pytest.raises(ValueError, match="block_size from 1 to 30, got 31"):
        ng.eigsh(A, 5, block_size=31)
    with pytest.raises(ValueError, match="subspace"):
        ng.svds(A, 5, subspace=5)


def test_not_symmetric():
    A = torch.randn(30, 30)
    for call in (lambda F: ng.eigsh(F, 2, seed=0), lambda F: ng.spectral_density(F, seed=0)):
        with pytest.raises(ValueError, match=r"needs a symmetric matrix: here .* differ by"):
            call(products_only(A))  # found out by its products
        with pytest.raises(ValueError, match="got one that is not symmetric"):
            call(A)
        with pytest.raises(ValueError, match="got 30 x 20: take svds"):
            call(A[:, :20])
        with pytest.raises(ValueError, match="got a batch of shape"):
            call(torch.stack([torch.eye(3)] * 2))


def test_nan_says_in_which_product():
    A = torch.eye(20)
    count = 0

    def failing(v):
        nonlocal count
        count += 1
        return v * (torch.nan if count == 3 else torch.arange(20.0)[:, None])

    with pytest.raises(NonFiniteError, match="eigsh: NaN or infinity in product 3"):
        linalg.eigsh(failing, 20, 2, "LA", A[:0, 0], linalg.Search())
    count = 0
    with pytest.raises(NonFiniteError, match="svds: NaN or infinity in product 3"):
        linalg.svds(failing, failing, (20, 20), 2, A[:0, 0], linalg.Search())
    count = 0
    with pytest.raises(NonFiniteError, match="spectral density: NaN or infinity in product 3"):
        linalg.spectral_density(failing, 20, A[:0, 0], linalg.Probes(1, steps=10))


def test_start_that_is_zero_or_not_finite():
    A = products_only(torch.diag(torch.arange(30.0)))
    for start in (torch.zeros(30), torch.full((30,), torch.inf)):
        with pytest.raises(ValueError, match="start to have finite columns"):
            ng.eigsh(A, 1, start=start)


def test_too_few_products_warn():
    A = products_only(symmetric(torch.linspace(0, 1, 500)))
    with pytest.warns(ConvergenceWarning, match="stopped after 2. products.*raise max_matvecs="):
        found = ng.eigsh(A, 1, max_matvecs=20, seed=0)
    assert not found.converged
    with pytest.warns(ConvergenceWarning, match="svds stopped after"):
        ng.svds(A, 1, max_matvecs=20, seed=0)


def test_density_options_out_of_range():
    A = products_only(torch.eye(5).double())
    with pytest.raises(DataError, match="expected probes= to be a whole number from 1 on, got 0"):
        ng.spectral_density(A, probes=0)
    with pytest.raises(DataError, match="expected steps= to be a whole number from 1 on, got 0"):
        ng.spectral_density(A, steps=0)
    with pytest.raises(ValueError, match=r"expected k from 1 to 5, .* got -1"):
        ng.spectral_density(A, deflate=-1)
    found = ng.spectral_density(A, probes=1, seed=0)
    with pytest.raises(ValueError, match="needs at least 2 probes=, got 1"):
        found.standard_error(found.grid())
    with pytest.raises(ValueError, match="expected a positive width, got 0"):
        found.density(found.grid(), 0)
    negative = ng.spectral_density(products_only(-torch.eye(5).double()), seed=0)
    with pytest.raises(
        ValueError, match="a log grid needs positive eigenvalues, the largest is -1"
    ):
        negative.grid(log=True)


def test_closed_forms_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for make in (zoo.mlp,):
            net = make()
            F = ng.FIM(net.model, net.batch, "kfac", likelihood="categorical")
            assert ng.eigsh(F, 2).matvecs == 0


# --- large and float32 ----------------------------------------------------------------------------


LARGE = 300_000


def outliers_and_bulk():
    """Four outliers of very different size above a bulk: products with a diagonal in float32."""
    bulk = 1e-3 * torch.linspace(0, 1, LARGE - 4, dtype=torch.float32)
    d = torch.cat([bulk, torch.tensor([1.5e-3, 2e-3, 2.5e-3, 1.0])]).float()
    return d, lambda v: d[:, None] * v


def test_a_small_remainder_is_no_breakdown_in_float32():
    d, product = outliers_and_bulk()
    options = linalg.Search(tol=1e-4, max_matvecs=400, seed=0)
    found = linalg.eigsh(product, LARGE, 4, "LA", d[:0], options)
    assert found.converged
    torch.testing.assert_close(found.values, d[-4:], rtol=1e-4, atol=0)
    options = linalg.Search(max_matvecs=400, seed=0)
    singular = linalg.svds(product, product, (LARGE, LARGE), 4, d[:0], options)
    assert singular.converged
    torch.testing.assert_close(singular.values, d[-4:], rtol=1e-4, atol=0)
    for vectors in (found.vectors, singular.left, singular.right):
        vectors = vectors.double()
        torch.testing.assert_close(vectors.mT @ vectors, torch.eye(4), rtol=0, atol=1e-5)


def test_a_density_below_an_outlier_takes_all_its_steps_in_float32():
    d, product = outliers_and_bulk()
    found = linalg.spectral_density(product, LARGE, d[:0], linalg.Probes(2, steps=15, seed=0))
    assert found.matvecs == 30
    assert float(found.nodes.max()) == pytest.approx(1, abs=1e-5)
    moment = found.expectation(lambda t: torch.where(t < 0.5, t, 0.0) * 1e3)
    assert float(moment) == pytest.approx(0.5, rel=0.01)


def test_norms_of_a_million_float32_numbers():
    v = torch.randn(1_000_000, 2, dtype=torch.float32)
    exact = v.double().square().sum(0, keepdim=True).sqrt()
    torch.testing.assert_close(norms(v).double(), exact, rtol=1e-6, atol=0)


# --- matrices that are zero up to rounding --------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_differences_of_equal_matrices(dtype):
    """Relative to its own size, all of such a matrix is wrong: neither linear nor symmetric."""
    model = torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3))
    model, x, y = model.to(dtype), torch.randn(20, 5, dtype=dtype), torch.randint(3, (20,))
    whole, parts = [(x, y)], [(x[:7], y[:7]), (x[7:], y[7:])]
    F, G = (
        ng.FIM(model, data, "implicit", likelihood="categorical", max_directions=2)
        for data in (whole, parts)
    )
    K = ng.FIM(model, (x, y), "factored", likelihood="categorical")
    rounding = 100 * torch.finfo(dtype).eps * float(F.norm(2))
    for zero in (F - G, F - K, (F - G).mT, F @ F - K @ K):
        assert float(zero.norm(2)) < rounding
        assert ng.svds(zero, 2, seed=0).converged
        found = ng.eigsh(zero, 2, "LM", seed=0)
        assert found.converged
        assert float(found.eigenvalues.abs().max()) < rounding
        assert float(ng.spectral_density(zero, seed=0).nodes.abs().max()) < rounding
        v = torch.ones(F.shape[-1], dtype=dtype)
        close(ng.matrix_function(zero, torch.exp, v), v, 1e-4 if dtype == torch.float32 else 1e-10)


def test_a_small_matrix_that_is_not_symmetric():
    """What is small is not rounding: its products are linear."""
    operator = products_only(1e-20 * torch.randn(30, 30))
    with pytest.raises(ValueError, match="needs a symmetric matrix"):
        ng.eigsh(operator, 2, seed=0)
