"""Likelihoods of outputs that each have a label of their own."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import DataError
from .base import NOT_FINITE, Likelihood, check_outputs

__all__ = ["Bernoulli", "Gaussian"]


class _Elementwise(Likelihood):
    """Every output of an example has a label of its own; the loss-Hessian is diagonal."""

    @abstractmethod
    def _root(self, outputs: Tensor) -> Tensor:
        """The root of the loss-Hessian's diagonal, shaped like the outputs."""

    def _curvature(self, outputs: Tensor) -> Tensor:
        return self._root(outputs).square()

    def check(self, outputs: Tensor, target: Tensor | None) -> None:
        check_outputs(outputs)
        if target is not None and target.shape != outputs.shape:
            raise DataError(
                f"expected a target shaped like the outputs {tuple(outputs.shape)}, got "
                f"{tuple(target.shape)}"
            )

    def hessian_product(self, outputs: Tensor, target: Tensor | None, vectors: Tensor) -> Tensor:
        return self._curvature(outputs) * vectors

    def num_terms(self, outputs: Tensor, target: Tensor | None) -> Tensor:
        return torch.tensor(outputs.numel(), device=outputs.device)

    def flags(self, outputs: Tensor, target: Tensor | None) -> dict[str, Tensor]:
        return {NOT_FINITE: ~outputs.detach().isfinite().all()}

    def _num_exact(self, outputs: Tensor, target: Tensor | None) -> int:
        return math.prod(outputs.shape[1:])

    def _exact(self, outputs: Tensor, target: Tensor | None) -> Iterator[Tensor]:
        root = self._root(outputs).reshape(outputs.shape[0], -1)
        for j in range(root.shape[1]):
            column = torch.zeros_like(root)
            column[:, j] = root[:, j]
            yield column.view(outputs.shape)


@dataclass(frozen=True)
class Bernoulli(_Elementwise):
    """Each output is the logit of a label in {0, 1}; the loss is binary cross-entropy.

    The loss-Hessian is diag(p (1 - p)) with p = sigmoid(f).

    Example:
        >>> Bernoulli().loss(torch.zeros(1, 2), torch.tensor([[0.0, 1.0]]))
        tensor([1.3863])
    """

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        each = F.binary_cross_entropy_with_logits(outputs, target.to(outputs), reduction="none")
        return each.reshape(outputs.shape[0], -1).sum(1)

    def flags(self, outputs: Tensor, target: Tensor | None) -> dict[str, Tensor]:
        flags = super().flags(outputs, target)
        if target is not None:
            flags["expected labels 0 or 1, but some are neither"] = ~(
                (target == 0) | (target == 1)
            ).all()
        return flags

    def _root(self, outputs: Tensor) -> Tensor:
        h = (-outputs.abs() / 2).exp()  # sqrt(p (1 - p)) = h / (1 + h^2), without underflow
        return h / (1 + h.square())

    def _sampled(
        self, outputs: Tensor, target: Tensor | None, generator: torch.Generator | None
    ) -> Tensor:
        p = outputs.sigmoid()
        uniform = torch.rand(p.shape, dtype=p.dtype, device=p.device, generator=generator)
        return p - (uniform < p).to(p)

    def _observed(self, outputs: Tensor, target: Tensor) -> Tensor:
        return outputs.sigmoid() - target.to(outputs)


@dataclass(frozen=True, eq=False)
class Gaussian(_Elementwise):
    """The loss is |y - f|^2 / (2 variance).

    Args:
        variance: one for all outputs, or a tensor that broadcasts to those of an example.

    Raises:
        DataError: a variance that is not positive and finite.

    Example:
        >>> Gaussian(variance=0.25).loss(torch.zeros(1, 2), torch.ones(1, 2))
        tensor([4.])
    """

    variance: float | Tensor = 1.0

    def __post_init__(self) -> None:
        variance = torch.as_tensor(self.variance)
        if not bool(((variance > 0) & variance.isfinite()).all()):
            raise DataError(f"expected a positive, finite variance, got {self.variance}")

    def check(self, outputs: Tensor, target: Tensor | None) -> None:
        super().check(outputs, target)
        shape, example = torch.as_tensor(self.variance).shape, outputs.shape[1:]
        try:
            fits = torch.broadcast_shapes(shape, example) == example
        except RuntimeError:
            fits = False
        if not fits:
            raise DataError(
                f"expected a variance that broadcasts to the outputs of an example "
                f"{tuple(example)}, got shape {tuple(shape)}"
            )

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        each = (target - outputs).square() * self._curvature(outputs) / 2
        return each.reshape(outputs.shape[0], -1).sum(1)

    def _root(self, outputs: Tensor) -> Tensor:
        return torch.as_tensor(self.variance).to(outputs).rsqrt().expand(outputs.shape)

    def _sampled(
        self, outputs: Tensor, target: Tensor | None, generator: torch.Generator | None
    ) -> Tensor:
        noise = torch.randn(
            outputs.shape, dtype=outputs.dtype, device=outputs.device, generator=generator
        )
        return noise * self._root(outputs)

    def _observed(self, outputs: Tensor, target: Tensor) -> Tensor:
        return (outputs - target) * self._curvature(outputs)
