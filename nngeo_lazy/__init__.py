"""Lazy linear operators for the geometry of neural networks.

It gives Fisher matrices, Gauss-Newton matrices, Hessians and Jacobians of any PyTorch network as
`linear_operator.LinearOperator`s. Whatever approximates them, the interface is the same: swap
"diagonal" for "kfac" or "implicit", and the code stays as it is.
"""

from . import errors, likelihoods, optim, representations
from .builders import FIM, GGN, Hessian, Jacobian, plan
from .comparison import compare
from .distributed import Distributed
from .ewc import ewc_penalty
from .files import load, save
from .functional import as_module
from .influence import Queries, influences, self_influence
from .jacobian.registry import register_layer
from .jacobian.uses import Grid, Use
from .kernels import NTK
from .laplace import FunctionalLaplace, Laplace
from .linalg import Estimate, Probes, SpectralDensity
from .numerics.approximate import low_rank, nystrom
from .numerics.estimation import diagonal, effective_dimension, logdet, trace
from .numerics.function_space import Eigenfunctions, alignment, eigenfunctions, sample_space
from .numerics.functions import matrix_function
from .numerics.inverses import inverse
from .numerics.least_squares import lstsq
from .numerics.results import SingularValues, Solution, Spectrum
from .numerics.solve import solve
from .numerics.spectra import eigsh, spectral_density, svds
from .operators import aslinearoperator, identity
from .pooling import merge
from .pruning import Pruned, prune, saliency
from .refresh import update_diag
from .space import ParamSpace

__all__ = [
    "FIM",
    "GGN",
    "NTK",
    "Distributed",
    "Eigenfunctions",
    "Estimate",
    "FunctionalLaplace",
    "Grid",
    "Hessian",
    "Jacobian",
    "Laplace",
    "ParamSpace",
    "Probes",
    "Pruned",
    "Queries",
    "SingularValues",
    "Solution",
    "SpectralDensity",
    "Spectrum",
    "Use",
    "alignment",
    "as_module",
    "aslinearoperator",
    "compare",
    "diagonal",
    "effective_dimension",
    "eigenfunctions",
    "eigsh",
    "errors",
    "ewc_penalty",
    "identity",
    "influences",
    "inverse",
    "likelihoods",
    "load",
    "logdet",
    "low_rank",
    "lstsq",
    "matrix_function",
    "merge",
    "nystrom",
    "optim",
    "plan",
    "prune",
    "register_layer",
    "representations",
    "saliency",
    "sample_space",
    "save",
    "self_influence",
    "solve",
    "spectral_density",
    "svds",
    "trace",
    "update_diag",
]
__version__ = "1.0.0"
