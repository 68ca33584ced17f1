"""Where the forms of a pass go: to statistics, and to a second pass that need not read the data."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .jacobian.forms import Form, Outer
from .jacobian.summed import Summed
from .statistics import Statistic

__all__ = ["Feed", "Kept"]

KEPT_BYTES = 2**26  # the forms of a whole pass are kept for a second one up to this size


class Kept:
    """The forms that were handed over so far; none once they are too large.

    Rows are not kept: what they hold may be a whole batch with its graph.

    Args:
        wanted: whether any are kept.
    """

    def __init__(self, wanted: bool) -> None:
        self.forms: list[tuple[int, Form | None, bool, bool]] | None = [] if wanted else None
        self._bytes = 0

    def add(self, k: int, form: Form | None, first: bool, last: bool) -> None:
        """Keep a form of part k, if all of them still fit."""
        if self.forms is None:
            return
        self._bytes += _held(form, first)
        if self._bytes > KEPT_BYTES:
            self.forms = None
            return
        self.forms.append((k, form if isinstance(form, Outer | Summed) else None, first, last))


class Feed:
    """Gives each form to the statistics of its part, and to the kept ones.

    A statistic of several parts waits for the last of them; all others are updated at once, so that
    a form can go when the next one comes.

    Args:
        statistics: all of a pass.
        kept: the forms that are kept.
    """

    def __init__(self, statistics: Sequence[Statistic], kept: Kept) -> None:
        self._kept = kept
        self._of: dict[int, list[Statistic]] = {}
        for each in statistics:
            for k in each.indices:
                self._of.setdefault(k, []).append(each)
        self._waiting: dict[int, dict[int, Form | None]] = {id(each): {} for each in statistics}

    def __call__(self, k: int, form: Form | None, first: bool, last: bool) -> None:
        """Take the form of part k in a chunk of directions."""
        for each in self._of.get(k, ()):
            found = self._waiting[id(each)]
            found[k] = form
            if len(found) == len(each.indices):
                each.update([found[index] for index in each.indices], first, last)
                found.clear()
        self._kept.add(k, form, first, last)


def _held(form: Form | None, first: bool) -> int:
    """The bytes of a form; its inputs are those of the first chunk of a batch."""
    if isinstance(form, Summed):
        return sum(_held(outer, first) for outer in form.outers)
    if not isinstance(form, Outer):
        return 0
    inputs = vars(form.inputs).values() if first and form.inputs is not None else ()
    return form.bytes + sum(x.nbytes for x in inputs if isinstance(x, Tensor))
