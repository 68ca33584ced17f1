"""Training with a prior and a noise that the evidence chooses as it goes.

    python examples/marglik.py [--save FOLDER]

A network fits 60 noisy points. Every fiftieth epoch takes the prior precision of each layer and
the variance of the labels that have most evidence. Beside it is the same network without a prior.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn

import nngeo_lazy as ng
from nngeo_lazy.likelihoods import Gaussian

N, NOISE, EPOCHS, EVERY = 60, 0.3, 1000, 50


def truth(x):
    return torch.sin(2 * x) + 0.3 * x


def data(n, seed):
    """Points in two intervals, with nothing between them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 1, generator=generator) * 2 + 1
    x = torch.where(torch.rand(n, 1, generator=generator) < 0.5, x, -x)
    return x, truth(x) + NOISE * torch.randn(n, 1, generator=generator)


def network():
    torch.manual_seed(0)
    layers = nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)
    return nn.Sequential(*layers)


def penalty(model, prior):
    """Half the squared norm of the parameters, in the prior's precision."""
    named = dict(model.named_parameters())
    return sum(c / 2 * named[n].square().sum() for names, c in prior.items() for n in names)


def trained(x, y, online):
    """A network, its posterior, and (epoch, evidence, noise, test loss) on the way."""
    model, likelihood, history = network(), Gaussian(1.0), []
    prior = {(f"{k}.weight", f"{k}.bias"): 1.0 for k in (0, 2, 4)}  # of each layer
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    for epoch in range(1, EPOCHS + 1):
        optimizer.zero_grad()
        loss = likelihood.loss(model(x), y).sum() + (penalty(model, prior) if online else 0)
        (loss / N).backward()
        optimizer.step()
        schedule.step()
        if epoch % EVERY == 0:
            F = ng.FIM(model, (x, y), "kfac", likelihood=likelihood)
            la = ng.Laplace(model, F, prior_precision=prior)
            if online:
                la = la.fit_prior_precision("layer", noise=True)
                prior, likelihood = la.prior_precision, la.likelihood
            history.append((epoch, float(la.log_marginal_likelihood()), *scores(la)))
    return la, list(zip(*history, strict=True))


def scores(la):
    """The standard deviation of the noise, and the log loss of new labels."""
    x, y = data(1000, seed=1)
    mean, covariance = la.predictive(x)
    normal = torch.distributions.Normal(mean, covariance[..., 0].sqrt())
    return float(la.likelihood.variance) ** 0.5, -float(normal.log_prob(y).mean())


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--save", type=Path, default=Path(__file__).parent)
    save = parser.parse_args().save
    x, y = data(N, seed=0)
    grid = torch.linspace(-4, 4, 200)[:, None]
    figure, axes = plt.subplots(1, 4, figsize=(16, 3.8), layout="constrained")
    print(f"{'':<24}{'evidence':>10}{'noise':>8}{'test loss':>11}")
    for k, (name, online) in enumerate({"no prior": False, "evidence": True}.items()):
        la, (epochs, evidence, noise, loss) = trained(x, y, online)
        print(f"{name:<24}{evidence[-1]:>10.1f}{noise[-1]:>8.2f}{loss[-1]:>11.2f}")
        mean, covariance = la.predictive(grid)
        m, s = mean[:, 0], covariance[:, 0, 0].sqrt()
        axes[k].fill_between(grid[:, 0], m - 2 * s, m + 2 * s, alpha=0.3)
        axes[k].plot(grid, m)
        axes[k].plot(grid, truth(grid), "k--", label="truth")
        axes[k].plot(x, y, "k.", alpha=0.5)
        axes[k].set(title=f"trained with {name}", ylim=(-4, 4), xlabel="x")
        axes[2].plot(epochs, loss, label=name)
        axes[3].plot(epochs, noise, label=name)
    axes[3].axhline(NOISE, color="k", ls=":", label="truth")
    axes[2].set(title="log loss of new labels", xlabel="epoch", ylim=(0, 3))
    axes[3].set(title="standard deviation of the noise", xlabel="epoch")
    axes[3].legend()
    figure.savefig(save / "marglik.png", dpi=120)
