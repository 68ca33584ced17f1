"""Loops that do more than one forward and one backward pass a step, and models that do more."""

import gc
import random
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import nngeo_lazy as ng
from nngeo_lazy.errors import (
    LikelihoodWarning,
    NonFiniteWarning,
    SelfCheckWarning,
    UnsupportedLayerError,
)
from nngeo_lazy.jacobian.record import Recorder
from nngeo_lazy.likelihoods import Categorical
from nngeo_lazy.optim import HessianFree, LevenbergMarquardt, NaturalGradient, loop
from nngeo_lazy.optim.replay import RandomState

from .loops import backward, dense_fisher, gradient, moved, problem, train, weights
from .test_loop import ALIVE, Saved
from cases import close

ESTIMATORS = ["exact", "empirical"]


# --- several backward passes ----------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("penalty", [False, True])
def test_gradients_of_inputs_are_no_backward_pass_of_the_loop(estimator, penalty):
    """An adversarial example, and a penalty of the outputs' gradient in the inputs."""
    model, x, y = problem()
    optimizer = NaturalGradient(model, "kfac", "categorical", estimator=estimator)
    x = x.requires_grad_()
    outputs = model(x)
    if penalty:
        (g,) = torch.autograd.grad(outputs.sum(), x, create_graph=True)
        loss = 0.1 * g.square().sum() + functional.cross_entropy(outputs, y)
        with pytest.warns(LikelihoodWarning, match="derivatives of the network"):
            loss.backward()
    else:
        (g,) = torch.autograd.grad(functional.cross_entropy(outputs, y), x)
        x = (x + 0.1 * g.sign()).detach()
        functional.cross_entropy(model(x), y).backward()
    F = ng.FIM(model, (x.detach(), y), "kfac", estimator=estimator)
    optimizer.step()
    assert optimizer.operator.num_examples == len(x)
    close(optimizer.operator.members[1].left, F.members[1].left)  # the penalty does not come there
    close(optimizer.operator.members[0].right, F.members[0].right)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_two_losses_of_one_output(estimator):
    """One after the other or as a sum: the same gradients, and the same curvature."""
    found = []
    for apart in (False, True):
        model, x, y = problem()
        optimizer = NaturalGradient(model, "kfac", "categorical", estimator=estimator, lr=0.1)
        outputs = model(x)
        losses = [c * functional.cross_entropy(outputs, y) for c in (0.3, 0.7)]
        if apart:
            losses[0].backward(retain_graph=True)
            losses[1].backward()
        else:
            sum(losses).backward()
        found.append(moved(optimizer, model))
    close(*found)


@pytest.mark.parametrize("how", [torch.autograd.grad, "by hand"])
def test_gradients_that_are_assigned(how):
    model, x, y = problem()
    optimizer = NaturalGradient(model, "kfac", estimator="exact")
    loss = functional.cross_entropy(model(x), y)
    for p, g in zip(
        model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True
    ):
        p.grad = g
    F = ng.FIM(model, (x, y), "kfac")
    optimizer.step()
    close(optimizer.operator.to_dense(), F.to_dense())


def test_optimizers_with_the_loops_gradients_and_with_drawn_labels():
    model, x, y = problem()
    own = NaturalGradient(model, "kfac", "categorical", params="0", estimator="empirical")
    drawn = NaturalGradient(model, "kfac", "categorical", params="2", estimator="mc")
    own.zero_grad()
    backward(drawn, model, x, y)
    F = ng.FIM(model, (x, y), "kfac", params="0", estimator="empirical")
    own.step()
    drawn.step()
    close(own.operator.to_dense(), F.to_dense())


@pytest.mark.parametrize("options", [{"representation": "implicit"}, {"lr": None}])
def test_optimizers_that_ask_for_gradients_beside_others(options):
    """Which parameters the outputs depend on is found by a backward pass that is nobody's loss."""
    model, x, y = problem()
    first = NaturalGradient(model, "kfac", "categorical", estimator="exact")
    second = NaturalGradient(model, likelihood="categorical", damping=0.1, **options)
    third = NaturalGradient(model, "kfac", "categorical", estimator="exact")
    for optimizer in (first, third):
        optimizer.zero_grad()
    backward(second, model, x, y)
    F = ng.FIM(model, (x, y), "kfac")
    for optimizer in (first, second, third):
        optimizer.step()
    close(first.operator.to_dense(), F.to_dense())
    close(third.operator.to_dense(), F.to_dense())


def test_a_backward_pass_that_raised_and_model_zero_grad():
    model, x, y = problem()
    optimizer = NaturalGradient(model, "kfac", estimator="exact")
    handle = model[0].weight.register_hook(lambda g: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        functional.cross_entropy(model(3 * x), y).backward()
    handle.remove()
    model.zero_grad()
    functional.cross_entropy(model(x), y).backward()
    F = ng.FIM(model, (x, y), "kfac")
    optimizer.step()
    close(optimizer.operator.to_dense(), F.to_dense())


def test_an_interrupt_in_a_forward_pass():
    model, x, y = problem()
    optimizer = NaturalGradient(model, "kfac", estimator="exact", update_every=1)
    train(optimizer, model, x, y, 1)

    def interrupt(*args):
        raise KeyboardInterrupt

    handle = model[1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(x)
    handle.remove()
    train(optimizer, model, x, y, 2)
    assert optimizer.operator.num_examples == len(x)


def test_an_interrupt_while_a_pass_is_closed(monkeypatch):
    model, x, y = problem()
    optimizer = NaturalGradient(model, "kfac", "categorical")

    def interrupted(*args):
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(Recorder, "__exit__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model(x)
    assert torch._C._len_torch_function_stack() == 0
    optimizer.zero_grad()
    backward(optimizer, model, x, y)
    optimizer.step()
    assert torch._C._len_torch_function_stack() == 0
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("scope", range(3))
def test_an_interrupt_while_a_pass_begins(monkeypatch, scope):
    """It ends what the pass has opened, though no later pass does."""
    model, x, _ = problem()
    optimizer = NaturalGradient(model, "kfac", "categorical")
    entered, real = [], ExitStack.enter_context

    def interrupted(stack, opened):
        result = real(stack, opened)
        entered.append(opened)
        if len(entered) == scope + 1:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(
        loop, "ExitStack", type("Stack", (ExitStack,), {"enter_context": interrupted})
    )
    with pytest.raises(KeyboardInterrupt):
        model(x)
    assert len(entered) == scope + 1
    assert torch._C._len_torch_function_stack() == 0
    assert torch.backends.mha.get_fastpath_enabled()
    del optimizer


def test_an_optimizer_that_goes_away_in_a_forward_pass():
    """Collected in the middle of it, say: what it opened is closed."""
    model, x, y = problem()
    optimizers = [NaturalGradient(model, "kfac", "categorical") for _ in range(2)]

    def collect(*args):
        optimizers.clear()
        gc.collect()

    handle = model[0].register_forward_hook(collect)
    outputs = model(x)
    handle.remove()
    functional.cross_entropy(outputs, y).backward()
    assert torch._C._len_torch_function_stack() == 0
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("estimator", ["mc", "empirical"])
def test_forward_passes_without_a_step_do_not_pile_up(estimator):
    model, x, _ = problem()
    optimizer = NaturalGradient(model, "kfac", "categorical", estimator=estimator)
    model(x)
    gc.collect()
    ALIVE.clear()
    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        for _ in range(3):
            model(x)
    gc.collect()
    assert not ALIVE
    assert optimizer.skipped_steps == 0


def test_batches_are_not_held_behind_a_step():
    model, x, y = problem()
    optimizer = NaturalGradient(model, "kfac", lr=None)
    train(optimizer, model, x, y, 1)
    assert optimizer._exact is None
    assert not optimizer._loop.passes


# --- models ---------------------------------------------------------------------------------------


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.policy, self.value = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 1)

    def forward(self, x):
        h = torch.tanh(self.body(x))
        return self.policy(h), self.value(h)


@pytest.mark.parametrize("representation", ["kfac", "ekfac", "diagonal", "kernel", "implicit"])
def test_heads_of_other_losses_take_the_plain_gradient(representation):
    torch.manual_seed(0)
    model, x, y = TwoHeads().double(), torch.randn(9, 4).double(), torch.randint(3, (9,))
    optimizer = NaturalGradient(
        model,
        representation,
        momentum=0.0,
        radius=None,
        damping=1e-3,
        outputs=lambda found: found[0],
    )
    policy, value = model(x)
    (functional.cross_entropy(policy, y) + value.square().mean()).backward()
    g, before = model.value.weight.grad.clone(), model.value.weight.detach().clone()
    optimizer.step()
    close(model.value.weight.detach(), before - g)
    rows = {row.parameter: row for row in optimizer.report()}
    assert rows["value.weight"].block == "none: plain gradient"
    assert "do not depend" in rows["value.weight"].note


def test_predictions_that_are_certain_and_wrong():
    """Probability one of another label: the loop's own label is the one that is pushed up."""
    outputs = torch.tensor([[100.0, 0.0, 0.0], [0.0, 100.0, 0.0], [0.0, 1.0, 0.0]]).double()
    outputs.requires_grad_()
    labels = torch.tensor([2, 1, 0])
    (g,) = torch.autograd.grad(functional.cross_entropy(outputs, labels), outputs)
    assert torch.equal(Categorical().target_of(outputs, g), labels)
    torch.manual_seed(0)
    model, x = nn.Linear(784, 10), 255 * torch.rand(32, 784)
    optimizer = NaturalGradient(model, "kfac", lr=1e-3, damping=1.0)
    train(optimizer, model, x, torch.randint(10, (32,)), 3)


def test_curvature_that_is_zero():
    """All predictions are certain, and some are wrong: a gradient, but an exact Fisher of zero."""
    torch.manual_seed(0)
    model, x = nn.Linear(4, 3), torch.randn(20, 4)
    with torch.no_grad():
        model.bias.copy_(torch.tensor([3e3, 0.0, 0.0]))
    losses = train(
        NaturalGradient(model, "implicit", "categorical"), model, x, torch.ones(20).long(), 5
    )
    assert losses[-1] <= losses[0]


def test_logits_of_minus_infinity():
    """Actions that are not allowed."""
    model, x, _ = problem()
    optimizer = NaturalGradient(model, "kfac", lr=0.1, outputs=lambda found: found)
    allowed = torch.tensor([0.0, 0.0, float("-inf")])

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = problem()[0]

        def forward(self, x):
            return self.body(x) + (allowed if self.training else 0)

    model, y = Masked(), torch.randint(2, (40,))
    optimizer = NaturalGradient(model, "kfac", "categorical", lr=0.1, damping=0.1)
    losses = train(optimizer, model, x, y, 20)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("representation", ["kfac", "implicit"])
def test_transforms_of_torch_func_are_not_watched(representation):
    model, x, y = problem()
    optimizer = NaturalGradient(model, representation, "categorical", damping=0.1)
    train(optimizer, model, x, y, 1)
    optimizer.zero_grad()
    J = torch.func.vmap(torch.func.jacrev(model))(x)
    assert J.shape == (40, 3, 4)
    train(optimizer, model, x, y, 1)


def test_frozen_layers_of_another_dtype():
    torch.manual_seed(0)
    front = nn.Linear(4, 5).bfloat16().requires_grad_(False)

    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.front, self.head = front, nn.Linear(5, 3)

        def forward(self, x):
            return self.head(self.front(x.bfloat16()).float())

    model, x, y = M(), torch.randn(20, 4), torch.randint(3, (20,))
    for representation in ("kfac", "implicit"):
        optimizer = NaturalGradient(model, representation, "categorical", lr=0.1, damping=0.1)
        train(optimizer, model, x, y, 2)


# --- schedules and groups -------------------------------------------------------------------------


def test_a_refresh_is_due_until_there_is_one():
    model, x, y = problem()
    optimizer = NaturalGradient(model, "kfac", "categorical", lr=0.1, update_every=50)
    backward(optimizer, model, x, y, lambda f, y: functional.cross_entropy(f, y) * float("nan"))
    with pytest.warns(NonFiniteWarning):
        optimizer.step()
    before = weights(model)
    train(optimizer, model, x, y, 1)
    assert not torch.equal(weights(model), before)


def test_decompositions_come_with_the_refresh_behind_their_time():
    model, x, y = problem()
    optimizer = NaturalGradient(model, "kfac", update_every=4, invert_every=6, warmup=0, seed=0)
    held = []
    for _ in range(26):
        train(optimizer, model, x, y, 1)
        held.append(optimizer._curvature.solved)
    fresh = [k for k in range(26) if k == 0 or held[k] is not held[k - 1]]
    assert fresh == [0, 8, 12, 20, 24]


def test_a_group_keeps_its_own_damping():
    model, x, y = problem()
    groups = [{"params": "0", "damping": 5.0}, {"params": "2"}]
    optimizer = NaturalGradient(model, "kfac", params=groups, damping=lambda step: 0.5**step)
    train(optimizer, model, x, y, 3)
    assert [group["damping"] for group in optimizer.param_groups] == [5.0, 0.125]
    rule = LevenbergMarquardt(every=1, decay=0.5)
    optimizer = NaturalGradient(model, "kfac", params=groups, damping=rule, lr=1e-6)
    backward(optimizer, model, x, y)
    optimizer.step(lambda: functional.cross_entropy(model(x), y))
    assert [group["damping"] for group in optimizer.param_groups] == [5.0, 0.5]


def test_groups_with_the_quadratic_model():
    """Weight decay goes with the model's rate."""
    model, x, y = problem()
    groups = [{"params": "0"}, {"params": "2", "weight_decay": 0.5}]
    optimizer = NaturalGradient(
        model, "kfac", params=groups, lr=None, momentum=0.0, damping=0.1, warmup=0
    )
    train(optimizer, model, x, y, 1)
    backward(optimizer, model, x, y)
    g, before = gradient(model), weights(model)
    d = optimizer._curvature.solved.damped(0.1).solve(g)
    optimizer.step()
    now = weights(model)
    rate = (before - now)[:25] @ d[:25] / d[:25].square().sum()
    close(now[:25], before[:25] - rate * d[:25], 1e-8)
    m = optimizer.state[model[2].weight]["last_step"]
    close(model[2].weight.detach(), (1 - rate * 0.5) * before[25:40].view(3, 5) - m, 1e-8)


def test_resuming_in_bfloat16():
    """Averages stay in float32, in which they were kept."""

    def make():
        model, x, y = problem(dtype=torch.float32)
        model = model.bfloat16()
        return model, x.bfloat16(), y, NaturalGradient(model, "kfac", "categorical", seed=0)

    model, x, y, optimizer = make()
    train(optimizer, model, x, y, 4)
    other, _, _, resumed = make()
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    train(optimizer, model, x, y, 5)
    train(resumed, other, x, y, 5)
    assert torch.equal(weights(model), weights(other))
    assert resumed.state_dict()["curvature"]["direction"]["m"].dtype == torch.float32


def test_empirical_curvature_counts_terms_where_it_knows_the_likelihood():
    model, x, y = problem()
    for likelihood, expected in (("categorical", 40), (None, 40), (None, None)):
        optimizer = NaturalGradient(model, "kfac", likelihood, estimator="empirical")
        loss = functional.cross_entropy if expected else lambda f, y: f.square().mean()
        train(optimizer, model, x, y, 1, loss)
        assert optimizer.operator.num_terms == expected


def test_hessian_free_with_heads_of_other_losses():
    torch.manual_seed(0)
    model, x, y = TwoHeads().double(), torch.randn(9, 4).double(), torch.randint(3, (9,))
    free = HessianFree("kfac", tol=1e-10, max_iter=300)
    optimizer = NaturalGradient(model, free, outputs=lambda found: found[0])
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        policy, value = model(x)
        loss = functional.cross_entropy(policy, y) + value.square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_a_proof_that_rounding_fails_later_ends_no_run():
    """The gradient of one layer becomes a difference of large numbers, which single ones miss."""

    class Cancelling(nn.Module):
        size = 0.0

        def forward(self, h):
            h = h[:, torch.arange(h.shape[1])]  # proved on each refresh: it may mix examples
            return (self.size + 1) * h - self.size * h

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), Cancelling(), nn.Tanh(), nn.Linear(5, 3))
    x, y = torch.randn(40, 4), torch.randint(3, (40,))
    optimizer = NaturalGradient(model, seed=0)
    train(optimizer, model, x, y, 3)
    model[1].size = 3e5
    with pytest.warns(
        SelfCheckWarning, match=r"0\.weight.*has no example axis.*taken for rounding"
    ) as told:
        losses = train(optimizer, model, x, y, 3)
    assert len(told) == 1  # once
    assert losses[-1] < losses[0]
    assert {row.form for row in optimizer.report()} == {"linear: outer"}


# --- layers that are dropped at random ------------------------------------------------------------


class Dropping(nn.Module):
    """Residual layers, some of which are left out in training."""

    def __init__(self, chance=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 5), nn.Tanh()) for _ in range(3)
        )
        self.chance, self.without = chance, ()

    def forward(self, x):
        x = self.first(x)
        for k, block in enumerate(self.blocks):
            dropped = k in self.without or float(torch.rand([])) < self.chance
            if not (self.training and dropped):
                x = x + block(x)
        return self.last(x)


@pytest.mark.parametrize("representation", ["block_diagonal", "diagonal", "kfac", "ekfac"])
@pytest.mark.parametrize("order", [((0, 2), (), (1,)), ((), (1,), (0, 2)), ((2,), (0, 1, 2))])
def test_layers_that_are_dropped(representation, order):
    """Each pass has the Fisher of what it called, which is zero for a layer that it did not."""
    model, (_, x, y) = Dropping().double(), problem()
    options = {"estimator": "exact", "factor_decay": 0.5, "damping": 0.1, "radius": None, "lr": 0.0}
    optimizer = NaturalGradient(model, representation, **options)
    mean, count = 0.0, 0.0
    for without in order:
        model.without = without
        backward(optimizer, model, x, y)
        fresh = dense_fisher(model, x)
        optimizer.step()
        mean, count = 0.5 * mean + 0.5 * fresh, 0.5 * count + 0.5
    expected, F = mean / count, optimizer.operator
    if representation == "ekfac":  # it has the trace of each block
        for block, layout in zip(F.members, F.layouts, strict=True):
            close(block.trace(), sum(expected.diagonal()[each].sum() for each in layout.slices))
    if representation in ("block_diagonal", "diagonal"):
        close(F.diagonal(), expected.diagonal())
        if representation == "block_diagonal":
            where = F.space.slices["blocks.1.1.weight"]
            close(F.to_dense()[where, where], expected[where, where])
    if representation == "kfac":  # of the positions that there were, and of all examples
        used = [k for k, without in enumerate(order) if 1 not in without]
        G, A, seen = 0.0, 0.0, 0.0
        for k in used:
            model.without, weight = order[k], 0.5 ** (len(order) - k)
            model.eval()
            block = _layer(ng.FIM(model, (x, y), "kfac", forward=_as_trained))
            G, A, seen = G + weight * block.left, A + weight * block.right, seen + weight
        own = _layer(F)
        close(own.left, G / count)
        close(own.right, A / seen)


def _layer(F):
    return F.members[F.names.index("blocks.1.1")]


def _as_trained(model, batch):
    """Without the layers that are left out in training."""
    model.training = True
    try:
        return model(batch[0])
    finally:
        model.training = False


@pytest.mark.parametrize("representation", ["kfac", "ekfac"])
def test_layers_that_are_dropped_at_random_train(representation):
    model, (_, x, _) = Dropping(0.4), problem(dtype=torch.float32)
    optimizer = NaturalGradient(model, representation, seed=0)
    losses = train(optimizer, model, x, (x[:, 0] > 0).long() + (x[:, 1] > 0), 60)
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    assert optimizer.skipped_steps == 0


def test_a_layer_that_another_function_replaces_is_not_dropped():
    """Its parameters are used, so that zero would be wrong."""

    class Replaced(Dropping):
        def forward(self, x):
            if self.training:
                x = self.first(x)
                return self.last(x + (x.exp() * self.blocks[0][1].weight.sum()))
            return super().forward(x)

    model, (_, x, y) = Replaced().double(), problem()
    optimizer = NaturalGradient(model, "kfac", params=["first", "last", "blocks.0.1.weight"])
    with pytest.raises(UnsupportedLayerError, match="in training mode to call the layers"):
        backward(optimizer, model, x, y)


@pytest.mark.parametrize(
    "draw",
    [lambda: torch.rand(3), lambda: np.random.rand(3), random.random],  # noqa: NPY002
)
def test_numbers_of_every_generator_come_again(draw):
    state = RandomState.now(torch.device("cpu"))
    first, second = draw(), draw()
    with state.forked():
        state.restore()
        assert np.array_equal(draw(), first)
    state.restore()
    assert np.array_equal(draw(), first)
    assert np.array_equal(draw(), second)
