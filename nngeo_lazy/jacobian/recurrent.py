"""Recurrent networks: the linear layers of their steps, one by one.

torch runs all steps in one function. Its weights are those of linear layers, of the inputs and of
the states, which all steps share. So a network of T steps is as two layers with T positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..switches import inside_checkpoint
from .layers import linear
from .uses import Record, Use, composite

__all__: list[str] = []

# (pre-activations of the inputs, of the state, the state before) -> the state after; the first
# part of a state is what the next product receives
Cell = Callable[[Tensor, Tensor, Sequence[Tensor]], Sequence[Tensor]]
ALL = "input second third fourth fifth sixth seventh eighth ninth"  # two signatures
ONE = "input hx w_ih w_hh b_ih b_hh"
CHECKPOINT = "a recurrent network inside a checkpoint"  # which must see the same function again


def _lstm(x: Tensor, h: Tensor, state: Sequence[Tensor]) -> Sequence[Tensor]:
    i, f, g, o = (x + h).chunk(4, -1)
    c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru(x: Tensor, h: Tensor, state: Sequence[Tensor]) -> Sequence[Tensor]:
    (r, z, n), (hr, hz, hn) = x.chunk(3, -1), h.chunk(3, -1)
    new = (n + (r + hr).sigmoid() * hn).tanh()
    return (new + (z + hz).sigmoid() * (state[0] - new),)


def _tanh(x: Tensor, h: Tensor, state: Sequence[Tensor]) -> Sequence[Tensor]:
    return ((x + h).tanh(),)


def _relu(x: Tensor, h: Tensor, state: Sequence[Tensor]) -> Sequence[Tensor]:
    return ((x + h).relu(),)


@dataclass(frozen=True)
class _Weights:
    """Of one layer in one direction."""

    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None = None
    b_hh: Tensor | None = None
    w_hr: Tensor | None = None  # projects what an LSTM returns

    @classmethod
    def of(cls, flat: Sequence[Tensor], bias: bool, projected: bool) -> Iterator[_Weights]:
        """Those of all layers and directions."""
        size = 2 + 2 * bias + projected
        for start in range(0, len(flat), size):
            w_ih, w_hh, *others = flat[start : start + size]
            w_hr = others.pop() if projected else None
            b_ih, b_hh = others or (None, None)
            yield cls(w_ih, w_hh, b_ih, b_hh, w_hr)


def _recorded(record: Record, x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> None:
    use = linear({"input": x, "weight": weight, "bias": bias}, y)
    if isinstance(use, Use):
        record(use, y)


def _probe(like: Tensor, width: int) -> Tensor:
    """Zeros (*positions, width) that are added to products, so that gradients there meet in one."""
    zero = torch.zeros((), dtype=like.dtype, device=like.device, requires_grad=True)
    return zero.expand(*like.shape[:-1], width)


def _one_way(
    cell: Cell,
    x: Tensor,
    sizes: Sequence[int],
    state: Sequence[Tensor],
    weights: _Weights,
    reverse: bool,
    record: Record,
) -> tuple[Tensor, Sequence[Tensor]]:
    """All steps of a layer in one direction.

    Args:
        cell: a step.
        x: inputs (T, N, i), or (P, i) of packed sequences.
        sizes: of the steps.
        state: before the first step, (N, h) each.
        weights: of the layer.
        reverse: whether the last step is the first.
        record: of its linear layers.

    Returns:
        What it returns at all steps, and the state after each sequence's last one.
    """
    made = F.linear(x, weights.w_ih, weights.b_ih)
    _recorded(record, x, weights.w_ih, weights.b_ih, made)
    probe = _probe(made, weights.w_hh.shape[0])
    last = None if weights.w_hr is None else _probe(made, weights.w_hr.shape[0])
    packed = x.dim() == 2
    parts = [
        t.split(list(sizes)) if packed else t.unbind()
        for t in (made, probe, *(() if last is None else (last,)))
    ]
    steps = range(len(sizes))[:: -1 if reverse else 1]
    before, inner, after = ([x.new_empty(0)] * len(sizes) for _ in range(3))
    now, ended = list(state), list[Sequence[Tensor]]()
    if packed:
        now = [s[: sizes[steps[0]]] for s in state]
    for t in steps:
        n, m = sizes[t], len(now[0])
        if n < m:  # the shortest sequences are last
            ended.append([s[n:] for s in now])
            now = [s[:n] for s in now]
        elif n > m:
            now = [torch.cat([s, first[m:n]]) for s, first in zip(now, state, strict=True)]
        before[t] = now[0].detach()
        product = F.linear(now[0], weights.w_hh, weights.b_hh) + parts[1][t]
        now = list(cell(parts[0][t], product, now))
        if weights.w_hr is not None:
            inner[t] = now[0].detach()
            now[0] = F.linear(now[0], weights.w_hr) + parts[2][t]
        after[t] = now[0]

    joined = torch.cat if packed else torch.stack
    _recorded(record, joined(before), weights.w_hh, weights.b_hh, probe)
    if weights.w_hr is not None and last is not None:
        _recorded(record, joined(inner), weights.w_hr, None, last)
    if ended:
        now = [torch.cat([s, *rest]) for s, *rest in zip(now, *reversed(ended), strict=True)]
    return joined(after), now


def _all_layers(cell: Cell, call: Mapping[str, Any], record: Record) -> Any:
    """What torch returns: the outputs of the last layer, and the last states of all."""
    if inside_checkpoint():
        return CHECKPOINT
    if not set(call) <= set(ALL.split()):
        return "a recurrent network that is called by keywords"
    x, *rest = call.values()
    packed = isinstance(rest[2], (list, tuple))  # behind the sizes of the steps, and the states
    sizes = rest.pop(0).tolist() if packed else []
    hx, flat, bias, _, dropout, training, both, *first = rest
    state = [hx] if isinstance(hx, Tensor) else list(hx)
    swap = bool(first and first[0])
    if not packed:
        x = x.transpose(0, 1) if swap else x
        sizes = [x.shape[1]] * len(x)
    projected = len(state) == 2 and state[0].shape[-1] != state[1].shape[-1]
    known = list(_Weights.of(flat, bias, projected))
    finals: list[Sequence[Tensor]] = []
    for start in range(0, len(known), 1 + both):
        if start and dropout and training:
            x = F.dropout(x, dropout)
        ways = []
        for k in range(start, start + 1 + both):
            own = [s[k] for s in state]
            y, final = _one_way(cell, x, sizes, own, known[k], k > start, record)
            ways.append(y)
            finals.append(final)
        x = torch.cat(ways, -1) if both else ways[0]
    last = [torch.stack(each) for each in zip(*finals, strict=True)]
    return (x.transpose(0, 1) if swap else x, *last)


def _one_step(cell: Cell, call: Mapping[str, Any], record: Record) -> Any:
    """The state after a step, of `LSTMCell` and the like."""
    if inside_checkpoint():
        return CHECKPOINT
    hx, biases = call["hx"], (call.get("b_ih"), call.get("b_hh"))
    state = [hx] if isinstance(hx, Tensor) else list(hx)
    products = []
    for x, weight, bias in zip(
        (call["input"], state[0]), (call["w_ih"], call["w_hh"]), biases, strict=True
    ):
        products.append(F.linear(x, weight, bias))
        _recorded(record, x, weight, bias, products[-1])
    after = cell(products[0], products[1], state)
    return after[0] if isinstance(hx, Tensor) else tuple(after)


for _name, _cell in {"lstm": _lstm, "gru": _gru, "rnn_tanh": _tanh, "rnn_relu": _relu}.items():
    composite(getattr(torch, _name), ALL)(partial(_all_layers, _cell))
    composite(getattr(torch, f"{_name}_cell"), ONE)(partial(_one_step, _cell))
