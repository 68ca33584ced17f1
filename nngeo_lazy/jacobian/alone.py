"""Whether a model is one fixed function of each example: the outputs of examples on their own."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from .. import tree
from ..errors import StochasticModelError
from ..skeleton import skeleton
from .general import Forward, cut, example_leaves
from .passes import Pass, gradients_at
from .proof import agree

__all__ = [
    "DOUBTFUL",
    "REPEATED",
    "Alone",
    "draws",
    "drew",
    "in_float64",
    "in_groups",
    "mixed",
    "outputs_alone",
    "require_apart",
    "require_gradients_alone",
    "require_repeatable",
]

PROBED = 3  # examples that are passed on their own
SINGLY = 8  # a batch of at most so many examples is cut into single ones
ROUNDING = 0.5  # outputs are the same if they differ by at most eps to this power
REPEATED = 16  # passes of a model that draws: with small batches two are often alike
DOUBTFUL = 0.25  # up to eps to this power, gradients decide: outputs may nearly cancel

Run = Callable[[Any], Pass]
Plain = Callable[[Any], Tensor]  # the same without a record


class Alone(Enum):
    """What the outputs of a batch's examples on their own are like."""

    SAME = "same"
    DOUBTFUL = "doubtful"  # they differ a little: by rounding, or by mixing
    UNKNOWN = "unknown"  # the batch cannot be cut


def draws(device: torch.device) -> list[Any]:
    """The states of the generators of torch, Python and NumPy, from which a pass may draw."""
    states: list[Any] = [torch.get_rng_state().numpy().tobytes(), random.getstate()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device).numpy().tobytes())
    if "numpy" in sys.modules:  # what is not imported draws nothing
        _, keys, *rest = sys.modules["numpy"].random.get_state()
        states.append((keys.tobytes(), *rest))
    return states


def drew(before: Sequence[Any], device: torch.device) -> bool:
    """Whether something was drawn since the generators were in these states."""
    return list(before) != draws(device)


def outputs_alone(
    record: Pass, run: Run | None, plain: Plain, precise: Plain, some: Tensor | None = None
) -> tuple[Alone, Pass | None]:
    """Pass some examples of a batch again on their own, a few if not given, and then the others.

    Args:
        record: of the batch.
        run: records the pass of some; None if nobody wants it.
        plain: a forward pass, for all else.
        precise: the same in float64.
        some: which examples.

    Returns:
        What the outputs are like, and the pass of some.

    Raises:
        StochasticModelError: the outputs differ: the model is random, or mixes examples.
    """
    n, outputs = record.n, record.outputs.detach()
    if n == 1:
        require_repeatable(record, plain)
        return Alone.SAME, None
    few = (
        torch.tensor([0, n // 2, n - 1] if n > PROBED else [0], device="cpu")
        if some is None
        else some
    )
    found: list[Pass] = []

    def outputs_of(raw: Any) -> Tensor:
        if run is None or found:
            return plain(raw)
        found.append(run(raw))
        return found[0].outputs

    mine = in_groups(record.raw, outputs, outputs_of, few)
    if mine is None:
        require_repeatable(record, plain)
        return Alone.UNKNOWN, None
    if agree(mine, outputs, ROUNDING):
        return Alone.SAME, next(iter(found), None)
    require_repeatable(record, plain)
    if record.drawn:  # two passes may draw alike
        raise _random()
    if _alone_in_float64(record, precise, few):
        return Alone.SAME, next(iter(found), None)
    if agree(mine, outputs, DOUBTFUL):
        return Alone.DOUBTFUL, None
    raise mixed(len(few), n)


def _alone_in_float64(record: Pass, precise: Plain, few: Tensor) -> bool:
    """Whether outputs of examples on their own differ by the rounding of the model's precision."""
    if record.outputs.dtype == torch.float64:
        return False
    try:
        whole = precise(record.raw)
    except Exception:  # noqa: BLE001 - a model that is written for one precision
        return False
    mine = in_groups(record.raw, whole, precise, few)
    return mine is not None and whole.dtype == torch.float64 and agree(mine, whole, ROUNDING)


def in_float64(model: nn.Module, forward: Forward, raw: Any) -> Tensor:
    """The outputs of a copy of a model in float64."""

    def double(value: Any) -> Any:
        real = isinstance(value, Tensor) and value.is_floating_point()
        return value.detach().double() if real else value

    held = {id(t): double(t) for t in (*model.parameters(), *model.buffers())}
    with torch.no_grad():
        return forward(skeleton(model, held), tree.map_leaves(double, raw))


def in_groups(
    raw: Any, outputs: Tensor, run: Callable[[Any], Tensor], few: Tensor
) -> Tensor | None:
    """The outputs of a batch whose examples are passed in groups: some, and the others.

    Args:
        raw: the batch.
        outputs: of all examples together, (N, ...).
        run: a batch to its outputs.
        few: which examples are a group; the others are two, or single in a small batch.

    Returns:
        (N, ...), or None if the batch cannot be cut.
    """
    n, leaves = outputs.shape[0], example_leaves(raw, outputs.shape[0])
    if not leaves or ragged(raw, leaves):
        return None
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0), device="cpu")
    others = order[~torch.isin(order, few)]
    count = len(others) if n <= SINGLY else 2
    groups = [few, *others.tensor_split(count)]
    made = []
    for index in groups:
        try:
            alone = run(cut(raw, leaves, index)).detach()
        except Exception:  # noqa: BLE001 - whatever a foreign model raises
            return None
        if alone.shape != (len(index), *outputs.shape[1:]):
            return None
        made.append(alone)
    back = torch.cat(groups).argsort().to(outputs.device)
    return torch.cat(made)[back]


def require_apart(record: Pass, plain: Plain, precise: Plain) -> None:
    """Raise if the outputs of random halves of a batch are not what they are within it.

    Any two examples are apart in one of the halves with a probability of 15/16.
    """
    generator = torch.Generator().manual_seed(0)
    for _ in range(4 if record.n > 1 else 0):
        order = torch.randperm(record.n, generator=generator, device="cpu")
        outputs_alone(record, None, plain, precise, order[: record.n // 2])


def require_gradients_alone(record: Pass, plain: Plain, parameters: Sequence[Tensor]) -> None:
    """Raise if an example that is passed on its own has other gradients.

    Outputs that nearly agree do not tell rounding from a little mixing: those of saturated units
    are nearly the same for all examples. The gradients of such outputs are not.
    """
    n, outputs = record.n, record.outputs
    leaves = example_leaves(record.raw, n)
    generator = torch.Generator(device=outputs.device).manual_seed(0)
    for k in sorted({0, n // 2, n - 1}):
        try:
            single = plain(cut(record.raw, leaves, slice(k, k + 1)))
        except Exception:  # noqa: BLE001 - a model that takes no single example
            return
        if single.shape != (1, *outputs.shape[1:]) or single.grad_fn is None:
            return
        noise = torch.randn(single.shape, generator=generator, device=outputs.device)
        cotangent = noise.to(single)
        whole = torch.zeros_like(outputs)
        whole[k] = cotangent[0]
        within = gradients_at(outputs, parameters, whole)
        by_itself = gradients_at(single, parameters, cotangent)
        if not _alike(within, by_itself):
            raise mixed(1, n)


def _alike(some: Sequence[Tensor | None], others: Sequence[Tensor | None]) -> bool:
    """Whether gradients agree for each parameter, up to the rounding of the largest one."""
    total = math.hypot(*(float(g.detach().norm()) for g in others if g is not None))
    for a, b in zip(some, others, strict=True):
        given = a if b is None else b
        if given is None:
            continue
        a, b = ((torch.zeros_like(given) if g is None else g).to_dense() for g in (a, b))
        eps = torch.finfo(given.dtype).eps
        if not bool((a - b).norm() <= eps**DOUBTFUL * b.norm() + eps**0.75 * total):
            return False
    return True


def require_repeatable(record: Pass, plain: Plain) -> None:
    """Raise if another pass of the same batch differs."""
    for _ in range(REPEATED if record.drawn else 1):
        if not agree(plain(record.raw), record.outputs, ROUNDING):
            raise _random()


def _random() -> StochasticModelError:
    return StochasticModelError(
        "expected one fixed function, but two forward passes of the same batch differ: "
        "call model.eval(), and remove sampling from the forward pass"
    )


def mixed(few: int, n: int, more: str = "") -> StochasticModelError:
    """The error of a model whose examples meet; `more` is a remedy of the caller's own."""
    return StochasticModelError(
        "expected a model that treats each example on its own, but the outputs of "
        f"{few} examples change when the {n - few} others are left out: per-"
        f"example gradients do not exist for it. Batch statistics? Call model.eval(){more}"
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
