"""Ctrl-C at random lines: what was computed comes back, or nothing does and nothing is changed.

`python -m tests.fuzz.interrupts 3000 0` runs so many, spread over all jobs, with a seed.
"""

import collections
import random
import sys
import warnings

import torch
from torch import nn

import nngeo_lazy as ng
from nngeo_lazy.errors import DataError

from .files import lines_of


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def batches():
    torch.manual_seed(1)
    return [(torch.randn(5, 3).double(), torch.randint(3, (5,))) for _ in range(2)]


def flags():
    cuda, mha = torch.backends.cuda, torch.backends.mha
    return (
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
        mha.get_fastpath_enabled(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        len(torch.overrides._get_current_function_mode_stack()),
        torch._C._functorch.get_dynamic_layer_stack_depth(),
    )


def differing(settings):
    """Which flags are not what they were."""
    now = flags()
    return "" if now == settings else f"flags {settings} -> {now}"


def world(model):
    """What nothing may change."""
    tensors = [(n, id(p), p.detach().clone()) for n, p in model.named_parameters()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    return tensors, hooks, [m.training for m in model.modules()], [sorted(vars(m)) for m in model]


def changed(before, model):
    now = world(model)
    if before[1:] != now[1:]:
        return "hooks, modes or attributes"
    apart = [
        name
        for (name, i, p), (_, j, q) in zip(before[0], now[0], strict=True)
        if i != j or not torch.equal(p, q)
    ]
    return ", ".join(apart)


class Jobs:
    """What is interrupted, and what is wrong with what came back."""

    def __init__(self):
        self.model, self.data = network(), batches()
        self.F = ng.FIM(self.model, self.data, "implicit", likelihood="categorical")
        self.damped = self.F.damped(0.01)
        self.J = ng.Jacobian(self.model, self.data, "implicit")
        self.A, self.B = self.F.to_dense(), self.J.to_dense()
        self.v = torch.linspace(-1, 1, len(self.A)).double()
        self.step = torch.linalg.solve(self.A + 0.01 * torch.eye(len(self.A)).double(), self.v)

    def fim(self, representation):
        F = ng.FIM(self.model, self.data, representation, likelihood="categorical")
        return "" if torch.allclose(F @ self.v, self.expected(representation)) else "build"

    def expected(self, representation):
        known = self.__dict__.setdefault("known", {})
        if representation not in known:
            F = ng.FIM(network(), batches(), representation, likelihood="categorical")
            known[representation] = F @ self.v
        return known[representation]

    def build_dense(self):
        return self.fim("dense")

    def build_kfac(self):
        return self.fim("kfac")

    def build_ekfac(self):
        return self.fim("ekfac")

    def build_implicit(self):
        return self.fim("implicit")

    def product(self):
        return "" if torch.allclose(self.F @ self.v, self.A @ self.v) else "product"

    def eigsh(self):
        values, vectors = found = ng.eigsh(self.F, 3, seed=0)
        apart = (self.A @ vectors - vectors * values).norm(dim=0)
        return "" if bool((apart <= 1.1 * found.residuals + 1e-12).all()) else "eigsh"

    def svds(self):
        U, S, Vh = found = ng.svds(self.J, 3, seed=0)
        forth, back = self.B @ Vh.mT - U * S, self.B.mT @ U - Vh.mT * S
        apart = torch.hypot(forth.norm(dim=0), back.norm(dim=0))
        return "" if bool((apart <= 1.1 * found.residuals + 1e-12).all()) else "svds"

    def density(self):
        found = ng.spectral_density(self.F, seed=0, probes=4, steps=8)
        top = float(torch.linalg.eigvalsh(self.A)[-1]) * (1 + 1e-8)
        inside = bool((found.nodes <= top).all()) and bool((found.nodes >= -1e-8).all())
        return "" if inside and abs(float(found.weights.sum()) - 1) < 1e-9 else "density"

    def logdet(self):
        found = ng.logdet(self.damped, seed=0, probes=6, steps=6)
        return "" if abs(float(found.value)) < 1e3 else "logdet"

    def trace(self):
        found = ng.trace(self.F @ self.F, seed=0, probes=6)
        return "" if 0 <= float(found.value) < 10 * float((self.A @ self.A).trace()) else "trace"

    def solve(self):
        x = self.damped.solve(self.v)
        return "" if torch.allclose(x, self.step, rtol=1e-6) else "solve"

    def solution(self):
        found = ng.solve(self.F, self.v, damping=0.01, method="minres")
        r = self.A @ found.x + 0.01 * found.x - self.v
        off = abs(float(r.norm() / self.v.norm()) - float(found.residual))
        return "" if off < 1e-6 else "solution"

    def matrix_function(self):
        found = ng.matrix_function(self.F, torch.exp, self.v)
        want = torch.linalg.matrix_exp(self.A) @ self.v
        return "" if torch.allclose(found, want, rtol=1e-6) else "matrix_function"

    NAMES = (
        *("build_dense", "build_kfac", "build_ekfac", "build_implicit", "product", "eigsh", "svds"),
        *("density", "logdet", "trace", "solve", "solution", "matrix_function"),
    )


def attempt(job, stop):
    """What is wrong with a job that is interrupted before a line; and whether it came back."""
    found = []

    def run():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found.append(job())

    lines_of(run, stop)
    return (found[0], True) if found else ("", False)


def interrupted(count, names=Jobs.NAMES, seed=0):
    """Outcomes of so many interrupts at random lines."""
    jobs, draw, seen = Jobs(), random.Random(seed), collections.Counter()
    before, settings = world(jobs.model), flags()
    lines = {}
    for name in names:
        jobs.expected("implicit")
        getattr(jobs, name)()  # what is made once
        lines[name] = lines_of(getattr(jobs, name))
    for k in range(count):
        name = names[k % len(names)]
        wrong, came = attempt(getattr(jobs, name), draw.randrange(lines[name]))
        seen["result" if came else "KeyboardInterrupt"] += 1
        for fault in (wrong, changed(before, jobs.model), differing(settings)):
            if fault:
                seen[f"WRONG after {name}: {fault}"] += 1
        torch.set_grad_enabled(True)  # so that each fault is counted once
        if not torch.allclose(jobs.F @ jobs.v, jobs.A @ jobs.v):
            seen[f"WRONG after {name}: the operator's products"] += 1
    return seen


def optimizers(count, representation="kfac", seed=0):
    """The same of training loops, which then go on."""
    draw, seen, settings = random.Random(seed), collections.Counter(), flags()
    (x, y), _ = batches()
    model = network()
    make = ng.optim.NaturalGradient
    optimizer = make(model, representation, "categorical", lr=0.1)

    def step():
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    step()
    lines, hooks = lines_of(step), world(model)[1:]
    for _ in range(count):
        _, came = attempt(step, draw.randrange(lines))
        seen["result" if came else "KeyboardInterrupt"] += 1
        try:
            step()  # goes on
        except DataError:  # "run the model and loss.backward() again"
            step()
        if world(model)[1:] != hooks or flags() != settings:
            seen["WRONG: hooks, modes or flags"] += 1
        if not all(bool(p.isfinite().all()) for p in model.parameters()):
            seen["WRONG: parameters"] += 1
    return seen


if __name__ == "__main__":
    torch.set_num_threads(1)
    count, seed = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    print("jobs:", dict(interrupted(count * 4 // 5, seed=seed)))
    for name in ("kfac", "diagonal"):
        print(f"optimizer {name}:", dict(optimizers(count // 10, name, seed)))
