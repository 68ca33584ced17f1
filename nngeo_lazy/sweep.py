"""A model, its data and a quantity; and the passes over them, which update statistics."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from . import tree
from .arguments import PositiveInt, checked
from .collectives import ALONE, Group, digest, seed_of, unwrapped
from .data import Batch, Batches
from .distributed import Distributed
from .errors import DataError, NonFiniteError, TooLargeError
from .facts import Facts, Sample
from .jacobian.capture import Capture, PartsChangedError, Recorded
from .jacobian.parts import Part
from .jacobian.positions import marks_of
from .jacobian.scopes import recording, refuse_training_mode
from .jacobian.streaming import stream
from .kept import Feed, Kept
from .pieces import gathered
from .precision import all_finite
from .quantities import Quantity
from .rowwise import Piece
from .selectors import Selector, space_of
from .skeleton import refuse_strays, skeleton
from .space import ParamSpace
from .statistics import Statistic, pool_statistics
from .totals import Counts, Totals

__all__ = ["Make", "Problem", "Sweep", "make_sweep"]


Read = tuple[Sequence[Statistic] | None, Totals]
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
        max_directions: PositiveInt = 1000,
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
        with batches.group.together("a build"):
            _require_finite_parameters(model, space)
            if not replayed:
                refuse_training_mode(model)
        draws = seed is None and quantity.estimator == "mc"
        drawn = batches.group.same(int(torch.randint(2**62, (), device="cpu"))) if draws else seed
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
    def group(self) -> Group:
        """The processes that share the data."""
        return self.batches.group

    @property
    def described(self) -> Mapping[str, str | int | None]:
        """Which matrix it is, in plain words; the quantity knows more once it saw a batch."""
        known = self.quantity.described()
        if self.quantity.estimator == "mc":
            known["seed"] = self.seed
        return {**known, "center": 1} if self.center else known

    def draws(self, batch: Batch) -> torch.Generator | None:
        """The generator of a batch's label draws: the same in every pass, whoever reads it."""
        if self.drawn_seed is None:
            return None
        first = batch.key == (0,)
        seed = self.drawn_seed if first else seed_of(self.drawn_seed, *batch.key)
        return torch.Generator(device=self.space.device).manual_seed(seed)

    def require_agreement(self, representation: str) -> None:
        """Raise DataError if the processes of the group build different matrices."""
        if self.group.size == 1:
            return
        parameters = self.space.parameters(self.model)
        known = {
            "parameters": [f"{name} {tuple(p.shape)}" for name, p in parameters.items()],
            "dtype": str(self.space.dtype),
            "representation": representation,
            "matrix": type(self.quantity).__name__,
            "estimator": self.quantity.estimator,
            "seed": self.seed,
            **self.batches.described,
            "values of parameters (checksums)": [digest(p) for p in parameters.values()],
        }
        self.group.agree(known, "the matrix")


class Sweep:
    """Passes over the data of a problem, which feed the forms of output directions to statistics.

    Args:
        problem: the model and its data.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._model = skeleton(problem.model)
        held = problem.quantity.held
        self._capture = Capture(self._model, problem.space, problem.batches.forward, held=held)
        self._looked = False  # at what the outputs depend on
        self._finished = False  # a pass
        self._parts: Sequence[Part] = ()
        self._described: Mapping[str, str | int | None] | None = None  # by another process
        self._kept: tuple[Totals, Kept] | None = None

    @property
    def facts(self) -> Facts:
        """What is known without a pass, and the parts once a batch was seen."""
        space = self.problem.space
        wide = torch.promote_types(space.dtype, torch.float32)
        described = self.problem.described if self._described is None else self._described
        group = self.problem.group
        return Facts(space, self._parts, wide, described, self.problem.center, group=group)

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
        with self.problem.group.together("a pass over the data"):
            if self._kept is not None:
                read = self._replay(make, *self._kept)
            else:
                while (found := self._pass(make, keep)) is None:
                    pass
                read = found
            statistics, totals = read
            totals.require_sound()
        facts = self.finish(totals)
        if statistics is None:  # this process had no batch
            statistics = make(facts)
        pool_statistics(statistics, facts.group, facts.space.device)
        return facts, statistics

    def finish(self, totals: Totals) -> Facts:
        """What is known after a pass, of the data of all processes.

        Raises:
            DataError: no process has any example, or layers are used in different ways.
        """
        group, counts = self.problem.group, totals.counts()
        if group.size == 1:
            return replace(self.facts, **totals.finish(counts))
        shares = group.gather((self._parts, dict(self.facts.described), counts))
        seen = [rank for rank, share in enumerate(shares) if share[2].examples]
        if not seen:
            raise DataError(
                f"expected at least one batch, but the loaders of all {group.size} processes are "
                "empty: check the length of the data set, and drop_last"
            )
        first = shares[seen[0]]
        for rank in seen:
            for k, what in enumerate(("layers", "quantity")):
                if shares[rank][k] != first[k]:
                    raise DataError(
                        f"expected all processes to have the same {what}, but rank {rank} of "
                        f"{group.size} has {shares[rank][k]}, and rank {seen[0]} {first[k]}"
                    )
        self._parts, self._described = first[0], first[1]
        joint = Counts(*map(sum, zip(*(share[2] for share in shares), strict=True)))
        with group.together("the totals of a pass"):
            known = totals.finish(joint) if counts.examples else {}
        if len(seen) < group.size:  # a process without examples does not know the loss
            known = group.gather(known)[seen[0]]
        return replace(self.facts, **known)

    def _pass(self, make: Make, keep: bool) -> Read | None:
        """One pass over the data; None if its batches used parameters in unforeseen ways.

        The first batch says which statistics there are. If a later one asks for others, the rest of
        the pass only looks at how the parameters are used.
        """
        problem = self.problem
        statistics: Sequence[Statistic] | None = None
        kept = Kept(keep)
        totals = Totals(problem.quantity, problem.space.device)
        stale = False
        with recording(self._model, problem.space.parameters(self._model)):
            for batch in problem.batches:
                generator = problem.draws(batch)
                for recorded, target in self._record(batch):
                    if statistics is None:
                        statistics, parts = make(self.facts), self._parts
                        feed = Feed(statistics, kept)
                    stale = stale or self._parts != parts
                    if stale:
                        continue
                    totals.add(recorded.outputs, target)
                    outputs, count = recorded.outputs, self._count(recorded.outputs, target)
                    directions = problem.quantity.directions(outputs, target, generator)
                    try:
                        stream(recorded, directions, count, feed)
                    except PartsChangedError:
                        self._parts, stale = self._capture.parts, True
        if stale:
            if self._finished:
                raise DataError(
                    "expected the same batches on every pass, but some use parameters in ways that "
                    "those of the pass before did not: pass seed=..., or a loader that gives the "
                    "same batches in every pass"
                )
            return None
        self._finished = True
        self._kept = None if kept.forms is None else (totals, kept)
        return statistics, totals

    def pieces(self, start: int = 0) -> Generator[Piece, None, None]:
        """One pass over the data for those who use rows as they pass by: exhaust or close it.

        Args:
            start: batches before this one are read, but not passed through the network.

        Raises:
            NonFiniteError, DataError: something was wrong on a batch, after its last piece.
            TooLargeError: more directions than `max_directions`.
        """
        problem = self.problem
        with recording(self._model, problem.space.parameters(self._model)):
            for number, batch in enumerate(problem.batches):
                if number < start:
                    continue
                totals = Totals(problem.quantity, problem.space.device)
                generator = problem.draws(batch)
                for recorded, target in self._record(batch):
                    totals.check(recorded.outputs, target)
                    count = self._count(recorded.outputs, target)
                    rows = problem.quantity.directions(recorded.outputs, target, generator)
                    yield Piece(number, self._parts, recorded, count, rows)
                totals.require_sound()

    def resume(self) -> Facts:
        """What the first batch shows; the passes that went before are not made again.

        Raises:
            DataError: no process has a batch.
        """
        group = self.problem.group
        with group.together("the first batch"):
            self.sampled()
        shares = group.gather((self._parts, dict(self.facts.described)))
        seen = [share for share in shares if share[0]]
        if not seen:
            raise DataError(
                "expected at least one batch, but the loaders of all processes are empty"
            )
        if not self._parts:
            self._parts, self._described = seen[0]
        self._finished = True
        return self.facts

    def sampled(self) -> Sample | None:
        """The forms of one direction of the first batch; None if this process has no batch.

        Raises:
            DataError: the first batch has no example.
        """
        problem = self.problem
        with (
            recording(self._model, problem.space.parameters(self._model)),
            closing(iter(problem.batches)) as batches,
        ):
            first = next(batches, None)
            if first is None:
                return None
            generator = problem.draws(first)
            for recorded, target in self._record(first):
                outputs = recorded.outputs
                directions = problem.quantity.directions(outputs, target, generator)
                try:
                    ((forms, _, _),) = recorded.chunks(islice(directions, 1), 1)
                except PartsChangedError:  # the plan knows it now
                    return self.sampled()
                labelled = [*tree.tensors(first.target), outputs][0]
                examples = problem.batches.num_examples(labelled.shape[0])
                count = problem.quantity.count(outputs, target)
                general = recorded.general_passes(count)
                return Sample(forms, count, examples, general, recorded.proofs)
        raise DataError("expected at least one example in the first batch")

    def prove(self, batch: Batch) -> None:
        """Raise StochasticModelError if the model is random, or mixes the examples of a batch."""
        with recording(self._model, self.problem.space.parameters(self._model)):
            for _ in self._capture(batch.raw, None):
                pass

    def _record(self, batch: Batch) -> Iterator[tuple[Recorded, Any]]:
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

    def _replay(self, make: Make, totals: Totals, kept: Kept) -> Read:
        statistics = make(self.facts) if self._parts else None
        feed = Feed(statistics or (), Kept(False))
        for form in kept.forms or ():
            feed(*form)
        self._kept = None
        return statistics, totals

    def _count(self, outputs: Tensor, target: Tensor | None) -> int:
        """How many directions a piece has, if they are not too many."""
        quantity, most = self.problem.quantity, self.problem.max_directions
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
        return count


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
    group = loader.group if isinstance(loader, Distributed) else None
    model = gathered(model, group)
    with (group or ALONE).together("a build"):
        model = unwrapped(model, group)
        space = space_of(model, params)
        batches = Batches(
            loader,
            device=space.device,
            forward=forward,
            target=target,
            positions=positions,
            progress=progress,
            **quantity.reading(),
        )
    return Sweep(Problem.of(model, space, batches, quantity, **options))


def _require_finite_parameters(model: nn.Module, space: ParamSpace) -> None:
    parameters = space.parameters(model)
    finite = torch.stack([all_finite(p.detach()) for p in parameters.values()]).tolist()
    if bad := [name for name, ok in zip(parameters, finite, strict=True) if not ok]:
        raise NonFiniteError(
            f"expected finite parameters, but {bad} hold NaN or infinity: the training that led "
            "here diverged"
        )
