"""The representation axis: matrices over parameters as lazy linear operators.

| class | is | stores |
|---|---|---|
| `DenseLinearOperator` | a symmetric matrix | P^2 |
| `DiagonalLinearOperator` | a diagonal | P |
| `KroneckerLinearOperator` | left kron right + s I, for each group | o^2 + i^2 |
| `EigenKroneckerLinearOperator` | free eigenvalues in a Kronecker basis | o^2 + i^2 + o i |
| `QuasiDiagonalLinearOperator` | each output's diagonal, coupled to its bias | 2 o i + 3 o |
| `LowRankLinearOperator` | U diag(c) U^T + a diagonal | P k |
| `EigenLowRankLinearOperator` | its inverse and other functions | P k |
| `BlockDiagonalLinearOperator` | named blocks of any kind | the sum |
| `MatrixLinearOperator` | a rectangular matrix: a dense Jacobian | m n |
| `GaussNewtonLinearOperator` | a Fisher or Gauss-Newton matrix, by products | P, and graphs |
| `HessianLinearOperator` | a Hessian, by products | P, and graphs |
| `JacobianLinearOperator` | a Jacobian, by products | P, and graphs |
| `FactoredJacobianLinearOperator` | a Jacobian, by its layers' factors | N T (o + i) |
| `FactoredGaussNewtonLinearOperator` | B^T B + d I of such a B | N T (o + i) |
| `SumLinearOperator`, ... | what has no structure of its own | its terms |

All are `BaseLinearOperator`s and share one interface, and all are subclasses of
`linear_operator.operators.LinearOperator`. Functions on any of them
are the package `numerics`.
"""

from . import rules
from .base import BaseLinearOperator
from .block_diagonal import BlockDiagonalLinearOperator
from .composite import ProductLinearOperator, ScaledLinearOperator, SumLinearOperator
from .convert import FromScipyLinearOperator, aslinearoperator
from .dense import DenseLinearOperator, MatrixLinearOperator
from .diagonal import DiagonalLinearOperator, identity
from .eigen_low_rank import EigenLowRankLinearOperator
from .factored import FactoredGaussNewtonLinearOperator, FactoredJacobianLinearOperator
from .info import Info, Origin
from .kernel import KernelLinearOperator
from .kronecker import EigenKroneckerLinearOperator, KroneckerLinearOperator
from .lazy import LazyLinearOperator
from .low_rank import LowRankLinearOperator
from .matrix_free import (
    GaussNewtonLinearOperator,
    HessianLinearOperator,
    ImplicitLinearOperator,
    JacobianLinearOperator,
    TransposedLinearOperator,
)
from .quasi_diagonal import QuasiDiagonalLinearOperator
from .report import Report, Row
from .scipy import ScipyOperator
from .sharded import ShardedBlockDiagonalLinearOperator
from .stack import StackLinearOperator
from .stored import StoredLinearOperator
from .views import (
    BroadcastLinearOperator,
    ForeignLinearOperator,
    InverseLinearOperator,
    OrthogonalLinearOperator,
    RestrictedLinearOperator,
)

__all__ = [
    "BaseLinearOperator",
    "BlockDiagonalLinearOperator",
    "BroadcastLinearOperator",
    "DenseLinearOperator",
    "DiagonalLinearOperator",
    "EigenKroneckerLinearOperator",
    "EigenLowRankLinearOperator",
    "FactoredGaussNewtonLinearOperator",
    "FactoredJacobianLinearOperator",
    "ForeignLinearOperator",
    "FromScipyLinearOperator",
    "GaussNewtonLinearOperator",
    "HessianLinearOperator",
    "ImplicitLinearOperator",
    "Info",
    "InverseLinearOperator",
    "JacobianLinearOperator",
    "KernelLinearOperator",
    "KroneckerLinearOperator",
    "LazyLinearOperator",
    "LowRankLinearOperator",
    "MatrixLinearOperator",
    "Origin",
    "OrthogonalLinearOperator",
    "ProductLinearOperator",
    "QuasiDiagonalLinearOperator",
    "Report",
    "RestrictedLinearOperator",
    "Row",
    "ScaledLinearOperator",
    "ScipyOperator",
    "ShardedBlockDiagonalLinearOperator",
    "StackLinearOperator",
    "StoredLinearOperator",
    "SumLinearOperator",
    "TransposedLinearOperator",
    "aslinearoperator",
    "identity",
]

rules.complete()
