"""Which form each layer takes, layers of one's own, and factors by their definition."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import nngeo_lazy as ng
from nngeo_lazy import Grid, Use, register_layer
from nngeo_lazy.errors import UnsupportedLayerError
from nngeo_lazy.jacobian import registry
from nngeo_lazy.likelihoods import Gaussian
from nngeo_lazy.representations import KFAC

import oracle
import zoo
from cases import close

pytestmark = pytest.mark.usefixtures("float64")


@pytest.fixture
def register():
    """`register_layer` for one test."""
    made = []

    def add(target, form, **options):
        made.append(target)
        made.append(register_layer(target, form, **options))
        return made[-1]

    yield add
    for target in made:
        registry._unregister(target)


def fisher(net, representation="dense", **options):
    likelihood = Gaussian(oracle.VARIANCE)
    return ng.FIM(net.model, net.batch, representation, likelihood=likelihood, **options)


def expected(net):
    with torch.no_grad():
        out = torch.cat([oracle.outputs(net.model, net.call, e) for e in net.examples])
    return oracle.fisher(net.model, net.call, net.examples, "gaussian", "exact", out)


def forms(F):
    return {row.parameter: row.form for row in F.report()}


def notes(F):
    return {row.parameter: row.note for row in F.report()}


# --- which form -----------------------------------------------------------------------------------

ATTENTION = "multi_head_attention_forward: outer"
GENERAL = "per example: general"
FORMS = {
    zoo.conv3d: {"0.weight": "conv3d: outer", "2.bias": "conv3d: outer"},
    zoo.conv_transpose: {
        "one.weight": "conv_transpose1d: outer",
        "two.weight": "conv_transpose2d: outer",
        "two.bias": "conv_transpose2d: outer",
        "three.weight": "conv_transpose3d: outer",
    },
    zoo.instance_norm: {
        "own.weight": "instance_norm: rows",
        "own.bias": "instance_norm: rows",
        "tracked.weight": "instance_norm: rows",
    },
    zoo.self_attention: {
        "a.in_proj_weight": ATTENTION,
        "a.in_proj_bias": ATTENTION,
        "a.out_proj.weight": ATTENTION,
        "b.in_proj_weight": ATTENTION,
    },
    zoo.cross_attention: {
        "packed.in_proj_weight": ATTENTION,
        "packed.in_proj_bias": ATTENTION,
        "separate.q_proj_weight": ATTENTION,
        "separate.k_proj_weight": ATTENTION,
        "separate.v_proj_weight": ATTENTION,
        "separate.in_proj_bias": ATTENTION,
        "separate.out_proj.bias": ATTENTION,
        "added.in_proj_weight": ATTENTION,
        "added.bias_k": GENERAL,
    },
    zoo.transformer: {
        "encoder.self_attn.in_proj_weight": ATTENTION,
        "encoder.linear1.weight": "linear: outer",
        "encoder.norm1.weight": "layer_norm: rows",
        "decoder.multihead_attn.in_proj_weight": ATTENTION,
    },
    zoo.prelu: {"1.weight": "prelu: rows", "3.weight": "prelu: rows"},
    zoo.bilinear: {"a.weight": "bilinear: outer", "a.bias": "bilinear: outer"},
    zoo.tied: {"embed.weight": "embedding, linear: summed"},
    zoo.gru: {"rnn.weight_ih_l0": "gru: outer", "out.weight": "linear: outer"},
}


@pytest.mark.parametrize("net", list(FORMS), ids=lambda net: net.__name__)
def test_form(net):
    found = forms(fisher(net(), "kfac"))
    assert {name: found[name] for name in FORMS[net]} == FORMS[net]


def test_fused_attention_is_off_while_recording_only():
    net = zoo.transformer()
    assert torch.backends.mha.get_fastpath_enabled()
    seen = []
    net.model.encoder.register_forward_hook(
        lambda *_: seen.append(torch.backends.mha.get_fastpath_enabled())
    )
    fisher(net, params="decoder.norm3")
    assert seen
    assert not any(seen)
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("chosen", ["a.out_proj.weight", "a.in_proj_bias", "b"])
def test_part_of_an_attention(chosen):
    net = zoo.self_attention()
    whole = expected(net)
    F = fisher(net, params=chosen)
    slices = ng.ParamSpace.of(net.model).slices
    where = torch.cat([torch.arange(len(whole))[slices[name]] for name in F.space.names])
    close(F.to_dense(), whole[where][:, where])
    assert GENERAL not in forms(F).values()


class Attending(nn.Module):
    """Self-attention of one example without a batch dimension, or inside a checkpoint."""

    def __init__(self, way):
        super().__init__()
        self.way = way
        self.mix, self.out = nn.MultiheadAttention(2, 1, batch_first=True), nn.Linear(2, 2)

    def attend(self, x):
        return self.mix(x, x, x, need_weights=False)[0]

    def forward(self, x):
        plain = torch._C._functorch.is_gradtrackingtensor(self.mix.in_proj_weight)
        if self.way == "unbatched":
            h = torch.stack([self.attend(one) for one in x])
        elif plain:
            h = self.attend(x)
        else:
            h = checkpoint(self.attend, x, use_reentrant=False)
        return self.out(h).sum(1)


@pytest.mark.parametrize("way", ["unbatched", "checkpoint"])
def test_attention_without_a_form(way):
    """Its rows are those of the function itself."""
    net = zoo.simple(Attending(way), torch.randn(3, 2, 2))
    F = fisher(net)
    close(F.to_dense(), expected(net))
    assert forms(F)["mix.in_proj_weight"] == "multi_head_attention_forward: rows"
    assert forms(F)["out.weight"] == "linear: outer"


def test_attention_without_gradients():
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix, self.out = nn.MultiheadAttention(2, 1, batch_first=True), nn.Linear(2, 2)

        def forward(self, x):
            with torch.no_grad():
                h = self.mix(x, x, x)[0]
            return self.out(h).sum(1)

    net = zoo.simple(M(), torch.randn(3, 2, 2))
    F = fisher(net)
    assert "do not depend" in notes(F)["mix.in_proj_weight"]
    close(F.to_dense(), expected(net))


def test_unbatched_transposed_convolution_has_no_form():
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.ConvTranspose1d(1, 1, 2)

        def forward(self, x):
            return torch.stack([self.up(one) for one in x]).flatten(1)

    net = zoo.simple(M(), torch.randn(3, 1, 2))
    F = fisher(net)
    close(F.to_dense(), expected(net))
    assert "unbatched" in notes(F)["up.weight"]


def test_one_weight_in_two_kinds_of_layer():
    """As a convolution, as a matrix, and as its transpose: same grids join, others are summed."""

    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.mix = nn.Conv1d(2, 2, 1), nn.Linear(2, 2, bias=False)

        def forward(self, x):  # (N, 2, 3)
            h = torch.tanh(self.conv(x)).mT
            h = torch.tanh(F.linear(h, self.conv.weight.squeeze(-1)))
            h = torch.tanh(self.mix(h)).mT
            return F.conv_transpose1d(h, self.mix.weight.unsqueeze(-1)).flatten(1)

    net = zoo.simple(M(), torch.randn(4, 2, 3))
    close(fisher(net).to_dense(), expected(net))  # reshaped on the way: demoted by the check

    class Same(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2, 2, 3))

        def forward(self, x):
            h = torch.tanh(F.conv1d(x, self.weight, padding=1))
            return F.conv_transpose1d(h, self.weight, padding=1).flatten(1)

    net = zoo.simple(Same(), torch.randn(4, 2, 3))
    Fs = fisher(net)
    close(Fs.to_dense(), expected(net))
    assert forms(Fs) == {"weight": "conv1d, conv_transpose1d: summed"}


# --- factors by their definition ------------------------------------------------------------------


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.ConvTranspose2d(4, 6, (3, 2), stride=2, padding=1, output_padding=1, groups=2),
        lambda: nn.ConvTranspose2d(8, 2, 3, padding=2, dilation=(1, 2)),
    ],
    ids=["groups", "correlations"],
)
def test_factors_of_a_transposed_convolution(layer, sharing):
    layer = layer()
    G, (cin, o, *kernel) = layer.groups, layer.weight.shape
    channels, width = cin // G, cin // G * torch.Size(kernel).numel()
    x = torch.randn(3, cin, 4, 3)
    y = layer(x)
    T = y[0, 0].numel()
    F_ = ng.FIM(
        nn.Sequential(layer, nn.Flatten()), x, KFAC(sharing=sharing), likelihood=Gaussian(1.0)
    )
    (block,) = F_.members
    one_hot = torch.eye(width).reshape(channels, -1, width).mT.reshape(channels, width, *kernel)
    options = (layer.stride, layer.padding, layer.output_padding, G, layer.dilation)
    patches = F.conv_transpose2d(x, one_hot.repeat(G, 1, 1, 1), None, *options)
    A = patches.reshape(3, G, width, T).mT
    A = torch.cat([A, torch.ones(3, G, T, 1)], -1)
    weight = layer.weight.reshape(G, channels, o, -1).transpose(1, 2).flatten(2)  # (G,o,i)
    joint = torch.cat([weight, layer.bias.view(G, o, 1)], -1)
    close((A @ joint.mT).mT.reshape(y.shape), y)  # these are the patches
    # The Gaussian's directions are the unit outputs: g is one at each output and position.
    left, positions = torch.eye(o).expand(G, o, o) * T, T
    if sharing == "reduce":
        A, positions = A.mean(2, keepdim=True), 1
    close(block.left, left)
    close(block.right, torch.einsum("ngti,ngtj->gij", A, A) / (3 * positions))


# --- another package's layers ---------------------------------------------------------------------


@pytest.mark.peers
@pytest.mark.parametrize("name", ["WeightNorm1d", "WeightNorm2d", "Cosine1d", "Affine1d"])
def test_layers_of_nngeometry(name):
    layers = pytest.importorskip("nngeometry.layers")
    if name == "WeightNorm2d":
        body = [layers.WeightNorm2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 2)]
        x = torch.randn(4, 1, 3, 3)
    else:
        own = layers.Affine1d(3) if name == "Affine1d" else getattr(layers, name)(3, 3)
        body = [nn.Linear(3, 3), nn.Tanh(), own, nn.Tanh(), nn.Linear(3, 2)]
        x = torch.randn(4, 3)
    net = zoo.simple(nn.Sequential(*body), x)
    F = fisher(net)
    close(F.to_dense(), expected(net))
    close(fisher(net, "diagonal").diagonal(), expected(net).diagonal())
    assert GENERAL not in forms(F).values()


# --- layers of one's own --------------------------------------------------------------------------


class Affine(nn.Module):
    """weight * x + bias, feature by feature, through an inner function with a form of its own."""

    def __init__(self, d):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(d)), nn.Parameter(torch.randn(d))

    def forward(self, x, gain=2.0):
        return gain * F.linear(x * self.weight, torch.eye(len(self.weight)), self.bias)


class Affine2(Affine):
    pass


def affine(call, output):
    module = call["module"]
    gain = call["gain"]
    return Use(
        module.weight,
        module.bias,
        output.dim() - 1,
        call["x"].detach(),
        rows=lambda x, g: {"weight": gain * (g * x).sum(2), "bias": gain * g.sum(2)},
    )


def refusing(call, output):
    return "not today"


def with_affine(kind=Affine):
    body = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), kind(3), nn.Tanh(), nn.Linear(3, 2))
    return zoo.simple(body, torch.randn(4, 3))


def test_a_module_of_ones_own(register):
    assert register(Affine, affine) is Affine
    for kind in (Affine, Affine2):
        net = with_affine(kind)
        F = fisher(net)
        close(F.to_dense(), expected(net))
        assert forms(F)["2.weight"] == forms(F)["2.bias"] == f"{kind.__name__}: rows"
        assert "forward" not in net.model[2].__dict__
    register(Affine2, refusing)  # the nearest type wins
    F = fisher(net)
    close(F.to_dense(), expected(net))
    assert notes(F)["2.weight"] == "not today"


def test_a_module_is_left_as_it_was(register):
    register(Affine, affine)
    net = with_affine()
    module = net.model[2]
    own = module.forward
    module.forward = own
    fisher(net)
    assert module.forward is own
    del module.forward

    def fail(*_):
        raise RuntimeError("no output")

    handle = net.model[4].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="no output"):
        fisher(net)
    handle.remove()
    assert "forward" not in module.__dict__


def test_a_function_of_ones_own(register):
    def scaled(x, weight, gain=2.0):
        return gain * x @ weight

    def form(call, output):
        gain, weight = call["gain"], call["weight"]
        return Use(
            weight,
            None,
            output.dim() - 1,
            call["x"].detach(),
            Grid(1, weight.shape[1], weight.shape[0], transposed=True),
            gradients=lambda g: g.unsqueeze(2),
            inputs=lambda x: gain * x.unsqueeze(1),
        )

    plain, scaled = scaled, register(scaled, form)
    assert scaled.__name__ == "scaled"
    assert scaled is not plain
    assert register(scaled, form) is scaled

    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(4, 2))

        def forward(self, x):
            return scaled(torch.tanh(scaled(x, self.a)), weight=self.b, gain=0.5).sum(1)

    net = zoo.simple(M(), torch.randn(4, 3, 3))
    F = fisher(net)
    close(F.to_dense(), expected(net))
    assert forms(F) == {"a": "scaled: outer", "b": "scaled: outer"}
    kfac = fisher(net, "kfac")
    assert [block.right.shape[-1] for block in kfac.members] == [3, 4]


def test_a_function_of_torch(register):
    def form(call, output):
        x, weight = call["input"], call["other"]
        return Use(
            weight,
            None,
            output.dim() - 1,
            x.detach(),
            Grid(1, *weight.shape),
            gradients=lambda g: g.unsqueeze(2),
            inputs=lambda x: x.unsqueeze(1),
        )

    with pytest.raises(TypeError, match="signature='input weight bias'"):
        register_layer(torch.inner, form)
    assert register(torch.inner, form, signature="input other") is torch.inner

    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.out = nn.Parameter(torch.randn(4, 3)), nn.Linear(4, 2)

        def forward(self, x):
            return self.out(torch.tanh(torch.inner(x, self.a)))

    net = zoo.simple(M(), torch.randn(4, 3))
    F = fisher(net)
    close(F.to_dense(), expected(net))
    assert forms(F)["a"] == "inner: outer"


def test_a_form_in_the_place_of_ones_own(register):
    assert register(F.linear, lambda call, output: f"{sorted(call)}") is F.linear
    net = zoo.mlp()
    fim = fisher(net)
    close(fim.to_dense(), expected(net))
    assert notes(fim)["0.weight"] == "['bias', 'input', 'weight']"


def wrong_values(call, output):
    use = affine(call, output)
    rows = use.rows
    return Use(
        use.weight,
        use.bias,
        use.leading,
        use.x,
        rows=lambda x, g: {role: 1.01 * row for role, row in rows(x, g).items()},
    )


def wrong_examples(call, output):
    """Rows of another example: their sum over examples, a whole gradient, would be right."""
    use = affine(call, output)
    rows = use.rows
    return Use(
        use.weight,
        use.bias,
        use.leading,
        use.x.flip(0),
        rows=lambda x, g: rows(x, g),
    )


def wrong_size(call, output):
    module = call["module"]
    return Use(
        module.weight,
        None,
        output.dim() - 1,
        call["x"].detach(),
        Grid(1, 3, 3),
        gradients=lambda g: g.unsqueeze(2),
        inputs=lambda x: x.unsqueeze(1),
    )


@pytest.mark.parametrize(
    ("form", "why"),
    [
        (wrong_values, "are not autograd's"),
        (wrong_examples, "are not autograd's"),
        (wrong_size, "needs a weight of 9 numbers, not of 3"),
        (refusing, "not today"),
    ],
)
def test_a_wrong_form_is_demoted(register, form, why):
    register(Affine, form)
    net = with_affine()
    F = fisher(net)
    close(F.to_dense(), expected(net))
    assert forms(F)["2.weight"] == forms(F)["2.bias"] == GENERAL
    assert why in notes(F)["2.weight"]
    assert forms(F)["0.weight"] == "linear: outer"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gradients": lambda g: g}, r"gradients of shape \(1, 3, 1, 1, 3\), got \(1, 3, 1, 3\)"),
        ({"inputs": lambda x: x.unsqueeze(1).mT}, r"inputs of shape \(3, 1, T, 2\), got"),
        ({"rows": lambda x, g: {"weight": g}}, r"rows of the weight of shape \(1, 3, 6\), got"),
        ({"rows": lambda x, g: {}}, r"rows of the weight of shape \(1, 3, 6\), got none"),
    ],
)
def test_shapes_that_a_form_gets_wrong(register, change, message):
    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 2))

        def forward(self, x):
            return x @ self.weight.mT

    def form(call, output):
        outer = {
            "grid": Grid(1, 3, 2),
            "gradients": lambda g: g.unsqueeze(2),
            "inputs": lambda x: x.unsqueeze(1),
        }
        options = change if "rows" in change else {**outer, **change}
        return Use(call["module"].weight, None, 1, call["x"].detach(), **options)

    register(Product, form)
    with pytest.raises(UnsupportedLayerError, match=f"form of Product to give {message}"):
        fisher(zoo.simple(nn.Sequential(Product()), torch.randn(3, 2)))


def test_a_call_that_returns_no_tensor(register):
    class Pair(Affine):
        def forward(self, x):
            y = super().forward(x)
            return y, y

    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.pair, self.out = Pair(3), nn.Linear(3, 2)

        def forward(self, x):
            return self.out(self.pair(x)[1])

    register(Pair, affine)
    net = zoo.simple(M(), torch.randn(4, 3))
    F = fisher(net)
    close(F.to_dense(), expected(net))
    assert "returns a tuple, not one tensor" in notes(F)["pair.weight"]


def test_compiled_models_call_whole_modules(register):
    register(Affine, affine)
    net = with_affine()
    plain = fisher(net)
    net.model = torch.compile(net.model, backend="eager")
    net.model(net.batch)
    F = fisher(net)
    assert list(forms(F).values()) == list(forms(plain).values())
    assert "Affine: rows" in forms(F).values()
    close(F.to_dense(), plain.to_dense())


def test_what_can_be_registered(register):
    with pytest.raises(TypeError, match=r"a subclass of torch.nn.Module .*the class dict"):
        register_layer(dict, affine)
    with pytest.raises(TypeError, match="function or a subclass"):
        register_layer(nn.Linear(2, 2), affine)
    with pytest.raises(TypeError, match="function or a subclass"):
        register_layer("linear", affine)
    with pytest.raises(TypeError, match=r"form\(call, output\), got str"):
        register_layer(Affine, "rows")
    register(Affine, lambda call, output: {"weight": 1})
    with pytest.raises(UnsupportedLayerError, match=r"form of Affine .* returned a dict"):
        fisher(with_affine())
    with pytest.raises(ValueError, match="either rows, or grid, gradients and inputs"):
        Use(None, None, 1, torch.ones(1), grid=Grid(1, 1, 1))
