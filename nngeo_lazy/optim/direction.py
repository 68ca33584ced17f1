"""The direction of a step: running averages of gradients, solved with the curvature."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .coordinates import Coordinates, EigenFrame, Frame
from .trust import Trust, shorten

__all__ = ["Direction"]

ADAM = 3e-3  # the step size of parameters without a curvature
SECOND = 0.99  # of the running averages of squared gradients
AVERAGED = 0.9  # of gradients whose running average only tells how much of them is noise


class Direction:
    r"""Directions d = (F + damping)^-1 m, m the bias-corrected running average of gradients.

    In the eigenvectors of F a solve is a division, and all sums are those of one flat vector. A
    parameter without a curvature moves as in Adam. Nothing is read from the device.

    Args:
        coordinates: of all vectors.
        momentum: of the running average.
        adam: whether the square roots of second moments in the eigenvectors, as in Adam, take
            the place of eigenvalues.
        trust: bounds the step; None takes directions as they are, and plain gradients of what has
            no curvature.
        like: a tensor of the dtype and on the device of the numbers.

    Attributes:
        step: the last direction, by parameter: views of one buffer.
        on: 1, or 0 if the last gradients were not finite.
    """

    def __init__(
        self,
        coordinates: Coordinates,
        momentum: float,
        adam: bool,
        trust: Trust | None,
        like: Tensor,
    ) -> None:
        self.coordinates, self.trust, self._adam = coordinates, trust, adam
        self._averaged = momentum > 0 or trust is None  # else directions are of gradients alone

        def zeros(n: int) -> Tensor:
            return torch.zeros(n, dtype=like.dtype, device=like.device)

        size, known = coordinates.size, coordinates.known
        self._x, self._y, self._m = zeros(size), zeros(size), zeros(size)
        self._d, self._z, self._last = zeros(known), zeros(known), zeros(known)
        self._second = zeros(size) if adam else zeros(size - known)
        if trust is None:
            self._second = zeros(0)
        self._length = zeros(1)[0]  # of the last direction, squared, in the metric
        self._one, self._none = zeros(1)[0] + 1, zeros(1)[0]
        beta = momentum or (AVERAGED if trust is not None else 0.0)
        self._rates = torch.tensor([1 - beta, 1 - SECOND], dtype=like.dtype, device=like.device)
        self._counts = zeros(2)  # what averages over so many steps sum to
        self.frame: Frame | None = None
        self.step = coordinates.views(self._x)
        self.on = self._one

    # --- frames ----------------------------------------------------------------------------------

    def turn(self, frame: Frame) -> None:
        """Go on in another frame of the same coordinates."""
        old = self.frame
        if old is not None and old is not frame:
            for vector in (self._m, self._last):
                out = self._x[: len(vector)]
                old.unrotate(vector, out)
                frame.rotate(out, vector)
            if self._adam and isinstance(frame, EigenFrame) and isinstance(old, EigenFrame):
                known = self.coordinates.known
                self._second[:known] = frame.overlapped(old, self._second[:known])
        self.frame = frame

    def carry(self, before: Direction) -> None:
        """Take over the averages of other coordinates, as far as parameters agree."""
        self._counts.copy_(before._counts)
        if before.frame is not None:
            before.frame.unrotate(before._m, before._x)
        held = before.coordinates.views(before._x)
        known = [name for name in self.coordinates.names if name in before.coordinates.names]
        same = [name for name in known if held[name].numel() == self.step[name].numel()]
        self.coordinates.views(self._m).copy_({name: held[name] for name in same})

    # --- steps -----------------------------------------------------------------------------------

    def take(self, gradients: Mapping[str, Tensor], scale: Tensor | None) -> Tensor:
        """Make `step` from gradients.

        Args:
            gradients: by name; what is missing counts as zero.
            scale: what they are divided by.

        Returns:
            1, or 0 if a gradient is not finite, which leaves all averages as they are and the
            step at zero.
        """
        x, y, m, known = self._x, self._y, self._m, self.coordinates.known
        if len(gradients) < len(self.step):
            x.zero_()
        self.step.copy_(gradients)
        finite = x.sum().isfinite()
        x.copy_(torch.where(finite, x if scale is None else x / scale, self._none))
        on = self.on = finite.to(x.dtype)
        if self.frame is None:  # no finite curvature was seen yet
            x.zero_()
            return on
        self.frame.rotate(x, y)
        if known and self.trust is not None:
            self._clip(self.trust)
        rates = self._rates * on
        m.lerp_(y, rates[0])
        self._counts.lerp_(self._one.expand(2), rates)
        tiny = torch.finfo(x.dtype).tiny ** 0.5
        share, squares = self._counts.clamp_min(tiny).unbind()
        if known:
            nu = self._known(known, share, squares, rates[1], on)
            x[:known].mul_(nu)
        if known < len(x):
            self._formless(known, share, squares, rates[1], on)
        return on

    def of(self, parameters: Mapping[str, Tensor], measured: bool) -> dict[str, Tensor]:
        """The step of some parameters, in their shapes: shortened if something bounds it."""
        steps = {name: self.step[name].reshape(p.shape) for name, p in parameters.items()}
        if self.trust is not None:
            shorten(steps, parameters, self.trust.share(measured))
        return steps

    def _clip(self, trust: Trust) -> None:
        """Shorten a gradient that explodes, so that it does not stay in the averages for long."""
        y, z, frame = self._y[: self.coordinates.known], self._z, self.frame
        if frame is None or not frame.cheap:
            return
        frame.precondition(y, z)
        y.mul_(trust.clip(torch.dot(z, y)))

    def _known(
        self, known: int, share: Tensor, squares: Tensor, rate: Tensor, on: Tensor
    ) -> Tensor:
        """The direction of what has a curvature, and what it is multiplied by."""
        frame, y, m = self.frame, self._y[:known], self._m[:known]
        d, z, last = self._d, self._z, self._last
        if frame is None:
            raise RuntimeError("no frame")
        averaged = self._averaged
        if self._adam and isinstance(frame, EigenFrame):
            second = self._second[:known]
            second.lerp_(y.square(), rate)
            roots = (second / squares).sqrt_().add_(1e-8)
            torch.div(m, roots, out=d)
            torch.div(y, roots, out=z)
            length = torch.dot(d * frame.weights, d)
            s = torch.dot(z * frame.weights, z)
        else:
            if averaged or frame.cheap:
                frame.precondition(m, d)
            if self.trust is None:
                frame.unrotate(d, self._x[:known])
                return on / share
            if frame.cheap or not averaged:
                frame.precondition(y, z)
            if not frame.cheap:  # one solve tells nothing of noise
                d, z = (d, d / share) if averaged else (z * share, z)
                self._d = d
            length = torch.dot(d, m) if averaged or frame.cheap else torch.dot(z, y) * share**2
            s = torch.dot(z, y) if frame.cheap else length / share.square()
        if self.trust is None:
            raise RuntimeError("no bound")
        tiny = torch.finfo(y.dtype).tiny ** 0.5
        cosine = torch.dot(y, last) * (self._length * s + tiny**2).rsqrt()
        self._length = length
        nu = self.trust.scale(s, length / share.square(), cosine, on)
        frame.unrotate(d if averaged else z, self._x[:known])
        self._d, self._last = last, d
        return nu / share if averaged else nu

    def _formless(
        self, known: int, share: Tensor, squares: Tensor, rate: Tensor, on: Tensor
    ) -> None:
        """Adam, or the plain gradient if nothing bounds the step."""
        x, y, m = self._x[known:], self._y[known:], self._m[known:]
        if self._averaged:
            on, y = on / share, m
        if self.trust is None:
            torch.mul(y, on, out=x)
            return
        second = self._second[-len(x) :]
        second.lerp_(self._y[known:].square(), rate)
        torch.div(y, (second / squares).sqrt_().add_(1e-8), out=x)
        x.mul_(ADAM * self.trust.trusted * on)

    # --- state -----------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """The averages."""
        names = ("m", "last", "second", "length", "counts")
        kept: dict[str, Any] = {name: getattr(self, "_" + name).clone() for name in names}
        kept["flat"] = list(self.coordinates.flat) if self.coordinates.flat else None
        kept["trust"] = None if self.trust is None else self.trust.state()
        return kept

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take them over."""
        for name, value in state.items():
            if name not in ("trust", "flat"):
                held = getattr(self, "_" + name)
                held.copy_(value.to(held))
        if self.trust is not None:
            self.trust.restore(state["trust"])
