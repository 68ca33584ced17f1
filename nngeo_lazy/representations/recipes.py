"""What representations are made of: recipes for single blocks, and operators from blocks."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from ..errors import NonFiniteError
from ..layout import Layout
from ..operators import (
    BaseLinearOperator,
    BlockDiagonalLinearOperator,
    DenseLinearOperator,
    DiagonalLinearOperator,
    Info,
    KroneckerLinearOperator,
    Origin,
    QuasiDiagonalLinearOperator,
)
from ..statistics import (
    BiasCross,
    KroneckerFactors,
    RowSum,
    SecondMoment,
    SquareSum,
    Statistic,
    Sweep,
    all_finite,
)

__all__ = [
    "Block",
    "Recipe",
    "block_diagonal",
    "block_name",
    "by_owner",
    "centered",
    "diagonal_block",
    "flat_layout",
    "info_of",
    "kronecker_block",
    "moment_blocks",
    "quasi_diagonal_block",
    "require_finite",
    "together",
    "whole",
]


@dataclass(frozen=True)
class Block:
    """A block of the matrix: which parts it represents, where it lies, and the operator."""

    indices: tuple[int, ...]
    layout: Layout
    operator: BaseLinearOperator
    positions: int | None = None


Recipe: TypeAlias = Generator[Sequence[Statistic], None, list[Block]]


# --- recipes of blocks ----------------------------------------------------------------------------


def together(recipes: Sequence[Recipe]) -> Recipe:
    """Recipes side by side: what they want from a pass, they get from the same one."""
    blocks: list[Block] = []
    running = list(recipes)
    while True:
        wanted: list[Statistic] = []
        still = []
        for recipe in running:
            try:
                wanted += next(recipe)
                still.append(recipe)
            except StopIteration as done:
                blocks += done.value
        running = still
        if not running:
            return sorted(blocks, key=lambda block: block.indices)
        yield wanted


def moment_blocks(sweep: Sweep, groups: Sequence[Sequence[int]]) -> Recipe:
    """A dense block for each group of parts."""
    moments = [SecondMoment(group, [sweep.parts[k] for k in group]) for group in groups]
    sums = [[RowSum(k, sweep.parts[k]) for k in group] for group in groups]
    yield [*moments, *(each for group in sums for each in group if sweep.center)]
    blocks = []
    for group, moment, means in zip(groups, moments, sums, strict=True):
        matrix = moment.matrix(sweep)
        layout = flat_layout(sweep, group)
        if sweep.center:
            mean = torch.cat([each.mean(sweep) for each in means])
            where = torch.cat([sweep.parts[k].layout.positions() for k in group]).argsort()
            mean = mean[where.to(mean.device)]
            matrix = matrix - torch.outer(mean, mean)
        require_finite(matrix, block_name(sweep, group))
        blocks.append(Block(tuple(group), layout, DenseLinearOperator(matrix)))
    return blocks


def diagonal_block(sweep: Sweep, k: int) -> Recipe:
    """A diagonal block for one part."""
    part = sweep.parts[k]
    squares, sums = SquareSum(k, part), RowSum(k, part)
    yield [squares, sums] if sweep.center else [squares]
    diagonal = squares.diagonal(sweep)
    if sweep.center:
        diagonal = centered(diagonal, sums.mean(sweep))
    return [Block((k,), part.layout, DiagonalLinearOperator(diagonal))]


def quasi_diagonal_block(sweep: Sweep, k: int) -> Recipe:
    """A quasi-diagonal block for one part, where it has a weight and a bias."""
    part = sweep.parts[k]
    if part.kind != "outer" or len(part.names) < 2:
        return (yield from diagonal_block(sweep, k))
    squares, cross, sums = SquareSum(k, part), BiasCross(k, part), RowSum(k, part)
    yield [squares, cross, sums] if sweep.center else [squares, cross]
    width = part.layout.width
    diagonal, coupling = squares.diagonal(sweep), cross.cross(sweep)
    if sweep.center:
        mean = sums.mean(sweep)
        diagonal = centered(diagonal, mean)
        grid = mean.view(-1, width)
        coupling = coupling - grid[:, :-1] * grid[:, -1:]
    operator = QuasiDiagonalLinearOperator.of(diagonal.view(-1, width), coupling)
    return [Block((k,), part.layout, operator)]


def kronecker_block(sweep: Sweep, k: int, sharing: str) -> Recipe:
    """A Kronecker block for one part, where it has such a form."""
    part = sweep.parts[k]
    if part.kind != "outer":
        return (yield from diagonal_block(sweep, k))
    factors = KroneckerFactors(k, part, sharing)
    yield [factors]
    operator = KroneckerLinearOperator(*factors.factors(sweep))
    return [Block((k,), part.layout, operator, factors.positions)]


def centered(squares: Tensor, mean: Tensor) -> Tensor:
    """Variances from mean squares and means; what cancels entirely is zero, not its rounding."""
    return (squares - mean.square()).clamp_min(0)


# --- operators from blocks ------------------------------------------------------------------------


def whole(sweep: Sweep, block: Block) -> BaseLinearOperator:
    """The operator of a single block in flat order."""
    operator: BaseLinearOperator = block.operator._with_info(info_of(sweep, [block]))
    return operator


def block_diagonal(sweep: Sweep, blocks: Sequence[Block]) -> BaseLinearOperator:
    """The block-diagonal operator of all blocks."""
    names = [block_name(sweep, block.indices) for block in blocks]
    for name, block in zip(names, blocks, strict=True):
        require_finite(block.operator, name)
    layouts = [block.layout for block in blocks]
    info = info_of(sweep, blocks).blocks(names, layouts)
    return BlockDiagonalLinearOperator(*(block.operator for block in blocks), info=info)


def info_of(sweep: Sweep, blocks: Sequence[Block]) -> Info:
    """What an operator made of these blocks knows."""
    positions = {k: block.positions for block in blocks for k in block.indices}
    origins = {}
    for k, part in enumerate(sweep.parts):
        form = part.form_name
        origin = Origin(_layer(sweep, k), form, part.note, positions.get(k))
        first = {name for name in part.names if name not in origins}
        origins.update(dict.fromkeys(part.names if part.members else first, origin))
    space = sweep.space.to(dtype=sweep.dtype)
    ordered = {name: replace(origins[name], layer=space.owner(name)) for name in space.names}
    return Info(
        space,
        sweep.num_examples,
        sweep.num_terms,
        ordered,
        sweep.described,
        sweep.log_likelihood,
    )


def flat_layout(sweep: Sweep, indices: Sequence[int]) -> Layout:
    """The parameters of some parts, one after the other in flat order."""
    names = {name for k in indices for name in sweep.parts[k].names}
    return Layout.flat([sweep.space.slices[n] for n in sweep.space.names if n in names])


def block_name(sweep: Sweep, indices: Sequence[int]) -> str:
    """The layers of some parts, or their parameters where a layer has other parts, too."""
    names = []
    for owner, inside in by_owner(sweep, indices).items():
        whole = by_owner(sweep, range(len(sweep.parts)))[owner]
        if len(inside) == len(whole):
            names.append(owner)
        else:
            names += [name for k in inside for name in sweep.parts[k].names]
    return " + ".join(names)


def _layer(sweep: Sweep, k: int) -> str:
    return sweep.space.owner(sweep.parts[k].names[0])


def by_owner(sweep: Sweep, indices: Sequence[int]) -> dict[str, list[int]]:
    """Parts of each module that owns parameters, in parameter order."""
    owners: dict[str, list[int]] = {}
    for k in indices:
        owners.setdefault(_layer(sweep, k), []).append(k)
    return owners


def require_finite(statistic: Tensor | BaseLinearOperator, layer: str) -> None:
    """Raise NonFiniteError where a statistic overflowed."""
    tensors = [statistic] if isinstance(statistic, Tensor) else statistic.representation()
    if not all(bool(all_finite(t)) for t in tensors):
        raise NonFiniteError(
            f"the statistics of {layer} contain NaN or infinity: its inputs or output gradients "
            "overflow. Check the parameters and the data, or build in a wider dtype (model.float())"
        )
