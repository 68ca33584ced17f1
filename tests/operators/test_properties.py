"""Identities that hold for every input."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nngeo_lazy.operators import (
    BlockDiagonalLinearOperator,
    KroneckerLinearOperator,
    LowRankLinearOperator,
    QuasiDiagonalLinearOperator,
)
from nngeo_lazy.testing import check_operator

from . import examples

sizes = st.integers(1, 4)


@st.composite
def kroneckers(draw):
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    groups = draw(st.integers(1, 3))

    def factor(n):
        if draw(st.booleans()):
            return torch.rand(groups, n, generator=g, dtype=torch.float64) + 0.5
        return examples.stacked(groups, lambda: examples.spd(n, g, 3.0))

    shift = torch.rand((), generator=g, dtype=torch.float64) if draw(st.booleans()) else None
    return KroneckerLinearOperator(factor(draw(sizes)), factor(draw(sizes)), shift)


@settings(max_examples=30, deadline=None)
@given(kroneckers(), st.floats(1e-6, 1e3))
def test_kronecker(K, d):
    A = examples.matrix(K)
    eye = torch.eye(len(A), dtype=torch.float64)
    v = torch.linspace(-1, 2, len(A), dtype=torch.float64)
    torch.testing.assert_close(K.to_dense(), A)
    torch.testing.assert_close(K.eigen().to_dense(), A)
    torch.testing.assert_close(K @ v, A @ v)
    torch.testing.assert_close(K.solve(v), torch.linalg.solve(A, v))
    torch.testing.assert_close(K.solve(v, damping=d), torch.linalg.solve(A + d * eye, v))
    torch.testing.assert_close(K.logdet(), torch.logdet(A))
    torch.testing.assert_close(K.trace(), A.trace())
    torch.testing.assert_close(K.norm(), A.norm())
    torch.testing.assert_close(K.diagonal(), A.diagonal())
    torch.testing.assert_close((K @ K).to_dense(), A @ A)


@settings(max_examples=10, deadline=None)
@given(st.lists(kroneckers(), min_size=1, max_size=3))
def test_block_diagonal(blocks):
    F = BlockDiagonalLinearOperator(*blocks)
    A = torch.block_diag(*(examples.matrix(b) for b in blocks))
    if len(A) > 1:
        check_operator(F, A)


@st.composite
def low_ranks(draw):
    """More or fewer columns than rows, repeated columns, a core of any sign; positive definite."""
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    n, k = draw(st.integers(2, 6)), draw(st.integers(1, 8))
    root = torch.randn(n, k, generator=g, dtype=torch.float64)
    if draw(st.booleans()):
        root[:, 0] = root[:, -1]
    core = torch.rand(k, generator=g, dtype=torch.float64) + 0.1
    diag = torch.rand(n, generator=g, dtype=torch.float64) + 0.5
    diag = diag[0] if draw(st.booleans()) else diag
    if draw(st.booleans()):  # a negative eigenvalue that the diagonal outweighs
        core[0] = -0.2 * diag.min() / root[:, 0].square().sum()
    return LowRankLinearOperator(root, core, diag)


@settings(max_examples=40, deadline=None)
@given(low_ranks())
def test_low_rank(F):
    A = examples.matrix(F)
    check_operator(F, A, rtol=1e-7)
    check_operator(F.inverse(), torch.linalg.inv(A), rtol=1e-7)
    torch.testing.assert_close(F.inverse().inverse().to_dense(), A)
    check_operator((F + F) * 0.5, A, rtol=1e-7)


@st.composite
def quasi_diagonals(draw):
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    n, o, i = draw(st.integers(6, 12)), draw(sizes), draw(sizes)
    rows = torch.randn(n, o, i + 1, generator=g, dtype=torch.float64)
    rows[..., -1] += draw(st.floats(-2, 2))
    second = torch.einsum("noi,noj->oij", rows, rows) / n
    F = QuasiDiagonalLinearOperator.of(second.diagonal(dim1=1, dim2=2), second[:, :i, i])
    for _ in range(draw(st.integers(0, 2))):  # anywhere in the family
        F = F.damped(0.1) if draw(st.booleans()) else F.inverse()
    return F


@settings(max_examples=40, deadline=None)
@given(quasi_diagonals())
def test_quasi_diagonal(F):
    A = F.to_dense()
    check_operator(F, A, rtol=1e-6)
    torch.testing.assert_close(F.inverse().inverse().to_dense(), A)
    torch.testing.assert_close(F.inverse().to_dense(), torch.linalg.inv(A), rtol=1e-6, atol=1e-6)
