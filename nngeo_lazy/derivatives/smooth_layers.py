"""Layers with other derivatives than torch gives them: cheaper ones, and ones of higher order.

*Frozen* layers have a backward pass that is differentiable in the output gradient alone. J v is the
derivative of u -> J^T u in u (see `engines`). Torch's rules for it also make the gradients in the
input and the weight, which nothing here asks for. That is two to three times the work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

__all__ = ["NotDifferentiableError", "composed", "frozen", "without_padding"]


class NotDifferentiableError(RuntimeError):
    """A function that has a value has no derivative of the kind that was asked for."""


_FORWARD = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}
_TRANSPOSED = {torch.conv_transpose1d: 1, torch.conv_transpose2d: 2, torch.conv_transpose3d: 3}


class _Geometry(NamedTuple):
    """Behind input, weight and bias: the arguments of `torch.convolution`."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int

    def backward(
        self, g: Tensor, x: Tensor, w: Tensor, mask: list[bool]
    ) -> tuple[Tensor, Tensor, Tensor]:
        channels = g.shape[1]
        made = torch.ops.aten.convolution_backward(g, x, w, [channels], *self, mask)
        return cast("tuple[Tensor, Tensor, Tensor]", made)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, geometry: _Geometry) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.geometry = geometry
        return torch.convolution(x, w, b, *geometry)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        need_x, need_w, need_b, _ = ctx.needs_input_grad
        if not torch.is_grad_enabled():
            made = ctx.geometry.backward(g, x, w, [need_x, need_w, need_b])
            return (*made, None)
        x, w = x.detach(), w.detach()
        return (
            _apply(_GradInput, g, x, w, ctx.geometry) if need_x else None,
            _apply(_GradWeight, g, x, w, ctx.geometry) if need_w else None,
            g.sum([0, *range(2, g.dim())]) if need_b else None,
            None,
        )


class _GradInput(torch.autograd.Function):
    """g to the gradient in x: the derivative along t is the convolution of t."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, w: Tensor, geometry: _Geometry) -> Tensor:
        ctx.save_for_backward(w)
        ctx.geometry = geometry
        return geometry.backward(g, x, w, [True, False, False])[0]

    @staticmethod
    def backward(ctx: Any, t: Tensor) -> tuple[Tensor | None, ...]:
        (w,) = ctx.saved_tensors
        return torch.convolution(t, w, None, *ctx.geometry), None, None, None


class _GradWeight(torch.autograd.Function):
    """g to the gradient in w: the derivative along t is the convolution of x with t."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, w: Tensor, geometry: _Geometry) -> Tensor:
        ctx.save_for_backward(x)
        ctx.geometry = geometry
        return geometry.backward(g, x, w, [False, True, False])[1]

    @staticmethod
    def backward(ctx: Any, t: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        return torch.convolution(x, t, None, *ctx.geometry), None, None, None


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor | None, b: Tensor | None, shape: list[int], eps: float
    ) -> Tensor:
        y, mean, rstd = torch.native_layer_norm(x, shape, w, b, eps)
        ctx.save_for_backward(x, mean, rstd, w, b)
        ctx.shape = shape
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        mask = list(ctx.needs_input_grad[:3])
        if torch.is_grad_enabled():
            saved = (None if t is None else t.detach() for t in ctx.saved_tensors)
            made = _apply(_GradLayerNorm, g, *saved, ctx.shape, mask)
        else:
            x, mean, rstd, w, b = ctx.saved_tensors
            made = _layer_norm_backward(g, x, mean, rstd, w, b, ctx.shape, mask)
        return (*made, None, None)


class _GradLayerNorm(torch.autograd.Function):
    """g to the gradients in x, w and b: linear in g, and the derivative along (t, tw, tb) likewise.

    With z = (x - mean) rstd: w rstd (t - mean(t) - z mean(t z)) + z tw + tb.
    """

    @staticmethod
    def forward(
        ctx: Any,
        g: Tensor,
        x: Tensor,
        mean: Tensor,
        rstd: Tensor,
        w: Tensor | None,
        b: Tensor | None,
        shape: list[int],
        mask: list[bool],
    ) -> tuple[Tensor | None, ...]:
        ctx.save_for_backward(x, mean, rstd, w)
        ctx.dims = tuple(range(-len(shape), 0))
        ctx.set_materialize_grads(False)
        return _layer_norm_backward(g, x, mean, rstd, w, b, shape, mask)

    @staticmethod
    def backward(
        ctx: Any, t: Tensor | None, tw: Tensor | None, tb: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, mean, rstd, w = ctx.saved_tensors
        z = (x - mean) * rstd
        parts = []
        if t is not None:
            inner = t - t.mean(ctx.dims, keepdim=True) - z * (t * z).mean(ctx.dims, keepdim=True)
            parts.append(inner * (rstd if w is None else rstd * w))
        if tw is not None:
            parts.append(z * tw)
        total = sum(parts[1:], parts[0]) if parts else None
        if tb is not None:
            total = tb.expand_as(x) if total is None else total + tb
        return (total, *[None] * 7)


def _layer_norm_backward(
    g: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    w: Tensor | None,
    b: Tensor | None,
    shape: list[int],
    mask: list[bool],
) -> tuple[Tensor | None, ...]:
    made = torch.ops.aten.native_layer_norm_backward(g, x, shape, mean, rstd, w, b, mask)
    return tuple(t if wanted else None for t, wanted in zip(made, mask, strict=True))


class _Frozen(TorchFunctionMode):
    """Takes the place of these layers."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.embedding_bag:
            return _composed_embedding_bag(*args, **kwargs)
        made: tuple[Any, ...] | None = None
        layer: Any = _Convolution
        if func in _FORWARD:
            made = _bind(_FORWARD[func], *args, **kwargs)
        elif func in _TRANSPOSED:
            made = _bind_transposed(_TRANSPOSED[func], *args, **kwargs)
        elif func is functional.layer_norm:
            made, layer = _bind_layer_norm(*args, **kwargs), _LayerNorm
        return func(*args, **kwargs) if made is None else _apply(layer, *made)


def _apply(function: Any, *args: Any) -> Any:
    return function.apply(*args)


class _Composed(TorchFunctionMode):
    """Functions from elementary ones, where torch's derivatives of higher order are wrong.

    It differentiates the double-backward pass of a norm with mean and deviation held fixed: third
    derivatives, those of a product in the parameters, come out wrong. Of the weight norm the second
    ones do.
    """

    def __init__(self, table: Mapping[Callable[..., Any], Callable[..., Any]]) -> None:
        super().__init__()
        self._table = table

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        return self._table.get(func, func)(*args, **kwargs)


def _composed_layer_norm(
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    out = _standardised(input, range(-len(normalized_shape), 0), eps)
    out = out if weight is None else out * weight
    return out if bias is None else out + bias


def _composed_instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not use_input_stats:
        return functional.instance_norm(
            input, running_mean, running_var, weight, bias, False, momentum, eps
        )
    shape = (-1, *(1,) * (input.dim() - 2))
    out = _standardised(input, range(2, input.dim()), eps)
    out = out if weight is None else out * weight.view(shape)
    return out if bias is None else out + bias.view(shape)


def _composed_weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    norm = torch.norm_except_dim(v, 2, dim)
    return v * (g / norm)


def _composed_embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """From rows and sums: torch's own backward pass has no derivative."""
    if mode == "max" or scale_grad_by_freq or max_norm is not None:
        options = (max_norm, norm_type, scale_grad_by_freq, mode, sparse, per_sample_weights)
        more = (include_last_offset, padding_idx)
        return functional.embedding_bag(input, weight, offsets, *options, *more)
    flat, n = input.reshape(-1), input.shape[0]
    places = torch.arange(len(flat), device=flat.device)
    if offsets is None:
        bag = places // max(1, input.shape[-1])
    else:
        n = len(offsets) - include_last_offset
        bag = torch.searchsorted(offsets[:n].contiguous(), places.to(offsets.dtype), right=True) - 1
    scale = torch.ones(len(flat), dtype=weight.dtype, device=weight.device)
    if padding_idx is not None:
        scale = scale * (flat != padding_idx % len(weight))
    if mode == "mean":
        scale = scale / scale.new_zeros(n).index_add_(0, bag, scale).clamp_min(1)[bag]
    elif per_sample_weights is not None:
        scale = scale * per_sample_weights.reshape(-1)
    rows = functional.embedding(flat, weight) * scale[:, None]
    return rows.new_zeros(n, weight.shape[1]).index_add(0, bag, rows)


def _standardised(x: Tensor, dims: range, eps: float) -> Tensor:
    centered = x - x.mean(tuple(dims), keepdim=True)
    return centered * (centered.square().mean(tuple(dims), keepdim=True) + eps).rsqrt()


_SECOND: dict[Callable[..., Any], Callable[..., Any]] = {
    torch._weight_norm: _composed_weight_norm,
    functional.embedding_bag: _composed_embedding_bag,
}
_THIRD: dict[Callable[..., Any], Callable[..., Any]] = {
    **_SECOND,
    functional.layer_norm: _composed_layer_norm,
    functional.instance_norm: _composed_instance_norm,
}


def frozen(function: Callable[[Any], Tensor]) -> Callable[[Any], Tensor]:
    """The function with backward passes that are differentiable in output gradients alone."""
    return _within(_Frozen, function)


def _unpadded_embedding(
    input: Tensor, weight: Tensor, padding_idx: int | None = None, *args: Any, **kwargs: Any
) -> Tensor:
    if padding_idx is not None:
        raise NotDifferentiableError(
            "forward mode takes the derivative in an embedding's padding, which its gradient does "
            "not have"
        )
    return functional.embedding(input, weight, None, *args, **kwargs)


def without_padding(function: Callable[[Any], Tensor]) -> Callable[[Any], Tensor]:
    """The function, refused if reverse mode leaves out what forward mode differentiates."""
    return _within(lambda: _Composed({functional.embedding: _unpadded_embedding}), function)


def composed(function: Callable[[Any], Tensor], taped: bool) -> Callable[[Any], Tensor]:
    """The function with layers whose second derivatives are right; taped, those of every order."""
    return _within(lambda: _Composed(_THIRD if taped else _SECOND), function)


def _within(
    mode: Callable[[], TorchFunctionMode], function: Callable[[Any], Tensor]
) -> Callable[[Any], Tensor]:
    def run(parameters: Any) -> Tensor:
        with mode():
            return function(parameters)

    return run


def _bind(
    n: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> tuple[Tensor, Tensor, Tensor | None, _Geometry] | None:
    dilation = _tuple(dilation, n)
    if padding == "valid":
        padding = 0
    elif padding == "same":
        spans = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        if any(span % 2 for span in spans):  # one more at the end than in front
            return None
        padding = [span // 2 for span in spans]
    if not _plain(input, weight, n):
        return None
    geometry = _Geometry(_tuple(stride, n), _tuple(padding, n), dilation, False, (0,) * n, groups)
    return input, weight, bias, geometry


def _bind_transposed(
    n: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> tuple[Tensor, Tensor, Tensor | None, _Geometry] | None:
    if not _plain(input, weight, n):
        return None
    geometry = _Geometry(
        _tuple(stride, n),
        _tuple(padding, n),
        _tuple(dilation, n),
        True,
        _tuple(output_padding, n),
        groups,
    )
    return input, weight, bias, geometry


def _bind_layer_norm(
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor | None, Tensor | None, list[int], float] | None:
    plain = all(p is None or p.dtype == input.dtype for p in (weight, bias))
    if not plain or torch.is_autocast_enabled(input.device.type):
        return None
    return input, weight, bias, list(normalized_shape), eps


def _plain(x: Tensor, w: Tensor, n: int) -> bool:
    """A batch of images, in no autocast region, which would choose other dtypes inside."""
    return x.dim() == n + 2 and x.dtype == w.dtype and not torch.is_autocast_enabled(x.device.type)


def _tuple(value: Any, n: int) -> tuple[int, ...]:
    return (
        tuple(value)
        if isinstance(value, (tuple, list)) and len(value) == n
        else ((int(value[0]),) * n if isinstance(value, (tuple, list)) else (int(value),) * n)
    )
