"""Parameters that share one form, and how that form is made from a pass's gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

import torch
from torch import Tensor

from ..errors import UnsupportedLayerError
from ..layout import Layout, Piece
from ..precision import narrow
from ..space import ParamSpace
from .calls import Call
from .folds import Fold, Ragged
from .forms import Form, Outer, Placed, Rows, Stored
from .inputs import DenseInputs, Inputs
from .positions import Mark, spread
from .summed import Summed, at_zero
from .weights import Weight, pull_back

__all__ = ["Gradient", "Kind", "Member", "Part", "Segment", "gaps", "piece_of", "segment_of"]

DERIVED_TILE_BYTES = 2**25  # rows that go back to a parameter through autograd


class Kind(str, Enum):
    """How the Jacobian of some parameters is computed."""

    OUTER = "outer"
    ROWS = "rows"
    SUMMED = "summed"
    GENERAL = "general"
    UNUSED = "unused"


@dataclass(frozen=True)
class Segment:
    """Entries of one parameter that lie side by side."""

    name: str
    start: int
    size: int


@dataclass(frozen=True)
class Member:
    """A call, the roles of its weights that are meant, and where its form's coordinates lie."""

    call: int
    roles: tuple[str, ...]
    layout: Layout


@dataclass(frozen=True)
class Part:
    """Parameters that share one form.

    Attributes:
        names: the parameters, in the order of the layout's pieces.
        layout: where the form's coordinates lie in the flat vector; of a parameter that several
            calls use in pieces, some of its entries.
        kind: OUTER, ROWS (of a norm layer, or of a weight that other tensors are made of), SUMMED
            (uses with different grids), GENERAL (rows by the general way) or UNUSED (the outputs do
            not depend on it).
        members: the calls.
        function: what was called.
        note: why there is no form of its own.
        derived: whether members receive something else than the parameter itself.
    """

    names: tuple[str, ...]
    layout: Layout
    kind: Kind
    members: tuple[Member, ...] = ()
    function: str = ""
    note: str = ""
    derived: bool = False

    @property
    def calls(self) -> tuple[int, ...]:
        """The members' calls."""
        return tuple(member.call for member in self.members)

    @property
    def grids(self) -> tuple[Layout, ...]:
        """How the uses of a SUMMED part lie in its weight, each way once (see `Summed`)."""
        if self.kind is not Kind.SUMMED:
            return ()
        return tuple(dict.fromkeys(at_zero(member.layout) for member in self.members))

    @property
    def as_matrix(self) -> Part | None:
        """The part of a weight in the grid of a matrix, as it is stored.

        None if a use takes it as something else, such as a stack of groups.
        """
        shapes = {
            (grid.width, grid.rows) if grid.pieces[0].transposed else (grid.rows, grid.width)
            for grid in self.grids
            if grid.groups == 1 and grid.pieces[0].inner == 1
        }
        if len(shapes) != 1 or any(g.groups > 1 or g.pieces[0].inner > 1 for g in self.grids):
            return None
        ((rows, width),) = shapes
        piece = Piece(self.layout.pieces[0].start, width)
        return replace(self, layout=Layout(1, rows, (piece,)))

    @property
    def form_name(self) -> str:
        """How the Jacobian is computed, in words."""
        return "zero" if self.kind is Kind.UNUSED else f"{self.function}: {self.kind.value}"

    def inputs(
        self, calls: Sequence[Call], folds: Sequence[Fold | None], n: int
    ) -> list[Inputs | None]:
        """The input factor of each member call, None if it has none."""
        factors: list[Inputs | None] = []
        for member in self.members:
            call, fold = calls[member.call], folds[member.call]
            use = call.use
            if use.inputs is None or use.grid is None or fold is None:
                factors.append(None)
                continue
            x = use.inputs(fold.apply(use.x, use.leading, n))
            x = DenseInputs(x) if isinstance(x, Tensor) else x
            if "weight" in call.weights:
                expected = (n, use.grid.groups, "T", use.grid.inputs)
                _check(call, "inputs", x.shape, expected)
            factors.append(x)
        return factors

    def form(
        self,
        calls: Sequence[Call],
        folds: Sequence[Fold | None],
        inputs: Sequence[Inputs | None],
        gradients: Mapping[int, Gradient],
        parameters: Mapping[str, Tensor],
        marks: Tensor | None = None,
    ) -> Form:
        """The form for one chunk of directions.

        Args:
            calls: the recorded calls.
            folds: their example axes.
            inputs: this part's input factors, as `inputs` makes them.
            gradients: at the output of each member call.
            parameters: the selected ones by name.
            marks: what is known of the positions (N, S) that are scored (see `positions`).
        """
        if self.derived:
            return self._derived(calls, folds, inputs, gradients, parameters)
        if self.kind is Kind.ROWS:
            return Stored(self._norm_rows(calls, gradients))
        outers = [
            _outer(member.roles, x, gradients[member.call], marks)
            for member, x in zip(self.members, inputs, strict=True)
        ]
        if self.kind is Kind.OUTER:
            return _concatenated(outers)
        alike: dict[Layout, list[Outer]] = {}
        for member, outer in zip(self.members, outers, strict=True):
            alike.setdefault(at_zero(member.layout), []).append(outer)
        return Summed(tuple(map(_concatenated, alike.values())), tuple(alike))

    def _norm_rows(self, calls: Sequence[Call], gradients: Mapping[int, Gradient]) -> Tensor:
        total: Tensor | None = None
        for member in self.members:
            call, given = calls[member.call], gradients[member.call]
            g, by_role = given.canonical, given.rows
            sizes = [where.stop - where.start for where in self.layout.slices]
            for role, size in zip(member.roles, sizes, strict=True):
                found = by_role.get(role)
                shape = None if found is None else found.shape
                _check(call, f"rows of the {role}", shape, (*g.shape[:2], size))
            rows = torch.cat([by_role[role] for role in member.roles], -1)
            total = rows if total is None else total + rows
        if total is None:
            raise TypeError("a part without calls")
        return total

    def _derived(
        self,
        calls: Sequence[Call],
        folds: Sequence[Fold | None],
        inputs: Sequence[Inputs | None],
        gradients: Mapping[int, Gradient],
        parameters: Mapping[str, Tensor],
    ) -> Form:
        """Rows of one parameter, through what the model makes of it."""
        (name,) = self.names
        p = parameters[name].numel()
        sources: list[tuple[Weight, Form]] = []
        shape, dtype = (0, 0, 0), torch.float32
        for member, x in zip(self.members, inputs, strict=True):
            call, fold, g = calls[member.call], folds[member.call], gradients[member.call]
            if fold is None:
                raise TypeError(f"{call.function} has no example axis")
            shape, dtype = (g.directions, g.examples, p), g.dtype
            if g.missing:
                continue
            (role,) = member.roles
            sources.append((call.weights[role], _weight_rows(call, role, fold, x, g)))
        device = parameters[name].device
        if len(sources) == 1 and (where := sources[0][0].selection) is not None and where.distinct:
            return Placed.of(sources[0][1], where.index(p, device), shape)
        single = max([1, p, *(form.shape[2] for _, form in sources)])
        step = max(1, DERIVED_TILE_BYTES // max(1, single * shape[0] * dtype.itemsize))

        def compute(start: int, stop: int) -> Tensor:
            total = torch.zeros(shape[0], stop - start, p, dtype=dtype, device=device)
            for weight, form in sources:
                rows = form.rows(start, stop)
                if weight.selection is not None:
                    index = weight.selection.index(p, device)
                    total.index_add_(2, index, rows)
                    continue
                flat = rows.reshape(-1, *weight.tensor.shape)
                (found,) = pull_back(weight, flat, [parameters[name]])
                if found is not None:
                    total += found.view(total.shape).to(dtype)
            return total

        return Rows(compute, shape, dtype, step * single * shape[0] * dtype.itemsize)


@dataclass
class Gradient:
    """The gradients at one call's output, one for each direction.

    Attributes:
        call, fold: of the output.
        given: as they arrived, None if a direction brought none.
        examples: how many there are.
        dtype: in which they are wanted.
    """

    call: Call
    fold: Fold | None
    given: Sequence[Tensor | None]
    examples: int
    dtype: torch.dtype
    _canonical: Tensor | None = field(default=None, repr=False)
    _rows: dict[str, Tensor] | None = field(default=None, repr=False)

    def squared(self) -> Gradient:
        """The same with squared numbers."""
        squares = [None if g is None else g.to(self.dtype).square() for g in self.given]
        return Gradient(self.call, self.fold, squares, self.examples, self.dtype)

    def signed(self, generator: torch.Generator) -> Gradient:
        """The same with random signs: what is summed from it does not cancel."""
        given = [None if g is None else _signed(g, generator) for g in self.given]
        return Gradient(self.call, self.fold, given, self.examples, self.dtype)

    @property
    def directions(self) -> int:
        """How many output directions there are."""
        return len(self.given)

    @property
    def missing(self) -> bool:
        """Whether no direction reaches the call."""
        return all(g is None for g in self.given)

    @property
    def narrow(self) -> torch.dtype | None:
        """The dtype that the numbers were in, if their products may be taken in it."""
        return next((narrow(g) for g in self.given if g is not None), None)

    @property
    def stacked(self) -> Tensor:
        """(R, *leading, *features), in the order of the form."""
        some = [g for g in self.given if g is not None]
        if not some:
            zero = torch.zeros((), dtype=self.dtype, device=self.call.use.x.device)
            return zero.expand(len(self.given), *self.call.shape)
        if len(self.given) == 1:
            stacked = some[0].unsqueeze(0)
        else:
            zero = torch.zeros_like(some[0])
            stacked = torch.stack([zero if g is None else g for g in self.given])
        return self.call.arranged(stacked).to(self.dtype)

    @property
    def rows(self) -> dict[str, Tensor]:
        """The rows (R, N, size) of each role of a call with rows, made once for all its roles."""
        if self._rows is None:
            use, g = self.call.use, self.canonical
            if use.rows is None or self.fold is None:
                raise TypeError(f"{self.call.function} has no rows")
            self._rows = use.rows(self.fold.apply(use.x, use.leading, g.shape[1]).to(g.dtype), g)
        return self._rows

    @property
    def canonical(self) -> Tensor:
        """(R, N, T, *features)."""
        if self._canonical is None:
            if self.fold is None:
                raise TypeError(f"{self.call.function} has no example axis")
            leading = self.call.use.leading
            self._canonical = self.fold.apply(self.stacked, leading, self.examples, offset=1)
        return self._canonical


def _signed(g: Tensor, generator: torch.Generator) -> Tensor:
    signs = torch.randint(2, g.shape, generator=generator, device=g.device) * 2 - 1
    return g * signs.to(g.dtype)


def _outer(
    roles: Sequence[str], x: Inputs | None, at_call: Gradient, marks: Tensor | None = None
) -> Outer:
    call, gradients = at_call.call, at_call.canonical
    use = call.use
    if use.gradients is None or use.grid is None or x is None:
        raise TypeError(f"{call.function} has no outer form")
    g = use.gradients(gradients)
    positions = x.shape[2] if "weight" in call.weights else "T"
    expected = (*gradients.shape[:2], use.grid.groups, positions, use.grid.outputs)
    _check(call, "gradients", g.shape, expected)
    weighted, t = "weight" in roles, g.shape[3]
    g = x.masked(g) if weighted else g
    fold = at_call.fold
    known = _existing(fold, marks, t) if isinstance(fold, Ragged) else spread(marks, t)
    given = x if weighted else None
    return Outer(g, given, "bias" in roles, known, narrow=at_call.narrow)


def _existing(fold: Ragged, marks: Tensor | None, t: int) -> Tensor | None:
    """The marks of T positions, of which examples have as many as they own.

    Which of the batch's positions they are is not known, so that gradients tell which count.
    """
    exist = fold.exist.repeat_interleave(t // fold.index.shape[1], 1)
    if marks is None and bool(exist.all()):
        return None
    known = Mark.SCORED if marks is None else Mark.UNSCORED
    return torch.where(exist, known, Mark.MISSING)


def _weight_rows(call: Call, role: str, fold: Fold, x: Inputs | None, g: Gradient) -> Form:
    """Rows (R, N, size) of what a call received in one role, in its own row-major order."""
    use, size = call.use, call.use.roles[role].numel()
    shape = (g.directions, g.examples, size)
    if use.local is not None:
        pull, raw = use.local, g.stacked

        def compute(start: int, stop: int) -> Tensor:
            return pull(fold, g.examples, raw, start, stop)[role].flatten(2).to(g.dtype)

        return Rows(compute, shape, g.dtype)
    if use.grid is None:
        rows = g.rows.get(role)
        _check(call, f"rows of the {role}", None if rows is None else rows.shape, shape)
        return Stored(rows)  # type: ignore[arg-type]
    form = _outer((role,), x, g)
    if role == "bias":
        return form
    grid = use.grid
    piece = Piece(0, grid.inputs, grid.transposed, grid.inner)
    layout = Layout(grid.groups, grid.outputs, (piece,))
    return Summed((form,), (layout,)) if grid.transposed else form


def _check(
    call: Call, what: str, found: Sequence[int] | None, expected: Sequence[int | str]
) -> None:
    """Raise if a form's tensor does not have the shape that it should."""
    fits = (
        found is not None
        and len(found) == len(expected)
        and all(want in ("T", size) for size, want in zip(found, expected, strict=True))
    )
    if not fits:
        shape = "none" if found is None else tuple(found)
        raise UnsupportedLayerError(
            f"expected the form of {call.function} to give {what} of shape "
            f"({', '.join(map(str, expected))}), got {shape}"
        )


def _concatenated(outers: Sequence[Outer]) -> Outer:
    """Several uses of one weight as one form: positions one after the other."""
    first, *others = outers
    if not others:
        return first
    g = torch.cat([outer.g for outer in outers], 3)
    marks = None
    if any(outer.marks is not None for outer in outers):
        marks = torch.cat([_all_marks(outer) for outer in outers], 1)
    if first.inputs is None:
        return Outer(g, None, first.bias, marks)
    more = [outer.inputs for outer in others if outer.inputs is not None]
    return Outer(g, first.inputs.concatenate(more), first.bias, marks)


def _all_marks(outer: Outer) -> Tensor:
    if outer.marks is not None:
        return outer.marks
    n, t = outer.g.shape[1], outer.g.shape[3]
    return torch.full((n, t), Mark.SCORED, dtype=torch.int64, device=outer.g.device)


def segment_of(call: Call, role: str) -> Segment | None:
    """The entries that a call receives in one role, if its form can be theirs."""
    weight = call.weights[role]
    part = weight.selection
    if part is None or call.use.local is not None:
        return None
    if part.contiguous:
        return Segment(part.name, part.start, part.size)
    grid = call.use.grid
    plain = grid is not None and grid.groups == 1 and grid.inner == 1
    if plain and role == "weight" and part.flipped is not None:
        return Segment(part.name, part.start, part.size)
    return None


def piece_of(call: Call, role: str, start: int) -> Piece:
    """A member's piece of a block that begins at `start` of the flat vector."""
    grid = call.use.grid
    if role == "bias" or grid is None:
        return Piece(start, 1)
    selection = call.weights[role].selection
    flipped = selection is not None and not selection.contiguous
    return Piece(start, grid.inputs, grid.transposed != flipped, grid.inner)


def gaps(space: ParamSpace, parts: Sequence[Part]) -> Iterator[Part]:
    """The entries that no call receives, of parameters of which some receive others."""
    covered: dict[str, list[slice]] = {}
    for part in parts:
        for name, where in zip(part.names, part.layout.slices, strict=True):
            covered.setdefault(name, []).append(where)
    for name, slices in covered.items():
        whole = space.slices[name]
        at = whole.start
        for where in [*sorted(slices, key=lambda s: s.start), slice(whole.stop, whole.stop)]:
            if where.start > at:
                layout = Layout.flat([slice(at, where.start)])
                note = "the outputs do not depend on some of its entries: zero there"
                yield Part((name,), layout, Kind.UNUSED, note=note)
            at = max(at, where.stop)
