"""From a batch to forms: one recorded forward, then backwards to the layers' outputs only.

No weight gradient is formed. Output directions stream in chunks, so that memory depends on neither
their number nor the number of examples in the loader.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import tree
from ..errors import DataError, NonFiniteError, StochasticModelError, UnsupportedLayerError
from ..space import ParamSpace
from .folds import Fold
from .general import Forward, GeneralRows, cut, example_leaves
from .grouping import make_parts
from .parts import Kind, Part
from .passes import Cutter, Pass, Plan, Recorded, gradients_at
from .proof import Probe, Probed, agree, probe_folds
from .record import Recorder

__all__ = ["Capture", "Recorded"]

SAMPLED = 32  # examples of the first batch that the plan is made from
PROBED = 3  # of them, in the self-check
OUTPUTS_AGREE = 0.25  # a power of eps: outputs that nearly cancel carry few digits


class Capture:
    """The forms of a model's parameters, batch by batch.

    Args:
        model: the network, in the mode in which it is to be differentiated.
        space: the selected parameters.
        forward: (model, raw batch) -> outputs, whose dimension 0 is the examples.
        through: whether parameters are followed through what the model makes of them, for which the
            graph of a pass must be whole when its forms are used.
    """

    def __init__(
        self, model: nn.Module, space: ParamSpace, forward: Forward, *, through: bool = True
    ) -> None:
        self._through = through
        self._model = model
        self._space = space
        self._forward = forward
        self._parameters = space.parameters(model)
        self._plan: Plan | None = None

    @property
    def parts(self) -> list[Part]:
        """The parameters by form; known after the first batch."""
        if self._plan is None:
            raise RuntimeError("no batch has been captured")
        return self._plan.parts

    def __call__(self, raw: Any, target: Tensor | None) -> Iterator[tuple[Recorded, Tensor | None]]:
        """Record a batch with its target, in pieces where it is large; the first time, also plan.

        The pieces are small enough to stay in fast memory. A batch is cut only where the self-check
        found that examples on their own give the outputs that they give in the batch.
        """
        if self._plan is None:
            self._plan = self._sampled_plan(raw)
        if self._plan is None:
            record = self._record(raw)
            self._plan = self._replan(record)
            if self._plan.cutter is None or self._plan.cutter.pieces(raw) == 1:
                yield Recorded(record, self._plan, self._parameters), target
                return
            del record
        cutter = self._plan.cutter
        for piece, labels in [(raw, target)] if cutter is None else cutter(raw, target):
            record = self._record(piece)
            if not self._plan.fits(record):
                self._plan = self._replan(record)
            yield Recorded(record, self._plan, self._parameters), labels

    def prove(self, raw: Any) -> list[Part]:
        """The plan, from a batch that is looked at for nothing else."""
        self._plan = self._sampled_plan(raw) or self._replan(self._record(raw))
        return self._plan.parts

    def observed(self, raw: Any, outputs: Tensor, recorder: Recorder) -> Recorded | None:
        """A pass that somebody else ran under a recorder, None where it does not fit the plan.

        It does not hold the outputs' graph, but what lies below.
        """
        record = Pass(raw, outputs.detach(), recorder.calls, recorder.formless, recorder.examples)
        plan = self._plan
        if plan is None or not plan.fits(record):
            return None
        return Recorded(record, plan, self._parameters)

    def _sampled_plan(self, raw: Any) -> Plan | None:
        """The plan from the first examples of a batch, or None where it cannot be cut.

        If dimension 0 were not the examples, cutting it twice would not cut the outputs twice.
        """
        tensors = [t for t in tree.tensors(raw) if t.dim() > 0]
        n = tensors[0].shape[0] if tensors else 0
        if n <= SAMPLED:
            return None
        try:
            record = self._record(cut(raw, example_leaves(raw, n), slice(0, SAMPLED)))
        except Exception:  # noqa: BLE001 - a batch that cannot be cut is recorded whole
            return None
        if record.n != SAMPLED:
            return None
        plan = self._replan(record)
        return plan if plan.cutter is not None else None

    def recorder(self, raw: Any, *, training: bool = False) -> Recorder:
        """A recorder of a pass over this batch."""
        return self._recorder(raw, training, None if self._plan is None else self._plan.constants)

    def _recorder(self, raw: Any, training: bool, examples: Sequence[bool] | None) -> Recorder:
        return Recorder(
            self._model,
            self._parameters,
            raw,
            training=training,
            through=self._through,
            examples=examples,
        )

    def _record(self, raw: Any, examples: Sequence[bool] | None = None) -> Pass:
        with (
            self.recorder(raw)
            if examples is None
            else self._recorder(raw, False, examples) as recorder
        ):
            outputs = self._forward(self._model, raw)
        return Pass(raw, outputs, recorder.calls, recorder.formless, recorder.examples)

    def _replan(self, record: Pass) -> Plan:
        if not bool(record.outputs.isfinite().all()):
            raise NonFiniteError(
                "expected finite outputs, but the model gives NaN or infinity on the first batch: "
                "check the inputs, and the training that led to these parameters"
            )
        if record.outputs.grad_fn is None:
            raise DataError(
                "the outputs do not depend on any selected parameter: select others with params=, "
                "and check that the forward pass does not run under no_grad or detach"
            )
        few = self._few(record)
        if few is not None and few.examples != record.examples:
            # as many positions as examples, by accident: the few examples tell
            record = self._record(record.raw, few.examples)
        plan = None if few is None else self._prove(few)
        if plan is None or not plan.fits(record):
            plan = self._prove(record)
        before = self._plan
        if before is not None and [(p.names, p.layout, p.kind) for p in plan.parts] != [
            (p.names, p.layout, p.kind) for p in before.parts
        ]:
            raise UnsupportedLayerError(
                "expected every batch to use the parameters in the same way, but a later batch "
                f"calls {_differing(before.keys, record.keys)}: use batches of one kind"
            )
        if few is not None and few.raw is not record.raw:
            return replace(plan, cutter=Cutter.of(record.raw, record.n, plan.bytes(record)))
        return plan

    def _few(self, record: Pass) -> Pass | None:
        """A few examples of the batch on their own, or None where the batch cannot be cut.

        The outputs must be the same as within the batch: one fixed function, one example at a time.
        """
        n, outputs = record.n, record.outputs.detach()
        if n < 1:
            raise DataError(
                f"expected at least one example in each batch, got outputs {tuple(outputs.shape)}: "
                "drop empty batches from the loader"
            )
        index = torch.tensor(sorted({0, n // 2, n - 1})[:PROBED])
        alone = None
        if n > 1:
            kept = index if n > PROBED else index[:1]
            leaves = example_leaves(record.raw, n)
            alone = self._try(cut(record.raw, leaves, kept), record, len(kept))
        same = self._record(record.raw) if alone is None or n <= PROBED else None
        if same is not None and not agree(same.outputs, outputs, OUTPUTS_AGREE):
            raise StochasticModelError(
                "expected one fixed function, but two forward passes of the same batch differ: "
                "call model.eval(), and remove sampling from the forward pass"
            )
        if alone is None:
            return same
        if not agree(alone.outputs, outputs[kept.to(outputs.device)], OUTPUTS_AGREE):
            again = self._record(alone.raw)
            if not agree(again.outputs, alone.outputs, OUTPUTS_AGREE):
                raise StochasticModelError(
                    "expected one fixed function, but two forward passes of the same examples "
                    "differ: call model.eval(), and remove sampling from the forward pass"
                )
            raise StochasticModelError(
                "expected a model that treats each example on its own, but the outputs of "
                f"{len(kept)} examples change when the {n - len(kept)} others are left out: per-"
                "example gradients do not exist for it. Batch statistics? Call model.eval()"
            )
        return same or alone

    def _try(self, raw: Any, record: Pass, n: int) -> Pass | None:
        try:
            alone = self._record(raw)
        except Exception:  # noqa: BLE001 - a batch that cannot be cut is probed whole
            return None
        same = alone.outputs.shape == (n, *record.outputs.shape[1:]) and alone.keys == record.keys
        return alone if same else None

    def _prove(self, record: Pass) -> Plan:
        """The self-check (see `plan`) on a recorded pass."""
        outputs, calls, n = record.outputs, record.calls, record.n
        generator = torch.Generator(device=outputs.device).manual_seed(0)
        edges = [call.edge for call in calls]
        leaves = list(self._parameters.values())
        chosen = sorted({0, n - 1})
        noise = torch.randn(
            (len(chosen), *outputs.shape[1:]), generator=generator, device=outputs.device
        )
        cotangent = torch.zeros_like(outputs)
        cotangent[chosen] = noise.to(outputs.dtype)
        first = torch.zeros_like(outputs)
        first[0] = cotangent[0]
        # Confined to its example each, both can be compared with autograd in one sum.
        found = gradients_at(outputs, [*edges, *leaves], cotangent)
        probes = [Probe((*chosen,), cotangent, found[: len(edges)])]
        if len(chosen) > 1:
            probes.append(Probe((0,), first, gradients_at(outputs, edges, first)))
        found = found[len(edges) :]
        dense = [g.to_dense() if g is not None and g.is_sparse else g for g in found]
        gradients = dict(zip(self._parameters, dense, strict=True))
        if all(g is None for g in found):
            raise DataError("the outputs do not depend on any selected parameter")
        folds = probe_folds(calls, probes, n)
        parts = self._demote(record, folds, probes, gradients)
        names = [name for part in parts if part.kind is Kind.GENERAL for name in part.names]
        general = None
        if names:
            without = {name: self._parameters[name] for name in names}
            general = GeneralRows(self._model, without, self._forward)
            general.probe(record.raw, outputs, cotangent, chosen)
        return Plan(record.keys, parts, folds, general, n, record.examples)

    def _demote(
        self,
        record: Pass,
        folds: list[Fold | None],
        probes: Sequence[Probe],
        gradients: Mapping[str, Tensor | None],
    ) -> list[Part]:
        """The parts, with all whose rows are not autograd's on the general way."""
        general = dict(record.formless)
        unused = {name for name, gradient in gradients.items() if gradient is None}
        for call, fold in zip(record.calls, folds, strict=True):
            if fold is None:
                note = f"the output of {call.function} {tuple(call.shape)} has no example axis"
                note = f"{call.note} ({note})" if call.note else note
                names = {name for weight in call.weights.values() for name in weight.names}
                general.update(dict.fromkeys(names, note))
        for part in make_parts(self._space, record.calls, general, unused):
            if not part.members:
                continue
            found = Probed(record.calls, folds, probes, gradients, self._parameters, self._space)
            if why := found.disagreement(part, record.n):
                general.update(dict.fromkeys(part.names, why))
        return make_parts(self._space, record.calls, general, unused)


def _differing(before: list[tuple[str, ...]], now: list[tuple[str, ...]]) -> str:
    for old, new in zip(before, now, strict=False):
        if old != new:
            return f"{new} where {old} was called before"
    return f"{len(now)} layers where {len(before)} were called before"
