"""Inverses that are an iteration of one's choice, as lazy operators."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import linalg
from ..errors import UnsupportedLayerError
from .base import BaseLinearOperator, Krylov
from .info import Info
from .lazy import LazyLinearOperator, require_symmetric
from .vectors import flattened
from .warn import warn_unless_converged

__all__ = ["NAMES", "IteratedInverseLinearOperator"]

NAMES = {
    "cg": "conjugate gradients",
    "minres": "minimal residuals",
    "lsmr": "least squares",
    "neumann": "the Neumann series",
}


class IteratedInverseLinearOperator(LazyLinearOperator):
    """A^-1 by conjugate gradients, MINRES, LSMR or a Neumann series, with its settings.

    Args:
        base: A (m x n); (A^T A + damping)^-1 A^T of it with LSMR.
        method: one of `NAMES`.
        settings: the keywords of the iteration in `linalg`.
        info: what is known besides the numbers.
    """

    _implicit_in_tensors = False
    _implicit_in_vector = False

    def __init__(
        self,
        base: BaseLinearOperator,
        *,
        method: str,
        settings: dict[str, Any],
        info: Info | None = None,
    ) -> None:
        super().__init__(base, method=method, settings=settings, info=info)
        self.base, self.method, self.settings = base, method, settings
        self.maps_to_parameters = base.maps_to_parameters and base.is_square

    def _size(self) -> torch.Size:
        return torch.Size((*self.base.batch_shape, self.base.shape[-1], self.base.shape[-2]))

    def _transpose_nonbatch(self) -> BaseLinearOperator:
        if self.method != "lsmr":
            return self
        return self.__class__(self.base._transpose_nonbatch(), **self._kwargs)

    @property
    def known_symmetric(self) -> bool:
        """Whether A is."""
        return self.base.known_symmetric

    def _apply(self, v: Tensor) -> Tensor:
        wide, back = flattened(v)
        if self.method == "neumann":
            run = partial(linalg.neumann, self.base._apply)
        else:
            if torch.is_grad_enabled() and (v.requires_grad or self.base.requires_grad):
                raise UnsupportedLayerError(
                    f"an inverse by {self.method!r} has no gradient: take F.inverse(), whose "
                    "solve has one, or a product under torch.no_grad()"
                )
            run = self._krylov(wide)
        found = run(wide, **self.settings)
        tol = self.settings.get("tol")
        if self.method != "neumann" or tol is not None:
            warn_unless_converged(found, tol, v.dtype, NAMES[self.method])
        return back(found.x)

    def _krylov(self, like: Tensor) -> Any:
        if self.method == "lsmr":
            return partial(linalg.lsmr, self.base._apply, self.base._transpose_nonbatch()._apply)
        require_symmetric(self.base, like)
        return partial(linalg.cg if self.method == "cg" else linalg.minres, self.base._apply)

    def _solve_columns(self, v: Tensor, krylov: Krylov) -> Tensor:
        if self.method in ("cg", "minres"):
            return self.base._apply(v)
        return super()._solve_columns(v, krylov)  # a series that is cut off is no inverse

    def _kind(self) -> str:
        return f"inverse by {self.method} ({self.base._kind()})"
