"""Low-rank approximations of any linear operator, from products alone."""

from __future__ import annotations

from typing import Any

import torch

from .. import linalg
from ..operators.convert import aslinearoperator
from ..operators.low_rank import LowRankLinearOperator
from ..operators.primitives import seeded
from .estimation import diagonal, trace
from .spectra import eigsh, require_symmetric_operator

__all__ = ["low_rank", "nystrom"]

RESTS = ("zero", "constant", "diagonal")


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

    with the eigenpairs of largest magnitude. As a preconditioner (`F.solve(g, damping=d,
    preconditioner=low)`), or for a posterior (`low.inverse(damping=d).sample(n)`).

    Args:
        A: a symmetric operator, a tensor, or whatever `aslinearoperator` takes.
        rank: how many eigenpairs.
        method: "lanczos" (the best of that rank, of any signs), or "nystrom" (one product with
            `rank` columns; positive semidefinite).
        rest: of the spectrum: "zero"; "constant", the mean c of the other eigenvalues, so that the
            trace is that of A; or "diagonal", a D by which the diagonal is. Neither is negative.
            Where the trace or the diagonal is no closed form it is an estimate.
        tol: of the eigenpairs, as of `eigsh`.
        seed: of what is random; by default from torch's global generator.
        progress: whether to show a bar.

    Returns:
        The operator, over the parameters that A is over.

    Raises:
        ValueError: an unknown method or rest, or a rank outside of 1 to the size of A.

    Example:
        >>> A = torch.diag(torch.tensor([9.0, 2.0, 1.0]))
        >>> low_rank(A, 1, rest="constant").to_dense().diagonal()
        tensor([9.0000, 1.5000, 1.5000])

    Source: Daxberger et al. (2021), Laplace redux, section 3.
    """
    if method not in ("lanczos", "nystrom"):
        raise ValueError(f"expected method 'lanczos' or 'nystrom', got {method!r}")
    if rest not in RESTS:
        raise ValueError(f"expected rest to be one of {list(RESTS)}, got {rest!r}")
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


def nystrom(A: Any, rank: int, *, seed: int | None = None) -> LowRankLinearOperator:
    r"""A randomised low-rank approximation of a positive semidefinite operator.

    .. math:: A \approx (A \Omega) (\Omega^T A \Omega)^+ (A \Omega)^T = U \Lambda U^T

    with a random orthonormal Omega (P, rank), from one product with `rank` columns. As a
    preconditioner of A + d I, which it then damps alike, its rank should be near twice the
    effective dimension sum e / (e + d): `F.solve(g, damping=d, preconditioner=ng.nystrom(F, 50))`.

    Args:
        A: a positive semidefinite operator, a tensor, or whatever `aslinearoperator` takes.
        rank: how many directions, at most the size of A.
        seed: of Omega; by default from torch's global generator.

    Returns:
        The low-rank operator, over the parameters that A is over.

    Raises:
        ValueError: a rank outside of 1 to the size of A.
        NotPositiveDefiniteError: A has a direction of negative curvature.

    Example:
        >>> A = torch.diag(torch.tensor([4.0, 1.0, 0.0], dtype=torch.float64))
        >>> torch.allclose(nystrom(A, 2, seed=0).to_dense(), A)
        True

    Source: Frangella, Tropp and Udell (2021), Randomized Nystrom preconditioning, algorithm 2.1.
    """
    operator = aslinearoperator(A)
    operator._require_square("nystrom")
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
