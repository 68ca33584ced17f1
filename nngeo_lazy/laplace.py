"""The Laplace approximation: a Gaussian over the parameters, and what it predicts."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from scipy import optimize
from torch import Tensor, nn

from .arguments import NonNegativeInt, PositiveInt, checked
from .builders import Jacobian
from .data import Batches
from .errors import (
    ConvergenceWarning,
    DataError,
    EstimateWarning,
    NotPositiveDefiniteError,
    SpaceMismatchError,
    UnsupportedLayerError,
    wrong_option,
)
from .likelihoods import Likelihood, described, resolve
from .likelihoods.losses import PER_EXAMPLE
from .network import Network
from .operators import BaseLinearOperator
from .operators.damping import DampingLike, resolve_damping
from .operators.kernel import kernel_of
from .operators.vectors import VectorLike
from .prediction import METHODS, Prediction, labels
from .selectors import space_of
from .space import ParamSpace

__all__ = ["Laplace"]

STRUCTURES = ("scalar", "layer", "diagonal")
PIECE = 128  # examples of a tensor whose Jacobian is held at a time


class Laplace:
    r"""The Laplace approximation of a network's posterior, by any representation of its Fisher.

    .. math:: p(w | D) \approx N(\hat w, \Sigma), \qquad
        \Sigma = (N F + \Lambda)^{-1}, \qquad p(w) = N(\mu_0, \Lambda^{-1})

    with N examples, F their mean Fisher (or Gauss-Newton, or Hessian) at the trained parameters
    and Lambda the precision of a Gaussian prior. F over some of the parameters, as of the last
    layer (`params="head"`), gives a posterior over those alone. Predictions linearise the network:
    f(x) + J(x) (w - \hat w).

    Args:
        model: the network, at the parameters at which F was built. They are copied.
        F: what `FIM` or `GGN` returned, in any representation.
        prior_precision: Lambda, positive: a number, a 0-d or (P,) tensor, or {selector: either}
            that names every parameter.
        prior_mean: mu_0, flat or by name; zero by default.
        likelihood: of F; needed if F does not say, as after a sum. It must be F's own.
        forward: `(model, batch) -> outputs` in place of the default call, as for F.

    Raises:
        DataError: F is no mean over examples, its loss is no likelihood's, or another one's.
        SpaceMismatchError: F is not over parameters of the model, or the prior does not fit.
        NotPositiveDefiniteError: a prior precision that is not positive.

    Example:
        >>> import nngeo_lazy as ng
        >>> model, x, y = nn.Linear(3, 2), torch.randn(20, 3), torch.randint(2, (20,))
        >>> la = Laplace(model, ng.FIM(model, (x, y), "kfac"), prior_precision=2.0)
        >>> mean, covariance = la.functional(x)
        >>> mean.shape, covariance.shape, la.predictive(x).shape, la.sample(5, seed=0).shape
        (torch.Size([20, 2]), torch.Size([20, 2, 2]), torch.Size([20, 2]), torch.Size([5, 8]))

    Source: MacKay (1992), A practical Bayesian framework; Immer, Korzepa and Bauer (2021), Local
        linearization; Daxberger et al. (2021), Laplace redux.
    """

    @checked
    def __init__(
        self,
        model: nn.Module,
        F: BaseLinearOperator,
        *,
        prior_precision: DampingLike = 1.0,
        prior_mean: VectorLike | None = None,
        likelihood: str | Likelihood | None = None,
        forward: Callable[[nn.Module, Any], Tensor] | None = None,
    ) -> None:
        self.operator, self.prior_precision = F, prior_precision
        self.num_examples = _num_examples(F)
        self.likelihood = _likelihood_of(F, likelihood)
        self._forward = forward
        space = self.space = _space_in(model, F)
        self.mean = space.values(model).detach().clone().to(F.dtype)
        self.prior_mean = _flat(space, prior_mean, self.mean)
        batches = Batches(self.mean, device=self.mean.device, forward=forward)
        self._network = Network(model, space, batches.forward)
        _require_positive(F, prior_precision)

    def __repr__(self) -> str:
        given = self.prior_precision
        prior = f"{float(given):.4g}" if isinstance(given, (int, float)) else type(given).__name__
        return f"Laplace({self.operator!r}, {self.likelihood}, prior_precision={prior})"

    # --- the posterior ---------------------------------------------------------------------------

    @property
    def precision(self) -> BaseLinearOperator:
        """N F + Lambda, P x P, in the structure of F."""
        damped = self.operator.damped(self._per_example(self.prior_precision))
        return cast(BaseLinearOperator, self.num_examples * damped)

    @cached_property
    def covariance(self) -> BaseLinearOperator:
        """(N F + Lambda)^-1, P x P, in the structure of F."""
        inverse = self._accurate.inverse(damping=self._per_example(self.prior_precision))
        inverse = inverse.to(self.operator.dtype)
        return cast(BaseLinearOperator, (1 / self.num_examples) * inverse)

    @checked
    def sample(self, n: PositiveInt, *, seed: int | None = None) -> Tensor:
        """Parameters (n, P) from the posterior; `la.space.unravel` names them.

        Args:
            n: how many.
            seed: for draws of their own; by default from torch's global generator.
        """
        return self.mean + self.covariance.sample(n, seed=seed)

    # --- predictions -----------------------------------------------------------------------------

    def functional(self, x: Any) -> Prediction:
        r"""The posterior of the linearised network's outputs, N(f(x), J(x) Sigma J(x)^T).

        Args:
            x: inputs: a tensor, or whatever a loader may be.

        Returns:
            `mean, covariance`: (N, C) and (N, C, C), C all outputs of an example.

        Raises:
            DataError: the inputs do not fit the network, or it changed in what F does not select.
        """
        found, _ = self._functional(x)
        return found

    @checked
    def predictive(
        self,
        x: Any,
        method: str = "probit",
        *,
        samples: PositiveInt = 1000,
        seed: int | None = None,
    ) -> Tensor | Prediction:
        r"""What the posterior predicts for the labels of new inputs, the mean over its parameters.

        Args:
            x: inputs: a tensor, or whatever a loader may be.
            method: for classes; the other likelihoods are exact.
                "probit": softmax(m_c / sqrt(1 + pi v_c / 8)), v_c the variance of output c;
                "mc": the mean over draws of the outputs;
                "bridge": the mean of the Dirichlet distribution that has the outputs' mode and
                curvature in logit space.
            samples: draws, for "mc".
            seed: of the draws.

        Returns:
            Categorical: probabilities (N, C). Bernoulli: the probability of label 1 (N, C).
            Poisson: expected counts (N, C), exp(m + v / 2). Gaussian: a `Prediction` of the labels,
            with their noise.

        Raises:
            DataError: outputs that do not fit the likelihood, or a loss that is none.

        Source: MacKay (1992), The evidence framework applied to classification networks; Gibbs
            (1997) on several classes; Hobbhahn, Kristiadi and Hennig (2022), Fast predictive
            uncertainty for classification with Bayesian deep networks, eq. 5, on the bridge.
        """
        if method not in METHODS:
            raise ValueError(wrong_option("method", method, METHODS, "laplace"))
        likelihood = self._require_likelihood("a predictive distribution of labels")
        found, shape = self._functional(x)
        return labels(likelihood, found, shape, method, samples=samples, seed=seed)

    # --- evidence --------------------------------------------------------------------------------

    def log_marginal_likelihood(self, prior_precision: DampingLike | None = None) -> Tensor:
        r"""The Laplace approximation of the evidence log p(D), a 0-d tensor in float64.

        .. math:: \log p(D | \hat w) - \tfrac12 |\hat w - \mu_0|_\Lambda^2
            + \tfrac12 \log\det \Lambda - \tfrac12 \log\det(N F + \Lambda)

        Differentiable in the prior precision. Exact for a linear model with a Gaussian likelihood
        at its posterior mean.

        Args:
            prior_precision: Lambda, as in the constructor; its own by default.

        Raises:
            DataError: F was built from batches without labels.

        Source: MacKay (1992), Bayesian interpolation, eq. 2.10.
        """
        self._require_likelihood("the evidence")
        known = self.operator.info.log_likelihood
        if known is None:
            raise DataError(
                "the evidence needs log p(D | w) of the labels, but F was built from batches "
                "without labels (or with some that do not fit its likelihood): build it from "
                "(inputs, target) batches, or with target="
            )
        F, n = self._accurate, self.num_examples
        given = self.prior_precision if prior_precision is None else prior_precision
        prior = _require_positive(F, given)
        offset = self.mean.to(F.dtype) - self.prior_mean.to(F.dtype)
        logdet = F.damped(self._per_example(given)).logdet() - (prior / n).log().sum()
        return known - (prior * offset.square()).sum() / 2 - logdet / 2

    @checked
    def fit_prior_precision(
        self,
        structure: str = "scalar",
        *,
        bounds: tuple[float, float] = (1e-6, 1e6),
        max_iter: NonNegativeInt = 200,
    ) -> Laplace:
        """The same posterior with the prior precision that maximises the evidence.

        By L-BFGS over its logarithm, from the one it has.

        Args:
            structure: "scalar": one number; "layer": one for each module that owns parameters;
                "diagonal": one for each parameter.
            bounds: of each number. A group of parameters that the data do not need goes to the
                upper one.
            max_iter: of L-BFGS.

        Returns:
            A new `Laplace`; this one stays as it is.

        Raises:
            UnsupportedLayerError: the log-determinant of F is only known as an estimate.
            DataError: as `log_marginal_likelihood`.

        Warns:
            ConvergenceWarning: the search ended before its tolerance.
        """
        if structure not in STRUCTURES:
            raise ValueError(wrong_option("structure", structure, STRUCTURES, "laplace"))
        F, groups = self._accurate, self._groups(structure)
        start = _require_positive(F, self.prior_precision).detach()
        means = [float(start[index].log().mean()) for index in groups.values()]
        x0 = start.log().cpu().numpy() if structure == "diagonal" else np.array(means)

        def negative(x: Any) -> tuple[float, Any]:
            logs = torch.tensor(x, dtype=torch.float64, device=F.device, requires_grad=True)
            with torch.enable_grad():
                evidence = self.log_marginal_likelihood(_prior(logs.exp(), structure, groups))
                evidence.backward()
            slope = torch.zeros_like(logs) if logs.grad is None else logs.grad
            return -float(evidence.detach()), -slope.cpu().numpy()

        limits = [(math.log(bounds[0]), math.log(bounds[1]))] * len(x0)
        with warnings.catch_warnings(), torch.inference_mode(False):
            warnings.simplefilter("error", EstimateWarning)
            try:
                found = optimize.minimize(
                    negative,
                    np.clip(x0, *limits[0]),
                    jac=True,
                    method="L-BFGS-B",
                    bounds=limits,
                    options={"maxiter": max_iter},
                )
            except EstimateWarning as estimate:
                raise UnsupportedLayerError(
                    f"the evidence with a {structure} prior precision needs the exact "
                    "log-determinant of F, of which this representation knows an estimate only "
                    f"({estimate}): a scalar or one for each layer is closed for 'kfac' and the "
                    "other stored representations, a diagonal for those but 'kfac' and 'ekfac'"
                ) from None
        if not found.success:
            slope = float(np.abs(found.jac).max())
            words = (
                f"the search for a prior precision ended early ({found.message}): its gradient is "
                f"still {slope:.2g}; raise max_iter"
            )
            warnings.warn(ConvergenceWarning(words, slope, int(found.nit)), stacklevel=2)
        best = torch.tensor(found.x, dtype=torch.float64, device=F.device).exp()
        return self.with_prior(_prior(best, structure, groups))

    def with_prior(self, prior_precision: DampingLike) -> Laplace:
        """The same posterior with another prior precision, as in the constructor."""
        _require_positive(self.operator, prior_precision)
        made = object.__new__(type(self))
        made.__dict__.update({k: v for k, v in vars(self).items() if k != "covariance"})
        made.prior_precision = prior_precision
        return made

    # --- parts -----------------------------------------------------------------------------------

    @cached_property
    def _accurate(self) -> BaseLinearOperator:
        """F in float64 if it is stored.

        The evidence is a difference of large sums, and a weak prior is below single precision's
        rounding of F.
        """
        return self.operator if self.operator.iterates else self.operator.to(torch.float64)

    def _per_example(self, prior: DampingLike) -> DampingLike:
        """The damping of F that stands for a prior precision of N F."""
        n = self.num_examples
        if isinstance(prior, Mapping):
            return {selector: _divided(value, n) for selector, value in prior.items()}
        return _divided(prior, n)

    def _groups(self, structure: str) -> dict[tuple[str, ...], Tensor]:
        """The parameters that share a number, with their places in the flat vector."""
        if structure == "scalar":
            return {self.space.names: torch.arange(len(self.space))}
        owners: dict[str, list[str]] = {}
        for name in self.space.names:
            owners.setdefault(self.space.owner(name), []).append(name)
        places = torch.arange(len(self.space))
        return {
            tuple(names): torch.cat([places[self.space.slices[name]] for name in names])
            for names in owners.values()
        }

    def _batches(self, x: Any) -> Iterator[Any]:
        """Batches, moved to the device; a tensor in pieces."""
        pieces = x.split(PIECE) if isinstance(x, Tensor) and x.dim() > 0 else (x,)
        for piece in pieces:
            batches = Batches(piece, device=self.mean.device, forward=self._forward)
            with closing(iter(batches)) as each:
                for batch in each:
                    yield batch.raw

    def _functional(self, x: Any) -> tuple[Prediction, torch.Size]:
        """The posterior of the outputs, and the shape of an example's."""
        names = list(self.space.names)
        parameters = list(self.space.unravel(self.mean).values())
        means, covariances = [], []
        model = self._network.at(self.mean)
        with torch.inference_mode(False), torch.no_grad():
            for raw in self._batches(x):
                with self._network.scope():
                    means.append(self._network(parameters, raw).detach())
                J = Jacobian(model, raw, "factored", params=names, forward=self._forward)
                kernel = kernel_of(J, J, self.covariance, outputs="per_example")
                covariances.append(kernel.to_dense())
        mean = torch.cat(means)
        return Prediction(mean.reshape(len(mean), -1), torch.cat(covariances)), mean.shape[1:]

    def _require_likelihood(self, what: str) -> Likelihood:
        if self.likelihood is None:
            raise DataError(
                f"{what} needs a likelihood, and F does not say which one it is of: pass "
                "likelihood=; a loss that is no likelihood has none"
            )
        return self.likelihood


def _divided(value: float | Tensor, n: int) -> float | Tensor:
    """In float64, whatever F's own precision is."""
    return value.double() / n if isinstance(value, Tensor) else value / n


def _prior(values: Tensor, structure: str, groups: Mapping[tuple[str, ...], Tensor]) -> DampingLike:
    """A prior precision of a structure from its free numbers."""
    if structure == "scalar":
        return values[0]
    return values if structure == "diagonal" else dict(zip(groups, values, strict=True))


def _num_examples(F: Any) -> int:
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


def _likelihood_of(F: BaseLinearOperator, given: str | Likelihood | None) -> Likelihood | None:
    """The likelihood of F's build, or the given one if that is not known."""
    text = F.info.quantity.get("loss")
    own = None if text is None else described(str(text))
    if given is not None:
        given = resolve(given, torch.empty(0), None)
        if own is not None and repr(own) != repr(given):
            raise DataError(f"expected the likelihood of F, {own}, got {given}")
        own = given
    if own is not None and own.reweighted:
        raise DataError(
            f"a posterior needs a likelihood, and a loss with {own.reweighted} is none: build F "
            "without"
        )
    return own


def _space_in(model: nn.Module, F: BaseLinearOperator) -> ParamSpace:
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


def _flat(space: ParamSpace, given: VectorLike | None, like: Tensor) -> Tensor:
    if given is None:
        return torch.zeros_like(like)
    flat = space.ravel(given) if isinstance(given, Mapping) else given
    if not isinstance(flat, Tensor) or flat.shape != like.shape:
        got = tuple(flat.shape) if isinstance(flat, Tensor) else repr(flat)
        raise SpaceMismatchError(
            f"expected prior_mean to be flat ({len(space)},) or by name, got {got}"
        )
    return flat.detach().to(like)


def _require_positive(F: BaseLinearOperator, prior: DampingLike) -> Tensor:
    """The diagonal of a prior precision (P,)."""
    value = resolve_damping(F, prior).value
    if not bool((value > 0).all()) or not bool(value.isfinite().all()):
        raise NotPositiveDefiniteError(
            "expected a positive, finite prior precision for every parameter, got one from "
            f"{float(value.min()):.3g} to {float(value.max()):.3g}; a mapping must name them all"
        )
    return value.expand(F.shape[-1])
