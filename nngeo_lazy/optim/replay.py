"""Forward passes that are run again, as the functions of the parameters that they were."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import DataError
from ..likelihoods.heads import Heads
from ..space import ParamSpace
from .hooks import Hooks

__all__ = ["RandomState", "Replay", "float_math"]


def float_math(device: torch.device) -> AbstractContextManager[Any]:
    """Inside, autocast is off: statistics and solves run in the dtype of their numbers."""
    return torch.autocast(device.type, enabled=False)


@dataclass(frozen=True)
class RandomState:
    """The state of all default generators: torch's of the CPU and a device, Python's, NumPy's."""

    device: torch.device
    cpu: Tensor
    own: Tensor | None
    python: Any
    numpy: Any

    @classmethod
    def now(cls, device: torch.device) -> RandomState:
        """The present one."""
        own = None
        if device.type != "cpu":
            own = torch.get_device_module(device.type).get_rng_state(device)
        numpy = sys.modules.get("numpy")  # what is not imported draws nothing
        drawn = None if numpy is None else numpy.random.get_state()
        return cls(device, torch.get_rng_state(), own, random.getstate(), drawn)

    @contextmanager
    def forked(self) -> Iterator[None]:
        """A scope behind which the generators are as they were before it."""
        before = self.now(self.device)
        try:
            yield
        finally:
            before.restore()

    def restore(self) -> None:
        """Draw from here on what was drawn then."""
        torch.set_rng_state(self.cpu)
        if self.own is not None:
            torch.get_device_module(self.device.type).set_rng_state(self.own, self.device)
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)


@dataclass(frozen=True)
class Replay:
    """A forward pass with its inputs, its random numbers and its autocast."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    random: RandomState
    versions: tuple[int, ...]
    parameter: str
    dtype: torch.dtype
    autocast: torch.dtype | None
    heads: Heads
    hooks: Hooks

    @classmethod
    def of(
        cls,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        space: ParamSpace,
        heads: Heads,
        hooks: Hooks,
    ) -> Replay:
        """The pass that is about to run, of a model with parameters like those of a space."""
        kind = space.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        random = RandomState.now(space.device)
        versions = tuple(x._version for x in _tensors(args, kwargs))
        return cls(
            args, kwargs, random, versions, space.names[0], space.dtype, autocast, heads, hooks
        )

    @property
    def fresh(self) -> bool:
        """Whether the inputs are what they were."""
        return self.versions == tuple(x._version for x in _tensors(self.args, self.kwargs))

    def __call__(self, model: nn.Module) -> list[Tensor]:
        """Each head's outputs, of the model with whatever parameters it has now, in their dtype."""
        if not self.fresh:
            raise DataError(
                "expected the inputs of each forward pass to stay as they are until the step, "
                "which runs the pass again, but they were written to in place: give every batch a "
                "tensor of its own"
            )
        args, kwargs = pytree.tree_map_only(Tensor, self._cast(model), (self.args, self.kwargs))
        enabled = self.autocast is not None
        kind = self.random.device.type  # a cache would hold weights as they were before a step
        autocast = torch.autocast(kind, dtype=self.autocast, enabled=enabled, cache_enabled=False)
        with self.hooks.paused(), self.random.forked(), autocast:
            self.random.restore()
            return self.heads(model(*args, **kwargs))

    def _cast(self, model: nn.Module) -> Callable[[Tensor], Tensor]:
        path, _, name = self.parameter.rpartition(".")
        now = getattr(model.get_submodule(path), name).dtype
        return lambda x: x.to(now) if x.dtype == self.dtype else x


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors among the arguments that count what is written to them."""
    leaves = pytree.tree_leaves((args, kwargs))
    return [x for x in leaves if isinstance(x, Tensor) and not x.is_inference()]
