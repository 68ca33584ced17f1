"""What is new needs one thing: a representation a recipe and an operator, a layer a function."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

import nngeo_lazy as ng
from nngeo_lazy.errors import DataError, UnsupportedLayerError
from nngeo_lazy.facts import Cost
from nngeo_lazy.files import register_saved
from nngeo_lazy.jacobian import registry
from nngeo_lazy.likelihoods.elementwise import Elementwise
from nngeo_lazy.operators import DenseLinearOperator, LazyLinearOperator
from nngeo_lazy.pooling import register_pooled
from nngeo_lazy.representations import Block, Blockwise, Mixed
from nngeo_lazy.statistics import Statistic

import oracle
import zoo
from cases import close

pytestmark = pytest.mark.usefixtures("float64")


# --- a representation: the tridiagonal part of each layer's block ---------------------------------


@register_saved
@register_pooled
class TridiagonalLinearOperator(LazyLinearOperator):
    """A symmetric tridiagonal matrix, by its diagonal (n,) and what lies beside it (n - 1,)."""

    _implicit_in_vector = False  # it is solved in closed form

    def __init__(self, diagonal, beside, *, info=None):
        super().__init__(diagonal, beside, info=info)
        self.main, self.beside = diagonal, beside

    def _size(self):
        return torch.Size((len(self.main), len(self.main)))

    def _transpose_nonbatch(self):
        return self

    def _apply(self, v):
        zero = torch.zeros_like(v[:1])
        e = self.beside[:, None]
        return self.main[:, None] * v + torch.cat([e * v[1:], zero]) + torch.cat([zero, e * v[:-1]])

    def _pivots(self):
        """The diagonal of L D L^T."""
        found = [self.main[0]]
        for a, e in zip(self.main[1:], self.beside, strict=True):
            found.append(a - e * e / found[-1])
        return found

    def _solve_columns(self, v, krylov):
        pivots, x = self._pivots(), list(v)
        for k in range(1, len(x)):
            x[k] = x[k] - self.beside[k - 1] / pivots[k - 1] * x[k - 1]
        x[-1] = x[-1] / pivots[-1]
        for k in range(len(x) - 2, -1, -1):
            x[k] = (x[k] - self.beside[k] * x[k + 1]) / pivots[k]
        return torch.stack(x)

    def _damp(self, damping, method):
        return TridiagonalLinearOperator(self.main + damping.value, self.beside, info=self.info)

    def _scale(self, c):
        return TridiagonalLinearOperator(self.main * c, self.beside * c, info=self.info)

    def _logdet(self):
        return torch.stack(self._pivots()).log().sum()

    def _diagonal(self):
        return self.main

    def _kind(self):
        return f"tridiagonal {len(self.main)}"


class Band(Statistic):
    """Sums of the squared rows and of the products of neighbours."""

    def __init__(self, index, part):
        super().__init__(index)
        self.size, self.main, self.beside = part.layout.size, 0.0, 0.0

    def costs(self, sample):
        flops = 4 * sample.directions * self.size
        yield Cost(self.indices[0], f"tridiagonal {self.size}", 2 * self.size - 1, flops)

    def update(self, forms, first, last):
        for form in forms:
            rows = torch.cat([form.rows(a, b) for a, b in form.tiles()], 1)  # (R, N, p)
            self.main += rows.square().sum((0, 1))
            self.beside += (rows[..., 1:] * rows[..., :-1]).sum((0, 1))


@dataclass(frozen=True)
class Tridiagonal(Blockwise):
    def block(self, facts, k):
        band = Band(k, facts.parts[k])
        facts = yield [band]
        parts = band.main / facts.denominator, band.beside / facts.denominator
        return [Block((k,), facts.parts[k].layout, TridiagonalLinearOperator(*parts))]


# --- it is a representation like any other --------------------------------------------------------


@pytest.fixture
def data():
    model = nn.Sequential(
        nn.Linear(4, 3, bias=False), nn.Tanh(), nn.LayerNorm(3), nn.Linear(3, 2, bias=False)
    )
    return model, torch.randn(9, 4), torch.randint(2, (9,))


def expected(model, x):
    """The tridiagonal parts of the layers' blocks, from autograd alone."""
    net = zoo.simple(model, x)
    with torch.no_grad():
        out = model(x)
    F = oracle.fisher(model, net.call, net.examples, "categorical", "exact", out.argmax(1))
    kept, start = torch.zeros_like(F), 0
    for layer in (model[0], model[2], model[3]):
        at = slice(start, start + sum(p.numel() for p in layer.parameters()))
        kept[at, at] = F[at, at].triu(-1).tril(1)
        start = at.stop
    return kept


def test_it_is_built_solved_and_reported(data):
    model, x, y = data
    F, matrix = ng.FIM(model, (x, y), Tridiagonal()), expected(model, x)
    close(F.to_dense(), matrix)
    b = torch.randn(F.shape[-1], 2)
    damped = matrix + 0.3 * torch.eye(len(matrix))
    close(F @ b, matrix @ b)
    close(F.solve(b, damping=0.3), torch.linalg.solve(damped, b), 1e-9)
    close(F.inverse(damping=0.3) @ b, torch.linalg.solve(damped, b), 1e-9)
    close(F.damped(0.3).logdet(), torch.linalg.slogdet(damped)[1], 1e-9)
    close((2 * F).diagonal(), 2 * matrix.diagonal())
    assert "tridiagonal 12" in str(F.report())
    planned = ng.plan(ng.FIM, model, (x, y), Tridiagonal())
    assert [row.block for row in planned] == [row.block for row in F.report()]
    assert planned.bytes == F.report().bytes


def test_it_is_pooled_saved_and_mixed(data, tmp_path):
    model, x, y = data
    shards = [ng.FIM(model, (x[s], y[s]), Tridiagonal()) for s in (slice(0, 4), slice(4, 9))]
    merged = ng.merge(shards)
    close(merged.to_dense(), expected(model, x))
    assert merged.num_examples == 9
    ng.save(merged, tmp_path / "tridiagonal.pt")
    again = ng.load(tmp_path / "tridiagonal.pt", space=merged.space)
    assert {type(block) for block in again.members} == {TridiagonalLinearOperator}
    assert torch.equal(again.to_dense(), merged.to_dense())
    mixed = ng.FIM(model, (x, y), Mixed(Tridiagonal(), {"0": "kfac"}))
    assert type(mixed.members[1]) is TridiagonalLinearOperator


STEPS = {
    "lr": 0.5,
    "damping": 1.0,
    "estimator": "exact",
    "momentum": 0.0,
    "update_every": 1,
    "radius": None,
}


def test_an_optimizer_steps_with_it(data):
    model, x, y = data
    optimizer = ng.optim.NaturalGradient(model, Tridiagonal(), factor_decay=0.0, **STEPS)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        matrix = expected(model, x)
        loss = nn.functional.cross_entropy(model.train()(x), y)
        loss.backward()
        before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        optimizer.step()
        after = torch.cat([p.detach().flatten() for p in model.parameters()])
        losses.append(loss.item())
    damped = matrix + torch.eye(len(matrix))
    close(after - before, -0.5 * torch.linalg.solve(damped, gradient), 1e-8)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]
    again = ng.optim.NaturalGradient(model, Tridiagonal(), factor_decay=0.0, **STEPS)
    again.load_state_dict(optimizer.state_dict())
    close(again.operator.to_dense(), optimizer.operator.to_dense())


def test_what_a_representation_does_not_have_is_refused(data):
    model, x, y = data
    with pytest.raises(DataError, match="representation of a Jacobian to be one of 'implicit'"):
        ng.Jacobian(model, x, Tridiagonal())
    with pytest.raises(DataError, match=r"representation of a Hessian to be one of .*'dense', got"):
        ng.Hessian(model, (x, y), "kfac", loss="categorical")


def test_classes_that_no_rule_knows(tmp_path):
    class Unknown(DenseLinearOperator):
        pass

    F = Unknown(torch.eye(2))
    with pytest.raises(UnsupportedLayerError, match=r"Unknown cannot be saved.*register_saved"):
        ng.save(F, tmp_path / "unknown.pt")
    state = DenseLinearOperator(torch.eye(2)).state_dict()
    state["operator"]["class"] = "Unknown"
    with pytest.raises(DataError, match=r"unknown operator 'Unknown'.*register_saved"):
        ng.load(state)
    with pytest.raises(DataError, match="TridiagonalLinearOperator has one"):
        register_pooled(TridiagonalLinearOperator)
    with pytest.raises(DataError, match="'DenseLinearOperator' already: rename"):
        register_saved(type("DenseLinearOperator", (LazyLinearOperator,), {}))


# --- a layer: one function ------------------------------------------------------------------------


class Scale(nn.Module):
    """One factor for each feature."""

    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size))

    def forward(self, x):
        return x * self.weight


def scale_form(call, output):
    return ng.Use(
        weight=call["module"].weight,
        bias=None,
        leading=output.dim() - 1,
        x=call["x"].detach(),
        rows=lambda x, g: {"weight": (g * x).sum(2)},
    )


def test_a_layer_is_one_function():
    ng.register_layer(Scale, scale_form)
    try:
        model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), Scale(3), nn.Linear(3, 2))
        x, y = torch.randn(7, 4), torch.randint(2, (7,))
        net = zoo.simple(model, x)
        matrix = oracle.fisher(model, net.call, net.examples, "categorical", "exact", y)
        for representation in ("dense", "implicit", "factored", "low_rank"):
            close(ng.FIM(model, (x, y), representation).to_dense(), matrix)
        close(ng.FIM(model, (x, y), "diagonal").diagonal(), matrix.diagonal())
        for representation in ("kfac", "ekfac", "block_diagonal", Tridiagonal()):
            F = ng.FIM(model, (x, y), representation)
            assert {row.parameter: row.form for row in F.report()}["2.weight"] == "Scale: rows"
            close(F.block("2").diagonal(), matrix.diagonal()[15:18])
        close(ng.NTK(model, x).diagonal(), ng.NTK(model, x, method="matrix-free").diagonal())
        assert falls(model, x, lambda f: nn.functional.cross_entropy(f, y), "kfac")
    finally:
        registry._unregister(Scale)


# --- a likelihood: one class ----------------------------------------------------------------------


@dataclass(frozen=True)
class Binomial(Elementwise):
    """Each output is the logit of a probability; a label counts successes in so many trials."""

    trials: int

    def loss(self, outputs, target):
        each = self.trials * nn.functional.softplus(outputs) - target * outputs
        return each.flatten(1).sum(1)

    def _root(self, outputs, target):
        p = outputs.sigmoid()
        return (self.trials * p * (1 - p)).sqrt()

    def _sampled(self, outputs, target, generator):
        p = outputs.sigmoid()
        shape = (self.trials, *p.shape)
        uniform = torch.rand(shape, dtype=p.dtype, device=p.device, generator=generator)
        return self.trials * p - (uniform < p).sum(0)

    def _observed(self, outputs, target):
        return self.trials * outputs.sigmoid() - target


def nll_binomial(f, y):
    return (-y * nn.functional.logsigmoid(f) - (5 - y) * nn.functional.logsigmoid(-f)).sum()


def test_a_likelihood_is_one_class(monkeypatch):
    monkeypatch.setitem(oracle.NLL, "binomial", nll_binomial)
    model, x = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), torch.randn(8, 4)
    y, lik = torch.randint(6, (8, 2)).double(), Binomial(5)
    net = zoo.simple(model, x)
    for estimator in ("exact", "empirical"):
        matrix = oracle.fisher(model, net.call, net.examples, "binomial", estimator, y)
        for representation in ("dense", "implicit", "factored", "low_rank"):
            F = ng.FIM(model, (x, y), representation, likelihood=lik, estimator=estimator)
            close(F.to_dense(), matrix)
        F = ng.FIM(model, (x, y), "block_diagonal", likelihood=lik, estimator=estimator)
        close(F.block("0").to_dense(), matrix[:15, :15])
    exact = ng.FIM(model, x, "dense", likelihood=lik)
    drawn = ng.FIM(model, x, "dense", likelihood=lik, estimator="mc", samples=3000, seed=0)
    close(drawn.to_dense(), exact.to_dense(), 0.05)
    close(ng.GGN(model, (x, y), "dense", loss=lik).to_dense(), exact.to_dense())
    H = oracle.loss_hessian(model, net.call, net.examples, nll_binomial, y) / len(x)
    close(ng.Hessian(model, (x, y), loss=lik).to_dense(), H)
    assert ng.merge([ng.FIM(model, x[s], "kfac", likelihood=lik) for s in (slice(3), slice(3, 8))])
    posterior = ng.Laplace(model, exact, likelihood=lik)
    assert posterior.functional(x).covariance.shape == (8, 2, 2)
    with pytest.raises(DataError, match=r"no distribution of labels is known for Binomial.*functi"):
        posterior.predictive(x)
    assert falls(model, x, lambda f: lik.loss(f, y).mean(), Tridiagonal(), likelihood=lik)


def falls(model, x, loss_of, representation, **options):
    """Whether the loss falls in five steps of an optimizer."""
    optimizer = ng.optim.NaturalGradient(model, representation, **{**STEPS, **options})
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = loss_of(model.train()(x))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses == sorted(losses, reverse=True) and losses[-1] < losses[0]
