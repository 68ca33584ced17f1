"""Files that releases wrote, in `fixtures/<release>/`, with what the operators in them said then.

`python -m tests.old_files` in the root of the project writes those of the release at hand. Run it
once for each release that changes what `ng.save` writes, and never change what is there.
"""

import json
from contextlib import suppress
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import nngeo_lazy as ng
from nngeo_lazy.errors import UnsupportedLayerError
from nngeo_lazy.operators import BaseLinearOperator, rules
from nngeo_lazy.representations import KFAC, Mixed

FIXTURES = Path(__file__).with_name("fixtures")
DAMPING, TOLERANCE = 0.1, 1e-11


class Network(nn.Module):
    """An embedding, a grouped convolution, and a linear layer with bias: 30 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 2)
        self.conv = nn.Conv1d(2, 2, 2, groups=2)
        self.out = nn.Linear(6, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.out(torch.tanh(self.conv(self.embed(tokens).mT)).flatten(1))
        return out


def _data() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(7)
    model = Network().double()
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=g, dtype=torch.float64) / 2
    return model, (torch.randint(5, (8, 4), generator=g), torch.randint(2, (8,), generator=g))


def operators() -> dict[str, BaseLinearOperator]:
    """One of everything that can be saved, by the name of its file."""
    model, (x, y) = _data()
    names = ["dense", "block_diagonal", "diagonal", "quasi_diagonal", "kfac", "ekfac", "low_rank"]
    made = {name: ng.FIM(model, (x, y), name) for name in names}
    kfac, ekfac, low_rank = made["kfac"], made["ekfac"], made["low_rank"]
    total = kfac + low_rank
    mean = ng.FIM(model, (x, y), Mixed("kfac", {"conv": "quasi_diagonal", "embed": "diagonal"}))
    halves = [(x[:3], y[:3]), (x[3:], y[3:])]
    vector = torch.linspace(0.1, 1.0, kfac.shape[-1], dtype=torch.float64)
    index = torch.tensor([3, 0, 7, 12, 29])
    return made | {
        "kfac_reduce": ng.FIM(model, (x, y), KFAC(sharing="reduce")),
        "kfac_mc": ng.FIM(model, (x, y), "kfac", estimator="mc", seed=3),
        "kfac_empirical": ng.FIM(model, (x, y), "kfac", estimator="empirical"),
        "mixed": mean,
        "mixed_groups": ng.FIM(
            model, (x, y), Mixed("ekfac", {"embed": "dense", "out": "low_rank"})
        ),
        "ggn": ng.GGN(model, (x, y), "kfac", loss=nn.CrossEntropyLoss()),
        "hessian": ng.Hessian(model, (x, y), "dense", loss=nn.CrossEntropyLoss()),
        "jacobian": ng.Jacobian(model, x[:3], "dense"),
        "merged_kfac": ng.merge([ng.FIM(model, half, "kfac") for half in halves]),
        "merged_low_rank": ng.merge([ng.FIM(model, half, "low_rank") for half in halves]),
        "kfac_damped": kfac.damped(0.3),
        "kfac_damped_by_vector": kfac.damped(vector),
        "kfac_damped_by_selector": kfac.damped({"embed": 0.2, "out": 0.5}),
        "kfac_damped_factors": kfac.damped(0.3, method="factored"),
        "kfac_inverse": kfac.inverse(damping=0.3),
        "ekfac_inverse": ekfac.inverse(damping=0.3),
        "low_rank_damped": low_rank.damped(0.3),
        "low_rank_damped_by_vector": low_rank.damped(vector),
        "low_rank_inverse": low_rank.inverse(damping=0.3),
        "low_rank_inverse_by_vector": low_rank.inverse(damping=vector),
        "quasi_diagonal_inverse": made["quasi_diagonal"].inverse(damping=0.3),
        "mixed_inverse": mean.inverse(damping=0.3),
        "block": kfac.block("conv"),
        "sum": total,
        "sum_inverse": total.inverse(damping=0.3),
        "restricted": kfac[index][:, index],
        "scaled": 2.5 * kfac[index][:, index],
        "product": made["dense"] @ kfac,
        "identity": ng.identity(kfac.space),
        "bare": rules.as_operator(made["dense"].to_dense()[:6, :6]),
    }


def right_hand_side(F: BaseLinearOperator) -> Tensor:
    return torch.linspace(-1.0, 1.0, F.shape[-1], dtype=torch.float64).square() - 0.3


def facts(F: BaseLinearOperator) -> dict[str, Any]:
    """What must be the same for good."""
    space = F.space
    return {
        "class": type(F).__name__,
        "kind": F.state_dict()["representation"],
        "shape": list(F.shape),
        "space": None if space is None else [
            [name, list(shape), space.owner(name)]
            for name, shape in zip(space.names, space.shapes, strict=True)
        ],
        "num_examples": F.num_examples,
        "num_terms": F.num_terms,
        "log_likelihood": F.info.log_likelihood,
        "quantity": dict(F.info.quantity),
        "origins": {name: list(astuple(origin)) for name, origin in F.info.origins.items()},
    }  # fmt: skip


def numbers(F: BaseLinearOperator, solved: bool) -> dict[str, list[float]]:
    """F b for a fixed b; of a positive semidefinite F also its solution, trace and determinant."""
    b = right_hand_side(F)
    found = {"F b": F @ b}
    if solved:
        found["(F + damping)^-1 b"] = F.solve(b, damping=DAMPING, tol=TOLERANCE)
        found["trace"] = F.trace().reshape(1)
        with suppress(UnsupportedLayerError):  # it has no closed form
            found["logdet of F + damping"] = F.damped(DAMPING).logdet().reshape(1)
    return {name: value.tolist() for name, value in found.items()}


def main() -> None:
    made, folder = operators(), FIXTURES / ng.__version__
    solved = {name: name not in ("jacobian", "product", "hessian") for name in made}
    expected = {name: {**facts(F), "numbers": numbers(F, solved[name])} for name, F in made.items()}
    folder.mkdir(parents=True)  # what a release wrote stays as it is
    for name, F in made.items():
        ng.save(F, folder / f"{name}.nngeo")
    (folder / "expected.json").write_text(_lines(expected) + "\n")


def _lines(value: Any, depth: int = 3) -> str:
    """JSON with a line for each fact."""
    if not isinstance(value, dict) or not depth:
        return json.dumps(value)
    inner = (f"{json.dumps(key)}: {_lines(each, depth - 1)}" for key, each in value.items())
    return "{\n" + ",\n".join(inner) + "\n}"


if __name__ == "__main__":
    main()
