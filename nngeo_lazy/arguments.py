"""Checks of arguments: each says what was expected, what came, and what to do."""

from __future__ import annotations

import numbers
from collections.abc import Iterable
from typing import Any

from torch import nn

from .errors import DataError

__all__ = ["require_callable", "require_model", "require_seed", "require_sequence"]


def require_model(model: Any) -> None:
    """Raise DataError unless it is a network, the first argument of a builder."""
    if not isinstance(model, nn.Module):
        raise DataError(
            f"expected the model, a torch.nn.Module, got {type(model).__name__}: the order is "
            "(model, loader)"
        )


def require_seed(seed: Any) -> None:
    """Raise DataError unless it is an integer or None."""
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, numbers.Integral)):
        raise DataError(f"expected seed to be an integer or None, got {seed!r}: pass seed=0")


def require_callable(name: str, function: Any) -> None:
    """Raise DataError unless it is a function or None."""
    if function is not None and not callable(function):
        raise DataError(
            f"expected {name} to be a function or None, got {type(function).__name__}: pass "
            f"{name}=lambda ...: ..."
        )


def require_sequence(name: str, values: Any) -> None:
    """Raise DataError unless it is a list or another collection of things."""
    if not isinstance(values, Iterable) or hasattr(values, "shape"):
        raise DataError(
            f"expected a list of {name}, got {type(values).__name__}: put it into a list"
        )
