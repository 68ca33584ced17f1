"""The plan says what the build will do: the same blocks and bytes, before the work."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import nngeo_lazy as ng
from nngeo_lazy.errors import DataError, SpaceMismatchError, TooLargeError
from nngeo_lazy.jacobian import registry
from nngeo_lazy.jacobian.inputs import PatchInputs
from nngeo_lazy.jacobian.patches import Geometry
from nngeo_lazy.likelihoods import Categorical
from nngeo_lazy.representations import KFAC, LowRank, Mixed

import zoo

EVERY = [
    "dense",
    "block_diagonal",
    "diagonal",
    "quasi_diagonal",
    "kfac",
    KFAC("reduce"),
    "ekfac",
    "low_rank",
    LowRank(rank=4),
    Mixed("ekfac", {"head": "dense"}),
]


@pytest.mark.parametrize("representation", EVERY, ids=str)
def test_the_plan_is_what_is_built(representation):
    net = zoo.gpt()
    data, lik = (net.batch, net.batch), Categorical(class_dim=2)
    plan = ng.plan(ng.FIM, net.model, data, representation, likelihood=lik)
    F = ng.FIM(net.model, data, representation, likelihood=lik)
    report = F.report()
    for planned, built in zip(plan, report, strict=True):
        for what in ("parameter", "layer", "form", "size", "note"):
            assert getattr(planned, what) == getattr(built, what)
        if representation != "diagonal":  # whose blocks become one
            assert planned.block == built.block
    assert plan.bytes == report.bytes
    assert plan.directions == 3 * 6
    assert plan.passes == (2 if "ekfac" in str(representation).lower() else 1)
    assert str(plan).count("\n") == len(plan) + 2
    assert "backward for each batch" in repr(plan)


def test_costs_follow_the_sizes():
    x = torch.randn(6, 4)
    plans = {}
    for width in (8, 16):
        model = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 2))
        plans[width] = ng.plan(ng.FIM, model, x, "kfac", likelihood="gaussian")
    # left o^2 R + right (i + 1)^2, twice each: R = 2 directions, one position
    assert plans[8][0].flops == 2 * (8 * 8 * 2 + 5 * 5)
    assert plans[16][0].flops == 2 * (16 * 16 * 2 + 5 * 5)
    assert plans[8][0].bytes == 4 * (8 * 8 + 5 * 5)
    assert plans[8].flops == sum(row.flops for row in plans[8])


class Multiplied(TorchDispatchMode):
    """Counts the operations of matrix products."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "mm" in func.__name__:
            left, right = [a for a in args if isinstance(a, torch.Tensor)][-2:]
            self.flops.append(2 * left.numel() * right.shape[-1])
        return func(*args, **(kwargs or {}))

    def __init__(self):
        super().__init__()
        self.flops = []


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(64, 8, 3, padding=1),  # by correlations
        nn.Conv2d(32, 8, 3, padding=1, groups=2),
        nn.Conv2d(64, 8, 2, stride=2),  # by patches
        nn.Conv2d(16, 16, 3, padding=1, groups=16),  # by pixels
    ],
    ids=str,
)
def test_operations_of_convolutions_are_those_that_are_done(layer):
    """Patches are seldom made; five times as many operations would multiply them."""
    x = torch.randn(8, layer.in_channels, 8, 8)
    plan = ng.plan(ng.FIM, layer.eval(), x, "kfac", likelihood="gaussian", estimator="mc")
    groups, rows = layer.groups, layer.out_channels // layer.groups
    t = layer(x)[0, 0].numel()
    padding = tuple((p, p) for p in layer.padding)
    geometry = Geometry(layer.kernel_size, layer.stride, padding, layer.dilation, groups)
    with Multiplied() as done:
        PatchInputs(x, geometry).moment(False)
    own = sum(done.flops) / len(x)
    assert plan.flops == pytest.approx(2 * groups * t * rows**2 + own, rel=0.25)


def test_only_the_first_batch_is_read_and_nothing_is_changed():
    model, seen = nn.Linear(3, 2), []

    class Loader:
        def __len__(self):
            return 40

        def __iter__(self):
            for k in range(40):
                seen.append(k)
                yield (torch.ones(5, 3), torch.zeros(5, 2))

    before = model.weight.clone()
    plan = ng.plan(ng.FIM, model, Loader(), "low_rank", likelihood="gaussian", estimator="mc")
    assert seen == [0]
    assert (plan.batches, plan.directions, plan[0].block) == (40, 1, "rank 8 of 8")
    assert torch.equal(model.weight, before)
    assert model.weight.grad is None


def test_a_plan_is_made_past_the_limit_of_directions():
    model, x = nn.Linear(3, 2000), torch.randn(4, 3)
    with pytest.raises(TooLargeError, match=r"takes 2000 backward passes.*estimator='mc'.*plan"):
        ng.FIM(model, x, "diagonal", likelihood="gaussian")
    assert ng.plan(ng.FIM, model, x, "diagonal", likelihood="gaussian").directions == 2000
    mc = ng.plan(ng.FIM, model, x, "diagonal", likelihood="gaussian", estimator="mc", samples=3)
    assert mc.directions == 3


def test_a_plan_refuses_what_the_build_would():
    model, x = zoo.mlp().model, torch.randn(6, 4)
    with pytest.raises(SpaceMismatchError, match="have one block"):
        ng.plan(ng.FIM, model, x, Mixed("kfac", {"0.bias": "dense"}), likelihood="gaussian")


def test_other_builders_are_refused():
    with pytest.raises(DataError, match=r"expected the builder to be ng\.FIM or ng\.GGN"):
        ng.plan(print, nn.Linear(2, 2), torch.ones(3, 2))


def test_gauss_newton_plan():
    model, x, y = nn.Linear(3, 2), torch.randn(4, 3), torch.randn(4, 2)
    plan = ng.plan(ng.GGN, model, (x, y), "kfac", loss=nn.MSELoss())
    assert plan.directions == 2


class Scaled(nn.Module):
    """A module of a kind whose form is refused, so that its parameter takes the general way."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))

    def forward(self, x):
        return x * self.weight


class Ways(nn.Module):
    """Two parameters of modules without a form, in a network that runs in some ways only."""

    def __init__(self, kind):
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 3)
        self.u, self.w = Scaled(), Scaled()
        self.kind = kind

    def forward(self, x):
        if self.kind != "vmap":
            float(x.sum())  # refused under vmap
        if self.kind == "masked" and len(x) != 6:
            raise ValueError("six examples alone")
        h = torch.tanh(self.first(x))
        if self.kind == "indexed":
            h = h[torch.arange(len(x))]
        return self.last(self.w(self.u(h)))


WAYS = {  # forward and backward passes for R directions and N examples
    "form": lambda r, n: (1, r),
    "indexed": lambda r, n: (1, r + 2),
    "vmap": lambda r, n: (1 + r, r + r),
    "slices": lambda r, n: (2, r + r),
    "masked": lambda r, n: (1, r + r * n),
}


@pytest.mark.parametrize("estimator", ["mc", "exact"])
@pytest.mark.parametrize("kind", WAYS)
def test_the_plan_counts_the_passes_of_the_network(kind, estimator, monkeypatch):
    """A further batch takes as many, forward and backward, as the plan says."""
    formless = kind not in ("form", "indexed")
    if formless:
        ng.register_layer(Scaled, lambda call, output: "not today")
    try:
        compare_passes(kind, estimator, formless, monkeypatch)
    finally:
        registry._unregister(Scaled)


def compare_passes(kind, estimator, formless, monkeypatch):
    n, counts, gradients = 6, {}, torch.autograd.grad
    batches = [(torch.randn(n, 3), torch.randint(3, (n,))) for _ in range(3)]
    model = Ways(kind)
    seen = {"forward": [], "backward": [], "outputs": []}

    def call(model, batch):
        out = model(batch[0])
        whole = kind == "vmap" and len(out) == 1  # which stands for all examples
        seen["forward"].append(n if whole else len(out))
        seen["outputs"].append(out)
        return out

    def grad(roots, *args, **options):
        many = len(args[1]) if options.get("is_grads_batched") else 1  # passes in one
        for root in [roots] if isinstance(roots, torch.Tensor) else roots:
            seen["backward"].extend(many * len(out) for out in seen["outputs"] if out is root)
        return gradients(roots, *args, **options)

    options = {"forward": call, "likelihood": "categorical", "estimator": estimator}
    for many in (2, 3):
        for each in seen.values():
            each.clear()
        with monkeypatch.context() as patch:
            patch.setattr(torch.autograd, "grad", grad)
            ng.FIM(model, batches[:many], "diagonal", **options)
        counts[many] = sum(seen["forward"]) / n, sum(seen["backward"]) / n
    forward, backward = (b - a for a, b in zip(counts[2], counts[3], strict=True))
    plan = ng.plan(ng.FIM, model, batches, "diagonal", **options)
    directions = 1 if estimator == "mc" else 2
    assert (plan.forward, plan.backward) == WAYS[kind](directions, n)
    assert forward == pytest.approx(plan.forward)
    inside = directions if kind == "vmap" else 0  # autograd is not asked for those of vmap
    assert backward == pytest.approx(plan.backward - inside)
    own = [row.passes for row in plan if row.passes]  # one pass for both parameters
    assert own == ([plan.forward - 1 + plan.backward - directions] if formless else [])
    assert f"{plan.forward} forward and {plan.backward} backward for each batch" in repr(plan)
