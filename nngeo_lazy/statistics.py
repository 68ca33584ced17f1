"""Statistics: plain sums over directions and examples of one block, made from forms.

They know forms and no layer, likelihood or operator. Sums are finalised once, at the end of a pass.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .errors import DataError, TooLargeError
from .jacobian.forms import Form, Outer, second_moment
from .jacobian.inputs import IndexInputs, Inputs
from .jacobian.parts import Part
from .layout import Layout
from .space import ParamSpace

__all__ = [
    "MAX_BLOCK_BYTES",
    "BiasCross",
    "Cost",
    "KroneckerFactors",
    "Make",
    "RowStack",
    "RowSum",
    "Sample",
    "SecondMoment",
    "SquareSum",
    "Statistic",
    "Sweep",
    "all_finite",
]

MAX_FACTOR = 16_384  # a Kronecker factor past this size is kept diagonal
MAX_BLOCK_BYTES = 2**33  # a dense block past this size is refused


class Cost(NamedTuple):
    """What a statistic costs for one part.

    Attributes:
        part: its index.
        block: the kind of block that it makes, with its sizes; empty where it only helps one.
        numbers: how many numbers are kept.
        flops: floating-point operations for each example, all its directions together.
    """

    part: int
    block: str
    numbers: int
    flops: int


@dataclass(frozen=True)
class Sample:
    """What a plan knows: the forms of one direction of the first batch, and how many there are.

    Attributes:
        forms: of each part; None is a zero block.
        directions: of each example.
        examples: in the whole loader, or in what is known of it.
    """

    forms: Sequence[Form | None]
    directions: int
    examples: int

    def positions(self, k: int) -> int:
        """How many positions of an example share a part."""
        form = self.forms[k]
        return int(form.g.shape[3]) if isinstance(form, Outer) else int(form is not None)

    def indexed(self, k: int) -> bool:
        """Whether a part's input factor is a histogram."""
        form = self.forms[k]
        return isinstance(form, Outer) and isinstance(form.inputs, IndexInputs)


class Statistic(ABC):
    """Plain sums over directions and examples of one block.

    Args:
        indices: which parts of the plan it sums over.
    """

    def __init__(self, *indices: int) -> None:
        self.indices = indices

    @abstractmethod
    def costs(self, sample: Sample) -> Iterator[Cost]:
        """The cost for each part."""

    @abstractmethod
    def update(self, forms: Sequence[Form | None], first: bool, last: bool) -> None:
        """Add a chunk of directions, first or last of its batch or not. None is a zero block."""


Make = Callable[[Sequence[Part]], Sequence[Statistic]]


class Sweep(Protocol):
    """A pass over the data on demand, and what is known behind the first one."""

    space: ParamSpace
    num_examples: int
    log_likelihood: float | None
    denominator: float  # what sums are divided by: the number of examples, or a loss's own
    dtype: torch.dtype
    center: bool  # whether the mean row is subtracted from every row

    @property
    def num_terms(self) -> int | None:
        """How many labels were scored; None where they are not known."""

    @property
    def described(self) -> Mapping[str, str | int | None]:
        """Which matrix it is, in plain words."""

    @property
    def parts(self) -> Sequence[Part]:
        """The parameters by form."""

    def __call__(self, make: Make, keep: bool = False) -> Sequence[Statistic]:
        """Make the statistics, then update them over all batches.

        With `keep` the forms are kept for the next call where they fit into memory.
        """


class SecondMoment(Statistic):
    """Sum of the joint rows' outer products: a dense block."""

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
        p = sum(part.layout.size for part in self._parts)
        for k, part in zip(self.indices, self._parts, strict=True):
            own = part.layout.size
            flops = sample.directions * own * 2 * (sample.positions(k) + p)
            yield Cost(k, f"dense {p}x{p}", own * p, flops)

    def update(self, forms: Sequence[Form | None], first: bool, last: bool) -> None:
        present = [form for form in forms if form is not None]
        if present:
            added = second_moment(present)
            self._total = added if self._total is None else self._total.add_(added)

    def matrix(self, sweep: Sweep) -> Tensor:
        """The block in flat parameter order, as a mean over examples."""
        p = sum(part.layout.size for part in self._parts)
        out = torch.zeros(p, p, dtype=sweep.dtype, device=sweep.space.device)
        used = [part for part in self._parts if part.kind != "unused"]
        if self._total is None or not used:
            return out
        index = flat_order(self._parts, used).to(out.device)
        out[index[:, None], index[None, :]] = self._total / sweep.denominator
        return out


class SquareSum(Statistic):
    """Sum of the squared rows, in a Kronecker eigenbasis where one is given.

    Args:
        index: the part.
        part: its layout says how many coordinates there are.
        left, right: the eigenbasis of an outer form, (G, o, o) and (G, w, w), or (G, o) and (G, w)
            where it is the identity.
    """

    def __init__(
        self, index: int, part: Part, left: Tensor | None = None, right: Tensor | None = None
    ) -> None:
        super().__init__(index)
        self._size = part.layout.size
        self._layout = part.layout
        self._left = left if left is not None and left.dim() == 3 else None
        self._right = right if right is not None and right.dim() == 3 else None
        self._inputs: Inputs | None = None  # of the current batch, prepared for all its directions
        self._squares: Tensor | None = None  # of the current batch, summed over its directions
        self._total: Tensor | None = None

    def costs(self, sample: Sample) -> Iterator[Cost]:
        (k,), directions, grid = self.indices, sample.directions, self._layout
        t = sample.positions(k)
        once = 1 if t == 1 else directions  # with one position, directions are summed first
        flops = 2 * t * self._size * once + directions * t * grid.groups * grid.rows
        kind = f"diagonal {self._size}"
        if self._left is not None or self._right is not None:
            right = self._right is None or sample.indexed(k)
            kind = _grid_kind("eigen-Kronecker", grid, self._left is None, right)
            flops += 2 * t * grid.groups * (directions * grid.rows**2 + grid.width**2)
        yield Cost(k, kind, self._size, flops)

    def update(self, forms: Sequence[Form | None], first: bool, last: bool) -> None:
        for form in forms:
            if isinstance(form, Outer):
                self._outer(form, first, last)
            elif form is not None:
                self._add(form.sqsum())

    def _outer(self, form: Outer, first: bool, last: bool) -> None:
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

    def diagonal(self, sweep: Sweep) -> Tensor:
        """(p,), in the part's own coordinates, as a mean over examples."""
        if self._total is None:
            return torch.zeros(self._size, dtype=sweep.dtype, device=sweep.space.device)
        return self._total / sweep.denominator


class BiasCross(Statistic):
    """Sum of each output's weights' rows times its bias's: the couplings of a quasi-diagonal."""

    def __init__(self, index: int, part: Part) -> None:
        super().__init__(index)
        self._shape = (part.layout.groups * part.layout.rows, part.layout.width - 1)
        self._total: Tensor | None = None

    def costs(self, sample: Sample) -> Iterator[Cost]:
        (k,), (o, i) = self.indices, self._shape
        flops = 4 * sample.directions * sample.positions(k) * o * i
        yield Cost(k, f"quasi-diagonal {o} x ({i} + 1)", o * (i + 2), flops)

    def update(self, forms: Sequence[Form | None], first: bool, last: bool) -> None:
        for form in forms:
            if not isinstance(form, Outer):
                raise TypeError("couplings to a bias need an outer form")
            added = form.bias_cross()
            self._total = added if self._total is None else self._total.add_(added)

    def cross(self, sweep: Sweep) -> Tensor:
        """(G o, i), as a mean over examples."""
        if self._total is None:
            return torch.zeros(self._shape, dtype=sweep.dtype, device=sweep.space.device)
        return self._total.reshape(self._shape) / sweep.denominator


class RowSum(Statistic):
    """Sum of the rows: the mean gradient that centering subtracts."""

    def __init__(self, index: int, part: Part) -> None:
        super().__init__(index)
        self._size = part.layout.size
        self._total: Tensor | None = None

    def costs(self, sample: Sample) -> Iterator[Cost]:
        (k,) = self.indices
        yield Cost(k, "", self._size, 2 * sample.directions * sample.positions(k) * self._size)

    def update(self, forms: Sequence[Form | None], first: bool, last: bool) -> None:
        for form in forms:
            if form is not None:
                added = form.total()
                self._total = added if self._total is None else self._total.add_(added)

    def mean(self, sweep: Sweep) -> Tensor:
        """(p,), in the part's own coordinates."""
        if self._total is None:
            return torch.zeros(self._size, dtype=sweep.dtype, device=sweep.space.device)
        return self._total / sweep.denominator


class RowStack(Statistic):
    """The rows themselves, all directions of all examples."""

    def __init__(
        self, indices: Sequence[int], parts: Sequence[Part], rank: int | None = None
    ) -> None:
        super().__init__(*indices)
        self._parts = parts
        self._size = sum(part.layout.size for part in parts)
        self._rank = rank  # of what will be made of the rows, where it is given
        self._batch: list[Tensor] = []  # chunks of directions (r, N, p) of the current batch
        self._rows: list[Tensor] = []  # (N, R, p) of each batch
        self._bytes = 0

    def costs(self, sample: Sample) -> Iterator[Cost]:
        rank = min(sample.directions * sample.examples, self._size)
        rank = rank if self._rank is None else min(rank, self._rank)
        for k, part in zip(self.indices, self._parts, strict=True):
            size = part.layout.size
            flops = 2 * sample.directions * sample.positions(k) * size
            core = rank if k == self.indices[0] else 0  # beside the root
            yield Cost(k, f"rank {rank} of {self._size}", rank * size + core, flops)

    def update(self, forms: Sequence[Form | None], first: bool, last: bool) -> None:
        present = [form for form in forms if form is not None]
        if not present:
            return
        r, n, _ = present[0].shape
        self._bytes += r * n * self._size * present[0].dtype.itemsize
        if self._bytes > MAX_BLOCK_BYTES:
            raise TooLargeError(
                f"the rows of {self._size} parameters for every example and output direction take "
                f"more than the limit of {MAX_BLOCK_BYTES / 2**30:.0f} GiB: take estimator='mc' or "
                "'empirical' (one row for each example), fewer examples, or another representation"
            )
        rows = [torch.cat([form.rows(a, b) for a, b in form.tiles()], 1) for form in present]
        self._batch.append(torch.cat(rows, -1))
        if last:
            self._rows.append(torch.cat(self._batch).transpose(0, 1))
            self._batch = []

    def rows(self, sweep: Sweep) -> Tensor:
        """(N, R, p) in flat parameter order; every batch must have as many directions."""
        counts = sorted({rows.shape[1] for rows in self._rows})
        if len(counts) > 1:
            raise DataError(
                f"expected every batch to have one number of outputs, got {counts}: pad them alike"
            )
        rows = self._ordered(torch.cat(self._rows))
        return rows - rows.mean(0) if sweep.center else rows

    def stacked(self, sweep: Sweep) -> Tensor:
        """All rows (K, p), of batches with any numbers of directions."""
        if not self._rows:  # of parameters that the outputs do not depend on
            return torch.zeros(1, self._size, dtype=sweep.dtype, device=sweep.space.device)
        if sweep.center:
            return self.rows(sweep).flatten(0, 1)
        return self._ordered(torch.cat([rows.flatten(0, 1) for rows in self._rows]))

    def _ordered(self, joint: Tensor) -> Tensor:
        used = [part for part in self._parts if part.kind != "unused"]
        out = joint.new_zeros(*joint.shape[:-1], self._size)
        out[..., flat_order(self._parts, used).to(joint.device)] = joint
        return out


class KroneckerFactors(Statistic):
    """The two factors of KFAC (Martens and Grosse 2015; sharing: Eschenhagen et al. 2023).

    expand: left = sum g g^T / N, right = sum x x^T / (N T), over examples, positions, directions.
    reduce: the same of sum_t g and mean_t x, right divided by N.
    """

    def __init__(self, index: int, part: Part, sharing: str) -> None:
        super().__init__(index)
        self._layout = part.layout
        self._reduce = sharing == "reduce"
        self._diagonal_left = part.layout.rows > MAX_FACTOR
        self._diagonal_right = part.layout.width > MAX_FACTOR
        self._left: Tensor | None = None
        self._right: Tensor | None = None
        self._positions: Tensor | int = 0

    def costs(self, sample: Sample) -> Iterator[Cost]:
        (k,), grid = self.indices, self._layout
        t = 1 if self._reduce else sample.positions(k)
        right = self._diagonal_right or (sample.indexed(k) and not self._reduce)
        sizes = [
            (grid.rows, self._diagonal_left, sample.directions * t),
            (grid.width, right, t),
        ]
        numbers = sum(grid.groups * (n if diagonal else n * n) for n, diagonal, _ in sizes)
        flops = sum(
            2 * grid.groups * count * (n if diagonal else n * n) for n, diagonal, count in sizes
        )
        yield Cost(k, _grid_kind("Kronecker", grid, self._diagonal_left, right), numbers, flops)

    def update(self, forms: Sequence[Form | None], first: bool, last: bool) -> None:
        (form,) = forms
        if not isinstance(form, Outer):
            raise TypeError("Kronecker factors need an outer form")
        if self._reduce:  # the reduced inputs are needed once
            form = form.reduced() if first else Outer(form.g.sum(3, keepdim=True), None, form.bias)
        self._left = form.output_moment(self._diagonal_left, self._left)
        if first:
            self._right = form.input_moment(self._diagonal_right, self._right)
            self._positions = self._positions + form.positions

    def factors(self, sweep: Sweep) -> tuple[Tensor, Tensor]:
        """left (G, o, o) and right (G, w, w); (G, o), (G, w) where diagonal."""
        if self._left is None or self._right is None:
            raise TypeError("no batch has been seen")
        return self._left.div_(sweep.denominator), self._right.div_(self._positions)

    @property
    def positions(self) -> int:
        """How many positions of all examples the right factor is a mean over."""
        return int(self._positions)


def _grid_kind(name: str, grid: Layout, left: bool, right: bool) -> str:
    """As a Kronecker operator names its kind; left and right say which factor is diagonal."""
    sides = [
        f"diagonal {n}" if diagonal else f"{n}x{n}"
        for n, diagonal in ((grid.rows, left), (grid.width, right))
    ]
    many = f"{grid.groups} x " if grid.groups > 1 else ""
    return f"{name} {many}({sides[0]}) x ({sides[1]})"


def flat_order(parts: Sequence[Part], chosen: Sequence[Part]) -> Tensor:
    """Where the coordinates of some parts lie among those of all parts in flat order."""
    everything = torch.cat([part.layout.positions() for part in parts]).sort().values
    where = torch.cat([part.layout.positions() for part in chosen])
    return torch.searchsorted(everything, where)


def all_finite(tensor: Tensor) -> Tensor:
    """Whether all numbers are finite, as a 0-d tensor; in one pass, without a mask in memory."""
    if tensor.numel() == 0:
        return torch.ones((), dtype=torch.bool, device=tensor.device)
    return torch.stack(torch.aminmax(tensor)).isfinite().all()
