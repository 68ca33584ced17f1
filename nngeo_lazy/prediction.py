"""Normal distributions of a network's outputs, and what they say about its labels."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from .errors import DataError
from .likelihoods import Bernoulli, Categorical, Gaussian, Likelihood, Poisson

__all__ = ["METHODS", "Prediction", "labels"]

METHODS = ("probit", "mc", "bridge")


@dataclass(frozen=True)
class Prediction:
    """A normal distribution of each example's outputs.

    Attributes:
        mean: (N, C).
        covariance: (N, C, C).
    """

    mean: Tensor
    covariance: Tensor

    def __iter__(self) -> Iterator[Tensor]:
        """The mean, then the covariance, so that it can be taken apart."""
        return iter((self.mean, self.covariance))

    @property
    def variance(self) -> Tensor:
        """The diagonals of the covariances (N, C)."""
        return self.covariance.diagonal(dim1=-2, dim2=-1)

    def sample(self, n: int, *, seed: int | None = None) -> Tensor:
        """Draws (n, N, C)."""
        values, vectors = torch.linalg.eigh(self.covariance)
        root = vectors * values.clamp_min(0).sqrt().unsqueeze(-2)  # below 0 by rounding only
        generator = None
        if seed is not None:
            generator = torch.Generator(device=self.mean.device).manual_seed(seed)
        shape, like = (n, *self.mean.shape), {"dtype": root.dtype, "device": root.device}
        z = torch.randn(shape, generator=generator, **like)
        return self.mean + torch.einsum("ncd,knd->knc", root, z)


def labels(
    likelihood: Likelihood,
    found: Prediction,
    shape: torch.Size,
    method: str,
    *,
    samples: int,
    seed: int | None,
) -> Tensor | Prediction:
    """The distribution of labels under that of the outputs; see `Laplace.predictive`.

    Args:
        likelihood: of the labels.
        found: the outputs' distribution, flat.
        shape: of an example's outputs.
        method: one of `METHODS`, for classes.
        samples: draws, for "mc".
        seed: of the draws.

    Raises:
        DataError: the method or the outputs do not fit the likelihood, or it is one of your own.
    """
    if not isinstance(likelihood, (Bernoulli, Categorical, Gaussian, Poisson)):
        raise DataError(
            f"no distribution of labels is known for {likelihood}, only for those of Bernoulli, "
            "Categorical, Gaussian and Poisson: take functional(x), the distribution of the outputs"
        )
    likelihood.check(found.mean.unflatten(1, shape), None)
    if isinstance(likelihood, Gaussian):
        return Prediction(found.mean, found.covariance + _noise(likelihood, found.mean, shape))
    if isinstance(likelihood, Poisson):
        return (found.mean + found.variance / 2).exp()
    if isinstance(likelihood, Categorical) and len(shape) > 1:
        raise DataError(
            f"expected one label for each example, and outputs (N, C), got (N, "
            f"{', '.join(map(str, shape))}): take functional(x)"
        )
    link = torch.sigmoid if isinstance(likelihood, Bernoulli) else _softmax
    if method == "mc":
        return link(found.sample(samples, seed=seed)).mean(0)
    if method == "probit":
        return link(found.mean / (1 + math.pi / 8 * found.variance.clamp_min(0)).sqrt())
    if not isinstance(likelihood, Categorical):
        raise DataError(
            "the bridge is to a Dirichlet distribution over classes, and the labels are "
            f"{likelihood}'s: take 'probit' or 'mc'"
        )
    return _bridge(found)


def _softmax(logits: Tensor) -> Tensor:
    return logits.softmax(-1)


def _bridge(found: Prediction) -> Tensor:
    """The Laplace bridge of logits that sum to zero: the mean of a Dirichlet distribution."""
    mean, covariance = found.mean, found.covariance
    classes = mean.shape[-1]
    # The Dirichlet's logits sum to zero: condition on that.
    along = covariance.sum(-1)
    total = along.sum(-1).clamp_min(torch.finfo(mean.dtype).tiny)[:, None]
    mean = mean - along * mean.sum(-1, keepdim=True) / total
    variance = found.variance - along.square() / total
    variance = variance.clamp_min(torch.finfo(mean.dtype).eps)
    # alpha_k = (1 - 2/C + e^{m_k} sum_l e^{-m_l} / C^2) / v_k, by logarithms
    spread = mean + (-mean).logsumexp(-1, keepdim=True) - 2 * math.log(classes)
    first = torch.full_like(spread, 1 - 2 / classes).log()
    return (torch.logaddexp(first, spread) - variance.log()).softmax(-1)


def _noise(likelihood: Gaussian, mean: Tensor, shape: torch.Size) -> Tensor:
    """The covariance of an example's labels given its outputs, (C, C)."""
    eye = torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device).unflatten(1, shape)
    precision = likelihood.hessian_product(torch.zeros_like(eye), None, eye)
    return cast(Tensor, torch.linalg.inv(precision.flatten(1)))
