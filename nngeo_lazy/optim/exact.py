"""The exact curvature of a step's own batches, matrix-free."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..collectives import Group
from ..data import Batches
from ..distributed import Distributed
from ..errors import DataError
from ..operators import BaseLinearOperator
from ..precision import widened
from ..representations import Implicit
from ..space import ParamSpace
from ..sweep import Problem, Sweep
from .passed import Passed, examples_of
from .scores import HeadScores, Scores

__all__ = ["exact_curvature", "mean_eigenvalue", "quadratic_step"]


def exact_curvature(
    model: nn.Module, space: ParamSpace, passes: Sequence[Passed], scores: Scores, group: Group
) -> BaseLinearOperator:
    """The Gauss-Newton matrix of the loop's loss on its passes, which are run again for it.

    A model in training mode is the function that it was in each pass, with its random numbers and
    the statistics of its batch. One of half precision is differentiated in float32. Of several
    heads it is the sum of theirs, a mean over examples.
    """
    heads = sorted({passed.head for passed in passes})
    found: BaseLinearOperator | None = None
    for head in heads:
        own = [passed for passed in passes if passed.head == head]
        G, total = _of_head(model, space, own, scores.heads[head], group)
        if scores.several and total != examples_of(passes):
            G = G.mul(torch.tensor(total / examples_of(passes), dtype=G.dtype, device=G.device))
        found = G if found is None else found + G
    if found is None:
        raise DataError("expected at least one pass")
    return found


def _of_head(
    model: nn.Module, space: ParamSpace, passes: Sequence[Passed], scores: HeadScores, group: Group
) -> tuple[BaseLinearOperator, float]:
    """The Gauss-Newton matrix of one head, and what its loss is a mean over."""
    batches, parts = [], 0.0
    for passed in passes:
        if passed.run.replay is None or passed.gradient is None:
            raise DataError("expected passes that can be run again")
        target = scores.target(passed.outputs, passed.gradient, exact=True)
        quantity = scores.quantity(passed.outputs, target, exact=True)
        parts += float(scores.denominator(passed.outputs, target))
        batches.append({"replay": passed.run.replay, "target": target})
    head = passes[0].head
    loader = Batches(
        Distributed(batches, group, own=True) if group.size > 1 else batches,
        device=space.device,
        forward=lambda model, batch: batch["replay"](model)[head],
        target=lambda batch: batch["target"],
    )
    problem = Problem.of(model, space, loader, quantity, replayed=True)
    G = Implicit(check=False).build(Sweep(problem))
    wide = torch.promote_types(space.dtype, torch.float32)
    return G if G.dtype == wide else G.to(wide), scores.total(parts)


def mean_eigenvalue(F: BaseLinearOperator, seed: int, rank: int) -> float:
    """Of those that are not zero, from one product with random signs (Hutchinson 1990).

    Args:
        F: positive semidefinite.
        seed: of the signs.
        rank: at the most so many are not zero.
    """
    generator = torch.Generator(device=F.device).manual_seed(seed)
    signs = torch.randint(2, (F.shape[-1],), device=F.device, generator=generator)
    z = (2 * signs - 1).to(F.dtype)
    mean = abs(float(z @ (F @ z))) / min(len(z), rank)
    least: float = torch.finfo(F.dtype).tiny ** 0.5  # of outputs that are certain
    return max(mean, least)


def quadratic_step(
    F: BaseLinearOperator, gradient: Tensor, directions: Tensor, damping: Tensor
) -> Tensor:
    r"""The combination of directions that minimises the damped quadratic model.

    .. math:: c = \arg\min_c \; g^T D c + \tfrac12 c^T D^T (F + \mathrm{diag}(d)) D c

    Args:
        F: the exact curvature.
        gradient: g, (P,).
        directions: D, (P, k); zero columns get a coefficient of zero.
        damping: d, 0-d or (P,).

    Returns:
        c (k,), in the dtype of the gradient.

    Source: Martens and Grosse (2015), section 7.
    """
    damped = damping * directions if damping.dim() == 0 else damping[:, None] * directions
    product = (F @ directions) + damped
    inner = widened(directions.mT @ product)
    slope = widened(directions.mT @ gradient)
    scale = inner.diagonal().clamp_min(torch.finfo(inner.dtype).tiny).sqrt()
    scaled = inner / (scale[:, None] * scale[None, :])
    c = -torch.linalg.pinv(scaled, rtol=1e-12, hermitian=True) @ (slope / scale) / scale
    found: Tensor = c.to(gradient.dtype)
    return found
