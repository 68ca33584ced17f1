"""What a torch function does to its arguments, and which tensors it takes and gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

__all__ = ["differentiable", "held_by", "in_place", "kept", "tensors_in"]


def in_place(func: Callable[..., Any]) -> bool:
    """Whether a function changes its first argument."""
    name = getattr(func, "__name__", "")
    return (
        name == "__setitem__"
        or (
            name.startswith("__i")
            and name.endswith("__")
            and name not in ("__index__", "__invert__")
        )
        or (name.endswith("_") and not name.endswith("__"))
    )


def kept(func: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments as they are before the call: a copy of what it changes in place."""
    if not in_place(func) or not args or not isinstance(args[0], Tensor):
        return args
    return (args[0].detach().clone(), *args[1:])


def tensors_in(output: Any) -> list[Tensor]:
    """The tensors in nested lists and tuples."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, (list, tuple)):
        return [tensor for entry in output for tensor in tensors_in(entry)]
    return []


def held_by(model: nn.Module) -> Iterator[Tensor]:
    """Tensors that a model holds: parameters, buffers and plain attributes."""
    for module in model.modules():
        for value in (*module._parameters.values(), *module._buffers.values()):
            if value is not None:
                yield value
        yield from tensors_in(list(vars(module).values()))


def differentiable(output: Any) -> bool:
    """Whether the call made something differentiable: reading a shape or a dtype is no use."""
    return any(tensor.grad_fn is not None for tensor in tensors_in(output))
