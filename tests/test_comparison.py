"""The comparison of representations, against dense algebra."""

import pytest
import torch
from torch import nn

import nngeo_lazy as ng
from nngeo_lazy.errors import DataError
from nngeo_lazy.representations import KFAC


def problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    return model, torch.randn(30, 4).double(), torch.randint(3, (30,))


def test_the_errors_are_those_of_dense_matrices(monkeypatch):
    model, x, y = problem()
    names = ["diagonal", "kfac", KFAC(sharing="reduce"), "dense"]
    table = ng.compare(model, (x, y), names, damping=0.05)
    loss = nn.functional.cross_entropy(model(x), y)
    g = torch.cat([p.flatten() for p in torch.autograd.grad(loss, list(model.parameters()))])
    exact = ng.FIM(model, (x, y), "dense").to_dense()
    eye = 0.05 * torch.eye(len(g)).double()
    best = torch.linalg.solve(exact + eye, g)
    for row, name in zip(table, names, strict=True):
        F = ng.FIM(model, (x, y), name).to_dense()
        found = torch.linalg.solve(F + eye, g)
        wanted = {
            "direction": (found - best).norm() / best.norm(),
            "quadratic": (g @ F @ g / (g @ exact @ g) - 1).abs(),
            "largest": (torch.linalg.norm(F, 2) / torch.linalg.norm(exact, 2) - 1).abs(),
            "trace": (F.trace() / exact.trace() - 1).abs(),
            "logdet": (torch.logdet(F + eye) - torch.logdet(exact + eye)) / len(g),
        }
        for kind, value in wanted.items():
            assert abs(float(getattr(row, kind)) - float(value)) <= 0.06 * abs(float(value)) + 1e-5
        inner = found @ (exact + eye) @ best
        norms = (found @ (exact + eye) @ found * (best @ (exact + eye) @ best)).sqrt()
        assert abs(float(row.cosine) - float(inner / norms)) < 1e-4
    assert table[3].direction == "0"
    assert "damping 0.05" in repr(table)
    monkeypatch.setattr("nngeo_lazy.comparison.DENSE_BYTES", 1)
    free = ng.compare(model, (x, y), names[:2], damping=0.05)
    assert "matrix-free" in repr(free)
    for one, other in zip(free, table[:2], strict=True):
        assert abs(float(one.direction) - float(other.direction)) < 0.02


def test_what_takes_too_much_is_left_out():
    model, x, y = problem()
    table = ng.compare(model, (x, y), ["diagonal", "dense"], max_bytes=1000)
    assert not table[0].note
    assert table[1].note == "left out: past 1000 bytes"
    late = ng.compare(model, (x, y), ["diagonal"], seconds=1e-9)
    assert late[0].note == "left out: past 1e-09 s"
    with pytest.raises(DataError, match="at least one representation"):
        ng.compare(model, (x, y), [])


def test_the_figure_has_a_bar_for_each_error():
    plt = pytest.importorskip("matplotlib.pyplot")
    model, x, y = problem()
    _, ax = plt.subplots()
    plot = pytest.importorskip("nngeo_lazy.plot")
    found = plot.compared(ng.compare(model, (x, y), ["diagonal", "kfac"]), ax=ax)
    assert found is ax
    assert [label.get_text() for label in ax.get_xticklabels()] == ["diagonal", "kfac"]
    assert len(ax.patches) == 10
    plt.close()
