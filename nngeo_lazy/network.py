"""A model as a function of its selected parameters alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from .errors import DataError
from .jacobian.general import Whole
from .jacobian.record import plain_functions
from .space import ParamSpace

__all__ = ["Network"]


class Network:
    """One fixed function of the selected parameters: the rest of the model stays as it was.

    Buffers are copied, and every module is called in the mode (training or not) that it had.
    Parameters that are not selected are the model's own, not copied; if one has changed since,
    the function would be another one, and is refused.

    Args:
        model: the network.
        space: the selected parameters.
        forward: (model, raw batch) -> outputs.
    """

    def __init__(
        self, model: nn.Module, space: ParamSpace, forward: Callable[[nn.Module, Any], Tensor]
    ) -> None:
        self._call = Whole(model, forward)
        self._forward = forward
        self._model = model
        self._space = space
        self._own = space.parameters(model)
        names = {id(p): name for name, p in model.named_parameters()}
        self._names = [f"model.{names[id(p)]}" for p in self._own.values()]
        self._buffers = {f"model.{n}": b.detach().clone() for n, b in model.named_buffers()}
        selected = {id(p) for p in self._own.values()}
        self._rest = [
            (name, p, p._version) for name, p in model.named_parameters() if id(p) not in selected
        ]
        self._modes = [(module, module.training) for module in model.modules()]
        self._cast: tuple[torch.dtype, torch.device] | None = None
        self._cast_rest: dict[str, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        # the counter of a copy begins again: what has changed until then stays changed
        rest = [(name, p, p._version == version) for name, p, version in self._rest]
        return {**self.__dict__, "_rest": rest}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._rest = [(name, p, p._version if same else -1) for name, p, same in state["_rest"]]

    def __call__(self, parameters: Sequence[Tensor], raw: Any) -> Tensor:
        """The outputs (N, ...) of one batch at these parameters."""
        given = dict(zip(self._names, parameters, strict=True))
        for name, buffer in self._buffers.items():  # a forward pass may write to them
            given[name] = buffer.clone()
        given.update(self._cast_rest)
        out: Tensor = torch.func.functional_call(self._call, given, (self._as_cast(raw),))
        return out

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Where the function is evaluated, and also differentiated: layers may run again there.

        Attention runs unfused, since its fused kernels have one derivative only.

        Raises:
            DataError: a parameter outside of the selected ones has changed since.
        """
        changed = [name for name, p, version in self._rest if p._version != version]
        if changed:
            raise DataError(
                f"expected the parameters outside of params= to be those of the build, but "
                f"{changed[:3]} changed since: build again, or select all parameters that are "
                "trained"
            )
        with self._as_built(), plain_functions(), sdpa_kernel(SDPBackend.MATH):
            yield

    @contextmanager
    def loaded(self, vector: Tensor) -> Iterator[None]:
        """Inside, the model itself is this function at a flat vector (P,)."""
        buffers = {f"model.{n}": b for n, b in self._model.named_buffers()}
        before = [p.data for p in self._own.values()]
        kept = {name: buffer.detach().clone() for name, buffer in buffers.items()}
        try:
            for p, value in zip(self._own.values(), self._split(vector), strict=True):
                p.data = value.detach().to(p.dtype)
            with torch.no_grad():
                for name, buffer in buffers.items():
                    buffer.copy_(self._buffers[name])
            with self._as_built():
                yield
        finally:
            for p, data in zip(self._own.values(), before, strict=True):
                p.data = data
            with torch.no_grad():
                for name, buffer in buffers.items():
                    buffer.copy_(kept[name])

    def moved(self, dtype: torch.dtype, device: torch.device) -> Network:
        """The same function in another dtype or on another device, copied."""
        new = Network(self._model, self._space, self._forward)
        new._modes, new._rest = self._modes, self._rest
        new._cast = dtype, device
        new._buffers = {name: _cast(b, dtype, device) for name, b in self._buffers.items()}
        new._cast_rest = {f"model.{n}": _cast(p.detach(), dtype, device) for n, p, _ in self._rest}
        return new

    def _as_cast(self, raw: Any) -> Any:
        if self._cast is None:
            return raw
        dtype, device = self._cast
        return pytree.tree_map_only(Tensor, lambda x: _cast(x, dtype, device), raw)

    def _split(self, vector: Tensor) -> list[Tensor]:
        shapes = self._space.shapes
        parts = vector.split([shape.numel() for shape in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    @contextmanager
    def _as_built(self) -> Iterator[None]:
        """Every module in the mode that it had."""
        changed = [(m, m.training) for m, mode in self._modes if m.training != mode]
        try:
            for module, mode in changed:
                module.training = not mode
            yield
        finally:
            for module, mode in changed:
                module.training = mode


def _cast(tensor: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    return tensor.to(device, dtype) if tensor.is_floating_point() else tensor.to(device)
