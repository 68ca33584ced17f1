"""The Laplace approximation, against dense linear algebra and Gaussian processes."""

import math
import warnings

import pytest
import torch
from torch import nn

import nngeo_lazy as ng
from nngeo_lazy.errors import (
    ConvergenceWarning,
    DataError,
    EstimateWarning,
    NotPositiveDefiniteError,
    SpaceMismatchError,
    UnsupportedLayerError,
)
from nngeo_lazy.likelihoods import Categorical, Gaussian

from cases import close

STORED = ["dense", "block_diagonal", "diagonal", "quasi_diagonal", "kfac", "ekfac", "low_rank"]
ALL = [*STORED, "factored", "implicit"]
EXACT = ["dense", "low_rank", "factored", "implicit"]


def problem(outputs=3, n=25, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs)).double()
    return model, torch.randn(n, 4).double(), torch.randint(outputs, (n,))


def oracle_jacobian(model, x):
    """(N, C, P) by torch.func alone."""
    params = dict(model.named_parameters())

    def f(p, one):
        return torch.func.functional_call(model, p, (one[None],))[0]

    rows = torch.func.vmap(torch.func.jacrev(f), (None, 0))(
        {k: v.detach() for k, v in params.items()}, x
    )
    return torch.cat([rows[k].flatten(2) for k in params], -1)


def posterior(F, prior):
    """(N F + Lambda)^-1, dense."""
    return torch.linalg.inv(F.num_examples * F.to_dense() + torch.diag(prior))


# --- the posterior --------------------------------------------------------------------------------


@pytest.mark.parametrize("representation", ALL)
@pytest.mark.parametrize("kind", ["number", "layers", "vector"])
def test_functional_is_the_dense_posterior(representation, kind):
    model, x, y = problem()
    F = ng.FIM(model, (x, y), representation)
    size = len(F.space)
    diagonal = torch.full((size,), 0.7, dtype=torch.float64)
    prior = 0.7
    if kind == "layers":
        prior = {"0": 0.5, "2": torch.tensor(3.0)}
        diagonal = torch.cat([torch.full((25,), 0.5), torch.full((18,), 3.0)]).double()
    elif kind == "vector":
        prior = diagonal = torch.linspace(0.1, 2, size).double()
    la = ng.Laplace(model, F, prior_precision=prior)
    new = torch.randn(7, 4).double()
    J = oracle_jacobian(model, new)
    expected = J @ posterior(F, diagonal) @ J.mT
    found = la.functional(new)
    close(found.mean, model(new).detach(), 1e-12)
    close(found.covariance, expected, 1e-8)
    close(la.precision.to_dense(), torch.linalg.inv(posterior(F, diagonal)), 1e-10)
    close(la.covariance.to_dense(), posterior(F, diagonal), 1e-8)


@pytest.mark.parametrize("representation", EXACT)
def test_parameter_space_and_function_space_agree(representation):
    """J Sigma J^T is the posterior of a Gaussian process with the tangent kernel."""
    model, x, y = problem()
    F = ng.FIM(model, (x, y), representation)
    new, prior = torch.randn(6, 4).double(), 0.3
    p = model(x).detach().softmax(-1)
    H = torch.block_diag(*(torch.diag(q) - torch.outer(q, q) for q in p))
    values, vectors = torch.linalg.eigh(H)
    S = vectors * values.clamp_min(0).sqrt()
    K = ng.NTK(model, x).to_dense() / prior
    cross = ng.NTK(model, new, x).to_dense() / prior
    own = ng.NTK(model, new).to_dense() / prior
    inner = torch.eye(len(S)).double() + S.mT @ K @ S
    full = own - cross @ S @ torch.linalg.solve(inner, S.mT @ cross.mT)
    blocks = torch.stack([full[3 * k : 3 * k + 3, 3 * k : 3 * k + 3] for k in range(6)])
    close(ng.Laplace(model, F, prior_precision=prior).functional(new).covariance, blocks, 1e-8)


@pytest.mark.parametrize("representation", ALL)
def test_samples_have_the_posterior_covariance(representation):
    model, x, y = problem(outputs=2)
    F = ng.FIM(model, (x, y), representation)
    la = ng.Laplace(model, F, prior_precision=2.0)
    draws = la.sample(4000, seed=1)
    assert torch.equal(draws, la.sample(4000, seed=1))
    centered = draws - F.space.values(model).detach()
    covariance = centered.mT @ centered / len(draws)
    expected = posterior(F, torch.full((len(F.space),), 2.0).double())
    assert (covariance - expected).norm() < 0.2 * expected.norm()
    assert centered.mean(0).norm() < 5 * (expected.trace() / len(draws)).sqrt()


@pytest.mark.parametrize("params", ["2", "0.weight", ["0.bias", "2"]])
def test_posterior_of_some_parameters(params):
    model, x, y = problem()
    F = ng.FIM(model, (x, y), "dense", params=params)
    la = ng.Laplace(model, F)
    assert not la.predictive(x).requires_grad
    everything = ng.FIM(model, (x, y), "dense").space
    index = torch.cat([torch.arange(len(everything))[everything.slices[n]] for n in F.space.names])
    J = oracle_jacobian(model, x)[..., index]
    expected = J @ posterior(F, torch.ones(len(index)).double()) @ J.mT
    close(la.functional(x).covariance, expected, 1e-9)
    assert la.sample(2).shape == (2, len(index))


def test_a_later_step_changes_nothing():
    model, x, y = problem()
    for representation in ("kfac", "implicit"):
        la = ng.Laplace(model, ng.FIM(model, (x, y), representation))
        before = la.functional(x[:5])
        kept = {k: v.clone() for k, v in model.state_dict().items()}
        with torch.no_grad():
            for p in model.parameters():
                p.add_(1.0)
        moved = model.state_dict()
        after = la.functional(x[:5])
        assert torch.equal(before.mean, after.mean)
        close(after.covariance, before.covariance, 1e-9)
        assert all(torch.equal(v, moved[k]) for k, v in model.state_dict().items())
        model.load_state_dict(kept)


def test_inputs_in_batches_and_by_name():
    model, x, y = problem(n=300)
    la = ng.Laplace(model, ng.FIM(model, (x, y), "kfac"))
    whole = la.functional(x)  # in pieces of 128
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 70)
    close(la.functional(loader).covariance, whole.covariance, 1e-12)
    named = ng.Laplace(model, la.operator, forward=lambda f, batch: f(batch["x"]))
    close(named.functional({"x": x}).mean, whole.mean, 1e-12)


def test_outputs_with_positions_are_flattened():
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    x, y = torch.randn(6, 4, 3).double(), torch.randn(6, 4, 2).double()
    F = ng.FIM(model, (x, y), "dense", likelihood=Gaussian(0.5))
    la = ng.Laplace(model, F)
    found = la.functional(x)
    assert found.mean.shape == (6, 8)
    assert found.covariance.shape == (6, 8, 8)
    labels = la.predictive(x)
    noise = labels.covariance - found.covariance
    close(noise, (0.5 * torch.eye(8).double()).expand(6, 8, 8), 1e-9)


# --- evidence -------------------------------------------------------------------------------------


@pytest.mark.parametrize("representation", [*EXACT, "kfac", "ekfac", "block_diagonal"])
@pytest.mark.parametrize("variance", [1.0, 0.3])
def test_evidence_of_a_linear_model_is_that_of_a_gaussian_process(representation, variance):
    """Yardstick: exact for a linear model at its posterior mean; with one output KFAC is, too."""
    torch.manual_seed(1)
    n, d, prior = 12, 5, 0.8
    x, y = torch.randn(n, d).double(), torch.randn(n, 1).double()
    center = torch.randn(d).double()
    model = nn.Linear(d, 1, bias=False).double()
    gram = x.mT @ x / variance + prior * torch.eye(d).double()
    with torch.no_grad():
        ridge = torch.linalg.solve(gram, x.mT @ y[:, 0] / variance + prior * center)
        model.weight.copy_(ridge[None])
    F = ng.FIM(model, (x, y), representation, likelihood=Gaussian(variance))
    la = ng.Laplace(model, F, prior_precision=prior, prior_mean=center)
    process = torch.distributions.MultivariateNormal(
        x @ center, x @ x.mT / prior + variance * torch.eye(n).double()
    )
    expected = process.log_prob(y[:, 0])
    close(la.log_marginal_likelihood(), expected, 1e-10)
    close(la.log_marginal_likelihood(torch.tensor(prior)), expected, 1e-7)


def dense_evidence(model, F, labels, prior, x):
    w = F.space.values(model).detach()
    log_p = -nn.functional.cross_entropy(model(x), labels, reduction="sum").detach()
    A = F.num_examples * F.to_dense() + torch.diag(prior)
    return log_p - (prior * w * w).sum() / 2 + prior.log().sum() / 2 - A.logdet() / 2


@pytest.mark.parametrize("representation", ALL)
def test_evidence_is_the_dense_one_and_differentiable(representation):
    model, x, y = problem()
    F = ng.FIM(model, (x, y), representation)
    la = ng.Laplace(model, F)
    dense = ng.FIM(model, (x, y), representation).to_dense()
    size = len(F.space)
    for prior in (torch.tensor(0.6), torch.rand(size) + 0.1):
        prior = prior.double().requires_grad_()
        found = la.log_marginal_likelihood(prior)
        own = prior.detach().clone().requires_grad_()
        expected = dense_evidence(model, _Dense(F, dense), y, own.expand(size), x)
        close(found, expected, 1e-10)
        (g,), (e,) = torch.autograd.grad(found, prior), torch.autograd.grad(expected, own)
        close(g, e, 1e-7)
    a = torch.tensor(0.4).double().requires_grad_()
    by_layer = la.log_marginal_likelihood({"0": a, "2": 2.0})
    diagonal = torch.cat([a.expand(25), torch.full((18,), 2.0).double()])
    close(by_layer, dense_evidence(model, _Dense(F, dense), y, diagonal, x), 1e-10)
    assert torch.autograd.grad(by_layer, a)[0].isfinite()


class _Dense:
    """What the oracle reads of F."""

    def __init__(self, F, dense):
        self.space, self.num_examples, self._dense = F.space, F.num_examples, dense

    def to_dense(self):
        return self._dense


def test_evidence_in_float32_has_the_digits_of_float64():
    model, x, y = problem(n=60)
    exact = ng.Laplace(model, ng.FIM(model, (x, y), "kfac")).log_marginal_likelihood(1e-3)
    single = model.float()
    la = ng.Laplace(single, ng.FIM(single, (x.float(), y), "kfac"))
    found = la.log_marginal_likelihood(1e-3)
    assert found.dtype == torch.float64
    assert abs(float(found - exact)) < 1e-4 * abs(float(exact))


def fit_to(model, x, y, steps=300):
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=steps, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss = loss + 0.5 * sum(p.square().sum() for p in model.parameters()) / len(x)
        loss.backward()
        return loss

    optimizer.step(closure)


@pytest.mark.parametrize(
    "representation", ["dense", "kfac", "ekfac", "low_rank", "diagonal", "factored"]
)
def test_the_fitted_scalar_is_the_best_of_a_grid(representation):
    model, x, y = problem()
    fit_to(model, x, y)
    la = ng.Laplace(model, ng.FIM(model, (x, y), representation))
    fitted = la.fit_prior_precision()
    grid = torch.logspace(-3, 3, 200).double()
    best = max(float(la.log_marginal_likelihood(value)) for value in grid)
    found = float(fitted.log_marginal_likelihood())
    assert found >= best - 1e-6
    assert found < best + 0.01
    assert la.prior_precision == 1.0  # this one stays as it was


def test_richer_priors_have_more_evidence():
    model, x, y = problem()
    fit_to(model, x, y)
    for representation in ("dense", "diagonal"):
        la = ng.Laplace(model, ng.FIM(model, (x, y), representation))
        found = [
            float(la.fit_prior_precision(s).log_marginal_likelihood())
            for s in ("scalar", "layer", "diagonal")
        ]
        assert found[0] < found[1] < found[2]
    kfac = ng.Laplace(model, ng.FIM(model, (x, y), "kfac"))
    layer = kfac.fit_prior_precision("layer")
    assert list(layer.prior_precision) == [("0.weight", "0.bias"), ("2.weight", "2.bias")]
    assert layer.log_marginal_likelihood() > kfac.log_marginal_likelihood()
    prior = {k: v.clone().requires_grad_() for k, v in layer.prior_precision.items()}
    slopes = torch.autograd.grad(kfac.log_marginal_likelihood(prior), list(prior.values()))
    assert all(
        abs(float(g * v.detach())) < 1e-3 for g, v in zip(slopes, prior.values(), strict=True)
    )
    assert torch.equal(layer.functional(x).mean, kfac.functional(x).mean)


def test_a_fit_needs_exact_determinants():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 3)).double()
    x, y = torch.randn(30, 20).double(), torch.randint(3, (30,))
    la = ng.Laplace(model, ng.FIM(model, (x, y), "implicit"))
    with pytest.raises(UnsupportedLayerError, match="exact log-determinant"):
        la.fit_prior_precision()
    with pytest.warns(EstimateWarning):
        assert la.log_marginal_likelihood().isfinite()
    with pytest.raises(UnsupportedLayerError, match="a diagonal prior precision"):
        ng.Laplace(model, ng.FIM(model, (x, y), "kfac")).fit_prior_precision("diagonal")


def test_a_search_that_ends_early_warns():
    model, x, y = problem()
    la = ng.Laplace(model, ng.FIM(model, (x, y), "dense"), prior_precision=1e-5)
    with pytest.warns(ConvergenceWarning, match="raise max_iter"):
        la.fit_prior_precision("diagonal", max_iter=1)


def test_saved_pooled_and_altered_operators(tmp_path):
    model, x, y = problem()
    F = ng.FIM(model, (x, y), "kfac")
    expected = ng.Laplace(model, F).log_marginal_likelihood()
    ng.save(F, tmp_path / "F.pt")
    loaded = ng.Laplace(model, ng.load(tmp_path / "F.pt"))
    close(loaded.log_marginal_likelihood(), expected, 1e-12)
    assert loaded.likelihood == Categorical()
    halves = [ng.FIM(model, (x[s], y[s]), "kfac") for s in (slice(0, 10), slice(10, None))]
    close(ng.Laplace(model, ng.merge(halves)).log_marginal_likelihood(), expected, 1e-10)
    implicit = ng.FIM(model, (x, y), "implicit")
    assert implicit.info.log_likelihood is not None
    assert implicit.at(implicit.parameters + 1).info.log_likelihood is None  # of another point
    tempered = ng.Laplace(model, 2 * F, likelihood="categorical")
    assert tempered.predictive(x).shape == (25, 3)


# --- predictions ----------------------------------------------------------------------------------


def test_probit_and_monte_carlo_are_the_integral_for_one_logit():
    torch.manual_seed(0)
    model = nn.Linear(3, 1).double()
    x, y = torch.randn(30, 3).double(), torch.randint(2, (30, 1)).double()
    la = ng.Laplace(model, ng.FIM(model, (x, y), "dense", likelihood="bernoulli"))
    mean, covariance = la.functional(x)
    nodes = torch.linspace(-8, 8, 4001).double()
    density = (-nodes.square() / 2).exp() / math.sqrt(2 * math.pi) * (nodes[1] - nodes[0])
    exact = ((mean + covariance[:, 0].sqrt() * nodes).sigmoid() * density).sum(1, keepdim=True)
    assert (la.predictive(x) - exact).abs().max() < 0.02
    assert (la.predictive(x, "mc", samples=20000, seed=0) - exact).abs().max() < 0.01
    draws = [la.predictive(x, "mc", samples=5, seed=3) for _ in range(2)]
    assert torch.equal(*draws)


def test_multiclass_predictions_are_probabilities_and_less_certain():
    model, x, y = problem(n=40)
    fit_to(model, x, y)
    la = ng.Laplace(model, ng.FIM(model, (x, y), "dense"), prior_precision=0.5)
    plain = model(x).detach().softmax(-1)
    for method in ("probit", "mc", "bridge"):
        p = la.predictive(x, method)
        close(p.sum(1), torch.ones(40).double(), 1e-12)
        assert (p > 0).all()
        entropy = -(p * p.log()).sum(1).mean()
        assert entropy > -(plain * plain.log()).sum(1).mean()
    mean, covariance = la.functional(x)
    variance = covariance.diagonal(dim1=1, dim2=2)
    close(la.predictive(x), (mean / (1 + math.pi / 8 * variance).sqrt()).softmax(1), 1e-12)


def test_the_bridge_is_that_of_the_paper():
    """Its Dirichlet has the mode of the logits: alpha of a diagonal covariance, written out."""
    model, x, y = problem()
    la = ng.Laplace(model, ng.FIM(model, (x, y), "dense"))
    mean, covariance = la.functional(x)
    expected = []
    for m, S in zip(mean, covariance, strict=True):
        ones = torch.ones(3).double()
        P = torch.eye(3).double() - torch.outer(S @ ones, ones) / (ones @ S @ ones)
        m, S = P @ m, P @ S @ P.mT
        alpha = (1 - 2 / 3 + m.exp() * (-m).exp().sum() / 9) / S.diagonal()
        expected.append(alpha / alpha.sum())
    close(la.predictive(x, "bridge"), torch.stack(expected), 1e-8)


@pytest.mark.parametrize("structure", ["scalar", "layer", "diagonal"])
@pytest.mark.parametrize("representation", [*STORED, "factored"])
def test_structures_that_a_representation_fits(structure, representation):
    """As the page says; of a network with more parameters than an estimate multiplies out."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 3)).double()
    x, y = torch.randn(30, 20).double(), torch.randint(3, (30,))
    la = ng.Laplace(model, ng.FIM(model, (x, y), representation))
    closed = {"scalar": True, "layer": representation != "factored"}
    if closed.get(structure, representation not in ("kfac", "ekfac", "factored")):
        fitted = la.fit_prior_precision(structure)
        assert fitted.log_marginal_likelihood() > la.log_marginal_likelihood()
    else:
        with pytest.raises(UnsupportedLayerError, match="exact log-determinant"):
            la.fit_prior_precision(structure)


@pytest.mark.parametrize("variance", [0.3, [0.5, 2.0], [[1.0, 0.4], [0.4, 0.5]]])
def test_gaussian_predictions_have_the_noise(variance):
    torch.manual_seed(0)
    model, x, y = nn.Linear(3, 2).double(), torch.randn(9, 3).double(), torch.randn(9, 2).double()
    F = ng.FIM(model, (x, y), "dense", likelihood=Gaussian(variance))
    la = ng.Laplace(model, F)
    found, labels = la.functional(x), la.predictive(x)
    noise = torch.tensor(variance, dtype=torch.float64)
    noise = noise if noise.dim() == 2 else torch.diag(noise.expand(2))
    close(labels.covariance, found.covariance + noise, 1e-12)
    close(labels.mean, found.mean, 1e-12)
    density = torch.distributions.MultivariateNormal(torch.zeros(2).double(), noise)
    expected = float(density.log_prob(y - model(x).detach()).sum())
    assert math.isclose(F.info.log_likelihood, expected, rel_tol=1e-12)


def test_poisson_predictions_are_log_normal_means():
    torch.manual_seed(0)
    model, x = nn.Linear(3, 2).double(), torch.randn(9, 3).double()
    y = torch.randint(5, (9, 2)).double()
    F = ng.FIM(model, (x, y), "dense", likelihood="poisson")
    la = ng.Laplace(model, F, prior_precision=5.0)
    draws = la.functional(x).sample(200000, seed=0).exp().mean(0)
    assert ((la.predictive(x) - draws) / draws).abs().max() < 0.02
    with torch.no_grad():
        expected = torch.distributions.Poisson(model(x).exp()).log_prob(y).sum()
    assert math.isclose(F.info.log_likelihood, float(expected), rel_tol=1e-12)


# --- bad input ------------------------------------------------------------------------------------


def test_bad_input_is_named():
    model, x, y = problem()
    F = ng.FIM(model, (x, y), "kfac")
    with pytest.raises(DataError, match="as FIM returns it, got Tensor"):
        ng.Laplace(model, torch.eye(43))
    with pytest.raises(DataError, match="how many examples"):
        ng.Laplace(model, ng.identity(F.space, 1.0))
    with pytest.raises(SpaceMismatchError, match="matches no parameter"):
        ng.Laplace(nn.Linear(4, 3), F)
    with pytest.raises(SpaceMismatchError, match="parameters of the model"):
        ng.Laplace(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double(), F)
    for prior in (0.0, -1.0, float("inf"), {"0": 1.0}):
        with pytest.raises(NotPositiveDefiniteError, match=r"prior precision|>= 0"):
            ng.Laplace(model, F, prior_precision=prior)
    with pytest.raises(SpaceMismatchError, match="prior_mean"):
        ng.Laplace(model, F, prior_mean=torch.zeros(3))
    la = ng.Laplace(model, F)
    with pytest.raises(NotPositiveDefiniteError, match="must name them all"):
        la.log_marginal_likelihood({"0": 1.0})
    with pytest.raises(ValueError, match="expected method"):
        la.predictive(x, "laplace")
    with pytest.raises(ValueError, match="expected structure"):
        la.fit_prior_precision("block")


def test_a_likelihood_that_does_not_fit():
    model, x, y = problem()
    F = ng.FIM(model, (x, y), "kfac")
    with pytest.raises(
        DataError, match=r"expected the likelihood of F, Categorical.*got Bernoulli"
    ):
        ng.Laplace(model, F, likelihood="bernoulli")
    weighted = Categorical(weight=[1.0, 2.0, 3.0])
    with pytest.raises(DataError, match="class weights is none"):
        ng.Laplace(model, ng.GGN(model, (x, y), "kfac", loss=weighted))
    with pytest.raises(DataError, match="is reduced otherwise"):
        ng.Laplace(model, ng.GGN(model, (x, torch.randn(25, 3)), "kfac", loss=nn.MSELoss()))
    mean = ng.GGN(model, (x, y), "kfac", loss=nn.CrossEntropyLoss())  # a mean over the examples
    close(
        ng.Laplace(model, mean).log_marginal_likelihood(),
        ng.Laplace(model, F).log_marginal_likelihood(),
        1e-10,
    )
    loss = ng.GGN(model, (x, y), "dense", loss=lambda f, t: f.square().sum(1))
    la = ng.Laplace(model, loss)
    assert la.functional(x).covariance.shape == (25, 3, 3)
    for call in (lambda: la.predictive(x), la.log_marginal_likelihood):
        with pytest.raises(DataError, match="needs a likelihood, and F does not say which"):
            call()
    for other in (torch.randn(25), torch.randn(25, 3).to(torch.complex64)):  # targets not read
        F = ng.FIM(model, (x, other), "kfac", likelihood="gaussian")
        with pytest.raises(DataError, match="that do not fit its likelihood"):
            ng.Laplace(model, F).log_marginal_likelihood()
    unlabelled = ng.Laplace(model, ng.FIM(model, x, "kfac", likelihood="categorical"))
    assert unlabelled.predictive(x).shape == (25, 3)
    with pytest.raises(DataError, match="built from batches without labels"):
        unlabelled.log_marginal_likelihood()
    b = ng.Laplace(model, ng.FIM(model, x, "kfac", likelihood="bernoulli"))
    with pytest.raises(DataError, match="bridge is to a Dirichlet"):
        b.predictive(x, "bridge")
    one = nn.Linear(4, 1).double()
    wrong = ng.Laplace(one, ng.FIM(one, x, "kfac", likelihood="bernoulli"))
    wrong.likelihood = Categorical()
    with pytest.raises(DataError, match="at least two classes"):
        wrong.predictive(x)


def test_positions_have_no_single_label():
    model = nn.Linear(3, 4).double()
    x, y = torch.randn(5, 6, 3).double(), torch.randint(4, (5, 6))
    la = ng.Laplace(model, ng.FIM(model, (x, y), "kfac", likelihood=Categorical(class_dim=2)))
    with pytest.raises(DataError, match="one label for each example"):
        la.predictive(x)
    assert la.functional(x).mean.shape == (5, 24)


def test_frozen_parameters_that_change_are_refused():
    model, x, y = problem()
    la = ng.Laplace(model, ng.FIM(model, (x, y), "kfac", params="2"))
    with torch.no_grad():
        model[0].weight.add_(1)
    with pytest.raises(DataError, match=r"0\.weight.* changed since"):
        la.functional(x)


def test_no_warning_is_raised_in_plain_use():
    model, x, y = problem()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        la = ng.Laplace(model, ng.FIM(model, (x, y), "ekfac")).fit_prior_precision("layer")
        la.predictive(x, "mc")
        assert "Laplace(" in repr(la)


@pytest.mark.parametrize("representation", ["dense", "low_rank", "factored"])
def test_a_weak_prior_in_float32(representation):
    """The prior is far below the rounding of F, which is singular."""
    model, x, y = problem(n=5)
    exact = ng.Laplace(model, ng.FIM(model, (x, y), representation), prior_precision=1e-6)
    single = model.float()
    F = ng.FIM(single, (x.float(), y), representation)
    la = ng.Laplace(single, F, prior_precision=1e-6)
    found = la.functional(x.float() + 1).covariance.double()
    single.double()
    close(found, exact.functional(x + 1).covariance, 1e-2)


def test_outputs_of_a_forward_that_differentiates_the_network():
    net = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1)).double()

    def residual(model, batch):
        x = batch[0].detach().requires_grad_()
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        return slope + model(x)

    batch = torch.rand(6, 1).double(), torch.zeros(6, 1).double()
    options = {"likelihood": "gaussian", "forward": residual}
    F = ng.FIM(net, batch, "dense", **options)
    found = ng.Laplace(net, F, forward=residual).functional(batch)
    parameters = list(net.parameters())
    rows = [
        torch.autograd.grad(f, parameters, retain_graph=True)
        for f in residual(net, batch).flatten()
    ]
    J = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    eye = torch.eye(J.shape[1], dtype=J.dtype)
    wanted = (J @ torch.linalg.inv(J.mT @ J + eye) * J).sum(1)
    close(found.covariance.flatten(), wanted)
