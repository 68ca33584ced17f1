"""Likelihoods of pairs, of means and variances, and of any distribution."""

import pytest
import torch
from torch import distributions, nn

import nngeo_lazy as ng
from nngeo_lazy.errors import DataError, NonFiniteError
from nngeo_lazy.likelihoods import (
    BradleyTerry,
    FromDistribution,
    Gaussian,
    HeteroscedasticGaussian,
    Poisson,
)

from cases import close


def network(outputs):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs)).double()
    return model, torch.randn(9, 3).double()


def test_a_reward_model_that_scores_one_at_a_time():
    """Its weights are used twice: the Fisher is p (1 - p) of the difference of two gradients."""
    model, x = network(1)
    chosen, rejected = x + 1, x - 1
    y = torch.ones(9).double()

    def forward(model, batch):
        return torch.cat([model(batch[0]), model(batch[1])], 1)

    options = {"likelihood": BradleyTerry(), "forward": forward, "target": lambda batch: y}
    rows = []
    for a, b in zip(chosen, rejected, strict=True):
        logit = (model(a) - model(b)).squeeze()
        g = torch.autograd.grad(logit, list(model.parameters()))
        rows.append((logit.detach().sigmoid(), torch.cat([each.flatten() for each in g])))
    want = sum(p * (1 - p) * torch.outer(g, g) for p, g in rows) / 9
    for representation in ("dense", "implicit", "low_rank"):
        F = ng.FIM(model, (chosen, rejected), representation, **options)
        close(F.to_dense(), want)
    want = sum((1 - p).square() * torch.outer(g, g) for p, g in rows) / 9
    F = ng.FIM(model, (chosen, rejected), "dense", estimator="empirical", **options)
    close(F.to_dense(), want)
    F = ng.FIM(model, (chosen, rejected), "kfac", **options)
    assert F.blocks["0"].to_dense().shape == (16, 16)
    step = F.solve(F.space.zeros(), damping=1e-3)
    assert step.shape == (len(F.space),)


def gamma(f):
    return distributions.Gamma(f[..., 0].exp(), f[..., 1].exp())


def student(f):
    return distributions.StudentT(torch.full_like(f, 5.0), f)


def poisson(f):
    return distributions.Poisson(f.exp())


def vector(f):
    return distributions.Independent(distributions.Laplace(f, torch.ones_like(f)), 1)


def kinked(f):
    return distributions.TransformedDistribution(
        distributions.Laplace(f, torch.ones_like(f)), [distributions.ExpTransform()]
    )


def test_a_distribution_that_has_a_class_of_its_own():
    model, x = network(2)
    y = torch.poisson(model(x).detach().exp())
    for estimator in ("exact", "empirical"):
        F, G = (
            ng.FIM(model, (x, y), "dense", likelihood=each, estimator=estimator)
            for each in (FromDistribution(poisson), Poisson())
        )
        close(F.to_dense(), G.to_dense())
        assert F.info.log_likelihood == pytest.approx(G.info.log_likelihood)
    F, G = (
        ng.FIM(model, x, "dense", likelihood=each, estimator="mc", samples=500, seed=0).to_dense()
        for each in (FromDistribution(poisson), Poisson())
    )
    close(F, G, 0.1)
    before = torch.get_rng_state()
    ng.FIM(model, x, "dense", likelihood=FromDistribution(poisson), estimator="mc", seed=0)
    assert torch.equal(before, torch.get_rng_state())
    lap = FromDistribution(vector)
    close(
        ng.FIM(model, x, "dense", likelihood=lap).to_dense(),
        ng.FIM(model, x, "dense", likelihood=Gaussian()).to_dense(),
    )


def test_the_fisher_of_two_parameters_is_the_known_one():
    """Gamma: trigamma on the diagonal, in the logarithms of shape and rate."""
    model, x = network(2)
    F = ng.FIM(model, x, "implicit", likelihood=FromDistribution(gamma))
    a = model(x).detach()[:, 0].exp()
    middle = torch.stack(
        [torch.stack([a.square() * torch.polygamma(1, a), -a], 1), torch.stack([-a, a], 1)], 1
    )
    J = torch.func.jacrev(lambda p: torch.func.functional_call(model, p, (x,)))(
        dict(model.named_parameters())
    )
    J = torch.cat([each.detach().flatten(2) for each in J.values()], 2)
    close(F.to_dense(), torch.einsum("ncp,ncd,ndq->pq", J, middle, J) / 9, 1e-9)


def products(F):
    return F @ F.space.zeros()


def test_a_fisher_without_a_closed_form_is_drawn():
    model, x = network(1)
    for function, why in ((student, "is not known to torch"), (kinked, "has a kink at zero")):
        known = FromDistribution(function)
        for representation in ("dense", "implicit"):
            with pytest.raises(DataError, match=f"{why}.*estimator='mc', which draws labels"):
                products(ng.FIM(model, x, representation, likelihood=known))
        drawn = ng.FIM(model, x, "dense", likelihood=known, estimator="mc", samples=400, seed=0)
        assert bool(drawn.diagonal().isfinite().all())
    known = ng.likelihoods.StudentT(5.0)
    want = ng.FIM(model, x, "dense", likelihood=known)
    drawn = ng.FIM(
        model, x, "dense", likelihood=FromDistribution(student), estimator="mc", samples=400, seed=0
    )
    close(drawn.to_dense(), want.to_dense(), 0.15)


@pytest.fixture(params=[True, False])
def validation(request, monkeypatch):
    """torch.compile ends torch's own checks of distributions, for the whole process."""
    monkeypatch.setattr(distributions.Distribution, "_validate_args", request.param)


@pytest.mark.usefixtures("validation")
def test_bad_distributions_are_named():
    model, x = network(2)
    with pytest.raises(DataError, match="expected the function to return"):
        ng.FIM(model, x, likelihood=FromDistribution(lambda f: f))
    with pytest.raises(DataError, match=r"batch shape \(9, ...\) .* got batch shape \(2,\)"):
        ng.FIM(model, x, likelihood=FromDistribution(lambda f: distributions.Normal(f[0], 1.0)))
    with pytest.raises(DataError, match="let the function map them, as exp or softplus"):
        ng.FIM(model, x, likelihood=FromDistribution(lambda f: distributions.Poisson(f)))
    known = FromDistribution(poisson)
    with pytest.raises(DataError, match=r"expected a target of shape \(9, 2\).*got \(9,\)"):
        ng.FIM(model, (x, x[:, 0]), likelihood=known, estimator="empirical")
    with pytest.raises(DataError, match="labels that the distribution Poisson has"):
        ng.FIM(model, (x, -x[:, :2].abs()), likelihood=known, estimator="empirical")
    with pytest.raises(NonFiniteError, match="expected finite outputs"):
        ng.FIM(model, x.log(), likelihood=known)
    with pytest.raises(DataError, match=r"function to be a function of \(outputs\)"):
        FromDistribution(lambda: None)


def test_scores_of_positions():
    model, x = network(2)
    x = x.view(3, 3, 3)
    y = distributions.Gamma(1.0, 1.0).sample((3, 3)).double()
    known = FromDistribution(gamma)
    rows = []
    for one in gamma(model(x)).log_prob(y).flatten():
        g = torch.autograd.grad(one, list(model.parameters()), retain_graph=True)
        rows.append(torch.cat([each.flatten() for each in g]))
    rows = torch.stack(rows)
    options = {"likelihood": known, "estimator": "empirical_positions"}
    F = ng.FIM(model, (x, y), "dense", **options)
    close(F.to_dense(), rows.mT @ rows / 3)


def test_bad_pairs_and_variances_are_named():
    model, x = network(3)
    with pytest.raises(DataError, match=r"outputs \(N, ..., 2\), the scores of two"):
        ng.FIM(model, x, likelihood=BradleyTerry())
    with pytest.raises(DataError, match=r"outputs \(N, ..., 2 C\), the means and then the log"):
        ng.FIM(model, x, likelihood=HeteroscedasticGaussian())
    model, x = network(2)
    with pytest.raises(DataError, match="a label for each pair"):
        ng.FIM(model, (x, x), likelihood=BradleyTerry(), estimator="empirical")
    with pytest.raises(DataError, match="a label for each mean"):
        ng.FIM(model, (x, x), likelihood=HeteroscedasticGaussian(), estimator="empirical")
    with pytest.raises(DataError, match="between 0 and 1"):
        ng.FIM(model, (x, x[:, 0] + 9), likelihood=BradleyTerry(), estimator="empirical")
    model[2].bias.data[1] = -800
    with pytest.raises(NonFiniteError, match="exp of some overflows: bound them"):
        ng.FIM(model, x, likelihood=HeteroscedasticGaussian())


@pytest.mark.parametrize("estimator", ["exact", "mc", "empirical"])
@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda f: distributions.Normal(f[:, 5], 1.0), "IndexError .index 5 is out of bounds"),
        (lambda f: distributions.Normal(f @ torch.ones(7, 7).double(), 1.0), "RuntimeError .mat1"),
        (lambda f: distributions.Normal(f.loc, 1.0), "AttributeError .*'loc'"),
        (lambda f: distributions.Normal(f), "TypeError"),
    ],
)
def test_a_function_that_does_not_fit_the_outputs(function, said, estimator):
    model, x = network(2)
    y = torch.randn(9, 2).double()
    message = rf"function to map outputs of shape \(9, 2\) .* it raised {said}.*forward= return"
    with pytest.raises(DataError, match=message):
        ng.FIM(model, (x, y), likelihood=FromDistribution(function), estimator=estimator, seed=0)


def test_the_remedies_of_a_function_that_does_not_fit():
    """A function for these outputs, or `forward=` for the outputs that it takes."""
    model, x = network(2)
    narrow = FromDistribution(lambda f: distributions.Normal(f[..., 0], 1.0))
    F = ng.FIM(model, x, "dense", likelihood=narrow)
    whole = FromDistribution(lambda f: distributions.Normal(f, 1.0))
    first = {"forward": lambda model, batch: model(batch)[:, :1]}
    close(F.to_dense(), ng.FIM(model, x, "dense", likelihood=whole, **first).to_dense())
    close(F.to_dense(), ng.FIM(model, x, "dense", likelihood=Gaussian(), **first).to_dense())
