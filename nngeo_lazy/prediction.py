"""Normal distributions of a network's outputs, and what they say about its labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from .errors import DataError
from .likelihoods import (
    Bernoulli,
    BradleyTerry,
    Categorical,
    FromDistribution,
    Gaussian,
    HeteroscedasticGaussian,
    Joint,
    Likelihood,
    NegativeBinomial,
    Poisson,
    StudentT,
    Weighted,
)
from .likelihoods.likelihood import summed

__all__ = [
    "METHODS",
    "Prediction",
    "heads_of",
    "labels",
    "labels_of_draws",
    "needs_all_pairs",
    "nll",
    "plain",
]

METHODS = ("probit", "mc", "bridge", "weights")
NORMAL = (Gaussian, HeteroscedasticGaussian, StudentT)  # labels with a mean and a covariance
KNOWN = (Bernoulli, BradleyTerry, Categorical, FromDistribution, NegativeBinomial, Poisson, *NORMAL)


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

    def part(self, where: slice) -> Prediction:
        """Of some outputs of each example alone."""
        mean, given = self.mean[:, where], self.covariance
        if self.kind == "diagonal":
            return Prediction(mean, given[:, where], self.kind)
        if self.kind == "full":
            return Prediction(mean, given[:, where, where], self.kind)
        n, c = self.mean.shape
        kept = given.view(n, c, n, c)[:, where, :, where]
        return Prediction(mean, kept.reshape(mean.numel(), -1), self.kind)

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
) -> Any:
    """The distribution of labels under that of the outputs; see `Laplace.predictive`.

    Args:
        likelihood: of the labels.
        found: the outputs' distribution, flat.
        shape: of an example's outputs.
        method: one of `METHODS`, for classes.
        samples: draws, for "mc".
        seed: of the draws.

    Returns:
        A tensor or a `Prediction`; of several heads one for each, by name or in order.

    Raises:
        DataError: the method or the outputs do not fit the likelihood, or it is one of your own.
    """
    known = plain(likelihood)
    if isinstance(known, Joint):

        def one(each: Likelihood, part: Prediction, own: torch.Size) -> Any:
            return labels(each, part, own, method, samples=samples, seed=seed)

        return _of_heads(known, found, one)
    _check(known, found.mean, shape)
    if isinstance(known, NORMAL):
        return _with_noise(known, found, shape)
    if isinstance(known, (Poisson, NegativeBinomial)):
        return (found.mean + found.variance / 2).exp()
    if isinstance(known, BradleyTerry):
        found, known = _difference(found), Bernoulli()
    link = _link(known, shape)
    if method == "mc" or isinstance(known, FromDistribution):
        return link(found.sample(samples, seed=seed)).mean(0)
    if method == "probit":
        return link(found.mean / (1 + math.pi / 8 * found.variance.clamp_min(0)).sqrt())
    if not isinstance(known, Categorical):
        raise DataError(
            "the bridge is to a Dirichlet distribution over classes, and the labels are "
            f"{known}'s: take 'probit' or 'mc'"
        )
    return _bridge(found)


def labels_of_draws(likelihood: Likelihood, draws: Tensor, shape: torch.Size) -> Any:
    """The distribution of labels under draws (S, N, C) of the outputs; see `labels`."""
    known = plain(likelihood)
    if isinstance(known, Joint):
        places, shapes = known.places(draws.shape[2]), known.shapes(draws.shape[2])
        return known.like(
            [
                labels_of_draws(each, draws[..., place], own)
                for each, place, own in zip(known.members, places, shapes, strict=True)
            ]
        )
    _check(known, draws[0], shape)
    if isinstance(known, BradleyTerry):
        return (draws[..., ::2] - draws[..., 1::2]).sigmoid().mean(0)
    if not isinstance(known, NORMAL):
        return _link(known, shape)(draws).mean(0)
    mean = draws.mean(0)
    apart = draws - mean
    spread = torch.einsum("snc,snd->ncd", apart, apart) / len(draws)
    if isinstance(known, HeteroscedasticGaussian):
        where = _means(shape)
        noise = draws[..., _variances(shape)].exp().mean(0).diag_embed()
        return Prediction(mean[:, where], spread[:, where][:, :, where] + noise)
    return Prediction(mean, spread + _noise(known, mean, shape))


def plain(likelihood: Likelihood) -> Likelihood:
    """The likelihood of labels that count once each."""
    return likelihood.likelihood if isinstance(likelihood, Weighted) else likelihood


def heads_of(likelihood: Likelihood | None, found: Prediction) -> Any:
    """The distribution of each head's outputs, by name or in order; of one head itself."""
    if not isinstance(likelihood, Joint):
        return found
    return _of_heads(likelihood, found, lambda each, part, own: part)


def needs_all_pairs(likelihood: Likelihood, method: str) -> bool:
    """Whether a distribution of labels needs more than the variances of the outputs."""
    known = plain(likelihood)
    if isinstance(known, Joint):
        return any(needs_all_pairs(each, method) for each in known.members)
    if isinstance(known, (*NORMAL, BradleyTerry, FromDistribution)):
        return True
    return isinstance(known, Categorical) and method in ("mc", "bridge")


def nll(likelihood: Likelihood, predicted: Any, target: Any) -> Tensor:
    """-log p(y) of each label under what `labels` gave, the sum over labels of an example: (N,).

    Of normal labels, each output alone.

    Raises:
        DataError: the density of the labels is not known from what was predicted.
    """
    if isinstance(likelihood, Joint):
        values = predicted.values() if isinstance(predicted, Mapping) else predicted
        parts = zip(likelihood.members, values, likelihood.targets(target), strict=True)
        return torch.stack([nll(*part) for part in parts]).sum(0)
    if isinstance(likelihood, Weighted):
        known = likelihood.likelihood
        if not isinstance(known, (Bernoulli, Categorical, Gaussian, Poisson)):
            raise _no_density(likelihood)
        labelled = target[0] if isinstance(target, Sequence) else target
        like = predicted if isinstance(known, Categorical) else labelled
        clean, weights = likelihood.parts(like, target)
        each = _nll_each(known, predicted, clean)
        if weights is None:
            return summed(each)
        kept = weights.expand(known.grid(like, clean)).reshape(each.shape)
        return summed(each * kept.to(each))
    return summed(_nll_each(likelihood, predicted, target))


def _nll_each(likelihood: Likelihood, predicted: Any, target: Any) -> Tensor:
    """-log p of each label, (N, ...)."""
    if isinstance(predicted, Prediction) and not isinstance(likelihood, StudentT):
        normal = torch.distributions.Normal(predicted.mean, predicted.variance.sqrt())
        logs: Tensor = normal.log_prob(target.reshape(predicted.mean.shape))
        return -logs
    if isinstance(likelihood, Categorical):
        logs = predicted.clamp_min(torch.finfo(predicted.dtype).tiny).log()
        return torch.nn.functional.nll_loss(
            logs, target, reduction="none", ignore_index=likelihood.ignore_index
        )
    if isinstance(likelihood, Poisson):
        rates = torch.distributions.Poisson(predicted)
        logs = rates.log_prob(target.reshape(predicted.shape).to(predicted))
        return -logs
    if not isinstance(likelihood, (Bernoulli, BradleyTerry)):
        raise _no_density(likelihood)
    return torch.nn.functional.binary_cross_entropy(
        predicted, target.reshape(predicted.shape).to(predicted), reduction="none"
    )


def _no_density(likelihood: Likelihood) -> DataError:
    return DataError(
        f"the density of labels of {likelihood} is not known from what is predicted: pass metric="
    )


def _of_heads(
    known: Joint, found: Prediction, call: Callable[[Likelihood, Prediction, torch.Size], Any]
) -> Any:
    """A function of each head's likelihood, distribution and shape."""
    count = found.mean.shape[1]
    places, shapes = known.places(count), known.shapes(count)
    return known.like(
        [
            call(each, found.part(place), shape)
            for each, place, shape in zip(known.members, places, shapes, strict=True)
        ]
    )


def _check(likelihood: Likelihood, outputs: Tensor, shape: torch.Size) -> None:
    """Raise DataError if no distribution of labels is known."""
    if not isinstance(likelihood, KNOWN):
        raise DataError(
            f"no distribution of labels is known for {likelihood}, only for those of the package's "
            "own likelihoods: take functional(x), the distribution of the outputs"
        )
    if isinstance(likelihood, StudentT) and likelihood.df <= 2:
        raise DataError(
            f"labels of {likelihood} have no variance, as df is not above 2: take functional(x), "
            "the distribution of their centres"
        )
    likelihood.check(outputs.reshape(len(outputs), *shape), None)
    if isinstance(likelihood, Categorical) and len(shape) > 1:
        raise DataError(
            f"expected one label for each example, and outputs (N, C), got (N, "
            f"{', '.join(map(str, shape))}): take functional(x)"
        )


def _link(likelihood: Likelihood, shape: torch.Size) -> Callable[[Tensor], Tensor]:
    """From flat outputs (..., N, C) to the mean of the labels."""
    if isinstance(likelihood, FromDistribution):
        known = likelihood

        def mean(outputs: Tensor) -> Tensor:
            means: Tensor = known.function(outputs.reshape(-1, *shape)).mean
            return means.reshape(*outputs.shape[:-1], *means.shape[1:])

        return mean
    if isinstance(likelihood, (Poisson, NegativeBinomial)):
        return torch.exp
    return torch.sigmoid if isinstance(likelihood, Bernoulli) else _softmax


def _difference(found: Prediction) -> Prediction:
    """Of the first score minus the second, for each pair."""
    mean, given = found.mean, found.covariance
    apart = mean[:, ::2] - mean[:, 1::2]
    if found.kind == "diagonal":
        return Prediction(apart, given[:, ::2] + given[:, 1::2], "diagonal")
    left = given[..., ::2, :] - given[..., 1::2, :]
    return Prediction(apart, left[..., ::2] - left[..., 1::2], found.kind)


def _order(shape: torch.Size) -> Tensor:
    return torch.arange(shape.numel(), device="cpu").view(shape)


def _means(shape: torch.Size) -> Tensor:
    """Where the means lie among flat outputs of means and log variances."""
    return _order(shape).chunk(2, -1)[0].flatten()


def _variances(shape: torch.Size) -> Tensor:
    return _order(shape).chunk(2, -1)[1].flatten()


def _with_noise(likelihood: Likelihood, found: Prediction, shape: torch.Size) -> Prediction:
    """Normal labels, or those that have the same mean and covariance."""
    if isinstance(likelihood, HeteroscedasticGaussian):
        if found.kind == "joint":
            raise DataError(
                "joint=True is known for one variance of the labels: take functional(x, joint=True)"
            )
        where, logs = _means(shape), _variances(shape)
        noise = (found.mean[:, logs] + found.variance[:, logs] / 2).exp()  # E[e^s]
        if found.kind == "diagonal":
            return Prediction(found.mean[:, where], found.covariance[:, where] + noise, "diagonal")
        spread = found.covariance[:, where][:, :, where]
        return Prediction(found.mean[:, where], spread + noise.diag_embed())
    noise = _noise(likelihood, found.mean, shape)
    if found.kind == "diagonal":
        noise = noise.diagonal()
    elif found.kind == "joint":
        noise = torch.block_diag(*[noise] * len(found.mean))
    return Prediction(found.mean, found.covariance + noise, found.kind)


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


def _noise(likelihood: Likelihood, mean: Tensor, shape: torch.Size) -> Tensor:
    """The covariance of an example's labels given its outputs, (C, C)."""
    eye = torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device)
    if isinstance(likelihood, StudentT):
        return eye * (likelihood.scale**2 * likelihood.df / (likelihood.df - 2))
    eye = eye.reshape(len(eye), *shape)
    precision = likelihood.hessian_product(torch.zeros_like(eye), None, eye)
    return cast(Tensor, torch.linalg.inv(precision.reshape(len(eye), len(eye))))
