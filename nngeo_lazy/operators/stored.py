"""Blocks whose numbers lie elsewhere, and are there while something is computed with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import methodcaller
from typing import Any

import torch
from torch import Tensor

from .base import BaseLinearOperator, Krylov
from .damping import Damping
from .info import Info

__all__ = ["Source", "StoredLinearOperator", "opened", "outlined"]


@dataclass(frozen=True)
class Source:
    """Where an operator's numbers lie.

    Attributes:
        open: gives the operator.
        outline: the operator without numbers, on the meta device.
    """

    open: Callable[[], BaseLinearOperator]
    outline: BaseLinearOperator


class StoredLinearOperator(BaseLinearOperator):
    """An operator on disk: every computation opens it, and lets it go.

    What makes another operator of it (damping, an inverse, a power) is noted, and done whenever the
    numbers are there. Decompositions are not kept: store an EKFAC or an inverse rather than a
    KFAC, which would be decomposed in each solve.

    Args:
        like: an empty tensor of its dtype, on its device.
        source: where the operator is.
        steps: what is done with the operator when it is there, in order.
        size: rows; by default those of the outline.
        info: what is known besides the numbers.
    """

    def __init__(
        self,
        like: Tensor,
        *,
        source: Source,
        steps: tuple[methodcaller, ...] = (),
        size: int | None = None,
        info: Info | None = None,
    ) -> None:
        size = source.outline.shape[-1] if size is None else size
        super().__init__(like, source=source, steps=steps, size=size, info=info)
        self.source, self.steps, self._rows = source, steps, size

    def opened(self) -> BaseLinearOperator:
        """The operator with its numbers, as it is now."""
        operator = self.source.open().to(dtype=self.dtype, device=self.device)
        for step in self.steps:
            operator = step(operator)
        return operator

    def _then(self, name: str, *args: Any, size: int | None = None) -> BaseLinearOperator:
        """The same with one more step."""
        size = self._rows if size is None else size
        made: BaseLinearOperator = self._with(
            steps=(*self.steps, methodcaller(name, *args)), size=size
        )
        return made

    @property
    def iterates(self) -> bool:
        """Whether a solve is an iteration; as the operator that was stored."""
        return self.source.outline.iterates

    @property
    def is_explicit(self) -> bool:
        """Whether its entries are known without products; as the operator that was stored."""
        return self.source.outline.is_explicit

    def _size(self) -> torch.Size:
        return torch.Size((self._rows, self._rows))

    def _kind(self) -> str:
        return f"stored {self.source.outline._kind()}"

    def _transpose_nonbatch(self) -> BaseLinearOperator:
        return self._then("_transpose_nonbatch")

    def _apply(self, v: Tensor) -> Tensor:
        return self.opened()._apply(v)

    def _solve_columns(self, v: Tensor, krylov: Krylov) -> Tensor:
        return self.opened()._solve(v, krylov=krylov)

    def _damp(self, damping: Damping, method: str) -> BaseLinearOperator:
        return self._then("_damp", damping, method)

    def _scale(self, c: float | Tensor) -> BaseLinearOperator:
        return self._then("_scale", c)

    def _diagonal(self) -> Tensor:
        return self.opened()._diagonal()

    def _trace(self) -> Tensor:
        return self.opened()._trace()

    def _logdet(self) -> Tensor:
        return self.opened()._logdet()

    def _norm(self, ord: Any) -> Tensor:
        return self.opened()._norm(ord)

    def _inverse(self) -> BaseLinearOperator:
        return self._then("_inverse")

    def _power(self, p: float) -> BaseLinearOperator:
        return self._then("_power", p)

    def _pinv(self, rcond: float | None) -> BaseLinearOperator:
        return self._then("_pinv", rcond)

    def _draw(self, n: int, generator: torch.Generator | None) -> Tensor:
        return self.opened()._draw(n, generator)

    def _eigensystem(self) -> tuple[Tensor, BaseLinearOperator]:
        return self.opened()._eigensystem()

    def _dense(self) -> Tensor:
        return self.opened()._dense()

    def _restrict(self, names: tuple[str, ...]) -> BaseLinearOperator:
        return self.opened()._restrict(names)

    def _principal(self, index: Tensor, columns: Tensor | None, info: Info) -> BaseLinearOperator:
        return self._then("_principal", index, columns, info, size=len(index))


def opened(operator: BaseLinearOperator) -> BaseLinearOperator:
    """The operator with its numbers, wherever they lie."""
    return operator.opened() if isinstance(operator, StoredLinearOperator) else operator


def outlined(operator: BaseLinearOperator) -> BaseLinearOperator:
    """An operator of the same class and sizes, for which nothing is read."""
    if isinstance(operator, StoredLinearOperator) and not operator.steps:
        return operator.source.outline
    return operator
