"""Weights that a model repeats for each example, or writes into its data, against autograd."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import nngeo_lazy as ng
from nngeo_lazy.errors import DataError
from nngeo_lazy.likelihoods import Categorical, Gaussian

import oracle
import zoo
from cases import close

pytestmark = pytest.mark.usefixtures("float64")
N = 5


class State(nn.Module):
    """A recurrent cell or layer whose first state is learnt."""

    def __init__(self, kind, repeat):
        super().__init__()
        self.cell, self.repeat = kind(3, 2), repeat
        self.batched = not isinstance(self.cell, nn.RNNCellBase)
        self.h = nn.Parameter(torch.randn(*(1,) * self.batched, 1, 2))
        self.head = nn.Linear(2, 3)
        if isinstance(self.cell, (nn.LSTM, nn.LSTMCell)):
            self.c = nn.Parameter(torch.randn_like(self.h))

    def forward(self, x):
        n, dim = len(x), self.h.dim() - 2
        sizes = [n if k == dim else -1 for k in range(self.h.dim())]
        times = [n if k == dim else 1 for k in range(self.h.dim())]
        make = {
            "expand": lambda w: w.expand(sizes).contiguous(),
            "repeat": lambda w: w.repeat(*times),
            "cat": lambda w: torch.cat([w] * n, dim),
        }[self.repeat]
        state = make(self.h)
        if hasattr(self, "c"):
            state = state, make(self.c)
        if self.batched:
            return self.head(self.cell(x.transpose(0, 1), state)[0][-1])
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
        return self.head(state[0] if isinstance(state, tuple) else state)


WAYS = {
    "expand": lambda w, n: w.expand(n, -1, -1),
    "broadcast": lambda w, n: torch.broadcast_to(w, (n, *w.shape)),
    "repeat": lambda w, n: w.repeat(n, 1, 1),
    "repeat more": lambda w, n: w.repeat(n, 2, 1),
    "tile": lambda w, n: w[None].tile(n, 1, 1),
    "interleave": lambda w, n: w.unsqueeze(0).repeat_interleave(n, 0),
    "stack": lambda w, n: torch.stack([w] * n),
    "cat": lambda w, n: torch.cat([w] * n).view(n, *w.shape),
    "flat": lambda w, n: w.repeat(n, 1).view(n, *w.shape),
    "flat interleave": lambda w, n: w.repeat_interleave(n, 0).view(-1, n, 4).transpose(0, 1),
}


class Queries(nn.Module):
    """Learnt queries, which are not made of parameters alone once they are repeated."""

    def __init__(self, way, use):
        super().__init__()
        self.way, self.use = WAYS[way], use
        self.q, self.key, self.head = (
            nn.Parameter(torch.randn(2, 4)),
            nn.Linear(4, 4),
            nn.Linear(4, 3),
        )
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True) if use == "module" else None

    def forward(self, x):
        q = self.way(self.q, len(x))
        if self.use == "module":
            h = self.attend(q, self.key(x), x)[0]
        elif self.use == "function":
            h = F.scaled_dot_product_attention(q, self.key(x), x)
        else:
            h = torch.cat([q, self.key(x)], 1).cumsum(1)
        return self.head(h.tanh().sum(1))


def masked(h, token, x):
    h[x[..., 0] > 0] = token


def first(h, token, x):
    h[:, 0] = token


def rest(h, token, x):
    h[:, 1:] = token


def put(h, token, x):
    h.index_put_((torch.arange(len(x)), (x[:, :, 0] > 0).sum(1) % 3), token)


def copied(h, token, x):
    h.index_copy_(1, torch.tensor([2, 0]), token.expand(len(x), 2, 4))


def filled(h, token, x):
    h.masked_fill_((x > 0.5).clone(), token[0])


class Written(nn.Module):
    """A mask token or a class token that is assigned to places of the data."""

    def __init__(self, write, empty=False):
        super().__init__()
        self.write, self.empty = write, empty
        self.token, self.a, self.b = nn.Parameter(torch.randn(4)), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        h = self.a(x).tanh()
        g = x.new_zeros(x.shape) if self.empty else h.clone()
        self.write(g, self.token, x)
        g = g + h if self.empty else g
        return self.b(g.cumsum(1).tanh().sum(1) + h.square().sum(1))


class Zeros(nn.Module):
    """A state that begins as a constant meets a weight before it meets the data."""

    def __init__(self):
        super().__init__()
        self.u, self.w, self.v = nn.Linear(3, 4), nn.Linear(4, 4), nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        h = torch.zeros(len(x), 4)
        for t in range(x.shape[1]):
            h = torch.tanh(self.u(x[:, t]) + self.w(h) + h @ self.v)
        return h


CELLS = (nn.GRUCell, nn.LSTMCell, nn.RNNCell, nn.GRU, nn.LSTM, nn.RNN)
NETWORKS = {
    **{
        f"{kind.__name__} {how}": (lambda kind=kind, how=how: State(kind, how))
        for kind in CELLS
        for how in ("expand", "repeat", "cat")
        if how == "expand" or kind is nn.LSTM
    },
    **{
        f"{way} {use}": (lambda way=way, use=use: Queries(way, use))
        for way in WAYS
        for use in ("module", "function", "cat")
    },
    **{
        f"{write.__name__} {empty}": (lambda write=write, empty=empty: Written(write, empty))
        for write in (masked, first, rest, put, copied, filled)
        for empty in (False, True)
    },
    "norm before a mean": lambda: nn.Sequential(
        nn.Conv1d(3, 4, 2), nn.InstanceNorm1d(4, affine=True), Mean(), nn.Linear(4, 3)
    ),
    "groups before a mean": lambda: nn.Sequential(
        nn.Conv1d(3, 4, 2), nn.GroupNorm(4, 4), Mean(), nn.Linear(4, 3)
    ),
}


class Mean(nn.Module):
    def forward(self, x):
        return x.mean(-1)


@pytest.mark.parametrize("name", NETWORKS)
def test_forms_of_weights_that_are_repeated_or_written(name):
    """No general way, in builds and in optimizers, and the numbers are autograd's."""
    torch.manual_seed(0)
    model = NETWORKS[name]()
    net = zoo.simple(model, torch.randn(N, 3, 3 if isinstance(model, State) else 4))
    likelihood = Gaussian(oracle.VARIANCE)
    with torch.no_grad():
        labels = torch.randn_like(model(net.batch))
    want = oracle.fisher(model, net.call, net.examples, "gaussian", "exact", labels)
    for data in (net.batch, list(net.batch.split(1)), list(net.batch.split([2, 3]))):
        data = data if isinstance(data, torch.Tensor) else [(x,) for x in data]
        F_ = ng.FIM(model, data, "dense", likelihood=likelihood)
        close(F_.to_dense(), want)
        assert not [row for row in F_.report() if "general" in row.form]
    optimizer = ng.optim.NaturalGradient(model, "diagonal", likelihood, estimator="exact", lr=1e-6)
    loss = (model(net.batch) - labels).square().sum(-1).mean() / (2 * oracle.VARIANCE)
    loss.backward()
    optimizer.step()
    close(optimizer.operator.diagonal(), want.diagonal())


def test_factors_do_not_depend_on_how_data_are_cut():
    """A state of zeros is as long as a batch: one example shows it, too."""
    torch.manual_seed(0)
    x, likelihood = torch.randn(N, 3, 3), Categorical(class_dim=-1)
    for model in (Zeros(), State(nn.GRUCell, "expand")):
        whole = ng.FIM(model, [(x,)], "kfac", likelihood=likelihood).to_dense()
        for sizes in (1, [1, 4], [4, 1], [2, 3]):
            parts = [(each,) for each in x.split(sizes)]
            close(ng.FIM(model, parts, "kfac", likelihood=likelihood).to_dense(), whole)


def test_a_token_that_a_batch_does_not_use():
    """Masks may choose nothing in a batch, and other numbers of places in each."""
    torch.manual_seed(0)
    model, likelihood = Written(masked), Gaussian(oracle.VARIANCE)
    x = torch.randn(9, 3, 4)
    x[:2, :, 0], x[2:3, :, 0] = -1.0, 1.0
    net = zoo.simple(model, x)
    want = oracle.fisher(model, net.call, net.examples, "gaussian", "exact", x[:, 0, :3])
    for sizes in (9, [2, 7], [3, 2, 4], 1):
        parts = [(each,) for each in x.split(sizes)]
        close(ng.FIM(model, parts, "dense", likelihood=likelihood).to_dense(), want)


class Batched(nn.Module):
    """Batched products with a weight that is expanded, and other uses of it."""

    def __init__(self, use):
        super().__init__()
        self.use, self.w, self.b = (
            use,
            nn.Parameter(torch.randn(4, 4)),
            nn.Parameter(torch.randn(4)),
        )
        self.e, self.head = nn.Parameter(torch.randn(2, 4, 4)), nn.Linear(4, 3)

    def forward(self, x):
        w = self.w.expand(len(x), 4, 4)
        return self.head(self.use(x, w, self).tanh().sum(1))


PRODUCTS = {
    "bmm": lambda x, w, m: torch.bmm(x, w),
    "matmul": lambda x, w, m: x @ w + m.b.expand(len(x), 1, 4),
    "baddbmm": lambda x, w, m: torch.baddbmm(m.b.expand(len(x), x.shape[1], 4), x, w),
    "einsum": lambda x, w, m: torch.einsum("nti,nio->nto", x, w),
    "transposed": lambda x, w, m: torch.bmm(x, w.transpose(1, 2)),
}
OTHERS = {
    "experts": lambda x, w, m: torch.einsum("nti,neio->nto", x, m.e.expand(len(x), -1, -1, -1)),
    "attention as well": lambda x, w, m: F.scaled_dot_product_attention(torch.bmm(x, w), w, w),
    "a view before": lambda x, w, m: (w.mT, F.scaled_dot_product_attention(x, w, w) @ w.mT)[1],
    "sorted": lambda x, w, m: torch.bmm(x, w.sort(1).values),
    "as many places": lambda x, w, m: x[:, :2] + m.b.expand(len(x), 4)[:2] + m.b.expand(2, 4),
}


@pytest.mark.parametrize("n", [2, 3, 4, 6])
@pytest.mark.parametrize("name", [*PRODUCTS, *OTHERS])
def test_expanded_weights_in_products(name, n):
    """A product knows the weight that is expanded; batches may be as long as anything else."""
    torch.manual_seed(0)
    model = Batched({**PRODUCTS, **OTHERS}[name])
    net = zoo.simple(model, torch.randn(n, 3, 4))
    likelihood = Gaussian(oracle.VARIANCE)
    want = oracle.fisher(model, net.call, net.examples, "gaussian", "exact", net.batch[:, 0, :3])
    close(ng.FIM(model, net.batch, "dense", likelihood=likelihood).to_dense(), want)
    F_ = ng.FIM(model, net.batch, "kfac", likelihood=likelihood)
    blocks = {row.parameter: row.block for row in F_.report()}
    assert (blocks["w"] == "Kronecker (4x4) x (4x4)") == (name in PRODUCTS)


class Prefix(nn.Module):
    """As many rows of two tables as a sequence is long."""

    def __init__(self):
        super().__init__()
        self.e, self.r = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(6, 4))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        t = x.shape[1]
        return self.head(((x @ self.e[:t].T).softmax(-1) @ self.r[:t]).sum(1))


@pytest.mark.parametrize("representation", ["diagonal", "dense", "kfac", "ekfac"])
def test_optimizers_of_tables_that_are_used_in_part(representation):
    torch.manual_seed(0)
    model, likelihood = Prefix(), Categorical(class_dim=-1)
    optimizer = ng.optim.NaturalGradient(model, representation, likelihood, estimator="exact")
    for t in (3, 5, 2, 6):
        net = zoo.simple(model, torch.randn(7, t, 4))
        labels = torch.randint(3, (7,))
        want = oracle.fisher(model, net.call, net.examples, "categorical", "exact", labels)
        optimizer.zero_grad()
        F.cross_entropy(model(net.batch), labels).backward()
        optimizer.step()
        assert set(optimizer.operator.space.names) == {"e", "r", "head.weight", "head.bias"}
        if t == 3 and representation in ("diagonal", "dense"):
            close(optimizer.operator.diagonal(), want.diagonal())


class FlatScale(nn.Module):
    """One number that scales flattened data, and another that scales some of them."""

    def __init__(self):
        super().__init__()
        self.s, self.b = nn.Parameter(torch.randn(1)), nn.Parameter(torch.randn(1))
        self.l = nn.Linear(4, 3)

    def forward(self, x):
        f = x.flatten() * self.s
        g = f.clone()
        some = x.flatten() > 0.3
        g[some] = g[some] * self.b
        return self.l(g.view_as(x))


def test_numbers_that_scale_flattened_data():
    torch.manual_seed(0)
    net = zoo.simple(FlatScale(), torch.randn(6, 4).relu())
    want = oracle.fisher(net.model, net.call, net.examples, "gaussian", "exact", net.batch[:, :3])
    F_ = ng.FIM(net.model, net.batch, "dense", likelihood=Gaussian(oracle.VARIANCE))
    close(F_.to_dense(), want)


class Filtered(nn.Module):
    """Frequencies times complex numbers, which are parameters or made of pairs."""

    def __init__(self, pairs):
        super().__init__()
        self.w = nn.Parameter(
            torch.randn(3, 2) if pairs else torch.randn(3, dtype=torch.complex128)
        )
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        w = self.w if self.w.is_complex() else torch.view_as_complex(self.w)
        return self.b(torch.fft.irfft(torch.fft.rfft(self.a(x)) * w, n=4))


def test_complex_parameters_are_refused_and_both_remedies_work():
    torch.manual_seed(0)
    x, likelihood = torch.randn(N, 4), Gaussian(oracle.VARIANCE)
    model = Filtered(pairs=False)
    builders = (
        lambda: ng.FIM(model, x, "kfac", likelihood=likelihood),
        lambda: ng.Hessian(model, (x, x[:, :3]), loss=likelihood),
        lambda: ng.NTK(model, x),
        lambda: ng.optim.NaturalGradient(model),
    )
    for build in builders:
        with pytest.raises(DataError, match=r"as pairs.*view_as_complex.*params="):
            build()
    net = zoo.simple(Filtered(pairs=True), x)
    want = oracle.fisher(net.model, net.call, net.examples, "gaussian", "exact", x[:, :3])
    close(ng.FIM(net.model, x, "dense", likelihood=likelihood).to_dense(), want)
    close(ng.FIM(net.model, x, "diagonal", likelihood=likelihood).diagonal(), want.diagonal())
    net.model.w.data = torch.view_as_real(model.w.detach()).clone()
    net.model.a, net.model.b = model.a, model.b
    want = oracle.fisher(net.model, net.call, net.examples, "gaussian", "exact", x[:, :3])
    some = ng.FIM(model, x, "dense", likelihood=likelihood, params=["a", "b"])
    close(some.to_dense(), want[6:, 6:])
