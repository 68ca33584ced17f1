"""Weights that are repeated for each example, and weights that are written into the data.

A learnt state, query or token does not always enter a function as it is. It is often expanded to
the batch first, or assigned to some places of the data. There the weight meets the data: what comes
of it is data. The rows are the output gradients at the copies. Copies that share memory stay a
weight for as long as they enter functions that know the weight in them, such as a batched product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["VIEWS", "Repeat", "repeats_of", "same", "written"]

View = Callable[[Tensor], Tensor]

# What looks at a weight in another way only, or reads its shape, by name.
VIEWS = frozenset(
    {
        *("__get__", "size", "dim", "ndimension", "stride", "numel", "is_contiguous", "__len__"),
        *("transpose", "permute", "movedim", "moveaxis", "swapaxes", "swapdims", "t", "detach"),
        *("unsqueeze", "squeeze", "view", "unflatten", "expand", "expand_as", "narrow"),
    }
)
EXPAND = {
    *(torch.Tensor.expand, torch.Tensor.expand_as, torch.Tensor.broadcast_to),
    torch.broadcast_to,
}
TILE = {torch.Tensor.repeat, torch.Tensor.tile, torch.tile}
INTERLEAVE = {torch.Tensor.repeat_interleave, torch.repeat_interleave}
STACK = {torch.stack}
CAT = {torch.cat, torch.concat, torch.concatenate}


class Repeat(NamedTuple):
    """A dimension along which a function repeats its weight.

    Attributes:
        times: how often.
        shares: whether the copies share memory, so that products may still know the weight.
        once: makes the weight as it is once, with size 1 in that dimension of `view`.
        view: of the function's output, or its gradients; the copies have a dimension of their own.
    """

    times: int
    shares: bool
    once: Callable[[], Tensor]
    view: View


def repeats_of(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], output: Any
) -> Iterator[Repeat]:
    """The dimensions along which a function of one weight repeats it."""
    if not isinstance(output, Tensor) or not args:
        return
    first = args[0]
    if function in EXPAND:
        added = output.dim() - first.dim()
        for d in range(output.dim()):
            if d < added or first.shape[d - added] == 1:
                yield Repeat(output.shape[d], True, partial(output.narrow, d, 0, 1), same)
    elif function in TILE:
        given = args[1:] or next(iter(kwargs.values()), ())
        times = given[0] if len(given) == 1 and isinstance(given[0], Sequence) else given
        times = (1,) * (output.dim() - len(times)) + tuple(times)
        shape = (1,) * (output.dim() - first.dim()) + tuple(first.shape)
        for d, (count, size) in enumerate(zip(times, shape, strict=True)):
            once = partial(_tiled, first, (*times[:d], 1, *times[d + 1 :]), d)
            yield Repeat(count, False, once, _splitting(d, (count, size)))
    elif function in INTERLEAVE:
        count = kwargs.get("repeats", args[1] if len(args) > 1 else None)
        d = kwargs.get("dim", args[2] if len(args) > 2 else None)
        if isinstance(count, int) and isinstance(d, int):
            d %= output.dim()
            sizes = (first.shape[d], count)
            yield Repeat(count, False, partial(first.unsqueeze, d + 1), _splitting(d, sizes))
    elif function in STACK or function in CAT:
        d = kwargs.get("dim", args[1] if len(args) > 1 else 0)
        if isinstance(d, int) and len(first) and all(t is first[0] for t in first):
            d %= output.dim()
            sizes = (len(first), 1 if function in STACK else first[0].shape[d])
            view = same if function in STACK else _splitting(d, sizes)
            yield Repeat(len(first), False, partial(first[0].unsqueeze, d), view)


def written(function: Callable[..., Any], args: Sequence[Any]) -> tuple[Tensor, View] | None:
    """What a function writes into its first argument, and where; None if it does something else.

    The view selects the places of what is written, from the output or its gradients.
    """
    index: Any = None
    if function is torch.Tensor.__setitem__ and len(args) == 3:
        index, value = args[1], args[2]
    elif function is torch.Tensor.copy_ and len(args) >= 2:
        index, value = ..., args[1]
    elif function is torch.Tensor.index_put_ and len(args) == 3:
        index, value = tuple(args[1]), args[2]
    elif function is torch.Tensor.index_copy_ and len(args) == 4:
        index, value = (*(slice(None),) * (args[1] % args[0].dim()), args[2]), args[3]
    elif function is torch.Tensor.masked_fill_ and len(args) == 3:
        index, value = args[1].expand(args[0].shape), args[2]
    if index is None or not isinstance(value, Tensor):
        return None
    entries = index if isinstance(index, tuple) else (index,)
    return value, lambda g: g[(slice(None), *entries)]


def _tiled(weight: Tensor, times: Sequence[int], d: int) -> Tensor:
    if set(times) == {1}:  # a view, which is known to be the weight
        return weight[(None,) * (len(times) - weight.dim())].unsqueeze(d)
    return weight.repeat(tuple(times)).unsqueeze(d)


def same(g: Tensor) -> Tensor:
    """A view of all, as it is."""
    return g


def _splitting(d: int, sizes: tuple[int, int]) -> View:
    return lambda g: g.unflatten(d + 1, sizes)
