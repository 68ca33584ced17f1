"""Influences whose training data are shared out to processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..data import Batch, Batches
from ..errors import DataError

__all__ = ["of_shares"]


def of_shares(own: Batches, columns: Callable[[Any], Tensor]) -> Tensor:
    """The columns of all processes, in the order of the batches, from those of each one's share."""
    with own.group.together("influences"):
        sizes = {batch.key: _num_examples(batch) for batch in own}
        mine = columns(own.loader).mT if sizes else torch.empty(0, device=own.device)
        if sizes and len(mine) != sum(sizes.values()):
            raise DataError(
                f"expected {sum(sizes.values())} examples in this process's share, as its labels "
                f"say, but it has {len(mine)}"
            )
    parts: dict[tuple[int, ...], Tensor] = {}
    for known, rows in zip(own.group.gather(sizes), own.group.collect(mine), strict=True):
        if known:
            parts.update(zip(known, rows.split(list(known.values())), strict=True))
    return torch.cat([parts[key] for key in sorted(parts)]).mT


def _num_examples(batch: Batch) -> int:
    """Of a batch that has not been passed through the model."""
    leaves = [*tree_leaves(batch.target), *tree_leaves(batch.raw)]
    return next(len(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim() > 0)
