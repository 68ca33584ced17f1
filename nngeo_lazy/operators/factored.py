"""Jacobians as the inputs and output gradients of their layers: products without autograd."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ..jacobian.forms import Form, Outer
from ..jacobian.grams import add_products, met, mirror, over, row_products, row_squares
from ..layout import Layout, assemble
from ..precision import widened
from .base import BaseLinearOperator, Krylov
from .composite import add_diagonal_lazily
from .damping import Damping
from .decompose import Decomposition
from .info import Info
from .lazy import LazyLinearOperator
from .matrix_free import RectangularLinearOperator, TransposedLinearOperator, columns_of
from .vectors import flattened

__all__ = [
    "FactoredGaussNewtonLinearOperator",
    "FactoredJacobianLinearOperator",
    "inner_products",
]

COLUMN_BYTES = 2**26  # of columns of J^T at a time
SAMPLE_SPACE = 2**14  # rows up to which their Gram matrix is decomposed: 2 GiB in float64


class FactoredJacobianLinearOperator(RectangularLinearOperator):
    """J (N R) x P, example slowest, from the forms of its parts: products are matrix products.

    Args:
        *tensors: what the forms are made of; see `of`.
        layouts: where each part lies in the flat vector.
        template: the forms of each part in each batch, with slots for the tensors.
        order: which of the tensors goes into each slot.
        center: whether the mean row is subtracted from every row.
        info: what is known besides the numbers.
    """

    def __init__(
        self,
        *tensors: Tensor,
        layouts: tuple[Layout, ...],
        template: Any,
        order: tuple[int, ...],
        center: bool = False,
        info: Info | None = None,
    ) -> None:
        super().__init__(
            *tensors, layouts=layouts, template=template, order=order, center=center, info=info
        )
        self.layouts, self.center = layouts, center
        self.batches: list[list[Form | None]] = _put_together(template, [tensors[k] for k in order])
        shapes = [next(form.shape for form in batch if form is not None) for batch in self.batches]
        self.row_shapes: list[tuple[int, int]] = [(n, r) for r, n, _ in shapes]

    @classmethod
    def of(
        cls,
        batches: Sequence[Sequence[Form | None]],
        layouts: Sequence[Layout],
        info: Info,
        *,
        center: bool = False,
    ) -> FactoredJacobianLinearOperator:
        """The Jacobian of the forms of each part in each batch; None is a zero part."""
        tensors: list[Tensor] = []
        template = _taken_apart([list(batch) for batch in batches], tensors)
        # the first one gives dtype and device
        order = sorted(range(len(tensors)), key=lambda k: not tensors[k].is_floating_point())
        return cls(
            *(tensors[k] for k in order),
            layouts=tuple(layouts),
            template=template,
            order=tuple(order.index(k) for k in range(len(tensors))),
            center=center,
            info=info,
        )

    def _size(self) -> torch.Size:
        rows = sum(n * r for n, r in self.row_shapes)
        return torch.Size((rows, sum(layout.size for layout in self.layouts)))

    def _transpose_nonbatch(self) -> BaseLinearOperator:
        return TransposedLinearOperator(self)

    def _restrict(self, names: tuple[str, ...]) -> BaseLinearOperator:
        return columns_of(self, names)

    def _apply(self, v: Tensor) -> Tensor:
        wide, back = flattened(v)
        return back(self._jvp(wide))

    def _apply_transposed(self, u: Tensor) -> Tensor:
        wide, back = flattened(u)
        return back(self._vjp(wide))

    def _jvp(self, v: Tensor) -> Tensor:
        parts = [layout.gather(v) for layout in self.layouts]
        rows = []
        for batch in self.batches:
            made = [
                form.jvp(part) for form, part in zip(batch, parts, strict=True) if form is not None
            ]
            total = made[0] if len(made) == 1 else torch.stack(made).sum(0)  # (R,N,k)
            rows.append(total.transpose(0, 1).flatten(0, 1))
        return self._less_mean(torch.cat(rows))

    def _vjp(self, u: Tensor) -> Tensor:
        u = self._less_mean(u)
        sizes = [n * r for n, r in self.row_shapes]
        weights = []
        for (n, r), part in zip(self.row_shapes, u.split(sizes), strict=True):
            weights.append(part.unflatten(0, (n, r)).transpose(0, 1))  # (R,N,k)
        placed = []
        for k, layout in enumerate(self.layouts):
            total: Tensor | None = None
            for batch, weight in zip(self.batches, weights, strict=True):
                form = batch[k]
                if form is not None:
                    made = form.vjp(weight)
                    total = made if total is None else total + made
            if total is None:
                total = u.new_zeros(layout.size, u.shape[-1])
            placed += layout.scatter(total)
        return assemble(placed)

    def squares(self) -> Tensor:
        """The diagonal (P,) of J^T J."""
        n = sum(count for count, _ in self.row_shapes)
        placed = []
        for k, layout in enumerate(self.layouts):
            total = torch.zeros(layout.size, dtype=self.dtype, device=self.device)
            mean = torch.zeros(
                self.row_shapes[0][1], layout.size, dtype=self.dtype, device=self.device
            )
            for batch in self.batches:
                form = batch[k]
                if form is not None:
                    total += form.sqsum()
                    if self.center:
                        mean += form.totals()
            if self.center:
                total = (total - mean.square().sum(0) / n).clamp_min(0)
            placed += layout.scatter(total.unsqueeze(-1))
        return assemble(placed).squeeze(-1)

    def gram(self) -> Tensor:
        """J J^T, in tiles of examples."""
        full = inner_products(self, self, "all", "auto")
        return self._less_mean(self._less_mean(full).mT)

    def direction(self, r: int) -> FactoredJacobianLinearOperator:
        """The rows of one output, N x P."""
        return self._of([[form and form.direction(r) for form in batch] for batch in self.batches])

    def examples(self, start: int, stop: int) -> FactoredJacobianLinearOperator:
        """The rows of a range of examples."""
        batches, first = [], 0
        for batch, (n, _) in zip(self.batches, self.row_shapes, strict=True):
            a, b = max(start - first, 0), min(stop - first, n)
            if a < b:
                batches.append([form and form.examples(a, b) for form in batch])
            first += n
        return self._of(batches)

    def each_batch(self, start: int) -> Iterator[FactoredJacobianLinearOperator]:
        """The rows of each batch, from the given one on."""
        for batch in self.batches[start:]:
            yield self._of([batch])

    def columns(self) -> Iterator[Tensor]:
        """J^T, (P, n R) of some examples at a time."""
        for batch, (n, r) in zip(self.batches, self.row_shapes, strict=True):
            step = max(1, COLUMN_BYTES // (r * self.shape[1] * torch.finfo(self.dtype).bits // 8))
            for a in range(0, n, step):
                b = min(a + step, n)
                placed = []
                for form, layout in zip(batch, self.layouts, strict=True):
                    if form is None:
                        made = torch.zeros(
                            layout.size, (b - a) * r, dtype=self.dtype, device=self.device
                        )
                    else:
                        made = form.rows(a, b).transpose(0, 1).flatten(0, 1).mT
                    placed += layout.scatter(made)
                yield assemble(placed)

    def row_squares(self) -> Tensor:
        """The squared norm of each row, (N R,)."""
        parts = [torch.stack([row_squares(f) for f in b if f]).sum(0) for b in self.batches]
        return torch.cat([part.flatten() for part in parts])

    def row_products(self) -> Tensor:
        """The inner products of the rows of each example, (N, R, R)."""
        parts = [torch.stack([row_products(f) for f in b if f]).sum(0) for b in self.batches]
        return torch.cat(parts)

    def _of(self, batches: list[list[Form | None]]) -> FactoredJacobianLinearOperator:
        return self.of(batches, self.layouts, self.info, center=self.center)

    def _less_mean(self, rows: Tensor) -> Tensor:
        """Rows (N R, k) less their mean over examples, if that is subtracted."""
        if not self.center:
            return rows
        by_example = rows.unflatten(0, (-1, self.row_shapes[0][1]))
        centered: Tensor = (by_example - by_example.mean(0)).flatten(0, 1)
        return centered

    def _kind(self) -> str:
        return f"factored {self.shape[0]}x{self.shape[1]}"


def inner_products(
    left: FactoredJacobianLinearOperator,
    right: FactoredJacobianLinearOperator,
    directions: str,
    way: str,
) -> Tensor:
    """J J'^T from the forms, a pair of batches at a time; if both are one, each pair once.

    Args:
        left: (N R) x P.
        right: (N' R') x P.
        directions: "all", or "same" for the sum over r = s, (N, N').
        way: "pairs" of positions, "rows", or "auto", for each layer the cheaper one.
    """
    same, every = left is right, directions == "all"
    rows, columns = (
        _slices([n * r if every else n for n, r in J.row_shapes]) for J in (left, right)
    )
    out = torch.zeros(rows[-1].stop, columns[-1].stop, dtype=left.dtype, device=left.device)
    blocks = met(left.layouts, right.layouts)
    for i, across in enumerate(rows):
        for j, along in enumerate(columns[: i + 1] if same else columns):
            tile = out[across, along]  # not by split(), whose views autograd lets nobody add to
            for ours, theirs in blocks:
                alike = [left.layouts[k] for k in ours] == [right.layouts[k] for k in theirs]
                single = alike and len(ours) == 1
                one = _form(left, i, ours, single)
                other = _form(right, j, theirs, single)
                if one is not None and other is not None:
                    add_products(one, other, directions, tile, way, half=same and i == j)
    if same:
        mirror(out)
    return out


def _form(
    J: FactoredJacobianLinearOperator, batch: int, blocks: Sequence[int], as_it_is: bool
) -> Form | None:
    """The form of some blocks of a batch; rows, if it must fit other blocks."""
    forms = [J.batches[batch][k] for k in blocks]
    return forms[0] if as_it_is else over([J.layouts[k] for k in blocks], forms)


def _slices(sizes: Sequence[int]) -> list[slice]:
    """Slices of these sizes, one after the other."""
    return [slice(stop - size, stop) for stop, size in zip(accumulate(sizes), sizes, strict=True)]


class FactoredGaussNewtonLinearOperator(LazyLinearOperator):
    r"""B^T B + d I from a factored B, K x P: a Gauss-Newton or Fisher matrix.

    .. math:: (B^T B + d I)^{-1} v = (v - B^T (B B^T + d I)^{-1} B v) / d

    If K is at most half of P, it is solved so, in the space of samples: by the Gram matrix of the
    rows, which is made once. Otherwise it is solved by conjugate gradients.

    Args:
        root: B.
        shift: d, 0-d; none by default.
        info: what is known besides the numbers.
    """

    def __init__(
        self,
        root: FactoredJacobianLinearOperator,
        shift: Tensor | None = None,
        *,
        info: Info | None = None,
        decomposition: Decomposition | None = None,
    ) -> None:
        self._decomposed = Decomposition.of(decomposition, *root._args)
        args = (root,) if shift is None else (root, shift)
        super().__init__(*args, info=info, decomposition=self._decomposed)
        self.root, self.shift = root, shift

    def _size(self) -> torch.Size:
        n = self.root.shape[-1]
        return torch.Size((n, n))

    def _transpose_nonbatch(self) -> BaseLinearOperator:
        return self

    def _apply(self, v: Tensor) -> Tensor:
        product = self.root._apply_transposed(self.root._apply(v))
        return product if self.shift is None else product + self.shift * v

    def _damp(self, damping: Damping, method: str) -> BaseLinearOperator:
        if damping.value.dim() > 0:
            return add_diagonal_lazily(self, damping.value)
        shift = damping.value if self.shift is None else self.shift + damping.value
        return FactoredGaussNewtonLinearOperator(
            self.root, shift, info=self.info, decomposition=self._decomposed
        )

    def _diagonal(self) -> Tensor:
        diagonal = self.root.squares()
        return diagonal if self.shift is None else diagonal + self.shift

    @property
    def known_symmetric(self) -> bool:
        """B^T B, with B rectangular."""
        return True

    @property
    def iterates(self) -> bool:
        """Whether a solve is an iteration: yes, unless it is solved in sample space."""
        return not self.in_sample_space

    @property
    def in_sample_space(self) -> bool:
        """Whether it is solved by the Gram matrix of the rows."""
        rows, n = self.root.shape
        return self.shift is not None and 2 * rows <= n and rows <= SAMPLE_SPACE

    def _gram(self) -> Tensor:
        return self._decomposed.get("gram", lambda: widened(self.root.gram()))

    def _factor(self) -> Tensor | None:
        """The Cholesky factor of B B^T + d I in float64; None if it is singular."""
        if not self.in_sample_space or self.shift is None or not bool(self.shift > 0):
            return None
        gram_matrix = self._gram()
        eye = torch.eye(len(gram_matrix), dtype=gram_matrix.dtype, device=gram_matrix.device)
        factor, failed = torch.linalg.cholesky_ex(gram_matrix + widened(self.shift) * eye)
        return None if bool(failed) else factor

    def _solve_columns(self, v: Tensor, krylov: Krylov) -> Tensor:
        factor = self._factor()
        if factor is None or self.shift is None:
            return super()._solve_columns(v, krylov)
        x = self._sample_space(v, factor, self.shift)
        return x + self._sample_space(v - self._apply(x), factor, self.shift)  # what cancelled

    def _sample_space(self, v: Tensor, factor: Tensor, d: Tensor) -> Tensor:
        u = widened(self.root._apply(v))
        u = torch.cholesky_solve(u, factor).to(v.dtype)
        return (v - self.root._apply_transposed(u)) / d

    def _logdet(self) -> Tensor:
        factor = self._factor()
        if factor is None or self.shift is None:
            return super()._logdet()
        rows, n = self.root.shape
        inside = 2 * factor.diagonal().log().sum()
        whole: Tensor = inside + (n - rows) * widened(self.shift).log()
        return whole.to(self.dtype)

    def _draw(self, n: int, generator: torch.Generator | None) -> Tensor:
        like = {"dtype": self.dtype, "device": self.device, "generator": generator}
        z = torch.randn(self.root.shape[0], n, **like)
        draw = self.root._apply_transposed(z)
        if self.shift is None:
            return draw
        more = torch.randn(self.shape[-1], n, **like)
        return draw + self.shift.sqrt() * more

    def _kind(self) -> str:
        return self.root._kind()


@dataclass(frozen=True)
class _Slot:
    """Where a tensor goes."""

    index: int


def _taken_apart(value: Any, tensors: list[Tensor]) -> Any:
    """A structure of forms with slots for the tensors that it holds, which are appended."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return _Slot(len(tensors) - 1)
    if isinstance(value, (list, tuple)):
        return type(value)(_taken_apart(entry, tensors) for entry in value)
    if is_dataclass(value) and not isinstance(value, (type, Layout)):
        made = {f.name: _taken_apart(getattr(value, f.name), tensors) for f in fields(value)}
        return replace(value, **made)
    return value


def _put_together(template: Any, tensors: Sequence[Tensor]) -> Any:
    """The structure of forms with tensors in its slots."""
    if isinstance(template, _Slot):
        return tensors[template.index]
    if isinstance(template, (list, tuple)):
        return type(template)(_put_together(entry, tensors) for entry in template)
    if is_dataclass(template) and not isinstance(template, (type, Layout)):
        made = {f.name: _put_together(getattr(template, f.name), tensors) for f in fields(template)}
        new = replace(template, **made)
        if isinstance(new, Outer) and new.inputs is not None:
            return replace(new, inputs=new.inputs.to(new.g.dtype))  # indices have a dtype of x, too
        return new
    return template
