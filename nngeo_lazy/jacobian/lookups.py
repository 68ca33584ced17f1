"""Rows of a weight that are chosen by the data: tables of vectors, and the weights of experts.

A weight that is read at indices of the data, `weight[ids]`, is an embedding if it is a table of
vectors. If it is a table of matrices, of which each token takes one, nothing is said of it before
the product that it enters. That is a product for each matrix, of the tokens that chose it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .contractions import CONTRACTIONS, contraction, equation_of
from .layers import embedding
from .uses import Use

__all__ = ["Lookup", "by_number", "chosen", "grouped", "lookup_of", "table"]


@dataclass
class Lookup:
    """Matrices (tokens, o, i) of a weight (E, o, i), one for each token.

    Attributes:
        weight: what they are read of.
        ids: which matrix (tokens,) each token takes.
        output: the matrices.
        names: the parameters that the weight is made of.
        itself: records the reading as a use of its own.
        used: whether it entered a product.
    """

    weight: Tensor
    ids: Tensor
    output: Tensor
    names: set[str]
    itself: Callable[[], None]
    used: bool = False


def by_number(index: Any) -> bool:
    """Whether an index holds numbers and slices alone; a number may be a 0-d tensor."""
    entries = index if isinstance(index, tuple) else (index,)
    return all(
        entry is None
        or entry is ...
        or isinstance(entry, (int, slice))
        or (isinstance(entry, Tensor) and not entry.dim() and entry.dtype == torch.int64)
        for entry in entries
    )


def lookup_of(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Tensor, Tensor] | None:
    """A weight and the indices (...) of its rows that a function reads, or None."""
    if kwargs or not args or not isinstance(args[0], Tensor):
        return None
    ids = None
    if function is torch.Tensor.__getitem__:
        ids = args[1][0] if isinstance(args[1], tuple) and len(args[1]) == 1 else args[1]
    elif function in (torch.index_select, torch.Tensor.index_select) and args[1] == 0:
        ids = args[2]
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
        return None
    return args[0], ids % max(1, args[0].shape[0])


def table(weight: Tensor, ids: Tensor, output: Tensor) -> Use:
    """The use of a table (E, i) of vectors that is read at some indices."""
    use = embedding({"input": ids, "weight": weight}, output)
    if isinstance(use, str):
        raise TypeError(use)
    return use


def chosen(
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    output: Any,
    lookup: Lookup,
    pick: Callable[[Tensor, int], Tensor],
) -> list[Use]:
    """The uses of looked up matrices in a product, one for each matrix; none if it has no form.

    Args:
        function: what was called.
        args: of the call.
        kwargs: of the call.
        output: what it returned.
        lookup: one of its arguments.
        pick: one matrix of a weight.
    """
    made = equation_of(function, args, kwargs) if function in CONTRACTIONS else None
    if made is None or not isinstance(output, Tensor):
        return []
    equation, operands, _ = made
    slots = [k for k, t in enumerate(operands) if t is lookup.output]
    if len(slots) != 1:
        return []
    return list(_apart(equation, operands, slots[0], lookup.weight, lookup.ids, output, pick))


def grouped(
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    output: Any,
    pick: Callable[[Tensor, int], Tensor],
) -> list[Use]:
    """The uses of a weight (E, i, o) in a grouped product: tokens that are sorted by matrix."""
    if function not in GROUPED or not isinstance(output, Tensor) or len(args) < 2:
        return []
    (x, weight), ends = args[:2], kwargs.get("offs", args[2] if len(args) > 2 else None)
    if x.dim() != 2 or weight.dim() != 3 or ends is None or kwargs.get("bias") is not None:
        return []
    ids = torch.bucketize(torch.arange(len(x), device=x.device), ends.long(), right=True)
    return list(_apart("ti,tio->to", [x, weight], 1, weight, ids, output, pick))


def _apart(
    equation: str,
    operands: Sequence[Tensor],
    slot: int,
    weight: Tensor,
    ids: Tensor,
    output: Tensor,
    pick: Callable[[Tensor, int], Tensor],
) -> Iterator[Use]:
    """A product for each matrix, of the tokens that chose it."""
    inputs, result = equation.split("->")
    words = inputs.split(",")
    token, words[slot] = words[slot][0], words[slot][1:]
    other = words[1 - slot]
    if token not in result or token not in other or token in words[slot]:
        return
    at, behind = other.index(token), result.index(token) + 1
    for k in ids.unique().tolist():
        if not 0 <= k < len(weight):
            continue
        mine, rows = pick(weight, k), (ids == k).nonzero().squeeze(1)
        given = [mine, mine]
        given[1 - slot] = operands[1 - slot].detach().index_select(at, rows)
        part = output.detach().index_select(behind - 1, rows)
        use = contraction(f"{','.join(words)}->{result}", given, slot, mine, part)
        if isinstance(use, Use):
            yield replace(use, view=_rows_then(use, behind, rows))


def _rows_then(use: Use, dim: int, rows: Tensor) -> Callable[[Tensor], Tensor]:
    """Gradients (R, *output) of some rows, in the order of a form."""

    def view(g: Tensor) -> Tensor:
        taken = g.index_select(dim, rows.to(g.device))
        return taken if use.view is None else use.view(taken)

    return view


GROUPED = {
    function
    for holder, name in ((F, "grouped_mm"), (torch, "_grouped_mm"))
    if (function := getattr(holder, name, None)) is not None
}
