"""Data that several processes share: which batches are whose."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils import data as torch_data

from .collectives import Group, digest, seed_of
from .errors import DataError

__all__ = ["Distributed", "refuse_processes"]


class Distributed:
    """A loader whose examples are shared out over the processes of a group.

    Pass it in the place of a loader: every process then makes the same call, and has the matrix of
    all examples. Nothing is exchanged while the data are read; sums are exchanged once after a
    pass. Shares may be of any sizes, and empty.

    Args:
        loader: the same on all processes (a list of batches, or a `DataLoader` that does not
            shuffle), of which rank r of W takes the batches r, r + W, ...; or, if it is a share
            already, this process's own.
        group: a process group of torch.distributed; by default all processes.
        own: whether the loader is this process's share. By default it is if its sampler is one for
            processes, such as `DistributedSampler`, and is not if it is a list or a `DataLoader`.

    Raises:
        DataError: torch.distributed is not initialised; the sampler repeats examples to make shares
            equal, which would count them twice; the loader shuffles; or it does not say whose its
            batches are.

    Example:
        >>> import torch, nngeo_lazy as ng  # doctest: +SKIP
        >>> torch.distributed.init_process_group("gloo")  # doctest: +SKIP
        >>> F = ng.FIM(model, ng.Distributed(loader), "kfac")  # doctest: +SKIP
    """

    def __init__(self, loader: Any, group: Any = None, own: bool | None = None) -> None:
        self.group = Group.of(group)
        self.loader = loader
        self.own = _is_own(loader, own)
        if self.own:
            _require_share(loader, self.group)
        else:
            _require_order(loader)

    def share(self, batches: Iterable[Any]) -> Iterable[Any]:
        """This process's batches among those of the loader."""
        rank, size = self.group.rank, self.group.size
        if self.own:
            return batches
        if isinstance(batches, Sequence):
            return batches[rank::size]
        if type(batches) is torch_data.DataLoader:
            strided: Iterable[Any] = _strided(batches, rank, size)
            return strided
        return _Every(batches, rank, size)

    def key(self, k: int) -> tuple[int, ...]:
        """Which batch the k-th of this process is: its number among all, or (rank, number)."""
        rank, size = self.group.rank, self.group.size
        return (rank, k) if self.own else (rank + k * size,)

    def described(self, batches: Iterable[Any]) -> dict[str, Any]:
        """What must be the same on all processes, as texts and numbers."""
        if self.own:
            return {"kind of data": "shares"}
        known: dict[str, Any] = {"kind of data": type(batches).__name__}
        if isinstance(batches, Sequence):
            known["number of batches"] = len(batches)
            leaves = pytree.tree_leaves([batches[0], batches[-1]])
            known["order of batches"] = [digest(x) for x in leaves if isinstance(x, Tensor)]
        elif isinstance(batches, torch_data.DataLoader):
            sampler = batches.batch_sampler or batches.sampler
            if isinstance(sampler, Iterable) and not _streams(batches):
                known["order of examples"] = seed_of(0, *sampler)
        return known


def refuse_processes(loader: Any, what: str, instead: str) -> None:
    """Raise DataError if a loader is shared out over several processes."""
    if isinstance(loader, Distributed) and loader.group.size > 1:
        raise DataError(
            f"{what} has rows of single examples, and is made in one process: {instead}"
        )


def _is_own(loader: Any, own: bool | None) -> bool:
    """Whether a loader is this process's share."""
    if own is not None:
        return own
    if _sampler(loader) is not None:
        return True
    if _streams(loader):
        raise DataError(
            "an IterableDataset does not say whose its examples are: pass ng.Distributed(loader, "
            "own=True) if it gives every process its own ones, or own=False if it gives all of "
            "them the same"
        )
    plain = isinstance(loader, (Sequence, Tensor, dict)) or hasattr(loader, "items")
    if plain or type(loader) is torch_data.DataLoader:
        return False
    raise DataError(
        f"a {type(loader).__name__} does not say whose its batches are: pass ng.Distributed("
        "loader, own=True) if it gives every process its own ones, or own=False if it gives all "
        "of them the same"
    )


def _streams(loader: Any) -> bool:
    return isinstance(getattr(loader, "dataset", None), torch_data.IterableDataset)


def _sampler(loader: Any) -> Any:
    """The sampler that shares out examples over processes, if a loader has one."""
    for name in ("sampler", "batch_sampler"):
        sampler = getattr(loader, name, None)
        for each in (sampler, getattr(sampler, "sampler", None)):
            if hasattr(each, "num_replicas") or hasattr(each, "num_processes"):
                return each
    return None


def _require_share(loader: Any, group: Group) -> None:
    """Refuse a sampler of another group, or one that repeats examples."""
    sampler = _sampler(loader)
    if sampler is None:
        return
    of_torch = hasattr(sampler, "num_replicas")  # else accelerate's
    size = sampler.num_replicas if of_torch else sampler.num_processes
    rank = sampler.rank if of_torch else sampler.process_index
    if (rank, size) != (group.rank, group.size):
        raise DataError(
            f"expected a share for rank {group.rank} of {group.size}, but the sampler is for rank "
            f"{rank} of {size}: make both from one process group"
        )
    count = len(loader.dataset)
    if of_torch:
        repeated = 0 if sampler.drop_last else sampler.total_size - count
    else:
        whole = getattr(sampler, "batch_size", 1) * size
        pads = getattr(sampler, "even_batches", False) and not getattr(sampler, "drop_last", False)
        repeated = -count % whole if pads else 0
    if repeated > 0:
        raise DataError(
            f"the {type(sampler).__name__} repeats {repeated} of {count} examples so that all "
            "shares are equal, and a sum would count them twice: pass ng.Distributed(loader) of "
            "a plain DataLoader, which shares out batches without repeating any, or a sampler "
            "that does not pad"
        )


def _require_order(loader: Any) -> None:
    if isinstance(getattr(loader, "sampler", None), torch_data.RandomSampler):
        raise DataError(
            "Distributed shares out the batches of a loader that is the same on every process, but "
            "this one shuffles: pass shuffle=False, or a DistributedSampler(shuffle=True)"
        )


def _strided(loader: torch_data.DataLoader[Any], start: int, step: int) -> Any:
    """The same loader of every step-th batch, which loads no other."""
    whole = loader.batch_sampler is None  # the data set's items are batches
    if _streams(loader):
        return _Every(loader, start, step)
    sampler = _Every(loader.sampler if whole else loader.batch_sampler, start, step)
    how: dict[str, Any] = {"sampler": sampler, "batch_size": None} if whole else {}
    how = how or {"batch_sampler": sampler}
    return torch_data.DataLoader(
        loader.dataset,
        **how,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
    )


class _Every:
    """Every step-th element of what can be iterated over again and again."""

    def __init__(self, inner: Any, start: int, step: int) -> None:
        self._inner, self._start, self._step = inner, start, step

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self._inner), self._start, None, self._step)

    def __len__(self) -> int:
        return len(range(self._start, len(self._inner), self._step))
