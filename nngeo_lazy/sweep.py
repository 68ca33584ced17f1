"""A model, its data and a quantity; and the passes over them, which update statistics."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from .arguments import checked
from .data import Batch, Batches
from .errors import DataError, NonFiniteError, TooLargeError
from .facts import Facts, Sample
from .jacobian.capture import Capture, Recorded
from .jacobian.forms import Form, Outer
from .jacobian.parts import Part
from .jacobian.positions import marks_of
from .jacobian.record import recording, refuse_training_mode
from .quantities import Quantity
from .selectors import Selector, space_of
from .skeleton import refuse_strays, skeleton
from .space import ParamSpace
from .statistics import Statistic, all_finite

__all__ = ["Make", "Problem", "Sweep", "Totals", "make_sweep"]

Chunk = tuple[list[Form | None], bool, bool]
KEPT_BYTES = 2**26  # the forms of a whole pass are kept for a second one up to this size


Make = Callable[[Facts], Sequence[Statistic]]  # of the parts that the first batch shows


@dataclass(frozen=True)
class Problem:
    """A model, its data and a quantity: all that a matrix is made from.

    Attributes:
        model: the network.
        space: the selected parameters.
        batches: the data.
        quantity: which output directions.
        seed: of the label draws, as it was given.
        drawn_seed: the seed that is used; None if nothing is drawn.
        max_directions: the most directions of a batch in an exact computation.
        center: whether the mean row is subtracted from every row.
    """

    model: nn.Module
    space: ParamSpace
    batches: Batches
    quantity: Quantity
    seed: int | None
    drawn_seed: int | None
    max_directions: int
    center: bool

    @classmethod
    @checked
    def of(
        cls,
        model: nn.Module,
        space: ParamSpace,
        batches: Batches,
        quantity: Quantity,
        *,
        seed: int | None = None,
        max_directions: int = 1000,
        center: bool = False,
        replayed: bool = False,
    ) -> Problem:
        """The problem, from the model as it is now.

        Args:
            model: the network.
            space: the selected parameters.
            batches: the data.
            quantity: which output directions.
            seed: of label draws, and of the order of a shuffling loader in every pass.
            max_directions: the most directions of a batch in an exact computation.
            center: whether the mean row is subtracted from every row.
            replayed: whether every pass repeats its random draws, so that a model in training mode
                is one fixed function of a batch; only matrix-free operators may differentiate it.

        Raises:
            NonFiniteError: NaN or infinity in the parameters.
            StochasticModelError: the model is in training mode and random.
        """
        _require_finite_parameters(model, space)
        if not replayed:
            refuse_training_mode(model)
        draws = seed is None and quantity.estimator == "mc"
        drawn = int(torch.randint(2**62, ())) if draws else seed
        if drawn is not None:
            batches.drawn_from(drawn)
        return cls(
            model,
            space,
            batches,
            quantity,
            seed,
            drawn,
            max_directions,
            center,
        )

    @property
    def described(self) -> Mapping[str, str | int | None]:
        """Which matrix it is, in plain words; the quantity knows more once it saw a batch."""
        known = self.quantity.described()
        if self.quantity.estimator == "mc":
            known["seed"] = self.seed
        return {**known, "center": 1} if self.center else known

    def generator(self) -> torch.Generator | None:
        """Of label draws, which are the same in every pass; None if nothing is drawn."""
        if self.drawn_seed is None:
            return None
        return torch.Generator(device=self.space.device).manual_seed(self.drawn_seed)


class Sweep:
    """Passes over the data of a problem, which feed the forms of output directions to statistics.

    Args:
        problem: the model and its data.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._model = skeleton(problem.model)
        self._capture = Capture(self._model, problem.space, problem.batches.forward)
        self._looked = False  # at what the outputs depend on
        self._parts: Sequence[Part] = ()
        self._kept: tuple[Facts, list[Chunk]] | None = None

    @property
    def facts(self) -> Facts:
        """What is known without a pass, and the parts once a batch was seen."""
        space = self.problem.space
        wide = torch.promote_types(space.dtype, torch.float32)
        return Facts(space, self._parts, wide, self.problem.described, self.problem.center)

    def at(self, model: nn.Module) -> Sweep:
        """The sweep of another model of the same kind."""
        return Sweep(replace(self.problem, model=model))

    def run(self, make: Make, keep: bool = False) -> tuple[Facts, Sequence[Statistic]]:
        """Make statistics on the first batch and update them over all batches.

        Args:
            make: the statistics, of the facts that the first batch shows.
            keep: whether the forms are kept for the next pass, if they fit into memory.

        Returns:
            What is known after the pass, and the statistics.

        Raises:
            NonFiniteError, DataError: something was wrong on some batch.
            TooLargeError: more directions than `max_directions`.
        """
        if self._kept is not None:
            return self._replay(make, *self._kept)
        problem = self.problem
        statistics: Sequence[Statistic] | None = None
        kept: list[Chunk] | None = [] if keep else None
        totals = Totals(problem.quantity, problem.space.device)
        generator = problem.generator()
        with recording(self._model, problem.space.parameters(self._model)):
            for batch in problem.batches:
                for recorded, target in self._record(batch):
                    totals.add(recorded.outputs, target)
                    if statistics is None:
                        statistics = make(self.facts)
                    for chunk in self._chunks(recorded, target, generator):
                        _update(statistics, chunk)
                        kept = _keep(kept, chunk)
        facts = replace(self.facts, **totals.finish())
        self._kept = None if kept is None else (facts, kept)
        return facts, statistics or ()

    def sampled(self) -> tuple[Sample, int | None]:
        """The forms of one direction of the first batch, and how many batches there are.

        Raises:
            DataError: the first batch has no example.
        """
        problem = self.problem
        generator = problem.generator()
        with (
            recording(self._model, problem.space.parameters(self._model)),
            closing(iter(problem.batches)) as batches,
        ):
            first, count = next(batches), problem.batches.count
            for recorded, target in self._record(first):
                outputs = recorded.outputs
                directions = problem.quantity.directions(outputs, target, generator)
                ((forms, _, _),) = recorded.chunks(islice(directions, 1), 1)
                labelled = outputs if first.target is None else first.target
                examples = problem.batches.num_examples(labelled.shape[0])
                return Sample(forms, problem.quantity.count(outputs, target), examples), count
        raise DataError("expected at least one example in the first batch")

    def _record(self, batch: Batch) -> Iterator[tuple[Recorded, Tensor | None]]:
        for recorded, target in self._capture(batch.raw, batch.target):
            if not self._looked:
                own = self.problem.space.parameters(self.problem.model)
                refuse_strays(recorded.record.outputs, own)
                self._looked = True
            self.problem.quantity.fit(recorded.outputs, target)
            self._parts = self._capture.parts
            scored = self.problem.quantity.scored(recorded.outputs, target)
            exist = self.problem.batches.positions(recorded.record.raw)
            yield replace(recorded, marks=marks_of(scored, exist)), target

    def _replay(
        self, make: Make, facts: Facts, kept: list[Chunk]
    ) -> tuple[Facts, Sequence[Statistic]]:
        statistics = make(facts)
        for chunk in kept:
            _update(statistics, chunk)
        self._kept = None
        return facts, statistics

    def _chunks(
        self, recorded: Recorded, target: Tensor | None, generator: torch.Generator | None
    ) -> Iterator[Chunk]:
        outputs, quantity = recorded.outputs, self.problem.quantity
        most = self.problem.max_directions
        count = quantity.count(outputs, target)
        if quantity.estimator == "exact" and count > most:
            known = self.problem.batches.count
            batches = "each batch" if known is None else f"each of {known} batches"
            raise TooLargeError(
                f"an exact matrix of outputs {tuple(outputs.shape)} takes {count} backward passes "
                f"for {batches}, one for each output direction of an example, more than "
                f"max_directions={most}: {quantity.fewer}, or raise "
                "max_directions (ng.plan says what it costs)"
            )
        return recorded.chunks(quantity.directions(outputs, target, generator), count)


@checked
def make_sweep(
    quantity: Quantity,
    model: nn.Module,
    loader: Any,
    *,
    params: Selector | None = None,
    forward: Callable[[nn.Module, Any], Tensor] | None = None,
    target: Callable[[Any], Tensor] | None = None,
    positions: Callable[[Any], Tensor | None] | None = None,
    progress: bool = False,
    **options: Any,
) -> Sweep:
    """A sweep from what the builders take; see `FIM`."""
    space = space_of(model, params)
    batches = Batches(
        loader,
        device=space.device,
        forward=forward,
        target=target,
        positions=positions,
        progress=progress,
    )
    return Sweep(Problem.of(model, space, batches, quantity, **options))


class Totals:
    """Counts and complaints of a pass, kept on the device and read once at its end."""

    def __init__(self, quantity: Quantity, device: torch.device) -> None:
        self.quantity = quantity
        self._examples = 0
        self._terms = torch.zeros((), dtype=torch.int64, device=device)
        self._denominator = torch.zeros((), dtype=torch.float64, device=device)
        self._flags: dict[str, Tensor] = {}
        self._log_likelihood: Tensor | None = torch.zeros_like(self._denominator)

    def add(self, outputs: Tensor, target: Tensor | None) -> None:
        """Count a batch."""
        for message, wrong in self.quantity.flags(outputs, target).items():
            before = self._flags.get(message)
            self._flags[message] = wrong if before is None else before | wrong
        self._examples += outputs.shape[0]
        self._terms += self.quantity.num_terms(outputs, target)
        self._denominator += self.quantity.denominator(outputs, target)
        if self._log_likelihood is not None:
            added = self.quantity.log_likelihood(outputs, target)
            self._log_likelihood = None if added is None else self._log_likelihood + added

    def finish(self) -> dict[str, Any]:
        """The fields of `Facts` that a pass finds.

        Raises:
            NonFiniteError, DataError: something was wrong on some batch.
        """
        if self._flags:
            wrong = torch.stack([flag.reshape(()) for flag in self._flags.values()]).tolist()
            messages = [message for message, bad in zip(self._flags, wrong, strict=True) if bad]
            if messages:
                finite = any("finite" in message for message in messages)
                raise (NonFiniteError if finite else DataError)("; ".join(messages))
        likelihood = math.nan if self._log_likelihood is None else float(self._log_likelihood)
        return {
            "num_examples": self._examples,
            "num_terms": int(self._terms),
            "denominator": self.quantity.total(float(self._denominator)),
            "log_likelihood": likelihood if math.isfinite(likelihood) else None,
        }


def _update(statistics: Sequence[Statistic], chunk: Chunk) -> None:
    forms, first, last = chunk
    for each in statistics:
        each.update([forms[k] for k in each.indices], first, last)


def _keep(kept: list[Chunk] | None, chunk: Chunk) -> list[Chunk] | None:
    """All chunks so far, or None once they are too large: the next pass then sees the data again.

    Rows are not kept: what they hold may be a whole batch with its graph.
    """
    if kept is None:
        return None
    forms = [form if isinstance(form, Outer) else None for form in chunk[0]]
    kept.append((list(forms), *chunk[1:]))
    size = sum(_held(form, first) for held, first, _ in kept for form in held)
    return kept if size <= KEPT_BYTES else None


def _held(form: Form | None, first: bool) -> int:
    """The bytes of a form; its inputs are those of the first chunk of a batch."""
    if not isinstance(form, Outer):
        return 0
    inputs = vars(form.inputs).values() if first and form.inputs is not None else ()
    return form.bytes + sum(x.nbytes for x in inputs if isinstance(x, Tensor))


def _require_finite_parameters(model: nn.Module, space: ParamSpace) -> None:
    parameters = space.parameters(model)
    finite = torch.stack([all_finite(p.detach()) for p in parameters.values()]).tolist()
    if bad := [name for name, ok in zip(parameters, finite, strict=True) if not ok]:
        raise NonFiniteError(
            f"expected finite parameters, but {bad} hold NaN or infinity: the training that led "
            "here diverged"
        )
