"""Pooling statistics is one pass over all of the data; averages of matrices."""

import pytest
import torch
from torch import nn

import nngeo_lazy as ng
from nngeo_lazy.errors import DataError, SpaceMismatchError
from nngeo_lazy.operators import (
    BlockDiagonalLinearOperator,
    DenseLinearOperator,
    DiagonalLinearOperator,
    KroneckerLinearOperator,
    LowRankLinearOperator,
    SumLinearOperator,
)
from nngeo_lazy.representations import KFAC, LowRank, Mixed

pytestmark = pytest.mark.usefixtures("float64")

SHARDS = (slice(0, 4), slice(4, 5), slice(5, 11))


@pytest.fixture
def data():
    model = nn.Sequential(
        nn.Conv2d(1, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3), nn.LayerNorm(3)
    )
    return model, torch.randn(11, 1, 3, 3), torch.randint(3, (11,))


EVERY = [
    "dense",
    "block_diagonal",
    "diagonal",
    "quasi_diagonal",
    "kfac",
    KFAC("reduce"),
    "low_rank",
    Mixed("kfac", {"0": "dense", "4": "low_rank"}),
]


@pytest.mark.parametrize("representation", EVERY, ids=str)
@pytest.mark.parametrize("estimator", ["exact", "empirical"])
def test_merged_shards_are_one_pass(data, representation, estimator):
    model, x, y = data
    shards = [ng.FIM(model, (x[s], y[s]), representation, estimator=estimator) for s in SHARDS]
    whole = ng.FIM(model, (x, y), representation, estimator=estimator)
    merged = ng.merge(shards)
    torch.testing.assert_close(merged.to_dense(), whole.to_dense(), rtol=1e-10, atol=1e-14)
    assert type(merged) is type(whole)
    assert (merged.num_examples, merged.num_terms, merged.space) == (11, 11, whole.space)
    again = ng.merge([ng.merge(shards[:2]), shards[2]])  # in any order of merging
    torch.testing.assert_close(again.to_dense(), whole.to_dense(), rtol=1e-10, atol=1e-14)


def test_unequal_lengths_pool_by_positions(data):
    """The right factor is a mean over positions, not over examples."""
    model = nn.Linear(3, 2)
    short, long = torch.randn(4, 2, 3), torch.randn(3, 7, 3)
    lik = ng.likelihoods.Gaussian()
    merged = ng.merge([ng.FIM(model, t, "kfac", likelihood=lik) for t in (short, long)])
    whole = ng.FIM(model, [(short,), (long,)], "kfac", likelihood=lik)
    torch.testing.assert_close(merged.to_dense(), whole.to_dense())


def test_explicit_weights(data):
    model, x, y = data
    shards = [ng.FIM(model, (x[s], y[s]), "kfac") for s in SHARDS[::2]]
    weighted = ng.merge(shards, weights=[1.0, 3.0])
    for mine, a, b in zip(weighted.members[:2], *(s.members for s in shards), strict=False):
        torch.testing.assert_close(mine.left, 0.25 * a.left + 0.75 * b.left)
        torch.testing.assert_close(mine.right, 0.25 * a.right + 0.75 * b.right)


def test_shared_bases_pool(data):
    model, x, y = data
    first = ng.FIM(model, (x[:4], y[:4]), "ekfac")
    fresh = ng.update_diag(first, model, (x[4:], y[4:]))
    merged = ng.merge([first, fresh])
    torch.testing.assert_close(
        merged.to_dense(), (4 * first.to_dense() + 7 * fresh.to_dense()) / 11
    )


def test_refusals(data):
    model, x, y = data
    E = ng.FIM(model, (x[:5], y[:5]), "ekfac")
    D = ng.FIM(model, (x, y), "diagonal")
    K = ng.FIM(model, (x, y), "kfac")
    mc = [ng.FIM(model, (x, y), "diagonal", estimator="mc", seed=seed) for seed in (1, 2)]
    centered = {"estimator": "empirical", "center": True}
    altered = "damped, inverted, scaled or added"
    cases = [
        ([E, ng.FIM(model, (x[5:], y[5:]), "ekfac")], DataError, "only in a common basis"),
        (
            [D, ng.FIM(nn.Linear(3, 2), x[:, 0, 0], "diagonal", likelihood="gaussian")],
            SpaceMismatchError,
            "over the same parameters",
        ),
        (mc, DataError, "differ in seed: 1 and 2"),
        ([D, ng.FIM(model, (x, y), "diagonal", estimator="empirical")], DataError, "estimator"),
        ([D, K], DataError, "differ in representation"),
        ([K, ng.FIM(model, (x, y), KFAC("reduce"))], DataError, "differ in representation"),
        ([], DataError, "at least one operator"),
        ([1, K], DataError, r"expected operators that FIM or GGN returned, got \['int'\]"),
        ([ng.FIM(model, (x, y), "dense", **centered)] * 2, DataError, "not linear in the data"),
        ([ng.FIM(model, (x, y), LowRank(4))] * 2, DataError, "not linear in the data"),
        ([D, D.to(torch.float32)], DataError, "one dtype and device"),
        ([ng.identity(D.space)] * 2, DataError, "come from no build"),
    ]
    for change in (
        lambda F: F.damped(0.1),
        lambda F: F.inverse(damping=0.1),
        lambda F: 2 * F,
        lambda F: F / 2,
        lambda F: -F,
        lambda F: F + F,
        lambda F: F.lerp(F, 0.5),
        lambda F: F.add_diagonal(0.1),
        lambda F: F.power(2),
    ):
        cases += [([K, change(K)], DataError, altered), ([change(D)] * 2, DataError, altered)]
    for ops, error, words in cases:
        with pytest.raises(error, match=words):
            ng.merge(ops)
    for weights in ([1.0], [-1.0, 2.0], [0.0, 0.0], [float("nan"), 1.0]):
        with pytest.raises(DataError, match="nonnegative weights"):
            ng.merge([D, D], weights=weights)
    weighted = ng.merge([K, K], weights=[1, 2])
    with pytest.raises(DataError, match="do not know over how many positions"):
        ng.merge([weighted, weighted])


def cosh(outputs, target):
    return (outputs - target).cosh().log().sum(1)


@pytest.mark.parametrize("rank", [None, 4])
def test_a_file_says_whether_its_matrix_was_truncated(data, rank):
    """Files of earlier releases say so in words alone."""
    model, x, y = data
    state = ng.FIM(model, (x, y), Mixed("kfac", {"4": LowRank(rank)})).state_dict()
    old = {**state, "operator": {**state["operator"], "info": dict(state["operator"]["info"])}}
    assert old["operator"]["info"].pop("truncated") is (rank is not None)
    old.pop("checksum", None)
    for each in (state, old):
        pair = [ng.load(each), ng.load(each)]
        if rank is None:
            assert ng.merge(pair).num_examples == 22
            continue
        with pytest.raises(DataError, match="not linear in the data"):
            ng.merge(pair)


def test_callables_are_the_same_by_name(data):
    model, x, _ = data
    halves = [ng.GGN(model, (x[s], x[s, 0, 0]), "diagonal", loss=cosh) for s in SHARDS]
    assert "test_merge.cosh" in halves[0].info.quantity["loss"]
    merged = ng.merge([ng.load(half.state_dict()) for half in halves])
    whole = ng.GGN(model, (x, x[:, 0, 0]), "diagonal", loss=cosh)
    torch.testing.assert_close(merged.to_dense(), whole.to_dense())
    other = ng.GGN(model, (x, x[:, 0, 0]), "diagonal", loss=lambda f, y: cosh(f, y))
    with pytest.raises(DataError, match="differ in loss"):
        ng.merge([whole, other])
    means = [ng.GGN(model, (x, x[:, 0, 0]), "diagonal", loss=nn.MSELoss())] * 2
    with pytest.raises(DataError, match="pass weights="):
        ng.merge(means)


def test_equal_seeds_merge(data):
    model, x, y = data
    halves = [
        ng.FIM(model, (x[s], y[s]), "kfac", estimator="mc", seed=3, samples=2) for s in SHARDS
    ]
    assert ng.merge(halves).num_examples == 11


@pytest.mark.parametrize(
    ("representation", "kind"),
    [
        ("dense", DenseLinearOperator),
        ("diagonal", DiagonalLinearOperator),
        ("block_diagonal", BlockDiagonalLinearOperator),
        ("low_rank", LowRankLinearOperator),
    ],
)
def test_lerp_is_the_average_of_matrices(data, representation, kind):
    model, x, y = data
    F, G = (ng.FIM(model, (x[s], y[s]), representation) for s in (slice(0, 4), slice(4, 11)))
    average = F.lerp(G, 0.3)
    torch.testing.assert_close(average.to_dense(), 0.7 * F.to_dense() + 0.3 * G.to_dense())
    assert type(average) is kind
    w = torch.tensor(0.3, requires_grad=True)
    F.lerp(G, w).trace().backward()
    torch.testing.assert_close(w.grad, G.trace() - F.trace())


def test_lerp_of_kfac_is_not_its_merge(data):
    model, x, y = data
    F, G = (ng.FIM(model, (x[s], y[s]), "kfac") for s in (slice(0, 4), slice(4, 11)))
    average = F.lerp(G, 0.3)
    assert type(average.members[0]) is SumLinearOperator
    torch.testing.assert_close(average.to_dense(), 0.7 * F.to_dense() + 0.3 * G.to_dense())
    v = F.space.randn()
    A = average.to_dense() + torch.eye(len(v))
    torch.testing.assert_close(average.solve(v, damping=1.0), torch.linalg.solve(A, v))


def test_identity_is_a_prior(data):
    model, x, y = data
    F = ng.FIM(model, (x, y), "kfac")
    scale = torch.tensor(0.5, requires_grad=True)
    posterior = F + ng.identity(F.space, scale)
    assert type(posterior.members[0]) is KroneckerLinearOperator
    posterior.logdet().backward()
    expected = torch.linalg.inv(F.to_dense() + 0.5 * torch.eye(len(F.space))).trace()
    torch.testing.assert_close(scale.grad, expected)
