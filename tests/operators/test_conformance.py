"""linear_operator's own test cases, on every class."""

import unittest

import pytest
import torch
from linear_operator.test.linear_operator_test_case import (
    LinearOperatorTestCase,
    RectangularLinearOperatorTestCase,
)
from torch import nn

import nngeo_lazy as ng
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


def network_function(w, x):
    """tanh(W x + b) of a (2, 3) weight and its bias as one vector: (N, 2)."""
    return torch.tanh(x.to(w) @ w[:6].view(2, 3).mT + w[6:])


class _Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x):
        return torch.tanh(self.fc(x))


def inputs():
    return torch.randn(30, 3, generator=torch.Generator().manual_seed(0))


def implicit(builder, **options):
    """A matrix-free operator whose parameters want a gradient; well conditioned."""
    model = _Network()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.linspace(-0.3, 0.4, p.numel()).view(p.shape))
    return builder(model, inputs(), **options).requires_grad_(True)


def dense_jacobian(w):
    function = torch.autograd.functional.jacobian
    return function(lambda w: network_function(w, inputs()).flatten(), w, create_graph=True)


class TestGaussNewton(_LazyWithoutRoots, unittest.TestCase):
    def create_linear_op(self):
        return implicit(ng.FIM, representation="implicit", likelihood="gaussian")

    def evaluate_linear_op(self, op):
        J = dense_jacobian(op.parameters)
        return J.mT @ J / 30


class TestHessian(_LazyWithoutRoots, unittest.TestCase):
    """Of sum log cosh W x, by its outputs' sum: positive definite."""

    def create_linear_op(self):
        return implicit(ng.Hessian, loss="output", forward=_log_cosh)

    def evaluate_linear_op(self, op):
        def loss(w):
            return log_cosh(inputs().to(w) @ w[:6].view(2, 3).mT + w[6:]).sum() / 30

        return torch.autograd.functional.hessian(loss, op.parameters, create_graph=True)


def log_cosh(z):
    return z.cosh().log()


def _log_cosh(model, x):
    return log_cosh(model.fc(x))


class TestJacobian(RectangularLinearOperatorTestCase, unittest.TestCase):
    seed = 0

    def create_linear_op(self):
        return implicit(ng.Jacobian)

    def evaluate_linear_op(self, op):
        return dense_jacobian(op.parameters)


class TestFactoredJacobian(RectangularLinearOperatorTestCase, unittest.TestCase):
    seed = 0

    def create_linear_op(self):
        return implicit(ng.Jacobian, representation="factored")

    def evaluate_linear_op(self, op):
        return op @ torch.eye(op.shape[-1], dtype=op.dtype)


class TestFactored(_LazyWithoutRoots, unittest.TestCase):
    def create_linear_op(self):
        return implicit(ng.FIM, representation="factored", likelihood="gaussian")

    def evaluate_linear_op(self, op):
        J = op.root @ torch.eye(op.shape[-1], dtype=op.dtype)
        return J.mT @ J


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


def wide_network():
    """More parameters than rows of its kernel, so that the kernel is positive definite."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 40), nn.Tanh(), nn.Linear(40, 2))
    return net, torch.randn(5, 8), torch.randn(4, 8)


def _dense_kernel(op):
    left = op.left @ torch.eye(op.left.shape[-1], dtype=op.dtype)
    right = op.right @ torch.eye(op.right.shape[-1], dtype=op.dtype)
    return left @ right.mT


class TestKernel(_Closed, unittest.TestCase):
    def create_linear_op(self):
        net, x, _ = wide_network()
        return ng.NTK(net, x).clone().requires_grad_(True)

    def evaluate_linear_op(self, op):
        return _dense_kernel(op)


class TestCrossKernel(RectangularLinearOperatorTestCase, unittest.TestCase):
    seed = 0

    def create_linear_op(self):
        net, x, x2 = wide_network()
        return ng.NTK(net, x, x2).clone().requires_grad_(True)

    def evaluate_linear_op(self, op):
        return _dense_kernel(op)


class TestStack(_Closed, unittest.TestCase):
    def create_linear_op(self):
        net, x, _ = wide_network()
        return ng.NTK(net, x, outputs="per_output").clone().requires_grad_(True)

    def evaluate_linear_op(self, op):
        return torch.stack([_dense_kernel(member) for member in op.members])
