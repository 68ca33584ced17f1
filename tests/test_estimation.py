"""Traces, diagonals, log-determinants and functions: exact where known, honest where estimated."""

import math
import warnings

import linear_operator
import pytest
import torch
from test_spectra import (
    REPRESENTATIONS,
    Interrupting,
    hessian,
    network,
    products_only,
    symmetric,
)
from torch import nn

import nngeo_lazy as ng
from nngeo_lazy import linalg
from nngeo_lazy.errors import (
    ConvergenceWarning,
    EstimateWarning,
    NonFiniteError,
    NotPositiveDefiniteError,
    UnsupportedLayerError,
)
from nngeo_lazy.operators.lazy import LazyLinearOperator
from nngeo_lazy.testing import check_operator

from cases import close

pytestmark = pytest.mark.usefixtures("float64")

SCALES = [1e-12, 1.0, 1e12]
N = 400
DECAYING = torch.logspace(0, -60, N, dtype=torch.float64)


def spread(n=N, cond=100.0):
    return symmetric(torch.logspace(0, math.log10(cond), n))


def share(values, d):
    return (values / (values + d)).sum()


# --- traces ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["xtrace", "hutch++"])
def test_orders_of_magnitude_better_on_decaying_spectra(method):
    A = symmetric(DECAYING)
    exact = float(A.trace())
    squares = {"hutchinson": 0.0, method: 0.0}
    for seed in range(5):
        for one, probes in (("hutchinson", 90), (method, 45 if method == "xtrace" else 30)):
            found = ng.trace(products_only(A), method=one, probes=probes, seed=seed)
            assert found.matvecs == 90
            squares[one] += (float(found) - exact) ** 2
    assert squares[method] < 1e-2**2 * squares["hutchinson"]


@pytest.mark.parametrize("method", ["xdiag"])
def test_diagonal_is_better_on_decaying_spectra(method):
    A = symmetric(DECAYING)
    good = ng.diagonal(products_only(A), method=method, probes=45, seed=0)
    plain = ng.diagonal(products_only(A), method="hutchinson", probes=90, seed=0)
    assert good.matvecs == plain.matvecs == 90
    assert (good.value - A.diagonal()).norm() < 1e-2 * (plain.value - A.diagonal()).norm()


@pytest.mark.parametrize("method", ["hutchinson", "hutch++", "xtrace"])
def test_intervals_of_traces_cover(method):
    A = spread(120)
    exact, hits = float(A.trace()), 0
    op = products_only(A)
    for seed in range(100):
        low, high = ng.trace(op, method=method, probes=10, seed=seed).interval()
        hits += bool(low <= exact <= high)
    assert hits >= 97


@pytest.mark.parametrize("method", ["hutchinson", "xdiag"])
def test_intervals_of_diagonals_cover(method):
    A = spread(120)
    low, high = ng.diagonal(products_only(A), method=method, probes=20, seed=0).interval()
    inside = (low <= A.diagonal()) & (A.diagonal() <= high)
    assert inside.double().mean() >= 0.97


@pytest.mark.parametrize(
    ("function", "exact"),
    [(torch.log, torch.logdet), (torch.exp, lambda A: torch.matrix_exp(A).trace())],
)
def test_intervals_of_functions_cover_where_the_quadrature_has_converged(function, exact):
    A = spread(320, cond=10.0)
    truth, hits = float(exact(A)), 0
    op = products_only(A)
    for seed in range(100):
        found = ng.trace(op, function, method="slq", seed=seed)
        low, high = found.interval()
        hits += bool(low <= truth <= high)
        assert found.bias < float(found.standard_error)
    assert hits >= 97


def test_bias_of_an_unconverged_quadrature_warns():
    A = spread(400, cond=1e8)
    with pytest.warns(EstimateWarning, match=r"quadrature that has not converged.*raise steps="):
        found = ng.logdet(products_only(A), method="slq", steps=40, probes=20, seed=0)
    error = abs(float(found) - float(torch.logdet(A)))
    assert error > 3 * float(found.standard_error)
    assert found.bias > float(found.standard_error)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("method", ["hutchinson", "hutch++", "xtrace"])
def test_traces_at_any_scale(scale, method):
    A = spread(150)
    base = ng.trace(products_only(A), method=method, probes=8, seed=0)
    found = ng.trace(products_only(scale * A), method=method, probes=8, seed=0)
    close(found.value / scale, base.value, 1e-6)
    close(found.standard_error / scale, base.standard_error, 1e-5)


@pytest.mark.parametrize("scale", SCALES)
def test_logdet_and_effective_dimension_at_any_scale(scale):
    A = spread(400, 10.0)
    base = ng.logdet(products_only(A), seed=0)
    found = ng.logdet(products_only(scale * A), seed=0)
    close(found.value - N * math.log(scale), base.value, 1e-8)
    d = ng.effective_dimension(products_only(A), 2.0, seed=0)
    close(ng.effective_dimension(products_only(scale * A), 2.0 * scale, seed=0).value, d.value)


@pytest.mark.parametrize("method", ["hutchinson", "xtrace", "hutch++"])
def test_low_precision(method):
    A = spread(150).float()
    found = ng.trace(products_only(A), method=method, probes=10, seed=0)
    assert found.value.dtype == torch.float32
    low, high = found.interval(0.9999)
    assert low <= A.double().trace() <= high


def test_a_wanted_error_is_reached():
    A = products_only(spread())
    loose = ng.trace(A, method="hutchinson", probes=4, tol=0.05, seed=0)
    tight = ng.trace(A, method="hutchinson", probes=4, tol=0.005, seed=0)
    assert float(tight.standard_error) <= 0.005 * float(tight)
    assert loose.matvecs < tight.matvecs
    for found in (
        ng.trace(A, probes=4, tol=1e-3, seed=0),
        ng.diagonal(A, probes=4, tol=0.05, seed=0),
        ng.logdet(A, probes=2, tol=0.01, seed=0),
    ):
        assert float(found.standard_error.norm()) <= 0.05 * float(found.value.norm())


def test_a_wanted_error_out_of_reach_warns():
    A = products_only(spread())
    with pytest.warns(EstimateWarning, match=r"short of tol=1e-06: raise max_matvecs="):
        found = ng.trace(A, method="hutchinson", tol=1e-6, max_matvecs=100, seed=0)
    assert found.matvecs <= 100


def test_seeded():
    A = products_only(spread())
    before = torch.get_rng_state()
    for estimate in (ng.trace, ng.diagonal, ng.logdet):
        assert torch.equal(estimate(A, seed=1).value, estimate(A, seed=1).value)
        assert not torch.equal(estimate(A, seed=1).value, estimate(A, seed=2).value)
    assert torch.equal(torch.get_rng_state(), before)


def test_interval_of_an_exact_number():
    found = ng.trace(torch.eye(3))
    assert found.interval() == (found.value, found.value)
    assert found.matvecs == found.probes == 0


# --- every operator -------------------------------------------------------------------------------


def within(found, exact):
    low, high = found.interval(0.99999)
    slack = 1e-8 * abs(float(exact)) + found.bias
    return float(low) - slack <= float(exact) <= float(high) + slack


@pytest.mark.parametrize("representation", REPRESENTATIONS)
def test_the_same_call_on_every_representation(representation):
    F = ng.FIM(network(), torch.randn(30, 6), representation, likelihood="categorical").damped(0.1)
    dense = F.to_dense()
    values = torch.linalg.eigvalsh(dense)
    close(ng.trace(F).value, values.sum())
    close(ng.diagonal(F).value, dense.diagonal())
    close(ng.logdet(F).value, values.log().sum())
    close(ng.effective_dimension(F, 0.3).value, share(values, 0.3))
    close(ng.trace(F, torch.sqrt).value, values.sqrt().sum())
    v = torch.randn(len(dense))
    close(ng.matrix_function(F, torch.sqrt, v), spectral(dense, torch.sqrt) @ v, 1e-8)


def spectral(dense, f):
    values, vectors = torch.linalg.eigh(dense)
    return (vectors * f(values)) @ vectors.mT


def test_operators_of_linear_operator():
    A = spread(60, 10.0)
    op = linear_operator.to_linear_operator(A) + linear_operator.operators.DiagLinearOperator(
        torch.linspace(0, 1, 60)
    )
    dense = op.to_dense()
    close(ng.trace(op).value, dense.trace())
    close(ng.logdet(op).value, torch.logdet(dense))
    close(ng.diagonal(op).value, dense.diagonal())


def test_matrix_free_hessian():
    H = hessian(40)
    dense = H.to_dense()
    for method in ("hutchinson", "xtrace", "hutch++"):
        assert within(ng.trace(H, method=method, probes=10, seed=0), dense.trace())
    close(ng.trace(H, method="exact").value, dense.trace())
    close(ng.diagonal(H, method="exact").value, dense.diagonal())


def test_exact_where_an_estimate_would_take_more_products():
    A = spread(50)
    found = ng.trace(products_only(A))
    assert (found.matvecs, found.probes) == (50, 0)
    close(found.value, A.trace())
    found = ng.diagonal(products_only(A))
    close(found.value, A.diagonal())
    found = ng.logdet(products_only(A))
    assert found.matvecs == 50
    close(found.value, torch.logdet(A))


def test_not_symmetric_matrices_have_traces():
    A = torch.randn(200, 200) + 5 * torch.eye(200)
    for method in ("hutchinson", "xtrace", "hutch++"):
        assert within(ng.trace(products_only(A), method=method, seed=0), A.trace())


# --- log-determinants as members ------------------------------------------------------------------


def test_logdet_of_a_large_lazy_sum_is_an_estimate_with_a_gradient():
    A, B = spread(400, 20.0), spread(400, 20.0)
    w = torch.tensor(0.7, requires_grad=True)
    lazy = products_only(A) * w + products_only(B)
    with pytest.warns(EstimateWarning, match=r"logdet is an estimate: .*ng.logdet\(F, tol="):
        found = lazy.logdet()
    exact = torch.logdet(A * w + B)
    assert found.item() == pytest.approx(exact.item(), rel=0.01)
    (slope,) = torch.autograd.grad(found, w)
    (expected,) = torch.autograd.grad(exact, w)
    assert float(slope) == pytest.approx(float(expected), rel=0.05)


def test_logdet_of_a_small_lazy_sum_is_exact():
    A, B = spread(40), spread(40)
    close((products_only(A) + products_only(B)).logdet(), torch.logdet(A + B))


def test_a_check_allows_an_estimate_its_interval():
    A = spread(320, 4.0)
    check_operator(products_only(A) + products_only(A), 2 * A)


def test_a_check_refuses_a_wrong_estimate(monkeypatch):
    monkeypatch.setattr(LazyLinearOperator, "_logdet", wrong_logdet)
    A = spread(320, 4.0)
    with pytest.raises(AssertionError, match=r"logdet.* is off by"):
        check_operator(products_only(A) + products_only(A), 2 * A)


def wrong_logdet(self):
    found = ng.logdet(self, method="slq", seed=0)
    off = linalg.Estimate(found.value + 100, found.standard_error, found.matvecs, found.probes)
    warnings.warn(EstimateWarning("wrong", off), stacklevel=2)
    return off.value


# --- functions of matrices ------------------------------------------------------------------------


FUNCTIONS = {
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "exp": torch.exp,
    "inverse": torch.reciprocal,
    "square": torch.square,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_matrices(name):
    A = spread(200, 50.0) / 10
    f = FUNCTIONS[name]
    v = torch.randn(200, 3)
    found = ng.matrix_function(products_only(A), f, v)
    close(found, spectral(A, f) @ v, 1e-8)
    close(ng.matrix_function(products_only(A), f, v[:, 0]), spectral(A, f) @ v[:, 0], 1e-8)
    close(ng.matrix_function(A, f, v), spectral(A, f) @ v)


def test_functions_of_dicts():
    H = hessian()
    v = H.space.unravel(torch.randn(H.shape[0]))
    found = ng.matrix_function(H, torch.exp, v)
    assert set(found) == set(v)
    close(H.space.ravel(found), torch.matrix_exp(H.to_dense()) @ H.space.ravel(v), 1e-8)


def test_a_square_root_twice_is_the_matrix():
    F = ng.FIM(network(), torch.randn(30, 6), "implicit", likelihood="categorical").damped(0.1)
    v = torch.randn(F.shape[0])
    half = ng.matrix_function(F, torch.sqrt, v)
    close(ng.matrix_function(F, torch.sqrt, half), F @ v, 1e-8)
    white = ng.matrix_function(F, torch.rsqrt, v)
    close(ng.matrix_function(F, torch.rsqrt, white), F.solve(v), 1e-7)


def test_functions_of_an_invariant_subspace_and_of_zero():
    A = torch.diag(torch.arange(1.0, 101.0))
    v = torch.zeros(100)
    close(ng.matrix_function(products_only(A), torch.sqrt, v), v)
    v[8] = 2.0
    expected = torch.zeros(100)
    expected[8] = 6.0
    close(ng.matrix_function(products_only(A), torch.sqrt, v), expected)


def test_too_few_steps_warn():
    A = spread(300, 1e6)
    with pytest.warns(ConvergenceWarning, match=r"f\(A\) v stopped at"):
        ng.matrix_function(products_only(A), torch.rsqrt, torch.randn(300), max_steps=10)


# --- low rank -------------------------------------------------------------------------------------


OUTLIERS = torch.cat([torch.linspace(0.9, 1.1, 150), torch.logspace(1, 3, 10)])


@pytest.mark.parametrize("method", ["lanczos", "nystrom"])
def test_low_rank_of_a_low_rank_matrix_is_exact(method):
    values = torch.cat([torch.zeros(90), torch.arange(1.0, 11.0)])
    A = symmetric(values)
    for rank in (10, 12):
        close(ng.low_rank(products_only(A), rank, method=method, seed=0).to_dense(), A, 1e-8)


def test_low_rank_is_the_best_of_its_rank():
    A = symmetric(torch.cat([torch.linspace(-1, 1, 100), torch.tensor([-9.0, 5.0])]))
    low = ng.low_rank(products_only(A), 2, seed=0)
    values, vectors = torch.linalg.eigh(A)
    kept = values.abs() > 2
    close(low.to_dense(), (vectors[:, kept] * values[kept]) @ vectors[:, kept].mT, 1e-8)


def test_rests_of_low_rank():
    A = symmetric(OUTLIERS)
    op = products_only(A)
    constant = ng.low_rank(op, 10, rest="constant", seed=0)
    assert float(constant.trace()) == pytest.approx(float(A.trace()), rel=1e-3)
    values = torch.linalg.eigvalsh(constant.to_dense())
    torch.testing.assert_close(values[:150], values[:150].mean().expand(150))
    assert float(values[0]) == pytest.approx(1.0, rel=0.05)
    exact = ng.low_rank(A, 10, rest="diagonal")
    close(exact.diagonal(), A.diagonal(), 1e-6)
    assert float(ng.low_rank(A, 10).trace()) == pytest.approx(float(OUTLIERS[-10:].sum()))


@pytest.mark.parametrize("method", ["lanczos", "nystrom"])
def test_low_rank_preconditions(method):
    A = symmetric(torch.cat([torch.full((150,), 1e-4), torch.logspace(-2, 3, 20)]))
    op, b = products_only(A), torch.randn(170)
    low = ng.low_rank(op, 25, method=method, seed=0)
    plain = ng.solve(op, b, damping=1e-2, method="cg")
    found = ng.solve(op, b, damping=1e-2, method="cg", preconditioner=low)
    assert found.iterations < plain.iterations / 3


def test_low_rank_as_a_posterior():
    F = ng.FIM(network(), torch.randn(30, 6), "implicit", likelihood="categorical")
    low = ng.low_rank(F, F.shape[0] - 5, seed=0)
    assert low.space == F.space
    covariance = low.inverse(damping=0.5)
    dense = torch.linalg.inv(F.to_dense() + 0.5 * torch.eye(F.shape[0]))
    assert (covariance.to_dense() - dense).norm() < 1e-3 * dense.norm()
    draws = covariance.sample(4000, seed=0)
    moment = draws.mT @ draws / 4000
    assert (moment - dense).norm() < 0.2 * dense.norm()


# --- long work ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "products"),
    [
        (lambda F: ng.trace(F, method="hutchinson", probes=100, seed=0), 2),
        (lambda F: ng.trace(F, method="xtrace", probes=10, tol=1e-9, seed=0), 4),
        (lambda F: ng.diagonal(F, method="hutchinson", probes=100, seed=0), 2),
        (lambda F: ng.diagonal(F, method="xdiag", probes=10, tol=1e-9, seed=0), 4),
        (lambda F: ng.logdet(F, probes=10, tol=1e-9, seed=0), 50),
    ],
)
def test_interrupted_estimates_are_from_what_there_was(call, products):
    A = spread(400, 10.0)
    with pytest.warns(EstimateWarning, match=r"was interrupted after \d+ products"):
        found = call(Interrupting(A, products).operator())
    assert found.interrupted
    assert found.probes >= 2
    assert bool((found.standard_error > 0).all())


def test_progress_bar(capsys):
    A = products_only(spread())
    ng.trace(A, seed=0)
    assert capsys.readouterr().err == ""
    for call, name in [
        (lambda: ng.trace(A, progress=True), "xtrace"),
        (lambda: ng.trace(A, method="hutchinson", progress=True), "hutchinson"),
        (lambda: ng.trace(A, method="hutch++", progress=True), "hutch++"),
        (lambda: ng.diagonal(A, progress=True), "xdiag"),
        (lambda: ng.logdet(A, progress=True), "logdet"),
        (lambda: ng.matrix_function(A, torch.exp, torch.ones(N), progress=True), "f(A) v"),
    ]:
        call()
        assert name in capsys.readouterr().err


# --- bad input ------------------------------------------------------------------------------------


def test_not_positive_definite():
    indefinite = symmetric(torch.linspace(-1, 1, 400))
    for A in (indefinite, products_only(indefinite)):
        with pytest.raises(NotPositiveDefiniteError, match=r"logdet.*(positive|finite|negative)"):
            ng.logdet(A, seed=0)
        with pytest.raises(NotPositiveDefiniteError, match=r"tr f\(A\)"):
            ng.trace(A, torch.sqrt, seed=0)
        with pytest.raises(NotPositiveDefiniteError, match=r"f\(A\) v"):
            ng.matrix_function(A, torch.sqrt, torch.ones(400))
        with pytest.raises(NotPositiveDefiniteError, match="the effective dimension"):
            ng.effective_dimension(A, 0.5, seed=0)


def test_singular():
    singular = torch.diag(torch.tensor([1.0, 0.0, 2.0]))
    for A in (singular, products_only(singular)):
        with pytest.raises(NotPositiveDefiniteError, match="logdet"):
            ng.logdet(A)


@pytest.mark.parametrize("d", [0.0, -1.0, math.nan])
def test_effective_dimension_needs_damping(d):
    with pytest.raises(NotPositiveDefiniteError, match="expected damping > 0, got"):
        ng.effective_dimension(torch.eye(3), d)


def test_unknown_methods():
    A = products_only(spread())
    for call in (ng.trace, ng.diagonal, ng.logdet):
        with pytest.raises(ValueError, match=r"expected method to be one of .*, got 'guess'"):
            call(A, method="guess")
    with pytest.raises(ValueError, match="method 'slq' is for a function="):
        ng.trace(A, method="slq")
    with pytest.raises(ValueError, match="a function needs method 'slq', got 'xtrace'"):
        ng.trace(A, torch.exp, method="xtrace")
    with pytest.raises(ValueError, match="expected method 'lanczos' or 'nystrom', got 'svd'"):
        ng.low_rank(A, 3, method="svd")
    with pytest.raises(ValueError, match=r"expected rest to be one of .*, got 'mean'"):
        ng.low_rank(A, 3, rest="mean")


@pytest.mark.parametrize("method", ["hutchinson", "xtrace", "hutch++"])
def test_too_few_probes(method):
    with pytest.raises(ValueError, match="at least 2 probes"):
        ng.trace(products_only(spread()), method=method, probes=1)


def test_ranks_out_of_range():
    A = products_only(spread())
    for method in ("lanczos", "nystrom"):
        for rank in (0, N + 1):
            with pytest.raises(ValueError, match=f"from 1 to {N}.*, got {rank}"):
                ng.low_rank(A, rank, method=method)


def test_not_square():
    A = torch.randn(4, 3)
    for call in (ng.trace, ng.diagonal):
        with pytest.raises(RuntimeError, match=r"needs a square operator, got \(4, 3\)"):
            call(A)
    for call in (ng.logdet, lambda F: ng.low_rank(F, 1)):
        with pytest.raises(ValueError, match="needs a symmetric matrix, got 4 x 3"):
            call(A)


def test_not_symmetric():
    with pytest.raises(ValueError, match="logdet needs a symmetric matrix: here"):
        ng.logdet(products_only(torch.randn(400, 400)), seed=0)


def test_no_closed_form_for_exact():
    with pytest.raises(UnsupportedLayerError):
        ng.logdet(products_only(spread()), method="exact")


def test_nan_says_in_which_product():
    bad = symmetric(torch.ones(200))
    bad[3, 3] = torch.nan
    op = ng.aslinearoperator(Interrupting(bad, 1000).operator())
    for call in (ng.trace, ng.diagonal):
        with pytest.raises(NonFiniteError, match=r"NaN or infinity in product \d+"):
            call(op)


def test_a_small_network_end_to_end():
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    data = torch.randn(50, 5), torch.randint(3, (50,))
    G = ng.GGN(model, data, loss="categorical")
    dense = G.to_dense()
    close(ng.effective_dimension(G, 1e-2).value, share(torch.linalg.eigvalsh(dense), 1e-2), 1e-8)
