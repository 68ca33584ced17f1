"""Matrices that are held as they are: symmetric ones, and rectangular ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedLayerError
from . import rules
from .base import BaseLinearOperator, Krylov, flat_positions
from .damping import Damping
from .decompose import Decomposition, eigh, eigvalsh, eps, matrix_power, rounding
from .diagonal import DiagonalLinearOperator, plus_diagonal
from .info import Info
from .lazy import LazyLinearOperator
from .spectral import SpectralLinearOperator

__all__ = ["DenseLinearOperator", "MatrixLinearOperator"]


class DenseLinearOperator(SpectralLinearOperator):
    """A symmetric matrix.

    Its eigendecomposition is made once, when something first needs it, and again after the tensor
    is modified in place.

    Args:
        tensor: (n, n), symmetric; positive semidefinite or not.
        info: what is known besides the numbers.

    Example:
        >>> F = DenseLinearOperator(torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
        >>> F.eigenvalues, F.logdet()
        (tensor([1., 3.]), tensor(1.0986))
    """

    _implicit_in_tensors = True
    _values_are_computed = True

    def __init__(
        self,
        tensor: Tensor,
        *,
        info: Info | None = None,
        decomposition: Decomposition | None = None,
    ) -> None:
        if tensor.dim() != 2 or tensor.shape[0] != tensor.shape[1]:
            raise ValueError(f"expected a square matrix, got shape {tuple(tensor.shape)}")
        self._decomposed = Decomposition.of(decomposition, tensor)
        super().__init__(tensor, info=info, decomposition=self._decomposed)
        self.tensor = tensor

    def _size(self) -> torch.Size:
        return self.tensor.shape

    def _transpose_nonbatch(self) -> BaseLinearOperator:
        return DenseLinearOperator(self.tensor.mT, info=self.info)

    def _apply(self, v: Tensor) -> Tensor:
        return self.tensor @ v

    def _decomposition(self) -> tuple[Tensor, Tensor]:
        known = self._decomposed
        if known.origin is None or not known.is_current:
            return known.get("eigh", lambda: _symmetric_eigh(self.tensor), self.tensor)
        base, d = known.origin
        values, vectors = base.get("eigh", lambda: _symmetric_eigh(base.tensor), base.tensor)
        return values + d.detach(), vectors

    def _in_float64(self) -> BaseLinearOperator:
        known = self._decomposed
        if known.origin is None or not known.is_current:
            return self.to(torch.float64)
        base, d = known.origin
        if d.requires_grad or base.tensor.requires_grad:
            wide = DenseLinearOperator(base.tensor.double())
        else:
            wide = base.get("float64", lambda: DenseLinearOperator(base.tensor.double()))
        return wide._with_shift(d.double())

    def _own_rounding(self) -> Tensor:
        known = self._decomposed
        d = 0.0 if known.origin is None or not known.is_current else known.origin[1].detach()
        return rounding(self._decomposition()[0] - d).squeeze(-1)

    def _with_shift(self, d: Tensor) -> DenseLinearOperator:
        added = self.tensor + d.expand(self.tensor.shape[0]).diag_embed()
        known = self._decomposed.shifted(added, d)
        return DenseLinearOperator(added, info=self.info, decomposition=known)

    def rotate(self, v: Tensor) -> Tensor:
        """Q^T v, with Q the eigenvectors."""
        return self._decomposition()[1].mT @ v

    def unrotate(self, v: Tensor) -> Tensor:
        """Q v, with Q the eigenvectors."""
        return self._decomposition()[1] @ v

    @property
    def eigenvalues(self) -> Tensor:
        """(n,), ascending; with a gradient if the matrix wants one."""
        if self.tensor.requires_grad and torch.is_grad_enabled():
            known = self._decomposed
            if known.origin is None or not known.is_current:
                return eigvalsh(self.tensor)
            return eigvalsh(known.origin[0].tensor) + known.origin[1]
        return self._decomposition()[0]

    def basis(self) -> BaseLinearOperator:
        """Q, the eigenvectors as columns."""
        return DenseLinearOperator(self._decomposition()[1])

    def _function(self, values: Tensor, p: float | None) -> BaseLinearOperator:
        own, vectors = self._decomposition()
        if p is None:
            matrix = (vectors * values.unsqueeze(-2)) @ vectors.mT
        else:
            matrix = matrix_power(self.tensor, own, vectors, p)
        return DenseLinearOperator(matrix, info=self.info)

    def _null(self, rcond: float | None) -> Tensor:
        sizes = self._decomposition()[0].abs()
        if sizes.numel() == 0:
            return sizes == 0
        if rcond is None:  # a shift is known, however small: what is computed is not
            rcond = sizes.numel() * eps(sizes) ** (1 if self._decomposed.origin is None else 2)
        return sizes <= rcond * sizes.max()

    def _frobenius(self) -> Tensor:
        norm: Tensor = torch.linalg.vector_norm(self.tensor)
        return norm

    def _shifted(self, d: Tensor) -> BaseLinearOperator | None:
        if d.dim() == 0:
            return self._with_shift(d)
        return DenseLinearOperator(self.tensor + d.diag_embed(), info=self.info)

    def _damp_factors(self, d: Tensor, damping: Damping) -> BaseLinearOperator | None:
        return None

    def _scale(self, c: float | Tensor) -> BaseLinearOperator:
        return DenseLinearOperator(self.tensor * c, info=self.info)

    def _diagonal(self) -> Tensor:
        return self.tensor.diagonal()

    def _dense(self) -> Tensor:
        return self.tensor

    def _principal(self, index: Tensor, columns: Tensor | None, info: Info) -> BaseLinearOperator:
        return DenseLinearOperator(self.tensor[index[:, None], index[None, :]], info=info)

    def _kind(self) -> str:
        return f"dense {self.tensor.shape[0]}x{self.tensor.shape[0]}"


def _symmetric_eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The eigendecomposition of a matrix that is symmetric, but for what rounding explains.

    Raises:
        UnsupportedLayerError: it is not symmetric.
    """
    apart, size = (matrix - matrix.mT).abs().detach(), matrix.detach().abs()
    if apart.numel() and float(apart.max()) > 1e-3 * float(size.max()):
        raise UnsupportedLayerError(
            "expected DenseLinearOperator to hold a symmetric matrix, but entries differ from "
            f"those of the transpose by up to {float(apart.max()):.2g}: take "
            "ng.aslinearoperator(A), which looks at it"
        )
    return eigh(matrix)


@rules.sums.register(DenseLinearOperator, BaseLinearOperator, symmetric=True)
def _(A: DenseLinearOperator, B: BaseLinearOperator, info: Info) -> Any:
    if not B.is_explicit:
        return NotImplemented
    # as much memory again as the dense one takes already
    return DenseLinearOperator(A.tensor + B._dense(), info=info)


@rules.sums.register(DenseLinearOperator, DenseLinearOperator)
def _(A: DenseLinearOperator, B: DenseLinearOperator, info: Info) -> BaseLinearOperator:
    return DenseLinearOperator(A.tensor + B.tensor, info=info)


rules.sums.register(DiagonalLinearOperator, DenseLinearOperator, symmetric=True)(plus_diagonal)


class MatrixLinearOperator(LazyLinearOperator):
    """A rectangular matrix that is held as it is, such as a Jacobian: its columns are parameters.

    Args:
        tensor: (m, n).
        info: what is known besides the numbers; its space is that of the columns.

    Example:
        >>> J = MatrixLinearOperator(torch.tensor([[1.0, 2.0, 3.0]]))
        >>> J @ torch.ones(3), (J.mT @ torch.ones(1)).shape
        (tensor([6.]), torch.Size([3]))
    """

    _implicit_in_tensors = False
    _implicit_in_vector = False
    maps_to_parameters = False

    def __init__(self, tensor: Tensor, *, info: Info | None = None) -> None:
        if tensor.dim() != 2:
            raise ValueError(f"expected a matrix, got shape {tuple(tensor.shape)}")
        super().__init__(tensor, info=info)
        self.tensor = tensor

    @property
    def known_symmetric(self) -> bool:
        """Symmetric ones are dense operators."""
        return False

    def _size(self) -> torch.Size:
        return self.tensor.shape

    def _transpose_nonbatch(self) -> BaseLinearOperator:
        return MatrixLinearOperator(self.tensor.mT)

    def _apply(self, v: Tensor) -> Tensor:
        return self.tensor @ v

    def _solve_columns(self, v: Tensor, krylov: Krylov) -> Tensor:
        raise UnsupportedLayerError(
            "solve needs a symmetric matrix, and a Jacobian is none: solve with J.mT @ J, a GGN or "
            "an empirical Fisher, or torch.linalg.lstsq(J.to_dense(), b) where it fits"
        )

    def _unsupported(self, what: str) -> UnsupportedLayerError:
        return UnsupportedLayerError(
            f"{what} needs a symmetric matrix, and this one is not: take a function of torch.linalg"
            " on F.to_dense(), or F.mT @ F"
        )

    def _scale(self, c: float | Tensor) -> BaseLinearOperator:
        return MatrixLinearOperator(self.tensor * c, info=self.info)

    def _diagonal(self) -> Tensor:
        return self.tensor.diagonal()

    def _norm(self, ord: Any) -> Tensor:
        norm: Tensor = torch.linalg.matrix_norm(self.tensor, ord)
        return norm

    def _dense(self) -> Tensor:
        return self.tensor

    def _restrict(self, names: tuple[str, ...]) -> BaseLinearOperator:
        space = self.space
        if space is None or names == space.names:
            return self
        columns = self.tensor[:, flat_positions(space, names, self.device)]
        return MatrixLinearOperator(columns, info=self.info.restrict(names))

    def _kind(self) -> str:
        return f"dense {self.tensor.shape[0]}x{self.tensor.shape[1]}"
