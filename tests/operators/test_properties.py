"""Identities that hold for every input."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nngeo_lazy.operators import BlockDiagonalLinearOperator, KroneckerLinearOperator
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
