"""Matrix-free representations: nothing is stored but the parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..arguments import check_fields
from ..data import Batch
from ..derivatives.engines import MODES
from ..errors import DataError, StochasticModelError, UnsupportedLayerError
from ..facts import Cost, Facts, Sample
from ..fingerprints import refuse_shuffling
from ..jacobian.alone import DOUBTFUL, REPEATED, draws, drew, in_groups, mixed
from ..jacobian.proof import agree
from ..jacobian.scopes import FixedWeights
from ..jacobian.signature import signature_of
from ..network import Network
from ..operators import BaseLinearOperator, Info
from ..operators.matrix_free import (
    GaussNewtonLinearOperator,
    HessianLinearOperator,
    ImplicitLinearOperator,
    JacobianLinearOperator,
)
from ..quantities import MatrixKind
from ..sweep import Sweep
from ..switches import outside_inference
from ..totals import Totals
from .network_source import NetworkSource
from .representation import Representation

__all__ = ["Implicit"]

OPERATORS: dict[MatrixKind, type[ImplicitLinearOperator]] = {
    MatrixKind.GAUSS_NEWTON: GaussNewtonLinearOperator,
    MatrixKind.HESSIAN: HessianLinearOperator,
    MatrixKind.JACOBIAN: JacobianLinearOperator,
}


@dataclass(frozen=True)
class Implicit(Representation):
    """The exact matrix as products: each passes over the data and differentiates the network.

    The operator holds the loader, a copy of the selected parameters and of all buffers. Memory P,
    and the graph of one batch. With a cache it holds the graphs of all, so that a product costs a
    forward- mode and a reverse-mode pass, without a forward pass.

    Args:
        mode: "double_vjp" (reverse mode alone, which every architecture has),
            "forward_over_reverse", or "auto": double_vjp if graphs are kept and for Hessians,
            forward_over_reverse otherwise; and the other one if a function of the model lacks a
            derivative.
        cache: True keeps the graphs of all batches, False none, "auto" keeps them up to 2 GiB: all
            or none, unless the batches are held in a list.
        chunk_size: so many columns go at once, by vmap; by default as many as pay off, and one
            after the other if they are large.
        check: whether to refuse a random model, and one that mixes the examples of a batch: the
            halves of each batch that does something new are evaluated on their own.

    Raises:
        DataError: an unknown mode or cache, a chunk_size below one.

    Example:
        >>> import torch, nngeo_lazy as ng
        >>> model, x = torch.nn.Linear(3, 2), torch.randn(8, 3)
        >>> F = ng.FIM(model, x, Implicit(cache=False), likelihood="gaussian")
        >>> (F @ F.space.randn()).shape
        torch.Size([8])

    Source:
        Pearlmutter (1994), Fast exact multiplication by the Hessian; Schraudolph (2002), Fast
        curvature matrix-vector products for second-order gradient descent.
    """

    matrices: ClassVar[frozenset[MatrixKind]] = frozenset(MatrixKind)

    mode: str = "auto"
    cache: str | bool = "auto"
    chunk_size: int | None = None
    check: bool = True

    def __post_init__(self) -> None:
        check_fields(self)
        if self.mode not in ("auto", *MODES):
            raise DataError(
                f"expected mode 'auto' or one of {list(MODES)}, got {self.mode!r}; "
                "docs/matrix_free.md explains them"
            )
        if self.cache not in ("auto", True, False):
            raise DataError(
                f"expected cache 'auto', True or False, got {self.cache!r}; "
                "docs/matrix_free.md explains them"
            )
        size = self.chunk_size
        if size is not None and (not isinstance(size, int) or size < 1):
            raise DataError(f"expected chunk_size to be a positive integer or None, got {size!r}")

    def build(self, sweep: Sweep) -> BaseLinearOperator:
        """The operator of the sweep's quantity, from one forward pass over the data."""
        problem = sweep.problem
        if problem.quantity.kind is MatrixKind.GAUSS_NEWTON and problem.quantity.estimator == "mc":
            refuse_shuffling(
                problem.batches.loader, "a matrix-free 'mc' matrix, whose draws are redone,"
            )
        point = problem.space.values(problem.model).detach().clone()
        return OPERATORS[problem.quantity.kind](point, **_fields(sweep, self))

    def costs(self, facts: Facts, sample: Sample) -> list[list[Cost]]:
        """One product: J v and J^T u, each two products with the weight or its size."""
        sizes = [part.layout.size for part in facts.parts]
        return [
            [
                Cost(k, "matrix-free", size, 8 * sample.positions(k) * size)
                for k, size in enumerate(sizes)
            ]
        ]


def _fields(sweep: Sweep, options: Implicit) -> dict[str, Any]:
    """Everything but the point, from one forward pass over the data."""
    problem = sweep.problem
    space, quantity = problem.space, problem.quantity
    if problem.center and problem.group.size > 1:
        raise DataError(
            "center=True couples the examples of all processes in every product, which 'implicit' "
            "does not do: take 'ekfac', 'diagonal', 'block_diagonal', 'dense' or 'low_rank'"
        )
    network = Network(problem.model, space, problem.batches.forward)
    leaves = [p.detach().requires_grad_() for p in space.parameters(problem.model).values()]
    named = dict(zip(space.names, leaves, strict=True))
    seen: set[tuple[str | int, ...]] = set()  # what the batches did so far
    totals, num_rows, num_batches = Totals(quantity, space.device), 0, 0
    with (
        problem.group.together("a pass over the data"),
        outside_inference(),
        network.scope(),
        torch.no_grad(),
    ):
        for batch in problem.batches:
            # a forward pass may call autograd itself
            with torch.enable_grad(), FixedWeights():
                graph = network(leaves, batch.raw)
            outputs = graph.detach()
            quantity.fit(outputs, batch.target)
            totals.add(outputs, batch.target)
            if num_batches == 0:
                network.refuse_strays(graph)
                _require_differentiable(graph)
                quantity.values(outputs, batch.target)  # whether it has the labels that it needs
            if options.check and bool((outputs < math.inf).all()):
                with torch.enable_grad():
                    did = signature_of(graph, named)
                    if did.nodes not in seen or not did.alike:
                        run, first = partial(network, leaves), num_batches == 0
                        _require_function(sweep, batch, outputs, run, first)
                    seen.add(did.nodes)
            del graph
            one_each = quantity.estimator == "empirical"
            num_rows += outputs.shape[0] if one_each else outputs.numel()
            num_batches += 1
        totals.require_sound()
    facts = sweep.finish(totals)
    if problem.center and num_rows % facts.num_examples:
        raise DataError("center=True expects every batch to have outputs of one shape")
    random = quantity.estimator == "mc"
    held_fixed = quantity.estimator == "empirical_positions"  # scores without a graph
    source = NetworkSource(
        space=space,
        network=network,
        sweep=sweep,
        total=facts.denominator,
        num_rows=num_rows,
        num_examples=facts.num_examples,
        num_batches=num_batches,
        held=problem.batches.held and not random,
        center=problem.center,
        random=random or held_fixed,
        mode=options.mode,
        cache=options.cache,
        chunk_size=options.chunk_size,
    )
    counts = facts.num_examples, facts.num_terms
    info = Info(space, *counts, quantity=facts.described, log_likelihood=facts.log_likelihood)
    return {"source": source, "info": options.sign(info)}


def _require_differentiable(outputs: Tensor) -> None:
    if not outputs.requires_grad:
        raise DataError(
            "the outputs do not depend on any selected parameter: select others with params=, "
            "and check that the forward pass does not run under no_grad or detach"
        )


def _require_function(
    sweep: Sweep, batch: Batch, outputs: Tensor, run: Callable[[Any], Tensor], first: bool
) -> None:
    """Raise unless a batch has the outputs that its examples have in groups."""
    n = len(outputs)
    half = torch.randperm(n, generator=torch.Generator().manual_seed(1), device="cpu")[: -(-n // 2)]
    before = draws(outputs.device)
    mine = in_groups(batch.raw, outputs, run, half) if n > 1 else None
    same = mine is not None and agree(mine, outputs)
    if not same and (first or mine is not None):
        _require_fixed(outputs, run(batch.raw))
    if drew(before, outputs.device):
        for _ in range(REPEATED):
            _require_fixed(outputs, run(batch.raw))
    if same or mine is None:
        return
    if not agree(mine, outputs, DOUBTFUL):
        raise mixed(len(half), n, "; Implicit(check=False) takes each batch as it is")
    with suppress(UnsupportedLayerError):  # the gradients of layers tell rounding from mixing
        sweep.prove(batch)


def _require_fixed(first: Tensor, second: Tensor) -> None:
    if not agree(second, first):
        raise StochasticModelError(
            "expected one fixed function, but two forward passes of the same batch differ: call "
            "model.eval(), and remove sampling from the forward pass (Implicit(check=False) skips "
            "this check)"
        )
