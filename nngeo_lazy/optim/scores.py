"""Which loss a loop has, and its output directions, from gradients alone: targets are not seen."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from ..errors import DataError, TooLargeError
from ..likelihoods import Categorical, Likelihood, check_estimator, resolve_loss
from ..likelihoods.losses import CallableLoss, Reduction
from ..likelihoods.names import NAMES
from ..quantities import Fisher, GaussNewton, LossLike, Quantity

__all__ = ["Scores"]

MAX_DIRECTIONS = 1000  # of one example, in an exact curvature


class Scores:
    """The output directions of a loop's passes.

    Labels and masks are read off the gradient of the loop's loss at the outputs, where the
    likelihood reads any.

    Args:
        given: a likelihood or its name, a torch.nn loss module, or None for a categorical one that
            the first gradient proves.
        estimator: "exact", "mc" or "empirical".
    """

    def __init__(self, given: LossLike | None, estimator: str) -> None:
        check_estimator(estimator)
        if isinstance(given, str) and given not in NAMES:
            raise DataError(
                f"unknown likelihood {given!r}: expected one of {sorted(NAMES)}, an object from "
                "nngeo_lazy.likelihoods, or a torch.nn loss module"
            )
        fits = given is None or isinstance(given, (str, Likelihood, nn.Module))
        if not fits or isinstance(given, CallableLoss):
            raise DataError(
                "expected a likelihood or a torch.nn loss module, whose curvature can be told from "
                f"outputs and gradients, got {given!r}, which needs targets that the optimizer "
                "does not see: take estimator='empirical' without likelihood="
            )
        self.estimator = estimator
        self._given: LossLike | None = NAMES[given]() if isinstance(given, str) else given
        self._known: Likelihood | None = None
        self._reduction: Reduction | None = None
        self._quantities: dict[str, Quantity] = {}

    def described(self) -> dict[str, str | int | None]:
        """The quantity in plain words."""
        quantity = self._quantities.get(self.estimator)
        if quantity is not None:
            return quantity.described()
        return {"matrix": "Fisher", "loss": repr(self._known), "estimator": self.estimator}

    def target(self, outputs: Tensor, gradient: Tensor, exact: bool = False) -> Tensor | None:
        """What the gradient shows of a pass's target.

        Args:
            outputs: (N, ...).
            gradient: of the loop's loss there.
            exact: whether the exact curvature is wanted, whatever the estimator.

        Raises:
            DataError: the likelihood is not known, or is none.
        """
        if self._known is None:
            self._resolve(outputs, gradient, exact)
        known = self._known
        if known is None:
            return None
        target = known.target_of(outputs, gradient)
        if target is None and known.reweighted and not isinstance(known, Categorical):
            raise DataError(
                f"the curvature of {known!r} with {known.reweighted} needs labels, which the "
                "optimizer does not see: drop the weights, or take estimator='empirical'"
            )
        return target

    def quantity(self, outputs: Tensor, target: Tensor | None, exact: bool = False) -> Quantity:
        """The quantity whose directions are taken, fitted to a pass."""
        estimator = "exact" if exact else self.estimator
        if estimator not in self._quantities:
            if isinstance(self._given, nn.Module):
                self._quantities[estimator] = GaussNewton(self._given, estimator, 1)
            else:
                self._quantities[estimator] = Fisher(self._known, estimator, 1)
        quantity = self._quantities[estimator]
        quantity.fit(outputs, target)
        count = quantity.count(outputs, target)
        if self.estimator == "exact" and not exact and count > MAX_DIRECTIONS:
            raise TooLargeError(
                f"the exact curvature of outputs {tuple(outputs.shape)} takes {count} backward "
                f"passes, more than {MAX_DIRECTIONS}: take estimator='mc' (one)"
            )
        return quantity

    def num_terms(self, outputs: Tensor, target: Tensor | None) -> Tensor | int | None:
        """How many labels a pass scores; None where the likelihood is not known."""
        return None if self._known is None else self._known.num_terms(outputs, target)

    def denominator(self, outputs: Tensor, target: Tensor | None) -> Tensor | int:
        """A pass's part of what the loss is a mean over."""
        if self._reduction is None:
            return outputs.shape[0]
        return self._reduction.denominator(outputs, target)

    def total(self, denominators: float) -> float:
        """What sums over all examples are divided by."""
        return denominators if self._reduction is None else self._reduction.total(denominators)

    def _resolve(self, outputs: Tensor, gradient: Tensor, exact: bool) -> None:
        given = self._given
        if self.estimator == "empirical" and not exact and given is None:
            return  # the loop's own gradient, of a mean over examples
        if isinstance(given, nn.Module):
            known, self._reduction = resolve_loss(given, outputs, None)
            if isinstance(known, CallableLoss):
                raise DataError(
                    f"the curvature of {given!r} needs targets, which the optimizer does not see: "
                    "take a likelihood, or estimator='empirical' without likelihood="
                )
        else:
            known = _categorical(given, outputs, gradient)  # type: ignore[arg-type]
            known.require_likelihood("exact" if exact else self.estimator)
        if isinstance(known, Categorical) and known.weight is not None and known.label_smoothing:
            raise DataError(
                "the curvature of a loss with class weights and label smoothing needs labels, "
                "which the optimizer cannot tell from gradients: drop one of the two"
            )
        self._known = known


def _categorical(given: Likelihood | None, outputs: Tensor, gradient: Tensor) -> Likelihood:
    """The likelihood; one with classes in a dimension that is not given, where the loss proves it.

    Along the right dimension the gradient is a multiple of p - e_y.
    """
    ambiguous = isinstance(given, Categorical) and given.class_dim is None and outputs.dim() > 2
    if given is not None and not ambiguous:
        return given
    start = Categorical() if given is None else given
    for dim in dict.fromkeys((outputs.dim() - 1, 1)):
        if outputs.dim() < 2 or outputs.shape[dim] < 2 or not bool(gradient.any()):
            continue
        candidate: Likelihood = replace(start, class_dim=dim)  # type: ignore[type-var]
        labels = candidate.target_of(outputs, gradient)
        (score,) = candidate.directions(outputs, labels, "empirical")
        along = (score * gradient).sum() / score.square().sum()
        rest = torch.linalg.vector_norm(gradient - along * score)
        eps = torch.finfo(gradient.dtype).eps
        if bool((along > 0) & (rest <= eps**0.5 * torch.linalg.vector_norm(gradient))):
            return candidate
    raise DataError(
        f"cannot tell the likelihood from outputs {tuple(outputs.shape)} and the gradient of the "
        "loss, which is that of no softmax cross-entropy with equal weights, or zero: pass "
        f"likelihood= with one of {sorted(NAMES)}, an object such as "
        "nngeo_lazy.likelihoods.Categorical(class_dim=1), or the torch.nn loss module"
    )
