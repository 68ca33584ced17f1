"""Eigendecompositions of symmetric matrices: looked at, named when they fail, never stale."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from ..errors import NonFiniteError
from ..precision import HALF, widest

__all__ = ["Decomposition", "eigh", "eigvalsh", "eps", "matrix_power", "rounding"]

T = TypeVar("T")
DIGITS = 1e-3  # what rounding may change of a result before it is computed in float64
_SLACK = 10  # times n eps: what a decomposition may be off by


def eps(tensor: Tensor) -> float:
    """The relative rounding error of a tensor's dtype."""
    return float(torch.finfo(tensor.dtype).eps)


class Decomposition:
    """What is computed once from some tensors, and again if one of them is modified in place.

    Several operators may hold it: damping by a multiple of the identity changes no eigenvector.
    It travels with an operator that is made again, as long as its tensors are the same.
    """

    def __init__(
        self, *tensors: Tensor, origin: tuple[Decomposition, Tensor] | None = None
    ) -> None:
        self._tensors = tensors
        self._entries: dict[str, tuple[tuple[int, ...], Any]] = {}
        self.origin = origin  # of A + d I: that of A, and d
        self._made_at = None if origin is None else origin[0]._versions()

    @classmethod
    def of(cls, known: Decomposition | None, *tensors: Tensor) -> Decomposition:
        """The known one if it is that of these very tensors, else a new one."""
        if known is None or len(known._tensors) != len(tensors):
            return cls(*tensors)
        same = all(a is b for a, b in zip(known._tensors, tensors, strict=True))
        return known if same else cls(*tensors)

    def get(self, key: str, compute: Callable[[], T], *tensors: Tensor) -> T:
        """The result of `compute`, which reads these tensors (by default, all)."""
        read = tensors or self._tensors
        if any(t.is_inference() for t in read):
            return compute()  # they count no modifications
        versions = tuple(t._version for t in read)
        found = self._entries.get(key)
        if found is not None and found[0] == versions:
            value: T = found[1]
            return value
        fresh = compute()
        self._entries[key] = versions, fresh
        return fresh

    def holds(self, *keys: str) -> bool:
        """Whether all of these results are there, and current."""
        current = tuple(t._version for t in self._tensors if not t.is_inference())
        return all(
            key in self._entries and set(self._entries[key][0]) <= set(current) for key in keys
        )

    def shifted(self, total: Tensor, d: Tensor) -> Decomposition:
        """That of the tensor total = A + d I, which keeps a d that is below the rounding of A."""
        if self.origin is not None and self.is_current:
            return Decomposition(total, origin=(self.origin[0], self.origin[1] + d))
        return Decomposition(total, origin=(self, d))

    @property
    def is_current(self) -> bool:
        """Whether the tensors of the origin are those from which this one's were made."""
        return self.origin is not None and self.origin[0]._versions() == self._made_at

    @property
    def tensor(self) -> Tensor:
        """The first of its tensors."""
        return self._tensors[0]

    def _versions(self) -> tuple[int, ...] | None:
        if any(t.is_inference() for t in self._tensors):
            return None
        return tuple(t._version for t in self._tensors)

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        # a pickle holds no derived numbers
        return _restored, (self._tensors, self.origin if self.is_current else None)


def rounding(values: Tensor) -> Tensor:
    """What of eigenvalues (..., n) may be rounding, (..., 1): n eps times the largest.

    eps is that of their own dtype. In half precision n eps would soon be one: there it is at most
    eps^(1/2).
    """
    relative = values.shape[-1] * eps(values)
    if values.dtype in HALF:
        relative = min(relative, eps(values) ** 0.5)
    return relative * values.abs().amax(-1, keepdim=True)


def _restored(
    tensors: tuple[Tensor, ...], origin: tuple[Decomposition, Tensor] | None
) -> Decomposition:
    return Decomposition(*tensors, origin=origin)


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (..., n), ascending, and eigenvectors (..., n, n), without a graph.

    LAPACK fails on some matrices with many zero rows, with an error or with NaN. So zero rows are
    left out, the result is multiplied out, and what is no decomposition is computed in float64.
    Half precision is decomposed in float32. Eigenvalues of a matrix that is positive semidefinite
    up to the rounding of its dtype are not negative.

    Raises:
        NonFiniteError: NaN or infinity in the matrix, or no decomposition of it is found.
    """
    work = _prepared(matrix.detach())
    if work.numel() == 0:
        return work.new_zeros(work.shape[:-1]).to(matrix.dtype), work.to(matrix.dtype)
    with torch.no_grad():
        values, vectors = _without_zero_rows(work)
    return _cleaned(values.to(matrix.dtype)), vectors.to(matrix.dtype)


def eigvalsh(matrix: Tensor) -> Tensor:
    """The eigenvalues of `eigh`, with a gradient, also if eigenvalues repeat.

    Raises:
        NonFiniteError: NaN or infinity in the matrix, or no decomposition of it is found.
    """
    if not (torch.is_grad_enabled() and matrix.requires_grad):
        return eigh(matrix)[0]
    work = _prepared(matrix)
    found = _attempted(work)
    if found is None:
        work = work.double() if widest(work.device) == torch.float64 else work.cpu().double()
        found = _attempted(work)
    if found is None:
        raise _no_decomposition(matrix)
    return _cleaned(found[0].to(matrix))


def _without_zero_rows(work: Tensor) -> tuple[Tensor, Tensor]:
    """The decomposition of matrices (..., n, n), those with zero rows one by one and smaller."""
    if bool(work.diagonal(0, -2, -1).all()):
        return _checked(work)
    size = work.abs()
    used = torch.maximum(size.amax(-1), size.amax(-2)) > 0  # (..., n)
    whole = used.all(-1)
    if bool(whole.all()):
        return _checked(work)
    values, vectors = torch.zeros_like(work[..., 0]), torch.zeros_like(work)
    if bool(whole.any()):
        values[whole], vectors[whole] = _checked(work[whole])
    for index in (~whole).nonzero().tolist():
        k = tuple(index)
        kept = used[k].nonzero().squeeze(-1)
        system = torch.eye(work.shape[-1], dtype=work.dtype, device=work.device)
        own = torch.zeros_like(values[k])
        if kept.numel():
            part, basis = _checked(work[k][kept][:, kept])
            own[kept] = part
            system[kept[:, None], kept] = basis
        own, order = own.sort(stable=True)
        values[k], vectors[k] = own, system[:, order]
    return values, vectors


def _checked(work: Tensor) -> tuple[Tensor, Tensor]:
    """A decomposition that has been multiplied out, in float64 if it is none in its dtype.

    Raises:
        NonFiniteError: it is none in float64 either.
    """
    found = _attempted(work)
    if found is None:
        wide = work.double() if widest(work.device) == torch.float64 else work.cpu().double()
        found = _attempted(wide)
        if found is None:  # other routines of LAPACK
            left, _, _ = torch.linalg.svd(wide)
            signed = ((wide @ left) * left).sum(-2)
            order = signed.argsort(-1)
            found = signed.gather(-1, order), left.gather(-1, order.unsqueeze(-2).expand_as(left))
            if not _is_decomposition(wide, *found):
                raise _no_decomposition(work)
        found = found[0].to(work), found[1].to(work)
    return found


def _attempted(work: Tensor) -> tuple[Tensor, Tensor] | None:
    try:
        values, vectors = torch.linalg.eigh(work)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return None
    return (values, vectors) if _is_decomposition(work, values, vectors) else None


def _is_decomposition(work: Tensor, values: Tensor, vectors: Tensor) -> bool:
    """Whether A V = V diag(values) and V^T V = I on a few vectors: n^2 operations, not n^3."""
    n, work, values, vectors = work.shape[-1], work.detach(), values.detach(), vectors.detach()
    probes = torch.arange(1, 2 * n + 1, dtype=torch.float32, device=work.device)
    probes = probes.square_().cos_().view(n, 2).to(work)  # of a norm near sqrt(n)
    turned = vectors @ probes
    lower = work.tril()  # eigh reads the lower triangle
    product = lower @ turned + lower.mT @ turned - work.diagonal(0, -2, -1).unsqueeze(-1) * turned
    size = values.abs().amax(-1)[..., None, None]
    off = (product - vectors @ (values.unsqueeze(-1) * probes)) / (size + (size == 0))
    angle = vectors.mT @ turned - probes
    limit = _SLACK * n**1.5 * eps(work)
    norms = [torch.linalg.vector_norm(e, dim=(-2, -1)) for e in (off, angle)]
    return bool((torch.maximum(*norms) <= limit).all())  # NaN is not


def _no_decomposition(work: Tensor) -> NonFiniteError:
    largest = float(work.detach().abs().max())
    return NonFiniteError(
        f"no eigendecomposition of a matrix of shape {tuple(work.shape)} was found, neither in "
        f"{work.dtype} nor in float64 (largest entry {largest:.3g}): scale it to near one, or add "
        "damping"
    )


def matrix_power(matrix: Tensor, values: Tensor, vectors: Tensor, p: float) -> Tensor:
    """M^p from M's eigendecomposition, differentiable once in M, also if eigenvalues repeat.

    The derivative is the one of Daleckii and Krein (Higham 2008, Functions of Matrices, thm 3.11).
    """
    return cast(Tensor, cast(Any, _MatrixPower).apply(matrix, values, vectors, p))


class _MatrixPower(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, matrix: Tensor, values: Tensor, vectors: Tensor, p: float) -> Tensor:
        ctx.save_for_backward(values, vectors)
        ctx.p = p
        return (vectors * values.pow(p).unsqueeze(-2)) @ vectors.mT

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        values, vectors = ctx.saved_tensors
        p = ctx.p
        a, b = values.unsqueeze(-1), values.unsqueeze(-2)
        # divided differences of x^p, the derivative at the midpoint if the difference cancels
        close = (a - b).abs() <= eps(values) ** 0.5 * torch.maximum(a.abs(), b.abs())
        slope = p * ((a + b) / 2).pow(p - 1)
        gap = torch.where(close, torch.ones_like(slope), a - b)
        divided = torch.where(close, slope, (a.pow(p) - b.pow(p)) / gap)
        inner = vectors.mT @ ((grad + grad.mT) / 2) @ vectors
        return vectors @ (divided * inner) @ vectors.mT, None, None, None


def _prepared(matrix: Tensor) -> Tensor:
    if matrix.numel() and not math.isfinite(float(matrix.detach().abs().amax())):
        raise NonFiniteError("NaN or infinity in a matrix that is to be decomposed")
    return matrix.float() if matrix.dtype in HALF else matrix


def _cleaned(values: Tensor) -> Tensor:
    """Negative eigenvalues set to 0 if all of them are `rounding`."""
    if values.shape[-1] == 0:
        return values
    semidefinite = values.amin(-1, keepdim=True) >= -rounding(values)
    return torch.where(semidefinite, values.clamp_min(0), values)
