"""Operators whose blocks lie on several processes are those that one process has whole."""

import os

import pytest
import torch

import nngeo_lazy as ng
from distributed import tasks
from distributed.workers import Raised
from nngeo_lazy.collectives import owners
from nngeo_lazy.errors import DataError

from cases import close

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize(
    ("representation", "size"),
    [
        *(("ekfac", size) for size in (1, 2, 3, 4)),
        ("kfac", 2),
        ("kfac", 4),
        ("block_diagonal", 2),
        ("quasi_diagonal", 4),
    ],
)
def test_every_member(pool, representation, size):
    found = pool.run(tasks.sharded, size, representation)
    for each, _, facts, _, alone, draws in found:
        close(each["sharded"]["dense"], alone, 1e-12)
        for name, expected in each["whole"].items():
            close(each["sharded"][name], expected, 1e-12)
        for name, value in each["sharded"].items():
            assert torch.equal(value, found[0][0]["sharded"][name]), name
        assert torch.equal(draws, found[0][-1])
        assert facts[:3] == (23, True, 6)
    if size > 1:
        assert "Sharded" in found[0][2][3]


def test_memory_is_shared_out(pool):
    alone = pool.run(tasks.sharded, 1, "ekfac")[0][1]
    for size in (2, 3):
        found = pool.run(tasks.sharded, size, "ekfac")
        assert sum(kept for _, kept, *_ in found) == alone
        assert found[0][3] == found[1][3]
        assert set(found[0][3]) == set(range(size))


def test_draws_do_not_depend_on_the_number_of_processes(pool):
    first, second = (pool.run(tasks.sharded, size, "ekfac")[0][-1] for size in (2, 3))
    close(first, second, 1e-12)


def test_what_is_exchanged(pool):
    for counts, size in pool.run(tasks.sharded_traffic, 2):
        quiet, product, solve, inverse = counts
        assert set(quiet.values()) == {0}
        assert product == {"exchanges": 1, "sums": 1, "sends": 0, "bytes": 8 * size}
        assert solve == {"exchanges": 2, "sums": 1, "sends": 0, "bytes": 8 * size}
        assert (inverse["sums"], inverse["bytes"]) == (0, 0)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("plain loader", "DataError: Sharded shares out blocks over the processes that share the"),
        ("vector", "DistributedError: expected every process to make the same call with the same"),
        ("basis", "DataError: the eigenbasis of a sharded operator lies in pieces"),
        ("state", "its blocks lie on several processes: save it as a folder, ng.save(F, 'F/')"),
        ("member", "UnsupportedLayerError: the numbers of this block lie on rank"),
        ("other owners", "DataError: expected operators of one quantity"),
    ],
)
def test_calls_that_are_refused(pool, what, message):
    for each in pool.start(tasks.sharded_failing, 2, what):
        assert isinstance(each, Raised)
        assert message in each
    assert pool.run(tasks.usable, 2) == [23, 23]


def test_an_error_in_the_block_of_one_process(pool):
    first, second = pool.start(tasks.sharded_failing, 2, "singular")
    assert second.startswith("NotPositiveDefiniteError: block ")
    assert first.startswith("DistributedError: rank 1 of 2: NotPositiveDefiniteError: block ")
    assert pool.run(tasks.usable, 2) == [23, 23]


def test_a_product_on_one_rank_alone_gets_a_hint_in_time(pool):
    found = pool.start(tasks.sharded_failing, 2, "only rank 0", limit=5)
    assert "under `if rank == 0:` it waits for the others" in found[0]
    assert found[0].seconds < 30


def test_files_of_three_processes(pool, tmp_path):
    pytest.importorskip("safetensors", reason="the extra `folders`")
    written = pool.run(tasks.saved, 3, str(tmp_path))
    files = [name for name in os.listdir(tmp_path / "F") if name.endswith(".safetensors")]
    assert len(files) == 3
    for size in (1, 2, 4):
        for whole, lazy, count in pool.run(tasks.loaded, size, str(tmp_path / "F")):
            assert torch.equal(whole, written[0])
            assert torch.equal(lazy, written[0])
            assert count == 23
    assert torch.equal(tasks.loaded(tmp_path / "F")[0], written[0])  # without torch.distributed


def test_a_save_that_fails_on_one_process(pool, tmp_path):
    pytest.importorskip("safetensors", reason="the extra `folders`")
    found = pool.start(tasks.save_failing, 2, str(tmp_path))
    assert found[1].startswith("ZeroDivisionError")
    assert found[0].startswith("DistributedError: rank 1 of 2: ZeroDivisionError")
    with pytest.raises(DataError, match="still being written, or that was interrupted"):
        ng.load(tmp_path / "F")


@pytest.mark.parametrize("sharded", [False, True])
def test_a_build_in_a_folder_goes_on(pool, tmp_path, sharded):
    pytest.importorskip("safetensors", reason="the extra `folders`")
    for errors, passes, matrix, expected in pool.run(tasks.stored_build, 2, tmp_path, sharded):
        assert len(errors) == 1
        assert "broken" in errors[0]
        assert passes == 2  # the first batch alone, and the second pass
        close(matrix, expected, 1e-12)


def test_what_has_no_blocks_is_refused():
    Sharded = ng.representations.Sharded
    for name in ("dense", "diagonal", "low_rank", "implicit", "factored"):
        with pytest.raises(DataError, match=r"expected a representation that has blocks"):
            Sharded(name)
    with pytest.raises(DataError, match=r"put it around the whole, Sharded\(Mixed"):
        ng.representations.Mixed(Sharded("kfac")).members  # noqa: B018
    around = Sharded(ng.representations.Mixed("kfac", {"0": "dense"}))  # the remedy
    F = tasks.built("smooth", around, "exact")
    assert torch.equal(
        F.to_dense(),
        tasks.built("smooth", ng.representations.Mixed("kfac", {"0": "dense"}), "exact").to_dense(),
    )
    with pytest.raises(DataError, match="expected a representation of which running averages"):
        ng.optim.NaturalGradient(tasks.smooth_net(), Sharded("kfac"), "categorical")


def gpt2(width, layers):
    """The sides of all linear layers of a GPT-2, with bias."""
    shapes = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    return [(o, i + 1) for _ in range(layers) for o, i in shapes]


@pytest.mark.parametrize(("width", "layers"), [(768, 12), (1600, 48)])
@pytest.mark.parametrize("size", [8, 64])
def test_the_blocks_of_a_language_model_are_balanced(width, layers, size):
    for power in (2, 3):  # bytes of a block; operations of the decompositions
        sides = gpt2(width, layers)
        costs = [float(o**power + i**power) for o, i in sides]
        if power == 3:  # each factor by itself
            costs = [float(n**3) for pair in sides for n in pair]
        loads = [0.0] * size
        for cost, owner in zip(costs, owners(costs, size), strict=True):
            loads[owner] += cost
        least = max(sum(costs) / size, max(costs))
        assert max(loads) <= (4 / 3 - 1 / (3 * size)) * least
