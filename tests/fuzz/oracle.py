"""The truth about a network, by loops of autograd over single examples, and the comparisons.

It shares no code with the package: an example is passed alone, its outputs' gradients are taken one
by one, and the Hessian of its loss is taken twice by reverse mode.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import nngeo_lazy as ng
from nngeo_lazy import likelihoods
from nngeo_lazy.representations import Implicit, Mixed

from .outcomes import WrongError
from .writer import Program, UnfitError

TOLERANCE = 1e-9
LIKELIHOODS = ("categorical", "gaussian", "bernoulli", "poisson")
REPRESENTATIONS = ("dense", "diagonal", "block_diagonal", "low_rank", "factored", "implicit")


def nll(name: str, f: Tensor, y: Tensor) -> Tensor:
    """The loss of one example, f (C,) or (T, C)."""
    if name == "categorical":
        return -f.log_softmax(-1).gather(-1, y.unsqueeze(-1)).sum()
    if name == "gaussian":
        return (y - f).square().sum() / 2
    if name == "bernoulli":
        return (F.softplus(f) - y * f).sum()
    if name == "poisson":
        return (f.exp() - y * f).sum()
    return (f - y).cosh().log().sum()  # "cosh": a callable loss, not a likelihood


def labels(name: str, outputs: Tensor) -> Tensor:
    """Targets for outputs (N, ..., C)."""
    if name == "categorical":
        return torch.randint(outputs.shape[-1], outputs.shape[:-1])
    if name == "bernoulli":
        return torch.randint(2, outputs.shape).to(outputs)
    if name == "poisson":
        return torch.randint(4, outputs.shape).to(outputs)
    return torch.randn_like(outputs)


def flat(gradients: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> Tensor:
    dense = [
        torch.zeros_like(p) if g is None else g.to_dense() if g.is_sparse else g
        for g, p in zip(gradients, parameters, strict=True)
    ]
    return torch.cat([g.reshape(-1) for g in dense])


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """What `torch._weight_norm` is, in elementary functions."""
    if dim == -1:
        return v * (g / v.norm())
    others = [k for k in range(v.dim()) if k != dim]
    return v * (g / v.square().sum(others, keepdim=True).sqrt())


def rows(f: Tensor, parameters: Sequence[Tensor], graph: bool = False) -> Tensor:
    """The gradient of each entry of f, (numel, P)."""
    f, found = f.flatten(), []
    size = sum(p.numel() for p in parameters)
    for entry in f:
        if not entry.requires_grad:
            found.append(entry.new_zeros(size))
            continue
        gradients = torch.autograd.grad(
            entry, parameters, retain_graph=True, create_graph=graph, allow_unused=True
        )
        found.append(flat(gradients, parameters))
    return torch.stack(found)


@dataclass
class Truth:
    """Per-example Jacobians of a network and what is made from them.

    Attributes:
        program: the network.
        likelihood: of its outputs.
    """

    program: Program
    likelihood: str

    def __post_init__(self) -> None:
        self.model, self.inputs = self.program.made
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.names = [n for n, p in self.model.named_parameters() if p.requires_grad]
        if not self.program.fixed:
            self.outputs = [torch.zeros(len(x), self.program.classes) for x in self.inputs]
        else:
            with torch.no_grad():
                self.outputs = [self.model(x) for x in self.inputs]
        generator = torch.random.fork_rng(devices=[])
        with generator:
            torch.manual_seed(self.program.seed)
            self.targets = [labels(self.likelihood, f) for f in self.outputs]
        self.data = list(zip(self.inputs, self.targets, strict=True))
        if not all(bool(f.isfinite().all()) and float(f.abs().max()) < 30 for f in self.outputs):
            raise UnfitError("outputs that are too large")

    @cached_property
    def singles(self) -> list[tuple[Tensor, Tensor]]:
        """The outputs of each example alone, with its label."""
        found = []
        with sdpa_kernel(SDPBackend.MATH):
            for (x, y), batch in zip(self.data, self.outputs, strict=True):
                for k in range(len(x)):
                    f = self.model(x[k : k + 1])[0]
                    if not torch.allclose(f, batch[k], rtol=1e-9, atol=1e-9):
                        raise UnfitError("an example alone has other outputs")
                    found.append((f, y[k]))
        return found

    @cached_property
    def jacobian(self) -> Tensor:
        """(N, C, P)."""
        return torch.stack([rows(f, self.parameters).detach() for f, _ in self.singles])

    @cached_property
    def scores(self) -> Tensor:
        """Each example's gradient of the loss, (N, P)."""
        found = []
        for j, (f, y) in zip(self.jacobian, self.singles, strict=True):
            leaf = f.detach().requires_grad_()
            (s,) = torch.autograd.grad(nll(self.likelihood, leaf, y), leaf)
            found.append(s.flatten() @ j)
        return torch.stack(found)

    @cached_property
    def fisher(self) -> Tensor:
        """The mean of J^T H J, H the Hessian of the loss in the outputs."""
        total = torch.zeros(self.jacobian.shape[-1], self.jacobian.shape[-1])
        total = total.to(self.jacobian)
        for j, (f, y) in zip(self.jacobian, self.singles, strict=True):
            leaf = f.detach().requires_grad_()
            loss = nll(self.likelihood, leaf, y)
            (g,) = torch.autograd.grad(loss, leaf, create_graph=True)
            H = rows(g, [leaf])
            total = total + j.mT @ H @ j
        return total / len(self.singles)

    @cached_property
    def empirical(self) -> Tensor:
        return self.scores.mT @ self.scores / len(self.scores)

    @cached_property
    def hessian(self) -> Tensor:
        """Reverse over reverse, a loop over entries of the gradient of the summed loss.

        It must be the change of the gradient along a line, unless the network detaches something
        or has padding: torch's second derivatives of its fused weight norm are wrong, for instance,
        and elementary functions stand in their place.
        """
        with sdpa_kernel(SDPBackend.MATH), mock.patch("torch._weight_norm", weight_norm):
            gradient = flat(self._gradients(), self.parameters)
            found = rows(gradient, self.parameters) / len(self.singles)
            direction = torch.linspace(-1, 1, len(found)).to(found)
            ahead, behind = self._moved(direction, 1e-5), self._moved(direction, -1e-5)
        difference = (ahead - behind) / 2e-5 / len(self.singles)
        cut = any(word in self.program.source for word in ("detach", "no_grad", "padding_idx"))
        if not cut and not torch.allclose(found @ direction, difference, rtol=1e-4, atol=1e-5):
            raise UnfitError("the Hessian of the oracle is not the change of the gradient")
        return found

    def _gradients(self) -> Sequence[Tensor | None]:
        total = torch.zeros(()).to(self.outputs[0])
        for x, y in self.data:
            for k in range(len(x)):
                total = total + nll(self.likelihood, self.model(x[k : k + 1])[0], y[k])
        return torch.autograd.grad(total, self.parameters, create_graph=True, allow_unused=True)

    def _moved(self, direction: Tensor, step: float) -> Tensor:
        """The gradient of the summed loss a step away."""
        before = [p.detach().clone() for p in self.parameters]
        parts = direction.split([p.numel() for p in self.parameters])
        try:
            for p, part in zip(self.parameters, parts, strict=True):
                p.data.add_(part.view_as(p), alpha=step)
            return flat(self._gradients(), self.parameters).detach()
        finally:
            for p, old in zip(self.parameters, before, strict=True):
                p.data.copy_(old)

    @property
    def object(self) -> likelihoods.Likelihood | str:
        """The likelihood as the package has it."""
        if self.likelihood == "categorical":
            return likelihoods.Categorical(class_dim=-1)
        return self.likelihood

    def blocks(self, owner: Callable[[str], str]) -> Tensor:
        """The mask (P, P) of the blocks of parameters with one owner."""
        of = [k for k, name in enumerate(self.names) for _ in range(self.parameters[k].numel())]
        owners = [owner(self.names[k]) for k in of]
        index = torch.tensor([owners.index(o) for o in owners])
        return index[:, None] == index[None]


def loss_of(f: Tensor, y: Tensor) -> Tensor:
    """The callable loss of `GGN` and `Hessian`, one number for each example."""
    return (f - y).cosh().log().flatten(1).sum(1)


# --- comparisons ----------------------------------------------------------------------------------


def compare(what: str, got: Tensor, want: Tensor, diagonal: Tensor | None = None) -> None:
    """Raise if two tensors differ by more than rounding.

    With the diagonal of a positive semidefinite matrix, each entry is measured by those of its row
    and column, so that a small block that is wrong is not lost beside a large one.
    """
    if got.shape != want.shape:
        raise WrongError(f"{what} has shape {tuple(got.shape)}, not {tuple(want.shape)}")
    got, want = got.detach(), want.detach()
    largest = float(want.abs().max()) if want.numel() else 0.0
    scale = torch.full_like(want, largest)
    if diagonal is not None:
        d = diagonal.clamp_min(0)
        largest = float(d.max()) if d.numel() else 0.0
        scale = d if want.dim() == 1 else (d[:, None] * d[None]).sqrt()
    error = (got - want).abs()
    if not bool((error <= TOLERANCE * scale + 1e-12 * largest + 1e-14).all()):
        worst = float((error / (scale + 1e-3 * largest + 1e-5)).max())
        raise WrongError(f"{what} is off by {worst:.1e} of its scale")


Check = Callable[[Truth], None]
CHECKS: dict[str, Check] = {}


def matrix_checks(name: str, F: ng.operators.BaseLinearOperator, want: Tensor, psd: bool) -> None:
    """The members that are exact, beside the matrix."""
    d = want.diagonal() if psd else None
    compare(f"{name}.to_dense()", F.to_dense(), want, d)
    compare(f"{name}.diagonal()", F.diagonal(), want.diagonal(), d)
    compare(f"{name}.trace()", torch.as_tensor(F.trace()), want.trace())
    v = torch.linspace(-1, 1, len(want)).to(want)
    compare(f"{name} @ v", F @ v, want @ v)


def fisher_check(estimator: str, representation: str) -> Check:
    def check(truth: Truth) -> None:
        want = truth.fisher if estimator == "exact" else truth.empirical
        F = ng.FIM(
            truth.model,
            truth.data,
            representation,
            likelihood=truth.object,
            estimator=estimator,
        )
        name = f"FIM {estimator} {representation}"
        compare_representation(name, representation, F, want, truth)

    return check


def compare_representation(
    name: str, representation: str, F: ng.operators.BaseLinearOperator, want: Tensor, truth: Truth
) -> None:
    d = want.diagonal()
    if representation == "diagonal":
        matrix_checks(name, F, d.diag(), True)
    elif representation == "quasi_diagonal":
        compare(f"{name}.diagonal()", F.diagonal(), d, d)
    elif representation == "block_diagonal":
        matrix_checks(name, F, want * truth.blocks(F.space.owner), True)
    elif representation == "ekfac":
        compare(f"{name}.trace()", torch.as_tensor(F.trace()), want.trace())
        E = F.to_dense()  # it is the projection of F on the matrices that its basis diagonalises
        compare(f"{name}: <E, F> = |E|^2", (E * want).sum(), E.square().sum())
    else:
        matrix_checks(name, F, want, True)


for _estimator in ("exact", "empirical"):
    for _representation in (*REPRESENTATIONS, "quasi_diagonal", "ekfac"):
        CHECKS[f"fisher {_estimator} {_representation}"] = fisher_check(_estimator, _representation)


def ggn_check(representation: str) -> Check:
    def check(truth: Truth) -> None:
        other = Truth.__new__(Truth)
        other.__dict__.update(truth.__dict__)
        for cached in ("scores", "fisher", "empirical", "hessian", "singles", "jacobian"):
            other.__dict__.pop(cached, None)
        other.likelihood = "cosh"
        other.targets = [
            torch.linspace(-1, 1, f.numel()).view(f.shape).to(f) for f in truth.outputs
        ]
        other.data = list(zip(truth.inputs, other.targets, strict=True))
        G = ng.GGN(other.model, other.data, representation, loss=loss_of)
        compare_representation(f"GGN {representation}", representation, G, other.fisher, other)

    return check


for _representation in ("dense", "diagonal", "implicit"):
    CHECKS[f"ggn {_representation}"] = ggn_check(_representation)


def hessian_check(representation: str | Implicit) -> Check:
    def check(truth: Truth) -> None:
        H = ng.Hessian(truth.model, truth.data, representation, loss=truth.object)
        matrix_checks(f"Hessian {representation}", H, truth.hessian, False)

    return check


CHECKS["hessian dense"] = hessian_check("dense")
CHECKS["hessian implicit"] = hessian_check("implicit")
CHECKS["hessian forward over reverse"] = hessian_check(Implicit(mode="forward_over_reverse"))


def jacobian_check(representation: str, loss: bool) -> Check:
    def check(truth: Truth) -> None:
        want = truth.scores if loss else truth.jacobian.flatten(0, 1)
        options = {"loss": truth.object} if loss else {}
        J = ng.Jacobian(truth.model, truth.data, representation, **options)
        name = f"Jacobian {representation}{' of losses' if loss else ''}"
        compare(f"{name}.to_dense()", J.to_dense(), want)
        v = torch.linspace(-1, 1, want.shape[1]).to(want)
        u = torch.linspace(-1, 1, want.shape[0]).to(want)
        compare(f"{name} @ v", J @ v, want @ v)
        compare(f"{name}.mT @ u", J.mT @ u, want.mT @ u)

    return check


for _representation in ("dense", "implicit", "factored"):
    CHECKS[f"jacobian {_representation}"] = jacobian_check(_representation, False)
    CHECKS[f"jacobian of losses {_representation}"] = jacobian_check(_representation, True)


def check_kernel(truth: Truth) -> None:
    J = truth.jacobian.flatten(0, 1)
    K = ng.NTK(truth.model, truth.data)
    compare("NTK.to_dense()", K.to_dense(), J @ J.mT)
    C = truth.jacobian.shape[1]
    mean = torch.einsum("ncp,mcp->nm", truth.jacobian, truth.jacobian) / C
    compare("NTK mean", K.outputs("mean").to_dense(), mean)


CHECKS["kernel"] = check_kernel


def check_mixed(truth: Truth) -> None:
    """The last layer dense, all others diagonal."""
    module = truth.names[-1].rpartition(".")[0] or truth.names[-1]
    mixed = Mixed("diagonal", {module: "block_diagonal"})
    F = ng.FIM(truth.model, truth.data, mixed, likelihood=truth.object)
    compare("Mixed.diagonal()", F.diagonal(), truth.fisher.diagonal(), truth.fisher.diagonal())


CHECKS["mixed"] = check_mixed


def check_merged(truth: Truth) -> None:
    """The first and the other batches, built apart and pooled."""
    if len(truth.data) < 2:
        return
    parts = [
        ng.FIM(truth.model, data, "dense", likelihood=truth.object)
        for data in (truth.data[:1], truth.data[1:])
    ]
    want = truth.fisher
    compare("merge(dense)", ng.merge(parts).to_dense(), want, want.diagonal())


CHECKS["merged"] = check_merged


def check_part(truth: Truth) -> None:
    """Every other parameter, from a loader."""
    names = truth.names[::2]
    F = ng.FIM(truth.model, Loader(truth.data), "dense", likelihood=truth.object, params=names)
    kept = torch.cat(
        [
            torch.full((p.numel(),), n in names)
            for n, p in zip(truth.names, truth.parameters, strict=True)
        ]
    )
    want = truth.fisher[kept][:, kept]
    compare("FIM of some parameters", F.to_dense(), want, want.diagonal())


class Loader:
    """An iterable of batches that has nothing else."""

    def __init__(self, batches: Sequence[tuple[Tensor, Tensor]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.batches)


def check_centered(truth: Truth) -> None:
    mean = truth.scores.mean(0)
    want = truth.empirical - torch.outer(mean, mean)
    options = {"likelihood": truth.object, "estimator": "empirical", "center": True}
    d = truth.empirical.diagonal()
    F = ng.FIM(truth.model, truth.data, "dense", **options)
    compare("centered dense", F.to_dense(), want, d)
    F = ng.FIM(truth.model, truth.data, "diagonal", **options)
    compare("centered diagonal", F.diagonal(), want.diagonal(), d)


def check_draws(truth: Truth) -> None:
    """With one seed, all representations of a sampled Fisher are of one matrix."""
    options = {"likelihood": truth.object, "estimator": "mc", "samples": 2, "seed": 3}
    dense = ng.FIM(truth.model, truth.data, "dense", **options).to_dense()
    d = dense.diagonal()
    for representation in ("diagonal", "factored", "implicit"):
        F = ng.FIM(truth.model, truth.data, representation, **options)
        compare(f"mc {representation}", F.diagonal(), d, d)
    inside = truth.fisher.diagonal() > 0  # a score is a combination of the Jacobian's rows
    compare("mc outside of the support", d[~inside], torch.zeros_like(d[~inside]))


def check_kronecker(truth: Truth) -> None:
    """KFAC is positive semidefinite, zero where the Fisher is, and comes back from its state."""
    F = ng.FIM(truth.model, truth.data, "kfac", likelihood=truth.object)
    K = F.to_dense()
    compare("kfac.diagonal()", F.diagonal(), K.diagonal())
    compare("kfac symmetric", K, K.mT)
    values = torch.linalg.eigvalsh(K)
    if float(values.min()) < -1e-10 * float(values.abs().max()):
        raise WrongError(f"kfac has the eigenvalue {float(values.min()):.1e}")
    compare("kfac loaded", ng.load(F.state_dict()).to_dense(), K)
    step = F.solve(torch.ones(len(K)).to(K), damping=0.1)
    compare("kfac.solve", K @ step + 0.1 * step, torch.ones(len(K)).to(K))


def check_across(truth: Truth) -> None:
    """A kernel between two sets."""
    x1, x2 = truth.inputs[0], truth.inputs[-1]
    J1, J2 = truth.jacobian[: len(x1)].flatten(0, 1), truth.jacobian[-len(x2) :].flatten(0, 1)
    compare("NTK across", ng.NTK(truth.model, x1, x2).to_dense(), J1 @ J2.mT)


CHECKS |= {
    "part": check_part,
    "centered": check_centered,
    "draws": check_draws,
    "kronecker": check_kronecker,
    "kernel across": check_across,
}


def state(model: nn.Module) -> list[object]:
    """What a build must leave as it was."""
    tensors = [
        (name, id(t), t.detach().clone(), t.requires_grad)
        for name, t in (*model.named_parameters(), *model.named_buffers())
    ]
    modules = [
        (name, m.training, len(m._forward_hooks), len(m._forward_pre_hooks), sorted(vars(m)))
        for name, m in model.named_modules()
    ]
    return [tensors, modules, torch.get_rng_state()]


def same(before: list[object], after: list[object]) -> bool:
    (tensors, modules, rng), (tensors2, modules2, rng2) = before, after
    return (
        modules == modules2
        and torch.equal(rng, rng2)
        and len(tensors) == len(tensors2)
        and all(
            (n, i, r) == (n2, i2, r2) and torch.equal(t, t2)
            for (n, i, t, r), (n2, i2, t2, r2) in zip(tensors, tensors2, strict=True)
        )
    )


def run(truth: Truth, check: str) -> None:
    """One comparison; the model must be what it was.

    Raises:
        WrongError: a result is wrong, the model is changed, or what must be refused was not.
    """
    before = state(truth.model)
    if not truth.program.fixed:
        kind = check.split(" ")
        F = ng.FIM(truth.model, truth.data, kind[-1], likelihood=truth.object, estimator=kind[1])
        F @ F.space.zeros()
        raise WrongError(f"{check}: accepted, though examples are mixed or the model is random")
    CHECKS[check](truth)
    if not same(before, state(truth.model)):
        raise WrongError(f"{check}: the model or the random state is changed")


def choose(truth: Truth, count: int) -> list[str]:
    """Some of the checks, by the network's seed; Hessians if they take little time."""
    names, program = sorted(CHECKS), truth.program
    if not program.fixed:
        names = [n for n in names if n.startswith("fisher") and "quasi" not in n]
    size = sum(p.numel() for p in truth.parameters)
    if size > 60 or size * sum(map(len, truth.inputs)) > 300:
        names = [n for n in names if "hessian" not in n]
    return random.Random(program.seed).sample(names, min(count, len(names)))
