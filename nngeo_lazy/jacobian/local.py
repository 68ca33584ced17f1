"""Rows of a function's weights from that function alone.

A function that meets data with weights, and of which nothing else is known, is run again by itself.
Its vjp is taken for each example, under `vmap`, or in a loop if `vmap` cannot follow. Nothing else
of the model is run.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..switches import unfused_attention
from .folds import Axis, Fold, Ragged
from .uses import Use

__all__ = ["local", "results_apart"]


def local(
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    slots: Mapping[int, Tensor],
    result: int | None,
    output: Tensor,
    is_constant: Callable[[Any], bool],
) -> Use:
    """The use of all weights of a function.

    Args:
        function: what was called; it must change nothing in place.
        args: of the call.
        kwargs: of the call.
        slots: which leaves of the arguments are weights.
        result: which of the tensors that it returns is meant, None if it returns one.
        output: that tensor.
        is_constant: tells what a model holds from data, which may happen to be as long.
    """
    leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
    held = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    fixed = {k for k, leaf in enumerate(leaves) if is_constant(leaf)}
    call = _Call(function, held, spec, tuple(slots), result, fixed)
    return Use(
        None,
        None,
        leading=output.dim(),
        x=torch.zeros((), dtype=output.dtype, device=output.device),
        local=call.rows,
        slots={str(k): weight for k, weight in slots.items()},
    )


def results_apart(output: Any) -> Any:
    """Several results, of which one may be made of another, each with a gradient of its own."""
    if type(output) in (tuple, list) and all(isinstance(t, Tensor) for t in output):
        return type(output)(t.clone() if t.grad_fn is not None else t for t in output)
    return output


class _Call:
    def __init__(
        self,
        function: Callable[..., Any],
        leaves: Sequence[Any],
        spec: Any,
        slots: Sequence[int],
        result: int | None,
        fixed: set[int],
    ) -> None:
        self._function, self._leaves, self._spec = function, leaves, spec
        self._slots, self._result, self._fixed = slots, result, fixed | set(slots)
        self._vmap = True
        self._latest: tuple[Tensor, Any, Mapping[str, Tensor]] | None = None

    def rows(self, fold: Fold, n: int, g: Tensor, start: int, stop: int) -> Mapping[str, Tensor]:
        """(R, n, *shape) of each slot, from gradients (R, *output); they are kept for the next."""
        asked, held = (fold, n, start, stop), self._latest
        if held is None or held[0] is not g or held[1] != asked:
            self._latest = None
            held = self._latest = g, asked, self._rows(fold, n, g, start, stop)
        return held[2]

    def _rows(self, fold: Fold, n: int, g: Tensor, start: int, stop: int) -> Mapping[str, Tensor]:
        if isinstance(fold, Ragged):
            return self._owned(fold, g, start, stop)
        found = {k: self._axis(k, fold, n) for k in range(len(self._leaves))}
        data = {k: axis for k, axis in found.items() if axis is not None}
        xs: list[Tensor] = [axis.front(self._leaves[k], n)[start:stop] for k, axis in data.items()]
        g = fold.front(g, n, 1)[:, start:stop]
        if self._vmap:
            try:
                with warnings.catch_warnings(), unfused_attention.used():
                    warnings.filterwarnings("error", message=".*performance drop.*")
                    many = [self._batched(fold, data, each, xs) for each in g]
                return self._by_slot([torch.stack(parts) for parts in zip(*many, strict=True)])
            except (RuntimeError, NotImplementedError, UserWarning):
                self._vmap = False  # no batching rule, or a branch on the data
        single = [
            [self._pulled(fold, data, each, [x[n] for x in xs]) for n, each in enumerate(gr)]
            for gr in g
        ]
        stacked = [
            torch.stack([torch.stack([one[j] for one in many]) for many in single])
            for j in range(len(self._slots))
        ]
        return self._by_slot(stacked)

    def _owned(self, fold: Ragged, g: Tensor, start: int, stop: int) -> Mapping[str, Tensor]:
        """The same of examples that own different numbers of rows, one after the other."""
        (size,), rows_alone = fold.sizes, Fold(0, Axis.OUTER)
        data = {
            k: rows_alone
            for k, leaf in enumerate(self._leaves)
            if k not in self._fixed and isinstance(leaf, Tensor) and leaf.shape[:1] == (size,)
        }
        many = []
        for n in range(start, stop):
            rows = fold.owned(n)
            parts = [self._leaves[k][rows] for k in data]
            pulled = [self._pulled(rows_alone, data, each[rows], parts) for each in g]
            many.append([torch.stack(slot) for slot in zip(*pulled, strict=True)])
        return self._by_slot([torch.stack(parts, 1) for parts in zip(*many, strict=True)])

    def _by_slot(self, found: Sequence[Tensor]) -> dict[str, Tensor]:
        return {str(k): rows for k, rows in zip(self._slots, found, strict=True)}

    def _axis(self, k: int, fold: Fold, n: int) -> Fold | None:
        """Where an argument has the examples: as the output, or the first axis of their size."""
        leaf = self._leaves[k]
        if k in self._fixed or not isinstance(leaf, Tensor) or not leaf.dim():
            return None
        if fold.fits(leaf.shape, n):
            return fold
        return next((Fold(axis) for axis, size in enumerate(leaf.shape) if size == n), None)

    def _batched(
        self, fold: Fold, data: Mapping[int, Fold], g: Tensor, xs: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        def one(g: Tensor, *parts: Tensor) -> Any:
            def run(*weights: Tensor) -> Tensor:
                return self._run(data, parts, weights)

            made = torch.func.vjp(run, *(self._leaves[k] for k in self._slots))
            return made[1](fold.back(g))

        found: Sequence[Tensor] = torch.func.vmap(one)(g, *xs)
        return found

    def _pulled(
        self, fold: Fold, data: Mapping[int, Fold], g: Tensor, parts: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        weights = [self._leaves[k].detach().requires_grad_() for k in self._slots]
        with torch.enable_grad():
            out = self._run(data, parts, weights)
        found = torch.autograd.grad(out, weights, fold.back(g).to(out.dtype), allow_unused=True)
        return [
            torch.zeros_like(w) if each is None else each
            for w, each in zip(weights, found, strict=True)
        ]

    def _run(
        self, data: Mapping[int, Fold], parts: Sequence[Tensor], weights: Sequence[Tensor]
    ) -> Tensor:
        leaves = list(self._leaves)
        for (k, axis), part in zip(data.items(), parts, strict=True):
            leaves[k] = axis.back(part)
        for k, weight in zip(self._slots, weights, strict=True):
            leaves[k] = weight
        args, kwargs = pytree.tree_unflatten(leaves, self._spec)
        out = self._function(*args, **kwargs)
        if self._result is None:
            made: Tensor = out
        else:
            made = [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor)][self._result]
        return made
