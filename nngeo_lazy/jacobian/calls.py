"""One use of weights in a recorded pass, and where the gradient at its output arrives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from .uses import Use
from .weights import Weight

__all__ = ["Call", "arranged", "edge_of"]


@dataclass(frozen=True)
class Call:
    """A layer's call: its form, its selected weights by role, and its output's gradient edge.

    Attributes:
        function: what was called.
        weights: those that are made of selected parameters.
        use: its form.
        edge: where the gradient at its output arrives.
        output: the shape of that gradient.
        shape: the same in the order of the form: (*leading, *features).
        note: why the function has no closed form.
        split: the calls of the single tensors of a stacked weight, in its place; None if it has
            no such weight. They may have examples at other positions each.
    """

    function: str
    weights: Mapping[str, Weight]
    use: Use
    edge: GradientEdge
    output: torch.Size
    shape: torch.Size
    note: str = ""
    split: Callable[[], list[Call]] | None = None

    @property
    def key(self) -> tuple[str, ...]:
        """What must be the same in every batch, and how weights lie: a plan has their layout."""
        grid = self.use.grid
        lies = "" if grid is None else f"{grid.groups} {grid.inner} {grid.transposed}"
        return (self.function, lies, *(_label(w) for w in self.weights.values()))

    @property
    def pieces(self) -> int:
        """How many calls it is split into."""
        return self.use.matrices if self.split is not None else 1

    def arranged(self, gradients: Tensor) -> Tensor:
        """Gradients (R, *as they arrive) in the order of the form."""
        gradients = gradients.reshape(len(gradients), *self.output)
        return gradients if self.use.view is None else self.use.view(gradients)


def _label(weight: Weight) -> str:
    """The parameters, and which entries of one."""
    names, part = ", ".join(weight.names), weight.selection
    if part is None:  # autograd takes its rows back, whichever entries it is made of
        return names
    lies = [stride for stride, size in zip(part.stride, part.shape, strict=True) if size > 1]
    return f"{names}[{part.start}:{part.size}:{lies}]"


def arranged(use: Use, shape: torch.Size) -> torch.Size:
    """The shape of an output in the order of a form."""
    if use.view is None:
        return shape
    return use.view(torch.empty(0, *shape, device="meta")).shape[1:]


def edge_of(output: Tensor) -> GradientEdge:
    """Where the gradient at an output arrives, also if it is a view that is changed in place."""
    base = output._base if output._is_view() else None
    whole = base is not None and base.grad_fn is not None and base.numel() == output.numel()
    if base is not None and whole and base.is_contiguous() and output.is_contiguous():
        return get_gradient_edge(base)
    return get_gradient_edge(output)
