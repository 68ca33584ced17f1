"""Models with several heads, each with a loss of its own."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from nngeo_lazy.errors import DataError
from nngeo_lazy.likelihoods import Gaussian
from nngeo_lazy.optim import HessianFree, NaturalGradient, Preconditioner

from .loops import weights
from cases import close

GIVEN = {"class": "categorical", "size": "gaussian"}


class Heads(nn.Module):
    """Two heads on one body; returns a dict or a tuple."""

    def __init__(self, kind=dict, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(4, 5), nn.Tanh())
        self.heads = nn.ModuleList([nn.Linear(5, 3), nn.Linear(5, 2)])
        self.kind = kind
        self.to(dtype)

    def forward(self, x):
        h = self.body(x)
        found = self.heads[0](h), self.heads[1](h)
        return found if self.kind is tuple else dict(zip(GIVEN, found, strict=True))


def data(n=40, dtype=torch.float64):
    torch.manual_seed(1)
    x = torch.randn(n, 4, dtype=dtype)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0), x[:, :2].sin()


def loss_of(found, y, z, c=1.0, each=(1.0, 1.0)):
    first, second = found.values() if isinstance(found, dict) else found
    first = functional.cross_entropy(first, y)
    second = (second - z).square().sum(1).mean() / 2
    return c * (each[0] * first + each[1] * second)


def run(model, optimizer, batches, **options):
    losses = []
    for x, y, z in batches:
        optimizer.zero_grad()
        loss = loss_of(model(x), y, z, **options)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def joint_fisher(model, x, first=True, second=True):
    """The Fisher of both labels together by torch.func: the sum of the heads' (P, P)."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def outputs(parameters, one):
        found = torch.func.functional_call(model, parameters, (one[None],))
        return found["class"][0], found["size"][0]

    total = 0.0
    for one in x:
        jacobians = torch.func.jacrev(outputs)(parameters, one)
        J, K = (torch.cat([each[n].flatten(1) for n in parameters], 1) for each in jacobians)
        p = outputs(parameters, one)[0].softmax(0)
        total = total + first * J.T @ (p.diag() - torch.outer(p, p)) @ J + second * K.T @ K
    return total / len(x)


@pytest.mark.parametrize(
    "likelihood", [GIVEN, {"class": nn.CrossEntropyLoss(), "size": Gaussian()}]
)
@pytest.mark.parametrize(
    "representation", ["dense", "kernel", HessianFree(tol=1e-12, max_iter=200)]
)
def test_the_curvature_of_two_heads_is_that_of_both_labels(representation, likelihood):
    model, (x, y, z) = Heads(), data()
    F, before = joint_fisher(model, x), weights(model)
    optimizer = NaturalGradient(
        model, representation, likelihood, estimator="exact", radius=None, momentum=0, damping=0.1
    )
    run(model, optimizer, [(x, y, z)])
    g = torch.cat([p.grad.flatten() for p in model.parameters()])
    eye = torch.eye(len(F), dtype=F.dtype)
    close(before - weights(model), torch.linalg.solve(F + 0.1 * eye, g), 1e-8)
    if representation == "dense":
        close(optimizer.operator.to_dense(), F)
        assert optimizer.operator.num_examples == len(x)


def test_kfac_of_two_heads_sums_the_factors_of_gradients():
    """G = mean of the sum over heads of their output gradients' second moments, A as of one."""
    model, (x, y, z) = Heads(), data()
    F = joint_fisher(model, x)
    optimizer = NaturalGradient(model, "diagonal", GIVEN, estimator="exact", lr=0.0)
    run(model, optimizer, [(x, y, z)])
    close(optimizer.operator.diagonal(), F.diagonal())
    optimizer = NaturalGradient(model, "kfac", GIVEN, estimator="exact", lr=0.0)
    run(model, optimizer, [(x, y, z)])
    left = 0.0
    for a in model.body[0](x).detach():
        J, K = torch.func.jacrev(lambda a: tuple(head(a.tanh()) for head in model.heads))(a)
        p = model.heads[0](a.tanh()).softmax(0)
        left = left + J.T @ (p.diag() - torch.outer(p, p)) @ J + K.T @ K
    one = torch.cat([x, torch.ones(len(x), 1).double()], 1)
    wanted = torch.kron(left / len(x), one.T @ one / len(x)).detach().view(5, 5, 5, 5)
    found = optimizer.operator.block("body.0").to_dense()  # weights (o, i), then biases (o,)
    close(found[:20, :20], wanted[:, :4, :, :4].reshape(20, 20))
    close(found[20:, 20:], wanted[:, 4, :, 4])


@pytest.mark.parametrize("kind", [dict, tuple])
def test_parts_of_a_batch_and_heads_in_a_tuple(kind):
    """Accumulated gradients, and heads whose losses are differentiated one after the other."""
    x, y, z = data()
    given = GIVEN if kind is dict else tuple(GIVEN.values())
    found = []
    for how in ("whole", "parts", "one by one"):
        model = Heads(kind)
        optimizer = NaturalGradient(model, "dense", given, estimator="exact")
        if how == "parts":
            for part in range(2):
                where = slice(20 * part, 20 * part + 20)
                loss_of(model(x[where]), y[where], z[where], 0.5).backward()
        elif how == "one by one":
            heads = model(x)
            loss_of(heads, y, z, each=(1.0, 0.0)).backward(retain_graph=True)
            loss_of(heads, y, z, each=(0.0, 1.0)).backward()
        else:
            loss_of(model(x), y, z).backward()
        optimizer.step()
        found.append((weights(model), optimizer.operator.to_dense()))
    for each in found[1:]:
        close(each[0], found[0][0], 1e-6)
        close(each[1], found[0][1])


def test_a_head_that_has_no_loss_in_a_step():
    """Its part of the curvature is left out, and examples count once."""
    model, (x, y, _) = Heads(), data()
    F = joint_fisher(model, x, second=False)
    optimizer = NaturalGradient(model, "dense", GIVEN, estimator="exact")
    functional.cross_entropy(model(x)["class"], y).backward()
    optimizer.step()
    close(optimizer.operator.to_dense(), F)


@pytest.mark.parametrize("estimator", ["mc", "empirical"])
@pytest.mark.parametrize("representation", ["kfac", "ekfac", "diagonal"])
def test_two_heads_train_whatever_the_scale(representation, estimator):
    """The loop's loss times a number makes the same trajectory, also from a state."""
    found = []
    for c in (1.0, 1e3):
        model = Heads()
        optimizer = NaturalGradient(
            model, representation, GIVEN, estimator=estimator, seed=0, warmup=3
        )
        losses = run(model, optimizer, [data()] * 12, c=c)
        state = optimizer.state_dict()
        again = NaturalGradient(model, representation, GIVEN, estimator=estimator, seed=0, warmup=3)
        again.load_state_dict(state)
        losses += run(model, again, [data()] * 18, c=c)
        assert losses[-1] < 0.5 * losses[0]
        assert max(losses) < 1.2 * losses[0]
        found.append(weights(model))
    close(found[1], found[0], 1e-5)


def test_the_loops_own_gradients_of_two_heads():
    """Those of the whole loss, once for each example."""
    model, (x, y, z) = Heads(), data(7)
    optimizer = NaturalGradient(model, "dense", GIVEN, estimator="empirical")
    run(model, optimizer, [(x, y, z)])
    other = Heads()
    rows = []
    for k in range(7):
        loss = loss_of(other(x[k : k + 1]), y[k : k + 1], z[k : k + 1])
        rows.append(
            torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(other.parameters()))])
        )
    rows = torch.stack(rows)
    close(optimizer.operator.to_dense(), rows.T @ rows / 7)


def test_heads_are_named_as_the_model_returns_them():
    model, (x, y, z) = Heads(), data()
    optimizer = NaturalGradient(model, "kfac", {"class": "categorical", "box": "gaussian"})
    with pytest.raises(DataError, match=r"heads \['class', 'box'\].*none for 'box'.*'size'"):
        model(x)
    optimizer = NaturalGradient(Heads(), "kfac")
    with pytest.raises(DataError, match=r"likelihood=\{...\} with a likelihood for each"):
        optimizer._model(x)
    with pytest.raises(DataError, match=r"several heads.*name all of them"):
        NaturalGradient(model, "kfac", {"class": "categorical", "size": None})
    with pytest.raises(DataError, match=r"several heads, got \[\]: name at least one"):
        NaturalGradient(model, "kfac", [])
    uneven = Heads(tuple)
    optimizer = NaturalGradient(
        uneven, "kfac", ["categorical", "gaussian"], outputs=lambda found: (found[0], found[1][:3])
    )
    with pytest.raises(DataError, match=r"one number of them.*\(40, 3\), \(3, 2\).*\(N, ...\)"):
        uneven(x)
    picked = Heads()  # what the messages say
    optimizer = NaturalGradient(
        picked,
        "kfac",
        {"class": "categorical", "box": "gaussian"},
        outputs=lambda found: {"class": found["class"], "box": found["size"]},
    )
    assert run(picked, optimizer, [(x, y, z)] * 3)[-1] < 10
    unnamed = Heads()
    optimizer = NaturalGradient(unnamed, "kfac", dict.fromkeys(GIVEN), estimator="empirical")
    losses = run(unnamed, optimizer, [(x, y, z)] * 25)
    assert losses[-1] < 0.7 * losses[0]


def test_a_preconditioner_takes_heads():
    model, (x, y, z) = Heads(), data()
    preconditioner = Preconditioner(model, "kfac", GIVEN)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = loss_of(model(x), y, z)
        loss.backward()
        preconditioner.step()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("unit", [1.0, 100.0])
def test_a_squared_error_beside_classes(unit):
    """Modules as likelihoods, whose means differ; a variance says what targets are measured in."""
    model, (x, y, z) = Heads(), data()
    with torch.no_grad():
        for p in model.heads[1].parameters():
            p.mul_(unit)
    size = nn.MSELoss() if unit == 1 else Gaussian(unit**2)
    likelihood = {"class": nn.CrossEntropyLoss(), "size": size}
    optimizer = NaturalGradient(model, "kfac", likelihood, seed=0)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        found = model(x)
        squares = functional.mse_loss(found["size"], unit * z)
        loss = functional.cross_entropy(found["class"], y) + squares / unit**2
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert max(losses) < 1.2 * losses[0]
