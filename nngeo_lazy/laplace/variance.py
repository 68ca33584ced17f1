"""The variance of normal labels as a multiple of the one that F was built with."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import DataError
from ..likelihoods import Gaussian, Likelihood
from ..operators import BaseLinearOperator
from ..precision import widest

__all__ = ["log_likelihood", "scaled"]


def scaled(likelihood: Likelihood, multiple: float | Tensor) -> Gaussian:
    """The same normal labels with a multiple of the variance."""
    known = _normal(likelihood)
    variance, times = known.variance, float(multiple)
    if isinstance(variance, (int, float)):
        return Gaussian(variance * times)
    return Gaussian(torch.as_tensor(variance) * times)


def log_likelihood(
    likelihood: Likelihood,
    own: float | Tensor,
    known: float,
    F: BaseLinearOperator,
    noise: float | Tensor,
) -> Tensor:
    """log p(D | w) of labels whose variance is `noise` times that of F's build.

    Args:
        likelihood: with `own` times the variance of F's build.
        own: that multiple.
        known: log p(D | w) at F's build.
        F: knows how many labels there are.
        noise: the wanted multiple.
    """
    if isinstance(own, float) and own == 1.0 and isinstance(noise, float) and noise == 1.0:
        return torch.tensor(known, dtype=widest(), device="cpu")
    base = scaled(likelihood, 1 / float(own))
    count, examples = F.num_terms, F.num_examples
    if count is None or examples is None or not examples:
        raise DataError("expected F to know how many labels it was built from: build it again")
    zeros = torch.zeros(1, count // examples, dtype=widest(), device="cpu")  # an example's labels
    constant = examples * float(base.log_prob(zeros, zeros))  # log p of residuals that are zero
    spread = torch.as_tensor(noise, dtype=widest())
    return (known - constant) / spread + constant - count / 2 * spread.log()


def _normal(likelihood: Likelihood) -> Gaussian:
    if not isinstance(likelihood, Gaussian):
        raise DataError(
            f"expected normal labels, whose variance is the noise, got {likelihood}: leave noise "
            "out"
        )
    return likelihood
