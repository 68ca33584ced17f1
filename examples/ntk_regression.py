"""A Gaussian process with a network's tangent kernel against the network itself.

    python examples/ntk_regression.py [--save FOLDER]

Progression of diabetes. The process has the sum of a network's tangent kernel and an RBF kernel,
fitted by its marginal likelihood. The trained network has intervals from its residuals on a fifth
of the patients, which it has not seen. Needs the extras `gp` and `examples`.
"""

import argparse
from pathlib import Path

import gpytorch
import matplotlib.pyplot as plt
import torch
from gpytorch.kernels import RBFKernel, ScaleKernel
from sklearn.datasets import load_diabetes
from torch import nn
from torch.distributions import Normal
from torch.nn.functional import mse_loss

from nngeo_lazy.gp import NTKKernel, wrap

LEVELS = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)  # the last but one is 90 %
HALVES = Normal(0.0, 1.0).icdf((1 + LEVELS) / 2)  # of the intervals, in standard deviations


def data(seed):
    """Inputs and targets of 300 patients and of all others, standardised by the former."""
    x, y = map(torch.from_numpy, load_diabetes(return_X_y=True))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    train, test = order.tensor_split([300])
    x, y = ((v - v[train].mean(0)) / v[train].std(0) for v in (x, y))
    return x[train], y[train], x[test], y[test]


def network():
    return nn.Sequential(nn.Linear(10, 64), nn.Tanh(), nn.Linear(64, 1)).double()


class Process(gpytorch.models.ExactGP):
    def __init__(self, x, y, kernel):
        super().__init__(x, y, gpytorch.likelihoods.GaussianLikelihood())
        self.covar_module = kernel

    def forward(self, x):
        return gpytorch.distributions.MultivariateNormal(0 * x[:, 0], self.covar_module(x))


def with_process(x, y, x_test):
    """Mean and standard deviation at the test inputs."""
    kernel = ScaleKernel(NTKKernel(network())) + ScaleKernel(RBFKernel(ard_num_dims=10))
    kernel.kernels[0].outputscale = 1e-2  # a wide network's kernel is large
    model = Process(x, y, wrap(kernel)).double()
    marginal = gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        (-marginal(model(x), y)).backward()
        optimizer.step()
    with torch.no_grad():
        found = model.eval().likelihood(model(x_test))
    return found.mean, found.variance.sqrt()


def with_network(x, y, x_test):
    """The mean, and the spread of residuals on patients that are held out; early stopping there."""
    model, best, (x, held_x), (y, held_y) = network(), (torch.inf, None), x.split(240), y.split(240)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3, weight_decay=1e-3)
    for _ in range(300):
        optimizer.zero_grad()
        mse_loss(model(x).squeeze(1), y).backward()
        optimizer.step()
        error = mse_loss(model(held_x).squeeze(1), held_y).item()
        best = min(best, (error, model(x_test).squeeze(1).detach()), key=lambda pair: pair[0])
    return best[1], torch.full_like(best[1], best[0] ** 0.5)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--save", type=Path, default=Path(__file__).parent)
    save = parser.parse_args().save
    print(f"{'':<16}{'RMSE':>16}{'log-likelihood':>18}{'in the 90 %':>16}")
    for name, method in {"network": with_network, "GP, NTK + RBF": with_process}.items():
        numbers, shares = [], []
        for seed in range(5):
            torch.manual_seed(seed)
            x, y, x_test, y_test = data(seed)
            mean, spread = method(x, y, x_test)
            shares.append(((y_test - mean).abs() / spread < HALVES[:, None]).double().mean(1))
            density = float(Normal(mean, spread).log_prob(y_test).mean())
            numbers.append([mse_loss(mean, y_test) ** 0.5, density, shares[-1][-2]])
        cells = [f"{v.mean():.3f} +- {v.std():.3f}" for v in torch.tensor(numbers).T]
        print(f"{name:<16}{cells[0]:>16}{cells[1]:>18}{cells[2]:>16}")
        plt.plot(LEVELS, torch.stack(shares).mean(0), ".-", label=name)
    plt.plot([0, 1], [0, 1], ":", color="grey")
    plt.gca().set(xlabel="wanted share", ylabel="share of patients inside")
    plt.legend()
    plt.savefig(save / "ntk_regression.png", dpi=120)
