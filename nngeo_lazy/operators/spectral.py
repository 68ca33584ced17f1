"""Matrices whose eigendecomposition is known: every function of them is one of the eigenvalues."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, cast

import torch
from torch import Tensor

from ..errors import ConvergenceWarning, NotPositiveDefiniteError
from ..precision import widest
from . import rules
from .base import BaseLinearOperator, Krylov, flat_positions
from .damping import Damping, collapse
from .decompose import DIGITS, eps
from .warn import warn

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
    def _damp_factors(self, d: Tensor, damping: Damping) -> BaseLinearOperator | None:
        """Factored damping by d I, if the structure has factors."""

    # Whether the eigenvalues are computed from a matrix, so that its rounding is in them.
    _values_are_computed = False

    @property
    def is_explicit(self) -> bool:
        """Always: the eigenvalues and the basis are held."""
        return True

    def _in_float64(self) -> BaseLinearOperator:
        """The same matrix in float64, which an operator with computed eigenvalues keeps."""
        return self.to(torch.float64)

    def _own_rounding(self) -> Tensor:
        """How far off the matrix may be for the rounding of its entries (0-d)."""
        return self.eigenvalues.new_zeros(())

    def _regular(self) -> tuple[SpectralLinearOperator, Tensor]:
        """The operator and eigenvalues of which functions with a pole at zero are taken.

        In float64 if rounding would be in the digits that the smallest eigenvalue decides. What the
        rounding of the entries themselves decides comes with a `ConvergenceWarning`.
        """
        values = self.eigenvalues
        if not self._values_are_computed or _well_conditioned(values):
            return self, values
        if self.dtype == torch.float64 or widest(self.device) != torch.float64:
            self._warn_of_rounding(values)
            return self, values
        wide = cast(SpectralLinearOperator, self._in_float64())
        precise = wide.eigenvalues
        if bool((values.detach() > 0).all()) and bool((precise.detach() <= 0).any()):
            # semidefinite but for the rounding of its entries, which is more than the damping
            self._warn_of_rounding(values)
            return self, values
        if not _well_conditioned(precise):
            self._warn_of_rounding(values)
        return wide, precise

    def _warn_of_rounding(self, values: Tensor) -> None:
        noise, least = float(self._own_rounding()), float(values.detach().abs().min())
        remedy = "" if self.dtype == torch.float64 else ", or build the matrix in float64"
        warn(
            ConvergenceWarning(
                f"the smallest eigenvalue of the matrix ({least:.2g}) is below the rounding of its "
                f"entries in {self.dtype} ({noise:.2g}): the result depends on that rounding. Take "
                f"damping= above {noise:.1g}{remedy}",
                noise,
                0,
            )
        )

    def _eigensystem(self) -> tuple[Tensor, BaseLinearOperator]:
        return self.eigenvalues, self.basis()

    def _solve_columns(self, v: Tensor, krylov: Krylov) -> Tensor:
        if krylov.check:
            self._require_regular()
        operator, values = self._regular()
        rotated = operator.rotate(v.to(operator.dtype))
        return operator.unrotate(rotated / values.unsqueeze(-1)).to(v.dtype)

    def _damp(self, damping: Damping, method: str) -> BaseLinearOperator:
        d = collapse(damping.value)
        closed = self._damp_factors(d, damping) if method == "factored" and d.dim() == 0 else None
        closed = self._shifted(d) if closed is None else closed
        return rules.plus_diagonal(self, d) if closed is None else closed

    def _trace(self) -> Tensor:
        return self._diagonal().sum()

    def _logdet(self) -> Tensor:
        values = self.eigenvalues
        null = self._null(None)
        if bool(null.any()):  # -inf
            values = torch.where(null, 0.0, values)
        else:
            values = self._regular()[1].to(values.dtype)
        if bool((values < 0).any()):
            raise NotPositiveDefiniteError(
                f"logdet: the matrix has a negative eigenvalue {_least(values)}; add "
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
        values, operator = self.eigenvalues, self
        if p < 0:
            self._require_regular()
            operator, values = self._regular()
        if p != int(p) and bool((values < 0).any()):
            raise NotPositiveDefiniteError(
                f"power {p}: the matrix has a negative eigenvalue {_least(values)}; add "
                "damping with F.damped(...)"
            )
        if operator is not self:
            return operator._function(values.pow(p), p).to(self.dtype)
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
                f"sample: the matrix has a negative eigenvalue {_least(values)}, so it is "
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


def _well_conditioned(values: Tensor) -> bool:
    """Whether rounding relative to the largest eigenvalue leaves digits of the smallest."""
    if values.numel() == 0:
        return True
    sizes = values.detach().abs()
    return float(sizes.min()) * DIGITS >= float(sizes.max()) * eps(values)


def _least(values: Tensor) -> str:
    """The least of some numbers, in a message."""
    return f"{float(values.detach().min()):.3g}"
