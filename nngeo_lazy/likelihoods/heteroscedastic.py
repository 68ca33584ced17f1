"""Normal labels whose mean and variance are both outputs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import DataError
from .elementwise import EachOutput
from .likelihood import NonFinite, check_outputs

__all__ = ["HeteroscedasticGaussian"]


@dataclass(frozen=True)
class HeteroscedasticGaussian(EachOutput):
    r"""The outputs are the means m and the log variances s of normal labels.

    .. math:: \ell = \tfrac12 \bigl( e^{-s} (y - m)^2 + s \bigr), \qquad
        \mathbb{E}[\nabla^2 \ell] = \mathrm{diag}(e^{-s}, \tfrac12)

    The last dimension of the outputs, 2 C, holds C means and then C log variances. A target has C
    labels there. The Fisher information takes the expectation over labels, and so does `GGN`;
    `Hessian` has the Hessian at the observed labels, which is indefinite.

    Example:
        >>> f, y = torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0]])
        >>> HeteroscedasticGaussian().loss(f, y)
        tensor([2.])
        >>> HeteroscedasticGaussian().hessian_product(f, None, torch.ones(1, 2))
        tensor([[1.0000, 0.5000]])

    Source:
        Nix and Weigend (1994), Estimating the mean and variance of the target probability
        distribution; Immer et al. (2023), Effective Bayesian heteroscedastic regression with deep
        neural networks, section 2.
    """

    def check(self, outputs: Tensor, target: Tensor | None) -> None:
        """Raise DataError if outputs or target cannot be this likelihood's."""
        check_outputs(outputs, target)
        if outputs.dim() < 2 or outputs.shape[-1] % 2:
            raise DataError(
                "expected outputs (N, ..., 2 C), the means and then the log variances of C labels, "
                f"got shape {tuple(outputs.shape)}: concatenate both along the last dimension"
            )
        if target is not None and target.shape != self.grid(outputs, target):
            raise DataError(
                f"expected a target of shape {tuple(self.grid(outputs, target))}, a label for each "
                f"mean in outputs {tuple(outputs.shape)}, got {tuple(target.shape)}"
            )

    def grid(self, outputs: Tensor, target: Tensor | None) -> torch.Size:
        """The shape of the labels: one for each mean."""
        return torch.Size((*outputs.shape[:-1], outputs.shape[-1] // 2))

    def spread(self, numbers: Tensor, outputs: Tensor, target: Tensor | None) -> Tensor:
        """Numbers of the labels at the outputs that they belong to; broadcasts to the outputs."""
        return torch.cat([numbers, numbers], -1)

    def num_terms(self, outputs: Tensor, target: Tensor | None) -> Tensor:
        """How many scalar labels are scored, a 0-d integer tensor."""
        return torch.tensor(outputs.numel() // 2, device=outputs.device)

    def each(self, outputs: Tensor, target: Tensor) -> Tensor:
        """-log p of each label up to a constant, shaped like the grid. Differentiable."""
        m, s = outputs.chunk(2, -1)
        return ((-s).exp() * (target.to(outputs) - m).square() + s) / 2

    def log_probs(self, outputs: Tensor, target: Tensor) -> Tensor:
        """log p of each label itself, normalised, shaped like the grid."""
        return -self.each(outputs, target) - math.log(2 * math.pi) / 2

    def flags(self, outputs: Tensor, target: Tensor | None) -> dict[str, Tensor]:
        """What is wrong in a way that only the device knows: message -> 0-d bool tensor."""
        flags = super().flags(outputs, target)
        s = outputs.detach().chunk(2, -1)[1]
        overflow = NonFinite(
            "expected log variances with a finite precision, but exp of some overflows: bound them"
        )
        flags[overflow] = (s.isfinite() & (-s).exp().isinf()).any()
        return flags

    def _root(self, outputs: Tensor, target: Tensor | None) -> Tensor:
        s = outputs.chunk(2, -1)[1]
        return torch.cat([(-s / 2).exp(), torch.full_like(s, 0.5**0.5)], -1)

    def _sampled(
        self, outputs: Tensor, target: Tensor | None, generator: torch.Generator | None
    ) -> Tensor:
        s = outputs.chunk(2, -1)[1]
        z = torch.randn(s.shape, dtype=s.dtype, device=s.device, generator=generator)
        return torch.cat([-(-s / 2).exp() * z, (1 - z.square()) / 2], -1)

    def _observed(self, outputs: Tensor, target: Tensor) -> Tensor:
        m, s = outputs.chunk(2, -1)
        z = (-s / 2).exp() * (target.to(outputs) - m)
        return torch.cat([-(-s / 2).exp() * z, (1 - z.square()) / 2], -1)
