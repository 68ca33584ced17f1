"""Two threads on one model and on two: every result is right, and no setting is left changed.

`python -m tests.fuzz.threads 1000` makes so many results of each kind.
"""

import collections
import sys
import threading

import torch

import nngeo_lazy as ng

from .interrupts import batches, changed, flags, network, world

REPRESENTATIONS = ("dense", "kfac", "diagonal", "implicit")


def results(count, shared):
    """Outcomes of so many builds and products, half of them in each of two threads."""
    models = [network()] * 2 if shared else [network(), network()]
    data = batches()
    n = sum(p.numel() for p in models[0].parameters())
    v = torch.linspace(-1, 1, n).double()
    options = {"likelihood": "categorical"}
    want = {r: ng.FIM(models[0], data, r, **options) @ v for r in REPRESENTATIONS}
    before, settings, seen = [world(m) for m in models], flags(), collections.Counter()

    def work(k):
        for j in range(count // 2):
            name = REPRESENTATIONS[(j + k) % len(REPRESENTATIONS)]
            try:
                got = ng.FIM(models[k], data, name, **options) @ v
                seen["right" if torch.allclose(got, want[name]) else f"WRONG {name}"] += 1
            except Exception as error:  # noqa: BLE001 - what is looked for
                seen[f"{type(error).__name__}: {error}"] += 1

    threads = [threading.Thread(target=work, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if flags() != settings:
        seen["WRONG: settings"] += 1
    if any(changed(b, m) for b, m in zip(before, models, strict=True)):
        seen["WRONG: a model"] += 1
    return seen


if __name__ == "__main__":
    torch.set_num_threads(1)
    for shared in (True, False):
        print("one model:" if shared else "two models:", dict(results(int(sys.argv[1]), shared)))
