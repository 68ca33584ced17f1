"""Kernels on disk: made a panel at a time, so that a run goes on where it ended."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .collectives import digest
from .data import Batches
from .disk import require_same_run, write_whole
from .errors import DataError
from .fingerprints import fingerprint
from .operators import BaseLinearOperator, DenseLinearOperator
from .operators.dense import MatrixLinearOperator
from .operators.factored import FactoredJacobianLinearOperator
from .operators.kernel import KernelLinearOperator
from .operators.panels import START, Place, Rows

__all__ = ["MATRIX", "written"]

MATRIX = "kernel.npy"
_DONE, _ROWS = "done.json", "rows-"


def written(
    kernel: KernelLinearOperator, folder: str | Path, model: list[Tensor], inputs: list[Batches]
) -> BaseLinearOperator:
    """The kernel in a folder, memory-mapped; what an earlier run has done is not done again.

    Args:
        kernel: of Jacobians whose rows are known.
        folder: made if it is not there.
        model: parameters and buffers of the network.
        inputs: what the Jacobians are made from.

    Raises:
        DataError: the folder holds another kernel, or it cannot be written.
    """
    folder = Path(folder)
    dtype = torch.promote_types(kernel.dtype, torch.float32)
    shape = tuple(kernel.shape)
    run: dict[str, Any] = {"shape": list(shape), "dtype": str(dtype), "outputs": kernel.kind}
    run["parameters"] = list(kernel.left.space.names)  # type: ignore[union-attr]
    run["model"] = [digest(tensor) for tensor in model]
    run["inputs"] = [_checksum(batches) for batches in inputs]
    require_same_run(folder, run, "a kernel", "the same model and inputs in the same batches")
    path, done = folder / MATRIX, folder / _DONE
    place = _finished(path, done)
    if place.row == 0:
        _reserve(path, shape, dtype)
    for left in folder.glob(f"{_ROWS}*"):  # of a run that was killed
        shutil.rmtree(left, ignore_errors=True)
    if place.row < shape[0]:
        with TemporaryDirectory(prefix=_ROWS, dir=folder) as beside:
            for after, tiles in kernel.panels(place, _Kept(Path(beside))) or ():
                for tile in tiles:
                    out = torch.from_numpy(np.load(path, mmap_mode="r+"))  # anew: pages are let go
                    tile.write(out)
                    del out
                with open(path, "rb+") as file:
                    os.fsync(file.fileno())
                write_whole(done, partial(_dump, list(after)), "a kernel")
    matrix = torch.from_numpy(np.load(path, mmap_mode="c"))  # changes stay in memory
    symmetric = kernel.known_symmetric
    return DenseLinearOperator(matrix) if symmetric else MatrixLinearOperator(matrix)


class _Kept:
    """Rows that are made once, and then read from a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._fields: dict[tuple[int, int], dict[str, Any]] = {}  # all but the tensors
        self._counts: dict[int, int] = {}  # how many batches there are, once it is known

    def __call__(self, rows: Rows, which: int) -> Rows:
        return partial(self._batches, rows, which)

    def _batches(
        self, rows: Rows, which: int, start: int
    ) -> Iterator[FactoredJacobianLinearOperator]:
        while (which, start) in self._fields:
            tensors = torch.load(self._path(which, start), mmap=True, weights_only=True)
            yield FactoredJacobianLinearOperator(*tensors, **self._fields[which, start])
            start += 1
        if start == self._counts.get(which):
            return
        with closing(rows(start)) as fresh:  # type: ignore[type-var]
            for J in fresh:
                save = partial(torch.save, list(J._args))
                write_whole(self._path(which, start), save, "the rows of a kernel")
                self._fields[which, start] = J._kwargs
                yield J
                start += 1
        self._counts[which] = start

    def _path(self, which: int, number: int) -> Path:
        return self._folder / f"{which}-{number:08d}.pt"


def _finished(path: Path, done: Path) -> Place:
    """Behind the panels that are in the file."""
    if not (path.exists() and done.exists()):
        return START
    return Place(*json.loads(done.read_text()))


def _reserve(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """A file of zeros that has its room: a mapped page without it would end the process."""
    size = int(np.prod(shape)) * dtype.itemsize
    try:
        if shutil.disk_usage(path.parent).free < size:
            raise OSError(f"{shutil.disk_usage(path.parent).free:,} bytes are free")
        kind = str(dtype).removeprefix("torch.")
        np.lib.format.open_memmap(path, mode="w+", dtype=kind, shape=shape).flush()
        if hasattr(os, "posix_fallocate"):
            with open(path, "rb+") as file:
                os.posix_fallocate(file.fileno(), 0, os.path.getsize(path))
    except OSError as error:
        path.unlink(missing_ok=True)
        raise DataError(
            f"could not reserve {size:,} bytes for a kernel of {shape} in {path.parent} ({error}): "
            "make room and call again, pass a path on another disk, or outputs='mean'"
        ) from error


def _checksum(batches: Batches) -> int:
    """Of all inputs, by batch; labels and what else is in a batch count too."""
    found = 0
    for raw in batches.loader:
        found = zlib.crc32(json.dumps(sorted(fingerprint(raw).items())).encode(), found)
    return found


def _dump(value: Any, file: Any) -> None:
    file.write(json.dumps(value).encode())
