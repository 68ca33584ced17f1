"""Second moments: the products of which Kronecker factors are sums."""

from __future__ import annotations

from torch import Tensor

__all__ = ["add_border", "moment"]

SPLIT_WIDTH = 256  # below it a product is too small to be worth halving
SUMMED_BYTES = 2**24  # products for each example are stored up to this size, then summed


def moment(x: Tensor, bias: bool = False, into: Tensor | None = None) -> Tensor:
    """Sum over examples and positions of x x^T: (N, G, T, i) -> (G, w, w), or added to `into`."""
    n, groups, t, width = x.shape
    full = x.new_zeros(groups, width + bias, width + bias) if into is None else into
    second = full[:, :width, :width]
    if groups == 1 and (t == 1 or x.stride(-1) == 1):
        _add_symmetric(x.reshape(n * t, width), second[0])
    elif n * groups * width * width * x.element_size() <= SUMMED_BYTES:
        second += (x.mT @ x).sum(0)  # (N,G,i,T)(N,G,T,i)
    else:  # channels-first data: a product for each example beats copying to (N T, i)
        for g in range(groups):
            second[g].addbmm_(x[:, g].mT, x[:, g])
    if bias:
        add_border(full, x.sum((0, 2)), n * t)
    return full


def add_border(full: Tensor, total: Tensor, count: int) -> None:
    """The homogeneous coordinate: total (G, i) is the sum of x, count that of its own square."""
    full[:, :-1, -1] += total
    full[:, -1, :-1] += total
    full[:, -1, -1] += count


def _add_symmetric(x: Tensor, out: Tensor) -> None:
    """x^T x for (M, w), each product of column blocks once: 5/8 of the work in two halvings."""
    width = x.shape[1]
    if width < SPLIT_WIDTH:
        out.addmm_(x.mT, x)
        return
    half = width // 2
    left, right = x[:, :half], x[:, half:]
    _add_symmetric(left, out[:half, :half])
    _add_symmetric(right, out[half:, half:])
    cross = out[:half, half:]
    cross.addmm_(left.mT, right)
    out[half:, :half] = cross.mT
