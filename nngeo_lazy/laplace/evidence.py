"""What the data say about a posterior: the evidence, and the choice of a prior and a noise."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import Any, TypeVar, cast

from torch import Tensor, nn

from ..arguments import NonNegativeInt, checked
from ..errors import DataError
from ..likelihoods import Likelihood
from ..operators import BaseLinearOperator
from ..operators.damping import DampingLike
from ..precision import widest
from ..space import ParamSpace
from .checks import likelihood_of, positive
from .fitting import chosen, maximised
from .noise import Fit, fitted
from .subset import principal
from .variance import log_likelihood, scaled

__all__ = ["Evidence"]

Own = TypeVar("Own", bound="Evidence")
CACHED = ("covariance", "_uncertain", "_inner", "_accurate")


class Evidence:
    """A posterior N(w, (N F / T + Lambda)^-1) without what it predicts."""

    operator: BaseLinearOperator
    space: ParamSpace
    prior_precision: DampingLike
    prior_mean: Tensor
    mean: Tensor
    temperature: float
    num_examples: int
    subset: Tensor | None
    likelihood: Likelihood | None
    _noise: float | Tensor  # the likelihood's variance, in units of F's own
    _forward: Callable[[nn.Module, Any], Tensor] | None

    # --- evidence --------------------------------------------------------------------------------

    def log_marginal_likelihood(self, prior_precision: DampingLike | None = None) -> Tensor:
        r"""The Laplace approximation of the evidence log p(D), a 0-d tensor in float64.

        .. math:: \tfrac1T \log p(D | \hat w) - \tfrac12 |\hat w - \mu_0|_\Lambda^2
            + \tfrac12 \log\det \Lambda - \tfrac12 \log\det(N F / T + \Lambda)

        Differentiable in the prior precision. Exact for a linear model with a Gaussian likelihood
        at its posterior mean.

        Args:
            prior_precision: Lambda, as in the constructor; its own by default.

        Raises:
            DataError: F was built from batches without labels.

        Source: MacKay (1992), Bayesian interpolation, eq. 2.10.
        """
        given = self.prior_precision if prior_precision is None else prior_precision
        return self._evidence(given, self._noise)

    def _evidence(self, given: DampingLike, noise: float | Tensor) -> Tensor:
        """At a prior precision, and a variance of the labels in units of F's own."""
        likelihood = self._require_likelihood("the evidence")
        known = self.operator.info.log_likelihood
        if known is None:
            raise DataError(
                "the evidence needs log p(D | w) of the labels, but F was built from batches "
                "without labels (or with some that do not fit its likelihood): build it from "
                "(inputs, target) batches, or with target="
            )
        F, terms, prior = self._accurate, self._terms(noise), self._prior(given)
        fit = log_likelihood(likelihood, self._noise, known, self.operator, noise)
        offset = self._own(self.mean - self.prior_mean).to(F.dtype)
        logdet = F.damped(self._damping(given, noise)).logdet() - (prior / terms).log().sum()
        squares = (prior * offset.square()).sum()
        evidence: Tensor = fit / self.temperature - squares / 2 - logdet / 2
        return evidence

    @checked
    def fit_prior_precision(
        self: Own,
        structure: str = "scalar",
        *,
        noise: bool = False,
        bounds: tuple[float, float] = (1e-6, 1e6),
        max_iter: NonNegativeInt = 200,
    ) -> Own:
        """The same posterior with the prior precision that maximises the evidence.

        By L-BFGS over its logarithm, from the one it has.

        Args:
            structure: "scalar": one number; "layer": one for each module that owns parameters;
                "diagonal": one for each parameter.
            noise: whether the variance of normal labels is fitted with it, as a multiple of the one
                that F was built with. The new posterior's `likelihood` has it.
            bounds: of each number. A group of parameters that the data do not need goes to the
                upper one.
            max_iter: of L-BFGS.

        Returns:
            A new `Laplace`; this one stays as it is.

        Raises:
            UnsupportedLayerError: the log-determinant of F is only known as an estimate.
            DataError: as `log_marginal_likelihood`; a noise to fit if the labels are not normal.

        Warns:
            ConvergenceWarning: the search ended before its tolerance.
        """
        prior, multiple = maximised(self, structure, noise, bounds, max_iter)
        found = self.with_prior(prior)
        if noise:
            found.likelihood = scaled(self._require_likelihood("a noise"), multiple / self._noise)
            found._noise = multiple
        return found

    @checked
    def fit_noise(
        self: Own,
        loader: Any,
        build: Callable[[Likelihood], BaseLinearOperator],
        *,
        per_output: bool = True,
        structure: str | None = "scalar",
        target: Callable[[Any], Tensor] | None = None,
        tol: float = 1e-4,
        max_iter: NonNegativeInt = 100,
    ) -> Own:
        r"""The same posterior with the noise of normal labels, and a prior, of most evidence.

        .. math:: \sigma_c^2 = \frac{\sum_n r_{nc}^2}{\sum_n w_n - \gamma_c}, \qquad
            \gamma_c = \sum_n w_n v_{nc} / \sigma_c^2

        with the residuals r of all labels, their weights w (1 without `Weighted`) and the variances
        v of the outputs: gamma is how many parameters an output determines. It is the evidence's
        stationary point for fixed parameters. Each iteration builds F anew with that variance.

        Args:
            loader: the training data with labels.
            build: from a likelihood to F, such as
                `lambda likelihood: ng.FIM(model, loader, "kfac", likelihood=likelihood)`.
            per_output: whether each output of the last dimension has its own variance.
            structure: of the prior that is fitted with it, as in `fit_prior_precision`; None keeps
                the prior.
            target: `batch -> target` in place of the default.
            tol: of the relative change of a variance in an iteration.
            max_iter: the most iterations.

        Returns:
            A new posterior; its `likelihood` has the variance, and its `operator` is what `build`
            returned for it.

        Raises:
            DataError: labels that are not normal, none at all, or an F of other parameters or data.

        Warns:
            ConvergenceWarning: the variances still change after `max_iter` iterations.

        Source: MacKay (1992), Bayesian interpolation, eq. 4.12.
        """
        how = Fit(loader, build, per_output, structure, target, tol, max_iter)
        return cast(Own, fitted(cast(Any, self), how))

    def grid_search(
        self: Own,
        loader: Any,
        *,
        grid: Iterable[DampingLike] | None = None,
        metric: Callable[[Any, Tensor], Any] | None = None,
        method: str = "probit",
        target: Callable[[Any], Tensor] | None = None,
    ) -> Own:
        """The same posterior with the prior precision that predicts held-out labels best.

        Args:
            loader: held-out data with labels.
            grid: the prior precisions; by default 21 numbers from 1e-4 to 1e4.
            metric: (what `predictive` returns for all of the data, their labels) -> a number, the
                lower the better; by default the mean of -log p(y).
            method: of `predictive`.
            target: `batch -> target` in place of the default.

        Raises:
            DataError: no labels, or a metric that is no number for any of the grid.
        """
        return chosen(self, loader, grid, metric, method, target, self._forward)

    def with_prior(self: Own, prior_precision: DampingLike) -> Own:
        """The same posterior with another prior precision, as in the constructor."""
        positive(self.operator, prior_precision)
        made = object.__new__(type(self))
        kept = {k: v for k, v in vars(self).items() if k not in CACHED[:2]}
        made.__dict__.update(kept)
        made.prior_precision = prior_precision
        return made

    def with_operator(self: Own, F: BaseLinearOperator) -> Own:
        """The same posterior with another F of the same parameters and as many examples.

        Raises:
            DataError: it is over others.
        """
        if F.space != self.space or F.num_examples != self.num_examples:
            raise DataError(
                f"expected F over {self.space} and {self.num_examples} examples, got one over "
                f"{F.space} and {F.num_examples}: let build= take the same model and data"
            )
        made = object.__new__(type(self))
        made.__dict__.update({k: v for k, v in vars(self).items() if k not in CACHED})
        made.operator, made.likelihood, made._noise = F, likelihood_of(F, None), 1.0
        return made

    # --- parts -----------------------------------------------------------------------------------

    @cached_property
    def _inner(self) -> BaseLinearOperator:
        """F, over the parameters that are uncertain."""
        return self.operator if self.subset is None else principal(self.operator, self.subset)

    @cached_property
    def _accurate(self) -> BaseLinearOperator:
        """F in float64 if it is stored.

        The evidence is a difference of large sums, and a weak prior is below single precision's
        rounding of F.
        """
        return self._inner if self._inner.iterates else self._inner.to(widest(self._inner.device))

    def _terms(self, noise: Any = None) -> Any:
        """How often F counts: N, less if the posterior is warm or the labels are noisy."""
        noise = self._noise if noise is None else noise
        return self.num_examples / (self.temperature * noise)

    def _damping(self, prior: DampingLike, noise: Any = None) -> Any:
        """The damping of F that stands for a prior precision."""
        n = self._terms(noise)
        if self.subset is not None:
            return self._prior(prior) / n
        if isinstance(prior, Mapping):
            return {selector: _divided(value, n) for selector, value in prior.items()}
        return _divided(prior, n)

    def _prior(self, given: DampingLike) -> Tensor:
        """The diagonal of a prior precision, of the parameters that are uncertain, in float64."""
        whole = (
            self.operator
            if self.operator.iterates
            else self.operator.to(widest(self.operator.device))
        )
        return self._own(positive(whole, given))

    def _own(self, vector: Tensor) -> Tensor:
        """The entries of a flat vector that are uncertain."""
        return vector if self.subset is None else vector[self.subset]

    def _require_likelihood(self, what: str) -> Likelihood:
        if self.likelihood is None:
            raise DataError(
                f"{what} needs a likelihood, and F does not say which one it is of: pass "
                "likelihood=; a loss that is no likelihood has none"
            )
        return self.likelihood


def _divided(value: float | Tensor, n: Any) -> Any:
    """In float64, whatever F's own precision is."""
    return value.double() / n if isinstance(value, Tensor) else value / n
