"""What is not symmetric is never solved as if it were."""

import pytest
import torch
from linear_operator.operators import DenseLinearOperator as TheirDense
from linear_operator.operators import (
    DiagLinearOperator,
    ToeplitzLinearOperator,
    TriangularLinearOperator,
)

import nngeo_lazy as ng
from nngeo_lazy.errors import UnsupportedLayerError
from nngeo_lazy.operators import DenseLinearOperator

from . import examples

MAKE = [examples.blocks, examples.dense, examples.diagonal, examples.eigen, examples.low_rank]


def rand(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def close(got, want, rtol=1e-8):
    assert got.shape == want.shape
    torch.testing.assert_close(got, want, rtol=rtol, atol=rtol * float(want.abs().sum()))


def shape_of(F):
    return F.shape[-1], rand(F.shape[-1], 2)


@pytest.mark.parametrize("make", MAKE)
@pytest.mark.parametrize("wrap", [lambda T: T, TheirDense, lambda T: TriangularLinearOperator(T)])
def test_a_matrix_that_is_added(make, wrap):
    F = make().damped(0.5)
    n, v = shape_of(F)
    T = torch.tril(rand(n, n))
    made, matrix = F + wrap(T), F.to_dense() + T
    close(made @ v, matrix @ v)
    close(made.mT @ v, matrix.mT @ v)
    for wrong in (lambda: made.solve(v), lambda: made.inverse() @ v):
        with pytest.raises(UnsupportedLayerError, match=r"needs a symmetric .*method='lsmr'"):
            wrong()
    close(ng.solve(made, v, method="lsmr").x, torch.linalg.solve(matrix, v), 1e-6)
    close((made.mT @ made).solve(made.mT @ v), torch.linalg.solve(matrix, v), 1e-5)
    with pytest.raises(UnsupportedLayerError, match="symmetric"):
        made.cholesky()


SYMMETRIC = {
    "eigsh": lambda A: ng.eigsh(A, 1),
    "logdet": ng.logdet,
    "effective_dimension": lambda A: ng.effective_dimension(A, 0.1),
    "spectral_density": ng.spectral_density,
    "matrix_function": lambda A: ng.matrix_function(A, torch.exp, rand(A.shape[-1])),
    "nystrom": lambda A: ng.nystrom(A, 2),
    "low_rank": lambda A: ng.low_rank(A, 2),
    "alignment": lambda A: ng.alignment(A, torch.ones(A.shape[-1]).double()),
}


@pytest.mark.parametrize("name", SYMMETRIC)
@pytest.mark.parametrize("wrap", [ng.aslinearoperator, TriangularLinearOperator, lambda T: T])
def test_functions_of_symmetric_matrices(name, wrap):
    A = wrap(torch.tril(rand(6, 6)) + 3 * torch.eye(6))
    with pytest.raises(ValueError, match=r"needs a symmetric matrix.*take svds, or A"):
        SYMMETRIC[name](A)
    assert len(ng.svds(A, 1)[1]) == 1


@pytest.mark.parametrize("make", MAKE)
def test_eigenvectors_are_inverted_by_their_transpose(make):
    F = make().damped(0.5)
    n, v = shape_of(F)
    values, Q = torch.linalg.eigh(F)
    U, S, Vh = torch.linalg.svd(F)
    for basis in (Q, U, Vh):
        matrix = basis.to_dense()
        close(matrix @ matrix.mT, torch.eye(n).double())
        close(basis.solve(v), matrix.mT @ v)
        close(basis.inverse().to_dense(), matrix.mT)
        close(ng.solve(basis, v).x, matrix.mT @ v)
        for ord in ("fro", 2, -2, "nuc"):
            close(basis.norm(ord), torch.linalg.matrix_norm(matrix, ord))
        close(basis[1:3].to_dense(), matrix[1:3])
        if make is not examples.diagonal:
            with pytest.raises(UnsupportedLayerError, match="eigenvalues"):
                torch.linalg.eigvalsh(basis)
    close(Q @ DiagLinearOperator(values) @ Q.mT @ v, F @ v)
    close((U @ torch.diag(S)) @ Vh.to_dense(), F.to_dense())
    values, Q = torch.linalg.eigh(F.expand(2, n, n))
    close(Q[1].solve(v), Q.to_dense()[1].mT @ v)


def test_the_remedies_of_what_has_no_closed_form():
    """`ng.aslinearoperator(F.to_dense())` looks whether the matrix is symmetric."""
    F, G = examples.blocks().damped(0.5), examples.dense().damped(0.5)
    product = F.inverse() @ G
    with pytest.raises(UnsupportedLayerError, match=r"ng\.aslinearoperator\(F\.to_dense\(\)\)"):
        product.pinv()
    held = ng.aslinearoperator(product.to_dense())
    with pytest.raises(
        UnsupportedLayerError, match=r"torch\.linalg on F\.to_dense\(\), or F\.mT @ F"
    ):
        held.pinv()
    close((F @ F).inverse().to_dense(), torch.linalg.inv(F.to_dense() @ F.to_dense()), 1e-6)
    close(
        ng.aslinearoperator((F @ F).to_dense()).pinv().to_dense() @ (F @ F).to_dense(),
        torch.eye(18).double(),
    )
    wrong = DenseLinearOperator(product.to_dense())
    for use in (wrong.logdet, wrong.pinv, lambda: wrong.solve(rand(18)), wrong.damped(0.1).logdet):
        with pytest.raises(UnsupportedLayerError, match=r"to hold a symmetric.*aslinearoperator"):
            use()


def test_a_product_of_indefinite_factors_has_an_inverse():
    column = torch.tensor([-0.7, *[0.5**k for k in range(17)]]).double()
    root = ng.aslinearoperator(ToeplitzLinearOperator(column))
    square, v = root @ root, rand(18)
    close(square.inverse() @ v, torch.linalg.solve(square.to_dense(), v), 1e-6)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_is_named_and_not_taken_for_asymmetry(bad):
    matrix = torch.eye(4)
    matrix[1, 2] = matrix[2, 1] = bad
    with pytest.raises(ng.errors.NonFiniteError):
        ng.aslinearoperator(matrix).logdet()
