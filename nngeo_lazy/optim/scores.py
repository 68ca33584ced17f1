"""Which loss a loop has, and its output directions, from gradients alone: targets are not seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from ..errors import DataError, LikelihoodWarning, TooLargeError
from ..likelihoods import (
    Bernoulli,
    Categorical,
    Gaussian,
    Likelihood,
    Poisson,
    Weighted,
    check_estimator,
    resolve_loss,
)
from ..likelihoods.losses import CallableLoss, Reduction
from ..likelihoods.names import NAMES
from ..operators.warn import warn
from ..quantities import Fisher, GaussNewton, LossLike, Quantity
from .options import Losses
from .passed import Passed
from .recognise import placed, recognised

__all__ = ["HeadScores", "Scores"]

UNSEEN = (CallableLoss, Weighted)  # losses that read what a gradient does not show
MAX_DIRECTIONS = 1000  # of one example, in an exact curvature


class HeadScores:
    """The output directions of one head in a loop's passes.

    Labels and masks are read off the gradient of the loop's loss at the outputs, if the
    likelihood reads any.

    Args:
        given: a likelihood or its name, a torch.nn loss module, or None for a categorical one that
            the first gradient proves.
        estimator: "exact", "mc" or "empirical".
    """

    def __init__(self, given: LossLike | None, estimator: str) -> None:
        check_estimator(estimator)
        if estimator == "empirical_positions":
            raise DataError(
                "an optimizer sees one gradient of each example: take estimator='empirical', 'mc' "
                "or 'exact'"
            )
        if isinstance(given, str) and given not in NAMES:
            raise DataError(
                f"unknown likelihood {given!r}: expected one of {sorted(NAMES)}, an object from "
                "nngeo_lazy.likelihoods, or a torch.nn loss module"
            )
        fits = given is None or isinstance(given, (str, Likelihood, nn.Module))
        if not fits or isinstance(given, UNSEEN):
            raise DataError(
                "expected a likelihood or a torch.nn loss module, whose curvature can be told from "
                f"outputs and gradients, got {given!r}, which needs targets that the optimizer "
                "does not see: take estimator='empirical' without likelihood="
            )
        self.estimator = estimator  # "empirical" from the first pass on whose loss is not known
        self._given: LossLike | None = NAMES[given]() if isinstance(given, str) else given
        self._known: Likelihood | None = None
        self._reduction: Reduction | None = None
        self._quantities: dict[str, Quantity] = {}

    @property
    def known(self) -> Likelihood | None:
        """The likelihood, as far as it is known."""
        return self._known

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
        if self._known is None and estimator != "empirical":
            raise DataError(
                "expected a likelihood, or a gradient of the loss that shows it, but the gradient "
                f"at the outputs {tuple(outputs.shape)} is zero: pass likelihood= with one of "
                f"{sorted(NAMES)}, or an object from nngeo_lazy.likelihoods"
            )
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
        """How many labels a pass scores; None if the likelihood is not known."""
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
        if given is None and not exact:
            self._resolve_unnamed(outputs, gradient)
            return
        if isinstance(given, nn.Module):
            known, self._reduction = resolve_loss(given, outputs, None)
            if isinstance(known, CallableLoss):
                raise DataError(
                    f"the curvature of {given!r} needs targets, which the optimizer does not see: "
                    "take a likelihood, or estimator='empirical' without likelihood="
                )
        else:
            found = placed(given, outputs, gradient)  # type: ignore[arg-type]
            if found is None:
                raise DataError(_unknown(outputs))
            known = found
            known.require_likelihood("exact" if exact else self.estimator)
            self._compare(known, outputs, gradient)
        if isinstance(known, Categorical) and known.weight is not None and known.label_smoothing:
            raise DataError(
                "the curvature of a loss with class weights and label smoothing needs labels, "
                "which the optimizer cannot tell from gradients: drop one of the two"
            )
        self._known = known

    def _resolve_unnamed(self, outputs: Tensor, gradient: Tensor) -> None:
        """Recognise the likelihood, or go on with the loop's own gradients."""
        if not bool(gradient.any()):
            return  # it shows nothing: the next one may
        self._known = recognised(outputs, gradient)
        if self._known is None and self.estimator != "empirical":
            self.estimator = "empirical"
            warn(
                LikelihoodWarning(
                    f"{_unknown(outputs)}. Until then the curvature is that of the loop's own "
                    "gradients (estimator='empirical')"
                )
            )

    def _compare(self, known: Likelihood, outputs: Tensor, gradient: Tensor) -> None:
        """Warn if the loss is that of another likelihood."""
        if known.reweighted or not bool(gradient.any()):
            return
        if type(known) not in (Categorical, Bernoulli, Gaussian, Poisson):
            return  # a likelihood of one's own: what its gradients look like is not known
        other = recognised(outputs, gradient)
        wrong = other is not None and type(other) is not type(known)
        if wrong or (other is None and isinstance(known, Categorical) and not known.shift):
            named = "none that is known" if other is None else repr(other)
            warn(
                LikelihoodWarning(
                    f"the gradient of the loss at the outputs is not that of {known!r}, but that "
                    f"of {named}: pass the likelihood= of the loss, or none with "
                    "estimator='empirical'"
                )
            )


class Scores:
    """The output directions of a loop's passes, for each of the heads that have a loss.

    Args:
        given: what `HeadScores` takes, or a mapping or a sequence with one for each head.
        estimator: "exact", "mc" or "empirical".

    Attributes:
        heads: of each.
        several: whether the heads are named.
    """

    def __init__(self, given: Losses, estimator: str) -> None:
        self.several = isinstance(given, (Mapping, Sequence)) and not isinstance(given, str)
        each = [given]
        if self.several:
            each = list(given.values() if isinstance(given, Mapping) else given)  # type: ignore
            if not each:
                raise DataError(
                    f"expected a likelihood for each of several heads, got {given!r}: name at "
                    "least one, or pass likelihood=None for a model with one output"
                )
            if estimator != "empirical" and any(one is None for one in each):
                raise DataError(
                    f"expected a likelihood for each of several heads, got {given!r}: name all of "
                    f"them (one of {sorted(NAMES)}, an object, or a torch.nn loss module), or take "
                    "estimator='empirical'"
                )
        self.heads = [HeadScores(one, estimator) for one in each]  # type: ignore[arg-type]

    def of(self, passed: Passed) -> HeadScores:
        """Those of a pass's head."""
        return self.heads[passed.head]

    @property
    def estimator(self) -> str:
        """Which output gradients are taken."""
        return self.heads[0].estimator

    @estimator.setter
    def estimator(self, estimator: str) -> None:
        for head in self.heads:
            head.estimator = estimator

    def described(self) -> dict[str, str | int | None]:
        """The quantity in plain words."""
        each = [head.described() for head in self.heads]
        if len(each) == 1:
            return each[0]
        losses = ", ".join(str(one["loss"]) for one in each)
        return {"matrix": "Fisher", "loss": losses, "estimator": self.estimator}

    def totals(self, parts: Sequence[tuple[int, float]]) -> dict[int, float]:
        """What each head's loss is a mean over, from (head, a pass's part of it)."""
        sums = {head: 0.0 for head, _ in parts}
        for head, part in parts:
            sums[head] += part
        return {head: self.heads[head].total(found) for head, found in sums.items()}


def _unknown(outputs: Tensor) -> str:
    return (
        f"cannot tell the likelihood from outputs {tuple(outputs.shape)} and the gradient of the "
        "loss, which is that of no softmax or logistic cross-entropy: pass likelihood= with one of "
        f"{sorted(NAMES)}, an object such as nngeo_lazy.likelihoods.Categorical(class_dim=1), or "
        "the torch.nn loss module"
    )
