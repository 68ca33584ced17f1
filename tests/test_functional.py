"""Functions `f(params, x)` in the place of modules: everything is that of the module itself."""

import copy
from collections import namedtuple

import pytest
import torch
from torch import nn

import nngeo_lazy as ng
from nngeo_lazy.errors import DataError
from nngeo_lazy.gp import NTKKernel

from cases import close

Layer = namedtuple("Layer", "weight bias")


def problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    return model, torch.randn(20, 4).double(), torch.randint(3, (20,))


def by_hand(params, x):
    first, last = params
    h = nn.functional.linear(x, first["weight"], first["bias"])  # one block, as of a layer
    return nn.functional.linear(torch.tanh(h), last.weight, last.bias)


def function_of(model):
    held = [
        {"weight": model[0].weight.detach(), "bias": model[0].bias.detach()},
        Layer(model[2].weight.detach(), model[2].bias.detach()),
    ]
    return ng.as_module(by_hand, held)


def by_torch(model):
    """`torch.func`'s way."""
    params = {name: p.detach().clone() for name, p in model.named_parameters()}
    return ng.as_module(lambda p, x: torch.func.functional_call(model, p, (x,)), params)


MAKE = pytest.mark.parametrize("make", [function_of, by_torch])


@MAKE
@pytest.mark.parametrize("representation", ["dense", "kfac", "ekfac", "diagonal", "low_rank"])
def test_matrices(make, representation):
    model, x, y = problem()
    one = make(model)
    F = ng.FIM(one, (x, y), representation)
    close(F.to_dense(), ng.FIM(model, (x, y), representation).to_dense(), 1e-9)


@MAKE
def test_products_and_kernels(make):
    model, x, y = problem()
    one, loss = make(model), nn.CrossEntropyLoss()
    H, G = ng.Hessian(one, (x, y), loss=loss), ng.GGN(one, (x, y), loss=loss)
    v = torch.randn(len(H.space)).double()
    close(H @ v, ng.Hessian(model, (x, y), loss=loss) @ v, 1e-9)
    close(G @ v, ng.GGN(model, (x, y), loss=loss) @ v, 1e-9)
    close(ng.NTK(one, x).to_dense(), ng.NTK(model, x).to_dense(), 1e-9)
    close(ng.Jacobian(one, x).to_dense(), ng.Jacobian(model, x).to_dense(), 1e-9)
    close(NTKKernel(one)(x).to_dense(), NTKKernel(model)(x).to_dense(), 1e-9)


@MAKE
def test_clients(make):
    model, x, y = problem()
    one, data = make(model), (x, y)
    F, G = ng.FIM(one, data, "kfac"), ng.FIM(model, data, "kfac")
    close(
        ng.influences(one, F, data, data, damping=0.1),
        ng.influences(model, G, data, data, damping=0.1),
        1e-8,
    )
    close(ng.Laplace(one, F).predictive(x), ng.Laplace(model, G).predictive(x), 1e-8)
    steps = []
    for net in (make(copy.deepcopy(model)), model):
        optimizer = ng.optim.NaturalGradient(net, "kfac", "categorical", lr=0.5, estimator="exact")
        for _ in range(2):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
        steps.append(net(x).detach())
    close(*steps, 1e-7)


def test_the_memory_is_shared():
    w = torch.randn(3, 2).double()
    model = ng.as_module(lambda p, x: x @ p, w)
    assert [name for name, _ in model.named_parameters()] == ["params"]
    x = torch.randn(5, 3).double()
    w.add_(1)
    close(model(x).detach(), x @ w, 1e-12)


def test_batches_that_are_mappings_and_constants():
    params = {"scale": torch.ones(2).double(), "order": torch.tensor([1, 0])}
    model = ng.as_module(lambda p, x, shift: x[:, p["order"]] * p["scale"] + shift, params)
    x, shift = torch.randn(4, 2).double(), torch.randn(4, 2).double()
    F = ng.FIM(model, {"x": x, "shift": shift}, "dense", likelihood="gaussian")
    assert F.space.names == ("scale",)
    close(F.to_dense(), x[:, [1, 0]].square().mean(0).diag(), 1e-10)


def test_params_that_are_none():
    with pytest.raises(DataError, match="expected params to hold floating-point tensors"):
        ng.as_module(lambda p, x: x, {"k": torch.tensor([1])})
    with pytest.raises(DataError, match=r"got float: convert it with torch.as_tensor"):
        ng.as_module(lambda p, x: x, {"k": 1.0})
    with pytest.raises(DataError, match=r"'forward' cannot be the name of a parameter.*rename"):
        ng.as_module(lambda p, x: x, {"forward": torch.ones(1)})
    with pytest.raises(DataError, match=r"'a\.b' cannot be the name"):
        ng.as_module(lambda p, x: x, {"a": torch.ones(1), "a.b": torch.ones(1)})
    ng.as_module(lambda p, x: x, {"k": torch.as_tensor(1.0)})
