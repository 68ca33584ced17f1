"""Iterative methods: relative at every scale, and honest about what they reached."""

import math

import pytest
import scipy.sparse.linalg
import torch

from nngeo_lazy.errors import NonFiniteError, NotPositiveDefiniteError
from nngeo_lazy.linalg import cg, lsmr, minres, nystrom

SCALES = [1e-12, 1.0, 1e12]


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


# --- minimal residuals ----------------------------------------------------------------------------


def spectral(values):
    q, _ = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64))
    return (q * values) @ q.mT


def indefinite(n=40, cond=100.0):
    half = torch.logspace(0, math.log10(cond), n // 2, dtype=torch.float64)
    return spectral(torch.cat([half, -half]))


def uneven_columns(A):
    """Columns that take 0, 1, few and many iterations, of very different size."""
    vectors = torch.linalg.eigh(A).eigenvectors
    b = torch.randn(len(A), 4, dtype=A.dtype)
    b[:, 0] = 0
    b[:, 1] = vectors[:, 3]
    b[:, 2] = vectors[:, :4].sum(1)
    return b * torch.tensor([1.0, 1e-12, 1e12, 1.0], dtype=A.dtype)


def assert_columns_close(found, expected, rtol=1e-8):
    sizes = expected.norm(dim=0)
    assert ((found - expected).norm(dim=0) <= rtol * sizes).all()


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("method", [cg, minres])
def test_square_methods_agree_with_dense(method, scale):
    A = (matrix(cond=100.0) if method is cg else indefinite()) * scale
    b = uneven_columns(A)
    found = method(lambda v: A @ v, b)
    assert found.converged
    assert not found.stalled
    assert_columns_close(found.x, torch.linalg.solve(A, b))
    assert (found.x[:, 0] == 0).all()
    torch.testing.assert_close(found.residual, residuals(A, found.x, b), rtol=0.0, atol=1e-13)


def test_finished_columns_stay_finite_while_others_go_on():
    # they would grow by the factor |A| a step, and 0 times infinity is NaN
    A = indefinite(cond=1e3) * 1e12
    b = uneven_columns(A)
    alone = minres(lambda v: A @ v, b[:, 1:2])
    found = minres(lambda v: A @ v, b)
    assert alone.iterations < 5 < 40 < found.iterations
    torch.testing.assert_close(found.x[:, 1:2], alone.x, rtol=1e-8, atol=0.0)
    J = torch.randn(60, 40, dtype=torch.float64) * 1e12
    b = torch.randn(60, 2, dtype=torch.float64)
    b[:, 0] = torch.linalg.svd(J).U[:, 0]
    assert lsmr(lambda v: J @ v, lambda u: J.mT @ u, b).x.isfinite().all()


@pytest.mark.parametrize("scale", SCALES)
def test_minres_in_float32(scale):
    A = indefinite(cond=5.0).float() * scale
    b = torch.randn(40, 3) * torch.tensor([1e-12, 1.0, 1e12])
    found = minres(lambda v: A @ v, b)
    assert found.converged
    assert found.x.dtype == torch.float32
    assert (residuals(A.double(), found.x.double(), b.double()) < 3e-6).all()


@pytest.mark.parametrize("scale", SCALES)
def test_minres_of_a_singular_matrix(scale):
    values = torch.cat([torch.linspace(1, 9, 20), -torch.linspace(1, 4, 10), torch.zeros(10)])
    A = spectral(values.double()) * scale
    b = A @ torch.randn(40, 3, dtype=torch.float64)
    found = minres(lambda v: A @ v, b)
    assert found.converged
    assert_columns_close(found.x, torch.linalg.pinv(A, hermitian=True, rtol=1e-10) @ b)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_minres_of_an_inconsistent_system_stays_at_least_squares(dtype):
    values = torch.cat([torch.linspace(1, 9, 20), -torch.linspace(1, 4, 10), torch.zeros(10)])
    A = spectral(values.double())
    vectors = torch.linalg.eigh(A).eigenvectors
    b = torch.randn(40, 3, dtype=torch.float64)
    b[:, 2] = vectors[:, 15]  # one of the null space
    best = b - A @ (torch.linalg.pinv(A, hermitian=True, rtol=1e-10) @ b)
    work = A.to(dtype)
    found = minres(lambda v: work @ v, b.to(dtype))
    assert not found.converged
    assert found.stalled
    torch.testing.assert_close(
        found.residual.double(), best.norm(dim=0) / b.norm(dim=0), rtol=1e-3, atol=0.0
    )
    assert (found.x.norm(dim=0) < 100).all()  # no multiple of a null vector that grows


def test_minres_of_zero():
    found = minres(lambda v: 0 * v, torch.ones(40, 2, dtype=torch.float64))
    assert (found.x == 0).all()
    assert (found.residual == 1).all()
    assert not found.converged


@pytest.mark.parametrize("size", SCALES)
def test_preconditioned_minres(size):
    d = torch.logspace(-1, 1, 40, dtype=torch.float64)
    A = d[:, None] * indefinite(cond=10.0) * d
    b = uneven_columns(A)
    values, vectors = torch.linalg.eigh(A)
    inverse = size * (vectors / (values.abs() * torch.linspace(1, 1.5, 40))) @ vectors.mT
    plain = minres(lambda v: A @ v, b)
    helped = minres(lambda v: A @ v, b, preconditioner=lambda r: inverse @ r)
    assert plain.converged
    assert helped.converged
    assert helped.iterations < plain.iterations / 2
    assert_columns_close(helped.x, torch.linalg.solve(A, b), rtol=1e-6)
    torch.testing.assert_close(helped.residual, residuals(A, helped.x, b), rtol=0.0, atol=1e-13)


@pytest.mark.parametrize("wrong", [-1.0, 0.0])
def test_minres_needs_a_positive_definite_preconditioner(wrong):
    A, b = indefinite(), torch.ones(40, 1, dtype=torch.float64)
    with pytest.raises(NotPositiveDefiniteError, match="the preconditioner is not"):
        minres(lambda v: A @ v, b, preconditioner=lambda r: wrong * r)
    signs = torch.ones(40, 1, dtype=torch.float64)
    signs[5] = -1
    with pytest.raises(NotPositiveDefiniteError, match="the preconditioner is not"):
        minres(lambda v: A @ v, b, preconditioner=lambda r: signs * r)


def test_minres_agrees_with_scipy():
    A, b = indefinite(), torch.randn(40, dtype=torch.float64)
    theirs, _ = scipy.sparse.linalg.minres(A.numpy(), b.numpy(), rtol=1e-12)
    found = minres(lambda v: A @ v, b[:, None], tol=1e-12)
    torch.testing.assert_close(found.x[:, 0], torch.from_numpy(theirs), rtol=1e-8, atol=1e-10)


# --- least squares --------------------------------------------------------------------------------


def rectangular(m, n, cond=30.0, scale=1.0):
    r = min(m, n)
    left = torch.linalg.qr(torch.randn(m, r, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(n, r, dtype=torch.float64)).Q
    values = torch.logspace(0, math.log10(cond), r, dtype=torch.float64)
    return scale * (left * values) @ right.mT


def least_squares(J, b, **options):
    return lsmr(lambda v: J @ v, lambda u: J.mT @ u, b, **options)


def normal_residuals(J, x, b, damping=0.0):
    first = (J.mT @ b).norm(dim=0)
    left = J.mT @ (b - J @ x) - damping * x
    return left.norm(dim=0) / torch.where(first > 0, first, 1.0)


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (40, 40)])
@pytest.mark.parametrize("damped", [0.0, 3.0])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("start", [False, True])
def test_lsmr_agrees_with_dense(shape, damped, scale, start):
    J, damping = rectangular(*shape, scale=scale), damped * scale**2
    b = torch.randn(shape[0], 4, dtype=torch.float64)
    b[:, 0] = 0
    b[:, 1] = torch.linalg.svd(J).U[:, 2]
    b = b * torch.tensor([1.0, 1e-12, 1e12, 1.0], dtype=torch.float64)
    u, s, vh = torch.linalg.svd(J, full_matrices=False)
    expected = vh.mT @ ((s / (s**2 + damping))[:, None] * (u.mT @ b))  # the one of least norm
    x0 = None
    if start:  # of the row space, so that the solution of least norm is still the one found
        x0 = vh.mT @ torch.randn(len(s), 4, dtype=torch.float64) * b.norm(dim=0) / scale
    found = least_squares(J, b, damping=damping, x0=x0, tol=1e-12)
    assert found.converged
    assert_columns_close(found.x, expected)
    assert (found.x[:, 0] == 0).all()
    truth = normal_residuals(J, found.x, b, damping)
    torch.testing.assert_close(found.residual, truth, rtol=0.0, atol=1e-12)
    again = least_squares(J, b, damping=damping, x0=expected)
    assert again.converged
    assert again.iterations == 0


def test_lsmr_of_a_singular_matrix_has_least_norm():
    J = rectangular(60, 10) @ rectangular(10, 40)
    b = torch.randn(60, 3, dtype=torch.float64)
    found = least_squares(J, b)
    assert found.converged
    assert_columns_close(found.x, torch.linalg.pinv(J, rtol=1e-10) @ b)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("damped", [0.0, 3.0])
def test_lsmr_in_float32(scale, damped):
    J, damping = rectangular(60, 40, cond=5.0).float() * scale, damped * scale**2
    b = torch.randn(60, 3) * torch.tensor([1e-12, 1.0, 1e12])
    found = least_squares(J, b, damping=damping)
    assert found.converged
    assert found.x.dtype == torch.float32
    truth = normal_residuals(J.double(), found.x.double(), b.double(), damping)
    assert (truth < 3e-6).all()


def test_lsmr_where_nothing_fits():
    # b is orthogonal to what J reaches, exactly or to rounding
    J = rectangular(60, 40)
    J[-1] = 0
    b = torch.zeros(60, 1, dtype=torch.float64)
    b[-1] = 7
    found = least_squares(J, b)
    assert (found.x == 0).all()
    assert found.residual == 0
    assert found.converged
    b = torch.linalg.svd(J).U[:, 50:51]
    found = least_squares(J, b)
    assert (found.x.abs() < 1e-12).all()
    assert found.iterations < 100


@pytest.mark.parametrize("damping", [0.0, 2.0])
@pytest.mark.parametrize("shape", [(60, 40), (40, 60)])
def test_lsmr_agrees_with_scipy(shape, damping):
    J, b = rectangular(*shape), torch.randn(shape[0], dtype=torch.float64)
    theirs = scipy.sparse.linalg.lsmr(
        J.numpy(), b.numpy(), damp=math.sqrt(damping), atol=1e-13, btol=1e-13, maxiter=1000
    )[0]
    found = least_squares(J, b[:, None], damping=damping, tol=1e-12)
    torch.testing.assert_close(found.x[:, 0], torch.from_numpy(theirs), rtol=1e-8, atol=1e-10)


def test_lsmr_takes_no_negative_damping():
    J = rectangular(6, 4)
    for wrong in (-1.0, float("nan")):
        with pytest.raises(NotPositiveDefiniteError, match="damping >= 0"):
            least_squares(J, torch.ones(6, 1, dtype=torch.float64), damping=wrong)


# --- minres and lsmr ------------------------------------------------------------------------------


def by_minres(A, b, **options):
    return minres(lambda v: A @ v, b, **options)


BOTH = pytest.mark.parametrize("method", [by_minres, least_squares])


def true_residual(method, A, x, b):
    return residuals(A, x, b) if method is by_minres else normal_residuals(A, x, b)


@BOTH
def test_zero_right_hand_side(method):
    found = method(indefinite(), torch.zeros(40, 2, dtype=torch.float64))
    assert (found.x == 0).all()
    assert (found.residual == 0).all()
    assert found.converged
    assert found.iterations == 0


@BOTH
def test_exact_start(method):
    A, x = indefinite(), torch.randn(40, 2, dtype=torch.float64)
    found = method(A, A @ x, x0=x)
    assert found.iterations == 0
    assert found.converged
    torch.testing.assert_close(found.x, x)


@BOTH
def test_any_start(method):
    A = indefinite()
    b = torch.randn(40, 2, dtype=torch.float64)
    found = method(A, b, x0=torch.randn(40, 2, dtype=torch.float64))
    assert found.converged
    assert_columns_close(found.x, torch.linalg.solve(A, b))


@BOTH
def test_early_stop_is_not_convergence(method):
    A, b = indefinite(), torch.randn(40, 2, dtype=torch.float64)
    found = method(A, b, max_iter=7)
    assert found.iterations == 7
    assert not found.converged
    assert not found.stalled
    torch.testing.assert_close(found.residual, true_residual(method, A, found.x, b))


@BOTH
def test_a_tolerance_below_rounding_stops(method):
    A, b = indefinite(cond=10.0).float(), torch.randn(40, 1)
    found = method(A, b, tol=1e-30, max_iter=4000)
    assert not found.converged
    assert found.stalled
    assert found.iterations < 1000
    assert float(found.residual) < 1e-5


@BOTH
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite(method, bad):
    A, b = indefinite(), torch.ones(40, 2, dtype=torch.float64)
    x0 = torch.zeros_like(b)
    x0[2, 0] = bad
    with pytest.raises(NonFiniteError, match="a product with the matrix"):
        method(A, b, x0=x0)
    b[3, 1] = bad
    with pytest.raises(NonFiniteError, match="the right-hand side"):
        method(A, b)
    A[1, 2] = bad
    with pytest.raises(NonFiniteError, match="a product with the matrix"):
        method(A, torch.ones(40, 2, dtype=torch.float64))


@pytest.mark.parametrize("seed", range(10))
def test_a_residual_just_above_the_tolerance_is_no_stall(seed):
    # the recurrence says 1e-6 where the truth is 1.02e-6: the second run must aim lower
    torch.manual_seed(seed)
    J = rectangular(60, 40, cond=20.0).float()
    assert least_squares(J, torch.randn(60, 3)).converged


# --- Nystrom --------------------------------------------------------------------------------------


def approximate(A, rank, **options):
    return nystrom(lambda V: A @ V, len(A), rank, dtype=A.dtype, **options)


def low_rank(n=60, rank=8, dtype=torch.float64):
    return (rectangular(n, rank) @ rectangular(rank, n)).to(dtype)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("rank", [8, 20, 60])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_nystrom_is_exact_where_the_rank_is_low(dtype, rank, scale):
    root = rectangular(60, 8).to(dtype)
    A = root @ root.mT * scale
    vectors, values = approximate(A, rank)
    assert vectors.shape == (60, rank)
    assert vectors.dtype == values.dtype == dtype
    assert (values >= 0).all()
    assert (values[:-1] >= values[1:]).all()
    gram = vectors.double().mT @ vectors.double()
    torch.testing.assert_close(gram, torch.eye(rank).double(), rtol=0.0, atol=1e-5)
    error = (vectors.double() * values) @ vectors.double().mT - A.double()
    assert error.norm() < (1e-8 if dtype == torch.float64 else 1e-2) * A.double().norm()


def test_nystrom_is_below_and_close_to_the_top():
    values = 2.0 ** -torch.arange(60, dtype=torch.float64)
    A = spectral(values)
    vectors, found = approximate(A, 20)
    assert (found <= values[:20] * (1 + 1e-10)).all()
    torch.testing.assert_close(found[:10], values[:10], rtol=1e-2, atol=0.0)
    rest = torch.linalg.eigvalsh(A - (vectors * found) @ vectors.mT)
    assert rest[0] > -1e-12
    assert rest[-1] < 1e-3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_nystrom_is_the_same_at_every_scale(dtype):
    A = spectral(2.0 ** -torch.arange(40, dtype=torch.float64)).to(dtype)
    vectors, values = approximate(A, 8, generator=torch.Generator().manual_seed(3))
    for scale in (2.0**-40, 2.0**40):
        again = approximate(A * scale, 8, generator=torch.Generator().manual_seed(3))
        torch.testing.assert_close(again[0], vectors)
        torch.testing.assert_close(again[1], values * scale)
    parts = approximate(A, 8, generator=torch.Generator().manual_seed(3), chunk=3)
    torch.testing.assert_close(parts[1], values)


def test_nystrom_of_zero(float64):
    vectors, values = approximate(torch.zeros(10, 10), 4)
    assert (values == 0).all()
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(4))


def test_nystrom_refuses(float64):
    A = spectral(torch.cat([torch.ones(10), -torch.ones(10)]))
    with pytest.raises(NotPositiveDefiniteError, match="add damping, or take the Gauss-Newton"):
        approximate(A, 15)
    for rank in (0, 21, -1):
        with pytest.raises(ValueError, match="expected a rank from 1 to 20"):
            approximate(A, rank)
    A[3, 4] = float("nan")
    with pytest.raises(NonFiniteError, match="a product with the matrix"):
        approximate(A, 5)


def test_nystrom_where_rounding_spoils_the_cholesky_factor(float64, monkeypatch):
    A = low_rank()
    A = A @ A.mT

    def fail(core):
        return torch.full_like(core, float("nan")), torch.tensor(1)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", fail)
    vectors, values = approximate(A, 20)
    error = (vectors * values) @ vectors.mT - A
    assert error.norm() < 1e-8 * A.norm()


@pytest.mark.parametrize(
    ("decay", "damping"), [(1.0, 1e-1), (1.5, 1e-2), (2.0, 1e-2), (2.0, 1e-3), (4.0, 1e-6)]
)
def test_nystrom_preconditions(float64, decay, damping):
    # yardstick 13: theorem 5.1 of Frangella, Tropp and Udell (2021) bounds the mean by 28
    values = torch.arange(1.0, 201.0) ** -decay  # dimensions of 7 to 50
    rank = 2 * math.ceil(1.5 * float((values / (values + damping)).sum())) + 1
    A = spectral(values)
    conditions = []
    for _ in range(20):
        vectors, found = approximate(A, rank)
        weights = ((found[-1] + damping) / (found + damping)).sqrt() - 1
        root = torch.eye(200) + (vectors * weights) @ vectors.mT  # P^-1/2
        spectrum = torch.linalg.eigvalsh(root @ (A + damping * torch.eye(200)) @ root)
        conditions.append(float(spectrum[-1] / spectrum[0]))
    assert sum(conditions) / 20 < 28
    plain = (values[0] + damping) / (values[-1] + damping)
    assert max(conditions) < plain


def test_nystrom_saves_iterations(float64):
    A = spectral(10.0 ** -torch.linspace(0, 8, 100))
    damping, b = 1e-6, torch.randn(100, 2)
    vectors, values = approximate(A, 60)

    def precondition(r):
        inside = vectors.mT @ r
        scaled = (values[-1] + damping) / (values + damping)
        return r + vectors @ (inside * (scaled - 1)[:, None])

    for method in (cg, minres):
        plain = method(lambda v: A @ v + damping * v, b)
        helped = method(lambda v: A @ v + damping * v, b, preconditioner=precondition)
        assert helped.converged
        assert helped.iterations < plain.iterations / 3
