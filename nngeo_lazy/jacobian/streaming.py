"""The forms of a recorded batch, one layer at a time while a backward pass goes by.

A backward pass that is asked for the gradients at all layers holds them to its end, beside the
inputs of all layers. Here a form is used and dropped when the gradient at its layer arrives.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

from torch import Tensor

from .forms import Form
from .parts import Gradient, Kind, Part
from .passes import Recorded, gradients_at

__all__ = ["Take", "stream"]

# The form of a part (None if no batch uses it), in the first or the last chunk of directions.
Take: TypeAlias = Callable[[int, Form | None, bool, bool], None]


def stream(recorded: Recorded, directions: Iterator[Tensor], count: int, take: Take) -> None:
    """Hand over every part's form, for each chunk of directions once.

    Forms come one at a time if a single direction's gradients are large. The inputs of a layer are
    gone once it was reached in the last direction: nothing can be made of the batch then.

    Args:
        recorded: the batch.
        directions: cotangents shaped like the outputs.
        count: how many there are.
        take: what is done with a form.
    """
    if not recorded.streams:
        for forms, first, last in recorded.chunks(directions, count):
            for k, form in enumerate(forms):
                take(k, form, first, last)
        return
    lowest = _lowest(recorded)
    for done, direction in enumerate(directions):
        _Passing(recorded, direction, done == 0, done == count - 1, take).run(lowest)


class _Passing:
    """One backward pass.

    Args:
        recorded: the batch.
        direction: the cotangent.
        first, last: which direction it is.
        take: what is done with a form.
    """

    def __init__(
        self, recorded: Recorded, direction: Tensor, first: bool, last: bool, take: Take
    ) -> None:
        self._recorded, self._take = recorded, take
        self._direction = direction.to(recorded.record.outputs.dtype)
        self._first, self._last = first, last
        parts = recorded.plan.parts
        self._gradients: dict[int, Gradient] = {}
        self._missing = {k: set(part.calls) for k, part in enumerate(parts) if _at_once(part)}
        self._users = Counter(call for part in parts for call in set(part.calls))

    def run(self, lowest: Sequence[int]) -> None:
        """Take all parts; `lowest` are the calls below which there is no other one."""
        recorded = self._recorded
        calls = recorded.record.calls
        general = recorded.plan.general is not None
        hooks = []
        try:
            for k in recorded.used:
                if k not in lowest:
                    edge = calls[k].edge
                    hooks.append(edge.node.register_prehook(self._hook(k, edge.output_nr)))
            root, keep = recorded.record.outputs, not self._last or general
            found = gradients_at(root, [calls[k].edge for k in lowest], self._direction, keep)
        finally:
            for hook in hooks:
                hook.remove()
        for k, gradient in zip(lowest, found, strict=True):
            self._arrived(k, gradient)
        for k in recorded.used:
            if k not in self._gradients and self._users[k]:  # no gradient came: zeros
                self._arrived(k, None)
        self._rest()

    def _hook(self, k: int, output: int) -> Callable[[Any], None]:
        def arrived(gradients: Sequence[Tensor | None]) -> None:
            self._arrived(k, gradients[output])

        return arrived

    def _arrived(self, call: int, gradient: Tensor | None) -> None:
        self._gradients[call] = self._recorded.gradient(call, [gradient])
        for k, missing in self._missing.items():
            if call in missing:
                missing.remove(call)
                if not missing:
                    self._hand_over(k)

    def _hand_over(self, k: int) -> None:
        recorded, first, last = self._recorded, self._first, self._last
        form = recorded.form(k, self._gradients)
        self._take(k, form, first, last)
        del form
        for call in set(recorded.plan.parts[k].calls):
            self._users[call] -= 1
            if not self._users[call]:
                del self._gradients[call]
                if last:
                    recorded.drop(call)
        if last:
            recorded.drop_inputs(k)

    def _rest(self) -> None:
        """Parts without calls, and those whose rows go back through the graph."""
        general = self._recorded.general([self._direction])
        for k, part in enumerate(self._recorded.plan.parts):
            if part.kind is Kind.UNUSED:
                self._take(k, None, self._first, self._last)
            elif part.kind is Kind.GENERAL:
                self._take(k, next(general), self._first, self._last)
            elif not _at_once(part):
                self._hand_over(k)


def _at_once(part: Part) -> bool:
    """Whether a form is made of gradients and inputs alone, and not by another backward pass."""
    return bool(part.members) and not part.derived


def _lowest(recorded: Recorded) -> list[int]:
    """The calls whose gradients the backward pass must be asked for, so that it reaches all.

    It runs the nodes that lie between the outputs and what it is asked for: hooks see those.
    """
    calls = recorded.record.calls
    nodes = {calls[k].edge.node for k in recorded.used}
    above: dict[Any, bool] = {}  # whether one of the nodes lies below
    stack: list[tuple[Any, bool]] = [(recorded.record.outputs.grad_fn, False)]
    while stack:
        node, left = stack.pop()
        below = [n for n, _ in node.next_functions if n is not None]
        if left:
            above[node] = any(n in nodes or above.get(n, False) for n in below)
        elif node not in above:
            above[node] = False
            stack.append((node, True))
            stack += [(n, False) for n in below if n not in above]
    return [k for k in recorded.used if not above.get(calls[k].edge.node, False)]
