"""Strided patches of images, and the second moment of patches from correlations.

Patches of a stride-1 convolution have a second moment for each pair of kernel taps (a, b). It
depends only on their offset b - a, up to thin strips at the border. So 13 correlations replace the
81 blocks of a 3x3 kernel's moment, and no patch is ever stored. With fewer positions than inputs,
or few channels, one product of all patches is cheaper.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from .moments import add_products

__all__ = ["Geometry", "columns", "live_taps", "patch_moment", "unfold"]

FEW_CHANNELS = 8  # of a group: with fewer, correlations are thin
TILE_NUMBERS = 2**22  # patches are made for so many examples at a time

Box = tuple[tuple[int, int], ...]  # a half-open range for each spatial dimension


@dataclass(frozen=True)
class Geometry:
    """Kernel, stride, zero padding (before, after), dilation and groups of a convolution.

    Negative padding crops. `flipped` lists the kernel's taps in reverse, as a transposed
    convolution's weight does.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int
    flipped: bool = False

    @property
    def volume(self) -> int:
        """How many kernel taps there are."""
        return math.prod(self.kernel)

    def output(self, spatial: Sequence[int]) -> tuple[int, ...]:
        """The output's spatial shape."""
        return tuple(
            (size + lo + hi - d * (k - 1) - 1) // s + 1
            for size, k, s, (lo, hi), d in zip(
                spatial, self.kernel, self.stride, self.padding, self.dilation, strict=True
            )
        )

    def positions(self, spatial: Sequence[int]) -> int:
        """How many positions there are."""
        return math.prod(self.output(spatial))


def unfold(images: Tensor, geometry: Geometry) -> Tensor:
    """All patches: (N, C, *spatial) -> (N, C * kernel volume, T), channel slowest."""
    u: Tensor = _unfold(images, geometry)
    if geometry.flipped and geometry.volume > 1:
        u = u.unflatten(1, (-1, geometry.volume)).flip(2).flatten(1, 2)
    return u


def _unfold(images: Tensor, geometry: Geometry) -> Tensor:
    pad = [p for pair in reversed(geometry.padding) for p in pair]
    uneven = any(lo != hi or lo < 0 for lo, hi in geometry.padding)
    if len(geometry.kernel) > 2:
        return _unfold_views(F.pad(images, pad), geometry)
    padding = tuple(lo for lo, _ in geometry.padding)
    if uneven:
        images, padding = F.pad(images, pad), (0,) * len(padding)
    kernel, stride, dilation = geometry.kernel, geometry.stride, geometry.dilation
    if len(kernel) == 1:
        images = images.unsqueeze(2)
        kernel, stride, dilation = (1, *kernel), (1, *stride), (1, *dilation)
        padding = (0, *padding)
    return F.unfold(images, kernel, dilation=dilation, padding=padding, stride=stride)


def _unfold_views(images: Tensor, geometry: Geometry) -> Tensor:
    view = images
    for axis, (k, s, d) in enumerate(
        zip(geometry.kernel, geometry.stride, geometry.dilation, strict=True)
    ):
        view = view.unfold(2 + axis, d * (k - 1) + 1, s)[..., ::d]  # (N, C, *out, *kernel)
    nd = len(geometry.kernel)
    order = (0, 1, *range(2 + nd, 2 + 2 * nd), *range(2, 2 + nd))
    return view.permute(order).reshape(images.shape[0], images.shape[1] * geometry.volume, -1)


def live_taps(geometry: Geometry, spatial: Sequence[int]) -> list[int]:
    """The kernel's taps, in the order of the weight, that see more than padding."""
    sizes = geometry.output(spatial)
    seen = [
        [any(0 <= k * s + tap * d - lo < size for k in range(out)) for tap in range(kernel)]
        for kernel, s, d, (lo, _), out, size in zip(
            geometry.kernel,
            geometry.stride,
            geometry.dilation,
            geometry.padding,
            sizes,
            spatial,
            strict=True,
        )
    ]
    taps = [all(each) for each in itertools.product(*seen)]
    taps = taps[::-1] if geometry.flipped else taps
    return [k for k, live in enumerate(taps) if live]


def columns(images: Tensor, geometry: Geometry) -> Tensor:
    """All patches with the positions of all examples side by side: (N, C, *spatial) -> (G, w, N T).

    The taps of a flipped kernel come in the order of the kernel's own.
    """
    nd = len(geometry.kernel)
    pad = [p for pair in reversed(geometry.padding) for p in pair]
    view = F.pad(images, pad) if any(pad) else images
    for axis, (k, s, d) in enumerate(
        zip(geometry.kernel, geometry.stride, geometry.dilation, strict=True)
    ):
        view = view.unfold(2 + axis, d * (k - 1) + 1, s)[..., ::d]  # (N, C, *out, *kernel)
    if geometry.flipped:
        view = view.flip(tuple(range(2 + nd, 2 + 2 * nd)))
    view = view.permute(1, *range(2 + nd, 2 + 2 * nd), 0, *range(2, 2 + nd))
    width = images.shape[1] // geometry.groups * geometry.volume
    return view.reshape(geometry.groups, width, -1)


def patch_moment(images: Tensor, geometry: Geometry, into: Tensor | None = None) -> Tensor:
    """Sum over examples and positions of patch patch^T, (G, w, w), or added to `into`."""
    n, channels = images.shape[0], images.shape[1] // geometry.groups
    width = channels * geometry.volume
    out = images.new_zeros(geometry.groups, width, width) if into is None else into
    positions = geometry.positions(images.shape[2:])
    slides = set(geometry.stride) == {1} and geometry.volume > 1 and channels >= FEW_CHANNELS
    if slides and n * positions > width:
        return out.add_(_moment_by_correlation(images, geometry))
    step = max(1, TILE_NUMBERS // (images.shape[1] * geometry.volume * positions))
    for start in range(0, n, step):
        add_products(columns(images[start : start + step], geometry), out)
    return out


def _moment_by_correlation(images: Tensor, geometry: Geometry) -> Tensor:
    n, c = images.shape[:2]
    groups, spatial = geometry.groups, images.shape[2:]
    y = images.reshape(n, groups, c // groups, *spatial).movedim(0, 2)  # (G, C/G, N, *spatial)
    taps = list(itertools.product(*(range(k) for k in geometry.kernel)))
    taps = taps[::-1] if geometry.flipped else taps
    out = y.new_zeros(groups, len(taps), c // groups, len(taps), c // groups)
    windows = [_window(tap, geometry, spatial) for tap in taps]
    pairs: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for (i, a), (j, b) in itertools.product(enumerate(taps), repeat=2):
        pairs.setdefault(tuple(t - s for s, t in zip(a, b, strict=True)), []).append((i, j))
    # With zeros behind each row, a shift is a step in memory: what it moves beyond an edge is zero.
    reach = [d * (k - 1) for k, d in zip(geometry.kernel, geometry.dilation, strict=True)]
    padded = F.pad(y, [p for size in reversed(reach) for p in (0, size)])
    steps, flat = padded.stride()[3:], padded.flatten(2)
    every = tuple((0, size) for size in spatial)
    for offset, members in pairs.items():
        if offset < (0,) * len(offset):
            continue  # the transpose of the opposite offset
        shift = tuple(o * d for o, d in zip(offset, geometry.dilation, strict=True))
        hull = _meet(every, _shifted(every, shift))
        if _empty(hull):
            continue
        step = sum(s * size for s, size in zip(shift, steps, strict=True))
        full = flat[..., : flat.shape[-1] - step] @ flat[..., step:].mT
        strips: dict[Box, Tensor] = {}
        for i, j in members:
            box = _meet(windows[i], _shifted(windows[j], shift))
            if _empty(box):
                continue
            block = out[:, i, :, j].copy_(full)
            for strip in _difference(hull, box):
                if strip not in strips:
                    strips[strip] = _correlate(y, strip, shift)
                block -= strips[strip]
            out[:, j, :, i] = block.mT
    return out.permute(0, 2, 1, 4, 3).reshape(groups, c // groups * len(taps), -1)


def _window(tap: tuple[int, ...], geometry: Geometry, spatial: Sequence[int]) -> Box:
    """The data that a tap touches, one element for each output position inside the image."""
    sizes = geometry.output(spatial)
    box = []
    for t, d, (lo, _), out, size in zip(
        tap, geometry.dilation, geometry.padding, sizes, spatial, strict=True
    ):
        start = t * d - lo
        box.append((max(start, 0), min(start + out, size)))
    return tuple(box)


def _shifted(box: Box, shift: tuple[int, ...]) -> Box:
    return tuple((lo - s, hi - s) for (lo, hi), s in zip(box, shift, strict=True))


def _meet(a: Box, b: Box) -> Box:
    return tuple((max(p[0], q[0]), min(p[1], q[1])) for p, q in zip(a, b, strict=True))


def _empty(box: Box) -> bool:
    return any(lo >= hi for lo, hi in box)


def _difference(outer: Box, inner: Box) -> Iterator[Box]:
    """Boxes that tile `outer` without `inner` (which lies inside it)."""
    done: list[tuple[int, int]] = []
    for axis, ((lo, hi), (a, b)) in enumerate(zip(outer, inner, strict=True)):
        for strip in ((lo, a), (b, hi)):
            if strip[0] < strip[1]:
                yield (*done, strip, *outer[axis + 1 :])
        done.append((a, b))


def _correlate(y: Tensor, box: Box, shift: tuple[int, ...]) -> Tensor:
    """Sum over examples and u in the box of y[u] y[u + shift]^T: (G, C/G, C/G)."""
    groups, channels = y.shape[:2]
    here: tuple[Any, ...] = tuple(slice(lo, hi) for lo, hi in box)
    there: tuple[Any, ...] = tuple(
        slice(lo + s, hi + s) for (lo, hi), s in zip(box, shift, strict=True)
    )
    left = y[(..., *here)].reshape(groups, channels, -1)
    right = y[(..., *there)].reshape(groups, channels, -1)
    return left @ right.mT
