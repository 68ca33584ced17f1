"""What the tests of optimizers share: a problem, a loop, and dense references."""

import torch
from torch import nn
from torch.nn import functional

import nngeo_lazy as ng

STRUCTURED = [
    "dense",
    "block_diagonal",
    "quasi_diagonal",
    "diagonal",
    "kfac",
    "ekfac",
    ng.representations.KFAC(sharing="reduce"),
    ng.representations.Mixed("kfac", {"2": "dense"}),
]
ALL = [*STRUCTURED, "kernel", "implicit", ng.optim.HessianFree("kfac", tol=1e-10, max_iter=500)]


def name_of(representation):
    return representation if isinstance(representation, str) else repr(representation)[:28]


def problem(outputs=3, n=40, seed=0, dtype=torch.float64):
    """A small classifier in training mode, and its data."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs)).to(dtype)
    return model, torch.randn(n, 4, dtype=dtype), torch.randint(outputs, (n,))


def noisy(seed=0, dtype=torch.float64):
    """Batch normalisation and dropout, in training mode."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(4, 6),
        nn.BatchNorm1d(6),
        nn.Tanh(),
        nn.Dropout(0.3),
        nn.Linear(6, 3),
    ).to(dtype)


def backward(optimizer, model, x, y, loss=functional.cross_entropy):
    """zero_grad, forward, backward."""
    optimizer.zero_grad()
    value = loss(model(x), y)
    value.backward()
    return value.item()


def train(optimizer, model, x, y, steps, loss=functional.cross_entropy):
    """So many whole steps; the losses before them."""
    losses = []
    for _ in range(steps):
        losses.append(backward(optimizer, model, x, y, loss))
        optimizer.step()
    return losses


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()]).clone()


def moved(optimizer, model, *closure):
    """How the parameters change in one step."""
    before = weights(model)
    optimizer.step(*closure)
    return weights(model) - before


def dense_fisher(model, x):
    """The exact Fisher of a softmax classifier by torch.func, (P, P)."""
    names = [name for name, _ in model.named_parameters()]

    def outputs(parameters, one):
        return torch.func.functional_call(model, parameters, (one[None],))[0]

    parameters = {name: p.detach() for name, p in model.named_parameters()}
    total = 0.0
    for one in x:
        J = torch.func.jacrev(outputs)(parameters, one)
        J = torch.cat([J[name].flatten(1) for name in names], 1)
        p = outputs(parameters, one).softmax(0)
        total = total + J.T @ (p.diag() - torch.outer(p, p)) @ J
    return total / len(x)
