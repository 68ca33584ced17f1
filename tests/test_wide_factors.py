"""Kronecker factors past a limit, in blocks or of low rank, against factors made by hand."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional

import nngeo_lazy as ng
from nngeo_lazy.errors import DataError
from nngeo_lazy.operators import EigenKroneckerLinearOperator, KroneckerLinearOperator
from nngeo_lazy.optim import NaturalGradient
from nngeo_lazy.representations import EKFAC, KFAC
from nngeo_lazy.testing import check_operator

import oracle
from cases import close

pytestmark = pytest.mark.usefixtures("float64")
LIMIT = 5
WAYS = ("split", "low_rank")


def problem(n=40, t=None):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(11, 7), nn.Tanh(), nn.Linear(7, 3))
    return model, torch.randn(n, 11) if t is None else torch.randn(n, t, 11)


def by_hand(model, x):
    """(G, A) of both layers under a Gaussian likelihood, from autograd."""
    inputs = [x, torch.tanh(model[0](x))]
    hidden = model[0](x).detach().requires_grad_()
    outputs = model[2](torch.tanh(hidden))
    n, c = len(x), outputs.shape[-1]
    t = outputs[0].numel() // c
    first = torch.zeros(7, 7)
    for k in range(outputs[0].numel()):
        (g,) = torch.autograd.grad(outputs.flatten(1)[:, k].sum(), hidden, retain_graph=True)
        first += g.reshape(-1, 7).mT @ g.reshape(-1, 7) / n
    factors = []
    for left, given in zip((first, t * torch.eye(3)), inputs, strict=True):
        rows = functional.pad(given.detach().reshape(n * t, -1), (0, 1), value=1.0)
        factors.append((left, rows.mT @ rows / (n * t)))
    return factors


def kept(factor, wide):
    """What is kept of a factor, by the definition."""
    n = len(factor)
    if n <= LIMIT:
        return factor
    if wide == "split":
        size = -(-n // -(-n // LIMIT))
        block = torch.arange(n) // size
        return factor * (block[:, None] == block)
    generator = torch.Generator().manual_seed(0)
    test = torch.linalg.qr(torch.randn(n, LIMIT, generator=generator)).Q
    sketch = factor @ test
    near = sketch @ torch.linalg.solve(test.mT @ sketch, sketch.mT)
    return near + (factor.trace() - near.trace()) / n * torch.eye(n)


@pytest.mark.parametrize("t", [None, 3])
@pytest.mark.parametrize("wide", WAYS)
def test_factors_are_those_made_by_hand(wide, t):
    model, x = problem(t=t)
    F = ng.FIM(model, x, KFAC(max_factor=LIMIT, wide=wide), likelihood="gaussian")
    expected = [
        torch.kron(kept(left, wide), kept(right, wide)) for left, right in by_hand(model, x)
    ]
    for member, block in zip(F.members, expected, strict=True):
        assert isinstance(member, KroneckerLinearOperator)
        close(member.to_dense(), block, 1e-9)
    check_operator(F.damped(0.1), F.to_dense() + 0.1 * torch.eye(F.shape[0]))


@pytest.mark.parametrize("wide", WAYS)
def test_a_spectrum_is_that_of_the_matrix(wide):
    model, x = problem()
    for rep in (KFAC, EKFAC):
        F = ng.FIM(model, x, rep(max_factor=LIMIT, wide=wide), likelihood="gaussian")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # singular: its smallest eigenvalues are rounding
            check_operator(F, F.to_dense(), rtol=1e-6)
        values, vectors = torch.linalg.eigh(F.to_dense())
        for p in (0.5, 2.0):
            powered = (vectors * values.clamp_min(0) ** p) @ vectors.mT
            close(F.power(p).to_dense(), powered, 1e-6)


@pytest.mark.parametrize("wide", WAYS)
def test_an_ekfac_is_the_best_diagonal_in_the_basis(wide):
    model, x = problem()
    E = ng.FIM(model, x, EKFAC(max_factor=LIMIT, wide=wide), likelihood="gaussian")
    labels = torch.zeros(len(x), 3)
    exact = oracle.fisher(model, lambda f, e: f(e), list(x.split(1)), "gaussian", "exact", labels)
    exact = exact * oracle.VARIANCE
    for (_, layout, member), (left, right) in zip(E.parts, by_hand(model, x), strict=True):
        assert isinstance(member, EigenKroneckerLinearOperator)
        Q = member.basis().to_dense()
        close(Q.mT @ Q, torch.eye(len(Q)))
        turned = Q.mT @ torch.kron(kept(left, wide), kept(right, wide)) @ Q
        close(turned, torch.diag(turned.diagonal()), 1e-7)  # it is KFAC's eigenbasis
        where = layout.positions()
        block = exact[where][:, where]
        close(member.to_dense(), Q @ torch.diag((Q.mT @ block @ Q).diagonal()) @ Q.mT, 1e-9)


def test_a_factor_whose_rank_fits_is_exact():
    model, x = nn.Linear(11, 3), torch.randn(3, 11)  # inputs of rank 3, sketched with 5 columns
    F = ng.FIM(model, x, KFAC(max_factor=LIMIT, wide="low_rank"), likelihood="gaussian")
    whole = ng.FIM(model, x, KFAC(), likelihood="gaussian")
    assert not F.members[0].right[0, 0, :, -1].any()  # no rest, and not its rounding
    close(F.to_dense(), whole.to_dense(), 1e-9)
    v = torch.ones(F.shape[0])
    close(F.solve(v, damping=0.1), whole.solve(v, damping=0.1), 1e-9)
    null = torch.linalg.matrix_rank(whole.to_dense())
    assert int((F.pinv() @ F).trace().round()) == int(null)


@pytest.mark.parametrize("wide", WAYS)
def test_pooling_is_one_pass(wide):
    model, x = problem()
    rep = KFAC(max_factor=LIMIT, wide=wide)
    parts = [ng.FIM(model, part, rep, likelihood="gaussian") for part in (x[:13], x[13:])]
    whole = ng.FIM(model, x, rep, likelihood="gaussian")
    close(ng.merge(parts).to_dense(), whole.to_dense())
    fresh = ng.FIM(model, x, EKFAC(basis=whole), likelihood="gaussian")
    once = ng.FIM(model, x, EKFAC(max_factor=LIMIT, wide=wide), likelihood="gaussian")
    close(fresh.to_dense(), once.to_dense())
    assert (
        ng.update_diag(fresh, model, x, likelihood="gaussian")
        .members[0]
        .same_basis(fresh.members[0])
    )


@pytest.mark.parametrize("wide", WAYS)
@pytest.mark.parametrize("kind", [KFAC, EKFAC])
def test_files_reports_and_plans(wide, kind, tmp_path):
    model, x = problem()
    rep = kind(max_factor=LIMIT, wide=wide)
    F = ng.FIM(model, x, rep, likelihood="gaussian")
    ng.save(F, tmp_path / "F.pt")
    assert torch.equal(ng.load(tmp_path / "F.pt").to_dense(), F.to_dense())
    name = {"split": "(7 in blocks of 4) x (12 in blocks of 4)"}
    name["low_rank"] = "(rank 5 of 7 + c I) x (rank 5 of 12 + c I)"
    plan = ng.plan(ng.FIM, model, x, rep, likelihood="gaussian")
    for row, planned in zip(F.report(), plan, strict=True):
        assert row.block == planned.block
        assert row.bytes == planned.bytes
    assert F.report()[0].block.endswith(name[wide])
    assert rep.described().endswith(f"max_factor=5, wide='{wide}')")


@pytest.mark.parametrize("wide", WAYS)
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_convolutions_groups_masks_and_tables(wide, sharing):
    torch.manual_seed(3)
    options = {"max_factor": LIMIT, "wide": wide, "sharing": sharing}
    image = nn.Sequential(nn.Conv2d(2, 12, 3, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(48, 2))
    text = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 7))
    tokens = torch.randint(9, (4, 5))
    for model, x, likelihood in (
        (image, torch.randn(6, 2, 4, 4), "gaussian"),
        (text, (tokens, torch.where(tokens > 5, -100, tokens % 7)), "categorical"),
    ):
        F = ng.FIM(model, x, KFAC(**options), likelihood=likelihood)
        whole = ng.FIM(model, x, KFAC(sharing=sharing), likelihood=likelihood)
        for member, block in zip(F.members, whole.members, strict=True):
            sides = [member.left, member.right], [block.left, block.right]
            for side, factor in zip(*sides, strict=True):
                if factor.dim() == 2:
                    close(side, factor)
                    continue
                made = KroneckerLinearOperator(side, torch.ones(len(factor), 1)).to_dense()
                expected = torch.block_diag(*(kept(each, wide) for each in factor))
                close(made, expected, 1e-8)
        E = ng.FIM(model, x, EKFAC(**options), likelihood=likelihood)
        exact = ng.FIM(model, x, "diagonal", likelihood=likelihood)
        close(E.trace(), exact.trace())  # a turned diagonal keeps the trace


@pytest.mark.parametrize("wide", ["diagonal", *WAYS])
@pytest.mark.parametrize("kind", [KFAC, EKFAC])
def test_an_optimizer_steps_with_them(wide, kind):
    model, x = problem()
    plain = {"lr": 1.0, "damping": 0.1, "momentum": 0.0, "radius": None, "estimator": "exact"}
    rep = kind(max_factor=LIMIT, wide=wide)
    optimizer = NaturalGradient(model, rep, "gaussian", **plain)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    F = ng.FIM(model, x, rep, likelihood="gaussian")
    model(x).square().sum(1).mean().backward()
    g = torch.cat([p.grad.flatten() for p in model.parameters()])
    optimizer.step()
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    close(optimizer.operator.to_dense(), F.to_dense(), 1e-8)
    close(before - after, F.solve(g, damping=0.1), 1e-8)
    for _ in range(3):  # averages
        optimizer.zero_grad()
        model(x).square().sum(1).mean().backward()
        optimizer.step()
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("wide", WAYS)
def test_gradients_in_vectors_and_dampings(wide):
    model, x = problem(n=10)
    F = ng.FIM(model, x, KFAC(max_factor=LIMIT, wide=wide), likelihood="gaussian")
    v = torch.randn(F.shape[0], requires_grad=True)
    d = torch.tensor(0.3, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v, d: F.solve(v, damping=d), (v, d))
    assert torch.autograd.gradcheck(lambda v: F @ v, (v,))


def test_bias_and_weight_apart():
    model, x = problem()
    rep = KFAC(max_factor=LIMIT, wide="split", separate_bias=True)
    F = ng.FIM(model, x, rep, likelihood="gaussian")
    for member, (left, right) in zip(F.members, by_hand(model, x), strict=True):
        apart = right.clone()
        apart[-1, :-1] = apart[:-1, -1] = 0
        close(member.to_dense(), torch.kron(kept(left, "split"), kept(apart, "split")), 1e-9)


@pytest.mark.parametrize("kind", [KFAC, EKFAC])
def test_wrong_options(kind):
    with pytest.raises(DataError, match="expected wide='diagonal', 'split' or 'low_rank', which"):
        kind(wide="banded")
    with pytest.raises(DataError, match="take wide='split' or 'diagonal' with it"):
        kind(wide="low_rank", separate_bias=True)
    assert kind(wide="split", separate_bias=True).separate_bias
    with pytest.raises(DataError, match="take wide='diagonal' with tied='kronecker'"):
        kind(wide="split", tied="kronecker")
    assert kind(wide="diagonal", tied="kronecker").tied
