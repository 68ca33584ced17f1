"""Optimizers on small tasks, without tuning: `NaturalGradient` on defaults beside AdamW and SGD.

    python tests/benchmarks/untuned.py [--quick] [--tasks a,b] [--seeds N] [--optimizers kfac,ekfac]
                                       [--option key=value ...] [--steps FACTOR] [--cosine]
                                       [--time]

AdamW and SGD have the best of four learning rates (1e-3, 3e-3, 1e-2, 3e-2, for SGD ten times that);
SOAP runs if its package `pytorch_optimizer` is installed (`--optimizers kfac,AdamW,SGD,SOAP`).
Printed for each task are the final training losses, means over seeds. Progress is
log(start / final) / log(start / best of all). A divergence is a final loss that is not finite or
above the first one, a spike a batch loss over three times the first one. `--time` also gives AdamW
the time of each natural gradient's runs, in the place of their number of steps. `--quick` takes six
tasks and one seed, and fails if a natural gradient diverges or spikes, or if KFAC or EKFAC wins
less than four tasks.
"""

import argparse
import functools
import inspect
import itertools
import json.decoder
import math
import sys
import textwrap
import time
import warnings
from collections.abc import Callable
from statistics import fmean
from typing import NamedTuple

import torch
from sklearn import datasets
from torch import nn
from torch.nn import functional as F

import nngeo_lazy as ng

RATES = (1e-3, 3e-3, 1e-2, 3e-2)
QUICK = ("digits MLP", "diabetes", "Poisson", "batch norm", "ill-conditioned", "large logits")


class Task(NamedTuple):
    network: Callable
    loss: Callable
    likelihood: object  # None is recognised
    train: tuple
    test: tuple
    batch: int
    steps: int


# --- data -----------------------------------------------------------------------------------------


def shuffled(x, y, count, seed=0):
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    x, y = x[order], y[order]
    return (x[:count], y[:count]), (x[count:], y[count:])


def standard(x):
    x = torch.as_tensor(x, dtype=torch.float32)
    return (x - x.mean(0)) / (x.std(0) + 1e-8)


@functools.cache
def digits():
    x, y = datasets.load_digits(return_X_y=True)
    return shuffled(torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y), 1400)


@functools.cache
def characters(length=32):
    """The source of two modules of the standard library, (n, length) with the next characters."""
    text = inspect.getsource(textwrap) + inspect.getsource(json.decoder)
    text += inspect.getsource(argparse)[:60000]
    known = {c: k for k, c in enumerate(sorted(set(text)))}
    z = torch.tensor([known[c] for c in text])
    n = (len(z) - 1) // length
    x, y = z[: n * length].view(n, length), z[1 : n * length + 1].view(n, length)
    return shuffled(x, y, n - 64), len(known)


def houses():
    """Heavy-tailed features and noise, and labels that are clipped."""
    g = torch.Generator().manual_seed(0)
    n = 4000
    income, rooms, people = (torch.randn(n, 3, generator=g) * 0.5 + 1).exp().unbind(1)
    north, west, age = torch.rand(n, 3, generator=g).unbind(1)
    noise = 0.3 * torch.randn(n, generator=g) / torch.rand(n, generator=g).clamp_min(0.05).sqrt()
    near = sum(
        (-((north - a) ** 2 + (west - b) ** 2) * 40).exp() for a, b in ((0.2, 0.2), (0.6, 0.7))
    )
    y = (0.3 * income - 0.1 * people.log() + 0.4 * age + 1.5 * near + noise).clamp(0.1, 5)
    x = torch.stack([income, rooms, people, north, west, age, rooms / people, income**2], 1)
    return shuffled(standard(x), y[:, None], 3000)


# --- networks -------------------------------------------------------------------------------------


def mlp(*sizes, act=nn.ReLU):
    layers = [each for a, b in itertools.pairwise(sizes) for each in (nn.Linear(a, b), act())]
    return nn.Sequential(*layers[:-1])


def cnn():
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(64, 10)),
    )


def normed():
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        *(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3)),
        *(nn.Linear(256, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, 10)),
    )


def large():
    model = mlp(64, 64, 32, 10)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.mul_(4)
    return model


class Rows(nn.Module):
    """An LSTM over the rows of an image."""

    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.LSTM(8, 32, batch_first=True), nn.Linear(32, 10)

    def forward(self, x):
        return self.head(self.rnn(x.view(-1, 8, 8))[0][:, -1])


class Block(nn.Module):
    def __init__(self, d, heads):
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(d), nn.LayerNorm(d)])
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down, self.heads = nn.Linear(d, 4 * d), nn.Linear(4 * d, d), heads

    def forward(self, x):
        n, t, d = x.shape
        qkv = self.qkv(self.norms[0](x)).view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(*qkv, is_causal=True).transpose(1, 2).reshape(n, t, d)
        x = x + self.out(h)
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class GPT(nn.Module):
    def __init__(self, vocabulary, length=32, d=48, heads=3, depth=2):
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, d), nn.Embedding(length, d)
        self.blocks = nn.Sequential(*(Block(d, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, vocabulary, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, index):
        x = self.token(index) + self.position(torch.arange(index.shape[1]))
        return self.head(self.norm(self.blocks(x)))


class Residuals(nn.Module):
    """u'' of a network u with u(0) = u(1) = 0: layers carry (u, u', u'') as three positions."""

    def __init__(self, width=32):
        super().__init__()
        sizes = ((2, width), (width + 1, width), (width + 1, 1))
        self.layers = nn.ModuleList(nn.Linear(*size, bias=False) for size in sizes)

    def forward(self, x):
        one = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1).expand(len(x), 3, 1)
        h = torch.stack([x, torch.ones_like(x), torch.zeros_like(x)], 1)
        for k, layer in enumerate(self.layers):
            h = layer(torch.cat([h, one], -1))
            if k < 2:
                t = h[:, 0].tanh()
                d = 1 - t * t
                h = torch.stack([t, d * h[:, 1], d * h[:, 2] - 2 * t * d * h[:, 1] ** 2], 1)
        u, du, ddu = h.unbind(1)
        return ddu * x * (1 - x) + 2 * du * (1 - 2 * x) - 2 * u


# --- tasks ----------------------------------------------------------------------------------------


def tasks():
    ce, mse = F.cross_entropy, F.mse_loss
    train, test = digits()
    classes = (ce, None, train, test)
    images = ((train[0], train[0]), (test[0], test[0]))

    def bernoulli(f, y):
        return F.binary_cross_entropy_with_logits(f, y, reduction="none").sum(1).mean()

    def poisson(f, y):
        return (f.exp() - y * f + torch.lgamma(y + 1)).sum(1).mean()

    def tokens(f, y):
        return ce(f.flatten(0, 1), y.flatten())

    g = torch.Generator().manual_seed(0)
    x, y = datasets.load_diabetes(return_X_y=True)
    diabetes = shuffled(standard(x), standard(y)[:, None], 350)
    x, y = datasets.load_wine(return_X_y=True)
    wine = shuffled(standard(x), torch.tensor(y), 140)
    x = torch.randn(2000, 6, generator=g)
    rate = 1 + 0.6 * x[:, 0] - 0.4 * x[:, 1] + 0.5 * (2 * x[:, 2]).sin() + 0.3 * x[:, 3] * x[:, 4]
    counts = shuffled(x, torch.poisson(rate.exp(), generator=g)[:, None], 1500)
    q, _ = torch.linalg.qr(torch.randn(40, 40, generator=g))
    scales = torch.logspace(0, -3, 40)
    x = torch.randn(1500, 40, generator=g) * scales @ q.T
    w = q @ (torch.randn(40, generator=g) / scales.clamp_min(1e-2))
    linear = shuffled(x, (x @ w)[:, None] + 0.1 * torch.randn(1500, 1, generator=g), 1000)
    (chars, next_chars), vocabulary = characters()
    grid, points = torch.linspace(0, 1, 129)[:, None], torch.rand(64, 1, generator=g)
    waves = [
        (z, -4.0 * ((2 * math.pi * z).sin() + 2 * (4 * math.pi * z).sin())) for z in (grid, points)
    ]
    deep = (64, 128, 64, 32, 8, 32, 64, 128, 64)
    squared = nn.MSELoss()
    return {
        "digits MLP": Task(lambda: mlp(64, 64, 32, 10), *classes, 64, 150),
        "digits CNN": Task(cnn, *classes, 64, 120),
        "softmax regression": Task(lambda: nn.Linear(64, 10), *classes, 64, 150),
        "deep autoencoder": Task(
            lambda: mlp(*deep, act=nn.Tanh), bernoulli, "bernoulli", *images, 256, 200
        ),
        "diabetes": Task(lambda: mlp(10, 32, 32, 1, act=nn.Tanh), mse, squared, *diabetes, 64, 150),
        "heavy tails": Task(lambda: mlp(8, 64, 64, 1), mse, squared, *houses(), 128, 200),
        "Poisson": Task(
            lambda: mlp(6, 32, 32, 1, act=nn.Tanh), poisson, "poisson", *counts, 64, 150
        ),
        "character GPT": Task(lambda: GPT(vocabulary), tokens, None, chars, next_chars, 16, 150),
        "LSTM": Task(Rows, *classes, 64, 150),
        "batch norm": Task(normed, *classes, 64, 120),
        "ill-conditioned": Task(lambda: nn.Linear(40, 1), mse, squared, *linear, 64, 200),
        "PINN": Task(Residuals, mse, squared, *waves, 129, 200),
        "full batch": Task(lambda: mlp(13, 32, 32, 3, act=nn.Tanh), ce, None, *wine, 140, 100),
        "large logits": Task(large, *classes, 64, 150),
    }


# --- runs -----------------------------------------------------------------------------------------


class Result(NamedTuple):
    first: float
    final: float
    test: float
    worst: float
    seconds: float

    @property
    def diverged(self):
        return not self.final < self.first


def mean(results):
    worst, finals = max(r.worst for r in results), [r.final for r in results]
    final = fmean(finals) if all(map(math.isfinite, finals)) else math.inf
    means = (fmean(getattr(r, name) for r in results) for name in ("first", "test", "seconds"))
    first, test, seconds = means
    return Result(first, final, test, worst, seconds)


def _plain(kind, model, task, **options):
    return kind(model.parameters(), **options)


def makers(names, options):
    found = {}
    for name in names:
        if name in ("AdamW", "SGD"):
            kind, factor = getattr(torch.optim, name), 10 if name == "SGD" else 1
            more = {"momentum": 0.9} if name == "SGD" else {}
            for lr in (rate * factor for rate in RATES):
                found[f"{name} {lr:g}"] = functools.partial(_plain, kind, lr=lr, **more)
        elif name == "SOAP":
            try:
                from pytorch_optimizer import SOAP
            except ImportError as error:
                print(f"SOAP is left out: {error}")
                continue
            found["SOAP 0.01"] = functools.partial(_plain, SOAP, lr=1e-2)
        else:
            found[name] = lambda m, t, name=name: ng.optim.NaturalGradient(
                m, name, t.likelihood, **options
            )
    return found


def run(task, make, seed, factor=1, cosine=False, seconds=math.inf):
    """A training run of so many times the task's steps, at most so many seconds of one thread."""
    torch.manual_seed(seed)
    model = task.network()
    optimizer = make(model, task)
    steps = int(task.steps * factor) if seconds == math.inf else sys.maxsize
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps) if cosine else None
    generator, (x, y) = torch.Generator().manual_seed(seed), task.train
    first, worst, start = None, 0.0, time.process_time()
    for _ in range(steps):
        if time.process_time() - start > seconds:
            break
        index = torch.randperm(len(x), generator=generator)[: task.batch]
        optimizer.zero_grad()
        loss = task.loss(model(x[index]), y[index])
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        value = float(loss.detach())
        first = value if first is None else first
        worst = max(worst, value / first) if math.isfinite(value) else math.inf
        if not math.isfinite(worst):
            break
    seconds = time.process_time() - start
    model.eval()
    with torch.no_grad():
        final, test = (float(task.loss(model(a), b)) for a, b in (task.train, task.test))
    return Result(first, final, test, worst, seconds)


def best(results, name):
    """The one with the lowest loss of an optimizer's learning rates, by task."""
    known = [key for key in results if key.startswith(name + " ")]
    count = len(next(iter(results.values())))
    finite = [
        [results[k][t] for k in known if math.isfinite(results[k][t].final)] for t in range(count)
    ]
    return [min(rs, key=lambda r: r.final, default=None) for rs in finite]


def at_equal_time(known, names, runs, natural):
    """Print on how many tasks a natural gradient is below AdamW in the time of its own runs."""
    rates = makers(["AdamW"], {})
    finals = []
    for name, own in zip(names, runs, strict=True):
        each = [
            mean([run(known[name], make, k, seconds=r.seconds) for k, r in enumerate(own)])
            for make in rates.values()
        ]
        finite = [r.final for r in each if math.isfinite(r.final)]
        finals.append((mean(own).final, each[0].final, min(finite, default=math.inf)))
    one, best_of = (sum(own < adam[k] for own, *adam in finals) for k in (0, 1))
    print(f"\n{'equal time':<20}{natural:>14}{'AdamW 0.001':>14}{'AdamW, best':>14}")
    for name, row in zip(names, finals, strict=True):
        print(f"{name:<20}" + "".join(f"{v:>14.4g}" for v in row))
    print(
        f"{natural}, equal time: below AdamW {RATES[0]:g} on {one}, below its best on {best_of} of "
        f"{len(names)}",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--tasks", default="")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--optimizers", default="kfac,ekfac,diagonal,AdamW,SGD")
    parser.add_argument("--option", action="append", default=[], help="key=value of the defaults")
    parser.add_argument("--steps", type=float, default=1.0, help="so many times the steps")
    parser.add_argument("--cosine", action="store_true")
    parser.add_argument("--time", action="store_true", help="give AdamW as much time, not steps")
    given = parser.parse_args()
    warnings.simplefilter("ignore", ng.errors.LikelihoodWarning)
    torch.set_num_threads(1)
    options = {"seed": 0}
    for each in given.option:
        key, value = each.split("=")
        options[key] = {"True": True, "None": None}.get(value, value)
        if value.replace(".", "").replace("e-", "").isdigit():
            options[key] = float(value) if not value.isdigit() else int(value)
    known = tasks()
    names = QUICK if given.quick else tuple(given.tasks.split(",")) if given.tasks else tuple(known)
    seeds = 1 if given.quick else given.seeds
    wanted = "kfac,ekfac,diagonal,AdamW" if given.quick else given.optimizers
    results, divergences, spikes = {}, {}, {}
    for label, make in makers(wanted.split(","), options).items():
        runs = [
            [run(known[name], make, seed, given.steps, given.cosine) for seed in range(seeds)]
            for name in names
        ]
        divergences[label] = sum(r.diverged for rs in runs for r in rs)
        spikes[label] = sum(r.worst > 3 for rs in runs for r in rs)
        results[label] = [mean(rs) for rs in runs]
        print(f"{label}: {sum(r.seconds for rs in runs for r in rs):.0f} s", flush=True)
        if given.time and " " not in label:
            at_equal_time(known, names, runs, label)
    natural = [name for name in results if " " not in name]
    kinds = dict.fromkeys(name.split(" ")[0] for name in results if " " in name)
    rivals = {name: best(results, name) for name in kinds}
    columns = {**{n: results[n] for n in natural}, **{f"{n}, best": r for n, r in rivals.items()}}
    print(f"\n{'final training loss':<20}" + "".join(f"{name:>14}" for name in columns))
    for k, name in enumerate(names):
        row = [c[k].final if c[k] else math.inf for c in columns.values()]
        print(f"{name:<20}" + "".join(f"{v:>14.4g}" for v in row))
    failed = False
    for name in columns:
        own = columns[name]
        shares = []
        for k, result in enumerate(own):
            least = min(c[k].final for c in columns.values() if c[k])
            start = columns[natural[0]][k].first if natural else result.first
            made = result is not None and math.isfinite(result.final)
            whole = math.log(start / least)
            shares.append(math.log(start / max(result.final, 1e-30)) / whole if made else -1.0)
        line = f"{name:<14} progress {fmean(shares):.2f}, worst {min(shares):.2f}"
        if name in natural:
            line += f"; {divergences[name]} diverged, {spikes[name]} spikes"
            if "AdamW" in rivals:
                pairs = list(zip(own, rivals["AdamW"], strict=True))
                won = sum(b is None or a.final < b.final for a, b in pairs)
                tested = sum(b is None or a.test < b.test for a, b in pairs)
                line += f"; {won} of {len(names)} below AdamW's best (test loss: {tested})"
                failed |= name in ("kfac", "ekfac") and won < 4
            failed |= divergences[name] + spikes[name] > 0
        print(line)
    if given.quick and failed:
        raise SystemExit("a natural gradient diverged, spiked or won too few tasks")


if __name__ == "__main__":
    main()
