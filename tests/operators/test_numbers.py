"""Numbers that are believed have been looked at: hard matrices, tiny damping, parts and copies."""

import copy
import multiprocessing
import pickle
import warnings

import pytest
import torch
from torch import nn

import nngeo_lazy as ng
from nngeo_lazy import linalg
from nngeo_lazy.errors import ConvergenceWarning, NonFiniteError
from nngeo_lazy.operators import (
    BlockDiagonalLinearOperator,
    DenseLinearOperator,
    DiagonalLinearOperator,
    EigenKroneckerLinearOperator,
    KroneckerLinearOperator,
    LowRankLinearOperator,
    decompose,
)

D = torch.float64


def randn(*shape, seed=0, dtype=D):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D).to(dtype)


def sparse(seed, n=96, rank=12):
    """A float32 matrix of low rank with many zero rows."""
    keep = torch.rand(n, generator=torch.Generator().manual_seed(seed)) > 0.6
    x = randn(rank, n, seed=seed, dtype=torch.float32) * keep * 1e-2
    return x.T @ x / rank


@pytest.mark.parametrize("seed", range(4))
def test_eigh_of_a_matrix_with_zero_rows(seed):
    A = sparse(seed)
    values, vectors = decompose.eigh(torch.stack([A, A + torch.eye(96)]))
    assert torch.equal(values, values.sort(-1).values)
    assert bool((values >= 0).all())
    rebuilt = (vectors * values.unsqueeze(-2)) @ vectors.mT
    torch.testing.assert_close(rebuilt[0], A, rtol=0, atol=1e-6 * float(A.abs().max()) * 96)
    torch.testing.assert_close(
        vectors.mT @ vectors, torch.eye(96).expand(2, -1, -1), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("failure", ["nan", "error", "wrong"])
def test_what_lapack_gets_wrong_is_computed_in_float64(monkeypatch, failure):
    real = torch.linalg.eigh

    def broken(A):
        values, vectors = real(A)
        if A.dtype == D:
            return values, vectors
        if failure == "error":
            raise torch.linalg.LinAlgError("did not converge")
        return values, vectors * float("nan") if failure == "nan" else vectors.roll(1, -1)

    A = randn(9, 9, dtype=torch.float32)
    A = A @ A.T
    monkeypatch.setattr(torch.linalg, "eigh", broken)
    values, vectors = decompose.eigh(A)
    torch.testing.assert_close((vectors * values) @ vectors.T, A, rtol=1e-4, atol=1e-4)


def test_no_decomposition_is_a_named_error(monkeypatch):
    def fails(A):
        return A[..., 0] * float("nan"), A

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    monkeypatch.setattr(torch.linalg, "svd", lambda A: (A * float("nan"), A[..., 0], A))
    with pytest.raises(NonFiniteError, match=r"no eigendecomposition .*neither in torch.float32"):
        decompose.eigh(torch.ones(3, 3))


def test_rounding_of_float32_is_no_negative_eigenvalue():
    values, _ = decompose.eigh(sparse(1) - 1e-9 * torch.eye(96))
    assert bool((values >= 0).all())


@pytest.mark.parametrize("kind", ["dense", "kronecker", "low_rank"])
def test_a_damping_below_rounding_is_solved_in_float64(kind):
    """The condition number is 1e9, which float32 cannot invert."""
    scale = torch.tensor([1e4, 3e2, 7.0], dtype=torch.float32)
    root = randn(12, 3, dtype=torch.float32) * scale.sqrt()
    if kind == "dense":
        q = torch.linalg.qr(randn(12, 12))[0]
        F = DenseLinearOperator((q * torch.logspace(-4, 4, 12, dtype=D)) @ q.T)
        F = F.to(torch.float32)
    elif kind == "kronecker":
        left = torch.diag(torch.tensor([1e4, 1.0, 1e-2]))
        F = KroneckerLinearOperator(left[None], torch.diag(torch.tensor([3.0, 1e-2]))[None])
    else:
        F = LowRankLinearOperator(root)
    d = 1e-5 if kind != "dense" else 1.0
    n = F.shape[-1]
    b = randn(n, dtype=torch.float32)
    wide = F.to(D).to_dense() + d * torch.eye(n, dtype=D)
    expected = torch.linalg.solve(wide, b.double())
    for found in (F.solve(b, damping=d), F.damped(d).inverse() @ b):
        assert float((found.double() - expected).norm() / expected.norm()) < 2e-3


def test_a_damping_below_the_rounding_of_the_entries_is_said():
    A = randn(3, 40, dtype=torch.float32)
    F = DenseLinearOperator(1e4 * A.T @ A)
    with pytest.warns(ConvergenceWarning, match="below the rounding of its entries"):
        x = F.solve(torch.ones(40), damping=1e-7)
    assert bool(x.isfinite().all())


def test_a_damped_matrix_keeps_its_damping_through_a_copy():
    F = DenseLinearOperator(torch.diag(torch.tensor([1e3, 0.0]))).damped(1e-6)
    for made in (F, copy.deepcopy(F), pickle.loads(pickle.dumps(F))):
        torch.testing.assert_close(made.solve(torch.ones(2)), torch.tensor([1e-3, 1e6]))


def test_converged_is_the_residual_against_the_tolerance():
    F = DenseLinearOperator(torch.diag(torch.logspace(-6, 3, 10)))
    q = torch.linalg.qr(randn(10, 10, dtype=torch.float32))[0]
    F = DenseLinearOperator(q @ F.tensor @ q.T)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for tol in (1e-9, 1e3):
            found = ng.solve(F, torch.ones(10), damping=1e-4, tol=tol)
            assert found.converged == bool((found.residual <= tol).all())
            assert found.converged == (tol > 1)
    with pytest.warns(ConvergenceWarning, match="closed form stopped"):
        ng.solve(F, torch.ones(10), damping=1e-2, tol=1e-12)


def test_rcond_of_pinv_is_of_the_whole_matrix():
    small, large = torch.diag(torch.tensor([1e-6, 2e-6], dtype=D)), torch.eye(2, dtype=D)
    F = BlockDiagonalLinearOperator(small, large)
    expected = torch.linalg.pinv(F.to_dense(), rtol=1e-3, hermitian=True)
    torch.testing.assert_close(F.pinv(1e-3).to_dense(), expected)


def test_rounded_zeros_of_an_eigenbasis_are_zeros():
    values = torch.tensor([[[1.0, 1e-31], [0.5, 3e-32]]], dtype=D)
    F = EigenKroneckerLinearOperator(values, *(torch.eye(2, dtype=D)[None],) * 2)
    assert F.pinv().diagonal().tolist() == [1.0, 0.0, 2.0, 0.0]
    assert float(F.logdet()) == -float("inf")


@pytest.mark.parametrize("seed", range(6))
def test_blocks_of_eigsh_of_a_matrix_of_low_rank(seed):
    q = torch.linalg.qr(randn(120, 120))[0][:, :20]
    A = (q * torch.linspace(1, 10, 20, dtype=D)) @ q.T
    found = (
        ng.eigsh((A + A.T) / 2, 2)
        if seed == 0
        else linalg.eigsh(
            lambda v: A @ v,
            120,
            2,
            "LA",
            torch.empty(0, dtype=D),
            linalg.Search(seed=seed),
            block_size=3,
        )
    )
    values = found.eigenvalues if seed == 0 else found.values
    torch.testing.assert_close(values, torch.tensor([10 - 9 / 19, 10.0], dtype=D))


@pytest.mark.parametrize("at", range(40, 44))
def test_interrupted_pairs_have_true_residuals(at):
    A = randn(90, 90)
    A, calls = A + A.T, 0

    def matvec(v):
        nonlocal calls
        calls += 1
        if calls == at:
            raise KeyboardInterrupt
        return A @ v

    like = torch.empty(0, dtype=D)
    found = linalg.eigsh(matvec, 90, 3, "LA", like, linalg.Search(seed=0))
    true = (A @ found.vectors - found.vectors * found.values).norm(dim=0)
    assert found.interrupted
    assert not found.converged
    torch.testing.assert_close(found.residuals, true, rtol=1e-6, atol=1e-9)
    calls = 0
    options = linalg.Search(seed=0)
    triplets = linalg.svds(matvec, lambda u: matvec(u), (90, 90), 3, like, options)
    assert triplets.interrupted
    assert float(triplets.residuals.min()) > 0


MASK = torch.tensor([True, False, True, False, False, True])


@pytest.mark.parametrize(
    "F",
    [
        DiagonalLinearOperator(torch.arange(6.0)),
        DenseLinearOperator(torch.arange(6.0)[:, None] + torch.arange(6.0)),
    ],
)
def test_masks_and_edges_of_indices(F):
    dense = F.to_dense()
    assert torch.equal(F[MASK][:, MASK].to_dense(), dense[MASK][:, MASK])
    assert torch.equal(F[MASK, MASK], dense[MASK, MASK])
    assert torch.equal(F[..., MASK, :].to_dense(), dense[MASK])
    with pytest.raises(IndexError, match=r"a mask of shape \(6,\), got \(5,\)"):
        F[MASK[:5]]
    with pytest.raises(IndexError, match="positions from -6 to 5"):
        F[torch.tensor([0, 6])]
    with pytest.raises(IndexError, match="an index from -6 to 5, got 6"):
        F[6]


def test_a_broadcast_operator_is_damped_solved_and_drawn_from():
    A = randn(4, 4)
    F = DenseLinearOperator(A @ A.T)
    B, W = F.expand(2, 4, 4), randn(2, 4, 3, seed=1)
    damped = F.to_dense() + 0.1 * torch.eye(4, dtype=D)
    torch.testing.assert_close(B.solve(W, damping=0.1), torch.linalg.solve(damped, W))
    torch.testing.assert_close(B.add_jitter(0.1).solve(W), torch.linalg.solve(damped, W))
    torch.testing.assert_close(B.damped(0.1).logdet(), torch.logdet(damped).expand(2))
    torch.testing.assert_close((3.0 * B).to_dense(), 3 * F.to_dense().expand(2, 4, 4))
    draws = B.zero_mean_mvn_samples(4000)
    assert draws.shape == (4000, 2, 4)
    cov = torch.einsum("nbi,nbj->bij", draws, draws) / 4000
    assert float((cov - F.to_dense()).norm() / F.to_dense().norm()) < 0.15
    assert float(torch.corrcoef(draws[:, :, 0].T)[0, 1].abs()) < 0.1  # each has its own


def test_copies_of_a_matrix_free_operator_over_some_parameters():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).double()
    x, y = randn(6, 4), torch.tensor([0, 1, 0, 1, 1, 0])
    with torch.no_grad():
        model[0].weight.mul_(1.5)
    F = ng.FIM(model, (x, y), "implicit", params="1")
    v = torch.ones(8, dtype=D)
    expected = F @ v
    for made in (copy.deepcopy(F), pickle.loads(pickle.dumps(F))):
        torch.testing.assert_close(made @ v, expected)
    with torch.no_grad():
        model[0].weight.mul_(1.5)
    with pytest.raises(ng.errors.DataError, match="changed since"):
        copy.deepcopy(F) @ v


def test_a_kept_linearisation_does_not_drift():
    model = nn.ModuleList([nn.GRU(3, 4, batch_first=True), nn.Linear(4, 2)]).double()
    x = randn(8, 5, 3)

    def forward(model, batch):
        return model[1](model[0](batch)[0][:, -1])

    of = {
        mode: ng.FIM(
            model,
            x,
            ng.representations.Implicit(mode=mode, cache=True),
            likelihood="gaussian",
            forward=forward,
        )
        for mode in ("double_vjp", "forward_over_reverse")
    }
    v = of["double_vjp"].space.randn()
    for _ in range(3):
        torch.testing.assert_close(of["forward_over_reverse"] @ v, of["double_vjp"] @ v)


def test_update_diag_keeps_the_dense_blocks_of_a_mixture():
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3)).double()
    x = randn(40, 4)
    mixed = ng.representations.Mixed("ekfac", {nn.LayerNorm: "block_diagonal"})
    F = ng.FIM(model, x, mixed, likelihood="gaussian")
    fresh = ng.update_diag(F, model, x, likelihood="gaussian")
    assert [type(b) for b in fresh.members] == [type(b) for b in F.members]
    torch.testing.assert_close(fresh.to_dense(), F.to_dense())
    other = ng.representations.Mixed("ekfac", {nn.LayerNorm: "low_rank"})
    with pytest.raises(ng.errors.DataError, match="expected blocks of a KFAC or EKFAC"):
        ng.update_diag(ng.FIM(model, x, other, likelihood="gaussian"), model, x)


def test_columns_of_a_layer_that_the_outputs_do_not_use():
    class Partly(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(4, 3), nn.Linear(4, 2)

        def forward(self, x):
            return self.used(x)

    model, x = Partly().double(), randn(5, 4)
    J = ng.Jacobian(model, x, "factored")
    F = ng.FIM(model, x, "kfac", likelihood="gaussian")
    D_ = J.to_dense()
    torch.testing.assert_close((J @ F @ J.mT).to_dense(), D_ @ F.to_dense() @ D_.T)


def test_slogdet_where_logdet_is():
    A = DenseLinearOperator(torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=D)))
    lazy = A + ng.aslinearoperator(A.to_scipy())
    sign, logabsdet = torch.linalg.slogdet(lazy)
    assert float(sign) == 1
    torch.testing.assert_close(logabsdet, torch.logdet(lazy.to_dense()))
    torch.testing.assert_close(torch.linalg.det(lazy), torch.linalg.det(lazy.to_dense()))


def multiplied(queue, F, v):
    queue.put((F @ v).tolist())


def test_a_matrix_free_operator_in_a_spawned_process():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    data = randn(10, 3), torch.arange(10) % 2
    F = ng.FIM(model, data, "implicit", likelihood="categorical", params=["0.weight", "2.bias"])
    v, context = randn(F.shape[0]), multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=multiplied, args=(queue, F, v))
    process.start()
    assert torch.allclose(torch.tensor(queue.get(timeout=300), dtype=D), F @ v, rtol=1e-12)
    process.join()
