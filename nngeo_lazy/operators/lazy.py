"""Matrices that are known by their products: what follows from products alone."""

from __future__ import annotations

from contextlib import AbstractContextManager
from math import pi, sqrt
from typing import Any

import torch
from linear_operator.operators import RootLinearOperator
from torch import Tensor

from .. import linalg
from ..errors import EstimateWarning, TooLargeError, UnsupportedLayerError
from ..linalg.estimates import MIN_STEPS, QUADRATURES
from ..switches import holding, setting, untraced
from . import rules
from .base import BaseLinearOperator, Krylov, flat_positions
from .damping import Damping
from .info import Info
from .primitives import seeded, tensors_of, wants_roots
from .vectors import flattened
from .warn import warn, warn_of_estimate, warn_unless_converged, warn_unless_resolved

__all__ = ["LazyLinearOperator", "closed_forms_only", "require_products", "require_symmetric"]

_CHECKS = 10  # random vectors that a root is compared on: it may pass with a chance of 1e-10
_CHUNK_BYTES = 2**26  # of identity columns at a time, if only products are known
_CLOSED_ONLY = setting("closed_forms_only", False)


def closed_forms_only() -> AbstractContextManager[None]:
    """Within it, a number that no structure knows raises UnsupportedLayerError.

    However an operator is composed, it then either answers at the price of its structure, or says
    that n products or an estimate would be needed.
    """
    return holding(_CLOSED_ONLY, True)


def require_products(operator: BaseLinearOperator, what: str) -> None:
    """Raise if only closed forms are wanted."""
    if _CLOSED_ONLY.get():
        raise UnsupportedLayerError(f"{what} of {type(operator).__name__} has no closed form")


def require_symmetric(operator: BaseLinearOperator, like: Tensor) -> None:
    """Raise if products show that it is not symmetric: conjugate gradients would end anywhere."""
    if operator.known_symmetric or operator.dim() != 2:
        return
    try:
        linalg.require_symmetric_products(operator._apply, operator.shape[-1], like, "solve")
    except ValueError as error:
        raise UnsupportedLayerError(str(error)) from None


class LazyLinearOperator(BaseLinearOperator):
    """A matrix that is known by its products; a subclass may know more.

    Its solve is conjugate gradients, differentiated implicitly. What has no closed form raises and
    says what has one. Numbers are exact: if nothing better is known, from products with the
    columns of the identity, a bounded number at a time.
    """

    _implicit_in_tensors = True
    _implicit_in_vector = True

    _solve = untraced(BaseLinearOperator._solve)

    def _solve_columns(self, v: Tensor, krylov: Krylov) -> Tensor:
        b, back = flattened(v)
        require_symmetric(self, b)
        x0 = None if krylov.x0 is None else flattened(krylov.x0.expand(v.shape))[0]
        precondition = None
        if krylov.preconditioner is not None:
            chosen = krylov.preconditioner

            def precondition(r: Tensor) -> Tensor:
                return chosen._solve(r, krylov=Krylov(check=False))

        found = linalg.cg(
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
        damped: BaseLinearOperator = rules.plus_diagonal(self, damping.value)
        return damped

    def _scale(self, c: float | Tensor) -> BaseLinearOperator:
        scaled: BaseLinearOperator = rules.multiples(self, c)
        return scaled

    def _diagonal(self) -> Tensor:
        return diagonal_by_products(self)

    def _trace(self) -> Tensor:
        return self._diagonal().sum()

    def _logdet(self) -> Tensor:
        return estimated_logdet(self)

    def _norm(self, ord: Any) -> Tensor:
        if ord == "fro":
            return torch.stack([part.square().sum() for part in product_chunks(self)]).sum().sqrt()
        if ord == 2:
            return spectral_norm(self)
        raise self._unsupported(f"norm({ord!r})")

    def _inverse(self) -> BaseLinearOperator:
        inverse: BaseLinearOperator = rules.inverses(self)
        return inverse

    def _power(self, p: float) -> BaseLinearOperator:
        if p == 1:
            return self
        if p == -1:
            return self._inverse()
        if wants_roots():
            return root_by_products(self, p)
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
        restricted: BaseLinearOperator = rules.selections(self, index, None, info)
        return restricted

    def _kind(self) -> str:
        inner = ", ".join(a._kind() for a in self._args if isinstance(a, BaseLinearOperator))
        return f"{type(self).__name__.removesuffix('LinearOperator').lower()} ({inner})"


def product_chunks(operator: BaseLinearOperator) -> Any:
    """The matrix, some columns at a time, by products with the identity's."""
    require_products(operator, "the matrix")
    n = operator.shape[-1]
    if n == 0:
        yield torch.zeros(operator.shape, dtype=operator.dtype, device=operator.device)
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


def estimated_logdet(operator: BaseLinearOperator) -> Tensor:
    """The log-determinant of an operator that is known by its products, with a warning.

    Its gradient is the estimate of tr A^-1 dA with random signs z, z.A^-1 dA z. A matrix that is
    smaller than the vectors which an estimate holds is multiplied out instead, and exact.
    """
    require_products(operator, "logdet")
    n = operator.shape[-1]
    if not operator.is_square or operator.dim() != 2:
        raise operator._unsupported("logdet")
    if n <= QUADRATURES * MIN_STEPS:
        dense = operator._dense()
        if float((dense - dense.mT).detach().norm()) > 1e-3 * float(dense.detach().norm()):
            raise operator._unsupported("logdet")  # not symmetric
        exact: Tensor = rules.as_operator(dense)._logdet()
        return exact
    like = torch.empty(0, dtype=operator.dtype, device=operator.device)
    with torch.no_grad():
        found = linalg.quadrature_trace(
            operator._apply, torch.log, n, like, linalg.Probes(), what="logdet"
        )
    warn_of_estimate(found, "logdet", None)
    warn(
        EstimateWarning(
            f"logdet is an estimate: {float(found):.6g}, standard error "
            f"{float(found.standard_error):.2g}, from {found.matvecs} products; "
            "ng.logdet(F, tol=..., seed=...) says how good it is to be",
            found,
        )
    )
    if not (torch.is_grad_enabled() and operator.requires_grad):
        return found.value
    z = linalg.signs(n, found.probes, like, None)
    with torch.no_grad():
        x = operator._solve(z)
    slope = (x * operator._apply(z)).sum(0).mean()
    return found.value + slope - slope.detach()


def spectral_norm(operator: BaseLinearOperator) -> Tensor:
    """The largest singular value from products alone: u.A v."""
    transposed = operator._transpose_nonbatch()
    with torch.no_grad():
        found = linalg.svds(
            operator._apply,
            transposed._apply,
            (operator.shape[-2], operator.shape[-1]),
            1,
            torch.empty(0, dtype=operator.dtype, device=operator.device),
            linalg.Search(),
        )
    warn_unless_resolved("the spectral norm", found)
    if not (torch.is_grad_enabled() and operator.requires_grad):
        return found.values[0]
    return (found.left * operator._apply(found.right)).sum()


def root_by_products(operator: BaseLinearOperator, p: float) -> BaseLinearOperator:
    """A^1/2 or A^-1/2 of a symmetric matrix that is known by its products.

    A large matrix of low rank has a root of that rank. It is found with more and more random
    directions, until ten other random vectors show that R R^T is A. All else is multiplied out.

    Args:
        operator: A.
        p: 0.5 or -0.5.

    Raises:
        TooLargeError: A is too large to be multiplied out, and has no root of a low rank.
        NotPositiveDefiniteError: A has a negative eigenvalue, or p is negative and it is singular.
        UnsupportedLayerError: A is not symmetric.

    Source: Halko, Martinsson and Tropp (2011), Finding structure with randomness, lemma 4.1.
    """
    require_products(operator, f"power({p:g})")
    operator._require_square("a root")
    like = torch.empty(0, dtype=operator.dtype, device=operator.device)
    require_symmetric(operator, like)
    if p > 0 and operator.dim() == 2:
        taped = torch.is_grad_enabled() and any(t.requires_grad for t in tensors_of(operator))
        low = None if taped else low_rank_root(operator, like)
        if low is not None:
            return low
    try:
        dense = operator.to_dense()
    except TooLargeError as error:
        raise TooLargeError(
            f"a root of a matrix of this size is not made ({error}). Take F.sample(n) for draws, "
            "ng.matrix_function(F, torch.rsqrt, v) for F^-1/2 v, or the root of ng.low_rank(F, k)"
        ) from None
    root: BaseLinearOperator = rules.as_operator(dense)._power(p)
    return root


@torch.no_grad()
def low_rank_root(operator: BaseLinearOperator, like: Tensor) -> BaseLinearOperator | None:
    """A^1/2 of a rank up to n / 8, compared with A; None if it would not be A."""
    n, rank = operator.shape[-1], 2 * _CHECKS
    if rank > n // 8:
        return None
    generator = seeded(0, like.device)  # not the caller's random numbers
    probes = torch.randn(n, _CHECKS, dtype=like.dtype, device=like.device, generator=generator)
    truth = operator._apply(probes)
    size = torch.linalg.matrix_norm(truth) / sqrt(_CHECKS)  # about the Frobenius norm of A
    limit = 100 * linalg.default_tolerance(like.dtype) * size
    while rank <= n // 8:
        basis, _ = linalg.nystrom(
            operator._apply, n, rank, dtype=like.dtype, device=like.device, generator=generator
        )
        core = basis.mT @ operator._apply(basis)  # more digits than the sketch's own values have
        values, small = torch.linalg.eigh((core + core.mT) / 2)
        vectors, values = basis @ small[:, values > 0], values[values > 0]
        off = truth - (vectors * values) @ (vectors.mT @ probes)
        bound = 10 * sqrt(2 / pi) * torch.linalg.vector_norm(off, dim=0).max()  # of |A - R R^T|
        if bound <= limit and len(values):
            fourth = RootLinearOperator(vectors * values.pow(0.25))
            root: BaseLinearOperator = rules.as_operator(fourth)
            return root
        rank *= 4
    return None
