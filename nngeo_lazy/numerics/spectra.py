"""Eigenvalues, singular values and densities of any linear operator."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import linalg
from ..errors import ConvergenceWarning, SpaceMismatchError, UnsupportedLayerError
from ..linalg import SpectralDensity
from ..linalg.eigsh import ENDS, wanted
from ..operators.base import BaseLinearOperator
from ..operators.convert import aslinearoperator
from ..operators.dense import MatrixLinearOperator
from ..operators.primitives import seeded
from ..operators.vectors import VectorLike, columns, flattened
from ..operators.warn import warn, warn_unless_resolved
from ..space import ParamSpace

__all__ = [
    "SingularValues",
    "Spectrum",
    "eigsh",
    "require_symmetric_operator",
    "spectral_density",
    "svds",
]


@dataclass(frozen=True)
class Spectrum:
    """Eigenpairs: unpacks as `eigenvalues, eigenvectors`.

    Attributes:
        eigenvalues: (k,), ascending.
        eigenvectors: (P, k), orthonormal columns.
        residuals: |A v - value v| of each pair (k,), from the products that were made; from further
            ones where these were not symmetric to within the tolerance.
        matvecs: how many products were made; 0 for a closed form.
        converged: whether all residuals are within the tolerance.
        space: the parameters that the eigenvectors are over, if any.
    """

    eigenvalues: Tensor
    eigenvectors: Tensor
    residuals: Tensor
    matvecs: int
    converged: bool
    space: ParamSpace | None = None

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.eigenvalues, self.eigenvectors))

    def by_name(self) -> dict[str, Tensor]:
        """The eigenvectors as {name: (k, *shape)}.

        Raises:
            SpaceMismatchError: the operator has no parameter space.
        """
        return _by_name(self.space, self.eigenvectors)


@dataclass(frozen=True)
class SingularValues:
    """Singular triplets: unpacks as `U, S, Vh`.

    Attributes:
        U: left vectors (m, k).
        S: singular values (k,), ascending, as of `scipy.sparse.linalg.svds`.
        Vh: right vectors as rows (k, n).
        residuals: (|A v - s u|^2 + |A^T u - s v|^2)^(1/2) of each (k,), from products of its own.
        matvecs: how many products with A and A^T were made; 0 for a closed form.
        converged: whether all residuals are within the tolerance.
        space: the parameters that the right vectors are over, if any.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    residuals: Tensor
    matvecs: int
    converged: bool
    space: ParamSpace | None = None

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.U, self.S, self.Vh))

    def by_name(self) -> dict[str, Tensor]:
        """The right vectors as {name: (k, *shape)}.

        Raises:
            SpaceMismatchError: the operator has no parameter space.
        """
        return _by_name(self.space, self.Vh.mT)


def eigsh(
    A: Any,
    k: int,
    which: str = "LA",
    *,
    tol: float | None = None,
    subspace: int | None = None,
    block_size: int = 1,
    start: VectorLike | None = None,
    max_matvecs: int | None = None,
    seed: int | None = None,
    progress: bool = False,
) -> Spectrum:
    """The k eigenvalues at an end of the spectrum of a symmetric operator, and their vectors.

    In closed form where the structure has one (dense, diagonal, Kronecker, low rank and blocks of
    these); else by thick-restart Lanczos with full reorthogonalisation, whose products are those of
    the operator. Negative eigenvalues are right. Where an eigenvalue is repeated, blocks of b
    vectors find it up to b times; a single vector, the default, meets it at least once. Without
    gradient. When it is interrupted (Ctrl-C) it returns what it has, with a warning.

    Args:
        A: a symmetric operator, a tensor, or whatever `aslinearoperator` takes.
        k: how many, from 1 to P.
        which: "LA" the largest, "SA" the smallest, "LM" of largest magnitude, "BE" half from each
            end.
        tol: residual |A v - value v| to reach, as a multiple of |value|, or of |A| / 1000 where
            that is larger, and not below rounding; by default 1e-6, in float64 1e-10.
        subspace: how many vectors are held; by default max(2 k, k + 30) and two blocks.
        block_size: how many vectors one product has.
        start: where to start: vectors (P,), (P, j) or a dict by name, such as earlier eigenvectors.
        max_matvecs: at most so many products; by default 10 P, at least 1,000.
        seed: of the start; by default from torch's global generator.
        progress: whether to show a bar.

    Returns:
        The pairs; where they have not converged, with a `ConvergenceWarning`.

    Raises:
        ValueError: k, which, subspace or block_size out of range, or a matrix that is not symmetric
            (which Lanczos sees as it goes).
        NonFiniteError: NaN in a product; says in which.

    Example:
        >>> A = torch.diag(torch.tensor([-3.0, 1.0, 2.0]))
        >>> values, vectors = eigsh(A, 2, which="BE")
        >>> values
        tensor([-3.,  2.])

    Source: Wu and Simon (2000), Thick-restart Lanczos method for large symmetric eigenvalue
        problems.
    """
    operator = require_symmetric_operator(A, "eigsh")
    n = operator.shape[-1]
    if not 1 <= k <= n:
        raise ValueError(f"expected k from 1 to {n}, the size of the matrix, got {k}")
    if which not in ENDS:
        raise ValueError(f"expected which to be one of {list(ENDS)}, got {which!r}")
    with torch.no_grad():
        try:
            return _closed(operator, k, which)
        except UnsupportedLayerError:  # no closed form
            first = None if start is None else flattened(columns(operator, start)[0])[0]
        found = linalg.eigsh(
            operator._apply,
            n,
            k,
            which,
            dtype=operator.dtype,
            device=operator.device,
            tol=tol,
            subspace=subspace,
            block_size=block_size,
            start=first,
            max_matvecs=max_matvecs,
            generator=seeded(seed, operator.device),
            progress=progress,
        )
    warn_unless_resolved("eigsh", found)
    kept = (found.values, found.vectors, found.residuals, found.matvecs, found.converged)
    return Spectrum(*kept, operator.space)


def svds(
    A: Any,
    k: int,
    *,
    tol: float | None = None,
    subspace: int | None = None,
    start: VectorLike | None = None,
    max_matvecs: int | None = None,
    seed: int | None = None,
    progress: bool = False,
) -> SingularValues:
    """The k largest singular values of any operator, such as a Jacobian, and their vectors.

    A held matrix is decomposed; else by thick-restart Golub-Kahan bidiagonalisation, which does not
    square the matrix. Without gradient. When it is interrupted it returns what it has.

    Args:
        A: an operator with both products, a tensor, or whatever `aslinearoperator` takes.
        k: how many, from 1 to the smaller side.
        tol: residual to reach, as a multiple of the largest singular value; by default 1e-6, in
            float64 1e-10.
        subspace: how many vectors are held on each side; by default max(2 k, k + 30).
        start: right vectors to start with (n,), (n, j) or a dict by name.
        max_matvecs: at most so many products; by default 20 times the smaller side, at least 1,000.
        seed: of the start; by default from torch's global generator.
        progress: whether to show a bar.

    Returns:
        The triplets; where they have not converged, with a `ConvergenceWarning`.

    Raises:
        ValueError: k or subspace out of range.
        NonFiniteError: NaN in a product; says in which.

    Example:
        >>> U, S, Vh = svds(torch.tensor([[3.0, 0.0, 0.0], [0.0, -4.0, 0.0]]), 2)
        >>> S
        tensor([3., 4.])

    Source: Baglama and Reichel (2005), Augmented implicitly restarted Lanczos bidiagonalization
        methods.
    """
    operator = aslinearoperator(A)
    m, n = _plain(operator, "svds")
    with torch.no_grad():
        if isinstance(operator, MatrixLinearOperator) and 1 <= k <= min(m, n):
            U, S, Vh = torch.linalg.svd(operator.tensor, full_matrices=False)
            U, S, Vh = U[:, :k].flip(1), S[:k].flip(0), Vh[:k].flip(0)
            return SingularValues(U, S, Vh, torch.zeros_like(S), 0, True, operator.space)
        transposed = operator._transpose_nonbatch()
        first = None if start is None else flattened(columns(operator, start)[0])[0]
        found = linalg.svds(
            operator._apply,
            transposed._apply,
            (m, n),
            k,
            dtype=operator.dtype,
            device=operator.device,
            tol=tol,
            subspace=subspace,
            start=first,
            max_matvecs=max_matvecs,
            generator=seeded(seed, operator.device),
            progress=progress,
        )
    warn_unless_resolved("svds", found)
    kept = (found.left, found.values, found.right.mT, found.residuals)
    return SingularValues(*kept, found.matvecs, found.converged, operator.space)


def spectral_density(
    A: Any,
    *,
    probes: int = 10,
    steps: int = 90,
    deflate: int | Spectrum = 0,
    reorthogonalize: bool = True,
    probes_at_once: int | None = None,
    seed: int | None = None,
    progress: bool = False,
) -> SpectralDensity:
    r"""The distribution of all eigenvalues of a symmetric operator, from products alone.

    .. math:: \frac1P \sum_i \delta(t - \lambda_i) \approx \sum_j w_j\,\delta(t - \theta_j)

    by stochastic Lanczos quadrature: the raw nodes and weights, and `density(grid, width)`. Without
    gradient. When it is interrupted it returns what it has, with a warning.

    Args:
        A: a symmetric operator, a tensor, or whatever `aslinearoperator` takes.
        probes: how many random vectors, multiplied together.
        steps: nodes of each probe, and products.
        deflate: so many outliers of largest magnitude, or known eigenpairs, to take out of the
            probes and to count exactly: sharper where a few eigenvalues are far from the bulk.
        reorthogonalize: whether to hold all `steps` vectors of each probe; without, three are held,
            and nodes at outliers come several times, with weights that add up.
        probes_at_once: how many probes are multiplied and held together; all by default.
        seed: of the probes; by default from torch's global generator.
        progress: whether to show a bar.

    Returns:
        Nodes and weights, which sum to 1; `.density(grid, width, log=False)`,
        `.standard_error(grid, width)` over the probes, `.expectation(f)` for tr f(A) / P.

    Raises:
        ValueError: a matrix that is not symmetric, or no probes.
        NonFiniteError: NaN in a product; says in which.

    Example:
        >>> A = torch.diag(torch.tensor([1.0, 1.0, 5.0]))
        >>> found = spectral_density(A, deflate=1, seed=0)
        >>> found.outliers, float(found.weights.sum())
        (tensor([5.]), 1.0)

    Source: Lin, Saad and Yang (2016), Approximating spectral densities of large matrices; Ghorbani,
        Krishnan and Xiao (2019), An investigation into neural net optimization via Hessian
        eigenvalue density.
    """
    operator = require_symmetric_operator(A, "spectral_density")
    if probes < 1 or steps < 1:
        raise ValueError(f"expected at least 1 probe and 1 step, got {probes} and {steps}")
    if isinstance(deflate, int) and deflate > 0:
        deflate = eigsh(operator, deflate, "LM", seed=seed, progress=progress)
    known = (deflate.eigenvalues, deflate.eigenvectors) if isinstance(deflate, Spectrum) else None
    with torch.no_grad():
        found = linalg.spectral_density(
            operator._apply,
            operator.shape[-1],
            probes,
            steps,
            torch.empty(0, dtype=operator.dtype, device=operator.device),
            known=known,
            reorthogonalize=reorthogonalize,
            at_once=probes_at_once,
            generator=seeded(seed, operator.device),
            progress=progress,
        )
    if found.interrupted:
        warn(
            ConvergenceWarning(
                f"spectral_density was interrupted after {found.matvecs} products: this is the "
                "density of what there was",
                float("nan"),
                found.matvecs,
            )
        )
    return found


def require_symmetric_operator(A: Any, what: str) -> BaseLinearOperator:
    """The operator, where it can be symmetric.

    Raises:
        ValueError: it is rectangular, known not to be symmetric, or has batch dimensions.
    """
    operator = aslinearoperator(A)
    m, n = _plain(operator, what)
    if m != n or isinstance(operator, MatrixLinearOperator):
        kind = "one that is not symmetric" if m == n else f"{m} x {n}"
        raise ValueError(f"{what} needs a symmetric matrix, got {kind}: take svds, or A.mT @ A")
    return operator


def _plain(operator: BaseLinearOperator, what: str) -> tuple[int, int]:
    if operator.dim() != 2:
        raise ValueError(
            f"{what} takes one matrix, got a batch of shape {tuple(operator.shape)}: take one of it"
        )
    m, n = operator.shape
    return m, n


def _closed(operator: BaseLinearOperator, k: int, which: str) -> Spectrum:
    values, basis = operator._eigensystem()
    ascending, order = values.sort()
    chosen = order[wanted(ascending, k, which).to(order.device)]
    values = values[chosen]
    unit = torch.zeros(len(order), k, dtype=values.dtype, device=values.device)
    unit[chosen, torch.arange(k, device=unit.device)] = 1
    vectors = basis._apply(unit)
    residuals = torch.linalg.vector_norm(operator._apply(vectors) - vectors * values, dim=0)
    return Spectrum(values, vectors, residuals, 0, True, operator.space)


def _by_name(space: ParamSpace | None, vectors: Tensor) -> dict[str, Tensor]:
    if space is None:
        raise SpaceMismatchError("expected an operator with a parameter space, this one has none")
    return space.unravel(vectors.mT)
