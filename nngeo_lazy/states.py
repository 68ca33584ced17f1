"""Operators as a tree of class names and plain data, with tensors by name; and back."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from types import NoneType
from typing import Any, TypeVar

import torch
from torch import Tensor

from .errors import DataError, UnsupportedLayerError
from .layout import Layout, Piece, require_tiling
from .operators.base import BaseLinearOperator
from .operators.block_diagonal import BlockDiagonalLinearOperator
from .operators.composite import ProductLinearOperator, ScaledLinearOperator, SumLinearOperator
from .operators.dense import DenseLinearOperator, MatrixLinearOperator
from .operators.diagonal import DiagonalLinearOperator
from .operators.eigen_low_rank import EigenLowRankLinearOperator
from .operators.factored import (
    FactoredGaussNewtonLinearOperator,
    FactoredJacobianLinearOperator,
)
from .operators.info import Info, Origin
from .operators.kronecker import EigenKroneckerLinearOperator, KroneckerLinearOperator
from .operators.low_rank import LowRankLinearOperator
from .operators.matrix_free import ImplicitLinearOperator
from .operators.quasi_diagonal import QuasiDiagonalLinearOperator
from .operators.sharded import AbsentLinearOperator, ShardedBlockDiagonalLinearOperator
from .operators.stored import opened
from .operators.views import InverseLinearOperator, RestrictedLinearOperator
from .space import Lineage, ParamSpace

__all__ = [
    "CONVENTIONS",
    "FORMAT",
    "blocks_of",
    "build",
    "describe",
    "describe_shared",
    "keys_of",
    "register_saved",
]

FORMAT = "nngeo_lazy operator"
CONVENTIONS = {
    "scale": "mean over examples of a loss that sums over positions",
    "parameter order": "named_parameters, each row-major",
    "kronecker order": "output gradients kron inputs, homogeneous coordinate last",
}
_CLASSES: dict[str, type[BaseLinearOperator]] = {
    kind.__name__: kind
    for kind in (
        BlockDiagonalLinearOperator,
        DenseLinearOperator,
        DiagonalLinearOperator,
        EigenKroneckerLinearOperator,
        EigenLowRankLinearOperator,
        InverseLinearOperator,
        KroneckerLinearOperator,
        LowRankLinearOperator,
        MatrixLinearOperator,
        ProductLinearOperator,
        QuasiDiagonalLinearOperator,
        RestrictedLinearOperator,
        ScaledLinearOperator,
        SumLinearOperator,
    )
}

Kind = TypeVar("Kind", bound=type[BaseLinearOperator])


def register_saved(kind: Kind) -> Kind:
    """Let `save` and `load` take an operator class of your own. Also a decorator of the class.

    What its constructor takes must be tensors and operators, and `info=`. A program
    that reads the file registers the class first.

    Args:
        kind: the class; a file holds its name.

    Returns:
        The class.

    Raises:
        DataError: another class has that name.

    Example:
        >>> from nngeo_lazy.operators import DiagonalLinearOperator
        >>> @register_saved
        ... class Prior(DiagonalLinearOperator):
        ...     pass
        >>> import nngeo_lazy as ng
        >>> type(ng.load(Prior(torch.ones(3)).state_dict())).__name__
        'Prior'
    """
    if _CLASSES.setdefault(kind.__name__, kind) is not kind:
        raise DataError(
            f"expected a name that no other operator class has, but files know {kind.__name__!r} "
            "already: rename yours"
        )
    return kind


# --- writing --------------------------------------------------------------------------------------


def _why_not(op: Any) -> str:
    if isinstance(op, ImplicitLinearOperator):
        return (
            "it holds a network and its data, and not only tensors: save the model's state_dict "
            "and build it again, or save a 'kfac' or 'low_rank' matrix in its place"
        )
    if isinstance(op, (FactoredJacobianLinearOperator, FactoredGaussNewtonLinearOperator)):
        return (
            "it holds the forms of every layer, which no file format describes: build it again, or "
            "save a 'low_rank' matrix, which has the same numbers"
        )
    if isinstance(op, ShardedBlockDiagonalLinearOperator):
        return (
            "its blocks lie on several processes: save it as a folder, ng.save(F, 'F/'), on all of "
            "them"
        )
    return (
        "it is not made of tensors alone, or no file knows its class: save what it was made from, "
        "or ng.aslinearoperator(F.to_dense()) if that fits, or pass a class of your own to "
        "files.register_saved"
    )


def describe(op: Any, prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """An operator as classes and plain data; its tensors are added by name.

    Raises:
        UnsupportedLayerError: it is not made of tensors alone, or its class is not registered.
    """
    op = opened(op)
    kind = type(op).__name__
    if kind not in _CLASSES:
        raise UnsupportedLayerError(f"{kind} cannot be saved, since {_why_not(op)}")
    args: list[Any] = []
    for name, arg in zip(_names(op), op._args, strict=True):
        key = f"{prefix}{name}"
        if isinstance(arg, Tensor):
            tensors[key] = arg.detach()
            args.append(key)
        else:
            args.append(describe(arg, f"{key}.", tensors))
    return _node(kind, args, op)


def describe_shared(
    F: ShardedBlockDiagonalLinearOperator, tensors: dict[str, Tensor]
) -> dict[str, Any]:
    """The tree of an operator whose blocks lie on several processes; on all of them the same.

    This process's tensors are added by name.
    """
    args: list[Any] = []
    with F.group.together("a save of a sharded operator"):
        for name, member in zip(_names(F), F.members, strict=True):
            away = isinstance(member, AbsentLinearOperator)
            args.append(None if away else describe(member, f"{name}.", tensors))
    shares = F.group.gather(args)
    whole = [shares[owner][k] for k, owner in enumerate(F.owners)]
    return _node(BlockDiagonalLinearOperator.__name__, whole, F)


def _node(kind: str, args: list[Any], op: Any) -> dict[str, Any]:
    info = _info_state(op.info)
    if isinstance(op, BlockDiagonalLinearOperator):
        info["blocks"] = [
            [name, layout.groups, layout.rows, [list(_piece_state(p)) for p in layout.pieces]]
            for name, layout in zip(op.names, op.layouts, strict=True)
        ]
    return {"class": kind, "args": args, "info": info}


def _names(op: Any) -> list[str]:
    """A readable name for each positional argument."""
    if isinstance(op, BlockDiagonalLinearOperator):
        return [f"{name}[{k}]" for k, name in enumerate(op.names)]
    if isinstance(op, SumLinearOperator):
        return [f"terms[{k}]" for k in range(len(op.terms))]
    parameters = list(inspect.signature(type(op).__init__).parameters)[1:]
    return parameters[: len(op._args)]


def _as_list(numbers: Any) -> Any:
    return list(numbers) if isinstance(numbers, tuple) else numbers


def _info_state(info: Info) -> dict[str, Any]:
    state: dict[str, Any] = {
        "num_examples": info.num_examples,
        "num_terms": info.num_terms,
        "log_likelihood": info.log_likelihood,
        "quantity": dict(info.quantity),
        "truncated": info.truncated,
        "origins": {
            name: [o.layer, o.form, o.note, _as_list(o.positions)]
            for name, o in info.origins.items()
        },
    }
    if info.space is not None:
        space = info.space
        state["space"] = {
            name: [list(shape), space.owner(name)]
            for name, shape in zip(space.names, space.shapes, strict=True)
        }
    return state


def _piece_state(piece: Piece) -> tuple[Any, ...]:
    return tuple(getattr(piece, name) for name in Piece.__dataclass_fields__)


# --- reading --------------------------------------------------------------------------------------


def keys_of(node: Mapping[str, Any]) -> list[str]:
    """The names of all tensors of a tree."""
    inner = [keys_of(arg) if isinstance(arg, Mapping) else [arg] for arg in node["args"]]
    return [key for keys in inner for key in keys]


def blocks_of(node: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The trees of all blocks of block-diagonal operators."""
    inner = [arg for arg in node["args"] if isinstance(arg, Mapping)]
    if node["class"] == BlockDiagonalLinearOperator.__name__:
        return inner
    return [block for arg in inner for block in blocks_of(arg)]


def build(
    node: Mapping[str, Any],
    tensors: dict[str, Tensor],
    stored: Callable[[Mapping[str, Any]], BaseLinearOperator] | None = None,
) -> BaseLinearOperator:
    """The operator of a tree; the tensors that it takes are removed.

    Args:
        node: what `describe` returned.
        tensors: by name.
        stored: makes the blocks of block-diagonal operators, if that is not done from the tensors.

    Raises:
        DataError: an unknown class, a missing tensor, or tensors that do not fit.
    """
    kind = _CLASSES.get(node["class"])
    if kind is None:
        raise DataError(
            f"the file holds an unknown operator {node['class']!r}: pass its class to "
            "files.register_saved first, or load it with the release that wrote it"
        )
    args: list[Any] = []
    for arg in node["args"]:
        if isinstance(arg, Mapping):
            away = stored is not None and kind is BlockDiagonalLinearOperator
            args.append(stored(arg) if stored and away else build(arg, tensors, stored))
        elif arg in tensors:
            args.append(tensors.pop(arg))
        else:
            raise DataError(f"the file lacks the tensor {arg!r}: it is incomplete")
    like, fields = args[0], {}
    if "blocks" in node["info"]:
        described = node["info"]["blocks"]
        fields = {
            "names": [name for name, *_ in described],
            "layouts": [
                Layout(groups, rows, tuple(Piece(*piece) for piece in pieces))
                for _, groups, rows, pieces in described
            ],
        }
        require_tiling(fields["layouts"])
    info = _info(node["info"], like.dtype, like.device)
    try:
        return kind(*args, info=info, **fields)
    except (ValueError, TypeError) as error:
        raise DataError(f"the tensors of {node['class']} do not fit together: {error}") from None


_PLAIN: dict[str, tuple[type, ...]] = {
    "num_examples": (int,),
    "num_terms": (int,),
    "log_likelihood": (float,),
    "truncated": (bool,),
}


def _require_plain(state: Mapping[str, Any]) -> None:
    """Raise DataError if what is known of an operator has other types than a build gives it."""
    wrong = [k for k, kinds in _PLAIN.items() if not isinstance(state.get(k), (*kinds, NoneType))]
    texts = state["quantity"].values()
    if not all(isinstance(text, (str, int, float, NoneType)) for text in texts):
        wrong.append("quantity")
    for layer, form, note, positions in state["origins"].values():
        if not (all(isinstance(t, str) for t in (layer, form, note))):
            wrong.append("origins")
        several = positions if isinstance(positions, list) else [positions]
        if not all(isinstance(each, (int, float, NoneType)) for each in several):
            wrong.append("positions")
    if wrong:
        raise DataError(
            f"the file is malformed: {sorted(set(wrong))} of another type than expected"
        )


def _info(state: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> Info:
    _require_plain(state)
    space = None
    if "space" in state:
        space = ParamSpace(
            {name: shape for name, (shape, _) in state["space"].items()},
            dtype=dtype,
            device=device,
            lineages={
                name: Lineage((), None, raw=owner == name)
                for name, (_, owner) in state["space"].items()
            },
        )
    origins = {
        name: Origin(layer, form, note, tuple(many) if isinstance(many, list) else many)
        for name, (layer, form, note, many) in state["origins"].items()
    }
    return Info(
        space,
        state["num_examples"],
        state["num_terms"],
        origins,
        dict(state["quantity"]),
        state.get("log_likelihood"),  # not written before 0.6
        state.get("truncated", _truncated(state["quantity"])),
    )


def _truncated(quantity: Mapping[str, Any]) -> bool:
    """The same of a file before 0.8, which says it in words alone."""
    return re.search(r"LowRank\(rank=\d", str(quantity.get("representation"))) is not None
