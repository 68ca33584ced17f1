"""Models whose examples meet are refused by every matrix, in the first batch and in a later one."""

import pytest
import torch
from torch import nn

import nngeo_lazy as ng
from nngeo_lazy.errors import StochasticModelError
from nngeo_lazy.representations import Implicit

MEETINGS = {
    "the mean": lambda h: h - h.mean(0),
    "a small share of the mean": lambda h: h - 0.01 * h.mean(0),
    "the other way round": lambda h: h.flip(0),
    "one further": lambda h: h.roll(1, 0),
    "the last one": lambda h: h + 0.3 * h[-1:],
    "the first two": lambda h: torch.cat([h[1:2], h[:1], h[2:]]),
}


class Meeting(nn.Module):
    """Examples meet in the batches that have a loud number."""

    def __init__(self, how):
        super().__init__()
        self.a, self.b, self.how = nn.Linear(3, 4), nn.Linear(4, 2), how

    def forward(self, x):
        h = self.a(x).tanh()
        return self.b(self.how(h) if x.abs().amax() > 9 else h)


def batch(n, loud):
    x = torch.randn(n, 3)
    x[0, 0] = 10.0 if loud else 0.0
    return x, torch.randint(2, (n,))


def matrices(model, data):
    for representation in ("implicit", "dense", "diagonal", "factored"):
        for estimator in ("exact", "empirical"):
            yield lambda r=representation, e=estimator: ng.FIM(
                model, data, r, likelihood="categorical", estimator=e
            )
    yield lambda: ng.GGN(model, data, loss="categorical")
    yield lambda: ng.Hessian(model, data, loss="categorical")
    yield lambda: ng.Jacobian(model, data)
    yield lambda: ng.NTK(model, data, method="matrix-free")


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("n", [2, 3, 9, 20])
@pytest.mark.parametrize("how", MEETINGS)
def test_examples_that_meet(how, n):
    model = Meeting(MEETINGS[how])
    for data in ([batch(n, True)], [batch(n, False), batch(n, True)]):
        for build in matrices(model, data):
            with pytest.raises(StochasticModelError, match="treats each example on its own"):
                build()
    ng.FIM(model, [batch(n, False)], likelihood="categorical")


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("n", [2, 6, 7, 20])
@pytest.mark.parametrize("how", ["the other way round", "one further", "the last one"])
def test_examples_that_meet_behind_saturated_units(how, n):
    """Outputs that are nearly the same for all examples do not show it; their gradients do."""
    model = Meeting(MEETINGS[how])
    x, y = batch(n, False)
    with torch.no_grad():
        model.a.weight.copy_(torch.eye(4, 3) + 0.2)
    later = 6.0 + torch.rand(n, 3), y
    later[0][0, 0] = 10.0
    for data in ([later], [(x, y), later]):
        for build in matrices(model, data):
            with pytest.raises(StochasticModelError, match="treats each example on its own"):
                build()


@pytest.mark.usefixtures("float64")
def test_outputs_that_nearly_cancel_are_no_meeting():
    """Outputs that are all rounding differ when examples are alone, and their gradients do not."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    big = 1e7 * torch.randn(2)
    x, y = torch.randn(20, 3), torch.randint(2, (20,))

    def forward(model, batch):
        noise = 1e-9 * torch.sin(torch.arange(len(batch[0])) * 1e3).unsqueeze(1)
        return 1e-4 * (model(batch[0]) + big - big) + noise.detach()

    F = ng.FIM(model, (x, y), "dense", likelihood="gaussian", forward=forward)
    J = torch.func.jacrev(lambda w: 1e-4 * model_at(model, w, x))(flat(model)).flatten(0, 1)
    assert torch.allclose(F.to_dense(), J.mT @ J / 20, rtol=1e-6, atol=1e-18)


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def model_at(model, w, x):
    parts, start = {}, 0
    for name, p in model.named_parameters():
        parts[name] = w[start : start + p.numel()].view_as(p)
        start += p.numel()
    return torch.func.functional_call(model, parts, (x,))


@pytest.mark.usefixtures("float64")
def test_the_matrix_of_whole_batches():
    """`Implicit(check=False)`, which the message names, takes the outputs of a batch together."""
    model, (x, y) = Meeting(MEETINGS["the mean"]), batch(5, True)
    with pytest.raises(StochasticModelError, match=r"Implicit\(check=False\) takes each batch as"):
        ng.Hessian(model, (x, y), loss="categorical")
    H = ng.Hessian(model, (x, y), Implicit(check=False), loss="categorical")
    parameters = dict(model.named_parameters())

    def loss(vector):
        values = H.space.unravel(vector)
        return nn.functional.cross_entropy(torch.func.functional_call(model, values, (x,)), y)

    w = torch.cat([p.detach().flatten() for p in parameters.values()])
    want = torch.autograd.functional.hessian(loss, w)
    assert torch.allclose(H.to_dense(), want, atol=1e-12)


def test_rounding_is_no_meeting():
    """A float32 model that depends on the size of the batch in the fourth digit."""

    class Rounded(nn.Linear):
        def forward(self, x):
            return super().forward(x) * (1 + 4e-3 * (len(x) % 2))

    model, x = Rounded(3, 3), torch.randn(24, 3)
    ng.FIM(model, (x, torch.randint(3, (24,))), "implicit", likelihood="categorical")


class Rounded(nn.Module):
    """What is left of large numbers depends on how a batch is summed, in low precision alone."""

    def __init__(self, mixing=0.0):
        super().__init__()
        self.layer, self.mixing = nn.Linear(3, 2), mixing

    def forward(self, x):
        h = (x + 1e6) - 1e6 if len(x) % 2 else x
        return self.layer(h + self.mixing * x.mean())


def test_rounding_is_told_from_mixing_in_double_precision():
    """Outputs that are rounded otherwise in other batches, by a tenth: they agree in float64."""
    torch.manual_seed(0)
    model, x = Rounded(), torch.randn(4, 3)
    apart = (model(x)[:1] - model(x[:1])).norm() / model(x)[:1].norm()
    assert apart > 1e-3
    F = ng.FIM(model, [(x,)], "diagonal", likelihood="gaussian")
    want = torch.cat([x.square().mean(0).repeat(2), torch.ones(2)])
    torch.testing.assert_close(F.diagonal(), want, rtol=1e-4, atol=1e-4)
    optimizer = ng.optim.NaturalGradient(model, "kfac", "gaussian")
    model(x).square().mean().backward()
    optimizer.step()
    with pytest.raises(StochasticModelError, match="examples change when the"):
        ng.FIM(Rounded(0.3), [(x,)], "diagonal", likelihood="gaussian")
