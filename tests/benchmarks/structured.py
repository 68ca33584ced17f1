"""Building structured Fisher matrices: this package and its peers, side by side, in one run.

    python tests/benchmarks/structured.py [--model mlp] [--rounds 5] [--threads 2]

Times are multiples of one gradient pass (forward and loss.backward over the same data) in float32:
the best of several rounds, in each of which every contender has one turn, so that a slow moment of
the machine meets all of them. Memory is the peak of a process of its own above the imported
package, the model and the data. KFAC is its factors; EKFAC is all that a solve needs, with the
eigendecompositions and the second pass.

The last row is what the first batch of this package takes beyond a later one, as a share of a build
of that batch alone: the proofs of the forms, and all that is made once.
"""

import argparse
import math
import subprocess
import sys
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from models import TITLES, setup

COLUMNS = ("KFAC exact", "KFAC mc", "diagonal exact", "EKFAC exact")
GOALS = {"mlp": (4.5, 1.6, 2.6, 12), "cnn": (7, 2.5, 8, 17)}

Build = Callable[[], object]  # builds one matrix from scratch


class UnavailableError(Exception):
    """Why a package has no entry in a column."""


def nngeo_lazy(model: nn.Module, x: Tensor, y: Tensor, column: str) -> Build:
    try:
        import nngeo_lazy as ng

        fim = ng.FIM
    except (ImportError, AttributeError):
        raise UnavailableError("not built") from None
    kind, estimator = column.lower().split()
    return lambda: fim(model, (x, y), kind, likelihood="categorical", estimator=estimator, seed=0)


class WholeBatch(TensorDataset):
    """Indexed a batch at a time: the cost of collating examples is not what is compared."""

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        return [tensor[indices] for tensor in self.tensors]


def nngeometry(model: nn.Module, x: Tensor, y: Tensor, column: str) -> Build:
    try:
        from nngeometry.metrics import FIM, FIM_MonteCarlo
        from nngeometry.object.pspace import PMatDiag, PMatEKFAC, PMatKFAC
    except ImportError:
        raise UnavailableError("not installed") from None
    loader = DataLoader(WholeBatch(x, y), batch_size=len(x), collate_fn=lambda batch: batch)

    def ekfac() -> object:
        matrix = FIM(model, loader, PMatEKFAC)
        matrix.update_diag(loader)
        return matrix

    return {
        "KFAC exact": lambda: FIM(model, loader, PMatKFAC),
        "KFAC mc": lambda: FIM_MonteCarlo(model, loader, PMatKFAC),
        "diagonal exact": lambda: FIM(model, loader, PMatDiag),
        "EKFAC exact": ekfac,
    }[column]


def curvlinops(model: nn.Module, x: Tensor, y: Tensor, column: str) -> Build:
    try:
        from curvlinops import EKFACLinearOperator, KFACLinearOperator
    except ImportError:
        raise UnavailableError("not installed") from None
    if column == "diagonal exact":
        raise UnavailableError("estimates only")
    kind, estimator = column.split()

    def build() -> object:
        operator = {"KFAC": KFACLinearOperator, "EKFAC": EKFACLinearOperator}[kind](
            model,
            nn.CrossEntropyLoss(),
            list(model.parameters()),
            [(x, y)],
            check_deterministic=False,
            fisher_type="type-2" if estimator == "exact" else "mc",
            num_per_example_loss_terms=1,
            separate_weight_and_bias=False,
            num_data=len(x),
        )
        operator.compute_kronecker_factors()
        if kind == "EKFAC":
            operator.compute_eigenvalue_correction()
        return operator

    return build


PACKAGES = {"nngeo_lazy": nngeo_lazy, "nngeometry": nngeometry, "curvlinops": curvlinops}


def gradient_pass(model: nn.Module, x: Tensor, y: Tensor) -> None:
    model.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()


def seconds(build: Build) -> float:
    start = time.perf_counter()
    build()
    return time.perf_counter() - start


def warmed_up(package: str, column: str, model: nn.Module, x: Tensor, y: Tensor) -> Build | str:
    """The build, run once; or why there is none."""
    try:
        build = PACKAGES[package](model, x, y, column)
        build()
    except UnavailableError as reason:
        return str(reason)
    except Exception as error:  # noqa: BLE001  (that a package fails is a result)
        return f"fails: {type(error).__name__}"
    return build


def times(name: str, rounds: int) -> tuple[float, dict[tuple[str, str], float | str]]:
    """Best seconds of a gradient pass, and of every (package, column), or why there is none."""
    model, x, y = setup(name)
    keys = [(package, column) for package in PACKAGES for column in COLUMNS]
    builds = {key: warmed_up(*key, model, x, y) for key in keys}
    results = {key: math.inf if callable(build) else build for key, build in builds.items()}
    gradient = math.inf
    for _ in range(rounds):
        gradient = min(gradient, seconds(lambda: gradient_pass(model, x, y)))
        model.zero_grad()
        for key, build in builds.items():
            if not isinstance(build, str):
                results[key] = min(results[key], seconds(build))
    return gradient, results


def made_once(name: str, rounds: int) -> list[float]:
    """For each column, 2 - T(two such batches) / T(one)."""
    import nngeo_lazy as ng

    model, x, y = setup(name)
    shares = []
    for column in COLUMNS:
        kind, estimator = column.lower().split()
        if kind == "ekfac":
            kind = "kfac"  # without decompositions, which are made once
        options = {"likelihood": "categorical", "estimator": estimator, "seed": 0}
        best = [math.inf, math.inf]
        for _ in range(2 * rounds):
            for k, batches in enumerate(([(x, y)], [(x, y), (x, y)])):
                build = lambda b=batches, o=options, r=kind: ng.FIM(model, b, r, **o)  # noqa: E731
                best[k] = min(best[k], seconds(build))
        shares.append(2 - best[1] / best[0])
    return shares


def memory(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at its peak (Linux).

    Not ru_maxrss, which a process inherits from the one that started it.
    """
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(field))


def peak_bytes(name: str, package: str, column: str) -> int:
    """Peak memory of one build, above what there was before it; alone in its process."""
    model, x, y = setup(name)
    if package == "gradient":
        build = lambda: gradient_pass(model, x, y)  # noqa: E731
        gradient_pass(model, x[:2], y[:2])
    else:
        build = PACKAGES[package](model, x, y, column)
        PACKAGES[package](model, x[:2], y[:2], column)()  # loads what is loaded on first use
        model.zero_grad()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts anew: what importing took for a moment hides nothing
    before = memory("VmRSS")
    build()
    return memory("VmHWM") - before


def measure_peak(name: str, package: str, column: str, threads: int) -> float:
    """`peak_bytes` from a process of its own."""
    command = [sys.executable, __file__, "--peak", name, package, column]
    command += ["--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def table(name: str, rounds: int, threads: int) -> None:
    gradient, results = times(name, rounds)
    peak = measure_peak(name, "gradient", "-", threads) / 2**20
    print(f"\n{TITLES[name]}, {threads} threads, best of {rounds} interleaved rounds")
    print(f"one gradient pass: {1000 * gradient:.1f} ms, {peak:.0f} MiB at its peak")
    print(" " * 14 + "".join(f"{column:>20}" for column in COLUMNS))
    for package in PACKAGES:
        cells = []
        for column in COLUMNS:
            result = results[package, column]
            if isinstance(result, str):
                cells.append(result)
                continue
            peak = measure_peak(name, package, column, threads) / 2**20
            cells.append(f"{result / gradient:.1f}x {peak:6.0f} MiB")
        print(f"{package:14}" + "".join(f"{cell:>20}" for cell in cells))
    print(f"{'(goal)':14}" + "".join(f"{f'{goal}x':>20}" for goal in GOALS[name]))
    shares = "".join(f"{share:>20.0%}" for share in made_once(name, rounds))
    print(f"{'made once':14}{shares}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=list(TITLES), help="default: both")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)  # one process of measure_peak
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    if options.peak:
        print(peak_bytes(*options.peak))
        return
    for name in [options.model] if options.model else list(TITLES):
        table(name, options.rounds, options.threads)


if __name__ == "__main__":
    main()
