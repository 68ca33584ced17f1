"""Operators on disk: tensors and plain data, to be saved and loaded without trusting the file."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Mapping
from types import NoneType
from typing import IO, Any, TypeGuard

import torch
from torch import Tensor

from .arguments import described
from .collectives import ALONE
from .disk import checksum, replacing
from .errors import DataError, MissingFileError, NNGeoError, SpaceMismatchError
from .folders import Folder, write_folder
from .operators import rules
from .operators.base import BaseLinearOperator
from .operators.sharded import ShardedBlockDiagonalLinearOperator
from .space import ParamSpace, canonical_name
from .states import (
    CONVENTIONS,
    FORMAT,
    blocks_of,
    build,
    describe,
    describe_shared,
    keys_of,
    register_saved,
)

__all__ = ["load", "register_saved", "save", "state_of"]

VERSION = 1  # of single files; folders have 2
_KEYS = {"format", "version", "representation", "conventions", "parameters", "operator", "tensors"}


def save(F: BaseLinearOperator, path: str | os.PathLike[str] | IO[bytes]) -> None:
    """Write an operator to a file, or a folder, of tensors and plain data (`F.state_dict()`).

    A file is written beside the path, and takes its place when it is complete. A folder is a file
    for every few blocks (safetensors, at most 5 GiB if the blocks allow it), and an index that is
    written last. Whatever interrupts it, what was there before stays. Checksums of everything go
    with it.

    Args:
        F: an operator that is made of tensors.
        path: a path, or a file opened for binary writing. A path that ends with a slash, or that
            is a folder, is written as a folder.

    Raises:
        UnsupportedLayerError: the operator, or a part of it, is not made of tensors.
        DataError: it is no operator; or the folder holds other files.
        ImportError: a folder needs safetensors (the extra `folders`).
        OSError: the file cannot be written.

    Example:
        >>> import tempfile
        >>> from nngeo_lazy.operators import DiagonalLinearOperator
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(DiagonalLinearOperator(torch.tensor([1.0, 2.0])), f"{folder}/F.pt")
        ...     load(f"{folder}/F.pt").diagonal()
        tensor([1., 2.])
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
    if _is_folder(path):
        group = F.group if isinstance(F, ShardedBlockDiagonalLinearOperator) else ALONE
        write_folder(os.fspath(path), state_of(F, shared=True), group)
        return
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
    lazy: bool = False,
    mmap: bool = False,
    space: ParamSpace | None = None,
) -> BaseLinearOperator:
    """The operator that `save` wrote, or of a `state_dict`.

    Nothing in the file is executed (`torch.load(weights_only=True)`). Selectors of the loaded
    operator's space go by name: it knows no modules.

    Args:
        path_or_state: a path of a file or a folder, a file opened for binary reading, or a state.
        map_location: as in `torch.load`; for a folder, a device.
        lazy: of a folder: each block of a block-diagonal operator is read when a computation needs
            it, and dropped after it. Damage of a block is found when it is first read.
        mmap: whether numbers stay on the disk, and are read into memory where a computation touches
            them. What is not read is not compared with its checksum either.
        space: the parameters that are expected; with it, another file is refused.

    Returns:
        The operator, on the device and in the dtype in which it was saved.

    Raises:
        MissingFileError: there is no file.
        DataError: not such a file, another version, a file that was damaged, or missing, extra or
            unfitting tensors; a folder that is still being written; lazy=True for a single file, or
            mmap=True for what has no path.
        ImportError: a folder needs safetensors (the extra `folders`).
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
        if _is_folder(path_or_state):
            operator = _of_folder(os.fspath(path_or_state), map_location, lazy, mmap)
        else:
            operator = _of_file(path_or_state, map_location, lazy, mmap)
    except NNGeoError:
        raise
    except ImportError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever foreign or damaged data lead to
        raise DataError(f"the file is malformed ({type(error).__name__}: {error})") from None
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
def state_of(F: BaseLinearOperator, shared: bool = False) -> dict[str, Any]:
    """What `F.state_dict()` returns.

    Args:
        F: an operator that is made of tensors.
        shared: whether tensors may be missing, which another process has.
    """
    tensors: dict[str, Tensor] = {}
    if shared and isinstance(F, ShardedBlockDiagonalLinearOperator):
        tree = describe_shared(F, tensors)
    else:
        tree = describe(F, "", tensors)
    return {
        "format": FORMAT,
        "version": VERSION,
        "representation": F._kind(),
        "conventions": dict(CONVENTIONS),
        "parameters": [] if F.space is None else list(F.space.names),
        "operator": tree,
        "tensors": tensors,
    }


# --- reading --------------------------------------------------------------------------------------


def _is_folder(path: Any) -> TypeGuard[str | os.PathLike[str]]:
    """Whether a path stands for a folder: it is one, or ends as one."""
    if not isinstance(path, (str, os.PathLike)):
        return False
    name = os.fspath(path)
    return isinstance(name, str) and (name.endswith(("/", os.sep)) or os.path.isdir(name))


def _of_file(source: Any, map_location: Any, lazy: bool, mmap: bool) -> BaseLinearOperator:
    if lazy:
        raise DataError(
            "lazy=True opens blocks of a folder, and this is one file: save it as a folder "
            "(ng.save(F, 'F/')), or pass mmap=True"
        )
    state = _read(source, map_location, mmap)
    _require_format(state, mmap)
    given = state["tensors"].items()
    tensors = dict(given) if mmap else {key: t.clone() for key, t in given}  # values, not views
    operator = build(state["operator"], tensors)
    if tensors:
        raise DataError(f"the file holds extra tensors {sorted(tensors)}: it was altered")
    return operator


def _of_folder(path: str, map_location: Any, lazy: bool, mmap: bool) -> BaseLinearOperator:
    if not isinstance(map_location, (str, torch.device, NoneType)):
        raise DataError(
            f"expected map_location to be a device for a folder, got {described(map_location)}: "
            "pass map_location='cpu'"
        )
    folder = Folder(path, None if map_location is None else torch.device(map_location), not mmap)
    tree, known = folder.index["operator"], folder.index["tensors"].keys()
    keys = keys_of(tree)
    if lost := sorted(set(keys) - known):
        raise DataError(f"the folder lacks the tensors {lost[:4]}: it is incomplete")
    if extra := sorted(known - set(keys)):
        raise DataError(f"the folder holds extra tensors {extra[:4]}: it was altered")
    if lazy:
        blocks = blocks_of(tree)
        whole = [key for key in keys if key not in {k for b in blocks for k in keys_of(b)}]
        return build(tree, folder.tensors(whole), folder.stored)
    tensors = folder.tensors(keys)
    return build(tree, tensors if mmap else {key: t.clone() for key, t in tensors.items()})


def _read(source: Any, map_location: Any, mmap: bool) -> Mapping[str, Any]:
    if mmap and not isinstance(source, (str, os.PathLike)):
        raise DataError(
            f"mmap=True needs the path of a file, got {described(source)}: pass the path, or leave "
            "mmap out"
        )
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
            state = torch.load(
                source, map_location=map_location, weights_only=True, mmap=mmap or None
            )
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


def _require_format(state: Mapping[str, Any], mapped: bool) -> None:
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
    # no checksum was written before 0.8; and to compute one reads everything
    if not mapped and "checksum" in state and state["checksum"] != checksum(state):
        raise DataError(
            "the file is damaged: its contents have another checksum than when they were saved. "
            "Take another copy of it, or build the operator again"
        )


def _other_space(own: ParamSpace | None, wanted: ParamSpace) -> str:
    if own is None:
        return "the file holds a bare matrix, not an operator over the parameters that are expected"
    here = dict(zip(map(canonical_name, own.names), own.shapes, strict=True))
    there = dict(zip(map(canonical_name, wanted.names), wanted.shapes, strict=True))
    missing = [name for name in there if name not in here]
    extra = [name for name in here if name not in there]
    both = [name for name in here if name in there and here[name] != there[name]]
    differing = [f"{name} {tuple(here[name])}, not {tuple(there[name])}" for name in both]
    return (
        "the file is over other parameters than expected: "
        f"missing {missing}; extra {extra}; of another shape {differing}"
        + ("" if missing or extra or differing else "; in another order")
    )
