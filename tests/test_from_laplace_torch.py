"""The calls that docs/from_other_packages.md gives for those of laplace-torch, evaluated."""

import ast
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import nngeo_lazy as ng
from nngeo_lazy.likelihoods import BradleyTerry, Gaussian

PAGE = Path(__file__).parents[1] / "docs" / "from_other_packages.md"
ROWS = [line for line in PAGE.read_text("utf-8").splitlines() if line.startswith("| laplace-torch")]
OURS = [code for row in ROWS for code in re.findall(r"`([^`]+)`", row.split(" | ")[2])]


def expressions(code):
    try:
        ast.parse(code, mode="eval")
    except SyntaxError:  # an option, as in `params="head"`
        return False
    return "(" in code


CALLS = [code for code in OURS if expressions(code)]


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(30, 3).double(), torch.randint(2, (30,))
    F = ng.FIM(model, (x, y), "diagonal", likelihood="categorical")
    real = ng.FIM(model, (x, torch.randn(30, 2).double()), "diagonal", likelihood=Gaussian(0.5))
    path = tmp_path_factory.mktemp("files") / "F.pt"
    ng.save(F, path)
    w = F.space.values(model).detach()
    return {
        "ng": ng, "Gaussian": Gaussian, "BradleyTerry": BradleyTerry, "model": model, "x": x,
        "loader": [(x, y)], "some": (x[:9], y[:9]), "N": 30, "n": 5, "T": 0.5, "s": 0.7, "k": 3,
        "w": w, "F": F, "index": torch.tensor([1, 5]), "path": path, "prior_precision": 2.0,
        "likelihood": "categorical", "la": ng.Laplace(model, F), "real": ng.Laplace(model, real),
    }  # fmt: skip


def test_there_are_rows():
    assert len(ROWS) > 15
    assert len(CALLS) > 15


@pytest.mark.parametrize("code", dict.fromkeys(CALLS))
def test_a_call_works(given, code):
    if "noise=True" in code:  # normal labels alone have a noise
        code = code.replace("la.", "real.")
    found = eval(code, dict(given))
    for leaf in found if isinstance(found, tuple) else (found,):
        if isinstance(leaf, torch.Tensor):
            assert bool(leaf.isfinite().all())
