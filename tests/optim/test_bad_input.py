"""Every error of a user says what was expected, what came, and what to do."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

import nngeo_lazy as ng
from nngeo_lazy.errors import (
    DataError,
    LikelihoodWarning,
    NotPositiveDefiniteError,
    SelfCheckWarning,
    SpaceMismatchError,
    StochasticModelError,
    TooLargeError,
    UnsupportedLayerError,
)
from nngeo_lazy.jacobian.capture import Capture, UnprovedError
from nngeo_lazy.likelihoods import Bernoulli
from nngeo_lazy.optim import HessianFree, LevenbergMarquardt, NaturalGradient, Preconditioner

from .loops import backward, problem, train, weights

# --- loops ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("representation", ["kfac", "implicit"])
def test_a_step_without_backward(representation):
    model, x, _ = problem()
    optimizer = NaturalGradient(model, representation)
    with pytest.raises(DataError, match=r"no parameter has one: call loss.backward\(\)"):
        optimizer.step()
    model(x)
    with pytest.raises(DataError, match=r"call loss.backward\(\) before step"):
        optimizer.step()


@pytest.mark.parametrize("representation", ["kfac", "implicit", "kernel"])
def test_a_loss_that_is_not_made_from_the_forward_pass(representation):
    model, x, _ = problem()
    optimizer = NaturalGradient(model, representation)
    model(x)
    sum(p.square().sum() for p in model.parameters()).backward()
    with pytest.raises(DataError, match="made from the outputs of the model's last forward"):
        optimizer.step()


@pytest.mark.parametrize("how", ["compiled around", "a part", "by hand"])
def test_a_forward_pass_that_was_not_seen(how):
    model, x, y = problem()
    optimizer = NaturalGradient(model, "kfac")
    called = model
    if how == "compiled around":
        called = torch.compile(model, backend="eager")
    elif how == "a part":
        called = nn.Sequential(*model)
    functional.cross_entropy(called.forward(x) if how == "by hand" else called(x), y).backward()
    with pytest.raises(
        DataError, match=r"saw none: call the model.*compiled one.*not a part of it"
    ):
        optimizer.step()


def test_a_model_that_changed_the_identity_of_its_parameters():
    model, x, y = problem()
    optimizer = NaturalGradient(model, "kfac", update_every=2)
    train(optimizer, model, x, y, 2)
    old = model[0].weight
    model[0].weight = nn.Parameter(old.detach().clone())
    optimizer.zero_grad()
    functional.cross_entropy(model(x), y).backward()
    with pytest.raises(SpaceMismatchError, match=r"\['0.weight'\] are other tensors.*new optim"):
        optimizer.step()


def test_outputs_that_were_modified_in_place():
    model, x, y = problem()
    optimizer = NaturalGradient(model, "kfac")
    optimizer.zero_grad()
    outputs = model(x)
    outputs *= 2
    with pytest.raises(DataError, match=r"modified in place since: write outputs = outputs \* c"):
        functional.cross_entropy(outputs, y).backward()


def test_outputs_that_are_no_tensor():
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = problem()[0]

        def forward(self, x):
            return {"scores": self.body(x)}

    (_, x, y), model = problem(), M()
    optimizer = NaturalGradient(model, "kfac")
    with pytest.raises(DataError, match=r"got dict: pass outputs=lambda result"):
        model(x)
    model = M()
    optimizer = NaturalGradient(model, "kfac", outputs=lambda result: result["scores"])
    functional.cross_entropy(model(x)["scores"], y).backward()
    optimizer.step()


def test_layers_that_are_called_otherwise_in_training():
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 3)

        def forward(self, x):
            return self.a(x) + (self.a(x) if self.training else 0)

    torch.manual_seed(0)
    model, x = M(), torch.randn(5, 4)
    optimizer = NaturalGradient(model, "kfac")
    with pytest.raises(UnsupportedLayerError, match=r"calls in evaluation mode.*params=.*implicit"):
        model(x)
    model = M()
    optimizer = NaturalGradient(model, "implicit", lr=0.1)
    train(optimizer, model, x, torch.randint(3, (5,)), 2)


def test_parameters_that_are_frozen_on_the_way():
    model, x, y = problem()
    optimizer = NaturalGradient(model, "kfac", update_every=1)
    train(optimizer, model, x, y, 1)
    model[0].requires_grad_(False)
    with pytest.raises(DataError, match=r"\['0.weight', '0.bias'\].*frozen since: make a new opti"):
        model(x)


def test_losses_of_parts_of_one_output():
    model, x, y = problem()
    optimizer = NaturalGradient(model, "kfac", "categorical")
    outputs = model(x)
    functional.cross_entropy(outputs[:8], y[:8]).backward(retain_graph=True)
    with pytest.raises(DataError, match=r"second backward pass.*add the losses before"):
        functional.cross_entropy(outputs[8:], y[8:]).backward()
    assert optimizer.skipped_steps == 0


def test_inputs_that_are_written_to_before_the_step():
    model, x, y = problem()
    optimizer = NaturalGradient(model, "implicit", "categorical")
    batch = x.clone()
    for _ in range(2):
        functional.cross_entropy(model(batch), y).backward()
        batch.copy_(2 * x)
    with pytest.raises(DataError, match="written to in place: give every batch a tensor"):
        optimizer.step()


def test_a_step_again_after_one_that_raised():
    model, x, y = problem()
    optimizer = NaturalGradient(model, "kfac", damping=0.0, estimator="exact")
    backward(optimizer, model, 0 * x, y)
    with pytest.raises(NotPositiveDefiniteError):
        optimizer.step()
    with pytest.raises(DataError, match=r"run the model and loss.backward\(\) again"):
        optimizer.step()
    optimizer.param_groups[0]["damping"] = 0.1
    train(optimizer, model, x, y, 2)


def test_a_module_that_the_loop_calls_in_the_place_of_the_model_is_named():
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = problem()[0]

        def forward(self, x):
            return self.net(x)

    (_, x, y), model = problem(), Wrapper()
    optimizer = NaturalGradient(model)
    backward(optimizer, model.net, x, y)
    with pytest.raises(DataError, match=r"'net' has all gradients: if the loop calls it, pass it"):
        optimizer.step()
    train(NaturalGradient(model.net), model.net, x, y, 2)


def test_replicas_are_refused():
    model, _, _ = problem()
    with pytest.raises(
        DataError, match=r"got DataParallel.*take DistributedDataParallel, or pass model.module"
    ):
        NaturalGradient(nn.DataParallel(model))


def test_parameters_in_the_place_of_the_model():
    model, _, _ = problem()
    message = r"expected the model, .*got generator.*the model itself.*params="
    with pytest.raises(DataError, match=message):
        NaturalGradient(model.parameters())


def test_models_without_any_form():
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(3))

        def forward(self, x):
            return x * self.w.exp()

    # the loop's graph is gone when its own scores would go from a weight to its parameters
    optimizer = NaturalGradient(M(), "kfac", "categorical", estimator="empirical")
    model, x, y = optimizer._model, torch.randn(5, 3), torch.randint(3, (5,))
    match = r"no form for any.*estimator='mc'.*implicit.*register_layer"
    with pytest.raises(UnsupportedLayerError, match=match):
        model(x)
    for remedy in ({"estimator": "mc"}, {"representation": "implicit"}):
        model = M()
        optimizer = NaturalGradient(model, likelihood="categorical", **remedy)
        before = model.w.detach().clone()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        assert not torch.equal(before, model.w)


def test_models_that_mix_examples_even_in_evaluation():
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 3)

        def forward(self, x):
            return self.a(x) - self.a(x).mean(0)

    model = M()
    optimizer = NaturalGradient(model, "kfac")
    with pytest.raises(StochasticModelError, match="treats each example on its own"):
        model(torch.randn(5, 4))
    assert optimizer.skipped_steps == 0


def test_curvature_that_is_asked_for_before_it_is_there():
    model, _, _ = problem()
    for optimizer in (NaturalGradient(model, "kfac"), NaturalGradient(model, "implicit")):
        with pytest.raises(DataError, match="before the first backward"):
            _ = optimizer.operator


def test_a_state_that_is_no_curvature():
    model, x, y = problem()
    optimizer = NaturalGradient(model, "ekfac")
    train(optimizer, model, x, y, 1)
    state = copy.deepcopy(optimizer.state_dict())
    for tensors in state["curvature"]["statistics"]["operator"]["tensors"].values():
        tensors.neg_()
    with pytest.raises(NotPositiveDefiniteError, match=r"of '0' has a negative eigenvalue.*wider"):
        optimizer.load_state_dict(state)


@pytest.mark.parametrize("representation", ["kfac", "diagonal", "dense"])
def test_curvature_that_is_singular(representation):
    model, x, y = problem()
    optimizer = NaturalGradient(model, representation, damping=0.0, estimator="exact")
    backward(optimizer, model, torch.zeros_like(x), y)
    with pytest.raises(NotPositiveDefiniteError, match=r"singular.*raise damping"):
        optimizer.step()


def test_factors_that_lost_positive_definiteness():
    """Those of a state that was tampered with, say."""
    model, x, y = problem()
    optimizer = NaturalGradient(model, "kfac", damping=1e-3, damping_method="factored")
    train(optimizer, model, x, y, 1)
    state = copy.deepcopy(optimizer.state_dict())
    tensors = state["curvature"]["statistics"]["solved"]["tensors"]
    for key in tensors:
        if key.endswith("left"):
            tensors[key].neg_()
    optimizer.load_state_dict(state)
    backward(optimizer, model, x, y)
    with pytest.raises(NotPositiveDefiniteError, match=r"negative eigenvalue.*raise damping"):
        optimizer.step()


def test_levenberg_marquardt_without_a_closure():
    model, x, y = problem()
    optimizer = NaturalGradient(model, "kfac", damping=LevenbergMarquardt(every=1))
    backward(optimizer, model, x, y)
    with pytest.raises(DataError, match=r"call step\(closure\)"):
        optimizer.step()


def test_groups_that_cut_a_block():
    model, x, y = problem()
    groups = [{"params": "*.weight", "damping": 0.1}, {"params": "*.bias", "damping": 0.2}]
    optimizer = NaturalGradient(model, "kfac", params=groups)
    backward(optimizer, model, x, y)
    with pytest.raises(DataError, match=r"\[0.1, 0.2\] to parts of '0'.*one group"):
        optimizer.step()


# --- likelihoods ----------------------------------------------------------------------------------


def test_a_likelihood_that_the_gradient_does_not_prove():
    """The loop's own gradients take its place, and one warning says so."""
    model, x, _ = problem()
    optimizer = NaturalGradient(model, "kfac")
    with pytest.warns(LikelihoodWarning, match=r"cannot tell.*\(40, 3\).*gaussian.*own gradients"):
        backward(optimizer, model, x, x[:, :3], lambda f, y: (f - y).square().mean())
    optimizer.step()
    losses = train(optimizer, model, x, x[:, :3], 30, lambda f, y: (f - y).square().mean())
    assert losses[-1] < 0.5 * losses[0]
    for remedy in ("gaussian", nn.MSELoss()):
        train(NaturalGradient(model, "kfac", remedy), model, x, x[:, :3], 1, nn.MSELoss())


@pytest.mark.parametrize(
    ("given", "loss", "match"),
    [
        ("bernoulli", nn.CrossEntropyLoss(), r"not that of Bernoulli.*but that of Categorical"),
        ("gaussian", nn.CrossEntropyLoss(), r"not that of Gaussian.*but that of Categorical"),
        ("categorical", nn.MSELoss(), "not that of Categorical.*none that is known"),
    ],
)
def test_a_loss_that_is_not_of_the_likelihood(given, loss, match):
    model, x, y = problem()
    y = functional.one_hot(y, 3).double() if isinstance(loss, nn.MSELoss) else y
    optimizer = NaturalGradient(model, "kfac", given)
    with pytest.warns(LikelihoodWarning, match=match):
        backward(optimizer, model, x, y, loss)
    optimizer.step()


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ("normal", "unknown likelihood 'normal': expected one of.*gaussian"),
        (lambda f, y: (f - y).square().sum(1), "targets that the optimizer does not see"),
        (3, "expected a likelihood or a torch.nn loss module"),
    ],
)
def test_likelihoods_that_are_none(given, match):
    model, _, _ = problem()
    with pytest.raises(DataError, match=match):
        NaturalGradient(model, "kfac", given)


def test_losses_that_need_targets():
    model, x, _ = problem()
    for loss, match in (
        (nn.HuberLoss(), "needs targets"),
        (nn.CrossEntropyLoss(torch.ones(3).double(), label_smoothing=0.1), "drop one of the two"),
        (nn.BCEWithLogitsLoss(pos_weight=torch.ones(3).double()), "needs labels.*drop the weights"),
    ):
        y = torch.rand(40, 3).double()
        y = y.argmax(1) if isinstance(loss, nn.CrossEntropyLoss) else y
        optimizer = NaturalGradient(model, "kfac", loss)
        with pytest.raises(DataError, match=match):
            backward(optimizer, model, x, y, loss)
    optimizer = NaturalGradient(model, "kfac", Bernoulli(pos_weight=[1.0, 2.0, 3.0]))
    with pytest.raises(DataError, match="pos_weight is no likelihood"):
        backward(optimizer, model, x, y, nn.BCEWithLogitsLoss())


def test_too_many_directions():
    model = nn.Linear(2, 1100)
    optimizer = NaturalGradient(model, "kfac", "categorical", estimator="exact")
    with pytest.raises(TooLargeError, match=r"1099 backward passes.*take estimator='mc'"):
        backward(optimizer, model, torch.randn(3, 2), torch.arange(3))


# --- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"lr": -0.1}, DataError, "expected lr from 0"),
        ({"momentum": 1.0}, DataError, "expected momentum from 0 to below 1"),
        ({"weight_decay": -1.0}, DataError, "expected weight_decay"),
        ({"radius": -1.0}, DataError, "expected radius from 0"),
        ({"eps": -1.0}, DataError, "expected eps from 0"),
        ({"second_moments": True, "radius": None}, DataError, "bounds: pass a radius"),
        ({"damping": -1e-3}, DataError, "nonnegative number.*LevenbergMarquardt"),
        ({"damping": "auto"}, DataError, "nonnegative number.*got 'auto'"),
        ({"damping": lambda step: -1.0}, DataError, "got -1.0"),
        ({"factor_decay": 1.0}, DataError, "factor_decay from 0 to below 1"),
        ({"update_every": 0}, DataError, "update_every to be an integer of 1 or more"),
        ({"invert_every": 1.5}, DataError, "invert_every to be an integer"),
        ({"warmup": -1}, DataError, "warmup to be an integer of 0 or more"),
        ({"damping_method": "pi"}, DataError, r"\['exact', 'factored'\], got 'pi'"),
        ({"estimator": "true"}, DataError, "unknown estimator 'true'"),
        ({"params": "conv"}, SpaceMismatchError, "'conv' matches no parameter"),
        ({"params": [{"lr": 1.0}]}, DataError, r'groups \{"params": selector'),
        ({"params": [{"params": "0"}, {"params": "0"}]}, ValueError, "more than one parameter"),
        ({"representation": "kron"}, DataError, "unknown representation 'kron'"),
        ({"representation": "low_rank"}, DataError, "averages keep the form.*LowRank"),
        (
            {"representation": ng.representations.Mixed("ekfac", {"0": "dense"})},
            DataError,
            "averages keep the form.*EKFAC",
        ),
        ({"representation": HessianFree("implicit")}, DataError, "averaged over steps"),
    ],
)
def test_options(options, error, match):
    model, _, _ = problem()
    with pytest.raises(error, match=match):
        NaturalGradient(model, **options)


def test_options_of_options():
    for wrong in ({"tol": 0.0}, {"max_iter": 0}, {"decay": 1.5}):
        with pytest.raises(DataError, match="expected tol > 0"):
            HessianFree(**wrong)
    for wrong in ({"decay": 0.0}, {"every": 0}, {"low": 0.9}, {"initial": 0.0}):
        with pytest.raises(DataError, match="expected 0 < minimum"):
            LevenbergMarquardt(**wrong)
    model, _, _ = problem()
    with pytest.raises(DataError, match="preconditioner does not make: take NaturalGradient"):
        Preconditioner(model, damping=LevenbergMarquardt())


def test_tensors_that_are_no_parameters():
    model, _, _ = problem()
    other, _, _ = problem()
    with pytest.raises(SpaceMismatchError, match=r"\(5, 4\).* are none: pass the model that owns"):
        NaturalGradient(model, params=other.parameters())


def test_a_schedule_that_turns_negative():
    model, x, y = problem()
    optimizer = NaturalGradient(model, "kfac", damping=lambda step: 1.0 - 2.0 * (step > 1))
    with pytest.raises(DataError, match=r"got -1.0"):
        train(optimizer, model, x, y, 3)


# --- states ---------------------------------------------------------------------------------------


def test_the_state_of_another_model():
    model, x, y = problem()
    optimizer = NaturalGradient(model, "kfac")
    train(optimizer, model, x, y, 1)
    other, _, _ = problem(outputs=5)
    with pytest.raises(
        SpaceMismatchError, match=r"'2.weight', '2.bias'.*another shape.*same model"
    ):
        NaturalGradient(other, "kfac").load_state_dict(optimizer.state_dict())
    with pytest.raises(SpaceMismatchError, match="missing, extra"):
        NaturalGradient(model, "kfac", params="0").load_state_dict(optimizer.state_dict())


def test_the_state_of_another_optimizer():
    model, x, y = problem()
    adam = torch.optim.Adam(model.parameters())
    optimizer = NaturalGradient(model, "kfac")
    with pytest.raises(DataError, match="without curvature"):
        optimizer.load_state_dict(adam.state_dict())
    train(optimizer, model, x, y, 1)
    state = optimizer.state_dict()
    with pytest.raises(DataError, match="same representation"):
        NaturalGradient(model, "implicit").load_state_dict(state)
    with pytest.raises(DataError, match="same representation"):
        NaturalGradient(model, "diagonal").load_state_dict(state)
    state["curvature"]["version"] = 0
    with pytest.raises(DataError, match="another version"):
        optimizer.load_state_dict(state)


def test_a_batch_that_cannot_be_proved_leaves_the_curvature_as_it_is(monkeypatch):
    """Its forms may be there, and numbers be rounded; the run goes on."""
    model, x, y = problem()
    optimizer = NaturalGradient(model, seed=0)

    def refused(*args):
        raise UnprovedError("numbers differ")

    with monkeypatch.context() as patched:
        patched.setattr(Capture, "observed", lambda *args, **options: None)
        patched.setattr(Capture, "prove", refused)
        with pytest.raises(UnprovedError):  # there is no curvature yet
            backward(optimizer, model, x, y)
    train(optimizer, model, x, y, 3)
    before, F = weights(model), optimizer.operator
    with monkeypatch.context() as patched:
        patched.setattr(Capture, "observed", lambda *args, **options: None)
        patched.setattr(Capture, "prove", refused)
        with pytest.warns(SelfCheckWarning, match=r"^numbers differ. The curvature was not refre"):
            train(optimizer, model, x, y, 1)
    assert optimizer.operator is F
    assert not torch.equal(weights(model), before)
    train(optimizer, model, x, y, 1)
    assert optimizer.operator is not F


@pytest.mark.parametrize("estimator", ["mc", "exact"])
def test_a_first_gradient_that_is_zero_shows_no_likelihood(estimator):
    """An example that is fitted exactly: the remedy is to name the likelihood."""
    model, x, y = nn.Linear(3, 2), torch.ones(1, 3), torch.zeros(1, dtype=torch.int64)
    model.bias.data = torch.tensor([200.0, -200.0])
    with pytest.raises(DataError, match=r"is zero: pass likelihood="):
        backward(NaturalGradient(model, estimator=estimator), model, x, y)
    optimizer = NaturalGradient(model, "kfac", "categorical", estimator=estimator)
    train(optimizer, model, x, y, 2)
    assert bool(weights(model).isfinite().all())
