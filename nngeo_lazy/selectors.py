"""Selectors: which parameters are meant, by name, pattern, module, class or predicate."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .arguments import require_takes
from .collectives import refuse_sharded
from .errors import DataError, SpaceMismatchError
from .space import Lineage, ParamSpace, canonical_name

__all__ = ["Selector", "require_usable", "select", "space_of"]

Selector: TypeAlias = (
    str | nn.Module | type[nn.Module] | Callable[[str, Tensor], bool] | Sequence["Selector"]
)


def select(space: ParamSpace, selector: Selector) -> tuple[str, ...]:
    """The names of the selected parameters, in the space's order.

    Args:
        space: the parameters to choose from.
        selector: a parameter or module name, a glob over either, a module, a module class, a
            predicate `(name, parameter) -> bool`, or a list of these (their union).

    Raises:
        SpaceMismatchError: the selector, or one entry of a list, matches nothing.

    Example:
        >>> space = ParamSpace({"a.weight": (2,), "a.bias": (2,), "b.weight": (3,)})
        >>> select(space, "a"), select(space, "*.weight")
        (('a.weight', 'a.bias'), ('a.weight', 'b.weight'))
    """
    if isinstance(selector, Sequence) and not isinstance(selector, str):
        union = {name for entry in selector for name in select(space, entry)}
        chosen = tuple(name for name in space.names if name in union)
    else:
        chosen = tuple(name for name in space.names if _matches(space, selector, name))
    if not chosen:
        raise SpaceMismatchError(_nothing(space, selector))
    return chosen


def space_of(model: nn.Module, selector: Selector | None = None) -> ParamSpace:
    """The space of a model's selected parameters; by default all that require a gradient.

    Raises:
        SpaceMismatchError: the selector matches nothing.
        DataError: nothing is trainable, devices or dtypes are mixed, parameters are sharded or
            without data, or the model is no Python.
    """
    require_usable(model)
    if selector is None:
        return ParamSpace.of(model)
    return ParamSpace.of(model, select(ParamSpace.everything(model), selector))


def require_usable(model: nn.Module) -> None:
    """Refuse models whose functions cannot be seen, and parameters that are not all there.

    Raises:
        DataError: compiled by torch.jit, lazy, on the meta device, or in pieces.
    """
    refuse_sharded(model)
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise DataError(
                f"expected a model in Python, but {name or 'it'} is compiled by torch.jit, which "
                "shows nothing of its layers: pass the module that it was made from"
            )
    for name, p in model.named_parameters():
        if is_lazy(p):
            raise DataError(
                f"expected parameters with a shape, but {name} gets its shape from the first "
                "batch: call the model on a batch first"
            )
    kinds = {p.device.type for p in model.parameters()}
    if kinds == {"meta"}:
        raise DataError(
            "expected parameters with numbers, but they are on the meta device: call "
            "model.to_empty(device='cpu') and model.load_state_dict(...) first"
        )


def _matches(space: ParamSpace, selector: Selector, name: str) -> bool:
    if isinstance(selector, str):
        plain, wanted = canonical_name(name), canonical_name(selector) if selector else ""
        parts = plain.split(".")
        paths = [".".join(parts[:depth]) for depth in range(len(parts) + 1)]
        return wanted in paths or any(fnmatchcase(path, wanted) for path in paths[1:])
    line = _lineage(space, name)
    if isinstance(selector, type):
        return any(issubclass(kind, selector) for _, kind, _ in line.modules)
    if isinstance(selector, nn.Module):
        return any(ref is not None and ref() is selector for _, _, ref in line.modules)
    if callable(selector):
        parameter = line.parameter() if line.parameter is not None else None
        if parameter is None:
            raise SpaceMismatchError(
                f"the predicate needs the parameter {name}, but its model is gone: select by name"
            )
        require_takes("the predicate", selector, "name", "parameter")
        return bool(selector(name, parameter))
    raise SpaceMismatchError(
        "expected a selector (a parameter or module name, a glob, a module, a module class, a "
        f"predicate, or a list of these), got {selector!r}"
    )


def _lineage(space: ParamSpace, name: str) -> Lineage:
    if name not in space.lineages or not space.lineages[name].modules:
        raise SpaceMismatchError(
            f"this space does not know the modules of its parameters ({name}): select by name"
        )
    return space.lineages[name]


def _nothing(space: ParamSpace, selector: Selector) -> str:
    names = [canonical_name(name) for name in space.names]
    known = list(dict.fromkeys([*names, *(space.owner(name) for name in names)]))
    message = f"the selector {selector!r} matches no parameter"
    if isinstance(selector, str) and (near := difflib.get_close_matches(selector, known)):
        message += f"; did you mean {near}?"
    return message + f" Known parameters: {names}"
