"""Low rank, quasi-diagonal, mixtures, centering, fresh diagonals, dense Jacobians: the oracle."""

import pytest
import torch
from torch import nn

import nngeo_lazy as ng
from nngeo_lazy.errors import (
    DataError,
    SpaceMismatchError,
    TooLargeError,
    UnsupportedLayerError,
)
from nngeo_lazy.likelihoods import Categorical
from nngeo_lazy.operators import QuasiDiagonalLinearOperator
from nngeo_lazy.representations import EKFAC, KFAC, LowRank, Mixed

import oracle
import zoo
from cases import Case, close

pytestmark = [
    pytest.mark.usefixtures("float64"),
    # torch's own, on padding="same" with an even kernel
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
]

NETS = ["mlp", "convolutions", "norms", "gpt", "tied", "raw", "shared_bias"]


def case_of(name, estimator="exact"):
    return Case(getattr(zoo, name)(), "categorical", estimator)


def blockwise(F, exact):
    """Every block of an operator with the exact block in its coordinates."""
    for block, layout in zip(F.members, F.layouts, strict=True):
        where = layout.positions()
        yield block, layout, exact[where][:, where]


@pytest.mark.parametrize("estimator", ["exact", "empirical"])
@pytest.mark.parametrize("name", NETS)
def test_low_rank(name, estimator):
    case = case_of(name, estimator)
    exact = case.expected()
    F = case.build("low_rank")
    close(F.to_dense(), exact)
    close(F.solve(torch.ones(len(exact)), damping=0.1), _solved(exact, 0.1), 1e-8)
    values, vectors = torch.linalg.eigh(exact)
    top = vectors[:, -2:] * values[-2:] @ vectors[:, -2:].mT
    assert values[-3] < 0.999 * values[-2]  # else there is no best approximation
    close(case.build(LowRank(rank=2)).to_dense(), top, 1e-7)


def _solved(matrix, d):
    return torch.linalg.solve(matrix + d * torch.eye(len(matrix)), torch.ones(len(matrix)))


@pytest.mark.parametrize("estimator", ["exact", "empirical"])
@pytest.mark.parametrize("name", NETS)
def test_quasi_diagonal(name, estimator):
    """The diagonal, the bias row of each output, positive semidefinite; the rest by its formula."""
    case = case_of(name, estimator)
    exact, F = case.expected(), case.build("quasi_diagonal")
    close(F.diagonal(), exact.diagonal())
    arrows = 0
    for block, layout, own in blockwise(F, exact):
        dense = block.to_dense()
        assert torch.linalg.eigvalsh(dense).min() >= -1e-12 * dense.norm()
        if not isinstance(block, QuasiDiagonalLinearOperator):
            close(dense, own.diagonal().diag())
            continue
        width = layout.width
        for k in range(0, len(own), width):
            rows = own[k : k + width, k : k + width]
            f = rows[:, -1]
            if f[-1] < 1e-20:  # no gradient but rounding: a key's bias in attention
                continue
            arrows += 1
            expected = torch.diag(rows.diagonal() - f.square() / f[-1]) + torch.outer(f, f) / f[-1]
            close(dense[k : k + width, k : k + width], expected)
    assert arrows or name in ("tied", "raw", "shared_bias")


def test_quasi_diagonal_of_dead_outputs_and_of_one_example():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    model[0].bias.data[:2] = -100
    F = ng.FIM(model, torch.randn(5, 3), "quasi_diagonal", likelihood="gaussian")
    assert F.to_dense().isfinite().all()
    assert F.solve(F.space.randn(), damping=1e-3).isfinite().all()
    # rank one in each row, so that nothing is left on the diagonal: rounding must not be
    one = ng.FIM(nn.Linear(3, 1), torch.randn(1, 3), "quasi_diagonal", likelihood="gaussian")
    assert (one.members[0].diag == 0).all()
    exact = ng.FIM(nn.Linear(3, 1), torch.randn(1, 3), "dense", likelihood="gaussian")
    v = one.space.randn()
    A = one.to_dense() + 1e-9 * torch.eye(4)
    close(one.solve(v, damping=1e-9), torch.linalg.solve(A, v), 1e-5)
    assert exact.shape == one.shape


@pytest.mark.parametrize("estimator", ["exact", "empirical"])
@pytest.mark.parametrize("name", ["mlp", "convolutions", "norms", "raw"])
def test_mixed(name, estimator):
    case = case_of(name, estimator)
    exact = case.expected()
    first, last = (case.build("block_diagonal").names[k] for k in (0, -1))
    F = case.build(Mixed("ekfac", {first: "dense", last: "low_rank"}))
    alone = case.build("ekfac")
    for block, layout, own in blockwise(F, exact):
        names = [n for n in F.space.names if F.space.slices[n].start == layout.pieces[0].start]
        owner = F.space.owner(names[0])
        if owner in (first, last):
            close(block.to_dense(), own)
        else:
            close(F.block(names[0]).to_dense(), alone.block(names[0]).to_dense())
    assert F.num_examples == len(case.labels)
    kinds = {row.layer: row.block for row in F.report()}
    assert kinds[first].startswith("dense")
    assert kinds[last].startswith("rank")


def test_mixed_groups_make_joint_blocks():
    case = case_of("mlp")
    exact = case.expected()
    F = case.build(Mixed("diagonal", {nn.Linear: "dense"}))
    close(F.to_dense(), exact)
    nested = case.build(Mixed(Mixed("kfac", {"0": "diagonal"}), {"2": KFAC("reduce")}))
    assert [b._kind().split()[0] for b in nested.members] == ["diagonal", "Kronecker"]


def test_mixed_refusals():
    case = case_of("mlp")
    for mixed, words in (
        (Mixed(None, {"0": "kfac"}), "leaves ['2.weight', '2.bias'] without a representation"),
        (Mixed("kfac", {"0": "dense", "0.bias": "dense"}), "which another one has already"),
        (Mixed("kfac", {"0.bias": "dense"}), "have one block"),
        (Mixed("kfac", {"fc": "dense"}), "matches no parameter"),
    ):
        with pytest.raises(SpaceMismatchError) as caught:
            case.build(mixed)
        assert words in str(caught.value)
    with pytest.raises(DataError, match="unknown representation 'nothing'"):
        case.build(Mixed("kfac", {"0": "nothing"}))


@pytest.mark.parametrize("name", ["mlp", "convolutions", "norms", "gpt", "raw"])
def test_centered(name):
    """The covariance of gradients, in whatever form."""
    case = case_of(name, "empirical")
    G = case.gradients()
    exact = (G - G.mean(0)).mT @ (G - G.mean(0)) / len(G)
    close(case.build("dense", center=True).to_dense(), exact)
    close(case.build("low_rank", center=True).to_dense(), exact)
    close(case.build("diagonal", center=True).diagonal(), exact.diagonal(), 1e-9)
    close(case.build("quasi_diagonal", center=True).diagonal(), exact.diagonal(), 1e-9)
    for representation in ("block_diagonal", "ekfac"):
        for block, _, own in blockwise(case.build(representation, center=True), exact):
            if hasattr(block, "bases"):
                Q = block.unrotate(torch.eye(len(own)))
                close(block.eigenvalues, (Q.mT @ own @ Q).diagonal(), 1e-9)
            elif representation == "block_diagonal":
                close(block.to_dense(), own)
            else:
                close(block.diagonal(), own.diagonal(), 1e-9)


def test_centering_refusals():
    case = case_of("mlp", "empirical")
    with pytest.raises(DataError, match="KFAC has no centered form"):
        case.build("kfac", center=True)
    case.estimator = "exact"
    with pytest.raises(DataError, match="which an 'exact' Fisher does not have"):
        case.build("dense", center=True)


@pytest.mark.parametrize("name", ["mlp", "convolutions", "norms"])
def test_fresh_diagonals_in_an_old_basis(name):
    case = case_of(name)
    exact, K = case.expected(), case.build("kfac")
    fresh = case.build(EKFAC(basis=K))
    close(fresh.to_dense(), case.build("ekfac").to_dense())
    other = case_of(name)
    updated = ng.update_diag(
        fresh,
        case.net.model,
        other.net.batch,
        likelihood=case.object,
        target=lambda b: case.labels,
    )
    average = fresh.lerp(updated, 0.25)
    assert [type(b) for b in average.members] == [type(b) for b in fresh.members]
    close(average.to_dense(), 0.75 * fresh.to_dense() + 0.25 * updated.to_dense())
    for block, _, own in blockwise(fresh, exact):
        if hasattr(block, "bases"):
            close(block.trace(), own.trace())


def test_fresh_diagonals_follow_a_mixture_and_the_dtype():
    case = case_of("mlp")
    mixed = case.build(Mixed("ekfac", {"2": "diagonal"}))
    fresh = case.build(EKFAC(basis=mixed.to(torch.float32)))
    assert [type(b) for b in fresh.members] == [type(b) for b in mixed.members]
    assert fresh.dtype == torch.float64
    close(fresh.to_dense(), mixed.to_dense(), 1e-5)


def test_fresh_diagonals_of_a_gauss_newton_matrix():
    model, x, y = nn.Linear(4, 3), torch.randn(6, 4), torch.randint(3, (6,))
    loss = Categorical(weight=[1.0, 2.0, 3.0])
    E = ng.GGN(model, (x, y), "ekfac", loss=loss)
    close(ng.update_diag(E, model, (x, y), loss=loss).to_dense(), E.to_dense())
    with pytest.raises(DataError, match="pass its loss="):
        ng.update_diag(E, model, (x, y))


def test_low_rank_of_parameters_that_are_not_used():
    case = case_of("raw")
    F = case.build(Mixed("diagonal", {"unused": "low_rank"}))
    assert (F.block("unused").to_dense() == 0).all()
    assert F.solve(F.space.zeros() + 1, damping=0.5)[F.space.slices["unused"]].unique() == 2


def test_orders_of_a_loaders_own_generator_repeat(monkeypatch):
    monkeypatch.setattr("nngeo_lazy.kept.KEPT_BYTES", 0)
    case = case_of("mlp")
    data = torch.utils.data.TensorDataset(case.net.batch, case.labels)
    traces = []
    for representation in ("ekfac", "diagonal"):
        order = torch.Generator().manual_seed(0)
        loader = torch.utils.data.DataLoader(data, batch_size=2, shuffle=True, generator=order)
        F = ng.FIM(case.net.model, loader, representation, estimator="mc", seed=5)
        traces.append(F.trace())
    close(*traces)  # two passes see the draws of one


def test_fresh_diagonal_refusals():
    E = case_of("mlp").build("ekfac")
    case = case_of("conv1d")
    with pytest.raises(SpaceMismatchError, match="build both with the same params="):
        case.build(EKFAC(basis=E))
    with pytest.raises(DataError, match="to be a KFAC or an EKFAC Fisher, got Diagonal"):
        EKFAC(basis=case.build("diagonal"))


@pytest.mark.parametrize("name", [*NETS, "conv1d", "recurrent", "mapping", "matmul"])
def test_dense_jacobian(name):
    case = case_of(name)
    net = case.net
    J = oracle.jacobian(net.model, net.call, net.examples)
    mine = ng.Jacobian(net.model, net.batch, forward=net.forward)
    close(mine.to_dense(), J.flatten(0, 1))
    centered = ng.Jacobian(net.model, net.batch, forward=net.forward, center=True)
    close(centered.to_dense(), (J - J.mean(0)).flatten(0, 1))
    v, u = torch.randn(J.shape[-1]), torch.randn(mine.shape[0])
    close(mine @ mine.space.unravel(v), J.flatten(0, 1) @ v)
    close(mine.mT @ u, J.flatten(0, 1).mT @ u)
    first = mine.space.names[0]
    close(mine.block(first).to_dense(), J.flatten(0, 1)[:, mine.space.slices[first]])
    gradients = ng.Jacobian(
        net.model,
        net.batch,
        loss=case.object,
        target=lambda b: case.labels,
        forward=net.forward,
    )
    close(gradients.to_dense(), case.gradients())
    prior = ng.identity(mine.space, 2.0)
    close((mine @ prior @ mine.mT).to_dense(), 2 * J.flatten(0, 1) @ J.flatten(0, 1).mT)


def test_jacobian_refusals():
    model, x = nn.Linear(3, 2), torch.randn(6, 3)
    data = torch.utils.data.TensorDataset(x)
    with pytest.raises(DataError, match="pass shuffle=False"):
        ng.Jacobian(model, torch.utils.data.DataLoader(data, shuffle=True))
    with pytest.raises(DataError, match="one of 'implicit', 'factored', 'dense', got 'kfac'"):
        ng.Jacobian(model, x, "kfac")
    with pytest.raises(TooLargeError, match=r"max_directions=1: pass loss="):
        ng.Jacobian(model, x, "dense", max_directions=1)
    square = ng.Jacobian(nn.Linear(3, 2), torch.randn(4, 3))
    assert square.shape == (8, 8)
    with pytest.raises(UnsupportedLayerError, match="a Jacobian is none"):
        square.solve(torch.ones(8))
    assert (square @ square.mT).space is None
    with pytest.raises(RuntimeError, match="inverse needs a square operator"):
        ng.Jacobian(model, x).inverse()
    ordered = torch.utils.data.DataLoader(data, batch_size=4)
    close(ng.Jacobian(model, ordered).to_dense(), ng.Jacobian(model, x).to_dense())


def test_rows_past_the_limit(monkeypatch):
    monkeypatch.setattr("nngeo_lazy.statistics.MAX_BLOCK_BYTES", 1000)
    with pytest.raises(TooLargeError, match="estimator='mc' or 'empirical'"):
        case_of("mlp").build("low_rank")


def test_bad_rank():
    for rank in (0, 1.5):
        with pytest.raises(DataError, match="expected rank to be a positive integer"):
            LowRank(rank=rank)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pinv_of_an_ekfac_of_few_examples(dtype):
    """Free eigenvalues of zero are squares of what a computed eigenvector is off by."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)
    data = torch.randn(3, 3, dtype=dtype), torch.randint(2, (3,))
    F = ng.FIM(model, data, "ekfac", likelihood="categorical", estimator="empirical")
    wide = ng.FIM(
        model.double(),
        (data[0].double(), data[1]),
        "ekfac",
        likelihood="categorical",
        estimator="empirical",
    )
    want = torch.linalg.pinv(wide.to_dense(), hermitian=True, rtol=1e-14)
    close(F.pinv().norm().double(), want.norm(), 1e-3 if dtype == torch.float32 else 1e-6)
    assert float(F.logdet()) == float("-inf")
