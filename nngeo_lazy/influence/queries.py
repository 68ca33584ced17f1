"""Queries: preconditioned gradients of what is asked about, kept while training data pass by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import PositiveInt, checked, require_takes
from ..collectives import digest
from ..data import Batches, outputs_of
from ..errors import DataError, SpaceMismatchError, UnsupportedLayerError
from ..jacobian.forms import Form, Outer
from ..jacobian.parts import Part
from ..layout import Layout, assemble
from ..likelihoods import described
from ..operators import BaseLinearOperator
from ..operators.damping import DampingLike
from ..quantities import LossGradients, LossLike, Outputs, Quantity
from ..representations.form_stack import joined, stored
from ..rowwise import low_rank_products, position_products, products
from ..selectors import space_of
from ..sweep import make_sweep
from ..switches import outside_inference
from ..table import Table

__all__ = ["Measure", "Queries", "fitting", "loss_of"]

Measure = Callable[[Tensor, Any], Tensor]


@dataclass(frozen=True)
class Row:
    """How the queries' gradients of one layer are kept.

    Attributes:
        layer: its name.
        parameters: how many.
        kept: numbers for each query.
        rank: of each query's matrix; None if it is whole.
        error: what the rank leaves out, relative to the norm of all queries.
    """

    layer: str
    parameters: int
    kept: int
    rank: int | None
    error: float


@dataclass(frozen=True)
class LowRank:
    """Matrices left_q right_q in the grid of a part."""

    left: Tensor  # (Q,G,o,r)
    right: Tensor  # (Q,G,r,w)

    def dense(self) -> Tensor:
        """(p, Q)."""
        return (self.left @ self.right).flatten(1).mT


Kept = Tensor | LowRank


class Queries:
    r"""What is asked about: (F + d)^-1 g of each test example, which is computed once.

    They take the place of the test data in `influences`, as often as wanted. Memory: queries times
    parameters; with a rank, queries times rank times (inputs + outputs) of every layer. It prints
    as a table, with what the rank leaves out.

    Args:
        model: the network.
        F: its Fisher, Gauss-Newton matrix or Hessian.
        test: the test examples.
        loss: as in `influences`.
        measure: `(outputs, batch) -> (N,)`, what is asked about in place of the losses: a
            differentiable number for each example (or several: (N, K) are K queries each).
        damping: d.
        rank: of each query's matrix of a layer (inputs x outputs); all by default.
        forward: `(model, batch) -> outputs` in place of the default call.
        target: `batch -> target` in place of the default.

    Raises:
        DataError: no targets, a measure of another shape, F is no mean over examples.
        SpaceMismatchError: F is not over parameters of the model.
        NotPositiveDefiniteError: F is singular and not damped.

    Example:
        >>> import nngeo_lazy as ng
        >>> model, x, y = nn.Linear(3, 2), torch.randn(20, 3), torch.randint(2, (20,))
        >>> F = ng.FIM(model, (x, y), "ekfac")
        >>> largest = Queries(model, F, x[:4], measure=lambda f, batch: f.amax(1), damping=1e-2)
        >>> ng.influences(model, F, (x, y), largest).shape
        torch.Size([4, 20])

    Source: Grosse et al. (2023), Studying large language model generalization with influence
        functions, section 3.2.2, on query gradients of low rank.
    """

    @checked
    def __init__(
        self,
        model: nn.Module,
        F: BaseLinearOperator,
        test: Any,
        *,
        loss: LossLike | None = None,
        measure: Measure | None = None,
        damping: DampingLike = 0.0,
        rank: PositiveInt | None = None,
        forward: Callable[[nn.Module, Any], Tensor] | None = None,
        target: Callable[[Any], Tensor] | None = None,
    ) -> None:
        self.num_examples, names = fitting(model, F)
        self.space = F.space
        quantity: Quantity
        if measure is None:
            quantity = LossGradients(loss_of(F, loss))
        else:
            quantity, forward = Outputs(), _measured(model, test, measure, forward)
        sweep = make_sweep(quantity, model, test, params=names, forward=forward, target=target)
        inverse = F.inverse(damping=damping)
        kept: dict[Layout, list[Kept]] = {}
        owners: dict[Layout, str] = {}
        dropped: dict[Layout, float] = {}
        total = 0.0
        self.num_queries = 0
        with outside_inference(), closing(sweep.pieces()) as pieces:
            for piece in pieces:
                parts = piece.parts
                for layout, part in ((part.layout, part) for part in parts):
                    owners.setdefault(layout, F.space.owner(part.names[0]))  # type: ignore[union-attr]
                chunks = list(piece.forms()) if piece.count < 2 else _alone(piece.forms())
                for forms in chunks:
                    with torch.no_grad():
                        layouts = list(kept or owners)
                        for layout, solved in products(forms, parts, inverse, layouts):
                            total += float(torch.linalg.vector_norm(solved)) ** 2
                            part_of, lost = _kept(layout, solved, rank)
                            kept.setdefault(layout, []).append(part_of)
                            dropped[layout] = dropped.get(layout, 0.0) + lost
                            if layout == layouts[0]:
                                self.num_queries += solved.shape[1]
        self._blocks = {layout: _joined(each) for layout, each in kept.items()}
        self.dtype = inverse.dtype
        self._owners = {layout: owners[layout] for layout in kept}
        rows = [self._row(layout, owners[layout], dropped[layout], total) for layout in kept]
        error = (sum(dropped.values()) / max(total, 1e-300)) ** 0.5
        numbers = sum(row.kept for row in rows)
        summary = f"{self.num_queries} queries of {numbers:,} numbers, relative error {error:.2g}"
        self.error = error
        self._report = Table(rows, [summary])

    def __repr__(self) -> str:
        return repr(self._report)

    def report(self) -> Table[Row]:
        """Each layer's parameters, the numbers that are kept for a query, and what a rank lost."""
        return self._report

    def _row(self, layout: Layout, layer: str, lost: float, total: float) -> Row:
        block = self._blocks[layout]
        rank = block.left.shape[-1] if isinstance(block, LowRank) else None
        tensors = [block] if isinstance(block, Tensor) else [block.left, block.right]
        numbers = sum(t.numel() for t in tensors) // max(1, self.num_queries)
        return Row(layer, layout.size, numbers, rank, (lost / max(total, 1e-300)) ** 0.5)

    @property
    def layers(self) -> list[str]:
        """The layers, in parameter order."""
        return list(dict.fromkeys(self._owners.values()))

    def layer_of(self, part: Part) -> str:
        """The layer of a part of the training data's."""
        owner: str = self.space.owner(part.names[0])  # type: ignore[union-attr]
        return owner

    def checksum(self) -> list[int]:
        """Of all numbers, block by block."""
        blocks = self._blocks.values()
        held = [[b] if isinstance(b, Tensor) else [b.left, b.right] for b in blocks]
        return [digest(tensor) for tensors in held for tensor in tensors]

    def scores(self, form: Form, part: Part) -> Tensor:
        """The products of a part's rows with all queries, (N, Q)."""
        block = self._block(part.layout)
        if isinstance(block, LowRank):
            if isinstance(form, Outer):
                return low_rank_products(form, block.left, block.right).sum(1)
            block = block.dense()
        return form.jvp(block.to(form.dtype)).squeeze(0)

    def position_scores(self, form: Form, part: Part) -> Tensor:
        """The same of each position, (N, T, Q).

        Raises:
            UnsupportedLayerError: rows that do not say what a position adds.
        """
        if not isinstance(form, Outer):
            raise UnsupportedLayerError(
                f"scores per token need layers that multiply each position by a weight, but "
                f"{', '.join(part.names)} ({part.form_name}) is another one: build F over the "
                "others with params=, as in params=torch.nn.Linear"
            )
        block = self._block(part.layout)
        if isinstance(block, LowRank):
            return low_rank_products(form, block.left, block.right)
        return position_products(form, block)

    def _block(self, layout: Layout) -> Kept:
        """The queries' block; of parts that the test data do not have, from those that they do."""
        if layout not in self._blocks:
            placed: list[tuple[int, Tensor]] = []
            for known, block in self._blocks.items():
                placed += known.scatter(block if isinstance(block, Tensor) else block.dense())
            return layout.gather(assemble(placed))
        return self._blocks[layout]


def fitting(model: nn.Module, F: Any) -> tuple[int, list[str]]:
    """How many examples F is a mean over, and the names of its parameters."""
    if not isinstance(F, BaseLinearOperator) or F.space is None or F.num_examples is None:
        raise DataError(
            "expected a Fisher, Gauss-Newton matrix or Hessian that knows its parameters and how "
            f"many examples it is a mean over, as FIM returns it, got {type(F).__name__}"
        )
    if space_of(model, list(F.space.names)) != F.space:
        raise SpaceMismatchError(f"expected F over parameters of the model, got one over {F.space}")
    return F.num_examples, list(F.space.names)


def loss_of(F: BaseLinearOperator, given: LossLike | None) -> LossLike:
    """The given loss, or that of F's likelihood."""
    if given is not None:
        return given
    own = described(str(F.info.quantity.get("loss")))
    if own is None:
        raise DataError(
            "expected loss=, since F does not say of which likelihood it is: pass the training "
            "loss, such as loss='categorical'"
        )
    return own


def _measured(
    model: nn.Module,
    test: Any,
    measure: Measure,
    forward: Callable[[nn.Module, Any], Tensor] | None,
) -> Callable[[nn.Module, Any], Tensor]:
    """The measure as a network's outputs."""
    require_takes("measure", measure, "outputs", "batch")
    batches = Batches(test, device=next(model.parameters()).device, forward=forward)

    def outputs(model: nn.Module, raw: Any) -> Tensor:
        given = batches.forward(model, raw)
        found = measure(given, raw)
        if not isinstance(found, Tensor) or found.dim() < 1 or len(found) != len(given):
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise DataError(
                f"expected measure to return a number for each of {len(given)} examples, got {got}"
            )
        return outputs_of(found, "return a tensor (N,) from measure")

    return outputs


def _alone(chunks: Any) -> list[list[Form | None]]:
    """All directions of a piece as one chunk, so that queries of an example lie side by side."""
    held = [[stored(form) for form in forms] for forms in chunks]
    return [[joined(each) for each in zip(*held, strict=True)]]


def _kept(layout: Layout, block: Tensor, rank: int | None) -> tuple[Kept, float]:
    """A block of queries (p, Q) at a rank, and the square of what that leaves out.

    A whole one is laid out query by query: products with rows are twice as fast.
    """
    if rank is None or min(layout.rows, layout.width) <= rank:
        return block.mT.contiguous().mT, 0.0
    grids = block.mT.reshape(-1, layout.groups, layout.rows, layout.width)
    U, S, Vh = torch.linalg.svd(grids, full_matrices=False)
    kept = LowRank(U[..., :rank] * S[..., None, :rank], Vh[..., :rank, :])
    return kept, float(S[..., rank:].square().sum())


def _joined(blocks: Sequence[Kept]) -> Kept:
    whole = [block for block in blocks if isinstance(block, Tensor)]
    if whole:
        return whole[0] if len(whole) == 1 else torch.cat([block.mT for block in whole]).mT
    low = [block for block in blocks if isinstance(block, LowRank)]
    return LowRank(torch.cat([b.left for b in low]), torch.cat([b.right for b in low]))
