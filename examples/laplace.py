"""What a Laplace approximation does for a network that is too certain.

    python examples/laplace.py [--save FOLDER]

A small convolutional network fits 300 noisy digits. Posteriors have a dense Fisher of the last
layer or KFAC of all layers, and prior precisions from the evidence or from held-out images.
"""

import argparse
import math
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

import nngeo_lazy as ng

BINS, ANGLES = 10, range(0, 181, 15)


def data():
    """Noisy digits: 300 to train on, 200 held out, all others to test."""
    x, y = map(torch.from_numpy, load_digits(return_X_y=True))
    x = x.float().view(-1, 1, 8, 8) / 16 + 0.3 * torch.randn(len(x), 1, 8, 8)
    return [(x[part], y[part]) for part in torch.randperm(len(x)).tensor_split([300, 500])]


def trained(x, y):
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(100):
        for index in torch.randperm(len(x)).split(50):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[index]), y[index]).backward()
            optimizer.step()
    return model


def turned(x, angle):
    """Images turned about their centre, by an angle in degrees."""
    c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    matrix = torch.tensor([[c, -s, 0.0], [s, c, 0.0]]).expand(len(x), 2, 3)
    grid = nn.functional.affine_grid(matrix, list(x.shape), align_corners=False)
    return nn.functional.grid_sample(x, grid, align_corners=False)


def figures(p, y):
    """Accuracy, negative log likelihood, calibration error in bins of equal certainty."""
    certainty, label = p.max(1)
    gap = (label == y).float() - certainty
    each = torch.zeros(BINS).index_add(0, (certainty * BINS).long().clamp_max(BINS - 1), gap)
    found = (label == y).float().mean(), nn.functional.nll_loss(p.clamp_min(1e-12).log(), y)
    return *map(float, found), float(each.abs().sum() / len(y))


def predicted(la, x):
    return la.predictive(x, "mc", samples=300, seed=0)


def best_on(x, y, la):
    """The posterior whose prior precision predicts held-out labels best."""
    each = [la.with_prior(float(prior)) for prior in torch.logspace(0, 5, 16)]
    return min(each, key=lambda la: figures(predicted(la, x), y)[1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--save", type=Path, default=Path(__file__).parent)
    save = parser.parse_args().save
    torch.manual_seed(0)
    train, held_out, (x_test, y_test) = data()
    model = trained(*train)
    last = ng.Laplace(model, ng.FIM(model, train, "dense", params=model[-1]))
    kfac = ng.Laplace(model, ng.FIM(model, train, "kfac"))
    ways = {
        "network": lambda x: model(x).detach().softmax(1),
        "last layer, evidence": partial(predicted, last.fit_prior_precision()),
        "last layer, held out": partial(predicted, best_on(*held_out, last)),
        "KFAC, evidence": partial(predicted, kfac.fit_prior_precision("layer")),
        "KFAC, held out": partial(predicted, best_on(*held_out, kfac)),
    }
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained", sharex=True)
    print(f"{'':<22}{'accuracy':>10}{'NLL':>8}{'calibration error':>20}")
    for name, way in ways.items():
        print("{:<22}{:>10.3f}{:>8.3f}{:>20.3f}".format(name, *figures(way(x_test), y_test)))
        each = [figures(way(turned(x_test[:200], a)), y_test[:200]) for a in ANGLES]
        for ax, values in zip(axes, zip(*each, strict=True), strict=True):
            ax.plot(ANGLES, values, marker="o", label=name)
    for ax, title in zip(axes, ["accuracy", "log loss", "calibration error"], strict=True):
        ax.set(title=title, xlabel="digits turned by (degrees)")
    axes[0].legend()
    figure.savefig(save / "laplace.png", dpi=120)
