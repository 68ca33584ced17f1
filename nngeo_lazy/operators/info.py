"""What an operator knows besides its numbers: the parameter space and where the numbers came from.

Every operator carries it as the keyword argument `info`. linear_operator converts a keyword that
has `to`, `clone`, `cpu` or `detach`: these classes have none of them, on purpose.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch

from ..errors import SpaceMismatchError
from ..space import ParamSpace

Number = TypeVar("Number", int, float)
__all__ = ["Info", "Origin", "joint"]


@dataclass(frozen=True)
class Origin:
    """Where a parameter's block comes from.

    Attributes:
        layer: the path of the module that owns the parameter.
        form: how its Jacobian was computed, such as "linear: outer".
        note: why a fallback was taken; empty if none was.
        positions: how many positions of all examples share the parameter, if they are counted; a
            number for each of its blocks if they differ.
    """

    layer: str
    form: str
    note: str = ""
    positions: float | tuple[float, ...] | None = None


@dataclass(frozen=True)
class Info:
    """What an operator knows besides its numbers.

    Attributes:
        space: the parameters, or None for a bare matrix.
        num_examples: how many examples the matrix is a mean over.
        num_terms: how many unmasked terms of the loss.
        origins: for each parameter, where its block comes from.
        quantity: which build made it: matrix, likelihood, estimator, seed, representation; empty
            for what was altered since (damped, inverted, scaled, added).
        log_likelihood: of all observed labels at the parameters of the build, if there were any.
        truncated: whether the build kept the best approximation of a rank, which is not linear in
            the data.
    """

    space: ParamSpace | None = None
    num_examples: int | None = None
    num_terms: int | None = None
    origins: Mapping[str, Origin] = field(default_factory=dict)
    quantity: Mapping[str, str | int | None] = field(default_factory=dict)
    log_likelihood: float | None = None
    truncated: bool = False

    def restrict(self, names: Iterable[str]) -> Info:
        """The same for some of the parameters."""
        if self.space is None:
            raise SpaceMismatchError("this operator has no parameter space to choose from")
        space = self.space.subspace(names)
        origins = {name: self.origins[name] for name in space.names if name in self.origins}
        return replace(self, space=space, origins=origins)

    def altered(self) -> Info:
        """The same of a matrix that is no build's any more: its statistics cannot be pooled."""
        return replace(self, quantity={})

    def moved(self, dtype: torch.dtype | None, device: Any) -> Info:
        """The same for an operator of another dtype or device."""
        if self.space is None:
            return self
        return replace(self, space=self.space.to(dtype=dtype, device=device))


def joint(first: Info, second: Info) -> Info:
    """What is known of a sum or a product of two operators.

    Raises:
        SpaceMismatchError: they are over different parameters.
    """
    if first.space is not None and second.space is not None and first.space != second.space:
        raise SpaceMismatchError(
            "expected two operators over the same parameters, got "
            f"{_listed(first.space)} and {_listed(second.space)}: take block(...) of the larger one"
        )
    if first.space is None:
        return second.altered() if second.space is not None else Info()
    if second.space is None:
        return first.altered()
    return Info(
        first.space,
        _agreed(first.num_examples, second.num_examples),
        _agreed(first.num_terms, second.num_terms),
        first.origins or second.origins,
        log_likelihood=_agreed(first.log_likelihood, second.log_likelihood),
    )


def _agreed(first: Number | None, second: Number | None) -> Number | None:
    if first is None or second is None:
        return second if first is None else first
    return first if first == second else None


def _listed(space: ParamSpace) -> str:
    names = list(space.names)
    return f"{names}" if len(names) <= 6 else f"{len(names)} parameters from {names[0]}"
