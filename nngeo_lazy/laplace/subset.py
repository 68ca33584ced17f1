"""A posterior over some entries of the flat vector: the others stay as they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from ..errors import DataError, TooLargeError
from ..operators import BaseLinearOperator, DenseLinearOperator, DiagonalLinearOperator
from ..operators.views import RestrictedLinearOperator
from ..space import ParamSpace

__all__ = ["chosen_parameters", "embedded", "principal"]

MAX_BYTES = 2**31  # of a dense S x S block
TILE_BYTES = 2**26  # of columns of F at a time


def chosen_parameters(space: ParamSpace, given: Any) -> Tensor | None:
    """The positions (S,) of an index, or of a mask that is flat or by name.

    Raises:
        DataError: neither, or no parameter at all.
    """
    if given is None:
        return None
    if isinstance(given, Mapping):
        own = space.unravel(space.zeros())
        unknown = set(given) - set(own)
        if unknown:
            raise DataError(f"expected a mask of parameters {list(own)}, got one of {unknown}")
        given = torch.cat(
            [
                given.get(name, torch.zeros(zero.shape, device="cpu")).flatten().bool()
                for name, zero in own.items()
            ]
        )
    size = len(space)
    flat = isinstance(given, Tensor) and given.dim() == 1
    if flat and given.dtype == torch.bool and len(given) == size:
        given = given.nonzero().squeeze(1)
    elif not flat or given.is_floating_point() or given.dtype == torch.bool:
        got = f"{given.dtype} {tuple(given.shape)}" if isinstance(given, Tensor) else repr(given)
        raise DataError(
            f"expected subset to be an index (S,) or a mask ({size},), flat or by name, got {got}"
        )
    index: Tensor = given.to(space.device)
    inside = bool(((index >= 0) & (index < size)).all())
    if not len(index) or not inside or len(index.unique()) < len(index):
        raise DataError(
            f"expected subset to name at least one of {size} parameters, each once, got "
            f"{len(index)} positions with {len(index.unique())} different ones"
            + ("" if inside else f", some out of range 0 to {size - 1}")
        )
    return index


def principal(F: BaseLinearOperator, index: Tensor) -> BaseLinearOperator:
    """F[index, index], dense, from its columns."""
    count, size = len(index), F.shape[-1]
    if count * count * 8 > MAX_BYTES:
        raise TooLargeError(
            f"the block of F of a subset of {count} parameters takes {count**2 * 8 / 2**30:.1f} "
            f"GiB, more than the limit of {MAX_BYTES / 2**30:.0f} GiB: choose fewer"
        )
    if isinstance(F, DiagonalLinearOperator):
        return DenseLinearOperator(F.diag[index].diag())
    columns = []
    for part in index.split(max(1, TILE_BYTES // (size * F.dtype.itemsize))):
        units = torch.zeros(size, len(part), dtype=F.dtype, device=F.device)
        units[part, torch.arange(len(part), device=F.device)] = 1
        columns.append((F @ units)[index])
    made = torch.cat(columns, 1)
    return DenseLinearOperator((made + made.mT) / 2)


def embedded(M: BaseLinearOperator, index: Tensor, size: int) -> BaseLinearOperator:
    """M at the positions of an index, zero elsewhere: size x size."""
    eye = DiagonalLinearOperator(torch.ones(size, dtype=M.dtype, device=M.device))
    where = RestrictedLinearOperator(eye, torch.arange(size, device=M.device), index)
    return cast(BaseLinearOperator, where @ M @ where.mT)
