"""Eigenvalues, singular values and densities of any linear operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import linalg
from ..arguments import PositiveInt, checked, described
from ..errors import ConvergenceWarning, UnsupportedLayerError, wrong_option
from ..linalg import Probes, Search, SpectralDensity
from ..linalg.eigsh import ENDS, wanted
from ..operators.base import BaseLinearOperator
from ..operators.convert import aslinearoperator
from ..operators.dense import MatrixLinearOperator
from ..operators.vectors import VectorLike, columns, flattened
from ..operators.warn import warn, warn_unless_resolved
from .results import SingularValues, Spectrum

__all__ = [
    "eigsh",
    "require_symmetric_operator",
    "spectral_density",
    "svds",
]


@checked
def eigsh(
    A: Any,
    k: int,
    which: str = "LA",
    *,
    tol: float | None = None,
    subspace: PositiveInt | None = None,
    block_size: PositiveInt = 1,
    start: VectorLike | None = None,
    max_matvecs: int | None = None,
    seed: int | None = None,
    progress: bool = False,
) -> Spectrum:
    r"""The k eigenvalues at an end of the spectrum of a symmetric operator, and their vectors.

    .. math:: A v_i = \lambda_i v_i, \qquad v_i^T v_j = \delta_{ij}

    Structures with a closed form use it: dense, diagonal, Kronecker, low rank and blocks of these.
    All others use thick-restart Lanczos with full reorthogonalisation, on the products of the
    operator. Eigenvalues may have any sign. A repeated eigenvalue is found at least once, and up
    to b times with `block_size=b`. The result has no gradient. If the user interrupts the call
    (Ctrl-C), it returns the pairs so far, with a warning.

    Args:
        A: a symmetric operator (P x P), a tensor, or anything that `aslinearoperator` takes.
        k: how many, from 1 to P.
        which: "LA" the largest, "SA" the smallest, "LM" of largest magnitude, "BE" half from each
            end.
        tol: residual |A v - value v| to reach, as a multiple of |value| or of |A| / 1000,
            whichever is larger, and not below rounding; by default 1e-6, in float64 1e-10.
        subspace: how many vectors are held; by default max(2 k, k + 30) plus two blocks.
        block_size: how many vectors each product has.
        start: vectors to start from, such as earlier eigenvectors: (P,), (P, j) or a dict by name.
        max_matvecs: at most so many products; by default 10 P, at least 1,000.
        seed: of the random start; by default it comes from torch's global generator.
        progress: whether to show a progress bar.

    Returns:
        The pairs, a tuple of eigenvalues (k,) and eigenvectors (P, k). If they have not converged,
        a `ConvergenceWarning` says so.

    Raises:
        ValueError: k, which, subspace or block_size is out of range, or the matrix is not symmetric
            (Lanczos sees this as it goes).
        NonFiniteError: NaN or infinity in a product; the message says in which.

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
        raise ValueError(wrong_option("which", which, ENDS, "spectra"))
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
            _like(operator),
            Search(tol, subspace, first, max_matvecs, seed, progress),
            block_size=block_size,
        )
    warn_unless_resolved("eigsh", found)
    kept = (found.values, found.vectors, found.residuals, found.matvecs, found.converged)
    return Spectrum(*kept, operator.space)


@checked
def svds(
    A: Any,
    k: int,
    *,
    tol: float | None = None,
    subspace: PositiveInt | None = None,
    start: VectorLike | None = None,
    max_matvecs: int | None = None,
    seed: int | None = None,
    progress: bool = False,
) -> SingularValues:
    r"""The k largest singular values of any operator, such as a Jacobian, and their vectors.

    .. math:: A v_i = s_i u_i, \qquad A^T u_i = s_i v_i

    A matrix that is held is decomposed. All others use thick-restart Golub-Kahan bidiagonalisation,
    which does not square the matrix. The result has no gradient. If the user interrupts the call
    (Ctrl-C), it returns the triplets so far, with a warning.

    Args:
        A: an operator (m x n) with both products, a tensor, or anything that `aslinearoperator`
            takes.
        k: how many, from 1 to the smaller side.
        tol: residual to reach, as a multiple of the largest singular value; by default 1e-6, in
            float64 1e-10.
        subspace: how many vectors are held on each side; by default max(2 k, k + 30).
        start: right vectors to start from: (n,), (n, j) or a dict by name.
        max_matvecs: at most so many products; by default 20 times the smaller side, at least 1,000.
        seed: of the random start; by default it comes from torch's global generator.
        progress: whether to show a progress bar.

    Returns:
        The triplets, a tuple of U (m, k), S (k,) ascending and Vh (k, n). If they have not
        converged, a `ConvergenceWarning` says so.

    Raises:
        ValueError: k or subspace is out of range.
        NonFiniteError: NaN or infinity in a product; the message says in which.

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
            _like(operator),
            Search(tol, subspace, first, max_matvecs, seed, progress),
        )
    warn_unless_resolved("svds", found)
    kept = (found.left, found.values, found.right.mT, found.residuals)
    return SingularValues(*kept, found.matvecs, found.converged, operator.space)


@checked
def spectral_density(
    A: Any,
    *,
    probes: int | Probes | None = None,
    steps: int | None = None,
    deflate: int | tuple[Tensor, Tensor] = 0,
    reorthogonalize: bool = True,
    probes_at_once: PositiveInt | None = None,
    seed: int | None = None,
    progress: bool = False,
) -> SpectralDensity:
    r"""The distribution of all eigenvalues of a symmetric operator, from products alone.

    .. math:: \frac1P \sum_i \delta(t - \lambda_i) \approx \sum_j w_j\,\delta(t - \theta_j)

    by stochastic Lanczos quadrature. The result has no gradient. If the user interrupts the call
    (Ctrl-C), it returns the density of the probes so far, with a warning.

    Args:
        A: a symmetric operator (P x P), a tensor, or anything that `aslinearoperator` takes.
        probes: how many random vectors, by default 10; or a `Probes` object in place of probes,
            steps, seed and progress.
        steps: how many nodes and products each probe has, by default 90.
        deflate: how many eigenpairs of largest magnitude to take out of the probes and to count
            exactly, or known pairs (eigenvalues, eigenvectors). The density is sharper if a few
            eigenvalues are far from the bulk.
        reorthogonalize: whether to hold all `steps` vectors of each probe. Otherwise three are
            held; then nodes at outliers come several times, with weights that add up.
        probes_at_once: how many probes are multiplied and held together; by default all.
        seed: of the probes; by default they come from torch's global generator.
        progress: whether to show a progress bar.

    Returns:
        A tuple of nodes (K,) and weights (K,), which sum to 1. Its methods are
        `.density(grid, width, log=False)`, `.standard_error(grid, width)` over the probes, and
        `.expectation(f)`, which is tr f(A) / P.

    Raises:
        ValueError: the matrix is not symmetric.
        DataError: probes or steps is below 1, or a `Probes` object is given beside keywords.
        NonFiniteError: NaN or infinity in a product; the message says in which.

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
    given = {"steps": steps, "seed": seed, "progress": progress or None}
    options = Probes.of("spectral_density", probes, ("tol", "max_matvecs"), **given)
    if not isinstance(deflate, int) and not _is_pairs(deflate, operator.shape[-1]):
        raise ValueError(
            "expected deflate to be a number of pairs, or known ones (eigenvalues (k,), "
            f"eigenvectors (P, k)), got {described(deflate)}: pass what eigsh returned"
        )
    if isinstance(deflate, int) and deflate != 0:
        deflate = eigsh(operator, deflate, "LM", seed=options.seed, progress=options.progress)
    with torch.no_grad():
        found = linalg.spectral_density(
            operator._apply,
            operator.shape[-1],
            _like(operator),
            options,
            known=None if isinstance(deflate, int) else (deflate[0], deflate[1]),
            reorthogonalize=reorthogonalize,
            at_once=probes_at_once,
        )
    if found.interrupted:
        warn(
            ConvergenceWarning(
                f"spectral_density was interrupted after {found.matvecs} products: this is the "
                "density of the probes so far",
                float("nan"),
                found.matvecs,
            )
        )
    return found


def _is_pairs(value: Any, n: int) -> bool:
    """Whether these are k eigenvalues and their vectors (n, k)."""
    if not isinstance(value, tuple) or len(value) != 2:
        return False
    if not all(isinstance(each, Tensor) for each in value) or value[0].dim() != 1:
        return False
    return bool(value[1].shape == (n, len(value[0])))


def require_symmetric_operator(A: Any, what: str, *, look: bool = False) -> BaseLinearOperator:
    """A as an operator that may be symmetric.

    Args:
        A: anything that `aslinearoperator` takes.
        what: the function that needs it, for messages.
        look: whether products with a few vectors must show it, if the function does not see it as
            it goes, as Lanczos does.

    Raises:
        ValueError: A is rectangular, not symmetric, or has batch dimensions.
    """
    operator = aslinearoperator(A)
    m, n = _plain(operator, what)
    if m != n or isinstance(operator, MatrixLinearOperator):
        kind = "one that is not symmetric" if m == n else f"{m} x {n}"
        raise ValueError(f"{what} needs a symmetric matrix, got {kind}: take svds, or A.mT @ A")
    if look and not operator.known_symmetric:
        remedy = "take svds, or A.mT @ A"
        linalg.require_symmetric_products(operator._apply, n, _like(operator), what, remedy)
    return operator


def _like(operator: BaseLinearOperator) -> Tensor:
    return torch.empty(0, dtype=operator.dtype, device=operator.device)


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
