"""Gradients: native in products, implicit in solves, any order, no NaN where eigenvalues repeat."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from nngeo_lazy.errors import UnsupportedLayerError
from nngeo_lazy.operators import (
    BlockDiagonalLinearOperator,
    DenseLinearOperator,
    DiagonalLinearOperator,
    EigenKroneckerLinearOperator,
    KroneckerLinearOperator,
    LowRankLinearOperator,
    QuasiDiagonalLinearOperator,
    SumLinearOperator,
)

from . import examples


def sym(M):
    return (M + M.mT) / 2


def _tensors(*shapes, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(*s, generator=g, dtype=torch.float64).requires_grad_(True) for s in shapes]


def _spd(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    return examples.spd(n, g, 3.0).requires_grad_(True)


def _diag(n):
    return torch.linspace(1, 2, n, dtype=torch.float64).requires_grad_(True)


def _basis(n, seed):
    return examples.orthogonal(n, torch.Generator().manual_seed(seed))[None]


# name: (tensors, tensors -> a symmetric operator of size 6)
CASES = {
    "dense": ([_spd(6)], lambda M: DenseLinearOperator(sym(M))),
    "diagonal": ([_diag(6)], DiagonalLinearOperator),
    "kronecker": (
        [_spd(2), _spd(3, 1)],
        lambda L, R: KroneckerLinearOperator(sym(L)[None], sym(R)[None]),
    ),
    "degenerate": (
        [
            torch.eye(2, dtype=torch.float64).requires_grad_(True),
            torch.diag(torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)).requires_grad_(True),
        ],
        lambda L, R: KroneckerLinearOperator(sym(L)[None], sym(R)[None]),
    ),
    "grouped": (
        [_spd(3), _diag(2)],
        lambda L, r: KroneckerLinearOperator(torch.stack([sym(L), 2 * sym(L)]), r.reshape(2, 1)),
    ),
    "eigen": (
        [_diag(6)],
        lambda d: EigenKroneckerLinearOperator(d.reshape(1, 2, 3), _basis(2, 0), _basis(3, 1)),
    ),
    "low rank": (
        [*_tensors((6, 2)), _diag(2)],
        lambda U, c: LowRankLinearOperator(U, c, torch.tensor(0.5, dtype=torch.float64)),
    ),
    "low rank, varying": (
        [*_tensors((6, 2)), _diag(6)],
        lambda U, d: LowRankLinearOperator(U, U.new_tensor([1.0, -0.05]), d),
    ),
    "quasi-diagonal": (
        [_diag(4), *_tensors((2, 2), (2, 1)), _diag(2)],
        lambda a, b, q, r: QuasiDiagonalLinearOperator(
            a.reshape(2, 2), b, torch.cat([q, r[:, None], 0.3 * r[:, None]], 1)
        ),
    ),
    "blocks": (
        [_spd(2), _spd(2, 1), _diag(2)],
        lambda L, R, d: BlockDiagonalLinearOperator(
            KroneckerLinearOperator(sym(L)[None], sym(R)[None]), DiagonalLinearOperator(d)
        ),
    ),
    "sum": (
        [_spd(2), _spd(3, 1), _diag(6)],
        lambda L, R, d: SumLinearOperator(
            KroneckerLinearOperator(sym(L)[None], sym(R)[None]), DiagonalLinearOperator(d)
        ),
    ),
}
TIGHT = {"tol": 1e-13, "max_iter": 200}


@pytest.mark.parametrize("name", CASES)
def test_product(name):
    tensors, make = CASES[name]
    (v,) = _tensors((6, 2))
    assert gradcheck(lambda v, *t: make(*t) @ v, (v, *tensors))
    assert gradgradcheck(lambda v, *t: make(*t) @ v, (v, *tensors))
    assert gradcheck(lambda v, *t: make(*t).vTMv(v), (v, *tensors))


@pytest.mark.parametrize("name", CASES)
def test_damped_solve(name):
    tensors, make = CASES[name]
    (v,) = _tensors((6,))
    d = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def solve(v, d, *t):
        return make(*t).solve(v, damping=d, **TIGHT)

    assert gradcheck(solve, (v, d, *tensors))
    assert gradgradcheck(solve, (v, d, *tensors), atol=1e-4)


@pytest.mark.parametrize("name", sorted(set(CASES) - {"degenerate"}))
def test_solve_and_inverse(name):
    tensors, make = CASES[name]
    (v,) = _tensors((6, 2))
    assert gradcheck(lambda v, *t: make(*t).solve(v, **TIGHT), (v, *tensors))
    assert gradcheck(lambda v, *t: make(*t).inverse() @ v, (v, *tensors), atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_vector_damping(name):
    tensors, make = CASES[name]
    d = torch.linspace(0.2, 0.5, 6, dtype=torch.float64).requires_grad_(True)
    (v,) = _tensors((6,))
    assert gradcheck(lambda d, *t: make(*t).damped(d) @ v, (d, *tensors))
    assert gradcheck(lambda d, *t: make(*t).solve(v, damping=d, **TIGHT), (d, *tensors))


@pytest.mark.parametrize("name", ["kronecker", "degenerate", "grouped"])
def test_factored_damping(name):
    tensors, make = CASES[name]
    d = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    (v,) = _tensors((6,))
    assert gradcheck(lambda d, *t: make(*t).damped(d, method="factored").solve(v), (d, *tensors))


def test_factored_damping_has_a_gradient_at_zero():
    _, make = CASES["kronecker"]
    d = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
    make(_spd(2), _spd(3)).damped(d, method="factored").trace().backward()
    assert torch.isfinite(d.grad)


@pytest.mark.parametrize("name", sorted(set(CASES) - {"sum"}))
def test_numbers(name):
    tensors, make = CASES[name]
    assert gradcheck(lambda *t: make(*t).trace(), tensors)
    assert gradcheck(lambda *t: make(*t).diagonal(), tensors)
    assert gradcheck(lambda *t: make(*t).norm(), tensors)
    assert gradcheck(lambda *t: make(*t).damped(0.1).logdet(), tensors)


@pytest.mark.parametrize("name", ["dense", "diagonal", "kronecker", "eigen", "low rank", "blocks"])
def test_power_and_samples(name):
    tensors, make = CASES[name]
    (v,) = _tensors((6,))
    assert gradcheck(lambda v, *t: make(*t).power(0.5) @ v, (v, *tensors))
    assert gradcheck(lambda *t: make(*t).sample(2, seed=0), tensors)


def test_dependent_columns_have_right_gradients_or_none():
    (U,) = _tensors((6, 2))
    d = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)

    def make(U, d):
        return LowRankLinearOperator(torch.cat([U, U, 0 * U], 1), None, d)

    assert gradcheck(lambda U, d: make(U, d).logdet(), (U, d))
    assert gradcheck(lambda U, d: make(U, d.expand(6) + 0.0).logdet(), (U, d))
    assert gradcheck(lambda U, d: make(U, d).norm("nuc"), (U, d))
    with pytest.raises(UnsupportedLayerError, match="depend on each other"):
        make(U, d).power(0.5)


def test_power_has_no_nan_where_eigenvalues_repeat():
    M = torch.eye(3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda M: DenseLinearOperator(sym(M)).power(0.5).to_dense(), (M,))


def test_power_of_a_damped_kronecker_refuses_a_gradient_that_it_would_get_wrong():
    tensors, make = CASES["kronecker"]
    with pytest.raises(UnsupportedLayerError, match="differentiable"):
        make(*tensors).damped(0.1).power(0.5)
    assert make(*tensors).detach().damped(0.1).power(0.5).shape == (6, 6)


@pytest.mark.parametrize("name", CASES)
def test_functional_transforms_over_vectors(name):
    tensors, make = CASES[name]
    F = make(*(t.detach() for t in tensors))
    A = F.to_dense() + 0.1 * torch.eye(6, dtype=torch.float64)
    V = torch.randn(4, 6, dtype=torch.float64)
    torch.testing.assert_close(torch.vmap(lambda v: F @ v)(V), V @ F.to_dense())
    solved = torch.vmap(lambda v: F.solve(v, damping=0.1, **TIGHT))(V)
    torch.testing.assert_close(solved, torch.linalg.solve(A, V.mT).mT)
    grad = torch.func.grad(lambda v: F.vTMv(v))(V[0])
    torch.testing.assert_close(grad, 2 * F.to_dense() @ V[0])
    grad = torch.func.grad(lambda v: v @ F.solve(v, damping=0.1, **TIGHT))(V[0])
    torch.testing.assert_close(grad, 2 * torch.linalg.solve(A, V[0]))
    hess = torch.func.hessian(lambda v: v @ F.solve(v, damping=0.1, **TIGHT))(V[0])
    torch.testing.assert_close(hess, 2 * torch.linalg.inv(A))


@pytest.mark.parametrize("name", ["kronecker", "dense", "sum"])
def test_functional_jacobian_over_tensors(name):
    tensors, make = CASES[name]
    tensors = tuple(t.detach() for t in tensors)
    v = torch.randn(6, dtype=torch.float64)
    found = torch.func.jacrev(lambda t: make(*t).solve(v, damping=0.1, **TIGHT))(tensors)
    eye = torch.eye(6, dtype=torch.float64)
    wanted = torch.func.jacrev(lambda t: torch.linalg.solve(make(*t)._apply(eye) + 0.1 * eye, v))(
        tensors
    )
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_a_solve_keeps_no_gradient_of_a_detached_operator():
    F = DenseLinearOperator(_spd(6))
    assert F.detach().solve(torch.ones(6, dtype=torch.float64)).requires_grad is False
    assert F.solve(torch.ones(6, dtype=torch.float64)).requires_grad
