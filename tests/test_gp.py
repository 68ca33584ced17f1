"""Neural tangent kernels inside GPyTorch against dense references."""

import warnings

import gpytorch
import pytest
import torch
from gpytorch.kernels import AdditiveKernel, RBFKernel, ScaleKernel
from torch import nn

import nngeo_lazy as ng
from nngeo_lazy.errors import NotPositiveDefiniteError
from nngeo_lazy.gp import NTKKernel, wrap
from nngeo_lazy.operators import DenseLinearOperator
from nngeo_lazy.operators.kernel import KernelLinearOperator

from cases import close

pytestmark = pytest.mark.usefixtures("float64")


def network(outputs=1):
    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, outputs))


def gram(model, a, b):
    """The mean over outputs, from stored Jacobians."""
    J1, J2 = (ng.Jacobian(model, x, "dense").to_dense() for x in (a, b))
    c = J1.shape[0] // len(a)
    full = (J1 @ J2.mT).view(len(a), c, len(b), c)
    return torch.einsum("ncmc->nm", full) / c


def dense(kernel, a, b):
    """What a kernel is, written with tensors alone."""
    if isinstance(kernel, NTKKernel):
        return gram(kernel._network[0], a, b)
    if isinstance(kernel, RBFKernel):
        return torch.exp(-0.5 * torch.cdist(a / kernel.lengthscale, b / kernel.lengthscale) ** 2)
    if isinstance(kernel, ScaleKernel):
        return kernel.outputscale * dense(kernel.base_kernel, a, b)
    if hasattr(kernel, "kernels"):
        first, second = (dense(part, a, b) for part in kernel.kernels)
        return first + second if isinstance(kernel, AdditiveKernel) else first * second
    return dense(kernel.base_kernel, a, b)  # wrapped


class Model(gpytorch.models.ExactGP):
    def __init__(self, x, y, kernel):
        super().__init__(x, y, gpytorch.likelihoods.GaussianLikelihood())
        self.mean_module = gpytorch.means.ConstantMean()
        self.covar_module = kernel

    def forward(self, x):
        return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))


KERNELS = {
    "ntk": lambda net: NTKKernel(net),
    "scaled": lambda net: ScaleKernel(NTKKernel(net)),
    "wrapped": lambda net: wrap(ScaleKernel(NTKKernel(net))),
    "sum": lambda net: wrap(ScaleKernel(NTKKernel(net)) + RBFKernel()),
    "sum, the other way round": lambda net: wrap(RBFKernel() + ScaleKernel(NTKKernel(net))),
    "product": lambda net: wrap(RBFKernel() * NTKKernel(net)),
    "product, not wrapped": lambda net: NTKKernel(net) * RBFKernel(),
}


def gradients(loss, model):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("name", KERNELS)
def test_exact_gp(name, outputs):
    x, x2 = torch.randn(40, 2), torch.randn(15, 2)
    y = torch.sin(x[:, 0]) + 0.1 * torch.randn(40)
    model = Model(x, y, KERNELS[name](network(outputs)))
    marginal = gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model)
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    model.train()
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        losses.append(-marginal(model(x), y))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]

    found = -marginal(model(x), y)
    ours = gradients(found, model)
    K = dense(model.covar_module, x, x) + model.likelihood.noise * torch.eye(40)
    mu = model.mean_module.constant
    expected = -torch.distributions.MultivariateNormal(mu.expand(40), K).log_prob(y) / 40
    close(found.detach(), expected.detach(), 1e-9)
    for name_, gradient in gradients(expected, model).items():
        close(ours[name_], gradient, 1e-7)

    model.eval()
    with torch.no_grad():
        posterior = model(x2)
        cross = dense(model.covar_module, x2, x)
        close(posterior.mean, mu + cross @ torch.linalg.solve(K, y - mu), 1e-6)
        covariance = dense(model.covar_module, x2, x2) - cross @ torch.linalg.solve(K, cross.mT)
        close(posterior.variance, covariance.diagonal(), 1e-5)
        again = model(x2)  # with cached factors
        close(again.mean, posterior.mean)
        assert posterior.rsample(torch.Size([3])).shape == (3, 15)
        noisy = model.likelihood(posterior).variance
        close(noisy, covariance.diagonal() + model.likelihood.noise, 1e-5)


def test_large_sums_solve_accurately():
    n = 1200  # past the size from which GPyTorch iterates
    x, b = torch.randn(n, 2), torch.randn(n)
    kernel = RBFKernel() + ScaleKernel(NTKKernel(network()))
    with torch.no_grad():
        matrix = dense(kernel, x, x) + 0.1 * torch.eye(n)
        solved = wrap(kernel)(x).add_diagonal(torch.tensor(0.1)).solve(b)
        theirs = kernel(x).add_diagonal(torch.tensor(0.1)).evaluate_kernel().solve(b)
    assert (matrix @ solved - b).norm() < 1e-5 * b.norm()
    assert (matrix @ theirs - b).norm() > 1e-5 * b.norm()  # what wrap is for


def test_noise_below_rounding_is_refused_in_single_precision():
    x, b = torch.randn(1200, 2).float(), torch.randn(1200).float()
    K = wrap(ScaleKernel(NTKKernel(network().float()))).float()(x)
    with (
        torch.no_grad(),
        pytest.raises(NotPositiveDefiniteError, match=r"singular: .* up to round"),
    ):
        K.add_diagonal(torch.tensor(1e-6)).solve(b)


def test_the_matrices_of_a_wrapped_kernel_are_ours():
    x, net = torch.randn(6, 2), network()
    assert isinstance(wrap(NTKKernel(net))(x), KernelLinearOperator)
    total = wrap(RBFKernel() + ScaleKernel(NTKKernel(net)))(x)
    assert isinstance(total, DenseLinearOperator)
    parts = wrap(NTKKernel(net))(x, x[:2])
    close(parts.to_dense(), gram(net, x, x[:2]))


def test_the_network_is_no_submodule():
    net = network()
    kernel = ScaleKernel(NTKKernel(net))
    assert [name for name, _ in kernel.named_parameters()] == ["raw_outputscale"]
    assert not any("etwork" in name for name in kernel.state_dict())


def test_a_change_of_the_network_is_seen():
    x, net = torch.randn(6, 2), network()
    kernel = NTKKernel(net)
    before = kernel(x).to_dense()
    with torch.no_grad():
        net[0].weight.mul_(2)
    after = kernel(x).to_dense()
    assert not torch.allclose(before, after)
    close(after, gram(net, x, x))


def test_the_network_is_differentiated_once_for_the_same_inputs(monkeypatch):
    calls = 0
    original = nn.Sequential.forward

    def counted(self, x):
        nonlocal calls
        calls += 1
        return original(self, x)

    x, kernel = torch.randn(6, 2), NTKKernel(network())
    monkeypatch.setattr(nn.Sequential, "forward", counted)
    kernel(x).to_dense()
    first = calls
    assert first > 0
    kernel(x.clone()).to_dense()
    assert calls == first


def test_diagonals_batches_and_slices():
    x, net = torch.randn(3, 5, 2), network(2)
    kernel = NTKKernel(net)
    close(kernel(x[0], diag=True), gram(net, x[0], x[0]).diagonal())
    close(kernel(x[0]).diagonal(), gram(net, x[0], x[0]).diagonal())
    each = torch.stack([gram(net, part, part) for part in x])
    close(kernel(x).to_dense(), each)
    close(kernel(x, diag=True), each.diagonal(dim1=1, dim2=2))
    close(kernel(x, x[0]).to_dense(), torch.stack([gram(net, part, x[0]) for part in x]))
    close(kernel(x[0])[1:3, :2].to_dense(), each[0, 1:3, :2])
    close(wrap(kernel)(x[0])[1:3, :2].to_dense(), each[0, 1:3, :2])


def test_all_outputs_side_by_side():
    x, net = torch.randn(4, 2), network(3)
    kernel = NTKKernel(net, outputs="full")
    J = ng.Jacobian(net, x, "dense").to_dense()
    assert kernel(x).shape == (12, 12)
    close(kernel(x).to_dense(), J @ J.mT)


def test_parameters_and_forward():
    x, net = torch.randn(4, 2), network()
    kernel = NTKKernel(net, params="2.*", forward=lambda model, rows: 2 * model(rows))
    J = ng.Jacobian(net, x, "dense", params="2.*").to_dense()
    close(kernel(x).to_dense(), 4 * J @ J.mT)


def test_bad_input():
    with pytest.raises(ValueError, match=r"expected outputs to be one of .*, got 'per_output'"):
        NTKKernel(network(), outputs="per_output")
    kernel = NTKKernel(network())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        with pytest.raises(ValueError, match="takes whole rows"):
            kernel(torch.randn(4, 2), last_dim_is_batch=True).to_dense()


@pytest.mark.parametrize("outer", ["scale", "sum", "product", "multitask"])
def test_a_wrapped_kernel_inside_of_others(outer):
    x, net = torch.randn(6, 2), network()
    plain, rbf = gram(net, x, x), RBFKernel()
    other = rbf(x).to_dense()
    kernels = gpytorch.kernels
    kernel, want = {
        "scale": lambda: (ScaleKernel(wrap(NTKKernel(net))), 0.5 * plain),
        "sum": lambda: (kernels.AdditiveKernel(wrap(NTKKernel(net)), rbf), plain + other),
        "product": lambda: (kernels.ProductKernel(wrap(NTKKernel(net)), rbf), plain * other),
        "multitask": lambda: (
            kernels.MultitaskKernel(wrap(NTKKernel(net)), num_tasks=2, rank=0),
            None,
        ),
    }[outer]()
    if outer == "scale":
        kernel.outputscale = 0.5
    if want is None:
        between = kernel.task_covar_module.covar_matrix.to_dense()
        want = torch.kron(plain, between)
    close(kernel(x).to_dense(), want)
    close(kernel(x, x[:2]).to_dense(), want[:, : 2 * len(want) // 6])
    v = torch.ones(len(want))
    close(kernel(x).add_jitter(0.1).solve(v), torch.linalg.solve(want + 0.1 * v.diag(), v))
    close(kernel(x, diag=True), want.diagonal())


@pytest.mark.parametrize("outputs", ["mean", "full"])
def test_gradients_in_the_inputs(outputs):
    """Against torch.func's Jacobian, differentiated through."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    kernel = NTKKernel(model, outputs=outputs)
    params = {name: p.detach() for name, p in model.named_parameters()}

    def rows(x):
        def f(p, one):
            return torch.func.functional_call(model, p, (one[None],))[0]

        found = torch.func.vmap(torch.func.jacrev(f), (None, 0))(params, x)
        return torch.cat([found[name].flatten(2) for name in params], -1).flatten(0, 1)

    def wanted(x, z):
        full = rows(x) @ rows(z).mT
        if outputs == "full":
            return full
        return full.view(len(x), 2, len(z), 2).diagonal(dim1=1, dim2=3).mean(-1)

    x, z = torch.randn(4, 3).double().requires_grad_(), torch.randn(2, 3).double()
    weights = torch.randn_like(wanted(x, z))
    found = kernel(x, z).to_dense()
    assert torch.allclose(found, wanted(x, z))
    (slope,) = torch.autograd.grad((found * weights).sum(), x)
    (want,) = torch.autograd.grad((wanted(x, z) * weights).sum(), x)
    assert torch.allclose(slope, want)
    (slope,) = torch.autograd.grad(kernel(x, diag=True).sum(), x)
    (want,) = torch.autograd.grad(wanted(x, x).diagonal().sum(), x)
    assert torch.allclose(slope, want)
    assert all(p.grad is None for p in model.parameters())


def test_some_columns_of_the_inputs():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1))
    x = torch.randn(6, 4)
    some = NTKKernel(model, active_dims=(0, 3))
    assert torch.allclose(some(x).to_dense(), NTKKernel(model)(x[:, [0, 3]]).to_dense())
    both = gpytorch.kernels.ScaleKernel(some) + gpytorch.kernels.RBFKernel(active_dims=(1, 2))
    assert both(x).to_dense().shape == (6, 6)


def test_an_acquisition_goes_uphill():
    """A loop as BoTorch's: the posterior's upper confidence bound at one candidate."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 20), nn.Tanh(), nn.Linear(20, 1)).double()
    x = torch.linspace(-1, 1, 6).double()[:, None]
    y = (x - 0.3).square().neg().squeeze(1)
    kernel = NTKKernel(model)
    inverse = torch.linalg.inv(kernel(x).to_dense() + 1e-3 * torch.eye(6).double())

    def bound(z):
        across = kernel(z, x).to_dense()
        mean = across @ inverse @ y
        variance = kernel(z, diag=True) - ((across @ inverse) * across).sum(1)
        return (mean + 0.1 * variance.clamp_min(1e-12).sqrt()).sum()

    z = torch.tensor([[-0.5]]).double().requires_grad_()
    before = float(bound(z).detach())
    for _ in range(20):
        (slope,) = torch.autograd.grad(bound(z), z)
        z = (z + 0.1 * slope).detach().requires_grad_()
    assert float(bound(z).detach()) > before
    assert abs(float(z.detach()) - 0.3) < 0.3
