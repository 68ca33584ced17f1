"""One set of parts for batches that use the parameters in different ways."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from ..layout import Layout
from ..space import ParamSpace
from .forms import Form, Outer, Placed, Rows
from .inputs import DenseInputs
from .parts import Kind, Part, gaps
from .summed import Summed

__all__ = ["Absent", "forms_of", "joined", "same", "widened"]

NOTE = "batches use it in different ways"
OTHERS = "batches may use other entries of it"


@dataclass(frozen=True)
class Absent(Outer):
    """Zero, of a batch that does not use the layer: no position of any mean."""


def same(a: Part, b: Part) -> bool:
    """Whether the forms of two parts can be summed as they are."""
    outer = (a.kind is Kind.OUTER) == (b.kind is Kind.OUTER) and {*a.grids} == {*b.grids}
    unused = (a.kind is Kind.UNUSED) == (b.kind is Kind.UNUSED)
    return a.names == b.names and a.layout == b.layout and outer and unused


def joined(space: ParamSpace, before: Sequence[Part], now: Sequence[Part]) -> list[Part]:
    """The parts of batches seen so far and of another one.

    What only one of the two uses is as that one has it, also if that is some entries of a
    parameter: an expert. What they use differently is rows, one part for each parameter.
    """
    parts: list[Part] = []
    for names in _components([*before, *now]):
        mine = [part for part in before if names.issuperset(part.names)]
        other = [part for part in now if names.issuperset(part.names)]
        if all(part.kind is Kind.UNUSED for part in mine):
            parts += mine if _alike(mine, other) else other
        elif all(part.kind is Kind.UNUSED for part in other) or _alike(mine, other):
            parts += mine
        elif together := _by_entries(space, mine, other):
            parts += together
        else:
            for name in (name for name in space.names if name in names):
                whole = _rows(space, name, mine, NOTE)
                parts.append(next((part for part in mine if same(part, whole)), whole))
    return _sorted(parts)


def widened(space: ParamSpace, parts: Sequence[Part]) -> list[Part]:
    """Parts for later batches, too, that may use other entries of the parameters.

    If a batch uses some matrices of a stack, the others are taken for ones that are used alike. If
    it uses some other entries, they become rows of the whole parameter.
    """
    made: list[Part] = []
    for names in _components(parts):
        mine = [part for part in parts if names.issuperset(part.names)]
        used = [part for part in mine if part.kind is not Kind.UNUSED]
        if used and len(used) < len(mine):
            rows = [_rows(space, name, used, OTHERS) for name in space.names if name in names]
            mine = _stacked(space, used) or rows
        made += mine
    return _sorted(made)


def _stacked(space: ParamSpace, used: Sequence[Part]) -> list[Part]:
    """One part for each matrix of a stack, with the biases that go with it; none if it is no such.

    Args:
        space: the selected parameters.
        used: the matrices that a batch uses.
    """
    first, known = used[0], dict(zip(space.names, space.shapes, strict=True))
    shapes = [known[name] for name in first.names]
    if first.kind is not Kind.OUTER or not all(shapes):
        return []
    starts = [space.slices[name].start for name in first.names]
    sizes = [where.stop - where.start for where in first.layout.slices]
    counts = {shape[0] for shape in shapes}
    whole = [size * shape[0] for size, shape in zip(sizes, shapes, strict=True)]
    if len(counts) > 1 or whole != [shape.numel() for shape in shapes]:
        return []
    parts = []
    for k in range(*counts):
        pieces = zip(first.layout.pieces, starts, sizes, strict=True)
        own = {piece.start: start + k * size for piece, start, size in pieces}
        parts.append(replace(first, layout=first.layout.shifted(own)))
    fits = all(any(same(part, mine) for part in parts) for mine in used)
    return parts if fits else []


def _sorted(parts: Sequence[Part]) -> list[Part]:
    return sorted(parts, key=lambda part: min(piece.start for piece in part.layout.pieces))


def _by_entries(space: ParamSpace, mine: Sequence[Part], other: Sequence[Part]) -> list[Part]:
    """The parts of both, if parts that have entries in common are the same; else none."""
    parts = [part for part in mine if part.kind is not Kind.UNUSED]
    for part in other:
        common = [each for each in parts if _overlap(each, part)]
        if part.kind is Kind.UNUSED or (len(common) == 1 and same(common[0], part)):
            continue
        if common:
            return []
        parts.append(part)
    return [*parts, *gaps(space, parts)]


def _overlap(a: Part, b: Part) -> bool:
    """Whether two parts have entries in common."""
    return any(
        one.start < two.stop and two.start < one.stop
        for one in a.layout.slices
        for two in b.layout.slices
    )


def forms_of(
    parts: Sequence[Part],
    others: Sequence[Part],
    forms: Sequence[Form | None],
    shape: tuple[int, int],
    like: Tensor,
) -> list[Form | None]:
    """The forms of the parts of all batches, from those of one batch; see `_form_of`."""
    at = {other.layout: k for k, other in enumerate(others)}
    made: list[Form | None] = []
    for part in parts:
        k = at.get(part.layout)
        if k is not None and same(others[k], part):
            made.append(forms[k])
        else:
            made.append(_form_of(part, others, forms, shape, like))
    return made


def _form_of(
    part: Part,
    others: Sequence[Part],
    forms: Sequence[Form | None],
    shape: tuple[int, int],
    like: Tensor,
) -> Form | None:
    """A part's form, from those of the parts of one batch; None if no batch uses it.

    Args:
        part: of all batches.
        others: of the batch.
        forms: theirs.
        shape: (R, N).
        like: has the dtype and the device.
    """
    if part.kind is Kind.UNUSED:
        return None
    # this batch does not use the part, or has rows of it alone
    found = [k for k, other in enumerate(others) if _overlap(other, part)]
    sources = [(form, others[k]) for k in found if (form := forms[k]) is not None]
    if not sources and part.kind is Kind.OUTER:
        return _empty(part.layout, part.members[0].roles, shape, like)
    if not sources and part.grids:
        empty = [_empty(grid, part.members[0].roles, shape, like) for grid in part.grids]
        return Summed(tuple(empty), part.grids)
    size = part.layout.size
    placed = [(form, *_meeting(other.layout, part.layout, like)) for form, other in sources]
    if len(placed) == 1 and len(placed[0][1]) == placed[0][0].shape[2]:
        return Placed.of(placed[0][0], placed[0][2], (*shape, size))

    def compute(start: int, stop: int) -> Tensor:
        rows = like.new_zeros(shape[0], stop - start, size)
        for form, theirs, mine in placed:
            rows.index_add_(2, mine, form.rows(start, stop)[..., theirs])
        return rows

    return Rows(compute, (*shape, size), like.dtype)


def _components(parts: Sequence[Part]) -> list[set[str]]:
    """Sets of names that no part crosses."""
    found: list[set[str]] = []
    for part in parts:
        touched = [names for names in found if names.intersection(part.names)]
        found = [names for names in found if not names.intersection(part.names)]
        found.append(set(part.names).union(*touched))
    return found


def _alike(a: Sequence[Part], b: Sequence[Part]) -> bool:
    return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))


def _rows(space: ParamSpace, name: str, before: Sequence[Part], note: str) -> Part:
    """All of one parameter, as rows."""
    layout = Layout.flat([space.slices[name]])
    known = [part for part in before if name in part.names and part.function]
    function = ", ".join(dict.fromkeys(part.function for part in known)) or "several"
    members = tuple(member for part in known for member in part.members)
    return Part((name,), layout, Kind.ROWS, members, function, note)


def _meeting(theirs: Layout, mine: Layout, like: Tensor) -> tuple[Tensor, Tensor]:
    """Which coordinates of one layout lie in a flat one, and where."""
    (piece,) = mine.pieces
    where = theirs.positions() - piece.start
    inside = ((where >= 0) & (where < mine.size)).nonzero().squeeze(1)
    return inside.to(like.device), where[inside].to(like.device)


def _empty(layout: Layout, roles: Sequence[str], shape: tuple[int, int], like: Tensor) -> Absent:
    """The outer form of a batch that does not use the layer."""
    r, n = shape
    g = like.new_zeros(r, n, layout.groups, 1, layout.rows)
    bias = "bias" in roles
    x = like.new_zeros(n, layout.groups, 1, layout.width - bias)
    return Absent(g, DenseInputs(x) if "weight" in roles else None, bias)
