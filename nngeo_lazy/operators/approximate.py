"""Low-rank approximations of any linear operator, from products alone."""

from __future__ import annotations

from typing import Any

import torch

from .. import linalg
from .convert import aslinearoperator
from .low_rank import LowRankLinearOperator

__all__ = ["nystrom"]


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
    generator = None
    if seed is not None:
        generator = torch.Generator(device=operator.device).manual_seed(seed)
    with torch.no_grad():
        basis, values = linalg.nystrom(
            operator._apply,
            operator.shape[-1],
            rank,
            dtype=operator.dtype,
            device=operator.device,
            generator=generator,
        )
    return LowRankLinearOperator(basis, values, info=operator.info.plain().altered())
