"""What surrounds a call: autocast, inference mode, sparse tensors, devices without float64."""

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
