"""Lazy linear operators for the geometry of neural networks.

Fisher information matrices of any PyTorch network as `linear_operator.LinearOperator`s, regardless
of their approximation: swap "diagonal" for "kfac" and the code stays the same.
"""

from . import errors, likelihoods, representations
from .builders import FIM, GGN, Jacobian, plan, update_diag
from .jacobian.registry import register_layer
from .jacobian.uses import Grid, Use
from .operators import identity, load, merge, save
from .space import ParamSpace

__all__ = [
    "FIM",
    "GGN",
    "Grid",
    "Jacobian",
    "ParamSpace",
    "Use",
    "errors",
    "identity",
    "likelihoods",
    "load",
    "merge",
    "plan",
    "register_layer",
    "representations",
    "save",
    "update_diag",
]
__version__ = "0.2.0"
