"""Products of one activation with one weight along any of their dimensions.

Every `einsum`, `matmul`, `bmm`, `baddbmm`, `tensordot` of data with a weight is written as one
equation. A letter of the weight is an *input* (summed with the data's), an *output* (the data lack
it), or a *group* (data, weight and output have it). One expert, or one head, is a group. So is the
first output letter of a weight of three or more dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .uses import Grid, Use

__all__ = ["CONTRACTIONS", "contraction", "equation_of"]

_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"

Operands = tuple[str, list[Tensor], Tensor | None]  # equation, two tensors, an added bias


def equation_of(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Operands | None:
    """A product as an equation without dots, or None if it is no such product."""
    made: Operands | None = CONTRACTIONS[function](args, kwargs)
    return made


def contraction(
    equation: str, operands: Sequence[Tensor], slot: int, weight: Tensor, output: Tensor
) -> Use | str:
    """The use of a weight, operand `slot`, in a product with the other operand."""
    inputs, result = equation.split("->")
    names = inputs.split(",")
    mine, other = names[slot], names[1 - slot]
    x = operands[1 - slot].detach()
    if any(len(set(word)) < len(word) for word in (mine, other, result)):
        return f"a product {equation} along a diagonal"
    if set(mine) - set(other) - set(result):
        return f"a product {equation} that sums over its weight alone"
    if alone := [c for c in other if c not in mine and c not in result]:
        x = x.sum([other.index(c) for c in alone])
        other = "".join(c for c in other if c not in alone)
    groups = [c for c in mine if c in other and c in result]
    summed = [c for c in mine if c in other and c not in result]
    outputs = [c for c in mine if c not in other]
    if not groups and len(mine) > 2 and len(outputs) > 1 and outputs[0] == mine[0]:
        groups, outputs = [outputs[0]], outputs[1:]  # the same input for each
    positions = [c for c in result if c in other and c not in mine]
    size = dict(zip(mine, weight.shape, strict=True))
    grid, stored = _grid(mine, groups, outputs, summed, size)
    if not stored:
        return f"a product {equation} with a weight whose dimensions are not in blocks"
    order = [result.index(c) for c in (*positions, *groups, *outputs)]
    have = [c for c in groups if c in other]
    x = x.permute([other.index(c) for c in (*positions, *have, *summed)])
    if len(have) < len(groups):
        at = len(positions)
        x = x.unsqueeze(at).expand(*x.shape[:at], size[groups[0]], *x.shape[at:])
    lead, many = len(positions), len(groups)

    def gradients(g: Tensor) -> Tensor:  # (R,N,T,*groups,*outputs) -> (R,N,G,T,o)
        g = g.reshape(*g.shape[:3], grid.groups, grid.outputs)
        return g.transpose(2, 3)

    def factor(x: Tensor) -> Tensor:  # (N,T,*groups,*inputs) -> (N,G,T,i)
        return _joined(x, 2, many, grid.groups).transpose(1, 2)

    behind = (0, *(k + 1 for k in order))
    return Use(
        weight,
        None,
        leading=lead,
        x=x,
        grid=grid,
        gradients=gradients,
        inputs=factor,
        view=lambda g: g.permute(behind),
        matrices=size[mine[0]] if groups == [mine[0]] else 0,
    )


def _joined(x: Tensor, lead: int, many: int, groups: int) -> Tensor:
    """(*lead, *groups, *inputs) -> (*lead, G, i), without a copy of a repeated group."""
    if not many:
        return x.reshape(*x.shape[:lead], 1, -1)
    if many == 1:
        return x.flatten(lead + 1) if x.dim() > lead + 1 else x.unsqueeze(-1)
    return x.reshape(*x.shape[:lead], groups, -1)


def _grid(
    mine: str,
    groups: Sequence[str],
    outputs: Sequence[str],
    summed: Sequence[str],
    size: Mapping[str, int],
) -> tuple[Grid, bool]:
    """The weight's grid, and whether it is stored as one."""
    g, o, i = (math.prod(size[c] for c in letters) for letters in (groups, outputs, summed))
    word = list(mine)
    if word == [*groups, *outputs, *summed]:
        return Grid(g, o, i), True
    if word == [*groups, *summed, *outputs]:
        return Grid(g, o, i, transposed=True), True
    return Grid(g, o, i), False


# --- each function as an equation -----------------------------------------------------------------


def _einsum(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Operands | None:
    if not args or not isinstance(args[0], str):
        return None
    equation, operands = args[0].replace(" ", ""), list(args[1:])
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = list(operands[0])
    if len(operands) != 2:
        return None
    if "->" not in equation:
        words = equation.replace(",", "")
        if "..." in equation:
            return None
        once = sorted(c for c in set(words) if words.count(c) == 1)
        equation = f"{equation}->{''.join(once)}"
    return _without_dots(equation, operands)


def _without_dots(equation: str, operands: list[Tensor]) -> Operands | None:
    inputs, result = equation.split("->")
    words = inputs.split(",")
    free = [c for c in _LETTERS if c not in equation]
    extra = [t.dim() - len(w.replace("...", "")) for w, t in zip(words, operands, strict=True)]
    many = max(extra)
    dots = free[:many]
    made = []
    for k, (word, count) in enumerate(zip(words, extra, strict=True)):
        if "..." not in word:
            made.append(word)
            continue
        mine = dots[many - count :]
        made.append(word.replace("...", "".join(mine)))
        operands[k] = operands[k]
    joined = result.replace("...", "".join(dots))
    return f"{made[0]},{made[1]}->{joined}", operands, None


def _matmul(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Operands | None:
    names = ("input", "other", "mat2", "tensor2", "vec")
    given = [*args, *(kwargs[n] for n in names if n in kwargs)]
    if len(given) != 2 or not all(isinstance(t, Tensor) for t in given):
        return None
    a, b = given
    if a.dim() == 0 or b.dim() == 0:
        return None
    batch = max(a.dim(), b.dim(), 2) - 2
    front = _LETTERS[: max(batch, 0)]
    left = "" if a.dim() == 1 else "Y"
    right = "" if b.dim() == 1 else "Z"
    first = front[batch - max(a.dim() - 2, 0) :] + left + "X"
    second = front[batch - max(b.dim() - 2, 0) :] + "X" + right
    # a dimension of size 1 beside a larger one is repeated: it is nobody's group
    for k, c in enumerate(front):
        one = k - batch + a.dim() - 2, k - batch + b.dim() - 2
        sizes = [t.shape[at] if at >= 0 else None for t, at in zip((a, b), one, strict=True)]
        if None not in sizes and sizes[0] != sizes[1]:
            small = 0 if sizes[0] == 1 else 1
            if small:
                b, second = b.squeeze(one[1]), second.replace(c, "", 1)
            else:
                a, first = a.squeeze(one[0]), first.replace(c, "", 1)
            return _again(first, second, front + left + right, [a, b])
    return f"{first},{second}->{front}{left}{right}", [a, b], None


def _again(first: str, second: str, result: str, operands: list[Tensor]) -> Operands | None:
    """Once one repeated dimension is out; more are not looked at."""
    size: dict[str, int] = {}
    for word, t in zip((first, second), operands, strict=True):
        for c, n in zip(word, t.shape, strict=True):
            if size.setdefault(c, n) != n:
                return None
    return f"{first},{second}->{result}", operands, None


def _baddbmm(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Operands | None:
    if len(args) != 3 or kwargs.get("beta", 1) != 1 or kwargs.get("alpha", 1) != 1:
        return None
    bias, a, b = args
    return "gtx,gxo->gto", [a, b], bias


def _tensordot(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Operands | None:
    if len(args) < 2:
        return None
    a, b = args[:2]
    dims = args[2] if len(args) > 2 else kwargs.get("dims", 2)
    if isinstance(dims, int):
        left, right = list(range(a.dim() - dims, a.dim())), list(range(dims))
    elif isinstance(dims, (list, tuple)) and len(dims) == 2:
        left, right = ([d % t.dim() for d in ds] for ds, t in zip(dims, (a, b), strict=True))
    else:
        return None
    first = list(_LETTERS[: a.dim()])
    second = list(_LETTERS[a.dim() : a.dim() + b.dim()])
    for p, q in zip(left, right, strict=True):
        second[q] = first[p]
    result = [c for c in first if c not in second] + [c for c in second if c not in first]
    return f"{''.join(first)},{''.join(second)}->{''.join(result)}", [a, b], None


CONTRACTIONS: dict[Callable[..., Any], Callable[..., Operands | None]] = {
    torch.einsum: _einsum,
    torch.matmul: _matmul,
    torch.Tensor.matmul: _matmul,
    torch.Tensor.__matmul__: _matmul,
    torch.Tensor.__rmatmul__: lambda args, kwargs: _matmul(args[::-1], kwargs),
    torch.bmm: _matmul,
    torch.Tensor.bmm: _matmul,
    torch.mm: _matmul,
    torch.Tensor.mm: _matmul,
    torch.mv: _matmul,
    torch.Tensor.mv: _matmul,
    torch.baddbmm: _baddbmm,
    torch.Tensor.baddbmm: _baddbmm,
    torch.tensordot: _tensordot,
}
