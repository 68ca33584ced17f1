"""Proofs that products are those of one matrix: two numbers that are one in exact arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import NonFiniteError
from .engines import (
    HessianOf,
    JacobianOf,
    NotDifferentiableError,
    hessian_of,
    jacobian_of,
    lowest_precision,
)
from .source import BatchFunction

__all__ = ["prove_hessian", "prove_jacobian"]


def prove_jacobian(
    made: JacobianOf, batch: BatchFunction, parameters: Sequence[Tensor], mode: str
) -> None:
    """That both directions differentiate the same function: <u, J v> = <J^T u, v>."""
    if not bool((made.values < math.inf).all()):  # -infinity is right: it rules out a class
        raise NonFiniteError(
            "the network's values hold NaN or infinity: look for it in the inputs and the "
            "layers (torch.autograd.detect_anomaly says where)"
        )
    v = _random(parameters)
    (u,) = _random([made.values])

    def twice(made: JacobianOf, u: Tensor, v: Sequence[Tensor]) -> _Twice:
        along = made.jvp(v)
        return _Twice((u * along).sum(), _inner(made.vjp(u), v), along.norm())

    def again(batch: BatchFunction, moved: Sequence[Tensor]) -> _Twice:
        other = jacobian_of(mode, batch.values, moved, keep=False, taped=False)
        return twice(other, u.to(other.values), [p.to(moved[0]) for p in v])

    _require_equal(twice(made, u, v), batch, parameters, again)


def prove_hessian(
    made: HessianOf, batch: BatchFunction, parameters: Sequence[Tensor], mode: str
) -> None:
    """That the matrix is symmetric: <u, H v> = <v, H u>."""
    u, v = _random(parameters), _random(list(reversed(parameters)))[::-1]

    def twice(made: HessianOf, u: Sequence[Tensor], v: Sequence[Tensor]) -> _Twice:
        along = made.product(v)
        return _Twice(_inner(u, along), _inner(v, made.product(u)), _norm(along))

    def again(batch: BatchFunction, moved: Sequence[Tensor]) -> _Twice:
        other = hessian_of(mode, batch.values, moved, keep=False, taped=False)
        return twice(other, *([p.to(moved[0]) for p in vector] for vector in (u, v)))

    _require_equal(twice(made, u, v), batch, parameters, again)


def _random(like: Sequence[Tensor]) -> list[Tensor]:
    """Random signs, the same in every call."""
    device = like[0].device
    generator = torch.Generator(device=device).manual_seed(0)
    bits = (torch.randint(2, p.shape, device=device, generator=generator) for p in like)
    return [(2 * b - 1).to(p.dtype) for b, p in zip(bits, like, strict=True)]


def _inner(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum()


def _norm(parts: Sequence[Tensor]) -> Tensor:
    together: Tensor = torch.stack([part.norm() for part in parts]).norm()
    return together


class _Twice(NamedTuple):
    """One number, computed in two ways, and the size of the terms that it is a sum of."""

    first: Tensor
    second: Tensor
    size: Tensor

    @property
    def apart(self) -> float:
        """By how much the two differ, relative to the terms."""
        scale = self.size + self.first.abs()
        return float((self.first - self.second).abs() / scale) if bool(scale > 0) else 0.0


def _require_equal(
    given: _Twice,
    batch: BatchFunction,
    parameters: Sequence[Tensor],
    again: Callable[[BatchFunction, Sequence[Tensor]], _Twice],
) -> None:
    """Raise if two numbers that are one in exact arithmetic differ by more than rounding.

    What is rounding vanishes in float64: if the two differ, they are computed `again` there.
    """
    apart = given.apart
    if apart <= _tolerance(given.first.dtype):
        return
    if apart <= _tolerance(lowest_precision(batch.values, parameters)):
        return  # a function of float64 parameters that computes in less inside
    if given.first.dtype != torch.float64 and (wide := batch.wide()) is not None:
        moved = [p.detach().double().requires_grad_() for p in parameters]
        try:
            made = again(wide, moved)
        except (RuntimeError, TypeError):  # a model that only knows its own dtype
            pass
        else:
            if made.apart <= _tolerance(made.first.dtype):
                return
    raise NotDifferentiableError(
        "the derivative along a vector is not the transpose of the gradient, so some function of "
        f"the network has a wrong backward pass: the two differ by {apart:.1e} of the product"
    )


def _tolerance(dtype: torch.dtype) -> float:
    # in float32 a model may compute in less inside: TF32, or bfloat16 under autocast
    return 1e-8 if dtype == torch.float64 else 0.05
