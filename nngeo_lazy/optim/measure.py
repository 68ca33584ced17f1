"""What the passes of a refresh tell besides the curvature: the loss's scale, and changes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..likelihoods import Categorical, Likelihood
from ..likelihoods.likelihood import wide
from .passed import Passed, examples_of

__all__ = ["Reading", "Touched", "changed"]

SMALL = 4096  # numbers of a parameter whose gradient is compared
MANY = 6  # of such parameters


class Units(NamedTuple):
    """What a refresh tells of the loop's loss.

    Attributes:
        scale: c, with the loop's loss c times the mean loss of a label.
        curvature: F times this is the curvature of that mean.
        dispersion: of a Gaussian's labels; None for other likelihoods.
    """

    scale: Tensor
    curvature: Tensor
    dispersion: Tensor | None


@dataclass
class Loss:
    """The latest of what is known of a loop's loss.

    Attributes:
        scale: what gradients are divided by.
        unit: what the curvature is multiplied by.
        dispersion: of a Gaussian's labels.
    """

    scale: Tensor | None = None
    unit: Tensor | float = 1.0
    dispersion: Tensor | None = None

    def take(self, found: Units, ratio: Tensor | None) -> None:
        """Take over what a refresh found.

        Gradients that were multiplied since (unscaled, clipped) are those of a loss that was. So
        that a clip shrinks a step, the largest multiple of late is what counts.

        Args:
            found: by the refresh.
            ratio: what gradients were multiplied by.
        """
        scale = found.scale
        if ratio is not None:
            multiplied = scale * ratio
            before = multiplied if self.scale is None else self.scale
            most = torch.maximum(multiplied, before.lerp(multiplied, 0.02))
            scale = torch.where((ratio - 1).abs() < 1e-3, scale, most)
        self.scale, self.unit, self.dispersion = scale, found.curvature, found.dispersion

    def state(self) -> dict[str, Any]:
        """All of it."""
        return {k: v.clone() if isinstance(v, Tensor) else v for k, v in vars(self).items()}


class Seen(NamedTuple):
    """A pass of one head, its likelihood if it is known, and what shows of its target."""

    passed: Passed
    likelihood: Likelihood | None
    target: Tensor | None


@dataclass
class Reading:
    """The passes of one refresh.

    Attributes:
        seen: each head's.
        terms: how many labels there are: for categorical ones those that are scored, else examples.
        square: of one example's own gradient at the outputs, on average.
    """

    seen: list[Seen] = field(default_factory=list)
    terms: Tensor | None = None
    square: Tensor | None = None

    @property
    def known(self) -> bool:
        """Whether all likelihoods are."""
        return all(each.likelihood is not None for each in self.seen)

    @property
    def examples(self) -> int:
        """Of all passes."""
        return examples_of([each.passed for each in self.seen])

    @property
    def runs(self) -> list[list[Seen]]:
        """The heads of each forward pass."""
        found: dict[int, list[Seen]] = {}
        for each in self.seen:
            found.setdefault(id(each.passed.run), []).append(each)
        return list(found.values())

    @property
    def repeatable(self) -> bool:
        """Whether the passes can be run again."""
        replays = [each.passed.run.replay for each in self.seen]
        return bool(replays) and all(each is not None and each.fresh for each in replays)

    def close(self, total: float, totals: Mapping[int, float]) -> Units:
        """What the step needs, once all losses have been differentiated.

        The loop's loss is taken as C times the sum over heads of each one's own mean. C is read off
        the heads whose gradients show it, and is 1 if there are none.

        Args:
            total: what the curvature's sums over labels are divided by.
            totals: what each head's loss is a mean over.
        """
        found = [self._read(each) for each in self.seen]
        terms = torch.stack([each.terms for each in found])
        self.terms = terms.sum().clamp_min(1.0)
        square = torch.stack([each.square for each in found]).sum() * self.examples
        self.square = square.clamp_min(torch.finfo(square.dtype).tiny ** 0.5)
        if not self.known:
            return Units(self.square.sqrt(), 1 / self.square, None)
        of_heads = terms.new_tensor([totals[each.passed.head] for each in self.seen])
        scales = torch.stack([each.scale for each in found])
        weights = terms * (scales.isfinite() & (scales > 0))
        common = (scales.nan_to_num() * of_heads * weights).sum() / weights.sum()
        common = torch.where(common > 0, common, torch.ones_like(common))  # NaN is not
        each = common / of_heads
        if len(totals) == 1:
            mean = each[0]
        else:  # a head whose gradient shows its own share of the loss has that
            each = torch.where(weights > 0, scales.nan_to_num(), each)
            mean = (each * terms).sum() / self.terms
        dispersions = [
            torch.ones_like(mean) if one.residual is None else one.residual / scale.square()
            for one, scale in zip(found, each, strict=True)
        ]
        dispersion = None
        if any(one.residual is not None for one in found):
            dispersion = (torch.stack(dispersions) * terms).sum() / self.terms
        return Units(mean * self.terms, total / self.terms, dispersion)

    def _read(self, seen: Seen) -> _Read:
        passed, likelihood, target = seen
        outputs, gradient = passed.outputs, passed.gradient
        if gradient is None:
            raise RuntimeError("a pass without a gradient")
        terms = wide(outputs).new_tensor(float(outputs.shape[0]))
        if isinstance(likelihood, Categorical):
            terms = likelihood.num_terms(outputs, target).to(terms)
        square, scale = wide(gradient).square().sum(), torch.full_like(terms, float("nan"))
        if likelihood is None:
            return _Read(terms, square, scale, None)
        found = likelihood.scale_of(outputs, gradient)
        residual = likelihood.dispersion(outputs, gradient)
        return _Read(
            terms,
            square,
            scale if found is None else found.to(terms),
            None if residual is None else residual.to(terms),
        )


class _Read(NamedTuple):
    """Of one pass: labels, the squared gradient, the loss's scale and the squared residuals."""

    terms: Tensor
    square: Tensor
    scale: Tensor
    residual: Tensor | None


@torch.no_grad()
def changed(reading: Reading, model: nn.Module) -> Tensor:
    """2 KL, per label, of the predictions of a refresh and those of the model as it is now.

    To second order in the change; exactly the sum of both directions' KL for likelihoods whose
    outputs are natural parameters. If a likelihood is not known, the squared change of the
    outputs along the loss's gradients, in units of their mean square.

    Returns:
        0-d.
    """
    if reading.terms is None or reading.square is None:
        raise RuntimeError("passes that were not read")
    total = torch.zeros_like(reading.terms)
    for heads in reading.runs:
        replay, along = heads[0].passed.run.replay, None
        if replay is None:
            raise RuntimeError("a pass that cannot be run again")
        buffers = [(b, b.detach().clone()) for b in model.buffers()]
        try:
            found = replay(model)
        finally:
            for buffer, kept in buffers:
                buffer.copy_(kept)
        for passed, likelihood, target in heads:
            before, after = passed.outputs, found[passed.head].detach()
            same = before == after  # also if both are infinite
            change = torch.where(same, 0.0, wide(after) - wide(before)).flatten(1)
            if likelihood is not None and reading.known:
                labels = torch.zeros_like(before) if target is None else target
                a, b = (_score(likelihood, f, labels) for f in (before, after))
                total += ((b - a).flatten(1) * change).sum()
            elif passed.gradient is not None:
                own = wide(passed.gradient).flatten(1) * reading.examples
                own = (own * change).sum(1)
                along = own if along is None else along + own
        if along is not None:
            total += along.square().sum()
    total = total / reading.terms
    return total if reading.known else total / reading.square


def _score(likelihood: Likelihood, outputs: Tensor, labels: Tensor) -> Tensor:
    (score,) = likelihood.directions(wide(outputs), labels, "empirical")
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
            self._held[k] = wide(p.grad.detach()).clone()

    def ratio(self) -> Tensor | None:
        """What gradients were multiplied by since; None if it is not known."""
        pairs = [(self._parameters[k].grad, g) for k, g in self._held.items()]
        found: Sequence[tuple[Tensor, Tensor]] = [(wide(a), b) for a, b in pairs if a is not None]
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
