"""Second moments of patches from sums that are smaller: the patches themselves are seldom made.

A convolution's patches hold every pixel once for each kernel tap, so that their second moment says
the same many times over. Three sums lead to it, and a count of operations says which is taken.

| sum | is | is cheap for |
|---|---|---|
| `Products` | the moment itself, from patches | strides, few positions |
| `Correlations` | pixels times shifted pixels, for each offset between taps | many channels |
| `Pixels` | pixels times pixels, for each pair of places in the image | small images, depthwise |

The sums of all batches are added, and the moment is made of them once.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .moments import SPLIT_WIDTH, add_border, add_products
from .patches import Geometry, columns, unfold

__all__ = ["Correlations", "PatchMoment", "Pixels", "Products", "Sums", "cheapest"]

FEW_CHANNELS = 8  # of a group: with fewer, correlations are thin
TILE_NUMBERS = 2**22  # patches are made for so many examples at a time
SUM_NUMBERS = 2**22  # a sum is at most so large, or as large as the moment
ADDED = 8  # what adding to a number costs, in multiply-adds of a large matrix product
COPIED = 32  # what copying one that lies apart from its neighbours costs, likewise
ENDED = 16  # the same in what is made once at the end, for several batches
ROWS = 8  # products of few rows are as slow as if there were so many more
CALL = 2**19  # what a call costs, likewise

Box = tuple[tuple[int, int], ...]  # a half-open range for each spatial dimension


class Sums(ABC):
    """Sums over examples of images (N, G c, *spatial) of one shape.

    Args:
        geometry: of a convolution with groups G and kernel volume V.
        shape: (c, *spatial).
        like: says the dtype and the device.
    """

    def __init__(self, geometry: Geometry, shape: Sequence[int], like: Tensor) -> None:
        self._geometry, self._like = geometry, like.new_empty(0)
        self._channels, self._spatial = shape[0], tuple(shape[1:])

    @property
    @abstractmethod
    def numbers(self) -> int:
        """How large they are."""

    @property
    @abstractmethod
    def products(self) -> float:
        """Multiply-adds of the matrix products, for each example."""

    @abstractmethod
    def cost(self, examples: int) -> float:
        """Multiply-adds of matrix products, for a batch of examples and its share of the end."""

    @abstractmethod
    def add(self, images: Tensor) -> None:
        """Add a batch."""

    @abstractmethod
    def moment(self) -> Tensor:
        """Sum over examples and positions of patch patch^T, (G, c V, c V); the end of the sums."""

    @property
    def _width(self) -> int:
        return self._channels * self._geometry.volume


class Products(Sums):
    """The moment itself."""

    _total: Tensor | None = None

    @property
    def numbers(self) -> int:
        """How large they are."""
        return self._geometry.groups * self._width**2

    @property
    def products(self) -> float:
        """Multiply-adds of the matrix products, for each example."""
        return self.numbers * self._geometry.positions(self._spatial) * self._half

    @property
    def _half(self) -> float:  # `moments` says why
        return 5 / 8 if self._geometry.groups == 1 and self._width >= SPLIT_WIDTH else 1

    def cost(self, examples: int) -> float:
        """Multiply-adds of matrix products, for a batch of examples and its share of the end."""
        groups, width = self._geometry.groups, self._width
        positions = examples * self._geometry.positions(self._spatial)
        one = positions * (self._half * (width + ROWS) ** 2 + COPIED * width)
        return groups * (one + ADDED * width**2)

    def add(self, images: Tensor) -> None:
        """Add a batch."""
        groups, width = self._geometry.groups, self._width
        if self._total is None:
            self._total = images.new_zeros(groups, width, width)
        one = groups * width * self._geometry.positions(self._spatial)
        step = max(1, TILE_NUMBERS // max(1, one))
        for start in range(0, len(images), step):
            add_products(columns(images[start : start + step], self._geometry), self._total)

    def moment(self) -> Tensor:
        """The moment; the end of the sums."""
        total, self._total = self._total, None
        groups, width = self._geometry.groups, self._width
        return self._like.new_zeros(groups, width, width) if total is None else total


class Pixels(Sums):
    """Sum over examples of x[u] x[v]^T for all places u and v of the image."""

    _total: Tensor | None = None

    @property
    def numbers(self) -> int:
        """How large they are."""
        size = self._channels * math.prod(self._spatial)
        return self._geometry.groups * size**2

    @property
    def products(self) -> float:
        """Multiply-adds of the matrix products, for each example."""
        return self.numbers * self._half

    @property
    def _half(self) -> float:
        size = self._channels * math.prod(self._spatial)
        return 5 / 8 if self._geometry.groups == 1 and size >= SPLIT_WIDTH else 1

    def cost(self, examples: int) -> float:
        """Multiply-adds of matrix products, for a batch of examples and its share of the end."""
        groups, size = self._geometry.groups, self._channels * math.prod(self._spatial)
        products = examples * self._half * (size + ROWS) ** 2
        touched, left = 0.0, float(size**2)
        outputs = self._geometry.output(self._spatial)
        for kernel, out, place in zip(self._geometry.kernel, outputs, self._spatial, strict=True):
            left *= kernel**2 / place**2
            touched += left * min(out, place)
        calls = sum(kernel**2 for kernel in self._geometry.kernel)
        return groups * (products + ADDED * size**2 + ENDED * touched) + calls * CALL / 4

    def add(self, images: Tensor) -> None:
        """Add a batch."""
        groups = self._geometry.groups
        pixels = images.reshape(len(images), groups, -1).permute(1, 2, 0)  # (G, c places, N)
        if self._total is None:
            size = pixels.shape[1]
            self._total = images.new_zeros(groups, size, size)
        add_products(pixels, self._total)

    def moment(self) -> Tensor:
        """The moment; the end of the sums."""
        geometry, nd, one = self._geometry, len(self._spatial), (self._channels, *self._spatial)
        total, self._total = self._total, None
        if total is None:
            return self._like.new_zeros(geometry.groups, self._width, self._width)
        total = total.view(-1, *one, *one)
        outputs = geometry.output(self._spatial)
        for axis in range(nd):  # (a, b of the axes before, G, c, *left, c, *left)
            first = 2 * axis + 2
            second = first + nd - axis + 1
            pairs = [
                self._along(total, axis, outputs[axis], (first, second), taps)
                for taps in itertools.product(range(geometry.kernel[axis]), repeat=2)
            ]
            total = torch.stack(pairs).unflatten(0, (geometry.kernel[axis],) * 2)
        order = (*range(2 * nd - 2, -1, -2), *range(2 * nd - 1, 0, -2))  # a..., b..., last first
        return self._ordered(total.permute(*order, *range(2 * nd, total.dim())))

    def _ordered(self, taps: Tensor) -> Tensor:
        """(a..., b..., G, c, c) for the taps a and b of all axes to (G, c V, c V)."""
        nd = len(self._spatial)
        if self._geometry.flipped:
            taps = taps.flip(tuple(range(2 * nd)))
        order = (2 * nd, 2 * nd + 1, *range(nd), 2 * nd + 2, *range(nd, 2 * nd))
        return taps.permute(order).reshape(-1, self._width, self._width)

    def _along(
        self, total: Tensor, axis: int, out: int, dims: tuple[int, int], taps: Sequence[int]
    ) -> Tensor:
        """Sum over the positions along an axis, for a pair of taps."""
        geometry = self._geometry
        stride, dilation = geometry.stride[axis], geometry.dilation[axis]
        starts = [tap * dilation - geometry.padding[axis][0] for tap in taps]
        low = max(0, *(-(start // stride) for start in starts))
        high = min(out, *((self._spatial[axis] - 1 - start) // stride + 1 for start in starts))
        if low >= high:
            return total.new_zeros([s for dim, s in enumerate(total.shape) if dim not in dims])
        view = total
        for dim, start in zip(dims, starts, strict=True):
            places = range(start + low * stride, start + (high - 1) * stride + 1)
            view = view.narrow(dim, places.start, len(places))
            view = view[(slice(None),) * dim + (slice(None, None, stride),)]
        return view.diagonal(dim1=dims[0], dim2=dims[1]).sum(-1)


class Correlations(Sums):
    """Sum over examples and places u in a box of x[u] x[u + s]^T, for offsets s between taps.

    Of a stride-1 convolution. Two taps with the offset s meet at all places but thin strips at the
    border. So 13 sums and those of the strips replace the 81 blocks of a 3x3 kernel's moment.
    """

    def __init__(self, geometry: Geometry, shape: Sequence[int], like: Tensor) -> None:
        super().__init__(geometry, shape, like)
        self._boxes, self._blocks = _meetings(geometry, self._spatial)
        self._total: Tensor | None = None

    @property
    def numbers(self) -> int:
        """How large they are."""
        return self._geometry.groups * len(self._boxes) * self._channels**2

    @property
    def products(self) -> float:
        """Multiply-adds of the matrix products, for each example."""
        return self._geometry.groups * self._volume * self._channels**2

    @property
    def _volume(self) -> float:
        wider = math.prod(self._padded[1:]) / math.prod(self._spatial[1:])
        return wider * sum(math.prod(hi - lo for lo, hi in box) for _, box in self._boxes)

    def cost(self, examples: int) -> float:
        """Multiply-adds of matrix products, for a batch of examples and its share of the end."""
        groups, c, places = self._geometry.groups, self._channels, math.prod(self._spatial)
        wider = math.prod(self._padded[1:]) / math.prod(self._spatial[1:])
        products = examples * self._volume * (c + ROWS) ** 2
        copied = examples * places * c * wider
        end = ENDED * self._width**2
        return groups * (products + COPIED * copied + end) + len(self._boxes) * CALL

    @property
    def _padded(self) -> tuple[int, ...]:
        """The spatial shape with zeros behind all rows, so that a shift is a step in memory."""
        known = zip(self._spatial, self._geometry.kernel, self._geometry.dilation, strict=True)
        padded = [size + d * (k - 1) for size, k, d in known]
        return self._spatial[0], *padded[1:]

    def add(self, images: Tensor) -> None:
        """Add a batch."""
        n, groups, c = len(images), self._geometry.groups, self._channels
        if self._total is None:
            self._total = images.new_zeros(len(self._boxes), groups, c, c)
        y = images.reshape(n, groups, c, *self._spatial).permute(
            1, 2, 3, 0, *range(4, 3 + len(self._spatial))
        )  # (G, c, places of the first axis, N, *other places)
        more = [p - s for p, s in zip(self._padded[1:], self._spatial[1:], strict=True)]
        y = F.pad(y, [p for size in reversed(more) for p in (0, size)]).contiguous()
        for k, (offset, box) in enumerate(self._boxes):
            left, right = self._met(y, offset, box)
            self._total[k].baddbmm_(left, right.mT)

    def _met(self, y: Tensor, offset: Sequence[int], box: Box) -> tuple[Tensor, Tensor]:
        """x[u] and x[u + s] for all examples and places of a box: (G, c, M) each."""
        (lo, hi), *rest = box
        full = [
            (max(0, -s), min(size, size - s)) for s, size in zip(offset, self._spatial, strict=True)
        ]
        if rest == full[1:]:  # what a shift moves beyond the end of a row is zero
            row, flat = y[0, 0, 0].numel(), y.flatten(2)
            within = sum(s * step for s, step in zip(offset[1:], y.stride()[4:], strict=True))
            start, stop = lo * row, hi * row - max(within, 0)
            step = offset[0] * row + within
            return flat[..., start:stop], flat[..., start + step : stop + step]
        here: tuple[Any, ...] = (slice(lo, hi), slice(None), *(slice(*one) for one in rest))
        there: tuple[Any, ...] = (
            slice(lo + offset[0], hi + offset[0]),
            slice(None),
            *(slice(a + s, b + s) for (a, b), s in zip(rest, offset[1:], strict=True)),
        )
        return y[(..., *here)].flatten(2), y[(..., *there)].flatten(2)

    def moment(self) -> Tensor:
        """The moment; the end of the sums."""
        geometry, total = self._geometry, self._total
        groups, c, volume = geometry.groups, self._channels, geometry.volume
        self._total = None
        if total is None:
            return self._like.new_zeros(groups, self._width, self._width)
        out = self._like.new_empty(groups, c, volume, c, volume)
        for (i, j), terms in self._blocks.items():
            block = self._like.new_zeros(groups, c, c)
            for sign, k in terms:
                block.add_(total[k], alpha=sign)
            a, b = (volume - 1 - i, volume - 1 - j) if geometry.flipped else (i, j)
            out[:, :, a, :, b] = block
            if a != b:
                out[:, :, b, :, a] = block.mT
        return out.view(groups, self._width, self._width)


@lru_cache(maxsize=256)
def _meetings(
    geometry: Geometry, spatial: tuple[int, ...]
) -> tuple[list[tuple[tuple[int, ...], Box]], dict[tuple[int, int], list[tuple[int, int]]]]:
    """Where taps meet: offsets with boxes, and for each pair of taps (sign, number of a box)."""
    boxes: dict[tuple[tuple[int, ...], Box], int] = {}
    blocks: dict[tuple[int, int], list[tuple[int, int]]] = {}
    taps = list(itertools.product(*(range(k) for k in geometry.kernel)))
    for (i, a), (j, b) in itertools.product(enumerate(taps), repeat=2):
        offset = tuple((t - s) * d for s, t, d in zip(a, b, geometry.dilation, strict=True))
        if offset < (0,) * len(offset):
            continue  # the transpose of the opposite one
        each = [_terms(geometry, spatial, axis, a[axis], b[axis]) for axis in range(len(a))]
        blocks[i, j] = []
        for terms in itertools.product(*each):
            key = offset, tuple(box for _, box in terms)
            number = boxes.setdefault(key, len(boxes))
            blocks[i, j].append((math.prod(sign for sign, _ in terms), number))
    return list(boxes), blocks


def _terms(
    geometry: Geometry, spatial: tuple[int, ...], axis: int, a: int, b: int
) -> list[tuple[int, tuple[int, int]]]:
    """The places along an axis where two taps meet: all, without strips; none if empty."""
    size, dilation = spatial[axis], geometry.dilation[axis]
    out, shift = geometry.output(spatial)[axis], (b - a) * dilation
    starts = [tap * dilation - geometry.padding[axis][0] for tap in (a, b)]
    # a tap touches one place for each position, as far as it is inside of the image
    windows = [(max(start, 0), min(start + out, size)) for start in starts]
    start, stop = max(0, -shift), min(size, size - shift)
    low = max(windows[0][0], windows[1][0] - shift)
    high = min(windows[0][1], windows[1][1] - shift)
    if low >= high:
        return []
    parts = [(1, (start, stop)), (-1, (start, low)), (-1, (high, stop))]
    return [(sign, (lo, hi)) for sign, (lo, hi) in parts if lo < hi]


def cheapest(geometry: Geometry, shape: Sequence[int], examples: int, like: Tensor) -> Sums:
    """The sums for images (c, *spatial) that take the fewest operations in such a batch."""
    known: list[Sums] = [Products(geometry, shape, like)]
    if geometry.volume > 1:
        known.append(Pixels(geometry, shape, like))
        if set(geometry.stride) == {1} and shape[0] >= FEW_CHANNELS:
            known.append(Correlations(geometry, shape, like))
    most = max(SUM_NUMBERS, known[0].numbers)
    return min((s for s in known if s.numbers <= most), key=lambda s: s.cost(examples))


class PatchMoment:
    """The second moment of patches, (G, w, w), of all batches whose images have one shape.

    Args:
        images: of the first batch (N, G c, *spatial).
        geometry: of the convolution.
        bias: whether the patches have a homogeneous coordinate.
    """

    def __init__(self, images: Tensor, geometry: Geometry, bias: bool) -> None:
        self._key = images.shape[1:], images.dtype, geometry
        self._geometry, self._bias = geometry, bias
        channels, spatial = images.shape[1] // geometry.groups, images.shape[2:]
        cropped, self._live = geometry.cropped(spatial)
        self._sums = cheapest(cropped, (channels, *spatial), len(images), images)
        self._image = images.new_zeros(1, *images.shape[1:]) if bias else None
        self._count = 0

    def takes(self, images: Tensor, geometry: Geometry) -> bool:
        """Whether a batch can be added."""
        return self._key == (images.shape[1:], images.dtype, geometry)

    def add(self, images: Tensor) -> None:
        """Add a batch."""
        if all(self._live):
            self._sums.add(images)
        if self._image is not None:
            self._image += images.sum(0)
        self._count += len(images)

    def finish(self, into: Tensor | None = None) -> Tensor:
        """The moment, or added to one; the sums are given up."""
        geometry, nd = self._geometry, len(self._live)
        part, (one, _, _) = self._sums.moment(), self._key
        c, width = one[0] // geometry.groups, one[0] // geometry.groups * geometry.volume
        whole = [len(live) for live in self._live] == list(geometry.kernel)
        if whole and not self._bias:
            return part if into is None else into.add_(part)
        size = width + self._bias
        out = part.new_zeros(geometry.groups, size, size) if into is None else into
        shape = [c, *geometry.kernel] * 2
        grid = out[:, :width, :width].unflatten(2, shape[: nd + 1]).unflatten(1, shape[: nd + 1])
        box = [slice(None), *(slice(live.start, live.stop) for live in self._live)]
        cropped = part.view(geometry.groups, *[c, *map(len, self._live)] * 2)
        grid[(slice(None), *box, *box)] += cropped  # other taps see padding alone: zeros
        if self._image is not None:
            total = unfold(self._image, geometry).sum(-1)  # linear in the images
            count = self._count * geometry.positions(one[1:])
            add_border(out, total.reshape(geometry.groups, -1), count, beta=1)
        return out
