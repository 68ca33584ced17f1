"""Masks, weights and NaN labels of every likelihood, against loops of autograd over examples."""

import math

import pytest
import torch
from torch import distributions, nn

import nngeo_lazy as ng
from nngeo_lazy.errors import DataError
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

VARIANCE = torch.tensor([0.5, 1.0, 2.0]).double()
SIGMA = torch.tensor([[2.0, 0.5], [0.5, 1.0]]).double()


def laplace(f):
    return distributions.Laplace(f[..., 0], f[..., 1].exp())


def log_count(p, y):
    return distributions.NegativeBinomial(torch.tensor(2.0), logits=p - math.log(2)).log_prob(y)


# the likelihood; outputs of a position; log p of each label; labels that fit
KINDS = {
    "bernoulli": (
        Bernoulli(),
        3,
        lambda f, y: distributions.Bernoulli(logits=f).log_prob(y),
        lambda f: torch.bernoulli(torch.full_like(f, 0.5)),
    ),
    "poisson": (
        Poisson(),
        3,
        lambda f, y: distributions.Poisson(f.exp()).log_prob(y),
        lambda f: torch.poisson(f.exp()),
    ),
    "negative binomial": (NegativeBinomial(2.0), 3, log_count, lambda f: torch.poisson(f.exp())),
    "student": (
        StudentT(3.0),
        3,
        lambda f, y: distributions.StudentT(torch.tensor(3.0).double(), f).log_prob(y),
        torch.randn_like,
    ),
    "gaussian": (
        Gaussian([0.5, 1.0, 2.0]),
        3,
        lambda f, y: distributions.Normal(f, VARIANCE.sqrt()).log_prob(y),
        torch.randn_like,
    ),
    "correlated": (
        Gaussian(SIGMA),
        2,
        lambda f, y: distributions.MultivariateNormal(f, SIGMA).log_prob(y),
        torch.randn_like,
    ),
    "categorical": (
        Categorical(class_dim=2),
        4,
        lambda f, y: distributions.Categorical(logits=f).log_prob(y),
        lambda f: torch.randint(4, f.shape[:-1]),
    ),
    "heteroscedastic": (
        HeteroscedasticGaussian(),
        4,
        lambda f, y: distributions.Normal(f[..., :2], (f[..., 2:] / 2).exp()).log_prob(y),
        lambda f: torch.randn_like(f[..., :2]),
    ),
    "pairs": (
        BradleyTerry(),
        2,
        lambda f, y: distributions.Bernoulli(logits=f[..., 0] - f[..., 1]).log_prob(y),
        lambda f: torch.bernoulli(torch.full_like(f[..., 0], 0.5)),
    ),
    "laplace": (
        FromDistribution(laplace),
        2,
        lambda f, y: laplace(f).log_prob(y),
        lambda f: torch.randn_like(f[..., 0]),
    ),
}
N, T = 7, 3


def problem(kind):
    likelihood, size, logs, labels = KINDS[kind]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, size)).double()
    x = torch.randn(N, T, 3).double()
    return model, x, labels(model(x).detach()), likelihood, logs


def gradients(model, losses):
    parameters = list(model.parameters())
    rows = [torch.autograd.grad(one, parameters, retain_graph=True) for one in losses]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


def jacobian(model, x):
    return gradients(model, model(x).flatten()).unflatten(0, (len(x), T, -1))


def expectation(kind, f):
    """E[score score^T] of the outputs (D,) of one position, by sums or integrals over labels."""
    likelihood, _, logs, _ = KINDS[kind]
    if kind in ("bernoulli", "pairs"):
        grid, width = torch.tensor([0.0, 1.0]).double(), torch.ones(2).double()
    elif kind in ("poisson", "negative binomial"):
        grid = torch.arange(1000).double()
        width = torch.ones_like(grid)
    elif kind == "categorical":
        grid, width = torch.arange(4), torch.ones(4).double()
    elif kind == "correlated":
        return torch.linalg.inv(SIGMA)
    else:
        t = torch.linspace(-1 + 1e-5, 1 - 1e-5, 10_001, dtype=torch.float64)
        grid = t / (1 - t.square())
        width = (1 + t.square()) / (1 - t.square()).square() * (t[1] - t[0])
    shape = likelihood.grid(f[None, None], None)[2:]
    found = torch.zeros(len(f), len(f)).double()
    for index in range(shape.numel()):

        def log_p(f, y, index=index):
            every = y.expand(shape) if len(shape) else y
            return logs(f, every).reshape(-1)[index]

        score = torch.func.vmap(torch.func.grad(log_p), (None, 0))(f, grid)
        p = torch.stack([log_p(f, y) for y in grid]) if len(grid) < 5 else None
        if p is None:
            p = torch.func.vmap(log_p, (None, 0))(f, grid)
        found += torch.einsum("y,yi,yj->ij", p.exp() * width, score, score)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_labels_in_every_estimator(kind):
    model, x, y, likelihood, logs = problem(kind)
    f, J = model(x), jacobian(model, x)
    each = logs(f, y)  # (N, T, ...)
    w = torch.rand(each.shape[:2]).double() * 2
    w[2] = 0
    w[3, 1] = 0
    spread = w.reshape(N, T, *(1,) * (each.dim() - 2))
    known = Weighted(likelihood)
    # the losses, the density and the observed scores are those of torch
    want = (spread * each).reshape(N, -1).sum(1)
    close(known.log_prob(f.detach(), (y, w)), want.detach())
    G = gradients(model, want)
    F = ng.FIM(model, (x, (y, w)), "dense", likelihood=known, estimator="empirical")
    close(F.to_dense(), G.mT @ G / N, 1e-9)
    H = ng.Hessian(model, (x, (y, w)), "dense", loss=known)
    parameters = list(model.parameters())
    g = torch.autograd.grad(-want.sum() / N, parameters, create_graph=True)
    H_want = gradients(model, torch.cat([each.flatten() for each in g]))
    close(H.to_dense(), H_want, 1e-8)
    # the Fisher is that of data which occur so often
    middle = torch.stack([expectation(kind, one) for one in f.detach().flatten(0, 1)])
    middle = middle.view(N, T, *middle.shape[1:]) * w[..., None, None]
    want = torch.einsum("ntip,ntij,ntjq->pq", J, middle, J) / N
    exact = [
        ng.FIM(model, (x, (y, w)), "dense", likelihood=known),
        ng.FIM(model, (x, (y, w)), "implicit", likelihood=known),
        ng.GGN(model, (x, (y, w)), "dense", loss=known),
    ]
    for F in exact:
        close(F.to_dense(), want, 1e-4)
        close(F.to_dense(), exact[0].to_dense(), 1e-9)
    drawn = ng.FIM(
        model, (x, (y, w)), "dense", likelihood=known, estimator="mc", samples=800, seed=0
    )
    close(drawn.to_dense(), want, 0.15)
    assert F.num_examples == N
    assert F.num_terms == (each[..., None] * 0 + 1)[w > 0].numel() * likelihood.size(f)
    # every representation takes them
    for representation in ("kfac", "ekfac", "diagonal", "block_diagonal", "low_rank", "factored"):
        F = ng.FIM(model, (x, (y, w)), representation, likelihood=known)
        assert bool(F.diagonal().isfinite().all())
    diagonal = ng.FIM(model, (x, (y, w)), "diagonal", likelihood=known).diagonal()
    close(diagonal, exact[0].to_dense().diagonal(), 1e-9)
    assert ng.Laplace(model, F, likelihood=known).likelihood == known


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "categorical"])
@pytest.mark.parametrize("estimator", ["exact", "mc", "empirical"])
def test_nan_labels_are_refused_or_masked(kind, estimator):
    model, x, y, likelihood, _ = problem(kind)
    y[1, 0] = math.nan
    y[4] = math.nan
    options = {"estimator": estimator, "seed": 0}
    with pytest.raises(DataError, match=r"some are NaN: mask them, as in likelihoods.Weighted"):
        ng.FIM(model, (x, y), "kfac", likelihood=likelihood, **options)
    with pytest.raises(DataError, match="some are NaN"):
        ng.FIM(model, (x, y), "kfac", likelihood=Weighted(likelihood), **options)
    known = Weighted(likelihood, nan="mask")
    w = torch.ones(N, T)
    w[1, 0] = w[4] = 0
    for representation in ("dense", "kfac", "implicit"):
        F = ng.FIM(model, (x, y), representation, likelihood=known, **options)
        y_known = y.nan_to_num(nan=1.0)
        G = ng.FIM(model, (x, (y_known, w)), representation, likelihood=known, **options)
        close(F.to_dense(), G.to_dense(), 1e-9)
        assert F.num_terms == G.num_terms
    assert F.info.log_likelihood == pytest.approx(G.info.log_likelihood)


def test_weights_of_examples_are_repeated_examples():
    """In every likelihood, also one that knows the loss of an example alone."""
    w = torch.tensor([1, 2, 0, 1, 3, 1, 1])
    again = torch.repeat_interleave(torch.arange(N), w)
    for kind in KINDS:
        model, x, y, likelihood, _ = problem(kind)
        F = ng.FIM(model, (x, (y, w)), "dense", likelihood=Weighted(likelihood))
        G = ng.FIM(model, (x[again], y[again]), "dense", likelihood=likelihood)
        close(N * F.to_dense(), len(again) * G.to_dense())
        assert F.info.log_likelihood == pytest.approx(G.info.log_likelihood)
    model, x, y, _, _ = problem("gaussian")
    loss = Weighted(ng.likelihoods.CallableLoss(lambda f, y: (f - y).cosh().log().sum((1, 2))))
    F = ng.GGN(model, (x, (y, w)), "dense", loss=loss)
    G = ng.GGN(model, (x[again], y[again]), "dense", loss=loss.likelihood)
    close(N * F.to_dense(), len(again) * G.to_dense())
    with pytest.raises(DataError, match=r"expected weights of labels \(7,\), .* of examples alone"):
        ng.GGN(model, (x, (y, w[:, None].expand(N, T))), "dense", loss=loss)


def test_masks_of_tokens_are_ignored_labels():
    """Shifts and classes in any dimension; masked positions do not enter Kronecker factors."""
    torch.manual_seed(0)
    model, ids = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5)), torch.randint(5, (6, 4))
    mask = torch.rand(6, 4) < 0.6
    for shift in (0, 1):
        known = Categorical(class_dim=-1, shift=shift)
        for representation in ("kfac", "dense"):
            F = ng.FIM(model, (ids, (ids, mask)), representation, likelihood=Weighted(known))
            ignored = ids.masked_fill(~mask, -100)
            G = ng.FIM(model, (ids, ignored), representation, likelihood=known)
            close(F.to_dense(), G.to_dense(), 1e-6)
            assert F.num_terms == G.num_terms
    first = lambda model, batch: model(batch[0]).mT  # noqa: E731
    F = ng.FIM(model, (ids, (ids, mask)), likelihood=Weighted(Categorical(1)), forward=first)
    G = ng.FIM(model, (ids, ignored), likelihood=Categorical(-1))
    close(F.to_dense(), G.to_dense(), 1e-6)


def test_single_outputs_may_be_masked_and_batches_are_cut():
    model, x, y, _, _ = problem("gaussian")
    y[0, 0, 1] = math.nan
    kept = (~y.isnan()).double()
    known = Weighted(Gaussian(), nan="mask")
    J = jacobian(model, x)
    want = torch.einsum("ntip,nti,ntiq->pq", J, kept, J) / N
    F = ng.FIM(model, [(x[:3], y[:3]), (x[3:], y[3:])], "dense", likelihood=known)
    close(F.to_dense(), want)
    assert F.num_terms == int(kept.sum())
    losses = known.loss(model(x), y)
    want = torch.where(y.isnan(), 0.0, (model(x) - y).square()).sum((1, 2)) / 2
    close(losses, want)
    model, x, y, likelihood, _ = problem("correlated")
    y[0, 0, 0] = math.nan
    with pytest.raises(DataError, match="all numbers or all NaN, but some are NaN in part"):
        ng.FIM(model, (x, y), "kfac", likelihood=Weighted(likelihood, nan="mask"))


def test_bad_weights_are_named():
    model, x, y, likelihood, _ = problem("gaussian")
    with pytest.raises(DataError, match=r"weights of labels \(7, 3, 3\).*got shape \(7, 2"):
        ng.FIM(model, (x, (y, torch.ones(N, 2))), "kfac", likelihood=Weighted(likelihood))
    with pytest.raises(DataError, match="finite and from 0 up"):
        ng.FIM(model, (x, (y, -torch.ones(N))), "kfac", likelihood=Weighted(likelihood))
    with pytest.raises(DataError, match=r"target that is one tensor.*take likelihoods.Weighted"):
        ng.FIM(model, (x, (y, torch.ones(N))), likelihood=likelihood, estimator="empirical")
    with pytest.raises(DataError, match="likelihood object, as in Weighted"):
        Weighted("gaussian")
    with pytest.raises(DataError, match="'refuse' or 'mask', got 'drop'"):
        Weighted(likelihood, nan="drop")
    with pytest.raises(DataError, match=r"a target \(labels, weights\), or labels alone, got 3"):
        ng.FIM(model, (x, (y, y, y)), likelihood=Weighted(likelihood))
    with pytest.raises(DataError, match="targets that the optimizer does not see"):
        ng.optim.NaturalGradient(model, "kfac", Weighted(likelihood))
    model(x).square().mean().backward()


def mixed(f):
    """Labels whose scale is that of all outputs."""
    return distributions.Normal(f, f.exp().mean((1, 2), keepdim=True).expand_as(f))


def test_masks_of_labels_that_share_outputs_are_named():
    model, x, y, _, _ = problem("gaussian")
    known = Weighted(FromDistribution(mixed))
    with pytest.raises(DataError, match=r"at its own place alone.*weight whole examples \(N,\)"):
        ng.FIM(model, (x, (y, torch.ones(N, T))), "kfac", likelihood=known)
    F = ng.FIM(model, (x, (y, torch.ones(N))), "dense", likelihood=known)
    close(F.to_dense(), ng.FIM(model, x, "dense", likelihood=known.likelihood).to_dense())
