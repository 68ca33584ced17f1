"""Pictures of matrices, spectra, predictions and influences; needs matplotlib (the extra `plot`).

Each function draws on an Axes, its own or a given one, and returns it.
"""

from __future__ import annotations

from .matrices import block_norms, compare, compared, correlation, density, factor_spectra
from .results import bands, convergence, influence, reliability, spectra

__all__ = [
    "bands",
    "block_norms",
    "compare",
    "compared",
    "convergence",
    "correlation",
    "density",
    "factor_spectra",
    "influence",
    "reliability",
    "spectra",
]
