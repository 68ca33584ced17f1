"""Normal distributions of a network's outputs, and what they say about its labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from .errors import DataError
from .likelihoods import Bernoulli, Categorical, Gaussian, Likelihood, Poisson

__all__ = ["METHODS", "Prediction", "labels", "labels_of_draws", "needs_all_pairs", "nll"]

METHODS = ("probit", "mc", "bridge", "weights")


@dataclass(frozen=True)
class Prediction:
    """A normal distribution of each example's outputs.

    Attributes:
        mean: (N, C).
        covariance: by kind: "full", (N, C, C), of each example; "diagonal", the variances (N, C);
            "joint", (N C, N C), of all examples together, example slowest.
        kind: of the covariance.
    """

    mean: Tensor
    covariance: Tensor
    kind: str = "full"

    def __iter__(self) -> Iterator[Tensor]:
        """The mean, then the covariance, so that it can be taken apart."""
        return iter((self.mean, self.covariance))

    @property
    def variance(self) -> Tensor:
        """Of each output (N, C)."""
        if self.kind == "diagonal":
            return self.covariance
        return self.covariance.diagonal(dim1=-2, dim2=-1).reshape(self.mean.shape)

    def sample(self, n: int, *, seed: int | None = None) -> Tensor:
        """Draws (n, N, C)."""
        generator = None
        if seed is not None:
            generator = torch.Generator(device=self.mean.device).manual_seed(seed)
        mean, shape = self.mean, (n, *self.mean.shape)
        z = torch.randn(shape, generator=generator, dtype=mean.dtype, device=mean.device)
        if self.kind == "diagonal":
            return mean + self.covariance.clamp_min(0).sqrt() * z
        values, vectors = torch.linalg.eigh(self.covariance)
        root = vectors * values.clamp_min(0).sqrt().unsqueeze(-2)  # below 0 by rounding only
        if self.kind == "joint":
            apart: Tensor = (z.flatten(1) @ root.mT).view_as(z)
            return mean + apart
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
    _check(likelihood, found.mean, shape)
    if isinstance(likelihood, Gaussian):
        noise = _noise(likelihood, found.mean, shape)
        noise = noise.diagonal() if found.kind == "diagonal" else noise
        return Prediction(found.mean, found.covariance + noise, found.kind)
    if isinstance(likelihood, Poisson):
        return (found.mean + found.variance / 2).exp()
    link = _link(likelihood)
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


def labels_of_draws(
    likelihood: Likelihood, draws: Tensor, shape: torch.Size
) -> Tensor | Prediction:
    """The distribution of labels under draws (S, N, C) of the outputs; see `labels`."""
    _check(likelihood, draws[0], shape)
    if not isinstance(likelihood, Gaussian):
        return _link(likelihood)(draws).mean(0)
    mean = draws.mean(0)
    apart = draws - mean
    spread = torch.einsum("snc,snd->ncd", apart, apart) / len(draws)
    return Prediction(mean, spread + _noise(likelihood, mean, shape))


def needs_all_pairs(likelihood: Likelihood, method: str) -> bool:
    """Whether a distribution of labels needs more than the variances of the outputs."""
    if isinstance(likelihood, Gaussian):
        return True
    return isinstance(likelihood, Categorical) and method in ("mc", "bridge")


def nll(likelihood: Likelihood, predicted: Tensor | Prediction, target: Tensor) -> Tensor:
    """-log p(y) of each label under what `labels` gave, the sum over outputs of an example: (N,).

    Of normal labels, each output alone.
    """
    if isinstance(predicted, Prediction):
        normal = torch.distributions.Normal(predicted.mean, predicted.variance.sqrt())
        logs: Tensor = normal.log_prob(target.reshape(predicted.mean.shape))
        return -logs.sum(1)
    if isinstance(likelihood, Categorical):
        logs = predicted.clamp_min(torch.finfo(predicted.dtype).tiny).log()
        return torch.nn.functional.nll_loss(
            logs, target, reduction="none", ignore_index=likelihood.ignore_index
        )
    target = target.reshape(predicted.shape).to(predicted)
    if isinstance(likelihood, Poisson):
        logs = torch.distributions.Poisson(predicted).log_prob(target)
        return -logs.sum(1)
    return torch.nn.functional.binary_cross_entropy(predicted, target, reduction="none").sum(1)


def _check(likelihood: Likelihood, outputs: Tensor, shape: torch.Size) -> None:
    """Raise DataError if no distribution of labels is known."""
    if not isinstance(likelihood, (Bernoulli, Categorical, Gaussian, Poisson)):
        raise DataError(
            f"no distribution of labels is known for {likelihood}, only for those of Bernoulli, "
            "Categorical, Gaussian and Poisson: take functional(x), the distribution of the outputs"
        )
    likelihood.check(outputs.reshape(len(outputs), *shape), None)
    if isinstance(likelihood, Categorical) and len(shape) > 1:
        raise DataError(
            f"expected one label for each example, and outputs (N, C), got (N, "
            f"{', '.join(map(str, shape))}): take functional(x)"
        )


def _link(likelihood: Likelihood) -> Callable[[Tensor], Tensor]:
    if isinstance(likelihood, Poisson):
        return torch.exp
    return torch.sigmoid if isinstance(likelihood, Bernoulli) else _softmax


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
    eye = torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device)
    eye = eye.reshape(len(eye), *shape)
    precision = likelihood.hessian_product(torch.zeros_like(eye), None, eye)
    return cast(Tensor, torch.linalg.inv(precision.reshape(len(eye), len(eye))))
