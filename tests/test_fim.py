"""FIM against the dense oracle: networks x likelihoods x estimators x representations, float64."""

import pytest
import torch
from torch import nn

import nngeo_lazy as ng
from nngeo_lazy.errors import NonFiniteError

import oracle
import zoo
from cases import LIKELIHOODS, Case, close

pytestmark = [
    pytest.mark.usefixtures("float64"),
    # torch's own, on padding="same" with an even kernel
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
]

CASES = [
    pytest.param(net, likelihood, estimator, id=f"{net.__name__}-{likelihood}-{estimator}")
    for net in zoo.NETS
    for likelihood in LIKELIHOODS
    for estimator in ("exact", "mc", "empirical")
]


@pytest.mark.parametrize(("net", "likelihood", "estimator"), CASES)
def test_every_representation_agrees_with_the_oracle(net, likelihood, estimator):
    case = Case(net(), likelihood, estimator)
    expected = case.expected()

    dense = case.build("dense")
    close(dense.to_dense(), expected)
    assert dense.space == ng.ParamSpace.of(case.net.model)
    assert dense.num_examples == len(case.net.examples)

    close(case.build("diagonal").diagonal(), expected.diagonal())
    close(case.build("low_rank").to_dense(), expected)
    close(case.build("quasi_diagonal").diagonal(), expected.diagonal())

    blocks = case.build("block_diagonal")
    close(blocks.to_dense(), masked(expected, blocks.space))

    ekfac = case.build("ekfac")
    check_ekfac(ekfac, expected)
    assert not any(F.requires_grad for F in (dense, blocks, ekfac))
    fallback = {row.parameter for row in case.build("kfac").report() if "general" in row.form}
    assert fallback == set(case.net.general)


def masked(matrix, space):
    """The blocks of modules that own parameters, zero elsewhere."""
    owner = [
        space.owner(n)
        for n in space.names
        for _ in range(space.slices[n].stop - space.slices[n].start)
    ]
    same = torch.tensor([[a == b for b in owner] for a in owner])
    return torch.where(same, matrix, torch.zeros(()))


def check_ekfac(ekfac, expected):
    """Yardstick 6: the orthogonal projection of each block onto its eigenbasis."""
    for block, layout in zip(ekfac.members, ekfac.layouts, strict=True):
        where = layout.positions()
        exact = expected[where][:, where]
        p = len(where)
        if not hasattr(block, "bases"):
            close(block.diagonal(), exact.diagonal())
            continue
        Q = block.unrotate(torch.eye(p))
        close(Q.mT @ Q, torch.eye(p))
        close(block.eigenvalues.flatten(), (Q.mT @ exact @ Q).diagonal())
        close(block.trace(), exact.trace())
        E = block.to_dense()
        close(E.square().sum() + (exact - E).square().sum(), exact.square().sum())


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("estimator", ["exact", "empirical"])
@pytest.mark.parametrize("kind", ["mlp", "sequence", "convolutions", "conv1d"])
def test_kfac_factors(kind, estimator, sharing):
    """The factors by their definition, from hooks on a network without in-place operations."""
    net = getattr(zoo, kind)()
    for module in net.model.modules():
        if hasattr(module, "inplace"):
            module.inplace = False
    case = Case(net, "categorical", estimator)
    F = case.build(ng.representations.KFAC(sharing=sharing))
    modules = dict(net.model.named_modules())
    checked = 0
    for name, block in zip(F.names, F.members, strict=True):
        left, right = reference_factors(case, modules[name], sharing)
        close(block.left, left)
        close(block.right, right)
        checked += 1
    assert checked == len({n.rpartition(".")[0] for n, _ in net.model.named_parameters()})


def reference_factors(case, module, sharing):
    seen = {}
    handle = module.register_forward_hook(lambda m, a, out: seen.update(x=a[0], y=out))
    out = case.net.model(case.net.batch)
    handle.remove()
    x, n = seen["x"].detach(), out.shape[0]
    groups = getattr(module, "groups", 1)
    linear = isinstance(module, nn.Linear)
    x = x.reshape(n, 1, -1, x.shape[-1]) if linear else patches(module, x)  # (N,G,T,i)
    if module.bias is not None:
        x = torch.cat([x, torch.ones(*x.shape[:-1], 1)], -1)
    total, positions = 0.0, x.shape[2]
    nll = oracle.NLL["categorical"]
    flat = out.reshape(n, -1)
    for k in range(n):
        f = out[k].detach()
        if case.estimator == "empirical":
            S = torch.func.grad(nll)(f, case.labels[k]).reshape(-1, 1)
        else:
            H = torch.func.hessian(nll)(f, case.labels[k]).reshape(f.numel(), -1)
            values, vectors = torch.linalg.eigh(H)
            S = vectors * values.clamp_min(0).sqrt()
        for s in S.mT:
            (g,) = torch.autograd.grad(flat[k] @ s, seen["y"], retain_graph=True)
            g = g[k]
            if isinstance(module, nn.Linear):
                g = g.reshape(1, -1, g.shape[-1])
            else:
                g = g.reshape(groups, g.shape[0] // groups, -1).mT  # (G,T,o)
            g = g.sum(1, keepdim=True) if sharing == "reduce" else g
            total = total + g.mT @ g
    if sharing == "reduce":
        x, positions = x.mean(2, keepdim=True), 1
    return total / n, torch.einsum("ngti,ngtj->gij", x, x) / (n * positions)


def patches(module, x):
    """(N, G, T, i) by convolving with one-hot kernels."""
    nd = x.dim() - 2
    shape = (module.in_channels // module.groups, *module.kernel_size)
    width = torch.Size(shape).numel()
    kernel = torch.eye(width).reshape(width, *shape).repeat(module.groups, *[1] * (nd + 1))
    copy = type(module)(
        module.in_channels,
        width * module.groups,
        module.kernel_size,
        module.stride,
        module.padding,
        module.dilation,
        module.groups,
        bias=False,
        padding_mode=module.padding_mode,
    )
    copy.weight.data = kernel
    u = copy(x).detach()
    return u.reshape(len(x), module.groups, width, -1).mT


@pytest.mark.parametrize("likelihood", list(LIKELIHOODS))
def test_monte_carlo(likelihood):
    """Seeded, the same draws in every representation and pass, and unbiased."""
    case = Case(zoo.mlp(), likelihood, "mc")
    dense = case.build("dense", seed=3, samples=2)
    assert torch.equal(dense.to_dense(), case.build("dense", seed=3, samples=2).to_dense())
    assert not torch.allclose(dense.to_dense(), case.build("dense", seed=4, samples=2).to_dense())
    close(case.build("diagonal", seed=3, samples=2).diagonal(), dense.diagonal())
    check_ekfac(case.build("ekfac", seed=3, samples=2), dense.to_dense())
    many = case.build("dense", seed=0, samples=4000).to_dense()
    case.estimator = "exact"
    exact = case.expected()
    assert (many - exact).norm() < 0.1 * exact.norm()


def test_unequal_batches_are_one_mean():
    net = zoo.mlp()
    x, y = net.batch, torch.randint(3, (6,))
    whole = ng.FIM(net.model, (x, y), "dense")
    batches = [(x[:1], y[:1]), (x[1:5], y[1:5]), (x[5:], y[5:])]
    for representation in ("dense", "kfac", "ekfac", "diagonal"):
        F = ng.FIM(net.model, batches, representation)
        close(F.to_dense(), ng.FIM(net.model, (x, y), representation).to_dense())
        assert F.num_examples == F.num_terms == 6
    close(whole.to_dense(), ng.FIM(net.model, batches, "dense").to_dense())


def test_masked_terms_count_as_zero_of_n_examples():
    net = zoo.gpt()
    x = net.batch
    y = torch.randint(7, x.shape)
    y[0], y[1, 1:] = -100, -100
    F = ng.FIM(net.model, (x, y), "dense", likelihood="categorical", estimator="empirical")
    keep = [1, 2]
    J = oracle.jacobian(net.model, net.call, [x[k] for k in keep])
    total = 0.0
    for j, k in zip(J, keep, strict=True):
        f = net.model(x[k : k + 1]).detach()[0]
        used = y[k] != -100
        s = torch.zeros_like(f)
        s[used] = torch.func.grad(oracle.nll_categorical)(f[used], y[k][used])
        total = total + torch.outer(j.T @ s.flatten(), j.T @ s.flatten())
    close(F.to_dense(), total / 3)
    assert (F.num_examples, F.num_terms) == (3, 4)


def test_compiled_model_is_the_plain_one():
    net = zoo.mlp()
    compiled = torch.compile(net.model, backend="eager")
    compiled(net.batch)
    data = (net.batch, torch.randint(3, (6,)))
    F, G = ng.FIM(compiled, data), ng.FIM(net.model, data)
    assert F.space == G.space
    close(F.to_dense(), G.to_dense())


def test_a_chosen_part_of_the_parameters():
    net = zoo.convolutions()
    data = (net.batch, torch.randint(3, (4,)))
    whole = ng.FIM(net.model, data, "dense")
    for selector in (
        "9",
        "*.bias",
        nn.Conv2d,
        net.model[2],
        lambda name, p: p.dim() == 1,
        ["0", "9"],
    ):
        F = ng.FIM(net.model, data, "dense", params=selector)
        where = torch.cat(
            [torch.arange(len(whole.space))[whole.space.slices[n]] for n in F.space.names]
        )
        close(F.to_dense(), whole.to_dense()[where][:, where])
        E = ng.FIM(net.model, data, "ekfac", params=selector)
        check_ekfac(E, F.to_dense())
    frozen = net.model.requires_grad_(False)
    close(ng.FIM(frozen, data, "dense", params="*").to_dense(), whole.to_dense())
    assert not any(p.requires_grad for p in frozen.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("representation", ["dense", "block_diagonal", "diagonal", "kfac", "ekfac"])
def test_low_precision_models(dtype, representation):
    net = zoo.norms() if dtype == torch.float32 else zoo.mlp()
    data = (net.batch, torch.randint(3, (len(net.batch),)))
    expected = ng.FIM(net.model, data, representation).to_dense()
    F = ng.FIM(net.model.to(dtype), (data[0].to(dtype), data[1]), representation)
    assert F.dtype == torch.float32
    error = (F.to_dense().double() - expected).norm() / expected.norm()
    assert error < (1e-4 if dtype == torch.float32 else 0.1)
    grad = F.space.randn().to(dtype)
    assert F.solve(grad, damping=1e-2).isfinite().all()


def test_large_factors_are_kept_diagonal():
    case = Case(zoo.mlp(), "categorical", "exact")
    F = case.build(ng.representations.KFAC(max_factor=4))
    assert [(b.left.dim(), b.right.dim()) for b in F.members] == [(2, 2), (3, 2)]
    full = case.build("kfac")
    close(F.members[0].right, full.members[0].right.diagonal(dim1=-2, dim2=-1))
    close(F.members[0].left, full.members[0].left.diagonal(dim1=-2, dim2=-1))


def test_progress_bar(capsys):
    net = zoo.mlp()
    ng.FIM(net.model, (net.batch, torch.randint(3, (6,))), progress=True)
    assert "1/1" in capsys.readouterr().err


def test_shuffling_loader_reuses_draws_in_both_passes():
    net = zoo.mlp()
    data = torch.utils.data.TensorDataset(net.batch, torch.randint(3, (6,)))
    loader = torch.utils.data.DataLoader(data, batch_size=2, shuffle=True)
    state = torch.get_rng_state()
    E = ng.FIM(net.model, loader, "ekfac", estimator="mc", seed=1)
    assert torch.equal(state, torch.get_rng_state())
    D = ng.FIM(net.model, loader, "dense", estimator="mc", seed=1)
    check_ekfac(E, D.to_dense())


@pytest.mark.parametrize("sampled", [3, 32])
@pytest.mark.parametrize("net", [zoo.mlp, zoo.convolutions, zoo.norms, zoo.mapping, zoo.recurrent])
def test_large_batches_are_cut_into_pieces(net, sampled, monkeypatch):
    monkeypatch.setattr("nngeo_lazy.jacobian.passes.PIECE_BYTES", {"cpu": 1})
    monkeypatch.setattr("nngeo_lazy.jacobian.passes.PIECE_EXAMPLES", 3)
    monkeypatch.setattr("nngeo_lazy.jacobian.capture.SAMPLED", sampled)
    monkeypatch.setattr("nngeo_lazy.jacobian.capture.SMALL", sampled)
    sizes = []
    case = Case(net(), "categorical", "exact")
    case.net.model.register_forward_pre_hook(
        lambda m, a, k: sizes.append(len(next(iter((*a, *k.values()))))), with_kwargs=True
    )
    F = case.build("dense")
    assert sizes[0] == min(sampled, len(case.net.examples))
    assert max(sizes[1:]) <= 3  # as many as are passed on their own, too
    close(F.to_dense(), case.expected())
    assert F.num_examples == len(case.net.examples)
    check_ekfac(case.build("ekfac"), case.expected())


class Policy(nn.Module):
    """Logits of actions, some of which an example rules out."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.body, self.head, self.how = nn.Linear(4, 6), nn.Linear(6, 3), how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.head(self.body(x).tanh())
        out = (x[:, :1] > 0) & (torch.arange(3) == 2)
        if self.how == "filled":
            return logits.masked_fill(out, -torch.inf)
        return logits + torch.zeros_like(logits).masked_fill(out, -torch.inf)


@pytest.mark.parametrize("how", ["filled", "added"])
def test_classes_that_an_example_rules_out(float64, how):
    model, x, y = Policy(how), torch.randn(10, 4), torch.randint(2, (10,))
    parameters = list(model.parameters())
    want, hessian = 0, 0
    for a, label in zip(x, y, strict=True):
        free = model(a[None])[0]
        free = free[free.isfinite()]  # the others are constants
        p = free.softmax(0).detach()
        flat = [torch.autograd.grad(f, parameters, retain_graph=True) for f in free]
        J = torch.stack([torch.cat([g.flatten() for g in row]) for row in flat])
        want = want + J.mT @ (p.diag() - torch.outer(p, p)) @ J / len(x)
        slopes = torch.autograd.grad(
            nn.functional.cross_entropy(free, label), parameters, create_graph=True
        )
        slope = torch.cat([g.flatten() for g in slopes])
        rows = [torch.autograd.grad(g, parameters, retain_graph=True) for g in slope]
        hessian = hessian + torch.stack([torch.cat([h.flatten() for h in row]) for row in rows])
    for representation in ("dense", "implicit", "factored"):
        F = ng.FIM(model, (x, y), representation, likelihood="categorical")
        torch.testing.assert_close(F.to_dense(), want)
    F = ng.FIM(model, (x, y), "diagonal", likelihood="categorical")
    torch.testing.assert_close(F.diagonal(), want.diagonal())
    H = ng.Hessian(model, (x, y), loss="categorical")
    torch.testing.assert_close(H.to_dense(), hessian / len(x))
    predicted = ng.Laplace(model, F).predictive(x)
    assert torch.equal(predicted == 0, model(x).isneginf())
    optimizer = ng.optim.NaturalGradient(model, "kfac", "categorical", lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_an_example_needs_a_class():
    model, x = nn.Linear(4, 3), torch.randn(5, 4)

    def forward(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return model(x).masked_fill(x[:, :1] > -torch.inf, -torch.inf)

    for representation in ("kfac", "implicit"):
        with pytest.raises(NonFiniteError, match="expected finite outputs"):
            ng.FIM(model, x, representation, likelihood="categorical", forward=forward)
    with pytest.raises(NonFiniteError, match="expected finite outputs"):  # of real numbers
        ng.FIM(Policy("filled"), x, "kfac", likelihood="gaussian")
