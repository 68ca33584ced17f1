"""Passes over the data that feed the forms of output directions to statistics."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from .data import Batch, Batches
from .errors import DataError, NonFiniteError, TooLargeError
from .jacobian.capture import Capture, Recorded
from .jacobian.forms import Form, Outer
from .jacobian.parts import Part
from .jacobian.record import recording, refuse_training_mode
from .quantities import Quantity
from .selectors import Selector, space_of
from .space import ParamSpace
from .statistics import Make, Sample, Statistic, all_finite

__all__ = ["DataSweep", "Totals", "make_sweep"]

Chunk = tuple[list[Form | None], bool, bool]
KEPT_BYTES = 2**26  # the forms of a whole pass are kept for a second one up to this size


class DataSweep:
    """A model, its data and a quantity, as passes on demand (see `statistics.Sweep`).

    Args:
        model: the network.
        space: the selected parameters.
        batches: the data.
        quantity: which directions.
        seed: of label draws, and of the order of a shuffling loader in every pass.
        max_directions: the most directions of a batch in an exact computation.
        center: whether the mean row is subtracted from every row.
        replayed: whether every pass repeats its random draws, so that a model in training mode is
            one fixed function of a batch; only matrix-free operators may differentiate it.
    """

    def __init__(
        self,
        model: nn.Module,
        space: ParamSpace,
        batches: Batches,
        quantity: Quantity,
        *,
        seed: int | None = None,
        max_directions: int = 1000,
        center: bool = False,
        replayed: bool = False,
    ) -> None:
        _require_finite_parameters(model, space)
        if not replayed:
            refuse_training_mode(model)
        self.space = space
        self.center = center
        self.model = model
        self.batches = batches
        self.quantity = quantity
        self._given_seed = seed
        self._max_directions = max_directions
        mc = quantity.estimator == "mc"
        self._seed = int(torch.randint(2**62, ())) if seed is None and mc else seed
        self._orders = [own.get_state() for own in batches.generators]
        self._capture = Capture(model, space, batches.forward)
        self.dtype = torch.promote_types(space.dtype, torch.float32)
        self._kept: list[Chunk] | None = None
        self.num_examples = 0
        self.num_terms = 0
        self.denominator = 0.0
        self.log_likelihood: float | None = None

    @property
    def parts(self) -> Sequence[Part]:
        return self._capture.parts

    @property
    def described(self) -> Mapping[str, str | int | None]:
        known = self.quantity.described()
        if self.quantity.estimator == "mc":
            known["seed"] = self._given_seed
        return {**known, "center": 1} if self.center else known

    def __call__(self, make: Make, keep: bool = False) -> Sequence[Statistic]:
        if self._kept is not None:
            return self._replay(make, self._kept)
        statistics: Sequence[Statistic] | None = None
        kept: list[Chunk] | None = [] if keep else None
        totals = Totals(self.quantity, self.space.device)
        with (
            self.seeded() as generator,
            recording(self.model, self.space.parameters(self.model)),
        ):
            for batch in self.batches:
                for recorded, target in self._record(batch):
                    totals.add(recorded.outputs, target)
                    if statistics is None:
                        statistics = make(self._capture.parts)
                    for chunk in self._chunks(recorded, target, generator):
                        _update(statistics, chunk)
                        kept = _keep(kept, chunk)
        self.num_examples, self.num_terms, self.denominator = totals.finish()
        self.log_likelihood = totals.log_likelihood
        self._kept = kept
        return statistics or ()

    def sampled(self) -> tuple[Sample, int | None]:
        """The forms of one direction of the first batch, and how many batches there are."""
        with (
            self.seeded() as generator,
            recording(self.model, self.space.parameters(self.model)),
            closing(iter(self.batches)) as batches,
        ):
            first, count = next(batches), self.batches.count
            for recorded, target in self._record(first):
                outputs = recorded.outputs
                directions = self.quantity.directions(outputs, target, generator)
                ((forms, _, _),) = recorded.chunks(islice(directions, 1), 1)
                labelled = outputs if first.target is None else first.target
                examples = self.batches.num_examples(labelled.shape[0])
                return Sample(forms, self.quantity.count(outputs, target), examples), count
        raise DataError("expected at least one example in the first batch")

    @contextmanager
    def seeded(self) -> Iterator[torch.Generator | None]:
        """The same label draws, and the same order of a shuffling loader, in every pass."""
        if self._seed is None:
            yield None
            return
        for own, state in zip(self.batches.generators, self._orders, strict=True):
            own.set_state(state)
        # What draws on the default generator is the order of a shuffling loader; on the CPU alone.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self._seed)
            yield torch.Generator(device=self.space.device).manual_seed(self._seed)

    def _record(self, batch: Batch) -> Iterator[tuple[Recorded, Tensor | None]]:
        for recorded, target in self._capture(batch.raw, batch.target):
            self.quantity.fit(recorded.outputs, target)
            yield recorded, target

    def _replay(self, make: Make, kept: list[Chunk]) -> Sequence[Statistic]:
        statistics = make(self.parts)
        for chunk in kept:
            _update(statistics, chunk)
        self._kept = None
        return statistics

    def _chunks(
        self, recorded: Recorded, target: Tensor | None, generator: torch.Generator | None
    ) -> Iterator[Chunk]:
        outputs, quantity = recorded.outputs, self.quantity
        count = quantity.count(outputs, target)
        if quantity.estimator == "exact" and count > self._max_directions:
            known = self.batches.count
            batches = "each batch" if known is None else f"each of {known} batches"
            raise TooLargeError(
                f"an exact matrix of outputs {tuple(outputs.shape)} takes {count} backward passes "
                f"for {batches}, one for each output direction of an example, more than "
                f"max_directions={self._max_directions}: {quantity.fewer}, or raise "
                "max_directions (ng.plan says what it costs)"
            )
        return recorded.chunks(quantity.directions(outputs, target, generator), count)


def make_sweep(
    quantity: Quantity,
    model: nn.Module,
    loader: Any,
    *,
    params: Selector | None = None,
    forward: Callable[[nn.Module, Any], Tensor] | None = None,
    target: Callable[[Any], Tensor] | None = None,
    progress: bool = False,
    **options: Any,
) -> DataSweep:
    """A sweep from what the builders take; see `FIM`."""
    space = space_of(model, params)
    batches = Batches(
        loader, device=space.device, forward=forward, target=target, progress=progress
    )
    return DataSweep(model, space, batches, quantity, **options)


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
        for message, wrong in self.quantity.flags(outputs, target).items():
            before = self._flags.get(message)
            self._flags[message] = wrong if before is None else before | wrong
        self._examples += outputs.shape[0]
        self._terms += self.quantity.num_terms(outputs, target)
        self._denominator += self.quantity.denominator(outputs, target)
        if self._log_likelihood is not None:
            added = self.quantity.log_likelihood(outputs, target)
            self._log_likelihood = None if added is None else self._log_likelihood + added

    @property
    def log_likelihood(self) -> float | None:
        """Of all observed labels; None where there are none, or some do not fit."""
        value = math.nan if self._log_likelihood is None else float(self._log_likelihood)
        return value if math.isfinite(value) else None

    def finish(self) -> tuple[int, int, float]:
        """Examples, terms, denominator.

        Raises:
            NonFiniteError, DataError: something was wrong on some batch.
        """
        if self._flags:
            wrong = torch.stack([flag.reshape(()) for flag in self._flags.values()]).tolist()
            messages = [message for message, bad in zip(self._flags, wrong, strict=True) if bad]
            if messages:
                finite = any("finite" in message for message in messages)
                raise (NonFiniteError if finite else DataError)("; ".join(messages))
        total = self.quantity.total(float(self._denominator))
        return self._examples, int(self._terms), total


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
