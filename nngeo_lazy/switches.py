"""Settings of the whole process that are changed for a while, and put back for certain.

Several threads, or nested scopes, may need a setting at once. The first one changes it, the last
one puts back what was there. An interrupt in the middle cannot leave it changed: a scope that is
lost is ended when Python frees it.
"""

from __future__ import annotations

import functools
import sys
import threading
import types
from collections.abc import Callable
from contextlib import AbstractContextManager, ContextDecorator, nullcontext
from contextvars import ContextVar
from types import FrameType
from typing import Any, TypeVar, cast

import torch
from torch._compile import _disable_dynamo
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack, _pop_mode
from torch.utils import checkpoint

__all__ = [
    "Switch",
    "callers_autocast",
    "eager",
    "holding",
    "inside_checkpoint",
    "outside_inference",
    "own_arithmetic",
    "plain_attention_modules",
    "setting",
    "together",
    "under_autocast",
    "unfused_attention",
    "untraced",
    "whole_modes",
    "whole_transforms",
    "without_checkpoints",
]

Value = TypeVar("Value")
Function = TypeVar("Function", bound=Callable[..., Any])
Autocast = tuple[tuple[str, torch.dtype], ...]  # kinds of devices on which it is enabled

_lock = threading.RLock()
_settings: list[ContextVar[Any]] = []


def setting(name: str, default: Value) -> ContextVar[Value]:
    """A variable that has another value in a scope; `whole_transforms` ends lost scopes."""
    variable = ContextVar(name, default=default)
    _settings.append(variable)
    return variable


class holding:  # noqa: N801 - a scope, as those of contextlib are
    """A scope in which a setting has a value.

    Example:
        >>> colour = setting("colour", "red")
        >>> with holding(colour, "blue"):
        ...     print(colour.get())
        blue
        >>> colour.get()
        'red'
    """

    def __init__(self, variable: ContextVar[Value], value: Value) -> None:
        self._variable, self._value, self._before = variable, value, variable.get()

    def __enter__(self) -> None:
        self._variable.set(self._value)

    def __exit__(self, *_: object) -> None:
        self._variable.set(self._before)


class together:  # noqa: N801 - a scope, as those of contextlib are
    """Several scopes as one.

    What an interrupt leaves of a function with `yield` is closed when Python frees it: long after
    the caller's scopes, whose settings it would overwrite. What it leaves of an `ExitStack` is
    freed later still.
    """

    def __init__(self, *scopes: AbstractContextManager[Any]) -> None:
        self._scopes, self._open = scopes, list[AbstractContextManager[Any]]()

    def __enter__(self) -> None:
        try:
            for scope in self._scopes:
                scope.__enter__()
                self._open.append(scope)
        except BaseException as error:
            self.__exit__(type(error), None, None)
            raise

    def __exit__(self, *error: Any) -> None:
        while self._open:
            self._open.pop().__exit__(*error)


def outside_inference() -> AbstractContextManager[Any]:
    """A scope whose tensors have gradients, also inside of `torch.inference_mode`.

    Torch's own scope is a guard that puts back what was there when it is freed, which an interrupt
    delays as well.
    """
    if torch.is_inference_mode_enabled():
        return torch.inference_mode(False)
    if torch.is_grad_enabled():
        return nullcontext()
    return together(torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True))


_callers: ContextVar[Autocast | None] = setting("callers_autocast", None)


def callers_autocast() -> Autocast:
    """In which precision the caller lets a model compute, also inside of `own_arithmetic`."""
    outer = _callers.get()
    if outer is not None:
        return outer
    kinds = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    return tuple((kind, torch.get_autocast_dtype(kind)) for kind in kinds)


def under_autocast(wanted: Autocast) -> together:
    """A scope in which autocast is as wanted, and off on all other devices."""
    scopes = []
    for kind in ("cpu", "cuda"):
        dtype = dict(wanted).get(kind)
        if dtype is not None or torch.is_autocast_enabled(kind):
            scopes.append(torch.autocast(kind, dtype, dtype is not None))
    return together(*scopes)


def own_arithmetic() -> together:
    """A scope in which tensors have gradients and their own precision.

    Autocast is for the model: `under_autocast(callers_autocast())` is how it is run.
    """
    callers = holding(_callers, callers_autocast())
    return together(callers, outside_inference(), under_autocast(()))


class Switch:
    """A setting of the process that has another value as long as anybody uses it.

    Args:
        read: what it is now.
        write: change it.
        value: what it is changed to, made when it is needed.

    Example:
        >>> colour = ["red"]
        >>> switch = Switch(lambda: colour[0], lambda c: colour.__setitem__(0, c), lambda: "blue")
        >>> with switch.used():
        ...     with switch.used():
        ...         pass
        ...     print(colour)
        ['blue']
        >>> colour
        ['red']
    """

    def __init__(
        self, read: Callable[[], Any], write: Callable[[Any], Any], value: Callable[[], Any]
    ) -> None:
        self._read, self._write, self._value = read, write, value
        self._users: set[int] = set()
        self._before: list[Any] = []  # what was there; empty while it is not changed

    def used(self) -> _Use:
        """A scope in which it has the value."""
        return _Use(self)

    def _enter(self, user: int) -> None:
        with _lock:
            self._users.add(user)
            if not self._before:
                self._before = [self._read()]
            self._write(self._value())

    def _exit(self, user: int) -> None:
        with _lock:
            self._users.discard(user)
            if self._before and not self._users:
                self._write(self._before[0])
                self._before = []


class _Use:
    """One user's scope. Leaving it twice does no harm."""

    _switch: Switch | None = None  # of a scope that an interrupt ended before it began

    def __init__(self, switch: Switch) -> None:
        self._switch = switch

    def __enter__(self) -> None:
        if self._switch is not None:
            self._switch._enter(id(self))

    def __exit__(self, *_: object) -> None:
        self._exit()

    def __del__(self) -> None:  # an interrupt came between __enter__ and its block
        self._exit()

    def _exit(self) -> None:
        if self._switch is not None:
            self._switch._exit(id(self))


# --- attention ------------------------------------------------------------------------------------

_KERNELS = ("flash", "mem_efficient", "cudnn", "overrideable", "math")  # of torch's attention


def _read_kernels() -> dict[str, bool]:
    getters = {name: getattr(torch._C, f"_get_{name}_sdp_enabled", None) for name in _KERNELS}
    return {name: get() for name, get in getters.items() if get is not None}


def _write_kernels(enabled: dict[str, bool]) -> None:
    for name, on in enabled.items():
        getattr(torch._C, f"_set_sdp_use_{name}")(on)


# Fused kernels have one derivative only, and no batching rules: attention runs unfused.
unfused_attention = Switch(
    _read_kernels, _write_kernels, lambda: {name: name == "math" for name in _read_kernels()}
)

# The fast path of attention modules calls no functions that can be recorded.
plain_attention_modules = Switch(
    torch.backends.mha.get_fastpath_enabled,
    torch.backends.mha.set_fastpath_enabled,
    lambda: False,
)


# --- compiled functions ---------------------------------------------------------------------------


def _dynamo() -> Any:
    """The part of torch that runs compiled functions; None if nothing can have been compiled."""
    return sys.modules.get("torch._dynamo.eval_frame")


def _eager() -> Any:
    dynamo = _dynamo()
    return None if dynamo is None else dynamo.DynamoStance("force_eager")


def _read_stance() -> Any:
    dynamo = _dynamo()
    return None if dynamo is None else dynamo._stance


def _write_stance(stance: Any) -> None:
    dynamo = _dynamo()
    if dynamo is not None and stance is not None:
        dynamo._set_stance(stance)


# Compiled functions run as they were written.
eager = Switch(_read_stance, _write_stance, _eager)


def untraced(function: Function) -> Function:
    """The function, which a compiled caller leaves its graph for: torch cannot trace what it does.

    Example:
        >>> untraced(abs)(-1)
        1
    """
    disabled = _disable_dynamo(function)  # it imports the compiler when it is called
    compiling = torch.compiler.is_compiling

    def called(*args: Any, **kwargs: Any) -> Any:
        return (disabled if compiling() else function)(*args, **kwargs)

    known = getattr(function, "__globals__", {})  # by which doctests find their module
    made = types.FunctionType(called.__code__, known, called.__name__, None, called.__closure__)
    return cast(Function, functools.update_wrapper(made, function))


# --- transforms of torch.func ---------------------------------------------------------------------


class whole_transforms(ContextDecorator):  # noqa: N801 - a scope, as those of contextlib are
    """A scope that ends the transforms, modes and settings which an interrupt has left open inside.

    torch opens a transform of torch.func, or switches gradients off, and enters the block that
    closes it in two lines. An interrupt between them would leave it so for all that follows.
    """

    def _recreate_cm(self) -> whole_transforms:
        return whole_transforms()  # a decorated function may call itself

    def __enter__(self) -> None:
        self._grad = torch.is_grad_enabled()
        self._depth = torch._C._functorch.get_dynamic_layer_stack_depth()
        self._level = forward_ad._current_level
        self._values = [variable.get() for variable in _settings]

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            return
        for variable, value in zip(_settings, self._values, strict=True):
            variable.set(value)
        torch.set_grad_enabled(self._grad)
        if torch._C._functorch.get_dynamic_layer_stack_depth() > self._depth:
            torch._C._functorch.pop_dynamic_layer_stack_and_undo_to_depth(self._depth)
        while forward_ad._current_level > self._level:
            forward_ad.exit_dual_level()


class whole_modes:  # noqa: N801 - a scope, as those of contextlib are
    """A scope that ends the torch function modes which an interrupt inside has left open."""

    def __enter__(self) -> None:
        self._depth = len(_get_current_function_mode_stack())

    def __exit__(self, *_: object) -> None:
        while len(_get_current_function_mode_stack()) > self._depth:
            _pop_mode()


# --- checkpointing --------------------------------------------------------------------------------

_unchecked = setting("without_checkpoints", 0)  # how many scopes are open
_CHECKPOINTED = ("CheckpointFunction", "_checkpoint_without_reentrant_generator")


def _replaced() -> tuple[Any, Any]:
    """Both kinds of torch's checkpointing, which do nothing in the threads that ask for it."""
    function, generator = (getattr(checkpoint, name) for name in _CHECKPOINTED)
    if isinstance(function, _Unless):
        return function, generator

    def unless(*args: Any, **kwargs: Any) -> Any:
        if not _unchecked.get():
            return (yield from generator(*args, **kwargs))
        return (yield)  # the caller runs the function in between

    return _Unless(function), unless


class _Unless:
    def __init__(self, function: Any) -> None:
        self._function = function

    def apply(self, run: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        if not _unchecked.get():
            return self._function.apply(run, preserve, *args)
        return run(*args)


def _read_checkpoints() -> tuple[Any, ...]:
    return tuple(getattr(checkpoint, name) for name in _CHECKPOINTED)


def _write_checkpoints(found: tuple[Any, ...]) -> None:
    for name, value in zip(_CHECKPOINTED, found, strict=True):
        setattr(checkpoint, name, value)


_checkpoints = Switch(_read_checkpoints, _write_checkpoints, _replaced)


class without_checkpoints:  # noqa: N801 - a scope, as the functions of contextlib are
    """Inside, in this thread, checkpointed parts of a model keep what they compute.

    A part that is computed again during a backward pass would be computed outside of the function
    modes that a second derivative needs.
    """

    def __enter__(self) -> None:
        self._use = _checkpoints.used()
        self._use.__enter__()
        _unchecked.set(_unchecked.get() + 1)

    def __exit__(self, *error: object) -> None:
        _unchecked.set(_unchecked.get() - 1)
        self._use.__exit__(None, None, None)


def inside_checkpoint() -> bool:
    """Whether what is computed now may be computed again, by a checkpoint's hooks."""
    hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    if hooks is not None:
        return bool(hooks(True) is not None)
    frame: FrameType | None = sys._getframe()  # before torch 2.8 nothing tells but who called
    while frame is not None and frame.f_code.co_filename != checkpoint.__file__:
        frame = frame.f_back
    return frame is not None and not _unchecked.get()
