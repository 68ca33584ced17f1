"""Forms of a pass that are kept for a second one, which then need not read the data."""

from __future__ import annotations

from torch import Tensor

from .jacobian.forms import Form, Outer
from .jacobian.summed import Summed

__all__ = ["Chunk", "keep_forms"]

Chunk = tuple[list[Form | None], bool, bool]
KEPT_BYTES = 2**26  # the forms of a whole pass are kept for a second one up to this size


def keep_forms(kept: list[Chunk] | None, chunk: Chunk) -> list[Chunk] | None:
    """All chunks so far, or None once they are too large: the next pass then sees the data again.

    Rows are not kept: what they hold may be a whole batch with its graph.
    """
    if kept is None:
        return None
    forms = [form if isinstance(form, Outer | Summed) else None for form in chunk[0]]
    kept.append((list(forms), *chunk[1:]))
    size = sum(_held(form, first) for held, first, _ in kept for form in held)
    return kept if size <= KEPT_BYTES else None


def _held(form: Form | None, first: bool) -> int:
    """The bytes of a form; its inputs are those of the first chunk of a batch."""
    if isinstance(form, Summed):
        return sum(_held(outer, first) for outer in form.outers)
    if not isinstance(form, Outer):
        return 0
    inputs = vars(form.inputs).values() if first and form.inputs is not None else ()
    return form.bytes + sum(x.nbytes for x in inputs if isinstance(x, Tensor))
