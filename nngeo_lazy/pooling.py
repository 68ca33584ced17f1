"""Pooling the statistics of several passes, as one pass over all of their data would."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from .arguments import described, require_sequence
from .errors import DataError, SpaceMismatchError
from .likelihoods.losses import PER_EXAMPLE
from .operators.base import BaseLinearOperator
from .operators.block_diagonal import BlockDiagonalLinearOperator
from .operators.dense import DenseLinearOperator
from .operators.diagonal import DiagonalLinearOperator
from .operators.factors import factor_of_sketch, sketch_of_factor
from .operators.info import Info, Origin
from .operators.kronecker import EigenKroneckerLinearOperator, KroneckerLinearOperator
from .operators.low_rank import LowRankLinearOperator
from .operators.quasi_diagonal import QuasiDiagonalLinearOperator
from .operators.sharded import AbsentLinearOperator
from .operators.stored import opened
from .sides import Shape, Wide, is_low_rank

__all__ = ["merge", "pool", "register_pooled"]


def merge(
    ops: Sequence[BaseLinearOperator], weights: Sequence[float] | None = None
) -> BaseLinearOperator:
    r"""Pool the statistics of matrices of one kind, as one pass over their joint data would.

    .. math:: F = \sum_k w_k F_k / \sum_k w_k

    for whatever is linear in the data. A KFAC pools its factors (which is not the average of the
    products: that is `lerp`), an EKFAC its eigenvalues if the basis is the same.

    Args:
        ops: operators over one space, of one representation and one quantity (likelihood,
            estimator, seed).
        weights: how much each counts; by default its number of examples.

    Returns:
        An operator of the same kind; `num_examples` and `num_terms` are added.

    Raises:
        SpaceMismatchError: the spaces or the blocks differ.
        DataError: the quantities or seeds differ, or pooling is undefined for the representation,
            or the weights do not fit.

    Example:
        >>> import nngeo_lazy as ng
        >>> model, x, y = torch.nn.Linear(3, 2), torch.randn(9, 3), torch.randn(9, 2)
        >>> halves = [ng.FIM(model, x[s], "kfac", likelihood="gaussian") for s in
        ...           (slice(0, 4), slice(4, 9))]
        >>> merge(halves).num_examples
        9
    """
    require_sequence("operators", ops)
    ops = list(ops)
    _require_alike(ops)
    for op in ops:
        _require_linear(op.info)
    counts = _counts(ops, weights)
    total = sum(counts)
    pooled = pool(ops, [c / total for c in counts], counts)
    return _with_info(pooled, _pooled_info(ops, counts, weights is None))


def _require_alike(ops: Sequence[BaseLinearOperator]) -> None:
    if not ops:
        raise DataError("expected at least one operator to merge, got none")
    if strangers := [type(op).__name__ for op in ops if not isinstance(op, BaseLinearOperator)]:
        raise DataError(f"expected operators that FIM or GGN returned, got {strangers}")
    if not all(op.info.quantity for op in ops):
        raise DataError(
            "expected operators as FIM or GGN returned them, but some come from no build, or were "
            "damped, inverted, scaled or added since: merge first, alter after"
        )
    first = ops[0]
    for op in ops[1:]:
        if op.space != first.space or op.shape != first.shape:
            raise SpaceMismatchError(
                f"expected operators over the same parameters, got {first.space} of shape "
                f"{tuple(first.shape)} and {op.space} of shape {tuple(op.shape)}"
            )
        mine, theirs = dict(first.info.quantity), dict(op.info.quantity)
        keys = [k for k in {**mine, **theirs} if mine.get(k) != theirs.get(k)]
        if keys:
            listed = "; ".join(f"{k}: {mine.get(k)} and {theirs.get(k)}" for k in keys)
            raise DataError(
                f"expected operators of one quantity, as one pass would have it, but they differ "
                f"in {listed}: build them alike (one seed), or average the matrices with F.lerp"
            )
        if op.dtype != first.dtype or op.device != first.device:
            raise DataError(
                f"expected operators of one dtype and device, got {first.dtype} on {first.device} "
                f"and {op.dtype} on {op.device}: convert them with .to(...)"
            )
        if type(op) is not type(first):
            raise DataError(
                f"expected operators of one representation, got {type(first).__name__} and "
                f"{type(op).__name__}"
            )


def _require_linear(info: Info) -> None:
    """Refuse what is no sum over examples."""
    if info.quantity.get("center"):
        raise DataError(
            "centered matrices are not linear in the data (each subtracts a mean of its own): "
            "build the pooled one from all of it"
        )
    if info.truncated:
        raise DataError(
            "best approximations of a rank are not linear in the data: merge LowRank() operators, "
            "which keep all rows, or average the matrices with F.lerp(G, w)"
        )


def _counts(ops: Sequence[BaseLinearOperator], weights: Sequence[float] | None) -> list[float]:
    if weights is None:
        known = [op.num_examples for op in ops]
        if ops[0].info.quantity.get("reduction", PER_EXAMPLE) != PER_EXAMPLE or not all(known):
            raise DataError(
                "merge weights operators by their numbers of examples, which these are no means "
                "over: pass weights="
            )
        return [float(n) for n in known if n]
    if not isinstance(weights, Sequence) or not all(isinstance(w, Real) for w in weights):
        raise DataError(
            f"expected weights to be a list of numbers, got {described(weights)}: pass one number "
            "for each operator"
        )
    counts = [float(w) for w in weights]
    fine = len(counts) == len(ops) and all(0 <= c < float("inf") for c in counts)
    if not fine or sum(counts) <= 0:
        raise DataError(
            f"expected {len(ops)} nonnegative weights, one for each operator and not all zero, got "
            f"{weights}"
        )
    return counts


Pool: TypeAlias = Callable[
    [Sequence[Any], Sequence[float], Sequence[float | None]], BaseLinearOperator
]
Kind = TypeVar("Kind", bound=type[BaseLinearOperator])


def register_pooled(kind: Kind, rule: Pool | None = None) -> Kind:
    r"""Tell how `merge` and the averages of optimizers pool operators of a class of your own.

    .. math:: t = \sum_k w_k t_k

    is the rule for each of its tensors t if none is given. It is right if the matrix is linear in
    its tensors, and these are means over the data. Also a decorator of the class.

    Args:
        kind: the class of a block, or of a whole matrix.
        rule: (operators, weights, positions) -> operator. The weights sum to one. Positions say for
            each operator over how many positions its means go, which a class may weight by in
            their place; None if that is not known.

    Returns:
        The class.

    Raises:
        DataError: the class has a rule already.

    Example:
        >>> from nngeo_lazy.operators import DenseLinearOperator
        >>> @register_pooled
        ... class Named(DenseLinearOperator):
        ...     pass
        >>> pool([Named(torch.eye(2)), Named(3 * torch.eye(2))], [0.5, 0.5]).diagonal()
        tensor([2., 2.])
    """
    if kind in _rules:
        raise DataError(f"expected a class without a rule of pooling, but {kind.__name__} has one")
    _rules[kind] = _tensors if rule is None else rule
    return kind


def pool(
    ops: Sequence[BaseLinearOperator],
    weights: Sequence[float],
    counts: Sequence[float] | None = None,
    *,
    else_weights: bool = False,
) -> BaseLinearOperator:
    """The statistics of operators over the same blocks, averaged.

    Args:
        ops: of one kind.
        weights: they sum to one.
        counts: the examples that each stands for, by which means over positions are weighted; by
            default they are weighted as all else.
        else_weights: whether they are so in a block without positions, or of unknown ones.

    Raises:
        DataError: the operators hold no statistics, or not of one kind.
        SpaceMismatchError: they have other blocks.
    """
    if isinstance(ops[0], BlockDiagonalLinearOperator):
        return _blocks(ops, weights, counts, else_weights)
    return _pooled(ops, weights, [None] * len(ops))


def _pooled(
    ops: Sequence[BaseLinearOperator],
    weights: Sequence[float],
    positions: Sequence[float | None],
) -> BaseLinearOperator:
    rule = _rules.get(type(ops[0]))
    if rule is None:
        raise DataError(
            f"{type(ops[0]).__name__} holds no statistics that could be pooled: average the "
            "matrices with F.lerp(G, w), or say how it is pooled with pooling.register_pooled"
        )
    return rule(ops, weights, positions)


def _tensors(
    ops: Sequence[BaseLinearOperator], weights: Sequence[float], positions: Sequence[float | None]
) -> BaseLinearOperator:
    tensors = zip(*(op._args for op in ops), strict=True)
    return type(ops[0])(*(_mean(each, weights) for each in tensors), **ops[0]._kwargs)


def _average(
    ops: Sequence[BaseLinearOperator], weights: Sequence[float], positions: Sequence[float | None]
) -> BaseLinearOperator:
    total = ops[0]._scale(weights[0])
    for op, weight in zip(ops[1:], weights[1:], strict=True):
        total = total + op._scale(weight)
    return total


def _quasi(
    ops: Sequence[QuasiDiagonalLinearOperator],
    weights: Sequence[float],
    positions: Sequence[float | None],
) -> BaseLinearOperator:
    diagonal = _mean([op.diagonal() for op in ops], weights)
    cross = _mean([op.coupling[:, :1] * op.cross for op in ops], weights)
    return QuasiDiagonalLinearOperator.of(diagonal.view(len(cross), -1), cross)


def _eigen(
    ops: Sequence[EigenKroneckerLinearOperator],
    weights: Sequence[float],
    positions: Sequence[float | None],
) -> BaseLinearOperator:
    if not all(ops[0].same_basis(op) for op in ops):
        raise DataError(
            "EKFACs pool their eigenvalues only in a common basis: build the later ones with "
            "ng.update_diag(F, ...), or merge KFACs"
        )
    return ops[0]._with_values(_mean([op.values for op in ops], weights))


def _kronecker(
    ops: Sequence[KroneckerLinearOperator],
    weights: Sequence[float],
    positions: Sequence[float | None],
) -> BaseLinearOperator:
    """Left factors are means over examples, right ones over positions."""
    known = [p for p in positions if p is not None]
    if len(known) < len(ops) or sum(known) <= 0:
        raise DataError(
            "the Kronecker factors do not know over how many positions they are means, since they "
            "were merged with weights= before, or belong to a tied weight: build one from all of "
            "the data, or average the matrices with F.lerp(G, w)"
        )
    left = _pooled_side([op.left for op in ops], weights)
    right = _pooled_side([op.right for op in ops], [p / sum(known) for p in known])
    return KroneckerLinearOperator(left, right)


def _pooled_side(sides: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The mean of Kronecker factors; of low rank ones, that of the sketches that they are from."""
    first = sides[0]
    if not is_low_rank(first):
        return _mean(sides, weights)
    *_, n, columns = first.shape
    test = Shape(n, Wide.LOW_RANK, columns - 1).test_matrix(first)
    if test is None:
        raise TypeError("a side without a rank")
    return factor_of_sketch(_mean([sketch_of_factor(s, test) for s in sides], weights), test)


def _blocks(
    ops: Sequence[BlockDiagonalLinearOperator],
    weights: Sequence[float],
    counts: Sequence[float] | None,
    else_weights: bool,
) -> BaseLinearOperator:
    if not all(ops[0].same_blocks(op) for op in ops):
        raise SpaceMismatchError("expected block-diagonal operators over the same blocks")
    blocks: list[BaseLinearOperator] = []
    for k, (name, layout, _) in enumerate(ops[0].parts):
        members = [opened(op.members[k]) for op in ops]
        if len({type(member) for member in members}) > 1:
            raise DataError(f"block {name!r}: expected one representation in all operators")
        positions: Sequence[float | None] = weights
        if counts is not None:
            start = layout.pieces[0].start
            found = [_positions(op, start, c) for op, c in zip(ops, counts, strict=True)]
            if not else_weights or (None not in found and any(found)):
                positions = found
        blocks.append(_pooled(members, weights, positions))
    return ops[0]._of(blocks)


def _positions(op: BlockDiagonalLinearOperator, start: int, count: float) -> float | None:
    """The positions of the block that starts there, as many as its weight stands for."""
    space = op.space
    if space is None:
        return None
    name = space.holding(start)
    origin = op.info.origins.get(name)
    if origin is None or origin.positions is None or not op.num_examples:
        return None
    mine = origin.positions
    if isinstance(mine, tuple):
        first = [layout.pieces[0].start for layout in op.layouts]
        mine = mine[sorted(s for s in first if space.holding(s) == name).index(start)]
    return mine * count / op.num_examples


def _mean(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    total = tensors[0] * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        if tensor.shape != total.shape:
            raise DataError(
                f"expected statistics of one shape, got {tuple(total.shape)} and "
                f"{tuple(tensor.shape)}"
            )
        total = torch.add(total, tensor, alpha=weight)
    return total


_rules: dict[type[BaseLinearOperator], Pool] = {
    DenseLinearOperator: _tensors,
    DiagonalLinearOperator: _tensors,
    LowRankLinearOperator: _average,
    QuasiDiagonalLinearOperator: _quasi,
    EigenKroneckerLinearOperator: _eigen,
    KroneckerLinearOperator: _kronecker,
    AbsentLinearOperator: lambda ops, weights, positions: ops[0],  # another process pools it
}


def _pooled_info(ops: Sequence[BaseLinearOperator], counts: Sequence[float], exact: bool) -> Info:
    def added(values: list[Any]) -> Any:
        known = [v for v in values if v is not None]
        if len(known) < len(values):
            return None
        count = max([len(v) for v in known if isinstance(v, tuple)], default=0)
        if not count:
            return sum(known)
        each = [v if isinstance(v, tuple) else (v,) * count for v in known]
        return tuple(sum(parts) for parts in zip(*each, strict=True))

    first = ops[0].info
    origins: dict[str, Origin] = {}
    for name, origin in first.origins.items():
        each = [op.info.origins.get(name, origin).positions for op in ops]
        origins[name] = replace(origin, positions=added(each) if exact else None)
    return replace(
        first,
        num_examples=added([op.num_examples for op in ops]),
        num_terms=added([op.num_terms for op in ops]),
        origins=origins,
        log_likelihood=added([op.info.log_likelihood for op in ops]),
    )


def _with_info(op: BaseLinearOperator, info: Info) -> BaseLinearOperator:
    known: BaseLinearOperator = op._with_info(info)
    return known
