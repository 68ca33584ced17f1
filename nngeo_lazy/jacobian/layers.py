"""Torch function -> form: how each layer's per-example Jacobian is read off its call.

One function for each layer. It receives the call's arguments and output and answers with a `Use`,
or with the reason (a string) why this call has no form, so that its parameters take the general
way. The registry is keyed by *function*, which also covers subclasses, functional code and keyword
calls.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import StochasticModelError, UnsupportedLayerError
from .inputs import DenseInputs, IndexInputs, Inputs, PatchInputs
from .patches import Geometry

__all__ = ["LAYERS", "Grid", "Use"]


@dataclass(frozen=True)
class Grid:
    """The shape of an `Outer`'s weight: groups, outputs and inputs of each, how it is stored."""

    groups: int
    outputs: int
    inputs: int
    transposed: bool = False


@dataclass(frozen=True)
class Use:
    """One call of a layer.

    Attributes:
        weight, bias: the parameters it received, or None.
        leading: how many leading dimensions of the output are positions (the example axis among
            them); the others are features.
        x: the layer's input, detached, with the same leading dimensions.
        grid: the weight's grid; None for layers whose form is `Rows`.
        gradients: output gradients (R, N, T, *features) -> (R, N, G, T', o). For `Rows` layers
            `rows` is used instead.
        inputs: x as (N, T, *features) -> the input factor.
        rows: (x, g) -> rows by role, each (R, N, n), of the "weight" and the "bias".
    """

    weight: Tensor | None
    bias: Tensor | None
    leading: int
    x: Tensor
    grid: Grid | None = None
    gradients: Callable[[Tensor], Tensor] | None = None
    inputs: Callable[[Tensor], Inputs] | None = None
    rows: Callable[[Tensor, Tensor], dict[str, Tensor]] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' dtype."""
        given = self.weight if self.weight is not None else self.bias
        return self.x.dtype if given is None else given.dtype


Layer = Callable[[Mapping[str, Any], Tensor], "Use | str"]
LAYERS: dict[Callable[..., Any], tuple[tuple[str, ...], Layer]] = {}


def _layer(function: Callable[..., Any], signature: str) -> Callable[[Layer], Layer]:
    def register(layer: Layer) -> Layer:
        LAYERS[function] = (tuple(signature.split()), layer)
        return layer

    return register


@_layer(F.linear, "input weight bias")
def linear(call: Mapping[str, Any], output: Tensor) -> Use | str:
    weight = call["weight"]
    if weight.dim() != 2:
        return f"linear with a weight of {weight.dim()} dimensions"
    return Use(
        weight,
        call.get("bias"),
        leading=output.dim() - 1,
        x=call["input"].detach(),
        grid=Grid(1, *weight.shape),
        gradients=lambda g: g.unsqueeze(2),  # (R,N,T,o) -> (R,N,1,T,o)
        inputs=lambda x: DenseInputs(x.unsqueeze(1)),
    )


@_layer(torch.addmm, "input mat1 mat2 beta alpha out_dtype")
def addmm(call: Mapping[str, Any], output: Tensor) -> Use | str:
    """bias + x W with W stored (in, out), as in Hugging Face's Conv1D."""
    if call.get("beta", 1) != 1 or call.get("alpha", 1) != 1:
        return "addmm with beta or alpha other than 1"
    bias, x, weight = call["input"], call["mat1"], call["mat2"]
    if bias.dim() != 1 or bias.shape[0] != output.shape[1]:
        return "addmm with a bias that is not one number for each output"
    return Use(
        weight,
        bias,
        leading=1,
        x=x.detach(),
        grid=Grid(1, weight.shape[1], weight.shape[0], transposed=True),
        gradients=lambda g: g.unsqueeze(2),
        inputs=lambda x: DenseInputs(x.unsqueeze(1)),
    )


@_layer(torch.conv1d, "input weight bias stride padding dilation groups")
@_layer(torch.conv2d, "input weight bias stride padding dilation groups")
def convolution(call: Mapping[str, Any], output: Tensor) -> Use | str:
    weight, x = call["weight"], call["input"].detach()
    nd = weight.dim() - 2
    if x.dim() != nd + 2:
        return "a convolution of one unbatched image"
    geometry = _geometry(call, weight, nd)
    groups = geometry.groups

    def gradients(g: Tensor) -> Tensor:  # (R,N,U,Co,*spatial) -> (R,N,G,U T,o)
        g = g.flatten(4).unflatten(3, (groups, -1))  # (R,N,U,G,o,T)
        return g.squeeze(2).mT if g.shape[2] == 1 else g.permute(0, 1, 3, 2, 5, 4).flatten(3, 4)

    return Use(
        weight,
        call.get("bias"),
        leading=1,
        x=x,
        grid=Grid(groups, weight.shape[0] // groups, math.prod(weight.shape[1:])),
        gradients=gradients,
        inputs=lambda x: PatchInputs(x.flatten(0, 1), geometry, uses=x.shape[1]),
    )


def _geometry(call: Mapping[str, Any], weight: Tensor, nd: int) -> Geometry:
    def each(value: Any) -> tuple[int, ...]:
        values = (value,) if isinstance(value, int) else tuple(value)
        return values * nd if len(values) == 1 else values

    kernel = tuple(weight.shape[2:])
    dilation = each(call.get("dilation", 1))
    padding = call.get("padding", 0)
    if padding == "same":  # torch puts the odd one at the end
        totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        pairs = tuple((total // 2, total - total // 2) for total in totals)
    elif padding == "valid":
        pairs = ((0, 0),) * nd
    else:
        pairs = tuple((p, p) for p in each(padding))
    return Geometry(kernel, each(call.get("stride", 1)), pairs, dilation, call.get("groups", 1))


@_layer(F.embedding, "input weight padding_idx max_norm norm_type scale_grad_by_freq sparse")
def embedding(call: Mapping[str, Any], output: Tensor) -> Use | str:
    """weight[index]: a one-hot input, so the input factor is a histogram."""
    if call.get("max_norm") is not None:
        raise UnsupportedLayerError(
            "embedding with max_norm rescales its weight in the forward pass, so the outputs are "
            "no function of the parameters: set max_norm=None (renormalise once, before)"
        )
    if call.get("scale_grad_by_freq"):
        raise UnsupportedLayerError(
            "embedding with scale_grad_by_freq returns gradients that are no derivative and mix "
            "the examples of a batch: set scale_grad_by_freq=False"
        )
    weight, padding = call["weight"], call.get("padding_idx")
    if padding is not None and padding < 0:
        padding += weight.shape[0]

    def inputs(index: Tensor) -> Inputs:  # (N,T)
        mask = None if padding is None else index != padding
        return IndexInputs(index.long(), weight.shape[0], mask)

    return Use(
        weight,
        None,
        leading=output.dim() - 1,
        x=call["input"],
        grid=Grid(1, weight.shape[1], weight.shape[0], transposed=True),
        gradients=lambda g: g.unsqueeze(2),
        inputs=inputs,
    )


@_layer(F.layer_norm, "input normalized_shape weight bias eps")
def layer_norm(call: Mapping[str, Any], output: Tensor) -> Use | str:
    shape = tuple(call["normalized_shape"])
    normal = F.layer_norm(call["input"].detach(), shape, eps=call.get("eps", 1e-5))
    return _elementwise(call, normal, output.dim() - len(shape))


@_layer(F.rms_norm, "input normalized_shape weight eps")
def rms_norm(call: Mapping[str, Any], output: Tensor) -> Use | str:
    shape = list(call["normalized_shape"])
    normal = F.rms_norm(call["input"].detach(), shape, eps=call.get("eps"))
    return _elementwise(call, normal, output.dim() - len(shape))


@_layer(F.group_norm, "input num_groups weight bias eps")
def group_norm(call: Mapping[str, Any], output: Tensor) -> Use | str:
    normal = F.group_norm(call["input"].detach(), call["num_groups"], eps=call.get("eps", 1e-5))
    return _channelwise(call, normal)


@_layer(F.batch_norm, "input running_mean running_var weight bias training momentum eps")
def batch_norm(call: Mapping[str, Any], output: Tensor) -> Use | str:
    if call.get("training"):
        raise StochasticModelError(BATCH_STATISTICS)
    normal = F.batch_norm(
        call["input"].detach(),
        call["running_mean"],
        call["running_var"],
        eps=call.get("eps", 1e-5),
    )
    return _channelwise(call, normal)


BATCH_STATISTICS = (
    "expected a model that treats each example on its own, but batch_norm uses the statistics of "
    "the batch: call model.eval() (and give it running statistics)"
)


def _elementwise(call: Mapping[str, Any], normal: Tensor, leading: int) -> Use:
    """weight * normal + bias with the weight over the trailing dimensions."""

    def rows(x: Tensor, g: Tensor) -> dict[str, Tensor]:  # (N,T,*f), (R,N,T,*f)
        return {"weight": (g * x).sum(2).flatten(2), "bias": g.sum(2).flatten(2)}

    return Use(call.get("weight"), call.get("bias"), leading, normal, rows=rows)


def _channelwise(call: Mapping[str, Any], normal: Tensor) -> Use:
    """weight * normal + bias with one number for each channel (dimension 1)."""

    def rows(x: Tensor, g: Tensor) -> dict[str, Tensor]:  # (N,U,C,*s), (R,N,U,C,*s)
        return {
            "weight": (g * x).flatten(4).sum(-1).sum(2) if g.dim() > 4 else (g * x).sum(2),
            "bias": g.flatten(4).sum(-1).sum(2) if g.dim() > 4 else g.sum(2),
        }

    return Use(call.get("weight"), call.get("bias"), 1, normal, rows=rows)
