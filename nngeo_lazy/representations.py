"""The representation axis: how a matrix is stored, and how it is built from forms.

An options object says what to build; its `build` runs one pass over the data (two for EKFAC) that
adds plain sums to statistics, and makes the operator from them at the end. Statistics know forms,
operators know algebra, and neither knows a layer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from .errors import DataError, NonFiniteError
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
from .statistics import (
    KroneckerFactors,
    SecondMoment,
    SquareSum,
    Statistic,
    Sweep,
    all_finite,
)

__all__ = [
    "EKFAC",
    "KFAC",
    "BlockDiagonal",
    "Dense",
    "Diagonal",
    "Representation",
    "resolve",
]

S = TypeVar("S", bound=Statistic)


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
    Memory o^2 + (i + 1)^2 for a weight (o, i).

    Args:
        sharing: "expand" or "reduce".

    Raises:
        DataError: another sharing.

    Example:
        >>> KFAC(sharing="reduce")
        KFAC(sharing='reduce')
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
