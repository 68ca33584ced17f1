"""Low rank plus diagonal, its core signed: closed under sums, damping and (`eigen`) inversion."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import NotPositiveDefiniteError, UnsupportedLayerError
from ..precision import widest
from . import rules
from .base import BaseLinearOperator, Krylov
from .composite import ProductLinearOperator, SumLinearOperator
from .damping import Damping, collapse
from .decompose import Decomposition, eigh, eps, matrix_power
from .dense import MatrixLinearOperator
from .diagonal import DiagonalLinearOperator
from .eigen_low_rank import EigenLowRankLinearOperator
from .info import Info
from .lazy import LazyLinearOperator

__all__ = ["LowRankLinearOperator"]


class LowRankLinearOperator(LazyLinearOperator):
    r"""U diag(c) U^T + D, a signed core c of k numbers and a diagonal D.

    .. math:: A = U\,\mathrm{diag}(c)\,U^T + D, \qquad D = s I \text{ or } \mathrm{diag}(d)

    With orthonormal V and :math:`U c U^T = V \lambda V^T`, every function of A with D = s I is
    V f(lambda + s) V^T + f(s) (I - V V^T) (`eigen`). With a positive diagonal d, the same holds for
    D^-1/2 A D^-1/2, whose V and lambda give solves, inverse, determinant and samples. Neither needs
    Woodbury's identity, which loses the digits of a small D in low precision.

    Args:
        root: U (P, k).
        core: c (k,), of any sign; ones by default.
        diag: D, a 0-d tensor or (P,); zero by default.
        info: what is known besides the numbers.

    Example:
        >>> A = LowRankLinearOperator(torch.tensor([[2.0], [0.0]]))
        >>> A.damped(1.0).inverse().diagonal()
        tensor([0.2000, 1.0000])

    Source: Golub and Van Loan (2013), Matrix Computations, section 2.1.4 (the identity that this
    form avoids).
    """

    _implicit_in_vector = False

    def __init__(
        self,
        root: Tensor,
        core: Tensor | None = None,
        diag: Tensor | None = None,
        *,
        info: Info | None = None,
        decomposition: Decomposition | None = None,
    ) -> None:
        if root.dim() != 2:
            raise ValueError(f"expected a root of shape (P, k), got {tuple(root.shape)}")
        n, k = root.shape
        core = torch.ones(k, dtype=root.dtype, device=root.device) if core is None else core
        if core.shape != (k,):
            raise ValueError(f"expected a core of shape ({k},), got {tuple(core.shape)}")
        if diag is not None and diag.shape not in ((), (n,)):
            raise ValueError(f"expected a diagonal () or ({n},), got {tuple(diag.shape)}")
        # a constant diagonal changes nothing about the low-rank term
        read = (root, core) if diag is None or diag.dim() == 0 else (root, core, diag)
        self._decomposed = Decomposition.of(decomposition, *read)
        args = (root, core) if diag is None else (root, core, diag)
        super().__init__(*args, info=info, decomposition=self._decomposed)
        self.root, self.core, self.diag = root, core, diag

    @property
    def is_explicit(self) -> bool:
        """Always: an entry is a short sum of the root's."""
        return True

    @property
    def rank(self) -> int:
        """How many columns the root has."""
        return int(self.root.shape[1])

    def joined(self, other: LowRankLinearOperator, info: Info) -> LowRankLinearOperator:
        """The sum of two, its root their columns."""
        diags = [d for d in (self.diag, other.diag) if d is not None]
        return LowRankLinearOperator(
            torch.cat([self.root, other.root], 1),
            torch.cat([self.core, other.core]),
            None if not diags else diags[0] if len(diags) == 1 else diags[0] + diags[1],
            info=info,
        )

    def eigen(self) -> EigenLowRankLinearOperator:
        """The same matrix by its eigenvalues; with a diagonal that varies, scaled to be constant.

        Raises:
            NotPositiveDefiniteError: a diagonal that varies is not positive.
        """
        values, basis = self._spectrum()
        if self.diag is not None and self._asks_for_float64(values):
            values, basis = self._spectrum(torch.float64)
        if self.diag is None:  # a singular matrix is so exactly: rounding is no eigenvalue
            sizes = values.abs()
            noise = len(values) * eps(values) * sizes.amax(-1, keepdim=True)
            values = torch.where(sizes <= noise, 0.0, values)
        if self._constant:
            shift = self._shift.detach()
            return EigenLowRankLinearOperator(basis, values + shift, shift, info=self.info)
        scale = self._shift.detach().sqrt()
        one = torch.ones((), dtype=self.dtype, device=self.device)
        return EigenLowRankLinearOperator(basis, 1 + values, one, scale, info=self.info)

    # --- the decomposition -----------------------------------------------------------------------

    @property
    def _shift(self) -> Tensor:
        """D as it is held."""
        return self.core.new_zeros(()) if self.diag is None else self.diag

    @property
    def _constant(self) -> bool:
        return self._shift.dim() == 0

    def _scaled_root(self) -> Tensor:
        """U, or D^-1/2 U if the diagonal varies."""
        if self._constant:
            return self.root
        if not bool((self._shift > 0).all()):
            raise NotPositiveDefiniteError(
                "low rank plus diagonal has a closed form if the diagonal is constant or "
                "positive, but this one has entries that are zero or negative: add damping= to all "
                "parameters"
            )
        return self._shift.rsqrt().unsqueeze(-1) * self.root

    def _asks_for_float64(self, values: Tensor) -> bool:
        """Whether the rounding of lambda in its dtype is more than the digits of the diagonal."""
        if values.numel() == 0 or self.dtype == widest(self.device):
            return False
        rest = self._shift.detach().abs().amin() if self._constant else values.new_ones(())
        return float(rest) * 1e-3 < float(values.abs().max()) * eps(values)

    def _spectrum(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """lambda (m,) and V (P, m), m <= k, of the scaled low-rank term; without a graph.

        Computed in this dtype, or in that of the root if it is wider.
        """

        def compute() -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                root = self._scaled_root()
                work = root.to(torch.promote_types(root.dtype, dtype))
                q, r = torch.linalg.qr(work)
                values, vectors = eigh((r * self.core.to(r)) @ r.mT)
                return values.to(root), (q @ vectors).to(root)

        return self._decomposed.get(f"spectrum in {dtype}", compute)

    def _values(self) -> Tensor:
        """lambda, with a gradient if the tensors want one."""
        values, basis = self._spectrum()
        if not self._taped():
            return values
        function: Any = _Eigenvalues
        taped: Tensor = function.apply(self._scaled_root(), self.core, values, basis)
        return taped

    def _taped(self) -> bool:
        return torch.is_grad_enabled() and any(t.requires_grad for t in self._args)

    # --- primitives ------------------------------------------------------------------------------

    def _size(self) -> torch.Size:
        return torch.Size((self.root.shape[0], self.root.shape[0]))

    def _transpose_nonbatch(self) -> BaseLinearOperator:
        return self

    def _apply(self, v: Tensor) -> Tensor:
        y = self.root @ (self.core.unsqueeze(-1) * (self.root.mT @ v))
        return y if self.diag is None else y + self.diag.reshape(-1, 1) * v

    def _solve_columns(self, v: Tensor, krylov: Krylov) -> Tensor:
        return self.eigen()._solve_columns(v, krylov)

    def _damp(self, damping: Damping, method: str) -> BaseLinearOperator:
        d = collapse(damping.value)
        diag = d if self.diag is None else self.diag + d
        return LowRankLinearOperator(
            self.root, self.core, diag, info=self.info, decomposition=self._decomposed
        )

    def _scale(self, c: float | Tensor) -> BaseLinearOperator:
        diag = None if self.diag is None else self.diag * c
        return LowRankLinearOperator(self.root, self.core * c, diag, info=self.info)

    def _diagonal(self) -> Tensor:
        return self.root.square() @ self.core + self._shift

    def _logdet(self) -> Tensor:
        eigen = self.eigen()
        if not self._taped():
            return eigen._logdet()
        eigen._require_nonnegative("logdet")
        values = self._values()
        if self._constant:
            rest = eigen.multiplicity * self._shift.log() if eigen.multiplicity else 0.0
            return (values + self._shift).log().sum() + rest
        return (1 + values).log().sum() + self._shift.log().sum()

    def _norm(self, ord: Any) -> Tensor:
        if ord == "fro":
            gram = self.root.mT @ self.root
            weighted = gram * self.core
            total = (weighted * weighted.mT).sum()
            if self.diag is not None:
                d = self.diag.expand(self.shape[-1])
                total = total + 2 * d @ (self.root.square() @ self.core) + d.square().sum()
            return total.clamp_min(0).sqrt()
        if not self._constant:
            return super()._norm(ord)
        eigen, values = self.eigen(), self._values() + self._shift
        return EigenLowRankLinearOperator(eigen.basis, values, self._shift)._norm(ord)

    def _inverse(self) -> BaseLinearOperator:
        return super()._inverse() if self._taped() else self.eigen()._inverse()

    def _power(self, p: float) -> BaseLinearOperator:
        if p == 1:
            return self
        if not self._taped():
            return self.eigen()._power(p)
        return self._inverse() if p == -1 else self._taped_power(p)

    def _taped_power(self, p: float) -> BaseLinearOperator:
        """The power as a lazy sum s^p I + Q (M^p - s^p I) Q^T, differentiable in all tensors."""
        self.eigen()._power(p)  # raises if there is none
        q, r = torch.linalg.qr(self._scaled_root())
        pivots = r.detach().diagonal().abs()
        if self.rank > len(q) or bool((pivots <= len(q) * eps(r) * pivots.max()).any()):
            raise UnsupportedLayerError(
                f"power({p:g}) is not differentiable if the columns of the root depend on each "
                "other: detach() it, or differentiate through solve"
            )
        shift = self._shift.pow(p) if self.diag is not None else self._shift
        inner = (r * self.core) @ r.mT + self._shift.expand(r.shape[0]).diag_embed()
        power = matrix_power(inner, *eigh(inner), p) - shift.expand(r.shape[0]).diag_embed()
        low = ProductLinearOperator(MatrixLinearOperator(q), MatrixLinearOperator(power @ q.mT))
        rest = DiagonalLinearOperator(shift.expand(self.shape[-1]))
        return SumLinearOperator(low, rest, info=self.info)

    def _pinv(self, rcond: float | None) -> BaseLinearOperator:
        if self._taped():
            raise UnsupportedLayerError(
                "the pseudo-inverse of low rank plus diagonal is not differentiable: detach() it, "
                "or differentiate through solve"
            )
        return self.eigen()._pinv(rcond)

    def _draw(self, n: int, generator: torch.Generator | None) -> Tensor:
        diag = self._shift.expand(self.shape[-1])
        if not (bool((self.core >= 0).all()) and bool((diag >= 0).all())):
            if not self._taped():
                return self.eigen()._draw(n, generator)
            root = self._power(0.5)
            return root._apply(self._noise(self.shape[-1], n, generator))
        small = self._noise(self.rank, n, generator)
        low = self.root @ (self.core.sqrt().unsqueeze(-1) * small)
        if self.diag is None:
            return low
        return low + diag.sqrt().unsqueeze(-1) * self._noise(self.shape[-1], n, generator)

    def _noise(self, rows: int, n: int, generator: torch.Generator | None) -> Tensor:
        return torch.randn((rows, n), dtype=self.dtype, device=self.device, generator=generator)

    def _eigensystem(self) -> tuple[Tensor, BaseLinearOperator]:
        eigen = self.eigen()
        _, basis = eigen._eigensystem()
        rest = self._shift.expand(eigen.multiplicity)
        return torch.cat([self._values() + self._shift, rest]), basis

    def _dense(self) -> Tensor:
        low = (self.root * self.core) @ self.root.mT
        return low if self.diag is None else low + self.diag.expand(low.shape[0]).diag_embed()

    def _principal(self, index: Tensor, columns: Tensor | None, info: Info) -> BaseLinearOperator:
        diag = self.diag if self.diag is None or self.diag.dim() == 0 else self.diag[index]
        return LowRankLinearOperator(self.root[index], self.core, diag, info=info)

    def _kind(self) -> str:
        more = "" if self.diag is None else " + c I" if self.diag.dim() == 0 else " + diagonal"
        return f"rank {self.rank} of {self.shape[-1]}{more}"


@rules.sums.register(LowRankLinearOperator, LowRankLinearOperator)
def _(A: LowRankLinearOperator, B: LowRankLinearOperator, info: Info) -> BaseLinearOperator:
    return A.joined(B, info)


@rules.plus_diagonal.register(EigenLowRankLinearOperator)
def _(A: EigenLowRankLinearOperator, d: Tensor) -> BaseLinearOperator:
    root, core = A._scaled(A.basis.detach()), A.values - A.rest
    rest = A.rest if A.scale is None else A.rest * A.scale.square()
    return LowRankLinearOperator(root, core, rest + d, info=A.info)


class _Eigenvalues(torch.autograd.Function):
    """The nonzero eigenvalues of U diag(c) U^T, differentiable once, whatever the rank of U.

    d lambda_i = v_i^T dA v_i, which is right for functions that treat equal eigenvalues alike.
    """

    @staticmethod
    def forward(ctx: Any, root: Tensor, core: Tensor, values: Tensor, basis: Tensor) -> Tensor:
        ctx.save_for_backward(root, core, basis)
        return values.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        root, core, basis = ctx.saved_tensors
        inside = basis.mT @ root  # (m,k)
        weighted = grad.unsqueeze(-1) * inside
        return 2 * (basis @ weighted) * core, (weighted * inside).sum(0), None, None
