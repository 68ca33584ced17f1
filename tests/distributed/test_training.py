"""Optimizers under DistributedDataParallel make the steps of one process on the joint batch."""

import re

import pytest
import torch

from distributed import training
from distributed.workers import Raised

from cases import close

pytestmark = pytest.mark.usefixtures("float64")


KINDS = ("exact", "empirical")


def equal(found):
    """The same bits on all ranks."""
    assert all(torch.equal(other, found[0]) for other in found[1:])


@pytest.mark.parametrize(
    ("name", "size", "estimator"),
    [(name, 2, kind) for name in sorted(training.REPRESENTATIONS) for kind in KINDS]
    + [("ekfac", 3, "exact")],
)
def test_steps_are_those_of_the_joint_batch(pool, name, size, estimator):
    steps = 4 if name == "implicit" else 9
    found = pool.run(training.looped, size, name, steps, {"estimator": estimator})
    equal([own[0][0] for own in found])
    for (shared, F, skipped), (alone, G, _) in found:
        assert skipped == 0
        close(shared, alone, 1e-6)
        close(F, G, 1e-8)


@pytest.mark.parametrize("options", [{"lr": None, "damping": 0.1}, {"damping": "follows"}])
def test_quadratic_models_are_those_of_the_joint_batch(pool, options):
    found = pool.run(training.looped, 2, "kfac", 6, {"estimator": "exact", **options})
    equal([own[0][0] for own in found])
    for (shared, *_), (alone, *_) in found:
        close(shared, alone, 1e-6)


@pytest.mark.parametrize("kind", ["sum", "mse", "huber"])
def test_the_scale_of_the_joint_loss(pool, kind):
    found = pool.run(training.scaled, 2, kind)
    equal([shared for shared, _ in found])
    close(*found[0], 1e-6)  # also of a sum, which the wrapper averages: the scale does not matter


def test_gradients_accumulate_without_an_exchange(pool):
    found = pool.run(training.accumulated, 2)
    equal([shared for shared, _ in found])
    close(*found[0], 1e-6)


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("name", ["kfac", "ekfac"])
def test_drawn_labels_and_shared_decompositions(pool, name, second):
    """In float32, with labels that each process draws for its own examples."""
    found = pool.run(training.drawn, 2, name, second)
    equal([own[0] for own in found])
    for _, before, after, sends in found:
        assert after < 0.7 * before
        assert sends >= 2 * 20  # from each process, on every step of the warm-up


@pytest.mark.parametrize("sizes", [(3, 1), (1, 2), (2, 2)])
def test_a_run_goes_on_with_another_number_of_processes(pool, sizes):
    first, second = sizes
    for steps in (2, 7):  # within the warm-up, and behind it
        begun = pool.run(training.begun, first, steps)
        found = pool.run(training.resumed, second, begun[0][0], steps)
        equal(found)
        if first == second:
            assert torch.equal(found[0], begun[0][1])
        close(found[0], begun[0][1], 1e-6)


def test_a_preconditioner_of_replicas(pool):
    found = pool.run(training.preconditioned, 2)
    equal([own[0] for own in found])
    for _, losses in found:
        assert losses[-1] < 0.5 * losses[0]


def test_compiled_modules_inside_of_the_wrapper(pool):
    found = pool.run(training.compiled, 2)
    equal([own[0] for own in found])
    assert not torch.equal(found[0][0], training.weights(training.net(torch.float32)))


def test_a_gradient_that_is_not_finite_on_one_rank_moves_nobody(pool):
    for moved, skipped in pool.run(training.wrong, 2, "not finite"):
        assert moved == [True, False, True]
        assert skipped == 1


@pytest.mark.parametrize(
    ("what", "match"),
    [
        ("inside", "DataError: .*make the optimizer with the wrapper"),
        ("kernel", "DataError: .*take 'implicit'"),
        ("compiled", r"DataError: .*DistributedDataParallel\(torch.compile\(model\)\)"),
        ("representation", "DataError: .*same representation.*rank 1 of 2"),
        ("seed", "DataError: .*same seed"),
        ("parameters", "DataError: .*same parameters"),
    ],
)
def test_what_is_refused(pool, what, match):
    for found in pool.start(training.wrong, 2, what):
        assert isinstance(found, Raised)
        assert re.match(match, found)
        assert found.seconds < 30


def test_a_rank_without_a_forward_pass(pool):
    first, second = pool.start(training.wrong, 2, "no pass")
    assert "rank 1 of 2: DataError: expected a forward pass" in first
    assert second.startswith("DataError: expected a forward pass")
