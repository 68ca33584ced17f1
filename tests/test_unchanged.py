"""Nothing that the user owns is changed, whether a build succeeds or fails."""

import copy

import pytest
import torch
from torch import nn

import nngeo_lazy as ng

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
