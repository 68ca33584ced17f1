"""Low-rank approximations of any linear operator, from products alone."""

from __future__ import annotations

from typing import Any

import torch

from .. import linalg
from ..arguments import checked
from ..errors import wrong_option
from ..operators.low_rank import LowRankLinearOperator
from ..operators.primitives import seeded
from .estimation import diagonal, trace
from .spectra import eigsh, require_symmetric_operator

__all__ = ["low_rank", "nystrom"]

RESTS = ("zero", "constant", "diagonal")


@checked
def low_rank(
    A: Any,
    rank: int,
    *,
    method: str = "lanczos",
    rest: str = "zero",
    tol: float | None = None,
    seed: int | None = None,
    progress: bool = False,
) -> LowRankLinearOperator:
    r"""A low-rank-plus-diagonal approximation of a symmetric operator.

    .. math:: A \approx U \Lambda U^T + D \qquad\text{or}\qquad U \Lambda U^T + c\,(I - U U^T)

    with the eigenpairs (Lambda, U) of largest magnitude. It serves as a preconditioner
    (`F.solve(g, damping=d, preconditioner=low)`) or as a posterior
    (`low.inverse(damping=d).sample(n)`).

    Args:
        A: a symmetric operator (P x P), a tensor, or anything that `aslinearoperator` takes.
        rank: how many eigenpairs, from 1 to P.
        method: "lanczos" gives the best approximation of that rank, with eigenvalues of any sign.
            "nystrom" takes one product with `rank` columns; A must be positive semidefinite.
        rest: what stands for the other eigenvalues. "zero": D = 0. "constant": their mean c, so
            that the trace is that of A. "diagonal": a D that gives the diagonal of A. Neither c nor
            D is negative. If the structure knows no trace or diagonal, it is estimated.
        tol: relative residual of the eigenpairs, as of `eigsh`.
        seed: of the random vectors; by default they come from torch's global generator.
        progress: whether to show a progress bar.

    Returns:
        The operator (P x P), over the parameters of A.

    Raises:
        ValueError: the method, the rest or the rank is out of range, or A is not symmetric.
        NotPositiveDefiniteError: A has negative curvature, with "nystrom".

    Example:
        >>> A = torch.diag(torch.tensor([9.0, 2.0, 1.0]))
        >>> low_rank(A, 1, rest="constant").to_dense().diagonal()
        tensor([9.0000, 1.5000, 1.5000])

    Source: Daxberger et al. (2021), Laplace redux, section 3.
    """
    if method not in ("lanczos", "nystrom"):
        raise ValueError(
            f"expected method 'lanczos' or 'nystrom', got {method!r}; docs/spectra.md explains them"
        )
    if rest not in RESTS:
        raise ValueError(wrong_option("rest", rest, RESTS, "spectra"))
    operator = require_symmetric_operator(A, "low_rank")
    if method == "nystrom":
        low = nystrom(operator, rank, seed=seed)
    else:
        values, vectors = eigsh(operator, rank, "LM", tol=tol, seed=seed, progress=progress)
        info = operator.info.altered()
        low = LowRankLinearOperator(vectors.flip(1), values.flip(0), info=info)
    if rest == "zero" or rank == operator.shape[-1]:
        return low
    with torch.no_grad():
        if rest == "constant":
            total = trace(operator, seed=seed, progress=progress).value
            c = ((total - low._trace()) / (operator.shape[-1] - rank)).clamp_min(0)
            return LowRankLinearOperator(low.root, low.core - c, c, info=low.info)
        left = diagonal(operator, seed=seed, progress=progress).value - low._diagonal()
    return LowRankLinearOperator(low.root, low.core, left.clamp_min(0), info=low.info)


@checked
def nystrom(A: Any, rank: int, *, seed: int | None = None) -> LowRankLinearOperator:
    r"""A low-rank approximation of a positive semidefinite operator, from random vectors.

    .. math:: A \approx (A \Omega) (\Omega^T A \Omega)^+ (A \Omega)^T = U \Lambda U^T

    with a random orthonormal Omega (P, rank), from one product with `rank` columns. For a
    preconditioner of A + d I, take a rank of about twice the effective dimension
    sum_i e_i / (e_i + d): `F.solve(g, damping=d, preconditioner=ng.nystrom(F, 50))`.

    Args:
        A: a positive semidefinite operator (P x P), a tensor, or anything that `aslinearoperator`
            takes.
        rank: how many directions, from 1 to P.
        seed: of Omega; by default it comes from torch's global generator.

    Returns:
        The low-rank operator (P x P), over the parameters of A.

    Raises:
        ValueError: the rank is out of range, or A is not symmetric.
        NotPositiveDefiniteError: A has a direction of negative curvature.

    Example:
        >>> A = torch.diag(torch.tensor([4.0, 1.0, 0.0], dtype=torch.float64))
        >>> torch.allclose(nystrom(A, 2, seed=0).to_dense(), A)
        True

    Source: Frangella, Tropp and Udell (2021), Randomized Nystrom preconditioning, algorithm 2.1.
    """
    operator = require_symmetric_operator(A, "nystrom", look=True)
    with torch.no_grad():
        basis, values = linalg.nystrom(
            operator._apply,
            operator.shape[-1],
            rank,
            dtype=operator.dtype,
            device=operator.device,
            generator=seeded(seed, operator.device),
        )
    return LowRankLinearOperator(basis, values, info=operator.info.altered())
