"""The loop stays ordinary: what it may do, and what the optimizer must not change."""

import copy
import gc
import io
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import nngeo_lazy as ng
from nngeo_lazy.errors import NonFiniteWarning
from nngeo_lazy.optim import HessianFree, LevenbergMarquardt, NaturalGradient, Preconditioner

from .loops import (
    STRUCTURED,
    backward,
    dense_fisher,
    gradient,
    moved,
    name_of,
    noisy,
    problem,
    train,
    weights,
)
from cases import close

# --- training mode --------------------------------------------------------------------------------


@pytest.mark.parametrize("representation", ["diagonal", "kfac", "ekfac", "kernel", "implicit"])
def test_batch_norm_and_dropout_train(representation):
    model = noisy()
    x = torch.randn(60, 4).double()
    y = (x[:, 0] > 0).long()
    optimizer = NaturalGradient(model, representation, "categorical", seed=0, update_every=2)
    losses = train(optimizer, model, x, y, 40)
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    assert all(m.training for m in model.modules())
    if representation in ("kfac", "ekfac"):
        rows = {row.parameter: row for row in optimizer.report()}
        assert rows["1.weight"].block.startswith("diagonal")
        assert "Kronecker" in rows["0.weight"].block


@pytest.mark.parametrize("representation", ["kfac", "ekfac", "kernel", "implicit"])
def test_the_loop_draws_and_averages_what_it_did(representation):
    """Losses, buffers and random numbers are those of a loop with another optimizer."""
    x, y = torch.randn(20, 4).double(), torch.randint(3, (20,))
    seen = []
    for natural in (False, True):
        model = noisy()
        torch.manual_seed(3)
        optimizer = (
            NaturalGradient(model, representation, "categorical", lr=0.0, seed=0, damping=1.0)
            if natural
            else torch.optim.SGD(model.parameters(), lr=0.0)
        )
        losses = train(optimizer, model, x, y, 4)
        seen.append((losses, [b.clone() for b in model.buffers()], torch.rand(3)))
    assert seen[0][0] == seen[1][0]
    assert all(map(torch.equal, seen[0][1], seen[1][1]))
    assert torch.equal(seen[0][2], seen[1][2])


def test_statistics_of_a_batch_are_constants():
    """The curvature is that of the layers' own inputs and gradients, batch statistics and all."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 2)).double()
    x, y = torch.randn(30, 4).double(), torch.randn(30, 2).double()
    seen = {}
    model[0].register_forward_hook(lambda m, a, out: seen.update(x=a[0], f=out))
    optimizer = NaturalGradient(model, "kfac", estimator="empirical", lr=0.0)
    out = model(x)
    loss = (out - y).square().sum(1).mean() / 2
    (g,) = torch.autograd.grad(loss, seen["f"], retain_graph=True)
    loss.backward()
    optimizer.step()
    block = optimizer.operator.members[0]
    ones = torch.cat([x, torch.ones(30, 1).double()], 1)
    close(block.left[0], 30 * g.T @ g)
    close(block.right[0], ones.T @ ones / 30)


def test_passes_without_gradient_or_in_evaluation_are_ignored():
    model, x, y = problem()
    reference = copy.deepcopy(model)
    changes = []
    for each, others in ((reference, False), (model, True)):
        optimizer = NaturalGradient(each, "kfac", estimator="exact", lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            if others:
                with torch.no_grad():
                    each(5 * x)
                each.eval()
                each(3 * x).sum()
                each.train()
                ng.FIM(each, (x, y), "kfac")
                ng.GGN(each, (x, y), loss="categorical") @ torch.ones(43).double()
            functional.cross_entropy(each(x), y).backward()
            if others:
                each(2 * x)  # for a metric: no loss is made from it
            optimizer.step()
        changes.append(weights(each))
    close(*changes)


def test_the_forward_pass_may_come_before_zero_grad():
    model, x, y = problem()
    optimizer = NaturalGradient(model, "kfac", estimator="exact", update_every=1, lr=0.1)
    for _ in range(3):
        loss = functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        F = ng.FIM(model, (x, y), "kfac")
        optimizer.step()
        assert optimizer.operator.num_examples == len(x)
    assert F.space == optimizer.operator.space


def test_a_backward_pass_that_is_thrown_away():
    """zero_grad forgets its curvature, too."""
    model, x, y = problem()
    optimizer = NaturalGradient(model, "kfac", estimator="exact", lr=0.1)
    backward(optimizer, model, 7 * x, y)
    backward(optimizer, model, x, y)
    F = ng.FIM(model, (x, y), "kfac")
    optimizer.step()
    close(optimizer.operator.to_dense(), F.to_dense())


def test_closures():
    """As torch's: the closure evaluates the loss and its gradient."""
    model, x, y = problem()
    other = copy.deepcopy(model)
    optimizer = NaturalGradient(model, "kfac", lr=0.1, estimator="exact")
    reference = NaturalGradient(other, "kfac", lr=0.1, estimator="exact")

    def closure():
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    for expected in train(reference, other, x, y, 3):
        assert abs(float(optimizer.step(closure).detach()) - expected) < 1e-12
    close(weights(model), weights(other))


# --- what a loop may be made of -------------------------------------------------------------------


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("representation", ["kfac", "implicit"])
def test_compiled_models(in_place, representation):
    changes = []
    for compiled in (False, True):
        model, x, y = problem()
        called = model
        if compiled and in_place:
            model.compile(backend="eager")
        elif compiled:
            called = torch.compile(model, backend="eager")
        optimizer = NaturalGradient(
            called, representation, "categorical", lr=0.1, damping=0.1, update_every=3, seed=0
        )
        train(optimizer, called, x, y, 7)
        changes.append(weights(model))
    close(*changes, 1e-8)


@pytest.mark.parametrize("estimator", ["mc", "empirical"])
@pytest.mark.parametrize("representation", ["kfac", "ekfac", "diagonal", "implicit"])
def test_autocast_and_bfloat16(representation, estimator):
    """Statistics, averages and solves stay in float32."""
    losses = {}
    for kind in ("float32", "autocast", "bfloat16"):
        model, x, y = problem(dtype=torch.float32, n=64)
        y = (x[:, 0] > 0).long()
        if kind == "bfloat16":
            model, x = model.bfloat16(), x.bfloat16()
        optimizer = NaturalGradient(
            model, representation, "categorical", seed=0, estimator=estimator
        )
        for _ in range(20):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
                loss = functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
        losses[kind] = loss.item()
        if representation != "implicit":
            assert optimizer.operator.dtype == torch.float32
            held = optimizer.state_dict()["curvature"]["direction"]
            assert {held[name].dtype for name in ("m", "last", "counts")} == {torch.float32}
    assert losses["float32"] < 0.35
    assert abs(losses["autocast"] - losses["float32"]) < 0.05
    assert abs(losses["bfloat16"] - losses["float32"]) < 0.1


def test_backward_inside_of_autocast():
    model, x, y = problem(dtype=torch.float32, n=64)
    optimizer = NaturalGradient(model, "kfac", lr=0.3, damping=0.1, estimator="exact")
    with torch.autocast("cpu", torch.bfloat16):
        backward(optimizer, model, x, y)
        optimizer.step()
    F = ng.FIM(model, (x, y), "kfac")
    right = optimizer.operator.members[0].right
    close(right, F.members[0].right, 1e-5)  # bfloat16 would be off by 1e-2


def test_outputs_with_logits_and_keyword_calls():
    class Output:
        def __init__(self, logits, loss):
            self.logits, self.loss = logits, loss

    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = problem()[0]

        def forward(self, *, x, labels):
            logits = self.body(x)
            return Output(logits, functional.cross_entropy(logits, labels))

    torch.manual_seed(0)
    model, (_, x, y) = M(), problem()
    optimizer = NaturalGradient(model, "kfac", estimator="exact", lr=0.1)
    model(x=x, labels=y).loss.backward()
    F = ng.FIM(model.body, (x, y), "kfac")
    optimizer.step()
    close(optimizer.operator.to_dense(), F.to_dense())


def test_parameters_without_a_form_take_the_plain_gradient():
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.log_scale = nn.Parameter(torch.zeros(3))
            self.a, self.out = nn.Linear(3, 16), nn.Linear(16, 2)

        def forward(self, x):
            return self.out(torch.tanh(self.a(x * self.log_scale.exp())))

    torch.manual_seed(0)
    model = M()
    x, y = torch.randn(9, 3), torch.randint(2, (9,))
    options = {"lr": 0.5, "momentum": 0.0, "radius": None}
    optimizer = NaturalGradient(model, "kfac", estimator="empirical", **options)
    backward(optimizer, model, x, y)
    g = model.log_scale.grad.clone()
    before = model.log_scale.detach().clone()
    optimizer.step()
    close(model.log_scale.detach(), before - 0.5 * g, 1e-6)
    rows = {row.parameter: row for row in optimizer.report()}
    assert rows["log_scale"].block == "none: plain gradient"
    assert "a weight made of others" in rows["log_scale"].note
    assert "Kronecker" in rows["out.weight"].block
    assert len(rows) == len(list(model.parameters()))
    assert optimizer.operator.space.names == (*("a.weight", "a.bias", "out.weight", "out.bias"),)
    free = HessianFree("kfac", tol=1e-6, max_iter=200)  # which has no such parameters
    optimizer = NaturalGradient(model, free)
    losses = train(optimizer, model, x, y, 40)  # from where the step without a bound went astray
    assert losses[-1] < 0.1
    assert losses == sorted(losses, reverse=True)


def test_sparse_gradients():
    changes = []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(5, 3, sparse=sparse), nn.Flatten(), nn.Linear(6, 2))
        x, y = torch.randint(5, (4, 2)), torch.randint(2, (4,))
        optimizer = NaturalGradient(model, "kfac", lr=0.1, estimator="exact")
        train(optimizer, model, x, y, 3)
        changes.append(weights(model))
    close(*changes, 1e-5)


def test_frozen_and_selected_parameters():
    model, x, y = problem()
    for p in model[0].parameters():
        p.requires_grad_(False)
    optimizer = NaturalGradient(model, "kfac", lr=0.1)
    before = weights(model)
    train(optimizer, model, x, y, 2)
    assert torch.equal(weights(model)[:25], before[:25])
    assert not torch.equal(weights(model)[25:], before[25:])
    assert optimizer.operator.space.names == ("2.weight", "2.bias")
    model, x, y = problem()
    optimizer = NaturalGradient(model, "kfac", params=nn.Linear, lr=0.1)
    train(optimizer, model, x, y, 1)
    assert len(optimizer.operator.space) == 43


def test_unused_parameters_are_left_alone():
    model, x, y = problem()
    model.extra = nn.Linear(2, 2).double()
    before = model.extra.weight.detach().clone()
    model.forward = lambda x: model[2](model[1](model[0](x)))
    optimizer = NaturalGradient(model, "kfac", lr=0.1, weight_decay=0.1)
    train(optimizer, model, x, y, 3)
    assert torch.equal(model.extra.weight, before)


def test_copies_and_pickles_of_the_model_have_no_optimizer():
    model, x, y = problem()
    optimizer = NaturalGradient(model, "kfac", estimator="exact", lr=0.1)
    clone = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    optimizer.zero_grad()
    for other in (clone, loaded):
        functional.cross_entropy(other(9 * x), y).backward()
    functional.cross_entropy(model(x), y).backward()
    F = ng.FIM(model, (x, y), "kfac")
    optimizer.step()
    close(optimizer.operator.to_dense(), F.to_dense())


ALIVE: weakref.WeakSet = weakref.WeakSet()


class Saved:
    """What a graph saves, which lives as long as the graph does."""

    def __init__(self, tensor):
        self.tensor = tensor.detach()
        ALIVE.add(self)


@pytest.mark.parametrize("estimator", ["mc", "empirical"])
def test_passes_leave_nothing_behind(estimator):
    """No pass, finished or not, keeps its graph: hooks must not hold what they hang on."""
    model, x, y = problem()
    optimizer = NaturalGradient(model, "kfac", "categorical", estimator=estimator, update_every=1)
    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        for _ in range(3):
            optimizer.zero_grad()
            unused = model(x)  # never differentiated
            value = functional.cross_entropy(model(x), y)
            assert ALIVE
            value.backward()
            optimizer.step()
    del unused, value
    gc.collect()
    assert not ALIVE


def test_hooks_go_with_the_optimizer():
    model, x, y = problem()
    optimizer = NaturalGradient(model, "kfac")
    train(optimizer, model, x, y, 2)
    hooks = model._forward_hooks, model._forward_pre_hooks
    assert all(hooks)
    del optimizer
    gc.collect()
    assert not any(hooks)


def test_two_optimizers_of_one_model():
    model, x, y = problem()
    plain = {"lr": 0.1, "momentum": 0.0, "radius": None, "damping": 1e-3}
    first = NaturalGradient(model, "kfac", params="0", estimator="exact", **plain)
    second = NaturalGradient(model, "ekfac", params="2", estimator="exact", **plain)
    first.zero_grad()
    backward(second, model, x, y)
    g = gradient(model)
    wanted = [ng.FIM(model, (x, y), "kfac", params="0"), ng.FIM(model, (x, y), "ekfac", params="2")]
    before = weights(model)
    first.step()
    second.step()
    change = weights(model) - before
    close(change[:25], -0.1 * wanted[0].damped(1e-3).solve(g[:25]))
    close(change[25:], -0.1 * wanted[1].damped(1e-3).solve(g[25:]))


def test_a_forward_pass_that_raises_closes_what_it_opened():
    model, x, y = problem()
    optimizer = NaturalGradient(model, "kfac", estimator="exact", lr=0.1)
    train(optimizer, model, x, y, 1)
    optimizer._steps = 0
    optimizer._prepare()
    with pytest.raises(RuntimeError, match="shapes"):
        model(torch.randn(3, 7).double())
    train(optimizer, model, x, y, 2)


# --- no waiting, nothing that is not finite -------------------------------------------------------


class NoSync(TorchDispatchMode):
    """Raises where a number is read from the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.is_nonzero.default,
            torch.ops.aten.nonzero.default,
            torch.ops.aten.equal.default,
        ):
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["exact", "factored"])
@pytest.mark.parametrize("representation", STRUCTURED, ids=name_of)
def test_a_plain_step_reads_nothing_from_the_device(representation, method):
    model, x, y = problem()
    optimizer = NaturalGradient(
        model, representation, weight_decay=0.1, damping_method=method, warmup=2
    )
    train(optimizer, model, x, y, 2)
    for _ in range(3):
        backward(optimizer, model, x, y)
        with NoSync():
            optimizer.step()


def test_the_spy_sees_a_refresh():
    model, x, y = problem()
    optimizer = NaturalGradient(model, "kfac")
    backward(optimizer, model, x, y)
    with pytest.raises(AssertionError, match="waits"), NoSync():
        optimizer.step()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("refresh", [False, True])
@pytest.mark.parametrize("representation", ["kfac", "ekfac", "diagonal"])
def test_gradients_that_are_not_finite_change_nothing(representation, refresh, bad):
    model, x, y = problem()
    optimizer = NaturalGradient(
        model,
        representation,
        lr=0.1,
        weight_decay=0.1,
        update_every=4,
        warmup=0,
        estimator="exact",
    )
    train(optimizer, model, x, y, 4 if refresh else 2)
    before, F = weights(model), optimizer.operator
    held = optimizer.state_dict()["curvature"]["direction"]
    wrong = x.clone()
    wrong[3] = bad
    backward(optimizer, model, wrong, y)
    if refresh:
        with pytest.warns(NonFiniteWarning, match="not refreshed.*lower lr"):
            optimizer.step()
    else:
        optimizer.step()
    assert torch.equal(weights(model), before)
    now = optimizer.state_dict()["curvature"]["direction"]
    names = "m", "last", "second", "length", "counts"
    assert all(torch.equal(held[name], now[name]) for name in names)
    assert all(torch.equal(held["trust"][name], now["trust"][name]) for name in held["trust"])
    assert optimizer.operator is F
    assert optimizer.skipped_steps == 1
    train(optimizer, model, x, y, 1)
    assert not torch.equal(weights(model), before)
    if not refresh:
        with pytest.warns(NonFiniteWarning, match="gradients of 1 steps") as caught:
            train(optimizer, model, x, y, 1)
        assert caught[0].message.steps == 1


@pytest.mark.parametrize("options", [{"representation": "implicit"}, {"lr": None}])
def test_passes_that_are_not_finite_are_not_run_again(options):
    model, x, y = problem()
    optimizer = NaturalGradient(model, likelihood="categorical", damping=0.1, **options)
    train(optimizer, model, x, y, 2)
    before = weights(model)
    backward(optimizer, model, x * float("inf"), y)
    with pytest.warns(NonFiniteWarning, match="gradients of 1 steps.*lower lr"):
        optimizer.step()
    assert torch.equal(weights(model), before)
    train(optimizer, model, x, y, 1)
    assert not torch.equal(weights(model), before)
    preconditioner = Preconditioner(model, "implicit", "categorical")
    backward(preconditioner, model, x * float("inf"), y)
    with pytest.warns(NonFiniteWarning, match="gradients of 1 steps"):
        preconditioner.step()
    assert not gradient(model).any()


def test_a_first_gradient_that_is_not_finite():
    model, x, y = problem()
    optimizer = NaturalGradient(model, "kfac", lr=0.1, estimator="exact")
    before = weights(model)
    wrong = functional.cross_entropy(model(x), y) * float("nan")
    wrong.backward()
    with pytest.warns(NonFiniteWarning, match="not refreshed"):
        optimizer.step()
    assert torch.equal(weights(model), before)
    optimizer._steps = 0
    optimizer._prepare()
    assert train(optimizer, model, x, y, 3)[-1] > 0


# --- state ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "representation",
    [*STRUCTURED[:-1], "kernel", "implicit", HessianFree("kfac"), ("kfac", "factored")],
    ids=str,
)
def test_resuming_makes_the_same_steps_to_the_bit(representation):
    method = "exact"
    if isinstance(representation, tuple):
        representation, method = representation

    def make():
        model = noisy(dtype=torch.float32)
        optimizer = NaturalGradient(
            model,
            representation,
            "categorical",
            lr=0.05,
            damping=0.1,
            update_every=2,
            invert_every=4,
            seed=7,
            weight_decay=0.01,
            damping_method=method,
        )
        return model, optimizer

    x, y = torch.randn(20, 4), torch.randint(3, (20,))
    model, optimizer = make()
    train(optimizer, model, x, y, 7)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), torch.get_rng_state()], file)
    train(optimizer, model, x, y, 6)
    expected = weights(model)

    file.seek(0)
    weights_state, state, random = torch.load(file, weights_only=True)
    model, optimizer = make()
    optimizer.load_state_dict(state)
    model.load_state_dict(weights_state)
    torch.set_rng_state(random)
    train(optimizer, model, x, y, 6)
    assert torch.equal(weights(model), expected)


def test_a_preconditioner_resumes():
    model, x, y = problem()
    first = Preconditioner(model, "ekfac", seed=0, update_every=3)
    for _ in range(4):
        backward(first, model, x, y)
        first.step()
    state = first.state_dict()
    grads = []
    backward(first, model, x, y)
    first.step()
    grads.append(gradient(model))
    second = Preconditioner(model, "ekfac", seed=1, update_every=3)
    second.load_state_dict(state)
    backward(second, model, x, y)
    second.step()
    grads.append(gradient(model))
    assert torch.equal(*grads)


# --- rules that follow the loss -------------------------------------------------------------------


def quadratic(seed=0):
    """Least squares: the quadratic model is exact."""
    torch.manual_seed(seed)
    model = nn.Linear(4, 2).double()
    x, y = torch.randn(30, 4).double(), torch.randn(30, 2).double()
    return model, x, y, lambda f, y: (f - y).square().sum(1).mean() / 2


@pytest.mark.parametrize("representation", ["kfac", "diagonal", "implicit"])
@pytest.mark.parametrize("lr", [0.1, None])
def test_levenberg_marquardt_on_a_quadratic(representation, lr):
    """The reduction ratio is one, so that the damping shrinks by its rule."""
    model, x, y, loss = quadratic()
    rule = LevenbergMarquardt(initial=2.0, every=3, decay=0.9)
    optimizer = NaturalGradient(model, representation, "gaussian", lr=lr, damping=rule, seed=0)
    dampings = []

    def closure():
        optimizer.zero_grad()
        value = loss(model(x), y)
        value.backward()
        return value

    for _ in range(9):
        optimizer.step(closure)
        dampings.append(optimizer.param_groups[0]["damping"])
    expected = [2.0 * 0.9 ** (3 * (k // 3)) for k in range(1, 10)]
    assert all(abs(a - b) < 1e-12 for a, b in zip(dampings, expected, strict=True))


def test_levenberg_marquardt_raises_the_damping_where_the_model_is_wrong():
    model, x, y = problem()
    rule = LevenbergMarquardt(initial=1e-3, every=1, decay=0.5)
    optimizer = NaturalGradient(
        model, "kfac", lr=30.0, momentum=0.0, damping=rule, estimator="exact"
    )
    loss = backward(optimizer, model, x, y)  # the loop's own, and a closure without a gradient
    g, F, before = gradient(model), dense_fisher(model, x), weights(model)
    optimizer.step(lambda: functional.cross_entropy(model(x), y))
    delta = weights(model) - before
    after = functional.cross_entropy(model(x), y).item()
    ratio = (after - loss) / float(g @ delta + delta @ F @ delta / 2)
    assert ratio < 0.25 or ratio > 0.75
    expected = 2e-3 if ratio < 0.25 else 5e-4
    assert abs(optimizer.param_groups[0]["damping"] - expected) < 1e-12


def test_the_rule_of_levenberg_and_marquardt():
    rule = LevenbergMarquardt(every=2, decay=0.5, minimum=0.1, maximum=4.0)
    assert rule.adjusted(1.0, 0.9) == 0.25
    assert rule.adjusted(1.0, 0.5) == 1.0
    assert rule.adjusted(1.0, 0.1) == 4.0
    assert rule.adjusted(1.0, float("nan")) == 4.0
    assert rule.adjusted(2.0, -1.0) == 4.0
    assert rule.adjusted(0.2, 1.0) == 0.1


def test_evaluating_the_loss_again_leaves_no_trace():
    """Gradients, buffers, random numbers and passes are those of the first evaluation."""
    model, x, y = noisy(), torch.randn(20, 4).double(), torch.randint(3, (20,))
    rule = LevenbergMarquardt(every=1)
    optimizer = NaturalGradient(model, "kfac", "categorical", damping=rule, lr=0.0, seed=0)
    torch.manual_seed(5)

    def closure():
        optimizer.zero_grad()
        value = functional.cross_entropy(model(x), y)
        value.backward()
        return value

    optimizer.step(closure)
    found = gradient(model), [b.clone() for b in model.buffers()], torch.rand(2)
    other = noisy()
    torch.manual_seed(5)
    functional.cross_entropy(other(x), y).backward()
    assert torch.equal(found[0], gradient(other))
    assert all(map(torch.equal, found[1], list(other.buffers())))
    assert torch.equal(found[2], torch.rand(2))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("representation", ["kfac", "diagonal"])
def test_learning_rate_and_momentum_from_the_quadratic_model(representation, momentum):
    """The step minimises the damped model over the span of the direction and the last step."""
    model, x, y = problem()
    optimizer = NaturalGradient(
        model, representation, lr=None, momentum=momentum, damping=0.1, estimator="exact"
    )
    last = torch.zeros(43).double()
    for _ in range(4):
        F = dense_fisher(model, x) + 0.1 * torch.eye(43).double()
        backward(optimizer, model, x, y)
        g = gradient(model)
        change = moved(optimizer, model)
        direction = optimizer._curvature.solved.damped(0.1).solve(g)
        columns = [direction, last] if momentum and last.any() else [direction]
        D = torch.stack(columns, 1)
        c = torch.linalg.solve(D.T @ F @ D, -D.T @ g)
        close(change, D @ c, 1e-8)
        last = change


def test_the_model_of_several_batches():
    """Accumulated passes: the exact curvature is that of all of them, with their own dropout."""
    changes = []
    for parts in (1, 2):
        model, x, y = problem(n=20)
        optimizer = NaturalGradient(
            model, HessianFree(tol=1e-12, max_iter=300), damping=0.1, lr=1.0, momentum=0.0
        )
        for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True):
            (functional.cross_entropy(model(a), b) / parts).backward()
        changes.append(moved(optimizer, model))
    close(*changes, 1e-8)


def test_exact_products_repeat_the_random_numbers_of_the_pass():
    """Under dropout the step is the solve with the Fisher of the network that was drawn."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 3)).double()
    x, y = torch.randn(12, 4).double(), torch.randint(3, (12,))
    masks = {}

    def keep(module, inputs, out):
        masks.setdefault("kept", (out != 0).double().detach() * 2)

    model[1].register_forward_hook(keep)
    optimizer = NaturalGradient(
        model,
        HessianFree(tol=1e-12, max_iter=500),
        damping=0.1,
        lr=1.0,
        momentum=0.0,
        radius=None,
    )
    backward(optimizer, model, x, y)

    def outputs(parameters, one, mask):
        h = functional.linear(one, parameters["0.weight"], parameters["0.bias"]) * mask
        return functional.linear(h.tanh(), parameters["3.weight"], parameters["3.bias"])

    parameters = {name: p.detach() for name, p in model.named_parameters()}
    F = 0.0
    for one, mask in zip(x, masks["kept"], strict=True):
        J = torch.func.jacrev(outputs)(parameters, one, mask)
        J = torch.cat([j.flatten(1) for j in J.values()], 1)
        p = outputs(parameters, one, mask).softmax(0)
        F = F + J.T @ (p.diag() - torch.outer(p, p)) @ J / 12
    g = gradient(model)
    change = moved(optimizer, model)
    close(change, -torch.linalg.solve(F + 0.1 * torch.eye(len(g)).double(), g), 1e-8)
