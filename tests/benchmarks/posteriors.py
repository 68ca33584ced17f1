"""Variances of many classes by a last-layer posterior: this package, and laplace-torch beside it.

    python tests/benchmarks/posteriors.py [--classes 3100] [--inputs 1000] [--features 128]

A network of two layers; the posterior is Kronecker over its last one, in float32. Seconds are those
of the variances of all outputs of all inputs, with the fit apart. Memory is the peak of a process
of its own above what it was when the posterior was fitted; N C numbers are the result itself. The
peer gives covariances, N C^2 numbers, so it takes a few inputs at a time, and its time is
multiplied; tests/test_laplace_peers.py compares their numbers.
"""

import argparse
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

GOAL = 5.0  # seconds
SOME = 5  # inputs of the peer at a time


def setup(args):
    torch.manual_seed(0)
    layers = [nn.Linear(32, args.features), nn.Tanh(), nn.Linear(args.features, args.classes)]
    model, x = nn.Sequential(*layers), torch.randn(2000, 32)
    return model, x, torch.randint(args.classes, (2000,)), torch.randn(args.inputs, 32)


def peak() -> float:
    """The most memory since the last call, in MiB."""
    status = Path("/proc/self/status").read_text().split("VmHWM:")[1]
    Path("/proc/self/clear_refs").write_text("5")
    return int(status.split()[0]) / 2**10


def resident() -> float:
    peak()
    return peak()


def ours(args):
    import nngeo_lazy as ng

    model, x, y, new = setup(args)
    begun = time.perf_counter()
    F = ng.FIM(model, (x, y), "kfac", params="2", estimator="mc", seed=0)
    la = ng.Laplace(model, F)
    la.covariance  # noqa: B018
    fitted, before = time.perf_counter() - begun, resident()
    begun = time.perf_counter()
    variance = la.functional(new, covariance="diagonal").variance
    seconds, grown = time.perf_counter() - begun, peak() - before
    assert variance.shape == (args.inputs, args.classes)
    return fitted, seconds, grown


def theirs(args):
    from laplace_torch import peer

    package = peer()
    model, x, y, new = setup(args)
    begun = time.perf_counter()
    la = package.Laplace(model, "classification", backend_kwargs={"stochastic": True})
    la.fit(DataLoader(TensorDataset(x, y), batch_size=500))
    fitted, before = time.perf_counter() - begun, resident()
    begun = time.perf_counter()
    la._glm_predictive_distribution(new[:SOME])
    seconds = (time.perf_counter() - begun) * len(new) / SOME
    return fitted, seconds, peak() - before


def failure(done: "subprocess.CompletedProcess[str]") -> str:
    """The last line of its complaint; of a process that was killed, by which signal."""
    if done.returncode < 0:
        return f"ended by {signal.Signals(-done.returncode).name}"
    lines = done.stderr.strip().splitlines()
    return lines[-1][:90] if lines else f"exit status {done.returncode}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--classes", type=int, default=3100)
    parser.add_argument("--inputs", type=int, default=1000)
    parser.add_argument("--features", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=("ours", "theirs"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    if args.only:
        print(*({"ours": ours, "theirs": theirs}[args.only](args)))
        return
    size = args.inputs * args.classes * 4 / 2**20
    print(f"{args.inputs} inputs, {args.classes} classes: N C is {size:.1f} MiB")
    print(f"{'':15}{'fit':>9}{'variances':>12}{'memory':>12}")
    for name in ("ours", "theirs"):
        command = [sys.executable, __file__, *sys.argv[1:], "--only", name]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        if found.returncode:
            print(f"{name:15}{failure(found)}")
            continue
        fitted, seconds, grown = map(float, found.stdout.split()[-3:])
        goal = (
            f"   (goal {GOAL:.0f} s)"
            if name == "ours"
            else f"   of {SOME} inputs, times {args.inputs / SOME:.0f}"
        )
        print(f"{name:15}{fitted:7.2f} s{seconds:10.2f} s{grown:8.1f} MiB{goal}")


if __name__ == "__main__":
    main()
