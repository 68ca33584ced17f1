"""Every contract member on every representation: right, or refused by name; as a table in docs/.

Run as a script, it writes the table: `python tests/test_support_matrix.py`.
"""

from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn

import nngeo_lazy as ng
from nngeo_lazy import linalg
from nngeo_lazy.errors import DataError, NotPositiveDefiniteError, UnsupportedLayerError
from nngeo_lazy.operators import BaseLinearOperator, BlockDiagonalLinearOperator
from nngeo_lazy.operators import lazy as lazy_module
from nngeo_lazy.operators.eigen_low_rank import EigenLowRankLinearOperator
from nngeo_lazy.operators.lazy import LazyLinearOperator
from nngeo_lazy.operators.low_rank import LowRankLinearOperator
from nngeo_lazy.operators.quasi_diagonal import QuasiDiagonalLinearOperator
from nngeo_lazy.representations import Mixed

PAGE = Path(__file__).parents[1] / "docs" / "support_matrix.md"
STRUCTURED = (
    EigenLowRankLinearOperator,
    LowRankLinearOperator,
    QuasiDiagonalLinearOperator,
)

REPRESENTATIONS = {
    "dense": "dense",
    "block_diagonal": "block_diagonal",
    "diagonal": "diagonal",
    "quasi_diagonal": "quasi_diagonal",
    "kfac": "kfac",
    "ekfac": "ekfac",
    "low_rank": "low_rank",
    "mixed": Mixed("ekfac", {"0": "dense", "2": "quasi_diagonal"}),
    "kfac + kfac": "kfac",
    "factored": "factored",
    "implicit": "implicit",
}


def build(name):
    """A Fisher of each representation, and another one of the same kind."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator) / 2
    data = [torch.randn(n, 3, generator=generator) for n in (30, 20)]
    options = {"likelihood": "gaussian", "estimator": "mc", "seed": 0}
    F, G = (ng.FIM(model, x, REPRESENTATIONS[name], **options) for x in data)
    if name == "ekfac":
        G = ng.update_diag(F, model, data[1], **options)
    if name == "kfac + kfac":
        return F + G, G + F
    return F, G


def symmetric_function(A, f):
    values, vectors = torch.linalg.eigh(A)
    return (vectors * f(values)) @ vectors.mT


def shifted(A, d=0.1):
    return A + d * torch.eye(len(A))


# member -> (what is called on F and G, damped where it needs a regular one; what it must be)
V = torch.linspace(-1, 1, 43)
D = torch.linspace(1, 2, 43)
MEMBERS = {
    "F @ v": (lambda F, G: F @ V, lambda A, B: A @ V),
    "F @ columns": (
        lambda F, G: F @ torch.stack([V, D], 1),
        lambda A, B: A @ torch.stack([V, D], 1),
    ),
    "F @ dict": (lambda F, G: F.space.ravel(F @ F.space.unravel(V)), lambda A, B: A @ V),
    "solve(v, damping=d)": (
        lambda F, G: F.solve(V, damping=0.1),
        lambda A, B: torch.linalg.solve(shifted(A), V),
    ),
    "solve(v, damping={layer: d})": (
        lambda F, G: F.solve(V, damping={"0": 0.1, "2": 0.2, "4": 0.1}),
        lambda A, B: torch.linalg.solve(A + by_layer(), V),
    ),
    "solve(v, damping=vector)": (
        lambda F, G: F.solve(V, damping=D),
        lambda A, B: torch.linalg.solve(A + D.diag(), V),
    ),
    "solve(v, preconditioner=, x0=)": (
        lambda F, G: F.solve(V, damping=0.1, preconditioner=G, x0=V, tol=1e-12),
        lambda A, B: torch.linalg.solve(shifted(A), V),
    ),
    "damped(d)": (lambda F, G: F.damped(0.1), lambda A, B: shifted(A)),
    "damped(d, 'factored')": (lambda F, G: F.damped(0.1, "factored"), None),
    "damped(vector)": (lambda F, G: F.damped(D), lambda A, B: A + D.diag()),
    "F + d I": (lambda F, G: F.add_diagonal(0.1), lambda A, B: shifted(A)),
    "vTMv": (lambda F, G: F.vTMv(V), lambda A, B: V @ A @ V),
    "trace": (lambda F, G: F.trace(), lambda A, B: A.trace()),
    "diagonal": (lambda F, G: F.diagonal(), lambda A, B: A.diagonal()),
    "norm('fro')": (lambda F, G: F.norm(), lambda A, B: A.norm()),
    "norm(2)": (lambda F, G: F.norm(2), lambda A, B: torch.linalg.norm(A, 2)),
    "norm('nuc')": (lambda F, G: F.norm("nuc"), lambda A, B: torch.linalg.norm(A, "nuc")),
    "logdet, damped": (lambda F, G: F.damped(0.1).logdet(), lambda A, B: torch.logdet(shifted(A))),
    "inverse(damping=d)": (
        lambda F, G: F.inverse(damping=0.1),
        lambda A, B: torch.linalg.inv(shifted(A)),
    ),
    "power(1/2)": (
        lambda F, G: F.power(0.5),
        lambda A, B: symmetric_function(A, lambda w: w.clamp_min(0).sqrt()),
    ),
    "pinv": (
        lambda F, G: F.damped(0.1).pinv(),
        lambda A, B: torch.linalg.inv(shifted(A)),
    ),
    "sample": (lambda F, G: F.sample(3, seed=0), None),
    "inverse(damping=d).sample": (lambda F, G: F.inverse(damping=0.1).sample(3, seed=0), None),
    "eigvalsh, damped": (
        lambda F, G: F.damped(0.1).eigvalsh().sort().values,
        lambda A, B: torch.linalg.eigvalsh(shifted(A)),
    ),
    "F + G": (lambda F, G: F + G, lambda A, B: A + B),
    "2 F, -F": (lambda F, G: -(2 * F), lambda A, B: -2 * A),
    "F.lerp(G, w)": (lambda F, G: F.lerp(G, 0.3), lambda A, B: 0.7 * A + 0.3 * B),
    "F @ G": (lambda F, G: F @ G, lambda A, B: A @ B),
    "ng.merge([F, G])": (lambda F, G: ng.merge([F, G]), None),
    "F.at(w)": (lambda F, G: F.at(V / 2), None),
    "block(selector)": (lambda F, G: F.block("4"), lambda A, B: A[-15:, -15:]),
    "blocks": (lambda F, G: F.blocks["0"], lambda A, B: A[:12, :12]),
    "num_examples, num_terms": (
        lambda F, G: torch.tensor([F.num_examples or 0, F.num_terms or 0]),
        None,
    ),
    "report": (lambda F, G: torch.tensor(len(F.report())), lambda A, B: torch.tensor(6)),
    "to_scipy": (
        lambda F, G: torch.from_numpy(F.to_scipy() @ V.numpy()),
        lambda A, B: A @ V,
    ),
    "to_dense": (lambda F, G: F.to_dense(), lambda A, B: A),
    "state_dict, ng.load": (lambda F, G: ng.load(F.state_dict()), lambda A, B: A),
    "torch.linalg.solve": (
        lambda F, G: torch.linalg.solve(F.damped(0.1), V),
        lambda A, B: torch.linalg.solve(shifted(A), V),
    ),
    "torch.logdet": (
        lambda F, G: torch.logdet(F.damped(0.1)),
        lambda A, B: torch.logdet(shifted(A)),
    ),
}


def by_layer():
    return torch.cat(
        [torch.full((12,), 0.1), torch.full((16,), 0.2), torch.full((15,), 0.1)]
    ).diag()


def is_lazy(result):
    if isinstance(result, BlockDiagonalLinearOperator):
        return any(is_lazy(member) for member in result.members)
    return isinstance(result, LazyLinearOperator) and not isinstance(result, STRUCTURED)


def cell(name, member):
    """How a member answers; raises AssertionError where it is wrong."""
    call, expected = MEMBERS[member]
    F, G = build(name)
    with (
        mock.patch.object(linalg, "cg", wraps=linalg.cg) as solves,
        mock.patch.object(linalg, "svds", wraps=linalg.svds) as decompositions,
        mock.patch.object(
            lazy_module, "estimated_logdet", wraps=lazy_module.estimated_logdet
        ) as estimates,
    ):
        try:
            result = call(F, G)
        except UnsupportedLayerError:
            return "refused"
        except DataError:
            if "merge" not in member:
                raise
            return "refused"
        how = "iterative" if solves.called or decompositions.called else "closed"
        how = "estimate" if estimates.called else how
    if isinstance(result, BaseLinearOperator):
        how = "lazy" if is_lazy(result) else "structured"
        result = result.to_dense()
    if expected is not None:
        want = expected(F.to_dense(), G.to_dense())
        assert result.shape == want.shape, (name, member)
        assert (result - want).abs().max() <= 1e-7 * want.abs().max(), (name, member)
    assert result.isfinite().all(), (name, member)
    return how


def table():
    torch.set_default_dtype(torch.float64)
    global V, D
    V, D = V.double(), D.double()
    rows = [("member", *REPRESENTATIONS)]
    rows += [(member, *(cell(name, member) for name in REPRESENTATIONS)) for member in MEMBERS]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) + " |" for r in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    torch.set_default_dtype(torch.float32)
    return "\n".join(lines)


def page():
    return f"""# What every representation can do

Made by `tests/test_support_matrix.py` from the code itself, which also compares every entry with
the dense matrix. To write it again: `python tests/test_support_matrix.py`.

- **closed**: exact numbers without an iteration, from the structure, from products or from streamed
  rows; nothing of size P x P is made.
- **structured**: an operator of the same family, whose members are closed again.
- **lazy**: an operator that keeps its terms: products are exact, solves iterate.
- **iterative**: conjugate gradients or Lanczos to a relative residual (`tol`), with a warning where
  they stop.
- **estimate**: from random vectors, with an `EstimateWarning` that carries the standard error;
  exact for up to 300 parameters.
- **refused**: a named error says what has a closed form. `ng.aslinearoperator(F.to_dense())` has
  every member, where it fits.

The column "kfac + kfac" stands for sums without a structure of their own.

{table()}
"""


@pytest.fixture(autouse=True)
def _restored():
    yield
    torch.set_default_dtype(torch.float32)


def test_the_table_is_what_the_code_does():
    assert PAGE.read_text() == page(), "write it again: python tests/test_support_matrix.py"


def test_singular_matrices_are_refused_without_damping():
    torch.set_default_dtype(torch.float64)
    for name in ("kfac", "low_rank", "dense"):
        F, _ = build(name)
        with pytest.raises(NotPositiveDefiniteError, match="damping="):
            (F * 0).solve(torch.ones(43))


if __name__ == "__main__":
    PAGE.write_text(page())
