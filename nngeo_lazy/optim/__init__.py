"""Natural-gradient optimizers for ordinary training loops.

The curvature is captured from the loop's own forward passes; see `NaturalGradient`.
"""

from .natural_gradient import NaturalGradient
from .options import HessianFree, LevenbergMarquardt
from .preconditioner import Preconditioner

__all__ = ["HessianFree", "LevenbergMarquardt", "NaturalGradient", "Preconditioner"]
