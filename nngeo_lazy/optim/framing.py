"""From a curvature and dampings to the frame that a step is made in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..operators import (
    BaseLinearOperator,
    BlockDiagonalLinearOperator,
    DenseLinearOperator,
    FactoredGaussNewtonLinearOperator,
)
from ..space import ParamSpace
from .coordinates import Coordinates, EigenFrame, Frame, has_eigenvectors
from .direction import Direction
from .loss import Loss
from .options import Options
from .solving import Dampings, Solver
from .trust import Trust

__all__ = ["Framing"]

Solve = Callable[[Tensor], Tensor]  # of a flat vector over the whole space


class Framing:
    """Keeps one `Direction`, in the frame of the latest curvature and dampings.

    Args:
        space: of all parameters.
        parameters: likewise.
        options: of the optimizer.
        like: a tensor of the dtype and on the device of the numbers.

    Attributes:
        direction: None before the first step.
        rank: of a curvature of one batch, whose other eigenvalues are zero; None is full.
    """

    def __init__(
        self,
        space: ParamSpace,
        parameters: Mapping[str, Tensor],
        options: Options,
        like: Tensor,
    ) -> None:
        self._space, self._parameters, self._options, self._like = space, parameters, options, like
        self._solver = Solver(space, options.damping_method)
        self._made_from: tuple[Any, ...] | None = None
        self.direction: Direction | None = None
        self.rank: int | None = None

    @property
    def far(self) -> bool:
        """Whether the last step that was measured went too far."""
        trust = None if self.direction is None else self.direction.trust
        return trust is not None and trust.far

    def of(
        self,
        F: BaseLinearOperator | None,
        groups: Sequence[Mapping[str, Any]],
        loss: Loss,
    ) -> Direction:
        """The direction in the frame of a structured curvature; None is none yet.

        Args:
            F: undamped.
            groups: of parameters, with their dampings.
            loss: tells what F is multiplied by, and what its eigenvalues should not be below.
        """
        dampings, unit = Dampings.of(groups), loss.unit
        key = (F, dampings, unit)
        held = self._made_from
        same = held is not None and held[0] is F and held[1] == dampings and held[2] is unit
        if self.direction is not None and same:
            return self.direction
        direction = self._direction(self._coordinates(F, dampings))
        if F is not None and self._spectral(F, dampings):
            frame = EigenFrame(direction.coordinates, F)
            frame.damp(dampings.by_name, self._options.eps, unit, loss.least)
            direction.turn(frame)
        elif F is not None:
            direction.turn(self._solved(direction.coordinates, F, dampings, loss))
        self._made_from = key
        return direction

    def free(self, names: Sequence[str], solve: Solve, unit: Tensor | float) -> Direction:
        """The direction with a matrix-free curvature of some parameters."""
        direction, wanted = self.direction, tuple(names)
        known = () if direction is None else direction.coordinates.names
        same = direction is not None and direction.coordinates.flat == wanted
        if direction is None or not same or set(known) != set(self._parameters):
            direction = self._direction(
                Coordinates(self._parameters, None, self._space.resolve, wanted)
            )
        coordinates = direction.coordinates
        direction.turn(Frame(coordinates, self._flat(coordinates, solve, unit), cheap=False))
        return direction

    def _spectral(self, F: BaseLinearOperator, dampings: Dampings) -> bool:
        if self._options.damping_method != "exact" or not has_eigenvectors(F):
            return False
        members = F.members if isinstance(F, BlockDiagonalLinearOperator) else (F,)
        dense = any(isinstance(member, DenseLinearOperator) for member in members)
        return dampings.alike or not dense  # a dense block may be damped in parts

    def _coordinates(self, F: BaseLinearOperator | None, dampings: Dampings) -> Coordinates:
        if F is None or F.space is None or self._spectral(F, dampings):
            held = None if self.direction is None else self.direction.coordinates
            same = held is not None and set(held.names) == set(self._parameters)
            if held is not None and same and F is not None and held.serves(F):
                return held
            return Coordinates(self._parameters, F, self._space.resolve)
        names = [self._space.resolve(name) for name in F.space.names]
        return Coordinates(self._parameters, None, self._space.resolve, names)

    def _direction(self, coordinates: Coordinates) -> Direction:
        before = self.direction
        if before is not None and before.coordinates.same(coordinates):
            return before
        options = self._options
        trust = None
        if options.radius is not None:
            trust = Trust(options.radius, options.momentum, self._like)
            if before is not None and before.trust is not None:
                trust.restore(before.trust.state())
        made = Direction(coordinates, options.momentum, options.second_moments, trust, self._like)
        if before is not None:
            made.carry(before)
        self.direction = made
        return made

    def restore(
        self,
        state: Mapping[str, Any],
        F: BaseLinearOperator | None,
        groups: Sequence[Mapping[str, Any]],
        loss: Loss,
    ) -> None:
        """Take over a state, with the curvature that it was solved with, if that is kept."""
        flat = state["flat"]
        if flat is None:
            self.of(F, groups, loss)
        else:
            resolve = self._space.resolve
            self._direction(
                Coordinates(self._parameters, None, resolve, [resolve(name) for name in flat])
            )
        if self.direction is not None:
            self.direction.restore(state)

    def take_over(self, before: Direction | None) -> None:
        """Go on from the averages of an optimizer's former parameters."""
        self.direction = before

    def _solved(
        self,
        coordinates: Coordinates,
        F: BaseLinearOperator,
        dampings: Dampings,
        loss: Loss,
    ) -> Frame:
        if None in dampings.by_name.values():
            dampings = dampings.absolute(self._relative(F, loss))
        space = F.space
        if space is None:
            raise TypeError("expected a curvature of named parameters")

        every, solver = self._space, self._solver  # and not self, which holds the frame

        def solve(v: Tensor) -> Tensor:
            whole = every.unravel(v)
            names = {every.resolve(name): name for name in space.names}
            found = solver(F, {own: whole[name] for name, own in names.items()}, dampings)
            zero = {n: torch.zeros_like(p) for n, p in whole.items() if n not in names}
            return every.ravel({**{name: found[own] for name, own in names.items()}, **zero})

        cheap = not isinstance(F, FactoredGaussNewtonLinearOperator)
        return Frame(coordinates, self._flat(coordinates, solve, loss.unit), cheap)

    def _relative(self, F: BaseLinearOperator, loss: Loss) -> dict[str, float]:
        """eps times the mean eigenvalue of each parameter's block."""
        eps, space = self._options.eps, F.space
        if space is None:
            raise TypeError("expected a curvature of named parameters")
        tiny = torch.finfo(F.dtype).tiny ** 0.5
        if not isinstance(F, BlockDiagonalLinearOperator):
            names = [self._space.resolve(name) for name in space.names]
            rank = min(F.shape[-1], self.rank or F.shape[-1])
            mean = max(float(F.trace()) / rank, loss.floor(rank, names))
            return dict.fromkeys(names, eps * mean + tiny)
        means = torch.stack([member.trace() / member.shape[-1] for member in F.members]).tolist()
        found, floors = {}, loss.floors()
        for layout, mean in zip(F.layouts, means, strict=True):
            inside = {
                self._space.resolve(name)
                for where in layout.slices
                for name, own in space.slices.items()
                if where.start < own.stop and own.start < where.stop
            }
            trace = sum(floors[name] * loss.sizes[name] for name in inside if name in floors)
            least = max(mean, trace / max(1, layout.size))
            found.update(dict.fromkeys(inside, eps * least + tiny))
        return found

    def _flat(self, coordinates: Coordinates, solve: Solve, unit: Tensor | float) -> Solve:
        """A solve over the space as one of the known part of the buffers."""
        known, space = coordinates.known, self._space

        def solved(y: Tensor) -> Tensor:
            whole = torch.zeros(coordinates.size, dtype=y.dtype, device=y.device)
            whole[:known] = y
            parts = coordinates.views(whole)
            shapes = dict(zip(space.names, space.shapes, strict=True))
            flat = space.ravel({n: parts[n].reshape(s) for n, s in shapes.items()})
            parts.copy_(space.unravel(solve(flat)))
            return whole[:known] / unit

        return solved
