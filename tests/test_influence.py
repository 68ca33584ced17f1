"""Influences that stream, against gradients of single examples by autograd."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F_

import nngeo_lazy as ng
from nngeo_lazy.errors import DataError, UnsupportedLayerError
from nngeo_lazy.likelihoods import Categorical

from cases import close

V, T = 11, 6


class LM(nn.Module):
    """A transformer's layer: indices, positions, a fused projection, norms, a head."""

    def __init__(self, d=8, tied=False):
        super().__init__()
        self.embed = nn.Embedding(V, d)
        self.mix = nn.Linear(d, 3 * d)
        self.out = nn.Linear(d, d)
        self.norm = nn.LayerNorm(d)
        self.mlp = nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))
        self.head = nn.Linear(d, V, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids):
        h = self.embed(ids)
        q, k, v = self.mix(self.norm(h)).chunk(3, -1)
        h = h + self.out(F_.scaled_dot_product_attention(q, k, v, is_causal=True))
        return self.head(h + self.mlp(h))


LOSS = Categorical(class_dim=-1, shift=1)


def language(n=14, tied=False):
    torch.manual_seed(0)
    model = LM(tied=tied).double()
    ids = torch.randint(V, (n, T))
    labels = ids.clone()
    labels[:, -1:][::3] = -100  # ignored, as padding is
    return model, ids, labels


def of_loss(model, ids, labels):
    return F_.cross_entropy(
        model(ids)[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
    )


def rows(model, numbers, params=None):
    """Gradients (N, P) by a loop."""
    params = list(model.parameters()) if params is None else params
    found = [torch.autograd.grad(each, params, retain_graph=True) for each in numbers]
    return torch.stack([torch.cat([g.flatten() for g in grads]) for grads in found])


def gradients(model, ids, labels, params=None):
    losses = [of_loss(model, ids[i : i + 1], labels[i : i + 1]) for i in range(len(ids))]
    return rows(model, losses, params)


def in_batches(*tensors, size=5):
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*tensors), size)


def expected(F, model, train, test, damping=0.1):
    """G_test (F + d)^-1 G_train^T / N, dense."""
    damped = F.to_dense() + damping * torch.eye(len(F.space)).double()
    return test @ torch.linalg.solve(damped, train.mT) / F.num_examples


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("representation", ["kfac", "ekfac", "diagonal", "dense", "low_rank"])
def test_a_language_model(representation, tied):
    model, ids, labels = language(tied=tied)
    loader = in_batches(ids, labels)
    F = ng.FIM(model, loader, representation, likelihood=LOSS, estimator="mc", seed=0)
    G = gradients(model, ids, labels)
    found = ng.influences(model, F, loader, (ids[:3], labels[:3]), damping=0.1)
    close(found, expected(F, model, G, G[:3]), 1e-8)
    own = ng.self_influence(model, F, loader, damping=0.1)
    close(own, expected(F, model, G, G).diagonal(), 1e-8)
    layers = ng.influences(model, F, loader, (ids[:3], labels[:3]), damping=0.1, per="layer")
    assert list(layers) == list(dict.fromkeys(F.space.owner(n) for n in F.space.names))
    close(sum(layers.values()), found, 1e-10)
    close(layers["mlp.0"], _of_layer(F, G, "mlp.0"), 1e-8) if "low" not in representation else None


def _of_layer(F, G, name):
    """That layer's part of the preconditioned query, of a matrix of any kind."""
    damped = F.to_dense() + 0.1 * torch.eye(len(F.space)).double()
    queries = torch.linalg.solve(damped, G[:3].mT)
    inside = [F.space.slices[n] for n in F.space.names if F.space.owner(n) == name]
    return sum(queries[s].mT @ G[:, s].mT for s in inside) / F.num_examples


@pytest.mark.parametrize("make", ["lora", "adapters"])
def test_some_parameters_alone(make):
    model, ids, labels = language()
    params = "mlp.0" if make == "adapters" else ["mix", "out"]
    names = [n for n, _ in model.named_parameters() if n.split(".")[0] in ("mix", "out")]
    names = ["mlp.0.weight", "mlp.0.bias"] if make == "adapters" else names
    F = ng.FIM(model, (ids, labels), "ekfac", likelihood=LOSS, estimator="mc", params=params)
    chosen = [dict(model.named_parameters())[n] for n in names]
    G = gradients(model, ids, labels, chosen)
    found = ng.influences(model, F, (ids, labels), (ids[:2], labels[:2]), damping=0.1)
    close(found, expected(F, model, G, G[:2]), 1e-8)


def test_scores_of_tokens_add_up():
    model, ids, labels = language()
    F = ng.FIM(model, (ids, labels), "kfac", likelihood=LOSS, estimator="mc", params=nn.Linear)
    test = ids[:3], labels[:3]
    by_token = ng.influences(model, F, in_batches(ids, labels), test, damping=0.1, per="token")
    assert by_token.shape == (3, 14, T)
    close(by_token.sum(2), ng.influences(model, F, (ids, labels), test, damping=0.1), 1e-10)
    # of one layer: g^T V x at each position, by autograd at the layer's output
    F = ng.FIM(model, (ids, labels), "kfac", likelihood=LOSS, estimator="mc", params="mlp.2")
    by_token = ng.influences(model, F, (ids, labels), test, damping=0.1, per="token")
    held = {}
    model.mlp[2].register_forward_hook(lambda _, args, out: held.update(x=args[0], out=out))
    loss = of_loss(model, ids, labels)
    (g,) = torch.autograd.grad(loss, held["out"])
    x = held["x"].detach()
    chosen = list(model.mlp[2].parameters())
    queries = F.solve(gradients(model, *test, chosen).mT, damping=0.1).mT / 14
    weight, bias = queries[:, : 8 * 16].view(3, 8, 16), queries[:, 8 * 16 :]
    want = torch.einsum("nto,qoi,nti->qnt", g, weight, x)
    close(by_token, want + torch.einsum("nto,qo->qnt", g, bias), 1e-8)


def test_batches_of_other_lengths_are_padded_with_zeros():
    model, ids, labels = language()
    batches = [(ids[:5], labels[:5]), (ids[5:9, :4], labels[5:9, :4])]
    F = ng.FIM(model, (ids, labels), "kfac", likelihood=LOSS, estimator="mc", params=nn.Linear)
    test = ids[:3], labels[:3]
    found = ng.influences(model, F, batches, test, damping=0.1, per="token")
    assert found.shape == (3, 9, T)
    assert float(found[:, 5:, 4:].abs().max()) == 0
    close(found.sum(2), ng.influences(model, F, batches, test, damping=0.1), 1e-10)


def test_layers_without_tokens_are_named():
    model, ids, labels = language()
    F = ng.FIM(model, (ids, labels), "kfac", likelihood=LOSS, estimator="mc", seed=0)
    with pytest.raises(UnsupportedLayerError, match=r"norm.weight.*params=torch.nn.Linear"):
        ng.influences(model, F, (ids, labels), (ids, labels), damping=0.1, per="token")


# --- queries --------------------------------------------------------------------------------------


def test_a_measure_of_ones_own():
    model, ids, labels = language()
    F = ng.FIM(model, (ids, labels), "ekfac", likelihood=LOSS, estimator="mc", seed=0)

    def margin(outputs, batch):
        logits = outputs[:, -1]
        return logits.gather(1, batch[1][:, -1:]).squeeze(1) - logits.logsumexp(1)

    test = ids[:3], labels[:3].clamp_min(0)
    found = ng.influences(model, F, (ids, labels), test, measure=margin, damping=0.1)
    numbers = [margin(model(ids[i : i + 1]), [None, test[1][i : i + 1]])[0] for i in range(3)]
    G = gradients(model, ids, labels)
    close(found, expected(F, model, G, rows(model, numbers)), 1e-8)
    two = ng.Queries(
        model, F, ids[:3], measure=lambda outputs, batch: outputs[:, 0, :2], damping=0.1
    )
    assert two.num_queries == 6
    numbers = [model(ids[i : i + 1])[0, 0, k] for i in range(3) for k in range(2)]
    found = ng.influences(model, F, (ids, labels), two)
    close(found, expected(F, model, G, rows(model, numbers)), 1e-8)
    with pytest.raises(DataError, match="a number for each of 3 examples"):
        ng.Queries(model, F, ids[:3], measure=lambda outputs, batch: outputs.sum(), damping=0.1)


@pytest.mark.parametrize("rank", [1, 3, 100])
def test_queries_of_low_rank_say_their_error(rank):
    model, ids, labels = language()
    loader = in_batches(ids, labels)
    F = ng.FIM(model, loader, "ekfac", likelihood=LOSS, estimator="mc", seed=0)
    test = in_batches(ids[:5], labels[:5], size=2)
    queries = ng.Queries(model, F, test, damping=0.1, rank=rank)
    inverse = torch.linalg.inv(F.to_dense() + 0.1 * torch.eye(len(F.space)).double())
    whole = gradients(model, ids[:5], labels[:5]) @ inverse
    kept = whole.clone()
    at = F.space.slices
    names = [n for n in F.space.names if n.endswith("weight") and "norm" not in n]
    for name in names:
        bias = name.replace("weight", "bias")
        shape = dict(model.named_parameters())[name].shape
        grid = whole[:, at[name]].view(5, *shape)
        if bias in at:
            grid = torch.cat([grid, whole[:, at[bias]].unsqueeze(2)], 2)
        U, S, Vh = torch.linalg.svd(grid, full_matrices=False)
        grid = (U[..., :rank] * S[:, None, :rank]) @ Vh[:, :rank]
        kept[:, at[name]] = grid[..., : shape[1]].flatten(1)
        if bias in at:
            kept[:, at[bias]] = grid[..., -1]
    found = ng.influences(model, F, loader, queries)
    close(found, kept @ gradients(model, ids, labels).mT / 14, 1e-8)
    error = float((kept - whole).norm() / whole.norm())
    assert abs(queries.error - error) < 1e-8
    assert "5 queries of" in repr(queries)
    assert {row.layer for row in queries.report()} >= {"embed", "mix", "norm", "head"}


def test_the_loss_is_that_of_the_matrix():
    model, ids, labels = language()
    F = ng.FIM(model, (ids, labels), "kfac", likelihood=LOSS, estimator="mc", seed=0)
    data = ids, labels
    one = ng.influences(model, F, data, data, damping=0.1)
    assert torch.equal(one, ng.influences(model, F, data, data, loss=LOSS, damping=0.1))
    G = ng.GGN(model, data, "kfac", loss=lambda f, y: f.square().sum((1, 2)))
    with pytest.raises(DataError, match="expected loss="):
        ng.influences(model, G, data, data, damping=0.1)


# --- many examples --------------------------------------------------------------------------------


def test_the_largest_without_the_whole():
    model, ids, labels = language()
    loader = in_batches(ids, labels, size=4)
    F = ng.FIM(model, loader, "kfac", likelihood=LOSS, estimator="mc", seed=0)
    test = ids[:3], labels[:3]
    found = ng.influences(model, F, loader, test, damping=0.1, top=5)
    want = ng.influences(model, F, loader, test, damping=0.1).topk(5, 1)
    assert torch.equal(found.indices, want.indices)
    close(found.values, want.values, 1e-12)
    everything = ng.influences(model, F, loader, test, damping=0.1, top=50)
    assert everything.indices.shape == (3, 14)


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("options", [{}, {"per": "layer"}, {"top": 4}, {"self": True}])
def test_an_interrupted_run_goes_on(tmp_path, options):
    model, ids, labels = language()
    loader = in_batches(ids, labels, size=3)
    F = ng.FIM(model, loader, "kfac", likelihood=LOSS, estimator="mc", seed=0)
    options = dict(options)
    passes = []

    def forward(model, batch):
        passes.append(len(batch[0]))
        if interrupt and len(passes) > 6:
            raise StoppedError
        return model(batch[0])

    def run(**more):
        if options.get("self"):
            return ng.self_influence(model, F, loader, damping=0.1, **more)
        queries = ng.Queries(model, F, (ids[:2], labels[:2]), damping=0.1)
        return ng.influences(model, F, loader, queries, **options, **more)

    interrupt = False
    want = run()
    interrupt = True
    with pytest.raises(StoppedError):
        run(path=tmp_path, forward=forward)
    kept = len(list(tmp_path.glob("*.pt")))
    assert 0 < kept < 5
    interrupt = False
    passes.clear()
    found = run(path=tmp_path, forward=forward)
    fresh = sum(passes)
    passes.clear()
    assert len(list(tmp_path.glob("*.pt"))) == 5
    again = run(path=tmp_path, forward=forward)  # nothing is left to do
    assert not passes
    assert fresh < 14 * 3
    for each in (found, again):
        if isinstance(want, dict):
            assert all(torch.equal(each[name], want[name]) for name in want)
        elif options.get("top"):
            assert torch.equal(each.indices, want.indices)
        else:
            close(each, want, 1e-12)


def test_other_runs_and_data_in_a_folder_are_named(tmp_path):
    model, ids, labels = language()
    F = ng.FIM(model, (ids, labels), "kfac", likelihood=LOSS, estimator="mc", seed=0)
    data, test = in_batches(ids, labels), (ids[:2], labels[:2])
    ng.influences(model, F, data, test, damping=0.1, path=tmp_path)
    with pytest.raises(DataError, match=r"\['queries'\] differ: pass another path"):
        ng.influences(model, F, data, test, damping=0.2, path=tmp_path)
    other = in_batches(ids.flip(0), labels.flip(0))
    with pytest.raises(DataError, match="batch 0 to be the one whose scores are in"):
        ng.influences(model, F, other, test, damping=0.1, path=tmp_path)
    ng.influences(model, F, other, test, damping=0.2, path=tmp_path / "other")


def test_a_disk_that_fills_loses_nothing(tmp_path, monkeypatch):
    model, ids, labels = language()
    F = ng.FIM(model, (ids, labels), "kfac", likelihood=LOSS, estimator="mc", seed=0)
    data, test = in_batches(ids, labels), (ids[:2], labels[:2])
    save, count = torch.save, []

    def full(*args):
        count.append(1)
        if len(count) > 1:
            raise OSError(28, "No space left on device")
        save(*args)

    monkeypatch.setattr("nngeo_lazy.influence.streams.torch.save", full)
    with pytest.raises(DataError, match="make room and call again with the same path"):
        ng.influences(model, F, data, test, damping=0.1, path=tmp_path)
    assert [path.name for path in tmp_path.glob("*.pt")] == ["00000000.pt"]
    monkeypatch.setattr("nngeo_lazy.influence.streams.torch.save", save)
    found = ng.influences(model, F, data, test, damping=0.1, path=tmp_path)
    close(found, ng.influences(model, F, data, test, damping=0.1), 1e-12)


def test_options_that_do_not_go_together():
    model, ids, labels = language()
    F = ng.FIM(model, (ids, labels), "kfac", likelihood=LOSS, estimator="mc", seed=0)
    data = ids, labels
    with pytest.raises(ValueError, match="expected per to be one of"):
        ng.influences(model, F, data, data, damping=0.1, per="word")
    with pytest.raises(ValueError, match="whole examples, not per 'token'"):
        ng.influences(model, F, data, data, damping=0.1, per="token", top=3)
    with pytest.raises(ValueError, match="leave out per, top, path and measure"):
        ng.influences(model, F, data, data, damping=0.1, method="newton", top=3)
    shuffled = torch.utils.data.DataLoader(list(zip(ids, labels, strict=True)), 5, shuffle=True)
    with pytest.raises(DataError, match="shuffl"):
        ng.self_influence(model, F, shuffled, damping=0.1)


def test_convolutions():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(100, 3)
    ).double()
    x, y = torch.randn(9, 2, 5, 5).double(), torch.randint(3, (9,))
    F = ng.FIM(model, (x, y), "ekfac")
    losses = F_.cross_entropy(model(x), y, reduction="none")
    G = rows(model, losses)
    queries = ng.Queries(model, F, (x[:3], y[:3]), damping=0.1, rank=3)
    close(ng.influences(model, F, (x, y), (x[:3], y[:3]), damping=0.1), expected(F, 0, G, G[:3]))
    close(ng.self_influence(model, F, (x, y), damping=0.1), expected(F, 0, G, G).diagonal(), 1e-8)
    found = ng.influences(model, F, (x, y), queries)
    assert float((found - expected(F, 0, G, G[:3])).norm()) < 0.5 * float(found.norm())
