"""Models in pieces (`fully_shard`): builds and solves are those of the whole model."""

import pytest

from distributed import tasks
from distributed.workers import Raised

from cases import close

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("representation", ["kfac", "ekfac", "sharded", "dense", "implicit"])
def test_builds_are_those_of_the_whole_model(pool, size, representation):
    for matrix, alone, found, expected, same in pool.run(tasks.fully_sharded, size, representation):
        close(matrix, alone, 1e-12)
        for name, step in found.items():
            close(step, expected[name], 1e-8)
        assert same


def test_a_hessian(pool):
    for matrix, alone, *_ in pool.run(tasks.fully_sharded, 2, "dense", "Hessian"):
        close(matrix, alone, 1e-12)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("plain loader", "(fully_shard), but the data are a plain loader: pass ng.Distributed"),
        ("other group", "in pieces on the ranks [0, 1], but the data are shared by the ranks ["),
        ("optimizer", "DataError: expected whole parameters in every process, but"),
    ],
)
def test_what_is_refused(pool, what, message):
    for each in pool.start(tasks.fully_sharded_wrongly, 2, what):
        assert isinstance(each, Raised)
        assert message in each
