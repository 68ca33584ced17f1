"""The curvature of a loop in front of any optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError
from ..quantities import LossLike
from ..representations import Representation
from .base import CurvatureOptimizer
from .options import Damping, HessianFree, LevenbergMarquardt

__all__ = ["Preconditioner"]


class Preconditioner(CurvatureOptimizer):
    r"""Replaces the gradients by natural ones, for an optimizer that comes behind.

    .. math:: g \leftarrow (F + \lambda I)^{-1} g

    `loss.backward()`, `preconditioner.step()`, `optimizer.step()`. All else is as in
    `NaturalGradient`. Where a gradient is not finite, all are set to zero.

    Args:
        model: the network.
        representation: as in `NaturalGradient`.
        likelihood: likewise.
        damping: a number or a function of the number of the step.
        estimator: "mc", "empirical" or "exact".
        seed: of label draws.
        params: a selector, or a list of groups {"params": selector, "damping": ...}.
        factor_decay: of the running averages.
        update_every: steps between refreshes of the statistics.
        invert_every: steps between decompositions; by default `update_every`.
        warmup: in so many first steps everything is refreshed.
        damping_method: "exact" or "factored".
        outputs: picks the outputs from what the model returns.

    Raises:
        DataError, SpaceMismatchError, StochasticModelError, UnsupportedLayerError: as
            `NaturalGradient`; a damping that follows the loss, which only a whole step can.

    Example:
        >>> import nngeo_lazy as ng
        >>> model, x, y = nn.Linear(3, 2), torch.randn(20, 3), torch.randn(20, 2)
        >>> preconditioner = ng.optim.Preconditioner(model, "kfac", "gaussian")
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> ((model(x) - y) ** 2 / 2).sum(1).mean().backward()
        >>> preconditioner.step(); optimizer.step()
    """

    def __init__(
        self,
        model: nn.Module,
        representation: str | Representation | HessianFree = "kfac",
        likelihood: LossLike | None = None,
        *,
        damping: Damping = 1e-3,
        estimator: str = "mc",
        seed: int | None = None,
        params: Any = None,
        factor_decay: float = 0.95,
        update_every: int = 10,
        invert_every: int | None = None,
        warmup: int = 0,
        damping_method: str = "exact",
        outputs: Callable[[Any], Tensor] | None = None,
    ) -> None:
        if isinstance(damping, LevenbergMarquardt):
            raise DataError(
                "LevenbergMarquardt(...) follows the loss behind a whole step, which a "
                "preconditioner does not make: take NaturalGradient, a number, or a function of "
                "the step"
            )
        super().__init__(
            model,
            representation,
            likelihood,
            {},
            estimator=estimator,
            seed=seed,
            params=params,
            factor_decay=factor_decay,
            update_every=update_every,
            invert_every=invert_every,
            warmup=warmup,
            damping=damping,
            damping_method=damping_method,
            outputs=outputs,
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """Precondition the gradients in place; a closure evaluates them, and its loss is returned.

        Raises:
            DataError: no gradients, or on a refresh no pass that they came from.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with self._math():
            gradients, finite = self._begin_step()
            left_out = self._left_out(finite)  # the gradients are zero then
            for name, direction in (gradients if left_out else self._directions(gradients)).items():
                grad = self._parameters[name].grad
                if grad is not None:
                    grad.copy_(direction)
        self._end_step()
        return loss
