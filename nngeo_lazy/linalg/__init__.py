"""Iterative methods on closures and tensors; they know no operator class and no network.

| module | has |
|---|---|
| `cg`, `minres`, `lsmr` | solutions of linear systems |
| `eigsh`, `svds` | eigenvalues and singular values at an end of the spectrum, by Lanczos |
| `lanczos` | Krylov spaces side by side, and their quadrature |
| `functions`, `density` | f(A) v, and the density of a spectrum |
| `estimates` | traces and diagonals from random vectors, with their errors |
| `nystrom` | low rank from one product |
"""

from .cg import cg
from .density import SpectralDensity, spectral_density
from .eigsh import Eigenpairs, eigsh
from .estimates import Estimate, hutchinson, hutchpp, quadrature_trace, signs, xdiag, xtrace
from .functions import matrix_function
from .krylov import KrylovResult, default_tolerance
from .lanczos import Lanczos, evaluated
from .lsmr import lsmr
from .minres import minres
from .nystrom import nystrom
from .svds import Triplets, svds

__all__ = [
    "Eigenpairs",
    "Estimate",
    "KrylovResult",
    "Lanczos",
    "SpectralDensity",
    "Triplets",
    "cg",
    "default_tolerance",
    "eigsh",
    "evaluated",
    "hutchinson",
    "hutchpp",
    "lsmr",
    "matrix_function",
    "minres",
    "nystrom",
    "quadrature_trace",
    "signs",
    "spectral_density",
    "svds",
    "xdiag",
    "xtrace",
]
