"""The largest singular triplets of a rectangular matrix: thick-restart Golub-Kahan on closures."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from .krylov import Matvec, default_tolerance, norms
from .products import Products
from .subspace import Search, orthogonalised, orthonormal, random_block, rounding_of

__all__ = ["Triplets", "svds"]


@dataclass(frozen=True)
class Triplets:
    """What an iteration found.

    Attributes:
        left: orthonormal left singular vectors (m, k).
        values: singular values (k,), ascending.
        right: orthonormal right singular vectors (n, k).
        residuals: (|A v - s u|^2 + |A^T u - s v|^2)^(1/2) (k,), from further products; after an
            interrupt, as estimated by the iteration.
        matvecs: how many products with A and A^T were made.
        converged: whether all residuals are within the tolerance.
        interrupted: whether the user stopped it.

    Example:
        >>> import torch
        >>> A = torch.diag(torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64))
        >>> like, options = A.new_empty(0), Search(seed=0)
        >>> found = svds(lambda v: A @ v, lambda u: A @ u, (3, 3), 1, like, options)
        >>> isinstance(found, Triplets), found.left.shape
        (True, torch.Size([3, 1]))
    """

    left: Tensor
    values: Tensor
    right: Tensor
    residuals: Tensor
    matvecs: int
    converged: bool
    interrupted: bool = False


def svds(
    matvec: Matvec,
    rmatvec: Matvec,
    shape: tuple[int, int],
    k: int,
    like: Tensor,
    options: Search,
) -> Triplets:
    """The k largest singular values of A (m, n), and their vectors.

    This is Golub-Kahan bidiagonalisation with full reorthogonalisation of both sides, restarted
    with its best Ritz vectors. It does not square A, so that small values keep their digits.

    Args:
        matvec: v (n, b) to A v.
        rmatvec: u (m, b) to A^T u.
        shape: (m, n).
        k: how many, from 1 to the smaller side.
        like: an empty tensor of A's dtype and device.
        options: the tolerance is a multiple of the largest singular value, the subspace is held on
            each side, and the start has right vectors.

    Returns:
        The triplets, ascending, with their residuals.

    Raises:
        ValueError: k is outside 1 to the smaller side, the subspace does not hold k + 2 vectors, or
            the products are not those of A and A^T.
        NonFiniteError: NaN or infinity in a product.

    Example:
        >>> import torch
        >>> A = torch.diag(torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64))
        >>> svds(lambda v: A @ v, lambda u: A @ u, (3, 3), 1, A.new_empty(0), Search(seed=0)).values
        tensor([5.0000], dtype=torch.float64)

    Source: Baglama and Reichel (2005), Augmented implicitly restarted Lanczos bidiagonalization
        methods.
    """
    m, n = shape
    side = min(m, n)
    if not 1 <= k <= side:
        raise ValueError(f"expected k from 1 to {side}, the smaller side of {m} x {n}, got {k}")
    subspace = max(2 * k, k + 30) if options.subspace is None else options.subspace
    if subspace < min(k + 2, side):
        raise ValueError(f"expected a subspace of at least k + 2 = {k + 2} vectors, got {subspace}")
    start = options.start
    if start is not None and start.dim() == 2:
        start = (start / torch.linalg.vector_norm(start, dim=0)).sum(1)
    generator = options.generator(like.device)
    with Products(matvec, "svds", progress=options.progress) as products:
        if m < n:  # the recurrence ends by itself on the smaller side
            first = None if start is None else products(start.unsqueeze(1))
            run = _GolubKahan(products, rmatvec, matvec, (n, m), min(subspace, side), generator)
        else:
            first = None if start is None else start.unsqueeze(1)
            run = _GolubKahan(products, matvec, rmatvec, (m, n), min(subspace, side), generator)
        run.begin(like, first)
        tol = default_tolerance(like.dtype) if options.tol is None else options.tol
        most = max(20 * side, 1000) if options.max_matvecs is None else options.max_matvecs
        interrupted = False
        try:
            run.until_converged(k, tol, most)
        except KeyboardInterrupt:
            if run.size == 0 or not run.whole:
                raise
            interrupted = True
        found = run.result(k, interrupted, tol)
    return replace(found, left=found.right, right=found.left) if m < n else found


class _GolubKahan:
    """A V = U B and A^T U = V B^T + q g^T with orthonormal U and (V, q), for m >= n."""

    def __init__(
        self,
        products: Products,
        matvec: Matvec,
        rmatvec: Matvec,
        shape: tuple[int, int],
        capacity: int,
        generator: torch.Generator | None,
    ) -> None:
        self._products, self._matvec, self._rmatvec = products, matvec, rmatvec
        self._shape, self._capacity, self._generator = shape, capacity, generator
        self._B = torch.zeros(capacity, capacity, dtype=torch.float64, device="cpu")
        # one assignment, since an interrupt must not come between size, q and g
        self._now = (
            0,
            torch.empty(0, device="cpu"),
            torch.zeros(0, dtype=torch.float64, device="cpu"),
        )
        self.whole = True  # whether U, V and B belong to this size
        self.norm = 0.0
        self._floor = 0.0  # what is all rounding, if the two products seem not to fit

    @property
    def size(self) -> int:
        """How many vectors there are on each side."""
        return self._now[0]

    @property
    def _q(self) -> Tensor:
        return self._now[1]

    @property
    def _g(self) -> Tensor:
        return self._now[2]

    def begin(self, like: Tensor, start: Tensor | None) -> None:
        """Begin with a vector (n, 1), or a random one."""
        (m, n), capacity = self._shape, self._capacity
        self._U, self._V = like.new_empty(capacity, m), like.new_empty(capacity, n)
        if start is None:
            start = random_block(n, 1, like, self._generator)
        size = float(norms(start))
        if not 0 < size < float("inf"):
            raise ValueError("expected start to have finite columns, not zero")
        self._now = 0, start / size, self._g

    def until_converged(self, k: int, tol: float, most: int) -> None:
        """Expand and restart until k triplets have converged, or `most` products were made."""
        while True:
            self._expand()
            full = self.size == self._capacity
            if self.size < k or not (full or self.size % 3 == 0):
                continue
            left, values, right = self._small()
            estimates = (self._g @ left).abs()
            done = estimates <= max(tol * float(values[0]), self._floor)
            if bool(done[:k].all()) or self._products.count >= most:
                return
            if full:
                if self.size == self._V.shape[1]:
                    return
                kept = k + max(int(done.sum()), (self._capacity - k) // 3)
                self._restart(left, values, right, min(kept, self._capacity - 2))

    def result(self, k: int, interrupted: bool, tol: float) -> Triplets:
        """The k largest triplets so far, ascending. Their residuals take two more products each."""
        left, values, right = self._small()
        k = min(k, self.size)
        u = self._U[: self.size].mT @ left[:, :k].flip(1).to(self._U)
        v = self._V[: self.size].mT @ right[:, :k].flip(1).to(self._V)
        s = values[:k].flip(0).to(u)
        if interrupted:
            residuals = (self._g @ left)[:k].abs().flip(0).to(u)
        else:
            forth = self._products.through(self._matvec, v) - u * s
            back = self._products.through(self._rmatvec, u) - v * s
            residuals = torch.hypot(norms(forth), norms(back)).squeeze(0)
        eps = torch.finfo(u.dtype).eps
        limit = max(max(tol, 10 * eps) * float(s[-1]), self._floor)
        converged = not interrupted and bool((residuals <= limit).all())
        return Triplets(u, s, v, residuals, self._products.count, converged, interrupted)

    def _small(self) -> tuple[Tensor, Tensor, Tensor]:
        left, values, right = torch.linalg.svd(self._B[: self.size, : self.size])
        return left, values, right.mT

    def _expand(self) -> None:
        j = self.size
        self._V[j] = self._q.squeeze(1)
        u, inside = orthogonalised(self._products.through(self._matvec, self._q), self._U[:j].mT)
        self._require_adjoint(inside.squeeze(1))
        u, alpha = self._unit(u, self._U[:j].mT)
        self._U[j] = u.squeeze(1)
        self._B[:j, j] = self._g
        self._B[j, j] = alpha
        w, inside = orthogonalised(self._products.through(self._rmatvec, u), self._V[: j + 1].mT)
        q, g = self._q, torch.zeros(j + 1, dtype=torch.float64, device="cpu")
        if j + 1 < self._shape[1]:
            q, g[j] = self._unit(w, self._V[: j + 1].mT)
        self._now = j + 1, q, g

    def _unit(self, w: Tensor, basis: Tensor) -> tuple[Tensor, float]:
        """A unit vector orthogonal to the basis, and how long w was; random after a breakdown."""
        size = float(norms(w))
        self.norm = max(self.norm, size)
        if size > max(10 * torch.finfo(w.dtype).eps * self.norm, self._floor):
            return w / size, size
        fresh = random_block(len(w), 1, w, self._generator)
        fresh = orthonormal(orthogonalised(fresh, basis)[0])
        return orthonormal(orthogonalised(fresh, basis)[0]), 0.0

    def _require_adjoint(self, inside: Tensor) -> None:
        expected = self._g.to(inside)
        self.norm = max([self.norm, *inside.abs().tolist()])
        error = float((inside - expected).abs().max()) if len(inside) else 0.0
        if error <= (1e-6 if inside.dtype == torch.float64 else 1e-2) * self.norm:
            return
        if self._floor == 0:
            sides = (self._matvec, self._shape[1]), (self._rmatvec, self._shape[0])
            self._floor = max(
                rounding_of(partial(self._products.through, side), n, inside) for side, n in sides
            )
        if error > self._floor:
            raise ValueError(
                f"svds needs products with A and with its transpose: here u.(A v) and (A^T u).v "
                f"differ by {error:.2g}, with |A| = {self.norm:.2g}: correct one of the products"
            )

    def _restart(self, left: Tensor, values: Tensor, right: Tensor, kept: int) -> None:
        U = left[:, :kept].mT.to(self._U) @ self._U[: self.size]
        V = right[:, :kept].mT.to(self._V) @ self._V[: self.size]
        self.whole = False
        self._U[:kept], self._V[:kept] = U, V
        self._B.zero_()
        self._B[:kept, :kept].diagonal().copy_(values[:kept])
        self._now = kept, self._q, self._g @ left[:, :kept]
        self.whole = True
