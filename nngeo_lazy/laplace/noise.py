"""The variances of normal labels that have most evidence."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ..data import Batches
from ..errors import ConvergenceWarning, DataError
from ..likelihoods import Gaussian, Likelihood, Weighted
from ..operators import BaseLinearOperator
from ..precision import widened
from ..space import ParamSpace
from .outputs import labelled

__all__ = ["Fit", "fitted"]


@dataclass(frozen=True)
class Fit:
    """How variances are fitted; see `Laplace.fit_noise`."""

    loader: Any
    build: Callable[[Likelihood], BaseLinearOperator]
    per_output: bool
    structure: str | None
    target: Callable[[Any], Tensor] | None
    tol: float
    max_iter: int


class Posterior(Protocol):
    """What is fitted."""

    space: ParamSpace
    likelihood: Likelihood | None
    _forward: Callable[[nn.Module, Any], Tensor] | None

    def functional(self, x: Any, *, covariance: str) -> Any: ...
    def fit_prior_precision(self, structure: str) -> Any: ...
    def with_operator(self, F: BaseLinearOperator) -> Any: ...
    def _require_likelihood(self, what: str) -> Likelihood: ...


P = TypeVar("P", bound=Posterior)
LEAST = 1e-4  # of the labels, what must be left for the noise: less is rounding


def fitted(la: P, how: Fit) -> P:
    """The posterior with these variances and a prior."""
    given = la._require_likelihood("a noise")
    plain = given.likelihood if isinstance(given, Weighted) else given
    if not isinstance(plain, Gaussian):
        raise DataError(f"expected normal labels, whose variance is the noise, got {plain}")
    batches = Batches(how.loader, device=la.space.device, forward=la._forward, target=how.target)
    data, targets = labelled(batches, "the noise is fitted to")
    variance, change = None, float("inf")
    for _ in range(how.max_iter + 1):
        if how.structure is not None:
            la = la.fit_prior_precision(how.structure)
        found = la.functional(data, covariance="diagonal")
        new = _next(found, targets, la._require_likelihood("a noise"), how.per_output)
        if variance is not None:
            change = float(((new - variance) / new).abs().max())
        variance = new
        normal = Gaussian(variance if how.per_output else float(variance))
        known = Weighted(normal, given.nan) if isinstance(given, Weighted) else normal
        la = la.with_operator(how.build(known))
        if change <= how.tol:
            return la
    words = (
        f"the variances of the labels still change by {change:.2g} after {how.max_iter} "
        "iterations: raise max_iter, or tol"
    )
    warnings.warn(ConvergenceWarning(words, change, how.max_iter), stacklevel=5)
    return la


def _next(found: Any, targets: list[Any], given: Likelihood, per_output: bool) -> Tensor:
    """The next variances (C,), or one 0-d, from the present posterior of the outputs."""
    mean, spread = widened(found.mean), widened(found.variance)
    plain = given.likelihood if isinstance(given, Weighted) else given
    labels, weights = [], []
    for target in targets:
        own, w = target, None
        if isinstance(given, Weighted):
            first = target[0] if isinstance(target, (tuple, list)) else target
            own, w = given.parts(torch.zeros_like(first), target)
        ones = torch.ones_like(own, dtype=mean.dtype)
        labels.append(own.to(mean))
        weights.append(ones if w is None else ones * w.to(ones))
    y, w = torch.cat(labels), torch.cat(weights)
    shape, channels = y.shape, y.shape[-1] if per_output and y.dim() > 1 else 1
    present = torch.as_tensor(plain.variance, dtype=y.dtype, device=y.device)  # type: ignore[attr-defined]
    if present.dim() == 2 and present.shape != shape[1:]:
        raise DataError(
            "expected a variance for each output, got a covariance: fit_noise starts from "
            "likelihoods.Gaussian(variance) with a number or one for each output"
        )
    squares = (w * (y - mean.view(shape)).square()).reshape(-1, channels)
    shares = (w * spread.view(shape) / present).reshape(-1, channels)
    free = w.reshape(-1, channels).sum(0) - shares.sum(0)
    if not bool((free > LEAST * w.reshape(-1, channels).sum(0)).all()):
        raise DataError(
            "the parameters fit as many labels as there are, so that no noise is left: raise the "
            "prior precision, or fit the noise with more data"
        )
    made = squares.sum(0) / free
    return made if per_output and y.dim() > 1 else made.squeeze(0)
