"""Lazy linear operators for the geometry of neural networks.

Fisher information matrices of any PyTorch network as `linear_operator.LinearOperator`s, regardless
of their approximation: swap "diagonal" for "kfac" and the code stays the same.
"""

from . import errors, likelihoods, representations
from .builders import FIM
from .space import ParamSpace

__all__ = ["FIM", "ParamSpace", "errors", "likelihoods", "representations"]
__version__ = "0.1.0"
