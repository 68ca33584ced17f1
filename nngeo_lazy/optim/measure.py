"""What the passes of a refresh tell besides the curvature: the loss's scale, and changes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..likelihoods import Categorical, Likelihood
from .loop import Passed

__all__ = ["Reading", "Touched", "changed"]

SMALL = 4096  # numbers of a parameter whose gradient is compared
MANY = 6  # of such parameters


@dataclass
class Reading:
    """The passes of one refresh.

    Attributes:
        likelihood: of the outputs; None if it is not known.
        passes: with what the gradient shows of their targets.
        terms: how many labels there are: for categorical ones those that are scored, else examples.
        square: of one example's own gradient at the outputs, on average.
    """

    likelihood: Likelihood | None = None
    passes: list[tuple[Passed, Tensor | None]] = field(default_factory=list)
    terms: Tensor | None = None
    square: Tensor | None = None

    def add(self, likelihood: Likelihood | None, passed: Passed, target: Tensor | None) -> None:
        """Take a pass."""
        self.likelihood = likelihood
        self.passes.append((passed, target))

    @property
    def examples(self) -> int:
        """Of all passes."""
        return sum(passed.outputs.shape[0] for passed, _ in self.passes)

    def close(self, total: float) -> tuple[Tensor, Tensor, Tensor | None]:
        """What the step needs, once all losses have been differentiated.

        Args:
            total: what the loss's sum over labels is divided by, if its scale cannot be seen.

        Returns:
            c, with the loop's loss c times the mean over labels of theirs; the curvature in that
            mean's units, as a multiple of itself; the dispersion, if there is one.
        """
        found = [self._read(passed, target) for passed, target in self.passes]
        terms = torch.stack([each.terms for each in found])
        self.terms = terms.sum().clamp_min(1.0)
        square = torch.stack([each.square for each in found]).sum() * self.examples
        self.square = square.clamp_min(torch.finfo(square.dtype).tiny ** 0.5)
        if self.likelihood is None:
            return self.square.sqrt(), 1 / self.square, None
        scales = torch.stack([each.scale for each in found])
        weights = terms * (scales.isfinite() & (scales > 0))
        mean = (scales.nan_to_num() * weights).sum() / weights.sum()
        each = torch.where(mean > 0, mean, torch.full_like(mean, 1 / total))  # NaN is not
        residuals = [one.residual for one in found if one.residual is not None]
        dispersion = None
        if residuals:
            dispersion = torch.stack(residuals).sum() / self.examples / each.square()
        return each * self.terms, total / self.terms, dispersion

    def _read(self, passed: Passed, target: Tensor | None) -> _Read:
        outputs, gradient, likelihood = passed.outputs, passed.gradient, self.likelihood
        if gradient is None:
            raise RuntimeError("a pass without a gradient")
        terms = torch.tensor(float(outputs.shape[0]), device=outputs.device)
        if isinstance(likelihood, Categorical):
            terms = likelihood.num_terms(outputs, target).float()
        square, scale = gradient.float().square().sum(), torch.full_like(terms, float("nan"))
        if likelihood is None:
            return _Read(terms, square, scale, None)
        seen = likelihood.scale_of(outputs, gradient)
        residual = likelihood.dispersion(outputs, gradient)
        return _Read(
            terms,
            square,
            scale if seen is None else seen.float(),
            None if residual is None else residual.float() * outputs.shape[0],
        )


class _Read(NamedTuple):
    """Of one pass: labels, the squared gradient, the loss's scale and the squared residuals."""

    terms: Tensor
    square: Tensor
    scale: Tensor
    residual: Tensor | None


@torch.no_grad()
def changed(reading: Reading, model: nn.Module) -> Tensor | None:
    """2 KL, per label, of the predictions of a refresh and those of the model as it is now.

    To second order in the change; exactly the sum of both directions' KL for likelihoods whose
    outputs are natural parameters. If the likelihood is not known, the squared change of the
    outputs along the loss's gradients, in units of their mean square.

    Returns:
        0-d, or None if a pass cannot be run again.
    """
    total: list[Tensor] = []
    if reading.terms is None or reading.square is None:
        return None
    for passed, target in reading.passes:
        if passed.replay is None or not passed.replay.fresh:
            return None
        before = passed.outputs
        buffers = [(b, b.detach().clone()) for b in model.buffers()]
        try:
            after = passed.replay(model).detach()
        finally:
            for buffer, kept in buffers:
                buffer.copy_(kept)
        if after.shape != before.shape:
            return None
        same = before == after  # also if both are infinite
        change = torch.where(same, 0.0, after.float() - before.float()).flatten(1)
        if reading.likelihood is None:
            if passed.gradient is None:
                return None
            own = passed.gradient.float().flatten(1) * reading.examples
            total.append((own * change).sum(1).square().sum())
        else:
            labels = torch.zeros_like(before) if target is None else target
            a, b = (_score(reading.likelihood, f, labels) for f in (before, after))
            total.append(((b - a).flatten(1) * change).sum())
    found = torch.stack(total).sum() / reading.terms
    return found / reading.square if reading.likelihood is None else found


def _score(likelihood: Likelihood, outputs: Tensor, labels: Tensor) -> Tensor:
    (score,) = likelihood.directions(outputs.float(), labels, "empirical")
    return score


class Touched:
    """Compares gradients with what the backward pass brought: a loop unscales and clips them.

    Args:
        parameters: of the optimizer.

    Attributes:
        active: whether the next backward passes are kept.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        small = [p for p in parameters.values() if p.numel() <= SMALL] or list(parameters.values())
        self._parameters = [*small[:: max(1, len(small) // MANY)][: MANY - 1], small[-1]]
        self._held: dict[int, Tensor] = {}
        self.active = False
        own = weakref.ref(self)
        for k, p in enumerate(self._parameters):
            if p.requires_grad:
                handle = p.register_post_accumulate_grad_hook(_keep(own, k))
                weakref.finalize(self, handle.remove)

    def keep(self, k: int, p: Tensor) -> None:
        """A gradient was accumulated."""
        if self.active and p.grad is not None and not p.grad.is_sparse:
            self._held[k] = p.grad.detach().float().clone()

    def ratio(self) -> Tensor | None:
        """What gradients were multiplied by since; None if it is not known."""
        pairs = [(self._parameters[k].grad, g) for k, g in self._held.items()]
        found: Sequence[tuple[Tensor, Tensor]] = [(a.float(), b) for a, b in pairs if a is not None]
        self._held = {}
        if not found:
            return None
        now = torch.stack([(a * b).sum() for a, b in found]).sum()
        then = torch.stack([b.square().sum() for _, b in found]).sum()
        ratio = now / then
        return torch.where(ratio.isfinite() & (ratio > 0), ratio, torch.ones_like(ratio))


def _keep(own: weakref.ref[Touched], k: int) -> Callable[[Tensor], None]:
    def hook(p: Tensor) -> None:
        touched = own()
        if touched is not None:
            touched.keep(k, p)

    return hook
