"""Layers of one's own: `register_layer`, and modules whose whole call is one recorded call."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.overrides import get_testing_overrides, handle_torch_function, has_torch_function
from torch.utils import _pytree as pytree

from ..errors import UnsupportedLayerError

# these are imported for the layers that they register
from . import attention, convolutions, layers, recurrent  # noqa: F401
from .uses import COMPOSITES, LAYERS, Composite, Layer, Use

__all__ = ["Known", "find", "register_layer", "whole_modules"]

Target = TypeVar("Target", bound=Callable[..., Any])


@dataclass(frozen=True)
class Known:
    """A function or a module's call that has a form.

    Attributes:
        name: what it is called in reports.
        form: maps its call and output to a `Use` or a reason; None for a composite.
        bind: its arguments by name.
        composite: runs in its place.
        own: whether the user registered it, so that what it refuses has no form.
    """

    name: str
    bind: Callable[[Sequence[Any], Mapping[str, Any]], dict[str, Any]]
    form: Layer | None = None
    composite: Composite | None = None
    own: bool = False

    def use(self, call: Mapping[str, Any], output: Any) -> Use | str:
        """What the form says of a call."""
        if self.form is None:
            return f"{self.name} has no form"
        if not isinstance(output, Tensor):
            return f"{self.name} returns a {type(output).__name__}, not one tensor"
        use: object = self.form(call, output)
        if not isinstance(use, (Use, str)):
            raise UnsupportedLayerError(
                f"expected the form of {self.name} to return a Use, or a str that says why this "
                f"call has none, but it returned a {type(use).__name__}"
            )
        return use


_functions: dict[Callable[..., Any], Known] = {}  # registered by the user
_modules: dict[type[nn.Module], Layer] = {}


def register_layer(
    target: Target,
    form: Layer,
    *,
    signature: str | None = None,
) -> Target:
    r"""Tell how the per-example Jacobian of a layer of your own is read off its call.

    Without a form, the parameters of a layer take the general way: per-example gradients by `vmap`,
    which is right but slow, and has no Kronecker factors. A form is one function. It receives the
    call's arguments by name and its output, and returns a `Use`:

    - A layer that multiplies by a weight has the Jacobian J_n = sum_t g[n,t] x[n,t]^T, of shape
      (outputs, inputs). Here g are output gradients and x inputs at the positions t that share the
      weight. Its bias has sum_t g[n,t]. Its `Use` has a `grid` of (groups, outputs, inputs).
      `gradients` says how the output gradients become (R, N, groups, T, outputs), and `inputs` how
      the inputs become (N, groups, T, inputs). All representations follow.
    - Any other layer gives the rows themselves, J_n[r] of shape (R, N, number of parameters), from
      its inputs and the output gradients of R directions (`rows`). It has no Kronecker factors.

    A form for a call that it cannot describe returns the reason, as a string. No form is trusted:
    on the first batch its rows are compared with autograd's gradients, and where they differ the
    parameters take the general way, with a note in `F.report()`.

    Args:
        target: an `nn.Module` subclass, whose instances (those of its subclasses too) are then one
            call each, or a function. A module's call is its `forward`'s arguments by name, and
            itself as "module"; what its forward calls is not recorded.
        form: `(call, output) -> Use | str`, with `call` the arguments by name and `output` the
            tensor that the call returned.
        signature: the names of the function's arguments, separated by spaces, if Python cannot
            tell them (most of torch's own functions).

    Returns:
        What to use in the place of `target`: itself for modules and for torch's functions. Python
        functions of one's own do not tell torch that they are called; the returned function does.

    Raises:
        TypeError: if `target` is no function and no subclass of `nn.Module`, if `form` cannot be
            called, or if the names of a function's arguments are not known.

    Example:
        >>> import torch
        >>> from nngeo_lazy import Use, register_layer
        >>> def scale(x, weight):  # one factor for each feature
        ...     return x * weight
        >>> def form(call, output):
        ...     return Use(
        ...         weight=call["weight"],
        ...         bias=None,
        ...         leading=output.dim() - 1,  # all dimensions but the last are positions
        ...         x=call["x"].detach(),
        ...         rows=lambda x, g: {"weight": (g * x).sum(2)},  # (N,T,d), (R,N,T,d) -> (R,N,d)
        ...     )
        >>> scale = register_layer(scale, form)
        >>> scale(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]))
        tensor([3., 8.])
    """
    if not callable(form):
        raise TypeError(
            f"expected a form that can be called as form(call, output), got {type(form).__name__}"
        )
    if isinstance(target, type) and issubclass(target, nn.Module):
        _modules[target] = form
        return target
    if isinstance(target, (type, nn.Module)) or not callable(target):
        what = f"the class {target.__name__}" if isinstance(target, type) else repr(target)
        raise TypeError(
            "expected a function or a subclass of torch.nn.Module to register a layer for, got "
            f"{what}"
        )
    name = getattr(target, "__name__", str(target))
    if signature is not None:
        bind = _by_position(signature.split())
    elif target in LAYERS:  # in the place of this package's own
        bind = _by_position(LAYERS[target][0])
    else:
        bind = _by_signature(target)
    dispatching = target if _dispatches(target) else _dispatching(target)
    _functions[dispatching] = Known(name, bind, form, own=True)
    return dispatching


def _unregister(target: Any) -> None:
    """Forget a target or what `register_layer` returned for it."""
    _functions.pop(target, None)
    _modules.pop(target, None)


def find(function: Callable[..., Any], args: Sequence[Any]) -> Known | None:
    """The form for a call of a function, which may be the call of a whole module."""
    if function is _call_module:
        module = args[0]
        form = _module_form(type(module))
        return Known(type(module).__name__, _bind_module, form, own=True)
    if function in _functions:
        return _functions[function]
    name = getattr(function, "__name__", str(function))
    if function in LAYERS:
        names, form = LAYERS[function]
        return Known(name, _by_position(names), form)
    if function in COMPOSITES:
        names, composite = COMPOSITES[function]
        return Known(name, _by_position(names), composite=composite)
    return None


@contextmanager
def whole_modules(model: nn.Module) -> Iterator[None]:
    """While it lasts, each call of a registered module of the model is seen as one function call.

    What a module has for a `forward` of its own is restored at the end.
    """
    wrapped: list[tuple[nn.Module, Any]] = []
    try:
        for module in model.modules() if _modules else ():
            if _module_form(type(module)) is not None:
                wrapped.append((module, module.__dict__.get("forward")))
                module.__dict__["forward"] = _dispatching_module(module, module.forward)
        yield
    finally:
        for module, before in wrapped:
            if before is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = before


def _module_form(kind: type[nn.Module]) -> Layer | None:
    return next((_modules[base] for base in kind.__mro__ if base in _modules), None)


def _call_module(
    module: nn.Module, forward: Callable[..., Any], /, *args: Any, **kwargs: Any
) -> Any:
    """What torch is told is called when a registered module is."""
    return forward(*args, **kwargs)


def _dispatching_module(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def dispatching(*args: Any, **kwargs: Any) -> Any:
        relevant = (*_tensors(args, kwargs), *module.parameters())
        if has_torch_function(relevant):
            return handle_torch_function(_call_module, relevant, module, forward, *args, **kwargs)
        return forward(*args, **kwargs)

    return dispatching


def _dispatching(target: Target) -> Target:
    @functools.wraps(target)
    def dispatching(*args: Any, **kwargs: Any) -> Any:
        relevant = _tensors(args, kwargs)
        if has_torch_function(relevant):
            return handle_torch_function(dispatching, relevant, *args, **kwargs)
        return target(*args, **kwargs)

    return dispatching  # type: ignore[return-value]


def _dispatches(target: Callable[..., Any]) -> bool:
    """Whether torch is told of its calls: true of torch's functions, and of those made here."""
    python = isinstance(target, (types.FunctionType, types.MethodType))
    return not python or target in _functions or target in get_testing_overrides()


def _tensors(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, ...]:
    return tuple(leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))


def _by_position(
    names: Sequence[str],
) -> Callable[[Sequence[Any], Mapping[str, Any]], dict[str, Any]]:
    return lambda args, kwargs: {**dict(zip(names, args, strict=False)), **kwargs}


def _by_signature(
    target: Callable[..., Any],
) -> Callable[[Sequence[Any], Mapping[str, Any]], dict[str, Any]]:
    try:
        signature = inspect.signature(target)
    except ValueError:
        raise TypeError(
            f"Python cannot tell the names of the arguments of {target}: give them to "
            "register_layer, as in signature='input weight bias'"
        ) from None

    def bind(args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return dict(bound.arguments)

    return bind


def _bind_module(args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    module, forward, *rest = args
    return {"module": module, **_by_signature(forward)(rest, kwargs)}
