"""`lstsq`: least squares of least norm, with a cut-off."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..arguments import NonNegative, checked
from ..operators.convert import aslinearoperator
from ..operators.vectors import VectorLike, columns

__all__ = ["lstsq"]


@checked
def lstsq(
    A: Any, b: VectorLike, *, rcond: NonNegative | None = None, atol: NonNegative | None = None
) -> Any:
    r"""The x of least norm that minimises |A x - b|, with small singular values taken as zero.

    .. math:: x = \sum_{\sigma_k > \max(r \sigma_1, a)} \sigma_k^{-1} v_k u_k^T b

    A symmetric A needs a `pinv`, which structures with an eigendecomposition have. Any other one is
    formed. `solve(A, b, method="lsmr", damping=d)` forms nothing, and damps in place of a cut-off.

    Args:
        A: an operator (m x n), a tensor, or anything that `aslinearoperator` takes.
        b: a vector (m,), columns (m, k), or a dict by parameter name.
        rcond: r, relative to the largest singular value; by default what is zero up to rounding.
        atol: a, absolute, in the units of A; with both, the larger cut-off holds.

    Returns:
        x, in the form of b.

    Raises:
        SpaceMismatchError: b does not fit A.
        TooLargeError: A has to be formed, and is too large.
        UnsupportedLayerError: A is symmetric, and its structure has no pseudo-inverse.

    Example:
        >>> lstsq(torch.tensor([[2.0, 0.0], [0.0, 0.1], [0.0, 0.0]]), torch.ones(3), atol=0.5)
        tensor([0.5000, 0.0000])

    Source: Golub and Van Loan (2013), Matrix computations, section 5.5.
    """
    operator = aslinearoperator(A)
    if operator.is_square and operator.known_symmetric:
        return operator.pinv(rcond, atol=atol) @ b
    transposed = operator._transpose_nonbatch()
    v = columns(transposed, b)[0]
    U, S, Vh = torch.linalg.svd(operator.to_dense(), full_matrices=False)
    eps = torch.finfo(S.dtype).eps * max(operator.shape)
    cut = (eps if rcond is None and atol is None else rcond or 0.0) * S[0] if len(S) else 0.0
    kept = torch.as_tensor(cut).clamp_min(atol or 0.0) < S
    x: Tensor = Vh.mT @ (torch.where(kept, 1 / S, 0).unsqueeze(1) * (U.mT @ v))
    return x.squeeze(-1) if isinstance(b, Tensor) and b.dim() == 1 else x
