"""The spectrum of a network's loss, before and after training, without forming a matrix.

    python examples/hessian_spectrum.py [--save FOLDER]

A small convolutional network on the digits: the density of its Hessian and of its Gauss-Newton
matrix, the largest eigenvalues and the trace of each layer. Saves two figures.
"""

import argparse
from collections import OrderedDict
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


def data():
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16  # (N, 1, 8, 8)
    return x, torch.tensor(digits.target)


def network():
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, 8, 3, padding=1),  # (N, 8, 8, 8)
            down1=nn.Sequential(nn.Tanh(), nn.AvgPool2d(2)),  # (N, 8, 4, 4)
            conv2=nn.Conv2d(8, 16, 3, padding=1),  # (N, 16, 4, 4)
            down2=nn.Sequential(nn.Tanh(), nn.AvgPool2d(2), nn.Flatten()),  # (N, 64)
            head=nn.Linear(64, 10),
        )
    )


def train(model, x, y, epochs):
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(epochs):
        for index in torch.randperm(len(x)).split(128):
            optimizer.zero_grad()
            F.cross_entropy(model(x[index]), y[index]).backward()
            optimizer.step()


def look(model, batches):
    """The densities, and a table of layers."""
    H = ng.Hessian(model, batches, loss="categorical")  # one product: about 3 gradients
    G = ng.GGN(model, batches, loss="categorical")
    densities = {
        "Hessian": ng.spectral_density(H, probes=3, steps=60, deflate=9, seed=0),
        "Gauss-Newton": ng.spectral_density(G, probes=3, steps=60, deflate=9, seed=0),
    }
    ends = ng.eigsh(H, 6, "BE", tol=1e-4, seed=0)
    print(f"  Hessian, both ends: {', '.join(f'{e:.3g}' for e in ends.eigenvalues.tolist())}")
    print(f"  {'layer':<8}{'parameters':>11}{'largest eigenvalue':>20}{'trace':>22}")
    for name in H.blocks:
        block = H.block(name)  # still lazy
        (top,), _ = ng.eigsh(block, 1, tol=1e-3, seed=0)
        trace = ng.trace(block, probes=10, seed=0)
        share = f"{float(trace):.4g} +- {float(trace.standard_error):.2g}"
        print(f"  {name:<8}{block.shape[0]:>11}{float(top):>20.4g}{share:>22}")
    return densities


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--save", type=Path, default=Path(__file__).parent)
    options = parser.parse_args()

    torch.manual_seed(0)
    x, y = data()
    model = network()
    batches = list(zip(x.split(600), y.split(600), strict=True))
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    norms, sides = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for when, ax, side in zip(("at initialisation", "after training"), axes, sides, strict=True):
        if when == "after training":
            train(model, x, y, epochs=15)
        with torch.no_grad():
            loss = float(F.cross_entropy(model(x), y))
        print(f"{when}: loss {loss:.4f}")
        plot.density(look(model, batches), ax=ax).set_title(f"{when}, loss {loss:.3f}")
        H = ng.Hessian(model, batches, loss="categorical")
        plot.block_norms(H, probes=4, ax=side).set_title(f"|H_ab|, {when}")
    for made, name in ((figure, "hessian_spectrum.png"), (norms, "hessian_blocks.png")):
        made.savefig(options.save / name, dpi=120)
        print(f"saved {options.save / name}")


if __name__ == "__main__":
    main()
