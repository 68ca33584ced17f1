"""The representation axis: how a matrix is stored, and how it is built from forms.

An options object is a recipe: it asks for statistics (plain sums over the data), once for each pass
that it needs, and makes blocks from them at the end. Statistics know forms, operators know algebra,
and neither knows a layer. Recipes run side by side, so that a mixture costs no more passes than its
parts.
"""

from .base import Representation
from .factored import Factored
from .implicit import Implicit
from .mixed import Mixed, resolve
from .single import EKFAC, KFAC, BlockDiagonal, Dense, Diagonal, LowRank, QuasiDiagonal

__all__ = [
    "EKFAC",
    "KFAC",
    "BlockDiagonal",
    "Dense",
    "Diagonal",
    "Factored",
    "Implicit",
    "LowRank",
    "Mixed",
    "QuasiDiagonal",
    "Representation",
    "resolve",
]
