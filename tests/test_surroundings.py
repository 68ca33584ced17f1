"""What surrounds a call: autocast, inference mode, sparse tensors, devices without float64."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import nngeo_lazy as ng

REPRESENTATIONS = ("dense", "block_diagonal", "diagonal", "kfac", "ekfac", "low_rank", "factored")


def small(dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
    return model, torch.randn(12, 4, dtype=dtype), torch.randint(3, (12,))


@pytest.mark.parametrize("representation", [*REPRESENTATIONS, "implicit"])
def test_autocast_is_for_the_model_alone(representation):
    """The same numbers as with a model that is in autocast itself, in float32."""
    model, x, y = small()

    def forward(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return model(batch[0])

    options = {"likelihood": "categorical"}
    want = ng.FIM(model, (x, y), representation, forward=forward, **options)
    with torch.autocast("cpu", torch.bfloat16):
        F = ng.FIM(model, (x, y), representation, **options)
    assert F.dtype == torch.float32
    assert torch.equal(F.diagonal(), want.diagonal())


def test_inference_mode():
    model, x, y = small()
    want = ng.Laplace(model, ng.FIM(model, (x, y), likelihood="categorical"))
    with torch.inference_mode():
        la = ng.Laplace(model, ng.FIM(model, (x, y), likelihood="categorical"))
        found = la.functional(x)
        probabilities = la.predictive(x)
    assert torch.equal(found.mean, want.functional(x).mean)
    assert torch.equal(found.covariance, want.functional(x).covariance)
    assert torch.equal(probabilities, want.predictive(x))


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
@pytest.mark.parametrize("representation", REPRESENTATIONS)
def test_sparse_inputs(representation, layout):
    model, x, y = small(torch.float64)
    x = x * (x > 0)
    options = {"likelihood": "categorical"}
    want = ng.FIM(model, (x, y), representation, **options).to_dense()
    sparse = x.to_sparse() if layout is torch.sparse_coo else x.to_sparse_csr()
    F = ng.FIM(model, (sparse, y), representation, **options)
    assert torch.allclose(F.to_dense(), want)


class Bag(nn.Module):
    def __init__(self, sparse, bag):
        super().__init__()
        self.e = (nn.EmbeddingBag if bag else nn.Embedding)(7, 4, sparse=sparse)
        self.a = nn.Linear(4, 2)

    def forward(self, x):
        h = self.e(x)
        return self.a(h if h.dim() == 2 else h.mean(1))


@pytest.mark.parametrize("bag", [False, True])
def test_sparse_gradients(bag):
    torch.manual_seed(0)
    one, other = Bag(True, bag).double(), Bag(False, bag).double()
    other.load_state_dict(one.state_dict())
    x, y = torch.randint(7, (6, 3)), torch.randint(2, (6,))
    for representation in (*REPRESENTATIONS, "quasi_diagonal", "implicit"):
        if bag and representation == "implicit":
            continue  # torch has no second derivative of a bag
        F, G = (ng.FIM(m, (x, y), representation, likelihood="categorical") for m in (one, other))
        assert torch.allclose(F.diagonal(), G.diagonal())
    if not bag:
        H, K = (ng.Hessian(m, (x, y), loss="categorical") for m in (one, other))
        assert torch.allclose(H.to_dense(), K.to_dense())
    assert one.e.sparse


class Narrow(TorchDispatchMode):
    """A device without float64."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        wide = (torch.float64, torch.complex128)
        if any(isinstance(leaf, torch.Tensor) and leaf.dtype in wide for leaf in tree_leaves(out)):
            raise TypeError("Cannot convert to float64 on this device")
        return out


def test_a_device_without_float64():
    model, x, y = small()
    data, options = (x, y), {"likelihood": "categorical"}
    F = ng.FIM(model, data, **options)
    H = ng.Hessian(model, data, loss="categorical")
    K = ng.NTK(model, x)
    v = torch.linspace(-1, 1, 43)
    step = F.solve(v, damping=0.1)
    with Narrow():
        for representation in REPRESENTATIONS:
            G = ng.FIM(model, data, representation, **options)
            assert torch.allclose(G @ v, ng.FIM(model, data, representation, **options) @ v)
        assert torch.allclose(F.solve(v, damping=0.1), step, rtol=1e-4)
        assert torch.allclose(ng.Hessian(model, data, loss="categorical") @ v, H @ v, atol=1e-6)
        assert torch.allclose(ng.NTK(model, x).to_dense(), K.to_dense(), rtol=1e-4)
        assert bool(ng.Laplace(model, F).predictive(x).isfinite().all())
        ng.FIM(model, data, estimator="mc", seed=0, **options)
        for representation in ("kfac", "implicit"):
            optimizer = ng.optim.NaturalGradient(model, representation, "categorical", lr=0.1)
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()


# --- the default device and dtype -----------------------------------------------------------------

CALLS = {
    "product": lambda F, b: F @ b,
    "solve": lambda F, b: F.solve(b, damping=0.1),
    "logdet": lambda F, b: F.damped(0.1).logdet(),
    "diagonal": lambda F, b: F.diagonal(),
    "dense": lambda F, b: F.to_dense(),
    "entries": lambda F, b: F[[1, 2], [0, 3]],
    "eigsh": lambda F, b: ng.eigsh(F, 3, seed=0).eigenvalues,
    "svds": lambda F, b: ng.svds(F, 2, seed=0).S,
    "sample": lambda F, b: F.damped(0.1).inverse().sample(2, seed=0),
    "trace": lambda F, b: ng.trace(F, method="xtrace", probes=6, seed=0).value,
    "density": lambda F, b: ng.spectral_density(F, seed=0)[1],
}


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize("default", ["device", "dtype"])
@pytest.mark.parametrize("representation", [*REPRESENTATIONS, "quasi_diagonal", "implicit"])
def test_the_default_device_and_dtype_say_nothing(representation, default):
    model, x, y = small(torch.float64)

    def numbers():
        F = ng.FIM(model, (x, y), representation, estimator="mc", seed=0)
        b = torch.ones(len(F.space), dtype=torch.float64, device="cpu")
        return {name: call(F, b) for name, call in CALLS.items()}

    want = numbers()
    # a tensor that leaves its device or its dtype open is of no use here
    with default_dtype(torch.float16) if default == "dtype" else torch.device("meta"):
        found = numbers()
    for name, value in found.items():
        assert value.dtype == want[name].dtype, name
        torch.testing.assert_close(value, want[name], rtol=1e-9, atol=1e-9, msg=name)


def test_an_optimizer_with_another_default_device():
    ends = []
    for default in ("cpu", "meta"):
        model, x, y = small()
        optimizer = ng.optim.NaturalGradient(model, seed=0)
        with torch.device(default):
            for _ in range(3):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*ends)


# --- parameters without entries -------------------------------------------------------------------


class WithEmpty(nn.Module):
    """Besides a layer: nn.Linear(0, 3), nn.Linear(3, 0) or a parameter that has no entry."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.layer = kind, nn.Linear(4, 3)
        self.into, self.out = nn.Linear(0, 3), nn.Linear(3, 0)
        self.own = nn.Parameter(torch.empty(0))

    def forward(self, x):
        h = self.layer(x)
        if self.kind == "into":
            return h + self.into(x[:, :0])
        return torch.cat([h, self.out(h)], 1) if self.kind == "out" else h + self.own.sum()


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("kind", ["into", "out", "own"])
def test_parameters_without_entries_have_no_part(kind):
    torch.manual_seed(0)
    model, x, y = WithEmpty(kind).double(), torch.randn(9, 4).double(), torch.randint(3, (9,))
    plain = ng.FIM(model, (x, y), "dense", params="layer").to_dense()
    for representation in [*REPRESENTATIONS, "quasi_diagonal", "implicit"]:
        F = ng.FIM(model, (x, y), representation)
        assert set(F.space.names) <= {"layer.weight", "layer.bias", "into.bias"}
        b = torch.ones(len(F.space), dtype=torch.float64)
        torch.testing.assert_close(F.damped(0.1) @ F.solve(b, damping=0.1), b)
        assert len(str(F.report()).splitlines()) == 1 + len(F.space.names)
    G = ng.FIM(model, (x, y), "dense").block("layer").to_dense()
    torch.testing.assert_close(G, plain)
    optimizer = ng.optim.NaturalGradient(model, seed=0)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
