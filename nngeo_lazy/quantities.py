"""Which matrix: the output directions of a pass, and what its sums are divided by."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from enum import Enum
from functools import partial
from typing import Any, ClassVar, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from . import tree
from .errors import DataError
from .likelihoods import (
    Likelihood,
    LikelihoodLike,
    check_estimator,
    of_heads,
    resolve,
    resolve_loss,
)
from .likelihoods.likelihood import NAN_LABELS, NOT_FINITE
from .likelihoods.losses import CallableLoss, Reduction
from .likelihoods.names import Heads, reading_of
from .precision import widened

__all__ = [
    "Fisher",
    "GaussNewton",
    "LossGradients",
    "LossHessian",
    "LossLike",
    "MatrixKind",
    "Metric",
    "Outputs",
    "Quantity",
]

Product: TypeAlias = Callable[[Tensor], Tensor]
Draw: TypeAlias = Callable[[int, torch.Generator | None], Tensor]


class MatrixKind(str, Enum):
    """Which matrices there are; the value is the builder's name for it."""

    GAUSS_NEWTON = "FIM or GGN"
    HESSIAN = "Hessian"
    JACOBIAN = "Jacobian"


class Metric(NamedTuple):
    """The middle S_n S_n^T of J^T S S^T J, on one batch.

    Attributes:
        product: a vector shaped like the values to S S^T v.
        sample: (n, generator) to draws (n, *values) from N(0, S S^T).
    """

    product: Product
    sample: Draw


LossLike: TypeAlias = str | Likelihood | nn.Module | Callable[..., Tensor] | Heads


class Quantity(ABC):
    """Output directions S_n: the matrix is the mean of J_n^T S_n S_n^T J_n.

    Attributes:
        kind: which matrix is made from it.
        estimator: "exact", "mc" or "empirical".
        fewer: how a user gets fewer directions, as the end of an error.
        held: whether all directions of a piece of a batch are held at once.
    """

    kind: ClassVar[MatrixKind] = MatrixKind.GAUSS_NEWTON
    estimator: str = "exact"
    fewer: str = "take estimator='mc' (one for each sample)"
    held: bool = False

    def reading(self) -> dict[str, Any]:
        """How batches are read, as options of `Batches`."""
        return {}

    @abstractmethod
    def fit(self, outputs: Tensor, target: Tensor | None) -> None:
        """Raise DataError if a batch does not fit; the first one decides what is not given."""

    @abstractmethod
    def count(self, outputs: Tensor, target: Tensor | None) -> int:
        """How many directions a batch has."""

    @abstractmethod
    def directions(
        self, outputs: Tensor, target: Tensor | None, generator: torch.Generator | None
    ) -> Iterator[Tensor]:
        """The directions, one at a time, shaped like the outputs."""

    def values(self, outputs: Tensor, target: Tensor | None) -> Tensor:
        """What is differentiated in the parameters: (N, ...), or the sum of all losses."""
        return outputs

    def metric(
        self, values: Tensor, target: Tensor | None, generator: torch.Generator | None
    ) -> Metric:
        """S_n S_n^T of a batch, as products with vectors shaped like the values, and draws."""
        return Metric(lambda v: v, partial(_standard, values))

    @abstractmethod
    def described(self) -> dict[str, str | int | None]:
        """The quantity in plain words: two matrices with the same ones can be pooled."""

    def flags(self, outputs: Tensor, target: Tensor | None) -> dict[str, Tensor]:
        """What is wrong in a way that only the device knows: message -> 0-d bool tensor."""
        return {}

    def num_terms(self, outputs: Tensor, target: Tensor | None) -> Tensor | int:
        """How many scalar labels a batch scores."""
        return outputs.numel()

    def scored(self, outputs: Tensor, target: Tensor | None) -> Tensor | None:
        """Which positions (N, ...) a loss scores; None if it scores all."""
        return None

    def log_likelihood(self, outputs: Tensor, target: Tensor | None) -> Tensor | None:
        """log p(y | f) of a batch's labels, 0-d; None if there are none, or they do not fit."""
        return None

    def denominator(self, outputs: Tensor, target: Tensor | None) -> Tensor | float:
        """A batch's part of what the sum over examples is divided by."""
        return outputs.shape[0]

    def total(self, denominators: float) -> float:
        """What that sum is divided by, from the batches' parts."""
        return denominators


class _OfLoss(Quantity):
    """Directions of a loss: a likelihood, or what behaves like one."""

    def __init__(self, given: Any, estimator: str, samples: int) -> None:
        check_estimator(estimator)
        if not isinstance(samples, int) or samples < 1:
            raise DataError(f"expected samples to be a positive integer, got {samples!r}")
        self._given = of_heads(given)
        self.estimator = estimator
        self.samples = samples
        self.likelihood: Likelihood | None = None

    def reading(self) -> dict[str, Any]:
        return reading_of(self._given)

    def _known(self) -> Likelihood:
        if self.likelihood is None:
            raise RuntimeError("no batch has been fitted")
        return self.likelihood

    def _read(self, target: Tensor | None) -> Tensor | None:
        """The target if something is read from it: observed labels, masks or weights."""
        known = self._known()
        reads = self.estimator.startswith("empirical") or known.masks or bool(known.reweighted)
        return target if reads else None

    def _check(self, outputs: Tensor, target: Tensor | None) -> None:
        self._known().check(outputs, self._read(target))

    def count(self, outputs: Tensor, target: Tensor | None) -> int:
        known, target = self._known(), self._read(target)
        return known.num_directions(outputs, target, self.estimator, self.samples)

    def directions(
        self, outputs: Tensor, target: Tensor | None, generator: torch.Generator | None
    ) -> Iterator[Tensor]:
        known, target = self._known(), self._read(target)
        return known.directions(
            outputs, target, self.estimator, samples=self.samples, generator=generator
        )

    def flags(self, outputs: Tensor, target: Tensor | None) -> dict[str, Tensor]:
        known = self._known()
        flags = known.flags(outputs, self._read(target))
        real = any(leaf.is_floating_point() for leaf in tree.tensors(target))
        if real and not isinstance(known, CallableLoss) and self._fits(outputs, target):
            missing = known.missing(target)
            if missing is not None:  # also if labels are not read: their terms would count
                flags[NAN_LABELS] = missing
        return flags

    def scored(self, outputs: Tensor, target: Tensor | None) -> Tensor | None:
        return self._known().scored(outputs, self._read(target))

    def num_terms(self, outputs: Tensor, target: Tensor | None) -> Tensor | int:
        return self._known().num_terms(outputs, self._read(target))

    def log_likelihood(self, outputs: Tensor, target: Any) -> Tensor | None:
        known = self._known()
        if known.reweighted or not self._fits(outputs, target):
            return None
        outputs = outputs.detach()
        wrong = torch.stack([flag.reshape(()) for flag in known.flags(outputs, target).values()])
        total = widened(known.log_prob(outputs, target)).sum()
        return total.masked_fill(wrong.any(), math.nan)

    def _fits(self, outputs: Tensor, target: Any) -> bool:
        """Whether there are labels of the likelihood; one that is not read may be anything."""
        if target is None or any(leaf.is_complex() for leaf in tree.tensors(target)):
            return False
        try:
            self._known().check(outputs, target)
        except DataError:
            return False
        return True

    def values(self, outputs: Tensor, target: Tensor | None) -> Tensor:
        return self._losses(outputs, target) if self.estimator == "empirical" else outputs

    def _losses(self, outputs: Tensor, target: Tensor | None) -> Tensor:
        if target is None and not isinstance(self._known(), CallableLoss):
            raise DataError(
                "losses and their gradients need observed labels, but the batch has no target: "
                "pass (inputs, target) batches, or target="
            )
        return self._known().loss(outputs, target)  # type: ignore[arg-type]

    def metric(
        self, values: Tensor, target: Tensor | None, generator: torch.Generator | None
    ) -> Metric:
        if self.estimator == "empirical":  # the values are losses
            return super().metric(values, target, generator)
        known, read = self._known(), self._read(target)
        if self.estimator == "exact":
            return Metric(
                lambda v: known.hessian_product(values, read, v),
                lambda n, own: known.normal(values, read, n, own),
            )
        drawn = torch.stack(list(self.directions(values, target, generator)))  # (R,N,...)
        return Metric(partial(_project, drawn), partial(_combine, drawn))

    def described(self) -> dict[str, str | int | None]:
        known: dict[str, str | int | None] = {
            "matrix": type(self).__name__,
            "loss": repr(self.likelihood),
            "estimator": self.estimator,
        }
        return {**known, "samples": self.samples} if self.estimator == "mc" else known


class Fisher(_OfLoss):
    """The Fisher information of a likelihood."""

    def __init__(self, likelihood: LikelihoodLike | None, estimator: str, samples: int) -> None:
        super().__init__(likelihood, estimator, samples)

    def fit(self, outputs: Tensor, target: Tensor | None) -> None:
        """The first batch decides the likelihood if none is given."""
        if self.likelihood is None:
            self.likelihood = resolve(self._given, outputs, target)
            self.likelihood.require_likelihood(self.estimator)
        self._check(outputs, target)


class _Reduced(_OfLoss):
    """A matrix of a loss that is divided by what the loss itself is divided by."""

    def __init__(self, loss: LossLike, estimator: str, samples: int) -> None:
        super().__init__(loss, estimator, samples)
        self._reduction: Reduction | None = None

    def fit(self, outputs: Tensor, target: Tensor | None) -> None:
        if self.likelihood is None:
            self.likelihood, self._reduction = self._resolved(outputs, target)
        self._check(outputs, target)

    def _resolved(self, outputs: Tensor, target: Tensor | None) -> tuple[Likelihood, Reduction]:
        return resolve_loss(self._given, outputs, target)

    def denominator(self, outputs: Tensor, target: Tensor | None) -> Tensor | float:
        if self._reduction is None:
            raise RuntimeError("no batch has been fitted")
        return self._reduction.denominator(outputs, target)

    def total(self, denominators: float) -> float:
        if self._reduction is None:
            raise RuntimeError("no batch has been fitted")
        return self._reduction.total(denominators)

    def described(self) -> dict[str, str | int | None]:
        return {**super().described(), "reduction": repr(self._reduction)}


class GaussNewton(_Reduced):
    """The generalised Gauss-Newton matrix of a loss that is convex in the outputs."""

    def __init__(self, loss: LossLike, estimator: str, samples: int) -> None:
        super().__init__(loss, estimator, samples)
        if estimator == "empirical":
            raise DataError(
                "a Gauss-Newton matrix holds the loss's Hessian in the outputs, so its estimator "
                "is 'exact' or 'mc': for gradients at observed labels take FIM(..., "
                "estimator='empirical')"
            )

    def _resolved(self, outputs: Tensor, target: Tensor | None) -> tuple[Likelihood, Reduction]:
        known, reduction = super()._resolved(outputs, target)
        if isinstance(known, CallableLoss):
            known.require_curved(outputs, target)
        return known, reduction


class LossHessian(_Reduced):
    """The Hessian of a loss in the parameters."""

    kind = MatrixKind.HESSIAN

    def __init__(self, loss: LossLike) -> None:
        super().__init__(loss, "exact", 1)

    def _resolved(self, outputs: Tensor, target: Tensor | None) -> tuple[Likelihood, Reduction]:
        if isinstance(self._given, str) and self._given == "output":
            return CallableLoss(_sum_of_outputs), Reduction("examples")
        return resolve_loss(self._given, outputs, target)

    def _read(self, target: Tensor | None) -> Tensor | None:
        return target

    def values(self, outputs: Tensor, target: Tensor | None) -> Tensor:
        """The sum of all losses, 0-d."""
        return self._losses(outputs, target).sum()


class Outputs(Quantity):
    """One direction for each output: the rows of the Jacobian."""

    kind = MatrixKind.JACOBIAN
    fewer = "pass loss= (one row for each example)"

    def __init__(self, *, held: bool = False) -> None:
        self.held = held

    def fit(self, outputs: Tensor, target: Tensor | None) -> None:
        """Any outputs fit."""
        return

    def count(self, outputs: Tensor, target: Tensor | None) -> int:
        """How many outputs an example has."""
        return outputs[0].numel()

    def directions(
        self, outputs: Tensor, target: Tensor | None, generator: torch.Generator | None
    ) -> Iterator[Tensor]:
        """The unit vectors of the outputs."""
        count = outputs[0].numel()
        for j in range(count):
            unit = outputs.new_zeros(outputs.shape[0], count)
            unit[:, j] = 1
            yield unit.view(outputs.shape)

    def flags(self, outputs: Tensor, target: Tensor | None) -> dict[str, Tensor]:
        """Outputs that are NaN or infinite; one that is ruled out by -infinity is a constant."""
        return {NOT_FINITE: ~(outputs.detach() < math.inf).all()}

    def described(self) -> dict[str, str | int | None]:
        """The matrix alone."""
        return {"matrix": "Jacobian"}


class LossGradients(_OfLoss):
    """One direction: the gradient of each example's loss in its outputs."""

    kind = MatrixKind.JACOBIAN

    def __init__(self, loss: LossLike) -> None:
        super().__init__(loss, "empirical", 1)

    def fit(self, outputs: Tensor, target: Tensor | None) -> None:
        """The first batch decides how the loss is called."""
        if self.likelihood is None:
            self.likelihood, _ = resolve_loss(self._given, outputs, target)
        self._check(outputs, target)


def _sum_of_outputs(outputs: Tensor, target: Tensor | None) -> Tensor:
    """Losses (N,) from outputs that are the losses themselves, of examples or of positions."""
    return outputs.reshape(outputs.shape[0], -1).sum(1)


def _standard(values: Tensor, n: int, generator: torch.Generator | None) -> Tensor:
    """Standard normal draws (n, *values)."""
    shape = (n, *values.shape)
    return torch.randn(shape, dtype=values.dtype, device=values.device, generator=generator)


def _project(drawn: Tensor, v: Tensor) -> Tensor:
    """sum_r d_r <d_r, v> for each example; drawn (R, N, ...)."""
    along = (drawn * v).reshape(*drawn.shape[:2], -1).sum(2)  # (R,N)
    return (drawn * along.reshape(*along.shape, *(1,) * (v.dim() - 1))).sum(0)


def _combine(drawn: Tensor, n: int, generator: torch.Generator | None) -> Tensor:
    """Draws (n, N, ...) of sum_r d_r z_r."""
    shape = (n, *drawn.shape[:2])
    z = torch.randn(shape, dtype=drawn.dtype, device=drawn.device, generator=generator)
    return torch.einsum("krn,rn...->kn...", z, drawn)
