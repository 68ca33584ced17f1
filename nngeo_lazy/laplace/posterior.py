"""The posterior of a network's parameters, and what it predicts."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import closing
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..arguments import PositiveInt, checked
from ..data import Batches
from ..errors import wrong_option
from ..likelihoods import LikelihoodLike
from ..likelihoods.names import reading_of
from ..network import Network
from ..operators import BaseLinearOperator
from ..operators.damping import DampingLike
from ..operators.vectors import VectorLike
from ..prediction import (
    METHODS,
    Prediction,
    heads_of,
    labels,
    labels_of_draws,
    needs_all_pairs,
)
from .checks import flat_vector, likelihood_of, num_examples_of, positive, space_in
from .evidence import Evidence
from .outputs import Linearised
from .subset import chosen_parameters, embedded

__all__ = ["Laplace"]

COVARIANCES = ("full", "diagonal")
MOST = 10_000  # outputs of an example whose variances take a backward pass each, by default


class Laplace(Evidence):
    r"""The Laplace approximation of a network's posterior, by any representation of its Fisher.

    .. math:: p(w | D) \approx N(\hat w, \Sigma), \qquad
        \Sigma = (N F / T + \Lambda)^{-1}, \qquad p(w) = N(\mu_0, \Lambda^{-1})

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
        temperature: T; the data count 1 / T times. Below one the posterior is a cold one.
        subset: which parameters are uncertain: an index (S,), or a mask (P,), flat or by name. All
            others stay as they are. Their S x S block of F is made dense, from S of its columns.
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
        temperature: float = 1.0,
        subset: VectorLike | None = None,
        likelihood: LikelihoodLike | None = None,
        forward: Callable[[nn.Module, Any], Tensor] | None = None,
    ) -> None:
        if not 0 < temperature < math.inf:
            raise ValueError(f"expected a positive, finite temperature, got {temperature!r}")
        self.operator, self.prior_precision, self.temperature = F, prior_precision, temperature
        self.num_examples = num_examples_of(F)
        self.likelihood = likelihood_of(F, likelihood)
        self._noise: float | Tensor = 1.0  # the likelihood's variance, in units of F's own
        space = self.space = space_in(model, F)
        self.mean = space.values(model).detach().clone().to(F.dtype)
        self.prior_mean = flat_vector(space, prior_mean, self.mean, "prior_mean")
        self.subset = chosen_parameters(space, subset)
        reading = reading_of(self.likelihood)
        batches = Batches(self.mean, device=self.mean.device, forward=forward, **reading)
        self._forward = batches.forward if reading else forward  # joins the outputs of heads
        self._network = Network(model, space, batches.forward)
        positive(F, prior_precision)

    def __repr__(self) -> str:
        given = self.prior_precision
        prior = f"{float(given):.4g}" if isinstance(given, (int, float)) else type(given).__name__
        return f"Laplace({self.operator!r}, {self.likelihood}, prior_precision={prior})"

    # --- the posterior ---------------------------------------------------------------------------

    @property
    def precision(self) -> BaseLinearOperator:
        """N F / T + Lambda, P x P, in the structure of F; S x S of a subset."""
        damped = self._inner.damped(self._damping(self.prior_precision))
        return cast(BaseLinearOperator, self._terms() * damped)

    @cached_property
    def covariance(self) -> BaseLinearOperator:
        """The inverse of the precision, P x P; of a subset, zero elsewhere."""
        inverse = self._uncertain
        if self.subset is None:
            return inverse
        return embedded(inverse, self.subset, len(self.space))

    @cached_property
    def _uncertain(self) -> BaseLinearOperator:
        """The inverse of the precision, in its coordinates."""
        inverse = self._accurate.inverse(damping=self._damping(self.prior_precision))
        inverse = inverse.to(self.operator.dtype)
        return cast(BaseLinearOperator, (1 / self._terms()) * inverse)

    @checked
    def sample(self, n: PositiveInt, *, seed: int | None = None) -> Tensor:
        """Parameters (n, P) from the posterior; `la.space.unravel` names them.

        Args:
            n: how many.
            seed: for draws of their own; by default from torch's global generator.
        """
        draws = self._uncertain.sample(n, seed=seed)
        if self.subset is None:
            return self.mean + draws
        return self.mean.repeat(n, 1).index_add_(1, self.subset, draws)

    def log_prob(self, parameters: VectorLike) -> Tensor:
        """The logarithm of the posterior's density, a 0-d tensor in float64.

        Args:
            parameters: where, flat (P,) or by name. Of a subset, only its own are looked at.

        Raises:
            SpaceMismatchError: the parameters are not those of the posterior.

        Warns:
            EstimateWarning: the log-determinant of F is only known as an estimate.
        """
        F, terms, prior = self._accurate, self._terms(), self._prior(self.prior_precision)
        offset = flat_vector(self.space, parameters, self.mean, "parameters") - self.mean
        offset = self._own(offset).to(F.dtype)
        squares = terms * F.vTMv(offset) + (prior * offset.square()).sum()
        size = len(offset)
        logdet = F.damped(self._damping(self.prior_precision)).logdet() + size * math.log(terms)
        density: Tensor = (logdet - squares - size * math.log(2 * math.pi)) / 2
        return density

    # --- predictions -----------------------------------------------------------------------------

    @checked
    def functional(
        self,
        x: Any,
        *,
        covariance: str = "full",
        joint: bool = False,
        max_directions: PositiveInt = MOST,
    ) -> Prediction:
        r"""The posterior of the linearised network's outputs, N(f(x), J(x) Sigma J(x)^T).

        Every output is one backward pass, a batch in pieces that fit into memory. If F is over the
        last layer alone, and diagonal there or a Kronecker product, there are none.

        Args:
            x: inputs: a tensor, or whatever a loader may be. If a tensor requires gradients, the
                result has them, as an acquisition function needs; rows of all inputs are then held.
            covariance: "full", of all pairs of an example's outputs, or "diagonal", the variances
                alone: memory N C.
            joint: whether the covariance is that of all inputs together.
            max_directions: the most outputs of an example, if each is a backward pass.

        Returns:
            `mean, covariance`: (N, C) and (N, C, C), C all outputs of an example; (N, C) and (N, C)
            if it is diagonal, (N, C) and (N C, N C) if it is joint.

        Raises:
            DataError: the inputs do not fit the network, or it changed in what F does not select.
            TooLargeError: more outputs than `max_directions`, or covariances past 8 GiB.
        """
        found, _ = self._functional(x, covariance, joint, max_directions)
        return found

    def heads(self, found: Prediction) -> Any:
        """A distribution of all outputs as one for each head, by name or in their order.

        Args:
            found: what `functional` returned.

        Returns:
            `Prediction`s as the likelihoods of F are given; of one head, what was given.
        """
        return heads_of(self.likelihood, found)

    @checked
    def predictive(
        self,
        x: Any,
        method: str = "probit",
        *,
        samples: PositiveInt = 1000,
        seed: int | None = None,
        covariance: str | None = None,
        joint: bool = False,
        max_directions: PositiveInt = MOST,
    ) -> Any:
        r"""What the posterior predicts for the labels of new inputs, the mean over its parameters.

        Args:
            x: inputs: a tensor, or whatever a loader may be.
            method: for classes; the other likelihoods are exact. "weights" is for all.
                "probit": softmax(m_c / sqrt(1 + pi v_c / 8)), v_c the variance of output c;
                "mc": the mean over draws of the outputs;
                "bridge": the mean of the Dirichlet distribution that has the outputs' mode and
                curvature in logit space;
                "weights": the mean over the networks of drawn parameters, without linearising.
            samples: draws, for "mc" and "weights".
            seed: of the draws.
            covariance: of the outputs, "full" or "diagonal"; by default what the method needs,
                which is the variances for "probit", Bernoulli and Poisson.
            joint: as in `functional`, for normal labels.
            max_directions: as in `functional`.

        Returns:
            Categorical: probabilities (N, C). Bernoulli: the probability of label 1 (N, C), and
            BradleyTerry: that the first is preferred. Poisson and NegativeBinomial: expected counts
            (N, C), exp(m + v / 2). Gaussian, StudentT, HeteroscedasticGaussian: a `Prediction` of
            the labels, with their noise. FromDistribution: the mean of the labels, over draws. Of
            several heads one of these for each, by name or in order.

        Raises:
            DataError: outputs that do not fit the likelihood, or a loss that is none.
            TooLargeError: as `functional`.

        Source: MacKay (1992), The evidence framework applied to classification networks; Gibbs
            (1997) on several classes; Hobbhahn, Kristiadi and Hennig (2022), Fast predictive
            uncertainty for classification with Bayesian deep networks, eq. 5, on the bridge.
        """
        if method not in METHODS:
            raise ValueError(wrong_option("method", method, METHODS, "laplace"))
        likelihood = self._require_likelihood("a predictive distribution of labels")
        if method == "weights":
            return labels_of_draws(likelihood, *self._drawn(x, samples, seed))
        if covariance is None:
            covariance = "full" if needs_all_pairs(likelihood, method) else "diagonal"
        found, shape = self._functional(x, covariance, joint, max_directions)
        return labels(likelihood, found, shape, method, samples=samples, seed=seed)

    # --- parts -----------------------------------------------------------------------------------

    def _functional(
        self, x: Any, covariance: str, joint: bool, most: int
    ) -> tuple[Prediction, torch.Size]:
        """The posterior of the outputs, and the shape of an example's."""
        if covariance not in COVARIANCES:
            raise ValueError(wrong_option("covariance", covariance, COVARIANCES, "laplace"))
        if joint and covariance == "diagonal":
            raise ValueError("a joint covariance is of all pairs: leave covariance out")
        linear = Linearised(self._network, self.space, self.mean, self._forward)
        return linear.under(self.covariance, x, covariance, joint, most)

    def _drawn(self, x: Any, samples: int, seed: int | None) -> tuple[Tensor, torch.Size]:
        """Outputs (S, N, C) of the network at drawn parameters, and the shape of an example's."""
        draws = [list(self.space.unravel(w).values()) for w in self.sample(samples, seed=seed)]
        batches = Batches(x, device=self.mean.device, forward=self._forward)
        with self._network.scope(), torch.no_grad(), closing(iter(batches)) as each:
            parts = [torch.stack([self._network(w, b.raw) for w in draws]) for b in each]
        outputs = torch.cat(parts, 1)
        return outputs.reshape(*outputs.shape[:2], -1), outputs.shape[2:]
