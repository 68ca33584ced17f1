"""Batches: what is made of them solves as accurately as one matrix does."""

import pytest
import torch
from linear_operator.operators import (
    AddedDiagLinearOperator,
    DenseLinearOperator,
    DiagLinearOperator,
    MulLinearOperator,
    RootLinearOperator,
    ToeplitzLinearOperator,
    ZeroLinearOperator,
)

import nngeo_lazy as ng
from nngeo_lazy.errors import DataError, SpaceMismatchError
from nngeo_lazy.operators import BaseLinearOperator

from . import examples

SIZE = 18  # of the examples


def rand(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def spd(*lead, n=SIZE):
    root = rand(*lead, n, 2 * n)
    return root @ root.mT / n


def close(got, want, rtol=1e-8):
    assert got.shape == want.shape
    torch.testing.assert_close(got, want, rtol=rtol, atol=rtol * float(want.abs().sum()))


def check(made, matrix):
    """One of our operators, with products and solves of a batch of matrices."""
    assert isinstance(made, BaseLinearOperator)
    v = rand(matrix.shape[-1], 2)
    close(made.to_dense(), matrix)
    close(made @ v, matrix @ v)
    close(made.solve(v), torch.linalg.solve(matrix, v))
    close(made.logdet(), torch.logdet(matrix))
    close(made.inv_quad_logdet(v.expand(*matrix.shape[:-2], *v.shape), True)[1], matrix.logdet())


@pytest.mark.parametrize("make", [examples.blocks, examples.dense, examples.diagonal])
def test_sums_products_and_multiples_of_batches_are_ours(make):
    F, d, K = make().damped(0.5), torch.rand(3, SIZE).double() + 0.1, spd(3)
    A, c = F.to_dense(), torch.tensor([1.0, 2.0, 3.0]).double()[:, None, None]
    E = F.expand(3, SIZE, SIZE)
    check(E + DiagLinearOperator(d), A + d.diag_embed())
    check(F + DiagLinearOperator(d), A + d.diag_embed())
    check(F.add_diagonal(d), A + d.diag_embed())
    check(E.add_diagonal(c[:, 0]), A + c * torch.eye(SIZE))
    check(F + K, A + K)
    check(E - 0.1 * E, 0.9 * A.expand(3, SIZE, SIZE))
    check(F * c, A * c)
    check(F * K, A * K)
    check(E * F, (A * A).expand(3, SIZE, SIZE))
    close((E @ ng.aslinearoperator(K)).to_dense(), A @ K)
    close((E @ F).solve(A @ K), torch.linalg.solve(A, K))
    with pytest.raises(SpaceMismatchError, match=r"expected batches that fit, got \(3, .*\(2, "):
        E + spd(2)


def test_batches_are_reduced_repeated_and_permuted():
    K = spd(2, 3)
    A = ng.aslinearoperator(K)
    check(A[0].sum(0), K[0].sum(0))
    check(A.sum(1), K.sum(1))
    check(A[1].prod(0), K[1].prod(0))
    check(A[0].repeat(2, 1, 1), K[0].repeat(2, 1, 1))
    check(A[0].repeat(2, 1, 1, 1), K[0].repeat(2, 1, 1, 1))
    check(A[0, 0].repeat(2, 1, 1), K[0, 0].repeat(2, 1, 1))
    check(A.permute(1, 0, 2, 3), K.permute(1, 0, 2, 3))
    F = examples.blocks().damped(0.5)
    check(F.expand(4, SIZE, SIZE).sum(0), 4 * F.to_dense())
    check(F.expand(3, SIZE, SIZE).block("fc"), F.block("fc").to_dense().expand(3, 8, 8))
    stack = F.add_diagonal(torch.ones(2, 1).double())
    check(stack.block("fc")[1], F.block("fc").to_dense() + torch.eye(8))
    with pytest.raises(ValueError, match="a batch of at least one matrix"):
        ng.aslinearoperator(K[:0, 0])


def test_operators_of_linear_operator_in_batches():
    K, d = spd(3), torch.rand(3, SIZE).double() + 0.1
    theirs = AddedDiagLinearOperator(DenseLinearOperator(K), DiagLinearOperator(d))
    A, want = ng.aslinearoperator(theirs), K + d.diag_embed()
    check(A, want)
    check(A[1:], want[1:])
    close(A[1, 2:5, 2:5].to_dense(), want[1, 2:5, 2:5])
    column = torch.exp(-torch.linspace(0, 3, SIZE)).double()
    T = ToeplitzLinearOperator(torch.stack([column, 2 * column]))
    check(ng.aslinearoperator(T), T.to_dense())


def test_large_batches_are_solved_to_their_digits():
    """Beyond 800 rows linear_operator solves to a tolerance of 1."""
    n = 850
    root = rand(n, 20)
    low = root @ root.mT / n
    F = ng.aslinearoperator(RootLinearOperator(root / n**0.5)).damped(1e-3)
    matrix, d = low + 1e-3 * torch.eye(n), torch.rand(2, n).double() * 1e-3
    v = rand(n, 1)
    want = torch.linalg.solve(matrix + d.diag_embed(), v)
    close((F.expand(2, n, n) + DiagLinearOperator(d)).solve(v), want, 1e-6)
    T = torch.exp(-torch.linspace(0, 10, n)).double()
    G = ng.aslinearoperator(ToeplitzLinearOperator(T))
    product = G.to_dense() * matrix
    close((G * F) @ v, product @ v)
    close((G * F).solve(v), torch.linalg.solve(product, v), 1e-6)


def test_elementwise_products_of_any_sign():
    A, B = spd() - torch.eye(SIZE), spd()
    lazy = ng.aslinearoperator(A) + ng.aslinearoperator(ToeplitzLinearOperator(B[0]))
    want = lazy.to_dense() * B
    close((lazy * ng.aslinearoperator(B)).to_dense(), want)
    close((lazy * B[:1]).to_dense(), lazy.to_dense() * B[:1])
    d = examples.diagonal()
    close((d * ng.aslinearoperator(B)).to_dense(), d.to_dense() * B)
    assert type(d * ng.aslinearoperator(B)) is type(d)
    theirs = MulLinearOperator(DenseLinearOperator(B), RootLinearOperator(A))
    close(ng.aslinearoperator(theirs).to_dense(), B * (A @ A.mT))


def test_zero_of_linear_operator():
    F, zero = examples.blocks(), ZeroLinearOperator(SIZE, SIZE, dtype=torch.float64)
    nothing = torch.zeros(SIZE, SIZE).double()
    assert F + zero is F
    for made in (F @ zero, F * zero, ng.aslinearoperator(zero)):
        close(made.to_dense(), nothing)
    v = rand(SIZE)
    close(ng.aslinearoperator(zero).damped(0.5).solve(v), 2 * v)
    wide = ng.aslinearoperator(ZeroLinearOperator(SIZE, 3, dtype=torch.float64))
    close((F @ wide).to_dense(), nothing[:, :3])
    with pytest.raises(SpaceMismatchError, match="two matrices of one shape"):
        F + ZeroLinearOperator(3, 3, dtype=torch.float64)


EMPTY = [examples.blocks, examples.dense, examples.eigen, examples.low_rank, examples.diagonal]


@pytest.mark.parametrize("make", EMPTY)
def test_no_rows_and_no_columns(make):
    F = make().damped(0.5)
    n = F.shape[0]
    A, v = F.to_dense(), rand(n, 2)
    for made, want in [
        (F[0:0], A[0:0]),
        (F[[]][:, []], A[[]][:, []]),
        (F[:, torch.tensor([], dtype=torch.long)], A[:, :0]),
    ]:
        close(made.to_dense(), want)
        close(made @ rand(want.shape[1], 2), rand(want.shape[0], 2) * 0)
    none = v[:, :0]
    assert (F @ none).shape == F.solve(none).shape == F.inverse().matmul(none).shape == (n, 0)
    assert F.vTMv(none).shape == F.inv_quad(none, reduce_inv_quad=False).shape == (0,)
    J = ng.aslinearoperator(rand(4, n))
    assert (J @ none).shape == (4, 0)


def test_a_device_that_is_not_there_is_a_named_error():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    F = examples.blocks()
    for move in (F.cuda, lambda: F.to("cuda")):
        with pytest.raises(DataError, match=r"expected a dtype or a device.*F\.to\('cpu'\)"):
            move()
    close(F.to("cpu").to_dense(), F.to_dense())
