"""The structured curvature of a training loop: statistics of its passes, averaged over steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from ..collectives import Group, seed_of
from ..errors import DataError, NonFiniteError
from ..facts import Facts
from ..jacobian.capture import Recorded
from ..jacobian.positions import marks_of
from ..operators import BaseLinearOperator
from ..representations import Streamed
from ..statistics import pool_statistics
from .loop import Loop
from .loss import Units
from .measure import Reading, Seen
from .options import Options, Schedule
from .passed import Passed, Run
from .running import Forms, Running
from .scores import Scores

__all__ = ["Curvature"]

GROWTH = 2.0  # of the squared gradient of a loss that is not known, over its average


class Curvature:
    """Takes the passes of a loop into a running average.

    Args:
        loop: whose passes.
        representation: what is averaged.
        options: likelihood, estimator, seed and the rest.
        group: the processes that train the model together.

    Attributes:
        scores: the output directions.
        rebase: whether the step's average is decomposed anew.
        reading: the passes of the last refresh.
    """

    def __init__(
        self, loop: Loop, representation: Streamed, options: Options, group: Group
    ) -> None:
        schedule: Schedule = options.schedule
        self.scores = Scores(options.likelihood, options.estimator)
        self.rebase = True
        self.reading = Reading(group.size)
        self._loop, self._group = loop, group
        factors = options.damping_method == "factored"
        self._running = Running(representation, schedule.factor_decay, factors)
        drawn = (
            int(torch.randint(2**62, (), device="cpu")) if options.seed is None else options.seed
        )
        self._seed = group.same(drawn)
        self._generator = torch.Generator(device=loop.space.device)
        self._begun: tuple[Facts, Forms] | None = None
        self._denominators: list[tuple[int, Tensor | int]] = []  # with the number of the head
        self._terms: list[Tensor | int | None] = []
        self._bad: str | None = None  # why the step is not taken into the average; "" was said
        self._inverse_unit: Tensor | None = None  # averaged as the curvature is
        loop.scorer = self

    @property
    def empirical(self) -> bool:
        """Whether the loop's own gradients at the layers are taken."""
        return self.scores.estimator == "empirical"

    @property
    def operator(self) -> BaseLinearOperator | None:
        """The average, undamped."""
        return self._running.operator

    @property
    def solved(self) -> BaseLinearOperator | None:
        """What is solved with: the average as it was last decomposed."""
        return self._running.solved

    def arrived(self, passed: Passed, recorded: Recorded, root: GradientEdge) -> None:
        """A pass of the loop was differentiated: add its statistics."""
        gradient, outputs = passed.gradient, passed.outputs
        if gradient is None or not bool(gradient.isfinite().all()):  # a refresh may wait for it
            self._bad = "the gradient of the loss at the outputs is not finite"
            return
        scores = self.scores.of(passed)
        target = scores.target(outputs, gradient)
        denominator = scores.denominator(outputs, target)
        terms = scores.num_terms(outputs, target)
        known = scores.known
        alone = len(self.scores.heads) == 1 or not self.empirical
        scored = None if known is None or not alone else known.scored(outputs, target)
        recorded = replace(recorded, marks=marks_of(scored, _existing(recorded.record.raw)))
        _, forms = self._begin(recorded)
        self.reading.seen.append(Seen(passed, known, target))
        self._denominators.append((passed.head, denominator))
        self._terms.append(terms)
        if self.empirical:
            passed.run.recorded = recorded  # the gradients at the layers are still to come
            return
        quantity = scores.quantity(outputs, target)
        directions = quantity.directions(outputs, target, self._generator)
        count = quantity.count(outputs, target)
        for chunk in recorded.chunks(directions, count, root=root):
            forms.update(*chunk)

    def refuse(self) -> bool:
        """A pass of the loop has no forms: nothing of the step is taken, if an average is known."""
        if self.solved is not None:
            self._bad = ""
        return self.solved is not None

    def arrived_again(self, passed: Passed, gradient: Tensor) -> None:
        """Another loss of the same outputs: it must not score what the first one masked."""
        if self.empirical or passed.gradient is None or self._begun is None:
            return
        scores = self.scores.of(passed)
        first = scores.num_terms(passed.outputs, self._target(passed, -gradient))
        both = scores.num_terms(passed.outputs, self._target(passed))
        if first is not None and both is not None and int(both) > int(first):
            raise DataError(
                "expected one loss for all outputs of a forward pass, but a second backward pass "
                "brought gradients to outputs that had none in the first: add the losses before "
                "backward(), or call the model once for each"
            )

    def _target(self, passed: Passed, more: Tensor | float = 0.0) -> Tensor | None:
        total = passed.gradient
        scores = self.scores.of(passed)
        return None if total is None else scores.target(passed.outputs, total + more)

    def finish(self, ratio: Tensor | None) -> Units:
        """Take the step's statistics into the average.

        Args:
            ratio: what the loop multiplied its gradients by behind the backward pass.

        Raises:
            NonFiniteError: a pass, or a statistic, was not finite; the average is what it was.
        """
        begun, parts, terms, bad = self._begun, self._denominators, self._terms, self._bad
        reading, group, space = self.reading, self._group, self._loop.space
        self.drop()
        described = self.scores.described()
        with group.together("a step that refreshes the curvature", *described.values()):
            if begun is None and bad is None:
                raise DataError(
                    "expected passes that no step has taken yet: after a step that raised, run the "
                    "model and loss.backward() again"
                )
        heads = self.scores.heads
        like = torch.zeros((), dtype=torch.promote_types(space.dtype, torch.float32), device="cpu")
        own = [(head, float(part)) for head, part in parts]
        sums = reading.sums(own, len(heads), like.to(space.device))
        sums[-1, 3] = float(bad is not None)
        for (head, _), count in zip(own, terms, strict=True):
            sums[head, 5] += float("nan") if count is None else float(count)
        first = float(own[0][1]) if own and bad is None else 0.0  # about one example's
        sums[-1, 4] = first / group.size
        group.sum_([sums])
        if float(sums[-1, 3]):
            raise NonFiniteError("another process could not" if bad is None else bad)
        if begun is None:
            raise RuntimeError("no passes")  # refused above; mypy does not see it
        self.reading = reading
        facts, forms = begun
        found = reading.close(sums, [head.total for head in heads], self.scores.several)
        total = denominator = reading.total
        scale, unit = found.scale, found.curvature
        if self.empirical:
            times = self._own(total, scale, ratio) / group.size
            first = float(sums[-1, 4]) or 1.0
            for run in {id(passed.run): passed.run for passed in self._loop.passes}.values():
                forms.update(_observed(run, first * times), True, True)
            denominator = first**2 / total
            if not reading.known and ratio is not None:
                unit = unit / ratio.square()
        pool_statistics(forms.statistics, group, space.device)
        counts = float(sums[:-1, 5].sum())
        counted = replace(
            facts,
            num_examples=reading.joint,
            num_terms=int(counts) if math.isfinite(counts) else None,
            denominator=denominator,
            group=group,
        )
        weight = self._running.finish(counted, forms.replay, self.rebase)
        before, fresh = self._inverse_unit, 1 / unit
        if not reading.known and before is not None and reading.square is not None:
            # A loss that leaves its domain has gradients that explode: they must not count as one.
            kept = (GROWTH * before / fresh).clamp_max(1.0)
            fresh, reading.square = kept * fresh, kept * reading.square
            found = found._replace(scale=kept.sqrt() * found.scale)
        self._inverse_unit = fresh if before is None else before.lerp(fresh, weight)
        return found._replace(curvature=1 / self._inverse_unit)

    def _own(self, total: float, scale: Tensor, ratio: Tensor | None) -> Tensor | float:
        """What the loop's gradients are multiplied by, to be those of a mean over examples."""
        labels = self.reading.terms
        if self.reading.known and labels is not None:
            return labels / (scale * total)
        return 1.0 if ratio is None else ratio

    def drop(self) -> None:
        """Forget what the present step has brought so far."""
        self._begun, self._denominators, self._terms, self._bad = None, [], [], None
        self.reading = Reading(self._group.size)

    def _begin(self, recorded: Recorded) -> tuple[Facts, Forms]:
        if self._begun is None:
            loop = self._loop
            described = dict(self.scores.described())
            facts = Facts(loop.space, loop.parts, recorded.dtype, described)
            statistics = self._running.begin(facts, self.rebase)
            key = (self._running.count, self._group.rank)  # as of a builder's batches
            self._generator.manual_seed(seed_of(self._seed, *key) if any(key) else self._seed)
            self._begun = facts, Forms(statistics, self._running.keeps_forms(self.rebase))
        return self._begun

    def state(self) -> dict[str, Any]:
        """Tensors and plain data."""
        unit = self._inverse_unit
        return {
            **self._running.state(),
            "seed": self._seed,
            "unit": None if unit is None else unit.clone(),
            "estimator": self.scores.estimator,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over a state."""
        self._running.restore(state, self._loop.space)
        self._seed = int(state["seed"])
        unit = state["unit"]
        self._inverse_unit = None if unit is None else unit.to(self._loop.space.device).clone()
        self.scores.estimator = state["estimator"]


def _observed(run: Run, scale: Tensor | float) -> list[Any]:
    """The forms of the loop's own gradients, times a number."""
    recorded = run.recorded
    if recorded is None:
        raise RuntimeError("a pass without layers")
    found = [run.at_layers.get(k) for k in range(len(recorded.edges))]
    scaled = [None if g is None else g.to(recorded.dtype) * scale for g in found]
    run.recorded, run.at_layers = None, {}
    return recorded.forms([scaled], [])


def _existing(raw: Any) -> Tensor | None:
    """Which positions exist, as an attention mask (N, T) among the model's keywords says."""
    _, named = raw
    mask = named.get("attention_mask")
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
