"""Kronecker factors, in one of the shapes of `sides`, applied to one axis of a grid."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import sides
from ..errors import NonFiniteError
from ..linalg import nystrom_from
from ..precision import HALF, widened, widest
from .decompose import DIGITS, eigh, eigvalsh, eps

__all__ = [
    "apply_factors",
    "check_factors",
    "factor_diagonal",
    "factor_eigh",
    "factor_eigvalsh",
    "factor_null",
    "factor_of_sketch",
    "factor_shifted",
    "factor_trace",
    "inverse_factors",
    "joint_factors",
    "sketch_of_factor",
]


def check_factors(left: Tensor, right: Tensor, what: str) -> None:
    """Refuse what has none of the shapes of `sides`, or has different G."""
    for side, factor in (("left", left), ("right", right)):
        low = factor.dim() == 4 and factor.shape[1] in (1, 2)
        if not (sides.plain(factor) or sides.is_split(factor) or low):
            raise ValueError(
                f"expected the {side} {what} as (G, n, n), or (G, n) if it is diagonal, got "
                f"{tuple(factor.shape)}"
            )
    if left.shape[0] != right.shape[0]:
        raise ValueError(
            f"expected as many groups left and right, got {tuple(left.shape)} and "
            f"{tuple(right.shape)}: a single dense matrix is of shape (1, n, n)"
        )
    if left.dtype != right.dtype or left.device != right.device:
        raise ValueError(
            f"expected both {what}s of one dtype and device, got {left.dtype} on {left.device} and "
            f"{right.dtype} on {right.device}"
        )


def apply_factors(left: Tensor, right: Tensor, v: Tensor, *, transposed: bool = False) -> Tensor:
    """(left_g kron right_g) v for columns v (..., G o i, k), row-major (G, o, i)."""
    if v.dim() > 2:  # leading dimensions are more columns: the factors are never repeated
        wide = v.movedim(-2, 0)  # (n, ..., k)
        y = apply_factors(left, right, wide.flatten(1), transposed=transposed)
        return y.reshape(wide.shape).movedim(0, -2)
    groups, o, i, k = left.shape[0], sides.size_of(left), sides.size_of(right), v.shape[-1]
    y = sides.times(left, v.reshape(groups, o, i * k), transposed)  # (G,o,o),(G,o,ik) -> (G,o,ik)
    y = y.reshape(groups, o, i, k)
    if sides.is_diagonal(right):
        y = right[:, None, :, None] * y
    elif sides.is_dense(right):
        rows = y.transpose(-1, -2).reshape(groups, o * k, i)
        right = right if transposed else right.mT
        y = (rows @ right).reshape(groups, o, k, i).transpose(-1, -2)  # (G,ok,i),(G,i,i)
    else:
        columns = y.transpose(1, 2).reshape(groups, i, o * k)
        y = sides.times(right, columns, transposed).unflatten(2, (o, k)).transpose(1, 2)
    return y.reshape(groups * o * i, k)


def factor_eigh(factor: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (G, n) and eigenvectors, in the shape of `sides` that fits the factor."""
    if sides.is_diagonal(factor):
        return factor.detach(), torch.ones_like(factor, requires_grad=False)
    if sides.is_dense(factor):
        return eigh(factor)
    if sides.is_low_rank(factor):
        return _low_rank_eigh(factor.detach())
    whole, last = _separated(factor)
    pairs = [eigh(part) for part in (whole, last)]
    padding = (0, factor.shape[2] - last.shape[-1])
    values = torch.cat([values.flatten(1) for values, _ in pairs], 1)
    vectors = [whole_or_last.flatten(1, 2) for _, whole_or_last in pairs]
    return values, torch.cat([vectors[0], F.pad(vectors[1], padding)], 1)


def _separated(factor: Tensor) -> tuple[Tensor, Tensor]:
    """The blocks (G, m, s, s) of a split factor but the last, and the last (G, 1, r, r)."""
    n, s = factor.shape[1:]
    rest = n - (n - 1) // s * s
    whole = factor[:, : n - rest].unflatten(1, (-1, s))
    return whole, factor[:, None, n - rest :, :rest]


def _low_rank_eigh(factor: Tensor) -> tuple[Tensor, Tensor]:
    """Of U U^T + c I: the squared singular values of U and zeros, plus c; U's vectors first.

    Reflections take the first unit vectors to the singular vectors (Schreiber and Van Loan 1989).
    """
    if not bool(factor.isfinite().all()):
        raise NonFiniteError("a Kronecker factor contains NaN or infinity")
    root, rest = widened(factor[:, 0, :, :-1]), widened(factor[:, 0, :, -1])
    k = root.shape[2]
    vectors, s, _ = torch.linalg.svd(root, full_matrices=False)
    values = rest.clone()
    values[:, :k] += s.square()
    packed, tau = torch.geqrf(vectors)
    y = packed.tril(-1)
    y.diagonal(dim1=-2, dim2=-1).fill_(1)
    y = y * (tau != 0).unsqueeze(-2)  # no reflection
    weights = torch.where(tau != 0, tau, 1.0).reciprocal()
    inner = torch.linalg.inv((y.mT @ y).triu(1) + weights.diag_embed())
    return values.to(factor), torch.stack([y @ inner, y], 1).to(factor)


def factor_of_sketch(sums: Tensor, test: Tensor) -> Tensor:
    r"""U U^T + c I (G, 1, n, k + 1) from means (G, n, k + 1): A Omega, and the diagonal of A.

    .. math:: U U^T = (A \Omega) (\Omega^T A \Omega)^+ (A \Omega)^T, \quad
        c = (\mathrm{tr} A - \mathrm{tr}\, U U^T) / n

    Args:
        sums: of a positive semidefinite A.
        test: Omega (n, k), orthonormal columns.
    """
    roots = []
    for sketch, trace in zip(sums[..., :-1], sums[..., -1].sum(-1), strict=True):
        vectors, values = nystrom_from(sketch, test)
        rest = (trace - values.sum()) / len(vectors)
        noise = eps(sums) * trace  # of a matrix whose rank U has in full
        rest = torch.where(rest > noise, rest, 0.0)
        roots.append(torch.cat([vectors * values.sqrt(), rest.expand(len(vectors), 1)], 1))
    return torch.stack(roots).unsqueeze(1)


def sketch_of_factor(factor: Tensor, test: Tensor) -> Tensor:
    """The means from which `factor_of_sketch` made a factor, but for how its trace is laid out."""
    root = factor[:, 0, :, :-1]
    return torch.cat([root @ (root.mT @ test), sides.diagonal(factor).unsqueeze(-1)], -1)


def factor_eigvalsh(factor: Tensor) -> Tensor:
    """Eigenvalues (G, n) with a gradient, ordered as those of `factor_eigh`."""
    if sides.is_diagonal(factor):
        return factor
    if sides.is_dense(factor):
        return eigvalsh(factor)
    if sides.is_low_rank(factor):
        root, rest = factor[:, 0, :, :-1], factor[:, 0, :, -1]
        values = eigvalsh(root.mT @ root).flip(-1)
        return rest + F.pad(values, (0, rest.shape[1] - values.shape[1]))
    return torch.cat([eigvalsh(part).flatten(1) for part in _separated(factor)], 1)


def factor_diagonal(factor: Tensor) -> Tensor:
    """(G, n)."""
    return sides.diagonal(factor)


def factor_trace(factor: Tensor) -> Tensor:
    """(G,)."""
    return factor_diagonal(factor).sum(-1)


def joint_factors(products: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    r"""The Kronecker product with the partial traces of a sum of them.

    .. math:: L = \frac{\sum_j a_j}{\sum_j a_j b_j} \sum_k b_k L_k, \quad
        R = \frac{1}{\sum_j a_j} \sum_k a_k R_k, \quad a_k = tr L_k, \; b_k = tr R_k

    It is the one product if all others are zero, and does not depend on how a product shares its
    scale between its factors.
    """
    a = torch.stack([factor_trace(left) for left, _ in products])  # (K,G)
    b = torch.stack([factor_trace(right) for _, right in products])
    trace, lefts = (a * b).sum(0), a.sum(0)
    scaled = b * torch.where(trace > 0, lefts / trace.where(trace > 0, 1), 0)
    shares = a / lefts.where(lefts > 0, 1)
    return (
        _weighted_sum([left for left, _ in products], scaled),
        _weighted_sum([right for _, right in products], shares),
    )


def _weighted_sum(factors: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Of factors (G, n, n) and diagonal ones (G, n), with weights (K, G)."""
    some = any(factor.dim() == 3 for factor in factors)
    wide = [f.diag_embed() if some and f.dim() == 2 else f for f in factors]
    terms = [w.view(-1, *[1] * (f.dim() - 1)) * f for f, w in zip(wide, weights, strict=True)]
    total: Tensor = sum(terms[1:], terms[0])
    return total


def factor_null(values: Tensor, diagonal: bool) -> Tensor:
    """Which eigenvalues (G, n) are zero: up to n eps max (matrix_rank), exactly if diagonal."""
    sizes = values.abs()
    if diagonal or sizes.numel() == 0:
        return sizes == 0
    return sizes <= sizes.shape[-1] * eps(sizes) * sizes.amax(-1, keepdim=True)


def inverse_factors(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor] | None:
    """The inverses of two factors, if rounding leaves digits of them; in float64 if it must be.

    No eigenvectors are needed for them. None if there are none: eigenvalues then tell why.
    """
    half = left.dtype in HALF
    for dtype in dict.fromkeys((torch.float32 if half else left.dtype, widest(left.device))):
        one, other = (_inverse(f.detach().to(dtype)) for f in (left, right))
        if one is None or other is None:
            continue
        if bool((one[1] * other[1] * torch.finfo(dtype).eps <= DIGITS).all()):
            return one[0], other[0]
    return None


def _inverse(factor: Tensor) -> tuple[Tensor, Tensor] | None:
    """The inverse of a positive definite factor, and a bound (G,) of its condition number."""
    if factor.dim() == 2:
        inverse = factor.reciprocal()
        return (inverse, factor.amax(-1) * inverse.amax(-1)) if bool((factor > 0).all()) else None
    root, info = torch.linalg.cholesky_ex(factor)
    if bool(info.any()):
        return None
    inverse = torch.cholesky_inverse(root)
    norms = [torch.linalg.vector_norm(f, dim=(-2, -1)) for f in (factor, inverse)]
    return inverse, norms[0] * norms[1]


def factor_shifted(factor: Tensor, d: Tensor) -> Tensor:
    """factor_g + d_g I, d (G,)."""
    if sides.is_diagonal(factor):
        return factor + d[:, None]
    if sides.is_dense(factor):
        return factor + d[:, None].expand(factor.shape[:-1]).diag_embed()
    if sides.is_low_rank(factor):
        rest = factor[..., -1:] + d[:, None, None, None]
        return torch.cat([factor[..., :-1], rest], -1)
    n, s = factor.shape[1:]
    column = torch.arange(n, device=factor.device) % s
    return factor + d[:, None, None] * F.one_hot(column, s).to(factor)


def sizes(left: Tensor, right: Tensor) -> str:
    """How a report names the sizes of two factors: "2 x (3x3) x (diagonal 4)"."""
    many = f"{left.shape[0]} x " if left.shape[0] > 1 else ""
    return f"{many}({sides.named(left)}) x ({sides.named(right)})"
