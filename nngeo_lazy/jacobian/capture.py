"""From a batch to forms: one recorded forward, then backwards to the layers' outputs only.

No weight gradient is formed. Output directions stream in chunks, so that memory depends on neither
their number nor the number of examples in the loader.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import tree
from ..errors import DataError, NonFiniteError, UnsupportedLayerError
from ..space import ParamSpace
from .alone import (
    PROBED,
    Alone,
    draws,
    drew,
    in_float64,
    mixed,
    outputs_alone,
    require_apart,
    require_gradients_alone,
    require_repeatable,
)
from .calls import Call
from .folds import Fold, Ragged, candidates
from .general import Forward, GeneralRows, cut, example_leaves
from .grouping import make_parts
from .parts import Kind, Part
from .passes import Cutter, Pass, Plan, Recorded, gradients_at
from .proof import Probe, Probed, Unproved, probe_folds, scales_of
from .record import Made, Recorder
from .union import joined, widened

__all__ = ["Capture", "PartsChangedError", "Recorded", "UnprovedError"]

SAMPLED = 5  # examples of a large first batch that the plan is made from
SMALL = 9  # a first batch of no more examples is looked at as a whole
HELD_PLANS = 64  # of passes that differ in which entries of parameters they use


class UnprovedError(UnsupportedLayerError):
    """The self-check failed on a later batch, by numbers: it may be rounding."""


class PartsChangedError(Exception):
    """A batch shows that parts of the parameters have other forms than was thought: start anew."""


class Capture:
    """The forms of a model's parameters, batch by batch.

    Args:
        model: the network, in the mode in which it is to be differentiated.
        space: the selected parameters.
        forward: (model, raw batch) -> outputs, whose dimension 0 is the examples.
        through: whether parameters are followed through what the model makes of them, for which the
            graph of a pass must be whole when its forms are used.
        held: whether the forms of all outputs of a piece are held at once: pieces are then smaller.
        ahead: whether the parts must serve later batches that use other entries of parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        space: ParamSpace,
        forward: Forward,
        *,
        through: bool = True,
        held: bool = False,
        ahead: bool = False,
    ) -> None:
        self._through = through
        self._held = held
        self._ahead = ahead
        self._model = model
        self._space = space
        self._forward = forward
        self._parameters = space.parameters(model)
        self._plans: dict[tuple[str | int, ...], tuple[Plan, ...]] = {}  # by what the pass did
        self._plan: Plan | None = None  # the last one
        self._cutter: Cutter | None = None
        self._parts: list[Part] | None = None

    @property
    def parts(self) -> list[Part]:
        """The parameters by form, of all batches so far; known after the first one."""
        if self._parts is None:
            raise RuntimeError("no batch has been captured")
        return self._parts

    def __call__(self, raw: Any, target: Any) -> Iterator[tuple[Recorded, Any]]:
        """Record a batch with its target, in pieces if it is large, and plan what is new in it.

        The pieces are small enough to stay in fast memory. A batch is cut only if the self-check
        found that examples on their own give the outputs that they give in the batch.
        """
        if self._plan is None and not self._sampled_plan(raw):
            record, plan = self._planned(self._record(raw))
            self._cutter = plan.cutter
            if plan.cutter is None or plan.cutter.pieces(raw) == 1:
                yield self._recorded(record, plan), target
                return
            del record
        cutter = self._cutter
        for piece, labels in [(raw, target)] if cutter is None else cutter(raw, target):
            record, plan = self._planned(self._record(piece))
            yield self._recorded(record, plan), labels

    def _recorded(self, record: Pass, plan: Plan) -> Recorded:
        record = record.split(plan.split)
        return Recorded(record, plan, self._parameters, self.parts, self._reproved)

    def prove(self, raw: Any) -> list[Part]:
        """The parts, from a batch that is looked at for nothing else.

        Raises:
            UnsupportedLayerError: it uses parameters in another way than the batches before.
            UnprovedError: there are forms, and numbers differ from theirs, perhaps by rounding.
        """
        before, plan, plans = self._parts, self._plan, dict(self._plans)
        if self._plan is not None or not self._sampled_plan(raw):
            self._planned(self._record(raw))
        general = self._plan is not None and self._plan.general is not None
        if before is not None and (general or self.parts != before):
            now, self._plan = self._plan, plan
            self._parts, self._plans = before, plans
            notes = [part.note for part in now.parts if part.kind is Kind.GENERAL] if now else []
            numbers = bool(notes) and all(isinstance(note, Unproved) for note in notes)
            raise (UnprovedError if numbers else UnsupportedLayerError)(
                "expected every batch to use the parameters in the same way, but a later batch "
                f"uses {_differing(before, now)} differently{_because(notes)}: use batches of one "
                "kind"
            )
        return self.parts

    def observed(
        self, raw: Any, outputs: Tensor, recorder: Recorder, *, proved: bool = False
    ) -> Recorded | None:
        """A pass that somebody else ran under a recorder, None if `prove` must see its batch.

        It does not hold the outputs' graph, but what lies below.

        Args:
            raw: the batch.
            outputs: of the pass.
            recorder: it was open then.
            proved: whether this batch has just been proved.
        """
        record = Pass.of(raw, outputs, recorder, self._parameters)
        record = replace(record, outputs=outputs.detach())
        last = [] if self._plan is None else [self._plan]
        plans = [*last, *(plan for known in self._plans.values() for plan in known)]
        plan = next((plan for plan in plans if plan.fits(record)), None)
        if plan is None and all(p.requires_grad for p in self._parameters.values()):
            plan = next(filter(None, (known.of_fewer(record) for known in plans)), None)
        believed = record.signature.alike and plan is not None and not (plan.silent or plan.ragged)
        if plan is None or not (proved or believed):
            return None
        return Recorded(record.split(plan.split), plan, self._parameters, self.parts)

    def _sampled_plan(self, raw: Any) -> bool:
        """Plan from the first examples of a batch; whether it can be cut.

        If dimension 0 were not the examples, cutting it twice would not cut the outputs twice.
        """
        tensors = [t for t in tree.tensors(raw) if t.dim() > 0]
        n = tensors[0].shape[0] if tensors else 0
        if n <= max(SAMPLED, SMALL):
            return False
        try:
            record = self._record(cut(raw, example_leaves(raw, n), slice(0, SAMPLED)))
        except Exception:  # noqa: BLE001 - a batch that cannot be cut is recorded whole
            return False
        if record.n != SAMPLED or record.outputs.grad_fn is None:
            return False
        record, plan = self._replan(record)
        if plan.cutter is None:
            return False
        self._take(record, plan)
        self._cutter = plan.cutter
        return True

    def recorder(self, raw: Any, *, training: bool = False) -> Recorder:
        """A recorder of a pass over this batch."""
        return self._recorder(raw, training, () if self._plan is None else self._plan.constants)

    def _recorder(self, raw: Any, training: bool, examples: Sequence[Made]) -> Recorder:
        return Recorder(
            self._model,
            self._parameters,
            raw,
            training=training,
            through=self._through,
            examples=examples,
        )

    def _record(self, raw: Any, examples: Sequence[Made] | None = None) -> Pass:
        before = draws(self._space.device)
        with (
            self.recorder(raw)
            if examples is None
            else self._recorder(raw, False, examples) as recorder
        ):
            outputs = self._forward(self._model, raw)
        record = Pass.of(raw, outputs, recorder, self._parameters)
        return replace(record, drawn=drew(before, self._space.device))

    def _plain(self, raw: Any) -> Tensor:
        """The outputs alone, with their graph: torch has other ways without one."""
        return self._forward(self._model, raw)

    def _precise(self, raw: Any) -> Tensor:
        return in_float64(self._model, self._forward, raw)

    def _planned(self, record: Pass) -> tuple[Pass, Plan]:
        """This pass, or the same recorded again, with a plan that is believed for it."""
        if record.drawn:
            require_repeatable(record, self._plain)
        known = self._plans.get(record.signature.nodes)
        if known is None:
            record, made = self._replan(record)
            return record, self._take(record, made)
        plan = next((plan for plan in known if plan.fits(record)), None)
        if plan is None or plan.ragged or not record.signature.alike:
            return record, self._proved(record)
        return record, self._take(record, plan)

    def _proved(self, record: Pass) -> Plan:
        """A plan that is proved on a pass like others before."""
        plan = replace(self._prove(record), cutter=self._plans[record.signature.nodes][0].cutter)
        self._require_apart(record, plan)
        return self._take(record, plan)

    def _reproved(self, record: Pass) -> Plan:
        """The same, if parts of it may have been made already.

        Raises:
            PartsChangedError: its parts are not those that were known.
        """
        before, plan = self.parts, self._proved(record)
        demoted = {part.names: part for part in plan.parts if part.kind is Kind.GENERAL}
        self._parts = [
            demoted.get(p.names, p) if p.kind is Kind.ROWS else p for p in self.parts
        ]  # so that the report says why
        if self._parts != before:
            raise PartsChangedError
        self._parts = before
        return plan

    def _take(self, record: Pass, plan: Plan) -> Plan:
        """Keep a plan, and the parts that it shares with those before."""
        if plan.parts == self._parts:
            plan = replace(plan, parts=self._parts)
        before = self._plans.get(record.signature.nodes, ())
        others = [known for known in before if known.keys != plan.keys]  # of other entries, say
        self._plan, self._plans[record.signature.nodes] = plan, (plan, *others[: HELD_PLANS - 1])
        if self._parts is None:
            wide = widened(self._space, plan.parts) if self._ahead else plan.parts
            self._parts = plan.parts if wide == plan.parts else wide
        elif self._parts is not plan.parts:
            parts = joined(self._space, self._parts, plan.parts)
            self._parts = self._parts if parts == self._parts else parts
        return plan

    def _replan(self, record: Pass) -> tuple[Pass, Plan]:
        """A pass that does something new, recorded again if it must be, and its plan."""
        which = "first" if self._plan is None else "a later"
        # A class that is ruled out has -infinity: what may have it says the quantity.
        if not bool((record.outputs < math.inf).all()):
            raise NonFiniteError(
                f"expected finite outputs, but the model gives NaN or infinity on {which} batch: "
                "check the inputs, and the training that led to these parameters"
            )
        if record.n < 1:
            raise DataError(
                "expected at least one example in each batch, got outputs "
                f"{tuple(record.outputs.shape)}: drop empty batches from the loader"
            )
        if record.outputs.grad_fn is None:
            if self._plan is not None:  # of a model that uses none of them for this batch
                unused = make_parts(self._space, [], {}, set(self._space.names))
                return record, Plan([], unused, [], None, record.n, record.examples)
            raise DataError(
                "the outputs do not depend on any selected parameter: select others with params=, "
                "and check that the forward pass does not run under no_grad or detach"
            )
        if record.n == 1:
            record = self._twice(record)
        alone, few = outputs_alone(record, self._record, self._plain, self._precise)
        if alone is Alone.DOUBTFUL:
            require_gradients_alone(record, self._plain, list(self._parameters.values()))
        if few is not None and record.n > few.n and _by_accident(few, record):
            # as many positions as examples, by accident: the few examples tell
            record = self._record(record.raw, few.examples)
        if few is None or record.n <= PROBED or not _comparable(few, record):
            few = None
        alike = record.signature.alike
        plan = None if few is None or not alike else self._prove(few)
        if plan is None or not plan.fits(record):
            plan = self._prove(record)
        if not record.signature.alike or alone is Alone.DOUBTFUL:
            self._require_apart(record, plan, alone)
        if alone is not Alone.UNKNOWN and record.n > 1:
            times = record.outputs[0].numel() if self._held else None
            cutter = Cutter.of(record.raw, record.n, plan.bytes(record), times)
            plan = replace(plan, cutter=cutter)
        return record, plan

    def _twice(self, record: Pass) -> Pass:
        """A pass of one example, whose constants are known from a batch that has it twice.

        A constant or a weight with one entry in front may be for that example, or for all.
        """
        if all(mine is not None for _, mine in record.examples):
            return record
        leaves = example_leaves(record.raw, 1)
        try:
            two = self._record(cut(record.raw, leaves, torch.tensor([0, 0], device="cpu")), ())
        except Exception:  # noqa: BLE001 - a model that takes no two examples
            return record
        if two.n != 2 or not any(mine for _, mine in two.examples):
            return record
        return self._record(record.raw, two.examples)

    def _require_apart(self, record: Pass, plan: Plan, alone: Alone = Alone.SAME) -> None:
        """Look closer if a layer's output, cut into examples as it can be, reaches others'."""
        meet = any(
            fold is None and any(candidates(call.shape[: call.use.leading], record.n))
            for call, fold in zip(record.split(plan.split).calls, plan.folds, strict=True)
        )
        if meet and alone is Alone.DOUBTFUL:
            raise mixed(1, record.n)
        if meet and alone is Alone.SAME:
            require_apart(record, self._plain, self._precise)

    def _prove(self, record: Pass) -> Plan:
        """The self-check (see `proof`) on a recorded pass."""
        outputs, calls, n = record.outputs, record.calls, record.n
        generator = torch.Generator(device=outputs.device).manual_seed(0)
        edges = [call.edge for call in calls]
        noise = torch.randn(outputs.shape, generator=generator, device=outputs.device)
        cotangent, scales = noise.to(outputs.dtype), scales_of(outputs, generator)
        # Confined to its example each, all can be compared with autograd in one sum.
        found = gradients_at(outputs, [*edges, *self._parameters.values()], cotangent)
        at_calls, found = found[: len(edges)], found[len(edges) :]
        scaled = at_calls
        if n > 1:
            times = scales.view(-1, *[1] * (outputs.dim() - 1))
            scaled = gradients_at(outputs, edges, cotangent * times)
        probe = Probe(cotangent, scales, at_calls, scaled, record.signature.precision)
        dense = [g.to_dense() if g is not None and g.is_sparse else g for g in found]
        gradients = dict(zip(self._parameters, dense, strict=True))
        if self._plan is None and all(g is None for g in found):
            raise DataError("the outputs do not depend on any selected parameter")
        folds = probe_folds(calls, probe)
        split = self._to_split(calls, folds)
        before = [
            k for k, call in enumerate(calls) for _ in range(call.pieces if k in split else 1)
        ]
        record, probe = record.split(split), probe.of_calls(before)
        routed = {j for j, k in enumerate(before) if k in split} | self._routed(record)
        if routed:
            folds = probe_folds(record.calls, probe, routed)
        parts = self._demote(record, folds, probe, gradients)
        names = [name for part in parts if part.kind is Kind.GENERAL for name in part.names]
        general = None
        if names:
            without = {name: self._parameters[name] for name in names}
            general = GeneralRows(self._model, without, self._forward)
            general.probe(record.raw, outputs, cotangent, sorted({0, n // 2, n - 1}))
        examples, quiet = record.examples, probe.silent
        return Plan(record.keys, parts, folds, general, n, examples, quiet, split=split)

    def _to_split(self, calls: Sequence[Call], folds: Sequence[Fold | None]) -> frozenset[int]:
        """Calls of stacked weights (experts) whose examples lie elsewhere for each of the stack."""
        known: frozenset[int] = frozenset() if self._plan is None else self._plan.split
        return frozenset(
            k
            for k, (call, fold) in enumerate(zip(calls, folds, strict=True))
            if call.split is not None and (fold is None or k in known)
        )

    def _routed(self, record: Pass) -> set[int]:
        """Calls whose positions had an owner each in another batch like this one."""
        if self._plan is None or self._plan.keys != record.keys:
            return set()
        return {k for k, fold in enumerate(self._plan.folds) if isinstance(fold, Ragged)}

    def _demote(
        self,
        record: Pass,
        folds: list[Fold | None],
        probe: Probe,
        gradients: Mapping[str, Tensor | None],
    ) -> list[Part]:
        """The parts, with all whose rows are not autograd's on the general way."""
        general = dict(record.formless)
        unused = {name for name, gradient in gradients.items() if gradient is None}
        unused |= record.idle
        for call, fold in zip(record.calls, folds, strict=True):
            if fold is None:
                note = f"the output of {call.function} {tuple(call.shape)} has no example axis"
                note = Unproved(f"{call.note} ({note})" if call.note else note)
                names = {name for weight in call.weights.values() for name in weight.names}
                general.update(dict.fromkeys(names, note))
        parts = make_parts(self._space, record.calls, general, unused)
        found = Probed(record.calls, folds, probe, gradients, self._parameters, self._space)
        demoted: dict[str, str] = {}
        for part in parts:
            if part.members and (why := found.disagreement(part, record.n)):
                demoted.update(dict.fromkeys(part.names, why))
        if demoted:
            return make_parts(self._space, record.calls, general | demoted, unused)
        return parts


def _comparable(few: Pass, record: Pass) -> bool:
    """Whether what is proved of a few examples holds for all."""
    return few.keys == record.keys and few.idle == record.idle and few.signature.alike


def _by_accident(few: Pass, record: Pass) -> bool:
    """Whether a constant is as long as a batch, and not as a few of its examples."""
    pairs = zip(few.examples, record.examples, strict=False)
    return any(own and mine is False for (_, mine), (_, own) in pairs)


def _because(notes: Sequence[str]) -> str:
    return f" ({'; '.join(dict.fromkeys(notes))})" if notes else ""


def _differing(before: Sequence[Part], plan: Plan | None) -> str:
    """The parameters that a plan has other parts of."""
    now = [] if plan is None else plan.parts
    known = {(part.names, part.layout, part.kind) for part in before}
    other = [part for part in now if (part.names, part.layout, part.kind) not in known]
    names = list(dict.fromkeys(name for part in other for name in part.names))
    called = ", ".join(dict.fromkeys(part.function for part in other if part.function))
    return f"{names} ({called})" if called else f"{names}"
