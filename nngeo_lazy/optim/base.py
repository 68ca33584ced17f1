"""What both optimizers do: watch a loop, keep its curvature, and make directions with it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError, NonFiniteError
from ..likelihoods.heads import Heads
from ..operators import BaseLinearOperator
from ..operators.report import Report
from ..representations import Factored
from ..selectors import space_of
from ..space import ParamSpace
from .curvature import Curvature
from .direction import Direction
from .exact import exact_curvature, mean_eigenvalue
from .framing import Framing
from .loop import Loop
from .loss import Loss
from .measure import Reading, Touched, changed, read
from .options import Options
from .passed import examples_of
from .replay import float_math
from .saving import checked_state, restored
from .scores import Scores
from .setup import (
    UNUSED,
    agree,
    checked_damping,
    first_damping,
    group_of,
    groups_of,
    reported,
    require_whole,
    resolved,
    warn_skipped,
)
from .solving import Dampings, Vectors, conjugate_gradients
from .whole import Whole, worked_on

__all__ = ["CurvatureOptimizer"]

VERSION = 2


class CurvatureOptimizer(torch.optim.Optimizer):
    """The curvature of a loop, refreshed every so many steps, as a `torch.optim.Optimizer`.

    Args:
        model: the network whose forward passes are watched.
        defaults: of the parameter groups' options but the damping.
        params: selectors or tensors, or a list of groups {"params": either, option: value, ...}.
        options: all else.
    """

    def __init__(
        self, model: nn.Module, defaults: dict[str, Any], params: Any, options: Options
    ) -> None:
        require_whole(model)
        self._given, self._options = model, options
        self._model, self._group = worked_on(model)
        self._whole = Whole(model, self._model, options, weakref.ref(self))
        self._watching = False
        defaults = {**defaults, "damping": first_damping(options.damping)}
        groups = groups_of(self._model, self._whole.named(params))
        named = [pair for group in groups for pair in group["params"]]
        self._following = [k for k, group in enumerate(groups) if "damping" not in group]
        super().__init__([self._whole.pieces(group) for group in groups], defaults)
        self._free, self._stored = resolved(options.representation)
        if self._free is not None or isinstance(self._stored, Factored):
            # the curvature of one batch is singular if the gradients of others are not zero
            self._options = replace(options, momentum=0.0)
        kinds = [] if self._free is None else ["HessianFree"]
        stored = [] if self._stored is None else [self._stored.described()]
        self._kind = " with ".join([*kinds, *stored])
        agree(self._group, named, self._options, self._kind)
        self._steps = 0
        self._started = 0  # the step that the present parameters were first watched at
        self._skipped = torch.zeros((), dtype=torch.int64, device="cpu")
        self._warned = 0
        self._watch(None)

    def _watch(self, before: Direction | None) -> None:
        """Watch the parameters that the groups have now."""
        names = [name for group in self.param_groups for name in group["param_names"]]
        options = self._options
        self._space: ParamSpace = space_of(self._model, names)
        self._parameters = self._space.parameters(self._model)
        self._dtype = torch.promote_types(self._space.dtype, torch.float32)
        self._skipped = self._skipped.to(self._space.device)
        self._inverted: int | None = None  # the step of the last decomposition
        heads = Heads.of(options.likelihood, options.outputs)
        self._loop = Loop(self._model, self._space, heads, self._group.size == 1)
        self._touched = Touched(self._parameters)
        self._curvature: Curvature | None = None
        if self._stored is not None:
            self._curvature = Curvature(self._loop, self._stored, options, self._group)
        self._scores = (
            Scores(options.likelihood, "exact")
            if self._curvature is None
            else self._curvature.scores
        )
        self._exact: BaseLinearOperator | None = None  # of this step's passes, once it is asked for
        self._solution: Tensor | None = None  # where the next iteration starts
        like = torch.zeros((), dtype=self._dtype, device=self._space.device)
        self._framing = Framing(self._space, self._parameters, options, like)
        self._framing.take_over(before)
        self._loss = Loss()
        self._reading: Reading | None = None  # of the passes of this step
        self._watching = True
        self._prepare()

    # --- public ----------------------------------------------------------------------------------

    @property
    def operator(self) -> BaseLinearOperator:
        """The curvature F, undamped: its running average, or for "implicit" that of the last step.

        Raises:
            DataError: there was no step yet.
        """
        F = self._exact
        if self._free is None:
            F = None if self._curvature is None else self._curvature.operator
        if F is None:
            raise DataError(
                "expected a step before the curvature is asked for: there is none before the first "
                "backward pass"
            )
        return F

    @property
    def skipped_steps(self) -> int:
        """How many steps were left out since their gradients were not finite."""
        return int(self._skipped)

    def report(self) -> Report:
        """One row for each parameter: its block, or why it takes the plain gradient."""
        plain = {**dict.fromkeys(self._loop.independent or (), UNUSED), **self._loop.plain}
        return reported(self.operator, self._space, plain, self._free is not None)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset all gradients, and forget what their passes told of the curvature."""
        super().zero_grad(set_to_none)
        self._whole.forget()
        self._loop.forget()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Train more parameters; the curvature is that of all of them from the next step on.

        Its running averages start anew, with their warm-up.
        """
        if not self._watching:
            super().add_param_group(param_group)
            return
        group = group_of(self._model, self._whole.named(param_group))
        super().add_param_group(self._whole.pieces(group))
        if "damping" not in param_group:
            self._following.append(len(self.param_groups) - 1)
        self._started = self._steps
        self._watch(self._framing.direction)

    # --- state -----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As of every optimizer, with the curvature: all that the next step depends on."""
        state = super().state_dict()
        direction = self._framing.direction
        state["curvature"] = {
            "version": VERSION,
            "representation": self._kind,
            "parameters": {n: list(p.shape) for n, p in self._parameters.items()},
            "steps": self._steps,
            "started": self._started,
            "inverted": self._inverted,
            "skipped": self._skipped.clone(),
            "warned": self._warned,
            "solution": None if self._solution is None else self._solution.clone(),
            "loss": self._loss.state(),
            "direction": None if direction is None else direction.state(),
            "statistics": None if self._curvature is None else self._curvature.state(),
        }
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a state; the next steps are those that would have come.

        Raises:
            SpaceMismatchError: it is the state of other parameters.
            DataError: it is no state of such an optimizer.
        """
        held = checked_state(state_dict, VERSION, self._parameters, self._kind)
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "curvature"})

        def here(value: Any) -> Any:
            return value.to(self._space.device).clone() if isinstance(value, Tensor) else value

        parameters = [p for group in self.param_groups for p in group["params"]]
        for k, state in state_dict["state"].items():  # torch casts to the parameters' dtype
            for name, value in state.items():
                self.state[parameters[k]][name] = here(value)
        self._watch(None)
        self._steps, self._warned = int(held["steps"]), int(held["warned"])
        self._started, self._inverted = int(held["started"]), held["inverted"]
        self._skipped, self._solution = here(held["skipped"]), here(held["solution"])
        self._loss = Loss.of(held["loss"], self._space.device)
        if self._curvature is not None:
            self._curvature.restore(held["statistics"])
        if held["direction"] is not None:
            F = None if self._curvature is None else self._curvature.solved
            self._framing.restore(held["direction"], F, self.param_groups, self._loss)
        self._prepare()

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles take the model along, as those of every optimizer take parameters."""
        hidden = ("params", "param_names")
        groups = [
            {**{k: v for k, v in g.items() if k not in hidden}, "params": list(g["param_names"])}
            for g in self.param_groups
        ]
        made = (type(self), self._given, self._arguments(), groups, self._following)
        return restored, (*made, self.state_dict())

    def _arguments(self) -> dict[str, Any]:
        """What it was made with, but the model and the groups."""
        options, schedule = dict(vars(self._options)), vars(self._options.schedule)
        del options["schedule"]
        return {**options, **schedule}

    # --- a step ----------------------------------------------------------------------------------

    @property
    def _refreshing(self) -> bool:
        if self._curvature is None:
            return False
        due = self._framing.far or self._options.schedule.updates(self._steps - self._started)
        return due or isinstance(self._stored, Factored) or self._curvature.solved is None

    @property
    def _replays(self) -> bool:
        """Whether a step's passes are run again."""
        return self._free is not None

    @property
    def watches(self) -> bool:
        """Whether the next pass is recorded, or run again."""
        return self._loop.recording or self._loop.replaying

    @property
    def _bounded(self) -> bool:
        return self._options.radius is not None

    def _prepare(self) -> None:
        """What the passes of the next step are wanted for."""
        refreshing = self._refreshing
        measures = self._bounded and refreshing
        self._loop.recording, self._loop.replaying = refreshing, self._replays or measures
        self._loop.sorting = self._replays
        self._loop.hooks.uncompiled(refreshing or self._replays)
        self._touched.active = measures or self._free is not None
        if self._curvature is not None:
            last = None if self._inverted is None else self._inverted - self._started
            schedule = self._options.schedule
            self._curvature.rebase = schedule.inverts(self._steps - self._started, last)
        rule = self._options.damping
        if callable(rule):
            self._follow(checked_damping(rule(self._steps)))

    def _follow(self, damping: float) -> None:
        """The damping of all groups that have none of their own."""
        for k in self._following:
            self.param_groups[k]["damping"] = damping

    def _gradients(self) -> Vectors:
        found: Vectors = {}
        for name, p in self._parameters.items():
            grad = p.grad
            if grad is not None:
                found[name] = grad.to_dense() if grad.is_sparse else grad
        if not found:
            raise DataError(
                "expected gradients, but no parameter has one: call loss.backward() before step()"
            )
        return found

    def _take(self) -> tuple[Direction, Vectors] | None:
        """The direction of this step, by parameter; None if nothing can be done with its passes.

        It is zero if a gradient is not finite, which is known on the device alone.
        """
        self._whole.pull(gradients=True)
        self._loop.require_same_parameters()
        gradients = self._gradients()
        self._exact = None
        finite = True
        if self._replays or self._refreshing:  # which may wait for the device
            finite = all(bool(g.isfinite().all()) for g in gradients.values())
            self._skipped += not finite
        self._refresh(gradients if finite else {})
        if not finite:
            self._report_skipped("")
            return None
        if self._free is not None and self._bounded:
            self._read(gradients)
        direction = self._frame()
        if self._reading is not None and direction.trust is not None:
            direction.trust.see(self._loss.dispersion, self._reading.error)
        on = direction.take(gradients, self._loss.scale if self._bounded else None)
        self._skipped += on == 0
        own = {name: self._parameters[name] for name in gradients}
        return direction, direction.of(own, self._measuring(direction))

    def _refresh(self, gradients: Vectors) -> None:
        """Take the passes of this step into the curvature, if a refresh is due."""
        self._reading = None
        if not self._refreshing or self._curvature is None:
            return
        with self._group.together("a step", self._steps):
            self._loop.require_passes()
        reason = ""
        try:
            ratio = self._touched.ratio(self._group)
            found = self._curvature.finish(ratio)
            if self._curvature.rebase:
                self._inverted = self._steps
            if self._bounded and self._free is None:
                self._reading = self._curvature.reading
                self._loss.take(found, ratio, gradients)
        except (NonFiniteError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
            reason = str(error)
        except DataError:
            self._prepare()  # an interrupt may have ended the last step before it did
            raise
        self._report_skipped(reason)

    def _read(self, gradients: Vectors) -> None:
        """What this step's passes tell of the loss, of which no curvature is kept."""
        with self._group.together("a step", self._steps):
            self._loop.require_passes()
        like = torch.zeros((), dtype=self._dtype, device=self._space.device)
        reading, found = read(self._loop.passes, self._scores, self._group, like)
        self._loss.take(found, self._touched.ratio(self._group), gradients)
        self._reading = reading

    def _report_skipped(self, reason: str) -> None:
        """Warn of steps that were left out since the last report."""
        skipped = self.skipped_steps
        if reason or skipped > self._warned:
            warn_skipped(skipped - self._warned, reason)
            self._warned = skipped

    def _frame(self) -> Direction:
        """The direction, in the frame of the present curvature and damping."""
        if self._free is None:
            F = None if self._curvature is None else self._curvature.solved
            if isinstance(self._stored, Factored):
                self._framing.rank = self._examples
            return self._framing.of(F, self.param_groups, self._loss)
        plain = self._loop.independent or set()
        names = [name for name in self._space.names if name not in plain]
        held = weakref.WeakMethod(self._solve)  # the frame stays, and must not hold the optimizer

        def solve(v: Tensor) -> Tensor:
            method = held()
            if method is None:
                raise RuntimeError("a solve of an optimizer that is gone")
            found: Tensor = method(v)
            return found

        return self._framing.free(names, solve, self._loss.unit)

    def _solve(self, v: Tensor) -> Tensor:
        """(F + damping)^-1 v with the exact curvature of this step's passes, by iteration."""
        if self._free is None:
            raise RuntimeError("a stored curvature has solves of its own")
        F = self._exact_curvature()
        kept = None if self._curvature is None else self._curvature.operator
        damping = self._damping(F)
        self._solution = conjugate_gradients(F, v, damping, self._free, kept, self._solution)
        return self._solution

    def _damping(self, F: BaseLinearOperator) -> Tensor:
        """Of an exact curvature."""
        dampings, rank = Dampings.of(self.param_groups), self._examples
        if None in dampings.by_name.values():
            mean = max(mean_eigenvalue(F, self._steps, rank), self._loss.floor(rank))
            names = self._space.names
            dampings = dampings.absolute(dict.fromkeys(names, self._options.eps * mean))
        return dampings.vector(self._space, self._dtype)

    @property
    def _examples(self) -> int:
        """Of this step's passes, of all processes."""
        return sum(n for (n,) in self._group.numbers([examples_of(self._loop.passes)], "a step"))

    def _exact_curvature(self) -> BaseLinearOperator:
        self._loop.require_passes()
        if self._exact is None:
            with torch.enable_grad():
                self._exact = exact_curvature(
                    self._model, self._space, self._loop.passes, self._scores, self._group
                )
        return self._exact

    def _flat(self, vectors: Vectors) -> Tensor:
        """(P,), zero if there is nothing."""
        zeros = {
            n: torch.zeros_like(p, dtype=self._dtype)
            for n, p in self._parameters.items()
            if n not in vectors
        }
        return self._space.ravel({**zeros, **vectors})

    def _measuring(self, direction: Direction) -> bool:
        """Whether this step's passes are run again to measure what it changes."""
        reading = self._reading
        return reading is not None and direction.trust is not None and reading.same

    def _measured(self, direction: Direction, lr: float, move: Callable[[float], None]) -> float:
        """The part of a step that stays; `move` puts the parameters where a part of it leads."""
        reading, trust = self._reading, direction.trust
        if reading is None or trust is None:
            raise RuntimeError("a step that is not measured")

        def measure(part: float) -> Tensor:
            move(part)
            return changed(reading, self._model, self._group).to(self._dtype)

        return trust.stays(measure, lr)

    def _end_step(self) -> None:
        self._steps += 1
        try:
            self._whole.forget()
            self._loop.forget()
            self._reading = None
            if self._free is None:
                self._exact = None  # it holds the batches
        finally:
            self._prepare()

    def _math(self) -> Any:
        return float_math(self._space.device)
