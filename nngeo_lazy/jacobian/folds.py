"""Where the examples of a batch are among the positions of a layer's output."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor

__all__ = ["Axis", "Fold", "Ragged", "candidates"]


class Axis(Enum):
    """How an axis holds the examples: alone, or with positions behind or before them."""

    WHOLE = "whole"
    OUTER = "outer"
    INNER = "inner"


@dataclass(frozen=True)
class Fold:
    """Where the examples are among the leading dimensions of a layer's output."""

    axis: int
    kind: Axis = Axis.WHOLE

    def apply(self, tensor: Tensor, leading: int, n: int, offset: int = 0) -> Tensor:
        """(*offset, *leading, *features) -> (*offset, N, T, *features)."""
        tensor, leading = self.front(tensor, n, offset), leading + (self.kind is not Axis.WHOLE)
        if leading == 1:
            return tensor.unsqueeze(offset + 1)
        return tensor.flatten(offset + 1, offset + leading - 1)

    def front(self, tensor: Tensor, n: int, offset: int = 0) -> Tensor:
        """The same with the examples in front, and what was folded into their axis behind it."""
        axis = offset + self.axis
        if self.kind is Axis.OUTER:
            tensor = tensor.unflatten(axis, (n, -1))
        elif self.kind is Axis.INNER:
            tensor = tensor.unflatten(axis, (-1, n))
            axis += 1
        return tensor.movedim(axis, offset)

    def back(self, tensor: Tensor) -> Tensor:
        """One example, (*the others), as a batch of one in the order that `front` found."""
        if self.kind is Axis.WHOLE:
            return tensor.unsqueeze(self.axis)
        return tensor  # what was folded is the whole axis then

    def fits(self, shape: torch.Size, n: int) -> bool:
        """Whether a shape has room for n examples there."""
        size = shape[self.axis] if self.axis < len(shape) else 0
        return size == n if self.kind is Axis.WHOLE else size > 0 and size % n == 0


@dataclass(frozen=True, eq=False)
class Ragged(Fold):
    """Positions that the examples own in different numbers: tokens that are packed or routed.

    Attributes:
        index: the positions (N, T) that each example owns, among the flattened leading dimensions;
            -1 where an example owns fewer than T.
        sizes: of these dimensions.
    """

    index: Tensor = field(default_factory=lambda: torch.empty(0, 0, device="cpu"))
    sizes: tuple[int, ...] = ()

    @classmethod
    def of(cls, owners: Tensor, n: int, sizes: Sequence[int]) -> Ragged:
        """From the example (positions,) that owns each position; -1 if none does."""
        counts = torch.bincount(owners[owners >= 0], minlength=n)
        order = owners.argsort(stable=True)[int((owners < 0).sum()) :]
        start = counts.cumsum(0) - counts
        place = torch.arange(len(order), device=owners.device) - start[owners[order]]
        index = owners.new_full((n, max(1, int(counts.max()))), -1)
        index[owners[order], place] = order
        return cls(0, Axis.WHOLE, index, tuple(sizes))

    @property
    def exist(self) -> Tensor:
        """Which of the T positions each example has, (N, T)."""
        return self.index >= 0

    def apply(self, tensor: Tensor, leading: int, n: int, offset: int = 0) -> Tensor:
        """(*offset, *leading, *features) -> (*offset, N, T, *features), zero at missing ones."""
        flat = tensor.flatten(offset, offset + leading - 1)
        taken = flat.index_select(offset, self.index.clamp_min(0).flatten())
        taken = taken.unflatten(offset, self.index.shape)
        behind = taken.dim() - offset - 2
        exist = self.exist.view(*self.index.shape, *(1,) * behind)
        owned: Tensor = taken.masked_fill_(~exist, 0)
        return owned

    def owned(self, example: int) -> Tensor:
        """The positions of one example."""
        return self.index[example][self.exist[example]]

    def fits(self, shape: torch.Size, n: int) -> bool:
        """Whether these may be the positions of n examples."""
        return n == len(self.index) and tuple(shape[: len(self.sizes)]) == self.sizes


def candidates(shape: Sequence[int], n: int) -> Iterator[Fold]:
    """Where n examples may be among the leading dimensions of a shape."""
    for axis, size in enumerate(shape):
        if size == n:
            yield Fold(axis)
        elif size % n == 0 and size > 0:
            yield Fold(axis, Axis.OUTER)
            yield Fold(axis, Axis.INNER)
