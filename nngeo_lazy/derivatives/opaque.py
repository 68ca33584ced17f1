"""Functions that autograd and torch.func see as one: differentiable any number of times, batched.

Inside, a function may do what it likes: keep graphs, call `torch.autograd`, loop over a loader.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, cast

import torch
from torch import Tensor

from ..switches import untraced

__all__ = ["Map", "apply_map"]


class Map(ABC):
    """A function of tensors, which must not read any other tensor that wants a gradient."""

    @abstractmethod
    def __call__(self, *tensors: Tensor) -> Tensor:
        """The value, without a graph."""

    @abstractmethod
    def traced(self, *tensors: Tensor) -> Tensor:
        """The value, differentiable by autograd in the tensors that require a gradient."""

    def pullback(self, k: int) -> Map:
        """(g, *tensors) to the gradient of <g, value> in tensor k."""
        return _Pullback(self, k)

    def pushforward(self, k: int) -> Map:
        """(t, *tensors) to the derivative of the value along t in tensor k."""
        return _Pushforward(self, k)

    def columns(self, k: int) -> bool:
        """Whether a batch of tensor k, columns (n, k), is more columns."""
        return False


class _Pullback(Map):
    def __init__(self, inner: Map, k: int) -> None:
        self._inner, self._k = inner, k

    def __call__(self, *tensors: Tensor) -> Tensor:
        with torch.enable_grad():
            return self._gradient([t.detach() for t in tensors], False).detach()

    def traced(self, *tensors: Tensor) -> Tensor:
        return self._gradient(list(tensors), True)

    def _gradient(self, tensors: list[Tensor], create_graph: bool) -> Tensor:
        g, *inputs = tensors
        if not inputs[self._k].requires_grad:
            inputs[self._k] = inputs[self._k].detach().requires_grad_()
        value = self._inner.traced(*inputs)
        if not value.requires_grad:  # constant in this tensor
            return torch.zeros_like(inputs[self._k])
        (found,) = torch.autograd.grad(
            value, inputs[self._k], g, create_graph=create_graph, allow_unused=True
        )
        return torch.zeros_like(inputs[self._k]) if found is None else found


class _Pushforward(Map):
    """(t, *tensors) to the derivative along t of tensor k, by differentiating the pullback."""

    def __init__(self, inner: Map, k: int) -> None:
        self._inner, self._k = inner, k

    def __call__(self, *tensors: Tensor) -> Tensor:
        with torch.enable_grad():
            return self._derivative([t.detach() for t in tensors], False).detach()

    def traced(self, *tensors: Tensor) -> Tensor:
        return self._derivative(list(tensors), True)

    def _derivative(self, tensors: list[Tensor], create_graph: bool) -> Tensor:
        t, *inputs = tensors
        if not inputs[self._k].requires_grad:
            inputs[self._k] = inputs[self._k].detach().requires_grad_()
        value = self._inner.traced(*inputs)
        u = torch.zeros_like(value, requires_grad=True)
        (pulled,) = torch.autograd.grad(
            value, inputs[self._k], u, create_graph=True, allow_unused=True
        )
        if pulled is None or not pulled.requires_grad:
            return torch.zeros_like(value)
        (out,) = torch.autograd.grad(pulled, u, t, create_graph=create_graph)
        return out


class _Opaque(torch.autograd.Function):
    @staticmethod
    def forward(function: Map, *tensors: Tensor) -> Tensor:
        with torch.no_grad():
            return function(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.function, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = grads
        found = [
            apply_map(ctx.function.pullback(k), g, *ctx.saved_tensors) if wanted else None
            for k, wanted in enumerate(ctx.needs_input_grad[1:])
        ]
        return (None, *found)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Tensor:
        moved = [
            apply_map(ctx.function.pushforward(k), t, *ctx.saved_tensors)
            for k, t in enumerate(tangents)
            if t is not None
        ]
        return torch.stack(moved).sum(0)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], function: Map, *tensors: Tensor
    ) -> tuple[Tensor, int]:
        dims = in_dims[1:]
        batched = [k for k, dim in enumerate(dims) if dim is not None]
        if len(batched) == 1 and function.columns(batched[0]):
            (k,) = batched
            wide = tensors[k].movedim(dims[k] or 0, -1)  # (n, k, B)
            joint = [*tensors[:k], wide.flatten(-2), *tensors[k + 1 :]]
            out = apply_map(function, *joint).unflatten(-1, wide.shape[-2:])
            return out, out.dim() - 1
        each = [
            apply_map(
                function,
                *(
                    t if dim is None else t.select(dim, b)
                    for t, dim in zip(tensors, dims, strict=True)
                ),
            )
            for b in range(info.batch_size)
        ]
        return torch.stack(each), 0


@untraced
def apply_map(function: Map, *tensors: Tensor) -> Tensor:
    """The value, as one differentiable operation."""
    return cast(Tensor, cast(Any, _Opaque).apply(function, *tensors))
