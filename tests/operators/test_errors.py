"""What goes wrong is said: what was expected, what came, what to do."""

import warnings

import pytest
import torch

from nngeo_lazy.errors import (
    ConvergenceWarning,
    NonFiniteError,
    NotPositiveDefiniteError,
    SpaceMismatchError,
    TooLargeError,
    UnsupportedLayerError,
)
from nngeo_lazy.layout import Layout
from nngeo_lazy.operators import (
    BlockDiagonalLinearOperator,
    DenseLinearOperator,
    DiagonalLinearOperator,
    EigenKroneckerLinearOperator,
    Info,
    KroneckerLinearOperator,
    SumLinearOperator,
)
from nngeo_lazy.space import ParamSpace

from . import examples


@pytest.fixture
def F():
    return examples.blocks()


@pytest.mark.parametrize("shape", [(17,), (17, 2), (2, 17, 2), ()])
def test_wrong_length(F, shape):
    v = torch.ones(shape, dtype=torch.float64)
    for member in (F.matmul, F.solve, F.vTMv):
        with pytest.raises(SpaceMismatchError, match=r"expected a vector of shape \(18,\).*got"):
            member(v)


def test_wrong_dtype(F):
    for dtype in (torch.float32, torch.int64):
        with pytest.raises(SpaceMismatchError, match=r"expected.*float64, got.*convert"):
            F @ torch.ones(18, dtype=dtype)


def test_wrong_device(F):
    with pytest.raises(SpaceMismatchError, match="expected a vector on cpu, got one on meta"):
        F @ torch.ones(18, dtype=torch.float64, device="meta")


def test_wrong_names(F):
    named = F.space.unravel(torch.ones(18, dtype=torch.float64))
    named["other"] = named.pop("fc.bias")
    with pytest.raises(SpaceMismatchError, match=r"missing: \['fc.bias'\]; unknown: \['other'\]"):
        F @ named
    with pytest.raises(SpaceMismatchError, match="no parameter space"):
        examples.anonymous() @ named


@pytest.mark.parametrize("damping", [-1.0, torch.tensor(-1.0), {"fc": -1.0}, float("nan")])
def test_negative_damping(F, damping):
    for member in (F.damped, lambda d: F.solve(F.diagonal(), damping=d)):
        with pytest.raises(NotPositiveDefiniteError, match=r"expected damping.* >= 0, got"):
            member(damping)


def test_damping_that_does_not_fit(F):
    with pytest.raises(SpaceMismatchError, match=r"a number or of shape \(18,\), got \(17,\)"):
        F.damped(torch.ones(17))
    with pytest.raises(SpaceMismatchError, match="matches no parameter; did you mean"):
        F.damped({"fc.weigth": 1.0})
    with pytest.raises(SpaceMismatchError, match=r"'fc.weight' names \['fc.weight'\] again"):
        F.damped({"fc": 1.0, "fc.weight": 1.0})
    with pytest.raises(SpaceMismatchError, match="needs an operator with a parameter space"):
        examples.anonymous().damped({"fc": 1.0})
    with pytest.raises(ValueError, match="'exact' or 'factored', got 'pi'"):
        F.damped(1.0, method="pi")


def _singular():
    x = torch.randn(5, 2)
    low = x @ x.mT
    ones = torch.ones(1, 1)
    values = torch.tensor([[[1.0, 0.0]]])
    return {
        "dense": DenseLinearOperator(low),
        "diagonal": DiagonalLinearOperator(torch.tensor([1.0, 0.0])),
        "kronecker": KroneckerLinearOperator(low[None], torch.eye(2)[None]),
        "diagonal factor": KroneckerLinearOperator(torch.eye(2)[None], torch.tensor([[1.0, 0.0]])),
        "eigen": EigenKroneckerLinearOperator(values, ones, torch.ones(1, 2)),
    }


@pytest.mark.parametrize("name", _singular())
def test_singular_solve_names_the_block(name):
    B = _singular()[name]
    v = torch.ones(B.shape[-1])
    n = B.shape[-1]
    F = BlockDiagonalLinearOperator(B, names=("fc1",), layouts=(Layout.flat([slice(0, n)]),))
    for member in (lambda: F.solve(v), F.inverse, lambda: F.power(-0.5)):
        with pytest.raises(NotPositiveDefiniteError, match=r"block 'fc1'.*singular.*damping="):
            member()
    assert F.solve(v, damping=0.1).isfinite().all()
    assert F.pinv().to_dense().isfinite().all()


def test_tiny_free_eigenvalues_are_not_singular():
    values = torch.tensor([[[1.0, 1e-12]]])
    F = EigenKroneckerLinearOperator(values, torch.ones(1, 1), torch.ones(1, 2))
    torch.testing.assert_close(F.solve(torch.ones(2)), torch.tensor([1.0, 1e12]))
    D = DiagonalLinearOperator(torch.tensor([1.0, 1e-30]))
    assert D.solve(torch.ones(2))[1] > 1e29


def test_non_finite_names_the_block():
    bad = torch.eye(2)
    bad[0, 0] = float("nan")
    F = BlockDiagonalLinearOperator(torch.eye(2), bad)
    with pytest.raises(NonFiniteError, match=r"block '1'.*NaN or infinity"):
        F.solve(torch.ones(4))


@pytest.mark.parametrize("name", ["diagonal", "eigen", "dense"])
def test_indefinite(name):
    F = -examples.CLOSED[name]()
    for member in (F.logdet, lambda: F.sample(1), lambda: F.power(0.5)):
        with pytest.raises(NotPositiveDefiniteError, match=r"negative eigenvalue.*damp"):
            member()
    with pytest.raises(NotPositiveDefiniteError, match="no Cholesky factor"):
        F.cholesky()


def test_lazy_says_what_has_a_closed_form():
    F = examples.lazy_sum()
    for member in (
        F.pinv,
        lambda: F.power(0.5),
        lambda: F.norm("nuc"),
        lambda: torch.linalg.eigvalsh(F),
    ):
        with pytest.raises(UnsupportedLayerError, match=r"no closed form.*F.to_dense\(\)"):
            member()


def test_indefinite_sum_is_not_solved_by_cg():
    q = examples.orthogonal(12, torch.Generator().manual_seed(0))
    F = SumLinearOperator(examples.eigen(), DenseLinearOperator((q * -3.0) @ q.mT))
    with pytest.raises(NotPositiveDefiniteError, match=r"not positive definite.*damping="):
        F.solve(torch.ones(12, dtype=torch.float64))


def test_early_stop_warns_with_the_residual():
    F = examples.lazy_sum()
    with pytest.warns(ConvergenceWarning, match="after 2 iterations.*preconditioner=") as caught:
        x = F.solve(torch.ones(18, dtype=torch.float64), max_iter=2)
    warning = caught[0].message
    true = (F @ x - 1).norm() / 18**0.5
    assert warning.iterations == 2
    assert abs(warning.residual - float(true)) < 1e-6 * float(true)


def test_preconditioner_and_start():
    F, M = examples.lazy_sum(), examples.blocks()
    v = torch.ones(18, dtype=torch.float64)
    want = torch.linalg.solve(F.to_dense() + 0.1 * torch.eye(18, dtype=torch.float64), v)
    torch.testing.assert_close(F.solve(v, damping=0.1, preconditioner=M), want)
    torch.testing.assert_close(F.solve(v, damping=0.1, x0=want, max_iter=1), want)
    with warnings.catch_warnings():  # the exact preconditioner needs one step
        warnings.simplefilter("error")
        F.solve(v, preconditioner=DenseLinearOperator(F.to_dense()), max_iter=2)


def test_mismatched_spaces():
    other = ParamSpace({"a": (18,)})
    G = DiagonalLinearOperator(torch.ones(18, dtype=torch.float64), info=Info(other))
    for F in (examples.blocks(), examples.dense(), examples.lazy_sum(), examples.diagonal()):
        for work in (lambda F=F: F + G, lambda F=F: G + F, lambda F=F: F - G, lambda F=F: F @ G):
            with pytest.raises(SpaceMismatchError, match="over the same parameters"):
                work()
    with pytest.raises(SpaceMismatchError, match=r"matrices of one shape, got \(18, 18\)"):
        examples.dense() + examples.kronecker()
    with pytest.raises(SpaceMismatchError, match="matrices that fit"):
        examples.dense() @ examples.kronecker()


def test_block_selectors(F):
    with pytest.raises(SpaceMismatchError, match="matches no parameter"):
        F.block("nothing")
    for work in (lambda: examples.anonymous().blocks, lambda: examples.anonymous().block("a")):
        with pytest.raises(SpaceMismatchError, match="parameter space"):
            work()


def test_dense_limit(F):
    with pytest.raises(TooLargeError, match=r"18 x 18 matrix takes 2,592 bytes.*limit of 100"):
        F.to_dense(limit=100)
    huge = DiagonalLinearOperator(torch.ones(1).expand(200_000))
    with pytest.raises(TooLargeError, match="limit=160000000000"):
        huge.to_dense()
    with pytest.raises(TooLargeError):
        huge.cholesky()


def test_constructors():
    with pytest.raises(ValueError, match=r"left factor as \(G, n, n\), or \(G, n\).*got \(2,\)"):
        KroneckerLinearOperator(torch.ones(2), torch.ones(1, 2))
    with pytest.raises(ValueError, match=r"as many groups.*single dense matrix is of shape \(1,"):
        KroneckerLinearOperator(torch.eye(3), torch.eye(2)[None])
    with pytest.raises(ValueError, match="of one dtype"):
        KroneckerLinearOperator(torch.eye(3)[None], torch.eye(2)[None].double())
    with pytest.raises(ValueError, match=r"eigenvalues of shape \(1, 2, 3\), got \(6,\)"):
        EigenKroneckerLinearOperator(torch.ones(6), torch.ones(1, 2), torch.ones(1, 3))
    with pytest.raises(ValueError, match="expected a square matrix"):
        DenseLinearOperator(torch.ones(2, 3))
    with pytest.raises(ValueError, match="expected a diagonal"):
        DiagonalLinearOperator(torch.ones(2, 3))
    with pytest.raises(ValueError, match="at least one block"):
        BlockDiagonalLinearOperator()
    with pytest.raises(ValueError, match="a name and a layout for each block"):
        BlockDiagonalLinearOperator(torch.eye(2), names=("a",), layouts=())


def test_numbers_are_not_matrices(F):
    with pytest.raises(TypeError, match=r"F.add_diagonal\(2\)"):
        F + 2
    with pytest.raises(ValueError, match="expected ord"):
        F.norm(1)
    with pytest.raises(RuntimeError, match="solve needs a square operator"):
        F[:3].solve(torch.ones(3, dtype=torch.float64))
