"""Matrix-free operators as values: gradients, modes, memory, and what is refused."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import nngeo_lazy as ng
from nngeo_lazy.derivatives import engines, products
from nngeo_lazy.errors import (
    DataError,
    NonFiniteError,
    SpaceMismatchError,
    StochasticModelError,
    TooLargeError,
    UnsupportedLayerError,
)
from nngeo_lazy.representations import Implicit, Mixed
from nngeo_lazy.testing import LargestTensor, check_operator

import zoo
from cases import close

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
]


def small():
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))


def data(n=5):
    return torch.randn(n, 2), torch.randint(2, (n,))


# --- every member ---------------------------------------------------------------------------------


@pytest.mark.parametrize("representation", ["implicit", "factored"])
def test_every_member(representation):
    F = ng.FIM(small(), data(40), representation)
    check_operator(F, F.to_dense())
    damped = F.damped(0.1)
    check_operator(damped, F.to_dense() + 0.1 * torch.eye(17))


def test_every_member_in_sample_space():
    x = torch.randn(3, 2)
    F = ng.FIM(small(), x, "factored", likelihood="gaussian")
    damped = F.damped(0.1)
    assert damped.in_sample_space
    assert not damped.iterates
    check_operator(damped, F.to_dense() + 0.1 * torch.eye(17))


def test_every_member_of_a_hessian():
    H = ng.Hessian(small(), data(), loss="categorical")
    dense = H.to_dense()
    check_operator(H, dense)
    check_operator(H.damped(3.0), dense + 3 * torch.eye(17), positive_definite=True)


@pytest.mark.parametrize("representation", ["implicit", "factored", "dense"])
def test_every_member_of_a_jacobian(representation):
    J = ng.Jacobian(small(), torch.randn(4, 2), representation)
    check_operator(J, J.to_dense(), symmetric=False)
    check_operator(J.mT, J.to_dense().mT, symmetric=False)


# --- gradients ------------------------------------------------------------------------------------

BUILDERS = {
    "exact": lambda net, batch, engine: ng.FIM(net, batch, engine),
    "empirical": lambda net, batch, engine: ng.FIM(net, batch, engine, estimator="empirical"),
    "ggn": lambda net, batch, engine: ng.GGN(net, batch, engine, loss=lambda f, y: f.exp().sum(1)),
    "hessian": lambda net, batch, engine: ng.Hessian(net, batch, engine, loss="categorical"),
    "jacobian": lambda net, batch, engine: ng.Jacobian(net, batch, engine),
    "transposed": lambda net, batch, engine: ng.Jacobian(net, batch, engine, center=True),
}


@pytest.mark.parametrize("mode", engines.MODES)
@pytest.mark.parametrize("name", BUILDERS)
def test_gradients(name, mode):
    """In the vector and in the parameters, twice; a kept graph gives the same ones."""
    net, batch = small(), data(3)
    F = BUILDERS[name](net, batch, Implicit(mode))
    w = F.space.values(net).detach().requires_grad_()
    transposed = name == "transposed"
    v = torch.randn(F.shape[0] if transposed else F.shape[1], requires_grad=True)

    def product(v, w):
        here = F.at(w)
        return (here.mT if transposed else here) @ v

    assert torch.autograd.gradcheck(product, (v, w))
    assert torch.autograd.gradgradcheck(product, (v, w))
    close(torch.func.vmap(lambda v: product(v, w))(v.expand(3, -1))[2], product(v, w))
    (found,) = torch.autograd.grad(product(v, w).square().sum(), w)
    close(torch.func.grad(lambda w: product(v.detach(), w).square().sum())(w.detach()), found)
    tangents = (torch.randn_like(v), torch.randn_like(w))
    _, along = torch.func.jvp(product, (v.detach(), w.detach()), tangents)
    step = 1e-6
    ahead, behind = (
        product(v.detach() + s * tangents[0], w.detach() + s * tangents[1]) for s in (step, -step)
    )
    close(along, (ahead - behind) / (2 * step), 1e-6)


@pytest.mark.parametrize("name", ["exact", "hessian"])
def test_gradients_of_solves(name):
    net, batch = small(), data(4)
    F = BUILDERS[name](net, batch, "implicit")
    w = F.space.values(net).detach().requires_grad_()
    v = torch.randn(17, requires_grad=True)
    d = torch.tensor(3.0, requires_grad=True)

    def solution(v, w, d):
        return F.at(w).solve(v, damping=d, tol=1e-14)

    assert torch.autograd.gradcheck(solution, (v, w, d))
    assert torch.autograd.gradgradcheck(solution, (v, w, d))
    close(torch.func.vmap(lambda v: solution(v, w, d))(v.expand(2, -1))[1], solution(v, w, d))
    assert torch.func.grad(lambda v: solution(v, w.detach(), d.detach()).sum())(v.detach()).any()


def test_at():
    net, batch = small(), data()
    F = ng.FIM(net, batch, "implicit")
    other = copy.deepcopy(net)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.3)
    expected = ng.FIM(other, batch, "dense").to_dense()
    close(F.at(other).to_dense(), expected)
    close(F.at(F.space.values(other)).to_dense(), expected)
    close(F.at(dict(other.named_parameters())).to_dense(), expected)
    close(F.at(other).diagonal(), expected.diagonal())
    # attached to the module: a penalty on curvature trains it
    F.at(other).vTMv(torch.ones(17)).backward()
    assert all(p.grad is not None for p in other.parameters())
    # and a differentiable diagonal comes from products
    w = F.space.values(other).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda w: F.at(w).diagonal(), (w,))
    with pytest.raises(SpaceMismatchError, match=r"shape \(17,\)"):
        F.at(torch.ones(3))
    with pytest.raises(UnsupportedLayerError, match="build it with the representation 'implicit'"):
        ng.FIM(net, batch, "kfac").at(other)


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix, self.norm = nn.MultiheadAttention(4, 2, batch_first=True), nn.LayerNorm(4)
        self.inner, self.head = nn.Linear(2, 4), nn.Linear(4, 2)

    def forward(self, x):
        h = self.inner(x).unsqueeze(1).expand(-1, 3, -1).cumsum(1)
        return self.head(nn.functional.gelu(self.norm(h + self.mix(h, h, h)[0]))).mean(1)


THIRD_ORDER = {
    "layer_norm": lambda: nn.Sequential(
        nn.Linear(2, 4), nn.LayerNorm(4), nn.GELU(), nn.Linear(4, 2)
    ),
    "group_norm": lambda: nn.Sequential(
        nn.Linear(2, 4), nn.GroupNorm(2, 4), nn.SiLU(), nn.Linear(4, 2)
    ),
    "rms_norm": lambda: nn.Sequential(nn.Linear(2, 4), nn.RMSNorm(4), nn.Tanh(), nn.Linear(4, 2)),
    "instance_norm": lambda: nn.Sequential(
        nn.Linear(2, 6),
        nn.Unflatten(1, (2, 3)),
        nn.InstanceNorm1d(2, affine=True),
        nn.ELU(),
        nn.Flatten(),
        nn.Linear(6, 2),
    ),
    "convolution": lambda: nn.Sequential(
        nn.Linear(2, 6), nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 2, 2), nn.Mish(), nn.Flatten()
    ),
    "weight_norm": lambda: nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(2, 4)), nn.Softplus(), nn.Linear(4, 2)
    ),
    "attention": lambda: Attending(),
    "lstm": lambda: LSTM(),
}


@pytest.mark.parametrize("name", THIRD_ORDER)
def test_third_derivatives(name):
    """torch's own are wrong for some norms; here they are those of finite differences."""
    net, (x, y) = THIRD_ORDER[name](), data(3)
    x = x.unsqueeze(1).expand(-1, 3, -1).cumsum(1) if name == "lstm" else x
    y = torch.randint(4, (3,)) if name == "convolution" else y
    for F in (
        ng.FIM(net, (x, y), "implicit"),
        ng.Hessian(net, (x, y), loss="categorical"),
        ng.Jacobian(net, (x, y)),
    ):
        w = F.space.values(net).detach().requires_grad_()
        u, v, t = torch.randn(F.shape[0]), torch.randn(F.shape[1]), torch.randn_like(w)
        (found,) = torch.autograd.grad(u @ (F.at(w) @ v), w)
        step = 1e-5 * t
        ahead, behind = (u @ (F.at(w.detach() + s * step) @ v) for s in (1, -1))
        torch.testing.assert_close(found @ t, (ahead - behind) / 2e-5, rtol=1e-5, atol=1e-7)
    H = ng.Hessian(net, (x, y), loss="categorical")

    def gradient(w):
        w = w.detach().requires_grad_()
        outputs = torch.func.functional_call(net, H.space.unravel(w), (x,))
        return torch.autograd.grad(nn.functional.cross_entropy(outputs, y), w)[0]

    difference = (gradient(w + step) - gradient(w - step)) / 2e-5
    torch.testing.assert_close(H @ t, difference, rtol=1e-5, atol=1e-7)


def test_mc_has_no_derivative_in_the_parameters():
    net, batch = small(), data()
    F = ng.FIM(net, batch, "implicit", estimator="mc", seed=0)
    v = torch.randn(17, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: F @ v, (v,))
    w = F.space.values(net).detach().requires_grad_()
    with pytest.raises(UnsupportedLayerError, match="an 'mc' matrix has no derivative"):
        (F.at(w) @ torch.ones(17)).sum().backward()


# --- modes ----------------------------------------------------------------------------------------


class LSTM(nn.Module):
    """In float32 its CPU kernel has no forward mode."""

    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(2, 3, batch_first=True), nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


class Once(torch.autograd.Function):
    """Differentiable once in reverse mode, and not in forward mode."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * x * g


class OneWay(nn.Linear):
    def forward(self, x):
        return Once.apply(super().forward(x))


def test_modes_that_a_model_lacks():
    """auto finds the other one; a mode that was asked for says which it is."""
    lstm, x = LSTM().float(), torch.randn(4, 3, 2, dtype=torch.float32)
    padded, index = zoo.gpt().model, zoo.gpt().batch
    index[0, 0] = 0
    for net, batch, lacking in (
        (lstm, x, "forward_over_reverse"),
        (padded, index, "forward_over_reverse"),  # the gradient of padding is no derivative
    ):
        auto = ng.Jacobian(net, batch, Implicit(cache=False))
        H = ng.Hessian(net, batch, loss="output")
        u, v = torch.randn(2, H.shape[0], dtype=H.dtype)
        torch.testing.assert_close(u @ (H @ v), v @ (H @ u), rtol=1e-4, atol=1e-4)
        v = torch.ones(auto.shape[1], dtype=auto.dtype)
        other = ng.Jacobian(net, batch, Implicit("double_vjp"))
        torch.testing.assert_close(auto @ v, other @ v)
        with pytest.raises(UnsupportedLayerError, match=r"take Implicit\(mode='double_vjp'\)"):
            ng.Jacobian(net, batch, Implicit(lacking)) @ v
    stuck = ng.Jacobian(OneWay(2, 2), torch.randn(3, 2))
    with pytest.raises(UnsupportedLayerError, match="structured representation such as 'kfac'"):
        stuck @ torch.ones(6)


@pytest.mark.parametrize("mode", engines.MODES)
def test_attention_needs_nothing(mode):
    """scaled_dot_product_attention, and a layer whose eval mode is one fused kernel."""
    for name in ("self_attention", "transformer"):
        net = getattr(zoo, name)()
        fused = torch.backends.mha.get_fastpath_enabled()
        F = ng.FIM(net.model, net.batch, Implicit(mode), likelihood="gaussian", forward=net.forward)
        dense = ng.FIM(net.model, net.batch, "dense", likelihood="gaussian", forward=net.forward)
        v = torch.randn(F.shape[0])
        close(F @ v, dense.to_dense() @ v, 1e-9)
        H = ng.Hessian(net.model, net.batch, Implicit(mode), loss="output", forward=net.forward)
        u = torch.randn(F.shape[0])
        torch.testing.assert_close(u @ (H @ v), v @ (H @ u))
        assert torch.backends.mha.get_fastpath_enabled() == fused


@pytest.mark.parametrize("mode", engines.MODES)
@pytest.mark.parametrize("name", ["convolutions", "conv_transpose", "conv3d", "conv1d", "norms"])
def test_layers_are_linearised_exactly(name, mode):
    net = getattr(zoo, name)()
    J = ng.Jacobian(net.model, net.batch, Implicit(mode), forward=net.forward)
    dense = ng.Jacobian(net.model, net.batch, "dense", forward=net.forward).to_dense()
    close(J.to_dense(), dense, 1e-9)
    close(J.mT.to_dense(), dense.mT, 1e-9)


def test_kept_linearisation():
    """Forward mode that is traced once."""
    net, batch = small(), data()
    dense = ng.FIM(net, batch, "dense").to_dense()
    F = ng.FIM(net, batch, Implicit("forward_over_reverse", True))
    for _ in range(2):
        close(F.to_dense(), dense, 1e-9)
    H = ng.Hessian(net, batch, Implicit("forward_over_reverse", True), loss="categorical")
    close(H.to_dense(), ng.Hessian(net, batch, loss="categorical").to_dense(), 1e-9)


def test_autocast():
    """A model that computes in bfloat16 inside is not taken for one with wrong derivatives."""

    class Autocast(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm, self.b = nn.Linear(8, 64), nn.LayerNorm(64), nn.Linear(64, 3)

        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.b(torch.tanh(self.norm(self.a(x)))).float()

    net, x = Autocast().float(), torch.randn(50, 8, dtype=torch.float32)
    dense = ng.Jacobian(net, x, "dense")
    v = torch.randn(dense.shape[1], dtype=torch.float32)
    for mode in engines.MODES:
        J = ng.Jacobian(net, x, Implicit(mode))
        close(J @ v, dense @ v, 0.03)
        close(J.mT @ (J @ v), dense.mT @ (dense @ v), 0.03)


class WrongBackward(torch.autograd.Function):
    """Its backward pass is that of something else, without a way through for u."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * x * g.detach() + 0.1 * g


def test_wrong_derivatives_are_found():
    class Wrong(nn.Linear):
        def forward(self, x):
            return WrongBackward.apply(super().forward(x))

    with pytest.raises(UnsupportedLayerError, match="is not the transpose of the gradient"):
        ng.Jacobian(Wrong(2, 2), torch.randn(3, 2)) @ torch.ones(6)


def test_forms_past_the_limit(monkeypatch):
    monkeypatch.setattr("nngeo_lazy.representations.form_stack.MAX_BLOCK_BYTES", 100)
    with pytest.raises(TooLargeError, match="estimator='mc' or 'empirical'"):
        ng.FIM(small(), data(), "factored")


@pytest.mark.parametrize("chunk_size", [None, 1, 2, 100])
def test_columns(chunk_size):
    net, batch = small(), data()
    dense = ng.FIM(net, batch, "dense").to_dense()
    V = torch.randn(17, 5)
    close(ng.FIM(net, batch, Implicit(chunk_size=chunk_size)) @ V, dense @ V, 1e-9)


def test_columns_that_vmap_cannot_follow():
    class Reading(nn.Linear):
        """Its backward pass reads a number, which vmap refuses."""

        def forward(self, x):
            out = super().forward(x)
            if out.requires_grad:
                out.register_hook(lambda g: g * (1.0 if g.sum().item() < 1e300 else 2.0))
            return out

    net, x = Reading(2, 2), torch.randn(3, 2)
    F = ng.FIM(net, x, Implicit(chunk_size=4), likelihood="gaussian")
    V = torch.randn(6, 4)
    plain = nn.Linear(2, 2)
    plain.load_state_dict(net.state_dict())
    close(F @ V, ng.FIM(plain, x, "dense", likelihood="gaussian").to_dense() @ V, 1e-9)


# --- caches and memory ----------------------------------------------------------------------------


def passes_of(F):
    """How many batches a product reads."""
    seen = []
    original = F.source.network.__class__.__call__

    def counted(self, parameters, raw):
        seen.append(1)
        return original(self, parameters, raw)

    F.source.network.__class__.__call__ = counted
    try:
        F @ torch.ones(F.shape[1], dtype=F.dtype)
    finally:
        F.source.network.__class__.__call__ = original
    return len(seen)


def test_cache_all_or_nothing(monkeypatch):
    net, (x, y) = small(), data(9)
    loader = DataLoader(TensorDataset(x, y), batch_size=3, shuffle=True)
    batches = [(x[:3], y[:3]), (x[3:6], y[3:6]), (x[6:], y[6:])]
    dense = ng.FIM(net, (x, y), "dense").to_dense()
    one = ng.FIM(net, (x[:3], y[:3]), "implicit")
    _ = one @ torch.ones(17)
    graph = one.memory.graph_bytes
    for given in (loader, batches):
        F = ng.FIM(net, given, "implicit")
        assert passes_of(F) == 3
        assert passes_of(F) == 0
        close(F.to_dense(), dense, 1e-9)
    monkeypatch.setattr(products, "CACHE_BYTES", 2 * graph + graph // 2)
    F = ng.FIM(net, loader, "implicit")
    assert passes_of(F) == 3
    assert passes_of(F) >= 3  # one batch did not fit: nothing is kept
    assert not F.memory._kept
    close(F.to_dense(), dense, 1e-9)
    F = ng.FIM(net, batches, "implicit")
    assert passes_of(F) == 3
    assert passes_of(F) == 1  # held in a list, the first two stay
    close(F.to_dense(), dense, 1e-9)
    assert passes_of(ng.FIM(net, batches, Implicit(cache=False))) >= 3


def test_graphs_are_freed_and_bounded():
    net, (x, y) = small(), data(9)
    F = ng.FIM(net, (x, y), "implicit")
    v = torch.randn(17)
    F @ v
    graph = weakref.ref(F.memory._kept[0][0])
    for _ in range(3):
        F @ v
    assert len(F.memory._kept) == 1
    elsewhere = F.at(F.parameters + 1)
    elsewhere @ v
    assert F.memory._kept[0][0] is graph()  # another point has a memory of its own
    del F, elsewhere
    gc.collect()
    assert graph() is None


def resident():
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmRSS"))


@pytest.mark.parametrize("cache", [True, False])
def test_a_hundred_products_leave_memory_flat(cache):
    net = nn.Sequential(nn.Linear(200, 300), nn.Tanh(), nn.Linear(300, 10)).float()
    x = torch.randn(500, 200, dtype=torch.float32)
    F = ng.FIM(net, x, Implicit(cache=cache), likelihood="gaussian")
    v = torch.randn(F.shape[0], dtype=torch.float32)
    for _ in range(10):
        F @ v
    gc.collect()
    before = resident()
    for _ in range(100):
        F @ v
    gc.collect()
    assert resident() - before < 2**23


@pytest.mark.parametrize("mode", engines.MODES)
def test_no_jacobian_is_formed(mode):
    """Nothing of N C P numbers, in products; and nothing of P^2 in solves, traces or draws."""
    net = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 10))
    x = torch.randn(32, 20)
    for cache in (True, False) if mode == "double_vjp" else (False,):
        F = ng.FIM(net, x, Implicit(mode, cache), likelihood="categorical", params="0.*")
        J = ng.Jacobian(net, x, Implicit(mode, cache))
        H = ng.Hessian(net, (x, torch.zeros(32).long()), Implicit(mode, cache), loss="categorical")
        with LargestTensor() as spy:
            F @ torch.randn(F.shape[0])
            J @ torch.randn(J.shape[1])
            J.mT @ torch.randn(J.shape[0])
            H @ torch.randn(H.shape[0])
            F.solve(torch.randn(F.shape[0]), damping=0.1)
            F.sample(1)
            F.inverse(damping=1.0).sample(1)
        assert spy.numel <= 4 * max(F.shape[0], 32 * 30), spy.operation
        with LargestTensor() as spy:
            F.trace()
            F.diagonal()
        assert spy.numel < F.shape[0] * 10 * 32, spy.operation


def peak_without_cache(count):
    """The numbers that are alive at once in a product over so many batches, at most."""
    net = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 10))
    x = torch.randn(count, 64, 20)
    F = ng.FIM(net, [(b,) for b in x], Implicit("double_vjp", False), likelihood="gaussian")
    v = torch.randn(F.shape[0])
    peak = 0
    with engines.kept_bytes() as alive:
        for jacobian, metric in F._map()._linearised(F.parameters, "double_vjp", False):
            jacobian.vjp(metric.product(jacobian.jvp(F._map()._split(v))))
            peak = max(peak, alive())
    return peak


def test_memory_does_not_grow_with_batches():
    assert peak_without_cache(12) <= 1.2 * peak_without_cache(3)


def test_outputs_are_kept_once():
    """A kept graph has one tensor of the size of the outputs, not their cotangent as well."""
    net, x = nn.Linear(4, 5000, bias=False), torch.randn(100, 4)
    outputs = 100 * 5000 * 8
    F = ng.FIM(net, x, "implicit", likelihood="gaussian")
    F @ torch.ones(F.shape[0])
    assert F.memory.graph_bytes < 1.2 * outputs + 2 * F.shape[0] * 8


# --- values ---------------------------------------------------------------------------------------


class Scaled(nn.Module):
    """With a buffer, a frozen parameter, and a mode that matters."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2, 2)
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.register_buffer("scale", torch.tensor(2.0))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return torch.tanh(self.fc(x)) * self.scale * self.frozen * (2 if self.training else 1)


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("representation", ["implicit", "factored", "hessian", "jacobian"])
def test_an_operator_does_not_change(representation, cache):
    net, batch = Scaled().eval(), data()
    engine = Implicit(cache=cache)
    build = {
        "implicit": lambda: ng.FIM(net, batch, engine),
        "factored": lambda: ng.FIM(net, batch, "factored"),
        "hessian": lambda: ng.Hessian(net, batch, engine, loss="categorical"),
        "jacobian": lambda: ng.Jacobian(net, batch, engine),
    }[representation]
    F = build()
    before = F.to_dense()
    diagonal = F.diagonal() if F.is_square else None
    state = copy.deepcopy(net.state_dict())
    optimizer = torch.optim.Adam(net.fc.parameters(), lr=0.5)
    optimizer.zero_grad()
    net(batch[0]).square().sum().backward()
    optimizer.step()
    net.train()
    with torch.no_grad():
        net.scale.mul_(3)
    during = {name: t.clone() for name, t in net.state_dict().items()}
    close(F.to_dense(), before, 1e-12)
    if F.is_square:
        close(F.diagonal(), diagonal, 1e-12)
    assert net.training
    assert net.fc.training
    for name, t in net.state_dict().items():
        assert torch.equal(t, during[name]), name
    net.load_state_dict(state)
    net.eval()
    if representation in ("implicit", "hessian"):
        with torch.no_grad():
            net.frozen.mul_(2)
        if not cache:
            with pytest.raises(DataError, match=r"\['frozen'\] changed since: build again"):
                F @ torch.ones(6)


def test_grad_flags_and_gradients_are_left_alone():
    net, batch = small(), data()
    net[0].bias.requires_grad_(False)
    F = ng.FIM(net, batch, "implicit")
    assert F.space.names == ("0.weight", "2.weight", "2.bias")
    F @ torch.ones(F.shape[0])
    F.diagonal()
    assert [p.requires_grad for p in net.parameters()] == [True, False, True, True]
    assert all(p.grad is None for p in net.parameters())
    with torch.no_grad():
        assert not (F @ torch.ones(F.shape[0])).requires_grad
    with torch.inference_mode():
        close(F @ torch.ones(F.shape[0]), F.to_dense() @ torch.ones(F.shape[0]))


def test_moved():
    net, (x, y) = small().float(), data()
    F = ng.FIM(net, (x.float(), y), "implicit")
    wide = F.to(torch.float64)
    expected = ng.FIM(small_like(net).double(), (x.float().double(), y), "dense").to_dense()
    close(wide.to_dense(), expected, 1e-12)
    close(wide.diagonal(), expected.diagonal(), 1e-12)
    B = ng.FIM(net, (x.float(), y), "factored").to(torch.float64)
    close(B.to_dense(), expected, 1e-5)


def small_like(net):
    other = small()
    other.load_state_dict(net.state_dict())
    return other


def test_dtypes():
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 5e-2)):
        net, (x, y) = small().to(dtype), data()
        F = ng.FIM(net, (x.to(dtype), y), "implicit")
        wide = ng.FIM(small_like(net), (x.to(dtype).double(), y), "dense").to_dense()
        v = torch.randn(17).to(dtype)
        product = F @ v
        assert product.dtype == dtype
        close(product.double(), wide @ v.double(), tolerance)


def test_reports_and_files():
    F = ng.FIM(small(), data(), "implicit")
    assert [row.block for row in F.report()] == ["matrix-free"] * 4
    assert "matrix-free" in str(ng.plan(ng.FIM, small(), data(), "implicit"))
    planned = ng.plan(ng.FIM, small(), data(), "factored")
    built = ng.FIM(small(), data(), "factored").report()
    assert planned.bytes == built.bytes
    with pytest.raises(UnsupportedLayerError, match="holds a network and its data"):
        F.state_dict()
    with pytest.raises(UnsupportedLayerError, match="build it again"):
        ng.FIM(small(), data(), "factored").state_dict()


# --- bad input ------------------------------------------------------------------------------------


class Noisy(nn.Linear):
    def forward(self, x):
        return super().forward(x) + torch.randn(x.shape[0], 2)


def test_random_models():
    with pytest.raises(StochasticModelError, match="two forward passes of the same batch differ"):
        ng.FIM(Noisy(2, 2), data(), "implicit")
    ng.FIM(Noisy(2, 2), data(), Implicit(check=False))
    with pytest.raises(StochasticModelError, match=r"call model.eval\(\) first"):
        ng.Hessian(nn.Sequential(nn.Linear(2, 2), nn.Dropout()), data(), loss="categorical")


def test_outputs_without_a_derivative():
    class Detached(nn.Linear):
        def forward(self, x):
            return super().forward(x).detach()

    for builder, options in ((ng.FIM, {}), (ng.Hessian, {"loss": "categorical"})):
        with pytest.raises(DataError, match="do not depend on any selected parameter"):
            builder(Detached(2, 2), data(), "implicit", **options)


def test_integer_parameters():
    net = small()
    net.register_parameter("count", nn.Parameter(torch.tensor([1]), requires_grad=False))
    with pytest.raises(DataError, match=r"floating-point parameters, but \['count'\] are not"):
        ng.FIM(net, data(), "implicit", params="count")


def test_loaders():
    net, (x, y) = small(), data(6)

    class Once:
        def __init__(self):
            self.left = [(x, y)]

        def __iter__(self):
            while self.left:
                yield self.left.pop()

    class Shrinking:
        def __init__(self):
            self.count = 4

        def __iter__(self):
            self.count -= 1
            yield from [(x, y)] * self.count

    with pytest.raises(DataError, match="gave none the second time"):
        ng.FIM(net, Once(), "implicit") @ torch.ones(17)
    with pytest.raises(DataError, match="expected the 3 batches of the first pass on every pass"):
        ng.FIM(net, Shrinking(), "implicit") @ torch.ones(17)
    shuffling = DataLoader(TensorDataset(x, y), shuffle=True)
    with pytest.raises(DataError, match="the loader shuffles: pass shuffle=False"):
        ng.FIM(net, shuffling, "implicit", estimator="mc")


def test_targets_and_options():
    net, (x, y) = small(), data()
    with pytest.raises(DataError, match="need observed labels"):
        ng.Hessian(net, x, loss="gaussian")
    with pytest.raises(DataError, match="expected labels from 0 to 1"):
        ng.Hessian(net, (x, y + 5), loss="categorical")
    with pytest.raises(DataError, match="'implicit', 'dense', got 'kfac'"):
        ng.Hessian(net, (x, y), "kfac", loss="categorical")
    with pytest.raises(DataError, match="take Hessian"):
        ng.GGN(net, x, loss="output")
    with pytest.raises(DataError, match="no part of Mixed"):
        ng.FIM(net, (x, y), Mixed("kfac", {"0.*": "implicit"}))
    for options, message in (
        ({"mode": "fast"}, "expected mode 'auto' or one of"),
        ({"cache": "some"}, "expected cache 'auto', True or False"),
        ({"chunk_size": 0}, "expected chunk_size to be a positive integer"),
    ):
        with pytest.raises(DataError, match=message):
            Implicit(**options)


def test_not_finite():
    net, (x, y) = small(), data()
    with torch.no_grad():
        net[0].bias[0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"'0.bias'\] hold NaN"):
        ng.FIM(net, (x, y), "implicit")
    x[0] = float("inf")
    with pytest.raises(NonFiniteError, match="expected finite outputs"):
        ng.FIM(small(), (x * float("nan"), y), "implicit")
