"""How often a build runs the network: what was proved once is not proved again."""

import pytest
import torch
from torch import nn

import nngeo_lazy as ng
from nngeo_lazy.jacobian import registry

import oracle

pytestmark = pytest.mark.usefixtures("float64")


class Counted:
    """A forward pass that counts its examples, and the backward passes from its outputs."""

    def __init__(self, monkeypatch):
        self.forward, self.backward, self.outputs = [], 0, []
        gradients = torch.autograd.grad

        def grad(outputs, *args, **kwargs):
            roots = [outputs] if isinstance(outputs, torch.Tensor) else outputs
            self.backward += any(root is output for root in roots for output in self.outputs)
            return gradients(outputs, *args, **kwargs)

        monkeypatch.setattr(torch.autograd, "grad", grad)

    def __call__(self, model, batch):
        self.forward.append(len(batch[0]))
        self.outputs.append(model(batch[0]))
        return self.outputs[-1]


class Residual(nn.Module):
    """Blocks whose last layer may be zero, as adapters and residual branches begin."""

    def __init__(self, depth, last=1.0):
        super().__init__()
        self.depth = depth
        self.down = nn.ModuleList(nn.Linear(4, 3) for _ in range(depth))
        self.up = nn.ModuleList(nn.Linear(3, 4) for _ in range(depth))
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)
        for up in self.up:
            nn.init.normal_(up.weight, std=last)

    def forward(self, x):
        for down, up in zip(self.down, self.up, strict=True):
            x = x + up(torch.tanh(down(self.norm(x))))
        return self.head(x)


def passes_of(model, monkeypatch, batches, what="kfac"):
    with monkeypatch.context() as patch:
        counted = Counted(patch)
        ng.FIM(model, batches, what, forward=counted, likelihood="categorical", estimator="mc")
    return counted


def some_batches(count, n=40):
    return [(torch.randn(n, 4), torch.randint(3, (n,))) for _ in range(count)]


@pytest.mark.parametrize("last", [0.0, 1.0])
@pytest.mark.parametrize("what", ["kfac", "diagonal"])
def test_passes_do_not_depend_on_the_depth(what, last, monkeypatch):
    batches = some_batches(3)
    shallow, deep = (
        passes_of(Residual(depth, last), monkeypatch, batches, what) for depth in (1, 9)
    )
    assert shallow.forward == deep.forward
    assert shallow.backward == deep.backward


@pytest.mark.parametrize("last", [0.0, 1.0])
def test_a_further_batch_is_one_forward_and_one_backward_pass(last, monkeypatch):
    """Also if some layers have no gradient, as those before an adapter's zero matrix."""
    model, batches = Residual(2, last), some_batches(7)
    few, many = (passes_of(model, monkeypatch, batches[:k], "kfac") for k in (2, 7))
    assert sum(many.forward) - sum(few.forward) == 5 * 40
    assert len(many.forward) - len(few.forward) == 5
    assert many.backward - few.backward == 5


def test_checks_of_a_large_batch_are_few(monkeypatch):
    counted = passes_of(Residual(2), monkeypatch, some_batches(1, 256))
    assert sum(counted.forward) - 256 <= 20


class Windows(nn.Module):
    """Shifted windows with a table of biases, as in Swin; a strided view of the mean."""

    def __init__(self):
        super().__init__()
        self.qkv, self.head = nn.Linear(4, 12), nn.Linear(4, 3)
        self.table = nn.Parameter(torch.randn(5, 2))
        self.register_buffer("index", torch.tensor([[0, 1, 2], [3, 4, 0], [1, 2, 3]]))

    def forward(self, x):
        x = x.roll(-1, 1)
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)
        bias = self.table[self.index.view(-1)].view(3, 3, 2).permute(2, 0, 1)
        y = torch._safe_softmax(q @ k.mT + bias, -1) @ v
        y = y.transpose(1, 2).flatten(2).roll(1, 1)
        return self.head(nn.functional.adaptive_avg_pool2d(y.mT.unsqueeze(-1), 1).flatten(1))


def test_shifts_and_tables_are_proved_once(monkeypatch):
    batches = [(torch.randn(20, 3, 4), torch.randint(3, (20,))) for _ in range(5)]
    model = Windows()
    few, many = (passes_of(model, monkeypatch, batches[:k], "kfac") for k in (2, 5))
    assert many.backward - few.backward == 3
    assert_exact(model, batches[:2])


class Recurrent(nn.Module):
    """Two layers of an LSTM, and a convolution with weight norm."""

    def __init__(self):
        super().__init__()
        self.conv = nn.utils.parametrizations.weight_norm(nn.Conv1d(3, 3, 2))
        self.rnn, self.head = nn.LSTM(3, 3, 2, batch_first=True), nn.Linear(3, 3)

    def forward(self, x):
        return self.head(self.rnn(self.conv(x).mT)[0][:, -1])


def test_recurrent_layers_and_weight_norm_are_proved_once(monkeypatch):
    batches = [(torch.randn(20, 3, 4), torch.randint(3, (20,))) for _ in range(5)]
    model = Recurrent()
    few, many = (passes_of(model, monkeypatch, batches[:k], "kfac") for k in (2, 5))
    assert many.backward - few.backward == 3
    assert_exact(model, batches[:2])


def assert_exact(model, batches):
    x, y = (torch.cat(each) for each in zip(*batches, strict=True))
    call = lambda m, e: m(e)  # noqa: E731
    expected = oracle.fisher(model, call, list(x.split(1)), "categorical", "exact", y)
    F = ng.FIM(model, batches, "dense")
    torch.testing.assert_close(F.to_dense(), expected, rtol=1e-9, atol=1e-12)
    diagonal = ng.FIM(model, batches, "diagonal").diagonal()
    torch.testing.assert_close(diagonal, expected.diagonal(), rtol=1e-9, atol=1e-12)
    return F


class Scaled(nn.Module):
    """A module of a kind that a form is registered for."""

    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size))

    def forward(self, x):
        return x * self.weight


class Gated(nn.Module):
    """A branch that examples open if their first number is large."""

    def __init__(self, branch):
        super().__init__()
        self.first, self.branch, self.last = nn.Linear(4, 5), branch, nn.Linear(5, 3)

    def forward(self, x):
        h = torch.tanh(self.first(x))
        return self.last(h + (x[:, :1] > 3).to(h) * self.branch(h))


def quiet_then_loud(n=6):
    batches = [(torch.randn(n, 4).clamp(-1, 1), torch.randint(3, (n,))) for _ in range(4)]
    batches[2][0][1, 0] = batches[2][0][4, 0] = 4.0
    return batches


@pytest.mark.parametrize("first", [0, 2])
def test_a_branch_that_opens_later(first):
    batches = quiet_then_loud()
    F = assert_exact(Gated(nn.Linear(5, 5)), [*batches[first:], *batches[:first]])
    assert {row.form for row in F.report()} == {"linear: outer"}


@pytest.mark.parametrize("first", [0, 2])
def test_a_wrong_form_is_found_once_its_layer_has_a_gradient(first):
    def form(call, output):
        x = call["x"].detach()
        return ng.Use(
            weight=call["module"].weight,
            bias=None,
            leading=output.dim() - 1,
            x=x,
            rows=lambda x, g: {"weight": (2 * g * x).sum(2)},
        )

    ng.register_layer(Scaled, form)
    try:
        batches = quiet_then_loud()
        batches = [*batches[first:], *batches[:first]]
        F = assert_exact(Gated(Scaled(5)), batches)
        plan = ng.plan(ng.FIM, Gated(Scaled(5)), batches, "diagonal", likelihood="categorical")
    finally:
        registry._unregister(Scaled)
    notes = [{row.parameter: row.note for row in rows} for rows in (F.report(), plan)]
    assert "are not autograd's" in notes[0]["branch.weight"]
    assert ("are not autograd's" in notes[1]["branch.weight"]) == (first == 2)  # it reads one batch
