"""The rows of a Jacobian, stored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .. import statistics
from ..collectives import Group
from ..errors import DataError, TooLargeError
from ..facts import Cost, Facts, Sample
from ..jacobian.forms import Form
from ..jacobian.parts import Kind, Part
from ..statistics import Statistic, flat_order

__all__ = ["RowStack"]


class RowStack(Statistic):
    """The rows themselves, all directions of all examples."""

    def __init__(
        self, indices: Sequence[int], parts: Sequence[Part], rank: int | None = None
    ) -> None:
        super().__init__(*indices)
        self._parts = parts
        self._size = sum(part.layout.size for part in parts)
        self._rank = rank  # of what will be made of the rows, if it is given
        self._batch: list[Tensor] = []  # chunks of directions (r, N, p) of the current batch
        self._rows: list[Tensor] = []  # (N, R, p) of each batch
        self._bytes = 0

    def costs(self, sample: Sample) -> Iterator[Cost]:
        """As many numbers for each parameter as the root has columns."""
        rank = min(sample.directions * sample.examples, self._size)
        rank = rank if self._rank is None else min(rank, self._rank)
        for k, part in zip(self.indices, self._parts, strict=True):
            size = part.layout.size
            flops = 2 * sample.directions * sample.positions(k) * size
            core = rank if k == self.indices[0] else 0  # beside the root
            yield Cost(k, f"rank {rank} of {self._size}", rank * size + core, flops)

    def update(self, forms: Sequence[Form | None], first: bool, last: bool) -> None:
        """Keep the rows of a chunk.

        Raises:
            TooLargeError: all rows so far take more than 8 GiB.
        """
        present = [form for form in forms if form is not None]
        if not present:
            return
        r, n, _ = present[0].shape
        self._bytes += r * n * self._size * present[0].dtype.itemsize
        self._require_room()
        rows = [torch.cat([form.rows(a, b) for a, b in form.tiles()], 1) for form in present]
        self._batch.append(torch.cat(rows, -1))
        if last:
            self._rows.append(torch.cat(self._batch).transpose(0, 1))
            self._batch = []

    def rows(self, facts: Facts) -> Tensor:
        """(N, R, p) in flat parameter order; every batch must have as many directions."""
        counts = sorted({rows.shape[1] for rows in self._rows})
        if len(counts) > 1:
            raise DataError(
                f"expected every batch to have one number of outputs, got {counts}: pad them alike"
            )
        rows = self._ordered(torch.cat(self._rows))
        return rows - rows.mean(0) if facts.center else rows

    def stacked(self, facts: Facts) -> Tensor:
        """All rows (K, p), of batches with any numbers of directions."""
        if not self._rows:  # of parameters that the outputs do not depend on
            return torch.zeros(1, self._size, dtype=facts.dtype, device=facts.space.device)
        if facts.center:
            return self.rows(facts).flatten(0, 1)
        return self._ordered(torch.cat([rows.flatten(0, 1) for rows in self._rows]))

    def join(self, group: Group, device: torch.device) -> None:
        """Take the rows of all processes, one after the other.

        Raises:
            TooLargeError: all rows take more than 8 GiB.
        """
        self._bytes = sum(group.gather(self._bytes))
        self._require_room()
        shapes = group.gather([rows.shape for rows in self._rows])
        own = (
            torch.cat([r.flatten() for r in self._rows])
            if self._rows
            else torch.empty(0, device="cpu")
        )
        joint: list[Tensor] = []
        for known, flat in zip(shapes, group.collect(own.to(device)), strict=True):
            parts = flat.split([shape.numel() for shape in known])
            joint += [part.view(shape) for part, shape in zip(parts, known, strict=True)]
        self._rows = joint

    def _require_room(self) -> None:
        limit = statistics.MAX_BLOCK_BYTES
        if self._bytes > limit:
            raise TooLargeError(
                f"the rows of {self._size} parameters for every example and output direction take "
                f"more than the limit of {limit / 2**30:.0f} GiB: take estimator='mc' or "
                "'empirical' (one row for each example), fewer examples, or another representation"
            )

    def _ordered(self, joint: Tensor) -> Tensor:
        used = [part for part in self._parts if part.kind is not Kind.UNUSED]
        out = joint.new_zeros(*joint.shape[:-1], self._size)
        out[..., flat_order(self._parts, used).to(joint.device)] = joint
        return out
