"""How many weights a small network needs: pruning by magnitude, diagonal and Kronecker curvature.

    python examples/pruning.py [--save FOLDER] [--seeds N]

A perceptron on digits is pruned in one shot, and not trained again. Saves a figure.
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

SURGEON = {"method": "obs", "damping": 1e-4}
FRACTIONS = [0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95]


def data():
    digits = load_digits()
    x = torch.tensor(digits.data, dtype=torch.float64) / 16
    y = torch.tensor(digits.target)
    train, test = torch.randperm(len(x)).split([1200, len(x) - 1200])
    return (x[train], y[train]), (x[test], y[test])


def train(x, y):
    layers = nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 10)
    model = nn.Sequential(*layers).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    for _ in range(40):
        for index in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[index]), y[index]).backward()
            optimizer.step()
    return model


def figures(model, space, values, data):
    """Loss and accuracy at some parameters."""
    with torch.no_grad():
        f = torch.func.functional_call(model, space.unravel(values), (data[0],))
        return float(F.cross_entropy(f, data[1])), float((f.argmax(1) == data[1]).float().mean())


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--save", type=Path, default=Path(__file__).parent)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()

    ways = ["magnitude", "diagonal, OBD", "KFAC, OBD", "KFAC, OBS", "KFAC, OBS, others move"]
    found = torch.zeros(options.seeds, len(ways), len(FRACTIONS), 2)
    for seed in range(options.seeds):
        torch.manual_seed(seed)
        (x, y), test = data()
        model = train(x, y)
        kfac, diagonal = (ng.FIM(model, (x, y), form) for form in ("kfac", "diagonal"))
        space = kfac.space
        sizes = {n: space.slices[n].stop - space.slices[n].start for n in space.names}
        weights = torch.cat([torch.full((k,), n.endswith("weight")) for n, k in sizes.items()])
        options_of = {
            "magnitude": (ng.identity(space, 1.0), {}),
            "diagonal, OBD": (diagonal, {}),
            "KFAC, OBD": (kfac, {}),
            "KFAC, OBS": (kfac, SURGEON),
            "KFAC, OBS, others move": (kfac, {**SURGEON, "compensate": True}),
        }
        for k, way in enumerate(ways):
            F_, more = options_of[way]
            for j, fraction in enumerate(FRACTIONS):
                values, _ = ng.prune(F_, model, fraction, candidates=weights, **more)
                found[seed, k, j] = torch.tensor(figures(model, space, values, test))
    shown = 4, 5, 7
    print(f"{'':<24}" + "".join(f"{f'{FRACTIONS[j]:.0%} pruned':>18}" for j in shown))
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.2), layout="constrained")
    for marker, way, curve in zip("os^vD", ways, found.mean(0), strict=True):
        cells = (f"{float(curve[j, 0]):>10.3f} ({float(curve[j, 1]):.3f})" for j in shown)
        print(f"{way:<24}" + "".join(f"{cell:>18}" for cell in cells))
        for ax, column in zip(axes, curve.mT, strict=True):
            ax.plot(FRACTIONS, column, marker=marker, label=way)
    axes[0].set(ylabel="test loss", yscale="log")
    axes[1].set(ylabel="test accuracy")
    axes[0].legend()
    for ax in axes:
        ax.set_xlabel("fraction of weights pruned")
    figure.savefig(options.save / "pruning.png", dpi=120)
    print(f"test loss (accuracy), means over seeds; saved {options.save / 'pruning.png'}")


if __name__ == "__main__":
    main()
