"""The proof of forms, on the examples of a pass.

The self-check takes a random cotangent, and the same times a random number for each example. The
gradient at a layer's output must be multiplied by its own example's number at every position. This
finds the example axis, also if positions are folded into it, and proves it for every example. The
rows made from it must add up to what autograd gives for the parameters. What disagrees is demoted
to the general way and reported. Comparing whole gradients is not enough: it cannot see which
example a row belongs to.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..space import ParamSpace
from .calls import Call
from .folds import Axis, Fold, Ragged, candidates
from .inputs import Inputs
from .parts import Gradient, Kind, Part

__all__ = ["Probe", "Probed", "Unproved", "agree", "probe_folds", "scales_of"]


@dataclass(frozen=True)
class Probe:
    """A random cotangent, the same scaled by example, and the gradients at the calls' outputs."""

    cotangent: Tensor
    scales: Tensor  # (N,)
    at_calls: Sequence[Tensor | None]
    scaled: Sequence[Tensor | None]
    rounding: float = 0.0  # the coarsest on the way

    def of_calls(self, which: Sequence[int]) -> Probe:
        """The same at some of the calls, which may come several times."""
        at_calls, scaled = self.at_calls, self.scaled
        return replace(
            self, at_calls=[at_calls[k] for k in which], scaled=[scaled[k] for k in which]
        )

    @property
    def silent(self) -> frozenset[int]:
        """The calls whose gradient is zero: it proves nothing about them."""
        return silent(self.at_calls)


def silent(gradients: Sequence[Tensor | None]) -> frozenset[int]:
    """Which gradients exist and are zero."""
    found = [(k, g.any()) for k, g in enumerate(gradients) if g is not None]
    if not found:
        return frozenset()
    lively = torch.stack([any_ for _, any_ in found]).tolist()
    return frozenset(k for (k, _), some in zip(found, lively, strict=True) if not some)


def scales_of(outputs: Tensor, generator: torch.Generator) -> Tensor:
    """A random number for each example, none near another one's."""
    n = outputs.shape[0]
    sizes = torch.linspace(-1, 1, n, device=outputs.device).exp2() if n > 1 else None
    if sizes is None:
        return torch.ones(1, dtype=outputs.dtype, device=outputs.device)
    order = torch.randperm(n, generator=generator, device=outputs.device)
    signs = torch.randint(2, (n,), generator=generator, device=outputs.device) * 2 - 1
    return (sizes[order] * signs).to(outputs.dtype)


def probe_folds(
    calls: Sequence[Call], probe: Probe, routed: Collection[int] = ()
) -> list[Fold | None]:
    """The example axis of each call, or None if no axis confines gradients.

    Args:
        calls: the recorded calls.
        probe: gradients at them.
        routed: calls of which it is known that each position has an owner of its own, also if an
            axis fits by accident.
    """
    n = len(probe.scales)
    folds: list[Fold | None] = []
    for k, call in enumerate(calls):
        fitting = (
            fold
            for fold in candidates(call.shape[: call.use.leading], n)
            if _confined(fold, call, k, probe)
        )
        fold = next(fitting, None)
        by_accident = fold is not None and n > 1 and _has_empty_places(fold, call, k, probe)
        if k in routed or by_accident or (fold is None and n > 1):
            fold = _ragged(call, k, probe) or fold
        folds.append(fold)
    return folds


def _has_empty_places(fold: Fold, call: Call, k: int, probe: Probe) -> bool:
    """Whether flat positions have places without input and gradient, as those of experts do."""
    plain = probe.at_calls[k]
    if fold.kind is Axis.WHOLE or call.use.leading != 1 or plain is None:
        return False
    dead = ~_by_place(call.arranged(plain.unsqueeze(0))[0], 1).any(1)
    return bool(dead.any()) and bool((dead & _without_input(call, call.shape[:1])).any())


def _ragged(call: Call, k: int, probe: Probe) -> Ragged | None:
    """The owner of each position: by whose number its gradient is multiplied.

    A position without a gradient goes to the owner of the one before: it has no part in rows. If
    its input is zero as well, it is an empty place, such as those of an expert that more tokens
    might have chosen, and goes to nobody.
    """
    plain, scaled, scales = probe.at_calls[k], probe.scaled[k], probe.scales
    n, leading = len(scales), 1 if call.use.local is not None else call.use.leading
    if not 1 <= leading <= len(call.shape):
        return None
    sizes = call.shape[:leading]
    none = torch.zeros(sizes.numel(), dtype=torch.int64, device=scales.device)
    if plain is None or scaled is None:
        return Ragged.of(none, n, sizes)
    dtype = torch.promote_types(plain.dtype, torch.float32)
    ours, theirs = (  # (positions, features)
        _by_place(call.arranged(g.unsqueeze(0))[0], leading).to(dtype) for g in (plain, scaled)
    )
    size = ours.norm(dim=1)
    precision = max(probe.rounding, _precision(scales, [plain]))
    alive = size > 16 * precision * size.max()
    empty = size == 0
    if bool(empty.any()):
        empty &= _without_input(call, sizes)
    if not bool(alive.any()):  # no gradient, or one that is not finite
        return None if bool(size.any()) else Ragged.of(none.masked_fill(empty, -1), n, sizes)
    ratio = (ours * theirs).sum(1) / size.square().clamp_min(torch.finfo(dtype).tiny)
    numbers, order = scales.to(dtype).sort()
    if n == 1:
        return Ragged.of(none.masked_fill(empty, -1), n, sizes)
    middles = (numbers[1:] + numbers[:-1]) / 2
    place = torch.bucketize(ratio, middles)
    gap = (numbers[1:] - numbers[:-1]).min()
    expected = ours * numbers[place].unsqueeze(1)
    near = (ratio - numbers[place]).abs() <= gap / 4
    bounds = precision**0.5 * expected.norm(dim=1) + 16 * precision * size.max()
    near &= (theirs - expected).norm(dim=1) <= bounds
    if not bool((near | ~alive).all()):
        return None
    last = torch.where(alive, torch.arange(len(alive), device=alive.device), -1).cummax(0).values
    last = torch.where(last < 0, alive.int().argmax(), last)
    return Ragged.of(order[place[last]].masked_fill(empty, -1), n, sizes)


def _without_input(call: Call, sizes: Sequence[int]) -> Tensor:
    """Which of the flattened positions have an input of zeros."""
    x = call.use.x
    if not x.is_floating_point() or tuple(x.shape[: len(sizes)]) != tuple(sizes):
        return torch.zeros(math.prod(sizes), dtype=torch.bool, device=x.device)
    return ~_by_place(x, len(sizes)).any(1)


def _by_place(t: Tensor, leading: int) -> Tensor:
    """(*leading, *features) -> (positions, features), also if the features are one number."""
    return t.flatten(0, leading - 1).unsqueeze(-1).flatten(1)


def _confined(fold: Fold, call: Call, k: int, probe: Probe) -> bool:
    """Whether every example's gradient is multiplied by its own number."""
    plain, scaled, scales = probe.at_calls[k], probe.scaled[k], probe.scales
    if plain is None or scaled is None or len(scales) == 1:
        return True
    n = len(scales)
    dtype = torch.promote_types(plain.dtype, torch.float32)
    both = call.arranged(torch.stack([plain, scaled]))
    ours, theirs = fold.apply(both, call.use.leading, n, offset=1).flatten(2).to(dtype)
    expected = ours * scales.to(dtype)[:, None]
    sizes = expected.norm(dim=1)
    precision = max(probe.rounding, _precision(scales, [plain]))
    bounds = precision**0.5 * sizes + 16 * precision * sizes.max()
    return bool(((theirs - expected).norm(dim=1) <= bounds).all())


class Unproved(str):
    """Why the self-check did not prove a form that there is: numbers differ, perhaps rounded."""

    __slots__ = ()


@dataclass(frozen=True)
class Probed:
    """A pass on which forms are compared with autograd.

    Attributes:
        calls: the recorded calls.
        folds: their example axes.
        probe: a cotangent and its gradients at the calls.
        gradients: of the parameters, for the same cotangent.
        parameters: the selected ones by name.
        space: where they lie.
    """

    calls: Sequence[Call]
    folds: Sequence[Fold | None]
    probe: Probe
    gradients: Mapping[str, Tensor | None]
    parameters: Mapping[str, Tensor]
    space: ParamSpace

    def disagreement(self, part: Part, n: int) -> str:
        """Why a part's rows, of n examples, are not autograd's; empty if they are."""
        alone = any(self.calls[k].use.local is not None for k in part.calls)
        try:
            apart = self._apart(part, n)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            if not alone:
                raise
            reason = str(error).split("\n")[0]
            notes = [self.calls[k].note for k in part.calls if self.calls[k].note]
            why = "; ".join([*dict.fromkeys(notes), reason])
            return f"{part.function} cannot be run for one example alone ({why})"
        if apart == 0:
            return ""
        return Unproved(
            f"its rows from {part.function} are not autograd's: they differ by {apart:.1e} (is it "
            "used elsewhere too?)"
        )

    def _apart(self, part: Part, n: int) -> float:
        """By how much the rows fail to add up to autograd's gradients, along random vectors.

        Relative to those gradients; 0 if the difference is rounding.
        """
        given = self.probe.cotangent
        dtype = torch.promote_types(given.dtype, torch.float32)
        inputs = [
            None if x is None else x.to(dtype) for x in part.inputs(self.calls, self.folds, n)
        ]
        at_calls = {
            k: Gradient(
                self.calls[k],
                self.folds[k],
                [self.probe.at_calls[k]],
                n,
                dtype,
            )
            for k in part.calls
        }
        form = part.form(self.calls, self.folds, inputs, at_calls, self.parameters)
        generator = torch.Generator(device=given.device).manual_seed(0)
        vectors = [
            torch.randn(piece.width, generator=generator, dtype=dtype, device=given.device)
            for piece in part.layout.pieces
        ]
        mine = form.projected(vectors)
        expected = [
            _along(
                part, k, self.gradients[name], self.space.slices[name].start, vectors[k], mine[k]
            )
            for k, name in enumerate(part.names)
        ]
        precision = _precision(given, [self.probe.at_calls[k] for k in at_calls])
        precision = max(
            precision, self.probe.rounding, *(_eps(self.calls[k].use.x.dtype) for k in at_calls)
        )
        apart = [(a - b).norm() for a, b in zip(mine, expected, strict=True)]
        bounds = [precision**0.5 * b.norm() for b in expected]
        if all(bool(a <= bound) for a, bound in zip(apart, bounds, strict=True)):
            return 0.0
        # What is left of a sum may be all rounding: judge it by what was summed.
        squares = _squares(part, self.calls, self.folds, inputs, at_calls, vectors, self.parameters)
        many = sum(g.call.shape.numel() for g in at_calls.values()) / max(1, n)
        noise = 4 * precision + 16 * _eps(dtype) * many**0.5
        worst = 0.0
        for a, bound, size, b in zip(apart, bounds, squares, expected, strict=True):
            if not bool(a <= bound + noise * size):
                worst = max(worst, float(a / b.norm().clamp_min(torch.finfo(dtype).tiny)))
        return worst


def _along(
    part: Part, k: int, gradient: Tensor | None, start: int, vector: Tensor, like: Tensor
) -> Tensor:
    """The gradient of a part's k-th piece, along a vector."""
    if gradient is None:
        return torch.zeros_like(like)
    where, piece = part.layout.slices[k], part.layout.pieces[k]
    flat = gradient.reshape(-1, 1)[where.start - start : where.stop - start].to(like.dtype)
    return piece.to_grid(flat, part.layout.rows).squeeze(-1) @ vector


def _squares(
    part: Part,
    calls: Sequence[Call],
    folds: Sequence[Fold | None],
    inputs: Sequence[Inputs | None],
    at_calls: Mapping[int, Gradient],
    vectors: Sequence[Tensor],
    parameters: Mapping[str, Tensor],
) -> list[Tensor]:
    """For each piece the root of the sum of the squares of all terms that its rows are sums of."""
    squared = [v.square() for v in vectors]
    if part.derived or part.kind is Kind.ROWS:
        # With random signs the mean square of a row is the sum of the squares of its terms.
        given = next(iter(at_calls.values())).call.use.x
        generator = torch.Generator(device=given.device).manual_seed(1)
        signed = {k: g.signed(generator) for k, g in at_calls.items()}
        other = part.form(calls, folds, inputs, signed, parameters)
        pieces = other.sqsum().unflatten(0, (-1, sum(len(v) for v in vectors)))
        summed = pieces.split([len(v) for v in vectors], 1)
        made = [piece @ v for piece, v in zip(summed, squared, strict=True)]
    else:
        other = part.form(
            calls,
            folds,
            [None if x is None else x.squared() for x in inputs],
            {k: g.squared() for k, g in at_calls.items()},
            {},
        )
        made = other.projected(squared)
    return [each.sum().clamp_min(0).sqrt() for each in made]


def _precision(outputs: Tensor, gradients: Sequence[Tensor | None]) -> float:
    """The coarsest rounding that is met between the outputs and the calls."""
    found = [_eps(outputs.dtype), *(_eps(g.dtype) for g in gradients if g is not None)]
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    if outputs.is_cuda and (matmul.allow_tf32 or cudnn.allow_tf32):
        found.append(2.0**-10)
    return max(found)


def _eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps if dtype.is_floating_point else 0.0


def agree(a: Tensor, b: Tensor, power: float = 0.5, dtype: torch.dtype | None = None) -> bool:
    """Equal up to eps^power, relative to b: the same sums in another order."""
    a, b = a.detach().flatten(), b.detach().flatten()
    tolerance = torch.finfo(dtype or b.dtype).eps ** power
    apart = (a - b).masked_fill(a == b, 0).norm()  # infinities may be equal, too
    return bool(apart <= tolerance * b.masked_fill(b.isinf(), 0).norm())
