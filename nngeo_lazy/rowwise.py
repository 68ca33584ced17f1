"""What is made of the rows of a Jacobian while they pass by: products, and quadratic forms."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .jacobian.forms import Form, Outer
from .jacobian.inputs import IndexInputs, with_bias
from .jacobian.parts import Kind, Part
from .jacobian.passes import Recorded
from .layout import Layout, assemble
from .operators import (
    BaseLinearOperator,
    BlockDiagonalLinearOperator,
    DiagonalLinearOperator,
    EigenKroneckerLinearOperator,
    KroneckerLinearOperator,
)
from .sides import is_diagonal, plain

__all__ = [
    "Piece",
    "as_outputs",
    "columns",
    "low_rank_products",
    "position_products",
    "products",
    "quadratics",
]

COLUMN_BYTES = 2**26  # of columns of J^T at a time
TILE_NUMBERS = 2**22  # of rows in an eigenbasis at a time


@dataclass(frozen=True)
class Piece:
    """A batch, or a part of it, whose rows are used while they pass by.

    Attributes:
        batch: the number of its batch.
        parts: the parameters by form.
        recorded: the forward pass.
        count: how many directions it has.
        directions: all of them.
    """

    batch: int
    parts: Sequence[Part]
    recorded: Recorded
    count: int
    directions: Iterator[Tensor]

    def forms(self) -> Iterator[list[Form | None]]:
        """Every part's form, for one chunk of directions after the other."""
        for forms, _, _ in self.recorded.chunks(self.directions, self.count):
            yield forms


# --- quadratic forms ------------------------------------------------------------------------------


def quadratics(
    forms: Sequence[Form | None], parts: Sequence[Part], M: BaseLinearOperator, *, full: bool
) -> Tensor:
    """J_n M J_n^T of each example: (N, R, R), or its diagonal (N, R).

    Blocks of M that are diagonal, also in a Kronecker basis, are met by the layers' inputs and
    output gradients. Any other M is applied to rows, a tile of examples at a time.

    Args:
        forms: of the parts, None if a part is zero.
        parts: where they lie in the flat vector.
        M: symmetric, P x P.
        full: whether all pairs of directions are wanted.
    """
    present = [form for form in forms if form is not None]
    r, n, _ = present[0].shape
    out = torch.zeros((n, r, r) if full else (n, r), dtype=M.dtype, device=M.device)
    members: list[tuple[Layout | None, BaseLinearOperator]] = list(_blocks(M, parts).items())
    members = members or [(None, M)]
    known = {part.layout: form for part, form in zip(parts, forms, strict=True)}
    rest = []
    for layout, block in members:
        form = known.get(layout) if layout is not None else None
        values = None if layout is None else _spectrum(layout, block)
        if isinstance(form, Outer) and values is not None:
            out += _of_outer(_as(form, M.dtype), *values, full)
        elif layout not in known or form is not None:  # what no batch uses is zero
            rest.append((layout, block))
    if rest:
        for (a, b), tile in columns(forms, parts, M):  # (P, n R)
            for layout, block in rest:
                rows = tile if layout is None else layout.gather(tile)
                out[a:b] += _pairs(rows, block._apply(rows), r, full)
    return out


def columns(
    forms: Sequence[Form | None], parts: Sequence[Part], like: BaseLinearOperator
) -> Iterator[tuple[tuple[int, int], Tensor]]:
    """J^T (P, n R), example slowest, of a range of examples at a time."""
    r, n, _ = next(form.shape for form in forms if form is not None)
    size = sum(part.layout.size for part in parts)
    step = max(1, COLUMN_BYTES // (r * size * torch.finfo(like.dtype).bits // 8))
    for a in range(0, n, step):
        b = min(a + step, n)
        placed = []
        for form, part in zip(forms, parts, strict=True):
            if form is None:
                shape = (part.layout.size, (b - a) * r)
                rows = torch.zeros(shape, dtype=like.dtype, device=like.device)
            else:
                rows = form.rows(a, b).transpose(0, 1).flatten(0, 1).mT.to(like.dtype)
            placed += part.layout.scatter(rows)
        yield (a, b), assemble(placed)


def products(
    forms: Sequence[Form | None],
    parts: Sequence[Part],
    M: BaseLinearOperator,
    layouts: Sequence[Layout],
) -> Iterator[tuple[Layout, Tensor]]:
    """M J^T on each of some layouts that cover the flat vector: (p, n R), example slowest.

    One block after the other, if M and the forms have these blocks: then the flat columns are never
    held. Else some examples at a time.
    """
    blocks = _blocks(M, parts)
    known = {part.layout: form for part, form in zip(parts, forms, strict=True)}
    if all(layout in blocks and layout in known for layout in layouts):
        r, n, _ = next(form.shape for form in forms if form is not None)
        for layout in layouts:
            form = known[layout]
            if form is None:
                yield layout, torch.zeros(layout.size, n * r, dtype=M.dtype, device=M.device)
            else:
                rows = form.rows().transpose(0, 1).flatten(0, 1).mT
                yield layout, blocks[layout]._apply(rows.to(M.dtype))
        return
    for _, tile in columns(forms, parts, M):
        moved = M @ tile
        for layout in layouts:
            yield layout, layout.gather(moved)


def as_outputs(piece: Piece, M: BaseLinearOperator, *, full: bool) -> Tensor | None:
    """`quadratics` of all outputs of a piece if its layers are the last one, else None.

    Output c has the gradient e_c there, which need not be passed back: that of random numbers is
    these numbers themselves. M has a known spectrum on each block. Memory N R, or N R^2.
    """
    blocks = _blocks(M, piece.parts)
    used = [part for part in piece.parts if part.kind is not Kind.UNUSED]
    spectra = [_spectrum(p.layout, blocks[p.layout]) for p in used if p.layout in blocks]
    outputs = piece.recorded.outputs
    n, count = outputs.shape[0], piece.count
    fits = all(p.kind is Kind.OUTER and p.layout.groups * p.layout.rows == count for p in used)
    if not used or not fits or len(spectra) < len(used) or any(s is None for s in spectra):
        return None
    z = torch.randn(outputs.shape, dtype=outputs.dtype, device=outputs.device)
    ((forms, _, _),) = piece.recorded.chunks(iter([z]), 2)  # the graph stays for more
    out = torch.zeros((n, count, count) if full else (n, count), dtype=M.dtype, device=M.device)
    present = [form for form in forms if form is not None]
    for form, spectrum in zip(present, spectra, strict=True):
        if not isinstance(form, Outer) or spectrum is None or form.g.shape[2:4] != (1, 1):
            return None
        if not torch.equal(form.g.reshape(n, -1), z.reshape(n, -1).to(form.g)):
            return None
        values, left, right = spectrum
        scale = _scale(_as(form, M.dtype), values, right).squeeze(1)  # (N,o)
        if not full:
            out += scale if left is None else scale @ left[0].square().mT
        elif left is None:
            out += scale.diag_embed()
        else:
            out += (left[0] * scale.unsqueeze(1)) @ left[0].mT
    return out


def _blocks(M: BaseLinearOperator, parts: Sequence[Part]) -> dict[Layout, BaseLinearOperator]:
    """The blocks of a matrix and where they lie; none if it has no blocks."""
    if isinstance(M, BlockDiagonalLinearOperator):
        return {layout: block for _, layout, block in M.parts}
    if isinstance(M, DiagonalLinearOperator):
        own = [part.layout.gather(M.diag.unsqueeze(-1)).squeeze(-1) for part in parts]
        return {p.layout: DiagonalLinearOperator(d) for p, d in zip(parts, own, strict=True)}
    return {}


Spectrum = tuple[Tensor, Tensor | None, Tensor | None]  # (G,o,w), (G,o,o), (G,w,w); None: identity


def _spectrum(layout: Layout, block: BaseLinearOperator) -> Spectrum | None:
    """Eigenvalues on a block's grid, and the two bases, if it has such a form."""
    if isinstance(block, DiagonalLinearOperator):
        return block.diag.reshape(layout.groups, layout.rows, layout.width), None, None
    if isinstance(block, KroneckerLinearOperator):
        block = block.eigen()
    if not isinstance(block, EigenKroneckerLinearOperator):
        return None
    bases = block.bases()
    if not all(plain(basis) for basis in bases):
        return None
    left, right = (None if is_diagonal(basis) else basis for basis in bases)
    return block.values, left, right


def _as(form: Outer, dtype: torch.dtype) -> Outer:
    if form.dtype == dtype:
        return form
    inputs = None if form.inputs is None else form.inputs.to(dtype)
    return replace(form, g=form.g.to(dtype), inputs=inputs)


def _scale(form: Outer, values: Tensor, right: Tensor | None) -> Tensor:
    """sum_i values[o, i] x~[n, i]^2 of a form with one position, x~ in the right basis: (N,G,o)."""
    n, groups = form.g.shape[1:3]
    if isinstance(form.inputs, IndexInputs) and right is None and not form.bias:
        picked = values[0].mT[form.inputs.index[:, 0]]  # (N,o)
        return (picked * form.inputs.weight).unsqueeze(1)
    x = values.new_ones(n, groups, 1)
    if form.inputs is not None:
        x = form.inputs.dense().squeeze(2)
        x = with_bias(x) if form.bias else x
    if right is not None:
        x = torch.einsum("ngi,gij->ngj", x, right)
    return torch.einsum("ngi,goi->ngo", x.square(), values)


def _of_outer(
    form: Outer, values: Tensor, left: Tensor | None, right: Tensor | None, full: bool
) -> Tensor:
    """J_n Q diag(values) Q^T J_n^T with Q = left kron right."""
    if form.g.shape[3] == 1:
        g = form.g.squeeze(3)  # (R,N,G,o)
        g = g if left is None else torch.einsum("rngo,gop->rngp", g, left)
        scale = _scale(form, values, right)
        if full:
            return torch.einsum("rngo,ngo,sngo->nrs", g, scale, g)
        return torch.einsum("rngo,ngo->nr", g.square(), scale)
    if isinstance(form.inputs, IndexInputs) and right is None and not form.bias and not full:
        return _of_indices(form, form.inputs, values, left)
    r, n, p = form.shape
    step = max(1, TILE_NUMBERS // max(1, r * p))
    found, flat = [], values.flatten()
    for a in range(0, n, step):
        rows = form.rows(a, min(a + step, n)).unflatten(2, values.shape)  # (R,n,G,o,w)
        rows = rows if right is None or form.inputs is None else rows @ right
        rows = rows if left is None else left.mT @ rows
        rows = rows.flatten(2).transpose(0, 1)  # (n,R,p)
        found.append((rows * flat) @ rows.mT if full else rows.square() @ flat)
    return torch.cat(found)


def _of_indices(form: Outer, inputs: IndexInputs, values: Tensor, left: Tensor | None) -> Tensor:
    """The diagonal for an embedding, whose rows are never made: (N, R)."""
    g = form.g if left is None else form.g @ left
    slots, owner = inputs.segments()  # (N,T): positions of one index share a slot
    g = g.squeeze(2) * inputs.weight.unsqueeze(-1)  # (R,N,T,o)
    where = slots.expand(g.shape[:3]).unsqueeze(-1).expand_as(g)
    summed = torch.zeros_like(g).scatter_add_(2, where, g)
    return torch.einsum("rnto,nto->nr", summed.square_(), values[0].mT[owner])


def _pairs(rows: Tensor, products: Tensor, r: int, full: bool) -> Tensor:
    """J_n M J_n^T from J^T and M J^T, (p, n R) both: (n, R, R), or (n, R)."""
    if not full:
        squares: Tensor = (rows * products).sum(0).unflatten(0, (-1, r))
        return squares
    one, other = (each.unflatten(1, (-1, r)) for each in (rows, products))
    return torch.einsum("pnc,pnd->ncd", one, other)


# --- products -------------------------------------------------------------------------------------


def position_products(form: Outer, vectors: Tensor) -> Tensor:
    """What each position adds to the product of a row with columns: (p, k) -> (N, T, k).

    Of one direction: g[n,t]^T V_k x[n,t].
    """
    groups, o = form.g.shape[2], form.g.shape[4]
    v = vectors.to(form.dtype).reshape(groups, o, form.width, -1)
    g = form.g.squeeze(0)  # (N,G,T,o)
    tiles = []
    for part in v.split(max(1, TILE_NUMBERS // max(1, g.numel())), -1):
        moved = g.new_zeros(())
        if form.inputs is not None:
            along = part[:, :, : form.inputs.shape[3]].transpose(1, 2).flatten(2)  # (G,i,o k)
            moved = form.inputs.times(along).unflatten(-1, (o, -1))  # (N,G,T,o,k)
        if form.bias:
            moved = moved + part[:, :, -1].unsqueeze(1)  # (G,1,o,k)
        tiles.append(torch.einsum("ngto,ngtok->ntk", g, moved.expand(*g.shape, part.shape[-1])))
    return torch.cat(tiles, -1)


def low_rank_products(form: Outer, left: Tensor, right: Tensor) -> Tensor:
    """The products of a row with matrices left_k right_k, each position's: (N, T, k).

    Args:
        form: of one direction.
        left: (k, G, o, r).
        right: (k, G, r, w).
    """
    k, groups, o, r = left.shape
    g = form.g.squeeze(0)
    outputs = g @ left.permute(1, 2, 0, 3).reshape(groups, o, k * r)  # (N,G,T,k r)
    along = right.permute(1, 3, 0, 2).reshape(groups, -1, k * r)  # (G,w,k r)
    inputs = g.new_zeros(())
    if form.inputs is not None:
        inputs = form.inputs.times(along[:, : form.inputs.shape[3]])
    if form.bias:
        inputs = inputs + along[:, -1:]  # (G,1,k r)
    products: Tensor = (outputs * inputs).unflatten(-1, (k, r)).sum((1, 4))
    return products
