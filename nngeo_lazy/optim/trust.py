"""How far a step goes: a trust region in nats, for the change of the model's predictions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["Trust"]

SLOW = 0.95  # the decay of running averages of squared norms
SUDDEN = 0.5  # of the last squared norm, which the average must not fall below
NOISE = 1.0  # how much of a step may be noise
RATE, TURN, WIDEST = 0.03, 2.0, 2.5  # how the logarithm of the radius moves, and its bound
FAR, LEAST, MOST = 4.0, 1e-4, 3.0  # from where a step is cut; bounds of the calibration


class Trust:
    r"""A bound nu of steps nu d, d the direction of natural gradient descent.

    .. math:: \nu = \min\Bigl(1,\; e^h \sqrt{2 \rho r \varphi / S},\; \varphi / N\Bigr)

    with r the radius in nats and phi the dispersion of a Gaussian's labels. S is the running
    average of the squared natural norm of the gradient, g^T (F + damping)^-1 g, and N that of its
    noise. h follows how far successive directions agree, and rho how the measured change of the
    predictions compares with the radius. All numbers stay on the device.

    Args:
        radius: r.
        momentum: of the gradients that directions are made from.
        like: a tensor of the dtype and on the device of the numbers.
    """

    def __init__(self, radius: float, momentum: float, like: Tensor) -> None:
        self.radius, self._momentum = radius, momentum
        zero = torch.zeros((), dtype=like.dtype, device=like.device)
        self._means = zero.expand(4).clone()  # of s, n, cos^2 and 1, not corrected
        self._h, self._rho, self._dispersion = zero.clone(), zero + 1.0, zero + 1.0
        self._spread = zero.expand(2).clone()  # of the dispersion and 1, not corrected

    @property
    def trusted(self) -> Tensor:
        """What parameters without a curvature scale their steps by."""
        return self._rho.sqrt()

    def see_dispersion(self, found: Tensor | None) -> None:
        """Take a refresh's dispersion, if there is one, into its average."""
        if found is None:
            return
        found = found.to(self._spread)
        seen = torch.stack([found, torch.ones_like(found)])
        mean = self._spread.lerp(seen, 1 - SLOW)
        self._spread = torch.where(found.isfinite(), mean, self._spread)
        tiny = torch.finfo(found.dtype).tiny ** 0.5
        self._dispersion = (self._spread[0] / self._spread[1].clamp_min(tiny)).clamp_min(tiny)

    def scale(self, s: Tensor, n: Tensor, cosine: Tensor, on: Tensor) -> Tensor:
        """The bound nu of this step.

        Args:
            s: the squared natural norm of the gradient.
            n: that of its running average.
            cosine: of the gradient and the last direction, in the metric.
            on: 1, or 0 for a step that is left out.
        """
        tiny = torch.finfo(s.dtype).tiny ** 0.5
        seen = torch.stack([s, n, cosine.square(), torch.ones_like(s)])
        self._means.lerp_(seen, (1 - SLOW) * on)
        S, n_mean, squared, _ = (self._means / self._means[3].clamp_min(tiny)).unbind()
        turned = (cosine * (squared + tiny).rsqrt()).clamp(-TURN, TURN)
        self._h.add_(turned, alpha=RATE).clamp_(-WIDEST, WIDEST)
        radius = 2 * self.radius * self._dispersion
        most = torch.maximum(S, SUDDEN * s)  # gradients that explode shrink the step at once
        bound = (self._rho * radius / (most + tiny)).sqrt() * self._h.exp()
        if self._momentum:
            factor = (1 + self._momentum) / (2 * self._momentum)
            noise = ((S - n_mean) * factor).clamp_min(tiny)
            bound = torch.minimum(bound, NOISE * self._dispersion / noise)
        bounded: Tensor = bound.clamp_max(1.0) * on
        return bounded

    def calibrate(self, changed: Tensor, lr: float) -> Tensor:
        """The part of the step that stays, by what it changes; the next ones are scaled alike.

        Args:
            changed: 2 KL of the predictions before and after the step.
            lr: outside of the bound.

        Returns:
            0-d; 0 if the change is not finite.
        """
        wanted = 2 * self.radius * self._dispersion * lr**2
        tiny = torch.finfo(changed.dtype).tiny ** 0.5
        finite = changed.isfinite()
        ratio = wanted / (changed.nan_to_num(nan=1e30, posinf=1e30).clamp_min(0) + tiny)
        self._rho.mul_(ratio.clamp(0.1, 2.0).sqrt()).clamp_(LEAST, MOST)
        return torch.where(finite, (FAR * ratio).sqrt().clamp_max(1.0), torch.zeros_like(ratio))

    def state(self) -> dict[str, Tensor]:
        """All numbers."""
        names = ("means", "h", "rho", "dispersion", "spread")
        return {name: getattr(self, "_" + name).clone() for name in names}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take them over."""
        for name, value in state.items():
            held = getattr(self, "_" + name)
            setattr(self, "_" + name, value.to(held).clone())
