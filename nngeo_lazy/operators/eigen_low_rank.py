"""Free eigenvalues in the eigenbasis of a low-rank matrix: functions of low rank plus diagonal."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import NotPositiveDefiniteError, UnsupportedLayerError
from . import rules
from .base import BaseLinearOperator, Krylov
from .composite import ProductLinearOperator, SumLinearOperator
from .damping import Damping, collapse
from .decompose import eps
from .dense import MatrixLinearOperator
from .diagonal import DiagonalLinearOperator
from .info import Info
from .lazy import LazyLinearOperator

__all__ = ["EigenLowRankLinearOperator"]


class EigenLowRankLinearOperator(LazyLinearOperator):
    r"""S (V diag(values) V^T + rest (I - V V^T)) S with orthonormal V and a positive diagonal S.

    .. math:: A = S \left( V \Lambda V^T + \rho\,(I - V V^T) \right) S

    What lies in V and what does not is kept apart, so that an inverse whose `rest` is far above its
    values has the digits of both. V lies on a manifold: it is a constant to autograd.

    Args:
        basis: V (P, m), orthonormal columns.
        values: Lambda (m,).
        rest: rho, a 0-d tensor.
        scale: the diagonal of S (P,), positive; the identity by default.
        info: what is known besides the numbers.

    Example:
        >>> V = torch.tensor([[1.0], [0.0]])
        >>> A = EigenLowRankLinearOperator(V, torch.tensor([4.0]), torch.tensor(1e-9))
        >>> A.inverse().inverse().diagonal()
        tensor([4.0000e+00, 1.0000e-09])
    """

    _implicit_in_tensors = False
    _implicit_in_vector = False

    def __init__(
        self,
        basis: Tensor,
        values: Tensor,
        rest: Tensor,
        scale: Tensor | None = None,
        *,
        info: Info | None = None,
    ) -> None:
        if basis.dim() != 2 or values.shape != basis.shape[1:] or rest.dim() > 0:
            raise ValueError(
                "expected basis (P, m), values (m,) and a 0-d rest, got "
                f"{tuple(basis.shape)}, {tuple(values.shape)} and {tuple(rest.shape)}"
            )
        if scale is not None and scale.shape != basis.shape[:1]:
            raise ValueError(f"expected a scale ({len(basis)},), got {tuple(scale.shape)}")
        super().__init__(basis, values, rest, *(() if scale is None else (scale,)), info=info)
        self.basis, self.values, self.rest, self.scale = basis, values, rest, scale

    @property
    def multiplicity(self) -> int:
        """How many eigenvalues `rest` stands for."""
        return int(self.basis.shape[0] - self.basis.shape[1])

    def _of(self, values: Tensor, rest: Tensor, scale: Tensor | None) -> EigenLowRankLinearOperator:
        return EigenLowRankLinearOperator(self.basis, values, rest, scale, info=self.info)

    def _scaled(self, v: Tensor, inverse: bool = False) -> Tensor:
        if self.scale is None:
            return v
        s = self.scale.unsqueeze(-1)
        return v / s if inverse else v * s

    def _split(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """V^T v, and the part of v that is orthogonal to V (twice is enough: Parlett 1980)."""
        basis = self.basis.detach()
        inside = basis.mT @ v
        outside = v - basis @ inside
        again = basis.mT @ outside
        return inside + again, outside - basis @ again

    def _function(self, v: Tensor, values: Tensor, rest: Tensor) -> Tensor:
        """V values V^T v + rest (I - V V^T) v."""
        inside, outside = self._split(v)
        y = self.basis.detach() @ (values.unsqueeze(-1) * inside)
        return y + rest * outside if self.multiplicity else y

    def _size(self) -> torch.Size:
        return torch.Size((len(self.basis), len(self.basis)))

    def _transpose_nonbatch(self) -> BaseLinearOperator:
        return self

    def _apply(self, v: Tensor) -> Tensor:
        return self._scaled(self._function(self._scaled(v), self.values, self.rest))

    def _solve_columns(self, v: Tensor, krylov: Krylov) -> Tensor:
        if krylov.check:
            self._require_regular()
        rest = self.rest.reciprocal() if self.multiplicity else self.rest
        inner = self._function(self._scaled(v, True), self.values.reciprocal(), rest)
        return self._scaled(inner, True)

    def _null(self, rcond: float | None) -> tuple[Tensor, Tensor]:
        """Which of the values count as zero, and whether the rest does."""
        rest = self.rest.reshape(1)[: min(self.multiplicity, 1)]
        sizes = torch.cat([self.values, rest]).detach().abs()
        if rcond is None:  # eigenvalues are accurate on their own, far below eps times the largest
            rcond = sizes.numel() * eps(sizes) ** 2
        null = sizes <= rcond * sizes.max()
        none = torch.zeros((), dtype=torch.bool, device=null.device)
        return null[: len(self.values)], null[-1] if self.multiplicity else none

    def _require_regular(self) -> None:
        null, rest = self._null(None)
        count = int(null.sum()) + self.multiplicity * int(rest)
        if count:
            raise NotPositiveDefiniteError(
                f"the matrix is singular: {count} of its {len(self.basis)} eigenvalues are zero up "
                "to rounding. Solve with damping=, such as F.solve(v, damping=1e-3), or take "
                "F.pinv()"
            )

    def _require_nonnegative(self, what: str) -> None:
        rest = self.rest.reshape(1)[: min(self.multiplicity, 1)]
        least = torch.cat([self.values, rest]).min()
        if bool(least < 0):
            raise NotPositiveDefiniteError(
                f"{what}: the matrix has a negative eigenvalue {float(least):.3g}; add damping "
                "with F.damped(...)"
            )

    def _require_unscaled(self, what: str) -> None:
        if self.scale is not None:
            raise UnsupportedLayerError(
                f"{what} has no closed form for low rank plus a diagonal that varies: with a "
                "constant one, such as damping by a number, it has"
            )

    def _damp(self, damping: Damping, method: str) -> BaseLinearOperator:
        d = collapse(damping.value)
        if self.scale is None and d.dim() == 0:
            return self._of(self.values + d, self.rest + d, None)
        damped: BaseLinearOperator = rules.plus_diagonal(self, d)
        return damped

    def _scale(self, c: float | Tensor) -> BaseLinearOperator:
        return self._of(self.values * c, self.rest * c, self.scale)

    def _diagonal(self) -> Tensor:
        squares = self.basis.detach().square()
        diagonal = squares @ self.values
        if self.multiplicity:
            diagonal = diagonal + self.rest * (1 - squares.sum(1)).clamp_min(0)
        return diagonal if self.scale is None else diagonal * self.scale.square()

    def _logdet(self) -> Tensor:
        self._require_nonnegative("logdet")
        total = self.values.log().sum()
        if self.multiplicity:
            total = total + self.multiplicity * self.rest.log()
        return total if self.scale is None else total + 2 * self.scale.log().sum()

    def _norm(self, ord: Any) -> Tensor:
        if self.scale is not None:
            return super()._norm(ord)
        sizes, rest = self.values.abs(), self.rest.abs()
        if ord == "fro":
            return (sizes.square().sum() + self.multiplicity * rest.square()).sqrt()
        if ord == "nuc":
            return sizes.sum() + self.multiplicity * rest
        every = torch.cat([sizes, rest.reshape(1)[: min(self.multiplicity, 1)]])
        return every.max() if ord == 2 else every.min()

    def _inverse(self) -> BaseLinearOperator:
        self._require_regular()
        scale = None if self.scale is None else self.scale.reciprocal()
        rest = self.rest.reciprocal() if self.multiplicity else self.rest
        return self._of(self.values.reciprocal(), rest, scale)

    def _power(self, p: float) -> BaseLinearOperator:
        if p == -1:
            return self._inverse()
        self._require_unscaled(f"power({p:g})")
        if p < 0:
            self._require_regular()
        if p != int(p):
            self._require_nonnegative(f"power {p}")
        rest = self.rest.pow(p) if self.multiplicity else self.rest
        return self._of(self.values.pow(p), rest, None)

    def _pinv(self, rcond: float | None) -> BaseLinearOperator:
        self._require_unscaled("pinv")
        null, empty = self._null(rcond)
        values = torch.where(null, 0.0, torch.where(null, 1.0, self.values).reciprocal())
        rest = torch.where(empty, 0.0, torch.where(empty, 1.0, self.rest).reciprocal())
        return self._of(values, rest if self.multiplicity else self.rest, None)

    def _draw(self, n: int, generator: torch.Generator | None) -> Tensor:
        self._require_nonnegative("sample")
        z = torch.randn(
            (len(self.basis), n), dtype=self.dtype, device=self.device, generator=generator
        )
        rest = self.rest.sqrt() if self.multiplicity else self.rest
        return self._scaled(self._function(z, self.values.sqrt(), rest))

    def _eigensystem(self) -> tuple[Tensor, BaseLinearOperator]:
        self._require_unscaled("eigh")
        values = torch.cat([self.values, self.rest.expand(self.multiplicity)])
        return values, completed(self.basis.detach())

    def _dense(self) -> Tensor:
        return self._apply(torch.eye(len(self.basis), dtype=self.dtype, device=self.device))

    def _kind(self) -> str:
        n, m = self.basis.shape
        return f"eigen-rank {m} of {n} + c I" + ("" if self.scale is None else ", scaled")


def completed(basis: Tensor) -> BaseLinearOperator:
    """The orthogonal matrix (V, ...) by its reflectors I - Y T Y^T, never formed.

    Schreiber and Van Loan (1989), a storage-efficient WY representation.
    """
    n, m = basis.shape
    packed, tau = torch.geqrf(basis.to(torch.promote_types(basis.dtype, torch.float32)))
    reflectors = packed.tril(-1)
    reflectors.diagonal().fill_(1)
    # T^-1 = diag(1 / tau) + the strict upper triangle of Y^T Y; no reflection has tau = 0
    used = tau != 0
    weights = torch.where(used, tau, 1.0).reciprocal()
    inner = torch.linalg.inv((reflectors.mT @ reflectors).triu(1) + weights.diag_embed())
    reflectors, inner = (reflectors * used).to(basis), inner.to(basis)
    sign = basis.new_ones(n)
    sign[:m] = packed.diagonal().sign()
    left, right = -reflectors @ inner, reflectors.mT.contiguous()
    low = ProductLinearOperator(MatrixLinearOperator(left), MatrixLinearOperator(right))
    whole = SumLinearOperator(DiagonalLinearOperator(basis.new_ones(n)), low)
    return ProductLinearOperator(whole, DiagonalLinearOperator(sign))
