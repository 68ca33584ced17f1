"""What a Laplace approximation does for a network that is too certain.

    python examples/laplace.py [--save FOLDER]

A small convolutional network fits a few noisy digits and is certain of too much. Posteriors by a
dense Fisher of the last layer and by KFAC of all layers, with prior precisions from the evidence or
from held-out images, are compared with the plain network: calibration on other digits, and
certainty on digits that are turned. Saves a figure.
"""

import argparse
from pathlib import Path

import matplotlib
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import nngeo_lazy as ng

matplotlib.use("Agg")
import matplotlib.pyplot as plt

TRAIN, HELD_OUT, NOISE, BINS = 300, 200, 0.3, 10
ANGLES = range(0, 181, 15)


def data():
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16  # (N, 1, 8, 8)
    y = torch.tensor(digits.target)
    x = x + NOISE * torch.randn(x.shape)
    parts = torch.randperm(len(x)).split([TRAIN, HELD_OUT, len(x) - TRAIN - HELD_OUT])
    return [(x[part], y[part]) for part in parts]


def network():
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip


def train(model, x, y, epochs):
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for index in torch.randperm(len(x)).split(50):
            optimizer.zero_grad()
            F.cross_entropy(model(x[index]), y[index]).backward()
            optimizer.step()


def turned(x, angle):
    """Images turned about their centre, by an angle in degrees."""
    turn = torch.deg2rad(torch.tensor(float(angle)))
    c, s = turn.cos(), turn.sin()
    zero = torch.zeros(())
    matrix = torch.stack([torch.stack([c, -s, zero]), torch.stack([s, c, zero])])
    grid = F.affine_grid(matrix.expand(len(x), 2, 3), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


def reliability(p, y):
    """Mean certainty, accuracy and share of each bin of certainty, and their mean difference."""
    certainty, label = p.max(1)
    right = (label == y).float()
    where = (certainty * BINS).long().clamp_max(BINS - 1)
    share = torch.bincount(where, minlength=BINS) / len(y)
    held = share.clamp_min(1e-12) * len(y)
    means = [torch.bincount(where, v, BINS) / held for v in (certainty, right)]
    return *means, share, float((share * (means[0] - means[1]).abs()).sum())


def figures(p, y):
    *_, error = reliability(p, y)
    loss = float(F.nll_loss(p.clamp_min(1e-12).log(), y))
    return float((p.argmax(1) == y).float().mean()), loss, error


def predicted(la, x):
    return la.predictive(x, "mc", samples=300, seed=0)


def best_on(held_out, la):
    """The posterior whose prior precision predicts held-out labels best."""
    x, y = held_out
    each = [la.with_prior(float(prior)) for prior in torch.logspace(0, 5, 16)]
    return min(each, key=lambda la: float(F.nll_loss(predicted(la, x).log(), y)))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--save", type=Path, default=Path(__file__).parent)
    parser.add_argument("--epochs", type=int, default=100)
    options = parser.parse_args()

    torch.manual_seed(0)
    (x, y), held_out, (x_test, y_test) = data()
    model = network()
    train(model, x, y, options.epochs)

    last = ng.Laplace(model, ng.FIM(model, (x, y), "dense", params=model[-1]))
    kfac = ng.Laplace(model, ng.FIM(model, (x, y), "kfac"))
    posteriors = {
        "last layer, evidence": last.fit_prior_precision(),
        "last layer, held out": best_on(held_out, last),
        "KFAC, evidence": kfac.fit_prior_precision("layer"),
        "KFAC, held out": best_on(held_out, kfac),
    }
    ways = {"network": lambda x: model(x).detach().softmax(1)}
    for name, la in posteriors.items():
        ways[name] = lambda x, la=la: predicted(la, x)
        evidence = float(la.log_marginal_likelihood())
        print(f"{name:<22}{len(la.space):>6} parameters, log evidence {evidence:.1f}")

    print(f"\n{'':<22}{'accuracy':>10}{'NLL':>8}{'calibration error':>20}")
    found = {name: way(x_test) for name, way in ways.items()}
    for name, p in found.items():
        accuracy, loss, error = figures(p, y_test)
        print(f"{name:<22}{accuracy:>10.3f}{loss:>8.3f}{error:>20.3f}")

    figure, axes = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    axes[0].plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle=":")
    for marker, (name, p) in zip("os^Dv", found.items(), strict=True):
        certainty, right, share, _ = reliability(p, y_test)
        kept = share * len(y_test) >= 10
        axes[0].plot(certainty[kept], right[kept], marker=marker, label=name)
    axes[0].set(xlabel="certainty", ylabel="accuracy", title="digits of the test set")
    axes[0].legend()

    some = x_test[:200]
    for marker, (name, way) in zip("os^Dv", ways.items(), strict=True):
        each = [way(turned(some, angle)) for angle in ANGLES]
        certain = [float(p.max(1).values.mean()) for p in each]
        (line,) = axes[1].plot(ANGLES, certain, marker=marker, label=name)
        right = [float((p.argmax(1) == y_test[:200]).float().mean()) for p in each]
        axes[1].plot(ANGLES, right, color=line.get_color(), linestyle=":", linewidth=1)
        loss = [figures(p, y_test[:200])[1] for p in each]
        axes[2].plot(ANGLES, loss, marker=marker, label=name)
    axes[1].set(
        xlabel="turned by (degrees)", ylabel="mean certainty; accuracy (dotted)", ylim=(0, 1.03)
    )
    axes[1].set_title("turned digits")
    axes[2].set(
        xlabel="turned by (degrees)", ylabel="negative log likelihood", title="turned digits"
    )
    axes[2].set_yscale("log")
    for ax in axes:
        ax.grid(alpha=0.3)
    figure.savefig(options.save / "laplace.png", dpi=120)
    print(f"saved {options.save / 'laplace.png'}")


if __name__ == "__main__":
    main()
