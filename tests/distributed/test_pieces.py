"""Models in pieces (`fully_shard`): builds and solves are those of the whole model."""

import pytest
import torch

from distributed import tasks, training
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
    ],
)
def test_what_is_refused(pool, what, message):
    for each in pool.start(tasks.fully_sharded_wrongly, 2, what):
        assert isinstance(each, Raised)
        assert message in each


@pytest.mark.parametrize("estimator", ["exact", "empirical"])
@pytest.mark.parametrize("name", ["kfac", "ekfac", "diagonal", "implicit"])
def test_optimizers_make_the_steps_of_one_process(pool, name, estimator):
    found = pool.run(training.sharded, 2, name, 5, {"estimator": estimator})
    assert all(torch.equal(shared, found[0][0]) for shared, _ in found)
    start = training.weights(training.net())
    for shared, alone in found:
        close(shared, alone, 1e-10 if name == "implicit" else 1e-12)  # which iterates to 1e-12
        assert (shared - start).norm() > 0.01 * start.norm()


@pytest.mark.parametrize("kind", ["tensors", "module", "accumulated", "resumed", "preconditioner"])
def test_ways_to_train_a_model_in_pieces(pool, kind):
    for shared, alone in pool.run(training.sharded, 3, "kfac", 6, {"estimator": "exact"}, kind):
        close(shared, alone, 1e-12)
