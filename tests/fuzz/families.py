"""Realistic kinds of networks: routed, sorted, unpadded, gated; and some that must be refused.

Each takes random numbers, a seed and the sizes of the batches, and gives a program.
"""

import random
from collections.abc import Callable, Sequence

from .writer import Program

Make = Callable[[random.Random, int, Sequence[int]], Program]
FAMILIES: dict[str, Make] = {}


def family(function: Make) -> Make:
    FAMILIES[function.__name__] = function
    return function


def source(setup: str, body: str) -> str:
    """A class from the statements of its two functions."""

    def block(text: str) -> str:
        return "".join(f"        {line}\n" for line in text.strip("\n").split("\n"))

    return (
        "class M(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        f"{block(setup)}    def forward(self, x):\n{block(body)}"
    )


def reals(r: random.Random, sizes: Sequence[int], *shape: int, factor: float = 1.0) -> list[str]:
    """Batches of numbers, some of them shifted, so that batches take other branches."""
    dims = ", ".join(map(str, shape))
    scale = f"{factor} * " if factor != 1.0 else ""
    return [f"{scale}torch.randn({n}, {dims}){r.choice(('', ' + 1', ' - 1'))}" for n in sizes]


def tokens(sizes: Sequence[int], length: int) -> list[str]:
    """Batches of tokens 1..5 padded by 0 behind; the first token is there."""
    keep = f"(torch.arange({length}) <= torch.randint({length}, ({{n}}, 1)))"
    return [f"torch.randint(1, 6, ({n}, {length})) * {keep.format(n=n)}" for n in sizes]


@family
def early_exit(r: random.Random, seed: int, sizes: Sequence[int]) -> Program:
    """Hard examples go on to a second block; whether any does differs by batch."""
    limit = r.choice((0.52, 0.55, 0.6, 0.7))
    way = r.choice(
        (
            "if hard.any(): h = torch.where(hard[:, None], h + torch.tanh(self.r(h)), h)",
            "if hard.any():\n    o = h.clone(); o[hard] = torch.tanh(self.r(h[hard])); h = o",
            "if hard.all(): h = h + torch.tanh(self.r(h))\n"
            "elif hard.any(): h = h + hard[:, None] * torch.tanh(self.r(h))",
            "h = h.index_add(0, hard.nonzero().squeeze(1), torch.tanh(self.r(h[hard])))",
        )
    )
    body = f"h = torch.tanh(self.a(x)); hard = self.b(h).softmax(-1).amax(-1) < {limit}\n{way}"
    setup = "self.a, self.r, self.b = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)"
    return Program(
        source(setup, f"{body}\nreturn self.b(h)"), tuple(reals(r, sizes, 3)), seed, False, 2
    )


@family
def exits_with_heads(r: random.Random, seed: int, sizes: Sequence[int]) -> Program:
    """Each depth has a head of its own; examples leave as soon as they are sure."""
    body = f"""
h, out, left = x, x.new_zeros(len(x), 2), torch.arange(len(x))
for k, (layer, head) in enumerate(zip(self.layers, self.heads)):
    h = torch.tanh(layer(h)); f = head(h)
    done = f.detach().softmax(-1).amax(-1) > {r.choice((0.55, 0.6, 0.7))}
    if k == 2: done = torch.ones_like(done)
    out = out.index_add(0, left[done], f[done])
    h, left = h[~done], left[~done]
    if not len(left): break
return out"""
    setup = (
        "self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))\n"
        "self.heads = nn.ModuleList(nn.Linear(3, 2) for _ in range(3))"
    )
    return Program(source(setup, body), tuple(reals(r, sizes, 3)), seed, False, 2)


@family
def gain(r: random.Random, seed: int, sizes: Sequence[int]) -> Program:
    """Loud examples are divided by the norm of a weight; usually none of the first batch."""
    body = """
h = torch.tanh(self.a(x)); loud = x.abs().amax(1) > 3
if loud.any(): h = torch.where(loud[:, None], h / self.a.weight.norm(), h)
return self.b(h)"""
    data = [
        line if k == 0 else f"({line}) * {r.choice((1, 3, 6))}"
        for k, line in enumerate(f"torch.randn({n}, 3).clamp(-2, 2)" for n in sizes)
    ]
    if len(sizes) == 1:
        n = sizes[0]
        loud = f"torch.tensor([1.0, 6.0]).repeat({n})[:{n}, None]"
        data = [f"torch.randn({n}, 3) * {loud}"]
    setup = "self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)"
    return Program(source(setup, body), tuple(data), seed, False, 3)


@family
def sorted_batch(r: random.Random, seed: int, sizes: Sequence[int]) -> Program:
    """Sorted by a feature, worked on, and put back at once or later."""
    key = r.choice(("x[:, 0]", "x.norm(dim=1)", "-x.sum(1)", "self.b(torch.tanh(self.a(x)))[:, 0]"))
    back = r.choice(
        (
            "self.b(h[i.argsort()])",
            "self.b(h)[i.argsort()]",
            "x.new_zeros(len(x), 2).index_copy(0, i, self.b(h))",
            "self.b(torch.empty_like(h).scatter(0, i[:, None].expand_as(h), h))",
        )
    )
    body = f"i = ({key}).argsort(); h = torch.tanh(self.a(x[i]))\nreturn {back}"
    setup = "self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)"
    return Program(source(setup, body), tuple(reals(r, sizes, 3)), seed, False, 2)


@family
def packed(r: random.Random, seed: int, sizes: Sequence[int]) -> Program:
    """Sequences of different lengths, packed for a recurrent layer."""
    kind = r.choice(("RNN", "GRU", "LSTM"))
    order = r.choice(("False", "False", "True"))
    lengths = "(x[..., 0] != 0).sum(1).clamp(min=1)"
    sort = "i = n.argsort(descending=True); x, n = x[i], n[i]\n" if order == "True" else ""
    back = "[i.argsort()]" if sort else ""
    body = f"""
n = {lengths}
{sort}p = rnn.pack_padded_sequence(x, n, batch_first=True, enforce_sorted={order})
h = rnn.pad_packed_sequence(self.r(p)[0], batch_first=True)[0].sum(1)
return self.o(h){back}"""
    setup = f"self.r, self.o = nn.{kind}(2, 2, batch_first=True), nn.Linear(2, 2)"
    data = [
        f"torch.randn({n}, 3, 2) * (torch.arange(3) <= torch.randint(3, ({n}, 1)))[..., None]"
        for n in sizes
    ]
    return Program(source(setup, body), tuple(data), seed, False, 2)


@family
def unpadded(r: random.Random, seed: int, sizes: Sequence[int]) -> Program:
    """Tokens without their padding, in one long sequence; padding may first come later."""
    put = r.choice(
        (
            "o = h.new_zeros(*x.shape, 4); o[k] = h",
            "o = h.new_zeros(*x.shape, 4).masked_scatter(k[..., None], h)",
            "o = h.new_zeros(*x.shape, 4).index_put(k.nonzero(as_tuple=True), h)",
            "o = h.new_zeros(x.numel(), 4).index_copy(0, k.flatten().nonzero().squeeze(1), h)"
            ".view(*x.shape, 4)",
        )
    )
    end = r.choice(("self.b(o.sum(1))", "self.b(o).sum(1)", "self.b(o.sum(1) / k.sum(1)[:, None])"))
    body = f"k = x != 0; h = torch.tanh(self.a(self.e(x[k])))\n{put}\nreturn {end}"
    setup = "self.e, self.a, self.b = nn.Embedding(6, 3), nn.Linear(3, 4), nn.Linear(4, 2)"
    length = r.randint(2, 4)
    data = tokens(sizes, length)
    if r.random() < 0.5:
        data[0] = f"torch.randint(1, 6, ({sizes[0]}, {length}))"
    return Program(source(setup, body), tuple(data), seed, False, 2)


@family
def nested_lengths(r: random.Random, seed: int, sizes: Sequence[int]) -> Program:
    """Unpadded tokens with segment sums, as variable-length attention kernels have them."""
    body = """
k = x != 0; owner = k.nonzero()[:, 0]; h = torch.tanh(self.a(self.e(x[k])))
same = owner[:, None] == owner[None]
w = (self.q(h) @ h.mT).masked_fill(~same, float('-inf')).softmax(-1)
o = h.new_zeros(len(x), 3).index_add(0, owner, w @ h)
return self.b(o)"""
    setup = (
        "self.e, self.a, self.b = nn.Embedding(6, 2), nn.Linear(2, 3), nn.Linear(3, 2)\n"
        "self.q = nn.Linear(3, 3)"
    )
    return Program(source(setup, body), tuple(tokens(sizes, r.randint(2, 3))), seed, False, 2)


@family
def mixture(r: random.Random, seed: int, sizes: Sequence[int]) -> Program:
    """Experts, one or two for each example; experts without examples are skipped or called."""
    k = r.choice((1, 1, 2))
    skip = r.choice(("", "    if not len(i): continue\n"))
    put = r.choice(
        (
            "out = out.index_add(0, i, e(x[i]).relu() * p[i, j, None])",
            "o = torch.zeros_like(out); o[i] = e(x[i]).tanh() * p[i, j, None]; out = out + o",
            "out.index_add_(0, i, e(x[i]).tanh() * p[i, j, None])",
        )
    )
    body = f"""
p = self.gate(x).softmax(-1); out = torch.zeros_like(x); top = p.topk({k}, -1).indices
for j, e in enumerate(self.experts):
    i = (top == j).any(-1).nonzero().squeeze(1)
{skip}    {put}
return self.h(out)"""
    setup = (
        "self.gate = nn.Linear(3, 3, bias=False)\n"
        "self.experts = nn.ModuleList(nn.Linear(3, 3) for _ in range(3)); self.h = nn.Linear(3, 2)"
    )
    return Program(source(setup, body), tuple(reals(r, sizes, 3)), seed, False, 2)


@family
def token_experts(r: random.Random, seed: int, sizes: Sequence[int]) -> Program:
    """Experts by position, over the flattened batch, sorted by expert."""
    body = """
h = torch.tanh(self.a(x)).flatten(0, 1); p = self.gate(h).softmax(-1); e = p.argmax(-1)
i = e.argsort(stable=True); parts = h[i].split(torch.bincount(e, minlength=2).tolist())
o = torch.cat([layer(part) for layer, part in zip(self.experts, parts)])
o = torch.empty_like(o).index_copy(0, i, o) * p.gather(1, e[:, None])
return self.h(o.view(len(x), x.shape[1], -1).mean(1))"""
    setup = (
        "self.a, self.gate, self.h = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)\n"
        "self.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))"
    )
    return Program(source(setup, body), tuple(reals(r, sizes, r.randint(1, 3), 2)), seed, False, 2)


@family
def gates(r: random.Random, seed: int, sizes: Sequence[int]) -> Program:
    """An input that may be missing for all of a batch, for some of it, or for none."""
    way = r.choice(
        (
            "if there.any(): h = h + there[:, None] * self.b(x[:, 2:]).tanh()",
            "if there.any(): h = h + torch.where(there[:, None], self.b(x[:, 2:]), self.none)\n"
            "else: h = h + self.none",
            "h = h + (self.b(x[:, 2:]) if there.all() else torch.where(there[:, None], "
            "self.b(x[:, 2:]), self.none))",
            "h[there] = h[there] * torch.sigmoid(self.b(x[there, 2:]))",
        )
    )
    body = f"there = x[:, 2] != 0; h = torch.tanh(self.a(x[:, :2])) * 1\n{way}\nreturn self.o(h)"
    setup = (
        "self.a, self.b, self.o = nn.Linear(2, 3), nn.Linear(2, 3), nn.Linear(3, 2)\n"
        "self.none = nn.Parameter(torch.randn(3))"
    )
    data = [
        f"torch.cat([torch.randn({n}, 2), torch.randn({n}, 2) * {m}], 1)"
        for n, m in ((n, r.choice(("0", "1", f"(torch.rand({n}, 1) > 0.5)"))) for n in sizes)
    ]
    return Program(source(setup, body), tuple(data), seed, False, 2)


@family
def tasks(r: random.Random, seed: int, sizes: Sequence[int]) -> Program:
    """A head for each task, one task in a batch or several."""
    body = """
t = x[:, 0].long(); h = torch.tanh(self.a(x[:, 1:])); out = h.new_zeros(len(x), 2)
for k in t.unique().tolist():
    out[t == k] = self.heads[k](h[t == k])
return out"""
    setup = (
        "self.a = nn.Linear(2, 3)\nself.heads = nn.ModuleList(nn.Linear(3, 2) for _ in range(3))"
    )
    label = [r.choice(("0.0", "1.0", "2.0", f"torch.randint(3, ({n}, 1))")) for n in sizes]
    data = [
        f"torch.cat([{k} * torch.ones({n}, 1), torch.randn({n}, 2)], 1)"
        for n, k in zip(sizes, label, strict=True)
    ]
    return Program(source(setup, body), tuple(data), seed, False, 2)


@family
def rounds(r: random.Random, seed: int, sizes: Sequence[int]) -> Program:
    """Adaptive computation: as many rounds as the slowest example needs."""
    body = f"""
h = torch.tanh(self.a(x)); left = 1 + (x[:, 0].abs() * {r.choice((1, 2))}).long().clamp(max=3)
while (left > 0).any():
    h = torch.where((left > 0)[:, None], h + torch.tanh(self.r(h)), h); left = left - 1
return self.b(h)"""
    setup = "self.a, self.r, self.b = nn.Linear(2, 3), nn.Linear(3, 3), nn.Linear(3, 2)"
    return Program(source(setup, body), tuple(reals(r, sizes, 2)), seed, False, 2)


@family
def lengths_by_batch(r: random.Random, seed: int, sizes: Sequence[int]) -> Program:
    """Each batch has its own sequence length, also that of its number of examples."""
    pool = r.choice(("h.mean(1)", "h.amax(1)", "h[:, -1]", "torch.logsumexp(h, 1)"))
    layer = r.choice(("nn.Linear(2, 2)", "nn.Conv1d(2, 2, 1)", "nn.LayerNorm(2)"))
    call = "self.c(h.mT).mT" if "Conv" in layer else "self.c(h)"
    way = r.choice(
        (
            "torch.tanh(self.a(x))",
            "torch.tanh(self.a(x.transpose(0, 1))).transpose(0, 1)",
            "torch.tanh(self.a(x.flatten(0, 1))).view(*x.shape[:2], 2)",
        )
    )
    body = f"h = {way}; h = h + {call}\nreturn self.b({pool})"
    setup = f"self.a, self.c, self.b = nn.Linear(2, 2), {layer}, nn.Linear(2, 2)"
    data = [f"torch.randn({n}, {r.choice((n, 1, 2, 3))}, 2)" for n in sizes]
    return Program(source(setup, body), tuple(data), seed, False, 2)


@family
def copies(r: random.Random, seed: int, sizes: Sequence[int]) -> Program:
    """Several views of each example side by side in one larger batch (crops, ensembles, pairs)."""
    n = r.choice((2, 3))
    fold, back = r.choice(
        (
            (f"x.repeat_interleave({n}, 0)", f"f.view(-1, {n}, 2).mean(1)"),
            (f"x.repeat({n}, 1)", f"f.view({n}, -1, 2).mean(0)"),
            ("torch.cat([x, x.flip(1)])", "f.chunk(2)[0] * f.chunk(2)[1].tanh()"),
            ("torch.stack([x, -x], 1).flatten(0, 1)", "f.unflatten(0, (-1, 2)).amax(1)"),
        )
    )
    body = (
        f"z = {fold}; z = z + torch.arange(len(z)).remainder(1)[:, None]\n"
        f"f = self.b(torch.tanh(self.a(z)))\nreturn {back}"
    )
    setup = "self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 2)"
    return Program(source(setup, body), tuple(reals(r, sizes, 3)), seed, False, 2)


@family
def graph(r: random.Random, seed: int, sizes: Sequence[int]) -> Program:
    """Message passing over all nodes of the batch, each example a graph of its own."""
    body = """
n, t, _ = x.shape; v = torch.tanh(self.a(x.flatten(0, 1)))
e = torch.stack([torch.arange(n * t), torch.arange(n * t).view(n, t).roll(1, 1).flatten()])
keep = v.detach()[e[0], 0] > 0
m = torch.tanh(self.m(torch.cat([v[e[0]], v[e[1]]], 1)[keep]))
v = v.index_add(0, e[1][keep], m)
return self.o(v.view(n, t, -1).sum(1))"""
    setup = "self.a, self.m, self.o = nn.Linear(2, 2), nn.Linear(4, 2), nn.Linear(2, 2)"
    return Program(source(setup, body), tuple(reals(r, sizes, r.randint(1, 3), 2)), seed, False, 2)


@family
def decoder(r: random.Random, seed: int, sizes: Sequence[int]) -> Program:
    """Greedy decoding: the next token depends on what was chosen before."""
    body = """
h, t, out = torch.tanh(self.a(x)), torch.zeros(len(x), dtype=torch.long), []
for _ in range(2):
    h = self.cell(self.e(t), h); f = self.o(h); out.append(f); t = f.argmax(-1)
return torch.stack(out, 1)"""
    setup = (
        "self.a, self.e = nn.Linear(2, 2), nn.Embedding(3, 2)\n"
        f"self.cell, self.o = nn.{r.choice(('GRUCell', 'RNNCell'))}(2, 2), nn.Linear(2, 3)"
    )
    return Program(source(setup, body), tuple(reals(r, sizes, 2)), seed, True, 3)


@family
def bags(r: random.Random, seed: int, sizes: Sequence[int]) -> Program:
    """Bags of tokens, of which most embeddings have no gradient in a batch."""
    mode = r.choice(("sum", "mean", "max"))
    sparse = ", sparse=True" if mode != "max" and r.random() < 0.3 else ""
    if r.random() < 0.6:
        setup = f"self.e = nn.EmbeddingBag(6, 2, mode='{mode}'{sparse})"
        first = "h = self.e(x)"
    else:
        setup = f"self.e = nn.Embedding(6, 2, padding_idx=0{sparse})"
        first = f"h = self.e(x).{r.choice(('sum', 'mean', 'amax'))}(1)"
    setup += "; self.o = nn.Linear(2, 2)"
    data = tokens(sizes, 3)
    return Program(source(setup, f"{first}\nreturn self.o(h)"), tuple(data), seed, False, 2)


@family
def memory(r: random.Random, seed: int, sizes: Sequence[int]) -> Program:
    """The nearest of learnt codes, by a straight-through estimate or softly."""
    way = r.choice(
        (
            "i = d.argmin(1); q = self.codes[i]; z = z + (q - z.detach())",
            "z = z + (-d).softmax(1) @ self.codes",
            "i = d.argmin(1); z = z * F.embedding(i, self.codes)",
            "i = d.topk(2, largest=False).indices; z = z + self.codes[i].mean(1)",
        )
    )
    body = f"z = torch.tanh(self.a(x)); d = torch.cdist(z, self.codes)\n{way}\nreturn self.o(z)"
    setup = (
        "self.a, self.o = nn.Linear(3, 2), nn.Linear(2, 2)\n"
        "self.codes = nn.Parameter(torch.randn(4, 2))"
    )
    return Program(source(setup, body), tuple(reals(r, sizes, 3)), seed, False, 2)


@family
def adapters(r: random.Random, seed: int, sizes: Sequence[int]) -> Program:
    """A frozen layer with a low-rank addition that some examples use."""
    on = r.choice(("torch.ones(len(x), 1)", "(x[:, :1] > 0)", "(x[:, :1] > 1.5)"))
    body = f"""
h = self.base(x); k = {on}
if k.any(): h = h + k * {r.choice(("(x @ self.down) @ self.up", "self.lora(x)"))}
return self.o(torch.tanh(h))"""
    setup = (
        "self.base = nn.Linear(3, 3).requires_grad_(False); self.o = nn.Linear(3, 2)\n"
        "self.down, self.up = nn.Parameter(torch.randn(3, 1)), nn.Parameter(torch.randn(1, 3))\n"
        "self.lora = nn.Sequential(nn.Linear(3, 1, bias=False), nn.Linear(1, 3, bias=False))"
    )
    return Program(source(setup, body), tuple(reals(r, sizes, 3)), seed, False, 2)


# --- not one fixed function of one example at a time ----------------------------------------------


def several(sizes: Sequence[int]) -> list[int]:
    """Batches that are large enough to show that examples are mixed."""
    return [n + 3 for n in sizes]


@family
def mixing(r: random.Random, seed: int, sizes: Sequence[int]) -> Program:
    """Examples that see each other."""
    way = r.choice(
        (
            "h = h - h.mean(0)",
            "h = h + 0.1 * h.roll(1, 0)",
            "h = (h @ h.mT).softmax(-1) @ h",
            "h = h / h.norm()",
            "h = h * h.amax(0)",
            "h = h.flip(0)",
            "h = torch.cat([h[:1], h[1:] + h[:-1] * 1e-3])",
            "h = self.n(h)",
        )
    )
    norm = "\nself.n = nn.BatchNorm1d(3, track_running_stats=False)" if "self.n" in way else ""
    setup = f"self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 2){norm}"
    body = f"h = torch.tanh(self.a(x))\n{way}\nreturn self.b(h)"
    data = reals(r, several(sizes), 3)
    return Program(source(setup, body), tuple(data), seed, False, 2, fixed=False)


@family
def late_mixing(r: random.Random, seed: int, sizes: Sequence[int]) -> Program:
    """Examples that see each other in the second batch alone."""
    way = r.choice(("h = h - h.mean(0)", "h = h.flip(0)", "h = h / h.norm()"))
    setup = "self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 2)"
    body = f"h = torch.tanh(self.a(x))\nif x.abs().amax() > 9: {way}\nreturn self.b(h)"
    n = several(sizes)[0]
    data = (f"torch.randn({n}, 3)", f"torch.randn({n}, 3) + 10")
    return Program(source(setup, body), data, seed, False, 2, fixed=False)


@family
def noisy(r: random.Random, seed: int, sizes: Sequence[int]) -> Program:
    """Random at every call, in training mode or always."""
    way, train = r.choice(
        (
            ("h = h * (torch.rand_like(h) > 0.5)", False),
            ("h = h + 1e-3 * torch.randn(3)", False),
            ("h = self.d(h)", True),
            ("h = F.dropout(h, 0.5)", False),
            ("h = h * (torch.rand(len(h), 1) > 0.5)", False),
            ("h = F.rrelu(-h.abs(), training=True)", False),
            ("h = h.gather(1, torch.rand_like(h).argsort(1))", False),
        )
    )
    setup = "self.a, self.b, self.d = nn.Linear(3, 3), nn.Linear(3, 2), nn.Dropout(0.5)"
    body = f"h = torch.tanh(self.a(x))\n{way}\nreturn self.b(h)"
    data = reals(r, [n + 6 for n in sizes], 3)
    return Program(source(setup, body), tuple(data), seed, False, 2, fixed=False, train=train)


@family
def learnt_states(r: random.Random, seed: int, sizes: Sequence[int]) -> Program:
    """A learnt state or learnt queries, which are repeated for each example of a batch."""
    repeat = r.choice(
        (
            "s = self.s.expand(len(x), -1, -1)",
            "s = self.s.repeat(len(x), 1, 1)",
            "s = torch.stack([self.s] * len(x))",
            "s = self.s.unsqueeze(0).repeat_interleave(len(x), 0)",
            "s = self.s[None].expand(len(x), 2, 3).contiguous()",
        )
    )
    use = r.choice(
        (
            "h = self.c(x[:, 0], s[:, 0]) + self.c(x[:, 1], s[:, 1])",
            "h = F.scaled_dot_product_attention(s, self.a(x), x).tanh().sum(1)",
            "h = torch.cat([s, self.a(x)], 1).cumsum(1).tanh().mean(1)",
            "h = torch.bmm(x, s.mT).tanh().sum(2) @ self.p + (s * s).sum(1)",
            "h = self.m(s, x, x)[0].sum(1) + s[:, 0]",
        )
    )
    setup = (
        "self.s, self.p = nn.Parameter(torch.randn(2, 3)), nn.Parameter(torch.randn(3, 3))\n"
        "self.c, self.a, self.b = nn.GRUCell(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)\n"
        "self.m = nn.MultiheadAttention(3, 1, batch_first=True)"
    )
    body = f"{repeat}\n{use}\nreturn self.b(h)"
    return Program(source(setup, body), tuple(reals(r, sizes, 3, 3)), seed, False, 2)


@family
def written_tokens(r: random.Random, seed: int, sizes: Sequence[int]) -> Program:
    """A token that is assigned to places of the data, which the data may choose."""
    write = r.choice(
        (
            "h[x[..., 0] > 0.5] = self.t",
            "h[:, 0] = self.t",
            "h[:, 1:] = self.t * 2",
            "h[torch.arange(len(x)), (x[:, :, 1] > 0).sum(1) % 3] = self.t",
            "h.masked_fill_(x > 0.5, self.t[0])",
            "h.index_copy_(1, torch.tensor([2, 0]), self.t.expand(len(x), 2, 3))",
            "z = x.new_zeros(x.shape); z[:, 0] = self.t; z[:, 1:] = h[:, 1:]; h = z",
        )
    )
    setup = (
        "self.t = nn.Parameter(torch.randn(3)); self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 2)"
    )
    body = f"h = self.a(x).tanh().clone()\n{write}\nreturn self.b(h.cumsum(1).tanh().sum(1))"
    return Program(source(setup, body), tuple(reals(r, sizes, 3, 3)), seed, False, 2)
