"""What members promise beyond their numbers: forms, structure, dtypes, caches, torch functions."""

import pickle

import numpy as np
import pytest
import scipy.sparse.linalg as sla
import torch
from linear_operator.operators import (
    ConstantDiagLinearOperator,
    DiagLinearOperator,
    IdentityLinearOperator,
    RootLinearOperator,
    ToeplitzLinearOperator,
    ZeroLinearOperator,
)
from linear_operator.operators import DenseLinearOperator as TheirDense

import nngeo_lazy as ng
from nngeo_lazy.errors import (
    NotPositiveDefiniteError,
    SpaceMismatchError,
    UnsupportedLayerError,
)
from nngeo_lazy.operators import (
    BlockDiagonalLinearOperator,
    DenseLinearOperator,
    DiagonalLinearOperator,
    EigenKroneckerLinearOperator,
    ForeignLinearOperator,
    Info,
    KroneckerLinearOperator,
    LowRankLinearOperator,
    ProductLinearOperator,
    QuasiDiagonalLinearOperator,
    SumLinearOperator,
)
from nngeo_lazy.testing import LargestTensor, check_operator

from . import examples

EVERY_SYMMETRIC = {**examples.CLOSED, **examples.LAZY}
WITH_SPACE = {k: f for k, f in EVERY_SYMMETRIC.items() if f().space is not None}


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


# --- forms of vectors -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", WITH_SPACE)
def test_dict_columns_and_flat_agree(name):
    F = WITH_SPACE[name]()
    v = torch.randn(18, 4, dtype=torch.float64)
    named = F.space.unravel(v.mT.reshape(2, 2, 18))  # two leading batch dimensions
    assert {k: x.shape for k, x in (F @ named).items()} == {k: x.shape for k, x in named.items()}
    close(F.space.ravel(F @ named), (F @ v).mT.reshape(2, 2, 18))
    close(F.space.ravel(F.solve(named, damping=0.1)), F.solve(v, damping=0.1).mT.reshape(2, 2, 18))
    close(F.vTMv(named), F.vTMv(v).reshape(2, 2))
    one = F.space.unravel(v[:, 0])
    close(F.space.ravel(F @ one), F @ v[:, 0])
    assert F.vTMv(one).shape == () == F.vTMv(v[:, 0]).shape


def test_half_precision_vectors_are_promoted():
    F = examples.blocks(torch.float32)
    for dtype in (torch.float16, torch.bfloat16):
        v = torch.ones(18, dtype=dtype)
        assert (F @ v).dtype == F.solve(v).dtype == torch.float32
        close(F @ v, F @ torch.ones(18))


# --- structure ------------------------------------------------------------------------------------


def _same(A, B):
    return type(A) is type(B) and A.space == B.space and A.num_examples == B.num_examples


@pytest.mark.parametrize("name", ["dense", "diagonal", "blocks"])
def test_structure_and_knowledge_survive(name):
    F = examples.CLOSED[name]()
    v = torch.linspace(1, 2, 18, dtype=torch.float64)
    by_layer = {"fc": 0.1, "conv1d": torch.tensor(0.2, dtype=torch.float64), "norm": v[:4]}
    made = [2 * F, -F, F / 3, F + F, F.mT, F.damped(0.1), F.damped(by_layer), F.inverse()]
    made += [F.power(0.5), F.pinv(), F.detach(), F.clone(), F.to(torch.float32), F - 2 * F]
    made += [F + IdentityLinearOperator(18, dtype=torch.float64)]
    if name != "dense":
        made.append(F @ F)
    for result in made:
        assert _same(F, result), result
        assert result.num_terms == 20
    assert F.to(torch.float32).space.dtype == torch.float32


def test_blocks_keep_their_kind():
    F = examples.blocks()
    kinds = [type(b) for b in F.members]
    scaled = (2 * F).damped({"fc": 0.5, "conv1d": 1.0, "norm": 0.0})
    assert [type(b) for b in scaled.members] == kinds
    constant = torch.full((18,), 0.5, dtype=torch.float64)
    assert [type(b) for b in F.damped(constant).members] == kinds
    varying = F.damped(torch.linspace(1, 2, 18, dtype=torch.float64))
    assert [type(b) for b in varying.members] == [
        DenseLinearOperator,
        SumLinearOperator,
        SumLinearOperator,
    ]


def test_joint_block_damped_by_parameter():
    F = examples.blocks()
    d = torch.zeros(18, dtype=torch.float64)
    d[6:8] = 0.5
    damped = F.damped({"fc.bias": 0.5})  # not constant in the block of fc
    close(damped.to_dense(), F.to_dense() + d.diag())
    v = torch.randn(18, dtype=torch.float64)
    close(damped.solve(v), torch.linalg.solve(F.to_dense() + d.diag(), v))


def test_kronecker_damping_is_closed_and_shares_the_decomposition(monkeypatch):
    K = examples.kronecker()
    K.eigenvalues  # noqa: B018 - decomposes
    monkeypatch.setattr("nngeo_lazy.operators.factors.eigh", None)
    v = torch.randn(6, dtype=torch.float64)
    A = examples.matrix(K) + 0.3 * torch.eye(6, dtype=torch.float64)
    close(K.solve(v, damping=0.3), torch.linalg.solve(A, v))
    close(K.damped(0.1).damped(0.2).solve(v), torch.linalg.solve(A, v))


def test_factored_damping_is_martens_and_grosse():
    K, d = examples.kronecker(), 0.3
    left, right = K.left[0], K.right[0]
    pi = ((right.trace() / 2) / (left.trace() / 3)).sqrt()
    eye = torch.eye(3, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    want = torch.kron(left + d**0.5 / pi * eye[0], right + pi * d**0.5 * eye[1])
    got = K.damped(d, method="factored")
    assert type(got) is KroneckerLinearOperator
    close(got.to_dense(), want)
    F = BlockDiagonalLinearOperator(K, torch.eye(2, dtype=torch.float64))
    mixed = F.damped(d, method="factored").to_dense()
    close(mixed, torch.block_diag(want, (1 + d) * torch.eye(2, dtype=torch.float64)))


def test_sums_of_shared_bases_stay_closed():
    E = examples.eigen()
    other = EigenKroneckerLinearOperator(E.values.square(), E.left_basis, E.right_basis)
    assert type(E + other) is EigenKroneckerLinearOperator
    assert type(E @ other) is EigenKroneckerLinearOperator
    close((E + other).to_dense(), E.to_dense() + other.to_dense())
    close((E @ other).to_dense(), E.to_dense() @ other.to_dense())
    copied = EigenKroneckerLinearOperator(E.values, E.left_basis.clone(), E.right_basis)
    assert type(E + copied) is EigenKroneckerLinearOperator  # the same numbers
    turned = EigenKroneckerLinearOperator(E.values, E.left_basis.flip(-1), E.right_basis)
    assert type(E + turned) is SumLinearOperator


def test_sums_with_operators_of_linear_operator():
    F = examples.blocks()
    A, n = F.to_dense(), 18
    eye = torch.eye(n, dtype=torch.float64)
    two = ConstantDiagLinearOperator(torch.tensor([2.0], dtype=torch.float64), n)
    assert type(F + two) is BlockDiagonalLinearOperator
    close((F + two).to_dense(), A + 2 * eye)
    assert F + ZeroLinearOperator(n, n, dtype=torch.float64) is F
    assert sum([F, F]).space == F.space
    d = torch.linspace(1, 2, n, dtype=torch.float64)
    close((F + DiagLinearOperator(d)).to_dense(), A + d.diag())
    close((F @ DiagLinearOperator(d)).to_dense(), A * d)
    T = ToeplitzLinearOperator(torch.linspace(1, 0, n, dtype=torch.float64))
    total = F + T
    close(total.solve(d), torch.linalg.solve(A + T.to_dense(), d))
    assert total.space == F.space
    root = torch.randn(n, 2, dtype=torch.float64)
    total = F + RootLinearOperator(root)
    close(total.solve(d), torch.linalg.solve(A + root @ root.mT, d))
    assert type(F + TheirDense(A)) is DenseLinearOperator
    assert type(ForeignLinearOperator(T).damped(1.0)) is SumLinearOperator


def test_solve_of_a_product_is_factor_by_factor():
    P = examples.product()
    A = examples.matrix(P)
    v = torch.randn(18, 2, dtype=torch.float64)
    close(P.solve(v), torch.linalg.solve(A, v))
    close(P.mT.solve(v), torch.linalg.solve(A.mT, v))
    close(P.logdet(), torch.logdet(A))
    close(P.inverse().to_dense(), torch.linalg.inv(A))
    D = examples.diagonal()
    lazy = ProductLinearOperator(D, examples.lazy_sum())
    close(lazy.diagonal(), examples.matrix(lazy).diagonal())


def test_a_product_of_two_negative_matrices_is_not_indefinite():
    A, B = examples.diagonal(), examples.lazy_sum()
    product = ProductLinearOperator(-A, -DenseLinearOperator(examples.matrix(B)))
    close(product.logdet(), torch.logdet(examples.matrix(A) @ examples.matrix(B)))
    one = ProductLinearOperator(-A, DenseLinearOperator(examples.matrix(B)))
    with pytest.raises(NotPositiveDefiniteError, match="of a product's factors: logdet"):
        one.logdet()


def test_a_product_is_damped_as_a_sum():
    A, B = examples.diagonal(), examples.dense()
    want = examples.matrix(A) @ examples.matrix(B) + 0.3 * torch.eye(A.shape[-1]).double()
    close((A @ B).damped(0.3).to_dense(), want)
    close(ProductLinearOperator(A, B).damped(0.3).to_dense(), want)


def test_a_sum_that_is_not_symmetric_is_not_solved():
    """Conjugate gradients would end anywhere; both remedies of the message work."""
    A, b = (examples.diagonal() @ examples.dense()).damped(0.3), torch.randn(18).double()
    for solve in (A.solve, lambda b: ng.solve(A, b).x, lambda b: A.inverse() @ b):
        with pytest.raises(UnsupportedLayerError, match=r"needs a symmetric matrix.*method='lsmr'"):
            solve(b)
    want = torch.linalg.solve(A.to_dense(), b)
    close((A.mT @ A).damped(0.0).solve(A.mT @ b), want)
    close(ng.solve(A, b, method="lsmr", tol=1e-13).x, want)
    symmetric = ProductLinearOperator(A.mT, A).damped(0.3)  # its products show it
    close(symmetric.solve(b), torch.linalg.solve(symmetric.to_dense(), b))


# --- parts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WITH_SPACE)
def test_blocks_by_layer(name):
    F, A = WITH_SPACE[name](), examples.matrix(WITH_SPACE[name]())
    assert list(F.blocks) == ["fc", "conv1d", "norm"]
    close(F.blocks["fc"].to_dense(), A[:8, :8])
    assert F.blocks["fc"].space.names == ("fc.weight", "fc.bias")
    index = [*range(6), *range(14, 18)]
    part = F.block(["norm", "fc.weight"])  # in parameter order, whatever the selector's
    assert part.space.names == ("fc.weight", "norm.scale")
    close(part.to_dense(), A[index][:, index])
    assert part.num_examples == 10
    check_operator(part, A[index][:, index])


def test_part_of_a_kronecker_block_is_kronecker():
    F = examples.blocks()
    weight, bias = F.block("fc.weight"), F.block("fc.bias")
    assert [type(b) for b in weight.members + bias.members] == [KroneckerLinearOperator] * 2
    K = F.members[1]
    close(bias.members[0].right, K.right[:, 3:, 3:])
    check_operator(weight.damped(0.2), weight.to_dense() + 0.2 * torch.eye(6, dtype=torch.float64))


def test_report():
    F = examples.blocks()
    report = F.report()
    assert [row.parameter for row in report] == list(F.space.names)
    assert report.bytes == sum(t.numel() * 8 for t in F.representation())
    assert [row.size for row in report] == [6, 2, 6, 4]
    text = str(report)
    for expected in ("Kronecker (2x2) x (4x4)", "linear: outer", "no Kronecker form", "dense 4x4"):
        assert expected in text
    assert report[0].bytes == (4 + 16) * 8
    assert report[1].bytes == 0  # counted with the weight
    assert "dense 18x18" in str(examples.dense().report())
    assert "diagonal 18" in str(examples.anonymous().report())


# --- conversions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY_SYMMETRIC)
def test_to_any_dtype(name):
    F = EVERY_SYMMETRIC[name]()
    for moved in (F.to(torch.bfloat16), F.type(torch.bfloat16), F.bfloat16(), F.half(), F.float()):
        assert moved.dtype in (torch.bfloat16, torch.float16, torch.float32)
    moved = F.to("cpu", torch.float32)
    assert moved.dtype == torch.float32
    torch.testing.assert_close(moved.to_dense(), F.to_dense().float(), rtol=1e-4, atol=1e-5)
    assert F.to(torch.ones(1)).dtype == torch.float32
    assert F.cpu().device.type == "cpu"
    if F.space is not None:
        assert F.float().space.dtype == torch.float32


def test_indices_stay_integers():
    R = examples.restricted().to(torch.float32)
    assert R.rows.dtype == torch.int64


def test_half_precision_operators_solve():
    F = examples.kronecker().to(torch.bfloat16)
    x = F.solve(torch.ones(6, dtype=torch.bfloat16), damping=0.1)
    want = examples.kronecker().solve(torch.ones(6, dtype=torch.float64), damping=0.1)
    torch.testing.assert_close(x.double(), want, rtol=0.1, atol=0.02)


def test_requires_grad():
    F = examples.blocks().requires_grad_(True)
    assert F.requires_grad
    assert all(t.requires_grad for t in F.representation())
    assert not F.detach().requires_grad
    R = examples.restricted().requires_grad_(True)  # its index takes no gradient
    assert R.requires_grad


@pytest.mark.parametrize("name", examples.EVERY)
def test_pickle_and_rebuild(name):
    F = examples.EVERY[name]()
    again = pickle.loads(pickle.dumps(F))
    close(again.to_dense(), F.to_dense())
    assert again.space == F.space
    rebuilt = F.representation_tree()(*F.representation())
    close(rebuilt.to_dense(), F.to_dense())


# --- caches ---------------------------------------------------------------------------------------


def is_basis(F, tensor):
    """Whether a tensor must stay orthogonal."""
    members = getattr(F, "members", [])
    return any(
        tensor is basis
        for member in members
        if isinstance(member, EigenKroneckerLinearOperator)
        for basis in (member.left_basis, member.right_basis)
    )


@pytest.mark.parametrize("name", ["dense", "kronecker", "grouped", "blocks", "anonymous"])
def test_nothing_is_stale_after_an_update_in_place(name):
    F = examples.CLOSED[name]()
    v = torch.ones(F.shape[-1], dtype=torch.float64)
    x = F.solve(v)
    for tensor in F.representation():
        if not is_basis(F, tensor):
            tensor.mul_(2)
    close(F.to_dense() @ F.solve(v), v)
    assert not torch.allclose(F.solve(v), x)


def test_a_rebuilt_operator_does_not_reuse_another_decomposition():
    F = examples.dense()
    F.solve(torch.ones(18, dtype=torch.float64))
    G = F.representation_tree()(2 * F.tensor)
    close(G.logdet(), torch.logdet(2 * F.tensor))


# --- torch functions and scipy --------------------------------------------------------------------


@pytest.mark.parametrize("name", examples.WITHOUT_EIGENVALUES)
def test_torch_functions_without_eigenvalues(name):
    F, A = examples.CLOSED[name](), examples.matrix(examples.CLOSED[name]())
    v = torch.randn(len(A), dtype=torch.float64)
    close(torch.linalg.solve(F, v), torch.linalg.solve(A, v))
    close(torch.logdet(F), torch.logdet(A))
    close(torch.linalg.norm(F), A.norm())
    close(torch.linalg.inv(F).to_dense(), torch.linalg.inv(A))
    close(torch.det(F), torch.det(A))
    for mine, theirs in zip(torch.linalg.slogdet(F), torch.linalg.slogdet(A), strict=True):
        close(mine, theirs)
    with pytest.raises(UnsupportedLayerError, match="no closed form"):
        torch.linalg.eigvalsh(F)


@pytest.mark.parametrize(
    "name", [n for n in examples.CLOSED if n not in examples.WITHOUT_EIGENVALUES]
)
def test_torch_functions(name):
    F, A = examples.CLOSED[name](), examples.matrix(examples.CLOSED[name]())
    n = len(A)
    v, V = torch.randn(n, dtype=torch.float64), torch.randn(n, 3, dtype=torch.float64)
    close(torch.linalg.solve(F, V), torch.linalg.solve(A, V))
    close(torch.linalg.solve(F, V.mT, left=False), torch.linalg.solve(A, V.mT, left=False))
    close(torch.matmul(F, V), A @ V)
    close(torch.matmul(V.mT, F), V.mT @ A)
    close(V.mT @ F, V.mT @ A)
    close(torch.mv(F, v), A @ v)
    close(torch.mm(F, V), A @ V)
    close(torch.logdet(F), torch.logdet(A))
    close(torch.trace(F), A.trace())
    close(torch.diagonal(F), A.diagonal())
    close(torch.linalg.slogdet(-F).logabsdet, torch.linalg.slogdet(-A).logabsdet)
    close(torch.linalg.slogdet(-F)[0], torch.linalg.slogdet(-A)[0])
    close(torch.det(0.5 * F), torch.det(0.5 * A))
    close(torch.linalg.det(0.5 * F), torch.det(0.5 * A))
    close(torch.linalg.norm(F), A.norm())
    for ord_ in ("fro", 2, -2, "nuc"):
        close(torch.linalg.norm(F, ord_), torch.linalg.norm(A, ord_))
        close(torch.linalg.matrix_norm(F, ord_), torch.linalg.matrix_norm(A, ord_))
    close(torch.inverse(F).to_dense(), torch.linalg.inv(A))
    close(torch.linalg.inv(F).to_dense(), torch.linalg.inv(A))
    close(torch.linalg.pinv(F).to_dense(), torch.linalg.inv(A))
    close(torch.pinverse(F).to_dense(), torch.linalg.inv(A))
    close(torch.linalg.matrix_power(F, 3).to_dense(), torch.linalg.matrix_power(A, 3))
    close(torch.matrix_power(F, 2).to_dense(), A @ A)
    close(torch.linalg.cholesky(F).to_dense(), torch.linalg.cholesky(A))
    close(torch.linalg.eigvalsh(F).sort().values, torch.linalg.eigvalsh(A))
    close(torch.linalg.svd(F)[1].sort().values, torch.linalg.svd(A)[1].sort().values)
    close(torch.neg(F).to_dense(), -A)
    close(torch.add(F, F, alpha=2).to_dense(), 3 * A)
    close(torch.sub(F, F, alpha=2).to_dense(), -A)
    close(torch.mul(F, 2.0).to_dense(), 2 * A)
    close(torch.div(F, 2.0).to_dense(), A / 2)
    close(torch.transpose(F, 0, 1).to_dense(), A.mT)
    close(torch.sum(F, -1), A.sum(-1))
    close(torch.clone(F).to_dense(), A)
    assert torch.numel(F) == A.numel()


@pytest.mark.parametrize("name", EVERY_SYMMETRIC)
def test_scipy_krylov(name):
    F = EVERY_SYMMETRIC[name]()
    A = F.to_dense().numpy()
    b = np.linspace(1, 2, len(A))
    want = np.linalg.solve(A, b)
    for method in (sla.cg, sla.minres):
        x, failed = method(F.to_scipy(), b, rtol=1e-12)
        assert failed == 0
        np.testing.assert_allclose(x, want, rtol=1e-8)
    values = sla.eigsh(F.to_scipy(), 3, which="LA", return_eigenvectors=False)
    np.testing.assert_allclose(np.sort(values), np.linalg.eigvalsh(A)[-3:], rtol=1e-8)
    S = F.to_scipy()
    assert (S @ b[::-1]).shape == b.shape  # negative strides
    np.testing.assert_allclose(S @ np.asfortranarray(np.eye(len(A))), A, atol=1e-12)
    np.testing.assert_allclose(S.H @ b, A.T @ b)
    single = F.float().to_scipy(np.float64)
    assert (single @ b).dtype == np.float64
    assert F.requires_grad_(True).to_scipy().matvec(b).shape == b.shape


@pytest.mark.parametrize("name", EVERY_SYMMETRIC)
def test_no_operator_becomes_an_array_unasked(name):
    F = EVERY_SYMMETRIC[name]()
    b = np.ones(F.shape[-1])
    for call in (lambda: np.asarray(F), lambda: b @ F, lambda: np.linalg.norm(F)):
        with pytest.raises(TypeError, match=r"is no numpy array: take F\.to_scipy.*F\.to_dense"):
            call()
    np.testing.assert_allclose(F.to_scipy() @ b, F.to_dense().numpy() @ b, atol=1e-12)


def test_scipy_of_a_product_has_its_transpose():
    P = examples.product()
    A, b = examples.matrix(P).numpy(), np.linspace(1, 2, 18)
    np.testing.assert_allclose(P.to_scipy().T @ b, A.T @ b)
    np.testing.assert_allclose(P.to_scipy().H @ np.eye(18), A.T, atol=1e-12)


# --- signs, ranks ---------------------------------------------------------------------------------


def test_negative_eigenvalues_are_not_clamped():
    d = torch.tensor([-3.0, -1.0, 2.0, 5.0], dtype=torch.float64)
    q = examples.orthogonal(4, torch.Generator().manual_seed(0))
    for F in (
        DiagonalLinearOperator(d),
        DenseLinearOperator((q * d) @ q.mT),
        EigenKroneckerLinearOperator(d.reshape(1, 1, 4), d.new_ones(1, 1), q[None]),
    ):
        close(torch.linalg.eigvalsh(F).sort().values, d)
        close(F.norm("nuc"), d.abs().sum())
        close(F.solve(F @ d), d)
        check_operator(F, F.to_dense(), positive_definite=False)


def test_rounding_of_a_semidefinite_matrix_is_not_negative():
    x = torch.randn(20, 3, dtype=torch.float64)
    F = DenseLinearOperator(x @ x.mT)
    assert (F.eigenvalues >= 0).all()
    assert F.logdet() < -100
    assert F.sample(2, seed=0).isfinite().all()
    close(F.pinv().to_dense(), torch.linalg.pinv(x @ x.mT))
    K = KroneckerLinearOperator((x @ x.mT)[None], torch.eye(2, dtype=torch.float64)[None])
    close(K.pinv().to_dense(), torch.linalg.pinv(K.to_dense()))


def test_pinv_with_rcond():
    d = torch.tensor([0.0, 1e-6, 1.0, 2.0], dtype=torch.float64)
    assert DiagonalLinearOperator(d).pinv().diag[1] == 1e6
    assert DiagonalLinearOperator(d).pinv(1e-3).diag[1] == 0


def test_float32_kronecker_of_rank_deficient_factors_solves_damped():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(5, 30, generator=g), torch.randn(4, 20, generator=g)
    K = KroneckerLinearOperator((x.mT @ x)[None], (y.mT @ y)[None])
    v = torch.randn(600, generator=g)
    A = K.double().to_dense() + 0.1 * torch.eye(600, dtype=torch.float64)
    got = K.solve(v, damping=0.1)
    want = torch.linalg.solve(A, v.double())
    assert (got - want).norm() < 1e-3 * want.norm()


# --- memory ---------------------------------------------------------------------------------------


def _large(o, i, dtype=torch.float32):
    """Two Kronecker blocks, an eigen-Kronecker and a diagonal, with permuting layouts."""
    g = torch.Generator().manual_seed(0)
    left, right = examples.spd(o, g, 5, dtype)[None], examples.spd(i, g, 5, dtype)[None]
    values = torch.rand(1, o, i, generator=g).to(dtype) + 0.5
    return BlockDiagonalLinearOperator(
        KroneckerLinearOperator(left, right),
        EigenKroneckerLinearOperator(
            values, examples.orthogonal(o, g, dtype)[None], examples.orthogonal(i, g, dtype)[None]
        ),
        DiagonalLinearOperator(torch.rand(o, generator=g) + 0.5),
    )


@pytest.mark.parametrize(("o", "i"), [(12, 24), (40, 60)])  # P = 588, 4840
def test_nothing_larger_than_a_block_is_formed(o, i):
    F = _large(o, i)
    P = F.shape[-1]
    v, V = torch.ones(P), torch.ones(P, 4)
    allowed = max(4 * P, *(t.numel() for t in F.representation()))
    assert allowed < P * P / 100
    for work in (
        lambda: F @ v,
        lambda: F @ V,
        lambda: F.solve(V),
        lambda: F.solve(v, damping=0.1),
        lambda: F.damped(torch.linspace(1, 2, P)).solve(v),
        lambda: F.logdet(),
        lambda: F.sample(4, seed=0),
        lambda: F.inverse(damping=0.1).sample(4),
        lambda: F.diagonal(),
        lambda: F.trace(),
        lambda: [F.norm(ord_) for ord_ in ("fro", 2, -2, "nuc")],
        lambda: F.power(0.5) @ v,
        lambda: F.inv_quad_logdet(V, logdet=True),
        lambda: F.sqrt_inv_matmul(V),
        lambda: torch.linalg.eigvalsh(F),
        lambda: F[:3, :5].to_dense(),
        lambda: (F + 2 * F.damped(0.1)) @ v,
    ):
        with LargestTensor() as spy:
            work()
        assert 0 < spy.numel <= allowed, spy.operation


def _tall(n):
    """Low rank with a constant and with a varying diagonal, and a quasi-diagonal, side by side."""
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(30, n, 8, generator=g) + 0.5
    second = torch.einsum("noi,noj->oij", rows, rows) / 30
    return BlockDiagonalLinearOperator(
        LowRankLinearOperator(torch.randn(8 * n, 6, generator=g), None, torch.tensor(0.5)),
        LowRankLinearOperator(
            torch.randn(8 * n, 6, generator=g), None, torch.rand(8 * n, generator=g) + 0.5
        ),
        QuasiDiagonalLinearOperator.of(second.diagonal(dim1=1, dim2=2), second[:, :7, 7]),
    )


@pytest.mark.parametrize("n", [20, 120])  # P = 480, 2880
def test_nothing_larger_than_the_roots_is_formed(n):
    F = _tall(n)
    P = F.shape[-1]
    v, V = torch.ones(P), torch.ones(P, 4)
    allowed = 4 * P + 48 * n
    assert allowed < P * P / 20
    constant = F.members[0]
    for work in (
        lambda: F @ V,
        lambda: F.solve(V),
        lambda: F.solve(v, damping=0.1),
        lambda: F.damped(torch.linspace(1, 2, P)).solve(v),
        lambda: F.inverse() @ v,
        lambda: F.logdet(),
        lambda: F.sample(4, seed=0),
        lambda: F.inverse().sample(4, seed=0),
        lambda: (F.diagonal(), F.trace(), F.norm()),
        lambda: [constant.norm(ord_) for ord_ in (2, -2, "nuc")],
        lambda: constant.power(0.5).logdet(),
        lambda: constant.pinv().trace(),
        lambda: constant.eigh()[1] @ torch.ones(8 * n),
        lambda: (constant + constant).trace(),
    ):
        with LargestTensor() as spy:
            work()
        assert 0 < spy.numel <= allowed, spy.operation


def test_quasi_diagonal_solves_keep_their_digits_in_float32():
    """Inputs that hardly vary: what is left of the weights' curvature is far below the bias's."""
    g = torch.Generator().manual_seed(0)
    x = torch.cat([1 + 1e-4 * torch.randn(50, 4, generator=g), torch.ones(50, 1)], 1)
    second = (x.mT @ x / 50).unsqueeze(0)
    F = QuasiDiagonalLinearOperator.of(second.diagonal(dim1=1, dim2=2), second[:, :4, 4])
    v = torch.ones(5)
    A = F.double().to_dense() + 1e-5 * torch.eye(5, dtype=torch.float64)
    want = torch.linalg.solve(A, v.double())
    assert (F.solve(v, damping=1e-5) - want).norm() < 1e-2 * want.norm()
    residual = F.damped(1e-5) @ F.solve(v, damping=1e-5) - v
    assert residual.norm() < 1e-4


def test_sums_of_dtypes_are_refused():
    F = examples.dense()
    for combine in (lambda: F + F.to(torch.float32), lambda: F @ F.to(torch.float32)):
        with pytest.raises(SpaceMismatchError, match="two operators of one dtype and device"):
            combine()


def test_differences_of_a_diagonal_and_a_quasi_diagonal():
    Q = examples.quasi_diagonal()
    D = DiagonalLinearOperator(Q.diagonal())
    close((D - Q).to_dense(), D.to_dense() - Q.to_dense())
    close((Q - D).to_dense(), Q.to_dense() - D.to_dense())
    close((Q - 0.5 * D).to_dense(), Q.to_dense() - 0.5 * D.to_dense())


@pytest.mark.parametrize("varying", [False, True])
def test_inverses_of_low_rank_keep_their_digits_in_float32(varying):
    """A Laplace posterior: eigenvalues of the inverse seven orders apart."""
    g = torch.Generator().manual_seed(0)
    U, d = 30 * torch.randn(300, 20, generator=g), torch.full((300,), 1e-3)
    if varying:
        d = d * (1 + torch.rand(300, generator=g))
    F = LowRankLinearOperator(U, None, d)
    posterior = F.inverse()
    A = U.double() @ U.double().mT + d.double().diag()
    want = torch.linalg.inv(A)
    variances = (U.double() * (want @ U.double())).sum(0)
    assert ((posterior.vTMv(U) - variances) / variances).abs().max() < 1e-3
    assert (posterior.logdet() + torch.logdet(A)).abs() < 1e-4 * torch.logdet(A).abs()
    assert posterior.sample(3, seed=0).isfinite().all()
    back = posterior.inverse()
    v = torch.randn(300, generator=g)
    assert (back @ v - A @ v.double()).norm() < 1e-4 * (A @ v.double()).norm()


def test_low_rank_damping_shares_the_decomposition(monkeypatch):
    F = examples.low_rank()
    v = torch.randn(18, dtype=torch.float64)
    F.logdet()  # decomposes
    monkeypatch.setattr("nngeo_lazy.operators.low_rank.eigh", None)
    A = examples.matrix(F)
    for d in (0.3, 0.7):
        want = torch.linalg.solve(A + d * torch.eye(18, dtype=torch.float64), v)
        close(F.solve(v, damping=d), want)
    monkeypatch.undo()
    varying = torch.linspace(1, 2, 18, dtype=torch.float64)
    close(F.solve(v, damping=varying), torch.linalg.solve(A + varying.diag(), v))
    F.root.mul_(2)  # and notices what is modified in place
    changed = examples.matrix(F) + 0.3 * torch.eye(18, dtype=torch.float64)
    close(F.solve(v, damping=0.3), torch.linalg.solve(changed, v))


def test_low_rank_in_bfloat16():
    F = examples.low_rank().to(torch.bfloat16)
    v = torch.ones(18, dtype=torch.bfloat16)
    A = F.double().to_dense() + torch.eye(18, dtype=torch.float64)
    want = torch.linalg.solve(A, v.double())
    assert (F.solve(v, damping=1.0) - want).norm() < 0.1 * want.norm()
    assert F.eigh()[1].shape == (18, 18)


def test_low_rank_solves_keep_their_digits_in_float32():
    """Where Woodbury's identity would lose them: damping far below the matrix."""
    g = torch.Generator().manual_seed(0)
    U = torch.randn(400, 20, generator=g)
    F = LowRankLinearOperator(U)
    v = torch.randn(400, generator=g)
    for d in (1e-2, 1e-4):
        A = U.double() @ U.double().mT + d * torch.eye(400, dtype=torch.float64)
        want = torch.linalg.solve(A, v.double())
        assert (F.solve(v, damping=d) - want).norm() < 1e-5 * want.norm()
        varying = F.damped(d * (1 + torch.rand(400, generator=g)))
        B = U.double() @ U.double().mT + varying.diag.double().diag()
        want = torch.linalg.solve(B, v.double())
        assert (varying.solve(v) - want).norm() < 1e-4 * want.norm()


def test_a_solve_with_leading_dimensions_repeats_no_factor():
    F = _large(40, 60)
    F.logdet()  # decomposes
    with LargestTensor() as spy:
        F.solve(torch.ones(3, 2, F.shape[-1], 1), damping=0.1)
    assert spy.numel <= 6 * F.shape[-1]


# --- sampling -------------------------------------------------------------------------------------


def test_seeded_samples_leave_the_global_generator_alone():
    F = examples.blocks()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    F.sample(3, seed=5)
    assert torch.equal(state, torch.get_rng_state())
    first = F.sample(3)
    torch.manual_seed(1)
    close(F.sample(3), first)
    assert not torch.equal(F.sample(3), first)


def test_info_is_not_shared_by_default():
    F = DiagonalLinearOperator(torch.ones(2))
    assert F.info == Info()
    assert F.space is None
    assert F.num_examples is None


@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-25, 1e-12, 1.0, 1e12, 1e25])
def test_quasi_diagonal_of_any_scale_in_float32(scale):
    """Neither squares that underflow nor a variance that has no inverse spoil a number."""
    rows = torch.randn(40, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    second = torch.einsum("noi,noj->oij", rows, rows) / 40 * scale
    diagonal, cross = second.diagonal(dim1=-2, dim2=-1), second[:, -1, :-1]
    want = QuasiDiagonalLinearOperator.of(diagonal, cross).to_dense() / scale
    F = QuasiDiagonalLinearOperator.of(diagonal.float(), cross.float())
    for found in (F.to_dense().double(), torch.diag(F.diagonal().double())):
        assert found.isfinite().all()
        if scale > 1e-30:  # below, float32 itself has no digits
            expected = want if found[0, 1] != 0 else torch.diag(want.diagonal())
            torch.testing.assert_close(found / scale, expected, rtol=1e-4, atol=1e-4)
