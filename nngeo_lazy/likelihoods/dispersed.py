"""Counts and real labels that spread more than Poisson's and normal ones."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..arguments import check_fields
from ..errors import DataError
from .elementwise import EachOutput

__all__ = ["NegativeBinomial", "StudentT"]


@dataclass(frozen=True)
class NegativeBinomial(EachOutput):
    r"""Each output is the log mean of a count of variance m + m^2 / r.

    .. math:: \ell = (y + r) \log(r + e^f) - y f, \qquad
        \mathbb{E}[\nabla^2 \ell] = \frac{r\,m}{r + m}, \quad m = e^f

    The Fisher information takes that expectation, and so does `GGN`; `Hessian` has the Hessian at
    the observed labels.

    Args:
        concentration: r, positive and the same for all outputs; counts are Poisson's as it grows.

    Raises:
        DataError: a concentration that is not positive and finite.

    Example:
        >>> f, y = torch.zeros(1, 2), torch.tensor([[0.0, 3.0]])
        >>> NegativeBinomial(concentration=1.0).log_prob(f, y).exp()
        tensor([0.0312])

    Source: Hilbe (2011), Negative binomial regression, section 8.
    """

    concentration: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self)
        _require_positive("concentration", self.concentration)

    def each(self, outputs: Tensor, target: Tensor) -> Tensor:
        """-log p of each label up to a constant, shaped like the grid. Differentiable."""
        y, r = target.to(outputs), self.concentration
        return (y + r) * _log_of_sum(outputs, r) - y * outputs

    def log_probs(self, outputs: Tensor, target: Tensor) -> Tensor:
        """log p of each label itself, normalised, shaped like the grid."""
        y, r = target.to(outputs), self.concentration
        constant = torch.lgamma(y + r) - torch.lgamma(y + 1) - math.lgamma(r) + r * math.log(r)
        return constant - self.each(outputs, target)

    def flags(self, outputs: Tensor, target: Tensor | None) -> dict[str, Tensor]:
        """What is wrong in a way that only the device knows: message -> 0-d bool tensor."""
        flags = super().flags(outputs, target)
        if target is not None:
            flags["expected counts from 0 up, but some are negative, NaN or inf"] = ~(
                (target >= 0) & target.isfinite()
            ).all()
        return flags

    def _root(self, outputs: Tensor, target: Tensor | None) -> Tensor:
        # r m / (r + m) = m sigmoid(log r - f): both factors stay finite in their logarithms
        r = self.concentration
        return ((outputs + math.log(r) - _log_of_sum(outputs, r)) / 2).exp()

    def _sampled(
        self, outputs: Tensor, target: Tensor | None, generator: torch.Generator | None
    ) -> Tensor:
        r = self.concentration
        shape = torch.full_like(outputs, r, dtype=torch.float64)
        rate = torch._standard_gamma(shape, generator) * outputs.double().exp() / r
        drawn = torch.poisson(rate.nan_to_num(nan=0.0, posinf=0.0), generator=generator)
        return self._score(outputs.double(), drawn).to(outputs)

    def _observed(self, outputs: Tensor, target: Tensor) -> Tensor:
        return self._score(outputs, target.to(outputs))

    def _score(self, outputs: Tensor, y: Tensor) -> Tensor:
        """r (m - y) / (r + m)."""
        up = (outputs - math.log(self.concentration)).sigmoid()  # m / (r + m)
        return self.concentration * up - y * (1 - up)


@dataclass(frozen=True)
class StudentT(EachOutput):
    r"""Each output is the centre of a label with heavy tails, so that outliers count less.

    .. math:: \ell = \tfrac{\nu + 1}2 \log\Bigl(1 + \frac{(y - f)^2}{\nu s^2}\Bigr), \qquad
        \mathbb{E}[\nabla^2 \ell] = \frac{\nu + 1}{(\nu + 3)\, s^2}

    The Fisher information takes that expectation, and so does `GGN`; `Hessian` has the Hessian at
    the observed labels, which is negative for outliers.

    Args:
        df: nu, positive; labels are normal as it grows.
        scale: s, positive.

    Raises:
        DataError: a df or a scale that is not positive and finite.

    Example:
        >>> StudentT(df=1.0).loss(torch.zeros(1, 1), torch.ones(1, 1))
        tensor([0.6931])

    Source: Lange, Little and Taylor (1989), Robust statistical modeling using the t distribution.
    """

    df: float = 4.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self)
        _require_positive("df", self.df)
        _require_positive("scale", self.scale)

    def each(self, outputs: Tensor, target: Tensor) -> Tensor:
        """-log p of each label up to a constant, shaped like the grid. Differentiable."""
        apart = (target.to(outputs) - outputs) / self.scale
        return (self.df + 1) / 2 * (apart.square() / self.df).log1p()

    def log_probs(self, outputs: Tensor, target: Tensor) -> Tensor:
        """log p of each label itself, normalised, shaped like the grid."""
        constant = math.lgamma((self.df + 1) / 2) - math.lgamma(self.df / 2)
        constant -= math.log(self.df * math.pi) / 2 + math.log(self.scale)
        return constant - self.each(outputs, target)

    def _root(self, outputs: Tensor, target: Tensor | None) -> Tensor:
        root = ((self.df + 1) / (self.df + 3)) ** 0.5 / self.scale
        return torch.full_like(outputs, root)

    def _sampled(
        self, outputs: Tensor, target: Tensor | None, generator: torch.Generator | None
    ) -> Tensor:
        like = {"dtype": torch.float64, "device": outputs.device, "generator": generator}
        normal = torch.randn(outputs.shape, **like)  # type: ignore[call-overload]
        half = torch.full_like(outputs, self.df / 2, dtype=torch.float64)
        spread = torch._standard_gamma(half, generator) / (self.df / 2)
        drawn = self.scale * normal * spread.rsqrt()
        return self._score(drawn).to(outputs)

    def _observed(self, outputs: Tensor, target: Tensor) -> Tensor:
        return self._score(target.to(outputs) - outputs)

    def _score(self, apart: Tensor) -> Tensor:
        """The gradient in f of a residual y - f."""
        return -(self.df + 1) * apart / (self.df * self.scale**2 + apart.square())


def _log_of_sum(outputs: Tensor, r: float) -> Tensor:
    """log(r + e^f)."""
    return torch.logaddexp(outputs, torch.full_like(outputs, math.log(r)))


def _require_positive(what: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise DataError(f"expected a positive, finite {what}, got {value!r}")
