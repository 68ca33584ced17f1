"""Builds in a folder go on after an interruption, with the numbers of one that was not."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from torch import nn

import nngeo_lazy as ng
from nngeo_lazy.errors import DataError
from nngeo_lazy.operators import StoredLinearOperator
from nngeo_lazy.representations import Mixed, Stored

from cases import close

ROUNDING = 1e-6  # in float32, of products of the same numbers, which lie in memory in another way

pytest.importorskip("safetensors", reason="the extra `folders`")


class Loader:
    """Batches that fail in one pass, and how often they were read."""

    def __init__(self, fails=None):
        torch.manual_seed(2)
        self.batches = [(torch.randn(4, 3), torch.arange(4) % 2) for _ in range(3)]
        self.fails, self.passes, self.read = fails, 0, 0

    def __iter__(self):
        self.passes += 1
        for k, batch in enumerate(self.batches):
            if (self.passes, k) == self.fails:
                raise KeyboardInterrupt
            self.read += 1
            yield batch

    def __len__(self):
        return 3


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setattr("nngeo_lazy.kept.KEPT_BYTES", 0)  # every pass reads the data
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


@pytest.mark.parametrize("estimator", ["exact", "mc"])
def test_a_build_goes_on_after_the_last_pass(model, tmp_path, estimator):
    options = {"estimator": estimator, "seed": 3}
    stored = Stored("ekfac", tmp_path / "F")
    loader = Loader(fails=(2, 1))
    with pytest.raises(KeyboardInterrupt):
        ng.FIM(model, loader, stored, **options)
    assert sorted(os.listdir(tmp_path / "F")) == ["begun-build.json", "begun-pass-1.pt"]
    with pytest.raises(DataError, match=r"has no index.json"):
        ng.load(tmp_path / "F")
    again = Loader()
    F = ng.FIM(model, again, stored, **options)
    assert again.read == 1 + 3  # the first batch alone, and the second pass
    plain = ng.FIM(model, Loader(), "ekfac", **options)
    close(F.to_dense(), plain.to_dense(), ROUNDING)
    assert all(isinstance(member, StoredLinearOperator) for member in F.members)
    assert (F.info.quantity, F.num_examples) == (plain.info.quantity, 12)
    assert F.info.log_likelihood == plain.info.log_likelihood
    finished = Loader()
    close(ng.FIM(model, finished, stored, **options).to_dense(), plain.to_dense(), ROUNDING)
    assert finished.read == 0
    assert "begun-pass-1.pt" not in os.listdir(tmp_path / "F")


@pytest.mark.parametrize(
    "representation",
    ["diagonal", "kfac", "block_diagonal", "quasi_diagonal", Mixed("ekfac", {"0": "dense"})],
)
def test_what_is_stored_is_what_is_built(model, tmp_path, representation):
    F = ng.FIM(model, Loader(), Stored(representation, tmp_path / "F"))
    close(F.to_dense(), ng.FIM(model, Loader(), representation).to_dense(), ROUNDING)


def test_a_build_that_fails_while_it_is_saved(model, tmp_path, monkeypatch):
    stored = Stored("ekfac", tmp_path / "F")
    with monkeypatch.context() as patched:
        patched.setattr("nngeo_lazy.folders._write", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            ng.FIM(model, Loader(), stored)
    again = Loader()
    F = ng.FIM(model, again, stored)
    assert again.read <= 2  # no pass
    close(F.to_dense(), ng.FIM(model, Loader(), "ekfac").to_dense(), ROUNDING)


def test_another_build_in_the_folder_is_refused(model, tmp_path):
    stored = Stored("kfac", tmp_path / "F")
    ng.FIM(model, Loader(), stored)
    for change in ("values of parameters", "representation", "estimator", "number of batches"):
        other, options, loader = stored, {}, Loader()
        if change == "representation":
            other = Stored("ekfac", tmp_path / "F")
        elif change == "estimator":
            options = {"estimator": "empirical"}
        elif change == "number of batches":
            loader = loader.batches[:2]
        else:
            before = model[0].weight.detach().clone()
            model[0].weight.data[0, 0] += 1
        with pytest.raises(DataError, match=f"holds a build of another {change}: pass another"):
            ng.FIM(model, loader, other, **options)
        if change == "values of parameters":
            model[0].weight.data.copy_(before)
    ng.FIM(model, Loader(), Stored("ekfac", tmp_path / "G"))  # the remedy


def test_what_cannot_go_on_is_refused(model, tmp_path):
    with pytest.raises(DataError, match="pass seed= to an 'mc' estimate"):
        ng.FIM(model, Loader(), Stored("kfac", tmp_path / "F"), estimator="mc")
    with pytest.raises(DataError, match="RowStack keeps single examples"):
        ng.FIM(model, Loader(), Stored("low_rank", tmp_path / "R"))
    for name in ("implicit", Stored("kfac", tmp_path)):
        with pytest.raises(DataError, match="expected a representation that is made of sums"):
            Stored(name, tmp_path / "F")
    with pytest.raises(DataError, match="expected a folder to build in: pass Stored"):
        Stored("kfac")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"holds \['notes.txt'\]: pass another folder"):
        ng.FIM(model, Loader(), Stored("kfac", tmp_path / "mine"))


def test_damaged_sums_are_named(model, tmp_path):
    stored = Stored("ekfac", tmp_path / "F")
    with pytest.raises(KeyboardInterrupt):
        ng.FIM(model, Loader(fails=(2, 1)), stored)
    path = tmp_path / "F" / "begun-pass-1.pt"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=r"is damaged .*remove it, and its pass is made again"):
        ng.FIM(model, Loader(), stored)
    path.unlink()  # the remedy
    F = ng.FIM(model, Loader(), stored)
    close(F.to_dense(), ng.FIM(model, Loader(), "ekfac").to_dense(), ROUNDING)


KILLED = """
import os, signal, sys
import torch
from torch import nn
import nngeo_lazy as ng
from nngeo_lazy import kept

kept.KEPT_BYTES = 0  # every pass reads the data
torch.manual_seed(1)
model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
torch.manual_seed(2)
batches = [(torch.randn(4, 3), torch.arange(4) % 2) for _ in range(3)]


class Loader:
    passes = 0

    def __len__(self):
        return 3

    def __iter__(self):
        Loader.passes += 1
        for k, batch in enumerate(batches):
            if [str(Loader.passes), str(k)] == sys.argv[2:]:
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch


stored = ng.representations.Stored("ekfac", sys.argv[1])
F = ng.FIM(model, Loader(), stored, estimator="mc", seed=3)
torch.save((F.to_dense(), Loader.passes), sys.argv[1] + ".pt")
"""


def test_a_build_that_is_killed_goes_on_to_the_same_bits(tmp_path):
    """SIGKILL in the second pass, and the same call in a new process; beside a whole one."""
    script = tmp_path / "build.py"
    script.write_text(KILLED)

    def run(folder, *kill):
        command = [sys.executable, str(script), str(tmp_path / folder), *kill]
        return subprocess.run(command, capture_output=True, text=True, check=False).returncode

    assert run("F", "2", "1") == -signal.SIGKILL
    assert "index.json" not in os.listdir(tmp_path / "F")
    assert not (tmp_path / "F.pt").exists()
    assert run("F") == run("whole") == 0
    (found, passes), (expected, all_passes) = (
        torch.load(tmp_path / f"{name}.pt") for name in ("F", "whole")
    )
    assert torch.equal(found, expected)
    assert all_passes == 2
    assert passes == 2  # the first batch alone, in place of the first pass
    assert not [name for name in os.listdir(tmp_path / "F") if name.startswith("begun-pass")]
    assert len(os.listdir(tmp_path / "F")) == len(os.listdir(tmp_path / "whole"))
