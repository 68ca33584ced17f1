"""Randomised low-rank approximation of a positive semidefinite matrix."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import NonFiniteError, NotPositiveDefiniteError

__all__ = ["nystrom", "nystrom_from"]


def nystrom(
    matmat: Callable[[Tensor], Tensor],
    n: int,
    rank: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Eigenvectors U (n, rank) and eigenvalues (rank,) of a Nystrom approximation of A.

    .. math:: A \approx (A \Omega) (\Omega^T A \Omega)^+ (A \Omega)^T = U \Lambda U^T

    with a random orthonormal test matrix Omega (n, rank). The approximation is positive
    semidefinite and not above A. It is exact if the rank of A is not larger.

    Args:
        matmat: V (n, k) to A V, A symmetric positive semidefinite.
        n: the size of A.
        rank: how many directions, from 1 to n.
        dtype: of A.
        device: of A.
        generator: of the test matrix.
        chunk: at most so many columns in one product; by default all at once.

    Returns:
        U with orthonormal columns, and the eigenvalues, falling and not negative.

    Raises:
        ValueError: the rank is outside 1 to n.
        NotPositiveDefiniteError: A has a direction of negative curvature.
        NonFiniteError: NaN or infinity in a product with A.

    Example:
        >>> import torch
        >>> A = torch.diag(torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64))
        >>> vectors, values = nystrom(lambda v: A @ v, 3, 3, dtype=A.dtype)
        >>> values
        tensor([5.0000, 2.0000, 1.0000], dtype=torch.float64)

    Source: Frangella, Tropp and Udell (2021), Randomized Nystrom preconditioning, algorithm 2.1.
    """
    if not 1 <= rank <= n:
        raise ValueError(f"expected a rank from 1 to {n}, got {rank}")
    test = torch.randn(n, rank, dtype=dtype, device=device, generator=generator)
    test = torch.linalg.qr(test).Q
    sketch = torch.cat([matmat(part) for part in test.split(chunk or rank, dim=1)], dim=1)
    return nystrom_from(sketch, test)


def nystrom_from(sketch: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """The approximation of `nystrom` from the sketch A Omega (n, rank), and Omega.

    Args:
        sketch: A times the test matrix.
        test: orthonormal columns (n, rank).

    Returns:
        U with orthonormal columns, and the eigenvalues, falling and not negative.

    Raises:
        NotPositiveDefiniteError: A has a direction of negative curvature.
        NonFiniteError: NaN or infinity in the sketch.

    Example:
        >>> import torch
        >>> test = torch.eye(3)[:, :1]
        >>> nystrom_from(4 * test, test)[1]
        tensor([4.])
    """
    rank, dtype = test.shape[1], test.dtype
    size = float(sketch.abs().max())
    if not size < float("inf"):
        raise NonFiniteError("nystrom: NaN or infinity in a product with the matrix")
    if size == 0:
        return test, torch.zeros(rank, dtype=dtype, device=test.device)
    y = (sketch / size).double()  # near one, so that no shift is absolute
    core = test.double().mT @ y
    core = (core + core.mT) / 2
    shift = torch.finfo(dtype).eps * float(y.norm())
    lowest = float(torch.linalg.eigvalsh(core)[0])
    if lowest < -100 * shift:
        raise NotPositiveDefiniteError(
            f"nystrom: the matrix is not positive semidefinite (its restriction to {rank} "
            f"directions has the eigenvalue {lowest * size:.3g}): add damping, or take the "
            "Gauss-Newton matrix"
        )
    shift = max(shift, -2 * lowest)
    y = y + shift * test.double()
    core = core + shift * torch.eye(rank, dtype=y.dtype, device=y.device)
    factor, failed = torch.linalg.cholesky_ex(core)
    if bool(failed):  # by rounding alone: drop the directions that are not positive
        kept, vectors = torch.linalg.eigh(core)
        root = (y @ vectors) * torch.where(kept > shift / 10, kept, torch.inf).rsqrt()
    else:
        root = torch.linalg.solve_triangular(factor, y.mT, upper=False).mT  # Y C^-T
    u, s, _ = torch.linalg.svd(root, full_matrices=False)
    values = (s.square() - shift).clamp_min(0) * size
    return u.to(dtype), values.to(dtype)
