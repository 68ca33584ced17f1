"""The quasi-diagonal: each output's weights with its bias, in closed form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import NotPositiveDefiniteError
from .base import BaseLinearOperator, Krylov
from .composite import add_diagonal_lazily
from .damping import Damping
from .decompose import eps
from .diagonal import DiagonalLinearOperator
from .info import Info
from .lazy import LazyLinearOperator

__all__ = ["QuasiDiagonalLinearOperator"]


class QuasiDiagonalLinearOperator(LazyLinearOperator):
    r"""For each output a diagonal over its weights, coupled to its bias by one vector.

    .. math:: A_o = \begin{pmatrix} \mathrm{diag}(a) + p\, b b^T & q\, b \\ q\, b^T & r
        \end{pmatrix}, \qquad p = (\kappa + q^2) / r

    The Fisher's quasi-diagonal has b = f_0 (without its last entry), q = 1, r = F_00 and kappa = 0:
    diag(F_kk - F_k0^2 / F_00) + f_0 f_0^T / F_00. The family is closed under multiples, any
    diagonal damping and inversion; the inverse of an undamped one is an arrow (p = 0). kappa = pr -
    q^2 is stored for its digits: from p, q and r it would cancel.

    Args:
        diag: a (o, i).
        cross: b (o, i).
        coupling: q, r, kappa (o, 3).
        info: what is known besides the numbers.

    The matrix's coordinates are row-major (o, i + 1), the bias last.

    Example:
        >>> diag, cross = torch.tensor([[1.0]]), torch.tensor([[2.0]])
        >>> QuasiDiagonalLinearOperator(diag, cross, torch.tensor([[1.0, 4.0, 0.0]])).to_dense()
        tensor([[2., 2.],
                [2., 4.]])

    Source: Ollivier (2015), Riemannian metrics for neural networks I, section 2.3.
    """

    _implicit_in_vector = False
    _implicit_in_tensors = False

    def __init__(
        self, diag: Tensor, cross: Tensor, coupling: Tensor, *, info: Info | None = None
    ) -> None:
        if diag.dim() != 2 or cross.shape != diag.shape or coupling.shape != (diag.shape[0], 3):
            raise ValueError(
                "expected diag (o, i), cross (o, i) and coupling (o, 3), got "
                f"{tuple(diag.shape)}, {tuple(cross.shape)} and {tuple(coupling.shape)}"
            )
        super().__init__(diag, cross, coupling, info=info)
        self.diag, self.cross, self.coupling = diag, cross, coupling

    @classmethod
    def of(
        cls, diagonal: Tensor, cross: Tensor, *, info: Info | None = None
    ) -> QuasiDiagonalLinearOperator:
        """From a matrix's diagonal (o, i + 1), the bias last, and its entries F_k0 (o, i)."""
        weights, bias = diagonal[:, :-1], diagonal[:, -1]
        # an output whose bias has no curvature, or one without an inverse, is not coupled to it
        alive = bias >= torch.finfo(bias.dtype).tiny
        root = torch.where(alive, bias, torch.ones_like(bias)).sqrt().unsqueeze(-1)
        # F_k0^2 <= F_kk F_00 holds but for rounding, which is all that is left if gradients cancel
        limit = torch.where(alive.unsqueeze(-1), weights.sqrt() * root, torch.zeros_like(cross))
        cross = torch.maximum(torch.minimum(cross, limit), -limit)
        rest = weights - (cross / root).square()  # a square of F_k0 may underflow
        noise = 8 * eps(diagonal) * weights  # what cancels entirely is zero, not its rounding
        rest = torch.where(rest <= noise, torch.zeros_like(rest), rest)
        coupling = torch.stack([alive.to(bias), bias, torch.zeros_like(bias)], -1)
        return cls(rest, cross, coupling, info=info)

    @property
    def _terms(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """p, q, r, kappa, each (o, 1)."""
        q, r, kappa = self.coupling.unsqueeze(-1).unbind(1)
        known = r.abs() >= torch.finfo(r.dtype).tiny
        numerator = torch.where(known, kappa + q.square(), torch.zeros_like(r))
        return numerator / torch.where(known, r, torch.ones_like(r)), q, r, kappa

    def _grid(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Columns (..., n, k) as those of the weights (..., o, i, k) and biases (..., o, 1, k)."""
        o, i = self.diag.shape
        grid = v.reshape(*v.shape[:-2], o, i + 1, v.shape[-1])
        return grid[..., :-1, :], grid[..., -1:, :]

    def _size(self) -> torch.Size:
        size = self.diag.shape[0] * (self.diag.shape[1] + 1)
        return torch.Size((size, size))

    def _transpose_nonbatch(self) -> BaseLinearOperator:
        return self

    def _apply(self, v: Tensor) -> Tensor:
        p, q, r, _ = (t.unsqueeze(-1) for t in self._terms)  # (o,1,1)
        weights, bias = self._grid(v)
        b = self.cross.unsqueeze(-1)
        along = (b * weights).sum(-2, keepdim=True)
        top = self.diag.unsqueeze(-1) * weights + b * (p * along + q * bias)
        joint = torch.cat([top, q * along + r * bias], -2)
        return joint.reshape(*v.shape[:-2], -1, v.shape[-1])

    def _scaled_cross(self) -> tuple[Tensor, Tensor]:
        """b / a (o, i) and b^T a^-1 b (o, 1); if a = 0, the matrix is singular."""
        regular = self.diag != 0
        ones = torch.ones_like(self.diag)
        ratio = torch.where(regular, self.cross, 0 * ones) / torch.where(regular, self.diag, ones)
        return ratio, (self.cross * ratio).sum(-1, keepdim=True)

    def _solve_columns(self, v: Tensor, krylov: Krylov) -> Tensor:
        """By elimination of the biases, whose complement is diag(a) + (kappa / r) b b^T.

        Sherman and Morrison's formula for it, with the part along b taken out first: if that
        part nearly vanishes, it would be a difference of large numbers.
        """
        if krylov.check:
            self._require_regular()
        _, q, r, kappa = (t.unsqueeze(-1) for t in self._terms)  # (o,1,1)
        weights, bias = self._grid(v)
        a, b = self.diag.unsqueeze(-1), self.cross.unsqueeze(-1)
        ratio, s = (t.unsqueeze(-1) for t in self._scaled_cross())
        coupled = s != 0
        along_one = torch.where(coupled, b / torch.where(coupled, s, torch.ones_like(s)), 0 * b)
        rest = weights - (q / r) * b * bias
        along = (ratio * rest).sum(-2, keepdim=True)  # the part of rest along b is along / s b
        rest = rest - along_one * along
        again = (ratio * rest).sum(-2, keepdim=True)
        rest = rest - along_one * again
        x = rest / a + ratio * (
            (along + again) / (torch.where(coupled, s, 1.0) * (1 + kappa / r * s))
        )
        x0 = (bias - q * (b * x).sum(-2, keepdim=True)) / r
        return torch.cat([x, x0], -2).reshape(v.shape)

    def _inverted(self) -> QuasiDiagonalLinearOperator:
        p, q, r, kappa = self._terms
        ratio, s = self._scaled_cross()
        det = r + s * kappa
        coupling = torch.cat([-q / det, (1 + s * p) / det, -p / det], -1)
        return QuasiDiagonalLinearOperator(self.diag.reciprocal(), ratio, coupling, info=self.info)

    def _inverse(self) -> BaseLinearOperator:
        self._require_regular()
        return self._inverted()

    def _require_regular(self) -> None:
        with torch.no_grad():
            _, _, r, kappa = self._terms
            sizes = torch.cat([self.diag, r + self._scaled_cross()[1] * kappa], -1).abs()
            null = ~(sizes > sizes.numel() * eps(sizes) ** 2 * self._diagonal().abs().max())
        if bool(null.any()):
            raise NotPositiveDefiniteError(
                f"the matrix is singular: {int(null.sum())} of its {null.numel()} pivots are zero "
                "up to rounding. Solve with damping=, such as F.solve(v, damping=1e-3)"
            )

    def _damp(self, damping: Damping, method: str) -> BaseLinearOperator:
        o, i = self.diag.shape
        d = damping.value.expand(self.shape[-1]).reshape(o, i + 1)
        bias = d[:, -1:]
        p, q, r, kappa = self._terms
        if bool((r * bias < 0).any()):  # p = (kappa + q^2) / r would be a quotient of differences
            return add_diagonal_lazily(self, damping.value)
        coupling = torch.cat([q, r + bias, kappa + p * bias], -1)
        return QuasiDiagonalLinearOperator(
            self.diag + d[:, :-1], self.cross, coupling, info=self.info
        )

    def _scale(self, c: float | Tensor) -> BaseLinearOperator:
        _, q, r, kappa = self._terms
        coupling = torch.cat([q * c, r * c, kappa * c * c], -1)
        return QuasiDiagonalLinearOperator(self.diag * c, self.cross, coupling, info=self.info)

    def _diagonal(self) -> Tensor:
        p, _, r, _ = self._terms
        return torch.cat([self.diag + p * self.cross * self.cross, r], -1).reshape(-1)

    def _logdet(self) -> Tensor:
        _, _, r, kappa = self._terms
        pivots = torch.cat([self.diag, r + self._scaled_cross()[1] * kappa], -1)
        if bool((pivots < 0).any()):
            raise NotPositiveDefiniteError(
                "logdet: the matrix has a negative eigenvalue; add damping with F.damped(...)"
            )
        return pivots.log().sum()

    def _norm(self, ord: Any) -> Tensor:
        if ord != "fro":
            return super()._norm(ord)
        p, q, r, _ = self._terms
        bb = self.cross.square().sum(-1, keepdim=True)
        weights = self.diag.square().sum(-1, keepdim=True) + (p * bb).square()
        cross = 2 * (p * self.diag * self.cross.square()).sum(-1, keepdim=True)
        squares: Tensor = weights + cross + 2 * q.square() * bb + r.square()
        return squares.sum().sqrt()

    def _draw(self, n: int, generator: torch.Generator | None) -> Tensor:
        """The bias first, then the weights given it: a covariance diag(a) + (kappa / r) b b^T."""
        o, i = self.diag.shape
        _, q, r, kappa = self._terms
        if bool((self.diag < 0).any()) or bool((r < 0).any()):
            raise NotPositiveDefiniteError(
                "sample: the matrix has a negative eigenvalue, so it is no covariance; add damping "
                "with F.damped(...)"
            )
        known = r > 0
        safe = torch.where(known, r, torch.ones_like(r))
        z = torch.randn((o, i + 2, n), dtype=self.dtype, device=self.device, generator=generator)
        bias = r.sqrt().unsqueeze(-1) * z[:, -2:-1]
        given = (q / safe).unsqueeze(-1) * self.cross.unsqueeze(-1) * bias
        gamma = torch.where(known, kappa / safe, torch.zeros_like(r))
        if bool((gamma >= 0).all()):
            noise = self.diag.sqrt().unsqueeze(-1) * z[:, :-2]
            extra = (gamma.sqrt() * self.cross).unsqueeze(-1) * z[:, -1:]
        else:  # a rank-one downdate: the root of I + gamma u u^T, u = a^-1/2 b
            _, s = self._scaled_cross()
            inner = 1 + gamma * s
            if bool((inner < 0).any()):
                raise NotPositiveDefiniteError("sample: the matrix has a negative eigenvalue")
            u = torch.where(self.cross != 0, self.cross * self.diag.rsqrt(), 0.0)
            factor = torch.where(s > 0, (inner.sqrt() - 1) / s.clamp_min(eps(s) ** 4), 0.0)
            along = (u.unsqueeze(-1) * z[:, :-2]).sum(1, keepdim=True)
            noise = self.diag.sqrt().unsqueeze(-1) * (
                z[:, :-2] + (factor * u).unsqueeze(-1) * along
            )
            extra = torch.zeros_like(noise)
        return torch.cat([given + noise + extra, bias], 1).reshape(-1, n)

    def _trace(self) -> Tensor:
        return self._diagonal().sum()

    def _principal(self, index: Tensor, columns: Tensor | None, info: Info) -> BaseLinearOperator:
        last = self.diag.shape[1]
        if columns is not None and columns.shape == (1,) and int(columns[0]) == last:
            return DiagonalLinearOperator(self.coupling[:, 1], info=info)  # the biases alone
        return super()._principal(index, columns, info)

    def _kind(self) -> str:
        o, i = self.diag.shape
        return f"quasi-diagonal {o} x ({i} + 1)"
