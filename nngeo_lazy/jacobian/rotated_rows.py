"""Squared rows in a Kronecker basis, in the cheaper of two orders of the products.

A row is a sum over positions of g x^T. Its coordinates in left kron right are those of g and x,
multiplied together; or the row is made first, and has its coordinates taken. The latter costs
nothing for each position: a layer with more positions than inputs is faster so.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..sides import is_dense
from .forms import Outer
from .inputs import rotate

__all__ = ["rows_first", "squares_of_rows"]


def rows_first(form: Outer, left: Tensor, right: Tensor, alone: bool) -> bool:
    """Whether it is cheaper to make the rows first.

    Args:
        form: a chunk of directions.
        left: the basis of the outputs, in a shape of `sides`.
        right: that of the inputs.
        alone: whether the batch has no other chunk, for which x in its basis would be kept.
    """
    r, _, _, t, o = form.g.shape
    if t == 1 or form.inputs is None or not (is_dense(left) and is_dense(right)):
        return False
    inputs = t * form.width**2 if alone else 0
    return r * o * form.width * (o + form.width) < r * t * o * o + inputs


def squares_of_rows(form: Outer, left: Tensor, right: Tensor) -> Tensor:
    """Sum over r, n of the squared projections on left[:, a] kron right[:, b], (p,)."""
    total = torch.zeros(
        form.g.shape[2], form.g.shape[4], form.width, dtype=form.dtype, device=form.g.device
    )
    for a, b in form.tiles():
        rows = form.rows(a, b).unflatten(2, total.shape).flatten(0, 1)  # (R n,G,o,w)
        total += (left.mT @ rotate(rows, right)).square_().sum(0)
    return total.flatten()
