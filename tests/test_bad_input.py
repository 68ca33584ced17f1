"""Every user error is a named one that says what was expected, what came, and what to do."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import nngeo_lazy as ng
from nngeo_lazy.errors import (
    DataError,
    NonFiniteError,
    NotPositiveDefiniteError,
    SpaceMismatchError,
    StochasticModelError,
    TooLargeError,
    UnsupportedLayerError,
)
from nngeo_lazy.gp import NTKKernel
from nngeo_lazy.likelihoods import Gaussian, Joint, Weighted
from nngeo_lazy.representations import Stored

X, Y = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])


def net(*more):
    return nn.Sequential(nn.Linear(4, 5), *more, nn.Tanh(), nn.Linear(5, 3))


def refused(error, *words, model=None, data=None, **options):
    """Building raises `error`, its message holds the words, and the model is as it was."""
    model = net() if model is None else model
    before = copy.deepcopy(model.state_dict())
    flags = [(p.requires_grad, p.grad) for p in model.parameters()]
    with pytest.raises(error) as caught:
        ng.FIM(model, (X, Y) if data is None else data, **options)
    for word in words:
        assert word in str(caught.value), str(caught.value)
    for name, value in model.state_dict().items():
        assert torch.equal(value.nan_to_num(7.0), before[name].nan_to_num(7.0)), name
    assert [(p.requires_grad, p.grad) for p in model.parameters()] == flags
    assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())


# --- data -----------------------------------------------------------------------------------------


def test_one_shot_iterator():
    batches = (b for b in [(X, Y)])
    refused(DataError, "one-shot iterator", "pass the DataLoader itself", data=batches)


def test_bare_dataset():
    refused(DataError, "bare Dataset", "DataLoader", data=TensorDataset(X, Y))


@pytest.mark.parametrize("data", [[], DataLoader(TensorDataset(X[:0], Y[:0]))])
def test_empty_loader(data):
    refused(DataError, "the loader is empty", data=data)


def test_no_examples():
    refused(DataError, "at least one example", data=[(X, Y), (X[:0], Y[:0])])


def test_unequal_keys():
    data = [{"input": X, "labels": Y}, {"input": X, "labels": Y, "mask": Y}]
    refused(DataError, "batches of one structure", "mask", data=data)


def test_no_data():
    refused(DataError, "expected a DataLoader", "got int", data=3)


def test_loader_that_is_empty_the_second_time(monkeypatch):
    class Once:
        def __init__(self):
            self.batches = iter([(X, Y)])

        def __iter__(self):
            return self.batches

    monkeypatch.setattr("nngeo_lazy.kept.KEPT_BYTES", 0)  # else one pass is enough
    words = "same batches on every pass", "none the second time"
    refused(DataError, *words, data=Once(), representation="ekfac")


# --- outputs and labels ---------------------------------------------------------------------------


def test_outputs_that_do_not_fit():
    refused(DataError, "(6,)", "(6, 1)", data=(X, Y[:, None]), likelihood="categorical")
    refused(DataError, "integer class labels", data=(X, Y.float()), likelihood="categorical")
    refused(
        DataError,
        "shaped like the outputs",
        "(6, 3)",
        data=(X, X),
        likelihood="gaussian",
        estimator="empirical",
    )
    one = nn.Linear(4, 1)
    refused(DataError, "two classes", "bernoulli", model=one, likelihood="categorical")


def test_likelihood_that_is_not_proved():
    words = "cannot tell the likelihood", "bernoulli", "gaussian"
    refused(DataError, *words, data=X)
    refused(DataError, *words, data=(X, torch.randn(6, 3)))


def test_labels_out_of_range():
    bad = torch.tensor([0, 1, 2, 3, 1, 2])
    for estimator in ("exact", "empirical"):
        refused(DataError, "from 0 to 2", "-100", data=(X, bad), estimator=estimator)


def test_empirical_without_labels():
    refused(DataError, "observed labels", data=X, likelihood="gaussian", estimator="empirical")


def test_outputs_that_are_no_tensor():
    class M(nn.Linear):
        def forward(self, x):
            return [super().forward(x)]

    refused(DataError, "to be a tensor", "got list", "forward=", model=M(4, 3))


@pytest.mark.parametrize("where", [0, 1])
def test_outputs_that_are_not_finite(where):
    batches = [(X, Y), (X.clone(), Y)]
    batches[where][0][0, 0] = float("nan") if where else float("inf")
    if not where:
        batches[0] = (X.clone().fill_(float("inf")), Y)
    refused(NonFiniteError, "finite outputs", data=batches)
    X[0, 0] = 0.5


def test_the_kind_of_an_error_is_not_read_from_its_words():
    class Odd(ng.likelihoods.Gaussian):
        def flags(self, outputs, target):
            return {"expected finitely many digits": torch.tensor(True)}

    with pytest.raises(DataError, match="finitely many digits") as caught:
        ng.FIM(net(), X, likelihood=Odd())
    assert not isinstance(caught.value, NonFiniteError)


def test_parameters_that_are_not_finite():
    model = net()
    model[0].weight.data[0, 0] = float("nan")
    refused(NonFiniteError, "finite parameters", "0.weight", model=model)


def test_statistics_that_are_not_finite():
    class Huge(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.b(self.a(x * 1e30) * 1e-30)

    refused(NonFiniteError, "statistics of a ", "overflow", model=Huge(), representation="kfac")


# --- parameters and models ------------------------------------------------------------------------


def test_no_trainable_parameter():
    model = net().requires_grad_(False)
    refused(DataError, "at least one trainable parameter", "requires_grad_()", model=model)


def test_parameters_that_nothing_depends_on():
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 3)

        def forward(self, x):
            return self.a(x).detach()

    refused(DataError, "do not depend on any selected parameter", model=M())


def test_a_parameter_that_the_outputs_do_not_depend_on_is_a_zero_block():
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(2, 2)

        def forward(self, x):
            return self.a(x)

    for representation in ("dense", "block_diagonal", "diagonal", "kfac", "ekfac"):
        F = ng.FIM(M(), (X, Y), representation)
        assert F.block("b").norm() == 0
        assert F.block("a").norm() > 0
        assert "do not depend on it" in str(F.report())


def test_mixed_dtypes():
    model = net()
    model[2].double()
    refused(DataError, "one dtype", "0.weight on torch.float32", "2.weight", ".to(", model=model)


def test_mixed_devices():
    model = net()
    model[2] = nn.Linear(5, 3, device="meta")
    with pytest.raises(DataError, match=r"one device.*0\.weight on cpu.*2\.weight on meta"):
        ng.FIM(model, (X, Y))


def test_dropout():
    refused(StochasticModelError, "1 (Dropout)", "model.eval()", model=net(nn.Dropout(0.5)))
    model = net(nn.Dropout(0.5)).eval()
    assert ng.FIM(model, (X, Y)).trace() > 0


def test_sampling_in_the_forward_pass():
    class M(nn.Linear):
        def forward(self, x):
            return super().forward(x + torch.rand_like(x))

    for data in ((X, Y), (X[:1], Y[:1]), (X[:3], Y[:3])):
        refused(StochasticModelError, "one fixed function", "differ", model=M(4, 3), data=data)


def test_batch_norm_in_training_mode():
    model = net(nn.BatchNorm1d(5))
    refused(StochasticModelError, "1 (BatchNorm1d)", "statistics of the batch", model=model)


def test_functional_batch_norm():
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 3)

        def forward(self, x):
            return nn.functional.batch_norm(self.a(x), None, None, training=True)

    refused(StochasticModelError, "statistics of the batch", "model.eval()", model=M())


def test_a_model_that_mixes_examples():
    class M(nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            return y - y.mean(0)

    refused(StochasticModelError, "each example on its own", "left out", model=M(4, 3))


def test_layers_whose_gradient_is_no_derivative():
    tokens = torch.randint(0, 5, (6, 2))
    for option in ({"max_norm": 1.0}, {"scale_grad_by_freq": True}):
        model = nn.Sequential(nn.Embedding(5, 3, **option), nn.Flatten(), nn.Linear(6, 3))
        name = next(iter(option))
        refused(UnsupportedLayerError, name, model=model, data=(tokens, Y))


def test_layers_that_the_size_of_a_batch_chooses():
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x):
            return self.a(x) if len(x) > 3 else self.b(x)

    data = [(X, Y), (X[:3], Y[:3])]
    refused(StochasticModelError, "each example on its own", "left out", model=M(), data=data)


# --- options --------------------------------------------------------------------------------------


def test_unknown_names():
    refused(DataError, "unknown representation 'kfca'", "'kfac'", representation="kfca")
    refused(DataError, "unknown likelihood 'softmax'", "'categorical'", likelihood="softmax")
    refused(DataError, "unknown estimator 'sampled'", "'mc'", estimator="sampled")
    refused(DataError, "samples", "0", estimator="mc", samples=0)
    refused(SpaceMismatchError, "'fc' matches no parameter", "0.weight", params="fc")
    with pytest.raises(DataError, match="expected sharing='expand' or 'reduce', got 'both'"):
        ng.representations.KFAC(sharing="both")


def test_too_many_directions():
    refused(TooLargeError, "2 backward passes", "max_directions=1", "'mc'", max_directions=1)
    assert ng.FIM(net(), (X, Y), estimator="mc", max_directions=1).trace() > 0


def test_too_large_a_dense_matrix():
    model = nn.Linear(4, 50_000)
    for representation in ("dense", "block_diagonal"):
        options = {"representation": representation, "estimator": "mc"}
        refused(
            TooLargeError, "GiB", "'kfac'", model=model, likelihood="gaussian", data=X, **options
        )


# --- the matrix -----------------------------------------------------------------------------------


@pytest.mark.parametrize("representation", ["dense", "block_diagonal", "diagonal", "kfac", "ekfac"])
def test_vectors_and_damping(representation):
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3), nn.Linear(3, 3))
    F = ng.FIM(model, (X, Y), representation)
    P = len(F.space)
    for call in (F.matmul, lambda v: F.solve(v, damping=1.0), F.vTMv):
        with pytest.raises(SpaceMismatchError, match=f"{P}"):
            call(torch.zeros(P + 1))
        good = F.space.unravel(F.space.zeros())
        with pytest.raises(SpaceMismatchError, match=r"missing: \['0.weight'\]; unknown: \['w'\]"):
            call({"w": good["0.weight"], **{k: v for k, v in good.items() if k != "0.weight"}})
    with pytest.raises(NotPositiveDefiniteError, match=r"expected damping >= 0, got -0.001"):
        F.solve(F.space.zeros(), damping=-1e-3)
    with pytest.raises(SpaceMismatchError, match="matches no parameter"):
        F.block("missing")


def test_singular_without_damping():
    model = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 3))
    model[0].weight.data[0], model[0].bias.data[0] = 0, -1.0  # a dead unit
    for representation in ("dense", "block_diagonal", "diagonal", "kfac"):
        F = ng.FIM(model, (X[:2], Y[:2]), representation)
        with pytest.raises(NotPositiveDefiniteError, match=r"singular.*damping"):
            F.solve(F.space.randn())
        assert F.solve(F.space.randn(), damping=1e-3).isfinite().all()


# --- arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize("builder", [ng.FIM, ng.GGN, ng.Hessian, ng.Jacobian, ng.NTK])
@pytest.mark.parametrize("model", [None, (X, Y), X, "net", nn.Linear])
def test_what_is_no_model(builder, model):
    options = {"loss": "categorical"} if builder in (ng.GGN, ng.Hessian) else {}
    with pytest.raises(
        DataError, match=r"the model, a torch.nn.Module, got .*the order is \(model, "
    ):
        builder(model, X if builder is ng.NTK else (X, Y), **options)


MODEL = net()
WRONG_OPTIONS = {
    "a path": (
        lambda: ng.self_influence(MODEL, ng.FIM(MODEL, (X, Y)), (X, Y), path=1.5),
        r"expected path to be a string or a path or None, got 1.5",
    ),
    "a folder": (lambda: Stored("kfac", (1, 2)), r"folder to be a string or a path, got tuple"),
    "heads": (lambda: Joint(0.5), "heads to be a dict or a list, got 0.5"),
    "no heads": (lambda: Joint(float("nan")), "heads to be a dict or a list, got nan"),
    "representations": (
        lambda: ng.compare(MODEL, (X, Y), [X]),
        r"(?s)unknown representation tensor.*expected one of",
    ),
    "a measure": (
        lambda: ng.Queries(MODEL, ng.FIM(MODEL, (X, Y)), (X, Y), measure=lambda: 0, damping=0.1),
        r"measure to be a function of \(outputs, batch\), .*: pass measure=lambda outputs, batch",
    ),
    "positions": (
        lambda: ng.FIM(MODEL, (X, Y), positions=MODEL),
        "positions to be a function of a batch",
    ),
    "dims": (lambda: NTKKernel(MODEL, active_dims={"a": 1}), "active_dims to be a tuple of int"),
    "a kernel's network": (lambda: NTKKernel([1]), "the model, a torch.nn.Module, got"),
    "a mask of labels": (lambda: Weighted(Gaussian(), np.eye(2)), "nan to be 'refuse' or 'mask'"),
    "a target": (
        lambda: ng.GGN(MODEL, (X, Y), loss="categorical", target=MODEL),
        r"target to be a function of a batch, .*: pass target=lambda batch: ...",
    ),
}


@pytest.mark.parametrize(("call", "words"), WRONG_OPTIONS.values(), ids=WRONG_OPTIONS)
def test_options_of_a_wrong_kind(call, words):
    with pytest.raises(DataError, match=words):
        call()


BUILDS = {
    "fim": lambda model: ng.FIM(model, (X, Y)),
    "implicit": lambda model: ng.FIM(model, (X, Y), "implicit"),
    "hessian": lambda model: ng.Hessian(model, (X, Y), loss="categorical"),
    "ntk": lambda model: ng.NTK(model, X),
    "plan": lambda model: ng.plan(ng.FIM, model, (X, Y)),
    "selected": lambda model: ng.FIM(model, (X, Y), params=nn.Linear),
    "optimizer": ng.optim.NaturalGradient,
    "preconditioner": ng.optim.Preconditioner,
}


@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_models_that_cannot_be_looked_into(build):
    model = net()
    scripted = torch.jit.script(model)
    for compiled, name in (
        (scripted, "it"),
        (torch.jit.trace(model, X), "it"),
        (nn.Sequential(scripted, nn.Linear(3, 3)), "0"),
    ):
        with pytest.raises(DataError, match=rf"but {name} is compiled by torch.jit, .*: pass the"):
            build(compiled)
    build(model)  # the module that it was made from

    lazy = nn.Sequential(nn.LazyLinear(5), nn.Tanh(), nn.Linear(5, 3))
    with pytest.raises(DataError, match=r"0\.weight gets its shape .*: call the model on a batch"):
        build(lazy)
    lazy(X)
    build(lazy)

    empty = net().to("meta")
    with pytest.raises(DataError, match=r"on the meta device: call .*to_empty.*load_state_dict"):
        build(empty)
    empty = empty.to_empty(device="cpu")
    empty.load_state_dict(model.state_dict())
    build(empty)


@pytest.mark.parametrize("seed", ["0", 1.5, True, X])
def test_seeds(seed):
    refused(DataError, "expected seed to be an integer or None", estimator="mc", seed=seed)


def test_functions():
    refused(DataError, "expected forward to be a function or None, got 3", forward=3)
    refused(DataError, "expected target to be a function or None, got Tensor", target=Y)


def test_merge_takes_a_list():
    F = ng.FIM(net(), (X, Y))
    with pytest.raises(DataError, match=r"a list of operators, got .*: put it into a list"):
        ng.merge(F)
    assert ng.merge([F]).num_examples == 6  # the remedy


# --- weights that a forward pass would rescale, and layers that the outputs do not depend on ------


class Renormalised(nn.Module):
    """max_norm as an argument of the function."""

    def __init__(self):
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.randn(5, 3)), nn.Linear(3, 3)

    def forward(self, tokens):
        return self.head(nn.functional.embedding(tokens, self.weight, max_norm=1.0).mean(1))


@pytest.mark.parametrize("representation", ["kfac", "diagonal", "implicit"])
@pytest.mark.parametrize("params", [None, "*.bias"])
@pytest.mark.parametrize("kind", ["module", "bag", "function"])
def test_max_norm_is_refused_before_it_changes_the_weight(kind, params, representation):
    tokens = torch.randint(0, 5, (6, 2))
    model = {
        "module": lambda: nn.Sequential(
            nn.Embedding(5, 3, max_norm=1.0), nn.Flatten(), nn.Linear(6, 3)
        ),
        "bag": lambda: nn.Sequential(nn.EmbeddingBag(5, 3, max_norm=1.0), nn.Linear(3, 3)),
        "function": Renormalised,
    }[kind]()
    weight = next(model.parameters())
    weight.data.fill_(10.0)  # every row is longer than the norm
    for build in (ng.FIM, ng.plan):
        ahead = () if build is ng.FIM else (ng.FIM,)
        if ahead and representation == "implicit":
            continue
        with pytest.raises(UnsupportedLayerError, match=r"max_norm.*set max_norm=None"):
            build(*ahead, model, (tokens, Y), representation, params=params)
        assert bool((weight == 10.0).all())


def test_a_layer_that_the_outputs_do_not_depend_on():
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.extra, self.h = nn.Linear(4, 6), nn.Linear(4, 2), nn.Linear(6, 3)

        def forward(self, x):
            return self.h(self.a(x).tanh())

    model, x = M().double(), X.double()
    J = ng.Jacobian(model, x, "factored")
    rows = ng.Jacobian(model, x, "dense").to_dense()
    unused = torch.cat(
        [torch.arange(s.start, s.stop) for n, s in J.space.slices.items() if "extra" in n]
    )
    assert not bool(rows[:, unused].any())
    u = torch.randn(len(rows), dtype=torch.float64)
    torch.testing.assert_close(J.mT @ u, rows.mT @ u)
    torch.testing.assert_close(J.to_dense(), rows)
    torch.testing.assert_close(ng.NTK(model, x).to_dense(), rows @ rows.mT)
    F = ng.FIM(model, (x, Y), "factored")
    assert not bool(F.diagonal()[unused].any())
    v = torch.ones(len(F.space), dtype=torch.float64)
    torch.testing.assert_close(F.solve(v, damping=0.1)[unused], 10 * v[unused])
    kfac = ng.FIM(model, (x, Y), "kfac")
    assert ng.Laplace(model, kfac).functional(x).mean.shape == (6, 3)


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x, mask=None):
        return self.head(x.sum(1) if mask is None else (x * mask[..., None]).sum(1))


class Needy(Masked):
    def forward(self, x, mask):
        return super().forward(x, mask)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Masked, r"integer class labels, got a target of torch.bool.*\(\(inputs, mask\), target\)"),
        (Needy, r"missing a required argument: 'mask'; pass \(\(inputs, mask\), target\)"),
    ],
)
def test_inputs_with_a_mask_and_labels(kind, message):
    model, x, mask = kind(), torch.randn(6, 5, 4), torch.rand(6, 5) < 0.5
    y = torch.randint(3, (6,))
    with pytest.raises(DataError, match=message):
        ng.FIM(model, [(x, mask, y)], "kfac", likelihood="categorical", estimator="empirical")
    F = ng.FIM(model, [((x, mask), y)], "kfac", likelihood="categorical", estimator="empirical")
    pooled = nn.Sequential(model.head)
    inputs = (x * mask[..., None]).sum(1)
    wanted = ng.FIM(pooled, (inputs, y), "kfac", likelihood="categorical", estimator="empirical")
    torch.testing.assert_close(F.to_dense(), wanted.to_dense())


def test_outputs_whose_examples_are_not_in_front():
    class Turned(nn.Linear):
        def forward(self, x):
            return super().forward(x).mT

    model, x, y = Turned(4, 3), torch.randn(6, 4), torch.randint(3, (6,))
    message = r"examples are in dimension 1 of the outputs, pass forward=.*movedim\(1, 0\)"
    with pytest.raises(DataError, match=message):
        ng.FIM(model, (x, y), "kfac", likelihood="categorical")

    def forward(model, batch):
        return model(batch[0]).movedim(1, 0)

    F = ng.FIM(model, (x, y), "dense", likelihood="categorical", forward=forward)
    plain = nn.Linear(4, 3)
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(F.to_dense(), ng.FIM(plain, (x, y), "dense").to_dense())


def test_checkpoints_that_run_backward_passes_of_their_own():
    class Checkpointed(nn.Module):
        def __init__(self, reentrant):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)
            self.reentrant = reentrant

        def forward(self, x):
            def inner(h):
                return self.b(h).tanh()

            return self.c(checkpoint(inner, self.a(x), use_reentrant=self.reentrant))

    model, x, y = Checkpointed(True), torch.randn(6, 4), torch.randint(3, (6,))
    remedy = Checkpointed(False)
    remedy.load_state_dict(model.state_dict())
    message = "use_reentrant=True.*checkpoint with use_reentrant=False.*representation='implicit'"
    with pytest.raises(UnsupportedLayerError, match=message):
        ng.FIM(model, (x, y), "kfac")
    optimizer = ng.optim.NaturalGradient(model, "kfac", "categorical")
    with pytest.raises(UnsupportedLayerError, match=message):
        optimizer._model(x)
    wanted = ng.FIM(remedy, (x, y), "dense").to_dense()
    plain = nn.Sequential(remedy.a, remedy.b, nn.Tanh(), remedy.c)
    torch.testing.assert_close(wanted, ng.FIM(plain, (x, y), "dense").to_dense())
    torch.testing.assert_close(ng.FIM(model, (x, y), "implicit").to_dense(), wanted)
