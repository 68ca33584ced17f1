"""One recorded forward: every torch function that receives a parameter, and its gradient edge.

Module hooks are the wrong tool: they are wrong after in-place operations, miss modules whose
function is never called through them, and do not fire in compiled models. A torch function mode
sees them all.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode

from ..errors import StochasticModelError
from ..switches import eager, plain_attention_modules
from .layers import BATCH_STATISTICS
from .registry import Known, find, whole_modules
from .uses import Use

__all__ = [
    "Call",
    "Recorder",
    "in_build",
    "plain_functions",
    "recording",
    "refuse_training_mode",
]


@dataclass(frozen=True)
class Call:
    """A layer's call: its form, its selected parameters by name, and its output's gradient edge."""

    function: str
    weight: str | None
    bias: str | None
    use: Use
    edge: GradientEdge
    shape: torch.Size

    @property
    def key(self) -> tuple[str, str | None, str | None]:
        """What must be the same in every batch."""
        return self.function, self.weight, self.bias


class Recorder(TorchFunctionMode):
    """Records the calls that have a form, and for all others the parameters that they received.

    Args:
        parameters: the selected parameters by name.
        training: whether the pass is one of a training loop: batch normalisation may use the
            statistics of the batch, which count as constants, and passes of a build inside of it
            are not recorded. Otherwise such a model is refused, since it mixes examples.
    """

    def __init__(self, parameters: Mapping[str, Tensor], *, training: bool = False) -> None:
        super().__init__()
        self._training = training
        self._names = {id(p): name for name, p in parameters.items()}
        self.calls: list[Call] = []
        self.formless: dict[str, str] = {}  # parameter -> why it has no form

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if self._training and in_build():
            return func(*args, **kwargs)
        known = find(func, args)
        call = {} if known is None else known.bind(args, kwargs)
        if not self._training and func is F.batch_norm and call.get("training"):
            # before it changes running statistics
            raise StochasticModelError(BATCH_STATISTICS)
        names = set(self._selected((*args, *kwargs.values())))
        if not names:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", str(func)) if known is None else known.name
        if known is not None and known.composite is not None:
            return self._composite(known, call, names, lambda: func(*args, **kwargs))
        output = func(*args, **kwargs)
        if _depends(output):
            use = f"{name} has no form" if known is None else known.use(call, output)
            self._add(name, use, output, names)
        return output

    def _composite(
        self, known: Known, call: Mapping[str, Any], names: set[str], run: Callable[[], Any]
    ) -> Any:
        """Run a composite, or the function itself where the composite says why it cannot."""
        rest = set(names)

        def record(use: Use, output: Tensor) -> None:
            own = {name for name in map(self._name, (use.weight, use.bias)) if name}
            rest.difference_update(own)
            if own and _depends(output):
                self._add(known.name, use, output, own)

        output = known.composite(call, record) if known.composite is not None else run()
        if isinstance(output, str):
            self.formless.update(dict.fromkeys(names, output))
            return run()
        self.formless.update(dict.fromkeys(rest, f"{known.name} has no form for it"))
        return output

    def _add(self, function: str, use: Use | str, output: Any, names: set[str]) -> None:
        """Record one use by the selected parameters that the call received."""
        reason = use if isinstance(use, str) else use.mismatch()
        if isinstance(use, str) or reason:
            self.formless.update(dict.fromkeys(names, reason))
            return
        weight, bias = self._name(use.weight), self._name(use.bias)
        for other in names - {weight, bias}:
            self.formless[other] = f"{function} has no form for it"
        if weight or bias:
            edge = get_gradient_edge(output)
            self.calls.append(Call(function, weight, bias, use, edge, output.shape))

    def _name(self, parameter: Tensor | None) -> str | None:
        return self._names.get(id(parameter))

    def _selected(self, values: Sequence[Any]) -> Iterator[str]:
        for value in values:
            if isinstance(value, Tensor):
                if id(value) in self._names:
                    yield self._names[id(value)]
            elif isinstance(value, (list, tuple)):
                yield from self._selected(value)
            elif isinstance(value, nn.Module):  # the call of a registered one
                yield from self._selected(list(value.parameters()))


def _depends(output: Any) -> bool:
    """Whether the call made something differentiable: reading a shape or a dtype is no use."""
    if isinstance(output, Tensor):
        return output.grad_fn is not None
    return isinstance(output, (list, tuple)) and any(_depends(entry) for entry in output)


_builds = threading.local()


def in_build() -> bool:
    """Whether the model's passes are those of a build, and nobody else's."""
    return getattr(_builds, "depth", 0) > 0


@contextmanager
def recording(model: nn.Module, parameters: Mapping[str, Tensor]) -> Iterator[None]:
    """The scope of a whole build: autograd on, compiled modules eager, the model's state kept.

    Flags of the parameters and buffers that a forward pass changed are restored on the way out,
    also after an exception.
    """
    flags = {name: p.requires_grad for name, p in parameters.items()}
    buffers = [(b, b._version, b.detach().clone()) for b in model.buffers() if not b.is_inference()]
    with plain_functions(), torch.enable_grad(), whole_modules(model):
        _builds.depth = getattr(_builds, "depth", 0) + 1
        try:
            for p in parameters.values():
                p.requires_grad_(True)
            yield
        finally:
            _builds.depth -= 1
            for name, p in parameters.items():
                p.requires_grad_(flags[name])
            with torch.no_grad():
                for buffer, version, kept in buffers:
                    if buffer._version != version:
                        buffer.copy_(kept)


@contextmanager
def plain_functions() -> Iterator[None]:
    """Inside, a model calls functions that can be seen and differentiated, and nothing fused."""
    with torch.inference_mode(False), plain_attention_modules.used(), eager.used():
        yield


def refuse_training_mode(model: nn.Module) -> None:
    """Raise where a module is random or uses batch statistics, before any forward pass."""
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
