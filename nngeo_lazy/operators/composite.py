"""Sums, multiples and products that stay what they are, and keep every member."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from ..errors import NotPositiveDefiniteError, SpaceMismatchError, UnsupportedLayerError
from . import rules
from .base import BaseLinearOperator, Krylov, flat_positions
from .damping import Damping
from .diagonal import DiagonalLinearOperator
from .info import Info
from .lazy import LazyLinearOperator

__all__ = [
    "ProductLinearOperator",
    "ScaledLinearOperator",
    "SumLinearOperator",
    "add_diagonal_lazily",
]


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
        """Whether a solve with the base is an iteration."""
        return self.base.iterates

    @property
    def is_explicit(self) -> bool:
        """Whether the base's entries are known without products."""
        return self.base.is_explicit

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
        return self.base._solve(v, krylov=inner) / self.constant

    def _scale(self, c: float | Tensor) -> BaseLinearOperator:
        return ScaledLinearOperator(self.base, self.constant * c, info=self.info)

    def _damp(self, damping: Damping, method: str) -> BaseLinearOperator:
        if self.base.iterates or damping.value.dim() > 0 or bool(self.constant == 0):
            return super()._damp(damping, method)
        value = damping.value / self.constant  # c (A + d/c I)
        inner = replace(damping, value=value, constants=())
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
    def known_symmetric(self) -> bool:
        """A B of symmetric matrices is not."""
        return False

    @property
    def maps_to_parameters(self) -> bool:  # type: ignore[override]
        """Whether the left factor maps to parameters."""
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
        try:
            return self.right._solve(self.left._solve(v, krylov=krylov), krylov=krylov)
        except (NotPositiveDefiniteError, UnsupportedLayerError) as error:
            # A A of an indefinite factor may be definite, and A^T A of one that is not symmetric
            ours = type(error)(f"of a product's factors: {error}")
        if torch.is_grad_enabled() and (v.requires_grad or self.requires_grad):
            raise ours
        try:
            return super()._solve_columns(v, krylov)
        except UnsupportedLayerError:  # it is not symmetric
            raise ours from None

    def _logdet(self) -> Tensor:
        if not (self.left.is_square and self.right.is_square):
            raise self._unsupported("logdet")
        try:
            return self.left._logdet() + self.right._logdet()
        except NotPositiveDefiniteError as error:
            try:  # (-A) (-B) is A B
                return self.left._scale(-1.0)._logdet() + self.right._scale(-1.0)._logdet()
            except NotPositiveDefiniteError:
                raise NotPositiveDefiniteError(f"of a product's factors: {error}") from None

    def _diagonal(self) -> Tensor:
        left, right = self.left, self.right
        for one, other in ((left, right), (right, left)):
            if isinstance(one, DiagonalLinearOperator):
                return one.diag * other._diagonal()
        return super()._diagonal()

    def _inverse(self) -> BaseLinearOperator:
        if self.left.iterates or self.right.iterates:
            return super()._inverse()  # whose solve looks at the product, not at its factors alone
        inverses = (self.right._inverse(), self.left._inverse())
        return ProductLinearOperator(*inverses, info=self.info)

    def _dense(self) -> Tensor:
        return self.left._apply(self.right._dense())


@rules.sums.register(BaseLinearOperator, BaseLinearOperator)
def _(A: BaseLinearOperator, B: BaseLinearOperator, info: Info) -> BaseLinearOperator:
    return SumLinearOperator.of(A, B, info=info)


@rules.products.register(BaseLinearOperator, BaseLinearOperator)
def _(A: BaseLinearOperator, B: BaseLinearOperator, info: Info) -> BaseLinearOperator:
    return ProductLinearOperator(A, B, info=info)


@rules.hadamard.register(BaseLinearOperator, BaseLinearOperator)
def _(A: BaseLinearOperator, B: BaseLinearOperator, info: Info) -> BaseLinearOperator:
    # products of roots, as linear_operator has them, are as large, and need definite factors
    product: BaseLinearOperator = rules.as_operator(A.to_dense() * B.to_dense())
    known: BaseLinearOperator = product._with(info=info)
    return known


@rules.plus_diagonal.register(BaseLinearOperator)
def add_diagonal_lazily(operator: BaseLinearOperator, d: Tensor) -> BaseLinearOperator:
    """A + d I or A + diag(d) as a sum, whose diagonal terms are one."""
    info = operator.info
    diagonal = DiagonalLinearOperator(d.expand(operator.shape[-1]), info=info)
    if not isinstance(operator, SumLinearOperator):
        return SumLinearOperator(operator, diagonal, info=info)
    terms = list(operator.terms)
    for k, term in enumerate(terms):
        if isinstance(term, DiagonalLinearOperator):
            terms[k] = DiagonalLinearOperator(term.diag + diagonal.diag, info=info)
            return SumLinearOperator(*terms, info=info)
    return SumLinearOperator(*terms, diagonal, info=info)


@rules.multiples.register(BaseLinearOperator)
def _(A: BaseLinearOperator, c: float | Tensor) -> BaseLinearOperator:
    if not isinstance(c, Tensor):
        c = torch.full((), c, dtype=A.dtype, device=A.device)
    return ScaledLinearOperator(A, c.to(device=A.device, dtype=A.dtype), info=A.info)
