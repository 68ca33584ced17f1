"""Iterative methods on closures and tensors; they know no operator class and no network.

| module | has |
|---|---|
| `cg`, `minres`, `lsmr`, `neumann` | solutions of linear systems |
| `eigsh`, `svds`, `subspace` | the ends of a spectrum, by Lanczos; the options of the search |
| `lanczos` | Krylov spaces side by side, and their quadrature |
| `functions`, `density` | f(A) v, and the density of a spectrum |
| `estimates`, `probes` | traces and diagonals from random vectors, with their errors; the options |
| `results` | results that are tuples with attributes beside |
| `nystrom` | low rank from one product |
"""

from .cg import cg
from .density import SpectralDensity, spectral_density
from .eigsh import Eigenpairs, eigsh
from .estimates import hutchinson, hutchpp, quadrature_trace, signs, xdiag, xtrace
from .functions import matrix_function
from .krylov import IndefinitePreconditionerError, KrylovResult, default_tolerance
from .lanczos import Lanczos, evaluated
from .lsmr import lsmr
from .minres import minres
from .neumann import neumann
from .nystrom import nystrom, nystrom_from
from .probes import Probes
from .results import Estimate, Result
from .subspace import Search, require_symmetric_products
from .svds import Triplets, svds

__all__ = [
    "Eigenpairs",
    "Estimate",
    "IndefinitePreconditionerError",
    "KrylovResult",
    "Lanczos",
    "Probes",
    "Result",
    "Search",
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
    "neumann",
    "nystrom",
    "nystrom_from",
    "quadrature_trace",
    "require_symmetric_products",
    "signs",
    "spectral_density",
    "svds",
    "xdiag",
    "xtrace",
]
