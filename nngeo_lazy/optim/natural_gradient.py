"""Natural gradient descent, as an optimizer of torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from ..arguments import checked
from ..errors import DataError
from ..representations import Representation
from ..switches import whole_transforms
from .base import CurvatureOptimizer
from .direction import Direction
from .exact import quadratic_step
from .options import Damping, HessianFree, LevenbergMarquardt, Losses, Options, Schedule
from .replay import RandomState
from .solving import Vectors

__all__ = ["NaturalGradient"]

Closure = Callable[[], Tensor]


class NaturalGradient(CurvatureOptimizer):
    r"""Natural gradient descent that needs no tuning, in a curvature of the loop's own passes.

    .. math:: d = (F + \lambda)^{-1} m, \qquad w \leftarrow (1 - \eta \, wd) \, w - \eta \, \nu \, d

    m is the running average of gradients. nu bounds how much a step changes the model's
    predictions: by about `radius` nats, which the steps that refresh the curvature measure with one
    more forward pass. No parameter moves by more than 0.4 of its size. The learning rate eta
    multiplies the whole step, so that schedulers work as ever. `docs/optimizers.md` has all
    formulas.

    The loop stays ordinary: `loss = loss_fn(model(x), y)`, `loss.backward()`, `optimizer.step()`.
    Forward passes are watched. On every `update_every`-th step their layers are recorded. The
    curvature's statistics come from a backward pass: for "empirical" the loop's own, for "mc" one
    more, of labels that the model draws. They are averaged over steps (`operator`), and every
    `invert_every`-th step decomposed. A step in between waits for nothing that is on the device.

    F is scaled as by `FIM`, a mean over examples of a loss that sums over positions; a torch.nn
    loss module as likelihood keeps its own reduction. The scale of the loop's loss (a sum, a mean
    over tokens, a `GradScaler`) is read off the gradient at the outputs, except of Gaussian losses.
    "gaussian" stands for the mean over examples of half the squared error. Accumulated gradients
    count as the mean over all examples since the last step. Labels are not seen: masks of a
    categorical likelihood are read off the gradient.

    Batch normalisation and dropout may train: batch statistics count as constants, and layers'
    forms are proved in evaluation mode, once. What has no Kronecker form takes its diagonal; what
    has no form at all, or does not touch the outputs, moves as in Adam; `report()` says which.
    Non-finite gradients change nothing: they are counted on the device (`skipped_steps`), with a
    `NonFiniteWarning` at the next refresh.

    Args:
        model: the network; the compiled one if it is compiled.
        representation: "kfac", "ekfac" (its diagonal refreshed on every update, its basis on every
            inversion), "diagonal", or another one of which averages keep the form; "kernel": exact,
            in the space of samples, of the step's batch alone, for small batches; "implicit":
            conjugate gradients on the exact matrix of the step's batch, with the options of
            `HessianFree`.
        likelihood: "categorical", "bernoulli", "gaussian", "poisson", an object from
            `nngeo_lazy.likelihoods`, or a torch.nn loss module. None recognises softmax and
            logistic cross-entropies by their first gradient, and takes the loop's own gradients
            ("empirical", with a `LikelihoodWarning`) for any other loss. A dict by name, or a
            sequence by position, gives one to each of several heads that the model returns.
        lr: eta. None: eta and the share of the last step minimise the exact quadratic model of the
            step's batch, without a radius; the groups' lr is then a factor, 1 to begin with.
        momentum: of the running average of gradients, but not for "kernel" and "implicit", whose
            curvature is that of one batch; with lr=None, whether the last step counts.
        weight_decay: wd, decoupled from the gradient: each step takes lr wd of every weight, so
            that an AdamW's 0.01 at its rate of 1e-3 is 1e-5 here.
        radius: of the trust region, in nats for each label; None takes steps as they are, in the
            loop's own scale.
        damping: lambda, an absolute one: a number; a function of the number of the step; or
            `LevenbergMarquardt(...)`, which needs `step(closure)`. A group's own damping stays what
            it is. None: eps times the mean eigenvalue of each block.
        eps: relative damping.
        estimator: "mc", "empirical" or "exact" (a backward pass for each output direction); it does
            not matter to "implicit", which is exact.
        seed: of label draws; by default from torch's generator.
        params: a selector of parameters, their tensors, or a list of groups {"params": either,
            "lr": ...}; by default all that require a gradient.
        factor_decay: of the running averages, with bias correction.
        update_every: steps between refreshes of the statistics.
        invert_every: steps between decompositions; by default `update_every`.
        warmup: in so many first steps everything is refreshed.
        damping_method: "exact", or "factored" (see `F.damped`), which solves with half of the
            products for Kronecker blocks.
        second_moments: whether second moments of gradients in the curvature's eigenvectors, as in
            Adam, take the place of its eigenvalues (for representations with eigenvectors).
        outputs: picks the outputs (N, ...) from what the model returns; by default it itself, or
            its `.logits`. With several heads, what holds them.

    Raises:
        DataError: an option that does not fit; in `step`, no backward pass, or one of a loss that
            is not made from the model's outputs.
        SpaceMismatchError: selectors that match nothing, parameters that became other tensors, the
            state of another model.
        StochasticModelError, UnsupportedLayerError: a model whose layers' forms cannot be proved.

    Example:
        >>> import torch
        >>> import nngeo_lazy as ng
        >>> model, x, y = torch.nn.Linear(3, 2), torch.randn(20, 3), torch.randint(2, (20,))
        >>> optimizer = ng.optim.NaturalGradient(model)
        >>> for _ in range(5):
        ...     optimizer.zero_grad()
        ...     loss = torch.nn.functional.cross_entropy(model(x), y)
        ...     loss.backward()
        ...     optimizer.step()
        >>> optimizer.operator.shape
        torch.Size([8, 8])

    Source:
        Amari (1998), Natural gradient works efficiently in learning; Martens and Grosse (2015),
        Optimizing Neural Networks with Kronecker-factored Approximate Curvature, sections 5 to 7;
        George et al. (2018) for EKFAC; Vyas et al. (2024), SOAP, for second moments in Kronecker
        eigenvectors; Schulman et al. (2015), Trust Region Policy Optimization;
        Loshchilov and Hutter (2019) for decoupled weight decay.
    """

    @checked
    def __init__(
        self,
        model: nn.Module,
        representation: str | Representation | HessianFree = "kfac",
        likelihood: Losses = None,
        *,
        lr: float | None = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        radius: float | None = 0.01,
        damping: Damping | None = None,
        eps: float = 3e-2,
        estimator: str = "mc",
        seed: int | None = None,
        params: Any = None,
        factor_decay: float = 0.95,
        update_every: int = 10,
        invert_every: int | None = None,
        warmup: int = 20,
        damping_method: str = "exact",
        second_moments: bool = False,
        outputs: Callable[[Any], Tensor] | None = None,
    ) -> None:
        for name, value in (("lr", 1.0 if lr is None else lr), ("weight_decay", weight_decay)):
            if not 0 <= value < math.inf:
                raise DataError(f"expected {name} from 0 to below inf, got {value!r}")
        self._by_model = lr is None
        self._last_steps = momentum if lr is None else 0.0
        options = Options(
            representation,
            likelihood,
            Schedule(update_every, invert_every, warmup, factor_decay),
            momentum=0.0 if lr is None else momentum,
            radius=None if lr is None else radius,
            damping=damping,
            eps=eps,
            estimator=estimator,
            seed=seed,
            damping_method=damping_method,
            second_moments=second_moments,
            outputs=outputs,
        )
        defaults = {"lr": 1.0 if lr is None else lr, "weight_decay": weight_decay}
        super().__init__(model, defaults, params, options)

    def _arguments(self) -> dict[str, Any]:
        given = {**super()._arguments(), **{k: self.defaults[k] for k in ("lr", "weight_decay")}}
        return {**given, "lr": None, "momentum": self._last_steps} if self._by_model else given

    @_disable_dynamo  # a compiled step runs as it is: hooks and decompositions are Python
    @whole_transforms()
    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Tensor | None:  # type: ignore[override]
        """One step.

        Args:
            closure: evaluates the loss (and its gradient, if the loop has not), and returns it;
                `LevenbergMarquardt` damping calls it once more, at the new parameters.

        Returns:
            The closure's loss, at the old parameters.

        Raises:
            DataError: no gradients, or on a refresh no pass that they came from.
        """
        adjusts = self._adjusts
        if adjusts and closure is None:
            raise DataError(
                "damping=LevenbergMarquardt(...) compares the loss with its quadratic model: call "
                "step(closure), with a function that evaluates the loss and returns it"
            )
        random = RandomState.now(self._space.device) if adjusts else None
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with self._math():
            taken = self._take()
            if taken is None:
                self._end_step()
                return loss
            before = None
            if adjusts:
                before = self._flat(self._weights())
                self._exact_curvature()  # of the parameters before the step
            self._update(*taken)
        if closure is not None and loss is not None and before is not None and random is not None:
            after = self._evaluated(closure, random)
            with self._math():
                self._adjust(before, float(loss.detach()), after)
        self._end_step()
        return loss

    # --- the update ------------------------------------------------------------------------------

    @property
    def _replays(self) -> bool:
        return super()._replays or self._by_model or self._adjusts

    def _update(self, direction: Direction, steps: Vectors) -> None:
        factors = self._from_model(steps) if self._by_model else None
        made: list[tuple[list[Tensor], list[Tensor], float]] = []
        for group in self.param_groups:
            names = [name for name in group["param_names"] if name in steps]
            if not names:
                continue
            lr, decay = group["lr"], group["weight_decay"]
            weights: list[Tensor] = [self._parameters[name] for name in names]
            change = [steps[name] for name in names]
            if factors is not None:
                change = self._combined(names, change, factors, direction.on)
                decay = decay * factors[0]
            if group["weight_decay"]:
                kept = 1 - lr * decay * direction.on
                torch._foreach_mul_(weights, kept.to(weights[0].dtype))
            made.append((weights, change, lr))
        most = max((lr for *_, lr in made), default=0.0)
        part = 1.0
        if most and self._measuring(direction):
            before = [torch._foreach_add(weights, 0.0) for weights, *_ in made]

            def move(part: float) -> None:
                for (weights, change, lr), held in zip(made, before, strict=True):
                    torch._foreach_copy_(weights, held)
                    torch._foreach_sub_(weights, change, alpha=part * tried * lr)

            tried = max(1.0, 1 / most)  # a rate of at least one, so that lr scales all
            part = self._measured(direction, tried * most, move)
            for (weights, *_), held in zip(made, before, strict=True):
                torch._foreach_copy_(weights, held)
        for weights, change, lr in made:
            torch._foreach_sub_(weights, change, alpha=part * lr)
        self._whole.push(gradients=False)

    # --- the quadratic model's step --------------------------------------------------------------

    def _combined(
        self, names: list[str], steps: list[Tensor], factors: Tensor, on: Tensor
    ) -> list[Tensor]:
        """The combination of the directions and the last steps; a masked step leaves the latter."""
        kept = [
            self.state[self._owned[n]].setdefault("last_step", torch.zeros_like(s))
            for n, s in zip(names, steps, strict=True)
        ]
        momentum = factors[1] if self._last_steps else 0 * factors[1]
        torch._foreach_mul_(kept, 1 - on * (1 - momentum))
        torch._foreach_add_(kept, torch._foreach_mul(steps, factors[0]))
        return list(torch._foreach_mul(kept, on))

    @property
    def _owned(self) -> dict[str, Tensor]:
        """The parameters of the groups, by name."""
        groups = self.param_groups
        pairs = (zip(g["param_names"], g["params"], strict=True) for g in groups)
        return {name: p for each in pairs for name, p in each}

    def _from_model(self, steps: Vectors) -> Tensor:
        """The factors of the direction and of the last step, which minimise the quadratic model."""
        last = {
            name: self.state[p]["last_step"]
            for name, p in self._owned.items()
            if self._last_steps and "last_step" in self.state[p]
        }
        columns = torch.stack([self._flat(steps), self._flat(last)], -1)
        F = self._exact_curvature()
        c = quadratic_step(F, self._flat(self._gradients()), columns, self._damping(F))
        return -c  # the buffers hold what is subtracted

    # --- damping by the reduction ratio ----------------------------------------------------------

    @property
    def _adjusts(self) -> bool:
        rule = self._options.damping
        return isinstance(rule, LevenbergMarquardt) and (self._steps + 1) % rule.every == 0

    def _weights(self) -> Vectors:
        return {name: p.detach().to(self._dtype).clone() for name, p in self._parameters.items()}

    def _adjust(self, before: Tensor, loss: float, after: float) -> None:
        rule = self._options.damping
        if not isinstance(rule, LevenbergMarquardt):
            raise RuntimeError("no rule")
        delta = self._flat(self._weights()) - before
        model = self._flat(self._gradients()) @ delta + self._exact_curvature().vTMv(delta) / 2
        predicted = float(model)
        change = self._group.mean(after - loss)
        ratio = change / predicted if predicted else math.nan
        if self._following:
            first = self.param_groups[self._following[0]]
            self._follow(rule.adjusted(float(first["damping"]), ratio))

    def _evaluated(self, closure: Closure, random: RandomState) -> float:
        """The loss at the new parameters, with the random numbers of the first evaluation.

        Gradients and buffers are what they were.
        """
        parameters = list(self._parameters.values())
        gradients = [p.grad for p in parameters]
        buffers = [(b, b.detach().clone()) for b in self._model.buffers()]
        for p in parameters:
            p.grad = None
        passes, seen = self._loop.passes, self._loop.seen
        try:
            with self._loop.hooks.paused(), random.forked(), torch.enable_grad():
                random.restore()
                return float(closure().detach())
        finally:
            self._loop.passes, self._loop.seen = passes, seen
            for p, gradient in zip(parameters, gradients, strict=True):
                p.grad = gradient
            for buffer, kept in buffers:
                buffer.copy_(kept)
