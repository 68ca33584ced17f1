"""Multi-head attention: the layers inside `multi_head_attention_forward`, one by one."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..switches import inside_checkpoint
from .layers import linear
from .uses import Grid, Record, Use, composite

__all__ = ["attention"]


@composite(
    F.multi_head_attention_forward,
    " ".join(inspect.signature(F.multi_head_attention_forward).parameters),
)
def attention(call: Mapping[str, Any], record: Record) -> Any:
    """Project, attend with torch's own function between identities, project.

    Masks, added keys and dropout stay torch's. The packed weight is used by one projection in
    self-attention, by two or three in cross-attention. Each is a use of all its rows, with zero
    gradients at those of the others.
    """
    query, key, value = call["query"], call["key"], call["value"]
    if query.dim() != 3 or query.is_nested:
        return "attention of one unbatched sequence, or of nested ones"
    if inside_checkpoint():
        # A checkpoint repeats torch's own function: it must have seen the same one.
        return "attention inside a checkpoint"
    if call.get("use_separate_proj_weight", False):
        q, k, v = _separate(call, record)
    elif query is key and key is value:
        q, k, v = _packed(call, record, query, 0, 3)
    elif key is value:
        q, k, v = *_packed(call, record, query, 0, 1), *_packed(call, record, key, 1, 3)
    else:
        q, k, v = (
            _packed(call, record, x, part, part + 1)[0]
            for part, x in enumerate((query, key, value))
        )
    same = torch.eye(query.shape[-1], dtype=query.dtype, device=query.device)
    between: dict[str, Any] = dict.fromkeys(("in_proj_weight", "in_proj_bias", "out_proj_bias"))
    between |= {"query": q, "key": k, "value": v, "use_separate_proj_weight": True}
    between |= dict.fromkeys(
        ("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj_weight"), same
    )
    mixed, weights = F.multi_head_attention_forward(**{**call, **between})
    out, bias = call["out_proj_weight"], call["out_proj_bias"]
    y = F.linear(mixed, out, bias)
    use = linear({"input": mixed, "weight": out, "bias": bias}, y)
    if isinstance(use, Use):
        record(use, y)
    return y, weights


def _packed(
    call: Mapping[str, Any], record: Record, x: Tensor, first: int, stop: int
) -> tuple[Tensor, ...]:
    """Projections first..stop-1 of (query, key, value), which share the input x."""
    weight, bias = call["in_proj_weight"], call["in_proj_bias"]
    size = weight.shape[0] // 3
    rows = slice(first * size, stop * size)
    y = F.linear(x, weight[rows], None if bias is None else bias[rows])
    use = Use(
        weight,
        bias,
        leading=2,
        x=x.detach(),
        grid=Grid(1, *weight.shape),
        gradients=lambda g: _padded(g, rows, weight.shape[0]),
        inputs=lambda x: x.unsqueeze(1),
    )
    record(use, y)
    return y.chunk(stop - first, -1)


def _separate(call: Mapping[str, Any], record: Record) -> list[Tensor]:
    """A weight for each projection, and one bias for all three."""
    bias, projections = call["in_proj_bias"], []
    for part, name in enumerate("qkv"):
        x, weight = call[("query", "key", "value")[part]], call[f"{name}_proj_weight"]
        rows = slice(part * weight.shape[0], (part + 1) * weight.shape[0])
        y = F.linear(x, weight, None if bias is None else bias[rows])
        use = linear({"input": x, "weight": weight}, y)
        if isinstance(use, Use):
            record(use, y)
        if bias is not None:
            record(_bias_alone(bias, x.detach(), rows), y)
        projections.append(y)
    return projections


def _bias_alone(bias: Tensor, x: Tensor, rows: slice) -> Use:
    return Use(
        None,
        bias,
        leading=2,
        x=x,
        grid=Grid(1, bias.shape[0], 1),
        gradients=lambda g: _padded(g, rows, bias.shape[0]),
        inputs=lambda x: x.unsqueeze(1),
    )


def _padded(g: Tensor, rows: slice, total: int) -> Tensor:
    """(R, N, T, rows) -> (R, N, 1, T, total), zero elsewhere."""
    return F.pad(g, (rows.start, total - rows.stop)).unsqueeze(2)
