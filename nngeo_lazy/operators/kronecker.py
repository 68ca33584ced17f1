"""Kronecker products, the blocks of KFAC, and free eigenvalues in their basis, those of EKFAC."""

from __future__ import annotations

from typing import TypeGuard, cast

import torch
from torch import Tensor

from .. import sides
from ..errors import NotPositiveDefiniteError, UnsupportedLayerError
from . import rules
from .base import BaseLinearOperator, Krylov
from .damping import Damping
from .decompose import Decomposition, eps, matrix_power, rounding
from .factors import (
    apply_factors,
    check_factors,
    factor_diagonal,
    factor_eigh,
    factor_eigvalsh,
    factor_null,
    factor_shifted,
    factor_trace,
    inverse_factors,
    sizes,
)
from .info import Info
from .spectral import SpectralLinearOperator

__all__ = ["EigenKroneckerLinearOperator", "KroneckerLinearOperator"]


class KroneckerLinearOperator(SpectralLinearOperator):
    r"""The block diagonal over groups g of left_g kron right_g, plus a multiple of the identity.

    .. math:: \mathrm{blockdiag}_g (L_g \otimes R_g) + s I

    The matrix's coordinates are row-major (G, o, i): for a layer's weight (out, in), left is the
    factor of output gradients and right the one of inputs. Damping keeps the structure and shares
    the decomposition of the factors, which is made once, when something first needs it.

    Args:
        left: (G, o, o), or (G, o) if it is diagonal; `sides` has more shapes, for wide factors.
            Note that a matrix of one group is (1, o, o).
        right: (G, i, i), or (G, i) if it is diagonal, or as `left`.
        shift: s, a 0-d tensor; none by default.
        info: what is known besides the numbers.

    Example:
        >>> left, right = 2 * torch.eye(2)[None], torch.tensor([[1.0, 3.0]])
        >>> KroneckerLinearOperator(left, right).damped(1.0).diagonal()
        tensor([3., 7., 3., 7.])

    Source: Martens and Grosse (2015), Optimizing Neural Networks with Kronecker-factored
    Approximate Curvature.
    """

    _implicit_in_tensors = True
    _values_are_computed = True

    def __init__(
        self,
        left: Tensor,
        right: Tensor,
        shift: Tensor | None = None,
        *,
        info: Info | None = None,
        decomposition: Decomposition | None = None,
    ) -> None:
        check_factors(left, right, "factor")
        self._decomposed = Decomposition.of(decomposition, left, right)
        args = (left, right) if shift is None else (left, right, shift)
        super().__init__(*args, info=info, decomposition=self._decomposed)
        self.left, self.right, self.shift = left, right, shift

    def _size(self) -> torch.Size:
        size = torch.Size(self._grid()).numel()
        return torch.Size((size, size))

    def _transpose_nonbatch(self) -> BaseLinearOperator:
        left, right = (sides.transposed(f) for f in (self.left, self.right))
        return KroneckerLinearOperator(left, right, self.shift, info=self.info)

    def _apply(self, v: Tensor) -> Tensor:
        y = apply_factors(self.left, self.right, v)
        return y if self.shift is None else y + self.shift * v

    def bases(self) -> tuple[Tensor, Tensor]:
        """The factors' eigenvectors, (G, n, n), or (G, n) of ones for a diagonal factor."""
        (_, left), (_, right) = self._decomposition()
        return left, right

    def eigen(self) -> EigenKroneckerLinearOperator:
        """The same matrix with free eigenvalues in its Kronecker eigenbasis."""
        values = self.eigenvalues.reshape(self._grid())
        return EigenKroneckerLinearOperator(values, *self.bases(), info=self.info)

    def rotate(self, v: Tensor) -> Tensor:
        """Q^T v, with Q the Kronecker product of the factors' eigenvectors."""
        return apply_factors(*self.bases(), v, transposed=True)

    def unrotate(self, v: Tensor) -> Tensor:
        """Q v, with Q as in `rotate`."""
        return apply_factors(*self.bases(), v)

    @property
    def eigenvalues(self) -> Tensor:
        """(G o i,): products of the factors' eigenvalues, plus the shift."""
        if torch.is_grad_enabled() and (self.left.requires_grad or self.right.requires_grad):
            left, right = factor_eigvalsh(self.left), factor_eigvalsh(self.right)
        else:
            (left, _), (right, _) = self._decomposition()
        values = (left[:, :, None] * right[:, None, :]).reshape(-1)
        return values if self.shift is None else values + self.shift

    def basis(self) -> BaseLinearOperator:
        """Q, the Kronecker product of the factors' eigenvectors."""
        return KroneckerLinearOperator(*self.bases())

    def _in_float64(self) -> BaseLinearOperator:
        if self._taped() or (self.shift is not None and self.shift.requires_grad):
            return self.to(torch.float64)
        wide = self._decomposed.get(
            "float64", lambda: KroneckerLinearOperator(self.left.double(), self.right.double())
        )
        if self.shift is None:
            return wide
        return cast(BaseLinearOperator, wide._shifted(self.shift.double()))

    def _own_rounding(self) -> Tensor:
        spectra = [values for values, _ in self._decomposition()]
        left, right = (v.abs().amax(-1) for v in spectra)
        noise = [
            torch.zeros_like(v[..., 0]) if sides.is_diagonal(factor) else rounding(v).squeeze(-1)
            for v, factor in zip(spectra, (self.left, self.right), strict=True)
        ]
        return (noise[0] * right + left * noise[1]).max()

    def _decomposition(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        return (
            self._decomposed.get("left", lambda: factor_eigh(self.left), self.left),
            self._decomposed.get("right", lambda: factor_eigh(self.right), self.right),
        )

    def hold(self, side: str, found: tuple[Tensor, Tensor]) -> None:
        """Take the eigenvalues and eigenvectors of a factor, "left" or "right", as they are."""
        self._decomposed.get(side, lambda: found, self.left if side == "left" else self.right)

    def _grid(self) -> tuple[int, int, int]:
        return self.left.shape[0], sides.size_of(self.left), sides.size_of(self.right)

    def _taped(self) -> bool:
        factors = (self.left, self.right)
        return torch.is_grad_enabled() and any(f.requires_grad for f in factors)

    def _function(self, values: Tensor, p: float | None) -> BaseLinearOperator:
        if not self._taped():
            grid = values.reshape(self._grid())
            return EigenKroneckerLinearOperator(grid, *self.bases(), info=self.info)
        if p is None or self.shift is not None:
            raise UnsupportedLayerError(
                "functions of a damped Kronecker product are not differentiable in its factors: "
                "detach() it, or differentiate through solve"
            )
        return self._factor_powers(p)

    def _factor_powers(self, p: float) -> BaseLinearOperator:
        """The powers of both factors: two products to apply, and not the four of an eigenbasis."""
        powers, systems = [], []
        for factor, (own, vectors) in zip(
            (self.left, self.right), self._decomposition(), strict=True
        ):
            if p != int(p) and bool((own < 0).any()):
                raise NotPositiveDefiniteError(f"power {p}: a factor has a negative eigenvalue")
            diagonal = sides.is_diagonal(factor)
            powers.append(factor.pow(p) if diagonal else matrix_power(factor, own, vectors, p))
            systems.append((own.pow(p), vectors))
        power = KroneckerLinearOperator(*powers, info=self.info)
        for side, factor, system in zip(("left", "right"), powers, systems, strict=True):
            power._decomposed.get(side, lambda known=system: known, factor)  # type: ignore[misc]
        return power

    def _solve_columns(self, v: Tensor, krylov: Krylov) -> Tensor:
        if self.shift is None and not self._taped() and not self._decomposed.holds("left", "right"):
            inverses = self._decomposed.get(
                "inverses", lambda: inverse_factors(self.left, self.right)
            )
            if inverses is not None:
                return apply_factors(*inverses, v.to(inverses[0].dtype)).to(v.dtype)
        return super()._solve_columns(v, krylov)

    def _inverse(self) -> BaseLinearOperator:
        if self._taped() and self.shift is not None:
            inverse: BaseLinearOperator = rules.inverses(self)
            return inverse
        if self.shift is None and sides.plain(self.left) and sides.plain(self.right):
            self._require_regular()
            return self._factor_powers(-1.0)
        return super()._inverse()

    def _null(self, rcond: float | None) -> Tensor:
        (left, _), (right, _) = self._decomposition()
        if rcond is None and self.shift is None:
            nulls = [
                factor_null(values, sides.is_diagonal(factor))
                for values, factor in ((left, self.left), (right, self.right))
            ]
            return (nulls[0][:, :, None] | nulls[1][:, None, :]).reshape(-1)
        with torch.no_grad():
            sizes = self.eigenvalues.abs()
        tol = sizes.numel() * eps(sizes) ** 2 if rcond is None else rcond
        return sizes <= tol * sizes.max()

    def _frobenius(self) -> Tensor:
        norms = [sides.norm(factor) for factor in (self.left, self.right)]
        product: Tensor = torch.linalg.vector_norm(norms[0] * norms[1])
        if self.shift is None:
            return product
        trace = (factor_trace(self.left) * factor_trace(self.right)).sum()
        s = self.shift
        squared: Tensor = product.square() + 2 * s * trace + s.square() * self.shape[-1]
        return squared.sqrt()

    def _shifted(self, d: Tensor) -> BaseLinearOperator | None:
        if d.dim() > 0:
            return None
        shift = d if self.shift is None else self.shift + d
        return KroneckerLinearOperator(
            self.left, self.right, shift, info=self.info, decomposition=self._decomposed
        )

    def _damp_factors(self, d: Tensor, damping: Damping) -> BaseLinearOperator | None:
        if self.shift is not None:
            return None
        _, o, i = self._grid()
        mean_left, mean_right = factor_trace(self.left) / o, factor_trace(self.right) / i
        zero = (mean_left <= 0) | (mean_right <= 0)  # no ratio: pi = 1
        ones = torch.ones_like(mean_left)
        zero |= torch.full_like(zero, not damping.use_pi)
        pi = (torch.where(zero, ones, mean_right) / torch.where(zero, ones, mean_left)).sqrt()
        # a square root has no gradient at 0; nothing is added there
        root = torch.where(d > 0, torch.where(d > 0, d, torch.ones_like(d)).sqrt(), d)
        return KroneckerLinearOperator(
            factor_shifted(self.left, (root / pi).clamp_min(damping.minimum)),
            factor_shifted(self.right, (root * pi).clamp_min(damping.minimum)),
            info=self.info,
        )

    def _scale(self, c: float | Tensor) -> BaseLinearOperator:
        shift = None if self.shift is None else self.shift * c
        left, right = self.left, self.right
        if not sides.is_low_rank(left):
            return KroneckerLinearOperator(left * c, right, shift, info=self.info)
        if not sides.is_low_rank(right):
            return KroneckerLinearOperator(left, right * c, shift, info=self.info)
        return self.eigen()._scale(c)  # U U^T + c I has no sign

    def _diagonal(self) -> Tensor:
        left, right = factor_diagonal(self.left), factor_diagonal(self.right)
        diagonal = (left[:, :, None] * right[:, None, :]).reshape(-1)
        return diagonal if self.shift is None else diagonal + self.shift

    def _dense(self) -> Tensor:
        left, right = sides.to_dense(self.left), sides.to_dense(self.right)
        groups, o, i = self._grid()  # torch.kron fails on some transposed factors
        products = left[:, :, None, :, None] * right[:, None, :, None, :]  # (G,o,i,o,i)
        blocks = products.reshape(groups, o * i, o * i)
        matrix: Tensor = torch.block_diag(*blocks)
        if self.shift is None:
            return matrix
        return matrix + self.shift.expand(matrix.shape[0]).diag_embed()

    def _principal(self, index: Tensor, columns: Tensor | None, info: Info) -> BaseLinearOperator:
        if columns is None or not sides.plain(self.right):
            restricted: BaseLinearOperator = rules.selections(self, index, None, info)
            return restricted
        right = self.right[:, columns]
        if sides.is_dense(self.right):
            right = right[:, :, columns]
        return KroneckerLinearOperator(self.left, right, self.shift, info=info)

    def _kind(self) -> str:
        more = "" if self.shift is None else " + c I"
        return f"Kronecker {sizes(self.left, self.right)}{more}"


class EigenKroneckerLinearOperator(SpectralLinearOperator):
    r"""The block diagonal over groups of Q diag(eigenvalues) Q^T, Q = left kron right orthogonal.

    .. math:: \mathrm{blockdiag}_g (U_g \otimes V_g)\,\mathrm{diag}(\lambda_g)\,(U_g \otimes V_g)^T

    The bases lie on the orthogonal group: they are constants to autograd, never free matrices.

    Args:
        eigenvalues: (G, o, i), of any sign.
        left_basis: (G, o, o) orthogonal, or (G, o) of ones for the identity.
        right_basis: (G, i, i) orthogonal, or (G, i) of ones for the identity.
        info: what is known besides the numbers.

    Example:
        >>> ones = torch.ones(1, 2)
        >>> F = EigenKroneckerLinearOperator(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), ones, ones)
        >>> F.inverse().diagonal()
        tensor([1.0000, 0.5000, 0.3333, 0.2500])

    Source: George et al. (2018), Fast Approximate Natural Gradient Descent in a
    Kronecker-factored Eigenbasis.
    """

    def __init__(
        self,
        eigenvalues: Tensor,
        left_basis: Tensor,
        right_basis: Tensor,
        *,
        info: Info | None = None,
    ) -> None:
        check_factors(left_basis, right_basis, "basis")
        grid = (left_basis.shape[0], sides.size_of(left_basis), sides.size_of(right_basis))
        if eigenvalues.shape != grid:
            raise ValueError(
                f"expected eigenvalues of shape {grid}, got {tuple(eigenvalues.shape)}"
            )
        super().__init__(eigenvalues, left_basis, right_basis, info=info)
        self.values = eigenvalues
        self.left_basis, self.right_basis = left_basis, right_basis

    def _size(self) -> torch.Size:
        return torch.Size((self.values.numel(), self.values.numel()))

    def _transpose_nonbatch(self) -> BaseLinearOperator:
        return self

    def _apply(self, v: Tensor) -> Tensor:
        return self.unrotate(self.eigenvalues.unsqueeze(-1) * self.rotate(v))

    def bases(self) -> tuple[Tensor, Tensor]:
        """The two bases."""
        return self.left_basis.detach(), self.right_basis.detach()

    def rotate(self, v: Tensor) -> Tensor:
        """Q^T v, with Q = left kron right."""
        return apply_factors(*self.bases(), v, transposed=True)

    def unrotate(self, v: Tensor) -> Tensor:
        """Q v, with Q = left kron right."""
        return apply_factors(*self.bases(), v)

    @property
    def eigenvalues(self) -> Tensor:
        """(G o i,), the free eigenvalues in row-major order."""
        return self.values.reshape(-1)

    def basis(self) -> BaseLinearOperator:
        """Q = left kron right."""
        return KroneckerLinearOperator(*self.bases())

    def _function(self, values: Tensor, p: float | None) -> BaseLinearOperator:
        return self._with_values(values.reshape(self.values.shape))

    def same_basis(self, other: BaseLinearOperator) -> TypeGuard[EigenKroneckerLinearOperator]:
        """Whether another operator has the same two bases: the same numbers, if not the tensors."""
        if not isinstance(other, EigenKroneckerLinearOperator) or self.dtype != other.dtype:
            return False
        return all(
            mine is theirs or torch.equal(mine, theirs)
            for mine, theirs in zip(self.bases(), other.bases(), strict=True)
        )

    def _with_values(
        self, values: Tensor, info: Info | None = None
    ) -> EigenKroneckerLinearOperator:
        return EigenKroneckerLinearOperator(
            values, self.left_basis, self.right_basis, info=self.info if info is None else info
        )

    def _null(self, rcond: float | None) -> Tensor:
        sizes = self.eigenvalues.detach().abs()
        if sizes.numel() == 0:
            return sizes == 0
        if rcond is None:
            # Free eigenvalues are squares of projections on eigenvectors. Computed ones are off by
            # the rounding of sums and of a decomposition: zero is the square of that.
            _, o, i = self.values.shape
            bases = self.left_basis, self.right_basis
            rotated = [sides.size_of(b) for b in bases if not sides.is_diagonal(b)]
            off = max(2 * (o + i), 16 * sum(rotated))
            rcond = min((off * eps(sizes)) ** 2, eps(sizes))
        return sizes <= rcond * sizes.max()

    def _frobenius(self) -> Tensor:
        norm: Tensor = torch.linalg.vector_norm(self.values)
        return norm

    def _shifted(self, d: Tensor) -> BaseLinearOperator | None:
        return None if d.dim() > 0 else self._with_values(self.values + d)

    def _damp_factors(self, d: Tensor, damping: Damping) -> BaseLinearOperator | None:
        return None

    def _scale(self, c: float | Tensor) -> BaseLinearOperator:
        return self._with_values(self.values * c)

    def _diagonal(self) -> Tensor:
        left, right = self.bases()  # (G,o,o),(G,o,i),(G,i,i) -> (G,o,i)
        y = sides.overlapped(None, left, self.values)
        return sides.overlapped(None, right, y.mT).mT.reshape(-1)

    def _dense(self) -> Tensor:
        eye = torch.eye(self.values.numel(), dtype=self.dtype, device=self.device)
        return self._apply(eye)

    def _principal(self, index: Tensor, columns: Tensor | None, info: Info) -> BaseLinearOperator:
        restricted: BaseLinearOperator = rules.selections(self, index, None, info)
        return restricted

    def _kind(self) -> str:
        return f"eigen-Kronecker {sizes(self.left_basis, self.right_basis)}"


@rules.sums.register(EigenKroneckerLinearOperator, EigenKroneckerLinearOperator)
def _(
    A: EigenKroneckerLinearOperator, B: EigenKroneckerLinearOperator, info: Info
) -> BaseLinearOperator:
    return A._with_values(A.values + B.values, info) if A.same_basis(B) else NotImplemented


@rules.products.register(EigenKroneckerLinearOperator, EigenKroneckerLinearOperator)
def _(
    A: EigenKroneckerLinearOperator, B: EigenKroneckerLinearOperator, info: Info
) -> BaseLinearOperator:
    return A._with_values(A.values * B.values, info) if A.same_basis(B) else NotImplemented
