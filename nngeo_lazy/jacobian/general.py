"""Per-example gradients of any parameters of any model: the way that always works.

Of four ways, the first that reproduces autograd's gradients on probed examples is kept. Two cut the
batch: `vmap` of the gradient over examples, and one forward for each example. Two mask it: backward
passes of the whole batch, many together (`vmap` again) or one by one. These take the nodes of a
graph, too.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from .. import tree
from ..errors import UnsupportedLayerError
from ..skeleton import skeleton
from ..switches import unfused_attention
from .proof import agree

__all__ = ["Forward", "GeneralRows", "Way", "cut", "example_leaves"]

Forward = Callable[[nn.Module, Any], Tensor]


class Way(Enum):
    """How rows are made from the model alone."""

    VMAP = "vmap"
    SLICES = "slices"
    MASKED = "masked"
    SINGLY = "singly"

    @property
    def of_whole(self) -> bool:
        """Whether it differentiates the outputs of the whole batch, whose graph it needs."""
        return self in (Way.MASKED, Way.SINGLY)


MASKED_BYTES = 2**23  # of cotangents that are differentiated together
MASKED_EXAMPLES = 64


def example_leaves(raw: Any, n: int) -> tuple[int, ...]:
    """Which leaves of a batch of n examples are tensors with the examples in front."""
    return tuple(
        k
        for k, leaf in enumerate(tree.leaves(raw))
        if isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == n
    )


def cut(raw: Any, leaves: Sequence[int], index: slice | Tensor) -> Any:
    """Some examples of a batch, whose `leaves` hold the examples in front."""
    values = list(tree.leaves(raw))
    return tree.replaced(raw, {k: values[k][index] for k in leaves})


class GeneralRows:
    """Rows of some parameters' Jacobian, made from the model alone.

    Args:
        model: the network.
        parameters: its parameters by name, those whose rows are wanted.
        forward: (model, raw batch) -> outputs.
    """

    def __init__(
        self, model: nn.Module, parameters: Mapping[str, Tensor], forward: Forward
    ) -> None:
        self.model = model
        self.parameters = dict(parameters)
        self.forward = forward
        self.way = Way.VMAP
        self._leaves: tuple[int, ...] = ()

    def probe(self, raw: Any, outputs: Tensor, cotangent: Tensor, examples: Sequence[int]) -> None:
        """Keep the first way whose rows of the probed examples equal autograd's gradients.

        Args:
            raw: the batch.
            outputs: the model's, with their graph.
            cotangent: shaped like them, zero outside of the probed examples.
            examples: those that are probed.
        """
        reasons = []
        self._leaves = example_leaves(raw, outputs.shape[0])
        alone = []
        for example in examples:
            one = torch.zeros_like(cotangent)
            one[example] = cotangent[example]
            alone.append((example, one, self._flat(outputs, one)))
        for way in Way:
            self.way = way
            try:
                with warnings.catch_warnings():
                    # Without a batching rule vmap loops inside, slower than one forward each.
                    warnings.filterwarnings("error", message=".*performance drop.*")
                    agrees = all(
                        agree(self(raw, outputs, one[None], e, e + 1)[0, 0], expected)
                        for e, one, expected in alone
                    )
            except Exception as error:  # noqa: BLE001 - whatever a foreign model raises
                reasons.append(f"{way.value}: {type(error).__name__}: {error}")
                continue
            if agrees:
                return
            reasons.append(f"{way.value}: its rows differ from autograd's gradients")
        raise UnsupportedLayerError(
            f"found no way to the per-example gradients of {list(self.parameters)}; tried "
            + "; ".join(reasons)
        )

    def passes(self, directions: int, chunks: int, n: int) -> tuple[int, int]:
        """Forward and backward passes over all n examples of a batch.

        Args:
            directions: of the batch.
            chunks: into which they are cut.
            n: the examples of the batch.
        """
        forward = {Way.VMAP: directions, Way.SLICES: chunks}
        return forward.get(self.way, 0), directions * (n if self.way.of_whole else 1)

    def __call__(
        self, raw: Any, outputs: Tensor, directions: Tensor, start: int, stop: int
    ) -> Tensor:
        """Rows (R, n, p) of a range of examples; directions (R, N, *outputs)."""
        make = {Way.VMAP: self._vmap, Way.SLICES: self._slices}
        made: Tensor = make.get(self.way, self._masked)(raw, outputs, directions, start, stop)
        return made

    def _vmap(self, raw: Any, outputs: Tensor, directions: Tensor, start: int, stop: int) -> Tensor:
        leaves = list(tree.leaves(raw))
        shared = {id(p): p for p in self.model.parameters()}

        def score(
            parameters: dict[str, Tensor], direction: Tensor, examples: list[Tensor]
        ) -> Tensor:
            here = {k: x.unsqueeze(0) for k, x in zip(self._leaves, examples, strict=True)}
            given = {id(self.parameters[name]): p for name, p in parameters.items()}
            own = skeleton(self.model, {**shared, **given})
            out = self.forward(own, tree.replaced(raw, here))
            return (out * direction.unsqueeze(0)).sum()

        named = {name: p.detach() for name, p in self.parameters.items()}
        examples = [leaves[k][start:stop] for k in self._leaves]
        rows = []
        for direction in directions:
            # No graph: the parameters that are not differentiated here require a gradient, too.
            with torch.no_grad(), unfused_attention.used():
                by_name = torch.func.vmap(torch.func.grad(score), (None, 0, 0))(
                    named, direction[start:stop], examples
                )
            rows.append(torch.cat([g.flatten(1) for g in by_name.values()], 1))
        return torch.stack(rows)

    def _slices(
        self, raw: Any, outputs: Tensor, directions: Tensor, start: int, stop: int
    ) -> Tensor:
        rows = []
        for k in range(start, stop):
            with torch.enable_grad():  # rows may be asked for where there is none
                out = self.forward(self.model, cut(raw, self._leaves, slice(k, k + 1)))
            rows.append(torch.stack([self._flat(out, d[k : k + 1]) for d in directions]))
        return torch.stack(rows, 1)

    def _masked(
        self, raw: Any, outputs: Tensor, directions: Tensor, start: int, stop: int
    ) -> Tensor:
        many = max(1, MASKED_BYTES // max(1, directions.nbytes))
        step = 1 if self.way is Way.SINGLY else min(many, MASKED_EXAMPLES)
        rows = []
        for first in range(start, stop, step):
            examples = torch.arange(first, min(first + step, stop), device=outputs.device)
            own = torch.arange(len(examples), device=outputs.device)
            alone = directions.new_zeros(len(directions), len(own), *outputs.shape)
            alone[:, own, examples] = directions[:, examples]
            flat = alone.flatten(0, 1)  # (R n,N,...)
            if self.way is Way.SINGLY:
                made = torch.stack([self._flat(outputs, one) for one in flat])
            else:
                made = self._flat(outputs, flat, batched=True)
            rows.append(made.unflatten(0, alone.shape[:2]))
        return torch.cat(rows, 1)

    def _flat(self, out: Tensor, cotangent: Tensor, *, batched: bool = False) -> Tensor:
        """The gradients of all parameters, side by side; for each of a batch of cotangents."""
        parameters, lead = list(self.parameters.values()), cotangent.shape[: int(batched)]
        grads = torch.autograd.grad(
            out,
            parameters,
            cotangent,
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=batched,
        )
        return torch.cat(
            [
                p.new_zeros(*lead, p.numel()) if g is None else g.reshape(*lead, -1)
                for p, g in zip(parameters, grads, strict=True)
            ],
            -1,
        )
