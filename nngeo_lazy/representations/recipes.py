"""What representations are made of: recipes for single blocks, and operators from blocks."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from ..collectives import Group, owners
from ..errors import NonFiniteError
from ..facts import Facts
from ..jacobian.parts import Kind, Part
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
from ..operators.factors import (
    factor_diagonal,
    factor_eigh,
    factor_of_sketch,
    joint_factors,
)
from ..precision import all_finite
from ..sides import Wide, is_diagonal, is_low_rank, size_of
from ..statistics import (
    MAX_FACTOR,
    BiasCross,
    KroneckerFactors,
    RowSum,
    SecondMoment,
    Sharing,
    SquareSum,
    Statistic,
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
    "matrix_of",
    "moment_blocks",
    "quasi_diagonal_block",
    "require_finite",
    "shared_bases",
    "together",
    "whole",
]


@dataclass(frozen=True)
class Block:
    """A block of the matrix.

    Attributes:
        indices: the parts that it represents.
        layout: where its coordinates lie in the flat vector.
        operator: the block.
        positions: how many positions of all examples share the part; None if they are not counted.
        note: what the report says of it, in the place of the part's note.

    Example:
        >>> import torch
        >>> from nngeo_lazy.operators import DiagonalLinearOperator
        >>> block = Block((0,), Layout.flat([slice(0, 2)]), DiagonalLinearOperator(torch.ones(2)))
        >>> block.layout.size
        2
    """

    indices: tuple[int, ...]
    layout: Layout
    operator: BaseLinearOperator
    positions: int | None = None
    note: str | None = None


# It yields the statistics of a pass, is sent what is known after it, and returns the blocks.
Recipe: TypeAlias = Generator[Sequence[Statistic], Facts, list[Block]]


# --- recipes of blocks ----------------------------------------------------------------------------


def together(recipes: Sequence[Recipe]) -> Recipe:
    """Recipes side by side: what they want from a pass, they get from the same one."""
    blocks: list[Block] = []
    running, known = list(recipes), None
    while True:
        wanted: list[Statistic] = []
        still = []
        for recipe in running:
            try:
                wanted += next(recipe) if known is None else recipe.send(known)
                still.append(recipe)
            except StopIteration as done:
                blocks += done.value
        running = still
        if not running:
            return sorted(blocks, key=lambda block: block.indices)
        known = yield wanted


def moment_blocks(facts: Facts, groups: Sequence[Sequence[int]]) -> Recipe:
    """A dense block for each group of parts."""
    moments = [SecondMoment(group, [facts.parts[k] for k in group]) for group in groups]
    sums = [[RowSum(k, facts.parts[k]) for k in group] for group in groups]
    facts = yield [*moments, *(each for group in sums for each in group if facts.center)]
    blocks = []
    for group, moment, means in zip(groups, moments, sums, strict=True):
        matrix = moment.matrix(facts)
        layout = flat_layout(facts, group)
        if facts.center:
            known = [each.mean(facts) for each in means]
            most = max(map(len, known))  # a part that no output uses has one row of zeros
            mean = torch.cat([one.expand(most, -1) for one in known], -1)
            where = torch.cat([facts.parts[k].layout.positions() for k in group]).argsort()
            mean = mean[:, where.to(mean.device)]
            matrix = matrix - mean.mT @ mean
        require_finite(matrix, block_name(facts, group))
        blocks.append(Block(tuple(group), layout, DenseLinearOperator(matrix)))
    return blocks


def diagonal_block(facts: Facts, k: int) -> Recipe:
    """A diagonal block for one part."""
    part = facts.parts[k]
    squares, sums = SquareSum(k, part), RowSum(k, part)
    facts = yield [squares, sums] if facts.center else [squares]
    diagonal = squares.diagonal(facts)
    if facts.center:
        diagonal = centered(diagonal, sums.mean(facts))
    return [Block((k,), part.layout, DiagonalLinearOperator(diagonal))]


def quasi_diagonal_block(facts: Facts, k: int) -> Recipe:
    """A quasi-diagonal block for one part, if it has a weight and a bias."""
    part = facts.parts[k]
    if part.kind is not Kind.OUTER or len(part.names) < 2:
        return (yield from diagonal_block(facts, k))
    squares, cross, sums = SquareSum(k, part), BiasCross(k, part), RowSum(k, part)
    facts = yield [squares, cross, sums] if facts.center else [squares, cross]
    width = part.layout.width
    diagonal, coupling = squares.diagonal(facts), cross.cross(facts)
    if facts.center:
        mean = sums.mean(facts)
        diagonal = centered(diagonal, mean)
        grid = mean.view(len(mean), -1, width)
        coupling = coupling - (grid[..., :-1] * grid[..., -1:]).sum(0)
    operator = QuasiDiagonalLinearOperator.of(diagonal.view(-1, width), coupling)
    return [Block((k,), part.layout, operator)]


def kronecker_block(
    facts: Facts,
    k: int,
    sharing: Sharing,
    max_factor: int = MAX_FACTOR,
    wide: Wide = Wide.DIAGONAL,
    *,
    separate_bias: bool = False,
    forward_only: bool = False,
    tied: str = "diagonal",
) -> Recipe:
    """A Kronecker block for one part, if it has such a form."""
    part = facts.parts[k]
    if tied == "kronecker" and part.as_matrix is not None:
        return (yield from _tied_block(facts, k, sharing, max_factor, forward_only))
    if part.kind is not Kind.OUTER:
        return (yield from diagonal_block(facts, k))
    factors = KroneckerFactors(k, part, sharing, max_factor, wide)
    facts = yield [factors]
    left, right = (
        mean if test is None or is_diagonal(mean) else factor_of_sketch(mean, test)
        for mean, test in zip(factors.factors(facts), factors.tests, strict=True)
    )
    if separate_bias and not is_diagonal(right) and len(part.names) > 1:
        last = (size_of(right) - 1) % right.shape[2]  # the bias's column, in its block
        first = size_of(right) - 1 - last
        right[:, -1, :last] = 0  # the block diagonal of weight and bias is a Kronecker product, too
        right[:, first:-1, last] = 0
    if forward_only:
        left = torch.ones(left.shape[:2], dtype=left.dtype, device=left.device)
    operator = KroneckerLinearOperator(left, right)
    return [Block((k,), part.layout, operator, factors.positions)]


def _tied_block(
    facts: Facts, k: int, sharing: Sharing, max_factor: int, forward_only: bool
) -> Recipe:
    """One Kronecker product for a matrix that is used in both layouts, as it is stored.

    Each use has its factors. In the layout of the matrix the two change sides if a use takes it
    transposed: the rows of an embedding are its inputs.
    """
    part = facts.parts[k]
    uses = [KroneckerFactors(k, part, sharing, max_factor, use=use) for use in part.grids]
    facts = yield uses
    products = []
    for use, grid in zip(uses, part.grids, strict=True):
        left, right = use.factors(facts)
        if forward_only:
            left = torch.ones(left.shape[:2], dtype=left.dtype, device=left.device)
        products.append((right, left) if grid.pieces[0].transposed else (left, right))
    operator = KroneckerLinearOperator(*joint_factors(products))
    layout = matrix_of(part).layout
    return [Block((k,), layout, operator, note="one Kronecker product for uses in both layouts")]


def matrix_of(part: Part) -> Part:
    """The part in the layout that its Kronecker block has."""
    return part.as_matrix or part


def shared_bases(factors: list[list[Tensor]], group: Group) -> list[tuple[Tensor, Tensor]]:
    """The eigenvectors of pairs of Kronecker factors, which are overwritten by them one by one.

    Each dense factor is decomposed by one process of the group, and sent to all others.
    """
    places = [(pair, side) for pair in factors for side in (0, 1)]
    owner = owners([_flops_of_eigh(pair[side]) for pair, side in places], group.size)
    with group.together("eigendecompositions"):
        for (pair, side), rank in zip(places, owner, strict=True):
            if rank == group.rank or is_diagonal(pair[side]):
                basis = factor_eigh(pair[side])[1]
                # bits depend on the order in memory, which must not depend on the owner
                pair[side] = basis if group.size == 1 else basis.contiguous()
            elif is_low_rank(pair[side]):
                groups, _, n, k = pair[side].shape
                pair[side] = pair[side].new_empty(groups, 2, n, k - 1)
            else:
                pair[side] = pair[side].contiguous()
    for rank in range(group.size):
        own = [pair[side] for (pair, side), r in zip(places, owner, strict=True) if r == rank]
        group.send([basis for basis in own if not is_diagonal(basis)], rank)
    return [(left, right) for left, right in factors]


def _flops_of_eigh(factor: Tensor) -> float:
    """In proportion; nothing for a diagonal one."""
    if is_diagonal(factor):
        return 0.0
    return float(factor.shape[0] * size_of(factor) * factor.shape[-1] ** 2)


def centered(squares: Tensor, mean: Tensor) -> Tensor:
    """Variances (p,) from mean squares and means (R, p); what cancels is zero, not its rounding."""
    return (squares - mean.square().sum(0)).clamp_min(0)


# --- operators from blocks ------------------------------------------------------------------------


def whole(facts: Facts, block: Block) -> BaseLinearOperator:
    """The operator of a single block in flat order."""
    operator: BaseLinearOperator = block.operator._with_info(info_of(facts, [block]))
    return operator


def block_diagonal(facts: Facts, blocks: Sequence[Block]) -> BaseLinearOperator:
    """The block-diagonal operator of all blocks."""
    names = block_names(facts, [block.indices for block in blocks])
    for name, block in zip(names, blocks, strict=True):
        require_finite(block.operator, name)
    layouts = [block.layout for block in blocks]
    operators = [block.operator for block in blocks]
    info = info_of(facts, blocks)
    return BlockDiagonalLinearOperator(*operators, info=info, names=names, layouts=layouts)


def info_of(facts: Facts, blocks: Sequence[Block]) -> Info:
    """What an operator made of these blocks knows."""
    positions = {k: block.positions for block in blocks for k in block.indices}
    notes = {k: block.note for block in blocks for k in block.indices if block.note is not None}
    counts: dict[str, list[int | None]] = {}
    for k, part in enumerate(facts.parts):
        for name in part.names:
            counts.setdefault(name, []).append(positions.get(k))
    origins = {}
    for k, part in enumerate(facts.parts):
        each = counts[part.names[0]]
        known = [0 if count is None else count for count in each]
        shared = each[0] if len(set(each)) == 1 else tuple(known)
        origin = Origin(_layer(facts, k), part.form_name, notes.get(k, part.note), shared)
        first = {name for name in part.names if name not in origins}
        origins.update(dict.fromkeys(part.names if part.members else first, origin))
    space = facts.space.to(dtype=facts.dtype)
    ordered = {name: replace(origins[name], layer=space.owner(name)) for name in space.names}
    return Info(
        space,
        facts.num_examples,
        facts.num_terms,
        ordered,
        facts.described,
        facts.log_likelihood,
    )


def flat_layout(facts: Facts, indices: Sequence[int]) -> Layout:
    """The parameters of some parts, one after the other in flat order."""
    names = {name for k in indices for name in facts.parts[k].names}
    return Layout.flat([facts.space.slices[n] for n in facts.space.names if n in names])


def block_name(facts: Facts, indices: Sequence[int]) -> str:
    """The layers of some parts, or their parameters if a layer has other parts, too."""
    return block_names(facts, [indices])[0]


def block_names(facts: Facts, each: Sequence[Sequence[int]]) -> list[str]:
    """The same of several blocks."""
    whole = by_owner(facts, range(len(facts.parts)))
    owners = {k: owner for owner, inside in whole.items() for k in inside}
    found = []
    for indices in each:
        mine: dict[str, list[int]] = {}
        for k in indices:
            mine.setdefault(owners[k], []).append(k)
        names = []
        for owner, inside in mine.items():
            if len(inside) == len(whole[owner]):
                names.append(owner)
            else:
                names += [name for k in inside for name in facts.parts[k].names]
        found.append(" + ".join(names))
    return found


def _layer(facts: Facts, k: int) -> str:
    return facts.space.owner(facts.parts[k].names[0])


def by_owner(facts: Facts, indices: Sequence[int]) -> dict[str, list[int]]:
    """Parts of each module that owns parameters, in parameter order."""
    owners: dict[str, list[int]] = {}
    for k in indices:
        owners.setdefault(_layer(facts, k), []).append(k)
    return owners


def require_finite(statistic: Tensor | BaseLinearOperator, layer: str) -> None:
    """Raise NonFiniteError if a statistic overflowed."""
    tensors = [statistic] if isinstance(statistic, Tensor) else statistic.representation()
    if isinstance(statistic, KroneckerLinearOperator):
        # sums of x x^T: if an entry overflows, so does one of the diagonal (Cauchy-Schwarz)
        tensors = [factor_diagonal(t) if t.dim() > 1 else t for t in tensors]
    if not all(bool(all_finite(t)) for t in tensors):
        raise NonFiniteError(
            f"the statistics of {layer} contain NaN or infinity: its inputs or output gradients "
            "overflow. Check the parameters and the data, or build in a wider dtype (model.float())"
        )
