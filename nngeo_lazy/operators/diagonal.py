"""A diagonal matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import checked, described
from ..errors import DataError
from ..space import ParamSpace
from . import rules
from .base import BaseLinearOperator
from .damping import Damping
from .info import Info
from .spectral import SpectralLinearOperator

__all__ = ["DiagonalLinearOperator", "identity"]


class DiagonalLinearOperator(SpectralLinearOperator):
    """diag(d), entries of any sign.

    Args:
        diag: d (n,).
        info: what is known besides the numbers.

    Example:
        >>> F = DiagonalLinearOperator(torch.tensor([1.0, 3.0]))
        >>> F.solve(torch.ones(2), damping=1.0)
        tensor([0.5000, 0.2500])
    """

    def __init__(self, diag: Tensor, *, info: Info | None = None) -> None:
        if diag.dim() != 1:
            raise ValueError(f"expected a diagonal of shape (n,), got {tuple(diag.shape)}")
        super().__init__(diag, info=info)
        self.diag = diag

    def _size(self) -> torch.Size:
        return torch.Size((self.diag.shape[0], self.diag.shape[0]))

    def _transpose_nonbatch(self) -> BaseLinearOperator:
        return self

    def _apply(self, v: Tensor) -> Tensor:
        return self.diag.unsqueeze(-1) * v

    def rotate(self, v: Tensor) -> Tensor:
        """The vector as it is: the eigenbasis is that of the coordinates."""
        return v

    def unrotate(self, v: Tensor) -> Tensor:
        """The vector as it is: the eigenbasis is that of the coordinates."""
        return v

    @property
    def eigenvalues(self) -> Tensor:
        """The diagonal (n,), in its own order."""
        return self.diag

    def basis(self) -> BaseLinearOperator:
        """The identity."""
        return DiagonalLinearOperator(torch.ones_like(self.diag))

    def _function(self, values: Tensor, p: float | None) -> BaseLinearOperator:
        return DiagonalLinearOperator(values, info=self.info)

    def _null(self, rcond: float | None) -> Tensor:
        sizes = self.diag.detach().abs()
        if rcond is None or sizes.numel() == 0:
            return sizes == 0  # each entry is exact on its own: small is not zero
        return sizes <= rcond * sizes.max()

    def _frobenius(self) -> Tensor:
        norm: Tensor = torch.linalg.vector_norm(self.diag)
        return norm

    def _shifted(self, d: Tensor) -> BaseLinearOperator | None:
        return DiagonalLinearOperator(self.diag + d, info=self.info)

    def _damp_factors(self, d: Tensor, damping: Damping) -> BaseLinearOperator | None:
        return None

    def _scale(self, c: float | Tensor) -> BaseLinearOperator:
        return DiagonalLinearOperator(self.diag * c, info=self.info)

    def _diagonal(self) -> Tensor:
        return self.diag

    def _dense(self) -> Tensor:
        return self.diag.diag_embed()

    def _principal(self, index: Tensor, columns: Tensor | None, info: Info) -> BaseLinearOperator:
        return DiagonalLinearOperator(self.diag[index], info=info)

    def _kind(self) -> str:
        return f"diagonal {self.diag.shape[0]}"


@checked
def identity(space: ParamSpace, scale: float | Tensor = 1.0) -> DiagonalLinearOperator:
    """scale I over a parameter space: an isotropic prior.

    Args:
        space: the parameters, such as `F.space`; its dtype and device are the operator's.
        scale: a number, or a 0-d tensor, differentiable.

    Returns:
        The operator scale I (P x P).

    Raises:
        DataError: scale is more than one number, or space is no `ParamSpace`.

    Example:
        >>> from nngeo_lazy import ParamSpace
        >>> identity(ParamSpace({"w": (3,)}), 2.0).diagonal()
        tensor([2., 2., 2.])
    """
    if isinstance(scale, Tensor) and scale.dim() > 0:
        raise DataError(
            f"expected scale to be one number, got {described(scale)}: for one number for each "
            "parameter take DiagonalLinearOperator(...)"
        )
    value = torch.as_tensor(scale, dtype=space.dtype, device=space.device)
    return DiagonalLinearOperator(value.expand(len(space)), info=Info(space))


@rules.sums.register(DiagonalLinearOperator, DiagonalLinearOperator)
def _(A: DiagonalLinearOperator, B: DiagonalLinearOperator, info: Info) -> BaseLinearOperator:
    return DiagonalLinearOperator(A.diag + B.diag, info=info)


@rules.sums.register(DiagonalLinearOperator, BaseLinearOperator, symmetric=True)
def plus_diagonal(
    A: DiagonalLinearOperator, B: BaseLinearOperator, info: Info
) -> BaseLinearOperator:
    """A sum with a diagonal has the structure of the other matrix, and the space of either."""
    total: BaseLinearOperator = B.add_diagonal(A.diag)
    if total.space is not None or info.space is None:
        return total
    known: BaseLinearOperator = total._with(info=info)
    return known


@rules.products.register(DiagonalLinearOperator, DiagonalLinearOperator)
def _(A: DiagonalLinearOperator, B: DiagonalLinearOperator, info: Info) -> BaseLinearOperator:
    return DiagonalLinearOperator(A.diag * B.diag, info=info)


@rules.hadamard.register(DiagonalLinearOperator, DiagonalLinearOperator)
@rules.hadamard.register(DiagonalLinearOperator, BaseLinearOperator, symmetric=True)
def _(A: DiagonalLinearOperator, B: BaseLinearOperator, info: Info) -> BaseLinearOperator:
    return DiagonalLinearOperator(A.diag * B._diagonal(), info=info)
