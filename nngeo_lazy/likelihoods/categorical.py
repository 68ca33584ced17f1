"""Softmax over classes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import DataError
from .base import NOT_FINITE, Likelihood, check_outputs

__all__ = ["Categorical"]


@dataclass(frozen=True)
class Categorical(Likelihood):
    """Softmax over classes: the loss is cross-entropy, outputs are logits.

    Args:
        class_dim: the dimension of the classes. None: the only one of 2-d outputs, otherwise the
        one whose removal gives the target's shape. shift: 1 scores outputs[:, :-1] against
        target[:, 1:], as for the next token. ignore_index: a label that masks its position.

    Over T positions an exact quantity has T (C - 1) directions: each position and class needs its
    own.

    Example:
        >>> (direction,) = Categorical().directions(torch.zeros(1, 2), None, "exact")
        >>> direction  # its outer product is diag(p) - p p^T
        tensor([[ 0.5000, -0.5000]])

    Source:
        Tanabe and Sagae (1992), An exact Cholesky decomposition and the generalized inverse of
        the variance-covariance matrix of the multinomial distribution.
    """

    class_dim: int | None = None
    shift: int = 0
    ignore_index: int = -100

    def check(self, outputs: Tensor, target: Tensor | None) -> None:
        check_outputs(outputs)
        dim = self._class_dim(outputs, target)
        classes = outputs.shape[dim]
        if classes < 2:
            raise DataError(
                f"expected at least two classes in dimension {dim} of the outputs, got shape "
                f"{tuple(outputs.shape)}: for one logit take 'bernoulli'"
            )
        positions = [s for k, s in enumerate(outputs.shape) if k != dim]
        if self.shift and (len(positions) < 2 or positions[1] <= self.shift or dim == 1):
            raise DataError(
                f"shift={self.shift} needs outputs with more than {self.shift} positions in "
                f"dimension 1, got shape {tuple(outputs.shape)}"
            )
        if target is None:
            return
        if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
            raise DataError(
                f"expected integer class labels, got a target of {target.dtype}: convert it with "
                ".long(), or take another likelihood"
            )
        if list(target.shape) != positions:
            raise DataError(
                f"expected a target of shape {tuple(positions)} for outputs {tuple(outputs.shape)} "
                f"with the classes in dimension {dim}, got {tuple(target.shape)}"
            )

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        logits, labels, mask = self._canonical(outputs, target)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        picked = wide.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        return -(picked * mask).sum(1).to(outputs.dtype)

    def hessian_product(self, outputs: Tensor, target: Tensor | None, vectors: Tensor) -> Tensor:
        logits, _, mask = self._canonical(outputs, target)
        dim = self._class_dim(outputs, target)
        v = self._positions(vectors, dim - outputs.dim(), vectors.dim() - outputs.dim())
        p = logits.softmax(-1)
        # H 1 = 0: measured from the likeliest class, v loses no digits where p is nearly one.
        top = p.argmax(-1, keepdim=True).expand(*v.shape[:-1], 1)
        product = p * (v - v.gather(-1, top))
        product = product - p * product.sum(-1, keepdim=True)
        return self._embed(product * mask.unsqueeze(-1), outputs, target)

    def num_terms(self, outputs: Tensor, target: Tensor | None) -> Tensor:
        _, _, mask = self._canonical(outputs, target)
        return mask.sum().to(torch.int64)

    def flags(self, outputs: Tensor, target: Tensor | None) -> dict[str, Tensor]:
        flags = {NOT_FINITE: ~outputs.detach().isfinite().all()}
        if target is not None:
            classes = outputs.shape[self._class_dim(outputs, target)]
            valid = ((target >= 0) & (target < classes)) | (target == self.ignore_index)
            flags[
                f"expected labels from 0 to {classes - 1}, or {self.ignore_index} to ignore a "
                "position, but some are out of range: check the labels and the number of outputs"
            ] = ~valid.all()
        return flags

    def _num_exact(self, outputs: Tensor, target: Tensor | None) -> int:
        logits, _, _ = self._canonical(outputs, target)
        _, positions, classes = logits.shape
        return positions * (classes - 1)

    def _exact(self, outputs: Tensor, target: Tensor | None) -> Iterator[Tensor]:
        """Tanabe and Sagae (1992): column j is a_j (e_j - p_{>j} / t_{j+1}), t_j = sum_{k>=j} p_k.

        a_j^2 = p_j t_{j+1} / t_j. Tails are sums: one minus a cumulative sum would cancel.
        """
        logits, _, mask = self._canonical(outputs, target)
        p = logits.double().softmax(-1)  # (N,T,C); in float32 small ones would lose their digits
        tail = p.flip(-1).cumsum(-1).flip(-1)
        after = tail[..., 1:]
        scale = (p[..., :-1] * _ratio(after, tail[..., :-1])).sqrt() * mask.unsqueeze(-1)
        for position in range(p.shape[1]):
            for j in range(p.shape[2] - 1):
                a, rest = scale[:, position, j], after[:, position, j, None]
                column = torch.zeros_like(p)
                column[:, position, j] = a
                column[:, position, j + 1 :] = -a[:, None] * _ratio(p[:, position, j + 1 :], rest)
                yield self._embed(column, outputs, target)

    def _sampled(
        self, outputs: Tensor, target: Tensor | None, generator: torch.Generator | None
    ) -> Tensor:
        logits, _, mask = self._canonical(outputs, target)
        p = logits.softmax(-1)
        finite = p.nan_to_num(nan=1.0)  # NaN is flagged, and must not crash the draw
        drawn = torch.multinomial(finite.flatten(0, 1), 1, generator=generator)
        return self._score(p, drawn.view(p.shape[:2]), mask, outputs, target)

    def _observed(self, outputs: Tensor, target: Tensor) -> Tensor:
        logits, labels, mask = self._canonical(outputs, target)
        return self._score(logits.softmax(-1), labels, mask, outputs, target)

    def _score(
        self, p: Tensor, labels: Tensor, mask: Tensor, outputs: Tensor, target: Tensor | None
    ) -> Tensor:
        score = p.scatter_add(-1, labels.unsqueeze(-1), -torch.ones_like(p[..., :1]))
        return self._embed(score * mask.unsqueeze(-1), outputs, target)

    def _class_dim(self, outputs: Tensor, target: Tensor | None) -> int:
        """The dimension of the classes, counted from the front."""
        shape = outputs.shape
        if self.class_dim is not None:
            dim = self.class_dim + outputs.dim() if self.class_dim < 0 else self.class_dim
            if not 0 < dim < outputs.dim():
                raise DataError(
                    f"class_dim={self.class_dim} is not a dimension of outputs {tuple(shape)} "
                    "behind the examples"
                )
            return dim
        if outputs.dim() == 2:
            return 1
        if outputs.dim() < 2:
            raise DataError(
                f"expected outputs with a dimension of classes, got shape {tuple(shape)}: for one "
                "logit take 'bernoulli', for a real number 'gaussian'"
            )
        fitting = (
            []
            if target is None
            else [
                k
                for k in range(1, outputs.dim())
                if (*shape[:k], *shape[k + 1 :]) == tuple(target.shape)
            ]
        )
        if len(fitting) != 1:
            got = "no target" if target is None else f"a target of shape {tuple(target.shape)}"
            why = "more than one dimension fits" if fitting else "no dimension fits"
            raise DataError(
                f"cannot tell which dimension of outputs {tuple(shape)} holds the classes from "
                f"{got} ({why}): pass likelihoods.Categorical(class_dim=...)"
            )
        return fitting[0]

    def _positions(self, tensor: Tensor, dim: int, lead: int) -> Tensor:
        """(*lead, N, ...) with classes in `dim` (from the end) to (*lead, N, T, C), shifted."""
        moved = tensor.movedim(dim, -1)
        if self.shift:
            moved = moved.narrow(lead + 1, 0, moved.shape[lead + 1] - self.shift)
        if moved.dim() == lead + 2:
            return moved.unsqueeze(-2)
        return moved.flatten(lead + 1, -2)

    def _canonical(self, outputs: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (N, T, C), labels (N, T) that are safe to gather with, and the mask (N, T)."""
        dim = self._class_dim(outputs, target)
        logits = self._positions(outputs, dim - outputs.dim(), 0)
        if target is None:
            ones = torch.ones(logits.shape[:2], dtype=logits.dtype, device=logits.device)
            return logits, torch.zeros_like(ones, dtype=torch.int64), ones
        labels = target.long()
        if self.shift:
            labels = labels[:, self.shift :]
        labels = labels.reshape(labels.shape[0], -1)
        mask = labels != self.ignore_index
        return logits, labels.clamp(0, logits.shape[-1] - 1), mask.to(logits.dtype)

    def _embed(self, canonical: Tensor, outputs: Tensor, target: Tensor | None) -> Tensor:
        """(*lead, N, T, C) back to (*lead, *outputs.shape), zero where the shift leaves out."""
        dim = self._class_dim(outputs, target)
        lead = canonical.dim() - 3
        shape = list(outputs.shape)
        classes = shape.pop(dim)
        if self.shift:
            shape[1] -= self.shift
        grid = canonical.reshape(*canonical.shape[:lead], *shape, classes)
        if self.shift:
            after = [0, 0] * (grid.dim() - lead - 2)
            grid = F.pad(grid, [*after, 0, self.shift])
        return grid.movedim(-1, lead + dim)


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b with 0 / 0 = 0."""
    return torch.where(b > 0, a / torch.where(b > 0, b, torch.ones_like(b)), torch.zeros_like(a))
