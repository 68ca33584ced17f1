"""Operators as tensors and plain data, to be saved and loaded without trusting the file."""

from __future__ import annotations

import inspect
import io
import os
import warnings
from collections.abc import Mapping
from types import NoneType
from typing import IO, Any, TypeVar

import torch
from torch import Tensor

from .arguments import described
from .disk import checksum, replacing
from .errors import (
    DataError,
    MissingFileError,
    NNGeoError,
    SpaceMismatchError,
    UnsupportedLayerError,
)
from .layout import Layout, Piece, require_tiling
from .operators import rules
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
from .operators.views import InverseLinearOperator, RestrictedLinearOperator
from .space import Lineage, ParamSpace, canonical_name

__all__ = ["load", "register_saved", "save", "state_of"]

FORMAT, VERSION = "nngeo_lazy operator", 1
_KEYS = {"format", "version", "representation", "conventions", "parameters", "operator", "tensors"}
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
        >>> type(load(Prior(torch.ones(3)).state_dict())).__name__
        'Prior'
    """
    if _CLASSES.setdefault(kind.__name__, kind) is not kind:
        raise DataError(
            f"expected a name that no other operator class has, but files know {kind.__name__!r} "
            "already: rename yours"
        )
    return kind


def save(F: BaseLinearOperator, path: str | os.PathLike[str] | IO[bytes]) -> None:
    """Write an operator to a file of tensors and plain data (`F.state_dict()`).

    The file is written beside the path, and takes its place when it is complete: whatever
    interrupts it, what was there before stays. A checksum of everything goes with it.

    Args:
        F: an operator that is made of tensors.
        path: a path, or a file opened for binary writing.

    Raises:
        UnsupportedLayerError: the operator, or a part of it, is not made of tensors.
        DataError: it is no operator.
        OSError: the file cannot be written.
    """
    if not isinstance(F, BaseLinearOperator):
        raise DataError(
            f"expected an operator to save, as FIM or aslinearoperator returns it, got "
            f"{type(F).__name__}: save a model with torch.save(model.state_dict(), path)"
        )
    if not (isinstance(path, (str, os.PathLike)) or hasattr(path, "write")):
        raise DataError(
            f"expected a path, or a file opened for binary writing, got {described(path)}: pass "
            "path='F.pt'"
        )
    state = state_of(F)
    # a view would be written with all of the memory that it looks into
    state["tensors"] = {
        key: t.clone(memory_format=torch.contiguous_format)
        if t.untyped_storage().nbytes() != t.numel() * t.element_size()
        else t
        for key, t in state["tensors"].items()
    }
    state["checksum"] = checksum(state)
    if not isinstance(path, (str, os.PathLike)):
        torch.save(state, path)
        return
    with replacing(path) as file:
        torch.save(state, file)


def load(
    path_or_state: str | os.PathLike[str] | IO[bytes] | Mapping[str, Any],
    *,
    map_location: Any = None,
    space: ParamSpace | None = None,
) -> BaseLinearOperator:
    """The operator that `save` wrote, or of a `state_dict`.

    Nothing in the file is executed (`torch.load(weights_only=True)`). Selectors of the loaded
    operator's space go by name: it knows no modules.

    Args:
        path_or_state: a path, a file opened for binary reading, or a state.
        map_location: as in `torch.load`.
        space: the parameters that are expected; with it, another file is refused.

    Raises:
        MissingFileError: there is no file.
        DataError: not such a file, another version, a file that was damaged, or missing, extra or
            unfitting tensors.
        SpaceMismatchError: it is over other parameters than `space`, or than its tensors.

    Example:
        >>> from nngeo_lazy.operators import DiagonalLinearOperator
        >>> F = DiagonalLinearOperator(torch.tensor([1.0, 2.0]))
        >>> load(F.state_dict()).diagonal()
        tensor([1., 2.])
    """
    if space is not None and not isinstance(space, ParamSpace):
        raise DataError(f"expected space to be a ParamSpace, got {described(space)}: pass F.space")
    try:
        state = _read(path_or_state, map_location)
        _require_format(state)
        tensors = {key: t.clone() for key, t in state["tensors"].items()}  # values, not views
        operator = _build(state["operator"], tensors)
    except NNGeoError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever foreign or damaged data lead to
        raise DataError(f"the file is malformed ({type(error).__name__}: {error})") from None
    if tensors:
        raise DataError(f"the file holds extra tensors {sorted(tensors)}: it was altered")
    own = operator.space
    if own is not None and len(own) != operator.shape[-1]:
        raise SpaceMismatchError(
            f"the file names {len(own)} parameters, but its tensors are over "
            f"{operator.shape[-1]}: it was altered"
        )
    if space is not None and own != space:
        raise SpaceMismatchError(_other_space(own, space))
    return operator


@rules.states.register(BaseLinearOperator)
def state_of(F: BaseLinearOperator) -> dict[str, Any]:
    """What `F.state_dict()` returns."""
    tensors: dict[str, Tensor] = {}
    return {
        "format": FORMAT,
        "version": VERSION,
        "representation": F._kind(),
        "conventions": dict(CONVENTIONS),
        "parameters": [] if F.space is None else list(F.space.names),
        "operator": _describe(F, "", tensors),
        "tensors": tensors,
    }


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
    return (
        "it is not made of tensors alone, or no file knows its class: save what it was made from, "
        "or DenseLinearOperator(F.to_dense()) if that fits, or pass a class of your own to "
        "files.register_saved"
    )


def _describe(op: Any, prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
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
            args.append(_describe(arg, f"{key}.", tensors))
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


def _read(source: Any, map_location: Any) -> Mapping[str, Any]:
    if isinstance(source, Mapping):
        if map_location is None:
            return source
        buffer = io.BytesIO()  # map_location means what torch.load makes of it
        torch.save(dict(source), buffer)
        buffer.seek(0)
        source = buffer
    try:
        with warnings.catch_warnings():  # of foreign pickles, which are refused anyhow
            warnings.simplefilter("ignore")
            state = torch.load(source, map_location=map_location, weights_only=True)
    except FileNotFoundError:
        raise MissingFileError(
            f"expected a file written by ng.save, but there is none at {os.fspath(source)!r}: "
            "check the path"
        ) from None
    except Exception as error:  # noqa: BLE001 - whatever damaged or foreign files lead to
        raise DataError(
            "expected a file written by ng.save, but it cannot be read: "
            f"{type(error).__name__}: {error}"
        ) from None
    return state if isinstance(state, Mapping) else {}


def _require_format(state: Mapping[str, Any]) -> None:
    if state.get("format") != FORMAT:
        raise DataError(
            "expected a file or state written by ng.save or F.state_dict(), got one with "
            f"{sorted(map(str, state))[:8]}"
        )
    if state.get("version") != VERSION:
        raise DataError(
            f"expected version {VERSION} of the format, got version {state.get('version')}: load "
            "it with the release of nngeo_lazy that wrote it, and build it again"
        )
    if missing := [key for key in ("operator", "tensors") if key not in state]:
        raise DataError(f"the file lacks {missing}: it is incomplete")
    tensors = state["tensors"]
    if not isinstance(tensors, Mapping) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise DataError("the file is malformed: expected its tensors by name")
    if extra := sorted(str(key) for key in state if key not in {*_KEYS, "checksum"}):
        raise DataError(f"the file holds {extra}, which no release writes: it was altered")
    if "checksum" in state and state["checksum"] != checksum(state):  # not written before 0.8
        raise DataError(
            "the file is damaged: its contents have another checksum than when they were saved. "
            "Take another copy of it, or build the operator again"
        )


def _build(node: Mapping[str, Any], tensors: dict[str, Tensor]) -> BaseLinearOperator:
    kind = _CLASSES.get(node["class"])
    if kind is None:
        raise DataError(
            f"the file holds an unknown operator {node['class']!r}: pass its class to "
            "files.register_saved first, or load it with the release that wrote it"
        )
    args: list[Any] = []
    for arg in node["args"]:
        if isinstance(arg, Mapping):
            args.append(_build(arg, tensors))
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
    )


def _other_space(own: ParamSpace | None, wanted: ParamSpace) -> str:
    if own is None:
        return "the file holds a bare matrix, not an operator over the parameters that are expected"
    here = dict(zip(map(canonical_name, own.names), own.shapes, strict=True))
    there = dict(zip(map(canonical_name, wanted.names), wanted.shapes, strict=True))
    missing = [name for name in there if name not in here]
    extra = [name for name in here if name not in there]
    shapes = [f"{n} {tuple(here[n])}, not {tuple(there[n])}" for n in here if n in there]
    differing = [
        s
        for s, n in zip(shapes, (n for n in here if n in there), strict=True)
        if here[n] != there[n]
    ]
    return (
        "the file is over other parameters than expected: "
        f"missing {missing}; extra {extra}; of another shape {differing}"
        + ("" if missing or extra or differing else "; in another order")
    )
