"""Which training digits a prediction rests on, against true leave-one-out retraining.

    python examples/influence.py [--save FOLDER]

Softmax regression on 300 digits is trained again without each of 40 images. The changes of 100 test
losses are compared with the predictions of four influence functions. Saves a figure.
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

TRAIN, TEST, LEFT_OUT, DECAY = 300, 100, 40, 1.0
WAYS = [
    ("exact curvature, CG", "implicit", "gradient"), ("the same, Newton", "dense", "newton"),
    ("EKFAC", "ekfac", "gradient"), ("KFAC", "kfac", "gradient"),
]  # fmt: skip


def data():
    digits = load_digits()
    x = torch.tensor(digits.data).double() / 16
    y = torch.tensor(digits.target)
    order = torch.randperm(len(x))[: TRAIN + TEST]
    train, test = order.split([TRAIN, TEST])
    return (x[train], y[train]), (x[test], y[test])


def train(x, y):
    """The minimum of the summed loss plus DECAY/2 |w|^2, from zero: it is the only one."""
    model = nn.Linear(64, 10).double()
    nn.init.zeros_(model.weight)
    tight = {"tolerance_grad": 1e-9, "tolerance_change": 1e-13, "line_search_fn": "strong_wolfe"}
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=500, **tight)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y, reduction="sum")
        loss = loss + DECAY / 2 * sum(p.square().sum() for p in model.parameters())
        loss.backward()
        return loss

    optimizer.step(closure)
    return model


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--save", type=Path, default=Path(__file__).parent)
    options = parser.parse_args()

    torch.manual_seed(0)
    (x, y), tested = data()
    model = train(x, y)
    known, predicted = {"loss": "categorical", "damping": DECAY / TRAIN}, {}
    for name, form, method in WAYS:
        fisher = ng.FIM(model, (x, y), form)
        predicted[name] = ng.influences(model, fisher, (x, y), tested, method=method, **known)
    ranked = predicted["exact curvature, CG"].abs().sum(0).argsort(descending=True)
    rest = ranked[LEFT_OUT // 2 :]
    chosen = torch.cat([ranked[: LEFT_OUT // 2], rest[torch.randperm(len(rest))[: LEFT_OUT // 2]]])

    def losses(model):
        with torch.no_grad():
            return F.cross_entropy(model(tested[0]), tested[1], reduction="none")

    before, truth = losses(model), []
    for i in chosen.tolist():
        keep = torch.arange(TRAIN) != i
        truth.append(losses(train(x[keep], y[keep])) - before)
    truth = torch.stack(truth, 1)

    print(f"{'':<22}{'correlation':>12}")
    figure, axes = plt.subplots(1, 4, figsize=(16, 4), layout="constrained", sharey=True)
    for ax, (name, found) in zip(axes, predicted.items(), strict=True):
        pairs = torch.stack([found[:, chosen].flatten(), truth.flatten()])
        correlation = float(torch.corrcoef(pairs)[0, 1])
        print(f"{name:<22}{correlation:>12.3f}")
        ax.plot(pairs[0], pairs[1], ".", markersize=3, alpha=0.5)
        ax.axline((0, 0), slope=1, color="grey", linewidth=0.8, linestyle=":")
        ax.set(xlabel="predicted change of a test loss", title=f"{name}: {correlation:.3f}")
    axes[0].set_ylabel("change without an image")
    figure.savefig(options.save / "influence.png", dpi=120)
    print(f"saved {options.save / 'influence.png'}")


if __name__ == "__main__":
    main()
