"""The representation axis: how a matrix is stored, and how it is built from forms.

An options object says what to build; its `build` runs one pass over the data (two for EKFAC) that
adds plain sums to statistics, and makes the operator from them at the end. Statistics know forms,
operators know algebra, and neither knows a layer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from .errors import DataError, NonFiniteError, TooLargeError
from .jacobian.forms import Form, Outer, second_moment
from .jacobian.inputs import Inputs
from .jacobian.plan import Part
from .layout import Layout, assemble
from .operators import (
    BaseLinearOperator,
    BlockDiagonalLinearOperator,
    BlockInfo,
    DenseLinearOperator,
    DiagonalLinearOperator,
    EigenKroneckerLinearOperator,
    Info,
    KroneckerLinearOperator,
    Origin,
)
from .space import ParamSpace

__all__ = [
    "EKFAC",
    "KFAC",
    "BlockDiagonal",
    "Dense",
    "Diagonal",
    "Representation",
    "Sweep",
    "resolve",
]

MAX_FACTOR = 16_384  # a Kronecker factor past this size is kept diagonal
MAX_BLOCK_BYTES = 2**33  # a dense block past this size is refused


class Statistic(ABC):
    """Plain sums over directions and examples of one block.

    Args:
        indices: which parts of the plan it sums over.
    """

    def __init__(self, *indices: int) -> None:
        self.indices = indices

    @abstractmethod
    def update(self, forms: Sequence[Form | None], first: bool, last: bool) -> None:
        """Add a chunk of directions, first or last of its batch or not. None is a zero block."""


Make = Callable[[Sequence[Part]], Sequence[Statistic]]


class Sweep(Protocol):
    """A pass over the data on demand, and what is known behind the first one."""

    space: ParamSpace
    num_examples: int
    num_terms: int
    dtype: torch.dtype

    @property
    def parts(self) -> Sequence[Part]:
        """The parameters by form."""

    def __call__(self, make: Make, keep: bool = False) -> Sequence[Statistic]:
        """Make the statistics, then update them over all batches.

        With `keep` the forms are kept for the next call where they fit into memory.
        """


S = TypeVar("S", bound=Statistic)


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
        everything = torch.cat([part.layout.positions() for part in self._parts]).sort().values
        where = torch.cat([part.layout.positions() for part in used])
        index = torch.searchsorted(everything, where).to(out.device)
        out[index[:, None], index[None, :]] = self._total / sweep.num_examples
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
        self._left = left if left is not None and left.dim() == 3 else None
        self._right = right if right is not None and right.dim() == 3 else None
        self._inputs: Inputs | None = None  # of the current batch, prepared for all its directions
        self._squares: Tensor | None = None  # of the current batch, summed over its directions
        self._total: Tensor | None = None

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
        return self._total / sweep.num_examples


class KroneckerFactors(Statistic):
    """The two factors of KFAC (Martens and Grosse 2015; sharing: Eschenhagen et al. 2023).

    expand: left = sum g g^T / N, right = sum x x^T / (N T), over examples, positions, directions.
    reduce: the same of sum_t g and mean_t x, right divided by N.
    """

    def __init__(self, index: int, part: Part, sharing: str) -> None:
        super().__init__(index)
        self._reduce = sharing == "reduce"
        self._diagonal_left = part.layout.rows > MAX_FACTOR
        self._diagonal_right = part.layout.width > MAX_FACTOR
        self._left: Tensor | None = None
        self._right: Tensor | None = None
        self._positions: Tensor | int = 0

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
        return self._left.div_(sweep.num_examples), self._right.div_(self._positions)


class Representation(ABC):
    """What to build; one of the options objects below, or its name in lower case."""

    @abstractmethod
    def build(self, sweep: Sweep) -> BaseLinearOperator:
        """The operator, from one or more passes over the data."""


@dataclass(frozen=True)
class Dense(Representation):
    """The P x P matrix itself. Memory P^2; for small models and for reference."""

    def build(self, sweep: Sweep) -> BaseLinearOperator:
        def make(parts: Sequence[Part]) -> list[Statistic]:
            return [SecondMoment(range(len(parts)), parts)]

        (moment,) = _cast(SecondMoment, sweep(make))
        matrix = moment.matrix(sweep)
        _require_finite(matrix, "the network")
        return DenseLinearOperator(matrix, info=_info(sweep))


@dataclass(frozen=True)
class BlockDiagonal(Representation):
    """A dense block for each module that owns parameters. Memory sum of p_l^2."""

    def build(self, sweep: Sweep) -> BaseLinearOperator:
        def make(parts: Sequence[Part]) -> list[Statistic]:
            owners = _by_owner(sweep.space, parts)
            return [SecondMoment(ks, [parts[k] for k in ks]) for ks in owners.values()]

        moments = _cast(SecondMoment, sweep(make))
        owners = _by_owner(sweep.space, sweep.parts)
        blocks, layouts = [], []
        for (owner, ks), moment in zip(owners.items(), moments, strict=True):
            matrix = moment.matrix(sweep)
            _require_finite(matrix, owner)
            blocks.append(DenseLinearOperator(matrix))
            names = {name for k in ks for name in sweep.parts[k].names}
            chosen = [sweep.space.slices[n] for n in sweep.space.names if n in names]
            layouts.append(Layout.flat(chosen))
        return BlockDiagonalLinearOperator(*blocks, info=_info(sweep, tuple(owners), layouts))


@dataclass(frozen=True)
class Diagonal(Representation):
    """The diagonal. Memory P."""

    def build(self, sweep: Sweep) -> BaseLinearOperator:
        sums = sweep(lambda parts: [SquareSum(k, part) for k, part in enumerate(parts)])
        placed = []
        for part, each in zip(sweep.parts, _cast(SquareSum, sums), strict=True):
            diagonal = each.diagonal(sweep)
            _require_finite(diagonal, _layer(sweep.space, part))
            placed += part.layout.scatter(diagonal.unsqueeze(-1))
        return DiagonalLinearOperator(assemble(placed).squeeze(-1), info=_info(sweep))


@dataclass(frozen=True)
class KFAC(Representation):
    """Kronecker-factored blocks, G kron A for each weight (with its bias).

    Martens and Grosse (2015), Grosse and Martens (2016) for convolutions; weight sharing as in
    Eschenhagen et al. (2023): `expand` treats positions as examples and is exact for deep linear
    networks with a loss for each position, `reduce` sums over them first and is exact where the
    positions are averaged. What has no Kronecker form gets a diagonal block; the report says so.

    Args:
        sharing: "expand" or "reduce".
    """

    sharing: str = "expand"

    def __post_init__(self) -> None:
        _check_sharing(self.sharing)

    def build(self, sweep: Sweep) -> BaseLinearOperator:
        blocks = [
            KroneckerLinearOperator(*each.factors(sweep))
            if isinstance(each, KroneckerFactors)
            else DiagonalLinearOperator(_cast(SquareSum, [each])[0].diagonal(sweep))
            for each in _kronecker_statistics(sweep, self.sharing)
        ]
        return _blocks_by_part(sweep, blocks)


@dataclass(frozen=True)
class EKFAC(Representation):
    """KFAC's eigenbasis with the best diagonal in it (George et al. 2018). Two passes.

    Args:
        sharing: of the KFAC whose eigenbasis is taken, "expand" or "reduce".
    """

    sharing: str = "expand"

    def __post_init__(self) -> None:
        _check_sharing(self.sharing)

    def build(self, sweep: Sweep) -> BaseLinearOperator:
        first = _kronecker_statistics(sweep, self.sharing, keep=True)
        bases: dict[int, tuple[Tensor, Tensor]] = {}
        for k, (part, each) in enumerate(zip(sweep.parts, first, strict=True)):
            if isinstance(each, KroneckerFactors):
                factors = KroneckerLinearOperator(*each.factors(sweep))
                _require_finite(factors, _layer(sweep.space, part))
                bases[k] = factors.bases()
        second = sweep(lambda parts: [SquareSum(k, parts[k], *basis) for k, basis in bases.items()])
        rotated = dict(zip(bases, _cast(SquareSum, second), strict=True))
        blocks: list[BaseLinearOperator] = []
        for k, (part, each) in enumerate(zip(sweep.parts, first, strict=True)):
            if k in rotated:
                grid = (part.layout.groups, part.layout.rows, part.layout.width)
                values = rotated[k].diagonal(sweep).view(grid)
                blocks.append(EigenKroneckerLinearOperator(values, *bases[k]))
            else:
                diagonal = _cast(SquareSum, [each])[0].diagonal(sweep)
                blocks.append(DiagonalLinearOperator(diagonal))
        return _blocks_by_part(sweep, blocks)


NAMES: dict[str, Callable[[], Representation]] = {
    "dense": Dense,
    "block_diagonal": BlockDiagonal,
    "diagonal": Diagonal,
    "kfac": KFAC,
    "ekfac": EKFAC,
}


def resolve(representation: str | Representation) -> Representation:
    """An options object from itself or from its name.

    Raises:
        DataError: an unknown name, or an options class that was not called.
    """
    if isinstance(representation, Representation):
        return representation
    if isinstance(representation, str) and representation in NAMES:
        return NAMES[representation]()
    raise DataError(
        f"unknown representation {representation!r}: expected one of {sorted(NAMES)}, or an "
        "options object such as nngeo_lazy.representations.KFAC(sharing='reduce')"
    )


def _check_sharing(sharing: str) -> None:
    if sharing not in ("expand", "reduce"):
        raise DataError(f"expected sharing='expand' or 'reduce', got {sharing!r}")


def _kronecker_statistics(sweep: Sweep, sharing: str, keep: bool = False) -> Sequence[Statistic]:
    return sweep(
        lambda parts: [
            KroneckerFactors(k, part, sharing) if part.kind == "outer" else SquareSum(k, part)
            for k, part in enumerate(parts)
        ],
        keep=keep,
    )


def _blocks_by_part(sweep: Sweep, blocks: Sequence[BaseLinearOperator]) -> BaseLinearOperator:
    owners = _by_owner(sweep.space, sweep.parts)
    names = []
    for part, block in zip(sweep.parts, blocks, strict=True):
        layer = _layer(sweep.space, part)
        _require_finite(block, layer)
        names.append(layer if len(owners[layer]) == 1 else " + ".join(part.names))
    layouts = [part.layout for part in sweep.parts]
    return BlockDiagonalLinearOperator(*blocks, info=_info(sweep, tuple(names), layouts))


def _layer(space: ParamSpace, part: Part) -> str:
    return space.owner(part.names[0])


def _by_owner(space: ParamSpace, parts: Sequence[Part]) -> dict[str, list[int]]:
    """The parts of each module that owns parameters, in parameter order."""
    owners: dict[str, list[int]] = {}
    for k, part in enumerate(parts):
        owners.setdefault(_layer(space, part), []).append(k)
    return owners


def _info(
    sweep: Sweep, names: tuple[str, ...] | None = None, layouts: Sequence[Layout] = ()
) -> Info:
    origins = {}
    for part in sweep.parts:
        layer = _layer(sweep.space, part)
        form = "zero" if part.kind == "unused" else f"{part.function}: {part.kind}"
        origins.update({name: Origin(layer, form, part.note) for name in part.names})
    space = sweep.space.to(dtype=sweep.dtype)
    ordered = {name: origins[name] for name in space.names}
    if names is None:
        return Info(space, sweep.num_examples, sweep.num_terms, ordered)
    return BlockInfo(
        space, sweep.num_examples, sweep.num_terms, ordered, names=names, layouts=tuple(layouts)
    )


def all_finite(tensor: Tensor) -> Tensor:
    """Whether all numbers are finite, as a 0-d tensor; in one pass, without a mask in memory."""
    if tensor.numel() == 0:
        return torch.ones((), dtype=torch.bool, device=tensor.device)
    return torch.stack(torch.aminmax(tensor)).isfinite().all()


def _require_finite(statistic: Tensor | BaseLinearOperator, layer: str) -> None:
    tensors = [statistic] if isinstance(statistic, Tensor) else statistic.representation()
    if not all(bool(all_finite(t)) for t in tensors):
        raise NonFiniteError(
            f"the statistics of {layer} contain NaN or infinity: its inputs or output gradients "
            "overflow. Check the parameters and the data, or build in a wider dtype (model.float())"
        )


def _cast(kind: type[S], statistics: Sequence[Statistic]) -> list[S]:
    out = []
    for each in statistics:
        if not isinstance(each, kind):
            raise TypeError(f"expected {kind.__name__}, got {type(each).__name__}")
        out.append(each)
    return out
