"""Pruning: which parameters the loss misses least, and what the others do about it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .arguments import checked
from .errors import DataError, SpaceMismatchError, wrong_option
from .operators import BaseLinearOperator
from .operators.damping import DampingLike
from .operators.vectors import VectorLike
from .switches import untraced

__all__ = ["Pruned", "prune", "saliency"]

METHODS = ("obd", "obs")


class Pruned(NamedTuple):
    """What `prune` returns.

    Attributes:
        values: the parameters after pruning, flat (P,).
        kept: which of them are left, (P,) of bool.

    Example:
        >>> values, kept = Pruned(torch.tensor([0.5, 0.0]), torch.tensor([True, False]))
        >>> int(kept.sum())
        1
    """

    values: Tensor
    kept: Tensor


@untraced
@checked
def saliency(
    F: BaseLinearOperator,
    w: nn.Module | VectorLike,
    *,
    method: str = "obd",
    damping: DampingLike = 0.0,
) -> Tensor:
    r"""How much the loss would grow without each single parameter, to second order.

    .. math:: s_i = \tfrac12 w_i^2 F_{ii} \quad (\text{obd}), \qquad
        s_i = \tfrac12 w_i^2 / [(F + d)^{-1}]_{ii} \quad (\text{obs})

    Args:
        F: the Fisher, or a Gauss-Newton matrix, at trained parameters, in any representation.
        w: the network, or its parameters, flat or by name.
        method: "obd": the other parameters stay; "obs": they move to the best place without it.
        damping: d, for "obs".

    Returns:
        (P,), flat.

    Raises:
        SpaceMismatchError: w does not fit F.
        NotPositiveDefiniteError: "obs" of a singular F without damping.

    Example:
        >>> from nngeo_lazy.operators import DiagonalLinearOperator
        >>> F, w = DiagonalLinearOperator(torch.tensor([1.0, 4.0])), torch.tensor([2.0, 2.0])
        >>> saliency(F, w), saliency(F, w, method="obs")
        (tensor([2., 8.]), tensor([2., 8.]))

    Source: LeCun, Denker and Solla (1990), Optimal brain damage, eq. 5; Hassibi and Stork (1993),
        Second order derivatives for network pruning: optimal brain surgeon, eq. 5.
    """
    if method not in METHODS:
        raise ValueError(wrong_option("method", method, METHODS, "pruning"))
    squares = _flat(F, w).square() / 2
    if method == "obd":
        curvature: Tensor = F.diagonal()
        return squares * curvature
    variance: Tensor = F.inverse(damping=damping).diagonal()
    return squares / variance


@untraced
@checked
def prune(
    F: BaseLinearOperator,
    w: nn.Module | VectorLike,
    fraction: float,
    *,
    method: str = "obd",
    damping: DampingLike = 0.0,
    compensate: bool = False,
    candidates: Tensor | None = None,
) -> Pruned:
    r"""Set the parameters of the least saliency to zero.

    With `compensate` the kept ones K move to the minimum of the quadratic model, given that the
    pruned ones S are zero:

    .. math:: w_K' = w_K + (F + d)_{KK}^{-1} (F + d)_{KS} \, w_S

    Args:
        F: as in `saliency`.
        w: as in `saliency`; it stays as it is: `F.space.assign_(model, pruned.values)` writes it.
        fraction: of the candidates, from 0 to below 1.
        method: as in `saliency`.
        damping: d.
        compensate: whether the others move, by conjugate gradients.
        candidates: (P,) of bool, what may be pruned; by default everything.

    Returns:
        The parameters, and which are left.

    Raises:
        DataError: a fraction outside of [0, 1), or candidates that do not fit.
        SpaceMismatchError: w does not fit F.
        NotPositiveDefiniteError: "obs" of a singular F without damping.

    Example:
        >>> from nngeo_lazy.operators import DenseLinearOperator
        >>> F = DenseLinearOperator(torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
        >>> prune(F, torch.tensor([4.0, 1.0]), 0.5, compensate=True).values
        tensor([4.5000, 0.0000])

    Source: Hassibi and Stork (1993), Second order derivatives for network pruning: optimal brain
        surgeon, eq. 5, for many parameters at once.
    """
    fraction = float(fraction)
    if not 0 <= fraction < 1:
        raise DataError(f"expected a fraction from 0 to below 1, got {fraction!r}")
    flat = _flat(F, w)
    scores = saliency(F, flat, method=method, damping=damping)
    if candidates is not None:
        if candidates.shape != flat.shape or candidates.dtype != torch.bool:
            raise DataError(
                f"expected candidates of bool, shape {tuple(flat.shape)}, got "
                f"{candidates.dtype} of {tuple(candidates.shape)}"
            )
        scores = scores.masked_fill(~candidates, torch.inf)
    possible = len(flat) if candidates is None else int(candidates.sum())
    kept = torch.ones_like(flat, dtype=torch.bool)
    kept[scores.argsort()[: round(fraction * possible)]] = False
    values = flat * kept
    if compensate and not bool(kept.all()):
        damped = F.damped(damping)
        pull = (damped @ (flat - values))[kept]
        index = kept.nonzero().squeeze(1)
        values[kept] = values[kept] + damped[index, :][:, index].solve(pull)
    return Pruned(values, kept)


def _flat(F: BaseLinearOperator, w: nn.Module | VectorLike) -> Tensor:
    """The parameters, detached."""
    if isinstance(w, (nn.Module, Mapping)):
        if F.space is None:
            raise SpaceMismatchError("expected an operator over parameters, got a bare matrix")
        w = F.space.values(w) if isinstance(w, nn.Module) else F.space.ravel(w)
    if w.shape != F.shape[:1]:
        raise SpaceMismatchError(
            f"expected parameters of shape ({F.shape[0]},), got {tuple(w.shape)}"
        )
    return w.detach().to(F.dtype)
