"""Free eigenvalues in a Kronecker eigenbasis: the blocks of EKFAC."""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor

from .base import BaseLinearOperator
from .decompose import eps
from .factors import apply_factors, check_factors
from .info import Info
from .spectral import SpectralLinearOperator

__all__ = ["EigenKroneckerLinearOperator"]


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
        grid = (left_basis.shape[0], left_basis.shape[1], right_basis.shape[1])
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
        return apply_factors(*self.bases(), v, transposed=True)

    def unrotate(self, v: Tensor) -> Tensor:
        return apply_factors(*self.bases(), v)

    @property
    def eigenvalues(self) -> Tensor:
        return self.values.reshape(-1)

    def basis(self) -> BaseLinearOperator:
        from .kronecker import KroneckerLinearOperator

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
        # free eigenvalues are accurate on their own, far below eps times the largest
        tol = sizes.numel() * eps(sizes) ** 2 if rcond is None else rcond
        return sizes <= tol * sizes.max()

    def _frobenius(self) -> Tensor:
        norm: Tensor = torch.linalg.vector_norm(self.values)
        return norm

    def _shifted(self, d: Tensor) -> BaseLinearOperator | None:
        return None if d.dim() > 0 else self._with_values(self.values + d)

    def _damp_factors(self, d: Tensor) -> BaseLinearOperator | None:
        return None

    def _scale(self, c: float | Tensor) -> BaseLinearOperator:
        return self._with_values(self.values * c)

    def _diagonal(self) -> Tensor:
        left, right = (b if b.dim() == 2 else b.square() for b in self.bases())
        y = self.values  # (G,o,o),(G,o,i),(G,i,i) -> (G,o,i)
        y = left @ y if left.dim() == 3 else y
        y = y @ right.mT if right.dim() == 3 else y
        return y.reshape(-1)

    def _dense(self) -> Tensor:
        eye = torch.eye(self.values.numel(), dtype=self.dtype, device=self.device)
        return self._apply(eye)

    def _principal(self, index: Tensor, columns: Tensor | None, info: Info) -> BaseLinearOperator:
        from .views import RestrictedLinearOperator

        return RestrictedLinearOperator(self, index, info=info)

    def _kind(self) -> str:
        groups, o, i = self.values.shape
        left = f"{o}x{o}" if self.left_basis.dim() == 3 else f"diagonal {o}"
        right = f"{i}x{i}" if self.right_basis.dim() == 3 else f"diagonal {i}"
        many = f"{groups} x " if groups > 1 else ""
        return f"eigen-Kronecker {many}({left}) x ({right})"
