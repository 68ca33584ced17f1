"""Files that are whole: written beside and replaced, with a checksum of what they hold."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch

from .errors import DataError

__all__ = ["checksum", "replacing", "require_same_run", "write_whole"]


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A file that takes the place of another one once it is complete, and otherwise goes."""
    goal = os.path.realpath(path)  # a link stays one
    if os.path.exists(goal) and not os.path.isfile(goal):  # a device, or a pipe
        with open(goal, "wb") as file:
            yield file
        return
    beside = f"{goal}.{os.getpid()}.{uuid.uuid4().hex[:8]}.part"
    try:
        with open(beside, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if os.path.exists(goal):
            shutil.copymode(goal, beside)
        os.replace(beside, goal)
    except BaseException:
        with suppress(FileNotFoundError):
            os.remove(beside)
        raise
    with suppress(OSError):  # not every system can do this with a folder
        folder = os.open(os.path.dirname(goal), os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def checksum(state: Mapping[str, Any]) -> str:
    """Of all that a state holds: names, plain data, and the bytes of its tensors."""
    found = hashlib.sha256()
    plain = {key: state[key] for key in state if key not in ("tensors", "checksum")}
    found.update(json.dumps(plain, sort_keys=True, default=repr).encode())
    for key, tensor in sorted(state["tensors"].items()):
        found.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        found.update(flat.view(torch.uint8).numpy())
    return found.hexdigest()


def write_whole(path: Path, write: Callable[[Any], Any], what: str) -> None:
    """Write a file that is whole, or not there.

    Raises:
        DataError: it cannot be written; it says that what was done before is kept.
    """
    try:
        with replacing(path) as file:
            write(file)
    except (OSError, RuntimeError) as error:  # torch.save raises the latter
        raise DataError(
            f"could not write {path} ({error}): what is finished of {what} is kept there; make "
            "room and call again with the same path"
        ) from error


def require_same_run(folder: Path, run: dict[str, Any], what: str, same: str) -> None:
    """Note in a folder what its numbers are made of, or compare with what is noted there.

    Args:
        folder: made if it is not there.
        run: in plain words and checksums.
        what: the folder holds.
        same: what to pass instead.

    Raises:
        DataError: the folder is another run's, or cannot be written.
    """
    known, text = folder / "run.json", json.dumps(run, sort_keys=True)
    if not known.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(
                f"could not make the folder {folder} ({error}): pass another path"
            ) from error
        write_whole(known, lambda file: file.write(text.encode()), what)
    elif known.read_text() != text:
        before = json.loads(known.read_text())
        changed = sorted(key for key in run if run[key] != before.get(key))
        raise DataError(
            f"expected {folder} to hold {what} of the same run, but {changed} differ: pass another "
            f"path, or {same}"
        )
