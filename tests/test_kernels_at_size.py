"""Kernels whose rows are made anew, and kernels on disk, against torch.func's Jacobian."""

import errno
import json
import os
import shutil

import gpytorch
import numpy as np
import pytest
import torch
from test_implicit import EVERY_NET, net_of
from test_ntk import jacobian, reference, small
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import nngeo_lazy as ng
from nngeo_lazy import kernels, matrix_files
from nngeo_lazy.errors import DataError, TooLargeError
from nngeo_lazy.gp import NTKKernel
from nngeo_lazy.operators import panels

import oracle
from cases import close

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
]


def batches(x, size=2):
    return DataLoader(TensorDataset(x, torch.zeros(len(x))), batch_size=size)


@pytest.fixture
def one_batch_a_panel(monkeypatch):
    monkeypatch.setattr(panels, "PANEL_BYTES", 1)


class Counting:
    """A forward that counts the examples that pass, and may be interrupted."""

    def __init__(self, until=None):
        self.count, self.until = 0, until

    def __call__(self, model, batch):
        x = batch[0] if isinstance(batch, (list, tuple)) else batch
        self.count += len(x)
        if self.until is not None and self.count > self.until:
            raise KeyboardInterrupt
        return model(x)


# --- rows that are made anew ----------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY_NET)
def test_every_network_on_disk(name, tmp_path, monkeypatch):
    monkeypatch.setattr(panels, "PANEL_BYTES", 20_000)  # some panels
    net = net_of(name)
    kinds = reference(oracle.jacobian(net.model, net.call, net.examples))
    for outputs in ("full", "mean"):
        path = tmp_path / outputs
        K = ng.NTK(net.model, net.batch, outputs=outputs, forward=net.forward, path=path)
        close(K.to_dense(), kinds[outputs], 1e-9)


@pytest.mark.parametrize("outputs", ["full", "mean"])
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_panels_of_any_size(outputs, size, monkeypatch):
    model, x1, x2 = small(), torch.randn(7, 4), torch.randn(5, 4)
    for limit in (1, 1000, 10**9):
        monkeypatch.setattr(panels, "PANEL_BYTES", limit)
        K = ng.NTK(model, batches(x1, size), outputs=outputs, method="matrix-free")
        want = reference(jacobian(model, x1))
        close(K.to_dense(), want[outputs], 1e-9)
        close(K.diagonal(), want[outputs].diagonal(), 1e-9)
        close(K.outputs("per_example").to_dense(), want["per_example"], 1e-9) if (
            outputs == "full"
        ) else None
        K = ng.NTK(model, batches(x1, size), x2, outputs=outputs, method="matrix-free")
        want = reference(jacobian(model, x1), jacobian(model, x2))
        close(K.to_dense(), want[outputs], 1e-9)


def test_a_matrix_in_the_middle(one_batch_a_panel):
    model, x, y = small(), torch.randn(7, 4), torch.randint(3, (7,))
    M = ng.FIM(model, (x, y), "kfac").inverse(damping=0.1)
    J = ng.Jacobian(model, batches(x), "implicit")
    K = J @ M @ J.mT
    flat = jacobian(model, x).flatten(0, 1)
    want = flat @ M.to_dense() @ flat.mT
    close(K.to_dense(), want, 1e-9)
    close(K.diagonal(), want.diagonal(), 1e-9)


def test_the_matrix_costs_few_passes():
    model, x = small(), torch.randn(40, 4)
    forward = Counting()
    K = ng.NTK(model, batches(x, 4), outputs="mean", method="matrix-free", forward=forward)
    forward.count = 0
    K.to_dense()
    assert forward.count <= 40 + 2 * 6  # once, and the checks of a first batch
    forward.count = 0
    K.diagonal()
    assert forward.count <= 40 + 6


def test_of_later_parameters_nothing_is_seen(one_batch_a_panel):
    model, x = small(), torch.randn(6, 4)
    K = ng.NTK(model, batches(x), method="matrix-free")
    want = reference(jacobian(model, x))["full"]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    close(K.to_dense(), want, 1e-9)


def test_the_matrix_elsewhere_has_a_gradient():
    model, x = small(), torch.randn(3, 4)
    J = ng.Jacobian(model, x, "implicit")
    w = J.space.values(model).detach().requires_grad_()
    there = J.at(w)
    K = there @ there.mT
    (slope,) = torch.autograd.grad(K.to_dense().sum(), w)
    assert float(slope.abs().max()) > 0


# --- on disk --------------------------------------------------------------------------------------


def test_a_file_that_numpy_opens(tmp_path):
    model, x1, x2 = small().float(), torch.randn(6, 4).float(), torch.randn(3, 4).float()
    K = ng.NTK(model, x1, x2, path=tmp_path / "K")
    held = np.load(tmp_path / "K" / "kernel.npy", mmap_mode="r")
    assert held.shape == K.shape == (18, 9)
    assert held.dtype == np.float32
    want = ng.NTK(model, x1, x2).to_dense()
    torch.testing.assert_close(torch.tensor(np.array(held)), want)
    v = torch.randn(9).float()
    torch.testing.assert_close(K @ v, want @ v)
    assert sorted(os.listdir(tmp_path / "K")) == ["done.json", "kernel.npy", "run.json"]


def test_each_example_is_differentiated_once(tmp_path, monkeypatch):
    model, x = small(), torch.randn(40, 4)
    counts = []
    for name, limit in (("one", 10**9), ("many", 1)):
        monkeypatch.setattr(panels, "PANEL_BYTES", limit)
        forward = Counting()
        ng.NTK(model, batches(x, 4), outputs="mean", forward=forward, path=tmp_path / name)
        counts.append(forward.count)
    assert counts[1] - counts[0] <= 10 * 6  # a self-check for each panel at most
    # the build looks at each example, whole and in halves, and the rows are made once
    assert counts[0] <= 40 * 2 + 30


def test_it_goes_on_after_an_interruption(tmp_path, one_batch_a_panel):
    model, x = small(), torch.randn(20, 4)
    whole = Counting()
    want = ng.NTK(model, batches(x), forward=whole, path=tmp_path / "whole").to_dense()
    close(want, reference(jacobian(model, x))["full"], 1e-9)
    with pytest.raises(KeyboardInterrupt):
        ng.NTK(model, batches(x), forward=Counting(whole.count - 3), path=tmp_path / "K")
    batch, row = json.loads((tmp_path / "K" / "done.json").read_text())
    assert 0 < batch < 10
    assert row == batch * 6
    entries = np.load(tmp_path / "K" / "kernel.npy")
    close(torch.tensor(entries[:row, :row]), want[:row, :row], 1e-12)
    K = ng.NTK(model, batches(x), forward=Counting(), path=tmp_path / "K")
    assert torch.equal(K.to_dense(), want)
    assert sorted(os.listdir(tmp_path / "K")) == ["done.json", "kernel.npy", "run.json"]


def test_a_finished_kernel_is_not_made_again(tmp_path, monkeypatch):
    model, x = small(), torch.randn(6, 4)
    want = ng.NTK(model, x, path=tmp_path).to_dense()
    monkeypatch.setattr(matrix_files.torch, "save", None)  # no rows are kept
    assert torch.equal(ng.NTK(model, x, path=tmp_path).to_dense(), want)


def test_another_kernel_is_refused(tmp_path):
    model, x = small(), torch.randn(6, 4)
    want = ng.NTK(model, x, path=tmp_path / "K").to_dense()
    with pytest.raises(DataError, match=r"a kernel of the same run, but \['inputs'\] differ"):
        ng.NTK(model, x + 1, path=tmp_path / "K")
    with pytest.raises(DataError, match=r"\['inputs'\] differ: pass another path, or the same"):
        ng.NTK(model, batches(x), path=tmp_path / "K")
    with pytest.raises(DataError, match=r"\['outputs', 'shape'\] differ"):
        ng.NTK(model, x, outputs="mean", path=tmp_path / "K")
    with pytest.raises(DataError, match=r"\['parameters'\] differ"):
        ng.NTK(model, x, params="0", path=tmp_path / "K")
    ng.NTK(model, x + 1, path=tmp_path / "another")
    assert torch.equal(ng.NTK(model, x, path=tmp_path / "K").to_dense(), want)
    with torch.no_grad():
        model[0].bias.add_(1)
    with pytest.raises(DataError, match=r"\['model'\] differ"):
        ng.NTK(model, x, path=tmp_path / "K")


def test_changes_of_the_result_stay_in_memory(tmp_path):
    model, x = small(), torch.randn(4, 4)
    K = ng.NTK(model, x, path=tmp_path)
    want = K.to_dense().clone()
    K.tensor.zero_()
    assert torch.equal(ng.NTK(model, x, path=tmp_path).to_dense(), want)


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_at_the_start(tmp_path, monkeypatch):
    model, x = small(), torch.randn(6, 4)
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(DataError, match=r"could not reserve 2,592 bytes.*No space left"):
            ng.NTK(model, x, path=tmp_path)
    used = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: used._replace(free=1000))
        with pytest.raises(DataError, match=r"1,000 bytes are free.*or outputs='mean'"):
            ng.NTK(model, x, path=tmp_path)
    assert not (tmp_path / "kernel.npy").exists()
    want = reference(jacobian(model, x))["full"]
    close(ng.NTK(model, x, path=tmp_path).to_dense(), want, 1e-9)


def test_a_disk_that_fills(tmp_path, monkeypatch, one_batch_a_panel):
    model, x, save, count = small(), torch.randn(10, 4), torch.save, 0

    def until_full(value, file):
        nonlocal count
        count += 1
        full() if count == 4 else save(value, file)

    with monkeypatch.context() as patch:
        patch.setattr(matrix_files.torch, "save", until_full)
        with pytest.raises(DataError, match=r"No space left.*make room and call again with"):
            ng.NTK(model, batches(x), path=tmp_path)
    assert json.loads((tmp_path / "done.json").read_text()) == [3, 18]
    want = reference(jacobian(model, x))["full"]
    close(ng.NTK(model, batches(x), path=tmp_path).to_dense(), want, 1e-9)


def test_what_a_path_does_not_take(tmp_path):
    model, x = small(), torch.randn(6, 4)
    with pytest.raises(ValueError, match="holds one matrix, and outputs='per_output' are several"):
        ng.NTK(model, x, outputs="per_output", path=tmp_path)
    with pytest.raises(TooLargeError, match="raise max_directions, or leave out path"):
        ng.NTK(model, x, max_directions=2, path=tmp_path)
    ng.NTK(model, x, max_directions=3, path=tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="could not make the folder"):
        ng.NTK(model, x, path=tmp_path / "file" / "K")


def test_past_the_forms_budget_the_matrix_is_made_in_panels(monkeypatch, one_batch_a_panel):
    monkeypatch.setattr(kernels, "FACTORED_BYTES", 100)
    model, x = small(), torch.randn(6, 4)
    K = ng.NTK(model, batches(x))
    assert K.left._kind() == "matrix-free"
    close(K.to_dense(), reference(jacobian(model, x))["full"], 1e-9)


# --- inside of GPyTorch ---------------------------------------------------------------------------


@pytest.mark.parametrize("outputs", ["mean", "full"])
def test_a_deep_kernel(outputs):
    """Gradients in the network's parameters, against torch.func's Jacobian."""
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    kernel = NTKKernel(model, outputs=outputs, train_network=True)
    assert [p.shape for p in kernel.parameters()] == [p.shape for p in model.parameters()]

    def rows(params, x):
        def f(p, one):
            return torch.func.functional_call(model, p, (one[None],))[0]

        found = torch.func.vmap(torch.func.jacrev(f), (None, 0))(params, x)
        return torch.cat([found[name].flatten(2) for name in params], -1).flatten(0, 1)

    params = {name: p.detach().requires_grad_() for name, p in model.named_parameters()}
    x, z = torch.randn(4, 3), torch.randn(2, 3)
    want = rows(params, x) @ rows(params, z).mT
    if outputs == "mean":
        want = want.view(4, 2, 2, 2).diagonal(dim1=1, dim2=3).mean(-1)
    weights = torch.randn_like(want)
    found = kernel(x, z).to_dense()
    close(found, want, 1e-10)
    (found * weights).sum().backward()
    slopes = torch.autograd.grad((want * weights).sum(), list(params.values()), allow_unused=True)
    for p, slope in zip(model.parameters(), slopes, strict=True):
        assert p.grad is not None
        close(p.grad, torch.zeros_like(p) if slope is None else slope, 1e-9)


def test_a_deep_kernel_of_some_parameters_trains_all():
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))
    kernel = NTKKernel(model, params="2", train_network=True)
    x = torch.randn(4, 3)
    found = kernel(x).to_dense()
    features = torch.cat([model[1](model[0](x)), torch.ones(4, 1)], 1)
    close(found, features @ features.mT, 1e-10)
    found.square().sum().backward()
    want = torch.autograd.grad((features @ features.mT).square().sum(), list(model[0].parameters()))
    close(model[0].weight.grad, want[0], 1e-9)
    close(model[0].bias.grad, want[1], 1e-9)


class Exact(gpytorch.models.ExactGP):
    def __init__(self, x, y, kernel, noise=1e-2):
        likelihood = gpytorch.likelihoods.GaussianLikelihood()
        super().__init__(x, y, likelihood)
        likelihood.noise = noise
        self.mean_module, self.covar_module = gpytorch.means.ZeroMean(), kernel

    def forward(self, x):
        return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))


def test_a_deep_kernel_is_trained():
    x = torch.linspace(-1, 1, 12)[:, None]
    y = (3 * x).sin().squeeze(1)
    model = nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 1))
    gp = Exact(x, y, NTKKernel(model, train_network=True))
    marginal = gpytorch.mlls.ExactMarginalLogLikelihood(gp.likelihood, gp)
    optimizer = torch.optim.Adam(gp.covar_module.parameters(), 0.02)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = -marginal(gp(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1


def test_a_deep_kernel_without_gradients_is_refused():
    model = nn.Linear(3, 1).requires_grad_(False)
    with pytest.raises(ValueError, match=r"call model.requires_grad_\(True\), or leave out train"):
        NTKKernel(model, train_network=True)
    NTKKernel(model.requires_grad_(True), train_network=True)


class Sparse(gpytorch.models.ApproximateGP):
    def __init__(self, points, kernel):
        inner = gpytorch.variational.NaturalVariationalDistribution(len(points))
        super().__init__(
            gpytorch.variational.VariationalStrategy(
                self, points, inner, learn_inducing_locations=True
            )
        )
        self.mean_module, self.covar_module = gpytorch.means.ZeroMean(), kernel

    def forward(self, x):
        return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))


@pytest.mark.filterwarnings("ignore")  # GPyTorch adds jitter, and says so
def test_a_sparse_variational_process():
    """With all points inducing, one natural step gives the exact posterior."""
    model = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1))
    x, z = torch.randn(10, 2), torch.randn(4, 2)
    y = x.sin().sum(1)
    kernel = gpytorch.kernels.ScaleKernel(NTKKernel(model))
    sparse, likelihood = Sparse(x.clone(), kernel), gpytorch.likelihoods.GaussianLikelihood()
    likelihood.noise = 0.1
    bound = gpytorch.mlls.VariationalELBO(likelihood, sparse, len(x))
    points = sparse.variational_strategy.inducing_points
    inner = gpytorch.optim.NGD(sparse.variational_parameters(), num_data=len(x), lr=1.0)
    sparse(x)  # which sets the start
    before = float(bound(sparse(x), y).detach())
    loss = -bound(sparse(x), y)
    loss.backward()
    assert float(points.grad.abs().max()) > 0  # inducing points are trained too
    inner.step()
    assert float(bound(sparse(x), y).detach()) > before
    K = kernel(torch.cat([x, z])).to_dense().detach()
    weights = torch.linalg.solve(K[:10, :10] + 0.1 * torch.eye(10), K[:10, 10:]).mT
    close(sparse.eval()(z).mean.detach(), weights @ y, 1e-2)


@pytest.mark.filterwarnings("ignore")
def test_a_loop_of_acquisitions():
    """Fit, maximise the expected improvement from several starts at once, measure, and again."""

    def measured(x):
        return -(x - 0.6).square().sum(-1) + 0.3 * (5 * x[..., 0]).cos()

    model = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 1))
    x = torch.rand(4, 2) * 2 - 1
    start = float(measured(x).max())
    for _ in range(3):
        y = measured(x)
        gp = Exact(x, y - y.mean(), NTKKernel(model), noise=1e-3).eval()
        best = (y - y.mean()).max()
        z = (torch.rand(4, 1, 2) * 2 - 1).requires_grad_()  # (starts, candidates, columns)
        optimizer = torch.optim.Adam([z], 0.1)
        for _ in range(8):
            optimizer.zero_grad()
            posterior = gp(z)
            spread = posterior.variance.clamp_min(1e-9).sqrt()
            u = (posterior.mean - best) / spread
            normal = torch.distributions.Normal(0.0, 1.0)
            gain = spread * (normal.log_prob(u).exp() + u * normal.cdf(u))
            (-gain.sum()).backward()
            assert float(z.grad.abs().max()) > 0
            optimizer.step()
            z.data.clamp_(-1, 1)
        x = torch.cat([x, z[gain.detach().squeeze(-1).argmax()].detach()])
    assert float(measured(x).max()) > start
