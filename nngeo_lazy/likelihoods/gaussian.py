"""Normal labels, with a variance for each output or a covariance of those at a position."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..arguments import as_numbers, check_fields
from ..errors import DataError
from ..precision import widened
from .elementwise import EachOutput
from .likelihood import broadcasts, standard_normal, wide

__all__ = ["Gaussian"]


@dataclass(frozen=True, eq=False)
class Gaussian(EachOutput):
    r"""The loss is a squared error, in units of the labels' variance or covariance.

    .. math:: \ell = \tfrac12 (y - f)^T \Sigma^{-1} (y - f), \qquad
        \nabla^2 \ell = \Sigma^{-1}

    summed over positions.

    Args:
        variance: one for all outputs; or a tensor that broadcasts to the outputs of an example, a
            variance for each; or else a covariance (C, C) of the last dimension of the outputs,
            shared by positions. What broadcasts is per output: for outputs (N, C, C) a (C, C)
            tensor is a variance for each, and for outputs (N, C) it is a covariance.

    Raises:
        DataError: a variance that is not positive and finite, a covariance that is not symmetric
            positive definite.

    Example:
        >>> Gaussian(variance=0.25).loss(torch.zeros(1, 2), torch.ones(1, 2))
        tensor([4.])
        >>> sigma = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
        >>> Gaussian(sigma).hessian_product(torch.zeros(1, 2), None, torch.tensor([[3.0, 0.0]]))
        tensor([[ 2., -1.]])
    """

    variance: float | Sequence[Any] | Tensor = 1.0

    def __post_init__(self) -> None:
        check_fields(self)
        if not isinstance(self.variance, int | float | Tensor):
            held = as_numbers("variance", self.variance)
            object.__setattr__(self, "variance", held)
        variance = torch.as_tensor(self.variance)
        if bool(((variance > 0) & variance.isfinite()).all()):
            return  # of a matrix, only the outputs tell whether it is a covariance
        if variance.dim() == 2 and variance.shape[0] == variance.shape[1]:
            _ = self._root_of_precision
            return
        raise DataError(f"expected a positive, finite variance, got {self.variance}")

    def __repr__(self) -> str:
        """With all digits, so that what prints alike is alike."""
        given = self.variance
        return f"Gaussian(variance={given.tolist() if isinstance(given, Tensor) else given!r})"

    def check(self, outputs: Tensor, target: Tensor | None) -> None:
        """Raise DataError if outputs or target cannot be this likelihood's."""
        super().check(outputs, target)
        variance, example = torch.as_tensor(self.variance), outputs.shape[1:]
        if self._correlated(outputs):
            if variance.shape != (*example[-1:], *example[-1:]):
                raise DataError(
                    f"expected a variance that broadcasts to the outputs of an example "
                    f"{tuple(example)}, or a covariance of their last dimension, got shape "
                    f"{tuple(variance.shape)}"
                )
            _ = self._precision  # made here, and not within a transformed function
        elif variance.dim() == 2 and not bool((variance > 0).all()):
            raise DataError(
                f"expected a positive, finite variance for each output of an example "
                f"{tuple(example)}, got {variance}: a matrix that broadcasts to its shape is no "
                "covariance"
            )

    def dispersion(self, outputs: Tensor, score: Tensor) -> Tensor | None:
        """The mean squared residual in units of the labels' variance, 0-d."""
        work = wide(score)
        if self._correlated(outputs):
            residual = work @ torch.as_tensor(self.variance).to(work)
        else:
            residual = work / self._curvature(wide(outputs), None)
        return (work * residual).mean()

    def grid(self, outputs: Tensor, target: Tensor | None) -> torch.Size:
        """The shape of the labels: correlated outputs have one label together."""
        return outputs.shape[:-1] if self._correlated(outputs) else outputs.shape

    def size(self, outputs: Tensor) -> int:
        """How many numbers one label is."""
        return outputs.shape[-1] if self._correlated(outputs) else 1

    def spread(self, numbers: Tensor, outputs: Tensor, target: Tensor | None) -> Tensor:
        """Numbers of the labels at the outputs that they belong to; broadcasts to the outputs."""
        return numbers.unsqueeze(-1) if self._correlated(outputs) else numbers

    def each(self, outputs: Tensor, target: Tensor) -> Tensor:
        """-log p of each label up to a constant, shaped like the grid. Differentiable."""
        residual = target - outputs
        each = residual * self.hessian_product(outputs, target, residual) / 2
        return each.sum(-1) if self._correlated(outputs) else each

    def log_probs(self, outputs: Tensor, target: Tensor) -> Tensor:
        """log p of each label itself, normalised, shaped like the grid."""
        if self._correlated(outputs):
            logs = self._root_of_precision.diagonal().log().to(outputs).sum()
        else:
            logs = self._root(outputs, None).log()
        return logs - self.size(outputs) / 2 * math.log(2 * math.pi) - self.each(outputs, target)

    def hessian_product(self, outputs: Tensor, target: Tensor | None, vectors: Tensor) -> Tensor:
        """H_n v_n with H_n the Hessian of the loss in the outputs, shaped like vectors."""
        if not self._correlated(outputs):
            return super().hessian_product(outputs, target, vectors)
        work = wide(vectors)
        return (work @ self._precision.to(work)).to(vectors.dtype)

    def _correlated(self, outputs: Tensor) -> bool:
        variance = self.variance
        return isinstance(variance, Tensor) and not broadcasts(variance.shape, outputs.shape[1:])

    @cached_property
    def _root_of_precision(self) -> Tensor:
        """S = L^-T of the Cholesky factor L of the covariance: S S^T is its inverse. (C, C)."""
        sigma = widened(torch.as_tensor(self.variance).detach())
        factor, info = torch.linalg.cholesky_ex(sigma)
        # As exact as the covariance can be in its own dtype.
        rounding = 100 * torch.finfo(wide(torch.as_tensor(self.variance)).dtype).eps
        symmetric = torch.allclose(sigma, sigma.mT, rtol=rounding, atol=0.0)
        if not (symmetric and bool(sigma.isfinite().all()) and int(info) == 0):
            raise DataError(
                f"expected a symmetric positive definite covariance, got {self.variance}: "
                "symmetrise it and add a multiple of the identity, or pass positive variances that "
                "broadcast to the outputs of an example"
            )
        eye = torch.eye(len(sigma), dtype=sigma.dtype, device=sigma.device)
        inverse: Tensor = torch.linalg.solve_triangular(factor, eye, upper=False)
        return inverse.mT

    @cached_property
    def _precision(self) -> Tensor:
        return self._root_of_precision @ self._root_of_precision.mT

    def _root(self, outputs: Tensor, target: Tensor | None) -> Tensor:
        variance = torch.as_tensor(self.variance, dtype=outputs.dtype, device=outputs.device)
        return variance.rsqrt().expand(outputs.shape)

    def _curvature(self, outputs: Tensor, target: Tensor | None) -> Tensor:
        return 1 / torch.as_tensor(self.variance, dtype=outputs.dtype, device=outputs.device)

    def _exact(self, outputs: Tensor, target: Tensor | None) -> Iterator[Tensor]:
        if not self._correlated(outputs):
            yield from super()._exact(outputs, target)
            return
        root = self._root_of_precision.to(outputs)
        zeros = torch.zeros_like(outputs).reshape(outputs.shape[0], -1, outputs.shape[-1])
        for position in range(zeros.shape[1]):
            for j in range(len(root)):
                column = zeros.clone()
                column[:, position] = root[:, j]
                yield column.view(outputs.shape)

    def _sampled(
        self, outputs: Tensor, target: Tensor | None, generator: torch.Generator | None
    ) -> Tensor:
        # y - f is normal, so that the score is
        return self._normal(outputs, target, 1, generator).squeeze(0)

    def _normal(
        self, outputs: Tensor, target: Tensor | None, n: int, generator: torch.Generator | None
    ) -> Tensor:
        noise = standard_normal(n, outputs.shape, outputs, generator)
        if self._correlated(outputs):
            return noise @ self._root_of_precision.mT.to(outputs)
        return noise * self._root(outputs, target)

    def _observed(self, outputs: Tensor, target: Tensor) -> Tensor:
        return self.hessian_product(outputs, target, outputs - target)
