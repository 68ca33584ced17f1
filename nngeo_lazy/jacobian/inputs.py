"""The input factor of an `Outer` form: dense vectors, indices, or patches of an image.

Each stands for x[n, g, t, i] (example, group, position, input), and need not store it. It answers
the three questions that the forms ask: the dense tensor, its second moment, and its coordinates in
another basis. A homogeneous coordinate (the bias) is appended by the caller's `bias` flag.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ..precision import narrow
from ..sides import is_dense, rows_times, size_of
from .moments import moment
from .patch_sums import PatchMoment, cheapest
from .patches import Geometry, unfold

__all__ = ["DenseInputs", "IndexInputs", "Inputs", "PatchInputs", "rotate"]

TILE_NUMBERS = 2**22  # inputs that are not stored are made a tile of examples at a time
CACHED_BYTES = 2**27  # a layer's dense inputs are kept for all directions up to this size


def with_bias(x: Tensor) -> Tensor:
    """Append the homogeneous coordinate: (..., i) -> (..., i + 1)."""
    return torch.cat([x, x.new_ones(*x.shape[:-1], 1)], -1)


def rotate(x: Tensor, basis: Tensor) -> Tensor:
    """(..., G, T, i), (G, i, w) -> (..., G, T, w); one large product if there is one group."""
    if basis.dim() > 3 or basis.shape[1] > basis.shape[2]:  # no matrix (`sides`)
        return rows_times(x, basis)
    if basis.shape[0] > 1 or x.stride(-1) != 1:
        return x @ basis
    return (x.reshape(-1, x.shape[-1]) @ basis[0]).view(*x.shape[:-1], -1)


def outer(g: Tensor, x: Tensor) -> Tensor:
    """Sum over t of g x^T: (R,n,G,T,o), (n,G,T,w) -> (R,n,G,o,w)."""
    r, n, groups, t, o = g.shape
    if r == 1:
        return (g.squeeze(0).mT @ x).unsqueeze(0)
    # All directions of an example against its x at once: one (R o, T) product.
    stacked = g.permute(1, 2, 0, 4, 3).reshape(n, groups, r * o, t)
    product = (stacked @ x).view(n, groups, r, o, x.shape[-1])
    return product.permute(2, 0, 1, 3, 4)


class Inputs(ABC):
    """x[n, g, t, i] of one layer and one batch."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int, int]:
        """(N, G, T, i)."""

    @abstractmethod
    def dense(self, start: int = 0, stop: int | None = None) -> Tensor:
        """The dense tensor (n, G, T, i) of a range of examples."""

    @abstractmethod
    def moment(self, bias: bool, into: Tensor | None = None) -> Tensor:
        """Sum over n, t of x x^T: (G, w, w), or its diagonal (G, w) if that is all there is.

        Added to `into` if given.
        """

    def grown(self, bias: bool, before: PatchMoment | None) -> PatchMoment | None:
        """What `moment` is made of at the end, if that is cheaper than one for each batch.

        Added to that of the batches before, or a new one if they differ.
        """
        return None

    @abstractmethod
    def examples(self, start: int, stop: int) -> Inputs:
        """The same of a range of examples."""

    def square_sum(self, bias: bool) -> Tensor:
        """The diagonal of `moment`, (G, w)."""
        n, groups, t, _ = self.shape
        squares = torch.stack([self.dense(k, k + 1).square().sum((0, 2)) for k in range(n)]).sum(0)
        return torch.cat([squares, squares.new_full((groups, 1), n * t)], 1) if bias else squares

    @abstractmethod
    def reduced(self) -> DenseInputs:
        """The mean over positions, (N, G, 1, i): the input of KFAC-reduce."""

    @abstractmethod
    def concatenate(self, others: list[Inputs]) -> Inputs:
        """These and other uses of the same weight, along T."""

    @abstractmethod
    def to(self, dtype: torch.dtype) -> Inputs:
        """The same in another dtype."""

    def kept(self, mask: Tensor) -> Inputs:
        """The same with zeros at the positions outside of a mask (N, T)."""
        return DenseInputs(self.dense() * mask[:, None, :, None])

    def counted(self, mask: Tensor) -> Tensor:
        """The positions of a mask (N, T) that the input factor has."""
        return mask

    def squared(self) -> Inputs:
        """The same with squared numbers."""
        return DenseInputs(self.dense().square())

    def positions(self) -> Tensor | int:
        """How many positions there are over all examples, N T."""
        n, _, t, _ = self.shape
        return n * t

    def outer(
        self, g: Tensor, start: int = 0, stop: int | None = None, bias: bool = False
    ) -> Tensor:
        """Sum over t of g x^T for a range of examples: (R, n, G, T, o) -> (R, n, G, o, w)."""
        product = self._outer(g, start, stop)
        return torch.cat([product, g.sum(3).unsqueeze(-1)], -1) if bias else product

    def _outer(self, g: Tensor, start: int, stop: int | None) -> Tensor:
        return outer(g, self.dense(start, stop))

    def times(self, matrix: Tensor) -> Tensor:
        """x times a matrix for each group: (G, i, m) -> (N, G, T, m)."""
        return torch.cat([self.dense(a, b) @ matrix for a, b in self.tiles()])

    def against(self, g: Tensor) -> Tensor:
        """Sum over n, t of g x^T: (N, G, T, o) -> (G, o, i)."""
        parts = [(g[a:b].mT @ self.dense(a, b)).sum(0) for a, b in self.tiles()]
        return torch.stack(parts).sum(0)

    def tiles(self) -> Iterator[tuple[int, int]]:
        """Ranges of examples whose dense x fills about one tile."""
        n, *one = self.shape
        step = max(1, TILE_NUMBERS // max(1, math.prod(one)))
        for start in range(0, n, step):
            yield start, min(start + step, n)

    def masked(self, g: Tensor) -> Tensor:
        """Output gradients (R, N, G, T, o), zero if x is zero by the layer's definition."""
        return g

    def prepared(self, basis: Tensor | None, bias: bool) -> Inputs:
        """x for many directions, in the coordinates of `basis` (G, w, w) if given.

        Dense and kept if that fits; otherwise made a range of examples at a time.
        """
        lazy = self if basis is None else RotatedInputs(self, basis, bias)
        size = torch.Size(lazy.shape).numel() * 4
        return DenseInputs(lazy.dense()) if size <= CACHED_BYTES else lazy


@dataclass(frozen=True)
class DenseInputs(Inputs):
    """Stored x (N, G, T, i), whose numbers are those of a `narrow` dtype if that is given."""

    x: Tensor
    narrow: torch.dtype | None = None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, G, T, i)."""
        n, g, t, i = self.x.shape
        return n, g, t, i

    def dense(self, start: int = 0, stop: int | None = None) -> Tensor:
        """The dense tensor (n, G, T, i) of a range of examples."""
        return self.x[start:stop]

    def examples(self, start: int, stop: int) -> DenseInputs:
        """The same of a range of examples."""
        return replace(self, x=self.x[start:stop])

    def to(self, dtype: torch.dtype) -> DenseInputs:
        """The same in another dtype."""
        return DenseInputs(self.x.to(dtype), narrow(self.x))

    def kept(self, mask: Tensor) -> DenseInputs:
        """The same with zeros at the positions outside of a mask (N, T)."""
        return replace(self, x=self.x * mask[:, None, :, None])

    def outer(
        self, g: Tensor, start: int = 0, stop: int | None = None, bias: bool = False
    ) -> Tensor:
        """Sum over t of g x^T for a range of examples: (R, n, G, T, o) -> (R, n, G, o, w)."""
        x = self.x[start:stop]
        return outer(g, with_bias(x) if bias else x)  # the rows are larger than x: not copied

    def times(self, matrix: Tensor) -> Tensor:
        """x times a matrix for each group: (G, i, m) -> (N, G, T, m)."""
        n, groups, t, i = self.x.shape
        if groups == 1:  # one large product, if a batched one would be N small ones
            return (self.x.reshape(n * t, i) @ matrix[0]).view(n, 1, t, -1)
        return self.x @ matrix

    def against(self, g: Tensor) -> Tensor:
        """Sum over n, t of g x^T: (N, G, T, o) -> (G, o, i)."""
        n, groups, t, i = self.x.shape
        if groups == 1:  # one large product
            return (g.reshape(n * t, -1).mT @ self.x.reshape(n * t, i)).unsqueeze(0)
        return (g.mT @ self.x).sum(0)

    def moment(self, bias: bool, into: Tensor | None = None) -> Tensor:
        """Sum over n, t of x x^T: (G, w, w), or its diagonal (G, w) if that is all there is."""
        return moment(self.x, bias, into, self.narrow)

    def square_sum(self, bias: bool) -> Tensor:
        """The diagonal of `moment`, (G, w)."""
        return (with_bias(self.x) if bias else self.x).square().sum((0, 2))

    def reduced(self) -> DenseInputs:
        """The mean over positions, (N, G, 1, i): the input of KFAC-reduce."""
        return DenseInputs(self.x.mean(2, keepdim=True))

    def concatenate(self, others: list[Inputs]) -> Inputs:
        """These and other uses of the same weight, along T."""
        return DenseInputs(torch.cat([self.x, *(other.dense() for other in others)], 2))


@dataclass(frozen=True)
class IndexInputs(Inputs):
    """One-hot x, stored as indices (N, T) into `width`; positions outside the mask are zero."""

    index: Tensor
    width: int
    mask: Tensor | None
    dtype: torch.dtype = torch.float32

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, G, T, i)."""
        n, t = self.index.shape
        return n, 1, t, self.width

    def examples(self, start: int, stop: int) -> IndexInputs:
        """The same of a range of examples."""
        mask = None if self.mask is None else self.mask[start:stop]
        return replace(self, index=self.index[start:stop], mask=mask)

    def to(self, dtype: torch.dtype) -> IndexInputs:
        """The same in another dtype."""
        return replace(self, dtype=dtype)

    def _outer(self, g: Tensor, start: int, stop: int | None) -> Tensor:
        r, n, _, t, o = g.shape
        where = self.index[start:stop].unsqueeze(-1).expand(r, n, t, o)
        weighted = g.squeeze(2) * self.weight[start:stop].unsqueeze(-1)
        rows = g.new_zeros(r, n, self.width, o).scatter_add_(2, where, weighted)
        return rows.mT.unsqueeze(2)

    def times(self, matrix: Tensor) -> Tensor:
        """x times a matrix for each group: (G, i, m) -> (N, G, T, m)."""
        return (matrix[0][self.index] * self.weight.unsqueeze(-1)).unsqueeze(1)

    def against(self, g: Tensor) -> Tensor:
        """Sum over n, t of g x^T: (N, G, T, o) -> (G, o, i)."""
        weighted = (g.squeeze(1) * self.weight.unsqueeze(-1)).flatten(0, 1)  # (N T,o)
        out = g.new_zeros(self.width, g.shape[-1]).index_add_(0, self.index.flatten(), weighted)
        return out.mT.unsqueeze(0)

    def masked(self, g: Tensor) -> Tensor:
        """Output gradients (R, N, G, T, o), zero if x is zero by the layer's definition."""
        return g if self.mask is None else g * self.weight[:, None, :, None]

    def kept(self, mask: Tensor) -> IndexInputs:
        """The same with zeros at the positions outside of a mask (N, T)."""
        return replace(self, mask=self.counted(mask))

    def counted(self, mask: Tensor) -> Tensor:
        """The positions of a mask (N, T) that the input factor has."""
        return mask if self.mask is None else mask & self.mask.bool()

    @property
    def weight(self) -> Tensor:
        """(N, T): one, or zero outside the mask."""
        ones = torch.ones(self.index.shape, dtype=self.dtype, device=self.index.device)
        return ones if self.mask is None else ones * self.mask

    def dense(self, start: int = 0, stop: int | None = None) -> Tensor:
        """The dense tensor (n, G, T, i) of a range of examples."""
        index = self.index[start:stop]
        x = torch.zeros(*index.shape, self.width, dtype=self.dtype, device=index.device)
        x.scatter_(-1, index.unsqueeze(-1), self.weight[start:stop].unsqueeze(-1))
        return x.unsqueeze(1)

    def moment(self, bias: bool, into: Tensor | None = None) -> Tensor:
        """Sum over n, t of x x^T: (G, w, w), or its diagonal (G, w) if that is all there is."""
        weight = self.weight
        histogram = weight.new_zeros(1, self.width) if into is None else into
        histogram[0].index_add_(0, self.index.flatten(), weight.flatten())
        return histogram

    def square_sum(self, bias: bool) -> Tensor:
        """The diagonal of `moment`, (G, w)."""
        return self.moment(bias)  # diagonal as it is

    def reduced(self) -> DenseInputs:
        """The mean over positions, (N, G, 1, i): the input of KFAC-reduce."""
        n, t = self.index.shape
        mean = torch.zeros(n, self.width, dtype=self.dtype, device=self.index.device)
        mean.scatter_add_(1, self.index, self.weight / t)
        return DenseInputs(mean[:, None, None])

    def concatenate(self, others: list[Inputs]) -> Inputs:
        """These and other uses of the same weight, along T."""
        same = [other for other in others if isinstance(other, IndexInputs)]
        if len(same) < len(others):
            return DenseInputs(self.dense()).concatenate(others)
        index = torch.cat([self.index, *(other.index for other in same)], 1)
        mask = torch.cat([self.weight, *(other.weight for other in same)], 1) > 0
        return IndexInputs(index, self.width, mask, self.dtype)

    def prepared(self, basis: Tensor | None, bias: bool) -> Inputs:
        """x for many directions, in the coordinates of `basis` (G, w, w) if given."""
        return self if basis is None else super().prepared(basis, bias)

    def positions(self) -> Tensor | int:
        """How many positions there are over all examples, N T."""
        return self.index.numel() if self.mask is None else self.mask.sum()

    def segments(self) -> tuple[Tensor, Tensor]:
        """Positions of an example that share an index: slots (N, T) in 0..T-1, and slot -> index.

        Slots are assigned by sorting, so that no count has to reach the host.
        """
        ordered, order = torch.sort(self.index, dim=1, stable=True)
        fresh = F.pad(ordered[:, 1:] != ordered[:, :-1], (1, 0)).cumsum(1)
        slots = torch.empty_like(order).scatter_(1, order, fresh)
        owner = torch.zeros_like(ordered).scatter_(1, fresh, ordered)
        return slots, owner


@dataclass(frozen=True)
class PatchInputs(Inputs):
    """The patches of a convolution's input (N, C, *spatial); `uses` examples share an entry of N.

    The patches, kernel-volume times the data, are made when asked for, a range of examples at a
    time. Their second moment seldom needs them (see `patch_sums`).
    """

    images: Tensor  # (N * uses, C, *spatial)
    geometry: Geometry
    uses: int = 1

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, G, T, i)."""
        g = self.geometry
        width = self.images.shape[1] // g.groups * g.volume
        positions = g.positions(self.images.shape[2:]) * self.uses
        return self.images.shape[0] // self.uses, g.groups, positions, width

    def examples(self, start: int, stop: int) -> PatchInputs:
        """The same of a range of examples."""
        return replace(self, images=self.images[start * self.uses : stop * self.uses])

    def to(self, dtype: torch.dtype) -> PatchInputs:
        """The same in another dtype."""
        return replace(self, images=self.images.to(dtype))

    def dense(self, start: int = 0, stop: int | None = None) -> Tensor:
        """The dense tensor (n, G, T, i) of a range of examples."""
        stop = self.shape[0] if stop is None else stop
        n, groups, _, width = self.shape
        u = unfold(self.images[start * self.uses : stop * self.uses], self.geometry)
        u = u.reshape(min(stop, n) - start, self.uses, groups, width, -1)  # (n, U, G, i, T')
        if self.uses == 1:
            return u.squeeze(1).mT
        return u.permute(0, 2, 1, 4, 3).flatten(2, 3)

    def moment(self, bias: bool, into: Tensor | None = None) -> Tensor:
        """Sum over n, t of x x^T: (G, w, w), or its diagonal (G, w) if that is all there is."""
        grown = PatchMoment(self.images, self.geometry, bias)
        grown.add(self.images)
        return grown.finish(into)

    @property
    def products(self) -> float:
        """Multiply-adds of `moment`, for each example."""
        cropped, _ = self.geometry.cropped(self.images.shape[2:])
        one = self.images.shape[1] // self.geometry.groups, *self.images.shape[2:]
        return self.uses * cheapest(cropped, one, len(self.images), self.images).products

    def grown(self, bias: bool, before: PatchMoment | None) -> PatchMoment:
        """What `moment` is made of at the end, added to that of the batches before if it can be."""
        if before is None or not before.takes(self.images, self.geometry):
            before = PatchMoment(self.images, self.geometry, bias)
        before.add(self.images)
        return before

    def reduced(self) -> DenseInputs:
        """The mean over positions, (N, G, 1, i): the input of KFAC-reduce."""
        n, _, t, _ = self.shape
        parts = [self.dense(k, k + 1).sum(2, keepdim=True) for k in range(n)]
        return DenseInputs(torch.cat(parts) / t)

    def concatenate(self, others: list[Inputs]) -> Inputs:
        """These and other uses of the same weight, along T."""
        return DenseInputs(self.dense()).concatenate(others)


@dataclass(frozen=True)
class RotatedInputs(Inputs):
    """Another's x, with its homogeneous coordinate, in the coordinates of a basis (G, w, w)."""

    base: Inputs
    basis: Tensor
    bias: bool

    @property
    def shape(self) -> tuple[int, int, int, int]:
        n, groups, t, _ = self.base.shape
        return n, groups, t, size_of(self.basis)

    def examples(self, start: int, stop: int) -> RotatedInputs:
        return replace(self, base=self.base.examples(start, stop))

    def to(self, dtype: torch.dtype) -> RotatedInputs:
        return RotatedInputs(self.base.to(dtype), self.basis.to(dtype), self.bias)

    def dense(self, start: int = 0, stop: int | None = None) -> Tensor:
        x = self.base.dense(start, stop)
        if not self.bias:
            return rotate(x, self.basis)
        if not is_dense(self.basis):
            return rotate(with_bias(x), self.basis)
        return rotate(x, self.basis[:, :-1]).add_(self.basis[:, -1:])

    def moment(self, bias: bool, into: Tensor | None = None) -> Tensor:
        return DenseInputs(self.dense()).moment(bias, into)

    def reduced(self) -> DenseInputs:
        return DenseInputs(self.dense()).reduced()

    def concatenate(self, others: list[Inputs]) -> Inputs:
        return DenseInputs(self.dense()).concatenate(others)
