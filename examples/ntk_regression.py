"""A Gaussian process with a network's tangent kernel against the network itself.

    python examples/ntk_regression.py [--save FOLDER] [--splits 5]

Progression of diabetes from ten measurements (442 patients). The process has the neural tangent
kernel of a network at initialisation plus an RBF kernel, whose scales and noise are fitted by the
marginal likelihood; the network is trained to the same patients, and gets intervals from the spread
of its residuals on a fifth of them that it has not seen. Prints errors, log-likelihoods and how
many test patients lie in the 90 % intervals, over several splits; saves a figure. Needs the extras
`gp` and `examples`.
"""

import argparse
from pathlib import Path

import gpytorch
import matplotlib
import torch
from sklearn.datasets import load_diabetes
from torch import nn

from nngeo_lazy.gp import NTKKernel, wrap

matplotlib.use("Agg")
import matplotlib.pyplot as plt

TRAIN = 300


def data(seed):
    """Standardised by the training patients: inputs and targets of both parts."""
    diabetes = load_diabetes()
    x, y = torch.tensor(diabetes.data), torch.tensor(diabetes.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    train, test = order[:TRAIN], order[TRAIN:]
    x = (x - x[train].mean(0)) / x[train].std(0)
    y = (y - y[train].mean()) / y[train].std()
    return x[train], y[train], x[test], y[test]


def network():
    return nn.Sequential(nn.Linear(10, 64), nn.Tanh(), nn.Linear(64, 1)).double()


class Process(gpytorch.models.ExactGP):
    def __init__(self, x, y, kernel):
        super().__init__(x, y, gpytorch.likelihoods.GaussianLikelihood())
        self.mean_module = gpytorch.means.ConstantMean()
        self.covar_module = kernel

    def forward(self, x):
        return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))


def with_process(x, y, x_test, steps=100):
    """Mean and standard deviation at the test inputs."""
    scale, rbf = gpytorch.kernels.ScaleKernel, gpytorch.kernels.RBFKernel
    kernel = scale(NTKKernel(network())) + scale(rbf(ard_num_dims=10))
    model = Process(x, y, wrap(kernel)).double()
    kernel.kernels[0].outputscale = 1e-2  # a wide network's kernel is large
    marginal = gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = -marginal(model(x), y)
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        found = model.likelihood(model(x_test))
    return found.mean, found.variance.sqrt()


def with_network(x, y, x_test, epochs=300):
    """The mean, and the spread of residuals on patients that are held out; early stopping there."""
    kept = len(x) * 4 // 5
    model, best, state = network(), float("inf"), None
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3, weight_decay=1e-3)
    for _ in range(epochs):
        optimizer.zero_grad()
        (model(x[:kept]).squeeze(1) - y[:kept]).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            error = float((model(x[kept:]).squeeze(1) - y[kept:]).square().mean())
        if error < best:
            best, state = error, {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(state)
    with torch.no_grad():
        return model(x_test).squeeze(1), torch.full((len(x_test),), best**0.5).double()


def figures(mean, spread, y):
    """Error, mean log-likelihood, share inside of the 90 % interval."""
    normal = torch.distributions.Normal(mean, spread)
    inside = (y - mean).abs() < 1.645 * spread
    return torch.stack([
        (y - mean).square().mean().sqrt(), normal.log_prob(y).mean(), inside.double().mean()
    ])  # fmt: skip


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--save", type=Path, default=Path(__file__).parent)
    parser.add_argument("--splits", type=int, default=5)
    options = parser.parse_args()

    methods = {"network": with_network, "GP, NTK + RBF": with_process}
    results = {name: [] for name in methods}
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    levels = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    for seed in range(options.splits):
        torch.manual_seed(seed)
        x, y, x_test, y_test = data(seed)
        for (name, method), ax in zip(methods.items(), axes, strict=False):
            mean, spread = method(x, y, x_test)
            half = torch.distributions.Normal(0.0, 1.0).icdf((1 + levels) / 2)
            covered = ((y_test - mean).abs() / spread < half[:, None]).double().mean(1)
            results[name].append((figures(mean, spread, y_test), covered))
            if seed == 0:
                order = mean.argsort()
                shown = range(len(order))
                low, high = mean - 1.645 * spread, mean + 1.645 * spread
                ax.fill_between(shown, low[order], high[order], alpha=0.25, label="90 % interval")
                ax.plot(shown, mean[order], label="mean")
                ax.plot(shown, y_test[order], ".", color="black", markersize=4, label="patients")
                ax.set(title=name, xlabel="test patient, by mean", ylim=(-3, 3.5))
    axes[0].set_ylabel("progression, standardised")
    axes[0].legend(loc="upper left")

    print(f"{'':<16}{'RMSE':>16}{'log-likelihood':>18}{'in the 90 %':>16}")
    for name, found in results.items():
        numbers = torch.stack([row for row, _ in found])
        mean, spread = numbers.mean(0), numbers.std(0)
        cells = [f"{m:.3f} +- {s:.3f}" for m, s in zip(mean, spread, strict=True)]
        print(f"{name:<16}{cells[0]:>16}{cells[1]:>18}{cells[2]:>16}")
        axes[2].plot(levels, torch.stack([c for _, c in found]).mean(0), ".-", label=name)
    axes[2].plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle=":")
    axes[2].set(xlabel="wanted share", ylabel="share of patients inside", title="calibration")
    axes[2].legend()
    figure.savefig(options.save / "ntk_regression.png", dpi=120)
    print(f"saved {options.save / 'ntk_regression.png'}")


if __name__ == "__main__":
    main()
