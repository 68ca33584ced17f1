"""Products with matrix-free operators: this package and its peers, side by side, in one run.

    python tests/benchmarks/implicit.py [--model mlp] [--rounds 5] [--threads 2]

Times are multiples of one gradient pass (forward and loss.backward, same batches) in float32:
the best of several rounds, in each of which every contender has one turn, so that a slow moment of
the machine meets all of them. Set-up is making the operator with its first product, which keeps
what later products need.
"""

import argparse
import math
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader

from models import TITLES, loss, setup
from structured import UnavailableError, WholeBatch

NAMES = {**TITLES, "gpt": "GPT, 4 layers of width 128, 32 sequences of 64"}
COLUMNS = ("GGN set-up", "GGN", "GGN x 8", "Hessian set-up", "Hessian", "factored")
GOALS = {
    "mlp": {"GGN": 1.2, "GGN x 8": 6.5, "Hessian": 1.4, "factored": 0.95},
    "cnn": {"GGN": 1.1, "GGN x 8": 9.5, "Hessian": 2.5},
    "gpt": {"GGN": 1.5, "GGN x 8": 12.0, "Hessian": 2.3},
}

BATCH = {"mlp": 256, "cnn": 64, "gpt": 8}  # examples; everybody goes over the same batches
Batches: TypeAlias = list[tuple[Tensor, Tensor]]
Run = Callable[[], object]
Makers = Mapping[str, Callable[[], Any]]  # of operators


def nngeo_lazy(model: nn.Module, batches: Batches) -> Makers:
    import nngeo_lazy as ng

    likelihood = ng.likelihoods.Categorical(class_dim=-1)
    options = {"likelihood": likelihood, "estimator": "empirical"}
    return {
        "GGN": lambda: ng.GGN(model, batches, loss=likelihood),
        "Hessian": lambda: ng.Hessian(model, batches, loss=likelihood),
        "factored": lambda: ng.FIM(model, batches, "factored", **options),
    }


class Flat(nn.Module):
    """Positions as examples: what a loss module of two dimensions takes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).flatten(0, -2)


def curvlinops(model: nn.Module, batches: Batches) -> Makers:
    try:
        from curvlinops import GGNLinearOperator, HessianLinearOperator
    except ImportError:
        raise UnavailableError("not installed") from None
    flat = Flat(model)
    params = [p for p in flat.parameters() if p.requires_grad]
    given = (flat, nn.CrossEntropyLoss(), params, [(x, y.flatten()) for x, y in batches])
    options = {"num_data": sum(len(x) for x, _ in batches)}
    return {
        "GGN": lambda: GGNLinearOperator(*given, **options),
        "Hessian": lambda: HessianLinearOperator(*given, **options),
    }


def nngeometry(model: nn.Module, batches: Batches) -> Makers:
    try:
        from nngeometry.metrics import FIM
        from nngeometry.object.pspace import PMatImplicit
        from nngeometry.object.vector import PVector
    except ImportError:
        raise UnavailableError("not installed") from None
    x, y = (torch.cat(each) for each in zip(*batches, strict=True))
    size = len(batches[0][0])
    loader = DataLoader(WholeBatch(x, y), batch_size=size, collate_fn=lambda batch: batch)

    class Fisher:
        """Its products take its own kind of vector."""

        def __init__(self) -> None:
            self.matrix = FIM(model, loader, PMatImplicit)
            self.vector = PVector.from_model(model).detach()

        def __matmul__(self, v: Tensor) -> object:
            if v.dim() > 1:
                raise UnavailableError("one at a time")
            return self.matrix.mv(self.vector)

    return {"GGN": Fisher}


PACKAGES = {"nngeo_lazy": nngeo_lazy, "curvlinops": curvlinops, "nngeometry": nngeometry}


def gradient_pass(model: nn.Module, batches: Batches) -> None:
    model.zero_grad()
    for x, y in batches:
        loss(model, x, y).backward()


def runs(makers: Makers, size: int) -> dict[str, Run | str]:
    """What is timed in each column, run once; or why there is none."""
    v, columns = torch.randn(size), torch.randn(size, 8)
    found: dict[str, Run | str] = dict.fromkeys(COLUMNS, "-")

    def add(column: str, plain: Run) -> None:
        def run() -> None:  # a peer's forward mode cannot follow fused attention
            with sdpa_kernel(SDPBackend.MATH):
                plain()

        try:
            run()
        except UnavailableError as reason:
            found[column] = str(reason)
        except Exception as error:  # noqa: BLE001  (that a package fails is a result)
            found[column] = f"fails: {type(error).__name__}"
        else:
            found[column] = run

    for kind, make in makers.items():
        if kind != "factored":
            add(f"{kind} set-up", lambda make=make: make() @ v)
            if isinstance(found[f"{kind} set-up"], str):
                found[kind] = found[f"{kind} set-up"]
                continue
        with sdpa_kernel(SDPBackend.MATH):
            operator = make()
        add(kind, lambda operator=operator: operator @ v)
        if kind == "GGN":
            add("GGN x 8", lambda operator=operator: operator @ columns)
    return found


def seconds(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def times(name: str, rounds: int) -> tuple[float, dict[tuple[str, str], float | str]]:
    """Best seconds of a gradient pass, and of every (package, column), or why there is none."""
    model, *data = setup(name)
    batches = list(zip(*(each.split(BATCH[name]) for each in data), strict=True))
    size = sum(p.numel() for p in model.parameters())
    every: dict[tuple[str, str], Run | str] = {}
    for package, makers in PACKAGES.items():
        try:
            found = runs(makers(model, batches), size)
        except UnavailableError as reason:
            found = dict.fromkeys(COLUMNS, str(reason))
        every.update({(package, column): run for column, run in found.items()})
    results = {key: run if isinstance(run, str) else math.inf for key, run in every.items()}
    gradient = math.inf
    for _ in range(rounds):
        gradient = min(gradient, seconds(lambda: gradient_pass(model, batches)))
        model.zero_grad()
        for key, run in every.items():
            if not isinstance(run, str):
                results[key] = min(results[key], seconds(run))
    return gradient, results


def with_twenty(results: Mapping[tuple[str, str], float | str], package: str) -> float:
    """Seconds of set-up and 20 products of the GGN."""
    each = [results[package, column] for column in ("GGN set-up", "GGN")]
    return math.nan if any(isinstance(t, str) for t in each) else each[0] + 20 * each[1]


def table(name: str, rounds: int, threads: int) -> None:
    gradient, results = times(name, rounds)
    print(f"\n{NAMES[name]}, {threads} threads, best of {rounds} interleaved rounds")
    print(f"one gradient pass: {1000 * gradient:.1f} ms")
    heads = (*COLUMNS, "set-up + 20")
    print(" " * 12 + "".join(f"{head:>16}" for head in heads))
    for package in PACKAGES:
        cells = [results[package, column] for column in COLUMNS]
        cells.append(with_twenty(results, package))
        shown = (t if isinstance(t, str) else f"{t / gradient:.2f}x" for t in cells)
        print(f"{package:12}" + "".join(f"{cell:>16}" for cell in shown))
    goals = [f"{GOALS[name][c]:g}x" if c in GOALS[name] else "" for c in COLUMNS]
    ratio = with_twenty(results, "nngeo_lazy") / with_twenty(results, "curvlinops")
    print(f"{'(goal)':12}" + "".join(f"{goal:>16}" for goal in goals))
    print(f"set-up + 20 products: {ratio:.2f} of curvlinops' time (goal: 0.85)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=list(NAMES), help="default: all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    for name in [options.model] if options.model else list(NAMES):
        table(name, options.rounds, options.threads)


if __name__ == "__main__":
    main()
