"""Random expressions of operators against the same arithmetic of dense matrices.

An expression is a tree of tuples, which says itself as code, as an operator and as a matrix.
"""

import contextlib
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import nngeo_lazy as ng
from nngeo_lazy.errors import ConvergenceWarning, EstimateWarning, NotPositiveDefiniteError
from nngeo_lazy.representations import Mixed

from .outcomes import Outcome, WrongError, outcome
from .writer import UnfitError

Tree = tuple[Any, ...]
SIZE = 27
SETUP = """\
import torch, nngeo_lazy as ng
from tests.fuzz.expressions import leaves
globals().update(leaves())
n = torch.float64"""


class Net(nn.Module):
    """A weight in each layout, and what has no Kronecker form."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Linear(2, 3), nn.LayerNorm(3)
        self.w, self.b = nn.Parameter(torch.randn(3, 2)), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.b(torch.tanh(self.norm(torch.tanh(self.a(x))) @ self.w))
        return hidden


@cache
def leaves() -> dict[str, Any]:
    """Every representation of one network's matrices, by the name that code gives it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Net().double()
        data = (torch.randn(12, 2, dtype=torch.float64), torch.randint(2, (12,)))
        other = (torch.randn(9, 2, dtype=torch.float64), torch.randint(2, (9,)))
        spd = torch.randn(SIZE, SIZE, dtype=torch.float64)
    names = {
        "D": "dense",
        "B": "block_diagonal",
        "d": "diagonal",
        "K": "kfac",
        "E": "ekfac",
        "Q": "quasi_diagonal",
        "L": "low_rank",
        "I": "implicit",
        "X": "factored",
        "M": Mixed("kfac", {"b": "dense", "norm": "diagonal"}),
    }
    found = {name: ng.FIM(model, data, rep) for name, rep in names.items()}
    found["E2"] = ng.update_diag(found["E"], model, other)
    found["K2"] = ng.FIM(model, other, "kfac")
    found["H"] = ng.Hessian(model, data, loss="categorical")
    found["one"] = ng.identity(found["D"].space, 0.7)
    found["S"] = ng.aslinearoperator(spd @ spd.mT / SIZE + torch.eye(SIZE, dtype=torch.float64))
    return found


@cache
def matrices() -> dict[str, Tensor]:
    """The leaves as matrices, from their products with unit vectors."""
    eye = torch.eye(SIZE, dtype=torch.float64)
    return {name: (leaf @ eye).detach() for name, leaf in leaves().items()}


SELECTORS = {  # positions in the flat vector, in the order w, a, norm, b of named_parameters
    "w": slice(0, 6),
    "a": slice(6, 15),
    "norm": slice(15, 21),
    "b": slice(21, 27),
    "*.weight": [*range(6, 12), *range(15, 18), *range(21, 25)],
}
NUMBERS = ("0.5", "2.0", "-1.0", "3", "torch.tensor(0.3, dtype=n)", "0.0", "1e-3")
DAMPINGS = ("0.1", "1.0", "torch.tensor(0.5, dtype=n)", "torch.linspace(0.1, 1, {s}, dtype=n)")
INDICES = (
    "slice(1, {m})",
    "torch.tensor([0, {l}, 1])",
    "torch.arange({s}) % 3 == 0",
    "slice(None, None, 2)",
    "[1, 0]",
    "torch.tensor([{l}, 0, 0])",
    "slice(-2, None)",
)
KINDS = ("sum", "sum", "sub", "scale", "scale", "over", "neg", "damped", "damped", "add_diagonal")
KINDS += ("inverse", "inverse", "product", "transpose", "lerp", "block", "power", "pinv", "float")
KINDS += ("sums", "symmetric", "foreign")
SIGNS = {"sum": "+", "sub": "-", "product": "@"}
WORDS: dict[str, Any] = {"torch": torch, "n": torch.float64}


def value(text: str) -> Any:
    return eval(text, dict(WORDS))


def grown(r: random.Random, depth: int, part: str | None = None) -> Tree:
    """A random tree for all parameters, or for a block of them."""
    if depth == 0:
        return leaf(r, part)
    size = SIZE if part is None else rows_of(part).numel()
    kind = r.choice(KINDS)
    one = grown(r, depth - 1, part)
    match kind:
        case "sum" | "sub" | "product":
            return (kind, one, grown(r, r.randrange(depth), part))
        case "lerp":
            return (kind, one, grown(r, r.randrange(depth), part), r.choice(("0.3", "1.0", "0.0")))
        case "scale" | "over":
            return (kind, one, r.choice(NUMBERS[:5]))
        case "damped" | "add_diagonal" | "inverse":
            text = r.choice(DAMPINGS).format(s=size)
            if part is None and kind != "add_diagonal" and r.random() < 0.3:
                text = r.choice(('{"a": 0.2, "b": 0.1}', '{"*": 0.3}', '{"w": 0.5}'))
            return (kind, one, text)
        case "power":
            return (kind, one, r.choice(("0.5", "-0.5", "2", "-1")))
        case "block":
            return one if part else ("sum", one, leaf(r, part))
        case "sums":
            return ("sum", ("sum", one, leaf(r, part)), ("scale", leaf(r, part), "0.5"))
        case "symmetric":
            return ("product", ("transpose", one), one)
    return (kind, one)


def leaf(r: random.Random, part: str | None) -> Tree:
    whole: Tree = ("leaf", r.choice(sorted(leaves())))
    if part is None:
        return whole
    while whole[1] == "S":  # it has no space
        whole = ("leaf", r.choice(sorted(leaves())))
    return ("block", whole, part)


def rows_of(part: str) -> Tensor:
    return torch.arange(SIZE)[SELECTORS[part]]


# --- a tree as code, as an operator, as a matrix --------------------------------------------------


def code(tree: Tree) -> str:
    """The expression as a user writes it."""
    kind, *rest = tree
    inner = [code(part) for part in rest if isinstance(part, tuple)]
    texts = [part for part in rest if isinstance(part, str)]
    match kind:
        case "leaf":
            return str(rest[0])
        case "sum" | "sub" | "product":
            return f"({inner[0]} {SIGNS[kind]} {inner[1]})"
        case "scale":
            return f"({texts[0]} * {inner[0]})"
        case "over":
            return f"({inner[0]} / {texts[0]})"
        case "neg":
            return f"(-{inner[0]})"
        case "damped" | "add_diagonal" | "power":
            return f"{inner[0]}.{kind}({texts[0]})"
        case "inverse":
            return f"{inner[0]}.inverse(damping={texts[0]})"
        case "pinv":
            return f"{inner[0]}.pinv()"
        case "transpose":
            return f"{inner[0]}.mT"
        case "lerp":
            return f"{inner[0]}.lerp({inner[1]}, {texts[0]})"
        case "block":
            return f"{inner[0]}.block({texts[0]!r})"
        case "index":
            return f"{inner[0]}[{texts[0]}][:, {texts[0]}]"
        case "float":
            return f"{inner[0]}.float().double()"
        case "foreign":
            return f"ng.aslinearoperator({inner[0]}.to_dense())"
        case "expand":
            return f"{inner[0]}.expand({texts[0]})"
    raise ValueError(kind)


def operator(tree: Tree) -> Any:
    return eval(code(tree), {"torch": torch, "ng": ng, "n": torch.float64, **leaves()})


class Arithmetic:
    """A tree as a matrix, and how much of its rounding and tolerances comes through.

    Attributes:
        scale: the largest number of any intermediate result.
        condition: the product of the condition numbers of what is inverted.
        loose: what single precision or iterations leave, in units of float64's rounding.
    """

    def __init__(self) -> None:
        self.scale, self.condition, self.single = 0.0, 1.0, False

    def __call__(self, tree: Tree) -> Tensor:
        kind, *rest = tree
        inner = [self(part) for part in rest if isinstance(part, tuple)]
        text = next((part for part in rest if isinstance(part, str)), "")
        found = self._apply(kind, inner, text)
        self.scale = max(self.scale, float(found.abs().max()))
        return found

    def _apply(self, kind: str, inner: list[Tensor], text: str) -> Tensor:
        match kind:
            case "leaf":
                return matrices()[text]
            case "sum":
                return inner[0] + inner[1]
            case "sub":
                return inner[0] - inner[1]
            case "product":
                return inner[0] @ inner[1]
            case "scale":
                return inner[0] * value(text)
            case "over":
                return inner[0] / value(text)
            case "neg":
                return -inner[0]
            case "damped" | "add_diagonal":
                if float(damping(inner[0], text).amin()) < 0:
                    raise UnfitError("negative damping")
                return inner[0] + damping(inner[0], text).diag()
            case "inverse":
                damped = inner[0] + damping(inner[0], text).diag()
                self._symmetric(damped, positive=True)
                return torch.linalg.inv(damped)
            case "power" | "pinv":
                return self._power(inner[0], -1.0 if kind == "pinv" else float(text))
            case "transpose":
                return inner[0].mT
            case "lerp":
                return inner[0] * (1 - value(text)) + inner[1] * value(text)
            case "block":
                rows = rows_of(text)
                return inner[0][rows][:, rows]
            case "index":
                return inner[0][value(text)][:, value(text)]
            case "float":
                self.single = True
                return inner[0]
            case "foreign":
                return inner[0]
            case "expand":
                return inner[0].expand(*value(f"({text})"))
        raise ValueError(kind)

    def _symmetric(self, matrix: Tensor, positive: bool) -> Tensor:
        """The eigenvalues of what is inverted; unfit if that has no meaning or no digits."""
        if not torch.allclose(matrix, matrix.mT, rtol=1e-9, atol=1e-12):
            raise UnfitError("not symmetric")
        values = torch.linalg.eigvalsh(matrix)
        size = float(values.abs().max())
        if positive:
            digits = 1e-3 if self.single else 1e-5
            if not float(values.min()) > digits * max(size, self.scale):
                raise UnfitError("not positive definite, or not beside the rounding")
            self.condition *= size / float(values.min())
        if self.condition > 1e8:
            raise UnfitError("too ill-conditioned")
        return values

    def _power(self, matrix: Tensor, p: float) -> Tensor:
        self._symmetric(matrix, positive=p != 2.0)
        values, basis = torch.linalg.eigh(matrix)
        return (basis * values.pow(p)) @ basis.mT

    @property
    def tolerance(self) -> float:
        digits = 1e-5 if self.single else 1e-9
        return digits * self.condition


def damping(matrix: Tensor, text: str) -> Tensor:
    """What `text` adds to the diagonal."""
    given = value(text)
    full = torch.zeros(len(matrix), dtype=torch.float64)
    if isinstance(given, dict):
        for name, number in given.items():
            full[slice(None) if name == "*" else SELECTORS[name]] += number
        return full
    return full + given


# --- members --------------------------------------------------------------------------------------

Member = Callable[[Any, Tensor, Tensor], tuple[Any, Tensor]]


def vectors(size: int) -> Tensor:
    return torch.linspace(-1, 2, size * 2, dtype=torch.float64).sin().view(size, 2)


def distinct(A: Tensor) -> Tensor:
    """Eigenvalues, of which a repeated one counts once, as it does for one starting vector."""
    values = torch.linalg.eigvalsh(A)
    gaps = values.diff() > 1e-12 * values.abs().max()
    if bool((gaps & (values.diff() < 1e-3 * values.abs().max())).any()):
        raise UnfitError("eigenvalues that are nearly one")
    kept = values[torch.cat([gaps, torch.ones(1, dtype=torch.bool)])]
    if len(kept) < 2:
        raise UnfitError("one eigenvalue")
    return kept


def largest(found: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """Two eigenvalues, with the two largest: a repeated one may be found once or twice."""
    candidates = (distinct(A)[-2:], torch.linalg.eigvalsh(A)[-2:])
    return found, min(candidates, key=lambda want: float((found - want).abs().max()))


MEMBERS: dict[str, Member] = {
    "to_dense()": lambda F, A, v: (F.to_dense(), A),
    "@ v": lambda F, A, v: (F @ v[:, 0], A @ v[:, 0]),
    "@ columns": lambda F, A, v: (F @ v, A @ v),
    "rmatmul": lambda F, A, v: (v.mT @ F, v.mT @ A),
    "mT": lambda F, A, v: (F.mT @ v, A.mT @ v),
    "diagonal()": lambda F, A, v: (F.diagonal(), A.diagonal()),
    "trace()": lambda F, A, v: (F.trace(), A.trace()),
    "norm()": lambda F, A, v: (F.norm(), A.norm()),
    "vTMv": lambda F, A, v: (F.vTMv(v), (v * (A @ v)).sum(0)),
    "[1]": lambda F, A, v: (F[1], A[1]),
    "[1:, :2]": lambda F, A, v: (F[1:, :2], A[1:, :2]),
    "[mask]": lambda F, A, v: (F[v[:, 0] > 0], A[v[:, 0] > 0]),
    "[list]": lambda F, A, v: (F[[0, -1]], A[[0, -1]]),
    "[tensors]": lambda F, A, v: (F[[0, 1], [1, -1]], A[[0, 1], [1, -1]]),
    "clone": lambda F, A, v: (F.clone().detach() @ v, A @ v),
    "expand": lambda F, A, v: (F.expand(3, *A.shape) @ v, (A @ v).expand(3, *v.shape)),
    "expand diagonal": lambda F, A, v: (
        F.expand(2, *A.shape).diagonal(dim1=-1, dim2=-2),
        A.diagonal().expand(2, -1),
    ),
    "sum": lambda F, A, v: (F.sum(-1), A.sum(-1)),
}
POSITIVE: dict[str, Member] = {
    "solve(v)": lambda F, A, v: (F.solve(v[:, 0]), torch.linalg.solve(A, v[:, 0])),
    "solve(columns)": lambda F, A, v: (F.solve(v), torch.linalg.solve(A, v)),
    "solve(left)": lambda F, A, v: (F.solve(v, v.mT), v.mT @ torch.linalg.solve(A, v)),
    "solve(damping)": lambda F, A, v: (
        F.solve(v, damping=0.3),
        torch.linalg.solve(A + 0.3 * torch.eye(len(A)).to(A), v),
    ),
    "expand solve": lambda F, A, v: (
        F.expand(2, *A.shape).solve(v),
        torch.linalg.solve(A, v).expand(2, *v.shape),
    ),
    "expand logdet": lambda F, A, v: (F.expand(2, *A.shape).logdet(), torch.logdet(A).expand(2)),
    "inverse()": lambda F, A, v: (F.inverse().to_dense(), torch.linalg.inv(A)),
    "inverse() @ v": lambda F, A, v: (F.inverse() @ v, torch.linalg.solve(A, v)),
    "logdet()": lambda F, A, v: (F.logdet(), torch.logdet(A)),
    "torch.logdet": lambda F, A, v: (torch.logdet(F), torch.logdet(A)),
    "inv_quad": lambda F, A, v: (F.inv_quad(v), (v * torch.linalg.solve(A, v)).sum()),
    "ng.solve": lambda F, A, v: (ng.solve(F, v).x, torch.linalg.solve(A, v)),
    "cholesky": lambda F, A, v: (F.cholesky().to_dense(), torch.linalg.cholesky(A)),
    "power(0.5)": lambda F, A, v: (F.power(0.5).power(2).to_dense(), A),
    "root": lambda F, A, v: (F.root_decomposition().to_dense(), A),
}
SYMMETRIC: dict[str, Member] = {
    "eigsh": lambda F, A, v: largest(ng.eigsh(F, 2)[0], A),
    "eigvalsh": lambda F, A, v: (torch.linalg.eigvalsh(F).sort()[0], torch.linalg.eigvalsh(A)),
    "norm(2)": lambda F, A, v: (F.norm(2), torch.linalg.matrix_norm(A, 2)),
    "norm(nuc)": lambda F, A, v: (F.norm("nuc"), torch.linalg.matrix_norm(A, "nuc")),
    "pinv": lambda F, A, v: (A @ F.pinv().to_dense() @ A, A),
}


def check(tree: Tree, member: str) -> None:
    """One member of one expression.

    Raises:
        UnfitError: the arithmetic has no meaning, or no digits are left.
        WrongError: the operator is not the matrix.
    """
    arithmetic = Arithmetic()
    A = arithmetic(tree)
    if len(A) < 2:
        raise UnfitError("too small")
    table = {**MEMBERS, **POSITIVE, **SYMMETRIC}
    if member in POSITIVE:
        arithmetic._symmetric(A, positive=True)
        arithmetic.scale = max(arithmetic.scale, float(torch.linalg.inv(A).abs().max()))
    elif member in SYMMETRIC:
        values = arithmetic._symmetric(A, positive=False).abs()
        top = max(float(values.max()), arithmetic.scale)
        if not float(values.max()) > 1e-6 * top:
            raise UnfitError("all of it is rounding")
        small = bool(((values > 1e-14 * top) & (values < 1e-4 * top)).any())
        if member == "pinv" and (small or arithmetic.single):
            raise UnfitError("eigenvalues that may count as zero")
    warned = False
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            got, want = table[member](operator(tree), A, vectors(len(A)))
            got = got.to_dense() if isinstance(got, ng.operators.BaseLinearOperator) else got
        except NotPositiveDefiniteError as error:
            raise WrongError(f"{member}: a positive definite matrix is refused: {error}") from error
        warned = any(issubclass(w.category, ConvergenceWarning | EstimateWarning) for w in caught)
    got = torch.as_tensor(got.to_dense() if hasattr(got, "to_dense") else got)
    if got.shape != want.shape:
        raise WrongError(f"{member} has shape {tuple(got.shape)}, not {tuple(want.shape)}")
    error_ = float((got.detach() - want).abs().max())
    largest = float(want.abs().max())
    allowed = arithmetic.tolerance * max(arithmetic.scale, largest, 1e-3)
    if allowed > 1e-2 * max(largest, arithmetic.scale):
        raise UnfitError("too few digits are left")
    if not error_ <= allowed and not warned:
        raise WrongError(f"{member} is off by {error_:.1e}, allowed {allowed:.1e}")


@dataclass(frozen=True)
class Case:
    """An expression and the members that are compared."""

    tree: Tree
    members: tuple[str, ...]

    @classmethod
    def random(cls, seed: int) -> "Case":
        r = random.Random(seed)
        part = r.choice((None, None, None, *SELECTORS))
        tree = grown(r, r.randint(1, 3), part)
        if r.random() < 0.3:
            size = SIZE if part is None else rows_of(part).numel()
            tree = ("index", tree, r.choice(INDICES).format(s=size, l=size - 1, m=size - 1))
        names = sorted(MEMBERS)
        with contextlib.suppress(UnfitError):
            arithmetic = Arithmetic()
            A = arithmetic(tree)
            arithmetic._symmetric(A, positive=False)
            names += sorted(SYMMETRIC)
            arithmetic._symmetric(A, positive=True)
            names += sorted(POSITIVE)
        return cls(tree, tuple(r.sample(names, 9)))

    @property
    def code(self) -> str:
        """The expression."""
        return code(self.tree)

    @property
    def group(self) -> str:
        return ""  # each member is a group

    def run(self) -> Iterator[tuple[str, Outcome]]:
        for member in self.members:
            yield member, outcome(lambda member=member: check(self.tree, member))

    def shrunk(self, member: str, failed: Outcome) -> tuple[str, Outcome]:
        """The simplest expression whose member fails alike, as code."""
        best, progress = self.tree, True
        while progress:
            progress = False
            for smaller in simpler(best):
                now = outcome(lambda tree=smaller: check(tree, member))
                if now.signature == failed.signature:
                    best, failed, progress = smaller, now, True
                    break
        text = f"{SETUP}\nF = {code(best)}\nfrom tests.fuzz import expressions\n"
        return f"{text}expressions.check({best!r}, {member!r})", failed


def simpler(tree: Tree) -> Iterator[Tree]:
    """Trees with one node less."""
    parts = [k for k, part in enumerate(tree) if isinstance(part, tuple)]
    if tree[0] != "block":
        yield from (tree[k] for k in parts)
    for k in parts:
        for smaller in simpler(tree[k]):
            yield (*tree[:k], smaller, *tree[k + 1 :])
