"""Networks that return several outputs, with a likelihood each, against torch.func."""

import pytest
import torch
from torch import nn

import nngeo_lazy as ng
from nngeo_lazy.errors import DataError
from nngeo_lazy.likelihoods import Categorical, Gaussian, Joint, Weighted, described

from cases import close

GIVEN = {"class": "categorical", "size": Gaussian(0.5)}
N = 9


class Heads(nn.Module):
    """Two heads on one body, one of which scores three positions; returns a dict or a tuple."""

    def __init__(self, kind=dict):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(4, 5), nn.Tanh())
        self.first, self.second = nn.Linear(5, 3), nn.Linear(5, 2)
        self.kind = kind
        self.double()

    def forward(self, x):
        h = self.body(x)
        found = self.first(h), self.second(h.unsqueeze(1) * torch.arange(1.0, 4.0)[:, None].to(h))
        return found if self.kind is tuple else dict(zip(GIVEN, found, strict=True))


def data():
    torch.manual_seed(1)
    x = torch.randn(N, 4).double()
    return x, torch.randint(3, (N,)), torch.randn(N, 3, 2).double()


def rows(model, x):
    """Jacobians (N, C, P) of both heads."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def outputs(parameters, one):
        found = torch.func.functional_call(model, parameters, (one[None],))
        return found["class"][0], found["size"][0].flatten()

    made = [torch.func.jacrev(outputs)(parameters, one) for one in x]
    return [
        torch.stack([torch.cat([m[k][n].flatten(1) for n in parameters], 1) for m in made])
        for k in range(2)
    ]


def expected(model, x, y, z, estimator):
    J, K = rows(model, x)
    found = model(x)
    p = found["class"].softmax(1).detach()
    if estimator == "empirical":  # the score of both labels of an example
        g = p - nn.functional.one_hot(y, 3)
        r = (found["size"].detach() - z).flatten(1) / 0.5
        rows_ = torch.einsum("nc,ncp->np", g, J) + torch.einsum("nc,ncp->np", r, K)
        return rows_.mT @ rows_ / N
    middle = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    both = torch.einsum("nip,nij,njq->pq", J, middle, J) + torch.einsum("nip,niq->pq", K, K) / 0.5
    return both / N


@pytest.mark.parametrize("kind", [dict, tuple])
@pytest.mark.parametrize("estimator", ["exact", "mc", "empirical"])
def test_the_fisher_of_two_heads_is_that_of_both_labels(kind, estimator):
    model, (x, y, z) = Heads(kind), data()
    want = expected(Heads(), x, y, z, estimator)
    given = GIVEN if kind is dict else tuple(GIVEN.values())
    options = {"likelihood": given, "estimator": estimator, "seed": 0}
    if estimator == "mc":
        options["samples"] = 2000
    tolerance = 0.1 if estimator == "mc" else 1e-9
    target = {"class": y, "size": z} if kind is dict else (y, z)
    for batch in ((x, y, z), (x, target)):
        F = ng.FIM(model, batch, "dense", **options)
        close(F.to_dense(), want, tolerance)
    assert (F.num_examples, F.num_terms) == (N, N + 6 * N)
    v = F.space.randn()
    for representation in ("implicit", "factored", "low_rank"):
        if estimator == "mc":
            options["samples"] = 20
        F = ng.FIM(model, [(x[:4], y[:4], z[:4]), (x[4:], y[4:], z[4:])], representation, **options)
        G = ng.FIM(model, [(x[:4], y[:4], z[:4]), (x[4:], y[4:], z[4:])], "dense", **options)
        close(F @ v, G.to_dense() @ v, 1e-7)
    F = ng.FIM(model, (x, y, z), "diagonal", **options)
    G = ng.FIM(model, (x, y, z), "dense", **options)
    close(F.diagonal(), G.to_dense().diagonal(), 1e-9)
    for representation in ("ekfac", "quasi_diagonal", "block_diagonal"):
        F = ng.FIM(model, (x, y, z), representation, **options)
        close(F.trace(), G.trace(), 1e-9)
    F = ng.FIM(model, (x, y, z), "kfac", **options)
    assert F.solve(v, damping=1e-3).shape == v.shape


def test_losses_of_two_heads():
    model, (x, y, z) = Heads(), data()
    G = ng.GGN(model, (x, y, z), "dense", loss=GIVEN)
    close(G.to_dense(), expected(model, x, y, z, "exact"), 1e-9)
    found = model(x)
    loss = nn.functional.cross_entropy(found["class"], y, reduction="sum")
    loss = loss + (found["size"] - z).square().sum()
    grads = torch.autograd.grad(loss / N, list(model.parameters()), create_graph=True)
    flat = torch.cat([g.flatten() for g in grads])
    want = torch.stack(
        [
            torch.cat(
                [
                    g.flatten()
                    for g in torch.autograd.grad(one, list(model.parameters()), retain_graph=True)
                ]
            )
            for one in flat
        ]
    )
    H = ng.Hessian(model, (x, y, z), "dense", loss=GIVEN)
    close(H.to_dense(), want, 1e-9)
    J = ng.Jacobian(model, (x, y, z), "dense", loss=GIVEN)
    close(J.to_dense().mean(0), flat.detach(), 1e-9)
    F = ng.FIM(model, (x, y, z), "kfac", likelihood=GIVEN)
    scores = ng.influences(model, F, (x, y, z), (x[:2], y[:2], z[:2]), damping=0.1)
    rows_ = J.to_dense()
    inverse = torch.linalg.inv(F.to_dense() + 0.1 * torch.eye(len(flat)).double())
    assert scores.shape == (2, N)
    close(scores.abs(), (rows_[:2] @ inverse @ rows_.mT / N).abs(), 1e-7)


class Joined(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.own = model

    def forward(self, x):
        return torch.cat([head.flatten(1) for head in self.own(x).values()], 1)


def test_influences_by_newton_steps_are_those_of_one_joined_output():
    model, (x, y, z) = Heads(), data()

    def loss(f, target):
        entropy = nn.functional.cross_entropy(f[:, :3], target[:, 0].long(), reduction="none")
        return entropy + (f[:, 3:] - target[:, 1:]).square().sum(1)

    joined, target = Joined(model), torch.cat([y[:, None], z.flatten(1)], 1)
    F = ng.FIM(model, (x, y, z), "dense", likelihood=GIVEN)
    G = ng.GGN(joined, (x, target), "dense", loss=loss)
    close(F.to_dense(), G.to_dense(), 1e-9)
    options = {"damping": 0.1, "method": "newton"}
    found = ng.influences(model, F, (x, y, z), (x[:2], y[:2], z[:2]), **options)
    want = ng.influences(joined, G, (x, target), (x[:2], target[:2]), loss=loss, **options)
    close(found, want, 1e-8)


def test_weights_of_one_head():
    model, (x, y, z) = Heads(), data()
    w = torch.tensor([1.0, 0, 1, 0, 1, 0, 1, 0, 1]).double()
    given = {"class": "categorical", "size": Weighted(Gaussian(0.5), nan="mask")}
    batch = (x, {"class": y, "size": (z, w)})
    F = ng.FIM(model, batch, "dense", likelihood=given)
    K = rows(model, x)[1]
    want = expected(model, x, y, z, "exact") - torch.einsum("n,nip,niq->pq", 1 - w, K, K) / 0.5 / N
    close(F.to_dense(), want, 1e-9)
    z = z.masked_fill(w[:, None, None] == 0, float("nan"))
    G = ng.FIM(model, (x, {"class": y, "size": z}), "dense", likelihood=given)
    close(G.to_dense(), want, 1e-9)
    with pytest.raises(DataError, match="some are NaN"):
        ng.FIM(model, (x, y, z), "dense", likelihood=GIVEN)


def test_what_prints_is_read_again_and_saved(tmp_path):
    both = Joint({"class": Categorical(), "size": Weighted(Gaussian(0.5), nan="mask")})
    assert repr(described(repr(both))) == repr(both)
    pair = Joint((Categorical(), Gaussian()))
    assert repr(described(repr(pair))) == repr(pair)
    loss = Joint({"a": Categorical(), "b": ng.likelihoods.CallableLoss(lambda f, y: f.sum(1))})
    assert described(repr(loss)) is None
    model, (x, y, z) = Heads(), data()
    F = ng.FIM(model, (x, y, z), "kfac", likelihood=GIVEN)
    ng.save(F, tmp_path / "f.pt")
    close(ng.load(tmp_path / "f.pt").to_dense(), F.to_dense())
    halves = [
        ng.FIM(model, (x[s], y[s], z[s]), "kfac", likelihood=GIVEN) for s in (slice(4), slice(4, N))
    ]
    close(ng.merge(halves).to_dense(), F.to_dense(), 1e-9)


def test_optimizers_take_the_same_object():
    model, (x, y, z) = Heads(), data()
    joint = Joint({"class": Categorical(), "size": Gaussian(0.5)})
    optimizer = ng.optim.NaturalGradient(model, "dense", joint, estimator="exact", lr=0.0)
    found = model(x)
    loss = nn.functional.cross_entropy(found["class"], y, reduction="sum")
    ((loss + (found["size"] - z).square().sum()) / N).backward()
    optimizer.step()
    close(optimizer.operator.to_dense(), expected(model, x, y, z, "exact"), 1e-9)


def test_bad_heads_are_named():
    model, (x, y, z) = Heads(), data()
    with pytest.raises(DataError, match="has none for 'other'"):
        ng.FIM(model, (x, y, z), likelihood={"class": "categorical", "other": "gaussian"})
    with pytest.raises(DataError, match=r"got 'normal' for 'size': pass an object"):
        ng.FIM(model, (x, y, z), likelihood={"class": "categorical", "size": "normal"})
    with pytest.raises(DataError, match=r"target for each of the heads \['class', 'size'\]"):
        ng.FIM(model, (x, y), likelihood=GIVEN)
    with pytest.raises(DataError, match=r"head 'size': expected a target shaped like the outputs"):
        ng.FIM(model, (x, y, y), likelihood=GIVEN, estimator="empirical")
    with pytest.raises(DataError, match="got none: name at least one"):
        ng.FIM(model, (x, y, z), likelihood={})
    with pytest.raises(DataError, match="the model's outputs to be a tensor"):
        ng.FIM(model, (x, y), likelihood="categorical")
    with pytest.raises(DataError, match="no positions in common: take estimator='empirical'"):
        ng.FIM(model, (x, y, z), likelihood=GIVEN, estimator="empirical_positions")
    with pytest.raises(DataError, match="each is weighted alone"):
        Weighted(Joint((Gaussian(), Gaussian())))
    both = Joint((Gaussian(), Gaussian()))
    both.outputs((torch.ones(2, 3), torch.ones(2, 1)))
    with pytest.raises(DataError, match="as many outputs together: pad them alike"):
        both.outputs((torch.ones(2, 1), torch.ones(2, 3)))
    with pytest.raises(DataError, match="outputs of heads, joined by outputs"):
        both.split(torch.ones(2, 9))
