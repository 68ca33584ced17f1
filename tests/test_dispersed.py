"""Negative binomial and Student's labels, against torch.distributions and expectations."""

import pytest
import torch
from torch import distributions, nn

import nngeo_lazy as ng
from nngeo_lazy.errors import DataError
from nngeo_lazy.likelihoods import NegativeBinomial, StudentT

from cases import close

KINDS = [NegativeBinomial(0.7), NegativeBinomial(5.0), StudentT(3.0, 0.5), StudentT(1.0)]


def distribution(likelihood, f):
    """The labels' distribution at outputs f."""
    if isinstance(likelihood, NegativeBinomial):
        r = torch.tensor(likelihood.concentration, dtype=torch.float64)
        return distributions.NegativeBinomial(r, logits=f - r.log())
    df = torch.tensor(likelihood.df, dtype=torch.float64)
    return distributions.StudentT(df, f, likelihood.scale)


def information(likelihood, f):
    """E[score^2] of one output, by a sum over counts or an integral over labels."""
    if isinstance(likelihood, NegativeBinomial):
        y, width = torch.arange(20_000).double(), 1.0
    else:
        t = torch.linspace(-1 + 1e-6, 1 - 1e-6, 100_001, dtype=torch.float64)
        y = f + t / (1 - t.square())
        width = (1 + t.square()) / (1 - t.square()).square() * (t[1] - t[0])
    at = f.expand(len(y)).clone().requires_grad_()
    logs = distribution(likelihood, at).log_prob(y)
    (score,) = torch.autograd.grad(logs.sum(), at)
    return (logs.detach().exp() * score.square() * width).sum()


def problem(likelihood):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x = torch.randn(12, 3).double()
    y = distribution(likelihood, model(x).detach()).sample()
    return model, x, y


def rows(model, x):
    """(N, C, P) by a loop."""
    found = []
    for one in x.split(1):
        for f in model(one).flatten():
            grads = torch.autograd.grad(f, list(model.parameters()), retain_graph=True)
            found.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(found).unflatten(0, (len(x), -1))


@pytest.mark.parametrize("likelihood", KINDS, ids=repr)
def test_the_density_and_the_scores_are_those_of_torch(likelihood):
    model, x, y = problem(likelihood)
    f = model(x)
    want = distribution(likelihood, f).log_prob(y).sum(1)
    close(likelihood.log_prob(f, y).detach(), want.detach(), 1e-10)
    losses = -want
    grads = [
        torch.autograd.grad(each, list(model.parameters()), retain_graph=True) for each in losses
    ]
    G = torch.stack([torch.cat([g.flatten() for g in each]) for each in grads])
    F = ng.FIM(model, (x, y), "dense", likelihood=likelihood, estimator="empirical")
    close(F.to_dense(), G.mT @ G / len(x), 1e-9)


@pytest.mark.parametrize("likelihood", KINDS, ids=repr)
def test_the_fisher_is_the_expectation(likelihood):
    model, x, y = problem(likelihood)
    f, J = model(x).detach(), rows(model, x)
    middle = torch.stack([information(likelihood, each) for each in f.flatten()]).view_as(f)
    want = torch.einsum("ncp,nc,ncq->pq", J, middle, J) / len(x)
    for representation in ("dense", "implicit"):
        F = ng.FIM(model, (x, y), representation, likelihood=likelihood)
        close(F.to_dense(), want, 1e-4)
    G = ng.GGN(model, (x, y), "dense", loss=likelihood)
    close(G.to_dense(), F.to_dense(), 1e-9)
    drawn = ng.FIM(
        model, (x, y), "dense", likelihood=likelihood, estimator="mc", samples=3000, seed=0
    )
    close(drawn.to_dense(), want, 0.1)
    assert ng.Laplace(model, F).likelihood == likelihood


def test_bad_options_and_labels_are_named():
    with pytest.raises(DataError, match="positive, finite concentration"):
        NegativeBinomial(0.0)
    with pytest.raises(DataError, match="positive, finite df"):
        StudentT(df=-1.0)
    with pytest.raises(DataError, match="positive, finite scale"):
        StudentT(scale=float("inf"))
    model, x, y = problem(KINDS[0])
    with pytest.raises(DataError, match="expected counts from 0 up"):
        ng.FIM(model, (x, y - 100), "kfac", likelihood=KINDS[0], estimator="empirical")
