"""Which class the sum, the product, ... of any two operators has: `table.json`, and how it is made.

`python -m tests.operators.table` in the root of the project writes the file again.
"""

import json
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import linear_operator.operators as theirs
import scipy.sparse.linalg
import torch
from torch import Tensor, nn

import nngeo_lazy as ng
from nngeo_lazy.collectives import ALONE
from nngeo_lazy.operators import (
    BaseLinearOperator,
    BlockDiagonalLinearOperator,
    DenseLinearOperator,
    DiagonalLinearOperator,
    EigenKroneckerLinearOperator,
    EigenLowRankLinearOperator,
    InverseLinearOperator,
    KroneckerLinearOperator,
    LowRankLinearOperator,
    MatrixLinearOperator,
    ProductLinearOperator,
    QuasiDiagonalLinearOperator,
    RestrictedLinearOperator,
    ScaledLinearOperator,
    SumLinearOperator,
    rules,
)
from nngeo_lazy.operators.sharded import ShardedBlockDiagonalLinearOperator

from .examples import orthogonal, spd, stacked

PINNED = Path(__file__).with_name("table.json")
N = 12  # the rows of every square operator but the kernels, and the parameters of the network

# --- the operators --------------------------------------------------------------------------------


def _network() -> tuple[nn.Module, Tensor]:
    g = torch.Generator().manual_seed(5)
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2)).double()
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=g, dtype=torch.float64)
    return model, torch.randn(20, 2, generator=g, dtype=torch.float64)


def _of_networks() -> dict[str, BaseLinearOperator]:
    model, x = _network()
    y = (x[:, 0] > 0).long()
    stored = ("block_diagonal", "kfac", "ekfac", "quasi_diagonal", "low_rank")
    made = {f"fim_{name}": ng.FIM(model, x, name, likelihood="gaussian") for name in stored}
    # one more in the same basis
    made["fim_ekfac_root"] = made["fim_ekfac"].power(0.5)
    made["gauss_newton"] = ng.FIM(model, x, "implicit", likelihood="gaussian")
    made["factored_gauss_newton"] = ng.FIM(model, x, "factored", likelihood="gaussian")
    made["hessian"] = ng.Hessian(model, (x, y), "implicit", loss=nn.CrossEntropyLoss())
    for name in ("dense", "factored", "implicit"):
        made[f"jacobian_{name}"] = ng.Jacobian(model, x[:2], name)  # (4, 12)
        made[f"transposed_{name}"] = made[f"jacobian_{name}"].mT
    for way in ("auto", "matrix-free"):
        made[f"kernel_{way}"] = ng.NTK(model, x[:2], method=way)  # (4, 4)
    made["kernel_cross"] = ng.NTK(model, x[:2], x[2:5])  # (4, 6)
    J = made["jacobian_factored"]
    made["kernel_middle"] = J @ made["fim_kfac"] @ J.mT
    made["kernel_centered"] = made["kernel_auto"].center()
    made["kernel_mean"] = ng.NTK(model, x[:4], outputs="mean")
    made["kernel_per_output"] = ng.NTK(model, x[:4], outputs="per_output")  # (2, 4, 4)
    return made


@cache
def operators() -> dict[str, BaseLinearOperator]:
    """One operator of every class, and one for each configuration that makes a difference."""
    g = torch.Generator().manual_seed(3)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    def positive(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=g, dtype=torch.float64) + 0.5

    def basis(n: int) -> Tensor:
        return orthogonal(n, g)[None]

    made = _of_networks()
    known, kfac = made["gauss_newton"].info, made["fim_kfac"]
    blocked = {"info": kfac.info, "names": kfac.names, "layouts": kfac.layouts}
    shift, bases = torch.tensor(0.3, dtype=torch.float64), (basis(3), basis(4))
    left, right = spd(3, g)[None], spd(4, g)[None]
    groups = stacked(2, lambda: spd(2, g)), positive(2, 3)
    thin, values = orthogonal(N, g)[:, :3], positive(3)
    made |= {
        "dense": DenseLinearOperator(spd(N, g), info=known),
        "dense_bare": DenseLinearOperator(spd(N, g)),
        "dense_4": DenseLinearOperator(spd(4, g)),
        "diagonal": DiagonalLinearOperator(positive(N), info=known),
        "kronecker": KroneckerLinearOperator(left, right),
        "kronecker_same": KroneckerLinearOperator(left, right),
        "kronecker_shifted": KroneckerLinearOperator(left, right, shift),
        "kronecker_diagonal": KroneckerLinearOperator(left, positive(1, 4)),
        "kronecker_groups": KroneckerLinearOperator(*groups, shift),
        "eigen_kronecker": EigenKroneckerLinearOperator(positive(1, 3, 4), *bases),
        "eigen_kronecker_same": EigenKroneckerLinearOperator(positive(1, 3, 4), *bases),
        "eigen_kronecker_other": EigenKroneckerLinearOperator(
            positive(1, 3, 4), basis(3), basis(4)
        ),
        "low_rank": LowRankLinearOperator(randn(N, 3)),
        "low_rank_constant": LowRankLinearOperator(randn(N, 3), positive(3), shift, info=known),
        "low_rank_diagonal": LowRankLinearOperator(randn(N, 2), positive(2), positive(N)),
        "eigen_low_rank": EigenLowRankLinearOperator(thin, values, shift, info=known),
        "eigen_low_rank_scaled": EigenLowRankLinearOperator(thin, values, shift, positive(N)),
        "blocks_mixed": BlockDiagonalLinearOperator(
            DenseLinearOperator(spd(6, g)), DiagonalLinearOperator(positive(6)), **blocked
        ),
        "blocks_mixed_other": BlockDiagonalLinearOperator(
            KroneckerLinearOperator(spd(2, g)[None], spd(3, g)[None]),
            LowRankLinearOperator(randn(6, 2)),
            **blocked,
        ),
        "blocks_anonymous": BlockDiagonalLinearOperator(
            KroneckerLinearOperator(spd(2, g)[None], spd(4, g)[None]), spd(4, g)
        ),
        "matrix": MatrixLinearOperator(randn(5, N)),
        "iterated_inverse": ng.inverse(spd(N, g), method="cg"),
        "foreign": rules.as_operator(
            theirs.ToeplitzLinearOperator(2.0 ** -torch.arange(N).double())
        ),
        "foreign_root": rules.as_operator(theirs.RootLinearOperator(randn(N, 4))),
        "scipy": ng.aslinearoperator(scipy.sparse.linalg.aslinearoperator(spd(N, g).numpy())),
        "stack": rules.as_operator(torch.stack([spd(N, g), spd(N, g)])),
    }
    rows = positive(40, 3, 4)
    second = torch.einsum("noi,noj->oij", rows, rows) / 40
    quasi = QuasiDiagonalLinearOperator.of(second.diagonal(dim1=1, dim2=2), second[:, :3, 3])
    total = SumLinearOperator(made["kronecker"], quasi)
    folder = tempfile.mkdtemp()  # whose blocks are opened when they are needed
    ng.save(made["fim_block_diagonal"], f"{folder}/stored/")
    return made | {
        "sharded": ShardedBlockDiagonalLinearOperator(*kfac.members, group=ALONE, **blocked),
        "stored": ng.load(f"{folder}/stored/", lazy=True).members[0],
        "quasi_diagonal": quasi,
        "quasi_diagonal_inverse": quasi.inverse(),
        "sum": total,
        "scaled": ScaledLinearOperator(total, shift),
        "product": ProductLinearOperator(made["dense"], made["kronecker"]),
        "inverse": InverseLinearOperator(total),
        "restricted": RestrictedLinearOperator(total, torch.arange(N).flip(0)),
        "broadcast": made["dense"].expand(2, N, N),
        "orthogonal": torch.linalg.eigh(made["dense"])[1],
    }


@cache
def foreigners() -> dict[str, Any]:
    """What may stand beside one of our operators."""
    g = torch.Generator().manual_seed(4)
    spread = torch.rand(N, generator=g, dtype=torch.float64) + 0.5
    return {
        "a tensor": spd(N, g),
        "their Diag": theirs.DiagLinearOperator(spread),
        "their Dense": theirs.DenseLinearOperator(spd(N, g)),
        "their Toeplitz": theirs.ToeplitzLinearOperator(spread.sort(descending=True).values),
        "their Sum": theirs.DenseLinearOperator(spd(N, g)) + theirs.DiagLinearOperator(spread),
        "their ConstantMul": theirs.ToeplitzLinearOperator(spread) * 2.0,
        "their Zero": theirs.ZeroLinearOperator(N, N, dtype=torch.float64),
    }


# --- the operations -------------------------------------------------------------------------------

INDEX = torch.tensor([3, 0, 2])
Function = Callable[[Any], Any]


def _vector(A: Any) -> Tensor:
    return torch.linspace(0.1, 1.0, A.shape[-1], dtype=torch.float64)


def _root(D: Tensor) -> Tensor:
    values, basis = torch.linalg.eigh(D)
    known = torch.where(values > 1e-12 * values[..., -1:], values, 0.0)  # else rounding
    return (basis * known.sqrt().unsqueeze(-2)) @ basis.mT


def _shifted(D: Tensor) -> Tensor:
    return D + 0.5 * torch.eye(D.shape[-1]).to(D)


def _first(D: Tensor) -> Tensor:
    return D[..., :6, :6] if D.shape[-2] == N else D[..., :6]


SAME: dict[str, Function] = {  # of the operator and of the matrix
    "2.0 * A": lambda A: 2.0 * A,
    "A * tensor(2.)": lambda A: A * torch.tensor(2.0, dtype=torch.float64),
    "-A": lambda A: -A,
    "A - A": lambda A: A - A,
    "A.mT": lambda A: A.mT,
    "A[idx, idx]": lambda A: A[..., INDEX, INDEX],
    "A[idx][:, idx]": lambda A: A[..., INDEX, :][..., :, INDEX],
    "A[2:5, 2:5]": lambda A: A[..., 2:5, 2:5],
    "A[1]": lambda A: A[1],
    "A[..., 0]": lambda A: A[..., 0],
    "A.expand(3, ...)": lambda A: A.expand(3, *A.shape),
    "A.unsqueeze(0)": lambda A: A.unsqueeze(0),
}
OTHER: dict[str, tuple[Function, Function]] = {  # of the operator; of the matrix
    "A.damped(0.5)": (lambda A: A.damped(0.5), _shifted),
    "A.damped(vector)": (lambda A: A.damped(_vector(A)), lambda D: D + _vector(D).diag_embed()),
    "A.damped(0.5, method='factored')": (lambda A: A.damped(0.5, "factored"), _shifted),
    "A.add_diagonal(0.5)": (lambda A: A.add_diagonal(0.5), _shifted),
    "A.inverse(damping=0.5)": (
        lambda A: A.inverse(damping=0.5),
        lambda D: torch.linalg.inv(_shifted(D)),
    ),
    "A.power(0.5)": (lambda A: A.power(0.5), _root),
    "A.pinv()": (lambda A: A.pinv(), lambda D: torch.linalg.pinv(D, rtol=1e-10)),
    "A.lerp(A, 0.3)": (lambda A: A.lerp(A, 0.3), lambda D: D),
    "A.block('0')": (lambda A: A.block("0"), _first),
    "A.blocks['0']": (lambda A: A.blocks["0"], _first),
}
FACTORED = "A.damped(0.5, method='factored')"
WITHOUT_VALUE = {  # what is not compared with dense arithmetic here
    # each factor is damped, which is another matrix: see test_members
    *((FACTORED, f"kronecker{more}") for more in ("", "_same", "_diagonal")),
    *(
        (FACTORED, name)
        for name in ("fim_kfac", "sharded", "blocks_mixed_other", "blocks_anonymous")
    ),
    # singular: the root of a zero eigenvalue is the root of its rounding
    ("A.power(0.5)", "kernel_centered"),
}
UNARY = {**{name: (f, f) for name, f in SAME.items()}, **OTHER}


def kind(value: Any) -> str:
    """The class of a result in short; of what is made of blocks, theirs as well."""
    name = type(value).__name__.removesuffix("LinearOperator")
    if not isinstance(value, BaseLinearOperator):
        return f"their {name}" if isinstance(value, theirs.LinearOperator) else name
    members = getattr(value, "members", ())
    return f"{name}[{','.join(map(kind, members))}]" if members else name


def dense(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else value.to_dense()


@cache
def matrix(name: str) -> Tensor:
    return dense({**operators(), **foreigners()}[name]).double()  # their Zero forms a float32 one


def cell(make: Callable[[], Any]) -> tuple[str, Tensor | None]:
    """What the table says of a result, and its matrix.

    It is the kind; with what is raised when the matrix is formed; or what is raised at once.
    """
    found = ""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            value = make()
            found = f"{kind(value)}: "
            return kind(value), dense(value).detach()
        except Exception as error:  # noqa: BLE001 - which one it is is what the table says
            return f"{found}{type(error).__name__}", None


Cells = Iterator[tuple[str, str, Callable[[], Any], Callable[[], Tensor] | None]]


def cells(name: str) -> Cells:
    """The row of one operator: operation, the other operand or "", result, expected matrix."""
    ours_, all_ = operators(), {**operators(), **foreigners()}
    A = all_[name]
    if name in ours_:
        for operation, (make, expected) in UNARY.items():
            compared = (operation, name) not in WITHOUT_VALUE
            yield operation, "", _bound(make, A), _at(expected, name) if compared else None
    for other, B in (all_ if name in ours_ else ours_).items():
        if A.shape[-2:] == B.shape[-2:]:
            yield "A + B", other, _bound(_add, A, B), _at(_add, name, other)
        if A.shape[-1] == B.shape[-2]:
            yield "A @ B", other, _bound(_multiply, A, B), _at(_multiply, name, other)


def _add(A: Any, B: Any) -> Any:
    return A + B


def _multiply(A: Any, B: Any) -> Any:
    return A @ B


def _bound(function: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    return lambda: function(*args)


def _at(function: Callable[..., Tensor], *names: str) -> Callable[[], Tensor]:
    return lambda: function(*map(matrix, names))


# --- the file -------------------------------------------------------------------------------------


def row(name: str) -> dict[str, Any]:
    """The cells of one operator as they stand in the file: {result: other operands} for pairs."""
    made: dict[str, Any] = {}
    for operation, other, make, _ in cells(name):
        result, _ = cell(make)
        if other:
            others = made.setdefault(operation, {})
            others[result] = f"{others[result]}, {other}" if result in others else other
        else:
            made[operation] = result
    return made


def pinned(name: str) -> dict[tuple[str, str], str]:
    """The cells of one operator in the file."""
    found = {}
    for operation, results in json.loads(PINNED.read_text()).get(name, {}).items():
        if isinstance(results, str):
            found[operation, ""] = results
            continue
        for result, others in results.items():
            found.update({(operation, other): result for other in others.split(", ")})
    return found


def main() -> None:
    table = {name: row(name) for name in (*operators(), *foreigners())}
    PINNED.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
