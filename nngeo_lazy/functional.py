"""Functions of parameters and inputs in the place of modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .arguments import checked
from .errors import DataError

__all__ = ["as_module"]


class _Function(nn.Module):
    """See `as_module`."""

    def __init__(self, function: Callable[..., Any], template: Any) -> None:
        super().__init__()
        self._called, self._template = function, template

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The function at the module's own parameters."""
        return self._called(_filled(self._template, self), *args, **kwargs)


class _Place(str):
    """The name of the tensor that belongs here."""

    __slots__ = ()


@checked
def as_module(function: Callable[..., Any], params: Any) -> nn.Module:
    """A function `f(params, x)` as a module, which everything here takes in place of a model.

    `FIM(as_module(f, params), loader)` calls `f(params, x)` for each batch (x, y), and
    `f(params, **batch)` if batches are mappings. The parameters share the memory of the tensors.

    Args:
        function: of the parameters and what a batch holds, to outputs (N, ...).
        params: a tensor, or dicts, lists and tuples of tensors, nested in any way. Floating-point
            tensors are parameters, others are constants. Their names are the path of keys, joined
            by dots: {"layer": [w, b]} gives "layer.0" and "layer.1"; a single tensor is "params".

    Returns:
        The module.

    Raises:
        DataError: no floating-point tensor, a key that is no name, or two of one name.

    Example:
        >>> import torch, nngeo_lazy as ng
        >>> params = {"w": torch.randn(3, 2), "b": torch.zeros(2)}
        >>> model = as_module(lambda p, x: x @ p["w"] + p["b"], params)
        >>> ng.FIM(model, torch.randn(5, 3), "dense", likelihood="gaussian").space.names
        ('w', 'b')
    """
    known = dict(_named(params, ""))
    if not any(tensor.is_floating_point() for tensor in known.values()):
        raise DataError(
            "expected params to hold floating-point tensors: a tensor, or dicts, lists and tuples "
            f"of them, got {type(params).__name__}"
        )
    module = _Function(function, _template(params, ""))
    for name, tensor in known.items():
        path, _, last = name.rpartition(".")
        try:
            _place(_module_at(module, path), last, tensor)
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{name!r} cannot be the name of a parameter ({error}): rename its key in params"
            ) from error
    return module.eval()


def _place(module: nn.Module, name: str, tensor: Tensor) -> None:
    """A parameter, or a constant, of that name."""
    if tensor.is_floating_point():
        module.register_parameter(name, nn.Parameter(tensor.detach()))
    else:
        module.register_buffer(name, tensor.detach())


def _module_at(module: nn.Module, path: str) -> nn.Module:
    """The module of a path, made if it is not there."""
    for name in filter(None, path.split(".")):
        if name not in module._modules:
            module.add_module(name, nn.Module())
        module = module.get_submodule(name)
    return module


def _named(value: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield path or "params", value
        return
    for key, entry in _entries(value):
        yield from _named(entry, f"{path}.{key}" if path else str(key))


def _template(value: Any, path: str) -> Any:
    """The same containers with names for the tensors."""
    if isinstance(value, Tensor):
        return _Place(path or "params")
    made = {k: _template(entry, f"{path}.{k}" if path else str(k)) for k, entry in _entries(value)}
    return made if isinstance(value, Mapping) else _like(value, made.values())


def _filled(template: Any, module: nn.Module) -> Any:
    """The containers with the module's own tensors."""
    if isinstance(template, _Place):
        found: Any = module
        for name in template.split("."):
            found = getattr(found, name)
        return found
    if isinstance(template, Mapping):
        return {key: _filled(entry, module) for key, entry in template.items()}
    return _like(template, [_filled(entry, module) for entry in template])


def _entries(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return list(enumerate(value))
    raise DataError(
        f"expected params to be tensors in dicts, lists and tuples, got {type(value).__name__}: "
        "convert it with torch.as_tensor, or close over it in the function"
    )


def _like(value: Any, entries: Any) -> Any:
    """A list, a tuple or a named tuple of other entries."""
    if hasattr(value, "_fields"):
        return type(value)(*entries)
    return type(value)(entries)
