"""Options that other packages have: against dense algebra, and against curvlinops."""

import pytest
import torch
from torch import nn

import nngeo_lazy as ng
from nngeo_lazy.errors import DataError, SpaceMismatchError, UnsupportedLayerError
from nngeo_lazy.representations import EKFAC, KFAC

from cases import close


def problem(n=20):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    return model, torch.randn(n, 4).double(), torch.randint(3, (n,))


def factors(model, x):
    """G and A (with the bias's ones) of both layers, of the exact Fisher, by autograd."""
    h = model[0](x)
    inputs = [x, h.tanh()]
    out = model[2](h.tanh())
    p = out.softmax(1).detach()
    roots = torch.linalg.cholesky(
        p.diag_embed() - p.unsqueeze(2) * p.unsqueeze(1) + 1e-14 * torch.eye(3)
    )
    G = []
    for at in (h, out):
        rows = [
            torch.autograd.grad((out * roots[:, :, r]).sum(), at, retain_graph=True)[0]
            for r in range(3)
        ]
        g = torch.stack(rows).flatten(0, 1)
        G.append(g.mT @ g / len(x))
    A = [torch.cat([each, torch.ones(len(x), 1).double()], 1).detach() for each in inputs]
    return G, [a.mT @ a / len(x) for a in A]


def joint(blocks, layers):
    """Blocks in (output, input + 1) coordinates as one matrix in flat order."""
    size = sum(o * (i + 1) for o, i in layers)
    M, start = torch.zeros(size, size).double(), 0
    for block, (o, i) in zip(blocks, layers, strict=True):
        grid = torch.arange(o * (i + 1)).view(o, i + 1)
        order = torch.cat([grid[:, :i].flatten(), grid[:, i]])
        M[start : start + len(order), start : start + len(order)] = block[order][:, order]
        start += len(order)
    return M


LAYERS = [(5, 4), (3, 5)]


def separated(A):
    A = A.clone()
    A[-1, :-1] = A[:-1, -1] = 0
    return A


def test_weights_and_biases_apart():
    model, x, y = problem()
    G, A = factors(model, x)
    F = ng.FIM(model, (x, y), KFAC(separate_bias=True))
    want = joint([torch.kron(g, separated(a)) for g, a in zip(G, A, strict=True)], LAYERS)
    close(F.to_dense(), want, 1e-6)
    together = ng.FIM(model, (x, y), "kfac")
    at = F.space.slices
    for name in F.space.names:
        close(F.block(name).to_dense(), together.block(name).to_dense(), 1e-10)
    assert float(F.to_dense()[at["0.weight"], at["0.bias"]].abs().max()) == 0
    E = ng.FIM(model, (x, y), EKFAC(separate_bias=True))
    assert float(E.to_dense()[at["0.weight"], at["0.bias"]].abs().max()) < 1e-12
    exact = ng.FIM(model, (x, y), "dense")
    close(E.trace(), exact.trace(), 1e-10)
    assert KFAC(separate_bias=True).described() == "KFAC(sharing='expand', separate_bias=True)"


def test_only_inputs_count():
    model, x, y = problem()
    _, A = factors(model, x)
    F = ng.FIM(model, (x, y), KFAC(forward_only=True), estimator="mc", seed=0)
    blocks = [torch.kron(torch.eye(len(g)), a) for g, a in zip(map(range, (5, 3)), A, strict=True)]
    close(F.to_dense(), joint(blocks, LAYERS), 1e-10)


@pytest.mark.parametrize("use_pi", [True, False])
@pytest.mark.parametrize("minimum", [0.0, 0.3])
def test_factored_damping(use_pi, minimum):
    model, x, y = problem()
    G, A = factors(model, x)
    F = ng.FIM(model, (x, y), "kfac").damped(0.04, "factored", use_pi=use_pi, minimum=minimum)
    blocks = []
    for g, a in zip(G, A, strict=True):
        pi = (a.trace() / len(a) / (g.trace() / len(g))).sqrt() if use_pi else torch.tensor(1.0)
        left, right = ((0.2 / pi).clamp_min(minimum), (0.2 * pi).clamp_min(minimum))
        blocks.append(torch.kron(g + left * torch.eye(len(g)), a + right * torch.eye(len(a))))
    close(F.to_dense(), joint(blocks, LAYERS), 1e-6)


@pytest.mark.parametrize("representation", ["dense", "kfac", "ekfac", "diagonal", "low_rank"])
@pytest.mark.parametrize("atol", [1e-3, 0.02, 100.0])
def test_an_absolute_cut_off(representation, atol):
    model, x, y = problem()
    F = ng.FIM(model, (x, y), representation)
    values, vectors = torch.linalg.eigh(F.to_dense())
    kept = torch.where(values > atol, 1 / values, 0)
    close(F.pinv(atol=atol).to_dense(), vectors @ kept.diag() @ vectors.mT, 1e-7)
    largest = float(values[-1])
    cut = max(0.1 * largest, atol)
    kept = torch.where(values > cut, 1 / values, 0)
    both = F.pinv(0.1, atol=atol).to_dense()
    close(both, vectors @ kept.diag() @ vectors.mT, 1e-7)
    close(torch.linalg.pinv(F, atol=atol).to_dense(), F.pinv(atol=atol).to_dense(), 1e-12)


@pytest.mark.parametrize("representation", ["dense", "kfac", "diagonal", "low_rank"])
@pytest.mark.parametrize("cut", [{"atol": 0.02}, {"rcond": 0.1}, {"atol": 0.02, "rcond": 0.1}, {}])
def test_least_squares_with_a_cut_off(representation, cut):
    model, x, y = problem()
    F = ng.FIM(model, (x, y), representation)
    b = F.space.randn(2)
    U, S, Vh = torch.linalg.svd(F.to_dense())
    at = max(cut.get("atol", 0.0), cut.get("rcond", 0.0) * float(S[0])) or 1e-12 * float(S[0])
    kept = (at < S).double() / S.clamp_min(1e-300)
    want = Vh.mT @ (kept[:, None] * (U.mT @ b))
    close(ng.lstsq(F, b, **cut), want, 1e-6)
    named = ng.lstsq(F, F.space.unravel(b[:, 0]), **cut)
    close(F.space.ravel(named), want[:, 0], 1e-6)
    J = ng.Jacobian(model, x)
    rows = torch.randn(60).double()
    U, S, Vh = torch.linalg.svd(J.to_dense(), full_matrices=False)
    at = max(cut.get("atol", 0.0), cut.get("rcond", 0.0) * float(S[0])) or 1e-13 * float(S[0])
    kept = (at < S).double() / S.clamp_min(1e-300)
    close(ng.lstsq(J, rows, **cut), Vh.mT @ (kept * (U.mT @ rows)), 1e-6)
    if not cut:
        theirs = torch.linalg.lstsq(J.to_dense(), rows[:, None], driver="gelsd").solution[:, 0]
        close(J @ ng.lstsq(J, rows), J @ theirs, 1e-8)


def test_each_representation_of_a_mixture_has_its_own_damping():
    model, x, y = problem()
    options = ng.representations.Mixed("kfac", {"2": "diagonal"})
    F = ng.FIM(model, (x, y), options)
    G, A = factors(model, x)
    pi = (A[0].trace() / 5 / (G[0].trace() / 5)).sqrt()
    left, right = G[0] + 0.2 / pi * torch.eye(5), A[0] + 0.2 * pi * torch.eye(5)
    kronecker = joint([torch.kron(left, right)], LAYERS[:1])
    v = F.space.randn()
    first = torch.linalg.solve(kronecker, v[:25])
    last = v[25:] / (F.block("2").diagonal() + 0.3)
    found = F.damped({"0": 0.04, "2": 0.3}, "factored").solve(v)
    close(found, torch.cat([first, last]), 1e-6)


def test_a_head_that_grows():
    model, x, y = problem()
    grown = nn.Sequential(model[0], nn.Tanh(), nn.Linear(5, 4)).double()
    F = ng.FIM(model, (x, y), "kfac")
    anchor = F.space.unravel(F.space.values(model).detach().clone())
    with pytest.raises(SpaceMismatchError, match=r"'2.weight', '2.bias'.*F.space.common"):
        ng.ewc_penalty(grown, [(F, anchor)])
    shared = F.space.common(ng.ParamSpace.of(grown))
    assert shared.names == ("0.weight", "0.bias")
    with torch.no_grad():
        grown[0].weight.add_(0.1)
    block = F.block(list(shared.names))
    start = torch.cat([anchor[name].flatten() for name in shared.names])
    moved = shared.values(grown) - start
    want = moved @ block.to_dense() @ moved / 2
    close(ng.ewc_penalty(grown, [(block, start)]), want, 1e-12)
    with pytest.raises(SpaceMismatchError, match="same name and shape in both"):
        F.space.common(ng.ParamSpace({"other": (2,)}))


# --- scores of positions, covariances of outputs --------------------------------------------------


class Sequences(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):  # positions meet in a mean
        h = self.inner(x).tanh()
        return self.head(h + h.mean(1, keepdim=True))


def sequences(n=6, t=4):
    torch.manual_seed(0)
    labels = torch.randint(3, (n, t))
    labels[0, 1] = -100
    return Sequences().double(), torch.randn(n, t, 4).double(), labels


def scores_of_positions(model, x, y):
    """(N T, P) by a loop, zero rows of what is ignored."""
    rows = []
    for one, labels in zip(x, y, strict=True):
        for k, label in enumerate(labels):
            loss = nn.functional.cross_entropy(model(one[None])[0, k : k + 1], label[None])
            loss = loss.nan_to_num(0.0) if label < 0 else loss
            grads = torch.autograd.grad(loss, list(model.parameters()))
            rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows) * (y.flatten() >= 0).unsqueeze(1)


REPRESENTATIONS = ["dense", "block_diagonal", "diagonal", "low_rank", "implicit", "factored"]
LIKELIHOOD = ng.likelihoods.Categorical(class_dim=-1)


@pytest.mark.parametrize("representation", REPRESENTATIONS)
def test_scores_of_positions(representation):
    model, x, y = sequences()
    options = {"likelihood": LIKELIHOOD, "estimator": "empirical_positions"}
    F = ng.FIM(model, [(x[:4], y[:4]), (x[4:], y[4:])], representation, **options)
    rows = scores_of_positions(model, x, y)
    want = rows.mT @ rows / 6
    if representation == "block_diagonal":
        want = want * torch.block_diag(torch.ones(25, 25), torch.ones(18, 18)).double()
    if representation == "diagonal":
        want = want.diagonal().diag()
    close(F.to_dense(), want, 1e-9)
    whole = ng.FIM(model, (x, y), "dense", likelihood=LIKELIHOOD, estimator="empirical")
    assert float((whole.to_dense() - want).norm()) > 0.1 * float(want.norm())


def test_scores_of_positions_are_held_fixed():
    model, x, y = sequences()
    options = {"likelihood": LIKELIHOOD, "estimator": "empirical_positions"}
    F = ng.FIM(model, (x, y), "implicit", **options)
    w = F.space.values(model).detach().requires_grad_()
    with pytest.raises(UnsupportedLayerError, match="nor has 'empirical_positions', which"):
        torch.autograd.grad((F.at(w) @ w.detach()).sum(), w)
    F.at(w.detach()) @ w.detach()


def test_scores_of_positions_need_positions():
    model, x, y = sequences()
    with pytest.raises(DataError, match="a loss that is a sum over positions"):
        ng.GGN(
            model,
            (x, y),
            "dense",
            loss=lambda f, y: f.square().sum((1, 2)),
            estimator="empirical_positions",
        )
    with pytest.raises(DataError, match="take estimator='empirical', 'mc' or 'exact'"):
        ng.optim.NaturalGradient(model, "kfac", "categorical", estimator="empirical_positions")


CENTERED = ["dense", "block_diagonal", "diagonal", "quasi_diagonal", "low_rank", "factored"]


@pytest.mark.parametrize("representation", CENTERED)
def test_the_covariance_of_the_outputs_gradients(representation):
    model, x, _ = problem()
    batches = [(x[:12],), (x[12:],)]
    options = {"likelihood": ng.likelihoods.Gaussian(2.0), "center": True}
    F = ng.FIM(model, batches, representation, **options)
    J = ng.Jacobian(model, x, "dense").to_dense().view(20, 3, -1)
    J = J - J.mean(0)
    want = torch.einsum("ncp,ncq->pq", J, J) / 20 / 2
    close(F.diagonal(), want.diagonal(), 1e-9)
    if representation in ("dense", "low_rank", "factored"):
        close(F.to_dense(), want, 1e-9)
    if representation == "block_diagonal":
        close(F.to_dense()[:25, :25], want[:25, :25], 1e-9)
    if representation == "quasi_diagonal":
        close(F.to_dense()[20, 0], want[20, 0], 1e-9)


def test_covariances_that_are_none():
    model, x, y = problem()
    with pytest.raises(DataError, match="or likelihood='gaussian'"):
        ng.FIM(model, (x, y), "dense", center=True)
    with pytest.raises(DataError, match="take a stored representation, such as 'low_rank'"):
        ng.FIM(model, (x,), "implicit", likelihood="gaussian", center=True)
    ng.FIM(model, (x,), "low_rank", likelihood="gaussian", center=True)


@pytest.mark.peers
def test_their_centered_covariance():
    backend = pytest.importorskip("nngeometry.backend")
    pspace = pytest.importorskip("nngeometry.object.pspace")
    model, x, y = problem()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 20)
    made = backend.TorchHooksJacobianBackend(
        model=model, function=lambda *d: model(d[0]), centering=True
    )
    theirs = pspace.PMatDense(generator=made, examples=loader).to_torch()
    F = ng.FIM(model, (x,), "dense", likelihood="gaussian", center=True)
    close(F.to_dense(), theirs, 1e-6)


@pytest.mark.peers
def test_their_scores_of_positions():
    curvlinops = pytest.importorskip("curvlinops")
    model, x, y = sequences()
    y = y.clamp_min(0)
    theirs = curvlinops.EFLinearOperator(
        lambda_module(model), nn.CrossEntropyLoss(), list(model.parameters()), [(x, y)]
    )
    F = ng.FIM(model, (x, y), likelihood=LIKELIHOOD, estimator="empirical_positions", **DENSE)
    close(F.to_dense() / 4, dense(theirs), 1e-6)  # theirs is a mean over positions


DENSE = {"representation": "dense"}


def lambda_module(model):
    """Classes in dimension 1, as torch's cross-entropy wants them."""

    class Moved(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x).movedim(-1, 1)

    return Moved()


# --- curvlinops -----------------------------------------------------------------------------------


def peer(model, x, y, **options):
    curvlinops = pytest.importorskip("curvlinops")
    loss, parameters = nn.CrossEntropyLoss(), list(model.parameters())
    return curvlinops, curvlinops.KFACLinearOperator(
        model, loss, parameters, [(x, y)], fisher_type=options.pop("kind", "type-2"), **options
    )


def dense(operator):
    return torch.as_tensor(operator @ torch.eye(operator.shape[1]).double())


@pytest.mark.peers
@pytest.mark.parametrize("apart", [True, False])
def test_their_blocks(apart):
    model, x, y = problem()
    _, theirs = peer(model, x, y, separate_weight_and_bias=apart)
    F = ng.FIM(model, (x, y), KFAC(separate_bias=apart))
    close(F.to_dense(), dense(theirs), 1e-5)


@pytest.mark.peers
def test_their_forward_only():
    model, x, y = problem()
    _, theirs = peer(model, x, y, kind="forward-only", separate_weight_and_bias=False)
    F = ng.FIM(model, (x, y), KFAC(forward_only=True), estimator="mc", seed=0)
    close(F.to_dense(), dense(theirs), 1e-5)


@pytest.mark.peers
@pytest.mark.parametrize("minimum", [1e-8, 0.3])
def test_their_factored_damping(minimum):
    model, x, y = problem()
    curvlinops, theirs = peer(model, x, y, separate_weight_and_bias=False)
    F = ng.FIM(model, (x, y), "kfac")
    inverse = curvlinops.KFACInverseLinearOperator(
        theirs, damping=0.04, use_heuristic_damping=True, min_damping=minimum
    )
    ours = F.damped(0.04, "factored", minimum=minimum).inverse()
    close(ours.to_dense(), dense(inverse), 1e-5)
    inverse = curvlinops.KFACInverseLinearOperator(theirs, damping=(0.2, 0.2))
    ours = F.damped(0.04, "factored", use_pi=False).inverse()
    close(ours.to_dense(), dense(inverse), 1e-5)
