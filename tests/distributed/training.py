"""What the workers run: training loops under DistributedDataParallel."""

import copy

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from nngeo_lazy.optim import HessianFree, LevenbergMarquardt, NaturalGradient, Preconditioner

REPRESENTATIONS = {
    "dense": "dense",
    "diagonal": "diagonal",
    "kfac": "kfac",
    "ekfac": "ekfac",
    "quasi_diagonal": "quasi_diagonal",
    "implicit": HessianFree(tol=1e-12, max_iter=200),
}


def net(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def data(steps, n=24):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
        yield x, (x[:, 0] > 0).long() + (x[:, 1] > 0)


def share(x):
    rank, size = dist.get_rank(), dist.get_world_size()
    return x[rank * len(x) // size : (rank + 1) * len(x) // size]


def train(model, optimizer, batches, mine=lambda x: x, loss=functional.cross_entropy):
    for x, y in batches:

        def closure(x=x, y=y):
            optimizer.zero_grad()
            value = loss(model(mine(x)), mine(y))
            value.backward()
            return value

        optimizer.step(closure)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def looped(name, steps, options):
    """The weights of a loop on shares, and of a loop of this process alone on whole batches."""
    options = {"seed": 0, "warmup": 4, "update_every": 3, **options}
    if options.get("damping") == "follows":
        options["damping"] = LevenbergMarquardt(every=2)
    found = []
    for shared in (True, False):
        inner = net()
        model = DistributedDataParallel(inner) if shared else inner
        optimizer = NaturalGradient(model, REPRESENTATIONS[name], "categorical", **options)
        train(model, optimizer, data(steps), share if shared else lambda x: x)
        F = optimizer.operator.to_dense() if name != "implicit" else torch.zeros(1)
        found.append((weights(inner), F, optimizer.skipped_steps))
    return found


def in_pieces(inner):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for part in (inner[0], inner):
        fully_shard(part, mesh=mesh)
    return inner


def gathered(model):
    return torch.cat([p.full_tensor().detach().flatten() for p in model.parameters()])


def sharded(name, steps, options, kind="whole"):
    """The weights of a model in pieces trained on shares, and of a whole one on whole batches."""
    options = {"seed": 0, "warmup": 2, "update_every": 2, **options}
    found = []
    for shared in (True, False):
        model = in_pieces(net()) if shared else net()
        mine = share if shared else lambda x: x
        params = {
            "whole": None,
            "tensors": [{"params": model[2].parameters(), "lr": 0.5}],
            "module": model[2],
        }
        given = {"params": params.get(kind), **options}
        if kind == "preconditioner":
            preconditioner = Preconditioner(model, REPRESENTATIONS[name], **given)
            behind = torch.optim.SGD(model.parameters(), lr=1.0)
        else:
            optimizer = NaturalGradient(model, REPRESENTATIONS[name], **given)
        for k, (x, y) in enumerate(data(steps)):
            x, y = mine(x), mine(y)
            model.zero_grad()
            half = len(x) // 2 if kind == "accumulated" else len(x)
            for part in (slice(0, half), slice(half, len(x))):
                if half < len(x) or part.start == 0:
                    scale = half / len(x)
                    (scale * functional.cross_entropy(model(x[part]), y[part])).backward()
            if kind == "preconditioner":
                preconditioner.step()
                behind.step()
            else:
                optimizer.step()
            if kind == "resumed" and k == steps // 2:
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = NaturalGradient(model, REPRESENTATIONS[name], **given)
                optimizer.load_state_dict(state)
        found.append(gathered(model) if shared else weights(model))
    return found


def scaled(kind):
    """Sums, and losses whose scale does not show."""
    found = []
    losses = {
        "sum": lambda f, y: functional.cross_entropy(f, y, reduction="sum"),
        "mse": lambda f, y: functional.mse_loss(f, functional.one_hot(y, 3).double()),
        "huber": lambda f, y: functional.huber_loss(f, functional.one_hot(y, 3).double()),
    }
    likelihood = {"sum": None, "mse": nn.MSELoss(), "huber": None}[kind]
    for shared in (True, False):
        inner = net()
        model = DistributedDataParallel(inner) if shared else inner
        estimator = "empirical" if kind == "huber" else "exact"
        optimizer = NaturalGradient(model, "kfac", likelihood, estimator=estimator, seed=0)
        batches = data(12)
        train(model, optimizer, batches, share if shared else lambda x: x, losses[kind])
        found.append(weights(inner))
    return found


def accumulated():
    """Two backward passes for each step, the first one without an exchange."""
    found = []
    for shared in (True, False):
        inner = net()
        model = DistributedDataParallel(inner) if shared else inner
        optimizer = NaturalGradient(model, "kfac", estimator="exact", seed=0)
        mine = share if shared else lambda x: x
        for x, y in data(8):
            optimizer.zero_grad()
            x, y = mine(x), mine(y)
            half = len(x) // 2
            first = functional.cross_entropy(model(x[:half]), y[:half]) / 2
            if shared:
                with model.no_sync():
                    (functional.cross_entropy(model(x[:half]), y[:half]) / 2).backward()
            else:
                first.backward()
            (functional.cross_entropy(model(x[half:]), y[half:]) / 2).backward()
            optimizer.step()
        found.append(weights(inner))
    return found


def drawn(name, second):
    """Labels that are drawn; the weights of each rank, and the losses before and after."""
    inner = net(torch.float32)
    model = DistributedDataParallel(inner)
    options = {"second_moments": True} if second else {}
    optimizer = NaturalGradient(model, name, seed=3, **options)
    batches = [(x.float(), y) for x, y in data(40)]
    before = functional.cross_entropy(inner(batches[0][0]), batches[0][1]).item()
    train(model, optimizer, batches, share)
    after = functional.cross_entropy(inner(batches[0][0]), batches[0][1]).item()
    return weights(inner), before, after, optimizer._group.traffic.sends


def begun(steps):
    """The state of a run after some steps, and the weights after five more."""
    inner = net()
    model = DistributedDataParallel(inner)
    optimizer = NaturalGradient(model, "ekfac", estimator="exact", seed=0, warmup=4, update_every=3)
    batches = list(data(steps + 5))
    train(model, optimizer, batches[:steps], share)
    state = copy.deepcopy((inner.state_dict(), optimizer.state_dict()))
    train(model, optimizer, batches[steps:], share)
    return state, weights(inner)


def resumed(state, steps):
    """The weights after five more steps of a run that other processes began."""
    inner = net()
    inner.load_state_dict(state[0])
    model = DistributedDataParallel(inner) if dist.get_world_size() > 1 else inner
    optimizer = NaturalGradient(model, "ekfac", estimator="exact", seed=0, warmup=4, update_every=3)
    optimizer.load_state_dict(state[1])
    train(model, optimizer, list(data(steps + 5))[steps:], share)
    return weights(inner)


def preconditioned():
    inner = net()
    model = DistributedDataParallel(inner)
    preconditioner = Preconditioner(model, "kfac", seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    losses = []
    for x, y in data(25):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(share(x)), share(y))
        loss.backward()
        preconditioner.step()
        optimizer.step()
        losses.append(loss.item())
    return weights(inner), losses


def compiled():
    """The module is compiled, and then wrapped."""
    inner = net(torch.float32)
    model = DistributedDataParallel(torch.compile(inner, backend="eager"))
    optimizer = NaturalGradient(model, seed=0, warmup=3)
    train(model, optimizer, [(x.float(), y) for x, y in data(8)], share)
    return weights(inner), optimizer.state_dict()["curvature"]["parameters"]


def wrong(what):
    rank = dist.get_rank()
    inner = net()
    if what == "inside":
        model = DistributedDataParallel(inner)
        train(model, NaturalGradient(inner), data(1), share)
    model = DistributedDataParallel(inner)
    if what == "kernel":
        NaturalGradient(model, "kernel")
    if what == "compiled":
        NaturalGradient(torch.compile(model))
    if what == "representation":
        NaturalGradient(model, "kfac" if rank == 0 else "diagonal")
    if what == "seed":
        NaturalGradient(model, seed=rank)
    if what == "parameters":
        NaturalGradient(model, params="0" if rank == 0 else "2")
    optimizer = NaturalGradient(model)
    if what == "no pass":
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        if rank == 0:
            with model.no_sync():
                functional.cross_entropy(model(torch.ones(3, 4)), torch.arange(3)).backward()
        optimizer.step()
    if what == "not finite":
        found = []
        for k, (x, y) in enumerate(data(3)):
            x = share(x)
            if k == 1 and rank == 1:
                x = x * float("nan")
            before = weights(inner)
            optimizer.zero_grad()
            functional.cross_entropy(model(x), share(y)).backward()
            optimizer.step()
            found.append(not torch.equal(before, weights(inner)))
        return found, optimizer.skipped_steps
    return None


def step_traffic():
    """What a plain step and a refresh of KFAC exchange, each step after the other."""
    inner = net()
    model = DistributedDataParallel(inner)
    optimizer = NaturalGradient(model, "kfac", seed=0, warmup=2, update_every=4)
    counts = []
    for x, y in data(12):
        before = vars(optimizer._group.traffic).copy()
        train(model, optimizer, [(x, y)], share)
        after = vars(optimizer._group.traffic)
        counts.append({key: after[key] - before[key] for key in before})
    return counts
