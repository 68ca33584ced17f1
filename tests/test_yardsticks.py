"""Theorems that KFAC must satisfy, to 1e-10 in float64 (those of EKFAC are in test_fim).

Eschenhagen et al. (2023), arXiv:2311.00636; George et al. (2018); Martens and Grosse (2015).
"""

import pytest
import torch
from torch import nn

import nngeo_lazy as ng
from nngeo_lazy.likelihoods import Gaussian
from nngeo_lazy.representations import KFAC

pytestmark = pytest.mark.usefixtures("float64")


def linear_net(*extra):
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5), *extra, nn.Linear(5, 2))


def error(K, model, data, **options):
    """KFAC's distance from the blocks of the layers, relative."""
    F = ng.FIM(model, data, "block_diagonal", **options).to_dense()
    return ((K.to_dense() - F).norm() / F.norm()).item()


@pytest.mark.parametrize("likelihood", ["categorical", "gaussian", "bernoulli"])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_1_one_datum(likelihood, sharing):
    model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))
    x = torch.randn(1, 3)
    K = ng.FIM(model, x, KFAC(sharing), likelihood=likelihood)
    assert error(K, model, x, likelihood=likelihood) < 1e-10


def test_2_deep_linear_network():
    model, x = linear_net(), torch.randn(7, 3)
    K = ng.FIM(model, x, "kfac", likelihood=Gaussian(0.4))
    assert error(K, model, x, likelihood=Gaussian(0.4)) < 1e-10
    K = ng.FIM(model, x, "kfac", likelihood="categorical")
    assert error(K, model, x, likelihood="categorical") > 1e-3


class ByPosition(nn.Module):
    def __init__(self, pool):
        super().__init__()
        self.net, self.pool = linear_net(), pool

    def forward(self, x):
        y = self.net(x)
        return y.mean(1) if self.pool else y


@pytest.mark.parametrize("pool", [False, True])
def test_3_and_4_weight_sharing(pool):
    model, x = ByPosition(pool), torch.randn(6, 5, 3)
    errors = {
        sharing: error(
            ng.FIM(model, x, KFAC(sharing), likelihood="gaussian"), model, x, likelihood="gaussian"
        )
        for sharing in ("expand", "reduce")
    }
    exact, other = ("reduce", "expand") if pool else ("expand", "reduce")
    assert errors[exact] < 1e-10
    assert errors[other] > 1e-2


@pytest.mark.parametrize("pool", [False, True])
def test_3_and_4_for_convolutions(pool):
    """The same theorems with patches as positions: 1x1 convolutions are exact too."""

    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(2, 3, (2, 3)), nn.Conv2d(3, 2, 1)

        def forward(self, x):
            y = self.b(self.a(x))
            return y.mean((2, 3)) if pool else y

    model, x = M(), torch.randn(5, 2, 4, 5)
    sharing = "reduce" if pool else "expand"
    K = ng.FIM(model, x, KFAC(sharing), likelihood="gaussian")
    assert error(K, model, x, likelihood="gaussian") < 1e-10


def test_5_softmax_regression():
    model, x, y = nn.Linear(3, 4, bias=False), torch.randn(9, 3), torch.randint(4, (9,))
    p = model(x).softmax(1).detach()
    expected = sum(
        torch.kron(torch.diag(q) - torch.outer(q, q), torch.outer(z, z))
        for q, z in zip(p, x, strict=True)
    ) / len(x)

    def loss(w):
        return nn.functional.cross_entropy(x @ w.view(4, 3).T, y)

    hessian = torch.func.hessian(loss)(model.weight.detach().flatten())
    F = ng.FIM(model, (x, y), "dense").to_dense()
    torch.testing.assert_close(F, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(F, hessian, rtol=1e-10, atol=1e-12)


def test_affine_invariance_of_the_undamped_step():
    """Yardstick 11: the KFAC step does not see an invertible affine map of the inputs."""
    x, y = torch.randn(40, 3), torch.randint(2, (40, 3)).double()
    M, c = torch.randn(3, 3) + 2 * torch.eye(3), torch.randn(3)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    mapped = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    mapped.load_state_dict(model.state_dict())
    with torch.no_grad():  # the same function of z = M x + c
        mapped[0].weight.copy_(model[0].weight @ torch.linalg.inv(M))
        mapped[0].bias.copy_(model[0].bias - mapped[0].weight @ c)
    z = x @ M.T + c

    def outputs_after_a_step(net, inputs):
        F = ng.FIM(net, (inputs, y), "kfac", likelihood="bernoulli")
        nn.functional.binary_cross_entropy_with_logits(net(inputs), y).backward()
        F.space.add_(net, F.solve(F.space.grad(net)), alpha=-0.1)
        return net(inputs)

    torch.testing.assert_close(outputs_after_a_step(model, x), outputs_after_a_step(mapped, z))


def test_one_natural_gradient_step_is_least_squares():
    """Yardstick 8, on a linear model with a Gaussian likelihood."""
    x, y = torch.randn(30, 3), torch.randn(30, 2)
    model = nn.Linear(3, 2)
    for representation in ("dense", "kfac", "ekfac", "block_diagonal"):
        model.reset_parameters()
        F = ng.FIM(model, (x, y), representation, likelihood="gaussian")
        model.zero_grad()
        ((model(x) - y).square().sum() / 2 / len(x)).backward()
        F.space.add_(model, F.solve(F.space.grad(model)), alpha=-1.0)
        design = torch.cat([x, torch.ones(30, 1)], 1)
        best = torch.linalg.lstsq(design, y).solution.T
        fitted = torch.cat([model.weight, model.bias[:, None]], 1).detach()
        torch.testing.assert_close(fitted, best)
