"""The uses of a function that has no layer's form: numbers, products, concatenations, or itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from .contractions import CONTRACTIONS, contraction, equation_of
from .elementwise import ELEMENTWISE, TOGETHER, elementwise, put_together
from .local import local
from .uses import Use
from .weights import Weight

__all__ = ["uses_of"]

Found = tuple[Use, Tensor]


def uses_of(
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    output: Any,
    weight_of: Callable[[Any], Weight | None],
    cut: Callable[[Weight], Tensor],
) -> Iterator[Found | str]:
    """Each use with the output that it is a use at, or the reason why there is none.

    Args:
        function: what was called.
        args: of the call, as they were before it.
        kwargs: of the call.
        output: what it returned, or changed.
        weight_of: tells weights from data.
        cut: a weight without the dimensions along which it is only repeated.
    """
    if function in ELEMENTWISE and isinstance(output, Tensor):
        yield from _in_turn(function, args, kwargs, output, weight_of, cut)
        return
    if function in TOGETHER and args and isinstance(args[0], (list, tuple)):
        for slot, tensor in enumerate(args[0]):
            if (weight := weight_of(tensor)) is not None:
                use = put_together(function, args, kwargs, slot, cut(weight), output)
                yield use if isinstance(use, str) else (use, output)
        return
    if function in CONTRACTIONS and isinstance(output, Tensor):
        made = list(_product(function, args, kwargs, output, weight_of, cut))
        if made:
            yield from made
            return
    yield from _itself(function, args, kwargs, output, weight_of)


def _in_turn(
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    output: Tensor,
    weight_of: Callable[[Any], Weight | None],
    cut: Callable[[Weight], Tensor],
) -> Iterator[Found | str]:
    found = False
    for slot, value in enumerate(args):
        if (weight := weight_of(value)) is not None:
            found = True
            use = elementwise(function, args, kwargs, slot, cut(weight), output)
            yield use if isinstance(use, str) else (use, output)
    if not found:
        yield f"{getattr(function, '__name__', function)} with a weight as a keyword"


def _product(
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    output: Tensor,
    weight_of: Callable[[Any], Weight | None],
    cut: Callable[[Weight], Tensor],
) -> Iterator[Found]:
    made = equation_of(function, args, kwargs)
    if made is None:
        return
    equation, operands, bias = made
    mine = [k for k, t in enumerate(operands) if weight_of(t) is not None]
    added = weight_of(bias)
    if len(mine) > 1 or (not mine and added is None):
        return
    uses = [contraction(equation, operands, slot, operands[slot], output) for slot in mine]
    if bias is not None and added is not None:
        first = next(f for f, (kind, _) in ELEMENTWISE.items() if kind == "sum")
        uses.append(elementwise(first, (output, bias), {}, 1, cut(added), output))
    if not any(isinstance(use, str) for use in uses):
        yield from ((use, output) for use in uses if isinstance(use, Use))


def _itself(
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    output: Any,
    weight_of: Callable[[Any], Weight | None],
) -> Iterator[Found | str]:
    name = getattr(function, "__name__", str(function))
    if name.startswith("__i") or name == "__setitem__" or name.strip("_") + "_" == name:
        yield f"{name} changes data in place with a weight"
        return
    leaves, _ = pytree.tree_flatten((tuple(args), dict(kwargs)))
    slots = {k: leaf for k, leaf in enumerate(leaves) if weight_of(leaf) is not None}
    if not slots:
        yield f"{name} has no form"
        return
    results = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor)]
    many = not isinstance(output, Tensor)
    for k, tensor in enumerate(results):
        if tensor.grad_fn is not None:
            yield local(function, args, kwargs, slots, k if many else None, tensor), tensor
