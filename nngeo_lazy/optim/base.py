"""What both optimizers do: watch a loop, keep its curvature, and solve with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError, NonFiniteError, NonFiniteWarning, SpaceMismatchError
from ..operators import BaseLinearOperator
from ..operators.report import Report, Row
from ..operators.warn import warn
from ..quantities import LossLike
from ..representations import Factored, Representation
from ..selectors import space_of
from ..space import canonical_name
from .curvature import Curvature
from .exact import exact_curvature
from .loop import Loop
from .options import Damping, HessianFree
from .replay import float_math
from .scores import Scores
from .setup import checked_damping, first_damping, groups_of, require_options, resolved
from .solving import Dampings, Solver, Vectors, conjugate_gradients

__all__ = ["CurvatureOptimizer"]

VERSION = 1


class CurvatureOptimizer(torch.optim.Optimizer):
    """The curvature of a loop, refreshed every so many steps, as a `torch.optim.Optimizer`.

    Args:
        model: the network whose forward passes are watched.
        representation: what is averaged and solved with; see `NaturalGradient`.
        likelihood: of the outputs.
        defaults: of the parameter groups' options, with the damping.
        estimator: of the curvature.
        seed: of label draws.
        params: a selector, or a list of groups {"params": selector, option: value, ...}.
        factor_decay: of the averages.
        update_every: steps between refreshes of the statistics.
        invert_every: steps between decompositions; None for each refresh.
        warmup: so many first steps refresh everything.
        damping: a number, a schedule or a rule.
        damping_method: "exact" or "factored".
        outputs: picks the outputs from what the model returns.
    """

    def __init__(
        self,
        model: nn.Module,
        representation: str | Representation | HessianFree,
        likelihood: LossLike | None,
        defaults: dict[str, Any],
        *,
        estimator: str,
        seed: int | None,
        params: Any,
        factor_decay: float,
        update_every: int,
        invert_every: int | None,
        warmup: int,
        damping: Damping,
        damping_method: str,
        outputs: Callable[[Any], Tensor] | None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise DataError(
                f"expected the model itself, whose passes are watched, got {type(model).__name__}: "
                "parameters are selected with params="
            )
        invert_every = update_every if invert_every is None else invert_every
        require_options(factor_decay, update_every, invert_every, warmup, damping_method)
        self._model = model
        self._rule = damping
        defaults = {**defaults, "damping": first_damping(damping)}
        groups = groups_of(model, params)
        self._following = [k for k, group in enumerate(groups) if "damping" not in group]
        super().__init__(groups, defaults)
        names = [name for group in self.param_groups for name in group["param_names"]]
        self._space = space_of(model, names)
        self._parameters = self._space.parameters(model)
        self._dtype = torch.promote_types(self._space.dtype, torch.float32)
        self._update_every, self._invert_every, self._warmup = update_every, invert_every, warmup
        self._steps = 0
        self._inverted: int | None = None  # the step of the last decomposition
        self._skipped = torch.zeros((), dtype=torch.int64, device=self._space.device)
        self._warned = 0
        self._loop = Loop(model, self._space, outputs)
        self._free, stored = resolved(representation)
        self._each_step = isinstance(stored, Factored)
        kinds = [] if self._free is None else ["HessianFree"]
        self._kind = " with ".join([*kinds, *([] if stored is None else [stored.described()])])
        self._curvature: Curvature | None = None
        if stored is not None:
            self._curvature = Curvature(
                self._loop,
                stored,
                likelihood,
                estimator,
                factor_decay,
                seed,
                factors=damping_method == "factored",
            )
        self._scores = (
            Scores(likelihood, "exact") if self._curvature is None else self._curvature.scores
        )
        self._exact: BaseLinearOperator | None = None  # of this step's passes, once it is asked for
        self._solution: Tensor | None = None  # where the next iteration starts
        self._solver = Solver(self._space, damping_method)
        self._prepare()

    # --- public ----------------------------------------------------------------------------------

    @property
    def operator(self) -> BaseLinearOperator:
        """The curvature F, undamped: its running average, or for "implicit" that of the last step.

        Raises:
            DataError: there was no step yet.
        """
        held = None if self._curvature is None else self._curvature.operator
        F = self._exact if self._free is not None else held
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
        rows = {row.parameter: row for row in self.operator.report()}
        plain = {**self._loop.plain}
        for name in self._loop.independent or ():
            plain.setdefault(name, "the outputs do not depend on it")
        for name, note in plain.items():
            if name not in rows or self._free is not None:
                size = self._space.slices[name].stop - self._space.slices[name].start
                owner = self._space.owner(name)
                rows[name] = Row(name, owner, "", "none: plain gradient", size, 0, note)
        return Report([rows[name] for name in self._space.names])

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset all gradients, and forget what their passes told of the curvature."""
        super().zero_grad(set_to_none)
        self._loop.forget()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused behind the start: the curvature is one of fixed parameters."""
        if hasattr(self, "_space"):
            raise DataError(
                "expected all parameter groups when the optimizer is made, since its curvature is "
                "over their parameters: make a new optimizer with params=[...]"
            )
        super().add_param_group(param_group)

    # --- state -----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As of every optimizer, with the curvature: all that the next step depends on."""
        state = super().state_dict()
        state["curvature"] = {
            "version": VERSION,
            "representation": self._kind,
            "parameters": {n: list(p.shape) for n, p in self._parameters.items()},
            "steps": self._steps,
            "inverted": self._inverted,
            "skipped": self._skipped.clone(),
            "warned": self._warned,
            "solution": None if self._solution is None else self._solution.clone(),
            "statistics": None if self._curvature is None else self._curvature.state(),
        }
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a state; the next steps are those that would have come.

        Raises:
            SpaceMismatchError: it is the state of other parameters.
            DataError: it is no state of such an optimizer.
        """
        held = state_dict.get("curvature")
        if not isinstance(held, Mapping) or held.get("version") != VERSION:
            raise DataError(
                "expected the state_dict of an optimizer of nngeo_lazy, got one "
                + ("of another version" if isinstance(held, Mapping) else "without curvature")
                + ": load it into the optimizer that wrote it"
            )
        shapes = {canonical_name(n): list(s) for n, s in held["parameters"].items()}
        here = {canonical_name(n): list(p.shape) for n, p in self._parameters.items()}
        if shapes != here:
            other = [n for n in {**shapes, **here} if shapes.get(n) != here.get(n)]
            raise SpaceMismatchError(
                f"expected the state of this model's parameters, but {other[:4]} are missing, "
                "extra or of another shape: load the state of the same model and the same params="
            )
        if held["representation"] != self._kind:
            raise DataError(
                "expected the state of an optimizer with the same representation, got one of "
                f"{held['representation']} for {self._kind}: make the optimizer as it was"
            )
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "curvature"})
        device = self._space.device
        self._restore_buffers(state_dict["state"])
        self._steps, self._warned = int(held["steps"]), int(held["warned"])
        self._inverted = held["inverted"]
        self._skipped = held["skipped"].to(device).clone()
        self._solution = None
        if held["solution"] is not None:
            self._solution = held["solution"].to(device).clone()
        if self._curvature is not None:
            self._curvature.restore(held["statistics"])
        self._exact = None
        self._solver.forget()
        self._prepare()

    def _restore_buffers(self, states: Mapping[Any, Mapping[str, Any]]) -> None:
        """The buffers in their own dtype: torch casts them to that of the parameters."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        for k, state in states.items():
            for name, value in state.items():
                if isinstance(value, Tensor):
                    self.state[parameters[k]][name] = value.to(self._space.device).clone()

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        raise DataError(
            "an optimizer watches one model and cannot be copied: make a new one for the copy of "
            "the model, and load this one's state_dict() into it"
        )

    # --- a step ----------------------------------------------------------------------------------

    @property
    def _refreshing(self) -> bool:
        if self._curvature is None:
            return False
        due = self._steps % self._update_every == 0 or self._steps < self._warmup
        return due or self._each_step or self._curvature.solved is None

    @property
    def _replays(self) -> bool:
        """Whether a step's passes are run again."""
        return self._free is not None

    def _prepare(self) -> None:
        """What the passes of the next step are wanted for."""
        self._loop.recording, self._loop.replaying = self._refreshing, self._replays
        self._loop.hooks.uncompiled(self._refreshing or self._replays)
        if self._curvature is not None:
            last, now, every = self._inverted, self._steps, self._invert_every
            due = last is None or now // every > last // every
            self._curvature.rebase = due or now < self._warmup
        if callable(self._rule):
            self._follow(checked_damping(self._rule(self._steps)))

    def _follow(self, damping: float) -> None:
        """The damping of all groups that have none of their own."""
        for k in self._following:
            self.param_groups[k]["damping"] = damping

    def _gradients(self) -> tuple[Vectors, Tensor]:
        """The gradients, zero where there is none or where one is not finite; and whether all are.

        On the device: nothing is waited for.
        """
        found: Vectors = {}
        for name, p in self._parameters.items():
            if p.grad is not None:
                grad = p.grad.to_dense() if p.grad.is_sparse else p.grad
                found[name] = grad.to(self._dtype)
        if not found:
            raise DataError(
                "expected gradients, but no parameter has one: call loss.backward() before step()"
            )
        finite = torch.stack([g.sum() for g in found.values()]).isfinite().all()
        zero = torch.zeros((), dtype=self._dtype, device=self._space.device)
        masked = {name: torch.where(finite, g, zero) for name, g in found.items()}
        self._skipped += ~finite
        return masked, finite

    def _refresh(self) -> None:
        """Take the passes of this step into the curvature, where a refresh is due."""
        if not self._refreshing or self._curvature is None:
            return
        self._require_passes()
        reason = ""
        try:
            self._curvature.finish()
            if self._curvature.rebase:
                self._inverted = self._steps
        except NonFiniteError as error:
            reason = str(error)
        self._report_skipped(reason)

    def _report_skipped(self, reason: str) -> None:
        """Warn of steps that were left out since the last report."""
        skipped = self.skipped_steps
        if reason or skipped > self._warned:
            what = (
                f"the gradients of {skipped - self._warned} steps since the last report were not "
                "finite, and they moved no parameter"
            )
            if reason:
                what += f"; the curvature was not refreshed ({reason})"
            message = f"{what}: lower lr, raise damping, or clip gradients"
            warn(NonFiniteWarning(message, skipped - self._warned))
            self._warned = skipped

    def _require_passes(self) -> None:
        if self._loop.passes:
            return
        if self._loop.seen:
            raise DataError(
                "expected a loss that is made from the outputs of the model's last forward pass, "
                "but none of them got a gradient: call loss.backward() on it (not detached), make "
                "the loss from what the model itself returns, and let outputs= pick a tensor of it "
                "rather than make one"
            )
        raise DataError(
            "expected a forward pass of the model in training mode since the last step, but saw "
            "none: call the model that the optimizer was made with (the compiled one, where it is "
            "compiled) as model(x), in model.train() and with autograd on"
        )

    def _directions(self, gradients: Vectors) -> Vectors:
        """(F + damping)^-1 g, by parameter; the plain gradient where there is no curvature."""
        dampings = Dampings.of(self.param_groups)
        if self._free is not None:
            plain = self._loop.independent or set()
            g = self._flat({name: v for name, v in gradients.items() if name not in plain})
            self._solution = conjugate_gradients(
                self._exact_curvature(),
                g,
                dampings.vector(self._space, self._dtype),
                self._free,
                None if self._curvature is None else self._curvature.operator,
                self._solution,
            )
            parts = self._space.unravel(self._solution)
            return {name: v if name in plain else parts[name] for name, v in gradients.items()}
        F = None if self._curvature is None else self._curvature.solved
        if F is None or F.space is None:  # nothing finite was seen yet
            return {name: torch.zeros_like(g) for name, g in gradients.items()}
        inside = {self._space.resolve(name): name for name in F.space.names}
        given = {own: gradients[n] for n, own in inside.items() if n in gradients}
        for n, own in inside.items():
            if own not in given:
                given[own] = torch.zeros_like(self._parameters[n], dtype=self._dtype)
        solved = self._solver(F, given, dampings)
        return {n: solved[inside[n]] if n in inside else g for n, g in gradients.items()}

    def _exact_curvature(self) -> BaseLinearOperator:
        self._require_passes()
        if self._exact is None:
            with torch.enable_grad():
                self._exact = exact_curvature(
                    self._model, self._space, self._loop.passes, self._scores
                )
        return self._exact

    def _flat(self, vectors: Vectors) -> Tensor:
        """(P,), zero where there is nothing."""
        zeros = {
            n: torch.zeros_like(p, dtype=self._dtype)
            for n, p in self._parameters.items()
            if n not in vectors
        }
        return self._space.ravel({**zeros, **vectors})

    def _begin_step(self) -> tuple[Vectors, Tensor]:
        self._loop.require_same_parameters()
        gradients, finite = self._gradients()
        self._exact = None
        self._refresh()
        return gradients, finite

    def _left_out(self, finite: Tensor) -> bool:
        """Whether the passes of this step cannot be run again, since they are not finite.

        Where they are, the device is waited for in any case.
        """
        if not self._replays or bool(finite):
            return False
        self._report_skipped("")
        return True

    def _end_step(self) -> None:
        self._steps += 1
        self._loop.forget()
        if self._free is None:
            self._exact = None  # it holds the batches
        self._prepare()

    def _math(self) -> Any:
        return float_math(self._space.device)
