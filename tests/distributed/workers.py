"""Real processes for tests: a pool that is spawned once, and runs functions by name.

A task is a module-level function of a group, run on the first `size` workers at once. What it
returns comes back as a list by rank; what it raises comes back as text, or is raised by `run`.
"""

import datetime
import importlib
import os
import tempfile
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

LIMIT = 60.0  # seconds, after which a hang is a failure
START = 300.0  # seconds for a process to start, on a machine that is busy with others
MOST = 4


class Raised(str):
    """An error of a worker: its class and message, and how long it took."""

    seconds: float

    def __new__(cls, text, seconds):
        made = super().__new__(cls, text)
        made.seconds = seconds
        return made


def serve(rank, folder, tasks, results):
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    results.put("ready")
    while (task := tasks.get()) is not None:
        number, module, name, size, args, limit = task
        store = dist.FileStore(str(Path(folder) / f"{number}"), size)
        wait = datetime.timedelta(seconds=LIMIT if limit is None else limit)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=wait)
        dist.barrier()  # none leaves before all have come
        function = getattr(importlib.import_module(module), name)
        start = time.monotonic()
        torch.manual_seed(0)
        try:
            value = function(*args)
        except BaseException as error:  # noqa: BLE001 - every error is a result here
            text = f"{type(error).__name__}: {error}"
            if type(error).__name__ == "AssertionError":
                text += "\n" + traceback.format_exc()
            results.put((rank, number, False, (text, time.monotonic() - start)))
        else:
            results.put((rank, number, True, value))
        dist.destroy_process_group()


class Pool:
    """Workers that stay alive between tests."""

    def __init__(self):
        self._context = mp.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        self._workers = {}
        self._number = 0

    def _runs(self, rank):
        return rank in self._workers and self._workers[rank][0].is_alive()

    def _spawn(self, rank):
        tasks, results = self._context.SimpleQueue(), self._context.Queue()
        environment = dict(os.environ)
        os.environ["OMP_NUM_THREADS"] = "1"
        process = self._context.Process(
            target=serve, args=(rank, self._folder.name, tasks, results), daemon=True
        )
        process.start()
        os.environ.clear()
        os.environ.update(environment)
        self._workers[rank] = process, tasks, results

    def start(self, function, size, *args, limit=None):
        """What a function gives on each of `size` processes; `Raised` if it raised."""
        self._number += 1
        fresh = [rank for rank in range(size) if not self._runs(rank)]
        for rank in fresh:
            self._spawn(rank)
        for rank in fresh:
            assert self._workers[rank][2].get(timeout=START) == "ready"
        workers = [self._workers[rank] for rank in range(size)]
        task = (self._number, function.__module__, function.__name__, size, args, limit)
        for _, tasks, _ in workers:
            tasks.put(task)
        found = []
        deadline = time.monotonic() + LIMIT
        for rank, (process, _, results) in enumerate(workers):
            value = None
            while value is None:
                if not results.empty():
                    value = results.get()
                elif not process.is_alive():
                    value = (rank, self._number, False, ("died", 0.0))
                elif time.monotonic() > deadline:
                    self.close()
                    raise TimeoutError(f"rank {rank} of {size} hangs in {function.__name__}")
                else:
                    time.sleep(0.002)
            _, number, well, result = value
            assert number == self._number
            found.append(result if well else Raised(*result))
        return found

    def run(self, function, size, *args):
        """The same, and every process must succeed."""
        found = self.start(function, size, *args)
        for rank, each in enumerate(found):
            assert not isinstance(each, Raised), f"rank {rank}: {each}"
        return found

    def close(self):
        for process, tasks, _ in self._workers.values():
            if process.is_alive():
                tasks.put(None)
        for process, _, _ in self._workers.values():
            process.join(2)
            if process.is_alive():
                process.kill()
        self._workers = {}

    def end(self):
        self.close()
        self._folder.cleanup()
