"""Weights that a model makes of its parameters, and positions that have no part in a block."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import nngeo_lazy as ng
from nngeo_lazy.errors import DataError
from nngeo_lazy.likelihoods import Gaussian
from nngeo_lazy.representations import KFAC

import oracle
import zoo
from cases import close

pytestmark = pytest.mark.usefixtures("float64")
GENERAL = "per example: general"


def fisher(net, representation="dense", **options):
    likelihood = Gaussian(oracle.VARIANCE)
    return ng.FIM(net.model, net.batch, representation, likelihood=likelihood, **options)


def expected(net):
    with torch.no_grad():
        out = torch.cat([oracle.outputs(net.model, net.call, e) for e in net.examples])
    return oracle.fisher(net.model, net.call, net.examples, "gaussian", "exact", out)


def forms(F):
    return {row.parameter: row.form for row in F.report()}


# --- weights that are made of others --------------------------------------------------------------


class Rms(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(d))

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Vision(nn.Module):
    """A class token, a longer position table, and one of relative positions."""

    def __init__(self, d=4):
        super().__init__()
        self.cls, self.pos = nn.Parameter(torch.randn(1, 1, d)), nn.Parameter(torch.randn(1, 9, d))
        self.table, self.scale = nn.Parameter(torch.randn(7, 2)), nn.Parameter(torch.randn(d))
        self.norm, self.head = Rms(d), nn.Linear(d, 3)
        self.register_buffer("index", torch.randint(0, 7, (5, 5)))

    def forward(self, x):
        h = torch.cat([self.cls.expand(len(x), -1, -1), x], 1)
        h = self.norm(h + self.pos[:, : h.shape[1]])
        bias = self.table[self.index.view(-1)].view(5, 5, 2).permute(2, 0, 1)
        a = (torch.stack([h, -h], 1) @ h.mT.unsqueeze(1) + bias.unsqueeze(0)).softmax(-1)
        h = h + self.scale * (a.sum(1) @ h)
        return self.head(h[:, 0])


class Fused(nn.Module):
    """Chunks of one projection, a transposed weight, and a matrix on the left."""

    def __init__(self, d=4):
        super().__init__()
        self.w, self.t = nn.Parameter(torch.randn(3 * d, d)), nn.Parameter(torch.randn(d, d))
        self.left, self.b = nn.Parameter(torch.randn(3, 5)), nn.Parameter(torch.randn(3 * d))

    def forward(self, x):
        w, b = self.w.chunk(3), self.b.chunk(3)
        q, k, v = (F.linear(x, each, bias) for each, bias in zip(w, b, strict=True))
        h = (q @ k.mT).softmax(-1) @ v @ self.t.T
        return (self.left @ h).flatten(1)


class Experts(nn.Module):
    """Weights of three dimensions in einsum, bmm and baddbmm."""

    def __init__(self, d=4):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(2, d, 5)), nn.Parameter(torch.randn(2, 5, d))
        self.again, self.bias = (
            nn.Parameter(torch.randn(2, d, 3)),
            nn.Parameter(torch.randn(2, 1, 3)),
        )

    def forward(self, x):
        h = torch.einsum("ntd,edh->enth", x, self.up).tanh()
        h = torch.einsum("enth,ehd->entd", h, self.down)
        h = h.flatten(1, 2)  # (2, N T, d)
        h = torch.baddbmm(self.bias, h, self.again) + torch.bmm(h, self.again).tanh()
        return h.unflatten(1, (len(x), -1)).sum((0, 2))


class Adapted(nn.Module):
    """Weights that are scaled, standardised, shifted and multiplied."""

    def __init__(self, d=4):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(2, d)), nn.Parameter(torch.randn(d, 2))
        self.register_buffer("base", torch.randn(d, d))
        self.m, self.g = nn.Parameter(torch.randn(d)), nn.Parameter(torch.randn(d))
        self.conv = nn.Conv1d(3, 2, 2)

    def forward(self, x):  # (N, 3, d)
        w = self.base + self.b @ self.a
        w = self.m[:, None] * w / w.norm(dim=1, keepdim=True)
        h = F.linear(x, w).tanh() * (1 + self.g) / (2 + self.g.square())
        k = self.conv.weight
        k = F.batch_norm(k.reshape(1, 2, -1), None, None, training=True).reshape_as(k)
        return F.conv1d(h, k, self.conv.bias).flatten(1)


class Packed(nn.Module):
    """Functions of which nothing is known: attention with a bias, a bilinear grid, an LSTM."""

    def __init__(self, d=4):
        super().__init__()
        self.bias = nn.Parameter(torch.randn(1, 5, 5))
        self.rnn = nn.LSTM(d, 3, batch_first=True)
        self.prototypes = nn.Parameter(torch.randn(2, 3))

    def forward(self, x):
        h = F.scaled_dot_product_attention(x, x, x, attn_mask=self.bias)
        return torch.cdist(self.rnn(h)[0], self.prototypes).flatten(1)


DERIVED = {
    "vision": (Vision, (6, 4, 4)),
    "fused": (Fused, (6, 5, 4)),
    "experts": (Experts, (6, 5, 4)),
    "adapted": (Adapted, (6, 3, 4)),
    "packed": (Packed, (6, 5, 4)),
}


@pytest.mark.parametrize("name", DERIVED)
def test_weights_that_are_made_of_others(name):
    """All representations are exact, and the model runs no more often than a linear layer."""
    make, shape = DERIVED[name]
    net = zoo.simple(make(), torch.randn(*shape))
    plain = nn.Sequential(nn.Flatten(), nn.Linear(net.batch[0].numel(), 2))
    calls, simplest = [], []
    net.model.register_forward_hook(lambda *_: calls.append(1))
    plain.register_forward_hook(lambda *_: simplest.append(1))
    F_ = fisher(net)
    ng.FIM(plain, net.batch, "dense", likelihood=Gaussian(1.0))
    assert len(calls) == len(simplest)
    assert GENERAL not in forms(F_).values()
    close(F_.to_dense(), expected(net))
    close(fisher(net, "diagonal").diagonal(), expected(net).diagonal())


def test_the_number_of_forward_passes_does_not_depend_on_depth():
    counts = []
    for depth in (1, 6):
        blocks = [nn.Sequential(Rms(4), nn.Linear(4, 4), nn.Tanh()) for _ in range(depth)]
        model = nn.Sequential(*blocks)
        calls = []
        model.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        ng.FIM(model, torch.randn(40, 4), "kfac", likelihood=Gaussian(1.0))
        counts.append(len(calls))
    assert counts[0] == counts[1]


def test_kronecker_blocks_of_chunks_and_experts():
    """The blocks of a fused projection are those of three projections, one for each expert's."""
    torch.manual_seed(0)
    x, model = torch.randn(6, 5, 4), Fused()
    F_ = ng.FIM(model, x, "kfac", likelihood=Gaussian(1.0))
    found = {row.parameter: row.block for row in F_.report()}
    assert found["w"] == found["b"] == "Kronecker (4x4) x (5x5)"
    assert found["t"] == "Kronecker (4x4) x (4x4)"
    layers = [nn.Linear(4, 4) for _ in range(3)]
    for k, layer in enumerate(layers):
        layer.weight.data = model.w.data.chunk(3)[k].clone()
        layer.bias.data = model.b.data.chunk(3)[k].clone()

    class Apart(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = layers

        def forward(self, x):
            h = (self.q(x) @ self.k(x).mT).softmax(-1) @ self.v(x) @ model.t.detach().T
            return (model.left.detach() @ h).flatten(1)

    G = ng.FIM(Apart(), x, "kfac", likelihood=Gaussian(1.0))
    mine = [m for m in F_.members if m.shape[0] == 20]
    for one, other in zip(mine, G.members, strict=True):
        close(one.to_dense(), other.to_dense())
    E = ng.FIM(Experts(), x, "kfac", likelihood=Gaussian(1.0))
    blocks = {row.parameter: row.block for row in E.report()}
    assert blocks["up"] == "Kronecker 2 x (5x5) x (4x4)"
    assert blocks["down"] == "Kronecker 2 x (4x4) x (5x5)"


def test_kronecker_factors_of_an_einsum():
    torch.manual_seed(0)
    w, x = nn.Parameter(torch.randn(2, 4, 3)), torch.randn(6, 5, 4)

    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = w

        def forward(self, x):
            return torch.einsum("ntd,edh->neth", x, self.w).flatten(1)

    (block,) = ng.FIM(Product(), x, "kfac", likelihood=Gaussian(1.0)).members
    close(block.right, torch.einsum("ntd,ntf->df", x, x).expand(2, 4, 4) / 30)
    close(block.left, 5 * torch.eye(3).expand(2, 3, 3))


class Hadamard(torch.autograd.Function):
    """A product that is written by hand, as adapters do for the sake of memory."""

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return a * b

    @staticmethod
    def backward(ctx, g):
        a, b = ctx.saved_tensors
        return g * b, (g * a).sum(0) if g.dim() > b.dim() else g * a


class ByHand(nn.Module):
    def __init__(self, of_data):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(3, 4))
        self.scale, self.of_data = nn.Parameter(torch.randn(4)), of_data

    def forward(self, x):
        if self.of_data:
            x = Hadamard.apply(x, self.scale)
        weight = Hadamard.apply(self.a, self.b)
        return F.linear(x * self.scale, weight.reshape(3, 4))


@pytest.mark.parametrize("of_data", [False, True])
def test_weights_that_a_function_of_the_users_own_makes(of_data):
    model, x = ByHand(of_data), torch.randn(6, 4)
    total = 0
    for one in x.split(1):
        out = model(one).flatten()
        rows = [torch.autograd.grad(f, list(model.parameters()), retain_graph=True) for f in out]
        J = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
        total = total + J.mT @ J / 6
    F_ = ng.FIM(model, [(x,)], "dense", likelihood=Gaussian(1.0))
    close(F_.to_dense(), total)
    found = forms(F_)
    assert found["a"] == found["b"] == "linear: rows"
    assert found["scale"] == (GENERAL if of_data else "mul: rows")


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("kind", ["two", "offsets", "weights", "padding"])
def test_bags_of_embeddings(mode, kind):
    """As rows of a plain embedding that are summed."""
    if kind == "weights" and mode == "mean":
        return
    torch.manual_seed(0)
    padding = 0 if kind == "padding" else None
    bag, head = nn.EmbeddingBag(7, 4, mode=mode, padding_idx=padding), nn.Linear(4, 3)
    lengths = [5] * 6 if kind != "offsets" else [1, 4, 2, 3, 5, 2]
    tokens = torch.randint(1, 7, (sum(lengths),))
    tokens[0] = 3 if kind != "padding" else 0
    w = torch.rand(len(tokens)) if kind == "weights" else torch.ones(len(tokens))
    starts = torch.tensor([0, *lengths]).cumsum(0)[:-1]
    if kind == "offsets":
        batch = ((tokens, starts),)
    elif kind == "weights":
        batch = ((tokens.view(6, 5), None, w.view(6, 5)),)
    else:
        batch = (tokens.view(6, 5),)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.bag, self.head = bag, head

        def forward(self, t, o=None, w=None):
            return self.head(self.bag(t, o, w))

    total, hessian, labels = 0, 0, torch.randint(3, (6,))
    for t, v, y in zip(tokens.split(lengths), w.split(lengths), labels, strict=True):
        v = v * (t != 0) if kind == "padding" else v

        def f(weight, a, b, t=t, v=v):
            rows = (F.embedding(t, weight) * v[:, None]).sum(0)
            rows = rows / v.sum() if mode == "mean" else rows
            return F.linear(rows, a, b)

        held = tuple(p.detach() for p in (bag.weight, head.weight, head.bias))
        J = torch.cat([j.flatten(1) for j in torch.func.jacrev(f, (0, 1, 2))(*held)], 1)
        total = total + J.mT @ J / 6

        def loss(flat, f=f, y=y, held=held):
            parts = zip(flat.split([28, 12, 3]), held, strict=True)
            return F.cross_entropy(f(*(part.view_as(p) for part, p in parts)), y)

        flat = torch.cat([p.flatten() for p in held])
        hessian = hessian + torch.func.jacrev(torch.func.jacrev(loss))(flat) / 6
    if padding is not None:
        total[:4], total[:, :4] = 0, 0
        hessian[:4], hessian[:, :4] = 0, 0
    F_ = ng.FIM(Model(), [batch], "dense", likelihood=Gaussian(1.0))
    close(F_.to_dense(), total)
    for options in ({}, {"mode": "forward_over_reverse"}):
        implicit = ng.representations.Implicit(**options)
        close(ng.FIM(Model(), [batch], implicit, likelihood=Gaussian(1.0)).to_dense(), total)
    H = ng.Hessian(Model(), [batch], loss="categorical", target=lambda batch: labels)
    close(H.to_dense(), hessian)
    assert forms(F_)["bag.weight"] == "embedding_bag: outer"


# --- positions that count -------------------------------------------------------------------------


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("how", ["labels", "mask", "both"])
def test_factors_do_not_change_with_padding(sharing, how):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    ids, y = torch.randint(0, 9, (6, 4)), torch.randint(0, 3, (6, 4))
    likelihood = ng.likelihoods.Categorical(class_dim=-1)
    found = []
    for t in (4, 11):
        more = torch.zeros(6, t - 4, dtype=torch.long)
        mask = torch.cat([torch.ones_like(ids), more], 1)
        batch = {"input": torch.cat([ids, more], 1), "attention_mask": mask}
        labels = torch.cat([y, more - 100], 1)
        options = {"positions": lambda b: b["attention_mask"]}
        if how == "labels":
            options = {"positions": lambda b: None}
        F_ = ng.FIM(
            model,
            {**batch, "labels": labels},
            KFAC(sharing=sharing),
            likelihood=likelihood,
            estimator="empirical",
            forward=lambda m, b: (
                m(b["input"]) * (1 if how != "mask" else b["attention_mask"][..., None])
            ),
            **options,
        )
        found.append(F_.to_dense())
    close(*found)


def test_one_scored_position_gives_the_exact_block():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    x, y = torch.randn(1, 7, 3), torch.full((1, 7), -100)
    y[0, 2] = 1
    likelihood = ng.likelihoods.Categorical(class_dim=-1)
    options = {"likelihood": likelihood, "estimator": "empirical"}
    exact = ng.FIM(model, (x, y), "block_diagonal", **options).to_dense()
    close(ng.FIM(model, (x, y), "kfac", **options).to_dense(), exact)


def test_positions_that_are_no_mask():
    with pytest.raises(DataError, match=r"positions= to return a mask \(N, T\).*got \(6,\)"):
        ng.FIM(
            nn.Linear(3, 2),
            torch.randn(6, 3),
            likelihood=Gaussian(1.0),
            positions=lambda b: torch.ones(6),
        )


# --- rounding -------------------------------------------------------------------------------------


def test_a_bias_whose_gradient_is_rounding_keeps_its_block():
    """In front of a norm of each channel, what is left of a sum is rounding."""
    norms = (nn.InstanceNorm2d(8), nn.GroupNorm(8, 8))
    for dtype, norm in itertools.product((torch.float32, torch.float64), norms):
        torch.manual_seed(0)
        conv = nn.Conv2d(3, 8, 3, padding=1)
        model = nn.Sequential(conv, norm, nn.LeakyReLU(0.1, inplace=True), nn.Flatten())
        model = nn.Sequential(model, nn.Linear(8 * 36, 2)).to(dtype)
        F_ = ng.FIM(model, torch.randn(16, 3, 6, 6, dtype=dtype), likelihood=Gaussian(1.0))
        assert "Kronecker" in {r.parameter: r.block for r in F_.report()}["0.0.weight"]


@pytest.mark.parametrize("wide", [True, False])
def test_autocast_with_outputs_of_any_dtype(wide):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 32), nn.Tanh(), nn.Linear(32, 3)).float()

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                out = self.net(x)
            return out.float() if wide else out

    x, y = torch.randn(64, 5).float(), torch.randint(0, 3, (64,))
    F_ = ng.FIM(Model(), (x, y), "kfac")
    assert all("Kronecker" in row.block and not row.note for row in F_.report())
    plain = ng.FIM(net, (x, y), "kfac")
    assert abs(F_.trace() / plain.trace() - 1) < 0.02


class Cell(nn.Module):
    """A recurrent cell, of which the input weight may be a parameter or a buffer."""

    def __init__(self, buffer):
        super().__init__()
        self.cell, self.head = nn.RNNCell(2, 2), nn.Linear(2, 3)
        if buffer:
            weight = self.cell.weight_ih.detach()
            del self.cell.weight_ih
            self.cell.register_buffer("weight_ih", weight)

    def forward(self, x):
        return self.head(self.cell(x, self.cell(x.sin())))


@pytest.mark.parametrize("buffer", [False, True])
def test_constants_that_are_as_long_as_a_later_batch(buffer):
    """A weight that is not selected, or a buffer, is no data if a batch has as many examples."""
    model, data = Cell(buffer), [(torch.randn(n, 2),) for n in (3, 2, 4)]
    names = ["cell.weight_hh", "head.bias"]
    chosen = [dict(model.named_parameters())[name] for name in names]
    total = 0
    for x in torch.cat([x for (x,) in data]):
        outputs = model(x.unsqueeze(0))[0]
        rows = [torch.autograd.grad(o, chosen, retain_graph=True) for o in outputs]
        J = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
        total = total + J.mT @ J
    for representation in ("dense", "block_diagonal", "implicit"):
        F_ = ng.FIM(model, data, representation, likelihood=Gaussian(1.0), params=names)
        if representation == "block_diagonal":
            close(F_.block("head.bias").to_dense(), total[-3:, -3:] / 9)
        else:
            close(F_.to_dense(), total / 9)
