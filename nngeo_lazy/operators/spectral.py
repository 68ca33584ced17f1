"""Matrices whose eigendecomposition is known: every function of them is one of the eigenvalues."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from ..errors import NotPositiveDefiniteError
from . import rules
from .base import BaseLinearOperator, Krylov, flat_positions
from .damping import Damping, collapse

__all__ = ["SpectralLinearOperator"]


class SpectralLinearOperator(BaseLinearOperator):
    """A = Q diag(eigenvalues) Q^T with an orthogonal Q that is applied, not formed.

    Eigenvalues keep their sign. Those of a matrix that is positive semidefinite up to rounding are
    not negative.
    """

    @abstractmethod
    def rotate(self, v: Tensor) -> Tensor:
        """Into the eigenbasis: Q^T v, (..., p, k)."""

    @abstractmethod
    def unrotate(self, v: Tensor) -> Tensor:
        """Out of the eigenbasis: Q v, (..., p, k)."""

    @property
    @abstractmethod
    def eigenvalues(self) -> Tensor:
        """(p,), in the order of the basis; with a gradient if the tensors want one."""

    @abstractmethod
    def basis(self) -> BaseLinearOperator:
        """Q as an operator (its products only)."""

    @abstractmethod
    def _function(self, values: Tensor, p: float | None) -> BaseLinearOperator:
        """Q diag(values) Q^T; p says which power, if it is one."""

    @abstractmethod
    def _null(self, rcond: float | None) -> Tensor:
        """Which eigenvalues (p,) count as zero: up to rounding, or to rcond times the largest."""

    @abstractmethod
    def _frobenius(self) -> Tensor: ...

    @abstractmethod
    def _shifted(self, d: Tensor) -> BaseLinearOperator | None:
        """The sum with d I (d 0-d) or diag(d) (d (p,)) if it is closed, else None."""

    @abstractmethod
    def _damp_factors(self, d: Tensor) -> BaseLinearOperator | None:
        """Factored damping by d I, if the structure has factors."""

    @property
    def is_explicit(self) -> bool:
        """Always: the eigenvalues and the basis are held."""
        return True

    def _eigensystem(self) -> tuple[Tensor, BaseLinearOperator]:
        return self.eigenvalues, self.basis()

    def _solve_columns(self, v: Tensor, krylov: Krylov) -> Tensor:
        if krylov.check:
            self._require_regular()
        return self.unrotate(self.rotate(v) / self.eigenvalues.unsqueeze(-1))

    def _damp(self, damping: Damping, method: str) -> BaseLinearOperator:
        d = collapse(damping.value)
        closed = self._damp_factors(d) if method == "factored" and d.dim() == 0 else None
        closed = self._shifted(d) if closed is None else closed
        return rules.plus_diagonal(self, d) if closed is None else closed

    def _trace(self) -> Tensor:
        return self._diagonal().sum()

    def _logdet(self) -> Tensor:
        values = self.eigenvalues
        if bool((values < 0).any()):
            raise NotPositiveDefiniteError(
                f"logdet: the matrix has a negative eigenvalue {float(values.min()):.3g}; add "
                "damping with F.damped(...)"
            )
        return values.log().sum()

    def _norm(self, ord: Any) -> Tensor:
        if ord == "fro":
            return self._frobenius()
        sizes = self.eigenvalues.abs()
        if ord == "nuc":
            return sizes.sum()
        return sizes.max() if ord == 2 else sizes.min()

    def _inverse(self) -> BaseLinearOperator:
        return self._power(-1.0)

    def _power(self, p: float) -> BaseLinearOperator:
        values = self.eigenvalues
        if p < 0:
            self._require_regular()
        if p != int(p) and bool((values < 0).any()):
            raise NotPositiveDefiniteError(
                f"power {p}: the matrix has a negative eigenvalue {float(values.min()):.3g}; add "
                "damping with F.damped(...)"
            )
        return self._function(values.pow(p), p)

    def _pinv(self, rcond: float | None) -> BaseLinearOperator:
        values, null = self.eigenvalues, self._null(rcond)
        safe = torch.where(null, torch.ones_like(values), values)  # a gradient without NaN
        inverted = torch.where(null, torch.zeros_like(values), safe.reciprocal())
        return self._function(inverted, None)

    def _draw(self, n: int, generator: torch.Generator | None) -> Tensor:
        values = self.eigenvalues
        if bool((values < 0).any()):
            raise NotPositiveDefiniteError(
                f"sample: the matrix has a negative eigenvalue {float(values.min()):.3g}, so it is "
                "no covariance; add damping with F.damped(...)"
            )
        z = torch.randn(
            (self.shape[-1], n), dtype=self.dtype, device=self.device, generator=generator
        )
        if self.requires_grad and torch.is_grad_enabled():
            draws: Tensor = self._function(values.sqrt(), 0.5)._apply(z)
            return draws
        return self.unrotate(values.sqrt().unsqueeze(-1) * z)

    def _restrict(self, names: tuple[str, ...]) -> BaseLinearOperator:
        space = self.space
        if space is None or names == space.names:
            return self
        return self._principal(
            flat_positions(space, names, self.device), None, self.info.restrict(names)
        )

    def _require_regular(self) -> None:
        null = self._null(None)
        if bool(null.any()):
            raise NotPositiveDefiniteError(
                f"the matrix is singular: {int(null.sum())} of its {null.numel()} eigenvalues are "
                "zero up to rounding. Solve with damping=, such as F.solve(v, damping=1e-3), or "
                "take F.pinv()"
            )
