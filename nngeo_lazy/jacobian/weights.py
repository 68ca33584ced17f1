"""Derived weights: what a model makes of its parameters before it meets data.

Two kinds of tensors flow through a forward pass. *Data* depend on the batch. *Derived weights*
depend on parameters and constants alone: a chunk of a fused projection, a table read at fixed
indices, or a weight that is normalised. A derived weight that only selects entries of one parameter
knows which (`Selection`). Autograd takes rows of any other one back to its parameters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

__all__ = ["Selection", "Weight", "derived", "pull_back", "sources_of"]

COPIES = frozenset(
    {"contiguous", "clone", "to", "float", "double", "half", "bfloat16", "type", "type_as"}
)


@dataclass(frozen=True)
class Selection:
    """Entries of one parameter, as strides into its numbers.

    Attributes:
        name: of the parameter.
        start: the first entry.
        shape: of the selection.
        stride: of each dimension.
    """

    name: str
    start: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def size(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    @property
    def contiguous(self) -> bool:
        """Whether the entries lie side by side, in row-major order."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return True

    @property
    def flipped(self) -> Selection | None:
        """The transpose, where that lies side by side."""
        if len(self.shape) != 2 or self.contiguous:
            return None
        other = replace(self, shape=self.shape[::-1], stride=self.stride[::-1])
        return other if other.contiguous else None

    @property
    def distinct(self) -> bool:
        """Whether no entry is taken twice, as far as strides tell."""
        reach = 1
        for stride, size in sorted(zip(self.stride, self.shape, strict=True)):
            if size > 1:
                if stride < reach:
                    return False
                reach = stride * size
        return True

    def index(self, total: int, device: torch.device) -> Tensor:
        """The entries (size,) in row-major order, of a parameter of `total` numbers."""
        every = torch.arange(total, device=device)
        return every.as_strided(self.shape, self.stride, self.start).reshape(-1)


@dataclass(frozen=True)
class Weight:
    """A parameter, or a tensor that is made of parameters and constants alone.

    Attributes:
        tensor: with its graph; held, so that its identity is not given to another tensor.
        names: the selected parameters that it depends on.
        selection: which entries it is, if it only selects those of one parameter.
    """

    tensor: Tensor
    names: tuple[str, ...]
    selection: Selection | None

    @classmethod
    def of(cls, name: str, parameter: Tensor) -> Weight:
        """A parameter itself."""
        whole = None
        if parameter.is_contiguous():
            whole = Selection(name, 0, tuple(parameter.shape), parameter.stride())
        return cls(parameter, (name,), whole)

    @property
    def direct(self) -> bool:
        """Whether its entries lie side by side in one parameter, as they are."""
        return self.selection is not None and self.selection.contiguous


def derived(output: Tensor, function: str, sources: Sequence[Weight]) -> Weight:
    """What a function of derived weights and constants made."""
    names = tuple(dict.fromkeys(name for source in sources for name in source.names))
    base = output._base if output._is_view() else None
    selection = None
    if len(sources) == 1:
        given = sources[0].selection
        view_of = sources[0].tensor
        if output is view_of:
            selection = given
        elif base is not None and given is not None:
            # a view of a view has the same base; the strides of both count from its memory
            root = view_of._base if view_of._is_view() else view_of
            same = base is root and output.dtype == view_of.dtype
            strided = given.stride == view_of.stride() and given.shape == tuple(view_of.shape)
            if same and strided:
                moved = int(output.storage_offset() - view_of.storage_offset())
                start = given.start + moved
                selection = Selection(given.name, start, tuple(output.shape), output.stride())
        elif function in COPIES and given is not None and output.shape == view_of.shape:
            selection = given if output.is_floating_point() else None
    return Weight(output, names, selection)


def sources_of(tensor: Tensor, weights: Mapping[int, Weight]) -> list[Weight] | None:
    """The weights that an autograd function of the user's own made a tensor of.

    Args:
        tensor: with a graph.
        weights: by the identity of their tensors.

    Returns:
        None if no such function made it; an empty list if it was given something else, too.
    """
    node: Any = tensor.grad_fn
    if not isinstance(node, torch.autograd.function.BackwardCFunction):
        return None
    by_node = {w.tensor.grad_fn: w for w in weights.values() if w.tensor.grad_fn is not None}
    below = [each for each, _ in node.next_functions if each is not None]
    leaves = [getattr(each, "variable", None) for each in below]
    found = [
        by_node.get(each) if leaf is None else weights.get(id(leaf))
        for each, leaf in zip(below, leaves, strict=True)
    ]
    known = [weight for weight in found if weight is not None]
    return known if len(known) == len(found) else []


def pull_back(weight: Weight, rows: Tensor, parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """Rows (k, *shape) of a derived weight as rows (k, p) of each parameter, None if zero."""
    tensor = weight.tensor
    found = torch.autograd.grad(
        tensor,
        list(parameters),
        rows.to(tensor.dtype),
        is_grads_batched=True,
        retain_graph=True,
        allow_unused=True,
    )
    return [None if g is None else g.reshape(len(g), -1) for g in found]
