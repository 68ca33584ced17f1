"""Sums, multiples and products that stay what they are, and keep every member."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch import Tensor

from ..errors import NotPositiveDefiniteError, SpaceMismatchError, UnsupportedLayerError
from ..linalg import cg
from .base import BaseLinearOperator, Krylov, flat_positions
from .damping import Damping
from .diagonal import DiagonalLinearOperator
from .info import Info
from .vectors import flattened
from .warn import warn_unless_converged

__all__ = [
    "LazyLinearOperator",
    "ProductLinearOperator",
    "ScaledLinearOperator",
    "SumLinearOperator",
    "add_diagonal_lazily",
    "closed_forms_only",
]

_CHUNK_BYTES = 2**26  # of identity columns at a time, where only products are known
_CLOSED_ONLY: ContextVar[bool] = ContextVar("closed_forms_only", default=False)


@contextmanager
def closed_forms_only() -> Iterator[None]:
    """Within it, a number that no structure knows raises UnsupportedLayerError.

    However an operator is composed, it then either answers at the price of its structure, or says
    that n products or an estimate would be needed.
    """
    token = _CLOSED_ONLY.set(True)
    try:
        yield
    finally:
        _CLOSED_ONLY.reset(token)


def require_products(operator: BaseLinearOperator, what: str) -> None:
    """Raise where only closed forms are wanted."""
    if _CLOSED_ONLY.get():
        raise UnsupportedLayerError(f"{what} of {type(operator).__name__} has no closed form")


class LazyLinearOperator(BaseLinearOperator):
    """A matrix of which only products are known; a subclass may know more.

    Its solve is conjugate gradients, differentiated implicitly. What has no closed form raises and
    says what has one. Numbers are exact: where nothing better is known, from products with the
    columns of the identity, a bounded number at a time.
    """

    _implicit_in_tensors = True
    _implicit_in_vector = True

    def _solve_columns(self, v: Tensor, krylov: Krylov) -> Tensor:
        b, back = flattened(v)
        x0 = None if krylov.x0 is None else flattened(krylov.x0.expand(v.shape))[0]
        precondition = None
        if krylov.preconditioner is not None:
            chosen = krylov.preconditioner

            def precondition(r: Tensor) -> Tensor:
                return chosen._solve_any(r, Krylov(check=False))

        found = cg(
            self._apply,
            b,
            tol=krylov.tol,
            max_iter=krylov.max_iter,
            preconditioner=precondition,
            x0=x0,
        )
        warn_unless_converged(found, krylov.tol, v.dtype, "conjugate gradients")
        return back(found.x)

    def _damp(self, damping: Damping, method: str) -> BaseLinearOperator:
        return add_diagonal_lazily(self, damping.value)

    def _scale(self, c: float | Tensor) -> BaseLinearOperator:
        return ScaledLinearOperator(self, _constant(self, c), info=self.info.plain())

    def _diagonal(self) -> Tensor:
        return diagonal_by_products(self)

    def _trace(self) -> Tensor:
        return self._diagonal().sum()

    def _logdet(self) -> Tensor:
        from ..numerics.estimation import estimated_logdet

        return estimated_logdet(self)

    def _norm(self, ord: Any) -> Tensor:
        if ord == "fro":
            return torch.stack([part.square().sum() for part in product_chunks(self)]).sum().sqrt()
        if ord == 2:
            from ..numerics.spectra import spectral_norm

            return spectral_norm(self)
        raise self._unsupported(f"norm({ord!r})")

    def _inverse(self) -> BaseLinearOperator:
        from .views import InverseLinearOperator

        return InverseLinearOperator(self, info=self.info.plain())

    def _power(self, p: float) -> BaseLinearOperator:
        if p == 1:
            return self
        if p == -1:
            return self._inverse()
        raise self._unsupported(f"power({p:g})")

    def _pinv(self, rcond: float | None) -> BaseLinearOperator:
        raise self._unsupported("pinv")

    def _draw(self, n: int, generator: torch.Generator | None) -> Tensor:
        raise self._unsupported("sample")

    def _eigensystem(self) -> tuple[Tensor, BaseLinearOperator]:
        raise self._unsupported("eigenvalues")

    def _dense(self) -> Tensor:
        return torch.cat(list(product_chunks(self)), -1)

    def _restrict(self, names: tuple[str, ...]) -> BaseLinearOperator:
        space = self.space
        if space is None or names == space.names:
            return self
        index = flat_positions(space, names, self.device)
        return self._principal(index, None, self.info.restrict(names))

    def _principal(self, index: Tensor, columns: Tensor | None, info: Info) -> BaseLinearOperator:
        from .views import RestrictedLinearOperator

        return RestrictedLinearOperator(self, index, info=info)

    def _kind(self) -> str:
        inner = ", ".join(a._kind() for a in self._args if isinstance(a, BaseLinearOperator))
        return f"{type(self).__name__.removesuffix('LinearOperator').lower()} ({inner})"


class SumLinearOperator(LazyLinearOperator):
    """A + B + ..., terms of any kind.

    Args:
        *terms: operators of one shape.
        info: what is known besides the numbers.
    """

    def __init__(self, *terms: BaseLinearOperator, info: Info | None = None) -> None:
        super().__init__(*terms, info=info)
        self.terms = terms

    @classmethod
    def of(cls, *terms: BaseLinearOperator, info: Info) -> SumLinearOperator:
        """The sum, without sums among its terms."""
        flat: list[BaseLinearOperator] = []
        for term in terms:
            flat += term.terms if isinstance(term, SumLinearOperator) else (term,)
        return cls(*flat, info=info)

    def _size(self) -> torch.Size:
        batch = torch.broadcast_shapes(*(t.batch_shape for t in self.terms))
        return torch.Size((*batch, *self.terms[0].shape[-2:]))

    def _transpose_nonbatch(self) -> BaseLinearOperator:
        return SumLinearOperator(*(t._transpose_nonbatch() for t in self.terms), info=self.info)

    def _apply(self, v: Tensor) -> Tensor:
        total = self.terms[0]._apply(v)
        for term in self.terms[1:]:
            total = total + term._apply(v)
        return total

    def _scale(self, c: float | Tensor) -> BaseLinearOperator:
        return SumLinearOperator(*(t._scale(c) for t in self.terms), info=self.info)

    def _diagonal(self) -> Tensor:
        return cast(Tensor, sum(t._diagonal() for t in self.terms))

    def _trace(self) -> Tensor:
        return cast(Tensor, sum(t._trace() for t in self.terms))

    def _draw(self, n: int, generator: torch.Generator | None) -> Tensor:
        # independent draws add up to one of the summed covariance
        return cast(Tensor, sum(t._draw(n, generator) for t in self.terms))

    def _dense(self) -> Tensor:
        return cast(Tensor, sum(t._dense() for t in self.terms))

    def _restrict(self, names: tuple[str, ...]) -> BaseLinearOperator:
        space = self.space
        if space is None or names == space.names:
            return self
        info, index = self.info.restrict(names), flat_positions(space, names, self.device)
        parts = [
            t._principal(index, None, info) if t.space is None else t._restrict(names)
            for t in self.terms
        ]
        return SumLinearOperator(*parts, info=info)


class ScaledLinearOperator(LazyLinearOperator):
    """c A.

    Args:
        base: A.
        constant: c, a 0-d tensor.
        info: what is known besides the numbers.
    """

    def __init__(
        self, base: BaseLinearOperator, constant: Tensor, *, info: Info | None = None
    ) -> None:
        super().__init__(base, constant, info=info)
        self.base, self.constant = base, constant

    @property
    def iterates(self) -> bool:
        return self.base.iterates

    def _size(self) -> torch.Size:
        return cast(torch.Size, self.base.shape)

    def _transpose_nonbatch(self) -> BaseLinearOperator:
        return ScaledLinearOperator(self.base._transpose_nonbatch(), self.constant, info=self.info)

    def _apply(self, v: Tensor) -> Tensor:
        return self.constant * self.base._apply(v)

    def _solve_columns(self, v: Tensor, krylov: Krylov) -> Tensor:
        x0 = None if krylov.x0 is None else krylov.x0 * self.constant
        inner = Krylov(krylov.tol, krylov.max_iter, None, x0, krylov.check)
        if krylov.preconditioner is not None:
            scaled = krylov.preconditioner._scale(self.constant.reciprocal())
            inner = Krylov(krylov.tol, krylov.max_iter, scaled, x0, krylov.check)
        return self.base._solve_any(v, inner) / self.constant

    def _scale(self, c: float | Tensor) -> BaseLinearOperator:
        return ScaledLinearOperator(self.base, self.constant * c, info=self.info)

    def _damp(self, damping: Damping, method: str) -> BaseLinearOperator:
        if self.base.iterates or damping.value.dim() > 0 or bool(self.constant == 0):
            return super()._damp(damping, method)
        inner = Damping(damping.value / self.constant)  # c (A + d/c I)
        return self.base._damp(inner, method)._scale(self.constant)

    def _diagonal(self) -> Tensor:
        return self.constant * self.base._diagonal()

    def _trace(self) -> Tensor:
        return self.constant * self.base._trace()

    def _norm(self, ord: Any) -> Tensor:
        return self.constant.abs() * self.base._norm(ord)

    def _inverse(self) -> BaseLinearOperator:
        return self.base._inverse()._scale(self.constant.reciprocal())

    def _draw(self, n: int, generator: torch.Generator | None) -> Tensor:
        if bool(self.constant < 0):
            raise NotPositiveDefiniteError("sample: a negative multiple is no covariance")
        return self.constant.sqrt() * self.base._draw(n, generator)

    def _dense(self) -> Tensor:
        return self.constant * self.base._dense()

    def _restrict(self, names: tuple[str, ...]) -> BaseLinearOperator:
        return self.base._restrict(names)._scale(self.constant)


class ProductLinearOperator(LazyLinearOperator):
    """A B, not symmetric in general.

    Args:
        left: A.
        right: B.
        info: what is known besides the numbers.
    """

    def __init__(
        self, left: BaseLinearOperator, right: BaseLinearOperator, *, info: Info | None = None
    ) -> None:
        super().__init__(left, right, info=info)
        self.left, self.right = left, right

    # each factor's own solve is differentiable; the product is not symmetric
    _implicit_in_tensors = False
    _implicit_in_vector = False

    @property
    def maps_to_parameters(self) -> bool:  # type: ignore[override]
        return self.left.maps_to_parameters

    def _size(self) -> torch.Size:
        batch = torch.broadcast_shapes(self.left.batch_shape, self.right.batch_shape)
        return torch.Size((*batch, self.left.shape[-2], self.right.shape[-1]))

    def _transpose_nonbatch(self) -> BaseLinearOperator:
        return ProductLinearOperator(
            self.right._transpose_nonbatch(), self.left._transpose_nonbatch(), info=self.info
        )

    def _apply(self, v: Tensor) -> Tensor:
        return self.left._apply(self.right._apply(v))

    def _solve_columns(self, v: Tensor, krylov: Krylov) -> Tensor:
        if not (self.left.is_square and self.right.is_square):
            raise self._unsupported("solve")
        if krylov.preconditioner is not None or krylov.x0 is not None:
            raise SpaceMismatchError(
                "a product is solved factor by factor: it takes no preconditioner= and no x0="
            )
        return self.right._solve_any(self.left._solve_any(v, krylov), krylov)

    def _damp(self, damping: Damping, method: str) -> BaseLinearOperator:
        raise self._unsupported("damped")

    def _logdet(self) -> Tensor:
        if not (self.left.is_square and self.right.is_square):
            raise self._unsupported("logdet")
        return self.left._logdet() + self.right._logdet()

    def _diagonal(self) -> Tensor:
        left, right = self.left, self.right
        for one, other in ((left, right), (right, left)):
            if isinstance(one, DiagonalLinearOperator):
                return one.diag * other._diagonal()
        return super()._diagonal()

    def _inverse(self) -> BaseLinearOperator:
        inverses = (self.right._inverse(), self.left._inverse())
        return ProductLinearOperator(*inverses, info=self.info)

    def _dense(self) -> Tensor:
        return self.left._apply(self.right._dense())


def add_diagonal_lazily(operator: BaseLinearOperator, d: Tensor) -> BaseLinearOperator:
    """A + d I or A + diag(d) as a sum, whose diagonal terms are one."""
    info = operator.info.plain()
    diagonal = DiagonalLinearOperator(d.expand(operator.shape[-1]), info=info)
    if not isinstance(operator, SumLinearOperator):
        return SumLinearOperator(operator, diagonal, info=info)
    terms = list(operator.terms)
    for k, term in enumerate(terms):
        if isinstance(term, DiagonalLinearOperator):
            terms[k] = DiagonalLinearOperator(term.diag + diagonal.diag, info=info)
            return SumLinearOperator(*terms, info=info)
    return SumLinearOperator(*terms, diagonal, info=info)


def product_chunks(operator: BaseLinearOperator) -> Any:
    """The matrix, some columns at a time, by products with the identity's."""
    require_products(operator, "the matrix")
    n = operator.shape[-1]
    step = max(1, _CHUNK_BYTES // max(1, n * torch.finfo(operator.dtype).bits // 8))
    for start in range(0, n, step):
        width = min(step, n - start)
        unit = torch.zeros(n, width, dtype=operator.dtype, device=operator.device)
        unit[start : start + width].fill_diagonal_(1)
        yield operator._apply(unit)


def diagonal_by_products(operator: BaseLinearOperator) -> Tensor:
    """The diagonal from products with the columns of the identity: exact, n products."""
    parts, start = [], 0
    for chunk in product_chunks(operator):
        width = chunk.shape[-1]
        parts.append(chunk[..., start : start + width, :].diagonal(dim1=-2, dim2=-1))
        start += width
    return torch.cat(parts, -1)


def _constant(operator: BaseLinearOperator, c: float | Tensor) -> Tensor:
    if isinstance(c, Tensor):
        return c.to(device=operator.device, dtype=operator.dtype)
    return torch.full((), c, dtype=operator.dtype, device=operator.device)
