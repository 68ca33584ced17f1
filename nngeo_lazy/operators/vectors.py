"""What can stand to the right of an operator: flat, with columns, or a dict by parameter name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor

from ..arguments import described
from ..errors import SpaceMismatchError
from ..pieces import whole_vectors
from ..precision import HALF

if TYPE_CHECKING:
    from .base import BaseLinearOperator

__all__ = [
    "VectorLike",
    "columns",
    "flattened",
    "is_symmetric",
    "require_fitting",
    "require_left",
    "require_tensor",
    "require_vector",
    "start_of",
]

VectorLike: TypeAlias = Tensor | Mapping[str, Tensor]


def columns(
    operator: BaseLinearOperator, v: VectorLike
) -> tuple[Tensor, Callable[[Tensor], VectorLike]]:
    """A vector as columns (..., n, k), and the way back for a result of the same kind.

    Raises:
        SpaceMismatchError: a wrong length, dtype or device, or unknown or missing names.
    """
    if isinstance(v, Mapping):
        space = operator.space
        if space is None:
            raise SpaceMismatchError(
                "expected a tensor: this operator has no parameter space to read a dict by name"
            )
        v, pieces = whole_vectors(v)
        flat = require_vector(operator, space.ravel(v), vector=True)  # (..., P)
        lead = flat.shape[:-1]
        joint = flat.reshape(-1, flat.shape[-1]).mT  # (P, K)
        if not operator.maps_to_parameters:
            return joint, lambda x: x.mT.reshape(*lead, -1)
        return joint, lambda x: pieces(space.unravel(x.mT.reshape(*lead, -1)))
    require_tensor(operator, v)
    v = require_vector(operator, v, vector=v.dim() == 1)
    if v.dim() == 1:
        return v.unsqueeze(-1), lambda x: x.squeeze(-1)
    return v, lambda x: x


def require_tensor(operator: BaseLinearOperator, v: Any) -> None:
    """Raise SpaceMismatchError if something else stands where a vector is expected."""
    if isinstance(v, Tensor):
        return
    n = operator.shape[-1]
    remedy = "convert it with torch.as_tensor(..., dtype=operator.dtype)"
    if isinstance(v, (int, float)):
        remedy = f"write {v} * operator for a multiple"
    raise SpaceMismatchError(
        f"expected a tensor of shape ({n},) or ({n}, k), a dict by parameter name or an operator, "
        f"got {described(v)}: {remedy}"
    )


def start_of(operator: BaseLinearOperator, x0: VectorLike, v: Tensor) -> Tensor:
    """Where an iteration for columns v starts, as columns.

    Raises:
        SpaceMismatchError: it does not fit the operator, or v.
    """
    start = columns(operator, x0)[0]
    if start.shape[-1] not in (1, v.shape[-1]):
        raise SpaceMismatchError(
            f"expected x0 with {v.shape[-1]} columns, as the right-hand side has, got "
            f"{start.shape[-1]}: pass one start for each"
        )
    return start


def require_left(operator: BaseLinearOperator, left: Tensor, least: int = 1) -> None:
    """Raise SpaceMismatchError if a matrix cannot stand to the left of an operator."""
    n = operator.shape[-1]
    if left.dim() < least or left.shape[-1] != n or left.dtype != operator.dtype:
        raise SpaceMismatchError(
            f"expected a matrix on the left of shape (..., m, {n}) and {operator.dtype}, got "
            f"{tuple(left.shape)} and {left.dtype}: convert it with .to(operator.dtype)"
        )


def require_vector(operator: BaseLinearOperator, v: Tensor, *, vector: bool) -> Tensor:
    """The tensor in the operator's dtype; half precision is promoted, other things refused."""
    n = operator.shape[-1]
    length = v.shape[-1 if vector else -2] if v.dim() else None
    if length != n:
        expected = f"({n},) or ({n}, k)" if not vector or v.dim() < 2 else f"(..., {n})"
        raise SpaceMismatchError(
            f"expected a vector of shape {expected}, got {tuple(v.shape)}"
            + ("" if operator.space is None else f": the space has {n} parameters")
        )
    if v.device != operator.device:
        raise SpaceMismatchError(
            f"expected a vector on {operator.device}, got one on {v.device}: move it with "
            ".to(operator.device), or the operator with .to(device)"
        )
    if v.dtype in HALF and operator.dtype != v.dtype:
        return v.to(operator.dtype)
    if v.dtype != operator.dtype:
        raise SpaceMismatchError(
            f"expected a vector of {operator.dtype}, got {v.dtype}: convert it with "
            ".to(operator.dtype), or the operator with .to(dtype)"
        )
    return v


def flattened(v: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Columns (..., n, k) as (n, K) with all leading dimensions, and the way back for (m, K)."""
    if v.dim() == 2:
        return v, lambda x: x
    wide = v.movedim(-2, 0)
    shape = wide.shape[1:]
    return wide.reshape(wide.shape[0], -1), lambda x: x.reshape(-1, *shape).movedim(0, -2)


def is_symmetric(A: Tensor) -> bool:
    """Whether a matrix (..., n, n) is symmetric up to rounding; NaN is nobody's fault here."""
    if A.shape[-2] != A.shape[-1]:
        return False
    sizes = A.detach().abs()
    allowed = 1e-5 * sizes + (1e-6 * sizes.max() if A.numel() else 0.0)
    return not bool(((A - A.mT).detach().abs() > allowed).any())


def require_fitting(
    preconditioner: BaseLinearOperator, operator: BaseLinearOperator
) -> BaseLinearOperator:
    """The preconditioner, if it is a matrix like the operator."""
    if preconditioner.shape[-2:] != operator.shape[-2:]:
        raise SpaceMismatchError(
            f"expected a preconditioner of shape {tuple(operator.shape[-2:])}, like the matrix, "
            f"got {tuple(preconditioner.shape)}: build both with the same params="
        )
    if preconditioner.dtype != operator.dtype or preconditioner.device != operator.device:
        raise SpaceMismatchError(
            f"expected a preconditioner of {operator.dtype} on {operator.device}, like the matrix, "
            f"got {preconditioner.dtype} on {preconditioner.device}: convert it with .to(...)"
        )
    return preconditioner
