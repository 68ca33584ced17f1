"""The representation axis: how a matrix is stored, and how it is built from forms.

An options object builds a matrix, and says which matrices it can. `Implicit` differentiates the
network in every product. All others are `Streamed`, and have a recipe. It asks for statistics
(plain sums over the data), once for each pass that it needs. At the end it makes blocks from them.
Statistics know forms, operators know algebra, and neither knows a layer. Recipes run side by side,
so that a mixture costs no more passes than its parts.
"""

from .dense import Dense
from .form_stack import Factored
from .implicit import Implicit
from .mixed import NAMES, Mixed, RepresentationLike, resolve
from .recipes import Block, Recipe
from .representation import Blockwise, Representation, Streamed
from .sharded import Sharded
from .single import EKFAC, KFAC, BlockDiagonal, Diagonal, LowRank, QuasiDiagonal
from .stored import Stored

__all__ = [
    "EKFAC",
    "KFAC",
    "NAMES",
    "Block",
    "BlockDiagonal",
    "Blockwise",
    "Dense",
    "Diagonal",
    "Factored",
    "Implicit",
    "LowRank",
    "Mixed",
    "QuasiDiagonal",
    "Recipe",
    "Representation",
    "RepresentationLike",
    "Sharded",
    "Stored",
    "Streamed",
    "resolve",
]
