"""Statistics: plain sums over directions and examples of one block, made from forms.

They know forms and no layer, likelihood or operator. Sums are finalised once, at the end of a pass.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from enum import Enum
from typing import Any, ClassVar

import torch
from torch import Tensor

from .collectives import Group
from .errors import DataError, TooLargeError
from .facts import Cost, Facts, Sample, grid_kind
from .jacobian.forms import Form, Outer, second_moment
from .jacobian.inputs import Inputs
from .jacobian.parts import Kind, Part
from .jacobian.patch_sums import PatchMoment
from .jacobian.positions import counted
from .jacobian.rotated_rows import rows_first, squares_of_rows
from .jacobian.summed import Summed
from .jacobian.union import Absent
from .layout import Layout
from .sides import Shape, Wide, is_diagonal, is_low_rank, named

__all__ = [
    "MAX_BLOCK_BYTES",
    "MAX_FACTOR",
    "BiasCross",
    "KroneckerFactors",
    "RowSum",
    "SecondMoment",
    "Sharing",
    "SquareSum",
    "Statistic",
    "flat_order",
    "pool_statistics",
]

MAX_FACTOR = 16_384  # by default, a Kronecker factor past this size is kept diagonal
MAX_BLOCK_BYTES = 2**33  # a dense block past this size is refused


class Sharing(str, Enum):
    """What KFAC makes of the positions that share a weight."""

    EXPAND = "expand"  # each is an example
    REDUCE = "reduce"  # they are summed over first


class Statistic(ABC):
    """Plain sums over directions and examples of one block.

    Args:
        indices: which of the matrix's parts it sums over.

    Attributes:
        sums: the names of the attributes that hold the sums (tensors, numbers or None), so that
            those of several processes can be added; None if it is no sum.
    """

    sums: ClassVar[tuple[str, ...] | None] = None

    def __init__(self, *indices: int) -> None:
        self.indices = indices

    def join(self, group: Group, device: torch.device) -> None:
        """Take the data of all processes, for a statistic that is no sum.

        Raises:
            DataError: it cannot.
        """
        raise DataError(
            f"{type(self).__name__} holds single examples, or does not name its `sums`, so that "
            "those of several processes have no sum: build it in one process, or take another "
            "representation"
        )

    @abstractmethod
    def costs(self, sample: Sample) -> Iterator[Cost]:
        """The cost for each part."""

    @abstractmethod
    def update(self, forms: Sequence[Form | None], first: bool, last: bool) -> None:
        """Add a chunk of directions, first or last of its batch or not. None is a zero block."""


class SecondMoment(Statistic):
    """Sum of the joint rows' outer products: a dense block."""

    sums = ("_total",)

    def __init__(self, indices: Sequence[int], parts: Sequence[Part]) -> None:
        super().__init__(*indices)
        p = sum(part.layout.size for part in parts)
        if p * p * 8 > MAX_BLOCK_BYTES:
            raise TooLargeError(
                f"a dense block of {p} parameters ({', '.join(n for q in parts for n in q.names)}) "
                f"takes {p * p * 8 / 2**30:.1f} GiB in double precision, more than the limit of "
                f"{MAX_BLOCK_BYTES / 2**30:.0f} GiB: take 'kfac', 'ekfac' or 'diagonal', or fewer "
                "parameters with params="
            )
        self._parts = parts
        self._total: Tensor | None = None

    def costs(self, sample: Sample) -> Iterator[Cost]:
        """p^2 numbers for a block of p parameters."""
        p = sum(part.layout.size for part in self._parts)
        for k, part in zip(self.indices, self._parts, strict=True):
            own = part.layout.size
            flops = sample.directions * own * 2 * (sample.positions(k) + p)
            yield Cost(k, f"dense {p}x{p}", own * p, flops)

    def update(self, forms: Sequence[Form | None], first: bool, last: bool) -> None:
        """Add the outer products of the joint rows."""
        present = [form for form in forms if form is not None]
        if present:
            added = second_moment(present)
            self._total = added if self._total is None else self._total.add_(added)

    def matrix(self, facts: Facts) -> Tensor:
        """The block in flat parameter order, as a mean over examples."""
        p = sum(part.layout.size for part in self._parts)
        out = torch.zeros(p, p, dtype=facts.dtype, device=facts.space.device)
        used = [part for part in self._parts if part.kind is not Kind.UNUSED]
        if self._total is None or not used:
            return out
        index = flat_order(self._parts, used).to(out.device)
        out[index[:, None], index[None, :]] = self._total / facts.denominator
        return out


class SquareSum(Statistic):
    """Sum of the squared rows, in a Kronecker eigenbasis if one is given.

    Args:
        index: the part.
        part: its layout says how many coordinates there are.
        left, right: the eigenbasis of an outer form, in the shapes of `sides`.
    """

    sums = ("_total",)

    def __init__(
        self, index: int, part: Part, left: Tensor | None = None, right: Tensor | None = None
    ) -> None:
        super().__init__(index)
        self._size = part.layout.size
        self._layout = part.layout
        self._in_basis = left is not None
        self._left = None if left is None or is_diagonal(left) else left
        self._right = None if right is None or is_diagonal(right) else right
        self._inputs: Inputs | None = None  # of the current batch, prepared for all its directions
        self._squares: Tensor | None = None  # of the current batch, summed over its directions
        self._total: Tensor | None = None

    def costs(self, sample: Sample) -> Iterator[Cost]:
        """A number for each parameter; a basis costs its products."""
        (k,), directions, grid = self.indices, sample.directions, self._layout
        t = sample.positions(k)
        once = 1 if t == 1 else directions  # with one position, directions are summed first
        flops = 2 * t * self._size * once + directions * t * grid.groups * grid.rows
        kind, numbers = f"diagonal {self._size}", self._size
        if self._in_basis:
            names = [
                f"diagonal {n}" if basis is None else named(basis)
                for n, basis in (
                    (grid.rows, self._left),
                    (grid.width, None if sample.indexed(k) else self._right),
                )
            ]
            kind = grid_kind("eigen-Kronecker", grid, *names)
            for basis, count in ((self._left, directions), (self._right, 1)):
                flops += 0 if basis is None else 2 * t * count * basis.numel()
                if basis is not None and is_low_rank(basis):  # more than its factor has
                    numbers += basis.numel() // 2 - grid.groups * basis.shape[2]
        yield Cost(k, kind, numbers, flops)

    def update(self, forms: Sequence[Form | None], first: bool, last: bool) -> None:
        """Add the squared rows."""
        for form in forms:
            if isinstance(form, Outer):
                self._outer(form, first, last)
            elif isinstance(form, Summed) and not (self._left is None and self._right is None):
                self._add(form.rotated(self._left, self._right).sqsum())
            elif form is not None:
                self._add(form.sqsum())

    def _outer(self, form: Outer, first: bool, last: bool) -> None:
        left, right = self._left, self._right
        if left is not None and right is not None and rows_first(form, left, right, first and last):
            self._add(squares_of_rows(form, left, right))
            return
        if form.inputs is None:  # a bias alone: the basis of its one input is a sign
            form = form.prepared(None, False, self._left)
        else:
            if first:
                self._inputs = form.inputs.prepared(self._right, form.bias)
            form = form.prepared(self._inputs, self._right is not None, self._left)
        self._squares = form.squares(self._squares)
        if self._squares is None:
            self._add(form.sqsum())
        elif last:
            self._add(form.sqsum_from(self._squares))
        if last:
            self._inputs = self._squares = None

    def _add(self, sums: Tensor) -> None:
        self._total = sums if self._total is None else self._total.add_(sums)

    def diagonal(self, facts: Facts) -> Tensor:
        """(p,), in the part's own coordinates, as a mean over examples."""
        if self._total is None:
            return torch.zeros(self._size, dtype=facts.dtype, device=facts.space.device)
        return self._total / facts.denominator


class BiasCross(Statistic):
    """Sum of each output's weights' rows times its bias's: the couplings of a quasi-diagonal."""

    sums = ("_total",)

    def __init__(self, index: int, part: Part) -> None:
        super().__init__(index)
        self._shape = (part.layout.groups * part.layout.rows, part.layout.width - 1)
        self._total: Tensor | None = None

    def costs(self, sample: Sample) -> Iterator[Cost]:
        """What a quasi-diagonal block keeps beside its diagonal."""
        (k,), (o, i) = self.indices, self._shape
        flops = 4 * sample.directions * sample.positions(k) * o * i
        yield Cost(k, f"quasi-diagonal {o} x ({i} + 1)", o * (i + 2), flops)

    def update(self, forms: Sequence[Form | None], first: bool, last: bool) -> None:
        """Add the products with the bias's rows."""
        for form in forms:
            if not isinstance(form, Outer):
                raise TypeError("couplings to a bias need an outer form")
            added = form.bias_cross()
            self._total = added if self._total is None else self._total.add_(added)

    def cross(self, facts: Facts) -> Tensor:
        """(G o, i), as a mean over examples."""
        if self._total is None:
            return torch.zeros(self._shape, dtype=facts.dtype, device=facts.space.device)
        return self._total.reshape(self._shape) / facts.denominator


class RowSum(Statistic):
    """Sum of the rows of each direction: the mean gradients that centering subtracts."""

    sums = ("_total",)

    def __init__(self, index: int, part: Part) -> None:
        super().__init__(index)
        self._size = part.layout.size
        self._total: Tensor | None = None  # (R,p)
        self._seen = 0  # directions of the current batch

    def costs(self, sample: Sample) -> Iterator[Cost]:
        """A number for each parameter and direction, of no block of its own."""
        (k,) = self.indices
        numbers = sample.directions * self._size
        yield Cost(k, "", numbers, 2 * numbers * sample.positions(k))

    def update(self, forms: Sequence[Form | None], first: bool, last: bool) -> None:
        """Add the rows."""
        self._seen = 0 if first else self._seen
        for form in forms:
            if form is not None:
                added = form.totals()
                stop = self._seen + len(added)
                total = added.new_zeros(0, self._size) if self._total is None else self._total
                if stop > len(total):
                    total = torch.cat([total, total.new_zeros(stop - len(total), self._size)])
                total[self._seen : stop] += added
                self._total, self._seen = total, stop

    def mean(self, facts: Facts) -> Tensor:
        """(R, p), in the part's own coordinates."""
        if self._total is None:
            return torch.zeros(1, self._size, dtype=facts.dtype, device=facts.space.device)
        return self._total / facts.denominator


class KroneckerFactors(Statistic):
    """The two factors of KFAC (Martens and Grosse 2015; sharing: Eschenhagen et al. 2023).

    expand: left = sum g g^T / N, right = sum x x^T / (N T), over examples, positions, directions.
    reduce: the same of sum_t g and mean_t x, right divided by N.
    If some positions are not scored, the right factor is a mean over those that count
    (`jacobian/positions.py`).

    Args:
        index: the part.
        part: its layout says how large the factors are.
        sharing: of positions.
        max_factor: a factor of more rows is wide.
        wide: what is kept of a wide one.
        use: of a part that sums several uses, the layout of those that are meant.
    """

    sums = ("_left", "_right", "_positions")

    def __init__(
        self,
        index: int,
        part: Part,
        sharing: Sharing,
        max_factor: int = MAX_FACTOR,
        wide: Wide = Wide.DIAGONAL,
        use: Layout | None = None,
    ) -> None:
        super().__init__(index)
        self._use = use
        self._layout = part.layout if use is None else use
        self._reduce = sharing is Sharing.REDUCE
        sizes = self._layout.rows, self._layout.width
        self.shapes = tuple(Shape.of(n, max_factor, wide) for n in sizes)
        self.tests: list[Tensor | None] = [None, None]  # with which sides of low rank are sketched
        self._left: Tensor | None = None
        self._summed: Tensor | None = None  # of the right factor
        self._growing: PatchMoment | None = None  # what is to be added to it
        self._positions: Tensor | int = 0
        self._reached: Tensor | None = None  # positions of the current batch with a gradient

    def costs(self, sample: Sample) -> Iterator[Cost]:
        """The numbers of both factors."""
        (k,), grid, (left, right) = self.indices, self._layout, self.shapes
        t = 1 if self._reduce else sample.positions(k, self._use)
        if sample.indexed(k, self._use) and not self._reduce:
            right = Shape(right.n, Wide.DIAGONAL)
        numbers = grid.groups * (left.numbers + right.numbers)
        summed = 0 if self._reduce or right.wide else sample.products(k, self._use)
        products = summed or grid.groups * t * right.flops
        flops = 2 * (grid.groups * t * sample.directions * left.flops + products)
        kind = grid_kind("Kronecker", grid, str(left), str(right))
        helps = self._use is not None and self._use.pieces[0].transposed  # the block is the other's
        yield Cost(k, "" if helps else kind, numbers, flops)

    def update(self, forms: Sequence[Form | None], first: bool, last: bool) -> None:
        """Add the moments of output gradients, and once a batch those of inputs."""
        (form,) = forms
        if isinstance(form, Summed) and self._use is not None:
            form = form.outer_of(self._use)
        if not isinstance(form, Outer):
            raise TypeError("Kronecker factors need an outer form")
        if isinstance(form, Absent):
            return
        outputs = form
        if self._reduce:
            outputs = Outer(form.g.sum(3, keepdim=True), None, form.bias)
        if self._left is None:
            self.tests = [s.test_matrix(form.g) for s in self.shapes]
        self._left = outputs.output_side(self.shapes[0], self.tests[0], self._left)
        if form.marks is None:
            if first:
                self._add_inputs(form)
            return
        reached = form.reached if self._reached is None else self._reached | form.reached
        self._reached = None if last else reached
        if last:  # the gradients of all directions tell which positions count
            self._add_inputs(replace(form, kept=counted(form.marks, reached)))

    def _add_inputs(self, form: Outer) -> None:
        """The inputs of a batch, which are the same for all directions."""
        form = form.reduced() if self._reduce else form
        grown = form.grown(self.shapes[1], self._growing)
        if grown is None:
            self._right = form.input_side(self.shapes[1], self.tests[1], self._right)
        elif grown is not self._growing:
            self._right, self._growing = self._right, grown
        self._positions = self._positions + form.positions

    def factors(self, facts: Facts) -> tuple[Tensor, Tensor]:
        """left and right, each (G, *sums of its shape); (G, w) of indices. They are given up."""
        left, right = self._left, self._right
        if left is None or right is None:  # no batch used the layer
            groups = self._layout.groups
            zeros = [
                torch.zeros((groups, *s.sums), dtype=facts.dtype, device=facts.space.device)
                for s in self.shapes
            ]
            self.tests = [s.test_matrix(zeros[0]) for s in self.shapes]
            return zeros[0], zeros[1]
        self._left = self._right = None  # they are large, and live on in one place only
        positions = max(self.positions, 1)  # none, if no token took the layer
        return left.div_(facts.denominator), right.div_(positions)

    @property
    def _right(self) -> Tensor | None:
        """The sum for the right factor, with all that was put off."""
        if self._growing is not None:
            self._summed = self._growing.finish(self._summed)
            self._growing = None
        return self._summed

    @_right.setter
    def _right(self, value: Tensor | None) -> None:
        self._summed, self._growing = value, None

    @property
    def positions(self) -> int:
        """How many positions of all examples the right factor is a mean over."""
        return int(self._positions)


def pool_statistics(statistics: Sequence[Statistic], group: Group, device: torch.device) -> None:
    """Make every process's statistics those of the data of all.

    Sums are exchanged at once. What a process has not summed counts as zero.
    """
    if group.size == 1:
        return
    for each in statistics:
        if each.sums is None:
            each.join(group, device)
    places = [(each, name) for each in statistics for name in each.sums or ()]
    own = [_as_tensor(getattr(each, name), device) for each, name in places]
    headers = group.gather([None if t is None else (t.shape, t.dtype) for t in own])
    summed: list[Tensor] = []
    for k, (each, name) in enumerate(places):
        known = [h for header in headers if (h := header[k]) is not None]
        if not known:
            continue
        shape, dtype = max(known, key=lambda header: len(header[0]))  # a number counts as zero
        tensor = own[k]
        if tensor is None or tensor.shape != shape:
            tensor = torch.zeros(shape, dtype=dtype, device=device)
        tensor = tensor.to(dtype).contiguous()
        setattr(each, name, tensor)
        summed.append(tensor)
    group.sum_(summed)


def _as_tensor(value: Any, device: torch.device) -> Tensor | None:
    known = value is None or isinstance(value, Tensor)
    return value if known else torch.tensor(value, device="cpu").to(device)


def flat_order(parts: Sequence[Part], chosen: Sequence[Part]) -> Tensor:
    """Where the coordinates of some parts lie among those of all parts in flat order."""
    everything = torch.cat([part.layout.positions() for part in parts]).sort().values
    where = torch.cat([part.layout.positions() for part in chosen])
    return torch.searchsorted(everything, where)
