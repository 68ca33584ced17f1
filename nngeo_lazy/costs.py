"""What a build will cost, from its first batch, before the work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .collectives import owners
from .errors import DataError
from .facts import Cost, Sample
from .jacobian.parts import Kind
from .representations import Representation
from .sweep import Sweep
from .table import Table

__all__ = ["BuildCost", "CostRow", "cost_of"]


@dataclass(frozen=True)
class CostRow:
    """One parameter of a matrix that has not been built.

    Attributes:
        parameter: its name.
        layer: the path of the module that owns it.
        form: how its Jacobian will be computed.
        block: the kind of block that it will lie in.
        size: how many numbers the parameter has.
        passes: of the whole network over a batch, forward and backward, beside those that all
            parameters share; 0 for a parameter with a form, or if an earlier row counts them.
        flops: of the statistics of its block, for each example; 0 if an earlier row counts them.
        bytes: what its block will take, likewise.
        note: why a fallback is taken; empty if none is.
    """

    parameter: str
    layer: str
    form: str
    block: str
    size: int
    passes: int
    flops: int
    bytes: int
    note: str


class BuildCost(Table[CostRow]):
    """Rows that print as a table, and totals.

    Attributes:
        passes: how often the data are read.
        directions: output directions for each batch.
        forward, backward: passes of the network for each batch, each time that the data are read.
            A batch that sorts, routes or branches is proved by itself, by two of them. What the
            self-check looks at once, a few examples of the first batch, is not counted.
        batches: how many batches there are, None if the loader does not say.
        flops: of all statistics, for each example; forward and backward passes come on top.
        bytes: what the operator will take, in each process; if its blocks are shared out, in the
            one that has most.
        processes: how many share the data.
        bytes_sent: of the sums and eigenvectors that each process exchanges, in the whole build.
    """

    def __init__(
        self,
        rows: Sequence[CostRow],
        passes: int,
        directions: int,
        batches: int | None,
        forward: int = 1,
        backward: int | None = None,
        processes: int = 1,
        bytes_sent: int = 0,
        bytes_held: int | None = None,
    ) -> None:
        self.passes, self.directions, self.batches = passes, directions, batches
        self.forward = forward
        self.backward = directions if backward is None else backward
        self.processes, self.bytes_sent = processes, bytes_sent
        self.flops = sum(row.flops for row in rows)
        everything = sum(row.bytes for row in rows)
        self.bytes = everything if bytes_held is None else bytes_held
        data = "the data" if batches is None else f"{batches} batch{'es' * (batches != 1)}"
        foot = [
            f"{passes} pass{'es' * (passes != 1)} over {data}, "
            f"{self.forward} forward and {self.backward} backward for each batch",
            f"{self.flops:,} flops for each example, {everything:,} bytes",
        ]
        if processes > 1:
            held = (
                "all of the bytes" if bytes_held is None else f"at most {self.bytes:,} of the bytes"
            )
            foot.append(
                f"{processes} processes, each with its share of the examples and {held}, "
                f"which exchange {bytes_sent:,} bytes"
            )
        super().__init__(rows, foot)


def cost_of(representation: Representation, sweep: Sweep) -> BuildCost:
    """What a build will cost, from the first batch: one forward and one backward pass."""
    group = sweep.problem.group
    with group.together("a plan"):
        representation.require_fit(sweep.facts)
        sample = sweep.sampled()
        own = None if sample is None else _cost(representation, sweep, sample)
    found = [cost for cost in group.gather(own) if cost is not None]
    if not found:
        raise DataError("expected at least one batch, but the loaders of all processes are empty")
    return found[0] if own is None else own


def _cost(representation: Representation, sweep: Sweep, sample: Sample) -> BuildCost:
    facts, size = sweep.facts, sweep.problem.group.size
    passes = representation.costs(facts, sample)
    found: dict[int, list[Cost]] = {}
    for costs in passes:
        for cost in costs:
            found.setdefault(cost.part, []).append(cost)
    space, itemsize = facts.space, facts.dtype.itemsize
    rows: dict[str, CostRow] = {}
    general = sum(sample.general)  # one pass makes the rows of all parts without a form
    for k, part in enumerate(facts.parts):
        own = found.get(k, [])
        kinds = [cost.block for cost in own if cost.block]
        for name in part.names:
            first = name == part.names[0]
            where = space.slices[name]
            rows[name] = CostRow(
                name,
                space.owner(name),
                part.form_name,
                kinds[-1] if kinds else "",
                where.stop - where.start,
                general if first and part.kind is Kind.GENERAL else 0,
                sum(cost.flops for cost in own) if first else 0,
                sum(cost.numbers for cost in own if cost.block) * itemsize if first else 0,
                part.note,
            )
        if part.kind is Kind.GENERAL:
            general = 0
    ordered = [rows[name] for name in space.names]
    sums = sum(cost.numbers for costs in passes for cost in costs)
    bases = sum(cost.numbers for costs in passes[:-1] for cost in costs)  # factors become bases
    sent = (sums + bases) * itemsize if size > 1 else 0
    batches = sweep.problem.batches.count
    forward, backward = sample.general
    backward += sample.directions + sample.proofs
    held = _most(ordered, size) if representation.shares_blocks else None
    data = sample.directions, batches, 1 + forward, backward
    return BuildCost(ordered, len(passes), *data, size, sent, held)


def _most(rows: Sequence[CostRow], size: int) -> int:
    """The bytes of the process that holds most, if each block is on one."""
    blocks = [row.bytes for row in rows if row.bytes]
    loads = [0] * size
    for block, owner in zip(blocks, owners([float(b) for b in blocks], size), strict=True):
        loads[owner] += block
    return max(loads)
