"""The curvature of a loop in front of any optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from ..arguments import checked
from ..errors import DataError
from ..representations import Representation
from ..switches import whole_transforms
from .base import CurvatureOptimizer
from .direction import Direction
from .options import Damping, HessianFree, LevenbergMarquardt, Losses, Options, Schedule
from .solving import Vectors

__all__ = ["Preconditioner"]


class Preconditioner(CurvatureOptimizer):
    r"""Replaces the gradients by natural ones, for an optimizer that comes behind.

    .. math:: g \leftarrow \nu \, (F + \lambda)^{-1} g

    `loss.backward()`, `preconditioner.step()`, `optimizer.step()`. The new gradient is the step
    that `NaturalGradient` would make with lr=1, so that SGD with lr=1 behind it is that optimizer.
    If a gradient is not finite, all are set to zero.

    Args:
        model: the network.
        representation: as in `NaturalGradient`.
        likelihood: likewise.
        momentum: of the running average of gradients, 0 for an optimizer behind it that has one.
        radius, damping, eps, estimator, seed: as in `NaturalGradient`.
        params: a selector, tensors, or a list of groups {"params": either, "damping": ...}.
        factor_decay, update_every, invert_every, warmup: as in `NaturalGradient`.
        damping_method, second_moments: likewise.
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

    @checked
    def __init__(
        self,
        model: nn.Module,
        representation: str | Representation | HessianFree = "kfac",
        likelihood: Losses = None,
        *,
        momentum: float = 0.0,
        radius: float | None = 0.01,
        damping: Damping | None = None,
        eps: float = 3e-2,
        estimator: str = "mc",
        seed: int | None = None,
        params: Any = None,
        factor_decay: float = 0.95,
        update_every: int = 10,
        invert_every: int | None = None,
        warmup: int = 20,
        damping_method: str = "exact",
        second_moments: bool = False,
        outputs: Callable[[Any], Tensor] | None = None,
    ) -> None:
        if isinstance(damping, LevenbergMarquardt):
            raise DataError(
                "LevenbergMarquardt(...) follows the loss behind a whole step, which a "
                "preconditioner does not make: take NaturalGradient, a number, or a function of "
                "the step"
            )
        options = Options(
            representation,
            likelihood,
            Schedule(update_every, invert_every, warmup, factor_decay),
            momentum=momentum,
            radius=radius,
            damping=damping,
            eps=eps,
            estimator=estimator,
            seed=seed,
            damping_method=damping_method,
            second_moments=second_moments,
            outputs=outputs,
        )
        super().__init__(model, {}, params, options)

    @_disable_dynamo  # a compiled step runs as it is: hooks and decompositions are Python
    @whole_transforms()
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
            taken = self._take()
            if taken is None:
                for p in self._parameters.values():
                    if p.grad is not None:
                        p.grad.zero_()
            else:
                self._replace(*taken)
            self._whole.push(gradients=True)
        self._end_step()
        return loss

    def _replace(self, direction: Direction, steps: Vectors) -> None:
        """Gradients by directions, whose change of the predictions is tried out."""
        weights: list[Tensor] = [self._parameters[name] for name in steps]
        change = list(steps.values())
        if self._measuring(direction):
            before = [w.clone() for w in weights]

            def move(part: float) -> None:
                torch._foreach_copy_(weights, before)
                torch._foreach_sub_(weights, list(steps.values()), alpha=part)

            part = self._measured(direction, 1.0, move)
            torch._foreach_copy_(weights, before)
            change = list(torch._foreach_mul(change, part))
        for w, new in zip(weights, change, strict=True):
            if w.grad is not None and w.grad.is_sparse:
                w.grad = new.to(w.dtype).clone()
            elif w.grad is not None:
                w.grad.copy_(new)
