"""Damage done to files: truncations, flipped bits, saves that are interrupted or killed.

Nothing may be loaded with other numbers than were saved, nothing may raise a foreign error, and a
file that is being replaced must survive. Run `python tests/fuzz/files.py` for thousands of cases.
"""

import collections
import io
import linecache
import os
import random
import signal
import subprocess
import sys
import time

import torch
from torch import nn

import nngeo_lazy as ng
from nngeo_lazy.errors import NNGeoError
from nngeo_lazy.operators import DenseLinearOperator


def subject(representation="kfac"):
    """An operator, and its file."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    F = ng.FIM(model, (torch.randn(30, 4), torch.arange(30) % 3), representation)
    buffer = io.BytesIO()
    ng.save(F, buffer)
    return F, buffer.getvalue()


def outcome(F, data):
    """What loading gives: "same", "named" error, or what must not be."""
    try:
        back = ng.load(io.BytesIO(bytes(data)))
    except NNGeoError:
        return "named"
    except Exception as error:  # noqa: BLE001 - what is looked for
        return f"foreign {type(error).__name__}"
    same = torch.equal(back.to_dense(), F.to_dense()) and back.info.quantity == F.info.quantity
    return "same" if same and repr(back.report()) == repr(F.report()) else "OTHER NUMBERS"


def flipped(count, seed=0):
    """Outcomes of files with one bit flipped."""
    F, raw = subject()
    draw, seen = random.Random(seed), collections.Counter()
    for _ in range(count):
        data = bytearray(raw)
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        seen[outcome(F, data)] += 1
    return seen


def truncated(count):
    """Outcomes of files that end too early."""
    F, raw = subject()
    return collections.Counter(outcome(F, raw[: len(raw) * k // count]) for k in range(count))


def interrupted(count, folder, seed=0):
    """What is there after Ctrl-C at random lines of a save over an older file."""
    old, new = DenseLinearOperator(torch.eye(5)), DenseLinearOperator(2 * torch.eye(5))
    path, draw = os.path.join(folder, "F.pt"), random.Random(seed)
    ng.save(new, path)
    lines = lines_of(lambda: ng.save(new, path))
    seen = collections.Counter()
    for _ in range(count):
        ng.save(old, path)
        lines_of(lambda: ng.save(new, path), stop=draw.randrange(lines))
        found = float(ng.load(path).trace())
        rest = [name for name in os.listdir(folder) if name != "F.pt"]
        seen["whole" if found in (5.0, 10.0) else "LOST"] += 1
        seen["left behind"] += len(rest)
    return seen


def lines_of(run, stop=None, files=""):
    """How many lines of Python run, of files that end so; an interrupt comes behind `stop`."""
    count = 0

    def step(frame, event, arg):
        nonlocal count
        if event == "line" and frame.f_code.co_filename.endswith(files):
            count += 1
            if stop is not None and count > stop and not unreachable(frame):
                sys.settrace(None)
                raise KeyboardInterrupt
        return step

    before = sys.gettrace()
    sys.settrace(step)
    try:
        run()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    return count


def unreachable(frame):
    """Whether no interrupt comes from here.

    Python ignores what is raised while an object is freed. It looks for signals neither between a
    lock's `__enter__` and its block nor between the block and `__exit__`: only a trace stops there.
    """
    line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
    if line in ("with _lock:", "with _drawing:"):
        return True
    while frame is not None and frame.f_code.co_name != "__del__":
        frame = frame.f_back
    return frame is not None


def killed(count, folder, size=1000):
    """What is there after kill -9 in the middle of saves over a file."""
    path = os.path.join(folder, "K.pt")
    code = (
        f"import nngeo_lazy as ng; F = ng.load({path!r}); print(1, flush=True)\n"
        f"while True: ng.save(F, {path!r})"
    )
    seen = collections.Counter()
    ng.save(DenseLinearOperator(torch.eye(size)), path)
    for k in range(count):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(0.05 + 0.013 * k)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        try:
            seen["whole" if float(ng.load(path).trace()) == size else "OTHER NUMBERS"] += 1
        except NNGeoError as error:
            seen[f"LOST: {error}"] += 1
    return seen


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        print("400 truncations:", dict(truncated(400)))
        print("2000 flipped bits:", dict(flipped(2000)))
        print("40 interrupted saves:", dict(interrupted(40, folder)))
        print("12 killed saves:", dict(killed(12, folder)))
