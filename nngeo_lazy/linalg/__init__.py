"""Iterative methods on closures and tensors; they know no operator class and no network."""

from .cg import cg
from .krylov import KrylovResult, default_tolerance
from .lsmr import lsmr
from .minres import minres
from .nystrom import nystrom

__all__ = ["KrylovResult", "cg", "default_tolerance", "lsmr", "minres", "nystrom"]
