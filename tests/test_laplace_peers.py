"""Laplace beside laplace-torch in one run, where both define things alike."""

import pytest
import torch
from laplace_torch import peer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import nngeo_lazy as ng
from nngeo_lazy.likelihoods import Gaussian
from nngeo_lazy.representations import KFAC

from cases import close

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]  # the peer's own
TOLERANCE = 1e-5
STRUCTURES = {"full": "dense", "kron": KFAC(separate_bias=True), "diag": "diagonal"}


@pytest.fixture
def laplace():
    return peer()


def problem(kind):
    torch.manual_seed(0)
    outputs = 1 if kind == "one output" else 3
    layers = [nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, outputs)]
    model, x = nn.Sequential(*layers).double(), torch.randn(40, 4).double()
    y = torch.randint(3, (40,)) if kind == "classification" else torch.randn(40, outputs).double()
    return model, x, y


def both(laplace, kind, structure, prior=2.0, params=None, **theirs):
    model, x, y = problem(kind)
    classes = kind == "classification"
    likelihood = "categorical" if classes else Gaussian(0.7**2)
    F = ng.FIM(model, (x, y), STRUCTURES[structure], likelihood=likelihood, params=params)
    la = laplace.Laplace(
        model,
        "classification" if classes else "regression",
        subset_of_weights="all" if params is None else "last_layer",
        hessian_structure=structure,
        prior_precision=prior,
        **({} if classes else {"sigma_noise": 0.7}),
        **theirs,
    )
    la.fit(DataLoader(TensorDataset(x, y), batch_size=10))
    return ng.Laplace(model, F, prior_precision=prior), la, x


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("kind", ["classification", "regression", "one output"])
@pytest.mark.parametrize("params", [None, "4"])
def test_posteriors_agree(laplace, kind, structure, params):
    ours, theirs, _ = both(laplace, kind, structure, params=params)
    close(ours.log_marginal_likelihood(), theirs.log_marginal_likelihood().detach(), TOLERANCE)
    new = torch.randn(7, 4).double()
    mean, covariance = ours.functional(new)
    their_mean, their_covariance = theirs._glm_predictive_distribution(new)
    close(mean, their_mean.detach(), TOLERANCE)
    close(covariance, their_covariance.detach(), TOLERANCE)
    if kind == "classification":
        close(ours.predictive(new), theirs(new, link_approx="probit"), TOLERANCE)
    else:
        found, (_, variance) = ours.predictive(new), theirs(new)
        close(found.covariance - 0.49 * torch.eye(mean.shape[1]).double(), variance, TOLERANCE)
    value = torch.randn(len(ours.mean)).double() + ours.mean
    if structure == "full":
        close(ours.covariance.to_dense(), theirs.posterior_covariance, TOLERANCE)
        close(ours.log_prob(value), theirs.log_prob(value).detach(), TOLERANCE)
    elif structure == "diag":
        close(ours.covariance.diagonal(), theirs.posterior_variance, TOLERANCE)
    if kind != "classification":
        joint = ours.functional(new, joint=True).covariance
        close(joint, theirs(new, joint=True)[1].detach(), TOLERANCE)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_chosen_prior_agrees(laplace, structure):
    ours, theirs, _ = both(laplace, "classification", structure)
    found = ours.fit_prior_precision()
    theirs.optimize_prior_precision(method="marglik", n_steps=400, lr=0.05)
    value = theirs.log_marginal_likelihood().detach()
    close(found.log_marginal_likelihood(), value, 1e-4)  # theirs stops after so many steps
    assert found.log_marginal_likelihood() > value - 1e-6


def test_subnetworks_agree(laplace):
    index = torch.tensor([1, 5, 30, 31, 60, 80])
    ours, _, x = both(laplace, "regression", "full")
    model, x, y = problem("regression")
    known = laplace.Laplace(
        model,
        "regression",
        subset_of_weights="subnetwork",
        hessian_structure="full",
        subnetwork_indices=index,
        prior_precision=2.0,
        sigma_noise=0.7,
        backend=laplace.curvature.BackPackGGN,
    )
    known.fit(DataLoader(TensorDataset(x, y), batch_size=10))
    ours = ng.Laplace(model, ours.operator, prior_precision=2.0, subset=index)
    _, covariance = known._glm_predictive_distribution(x[:5])
    close(ours.functional(x[:5]).covariance, covariance.detach(), TOLERANCE)


def test_processes_agree(laplace):
    """Of one output, for which the peer's outputs are not taken apart."""
    model, x, y = problem("one output")
    known = laplace.FunctionalLaplace(
        model,
        "regression",
        n_subset=40,
        prior_precision=2.0,
        sigma_noise=0.7,
        independent_outputs=True,
    )
    known.fit(DataLoader(TensorDataset(x, y), batch_size=40))
    gp = ng.FunctionalLaplace(model, (x, y), likelihood=Gaussian(0.49), prior_precision=2.0)
    new = torch.randn(7, 4).double()
    mean, variance = known._glm_predictive_distribution(new)
    close(gp.functional(new).mean, mean.detach(), TOLERANCE)
    close(
        gp.functional(new, covariance="diagonal").covariance.reshape(-1),
        variance.detach().reshape(-1),
        TOLERANCE,
    )
