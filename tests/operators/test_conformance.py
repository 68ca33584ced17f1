"""linear_operator's own test cases, on every class."""

import unittest

import pytest
import torch
from linear_operator.test.linear_operator_test_case import (
    LinearOperatorTestCase,
    RectangularLinearOperatorTestCase,
)

from nngeo_lazy.errors import UnsupportedLayerError

from . import examples


class _Closed(LinearOperatorTestCase):
    seed = 0
    should_test_sample = True
    should_call_cg = False
    should_call_lanczos = False
    should_call_lanczos_diagonalization = False
    make = None

    def create_linear_op(self):
        return type(self).make(torch.float32).clone().requires_grad_(True)

    def evaluate_linear_op(self, op):
        return examples.matrix(op)


class TestDense(_Closed, unittest.TestCase):
    make = staticmethod(examples.dense)


class TestDiagonal(_Closed, unittest.TestCase):
    make = staticmethod(examples.diagonal)


class TestKronecker(_Closed, unittest.TestCase):
    make = staticmethod(examples.kronecker)


class TestEigenKronecker(_Closed, unittest.TestCase):
    make = staticmethod(examples.eigen)


class TestBlockDiagonal(_Closed, unittest.TestCase):
    make = staticmethod(examples.blocks)


def _unsupported(name):
    """linear_operator's test of what has no closed form must end in an error that says so."""

    def test(self, **options):
        with pytest.raises(UnsupportedLayerError, match="no closed form"):
            getattr(super(_Lazy, self), name)(**options)

    test.__name__ = name
    return test


class _Lazy(_Closed):
    should_test_sample = False


for _name in (
    "test_eigh",
    "test_eigvalsh",
    "test_svd",
    "test_inv_quad_logdet",
    "test_inv_quad_logdet_no_reduce",
    "test_inv_quad_logdet_no_reduce_cholesky",
    "test_logdet",
    "test_root_decomposition",
    "test_root_decomposition_cholesky",
    "test_root_inv_decomposition",
    "test_sqrt_inv_matmul",
    "test_sqrt_inv_matmul_no_lhs",
    "test_add_low_rank",
):
    setattr(_Lazy, _name, _unsupported(_name))


class _LazyWithoutRoots(_Lazy):
    # these catch every exception inside, and fail later on a name that is not bound
    test_cat_rows = None
    test_diagonalization = None
    test_diagonalization_symeig = None


class TestQuasiDiagonal(_LazyWithoutRoots, unittest.TestCase):
    """It has a determinant in closed form, and no eigenvalues."""

    make = staticmethod(examples.quasi_diagonal)
    should_test_sample = True


for _name in (
    "test_inv_quad_logdet",
    "test_inv_quad_logdet_no_reduce",
    "test_inv_quad_logdet_no_reduce_cholesky",
    "test_logdet",
):
    setattr(TestQuasiDiagonal, _name, getattr(LinearOperatorTestCase, _name))
TestQuasiDiagonal.test_root_decomposition_cholesky = None  # of its damped self, which has one


class TestLowRank(_Closed, unittest.TestCase):
    make = staticmethod(examples.low_rank)
    # their reference differentiates eigenvectors of repeated eigenvalues: NaN (see test_autograd)
    test_sqrt_inv_matmul = None
    test_sqrt_inv_matmul_no_lhs = None


class TestEigenLowRank(_Closed, unittest.TestCase):
    make = staticmethod(examples.eigen_low_rank)
    test_add_low_rank = None  # the sum with a foreign root has no powers
    test_sqrt_inv_matmul = None  # as above
    test_sqrt_inv_matmul_no_lhs = None


class TestSum(_LazyWithoutRoots, unittest.TestCase):
    make = staticmethod(examples.lazy_sum)


class TestScaled(_LazyWithoutRoots, unittest.TestCase):
    make = staticmethod(examples.scaled)


class TestRestricted(_LazyWithoutRoots, unittest.TestCase):
    make = staticmethod(examples.restricted)


class TestInverse(_LazyWithoutRoots, unittest.TestCase):
    make = staticmethod(examples.inverse)


class TestMatrix(RectangularLinearOperatorTestCase, unittest.TestCase):
    seed = 0

    def create_linear_op(self):
        return examples.jacobian(torch.float32).clone().requires_grad_(True)

    def evaluate_linear_op(self, op):
        return examples.matrix(op)


class TestProduct(RectangularLinearOperatorTestCase, unittest.TestCase):
    seed = 0

    def create_linear_op(self):
        return examples.product(torch.float32).clone().requires_grad_(True)

    def evaluate_linear_op(self, op):
        return examples.matrix(op)
