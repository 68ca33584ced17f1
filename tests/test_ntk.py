"""Neural tangent kernels against the Gram matrix of torch.func's Jacobian."""

import math

import linear_operator
import pytest
import scipy.sparse.linalg
import torch
from sklearn.datasets import load_digits
from test_implicit import EVERY_NET, net_of
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import nngeo_lazy as ng
from nngeo_lazy import kernels
from nngeo_lazy.errors import (
    DataError,
    NonFiniteError,
    SpaceMismatchError,
    StochasticModelError,
    TooLargeError,
    UnsupportedLayerError,
)
from nngeo_lazy.operators import factored
from nngeo_lazy.operators.kernel import KernelLinearOperator, kernel_of
from nngeo_lazy.operators.stack import StackLinearOperator
from nngeo_lazy.testing import LargestTensor, check_operator

import oracle
import zoo
from cases import close

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
]

TOLERANCE = 1e-9
METHODS = ["structured", "contraction", "matrix-free"]


def reference(J, J2=None):
    """All kinds of a kernel, from Jacobians (N, C, P)."""
    full = torch.einsum("ncp,mdp->ncmd", J, J if J2 is None else J2)
    c = J.shape[1]
    return {
        "full": full.flatten(2).flatten(0, 1),
        "mean": torch.einsum("ncmc->nm", full) / c,
        "per_output": torch.einsum("ncmc->cnm", full),
        "per_example": torch.einsum("ncnd->ncd", full) if J2 is None else None,
    }


def require_kernel(K, matrix):
    close(K.to_dense(), matrix, TOLERANCE)
    n, m = matrix.shape[-2:]
    v = torch.randn(m, 3)
    close(K @ v, matrix @ v, TOLERANCE)
    close(K @ v[:, 0], matrix @ v[:, 0], TOLERANCE)
    u = torch.randn(n, 2)
    close(K.mT @ u, matrix.mT @ u, TOLERANCE)
    if n == m:
        close(K.diagonal(), matrix.diagonal(dim1=-2, dim2=-1), TOLERANCE)
    if matrix.dim() == 2:
        batch = torch.stack([v, 2 * v])
        close(K @ batch, matrix @ batch, TOLERANCE)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", EVERY_NET)
def test_every_network(name, method):
    net = net_of(name)
    kinds = reference(oracle.jacobian(net.model, net.call, net.examples))
    K = ng.NTK(net.model, net.batch, method=method, forward=net.forward)
    assert isinstance(K, KernelLinearOperator)
    require_kernel(K, kinds["full"])
    for kind in ("mean", "per_output", "per_example"):
        require_kernel(K.outputs(kind), kinds[kind])


@pytest.mark.parametrize("method", [*METHODS, "auto"])
@pytest.mark.parametrize("outputs", ["full", "mean", "per_output"])
def test_between_two_sets_of_inputs(outputs, method):
    model = zoo.mlp().model
    width = next(model.parameters()).shape[1]
    x1, x2 = torch.randn(7, width), torch.randn(4, width)
    call = lambda model, x: model(x.unsqueeze(0)).squeeze(0)  # noqa: E731
    J1, J2 = (oracle.jacobian(model, call, list(x)) for x in (x1, x2))
    loader = DataLoader(TensorDataset(x1, torch.zeros(7)), batch_size=3)
    K = ng.NTK(model, loader, x2, outputs=outputs, method=method)
    require_kernel(K, reference(J1, J2)[outputs])


def small(outputs=3):
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, outputs))


def jacobian(model, x):
    return oracle.jacobian(model, lambda m, e: m(e.unsqueeze(0)).squeeze(0), list(x))


def kernel(n=8, outputs="full", **options):
    model, x = small(), torch.randn(n, 4)
    K = ng.NTK(model, x, outputs=outputs, **options)
    return K, reference(jacobian(model, x))[outputs]


@pytest.mark.parametrize("outputs", ["full", "mean"])
@pytest.mark.parametrize("method", ["auto", "matrix-free"])
@pytest.mark.parametrize("centered", [False, True])
def test_every_member(outputs, method, centered):
    K, matrix = kernel(5, outputs, method=method)
    if centered:
        c = len(matrix) // 5
        H = torch.kron(torch.eye(5) - 1 / 5, torch.eye(c))
        K, matrix = K.center(), H @ matrix @ H
    if method == "auto" and not centered:
        check_operator(K, matrix)
    close(K.to_dense(), matrix, TOLERANCE)
    close(K.diagonal(), matrix.diagonal(), TOLERANCE)
    damped = matrix + 0.3 * torch.eye(len(matrix))
    check_operator(K.damped(0.3), damped)
    b = torch.randn(len(matrix))
    close(K.solve(b, damping=0.3), torch.linalg.solve(damped, b), 1e-8)


def test_a_kernel_of_factored_jacobians_is_solved_in_closed_form():
    K, matrix = kernel(5, "mean")
    assert not K.iterates
    values, _ = K.eigh()
    close(values.sort().values, torch.linalg.eigvalsh(matrix), 1e-8)
    close(K.logdet(), torch.logdet(matrix), 1e-6)
    assert K.sample(3, seed=0).shape == (3, 5)
    assert kernel(5, "mean", method="matrix-free")[0].iterates


@pytest.mark.parametrize("name", ["mlp", "convolutions", "gpt", "tied"])
@pytest.mark.parametrize("batches", [1, 3])
def test_slices_are_those_of_the_inputs(name, batches):
    net = net_of(name)
    J = oracle.jacobian(net.model, net.call, net.examples)
    if batches > 1 and not isinstance(net.batch, torch.Tensor):
        pytest.skip("is one batch")
    data = DataLoader(TensorDataset(net.batch), batch_size=2) if batches > 1 else net.batch
    full, c = reference(J), J.shape[1]
    K = ng.NTK(net.model, data, forward=net.forward)
    part = K[c : 3 * c, : 2 * c]
    assert isinstance(part, KernelLinearOperator)
    close(part.to_dense(), full["full"][c : 3 * c, : 2 * c], TOLERANCE)
    mean = K.outputs("mean")
    assert isinstance(mean[1:3], KernelLinearOperator)
    close(mean[1:3].to_dense(), full["mean"][1:3], TOLERANCE)
    same = mean[1:3, 1:3]
    close(same.solve(torch.ones(2), damping=0.1), torch.linalg.solve(
        full["mean"][1:3, 1:3] + 0.1 * torch.eye(2), torch.ones(2)
    ), 1e-8)  # fmt: skip
    close(mean[torch.tensor([2, 0])].to_dense(), full["mean"][[2, 0]], TOLERANCE)
    close(K[1:2, 1:].to_dense(), full["full"][1:2, 1:], TOLERANCE)  # cuts through an example
    close(K.outputs("per_output")[1].to_dense(), full["per_output"][1], TOLERANCE)
    assert K[2, 3].item() == pytest.approx(float(full["full"][2, 3]))


# --- J1 M J2^T ------------------------------------------------------------------------------------


MIDDLES = {
    "inverse kfac": lambda model, x: ng.FIM(
        model, x, "kfac", likelihood="categorical"
    ).inverse(damping=0.1),
    "inverse ekfac": lambda model, x: ng.FIM(
        model, x, "ekfac", likelihood="categorical"
    ).inverse(damping=0.1),
    "prior": lambda model, x: ng.identity(ng.Jacobian(model, x).space, 2.0),
    "dense": lambda model, x: ng.FIM(model, x, "dense", likelihood="categorical"),
    "implicit": lambda model, x: ng.FIM(model, x, "implicit", likelihood="categorical"),
}  # fmt: skip


@pytest.mark.parametrize("middle", MIDDLES)
@pytest.mark.parametrize("representation", ["factored", "implicit"])
@pytest.mark.parametrize("columns", [2**26, 1])
def test_with_a_matrix_between(middle, representation, columns, monkeypatch):
    monkeypatch.setattr(factored, "COLUMN_BYTES", columns)
    model, x, x2 = small(), torch.randn(6, 4), torch.randn(3, 4)
    M = MIDDLES[middle](model, x)
    J1, J2 = (ng.Jacobian(model, data, representation) for data in (x, x2))
    one, other, inside = J1.to_dense(), J2.to_dense(), M.to_dense()
    for K in (J1 @ M @ J2.mT, J1 @ (M @ J2.mT)):
        assert isinstance(K, KernelLinearOperator)
        require_kernel(K, one @ inside @ other.mT)
    K = J1 @ M @ J1.mT
    require_kernel(K, one @ inside @ one.mT)
    full = (one @ inside @ one.mT).view(6, 3, 6, 3)
    require_kernel(K.outputs("mean"), torch.einsum("ncmc->nm", full) / 3)
    require_kernel(K.outputs("per_example"), torch.einsum("ncnd->ncd", full))
    require_kernel(K.outputs("per_output"), torch.einsum("ncmc->cnm", full))


def test_products_of_jacobians():
    model, x = small(), torch.randn(6, 4)
    J = ng.Jacobian(model, x, "factored")
    K = J @ J.mT
    assert isinstance(K, KernelLinearOperator)
    close(K.to_dense(), ng.NTK(model, x).to_dense())
    assert not isinstance(J.mT @ J, KernelLinearOperator)
    close((J.mT @ J).to_dense(), J.to_dense().mT @ J.to_dense())


def test_composes_with_other_operators():
    K, matrix = kernel(6, "mean")
    rbf = torch.exp(-torch.cdist(torch.arange(6.0)[:, None], torch.arange(6.0)[:, None]))
    total = 2 * K + linear_operator.to_linear_operator(rbf).add_diagonal(torch.tensor(0.1))
    dense = 2 * matrix + rbf + 0.1 * torch.eye(6)
    close(total.to_dense(), dense, TOLERANCE)
    b = torch.randn(6)
    close(ng.aslinearoperator(total).solve(b), torch.linalg.solve(dense, b), 1e-8)
    close((K @ K).to_dense(), matrix @ matrix, TOLERANCE)
    found = scipy.sparse.linalg.eigsh(K.to_scipy(), 2, which="LA")[0]
    close(torch.from_numpy(found), torch.linalg.eigvalsh(matrix)[-2:], 1e-8)
    close(ng.eigsh(K, 2).eigenvalues, torch.linalg.eigvalsh(matrix)[-2:], 1e-8)


# --- mathematics ----------------------------------------------------------------------------------


def test_yardstick_7_a_wide_relu_network_has_the_arc_cosine_kernel():
    width, d = 2**15, 5

    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Parameter(torch.randn(width, d))
            self.second = nn.Parameter(torch.randn(1, width))

        def forward(self, x):
            hidden = nn.functional.linear(x, self.first).relu()
            return nn.functional.linear(hidden, self.second) * (2 / width) ** 0.5

    x = torch.randn(6, d)
    K = ng.NTK(Wide(), x).to_dense()
    size = x.norm(dim=1)
    u = (x @ x.mT / torch.outer(size, size)).clamp(-1, 1)
    k0 = (math.pi - u.acos()) / math.pi
    k1 = (u * (math.pi - u.acos()) + (1 - u * u).clamp_min(0).sqrt()) / math.pi
    expected = torch.outer(size, size) * (u * k0 + k1)
    assert (K - expected).norm() < 0.03 * expected.norm()


def test_yardstick_14_the_twin_has_the_same_eigenvalues():
    model, x = small(), torch.randn(5, 4)
    J = ng.Jacobian(model, x, "factored")
    here = torch.linalg.eigvalsh((J @ J.mT).to_dense())
    there = torch.linalg.eigvalsh(J.to_dense().mT @ J.to_dense())
    close(here, there[-len(here) :], 1e-8)


@pytest.mark.parametrize("likelihood", ["categorical", "gaussian"])
def test_sample_space_is_the_twin_of_the_ggn(likelihood):
    model, x = small(), torch.randn(5, 4)
    F = ng.FIM(model, x, "factored", likelihood=likelihood)
    K = ng.sample_space(F)
    assert isinstance(K, KernelLinearOperator)
    own = torch.linalg.eigvalsh(K.to_dense())
    close(own, torch.linalg.eigvalsh(F.to_dense())[-len(own) :], 1e-8)
    with pytest.raises(UnsupportedLayerError, match="build it with the representation 'factored'"):
        ng.sample_space(F.damped(0.1))


def test_centered_kernels_have_rows_of_mean_zero():
    K, matrix = kernel(7)
    centered = K.center()
    by_example = centered.to_dense().unflatten(0, (7, 3))
    assert by_example.mean(0).norm() < 1e-12 * matrix.norm()
    close(centered.center().to_dense(), centered.to_dense())
    close(centered.outputs("mean").to_dense(), kernel_mean(centered.to_dense(), 7, 3), TOLERANCE)
    close(centered.outputs("mean").diagonal(), kernel_mean(centered.to_dense(), 7, 3).diagonal())
    close(centered[:3].to_dense(), centered.to_dense()[:3], TOLERANCE)
    blocks = torch.einsum("ncnd->ncd", centered.to_dense().view(7, 3, 7, 3))
    close(centered.outputs("per_example").to_dense(), blocks, TOLERANCE)


def kernel_mean(full, n, c):
    return torch.einsum("ncmc->nm", full.view(n, c, n, c)) / c


@pytest.mark.parametrize("center", [False, True])
def test_alignment(center):
    K, matrix = kernel(7, "mean")
    Y = torch.randn(7, 3)
    H = torch.eye(7) - 1 / 7 if center else torch.eye(7)

    def expected(matrix, Y):
        A, B = H @ matrix @ H, H @ Y @ Y.mT @ H
        return (A * B).sum() / (A.norm() * B.norm())

    close(ng.alignment(K, Y, center=center), expected(matrix, Y))
    close(ng.alignment(matrix, Y[:, 0], center=center), expected(matrix, Y[:, :1]))
    classes = torch.tensor([0, 1, 2, 0, 1, 2, 2])
    onehot = nn.functional.one_hot(classes).double()
    close(ng.alignment(K, classes, center=center), expected(matrix, onehot))
    full, dense = kernel(7)
    H = torch.kron(H, torch.eye(3))
    expected_full = expected(dense, Y.reshape(-1, 1))
    close(ng.alignment(full, Y, center=center), expected_full)
    close(ng.alignment(dense, Y, center=center), expected_full)


def test_alignment_of_the_labels_own_kernel_is_one():
    y = torch.randn(6)
    close(ng.alignment(torch.outer(y, y), y), torch.tensor(1.0))
    close(ng.alignment(-torch.outer(y, y), y), torch.tensor(-1.0))


def test_eigenfunctions():
    model, x, other = small(), torch.randn(30, 4), torch.randn(5, 4)
    K = ng.NTK(model, x, outputs="mean")
    found = ng.eigenfunctions(K, 3, seed=0)
    close(found.eigenvalues, torch.linalg.eigvalsh(K.to_dense()).flip(0)[:3] / 30)
    close(found.values.square().mean(0), torch.ones(3))
    close(found(K), found.values, 1e-8)  # the inputs themselves
    cross = ng.NTK(model, other, x, outputs="mean")
    extended = found(cross)
    expected = cross.to_dense() @ found.values / (30 * found.eigenvalues)
    close(extended, expected)
    low = ng.eigenfunctions(K, 30, tol=1e-12) if torch.linalg.matrix_rank(K.to_dense()) == 30 else 0
    if low:  # Mercer: the kernel is the sum over its eigenfunctions
        close((low.values * low.eigenvalues) @ low.values.mT, K.to_dense(), 1e-8)


def test_eigenfunctions_past_the_rank():
    x = torch.randn(6, 2)
    with pytest.raises(ValueError, match="kernel with 3 positive eigenvalues, got one with 2: ask"):
        ng.eigenfunctions(x @ x.mT, 3)
    found = ng.eigenfunctions(x @ x.mT, 2)
    with pytest.raises(SpaceMismatchError, match=r"kernel \(M x 6\) of other inputs with the 6"):
        found(torch.randn(2, 5))


@pytest.mark.peers
def test_agrees_with_nngeometry():
    gram = pytest.importorskip("nngeometry.gram")
    model, x = small().float(), torch.randn(12, 4).float()
    loader = DataLoader(TensorDataset(x, torch.zeros(12).long()), batch_size=4)
    theirs = gram.GramMatrix(model=model, loader=loader, function=lambda *d: model(d[0]))
    moved = theirs.to_torch().permute(1, 0, 3, 2).flatten(2).flatten(0, 1)
    ours = ng.NTK(model, loader).to_dense()
    assert (ours - moved).norm() < 1e-5 * ours.norm()


def test_digits():
    digits = load_digits()
    x = torch.tensor(digits.images[:40])[:, None] / 16
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(192, 10)
    )
    dense = reference(oracle.jacobian(model, lambda m, e: m(e[None])[0], list(x)))["full"]
    for method in METHODS:
        close(ng.NTK(model, x, method=method).to_dense(), dense, TOLERANCE)


# --- sizes ----------------------------------------------------------------------------------------


def test_nothing_of_size_n_times_p_is_formed():
    model = nn.Sequential(nn.Linear(100, 300), nn.Tanh(), nn.Linear(300, 5))
    x = torch.randn(40, 100)
    P = sum(p.numel() for p in model.parameters())
    for method in ("structured", "matrix-free"):
        K = ng.NTK(model, x, method=method)
        with LargestTensor() as largest:
            K.diagonal() if method == "structured" else None
            K @ torch.randn(200)
            if method == "structured":
                K.to_dense()
        assert largest.numel <= max(200 * 200, 5 * P)


def test_a_kernel_past_the_limit_is_refused_with_its_size():
    K, _ = kernel(5)
    with pytest.raises(TooLargeError, match=r"the 15 x 15 matrix takes 1,800 bytes, more than"):
        K.to_dense(limit=1000)


def test_auto_goes_matrix_free_where_forms_are_too_large(monkeypatch):
    model, x = small(), torch.randn(6, 4)
    assert "factored" in ng.NTK(model, x).left._kind()
    monkeypatch.setattr(kernels, "FACTORED_BYTES", 100)
    K = ng.NTK(model, x)
    assert K.left._kind() == "matrix-free"
    close(K.to_dense(), reference(jacobian(model, x))["full"], TOLERANCE)
    assert "factored" in ng.NTK(model, x, method="structured").left._kind()


def test_many_outputs_are_matrix_free():
    model, x = nn.Linear(2, 1200), torch.randn(2, 2)
    with pytest.raises(TooLargeError, match="max_directions=1000"):
        ng.NTK(model, x, method="structured")
    K = ng.NTK(model, x)
    assert K.left._kind() == "matrix-free"
    v = torch.randn(2400)
    J = jacobian(model, x).flatten(0, 1)
    close(K @ v, J @ (J.mT @ v), TOLERANCE)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_any_scale(scale):
    model, x = small(), torch.randn(6, 4)
    base = ng.NTK(model, x, outputs="mean").to_dense()
    with torch.no_grad():
        model[2].weight *= scale
        model[2].bias *= scale
    found = ng.NTK(model, x, outputs="mean").to_dense()
    close(found, reference(jacobian(model, x))["mean"], TOLERANCE)
    assert found.shape == base.shape


def test_low_precision():
    model, x = small().float(), torch.randn(6, 4).float()
    K = ng.NTK(model, x)
    assert K.dtype == torch.float32
    dense = reference(jacobian(model.double(), x.double()))["full"]
    assert (K.to_dense() - dense).norm() < 1e-5 * dense.norm()
    close(K.double().to_dense(), K.to_dense().double(), 1e-6)


# --- stacks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5,), (2, 5), ()])
def test_a_stack_is_not_expanded_to_another_number_of_matrices(shape):
    stack = ng.aslinearoperator(torch.randn(3, 4, 4))
    assert stack.expand(2, 3, 4, 4).shape == (2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"a batch shape that \(3,\) broadcasts to, got \("):
        stack.expand(*shape, 4, 4)


def test_a_stack_of_matrices():
    A = torch.randn(3, 4, 4)
    A = A @ A.mT + torch.eye(4)
    stack = ng.aslinearoperator(A)
    assert isinstance(stack, StackLinearOperator)
    b = torch.randn(3, 4, 2)
    close(stack @ b, A @ b)
    close(stack @ b[0], A @ b[0])
    close(stack.solve(b), torch.linalg.solve(A, b))
    close(stack.damped(0.5).solve(b), torch.linalg.solve(A + 0.5 * torch.eye(4), b))
    close((2 * stack).to_dense(), 2 * A)
    close(stack.inverse().to_dense(), torch.linalg.inv(A))
    close(stack.power(0.5).to_dense() @ stack.power(0.5).to_dense(), A)
    close(stack.logdet(), torch.logdet(A))
    close(stack.trace(), A.diagonal(dim1=1, dim2=2).sum(1))
    close(stack.norm(2), torch.linalg.matrix_norm(A, 2))
    close(stack[1].to_dense(), A[1])
    close(stack[1:].to_dense(), A[1:])
    close(stack[torch.tensor([2, 0])].to_dense(), A[[2, 0]])
    close(stack[..., 1:3, :2].to_dense(), A[..., 1:3, :2])
    close(stack[:, 1, 2], A[:, 1, 2])


# --- bad input ------------------------------------------------------------------------------------


class Mixes(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 2)

    def forward(self, x):
        return self.inner(x) - self.inner(x).mean(0)


@pytest.mark.parametrize("method", ["auto", "matrix-free"])
def test_a_model_that_mixes_examples(method):
    with pytest.raises(StochasticModelError, match="treats each example on its own"):
        ng.NTK(Mixes(), torch.randn(6, 4), method=method)


def test_inputs_of_different_kinds():
    model = small()
    x = torch.randn(6, 4)
    with pytest.raises(DataError, match=r"x1 .*float64.* x2 .*int64"):
        ng.NTK(model, x, torch.ones(3, 4, dtype=torch.long))
    with pytest.raises(DataError, match=r"x1 .*2 dimensions.* x2 .*3 dimensions"):
        ng.NTK(model, x, torch.randn(3, 2, 4))
    with pytest.raises(DataError, match=r"x1 .* x2 "):
        ng.NTK(model, x, {"input": torch.randn(3, 4)})


def test_a_shuffling_loader():
    data = DataLoader(TensorDataset(torch.randn(6, 4)), batch_size=2, shuffle=True)
    for args in ((data,), (torch.randn(3, 4), data)):
        with pytest.raises(DataError, match=r"NTK.*shuffle"):
            ng.NTK(small(), *args)


@pytest.mark.parametrize("method", ["auto", "matrix-free"])
def test_no_examples(method):
    with pytest.raises(DataError, match="at least one example"):
        ng.NTK(small(), torch.randn(0, 4), method=method)


@pytest.mark.parametrize("method", ["auto", "matrix-free"])
def test_activations_that_are_not_finite(method):
    x = torch.randn(6, 4)
    x[2] = torch.nan
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        ng.NTK(small(), x, method=method).to_dense()


def test_unknown_words():
    model, x = small(), torch.randn(6, 4)
    with pytest.raises(ValueError, match=r"expected method to be one of .* got 'fast'"):
        ng.NTK(model, x, method="fast")
    with pytest.raises(ValueError, match=r"expected outputs to be one of .* got 'sum'"):
        ng.NTK(model, x, outputs="sum")
    K = ng.NTK(model, x)
    with pytest.raises(ValueError, match=r"expected outputs to be one of .* got 'sum'"):
        K.outputs("sum")
    with pytest.raises(ValueError, match="outputs 'mean' has no 'per_output': take the full one's"):
        K.outputs("mean").outputs("per_output")


def test_what_needs_one_set_of_inputs():
    model, x = small(), torch.randn(6, 4)
    K = ng.NTK(model, x, torch.randn(6, 4))
    with pytest.raises(ValueError, match="needs a kernel of one set of inputs"):
        K.center()
    with pytest.raises(ValueError, match="needs a kernel of one set of inputs"):
        K.outputs("per_example")
    with pytest.raises(UnsupportedLayerError, match="between two sets of inputs is not symmetric"):
        K.solve(torch.randn(18))
    with pytest.raises(RuntimeError, match="solve needs a square operator"):
        ng.NTK(model, x, x[:2]).solve(torch.randn(6))


def test_jacobians_that_do_not_fit():
    x = torch.randn(6, 4)
    model = small()
    J = ng.Jacobian(model, x)
    with pytest.raises(SpaceMismatchError, match=r"matrices that fit, got \(18, 51\) @ \(30, 18\)"):
        J @ ng.Jacobian(model, x, params="0.*").mT
    with pytest.raises(SpaceMismatchError, match="same parameters"):
        J @ ng.Jacobian(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)), x).mT
    losses = ng.Jacobian(model, (x, torch.zeros(6).long()), loss="categorical")
    product = J @ losses.mT  # no kernel, but a product
    close(product.to_dense(), J.to_dense() @ losses.to_dense().mT)
    with pytest.raises(SpaceMismatchError, match="as many rows for an example, got 3 and 1"):
        kernel_of(J, losses)
    nothing = (0.0 * ng.NTK(model, x)).damped(2.0)
    close(nothing.solve(torch.ones(18)), torch.full((18,), 0.5))


def test_labels_of_other_examples():
    K, _ = kernel(6)
    for y in (torch.randn(5), torch.randn(6, 2), torch.randn(7, 3)):
        with pytest.raises(SpaceMismatchError, match="expected labels of 18 examples, or"):
            ng.alignment(K, y)


# --- sets that use the network in different ways --------------------------------------------------


class Tasks(nn.Module):
    """A head for each task, and experts of which some see no example."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 4)
        self.heads = nn.ModuleList(nn.Linear(4, 2) for _ in range(3))
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        h, task = self.a(x[:, :3]).tanh(), x[:, 3].long()
        mixed = h
        for k, expert in enumerate(self.experts):
            i = (h.argmax(-1) == k).nonzero().squeeze(1)
            mixed = mixed.index_add(0, i, expert(h[i]))
        out = h.new_zeros(len(x), 2)
        for k in task.unique().tolist():
            i = (task == k).nonzero().squeeze(1)
            out = out.index_add(0, i, self.heads[k](mixed[i]))
        return out


class Decoder(nn.Module):
    """Tokens that are chosen by the network, so that a batch of one has no example axis."""

    def __init__(self):
        super().__init__()
        self.a, self.e = nn.Linear(4, 4), nn.Embedding(3, 4)
        self.cell, self.o = nn.GRUCell(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        h, token = self.a(x).tanh(), torch.zeros(len(x), dtype=torch.long)
        for _ in range(2):
            h = self.cell(self.e(token), h)
            token = self.o(h).argmax(-1)
        return self.o(h)


def rows_of(model, x):
    """(N, C, P), by loops of autograd over single examples."""
    parameters, found = list(model.parameters()), []
    for n in range(len(x)):
        for f in model(x[n : n + 1])[0]:
            rows = torch.autograd.grad(
                f, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            found.append(torch.cat([row.flatten() for row in rows]))
    return torch.stack(found).unflatten(0, (len(x), -1))


@pytest.mark.parametrize("sets", [([0, 1, 0], [2, 2]), ([0], [2, 2, 1]), ([0, 1], [2]), ([0], [1])])
@pytest.mark.parametrize("net", [Tasks, Decoder])
def test_sets_that_take_other_calls(net, sets):
    model = net()
    x1, x2 = (torch.cat([torch.randn(len(t), 3), torch.tensor(t)[:, None]], 1) for t in sets)
    J1, J2 = (rows_of(model, x) for x in (x1, x2))
    for method in METHODS:
        for kind, want in reference(J1, J2).items():
            if want is not None:
                K = ng.NTK(model, x1, x2, method=method, outputs=kind)
                close(K.to_dense(), want, TOLERANCE)
