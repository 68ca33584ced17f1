"""Defaults need no tuning: what the loop scales does not matter, and nothing ends a run."""

import copy
import functools
import io
import itertools
import math
import pickle

import pytest
import torch
from sklearn import datasets
from torch import nn
from torch.nn import functional

import nngeo_lazy as ng
from nngeo_lazy.errors import LikelihoodWarning
from nngeo_lazy.likelihoods import Categorical
from nngeo_lazy.optim import NaturalGradient, Preconditioner
from nngeo_lazy.optim.trust import Trust

from .loops import backward, noisy, problem, train, weights
from cases import close

KINDS = ["kfac", "ekfac", "diagonal"]


def ran(loss, steps=40, dtype=torch.float64, seed=0, prepare=None, **options):
    """The weights after some steps, past the warm-up."""
    model, x, y = problem(dtype=dtype, seed=seed)
    if prepare is not None:
        prepare(model)
    optimizer = NaturalGradient(model, seed=0, **options)
    train(optimizer, model, x, y, steps, loss)
    return weights(model)


# --- invariance -----------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["mc", "empirical"])
@pytest.mark.parametrize("representation", KINDS)
def test_the_scale_of_the_loss_does_not_matter(representation, estimator):
    options = {"representation": representation, "estimator": estimator}
    wanted = ran(functional.cross_entropy, **options)
    for c in (1e-3, 1e3):
        close(ran(lambda f, y, c=c: c * functional.cross_entropy(f, y), **options), wanted, 1e-6)
    close(
        ran(functools.partial(functional.cross_entropy, reduction="sum"), **options), wanted, 1e-6
    )


@pytest.mark.parametrize("likelihood", ["bernoulli", "poisson", None])
def test_the_scale_of_other_losses_does_not_matter(likelihood):
    losses = {
        "bernoulli": lambda f, y: functional.binary_cross_entropy_with_logits(
            f, functional.one_hot(y, 3).double()
        ),
        "poisson": lambda f, y: functional.poisson_nll_loss(f, functional.one_hot(y, 3)),
        None: lambda f, y: functional.huber_loss(f, functional.one_hot(y, 3).double()),
    }
    found = []
    for c in (1.0, 1e-3, 1e3):
        if likelihood is None:
            with pytest.warns(LikelihoodWarning):
                found.append(ran(lambda f, y, c=c: c * losses[None](f, y)))
        else:
            found.append(ran(lambda f, y, c=c: c * losses[likelihood](f, y), likelihood=likelihood))
    close(found[1], found[0], 1e-6)
    close(found[2], found[0], 1e-6)


@pytest.mark.parametrize("representation", KINDS)
def test_tokens_in_sequences_or_in_a_row(representation):
    """(B, T, V) and (B T, V): the same radius for each label."""

    class Tokens(nn.Module):
        def __init__(self, flat):
            super().__init__()
            self.body, self.flat = problem()[0], flat

        def forward(self, x):
            return self.body(x.flatten(0, 1) if self.flat else x)

    torch.manual_seed(1)
    x, y = torch.randn(8, 5, 4).double(), torch.randint(3, (8, 5))
    found = []
    for flat in (False, True):
        model = Tokens(flat)
        likelihood = Categorical(class_dim=-1)
        optimizer = NaturalGradient(model, representation, likelihood, estimator="exact")
        for _ in range(30):
            optimizer.zero_grad()
            f = model(x)
            functional.cross_entropy(f.reshape(-1, 3), y.flatten()).backward()
            optimizer.step()
        found.append(weights(model))
    close(*found, 1e-6)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("estimator", ["mc", "empirical"])
@pytest.mark.parametrize("representation", KINDS)
def test_a_grad_scaler_does_not_matter(representation, estimator, clip):
    """Scaled in the backward pass, unscaled behind it, also by the loop itself."""
    found = []
    for scaled in (False, True):
        model, x, y = problem(dtype=torch.float32)
        optimizer = NaturalGradient(model, representation, estimator=estimator, seed=0)
        scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=2.0**12, growth_interval=7)
        for _ in range(25):
            optimizer.zero_grad()
            scaler.scale(functional.cross_entropy(model(x), y)).backward()
            if clip:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 100.0)
            scaler.step(optimizer)
            scaler.update()
        found.append(weights(model))
    start = weights(problem(dtype=torch.float32)[0])
    close(found[0] - start, found[1] - start, 1e-3)


@pytest.mark.parametrize("representation", ["kfac", "ekfac"])
def test_the_unit_of_targets_does_not_matter(representation):
    """Targets times 100 with an output layer times 100: the same functions in other units."""
    found = []
    for unit in (1.0, 100.0):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
        x, y = torch.randn(30, 4).double(), torch.randn(30, 2).double()
        with torch.no_grad():
            for p in model[2].parameters():
                p.mul_(unit)
        optimizer = NaturalGradient(model, representation, nn.MSELoss(), seed=0)
        train(optimizer, model, x, unit * y, 40, functional.mse_loss)
        found.append(model(x).detach() / unit)
    close(*found, 1e-5)


@pytest.mark.parametrize("representation", [*KINDS, "kernel", "implicit"])
def test_half_the_learning_rate_makes_half_the_step(representation):
    changes = []
    for lr in (1.0, 0.5):
        model, x, y = problem()
        before = weights(model)
        optimizer = NaturalGradient(model, representation, "categorical", lr=lr, seed=0)
        train(optimizer, model, x, y, 1)
        changes.append(weights(model) - before)
    close(changes[1], changes[0] / 2, 1e-8)


# --- the trust region -----------------------------------------------------------------------------


@pytest.mark.parametrize("representation", KINDS)
def test_a_step_changes_predictions_by_the_radius(representation):
    """In nats for each label, over the steps that are measured, and never by more than four."""
    model, x, y = problem(n=200)
    optimizer = NaturalGradient(model, representation, radius=0.01, seed=0)
    found = []
    for _ in range(20):
        before = model(x).detach().log_softmax(1)
        train(optimizer, model, x, y, 1)
        after = model(x).detach().log_softmax(1)
        found.append(float((before.exp() * (before - after)).sum(1).mean()))
    assert max(found) < 0.05
    assert sum(found[2:10]) / 8 > 0.001


def test_a_step_whose_predictions_are_not_finite_is_taken_back():
    class Wall(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = problem()[0]
            self.start = weights(self.body)

        def forward(self, x):
            f = self.body(x)
            far = (weights(self.body) - self.start).norm() > 1e-9
            return f * float("inf") if far else f

    (_, x, y), model = problem(), Wall()
    optimizer = NaturalGradient(model, seed=0, likelihood="categorical")
    backward(optimizer, model, x, y)
    optimizer.step()
    assert torch.allclose(weights(model), model.start, atol=1e-12)


@pytest.mark.parametrize("representation", KINDS)
def test_defaults_train_where_steps_of_the_raw_curvature_diverge(representation):
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x[:600], dtype=torch.float32) / 16, torch.tensor(y[:600])
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = NaturalGradient(model, representation, seed=0)
    losses = []
    for _ in range(60):
        index = torch.randint(len(x), (64,))
        losses += train(optimizer, model, x[index], y[index], 1)
    assert losses[-1] < 0.4
    assert max(losses) < 1.2 * losses[0]


@pytest.mark.parametrize("behind", [torch.optim.SGD, torch.optim.AdamW])
def test_an_optimizer_behind_a_preconditioner_trains(behind):
    model, x, y = problem(dtype=torch.float32)
    y = (x[:, 0] > 0).long()
    preconditioner = Preconditioner(model, "kfac", seed=0)
    optimizer = behind(model.parameters(), lr=0.5 if behind is torch.optim.SGD else 1e-2)
    losses = []
    for _ in range(60):
        losses.append(backward(optimizer, model, x, y))
        preconditioner.step()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    assert max(losses) < 1.2 * losses[0]


@pytest.mark.parametrize("representation", ["kfac", "ekfac"])
def test_second_moments_in_the_eigenvectors(representation):
    model, x, y = problem(dtype=torch.float32)
    y = (x[:, 0] > 0).long()
    optimizer = NaturalGradient(model, representation, second_moments=True, seed=0)
    losses = train(optimizer, model, x, y, 60)
    assert losses[-1] < 0.3 * losses[0]
    assert max(losses) < 1.1 * losses[0]


# --- nothing ends a run ---------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["mc", "empirical", "exact"])
def test_rounding_never_ends_a_run(estimator):
    """Tiny networks in float32, whose factors are singular, with few examples."""
    for seed in range(20):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
        x, y = torch.randn(8, 6).relu(), torch.randint(3, (8,))
        kind = ["kfac", "ekfac", "diagonal", "dense"][seed % 4]
        optimizer = NaturalGradient(model, kind, estimator=estimator, seed=seed)
        losses = train(optimizer, model, x, y, 30)
        assert all(map(math.isfinite, losses))


def test_images_that_shrink_to_one_pixel():
    """Kernels that see padding alone: factors with many rows of zeros."""
    for seed in range(2):
        torch.manual_seed(seed)
        widths = ((3, 32), (32, 64), (64, 96), (96, 96), (96, 96))
        layers = [
            each
            for i, o in widths
            for each in (nn.Conv2d(i, o, 3, 2, 1), nn.BatchNorm2d(o), nn.ReLU())
        ]
        model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(96, 4))
        x, y = torch.randn(16, 3, 16, 16), torch.randint(4, (16,))
        losses = train(NaturalGradient(model, "kfac", seed=0), model, x, y, 3)
        assert losses[-1] < losses[0]


# --- states and copies ----------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [3, 7, 25])
@pytest.mark.parametrize("representation", [*KINDS, "kernel", "implicit", "quasi_diagonal"])
def test_resuming_defaults_to_the_bit(representation, steps):
    """Also from the middle of the warm-up."""

    def make():
        model = noisy(dtype=torch.float32)
        return model, NaturalGradient(model, representation, "categorical", seed=7)

    x, y = torch.randn(20, 4), torch.randint(3, (20,))
    model, optimizer = make()
    train(optimizer, model, x, y, steps)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), torch.get_rng_state()], file)
    train(optimizer, model, x, y, 4)
    expected = weights(model)
    file.seek(0)
    held, state, random = torch.load(file, weights_only=True)
    model, optimizer = make()
    optimizer.load_state_dict(state)
    model.load_state_dict(held)
    torch.set_rng_state(random)
    train(optimizer, model, x, y, 4)
    assert torch.equal(weights(model), expected)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
@pytest.mark.parametrize("kind", [NaturalGradient, Preconditioner])
def test_copies_of_a_model_with_its_optimizer(kind, how):
    model, x, y = problem()
    optimizer = kind(model, "ekfac", update_every=3, params=[{"params": "0"}, {"params": "2"}])
    train(optimizer, model, x, y, 5)
    other, copied = how((model, optimizer))
    assert copied.param_groups[0]["params"][0] is other[0].weight
    assert [len(group["params"]) for group in copied.param_groups] == [2, 2]
    before = weights(model)
    assert train(copied, other, x, y, 6) == train(optimizer, model, x, y, 6)
    assert torch.equal(weights(other), weights(model))
    assert kind is Preconditioner or not torch.equal(before, weights(model))
    alone = copy.deepcopy(optimizer)  # takes a copy of its model along
    assert alone.param_groups[0]["params"][0] is not model[0].weight


def test_quadratic_steps_are_copied():
    model, x, y = problem()
    optimizer = NaturalGradient(model, lr=None, damping=0.1, seed=0)
    train(optimizer, model, x, y, 3)
    other, copied = copy.deepcopy((model, optimizer))
    assert train(copied, other, x, y, 3) == train(optimizer, model, x, y, 3)


def test_the_learning_rate_of_a_schedule_multiplies_the_whole_step():
    model, x, y = problem()
    optimizer = NaturalGradient(model, seed=0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step < 3))
    for _ in range(3):
        train(optimizer, model, x, y, 1)
        scheduler.step()
    before = weights(model)
    train(optimizer, model, x, y, 3)
    assert torch.equal(weights(model), before)
    assert ng.optim.NaturalGradient is NaturalGradient


@pytest.mark.parametrize("steps", [3, 24, 30])
@pytest.mark.parametrize("representation", KINDS)
def test_half_the_learning_rate_makes_half_of_every_step(representation, steps):
    """In the warm-up, behind it, and on a refresh, whatever the steps before were."""
    model, x, y = problem()
    optimizer = NaturalGradient(model, representation, "categorical", seed=0)
    train(optimizer, model, x, y, steps)
    changes = []
    for lr in (1.0, 0.5, 0.25):
        other, copied = copy.deepcopy((model, optimizer))
        for group in copied.param_groups:
            group["lr"] = lr
        before = weights(other)
        train(copied, other, x, y, 1)
        changes.append(weights(other) - before)
    close(changes[1], changes[0] / 2, 1e-8)
    close(changes[2], changes[0] / 4, 1e-8)


@pytest.mark.parametrize("c", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("margin", [0.0, 12.0, 60.0])
@pytest.mark.parametrize("name", ["bernoulli", "poisson", "categorical"])
def test_the_scale_of_a_loss_is_read_however_well_it_is_fitted(name, margin, c):
    generator = torch.Generator().manual_seed(0)
    f = torch.randn(6, 3, generator=generator)
    y = torch.randint(2, (6, 3), generator=generator).float()
    known, loss = {
        "bernoulli": (ng.likelihoods.Bernoulli(), functional.binary_cross_entropy_with_logits),
        "poisson": (ng.likelihoods.Poisson(), functional.poisson_nll_loss),
        "categorical": (ng.likelihoods.Categorical(1), functional.cross_entropy),
    }[name]
    if name == "bernoulli":
        f = f + (2 * y - 1) * margin
    elif name == "poisson":
        f, y = f - margin, torch.zeros(6, 3)
    else:
        y = f.argmax(1)
        f[range(6), y] += margin
    f.requires_grad_()
    (c * loss(f, y, reduction="sum")).backward()
    assert float(known.scale_of(f, f.grad)) == pytest.approx(c, rel=0.06)


# --- losses and starts that a radius in nats does not fit by itself -------------------------------


def network(*sizes, behind):
    layers = [each for size in itertools.pairwise(sizes) for each in (nn.Linear(*size), nn.ReLU())]
    return nn.Sequential(*layers[:-1], behind)


def reconstruction(f, y):
    """Of numbers in [0, 1], by probabilities."""
    return functional.binary_cross_entropy(f, y)


def squares_of_one(f, y):
    return functional.mse_loss(f, y / 9)


STARTS = {  # data, network, loss, the share of the first loss that is left, and no batch is above
    "probabilities": ("images", (64, 64, 16, 64, 64), nn.Sigmoid(), reconstruction, 0.7, 2),
    "two softmax": ("digits", (64, 64, 32, 10), nn.Softmax(1), functional.cross_entropy, 0.9, 2),
    "one number": ("digits", (64, 32, 1), nn.Flatten(0), squares_of_one, 0.3, 2),
    "certain": ("wine", (13, 32, 32, 3), nn.Identity(), functional.cross_entropy, 0.1, 2),
    "deep": ("digits", (64, *[32] * 19, 10), nn.Identity(), functional.cross_entropy, 1.01, 5),
}


@pytest.mark.filterwarnings("ignore::nngeo_lazy.errors.LikelihoodWarning")
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("representation", [*KINDS, "preconditioner"])
def test_no_start_diverges(representation, start):
    name, sizes, behind, loss, left, most = STARTS[start]
    load = datasets.load_wine if name == "wine" else datasets.load_digits
    x, y = (torch.as_tensor(each) for each in load(return_X_y=True))
    x = x.float() if name == "wine" else x.float() / 16
    y = x if name == "images" else y
    torch.manual_seed(0)
    model = network(*sizes, behind=behind)
    first = loss(model(x), y).item()
    if representation == "preconditioner":
        optimizers = [Preconditioner(model, seed=0), torch.optim.SGD(model.parameters(), 1.0)]
    else:
        optimizers = [NaturalGradient(model, representation, seed=0)]
    for _ in range(60):
        index = torch.randperm(len(x))[:64]
        assert backward(optimizers[0], model, x[index], y[index], loss) < most * first
        for optimizer in optimizers:
            optimizer.step()
    assert loss(model(x), y).item() < left * first


def test_one_gradient_that_explodes_is_soon_forgotten():
    model, x, y = problem()
    optimizer = NaturalGradient(model, seed=0)
    train(optimizer, model, x, y, 22)  # behind the warm-up
    lengths = []
    for k in range(6):
        backward(optimizer, model, x, y)
        for p in model.parameters():
            p.grad *= 1e6 if k == 1 else 1.0
        before = weights(model)
        optimizer.step()
        lengths.append((weights(model) - before).norm().item())
    assert lengths[1] < 3 * lengths[0]
    assert lengths[5] > 0.1 * lengths[0]


@pytest.mark.parametrize("representation", KINDS)
def test_a_model_that_draws_its_noise_in_evaluation_mode(representation):
    """A variational autoencoder: its layers are proved with the noise held fixed."""

    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.mean, self.spread, self.back = (nn.Linear(*k) for k in ((4, 2), (4, 2), (2, 4)))

        def forward(self, x):
            mean, spread = self.mean(x), self.spread(x)
            noise = torch.distributions.Normal(mean, spread.exp()).rsample()
            return self.back(noise + 0.1 * torch.randn_like(mean)), mean, spread

    torch.manual_seed(0)
    model, x = Noisy(), torch.randn(60, 2) @ torch.randn(2, 4)
    optimizer = NaturalGradient(model, representation, "gaussian", outputs=lambda found: found[0])
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        f, mean, spread = model(x)
        fit = (f - x).square().sum(1) / 2
        loss = (fit + (mean**2 + (2 * spread).exp() - 2 * spread - 1).sum(1) / 2).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert {row.parameter for row in optimizer.report() if row.note} == set()


# --- parameters that hardly matter yet ------------------------------------------------------------


class Attention(nn.Module):
    """One head over four tokens, and a classifier; all weights start small, as transformers' do."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.norm = nn.LayerNorm(8)
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, 3)
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.02)

    def forward(self, ids):
        x = self.norm(self.embed(ids))
        scores = self.query(x) @ self.key(x).mT
        return self.head((scores.softmax(-1) @ self.value(x)).mean(1))


def tokens():
    ids = torch.randint(12, (64, 4), generator=torch.Generator().manual_seed(0))
    return ids, ids.amax(1) // 4


@pytest.mark.parametrize("behind", [None, "sgd"])
@pytest.mark.parametrize("representation", KINDS)
def test_a_step_moves_no_parameter_by_more_than_a_share_of_its_size(representation, behind):
    torch.manual_seed(0)
    model, (ids, y) = Attention().double(), tokens()
    if behind is None:
        optimizer = NaturalGradient(model, representation, seed=0)
        steps = [optimizer]
    else:
        optimizer = Preconditioner(model, representation, seed=0)
        steps = [optimizer, torch.optim.SGD(model.parameters(), lr=1.0)]
    longest = 0.0
    for _ in range(3):
        before = [p.detach().clone() for p in model.parameters()]
        backward(optimizer, model, ids, y)
        for each in steps:
            each.step()
        for p, old in zip(model.parameters(), before, strict=True):
            size = max(float(old.norm()), 0.01 * old.numel() ** 0.5)
            longest = max(longest, float((p.detach() - old).norm()) / size)
    assert longest == pytest.approx(0.4)  # it would be above 1,000 for queries and keys


def test_networks_with_small_first_weights_learn():
    torch.manual_seed(0)
    model, (ids, y) = Attention(), tokens()
    optimizer = NaturalGradient(model, seed=0)
    losses = train(optimizer, model, ids, y, 40)
    assert losses[0] > 1.0 > 0.01 > losses[-1]  # it would be 0.2


@pytest.mark.parametrize("seed", [2, 10])
def test_small_gradients_make_no_large_steps_later(seed):
    """A fitted model's steps change little, which is no reason to trust F more."""
    torch.manual_seed(seed)
    model, (ids, y) = Attention().double(), tokens()
    losses = train(NaturalGradient(model, seed=0), model, ids, y, 80)
    fitted = next(k for k, loss in enumerate(losses) if loss < 0.05)
    assert max(losses[fitted:]) < 0.2  # it would be 1.6 and 0.6


@pytest.mark.parametrize("times", [1.0, 1e-3, 100.0])
def test_a_model_that_has_learnt_nothing_may_take_more_noise(times):
    """The error is the mean square of residuals: 0.9 for ten equal probabilities."""
    model = nn.Linear(4, 10).double()
    with torch.no_grad():
        model.weight.zero_()
        model.bias.zero_()
    x, y = torch.randn(32, 4).double(), torch.randint(10, (32,))
    optimizer = NaturalGradient(model, lr=1e-6, seed=0)
    for _ in range(30):
        optimizer.zero_grad()
        (times * functional.cross_entropy(model(x), y)).backward()
        optimizer.step()
    trust = optimizer._framing.direction.trust
    assert float(trust._error) == pytest.approx(0.9, abs=1e-3)

    def bound(error):
        """Of a step whose noise is all that limits it."""
        one = torch.ones((), dtype=torch.float64)
        fresh = Trust(1e9, 0.9, one)
        for _ in range(20):
            fresh.see(None, one * error)
        return float(fresh.scale(1e4 * one, one, 0 * one, one))

    assert bound(0.9) == pytest.approx(2.8 * bound(0.0), rel=1e-4)


def test_a_model_that_fits_has_a_small_error():
    torch.manual_seed(0)
    model, (ids, y) = Attention().double(), tokens()
    optimizer = NaturalGradient(model, seed=0)
    train(optimizer, model, ids, y, 60)
    assert float(optimizer._framing.direction.trust._error) < 0.05


@pytest.mark.parametrize("seed", range(6))
def test_deep_networks_without_norms_do_not_explode(seed):
    """Twenty layers, which all grow at once if nothing holds them; most seeds went above 100."""
    _, sizes, behind, loss, _, most = STARTS["deep"]
    x, y = (torch.as_tensor(each) for each in datasets.load_digits(return_X_y=True))
    x = x.float() / 16
    torch.manual_seed(seed)
    model = network(*sizes, behind=behind)
    first = loss(model(x), y).item()
    optimizer = NaturalGradient(model, "diagonal", seed=0)
    for _ in range(60):
        index = torch.randperm(len(x))[:64]
        assert backward(optimizer, model, x[index], y[index], loss) < most * first
        optimizer.step()


def test_steps_are_short_behind_a_gradient_that_explodes():
    """Those that are measured are not, and the others recover."""
    one = torch.ones((), dtype=torch.float64)
    trust = Trust(0.01, 0.9, one)
    for _ in range(5):
        trust.scale(one, one, 0 * one, one)
    assert float(trust.share(False)) == trust.share(True) == 0.4
    trust.scale(100 * one, one, 0 * one, one)
    assert trust.share(True) == 0.4
    assert float(trust.share(False)) == pytest.approx(0.4 * 0.03)
    for _ in range(80):
        trust.scale(one, one, 0 * one, one)
    assert float(trust.share(False)) == 0.4
