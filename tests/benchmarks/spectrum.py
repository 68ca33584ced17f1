"""The spectrum of a Hessian: this package, scipy on its products, and curvlinops, in one run.

    python tests/benchmarks/spectrum.py [--model mlp] [--rounds 3] [--threads 2]

The ten largest eigenpairs to the same relative residual, and a density of 90 nodes, in float32 of
the same Hessian. Products are counted as columns; those that scipy asks for go through
`H.to_scipy()`. Seconds are the best of several rounds, in each of which every contender has one
turn, and products the mean over rounds, which have random starts of their own; set-up is left out.
"""

import argparse
import math
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.sparse.linalg
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import nngeo_lazy as ng

from implicit import BATCH, NAMES, Flat
from models import setup

K, NODES = 10, 90


class Counted(scipy.sparse.linalg.LinearOperator):
    """A scipy operator that counts its products."""

    def __init__(self, inner: Any) -> None:
        super().__init__(np.float32, inner.shape)
        self.inner, self.count = inner, 0

    def _matvec(self, v: np.ndarray) -> np.ndarray:
        self.count += 1
        return self.inner.matvec(v)


def residual(H: Any, values: torch.Tensor, vectors: torch.Tensor) -> float:
    """The largest |H v - value v| / |value|."""
    left = torch.linalg.vector_norm(H @ vectors - vectors * values, dim=0)
    return float((left / values.abs()).max())


def with_scipy(H: Any, operator: Any, tol: float, seed: int) -> tuple[int, Callable[[], float]]:
    counted = Counted(operator)
    v0 = np.random.default_rng(seed).standard_normal(operator.shape[0]).astype(np.float32)
    values, vectors = scipy.sparse.linalg.eigsh(counted, K, which="LA", tol=tol, v0=v0)
    found = torch.from_numpy(values), torch.from_numpy(vectors)
    return counted.count, lambda: residual(H, *found)


def contenders(name: str, tol: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is timed for the pairs and for the density: seed -> (products, residual or None)."""
    model, x, y = setup(name)
    batches = list(zip(x.split(BATCH[name]), y.split(BATCH[name]), strict=True))
    H = ng.Hessian(model, batches, loss=ng.likelihoods.Categorical(class_dim=-1))
    H @ torch.randn(H.shape[0])  # keeps what later products need

    def ours(seed: int) -> tuple[int, Callable[[], float]]:
        found = ng.eigsh(H, K, tol=tol, seed=seed)
        return found.matvecs, lambda: residual(H, *found)

    def density(seed: int) -> tuple[int, None]:
        return ng.spectral_density(H, probes=1, steps=NODES, seed=seed).matvecs, None

    pairs = {
        "nngeo_lazy": ours,
        "scipy, H.to_scipy()": lambda seed: with_scipy(H, H.to_scipy(), tol, seed),
    }
    densities: dict[str, Any] = {"nngeo_lazy": density}
    try:
        from curvlinops import HessianLinearOperator
        from curvlinops.papyan2020traces.spectrum import lanczos_approximate_spectrum
    except ImportError:
        return pairs, densities
    flat = Flat(model)
    params = [p for p in flat.parameters() if p.requires_grad]
    data = [(x, y.flatten()) for x, y in batches]
    theirs = HessianLinearOperator(flat, torch.nn.CrossEntropyLoss(), params, data, num_data=len(x))
    inner, count = theirs._matmat, 0

    def counting(M: Any) -> Any:
        nonlocal count
        count += 1
        return inner(M)

    theirs._matmat = counting

    def their_density(seed: int) -> tuple[int, None]:
        nonlocal count
        count = 0
        torch.manual_seed(seed)
        lanczos_approximate_spectrum(theirs, NODES)
        return count, None

    pairs["scipy, curvlinops"] = lambda seed: with_scipy(H, theirs.to_scipy(), tol, seed)
    densities["curvlinops"] = their_density
    return pairs, densities


def compare(title: str, runs: dict[str, Any], rounds: int) -> None:
    best = dict.fromkeys(runs, math.inf)
    products: dict[str, list[int]] = {package: [] for package in runs}
    worst = dict.fromkeys(runs, 0.0)
    for seed in range(rounds):
        for package, run in runs.items():
            start = time.perf_counter()
            count, check = run(seed)
            best[package] = min(best[package], time.perf_counter() - start)
            products[package].append(count)
            worst[package] = max(worst[package], check() if check else 0.0)
    print(f"  {title:<24}{'products':>10}{'seconds':>10}{'of ours':>10}{'residual':>12}")
    for package in runs:
        mean = sum(products[package]) / rounds
        ratio = best[package] / best["nngeo_lazy"]
        shown = f"{worst[package]:.1e}" if worst[package] else "-"
        print(f"  {package:<24}{mean:>10.1f}{best[package]:>10.2f}{ratio:>9.2f}x{shown:>12}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=list(NAMES), help="default: all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tol", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    for name in [options.model] if options.model else list(NAMES):
        print(f"\n{NAMES[name]}, {options.threads} threads, {options.rounds} rounds")
        with sdpa_kernel(SDPBackend.MATH):  # curvlinops cannot follow fused attention
            pairs, densities = contenders(name, options.tol)
            compare(f"{K} pairs, tol {options.tol:g}", pairs, options.rounds)
            compare(f"density, {NODES} nodes", densities, options.rounds)


if __name__ == "__main__":
    main()
