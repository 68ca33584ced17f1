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

__all__ = ["Alone", "draws", "outputs_alone", "ragged", "require_apart", "require_repeatable"]

PROBED = 3  # examples that are passed on their own
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


def outputs_alone(record: Pass, run: Run, some: Tensor | None = None) -> tuple[Alone, Pass | None]:
    """Pass some examples of a batch again on their own, a few if not given, and then others.

    Returns:
        What the outputs are like, and the pass of some.

    Raises:
        StochasticModelError: the outputs differ: the model is random, or mixes examples.
    """
    n, outputs = record.n, record.outputs.detach()
    if n == 1:
        require_repeatable(record, run)
        return Alone.SAME, None
    few = torch.tensor([0, n // 2, n - 1] if n > PROBED else [0]) if some is None else some
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    others = order[~torch.isin(order, few)]
    if some is None and record.signature.alike:  # if one example meets others, all of them do
        others = others[:PROBED]
    leaves = example_leaves(record.raw, n)
    found: list[Pass] = []
    is_ragged = ragged(record.raw, leaves)
    for index in [] if is_ragged else [few, others]:
        try:
            alone = run(cut(record.raw, leaves, index))
        except Exception:  # noqa: BLE001 - whatever a foreign model raises
            break
        if alone.outputs.shape != (len(index), *outputs.shape[1:]):
            break
        found.append(alone)
    if len(found) < 2:
        require_repeatable(record, run)
        return Alone.UNKNOWN, None
    within = outputs[torch.cat([few, others]).to(outputs.device)]
    mine = torch.cat([alone.outputs.detach() for alone in found])
    if agree(mine, within, ROUNDING):
        return Alone.SAME, found[0]
    require_repeatable(record, run)
    if record.drawn:  # two passes may draw alike
        raise _random()
    if agree(mine, within, DOUBTFUL):
        return Alone.DOUBTFUL, None
    raise mixed(len(few), n)


def require_apart(record: Pass, run: Run) -> None:
    """Raise if the outputs of random halves of a batch are not what they are within it.

    Any two examples are apart in one of the halves with a probability of 15/16.
    """
    generator = torch.Generator().manual_seed(0)
    for _ in range(4 if record.n > 1 else 0):
        order = torch.randperm(record.n, generator=generator)
        outputs_alone(record, run, order[: record.n // 2])


def require_repeatable(record: Pass, run: Run) -> None:
    """Raise if a second pass of the same batch differs."""
    if not agree(run(record.raw).outputs, record.outputs, ROUNDING):
        raise _random()


def _random() -> StochasticModelError:
    return StochasticModelError(
        "expected one fixed function, but two forward passes of the same batch differ: "
        "call model.eval(), and remove sampling from the forward pass"
    )


def mixed(few: int, n: int) -> StochasticModelError:
    """The error of a model whose examples meet."""
    return StochasticModelError(
        "expected a model that treats each example on its own, but the outputs of "
        f"{few} examples change when the {n - few} others are left out: per-"
        "example gradients do not exist for it. Batch statistics? Call model.eval()"
    )


def ragged(raw: Any, leaves: Sequence[int]) -> bool:
    """Whether some indices are not sorted by example: tokens of all bags, edges of a graph."""
    return any(
        isinstance(leaf, Tensor)
        and leaf.dim() == 1
        and len(leaf) > 1
        and not (leaf.is_floating_point() or leaf.dtype == torch.bool or k in leaves)
        for k, leaf in enumerate(tree.leaves(raw))
    )
