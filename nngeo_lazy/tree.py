"""Nested data, such as batches: the one walk through them that the whole package uses.

Mappings (also `UserDict` and a tokenizer's `BatchEncoding`), lists, tuples, named tuples and
dataclasses are walked through. All else is a leaf: a tensor, a `PackedSequence`, a string, a
number, an object of the user's.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

from torch import Tensor

__all__ = ["by_field", "leaves", "map_leaves", "replaced", "tensors"]


def leaves(value: Any) -> Iterator[Any]:
    """The leaves in order."""
    children = _children(value)
    if children is None:
        yield value
        return
    for child in children:
        yield from leaves(child)


def tensors(value: Any) -> list[Tensor]:
    """The tensors among the leaves.

    Example:
        >>> import torch
        >>> [len(t) for t in tensors({"a": torch.ones(2), "b": [torch.ones(3), "text"]})]
        [2, 3]
    """
    return [leaf for leaf in leaves(value) if isinstance(leaf, Tensor)]


def map_leaves(function: Callable[[Any], Any], value: Any) -> Any:
    """The same structure with a function's values in the place of the leaves."""
    children = _children(value)
    if children is None:
        return function(value)
    return _like(value, [map_leaves(function, child) for child in children])


def replaced(value: Any, new: Mapping[int, Any]) -> Any:
    """The same structure with other leaves, by their index."""
    count = iter(range(2**62))

    def leaf(old: Any) -> Any:
        k = next(count)
        return new.get(k, old)

    return map_leaves(leaf, value)


def _children(value: Any) -> list[Any] | None:
    """What a value holds, None of a leaf."""
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, (list, tuple)) and not _is_packed(value):
        return list(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, field.name) for field in dataclasses.fields(value)]
    return None


def _is_packed(value: Any) -> bool:
    """A `PackedSequence` is a named tuple whose parts belong together."""
    return hasattr(value, "batch_sizes") and hasattr(value, "sorted_indices")


def _like(value: Any, children: list[Any]) -> Any:
    if isinstance(value, Mapping):
        named = dict(zip(value, children, strict=True))
        if type(value) is dict or not isinstance(value, MutableMapping):
            return named
        kept = copy.copy(value)  # a BatchEncoding stays one
        kept.update(named)
        return kept
    if isinstance(value, list):
        return children
    if isinstance(value, tuple):
        return type(value)(*children) if hasattr(value, "_fields") else tuple(children)
    kept = copy.copy(value)
    for field, child in zip(dataclasses.fields(value), children, strict=True):
        object.__setattr__(kept, field.name, child)
    return kept


def by_field(value: Any) -> Any:
    """An instance of a dataclass as a mapping; all else as it is."""
    if (
        dataclasses.is_dataclass(value)
        and not isinstance(value, type)
        and not hasattr(value, "__iter__")
    ):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return value
