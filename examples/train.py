"""Natural gradients on defaults, on an autoencoder and a convolutional network, beside tuned peers.

    python examples/train.py [--save FOLDER] [--seeds N] [--tune] [--quick]

SGD with momentum, AdamW, KFAC, EKFAC, Hessian-free and natural gradient in the space of samples
("kernel") train the same networks on the same batches. SGD and AdamW have the best of a grid of
settings, chosen on seeds of its own by `--tune`; the others are as they come. Within a seed the
optimizers take turns, so that a busy moment of the machine hits all. Dear ones take fewer steps.
Seconds are those of zero_grad, forward, backward and step, with whatever an optimizer does at its
start.

Printed are medians over seeds, with their ranges: the lowest loss over all training images, the
mean of the last tenth of what was measured, accuracy on test images, and the steps and seconds to
AdamW's lowest loss, as a share of what AdamW itself took to it. Saves a figure of the loss against
steps and seconds. `--quick` only shows that all of it runs.
"""

import argparse
import itertools
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, median
from typing import NamedTuple

import matplotlib
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import nngeo_lazy as ng

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def grid(**options):
    """All combinations of the options' values."""
    return [dict(zip(options, v, strict=True)) for v in itertools.product(*options.values())]


GRIDS = {
    "SGD": grid(lr=[1e-2, 2e-2, 3e-2, 5e-2, 0.1, 0.2, 0.3, 0.5]),
    "AdamW": grid(lr=[1e-3, 3e-3, 5e-3, 1e-2, 2e-2, 3e-2], beta2=[0.99, 0.999]),
    "KFAC": [{}],
    "EKFAC": [{}],
    "Hessian-free": [{}],
    "kernel": [{}],
}
DEFAULTS = {name: {} for name in ("KFAC", "EKFAC", "Hessian-free", "kernel")}
WINNERS = {  # as --tune finds them
    "autoencoder": {
        "SGD": {"lr": 0.03},
        "AdamW": {"lr": 5e-3, "beta2": 0.99},
        **DEFAULTS,
    },
    "CNN": {
        "SGD": {"lr": 0.3},
        "AdamW": {"lr": 2e-2, "beta2": 0.99},
        **DEFAULTS,
    },
}
TUNING_SEEDS = {"autoencoder": (100,), "CNN": (100, 101)}
ROUNDS = 100  # turns of each optimizer; the training loss is measured after each
SPEEDS = {
    "autoencoder": {"SGD": 15, "AdamW": 15, "KFAC": 5, "EKFAC": 5, "Hessian-free": 1, "kernel": 1},
    "CNN": {"SGD": 3, "AdamW": 3, "KFAC": 3, "EKFAC": 3, "Hessian-free": 1, "kernel": 1},
}  # steps in a turn


class Task(NamedTuple):
    network: Callable
    loss: Callable  # of outputs and targets, a mean over examples
    least: float  # what the loss cannot fall below
    likelihood: str
    train: tuple  # images and targets
    test: tuple | None
    batch: int


def autoencoder():
    sizes, layers = [64, 256, 128, 64, 16, 64, 128, 256, 64], []
    for k, (a, b) in enumerate(itertools.pairwise(sizes)):
        layers.append(nn.Linear(a, b))
        nn.init.xavier_uniform_(layers[-1].weight)
        nn.init.zeros_(layers[-1].bias)
        if k not in (3, 7):  # the code and the logits are linear
            layers.append(nn.Tanh())
    return nn.Sequential(*layers)


def convolutional():
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip


def bernoulli(f, x):
    return F.binary_cross_entropy_with_logits(f, x, reduction="none").sum(1).mean()


def tasks():
    digits = load_digits()
    x = torch.tensor(digits.data, dtype=torch.float32) / 16  # (1797, 64)
    y = torch.tensor(digits.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    images, labels = x[order].view(-1, 1, 8, 8), y[order]
    train, test = (images[:1200], labels[:1200]), (images[1200:], labels[1200:])
    least = float(bernoulli(x.logit(1e-6), x))  # of a perfect reconstruction
    return {
        "autoencoder": Task(autoencoder, bernoulli, least, "bernoulli", (x, x), None, 599),
        "CNN": Task(convolutional, F.cross_entropy, 0.0, "categorical", train, test, 120),
    }


def optimizer_of(name, model, likelihood, seed, setting):
    if name == "SGD":
        return torch.optim.SGD(model.parameters(), **setting, momentum=0.9, fused=True)
    if name == "AdamW":
        lr, betas = setting["lr"], (0.9, setting["beta2"])
        return torch.optim.AdamW(model.parameters(), lr, betas, weight_decay=0.0, fused=True)
    kind = {"Hessian-free": "implicit"}.get(name, name.lower())
    return ng.optim.NaturalGradient(model, kind, likelihood, seed=seed)


class Run:
    """A network in training, and its curve: steps, seconds and training loss."""

    def __init__(self, task, name, setting, seed):
        torch.manual_seed(seed)
        self.task, self.model = task, task.network()
        self.optimizer = optimizer_of(name, self.model, task.likelihood, seed, setting)
        self.batches = self.drawn(torch.Generator().manual_seed(seed))
        self.steps, self.seconds = 0, 0.0
        self.curve = [(0, 0.0, self.training_loss())]

    def drawn(self, generator):
        x, y = self.task.train
        while True:
            for index in torch.randperm(len(x), generator=generator).split(self.task.batch):
                yield x[index], y[index]

    def advance(self, steps):
        for x, y in itertools.islice(self.batches, steps):

            def closure(x=x, y=y):
                self.optimizer.zero_grad()
                loss = self.task.loss(self.model(x), y)
                loss.backward()
                return loss

            start = time.perf_counter()
            self.optimizer.step(closure)
            self.seconds += time.perf_counter() - start
            self.steps += 1
        self.curve.append((self.steps, self.seconds, self.training_loss()))

    @torch.no_grad()
    def outputs(self, x):
        self.model.eval()
        f = self.model(x)
        self.model.train()
        return f

    def training_loss(self):
        loss = float(self.task.loss(self.outputs(self.task.train[0]), self.task.train[1]))
        return loss if math.isfinite(loss) else math.inf

    def accuracy(self):
        x, y = self.task.test
        return float((self.outputs(x).argmax(1) == y).float().mean())

    def lowest(self):
        return min(self.curve, key=lambda point: point[2])

    def at_the_end(self):
        return fmean(loss for *_, loss in self.curve[-(len(self.curve) // 10 or 1) :])

    def shares(self, other):
        """Of the steps and seconds to the other's lowest loss; None where it is not reached."""
        steps, seconds, least = other.lowest()
        reached = (point for point in self.curve if point[2] <= least)
        return next(((s / steps, t / seconds) for s, t, _ in reached), None)


def tune(known):
    for title, task in known.items():
        for name, settings in GRIDS.items():
            scores = []
            for setting in settings:
                runs = [Run(task, name, setting, seed) for seed in TUNING_SEEDS[title]]
                for run, _ in itertools.product(runs, range(ROUNDS)):
                    run.advance(SPEEDS[title][name])
                scores.append(fmean(run.at_the_end() for run in runs))
                print(f"{title}, {name}, {setting}: {scores[-1]:.4g}", flush=True)
            best = settings[min(range(len(scores)), key=scores.__getitem__)]
            print(f"{title}, {name}: {best} wins\n", flush=True)


def compete(title, task, seeds, rounds):
    """The runs of each optimizer."""
    runs = {name: [] for name in GRIDS}
    for seed in range(seeds):
        for name, made in runs.items():
            made.append(Run(task, name, WINNERS[title][name], seed))
        for _, (name, made) in itertools.product(range(rounds), runs.items()):
            made[-1].advance(SPEEDS[title][name])
    return runs


def spread(values, digits=3):
    return f"{median(values):.{digits}g} ({min(values):.{digits}g} to {max(values):.{digits}g})"


def show(title, runs):
    print(f"\n{title}: median (range) of {len(runs['AdamW'])} seeds")
    heads = "lowest loss", "at the end", "test accuracy", "share of AdamW's steps", "of its seconds"
    print(f"{'':<14}{'steps':>6}{'ms a step':>11}" + "".join(f"{head:>35}" for head in heads))
    for name, made in runs.items():
        speed = median(1000 * run.seconds / run.steps for run in made)
        cells = [spread([run.lowest()[2] for run in made], 4)]
        cells.append(spread([run.at_the_end() for run in made], 4))
        tested = made[0].task.test is not None
        cells.append(spread([run.accuracy() for run in made]) if tested else "")
        shares = [run.shares(other) for run, other in zip(made, runs["AdamW"], strict=True)]
        reached = [share for share in shares if share is not None]
        few = "" if len(reached) == len(made) else f", {len(reached)} seeds"
        cells += [spread(each) + few for each in zip(*reached, strict=True)]
        cells += ["not reached"] * (5 - len(cells))
        print(f"{name:<14}{made[0].steps:>6}{speed:>11.1f}" + "".join(f"{c:>35}" for c in cells))


def draw(axes, title, runs):
    """Medians in bands from the lowest to the highest seed, cut off above twice the start."""
    for name, made in runs.items():
        steps, seconds, losses = torch.tensor([run.curve for run in made]).unbind(2)  # (seeds, T)
        losses = losses - made[0].task.least
        for ax, at in zip(axes, (steps, seconds), strict=True):
            x = at.median(0).values[1:]
            (line,) = ax.plot(x, losses.median(0).values[1:], label=name, linewidth=1.5)
            low, high = losses.amin(0)[1:], losses.amax(0)[1:]
            ax.fill_between(x, low, high, alpha=0.15, color=line.get_color(), linewidth=0)
    top = 2 * made[0].curve[0][2]
    for ax, label in zip(axes, ("steps", "seconds"), strict=True):
        ax.set(xlabel=label, title=title, xscale="log", yscale="log", ylim=(None, top))
        ax.grid(alpha=0.3)
    least = made[0].task.least
    axes[0].set_ylabel(f"training loss, less {least:.2f}" if least else "training loss")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--save", type=Path, default=Path(__file__).parent)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tune", action="store_true", help="search the grids, and only that")
    parser.add_argument("--quick", action="store_true", help="one seed and a few steps")
    options = parser.parse_args()
    warnings.simplefilter("ignore", ng.errors.NonFiniteWarning)  # where a setting diverges
    if options.tune:
        tune(tasks())
        return
    seeds, rounds = (1, 8) if options.quick else (options.seeds, ROUNDS)

    figure, axes = plt.subplots(2, 2, figsize=(11, 8.5), sharey="row", layout="constrained")
    for row, (title, task) in zip(axes, tasks().items(), strict=True):
        runs = compete(title, task, seeds, rounds)
        show(title, runs)
        draw(row, title, runs)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=6)
    figure.savefig(options.save / "train.png", dpi=120)
    print(f"saved {options.save / 'train.png'}")


if __name__ == "__main__":
    main()
