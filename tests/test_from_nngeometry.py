"""Every call of NNGeometry beside ours, evaluated: docs/from_nngeometry.md cannot go stale.

Run as a script, it writes the page: `python tests/test_from_nngeometry.py` (extra `bench`).
"""
# ruff: noqa: E501 - the page's lines

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import nngeo_lazy as ng

pytestmark = pytest.mark.peers
pytest.importorskip("nngeometry")

PAGE = Path(__file__).parents[1] / "docs" / "from_nngeometry.md"
SAME = 1e-4  # relative: both compute in float32


@dataclass
class Row:
    """A call of theirs and of ours, and how the two numbers relate ("" is: they are the same)."""

    theirs: str
    ours: str
    differs: str = ""


SETUP_THEIRS = """\
from nngeometry.metrics import FIM, FIM_MonteCarlo
from nngeometry.object import pspace
from nngeometry.object.pspace import PMatDense, PMatBlockDiag, PMatDiag, PMatKFAC
from nngeometry.object.pspace import PMatEKFAC, PMatQuasiDiag, PMatLowRank, PMatImplicit
from nngeometry.object.vector import PVector
from nngeometry.jacobian import Jacobian
from nngeometry.gram import GramMatrix
from nngeometry.layercollection import LayerCollection
from nngeometry.hessian import Hessian
from nngeometry.backend import TorchHooksJacobianBackend
from torch.nn.functional import cross_entropy"""

SECTIONS = {
    "Building": [
        Row("FIM(model, loader, PMatDense)", 'ng.FIM(model, loader, "dense")'),
        Row("FIM(model, loader, PMatBlockDiag)", 'ng.FIM(model, loader, "block_diagonal")'),
        Row("FIM(model, loader, PMatDiag)", 'ng.FIM(model, loader, "diagonal")'),
        Row("FIM(model, loader, PMatKFAC)", 'ng.FIM(model, loader, "kfac")'),
        Row(
            "E = FIM(model, loader, PMatEKFAC); E.update_diag(loader)",
            'E = ng.FIM(model, loader, "ekfac")',
        ),
        Row(
            "FIM(model, loader, PMatEKFAC)",
            'ng.FIM(model, loader, "ekfac")',
            "theirs is KFAC until `update_diag`; ours is complete (`ng.update_diag` is for fresh data)",
        ),
        Row(
            "FIM(model, loader, PMatQuasiDiag)",
            'ng.FIM(model, loader, "quasi_diagonal")',
            "theirs keeps an arrow, which need not be positive semidefinite; ours completes it "
            "(Ollivier 2015) with the same diagonal and bias row, and its inverse is an arrow",
        ),
        Row("FIM(model, loader, PMatLowRank)", 'ng.FIM(model, loader, "low_rank")'),
        Row(
            'FIM(model, loader, PMatDense, variant="regression")',
            'ng.FIM(model, loader, "dense", likelihood="gaussian")',
        ),
        Row(
            "FIM_MonteCarlo(model, loader, PMatDense, trials=500)",
            'ng.FIM(model, loader, "dense", estimator="mc", samples=500, seed=0)',
            "other draws of the same expectation; ours are seeded",
        ),
        Row(
            "PMatDense(TorchHooksJacobianBackend(model, lambda *b: model(b[0]), centering=True), "
            "examples=loader)",
            'ng.FIM(model, loader, "dense", likelihood="gaussian", center=True)',
        ),
        Row(
            "Hessian(model, loader, PMatDense, function=cross_entropy)",
            'ng.Hessian(model, loader, "dense", loss="categorical")',
            "theirs adds the means of the batches (two here); ours is the mean over all examples",
        ),
    ],
    "Without a matrix": [
        Row(
            "FIM(model, loader, PMatImplicit).mv(v).to_torch()",
            'ng.FIM(model, loader, "implicit") @ w',
        ),
        Row(
            "FIM(model, loader, PMatImplicit).vTMv(v)",
            'ng.FIM(model, loader, "implicit").vTMv(w)',
        ),
        Row(
            "FIM(model, loader, PMatImplicit).trace()",
            'ng.FIM(model, loader, "implicit").trace()',
        ),
        Row(
            "D.solve(v, regul=1e-1).to_torch()",
            'ng.FIM(model, loader, "implicit").solve(w, damping=1e-1)',
        ),
    ],
    "Numbers of a matrix": [
        Row("D.trace()", "d.trace()"),
        Row("D.frobenius_norm()", "d.norm()"),
        Row("D.get_diag()", "d.diagonal()"),
        Row("D.to_torch()", "d.to_dense()"),
        Row("D.mv(v).to_torch()", "d @ w"),
        Row("D.vTMv(v)", "d.vTMv(w)"),
        Row("K.vTMv(v)", "k.vTMv(w)"),
        Row("D.solve(v, regul=1e-3).to_torch()", "d.solve(w, damping=1e-3)"),
        Row("D.inverse(regul=1e-3).mv(v).to_torch()", "d.inverse(damping=1e-3) @ w"),
        Row(
            "K.solve(v, regul=1e-3).to_torch()",
            'k.damped(1e-3, method="factored").solve(w)',
        ),
        Row(
            "K.solve(v, regul=1e-3).to_torch()",
            "k.solve(w, damping=1e-3)",
            "theirs damps the factors (Martens and Grosse's approximation); ours is exactly "
            "(K + d I)⁻¹ v",
        ),
        Row(
            "K.solvePVec(v, regul=1e-3, use_pi=False).to_torch()",
            'k.damped(1e-3, "factored", use_pi=False).solve(w)',
            "theirs holds the input factor times the square root of the number of directions, and "
            "the other one divided by it, which pi would undo; ours divides neither",
        ),
        Row("K.inverse(regul=1e-3).to_torch()", 'k.damped(1e-3, "factored").inverse().to_dense()'),
        Row("K.pow(2, regul=1e-3).to_torch()", 'k.damped(1e-3, "factored").power(2).to_dense()'),
        Row(
            "L.solve(v, regul=1e-3).to_torch()",
            "l.solve(w, damping=1e-3)",
            "theirs is no solution of (F + d I) x = v where F is singular; ours is",
        ),
        Row("D.mm(D).to_torch()", "(d @ d).to_dense()"),
        Row("(D + 2 * D).to_torch()", "(d + 2 * d).to_dense()"),
    ],
    "Vectors": [
        Row("PVector.from_model(model).to_torch()", "d.space.values(model)"),
        Row("PVector.from_model_grad(model).to_torch()", "d.space.grad(model)"),
        Row("v.dot(v)", "w @ w"),
        Row("v.norm()", "w.norm()"),
    ],
    "Jacobians and kernels": [
        Row(
            "Jacobian(model, loader).to_torch().transpose(0, 1).flatten(0, 1)",
            "ng.Jacobian(model, loader).to_dense()",
        ),
        Row(
            "Jacobian(model, loader).jvp(v).to_torch().T.flatten()",
            "ng.Jacobian(model, loader) @ w",
        ),
        Row(
            "GramMatrix(model, loader).to_torch().permute(1, 0, 3, 2).flatten(2).flatten(0, 1)",
            "ng.NTK(model, loader).to_dense()",
        ),
    ],
}

WORDS = [
    ("`LayerCollection.from_model(model)`, `layer_collection=`", "`params=`: a name, glob, module, class, predicate, or a list"),
    ("`function=lambda *d: model(d[0])`", "`forward=lambda model, batch: ...`"),
    ("`variant=\"classif_logits\"`, `\"regression\"`, `\"classif_binary_logits\"`", "`likelihood=\"categorical\"`, `\"gaussian\"`, `\"bernoulli\"`, or an object with options; never guessed without proof"),
    ("`PVector`, `FVector`", "plain tensors: flat, with columns, or dicts by name; `F.space` converts"),
    ("`PVector.copy_to_model`, `add_to_model`", "`F.space.assign_(model, v)`, `F.space.add_(model, v)`"),
    ("`random_pvector(layer_collection)`", "`F.space.randn()`"),
    ("`PMatMixed`", "`representations.Mixed(default, {selector: representation})`"),
    ("`K.pow(p, regul)`", "`F.damped(d).power(p)`"),
    ("`F.get_eigendecomposition()`", "`F.eigh()`, lazily, with negative eigenvalues kept"),
    ("layers: `WeightNorm1d`, `Cosine1d`, `Affine1d`", "any module; nothing has to be known to the package"),
    ("parameters in the order of layers", "in the order of `named_parameters()`"),
    ("`GramMatrix`: axes (output, example, output', example')", "`ng.NTK(model, loader)`: rows (example, output), example slowest"),
]  # fmt: skip


def namespaces():
    """What the calls may use: one model, its data, the matrices and a vector of each kind."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    x, y = torch.randn(40, 4), torch.randint(3, (40,))
    nn.functional.cross_entropy(model(x), y).backward()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=20)
    theirs = {"model": model, "loader": loader}
    exec(SETUP_THEIRS, theirs)  # the page prints it
    F, P = theirs["FIM"], theirs
    theirs["D"], theirs["K"] = F(model, loader, P["PMatDense"]), F(model, loader, P["PMatKFAC"])
    few = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x[:5], y[:5]), batch_size=5)
    theirs["L"], theirs["v"] = F(model, few, P["PMatLowRank"]), P["PVector"].from_model(model)
    theirs["v"] = theirs["v"].detach()
    ours = {"ng": ng, "model": model, "loader": loader}
    for name, data in (("dense", loader), ("kfac", loader), ("low_rank", few)):
        ours[name[0]] = ng.FIM(model, data, name)
    ours["w"], ours["J"] = ours["d"].space.values(model).detach(), ng.Jacobian(model, loader)
    return theirs, ours


def value(code, names):
    """The result of a call as a tensor: a matrix object gives its dense matrix."""
    *before, last = code.split("; ")
    for statement in before:
        exec(statement, names)
    if before and "=" in before[0]:  # "E = ...; E.update_diag(...)" means E
        exec(last, names)
        last = before[0].split(" = ")[0]
    elif re.match(r"\w+ = ", last):
        name = last.split(" = ")[0]
        exec(last, names)
        last = name
    result = eval(last, names)
    if not isinstance(result, Tensor):
        result = result.to_dense() if hasattr(result, "to_dense") else result.to_torch()
    return result.detach().double()


def compared():
    """(section, row, the norms of both results, their relative difference)."""
    for section, rows in SECTIONS.items():
        for row in rows:
            theirs, ours = namespaces()
            torch.manual_seed(0)
            a, b = value(row.theirs, theirs), value(row.ours, ours)
            assert a.shape == b.shape, row
            yield section, row, float(a.norm()), float(b.norm()), float((a - b).norm() / a.norm())


def page():
    lines, last = [], ""
    for section, row, a, b, off in compared():
        if section != last:
            lines += [f"\n## {section}\n", "| NNGeometry | here | norms | |", "|---|---|---|---|"]
            last = section
        same = "same" if off < SAME else f"{row.differs}: {off:.0%} apart"
        theirs, ours = (code.replace("|", "\\|") for code in (row.theirs, row.ours))
        lines.append(f"| `{theirs}` | `{ours}` | {a:.4g}, {b:.4g} | {same} |")
    words = "\n".join(f"| {a} | {b} |" for a, b in WORDS)
    return f"""# From NNGeometry

The calls of NNGeometry (0.4) beside those of this package. Every row has been evaluated on one model
(4-5-3, tanh, 40 examples) by `tests/test_from_nngeometry.py`, which makes this page: the norm of both
results, and whether they are the same (to {SAME:g}, relative). D, K, L and d, k, l are a dense, a KFAC and a
low-rank Fisher (of 5 examples); v and w the parameters as a vector; J the Jacobian.

```python
{SETUP_THEIRS}

import nngeo_lazy as ng
```
{chr(10).join(lines)}

## In words

| NNGeometry | here |
|---|---|
{words}

Known differences that no call shows: their KFAC of a linear layer on sequences is not divided by the
number of positions, as their convolutions are; ours is, for all layers. Their matrices are means over
the batches' sizes as the loader gives them, as ours are. Grouped convolutions and circular padding
are right here.
"""


NUMBER = re.compile(r"\d+\.?\d*(?:e[-+]?\d+)?")


def test_what_is_called_the_same_is():
    for _, row, _, _, off in compared():
        assert (off < SAME) == (not row.differs), (row, off)


def test_the_page_is_current():
    mine, written = page(), PAGE.read_text()
    assert NUMBER.sub("#", mine) == NUMBER.sub("#", written), "python tests/test_from_nngeometry.py"
    for a, b in zip(NUMBER.findall(mine), NUMBER.findall(written), strict=True):
        assert float(a) == pytest.approx(float(b), rel=5e-3, abs=1.5)


if __name__ == "__main__":
    PAGE.write_text(page())
