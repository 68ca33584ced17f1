"""Forward passes without chance: evaluation mode, and constants for what a model draws."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import StochasticModelError
from .replay import RandomState

__all__ = ["Quiet", "evaluating", "proved"]

Thing = TypeVar("Thing")

DRAWN = 0.5  # in the place of all numbers
KINDS = ("normal", "uniform", "bernoulli", "exponential", "cauchy", "log_normal")
SHAPED = ("rand", "randn", "rand_like", "randn_like", "_standard_gamma")
DRAWS = frozenset({*SHAPED, *KINDS, *(kind + "_" for kind in KINDS)})  # the latter in place


class Quiet(TorchDispatchMode):
    """Inside, random floating-point numbers are all the same.

    So a model that samples is one fixed function of each example, whose layers can be compared
    with autograd. Integers are drawn as ever: which ones are valid is not known.

    Example:
        >>> import torch
        >>> with Quiet():
        ...     torch.randn(2), torch.rand(1)
        (tensor([0.5000, 0.5000]), tensor([0.5000]))
    """

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ not in DRAWS:
            return found
        return pytree.tree_map_only(Tensor, lambda x: x.fill_(DRAWN), found)


def proved(prove: Callable[[], Thing], device: torch.device) -> Thing:
    """What a proof finds of a model; if that draws, of the function that it is of its noise."""
    try:
        return prove()
    except StochasticModelError:
        with RandomState.now(device).forked(), Quiet():  # type: ignore[no-untyped-call]
            return prove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, every module is in evaluation mode."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True
