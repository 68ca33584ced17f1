"""Elastic weight consolidation: a quadratic penalty that remembers earlier tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .arguments import checked
from .errors import DataError, SpaceMismatchError
from .operators import BaseLinearOperator
from .operators.vectors import VectorLike

__all__ = ["ewc_penalty"]


@checked
def ewc_penalty(
    w: nn.Module | VectorLike,
    anchors: Sequence[tuple[BaseLinearOperator, VectorLike]],
    *,
    strength: float | Tensor | Sequence[float | Tensor] = 1.0,
) -> Tensor:
    r"""What elastic weight consolidation adds to the loss of a new task, differentiable in w.

    .. math:: \tfrac12 \sum_k \lambda_k \, (w - w_k)^T F_k (w - w_k)

    Args:
        w: the network that learns, or its parameters, flat or by name.
        anchors: for each earlier task its Fisher (a mean over examples) in any representation, and
            the parameters after it: `(F, F.space.values(model).detach().clone())`.
        strength: lambda, one for all tasks or a list with one for each; `F.num_examples` makes the
            penalty the negative log posterior of a Laplace approximation.

    Returns:
        A 0-d tensor.

    Raises:
        DataError: no anchors, or another number of strengths.
        SpaceMismatchError: w or an anchor does not fit its F.

    Example:
        >>> import nngeo_lazy as ng
        >>> model, x, y = nn.Linear(3, 2), torch.randn(20, 3), torch.randint(2, (20,))
        >>> F = ng.FIM(model, (x, y), "kfac")
        >>> anchors = [(F, F.space.values(model).detach().clone())]
        >>> float(ewc_penalty(model, anchors, strength=10.0).detach())
        0.0

    Source: Kirkpatrick et al. (2017), Overcoming catastrophic forgetting in neural networks, eq. 3
        (diagonal); Ritter, Botev and Barber (2018), Online structured Laplace approximations for
        overcoming catastrophic forgetting (Kronecker).
    """
    if not anchors:
        raise DataError("expected at least one anchor (F, parameters), got none")
    each = list(strength) if isinstance(strength, Sequence) else [strength] * len(anchors)
    if len(each) != len(anchors):
        raise DataError(f"expected {len(anchors)} strengths, one for each anchor, got {len(each)}")
    terms = []
    for (F, anchor), weight in zip(anchors, each, strict=True):
        if F.space is None:
            raise SpaceMismatchError("expected operators over parameters, got a bare matrix")
        here = F.space.values(w) if isinstance(w, nn.Module) else w
        flat, start = (F.space.ravel(v) if isinstance(v, Mapping) else v for v in (here, anchor))
        if flat.shape != start.shape:
            raise SpaceMismatchError(
                f"expected parameters of shape {tuple(start.shape)}, got {tuple(flat.shape)}"
            )
        terms.append(weight / 2 * F.vTMv(flat - start))
    return torch.stack(terms).sum()
