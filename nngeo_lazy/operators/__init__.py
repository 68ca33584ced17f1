"""The representation axis: matrices over parameters as lazy linear operators.

| class | is | stores |
|---|---|---|
| `DenseLinearOperator` | a symmetric matrix | P^2 |
| `DiagonalLinearOperator` | a diagonal | P |
| `KroneckerLinearOperator` | left kron right + s I, for each group | o^2 + i^2 |
| `EigenKroneckerLinearOperator` | free eigenvalues in a Kronecker basis | o^2 + i^2 + o i |
| `BlockDiagonalLinearOperator` | named blocks of any kind | the sum |
| `SumLinearOperator`, ... | what has no structure of its own | its terms |

All are `BaseLinearOperator`s and share one interface, and all are subclasses of
`linear_operator.operators.LinearOperator`.
"""

from .algebra import ours
from .base import BaseLinearOperator
from .block_diagonal import BlockDiagonalLinearOperator
from .dense import DenseLinearOperator
from .diagonal import DiagonalLinearOperator
from .eigen_kronecker import EigenKroneckerLinearOperator
from .info import BlockInfo, Info, Origin
from .kronecker import KroneckerLinearOperator
from .lazy import LazyLinearOperator, ProductLinearOperator, ScaledLinearOperator, SumLinearOperator
from .report import Report, Row
from .scipy import ScipyOperator
from .views import (
    BroadcastLinearOperator,
    ForeignLinearOperator,
    InverseLinearOperator,
    RestrictedLinearOperator,
)

__all__ = [
    "BaseLinearOperator",
    "BlockDiagonalLinearOperator",
    "BlockInfo",
    "BroadcastLinearOperator",
    "DenseLinearOperator",
    "DiagonalLinearOperator",
    "EigenKroneckerLinearOperator",
    "ForeignLinearOperator",
    "Info",
    "InverseLinearOperator",
    "KroneckerLinearOperator",
    "LazyLinearOperator",
    "Origin",
    "ProductLinearOperator",
    "Report",
    "RestrictedLinearOperator",
    "Row",
    "ScaledLinearOperator",
    "ScipyOperator",
    "SumLinearOperator",
    "ours",
]
