"""Experts that take their tokens in (expert, capacity) form, as Switch and GShard write it."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import nngeo_lazy as ng
from nngeo_lazy.errors import StochasticModelError

from cases import close

pytestmark = pytest.mark.usefixtures("float64")

N, T, M, H, E, C = 4, 3, 4, 5, 7, 3  # more experts than some batches choose


class Switch(nn.Module):
    """One-hot dispatch to (expert, capacity), a network for each expert, one-hot combination."""

    def __init__(self, product="einsum", bias=False, top=1, capacity=None):
        super().__init__()
        self.product, self.top, self.capacity = product, top, capacity
        self.first, self.gate = nn.Linear(M, M), nn.Linear(M, E, bias=False)
        self.up = nn.Parameter(torch.randn(E, M, H) / 2)
        self.down = nn.Parameter(torch.randn(E, H, M) / 2)
        self.bias = nn.Parameter(torch.randn(E, 1, H)) if bias else None
        self.out = nn.Linear(M, C)

    def route(self, tokens):
        """How much of each token (S) goes to each place (E, capacity)."""
        values, ids = self.gate(tokens).softmax(-1).topk(self.top, -1)  # (S,k)
        capacity = self.capacity or len(tokens) * self.top
        mask = F.one_hot(ids, E)  # (S,k,E)
        count = mask.flatten(0, 1).cumsum(0).view(mask.shape)
        kept = (mask * (count <= capacity)).double()
        places = F.one_hot((count - 1).clamp(0, capacity - 1), capacity).double()
        return torch.einsum("sk,ske,skec->sec", values, kept, places)

    def experts(self, x):  # (E,capacity,M)
        if self.product == "bmm":
            h = torch.bmm(x, self.up)
            h = h if self.bias is None else h + self.bias
            return torch.bmm(h.relu(), self.down)
        h = torch.einsum("ecm,emh->ech", x, self.up)
        h = h if self.bias is None else h + self.bias
        return torch.einsum("ech,ehm->ecm", h.relu(), self.down)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        tokens = x.flatten(0, 1)
        combine = self.route(tokens)
        y = self.experts(torch.einsum("sec,sm->ecm", (combine > 0).double(), tokens))
        return self.out(x + torch.einsum("sec,ecm->sm", combine, y).view_as(x))


class Modules(Switch):
    """The same with a module for each expert."""

    def __init__(self):
        super().__init__()
        del self.up, self.down
        self.networks = nn.ModuleList(nn.Linear(M, M) for _ in range(E))

    def experts(self, x):
        return torch.stack([network(x[k]) for k, network in enumerate(self.networks)])


def exact(model, x):
    """The Fisher information of independent unit Gaussians, by a loop over single examples."""
    parameters, rows = list(model.parameters()), []
    for one in x:
        for output in model(one.unsqueeze(0)).flatten():
            found = torch.autograd.grad(
                output, parameters, retain_graph=True, materialize_grads=True
            )
            rows.append(torch.cat([g.flatten() for g in found]))
    J = torch.stack(rows)
    return J.mT @ J / len(x)


def by_hand(model, x):
    """Both Kronecker factors of every expert's first matrix, from the tokens that chose it."""
    tokens = torch.tanh(model.first(x)).flatten(0, 1)
    chosen = model.gate(tokens).argmax(-1)
    value = model.gate(tokens).softmax(-1).amax(-1)
    factors = []
    for k in range(E):
        mine = tokens[chosen == k].detach()
        h = mine @ model.up[k]
        if model.bias is not None:
            h = h + model.bias[k]
        h = h.detach().requires_grad_()
        y = value[chosen == k].detach().unsqueeze(1) * (h.relu() @ model.down[k])
        outputs = model.out(y)  # a token reaches the outputs of its own position alone
        left = torch.zeros(H, H)
        for c in range(C):
            (g,) = torch.autograd.grad(outputs[:, c].sum(), h, retain_graph=True)
            left += g.mT @ g / len(x)
        factors.append((mine.mT @ mine / max(1, len(mine)), left))
    return factors


NETS = {
    "einsum": {},
    "bmm": {"product": "bmm"},
    "einsum, bias": {"bias": True},
    "bmm, bias": {"product": "bmm", "bias": True},
    "two experts a token": {"top": 2},
}


def make(**options):
    torch.manual_seed(0)
    return Switch(**options), torch.randn(N, T, M)


@pytest.mark.parametrize("name", NETS)
def test_every_form_is_exact(name):
    model, x = make(**NETS[name])
    want = exact(model, x)
    F_ = ng.FIM(model, x, "diagonal", likelihood="gaussian")
    close(F_.diagonal(), want.diagonal())
    close(ng.FIM(model, x, "dense", likelihood="gaussian").to_dense(), want)
    assert not any("general" in row.form for row in F_.report())


@pytest.mark.parametrize("product", ["einsum", "bmm"])
@pytest.mark.parametrize("bias", [False, True])
def test_each_expert_has_a_kronecker_block_of_its_tokens(product, bias):
    model, x = make(product=product, bias=bias)
    K = ng.FIM(model, x, "kfac", likelihood="gaussian")
    blocks = {layout.pieces[0].start: m for m, layout in zip(K.members, K.layouts, strict=True)}
    start, idle = K.space.slices["up"].start, 0
    for k, (inputs, outputs) in enumerate(by_hand(model, x)):
        block = blocks[start + k * M * H]
        close(block.left[0], outputs)
        close(block.right[0], inputs)
        idle += not bool(inputs.any())
    assert 0 < idle < E


def test_empty_places_of_a_module_are_no_tokens():
    """The input factor of an expert is a mean over its tokens, with the ones of its bias."""
    torch.manual_seed(0)
    model, x = Modules(), torch.randn(N, T, M)
    K = ng.FIM(model, x, "kfac", likelihood="gaussian")
    tokens = torch.tanh(model.first(x)).flatten(0, 1).detach()
    chosen = model.gate(tokens).argmax(-1)
    for k in range(E):
        mine = F.pad(tokens[chosen == k], (0, 1), value=1.0)
        right = K.block(f"networks.{k}").members[0].right[0]
        close(right, mine.mT @ mine / max(1, len(mine)))
    close(ng.FIM(model, x, "diagonal", likelihood="gaussian").trace(), exact(model, x).trace())


def test_batches_that_choose_other_experts():
    model, x = make()
    more = torch.cat([x, torch.randn(5, T, M), torch.randn(1, T, M)])
    batches = [(more[:4],), (more[4:9],), (more[9:],)]
    for representation in ("kfac", "diagonal"):
        whole = ng.FIM(model, more, representation, likelihood="gaussian")
        parts = ng.FIM(model, batches, representation, likelihood="gaussian")
        close(parts.to_dense(), whole.to_dense())
    close(whole.diagonal(), exact(model, more).diagonal())


def test_drawn_labels_and_an_eigenbasis():
    model, x = make()
    E_ = ng.FIM(model, x, "ekfac", likelihood="gaussian")
    close(E_.trace(), exact(model, x).trace())
    drawn = ng.FIM(model, x, "kfac", likelihood="gaussian", estimator="mc", seed=0)
    assert drawn.solve(torch.ones(drawn.shape[0]), damping=1e-2).isfinite().all()


def test_a_full_expert_mixes_examples():
    model, x = make(capacity=1)
    with pytest.raises(StochasticModelError, match="treats each example on its own"):
        ng.FIM(model, x, "kfac", likelihood="gaussian")


def test_an_optimizer_follows_the_experts():
    model, x = make()
    optimizer = ng.optim.NaturalGradient(model, "kfac", "gaussian")
    losses = []
    for _ in range(4):
        loss = model(x).square().sum((1, 2)).mean() / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
