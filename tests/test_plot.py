"""Pictures: what is drawn is what was computed, on the Axes that was given."""

import sys

import matplotlib
import pytest
import torch
from matplotlib import pyplot as plt
from torch import nn

import nngeo_lazy as ng
from nngeo_lazy import plot
from nngeo_lazy.errors import DataError, SpaceMismatchError, UnsupportedLayerError

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
        lambda: plot.influence(torch.randn(2, 9), torch.rand(9, 8, 8)),
        lambda: plot.bands(torch.arange(3.0), torch.zeros(3), torch.ones(3)),
        lambda: plot.reliability(torch.rand(9, 3).softmax(1), torch.randint(3, (9,))),
        lambda: plot.spectra(torch.eye(3)),
        lambda: plot.convergence({"cg": lambda n: ng.solve(torch.eye(3), torch.ones(3))}),
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


# --- what was computed ----------------------------------------------------------------------------


def lengths(ax):
    return [bar.get_width() for bar in ax.patches]


def words(ax):
    return [text.get_text() for text in ax.get_yticklabels()]


def test_influence_of_texts(ax):
    scores = torch.tensor([[0.0] * 6, [3.0, -2.0, 0.5, 9.0, -7.0, 0.1]])
    texts = [f"sentence {n}" for n in range(6)]
    assert plot.influence(scores, texts, query=1, k=4, ax=ax) is ax
    assert lengths(ax) == [9.0, 3.0, -2.0, -7.0]
    assert words(ax) == ["sentence 3", "sentence 0", "sentence 1", "sentence 4"]
    assert ax.yaxis_inverted()


def test_influence_of_pictures(ax):
    pictures = torch.rand(5, 1, 8, 8)
    top = ng.influence.Top(torch.tensor([[2.0, 1.0]]), torch.tensor([[4, 0]]))
    plot.influence(top, pictures, labels=list("abcde"), ax=ax)
    assert lengths(ax) == [2.0, 1.0]
    assert [inside.texts[0].get_text() for inside in ax.child_axes] == ["e", "a"]
    first, second = ax.child_axes
    for inside, number in ((first, 4), (second, 0)):
        shown = torch.as_tensor(inside.get_images()[0].get_array())
        torch.testing.assert_close(shown, pictures[number, 0].float(), check_dtype=False)
    assert first.get_position().y0 > second.get_position().y0  # beside its bar


def test_pictures_in_colour(ax):
    plot.influence(torch.randn(1, 3), torch.rand(3, 3, 8, 8), k=2, ax=ax)
    assert len(lengths(ax)) == 2
    assert ax.child_axes[0].get_images()[0].get_array().shape == (8, 8, 3)


def test_bands(ax):
    x, mean, variance = torch.tensor([2.0, 0.0, 1.0]), torch.tensor([5.0, 3.0, 4.0]), torch.ones(3)
    assert plot.bands(x, mean, 4 * variance, data=(x, mean), ax=ax) is ax
    line, points = ax.get_lines()
    assert line.get_xdata().tolist() == [0.0, 1.0, 2.0]
    assert line.get_ydata().tolist() == [3.0, 4.0, 5.0]
    assert points.get_ydata().tolist() == [5.0, 3.0, 4.0]
    wide, narrow = (band.get_paths()[0].vertices[:, 1] for band in ax.collections)
    assert wide.max() == pytest.approx(5 + 2 * 1.6448536)  # the normal's quantiles
    assert narrow.max() == pytest.approx(5 + 2 * 0.6744898)
    assert narrow.min() == pytest.approx(3 - 2 * 0.6744898)


def test_reliability(ax):
    sure = torch.tensor([0.95, 0.95, 0.95, 0.95, 0.65, 0.65])
    p = torch.stack([sure, 1 - sure], 1)
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    assert plot.reliability({"mine": p}, labels, ax=ax) is ax
    _, curve = ax.get_lines()
    assert curve.get_xdata() == pytest.approx([0.65, 0.95])
    assert curve.get_ydata() == pytest.approx([0.0, 0.75])
    error = 2 / 6 * 0.65 + 4 / 6 * 0.20
    (text,) = ax.get_legend().get_texts()
    assert text.get_text() == f"mine: calibration error {error:.3f}"


def test_spectra(ax):
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), torch.randn(6, 3)
    K = ng.NTK(model, x)
    plot.spectra({"kernel": K, "identity": torch.eye(3)}, ax=ax)
    first, second = ax.get_lines()
    want = torch.linalg.eigvalsh(K.to_dense()).flip(0)
    torch.testing.assert_close(torch.from_numpy(first.get_ydata()), want / want[0])
    assert second.get_ydata().tolist() == [1.0] * 3
    assert first.get_xdata().tolist() == [1, 2, 3, 4, 5, 6]
    assert ax.get_xscale() == ax.get_yscale() == "log"


def test_convergence(ax):
    A, b = torch.diag(torch.linspace(1, 1000, 60)), torch.ones(60)

    def run(n):
        return ng.solve(A, b, method="cg", max_iter=n)

    def preconditioned(n):
        return ng.solve(A, b, method="cg", max_iter=n, preconditioner=A)

    plot.convergence({"plain": run, "preconditioned": preconditioned}, most=30, ax=ax)
    plain, better = ax.get_lines()
    assert plain.get_xdata().tolist() == [1, 2, 3, 4, 6, 8, 12, 16, 24, 30]
    with pytest.warns(ng.errors.ConvergenceWarning):
        residual = float(run(12).residual.max())
    assert plain.get_ydata()[6] == pytest.approx(residual)
    assert better.get_xdata().tolist() == [1]
    assert better.get_ydata()[0] < 1e-10


def test_results_that_cannot_be_drawn():
    with pytest.raises(DataError, match="there are 3, and one of the scores is of example 4"):
        plot.influence(torch.arange(5.0), ["a", "b", "c"])
    with pytest.raises(DataError, match="expected k to be at least 1, got 0"):
        plot.influence(torch.arange(5.0), list("abcde"), k=0)
    with pytest.raises(DataError, match=r"of one size, got \[3, 6, 3\]: pass one output's"):
        plot.bands(torch.ones(3), torch.ones(3, 2), torch.ones(3))
    with pytest.raises(DataError, match=r"between 0 and 1, got \[90\]"):
        plot.bands(torch.ones(3), torch.ones(3), torch.ones(3), levels=[90])
    with pytest.raises(DataError, match="take a softmax of logits"):
        plot.reliability(torch.tensor([[3.0, -1.0]]), torch.tensor([0]))
    with pytest.raises(DataError, match="of 1 examples"):
        plot.reliability(torch.tensor([0.5, 0.5]), torch.tensor([0]))
    with pytest.raises(DataError, match="expected most to be at least 1"):
        plot.convergence({}, most=0)
    assert not plt.get_fignums()
