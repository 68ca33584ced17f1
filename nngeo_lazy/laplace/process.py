"""The posterior as a Gaussian process over the outputs, from some of the data."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import closing
from typing import Any

import numpy as np
import torch
from scipy import optimize
from torch import Tensor, nn

from ..arguments import PositiveInt, checked
from ..builders import Jacobian
from ..data import Batches
from ..errors import DataError, TooLargeError, wrong_option
from ..likelihoods import Likelihood, LikelihoodLike, of_heads, resolve
from ..likelihoods.names import reading_of
from ..network import Network
from ..operators import DiagonalLinearOperator
from ..operators.damping import DampingLike
from ..operators.kernel import kernel_of
from ..operators.vectors import VectorLike
from ..precision import widened
from ..prediction import METHODS, Prediction, heads_of, labels, needs_all_pairs
from ..selectors import Selector, space_of
from .checks import flat_vector, positive
from .outputs import Held

__all__ = ["FunctionalLaplace"]

COVARIANCES = ("full", "diagonal")
MAX_BYTES = 2**33  # of the kernel of all outputs of the data


class FunctionalLaplace:
    r"""The Laplace approximation in function space: a Gaussian process over the outputs.

    .. math:: k(x, x') = J(x) \Lambda^{-1} J(x')^T, \qquad
        \mathrm{cov}[f(x)] = k_{xx} - k_{xM} S (\tfrac{M}{N} I + S^T k_{MM} S)^{-1} S^T k_{Mx}

    with the tangent kernel k under the prior, and S S^T the Hessian of the loss in the outputs of
    the M examples. Each of these counts N / M times. With all of the data it is the posterior of
    `Laplace` with a dense Fisher; its cost grows with M C in place of P.

    Args:
        model: the network. Its parameters are copied.
        data: the M examples with labels, as a loader.
        likelihood: as in `FIM`.
        prior_precision: Lambda, positive: as in `Laplace`.
        prior_mean: mu_0, flat or by name; zero by default.
        num_examples: N, how many examples the data stand for; M by default.
        params: which parameters are uncertain; by default those that require a gradient.
        forward: `(model, batch) -> outputs` in place of the default call.
        target: `batch -> target` in place of the default.
        max_directions: the most outputs of an example.

    Raises:
        DataError: data that do not fit the likelihood, or a loss that is none.
        NotPositiveDefiniteError: a prior precision that is not positive.
        TooLargeError: a kernel of all outputs past 8 GiB.

    Example:
        >>> model, x, y = nn.Linear(3, 2), torch.randn(20, 3), torch.randint(2, (20,))
        >>> gp = FunctionalLaplace(model, (x[:10], y[:10]), num_examples=20)
        >>> mean, covariance = gp.functional(x)
        >>> mean.shape, covariance.shape, gp.predictive(x).shape
        (torch.Size([20, 2]), torch.Size([20, 2, 2]), torch.Size([20, 2]))

    Source: Khan et al. (2019), Approximate inference turns deep networks into Gaussian processes;
        Immer, Korzepa and Bauer (2021), Improving predictions of Bayesian neural nets via local
        linearization, section 3.3.
    """

    @checked
    def __init__(
        self,
        model: nn.Module,
        data: Any,
        *,
        likelihood: LikelihoodLike | None = None,
        prior_precision: DampingLike = 1.0,
        prior_mean: VectorLike | None = None,
        num_examples: PositiveInt | None = None,
        params: Selector | None = None,
        forward: Callable[[nn.Module, Any], Tensor] | None = None,
        target: Callable[[Any], Tensor] | None = None,
        max_directions: PositiveInt = 1000,
    ) -> None:
        given = of_heads(likelihood)
        space = self.space = space_of(model, params)
        reading = reading_of(given)
        batches = Batches(data, device=space.device, forward=forward, target=target, **reading)
        self._forward = batches.forward if reading else forward
        self._network = Network(model, space, batches.forward)
        self._most = max_directions
        self.mean = space.values(model).detach().clone()
        self.prior_mean = flat_vector(space, prior_mean, self.mean, "prior_mean")
        held, roots, logs = [], [], 0.0
        self.likelihood: Likelihood | None = None
        with closing(iter(batches)) as each, torch.no_grad():
            for batch in each:
                outputs = batches.forward(self._model(), batch.raw)
                held.append(batch.raw)
                roots.append(self._root(outputs, batch.target, given))
                logs += self._log_prob(outputs, batch.target)
        self._roots = torch.cat(roots)  # (M, C, R)
        self._log_likelihood = logs
        self.num_data = len(self._roots)
        self.num_examples = self.num_data if num_examples is None else num_examples
        count = self._roots.shape[:2].numel()
        if count**2 * 8 > MAX_BYTES:
            raise TooLargeError(
                f"the kernel of {count} outputs of the data takes {count**2 * 8 / 2**30:.1f} GiB, "
                f"more than the limit of {MAX_BYTES / 2**30:.0f} GiB: pass fewer examples, and "
                "num_examples= of all"
            )
        self._jacobian = self._rows(Held(held))
        self._set_prior(prior_precision)

    def __repr__(self) -> str:
        return f"FunctionalLaplace({self.num_data} of {self.num_examples}, {self.likelihood})"

    def functional(self, x: Any, *, covariance: str = "full") -> Prediction:
        """The posterior of the outputs: the network's, with the covariance of the process.

        Args:
            x: inputs: a tensor, or whatever a loader may be.
            covariance: "full", of all pairs of an example's outputs, or "diagonal".

        Returns:
            `mean, covariance`: (N, C) and (N, C, C), or (N, C) if it is diagonal.
        """
        return self._functional(x, covariance)[0]

    def heads(self, found: Prediction) -> Any:
        """A distribution of all outputs as one for each head, as in `Laplace.heads`."""
        return heads_of(self.likelihood, found)

    def predictive(
        self,
        x: Any,
        method: str = "probit",
        *,
        samples: int = 1000,
        seed: int | None = None,
    ) -> Any:
        """What the posterior predicts for the labels of new inputs, as in `Laplace.predictive`.

        Args:
            x: inputs: a tensor, or whatever a loader may be.
            method: "probit", "mc" or "bridge", for classes.
            samples: draws of the outputs, for "mc".
            seed: of the draws.
        """
        ways = METHODS[:-1]
        if method not in ways:
            raise ValueError(wrong_option("method", method, ways, "laplace"))
        known = self._known()
        kind = "full" if needs_all_pairs(known, method) else "diagonal"
        found, shape = self._functional(x, kind)
        return labels(known, found, shape, method, samples=samples, seed=seed)

    def log_marginal_likelihood(self) -> Tensor:
        r"""The evidence, a 0-d tensor in float64; the data count N / M times.

        .. math:: \tfrac{N}{M} \log p(D_M | \hat w) - \tfrac12 |\hat w - \mu_0|_\Lambda^2
            - \tfrac12 \log\det(I + \tfrac{N}{M} S^T k_{MM} S)

        Raises:
            DataError: data without labels.
        """
        offset = widened(self.mean - self.prior_mean)
        squares = (widened(self._prior) * offset.square()).sum()
        times = self.num_examples / self.num_data
        logdet = 2 * self._factor.diagonal().log().sum() + len(self._factor) * math.log(times)
        evidence: Tensor = times * self._labelled() - squares / 2 - logdet / 2
        return evidence

    @checked
    def fit_prior_precision(
        self, *, bounds: tuple[float, float] = (1e-6, 1e6)
    ) -> FunctionalLaplace:
        """The same process with the multiple of its prior precision that has most evidence.

        Args:
            bounds: of the multiple.

        Returns:
            A new process; this one stays as it is.

        Raises:
            DataError: data without labels.
        """
        times = self.num_examples / self.num_data
        fit = times * self._labelled()
        values = (torch.linalg.eigvalsh(self._whitened).clamp_min(0) * times).cpu().numpy()
        offset = widened(self.mean - self.prior_mean)
        square = float((widened(self._prior) * offset.square()).sum())

        def negative(log: float) -> float:
            c = math.exp(log)
            return c * square / 2 + float(np.log1p(values / c).sum()) / 2 - fit

        limits = (math.log(bounds[0]), math.log(bounds[1]))
        found = optimize.minimize_scalar(negative, bounds=limits, method="bounded")
        made = object.__new__(type(self))
        made.__dict__.update(vars(self))
        made._set_prior(self._prior * math.exp(found.x))
        return made

    # --- parts -----------------------------------------------------------------------------------

    def _known(self) -> Likelihood:
        if self.likelihood is None:
            raise DataError("expected at least one batch of data")
        return self.likelihood

    def _labelled(self) -> float:
        if math.isnan(self._log_likelihood):
            raise DataError(
                "the evidence needs log p(D | w) of the labels, but the data have none (or some "
                "that do not fit the likelihood): pass (inputs, target) batches, or target="
            )
        return self._log_likelihood

    def _model(self) -> nn.Module:
        with self._network.scope():
            return self._network.at(self.mean)

    def _rows(self, data: Held) -> Any:
        names = list(self.space.names)
        return Jacobian(
            self._model(),
            data,
            "factored",
            params=names,
            forward=self._forward,
            max_directions=self._most,
        )

    def _root(self, outputs: Tensor, target: Any, given: Any) -> Tensor:
        """S (n, C, R) of a batch."""
        if self.likelihood is None:
            known = self.likelihood = resolve(given, outputs, target)
            known.require_likelihood("exact")
        known = self._known()
        read = target if known.masks else None
        known.check(outputs, read)
        made = torch.stack(list(known.directions(outputs, read, "exact")), -1)
        return made.reshape(len(outputs), -1, made.shape[-1])

    def _log_prob(self, outputs: Tensor, target: Any) -> float:
        try:
            self._known().check(outputs, target)
        except DataError:
            return math.nan
        if target is None:
            return math.nan
        return float(widened(self._known().log_prob(outputs, target)).sum())

    def _set_prior(self, prior_precision: DampingLike) -> None:
        """The kernel of the data under a prior, and the factor of M / N + S^T k S."""
        eye = DiagonalLinearOperator(torch.ones_like(self.mean), info=self._jacobian.info)
        self._prior = positive(eye, prior_precision).to(self.mean)
        self._variance = DiagonalLinearOperator(1 / self._prior)
        m, c, r = self._roots.shape
        kernel = widened(kernel_of(self._jacobian, self._jacobian, self._variance).to_dense())
        S = widened(self._roots)
        half = torch.einsum("mcr,mcn->mrn", S, kernel.view(m, c, m * c)).view(m, r, m, c)
        made = torch.einsum("mrnc,ncs->mrns", half, S).reshape(m * r, m * r)
        self._whitened = (made + made.mT) / 2
        eye_of_data = torch.eye(m * r, dtype=made.dtype, device=made.device)
        share = self.num_data / self.num_examples
        self._factor = torch.linalg.cholesky(self._whitened + share * eye_of_data)

    def _functional(self, x: Any, covariance: str) -> tuple[Prediction, torch.Size]:
        if covariance not in COVARIANCES:
            raise ValueError(wrong_option("covariance", covariance, COVARIANCES, "laplace"))
        batches = Batches(x, device=self.space.device, forward=self._forward)
        model, means, spreads = self._model(), [], []
        with closing(iter(batches)) as each, torch.no_grad():
            for batch in each:
                mean = batches.forward(model, batch.raw)
                spreads.append(self._covariance(Held([batch.raw]), len(mean)).to(mean))
                means.append(mean)
        mean, spread = torch.cat(means), torch.cat(spreads)
        if covariance == "diagonal":
            spread = spread.diagonal(dim1=1, dim2=2)
        return Prediction(mean.reshape(len(mean), -1), spread, covariance), mean.shape[1:]

    def _covariance(self, data: Held, n: int) -> Tensor:
        """(n, C, C) of new inputs."""
        J = self._rows(data)
        m, c, r = self._roots.shape
        prior = kernel_of(J, J, self._variance, outputs="per_example").to_dense()
        cross = widened(kernel_of(self._jacobian, J, self._variance).to_dense())  # (M C, n C)
        half = torch.einsum("mcr,mck->mrk", widened(self._roots), cross.view(m, c, -1))
        known = torch.linalg.solve_triangular(self._factor, half.reshape(m * r, -1), upper=False)
        known = known.view(m * r, n, -1)
        return widened(prior).view(n, c, c) - torch.einsum("mnc,mnd->ncd", known, known)
