"""Models in pieces (`fully_shard`) in a loop: a whole copy of the model does what is watched."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..collectives import Group, cut_like, replicated
from ..likelihoods.heads import Heads
from ..pieces import fully_sharded, gathered, processes_of
from .options import Options
from .replay import RandomState

__all__ = ["Whole", "worked_on"]


def worked_on(model: nn.Module) -> tuple[nn.Module, Group]:
    """The network that an optimizer watches, and the processes that train it.

    Of a model in pieces it is a copy with whole parameters, the same on each process.
    """
    if not fully_sharded(model):
        return replicated(model)
    group = processes_of(model)
    return gathered(model, group), group


class Watching(Protocol):
    """What passes are made once more for."""

    @property
    def watches(self) -> bool:
        """Whether the next one is."""


class Whole:
    """Keeps a whole copy of a model in pieces in step with it.

    A pass that is to be recorded or run again is made once more by the copy, with the same random
    numbers. So is its backward pass, once the gradient at the outputs arrives. The copy exchanges
    nothing. A step is made with whole gradients on it, and each process keeps its pieces.

    Args:
        model: in pieces; with any other nothing is done.
        copy: the whole one.
        options: of the optimizer.
        owner: says whether it watches the next pass.
    """

    def __init__(
        self,
        model: nn.Module,
        copy: nn.Module,
        options: Options,
        owner: weakref.ref[Watching],
    ) -> None:
        self._copy, self._owner = copy, owner
        self._heads = Heads.of(options.likelihood, options.outputs)
        self._pairs: list[tuple[Any, Tensor]] = []
        self._buffers: list[tuple[Tensor, Tensor]] = []
        self._random: RandomState | None = None
        self._same: dict[int, Any] = {}
        if not fully_sharded(model):
            return
        whole = dict(copy.named_parameters())
        self._pairs = [(p, whole[name]) for name, p in model.named_parameters()]
        self._buffers = list(zip(model.buffers(), copy.buffers(), strict=True))
        self._same = {id(p): twin for p, twin in self._pairs}
        self._same |= {id(a): b for a, b in zip(model.modules(), copy.modules(), strict=True)}
        own = weakref.ref(self)
        for handle in (
            model.register_forward_pre_hook(_begins(own), with_kwargs=True),
            model.register_forward_hook(_ended(own), with_kwargs=True),
        ):
            weakref.finalize(self, handle.remove)

    def named(self, params: Any) -> Any:
        """The same selection, with tensors and modules of the copy in the place of the model's."""
        if not self._same:
            return params
        listed = pytree.tree_map_only(Iterator, list, params)
        return pytree.tree_map(lambda x: self._same.get(id(x), x), listed)

    def pieces(self, group: dict[str, Any]) -> dict[str, Any]:
        """A parameter group of the copy, with the pieces in the place of its tensors."""
        known = {id(whole): p for p, whole in self._pairs}
        return {**group, "params": [(n, known.get(id(p), p)) for n, p in group["params"]]}

    @torch.no_grad()
    def pull(self, gradients: bool) -> None:
        """Take over the model's parameters and buffers, and gradients if they are wanted."""
        for p, whole in self._pairs:
            whole.copy_(_full(p))
            if gradients:
                whole.grad = None if p.grad is None else _full(p.grad)
        for buffer, mine in self._buffers:
            mine.copy_(buffer)

    @torch.no_grad()
    def push(self, gradients: bool) -> None:
        """Give the parameters back, or the gradients."""
        for p, whole in self._pairs:
            to, new = (p.grad, whole.grad) if gradients else (p, whole)
            if to is not None and new is not None:
                to.copy_(cut_like(new, to) if hasattr(to, "full_tensor") else new)

    def forget(self) -> None:
        """Drop the copy's gradients."""
        for _, whole in self._pairs:
            whole.grad = None

    def begins(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A pass of the model starts."""
        self._random = None
        owner = self._owner()
        if torch.is_grad_enabled() and owner is not None and owner.watches:
            self.pull(False)
            self._random = RandomState.now(self._pairs[0][1].device)

    def ended(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        """It ended: the copy makes it, too."""
        random, self._random = self._random, None
        if random is None:
            return
        with random.forked():
            random.restore()
            twins = self._heads(self._copy(*args, **kwargs))
        for outputs, twin in zip(self._heads(result), twins, strict=True):
            if outputs.requires_grad and twin.requires_grad:
                outputs.register_hook(_Twin(twin, len(twins) > 1))


class _Twin:
    """A hook at outputs: the copy's are differentiated, too."""

    def __init__(self, outputs: Tensor, again: bool) -> None:
        self._outputs, self._again = outputs, again

    def __call__(self, gradient: Tensor) -> None:
        torch.autograd.backward(self._outputs, gradient.detach(), retain_graph=self._again)


def _full(p: Any) -> Tensor:
    found: Tensor = p.full_tensor() if hasattr(p, "full_tensor") else p
    return found.detach()


def _begins(own: weakref.ref[Whole]) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        held = own()
        if held is not None:
            held.begins(args, kwargs)

    return hook


def _ended(own: weakref.ref[Whole]) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        held = own()
        if held is not None:
            held.ended(args, kwargs, result)

    return hook
