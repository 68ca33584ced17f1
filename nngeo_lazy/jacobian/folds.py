"""Where the examples of a batch are among the positions of a layer's output."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

__all__ = ["Axis", "Fold", "candidates"]


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


def candidates(shape: Sequence[int], n: int) -> Iterator[Fold]:
    """Where n examples may be among the leading dimensions of a shape."""
    for axis, size in enumerate(shape):
        if size == n:
            yield Fold(axis)
        elif size % n == 0 and size > 0:
            yield Fold(axis, Axis.OUTER)
            yield Fold(axis, Axis.INNER)
