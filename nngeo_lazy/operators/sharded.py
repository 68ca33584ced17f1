"""Blocks that several processes share out: each has some, and all make every call together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeGuard, TypeVar, cast

import torch
from torch import Tensor

from ..collectives import Group, digest, seed_of
from ..errors import DataError, DistributedError, UnsupportedLayerError
from . import rules
from .base import BaseLinearOperator, Krylov
from .block_diagonal import BlockDiagonalLinearOperator
from .damping import Damping
from .info import Info

__all__ = ["AbsentLinearOperator", "ShardedBlockDiagonalLinearOperator", "shared_out"]

Result = TypeVar("Result")


class ShardedBlockDiagonalLinearOperator(BlockDiagonalLinearOperator):
    r"""A block-diagonal matrix of which each process of a group has some blocks.

    .. math:: F v = \sum_r \sum_{b \in r} P_b^T B_b P_b v

    All processes make every call with the same vectors, and have the same results: what a process
    computes with its blocks is summed over the group, and zero elsewhere. One vector is exchanged
    in a product or a solve, nothing in `repr`, `report` and whatever makes an operator of
    operators. Draws are seeded by block, so that they do not depend on the number of processes.

    Args:
        *blocks: operators, or an `AbsentLinearOperator` if another process has it.
        group: the processes.
        info: what is known besides the numbers.
        names: of the blocks.
        layouts: where each block lies in the flat vector.
    """

    def __init__(self, *blocks: Any, group: Group, **fields: Any) -> None:
        super().__init__(*blocks, group=group, **fields)
        self.group = group

    @property
    def owners(self) -> tuple[int, ...]:
        """The process that has each block."""
        ranks = [getattr(block, "owner", self.group.rank) for block in self.members]
        return tuple(ranks)

    def share(self, other: BlockDiagonalLinearOperator) -> BlockDiagonalLinearOperator:
        """Another operator over the same blocks, shared out as this one is."""
        if isinstance(other, ShardedBlockDiagonalLinearOperator):
            return other
        return shared_out(other, self.owners, self.group)

    def same_blocks(self, other: BaseLinearOperator) -> TypeGuard[BlockDiagonalLinearOperator]:
        """Whether another operator has the same blocks; if it is shared out, alike.

        Raises:
            DataError: its blocks lie on other processes.
        """
        if not super().same_blocks(other):
            return False
        if isinstance(other, ShardedBlockDiagonalLinearOperator) and other.owners != self.owners:
            raise DataError(
                "expected two operators whose blocks lie on the same processes: build both with "
                "the same representation, parameters and group"
            )
        return True

    def _each(
        self,
        function: Callable[[int, BaseLinearOperator], Result],
        absent: Callable[[int, BaseLinearOperator], Result],
        *vectors: Tensor,
    ) -> list[Result]:
        def chosen(k: int, block: BaseLinearOperator) -> Result:
            away = isinstance(block, AbsentLinearOperator)
            return absent(k, block) if away else function(k, block)

        bits = [f"{tuple(v.shape)} {digest(v)}" for v in vectors]
        try:
            with self.group.together("a call of a sharded operator", *bits):
                return super()._each(chosen, absent)
        except DistributedError as error:
            if error.kind == UnsupportedLayerError.__name__:  # every process tries the next way
                raise UnsupportedLayerError(str(error)) from error
            raise

    def _summed(self, own: Tensor) -> Tensor:
        return cast(Tensor, cast(Any, _Summed).apply(own, self.group))

    def _zeros(self, block: BaseLinearOperator, shape: torch.Size, *links: Tensor) -> Tensor:
        zeros = super()._zeros(block, shape)
        return _linked(zeros, cast(AbsentLinearOperator, block).like, *links)

    def _copied(self, tensor: Tensor) -> Tensor:
        if not (tensor.requires_grad and torch.is_grad_enabled()):
            return tensor
        return cast(Tensor, cast(Any, _Copied).apply(tensor, self.group))

    def _generators(self, generator: torch.Generator | None) -> list[torch.Generator | None]:
        drawn = (
            int(torch.randint(2**62, (), device="cpu"))
            if generator is None
            else generator.initial_seed()
        )
        seed = self.group.same(drawn)
        device = self.device
        return [
            torch.Generator(device=device).manual_seed(seed_of(seed, k))
            for k in range(len(self.members))
        ]

    def _kind(self) -> str:
        return f"sharded {super()._kind()}"


def shared_out(
    F: BlockDiagonalLinearOperator, owners: Sequence[int], group: Group
) -> ShardedBlockDiagonalLinearOperator:
    """The same matrix, of which this process keeps the blocks that it owns."""
    blocks = [
        block if owner == group.rank else AbsentLinearOperator.of(block, owner)
        for block, owner in zip(F.members, owners, strict=True)
    ]
    fields = {"info": F.info, "names": F.names, "layouts": F.layouts}
    return ShardedBlockDiagonalLinearOperator(*blocks, group=group, **fields)


class AbsentLinearOperator(BaseLinearOperator):
    """A block that another process has: its size and its kind, and no numbers.

    In a backward pass, all processes must come to the same exchanges. So what is absent stays in
    the graph of what it was damped or scaled with, with gradients that are zero.

    Args:
        like: an empty tensor of its dtype, on this process's device; its graph is the block's.
        size: rows.
        kind: how a report names it.
        owner: the process that has it.
        info: what is known besides the numbers.
    """

    def __init__(
        self, like: Tensor, *, size: int, kind: str, owner: int, info: Info | None = None
    ) -> None:
        super().__init__(like, size=size, kind=kind, owner=owner, info=info)
        self.like, self._rows, self._name, self.owner = like, size, kind, owner

    @classmethod
    def of(cls, block: BaseLinearOperator, owner: int) -> AbsentLinearOperator:
        """What the other processes have of a block."""
        like = torch.empty(0, dtype=block.dtype, device=block.device)
        return cls(like, size=block.shape[-1], kind=block._kind(), owner=owner)

    def _away(self, *_: Any) -> Any:
        raise UnsupportedLayerError(
            f"the numbers of this block lie on rank {self.owner}: call the member of the whole "
            "sharded operator, on all ranks"
        )

    def _size(self) -> torch.Size:
        return torch.Size((self._rows, self._rows))

    def _kind(self) -> str:
        return f"{self._name}, on rank {self.owner}"

    def _apply(self, v: Tensor) -> Tensor:
        return cast(Tensor, self._away())

    def _solve_columns(self, v: Tensor, krylov: Krylov) -> Tensor:
        return cast(Tensor, self._away())

    def _principal(self, index: Tensor, columns: Tensor | None, info: Info) -> BaseLinearOperator:
        return cast(BaseLinearOperator, self._with(size=len(index)))

    def _restrict(self, names: tuple[str, ...]) -> BaseLinearOperator:
        return cast(BaseLinearOperator, self._away())

    def _linked(self, tensor: Tensor) -> BaseLinearOperator:
        return self.__class__(_linked(self.like, tensor), **self._kwargs)

    def _damp(self, damping: Damping, method: str) -> BaseLinearOperator:
        return self._linked(damping.value)

    def _scale(self, c: float | Tensor) -> BaseLinearOperator:
        return self._linked(c) if isinstance(c, Tensor) else self

    def _power(self, p: float) -> BaseLinearOperator:
        return self

    def _pinv(self, rcond: float | None) -> BaseLinearOperator:
        return self

    def _inverse(self) -> BaseLinearOperator:
        return self

    def _transpose_nonbatch(self) -> BaseLinearOperator:
        return self

    def _norm(self, ord: Any) -> Tensor:
        return cast(Tensor, self._away())

    def _draw(self, n: int, generator: torch.Generator | None) -> Tensor:
        return cast(Tensor, self._away())

    _diagonal = _trace = _logdet = _eigensystem = _dense = _away


@rules.sums.register(BlockDiagonalLinearOperator, ShardedBlockDiagonalLinearOperator)
def _(A: BlockDiagonalLinearOperator, B: ShardedBlockDiagonalLinearOperator, info: Info) -> Any:
    return B.share(A)._joined(B, lambda a, b: a + b, info) if B.same_blocks(A) else NotImplemented


@rules.products.register(BlockDiagonalLinearOperator, ShardedBlockDiagonalLinearOperator)
def _(A: BlockDiagonalLinearOperator, B: ShardedBlockDiagonalLinearOperator, info: Info) -> Any:
    return B.share(A)._joined(B, lambda a, b: a @ b, info) if B.same_blocks(A) else NotImplemented


class _Summed(torch.autograd.Function):
    """The sum over processes of what each has computed; each gets the gradient of the sum."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, group: Group) -> Tensor:
        ctx.group = group
        total = own.detach().clone(memory_format=torch.contiguous_format)
        group.sum_([total])
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return cast(Any, _Copied).apply(grad, ctx.group), None


class _Copied(torch.autograd.Function):
    """A tensor that all processes have; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return cast(Any, _Summed).apply(grad, ctx.group), None


class _Linked(torch.autograd.Function):
    """A tensor in the graph of others, of which it does not depend."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, *links: Tensor) -> Tensor:
        ctx.save_for_backward(*links)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        links = ctx.saved_tensors
        return grad, *(_linked(torch.zeros_like(link), grad, *links) for link in links)


def _linked(tensor: Tensor, *links: Tensor) -> Tensor:
    wanted = [link for link in links if link.requires_grad]
    if not (wanted and torch.is_grad_enabled()):
        return tensor
    return cast(Tensor, cast(Any, _Linked).apply(tensor, *wanted))
