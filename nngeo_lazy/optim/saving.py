"""States and copies of an optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..errors import DataError, SpaceMismatchError
from ..space import canonical_name

__all__ = ["checked_state", "common_module", "restored"]


def checked_state(
    state: Mapping[str, Any], version: int, parameters: Mapping[str, Tensor], kind: str
) -> Mapping[str, Any]:
    """The part of a state that is ours.

    Raises:
        SpaceMismatchError: it is the state of other parameters.
        DataError: it is no state of such an optimizer.
    """
    held = state.get("curvature")
    if not isinstance(held, Mapping) or held.get("version") != version:
        raise DataError(
            "expected the state_dict of an optimizer of nngeo_lazy, got one "
            + ("of another version" if isinstance(held, Mapping) else "without curvature")
            + ": load it into the optimizer that wrote it"
        )
    shapes = {canonical_name(n): list(s) for n, s in held["parameters"].items()}
    here = {canonical_name(n): list(p.shape) for n, p in parameters.items()}
    if shapes != here:
        other = [n for n in {**shapes, **here} if shapes.get(n) != here.get(n)]
        raise SpaceMismatchError(
            f"expected the state of this model's parameters, but {other[:4]} are missing, "
            "extra or of another shape: load the state of the same model and the same params="
        )
    if held["representation"] != kind:
        raise DataError(
            "expected the state of an optimizer with the same representation, got one of "
            f"{held['representation']} for {kind}: make the optimizer as it was"
        )
    return held


def restored(
    kind: type,
    model: nn.Module,
    arguments: dict[str, Any],
    groups: list[dict[str, Any]],
    following: list[int],
    state: dict[str, Any],
) -> Any:
    """An optimizer as it was, of a model that was copied or unpickled with it."""
    optimizer = kind(model, **arguments, params=groups)
    optimizer._following = following
    optimizer.load_state_dict(state)
    return optimizer


def common_module(names: Sequence[str]) -> str:
    """The innermost module that owns all of these parameters; empty for the model itself."""
    if not names:
        return ""
    paths = [name.split(".")[:-1] for name in names]
    shared: list[str] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)
