"""The uses of a function that has no layer's form: numbers, products, concatenations, or itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils import _pytree as pytree

from .contractions import CONTRACTIONS, contraction, equation_of
from .elementwise import ELEMENTWISE, TOGETHER, copied, elementwise, put_together
from .local import local
from .repeats import written
from .uses import Use
from .weights import Weight

__all__ = ["Meeting"]

Found = tuple[Use, Tensor]


class Meeting(NamedTuple):
    """A call in which data meet weights.

    Attributes:
        function: what was called.
        args: of the call, as they were before it.
        kwargs: of the call.
        output: what it returned, or changed.
        weight_of: tells weights from data.
        cut: a weight without the dimensions along which it is only repeated.
        is_constant: tells constants from data.
    """

    function: Callable[..., Any]
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    output: Any
    weight_of: Callable[[Any], Weight | None]
    cut: Callable[[Weight], Tensor]
    is_constant: Callable[[Any], bool]

    def uses(self) -> Iterator[Found | str]:
        """Each use with the output that it is a use at, or the reason why there is none."""
        function, args, one = self.function, self.args, isinstance(self.output, Tensor)
        if function in ELEMENTWISE and one:
            yield from self._in_turn(elementwise, args)
            if not any(self.weight_of(value) is not None for value in args):
                yield f"{getattr(function, '__name__', function)} with a weight as a keyword"
        elif function in TOGETHER and args and isinstance(args[0], (list, tuple)):
            yield from self._in_turn(put_together, args[0])
        elif function in CONTRACTIONS and one and (made := self.product()):
            yield from made
        elif one and (found := self._written()):
            yield found
        else:
            yield from self._itself()

    def _in_turn(self, use_of: Callable[..., Use | str], values: Any) -> Iterator[Found | str]:
        for slot, value in enumerate(values):
            if (weight := self.weight_of(value)) is not None:
                cut = self.cut(weight)
                use = use_of(self.function, self.args, self.kwargs, slot, cut, self.output)
                yield use if isinstance(use, str) else (use, self.output)

    def _written(self) -> Found | None:
        """The use of a weight that is written into data."""
        found = written(self.function, self.args)
        weight = None if found is None else self.weight_of(found[0])
        if found is None or weight is None or self.weight_of(self.args[0]) is not None:
            return None
        return copied(self.cut(weight), found[1], self.output), self.output

    def product(self) -> list[Found]:
        """The uses of all weights in a product of data and one weight; none if it is no such."""
        made = equation_of(self.function, self.args, self.kwargs)
        if made is None:
            return []
        (equation, operands, bias), output = made, self.output
        mine = [k for k, t in enumerate(operands) if self.weight_of(t) is not None]
        added = self.weight_of(bias)
        if len(mine) > 1 or (not mine and added is None):
            return []
        uses = [contraction(equation, operands, slot, operands[slot], output) for slot in mine]
        if bias is not None and added is not None:
            first = next(f for f, (kind, _) in ELEMENTWISE.items() if kind == "sum")
            uses.append(elementwise(first, (output, bias), {}, 1, self.cut(added), output))
        found = [(use, output) for use in uses if isinstance(use, Use)]
        return found if len(found) == len(uses) else []

    def _itself(self) -> Iterator[Found | str]:
        function, output = self.function, self.output
        name = getattr(function, "__name__", str(function))
        if name.startswith("__i") or name == "__setitem__" or name.strip("_") + "_" == name:
            yield f"{name} changes data in place with a weight"
            return
        leaves, _ = pytree.tree_flatten((tuple(self.args), dict(self.kwargs)))
        slots = {k: leaf for k, leaf in enumerate(leaves) if self.weight_of(leaf) is not None}
        if not slots:
            yield f"{name} has no form"
            return
        many = not isinstance(output, Tensor)
        for k, tensor in enumerate(t for t in pytree.tree_leaves(output) if isinstance(t, Tensor)):
            if tensor.grad_fn is not None:
                which = k if many else None
                call = function, self.args, self.kwargs
                yield local(*call, slots, which, tensor, self.is_constant), tensor
