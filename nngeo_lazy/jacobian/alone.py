"""Whether a model is one fixed function of each example: the outputs of examples on their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from .. import tree
from ..errors import StochasticModelError
from .general import cut, example_leaves
from .passes import Pass
from .proof import agree

__all__ = ["Alone", "draws", "outputs_alone", "require_repeatable"]

ROUNDING = 0.5  # a power of eps: within it, outputs are the same
DOUBTFUL = 0.25  # outputs that nearly cancel carry few digits: within it, gradients tell

Run = Callable[[Any], Pass]


class Alone(Enum):
    """What the outputs of a batch's examples on their own are like."""

    SAME = "same"
    DOUBTFUL = "doubtful"  # nearly the same: by rounding, or mixed a little
    UNKNOWN = "unknown"  # the batch cannot be cut


def draws(device: torch.device) -> list[Tensor]:
    """The states of the generators that a forward pass may draw from."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def outputs_alone(record: Pass, run: Run) -> Alone:
    """Pass the examples of a batch again in two halves, in random order.

    Raises:
        StochasticModelError: the outputs differ: the model is random, or mixes examples.
    """
    n, outputs = record.n, record.outputs.detach()
    if n == 1:
        require_repeatable(record, run)
        return Alone.SAME
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    halves = [order[: (n + 1) // 2], order[(n + 1) // 2 :]]
    leaves = example_leaves(record.raw, n)
    found: list[Tensor] = []
    if _ragged(record.raw, leaves):
        require_repeatable(record, run)
        return Alone.UNKNOWN
    for half in halves:
        try:
            alone = run(cut(record.raw, leaves, half)).outputs.detach()
        except Exception:  # noqa: BLE001 - whatever a foreign model raises
            alone = None
        if alone is None or alone.shape != (len(half), *outputs.shape[1:]):
            require_repeatable(record, run)
            return Alone.UNKNOWN
        found.append(alone)
    within = outputs[order.to(outputs.device)]
    if agree(torch.cat(found), within, ROUNDING):
        return Alone.SAME
    require_repeatable(record, run)
    if agree(torch.cat(found), within, DOUBTFUL):
        return Alone.DOUBTFUL
    raise mixed(n)


def require_repeatable(record: Pass, run: Run) -> None:
    """Raise where a second pass of the same batch differs."""
    if not agree(run(record.raw).outputs, record.outputs, ROUNDING):
        raise StochasticModelError(
            "expected one fixed function, but two forward passes of the same batch differ: "
            "call model.eval(), and remove sampling from the forward pass"
        )


def mixed(n: int) -> StochasticModelError:
    """The error of a model whose examples meet."""
    return StochasticModelError(
        "expected a model that treats each example on its own, but the outputs of "
        f"{(n + 1) // 2} examples change when the {n // 2} others are left out: per-"
        "example gradients do not exist for it. Batch statistics? Call model.eval()"
    )


def _ragged(raw: Any, leaves: Sequence[int]) -> bool:
    """Whether some indices are not sorted by example: tokens of all bags, edges of a graph."""
    return any(
        isinstance(leaf, Tensor)
        and leaf.dim() == 1
        and len(leaf) > 1
        and not (leaf.is_floating_point() or leaf.dtype == torch.bool or k in leaves)
        for k, leaf in enumerate(tree.leaves(raw))
    )
