"""Lazy linear operators for the geometry of neural networks.

Fisher information matrices, Gauss-Newton matrices, Hessians and Jacobians of any PyTorch network as
`linear_operator.LinearOperator`s, regardless of their approximation: swap "diagonal" for "kfac" or
"implicit" and the code stays the same.
"""

from . import errors, likelihoods, representations
from .builders import FIM, GGN, Hessian, Jacobian, plan, update_diag
from .jacobian.registry import register_layer
from .jacobian.uses import Grid, Use
from .operators import (
    Solution,
    aslinearoperator,
    identity,
    load,
    merge,
    nystrom,
    save,
    solve,
)
from .space import ParamSpace

__all__ = [
    "FIM",
    "GGN",
    "Grid",
    "Hessian",
    "Jacobian",
    "ParamSpace",
    "Solution",
    "Use",
    "aslinearoperator",
    "errors",
    "identity",
    "likelihoods",
    "load",
    "merge",
    "nystrom",
    "plan",
    "register_layer",
    "representations",
    "save",
    "solve",
    "update_diag",
]
__version__ = "0.3.0"
