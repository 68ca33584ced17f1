"""What the workers run: small problems, on shares of one list of batches."""

import contextlib
import importlib
import os
import time

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset

import nngeo_lazy as ng
from nngeo_lazy import averages, folders, kept
from nngeo_lazy.collectives import Group
from nngeo_lazy.likelihoods import Categorical, Gaussian
from nngeo_lazy.operators import EigenKroneckerLinearOperator
from nngeo_lazy.optim import running
from nngeo_lazy.representations import recipes

SIZES = (4, 4, 4, 4, 4, 3)  # examples of each batch: the last one is short


def exact_net():
    """Small whole numbers everywhere, so that every sum is exact in any order."""
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randint(-2, 3, p.shape, generator=generator))
    return net


def exact_data(sizes=SIZES):
    generator = torch.Generator().manual_seed(6)

    def whole(*shape):
        return torch.randint(-3, 4, shape, generator=generator).to(torch.get_default_dtype())

    return [(whole(n, 3), whole(n, 2)) for n in sizes]


def smooth_net():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3)
    )


def smooth_data(sizes=SIZES):
    torch.manual_seed(2)
    return [(torch.randn(n, 1, 4, 4), torch.randint(3, (n,))) for n in sizes]


def built(kind, representation, estimator, data=None, **options):
    """A Fisher of the exact or the smooth problem; `data` is given, or shared out."""
    model, batches = (
        (exact_net(), exact_data()) if kind == "exact" else (smooth_net(), smooth_data())
    )
    likelihood = Gaussian() if kind == "exact" else Categorical()
    batches = batches if data is None else data
    return ng.FIM(
        model, batches, representation, likelihood=likelihood, estimator=estimator, **options
    )


def facts_of(F):
    return F.num_examples, F.num_terms, F.info.log_likelihood, repr(F), str(F.report())


def fisher(kind, representation, estimator, options=None):
    """The matrix of all data, and what is known of it."""
    batches = exact_data() if kind == "exact" else smooth_data()
    F = built(kind, representation, estimator, ng.Distributed(batches), **(options or {}))
    return F.to_dense().detach(), facts_of(F), [t.clone() for t in F.representation()]


def alone(kind, representation, estimator, options=None):
    """The same in one process, without a group."""
    F = built(kind, representation, estimator, **(options or {}))
    return F.to_dense().detach(), facts_of(F), [t.clone() for t in F.representation()]


def shared(counts, representation):
    """Shares of given numbers of batches, passed as each process's own."""
    rank = torch.distributed.get_rank()
    sizes = [2 + k % 3 for k in range(sum(counts))]
    start = sum(counts[:rank])
    own = smooth_data(sizes)[start : start + counts[rank]]
    data = ng.Distributed(Batches(own), own=True)
    F = built("smooth", representation, "exact", data)
    everything = built("smooth", representation, "exact", smooth_data(sizes))
    return F.to_dense(), everything.to_dense(), facts_of(F)[:4], facts_of(everything)[:4]


class Batches:
    """A re-iterable that may be empty."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


class Stream(IterableDataset):
    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


class BatchSamplerShard:
    """What accelerate puts into a loader: every W-th batch."""

    def __init__(self, count, batch_size, even_batches):
        self.num_processes = torch.distributed.get_world_size()
        self.process_index = torch.distributed.get_rank()
        self.batch_size, self.even_batches, self.drop_last = batch_size, even_batches, False
        self._batches = [
            list(range(k, min(k + batch_size, count))) for k in range(0, count, batch_size)
        ]

    def __iter__(self):
        return iter(self._batches[self.process_index :: self.num_processes])

    def __len__(self):
        return len(range(self.process_index, len(self._batches), self.num_processes))


def all_of(data):
    return TensorDataset(*(torch.cat(each) for each in zip(*data, strict=True)))


def loaders(which):
    """Every way to share out one data set."""
    data = smooth_data((4, 4, 4, 4))
    dataset = all_of(data)
    if which == "loader":
        loader = ng.Distributed(DataLoader(dataset, batch_size=4))
    elif which == "items are batches":
        loader = ng.Distributed(DataLoader(data, batch_size=None))
    elif which == "sampler":
        loader = ng.Distributed(DataLoader(dataset, 4, sampler=DistributedSampler(dataset)))
    elif which == "sampler, dropping":
        sampler = DistributedSampler(dataset, drop_last=True, shuffle=False)
        loader = ng.Distributed(DataLoader(dataset, 4, sampler=sampler))
    elif which == "accelerate":
        shard = BatchSamplerShard(16, 4, even_batches=False)
        loader = ng.Distributed(DataLoader(dataset, batch_sampler=shard))
    elif which == "stream":
        loader = ng.Distributed(DataLoader(Stream(data), batch_size=None), own=False)
    else:
        loader = ng.Distributed(Batches(data), own=False)
    F = built("smooth", "kfac", "exact", loader)
    return F.to_dense(), built("smooth", "kfac", "exact", data).to_dense(), F.num_examples


def implicit(builder, cache):
    """Products, columns, solves, spectra, estimates, draws and derivatives of a matrix-free one."""
    found = {}
    for name, data in (("shared", ng.Distributed(smooth_data())), ("alone", smooth_data())):
        model = smooth_net()
        representation = ng.representations.Implicit(cache=cache)
        if builder == "hessian":
            F = ng.Hessian(model, data, representation, loss=Categorical())
        elif builder == "ggn":
            F = ng.GGN(model, data, representation, loss=nn.CrossEntropyLoss())
        else:
            estimator, seed = ("mc", 3) if builder == "mc" else ("exact", None)
            F = ng.FIM(model, data, representation, estimator=estimator, seed=seed)
        torch.manual_seed(7)
        v, V = F.space.randn(), F.space.randn(3)
        w = F.space.values(model).detach().requires_grad_()
        out = {"v": F @ v, "V": F @ V, "dense": F.to_dense(), "diagonal": F.diagonal()}
        damped = F.damped(5.0)
        solution = ng.solve(damped, v, method="minres", tol=1e-10)
        out["solution"], out["iterations"] = solution.x, torch.tensor(float(solution.iterations))
        out["eigenvalues"] = ng.eigsh(F, 2, seed=0).eigenvalues
        out["trace"] = torch.as_tensor(ng.trace(F, probes=4, seed=0).value)
        if builder != "hessian":
            out["draw"] = F.sample(2, seed=5)
        if builder in ("ggn", "hessian"):
            value = v @ (F.at(w) @ v)
            (first,) = torch.autograd.grad(value, w, create_graph=True)
            (second,) = torch.autograd.grad(first @ v, w)
            out["first"], out["second"] = first.detach(), second
        found[name] = {key: value.detach() for key, value in out.items()}
    return found


def plans():
    lines = {}
    for name, data in (("shared", ng.Distributed(smooth_data())), ("alone", smooth_data())):
        lines[name] = ng.plan(ng.FIM, smooth_net(), data, "ekfac", likelihood=Categorical())
    plan = lines["shared"]
    return str(plan), plan.bytes, plan.processes, plan.bytes_sent, plan.flops, lines["alone"].bytes


def traffic(representation):
    """How much a build and a local solve exchange."""
    data = ng.Distributed(exact_data())
    F = built("exact", representation, "exact", data)
    after = vars(data.group.traffic).copy()
    assert all((repr(F), str(F.report()), F.shape, F.space))
    if representation != "implicit":
        F.solve(F.space.zeros() + 1, damping=1.0)
    return after, vars(data.group.traffic).copy()


def influence():
    model, train = smooth_net(), smooth_data()
    test = smooth_data((3,))[0]
    F = built("smooth", "ekfac", "exact")
    options = {"loss": Categorical(), "damping": 0.1}
    scores = {}
    for method in ("gradient", "newton"):
        shared = ng.influences(model, F, ng.Distributed(train), test, method=method, **options)
        scores[method] = shared, ng.influences(model, F, train, test, method=method, **options)
    return scores


def ddp(plain):
    net = smooth_net()
    model = DistributedDataParallel(net)
    data = smooth_data() if plain else ng.Distributed(smooth_data())
    F = built_of(model, data)
    return F.to_dense(), built_of(net, smooth_data()).to_dense(), F.space.names


def built_of(model, data, **options):
    return ng.FIM(
        model, data, options.pop("representation", "kfac"), likelihood=Categorical(), **options
    )


# --- failures -------------------------------------------------------------------------------------


class Failing:
    """Batches that raise, or kill the process, at one batch of one pass of one rank."""

    def __init__(self, batches, rank, error, at_pass):
        self.batches, self.error, self.at_pass = batches, error, at_pass
        self.mine = torch.distributed.get_rank() == rank
        self.passes = 0

    def __iter__(self):
        self.passes += 1
        for k, batch in enumerate(self.batches):
            if self.mine and self.passes == self.at_pass and k == 1:
                if self.error == "die":
                    os._exit(3)
                if self.error == "nan":
                    yield (batch[0] * float("nan"), batch[1])
                    continue
                if self.error == "labels":
                    yield (batch[0], batch[1] + 100)
                    continue
                raise {"value": ValueError, "interrupt": KeyboardInterrupt}[self.error]("broken")
            yield batch


def failing(rank, error, at_pass, representation="ekfac", estimator="empirical"):
    rank_of = torch.distributed.get_rank()
    data = Failing(smooth_data()[rank_of::2], rank, error, at_pass)
    F = built("smooth", representation, estimator, ng.Distributed(data, own=True))
    return F @ F.space.randn()


def phase(name, how, folder):
    """A call of which one step fails on the second process alone."""

    def fails(*args, **options):
        if how == "die":
            os._exit(1)
        raise ValueError("broken")

    where = {
        "eigendecomposition": (recipes, "factor_eigh"),
        "eigendecomposition of sharded blocks": (recipes, "factor_eigh"),
        "exchange": (Group, "sum_"),
        "solve": (EigenKroneckerLinearOperator, "_solve_columns"),
        "optimizer step": (running, "averaged"),
        "eigendecomposition of a step": (averages, "factor_eigh"),
        "save": (folders, "_write"),
    }[name]
    kept_as = getattr(*where)
    sharded = ng.representations.Sharded("ekfac")
    try:
        data = ng.Distributed(smooth_data())
        if name in ("solve", "save"):
            F = built("smooth", sharded, "empirical", data)
        if torch.distributed.get_rank() == 1:
            setattr(*where, fails)
        if name == "solve":
            return F.solve(torch.ones(F.shape[0]), damping=0.1)
        if name == "save":
            return ng.save(F, os.path.join(folder, "F/"))
        if "step" in name:
            inner = smooth_net()
            model = DistributedDataParallel(inner)
            optimizer = ng.optim.NaturalGradient(model, "kfac", "categorical", seed=0)
            x, y = smooth_data()[0]
            nn.functional.cross_entropy(model(x), y).backward()
            return optimizer.step()
        return built("smooth", sharded if "sharded" in name else "ekfac", "empirical", data)
    finally:
        setattr(*where, kept_as)


def usable():
    """Whether the group still works."""
    F = built("exact", "kfac", "exact", ng.Distributed(exact_data()))
    return F.num_examples


def mismatch(what):
    rank = torch.distributed.get_rank()
    model, data = smooth_net(), smooth_data()
    options = {}
    if what == "values" and rank == 1:
        with torch.no_grad():
            model[0].weight += 1e-9
    if what == "parameters" and rank == 1:
        options["params"] = "0"
    if what == "dtype" and rank == 1:
        model = model.float()
    if what == "representation":
        options["representation"] = "kfac" if rank == 0 else "diagonal"
    if what == "seed":
        options.update(estimator="mc", seed=rank)
    if what == "estimator":
        options["estimator"] = "exact" if rank == 0 else "empirical"
    if what == "order" and rank == 1:
        data = data[::-1]
    if what == "examples" and rank == 1:
        data = data[:-1]
    if what == "vector":
        F = built_of(model, ng.Distributed(data), representation="implicit")
        return F @ (F.space.zeros() + rank)
    if what == "only rank 0" and rank > 0:
        time.sleep(8)  # alive, but elsewhere
        return None
    return built_of(model, ng.Distributed(data), **options)


def sharded_model(kind):
    """A call on a model whose parameters lie in pieces on the ranks."""
    model, data = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)), torch.ones(5, 4)
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    if kind in ("tensor parallel", "optimizer"):
        parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    else:
        fully_shard(model, mesh=mesh)
    if kind == "optimizer":
        return ng.optim.NaturalGradient(model, "kfac", "gaussian")
    if kind == "full":
        options = StateDictOptions(full_state_dict=True)
        whole = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
        whole.load_state_dict(get_model_state_dict(model, options=options))
        if torch.distributed.get_rank() > 0:
            return None
        return ng.FIM(whole, data, likelihood="gaussian").num_examples
    return ng.FIM(model, ng.Distributed([data, data]), likelihood="gaussian")


class Small(nn.Module):
    """An embedding, a residual branch and a head, with a buffer and a hook of the user's."""

    def __init__(self):
        super().__init__()
        self.table, self.branch = nn.Embedding(7, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)
        self.register_buffer("scale", torch.tensor(0.5))
        self.branch.register_forward_hook(lambda module, args, output: output * 2)

    def forward(self, ids):
        h = self.table(ids)
        return self.head(h + self.scale * torch.tanh(self.branch(h)))


def fully_sharded(representation, builder="FIM"):
    """The matrix and a solution of a model in pieces, and of the whole one in one process."""
    torch.manual_seed(0)
    whole = Small()
    model = Small()
    model.load_state_dict(whole.state_dict())
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for part in (model.branch, model.head, model):
        fully_shard(part, mesh=mesh)
    ids, labels = torch.randint(7, (11, 4)), torch.randint(3, (11, 4))
    data = [(ids[:5], labels[:5]), (ids[5:8], labels[5:8]), (ids[8:], labels[8:])]
    nn.functional.cross_entropy(model(ids).flatten(0, 1), labels.flatten()).backward()
    before = [(type(m).__name__, len(m._forward_hooks)) for m in model.modules()]
    options = {"likelihood": "categorical"} if builder == "FIM" else {"loss": "categorical"}
    made = ng.representations.Sharded("ekfac") if representation == "sharded" else representation
    F = getattr(ng, builder)(model, ng.Distributed(data), made, **options)
    representation = "ekfac" if representation == "sharded" else representation
    alone = getattr(ng, builder)(whole, data, representation, **options)
    assert [(type(m).__name__, len(m._forward_hooks)) for m in model.modules()] == before
    gradients = {name: p.grad for name, p in model.named_parameters()}
    step = F.solve(gradients, damping=0.1)
    again = model(ids)  # it is as it was
    expected = alone.solve({n: g.full_tensor() for n, g in gradients.items()}, damping=0.1)
    for name, piece in step.items():
        assert piece.placements == gradients[name].placements
        assert piece.to_local().shape == gradients[name].to_local().shape
    found = {name: piece.full_tensor() for name, piece in step.items()}
    return F.to_dense(), alone.to_dense(), found, expected, torch.equal(again, whole(ids))


def fully_sharded_wrongly(what):
    model = Small()
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    fully_shard(model, mesh=mesh)
    data = [(torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.int64))]
    if what == "plain loader":
        return ng.FIM(model, data, likelihood="categorical")
    group = [torch.distributed.new_group([rank]) for rank in range(2)][torch.distributed.get_rank()]
    return ng.FIM(model, ng.Distributed(data, group=group), likelihood="categorical")


def bad(what):
    dataset = all_of(smooth_data((5, 4)))
    model = smooth_net()
    if what == "padding":
        sampler = DistributedSampler(dataset)
        data = ng.Distributed(DataLoader(dataset, 4, sampler=sampler))
    elif what == "accelerate, padding":
        shard = BatchSamplerShard(9, 2, even_batches=True)
        data = ng.Distributed(DataLoader(dataset, batch_sampler=shard))
    elif what == "stream":
        data = ng.Distributed(DataLoader(Stream(smooth_data()), batch_size=None))
    elif what == "custom":
        data = ng.Distributed(Batches(smooth_data()))
    elif what == "shuffle":
        data = ng.Distributed(DataLoader(dataset, 4, shuffle=True))
    elif what == "other group":
        sampler = DistributedSampler(dataset, num_replicas=3, rank=0)
        data = ng.Distributed(DataLoader(dataset, 3, sampler=sampler))
    elif what == "empty":
        data = ng.Distributed(Batches([]), own=True)
    else:
        data = ng.Distributed(smooth_data())
    if what == "jacobian":
        return ng.Jacobian(model, data)
    if what == "ntk":
        return ng.NTK(model, data)
    if what == "center":
        return built_of(model, data, representation="implicit", estimator="empirical", center=True)
    representation = "factored" if what == "factored" else "kfac"
    return built_of(model, data, representation=representation)


def not_a_member():
    group = torch.distributed.new_group([0])
    with contextlib.suppress(ZeroDivisionError):
        return ng.Distributed(smooth_data(), group=group).group.size


# --- blocks that lie on several processes ---------------------------------------------------------


def sharded(representation, options=None):
    """Every member of a sharded operator, and of the one that every process has whole."""
    options = {"estimator": "exact", **(options or {})}
    Sharded = ng.representations.Sharded
    S = built("smooth", Sharded(representation), data=ng.Distributed(smooth_data()), **options)
    F = built("smooth", representation, data=ng.Distributed(smooth_data()), **options)
    alone = built("smooth", representation, **options).to_dense()
    owners = getattr(S, "owners", None)
    found = {name: [] for name in ("sharded", "whole")}
    torch.manual_seed(7)
    v, named = F.space.randn(3), F.space.unravel(F.space.randn())
    damping = torch.tensor(0.3, requires_grad=True)
    vector, w = F.space.zeros() + torch.linspace(0.1, 1.0, len(F.space)), F.space.randn()
    for name, A in (("sharded", S), ("whole", F)):
        out = {"product": A @ v, "left": w @ A, "solve": A.solve(v, damping=0.1)}
        out["by name"] = A.space.ravel(A.solve(named, damping=0.1))
        out["by selector"] = A.solve(
            v, damping={"0": 0.1, "3.weight": 0.2, "3.bias": 0.2, "5": 1.0}
        )
        out["by vector"] = A.solve(v, damping=vector, tol=1e-13)
        out["diagonal"], out["trace"], out["dense"] = A.diagonal(), A.trace(), A.to_dense()
        out["logdet"] = A.damped(0.3).logdet()
        out["norms"] = torch.stack([A.norm(), A.norm(2)])
        inverse = A.inverse(damping=0.3)
        out["inverse"], out["form"] = inverse @ v, A.vTMv(v)
        out["scaled"], out["sum"] = (2.0 * A) @ v, (A + A.lerp(A, 0.5)) @ v
        out["sum with the whole one"], out["and back"] = (F + A) @ v, (A + F) @ v
        out["product of two"], out["with the whole"] = (A @ A) @ v, (F @ A) @ v
        out["block"] = A.block("3").to_dense()
        out["float32"] = (A.to(torch.float32) @ v.float()).double()
        out["eigenvalues"] = ng.eigsh(A, 3, seed=0).eigenvalues
        if representation != "quasi_diagonal":
            out["power"], out["pinv"] = A.damped(0.3).power(-0.5) @ v, A.pinv(1e-8) @ v
            out["nuclear norm"] = A.norm("nuc")
            values, basis = A._eigensystem()
            out["system"] = basis @ (values[:, None] * (basis.mT @ v))
        u = w.clone().requires_grad_()
        value = A.solve(u, damping=damping) @ A.solve(u, damping=damping)
        slopes = torch.autograd.grad(value, (u, damping), create_graph=True)
        (second,) = torch.autograd.grad((slopes[0] * w).sum() + slopes[1], u)
        out["slope in v"], out["slope in d"], out["second"] = *slopes, second
        out["slope of a multiple"] = torch.autograd.grad(
            (damping * A).damped(damping).trace(), damping
        )[0]
        out["slope in a block"] = torch.autograd.grad(
            A.solve(w, damping={"0": damping, "3": 0.1, "5": 0.1}) @ w, damping
        )[0]
        out["merged"] = ng.merge([A, A]) @ v
        found[name] = {key: value.detach() for key, value in out.items()}
    kept = sum(t.untyped_storage().nbytes() for t in S.representation())
    draws = S.damped(0.1).sample(2, seed=5)
    facts = S.num_examples, S.info.quantity == F.info.quantity, len(S.report()), repr(S)
    return found, kept, facts, owners, alone, draws


def sharded_traffic():
    """What a product, a solve and what makes operators exchange."""
    data = ng.Distributed(smooth_data())
    S = built("smooth", ng.representations.Sharded("ekfac"), "exact", data)
    counts, v = [], S.space.zeros() + 1

    def count(call):
        before = vars(data.group.traffic).copy()
        call()
        after = vars(data.group.traffic)
        counts.append({key: after[key] - before[key] for key in before})

    count(lambda: (repr(S), str(S.report()), S.shape, S.names, S.info))
    count(lambda: S @ v)
    count(lambda: S.solve(v, damping=1.0))
    count(lambda: S.inverse(damping=1.0))
    return counts, len(S.space)


def sharded_failing(what):
    rank = torch.distributed.get_rank()
    Sharded = ng.representations.Sharded
    if what == "plain loader":
        return built("smooth", Sharded("kfac"), "exact")
    S = built("smooth", Sharded("kfac"), "exact", ng.Distributed(smooth_data()))
    if what == "singular":  # in the block of one process
        k = next(k for k, owner in enumerate(S.owners) if owner == 1)
        if rank == 1:
            S.members[k].left.zero_()
        return S.solve(S.space.zeros() + 1)
    if what == "vector":
        return S @ (S.space.zeros() + rank)
    if what == "only rank 0":
        time.sleep(8 * rank)
        return S @ S.space.zeros() if rank == 0 else None
    if what == "basis":
        return ng.representations.EKFAC(basis=S)
    if what == "state":
        return S.state_dict()
    if what == "member":
        k = next(k for k, owner in enumerate(S.owners) if owner != rank)
        return S.members[k].diagonal()
    if what == "other owners":
        T = built("smooth", Sharded("ekfac"), "exact", ng.Distributed(smooth_data()))
        return ng.merge([S, T])
    raise ValueError(what)


def saved(folder):
    """Every process writes its own blocks; what is read is what was written."""
    S = built("smooth", ng.representations.Sharded("ekfac"), "exact", ng.Distributed(smooth_data()))
    ng.save(S, f"{folder}/F/")
    return S.to_dense()


def loaded(folder):
    lazy = ng.load(folder, lazy=True)
    return ng.load(folder).to_dense(), lazy.to_dense(), lazy.num_examples


def save_failing(folder):
    S = built("smooth", ng.representations.Sharded("ekfac"), "exact", ng.Distributed(smooth_data()))
    if torch.distributed.get_rank() == 1:
        folders._write = lambda *args: 1 / 0
    try:
        ng.save(S, f"{folder}/F/")
    finally:
        importlib.reload(folders)


def stored_build(folder, sharded):
    """A build in a folder that one process interrupts, and that all go on with."""
    kept.KEPT_BYTES = 0  # every pass reads the data
    inner = ng.representations.Sharded("ekfac") if sharded else "ekfac"
    stored = ng.representations.Stored(inner, f"{folder}/F")
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    errors = []
    for at_pass in (2, 0):
        data = Failing(smooth_data()[rank::size], 1, "value", at_pass)
        try:
            F = built("smooth", stored, "exact", ng.Distributed(data, own=True))
        except (ValueError, ng.errors.DistributedError) as error:
            errors.append(str(error))
    kept.KEPT_BYTES = 2**26
    return errors, data.passes, F.to_dense(), built("smooth", "ekfac", "exact").to_dense()


def counted(group, call):
    """What a call exchanges, and what it returns."""
    before = vars(group.traffic).copy()
    result = call()
    return {key: now - before[key] for key, now in vars(group.traffic).items()}, result


def product_traffic():
    """What products with matrix-free matrices, and what is made of them, exchange."""
    data = ng.Distributed(smooth_data())
    model, loss = smooth_net(), Categorical()
    matrices = {
        "fim": built("smooth", "implicit", "exact", data),
        "ggn": ng.GGN(model, data, loss=loss),
        "hessian": ng.Hessian(model, data, loss=loss),
    }
    found = {}
    for name, F in matrices.items():
        v = F.space.zeros() + 1
        columns = torch.ones(len(F.space), 3)
        F @ v  # the first one proves the way of differentiation
        calls = {
            "facts": lambda F=F: (repr(F), F.shape, F.space, str(F.info)),
            "product": lambda F=F, v=v: F @ v,
            "three": lambda F=F, columns=columns: F @ columns,
            "trace": lambda F=F: ng.trace(F, probes=4, seed=0),
            "eigsh": lambda F=F: ng.eigsh(F, 1, seed=0),
        }
        if name != "hessian":
            calls["solve"] = lambda F=F, v=v: ng.solve(F.damped(1.0), v)
        found[name] = {key: counted(data.group, call) for key, call in calls.items()}
        found[name] = {
            key: (count, getattr(result, "products", getattr(result, "iterations", None)))
            for key, (count, result) in found[name].items()
        }
    return found, len(F.space)
