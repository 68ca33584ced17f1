"""Kronecker products: the blocks of KFAC."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import NotPositiveDefiniteError, UnsupportedLayerError
from .base import BaseLinearOperator
from .decompose import Cache, eps, matrix_power
from .eigen_kronecker import EigenKroneckerLinearOperator
from .factors import (
    apply_factors,
    check_factors,
    factor_diagonal,
    factor_eigh,
    factor_eigvalsh,
    factor_null,
    factor_shifted,
    factor_trace,
)
from .info import Info
from .spectral import SpectralLinearOperator

__all__ = ["KroneckerLinearOperator"]


class KroneckerLinearOperator(SpectralLinearOperator):
    r"""The block diagonal over groups g of left_g kron right_g, plus a multiple of the identity.

    .. math:: \mathrm{blockdiag}_g (L_g \otimes R_g) + s I

    The matrix's coordinates are row-major (G, o, i): for a layer's weight (out, in), left is the
    factor of output gradients and right the one of inputs. Damping keeps the structure and shares
    the decomposition of the factors, which is made once, when something first needs it.

    Args:
        left: (G, o, o), or (G, o) where it is diagonal. Note that a matrix of one group is
            (1, o, o).
        right: (G, i, i), or (G, i) where it is diagonal.
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

    def __init__(
        self, left: Tensor, right: Tensor, shift: Tensor | None = None, *, info: Info | None = None
    ) -> None:
        check_factors(left, right, "factor")
        super().__init__(left, right, *(() if shift is None else (shift,)), info=info)
        self.left, self.right, self.shift = left, right, shift
        self._cache = Cache()

    def _size(self) -> torch.Size:
        size = self.left.shape[0] * self.left.shape[1] * self.right.shape[1]
        return torch.Size((size, size))

    def _transpose_nonbatch(self) -> BaseLinearOperator:
        left, right = (f.mT if f.dim() == 3 else f for f in (self.left, self.right))
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
        return apply_factors(*self.bases(), v, transposed=True)

    def unrotate(self, v: Tensor) -> Tensor:
        return apply_factors(*self.bases(), v)

    @property
    def eigenvalues(self) -> Tensor:
        if torch.is_grad_enabled() and (self.left.requires_grad or self.right.requires_grad):
            left, right = factor_eigvalsh(self.left), factor_eigvalsh(self.right)
        else:
            (left, _), (right, _) = self._decomposition()
        values = (left[:, :, None] * right[:, None, :]).reshape(-1)
        return values if self.shift is None else values + self.shift

    def basis(self) -> BaseLinearOperator:
        return KroneckerLinearOperator(*self.bases())

    def _decomposition(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        return (
            self._cache.get("left", [self.left], lambda: factor_eigh(self.left)),
            self._cache.get("right", [self.right], lambda: factor_eigh(self.right)),
        )

    def _grid(self) -> tuple[int, int, int]:
        return self.left.shape[0], self.left.shape[1], self.right.shape[1]

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
        """The powers of both factors: two products to apply, where an eigenbasis takes four."""
        powers, systems = [], []
        for factor, (own, vectors) in zip(
            (self.left, self.right), self._decomposition(), strict=True
        ):
            if p != int(p) and bool((own < 0).any()):
                raise NotPositiveDefiniteError(f"power {p}: a factor has a negative eigenvalue")
            diagonal = factor.dim() == 2
            powers.append(factor.pow(p) if diagonal else matrix_power(factor, own, vectors, p))
            systems.append((own.pow(p), vectors))
        power = KroneckerLinearOperator(*powers, info=self.info)
        for side, factor, system in zip(("left", "right"), powers, systems, strict=True):
            power._cache.get(side, [factor], lambda known=system: known)  # type: ignore[misc]
        return power

    def _inverse(self) -> BaseLinearOperator:
        if self._taped() and self.shift is not None:
            from .views import InverseLinearOperator

            return InverseLinearOperator(self, info=self.info)
        if self.shift is None:
            self._require_regular()
            return self._factor_powers(-1.0)
        return super()._inverse()

    def _null(self, rcond: float | None) -> Tensor:
        (left, _), (right, _) = self._decomposition()
        if rcond is None and self.shift is None:
            nulls = [
                factor_null(values, factor.dim() == 2)
                for values, factor in ((left, self.left), (right, self.right))
            ]
            return (nulls[0][:, :, None] | nulls[1][:, None, :]).reshape(-1)
        with torch.no_grad():
            sizes = self.eigenvalues.abs()
        tol = sizes.numel() * eps(sizes) ** 2 if rcond is None else rcond
        return sizes <= tol * sizes.max()

    def _frobenius(self) -> Tensor:
        axes = [tuple(range(1, f.dim())) for f in (self.left, self.right)]
        norms = [
            torch.linalg.vector_norm(f, dim=axis)
            for f, axis in zip((self.left, self.right), axes, strict=True)
        ]
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
        damped = KroneckerLinearOperator(self.left, self.right, shift, info=self.info)
        damped._cache = self._cache  # the factors are the same
        return damped

    def _damp_factors(self, d: Tensor) -> BaseLinearOperator | None:
        if self.shift is not None:
            return None
        mean_left = factor_trace(self.left) / self.left.shape[1]
        mean_right = factor_trace(self.right) / self.right.shape[1]
        zero = (mean_left <= 0) | (mean_right <= 0)  # no ratio: pi = 1
        ones = torch.ones_like(mean_left)
        pi = (torch.where(zero, ones, mean_right) / torch.where(zero, ones, mean_left)).sqrt()
        # a square root has no gradient at 0, where nothing is added
        root = torch.where(d > 0, torch.where(d > 0, d, torch.ones_like(d)).sqrt(), d)
        return KroneckerLinearOperator(
            factor_shifted(self.left, root / pi),
            factor_shifted(self.right, root * pi),
            info=self.info,
        )

    def _scale(self, c: float | Tensor) -> BaseLinearOperator:
        shift = None if self.shift is None else self.shift * c
        return KroneckerLinearOperator(self.left * c, self.right, shift, info=self.info)

    def _diagonal(self) -> Tensor:
        left, right = factor_diagonal(self.left), factor_diagonal(self.right)
        diagonal = (left[:, :, None] * right[:, None, :]).reshape(-1)
        return diagonal if self.shift is None else diagonal + self.shift

    def _dense(self) -> Tensor:
        left, right = (f if f.dim() == 3 else f.diag_embed() for f in (self.left, self.right))
        groups, o, i = self._grid()  # torch.kron fails on some transposed factors
        products = left[:, :, None, :, None] * right[:, None, :, None, :]  # (G,o,i,o,i)
        blocks = products.reshape(groups, o * i, o * i)
        matrix: Tensor = torch.block_diag(*blocks)
        if self.shift is None:
            return matrix
        return matrix + self.shift.expand(matrix.shape[0]).diag_embed()

    def _principal(self, index: Tensor, columns: Tensor | None, info: Info) -> BaseLinearOperator:
        if columns is None:
            from .views import RestrictedLinearOperator

            return RestrictedLinearOperator(self, index, info=info)
        right = self.right[:, columns]
        if right.dim() == 3:
            right = right[:, :, columns]
        return KroneckerLinearOperator(self.left, right, self.shift, info=info)

    def _kind(self) -> str:
        groups, o, i = self._grid()
        left = f"{o}x{o}" if self.left.dim() == 3 else f"diagonal {o}"
        right = f"{i}x{i}" if self.right.dim() == 3 else f"diagonal {i}"
        many = f"{groups} x " if groups > 1 else ""
        return f"Kronecker {many}({left}) x ({right})" + ("" if self.shift is None else " + c I")
