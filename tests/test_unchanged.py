"""Nothing that the user owns is changed, whether a build succeeds or fails."""

import copy
import random
import threading

import pytest
import torch
import torch.utils.checkpoint
from fuzz import files as damage
from fuzz import interrupts, threads
from torch import nn
from torch.nn.utils import prune

import nngeo_lazy as ng
from nngeo_lazy.representations import Implicit

import zoo


class Counting(nn.Module):
    """Counts its calls in a buffer."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        if x.isnan().any():
            raise ValueError("the forward pass failed")
        return self.fc(x) * self.frozen


def snapshot(model):
    return {
        "state": copy.deepcopy(model.state_dict()),
        "ids": [id(p) for p in model.parameters()],
        "grads": [(p.grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()],
        "flags": [p.requires_grad for p in model.parameters()],
        "training": [m.training for m in model.modules()],
        "hooks": [(len(m._forward_hooks), len(m._backward_hooks)) for m in model.modules()],
    }


def same(before, after):
    for name, value in before["state"].items():
        assert torch.equal(value, after["state"][name]), name
    assert [id(g) for g, _ in before["grads"]] == [id(g) for g, _ in after["grads"]]
    for (_, old), (new, _) in zip(before["grads"], after["grads"], strict=True):
        assert old is None or torch.equal(old, new)
    for key in ("ids", "flags", "training", "hooks"):
        assert before[key] == after[key]


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("representation", ["dense", "kfac", "ekfac", "diagonal"])
def test_model(representation, fails):
    model = Counting()
    model.fc.weight.grad = torch.ones(3, 4)
    seen = []
    handle = model.fc.register_forward_hook(lambda *a: seen.append(1))
    x, y = torch.randn(6, 4), torch.randint(3, (6,))
    last = x * float("nan") if fails else x
    before, rng = snapshot(model), torch.get_rng_state()
    loader = [(x, y), (last, y)]
    if fails:
        with pytest.raises(ValueError, match="the forward pass failed"):
            ng.FIM(model, loader, representation)
    else:
        ng.FIM(model, loader, representation, params=["fc", "frozen"])
    same(before, snapshot(model))
    assert torch.equal(rng, torch.get_rng_state())
    assert torch.is_grad_enabled()
    assert torch.equal(x, loader[0][0])
    assert seen
    handle.remove()


def test_under_no_grad_and_inference_mode():
    net = zoo.mlp()
    x, y = net.batch, torch.randint(3, (6,))
    expected = ng.FIM(net.model, (x, y)).to_dense()
    with torch.no_grad():
        F = ng.FIM(net.model, (x, y))
        assert not torch.is_grad_enabled()
    assert torch.equal(F.to_dense(), expected)
    with torch.inference_mode():
        F = ng.FIM(net.model, (x, y))
        assert torch.is_inference_mode_enabled()
    assert torch.equal(F.to_dense(), expected)


def test_operators_are_values():
    net = zoo.mlp()
    F = ng.FIM(net.model, (net.batch, torch.randint(3, (6,))))
    before = F.to_dense().clone()
    with torch.no_grad():
        for p in net.model.parameters():
            p.add_(1.0)
    assert torch.equal(F.to_dense(), before)
    assert not any(t.requires_grad for t in F.representation())


# --- models that a swap of their tensors would break ----------------------------------------------

X, Y = torch.randn(8, 4, dtype=torch.float64), torch.arange(8) % 3
BUILDS = {
    "implicit": lambda m, **o: ng.FIM(m, (X, Y), "implicit", **o).to_dense(),
    "dense": lambda m, **o: ng.FIM(m, (X, Y), "dense", **o).to_dense(),
    "kfac": lambda m, **o: ng.FIM(m, (X, Y), "kfac", **o).to_dense(),
    "Hessian": lambda m, **o: ng.Hessian(m, (X, Y), loss="categorical", **o).to_dense(),
    "diagonal": lambda m, **o: ng.FIM(m, (X, Y), "implicit", **o).diagonal(),
}


def small():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def twice():
    return nn.Sequential(nn.Linear(4, 4), *[nn.Linear(4, 4)] * 2, nn.Linear(4, 3)).double()


def pruned():
    model = small()
    prune.l1_unstructured(model[0], "weight", 0.5)
    return model


class Leaving(nn.Module):
    """Leaves traces of a forward pass in its attributes."""

    def __init__(self):
        super().__init__()
        self.net = small()
        self.also = [self.net]  # the same modules, where torch does not look
        self.seen, self.calls, self.last = [], 0, None
        self.hidden = self.net[0].forward  # a bound method

    def forward(self, x):
        self.calls += 1
        self.last = self.hidden(x)
        self.seen.append(self.last)
        return self.also[0][2](self.also[0][1](self.last))


@pytest.mark.parametrize("name", BUILDS)
@pytest.mark.parametrize("make", [twice, pruned, Leaving], ids=lambda f: f.__name__)
def test_attributes_are_as_they_were(make, name):
    model = make()
    before = snapshot(model)
    kept = {k: dict(m.__dict__) for k, m in model.named_modules()}
    BUILDS[name](model)
    same(before, snapshot(model))
    for k, module in model.named_modules():
        assert module.__dict__.keys() == kept[k].keys()
        assert all(module.__dict__[key] is value for key, value in kept[k].items()), k
    if make is Leaving:
        assert model.seen == []
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    first = model(X).detach()
    nn.functional.cross_entropy(model(X), Y).backward()
    optimizer.step()
    assert not torch.allclose(model(X), first)  # training still works


@pytest.mark.parametrize("make", [twice, pruned, Leaving], ids=lambda f: f.__name__)
def test_their_matrices_are_right(make):
    model = make()
    expected = BUILDS["dense"](model)
    assert torch.allclose(BUILDS["implicit"](model), expected)
    params = list(model.parameters())
    total = torch.zeros_like(expected)
    for x in X:
        f = model(x[None])[0]
        rows = [
            torch.cat([g.flatten() for g in torch.autograd.grad(c, params, retain_graph=True)])
            for c in f
        ]
        p, J = f.detach().softmax(0), torch.stack(rows)
        total += J.mT @ (p.diag() - p.outer(p)) @ J / len(X)
    assert torch.allclose(expected, total)


def test_a_forward_that_knows_the_model():
    model = small()
    expected = BUILDS["dense"](model)
    for forward in (lambda m, b: model(b[0]), lambda m, b: model[2](model[1](m[0](b[0])))):
        for name in ("implicit", "dense"):
            assert torch.allclose(BUILDS[name](model, forward=forward), expected)
    box = {"model": model}
    for name in ("implicit", "dense"):
        with pytest.raises(ng.errors.DataError, match="lambda model, batch: model"):
            BUILDS[name](model, forward=lambda m, b: box["model"][2](m[1](m[0](b[0]))))


def flags():
    cuda = torch.backends.cuda
    return (
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
        torch.backends.mha.get_fastpath_enabled(),
    )


@pytest.mark.parametrize("shared", [True, False])
def test_threads(shared):
    models = [small()] * 2 if shared else [small(), small()]
    expected = [BUILDS["dense"](m) for m in models]
    before, wrong = flags(), []

    def work(k):
        for name in ("dense", "implicit") * 5:
            try:
                made = BUILDS[name](models[k])
                if not torch.allclose(made, expected[k]):
                    wrong.append(name)
            except Exception as error:  # noqa: BLE001 - reported by the test
                wrong.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert flags() == before


@pytest.mark.parametrize("name", ["dense", "implicit"])
def test_interrupts_at_random_lines(name):
    model = small()
    before, set_before = snapshot(model), flags()
    checkpoint = vars(torch.utils.checkpoint).copy()
    lines = damage.lines_of(lambda: BUILDS[name](model))
    draw = random.Random(0)
    for _ in range(15):
        damage.lines_of(lambda: BUILDS[name](model), stop=draw.randrange(lines))
        same(before, snapshot(model))
        assert flags() == set_before
        assert not torch.overrides._get_current_function_mode_stack()
        assert torch._C._functorch.get_dynamic_layer_stack_depth() == 0
        assert torch.is_grad_enabled()
    assert vars(torch.utils.checkpoint) == checkpoint


@pytest.mark.parametrize("name", interrupts.Jobs.NAMES)
def test_interrupts_in_the_middle(name):
    """What was computed comes back and is right, or nothing does; a script runs thousands."""
    seen = interrupts.interrupted(6, [name])
    assert set(seen) <= {"result", "KeyboardInterrupt"}, seen
    assert sum(seen.values()) == 6


def test_interrupted_training_goes_on():
    seen = interrupts.optimizers(6)
    assert set(seen) <= {"result", "KeyboardInterrupt"}, seen


@pytest.mark.parametrize("shared", [True, False])
def test_results_of_two_threads(shared):
    assert threads.results(16, shared) == {"right": 16}


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.inner = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Tanh())
        self.last = nn.Linear(6, 3)
        self.reentrant = reentrant

    def forward(self, x):
        hidden = self.first(x).tanh()
        if self.reentrant is None:
            return self.last(self.inner(hidden))
        again = torch.utils.checkpoint.checkpoint
        return self.last(again(self.inner, hidden, use_reentrant=self.reentrant))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers(reentrant):
    plain, model = Checkpointed(None).double(), Checkpointed(reentrant).double()
    model.load_state_dict(plain.state_dict())
    for name in ("implicit", "Hessian"):
        assert torch.allclose(BUILDS[name](model), BUILDS[name](plain))
    F, G = (ng.FIM(m, (X, Y), Implicit(cache=False)) for m in (model, plain))
    w = F.space.values(plain).detach() + 0.3
    v = torch.ones(len(w), dtype=w.dtype)
    assert torch.allclose(F.at(w) @ v, G.at(w) @ v)
    expected = G @ v
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3)
    assert torch.allclose(F @ v, expected)  # of the model as it was
