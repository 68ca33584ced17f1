"""What posteriors say of labels of every likelihood; noise by the evidence; function space."""

import math

import numpy as np
import pytest
import torch
from scipy import optimize
from test_laplace import oracle_jacobian
from torch import distributions, nn

import nngeo_lazy as ng
from nngeo_lazy.errors import ConvergenceWarning, DataError, TooLargeError
from nngeo_lazy.likelihoods import (
    Bernoulli,
    BradleyTerry,
    Categorical,
    FromDistribution,
    Gaussian,
    HeteroscedasticGaussian,
    NegativeBinomial,
    Poisson,
    StudentT,
    Weighted,
)

from cases import close


def network(outputs, n=30):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, outputs)).double()
    return model, torch.randn(n, 3).double()


def moments(la, x, size):
    """Draws of the outputs from their normal distribution (S, N, C)."""
    mean, covariance = la.functional(x)
    root = torch.linalg.cholesky(covariance + 1e-12 * torch.eye(size).double())
    z = torch.randn(40_000, *mean.shape, generator=torch.Generator().manual_seed(1)).double()
    return mean + torch.einsum("ncd,knd->knc", root, z)


def gamma(f):
    return distributions.Gamma(2.0, f.exp())


KINDS = {
    "poisson": (Poisson(), 2, lambda f: f.exp(), None),
    "counts": (NegativeBinomial(2.0), 2, lambda f: f.exp(), None),
    "gaussian": (Gaussian(0.3), 2, lambda f: f, lambda f: 0.3 + 0 * f),
    "student": (StudentT(5.0, 0.5), 2, lambda f: f, lambda f: 0.25 * 5 / 3 + 0 * f),
    "heteroscedastic": (
        HeteroscedasticGaussian(),
        4,
        lambda f: f[..., :2],
        lambda f: f[..., 2:].exp(),
    ),
    "distribution": (FromDistribution(gamma), 2, lambda f: 2 / f.exp(), None),
    "pairs": (BradleyTerry(), 2, lambda f: (f[..., :1] - f[..., 1:]).sigmoid(), None),
    "weighted": (Weighted(Gaussian(0.3)), 2, lambda f: f, lambda f: 0.3 + 0 * f),
}


@pytest.mark.parametrize("kind", KINDS)
def test_labels_under_the_posterior_are_the_mean_over_outputs(kind):
    likelihood, size, mean, variance = KINDS[kind]
    model, x = network(size)
    F = ng.FIM(model, x, "dense", likelihood=likelihood)
    la = ng.Laplace(model, F, prior_precision=5.0, likelihood=likelihood)
    f = moments(la, x[:4], size)
    want = mean(f).mean(0)
    found = la.predictive(x[:4], "mc", samples=20_000, seed=0)
    drawn = la.predictive(x[:4], "weights", samples=400, seed=0)
    if variance is None:
        close(found, want, 0.02)
        assert drawn.shape == want.shape
        assert bool(drawn.isfinite().all())
        return
    close(found.mean, want, 0.02)
    spread = variance(f).mean(0) + mean(f).var(0)
    close(found.variance, spread, 0.05)
    assert drawn.variance.shape == spread.shape
    diagonal = la.predictive(x[:4], covariance="diagonal")
    close(diagonal.variance, found.variance, 1e-9)
    if kind != "heteroscedastic":
        joint = la.predictive(x[:4], joint=True)
        close(joint.variance, found.variance, 1e-9)
        assert joint.covariance.shape == (8, 8)


def test_predictions_that_are_not_known_are_named():
    model, x = network(2)
    F = ng.FIM(model, x, "dense", likelihood=StudentT(2.0))
    with pytest.raises(DataError, match="as df is not above 2: take functional"):
        ng.Laplace(model, F).predictive(x)
    F = ng.FIM(model, x, "dense", likelihood=NegativeBinomial(2.0))
    la = ng.Laplace(model, F)
    with pytest.raises(DataError, match=r"not known from what is predicted: pass metric="):
        la.grid_search((x, torch.ones(30, 2)))
    found = la.grid_search(
        (x, torch.ones(30, 2)), metric=lambda p, y: (p - y).square().mean(), grid=(0.1, 10.0)
    )
    assert found.prior_precision in (0.1, 10.0)


@pytest.mark.parametrize("likelihood", [Gaussian(0.5), Bernoulli(), Poisson(), Categorical()])
def test_a_grid_search_leaves_out_masked_labels(likelihood):
    model, x = network(3)
    classes = isinstance(likelihood, Categorical)
    y = torch.randint(2, (30,)) if classes else torch.randint(2, (30, 3)).double()
    mask = torch.rand(30) < 0.6
    la = ng.Laplace(
        model, ng.FIM(model, (x, y), "kfac", likelihood=likelihood), likelihood=likelihood
    )
    weighted = ng.Laplace(model, ng.FIM(model, (x, y), "kfac", likelihood=Weighted(likelihood)))
    found = weighted.grid_search((x, (y, mask)))
    assert found.prior_precision == la.grid_search((x[mask], y[mask])).prior_precision


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(4, 2)
        self.double()

    def forward(self, x):
        h = self.body(x).tanh()
        return {"class": self.first(h), "size": self.second(h)}


GIVEN = {"class": "categorical", "size": Gaussian(0.5)}


@pytest.mark.parametrize("representation", ["dense", "kfac", "implicit"])
def test_two_heads_are_one_posterior(representation):
    model, x = Heads(), network(1)[1]
    y, z = torch.randint(3, (30,)), torch.randn(30, 2).double()
    F = ng.FIM(model, (x, y, z), representation, likelihood=GIVEN)
    la = ng.Laplace(model, F, prior_precision=2.0)
    joint = nn.Sequential()  # the same network with its outputs in one tensor
    joint.add_module("own", model)
    J = oracle_jacobian(_Joined(model), x[:4])
    covariance = torch.linalg.inv(30 * F.to_dense() + 2 * torch.eye(len(F.space)).double())
    want = J @ covariance @ J.mT
    found = la.functional(x[:4])
    close(found.covariance, want, 1e-7)
    heads = la.heads(found)
    close(heads["class"].mean, model(x[:4])["class"].detach())
    close(heads["size"].covariance, want[:, 3:, 3:], 1e-7)
    close(
        la.heads(la.functional(x[:4], covariance="diagonal"))["size"].variance,
        want[:, 3:, 3:].diagonal(dim1=1, dim2=2),
        1e-7,
    )
    predicted = la.predictive(x[:4])
    v = want[:, :3, :3].diagonal(dim1=1, dim2=2)
    probit = (model(x[:4])["class"] / (1 + math.pi / 8 * v).sqrt()).softmax(1).detach()
    close(predicted["class"], probit, 1e-7)
    close(predicted["size"].covariance, want[:, 3:, 3:] + 0.5 * torch.eye(2).double(), 1e-7)
    drawn = la.predictive(x[:4], "weights", samples=10, seed=0)
    assert drawn["class"].shape == (4, 3)
    assert drawn["size"].mean.shape == (4, 2)
    if representation == "implicit":
        return
    fit = -nn.functional.cross_entropy(model(x)["class"], y, reduction="sum")
    normal = distributions.Normal(model(x)["size"], math.sqrt(0.5))
    fit = fit + normal.log_prob(z).sum()
    w = torch.cat([p.flatten() for p in model.parameters()])
    logdet = (30 * F.to_dense() / 2 + torch.eye(len(w)).double()).logdet()
    close(la.log_marginal_likelihood(), (fit - w.square().sum() - logdet / 2).detach(), 1e-9)
    assert la.fit_prior_precision("layer").log_marginal_likelihood() > la.log_marginal_likelihood()
    assert la.grid_search([(x[:9], y[:9], z[:9]), (x[9:], y[9:], z[9:])]).prior_precision > 0
    part = la.grid_search((x, {"class": y, "size": z}), grid=(1.0,))
    assert part.prior_precision == 1.0


class _Joined(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.own = model

    def forward(self, x):
        return torch.cat(list(self.own(x).values()), 1)


# --- noise -----------------------------------------------------------------------------------


def evidence(logs, J, r, w, structure):
    """Of the variances and a prior precision, by dense algebra; (C + 1,) logarithms."""
    variance, prior = np.exp(logs[:-1]), np.exp(logs[-1])
    n, _, p = J.shape
    precision = prior * np.eye(p) + np.einsum("ncp,c,ncq->pq", J, 1 / variance, J)
    fit = -0.5 * (r**2 / variance).sum() - 0.5 * n * np.log(2 * np.pi * variance).sum()
    return -(
        fit - prior * (w**2).sum() / 2 + p * np.log(prior) / 2 - np.linalg.slogdet(precision)[1] / 2
    )


def test_the_noise_of_each_output_has_most_evidence():
    model, x = network(2, 60)
    torch.manual_seed(1)
    y = model(x).detach() + torch.tensor([0.1, 0.7]).double() * torch.randn(60, 2).double()

    def build(likelihood):
        return ng.FIM(model, [(x[:20], y[:20]), (x[20:], y[20:])], "dense", likelihood=likelihood)

    la = ng.Laplace(model, build(Gaussian()))
    found = la.fit_noise((x, y), build, tol=1e-7)
    J = oracle_jacobian(model, x).numpy()
    r = (y - model(x)).detach().numpy()
    w = torch.cat([p.detach().flatten() for p in model.parameters()]).numpy()
    best = optimize.minimize(evidence, np.zeros(3), (J, r, w, None), method="BFGS")
    variance = torch.as_tensor(found.likelihood.variance)
    close(variance, torch.tensor(np.exp(best.x[:2])), 1e-3)
    assert float(found.prior_precision) == pytest.approx(np.exp(best.x[2]), rel=1e-2)
    assert float(found.log_marginal_likelihood()) == pytest.approx(-best.fun, abs=1e-4)
    assert la.likelihood.variance == 1.0  # as it was
    # one for all is the fit that needs no new F
    one = la.fit_noise((x, y), build, per_output=False, tol=1e-7)
    other = la.fit_prior_precision(noise=True)
    assert one.likelihood.variance == pytest.approx(float(other.likelihood.variance), rel=1e-3)
    # a label that is not there says nothing of the noise
    y_with_nan = torch.cat([y, torch.full((5, 2), math.nan).double()])
    more = torch.cat([x, x[:5]])

    def build_masked(likelihood):
        return ng.FIM(model, (more, y_with_nan), "dense", likelihood=likelihood)

    masked = ng.Laplace(model, build_masked(Weighted(Gaussian(), nan="mask")))
    masked = masked.fit_noise((more, y_with_nan), build_masked, tol=1e-7)
    close(torch.as_tensor(masked.likelihood.likelihood.variance), variance, 1e-4)


def test_a_noise_that_cannot_be_fitted_is_named():
    model, x = network(2)
    y = torch.randn(30, 2).double()

    def build(likelihood):
        return ng.FIM(model, (x, y), "kfac", likelihood=likelihood)

    la = ng.Laplace(model, build(Gaussian()))
    with pytest.warns(ConvergenceWarning, match="after 1 iterations: raise max_iter, or tol"):
        la.fit_noise((x, y), build, max_iter=1, tol=1e-12)
    with pytest.raises(DataError, match="the batch has no target"):
        la.fit_noise(x, build)
    with pytest.raises(DataError, match="let build= take the same model and data"):
        la.fit_noise((x, y), lambda likelihood: ng.FIM(model, x[:9], likelihood=likelihood))
    with pytest.raises(DataError, match="expected normal labels"):
        ng.Laplace(model, ng.FIM(model, x, likelihood="bernoulli")).fit_noise((x, y), build)
    covariance = Gaussian(torch.tensor([[1.0, 0.5], [0.5, 1.0]]))
    with pytest.raises(DataError, match="got a covariance: fit_noise starts from"):
        ng.Laplace(model, build(covariance)).fit_noise((x, y), build)
    weak = ng.Laplace(model, ng.FIM(model, (x[:5], y[:5]), "dense", likelihood=Gaussian(1e-9)))
    with pytest.raises(DataError, match="no noise is left: raise the prior precision"):
        weak.fit_noise((x[:5], y[:5]), build, structure=None)


# --- function space --------------------------------------------------------------------------


@pytest.mark.parametrize("likelihood", ["gaussian", "categorical", "poisson"])
def test_the_process_of_all_data_is_the_dense_posterior(likelihood):
    model, x = network(3)
    y = torch.randint(3, (30,)) if likelihood == "categorical" else torch.rand(30, 3).double()
    prior = {"0": 2.0, "2": 0.5}
    la = ng.Laplace(
        model, ng.FIM(model, (x, y), "dense", likelihood=likelihood), prior_precision=prior
    )
    batches = [(x[:7], y[:7]), (x[7:], y[7:])]
    gp = ng.FunctionalLaplace(model, batches, likelihood=likelihood, prior_precision=prior)
    new = torch.randn(6, 3).double()
    for one, other in zip(gp.functional(new), la.functional(new), strict=True):
        close(one, other, 1e-8)
    close(gp.functional(new, covariance="diagonal").variance, la.functional(new).variance, 1e-8)
    one, other = gp.predictive(new), la.predictive(new)
    for a, b in zip(
        *((each if likelihood == "gaussian" else [each]) for each in (one, other)), strict=True
    ):
        close(a, b, 1e-8)
    close(gp.log_marginal_likelihood(), la.log_marginal_likelihood(), 1e-8)
    one = ng.FunctionalLaplace(model, (x, y), likelihood=likelihood).fit_prior_precision()
    other = ng.Laplace(model, la.operator).fit_prior_precision()
    assert float(one.log_marginal_likelihood()) == pytest.approx(
        float(other.log_marginal_likelihood()), abs=1e-4
    )


def test_some_of_the_data_stand_for_all():
    """Each of M examples counts N / M times; without any data it is the prior's tangent kernel."""
    model, x = network(2)
    y = torch.randn(30, 2).double()
    F = ng.FIM(model, (x[:10], y[:10]), "dense", likelihood="gaussian")
    gp = ng.FunctionalLaplace(model, (x[:10], y[:10]), likelihood="gaussian", num_examples=30)
    J = oracle_jacobian(model, x)
    covariance = torch.linalg.inv(30 * F.to_dense() + torch.eye(len(F.space)).double())
    close(gp.functional(x).covariance, J @ covariance @ J.mT, 1e-8)
    known = ng.FunctionalLaplace(
        model, (x[:10], y[:10]), likelihood=Gaussian(1e12), prior_precision=4.0
    )
    kernel = ng.NTK(model, x, outputs="per_example").to_dense() / 4
    close(known.functional(x).covariance, kernel, 1e-8)
    given = {"class": "categorical", "size": Gaussian(0.5)}
    heads, y, z = Heads(), torch.randint(3, (30,)), torch.randn(30, 2).double()
    gp = ng.FunctionalLaplace(heads, (x, y, z), likelihood=given)
    la = ng.Laplace(heads, ng.FIM(heads, (x, y, z), "dense", likelihood=given))
    close(gp.functional(x).covariance, la.functional(x).covariance, 1e-8)
    close(gp.predictive(x)["class"], la.predictive(x)["class"], 1e-8)
    close(gp.heads(gp.functional(x))["size"].mean, heads(x)["size"].detach())


def test_bad_input_of_a_process_is_named(monkeypatch):
    model, x = network(2)
    gp = ng.FunctionalLaplace(model, x, likelihood="gaussian")
    with pytest.raises(DataError, match="the data have none"):
        gp.log_marginal_likelihood()
    with pytest.raises(ValueError, match="'weights'"):
        gp.predictive(x, "weights")
    with pytest.raises(ValueError, match="'joint'"):
        gp.functional(x, covariance="joint")
    monkeypatch.setattr("nngeo_lazy.laplace.process.MAX_BYTES", 100)
    with pytest.raises(TooLargeError, match="pass fewer examples, and num_examples= of all"):
        ng.FunctionalLaplace(model, x, likelihood="gaussian")
