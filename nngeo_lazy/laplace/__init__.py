"""The Laplace approximation: a Gaussian over the parameters, and what it predicts."""

from __future__ import annotations

from .posterior import Laplace
from .process import FunctionalLaplace

__all__ = ["FunctionalLaplace", "Laplace"]
