"""The Jacobian stored as its layers' inputs and output gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..jacobian.forms import Form, Outer, Stored, Summed
from ..operators import BaseLinearOperator, Info
from ..operators.implicit import (
    FactoredGaussNewtonLinearOperator,
    FactoredJacobianLinearOperator,
)
from ..statistics import FormStack, Sweep
from .base import Representation
from .recipes import Block, Recipe, block_name, flat_layout, require_finite, whole

__all__ = ["Factored", "factored_jacobian"]


@dataclass(frozen=True)
class Factored(Representation):
    """The exact matrix J^T S S^T J / N, with the inputs x and output gradients g of J stored.

    Products are matrix products, without autograd and without the data. Damped systems are solved
    in the space of samples, by the Gram matrix of the rows of S^T J, where those are at most half
    as many as parameters. Memory (inputs + directions times outputs) of every layer, example and
    position.

    Source:
        Dangel et al. (2022), ViViT: Curvature access through the generalized Gauss-Newton's
        low-rank structure, on the Gram matrix.
    """

    def recipe(self, sweep: Sweep, indices: Sequence[int]) -> Recipe:
        stack = FormStack(indices, [sweep.parts[k] for k in indices])
        yield [stack]
        scale = sweep.denominator**-0.5
        root = factored_jacobian(sweep, indices, stack, Info(), scale)
        require_finite(root, block_name(sweep, indices))
        operator = FactoredGaussNewtonLinearOperator(root)
        return [Block(tuple(indices), flat_layout(sweep, indices), operator)]

    def finish(self, sweep: Sweep, blocks: Sequence[Block]) -> BaseLinearOperator:
        return whole(sweep, blocks[0])


def factored_jacobian(
    sweep: Sweep, indices: Sequence[int], stack: FormStack, info: Info, scale: float = 1.0
) -> FactoredJacobianLinearOperator:
    """The rows of a pass as an operator on the parameters of some parts."""
    starts, start = {}, 0
    for where in flat_layout(sweep, indices).slices:
        starts[where.start] = start
        start += where.stop - where.start
    layouts = [sweep.parts[k].layout.shifted(starts) for k in indices]
    batches = [[_scaled(form, scale) for form in batch] for batch in stack.batches]
    return FactoredJacobianLinearOperator.of(batches, layouts, info, center=sweep.center)


def _scaled(form: Form | None, scale: float) -> Form | None:
    if isinstance(form, Outer):
        return replace(form, g=form.g * scale)
    if isinstance(form, Summed):
        return replace(form, outers=tuple(replace(o, g=o.g * scale) for o in form.outers))
    return Stored(form.values * scale) if isinstance(form, Stored) else None
