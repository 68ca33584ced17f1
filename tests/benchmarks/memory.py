"""Peak memory of building KFAC, EKFAC and the diagonal against the number of examples N and of
directions R: flat in both, but for what EKFAC keeps of its first pass within a stated budget.

    python tests/benchmarks/memory.py [--model cnn] [--threads 2]

Each number is the peak of a process of its own above what it held before the build, in MiB. The
data are made a batch at a time, so that they take no memory themselves; R is the number of label
draws, so that the model is the same for all R.
"""

import argparse
import subprocess
import sys
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

import nngeo_lazy as ng
from nngeo_lazy import kept

from models import CLASSES, INPUTS, TITLES, setup
from structured import gradient_pass, memory

REPRESENTATIONS = ("kfac", "ekfac", "ekfac, nothing kept", "diagonal")
BATCH = 32
EXAMPLES = (64, 256, 1024)
DIRECTIONS = (1, 4, 16)


class Batches:
    """So many batches of random data, the same on every pass, none of them kept."""

    def __init__(self, name: str, examples: int) -> None:
        self.shape, self.count = (BATCH, *INPUTS[name][1:]), examples // BATCH

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(0)
        for _ in range(self.count):
            x = torch.randn(self.shape, generator=generator)
            yield x, torch.randint(CLASSES, (BATCH,), generator=generator)


def peak_bytes(name: str, representation: str, examples: int, directions: int) -> int:
    if representation.endswith("nothing kept"):
        kept.KEPT_BYTES = 0
        representation = "ekfac"
    model, x, y = setup(name)
    options = {"likelihood": "categorical", "estimator": "mc", "seed": 0}
    ng.FIM(model, (x[:4], y[:4]), representation, **options)  # loads what is loaded on first use
    gradient_pass(model, x[:4], y[:4])
    model.zero_grad()
    del x, y
    data = Batches(name, examples)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts anew
    before = memory("VmRSS")
    F = ng.FIM(model, data, representation, samples=directions, **options)
    peak = memory("VmHWM") - before
    assert F.num_examples == examples
    return peak


def measure(threads: int, *arguments: object) -> float:
    """MiB of `peak_bytes`, from a process of its own."""
    command = [sys.executable, __file__, "--peak", *map(str, arguments), "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1]) / 2**20


def table(name: str, threads: int) -> None:
    print(f"\n{TITLES[name].split(',')[0]}, batches of {BATCH}, peak MiB above the start")
    header = [f"N={n}" for n in EXAMPLES] + [f"R={r}" for r in DIRECTIONS]
    print(" " * 20 + "".join(f"{cell:>9}" for cell in header) + f"{'kept':>9}")
    for representation in REPRESENTATIONS:
        cells = [measure(threads, name, representation, n, 1) for n in EXAMPLES]
        cells += [measure(threads, name, representation, EXAMPLES[0], r) for r in DIRECTIONS]
        model, x, y = setup(name)
        kind = representation.split(",")[0]
        kept = ng.FIM(model, (x[:4], y[:4]), kind, likelihood="categorical").report()
        print(f"{representation:20}" + "".join(f"{c:9.1f}" for c in [*cells, kept.bytes / 2**20]))
    budget = kept.KEPT_BYTES / 2**20
    print(f"(N with R = 1, R with N = {EXAMPLES[0]}; kept: the operator's own bytes;")
    print(f" EKFAC keeps a first pass's forms for its second up to {budget:.0f} MiB)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=list(TITLES), help="default: both")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--peak", nargs=4, help=argparse.SUPPRESS)  # one process of `measure`
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    if options.peak:
        name, representation, examples, directions = options.peak
        print(peak_bytes(name, representation, int(examples), int(directions)))
        return
    for name in [options.model] if options.model else list(TITLES):
        table(name, options.threads)


if __name__ == "__main__":
    main()
