"""What an optimizer is made of, from what a user gives: groups, representations, numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..arguments import described
from ..collectives import Group, digest
from ..errors import DataError, NonFiniteWarning, SpaceMismatchError
from ..operators import BaseLinearOperator
from ..operators.report import Report, Row
from ..operators.warn import warn
from ..pieces import fully_sharded
from ..representations import Factored, Representation, Streamed, resolve
from ..selectors import require_usable, space_of
from ..space import ParamSpace
from .options import Damping, HessianFree, LevenbergMarquardt, Options

__all__ = [
    "UNUSED",
    "agree",
    "checked_damping",
    "first_damping",
    "group_of",
    "groups_of",
    "reported",
    "require_whole",
    "resolved",
    "warn_skipped",
]

UNUSED = "the outputs do not depend on it"


def reported(
    F: BaseLinearOperator, space: ParamSpace, plain: Mapping[str, str], free: bool
) -> Report:
    """One row for each parameter.

    Args:
        F: the curvature of some of them.
        space: of all.
        plain: why the others have none.
        free: whether F is kept for all, and `plain` says what is not solved with it.
    """
    rows = {row.parameter: row for row in F.report()}
    for name, note in plain.items():
        if name not in rows or free:
            size = space.slices[name].stop - space.slices[name].start
            owner = space.owner(name)
            rows[name] = Row(name, owner, "", "none: plain gradient", size, 0, note)
    return Report([rows[name] for name in space.names])


def resolved(
    representation: str | Representation | HessianFree,
) -> tuple[HessianFree | None, Streamed | None]:
    """Hessian-free options and a representation that is averaged, either or both."""
    if isinstance(representation, str) and representation == "kernel":
        return None, Factored()
    if isinstance(representation, HessianFree):
        close = representation.preconditioner
        kept = None if close is None else resolve(close)
        if kept is not None and (not isinstance(kept, Streamed) or isinstance(kept, Factored)):
            raise DataError(f"expected a preconditioner that is averaged over steps, got {close!r}")
        return representation, kept
    known = resolve(representation)
    return (None, known) if isinstance(known, Streamed) else (HessianFree(), None)


def require_whole(model: Any) -> None:
    """Refuse what is no model, or one of several replicas."""
    if not isinstance(model, nn.Module):
        raise DataError(
            f"expected the model itself, whose passes are watched, got {type(model).__name__}: "
            "parameters are selected with params="
        )
    if not fully_sharded(model):
        require_usable(model)
    if isinstance(model, nn.DataParallel):
        raise DataError(
            "expected a model with one replica in each process, got DataParallel, which makes its "
            "replicas anew in every pass: take DistributedDataParallel, or pass model.module and "
            "call it"
        )
    inner = getattr(model, "_orig_mod", None)
    if isinstance(inner, nn.parallel.DistributedDataParallel):
        raise DataError(
            "expected the compiled model inside of DistributedDataParallel, got the wrapper itself "
            "compiled, whose passes cannot be watched: write "
            "DistributedDataParallel(torch.compile(model))"
        )


def agree(group: Group, named: Sequence[tuple[str, Tensor]], options: Options, kind: str) -> None:
    """Refuse processes that would not make the same steps.

    Args:
        group: the processes.
        named: the parameters with their names.
        options: of the optimizer.
        kind: its representation in words.

    Raises:
        DataError: they have other parameters or options, or a representation of single examples.
    """
    if group.size == 1:
        return
    if isinstance(resolved(options.representation)[1], Factored):
        raise DataError(
            "representation='kernel' holds the examples of one process: in "
            "DistributedDataParallel take 'implicit', which is the same matrix, or 'kfac'"
        )
    given = vars(options)
    known = {
        "parameters": [f"{name} {tuple(p.shape)} {p.dtype}" for name, p in named],
        "representation": kind,
        **{name: repr(given[name]) for name in ("likelihood", "estimator", "seed", "schedule")},
        "step": repr([given[name] for name in ("momentum", "radius", "eps")]),
        "values of parameters (checksums)": [digest(p) for _, p in named],
    }
    group.agree(known, "the optimizer")


def groups_of(model: nn.Module, params: Any) -> list[dict[str, Any]]:
    """Parameter groups with names, from selectors, tensors, or a list of groups with either."""
    if params is not None and not isinstance(params, (str, Tensor, type, nn.Module)):
        params = list(params) if isinstance(params, Iterable) else params
    listed = isinstance(params, Sequence) and not isinstance(params, str)
    grouped = listed and len(params) > 0 and all(isinstance(each, Mapping) for each in params)
    return [group_of(model, group) for group in (params if grouped else [{"params": params}])]


def group_of(model: nn.Module, group: Mapping[str, Any]) -> dict[str, Any]:
    """A group with the names of its parameters.

    Raises:
        DataError: it does not say which parameters it holds.
        SpaceMismatchError: a tensor is no parameter of the model.
    """
    if "params" not in group:
        raise DataError(
            'expected groups {"params": selector or tensors, option: value, ...}, got one with '
            f"{sorted(group)}"
        )
    options = {key: value for key, value in group.items() if key != "param_names"}
    named = _by_identity(model, group["params"])
    if named is None:
        space = space_of(model, group["params"])
        named = list(space.parameters(model).items())
    return {**options, "params": named}


def _by_identity(model: nn.Module, params: Any) -> list[tuple[str, Tensor]] | None:
    """Names of tensors, or of pairs of a name and a tensor; None for selectors."""
    if isinstance(params, Tensor):
        params = [params]
    if params is None or isinstance(params, (str, type, nn.Module)) or callable(params):
        return None
    if not isinstance(params, Iterable):
        raise SpaceMismatchError(
            f"expected params to be parameters of the model or a selector, got "
            f"{described(params)}: pass model.parameters(), or a name"
        )
    tensors = [p[1] if _is_pair(p) else p for p in params]
    if not tensors or not all(isinstance(p, Tensor) for p in tensors):
        return None
    names = {id(p): name for name, p in model.named_parameters()}
    strangers = [tuple(p.shape) for p in tensors if id(p) not in names]
    if strangers:
        raise SpaceMismatchError(
            f"expected parameters of the model, but tensors of shapes {strangers[:3]} are none: "
            "pass the model that owns them, as it is now"
        )
    return [(names[id(p)], p) for p in tensors]


def _is_pair(p: Any) -> bool:
    return isinstance(p, tuple) and len(p) == 2 and isinstance(p[1], Tensor)


def first_damping(damping: Damping | None) -> float | None:
    """The damping of the first step."""
    if isinstance(damping, LevenbergMarquardt):
        return damping.initial
    if damping is None:
        return None
    return checked_damping(damping(0) if callable(damping) else damping)


def checked_damping(value: Any) -> float:
    """A damping, which is a nonnegative number."""
    if not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise DataError(
            "expected a damping that is a nonnegative number, a function of the step that returns "
            f"one, LevenbergMarquardt(...), or None for a relative one, got {value!r}"
        )
    return float(value)


def warn_skipped(count: int, reason: str) -> None:
    """Say that gradients were not finite.

    Args:
        count: of so many steps since the last report.
        reason: why the curvature was not refreshed; empty if it was.
    """
    skipped = (
        f"the gradients of {count} steps since the last report were not finite, and they moved no "
        "parameter"
    )
    kept = f"the curvature was not refreshed ({reason})"
    what = "; ".join([skipped] * bool(count or not reason) + [kept] * bool(reason))
    warn(NonFiniteWarning(f"{what}: lower lr, raise damping, or clip gradients", count))
