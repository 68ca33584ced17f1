"""What a build will cost, from its first batch, before the work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .jacobian.forms import Form
from .jacobian.parts import Part
from .representations import Implicit, Representation
from .statistics import Cost, Sample, Statistic
from .sweep import DataSweep
from .table import Table

__all__ = ["Plan", "PlannedRow", "make_plan"]


@dataclass(frozen=True)
class PlannedRow:
    """One parameter of a matrix that has not been built.

    Attributes:
        parameter: its name.
        layer: the path of the module that owns it.
        form: how its Jacobian will be computed.
        block: the kind of block that it will lie in.
        size: how many numbers the parameter has.
        flops: of the statistics of its block, for each example; 0 where an earlier row counts them.
        bytes: what its block will take, likewise.
        note: why a fallback is taken; empty where none is.
    """

    parameter: str
    layer: str
    form: str
    block: str
    size: int
    flops: int
    bytes: int
    note: str


class Plan(Table[PlannedRow]):
    """Rows that print as a table, and totals.

    Attributes:
        passes: how often the data are read.
        directions: backward passes for each batch, in each pass that reads the data.
        batches: how many batches there are, None where the loader does not say.
        flops: of all statistics, for each example; forward and backward passes come on top.
        bytes: what the operator will take.
    """

    def __init__(
        self, rows: Sequence[PlannedRow], passes: int, directions: int, batches: int | None
    ) -> None:
        self.passes, self.directions, self.batches = passes, directions, batches
        self.flops = sum(row.flops for row in rows)
        self.bytes = sum(row.bytes for row in rows)
        data = "the data" if batches is None else f"{batches} batch{'es' * (batches != 1)}"
        super().__init__(
            rows,
            [
                f"{passes} pass{'es' * (passes != 1)} over {data}, "
                f"{directions} backward for each batch",
                f"{self.flops:,} flops for each example, {self.bytes:,} bytes",
            ],
        )


class _Product(Statistic):
    """One product with a matrix-free operator: J v and J^T u of a part."""

    def __init__(self, index: int, part: Part) -> None:
        super().__init__(index)
        self._size = part.layout.size

    def costs(self, sample: Sample) -> Iterator[Cost]:
        (k,) = self.indices  # J v and J^T u: two products each with the weight or its size
        yield Cost(k, "matrix-free", self._size, 8 * sample.positions(k) * self._size)

    def update(self, forms: Sequence[Form | None], first: bool, last: bool) -> None:
        raise TypeError("a product is no statistic of a pass")


def make_plan(representation: Representation | Implicit, sweep: DataSweep) -> Plan:
    """The plan of a build, from the first batch: one forward and one backward pass."""
    if isinstance(representation, Representation):
        representation.check(sweep)
    sample, batches = sweep.sampled()
    parts = sweep.parts
    outlines = (
        [[_Product(k, part) for k, part in enumerate(parts)]]
        if isinstance(representation, Implicit)
        else representation.outline(sweep, range(len(parts)))
    )
    found: dict[int, list[Cost]] = {}
    for statistics in outlines:
        for statistic in statistics:
            for cost in statistic.costs(sample):
                found.setdefault(cost.part, []).append(cost)
    space, itemsize = sweep.space, sweep.dtype.itemsize
    rows: dict[str, PlannedRow] = {}
    for k, part in enumerate(parts):
        costs = found.get(k, [])
        kinds = [cost.block for cost in costs if cost.block]
        for name in part.names:
            first = name == part.names[0]
            where = space.slices[name]
            rows[name] = PlannedRow(
                name,
                space.owner(name),
                part.form_name,
                kinds[-1] if kinds else "",
                where.stop - where.start,
                sum(cost.flops for cost in costs) if first else 0,
                sum(cost.numbers for cost in costs if cost.block) * itemsize if first else 0,
                part.note,
            )
    ordered = [rows[name] for name in space.names]
    return Plan(ordered, len(outlines), sample.directions, batches)
