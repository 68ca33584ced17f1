"""How far a step goes: a trust region in nats, for the change of the model's predictions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["Trust", "shorten"]

SLOW = 0.95  # the decay of running averages of squared norms
EXPLODES = 100.0  # squared norm of a gradient, over the average
SUDDEN = 0.5  # of the last squared norm, which the average must not fall below
NOISE, MORE = 1.0, 2.0  # how much of a step may be noise; so much more where errors are large
FRESH = 0.5  # the weight of a refresh's error
RATE, TURN, WIDEST = 0.03, 2.0, 2.5  # how the logarithm of the radius moves, and its bound
FAR, CLOSE = 0.5, 0.8  # of what it should be, the length of a step that stays; of one that was cut
SHORTEST, TRIES = 0.1, 8  # the part of a step that is tried next, and how often
LEAST, LOST = 1e-8, 1e-2  # bounds of the calibration, which is at most 1, and of one step's share
SHARE, SMALL = 0.4, 1e-2  # of its size, how far a parameter moves; numbers below count as so large
ALARM = 10.0  # squared norm of a gradient, over the average, behind which steps are short
CAUTION, CALMER = 0.03, 1.05  # what their share is multiplied by then, and in each step


def shorten(
    steps: Mapping[str, Tensor], weights: Mapping[str, Tensor], share: Tensor | float
) -> None:
    r"""Shorten each parameter's step to a share of its size, where it is longer.

    .. math:: |\Delta w| \le \text{share} \max(|w|, 0.01 \sqrt n)

    for a parameter of n numbers. A trust region of predictions does not see those that hardly
    matter yet, such as queries and keys of a new attention layer. Their curvature is small, so
    their step is long, and it would saturate them. Nothing is read from the device.
    """
    moved, held = list(steps.values()), [weights[name].detach() for name in steps]
    least = [SMALL * p.numel() ** 0.5 for p in held]
    lengths = torch.stack(torch._foreach_norm(moved))
    sizes = torch.stack(torch._foreach_maximum(torch._foreach_norm(held), least)).to(lengths)
    tiny = torch.finfo(lengths.dtype).tiny
    parts = (share * sizes / lengths.clamp_min(tiny)).clamp_max(1.0)
    torch._foreach_mul_(moved, list(parts.unbind()))


class Trust:
    r"""A bound nu of steps nu d, d the direction of natural gradient descent.

    .. math:: \nu = \min\Bigl(1,\; e^h \sqrt{2 \rho r \varphi / S},\; (1 + 2 e) \varphi / N\Bigr)

    with r the radius in nats and phi the dispersion of a Gaussian's labels. S is the running
    average of the squared natural norm of the gradient, g^T (F + damping)^-1 g, and N that of its
    noise. e is the mean square of the labels' residuals, at most 1: a model that has learnt little
    may take more noise than one that fits. h follows how far successive directions agree, and rho
    how the measured change of the predictions compares with the radius. All numbers stay on the
    device.

    Args:
        radius: r.
        momentum: of the gradients that directions are made from.
        like: a tensor of the dtype and on the device of the numbers.

    Attributes:
        far: whether the last step that was measured went too far.
    """

    def __init__(self, radius: float, momentum: float, like: Tensor) -> None:
        self.radius, self._momentum = radius, momentum
        zero = torch.zeros((), dtype=like.dtype, device=like.device)
        self._means = zero.expand(4).clone()  # of s, n, cos^2 and 1, not corrected
        self._h, self._rho, self._dispersion = zero.clone(), zero + 1.0, zero + 1.0
        self._spread = zero.expand(2).clone()  # of the dispersion and 1, not corrected
        self._error = zero.clone()
        self._calm = zero + 1.0  # what the share of a step that is not measured is multiplied by
        self._filled = zero + 1.0  # s / S of the last step, at most 1
        self.far = False

    @property
    def trusted(self) -> Tensor:
        """What parameters without a curvature scale their steps by."""
        return self._rho.sqrt()

    def share(self, measured: bool) -> Tensor | float:
        """How far a step may move each parameter, of its size.

        Behind a gradient that explodes, steps that are not measured are short for a while.
        """
        return SHARE if measured else SHARE * self._calm

    def see(self, found: Tensor | None, error: Tensor | None) -> None:
        """Take a refresh's dispersion, if there is one, and its error into their averages."""
        if error is not None:
            mean = self._error.lerp(error.to(self._error), FRESH)
            self._error = torch.where(error.isfinite(), mean, self._error)
        if found is None:
            return
        found = found.to(self._spread)
        seen = torch.stack([found, torch.ones_like(found)])
        mean = self._spread.lerp(seen, 1 - SLOW)
        self._spread = torch.where(found.isfinite(), mean, self._spread)
        tiny = torch.finfo(found.dtype).tiny ** 0.5
        self._dispersion = (self._spread[0] / self._spread[1].clamp_min(tiny)).clamp_min(tiny)

    def clip(self, s: Tensor) -> Tensor:
        """What a gradient of this squared natural norm is multiplied by, after others before it."""
        tiny = torch.finfo(s.dtype).tiny ** 0.5
        most = EXPLODES * self._means[0] / self._means[3].clamp_min(tiny)
        shorter = (most / s.clamp_min(tiny)).sqrt().clamp_max(1.0)
        clip: Tensor = torch.where(self._means[3] > 0, shorter, torch.ones_like(s))
        return clip

    def scale(self, s: Tensor, n: Tensor, cosine: Tensor, on: Tensor) -> Tensor:
        """The bound nu of this step.

        Args:
            s: the squared natural norm of the gradient.
            n: that of its running average.
            cosine: of the gradient and the last direction, in the metric.
            on: 1, or 0 for a step that is left out.
        """
        tiny = torch.finfo(s.dtype).tiny ** 0.5
        before = self._means[0] / self._means[3].clamp_min(tiny)
        alarm = (s > ALARM * before) & (self._means[3] > 0)
        calm = torch.where(alarm, CAUTION * self._calm, CALMER * self._calm)
        self._calm.copy_(calm.clamp(LOST, 1.0))
        seen = torch.stack([s, n, cosine.square(), torch.ones_like(s)])
        self._means.lerp_(seen, (1 - SLOW) * on)
        S, n_mean, squared, _ = (self._means / self._means[3].clamp_min(tiny)).unbind()
        self._filled = (s / S.clamp_min(tiny)).clamp_max(1.0)
        turned = (cosine * (squared + tiny).rsqrt()).clamp(-TURN, TURN)
        self._h.add_(turned, alpha=RATE).clamp_(-WIDEST, WIDEST)
        radius = 2 * self.radius * self._dispersion
        most = torch.maximum(S, SUDDEN * s)  # gradients that explode shrink the step at once
        bound = (self._rho * radius / (most + tiny)).sqrt() * self._h.exp()
        if self._momentum:
            factor = (1 + self._momentum) / (2 * self._momentum)
            noise = ((S - n_mean) * factor).clamp_min(tiny)
            allowed = (NOISE + MORE * self._error) * self._dispersion
            bound = torch.minimum(bound, allowed / noise)
        bounded: Tensor = bound.clamp_max(1.0) * on
        return bounded

    def stays(self, measure: Callable[[float], Tensor], lr: float) -> float:
        """The part of a step that stays; the next steps are scaled alike.

        The change of a far step is not quadratic: one that is cut is measured again. A step that
        is short since its gradient is small, beside those before it, shows that F is trusted too
        little only if it is shorter than that.

        Args:
            measure: makes a part of the step; 2 KL of the predictions before and after it.
            lr: outside of the bound.
        """
        part, rooms = 1.0, list[float]()
        self.far = False
        while len(rooms) < TRIES:
            rooms.append(self._room(measure(part), lr))
            if rooms[-1] >= (CLOSE if part < 1 else FAR):
                break
            self.far = True
            part *= max(rooms[-1], SHORTEST)
        else:
            part *= min(rooms[-1] / SHORTEST, 1.0)
        room = rooms[0]
        if room > 1:
            room = max(1.0, room * float(self._filled.sqrt()))
        factor = min(max(room, SHORTEST**0.5), 2**0.5)
        if part < 1:
            factor = min(factor, max(part, LOST))
        self._rho.mul_(factor).clamp_(LEAST, 1.0)
        return part

    def _room(self, changed: Tensor, lr: float) -> float:
        """What a step that changes so much should be multiplied by; 0 if it is not finite."""
        wanted = 2 * self.radius * self._dispersion * lr**2
        tiny = torch.finfo(changed.dtype).tiny ** 0.5
        room = (wanted / (changed.clamp_min(0) + tiny)).sqrt()
        return float(torch.where(changed.isfinite(), room, torch.zeros_like(room)))

    def state(self) -> dict[str, Tensor]:
        """All numbers."""
        names = ("means", "h", "rho", "dispersion", "spread", "error", "calm")
        numbers = {name: getattr(self, "_" + name).clone() for name in names}
        return {**numbers, "far": torch.tensor(self.far, device="cpu")}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take them over."""
        self.far = bool(state.get("far", False))
        for name, value in state.items():
            if name != "far":
                held = getattr(self, "_" + name)
                setattr(self, "_" + name, value.to(held).clone())
