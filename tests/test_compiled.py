"""Operators inside of functions that torch compiles: a graph break where it cannot trace."""

import pytest
import torch
from torch import nn

import nngeo_lazy as ng

CALLS = {
    "product": (lambda F, v: 2 * (F @ (v + 1)), lambda A, v: 2 * (A @ (v + 1))),
    "solve": (lambda F, v: F.solve(v, damping=0.1) + 1, lambda A, v: damped_solve(A, v) + 1),
    "quadratic": (lambda F, v: F.vTMv(v) * v, lambda A, v: (v @ A @ v) * v),
    "trace": (lambda F, v: F.trace() * v, lambda A, v: A.trace() * v),
}


def damped_solve(A, v):
    return torch.linalg.solve(A + 0.1 * torch.eye(len(A)).to(A), v)


def problem():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    return model, (torch.randn(10, 3).double(), torch.randint(2, (10,)))


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# torch's own, about gradients of tensors that it looks at after a graph break
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize(
    ("representation", "call"), [*(("implicit", call) for call in CALLS), ("kfac", "product")]
)
def test_members_in_a_compiled_function(representation, call):
    model, data = problem()
    F = ng.FIM(model, data, representation, likelihood="categorical")
    A, (mine, wanted) = F.to_dense(), CALLS[call]
    compiled = torch.compile(lambda v: mine(F, v), backend="eager")
    v = torch.randn(F.shape[0]).double().requires_grad_()
    assert torch.allclose(compiled(v.detach()), wanted(A, v), rtol=1e-6, atol=1e-9)
    for _ in range(2):  # compiled, and compiled before
        found, truth = compiled(v), wanted(A, v)
        assert torch.allclose(found, truth, rtol=1e-6, atol=1e-9)
        g, h = (torch.autograd.grad(x.square().sum(), v)[0] for x in (found, truth))
        assert torch.allclose(g, h, rtol=1e-6, atol=1e-8)


def train(x):
    return 2 * x


BUILDS = {
    "FIM": lambda model, data: ng.FIM(model, data, "kfac", likelihood="categorical"),
    "GGN": lambda model, data: ng.GGN(model, data, loss="categorical"),
    "Hessian": lambda model, data: ng.Hessian(model, data, loss="categorical"),
    "Jacobian": lambda model, data: ng.Jacobian(model, data),
    "NTK": lambda model, data: ng.NTK(model, data[0]),
    "update_diag": lambda model, data: ng.update_diag(
        ng.FIM(model, data, "ekfac", likelihood="categorical"), model, data
    ),
    "saliency": lambda model, data: ng.aslinearoperator(
        torch.diag(ng.saliency(ng.FIM(model, data, "diagonal", likelihood="categorical"), model))
    ),
}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")
@pytest.mark.parametrize("name", BUILDS)
def test_builds_in_a_compiled_function(name):
    """The compiled function leaves its graph for them; before, torch raised an error of its own."""
    model, data = problem()
    want = BUILDS[name](model, data)
    v = torch.randn(want.shape[-1]).double()

    def step(v):
        return 3 * (BUILDS[name](model, data) @ train(v))

    assert torch.allclose(torch.compile(step, backend="eager")(v), 6 * (want @ v))
    again = torch.compile(lambda: BUILDS[name](model, data).to_dense(), backend="eager")
    assert torch.allclose(again(), want.to_dense())
