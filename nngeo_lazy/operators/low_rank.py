"""Low rank plus diagonal: closed under damping and, with a signed core, under inversion."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import NotPositiveDefiniteError, UnsupportedLayerError
from .base import BaseLinearOperator, Krylov
from .damping import Damping, collapse
from .decompose import Cache, eigh, eigvalsh, eps, matrix_power
from .diagonal import DiagonalLinearOperator
from .info import Info
from .lazy import LazyLinearOperator, ProductLinearOperator, SumLinearOperator

__all__ = ["LowRankLinearOperator"]


class LowRankLinearOperator(LazyLinearOperator):
    r"""U diag(c) U^T + D, a signed core c of k numbers and a diagonal D.

    .. math:: A = U\,\mathrm{diag}(c)\,U^T + D, \qquad D = s I \text{ or } \mathrm{diag}(d)

    With orthonormal V and :math:`U c U^T = V \lambda V^T`, every function of A with D = s I is
    f(s) I + V (f(lambda + s) - f(s)) V^T, of the same kind. With a positive diagonal d, the same
    holds for D^-1/2 A D^-1/2, whose V and lambda give solves, inverse, determinant and samples.
    Neither needs Woodbury's identity, which loses the digits of a small D in low precision.

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
    ) -> None:
        if root.dim() != 2:
            raise ValueError(f"expected a root of shape (P, k), got {tuple(root.shape)}")
        n, k = root.shape
        core = torch.ones(k, dtype=root.dtype, device=root.device) if core is None else core
        if core.shape != (k,):
            raise ValueError(f"expected a core of shape ({k},), got {tuple(core.shape)}")
        if diag is not None and diag.shape not in ((), (n,)):
            raise ValueError(f"expected a diagonal () or ({n},), got {tuple(diag.shape)}")
        super().__init__(root, core, *(() if diag is None else (diag,)), info=info)
        self.root, self.core, self.diag = root, core, diag
        self._cache = Cache()

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

    # --- the decomposition -----------------------------------------------------------------------

    @property
    def _shift(self) -> Tensor:
        """s, where the diagonal is constant."""
        return self.core.new_zeros(()) if self.diag is None else self.diag

    @property
    def _constant(self) -> bool:
        return self.diag is None or self.diag.dim() == 0

    def _scaled_root(self) -> Tensor:
        """U, or D^-1/2 U where the diagonal is a vector."""
        if self.diag is None or self.diag.dim() == 0:
            return self.root
        if not bool((self.diag > 0).all()):
            raise NotPositiveDefiniteError(
                "low rank plus diagonal has a closed form where the diagonal is constant or "
                "positive, but this one has entries that are zero or negative: add damping= to all "
                "parameters"
            )
        return self.diag.rsqrt().unsqueeze(-1) * self.root

    def _spectrum(self) -> tuple[Tensor, Tensor]:
        """lambda (m,) and V (P, m), m <= k, of the scaled low-rank term; without a graph."""

        def compute() -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                q, r = torch.linalg.qr(self._scaled_root())
                values, vectors = eigh((r * self.core) @ r.mT)
                return values, q @ vectors

        return self._cache.get("spectrum", list(self._args), compute)

    def _values(self) -> Tensor:
        """lambda, with a gradient where the tensors want one."""
        if not self._taped():
            return self._spectrum()[0]
        r = torch.linalg.qr(self._scaled_root())[1]
        return eigvalsh((r * self.core) @ r.mT)

    def _eigenvalues(self, what: str) -> tuple[Tensor, Tensor, int]:
        """lambda + s, s, and how many more eigenvalues equal s; the diagonal must be constant."""
        if not self._constant:
            raise UnsupportedLayerError(
                f"{what} has no closed form for low rank plus a diagonal that varies: with a "
                "constant one, such as damping by a number, it has"
            )
        values = self._values()
        return values + self._shift, self._shift, int(self.shape[-1]) - values.shape[0]

    def _taped(self) -> bool:
        return torch.is_grad_enabled() and any(t.requires_grad for t in self._args)

    def _null(self, values: Tensor, shift: Tensor, rest: int) -> Tensor:
        """Which of values are zero up to rounding, then whether the shift is, (m + 1,)."""
        joint = torch.cat([values, shift.reshape(1)]).detach().abs()
        # a shift that was added is exact on its own, far below eps times the largest
        tol = joint.numel() * eps(joint) * (1.0 if self.diag is None else eps(joint))
        null = joint <= tol * joint.max()
        null[-1] = null[-1] & (rest > 0)
        return null

    # --- primitives ------------------------------------------------------------------------------

    def _size(self) -> torch.Size:
        return torch.Size((self.root.shape[0], self.root.shape[0]))

    def _transpose_nonbatch(self) -> BaseLinearOperator:
        return self

    def _apply(self, v: Tensor) -> Tensor:
        y = self.root @ (self.core.unsqueeze(-1) * (self.root.mT @ v))
        if self.diag is None:
            return y
        return y + (self.diag * v if self.diag.dim() == 0 else self.diag.unsqueeze(-1) * v)

    def _solve_columns(self, v: Tensor, krylov: Krylov) -> Tensor:
        if self._constant:
            values, shift, rest = self._eigenvalues("solve")
            if krylov.check:
                self._require_regular(values, shift, rest)
            v_in, v_out = self._split(v)
            x = self._spectrum()[1] @ (v_in / values.unsqueeze(-1))
            return x if rest == 0 else x + v_out / shift
        values = self._values()
        if krylov.check and bool((1 + values <= 0).any()):
            raise NotPositiveDefiniteError("low rank plus diagonal is not positive definite")
        scale = self._root_diag()
        w = v / scale
        w_in, w_out = self._split(w)
        return (self._spectrum()[1] @ (w_in / (1 + values).unsqueeze(-1)) + w_out) / scale

    def _split(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """V^T v, and the part of v that is orthogonal to V (twice is enough: Parlett 1980)."""
        basis = self._spectrum()[1]
        inside = basis.mT @ v
        outside = v - basis @ inside
        return inside, outside - basis @ (basis.mT @ outside)

    def _root_diag(self) -> Tensor:
        if self.diag is None:
            raise TypeError("no diagonal")
        return self.diag.sqrt().unsqueeze(-1)

    def _require_regular(self, values: Tensor, shift: Tensor, rest: int) -> None:
        null = self._null(values, shift, rest)
        if bool(null.any()):
            count = int(null[:-1].sum()) + (rest if bool(null[-1]) else 0)
            raise NotPositiveDefiniteError(
                f"the matrix is singular: {count} of its {self.shape[-1]} eigenvalues are zero up "
                "to rounding. Solve with damping=, such as F.solve(v, damping=1e-3), or take "
                "F.pinv()"
            )

    def _damp(self, damping: Damping, method: str) -> BaseLinearOperator:
        d = collapse(damping.value)
        diag = d if self.diag is None else self.diag + d
        return LowRankLinearOperator(self.root, self.core, diag, info=self.info)

    def _scale(self, c: float | Tensor) -> BaseLinearOperator:
        diag = None if self.diag is None else self.diag * c
        return LowRankLinearOperator(self.root, self.core * c, diag, info=self.info)

    def _diagonal(self) -> Tensor:
        diagonal = self.root.square() @ self.core
        return diagonal if self.diag is None else diagonal + self.diag

    def _logdet(self) -> Tensor:
        if self._constant:
            values, shift, rest = self._eigenvalues("logdet")
            total = values.log().sum() + (rest * shift.log() if rest else 0.0)
            positive = bool((values >= 0).all()) and (rest == 0 or bool(shift >= 0))
        else:
            values = 1 + self._values()
            total = values.log().sum() + 2 * self._root_diag().log().sum()
            positive = bool((values >= 0).all())
        if not positive:
            raise NotPositiveDefiniteError(
                "logdet: the matrix has a negative eigenvalue; add damping with F.damped(...)"
            )
        return total

    def _norm(self, ord: Any) -> Tensor:
        if ord == "fro":
            gram = self.root.mT @ self.root
            weighted = gram * self.core
            total = (weighted * weighted.mT).sum()
            if self.diag is not None:
                d = self.diag.expand(self.shape[-1])
                total = total + 2 * d @ (self.root.square() @ self.core) + d.square().sum()
            return total.clamp_min(0).sqrt()
        values, shift, rest = self._eigenvalues(f"norm({ord!r})")
        sizes = torch.cat([values.abs(), shift.abs().reshape(1)[: min(rest, 1)]])
        if ord == "nuc":
            return values.abs().sum() + rest * shift.abs()
        return sizes.max() if ord == 2 else sizes.min()

    def _inverse(self) -> BaseLinearOperator:
        if self._taped():
            return super()._inverse()
        if self._constant:
            return self._power(-1.0)
        values, basis = self._spectrum()
        if bool((1 + values <= 0).any()):
            raise NotPositiveDefiniteError("low rank plus diagonal is not positive definite")
        scale = self._root_diag()
        core = -values / (1 + values)
        inverted = scale.squeeze(-1).square().reciprocal()
        return LowRankLinearOperator(basis / scale, core, inverted, info=self.info)

    def _power(self, p: float) -> BaseLinearOperator:
        if p == 1:
            return self
        if p == -1 and self._taped():
            return self._inverse()
        values, shift, rest = self._eigenvalues(f"power({p:g})")
        if p < 0:
            self._require_regular(values, shift, rest)
        if p != int(p) and bool((torch.cat([values, shift.reshape(1)]) < 0).any()):
            raise NotPositiveDefiniteError(
                f"power {p}: the matrix has a negative eigenvalue; add damping with F.damped(...)"
            )
        if self._taped():
            return self._taped_power(p)
        return self._function(values.pow(p), shift.pow(p) if rest else None)

    def _taped_power(self, p: float) -> BaseLinearOperator:
        """The power as a lazy sum s^p I + Q (M^p - s^p I) Q^T, differentiable in all tensors."""
        from .algebra import ours

        q, r = torch.linalg.qr(self._scaled_root())
        shift = self._shift.pow(p) if self.diag is not None else self._shift
        inner = (r * self.core) @ r.mT + self._shift.expand(r.shape[0]).diag_embed()
        power = matrix_power(inner, *eigh(inner), p) - shift.expand(r.shape[0]).diag_embed()
        low = ProductLinearOperator(ours(q), ours(power @ q.mT))
        rest = DiagonalLinearOperator(shift.expand(self.shape[-1]))
        return SumLinearOperator(low, rest, info=self.info.plain())

    def _pinv(self, rcond: float | None) -> BaseLinearOperator:
        values, shift, rest = self._eigenvalues("pinv")
        joint = torch.cat([values, shift.reshape(1)])
        null = self._null(values, shift, rest)
        if rcond is not None:
            null = joint.abs() <= rcond * joint.abs().max()
        inverted = torch.where(null, 0.0, torch.where(null, 1.0, joint).reciprocal())
        return self._function(inverted[:-1], inverted[-1] if rest else None)

    def _function(self, values: Tensor, shift: Tensor | None) -> BaseLinearOperator:
        """f(A) from f(lambda + s) and f(s), None where nothing is left to it."""
        if self._taped():
            raise UnsupportedLayerError(
                "the pseudo-inverse of low rank plus diagonal is not differentiable: detach() it, "
                "or differentiate through solve"
            )
        basis = self._spectrum()[1]
        if shift is None or not bool(shift):
            return LowRankLinearOperator(basis, values, info=self.info)
        return LowRankLinearOperator(basis, values - shift, shift, info=self.info)

    def _draw(self, n: int, generator: torch.Generator | None) -> Tensor:
        like = {"dtype": self.dtype, "device": self.device, "generator": generator}
        diag = self._shift.expand(self.shape[-1])
        z: Tensor = torch.randn((self.shape[-1], n), **like)
        if bool((self.core >= 0).all()) and bool((diag >= 0).all()):
            small: Tensor = torch.randn((self.rank, n), **like)
            low = self.root @ (self.core.sqrt().unsqueeze(-1) * small)
            return low if self.diag is None else low + diag.sqrt().unsqueeze(-1) * z
        if self._taped():
            return self._power(0.5)._apply(z)
        values, basis = self._spectrum()
        if self._constant:
            joint = torch.cat([values + self._shift, self._shift.reshape(1)])
            if bool((joint < 0).any()):
                raise NotPositiveDefiniteError(
                    f"sample: the matrix has a negative eigenvalue {float(joint.min()):.3g}, so it "
                    "is no covariance; add damping with F.damped(...)"
                )
            root, rest = joint[:-1].sqrt(), joint[-1].sqrt()
            return rest * z + basis @ ((root - rest).unsqueeze(-1) * (basis.mT @ z))
        if bool((1 + values < 0).any()):
            raise NotPositiveDefiniteError("sample: the matrix has a negative eigenvalue")
        root = (1 + values).sqrt() - 1
        return self._root_diag() * (z + basis @ (root.unsqueeze(-1) * (basis.mT @ z)))

    def _eigensystem(self) -> tuple[Tensor, BaseLinearOperator]:
        values, shift, rest = self._eigenvalues("eigh")
        return torch.cat([values, shift.expand(rest)]), _completed(self._spectrum()[1])

    def _dense(self) -> Tensor:
        low = (self.root * self.core) @ self.root.mT
        return low if self.diag is None else low + self.diag.expand(low.shape[0]).diag_embed()

    def _principal(self, index: Tensor, columns: Tensor | None, info: Info) -> BaseLinearOperator:
        diag = self.diag if self.diag is None or self.diag.dim() == 0 else self.diag[index]
        return LowRankLinearOperator(self.root[index], self.core, diag, info=info)

    def _kind(self) -> str:
        more = "" if self.diag is None else " + c I" if self.diag.dim() == 0 else " + diagonal"
        return f"rank {self.rank} of {self.shape[-1]}{more}"


def _completed(basis: Tensor) -> BaseLinearOperator:
    """The orthogonal matrix (V, ...) by its reflectors I - Y T Y^T, never formed.

    Schreiber and Van Loan (1989), a storage-efficient WY representation.
    """
    from .algebra import ours

    n, m = basis.shape
    packed, tau = torch.geqrf(basis)
    reflectors = packed.tril(-1)
    reflectors.diagonal().fill_(1)
    # T^-1 = diag(1 / tau) + the strict upper triangle of Y^T Y; no reflection has tau = 0
    overlap = (reflectors.mT @ reflectors).triu(1)
    used = tau != 0
    weights = torch.where(used, tau, 1.0).reciprocal()
    inner = torch.linalg.inv(overlap + weights.diag_embed()) if m else overlap
    reflectors, inner = reflectors * used, inner
    sign = basis.new_ones(n)
    sign[:m] = packed.diagonal().sign()
    flips = DiagonalLinearOperator(sign)
    low = ProductLinearOperator(ours(-reflectors @ inner), ours(reflectors.mT.contiguous()))
    whole = SumLinearOperator(DiagonalLinearOperator(basis.new_ones(n)), low)
    return ProductLinearOperator(whole, flips)
