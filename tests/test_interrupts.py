"""An interrupt at every line that opens or closes a scope: no mode, setting or flag is left."""

import threading

import pytest
import torch
from fuzz.files import lines_of
from fuzz.interrupts import Jobs, changed, flags, world
from torch import nn
from tqdm import tqdm

import nngeo_lazy as ng
from nngeo_lazy import bars
from nngeo_lazy.switches import _lock, holding, setting, together, whole_transforms

EDGES = ("switches.py", "contextlib.py", "grad_mode.py", "forward_ad.py")


def free():
    """Whether another thread may take the lock."""
    taken = []

    def take():
        taken.append(_lock.acquire(timeout=5))
        if taken[0]:
            _lock.release()

    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
    return taken == [True]


# torch's own generators, which an interrupt has left, find their transform ended
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", ["product", "logdet", "solution"])
def test_interrupts_at_the_edges_of_scopes(name):
    jobs = Jobs()
    call = {
        "product": lambda: jobs.F @ jobs.v,
        "logdet": lambda: ng.logdet(jobs.damped, seed=0),
        "solution": lambda: ng.solve(jobs.F, jobs.v, damping=0.1, tol=0.5),
    }[name]
    want = call()
    want = want if name == "product" else want[0]
    lines = lines_of(call, files=EDGES)
    assert lines > 20
    model, settings = world(jobs.model), flags()
    for stop in range(min(lines, 120)):
        lines_of(call, stop, EDGES)
        assert flags() == settings, stop
        assert not changed(model, jobs.model), stop
        assert free(), stop
        got = call()
        torch.testing.assert_close(got if name == "product" else got[0], want)


def test_a_setting_of_a_scope_that_is_lost():
    colour = setting("colour", "red")

    @whole_transforms()
    def lost():
        holding(colour, "blue").__enter__()  # and then no block
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lost()
    assert colour.get() == "red"


def test_scopes_together_close_what_they_have_opened():
    colour, seen = setting("colour", "red"), []

    class Broken:
        def __enter__(self):
            seen.append(colour.get())
            raise ValueError("broken")

        def __exit__(self, *_):
            seen.append("closed")

    with pytest.raises(ValueError, match=r"^broken$"), together(holding(colour, "blue"), Broken()):
        pass
    assert (seen, colour.get()) == (["blue"], "red")


def test_no_bar_is_made_that_is_not_shown(monkeypatch):
    """A bar of tqdm takes locks of the whole process, which an interrupt could leave taken."""
    made = []

    def bar(**options):
        made.append(options)
        return tqdm(**options, disable=True)

    monkeypatch.setattr(bars, "tqdm", bar)
    model, data = nn.Linear(3, 2), (torch.randn(6, 3), torch.arange(6) % 2)
    F = ng.FIM(model, data, "implicit")
    ng.eigsh(F, 1)
    ng.trace(ng.Hessian(model, data, loss="categorical"), probes=2)
    assert made == []
    ng.FIM(model, data, "kfac", progress=True)
    ng.eigsh(F, 1, progress=True)
    assert {options["unit"] for options in made} == {"batch", " products"}
