"""A tangent kernel of many images on disk: time, peak memory, a killed run that goes on.

    python tests/benchmarks/kernel_on_disk.py [--examples 10000] [--folder FOLDER] [--threads 1]

A small convolutional network and digits, moved and with noise, so that there are as many as wanted.
The kernel is the mean over ten outputs. A process of its own writes it, is killed halfway, and
another one goes on; a corner is compared with the kernel of its own examples, made at once.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import nngeo_lazy as ng

from structured import memory

CORNER = 300


def network() -> nn.Module:
    """The one of examples/ntk_evolution.py."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip


def images(n: int) -> Tensor:
    """(n, 1, 8, 8)."""
    torch.manual_seed(1)
    digits = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 16
    chosen = digits[torch.randint(len(digits), (n,))]
    return chosen.roll(int(torch.randint(3, ())) - 1, 3) + 0.1 * torch.randn(chosen.shape)


def write(examples: int, folder: str) -> None:
    """In a process of its own: prints seconds and MiB."""
    x = images(examples)
    loader = DataLoader(TensorDataset(x, torch.zeros(examples)), batch_size=100)
    start = time.perf_counter()
    ng.NTK(network(), loader, outputs="mean", path=folder)
    print(time.perf_counter() - start, memory("VmHWM") / 2**20)


def main() -> None:
    """Write, kill, go on, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=10_000)
    parser.add_argument("--folder")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--child", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.child:
        write(options.examples, options.folder)
        return
    folder = Path(options.folder or tempfile.mkdtemp())
    command = [sys.executable, __file__, "--child", "--examples", str(options.examples)]
    command += ["--folder", str(folder / "K"), "--threads", str(options.threads)]
    begun, done = time.perf_counter(), folder / "K" / "done.json"
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while child.poll() is None:
        if done.exists() and json.loads(done.read_text())[1] > options.examples / 2:
            child.kill()
            child.wait()
        time.sleep(0.2)
    at = json.loads(done.read_text())[1]
    print(f"killed after {time.perf_counter() - begun:.0f} s with {at} of {options.examples} rows")
    seconds, peak = map(
        float, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    )
    print(f"the rest took {seconds:.0f} s, peak memory of the process {peak:.0f} MiB")
    K = ng.NTK(  # all is there, and is mapped
        network(),
        DataLoader(
            TensorDataset(images(options.examples), torch.zeros(options.examples)), batch_size=100
        ),
        outputs="mean",
        path=folder / "K",
    )
    x = images(options.examples)
    for start in (0, options.examples - CORNER):
        stop = start + CORNER
        corner = ng.NTK(network(), x[start:stop], x[:CORNER], outputs="mean").to_dense()
        held = K.tensor[start:stop, :CORNER]
        across = K.tensor[:CORNER, start:stop].mT
        error = max(float((corner - each).norm() / corner.norm()) for each in (held, across))
        print(f"rows {start} to {stop}: relative difference to the kernel at once {error:.1e}")
    size = (folder / "K" / "kernel.npy").stat().st_size / 2**20
    print(f"the file has {size:.0f} MiB")
    if options.folder is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
