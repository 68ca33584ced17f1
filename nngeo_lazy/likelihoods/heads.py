"""Which tensors of what a model returns are its outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data import outputs_of
from ..errors import DataError

__all__ = ["Heads", "joint"]

_REMEDY = (
    "pass outputs=lambda result: ..., which picks them, or likelihood={...} with a likelihood for "
    "each of several heads"
)


@dataclass(frozen=True)
class Heads:
    """Picks the outputs of each head.

    Args:
        names: the keys, attributes or positions of several heads, each with a loss of its own; None
            is one head.
        pick: from what the model returns, to the outputs or to what holds the heads.
    """

    names: Sequence[str | int] | None
    pick: Callable[[Any], Any] | None = None

    @classmethod
    def of(cls, likelihood: Any, pick: Callable[[Any], Any] | None) -> Heads:
        """Those that likelihoods are given for, by name or in a sequence."""
        if isinstance(likelihood, Mapping):
            return cls(tuple(likelihood), pick)
        if isinstance(likelihood, Sequence) and not isinstance(likelihood, str):
            return cls(range(len(likelihood)), pick)
        return cls(None, pick)

    def __call__(self, result: Any) -> list[Tensor]:
        """The outputs (N, ...) of each head.

        Raises:
            DataError: there are none, or those of two heads have other numbers of examples.
        """
        if self.names is None:
            return [self._one(result)]
        held = result if self.pick is None else self.pick(result)
        found = [_named(held, name, self.names) for name in self.names]
        shapes = [tuple(head.shape) for head in found]
        if len({shape[0] for shape in shapes}) > 1:
            raise DataError(
                "expected all heads to have the examples in dimension 0, and one number of them, "
                f"got outputs {shapes}: let outputs= pick heads (N, ...)"
            )
        return found

    def _one(self, result: Any) -> Tensor:
        return outputs_of(result, _REMEDY) if self.pick is None else self.pick(result)


def joint(heads: Sequence[Tensor]) -> Tensor:
    """All outputs in one tensor: that of one head, or (N, D) of several."""
    return heads[0] if len(heads) == 1 else torch.cat([head.flatten(1) for head in heads], 1)


def _named(held: Any, name: str | int, names: Sequence[str | int]) -> Tensor:
    """One head of a mapping, an object with attributes, or a sequence."""
    if isinstance(name, int):
        fits = isinstance(held, Sequence) and len(held) == len(names)
        found = held[name] if fits else None
    elif isinstance(held, Mapping):
        found = held.get(name)
    else:
        found = getattr(held, name, None)
    if isinstance(found, Tensor) and found.dim() > 0 and found.is_floating_point():
        return found
    has = f"the keys {list(held)}" if isinstance(held, Mapping) else f"a {type(held).__name__}"
    if isinstance(held, Sequence):
        has += f" of {len(held)}"
    raise DataError(
        f"expected the model to return floating-point outputs (N, ...) for each of the heads "
        f"{list(names)} that likelihood= names, but has none for {name!r} in {has}: name the "
        "heads as the model returns them (a dict by key, a sequence by position), or let outputs= "
        "pick them"
    )
