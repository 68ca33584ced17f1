"""Which parameters share a form: calls sorted by the weights that they received."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence

from ..layout import Layout
from ..space import ParamSpace
from .calls import Call
from .parts import Kind, Member, Part, Segment, gaps, piece_of, segment_of

__all__ = ["make_parts"]

Pair = tuple[Segment | None, Segment | None]  # of a weight, and of the bias that goes with it


def make_parts(
    space: ParamSpace, calls: Sequence[Call], general: Mapping[str, str], unused: set[str]
) -> list[Part]:
    """Group the parameters by form, in parameter order.

    Args:
        space: the selected parameters.
        calls: the recorded calls.
        general: parameters that take the general way, and why.
        unused: parameters that the outputs do not depend on.
    """
    without = {*general, *unused}
    uses = _uses(calls, without)
    apart = {name for name, mine in uses.items() if not _direct(calls, mine)}
    parts: list[Part] = []
    for (weight, bias), members in _pairings(space, calls, without | apart).items():
        part = _make_part(space, calls, weight, bias, members)
        if part is None:
            apart.update(s.name for s in (weight, bias) if s is not None)
        else:
            parts.append(part)
    parts = [part for part in parts if not apart.intersection(part.names)]
    parts += [_through(space, calls, name, uses[name]) for name in space.names if name in apart]
    parts += gaps(space, parts)
    done = {name for part in parts for name in part.names}
    for name in (name for name in space.names if name not in done):
        layout = Layout.flat([space.slices[name]])
        if name in unused:
            note = "the outputs do not depend on it: zero block"
            parts.append(Part((name,), layout, Kind.UNUSED, note=note))
        else:
            note = general.get(name) or "no function receives it together with data"
            parts.append(Part((name,), layout, Kind.GENERAL, function="per example", note=note))
    return sorted(parts, key=lambda part: _place(space, part))


def _place(space: ParamSpace, part: Part) -> tuple[int, int]:
    first = min(piece.start for piece in part.layout.pieces)
    return min(space.names.index(name) for name in part.names), first


def _uses(calls: Sequence[Call], without: set[str]) -> dict[str, list[tuple[int, str]]]:
    """Of each parameter the calls that depend on it, and the role of what they received."""
    uses: dict[str, list[tuple[int, str]]] = {}
    for k, call in enumerate(calls):
        for role, weight in call.weights.items():
            for name in weight.names:
                if name not in without:
                    uses.setdefault(name, []).append((k, role))
    return uses


def _direct(calls: Sequence[Call], uses: Sequence[tuple[int, str]]) -> bool:
    """Whether all uses of a parameter are of one kind, of the same entries or of others."""
    segments = [segment_of(calls[k], role) for k, role in uses]
    kinds = {calls[k].use.grid is None for k, _ in uses}
    known = {segment for segment in segments if segment is not None}
    if None in segments or len(kinds) > 1:
        return False
    ordered = sorted(known, key=lambda s: (s.start, s.size))
    return all(a.start + a.size <= b.start for a, b in itertools.pairwise(ordered))


def _pairings(space: ParamSpace, calls: Sequence[Call], without: set[str]) -> dict[Pair, list[int]]:
    """Calls by their (weight, bias); the two stand alone if they do not always go together."""
    pairs: dict[Pair, list[int]] = {}
    for k, call in enumerate(calls):
        found: list[Segment | None] = []
        for role in ("weight", "bias"):
            given = call.weights.get(role)
            out = given is None or without.intersection(given.names)
            found.append(None if out else segment_of(call, role))
        if any(found):
            pairs.setdefault((found[0], found[1]), []).append(k)
    count = Counter(segment for pair in pairs for segment in pair if segment)
    groups: dict[Pair, list[int]] = {}
    for (weight, bias), members in pairs.items():
        if weight and bias:
            apart = count[weight] > 1 or count[bias] > 1
            if apart or space.owner(weight.name) != space.owner(bias.name):
                groups.setdefault((weight, None), []).extend(members)
                groups.setdefault((None, bias), []).extend(members)
                continue
        groups.setdefault((weight, bias), []).extend(members)
    return groups


def _make_part(
    space: ParamSpace,
    calls: Sequence[Call],
    weight: Segment | None,
    bias: Segment | None,
    members: Sequence[int],
) -> Part | None:
    """The part of a weight and its bias, None if it must be made from rows."""
    given = [(role, s) for role, s in (("weight", weight), ("bias", bias)) if s is not None]
    roles, segments = tuple(role for role, _ in given), [segment for _, segment in given]
    names = tuple(segment.name for segment in segments)
    function = ", ".join(dict.fromkeys(calls[k].function for k in members))
    slices = [_flat(space, segment) for segment in segments]
    if all(calls[k].use.rows is not None for k in members):
        layout = Layout.flat(slices)
        made = tuple(Member(k, roles, layout) for k in members)
        return Part(names, layout, Kind.ROWS, made, function)
    layouts = []
    for k in members:
        grid = calls[k].use.grid
        if grid is None:
            return None
        pieces = [piece_of(calls[k], role, s.start) for role, s in zip(roles, slices, strict=True)]
        layouts.append(Layout(grid.groups, grid.outputs, tuple(pieces)))
    placed = tuple(Member(k, roles, layout) for k, layout in zip(members, layouts, strict=True))
    if len(set(layouts)) == 1:
        return Part(names, layouts[0], Kind.OUTER, placed, function)
    if len(names) > 1:
        return None
    flat = Layout.flat(slices)
    return Part(names, flat, Kind.SUMMED, placed, function, "used in different layouts")


def _flat(space: ParamSpace, segment: Segment) -> slice:
    start = space.slices[segment.name].start + segment.start
    return slice(start, start + segment.size)


def _through(
    space: ParamSpace, calls: Sequence[Call], name: str, uses: Sequence[tuple[int, str]]
) -> Part:
    """The rows of a parameter through what the model makes of it."""
    layout = Layout.flat([space.slices[name]])
    members = tuple(Member(k, (role,), layout) for k, role in uses)
    function = ", ".join(dict.fromkeys(calls[k].function for k, _ in uses))
    return Part((name,), layout, Kind.ROWS, members, function, derived=True)
