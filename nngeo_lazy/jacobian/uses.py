"""What one call of a layer says about its parameters' Jacobian, and which functions can say it.

A *layer* maps a call's arguments and output to a `Use`, or to the reason (a string) why this call
has no form. Its parameters then take the general way. A *composite* runs in place of a function
that is several layers at once, and records each of them. Both are registered by *function*, which
also covers subclasses, functional code and keyword calls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .folds import Fold
from .inputs import Inputs

__all__ = ["COMPOSITES", "LAYERS", "Composite", "Grid", "Layer", "Local", "Record", "Use"]

# (fold, gradients (R, *output), examples start, stop) -> rows (R, n, *shape) of each slot
Local = Callable[[Fold, int, Tensor, int, int], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Grid:
    """The shape of a layer's weight, and how it is stored.

    Attributes:
        groups, outputs, inputs: how many groups, and how many outputs and inputs each has.
        transposed: the weight is stored (groups, inputs / inner, outputs, inner) rather than
            (groups, outputs, inputs). With inner = 1 and one group that is (in, out).
        inner: see `transposed`; a transposed convolution's is the volume of its kernel.

    Example:
        >>> Grid(groups=1, outputs=4, inputs=3)
        Grid(groups=1, outputs=4, inputs=3, transposed=False, inner=1)
    """

    groups: int
    outputs: int
    inputs: int
    transposed: bool = False
    inner: int = 1


@dataclass(frozen=True)
class Use:
    """One call of a layer: how its per-example Jacobian is read off inputs and output gradients.

    A layer that multiplies by a weight has J_n = sum_t g[n,t] x[n,t]^T, with `grid`, `gradients`
    and `inputs`. The bias adds a last column, sum_t g[n,t]. Any other layer gives `rows`.

    Shapes: R output directions, N examples, T positions that share the parameters. The example axis
    is one of the output's `leading` dimensions. It is found by a check, and moved to the front
    before the functions below are called. The other leading dimensions are flattened into T.

    Attributes:
        weight, bias: the parameters that the call received, or None.
        leading: how many leading dimensions of the output are positions (the example axis among
            them); the others are features.
        x: the layer's input, detached, with the same leading dimensions.
        grid: the weight's grid; None for layers whose form is `rows`.
        gradients: output gradients (R, N, T, *features) -> (R, N, groups, T', outputs).
        inputs: x as (N, T, *features) -> the input factor (N, groups, T', inputs), as a tensor or
            as lazy `Inputs`.
        rows: (x, g) -> rows by role, each (R, N, n), of the "weight" and the "bias".
        view: (R, *output) -> (R, *leading, *features), if the gradients at the output are not
            in that order as they come.
        local: rows of a function of which nothing is known but itself, in the place of `rows`.
        slots: the weights of such a function by role, if they are more than one.
        matrices: how many tensors the weight is a stack of, if the first feature of the output (and
            of x) says which of them it was made with; 0 if it is no such stack.

    Raises:
        ValueError: it has both `rows` and a grid, or neither, or a part of these is missing.

    Example:
        >>> x, weight = torch.randn(8, 3), torch.randn(4, 3)
        >>> grouped = (lambda g: g[:, :, None]), (lambda x: x[:, None])
        >>> use = Use(weight, None, 1, x, Grid(1, 4, 3), *grouped)
        >>> use.mismatch()
        ''
    """

    weight: Tensor | None
    bias: Tensor | None
    leading: int
    x: Tensor
    grid: Grid | None = None
    gradients: Callable[[Tensor], Tensor] | None = None
    inputs: Callable[[Tensor], Inputs | Tensor] | None = None
    rows: Callable[[Tensor, Tensor], dict[str, Tensor]] | None = None
    view: Callable[[Tensor], Tensor] | None = None
    local: Local | None = None
    slots: Mapping[str, Tensor] | None = None
    matrices: int = 0

    def __post_init__(self) -> None:
        if self.x.layout is not torch.strided:
            object.__setattr__(self, "x", self.x.to_dense())
        grid = (self.grid, self.gradients, self.inputs)
        if any(part is None for part in grid) == (self.rows is None and self.local is None):
            raise ValueError("expected a Use with either rows, or grid, gradients and inputs")

    @property
    def roles(self) -> dict[str, Tensor]:
        """The weights that the call received, by role."""
        if self.slots is not None:
            return dict(self.slots)
        given = {"weight": self.weight, "bias": self.bias}
        return {role: tensor for role, tensor in given.items() if tensor is not None}

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' dtype."""
        given = self.weight if self.weight is not None else self.bias
        return self.x.dtype if given is None else given.dtype

    def one(self, k: int, weight: Tensor) -> Use:
        """The use of one tensor of a stack: of its features k at all positions."""
        lead, whole, grid = self.leading, self.view, self.grid

        def view(g: Tensor) -> Tensor:
            return (g if whole is None else whole(g)).select(lead + 1, k)

        x = self.x.select(lead, k)
        if grid is None:
            return replace(self, weight=weight, x=x, view=view, matrices=0)
        return replace(
            self,
            weight=weight,
            x=x,
            grid=replace(grid, groups=1),
            gradients=lambda g: g.reshape(*g.shape[:2], 1, g.shape[2], -1),
            inputs=lambda x: x.reshape(x.shape[0], 1, x.shape[1], -1),
            view=view,
            matrices=0,
        )

    def mismatch(self) -> str:
        """How the grid does not fit the parameters; empty if it does."""
        if self.grid is None:
            return ""
        count = self.grid.groups * self.grid.outputs
        for role, p, size in (
            ("weight", self.weight, count * self.grid.inputs),
            ("bias", self.bias, count),
        ):
            if p is not None and p.numel() != size:
                return f"{self.grid} needs a {role} of {size} numbers, not of {p.numel()}"
        return ""


Layer = Callable[[Mapping[str, Any], Tensor], "Use | str"]
Record = Callable[[Use, Tensor], None]  # a layer's use and its output
Composite = Callable[[Mapping[str, Any], Record], Any]  # -> the output, or a reason (str)

LAYERS: dict[Callable[..., Any], tuple[tuple[str, ...], Layer]] = {}
COMPOSITES: dict[Callable[..., Any], tuple[tuple[str, ...], Composite]] = {}


def layer(function: Callable[..., Any], signature: str) -> Callable[[Layer], Layer]:
    """Register a layer for a torch function with these argument names."""

    def register(form: Layer) -> Layer:
        LAYERS[function] = (tuple(signature.split()), form)
        return form

    return register


def composite(function: Callable[..., Any], signature: str) -> Callable[[Composite], Composite]:
    """Register a composite for a torch function with these argument names."""

    def register(run: Composite) -> Composite:
        COMPOSITES[function] = (tuple(signature.split()), run)
        return run

    return register
