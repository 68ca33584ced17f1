"""What the passes of a refresh tell besides the curvature: the loss's scale, and changes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..collectives import ALONE, Group
from ..likelihoods import Categorical, Likelihood
from ..likelihoods.likelihood import wide
from .loss import Units
from .passed import Passed, examples_of
from .scores import Scores

__all__ = ["Reading", "Seen", "Touched", "changed", "read"]

SMALL = 4096  # numbers of a parameter whose gradient is compared
MANY = 6  # of such parameters


Reduced = Callable[[float], float]


class Seen(NamedTuple):
    """A pass of one head, its likelihood if it is known, and what shows of its target."""

    passed: Passed
    likelihood: Likelihood | None
    target: Tensor | None


@dataclass
class Reading:
    """The passes of one refresh.

    Attributes:
        processes: how many have such passes; the loop's loss is the mean of theirs.
        seen: each head's.
        terms: how many labels all have: for categorical ones those that are scored, else examples.
        square: of one example's own gradient at the outputs, on average.
        error: the mean square of a label's residual, at most 1; 0 if it is not known.
        joint: how many examples all have.
        total: what the curvature's sums over labels are divided by.
        same: whether all can be run again.
    """

    processes: int = 1
    seen: list[Seen] = field(default_factory=list)
    terms: Tensor | None = None
    square: Tensor | None = None
    error: Tensor | None = None
    joint: int = 0
    total: float = 1.0
    same: bool = False

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

    def sums(self, parts: Sequence[tuple[int, float]], heads: int, like: Tensor) -> Tensor:
        """What adds up over passes and processes, (heads + 1, 6), see `close`.

        Args:
            parts: of what each pass's loss is a mean over, with the number of its head.
            heads: how many there are.
            like: a tensor of the dtype and on the device of the numbers.
        """
        sums = like.new_zeros(heads + 1, 6)
        for head, part in parts:
            sums[head, 0] += part
        square, error = like.new_zeros(()), like.new_zeros(())
        for seen in self.seen:
            terms, gradient, scale, residual = self._read(seen)
            visible = terms * (scale.isfinite() & (scale > 0))
            own = torch.where(visible > 0, gradient / scale.square(), terms)
            error += torch.minimum(own, terms).to(sums)
            scaled = scale.nan_to_num() * visible
            spread = terms if residual is None else residual * terms
            numbers = [terms, visible, scaled, spread]
            sums[seen.passed.head, 1:5] += torch.stack(numbers).to(sums)
            square += gradient.to(sums)
        sums[-1, 0], sums[-1, 1] = float(self.examples), square * self.examples**2
        sums[-1, 2], sums[-1, 5] = float(not self.repeatable), error
        return sums

    def close(self, sums: Tensor, reductions: Sequence[Reduced], several: bool) -> Units:
        """What the step needs, once all losses have been differentiated.

        The loop's loss is taken as C times the sum over heads of each one's own mean. C is read off
        the heads whose gradients show it, and is 1 if there are none.

        Args:
            sums: of `sums` over all processes.
            reductions: of each head, from its part to what its loss is a mean over.
            several: whether the curvature is that of several heads, a mean over examples.
        """
        part, terms, visible, scaled, spread, _ = sums[:-1].unbind(1)
        self.joint = int(sums[-1, 0])
        self.same = bool(sums[-1, 2] == 0)
        self.terms = terms.sum().clamp_min(1.0)
        square = sums[-1, 1] / max(self.joint, 1)
        self.square = square.clamp_min(torch.finfo(square.dtype).tiny ** 0.5)
        totals = [
            reduced(float(own)) if float(n) else 1.0
            for reduced, own, n in zip(reductions, part, terms, strict=True)
        ]
        self.total = float(self.joint) if several else totals[0]
        self.error = sums[-1, 5] / self.terms if self.known else torch.zeros_like(square)
        if not self.known:
            return Units(self.square.sqrt(), 1 / self.square, None)
        own = terms.new_tensor(totals)
        tiny = torch.finfo(terms.dtype).tiny ** 0.5
        scales = scaled / visible.clamp_min(tiny) / self.processes  # of the mean over processes
        common = (scales * own * visible).sum() / visible.sum()
        common = torch.where(common > 0, common, torch.ones_like(common))  # NaN is not
        each = torch.where(visible > 0, scales, common / own)
        mean = (each * terms).sum() / self.terms
        dispersion, gaussian = None, [h for h in self.heads if self._spreads(h)]
        if gaussian:
            spread = spread.clone()
            local = (each * self.processes).square()
            spread[gaussian] = spread[gaussian] / local[gaussian]
            dispersion = spread.sum() / self.terms
        return Units(mean * self.terms, self.total / self.terms, dispersion)

    @property
    def heads(self) -> list[int]:
        """Those that were seen."""
        return sorted({each.passed.head for each in self.seen})

    def _spreads(self, head: int) -> bool:
        """Whether a head's labels have a dispersion."""
        known = next(each for each in self.seen if each.passed.head == head)
        like = known.passed.outputs
        return known.likelihood is not None and known.likelihood.dispersion(like, like) is not None

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


def read(
    passes: Sequence[Passed], scores: Scores, group: Group, like: Tensor
) -> tuple[Reading, Units]:
    """The passes of a step of which no curvature is kept.

    Args:
        passes: of this process.
        scores: of all heads.
        group: the processes.
        like: a tensor of the dtype and on the device of the numbers.
    """
    reading, parts = Reading(group.size), []
    for passed in passes:
        if passed.gradient is not None:
            head = scores.of(passed)
            target = head.target(passed.outputs, passed.gradient, exact=True)
            reading.seen.append(Seen(passed, head.known, target))
            parts.append((passed.head, float(head.denominator(passed.outputs, target))))
    sums = reading.sums(parts, len(scores.heads), like)
    group.sum_([sums])
    return reading, reading.close(sums, [head.total for head in scores.heads], scores.several)


@torch.no_grad()
def changed(reading: Reading, model: nn.Module, group: Group) -> Tensor:
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
            change = torch.where(same, 0.0, wide(after) - wide(before))
            if likelihood is not None and reading.known:
                labels = torch.zeros_like(before) if target is None else target
                a, b = (_score(likelihood, f, labels) for f in (before, after))
                total += ((b - a) * change).sum()
            elif passed.gradient is not None:
                own = wide(passed.gradient) * reading.examples * change
                own = own.reshape(len(own), -1).sum(1)
                along = own if along is None else along + own
        if along is not None:
            total += along.square().sum()
    group.sum_([total])
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

    def ratio(self, group: Group = ALONE) -> Tensor | None:
        """What gradients were multiplied by since; None if it is not known.

        Those of several processes are averaged in the backward pass, behind what is kept.
        """
        held, self._held = self._held, {}
        now: list[Tensor] = []
        then: list[Tensor] = []
        for k, p in enumerate(self._parameters):
            if p.grad is not None and not p.grad.is_sparse and (k in held or group.size > 1):
                now.append(wide(p.grad))
                then.append(held[k] / group.size if k in held else torch.zeros_like(now[-1]))
        if not now:
            return None
        group.sum_(then)
        along = torch.stack([(a * b).sum() for a, b in zip(now, then, strict=True)]).sum()
        ratio = along / torch.stack([b.square().sum() for b in then]).sum()
        return torch.where(ratio.isfinite() & (ratio > 0), ratio, torch.ones_like(ratio))


def _keep(own: weakref.ref[Touched], k: int) -> Callable[[Tensor], None]:
    def hook(p: Tensor) -> None:
        touched = own()
        if touched is not None:
            touched.keep(k, p)

    return hook
