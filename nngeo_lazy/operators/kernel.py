"""Neural tangent kernels: J1 M J2^T with Jacobians J1, J2 and any M over the parameters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..errors import SpaceMismatchError, UnsupportedLayerError, wrong_option
from . import rules
from .base import BaseLinearOperator, Krylov
from .composite import ProductLinearOperator
from .decompose import Decomposition
from .dense import DenseLinearOperator
from .factored import (
    SAMPLE_SPACE,
    FactoredJacobianLinearOperator,
    inner_products,
)
from .info import Info
from .lazy import LazyLinearOperator, require_products
from .matrix_free import JacobianLinearOperator, TransposedLinearOperator
from .panels import START, Keep, Panels, Place, of_output, panels, rows_of, rows_of_an_example
from .stack import StackLinearOperator

__all__ = ["KINDS", "KernelLinearOperator", "kernel_of", "rows_of_an_example"]

_JACOBIANS = (JacobianLinearOperator, FactoredJacobianLinearOperator)
KINDS = ("full", "mean", "per_output", "per_example")


def _delegated(name: str) -> Any:
    """A member that the closed form answers, if there is one."""

    def member(self: KernelLinearOperator, *args: Any) -> Any:
        closed = self._closed()
        return getattr(super(KernelLinearOperator, self) if closed is None else closed, name)(*args)

    return member


class KernelLinearOperator(LazyLinearOperator):
    r"""J1 M J2^T, example slowest, or its mean over outputs: P x N is never formed.

    .. math:: K_{(n,c),(m,d)} = J_1[n,c] \, M \, J_2[m,d]^T, \qquad
        \bar K_{nm} = \frac1C \sum_c K_{(n,c),(m,c)}

    Products are those of the Jacobians. The matrix, its diagonal and its blocks are made from the
    forms of factored Jacobians, a tile of examples at a time. A symmetric kernel of factored
    Jacobians with at most 16,384 rows has the closed forms of a dense matrix, which is then made
    once; elsewhere solves are conjugate gradients.

    Args:
        left: J1.
        right: J2; left out if it is J1.
        middle: M; left out if it is the identity.
        symmetric: whether the second Jacobian is the first.
        outputs: "full" for all pairs of outputs, "mean" for the mean over equal ones.
        num_outputs: C, rows of one example.
        centered: whether the mean over examples is subtracted from rows and columns.
        way: how inner products of rows are made: "auto", "pairs" or "rows".
        info: what is known besides the numbers.
    """

    maps_to_parameters = False

    def __init__(
        self,
        left: BaseLinearOperator,
        *more: BaseLinearOperator,
        symmetric: bool = False,
        outputs: str = "full",
        num_outputs: int = 1,
        centered: bool = False,
        way: str = "auto",
        info: Info | None = None,
    ) -> None:
        super().__init__(
            left,
            *more,
            symmetric=symmetric,
            outputs=outputs,
            num_outputs=num_outputs,
            centered=centered,
            way=way,
            info=info,
        )
        self.left = left
        self.right, *rest = (left, *more) if symmetric else more
        self.middle = rest[0] if rest else None
        self.symmetric, self.centered, self.way = symmetric, centered, way
        self.kind, self.num_outputs = outputs, num_outputs
        self._decomposed = Decomposition()

    # --- what it is ------------------------------------------------------------------------------

    def outputs(self, kind: str) -> BaseLinearOperator:
        """Which pairs of outputs the kernel is over.

        Args:
            kind: "full" (N C x N' C); "mean" (N x N'), the trace over outputs divided by C;
                "per_output" (C, N, N'), a kernel for each output; "per_example" (N, C, C), the
                diagonal blocks of a symmetric kernel.

        Raises:
            ValueError: an unknown kind, or one that this kernel has lost.
        """
        if kind not in KINDS:
            raise ValueError(wrong_option("outputs", kind, KINDS, "kernels"))
        if kind == self.kind:
            return self
        if self.kind == "mean":
            raise ValueError(f"a kernel with outputs 'mean' has no {kind!r}: take the full one's")
        if kind == "mean":
            mean: KernelLinearOperator = self._with(outputs="mean")
            return mean
        if kind == "per_output":
            return StackLinearOperator(*self._each_output())
        if not self.symmetric:
            raise ValueError("outputs 'per_example' needs a kernel of one set of inputs")
        return StackLinearOperator(*map(DenseLinearOperator, self._example_blocks()))

    def center(self) -> KernelLinearOperator:
        r"""H K H with H = I - 1 1^T / N over the examples, for each pair of outputs.

        Raises:
            ValueError: a kernel of two sets of inputs.

        Source: Cortes, Mohri and Rostamizadeh (2012), Algorithms for learning kernels based on
            centered alignment, eq. 1.
        """
        if not self.symmetric:
            raise ValueError("center() needs a kernel of one set of inputs, got two")
        centered: KernelLinearOperator = self._with(centered=True)
        return centered

    # --- primitives ------------------------------------------------------------------------------

    def _size(self) -> torch.Size:
        c = 1 if self.kind == "full" else self.num_outputs
        return torch.Size((self.left.shape[0] // c, self.right.shape[0] // c))

    @property
    def is_explicit(self) -> bool:
        """Whether it is made dense for closed forms; its entries are known then."""
        return not self.iterates  # it is dense as soon as it is solved

    def _transpose_nonbatch(self) -> BaseLinearOperator:
        if self.symmetric:
            return self
        more = () if self.middle is None else (self.middle,)
        return KernelLinearOperator(self.right, self.left, *more, **self._kwargs)

    def _apply(self, v: Tensor) -> Tensor:
        v = self._less_mean(v)
        if self.kind == "full":
            return self._less_mean(self._product(self.left, self.right, v))
        total: Tensor | None = None
        for one in self._each_output():
            part = one._apply(v)
            total = part if total is None else total + part
        if total is None:
            raise ValueError("a kernel without outputs")
        return self._less_mean(total / self.num_outputs)

    def _product(self, left: BaseLinearOperator, right: BaseLinearOperator, v: Tensor) -> Tensor:
        u = right._transpose_nonbatch()._apply(v)
        return left._apply(u if self.middle is None else self.middle._apply(u))

    def _diagonal(self) -> Tensor:
        diagonal = self._raw_diagonal()
        if not self.centered:
            return diagonal
        # (H K H)_ii = K_ii - 2 (K 1)_i / N + 1.K 1 / N^2, for each output
        parts = []
        for one, own in zip(self._each_output(), self._by_output(diagonal), strict=True):
            ones = own.new_full((len(own), 1), 1 / len(own))
            row = one._with(centered=False)._apply(ones).squeeze(-1)
            parts.append(own - 2 * row + row.mean())
        if self.kind == "mean":
            return torch.stack(parts).mean(0)
        return torch.stack(parts, 1).flatten()

    def _dense(self) -> Tensor:
        kernel = self._tiles()
        if kernel is None:
            return super()._dense()
        kernel = self._less_mean(self._less_mean(kernel).mT).mT
        return (kernel + kernel.mT) / 2 if self._rounded else kernel

    def _getitem(self, row_index: Any, col_index: Any, *batch_indices: Any) -> Any:
        rows = self._examples(row_index, self.shape[0])
        cols = self._examples(col_index, self.shape[1])
        if rows is None or cols is None or self.centered:
            return super()._getitem(row_index, col_index, *batch_indices)
        return self._narrowed(rows, cols)

    # --- closed forms of what is small -----------------------------------------------------------

    @property
    def known_symmetric(self) -> bool:
        """Whether both sets of inputs are one."""
        return bool(self.symmetric)

    @property
    def iterates(self) -> bool:
        """Whether a solve is an iteration: yes, unless it is made dense for it."""
        return self._closed() is None

    def _closed(self) -> DenseLinearOperator | None:
        """The symmetric matrix itself, if it is made from forms and not too large."""
        if not (self.symmetric and self._factored and self.shape[0] <= SAMPLE_SPACE):
            return None
        return self._decomposed.get("dense", lambda: DenseLinearOperator(self._dense()))

    def _solve_columns(self, v: Tensor, krylov: Krylov) -> Tensor:
        if not self.symmetric:
            raise UnsupportedLayerError(
                "a kernel between two sets of inputs is not symmetric: solve with that of one set, "
                "or take ng.solve(K, b), the least-squares solution"
            )
        closed = self._closed()
        return (
            super()._solve_columns(v, krylov) if closed is None else closed._solve(v, krylov=krylov)
        )

    def _norm(self, ord: Any) -> Tensor:
        if ord == "fro" and self._factored:
            require_products(self, "norm('fro')")
            norm: Tensor = torch.linalg.matrix_norm(self._dense())
            return norm
        made: Tensor = _delegated("_norm")(self, ord)
        return made

    _damp, _logdet, _inverse = map(_delegated, ("_damp", "_logdet", "_inverse"))
    _power, _pinv, _draw = map(_delegated, ("_power", "_pinv", "_draw"))
    _eigensystem = _delegated("_eigensystem")

    def _kind(self) -> str:
        return f"kernel {self.shape[0]}x{self.shape[1]}"

    @property
    def _rounded(self) -> bool:
        """Whether what was done to the tiles of a symmetric kernel leaves it so to rounding."""
        return self.symmetric and (self.centered or self.middle is not None)

    # --- tiles -----------------------------------------------------------------------------------

    @property
    def _factored(self) -> bool:
        return isinstance(self.left, FactoredJacobianLinearOperator) and isinstance(
            self.right, FactoredJacobianLinearOperator
        )

    def _tiles(self) -> Tensor | None:
        """The matrix before it is centered, if rows are known."""
        left, right = self.left, self.right
        if isinstance(left, FactoredJacobianLinearOperator) and isinstance(
            right, FactoredJacobianLinearOperator
        ):
            return self._between(left, right)
        made = self.panels()
        if made is None:
            return None
        require_products(self, "the matrix")
        out = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        for _, tiles in made:
            for tile in tiles:
                tile.write(out)
        return out

    def panels(self, start: Place = START, keep: Keep | None = None) -> Panels | None:
        """The tiles of each panel of rows, before it is centered; None if only products are known.

        Args:
            start: where to begin.
            keep: what keeps rows that are made anew, so that they are made once.
        """
        left = rows_of(self.left)
        right = left if self.symmetric else rows_of(self.right)
        if left is None or right is None:
            return None
        if keep is not None:
            left, right = keep(left, 0), keep(right, 0 if self.symmetric else 1)
        directions = "same" if self.kind == "mean" else "all"
        columns = None if self.symmetric else right
        return panels(left, columns, self._between, directions, start)

    def _between(
        self, left: FactoredJacobianLinearOperator, right: FactoredJacobianLinearOperator
    ) -> Tensor:
        """The entries between the rows of some examples."""
        mean, c = self.kind == "mean", self.num_outputs
        if self.middle is None:
            made = inner_products(left, right, "same" if mean else "all", self.way)
            return made / c if mean else made
        parts = []
        for columns in right.columns():
            part = left._apply(self.middle._apply(columns))  # (N C, n C)
            if mean:
                part = torch.einsum("ncmc->nm", part.unflatten(1, (-1, c)).unflatten(0, (-1, c)))
            parts.append(part)
        made = torch.cat(parts, 1)
        return made / c if mean else made

    def _batches(self) -> Iterator[FactoredJacobianLinearOperator] | None:
        """The rows of one set of inputs, a batch at a time, if they are known."""
        if isinstance(self.left, FactoredJacobianLinearOperator):
            return iter([self.left])
        rows = rows_of(self.left)
        return None if rows is None else rows(0)

    def _raw_diagonal(self) -> Tensor:
        batches = self._batches() if self.symmetric else None
        if batches is None:
            plain = self._with(centered=False)
            diagonal: Tensor = LazyLinearOperator._diagonal(plain)
            return diagonal
        if self.middle is None:
            full = torch.cat([rows.row_squares() for rows in batches])
        else:
            each = (c for rows in batches for c in rows.columns())
            full = torch.cat([(c * self.middle._apply(c)).sum(0) for c in each])
        if self.kind == "full":
            return full
        mean: Tensor = full.unflatten(0, (-1, self.num_outputs)).mean(1)
        return mean

    def _example_blocks(self) -> Tensor:
        """The diagonal blocks (N, C, C)."""
        c, batches = self.num_outputs, None if self.centered else self._batches()
        if batches is not None and self.middle is None:
            return torch.cat([rows.row_products() for rows in batches])
        if batches is not None:
            each = (columns for rows in batches for columns in rows.columns())
            return torch.cat([_within(self.middle, columns, c) for columns in each])
        blocks = []
        for start in range(0, self.shape[0], c):
            unit = torch.zeros(self.shape[0], c, dtype=self.dtype, device=self.device)
            unit[start : start + c].fill_diagonal_(1)
            blocks.append(self._apply(unit)[start : start + c])
        return torch.stack(blocks)

    def _each_output(self) -> Iterator[KernelLinearOperator]:
        """The kernels of single outputs."""
        known = {**self._kwargs, "outputs": "full", "num_outputs": 1}
        more = () if self.middle is None else (self.middle,)
        for c in range(self.num_outputs):
            left = of_output(self.left, c, self.num_outputs)
            if not self.symmetric:
                right = of_output(self.right, c, self.num_outputs)
                yield KernelLinearOperator(left, right, *more, **known)
            else:
                yield KernelLinearOperator(left, *more, **known)

    def _by_output(self, diagonal: Tensor) -> Iterator[Tensor]:
        """The diagonal of each single output's kernel, before it is centered."""
        if self.kind == "full":
            yield from diagonal.unflatten(0, (-1, self.num_outputs)).unbind(1)
        else:
            for one in self._each_output():
                yield one._raw_diagonal()

    def _less_mean(self, v: Tensor) -> Tensor:
        """Rows (N C, k) or (N, k) less their mean over the examples, if that is subtracted."""
        if not self.centered:
            return v
        c = self.num_outputs if self.kind == "full" else 1
        by_example = v.unflatten(-2, (-1, c))
        centered: Tensor = (by_example - by_example.mean(-3, keepdim=True)).flatten(-3, -2)
        return centered

    def _examples(self, index: Any, n: int) -> tuple[int, int] | None:
        """The range of examples that a slice takes whole, of factored Jacobians."""
        if not isinstance(index, slice) or not self._factored:
            return None
        start, stop, step = index.indices(n)
        c = self.num_outputs if self.kind == "full" else 1
        if step != 1 or start % c or stop % c or stop <= start:
            return None
        return start // c, stop // c

    def _narrowed(self, rows: tuple[int, int], cols: tuple[int, int]) -> KernelLinearOperator:
        left: Any = self.left
        right: Any = self.right
        symmetric = self.symmetric and rows == cols
        operands = [left.examples(*rows)]
        operands += [] if symmetric else [right.examples(*cols)]
        operands += [] if self.middle is None else [self.middle]
        return KernelLinearOperator(*operands, **{**self._kwargs, "symmetric": symmetric})


def kernel_of(
    left: BaseLinearOperator,
    right: BaseLinearOperator,
    middle: BaseLinearOperator | None = None,
    *,
    outputs: str = "full",
    way: str = "auto",
) -> BaseLinearOperator:
    """J1 M J2^T.

    Raises:
        SpaceMismatchError: other parameters, or other numbers of outputs for an example.
    """
    if left.space != right.space:
        raise SpaceMismatchError("a kernel needs two Jacobians over the same parameters")
    counts = [rows_of_an_example(J) for J in (left, right)]
    if counts[0] != counts[1]:
        raise SpaceMismatchError(
            f"a kernel needs two Jacobians with as many rows for an example, got {counts[0]} and "
            f"{counts[1]}"
        )
    symmetric = left is right and (middle is None or middle.known_symmetric)
    operands = [left, *([] if symmetric else [right]), *([] if middle is None else [middle])]
    kernel = KernelLinearOperator(*operands, symmetric=symmetric, num_outputs=counts[0], way=way)
    return kernel.outputs(outputs)


def _product(A: BaseLinearOperator, B: BaseLinearOperator, info: Info) -> Any:
    """J1 M J2^T, however it is put in brackets."""
    factors = [*_factors(A), *_factors(B)]
    first, last = factors[0], factors[-1]
    if not (isinstance(last, TransposedLinearOperator) and len(factors) in (2, 3)):
        return NotImplemented
    if not (isinstance(first, _JACOBIANS) and isinstance(last.base, _JACOBIANS)):
        return NotImplemented
    if rows_of_an_example(first) != rows_of_an_example(last.base):
        return NotImplemented  # such as gradients of outputs with those of losses
    return kernel_of(first, last.base, *factors[1:-1])


def _factors(A: BaseLinearOperator) -> tuple[BaseLinearOperator, ...]:
    if isinstance(A, ProductLinearOperator):
        return (*_factors(A.left), *_factors(A.right))
    return (A,)


for _first in (*_JACOBIANS, ProductLinearOperator):
    for _last in (TransposedLinearOperator, ProductLinearOperator):
        rules.products.register(_first, _last)(_product)


def _within(middle: BaseLinearOperator | None, rows: Tensor, c: int) -> Tensor:
    """J_n M J_n^T of each example (N, C, C), with J^T given (P, N C)."""
    products = rows if middle is None else middle._apply(rows)
    by_example = [each.unflatten(1, (-1, c)) for each in (rows, products)]
    return torch.einsum("pnc,pnd->ncd", *by_example)
