"""The two canonical forms of a layer's per-example Jacobian, and what can be done with them.

`Outer`: J_n[r] = sum_t g[r,n,t] x[n,t]^T, for every layer that multiplies by a weight. `Rows`: the
rows themselves, for all else. (`summed.py` adds `Outer`s of one weight used in different layouts.)
Shapes, here and below: R directions, N examples, G groups, T
positions that share the weight, o outputs, i inputs, w = i (+ 1 with a bias, the homogeneous
coordinate last). A form's coordinates are (G, o, w), row-major, p = G o w of them: `layout.Layout`
knows where they lie.

Every operation is a plain sum over directions and examples; scales are the caller's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..sides import Shape, Wide
from .inputs import DenseInputs, IndexInputs, Inputs, rotate, with_bias
from .moments import add_squares, moment, wide_moment
from .patch_sums import PatchMoment

__all__ = ["Form", "Outer", "Placed", "Rows", "Stored", "second_moment"]

TILE_BYTES = 2**23  # rows are made a tile of examples at a time, small enough to stay in cache


class Form(ABC):
    """The Jacobian of one block's parameters in R directions, for N examples."""

    shape: tuple[int, int, int]  # (R, N, p)
    dtype: torch.dtype
    tile_bytes: int = TILE_BYTES

    @abstractmethod
    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        """The rows themselves, (R, n, p), of a range of examples."""

    def projected(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """The sum of all rows, each piece (grid rows, width) of a layout times a (width,)."""
        widths = [v.shape[0] for v in vectors]
        pieces = self.total().unflatten(0, (-1, sum(widths))).split(widths, 1)
        return [piece @ v for piece, v in zip(pieces, vectors, strict=True)]

    def total(self) -> Tensor:
        """Sum over r, n of the rows, (p,)."""
        return torch.stack([self.rows(a, b).sum((0, 1)) for a, b in self.tiles()]).sum(0)

    def totals(self) -> Tensor:
        """Sum over n of the rows, (R, p)."""
        r = self.shape[0]
        each = [self] if r == 1 else [self.direction(k) for k in range(r)]
        return torch.stack([one.total() for one in each])

    @abstractmethod
    def sqsum(self) -> Tensor:
        """Sum over r, n of the squared rows, (p,): the diagonal of the second moment."""

    def jvp(self, vectors: Tensor) -> Tensor:
        """Rows times columns: (p, k) -> (R, N, k)."""
        return torch.cat([self.rows(a, b) @ vectors for a, b in self.tiles()], 1)

    def vjp(self, weights: Tensor) -> Tensor:
        """Weighted sum of the rows: (R, N, k) -> (p, k)."""
        parts = [
            self.rows(a, b).flatten(0, 1).mT @ weights[:, a:b].flatten(0, 1)
            for a, b in self.tiles()
        ]
        return torch.stack(parts).sum(0)

    def examples(self, start: int, stop: int) -> Form:
        """The same of a range of examples."""
        return Stored(self.rows(start, stop))

    def direction(self, r: int) -> Form:
        """The same in one direction."""
        return Stored(self.rows()[r : r + 1])

    def tiles(self, copies: int = 1) -> Iterator[tuple[int, int]]:
        """Ranges of examples whose rows fill about one tile."""
        r, n, p = self.shape
        one = max(1, r * p * copies * torch.finfo(self.dtype).bits // 8)
        step = max(1, self.tile_bytes // one)
        for start in range(0, n, step):
            yield start, min(start + step, n)


@dataclass(frozen=True)
class Rows(Form):
    """Rows (R, N, p), made a range of examples at a time by `compute(start, stop)`."""

    compute: Callable[[int, int], Tensor]
    shape: tuple[int, int, int]
    dtype: torch.dtype
    tile_bytes: int = TILE_BYTES

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        """The rows themselves, (R, n, p), of a range of examples."""
        return self.compute(start, self.shape[1] if stop is None else min(stop, self.shape[1]))

    def sqsum(self) -> Tensor:
        """Sum over r, n of the squared rows, (p,): the diagonal of the second moment."""
        return torch.stack([self.rows(a, b).square().sum((0, 1)) for a, b in self.tiles()]).sum(0)


@dataclass(frozen=True)
class Placed(Rows):
    """Rows of some of p coordinates, zero at all others."""

    inner: Form | None = None
    index: Tensor | None = None  # where the inner form's coordinates lie, each once

    @classmethod
    def of(cls, inner: Form, index: Tensor, shape: tuple[int, int, int]) -> Placed:
        """The form of a block of which only the coordinates at an index are not zero."""

        def compute(start: int, stop: int) -> Tensor:
            rows = inner.rows(start, stop)
            return rows.new_zeros(*rows.shape[:2], shape[2]).index_copy_(2, index, rows)

        return cls(compute, shape, inner.dtype, inner=inner, index=index)

    def total(self) -> Tensor:
        """Sum over r, n of the rows, (p,)."""
        return self._placed(lambda inner: inner.total())

    def sqsum(self) -> Tensor:
        """Sum over r, n of the squared rows, (p,): the diagonal of the second moment."""
        return self._placed(lambda inner: inner.sqsum())

    def _placed(self, sums: Callable[[Form], Tensor]) -> Tensor:
        if self.inner is None or self.index is None:
            raise TypeError("rows without a place")
        made = sums(self.inner)
        return made.new_zeros(self.shape[2]).index_copy_(0, self.index, made)


@dataclass(frozen=True)
class Stored(Form):
    """Rows (R, N, p) that are kept as they are."""

    values: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:  # type: ignore[override]
        """(R, N, p)."""
        r, n, p = self.values.shape
        return r, n, p

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """Of the rows."""
        return self.values.dtype

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        """The rows themselves, (R, n, p), of a range of examples."""
        return self.values[:, start:stop]

    def sqsum(self) -> Tensor:
        """Sum over r, n of the squared rows, (p,): the diagonal of the second moment."""
        return torch.einsum("rnp,rnp->p", self.values, self.values)

    def jvp(self, vectors: Tensor) -> Tensor:
        """Rows times columns: (p, k) -> (R, N, k)."""
        return self.values @ vectors

    def vjp(self, weights: Tensor) -> Tensor:
        """Weighted sum of the rows: (R, N, k) -> (p, k)."""
        return self.values.flatten(0, 1).mT @ weights.flatten(0, 1)


@dataclass(frozen=True)
class Outer(Form):
    """J_n[r] = sum_t g[r,n,t] x[n,t]^T.

    Attributes:
        g: output gradients (R, N, G, T, o).
        inputs: the input factor; None if the block is a bias alone (x is the column of ones).
        bias: whether the homogeneous coordinate is appended to x.
        marks: what is known of the positions (N, T); None if all count (see `positions`).
        kept: the positions (N, T) that count in the input factor; None for all.
        narrow: the dtype that the numbers of g were in, if its products may be taken in it.
    """

    g: Tensor
    inputs: Inputs | None
    bias: bool
    marks: Tensor | None = None
    kept: Tensor | None = None
    narrow: torch.dtype | None = None

    @property
    def shape(self) -> tuple[int, int, int]:  # type: ignore[override]
        """(R, N, p)."""
        r, n, groups, _, o = self.g.shape
        return r, n, groups * o * self.width

    @property
    def bytes(self) -> int:
        """What keeping the output gradients takes; inputs are the same for all directions."""
        return self.g.numel() * self.g.element_size()

    @property
    def width(self) -> int:
        """How many inputs an output has, with the constant one of a bias."""
        return (0 if self.inputs is None else self.inputs.shape[3]) + int(self.bias)

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """Of the rows."""
        return self.g.dtype

    def examples(self, start: int, stop: int) -> Outer:
        """The same of a range of examples."""
        inputs = None if self.inputs is None else self.inputs.examples(start, stop)
        marks = None if self.marks is None else self.marks[start:stop]
        return replace(self, g=self.g[:, start:stop], inputs=inputs, marks=marks)

    def direction(self, r: int) -> Outer:
        """The same in one direction."""
        return replace(self, g=self.g[r : r + 1])

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        """The rows themselves, (R, n, p), of a range of examples."""
        g = self.g[:, start:stop]
        if self.inputs is None:
            return g.sum(3).flatten(2)
        return self.inputs.outer(g, start, stop, self.bias).flatten(2)  # (R,n,G,o,w) -> (R,n,p)

    def total(self) -> Tensor:
        """Sum over r, n of the rows, (p,)."""
        g = self.g.sum(0)  # (N,G,T,o)
        parts = [] if self.inputs is None else [self.inputs.against(g)]
        if self.bias:
            parts.append(g.sum((0, 2)).unsqueeze(-1))
        return torch.cat(parts, -1).flatten()

    def projected(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """The sum of all rows, each piece (grid rows, width) of a layout times a (width,)."""
        g = self.g.sum(0)  # (N,G,T,o)
        out = []
        if self.inputs is not None:
            along = self.inputs.times(vectors[0][:, None].expand(g.shape[1], -1, 1))  # (N,G,T,1)
            out.append((g * along).sum((0, 2)).flatten())
        if self.bias:
            out.append(g.sum((0, 2)).flatten() * vectors[-1])
        return out

    def sqsum(self) -> Tensor:
        """Sum over r, n of the squared rows, (p,): the diagonal of the second moment."""
        squares = self.squares()
        if squares is not None:
            return self.sqsum_from(squares)
        parts = []
        if isinstance(self.inputs, IndexInputs):
            parts.append(self._sqsum_indexed(self.inputs))
        elif self.inputs is not None:
            squares = self.g.new_zeros(self.g.shape[2], self.g.shape[4], self.inputs.shape[3])
            for a, b in self.tiles():  # of which one is in memory
                add_squares(self.inputs.outer(self.g[:, a:b], a, b).flatten(0, 1), squares)
            parts.append(squares)
        if self.bias:
            parts.append(self.g.sum(3).square().sum((0, 1)).unsqueeze(-1))  # (G,o,1)
        return torch.cat(parts, -1).flatten()

    def squares(self, into: Tensor | None = None) -> Tensor | None:
        """Sum over r of g^2, (N, G, o), if the squared rows need no more of g; else None.

        With a single position the square of an outer product is the outer product of squares, so
        that directions can be summed first: added to `into` if given.
        """
        if self.g.shape[3] > 1 or isinstance(self.inputs, IndexInputs):
            return None
        for g in self.g.squeeze(3):
            into = g.square() if into is None else into.addcmul_(g, g)
        return into

    def sqsum_from(self, squares: Tensor) -> Tensor:
        """`sqsum` from the sum of `squares` over all directions."""
        parts = []
        if self.inputs is not None:
            xx = self.inputs.dense().squeeze(2).square()  # (N,G,i)
            parts.append(squares.permute(1, 2, 0) @ xx.transpose(0, 1))  # (G,o,N),(G,N,i)
        if self.bias:
            parts.append(squares.sum(0).unsqueeze(-1))
        return torch.cat(parts, -1).flatten()

    def prepared(self, inputs: Inputs | None, rotated: bool, left: Tensor | None) -> Outer:
        """This form with prepared inputs (`Inputs.prepared`), g in the basis left (G, o, o).

        With both rotated, `sqsum` is the squared projections on left[:, a] kron right[:, b]:
        EKFAC's eigenvalues (George et al. 2018, eq. 10).
        """
        g = self.g if left is None else rotate(self.g, left)
        return Outer(g, inputs, self.bias and not rotated)

    def output_moment(self, diagonal: bool = False, into: Tensor | None = None) -> Tensor:
        """Sum over r, n, t of g g^T, (G, o, o), or its diagonal (G, o): KFAC's output factor.

        Added to `into` if given.
        """
        if diagonal:
            return _added(self.g.square().sum((0, 1, 3)), into)
        return moment(self.g.flatten(0, 1), into=into, narrow=self.narrow)

    def input_moment(self, diagonal: bool = False, into: Tensor | None = None) -> Tensor:
        """Sum over n, t of x x^T, (G, w, w), or its diagonal (G, w): KFAC's input factor."""
        if self.inputs is None:
            ones = self.g.new_ones(self.g.shape[2], 1, 1)
            return _added(ones * self.positions, into)
        inputs = self.inputs if self.kept is None else self.inputs.kept(self.kept)
        out = inputs.square_sum(self.bias) if diagonal else inputs.moment(self.bias, into)
        if self.bias and self.kept is not None:  # of the column of ones, all were counted
            corner = out[:, -1] if diagonal or out.dim() == 2 else out[:, -1, -1]
            corner -= (~self.kept).sum()
        return _added(out, into) if diagonal else out

    def output_side(self, shape: Shape, test: Tensor | None, into: Tensor | None) -> Tensor:
        """`output_moment` in the shape that is kept of it; a sketch needs its test matrix."""
        if shape.wide in (None, Wide.DIAGONAL):
            return self.output_moment(shape.wide is Wide.DIAGONAL, into)
        return wide_moment(self.g.flatten(0, 1), shape, test, into)

    def input_side(self, shape: Shape, test: Tensor | None, into: Tensor | None) -> Tensor:
        """`input_moment` in the shape that is kept of it; that of indices stays a histogram."""
        inputs = self.inputs
        if inputs is None or isinstance(inputs, IndexInputs) or shape.wide in (None, Wide.DIAGONAL):
            return self.input_moment(shape.wide is Wide.DIAGONAL, into)
        for a, b in inputs.tiles():
            x = inputs.dense(a, b)
            x = with_bias(x) if self.bias else x
            x = x if self.kept is None else x * self.kept[a:b, None, :, None]
            into = wide_moment(x, shape, test, into)
        if into is None:
            raise ValueError("a form without examples")
        return into

    def grown(self, shape: Shape, before: PatchMoment | None) -> PatchMoment | None:
        """What `input_side` is made of once, at the end (`Inputs.grown`); None if it is not."""
        if self.inputs is None or self.kept is not None or shape.wide is not None:
            return None
        return self.inputs.grown(self.bias, before)

    @property
    def positions(self) -> Tensor | int:
        """How many positions the input factor sums over, N T."""
        if self.kept is not None:
            exist = self.kept if self.inputs is None else self.inputs.counted(self.kept)
            return exist.sum()
        if self.inputs is None:
            return self.g.shape[1] * self.g.shape[3]
        return self.inputs.positions()

    @property
    def reached(self) -> Tensor:
        """The positions (N, T) at which any direction brings a gradient."""
        return self.g.abs().amax((0, 2, 4)) != 0  # an eighth of the time of any()

    def reduced(self) -> Outer:
        """(sum_t g, mean_t x) as a form with one position: the setting of KFAC-reduce."""
        g = self.g.sum(3, keepdim=True)
        if self.inputs is None or self.kept is None:
            inputs = None if self.inputs is None else self.inputs.reduced()
            kept = None if self.kept is None else self.kept.any(1, keepdim=True)
            return Outer(g, inputs, self.bias, kept=kept)
        t, count = self.kept.shape[1], self.kept.sum(1)
        mean = self.inputs.kept(self.kept).reduced().x
        scale = (t / count.clamp_min(1)).to(mean).view(-1, 1, 1, 1)
        return Outer(g, DenseInputs(mean * scale), self.bias, kept=(count > 0).unsqueeze(1))

    def jvp(self, vectors: Tensor) -> Tensor:
        """Rows times columns: (p, k) -> (R, N, k)."""
        if self._prefers_rows(vectors.shape[1]):
            return super().jvp(vectors)
        groups, o = self.g.shape[2], self.g.shape[4]
        v = vectors.reshape(groups, o, self.width, -1).transpose(1, 2)  # (G,w,o,k)
        out = self.g.new_zeros(())
        if self.inputs is not None:
            moved = self.inputs.times(v[:, : self.inputs.shape[3]].flatten(2))  # (N,G,T,o k)
            out = torch.einsum("rngto,ngtok->rnk", self.g, moved.unflatten(-1, (o, -1)))
        if self.bias:
            out = out + torch.einsum("rngo,gok->rnk", self.g.sum(3), v[:, -1])
        return out

    def vjp(self, weights: Tensor) -> Tensor:
        """Weighted sum of the rows: (R, N, k) -> (p, k)."""
        if self._prefers_rows(weights.shape[2]):
            return super().vjp(weights)
        o, k = self.g.shape[4], weights.shape[2]
        g = torch.einsum("rnk,rngto->ngtok", weights, self.g)
        parts = []
        if self.inputs is not None:
            parts.append(self.inputs.against(g.flatten(3)).unflatten(1, (o, k)).mT)
        if self.bias:
            parts.append(g.sum((0, 2)).unsqueeze(2))
        return torch.cat(parts, 2).flatten(0, 2)  # (G,o,w,k) -> (p,k)

    def _prefers_rows(self, columns: int) -> bool:
        """Whether rows are smaller than x times each column at each position."""
        r, _, _, t, _ = self.g.shape
        return r * self.width < t * columns

    def bias_cross(self) -> Tensor:
        """Sum over r, n of row[o, i] row[o, bias]: (G, o, i), for the quasi-diagonal."""
        if self.inputs is None or not self.bias:
            raise ValueError("bias_cross needs a weight and a bias")
        return self.inputs.against((self.g.sum(3, keepdim=True) * self.g).sum(0))

    def _sqsum_indexed(self, inputs: IndexInputs) -> Tensor:
        r, n, _, t, o = self.g.shape
        slots, owner = inputs.segments()  # (N,T): positions of one index share a slot
        g = self.g.squeeze(2) * inputs.weight[..., None]  # (R,N,T,o)
        where = slots.expand(r, n, t)[..., None].expand_as(g)
        summed = torch.zeros_like(g).scatter_add_(2, where, g)
        squared = summed.square_().sum(0).flatten(0, 1)  # (N T,o)
        out = g.new_zeros(inputs.width, o).index_add_(0, owner.flatten(), squared)
        return out.mT.unsqueeze(0)  # (1,o,V)


def _added(value: Tensor, into: Tensor | None) -> Tensor:
    return value if into is None else into.add_(value)


def second_moment(forms: Sequence[Form]) -> Tensor:
    """Sum over r, n of the joint rows' outer products, (p, p), the forms' coordinates in order."""
    total: Tensor | None = None
    p = sum(form.shape[2] for form in forms)
    widest = max(forms, key=lambda form: form.shape[2])
    for a, b in widest.tiles(copies=max(1, p // max(1, widest.shape[2]))):
        rows = torch.cat([form.rows(a, b) for form in forms], -1).flatten(0, 1)  # (R n, p)
        tile = rows.mT @ rows
        total = tile if total is None else total.add_(tile)
    if total is None:
        raise ValueError("forms without examples")
    return total
