"""Hooks on a model that see its own forward passes in a training loop."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Protocol

import torch
from torch import nn

__all__ = ["Hooks", "Watcher"]

_CALL = "_compiled_call_impl"  # what torch calls in the place of a model's own call, if it is set


class Watcher(Protocol):
    """What is told of forward passes."""

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A pass with autograd on starts."""

    def end(self, result: Any) -> None:
        """It ended; with None if it raised."""


class Hooks:
    """Calls a watcher around every forward pass of a model that could train it.

    Passes without autograd are not seen. Neither are those of a compiled function around the model,
    out of which the hooks are compiled. A model that was compiled itself runs as it was written
    while `uncompiled` says so. The watcher is held weakly, copies and pickles of the model have
    hooks that do nothing, and hooks of several watchers nest.

    Args:
        model: the network.
        watcher: what is told.
    """

    def __init__(self, model: nn.Module, watcher: Watcher) -> None:
        self._model = weakref.ref(model)
        self._watcher = weakref.ref(watcher)
        self._paused = 0
        self._depth = 0  # of the passes inside of one that is seen, and itself
        self._frame: FrameType | None = None  # of torch's call of the model
        self._held: Watcher | None = None  # so that what it opened is closed
        for handle in (
            model.register_forward_pre_hook(_Before(self), with_kwargs=True),
            model.register_forward_hook(
                _After(self), with_kwargs=True, always_call=True, prepend=True
            ),
        ):
            weakref.finalize(watcher, handle.remove)
        weakref.finalize(watcher, self.uncompiled, False)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, passes are not seen."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    def uncompiled(self, wanted: bool) -> None:
        """Whether the model is to run as it was written, and what its passes open to be closed.

        A model that was compiled in place does not run so by itself.
        """
        model = self._model()
        if model is None:
            return
        guard = model.__dict__.get(_CALL)
        if wanted:
            if not isinstance(guard, _Guard):
                guard = model.__dict__[_CALL] = _Guard(model, guard)
            guard.users.add(self)
        elif isinstance(guard, _Guard):
            guard.users.discard(self)
            if not guard.users:
                model.__dict__[_CALL] = guard.compiled

    def abandon(self) -> None:
        """A pass is over; if it was interrupted, torch has called no hook behind it."""
        watcher = self._held
        if watcher is not None:
            self._depth, self._frame, self._held = 0, None, None
            watcher.end(None)

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pass starts."""
        watcher = self._held or self._watcher()
        if watcher is None or self._paused or module is not self._model():
            return
        if self._depth and not _running(self._frame):  # it was interrupted
            self._depth, self._frame, self._held = 0, None, None
            watcher.end(None)
        if self._depth:  # another watcher tries the model out
            self._depth += 1
        elif torch.is_grad_enabled():
            try:
                watcher.begin(args, kwargs)
                self._depth, self._frame, self._held = 1, sys._getframe(2), watcher
            except BaseException:  # an interrupt: nothing else would close what has been opened
                watcher.end(None)
                raise

    def after(self, module: nn.Module, result: Any) -> None:
        """A forward pass ends."""
        watcher = self._held
        if watcher is None or self._paused or module is not self._model():
            return
        self._depth -= 1
        if not self._depth:
            self._frame = self._held = None
            watcher.end(result)


class _Guard:
    """Stands in for a model's call while passes are recorded.

    Args:
        model: the network.
        compiled: what stood there, of a model that was compiled in place.
    """

    def __init__(self, model: nn.Module, compiled: Any) -> None:
        self._model = weakref.ref(model)
        self.compiled = compiled
        self.users: weakref.WeakSet[Hooks] = weakref.WeakSet()
        self._depth = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self._model()
        if model is None:
            raise RuntimeError("a call of a model that is gone")
        self._depth += 1
        try:
            return model._call_impl(*args, **kwargs)
        finally:
            self._depth -= 1
            if not self._depth:
                for hooks in tuple(self.users):
                    hooks.abandon()


def _running(frame: FrameType | None) -> bool:
    """Whether a frame is one of those that led here."""
    here: FrameType | None = sys._getframe(1)
    while here is not None and here is not frame:
        here = here.f_back
    return here is not None


class _Hook:
    """A hook that can be copied and pickled with its model, and is then without effect."""

    def __init__(self, hooks: Hooks | None) -> None:
        self._hooks = hooks

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (None,)


class _Before(_Hook):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], *kwargs: dict[str, Any]) -> None:
        # without kwargs if the hook was removed while torch went through them
        if not torch.compiler.is_compiling() and self._hooks is not None and kwargs:
            self._hooks.before(module, args, *kwargs)


class _After(_Hook):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], *rest: Any) -> None:
        if not torch.compiler.is_compiling() and self._hooks is not None:
            self._hooks.after(module, rest[-1])
