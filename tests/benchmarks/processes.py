"""One and two processes on the same data: time, efficiency, peak memory and bytes exchanged.

    python tests/benchmarks/processes.py [--width 512] [--examples 16384] [--repeats 3]

Every process has one thread. Efficiency is the time of one process over that of W, divided by W;
that of the passes leaves out eigendecompositions, since KFAC makes none in its build. Bytes are
those that the group counted, beside those that `ng.plan` computes. At the end, how evenly the
eigendecompositions of a language model lie on 8 and 64 processes, by simulation.
"""

import argparse
import copy
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import nngeo_lazy as ng
from nngeo_lazy.collectives import Group, owners

BATCH = 256
CLASSES = 10


def network(width: int) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(width, CLASSES))


def batches(width: int, examples: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(1)
    count = examples // BATCH
    return [(torch.randn(BATCH, width), torch.randint(CLASSES, (BATCH,))) for _ in range(count)]


Run = Callable[[], object]


def tasks(
    model: nn.Module, whole: list[tuple[torch.Tensor, torch.Tensor]], data: ng.Distributed
) -> dict[str, tuple[Run, Group]]:
    def build(representation: str) -> object:
        return ng.FIM(model, data, representation, estimator="mc", seed=0)

    G = ng.GGN(model, data, loss="categorical")
    v = torch.ones(G.shape[0])
    return {
        "kfac": (lambda: build("kfac"), data.group),
        "ekfac": (lambda: build("ekfac"), data.group),
        "GGN, 5 products": (lambda: [G @ v for _ in range(5)], data.group),
        "KFAC, 5 steps": optimizer_steps(model, whole),
    }


def optimizer_steps(
    model: nn.Module, whole: list[tuple[torch.Tensor, torch.Tensor]]
) -> tuple[Run, Group]:
    """Steps on all examples together, of which each process has an equal share."""
    replica = DistributedDataParallel(copy.deepcopy(model))
    optimizer = ng.optim.NaturalGradient(replica, "kfac", "categorical", lr=1e-3, seed=0)
    rank, size = dist.get_rank(), dist.get_world_size()
    x, y = (torch.cat(each)[rank::size] for each in zip(*whole, strict=True))

    def run() -> None:
        for _ in range(5):
            optimizer.zero_grad()
            nn.functional.cross_entropy(replica(x), y).backward()
            optimizer.step()

    return run, optimizer._group  # beside it, the wrapper exchanges the gradient


def work(rank: int, size: int, store: str, options: dict[str, int], results: "mp.Queue") -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, size), rank=rank, world_size=size)
    model, whole = network(options["width"]), batches(options["width"], options["examples"])
    data = ng.Distributed(whole)
    plan = ng.plan(ng.FIM, model, data, "ekfac", estimator="mc", seed=0)
    for name, (run, group) in tasks(model, whole, data).items():
        run()  # warm
        before = group.traffic.bytes
        times = []
        for _ in range(options["repeats"]):
            dist.barrier()
            start = time.perf_counter()
            run()
            dist.barrier()
            times.append(time.perf_counter() - start)
        sent = (group.traffic.bytes - before) // options["repeats"]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        planned = plan.bytes_sent if name == "ekfac" else None
        results.put((rank, name, statistics.median(times), peak, sent, planned))
    dist.destroy_process_group()


def measured(size: int, options: dict[str, int]) -> dict[str, tuple[float, float, int, int | None]]:
    """Of rank 0: seconds, MiB, bytes, and bytes as planned."""
    context = mp.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        args = [(rank, size, store, options, results) for rank in range(size)]
        processes = [context.Process(target=work, args=each) for each in args]
        for process in processes:
            process.start()
        found = [results.get(timeout=600) for _ in range(size * 4)]
        for process in processes:
            process.join()
    return {name: tuple(rest) for rank, name, *rest in found if rank == 0}


def balance(size: int) -> float:
    """The slowest process over the mean, for GPT-2 XL: 48 blocks of four linear layers."""
    d = 1600
    sides = [d + 1, 3 * d, d + 1, d, d + 1, 4 * d, 4 * d + 1, d] * 48
    costs = [float(n**3) for n in sides]
    loads = [0.0] * size
    for cost, owner in zip(costs, owners(costs, size), strict=True):
        loads[owner] += cost
    return max(loads) / (sum(costs) / size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--examples", type=int, default=16384)
    parser.add_argument("--repeats", type=int, default=3)
    options = vars(parser.parse_args())
    one, two = measured(1, options), measured(2, options)
    print(f"{'':24}{'1: s':>8}{'2: s':>8}{'effic.':>8}{'1: MiB':>8}{'2: MiB':>8}{'bytes':>12}")
    for name, (alone, held, _, _) in one.items():
        both, each, sent, planned = two[name]
        more = "" if planned is None else f"  ({planned:,} planned)"
        row = f"{alone:8.3f}{both:8.3f}{alone / both / 2:8.2f}{held:8.0f}{each:8.0f}"
        print(f"{name:24}{row}{sent:12,}{more}")
    for size in (8, 64):
        print(f"eigendecompositions of GPT-2 XL on {size}: slowest / mean = {balance(size):.3f}")


if __name__ == "__main__":
    main()
