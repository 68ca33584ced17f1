"""A training loop as seen from its model: forward passes, recorded and scored on the way."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..data import outputs_of
from ..errors import DataError, SpaceMismatchError, UnsupportedLayerError
from ..jacobian.capture import Capture, Recorded
from ..jacobian.plan import Part
from ..jacobian.record import Recorder, in_build, plain_functions, recording
from ..jacobian.registry import whole_modules
from ..space import ParamSpace
from .hooks import Hooks
from .replay import Replay, float_math

__all__ = ["Loop", "Passed", "Scorer"]

Outputs = Callable[[Any], Tensor]
_KEYS = itertools.count()  # of passes
_SCORED: set[int] = set()  # where outputs lie whose hooks a backward pass of a scorer comes by


class Scorer(Protocol):
    """What is done with a recorded pass once its loss is differentiated."""

    @property
    def empirical(self) -> bool:
        """Whether it takes the loop's own gradients at the layers."""

    def arrived(self, passed: Passed, recorded: Recorded) -> None:
        """The gradient at the outputs arrived; the graph below them is still whole."""


@dataclass
class Passed:
    """A forward pass of the loop, and what its backward pass brought.

    Attributes:
        outputs: (N, ...), detached.
        replay: how to run it again, where that may be needed.
        gradient: of the loop's loss at the outputs.
        recorded: its layers, where the loop's own gradients at them are wanted.
        at_layers: those gradients, by the index of the recorded edge.
    """

    outputs: Tensor
    replay: Replay | None = None
    gradient: Tensor | None = None
    recorded: Recorded | None = None
    at_layers: dict[int, Tensor] = field(default_factory=dict)


class _Running(NamedTuple):
    """What is open during a forward pass."""

    stack: ExitStack
    recorder: Recorder | None
    raw: Any
    replay: Replay | None


class Loop:
    """The passes of a model between two steps.

    Layers are recorded in the loop's own forward pass. Their forms are proved before the first one,
    in evaluation mode and on a few examples, since batch statistics and dropout make rows of single
    examples meaningless; what has no form is left out of the space.

    Args:
        model: the network.
        space: the parameters whose curvature is wanted.
        outputs: picks the outputs from what the model returns.

    Attributes:
        space: the parameters that have a form; all of them until the first recorded pass.
        plain: the others, and why.
        scorer: what recorded passes are for.
        recording: whether the layers of the next passes are to be recorded.
        replaying: whether the next passes are to be run again.
        passes: those whose loss was differentiated since the last step.
        seen: how many there were, differentiated or not.
    """

    def __init__(self, model: nn.Module, space: ParamSpace, outputs: Outputs | None) -> None:
        self.model, self.space = model, space
        self.plain: dict[str, str] = {}
        self.scorer: Scorer | None = None
        self.recording = self.replaying = False
        self.passes: list[Passed] = []
        self.seen = 0
        self._outputs = _default_outputs if outputs is None else outputs
        self._parameters = space.parameters(model)
        self._capture: Capture | None = None
        self._running: _Running | None = None
        self._waiting: dict[int, tuple[Passed, Recorded | None, int]] = {}  # for their gradients
        self.hooks = Hooks(model, self)

    @property
    def parts(self) -> Sequence[Part]:
        """The parameters by form; known after the first recorded pass."""
        return () if self._capture is None else self._capture.parts

    def forget(self, everything: bool = False) -> None:
        """Drop the passes whose loss was differentiated, or those that still may be, too."""
        kept = {} if everything else self._waiting
        self._waiting = {k: each for k, each in kept.items() if each[0].gradient is None}
        self.passes, self.seen = [], len(self._waiting)

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A pass starts: record it, or keep what is needed to run it again."""
        if in_build() or self._others():
            return  # of FIM and the like, or a functional call with other parameters
        replay = None
        if self.replaying:
            replay = Replay.of(args, kwargs, self.space, self._outputs, self.hooks)
        recorder = None
        stack = ExitStack()
        if self.recording and self.scorer is not None:
            if self._capture is None:
                self._capture = self._first_plan((args, kwargs))
            recorder = Recorder(self.space.parameters(self.model), training=True)
            for scope in (plain_functions(), whole_modules(self.model), recorder):
                stack.enter_context(scope)
        self._running = _Running(stack, recorder, (args, kwargs), replay)

    def end(self, result: Any) -> None:
        """It ended, with None where it raised: wait for the gradient at its outputs."""
        if self._running is None:
            return
        (stack, recorder, raw, replay), self._running = self._running, None
        stack.close()
        if result is None:
            return
        outputs = self._outputs(result)
        if not outputs.requires_grad:
            return
        self.seen += 1
        recorded = None if recorder is None else self._recorded(raw, outputs, recorder)
        self._wait(outputs, Passed(outputs.detach(), replay), recorded)

    def _wait(self, outputs: Tensor, passed: Passed, recorded: Recorded | None) -> None:
        """Hooks know a number and no pass: what holds a graph must not hang on that graph."""
        key = next(_KEYS)
        self._waiting[key] = passed, recorded, outputs._version
        outputs.register_hook(_Arrival(weakref.ref(self), key))
        if recorded is not None and self.scorer is not None and self.scorer.empirical:
            passed.recorded = recorded
            for k, edge in enumerate(recorded.edges):
                edge.node.register_prehook(_AtLayer(weakref.ref(self), key, k, edge.output_nr))

    def arrived(self, key: int, gradient: Tensor) -> None:
        """The gradient at the outputs of a pass arrived."""
        passed, recorded, version = self._waiting.get(key, (None, None, 0))
        if passed is None or passed.gradient is not None:
            return
        where = passed.outputs.data_ptr()
        if where in _SCORED:
            return
        if passed.outputs._version != version:
            raise DataError(
                "expected the model's outputs as it returned them, but they were modified in place "
                "since: write outputs = outputs * c in the place of outputs *= c"
            )
        passed.gradient = gradient.detach()
        self.passes.append(passed)
        if recorded is not None and self.scorer is not None:
            _SCORED.add(where)
            try:
                with torch.enable_grad(), float_math(gradient.device):
                    self.scorer.arrived(passed, recorded)
            finally:
                _SCORED.remove(where)
        self._waiting[key] = passed, None, version

    def at_layer(self, key: int, k: int, gradient: Tensor) -> None:
        """The loop's gradient at a recorded edge of a pass arrived."""
        passed = self._waiting.get(key, (None,))[0]
        if passed is not None:
            before = passed.at_layers.get(k)
            passed.at_layers[k] = gradient if before is None else before + gradient

    # --- plans -----------------------------------------------------------------------------------

    def _first_plan(self, raw: Any) -> Capture:
        """A plan for the parameters that have a form."""
        while True:
            capture = Capture(self.model, self.space, self._forward)
            parts = self._prove(capture, raw)
            general = {name: p.note for p in parts if p.kind == "general" for name in p.names}
            if not general:
                return capture
            self.plain.update(general)
            kept = [name for name in self.space.names if name not in general]
            if all(part.kind in ("general", "unused") for part in parts):
                raise UnsupportedLayerError(
                    f"found no form for any of the parameters {list(self.space.names)}: take "
                    "representation='implicit', or tell how their layers are differentiated with "
                    "ng.register_layer"
                )
            self.space = self.space.subspace(kept)

    def _recorded(self, raw: Any, outputs: Tensor, recorder: Recorder) -> Recorded:
        if self._capture is None:
            raise RuntimeError("no plan for a recorded pass")
        recorded = self._capture.observed(raw, outputs, recorder)
        if recorded is None:  # a batch of another kind
            self._prove(self._capture, raw)
            recorded = self._capture.observed(raw, outputs, recorder)
        if recorded is None:
            raise UnsupportedLayerError(
                "expected a forward pass in training mode to call the layers that it calls in "
                "evaluation mode, where their forms are proved, but it calls "
                f"{[call.function for call in recorder.calls]}: leave out the parameters that make "
                "the difference with params=, or take representation='implicit'"
            )
        return recorded

    def _prove(self, capture: Capture, raw: Any) -> list[Part]:
        parameters = self.space.parameters(self.model)
        with (
            self.hooks.paused(),
            _evaluating(self.model),
            float_math(self.space.device),
            recording(self.model, parameters),
        ):
            return capture.prove(raw)

    def _forward(self, model: nn.Module, raw: Any) -> Tensor:
        args, kwargs = raw
        return self._outputs(model(*args, **kwargs))

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


def _default_outputs(result: Any) -> Tensor:
    return outputs_of(result, "pass outputs=lambda result: ..., which picks them")


@dataclass(frozen=True)
class _Arrival:
    """A hook at the outputs of a pass."""

    loop: weakref.ref[Loop]
    key: int

    def __call__(self, gradient: Tensor) -> None:
        loop = self.loop()
        if loop is not None:
            loop.arrived(self.key, gradient)


@dataclass(frozen=True)
class _AtLayer:
    """A hook at one output of a node of the graph."""

    loop: weakref.ref[Loop]
    key: int
    edge: int
    output: int

    def __call__(self, gradients: tuple[Tensor | None, ...]) -> None:
        loop, gradient = self.loop(), gradients[self.output]
        if loop is not None and gradient is not None:
            loop.at_layer(self.key, self.edge, gradient)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, every module is in evaluation mode."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True
