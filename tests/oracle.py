"""The reference in float64: per-example Jacobians and Fishers from `torch.func` and autograd alone.

It shares no code with the package: likelihoods are written as log-densities, their Hessians and
gradients are taken by `torch.func`, and matrices are sums over examples of dense products.
"""

import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

# name -> (options for the package's object, negative log-density of one example (f, y) -> scalar)
VARIANCE = 0.7


def nll_categorical(f: Tensor, y: Tensor) -> Tensor:  # (C,), () or (T,C), (T,)
    return F.cross_entropy(f.reshape(-1, f.shape[-1]), y.reshape(-1), reduction="sum")


def nll_gaussian(f: Tensor, y: Tensor) -> Tensor:
    return (y - f).square().sum() / (2 * VARIANCE)


def nll_bernoulli(f: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(f, y, reduction="sum")


def nll_poisson(f: Tensor, y: Tensor) -> Tensor:
    return (f.exp() - y * f).sum()


def covariance(size: int) -> Tensor:
    """A covariance matrix of so many outputs."""
    lower = torch.eye(size) + torch.tril(torch.linspace(-0.5, 0.5, size * size).view(size, size))
    return lower @ lower.mT


def nll_covariance(f: Tensor, y: Tensor) -> Tensor:
    r = (y - f).reshape(-1, f.shape[-1]).mT
    return (r * torch.linalg.solve(covariance(f.shape[-1]), r)).sum() / 2


NLL = {
    "categorical": nll_categorical,
    "gaussian": nll_gaussian,
    "bernoulli": nll_bernoulli,
    "poisson": nll_poisson,
    "covariance": nll_covariance,
}


def targets(likelihood: str, outputs: Tensor) -> Tensor:
    """Labels that fit the outputs (N, ..., C)."""
    if likelihood == "categorical":
        return torch.randint(outputs.shape[-1], outputs.shape[:-1])
    if likelihood == "bernoulli":
        return torch.rand(outputs.shape).to(outputs)  # soft ones
    if likelihood == "poisson":
        return torch.poisson(outputs.exp())
    return torch.randn_like(outputs)


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


def outputs(model: nn.Module, call, example) -> Tensor:
    return call(lambda *a, **k: functional_call(model, parameters(model), a, k), example)


def jacobian(model: nn.Module, call, examples: list) -> Tensor:
    """(N, C, P): every output's gradient, one example at a time. `call(model, example)`."""
    rows = []
    for example in examples:

        def f(params, example=example):
            return call(lambda *a, **k: functional_call(model, params, a, k), example).flatten()

        by_name = jacrev(f, chunk_size=1)(parameters(model))  # a loop: not all of torch has vmap
        rows.append(torch.cat([j.flatten(1) for j in by_name.values()], 1))
    return torch.stack(rows)


def from_directions(model, call, examples, directions: Tensor) -> Tensor:
    """(P, P): the mean over examples of J^T s s^T J, directions (R, N, ...)."""
    J = jacobian(model, call, examples)
    rows = torch.einsum("rnc,ncp->rnp", directions.flatten(2), J).flatten(0, 1)
    return rows.mT @ rows / len(examples)


def fisher(model, call, examples, likelihood: str, estimator: str, labels: Tensor) -> Tensor:
    """(P, P): the mean over examples of J^T H J; H is the Hessian of the negative log-density.

    For the likelihoods here, in these parameters, the Hessian does not depend on the label and is
    the expectation of the outer product of scores. The empirical one has the observed score's
    product.
    """
    nll = NLL[likelihood]
    J = jacobian(model, call, examples)
    total = 0.0
    for j, example, y in zip(J, examples, labels, strict=True):
        f = outputs(model, call, example)[0].detach()
        if estimator == "empirical":
            s = torch.func.grad(nll)(f, y).flatten()
            H = torch.outer(s, s)
        else:
            H = hessian(nll)(f, y).reshape(f.numel(), f.numel())
        total = total + j.T @ H @ j
    return total / len(examples)


def loss_hessian(model: nn.Module, call, examples: list, nll, labels) -> Tensor:
    """(P, P): the sum over examples of the Hessian of nll(outputs, label), reverse over reverse."""
    total = 0.0
    shapes = parameters(model)
    for example, y in zip(examples, labels, strict=True):

        def loss(params, example=example, y=y):
            return nll(call(lambda *a, **k: functional_call(model, params, a, k), example)[0], y)

        with sdpa_kernel(SDPBackend.MATH):
            by_name = jacrev(torch.func.grad(loss), chunk_size=1)(shapes)
        rows = [
            torch.cat([block.reshape(p.numel(), -1) for block in by_name[name].values()], 1)
            for name, p in shapes.items()
        ]
        total = total + torch.cat(rows)
    return total
