"""Recurrent networks: the linear layers inside of torch's fused functions, against autograd."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

import nngeo_lazy as ng

from cases import close

pytestmark = pytest.mark.usefixtures("float64")
N, STEPS, IN, HIDDEN = 6, 5, 3, 4
KINDS = {"LSTM": {}, "GRU": {}, "RNN": {}, "relu": {"nonlinearity": "relu"}}
CELLS = {"LSTMCell": {}, "GRUCell": {}, "RNNCell": {}, "relu": {"nonlinearity": "relu"}}


class Rows(nn.Module):
    """A recurrent layer over sequences (N, T, i), which reads all its steps and its last state."""

    def __init__(self, kind, **options):
        super().__init__()
        options = {**KINDS[kind], **options}
        self.rnn = getattr(nn, "RNN" if kind == "relu" else kind)(IN, HIDDEN, **options)
        width = (options.get("proj_size") or HIDDEN) * (1 + options.get("bidirectional", False))
        self.steps, self.last = nn.Linear(width, 3), nn.Linear(width, 3)

    def forward(self, x, lengths=None):
        first = self.rnn.batch_first
        x = x if first else x.transpose(0, 1)
        if lengths is not None:
            x = pack_padded_sequence(x, lengths, batch_first=first, enforce_sorted=False)
        y, state = self.rnn(x)
        if lengths is not None:
            y, _ = pad_packed_sequence(y, batch_first=first)
        y = y if first else y.transpose(0, 1)
        state = state[0] if isinstance(state, tuple) else state
        last = state[-1 - self.rnn.bidirectional :].transpose(0, 1).flatten(1)
        return self.steps(y.square().sum(1)) + self.last(last)


class Steps(nn.Module):
    """A cell in a loop."""

    def __init__(self, kind):
        super().__init__()
        options, kind = CELLS[kind], "RNNCell" if kind == "relu" else kind
        self.cell, self.head = getattr(nn, kind)(IN, HIDDEN, **options), nn.Linear(HIDDEN, 3)

    def forward(self, x):
        state = None
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
        return self.head(state[0] if isinstance(state, tuple) else state)


class Unrolled(nn.Module):
    """An LSTM of one layer, without biases, that is written by hand."""

    def __init__(self, of):
        super().__init__()
        self.w, self.u = nn.Linear(IN, 4 * HIDDEN, False), nn.Linear(HIDDEN, 4 * HIDDEN, False)
        self.w.weight, self.u.weight = of.rnn.weight_ih_l0, of.rnn.weight_hh_l0
        self.steps, self.last = of.steps, of.last

    def forward(self, x):
        h, c = x.new_zeros(len(x), HIDDEN), x.new_zeros(len(x), HIDDEN)
        made = []
        for t in range(x.shape[1]):
            i, f, g, o = (self.w(x[:, t]) + self.u(h)).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            made.append(h)
        return self.steps(torch.stack(made, 1).square().sum(1)) + self.last(h)


def checked(model, *inputs):
    """The exact Fisher is that of autograd, example by example, and each weight has its block."""
    weights, rows = list(model.parameters()), []
    for n in range(N):
        for f in model(*(t[n : n + 1] for t in inputs))[0]:
            found = torch.autograd.grad(f, weights, retain_graph=True)
            rows.append(torch.cat([g.flatten() for g in found]))
    jacobian = torch.stack(rows)
    batch = inputs if len(inputs) > 1 else inputs[0]
    data = [(batch, torch.zeros(N, 3))]
    close(
        ng.FIM(model, data, "dense", likelihood="gaussian").to_dense(), jacobian.mT @ jacobian / N
    )
    for row in ng.FIM(model, data, "kfac", likelihood="gaussian").report():
        assert ("outer" in row.form, "Kronecker" in row.block) == (True, True), row


OPTIONS = [
    {"num_layers": layers, "bidirectional": both, "batch_first": first, "bias": bias}
    for layers, both, first, bias in itertools.product((1, 2), *[(False, True)] * 3)
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.parametrize("kind", KINDS)
def test_layers(kind, options):
    torch.manual_seed(0)
    checked(Rows(kind, **options), torch.randn(N, STEPS, IN))


@pytest.mark.parametrize("options", OPTIONS[::5], ids=lambda o: "-".join(map(str, o.values())))
def test_projections(options):
    torch.manual_seed(0)
    checked(Rows("LSTM", proj_size=2, **options), torch.randn(N, STEPS, IN))


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequences(kind, both):
    """Sequences of different lengths, in any order."""
    torch.manual_seed(0)
    model = Rows(kind, num_layers=2, bidirectional=both, batch_first=True)
    checked(model, torch.randn(N, STEPS, IN), torch.tensor([5, 2, 4, 1, 3, 5]))


@pytest.mark.parametrize("kind", CELLS)
def test_cells(kind):
    torch.manual_seed(0)
    checked(Steps(kind), torch.randn(N, STEPS, IN))


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_blocks_are_those_of_a_loop(sharing):
    """A KFAC of the fused function is that of the same network, written by hand."""
    torch.manual_seed(0)
    model, x = Rows("LSTM", batch_first=True, bias=False), torch.randn(N, STEPS, IN)
    hand, kfac = Unrolled(model), ng.representations.KFAC(sharing=sharing)
    torch.testing.assert_close(hand(x), model(x))
    mine, other = (ng.FIM(m, x, kfac, likelihood="gaussian").to_dense() for m in (model, hand))
    close(mine, other)


def test_padding_that_is_packed_away_does_not_count():
    """A KFAC is the same however far the sequences were padded before they were packed."""
    torch.manual_seed(0)
    model, lengths = Rows("GRU", batch_first=True), torch.tensor([3, 2, 3, 1, 3, 2])
    x = torch.randn(N, STEPS, IN)
    found = [
        ng.FIM(model, [((x[:, :t], lengths), torch.zeros(N, 3))], "kfac", likelihood="gaussian")
        for t in (3, STEPS)
    ]
    close(found[0].to_dense(), found[1].to_dense())


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_between_layers_is_torchs(kind):
    """A training pass that is recorded draws what torch's function draws."""
    torch.manual_seed(0)
    model = Rows(kind, num_layers=3, dropout=0.5, bidirectional=True, batch_first=True).train()
    x, y = torch.randn(N, STEPS, IN), torch.randint(3, (N,))

    def loss():
        torch.manual_seed(1)
        return F.cross_entropy(model(x), y)

    plain = loss()
    optimizer = ng.optim.NaturalGradient(model, "kfac", lr=1e-3)
    watched = loss()
    watched.backward()
    optimizer.step()
    assert watched.item() == pytest.approx(plain.item(), rel=1e-12)
    assert all("Kronecker" in row.block for row in optimizer.report())
    for _ in range(20):
        optimizer.zero_grad()
        now = loss()
        now.backward()
        optimizer.step()
    assert now < watched


class Checkpointed(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False)


class ByKeywords(nn.Module):
    """Calls torch's function, and names what it gives."""

    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def forward(self, x):
        cell, state = self.cell.rnn, torch.zeros(1, len(x), HIDDEN)
        options = {"bidirectional": False, "has_biases": True, "num_layers": 1, "dropout": 0.0}
        options |= {"train": False, "batch_first": True, "hx": state, "params": cell._flat_weights}
        y, last = torch.gru(x, **options)
        return self.cell.steps(y.square().sum(1)) + self.cell.last(last[0])


def test_functions_called_by_keywords():
    torch.manual_seed(0)
    model, x = Rows("GRU", batch_first=True), torch.randn(N, STEPS, IN)
    own, other = (ng.FIM(m, x, "dense", likelihood="gaussian") for m in (model, ByKeywords(model)))
    close(other.to_dense(), own.to_dense())


def test_inside_a_checkpoint():
    """There the function itself is taken: a checkpoint must see the same one again."""
    torch.manual_seed(0)
    model, x = Rows("GRU", batch_first=True), torch.randn(N, STEPS, IN)
    own, other = (
        ng.FIM(m, x, "dense", likelihood="gaussian") for m in (model, Checkpointed(model))
    )
    close(other.to_dense(), own.to_dense())
    assert {row.form for row in other.report() if "rnn" in row.parameter} == {"gru: rows"}


def test_one_run_of_a_function_serves_all_its_weights():
    """Rows of a function of which nothing is known are made once for all weights."""
    runs = []

    class Counted(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            runs.extend([1] * (func is torch.gru))
            return func(*args, **(kwargs or {}))

    model, x = Checkpointed(Rows("GRU", batch_first=True)), torch.randn(N, STEPS, IN)
    with Counted():
        ng.FIM(model, x, "diagonal", likelihood="gaussian", estimator="mc", seed=0)
    assert len(runs) < 4 * N  # four weights
