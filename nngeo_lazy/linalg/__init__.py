"""Iterative methods on closures and tensors; they know no operator class and no network."""

from .cg import CGResult, cg

__all__ = ["CGResult", "cg"]
