"""Matrix-free and factored matrices against the oracle, in float64: what the numbers are."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import nngeo_lazy as ng
from nngeo_lazy.errors import UnsupportedLayerError
from nngeo_lazy.likelihoods import Categorical, Gaussian
from nngeo_lazy.representations import Implicit

import oracle
import zoo
from cases import Case, close

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
]

# perceptron, convolutions, a block of a GPT, an LSTM, tied weights, checkpoints, a dict batch
NETS = ["mlp", "convolutions", "gpt", "recurrent", "tied", "checkpointed", "mapping", "raw"]
ENGINES = [
    Implicit("double_vjp", True),
    Implicit("double_vjp", False),
    Implicit("forward_over_reverse", False),
    Implicit("auto", "auto"),
]
TOLERANCE = 1e-9


def net_of(name):
    return getattr(zoo, name)()


def close_operator(operator, matrix):
    """Vectors, columns, dicts by name, transposes and batches."""
    v = torch.randn(matrix.shape[1], 6)
    close(operator @ v, matrix @ v, TOLERANCE)
    close(operator @ v[:, 0], matrix @ v[:, 0], TOLERANCE)
    batch = torch.stack([v, 2 * v])
    close(operator @ batch, matrix @ batch, TOLERANCE)
    product = operator @ operator.space.unravel(v.mT)
    flat = operator.space.ravel(product) if operator.maps_to_parameters else product
    close(flat, (matrix @ v).mT, TOLERANCE)
    u = torch.randn(matrix.shape[0], 2)
    close(operator.mT @ u, matrix.mT @ u, TOLERANCE)
    close(u[:, 0] @ operator, u[:, 0] @ matrix, TOLERANCE)


# --- every network, every builder, every engine ---------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES, ids=repr)
@pytest.mark.parametrize("name", NETS)
def test_every_builder(name, engine):
    if name == "gpt" and engine.mode == "forward_over_reverse":
        pytest.skip("has no forward mode: see test_modes_that_a_model_lacks")
    net = net_of(name)
    case = Case(net, "gaussian", "exact")
    J = oracle.jacobian(net.model, net.call, net.examples)
    close_operator(ng.Jacobian(net.model, net.batch, engine, forward=net.forward), J.flatten(0, 1))
    close_operator(case.build(engine), J.flatten(0, 1).mT @ J.flatten(0, 1) / 0.7 / len(J))
    labels = {"target": lambda batch: case.labels, "forward": net.forward}
    losses = ng.Jacobian(net.model, net.batch, engine, loss=case.object, **labels)
    close_operator(losses, case.gradients())
    H = ng.Hessian(net.model, net.batch, engine, loss=case.object, **labels)
    expected = oracle.loss_hessian(
        net.model, net.call, net.examples, oracle.nll_gaussian, case.labels
    )
    close_operator(H, expected / len(J))


@pytest.mark.parametrize("estimator", ["exact", "mc", "empirical"])
@pytest.mark.parametrize("likelihood", list(oracle.NLL))
@pytest.mark.parametrize("representation", ["implicit", "factored"])
def test_every_likelihood(representation, likelihood, estimator):
    case = Case(zoo.mlp(), likelihood, estimator)
    operator, matrix = case.build(representation), case.expected()
    close_operator(operator, matrix)
    close(operator.diagonal(), matrix.diagonal())
    close(operator.trace(), matrix.trace())
    close(operator.to_dense(), matrix)


EVERY_NET = [
    name
    for name, made in vars(zoo).items()
    if getattr(made, "__annotations__", {}).get("return") is zoo.Net and name != "simple"
]


@pytest.mark.parametrize("representation", ["implicit", "factored"])
@pytest.mark.parametrize("name", EVERY_NET)
def test_every_network(name, representation):
    """Products, and the diagonal from streamed forms."""
    case = Case(net_of(name), "gaussian", "exact")
    operator, matrix = case.build(representation), case.expected()
    v = torch.randn(len(matrix), 2)
    close(operator @ v, matrix @ v, TOLERANCE)
    close(operator.diagonal(), matrix.diagonal(), TOLERANCE)


@pytest.mark.parametrize("name", EVERY_NET)
def test_factored_jacobian(name):
    net = net_of(name)
    J = oracle.jacobian(net.model, net.call, net.examples)
    mine = ng.Jacobian(net.model, net.batch, "factored", forward=net.forward)
    close_operator(mine, J.flatten(0, 1))
    close(mine.gram(), J.flatten(0, 1) @ J.flatten(0, 1).mT, TOLERANCE)
    first = mine.space.names[0]
    close(mine.block(first).to_dense(), J.flatten(0, 1)[:, mine.space.slices[first]], TOLERANCE)
    centered = ng.Jacobian(net.model, net.batch, "factored", forward=net.forward, center=True)
    close_operator(centered, (J - J.mean(0)).flatten(0, 1))


# --- losses ---------------------------------------------------------------------------------------


def cosh(f, y):
    return (f - y).cosh().log().flatten(1).sum(1)


LOSSES = {
    "callable": (cosh, lambda f, y: cosh(f, y).sum() / len(f), torch.randn_like),
    "concave": (
        lambda f, y: (f * y).sin().sum(1),
        lambda f, y: (f * y).sin().sum() / len(f),
        torch.randn_like,
    ),
    "output": ("output", lambda f, y: f.sum() / len(f), torch.zeros_like),
    "mean": (nn.CrossEntropyLoss(), F.cross_entropy, None),
    "weighted": (
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)),
        lambda f, y: F.cross_entropy(f, y, torch.tensor([1.0, 2.0, 0.5])),
        None,
    ),
    "masked": (
        nn.CrossEntropyLoss(ignore_index=0, label_smoothing=0.1),
        lambda f, y: F.cross_entropy(f, y, ignore_index=0, label_smoothing=0.1),
        None,
    ),
    "sum": (nn.MSELoss(reduction="sum"), lambda f, y: (f - y).square().sum(), torch.randn_like),
    "huber": (nn.HuberLoss(), F.huber_loss, torch.randn_like),
    "poisson": (
        nn.PoissonNLLLoss(),
        lambda f, y: F.poisson_nll_loss(f, y),
        lambda f: torch.poisson(f.exp()),
    ),
}


@pytest.mark.parametrize("engine", ENGINES[:3], ids=repr)
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss(name, engine):
    """The whole loader counts as one batch, whatever its batches are."""
    loss, whole, labels = LOSSES[name]
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    x = torch.randn(7, 4)
    y = torch.randint(3, (7,)) if labels is None else labels(net(x).detach())
    space = ng.ParamSpace.of(net)

    def of_parameters(w):
        return whole(torch.func.functional_call(net, space.unravel(w), (x,)), y)

    w = space.values(net).detach()
    batches = [(x[:3], y[:3]), (x[3:], y[3:])]
    if name == "huber" and engine.mode == "forward_over_reverse":
        with pytest.raises(UnsupportedLayerError, match=r"huber.*take Implicit\(mode='double_vjp'"):
            ng.Hessian(net, batches, engine, loss=loss) @ w
        return
    H = ng.Hessian(net, batches, engine, loss=loss)
    close_operator(H, torch.func.hessian(of_parameters)(w))
    if name in ("output", "concave"):
        return
    f = net(x).detach()
    middle = torch.func.hessian(lambda f: whole(f, y))(f).reshape(f.numel(), f.numel())
    J = ng.Jacobian(net, x, "dense").to_dense()
    close_operator(ng.GGN(net, batches, engine, loss=loss), J.mT @ middle @ J)


def test_dense_hessian():
    net, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(6, 3)
    y = torch.randn(6, 2)
    H = ng.Hessian(net, (x, y), loss="gaussian")
    dense = ng.Hessian(net, (x, y), "dense", loss="gaussian")
    close(dense.to_dense(), H.to_dense(), TOLERANCE)
    assert dense.eigenvalues.min() < 0 < dense.eigenvalues.max()
    assert dense.num_examples == 6
    close(H.diagonal(), dense.diagonal(), TOLERANCE)


# --- data -----------------------------------------------------------------------------------------


def test_every_loader():
    """Unequal batches, a DataLoader, one that shuffles, and masks: one matrix."""
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    x, y = torch.randn(7, 4), torch.tensor([0, 1, -100, 2, 1, -100, 0])
    expected = ng.FIM(net, (x, y), "dense").to_dense()
    data = TensorDataset(x, y)
    for loader in (
        (x, y),
        [(x[:1], y[:1]), (x[1:], y[1:])],
        DataLoader(data, batch_size=3),
        DataLoader(data, batch_size=2, shuffle=True),
    ):
        for cache in (True, False, "auto"):
            operator = ng.FIM(net, loader, Implicit(cache=cache))
            for _ in range(2):
                close(operator.to_dense(), expected, TOLERANCE)
            assert operator.num_examples == 7
            assert operator.num_terms == 5
            close(operator.diagonal(), expected.diagonal(), TOLERANCE)


def test_centered():
    case = Case(zoo.mlp(), "gaussian", "empirical")
    rows = case.gradients()
    expected = torch.cov(rows.mT, correction=0)
    for representation in ("factored", *ENGINES):
        operator = case.build(representation, center=True)
        close_operator(operator, expected)
        close(operator.diagonal(), expected.diagonal(), TOLERANCE)
    batches = [b[:, None] for b in zoo.mlp().batch]  # the mean is over all batches
    J = ng.Jacobian(case.net.model, [(b.mT,) for b in batches], center=True)
    assert J.to_dense().unflatten(0, (6, 3)).mean(0).abs().max() < 1e-12


def residual(model, x):
    """u'' + u of a network u, by autograd within the forward pass."""
    x = x if isinstance(x, torch.Tensor) else x[0]
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        u = model(x)
        (first,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x, create_graph=True)
    return second + u


def test_differential_equation():
    net = nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 1))
    x = torch.randn(5, 1)
    space = ng.ParamSpace.of(net)

    def by_func(w):
        def u(t):
            return torch.func.functional_call(net, space.unravel(w), (t[None],))[0, 0]

        second = torch.func.vmap(torch.func.hessian(u))(x)[:, 0, 0]
        return second + torch.func.vmap(u)(x)

    w = space.values(net).detach()
    J = torch.func.jacrev(by_func)(w)
    for engine in (Implicit(), Implicit("double_vjp", False)):
        close_operator(ng.Jacobian(net, x, engine, forward=residual), J)
        operator = ng.FIM(net, x, engine, likelihood="gaussian", forward=residual)
        close_operator(operator, J.mT @ J / 5)
    H = torch.func.hessian(lambda w: by_func(w).square().sum() / 10)(w)
    mine = ng.Hessian(net, (x, torch.zeros(5, 1)), loss="gaussian", forward=residual)
    close_operator(mine, H)


def test_masked_dict_batch():
    """A language model's mapping, by position, with ignored labels and a shift."""
    net = zoo.mapping()
    out = torch.cat([oracle.outputs(net.model, net.call, e) for e in net.examples]).detach()
    labels = torch.randint(out.shape[-1], out.shape[:-1])
    labels[0, 0] = labels[-1, -1] = -100
    likelihood = Categorical(class_dim=-1, shift=1)
    options = {"likelihood": likelihood, "target": lambda b: labels, "forward": net.forward}
    dense = ng.FIM(net.model, net.batch, "dense", **options).to_dense()
    close_operator(ng.FIM(net.model, net.batch, "implicit", **options), dense)
    del options["likelihood"]

    def nll(f, y):
        return F.cross_entropy(f[:-1], y[1:], reduction="sum", ignore_index=-100)

    H = oracle.loss_hessian(net.model, net.call, net.examples, nll, labels)
    mine = ng.Hessian(net.model, net.batch, loss=likelihood, **options)
    close_operator(mine, H / len(labels))


# --- draws ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["exact", "mc", "empirical"])
@pytest.mark.parametrize("representation", ["implicit", "factored"])
@pytest.mark.parametrize("likelihood", ["categorical", "covariance", "bernoulli"])
def test_samples(likelihood, representation, estimator):
    """Of N(0, F), and by perturb and solve of N(0, (F + d I)^-1), whitened by the true matrix."""
    case = Case(zoo.mlp(), likelihood, estimator)
    operator, matrix = case.build(representation), case.expected()
    n, d = 6000, 0.5
    draws = operator.sample(n, seed=1)
    assert torch.equal(draws, operator.sample(n, seed=1))
    posterior = operator.inverse(damping=d).sample(n, seed=2)
    eye = torch.eye(len(matrix))
    values, vectors = torch.linalg.eigh(matrix)
    used = values > 1e-6 * values.max()
    white = draws @ (vectors[:, used] / values[used].sqrt())
    whitened = posterior @ torch.linalg.cholesky(matrix + d * eye)
    for sample in (white, whitened):
        moment = sample.mT @ sample / n
        assert (moment - torch.eye(len(moment))).abs().max() < 7 / n**0.5
    if not used.all():
        assert (draws @ vectors[:, ~used]).abs().max() < 1e-2 * draws.abs().max()


def test_callable_loss_has_draws():
    net, x = nn.Linear(2, 3), torch.randn(5, 2)
    G = ng.GGN(net, (x, torch.randn(5, 3)), loss=cosh)
    draws = G.sample(5000, seed=0)
    dense = G.to_dense()
    assert (draws.mT @ draws / 5000 - dense).norm() < 0.1 * dense.norm()


def test_gaussian_of_each_output():
    variance = torch.tensor([0.5, 1.0, 2.0])
    net, x = nn.Linear(2, 3), torch.randn(5, 2)
    options = {"likelihood": Gaussian(variance)}
    dense = ng.FIM(net, x, "dense", **options).to_dense()
    for representation in ("implicit", "factored"):
        close_operator(ng.FIM(net, x, representation, **options), dense)
