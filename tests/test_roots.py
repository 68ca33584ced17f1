"""Roots that GPyTorch asks for, of matrices that are known by their products."""

import pytest
import scipy.sparse.linalg
import torch
from gpytorch.distributions import MultivariateNormal
from torch import nn
from torch.distributions import Normal, kl_divergence

import nngeo_lazy as ng
from nngeo_lazy.errors import NotPositiveDefiniteError, TooLargeError, UnsupportedLayerError
from nngeo_lazy.operators import base as base_module

D = torch.float64


def network(inputs=4, hidden=6, dtype=D):
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, 3)).to(dtype)


def fisher(representation, inputs=4, hidden=6, n=80, dtype=D):
    torch.manual_seed(0)
    model = network(inputs, hidden, dtype)
    data = torch.randn(n, inputs, dtype=dtype), torch.randint(3, (n,))
    return ng.FIM(model, data, representation, likelihood="categorical")


WAYS = {
    "damped": lambda F: F,
    "a sum": lambda F: F + fisher("dense"),
    "a multiple": lambda F: 2.0 * F,
    "the inverse": lambda F: F.inverse(),
    "repeated": lambda F: F.expand(2, *F.shape),
    "a block": lambda F: F.block("0"),
}


def root_of(A):
    values, vectors = torch.linalg.eigh(A)
    return (vectors * values.sqrt().unsqueeze(-2)) @ vectors.mT


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("representation", ["implicit", "quasi_diagonal"])
def test_roots_of_damped_matrices(representation, way):
    F = WAYS[way](fisher(representation).damped(0.1))
    A = F.to_dense()
    v = torch.randn(A.shape[-1], 2, dtype=D, generator=torch.Generator().manual_seed(0))
    close = {"rtol": 1e-7, "atol": 1e-7}
    assert torch.allclose(F.root_decomposition().to_dense(), A, **close)
    assert torch.allclose(F.root_inv_decomposition().to_dense(), A.inverse(), **close)
    assert torch.allclose(F.sqrt_inv_matmul(v), torch.linalg.solve(root_of(A), v), **close)
    both = F * F
    assert torch.allclose(both.to_dense(), A * A, **close)
    assert torch.allclose(both @ v, (A * A) @ v, **close)


@pytest.mark.parametrize("representation", ["implicit", "quasi_diagonal", "kfac"])
def test_divergence_of_two_normals(representation):
    """KL(p, q) in both orders, against its formula and torch's for independent numbers."""
    F = fisher(representation).damped(0.1)
    A, zero = F.to_dense(), torch.zeros(F.shape[0], dtype=D)
    B = (fisher("dense") + torch.eye(len(A), dtype=D)).to_dense()

    def divergence(p, q):
        (m, P), (n, Q) = p, q
        inner = torch.linalg.solve(Q, P).trace() + (n - m) @ torch.linalg.solve(Q, n - m)
        return (inner - len(m) + torch.logdet(Q) - torch.logdet(P)) / 2

    one, other = MultivariateNormal(zero, F), MultivariateNormal(zero + 1, B)
    assert torch.allclose(kl_divergence(one, other), divergence((zero, A), (zero + 1, B)))
    assert torch.allclose(kl_divergence(other, one), divergence((zero + 1, B), (zero, A)))
    d = ng.FIM(network(), torch.randn(9, 4, dtype=D), "diagonal", likelihood="gaussian").damped(0.1)
    mine = kl_divergence(MultivariateNormal(zero, d), MultivariateNormal(zero + 1, B.diag().diag()))
    normal = Normal(zero, d.diagonal().sqrt()), Normal(zero + 1, B.diag().sqrt())
    assert torch.allclose(mine, kl_divergence(*normal).sum())


def test_the_divergence_is_differentiable():
    F = fisher("implicit")
    w = torch.randn(F.shape[0], dtype=D, requires_grad=True)
    zero = torch.zeros_like(w)
    normal = MultivariateNormal(zero, torch.eye(len(zero), dtype=D))

    def divergence(A):
        return kl_divergence(MultivariateNormal(zero, A), normal)

    (mine,) = torch.autograd.grad(divergence(F.at(w).damped(0.1)), w)
    wanted = F.at(w).damped(0.1).to_dense()
    (wanted,) = torch.autograd.grad((wanted.trace() - torch.logdet(wanted)) / 2, w)
    assert torch.allclose(mine, wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float32, 1e-4), (D, 1e-8)])
def test_a_large_matrix_of_low_rank(dtype, tol):
    F = fisher("implicit", 20, 20, n=9, dtype=dtype)
    A, before = F.to_dense(), torch.get_rng_state()
    root = F.root_decomposition().root
    assert type(root).__name__ == "ForeignLinearOperator"  # of the rank, not multiplied out
    assert torch.equal(before, torch.get_rng_state())
    off = torch.linalg.matrix_norm(F.root_decomposition().to_dense() - A)
    assert off <= tol * torch.linalg.matrix_norm(A)


def test_a_spectrum_that_falls_slowly_is_multiplied_out():
    n = 200
    values = 1.0 / torch.arange(1, n + 1, dtype=D)
    Q = torch.linalg.qr(torch.randn(n, n, dtype=D)).Q
    A = (Q * values) @ Q.mT
    F = ng.aslinearoperator(scipy.sparse.linalg.aslinearoperator(((A + A.mT) / 2).numpy()))
    assert torch.allclose(F.root_decomposition().to_dense(), A, atol=1e-10)


def test_matrices_without_a_root(monkeypatch):
    for hidden, inputs in ((20, 20), (6, 4)):
        model, x = network(inputs, hidden), torch.randn(20, inputs, dtype=D)
        H = ng.Hessian(model, (x, torch.randint(3, (20,))), loss="categorical")
        with pytest.raises(NotPositiveDefiniteError, match=r"negative|semidefinite"):
            H.root_decomposition()
    J = ng.Jacobian(model, x)
    with pytest.raises(UnsupportedLayerError, match="symmetric"):
        (J.mT @ J @ fisher("dense").damped(0.1)).root_decomposition()
    F = fisher("implicit").damped(0.1)
    with pytest.raises(UnsupportedLayerError, match=r"power\(0.5\) has no closed form"):
        F.power(0.5)  # a promise of closed forms
    monkeypatch.setattr(base_module, "DENSE_LIMIT", 1000)
    with pytest.raises(TooLargeError, match=r"F.sample\(n\) for draws.*ng.matrix_function"):
        F.sqrt_inv_matmul(torch.ones(F.shape[0], 1, dtype=D))
    monkeypatch.undo()
    v = torch.ones(F.shape[0], dtype=D)  # the remedies
    wanted = torch.linalg.solve(root_of(F.to_dense()), v)
    assert torch.allclose(ng.matrix_function(F, torch.rsqrt, v), wanted, rtol=1e-6)
    assert F.sample(2, seed=0).shape == (2, F.shape[0])
    low = ng.low_rank(F, 5).root_decomposition().to_dense()
    assert torch.linalg.matrix_rank(low) == 5
