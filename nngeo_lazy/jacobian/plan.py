"""Which form each parameter has in one model, found and proved on a few examples.

The self-check takes a cotangent that is supported on one example. The gradient at a layer's output
must vanish outside that example's positions, which finds the example axis (also where positions are
folded into it), and the rows made from it must equal what autograd gives for the parameters. What
disagrees is demoted to the general way and reported. Comparing whole gradients is not enough: it
cannot see which example a row belongs to.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UnsupportedLayerError
from ..layout import Layout, Piece
from ..space import ParamSpace
from .forms import Form, Outer, Stored, Summed
from .inputs import DenseInputs, Inputs
from .record import Call

__all__ = [
    "Fold",
    "Part",
    "Probe",
    "agree",
    "canonical",
    "make_parts",
    "probe_folds",
    "probe_rows",
]


@dataclass(frozen=True)
class Fold:
    """Where the examples are among the leading dimensions of a layer's output.

    `kind` is "whole" (the axis is the examples), "outer" or "inner" (positions are folded into it,
    behind or before the examples).
    """

    axis: int
    kind: str

    def apply(self, tensor: Tensor, leading: int, n: int, offset: int = 0) -> Tensor:
        """(*offset, *leading, *features) -> (*offset, N, T, *features)."""
        axis = offset + self.axis
        if self.kind == "outer":
            tensor, leading = tensor.unflatten(axis, (n, -1)), leading + 1
        elif self.kind == "inner":
            tensor, leading = tensor.unflatten(axis, (-1, n)), leading + 1
            axis += 1
        tensor = tensor.movedim(axis, offset)
        if leading == 1:
            return tensor.unsqueeze(offset + 1)
        return tensor.flatten(offset + 1, offset + leading - 1)

    def fits(self, shape: torch.Size, n: int) -> bool:
        size = shape[self.axis] if self.axis < len(shape) else 0
        return size == n if self.kind == "whole" else size > 0 and size % n == 0


def _candidates(call: Call, n: int) -> Iterator[Fold]:
    for axis, size in enumerate(call.shape[: call.use.leading]):
        if size == n:
            yield Fold(axis, "whole")
        elif size % n == 0:
            yield Fold(axis, "outer")
            yield Fold(axis, "inner")


@dataclass(frozen=True)
class Probe:
    """A cotangent supported on one example, and the gradients at the calls' outputs."""

    example: int
    cotangent: Tensor
    at_calls: Sequence[Tensor | None]


def probe_folds(calls: Sequence[Call], probes: Sequence[Probe], n: int) -> list[Fold | None]:
    """The example axis of each of n examples' calls, or None where no axis confines gradients."""
    folds: list[Fold | None] = []
    for k, call in enumerate(calls):
        fitting = (
            fold
            for fold in _candidates(call, n)
            if all(_confined(fold, call, probe.at_calls[k], probe.example, n) for probe in probes)
        )
        folds.append(next(fitting, None))
    return folds


def _confined(fold: Fold, call: Call, gradient: Tensor | None, example: int, n: int) -> bool:
    if gradient is None:
        return True
    by_example = fold.apply(gradient, call.use.leading, n).flatten(1)
    others = [k for k in range(n) if k != example]
    return not bool(by_example[others].any())


@dataclass(frozen=True)
class Part:
    """Parameters that share one form.

    Attributes:
        names: the parameters, in the order of the layout's pieces.
        layout: where the form's coordinates lie in the flat vector.
        kind: "outer", "rows" (a norm layer), "summed" (uses with different grids), "general" (rows
            by the general way) or "unused" (the outputs do not depend on it).
        members: the calls, each with its own layout.
        function: what was called.
        note: why there is no form of its own.
    """

    names: tuple[str, ...]
    layout: Layout
    kind: str
    members: tuple[tuple[int, Layout], ...] = ()
    function: str = ""
    note: str = ""

    def inputs(self, calls: Sequence[Call], folds: Sequence[Fold | None], n: int) -> list[Inputs]:
        """The input factor of each member call."""
        factors = []
        for k, _ in self.members:
            use, fold = calls[k].use, folds[k]
            if use.inputs is not None and use.grid is not None and fold is not None:
                x = use.inputs(fold.apply(use.x, use.leading, n))
                x = DenseInputs(x) if isinstance(x, Tensor) else x
                expected = (n, use.grid.groups, "T", use.grid.inputs)
                if calls[k].weight is not None:
                    _check(calls[k], "inputs", x.shape, expected)
                factors.append(x)
        return factors

    def form(
        self,
        calls: Sequence[Call],
        folds: Sequence[Fold | None],
        inputs: Sequence[Inputs],
        gradients: Mapping[int, Tensor],
    ) -> Form:
        """The form for one chunk of directions.

        Args:
            calls: the recorded calls.
            folds: their example axes.
            inputs: this part's input factors, as `inputs` makes them.
            gradients: the output gradients of each member call as (R, N, T, *features).
        """
        if self.kind == "rows":
            return Stored(self._norm_rows(calls, folds, gradients))
        outers = []
        for (k, _), x in zip(self.members, inputs, strict=True):
            use = calls[k].use
            if use.gradients is None or use.grid is None:
                raise TypeError(f"{calls[k].function} has no outer form")
            g = use.gradients(gradients[k])
            positions = x.shape[2] if calls[k].weight is not None else "T"
            expected = (*gradients[k].shape[:2], use.grid.groups, positions, use.grid.outputs)
            _check(calls[k], "gradients", g.shape, expected)
            weighted = calls[k].weight in self.names
            biased = calls[k].bias in self.names
            g = x.masked(g) if weighted else g
            outers.append(Outer(g, x if weighted else None, biased))
        if len(outers) == 1 and self.kind == "outer":
            return outers[0]
        if self.kind == "outer":
            return _concatenated(outers)
        return _summed(outers, [layout for _, layout in self.members])

    def _norm_rows(
        self, calls: Sequence[Call], folds: Sequence[Fold | None], gradients: Mapping[int, Tensor]
    ) -> Tensor:
        total: Tensor | None = None
        for k, _ in self.members:
            call, fold, g = calls[k], folds[k], gradients[k]
            if call.use.rows is None or fold is None:
                raise TypeError(f"{call.function} has no rows")
            x = fold.apply(call.use.x, call.use.leading, g.shape[1]).to(g.dtype)
            by_role = call.use.rows(x, g)
            roles = {call.weight: "weight", call.bias: "bias"}
            sizes = [where.stop - where.start for where in self.layout.slices]
            for name, size in zip(self.names, sizes, strict=True):
                found = by_role.get(roles[name])
                shape = None if found is None else found.shape
                _check(call, f"rows of the {roles[name]}", shape, (*g.shape[:2], size))
            rows = torch.cat([by_role[roles[name]] for name in self.names], -1)
            total = rows if total is None else total + rows
        if total is None:
            raise TypeError("a part without calls")
        return total


def _check(
    call: Call, what: str, found: Sequence[int] | None, expected: Sequence[int | str]
) -> None:
    """Raise where a form's tensor does not have the shape that it should."""
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
    g = torch.cat([outer.g for outer in outers], 3)
    if first.inputs is None:
        return Outer(g, None, first.bias)
    more = [outer.inputs for outer in others if outer.inputs is not None]
    return Outer(g, first.inputs.concatenate(more), first.bias)


def _summed(outers: Sequence[Outer], layouts: Sequence[Layout]) -> Summed:
    """Uses of one weight in different grids."""
    moved = [layout.shifted({piece.start: 0 for piece in layout.pieces}) for layout in layouts]
    return Summed(tuple(outers), tuple(moved))


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
    parts: list[Part] = []
    formed: dict[str, str] = {}
    for (weight, bias), members in _pairings(space, calls, {*general, *unused}).items():
        names = tuple(name for name in (weight, bias) if name is not None)
        part = _make_part(space, calls, names, weight, members)
        if part is None:
            kinds = sorted({calls[k].function for k in members})
            formed.update(dict.fromkeys(names, f"its uses differ in form ({', '.join(kinds)})"))
        else:
            parts.append(part)
    done = {name for part in parts for name in part.names}
    rest: dict[str, list[str]] = {}
    for name in (name for name in space.names if name not in done):
        if name in unused:
            note = "the outputs do not depend on it: zero block"
            parts.append(Part((name,), Layout.flat([space.slices[name]]), "unused", note=note))
        else:
            rest.setdefault(space.owner(name), []).append(name)
    for together in rest.values():  # one module's together: they cost one pass
        why = [
            general.get(name) or formed.get(name) or "no layer with a form receives it"
            for name in together
        ]
        layout = Layout.flat([space.slices[name] for name in together])
        note = "; ".join(dict.fromkeys(why))
        parts.append(Part(tuple(together), layout, "general", function="per example", note=note))
    return sorted(parts, key=lambda part: min(space.names.index(name) for name in part.names))


def _pairings(
    space: ParamSpace, calls: Sequence[Call], without: set[str]
) -> dict[tuple[str | None, str | None], list[int]]:
    """Calls by their (weight, bias); the two stand alone where they do not always go together."""
    pairs: dict[tuple[str | None, str | None], list[int]] = {}
    for k, call in enumerate(calls):
        weight = None if call.weight in without else call.weight
        bias = None if call.bias in without else call.bias
        if weight or bias:
            pairs.setdefault((weight, bias), []).append(k)
    count = Counter(name for pair in pairs for name in pair if name)
    groups: dict[tuple[str | None, str | None], list[int]] = {}
    for (weight, bias), members in pairs.items():
        if weight and bias:
            apart = count[weight] > 1 or count[bias] > 1
            if apart or space.owner(weight) != space.owner(bias):
                groups.setdefault((weight, None), []).extend(members)
                groups.setdefault((None, bias), []).extend(members)
                continue
        groups.setdefault((weight, bias), []).extend(members)
    return groups


def _make_part(
    space: ParamSpace,
    calls: Sequence[Call],
    names: tuple[str, ...],
    weight: str | None,
    members: Sequence[int],
) -> Part | None:
    function = ", ".join(dict.fromkeys(calls[k].function for k in members))
    if all(calls[k].use.rows is not None for k in members):
        layout = Layout.flat([space.slices[name] for name in names])
        return Part(names, layout, "rows", tuple((k, layout) for k in members), function)
    layouts = []
    for k in members:
        grid = calls[k].use.grid
        if grid is None:
            return None
        pieces = [
            Piece(space.slices[name].start, grid.inputs, grid.transposed, grid.inner)
            if name == weight
            else Piece(space.slices[name].start, 1)
            for name in names
        ]
        layouts.append(Layout(grid.groups, grid.outputs, tuple(pieces)))
    placed = tuple(zip(members, layouts, strict=True))
    if len(set(layouts)) == 1:
        return Part(names, layouts[0], "outer", placed, function)
    if len(names) > 1:
        return None
    flat = Layout.flat([space.slices[names[0]]])
    return Part(names, flat, "summed", placed, function, "used in different layouts")


def canonical(call: Call, fold: Fold | None, gradients: Sequence[Tensor | None], n: int) -> Tensor:
    """Gradients at a call's output, one for each direction, as (R, N, T, *features)."""
    if fold is None:
        raise TypeError(f"{call.function} has no example axis")
    given = [g for g in gradients if g is not None]
    if not given:
        zero = torch.zeros((), dtype=call.use.dtype, device=call.use.x.device)
        stacked = zero.expand(len(gradients), *call.shape)
    elif len(gradients) == 1:
        stacked = given[0].unsqueeze(0)
    else:
        stacked = torch.stack([torch.zeros_like(given[0]) if g is None else g for g in gradients])
    return fold.apply(stacked, call.use.leading, n, offset=1)


def probe_rows(
    part: Part,
    calls: Sequence[Call],
    folds: Sequence[Fold | None],
    probes: Sequence[Probe],
    gradients: Mapping[str, Tensor | None],
    n: int,
) -> bool:
    """Whether a part's rows add up to autograd's gradients, both along random vectors.

    Args:
        part: the part.
        calls: the recorded calls.
        folds: their example axes, which confine each probe to its example.
        probes: cotangents of different examples.
        gradients: of the parameters, for the sum of the probes' cotangents.
        n: how many examples there are.
    """
    dtype = torch.promote_types(probes[0].cotangent.dtype, torch.float32)
    inputs = [x.to(dtype) for x in part.inputs(calls, folds, n)]
    gradients_by_call = {
        k: canonical(calls[k], folds[k], [probe.at_calls[k] for probe in probes], n).to(dtype)
        for k, _ in part.members
    }
    form = part.form(calls, folds, inputs, gradients_by_call)
    given = probes[0].cotangent
    generator = torch.Generator(device=given.device).manual_seed(0)
    vectors = [
        torch.randn(piece.width, generator=generator, dtype=dtype, device=given.device)
        for piece in part.layout.pieces
    ]
    mine = form.projected(vectors)
    for name, piece, v, along in zip(part.names, part.layout.pieces, vectors, mine, strict=True):
        gradient = gradients[name]
        if gradient is None:
            expected = torch.zeros_like(along)
        else:
            flat = gradient.to(dtype).reshape(-1, 1)
            expected = piece.to_grid(flat, part.layout.rows).squeeze(-1) @ v
        if not agree(along, expected, dtype=given.dtype):
            return False
    return True


def agree(a: Tensor, b: Tensor, power: float = 0.5, dtype: torch.dtype | None = None) -> bool:
    """Equal up to eps^power, relative to b: the same sums in another order."""
    a, b = a.detach().flatten(), b.detach().flatten()
    tolerance = torch.finfo(dtype or b.dtype).eps ** power
    return bool((a - b).norm() <= tolerance * b.norm())
