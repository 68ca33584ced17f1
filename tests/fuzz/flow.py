"""More steps of a random network: sharing, views, routing and control flow."""

from .steps import ones, score, step
from .writer import Writer

# --- parametrisations, sharing --------------------------------------------------------------------


@step
def weight_norm(w: Writer) -> None:
    name = w.linear(w.width, out := w.small(2))
    w.setup(f"parametrizations.weight_norm({name}{w.pick('', ', dim=None', ', dim=1')})")
    w.line(f"h = {name}(h)")
    w.shape = (*w.shape[:-1], out)


@step
def parametrised(w: Writer) -> None:
    name = w.linear(w.width, w.width)
    w.setup(
        w.pick(
            f"{name}.to(torch.float64); parametrizations.orthogonal({name})",
            f"parametrizations.spectral_norm({name}.eval())",
            f"parametrize.register_parametrization({name}, 'weight', nn.Tanh())",
            f"parametrize.register_parametrization({name}, 'weight', nn.Softplus())",
        )
    )
    w.line(f"h = {name}(h)")


@step
def shared(w: Writer) -> None:
    """A layer that was used before, or one that is used twice."""
    fitting = [(name, out) for name, inputs, out in w.linears if inputs == w.width]
    if fitting and w.chance(0.6):
        name, out = w.pick(*fitting)
        w.line(f"h = {name}(torch.tanh(h))")
        w.shape = (*w.shape[:-1], out)
        return
    name = w.linear(w.width, w.width)
    w.line(f"h = {name}(torch.tanh({name}(h)))")


@step
def tied(w: Writer) -> None:
    a = w.parameter(out := w.small(2, 3), w.width)
    w.line(
        w.pick(
            f"h = F.linear(torch.tanh(F.linear(h, {a})), {a}.t())",
            f"h = torch.tanh(F.linear(h, {a})) @ {a}",
            f"h = torch.tanh(h @ {a}.T) @ {a} + h @ {a}.T @ {a}.detach()",
        )
    )
    del out


@step
def shared_bias(w: Writer) -> None:
    a, b = w.linear(w.width, w.width, True), w.linear(w.width, w.width, True)
    w.setup(f"{b}.bias = {a}.bias")
    w.line(f"h = {b}(torch.tanh({a}(h)))")


@step
def residual(w: Writer) -> None:
    name = w.linear(w.width, w.width)
    w.line(
        w.pick(
            f"r = {name}(h); r += h; h = r",
            f"h = h + {name}(h).tanh()",
            f"h = h + {name}(h).detach()",
            f"r = {name}(h); h = F.relu(r, inplace=True) + h",
            f"with torch.no_grad(): r = {name}(h)\nh = h - r",
        )
    )


@step
def frozen(w: Writer) -> None:
    name = w.linear(w.width, w.width)
    w.setup(f"{name}.{w.pick('weight', 'requires_grad_')}" + ".requires_grad_(False)")
    if "requires_grad_.requires" in w._init[-1]:
        w._init[-1] = f"{name}.requires_grad_(False)"
    w.line(f"h = {name}(h)")


@step
def unused(w: Writer) -> None:
    w.linear(w.width, 2)
    w.parameter(2)


@step
def checkpointed(w: Writer) -> None:
    name = w.linear(w.width, w.width)
    w.line(f"h = checkpoint(lambda a: torch.tanh({name}(a)), h, use_reentrant=False)")


@step
def looped(w: Writer) -> None:
    names = [w.linear(w.width, w.width) for _ in range(2)]
    w.line(f"for layer in ({names[0]}, {names[1]}, {names[0]}): h = h + torch.tanh(layer(h))")


# --- views ----------------------------------------------------------------------------------------


@step
def swap(w: Writer) -> None:
    w.need(len(w.shape) >= 2)
    w.line(w.pick("h = h.mT", "h = h.transpose(-1, -2).contiguous()"))
    w.shape = (*w.shape[:-2], w.shape[-1], w.shape[-2])


@step
def folded(w: Writer) -> None:
    """A layer over positions that are folded into the batch, in any order."""
    w.need(len(w.shape) == 2)
    t, f = w.shape
    name = w.linear(f, f)
    w.line(
        w.pick(
            f"h = {name}(h.reshape(-1, {f})).view(-1, {t}, {f})",
            f"h = {name}(h.transpose(0, 1).reshape(-1, {f})).view({t}, -1, {f}).transpose(0, 1)",
            f"h = {name}(h.transpose(0, 1)).transpose(0, 1)",
            f"h = torch.stack([{name}(a) for a in h.unbind(1)], 1)",
            f"h = torch.cat([{name}(h[:, :1]), {name}(h[:, 1:])], 1)",
            f"h = torch.stack([{name}(a) for a in h])",
            f"h = torch.func.vmap({name})(h)",
        )
    )


@step
def one_by_one(w: Writer) -> None:
    """A layer in a loop over the examples."""
    name = w.linear(w.width, w.width)
    w.line(
        w.pick(
            f"h = torch.stack([{name}(a) for a in h])",
            f"h = torch.cat([{name}(a[None]) for a in h])",
        )
    )


@step
def rearranged(w: Writer) -> None:
    w.line(
        w.pick(
            "h = h.flip(-1)",
            "h = h.roll(1, -1)",
            "h = h.contiguous().view(h.shape)",
            "h = h.movedim(0, -1).movedim(-1, 0)",
            "h = torch.cat([h[..., 1:], h[..., :1]], -1)",
        )
    )


@step
def reduced(w: Writer) -> None:
    """Fewer axes."""
    w.need(len(w.shape) >= 2)
    n = len(w.shape)
    kind = w.small(0, 4)
    if kind == 0:
        w.line("h = h.mean(1)")
        w.shape = w.shape[1:]
    elif kind == 1:
        w.line("h = h.amax(-1)")
        w.shape = w.shape[:-1]
    elif kind == 2:
        w.line("h = h[:, -1]")
        w.shape = w.shape[1:]
    elif kind == 3 and n >= 3:
        w.line("h = h.flatten(2).mT")
        size = 1
        for s in w.shape[1:]:
            size *= s
        w.shape = (min(size, 4), w.shape[0])
        w.line("h = h[:, :4]")
    else:
        w.line("h = torch.logsumexp(h, 1)")
        w.shape = w.shape[1:]


@step
def unflattened(w: Writer) -> None:
    """More axes."""
    w.need(len(w.shape) <= 2)
    if w.width % 2 == 0 and w.chance(0.5):
        w.line(f"h = h.unflatten(-1, (2, {w.width // 2}))")
        w.shape = (*w.shape[:-1], 2, w.width // 2)
    else:
        w.line("h = torch.stack([h, h.sin()], 1)")
        w.shape = (2, *w.shape)


# --- routing and control flow ---------------------------------------------------------------------


@step
def chosen(w: Writer) -> None:
    """Two branches for all, of which each example takes one."""
    a, b = w.linear(w.width, w.width), w.linear(w.width, w.width)
    w.line(f"c = {score(w)} > {w.pick('0', '0.3', '-0.3')}")
    w.line(f"h = torch.where(c[{ones(w.shape)}], {a}(h), {b}(h).tanh())")


@step
def masked(w: Writer) -> None:
    """A layer that sees only some examples, put back where they were."""
    name = w.linear(w.width, w.width)
    w.line(f"k = {score(w)} > 0")
    w.line(
        w.pick(
            f"o = torch.zeros_like(h); o[k] = {name}(h[k]); h = h + o",
            f"o = h.clone(); o[k] = torch.tanh({name}(h[k])); h = o",
            f"i = k.nonzero().squeeze(1); h = h.index_add(0, i, {name}(h[i]))",
            f"i = k.nonzero().squeeze(1); h = h.index_copy(0, i, {name}(h[i]).tanh())",
            f"if k.any(): h = torch.where(k[{ones(w.shape)}], {name}(h), h)",
            f"if k.any():\n    o = h.clone(); o[k] += {name}(h[k]); h = o",
            f"if not k.all(): h = h + (~k)[{ones(w.shape)}] * {name}(h).tanh()",
        )
    )


@step
def gained(w: Writer) -> None:
    """A weight that some examples use in another way."""
    name = w.linear(w.width, w.width)
    w.line(f"k = {score(w)} > {w.pick('0', '1')}; r = torch.tanh({name}(h))")
    w.line(f"if k.any(): r = torch.where(k[{ones(w.shape)}], r / {name}.weight.norm(), r)\nh = r")


@step
def ordered(w: Writer) -> None:
    """Sorted, worked on and put back."""
    a, b = w.linear(w.width, w.width), w.linear(w.width, w.width)
    w.line(f"i = ({score(w)}).argsort(); h = torch.tanh({a}(h[i]))")
    w.line(w.pick(f"h = {b}(h[i.argsort()])", f"h = {b}(h)[i.argsort()]"))


@step
def unpadded(w: Writer) -> None:
    """Positions are taken out by a mask, and put back."""
    w.need(len(w.shape) == 2)
    name = w.linear(w.width, w.width)
    w.line("k = h.detach().sum(-1) > 0")
    w.line(
        w.pick(
            f"o = torch.zeros_like(h); o[k] = torch.tanh({name}(h[k])); h = h + o",
            f"h = h.masked_scatter(k.unsqueeze(-1), {name}(h[k]))",
            f"n, t = k.nonzero(as_tuple=True); h = h.index_put((n, t), {name}(h[n, t]).tanh())",
        )
    )


@step
def experts(w: Writer) -> None:
    """Each example goes to its best expert."""
    gate = w.linear(w.width, 2, False)
    names = [w.linear(w.width, w.width) for _ in range(2)]
    pool = ".flatten(1, -2).mean(1)" if len(w.shape) > 1 else ""
    skip = w.pick("", "    if not len(i): continue\n")
    w.line(f"p = {gate}(h){pool}.softmax(-1); o = torch.zeros_like(h)")
    w.line(
        f"for e, layer in enumerate(({names[0]}, {names[1]})):\n"
        f"    i = (p.argmax(-1) == e).nonzero().squeeze(1)\n{skip}"
        f"    o = o.index_add(0, i, layer(h[i]).tanh() * p[i, e][{ones(w.shape)}])\nh = o"
    )


@step
def repeated(w: Writer) -> None:
    """As many rounds as the hardest example of the batch needs."""
    name = w.linear(w.width, w.width)
    w.line(f"left = 1 + 2 * (({score(w)}) > 0).long()")
    w.line(
        f"for _ in range(int(left.max())):\n"
        f"    h = torch.where((left > 0)[{ones(w.shape)}], h + torch.tanh({name}(h)), h)\n"
        "    left = left - 1"
    )


@step
def compiled_branch(w: Writer) -> None:
    """A branch on the size of the batch that changes nothing but which functions are called."""
    name = w.linear(w.width, w.width)
    w.line(f"h = {name}(h) if len(h) > 3 else h @ {name}.weight.t() + {name}(h * 0)")


@step
def weights_from_inputs(w: Writer) -> None:
    """A small layer whose weight another layer makes, for each example its own."""
    w.need(len(w.shape) == 1 and w.width <= 3)
    name = w.linear(w.width, w.width * 2)
    w.line(f"h = (h[:, None] @ torch.tanh({name}(h)).view(-1, {w.width}, 2)).squeeze(1)")
    w.shape = (2,)
