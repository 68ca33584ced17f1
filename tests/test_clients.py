"""Influence functions, elastic weight consolidation and pruning, against direct computation."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F_

import nngeo_lazy as ng
from nngeo_lazy.errors import DataError, NotPositiveDefiniteError, SpaceMismatchError
from nngeo_lazy.likelihoods import Gaussian

from cases import close

ALL = ["dense", "block_diagonal", "diagonal", "kfac", "ekfac", "low_rank", "factored", "implicit"]


def problem(outputs=3, n=25, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs)).double()
    return model, torch.randn(n, 4).double(), torch.randint(outputs, (n,))


def gradients(model, x, y):
    rows = []
    for one, label in zip(x, y, strict=True):
        loss = F_.cross_entropy(model(one[None]), label[None])
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, model.parameters())]))
    return torch.stack(rows)


# --- influence ------------------------------------------------------------------------------------


@pytest.mark.parametrize("representation", ALL)
def test_influences_are_products_with_the_inverse(representation):
    model, x, y = problem()
    F = ng.FIM(model, (x, y), representation)
    test, labels = torch.randn(6, 4).double(), torch.randint(3, (6,))
    found = ng.influences(model, F, (x, y), (test, labels), loss="categorical", damping=0.1)
    damped = F.to_dense() + 0.1 * torch.eye(len(F.space)).double()
    inner = torch.linalg.solve(damped, gradients(model, x, y).mT)
    close(found, gradients(model, test, labels) @ inner / 25, 1e-8)
    some = ng.influences(model, F, (x[:7], y[:7]), (test, labels), loss="categorical", damping=0.1)
    close(some, found[:, :7], 1e-8)


@pytest.mark.parametrize("representation", ["dense", "low_rank", "factored", "implicit"])
@pytest.mark.parametrize("decay", [0.05, 1.0])
def test_leaving_out_of_ridge_regression_is_exact(representation, decay):
    """Yardstick: beta_-i - beta = -(X^T X + l)^-1 x_i e_i / (1 - h_i)."""
    torch.manual_seed(0)
    n, d, outputs = 14, 4, 2
    x, y = torch.randn(n, d).double(), torch.randn(n, outputs).double()
    test = torch.randn(5, d).double()
    labels = torch.randn(5, outputs).double()
    ridge = n * decay

    def fit(keep):
        gram = x[keep].mT @ x[keep] + ridge * torch.eye(d).double()
        return torch.linalg.solve(gram, x[keep].mT @ y[keep]).mT

    everything = torch.ones(n, dtype=torch.bool)
    model = nn.Linear(d, outputs, bias=False).double()
    beta = fit(everything)
    with torch.no_grad():
        model.weight.copy_(beta)
    F = ng.FIM(model, (x, y), representation, likelihood="gaussian")
    found = ng.influences(
        model, F, (x, y), (test, labels), loss="gaussian", damping=decay, method="newton"
    )
    expected = torch.zeros(5, n).double()
    slope = (test @ beta.mT - labels)[:, :, None] * test[:, None, :]  # (tests, outputs, d)
    for i in range(n):
        keep = everything.clone()
        keep[i] = False
        expected[:, i] = (slope * (fit(keep) - beta)).sum((1, 2))
    close(found, expected, 1e-8)
    first = ng.influences(model, F, (x, y), (test, labels), loss="gaussian", damping=decay)
    leverage = (x @ torch.linalg.inv(x.mT @ x + ridge * torch.eye(d).double()) * x).sum(1)
    close(first, expected * (1 - leverage), 1e-8)


def softmax_regression(x, y, decay, classes, start=None):
    model = nn.Linear(x.shape[1], classes).double()
    with torch.no_grad():
        for p, q in zip(model.parameters(), start.parameters() if start else [], strict=False):
            p.copy_(q)
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=300, tolerance_grad=1e-10, tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure():
        optimizer.zero_grad()
        loss = F_.cross_entropy(model(x), y, reduction="sum")
        loss = loss + decay / 2 * sum(p.square().sum() for p in model.parameters())
        loss.backward()
        return loss

    optimizer.step(closure)
    return model


@pytest.mark.parametrize(
    ("representation", "method", "least"),
    [("dense", "newton", 0.99), ("dense", "gradient", 0.95), ("ekfac", "gradient", 0.9)],
)
def test_influences_predict_leave_one_out(representation, method, least):
    """Softmax regression on digits, retrained without single images."""
    from sklearn.datasets import load_digits

    digits = load_digits(n_class=4)
    x = torch.tensor(digits.data).double()[:120] / 16
    y = torch.tensor(digits.target)[:120]
    test = torch.tensor(digits.data).double()[200:230] / 16
    labels = torch.tensor(digits.target)[200:230]
    model = softmax_regression(x, y, 1.0, 4)
    F = ng.FIM(model, (x, y), representation)
    found = ng.influences(
        model, F, (x, y), (test, labels), loss="categorical", damping=1 / 120, method=method
    )
    with torch.no_grad():
        before = F_.cross_entropy(model(test), labels, reduction="none")
        largest = found.abs().sum(0).argsort(descending=True)
        chosen = torch.cat([largest[:12], largest[12::9]])
        changes = []
    for i in chosen.tolist():
        keep = torch.arange(120) != i
        without = softmax_regression(x[keep], y[keep], 1.0, 4, model)
        with torch.no_grad():
            changes.append(F_.cross_entropy(without(test), labels, reduction="none") - before)
    truth = torch.stack(changes, 1)
    both = torch.stack([truth.flatten(), found[:, chosen].flatten()])
    assert torch.corrcoef(both)[0, 1] > least


def test_influences_of_losses_with_a_vector_of_outputs():
    """Newton's way with curvature of each example: the dense downdate."""
    model, x, y = problem()
    F = ng.GGN(model, (x, y), "dense", loss="categorical")
    found = ng.influences(
        model, F, (x, y), (x[:4], y[:4]), loss="categorical", damping=0.2, method="newton"
    )
    g = gradients(model, x, y)
    eye = torch.eye(len(F.space)).double()
    for i in (0, 7, 24):
        one = ng.GGN(model, (x[i : i + 1], y[i : i + 1]), "dense", loss="categorical").to_dense()
        A = 25 * (F.to_dense() + 0.2 * eye) - one
        close(found[:, i], g[:4] @ torch.linalg.solve(A, g[i]), 1e-8)


def test_bad_influences_are_named():
    model, x, y = problem()
    F = ng.FIM(model, (x, y), "kfac")
    data = (x, y)
    with pytest.raises(ValueError, match="expected method"):
        ng.influences(model, F, data, data, loss="categorical", method="loo")
    with pytest.raises(DataError, match="as FIM returns it, got Tensor"):
        ng.influences(model, torch.eye(3), data, data, loss="categorical")
    other = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    with pytest.raises(SpaceMismatchError, match="parameters of the model"):
        ng.influences(other, F, data, data, loss="categorical")
    with pytest.raises(NotPositiveDefiniteError, match="damping"):
        ng.influences(model, F, data, data, loss="categorical")
    with pytest.raises(DataError, match="observed labels"):
        ng.influences(model, F, x, data, loss="categorical", damping=1.0)
    shuffled = torch.utils.data.DataLoader(list(zip(x, y, strict=True)), 5, shuffle=True)
    with pytest.raises(DataError, match="shuffl"):
        ng.influences(model, F, shuffled, data, loss="categorical", damping=1.0)


# --- elastic weight consolidation -----------------------------------------------------------------


@pytest.mark.parametrize("representation", ALL)
def test_the_penalty_and_its_gradient(representation):
    model, x, y = problem()
    anchors, dense = [], []
    for part in (slice(0, 10), slice(10, 25)):
        F = ng.FIM(model, (x[part], y[part]), representation)
        anchors.append((F, F.space.values(model).detach().clone()))
        dense.append(F.to_dense())
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))
    w = anchors[0][0].space.values(model).detach().requires_grad_()
    found = ng.ewc_penalty(w, anchors, strength=[2.0, 3.0])
    away = [w.detach() - anchor for _, anchor in anchors]
    expected = sum(s / 2 * v @ F @ v for s, v, F in zip((2.0, 3.0), away, dense, strict=True))
    close(found.detach(), expected, 1e-10)
    slope = sum(s * F @ v for s, v, F in zip((2.0, 3.0), away, dense, strict=True))
    close(torch.autograd.grad(found, w)[0], slope, 1e-9)
    ng.ewc_penalty(model, anchors, strength=2.0).backward()  # attached to the network
    assert model[0].weight.grad.norm() > 0
    weight = torch.tensor(2.0).double().requires_grad_()
    ng.ewc_penalty(w, anchors, strength=weight).backward()
    assert weight.grad > 0
    named = anchors[0][0].space.unravel(w)
    close(ng.ewc_penalty(named, anchors, strength=[2.0, 3.0]), found, 1e-12)


def test_with_all_examples_the_penalty_is_the_first_task():
    """Two linear-Gaussian tasks in a row with the penalty are one fit of both."""
    torch.manual_seed(0)
    x, y = torch.randn(30, 4).double(), torch.randn(30, 1).double()
    model = nn.Linear(4, 1, bias=False).double()

    def solve(X, Y, A=0.0, b=0.0):
        return torch.linalg.solve(X.mT @ X + A, X.mT @ Y[:, 0] + b)

    first = solve(x[:20], y[:20])
    with torch.no_grad():
        model.weight.copy_(first[None])
    F = ng.FIM(model, (x[:20], y[:20]), "kfac", likelihood=Gaussian())
    w = torch.zeros(4).double().requires_grad_()
    loss = (x[20:] @ w - y[20:, 0]).square().sum() / 2
    loss = loss + ng.ewc_penalty(w, [(F, first)], strength=F.num_examples)
    (g,) = torch.autograd.grad(loss, w, create_graph=True)
    H = torch.stack([torch.autograd.grad(one, w, retain_graph=True)[0] for one in g])
    close(-torch.linalg.solve(H, g.detach()), solve(x, y), 1e-9)


def test_bad_penalties_are_named():
    model, x, y = problem()
    F = ng.FIM(model, (x, y), "diagonal")
    w = F.space.values(model)
    with pytest.raises(DataError, match="at least one anchor"):
        ng.ewc_penalty(model, [])
    with pytest.raises(DataError, match="expected 1 strengths"):
        ng.ewc_penalty(model, [(F, w)], strength=[1.0, 2.0])
    with pytest.raises(SpaceMismatchError, match="expected parameters of shape"):
        ng.ewc_penalty(w, [(F, w[:3])])
    with pytest.raises(SpaceMismatchError, match="bare matrix"):
        ng.ewc_penalty(w, [(ng.aslinearoperator(torch.eye(43).double()), w)])


# --- pruning --------------------------------------------------------------------------------------


@pytest.mark.parametrize("representation", ALL)
def test_saliencies_are_the_growth_of_the_quadratic_model(representation):
    model, x, y = problem()
    F = ng.FIM(model, (x, y), representation)
    w = F.space.values(model).detach()
    A = F.to_dense() + 0.1 * torch.eye(len(w)).double()
    close(ng.saliency(F, model), w.square() * F.to_dense().diagonal() / 2, 1e-8)
    surgeon = w.square() / torch.linalg.inv(A).diagonal() / 2
    close(ng.saliency(F, w, method="obs", damping=0.1), surgeon, 1e-7)
    i = 4  # the best the others can do about it
    kept = torch.arange(len(w)) != i
    move = -torch.linalg.solve(A[kept][:, kept], A[kept][:, i] * -w[i])
    step = torch.zeros_like(w)
    step[i], step[kept] = -w[i], move
    close(step @ A @ step / 2, surgeon[i], 1e-9)


@pytest.mark.parametrize("representation", ALL)
@pytest.mark.parametrize("method", ["obd", "obs"])
def test_pruning_with_compensation_is_the_constrained_minimum(representation, method):
    model, x, y = problem()
    F = ng.FIM(model, (x, y), representation)
    w = F.space.values(model).detach()
    candidates = torch.zeros(len(w), dtype=torch.bool)
    candidates[:40] = True
    values, kept = ng.prune(
        F, w, 0.5, method=method, damping=0.1, compensate=True, candidates=candidates
    )
    assert int((~kept).sum()) == 20
    assert kept[40:].all()
    scores = ng.saliency(F, w, method=method, damping=0.1)[:40]
    assert scores[~kept[:40]].max() <= scores[kept[:40]].min()
    assert (values[~kept] == 0).all()
    A = F.to_dense() + 0.1 * torch.eye(len(w)).double()
    close(
        values[kept],
        w[kept] + torch.linalg.solve(A[kept][:, kept], A[kept][:, ~kept] @ w[~kept]),
        1e-7,
    )
    plain = ng.prune(F, w, 0.5, method=method, damping=0.1, candidates=candidates)
    assert torch.equal(plain.values, w * plain.kept)
    assert torch.equal(plain.kept, kept)


def test_bad_pruning_is_named():
    model, x, y = problem()
    F = ng.FIM(model, (x, y), "kfac")
    with pytest.raises(DataError, match="a fraction from 0"):
        ng.prune(F, model, 1.0)
    with pytest.raises(DataError, match="candidates of bool"):
        ng.prune(F, model, 0.5, candidates=torch.ones(43))
    with pytest.raises(ValueError, match="expected method"):
        ng.saliency(F, model, method="magnitude")
    with pytest.raises(SpaceMismatchError, match="expected parameters of shape"):
        ng.saliency(F, torch.zeros(4).double())
    with pytest.raises(NotPositiveDefiniteError):
        ng.saliency(F, model, method="obs")
    with pytest.raises(SpaceMismatchError, match="bare matrix"):
        ng.saliency(ng.aslinearoperator(torch.eye(43)), model)
