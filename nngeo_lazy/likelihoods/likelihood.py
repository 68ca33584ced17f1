"""What every likelihood does: output directions, loss-Hessian products, checks."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from ..errors import DataError

__all__ = [
    "ESTIMATORS",
    "NAN_LABELS",
    "NOT_FINITE",
    "Estimator",
    "Likelihood",
    "NonFinite",
    "PerLabel",
    "broadcasts",
    "check_estimator",
    "check_outputs",
    "labels_needed",
    "missing_in",
    "standard_normal",
    "summed",
    "wide",
]

Estimator: TypeAlias = Literal["exact", "mc", "empirical", "empirical_positions"]
ESTIMATORS: tuple[Estimator, ...] = get_args(Estimator)


class NonFinite(str):
    """A flag's message that is raised as a NonFiniteError; any other is raised as a DataError."""

    __slots__ = ()


NOT_FINITE = NonFinite(
    "expected finite outputs, but the model gives NaN or infinity on some batch: check the inputs, "
    "and the training that led to these parameters"
)
NAN_LABELS = (
    "expected labels that are numbers, but some are NaN: mask them, as in "
    "likelihoods.Weighted(likelihoods.Gaussian(), nan='mask'), or leave their examples out"
)


class Likelihood(ABC):
    """p(y | f) of an example's outputs f, independent over positions and examples.

    A *reweighted* one is a loss that is no likelihood (class weights, label smoothing). Its "exact"
    and "mc" directions are roots of its Hessian at the target. A Gauss-Newton matrix takes them,
    and a Fisher refuses them (`require_likelihood`).

    Example:
        >>> import nngeo_lazy as ng
        >>> known = ng.likelihoods.Gaussian()
        >>> isinstance(known, Likelihood), known.num_directions(torch.zeros(4, 3), None, "exact")
        (True, 3)
    """

    @property
    def masks(self) -> bool:
        """Whether the target can mask terms, so that it is read even if labels are drawn."""
        return False

    @property
    def reweighted(self) -> str:
        """Why the loss is no likelihood, as in "class weights"; empty if it is one."""
        return ""

    def missing(self, target: Any) -> Tensor | None:
        """Whether labels are NaN that must not be, 0-d; None if there can be none."""
        return missing_in(target)

    def filled(self, labels: Tensor, where: Tensor, outputs: Tensor) -> Tensor:
        """Labels with others, which the likelihood takes, where a mask says so."""
        return labels.masked_fill(where, 0.0)

    def require_likelihood(self, estimator: str) -> None:
        """Raise DataError if the estimator draws labels that this loss does not define.

        Args:
            estimator: "exact", "mc" or "empirical"; the last needs observed labels alone.
        """
        if self.reweighted and estimator in ("exact", "mc"):
            raise DataError(
                f"the {estimator} Fisher is an expectation over the model's own labels, and a loss "
                f"with {self.reweighted} is no likelihood: take GGN(..., loss=...), "
                f"estimator='empirical', or drop the {self.reweighted}"
            )

    @abstractmethod
    def check(self, outputs: Tensor, target: Tensor | None) -> None:
        """Raise DataError if outputs or target cannot be this likelihood's."""

    def target_of(self, outputs: Tensor, gradient: Tensor) -> Tensor | None:
        """The labels and masks that a gradient of the loss in the outputs shows.

        None if all that is read of a target cannot be seen, or nothing is read.

        Args:
            outputs: (N, ...).
            gradient: of any positive multiple of the loss, shaped like them.
        """
        return None

    def scale_of(self, outputs: Tensor, gradient: Tensor) -> Tensor | None:
        """c, 0-d, of a gradient that is c times that of the summed loss.

        None if it cannot be seen. With labels that are probabilities it is a lower bound, and
        exact as soon as one of them is 0 or 1.

        Args:
            outputs: (N, ...).
            gradient: of c times the loss, shaped like them.
        """
        return None

    def dispersion(self, outputs: Tensor, score: Tensor) -> Tensor | None:
        """The mean squared residual in units of the labels' variance, 0-d.

        None if the likelihood fixes it to one.

        Args:
            outputs: (N, ...).
            score: the gradient of the summed loss.

        Source: Pearson's statistic; McCullagh and Nelder (1989), section 4.5.
        """
        return None

    @abstractmethod
    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        """-log p(y | f) up to a constant, summed over positions: (N,). Differentiable."""

    def log_prob(self, outputs: Tensor, target: Tensor) -> Tensor:
        """log p(y | f) itself, normalised over y and summed over positions: (N,)."""
        return -self.loss(outputs, target)

    @abstractmethod
    def hessian_product(self, outputs: Tensor, target: Tensor | None, vectors: Tensor) -> Tensor:
        """H_n v_n with H_n the Hessian of the loss in the outputs, shaped like vectors.

        In closed form, without a C x C matrix; differentiable in outputs and vectors.

        Args:
            outputs: (N, ...).
            target: read only for masks and weights.
            vectors: (..., N, ...) shaped like the outputs, with any leading dimensions.
        """

    def normal(
        self, outputs: Tensor, target: Tensor | None, n: int, generator: torch.Generator | None
    ) -> Tensor:
        """Draws (n, *outputs) from N(0, H_n), H_n the Hessian of each example's loss.

        Args:
            outputs: (N, ...).
            target: read only for masks and weights.
            n: how many.
            generator: of the draws, on the outputs' device.
        """
        with torch.no_grad():
            return self._normal(wide(outputs.detach()), target, n, generator).to(outputs.dtype)

    @abstractmethod
    def num_terms(self, outputs: Tensor, target: Tensor | None) -> Tensor:
        """How many scalar labels are scored, a 0-d integer tensor."""

    def scored(self, outputs: Tensor, target: Tensor | None) -> Tensor | None:
        """Which positions of the outputs are scored, a mask (N, *positions); None if all are."""
        return None

    @abstractmethod
    def flags(self, outputs: Tensor, target: Tensor | None) -> dict[str, Tensor]:
        """What is wrong in a way that only the device knows: message -> 0-d bool tensor."""

    @abstractmethod
    def _num_exact(self, outputs: Tensor, target: Tensor | None) -> int: ...

    @abstractmethod
    def _exact(self, outputs: Tensor, target: Tensor | None) -> Iterator[Tensor]:
        """The columns of a root of the loss's Hessian."""

    @abstractmethod
    def _sampled(
        self, outputs: Tensor, target: Tensor | None, generator: torch.Generator | None
    ) -> Tensor:
        """The gradient of the loss in the outputs at labels drawn from the model.

        Of a reweighted loss, a direction whose outer product has the loss's Hessian as its mean.
        """

    def _draws(
        self,
        outputs: Tensor,
        target: Tensor | None,
        generator: torch.Generator | None,
        samples: int,
    ) -> Iterator[Tensor]:
        for _ in range(samples):
            yield self._sampled(outputs, target, generator)

    @abstractmethod
    def _normal(
        self, outputs: Tensor, target: Tensor | None, n: int, generator: torch.Generator | None
    ) -> Tensor:
        """Draws (n, *outputs) from N(0, H_n)."""

    @abstractmethod
    def _observed(self, outputs: Tensor, target: Tensor) -> Tensor:
        """The gradient of the loss in the outputs at the observed labels."""

    def num_directions(
        self, outputs: Tensor, target: Tensor | None, estimator: str, samples: int = 1
    ) -> int:
        """How many directions there are: the columns of S_n."""
        counts = {"mc": samples, "empirical": 1}
        if estimator == "empirical_positions":
            dims = self.position_dims(outputs, target)
            return math.prod(outputs.shape[dim] for dim in dims)
        return counts[estimator] if estimator in counts else self._num_exact(outputs, target)

    def directions(
        self,
        outputs: Tensor,
        target: Tensor | None,
        estimator: str,
        *,
        samples: int = 1,
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """The directions, one at a time, shaped like the outputs and detached.

        Args:
            outputs: (N, ...).
            target: the observed labels; needed by "empirical", otherwise read only for masks and
                weights.
            estimator: one of `ESTIMATORS`.
            samples: label draws for "mc", each scaled by 1/sqrt(samples).
            generator: of the draws, on the outputs' device.

        Raises:
            DataError: an unknown estimator; no target if it is needed, by "empirical" or by
                weights.
        """
        check_estimator(estimator)
        outputs = outputs.detach()
        work = wide(outputs)
        if estimator == "exact":
            made = self._exact(work, target)
        elif estimator == "mc":
            scale = 1 / math.sqrt(samples)
            made = (draw * scale for draw in self._draws(work, target, generator, samples))
        elif target is None:
            raise DataError(
                f"estimator={estimator!r} needs observed labels, but the batch has no target: pass "
                "(inputs, target) batches, or target="
            )
        else:
            made = iter([self._observed(work, target)])
            if estimator == "empirical_positions":
                made = self._each_position(next(made), self.position_dims(work, target))
        while True:
            with torch.no_grad():
                direction = next(made, None)
            if direction is None:
                return
            yield direction.to(outputs.dtype)

    def position_dims(self, outputs: Tensor, target: Tensor | None) -> tuple[int, ...]:
        """Which dimensions of the outputs are positions, whose losses are summed."""
        return tuple(range(1, outputs.dim() - 1))

    @staticmethod
    def _each_position(score: Tensor, dims: Sequence[int]) -> Iterator[Tensor]:
        """The score of one position after the other, zero elsewhere."""
        for index in product(*(range(score.shape[dim]) for dim in dims)):
            where = [slice(None)] * score.dim()
            for dim, k in zip(dims, index, strict=True):
                where[dim] = slice(k, k + 1)
            direction = torch.zeros_like(score)
            direction[tuple(where)] = score[tuple(where)]
            yield direction


class PerLabel(Likelihood):
    """A likelihood that knows the loss of each label, so that labels can be masked and weighted.

    The *grid* is the shape of the labels' losses, (N, ...).
    """

    @abstractmethod
    def grid(self, outputs: Tensor, target: Tensor | None) -> torch.Size:
        """The shape of the labels of these outputs."""

    @abstractmethod
    def each(self, outputs: Tensor, target: Tensor) -> Tensor:
        """-log p of each label up to a constant, shaped like the grid. Differentiable."""

    def log_probs(self, outputs: Tensor, target: Tensor) -> Tensor:
        """log p of each label itself, normalised, shaped like the grid."""
        return -self.each(outputs, target)

    def spread(self, numbers: Tensor, outputs: Tensor, target: Tensor | None) -> Tensor:
        """Numbers of the labels at the outputs that they belong to; broadcasts to the outputs."""
        return numbers

    def terms(self, outputs: Tensor, target: Tensor | None) -> Tensor:
        """Which labels are scored, a mask shaped like the grid."""
        return torch.ones(self.grid(outputs, target), dtype=torch.bool, device=outputs.device)

    def size(self, outputs: Tensor) -> int:
        """How many numbers one label is."""
        return 1

    def places(self, terms: Tensor, outputs: Tensor, target: Tensor | None) -> Tensor | None:
        """Which positions of the outputs have a label of a mask: (N, *positions), or None."""
        whole = self.spread(terms, outputs, target).expand(outputs.shape)
        return whole if whole.dim() == 1 else whole.any(-1)

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        """-log p(y | f) up to a constant, summed over positions: (N,). Differentiable."""
        return summed(self.each(outputs, target)).to(outputs.dtype)

    def log_prob(self, outputs: Tensor, target: Tensor) -> Tensor:
        """log p(y | f) itself, normalised over y and summed over positions: (N,)."""
        return summed(self.log_probs(outputs, target))


def check_estimator(estimator: str) -> None:
    """Raise DataError if the estimator is not one of `ESTIMATORS`.

    Args:
        estimator: what a user gave.

    Raises:
        DataError: it is another word; the message lists them.

    Example:
        >>> check_estimator("mc")
        >>> check_estimator("sampled")
        Traceback (most recent call last):
        nngeo_lazy.errors.DataError: unknown estimator 'sampled': expected one of ...
    """
    if estimator not in ESTIMATORS:
        raise DataError(
            f"unknown estimator {estimator!r}: expected one of {list(ESTIMATORS)}; "
            "docs/choose.md explains them"
        )


def check_outputs(outputs: Tensor, target: Any = None) -> None:
    """Raise DataError if these can be no model's outputs, or a target is no tensor."""
    if target is not None and not isinstance(target, Tensor):
        raise DataError(
            f"expected a target that is one tensor, got {type(target).__name__}: for (labels, "
            "weights) take likelihoods.Weighted(...), for several heads a likelihood for each, or "
            "pass target=lambda batch: ..."
        )
    if outputs.dim() < 1 or not outputs.is_floating_point():
        raise DataError(
            "expected floating-point outputs (N, ...) with the examples in dimension 0, got "
            f"{outputs.dtype} of shape {tuple(outputs.shape)}"
        )
    if outputs.shape[0] < 1:
        raise DataError(
            f"expected at least one example in each batch, got outputs {tuple(outputs.shape)}: "
            "drop empty batches from the loader"
        )


def broadcasts(shape: torch.Size, example: torch.Size) -> bool:
    """Whether a tensor of this shape broadcasts to the outputs of an example."""
    try:
        together: torch.Size = torch.broadcast_shapes(shape, example)
    except RuntimeError:
        return False
    return together == example


def labels_needed(weights: str) -> DataError:
    """The error of a loss whose Hessian depends on labels that are not there."""
    return DataError(
        f"the Hessian of a loss with {weights} depends on the labels, but the batch has no target: "
        "pass (inputs, target) batches, or target="
    )


def missing_in(target: Any) -> Tensor | None:
    """Whether a target of real numbers holds NaN, 0-d; None for any other target."""
    if not isinstance(target, Tensor) or not target.is_floating_point():
        return None
    return target.isnan().any()


def summed(each: Tensor) -> Tensor:
    """The sum over all dimensions but that of examples: (N,)."""
    return each.reshape(each.shape[0], -1).sum(1)


def standard_normal(
    n: int, shape: Sequence[int], like: Tensor, generator: torch.Generator | None
) -> Tensor:
    """Draws (n, *shape) in the dtype and on the device of a tensor."""
    return torch.randn((n, *shape), dtype=like.dtype, device=like.device, generator=generator)


def wide(tensor: Tensor) -> Tensor:
    """The tensor in its own dtype, at least float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
