"""Several processes have the matrix that one process has, whatever their shares."""

import hashlib

import pytest
import torch

import nngeo_lazy as ng
from distributed import tasks, training
from distributed.workers import Raised
from nngeo_lazy.collectives import owners, seed_of

from cases import close

pytestmark = pytest.mark.usefixtures("float64")

REPRESENTATIONS = [
    "dense", "block_diagonal", "diagonal", "quasi_diagonal", "kfac", "ekfac", "low_rank", "implicit"
]  # fmt: skip


def bits(tensor):
    return hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest()


def same_bits(found):
    """The same tensors on every rank."""
    each = [[bits(t) for t in tensors] for _, _, tensors in found]
    assert all(other == each[0] for other in each)


@pytest.mark.parametrize("representation", REPRESENTATIONS)
@pytest.mark.parametrize("estimator", ["exact", "empirical"])
@pytest.mark.parametrize("size", [2, 3])
def test_exact_sums_are_equal_to_the_last_bit(pool, representation, estimator, size):
    found = pool.run(tasks.fisher, size, "exact", representation, estimator)
    expected, known, _ = tasks.alone("exact", representation, estimator)
    for matrix, facts, _ in found:
        if representation in ("ekfac", "kfac", "low_rank", "implicit"):  # divided before the sum
            close(matrix, expected, 1e-12)
        else:
            assert torch.equal(matrix, expected)
        assert facts == known
    same_bits(found)


@pytest.mark.parametrize("representation", REPRESENTATIONS)
@pytest.mark.parametrize("estimator", ["exact", "mc", "empirical"])
def test_a_convolutional_network(pool, representation, estimator):
    options = {"seed": 3, "samples": 2} if estimator == "mc" else {}
    found = pool.run(tasks.fisher, 2, "smooth", representation, estimator, options)
    expected, known, _ = tasks.alone("smooth", representation, estimator, options)
    for matrix, facts, _ in found:
        close(matrix, expected, 1e-12)
        assert facts[:2] == known[:2]
        assert facts[2] == pytest.approx(known[2], rel=1e-13)
        assert facts[3:] == known[3:]
    same_bits(found)


@pytest.mark.parametrize("wide", ["split", "low_rank"])
@pytest.mark.parametrize("sharded", [False, True])
def test_wide_factors(pool, wide, sharded):
    inner = ng.representations.EKFAC(max_factor=3, wide=wide)
    made = ng.representations.Sharded(inner) if sharded else inner
    found = pool.run(tasks.fisher, 2, "smooth", made, "exact")
    expected, _, _ = tasks.alone("smooth", inner, "exact")
    for matrix, _, _ in found:
        close(matrix, expected, 1e-9)
    assert torch.equal(found[0][0], found[1][0])


def test_a_centered_matrix(pool):
    for representation in ("ekfac", "diagonal", "dense", "low_rank"):
        options = {"center": True}
        found = pool.run(tasks.fisher, 2, "smooth", representation, "empirical", options)
        expected, _, _ = tasks.alone("smooth", representation, "empirical", options)
        for matrix, _, _ in found:
            close(matrix, expected, 1e-11)


@pytest.mark.parametrize("counts", [(7, 3), (2, 0), (0, 1), (3, 0, 1)])
@pytest.mark.parametrize("representation", ["ekfac", "low_rank", "implicit"])
def test_uneven_and_empty_shares(pool, counts, representation):
    for matrix, expected, facts, known in pool.run(
        tasks.shared, len(counts), counts, representation
    ):
        close(matrix, expected, 1e-12)
        assert facts[:2] == known[:2]
        assert facts[2] == pytest.approx(known[2], rel=1e-13)


def test_more_ranks_than_batches(pool):
    found = pool.run(tasks.shared, 4, (1, 0, 1, 0), "kfac")
    for matrix, expected, _, _ in found:
        close(matrix, expected, 1e-12)


@pytest.mark.parametrize(
    "which",
    [
        "loader",
        "items are batches",
        "sampler",
        "sampler, dropping",
        "accelerate",
        "stream",
        "own re-iterable",
    ],
)
def test_every_kind_of_loader(pool, which):
    for matrix, expected, count in pool.run(tasks.loaders, 2, which):
        assert count == 16
        close(matrix, expected, 1e-12)


@pytest.mark.parametrize("builder", ["fisher", "mc", "ggn", "hessian"])
@pytest.mark.parametrize("cache", [True, False])
def test_matrix_free(pool, builder, cache):
    found = pool.run(tasks.implicit, 3, builder, cache)
    for each in found:
        for name, expected in each["alone"].items():
            close(each["shared"][name], expected, 1e-8 if name == "solution" else 1e-11)
        for name, value in each["shared"].items():
            assert bits(value) == bits(found[0]["shared"][name]), name


def test_distributed_data_parallel(pool):
    for matrix, expected, names in pool.run(tasks.ddp, 2, False):
        close(matrix, expected, 1e-12)
        assert names[0] == "0.weight"
    for each in pool.start(tasks.ddp, 2, True):
        assert isinstance(each, Raised)
        assert (
            "DataError: the model is in DistributedDataParallel, but the data are a plain" in each
        )
        assert "model.module for this rank's data alone" in each


def test_influences_of_shares(pool):
    for scores in pool.run(tasks.influence, 2):
        for shared, expected in scores.values():
            close(shared, expected, 1e-10)


def test_the_plan_counts_what_is_exchanged(pool):
    for text, size, processes, sent, _, alone in pool.run(tasks.plans, 2):
        assert processes == 2
        assert size == alone
        assert "2 processes, each with its share of the examples and all of the bytes" in text
        assert f"exchange {sent:,} bytes" in text
    plan = ng.plan(ng.FIM, tasks.exact_net(), tasks.exact_data(), "ekfac", likelihood="gaussian")
    assert (plan.processes, plan.bytes_sent) == (1, 0)


@pytest.mark.parametrize(
    ("representation", "exchanges", "sums", "sends", "numbers"),
    [
        # a sum of all numbers; Kronecker factors 16 + 16 + 4 + 25, and 2 counts of positions
        ("diagonal", 7, 1, 0, 26),
        ("quasi_diagonal", 7, 1, 0, 26 + 12 + 8),
        ("block_diagonal", 7, 1, 0, 16**2 + 10**2),
        ("dense", 7, 1, 0, 26 * 26),
        ("kfac", 7, 2, 0, 16 + 16 + 4 + 25 + 2),
        ("ekfac", 12, 3, 2, 16 + 16 + 4 + 25 + 2 + 16 + 16 + 4 + 25 + 26),
        ("low_rank", 10, 0, 2, 26 * 2 * sum(tasks.SIZES)),  # each process's rows
        ("implicit", 6, 0, 0, 0),
    ],
)
def test_what_a_build_exchanges(pool, representation, exchanges, sums, sends, numbers):
    """Exchanges are of a few integers: what the processes agree on before and after a pass."""
    for after, later in pool.run(tasks.traffic, 2, representation):
        counts = {"exchanges": exchanges, "sums": sums, "sends": sends, "bytes": 8 * numbers}
        assert after == counts
        assert after == later  # nothing in repr, report and solves


def test_what_products_exchange(pool):
    """Each product is one sum of its result, and one exchange that says whether all went well."""
    for found, size in pool.run(tasks.product_traffic, 2):
        for name, calls in found.items():
            made = {"facts": 0, "product": 1, "three": 1}
            if name != "hessian":  # a solve by conjugate gradients looks at the residual once more
                made["solve"] = calls["solve"][1] + 1
            for call, products in made.items():
                columns = 3 if call == "three" else 1
                assert calls[call][0] == {
                    "exchanges": products,
                    "sums": products,
                    "sends": 0,
                    "bytes": 8 * size * columns * products,
                }, (name, call)
            exchanged, _ = calls["eigsh"]
            assert exchanged["sums"] == exchanged["exchanges"] <= size
            assert exchanged["bytes"] == 8 * size * exchanged["sums"]


def test_what_a_step_exchanges(pool):
    """A plain step exchanges nothing beside the gradient, which is the wrapper's."""
    sides = (5, 6, 7, 3)  # of two layers
    factors = sum(n**2 for n in sides)
    numbers = factors + (factors + sum(sides)) + 51 + 18  # eigenvectors, a gradient, scalars
    refresh = {"exchanges": 6, "sums": 5, "sends": 2, "bytes": 8 * numbers}
    for counts in pool.run(training.step_traffic, 2):  # two steps of warm-up, then each fourth
        assert [any(count.values()) for count in counts] == [k in (0, 1, 4, 8) for k in range(12)]
        assert all(count == refresh for count in counts if any(count.values()))


def test_owners_are_balanced():
    torch.manual_seed(0)
    for size in (8, 64):
        costs = (torch.rand(4 * size) ** 3).tolist()
        loads = [0.0] * size
        for cost, owner in zip(costs, owners(costs, size), strict=True):
            loads[owner] += cost
        least = max(sum(costs) / size, max(costs))
        assert max(loads) <= (4 / 3 - 1 / (3 * size)) * least
    assert owners([1.0] * 8, 4) == [0, 1, 2, 3, 0, 1, 2, 3]
    assert len({seed_of(3, k) for k in range(100)}) == 100
