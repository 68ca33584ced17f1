"""One operator of every class, with the matrix that it stands for."""

import torch

from nngeo_lazy.layout import Layout, Piece
from nngeo_lazy.operators import (
    BlockDiagonalLinearOperator,
    DenseLinearOperator,
    DiagonalLinearOperator,
    EigenKroneckerLinearOperator,
    EigenLowRankLinearOperator,
    Info,
    InverseLinearOperator,
    KroneckerLinearOperator,
    LowRankLinearOperator,
    MatrixLinearOperator,
    Origin,
    ProductLinearOperator,
    QuasiDiagonalLinearOperator,
    RestrictedLinearOperator,
    ScaledLinearOperator,
    SumLinearOperator,
)
from nngeo_lazy.space import ParamSpace


def spd(n, g, cond=5.0, dtype=torch.float64):
    q = orthogonal(n, g, dtype)
    return (q * torch.linspace(1.0, cond, n, dtype=dtype)) @ q.mT


def orthogonal(n, g, dtype=torch.float64):
    return torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64))[0].to(dtype)


def stacked(count, make):
    return torch.stack([make() for _ in range(count)])


def kron(left, right):
    """The dense matrix of grouped factors, dense or diagonal."""
    left, right = (f.diag_embed() if f.dim() == 2 else f for f in (left, right))
    return torch.block_diag(*(torch.kron(a, b) for a, b in zip(left, right, strict=True)))


# a linear layer (2, 3) with bias whose block is joint; a transposed weight; and a vector
SPACE = ParamSpace(
    {"fc.weight": (2, 3), "fc.bias": (2,), "conv1d.weight": (3, 2), "norm.scale": (4,)},
    dtype=torch.float64,
)
LAYOUTS = (
    Layout.flat([slice(14, 18)]),
    Layout(1, 2, (Piece(0, 3), Piece(6, 1))),
    Layout(1, 2, (Piece(8, 3, transposed=True),)),
)


def info(dtype=torch.float64):
    origins = {name: Origin(SPACE.owner(name), "linear: outer") for name in SPACE.names}
    origins["norm.scale"] = Origin("norm", "norm: rows", "no Kronecker form")
    return Info(SPACE.to(dtype), 10, 20, origins)


def placed(blocks, dtype=torch.float64):
    """The block-diagonal operator of blocks in the layouts."""
    names = ("norm", "fc", "conv1d")
    return BlockDiagonalLinearOperator(*blocks, info=info(dtype), names=names, layouts=LAYOUTS)


def permuted(blocks):
    """The dense matrix of blocks in the layouts."""
    where = torch.cat([layout.positions() for layout in LAYOUTS])
    out = torch.zeros(18, 18, dtype=blocks[0].dtype)
    out[where[:, None], where[None, :]] = torch.block_diag(*blocks)
    return out


def dense(dtype=torch.float64):
    g = torch.Generator().manual_seed(3)
    return DenseLinearOperator(spd(18, g, dtype=dtype), info=info(dtype))


def diagonal(dtype=torch.float64):
    g = torch.Generator().manual_seed(3)
    d = torch.rand(18, generator=g, dtype=torch.float64).to(dtype) + 0.5
    return DiagonalLinearOperator(d, info=info(dtype))


def kronecker(dtype=torch.float64):
    g = torch.Generator().manual_seed(3)
    return KroneckerLinearOperator(spd(3, g, 4.0, dtype)[None], spd(2, g, 3.0, dtype)[None])


def grouped(dtype=torch.float64):
    """Two groups, a diagonal right factor, and a shift."""
    g = torch.Generator().manual_seed(3)
    left = stacked(2, lambda: spd(3, g, 5.0, dtype))
    right = torch.rand(2, 4, generator=g, dtype=torch.float64).to(dtype) + 0.5
    return KroneckerLinearOperator(left, right, torch.tensor(0.3, dtype=dtype))


def eigen(dtype=torch.float64):
    g = torch.Generator().manual_seed(3)
    bases = stacked(2, lambda: orthogonal(3, g, dtype)), stacked(2, lambda: orthogonal(2, g, dtype))
    values = torch.rand(2, 3, 2, generator=g, dtype=torch.float64).to(dtype) + 0.5
    return EigenKroneckerLinearOperator(values, *bases)


def low_rank(dtype=torch.float64):
    """Orthogonal columns, so that all eigenvalues are known; a constant diagonal."""
    g = torch.Generator().manual_seed(3)
    root = orthogonal(18, g, dtype)[:, :5] * torch.linspace(1, 2, 5, dtype=dtype)
    core = torch.tensor([1.0, 0.5, 2.0, -0.2, 1.0], dtype=dtype)
    return LowRankLinearOperator(root, core, torch.tensor(1.5, dtype=dtype), info=info(dtype))


def low_rank_varying(dtype=torch.float64):
    """A signed core over a diagonal that varies."""
    g = torch.Generator().manual_seed(3)
    root = torch.randn(12, 3, generator=g, dtype=torch.float64).to(dtype) / 4
    d = torch.rand(12, generator=g, dtype=torch.float64).to(dtype) + 0.8
    return LowRankLinearOperator(root, torch.tensor([1.0, -0.3, 2.0], dtype=dtype), d)


def eigen_low_rank(dtype=torch.float64):
    g = torch.Generator().manual_seed(3)
    values = torch.tensor([1.0, 2.0, 0.5], dtype=dtype)
    return EigenLowRankLinearOperator(
        orthogonal(18, g, dtype)[:, :3], values, torch.tensor(1.5, dtype=dtype), info=info(dtype)
    )


def eigen_low_rank_scaled(dtype=torch.float64):
    g = torch.Generator().manual_seed(3)
    scale = torch.rand(12, generator=g, dtype=torch.float64).to(dtype) + 0.5
    values = torch.tensor([1.0, 2.0, 0.5], dtype=dtype)
    return EigenLowRankLinearOperator(
        orthogonal(12, g, dtype)[:, :3], values, torch.tensor(0.8, dtype=dtype), scale
    )


def quasi_diagonal(dtype=torch.float64):
    g = torch.Generator().manual_seed(3)
    rows = torch.randn(40, 3, 4, generator=g, dtype=torch.float64).to(dtype) + 0.5
    second = torch.einsum("noi,noj->oij", rows, rows) / 40
    diagonal = second.diagonal(dim1=1, dim2=2)
    return QuasiDiagonalLinearOperator.of(diagonal, second[:, :3, 3])


def arrow(dtype=torch.float64):
    """The inverse of a damped quasi-diagonal: a negative rank-one term."""
    return quasi_diagonal(dtype).damped(0.3).inverse()


def jacobian(dtype=torch.float64):
    g = torch.Generator().manual_seed(3)
    return MatrixLinearOperator(
        torch.randn(7, 18, generator=g, dtype=torch.float64).to(dtype), info=info(dtype)
    )


def blocks(dtype=torch.float64):
    g = torch.Generator().manual_seed(3)
    values = torch.rand(1, 2, 3, generator=g, dtype=torch.float64).to(dtype) + 0.5
    members = [
        DenseLinearOperator(1.1 * spd(4, g, 5.0, dtype)),
        KroneckerLinearOperator(spd(2, g, 5.0, dtype)[None], spd(4, g, 3.0, dtype)[None]),
        EigenKroneckerLinearOperator(
            values, orthogonal(2, g, dtype)[None], orthogonal(3, g, dtype)[None]
        ),
    ]
    return placed(members, dtype)


def anonymous(dtype=torch.float64):
    return BlockDiagonalLinearOperator(kronecker(dtype), diagonal(dtype), grouped(dtype))


def lazy_sum(dtype=torch.float64):
    return SumLinearOperator(blocks(dtype), diagonal(dtype), info=info(dtype))


def scaled(dtype=torch.float64):
    c = torch.tensor(2.5, dtype=dtype)
    return ScaledLinearOperator(lazy_sum(dtype), c, info=info(dtype))


def inverse(dtype=torch.float64):
    # of terms that are symmetric whatever their numbers are, so that gradients are unambiguous
    g = torch.Generator().manual_seed(4)
    d = torch.rand(12, generator=g, dtype=torch.float64).to(dtype)
    return InverseLinearOperator(SumLinearOperator(eigen(dtype), DiagonalLinearOperator(d)))


def restricted(dtype=torch.float64):
    return RestrictedLinearOperator(lazy_sum(dtype), torch.tensor([3, 0, 7, 12, 17]))


def product(dtype=torch.float64):
    return ProductLinearOperator(dense(dtype), blocks(dtype), info=info(dtype))


def matrix(op):
    """The dense matrix, written independently of the operators' own code."""
    if isinstance(op, DenseLinearOperator):
        return op.tensor
    if isinstance(op, DiagonalLinearOperator):
        return op.diag.diag_embed()
    if isinstance(op, KroneckerLinearOperator):
        out = kron(op.left, op.right)
        return out if op.shift is None else out + op.shift * torch.eye(len(out)).to(out)
    if isinstance(op, EigenKroneckerLinearOperator):
        q = kron(op.left_basis.detach(), op.right_basis.detach())
        return (q * op.values.reshape(-1)) @ q.mT
    if isinstance(op, LowRankLinearOperator):
        out = (op.root * op.core) @ op.root.mT
        return out if op.diag is None else out + op.diag.expand(len(out)).diag_embed()
    if isinstance(op, EigenLowRankLinearOperator):
        V = op.basis.detach()
        out = (V * op.values) @ V.mT + op.rest * (torch.eye(len(V)).to(V) - V @ V.mT)
        return out if op.scale is None else op.scale[:, None] * out * op.scale
    if isinstance(op, QuasiDiagonalLinearOperator):
        return torch.block_diag(*map(quasi_block, op.diag, op.cross, op.coupling))
    if isinstance(op, MatrixLinearOperator):
        return op.tensor
    if isinstance(op, BlockDiagonalLinearOperator):
        members = [matrix(b) for b in op.members]
        return permuted(members) if op.layouts == LAYOUTS else torch.block_diag(*members)
    if isinstance(op, SumLinearOperator):
        return sum(matrix(t) for t in op.terms)
    if isinstance(op, ScaledLinearOperator):
        return op.constant * matrix(op.base)
    if isinstance(op, InverseLinearOperator):
        return torch.linalg.inv(matrix(op.base))
    if isinstance(op, RestrictedLinearOperator):
        return matrix(op.base)[op.rows][:, op.cols]
    if isinstance(op, ProductLinearOperator):
        return matrix(op.left) @ matrix(op.right)
    raise TypeError(type(op))


def quasi_block(a, b, coupling):
    q, r, kappa = coupling
    top = a.diag_embed() + (kappa + q * q) / r * torch.outer(b, b)
    return torch.cat([torch.cat([top, q * b[:, None]], 1), torch.cat([q * b, r[None]])[None]])


CLOSED = {
    f.__name__: f
    for f in (
        dense,
        diagonal,
        kronecker,
        grouped,
        eigen,
        low_rank,
        low_rank_varying,
        eigen_low_rank,
        eigen_low_rank_scaled,
        quasi_diagonal,
        arrow,
        blocks,
        anonymous,
    )
}
WITHOUT_EIGENVALUES = ("low_rank_varying", "eigen_low_rank_scaled", "quasi_diagonal", "arrow")
LAZY = {f.__name__: f for f in (lazy_sum, scaled, inverse, restricted)}
EVERY = {**CLOSED, **LAZY, "product": product, "jacobian": jacobian}
