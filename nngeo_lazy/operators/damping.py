"""Damping: a number, a tensor, or either for some of the parameters, in one normal form."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import torch
from torch import Tensor

from ..arguments import Rule, described
from ..errors import DataError, NotPositiveDefiniteError, SpaceMismatchError
from ..layout import Layout
from ..selectors import select

if TYPE_CHECKING:
    from .base import BaseLinearOperator

__all__ = ["Damping", "DampingAmount", "DampingLike", "is_zero", "resolve_damping"]


def _is_amount(value: Any) -> bool:
    """What is below 0, or NaN, has an error of its own."""
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return real or isinstance(value, Tensor)


def _is_damping(value: Any) -> bool:
    return all(map(_is_amount, value.values() if isinstance(value, Mapping) else [value]))


DampingAmount: TypeAlias = Annotated[
    float | Tensor, Rule("a number or a tensor", _is_amount, "1e-3")
]
# keys are selectors; Mapping is invariant in them, so that no narrower type is accepted
DampingLike: TypeAlias = Annotated[
    float | Tensor | Mapping[Any, float | Tensor],
    Rule("a number, a tensor, or a dict of these by selector", _is_damping, "1e-3"),
]


@dataclass(frozen=True)
class Damping:
    """A nonnegative diagonal: one number, or a vector with what is known to be constant in it.

    Attributes:
        value: a 0-d tensor, or (P,).
        constants: the flat slices on which a vector is constant by construction, with the constant.
        use_pi: whether factored damping is shared out by the factors' mean eigenvalues.
        minimum: the least that factored damping adds to a factor.
    """

    value: Tensor
    constants: tuple[tuple[slice, Tensor], ...] = ()
    use_pi: bool = True
    minimum: float = 0.0

    def on(self, layout: Layout) -> Tensor:
        """The damping of one block: 0-d if it is constant there, else in block coordinates."""
        if self.value.dim() == 0:
            return self.value
        known = [
            constant
            for where, constant in self.constants
            if any(where.start <= s.start and s.stop <= where.stop for s in layout.slices)
        ]
        if len(known) == len(layout.slices) and all(c is known[0] for c in known):
            return known[0]
        return layout.gather(self.value.unsqueeze(-1)).squeeze(-1)


def is_zero(damping: DampingLike) -> bool:
    """Whether a damping is the number 0 (a tensor is not: it may want a gradient)."""
    return isinstance(damping, (int, float)) and damping == 0


def collapse(value: Tensor) -> Tensor:
    """A vector without gradient whose entries are all equal, as a 0-d tensor."""
    if value.dim() == 0 or value.requires_grad or value.numel() == 0:
        return value
    return value[0] if bool((value == value[0]).all()) else value


def resolve_damping(operator: BaseLinearOperator, damping: DampingLike) -> Damping:
    """The normal form of a damping for an operator.

    Args:
        operator: what is to be damped.
        damping: a float, a 0-d or (P,) tensor, or {selector: either}; a vector in a mapping has the
            selected parameters' flat order, and parameters that no selector names are not damped.

    Raises:
        NotPositiveDefiniteError: negative damping.
        SpaceMismatchError: a wrong length, or selectors that overlap or match nothing.
    """
    if isinstance(damping, Mapping):
        return _by_selector(operator, damping)
    value = _tensor(operator, damping, operator.shape[-1], "damping")
    return Damping(value)


def _by_selector(operator: BaseLinearOperator, damping: Mapping[Any, float | Tensor]) -> Damping:
    space = operator.space
    if space is None:
        raise SpaceMismatchError(
            "damping by selector needs an operator with a parameter space; "
            "pass a number or a (P,) tensor"
        )
    parts: dict[str, Tensor] = {}
    constants: list[tuple[slice, Tensor]] = []
    for selector, given in damping.items():
        names = select(space, selector)
        if twice := [name for name in names if name in parts]:
            raise SpaceMismatchError(f"damping: the selector {selector!r} names {twice} again")
        sizes = [space.slices[name].stop - space.slices[name].start for name in names]
        value = _tensor(operator, given, sum(sizes), f"damping of {selector!r}")
        pieces = [value] * len(names) if value.dim() == 0 else value.split(sizes)
        for name, piece, size in zip(names, pieces, sizes, strict=True):
            parts[name] = piece.expand(size)
            if value.dim() == 0:
                constants.append((space.slices[name], value))
    zero = torch.zeros((), dtype=operator.dtype, device=operator.device)
    for name in space.names:
        if name not in parts:
            where = space.slices[name]
            parts[name] = zero.expand(where.stop - where.start)
            constants.append((where, zero))
    return Damping(torch.cat([parts[name] for name in space.names]), tuple(constants))


def _tensor(operator: BaseLinearOperator, damping: Any, size: int, what: str) -> Tensor:
    """A 0-d or (size,) tensor like the operator. A number is checked without a device read."""
    if isinstance(damping, Tensor):
        value = damping.to(operator.dtype)
        if value.shape == (1,):
            value = value.squeeze(0)
        if value.dim() > 0 and value.shape != (size,):
            raise SpaceMismatchError(
                f"expected {what} to be a number or of shape ({size},), got {tuple(value.shape)}"
            )
        if value.device != operator.device:
            if value.dim() > 0:
                raise SpaceMismatchError(
                    f"expected {what} on {operator.device}, got {value.device}: move it with .to()"
                )
            value = value.to(operator.device)
        lowest = float(value.detach().amin()) if value.numel() else 0.0
    else:
        if isinstance(damping, (bool, str)) or not isinstance(damping, numbers.Real):
            raise DataError(
                f"expected {what} to be a number or a tensor, got {described(damping)}: pass "
                "damping=1e-3, or torch.as_tensor(...) for one number for each parameter"
            )
        lowest = float(damping)
        value = torch.full((), lowest, dtype=operator.dtype, device=operator.device)
    if not lowest >= 0:
        raise NotPositiveDefiniteError(
            f"expected {what} >= 0, got {lowest:.6g}: to subtract a multiple of the identity, "
            "write F.add_diagonal(-c)"
        )
    return value
