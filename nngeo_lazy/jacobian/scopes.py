"""What holds during the passes of a build: settings, flags and buffers that are put back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode

from ..errors import StochasticModelError, UnsupportedLayerError
from ..switches import (
    eager,
    holding,
    outside_inference,
    plain_attention_modules,
    setting,
    together,
    whole_modes,
    whole_transforms,
)
from .layers import BATCH_STATISTICS
from .registry import find, whole_modules

__all__ = [
    "FixedWeights",
    "in_build",
    "plain_functions",
    "recording",
    "refuse_renormalisation",
    "refuse_training_mode",
]


def refuse_renormalisation(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    """Raise before a function is called that rescales its weight, which is the user's, in place."""
    if func is not F.embedding and func is not F.embedding_bag:
        return
    known = find(func, args)
    if known is not None and known.bind(args, kwargs).get("max_norm") is not None:
        raise UnsupportedLayerError(
            "embedding with max_norm rescales its weight in the forward pass, so the outputs are "
            "no function of the parameters: set max_norm=None (renormalise once, before)"
        )


class FixedWeights(TorchFunctionMode):
    """Within it, functions that rescale their weight in place are refused, and not called."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        refuse_renormalisation(func, args, kwargs)
        return func(*args, **kwargs)


_builds = setting("builds", 0)  # how many are on their way


def in_build() -> bool:
    """Whether the model's passes are those of a build, and nobody else's."""
    return _builds.get() > 0


@contextmanager
def recording(model: nn.Module, parameters: Mapping[str, Tensor]) -> Iterator[None]:
    """The scope of a whole build: autograd on, compiled modules eager, the model's state kept.

    Flags of the parameters and buffers that a forward pass changed are restored on the way out,
    also after an exception.
    """
    flags = {name: p.requires_grad for name, p in parameters.items()}
    buffers = [(b, b._version, b.detach().clone()) for b in model.buffers() if not b.is_inference()]
    counted = holding(_builds, _builds.get() + 1)
    with plain_functions(), torch.enable_grad(), whole_modules(model), counted:
        try:
            for p in parameters.values():
                p.requires_grad_(True)
            yield
        finally:
            for name, p in parameters.items():
                p.requires_grad_(flags[name])
            with torch.no_grad():
                for buffer, version, kept in buffers:
                    if buffer._version != version:
                        buffer.copy_(kept)


def plain_functions() -> together:
    """A scope in which a model calls functions that can be seen and differentiated, none fused."""
    switched = plain_attention_modules.used()
    return together(whole_modes(), whole_transforms(), outside_inference(), switched, eager.used())


def refuse_training_mode(model: nn.Module) -> None:
    """Raise if a module is random or uses batch statistics, before any forward pass."""
    for name, module in model.named_modules():
        label = f"{name or 'the model'} ({type(module).__name__})"
        if isinstance(module, _DropoutNd) and module.training and module.p > 0:
            raise StochasticModelError(
                f"expected one fixed function, but {label} drops entries at random in training "
                "mode: call model.eval() first"
            )
        batch_norm = isinstance(module, _NormBase) and not isinstance(
            module, nn.modules.instancenorm._InstanceNorm
        )
        if batch_norm and (module.training or module.running_mean is None):
            raise StochasticModelError(f"{label}: {BATCH_STATISTICS}")
