"""Natural gradient descent, as an optimizer of torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError
from ..quantities import LossLike
from ..representations import Representation
from .base import CurvatureOptimizer
from .exact import quadratic_step
from .options import Damping, HessianFree, LevenbergMarquardt
from .replay import RandomState
from .solving import Dampings, Vectors

__all__ = ["NaturalGradient"]

Closure = Callable[[], Tensor]


class NaturalGradient(CurvatureOptimizer):
    r"""Natural gradient descent in a curvature that is taken from the loop's own passes.

    .. math:: m \leftarrow \mu m + (F + \lambda I)^{-1} g, \qquad
        w \leftarrow (1 - \eta \, wd) \, w - \eta \, m

    The loop stays ordinary: `loss = loss_fn(model(x), y)`, `loss.backward()`, `optimizer.step()`.
    Forward passes in training mode are watched. On every `update_every`-th step their layers are
    recorded, and the curvature's statistics come from their backward pass: "empirical" from the
    loop's own, "mc" from one more of labels that the model draws. They are averaged over steps
    (`operator`), and every `invert_every`-th step decomposed. A step in between costs a solve in
    closed form, and waits for nothing that is on the device.

    F is scaled as by `FIM`, a mean over examples of a loss that sums over positions; a torch.nn
    loss module as likelihood keeps its own reduction. g is the loop's gradient as it stands, so
    that clipping and accumulation work as ever: what is accumulated counts as the mean over all
    examples since the last step. Labels are not seen: masks of a categorical likelihood are read
    off the gradient. "empirical" takes gradients as they come, so that a loss that a `GradScaler`
    scales wants "mc".

    Batch normalisation and dropout may train: batch statistics count as constants, and layers'
    forms are proved in evaluation mode, once. What has no Kronecker form takes its diagonal, and
    what has no form at all, or does not touch the outputs, the plain gradient; `report()` says
    which. Non-finite gradients change
    nothing: they are counted on the device (`skipped_steps`), with a `NonFiniteWarning` at the next
    refresh.

    Args:
        model: the network, the compiled one where it is compiled.
        representation: "kfac", "ekfac" (its diagonal refreshed on every update, its basis on every
            inversion), "diagonal", or another one of which averages keep the form; "kernel": exact,
            in the space of samples, of the step's batch alone, for small batches; "implicit":
            conjugate gradients on the exact matrix of the step's batch, with the options of
            `HessianFree`.
        likelihood: "categorical", "bernoulli", "gaussian", "poisson", an object from
            `nngeo_lazy.likelihoods`, or a torch.nn loss module. None, for "empirical", and where
            the first gradient proves it to be that of a softmax cross-entropy.
        lr: eta. None: eta and mu minimise the exact quadratic model of the step's batch; the
            groups' lr is then a factor of it, 1 to begin with.
        momentum: mu.
        weight_decay: wd, decoupled from the gradient.
        damping: lambda; a function of the number of the step; or `LevenbergMarquardt(...)`, which
            needs `step(closure)`. A group's own damping stays what it is.
        estimator: "mc", "empirical" or "exact" (a backward pass for each output direction); it does
            not matter to "implicit", which is exact.
        seed: of label draws; by default from torch's generator.
        params: a selector of parameters, or a list of groups {"params": selector, "lr": ...}; by
            default all that require a gradient.
        factor_decay: of the running averages, with bias correction.
        update_every: steps between refreshes of the statistics.
        invert_every: steps between decompositions; by default `update_every`.
        warmup: in so many first steps everything is refreshed.
        kl_clip: kappa; steps are scaled by min(1, sqrt(kappa / (eta^2 g^T d))), with d the
            preconditioned gradient, which bounds the change of the model's distribution.
        damping_method: "exact", or "factored" (see `F.damped`), which solves with half of the
            products for Kronecker blocks.
        outputs: picks the outputs (N, ...) from what the model returns; by default it itself, or
            its `.logits`.

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
        >>> optimizer = ng.optim.NaturalGradient(model, "kfac", lr=0.1, seed=0)
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
        George et al. (2018) for EKFAC; Ba, Grosse and Martens (2017), section 5, for the clip;
        Loshchilov and Hutter (2019) for decoupled weight decay.
    """

    def __init__(
        self,
        model: nn.Module,
        representation: str | Representation | HessianFree = "kfac",
        likelihood: LossLike | None = None,
        *,
        lr: float | None = 1e-2,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        damping: Damping = 1e-3,
        estimator: str = "mc",
        seed: int | None = None,
        params: Any = None,
        factor_decay: float = 0.95,
        update_every: int = 10,
        invert_every: int | None = None,
        warmup: int = 0,
        kl_clip: float | None = None,
        damping_method: str = "exact",
        outputs: Callable[[Any], Tensor] | None = None,
    ) -> None:
        for name, value, most in (
            ("lr", 1.0 if lr is None else lr, math.inf),
            ("momentum", momentum, 1.0),
            ("weight_decay", weight_decay, math.inf),
            ("kl_clip", 1.0 if kl_clip is None else kl_clip, math.inf),
        ):
            if not 0 <= value < most:
                raise DataError(f"expected {name} from 0 to below {most:g}, got {value!r}")
        if lr is None and kl_clip is not None:
            raise DataError(
                "kl_clip scales steps, and lr=None takes those of the quadratic model as they are: "
                "leave one of the two out"
            )
        self._by_model = lr is None
        self._kl_clip = kl_clip
        defaults = {
            "lr": 1.0 if lr is None else lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
        }
        super().__init__(
            model,
            representation,
            likelihood,
            defaults,
            estimator=estimator,
            seed=seed,
            params=params,
            factor_decay=factor_decay,
            update_every=update_every,
            invert_every=invert_every,
            warmup=warmup,
            damping=damping,
            damping_method=damping_method,
            outputs=outputs,
        )

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Tensor | None:  # type: ignore[override]
        """One step.

        Args:
            closure: evaluates the loss (and its gradient, where the loop has not), and returns it;
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
            gradients, finite = self._begin_step()
            if self._left_out(finite):
                self._end_step()
                return loss
            directions = self._directions(gradients)
            before = None
            if adjusts:
                before = self._flat(self._weights())
                self._exact_curvature()  # of the parameters before the step
            self._update(gradients, directions, finite)
        if closure is not None and loss is not None and before is not None and random is not None:
            after = self._evaluated(closure, random)
            with self._math():
                self._adjust(gradients, before, float(loss.detach()), after)
        self._end_step()
        return loss

    # --- the update ------------------------------------------------------------------------------

    @property
    def _replays(self) -> bool:
        return super()._replays or self._by_model or self._adjusts

    def _update(self, gradients: Vectors, directions: Vectors, finite: Tensor) -> None:
        ones = torch.ones((), dtype=self._dtype, device=self._space.device)
        moved = torch.where(finite, ones, torch.zeros_like(ones))
        scale, factors = self._clipped(gradients, directions), None
        if self._by_model:
            factors = self._from_model(gradients, directions)
        for group in self.param_groups:
            names = [name for name in group["param_names"] if name in directions]
            if not names:
                continue
            lr, decay = group["lr"], group["weight_decay"]
            weights: list[Tensor] = [self._parameters[name] for name in names]
            steps = [directions[name].to(self._dtype) for name in names]
            momentum = group["momentum"]
            if scale is not None:
                steps = list(torch._foreach_mul(steps, scale))
            if factors is not None:
                steps = list(torch._foreach_mul(steps, factors[0]))
                decay, momentum = decay * factors[0], factors[1] if momentum else 0.0
            if factors is not None or momentum:
                steps = self._with_momentum(names, steps, momentum, moved)
            if group["weight_decay"]:
                torch._foreach_mul_(weights, (1 - lr * decay * moved).to(weights[0].dtype))
            change = [each.to(weights[0].dtype) for each in torch._foreach_mul(steps, moved * lr)]
            torch._foreach_sub_(weights, change)

    def _with_momentum(
        self, names: list[str], steps: list[Tensor], momentum: float | Tensor, moved: Tensor
    ) -> list[Tensor]:
        """The buffers m after m = mu m + d; a masked step, whose d is zero, leaves them."""
        buffers = []
        for name, step in zip(names, steps, strict=True):
            state = self.state[self._parameters[name]]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(step)
            buffers.append(state["momentum_buffer"])
        torch._foreach_mul_(buffers, 1 - moved * (1 - momentum))
        torch._foreach_add_(buffers, steps)
        return buffers

    def _clipped(self, gradients: Vectors, directions: Vectors) -> Tensor | None:
        """What bounds eta^2 d^T F d, with F d = g, by kappa."""
        if self._kl_clip is None:
            return None
        size = torch.zeros((), dtype=self._dtype, device=self._space.device)
        for group in self.param_groups:
            for name in group["param_names"]:
                if name in directions:
                    size += group["lr"] ** 2 * (gradients[name] * directions[name]).sum()
        tiny = torch.finfo(self._dtype).tiny
        return (self._kl_clip / size.clamp_min(tiny)).sqrt().clamp_max(1.0)

    def _from_model(self, gradients: Vectors, directions: Vectors) -> Tensor:
        """The factors of the direction and of the last step, which minimise the quadratic model."""
        last = {
            name: self.state[self._parameters[name]]["momentum_buffer"]
            for group in self.param_groups
            for name in group["param_names"]
            if group["momentum"] and "momentum_buffer" in self.state[self._parameters[name]]
        }
        columns = torch.stack([self._flat(directions), self._flat(last)], -1)
        damping = Dampings.of(self.param_groups).vector(self._space, self._dtype)
        g = self._flat(gradients)
        c = quadratic_step(self._exact_curvature(), g, columns, damping)
        return -c  # the buffers hold what is subtracted

    # --- damping by the reduction ratio ----------------------------------------------------------

    @property
    def _adjusts(self) -> bool:
        rule = self._rule
        return isinstance(rule, LevenbergMarquardt) and (self._steps + 1) % rule.every == 0

    def _weights(self) -> Vectors:
        return {name: p.detach().to(self._dtype).clone() for name, p in self._parameters.items()}

    def _adjust(self, gradients: Vectors, before: Tensor, loss: float, after: float) -> None:
        rule = self._rule
        if not isinstance(rule, LevenbergMarquardt):
            raise RuntimeError("no rule")
        delta = self._flat(self._weights()) - before
        model = self._flat(gradients) @ delta + self._exact_curvature().vTMv(delta) / 2
        predicted = float(model)
        ratio = (after - loss) / predicted if predicted else math.nan
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
