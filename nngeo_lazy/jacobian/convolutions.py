"""Convolutions and transposed convolutions: the input factor is the patches of an image."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .inputs import PatchInputs
from .patches import Geometry
from .uses import Grid, Use, layer

__all__ = ["convolution", "transposed_convolution"]


@layer(torch.conv1d, "input weight bias stride padding dilation groups")
@layer(torch.conv2d, "input weight bias stride padding dilation groups")
@layer(torch.conv3d, "input weight bias stride padding dilation groups")
def convolution(call: Mapping[str, Any], output: Tensor) -> Use | str:
    """The weight (out, in / groups, *kernel) times the patches of the image."""
    weight, x = call["weight"], call["input"].detach()
    nd = weight.dim() - 2
    if x.dim() != nd + 2:
        return "a convolution of one unbatched image"
    kernel = tuple(weight.shape[2:])
    dilation = _each(call.get("dilation", 1), nd)
    padding = call.get("padding", 0)
    if padding == "same":  # torch puts the odd one at the end
        totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        pairs = tuple((total // 2, total - total // 2) for total in totals)
    elif padding == "valid":
        pairs = ((0, 0),) * nd
    else:
        pairs = tuple((p, p) for p in _each(padding, nd))
    groups = call.get("groups", 1)
    geometry = Geometry(kernel, _each(call.get("stride", 1), nd), pairs, dilation, groups)
    return Use(
        weight,
        call.get("bias"),
        leading=1,
        x=x,
        grid=Grid(groups, weight.shape[0] // groups, math.prod(weight.shape[1:])),
        gradients=lambda g: _by_group(g, groups),
        inputs=lambda x: PatchInputs(x.flatten(0, 1), geometry, uses=x.shape[1]),
    )


@layer(torch.conv_transpose1d, "input weight bias stride padding output_padding groups dilation")
@layer(torch.conv_transpose2d, "input weight bias stride padding output_padding groups dilation")
@layer(torch.conv_transpose3d, "input weight bias stride padding output_padding groups dilation")
def transposed_convolution(call: Mapping[str, Any], output: Tensor) -> Use | str:
    """A stride-1 convolution of the image with zeros between its pixels, kernel taps reversed.

    Its weight is stored (in, out / groups, *kernel): inputs (channel, tap) around the outputs.
    """
    weight, x = call["weight"], call["input"].detach()
    nd = weight.dim() - 2
    if x.dim() != nd + 2:
        return "a transposed convolution of one unbatched image"
    groups, kernel = call.get("groups", 1), tuple(weight.shape[2:])
    stride = _each(call.get("stride", 1), nd)
    dilation = _each(call.get("dilation", 1), nd)
    padding = _each(call.get("padding", 0), nd)
    more = _each(call.get("output_padding", 0), nd)
    before = [d * (k - 1) - p for d, k, p in zip(dilation, kernel, padding, strict=True)]
    pairs = tuple((b, b + m) for b, m in zip(before, more, strict=True))
    geometry = Geometry(kernel, (1,) * nd, pairs, dilation, groups, flipped=True)
    volume = geometry.volume
    width = weight.shape[0] // groups * volume
    return Use(
        weight,
        call.get("bias"),
        leading=1,
        x=x,
        grid=Grid(groups, weight.shape[1], width, transposed=True, inner=volume),
        gradients=lambda g: _by_group(g, groups),
        inputs=lambda x: PatchInputs(_spread(x.flatten(0, 1), stride), geometry, uses=x.shape[1]),
    )


def _each(value: Any, nd: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * nd if len(values) == 1 else values


def _by_group(g: Tensor, groups: int) -> Tensor:
    """(R, N, U, C, *spatial) -> (R, N, G, U T, o)."""
    g = g.flatten(4).unflatten(3, (groups, -1))  # (R,N,U,G,o,T)
    return g.squeeze(2).mT if g.shape[2] == 1 else g.permute(0, 1, 3, 2, 5, 4).flatten(3, 4)


def _spread(images: Tensor, stride: tuple[int, ...]) -> Tensor:
    """Images (N, C, *spatial) with stride - 1 zeros between neighbours."""
    if set(stride) == {1}:
        return images
    sizes = [(size - 1) * s + 1 for size, s in zip(images.shape[2:], stride, strict=True)]
    spread = images.new_zeros(*images.shape[:2], *sizes)
    pixels: tuple[Any, ...] = (..., *(slice(None, None, s) for s in stride))
    spread[pixels] = images
    return spread
