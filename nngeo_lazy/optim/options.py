"""Options of the optimizers that take more than a number."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from ..arguments import NonNegativeInt, check_fields
from ..errors import DataError
from ..likelihoods import Joint
from ..quantities import LossLike
from ..representations import Implicit, Representation

__all__ = ["Damping", "HessianFree", "LevenbergMarquardt", "Losses", "Options", "Schedule"]


@dataclass(frozen=True)
class LevenbergMarquardt:
    r"""Damping that follows how well the quadratic model predicts the loss.

    .. math:: \rho = \frac{\ell(w + \delta) - \ell(w)}{g^T \delta + \tfrac12 \delta^T F \delta}

    with delta the whole step, F the exact curvature of the step's batches and g their gradient: 1
    if the model is exact. Every `every` steps the damping is multiplied by `decay` ** `every`
    if rho is above `high`, and divided by it if rho is below `low`. Such a step takes one
    more evaluation of the closure, and a product with F. The ratio is one of the step's own batch:
    if that is small, it says little about the loss of all data.

    Args:
        initial: the damping to start with.
        every: steps between two adjustments.
        decay: of the damping over a single step.
        low: below it the damping grows.
        high: above it the damping shrinks.
        minimum: bound of the damping.
        maximum: likewise.

    Raises:
        DataError: bounds that are not in order, or a decay outside of (0, 1].

    Example:
        >>> damping = LevenbergMarquardt(initial=1.0, every=1)
        >>> damping.adjusted(1.0, ratio=1.0)  # the model is exact: less damping
        0.95

    Source:
        Martens and Grosse (2015), Optimizing Neural Networks with Kronecker-factored Approximate
        Curvature, section 6.5; Levenberg (1944), Marquardt (1963), More (1978).
    """

    initial: float = 1.0
    every: int = 5
    decay: float = 0.95
    low: float = 0.25
    high: float = 0.75
    minimum: float = 1e-8
    maximum: float = 1e8

    def __post_init__(self) -> None:
        check_fields(self)
        fits = 0 < self.minimum <= self.initial <= self.maximum and self.low < self.high
        if not fits or self.every < 1 or not 0 < self.decay <= 1:
            raise DataError(
                "expected 0 < minimum <= initial <= maximum, low < high, every >= 1 and a decay in "
                f"(0, 1], got {self}"
            )

    def adjusted(self, damping: float, ratio: float) -> float:
        """The damping after a step with this reduction ratio; NaN counts as a bad one.

        >>> LevenbergMarquardt(every=1, decay=0.5).adjusted(2.0, ratio=1.0)
        1.0
        """
        factor = self.decay**self.every
        if ratio > self.high:
            damping *= factor
        elif not ratio >= self.low:
            damping /= factor
        return min(max(damping, self.minimum), self.maximum)


@dataclass(frozen=True)
class HessianFree:
    """Conjugate gradients on the exact Gauss-Newton matrix of the step's batches.

    Nothing is averaged over steps, and the curvature is that of the model's own distribution, exact
    whatever the estimator is. An iteration starts where the last step's ended.

    Args:
        preconditioner: a structured representation, averaged over steps, that preconditions the
            iteration; None for none.
        tol: relative residual to stop at.
        max_iter: products at the most; an iteration is cut off there without a warning.
        decay: of the last step's solution as the start of this one's.

    Raises:
        DataError: a number out of its range.

    Example:
        >>> import torch, nngeo_lazy as ng
        >>> model = torch.nn.Linear(3, 2)
        >>> free = HessianFree(preconditioner="diagonal", max_iter=20)
        >>> optimizer = ng.optim.NaturalGradient(model, free, "gaussian")
        >>> model(torch.randn(8, 3)).square().sum(1).mean().div(2).backward()
        >>> optimizer.step()

    Source:
        Martens (2010), Deep learning via Hessian-free optimization.
    """

    preconditioner: str | Representation | None = None
    tol: float = 1e-2
    max_iter: NonNegativeInt = 50
    decay: float = 0.95

    def __post_init__(self) -> None:
        check_fields(self)
        if not (self.tol > 0 and self.max_iter >= 1 and 0 <= self.decay <= 1):
            raise DataError(f"expected tol > 0, max_iter >= 1 and a decay in [0, 1], got {self}")


Damping: TypeAlias = float | Callable[[int], float] | LevenbergMarquardt
Losses: TypeAlias = LossLike | Mapping[str, LossLike | None] | Sequence[LossLike | None] | None
METHODS = ("exact", "factored")


@dataclass(frozen=True)
class Schedule:
    """When the curvature is renewed.

    Args:
        update_every: steps between refreshes of the statistics.
        invert_every: steps between decompositions; None for each refresh.
        warmup: so many first steps refresh everything.
        factor_decay: of the running averages, with bias correction.

    Raises:
        DataError: a number out of its range.
    """

    update_every: int = 10
    invert_every: int | None = None
    warmup: int = 20
    factor_decay: float = 0.95

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 <= self.factor_decay < 1:
            raise DataError(f"expected a factor_decay from 0 to below 1, got {self.factor_decay!r}")
        for name, least in (("update_every", 1), ("invert_every", 1), ("warmup", 0)):
            value = getattr(self, name)
            if value is None and name == "invert_every":
                continue
            if not isinstance(value, int) or value < least:
                raise DataError(
                    f"expected {name} to be an integer of {least} or more, got {value!r}"
                )

    def updates(self, step: int) -> bool:
        """Whether this step refreshes the statistics."""
        return step < self.warmup or step % self.update_every == 0

    def inverts(self, step: int, last: int | None) -> bool:
        """Whether this step decomposes anew; `last` is the one that did so before."""
        every = self.update_every if self.invert_every is None else self.invert_every
        return last is None or step < self.warmup or step // every > last // every


@dataclass(frozen=True)
class Options:
    """What both optimizers take; `NaturalGradient` says what each option means.

    Raises:
        DataError: a number out of its range.
    """

    representation: str | Representation | Implicit | HessianFree
    likelihood: Losses
    schedule: Schedule
    momentum: float
    radius: float | None
    damping: Damping | None
    eps: float
    estimator: str
    seed: int | None
    damping_method: str
    second_moments: bool
    outputs: Callable[[Any], Tensor] | None

    def __post_init__(self) -> None:
        check_fields(self)
        if isinstance(self.likelihood, Joint):
            object.__setattr__(self, "likelihood", self.likelihood.heads)
        for name, most in (("momentum", 1.0), ("radius", math.inf), ("eps", math.inf)):
            value = getattr(self, name)
            if value is not None and not 0 <= value < most:
                raise DataError(f"expected {name} from 0 to below {most:g}, got {value!r}")
        if self.damping_method not in METHODS:
            raise DataError(
                f"expected damping_method to be one of {list(METHODS)}, got {self.damping_method!r}"
            )
        if self.second_moments and self.radius is None:
            raise DataError(
                "second_moments=True gives directions without a length of their own, which a "
                "radius bounds: pass a radius"
            )
