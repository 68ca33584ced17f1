"""Options that other packages have: against dense algebra, and against curvlinops."""

import pytest
import torch
from torch import nn

import nngeo_lazy as ng
from nngeo_lazy.errors import SpaceMismatchError
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
