"""Parts, batches and inverses of operators, and operators of other packages, all lazy."""

from __future__ import annotations

from typing import Any, cast

import torch
from linear_operator.operators import LinearOperator
from linear_operator.utils.getitem import _is_noop_index
from torch import Tensor

from . import rules
from .base import BaseLinearOperator, Krylov
from .damping import Damping
from .info import Info
from .lazy import LazyLinearOperator

__all__ = [
    "BroadcastLinearOperator",
    "ForeignLinearOperator",
    "InverseLinearOperator",
    "OrthogonalLinearOperator",
    "RestrictedLinearOperator",
]


class RestrictedLinearOperator(LazyLinearOperator):
    """A[rows, columns], or the principal block A[rows, rows].

    Args:
        base: A.
        rows: positions (m,).
        cols: positions (l,); None for a principal block, which is symmetric as A is.
        info: what is known besides the numbers.
    """

    def __init__(
        self,
        base: BaseLinearOperator,
        rows: Tensor,
        cols: Tensor | None = None,
        *,
        info: Info | None = None,
    ) -> None:
        super().__init__(base, rows, *(() if cols is None else (cols,)), info=info)
        self.base, self.rows = base, rows
        self.cols = rows if cols is None else cols
        self.is_principal = cols is None

    def _size(self) -> torch.Size:
        return torch.Size((*self.base.batch_shape, self.rows.shape[0], self.cols.shape[0]))

    def _transpose_nonbatch(self) -> BaseLinearOperator:
        cols = () if self.is_principal else (self.rows,)
        transposed = self.base._transpose_nonbatch()
        return RestrictedLinearOperator(transposed, self.cols, *cols, info=self.info)

    def _apply(self, v: Tensor) -> Tensor:
        shape = (*v.shape[:-2], self.base.shape[-1], v.shape[-1])
        full = torch.zeros(shape, dtype=v.dtype, device=v.device).index_add(-2, self.cols, v)
        return self.base._apply(full).index_select(-2, self.rows)

    def _diagonal(self) -> Tensor:
        if self.is_principal:
            return self.base._diagonal()[..., self.rows]
        found: Tensor = self.base._get_indices(self.rows, self.cols)
        return found

    def _draw(self, n: int, generator: torch.Generator | None) -> Tensor:
        if not self.is_principal:
            raise self._unsupported("sample")
        return self.base._draw(n, generator)[self.rows]

    def _dense(self) -> Tensor:
        if self.rows.shape[0] < self.cols.shape[0]:  # fewer products from the other side
            transposed = self._transpose_nonbatch()
            return LazyLinearOperator._dense(cast(LazyLinearOperator, transposed)).mT
        return super()._dense()

    def _principal(self, index: Tensor, columns: Tensor | None, info: Info) -> BaseLinearOperator:
        cols = () if self.is_principal else (self.cols[index],)
        return RestrictedLinearOperator(self.base, self.rows[index], *cols, info=info)


class InverseLinearOperator(LazyLinearOperator):
    """A^-1, applied by solving with A.

    Args:
        base: A.
        info: what is known besides the numbers.
    """

    def __init__(self, base: BaseLinearOperator, *, info: Info | None = None) -> None:
        super().__init__(base, info=info)
        self.base = base

    _implicit_in_tensors = False
    _implicit_in_vector = False

    def _size(self) -> torch.Size:
        return cast(torch.Size, self.base.shape)

    def _transpose_nonbatch(self) -> BaseLinearOperator:
        return InverseLinearOperator(self.base._transpose_nonbatch(), info=self.info)

    def _apply(self, v: Tensor) -> Tensor:
        return self.base._solve(v)

    def _solve_columns(self, v: Tensor, krylov: Krylov) -> Tensor:
        return self.base._apply(v)

    def _logdet(self) -> Tensor:
        return -self.base._logdet()

    def _inverse(self) -> BaseLinearOperator:
        return self.base

    def _power(self, p: float) -> BaseLinearOperator:
        return self.base._power(-p)

    def _draw(self, n: int, generator: torch.Generator | None) -> Tensor:
        # if x is from N(0, A), A^-1 x is from N(0, A^-1)
        return self._apply(self.base._draw(n, generator))


class OrthogonalLinearOperator(LazyLinearOperator):
    """Eigenvectors, or singular vectors, as the columns of a square matrix: its inverse is Q^T.

    What they are held in takes symmetric matrices, and would solve for one.

    Args:
        base: Q.
        info: what is known besides the numbers.
    """

    def __init__(self, base: BaseLinearOperator, *, info: Info | None = None) -> None:
        super().__init__(base, info=info)
        self.base = base

    _implicit_in_tensors = False
    _implicit_in_vector = False

    @property
    def known_symmetric(self) -> bool:
        """Eigenvectors are no symmetric matrix."""
        return False

    def _size(self) -> torch.Size:
        return cast(torch.Size, self.base.shape)

    def _transpose_nonbatch(self) -> BaseLinearOperator:
        return OrthogonalLinearOperator(self.base._transpose_nonbatch(), info=self.info)

    def _apply(self, v: Tensor) -> Tensor:
        return self.base._apply(v)

    def _solve_columns(self, v: Tensor, krylov: Krylov) -> Tensor:
        return cast(Tensor, self.base._transpose_nonbatch()._apply(v))

    def _inverse(self) -> BaseLinearOperator:
        return self._transpose_nonbatch()

    def _norm(self, ord: Any) -> Tensor:
        one = torch.ones(self.batch_shape, dtype=self.dtype, device=self.device)
        n = self.shape[-1]  # singular values, each of them 1
        norm: Tensor = one * {"fro": n**0.5, "nuc": float(n)}.get(ord, 1.0)
        return norm

    def _diagonal(self) -> Tensor:
        return self.base._diagonal()

    def _dense(self) -> Tensor:
        return self.base._dense()

    def _getitem(self, row_index: Any, col_index: Any, *batch_indices: Any) -> Any:
        part = self.base._getitem(row_index, col_index, *batch_indices)
        whole = _is_noop_index(row_index) and _is_noop_index(col_index)
        return OrthogonalLinearOperator(part, info=self.info) if whole else part


class ForeignLinearOperator(LazyLinearOperator):
    """Any operator of linear_operator, with our members and an accurate solve.

    Args:
        base: their operator.
        info: what is known besides the numbers.
    """

    def __init__(self, base: LinearOperator, *, info: Info | None = None) -> None:
        super().__init__(base, info=info)
        self.base = base

    def _size(self) -> torch.Size:
        return cast(torch.Size, self.base.shape)

    def _transpose_nonbatch(self) -> BaseLinearOperator:
        return ForeignLinearOperator(self.base._transpose_nonbatch(), info=self.info)

    def _apply(self, v: Tensor) -> Tensor:
        return cast(Tensor, self.base._matmul(v))

    @property
    def known_symmetric(self) -> bool:
        """Triangular ones, among others, are not."""
        return False

    def _dense(self) -> Tensor:
        return cast(Tensor, self.base.to_dense())

    def _kind(self) -> str:
        return type(self.base).__name__


class BroadcastLinearOperator(LazyLinearOperator):
    """One matrix repeated over leading batch dimensions, without copies.

    Args:
        base: a matrix without batch dimensions.
        repeats: the batch shape.
        info: what is known besides the numbers.
    """

    def __init__(
        self, base: BaseLinearOperator, *, repeats: torch.Size, info: Info | None = None
    ) -> None:
        super().__init__(base, repeats=repeats, info=info)
        self.base, self.repeats = base, repeats

    @classmethod
    def of(cls, base: BaseLinearOperator, batch_shape: torch.Size) -> BroadcastLinearOperator:
        """The matrix with a batch shape."""
        return cls(base, repeats=batch_shape, info=base.info)

    # the matrix has its own way of solving
    _implicit_in_tensors = False
    _implicit_in_vector = False

    def _size(self) -> torch.Size:
        return torch.Size((*self.repeats, *self.base.shape[-2:]))

    def _transpose_nonbatch(self) -> BaseLinearOperator:
        return BroadcastLinearOperator.of(self.base._transpose_nonbatch(), self.repeats)

    def _spread(self, x: Tensor) -> Tensor:
        lead = torch.broadcast_shapes(self.repeats, x.shape[:-2])
        return x.expand(*lead, *x.shape[-2:])

    def _apply(self, v: Tensor) -> Tensor:
        return self._spread(self.base._apply(v))

    def _solve_columns(self, v: Tensor, krylov: Krylov) -> Tensor:
        return self._spread(self.base._solve(v, krylov=krylov))

    @property
    def iterates(self) -> bool:
        """Whether a solve of the repeated matrix is an iteration."""
        return self.base.iterates

    def _damp(self, damping: Damping, method: str) -> BaseLinearOperator:
        return BroadcastLinearOperator.of(self.base._damp(damping, method), self.repeats)

    def _scale(self, c: float | Tensor) -> BaseLinearOperator:
        return BroadcastLinearOperator.of(self.base._scale(c), self.repeats)

    def _draw(self, n: int, generator: torch.Generator | None) -> Tensor:
        draws = self.base._draw(n * self.repeats.numel(), generator)  # each matrix has its own
        spread: Tensor = draws.unflatten(-1, (*self.repeats, n)).movedim(0, -2)
        return spread

    def _diagonal(self) -> Tensor:
        diagonal = self.base._diagonal()
        return diagonal.expand(*self.repeats, diagonal.shape[-1])

    def _trace(self) -> Tensor:
        return self.base._trace().expand(self.repeats)

    def _logdet(self) -> Tensor:
        return self.base._logdet().expand(self.repeats)

    def _norm(self, ord: Any) -> Tensor:
        return self.base._norm(ord).expand(self.repeats)

    def _inverse(self) -> BaseLinearOperator:
        return BroadcastLinearOperator.of(self.base._inverse(), self.repeats)

    def _power(self, p: float) -> BaseLinearOperator:
        return BroadcastLinearOperator.of(self.base._power(p), self.repeats)

    def _pinv(self, rcond: float | None) -> BaseLinearOperator:
        return BroadcastLinearOperator.of(self.base._pinv(rcond), self.repeats)

    def _dense(self) -> Tensor:
        return self._spread(self.base._dense())

    def _eigensystem(self) -> tuple[Tensor, BaseLinearOperator]:
        values, basis = self.base._eigensystem()
        spread = values.expand(*self.repeats, values.shape[-1])
        return spread, BroadcastLinearOperator.of(basis, self.repeats)

    def _restrict(self, names: tuple[str, ...]) -> BaseLinearOperator:
        return BroadcastLinearOperator.of(self.base._restrict(names), self.repeats)

    def _expand_batch(self, batch_shape: Any) -> Any:
        return BroadcastLinearOperator.of(self.base, torch.Size(batch_shape))

    def _sum_batch(self, dim: int) -> Any:
        rest = (*self.repeats[:dim], *self.repeats[dim + 1 :])
        return self.base._scale(float(self.repeats[dim]))._expand_batch(rest)

    def _unsqueeze_batch(self, dim: int) -> Any:
        return self._expand_batch((*self.repeats[:dim], 1, *self.repeats[dim:]))

    def _permute_batch(self, *dims: int) -> Any:
        return self._expand_batch([self.repeats[d] for d in dims])

    def _getitem(self, row_index: Any, col_index: Any, *batch_indices: Any) -> Any:
        # an empty tensor of the batch shape knows how its indices change it
        probe = torch.empty(*self.repeats, 0, device="cpu")
        shape = probe[batch_indices].shape[:-1] if batch_indices else self.repeats
        base = self.base
        if not (_is_noop_index(row_index) and _is_noop_index(col_index)):
            base = base._getitem(row_index, col_index)
        return base._expand_batch(shape)

    def _get_indices(self, row_index: Any, col_index: Any, *batch_indices: Any) -> Tensor:
        shapes = [index.shape for index in (row_index, col_index, *batch_indices)]
        found: Tensor = self.base._get_indices(row_index, col_index)
        return found.expand(torch.broadcast_shapes(*shapes))


@rules.selections.register(BaseLinearOperator)
def _(
    A: BaseLinearOperator, rows: Tensor, cols: Tensor | None, info: Info | None
) -> BaseLinearOperator:
    return RestrictedLinearOperator(A, rows, cols, info=info)


rules.orthogonal.register(BaseLinearOperator)(OrthogonalLinearOperator)
rules.broadcast.register(BaseLinearOperator)(BroadcastLinearOperator.of)


@rules.inverses.register(BaseLinearOperator)
def _(A: BaseLinearOperator) -> BaseLinearOperator:
    return InverseLinearOperator(A, info=A.info)
