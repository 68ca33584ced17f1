"""Matrix-free operators: products by differentiating the network, batch by batch."""

from .engines import MODES
from .factored import (
    FactoredGaussNewtonLinearOperator,
    FactoredInfo,
    FactoredJacobianLinearOperator,
)
from .operators import (
    GaussNewtonLinearOperator,
    HessianLinearOperator,
    ImplicitLinearOperator,
    JacobianLinearOperator,
    TransposedLinearOperator,
)
from .source import Batch, ImplicitInfo, Metric, Source

__all__ = [
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
    "Metric",
    "Source",
    "TransposedLinearOperator",
]
