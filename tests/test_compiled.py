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
