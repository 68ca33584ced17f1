"""Pictures: what is drawn is what was computed, on the Axes that was given."""

import sys

import matplotlib
import pytest
import torch
from matplotlib import pyplot as plt
from torch import nn

import nngeo_lazy as ng
from nngeo_lazy import plot
from nngeo_lazy.errors import SpaceMismatchError, UnsupportedLayerError

matplotlib.use("Agg")
pytestmark = pytest.mark.usefixtures("float64")


@pytest.fixture
def ax():
    figure, ax = plt.subplots()
    yield ax
    figure.canvas.draw()  # an Axes that cannot be drawn is an error
    plt.close("all")


def fisher(representation="dense"):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    return ng.FIM(model, torch.randn(20, 3), representation, likelihood="categorical")


def found(**options):
    A = torch.diag(torch.cat([torch.linspace(0.01, 1, 30), torch.tensor([20.0])]))
    return ng.spectral_density(A, probes=3, steps=10, seed=0, **options)


def test_density(ax):
    one = found(deflate=1)
    assert plot.density(one, ax=ax) is ax
    line, ticks = ax.get_lines()
    grid, height = map(torch.from_numpy, line.get_data())
    torch.testing.assert_close(height, one.density(grid))
    assert ticks.get_xdata() == pytest.approx([20.0])
    assert len(ax.collections) == 1  # the band
    assert ax.get_yscale() == "log"
    assert ax.get_xlabel() == "eigenvalue"


@pytest.mark.parametrize("log", [False, True])
def test_densities_by_label(ax, log):
    grid = torch.logspace(-3, 2, 50)
    plot.density({"one": found(), "two": found(deflate=1)}, grid=grid, log=log, ax=ax)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["one", "two"]
    assert ax.get_xscale() == ("log" if log else "linear")
    torch.testing.assert_close(torch.from_numpy(ax.get_lines()[0].get_xdata()), grid)


def test_density_of_one_probe_has_no_band(ax):
    A = torch.diag(torch.linspace(0, 1, 30))
    plot.density(ng.spectral_density(A, probes=1, seed=0), ax=ax)
    assert not ax.collections


@pytest.mark.parametrize("probes", [None, 500])
def test_block_norms(ax, probes):
    F = fisher()
    assert plot.block_norms(F, probes=probes, ax=ax) is ax
    dense, k = F.to_dense(), 16  # the parameters of the first layer
    parts = [[dense[:k, :k], dense[:k, k:]], [dense[k:, :k], dense[k:, k:]]]
    expected = torch.tensor([[float(part.norm()) for part in row] for row in parts])
    shown = torch.as_tensor(ax.get_images()[0].get_array())
    torch.testing.assert_close(shown, expected, rtol=1e-8 if probes is None else 0.2, atol=0)
    assert [text.get_text() for text in ax.get_xticklabels()] == ["0", "2"]


def test_factor_spectra(ax):
    assert plot.factor_spectra(fisher("kfac"), ax=ax) is ax
    labels = [line.get_label() for line in ax.get_lines()]
    assert labels == ["0: input (4)", "0: output (4)", "2: input (5)", "2: output (2)"]
    for line in ax.get_lines():
        height = line.get_ydata()
        assert height[0] == pytest.approx(1)
        assert (height[1:] <= height[:-1]).all()


def test_compare(ax):
    A, B = torch.rand(5, 5) + 0.1, torch.rand(5, 5) + 0.1
    assert plot.compare(A, B, ax=ax) is ax
    shown = torch.as_tensor(ax.get_images()[0].get_array())
    torch.testing.assert_close(shown, A.tril() + B.triu(1))


def test_correlation(ax):
    F = fisher().damped(0.1)
    assert plot.correlation(F, ax=ax) is ax
    image = ax.get_images()[0]
    shown = torch.as_tensor(image.get_array())
    torch.testing.assert_close(shown.diagonal(), torch.ones(len(shown)))
    d = F.to_dense()
    torch.testing.assert_close(shown, d / (d.diagonal() * d.diagonal()[:, None]).sqrt())
    assert image.get_clim() == (-1, 1)


def test_a_zero_diagonal_has_no_correlation(ax):
    plot.correlation(torch.diag(torch.tensor([1.0, 0.0])), ax=ax)
    shown = torch.as_tensor(ax.get_images()[0].get_array())
    torch.testing.assert_close(shown, torch.diag(torch.tensor([1.0, 0.0])))


def test_each_makes_an_axes_of_its_own():
    for draw in (
        lambda: plot.density(found()),
        lambda: plot.block_norms(fisher()),
        lambda: plot.factor_spectra(fisher("kfac")),
        lambda: plot.compare(torch.eye(3), torch.zeros(3, 3)),
        lambda: plot.correlation(fisher("diagonal")),
    ):
        before = set(plt.get_fignums())
        draw().figure.canvas.draw()
        assert len(set(plt.get_fignums()) - before) == 1
    plt.close("all")


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    monkeypatch.delattr(matplotlib, "pyplot")
    with pytest.raises(ImportError, match=r"needs matplotlib: pip install 'nngeo_lazy\[plot\]'"):
        plot.correlation(torch.eye(3))


def test_what_cannot_be_drawn():
    with pytest.raises(SpaceMismatchError, match="block_norms needs an operator with a parameter"):
        plot.block_norms(torch.eye(3))
    with pytest.raises(UnsupportedLayerError, match=r"needs Kronecker blocks .* got Diag.*'kfac'"):
        plot.factor_spectra(fisher("diagonal"))
    with pytest.raises(SpaceMismatchError, match=r"one size, got \(3, 3\) and \(2, 2\)"):
        plot.compare(torch.eye(3), torch.eye(2))
    assert not plt.get_fignums()
