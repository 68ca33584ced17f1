"""Fresh data in an earlier eigenbasis."""

from __future__ import annotations

from typing import Any

from torch import nn

from .arguments import checked
from .builders import FIM, GGN
from .errors import DataError
from .operators import (
    BaseLinearOperator,
    BlockDiagonalLinearOperator,
    DenseLinearOperator,
    DiagonalLinearOperator,
    EigenKroneckerLinearOperator,
    KroneckerLinearOperator,
)
from .operators.stored import outlined
from .quantities import GaussNewton
from .representations import EKFAC, Mixed
from .switches import untraced

__all__ = ["update_diag"]

_REFRESHED = (KroneckerLinearOperator, EigenKroneckerLinearOperator, DiagonalLinearOperator)


@untraced
@checked
def update_diag(
    F: BaseLinearOperator, model: nn.Module, loader: Any, **options: Any
) -> BaseLinearOperator:
    """The EKFAC Fisher of fresh data in the eigenbasis of an earlier KFAC or EKFAC.

    One pass, and no eigendecomposition: bases may be refreshed rarely and diagonals often. The
    results share F's bases, so that `F.lerp(fresh, w)`, a running average, stays an EKFAC.

    Args:
        F: a KFAC or EKFAC Fisher of the same parameters; dense blocks beside it stay dense.
        model: the network.
        loader: the data.
        **options: as in `FIM`, or with loss= as in `GGN`.

    Returns:
        A Fisher (P x P), the mean over the fresh data, with the bases of F.

    Raises:
        SpaceMismatchError: F is over other parameters.
        DataError: F is a Gauss-Newton matrix, and no loss= is given, or a block is of another kind.

    Example:
        >>> import torch, nngeo_lazy as ng
        >>> model, x = torch.nn.Linear(3, 2), torch.randn(8, 3)
        >>> F = ng.FIM(model, x, "ekfac", likelihood="gaussian")
        >>> fresh = ng.update_diag(F, model, torch.randn(8, 3), likelihood="gaussian")
        >>> F.members[0].same_basis(fresh.members[0])
        True

    Source: George et al. (2018), section 4.1.
    """
    of_loss = F.info.quantity.get("matrix") == GaussNewton.__name__
    if of_loss and "loss" not in options:
        raise DataError("F is a Gauss-Newton matrix: pass its loss= to update_diag, as to GGN")
    builder = GGN if "loss" in options else FIM
    kept = _kept_dense(F)
    basis = EKFAC(basis=F)
    return builder(
        model, loader, Mixed(basis, {kept: "block_diagonal"}) if kept else basis, **options
    )


def _kept_dense(F: BaseLinearOperator) -> tuple[str, ...]:
    """The parameters of dense blocks beside an EKFAC's, which stay dense.

    Raises:
        DataError: a block is of a kind that has no fresh diagonal.
    """
    if not isinstance(F, BlockDiagonalLinearOperator) or F.space is None:
        return ()
    names: list[str] = []
    for name, layout, block in F.parts:
        known = outlined(block)
        if isinstance(known, DenseLinearOperator):
            names += [F.space.holding(piece.start) for piece in layout.pieces]
        elif not isinstance(known, _REFRESHED):
            raise DataError(
                f"expected blocks of a KFAC or EKFAC, diagonal or dense ones, got {block._kind()} "
                f"for {name!r}: build the matrix anew"
            )
    return tuple(dict.fromkeys(names))
