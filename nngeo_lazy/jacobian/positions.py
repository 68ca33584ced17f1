"""Which positions of a batch count in Kronecker factors.

How far a batch is padded must not change its curvature. A position counts if it exists and is
scored by the loss, or if a gradient arrives there. What comes before a scored token counts through
attention, and padding behind it does not.
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

__all__ = ["Mark", "counted", "marks_of", "spread"]


class Mark(IntEnum):
    """What is known of a position before gradients arrive."""

    MISSING = 0
    UNSCORED = 1
    SCORED = 2


def marks_of(scored: Tensor | None, exist: Tensor | None) -> Tensor | None:
    """Marks (N, S) from masks (N, ...) of equal or no shape; None if every position is scored.

    A mask of other positions than the scored ones says alone which positions there are.
    """
    if scored is None and exist is None:
        return None
    if exist is None and scored is not None:
        mine = scored.reshape(len(scored), -1) != 0
        if mine.device.type == "cpu" and bool(mine.all()):  # most often, so that it is asked first
            return None
        return torch.where(mine, int(Mark.SCORED), int(Mark.UNSCORED))
    elif exist is not None:
        there = exist.reshape(len(exist), -1) != 0
        marks = torch.where(there, Mark.SCORED, Mark.MISSING)
        if scored is not None and scored.reshape(len(scored), -1).shape == there.shape:
            unscored = there & (scored.reshape(len(scored), -1) == 0)
            marks = marks.masked_fill(unscored, Mark.UNSCORED)
    # on other devices reading it would wait for them
    if marks.device.type == "cpu" and bool((marks == Mark.SCORED).all()):
        return None
    return marks


def spread(marks: Tensor | None, t: int) -> Tensor | None:
    """The marks of a layer's T positions; of other positions than these nothing is known."""
    if marks is None or marks.shape[1] == t:
        return marks
    return torch.full((marks.shape[0], t), Mark.UNSCORED, device=marks.device)


def counted(marks: Tensor, reached: Tensor) -> Tensor:
    """Which positions (N, T) count, with those that gradients reach."""
    return (marks == Mark.SCORED) | ((marks == Mark.UNSCORED) & reached)
