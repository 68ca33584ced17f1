"""The Jacobian stored as its layers' inputs and output gradients."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import ClassVar, cast

import torch
from torch import Tensor

from ..errors import DataError, TooLargeError
from ..facts import Cost, Facts, Sample
from ..jacobian.capture import PartsChangedError
from ..jacobian.forms import Form, Outer, Rows, Stored
from ..jacobian.parts import Part
from ..jacobian.summed import Summed
from ..operators import BaseLinearOperator, Info
from ..operators.factored import (
    FactoredGaussNewtonLinearOperator,
    FactoredJacobianLinearOperator,
)
from ..quantities import MatrixKind
from ..statistics import MAX_BLOCK_BYTES, Statistic
from ..sweep import Sweep
from ..switches import outside_inference
from .recipes import Block, Recipe, block_name, flat_layout, info_of, require_finite, whole
from .representation import Streamed

__all__ = ["Factored", "FormStack", "factored_rows", "joined", "stored", "streamed_rows"]


class FormStack(Statistic):
    """The forms themselves, all directions of all examples: inputs and output gradients."""

    def __init__(
        self, indices: Sequence[int], parts: Sequence[Part], limit: int | None = None
    ) -> None:
        super().__init__(*indices)
        self._parts = parts
        self._limit = MAX_BLOCK_BYTES if limit is None else limit
        self._chunks: list[list[Form | None]] = []  # of the current batch
        self._bytes = 0
        self.batches: list[list[Form | None]] = []  # a form for each part, None if it is zero

    def costs(self, sample: Sample) -> Iterator[Cost]:
        """The numbers of inputs and output gradients."""
        for k, part in zip(self.indices, self._parts, strict=True):
            form = sample.forms[k]
            numbers = 0
            if isinstance(form, Outer):
                inputs = 0 if form.inputs is None else form.inputs.shape[2] * form.inputs.shape[3]
                g = form.g[0, 0].numel() * sample.directions
                numbers = sample.examples * (g + inputs)
            elif form is not None:
                numbers = sample.examples * sample.directions * part.layout.size
            yield Cost(k, f"factored {part.layout.size}", numbers, 0)

    def update(self, forms: Sequence[Form | None], first: bool, last: bool) -> None:
        """Keep the forms of a chunk.

        Raises:
            TooLargeError: all forms so far take more than the limit.
        """
        self._chunks.append([stored(form) for form in forms])
        self._bytes += sum(_bytes_of(form, first) for form in self._chunks[-1])
        if self._bytes > self._limit:
            raise TooLargeError(
                "the layers' inputs and output gradients of all examples and output directions "
                f"take more than the limit of {self._limit / 2**30:.3g} GiB: take "
                "estimator='mc' or 'empirical' (one direction for each example), fewer examples, "
                "or 'implicit'"
            )
        if last:
            self.batches.append([joined(chunks) for chunks in zip(*self._chunks, strict=True)])
            self._chunks = []


def stored(form: Form | None) -> Form | None:
    """A form that holds nothing of the pass; rows that are streamed are made."""
    if isinstance(form, Rows):
        return Stored(torch.cat([form.rows(a, b) for a, b in form.tiles()], 1))
    return form


def _bytes_of(form: Form | None, first: bool) -> int:
    """What is kept of a chunk; its inputs are those of the first chunk of a batch."""
    if isinstance(form, Summed):
        return sum(_bytes_of(outer, first) for outer in form.outers)
    if isinstance(form, Stored):
        return form.values.nbytes
    if not isinstance(form, Outer):
        return 0
    inputs = vars(form.inputs).values() if first and form.inputs is not None else ()
    return form.bytes + sum(x.nbytes for x in inputs if isinstance(x, Tensor))


def joined(chunks: Sequence[Form | None]) -> Form | None:
    """Chunks of directions of one batch as one form."""
    first = chunks[0]
    if len(chunks) == 1 or first is None:
        return first
    if isinstance(first, Summed):
        outers = zip(*(chunk.outers for chunk in chunks if isinstance(chunk, Summed)), strict=True)
        return replace(first, outers=tuple(joined(each) for each in outers))  # type: ignore[misc]
    if isinstance(first, Outer):
        # (N,G,R,o,T) in memory: rows of all directions are then one product, without a copy
        stacked = torch.cat([c.g.permute(1, 2, 0, 4, 3) for c in chunks if isinstance(c, Outer)], 2)
        return replace(first, g=stacked.permute(2, 0, 1, 4, 3))
    return Stored(torch.cat([c.values for c in chunks if isinstance(c, Stored)]))


@dataclass(frozen=True)
class Factored(Streamed):
    """The exact matrix J^T S S^T J / N, with the inputs x and output gradients g of J stored.

    Products are matrix products, without autograd and without the data. Damped systems are solved
    in the space of samples, by the Gram matrix of the rows of S^T J, if those are at most half
    as many as parameters. Memory (inputs + directions times outputs) of every layer, example and
    position.

    Example:
        >>> import torch, nngeo_lazy as ng
        >>> model, x = torch.nn.Linear(3, 2), torch.randn(8, 3)
        >>> F = ng.FIM(model, x, Factored(), likelihood="gaussian")
        >>> v = F.space.randn()
        >>> exact = ng.FIM(model, x, "dense", likelihood="gaussian")
        >>> torch.testing.assert_close(F @ v, exact @ v)

    Source:
        Dangel et al. (2022), ViViT: Curvature access through the generalized Gauss-Newton's
        low-rank structure, on the Gram matrix.
    """

    matrices: ClassVar[frozenset[MatrixKind]] = frozenset(
        {MatrixKind.GAUSS_NEWTON, MatrixKind.JACOBIAN}
    )

    def build(self, sweep: Sweep) -> BaseLinearOperator:
        """B^T B of the rows B, or the rows themselves if the quantity is a Jacobian."""
        if sweep.problem.quantity.kind is MatrixKind.JACOBIAN:
            return factored_rows(sweep)
        return super().build(sweep)

    def require_fit(self, facts: Facts) -> None:
        """Refuse several processes: each would hold the forms of its own examples alone."""
        if facts.group.size > 1:
            raise DataError(
                "'factored' keeps single examples, and is made in one process: with "
                "ng.Distributed take 'implicit', which is the same matrix, or 'low_rank'"
            )

    def recipe(self, facts: Facts, indices: Sequence[int]) -> Recipe:
        """The forms of all parts."""
        stack = FormStack(indices, [facts.parts[k] for k in indices])
        facts = yield [stack]
        scale = facts.denominator**-0.5
        root = _jacobian_of(facts, indices, stack, Info(), scale)
        require_finite(root, block_name(facts, indices))
        operator = FactoredGaussNewtonLinearOperator(root)
        return [Block(tuple(indices), flat_layout(facts, indices), operator)]

    def finish(self, facts: Facts, blocks: Sequence[Block]) -> BaseLinearOperator:
        """The one block, in flat order."""
        return whole(facts, blocks[0])


def _jacobian_of(
    facts: Facts, indices: Sequence[int], stack: FormStack, info: Info, scale: float = 1.0
) -> FactoredJacobianLinearOperator:
    """The rows of a pass as an operator on the parameters of some parts."""
    starts, start = {}, 0
    pieces = [piece.start for k in indices for piece in facts.parts[k].layout.pieces]
    for where in flat_layout(facts, indices).slices:
        inside = [piece for piece in pieces if where.start <= piece < where.stop]
        starts.update({piece: start + piece - where.start for piece in inside})
        start += where.stop - where.start
    layouts = [facts.parts[k].layout.shifted(starts) for k in indices]
    batches = [[_scaled(form, scale) for form in batch] for batch in stack.batches]
    return FactoredJacobianLinearOperator.of(batches, layouts, info, center=facts.center)


def factored_rows(sweep: Sweep, limit: int | None = None) -> FactoredJacobianLinearOperator:
    """The rows of all parts, of one pass.

    Raises:
        TooLargeError: their forms take more than `limit` bytes.
        NonFiniteError: NaN or infinity in them.
    """
    facts, (stack,) = sweep.run(lambda f: [FormStack(range(len(f.parts)), f.parts, limit)])
    indices = range(len(facts.parts))
    factored = _jacobian_of(facts, indices, cast(FormStack, stack), info_of(facts, []))
    require_finite(factored, "the network")
    return factored


def streamed_rows(sweep: Sweep, start: int) -> Iterator[FactoredJacobianLinearOperator]:
    """The rows of each batch from a number on, which are made when they are asked for.

    Raises:
        NonFiniteError: NaN or infinity in them.
    """
    again: int | None = start
    while again is not None:
        again = yield from _until_parts_change(sweep, again)


def _until_parts_change(
    sweep: Sweep, start: int
) -> Generator[FactoredJacobianLinearOperator, None, int | None]:
    """The rows of some batches; returns the one at which the plan turned out to be another one."""
    number, held, known = start, list[list[Form | None]](), None
    info = Info(sweep.problem.space)

    def made(parts: Sequence[Part]) -> FactoredJacobianLinearOperator:
        rows = FactoredJacobianLinearOperator.of(held, [part.layout for part in parts], info)
        require_finite(rows, "the network")
        return rows

    with outside_inference(), closing(sweep.pieces(start)) as pieces:
        try:
            for piece in pieces:
                if piece.batch != number and known is not None:
                    yield made(known)
                    held = []
                if held and piece.parts != known:
                    return piece.batch
                number, known = piece.batch, piece.parts
                with torch.no_grad():
                    chunks = [[stored(form) for form in forms] for forms in piece.forms()]
                held.append([joined(each) for each in zip(*chunks, strict=True)])
        except PartsChangedError:  # the plan knows it now
            return number
        if known is not None:
            yield made(known)
    return None


def _scaled(form: Form | None, scale: float) -> Form | None:
    if scale == 1:
        return form
    if isinstance(form, Outer):
        return replace(form, g=form.g * scale, narrow=None)
    if isinstance(form, Summed):
        outers = tuple(replace(o, g=o.g * scale, narrow=None) for o in form.outers)
        return replace(form, outers=outers)
    return Stored(form.values * scale) if isinstance(form, Stored) else None
