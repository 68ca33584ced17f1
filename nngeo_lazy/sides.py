"""One side of a Kronecker product, a matrix or its eigenvectors, in a shape that fits its size.

| shape | a symmetric matrix | orthonormal eigenvectors |
|---|---|---|
| (G, n) | a diagonal | the identity (ones) |
| (G, n, n) | dense | dense |
| (G, n, s), s < n | diagonal blocks of s rows, the last one of fewer | the same |
| (G, 1, n, k + 1) | U U^T + c I: the columns of U, then c | |
| (G, 2, n, k) | | I - Z Y^T, a product of k reflections: Z, then Y |

G are groups. Rows of the last block of (G, n, s) are filled up with zeros.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "RANK",
    "Shape",
    "Wide",
    "blocks",
    "diagonal",
    "is_dense",
    "is_diagonal",
    "is_low_rank",
    "is_split",
    "named",
    "norm",
    "overlapped",
    "plain",
    "rows_times",
    "size_of",
    "times",
    "to_dense",
    "transposed",
]

RANK = 256  # the most columns of U
TILE_NUMBERS = 2**22  # of dense columns that are made at a time


class Wide(str, Enum):
    """What is kept of a side with more rows than a limit."""

    DIAGONAL = "diagonal"
    SPLIT = "split"  # diagonal blocks, each within the limit
    LOW_RANK = "low_rank"  # a Nystrom approximation, and the mean of the rest


@dataclass(frozen=True)
class Shape:
    """What is kept of a side before it is computed.

    Attributes:
        n: how many rows it has.
        wide: what is kept of it; None is all.
        size: the rows of a block, or the rank.
    """

    n: int
    wide: Wide | None
    size: int = 0

    @classmethod
    def of(cls, n: int, limit: int, wide: Wide) -> Shape:
        """That of a side with n rows, if more than a limit are wide."""
        if n <= limit:
            return cls(n, None)
        if wide is Wide.SPLIT:
            return cls(n, wide, -(-n // -(-n // limit)))
        return cls(n, wide, min(RANK, limit) if wide is Wide.LOW_RANK else 0)

    @property
    def sums(self) -> tuple[int, ...]:
        """The shape of what is summed over the data, of one group; a sketch has the diagonal."""
        if self.wide is Wide.DIAGONAL:
            return (self.n,)
        if self.wide is Wide.LOW_RANK:
            return (self.n, self.size + 1)
        return (self.n, self.size if self.wide is Wide.SPLIT else self.n)

    @property
    def basis(self) -> tuple[int, ...]:
        """The shape of the eigenvectors, of one group."""
        return (2, self.n, self.size) if self.wide is Wide.LOW_RANK else self.sums

    @property
    def numbers(self) -> int:
        """How many are kept for each group."""
        return torch.Size(self.sums).numel()

    @property
    def flops(self) -> int:
        """Products of numbers for each position."""
        return self.numbers * (2 if self.wide is Wide.LOW_RANK else 1)

    def test_matrix(self, like: Tensor) -> Tensor | None:
        """The orthonormal columns (n, k) with which a side is sketched: always the same.

        None if it has no low rank.
        """
        if self.wide is not Wide.LOW_RANK:
            return None
        generator = torch.Generator().manual_seed(0)
        random = torch.randn(
            self.n, self.size, generator=generator, dtype=torch.float64, device="cpu"
        )
        test: Tensor = torch.linalg.qr(random).Q.to(like)
        return test

    def __str__(self) -> str:
        return _name(self.n, self.wide, self.size)


def size_of(side: Tensor) -> int:
    """n."""
    return side.shape[-2] if side.dim() > 2 else side.shape[1]


def is_diagonal(side: Tensor) -> bool:
    """Whether it is (G, n)."""
    return side.dim() == 2


def is_dense(side: Tensor) -> bool:
    """Whether it is (G, n, n)."""
    return side.dim() == 3 and side.shape[1] == side.shape[2]


def is_split(side: Tensor) -> bool:
    """Whether it is made of diagonal blocks."""
    return side.dim() == 3 and side.shape[1] > side.shape[2]


def is_low_rank(side: Tensor) -> bool:
    """Whether it is a matrix of low rank and a multiple of the identity, or a basis of one."""
    return side.dim() == 4


def plain(side: Tensor) -> bool:
    """Whether it is diagonal or dense."""
    return is_diagonal(side) or is_dense(side)


def named(side: Tensor) -> str:
    """How a report names it: "3x3", "diagonal 4", "4 in blocks of 2"."""
    n = size_of(side)
    if is_low_rank(side):
        return _name(n, Wide.LOW_RANK, side.shape[-1] - (side.shape[1] == 1))
    if is_split(side):
        return _name(n, Wide.SPLIT, side.shape[2])
    return _name(n, Wide.DIAGONAL if is_diagonal(side) else None, 0)


def _name(n: int, wide: Wide | None, size: int) -> str:
    if wide is Wide.DIAGONAL:
        return f"diagonal {n}"
    if wide is Wide.SPLIT:
        return f"{n} in blocks of {size}"
    return f"{n}x{n}" if wide is None else f"rank {size} of {n} + c I"


def blocks(side: Tensor) -> Tensor:
    """The diagonal blocks (G, m, s, s) of a split side, the last one filled up with zeros."""
    _, n, s = side.shape
    parts: Tensor = F.pad(side, (0, 0, 0, -n % s)).unflatten(1, (-1, s))
    return parts


def times(side: Tensor, y: Tensor, transpose: bool = False) -> Tensor:
    """The matrix, or its transpose, times columns: (G, n, k) -> (G, n, k)."""
    if is_diagonal(side):
        return side.unsqueeze(-1) * y
    if is_dense(side):
        return (side.mT if transpose else side) @ y
    if is_low_rank(side):
        if side.shape[1] == 1:
            root, rest = side[:, 0, :, :-1], side[:, 0, :, -1:]
            return root @ (root.mT @ y) + rest * y
        z, reflectors = side.flip(1).unbind(1) if transpose else side.unbind(1)
        return y - z @ (reflectors.mT @ y)
    parts, n = blocks(side), y.shape[1]
    padded = F.pad(y, (0, 0, 0, -n % side.shape[2])).unflatten(1, parts.shape[1:3])
    product: Tensor = (parts.mT if transpose else parts) @ padded  # (G,m,s,s),(G,m,s,k)
    return product.flatten(1, 2)[:, :n]


def rows_times(x: Tensor, side: Tensor) -> Tensor:
    """x times the matrix: (..., G, T, n) -> (..., G, T, n)."""
    if is_diagonal(side):
        return x * side.unsqueeze(-2)
    if is_dense(side):
        return x @ side
    lead = x.shape[:-3]
    columns = x.movedim(-1, 0).movedim(-2, 0)  # (G, n, ..., T)
    flat = times(side, columns.flatten(2), transpose=True)
    turned: Tensor = flat.unflatten(2, (*lead, x.shape[-2]))
    return turned.movedim(0, -2).movedim(0, -1)


def transposed(side: Tensor) -> Tensor:
    """The transpose, in the same shape."""
    if is_dense(side):
        return side.mT
    if is_split(side):
        return blocks(side).mT.flatten(1, 2)[:, : side.shape[1]]
    return side.flip(1) if is_low_rank(side) else side


def to_dense(side: Tensor) -> Tensor:
    """(G, n, n)."""
    if is_dense(side):
        return side
    eye = torch.eye(size_of(side), dtype=side.dtype, device=side.device)
    return times(side, eye.expand(side.shape[0], -1, -1))


def diagonal(side: Tensor) -> Tensor:
    """The diagonal of a symmetric matrix, (G, n)."""
    if is_diagonal(side):
        return side
    if is_low_rank(side):
        return side[:, 0, :, :-1].square().sum(-1) + side[:, 0, :, -1]
    if is_split(side):
        return blocks(side).diagonal(dim1=-2, dim2=-1).flatten(1)[:, : side.shape[1]]
    return side.diagonal(dim1=-2, dim2=-1)


def norm(side: Tensor) -> Tensor:
    """The Frobenius norm of a symmetric matrix, (G,)."""
    if not is_low_rank(side):
        known: Tensor = torch.linalg.vector_norm(side.flatten(1), dim=1)
        return known
    root, rest = side[:, 0, :, :-1], side[:, 0, 0, -1]
    gram = root.mT @ root
    twice = 2 * rest * gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    return (gram.square().sum((1, 2)) + twice + side.shape[2] * rest.square()).sqrt()


def overlapped(new: Tensor | None, old: Tensor, y: Tensor) -> Tensor:
    """The squared entries of Q'^T Q, as a matrix, times y (G, n, k).

    Args:
        new: Q'; None is the identity.
        old: Q.
        y: columns.
    """
    if is_diagonal(old) and (new is None or is_diagonal(new)):
        return y
    if is_dense(old) and (new is None or is_dense(new)):
        return (old if new is None else new.mT @ old).square() @ y
    total = torch.zeros_like(y)
    for first, columns in _columns(old):
        turned = columns if new is None else times(new, columns, transpose=True)
        total += turned.square() @ y[:, first : first + columns.shape[2]]
    return total


def _columns(basis: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The columns of a basis, (G, n, m) at a time."""
    n = size_of(basis)
    step = max(1, TILE_NUMBERS // (basis.shape[0] * n))
    for first in range(0, n, step):
        eye = basis.new_zeros(n, min(step, n - first))
        eye[first : first + step].fill_diagonal_(1)
        yield first, times(basis, eye.expand(basis.shape[0], -1, -1))
