"""What an optimizer is made of, from what a user gives: groups, representations, numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..errors import DataError
from ..representations import Factored, Representation, Streamed, resolve
from ..selectors import space_of
from .options import Damping, HessianFree, LevenbergMarquardt

__all__ = ["checked_damping", "first_damping", "groups_of", "require_options", "resolved"]

METHODS = ("exact", "factored")


def resolved(
    representation: str | Representation | HessianFree,
) -> tuple[HessianFree | None, Streamed | None]:
    """Hessian-free options and a representation that is averaged, either or both."""
    if representation == "kernel":
        return None, Factored()
    if isinstance(representation, HessianFree):
        close = representation.preconditioner
        kept = None if close is None else resolve(close)
        if kept is not None and (not isinstance(kept, Streamed) or isinstance(kept, Factored)):
            raise DataError(f"expected a preconditioner that is averaged over steps, got {close!r}")
        return representation, kept
    known = resolve(representation)
    return (None, known) if isinstance(known, Streamed) else (HessianFree(), None)


def groups_of(model: nn.Module, params: Any) -> list[dict[str, Any]]:
    """Parameter groups with names, from a selector or a list of groups with selectors."""
    listed = isinstance(params, Sequence) and not isinstance(params, str)
    grouped = listed and len(params) > 0 and all(isinstance(each, Mapping) for each in params)
    made = []
    for group in params if grouped else [{"params": params}]:
        if "params" not in group:
            raise DataError(
                'expected groups {"params": selector, option: value, ...}, got one with '
                f"{sorted(group)}"
            )
        space = space_of(model, group["params"])
        made.append({**group, "params": list(space.parameters(model).items())})
    return made


def require_options(
    factor_decay: float, update_every: int, invert_every: int, warmup: int, method: str
) -> None:
    """Refuse numbers out of their range."""
    if not 0 <= factor_decay < 1:
        raise DataError(f"expected a factor_decay from 0 to below 1, got {factor_decay!r}")
    for name, value, least in (
        ("update_every", update_every, 1),
        ("invert_every", invert_every, 1),
        ("warmup", warmup, 0),
    ):
        if not isinstance(value, int) or value < least:
            raise DataError(f"expected {name} to be an integer of {least} or more, got {value!r}")
    if method not in METHODS:
        raise DataError(f"expected damping_method to be one of {list(METHODS)}, got {method!r}")


def first_damping(damping: Damping) -> float:
    """The damping of the first step."""
    if isinstance(damping, LevenbergMarquardt):
        return damping.initial
    return checked_damping(damping(0) if callable(damping) else damping)


def checked_damping(value: Any) -> float:
    """A damping, which is a nonnegative number."""
    if not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise DataError(
            "expected a damping that is a nonnegative number, a function of the step that returns "
            f"one, or LevenbergMarquardt(...), got {value!r}"
        )
    return float(value)
