"""What a posterior is made of, checked: F, its likelihood and its parameters, and the prior."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError, NotPositiveDefiniteError, SpaceMismatchError
from ..likelihoods import Likelihood, LikelihoodLike, described, of_heads, resolve
from ..likelihoods.losses import PER_EXAMPLE
from ..operators import BaseLinearOperator
from ..operators.damping import DampingLike, resolve_damping
from ..operators.vectors import VectorLike
from ..selectors import space_of
from ..space import ParamSpace

__all__ = ["flat_vector", "likelihood_of", "num_examples_of", "positive", "space_in"]


def num_examples_of(F: Any) -> int:
    """How many examples F is a mean over."""
    if not isinstance(F, BaseLinearOperator) or F.space is None or F.num_examples is None:
        raise DataError(
            "expected a Fisher or Gauss-Newton matrix that knows its parameters and how many "
            f"examples it is a mean over, as FIM returns it, got {type(F).__name__}"
        )
    reduction = F.info.quantity.get("reduction", PER_EXAMPLE)
    if reduction != PER_EXAMPLE and F.num_terms != F.num_examples:
        raise DataError(
            f"expected a matrix whose sum over examples is num_examples * F, but its loss is "
            f"reduced otherwise ({reduction}): build it with a likelihood, as in "
            "likelihoods.Gaussian()"
        )
    return F.num_examples


def likelihood_of(F: BaseLinearOperator, given: LikelihoodLike | None) -> Likelihood | None:
    """The likelihood of F's build, or the given one if that is not known."""
    text = F.info.quantity.get("loss")
    own = None if text is None else described(str(text))
    if given is not None:
        given = resolve(of_heads(given), torch.empty(0, device="cpu"), None)
        if own is not None and repr(own) != repr(given):
            raise DataError(f"expected the likelihood of F, {own}, got {given}")
        own = given
    if own is not None and own.reweighted:
        raise DataError(
            f"a posterior needs a likelihood, and a loss with {own.reweighted} is none: build F "
            "without"
        )
    return own


def space_in(model: nn.Module, F: BaseLinearOperator) -> ParamSpace:
    """F's parameters in the model."""
    expected = F.space
    if expected is None:
        raise SpaceMismatchError("expected an operator over parameters")
    space = space_of(model, list(expected.names))
    if space != expected:
        raise SpaceMismatchError(
            f"expected F over parameters of the model, {space}, got one over {expected}"
        )
    return space


def flat_vector(space: ParamSpace, given: VectorLike | None, like: Tensor, what: str) -> Tensor:
    """A vector over the parameters, flat or by name; zero by default."""
    if given is None:
        return torch.zeros_like(like)
    flat = space.ravel(given) if isinstance(given, Mapping) else given
    if not isinstance(flat, Tensor) or flat.shape != like.shape:
        got = tuple(flat.shape) if isinstance(flat, Tensor) else repr(flat)
        raise SpaceMismatchError(
            f"expected {what} to be flat ({len(space)},) or by name, got {got}"
        )
    return flat.detach().to(like)


def positive(F: BaseLinearOperator, prior: DampingLike) -> Tensor:
    """The diagonal of a prior precision (P,)."""
    value = resolve_damping(F, prior).value
    if not bool((value > 0).all()) or not bool(value.isfinite().all()):
        raise NotPositiveDefiniteError(
            "expected a positive, finite prior precision for every parameter, got one from "
            f"{float(value.min()):.3g} to {float(value.max()):.3g}; a mapping must name them all"
        )
    return value.expand(F.shape[-1])
