"""What is known of a matrix: its parameters and data, and what a build of it costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from .collectives import ALONE, Group
from .jacobian.forms import Form, Outer
from .jacobian.inputs import IndexInputs, PatchInputs
from .jacobian.parts import Part
from .jacobian.summed import Summed
from .layout import Layout
from .space import ParamSpace

__all__ = ["Cost", "Facts", "Sample", "grid_kind"]


@dataclass(frozen=True)
class Facts:
    """What is known of a matrix's data: the parameters, and after a pass also what it counted.

    Attributes:
        space: the parameters.
        parts: the parameters by form; empty before the first batch is seen.
        dtype: of the sums.
        described: which matrix it is, in plain words.
        center: whether the mean row is subtracted from every row.
        num_examples: how many examples the pass saw.
        num_terms: how many labels were scored; None if that is not known.
        denominator: what sums are divided by: the number of examples, or a loss's own.
        log_likelihood: of all observed labels; None if there are none, or some do not fit.
        group: the processes whose data they are.
    """

    space: ParamSpace
    parts: Sequence[Part]
    dtype: torch.dtype
    described: Mapping[str, str | int | None]
    center: bool = False
    num_examples: int = 0
    num_terms: int | None = None
    denominator: float = 0.0
    log_likelihood: float | None = None
    group: Group = field(default=ALONE, repr=False, compare=False)


class Cost(NamedTuple):
    """What a statistic costs for one part.

    Attributes:
        part: its index.
        block: the kind of block that it makes, with its sizes; empty if it only helps one.
        numbers: how many numbers are kept.
        flops: floating-point operations for each example, all its directions together.
    """

    part: int
    block: str
    numbers: int
    flops: int


@dataclass(frozen=True)
class Sample:
    """The forms of one direction of the first batch, from which costs are told.

    Attributes:
        forms: of each part; None is a zero block.
        directions: of each example.
        examples: in the whole loader, or in what is known of it.
        general: forward and backward passes of the whole network that a batch takes on the general
            way, for all such parts together.
        proofs: backward passes of the self-check that each batch takes.
    """

    forms: Sequence[Form | None]
    directions: int
    examples: int
    general: tuple[int, int] = (0, 0)
    proofs: int = 0

    def form(self, k: int, use: Layout | None = None) -> Form | None:
        """The form of a part, or of some of the uses that it sums."""
        form = self.forms[k]
        return form.outer_of(use) if use is not None and isinstance(form, Summed) else form

    def positions(self, k: int, use: Layout | None = None) -> int:
        """How many positions of an example share a part."""
        form = self.form(k, use)
        return int(form.g.shape[3]) if isinstance(form, Outer) else int(form is not None)

    def products(self, k: int, use: Layout | None = None) -> int:
        """Multiply-adds of the second moment of an example's patches; 0 if it has none."""
        form = self.form(k, use)
        patches = isinstance(form, Outer) and isinstance(form.inputs, PatchInputs)
        return int(form.inputs.products) if patches else 0  # type: ignore[union-attr]

    def indexed(self, k: int, use: Layout | None = None) -> bool:
        """Whether a part's input factor is a histogram."""
        form = self.form(k, use)
        return isinstance(form, Outer) and isinstance(form.inputs, IndexInputs)


def grid_kind(name: str, grid: Layout, left: str, right: str) -> str:
    """As a Kronecker operator names its kind, from the names of its sides."""
    many = f"{grid.groups} x " if grid.groups > 1 else ""
    return f"{name} {many}({left}) x ({right})"
