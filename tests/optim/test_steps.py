"""A step is the solve that it is said to be."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional

import nngeo_lazy as ng
from nngeo_lazy.likelihoods import Categorical, Gaussian
from nngeo_lazy.optim import HessianFree, NaturalGradient, Preconditioner

import oracle
import zoo
from .loops import (
    ALL,
    STRUCTURED,
    backward,
    dense_fisher,
    gradient,
    moved,
    name_of,
    problem,
    train,
    weights,
)
from cases import LIKELIHOODS, close

PLAIN = {"lr": 1.0, "momentum": 0.0, "radius": None}


# --- the curvature of the first step is that of the builders --------------------------------------


@pytest.mark.parametrize("estimator", ["exact", "mc", "empirical"])
@pytest.mark.parametrize("representation", STRUCTURED, ids=name_of)
def test_a_step_solves_with_the_fisher_of_its_batch(representation, estimator):
    model, x, y = problem(n=16)  # one piece of a batch, so that labels are drawn in one order
    optimizer = NaturalGradient(
        model, representation, "categorical", estimator=estimator, seed=5, damping=0.02, **PLAIN
    )
    F = ng.FIM(model, (x, y), representation, estimator=estimator, seed=5)
    backward(optimizer, model, x, y)
    g = gradient(model)
    change = moved(optimizer, model)
    close(optimizer.operator.to_dense(), F.to_dense())
    close(change, -F.damped(0.02).solve(g))
    close(change, -optimizer.operator.damped(0.02).solve(g))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(
    "make", [make for make in zoo.NETS if make is not zoo.raw], ids=lambda make: make.__name__
)
def test_every_network(float64, make):
    """The exact curvature of each layer with a form, captured in training mode from the loop."""
    net = make()
    net.model.train()
    batches = ng.data.Batches(net.batch, device="cpu", forward=net.forward)
    (batch,) = batches
    fixed = (nn.modules.batchnorm._NormBase, nn.Dropout, nn.MultiheadAttention)
    for module in net.model.modules():
        if isinstance(module, fixed):
            module.eval()
    outputs = batches.forward(net.model, batch.raw)
    likelihood = LIKELIHOODS["categorical"](outputs)
    labels = oracle.targets("categorical", outputs.detach())
    optimizer = NaturalGradient(
        net.model, "ekfac", likelihood, estimator="exact", damping=0.1, **PLAIN
    )
    optimizer.zero_grad()
    likelihood.loss(batches.forward(net.model, batch.raw), labels).mean().backward()
    names = [n for n, p in net.model.named_parameters() if p.grad is not None]
    plain = {n: p.grad.clone() for n, p in net.model.named_parameters() if p.grad is not None}
    before = {n: p.detach().clone() for n, p in net.model.named_parameters()}
    optimizer.step()
    F = optimizer.operator
    general = {*net.general}
    assert set(F.space.names) >= set(names) - general
    assert not set(F.space.names) & general
    with torch.no_grad():
        for name, p in net.model.named_parameters():
            if name in general and name in plain:  # as it stands
                close(before[name] - p, plain[name])
            p.copy_(before[name])
    wanted = ng.FIM(
        net.model.eval(),
        net.batch,
        "ekfac",
        likelihood=likelihood,
        forward=net.forward,
        target=lambda raw: labels,
        params=list(F.space.names),
    )
    close(F.to_dense(), wanted.to_dense(), 1e-8)


@pytest.mark.parametrize("samples", [1, 3])
def test_accumulation_is_the_whole_batch(samples):
    """Parts of a batch, each with its part of the mean, make the step of the whole one."""
    for estimator in ("exact", "empirical"):
        changes = []
        for parts in (1, samples):
            model, x, y = problem(n=30)
            optimizer = NaturalGradient(model, "kfac", estimator=estimator, **PLAIN)
            optimizer.zero_grad()
            for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True):
                (functional.cross_entropy(model(a), b) / parts).backward()
            changes.append(moved(optimizer, model))
            assert optimizer.operator.num_examples == 30
        close(*changes)


def test_parts_of_other_sizes():
    changes = []
    for sizes in ([30], [20, 7, 3]):
        model, x, y = problem(n=30)
        optimizer = NaturalGradient(model, "kfac", estimator="empirical", **PLAIN)
        optimizer.zero_grad()
        for a, b in zip(x.split(sizes), y.split(sizes), strict=True):
            (functional.cross_entropy(model(a), b, reduction="sum") / 30).backward()
        changes.append(moved(optimizer, model))
    close(*changes)


@pytest.mark.parametrize("shift", [0, 1])
def test_masks_are_read_off_the_gradient(shift):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 4), nn.Tanh(), nn.Linear(4, 7)).double()
    index = torch.randint(7, (6, 5))
    labels = torch.randint(7, (6, 5))
    labels[0, 2:] = labels[3] = -100
    likelihood = Categorical(class_dim=-1, shift=shift)
    optimizer = NaturalGradient(model, "kfac", likelihood, estimator="exact", **PLAIN)
    optimizer.zero_grad()
    likelihood.loss(model(index), labels).mean().backward()
    F = ng.FIM(model, (index, labels), "kfac", likelihood=likelihood)
    optimizer.step()
    close(optimizer.operator.to_dense(), F.to_dense())
    assert optimizer.operator.num_terms == F.num_terms


def test_the_first_gradient_proves_a_categorical_likelihood():
    """Also which dimension holds the classes."""
    for shape, move in (((8, 5, 3), lambda f: f.mT), ((8, 3, 5), lambda f: f)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 15), nn.Unflatten(1, shape[1:])).double()
        x, y = torch.randn(8, 4).double(), torch.randint(3, (8, 5))
        optimizer = NaturalGradient(model, "kfac", estimator="exact")
        optimizer.zero_grad()
        functional.cross_entropy(move(model(x)), y).backward()
        likelihood = Categorical(class_dim=2 if shape[2] == 3 else 1)
        F = ng.FIM(model, (x, y), "kfac", likelihood=likelihood)
        optimizer.step()
        close(optimizer.operator.to_dense(), F.to_dense())


@pytest.mark.parametrize(
    ("module", "targets"),
    [
        (nn.MSELoss(), lambda n: torch.randn(n, 3)),
        (nn.BCEWithLogitsLoss(reduction="sum"), lambda n: torch.rand(n, 3)),
        (nn.CrossEntropyLoss(label_smoothing=0.1), lambda n: torch.randint(3, (n,))),
        (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 0.5, 2.0])), lambda n: torch.arange(n) % 3),
    ],
    ids=["mse", "bce", "smoothed", "weighted"],
)
def test_a_loss_module_keeps_its_reduction(float64, module, targets):
    model, x, _ = problem()
    module, y = module.double(), targets(len(x))
    optimizer = NaturalGradient(model, "kfac", module, estimator="exact", **PLAIN)
    backward(optimizer, model, x, y, module)
    G = ng.GGN(model, (x, y), "kfac", loss=module)
    optimizer.step()
    close(optimizer.operator.to_dense(), G.to_dense())


# --- running averages -----------------------------------------------------------------------------


def fishers(model, batches, representation, decay, **options):
    """The bias-corrected average of the Fishers of several batches, by its definition."""
    total, weight = 0.0, 0.0
    for x, y in batches:
        F = ng.FIM(model, (x, y), representation, **options)
        total, weight = decay * total + (1 - decay) * F.to_dense(), decay * weight + 1 - decay
    return total / weight


@pytest.mark.parametrize("representation", ["dense", "diagonal", "block_diagonal"])
def test_matrices_are_averaged_with_bias_correction(representation):
    model, x, y = problem(n=60)
    batches = list(zip(x.split(20), y.split(20), strict=True))
    options = {"factor_decay": 0.7, "update_every": 1, "estimator": "exact"}
    optimizer = NaturalGradient(model, representation, "categorical", lr=0.0, **options)
    for a, b in batches:
        train(optimizer, model, a, b, 1)
    close(optimizer.operator.to_dense(), fishers(model, batches, representation, 0.7))


def test_kfac_averages_factors():
    model, x, y = problem(n=60)
    batches = list(zip(x.split(20), y.split(20), strict=True))
    options = {"factor_decay": 0.7, "update_every": 1, "estimator": "exact"}
    optimizer = NaturalGradient(model, "kfac", "categorical", lr=0.0, **options)
    for a, b in batches:
        train(optimizer, model, a, b, 1)
    each = [ng.FIM(model, batch, "kfac") for batch in batches]
    w = torch.tensor([0.49, 0.7, 1.0], dtype=torch.float64) * 0.3 / (1 - 0.7**3)
    for k, block in enumerate(optimizer.operator.members):
        for side in ("left", "right"):
            mean = sum(c * getattr(F.members[k], side) for c, F in zip(w, each, strict=True))
            close(getattr(block, side), mean)


def test_ekfac_moves_its_diagonal_into_a_new_basis():
    """In the new basis Q' the old matrix keeps diag(Q'^T E Q'), and the average goes on there."""
    model, x, y = problem(n=40)
    halves = list(zip(x.split(20), y.split(20), strict=True))
    options = {"factor_decay": 0.6, "update_every": 1, "estimator": "exact"}
    optimizer = NaturalGradient(model, "ekfac", "categorical", lr=0.0, **options)
    train(optimizer, model, *halves[0], 1)
    before = optimizer.operator
    train(optimizer, model, *halves[1], 1)
    after = optimizer.operator
    weight = (1 - 0.6) / (1 - 0.6**2)
    fresh = ng.update_diag(after, model, halves[1])
    for old, new, own in zip(before.members, after.members, fresh.members, strict=True):
        Q = new.basis().to_dense()
        moved_diagonal = (Q.T @ old.to_dense() @ Q).diagonal()
        close(new.eigenvalues, (1 - weight) * moved_diagonal + weight * own.eigenvalues)


def test_ekfac_keeps_its_basis_between_inversions():
    model, x, y = problem()
    optimizer = NaturalGradient(
        model, "ekfac", update_every=1, invert_every=3, warmup=0, damping=0.1, lr=0.01, seed=0
    )
    bases, values = [], []
    for _ in range(6):
        train(optimizer, model, x, y, 1)
        bases.append(optimizer.operator.members[0].left_basis)
        values.append(optimizer.operator.members[0].values)
    same = [torch.equal(a, b) for a, b in itertools.pairwise(bases)]
    assert same == [True, True, False, True, True]
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(values))


def test_refresh_periods_and_warm_up():
    model, x, y = problem()
    optimizer = NaturalGradient(
        model, "kfac", update_every=4, invert_every=8, warmup=2, damping=0.1, lr=0.01, seed=0
    )
    held = []
    for _ in range(10):
        train(optimizer, model, x, y, 1)
        held.append((optimizer.operator, optimizer._curvature.solved))
    fresh = [k for k in range(10) if k == 0 or held[k][0] is not held[k - 1][0]]
    decomposed = [k for k in range(10) if k == 0 or held[k][1] is not held[k - 1][1]]
    assert fresh == [0, 1, 4, 8]
    assert decomposed == [0, 1, 8]


# --- solves ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("preconditioner", [None, "kfac", "diagonal"])
def test_hessian_free_is_the_dense_solve(preconditioner):
    model, x, y = problem()
    optimizer = NaturalGradient(
        model, HessianFree(preconditioner, tol=1e-12, max_iter=500), damping=0.05, **PLAIN
    )
    for _ in range(2):  # the second starts from the solution of the first
        F = dense_fisher(model, x)
        backward(optimizer, model, x, y)
        g = gradient(model)
        damped = F + 0.05 * torch.eye(len(F)).double()
        close(moved(optimizer, model), -torch.linalg.solve(damped, g), 1e-8)
    close(optimizer.operator.to_dense(), F, 1e-8)


@pytest.mark.parametrize("damping", [0.05, {"0": 0.05, "2": 0.2}])
def test_kernel_is_the_dense_solve(damping):
    model, x, y = problem(n=6)
    groups, each = None, torch.full((43,), 0.05).double()
    if isinstance(damping, dict):
        groups = [{"params": name, "damping": d} for name, d in damping.items()]
        each[25:] = 0.2
        damping = 1.0
    optimizer = NaturalGradient(
        model, "kernel", params=groups, damping=damping, estimator="exact", **PLAIN
    )
    for _ in range(2):
        F = dense_fisher(model, x)
        backward(optimizer, model, x, y)
        g = gradient(model)
        close(moved(optimizer, model), -torch.linalg.solve(F + each.diag(), g), 1e-8)


def test_factored_damping():
    model, x, y = problem()
    optimizer = NaturalGradient(
        model, "kfac", damping=0.1, damping_method="factored", estimator="exact", **PLAIN
    )
    for _ in range(3):
        backward(optimizer, model, x, y)
        g = gradient(model)
        change = moved(optimizer, model)
        close(change, -optimizer._curvature.solved.damped(0.1, "factored").solve(g))


@pytest.mark.parametrize("representation", ["kfac", "ekfac", "diagonal", "dense", "implicit"])
def test_groups_have_dampings_of_their_own(representation):
    model, x, y = problem()
    groups = [{"params": "2", "damping": 0.5, "lr": 0.5}, {"params": "0.*", "damping": 0.1}]
    if representation == "implicit":
        representation = HessianFree(tol=1e-12, max_iter=500)
    optimizer = NaturalGradient(model, representation, params=groups, estimator="exact", **PLAIN)
    backward(optimizer, model, x, y)
    g = gradient(model)
    change = moved(optimizer, model)
    F = optimizer.operator.to_dense()
    d, lr = torch.full((2, 43), 0.5).double()
    d[:25], lr[:25] = 0.1, 1.0
    close(change, -lr * torch.linalg.solve(F + d.diag(), g), 1e-8)


def test_a_damping_schedule():
    model, x, y = problem()
    optimizer = NaturalGradient(
        model, "kfac", damping=lambda step: 0.5**step, estimator="exact", **PLAIN
    )
    for step in range(4):
        backward(optimizer, model, x, y)
        g = gradient(model)
        change = moved(optimizer, model)
        close(change, -optimizer._curvature.solved.damped(0.5**step).solve(g))


def test_momentum_weight_decay_and_learning_rate():
    model, x, y = problem()
    optimizer = NaturalGradient(
        model,
        "kfac",
        lr=0.3,
        momentum=0.8,
        weight_decay=0.1,
        radius=None,
        damping=0.1,
        estimator="exact",
    )
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    m = 0.0
    for k in range(3):
        backward(optimizer, model, x, y)
        g, w, lr = gradient(model), weights(model), 0.3 * 0.5**k
        optimizer.step()
        scheduler.step()
        m = 0.8 * m + 0.2 * g
        d = optimizer._curvature.solved.damped(0.1).solve(m / (1 - 0.8 ** (k + 1)))
        close(weights(model), (1 - lr * 0.1) * w - lr * d)


def test_clipped_gradients_are_what_is_preconditioned():
    model, x, y = problem()
    optimizer = NaturalGradient(model, "kfac", damping=0.1, estimator="exact", **PLAIN)
    backward(optimizer, model, x, y)
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    g = gradient(model)
    change = moved(optimizer, model)
    assert abs(float(g.norm()) - 1e-3) < 1e-6
    close(change, -optimizer.operator.damped(0.1).solve(g))


@pytest.mark.parametrize("representation", ["kfac", "ekfac", "kernel", "implicit"])
def test_a_preconditioner_in_front_of_sgd(representation):
    """SGD with lr=1 behind it is the whole optimizer."""
    changes = []
    for apart in (False, True):
        model, x, y = problem()
        options = {"estimator": "empirical", "update_every": 2, "warmup": 3, "momentum": 0.9}
        if representation == "implicit":  # iterated until rounding does not matter
            representation = HessianFree(tol=1e-12, max_iter=500)
        if apart:
            preconditioner = Preconditioner(model, representation, "categorical", **options)
            optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        else:
            optimizer = NaturalGradient(model, representation, "categorical", **options)
        before = weights(model)
        for _ in range(6):
            backward(optimizer, model, x, y)
            if apart:
                preconditioner.step()
            optimizer.step()
            if apart:
                preconditioner.zero_grad()
        changes.append(weights(model) - before)
    close(*changes, 1e-8)


@pytest.mark.parametrize("representation", ALL, ids=name_of)
def test_training_lowers_the_loss(representation):
    model, x, y = problem()
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    optimizer = NaturalGradient(
        model, representation, lr=0.2, damping=0.1, update_every=2, seed=0, likelihood="categorical"
    )
    losses = train(optimizer, model, x, y, 40)
    assert losses[-1] < 0.5 * losses[0]
    assert optimizer.operator.shape == (43, 43)


# --- yardsticks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("representation", ["dense", "block_diagonal", "kfac", "implicit"])
def test_one_step_lands_on_least_squares(representation):
    """Yardstick 8, one layer with several outputs: its block is the whole matrix, and a product."""
    torch.manual_seed(0)
    model = nn.Linear(4, 2).double()
    x, y = torch.randn(30, 4).double(), torch.randn(30, 2).double()
    if representation == "implicit":
        representation = HessianFree(tol=1e-13, max_iter=500)
    optimizer = NaturalGradient(
        model, representation, Gaussian(), estimator="exact", damping=0.0, **PLAIN
    )
    backward(optimizer, model, x, y, lambda f, y: (f - y).square().sum(1).mean() / 2)
    optimizer.step()
    ones = torch.cat([x, torch.ones(30, 1).double()], 1)
    solution = torch.linalg.lstsq(ones, y).solution
    close(torch.cat([model.weight, model.bias[:, None]], 1).detach().T, solution)


def test_an_undamped_kfac_step_is_invariant_to_affine_maps_of_the_inputs():
    """Yardstick 11 (Martens and Grosse 2015, theorem 1)."""
    model, x, _ = problem(n=200)
    other, _, _ = problem(n=200)
    y = torch.randn(200, 3).double()
    A, c = torch.randn(4, 4).double() + 2 * torch.eye(4).double(), torch.randn(4).double()
    with torch.no_grad():  # the same function of x' = A x + c
        other[0].weight.copy_(model[0].weight @ A.inverse())
        other[0].bias.copy_(model[0].bias - other[0].weight @ c)
        moved_x = x @ A.T + c
    start = model(x).detach()
    close(start, other(moved_x).detach())
    for each, inputs in ((model, x), (other, moved_x)):
        optimizer = NaturalGradient(
            each,
            "kfac",
            Gaussian(),
            damping=0.0,
            radius=None,
            lr=0.1,
            estimator="exact",
            update_every=1,
        )
        train(optimizer, each, inputs, y, 3, lambda f, y: (f - y).square().sum(1).mean() / 2)
    assert (model(x) - start).norm() > 0.1 * start.norm()
    close(model(x).detach(), other(moved_x).detach(), 1e-7)
