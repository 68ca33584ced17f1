"""Whether data are what they were: the same batches on every pass, in the same order.

A loader draws from torch's generators what it drew on the first pass, so that shuffling repeats.
What nobody can repeat (numpy's random numbers, augmentation in workers that stay alive) is found by
comparing fingerprints.
"""

from __future__ import annotations

import random
import sys
import threading
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils import data as torch_data

from .errors import DataError

__all__ = ["Passes", "Streams", "fingerprint", "refuse_shuffling"]

Fingerprint: TypeAlias = dict[str, int]
LOOKED_AT = 1000  # indices of a sampler, to see whether it repeats
RANDOM = (
    torch_data.RandomSampler,
    torch_data.SubsetRandomSampler,
    torch_data.WeightedRandomSampler,
)
_DEPTH = 8  # how far objects inside of objects are followed


def fingerprint(batch: Any) -> Fingerprint:
    """A checksum of every tensor, number and text of a batch, by where it is.

    Example:
        >>> x = torch.zeros(2)
        >>> fingerprint((x, "a")) == fingerprint((x.clone(), "a")), list(fingerprint((x, "a")))
        (True, ['[0]', '[1]'])
    """
    found: Fingerprint = {}
    _collect(batch, "", found, 0)
    return found


def _collect(value: Any, path: str, found: Fingerprint, depth: int) -> None:
    if isinstance(value, PackedSequence):
        value = (value.data, value.batch_sizes)
    if isinstance(value, Tensor):
        found[path] = _of_tensor(value)
    elif isinstance(value, (str, bytes, int, float, complex, type(None), Set)):
        found[path] = zlib.crc32(repr(value).encode())
    elif depth >= _DEPTH:
        return
    elif isinstance(value, Mapping):
        for key in value:
            _collect(value[key], f"{path}[{key!r}]", found, depth + 1)
    elif isinstance(value, Sequence):
        for k, entry in enumerate(value):
            _collect(entry, f"{path}[{k}]", found, depth + 1)
    elif hasattr(value, "__array_interface__"):  # a numpy array
        found[path] = zlib.crc32(repr(value.shape).encode() + value.tobytes())
    elif hasattr(value, "__dict__"):
        for key, entry in vars(value).items():
            _collect(entry, f"{path}.{key}", found, depth + 1)


def _of_tensor(tensor: Tensor) -> int:
    tensor = tensor.detach()
    if tensor.is_nested or tensor.layout is not torch.strided:
        parts = tensor.unbind() if tensor.is_nested else (tensor.to_dense(),)
        return zlib.crc32(repr([_of_tensor(part) for part in parts]).encode())
    head = zlib.crc32(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    flat = tensor.cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return zlib.crc32(flat.view(torch.uint8).numpy().data, head) if flat.numel() else head


class Passes:
    """The fingerprints of the first pass, which later ones are held against."""

    def __init__(self) -> None:
        self._first: list[Fingerprint] = []
        self._complete = False

    def compare(self, k: int, batch: Any) -> None:
        """Note batch k, or raise DataError if it was another one on an earlier pass."""
        found = fingerprint(batch)
        if k == len(self._first) and not self._complete:
            self._first.append(found)
        elif k >= len(self._first):
            raise DataError(self._unequal(f"more than {len(self._first)}"))
        elif found != self._first[k]:
            raise DataError(self._changed(k, found))

    def finish(self, count: int) -> None:
        """A pass ended."""
        if self._complete and count != len(self._first):
            raise DataError(self._unequal(str(count)))
        self._complete = True

    def _unequal(self, given: str) -> str:
        return (
            f"expected the {len(self._first)} batches of the first pass on every pass, but the "
            f"loader gave {given}: pass one of a fixed length, or list(...) of its batches"
        )

    def _changed(self, k: int, found: Fingerprint) -> str:
        before = self._first[k]
        if found in self._first:
            what = f"it is batch {self._first.index(found)} of the first pass"
        else:
            keys = [key for key in {**before, **found} if before.get(key) != found.get(key)]
            what = f"other contents in batch{', batch'.join(keys[:3])}"
        return (
            f"expected the same batches on every pass, but batch {k} changed since the first pass "
            f"({what}): random augmentation, or an order that is drawn anew? Draw it once, and "
            "pass list(...) of the batches, or a DataLoader that does not shuffle"
        )


class Streams:
    """The random numbers that a loader draws: from the same state on every pass.

    Outside of its steps, the generators are as they were.

    Args:
        own: generators of the loader.
        seed: of torch's default generator, on the CPU; by default its state of now.
    """

    def __init__(self, own: Sequence[torch.Generator], seed: int | None = None) -> None:
        self._generators = [torch.default_generator, *own]
        self._states = [generator.get_state() for generator in self._generators]
        if seed is not None:
            self._states[0] = torch.Generator().manual_seed(seed).get_state()

    def __getstate__(self) -> dict[str, Any]:
        """Without the default generator: a copy, in another process too, draws from its own."""
        return {**vars(self), "_generators": self._generators[1:]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _generators=[torch.default_generator, *state["_generators"]])

    def over(self, loader: Iterable[Any]) -> Iterator[Any]:
        """One pass."""
        states, steps, end = self._states, None, object()
        while True:
            with _drawing:
                before = [generator.get_state() for generator in self._generators]
                try:
                    self._set(states)
                    steps = iter(loader) if steps is None else steps
                    batch = next(steps, end)
                    states = [generator.get_state() for generator in self._generators]
                finally:
                    self._set(before)
            if batch is end:
                return
            yield batch

    def _set(self, states: Sequence[Tensor]) -> None:
        for generator, state in zip(self._generators, states, strict=True):
            generator.set_state(state)


_drawing = threading.RLock()  # the default generator is one for all threads


def refuse_shuffling(loader: Any, what: str) -> None:
    """Raise DataError if a loader has another order on every pass, and the order matters.

    Samplers that go through the data in order are believed by their type, and so are lists;
    of others, the first indices or the first batch are drawn twice.
    """
    samplers = _samplers(loader)
    if any(isinstance(sampler, RANDOM) for sampler in samplers) or not _repeats(loader, samplers):
        raise DataError(
            f"{what} has a row for each example, in the loader's order, but the loader shuffles: "
            "pass shuffle=False"
        )


def _samplers(loader: Any) -> list[Any]:
    batched = getattr(loader, "batch_sampler", None)
    inner = getattr(loader, "sampler", None) if batched is None else batched
    found = [] if inner is None else [inner]
    while found and getattr(found[-1], "sampler", None) is not None:
        found.append(found[-1].sampler)
    return found


def _repeats(loader: Any, samplers: Sequence[Any]) -> bool:
    known = (torch_data.SequentialSampler, torch_data.BatchSampler)
    stream = isinstance(getattr(loader, "dataset", None), torch_data.IterableDataset)
    if samplers and not stream and all(type(sampler) in known for sampler in samplers):
        return True
    if isinstance(loader, (Tensor, Mapping, Sequence, Iterator, torch_data.Dataset)):
        return True  # in order, or refused elsewhere
    if not hasattr(loader, "__iter__"):
        return True
    with _unmoved(getattr(each, "generator", None) for each in (loader, *samplers)):
        if samplers and not stream:
            first, again = (list(islice(samplers[0], LOOKED_AT)) for _ in range(2))
            return first == again
        one, other = ([fingerprint(batch) for batch in islice(loader, 1)] for _ in range(2))
        return one == other


@contextmanager
def _unmoved(generators: Iterable[Any]) -> Iterator[None]:
    """Behind it, all random numbers are what they would have been."""
    own = [g for g in generators if isinstance(g, torch.Generator)]
    states, python = [g.get_state() for g in own], random.getstate()
    numpy = sys.modules.get("numpy")
    drawn = None if numpy is None else numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        for generator, state in zip(own, states, strict=True):
            generator.set_state(state)
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(drawn)
