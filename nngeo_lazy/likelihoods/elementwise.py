"""Likelihoods of outputs that each have a label of their own."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..arguments import as_numbers, check_fields
from ..errors import DataError
from ..precision import widened, widest
from .likelihood import (
    NOT_FINITE,
    Likelihood,
    NonFinite,
    PerLabel,
    broadcasts,
    check_outputs,
    labels_needed,
    standard_normal,
    wide,
)

__all__ = ["Bernoulli", "EachOutput", "Elementwise", "Poisson"]

COUNTED = 1e9  # up to this rate labels are counts; past it they are normal to within rounding


class Elementwise(Likelihood):
    """Every output of an example has a label of its own; the loss-Hessian is diagonal."""

    @abstractmethod
    def _root(self, outputs: Tensor, target: Tensor | None) -> Tensor:
        """The root of the loss-Hessian's diagonal, shaped like the outputs."""

    def _curvature(self, outputs: Tensor, target: Tensor | None) -> Tensor:
        return self._root(outputs, target).square()

    def check(self, outputs: Tensor, target: Tensor | None) -> None:
        """Raise DataError if outputs or target cannot be this likelihood's."""
        check_outputs(outputs, target)
        if target is not None and target.shape != outputs.shape:
            raise DataError(
                f"expected a target shaped like the outputs {tuple(outputs.shape)}, got "
                f"{tuple(target.shape)}"
            )

    def hessian_product(self, outputs: Tensor, target: Tensor | None, vectors: Tensor) -> Tensor:
        """H_n v_n with H_n the Hessian of the loss in the outputs, shaped like vectors."""
        return self._curvature(outputs, target) * vectors

    def num_terms(self, outputs: Tensor, target: Tensor | None) -> Tensor:
        """How many scalar labels are scored, a 0-d integer tensor."""
        return torch.tensor(outputs.numel(), device=outputs.device)

    def flags(self, outputs: Tensor, target: Tensor | None) -> dict[str, Tensor]:
        """What is wrong in a way that only the device knows: message -> 0-d bool tensor."""
        return {NOT_FINITE: ~outputs.detach().isfinite().all()}

    def _num_exact(self, outputs: Tensor, target: Tensor | None) -> int:
        return math.prod(outputs.shape[1:])

    def _normal(
        self, outputs: Tensor, target: Tensor | None, n: int, generator: torch.Generator | None
    ) -> Tensor:
        z = standard_normal(n, outputs.shape, outputs, generator)
        return z * self._root(outputs, target)

    def _exact(self, outputs: Tensor, target: Tensor | None) -> Iterator[Tensor]:
        root = self._root(outputs, target).reshape(outputs.shape[0], -1)
        for j in range(root.shape[1]):
            column = torch.zeros_like(root)
            column[:, j] = root[:, j]
            yield column.view(outputs.shape)


class EachOutput(PerLabel, Elementwise):
    """Every output has a label of its own, whose loss is known alone."""

    def grid(self, outputs: Tensor, target: Tensor | None) -> torch.Size:
        """The shape of the labels of these outputs."""
        return outputs.shape


@dataclass(frozen=True)
class Bernoulli(EachOutput):
    r"""Each output is the logit of a label in [0, 1]; the loss is binary cross-entropy.

    .. math:: \ell = -w\, y \log p - (1 - y) \log(1 - p), \qquad
        \nabla^2 \ell = p (1 - p) (1 + (w - 1) y)

    with p = sigmoid(f) and w = pos_weight, by default 1. Labels between 0 and 1 are probabilities
    of 1; the model's own labels are 0 or 1.

    Args:
        pos_weight: the weight of label 1, positive; one for all outputs, or a tensor that
            broadcasts to those of an example. With it the loss is no likelihood.

    Raises:
        DataError: a weight that is not positive and finite.

    Example:
        >>> Bernoulli().loss(torch.zeros(1, 2), torch.tensor([[0.0, 1.0]]))
        tensor([1.3863])
        >>> f, y = torch.zeros(1, 2), torch.tensor([[0.0, 1.0]])
        >>> Bernoulli(pos_weight=3.0).hessian_product(f, y, torch.ones(1, 2))
        tensor([[0.2500, 0.7500]])
    """

    pos_weight: float | Sequence[Any] | Tensor | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.pos_weight is None:
            return
        # Numbers, and not a tensor, so that two likelihoods compare, hash and print by value.
        held = _nested(as_numbers("pos_weight", self.pos_weight).detach().tolist())
        object.__setattr__(self, "pos_weight", held)
        if not bool(((self._weight > 0) & self._weight.isfinite()).all()):
            raise DataError(f"expected a positive, finite pos_weight, got {self.pos_weight}")

    @property
    def reweighted(self) -> str:
        """Why the loss is no likelihood, as in "class weights"; empty if it is one."""
        return "" if self.pos_weight is None else "pos_weight"

    def check(self, outputs: Tensor, target: Tensor | None) -> None:
        """Raise DataError if outputs or target cannot be this likelihood's."""
        super().check(outputs, target)
        example = outputs.shape[1:]
        if self.pos_weight is not None and not broadcasts(self._weight.shape, example):
            raise DataError(
                f"expected a pos_weight that broadcasts to the outputs of an example "
                f"{tuple(example)}, got shape {tuple(self._weight.shape)}"
            )

    def scale_of(self, outputs: Tensor, gradient: Tensor) -> Tensor | None:
        """From labels of 0 and 1, whose gradients are c p and c (p - 1)."""
        f = wide(outputs.detach())
        most = torch.where(gradient > 0, f, -f).sigmoid()  # also if all of them are tiny
        return (wide(gradient).abs() / most.clamp_min(1e-3 * most.max())).max()

    def each(self, outputs: Tensor, target: Tensor) -> Tensor:
        """-log p of each label up to a constant, shaped like the grid. Differentiable."""
        return F.binary_cross_entropy_with_logits(
            outputs,
            target.to(outputs),
            reduction="none",
            pos_weight=None if self.pos_weight is None else self._weight.to(outputs),
        )

    def flags(self, outputs: Tensor, target: Tensor | None) -> dict[str, Tensor]:
        """What is wrong in a way that only the device knows: message -> 0-d bool tensor."""
        flags = super().flags(outputs, target)
        if target is not None:
            flags["expected labels between 0 and 1, but some are outside"] = ~(
                (target >= 0) & (target <= 1)
            ).all()
        return flags

    @cached_property
    def _weight(self) -> Tensor:
        return torch.tensor(self.pos_weight, dtype=widest(), device="cpu")

    def _root_of_kappa(self, outputs: Tensor, target: Tensor | None) -> Tensor | float:
        """The root of 1 + (w - 1) y, by which the weight multiplies that of the Hessian."""
        if self.pos_weight is None:
            return 1.0
        if target is None:
            raise labels_needed("pos_weight")
        return (1 + (self._weight.to(outputs) - 1) * target.to(outputs)).sqrt()

    def _root(self, outputs: Tensor, target: Tensor | None) -> Tensor:
        h = (-outputs.abs() / 2).exp()  # sqrt(p (1 - p)) = h / (1 + h^2), without underflow
        root = h / (1 + h.square())
        return root if self.pos_weight is None else root * self._root_of_kappa(outputs, target)

    def _sampled(
        self, outputs: Tensor, target: Tensor | None, generator: torch.Generator | None
    ) -> Tensor:
        p = outputs.sigmoid()
        uniform = torch.rand(p.shape, dtype=p.dtype, device=p.device, generator=generator)
        return (p - (uniform < p).to(p)) * self._root_of_kappa(outputs, target)

    def _observed(self, outputs: Tensor, target: Tensor) -> Tensor:
        p, y = outputs.sigmoid(), target.to(outputs)
        if self.pos_weight is None:
            return p - y
        return p * (1 - y) - self._weight.to(outputs) * y * (-outputs).sigmoid()


@dataclass(frozen=True)
class Poisson(EachOutput):
    r"""Each output is the log rate of a count; the loss is exp(f) - y f.

    .. math:: \ell = e^f - y f, \qquad \nabla \ell = e^f - y, \qquad \nabla^2 \ell = e^f

    Labels may be any nonnegative numbers; the model's own are counts.

    Example:
        >>> f, y = torch.zeros(1, 2), torch.tensor([[0.0, 3.0]])
        >>> Poisson().loss(f, y)
        tensor([2.])
        >>> next(Poisson().directions(f, y, "empirical"))
        tensor([[ 1., -2.]])

    Source:
        McCullagh and Nelder (1989), Generalized linear models, section 6.2: the log link is the
        canonical one, so that the Hessian is the Fisher information.
    """

    def scale_of(self, outputs: Tensor, gradient: Tensor) -> Tensor | None:
        """From counts of zero, whose gradients are c times the rate; NaN if there is none.

        Every other count must then be a whole number.
        """
        rate, g = wide(outputs.detach()).exp(), wide(gradient)
        c = (g / rate.clamp_min(1e-3 * rate.max())).max()
        counts = rate - g / c
        whole = (counts - counts.round()).abs() <= 0.01 * (1 + rate)
        return torch.where(whole.all() & (c > 0), c, torch.full_like(c, float("nan")))

    def each(self, outputs: Tensor, target: Tensor) -> Tensor:
        """-log p of each label up to a constant, shaped like the grid. Differentiable."""
        return outputs.exp() - target.to(outputs) * outputs

    def log_probs(self, outputs: Tensor, target: Tensor) -> Tensor:
        """log p of each label itself, normalised, shaped like the grid."""
        return -self.each(outputs, target) - torch.lgamma(target.to(outputs) + 1)

    def flags(self, outputs: Tensor, target: Tensor | None) -> dict[str, Tensor]:
        """What is wrong in a way that only the device knows: message -> 0-d bool tensor."""
        flags = super().flags(outputs, target)
        overflow = NonFinite(
            "expected log rates with a finite rate, but exp of some outputs overflows"
        )
        flags[overflow] = (outputs.isfinite() & outputs.detach().exp().isinf()).any()
        if target is not None:
            flags["expected labels from 0 up, but some are negative, NaN or inf"] = ~(
                (target >= 0) & target.isfinite()
            ).all()
        return flags

    def _root(self, outputs: Tensor, target: Tensor | None) -> Tensor:
        return (outputs / 2).exp()

    def _curvature(self, outputs: Tensor, target: Tensor | None) -> Tensor:
        return outputs.exp()

    def _sampled(
        self, outputs: Tensor, target: Tensor | None, generator: torch.Generator | None
    ) -> Tensor:
        # In float64: exp(f) - y cancels. Large rates have no count that a 64-bit integer holds,
        # and NaN, which is flagged, must not crash the draw.
        rate = widened(outputs).exp().nan_to_num(nan=0.0)
        noise = torch.randn(rate.shape, dtype=rate.dtype, device=rate.device, generator=generator)
        counted = rate.clamp(max=COUNTED)
        score = counted - torch.poisson(counted, generator=generator)
        return torch.where(rate > COUNTED, rate.sqrt() * noise, score).to(outputs)

    def _observed(self, outputs: Tensor, target: Tensor) -> Tensor:
        return outputs.exp() - target.to(outputs)


def _nested(numbers: Any) -> Any:
    """Lists as tuples, at every depth."""
    return tuple(map(_nested, numbers)) if isinstance(numbers, list) else numbers
