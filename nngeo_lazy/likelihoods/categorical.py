"""Softmax over classes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from ..arguments import as_numbers, check_fields
from ..errors import DataError
from ..precision import widened, widest
from .likelihood import (
    NOT_FINITE,
    PerLabel,
    check_outputs,
    labels_needed,
    standard_normal,
    wide,
)

__all__ = ["Categorical"]


@dataclass(frozen=True)
class Categorical(PerLabel):
    r"""Softmax over classes: the loss is cross-entropy, outputs are logits.

    .. math:: \ell = -\sum_c q_c \log p_c, \qquad \nabla \ell = \kappa p - q, \qquad
        \nabla^2 \ell = \kappa \, (\mathrm{diag}(p) - p p^T)

    at each position, with q_c = (1 - label_smoothing) w_y 1[c = y] + label_smoothing w_c / C, as in
    `torch.nn.functional.cross_entropy`, and kappa = sum_c q_c: 1 without class weights.

    Args:
        class_dim: the dimension of the classes. None: the only one of 2-d outputs, otherwise the
            one whose removal gives the target's shape.
        shift: 1 scores outputs[:, :-1] against target[:, 1:], as for the next token.
        ignore_index: a label that masks its position.
        weight: w (C,), nonnegative; 1 by default. With it the loss is no likelihood.
        label_smoothing: from 0, the default, to below 1. With it the loss is no likelihood.

    Raises:
        DataError: a weight that is negative or not finite, a smoothing outside [0, 1).

    Over T positions an exact quantity has T (C - 1) directions: each position and class needs its
    own.

    Example:
        >>> (direction,) = Categorical().directions(torch.zeros(1, 2), None, "exact")
        >>> direction  # its outer product is diag(p) - p p^T
        tensor([[ 0.5000, -0.5000]])
        >>> Categorical(weight=[1.0, 3.0]).loss(torch.zeros(2, 2), torch.tensor([0, 1]))
        tensor([0.6931, 2.0794])

    Source:
        Tanabe and Sagae (1992), An exact Cholesky decomposition and the generalized inverse of
        the variance-covariance matrix of the multinomial distribution; Szegedy et al. (2016),
        Rethinking the Inception architecture for computer vision, section 7, on smoothing.
    """

    class_dim: int | None = None
    shift: int = 0
    ignore_index: int = -100
    weight: Sequence[float] | Tensor | None = None
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if self.weight is not None:
            weight = as_numbers("weight", self.weight).detach()
            if weight.dim() != 1 or not bool(((weight >= 0) & weight.isfinite()).all()):
                raise DataError(
                    "expected a weight for each class (C,), nonnegative and finite, got "
                    f"{self.weight}"
                )
            # Numbers, and not a tensor, so that two likelihoods compare, hash and print by value.
            object.__setattr__(self, "weight", tuple(weight.tolist()))
        check_fields(self)
        if not 0 <= self.label_smoothing < 1:
            raise DataError(
                f"expected a label_smoothing from 0 to below 1, got {self.label_smoothing!r}"
            )

    @property
    def masks(self) -> bool:
        """Whether the target can mask terms, so that it is read even if labels are drawn."""
        return True

    @property
    def reweighted(self) -> str:
        """Why the loss is no likelihood, as in "class weights"; empty if it is one."""
        reasons = {"class weights": self.weight is not None, "label smoothing": self._smooth}
        return " and ".join(reason for reason, holds in reasons.items() if holds)

    def check(self, outputs: Tensor, target: Tensor | None) -> None:
        """Raise DataError if outputs or target cannot be this likelihood's."""
        check_outputs(outputs, target)
        dim = self._class_dim(outputs, target)
        classes = outputs.shape[dim]
        if classes < 2:
            raise DataError(
                f"expected at least two classes in dimension {dim} of the outputs, got shape "
                f"{tuple(outputs.shape)}: for one logit take 'bernoulli'"
            )
        if self.weight is not None and len(self._weight) != classes:
            raise DataError(
                f"expected {classes} class weights for outputs {tuple(outputs.shape)} with the "
                f"classes in dimension {dim}, got {len(self.weight)}"
            )
        positions = [s for k, s in enumerate(outputs.shape) if k != dim]
        if self.shift and (len(positions) < 2 or positions[1] <= self.shift or dim == 1):
            raise DataError(
                f"shift={self.shift} needs outputs with more than {self.shift} positions in "
                f"dimension 1, got shape {tuple(outputs.shape)}"
            )
        if target is None:
            return
        if target.dtype == torch.bool:
            raise DataError(
                "expected integer class labels, got a target of torch.bool: convert it with "
                ".long(); if it is a mask, pass batches ((inputs, mask), target), or target="
            )
        if target.is_floating_point() or target.is_complex():
            raise DataError(
                f"expected integer class labels, got a target of {target.dtype}: convert it with "
                ".long(), or take another likelihood"
            )
        if list(target.shape) != positions:
            n = target.shape[0] if target.dim() else 0
            others = [k for k, size in enumerate(outputs.shape) if k and size == n]
            hint = ""
            if others and outputs.shape[0] != n:
                hint = (
                    f": if the examples are in dimension {others[0]} of the outputs, pass "
                    f"forward=lambda model, batch: model(batch[0]).movedim({others[0]}, 0)"
                )
            raise DataError(
                f"expected a target of shape {tuple(positions)} for outputs {tuple(outputs.shape)} "
                f"with the classes in dimension {dim}, got {tuple(target.shape)}{hint}"
            )

    def target_of(self, outputs: Tensor, gradient: Tensor) -> Tensor | None:
        """Only the label's own logit is pushed up; masked positions have no gradient at all.

        Neither has a label of probability one, which is told from a mask by the probability.
        """
        if self.weight is not None and self._smooth:
            return None  # smoothed labels may be pushed down
        dim = self._class_dim(outputs, None)
        certain = wide(outputs.detach()).softmax(dim).amax(dim) == 1
        pushed = (gradient != 0).any(dim)
        labels = torch.where(pushed, gradient.argmin(dim), outputs.argmax(dim))
        labels = labels.masked_fill(~(pushed | certain), self.ignore_index)
        if self.shift:  # what is scored at t is the label at t + shift
            ahead = labels[:, : -self.shift]
            labels = torch.cat(
                [torch.full_like(labels[:, : self.shift], self.ignore_index), ahead], 1
            )
        return labels

    def scale_of(self, outputs: Tensor, gradient: Tensor) -> Tensor | None:
        """From the likeliest class that is pushed down, at each position: c p there."""
        dim = self._class_dim(outputs, None)
        p = wide(outputs.detach()).softmax(dim) * (gradient > 0)
        wrong, where = p.max(dim, keepdim=True)
        return wide(gradient).gather(dim, where).sum() / wrong.sum()

    def grid(self, outputs: Tensor, target: Tensor | None) -> torch.Size:
        """The shape of the labels: that of the outputs without the classes."""
        dim = self._class_dim(outputs, target)
        return torch.Size(size for k, size in enumerate(outputs.shape) if k != dim)

    def spread(self, numbers: Tensor, outputs: Tensor, target: Tensor | None) -> Tensor:
        """Numbers of the labels at the outputs that they belong to; broadcasts to the outputs."""
        dim = self._class_dim(outputs, target)
        if self.shift:  # label t is scored at t - shift
            numbers = torch.cat([numbers[:, self.shift :], numbers[:, : self.shift]], 1)
        return numbers.unsqueeze(dim)

    def places(self, terms: Tensor, outputs: Tensor, target: Tensor | None) -> Tensor:
        """Which positions of the outputs have a label of a mask: (N, *positions)."""
        return self.spread(terms, outputs, target).squeeze(self._class_dim(outputs, target))

    def terms(self, outputs: Tensor, target: Tensor | None) -> Tensor:
        """Which labels are scored, a mask shaped like the grid."""
        _, _, mask = self._canonical(outputs, target)
        return self._as_grid(mask, outputs, target) != 0

    def each(self, outputs: Tensor, target: Tensor) -> Tensor:
        """-log p of each label up to a constant, shaped like the grid. Differentiable."""
        logits, labels, mask = self._canonical(wide(outputs), target)
        log_p = logits.log_softmax(-1)
        losses = -log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        if self.weight is not None:
            losses = losses * self._weight.to(losses)[labels]
        if self._smooth:
            uniform = -(log_p if self.weight is None else log_p * self._weight.to(log_p)).mean(-1)
            losses = losses.lerp(uniform, self.label_smoothing)
        return self._as_grid(losses * mask, outputs, target)

    def hessian_product(self, outputs: Tensor, target: Tensor | None, vectors: Tensor) -> Tensor:
        """H_n v_n with H_n the Hessian of the loss in the outputs, shaped like vectors."""
        logits, labels, mask = self._canonical(outputs, target)
        dim = self._class_dim(outputs, target)
        v = self._positions(vectors, dim - outputs.dim(), vectors.dim() - outputs.dim())
        p = logits.softmax(-1)
        # H 1 = 0: measured from the likeliest class, v loses no digits if p is nearly one.
        top = p.argmax(-1, keepdim=True).expand(*v.shape[:-1], 1)
        product = p * (v - v.gather(-1, top))
        product = product - p * product.sum(-1, keepdim=True)
        return self._embed(product * self._kappa(labels, mask, target), outputs, target)

    def num_terms(self, outputs: Tensor, target: Tensor | None) -> Tensor:
        """How many scalar labels are scored, a 0-d integer tensor."""
        _, _, mask = self._canonical(outputs, target)
        return mask.count_nonzero()

    def scored(self, outputs: Tensor, target: Tensor | None) -> Tensor | None:
        """Which positions of the outputs are scored, a mask (N, *positions); None if all are."""
        if target is None and not self.shift:
            return None
        return self.places(self.terms(outputs.detach(), target), outputs, target)

    def label_weights(self, outputs: Tensor, target: Tensor | None) -> Tensor:
        """The weight of each position's label, zero if it is masked: (N, T).

        Their sum is what `cross_entropy(reduction="mean")` divides by.
        """
        _, labels, mask = self._canonical(wide(outputs), target)
        if self.weight is None:
            return mask
        if target is None:
            raise labels_needed("class weights")
        return mask * self._weight.to(mask)[labels]

    def flags(self, outputs: Tensor, target: Tensor | None) -> dict[str, Tensor]:
        """What is wrong in a way that only the device knows: message -> 0-d bool tensor."""
        values = outputs.detach()
        likeliest = values.amax(self._class_dim(outputs, target))
        flags: dict[str, Tensor] = {
            NOT_FINITE: ~(likeliest.isfinite().all() & (values < math.inf).all())
        }
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
        logits, labels, mask = self._canonical(outputs, target)
        root_of_kappa = self._kappa(labels, mask, target).sqrt()
        p = widened(logits).softmax(-1)  # (N,T,C); in float32 small ones would lose their digits
        tail = p.flip(-1).cumsum(-1).flip(-1)
        after = tail[..., 1:]
        scale = (p[..., :-1] * _ratio(after, tail[..., :-1])).sqrt() * root_of_kappa
        for position in range(p.shape[1]):
            for j in range(p.shape[2] - 1):
                a, rest = scale[:, position, j], after[:, position, j, None]
                column = torch.zeros_like(p)
                column[:, position, j] = a
                column[:, position, j + 1 :] = -a[:, None] * _ratio(p[:, position, j + 1 :], rest)
                yield self._embed(column, outputs, target)

    def position_dims(self, outputs: Tensor, target: Tensor | None) -> tuple[int, ...]:
        """Which dimensions of the outputs are positions, whose losses are summed."""
        own = self._class_dim(outputs, target)
        return tuple(dim for dim in range(1, outputs.dim()) if dim != own)

    def _sampled(
        self, outputs: Tensor, target: Tensor | None, generator: torch.Generator | None
    ) -> Tensor:
        logits, labels, mask = self._canonical(outputs, target)
        p = logits.softmax(-1)
        finite = p.nan_to_num(nan=1.0)  # NaN is flagged, and must not crash the draw
        drawn = torch.multinomial(finite.flatten(0, 1), 1, generator=generator)
        score = _minus_one(p, drawn.view(p.shape[:2]))
        return self._embed(score * self._kappa(labels, mask, target).sqrt(), outputs, target)

    def _normal(
        self, outputs: Tensor, target: Tensor | None, n: int, generator: torch.Generator | None
    ) -> Tensor:
        logits, labels, mask = self._canonical(outputs, target)
        p = logits.softmax(-1)
        root = p.sqrt() * standard_normal(n, p.shape, p, generator)
        draw = root - p * root.sum(-1, keepdim=True)  # its covariance is diag(p) - p p^T
        return self._embed(draw * self._kappa(labels, mask, target).sqrt(), outputs, target)

    def _observed(self, outputs: Tensor, target: Tensor) -> Tensor:
        logits, labels, mask = self._canonical(outputs, target)
        p = logits.softmax(-1)
        score = _minus_one(p, labels)
        if self.weight is not None:
            score = score * self._weight.to(p)[labels].unsqueeze(-1)
        if self._smooth:
            w = torch.ones_like(p[0, 0]) if self.weight is None else self._weight.to(p)
            score = score.lerp(w.mean() * p - w / len(w), self.label_smoothing)
        return self._embed(score * mask.unsqueeze(-1), outputs, target)

    @property
    def _smooth(self) -> bool:
        return self.label_smoothing > 0

    @cached_property
    def _weight(self) -> Tensor:
        return torch.tensor(self.weight, dtype=widest(), device="cpu")

    def _kappa(self, labels: Tensor, mask: Tensor, target: Tensor | None) -> Tensor:
        """The mass of each position's target, zero if it is masked: (N, T, 1)."""
        if self.weight is None:  # smoothing moves mass between classes, and keeps its sum
            return mask.unsqueeze(-1)
        if target is None:
            raise labels_needed("class weights")
        w = self._weight.to(mask)
        kappa = w[labels].lerp(w.mean(), self.label_smoothing)
        return (mask * kappa).unsqueeze(-1)

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

    def _as_grid(self, canonical: Tensor, outputs: Tensor, target: Tensor | None) -> Tensor:
        """(N, T) to the shape of the labels, zero for those that the shift leaves out."""
        grid = self.grid(outputs, target)
        if not self.shift:
            return canonical.reshape(grid)
        kept = canonical.reshape(grid[0], grid[1] - self.shift, *grid[2:])
        return torch.cat([kept.new_zeros(grid[0], self.shift, *grid[2:]), kept], 1)

    def _embed(self, canonical: Tensor, outputs: Tensor, target: Tensor | None) -> Tensor:
        """(*lead, N, T, C) back to (*lead, *outputs.shape), zero if the shift leaves out."""
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


def _minus_one(p: Tensor, labels: Tensor) -> Tensor:
    """p - e_y at every position: (N, T, C)."""
    return p.scatter_add(-1, labels.unsqueeze(-1), -torch.ones_like(p[..., :1]))


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b with 0 / 0 = 0."""
    return torch.where(b > 0, a / torch.where(b > 0, b, torch.ones_like(b)), torch.zeros_like(a))
