"""Inner products of the rows of forms: tiles of the neural tangent kernel.

The rows J_n[r] of two forms of one block have the inner products

    K[n r, m s] = sum_{t,u} (x[n,t] . x'[m,u]) (g[r,n,t] . g'[s,m,u])

in two ways: by *pairs* of positions, as this formula stands, and from the *rows* themselves, some
outputs at a time. Few positions favour pairs, many favour rows. `directions` says which inner
products are wanted: "all" (N R, N' R'), example slowest, or "same", summed over r = s: (N, N').
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..layout import Layout, assemble
from .forms import Form, Outer, Rows, Stored
from .inputs import DenseInputs, IndexInputs, Inputs, with_bias

__all__ = ["add_products", "met", "mirror", "over", "row_products", "row_squares", "settled"]

PAIR_NUMBERS = 2**21  # of a tile of g g'^T, small enough to stay in cache
LEAST_NUMBERS = 2**17  # of a smaller tile, made for symmetry's sake
ROW_BYTES = 2**26  # of a tile of rows
HALVED = 192  # below it a symmetric product is too small to be worth halving
ELEMENTWISE = 8  # what touching a number costs, in multiply-adds of a matrix product


def add_products(
    left: Form, right: Form, directions: str, out: Tensor, way: str = "auto", *, half: bool = False
) -> None:
    """Add the inner products of all rows to `out`.

    Args:
        left: (R, N, p).
        right: of the same block, (R', N', p).
        directions: "all" or "same".
        out: (N R, N' R') or (N, N').
        way: "pairs", "rows", or "auto", the cheaper one. What is no `Outer` has rows only.
        half: whether left is right, and the lower triangle of out is enough.
    """
    if not (isinstance(left, Outer) and isinstance(right, Outer)):
        _from_rows(left, right, directions, out, half)
    elif way == "pairs" or (way == "auto" and _pairs_are_cheaper(left, right, directions, half)):
        _from_pairs(left, right, directions, out, half)
    else:
        _from_outer_rows(left, right, directions, out, half)


def settled(form: Form, directions: str, limit: int) -> Form:
    """The rows of a form that will meet many others, if products are made from them.

    Args:
        form: (R, N, p).
        directions: "all" or "same".
        limit: how many bytes the rows may take.
    """
    if not isinstance(form, Outer) or _pairs_are_cheaper(form, form, directions, False):
        return form
    r, n, size = form.shape
    if r * n * size * form.dtype.itemsize > limit:
        return form
    rows = form.rows().transpose(0, 1).contiguous()  # (N,R,p) in memory, as products want them
    return Stored(rows.transpose(0, 1))


def row_squares(form: Form) -> Tensor:
    """|J_n[r]|^2, (N, R)."""
    if isinstance(form, Outer) and form.g.shape[3] == 1:
        gg = form.g.squeeze(3).square().sum(-1)  # (R,N,G)
        return torch.einsum("rng,ng->nr", gg, _input_squares(form).to(gg))
    tiles = [form.rows(a, b).square().sum(-1) for a, b in form.tiles()]
    return torch.cat(tiles, 1).mT


def row_products(form: Form) -> Tensor:
    """The inner products of the rows of each example, (N, R, R)."""
    if isinstance(form, Outer) and form.g.shape[3] == 1:
        g = form.g.squeeze(3)
        gg = torch.einsum("rngo,sngo->ngrs", g, g)
        return torch.einsum("ngrs,ng->nrs", gg, _input_squares(form).to(gg))
    parts = []
    for a, b in form.tiles():
        rows = form.rows(a, b).transpose(0, 1)
        parts.append(rows @ rows.mT)
    return torch.cat(parts)


def _input_squares(form: Outer) -> Tensor:
    """|x[n, g]|^2 (N, G) of a form with one position."""
    ones = form.g.new_ones(form.g.shape[1], form.g.shape[2])
    if form.inputs is None:
        return ones
    if isinstance(form.inputs, IndexInputs):
        squares = form.inputs.weight.square().to(ones)
    else:
        parts = [form.inputs.dense(a, b) for a, b in form.inputs.tiles()]
        squares = torch.cat([part.square().sum((2, 3)) for part in parts])
    return squares + 1 if form.bias else squares


def _pairs_are_cheaper(left: Outer, right: Outer, directions: str, half: bool) -> bool:
    r, n, groups, t, o = left.g.shape
    s, m, _, u, _ = right.g.shape
    share = 0.5 if half else 1.0
    i = 0 if left.inputs is None else left.inputs.shape[3]
    if isinstance(left.inputs, IndexInputs):
        i = ELEMENTWISE
    tracks = r * s if directions == "all" else 1
    inner = o if directions == "all" else r * o
    pairs: float = share * n * m * groups * t * u * (i + tracks * (inner + ELEMENTWISE))
    made = r * n * t + (0 if half else s * m * u)
    rows: float = made * groups * o * left.width
    rows += share * n * m * (r * s if directions == "all" else r) * groups * o * left.width
    return pairs <= rows


def _from_pairs(left: Outer, right: Outer, directions: str, out: Tensor, half: bool) -> None:
    r, n, _, t, _ = left.g.shape
    s, m, _, u, _ = right.g.shape
    every = directions == "all"
    a, b = (r, s) if every else (1, 1)
    one = (n * a * t) * (m * b * u) // (n * m)  # numbers of a pair of examples
    step = max(1, int((PAIR_NUMBERS / max(1, one)) ** 0.5))
    if half:
        step = min(step, max(-(-n // 4), int((LEAST_NUMBERS / max(1, one)) ** 0.5), 1))
    block = out.unflatten(1, (m, b)).unflatten(0, (n, a))  # (N,a,N',b)
    for rows in _ranges(n, step):
        gl = _paired(left.g[:, rows.start : rows.stop], every)
        for cols in _ranges(rows.stop if half else m, step):
            gr = _paired(right.g[:, cols.start : cols.stop], every)
            gg = gl @ gr.mT  # (G, n a t, n' b u)
            gg = gg.unflatten(2, (len(cols), b, u)).unflatten(1, (len(rows), a, t))
            xx = _input_products(left, right, rows, cols)  # (G,n,t,n',u)
            target = block[rows.start : rows.stop, :, cols.start : cols.stop]
            if xx is None:
                target += gg.sum((0, 3, 6))
            elif gg.shape[0] == t == u == 1:
                target.addcmul_(gg[0, :, :, 0, :, :, 0], xx[0, :, 0, :, 0][:, None, :, None])
            else:
                target += (gg * xx[:, :, None, :, :, None, :]).sum((0, 3, 6))


def _paired(g: Tensor, every: bool) -> Tensor:
    """(R, n, G, T, o) as (G, n R T, o), or with directions joined (G, n T, R o)."""
    g = g.permute(2, 1, 0, 3, 4) if every else g.permute(2, 1, 3, 0, 4)
    groups, n = g.shape[:2]
    if every:
        return g.reshape(groups, n * g.shape[2] * g.shape[3], g.shape[4])
    return g.reshape(groups, n * g.shape[2], g.shape[3] * g.shape[4])


def _input_products(left: Outer, right: Outer, rows: range, cols: range) -> Tensor | None:
    """x . x' (G, n, t, n', u), with the homogeneous coordinate; None if that is all."""
    x, y = left.inputs, right.inputs
    if x is None or y is None:
        return None
    if isinstance(x, IndexInputs) and isinstance(y, IndexInputs):
        one, other = x.index[rows.start : rows.stop], y.index[cols.start : cols.stop]
        same = (one[:, :, None, None] == other).to(left.dtype)
        weighted = x.weight[rows.start : rows.stop, :, None, None].to(left.dtype)
        xx = (same * weighted * y.weight[cols.start : cols.stop].to(left.dtype)).unsqueeze(0)
    else:
        one, other = (
            inputs.dense(part.start, part.stop).transpose(0, 1).flatten(1, 2)
            for inputs, part in ((x, rows), (y, cols))
        )  # (G, n t, i)
        xx = (one @ other.mT).unflatten(2, (len(cols), -1)).unflatten(1, (len(rows), -1))
    return xx + 1 if left.bias else xx


def _from_outer_rows(left: Outer, right: Outer, directions: str, out: Tensor, half: bool) -> None:
    """From rows of some outputs at a time, with dense inputs made once."""
    left = _ready(left)
    right = left if half else _ready(right)
    o = left.g.shape[4]
    largest = max(left.shape[0], right.shape[0])
    one = largest * left.g.shape[2] * left.width * left.g.element_size()  # an output's
    examples = max(1, ROW_BYTES // one)
    for rows in _ranges(left.shape[1], examples):
        for cols in _ranges(rows.stop if half else right.shape[1], examples):
            outputs = max(1, ROW_BYTES // (one * max(len(rows), len(cols))))
            same = half and rows == cols
            for start in range(0, o, outputs):
                made = _flat_rows(left, rows, slice(start, start + outputs), directions)
                other = (
                    made
                    if same
                    else _flat_rows(right, cols, slice(start, start + outputs), directions)
                )
                _add_product(made, other, _tile(out, left, right, rows, cols, directions), same)


def _flat_rows(form: Outer, examples: range, outputs: slice, directions: str) -> Tensor:
    narrow = replace(form, g=form.g[..., outputs])
    return _flattened(narrow.rows(examples.start, examples.stop), directions)


def _from_rows(left: Form, right: Form, directions: str, out: Tensor, half: bool) -> None:
    for a, b in left.tiles():
        made = _flattened(left.rows(a, b), directions)
        for c, d in right.tiles():
            if half and c >= b:
                continue
            other = _flattened(right.rows(c, d), directions)
            tile = _tile(out, left, right, range(a, b), range(c, d), directions)
            _add_product(made, other, tile, False)


def _flattened(rows: Tensor, directions: str) -> Tensor:
    """(R, n, p) as (n R, p), or (n, R p)."""
    rows = rows.transpose(0, 1)
    return rows.flatten(0, 1) if directions == "all" else rows.flatten(1)


def _tile(
    out: Tensor, left: Form, right: Form, rows: range, cols: range, directions: str
) -> Tensor:
    r, s = (left.shape[0], right.shape[0]) if directions == "all" else (1, 1)
    return out[rows.start * r : rows.stop * r, cols.start * s : cols.stop * s]


def _add_product(x: Tensor, y: Tensor, out: Tensor, half: bool) -> None:
    """x y^T; with half, if y is x, at least the lower triangle: 5/8 of it in two halvings."""
    if not half or len(x) < HALVED:
        out.addmm_(x, y.mT)
        return
    h = len(x) // 2
    _add_product(x[:h], y[:h], out[:h, :h], True)
    _add_product(x[h:], y[h:], out[h:, h:], True)
    out[h:, :h].addmm_(x[h:], y[:h].mT)


def _ready(form: Outer) -> Outer:
    """The same with dense inputs, if they fit, that have the homogeneous coordinate."""
    if form.inputs is None:
        return form
    inputs: Inputs = form.inputs.prepared(None, form.bias)
    if form.bias and isinstance(inputs, DenseInputs):
        return replace(form, inputs=DenseInputs(with_bias(inputs.x)), bias=False)
    return replace(form, inputs=inputs)


def met(
    left: Sequence[Layout], right: Sequence[Layout]
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Which blocks of two tilings of a flat vector fill the same coordinates, as few as can be."""
    if left == right:
        return [((k,), (k,)) for k in range(len(left))]
    both, groups = [*left, *right], list[list[int]]()
    for k, layout in enumerate(both):
        touched = [group for group in groups if any(_overlap(layout, both[j]) for j in group)]
        groups = [group for group in groups if group not in touched]
        groups.append(sorted([k, *(j for group in touched for j in group)]))
    n = len(left)
    return [
        (tuple(k for k in group if k < n), tuple(k - n for k in group if k >= n))
        for group in groups
    ]


def over(layouts: Sequence[Layout], forms: Sequence[Form | None]) -> Form | None:
    """The forms of some blocks as rows of all their coordinates, in flat order; None is zero."""
    known = [form for form in forms if form is not None]
    if not known:
        return None
    (r, n, _), size = known[0].shape, sum(layout.size for layout in layouts)

    def compute(start: int, stop: int) -> Tensor:
        made = [None if form is None else form.rows(start, stop) for form in forms]
        zero = next(rows for rows in made if rows is not None).new_zeros(())
        placed: list[tuple[int, Tensor]] = []
        for layout, rows in zip(layouts, made, strict=True):
            rows = zero.expand(r, stop - start, layout.size) if rows is None else rows
            placed += layout.scatter(rows.unsqueeze(-1))
        return assemble(placed).squeeze(-1)

    return Rows(compute, (r, n, size), known[0].dtype)


def _overlap(a: Layout, b: Layout) -> bool:
    return any(x.start < y.stop and y.start < x.stop for x in a.slices for y in b.slices)


def _ranges(n: int, step: int) -> Iterator[range]:
    for start in range(0, n, step):
        yield range(start, min(start + step, n))


def mirror(out: Tensor, step: int = 256) -> None:
    """Copy the lower triangle to the upper one, in place."""
    for part in _ranges(len(out), step):
        a, b = part.start, part.stop
        out[a:b, b:] = out[b:, a:b].mT
        tile = out[a:b, a:b]
        tile.copy_(tile.tril() + tile.tril(-1).mT)
