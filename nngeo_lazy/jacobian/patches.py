"""Strided patches of images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor
from torch.nn import functional as F

__all__ = ["Geometry", "columns", "unfold"]


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

    def cropped(self, spatial: Sequence[int]) -> tuple[Geometry, list[range]]:
        """The part of the kernel that sees more than padding, and its taps along each axis.

        They come in the order of the weight; none are left if everything is padding.
        """
        padding, seen = [], []
        sizes = self.output(spatial)
        for kernel, s, d, (lo, hi), out, size in zip(
            *(self.kernel, self.stride, self.dilation, self.padding, sizes, spatial), strict=True
        ):
            live = [
                tap
                for tap in range(kernel)
                if any(0 <= k * s + tap * d - lo < size for k in range(out))
            ]
            first, last = (live[0], live[-1] + 1) if live else (0, 0)
            padding.append((lo - first * d, hi - (kernel - last) * d))
            seen.append(
                range(kernel - last, kernel - first) if self.flipped else range(first, last)
            )
        kernel = tuple(map(len, seen))
        return replace(self, kernel=kernel, padding=tuple(padding)), seen


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
