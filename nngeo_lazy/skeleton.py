"""Private copies of a model's modules, which share its tensors: the model itself is never touched.

A forward pass may do anything to the modules that it runs in: set attributes, write to buffers,
fill lists. In a copy this harms nobody, neither the user's model, nor another thread, nor a pass
that an interrupt ends.
"""

from __future__ import annotations

import copy
import functools
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .errors import DataError

__all__ = ["localised", "refuse_strays", "skeleton"]

Thing = TypeVar("Thing")
_ATOMS = frozenset({bool, int, float, complex, str, bytes, type(None), type, torch.Size})
_OWN = frozenset({"_parameters", "_buffers", "_modules"})
_HOOKS = frozenset(name for name in vars(nn.Module()) if "hook" in name)
_copies: weakref.WeakKeyDictionary[nn.Module, _Copier] = weakref.WeakKeyDictionary()


def skeleton(model: nn.Module, tensors: Mapping[int, Tensor] | None = None) -> nn.Module:
    """A model of the same classes that shares no module, no container and no buffer with it.

    Args:
        model: the network. Its attributes are copied as far as they hold modules, tensors and
            containers of Python; other objects are shared.
        tensors: id of a parameter or buffer -> what takes its place. By default parameters become
            leaves of their own that share the memory, and buffers are copied.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> own = skeleton(model)
        >>> own.weight is model.weight, own.weight.data_ptr() == model.weight.data_ptr()
        (False, True)
    """
    copier = _Copier(model, dict(tensors or {}))
    made = copier.module(model)
    copier.release(made)
    _copies[made] = copier
    return made


def localised(function: Callable[..., Thing], model: nn.Module) -> Callable[..., Thing]:
    """The function; if the model is a skeleton, what it knows of the original is the skeleton.

    A `forward` may have the model in its closure, or call a method of it.
    """
    copier = _copies.get(model)
    if copier is None:
        return function
    found: Callable[..., Thing] = copier.value(localised(function, copier.source))
    return found


def refuse_strays(outputs: Tensor, own: Mapping[str, Tensor]) -> None:
    """Raise if outputs of a skeleton depend on parameters of the model that it was made from.

    Args:
        outputs: with their graph.
        own: the parameters of the model itself by name.

    Raises:
        DataError: they do.
    """
    names = {id(p): name for name, p in own.items()}
    found, seen, todo = [], set(), [outputs.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (leaf := getattr(node, "variable", None)) is not None and id(leaf) in names:
            found.append(names[id(leaf)])
        todo.extend(parent for parent, _ in node.next_functions)
    if found:
        raise DataError(
            "expected a forward pass of the model that forward= is given, but it reads "
            f"{sorted(found)[:3]} of another object that holds the same parameters: use the "
            "first argument, as in forward=lambda model, batch: model(batch)"
        )


class _Copier:
    """Copies modules and what holds them, each once."""

    def __init__(self, source: nn.Module, tensors: dict[int, Tensor]) -> None:
        self.source = source
        self._tensors = tensors
        self._made: dict[int, Any] = {}
        self._root: weakref.ref[nn.Module] | None = None

    def release(self, made: nn.Module) -> None:
        """Hold the copy of the source weakly from now on: it ends when nobody else has it."""
        self._root = weakref.ref(made)
        del self._made[id(self.source)]

    def module(self, module: nn.Module) -> nn.Module:
        root = None if self._root is None or module is not self.source else self._root()
        known: nn.Module | None = self._made.get(id(module), root)
        if known is not None:
            return known
        if isinstance(module, torch.jit.ScriptModule):  # lives outside of Python
            return module
        new = self._made[id(module)] = object.__new__(type(module))
        state = new.__dict__
        for key, value in module.__dict__.items():
            if type(value) in _ATOMS or key in _OWN or (key in _HOOKS and not value):
                state[key] = value.copy() if key in _HOOKS and isinstance(value, dict) else value
            else:
                state[key] = self.value(value)
        state["_parameters"] = {k: self._parameter(p) for k, p in module._parameters.items()}
        state["_buffers"] = {k: self.value(b) for k, b in module._buffers.items()}
        state["_modules"] = {k: self.value(m) for k, m in module._modules.items()}
        state["_compiled_call_impl"] = None
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            state["sparse"] = False  # few functions differentiate sparse gradients
        if type(module).__name__ == "OptimizedModule" and "_orig_mod" in state["_modules"]:
            state["forward"] = state["_modules"]["_orig_mod"].__call__
        return new

    def _parameter(self, p: Tensor | None) -> Tensor | None:
        if p is not None and id(p) not in self._tensors:
            self._tensors[id(p)] = nn.Parameter(p.detach(), p.requires_grad)
        return None if p is None else self._tensors[id(p)]

    def value(self, value: Any) -> Any:
        """What takes the place of a value: itself, if it holds nothing that has a copy."""
        kind = type(value)
        if kind in _ATOMS:
            return value
        if id(value) in self._made:
            return self._made[id(value)]
        if isinstance(value, nn.Module):
            return self.module(value)
        if isinstance(value, Tensor):
            return self._tensor(value)
        rule = _RULES.get(kind)
        if rule is not None:
            return rule(self, value)
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return kind(*map(self.value, value))
        return self._object(value) if _holds_module(value) else value

    def _tensor(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self._tensors:
            if isinstance(tensor, nn.Parameter):
                return self._parameter(tensor)  # type: ignore[return-value]
            if tensor.requires_grad:  # what an earlier forward pass left
                return tensor
            self._tensors[id(tensor)] = tensor.detach().clone()
        return self._tensors[id(tensor)]

    def _object(self, value: Any) -> Any:
        new = self._made[id(value)] = copy.copy(value)
        for key, entry in vars(value).items():
            new.__dict__[key] = self.value(entry)
        return new

    def _list(self, value: list[Any]) -> list[Any]:
        new: list[Any] = []
        self._made[id(value)] = new
        new.extend(map(self.value, value))
        return new

    def _dict(self, value: dict[Any, Any]) -> dict[Any, Any]:
        new = self._made[id(value)] = copy.copy(value)
        for key, entry in value.items():
            new[key] = self.value(entry)
        return new

    def _joined(self, value: Any) -> Any:
        new = self._made[id(value)] = copy.copy(value)
        new.clear()
        for entry in value:
            (new.add if isinstance(new, set) else new.append)(self.value(entry))
        return new

    def _tuple(self, value: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(map(self.value, value))

    def _method(self, value: types.MethodType) -> Any:
        owner = self.value(value.__self__)
        return value if owner is value.__self__ else types.MethodType(value.__func__, owner)

    def _partial(self, value: functools.partial[Any]) -> Any:
        new = functools.partial(
            self.value(value.func),
            *map(self.value, value.args),
            **{key: self.value(entry) for key, entry in value.keywords.items()},
        )
        new.__dict__.update(value.__dict__)
        return new

    def _reference(self, value: weakref.ref[Any]) -> Any:
        target = value()
        if isinstance(target, nn.Module) or id(target) in self._tensors:
            return weakref.ref(self.value(target))
        return value

    def _has(self, module: nn.Module) -> bool:
        return module is self.source or id(module) in self._made

    def _function(self, value: types.FunctionType) -> Any:
        """The function over the copies of the modules that its closure and its globals name."""
        self._made[id(value)] = value  # it may name itself
        cells = value.__closure__ or ()
        moved = [_Moved(cell, self) for cell in cells]
        names = {n for n in _names(value.__code__) if _is_module(value.__globals__.get(n))}
        names = {n for n in names if self._has(value.__globals__[n])}
        if not names and not any(each.changed for each in moved):
            return value
        scope = value.__globals__
        if names:
            scope = {**scope, **{n: self.value(scope[n]) for n in names}}
        new = types.FunctionType(
            value.__code__,
            scope,
            value.__name__,
            value.__defaults__,
            tuple(each.cell for each in moved) or None,
        )
        new.__kwdefaults__ = value.__kwdefaults__
        new.__dict__.update(value.__dict__)
        self._made[id(value)] = new
        return new


class _Moved:
    """A cell of a closure, with the copy of what it holds."""

    def __init__(self, cell: types.CellType, copier: _Copier) -> None:
        try:
            value = cell.cell_contents
        except ValueError:  # empty
            self.cell, self.changed = cell, False
            return
        known = isinstance(value, (nn.Module, types.MethodType, types.FunctionType))
        new = copier.value(value) if known else value
        self.changed = new is not value
        self.cell = types.CellType(new) if self.changed else cell


def _names(code: types.CodeType) -> set[str]:
    inner = (_names(c) for c in code.co_consts if isinstance(c, types.CodeType))
    return set(code.co_names).union(*inner)


def _is_module(value: Any) -> bool:
    return isinstance(value, nn.Module)


def _holds_module(value: Any) -> bool:
    """Whether an object of the user's has a module, or a method of one, as an attribute."""
    try:
        entries = vars(value).values()
    except TypeError:
        return False
    if isinstance(value, (type, types.ModuleType)):
        return False
    return any(isinstance(getattr(entry, "__self__", entry), nn.Module) for entry in entries)


_RULES: dict[type, Callable[[_Copier, Any], Any]] = {
    list: _Copier._list,
    tuple: _Copier._tuple,
    dict: _Copier._dict,
    OrderedDict: _Copier._dict,
    defaultdict: _Copier._dict,
    set: _Copier._joined,
    deque: _Copier._joined,
    types.MethodType: _Copier._method,
    types.FunctionType: _Copier._function,
    functools.partial: _Copier._partial,
    weakref.ref: _Copier._reference,
}
