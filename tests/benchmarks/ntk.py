"""The neural tangent kernel as a dense matrix: this package, nngeometry and plain torch.func.

    python tests/benchmarks/ntk.py [--case mlp] [--rounds 5] [--threads 2]

All outputs of all examples, (N C x N C), in float32, from inputs to the matrix. Seconds are the
best of several rounds, in each of which every contender has one turn. Memory is the peak of a
process of its own above the imported package, the model and the data; the matrix itself is a part.
The contraction is torch.func's: jacrev of all parameters by vmap, and one einsum for each.
"""

import argparse
import math
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from models import CLASSES, setup
from structured import UnavailableError, WholeBatch, memory

CASES = {"mlp": ("mlp", 64), "cnn": ("cnn", 64), "mlp1024": ("mlp", 1024)}
TITLES = {"mlp": "MLP, 64 x 10", "cnn": "CNN, 64 x 10", "mlp1024": "MLP, 1,024 x 10"}
GOALS = {"mlp": (30, 3), "cnn": (15, 1.6)}  # times as fast as nngeometry, as the contraction

Compute = Callable[[], Tensor]


def nngeo_lazy(model: nn.Module, x: Tensor) -> Compute:
    import nngeo_lazy as ng

    return lambda: ng.NTK(model, x).to_dense()


def nngeometry(model: nn.Module, x: Tensor) -> Compute:
    try:
        from nngeometry.gram import GramMatrix
    except ImportError:
        raise UnavailableError("not installed") from None
    y = torch.zeros(len(x)).long()
    loader = DataLoader(WholeBatch(x, y), batch_size=len(x), collate_fn=lambda batch: batch)
    return lambda: GramMatrix(model, loader).to_torch().permute(1, 0, 3, 2).flatten(2).flatten(0, 1)


def contraction(model: nn.Module, x: Tensor) -> Compute:
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    size = sum(p.numel() for p in parameters.values()) * len(x) * CLASSES * 4
    if size > 2**33:
        raise UnavailableError(f"its rows would take {size / 2**30:.0f} GiB")

    def one(parameters: dict[str, Tensor], example: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (example[None],))[0]

    def compute() -> Tensor:
        rows = torch.func.vmap(torch.func.jacrev(one), (None, 0))(parameters, x)
        total = None
        for part in rows.values():
            flat = part.detach().flatten(0, 1).flatten(1)  # (N C, p)
            total = flat @ flat.mT if total is None else total.addmm_(flat, flat.mT)
        return total

    return compute


PACKAGES = {"nngeo_lazy": nngeo_lazy, "nngeometry": nngeometry, "torch.func": contraction}


def prepared(package: str, case: str, examples: int | None = None) -> Compute:
    name, full = CASES[case]
    model, x, _ = setup(name)
    return PACKAGES[package](model, x[: examples or full])


def peak(package: str, case: str, threads: int) -> float | str:
    """MiB, from a process of its own."""
    command = [sys.executable, __file__, "--peak", package, case, "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return float(done.stdout.split()[-1]) if done.returncode == 0 else "fails"


def measure_peak(package: str, case: str) -> None:
    compute = prepared(package, case)
    prepared(package, case, 2)()  # loads what is loaded on first use
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts anew
    before = memory("VmRSS")
    compute()
    print((memory("VmHWM") - before) / 2**20)


def compare(case: str, rounds: int, threads: int) -> None:
    runs, results, best = {}, {}, {}
    for package in PACKAGES:
        try:
            run = prepared(package, case)
            results[package] = run()
            runs[package], best[package] = run, math.inf
        except UnavailableError as reason:
            print(f"  {package}: {reason}")
    largest = max(
        float((one - other).norm() / one.norm()) for one, other in pairwise(results.values())
    )
    results.clear()
    for _ in range(rounds):
        for package, run in runs.items():
            start = time.perf_counter()
            run()
            best[package] = min(best[package], time.perf_counter() - start)
    print(
        f"  {'':<14}{'seconds':>10}{'of ours':>10}{'peak MiB':>10}   (they differ by {largest:.0e})"
    )
    for package, seconds in best.items():
        mib = peak(package, case, threads)
        shown = mib if isinstance(mib, str) else f"{mib:.0f}"
        print(f"  {package:<14}{seconds:>10.3f}{seconds / best['nngeo_lazy']:>9.1f}x{shown:>10}")
    if case in GOALS:
        print(f"  {'goals':<14}{'':>10}{GOALS[case][0]:>9}x and {GOALS[case][1]}x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--case", choices=list(CASES), help="default: all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    if options.peak:
        return measure_peak(*options.peak)
    for case in [options.case] if options.case else list(CASES):
        print(f"\n{TITLES[case]}, {options.threads} threads, {options.rounds} rounds", flush=True)
        compare(case, options.rounds, options.threads)
    return None


if __name__ == "__main__":
    main()
