"""Processes that share the work: the one module that knows torch.distributed.

Local work runs inside `Group.together()`, exchanges run outside. So an error of one process becomes
an error of all, and no process waits for one that has given up.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .errors import DataError, DistributedError

__all__ = [
    "ALONE",
    "Group",
    "Traffic",
    "cut_like",
    "digest",
    "in_processes",
    "owners",
    "refuse_sharded",
    "replicated",
    "seed_of",
    "unwrapped",
    "within_replicas",
]

T = TypeVar("T")
BUCKET_BYTES = 25 * 2**20  # small tensors are sent together up to this size
SHOWN = 300  # characters of another process's error


@dataclass
class Traffic:
    """What a group has exchanged so far.

    Attributes:
        exchanges: of a few numbers or of plain objects, such as whether all went well.
        sums: all-reduced tensors, or buckets of them.
        sends: tensors sent from one process to all others.
        bytes: of the tensors that were summed or sent.
    """

    exchanges: int = 0
    sums: int = 0
    sends: int = 0
    bytes: int = 0


class Group:
    """Processes that make the same calls, each on its share; without a process group, this one.

    Args:
        process_group: of torch.distributed; None is this process alone, which exchanges nothing.
    """

    def __init__(self, process_group: Any = None) -> None:
        self._pg = process_group
        self.size: int = 1 if process_group is None else dist.get_world_size(process_group)
        self.rank: int = 0 if process_group is None else dist.get_rank(process_group)
        self.traffic = Traffic()

    @classmethod
    def of(cls, process_group: Any = None) -> Group:
        """The given process group, or the default one.

        Raises:
            DataError: there is none, or this process does not belong to it.
        """
        if not dist.is_available() or not dist.is_initialized():
            raise DataError(
                "expected a process group, but torch.distributed is not initialised: start the "
                "script with torchrun, and call torch.distributed.init_process_group() first"
            )
        if isinstance(process_group, Group):
            return process_group
        known = dist.group.WORLD if process_group is None else process_group
        if known is dist.GroupMember.NON_GROUP_MEMBER:
            raise DataError(
                "expected a process group that this process belongs to: make the call on its "
                "members alone"
            )
        return cls(known)

    @property
    def members(self) -> list[int]:
        """The ranks of all of them, among all processes."""
        return [0] if self._pg is None else sorted(dist.get_process_group_ranks(self._pg))

    def __deepcopy__(self, memo: Any) -> Group:
        return self  # a process group is a connection

    def __reduce__(self) -> tuple[Any, ...]:
        if self._pg is None:
            return Group, ()
        raise DataError("a process group cannot be pickled: save the operator with ng.save")

    # --- errors -----------------------------------------------------------------------------------

    def together(self, what: str, *details: Any) -> _Together:
        """A scope of local work. At its end every process knows whether all others finished it.

        Args:
            what: the call, in words.
            *details: what must be the same on all processes; numbers or texts.

        Raises:
            DistributedError: on leaving it, another process raised, or makes another call.
        """
        return _Together(self, what, details)

    def agree(self, known: Mapping[str, Any], what: str) -> None:
        """Raise DataError on all processes if they do not have the same texts or numbers."""
        if self.size == 1:
            return
        everyone = self.gather(dict(known))
        for key in dict.fromkeys(key for own in everyone for key in own):
            values = [own.get(key) for own in everyone]
            odd = next((r for r, value in enumerate(values) if value != values[0]), None)
            if odd is not None:
                raise DataError(
                    f"expected every process to make {what} of the same {key}, but rank 0 has "
                    f"{values[0]} and rank {odd} of {self.size} has {values[odd]}"
                )

    @contextmanager
    def _answered(self, what: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # torch.distributed has no narrower class for all of them
            raise DistributedError(
                f"rank {self.rank} of {self.size} had no answer from another process in {what}: "
                "it has died, or it does not make this call. Every process of the group must make "
                "it; under `if rank == 0:` it waits for the others until the time limit of the "
                f"process group ({str(error).splitlines()[0]})"
            ) from error

    # --- exchanges --------------------------------------------------------------------------------

    def gather(self, value: T, what: str = "an exchange") -> list[T]:
        """A plain object of every process, by rank."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        self.traffic.exchanges += 1
        with self._answered(what):
            dist.all_gather_object(found, value, group=self._pg)
        return found

    def same(self, value: T) -> T:
        """The value that rank 0 has."""
        return self.gather(value)[0]

    def numbers(self, own: Sequence[int], what: str) -> list[list[int]]:
        """A few integers of every process, by rank."""
        if self.size == 1:
            return [list(own)]
        mine = torch.tensor(list(own), dtype=torch.int64, device=self._device)
        found = [torch.empty_like(mine) for _ in range(self.size)]
        self.traffic.exchanges += 1
        with self._answered(what):
            dist.all_gather(found, mine, group=self._pg)
            return cast("list[list[int]]", torch.stack(found).tolist())

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their sums over all processes, which have the same bits everywhere."""
        if self.size == 1:
            return
        for bucket in _buckets(tensors):
            flat = bucket[0] if _whole(bucket) else torch.cat([t.reshape(-1) for t in bucket])
            sent = self._there(flat)
            self.traffic.sums += 1
            self.traffic.bytes += sent.nbytes
            with self._answered("a sum"):
                dist.all_reduce(sent, group=self._pg)
            if sent is not bucket[0]:
                _unpack(sent, bucket)

    def send(self, tensors: Sequence[Tensor], owner: int) -> None:
        """Overwrite tensors by those of their owner."""
        if self.size == 1:
            return
        source = dist.get_global_rank(self._pg, owner)
        for bucket in _buckets(tensors):
            flat = bucket[0] if _whole(bucket) else torch.cat([t.reshape(-1) for t in bucket])
            sent = self._there(flat)
            self.traffic.sends += 1
            self.traffic.bytes += sent.nbytes
            with self._answered("an exchange of results"):
                dist.broadcast(sent, source, group=self._pg)
            if sent is not bucket[0]:
                _unpack(sent, bucket)

    def mean(self, value: float) -> float:
        """Of every process's number."""
        total = torch.tensor([value], dtype=torch.float64, device="cpu")
        self.sum_([total])
        return float(total) / self.size

    def collect(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all processes, by rank, of any shapes; on this tensor's device."""
        headers = self.gather((tuple(tensor.shape), tensor.dtype))
        found = [
            tensor.contiguous() if r == self.rank else tensor.new_empty(shape, dtype=dtype)
            for r, (shape, dtype) in enumerate(headers)
        ]
        for r, each in enumerate(found):
            if each.numel():
                self.send([each], r)
        return found

    @property
    def _device(self) -> torch.device:
        """Where tensors must lie to be exchanged, if the backend has only one place for them."""
        nccl = dist.get_backend(self._pg) == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")

    def _there(self, tensor: Tensor) -> Tensor:
        """A tensor if the backend can send it from."""
        return tensor.to(self._device) if self._device.type == "cuda" else tensor


ALONE = Group()


class _Together:
    """See `Group.together`; a class, because it looks at errors of any kind and catches none."""

    def __init__(self, group: Group, what: str, details: tuple[Any, ...]) -> None:
        self._group, self._what, self._details = group, what, details

    def __enter__(self) -> None:
        return None

    def __exit__(self, _: object, error: BaseException | None, *__: object) -> None:
        group = self._group
        if group.size == 1:
            return
        call = f"{self._what}{''.join(f', {each}' for each in self._details)}"
        # Always four numbers, so that processes in different calls see that, and do not hang.
        states = group.numbers([int(error is not None), seed_of(0, call), 0, 0], self._what)
        if all(state == [0, states[0][1], 0, 0] for state in states):
            return
        own = type(error).__name__
        told = None if error is None else (own, f"{own}: {error}"[:SHOWN])
        known = group.gather((call, told), self._what)
        if error is not None:
            return  # this process raises its own error
        for rank, (_, there) in enumerate(known):
            if there is not None:
                raise DistributedError(f"rank {rank} of {group.size}: {there[1]}", there[0])
        odd = next(r for r, (other, _) in enumerate(known) if other != known[0][0])
        raise DistributedError(
            f"expected every process to make the same call with the same vectors, but rank 0 is in "
            f"{known[0][0]}, and rank {odd} of {group.size} in {known[odd][0]}. Random vectors "
            "are the same if they are drawn with seed=, or after one torch.manual_seed on all ranks"
        )


# --- what needs no group --------------------------------------------------------------------------


def owners(costs: Sequence[float], size: int) -> list[int]:
    """Who computes what: the costliest first, each to the one who has least so far.

    At most 4/3 - 1/(3 size) times the least possible time (Graham 1969).

    Example:
        >>> owners([1.0, 5.0, 3.0, 3.0], 2)
        [0, 0, 1, 1]
    """
    loads = [0.0] * size
    found = [0] * len(costs)
    for k in sorted(range(len(costs)), key=lambda k: -costs[k]):
        found[k] = min(range(size), key=lambda r: loads[r])
        loads[found[k]] += costs[k]
    return found


def in_processes() -> bool:
    """Whether this process is one of several that torch.distributed knows."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def seed_of(seed: int, *key: Any) -> int:
    """A seed made from another one and what it is for.

    Example:
        >>> seed_of(3, 1) == seed_of(3, 1), seed_of(3, 1) == seed_of(3, 2)
        (True, False)
    """
    text = ",".join(map(str, (seed, *key)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def digest(tensor: Tensor) -> int:
    """A sum of the tensor's bits: different numbers on two processes have different ones."""
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}
    bits = tensor.detach().contiguous().view(kinds[tensor.element_size()])
    return int(bits.sum(dtype=torch.int64))


def unwrapped(model: nn.Module, group: Group | None) -> nn.Module:
    """The network inside of DistributedDataParallel, whose own forward exchanges buffers.

    Raises:
        DataError: it is in such a wrapper, but the data say nothing of processes.
    """
    if not isinstance(model, DistributedDataParallel):
        return model
    if group is None:
        raise DataError(
            "the model is in DistributedDataParallel, but the data are a plain loader: pass "
            "ng.Distributed(loader) to sum over the data of all ranks, or model.module for this "
            "rank's data alone"
        )
    return cast(nn.Module, model.module)


def cut_like(whole: Tensor, piece: Any) -> Tensor:
    """A tensor that all processes have, in the pieces of a DTensor."""
    tensors: Any = sys.modules["torch.distributed.tensor"]  # who has a DTensor has imported it
    everywhere = [tensors.Replicate()] * piece.device_mesh.ndim
    spread = tensors.DTensor.from_local(whole, piece.device_mesh, everywhere, run_check=False)
    return cast(Tensor, spread.redistribute(piece.device_mesh, piece.placements))


def replicated(model: nn.Module) -> tuple[nn.Module, Group]:
    """The network inside of DistributedDataParallel, and its processes; else the model, alone."""
    if isinstance(model, DistributedDataParallel):
        return cast(nn.Module, model.module), Group(model.process_group)
    return model, ALONE


def within_replicas(model: nn.Module) -> bool:
    """Whether DistributedDataParallel runs a model, or one that has it as a part, right now."""
    wrapper = getattr(DistributedDataParallel, "_active_ddp_module", None)
    if wrapper is None or dist.get_world_size(wrapper.process_group) == 1:
        return False
    return any(module is model for module in wrapper.modules())


def refuse_sharded(model: nn.Module) -> None:
    """Raise DataError if parameters lie in pieces on several processes.

    A recorded forward would see other tensors than the parameters, and every pass would be an
    exchange, which uneven shares of data would leave hanging.
    """
    for name, p in model.named_parameters():
        pieces = hasattr(p, "device_mesh") and hasattr(p, "placements")  # DTensor, not imported
        if pieces or "_flat_param" in name:
            kind = "a DTensor" if pieces else "a flat parameter of FSDP"
            raise DataError(
                f"expected whole parameters in every process, but {name} is {kind} (fully_shard, "
                "tensor parallelism): load the state dict into a model that is not sharded "
                "(torch.distributed.checkpoint.state_dict.get_model_state_dict with "
                "StateDictOptions(full_state_dict=True)), and pass that one"
            )


def _whole(bucket: Sequence[Tensor]) -> bool:
    return len(bucket) == 1 and bucket[0].is_contiguous()


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one dtype and device, small ones together."""
    waiting: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.numel() == 0:
            continue
        bucket = waiting.setdefault((tensor.dtype, tensor.device), [])
        if bucket and sum(t.nbytes for t in bucket) + tensor.nbytes > BUCKET_BYTES:
            yield waiting[tensor.dtype, tensor.device]
            waiting[tensor.dtype, tensor.device] = [tensor]
        else:
            bucket.append(tensor)
    yield from waiting.values()


def _unpack(flat: Tensor, bucket: Sequence[Tensor]) -> None:
    sizes = [t.numel() for t in bucket]
    for tensor, part in zip(bucket, flat.reshape(-1).split(sizes), strict=True):
        tensor.copy_(part.view(tensor.shape))
