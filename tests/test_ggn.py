"""Gauss-Newton matrices of any loss against the oracle, in float64; weighted empirical Fishers."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import nngeo_lazy as ng
from nngeo_lazy.errors import (
    DataError,
    NotPositiveDefiniteError,
    TooLargeError,
    UnsupportedLayerError,
)
from nngeo_lazy.likelihoods import Bernoulli, Categorical, Gaussian, Poisson

import oracle
import zoo
from cases import close

pytestmark = pytest.mark.usefixtures("float64")

REPRESENTATIONS = ["dense", "block_diagonal", "diagonal", "quasi_diagonal", "ekfac", "low_rank"]
WEIGHT = [0.5, 2.0, 1.0]


def classes(outputs):
    return torch.randint(outputs.shape[-1], outputs.shape[:-1])


def cross_entropy(**options):
    """Of one example, summed over its positions."""

    def nll(f, y):
        kept = {k: torch.tensor(v) if k == "weight" else v for k, v in options.items()}
        f, y = f.reshape(-1, f.shape[-1]), y.reshape(-1)
        return F.cross_entropy(f, y, reduction="sum", **kept)

    return nll


def binary(f, y):
    return F.binary_cross_entropy_with_logits(f, y, reduction="sum", pos_weight=torch.tensor(3.0))


def cosh(f, y):
    return (f - y).cosh().log().sum()


# name -> (the package's loss, labels, the loss of one example)
LOSSES = {
    "categorical": (lambda: Categorical(class_dim=-1), classes, cross_entropy()),
    "weighted": (
        lambda: Categorical(class_dim=-1, weight=WEIGHT, label_smoothing=0.2),
        classes,
        cross_entropy(weight=WEIGHT, label_smoothing=0.2),
    ),
    "pos_weight": (lambda: Bernoulli(pos_weight=3.0), torch.rand_like, binary),
    "poisson": (lambda: Poisson(), lambda f: torch.poisson(f.exp()), oracle.nll_poisson),
    "gaussian": (lambda: Gaussian(oracle.VARIANCE), torch.randn_like, oracle.nll_gaussian),
    "callable": (
        lambda: lambda f, y: (f - y).cosh().log().flatten(1).sum(1),
        torch.randn_like,
        cosh,
    ),
}


def build(net, loss, labels, representation="dense", builder=ng.GGN, **options):
    return builder(
        net.model,
        net.batch,
        representation,
        target=lambda batch: labels,
        forward=net.forward,
        **({"loss": loss} if builder is ng.GGN else {"likelihood": loss}),
        **options,
    )


def expected(net, labels, nll, empirical=False):
    J = oracle.jacobian(net.model, net.call, net.examples)
    total = 0.0
    for j, example, y in zip(J, net.examples, labels, strict=True):
        f = oracle.outputs(net.model, net.call, example)[0].detach()
        if empirical:
            s = torch.func.grad(nll)(f, y).flatten()
            total = total + torch.outer(j.mT @ s, j.mT @ s)
        else:
            H = torch.func.hessian(nll)(f, y).reshape(f.numel(), f.numel())
            total = total + j.mT @ H @ j
    return total / len(J)


def outputs_of(net):
    with torch.no_grad():
        return torch.cat([oracle.outputs(net.model, net.call, e) for e in net.examples])


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("kind", ["mlp", "sequence", "convolutions"])
def test_every_loss_in_every_representation(kind, name):
    make, labelled, nll = LOSSES[name]
    net = getattr(zoo, kind)()
    out = outputs_of(net)
    if name == "weighted" and out.shape[-1] != len(WEIGHT):
        make = lambda: Categorical(class_dim=-1, weight=WEIGHT[: out.shape[-1]])  # noqa: E731
        nll = cross_entropy(weight=WEIGHT[: out.shape[-1]])
    labels = labelled(out)
    exact = expected(net, labels, nll)
    for representation in REPRESENTATIONS:
        G = build(net, make(), labels, representation)
        if representation in ("dense", "low_rank"):
            close(G.to_dense(), exact)
        elif representation == "ekfac":
            for block, layout in zip(G.members, G.layouts, strict=True):
                where = layout.positions()
                own = exact[where][:, where]
                close(block.trace(), own.trace())
                if hasattr(block, "bases"):
                    Q = block.unrotate(torch.eye(len(where)))
                    close(block.eigenvalues, (Q.mT @ own @ Q).diagonal())
        else:
            close(G.diagonal(), exact.diagonal())
    if name not in ("callable",):
        empirical = build(net, make(), labels, builder=ng.FIM, estimator="empirical")
        close(empirical.to_dense(), expected(net, labels, nll, empirical=True))


@pytest.mark.parametrize("name", LOSSES)
def test_monte_carlo_is_unbiased(name):
    make, labelled, nll = LOSSES[name]
    net = zoo.mlp()
    labels = labelled(outputs_of(net))
    exact = expected(net, labels, nll)
    many = build(net, make(), labels, estimator="mc", samples=3000, seed=0).to_dense()
    assert (many - exact).norm() < 0.1 * exact.norm()
    once = build(net, make(), labels, estimator="mc", seed=0).to_dense()
    assert torch.equal(once, build(net, make(), labels, estimator="mc", seed=0).to_dense())


MODULES = {
    "cross entropy": (nn.CrossEntropyLoss, {}, classes),
    "weighted cross entropy": (
        nn.CrossEntropyLoss,
        {"weight": torch.tensor(WEIGHT), "label_smoothing": 0.1},
        classes,
    ),
    "mse": (nn.MSELoss, {}, torch.randn_like),
    "bce": (nn.BCEWithLogitsLoss, {"pos_weight": torch.tensor([2.0, 1.0, 3.0])}, torch.rand_like),
    "poisson": (nn.PoissonNLLLoss, {}, lambda f: torch.poisson(f.exp())),
    "huber": (nn.SmoothL1Loss, {"beta": 3.0}, torch.randn_like),
    "soft cross entropy": (nn.CrossEntropyLoss, {}, lambda f: torch.rand_like(f).softmax(-1)),
}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", MODULES)
def test_modules_keep_their_reduction_over_the_whole_loader(name, reduction):
    """The Hessian of the module on one batch of everything, from unequal batches."""
    kind, options, labelled = MODULES[name]
    options = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    module = kind(**options, reduction=reduction)
    net = zoo.mlp()
    labels = labelled(outputs_of(net))
    batches = [(net.batch[s], labels[s]) for s in (slice(0, 1), slice(1, 6))]
    linear = nn.Linear(4, 3)  # whose outputs are linear: the Gauss-Newton matrix is the Hessian
    w = [p.detach() for p in linear.parameters()]

    def whole(flat):
        parts = [p.view_as(q) for p, q in zip(flat.split([12, 3]), w, strict=True)]
        return module(F.linear(net.batch, *parts), labels)

    exact = torch.func.hessian(whole)(torch.cat([p.flatten() for p in w]))
    close(ng.GGN(linear, batches, "dense", loss=module).to_dense(), exact, 1e-9)
    close(ng.GGN(linear, batches, "diagonal", loss=module).diagonal(), exact.diagonal(), 1e-9)


def test_a_loss_without_a_second_derivative():
    model, x, y = nn.Linear(4, 3), torch.randn(6, 4), torch.randint(3, (6,))
    with pytest.raises(UnsupportedLayerError, match="cannot be differentiated twice"):
        ng.GGN(model, (x, y), "dense", loss=nn.MultiMarginLoss(p=2))


def of_soft_labels(f, y):
    return -(f * y).sum(1)


@pytest.mark.parametrize(
    ("loss", "labels"),
    [
        (nn.NLLLoss(), torch.tensor([0, 1, 2, 0, 1, 2])),
        (nn.KLDivLoss(reduction="batchmean"), torch.rand(6, 3).softmax(-1)),
        (nn.L1Loss(), torch.randn(6, 3)),
        (of_soft_labels, torch.rand(6, 3)),
    ],
    ids=["nll", "kl", "l1", "callable"],
)
@pytest.mark.parametrize("representation", ["dense", "kfac", "implicit"])
def test_losses_that_are_linear_in_the_outputs_are_refused(loss, labels, representation):
    inner = nn.Linear(4, 3)
    model, x = nn.Sequential(inner, nn.LogSoftmax(-1)), torch.randn(6, 4)
    with pytest.raises(DataError, match=r"linear in the outputs.* zero: let the model return what"):
        ng.GGN(model, (x, labels), representation, loss=loss)
    # each remedy that the message names
    curved = {"loss": "categorical"} if labels.dtype == torch.int64 else {"loss": "gaussian"}
    assert ng.GGN(inner, (x, labels), representation, **curved).trace() > 0
    exact = ng.Hessian(model, (x, labels), "dense", loss=loss)
    likelihood = "categorical" if labels.dtype == torch.int64 else "gaussian"
    empirical = {"estimator": "empirical", "likelihood": likelihood}
    assert ng.FIM(model, (x, labels), representation, **empirical).trace() > 0
    assert exact.to_dense().isfinite().all()


@pytest.mark.parametrize("far", [0.0, 1e6])
def test_losses_that_are_linear_in_places_are_not_refused(far):
    model, x = nn.Linear(4, 3), torch.randn(6, 4)
    y = model(x).detach() + far
    for loss in (nn.HuberLoss(), lambda f, y: F.huber_loss(f, y, reduction="none").sum(1)):
        assert (ng.GGN(model, (x, y), "dense", loss=loss).trace() > 0) == (far == 0)
    ignored = torch.full((6,), -100)
    batches = [(x, ignored), (x, torch.zeros(6, dtype=torch.int64))]
    loss = nn.CrossEntropyLoss(label_smoothing=0.1)
    each = lambda f, y: F.cross_entropy(f, y, reduction="none")  # noqa: E731
    assert ng.GGN(model, batches, "dense", loss=each).trace() > 0
    assert ng.GGN(model, batches, "dense", loss=loss).trace() > 0


def test_losses_that_mix_examples_are_refused():
    model, x = nn.Linear(2, 1), torch.randn(8, 2)
    y = model(x).detach()
    y[1:] += 1  # the first example is fitted: its loss shows nothing
    with pytest.raises(DataError, match="depend on that example alone"):
        ng.GGN(model, (x, y), "dense", loss=lambda f, y: (f - y).square().sum(1) / len(f))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_targets(dtype):
    model, x, y = nn.Linear(4, 3).to(dtype), torch.randn(6, 4, dtype=dtype), torch.rand(6, 3)
    for loss in (nn.HuberLoss(), lambda f, y: F.huber_loss(f, y, reduction="none").sum(1)):
        G = ng.GGN(model, (x, y.to(dtype)), "dense", loss=loss)
        assert G.dtype == torch.float32
        assert G.trace().isfinite()


def test_masks_of_segmentation_and_language_models():
    """(N, C, H, W) and (N, T, V) with ignored labels."""

    class Segmenter(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return self.b(torch.tanh(self.a(x)))

    model, x = Segmenter(), torch.randn(3, 1, 5, 3)
    labels = torch.randint(4, (3, 5, 3))
    labels[0], labels[1, :2] = -100, -100
    for representation in ("dense", "kfac", "ekfac", "diagonal"):
        G = ng.GGN(model, (x, labels), representation, loss="categorical")
        assert (G.num_examples, G.num_terms) == (3, 24)
    exact = 0.0
    J = oracle.jacobian(model, lambda f, one: f(one.unsqueeze(0)), list(x))
    for j, one, y in zip(J, x, labels, strict=True):
        f = model(one.unsqueeze(0)).detach()[0]

        def nll(f, y=y):
            return F.cross_entropy(f.unsqueeze(0), y.unsqueeze(0), reduction="sum")

        H = torch.func.hessian(nll)(f).reshape(60, 60)
        exact = exact + j.mT @ H @ j
    close(ng.FIM(model, (x, labels), "dense").to_dense(), exact / 3)


def test_refusals():
    model, x = nn.Linear(4, 3), torch.randn(6, 4)
    labels = torch.randint(3, (6,))
    weighted = Categorical(weight=WEIGHT)
    for estimator in ("exact", "mc"):
        with pytest.raises(DataError, match=f"{estimator} Fisher.*class weights.*GGN"):
            ng.FIM(model, (x, labels), likelihood=weighted, estimator=estimator)
    with pytest.raises(DataError, match=r"pos_weight"):
        ng.FIM(model, (x, torch.rand(6, 3)), likelihood=Bernoulli(pos_weight=2.0))
    with pytest.raises(DataError, match="label smoothing"):
        ng.FIM(model, (x, labels), likelihood=Categorical(label_smoothing=0.1))
    with pytest.raises(NotPositiveDefiniteError, match="not convex in the outputs"):
        ng.GGN(model, (x, x[:, :3]), "dense", loss=lambda f, y: -(f - y).square().sum(1))
    with pytest.raises(DataError, match=r"per-example losses \(6,\)"):
        ng.GGN(model, (x, labels), "dense", loss=F.cross_entropy)
    with pytest.raises(DataError, match="take FIM"):
        ng.GGN(model, (x, labels), "dense", loss="categorical", estimator="empirical")
    with pytest.raises(DataError, match="unknown loss"):
        ng.GGN(model, (x, labels), "dense", loss=3)
    with pytest.raises(DataError, match="take Hessian"):
        ng.GGN(model, (x, labels), "dense", loss="output")
    with pytest.raises(TooLargeError, match="max_directions=1"):
        ng.GGN(model, (x, labels), "dense", loss="categorical", max_directions=1)
