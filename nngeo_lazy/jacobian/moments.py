"""Second moments: the products of which Kronecker factors are sums, and sums of squares."""

from __future__ import annotations

import torch
from torch import Tensor

from ..sides import Shape, Wide

__all__ = ["add_border", "add_products", "add_squares", "moment", "wide_moment"]

SPLIT_WIDTH = 256  # below it a product is too small to be worth halving
FEW_ROWS = 8  # so few are long, and their squares are added one by one
SUMMED_BYTES = 2**24  # products for each example are stored up to this size, then summed


def moment(
    x: Tensor,
    bias: bool = False,
    into: Tensor | None = None,
    narrow: torch.dtype | None = None,
) -> Tensor:
    """Sum over examples and positions of x x^T: (N, G, T, i) -> (G, w, w), or added to `into`.

    Args:
        x: (N, G, T, i).
        bias: whether x has a last entry of ones that is not stored.
        into: what the sum is added to.
        narrow: the dtype that the numbers of x were in, if its products may be taken in it.
    """
    n, groups, t, width = x.shape
    size = width + bias
    full = x.new_empty(groups, size, size) if into is None else into
    beta = 0 if into is None else 1  # 0 ignores what is there, so that nothing need be cleared
    second = full[:, :width, :width]
    if groups == 1 and (t == 1 or x.stride(-1) == 1):
        flat = x.reshape(n * t, width)
        _add_symmetric(flat if narrow is None else flat.to(narrow), second[0], beta)
    elif groups == 1 and t < width:  # channels-first data: one product, of a copy
        add_products(x.permute(1, 3, 0, 2).reshape(1, width, n * t), second, beta)
    elif n * groups * width * width * x.element_size() <= SUMMED_BYTES:
        total = (x.mT @ x).sum(0)  # (N,G,i,T)(N,G,T,i)
        second.copy_(total) if into is None else second.add_(total)
    elif groups > 1:
        joined = x.transpose(0, 1).reshape(groups, n * t, width)
        second.baddbmm_(joined.mT, joined, beta=beta)
    else:  # with many positions, a product for each example beats copying
        second[0].addbmm_(x[:, 0].mT, x[:, 0], beta=beta)
    if bias:
        add_border(full, x.sum((0, 2)), n * t, beta)
    return full


def wide_moment(x: Tensor, shape: Shape, test: Tensor | None, into: Tensor | None) -> Tensor:
    """What is kept of `moment` for a side that is split or sketched, added to `into` if given.

    Args:
        x: (N, G, T, n).
        shape: of the side.
        test: with which it is sketched (n, k).
        into: (G, n, s), or (G, n, k + 1), the diagonal last.
    """
    groups, n = x.shape[1], shape.n
    out = x.new_zeros(groups, *shape.sums) if into is None else into
    if shape.wide is Wide.SPLIT:
        for start in range(0, n, shape.size):
            stop = min(start + shape.size, n)
            moment(x[..., start:stop], into=out[:, start:stop, : stop - start])
    elif test is not None:
        joined = x.transpose(0, 1).flatten(1, 2)  # (G, N T, n)
        out[..., :-1].baddbmm_(joined.mT, joined @ test)
        out[..., -1] += x.square().sum((0, 2))
    return out


def add_products(x: Tensor, out: Tensor, beta: int = 1) -> None:
    """Add x x^T of each group to `out`, (G, w, w), or overwrite it: x is (G, w, M)."""
    if len(x) == 1:
        _add_symmetric(x[0].mT, out[0], beta)
    else:
        out.baddbmm_(x, x.mT, beta=beta)


def add_squares(rows: Tensor, out: Tensor) -> None:
    """Add the sum of squares over dimension 0, in place of the rows if they are many."""
    if len(rows) > FEW_ROWS:
        out += rows.square_().sum(0)
        return
    for row in rows:
        out.addcmul_(row, row)


def add_border(full: Tensor, total: Tensor, count: int, beta: int) -> None:
    """The homogeneous coordinate: total (G, i) is the sum of x, count that of its own square."""
    if beta == 0:
        full[:, -1] = 0
        full[:, :-1, -1] = 0
    full[:, :-1, -1] += total
    full[:, -1, :-1] += total
    full[:, -1, -1] += count


def _add_symmetric(x: Tensor, out: Tensor, beta: int) -> None:
    """x^T x for (M, w), each product of column blocks once: 5/8 of the work in two halvings."""
    width = x.shape[1]
    if width < SPLIT_WIDTH:
        _add_product(x, x, out, beta)
        return
    half = width // 2
    left, right = x[:, :half], x[:, half:]
    _add_symmetric(left, out[:half, :half], beta)
    _add_symmetric(right, out[half:, half:], beta)
    cross = out[:half, half:]
    _add_product(left, right, cross, beta)
    out[half:, :half] = cross.mT


def _add_product(x: Tensor, y: Tensor, out: Tensor, beta: int) -> None:
    """x^T y, added to `out` in its dtype, or in its place if beta is 0."""
    if x.dtype == out.dtype:
        out.addmm_(x.mT, y, beta=beta)
    elif beta == 0:
        out.copy_(torch.mm(x.mT, y, out_dtype=out.dtype))
    else:
        out.add_(torch.mm(x.mT, y, out_dtype=out.dtype))
