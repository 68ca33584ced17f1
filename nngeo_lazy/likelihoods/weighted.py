"""Labels that count a number of times each, or not at all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..arguments import check_fields
from ..errors import DataError
from .joint import Joint
from .likelihood import Likelihood, PerLabel, summed

__all__ = ["Weighted"]

PARTLY = (
    "expected labels that belong together to be all numbers or all NaN, but some are NaN in part: "
    "mask them whole, or take a likelihood in which each output has a label of its own"
)


class _Parts(NamedTuple):
    """A target taken apart: labels that are numbers, and the weights of all, in their shape."""

    labels: Tensor | None
    weights: Tensor | None


@dataclass(frozen=True)
class Weighted(Likelihood):
    r"""Labels that count a number of times each: masks, and weights of examples or positions.

    .. math:: \ell = \sum_t w_t \ell_t(f, y_t), \qquad
        \mathbb{E}[\nabla^2 \ell] = \sum_t w_t \, \mathbb{E}[\nabla^2 \ell_t]

    A target is `(labels, weights)`, or labels alone. Weights are booleans or nonnegative numbers,
    of examples (N,), or of their first positions (N, T), or of all labels. The Fisher is that of
    data in which label t occurs w_t times. The mean is over all N examples still. The empirical
    Fisher has the gradients of the weighted loss.

    Args:
        likelihood: of the labels, an object.
        nan: what a label of NaN is: "refuse" an error, "mask" a label that does not count.

    Raises:
        DataError: weights of another shape, negative or not finite; labels of NaN that are not to
            be masked; weights of positions, if the likelihood knows the loss of an example alone.

    Example:
        >>> import nngeo_lazy as ng
        >>> masked = Weighted(ng.likelihoods.Gaussian(), nan="mask")
        >>> y = torch.tensor([[1.0, float("nan")]])
        >>> masked.loss(torch.zeros(1, 2), y), masked.num_terms(torch.zeros(1, 2), y)
        (tensor([0.5000]), tensor(1))
        >>> masked.loss(torch.zeros(1, 2), (torch.ones(1, 2), torch.tensor([3.0])))
        tensor([3.])

    Source: McCullagh and Nelder (1989), Generalized linear models, section 2.2, on prior weights.
    """

    likelihood: Likelihood
    nan: Literal["refuse", "mask"] = "refuse"

    def __post_init__(self) -> None:
        check_fields(self)
        known = self.likelihood
        if not isinstance(known, Likelihood) or isinstance(known, (Joint, Weighted)):
            raise DataError(
                "expected a likelihood object, as in Weighted(likelihoods.Gaussian()), got "
                f"{known!r}; of several heads each is weighted alone"
            )
        if not isinstance(self.nan, str) or self.nan not in ("refuse", "mask"):
            raise DataError(f"expected nan to be 'refuse' or 'mask', got {self.nan!r}")

    @property
    def masks(self) -> bool:
        """Whether the target can mask terms, so that it is read even if labels are drawn."""
        return True

    @property
    def reweighted(self) -> str:
        """Why the loss is no likelihood, as in "class weights"; empty if it is one."""
        return self.likelihood.reweighted

    def require_likelihood(self, estimator: str) -> None:
        """Raise DataError if the estimator draws labels that this loss does not define."""
        self.likelihood.require_likelihood(estimator)

    def missing(self, target: Any) -> Tensor | None:
        """Whether labels are NaN that must not be, 0-d; None if there can be none."""
        return None if self.nan == "mask" else self.likelihood.missing(_pair(target)[0])

    def check(self, outputs: Tensor, target: Any) -> None:
        """Raise DataError if outputs or target cannot be this likelihood's."""
        labels, weights = _pair(target)
        real = isinstance(labels, Tensor) and labels.is_floating_point()
        if labels is not None and real and self.nan == "mask":
            self.likelihood.check(outputs, self.likelihood.filled(labels, labels.isnan(), outputs))
        else:
            self.likelihood.check(outputs, labels)
        if weights is None:
            return
        grid = self._grid(outputs, labels)
        if not isinstance(weights, Tensor) or weights.is_complex():
            raise DataError(
                f"expected weights to be a tensor of real numbers or a mask, got {weights!r}: a "
                "target is (labels, weights)"
            )
        if not weights.dim() or weights.shape != grid[: weights.dim()]:
            alone = "" if isinstance(self.likelihood, PerLabel) else ", of examples alone"
            raise DataError(
                f"expected weights of labels {tuple(grid)}, or of their first dimensions{alone}, "
                f"got shape {tuple(weights.shape)}: a target is (labels, weights)"
            )

    def loss(self, outputs: Tensor, target: Any) -> Tensor:
        """The weighted -log p(y | f) up to a constant, summed over positions: (N,)."""
        labels, weights = self.parts(outputs, target)
        if weights is None:
            return self.likelihood.loss(outputs, labels)  # type: ignore[arg-type]
        each = self._each(outputs, labels)
        return summed(each * weights.to(each)).to(outputs.dtype)

    def log_prob(self, outputs: Tensor, target: Any) -> Tensor:
        """The weighted log p(y | f), normalised over y and summed over positions: (N,)."""
        labels, weights = self.parts(outputs, target)
        if weights is None:
            return self.likelihood.log_prob(outputs, labels)  # type: ignore[arg-type]
        known = self.likelihood
        made = known.log_probs if isinstance(known, PerLabel) else known.log_prob
        each = made(outputs, labels)  # type: ignore[arg-type]
        return summed(each * weights.to(each))

    def hessian_product(self, outputs: Tensor, target: Any, vectors: Tensor) -> Tensor:
        """H_n v_n with H_n the Hessian of the loss in the outputs, shaped like vectors."""
        labels, weights = self._spread(outputs, target)
        product = self.likelihood.hessian_product(outputs, labels, vectors)
        return product if weights is None else product * weights.to(product)

    def num_terms(self, outputs: Tensor, target: Any) -> Tensor:
        """How many scalar labels are scored, a 0-d integer tensor."""
        known, (labels, weights) = self.likelihood, self.parts(outputs, target)
        if weights is None or not isinstance(known, PerLabel):
            return known.num_terms(outputs, labels)
        kept = known.terms(outputs, labels) & (weights != 0)
        return kept.count_nonzero() * known.size(outputs)

    def position_dims(self, outputs: Tensor, target: Any) -> tuple[int, ...]:
        """Which dimensions of the outputs are positions, whose losses are summed."""
        return self.likelihood.position_dims(outputs, self.parts(outputs, target)[0])

    def scored(self, outputs: Tensor, target: Any) -> Tensor | None:
        """Which positions of the outputs are scored, a mask (N, *positions); None if all are."""
        known, (labels, weights) = self.likelihood, self.parts(outputs, target)
        if weights is None or not isinstance(known, PerLabel):
            return known.scored(outputs, labels)
        return known.places(known.terms(outputs, labels) & (weights != 0), outputs, labels)

    def flags(self, outputs: Tensor, target: Any) -> dict[str, Tensor]:
        """What is wrong in a way that only the device knows: message -> 0-d bool tensor."""
        labels, weights = _pair(target)
        clean, _ = self.parts(outputs, target)
        flags = self.likelihood.flags(outputs, clean)
        if weights is not None:
            real = weights.to(torch.promote_types(weights.dtype, torch.float32))
            flags["expected weights that are finite and from 0 up, but some are not"] = ~(
                (real >= 0) & real.isfinite()
            ).all()
        if self.nan == "mask" and labels is not None and labels.is_floating_point():
            lost = labels.isnan().reshape(*self._grid(outputs, labels), -1)
            flags[PARTLY] = (lost.any(-1) & ~lost.all(-1)).any()
        return flags

    def _grid(self, outputs: Tensor, labels: Tensor | None) -> torch.Size:
        known = self.likelihood
        return known.grid(outputs, labels) if isinstance(known, PerLabel) else outputs.shape[:1]

    def _each(self, outputs: Tensor, labels: Any) -> Tensor:
        known = self.likelihood
        return (known.each if isinstance(known, PerLabel) else known.loss)(outputs, labels)

    def parts(self, outputs: Tensor, target: Any) -> _Parts:
        """Labels that are numbers, and weights that broadcast to their grid."""
        labels, weights = _pair(target)
        grid = self._grid(outputs, labels)
        if weights is not None:
            weights = weights.reshape(*weights.shape, *(1,) * (len(grid) - weights.dim()))
        if self.nan == "refuse" or labels is None or not labels.is_floating_point():
            return _Parts(labels, weights)
        kept = ~labels.isnan().reshape(*grid, -1).all(-1)
        labels = self.likelihood.filled(labels, labels.isnan(), outputs)
        return _Parts(labels, kept if weights is None else weights * kept)

    def _spread(self, outputs: Tensor, target: Any) -> _Parts:
        """Labels, and the weights at the outputs that they belong to."""
        known, (labels, weights) = self.likelihood, self.parts(outputs, target)
        if weights is None:
            return _Parts(labels, None)
        if not isinstance(known, PerLabel) or not any(size > 1 for size in weights.shape[1:]):
            return _Parts(labels, weights.reshape(-1, *(1,) * (outputs.dim() - 1)))
        grid = known.grid(outputs, labels)
        return _Parts(labels, known.spread(weights.expand(grid), outputs, labels))

    def _num_exact(self, outputs: Tensor, target: Any) -> int:
        return self.likelihood._num_exact(outputs, _pair(target)[0])

    def _exact(self, outputs: Tensor, target: Any) -> Iterator[Tensor]:
        labels, weights = self._spread(outputs, target)
        return _scaled(self.likelihood._exact(outputs, labels), weights)

    def _draws(
        self, outputs: Tensor, target: Any, generator: torch.Generator | None, samples: int
    ) -> Iterator[Tensor]:
        labels, weights = self._spread(outputs, target)
        return _scaled(self.likelihood._draws(outputs, labels, generator, samples), weights)

    def _sampled(self, outputs: Tensor, target: Any, generator: torch.Generator | None) -> Tensor:
        return next(self._draws(outputs, target, generator, 1))

    def _normal(
        self, outputs: Tensor, target: Any, n: int, generator: torch.Generator | None
    ) -> Tensor:
        labels, weights = self._spread(outputs, target)
        drawn = self.likelihood._normal(outputs, labels, n, generator)
        return next(_scaled(iter([drawn]), weights))

    def _observed(self, outputs: Tensor, target: Any) -> Tensor:
        labels, weights = self._spread(outputs, target)
        score = self.likelihood._observed(outputs, labels)  # type: ignore[arg-type]
        return score if weights is None else score * weights.to(score)


def _pair(target: Any) -> _Parts:
    """Labels and weights of a target that has both, or labels alone."""
    if isinstance(target, Sequence):
        if len(target) != 2:
            raise DataError(
                f"expected a target (labels, weights), or labels alone, got {len(target)} entries: "
                "pass target=lambda batch: (batch[1], batch[2])"
            )
        return _Parts(*target)
    return _Parts(target, None)


def _scaled(directions: Iterator[Tensor], weights: Tensor | None) -> Iterator[Tensor]:
    """Directions of labels that count so often."""
    for direction in directions:
        yield direction if weights is None else direction * weights.to(direction).sqrt()
