"""Running averages of matrices, for optimizers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .collectives import Group, owners
from .errors import NotPositiveDefiniteError
from .layout import Layout
from .operators.base import BaseLinearOperator
from .operators.block_diagonal import BlockDiagonalLinearOperator
from .operators.diagonal import DiagonalLinearOperator
from .operators.factors import factor_eigh
from .operators.info import Info
from .operators.kronecker import EigenKroneckerLinearOperator, KroneckerLinearOperator
from .pooling import pool
from .sides import is_dense, overlapped
from .space import ParamSpace

__all__ = [
    "averaged",
    "decomposed",
    "extended",
    "rebased",
    "require_semidefinite",
    "share_decompositions",
]

SMALL = 256  # rows of a factor that is decomposed together with others


def averaged(
    before: BaseLinearOperator | None, fresh: BaseLinearOperator, weight: float
) -> BaseLinearOperator:
    """(1 - weight) before + weight fresh, of the statistics: Kronecker factors each on their own.

    Means over positions are weighted by those of an example. So a batch that does not use a layer
    tells nothing of its inputs. What is known is what the fresh one knows.
    """
    if before is None:
        return fresh
    weights = [1 - weight, weight]
    mean = pool([before, fresh], weights, weights, else_weights=True)
    known: BaseLinearOperator = mean._with_info(_averaged_info(before.info, fresh.info, weight))
    return known


def _averaged_info(before: Info, fresh: Info, weight: float) -> Info:
    """The fresh one, with positions that are as averages over as many examples."""
    if not before.num_examples or not fresh.num_examples:
        return fresh
    scale = fresh.num_examples / before.num_examples
    origins = {}
    for name, origin in fresh.origins.items():
        old, new = before.origins.get(name, origin).positions, origin.positions
        if isinstance(old, tuple) and isinstance(new, tuple) and len(old) == len(new):
            both = zip(old, new, strict=True)
            mean: Any = tuple((1 - weight) * scale * a + weight * b for a, b in both)
        elif isinstance(old, tuple) or isinstance(new, tuple) or old is None or new is None:
            mean = new
        else:
            mean = (1 - weight) * scale * old + weight * new
        origins[name] = replace(origin, positions=mean)
    return replace(fresh, origins=origins)


def decomposed(F: BaseLinearOperator) -> BaseLinearOperator:
    """The same matrix, its Kronecker blocks by their eigenvalues and eigenvectors."""
    if not isinstance(F, BlockDiagonalLinearOperator):
        return F
    return F._map(lambda k, b: b.eigen() if isinstance(b, KroneckerLinearOperator) else b)


def share_decompositions(F: BaseLinearOperator, group: Group) -> None:
    """Let each Kronecker factor be decomposed by one process, the costliest first, and sent.

    A process on its own decomposes small ones of one size together.
    """
    if not isinstance(F, BlockDiagonalLinearOperator):
        return
    blocks = [block for block in F.members if isinstance(block, KroneckerLinearOperator)]
    factors = [
        (block, side, factor)
        for block in blocks
        for side, factor in (("left", block.left), ("right", block.right))
        if is_dense(factor)
    ]
    if not factors:
        return
    if group.size == 1:
        _decompose_together(factors)
        return
    owner = owners([float(f.shape[0] * f.shape[1] ** 3) for *_, f in factors], group.size)
    found: list[tuple[Tensor, Tensor]] = []
    with group.together("eigendecompositions"):
        for rank, (_, _, factor) in zip(owner, factors, strict=True):
            own = rank == group.rank
            values, vectors = factor_eigh(factor) if own else (factor[..., 0], factor)
            # bits depend on the order in memory, which must not depend on the owner
            found.append((values.clone(), vectors.clone(memory_format=torch.contiguous_format)))
    for rank in range(group.size):
        mine = [pair for pair, r in zip(found, owner, strict=True) if r == rank]
        group.send([tensor for pair in mine for tensor in pair], rank)
    for (block, side, _), pair in zip(factors, found, strict=True):
        block.hold(side, pair)


def _decompose_together(factors: Sequence[tuple[KroneckerLinearOperator, str, Tensor]]) -> None:
    """Hold the decompositions of factors (G, n, n), made at once for each small n."""
    sizes: dict[int, list[tuple[KroneckerLinearOperator, str, Tensor]]] = {}
    for each in factors:
        sizes.setdefault(each[2].shape[-1], []).append(each)
    for n, same in sizes.items():
        if len(same) > 1 and n <= SMALL:
            values, vectors = factor_eigh(torch.cat([factor for *_, factor in same]))
            counts = [len(factor) for *_, factor in same]
            own = zip(values.split(counts), vectors.split(counts), strict=True)
            for (block, side, _), (mine, basis) in zip(same, own, strict=True):
                block.hold(side, (mine.clone(), basis.clone()))


def require_semidefinite(F: BaseLinearOperator) -> None:
    """Refuse blocks whose eigenvalues are known, if one is negative beyond rounding.

    Raises:
        NotPositiveDefiniteError: it names the block.
    """
    parts = [("the whole matrix", F)]
    if isinstance(F, BlockDiagonalLinearOperator):
        parts = [(repr(name), block) for name, _, block in F.parts]
    known = (DiagonalLinearOperator, EigenKroneckerLinearOperator)
    lowest = {
        name: torch.stack([block.eigenvalues.min(), block.eigenvalues.abs().max()])
        for name, block in parts
        if isinstance(block, known) and block.shape[-1]
    }
    values = torch.stack(list(lowest.values())).tolist() if lowest else []
    rounding = torch.finfo(F.dtype).eps ** 0.5
    for name, (value, size) in zip(lowest, values, strict=True):
        if value < -rounding * size:
            raise NotPositiveDefiniteError(
                f"the curvature of {name} has a negative eigenvalue {value:.3g}, which an average "
                "of squares cannot have: rounding is larger than the curvature. Train in a wider "
                "dtype, or make a new optimizer in place of this state"
            )


def rebased(E: BaseLinearOperator, F: BaseLinearOperator) -> BaseLinearOperator:
    r"""An EKFAC in the eigenbasis Q' of a KFAC F: the diagonal of Q'^T E Q'.

    .. math:: s' = (U'^T U)^{\circ 2} \, s \, (V'^T V)^{\circ 2 T}

    It is the closest matrix to E with those eigenvectors. Blocks without any stay as they are.
    """
    if not isinstance(E, BlockDiagonalLinearOperator) or not E.same_blocks(F):
        raise TypeError("expected an EKFAC and a KFAC over the same blocks")
    blocks = []
    for old, new in zip(E.members, F.members, strict=True):
        if isinstance(old, EigenKroneckerLinearOperator) and isinstance(
            new, (KroneckerLinearOperator, EigenKroneckerLinearOperator)
        ):
            left, right = new.bases()
            values = overlapped(left, old.left_basis, old.values)  # (G,o,i)
            values = overlapped(right, old.right_basis, values.mT).mT
            blocks.append(EigenKroneckerLinearOperator(values, left, right))
        else:
            blocks.append(old)
    return E._of(blocks)


def extended(F: BaseLinearOperator, space: ParamSpace) -> BaseLinearOperator:
    """F over a larger space: a multiple of the identity, its mean eigenvalue, on the rest."""
    own = F.space
    if own is None or own == space:
        return F
    names, layouts, blocks = ["known"], [Layout.flat([own.slices[n] for n in own.names])], [F]
    if isinstance(F, BlockDiagonalLinearOperator):
        names, layouts, blocks = list(F.names), list(F.layouts), list(F.members)
    starts = {}
    for start in (piece.start for layout in layouts for piece in layout.pieces):
        name = own.holding(start)
        starts[start] = start - own.slices[name].start + space.slices[space.resolve(name)].start
    layouts = [layout.shifted(starts) for layout in layouts]
    known = {space.resolve(name) for name in own.names}
    mean = F.trace() / F.shape[-1]
    for name in space.names:
        if name not in known:
            where = space.slices[name]
            names.append(name)
            layouts.append(Layout.flat([where]))
            blocks.append(DiagonalLinearOperator(mean.expand(where.stop - where.start).clone()))
    info = Info(space.to(dtype=F.dtype))
    return BlockDiagonalLinearOperator(*blocks, info=info, names=names, layouts=layouts)
