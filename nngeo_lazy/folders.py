"""Operators as folders: safetensors, and an index that is written last (version 2 of the format).

A block is never split over two files, so that one block can be read without the others. Whoever
reads a folder with an index finds all that the index names.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .collectives import ALONE, Group
from .disk import replacing
from .errors import DataError, MissingFileError
from .operators.base import BaseLinearOperator
from .operators.stored import Source, StoredLinearOperator
from .states import FORMAT, build, keys_of

_safetensors: Any = None
with suppress(ImportError):  # the extra `folders`
    import safetensors.torch

    _safetensors = safetensors

__all__ = ["BEGUN", "INDEX", "Folder", "write_folder"]

INDEX, VERSION = "index.json", 2
BEGUN = "begun-"  # what files of a build that is not finished are named
FILE_BYTES = 5 * 2**30


def _require_safetensors() -> None:
    if _safetensors is None:
        raise ImportError(
            "a folder of blocks needs safetensors: pip install 'nngeo_lazy[folders]', or save one "
            "file, ng.save(F, 'F.pt')"
        )


# --- writing --------------------------------------------------------------------------------------


def write_folder(path: str, state: Mapping[str, Any], group: Group = ALONE) -> None:
    """Write a state to a folder; if one is there, it stays whole until the new one is.

    Args:
        path: of the folder.
        state: what `state_of` returns, with this process's tensors.
        group: the processes that write it together, each its own tensors.

    Raises:
        DataError: the path is a file, or a folder that holds something else.
        ImportError: safetensors is not installed.
    """
    with group.together("a save to a folder"):
        _require_safetensors()
        if group.rank == 0:
            _prepare(path)
    token = group.same(uuid.uuid4().hex[:8])
    tables: dict[str, Any] = {"tensors": {}, "files": {}}
    with group.together("a save to a folder"):
        for k, keys in enumerate(_shards(state)):
            name = f"blocks-{token}-{group.rank:04d}-{k:05d}.safetensors"
            own = {key: state["tensors"][key].detach().cpu().contiguous() for key in keys}
            tables["files"][name] = _write(os.path.join(path, name), own)
            tables["tensors"] |= {key: _described(name, t) for key, t in own.items()}
    shares = group.gather(tables)
    with group.together("the index of a folder"):
        if group.rank == 0:
            index = {key: value for key, value in state.items() if key != "tensors"}
            index["version"] = VERSION
            for kind in tables:
                index[kind] = {key: v for share in shares for key, v in share[kind].items()}
            index["checksum"] = _checksum(index)
            with replacing(os.path.join(path, INDEX)) as file:
                file.write(json.dumps(index, indent=1).encode())
            for name in os.listdir(path):
                if _is_block(name) and name not in index["files"]:
                    os.remove(os.path.join(path, name))  # of what the folder held before


def _prepare(path: str) -> None:
    """Make the folder, or see that it is one of ours."""
    path = os.path.abspath(path)  # without a slash at its end
    if os.path.exists(path) and not os.path.isdir(path):
        raise DataError(f"expected a folder to write to, but {path!r} is a file: take another name")
    os.makedirs(path, exist_ok=True)
    names = os.listdir(path)
    strangers = [n for n in names if not (n.startswith((INDEX, BEGUN)) or _is_block(n))]
    if strangers:
        raise DataError(
            f"expected a folder of the operator's own, but {path!r} holds {sorted(strangers)[:4]}: "
            "pass a new folder"
        )


def _is_block(name: str) -> bool:
    return name.startswith("blocks-") and name.endswith(".safetensors")


def _shards(state: Mapping[str, Any]) -> Iterator[list[str]]:
    """Names of the tensors of each file: whole blocks, up to a size."""
    tensors, tree = state["tensors"], state["operator"]
    blocks = [keys_of(arg) if isinstance(arg, Mapping) else [arg] for arg in tree["args"]]
    waiting: list[str] = []
    size = 0
    for block in blocks:
        keys = [key for key in block if key in tensors]  # others are another process's
        more = sum(tensors[key].nbytes for key in keys)
        if waiting and size + more > FILE_BYTES:
            yield waiting
            waiting, size = [], 0
        waiting, size = [*waiting, *keys], size + more
    if waiting:
        yield waiting


def _write(path: str, tensors: dict[str, Tensor]) -> int:
    """Write a file through to the disk; its size."""
    _safetensors.torch.save_file(_unshared(tensors), path)
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
    return os.path.getsize(path)


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same with a memory of its own for each, as the format wants it."""
    seen: set[int] = set()
    found = {}
    for key, tensor in tensors.items():
        storage = tensor.untyped_storage()
        own = storage.nbytes() == tensor.nbytes and storage.data_ptr() not in seen
        seen.add(storage.data_ptr())
        found[key] = tensor if own else tensor.clone()
    return found


def _described(file: str, tensor: Tensor) -> list[Any]:
    return [file, str(tensor.dtype), list(tensor.shape), _digest(tensor)]


def _digest(tensor: Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    numbers: Any = flat.view(torch.uint8).numpy()
    return hashlib.sha256(numbers).hexdigest()


def _checksum(index: Mapping[str, Any]) -> str:
    plain = {key: index[key] for key in index if key != "checksum"}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


# --- reading --------------------------------------------------------------------------------------


class Folder:
    """A folder that `write_folder` wrote; nothing but the index is read before it is asked for.

    Args:
        path: of the folder.
        device: where tensors go; the CPU by default.
        check: whether tensors are compared with their checksums when they are first read.

    Raises:
        MissingFileError: there is no folder, or a file of it is gone.
        DataError: no index, so that it is being written or was never complete; another format; an
            index or a file that was damaged.
        ImportError: safetensors is not installed.
    """

    def __init__(self, path: str, device: torch.device | None, check: bool) -> None:
        self.path = os.path.abspath(path)
        self.device = torch.device("cpu") if device is None else device
        self.check = check
        self.index = self._read_index()
        _require_safetensors()
        self._known: set[str] = set()  # tensors whose checksums were compared
        self._require_files()

    def tensors(self, keys: Sequence[str]) -> dict[str, Tensor]:
        """Some tensors, which are read from the disk as they are used.

        Raises:
            DataError: a file was damaged, or written anew.
        """
        tables = self.index["tensors"]
        found = {}
        for file in dict.fromkeys(tables[key][0] for key in keys):
            path = os.path.join(self.path, file)
            try:
                with _safetensors.safe_open(path, "pt") as handle:
                    for key in (key for key in keys if tables[key][0] == file):
                        found[key] = self._sound(key, handle.get_tensor(key)).to(self.device)
            except DataError:
                raise
            except FileNotFoundError:
                raise self._gone(file) from None
            except Exception as error:  # noqa: BLE001 - whatever damaged files lead to
                raise DataError(
                    f"the file {path!r} is damaged ({type(error).__name__}: {error}): take another "
                    "copy of the folder, or build the operator again"
                ) from None
        return found

    def stored(self, node: Mapping[str, Any]) -> BaseLinearOperator:
        """A block that is read whenever it is needed."""
        tables = {key: self.index["tensors"][key] for key in keys_of(node)}
        empty = {
            key: torch.empty(shape, dtype=_dtype(name), device="meta")
            for key, (_, name, shape, _) in tables.items()
        }
        outline = build(node, empty)
        like = torch.empty(0, dtype=outline.dtype, device=self.device)
        return StoredLinearOperator(like, source=Source(_Block(self, node), outline))

    def _sound(self, key: str, tensor: Tensor) -> Tensor:
        _, dtype, shape, known = self.index["tensors"][key]
        fits = str(tensor.dtype) == dtype and list(tensor.shape) == shape
        if fits and self.check and key not in self._known:
            fits = _digest(tensor) == known
            self._known.add(key)
        if not fits:
            self._known.discard(key)
            raise DataError(
                f"the folder {self.path!r} is damaged: the tensor {key!r} has another checksum "
                "than when it was saved. Take another copy of it, or build the operator again"
            )
        return tensor

    def _read_index(self) -> dict[str, Any]:
        path = os.path.join(self.path, INDEX)
        try:
            with open(path, "rb") as file:
                index = json.loads(file.read())
        except (FileNotFoundError, NotADirectoryError):
            raise self._incomplete() from None
        except ValueError as error:
            raise DataError(f"the index {path!r} is damaged, or none of ng.save: {error}") from None
        if not isinstance(index, dict) or index.get("format") != FORMAT:
            raise DataError(
                f"expected a folder written by ng.save, but {path!r} is an index of something else"
            )
        if index.get("version") != VERSION:
            raise DataError(
                f"expected version {VERSION} of a folder's format, got version "
                f"{index.get('version')}: load it with the release of nngeo_lazy that wrote it, "
                "and build it again"
            )
        if index.get("checksum") != _checksum(index):
            raise DataError(
                f"the index {path!r} is damaged: it has another checksum than when it was saved. "
                "Take another copy of the folder, or build the operator again"
            )
        return index

    def _incomplete(self) -> DataError:
        """Why there is no index."""
        if not os.path.isdir(self.path):
            return MissingFileError(
                f"expected a folder written by ng.save, but there is none at {self.path!r}: check "
                "the path"
            )
        if any(map(_is_block, os.listdir(self.path))):
            return DataError(
                f"the folder {self.path!r} has blocks but no index: it is still being written, or "
                "that was interrupted. Wait until ng.save returns, or save the operator again"
            )
        return DataError(
            f"expected a folder written by ng.save, but {self.path!r} has no {INDEX}: check the "
            "path"
        )

    def _require_files(self) -> None:
        """Raise an error unless all files have their sizes."""
        for file, size in self.index["files"].items():
            path = os.path.join(self.path, file)
            if not os.path.exists(path):
                raise self._gone(file)
            if (found := os.path.getsize(path)) != size:
                raise DataError(
                    f"the file {path!r} has {found:,} bytes and was saved with {size:,}: it was "
                    "cut off or replaced. Take another copy of the folder, or build the operator "
                    "again"
                )

    def _gone(self, file: str) -> MissingFileError:
        return MissingFileError(
            f"the folder {self.path!r} lacks its file {file!r}: it was copied in part, or written "
            "anew since it was loaded. Load it again, or take another copy"
        )


@dataclass(frozen=True)
class _Block:
    """Reads a block; can be pickled."""

    folder: Folder
    node: Mapping[str, Any]

    def __call__(self) -> BaseLinearOperator:
        return build(self.node, self.folder.tensors(keys_of(self.node)))


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise DataError(f"the folder holds numbers of an unknown type {name!r}: it was altered")
    return dtype
