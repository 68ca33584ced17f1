"""A step of natural gradient descent as a multiple of one of SGD, in one run.

    python tests/benchmarks/optim.py [--model mlp] [--rounds 15] [--threads 2]

A step is all of it: zero_grad, forward, backward, step, on the same batch and in float32. SGD has
momentum 0.9. A plain step is one between two refreshes of the curvature; a refresh takes new
statistics (labels drawn from the model, one more backward pass) and decomposes them. "Every 10" is
what a step costs on average when every tenth one is a refresh. The best of several rounds, in each
of which every contender has one turn.
"""

import argparse
import math
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

import nngeo_lazy as ng
from nngeo_lazy.likelihoods import Categorical

from models import TITLES, loss, setup

NAMES = {**TITLES, "gpt": "GPT, 4 layers of width 128, 32 sequences of 64"}
CONTENDERS = {
    "diagonal": ("diagonal", "exact"),
    "KFAC": ("kfac", "exact"),
    "KFAC, factored damping": ("kfac", "factored"),
    "EKFAC": ("ekfac", "exact"),
}
PLAIN = {"mlp": {"KFAC": 1.6, "KFAC, factored damping": 1.6, "EKFAC": 2.1}}
GOALS = {"mlp": 3.0, "cnn": 2.0, "gpt": 2.0}


def step_of(optimizer: torch.optim.Optimizer, model: nn.Module, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    loss(model, x, y).backward()
    optimizer.step()


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def table(name: str, rounds: int, threads: int) -> None:
    model, x, y = setup(name)
    sgd = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    optimizers = {}
    for title, (kind, method) in CONTENDERS.items():
        own, _, _ = setup(name)
        optimizers[title] = (
            own,
            ng.optim.NaturalGradient(
                own,
                kind,
                Categorical(class_dim=-1),
                lr=1e-4,
                damping_method=method,
                seed=0,
                warmup=0,
            ),
        )
    step_of(sgd, model, x, y)
    for own, optimizer in optimizers.values():  # a first step proves the forms of the layers
        for _ in range(2):
            step_of(optimizer, own, x, y)
    base = math.inf
    plain, refresh = (dict.fromkeys(optimizers, math.inf) for _ in range(2))
    for _ in range(rounds):
        base = min(base, seconds(lambda: step_of(sgd, model, x, y)))
        for title, (own, optimizer) in optimizers.items():
            while optimizer._steps % 10 != 9:
                step_of(optimizer, own, x, y)
            for times in (plain, refresh):
                times[title] = min(times[title], seconds(partial(step_of, optimizer, own, x, y)))
    print(f"\n{NAMES[name]}, {threads} threads, best of {rounds} interleaved rounds")
    print(f"one step of SGD: {1000 * base:.1f} ms")
    print(f"{'':24}{'plain':>16}{'refresh':>10}{'every 10':>16}")
    for title in optimizers:
        one, new = plain[title] / base, refresh[title] / base
        goal = PLAIN.get(name, {}).get(title, 1.25)
        goals = f"{one:.2f} ({goal:g})", f"{0.9 * one + 0.1 * new:.2f} ({GOALS[name]:g})"
        print(f"{title:24}{goals[0]:>16}{new:>10.2f}{goals[1]:>16}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=list(NAMES), help="default: all")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in [options.model] if options.model else list(NAMES):
        table(name, options.rounds, options.threads)


if __name__ == "__main__":
    main()
