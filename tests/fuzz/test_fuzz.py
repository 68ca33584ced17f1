"""A quick share of the fuzz: fixed seeds, every outcome right or refused for a reason that is listed.

`python -m tests.fuzz.run` runs thousands, and cuts down what fails.
"""

import pytest
import torch

from . import oracle, run, writer
from .expressions import Arithmetic, code, operator
from .networks import Family, Recipe
from .steps import STEPS
from .families import FAMILIES

JUST = (  # what may be refused, and why
    ("StochasticModelError", ""),  # examples that are mixed, or a random model
    ("UnsupportedLayerError: a function of the model cannot be differentiated", ""),  # by torch
)


def failures(kind: str, seeds: range, checks: int) -> list[str]:
    found = []
    for seed in seeds:
        case = run.cases(kind, seed, checks)
        for check, outcome in case.run():
            if outcome.kind in ("wrong", "foreign"):
                found.append(f"{kind}:{seed} {check}: {outcome.kind}: {outcome.text}")
    return found


@pytest.mark.parametrize("first", range(0, 60, 10))
def test_networks(first):
    assert not failures("network", range(first, first + 10), 3)


@pytest.mark.parametrize("first", range(0, 46, 23))
def test_families(first):
    assert not failures("family", range(first, first + 23), 2)


def test_expressions():
    assert not failures("expression", range(60), 5)
