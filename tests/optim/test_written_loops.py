"""Loops as people write them."""

import gc
import math
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.overrides import _get_current_function_mode_stack

import nngeo_lazy as ng
from nngeo_lazy.errors import DataError, LikelihoodWarning
from nngeo_lazy.likelihoods import Bernoulli, Categorical
from nngeo_lazy.optim import NaturalGradient, Preconditioner

from .loops import backward, noisy, problem, train, weights
from cases import close

# --- parameters and groups ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "params",
    [
        lambda m: m.parameters(),
        lambda m: list(m.parameters()),
        lambda m: m.named_parameters(),
        lambda m: [{"params": m.parameters()}],
        lambda m: [
            {"params": [p for p in m.parameters() if p.dim() > 1], "weight_decay": 0.0},
            {"params": [p for p in m.parameters() if p.dim() == 1], "lr": 1.0},
        ],
        lambda m: [{"params": list(m.named_parameters())}],
        lambda m: [{"params": m[0].weight}, {"params": ["0.bias", "2"]}],
    ],
)
def test_tensors_and_names_as_every_optimizer_takes_them(params):
    found = []
    for given in (None, params):
        model, x, y = problem()
        chosen = None if given is None else given(model)
        optimizer = NaturalGradient(model, "kfac", params=chosen, seed=0)
        train(optimizer, model, x, y, 4)
        found.append(weights(model))
    close(*found)


@pytest.mark.parametrize("kind", [NaturalGradient, Preconditioner])
@pytest.mark.parametrize("representation", ["kfac", "ekfac", "kernel", "implicit"])
def test_groups_that_are_added_later(representation, kind):
    """Gradual unfreezing: the head first, then the rest."""
    model, x, y = problem()
    y = (x[:, 0] > 0).long()
    model[0].requires_grad_(False)
    optimizer = kind(model, representation, "categorical", params=model[2].parameters(), seed=0)
    train(optimizer, model, x, y, 5)
    frozen, before = model[0].weight.clone(), optimizer._framing.direction.state()
    model[0].requires_grad_(True)
    optimizer.add_param_group({"params": model[0].parameters(), "damping": None})
    assert len(optimizer.param_groups) == 2
    losses = train(optimizer, model, x, y, 25)
    if kind is NaturalGradient:
        assert losses[-1] < losses[0]
        assert not torch.equal(model[0].weight, frozen)
    assert optimizer.operator.shape == (43, 43)
    trust = optimizer._framing.direction.trust.state()
    assert float(trust["means"][3]) > float(before["trust"]["means"][3])  # it went on
    held = optimizer.state_dict()
    optimizer.load_state_dict(held)
    train(optimizer, model, x, y, 1)


def test_weight_decay_of_some_parameters():
    model, x, y = problem()
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.5},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    other, _, _ = problem()
    decayed = NaturalGradient(model, params=groups, seed=0)
    plain = NaturalGradient(other, seed=0, estimator="mc")
    before = model[0].weight.detach().clone()
    for optimizer, each in ((decayed, model), (plain, other)):
        backward(optimizer, each, x, y)
        optimizer.step()
    close(model[0].bias.detach(), other[0].bias.detach(), 1e-3)
    close(model[0].weight.detach(), other[0].weight.detach() - 0.5 * before, 1e-3)


# --- modes of the model ---------------------------------------------------------------------------


@pytest.mark.parametrize("representation", ["kfac", "ekfac", "diagonal"])
def test_frozen_batch_normalisation(representation):
    """Fine-tuning in evaluation mode, and with the norms alone in it."""
    for frozen in (lambda m: m.eval(), lambda m: m[1].eval()):
        model, x = noisy(), torch.randn(60, 4).double()
        y = (x[:, 0] > 0).long()
        frozen(model)
        kept = model[1].running_mean.clone()
        losses = train(NaturalGradient(model, representation, seed=0), model, x, y, 30)
        assert losses[-1] < 0.5 * losses[0]
        assert torch.equal(model[1].running_mean, kept)


def test_interrupts_leave_nothing_open():
    class Interrupted(nn.Module):
        go = False

        def forward(self, x):
            if self.go:
                raise KeyboardInterrupt
            return x

    _, x, y = problem()
    model = nn.Sequential(nn.Linear(4, 5), Interrupted(), nn.Linear(5, 3)).double()
    optimizer = NaturalGradient(model, seed=0)
    train(optimizer, model, x, y, 1)
    model[1].go = True
    try:
        model(x)
    except KeyboardInterrupt:
        assert not _get_current_function_mode_stack()
        assert torch.backends.mha.get_fastpath_enabled()
    model[1].go = False
    train(optimizer, model, x, y, 2)


@pytest.mark.parametrize("representation", ["kfac", "quasi_diagonal", "kernel", "implicit"])
def test_an_optimizer_that_is_dropped_is_gone_at_once(representation):
    model, x, y = problem()
    train(NaturalGradient(model, representation), model, x, y, 2)
    hooks = len(model._forward_hooks)
    gc.collect()
    gc.disable()
    try:
        optimizer = NaturalGradient(model, representation)
        train(optimizer, model, x, y, 2)
        held = weakref.ref(optimizer._loop)
        del optimizer
        assert held() is None
        assert len(model._forward_hooks) <= hooks
        assert all(not p._post_accumulate_grad_hooks for p in model.parameters())
        assert model.__dict__.get("_compiled_call_impl") is None
    finally:
        gc.enable()


# --- losses ---------------------------------------------------------------------------------------

SOFT = {
    "smoothing": lambda f, y: functional.cross_entropy(f, y, label_smoothing=0.1),
    "class weights": lambda f, y: functional.cross_entropy(
        f, y, weight=torch.arange(1.0, 8.0).double()
    ),
    "mixup": lambda f, y: (
        0.3 * functional.cross_entropy(f, y) + 0.7 * functional.cross_entropy(f, y.flip(0))
    ),
}


@pytest.mark.parametrize("name", SOFT)
def test_soft_labels_are_recognised(name):
    model, x, _ = problem(outputs=7)
    y = torch.randint(7, (40,))
    optimizer = NaturalGradient(model, seed=0)
    losses = train(optimizer, model, x, y, 40, SOFT[name])
    assert optimizer._scores.heads[0].known == Categorical(class_dim=1)
    assert optimizer._scores.estimator == "mc"
    assert losses[-1] < 0.9 * losses[0]


def test_a_logistic_loss_is_recognised():
    model, x, _ = problem()
    y = (x[:, :3] > 0).double()
    optimizer = NaturalGradient(model, seed=0)
    losses = train(optimizer, model, x, y, 40, functional.binary_cross_entropy_with_logits)
    assert optimizer._scores.heads[0].known == Bernoulli()
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize(
    "loss",
    [
        functional.mse_loss,
        functional.huber_loss,
        functional.l1_loss,
        lambda f, y: functional.mse_loss(f, y) + 0.1 * f.abs().mean(),
    ],
    ids=["mse", "huber", "l1", "penalty"],
)
def test_other_losses_take_the_loops_own_gradients(loss):
    """With one warning."""
    model, x, _ = problem()
    y = x[:, :3].sin()
    optimizer = NaturalGradient(model, seed=0)
    with pytest.warns(LikelihoodWarning, match="estimator='empirical'") as caught:
        losses = train(optimizer, model, x, y, 60, loss)
    assert len(caught) == 1
    assert losses[-1] < 0.6 * losses[0]
    assert max(losses) < 1.2 * losses[0]


def test_a_penalty_on_the_parameters_beside_the_loss():
    model, x, y = problem()
    optimizer = NaturalGradient(model, seed=0)

    def loss(f, y):
        penalty = sum(p.square().sum() for p in model.parameters())
        return functional.cross_entropy(f, y) + 1e-3 * penalty

    losses = train(optimizer, model, x, y, 30, loss)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("scaled", [1.0, 100.0])
def test_empirical_curvature_under_a_grad_scaler_trains(scaled):
    model, x, y = problem(dtype=torch.float32)
    optimizer = NaturalGradient(model, estimator="empirical")
    scaler = torch.amp.GradScaler("cpu")
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = scaled * functional.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("representation", ["kfac", "ekfac", "diagonal"])
def test_a_loss_that_explodes_at_the_edge_of_its_domain(representation):
    """The cross-entropy of probabilities: its gradient at the outputs is 1 / p."""
    model, x, _ = problem(outputs=1, dtype=torch.float32, n=200)
    model, y = nn.Sequential(*model, nn.Sigmoid()), (x[:, :1] > 0).float()
    optimizer = NaturalGradient(model, representation, seed=0)
    with pytest.warns(LikelihoodWarning):
        losses = train(optimizer, model, x, y, 40, functional.binary_cross_entropy)
    assert losses[-1] < 0.5 * losses[0]
    assert max(losses) < 2 * losses[0]


def test_spectral_normalisation():
    """Of a derived weight, with a product that is one number."""
    model, x, _ = problem(dtype=torch.float32)
    y = (x[:, 0] > 0).long()
    nn.utils.parametrizations.spectral_norm(model[0])
    losses = train(NaturalGradient(model, seed=0), model, x, y, 30)
    assert losses[-1] < 0.7 * losses[0]


class Own(nn.Module):
    """Returns its loss and its logits, as models of transformers do."""

    def __init__(self):
        super().__init__()
        self.net = problem(dtype=torch.float32)[0]

    def forward(self, x, labels):
        logits = self.net(x)
        return {"loss": functional.cross_entropy(logits, labels), "logits": logits}


class Cast(Own):
    """As accelerate wraps a model: under autocast, and outputs in float32."""

    def forward(self, x, labels):
        with torch.autocast("cpu", torch.bfloat16):
            found = super().forward(x, labels)
        return {name: value.float() for name, value in found.items()}


@pytest.mark.parametrize("kind", [Own, Cast])
@pytest.mark.parametrize("compiled", [False, True])
def test_models_that_return_their_own_loss(kind, compiled):
    model, (_, x, y) = kind(), problem(dtype=torch.float32)
    y = (x[:, 0] > 0).long()
    called = torch.compile(model, backend="aot_eager") if compiled else model
    optimizer = NaturalGradient(called, seed=0, warmup=3)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = called(x, y)["loss"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def slope_of(model, x):
    outputs = model(x)
    (slope,) = torch.autograd.grad(outputs.sum(), x, create_graph=True)
    return outputs, slope


def test_a_loss_with_derivatives_of_the_network_is_named():
    """Beside a loss of the outputs they are left out of the curvature, and one warning says so."""
    model, x, y = problem()
    x.requires_grad_(True)
    optimizer = NaturalGradient(model, likelihood="categorical")
    outputs, slope = slope_of(model, x)
    loss = functional.cross_entropy(outputs, y) + slope.square().mean()
    with pytest.warns(LikelihoodWarning, match=r"derivatives of the network.*forward"):
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    outputs, slope = slope_of(model, x)
    (functional.cross_entropy(outputs, y) + slope.square().mean()).backward()  # no second one
    optimizer.step()
    optimizer.zero_grad()
    slope_of(model, x)[1].square().mean().backward()
    with pytest.raises(DataError, match="none of them got a gradient"):
        optimizer.step()


def test_derivatives_of_one_pass_and_outputs_of_another():
    """An equation inside, and its boundary: one warning, and training goes on."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizer = NaturalGradient(model, likelihood=nn.MSELoss(), seed=0)

    def step():
        optimizer.zero_grad()
        x = torch.linspace(0, 1, 32)[:, None].requires_grad_()
        _, slope = slope_of(model, x)
        loss = (slope - x.cos()).square().mean() + model(torch.zeros(4, 1)).square().mean()
        loss.backward()
        optimizer.step()
        return loss.item()

    with pytest.warns(LikelihoodWarning, match="derivatives of the network"):
        losses = [step()]
    losses += [step() for _ in range(39)]  # and no second one
    assert losses[-1] < 0.5 * losses[0]


def test_residuals_that_the_forward_pass_differentiates():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)).double()

        def forward(self, x):
            with torch.enable_grad():
                x = x.detach().requires_grad_(True)
                (slope,) = torch.autograd.grad(self.net(x).sum(), x, create_graph=True)
            return slope

    model, x = Residual(), torch.linspace(0, 1, 16).double()[:, None]
    optimizer = NaturalGradient(model, "implicit", nn.MSELoss())
    losses = train(optimizer, model, x, x.sin(), 20, functional.mse_loss)
    assert losses[-1] < 0.1 * losses[0]
    assert all(map(math.isfinite, losses))


def test_the_step_may_be_compiled():
    model, x, y = problem(dtype=torch.float32)
    optimizer = NaturalGradient(model, seed=0, warmup=2)
    step = torch.compile(optimizer.step, backend="eager")
    losses = []
    for _ in range(6):
        losses.append(backward(optimizer, model, x, y))
        step()
    assert losses[-1] < losses[0]
    assert ng.optim.NaturalGradient is NaturalGradient
