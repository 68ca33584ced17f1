"""What a family of operators implements, and what every operator carries."""

from __future__ import annotations

from abc import abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import reduce
from operator import add, mul
from typing import TYPE_CHECKING, Any, cast

import torch
from linear_operator.operators import DiagLinearOperator, LinearOperator
from linear_operator.utils.getitem import _is_noop_index
from torch import Tensor

from ..arguments import described
from ..errors import UnsupportedLayerError
from ..space import ParamSpace
from ..switches import holding, setting
from . import rules
from ._autograd import implicit_solve
from .damping import Damping
from .info import Info

if TYPE_CHECKING:
    from .base import BaseLinearOperator

_ROOTS = setting("roots_by_products", False)

__all__ = [
    "Krylov",
    "PrimitiveLinearOperator",
    "flat_positions",
    "positions",
    "roots_by_products",
    "seeded",
    "tensors_of",
    "wants_roots",
    "within",
]


def roots_by_products() -> AbstractContextManager[None]:
    """Within it, matrices without a closed form have roots that are made from products.

    `power` promises a closed form; what GPyTorch asks for is any root, however it is made.
    """
    return holding(_ROOTS, True)


def wants_roots() -> bool:
    """Whether the caller is inside of `roots_by_products`."""
    return _ROOTS.get()


@dataclass(frozen=True)
class Krylov:
    """Options of an iterative solve; closed forms read only `check`.

    Attributes:
        tol: relative residual to reach.
        max_iter: at most so many products.
        preconditioner: an operator that approximates the one to be solved.
        x0: where to start (..., n, k).
        check: whether to test a closed form for singularity, which reads from the device.
    """

    tol: float | None = None
    max_iter: int | None = None
    preconditioner: BaseLinearOperator | None = None
    x0: Tensor | None = None
    check: bool = True

    def restarted(self) -> Krylov:
        """The same from zero: for another right-hand side."""
        return replace(self, x0=None)


class PrimitiveLinearOperator(LinearOperator):
    """The primitives that every member is made of, abstract; a family implements them.

    Args:
        *args: the tensors and operators that it is made of; the first gives dtype and device.
        info: what is known besides the numbers.
        **fields: what else an operator of this class is, such as the layouts of its blocks. They
            are keywords of its constructor, by which linear_operator makes it again.
    """

    # Whether the tensors it is made of get their gradient of a solve by implicit differentiation,
    # and whether the gradient in the vector needs it as well (an iteration must not be taped).
    _implicit_in_tensors = False
    _implicit_in_vector = False

    # Whether a product with a vector over parameters is again one; a Jacobian's is not.
    maps_to_parameters = True

    @property
    def iterates(self) -> bool:
        """Whether a solve is an iteration, because there is no closed form."""
        return self._implicit_in_vector

    @property
    def known_symmetric(self) -> bool:
        """Whether it is symmetric by what it is made of; if not, products must show it."""
        parts = (part for part in self._args if isinstance(part, PrimitiveLinearOperator))
        return bool(self.is_square) and all(part.known_symmetric for part in parts)

    @property
    def is_explicit(self) -> bool:
        """Whether its entries are known without products."""
        return False

    def __init__(self, *args: Any, info: Info | None = None, **fields: Any) -> None:
        super().__init__(*args, info=Info() if info is None else info, **fields)

    @property
    def info(self) -> Info:
        """What is known besides the numbers."""
        return cast(Info, self._nondifferentiable_kwargs["info"])

    @property
    def space(self) -> ParamSpace | None:
        """The parameters and their order; None for a bare matrix."""
        return self.info.space

    @abstractmethod
    def _apply(self, v: Tensor) -> Tensor:
        """The product with columns (..., n, k)."""

    @abstractmethod
    def _solve_columns(self, v: Tensor, krylov: Krylov) -> Tensor:
        """The solution for columns (..., n, k)."""

    @abstractmethod
    def _damp(self, damping: Damping, method: str) -> BaseLinearOperator:
        """The sum with a diagonal of any sign."""

    @abstractmethod
    def _scale(self, c: float | Tensor) -> BaseLinearOperator:
        """The multiple by a number or a 0-d tensor."""

    @abstractmethod
    def _diagonal(self) -> Tensor:
        """The diagonal (n,)."""

    @abstractmethod
    def _trace(self) -> Tensor: ...

    @abstractmethod
    def _logdet(self) -> Tensor: ...

    @abstractmethod
    def _norm(self, ord: Any) -> Tensor: ...

    @abstractmethod
    def _inverse(self) -> BaseLinearOperator: ...

    @abstractmethod
    def _power(self, p: float) -> BaseLinearOperator: ...

    @abstractmethod
    def _pinv(self, rcond: float | None) -> BaseLinearOperator: ...

    @abstractmethod
    def _draw(self, n: int, generator: torch.Generator | None) -> Tensor:
        """Samples of N(0, F) as columns (n, k)."""

    @abstractmethod
    def _eigensystem(self) -> tuple[Tensor, BaseLinearOperator]:
        """Eigenvalues (n,), signed, in any order, and the orthogonal matrix of eigenvectors."""

    @abstractmethod
    def _dense(self) -> Tensor:
        """The matrix."""

    @abstractmethod
    def _restrict(self, names: tuple[str, ...]) -> BaseLinearOperator:
        """The principal block of some parameters."""

    @abstractmethod
    def _principal(self, index: Tensor, columns: Tensor | None, info: Info) -> BaseLinearOperator:
        """The principal block at an index; `columns` are those of a Kronecker grid, if it is so."""

    @abstractmethod
    def _kind(self) -> str:
        """How a report names this representation."""

    def _at(self, parameters: Tensor) -> BaseLinearOperator:
        """The same matrix at other parameters (P,)."""
        raise UnsupportedLayerError(
            f"{type(self).__name__} holds the statistics of one point: to have the matrix at any "
            "parameters, build it with the representation 'implicit'"
        )

    # --- indices, batches and singular vectors, for families that know better ---------------------

    def _getitem(self, row_index: Any, col_index: Any, *batch_indices: Any) -> Any:
        if _is_noop_index(row_index) and _is_noop_index(col_index):
            return self
        rows = positions(row_index, self.shape[-2], self.device)
        return rules.selections(self, rows, positions(col_index, self.shape[-1], self.device), None)

    def _get_indices(self, row_index: Any, col_index: Any, *batch_indices: Any) -> Tensor:
        """Single entries A[rows, cols], from one product for each distinct column."""
        rows, cols = torch.broadcast_tensors(row_index, col_index)
        shape = rows.shape
        rows = positions(rows.reshape(-1), self.shape[-2], self.device)
        cols = positions(cols.reshape(-1), self.shape[-1], self.device)
        distinct, which = cols.unique(return_inverse=True)
        every = torch.arange(self.shape[-2], device=self.device)
        columns: Tensor = rules.selections(self, every, distinct, None)._dense()
        return columns[rows, which].reshape(shape)

    def _expand_batch(self, batch_shape: Any) -> Any:
        return self if len(batch_shape) == 0 else rules.broadcast(self, torch.Size(batch_shape))

    def _unsqueeze_batch(self, dim: int) -> Any:
        return self._expand_batch(torch.Size([1]))

    def _along(self, dim: int) -> list[Any]:
        """The matrices, or smaller batches, along a batch dimension."""
        before = (slice(None),) * dim
        return [self[(*before, k)] for k in range(self.shape[dim])]

    def _sum_batch(self, dim: int) -> Any:
        return reduce(add, self._along(dim))

    def _prod_batch(self, dim: int) -> Any:
        return reduce(mul, self._along(dim))

    def _permute_batch(self, *dims: int) -> Any:
        first, *rest = dims
        rest = [d - (d > first) for d in rest]
        members = self._along(first)
        return rules.stacks([m._permute_batch(*rest) for m in members] if rest else members)

    def _svd(self) -> tuple[Any, Tensor, Any]:
        values, basis = self._eigensystem()
        signs = rules.as_operator(DiagLinearOperator(values.sign()))
        return rules.orthogonal(basis), values.abs(), rules.orthogonal(basis @ signs)

    # --- what follows from the primitives --------------------------------------------------------

    def _solve(
        self,
        rhs: Tensor,
        preconditioner: Any = None,
        num_tridiag: int | None = 0,
        *,
        krylov: Krylov | None = None,
    ) -> Tensor:
        """The solution for columns (..., n, k), differentiable in them and in the tensors.

        linear_operator's hook: its options are ignored in favour of `krylov`.
        """
        krylov = Krylov() if krylov is None else krylov
        taped = torch.is_grad_enabled()
        if self._implicit_in_vector or (
            taped and self._implicit_in_tensors and any(t.requires_grad for t in tensors_of(self))
        ):
            return implicit_solve(self._this(), rhs, krylov)
        return self._solve_columns(rhs, krylov)

    def _with(self, **fields: Any) -> Any:
        """The same numbers with another `info`, or other fields."""
        return self.__class__(*self._args, **{**self._kwargs, **fields})

    def _with_info(self, info: Info) -> Any:
        """The same numbers with other knowledge about them."""
        return self._with(info=info)

    def _altered(self, result: BaseLinearOperator) -> BaseLinearOperator:
        """A result that is no build's statistics any more."""
        if result is self or not result.info.quantity:
            return result
        altered: BaseLinearOperator = result._with(info=result.info.altered())
        return altered

    def _moved_fields(self, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        """The keywords of its constructor for an operator of another dtype or device."""
        return {**self._kwargs, "info": self.info.moved(dtype, device)}

    def _require_square(self, what: str) -> None:
        if not self.is_square:
            raise RuntimeError(f"{what} needs a square operator, got {tuple(self.shape)}")

    def _unsupported(self, what: str) -> UnsupportedLayerError:
        return UnsupportedLayerError(
            f"{what} has no closed form for {type(self).__name__}: dense, diagonal, Kronecker and "
            "block-diagonal operators have one. Where it fits, take "
            f"ng.aslinearoperator(F.to_dense()).{what}"
        )

    def _this(self) -> BaseLinearOperator:
        """Itself, typed as what every operator is."""
        return cast("BaseLinearOperator", self)


def tensors_of(operator: LinearOperator) -> tuple[Tensor, ...]:
    """The tensors that an operator is made of, flat."""
    return cast("tuple[Tensor, ...]", operator.representation())


def positions(index: Any, size: int, device: torch.device) -> Tensor:
    """A slice or a tensor index, as positions."""
    if isinstance(index, slice):
        return torch.arange(*index.indices(size), device=device)
    where = torch.as_tensor(index, device=device)
    return torch.where(where < 0, where + size, where)


def within(index: Any, size: int, device: torch.device) -> Any:
    """An index of one dimension: a mask as positions, and none that is out of range.

    Raises:
        IndexError: a mask of another length, or a position outside of the dimension.
    """
    if isinstance(index, (slice, int)) and not isinstance(index, bool):
        if isinstance(index, int) and not -size <= index < size:
            raise IndexError(f"expected an index from {-size} to {size - 1}, got {index}")
        return index % size if isinstance(index, int) else index
    try:
        where = torch.as_tensor(index, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise _no_index(index) from error
    if isinstance(index, list) and not index:
        return where.long()  # torch takes an empty list for floats
    if where.is_floating_point() or where.is_complex():
        raise _no_index(index)
    if where.dtype == torch.bool:
        if where.shape != (size,):
            raise IndexError(f"expected a mask of shape ({size},), got {tuple(where.shape)}")
        return where.nonzero().squeeze(-1)
    if where.numel() and bool(((where < -size) | (where >= size)).any()):
        raise IndexError(
            f"expected positions from {-size} to {size - 1}, got {int(where.min())} to "
            f"{int(where.max())}"
        )
    return where.long()


def _no_index(index: Any) -> IndexError:
    return IndexError(
        f"expected an index: an integer, a slice, a list or tensor of positions, or a mask, got "
        f"{described(index)}"
    )


def flat_positions(space: ParamSpace, names: tuple[str, ...], device: Any) -> Tensor:
    """Where some parameters lie in the flat vector."""
    chosen = [space.slices[name] for name in names]
    return torch.cat([torch.arange(s.start, s.stop, device=device) for s in chosen])


def seeded(seed: int | None, device: torch.device) -> torch.Generator | None:
    """A generator of its own; None is torch's global one."""
    return None if seed is None else torch.Generator(device=device).manual_seed(seed)
