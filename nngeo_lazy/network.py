"""A model as a function of its selected parameters alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from . import tree
from .errors import DataError
from .jacobian.scopes import plain_functions
from .skeleton import refuse_strays, skeleton
from .space import ParamSpace
from .switches import together, unfused_attention, without_checkpoints

__all__ = ["Network"]


class Network:
    """One fixed function of the selected parameters: the rest of the model stays as it was.

    It runs in copies of the model's modules, made as they are now, and never in the model: modes,
    attributes and buffers of later are not seen. Parameters that are not selected share the
    model's memory; if one has changed since, the function would be another one, and is refused.

    Args:
        model: the network.
        space: the selected parameters.
        forward: (model, raw batch) -> outputs.
    """

    def __init__(
        self, model: nn.Module, space: ParamSpace, forward: Callable[[nn.Module, Any], Tensor]
    ) -> None:
        self._forward = forward
        self._space = space
        self._own = space.parameters(model)
        selected = {id(p) for p in self._own.values()}
        self._rest = [
            (name, p, p._version) for name, p in model.named_parameters() if id(p) not in selected
        ]
        self._modules = skeleton(model)
        self._cast: tuple[torch.dtype, torch.device] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # the counter of a copy begins again: what has changed until then stays changed
        rest = [(name, p, p._version == version) for name, p, version in self._rest]
        return {**self.__dict__, "_rest": rest}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._rest = [(name, p, p._version if same else -1) for name, p, same in state["_rest"]]

    def __call__(self, parameters: Sequence[Tensor], raw: Any) -> Tensor:
        """The outputs (N, ...) of one batch at these parameters."""
        return self._forward(self._given(parameters), self._as_cast(raw))

    def at(self, vector: Tensor) -> nn.Module:
        """A model of its own that is this function at a flat vector (P,)."""
        vector = vector.detach()
        vector = vector.clone() if vector.is_inference() else vector
        values = self._space.unravel(vector).values()
        return self._given([nn.Parameter(v.to(self._space.dtype)) for v in values])

    def scope(self) -> AbstractContextManager[Any]:
        """A scope in which the function is evaluated, and differentiated.

        Layers may run again then.

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
        return together(plain_functions(), unfused_attention.used(), without_checkpoints())

    def taped_rows(
        self, vector: Tensor, inputs: Tensor, names: Sequence[str] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Outputs (N, ...) and Jacobian (N C, P) with a graph to inputs and parameters, one by one.

        Args:
            vector: the parameters, flat; their graph is continued.
            inputs: a tensor of inputs, whose graph is continued.
            names: of the parameters whose derivatives are the columns; all by default.
        """
        vector = vector if vector.requires_grad else vector.detach().requires_grad_()
        known = self._space.unravel(vector)
        values = list(known.values())
        columns = values if names is None else [known[name] for name in names]
        outputs, rows = [], []
        with self.scope(), torch.enable_grad():
            for one in inputs.split(1):
                found = self(values, one)
                outputs.append(found)
                for output in found.flatten():
                    row = torch.autograd.grad(
                        output, columns, create_graph=True, materialize_grads=True
                    )
                    rows.append(torch.cat([each.flatten() for each in row]))
            return torch.cat(outputs), torch.stack(rows)

    def refuse_strays(self, outputs: Tensor) -> None:
        """Raise DataError if outputs depend on the model's own parameters in another way."""
        refuse_strays(outputs, self._own)

    def moved(self, dtype: torch.dtype, device: torch.device) -> Network:
        """The same function in another dtype or on another device, copied."""
        new = copy.copy(self)
        new._cast = dtype, device
        held = {id(b): _cast(b, dtype, device) for b in self._modules.buffers()}
        for p in self._modules.parameters():
            held[id(p)] = nn.Parameter(_cast(p.detach(), dtype, device), p.requires_grad)
        new._modules = skeleton(self._modules, held)
        return new

    def _given(self, parameters: Sequence[Tensor]) -> nn.Module:
        """The modules with these parameters, for one evaluation."""
        selected = self._space.parameters(self._modules).values()
        return skeleton(
            self._modules, {id(p): new for p, new in zip(selected, parameters, strict=True)}
        )

    def _as_cast(self, raw: Any) -> Any:
        if self._cast is None:
            return raw
        dtype, device = self._cast

        def cast(leaf: Any) -> Any:
            return _cast(leaf, dtype, device) if isinstance(leaf, Tensor) else leaf

        return tree.map_leaves(cast, raw)


def _cast(tensor: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    return tensor.to(device, dtype) if tensor.is_floating_point() else tensor.to(device)
