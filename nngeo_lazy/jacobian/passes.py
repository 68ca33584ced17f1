"""One recorded pass, the plan that it follows, and the forms of its output directions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from .. import tree
from ..errors import UnsupportedLayerError
from .calls import Call
from .folds import Fold, Ragged
from .forms import Form, Rows
from .general import GeneralRows, cut, example_leaves
from .inputs import Inputs
from .parts import Gradient, Kind, Part
from .record import Made, Recorder
from .signature import Signature, signature_of
from .union import forms_of

__all__ = ["Cutter", "Pass", "Plan", "Recorded", "gradients_at"]

CHUNK_BYTES = 2**22  # gradients of several directions are stacked up to this size
GENERAL_TILE_BYTES = 2**27  # rows of the general way; a tile costs a pass, so tiles are large
GENERAL_KEPT_BYTES = 2**28  # tiles of rows that all parts share take at most this
PIECE_BYTES = {"cpu": 2**24}  # layer outputs of a piece of a batch: what is small stays in cache
PIECE_BYTES_ELSEWHERE = 2**30
PIECE_EXAMPLES = 16  # but no fewer: small products are slow
HELD_BYTES = 2**26  # a piece's gradients in all directions are held at once up to this


@dataclass(frozen=True)
class Pass:
    """One recorded forward.

    Attributes:
        raw: the batch.
        outputs: (N, ...).
        calls: the layers that it called on at least one position.
        formless: parameters that met data without a form, and why.
        examples: of the constants that it made, whether each was taken for data.
        signature: what it did.
        idle: parameters that only calls without a position received.
        drawn: whether it drew random numbers.
        whole: the same before some of its calls were split.
    """

    raw: Any
    outputs: Tensor
    calls: list[Call]
    formless: dict[str, str]
    examples: list[Made]
    signature: Signature
    idle: frozenset[str]
    drawn: bool = False
    whole: Pass | None = None

    @classmethod
    def of(
        cls, raw: Any, outputs: Tensor, recorder: Recorder, parameters: Mapping[str, Tensor]
    ) -> Pass:
        """The pass that a recorder has seen."""
        calls = [call for call in recorder.calls if call.shape.numel()]
        empty = [call for call in recorder.calls if not call.shape.numel()]
        idle = _names(empty).difference(_names(calls), recorder.formless)
        signature = signature_of(outputs, parameters)
        if "CheckpointFunctionBackward" in signature.nodes:
            raise UnsupportedLayerError(
                "expected a model whose layers' gradients can be asked for, but it checkpoints "
                "activations with use_reentrant=True, within which torch gives none: checkpoint "
                "with use_reentrant=False, or take representation='implicit'"
            )
        return cls(
            raw,
            outputs,
            calls,
            recorder.formless,
            recorder.examples,
            signature,
            frozenset(idle),
        )

    @property
    def n(self) -> int:
        """N: the number of examples."""
        return self.outputs.shape[0]

    @property
    def keys(self) -> list[tuple[str, ...]]:
        """What each call was, in order."""
        return [call.key for call in self.calls]

    def split(self, which: frozenset[int]) -> Pass:
        """The same with some calls split, as far as they can be."""
        if not which or self.whole is not None:
            return self
        calls: list[Call] = []
        for k, call in enumerate(self.calls):
            calls += [call] if k not in which or call.split is None else call.split()
        return replace(self, calls=calls, whole=self)


@dataclass(frozen=True)
class Plan:
    """What the self-check found; it holds for every batch that shows the same calls.

    Attributes:
        keys: of the calls.
        parts: the parameters by form.
        folds: the calls' example axes.
        general: rows of all parameters without a form together.
        examples: of the pass that it was proved on.
        constants: which constants were taken for data.
        silent: calls whose gradient was zero there, which proves nothing.
        cutter: cuts batches into pieces, if examples alone are as within the batch.
        split: which of a pass's calls are split: the numbers above count what they are split into.
    """

    keys: list[tuple[str, ...]]
    parts: list[Part]
    folds: list[Fold | None]
    general: GeneralRows | None
    examples: int
    constants: list[Made]
    silent: frozenset[int] = frozenset()
    cutter: Cutter | None = None
    split: frozenset[int] = frozenset()

    def fits(self, record: Pass) -> bool:
        """Whether a pass calls the same layers, with room for its examples."""
        record = record.split(self.split)
        if self.examples == 1 and record.n > 1:  # one example shows no example axis
            return False
        return record.keys == self.keys and all(
            self.folds[k] is None or self.folds[k].fits(record.calls[k].shape, record.n)  # type: ignore[union-attr]
            for part in self.parts
            for k in part.calls
        )

    def of_fewer(self, record: Pass) -> Plan | None:
        """The plan of a pass that leaves some of the calls out, and what they alone use.

        Layers that are dropped at random are. None if the pass does anything else.
        """
        at = _found_in(record.keys, self.keys)
        if at is None or self.split or self.ragged or self.general is not None:
            return None
        now, parts = {before: k for k, before in enumerate(at)}, []
        for part in self.parts:
            members = tuple(replace(m, call=now[m.call]) for m in part.members if m.call in now)
            if members and len(members) < len(part.members):
                return None
            kind = part.kind if members else Kind.UNUSED
            parts.append(replace(part, kind=kind, members=members))
            if kind is Kind.UNUSED and record.signature.leaves.intersection(part.names):
                return None  # it is used by something that is no layer
        folds, silent = [self.folds[k] for k in at], {now[k] for k in self.silent if k in now}
        keys = list(record.keys)
        plan = replace(self, keys=keys, parts=parts, folds=folds, silent=frozenset(silent))
        return plan if plan.fits(record) else None

    @property
    def ragged(self) -> bool:
        """Whether examples own positions in numbers that may be others in the next pass."""
        return any(isinstance(fold, Ragged) for fold in self.folds)

    def bytes(self, record: Pass) -> int:
        """What the gradients at the layers' outputs take, for one direction."""
        record = record.split(self.split)
        used = {k for part in self.parts for k in part.calls}
        return sum(record.calls[k].shape.numel() for k in used) * record.outputs.element_size()


@dataclass(frozen=True)
class Cutter:
    """Cuts batches into pieces of so many examples, which lie in front of the given leaves."""

    leaves: tuple[int, ...]
    size: int

    @classmethod
    def of(cls, raw: Any, n: int, total: int, times: int | None = None) -> Cutter | None:
        """For batches like this one of n examples, whose layer outputs take `total` bytes.

        So many times that is held at once, if it is given.
        """
        leaves = example_leaves(raw, n)
        if not leaves:
            return None
        kind = list(tree.leaves(raw))[leaves[0]].device.type
        limit = PIECE_BYTES.get(kind, PIECE_BYTES_ELSEWHERE)
        if times is not None:
            return cls(leaves, max(1, HELD_BYTES * n // max(1, times * total)))
        return cls(leaves, max(PIECE_EXAMPLES, limit * n // max(1, total)))

    def pieces(self, raw: Any) -> int:
        """Into how many pieces a batch is cut."""
        return max(1, -(-self._examples(raw) // self.size))

    def __call__(self, raw: Any, target: Any) -> Iterator[tuple[Any, Any]]:
        """Pieces of a batch, with their targets."""
        n, count = self._examples(raw), self.pieces(raw)
        for k in range(count):
            where = slice(n * k // count, n * (k + 1) // count)
            labels = target if count == 1 else tree.map_leaves(partial(_examples, where), target)
            yield raw if count == 1 else cut(raw, self.leaves, where), labels

    def _examples(self, raw: Any) -> int:
        return int(list(tree.leaves(raw))[self.leaves[0]].shape[0])


def _examples(where: slice, leaf: Any) -> Any:
    return leaf[where] if isinstance(leaf, Tensor) else leaf


@dataclass(frozen=True)
class Recorded:
    """One batch, ready for output directions."""

    record: Pass
    plan: Plan
    parameters: Mapping[str, Tensor]
    parts: Sequence[Part]  # of all batches so far; forms are in this order
    prove: Callable[[Pass], Plan] | None = None  # if a call has a new gradient
    marks: Tensor | None = None  # of the positions (N, S) that are scored, see `positions`
    _inputs: dict[int, list[Inputs | None]] = field(default_factory=dict)

    @property
    def outputs(self) -> Tensor:
        """The model's outputs (N, ...), detached."""
        return self.record.outputs.detach()

    @property
    def dtype(self) -> torch.dtype:
        """What statistics are accumulated in: the outputs' dtype, at least float32."""
        return torch.promote_types(self.record.outputs.dtype, torch.float32)

    def chunks(
        self, directions: Iterator[Tensor], count: int, *, root: GradientEdge | None = None
    ) -> Iterator[tuple[list[Form | None], bool, bool]]:
        """For each chunk of directions: every part's form (None if unused), first, last.

        Args:
            directions: cotangents shaped like the outputs.
            count: how many there are.
            root: where backward passes start, in the place of recorded outputs that have no graph;
                the graph is then somebody else's, and stays. Otherwise the last one frees it.
        """
        step = self._step
        general = self.plan.general
        masked = general is not None and general.way.of_whole
        start = self.record.outputs if root is None else root
        recorded, done = self, 0
        while chunk := [d.to(self.record.outputs.dtype) for d in islice(directions, step)]:
            collected = []
            for direction in chunk:
                done += 1
                keep = root is not None or masked or done < count or bool(self.plan.silent)
                collected.append(gradients_at(start, recorded.edges, direction, keep))
            believed = recorded._believed(collected)
            if believed.used != recorded.used:
                collected = [gradients_at(start, believed.edges, d) for d in chunk]
            recorded = believed
            yield recorded.forms(collected, chunk), done == len(chunk), done == count

    def _believed(self, collected: Sequence[Sequence[Tensor | None]]) -> Recorded:
        """The same, proved on this pass if a call has a gradient that had none in the proof."""
        if self.prove is None or not self.plan.silent:
            return self
        speaking = [
            g.any()
            for each in collected
            for k, g in zip(self.used, each, strict=True)
            if k in self.plan.silent and g is not None
        ]
        if not speaking or not bool(torch.stack(speaking).any()):
            return self
        record = self.record if self.record.whole is None else self.record.whole
        plan = self.prove(record)
        return replace(self, record=record.split(plan.split), plan=plan, _inputs={})

    @property
    def _step(self) -> int:
        """How many directions are stacked."""
        one = sum(self.record.calls[k].shape.numel() for k in self.used) * self.dtype.itemsize
        return max(1, CHUNK_BYTES // max(1, one))

    def general_passes(self, directions: int) -> tuple[int, int]:
        """Forward and backward passes of the whole network on the general way, in a batch."""
        if self.plan.general is None:
            return 0, 0
        chunks = -(-directions // self._step)
        return self.plan.general.passes(directions, chunks, self.record.n)

    @property
    def proofs(self) -> int:
        """Backward passes of the self-check that each batch like this one takes (`signature`)."""
        return 0 if self.record.signature.alike else 2

    @property
    def edges(self) -> list[GradientEdge]:
        """Where the output gradients of the layers arrive."""
        return [self.record.calls[k].edge for k in self.used]

    @property
    def used(self) -> list[int]:
        """The calls that parts are made of."""
        return sorted({k for part in self.plan.parts for k in part.calls})

    def forms(
        self, collected: Sequence[Sequence[Tensor | None]], directions: Sequence[Tensor]
    ) -> list[Form | None]:
        """Every part's form, None if no batch uses it.

        Args:
            collected: for each direction the gradients at the `edges`, None if they are zero.
            directions: what they are the gradients of; read for parts on the general way alone.
        """
        gradients = {
            k: self.gradient(k, [each[j] for each in collected]) for j, k in enumerate(self.used)
        }
        forms: list[Form | None] = []
        general = self.general(directions)
        for k, part in enumerate(self.plan.parts):
            if part.kind is Kind.UNUSED:
                forms.append(None)
            elif part.kind is Kind.GENERAL:
                forms.append(next(general))
            else:
                forms.append(self.form(k, gradients))
        if self.parts is self.plan.parts:
            return forms
        like = torch.zeros((), dtype=self.dtype, device=self.record.outputs.device)
        shape = (len(collected), self.record.n)
        return forms_of(self.parts, self.plan.parts, forms, shape, like)

    def gradient(self, call: int, given: Sequence[Tensor | None]) -> Gradient:
        """What arrived at a call's output, for each direction."""
        fold = self.plan.folds[call]
        return Gradient(self.record.calls[call], fold, given, self.record.n, self.dtype)

    def form(self, k: int, gradients: Mapping[int, Gradient]) -> Form:
        """The form of a part, from the gradients at its calls."""
        part, calls, folds = self.plan.parts[k], self.record.calls, self.plan.folds
        inputs = self._inputs.get(k)
        if inputs is None:
            made = part.inputs(calls, folds, self.record.n)
            inputs = self._inputs[k] = [None if x is None else x.to(self.dtype) for x in made]
        return part.form(calls, folds, inputs, gradients, self.parameters, self.marks)

    @property
    def streams(self) -> bool:
        """Whether `streaming` can hand over one form after the other, and it is worth it."""
        known = self.parts is self.plan.parts and not self.plan.silent
        return known and self._step == 1 and len(self.used) > 1

    def drop_inputs(self, k: int) -> None:
        """Forget the inputs of a part as they were converted."""
        self._inputs.pop(k, None)

    def drop(self, call: int) -> None:
        """Forget the input of a call: no form can be made of it any more."""
        known = self.record.calls[call]
        empty = replace(known.use, x=known.use.x.new_empty(0))
        self.record.calls[call] = replace(known, use=empty)

    def general(self, chunk: Sequence[Tensor]) -> Iterator[Rows]:
        """The rows of each part without a form, in order: one pass makes those of all."""
        make = self.plan.general
        if make is None:
            return
        directions = torch.stack(list(chunk))
        sizes = [part.layout.size for part in self.plan.parts if part.kind is Kind.GENERAL]
        tiles: dict[tuple[int, int], Tensor] = {}
        step = max(1, GENERAL_TILE_BYTES // max(1, len(chunk) * sum(sizes) * 8))

        def tile(start: int, stop: int) -> Tensor:
            if (start, stop) not in tiles:
                if sum(held.nbytes for held in tiles.values()) > GENERAL_KEPT_BYTES:
                    tiles.clear()
                raw, outputs = self.record.raw, self.record.outputs
                tiles[start, stop] = make(raw, outputs, directions, start, stop).to(self.dtype)
            return tiles[start, stop]

        at = 0
        for size in sizes:
            where = slice(at, at + size)
            at += size

            def compute(start: int, stop: int, where: slice = where) -> Tensor:
                return tile(start, stop)[..., where]

            shape = (len(chunk), self.record.n, size)
            one = len(chunk) * size * torch.finfo(self.dtype).bits // 8
            yield Rows(compute, shape, self.dtype, step * one)


def _found_in(some: Sequence[Any], every: Sequence[Any]) -> list[int] | None:
    """Where some things come, in their order, among others; None if they do not."""
    found: list[int] = []
    for thing in some:
        start = found[-1] + 1 if found else 0
        at = next((k for k in range(start, len(every)) if every[k] == thing), None)
        if at is None:
            return None
        found.append(at)
    return found


def _names(calls: Sequence[Call]) -> set[str]:
    return {name for call in calls for weight in call.weights.values() for name in weight.names}


def gradients_at(
    outputs: Tensor | GradientEdge, inputs: Sequence[Any], cotangent: Tensor, retain: bool = True
) -> Sequence[Tensor | None]:
    """The gradients of <outputs, cotangent> at tensors or edges, None if they are zero."""
    if not inputs:
        return ()
    roots: Any = (outputs,)
    found: Sequence[Tensor | None] = torch.autograd.grad(
        roots, inputs, (cotangent,), retain_graph=retain, allow_unused=True
    )
    return found
