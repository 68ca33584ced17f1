"""A step of natural gradient descent as a multiple of one of SGD, in one run.

    python tests/benchmarks/optim.py [--model mlp] [--rounds 15] [--threads 2]
    python tests/benchmarks/optim.py --small       # small networks, multiples of AdamW, one thread

A step is all of it: zero_grad, forward, backward, step, on the same batch and in float32. SGD has
momentum 0.9. A plain step is one between two refreshes of the curvature; a refresh takes new
statistics (labels drawn from the model, one more backward pass) and decomposes them. "Every 10" is
what a step costs on average when every tenth one is a refresh. The best of several rounds, in each
of which every contender has one turn. `--small` measures the time of the process, whatever else the
machine does.
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

import untuned
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


SMALL_GOALS = {"MLP 64-64-32-10": 2.5, "CNN": 2.5, "ViT": 1.4, "GPT": 1.5}


class ViT(nn.Module):
    """Two blocks of width 48 over 16 patches of an 8 x 8 image."""

    def __init__(self, d: int = 48) -> None:
        super().__init__()
        self.patches, self.norm, self.head = (
            nn.Conv2d(1, d, 2, 2),
            nn.LayerNorm(d),
            nn.Linear(d, 10),
        )
        self.positions = nn.Parameter(0.02 * torch.randn(16, d))
        self.blocks = nn.Sequential(*(untuned.Block(d, 3) for _ in range(2)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x.view(-1, 1, 8, 8)).flatten(2).mT + self.positions
        return self.head(self.norm(self.blocks(x)).mean(1))


def small(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    if name == "GPT":
        tokens = torch.randint(80, (2, 16, 32))
        return untuned.GPT(80), tokens[0], tokens[1]
    makers = {
        "MLP 64-64-32-10": lambda: untuned.mlp(64, 64, 32, 10),
        "CNN": untuned.cnn,
        "ViT": ViT,
    }
    return makers[name](), torch.rand(64, 64), torch.randint(10, (64,))


def small_table(name: str, rounds: int) -> None:
    """Plain steps on defaults, and nine of them with a refresh, in multiples of AdamW's."""
    model, x, y = small(name)
    adamw = torch.optim.AdamW(model.parameters(), foreach=True)
    base, plain, refresh = math.inf, {}, {}
    optimizers = {}
    for kind in ("kfac", "ekfac", "diagonal"):
        own, _, _ = small(name)
        optimizers[kind] = own, ng.optim.NaturalGradient(own, kind, seed=0)
        for _ in range(25):
            step_of(optimizers[kind][1], own, x, y)
    for _ in range(rounds):
        base = min(base, used(lambda: [step_of(adamw, model, x, y) for _ in range(9)]) / 9)
        for kind, (own, optimizer) in optimizers.items():
            step = partial(step_of, optimizer, own, x, y)
            while not optimizer._refreshing:
                step()
            refresh[kind] = min(refresh.get(kind, math.inf), used(step))
            times = [used(step) for _ in range(9) if not optimizer._refreshing]
            plain[kind] = min([plain.get(kind, math.inf), *([sum(times) / 9] * (len(times) == 9))])
    print(
        f"\n{name}: a step of AdamW {1000 * base:.2f} ms; plain steps at most {SMALL_GOALS[name]}"
    )
    for kind in optimizers:
        one, new = plain[kind] / base, refresh[kind] / base
        print(f"{kind:10} plain {one:.2f}, refresh {new:.1f}, every 10 {0.9 * one + 0.1 * new:.2f}")


def used(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


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
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    if options.small:
        torch.set_num_threads(1)
        for name in SMALL_GOALS:
            small_table(name, options.rounds)
        return
    torch.set_num_threads(options.threads)
    for name in [options.model] if options.model else list(NAMES):
        table(name, options.rounds, options.threads)


if __name__ == "__main__":
    main()
