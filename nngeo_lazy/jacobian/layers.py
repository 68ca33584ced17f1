"""Torch function -> form: how each layer's per-example Jacobian is read off its call.

One function for each layer; convolutions and attention have modules of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import UnsupportedLayerError
from .inputs import IndexInputs, Inputs
from .uses import Grid, Use, layer

__all__ = ["BATCH_STATISTICS", "linear"]


@layer(F.linear, "input weight bias")
def linear(call: Mapping[str, Any], output: Tensor) -> Use | str:
    """x W^T + bias with W stored (out, in)."""
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
        inputs=lambda x: x.unsqueeze(1),
    )


@layer(torch.addmm, "input mat1 mat2 beta alpha out_dtype")
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
        inputs=lambda x: x.unsqueeze(1),
    )


@layer(F.bilinear, "input1 input2 weight bias")
def bilinear(call: Mapping[str, Any], output: Tensor) -> Use | str:
    """x1^T W x2 + bias: linear in the outer product of the two inputs."""
    weight, first = call["weight"], call["input1"].detach()
    width = first.shape[-1]

    def inputs(both: Tensor) -> Tensor:  # (N,T,i+j)
        x1, x2 = both[..., :width], both[..., width:]
        return (x1.unsqueeze(-1) * x2.unsqueeze(-2)).flatten(-2).unsqueeze(1)

    return Use(
        weight,
        call.get("bias"),
        leading=output.dim() - 1,
        x=torch.cat([first, call["input2"].detach()], -1),
        grid=Grid(1, weight.shape[0], width * weight.shape[2]),
        gradients=lambda g: g.unsqueeze(2),
        inputs=inputs,
    )


@layer(F.embedding, "input weight padding_idx max_norm norm_type scale_grad_by_freq sparse")
def embedding(call: Mapping[str, Any], output: Tensor) -> Use | str:
    """weight[index]: a one-hot input, so the input factor is a histogram."""
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


@layer(
    F.embedding_bag,
    "input weight offsets max_norm norm_type scale_grad_by_freq mode sparse per_sample_weights "
    "include_last_offset padding_idx",
)
def embedding_bag(call: Mapping[str, Any], output: Tensor) -> Use | str:
    """A weighted sum of rows: its input factor is the histogram of each bag."""
    mode, index, weight = call.get("mode", "mean"), call["input"], call["weight"]
    if mode == "max" or call.get("scale_grad_by_freq"):
        return "embedding_bag with a maximum, or with frequencies"
    n, width = output.shape[0], weight.shape[0]
    flat = index.reshape(-1).long()
    if index.dim() == 2:
        bag = torch.arange(n, device=flat.device).repeat_interleave(index.shape[1])
    else:
        bag = (
            torch.searchsorted(
                call["offsets"][:n].long().contiguous(),
                torch.arange(len(flat), device=flat.device),
                right=True,
            )
            - 1
        )
    given = call.get("per_sample_weights")
    scale = torch.ones(len(flat), dtype=output.dtype, device=flat.device)
    if given is not None:
        scale = given.detach().reshape(-1).to(scale)
    padding = call.get("padding_idx")
    if padding is not None:
        scale = scale * (flat != padding % width)
    if mode == "mean":
        scale = scale / scale.new_zeros(n).index_add_(0, bag, scale).clamp_min(1)[bag]
    histogram = scale.new_zeros(n, width).index_put_((bag, flat), scale, accumulate=True)
    return Use(
        weight,
        None,
        leading=1,
        x=histogram,
        grid=Grid(1, weight.shape[1], width, transposed=True),
        gradients=lambda g: g.unsqueeze(2),
        inputs=lambda x: x.unsqueeze(1),
    )


@layer(F.layer_norm, "input normalized_shape weight bias eps")
def layer_norm(call: Mapping[str, Any], output: Tensor) -> Use | str:
    shape = tuple(call["normalized_shape"])
    normal = F.layer_norm(call["input"].detach(), shape, eps=call.get("eps", 1e-5))
    return _elementwise(call, normal, output.dim() - len(shape))


@layer(F.rms_norm, "input normalized_shape weight eps")
def rms_norm(call: Mapping[str, Any], output: Tensor) -> Use | str:
    shape = list(call["normalized_shape"])
    normal = F.rms_norm(call["input"].detach(), shape, eps=call.get("eps"))
    return _elementwise(call, normal, output.dim() - len(shape))


@layer(F.group_norm, "input num_groups weight bias eps")
def group_norm(call: Mapping[str, Any], output: Tensor) -> Use | str:
    normal = F.group_norm(call["input"].detach(), call["num_groups"], eps=call.get("eps", 1e-5))
    return _channelwise(call, normal)


@layer(F.batch_norm, "input running_mean running_var weight bias training momentum eps")
def batch_norm(call: Mapping[str, Any], output: Tensor) -> Use | str:
    """Statistics, running or the batch's, are constants of the form."""
    return _channelwise(call, _normalised(call, F.batch_norm, call.get("training", False)))


@layer(F.instance_norm, "input running_mean running_var weight bias use_input_stats momentum eps")
def instance_norm(call: Mapping[str, Any], output: Tensor) -> Use | str:
    return _channelwise(call, _normalised(call, F.instance_norm, call.get("use_input_stats", True)))


def _normalised(call: Mapping[str, Any], norm: Callable[..., Tensor], own: bool) -> Tensor:
    """The input, normalised by statistics of its own or by running ones.

    Given with its own, running ones would be updated.
    """
    running = (None, None) if own else (call["running_mean"], call["running_var"])
    eps = call.get("eps", 1e-5)
    normal: Tensor = norm(call["input"].detach(), *running, None, None, own, eps=eps)
    return normal


@layer(F.prelu, "input weight")
def prelu(call: Mapping[str, Any], output: Tensor) -> Use | str:
    """max(x, 0) + weight min(x, 0), with one weight in all or one for each channel."""
    negative = call["input"].detach().clamp(max=0)
    if call["weight"].numel() > 1:
        return _channelwise(call, negative)

    def rows(x: Tensor, g: Tensor) -> dict[str, Tensor]:  # (N,T), (R,N,T)
        return {"weight": (g * x).sum(2, keepdim=True)}

    return Use(call["weight"], None, output.dim(), negative, rows=rows)


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
