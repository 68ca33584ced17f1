"""Does natural gradient descent without tuning train faster than AdamW with the best learning rate?

    python examples/train.py [--save FOLDER] [--quick]

Printed are means over seeds: the lowest loss, and the steps and seconds until AdamW's lowest.
"""

import argparse
import itertools
import time

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import nngeo_lazy as ng

RATES = (1e-3, 3e-3, 1e-2, 3e-2)
X, Y = (torch.tensor(each) for each in load_digits(return_X_y=True))
X = X.float() / 16  # (1797, 64)
LEAST = 64 * float(F.binary_cross_entropy(X, X))  # of a perfect code


def autoencoder():
    sizes = (64, 256, 128, 64, 16, 64, 128, 256, 64)
    layers = [each for s in itertools.pairwise(sizes) for each in (nn.Linear(*s), nn.Tanh())]
    return nn.Sequential(*layers[:7], *layers[8:-1])  # the code and the logits are linear


def convolutional():
    first = nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
    second = nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()
    return nn.Sequential(*first, *second, nn.Linear(128, 10))


def bernoulli(f, x):  # a mean over images of the sum over pixels
    return 64 * F.binary_cross_entropy_with_logits(f, x) - LEAST


TASKS = {  # a network, its loss, what it should give, and the likelihood
    "autoencoder": (autoencoder, bernoulli, X, "bernoulli"),
    "CNN": (convolutional, F.cross_entropy, Y, "categorical"),
}
OPTIMIZERS = {
    "KFAC": lambda m, likelihood: ng.optim.NaturalGradient(m, "kfac", likelihood),
    "EKFAC": lambda m, likelihood: ng.optim.NaturalGradient(m, "ekfac", likelihood),
    **{f"AdamW {r:g}": lambda m, _, r=r: torch.optim.AdamW(m.parameters(), r) for r in RATES},
}


def curves(network, loss, labels, likelihood, seed, steps):
    """(steps, seconds, training loss) on every tenth step of each optimizer."""
    runs = {}
    for name, make in OPTIMIZERS.items():
        torch.manual_seed(seed)
        model = network()
        runs[name] = model, make(model, likelihood), []
    spent, generator = dict.fromkeys(runs, 0.0), torch.Generator().manual_seed(seed)
    for step in range(steps + 1):
        index = torch.randperm(len(X), generator=generator)[:128]
        for name, (model, optimizer, curve) in runs.items():  # in turns
            if step % 10 == 0:
                with torch.no_grad():
                    curve.append((step, spent[name], float(loss(model(X), labels))))
            start = time.perf_counter()
            optimizer.zero_grad()
            loss(model(X[index]), labels[index]).backward()
            optimizer.step()
            spent[name] += time.perf_counter() - start
    return {name: torch.tensor(curve) for name, (_, _, curve) in runs.items()}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--save", default=".")
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    seeds, steps = (1, 20) if given.quick else (3, 1000)
    figure, axes = plt.subplots(2, 2, figsize=(10, 8), sharey="row", layout="constrained")
    for row, (title, task) in zip(axes, TASKS.items(), strict=True):
        each = [curves(*task, seed, steps) for seed in range(seeds)]
        means = {name: torch.stack([c[name] for c in each]).mean(0) for name in OPTIMIZERS}
        best = min(list(means)[2:], key=lambda name: means[name][:, 2].min())
        for name in ("KFAC", "EKFAC", best):
            at, seconds, losses = means[name].unbind(1)
            reached = (losses <= means[best][:, 2].min()).nonzero()[:1].flatten().tolist()
            when = [f"in {int(at[k])} steps, {float(seconds[k]):.1f} s" for k in reached] or ["no"]
            print(f"{title}, {name}: lowest {float(losses.min()):.4g}; there {when[0]}")
            for ax, x in zip(row, (at, seconds), strict=True):
                ax.loglog(x[1:], losses[1:], label=name)
                ax.set(title=title, xlabel="steps" if x is at else "seconds", ylabel="loss")
        row[1].legend()
    figure.savefig(f"{given.save}/train.png", dpi=110)


if __name__ == "__main__":
    main()
