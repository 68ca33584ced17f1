"""Matrix-free operators: products by differentiating the network, batch by batch."""

from .engines import MODES
from .factored import (
    FactoredGaussNewtonLinearOperator,
    FactoredInfo,
    FactoredJacobianLinearOperator,
)
from .kernel import KINDS, KernelInfo, KernelLinearOperator, kernel_of, rows_of_an_example
from .operators import (
    GaussNewtonLinearOperator,
    HessianLinearOperator,
    ImplicitLinearOperator,
    JacobianLinearOperator,
    TransposedLinearOperator,
)
from .source import Batch, ImplicitInfo, Metric, Source

__all__ = [
    "KINDS",
    "MODES",
    "Batch",
    "FactoredGaussNewtonLinearOperator",
    "FactoredInfo",
    "FactoredJacobianLinearOperator",
    "GaussNewtonLinearOperator",
    "HessianLinearOperator",
    "ImplicitInfo",
    "ImplicitLinearOperator",
    "JacobianLinearOperator",
    "KernelInfo",
    "KernelLinearOperator",
    "Metric",
    "Source",
    "TransposedLinearOperator",
    "kernel_of",
    "rows_of_an_example",
]
