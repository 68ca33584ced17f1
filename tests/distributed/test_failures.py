"""What goes wrong in one process is named in all of them, and soon."""

import ast
import pickle
from pathlib import Path

import pytest

import nngeo_lazy as ng
from distributed import tasks
from distributed.workers import Raised
from nngeo_lazy.collectives import Group
from nngeo_lazy.errors import DataError

OWN = {
    "value": "ValueError: broken",
    "interrupt": "KeyboardInterrupt: broken",
    "nan": "NonFiniteError",
    "labels": "DataError",
}
FIRST = [(error, name, 1) for error in OWN for name in ("ekfac", "implicit")]
LATER = [(error, "implicit", 2) for error in ("value", "interrupt")]  # in a product


@pytest.mark.parametrize(("error", "representation", "at_pass"), [*FIRST, *LATER])
def test_an_error_of_one_is_an_error_of_all(pool, error, representation, at_pass):
    own = OWN[error]
    found = pool.start(tasks.failing, 3, 1, error, at_pass, representation)
    assert all(isinstance(each, Raised) and each.seconds < 20 for each in found)
    assert found[1].startswith(own)
    for each in (found[0], found[2]):
        assert each.startswith(f"DistributedError: rank 1 of 3: {own}")
    assert pool.run(tasks.usable, 3) == [23, 23, 23]


PHASES = [
    "eigendecomposition",
    "eigendecomposition of sharded blocks",
    "solve",
    "optimizer step",
    "eigendecomposition of a step",
    "save",
]


@pytest.mark.parametrize("name", PHASES)
def test_an_error_in_any_phase_is_an_error_of_all(pool, name, tmp_path):
    first, second = pool.start(tasks.phase, 2, name, "raise", str(tmp_path))
    assert second.startswith("ValueError: broken")
    assert first.startswith("DistributedError: rank 1 of 2: ValueError: broken")
    assert max(first.seconds, second.seconds) < 20
    assert pool.run(tasks.usable, 2) == [23, 23]


@pytest.mark.parametrize("name", ["exchange", *PHASES])
def test_a_death_in_any_phase_is_named_in_time(pool, name, tmp_path):
    first, second = pool.start(tasks.phase, 2, name, "die", str(tmp_path), limit=15)
    assert second == "died"
    assert first.startswith("DistributedError: rank 0 of 2 had no answer from another process")
    assert first.seconds < 40


@pytest.mark.parametrize("at_pass", [1, 2])
def test_a_process_that_dies(pool, at_pass):
    found = pool.start(tasks.failing, 2, 1, "die", at_pass, "implicit", limit=20)
    assert found[1] == "died"
    assert found[0].startswith("DistributedError: rank 0 of 2 had no answer from another process")
    assert pool.run(tasks.usable, 2) == [23, 23]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("values", "every process to make the matrix of the same values of parameters"),
        ("parameters", "of the same parameters, but rank 0 has ['0.weight (2, 1, 3, 3)'"),
        (
            "dtype",
            "same dtype, but rank 0 has torch.float64 and rank 1 of 2 has torch.float32",
        ),
        ("representation", "of the same representation, but rank 0 has KFAC(sharing='expand') and"),
        ("seed", "of the same seed, but rank 0 has 0 and rank 1 of 2 has 1"),
        ("estimator", "of the same estimator, but rank 0 has exact and rank 1 of 2 has empirical"),
        ("order", "of the same order of batches"),
        ("examples", "of the same number of batches, but rank 0 has 6 and rank 1 of 2 has 5"),
        ("vector", "DistributedError: expected every process to make the same call with the same"),
    ],
)
def test_processes_that_disagree(pool, what, message):
    for each in pool.start(tasks.mismatch, 2, what):
        assert isinstance(each, Raised)
        assert message in each


def test_a_call_on_one_rank_alone_gets_a_hint_in_time(pool):
    found = pool.start(tasks.mismatch, 2, "only rank 0", limit=5)
    assert isinstance(found[0], Raised)
    assert "under `if rank == 0:` it waits for the others" in found[0]
    assert found[0].seconds < 30


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("padding", "DataError: the DistributedSampler repeats 1 of 9 examples"),
        ("accelerate, padding", "DataError: the BatchSamplerShard repeats 3 of 9 examples"),
        ("stream", "DataError: an IterableDataset does not say whose its examples are"),
        ("custom", "DataError: a Batches does not say whose its batches are"),
        ("shuffle", "DataError: Distributed shares out the batches of a loader that is the same"),
        (
            "other group",
            "of 2, but the sampler is for rank 0 of 3: make both from one",
        ),
        ("empty", "DataError: expected at least one batch, but the loaders of all 2 processes"),
        ("jacobian", "DataError: Jacobian has rows of single examples"),
        ("ntk", "DataError: NTK has rows of single examples"),
        ("factored", "DataError: 'factored' keeps single examples, and is made in one process"),
        ("center", "DataError: center=True couples the examples of all processes"),
    ],
)
def test_bad_data(pool, what, message):
    for each in pool.start(tasks.bad, 2, what):
        assert isinstance(each, Raised)
        assert message in each


@pytest.mark.parametrize("kind", ["tensor parallel", "optimizer"])
def test_sharded_parameters_are_refused(pool, kind):
    for each in pool.start(tasks.sharded_model, 2, kind):
        assert isinstance(each, Raised)
        assert "DataError: expected whole parameters in every process, but 0.weight is a" in each
        assert "StateDictOptions(full_state_dict=True)" in each


def test_the_remedy_for_sharded_parameters(pool):
    assert pool.run(tasks.sharded_model, 2, "full")[0] == 5


def test_no_process_group():
    with pytest.raises(DataError, match=r"torch\.distributed is not initialised: start the script"):
        ng.Distributed([])
    shared = Group()
    shared._pg = object()
    with pytest.raises(DataError, match="a process group cannot be pickled"):
        shared.__reduce__()
    assert pickle.loads(pickle.dumps(Group())).size == 1  # this process alone


def test_a_process_outside_of_the_group(pool):
    first, second = pool.start(tasks.not_a_member, 2)
    assert first == 1
    assert "DataError: expected a process group that this process belongs to" in second


def test_one_module_knows_torch_distributed():
    package = Path(ng.__file__).parent
    for path in package.rglob("*.py"):
        if path.name != "collectives.py":
            for node in ast.walk(ast.parse(path.read_text())):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                found = [
                    n for n in names if n.startswith(("torch.distributed", "torch.nn.parallel"))
                ]
                assert not found, f"{path}: {found}"
