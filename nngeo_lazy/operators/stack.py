"""Several matrices of one shape as one batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from . import rules
from .base import BaseLinearOperator, Krylov
from .damping import Damping
from .info import Info, joint
from .lazy import LazyLinearOperator

__all__ = ["StackLinearOperator"]


class StackLinearOperator(LazyLinearOperator):
    """Matrices (B, ..., m, n), each with a structure of its own.

    Args:
        *members: of one shape.
        info: what is known besides the numbers.

    Example:
        >>> from nngeo_lazy.operators import DiagonalLinearOperator
        >>> stack = StackLinearOperator(*map(DiagonalLinearOperator, torch.tensor([[1.0], [4.0]])))
        >>> stack.shape, stack.solve(torch.ones(2, 1, 1)).flatten()
        (torch.Size([2, 1, 1]), tensor([1.0000, 0.2500]))
    """

    def __init__(self, *members: BaseLinearOperator, info: Info | None = None) -> None:
        super().__init__(*members, info=info)
        self.members = members

    # every member has its own way of solving
    _implicit_in_tensors = False
    _implicit_in_vector = False

    @property
    def iterates(self) -> bool:
        """Whether a solve with any member is an iteration."""
        return any(member.iterates for member in self.members)

    def _size(self) -> torch.Size:
        return torch.Size((len(self.members), *self.members[0].shape))

    def _transpose_nonbatch(self) -> BaseLinearOperator:
        return self._mapped(lambda member: member._transpose_nonbatch())

    def _apply(self, v: Tensor) -> Tensor:
        return self._each(v, lambda member, part: member._apply(part))

    def _solve_columns(self, v: Tensor, krylov: Krylov) -> Tensor:
        return self._each(v, lambda member, part: member._solve(part, krylov=krylov))

    def _damp(self, damping: Damping, method: str) -> BaseLinearOperator:
        return self._mapped(lambda member: member._damp(damping, method))

    def _scale(self, c: float | Tensor) -> BaseLinearOperator:
        return self._mapped(lambda member: member._scale(c))

    def _diagonal(self) -> Tensor:
        return self._stacked(lambda member: member._diagonal())

    def _trace(self) -> Tensor:
        return self._stacked(lambda member: member._trace())

    def _logdet(self) -> Tensor:
        return self._stacked(lambda member: member._logdet())

    def _norm(self, ord: Any) -> Tensor:
        return self._stacked(lambda member: member._norm(ord))

    def _inverse(self) -> BaseLinearOperator:
        return self._mapped(lambda member: member._inverse())

    def _power(self, p: float) -> BaseLinearOperator:
        return self._mapped(lambda member: member._power(p))

    def _pinv(self, rcond: float | None) -> BaseLinearOperator:
        return self._mapped(lambda member: member._pinv(rcond))

    def _dense(self) -> Tensor:
        return self._stacked(lambda member: member._dense())

    def _eigensystem(self) -> tuple[Tensor, BaseLinearOperator]:
        values, bases = zip(*(member._eigensystem() for member in self.members), strict=True)
        return torch.stack(values), StackLinearOperator(*bases)

    def _svd(self) -> tuple[Any, Tensor, Any]:
        left, values, right = zip(*(member._svd() for member in self.members), strict=True)
        return StackLinearOperator(*left), torch.stack(values), StackLinearOperator(*right)

    def _draw(self, n: int, generator: torch.Generator | None) -> Tensor:
        return self._stacked(lambda member: member._draw(n, generator))

    def _getitem(self, row_index: Any, col_index: Any, *batch_indices: Any) -> Any:
        if not batch_indices:
            return self._mapped(lambda member: member._getitem(row_index, col_index))
        index, *rest = batch_indices
        if isinstance(index, int):
            return self.members[index]._getitem(row_index, col_index, *rest)
        if isinstance(index, slice):
            chosen = self.members[index]
        elif index.dim() > 1:
            parts = (self._getitem(row_index, col_index, part, *rest) for part in index)
            return StackLinearOperator(*parts)
        else:
            chosen = tuple(self.members[k] for k in index.tolist())
        return StackLinearOperator(*(m._getitem(row_index, col_index, *rest) for m in chosen))

    def _get_indices(self, row_index: Any, col_index: Any, *batch_indices: Any) -> Tensor:
        given = torch.broadcast_tensors(row_index, col_index, *batch_indices)
        row, column, which, *rest = given
        out = torch.zeros(which.shape, dtype=self.dtype, device=self.device)
        for k, member in enumerate(self.members):
            here = which % len(self.members) == k
            if bool(here.any()):
                found = member._get_indices(*(index[here] for index in (row, column, *rest)))
                out = out.masked_scatter(here, found)
        return out

    def _expand_batch(self, batch_shape: Any) -> Any:
        own, wanted = self.batch_shape, torch.Size(batch_shape)
        padded = (*(1,) * (len(wanted) - len(own)), *own)
        if len(padded) > len(wanted) or any(
            n not in (1, m) for n, m in zip(padded, wanted, strict=True)
        ):
            raise ValueError(
                f"expected a batch shape that {tuple(own)} broadcasts to, got {tuple(wanted)}"
            )
        if own == wanted:
            return self
        if len(wanted) > len(own):
            each = self._expand_batch(wanted[1:])
            return StackLinearOperator(*[each] * wanted[0])
        members = [member._expand_batch(wanted[1:]) for member in self.members]
        return StackLinearOperator(*(members * wanted[0] if len(members) == 1 else members))

    def _unsqueeze_batch(self, dim: int) -> Any:
        if dim == 0:
            return StackLinearOperator(self)
        return self._mapped(lambda member: member._unsqueeze_batch(dim - 1))

    def _restrict(self, names: tuple[str, ...]) -> BaseLinearOperator:
        return self._mapped(lambda member: member._restrict(names))

    def _principal(self, index: Tensor, columns: Tensor | None, info: Info) -> BaseLinearOperator:
        return self._mapped(lambda member: member._principal(index, columns, info))

    def _kind(self) -> str:
        return f"{len(self.members)} of {self.members[0]._kind()}"

    def _mapped(
        self, function: Callable[[BaseLinearOperator], BaseLinearOperator]
    ) -> BaseLinearOperator:
        return StackLinearOperator(*map(function, self.members), info=self.info)

    def _stacked(self, function: Callable[[BaseLinearOperator], Tensor]) -> Tensor:
        return torch.stack([function(member) for member in self.members])

    def _each(self, v: Tensor, function: Callable[[BaseLinearOperator, Tensor], Tensor]) -> Tensor:
        """(..., B, n, k) or (n, k) to (..., B, m, k)."""
        lead, dim = torch.broadcast_shapes(v.shape[:-2], self.batch_shape), -self.dim()
        parts = v.expand(*lead, *v.shape[-2:]).unbind(dim)
        made = [function(*pair) for pair in zip(self.members, parts, strict=True)]
        return torch.stack(made, dim)


@rules.stacks.register(list)
def _(members: list[BaseLinearOperator]) -> BaseLinearOperator:
    if not members:
        raise ValueError("expected a batch of at least one matrix, got an empty one")
    return StackLinearOperator(*members, info=reduce(joint, (each.info for each in members)))
