"""Files that are whole: written beside and replaced, with a checksum of what they hold."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import IO, Any

import torch

__all__ = ["checksum", "replacing"]


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
