"""Optimizers on a deep autoencoder and a convolutional network of digits, each fairly tuned.

    python examples/train.py [--save FOLDER] [--seeds N] [--tune] [--quick]

SGD with momentum, AdamW, KFAC, EKFAC, Hessian-free and natural gradient in the space of samples
("kernel") train the same networks on the same batches. Settings are the best of a grid of about
equal size for each, which `--tune` searches on a seed of its own, by the lowest training loss.
Optimizers take turns within a seed, so that all of them see the same noise in seconds, which are
those of zero_grad, forward, backward and step. The dearer ones get fewer steps; what a table and a
curve show is theirs alone.

Printed are medians over seeds with their range: of the lowest loss over all training images, of
accuracy on test images, and of the steps and seconds that an optimizer takes to AdamW's lowest
loss, as a part of those that AdamW takes to it. Saves a figure. `--quick` shows that it runs.
"""

import argparse
import itertools
import math
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
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
    """All combinations of the values of each option."""
    return [dict(zip(options, v, strict=True)) for v in itertools.product(*options.values())]


GRIDS = {
    "SGD": grid(lr=[3e-3, 1e-2, 3e-2, 1e-1], momentum=[0.9, 0.99]),
    "AdamW": grid(lr=[1e-3, 3e-3, 1e-2, 3e-2], beta2=[0.99, 0.999]),
    "KFAC": grid(damping=[1e-4, 1e-3, 1e-2], kl_clip=[1e-3, 1e-2, 1e-1]),
    "EKFAC": grid(damping=[1e-4, 1e-3, 1e-2], kl_clip=[1e-3, 1e-2, 1e-1]),
    "Hessian-free": grid(initial=[0.1, 1.0, 10.0], preconditioner=[None, "kfac"]),
    "kernel": grid(damping=[1e-3, 1e-2, 1e-1], kl_clip=[1e-2, 1e-1, 1.0]),
}
WINNERS = {}


class Task(NamedTuple):
    network: Callable
    loss: Callable  # of outputs and targets, for example i.e. the mean over a batch
    likelihood: str
    train: tuple  # images and targets
    test: tuple | None
    batch: int
    steps: dict  # in each of ROUNDS turns


ROUNDS = 100


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


def pixels(f, x):
    return F.binary_cross_entropy_with_logits(f, x, reduction="none").sum(1).mean()


def tasks():
    digits = load_digits()
    x = torch.tensor(digits.data, dtype=torch.float32) / 16  # (1797, 64)
    y = torch.tensor(digits.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    images = x[order].view(-1, 1, 8, 8), y[order]
    train, test = [tuple(each[part] for each in images) for part in (slice(1200), slice(1200, None))]
    slow = {"Hessian-free": 1, "kernel": 1}
    many = {"SGD": 15, "AdamW": 15, "KFAC": 5, "EKFAC": 5, **slow}
    few = {"SGD": 3, "AdamW": 3, "KFAC": 3, "EKFAC": 3, **slow}
    return {
        "autoencoder": Task(autoencoder, pixels, "bernoulli", (x, x), None, 599, many),
        "CNN": Task(convolutional, F.cross_entropy, "categorical", train, test, 120, few),
    }


def optimizer_of(name, model, likelihood, seed, setting):
    if name == "SGD":
        return torch.optim.SGD(model.parameters(), **setting)
    if name == "AdamW":
        betas = 0.9, setting["beta2"]
        return torch.optim.AdamW(model.parameters(), setting["lr"], betas, weight_decay=0)
    options = {"seed": seed, "lr": 1.0, "momentum": 0.9, "update_every": 5}
    if name == "Hessian-free":
        representation = ng.optim.HessianFree(setting["preconditioner"])
        damping = ng.optim.LevenbergMarquardt(setting["initial"])
        setting = {"damping": damping, "momentum": 0.0}
    else:
        representation = name.lower()
        options["warmup"] = 20
    return ng.optim.NaturalGradient(model, representation, likelihood, **{**options, **setting})


class Run:
    """A network that an optimizer trains, and (steps, seconds, training loss) on the way."""

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
        for _ in range(steps):
            x, y = next(self.batches)

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

    def outputs(self, x):
        self.model.eval()
        with torch.no_grad():
            f = self.model(x)
        self.model.train()
        return f

    def training_loss(self):
        x, y = self.task.train
        return float(self.task.loss(self.outputs(x), y))

    @property
    def best(self):
        """The lowest training loss, and where it was."""
        finite = [point for point in self.curve if math.isfinite(point[2])]
        return min(finite, key=lambda point: point[2])

    def reaches(self, loss):
        """The steps and seconds to a training loss; None where it does not come so low."""
        return next(((steps, s) for steps, s, value in self.curve if value <= loss), None)

    def accuracy(self):
        x, y = self.task.test
        return float((self.outputs(x).argmax(1) == y).float().mean())
