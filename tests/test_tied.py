"""One Kronecker product for an embedding that is the head, too: against hand-made factors."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import nngeo_lazy as ng
from nngeo_lazy.errors import DataError
from nngeo_lazy.representations import EKFAC, KFAC, Mixed

import zoo
from cases import close

pytestmark = pytest.mark.usefixtures("float64")

V, D, T = 7, 4, 5


class Language(nn.Module):
    """Words to the logits of the next ones; the head may have a weight of its own."""

    def __init__(self, tied=True, cut=False):
        super().__init__()
        self.embed, self.mix = nn.Embedding(V, D), nn.Linear(D, D)
        self.head = nn.Linear(D, V)
        self.cut = cut
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        x = torch.tanh(self.mix(x.detach() if self.cut else x)).cumsum(1)
        return self.head(x)


@pytest.fixture
def words():
    torch.manual_seed(3)
    model = Language()
    return model, torch.randint(0, V - 1, (6, T)), torch.randint(0, V, (6, T))


def uses(model, ids, labels):
    """(left, right) of both uses in the layout (V, D), from plain autograd of each example."""
    head = [torch.zeros(V, V), torch.zeros(D, D)]
    words = [torch.zeros(V, V), torch.zeros(D, D)]
    for one, y in zip(ids, labels, strict=True):
        x = model.embed(one)
        h = torch.tanh(model.mix(x)).cumsum(0)
        logits = model.head(h)
        loss = F.cross_entropy(logits, y, reduction="sum")
        gx, gl = torch.autograd.grad(loss, [x, logits])
        hot = F.one_hot(one, V).to(x.dtype)
        head[0] += gl.mT @ gl / len(ids)
        head[1] += h.detach().mT @ h.detach() / (len(ids) * T)
        words[0] += hot.mT @ hot / (len(ids) * T)
        words[1] += gx.mT @ gx / len(ids)
    return head, words


def product(factors):
    """The Kronecker product with the partial traces of the sum."""
    total = sum(torch.kron(left, right) for left, right in factors).view(V, D, V, D)
    left = torch.einsum("aibi->ab", total)
    right = torch.einsum("aiaj->ij", total)
    return torch.kron(left, right) / left.trace()


def build(words, representation, **more):
    model, ids, labels = words
    options = {"likelihood": "categorical", "estimator": "empirical", **more}
    return ng.FIM(model, (ids, labels), representation, **options)


def test_both_uses_in_one_product(words):
    factors = uses(*words)
    K = build(words, KFAC(tied="kronecker"))
    close(K.block("embed.weight").to_dense(), product(factors))
    sums = sum(torch.kron(*pair).trace() for pair in factors)
    close(K.block("embed.weight").trace(), sums)
    (row,) = [row for row in K.report() if row.parameter == "embed.weight"]
    assert row.block == f"Kronecker ({V}x{V}) x ({D}x{D})"
    assert row.note == "one Kronecker product for uses in both layouts"


def test_the_exact_diagonal_is_the_default(words):
    F_, D_ = build(words, "kfac"), build(words, "diagonal")
    close(F_.block("embed.weight").diagonal(), D_.block("embed.weight").diagonal())
    (row,) = [row for row in F_.report() if row.parameter == "embed.weight"]
    assert row.block == f"diagonal {V * D}"
    assert row.note == "used in different layouts"


def test_a_use_alone_is_a_plain_kfac(words):
    """Without a gradient through the embedding, it is the block of the head."""
    _, ids, labels = words
    torch.manual_seed(3)
    tied = Language(cut=True)
    apart = Language(tied=False, cut=True)
    apart.load_state_dict(tied.state_dict())
    K = build((tied, ids, labels), KFAC(tied="kronecker"))
    alone = build((apart, ids, labels), KFAC(separate_bias=True), params=["mix", "head"])
    weight = alone.block("head").to_dense()[: V * D, : V * D]
    close(K.block("embed.weight").to_dense(), weight)


@pytest.mark.parametrize("estimator", ["exact", "mc", "empirical"])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_the_eigenbasis_has_the_exact_variances(words, estimator, sharing):
    options = {"estimator": estimator, "seed": 0 if estimator == "mc" else None}
    E = build(words, EKFAC(sharing, tied="kronecker"), **options)
    K = build(words, KFAC(sharing, tied="kronecker"), **options)
    exact = build(words, "block_diagonal", **options).block("embed.weight").to_dense()
    block = E.block("embed.weight")
    basis = torch.kron(*(f[0] for f in K.block("embed.weight").members[0].bases()))
    close(block.to_dense(), basis @ (basis.mT @ exact @ basis).diagonal().diag() @ basis.mT)
    again = build(words, EKFAC(basis=E), **options)
    close(again.to_dense(), E.to_dense())


def test_a_large_vocabulary_keeps_a_diagonal(words):
    (left, right), (words_left, words_right) = uses(*words)
    factors = [(left.diagonal().diag(), right), (words_left, words_right)]
    K = build(words, KFAC(tied="kronecker", max_factor=V - 1))
    close(K.block("embed.weight").to_dense(), product(factors))
    build(words, EKFAC(tied="kronecker", max_factor=V - 1)).solve(torch.ones(K.shape[0]), damping=1)


def test_foof_counts_inputs_alone(words):
    (_, right), (left, _) = uses(*words)
    K = build(words, KFAC(tied="kronecker", forward_only=True))
    factors = [(torch.eye(V), right), (left, torch.eye(D))]
    close(K.block("embed.weight").to_dense(), product(factors))


def test_padding_changes_nothing(words):
    model, ids, labels = words
    wide = F.pad(ids, (0, 3), value=V - 1), F.pad(labels, (0, 3), value=-100)
    K = build((model, *wide), KFAC(tied="kronecker"))
    close(K.to_dense(), build(words, KFAC(tied="kronecker")).to_dense())


def test_batches_of_which_some_use_the_head_alone():
    """A batch without the embedding adds nothing to its factors."""

    class Either(Language):
        def forward(self, batch):
            return super().forward(batch) if not batch.is_floating_point() else self.mix(batch)

    torch.manual_seed(3)
    model = Either()
    ids, x = torch.randint(0, V, (6, T)), torch.randn(2, T, D)
    options = {"likelihood": "gaussian"}
    K = ng.FIM(model, [[ids, ids], [x, x]], KFAC(tied="kronecker"), **options)
    alone = ng.FIM(model, ids, KFAC(tied="kronecker"), **options)
    close(8 * K.block("embed.weight").to_dense(), 6 * alone.block("embed.weight").to_dense())


def test_merging_is_refused_and_the_average_works(words):
    K = build(words, KFAC(tied="kronecker"))
    with pytest.raises(DataError, match=r"belong to a tied weight.*F\.lerp"):
        ng.merge([K, K])
    close(K.lerp(K, 0.5).to_dense(), K.to_dense())


def test_an_unknown_way_is_named():
    with pytest.raises(DataError, match=r"expected tied='diagonal' or 'kronecker', got 'both'"):
        KFAC(tied="both")


def test_the_plan_counts_both_uses(words):
    model, ids, labels = words
    for representation in (KFAC(tied="kronecker"), EKFAC(tied="kronecker")):
        plan = ng.plan(ng.FIM, model, (ids, labels), representation, likelihood="categorical")
        (row,) = [row for row in plan if row.parameter == "embed.weight"]
        assert "ronecker (7x7) x (4x4)" in row.block


def test_an_optimizer_takes_it():
    net = zoo.tied()
    optimizer = ng.optim.NaturalGradient(net.model, Mixed(KFAC(tied="kronecker")), "categorical")
    losses = []
    for _ in range(5):
        loss = F.cross_entropy(net.model(net.batch), torch.tensor([0, 1, 2, 3, 4]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    (row,) = optimizer.operator.report()
    assert row.block.startswith("eigen-Kronecker") or row.block.startswith("Kronecker")
    assert losses[-1] < losses[0]
