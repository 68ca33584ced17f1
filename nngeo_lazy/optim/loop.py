"""A training loop as seen from its model: forward passes, recorded and scored on the way."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ..collectives import within_replicas
from ..errors import (
    DataError,
    LikelihoodWarning,
    SelfCheckWarning,
    SpaceMismatchError,
    UnsupportedLayerError,
)
from ..jacobian.capture import Capture, Recorded, UnprovedError
from ..jacobian.parts import Kind, Part
from ..jacobian.passes import gradients_at
from ..jacobian.record import Recorder
from ..jacobian.registry import whole_modules
from ..jacobian.scopes import in_build, plain_functions, recording
from ..likelihoods.heads import Heads, joint
from ..operators.warn import warn
from ..space import ParamSpace
from .hooks import Hooks
from .noise import evaluating, proved
from .passed import Mark, Passed, Run
from .replay import Replay, float_math
from .saving import common_module
from .setup import UNUSED

__all__ = ["Loop", "Scorer"]

_DERIVED = (
    "the loss seems to use derivatives of the network's outputs (create_graph=True), which the "
    "curvature leaves out: if they are most of the loss, let the model's forward pass make and "
    "return them, and take representation='implicit'"
)
_LEFT_OUT = "The curvature was not refreshed; if this comes often, take 'implicit', or float64"
_ROUNDED = "This is taken for rounding; if it is more, take representation='implicit', or float64"


class Scorer(Protocol):
    """What is done with a recorded pass once its loss is differentiated."""

    @property
    def empirical(self) -> bool:
        """Whether it takes the loop's own gradients at the layers."""

    def arrived(self, passed: Passed, recorded: Recorded, root: GradientEdge) -> None:
        """The gradient at the outputs, the root, arrived; the graph below is still whole."""

    def arrived_again(self, passed: Passed, gradient: Tensor) -> None:
        """That of another loss arrived; the pass has the sum of both."""

    def refuse(self) -> bool:
        """A pass has no forms: the step's are left out, if there is a curvature to go on with."""

    def drop(self) -> None:
        """Forget what has arrived since the last step."""


class _Running(NamedTuple):
    """What is open during a forward pass."""

    stack: ExitStack
    recorder: Recorder | None
    raw: Any
    replay: Replay | None


class Loop:
    """The passes of a model between two steps.

    Layers are recorded in the loop's own forward pass. Their forms are proved before the first one,
    in evaluation mode and on a few examples: batch statistics and dropout make rows of single
    examples meaningless. What has no form is left out of the space.

    Args:
        model: the network.
        space: the parameters whose curvature is wanted.
        heads: pick the outputs from what the model returns.
        alone: whether no other process trains the same model.

    Attributes:
        space: the parameters that have a form; all of them until the first recorded pass.
        plain: the others, and why.
        independent: the parameters that the outputs do not depend on; known if passes are kept
            to be run again.
        scorer: what recorded passes are for.
        recording: whether the layers of the next passes are to be recorded.
        replaying: whether the next passes are to be run again.
        sorting: whether the parameters are wanted that the outputs do not depend on.
        passes: those whose loss was differentiated since the last step.
        seen: how many there were, differentiated or not.
    """

    def __init__(
        self, model: nn.Module, space: ParamSpace, heads: Heads, alone: bool = True
    ) -> None:
        self.model, self.space = model, space
        self.plain: dict[str, str] = {}
        self._scorer: weakref.ref[Scorer] | None = None
        self.independent: set[str] | None = None
        self.recording = self.replaying = self.sorting = False
        self._derived = self._warned = False  # a derivative that has a graph of its own
        self._checked = False  # whether a self-check that failed has been told
        self.passes: list[Passed] = []
        self.seen = 0
        self._heads, self._alone = heads, alone
        self._parameters = space.parameters(model)
        self._capture: Capture | None = None
        self._running: _Running | None = None
        self.hooks = Hooks(model, self)

    @property
    def scorer(self) -> Scorer | None:
        """Held weakly, so that an optimizer that is dropped is gone at once."""
        return None if self._scorer is None else self._scorer()

    @scorer.setter
    def scorer(self, scorer: Scorer) -> None:
        self._scorer = weakref.ref(scorer)

    @property
    def parts(self) -> Sequence[Part]:
        """The parameters by form; known after the first recorded pass."""
        return () if self._capture is None else self._capture.parts

    def forget(self) -> None:
        """Drop the passes whose loss was differentiated; others may still be."""
        for passed in self.passes:
            passed.run.recorded, passed.run.counts = None, False
        self.passes, self.seen, self._derived = [], 0, False
        if self.scorer is not None:
            self.scorer.drop()

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A pass starts: record it, or keep what is needed to run it again."""
        if in_build() or _in_functorch() or self._others():
            return  # of FIM and the like, or a functional call with other parameters
        self.end(None)  # of a pass that was interrupted
        if self.passes and all(p.grad is None for p in self._parameters.values()):
            self.forget()  # model.zero_grad()
        replay = None
        if self.replaying:
            replay = Replay.of(args, kwargs, self.space, self._heads, self.hooks)
        recorder = None
        stack = ExitStack()
        if self.recording and self.scorer is not None:
            if self._alone and within_replicas(self.model):
                raise DataError(
                    "expected a model in one process, but DistributedDataParallel calls the one "
                    "that the optimizer was made with, and its replicas would drift apart: make "
                    "the optimizer with the wrapper"
                )
            if self._capture is None:
                self._capture = self._first_plan((args, kwargs))
            recorder = self._capture.recorder((args, kwargs), training=True)
        self._running = _Running(stack, recorder, (args, kwargs), replay)  # what `end` closes
        if recorder is not None:
            for scope in (plain_functions(), whole_modules(self.model), recorder):
                stack.enter_context(scope)

    def end(self, result: Any) -> None:
        """It ended, with None if it raised: wait for the gradient at its outputs."""
        if self._running is None:
            return
        stack, recorder, raw, replay = self._running
        stack.close()  # an interrupt in it leaves the pass running: the next one closes it
        self._running = None
        if result is None:
            return
        try:
            heads = self._heads(result)
        except DataError:
            if self.model.training:
                raise
            return  # what a model returns in evaluation mode may be of another kind
        live = [k for k, outputs in enumerate(heads) if outputs.requires_grad]
        if not live:
            return
        self.seen += 1
        recorded = None if recorder is None else self._recorded(raw, joint(heads), recorder)
        run = Run(Mark.of([heads[k] for k in live]), replay)
        if self.sorting and self.independent is None:
            self.independent = self._without_influence(joint(heads), run.mark)
        for k in live:
            self._wait(heads[k], Passed(heads[k].detach(), run, k), recorded)

    def _without_influence(self, outputs: Tensor, mark: Mark) -> set[str]:
        """The parameters that the outputs do not depend on: heads of other losses."""
        cotangent = torch.zeros_like(outputs)
        with mark.scored():
            found = gradients_at(outputs, list(self._parameters.values()), cotangent)
        return {name for name, g in zip(self._parameters, found, strict=True) if g is None}

    def _wait(self, outputs: Tensor, passed: Passed, recorded: Recorded | None) -> None:
        """Hooks hold what lies below them, and nothing that holds them: graphs end as ever."""
        if recorded is not None:
            recorded = replace(recorded, record=replace(recorded.record, outputs=passed.outputs))
        arrival = _Arrival(weakref.ref(self), passed, recorded, outputs._version, outputs.output_nr)
        edge = _uncast(outputs)
        if edge is None:
            outputs.register_hook(arrival)
        else:
            arrival.output = edge.output_nr
            edge.node.register_prehook(_AtCast(arrival))

    def arrived(self, arrival: _Arrival, gradient: Tensor | None) -> None:
        """The gradient at the outputs of a pass arrived; None of a compiled model's own loss."""
        passed, recorded = arrival.passed, arrival.recorded
        run = passed.run
        if run.mark.scoring:
            return
        if not self._reaches_parameters():
            self._derived |= torch.is_grad_enabled()  # with create_graph=True
            return
        if self._derived and not self._warned:
            self._warned = True
            warn(LikelihoodWarning(_DERIVED))
        if gradient is None:
            run.counts = True
            self.passes.append(passed)
            return
        if passed.outputs._version != arrival.version:
            raise DataError(
                "expected the model's outputs as it returned them, but they were modified in place "
                "since: write outputs = outputs * c in the place of outputs *= c"
            )
        before, gradient = passed.gradient, gradient.detach()
        again = before is not None
        run.counts = True
        passed.gradient = gradient if before is None else before + gradient
        if not again:
            self.passes.append(passed)
        if self.scorer is None or (recorded is None and not again):
            return
        root = GradientEdge(torch._C._current_autograd_node(), arrival.output)
        with torch.enable_grad(), float_math(gradient.device), run.mark.scored():
            if recorded is not None:
                arrival.recorded = None
                collecting = run.recorded is not None
                self.scorer.arrived(passed, recorded, root)
                if self.scorer.empirical and not collecting:  # layers below are still to be reached
                    for k, edge in enumerate(recorded.edges):
                        edge.node.register_prehook(_AtLayer(run, k, edge.output_nr))
            else:
                self.scorer.arrived_again(passed, gradient)

    def _reaches_parameters(self) -> bool:
        """Whether the backward pass that runs brings gradients to parameters.

        One that only asks for those of inputs (an adversarial example, a penalty) is no step's.
        """
        for p in self._parameters.values():
            if p.requires_grad:
                try:
                    if torch._C._will_engine_execute_node(get_gradient_edge(p).node):
                        return True
                except RuntimeError:  # autograd.grad(loss, parameters)
                    return True
        return False

    # --- plans -----------------------------------------------------------------------------------

    def _first_plan(self, raw: Any) -> Capture:
        """A plan for the parameters that have a form."""
        while True:
            # Scores of drawn labels are taken before the loop's own backward pass, which frees what
            # leads from weights to parameters, and observed ones behind it.
            through = self.scorer is not None and not self.scorer.empirical
            forward = _Forward(self._heads)
            capture = Capture(self.model, self.space, forward, through=through, ahead=True)
            parts = self._prove(capture, raw)
            out = [part for part in parts if part.kind in (Kind.GENERAL, Kind.UNUSED)]
            if not out:
                return capture
            for part in out:
                note = UNUSED if part.kind is Kind.UNUSED else part.note
                self.plain.update(dict.fromkeys(part.names, note))
            kept = [name for name in self.space.names if name not in self.plain]
            if not kept:
                drawn = "" if through else "estimator='mc' or "
                raise UnsupportedLayerError(
                    f"found no form for any of the parameters {list(self.space.names)}: take "
                    f"{drawn}representation='implicit', or tell how their layers are "
                    "differentiated with ng.register_layer"
                )
            self.space = self.space.subspace(kept)

    def _recorded(self, raw: Any, outputs: Tensor, recorder: Recorder) -> Recorded | None:
        if self._capture is None:
            raise RuntimeError("no plan for a recorded pass")
        recorded = self._capture.observed(raw, outputs, recorder)
        if recorded is None:  # a batch of another kind
            refused = None
            try:
                self._prove(self._capture, raw)
            except UnprovedError as error:  # by rounding, if these functions passed before
                refused = error
            recorded = self._capture.observed(raw, outputs, recorder, proved=True)
            if refused is not None and (recorded is None or recorded.plan.ragged):
                if self.scorer is None or not self.scorer.refuse():
                    raise refused
                warn(SelfCheckWarning(f"{refused}. {_LEFT_OUT}"))
                return None
            if refused is not None and not self._checked:
                self._checked = True
                warn(SelfCheckWarning(f"{refused}. {_ROUNDED}"))
        if recorded is None:
            frozen = [n for n in self.space.names if not self._parameters[n].requires_grad]
            if frozen:
                raise DataError(
                    f"expected the parameters {frozen[:3]} to be trained as when the optimizer was "
                    "made, but they were frozen since: make a new optimizer"
                )
            raise UnsupportedLayerError(
                "expected a forward pass in training mode to call the layers that it calls in "
                "evaluation mode, where their forms are proved, but it calls "
                f"{[call.function for call in recorder.calls]}: leave out the parameters that make "
                "the difference with params=, or take representation='implicit'"
            )
        return recorded

    def _prove(self, capture: Capture, raw: Any) -> list[Part]:
        with (
            self.hooks.paused(),
            evaluating(self.model),
            float_math(self.space.device),
            recording(self.model, self.space.parameters(self.model)),
        ):
            return proved(lambda: capture.prove(raw), self.space.device)

    def require_passes(self) -> None:
        """Refuse a step without a forward pass that its gradients came from."""
        if self.passes:
            return
        if self.seen:
            raise DataError(
                "expected a loss that is made from the outputs of the model's last forward pass, "
                "but none of them got a gradient: call loss.backward() on it (not detached), make "
                "the loss from what the model itself returns, and let outputs= pick a tensor of it "
                "rather than make one"
            )
        touched = [name for name, p in self._parameters.items() if p.grad is not None]
        called = common_module(touched)
        part = f" ({called!r} has all gradients: if the loop calls it, pass it)" if called else ""
        raise DataError(
            "expected a forward pass of the model with autograd on since the last step, but saw "
            f"none{part}: call the model that the optimizer was made with (the compiled one, if it "
            "is compiled) as model(x), not a part of it and not model.forward(x)"
        )

    def require_same_parameters(self) -> None:
        """Refuse a model whose parameters are not those that are watched any more."""
        if others := self._others():
            raise SpaceMismatchError(
                f"expected the parameters that the optimizer was made with, but {others[:3]} are "
                "other tensors now (assigned, pruned, parametrised or converted since): make a new "
                "optimizer"
            )

    def _others(self) -> list[str]:
        now = dict(self.model.named_parameters())
        return [name for name, p in self._parameters.items() if now.get(name) is not p]


@dataclass(frozen=True)
class _Forward:
    """The outputs of a model for what a loop called it with."""

    heads: Heads

    def __call__(self, model: nn.Module, raw: Any) -> Tensor:
        args, kwargs = raw
        return joint(self.heads(model(*args, **kwargs)))


def _in_functorch() -> bool:
    """Whether a transform of torch.func runs."""
    return torch._C._functorch.peek_interpreter_stack() is not None


@dataclass
class _Arrival:
    """A hook at the outputs of a pass."""

    loop: weakref.ref[Loop]
    passed: Passed
    recorded: Recorded | None
    version: int
    output: int

    def __call__(self, gradient: Tensor | None) -> None:
        loop = self.loop()
        if loop is not None:
            loop.arrived(self, gradient)


@dataclass
class _AtCast:
    """A hook at outputs that the model returns a copy of, in another dtype."""

    arrival: _Arrival

    def __call__(self, gradients: tuple[Tensor | None, ...]) -> None:
        gradient = gradients[self.arrival.output]
        if gradient is not None:
            self.arrival(gradient)


def _uncast(outputs: Tensor) -> GradientEdge | None:
    """Below a cast of the outputs, from which a model may have made its own loss."""
    edge, found = get_gradient_edge(outputs), None
    while edge.node.name() == "ToCopyBackward0":
        node, output = edge.node.next_functions[0]
        if node is None:
            break
        edge = found = GradientEdge(node, output)
    return found


@dataclass
class _AtLayer:
    """A hook at one output of a node of the graph."""

    run: Run
    edge: int
    output: int

    def __call__(self, gradients: tuple[Tensor | None, ...]) -> None:
        gradient, run = gradients[self.output], self.run
        if gradient is None or not run.counts or run.mark.scoring:
            return
        before = run.at_layers.get(self.edge)
        run.at_layers[self.edge] = gradient if before is None else before + gradient
