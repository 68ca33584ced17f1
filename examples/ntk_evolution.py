"""How the neural tangent kernel of a network changes while it learns.

    python examples/ntk_evolution.py [--save FOLDER]

A small convolutional network on digits. Prints how well the kernel fits the labels, and how well
kernel regression predicts other images. Saves a figure of the kernel and its spectrum.
"""

import argparse
from pathlib import Path

import matplotlib
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import nngeo_lazy as ng
from nngeo_lazy import plot

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SHOWN = 200


def data():
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16  # (N, 1, 8, 8)
    y = torch.tensor(digits.target)
    order = torch.randperm(len(x))
    train = order[:SHOWN]
    train = train[y[train].argsort(stable=True)]  # classes are blocks of the picture
    return x[train], y[train], x[order[SHOWN:]], y[order[SHOWN:]]


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


def accuracy(scores, y):
    return float((scores.argmax(1) == y).float().mean())


def look(model, x, y, x_test, y_test):
    """The kernel, its eigenvalues, and a line of figures."""
    K = ng.NTK(model, x, outputs="mean")
    values = K.eigvalsh().sort(descending=True).values
    targets = F.one_hot(y).float() - 0.1
    weights = K.solve(targets, damping=1e-3 * float(values[0]))
    regression = ng.NTK(model, x_test, x, outputs="mean") @ weights
    loss = float(F.cross_entropy(model(x), y).detach())
    own = accuracy(model(x_test), y_test)
    alignment, kernel = float(ng.alignment(K, y, center=True)), accuracy(regression, y_test)
    print(f"{loss:>8.3f}{own:>10.3f}{kernel:>12.3f}{alignment:>12.3f}")
    return K, values, alignment


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--save", type=Path, default=Path(__file__).parent)
    options = parser.parse_args()

    torch.manual_seed(0)
    x, y, x_test, y_test = data()
    model = network()
    print(f"{'':<20}{'loss':>8}{'network':>10}{'regression':>12}{'alignment':>12}")
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for when, ax in zip(("at initialisation", "after training"), axes, strict=False):
        if when == "after training":
            train(model, x, y, epochs=60)
        print(f"{when:<20}", end="")
        K, values, alignment = look(model, x, y, x_test, y_test)
        title, label = f"{when}: alignment {alignment:.2f}", "image, by class"
        plot.correlation(K.center(), ax=ax).set(title=title, xlabel=label, ylabel=label)
        axes[2].plot(range(1, SHOWN + 1), values / values[0], label=when)
    axes[2].axvline(10, color="grey", linewidth=0.8, linestyle=":", label="10 classes")
    axes[2].set(xscale="log", yscale="log", xlabel="rank", ylim=(1e-6, 1.5))
    axes[2].set(ylabel="eigenvalue, relative to the largest", title="spectrum of the kernel")
    axes[2].legend()
    figure.savefig(options.save / "ntk_evolution.png", dpi=120)
    print(f"saved {options.save / 'ntk_evolution.png'}")


if __name__ == "__main__":
    main()
