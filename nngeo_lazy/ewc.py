"""Elastic weight consolidation: a quadratic penalty that remembers earlier tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .arguments import checked, described
from .errors import DataError, SpaceMismatchError
from .operators import BaseLinearOperator
from .operators.vectors import VectorLike
from .space import ParamSpace, canonical_name

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
    if not isinstance(strength, (int, float, Tensor, Sequence)):
        raise DataError(
            f"expected strength to be a number or a list of numbers, got {described(strength)}: "
            "pass strength=1.0"
        )
    for pair in anchors:
        if not isinstance(pair, Sequence) or len(pair) != 2 or not _is_anchor(*pair):
            raise DataError(
                f"expected each anchor to be (F, parameters), got {described(pair)}: the operator "
                "is the first, and F.space.values(model).detach().clone() the second"
            )
    each = list(strength) if isinstance(strength, Sequence) else [strength] * len(anchors)
    if len(each) != len(anchors):
        raise DataError(f"expected {len(anchors)} strengths, one for each anchor, got {len(each)}")
    terms = []
    for (F, anchor), weight in zip(anchors, each, strict=True):
        if F.space is None:
            raise SpaceMismatchError("expected operators over parameters, got a bare matrix")
        here = _values(F.space, w) if isinstance(w, nn.Module) else w
        flat, start = (F.space.ravel(v) if isinstance(v, Mapping) else v for v in (here, anchor))
        if flat.shape != start.shape:
            raise SpaceMismatchError(
                f"expected parameters of shape {tuple(start.shape)}, got {tuple(flat.shape)}"
            )
        terms.append(weight / 2 * F.vTMv(flat - start))
    return torch.stack(terms).sum()


def _values(space: ParamSpace, model: nn.Module) -> Tensor:
    """The model's parameters, if they are those of the anchor."""
    own = {canonical_name(name): p.shape for name, p in model.named_parameters()}
    here = zip(space.names, space.shapes, strict=True)
    changed = [name for name, shape in here if own.get(canonical_name(name)) != shape]
    if changed:
        raise SpaceMismatchError(
            f"expected the model to have the parameters of F, but {changed} are not there or have "
            "another shape: take those that both have, as in shared = "
            "F.space.common(ng.ParamSpace.of(model)), F.block(list(shared.names)), and the anchor "
            "of the same names"
        )
    return space.values(model)


def _is_anchor(F: object, anchor: object) -> bool:
    """Whether these are an operator and parameters, flat or by name."""
    return isinstance(F, BaseLinearOperator) and isinstance(anchor, (Tensor, Mapping))
