"""The steps of a random network: each writes a few statements that keep examples apart.

A step takes the writer, whose `shape` is that of one example: (F,), (T, F), (C, H, W) or
(C, D, H, W). It raises `UnfitError` if it has no meaning for that shape.
"""

from collections.abc import Callable

from .writer import Writer

STEPS: dict[str, Callable[[Writer], None]] = {}
PAD = (
    "",
    "",
    ", padding_mode='circular'",
    ", padding_mode='reflect'",
    ", padding_mode='replicate'",
)


def step(function: Callable[[Writer], None]) -> Callable[[Writer], None]:
    STEPS[function.__name__] = function
    return function


def ones(shape: tuple[int, ...]) -> str:
    """What makes a condition (N,) broadcast over h."""
    return ", ".join([":"] + ["None"] * len(shape))


def score(w: Writer) -> str:
    """A number for each example, from its hidden state or its input."""
    return w.pick("h.detach().flatten(1).sum(1)", "h.flatten(1).mean(1)", "h.flatten(1)[:, 0]")


# --- layers ---------------------------------------------------------------------------------------


@step
def linear(w: Writer) -> None:
    out = w.small(2)
    w.line(f"h = {w.linear(w.width, out)}(h)")
    w.shape = (*w.shape[:-1], out)


@step
def activation(w: Writer) -> None:
    w.line(
        w.pick(
            "h = torch.tanh(h)",
            "h = F.gelu(h)",
            "h = torch.sigmoid(h)",
            "h = F.silu(h)",
            "h = F.softplus(h)",
            "h = torch.relu(h)",
            "h = F.leaky_relu(h, 0.1)",
            "h = h.sin()",
            "h = F.relu(h + 0, inplace=True)",
            "h = (1 * h).tanh_()",
            "h = h * 0.5; h.add_(0.25); h.mul_(2)",
            "h = h.clone(); h[..., 0] = h[..., 0] * 2",
            "h = h.clone(); h[..., -1:].sigmoid_()",
        )
    )


@step
def prelu(w: Writer) -> None:
    channels = w.shape[0]
    w.line(f"h = {w.module(f'nn.PReLU({w.pick(1, channels)}, init=0.3)')}(h)")


@step
def bilinear(w: Writer) -> None:
    out = w.small(2, 3)
    w.line(f"h = {w.module(f'nn.Bilinear({w.width}, {w.width}, {out})')}(h, h.flip(-1))")
    w.shape = (*w.shape[:-1], out)


@step
def normalise(w: Writer) -> None:
    n = len(w.shape)
    options = [f"nn.LayerNorm({w.width})", f"nn.RMSNorm({w.width})"]
    if n > 1:
        options += [f"nn.LayerNorm({list(w.shape)})", f"nn.LayerNorm({list(w.shape)}, bias=False)"]
        options += [f"nn.InstanceNorm{n - 1}d({w.shape[0]}, affine=True)"] * (w.width > 1)
    if w.shape[0] % 2 == 0:
        options += [f"nn.GroupNorm({w.pick(1, 2)}, {w.shape[0]})"]
    options += [f"nn.BatchNorm{max(1, n - 1)}d({w.shape[0]})"]
    code = w.pick(*options)
    w.need(w.width > 1)
    name = w.module(code)
    w.setup(f"for p in {name}.parameters(): nn.init.normal_(p)")
    if "Batch" in code:
        w.setup(f"{name}.running_mean.normal_(); {name}.running_var.uniform_(0.5, 2)")
    w.line(f"h = {name}(h)")


@step
def convolution(w: Writer) -> None:
    n = len(w.shape) - 1
    w.need(n >= 1)
    transposed_input = n == 1 and w.chance(0.5)
    shape = w.shape[::-1] if transposed_input else w.shape
    channels, *sizes = shape
    groups = 2 if channels % 2 == 0 and w.chance(0.5) else 1
    out = groups * w.small(1, 2)
    kernel = [w.small(1, min(3, s)) for s in sizes]
    dilation = [
        2 if 2 * (k - 1) < s and w.chance(0.3) else 1 for k, s in zip(kernel, sizes, strict=True)
    ]
    stride = w.pick(1, 1, 2)
    padding = [w.pick(0, min(1, s - 1)) for s in sizes]
    mode = w.pick(*PAD)
    mode = "" if n == 3 and "reflect" in mode and min(sizes) < 2 else mode
    bias = w.pick("", ", bias=False")
    settings = f"{tuple(kernel)}, stride={stride}, padding={tuple(padding)}, "
    if stride == 1 and w.chance(0.2):
        settings, padding = f"{tuple(kernel)}, padding='same', ", []
        mode = "" if "reflect" in mode else mode
    settings += f"dilation={tuple(dilation)}, groups={groups}{mode}{bias}"
    code = f"{w.module(f'nn.Conv{n}d({channels}, {out}, {settings})')}"
    if padding:
        sizes = [
            (s + 2 * p - d * (k - 1) - 1) // stride + 1
            for s, p, d, k in zip(sizes, padding, dilation, kernel, strict=True)
        ]
    w.need(min(sizes) >= 1)
    w.line(f"h = {code}(h.mT).mT" if transposed_input else f"h = {code}(h)")
    w.shape = (*sizes[::-1], out) if transposed_input else (out, *sizes)


@step
def transposed_convolution(w: Writer) -> None:
    n = len(w.shape) - 1
    w.need(n >= 1)
    channels, *sizes = w.shape
    groups = 2 if channels % 2 == 0 and w.chance(0.4) else 1
    out = groups * w.small(1, 2)
    kernel = [w.small(1, 2) for _ in sizes]
    stride = w.pick(1, 2)
    extra = w.pick(0, stride - 1)
    dilation = w.pick(1, 1, 2)
    settings = f"{tuple(kernel)}, stride={stride}, output_padding={extra}, dilation={dilation}"
    extra = extra if extra < max(stride, dilation) else 0
    name = w.module(f"nn.ConvTranspose{n}d({channels}, {out}, {settings}, groups={groups})")
    w.line(f"h = {name}(h)")
    sizes = [
        (s - 1) * stride + dilation * (k - 1) + extra + 1
        for s, k in zip(sizes, kernel, strict=True)
    ]
    w.shape = (out, *sizes)
    slim(w)


def slim(w: Writer) -> None:
    """Cut what grew too large."""
    if any(s > 5 for s in w.shape):
        cuts = ", ".join(":5" if s > 5 else ":" for s in w.shape)
        w.line(f"h = h[:, {cuts}]")
        w.shape = tuple(min(s, 5) for s in w.shape)


@step
def pooling(w: Writer) -> None:
    n = len(w.shape) - 1
    w.need(n >= 1)
    size = w.small(1, 2)
    kind = w.pick("adaptive_avg_pool", "adaptive_max_pool")
    w.line(f"h = F.{kind}{n}d(h, {size})")
    w.shape = (w.shape[0], *[size] * n)


@step
def recurrent(w: Writer) -> None:
    w.need(len(w.shape) == 2)
    kind, out, two = w.pick("RNN", "LSTM", "GRU"), w.small(1, 3), w.pick(False, False, True)
    settings = w.pick("", "", ", num_layers=2", ", bias=False")
    settings += ", bidirectional=True" if two else ""
    first = w.chance(0.6)
    settings += ", batch_first=True" if first else ""
    name = w.module(f"nn.{kind}({w.width}, {out}{settings})")
    w.line(f"h = {name}(h)[0]" if first else f"h = {name}(h.transpose(0, 1))[0].transpose(0, 1)")
    w.shape = (w.shape[0], out * (2 if two else 1))


@step
def cell(w: Writer) -> None:
    """A recurrent cell in a loop of one's own."""
    w.need(len(w.shape) == 2)
    out = w.small(1, 3)
    name = w.module(f"nn.{w.pick('RNNCell', 'GRUCell')}({w.width}, {out})")
    w.line(f"s = h.new_zeros(len(h), {out}); states = []")
    w.line(f"for t in range(h.shape[1]):\n    s = {name}(h[:, t], s); states.append(s)")
    if w.chance(0.5):
        w.line("h = torch.stack(states, 1)")
        w.shape = (w.shape[0], out)
    else:
        w.line("h = s")
        w.shape = (out,)


@step
def attention(w: Writer) -> None:
    w.need(len(w.shape) == 2)
    heads = 2 if w.width % 2 == 0 and w.chance(0.5) else 1
    settings = w.pick("", "", ", bias=False", ", add_bias_kv=True", ", add_zero_attn=True")
    first = w.chance(0.6)
    settings += ", batch_first=True" if first else ""
    name = w.module(f"nn.MultiheadAttention({w.width}, {heads}{settings})")
    call = w.pick("h, h, h", "h, h.roll(1, -1), h", "h[:, :1], h, h", "h, h[:, :1], h[:, :1]")
    weights = w.pick("", ", need_weights=False")
    if first:
        w.line(f"h = h + {name}({call}{weights})[0]")
    else:
        w.line("h = h.transpose(0, 1)")
        w.line(f"h = (h + {name}({call.replace('[:, :1]', '[:1]')}{weights})[0]).transpose(0, 1)")


@step
def own_attention(w: Writer) -> None:
    """Fused projections in chunks, and torch's function."""
    w.need(len(w.shape) == 2)
    d = w.pick(1, 2)
    name = w.linear(w.width, 3 * d)
    cut = w.pick("chunk(3, -1)", f"split({d}, -1)", f"unflatten(-1, (3, {d})).unbind(2)")
    w.line(f"q, k, v = {name}(h).{cut}")
    w.line(
        w.pick(
            "h = F.scaled_dot_product_attention(q, k, v)",
            "h = F.scaled_dot_product_attention(q, k, v, is_causal=True)",
            "h = (q @ k.mT).softmax(-1) @ v",
            "h = torch.einsum('ntd,nsd,nse->nte', q, k, v)",
            "h = torch.cumsum(k * v, 1) * q",
        )
    )
    w.shape = (w.shape[0], d)


@step
def fused(w: Writer) -> None:
    """One projection whose chunks have different uses (a gated unit)."""
    out = w.small(1, 3)
    name = w.linear(w.width, 2 * out)
    w.line(
        w.pick(
            f"a, b = {name}(h).chunk(2, -1); h = a * b.sigmoid()",
            f"h = F.glu({name}(h), -1)",
            f"a, b = {name}(h).tensor_split(2, -1); h = a + b.detach()",
            f"h = {name}(h); h = h[..., {out}:] - h[..., :{out}].tanh()",
            f"h = F.linear(h, {name}.weight[:{out}]).tanh() + F.linear(h, {name}.weight[{out}:])",
        )
    )
    w.shape = (*w.shape[:-1], out)


@step
def transformer(w: Writer) -> None:
    w.need(len(w.shape) == 2 and w.width in (2, 4))
    first = w.pick("True", "False")
    name = w.module(
        f"nn.TransformerEncoderLayer({w.width}, {w.pick(1, 2)}, 2, dropout=0.0, "
        f"activation='gelu', batch_first=True, norm_first={first})"
    )
    w.line(f"h = {name}(h)")


# --- raw parameters -------------------------------------------------------------------------------


@step
def raw_weight(w: Writer) -> None:
    i, o = w.width, w.small(2)
    kind = w.small(0, 8)
    a = w.parameter(o, i) if kind in (2, 3) else w.parameter(i, o)
    w.line(
        (
            f"h = h @ {a}",
            f"h = torch.einsum('...i,io->...o', h, {a})",
            f"h = torch.einsum('...i,oi->...o', h, {a})",
            f"h = F.linear(h, {a})",
            f"h = h @ torch.cat([{a}[:1] * 2, {a}[1:]])",
            f"h = h @ ({a} / {a}.norm())",
            f"h = (h.unsqueeze(-1) * {a}).sum(-2)",
            f"h = torch.tensordot(h, {a}, 1)",
            f"h = h @ {a}.softmax(0)",
        )[kind]
    )
    w.shape = (*w.shape[:-1], o)


@step
def raw_vector(w: Writer) -> None:
    a = w.parameter(w.width, offset="1 + ")
    w.line(
        w.pick(
            f"h = h * {a}",
            f"h = h + {a}",
            f"h = h + {a}.expand_as(h)",
            f"h = h * {a}.exp()",
            f"h = torch.cat([h, {a}.expand_as(h)], -1)[..., ::2]",
            f"h = h * {a}[torch.arange({w.width}).flip(0)]",
            f"h = h + {a}.repeat_interleave(2)[:{w.width}]",
            f"h = torch.where(h > 0, h, {a})",
            f"h = torch.addcmul(h, h, {a})",
            f"h = torch.lerp(h, {a}.expand_as(h), 0.3)",
            f"h = h.clone(); h += {a}; h *= {a}",
            f"h = torch.stack([h, {a}.expand_as(h)]).sum(0)",
            f"h = h + {a}[:1] - {a}[-1]",
        )
    )
    if "::2" in w._body[-1]:
        w.shape = (*w.shape[:-1], w.width)


@step
def raw_scalar(w: Writer) -> None:
    a = w.parameter(scale="0.3", offset="1 + ")
    w.line(w.pick(f"h = h * {a}", f"h = h / {a}.exp()", f"h = torch.tanh(h + {a})"))


@step
def position(w: Writer) -> None:
    w.need(len(w.shape) == 2)
    t, f = w.shape
    if w.chance(0.5):
        w.line(f"h = h + {w.parameter(1, t, f)}")
    else:
        name = w.module(f"nn.Embedding({t}, {f})")
        w.line(f"h = h + {name}(torch.arange({t}))")


@step
def token(w: Writer) -> None:
    """A learnt first position, as a class token."""
    w.need(len(w.shape) == 2 and w.shape[0] < 5)
    w.line(f"h = torch.cat([{w.parameter(1, 1, w.width)}.expand(len(h), -1, -1), h], 1)")
    w.shape = (w.shape[0] + 1, w.width)


@step
def mixing_positions(w: Writer) -> None:
    """A weight from the left, over positions."""
    w.need(len(w.shape) == 2)
    t = w.shape[0]
    a = w.parameter(t, t)
    w.line(
        w.pick(f"h = {a} @ h", f"h = torch.einsum('st,ntf->nsf', {a}, h)", f"h = (h.mT @ {a}).mT")
    )
