"""Which of two is preferred."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import DataError
from .elementwise import Bernoulli
from .likelihood import PerLabel, check_outputs

__all__ = ["BradleyTerry"]

_LOGIT = Bernoulli()


@dataclass(frozen=True)
class BradleyTerry(PerLabel):
    r"""The outputs are the scores of two, and the label says whether the first is preferred.

    .. math:: \ell = -y \log p - (1 - y) \log(1 - p), \quad p = \sigma(f_1 - f_2), \qquad
        \nabla^2 \ell = p (1 - p) \begin{pmatrix} 1 & -1 \\ -1 & 1 \end{pmatrix}

    The last dimension of the outputs holds the two scores. A target has one label there, without
    that dimension: 1 if the first is preferred, 0 if the second is, or a probability. A reward
    model scores one at a time, so `forward=` stacks its two outputs.

    Example:
        >>> scores = torch.tensor([[1.0, 1.0]])
        >>> BradleyTerry().loss(scores, torch.ones(1))
        tensor([0.6931])
        >>> next(BradleyTerry().directions(scores, None, "exact"))  # one for each pair
        tensor([[ 0.5000, -0.5000]])

    Source:
        Bradley and Terry (1952), Rank analysis of incomplete block designs; Ouyang et al. (2022),
        Training language models to follow instructions with human feedback, eq. 1.
    """

    def check(self, outputs: Tensor, target: Tensor | None) -> None:
        """Raise DataError if outputs or target cannot be this likelihood's."""
        check_outputs(outputs, target)
        if outputs.dim() < 2 or outputs.shape[-1] != 2:
            raise DataError(
                "expected outputs (N, ..., 2), the scores of two that are compared, got shape "
                f"{tuple(outputs.shape)}: pass forward=lambda model, batch: torch.stack([model(...)"
                ", model(...)], -1)"
            )
        if target is not None and target.shape != outputs.shape[:-1]:
            raise DataError(
                f"expected a target of shape {tuple(outputs.shape[:-1])}, a label for each pair in "
                f"outputs {tuple(outputs.shape)}, got {tuple(target.shape)}"
            )

    def grid(self, outputs: Tensor, target: Tensor | None) -> torch.Size:
        """The shape of the labels: one for each pair."""
        return outputs.shape[:-1]

    def spread(self, numbers: Tensor, outputs: Tensor, target: Tensor | None) -> Tensor:
        """Numbers of the labels at the outputs that they belong to; broadcasts to the outputs."""
        return numbers.unsqueeze(-1)

    def each(self, outputs: Tensor, target: Tensor) -> Tensor:
        """-log p of each label up to a constant, shaped like the grid. Differentiable."""
        return _LOGIT.each(_apart(outputs), target)

    def hessian_product(self, outputs: Tensor, target: Tensor | None, vectors: Tensor) -> Tensor:
        """H_n v_n with H_n the Hessian of the loss in the outputs, shaped like vectors."""
        return _both(_LOGIT.hessian_product(_apart(outputs), target, _apart(vectors)))

    def num_terms(self, outputs: Tensor, target: Tensor | None) -> Tensor:
        """How many scalar labels are scored, a 0-d integer tensor."""
        return torch.tensor(outputs.numel() // 2, device=outputs.device)

    def flags(self, outputs: Tensor, target: Tensor | None) -> dict[str, Tensor]:
        """What is wrong in a way that only the device knows: message -> 0-d bool tensor."""
        return _LOGIT.flags(_apart(outputs), target)

    def _num_exact(self, outputs: Tensor, target: Tensor | None) -> int:
        return math.prod(outputs.shape[1:-1])

    def _exact(self, outputs: Tensor, target: Tensor | None) -> Iterator[Tensor]:
        return map(_both, _LOGIT._exact(_apart(outputs), target))

    def _sampled(
        self, outputs: Tensor, target: Tensor | None, generator: torch.Generator | None
    ) -> Tensor:
        return _both(_LOGIT._sampled(_apart(outputs), target, generator))

    def _normal(
        self, outputs: Tensor, target: Tensor | None, n: int, generator: torch.Generator | None
    ) -> Tensor:
        return _both(_LOGIT._normal(_apart(outputs), target, n, generator))

    def _observed(self, outputs: Tensor, target: Tensor) -> Tensor:
        return _both(_LOGIT._observed(_apart(outputs), target))


def _apart(scores: Tensor) -> Tensor:
    """The logit of the first's preference."""
    return scores[..., 0] - scores[..., 1]


def _both(logit: Tensor) -> Tensor:
    """A gradient in the logit as one in both scores."""
    return torch.stack([logit, -logit], -1)
