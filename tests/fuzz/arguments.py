"""Wrong calls of everything public, generated from the signatures.

    python -m tests.fuzz.arguments --calls 250
    python -m tests.fuzz.arguments --only FIM --accepted

Outcomes: named (an error of the package, or one that its code raises on purpose); accepted (the
argument has a meaning, or is not looked at); foreign (whatever torch, numpy, scipy or Python raise
when they meet the argument); harmed (the model is not what it was).
"""

import argparse
import contextlib
import dataclasses
import inspect
import linecache
import os
import random
import signal
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import gpytorch
import numpy as np
import torch
from torch import nn

import nngeo_lazy as ng
import nngeo_lazy.gp
from nngeo_lazy.errors import NNGeoError
from nngeo_lazy.operators import BaseLinearOperator

SECONDS = 20  # of one call
SAYS = ("expected", "needs", "takes", "cannot", "missing", "unknown", "matches", "pass ", "must")


class HungError(Exception):
    """A call that does not come back."""


@dataclasses.dataclass(frozen=True)
class Target:
    """Something that is called.

    Attributes:
        name: what is printed.
        call: it.
        good: arguments of a right call, by name.
        more: names of keywords that the signature does not show.
        wrong: names of arguments that are made wrong; by default all.
    """

    name: str
    call: Callable[..., Any]
    good: dict[str, Any]
    more: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        """The arguments that are made wrong."""
        found = inspect.signature(self.call).parameters.values()
        shown = [p.name for p in found if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
        return [*shown, *self.more]


@dataclasses.dataclass(frozen=True)
class Result:
    """What came of one call: "named", "accepted", "foreign" or "harmed"."""

    kind: str
    target: str
    wrong: str
    text: str = ""

    @property
    def cause(self) -> str:
        """Where it comes from: failures of one cause are mended at one place."""
        return f"{self.target}({self.wrong.split('=')[0]}) {self.text.split('|')[-1]}"


class Subject:
    """A small problem, and what is right in it, made again for each target."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
        self.x, self.y = torch.randn(8, 3), torch.arange(8) % 3
        self.data = (self.x, self.y)
        self.F = ng.FIM(self.model, self.data)
        self.dense = ng.FIM(self.model, self.data, "dense")
        self.implicit = ng.FIM(self.model, self.data, "implicit")
        self.J = ng.Jacobian(self.model, self.data, "dense")
        self.w = self.F.space.values(self.model).detach().clone()
        self.before = {k: t.clone() for k, t in self.model.state_dict().items()}

    @property
    def harmed(self) -> bool:
        """Whether the model has changed."""
        now = self.model.state_dict()
        same = all(torch.equal(now[k], t) for k, t in self.before.items())
        return not same or not all(p.requires_grad for p in self.model.parameters())

    def pool(self) -> dict[str, Any]:
        """What may stand in the place of any argument."""
        P = len(self.w)
        return {
            "None": None,
            "'text'": "text",
            "''": "",
            "0": 0,
            "-1": -1,
            "2.0": 2.0,
            "1.5": 1.5,
            "nan": float("nan"),
            "inf": float("inf"),
            "-inf": -float("inf"),
            "True": True,
            "1j": 1j,
            "[]": [],
            "[1]": [1],
            "{}": {},
            "{'a': 1}": {"a": 1},
            "{1: x}": {1: self.x},
            "(1, 2)": (1, 2),
            "set": {1},
            "object()": object(),
            "bytes": b"ab",
            "type": nn.Linear,
            "lambda:": lambda: None,
            "lambda a: a": lambda a: a,
            "numpy vector": self.w.numpy(),
            "numpy matrix": np.eye(3, dtype=np.float32),
            "numpy number": np.float64(0.5),
            "range": range(3),
            "iterator": iter([1, 2]),
            "model": self.model,
            "another model": nn.Linear(2, 2),
            "data": self.data,
            "operator": self.F,
            "rectangle": self.J,
            "space": self.F.space,
            "vector": self.w,
            "short vector": torch.ones(P - 1),
            "double vector": self.w.double(),
            "whole vector": torch.ones(P, dtype=torch.long),
            "columns": torch.ones(P, 2),
            "nan vector": torch.full((P,), torch.nan),
            "empty": torch.empty(0),
            "0-d": torch.tensor(0.5),
            "0-d nan": torch.tensor(torch.nan),
            "-vector": -torch.ones(P),
            "[vector]": [self.w],
            "{name: short}": {n: torch.ones(1) for n in self.F.space.names},
            "{name: None}": dict.fromkeys(self.F.space.names),
        }


def targets(s: Subject) -> list[Target]:
    """Everything that is public and takes arguments."""
    good = {
        "model": s.model,
        "loader": s.data,
        "loss": "categorical",
        "x1": s.x,
        "A": s.implicit,
        "K": s.dense,
        "F": s.F,
        "b": s.w,
        "v": s.w,
        "w": s.model,
        "y": torch.ones(len(s.w)),
        "k": 2,
        "rank": 2,
        "damping": 0.1,
        "function": torch.exp,
        "anchors": [(s.F, s.w)],
        "space": s.F.space,
        "train": s.data,
        "test": s.data,
        "path": "file.pt",
        "path_or_state": s.F.state_dict(),
        "ops": [s.F, s.F],
        "fraction": 0.5,
        "shapes": {"a": (2, 3)},
        "builder": ng.FIM,
        "method": "auto",
    }
    special: dict[str, dict[str, Any]] = {
        "matrix_function": {"function": torch.cos},
        "influences": {"damping": 0.1, "method": "gradient"},
        "sample_space": {"F": ng.FIM(s.model, s.data, "factored")},
        "update_diag": {"F": ng.FIM(s.model, s.data, "ekfac")},
        "as_module": {"function": lambda p, x: x * p["a"], "params": {"a": torch.ones(3)}},
        "inverse": {"method": "cg", "damping": 0.1},
        "self_influence": {"damping": 0.1},
        "Queries": {"damping": 0.1},
        "compare": {"representations": ["diagonal", "kfac"]},
    }
    options = {
        "trace": ("steps", "tol", "max_matvecs", "progress"),
        "diagonal": ("tol", "max_matvecs", "progress"),
        "logdet": ("steps", "tol", "max_matvecs", "progress"),
        "effective_dimension": ("steps", "tol", "max_matvecs", "progress"),
        "eigenfunctions": ("which", "tol", "subspace", "seed"),
        "plan": ("model", "loader", "likelihood", "seed", "samples", "params", "forward"),
        "update_diag": ("estimator", "seed", "forward"),
    }
    found = []
    for name in (*(n for n in ng.__all__ if inspect.isfunction(getattr(ng, n))), *CLASSES):
        if name in LEFT_OUT:
            continue
        call = getattr(ng, name)
        needed = [p for p in inspect.signature(call).parameters.values() if p.default is p.empty]
        right = {**good, **special.get(name, {})}
        own = {p.name: right[p.name] for p in needed if p.kind not in (p.VAR_KEYWORD, 2)}
        own = {**own, **special.get(name, {})}
        if name == "plan":
            call, own = planned, {"builder": ng.FIM, "model": s.model, "loader": s.data}
        found.append(Target(name, call, own, options.get(name, ())))
    found.append(Target("NTK (two)", ng.NTK, {"model": s.model, "x1": s.x, "x2": s.x}))
    return [*found, *members(s), *objects(s), *options_of(s)]


CLASSES = ("Laplace", "ParamSpace", "Probes", "Queries", "Distributed")
LEFT_OUT = {"register_layer": "what is registered stays"}


def planned(builder: Any, model: Any, loader: Any, **options: Any) -> Any:
    """`plan` with the names of its positional arguments."""
    return ng.plan(builder, model, loader, **options)


MEMBERS: dict[str, Callable[[Subject], dict[str, Any]]] = {
    "matmul": lambda s: {"other": s.w},
    "rmatmul": lambda s: {"other": s.w},
    "__matmul__": lambda s: {"other": s.w},
    "__rmatmul__": lambda s: {"other": s.w},
    "__add__": lambda s: {"other": s.F},
    "__radd__": lambda s: {"other": s.F},
    "__sub__": lambda s: {"other": s.F},
    "__mul__": lambda s: {"other": 2.0},
    "__truediv__": lambda s: {"other": 2.0},
    "__getitem__": lambda s: {"index": 0},
    "vTMv": lambda s: {"v": s.w},
    "solve": lambda s: {"right_tensor": s.w, "damping": 0.1},
    "inverse": lambda s: {"damping": 0.1},
    "damped": lambda s: {"damping": 0.1},
    "add_diagonal": lambda s: {"diag": 0.1},
    "add_jitter": lambda s: {},
    "norm": lambda s: {},
    "lerp": lambda s: {"other": s.F, "weight": 0.5},
    "power": lambda s: {"p": 0.5},
    "pinv": lambda s: {},
    "sample": lambda s: {"n": 2},
    "zero_mean_mvn_samples": lambda s: {"num_samples": 2},
    "block": lambda s: {"selector": "0"},
    "to_dense": lambda s: {},
    "to_scipy": lambda s: {},
    "at": lambda s: {"w": s.w},
    "to": lambda s: {"dtype": torch.float64},
    "type": lambda s: {"dtype": torch.float64},
    "inv_quad": lambda s: {"inv_quad_rhs": s.w},
    "inv_quad_logdet": lambda s: {"inv_quad_rhs": s.w},
    "sqrt_inv_matmul": lambda s: {"rhs": s.w},
    "requires_grad_": lambda s: {"val": False},
}


def members(s: Subject) -> Iterator[Target]:
    """Members of operators: of blocks, a dense matrix, products, and a rectangle."""
    kinds = {"kfac": s.F.damped(0.01), "dense": s.dense.damped(0.01), "implicit": s.implicit}
    for kind, F in {**kinds, "Jacobian": s.J}.items():
        for name, good in MEMBERS.items():
            call = getattr(F, name)
            if name == "to":
                call = one_argument(call, "dtype")
            yield Target(f"{kind}.{name}", call, good(s))


def one_argument(call: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A function of one positional argument."""

    def called(**given: Any) -> Any:
        return call(given[name])

    kind = inspect.Parameter.KEYWORD_ONLY
    called.__signature__ = inspect.Signature([inspect.Parameter(name, kind)])  # type: ignore[attr-defined]
    return called


def objects(s: Subject) -> Iterator[Target]:
    """Methods of what is not an operator."""
    space = s.F.space
    for name, good in {
        "subspace": {"names": ["0.weight"]},
        "to": {},
        "resolve": {"name": "0.weight"},
        "owner": {"name": "0.weight"},
        "ravel": {"vectors": space.unravel(s.w)},
        "unravel": {"vector": s.w},
        "values": {"model": s.model},
        "grad": {"model": s.model},
        "randn": {},
        "parameters": {"model": s.model},
    }.items():
        yield Target(f"ParamSpace.{name}", getattr(space, name), good)
    for name in ("assign_", "add_", "assign_grad_"):
        other = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
        yield Target(f"ParamSpace.{name}", getattr(space, name), {"model": other, "vector": s.w})
    yield Target("ParamSpace.of", ng.ParamSpace.of, {"model": s.model})
    yield Target("ParamSpace.everything", ng.ParamSpace.everything, {"model": s.model})
    posterior = ng.Laplace(s.model, s.F)
    for name, good in {
        "sample": {"n": 2},
        "functional": {"x": s.x},
        "predictive": {"x": s.x, "samples": 10},
        "log_marginal_likelihood": {},
        "fit_prior_precision": {"max_iter": 3},
        "with_prior": {"prior_precision": 1.0},
    }.items():
        yield Target(f"Laplace.{name}", getattr(posterior, name), good)


def options_of(s: Subject) -> Iterator[Target]:
    """Options of representations, likelihoods and optimizers, as they are used."""
    r, lik = ng.representations, ng.likelihoods
    for kind in (r.KFAC, r.EKFAC, r.Implicit, r.LowRank, r.Mixed, r.Stored, r.Sharded):
        good = {"folder": "stored"} if kind is r.Stored else {}
        yield built(kind, lambda made: ng.FIM(s.model, s.data, made), good)
    needed: dict[Any, dict[str, Any]] = {
        lik.CallableLoss: {"function": lambda f, y: f.square().sum(1)},
        lik.FromDistribution: {"function": lambda f: torch.distributions.Normal(f, 1.0)},
        lik.Weighted: {"likelihood": lik.Gaussian()},
        lik.Joint: {"heads": {"a": lik.Gaussian()}},
    }
    for kind in (
        *(lik.Categorical, lik.Bernoulli, lik.Gaussian, lik.NegativeBinomial, lik.StudentT),
        *needed,
    ):
        labels: Any = s.y if kind is lik.Categorical else torch.rand(8, 3)
        if kind is lik.Weighted:
            labels = (labels, torch.rand(8))
        forward = (lambda m, b: {"a": m(b[0])}) if kind is lik.Joint else None
        if kind is lik.Joint:
            labels = {"a": labels}
        yield built(
            kind,
            lambda made, y=labels, f=forward: ng.GGN(s.model, (s.x, y), loss=made, forward=f),
            needed.get(kind, {}),
        )
    yield built(ng.gp.NTKKernel, lambda made: made(s.x).to_dense(), {"model": s.model})
    yield Target("gp.wrap", ng.gp.wrap, {"kernel": gpytorch.kernels.RBFKernel()})
    for kind in (ng.optim.NaturalGradient, ng.optim.Preconditioner):
        yield built(kind, lambda made: step(s, made), {"model": s.model})
    for kind, name in (
        (ng.optim.LevenbergMarquardt, "damping"),
        (ng.optim.HessianFree, "representation"),
    ):
        yield built(
            kind,
            lambda made, name=name: step(s, ng.optim.NaturalGradient(s.model, **{name: made})),
        )


def built(kind: Any, use: Callable[[Any], Any], good: dict[str, Any] | None = None) -> Target:
    """A class, whose instance is then used."""

    def called(**given: Any) -> Any:
        return use(kind(**given))

    called.__signature__ = inspect.signature(kind)  # type: ignore[attr-defined]
    return Target(kind.__name__, called, good or {})


def step(s: Subject, optimizer: Any) -> None:
    """A step of an optimizer, on the subject's model, which is then put back."""
    try:
        loss = nn.functional.cross_entropy(s.model(s.x), s.y)
        loss.backward()
        optimizer.step()
    finally:
        s.model.load_state_dict(s.before)
        s.model.zero_grad()
        close = getattr(optimizer, "close", None) or getattr(optimizer, "remove", None)
        if close is not None:
            close()


# --- calls and outcomes ---------------------------------------------------------------------------


def calls(target: Target, pool: dict[str, Any], count: int, seed: int) -> list[dict[str, str]]:
    """Which arguments are replaced by what: each alone first, then two at once, or swapped."""
    names = target.names
    single = [{name: text} for name in names for text in pool]
    draw = random.Random(f"{seed} {target.name}")
    draw.shuffle(single)
    found = single[:count]
    while len(found) < count and len(names) > 1:
        a, b = draw.sample(names, 2)
        found.append({a: draw.choice(list(pool)), b: draw.choice(list(pool))})
    given = [name for name in names if name in target.good]
    swaps = [{a: f"<{b}>", b: f"<{a}>"} for a in given for b in given if a < b]
    return [*swaps, *found][:count]


def outcome(target: Target, chosen: dict[str, str], pool: dict[str, Any]) -> Result:
    """Make one call."""
    wrong = ", ".join(f"{name}={text}" for name, text in chosen.items())
    values = {
        name: target.good[text[1:-1]] if text.startswith("<") else pool[text]
        for name, text in chosen.items()
    }
    try:
        with warnings.catch_warnings(), time_limit(SECONDS), silence():
            warnings.simplefilter("ignore")
            given = {**target.good, **values}
            signature = inspect.signature(target.call)
            kinds = {p.name: p.kind for p in signature.parameters.values()}
            ahead = [given.pop(n) for n, kind in kinds.items() if kind == 0 and n in given]
            found = target.call(*ahead, **given)
            use(found)
    except (NNGeoError, OSError) as error:  # no such file
        return Result("named", target.name, wrong, f"{type(error).__name__}: {error}")
    except Exception as error:  # noqa: BLE001 - what any code may raise is what is looked for
        kind = "named" if raised_on_purpose(error) else "foreign"
        return Result(kind, target.name, wrong, f"{type(error).__name__}: {error} {place(error)}")
    return Result("accepted", target.name, wrong)


def use(found: Any) -> None:
    """An operator that is made lazily is looked at."""
    if isinstance(found, BaseLinearOperator) and found.dim() == 2:
        found.matmul(torch.ones(found.shape[-1], dtype=found.dtype))


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise `HungError` after so many seconds."""

    def ring(*_: Any) -> None:
        raise HungError(f"no answer in {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """No progress bars."""
    with open(os.devnull, "w") as sink, contextlib.redirect_stderr(sink):
        yield


def last_frame(error: BaseException) -> tuple[str, int]:
    """Where an error was raised."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return ("", 0) if trace is None else (trace.tb_frame.f_code.co_filename, trace.tb_lineno)


def raised_on_purpose(error: BaseException) -> bool:
    """Whether our code, or linear_operator's for a member that it has, says what is wrong."""
    path, line = last_frame(error)
    says = any(word in str(error) for word in SAYS)
    ours = "/nngeo_lazy/" in path or "/linear_operator/" in path
    return ours and says and linecache.getline(path, line).strip().startswith("raise")


def place(error: BaseException) -> str:
    """The last line of ours that an error passed."""
    trace, found = error.__traceback__, ""
    while trace is not None:
        path = trace.tb_frame.f_code.co_filename
        if "/nngeo_lazy/" in path:
            found = f"{path.split('/nngeo_lazy/')[-1]}:{trace.tb_lineno}"
        trace = trace.tb_next
    return f"| {found}"


def run(count: int, seed: int = 0, only: str = "") -> Iterator[Result]:
    """So many calls of each target."""
    here = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # a path may be anything
        try:
            subject = Subject()
            for target in targets(subject):
                if only and only not in target.name:
                    continue
                pool = subject.pool()
                for chosen in calls(target, pool, count, seed):
                    pool["iterator"] = iter([1, 2])
                    yield outcome(target, chosen, pool)
                    # what ends in "_" writes into the model that it is given
                    if subject.harmed and not target.name.endswith("_"):
                        yield Result("harmed", target.name, str(chosen), "the model has changed")
                        subject.model.load_state_dict(subject.before)
                        subject.model.requires_grad_(True)
        finally:
            os.chdir(here)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--calls", type=int, default=250, help="of each function")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="part of the name of what is called")
    parser.add_argument("--accepted", action="store_true", help="list what is accepted")
    given = parser.parse_args()
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    seen: dict[str, list[Result]] = {}
    names = set()
    for result in run(given.calls, given.seed, given.only):
        counts[result.kind] += 1
        names.add(result.target)
        if result.kind in ("foreign", "harmed") or (result.kind == "accepted" and given.accepted):
            seen.setdefault(f"{result.kind} {result.cause}", []).append(result)
    for cause, results in sorted(seen.items()):
        values = "; ".join(r.wrong for r in results[: 60 if given.accepted else 6])
        print(f"{len(results):4d} {cause}\n       {values}\n       {results[0].text[:200]}")
    total = ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items()))
    print(f"{len(names)} functions, {sum(counts.values())} calls: {total}")
    return int(counts["foreign"] + counts["harmed"] > 0)


if __name__ == "__main__":
    sys.exit(main())
