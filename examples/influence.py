"""Which training digits a prediction rests on, against true leave-one-out retraining.

    python examples/influence.py [--save FOLDER]

Softmax regression on 300 digits. For 40 training images, taken by predicted influence and at
random, the model is trained again without the image; the changes of 100 test losses are compared
with the predictions of influence functions by the exact curvature (conjugate gradients), KFAC and
EKFAC. Saves a figure.
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


def data():
    digits = load_digits()
    x = torch.tensor(digits.data).double() / 16
    y = torch.tensor(digits.target)
    order = torch.randperm(len(x))[: TRAIN + TEST]
    train, test = order.split([TRAIN, TEST])
    return (x[train], y[train]), (x[test], y[test])


def train(x, y, start=None):
    """The minimum of the summed loss plus DECAY/2 |w|^2."""
    model = nn.Linear(64, 10).double()
    if start is not None:
        model.load_state_dict(start)
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=500, tolerance_grad=1e-9, tolerance_change=1e-13,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

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
    (x, y), (x_test, y_test) = data()
    model = train(x, y)
    known = {"loss": "categorical", "damping": DECAY / TRAIN}
    predicted = {
        name: ng.influences(
            model, ng.FIM(model, (x, y), form), (x, y), (x_test, y_test), method=method, **known
        )
        for name, form, method in [
            ("exact curvature, CG", "implicit", "gradient"),
            ("the same, Newton", "dense", "newton"),
            ("EKFAC", "ekfac", "gradient"),
            ("KFAC", "kfac", "gradient"),
        ]
    }
    exact = predicted["exact curvature, CG"]
    ranked = exact.abs().sum(0).argsort(descending=True)
    rest = ranked[LEFT_OUT // 2 :]
    chosen = torch.cat([ranked[: LEFT_OUT // 2], rest[torch.randperm(len(rest))[: LEFT_OUT // 2]]])

    def losses(model):
        with torch.no_grad():
            return F.cross_entropy(model(x_test), y_test, reduction="none")

    before, truth = losses(model), []
    for i in chosen.tolist():
        keep = torch.arange(TRAIN) != i
        truth.append(losses(train(x[keep], y[keep], model.state_dict())) - before)
    truth = torch.stack(truth, 1)

    print(f"{'':<22}{'correlation':>12}{'slope':>8}")
    figure, axes = plt.subplots(1, 4, figsize=(16, 4), layout="constrained", sharey=True)
    for ax, (name, found) in zip(axes, predicted.items(), strict=True):
        pairs = torch.stack([found[:, chosen].flatten(), truth.flatten()])
        correlation = float(torch.corrcoef(pairs)[0, 1])
        slope = float(pairs[0] @ pairs[1] / pairs[1].square().sum())
        print(f"{name:<22}{correlation:>12.3f}{slope:>8.2f}")
        ax.plot(pairs[0], pairs[1], ".", markersize=3, alpha=0.5)
        ends = [float(truth.min()), float(truth.max())]
        ax.plot(ends, ends, color="grey", linewidth=0.8, linestyle=":")
        ax.set(xlabel="predicted change of a test loss")
        ax.set_title(f"{name}: correlation {correlation:.3f}")
    axes[0].set_ylabel("change after training without an image")
    figure.savefig(options.save / "influence.png", dpi=120)
    print(f"saved {options.save / 'influence.png'}")


if __name__ == "__main__":
    main()
