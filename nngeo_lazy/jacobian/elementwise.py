"""Functions that take numbers one by one, with any broadcast, and those that put tensors together.

Scales, shifts, masks, class tokens and position tables: each weight meets the data in a product, a
sum or a concatenation. Its rows are the output gradients, times a coefficient, summed over the
dimensions along which the weight is repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .uses import Use

__all__ = ["ELEMENTWISE", "TOGETHER", "copied", "elementwise", "put_together"]

_SUMS = ("add", "sub", "subtract")
_PRODUCTS = ("mul", "multiply")
_OTHERS = (
    *("rsub", "div", "divide", "true_divide", "truediv", "addcmul", "addcdiv", "lerp", "where"),
    *("maximum", "minimum", "fmax", "fmin", "pow", "hypot", "copysign", "xlogy", "clamp"),
)


def _variants(name: str) -> Iterator[tuple[Callable[..., Any], Callable[..., Any]]]:
    """A function's forms, in place or not, each with one that is not in place."""
    plain = getattr(torch, name, None) or getattr(torch.Tensor, name, None)
    for holder, spelled in (
        (torch, name),
        (torch.Tensor, name),
        (torch.Tensor, name + "_"),
        (torch.Tensor, f"__{name}__"),
        (torch.Tensor, f"__r{name}__"),
        (torch.Tensor, f"__i{name}__"),
    ):
        function = getattr(holder, spelled, None)
        if function is not None:
            own = spelled.endswith("_") and not spelled.endswith("__")
            in_place = own or spelled.startswith("__i")
            base = getattr(torch.Tensor, f"__{name}__", plain)
            functional = plain if own else base if in_place else function
            if functional is not None:
                yield function, functional


# function -> (its kind, the same function with a result of its own)
ELEMENTWISE: dict[Callable[..., Any], tuple[str, Callable[..., Any]]] = {
    function: (kind, functional)
    for kind, names in (("sum", _SUMS), ("product", _PRODUCTS), ("other", _OTHERS))
    for name in names
    for function, functional in _variants(name)
}
TOGETHER = {torch.cat, torch.concat, torch.concatenate, torch.stack}


def elementwise(
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    slot: int,
    weight: Tensor,
    output: Tensor,
) -> Use | str:
    """One weight's use in a function of numbers.

    Args:
        function: a key of `ELEMENTWISE`.
        args: of its call; what it changes in place as it was before.
        kwargs: of its call.
        slot: which argument the weight is.
        weight: the same with size 1 if it is only repeated.
        output: what the function returned.
    """
    kind, functional = ELEMENTWISE[function]
    if slot >= len(args):
        return f"{getattr(function, '__name__', function)} with a weight as a keyword"
    first = output.dim() - weight.dim()
    shape = (*(1,) * first, *weight.shape)
    repeated = [k for k, size in enumerate(shape) if size == 1 or output.shape[k] == 1]
    own = [k for k in range(output.dim()) if k not in repeated]
    order = (*repeated, *own)
    name = getattr(function, "__name__", "")
    scale = _constant(kind, name, kwargs, slot, args)
    if scale is not None:
        x = torch.as_tensor(scale, dtype=output.dtype, device=output.device).expand(output.shape)
    elif kind == "product":
        other = args[1 - slot]
        x = torch.as_tensor(other, device=output.device).detach().to(output.dtype)
        x = x.expand(output.shape)
    else:
        x = _coefficient(functional, args, kwargs, slot, output)

    def rows(x: Tensor, g: Tensor) -> dict[str, Tensor]:  # (N,T,*f), (R,N,T,*f)
        product = g if scale == 1 else g * x
        summed = product.sum(2)
        return {"weight": summed.flatten(2) if summed.dim() > 2 else summed.unsqueeze(-1)}

    return Use(
        weight,
        None,
        leading=len(repeated),
        x=x.permute(order),
        rows=rows,
        view=_permuting(order),
        matrices=weight.shape[0] if weight.dim() > 1 and own[:1] == [first] else 0,
    )


def _constant(
    kind: str, name: str, kwargs: Mapping[str, Any], slot: int, args: Sequence[Any]
) -> float | None:
    """The derivative in the weight, if it is one number."""
    if kind != "sum":
        return None
    alpha = kwargs.get("alpha", args[2] if len(args) > 2 else 1)
    if "sub" not in name:
        return float(alpha) if slot == 1 else 1.0
    second = slot == 0 if "rsub" in name else slot == 1
    return -float(alpha) if second else 1.0


def _coefficient(
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    slot: int,
    output: Tensor,
) -> Tensor:
    """The derivative of each number of the output in the weight's number that it is made of."""
    held = [a.detach() if isinstance(a, Tensor) else a for a in args]
    with torch.enable_grad():
        held[slot] = held[slot].expand(output.shape).clone().requires_grad_()
        again = function(*held, **kwargs)
        (found,) = torch.autograd.grad(again, held[slot], torch.ones_like(again))
    return found


def put_together(
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    slot: int,
    weight: Tensor,
    output: Tensor,
) -> Use | str:
    """One weight's use in a concatenation: its rows are a slice of the output gradients."""
    given = args[0] if args else kwargs.get("tensors")
    dim = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
    if given is None or not isinstance(dim, int):
        return "a concatenation of something else than a list of tensors"
    dim %= output.dim()
    shape = list(weight.shape)
    if function is torch.stack:
        start, size = slot, 1
        shape.insert(dim, 1)
    else:
        start, size = sum(t.shape[dim] for t in given[:slot]), given[slot].shape[dim]
    return copied(weight, lambda g: g.narrow(dim + 1, start, size), output, shape)


def copied(
    weight: Tensor,
    view: Callable[[Tensor], Tensor],
    output: Tensor,
    shape: Sequence[int] | None = None,
) -> Use:
    """The use of a weight whose copies are entries of an output: its rows are sums of gradients.

    Args:
        weight: with size 1 along the dimensions in which it is repeated.
        view: these entries (1, *places) of the output, or those of its gradients (R, *output).
        output: what the function returned, or changed.
        shape: of the weight, in the dimensions of the places.
    """
    part = view(output.detach().unsqueeze(0))[0]
    shape = weight.shape if shape is None else shape
    shape = (*(1,) * (part.dim() - len(shape)), *shape)
    repeated = [k for k, size in enumerate(shape) if size == 1 or part.shape[k] == 1]
    order = (*repeated, *(k for k in range(part.dim()) if k not in repeated))
    permuted = _permuting(order)

    def rows(x: Tensor, g: Tensor) -> dict[str, Tensor]:  # (N,T,*f), (R,N,T,*f)
        summed = g.sum(2)
        return {"weight": summed.flatten(2) if summed.dim() > 2 else summed.unsqueeze(-1)}

    x = part.new_ones(()).expand(part.shape).permute(order)
    return Use(
        weight, None, leading=len(repeated), x=x, rows=rows, view=lambda g: permuted(view(g))
    )


def _permuting(order: Sequence[int]) -> Callable[[Tensor], Tensor]:
    behind = (0, *(k + 1 for k in order))
    return lambda g: g.permute(behind)
