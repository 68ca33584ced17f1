"""Directions: solves with the curvature of a loop, damped by parameter groups."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..averages import extended
from ..errors import ConvergenceWarning, DataError, NotPositiveDefiniteError
from ..numerics.solve import solve
from ..operators import (
    BaseLinearOperator,
    BlockDiagonalLinearOperator,
    DiagonalLinearOperator,
    EigenKroneckerLinearOperator,
    FactoredGaussNewtonLinearOperator,
)
from ..space import ParamSpace
from .options import HessianFree

__all__ = ["Dampings", "Solver", "Vectors", "conjugate_gradients"]

Vectors: TypeAlias = dict[str, Tensor]  # by parameter name


@dataclass(frozen=True)
class Dampings:
    """The damping of each parameter, one number in each group; None is relative."""

    by_name: Mapping[str, float | None]

    @classmethod
    def of(cls, groups: Sequence[Mapping[str, Any]]) -> Dampings:
        """Those of an optimizer's parameter groups."""
        return cls({n: _number(group["damping"]) for group in groups for n in group["param_names"]})

    def absolute(self, relative: Mapping[str, float]) -> Dampings:
        """The same with numbers in the place of None."""
        known = {n: relative.get(n, 0.0) if d is None else d for n, d in self.by_name.items()}
        return Dampings(known)

    @property
    def alike(self) -> bool:
        """Whether all are the same."""
        return len(set(self.by_name.values())) == 1

    @property
    def uniform(self) -> float | None:
        """The one that all have; None if they differ."""
        values = set(self.by_name.values())
        return values.pop() if len(values) == 1 else None

    def number(self, name: str) -> float:
        """A parameter's own, which is absolute."""
        value = self.by_name[name]
        if value is None:
            raise RuntimeError("a relative damping of no block")
        return value

    def vector(self, space: ParamSpace, dtype: torch.dtype) -> Tensor:
        """0-d if all have one, else (P,)."""
        like: dict[str, Any] = {"dtype": dtype, "device": space.device}
        if self.uniform is not None:
            return torch.full((), self.uniform, **like)
        sizes = zip(space.names, space.shapes, strict=True)
        return torch.cat([torch.full((s.numel(),), self.number(n), **like) for n, s in sizes])

    def on(self, F: BaseLinearOperator, space: ParamSpace) -> float | dict[Any, float | Tensor]:
        """What `F.damped` takes, with F over some parameters of the space.

        Raises:
            DataError: the parameters of one block are damped differently.
        """
        if self.uniform is not None:
            return self.uniform
        known = () if F.space is None else F.space.names
        own = {name: self.number(space.resolve(name)) for name in known}
        if isinstance(F, BlockDiagonalLinearOperator) and F.space is not None:
            starts = {F.space.slices[name].start: name for name in known}
            for block, layout, _ in F.parts:
                cut = {own[starts[piece.start]] for piece in layout.pieces}
                if len(cut) > 1:
                    raise DataError(
                        f"expected one damping in each block, but the groups give {sorted(cut)} to "
                        f"parts of {block!r}: put its parameters into one group, or give both the "
                        "same damping"
                    )
        return dict(own)


class Solver:
    """(F + damping)^-1 v, for an F that stays for a while.

    Where F's eigenvectors are known, damping costs nothing, and a solve reads nothing from the
    device. Elsewhere the inverse is made once for each F and damping.

    Args:
        space: all parameters; F is over them or over some of them.
        method: of damping, "exact" or "factored".
    """

    def __init__(self, space: ParamSpace, method: str) -> None:
        self._space, self._method = space, method
        self._of: tuple[BaseLinearOperator, Dampings] | None = None
        self._inverse: BaseLinearOperator | None = None

    def forget(self) -> None:
        """Drop the inverse."""
        self._of = self._inverse = None

    def __call__(self, F: BaseLinearOperator, v: Vectors, dampings: Dampings) -> Vectors:
        """The solution, by the names that F has.

        Raises:
            NotPositiveDefiniteError: the damped matrix is singular or indefinite.
            DataError: dampings that differ within a block.
        """
        damping = dampings.uniform
        eigen = self._method == "exact" and _eigenvectors_known(F)
        of_one_step = isinstance(F, FactoredGaussNewtonLinearOperator)
        found: Vectors
        if of_one_step or (eigen and damping is not None and damping > 0):
            with warnings.catch_warnings():  # of a residual that rounding limits
                warnings.simplefilter("ignore", ConvergenceWarning)
                found = F.solve(v, damping=dampings.on(F, self._space))
        else:
            found = self._inverted(F, dampings) @ v
        return found

    def _inverted(self, F: BaseLinearOperator, dampings: Dampings) -> BaseLinearOperator:
        held = self._of
        if self._inverse is None or held is None or held[0] is not F or held[1] != dampings:
            damped = F.damped(dampings.on(F, self._space), self._method)
            try:
                damped.logdet()  # raises if an eigenvalue is negative
                self._inverse = damped.inverse()
            except NotPositiveDefiniteError as error:
                raise NotPositiveDefiniteError(
                    f"the damped curvature is not positive definite ({error}): raise damping"
                ) from error
            self._of = F, dampings
        return self._inverse


def conjugate_gradients(
    F: BaseLinearOperator,
    g: Tensor,
    damping: Tensor,
    options: HessianFree,
    preconditioner: BaseLinearOperator | None,
    start: Tensor | None,
) -> Tensor:
    """(F + damping)^-1 g (P,), as far as the options go.

    Args:
        F: a matrix by its products.
        g: (P,).
        damping: 0-d or (P,).
        options: when to stop, and how much of the start is taken.
        preconditioner: an approximation of F, over all or some of the parameters.
        start: the last solution.
    """
    if preconditioner is not None and F.space is not None:
        preconditioner = extended(preconditioner, F.space)
    with warnings.catch_warnings():  # max_iter cuts it off on purpose
        warnings.simplefilter("ignore", ConvergenceWarning)
        found: Tensor = solve(
            F,
            g,
            damping=damping,
            method="cg",
            tol=options.tol,
            max_iter=options.max_iter,
            preconditioner=preconditioner,
            x0=None if start is None else options.decay * start,
        ).x
    return found


def _number(damping: float | None) -> float | None:
    return None if damping is None else float(damping)


def _eigenvectors_known(F: BaseLinearOperator) -> bool:
    blocks = F.members if isinstance(F, BlockDiagonalLinearOperator) else (F,)
    kinds = (EigenKroneckerLinearOperator, DiagonalLinearOperator)
    return all(isinstance(block, kinds) for block in blocks)
