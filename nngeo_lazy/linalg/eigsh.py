"""Eigenpairs at the ends of a symmetric spectrum: thick-restart block Lanczos on closures."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import wrong_option
from .krylov import Matvec, default_tolerance
from .products import Products
from .subspace import (
    Search,
    inner,
    orthogonalised,
    orthonormal,
    random_block,
    require_symmetric,
    rounding_of,
)

__all__ = ["ENDS", "Eigenpairs", "eigsh", "wanted"]

ENDS = ("LA", "SA", "LM", "BE")


@dataclass(frozen=True)
class Eigenpairs:
    """What an iteration found.

    Attributes:
        values: eigenvalues (k,), ascending.
        vectors: orthonormal eigenvectors (n, k).
        residuals: |A v - value v| (k,), from the products of the iteration; if these are not
            symmetric to within the tolerance, from further products.
        matvecs: how many products with A were made.
        converged: whether all residuals are within the tolerance.
        interrupted: whether the user stopped it.

    Example:
        >>> import torch
        >>> A = torch.diag(torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64))
        >>> found = eigsh(lambda v: A @ v, 3, 1, "LA", A.new_empty(0), Search(seed=0))
        >>> isinstance(found, Eigenpairs), found.vectors.shape, found.converged
        (True, torch.Size([3, 1]), True)
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    matvecs: int
    converged: bool
    interrupted: bool = False


def wanted(values: Tensor, k: int, which: str) -> Tensor:
    """Positions of the k wanted among ascending values, ascending."""
    n = len(values)
    k = min(k, n)
    if which == "SA":
        return torch.arange(k, device="cpu")
    if which == "LA":
        return torch.arange(n - k, n, device="cpu")
    if which == "LM":
        return values.abs().argsort(stable=True)[n - k :].sort().values
    high = (k + 1) // 2  # one more at the upper end, as scipy has it
    return torch.cat(
        [torch.arange(k - high, device="cpu"), torch.arange(n - high, n, device="cpu")]
    )


def eigsh(
    matvec: Matvec,
    n: int,
    k: int,
    which: str,
    like: Tensor,
    options: Search,
    *,
    block_size: int = 1,
) -> Eigenpairs:
    """The k eigenpairs at an end of the spectrum of a symmetric A, with eigenvalues of any sign.

    This is block Lanczos with full reorthogonalisation. A full subspace is restarted with its best
    Ritz vectors (a thick restart, equal to an implicit restart with exact shifts). A breakdown is
    an invariant subspace: it is kept, and the iteration continues in its complement, so that all k
    pairs of a matrix of low rank are found. Blocks of b vectors find a repeated eigenvalue up to b
    times.

    Args:
        matvec: v (n, b) to A v (n, b).
        n: the size of A.
        k: how many, from 1 to n.
        which: "LA" largest, "SA" smallest, "LM" largest magnitude, "BE" half from each end.
        like: an empty tensor of A's dtype and device.
        options: the tolerance is of |A v - value v|, as a multiple of |value| or of |A| / 1000,
            whichever is larger; it is not below rounding, 10 eps |A|.
        block_size: how many vectors each product has.

    Returns:
        The eigenpairs, ascending, with their residuals.

    Raises:
        ValueError: k is outside 1 to n, the subspace does not hold k vectors and two blocks, or the
            matrix is not symmetric.
        NonFiniteError: NaN or infinity in a product.

    Example:
        >>> import torch
        >>> A = torch.diag(torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64))
        >>> eigsh(lambda v: A @ v, 3, 2, "LA", A.new_empty(0), Search(seed=0)).values
        tensor([2., 5.], dtype=torch.float64)

    Source:
        Wu and Simon (2000), Thick-restart Lanczos method for large symmetric eigenvalue problems;
        Grimes, Lewis and Simon (1994) for blocks.
    """
    if not 1 <= k <= n:
        raise ValueError(f"expected k from 1 to {n}, the size of the matrix, got {k}")
    if which not in ENDS:
        raise ValueError(wrong_option("which", which, ENDS, "spectra"))
    if not 1 <= block_size <= n:
        raise ValueError(f"expected a block_size from 1 to {n}, got {block_size}")
    subspace = options.subspace
    if subspace is None:
        subspace = max(2 * k, k + 30) + 2 * block_size
    if subspace < min(k + 2 * block_size, n):
        raise ValueError(
            f"expected a subspace of at least k + 2 block_size = {k + 2 * block_size} vectors, got "
            f"{subspace}"
        )
    tol = default_tolerance(like.dtype) if options.tol is None else options.tol
    most = max(10 * n, 1000) if options.max_matvecs is None else options.max_matvecs
    generator = options.generator(like.device)
    with Products(matvec, "eigsh", progress=options.progress) as products:
        block = random_block(n, block_size, like, generator)
        run = _Lanczos(products, block, min(subspace, n), generator)
        if options.start is not None:
            run.start_from(options.start)
        interrupted = False
        try:
            run.until_converged(k, which, tol, most)
        except KeyboardInterrupt:
            if run.size == 0 or not run.whole:
                raise
            interrupted = True
        values, small, estimates = run.ritz()
        chosen = wanted(values, k, which)
        vectors = run.combined(small[:, chosen])
        values = values[chosen].to(vectors)
        residuals = estimates[chosen].to(vectors)
        target = run.target(values, tol)
        if not interrupted and run.asymmetry > float(target.min()):
            residuals = torch.linalg.vector_norm(products(vectors) - vectors * values, dim=0)
        converged = not interrupted and bool((residuals <= target).all())
    return Eigenpairs(values, vectors, residuals, products.count, converged, interrupted)


class _Lanczos:
    """A V = V H + Q B + E with orthonormal (V, Q): V is the basis, Q the next block.

    H is made symmetric, and E is the difference. It is of the size of rounding if the products are
    those of one symmetric matrix. Only its norm is known.
    """

    def __init__(
        self,
        products: Products,
        block: Tensor,
        capacity: int,
        generator: torch.Generator | None,
    ) -> None:
        self._products, self._generator = products, generator
        self._V = torch.empty(capacity, len(block), dtype=block.dtype, device=block.device)
        self._H = torch.zeros(capacity, capacity, dtype=torch.float64, device="cpu")
        # one assignment, since an interrupt must not come between size, Q and B
        self._now = (
            0,
            orthonormal(block),
            torch.zeros(block.shape[1], 0, dtype=torch.float64, device="cpu"),
        )
        self.whole = True  # whether V and H belong to this size
        self.norm = 0.0  # a lower bound of the norm of A
        self.asymmetry = 0.0  # |E|
        self._floor: float | None = None  # what is all rounding, once it is asked for

    @property
    def size(self) -> int:
        """How many vectors the basis holds."""
        return self._now[0]

    @property
    def _Q(self) -> Tensor:
        return self._now[1]

    @property
    def _B(self) -> Tensor:
        return self._now[2]

    @property
    def capacity(self) -> int:
        """How many vectors the basis holds at most."""
        return len(self._V)

    def start_from(self, start: Tensor) -> None:
        """Begin with vectors (n, j), added up to as many as a block has."""
        b = self._Q.shape[1]
        folded = self._Q * 0
        for j, column in enumerate((start / torch.linalg.vector_norm(start, dim=0)).unbind(1)):
            folded[:, j % b] += column
        if bool(folded.isfinite().all()) and orthonormal(folded).shape[1] == b:
            self._now = self.size, orthonormal(folded), self._B
        else:
            raise ValueError("expected start to have finite columns that are independent, not zero")

    def until_converged(self, k: int, which: str, tol: float, most: int) -> None:
        """Expand and restart until the wanted pairs are there, or so many products are done."""
        while True:
            self._expand()
            full = self.size + max(self._Q.shape[1], 1) > self.capacity
            if self.size < k:
                continue
            values, small, estimates = self.ritz()
            self.norm = max(self.norm, float(values.abs().max()))
            done = estimates <= self.target(values, tol)
            if bool(done[wanted(values, k, which)].all()) or self._products.count >= most:
                return
            if full:
                if self.size == self._V.shape[1]:
                    return
                kept = k + max(int(done.sum()), (self.capacity - k) // 3)
                kept = min(kept, self.capacity - 2 * self._Q.shape[1])
                self._restart(small[:, wanted(values, kept, which)], values, kept, which)

    def target(self, values: Tensor, tol: float) -> Tensor:
        """The residuals (k,) that count as converged."""
        rounding = 10 * torch.finfo(self._V.dtype).eps * self.norm
        rounding = max(rounding, self._floor or 0.0)
        return (tol * values.abs().clamp_min(1e-3 * self.norm)).clamp_min(rounding)

    def _rounding(self) -> float:
        """See `rounding_of`."""
        if self._floor is None:
            self._floor = rounding_of(self._products, self._V.shape[1], self._V)
        return self._floor

    def ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ritz values, ascending, vectors in the basis, and the residuals they should have."""
        values, small = torch.linalg.eigh(self._H[: self.size, : self.size])
        return values, small, torch.linalg.vector_norm(self._B @ small, dim=0)

    def combined(self, small: Tensor) -> Tensor:
        """Vectors (n, m) with these coefficients in the basis."""
        return self._V[: self.size].mT @ small.to(self._V)

    def _expand(self) -> None:
        Q, start = self._Q, self.size
        stop = start + Q.shape[1]
        W = self._products(Q)
        self._V[start:stop] = Q.mT
        basis = self._V[:stop].mT
        W, inside = orthogonalised(W, basis)
        inside = inside.double().cpu()
        coupling = self._B.mT
        self.norm = max(self.norm, float(inside.abs().max()))
        blocks = inside[:start], coupling, inside[start:]
        require_symmetric(*blocks, self.norm, W.dtype, "eigsh", self._rounding)
        off = torch.cat([inside[:start] - coupling, (inside[start:] - inside[start:].mT) / 2])
        self.asymmetry = math.hypot(self.asymmetry, float(torch.linalg.matrix_norm(off)))
        self._H[:start, start:stop] = coupling
        self._H[start:stop, :start] = coupling.mT
        self._H[start:stop, start:stop] = (inside[start:] + inside[start:].mT) / 2
        Q, R = self._next(W, basis)
        B = torch.zeros(Q.shape[1], stop, dtype=torch.float64, device="cpu")
        B[: len(R), start:] = R
        self._now = stop, Q, B

    def _next(self, W: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
        """The next block, and how W is made of it; after a breakdown some of it is random."""
        n, b = W.shape
        left, sizes, right = torch.linalg.svd(W, full_matrices=False)
        limit = 10 * torch.finfo(W.dtype).eps * max(self.norm, float(sizes[0]))
        rank = int((sizes > limit).sum())
        R = (sizes[:rank, None] * right[:rank]).double().cpu()
        room = n - basis.shape[1]
        Q = left[:, :rank]
        if rank and float(sizes[rank - 1]) < torch.finfo(W.dtype).eps ** 0.5 * self.norm:
            # what is left of W is near its rounding, which does not lie outside of the basis
            Q = orthonormal(orthogonalised(Q, basis)[0])
            Q = orthonormal(orthogonalised(Q, basis)[0])
            R = inner(Q, W).double().cpu()
        if rank < min(b, room):
            more = random_block(n, min(b, room) - rank, W, self._generator)
            whole = torch.cat([basis, Q], 1)
            fresh = orthonormal(orthogonalised(more, whole)[0])
            Q = torch.cat([Q, orthogonalised(fresh, whole)[0]], 1)
        return Q[:, :room], R[:room]

    def _restart(self, small: Tensor, values: Tensor, kept: int, which: str) -> None:
        vectors, B = self.combined(small).mT, self._B @ small
        self.whole = False
        self._V[:kept] = vectors
        self._H.zero_()
        self._H[:kept, :kept].diagonal().copy_(values[wanted(values, kept, which)])
        self._now = kept, self._Q, B
        self.whole = True
