"""One recorded forward: every torch function that receives a parameter, and its gradient edge.

Module hooks are the wrong tool: they are wrong after in-place operations, miss modules whose
function is never called through them, and do not fire in compiled models. A torch function mode
sees them all.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
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
from .layers import BATCH_STATISTICS, LAYERS, Use

__all__ = ["Call", "Recorder", "recording", "refuse_training_mode"]


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
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
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
        signature, layer = LAYERS.get(func, ((), None))
        call = {**dict(zip(signature, args, strict=False)), **kwargs}
        if func is F.batch_norm and call.get("training"):  # before it changes running statistics
            raise StochasticModelError(BATCH_STATISTICS)
        output = func(*args, **kwargs)
        names = list(self._selected((*args, *kwargs.values())))
        if not names or not _depends(output):
            return output
        name = getattr(func, "__name__", str(func))
        use: Use | str = f"{name} has no form"
        if layer is not None and isinstance(output, Tensor):
            use = layer(call, output)
        if isinstance(use, str):
            self.formless.update(dict.fromkeys(names, use))
            return output
        weight, bias = self._names.get(id(use.weight)), self._names.get(id(use.bias))
        for other in set(names) - {weight, bias}:
            self.formless[other] = f"it is the input of {name}"
        self.calls.append(Call(name, weight, bias, use, get_gradient_edge(output), output.shape))
        return output

    def _selected(self, values: Sequence[Any]) -> Iterator[str]:
        for value in values:
            if isinstance(value, Tensor):
                if id(value) in self._names:
                    yield self._names[id(value)]
            elif isinstance(value, (list, tuple)):
                yield from self._selected(value)


def _depends(output: Any) -> bool:
    """Whether the call made something differentiable: reading a shape or a dtype is no use."""
    if isinstance(output, Tensor):
        return output.grad_fn is not None
    return isinstance(output, (list, tuple)) and any(_depends(entry) for entry in output)


@contextmanager
def recording(model: nn.Module, parameters: Mapping[str, Tensor]) -> Iterator[None]:
    """The scope of a whole build: autograd on, compiled modules eager, the model's state kept.

    Flags of the parameters and buffers that a forward pass changed are restored on the way out,
    also after an exception.
    """
    flags = {name: p.requires_grad for name, p in parameters.items()}
    buffers = [(b, b._version, b.detach().clone()) for b in model.buffers() if not b.is_inference()]
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if "torch._dynamo" in sys.modules:  # else nothing can have been compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
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
