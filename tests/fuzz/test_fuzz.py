"""A quick share of the fuzz: fixed seeds, nothing silently wrong, no foreign exception.

`python -m tests.fuzz.run` runs thousands, and cuts down what fails.
"""

import pytest

from . import run

# What may be refused, and why. Everything else that is refused is a fault.
JUST = (
    "StochasticModelError",  # examples that are mixed, or a random model
    "UnsupportedLayerError: a function of the model cannot be differentiated",  # by torch
)


def failures(kind, seeds, checks, just=()):
    """What is wrong, foreign, or refused without one of the reasons, and how many were right."""
    found, right = [], 0
    for seed in seeds:
        for check, result in run.cases(kind, seed, checks).run():
            right += result.kind == "right"
            refused = result.kind == "refused" and not result.text.startswith(just)
            if result.kind in ("wrong", "foreign") or refused:
                found.append(f"{kind}:{seed} {check}: {result.kind}: {result.text}")
    return found, right


@pytest.mark.parametrize("first", range(0, 60, 10))
def test_networks(first):
    found, right = failures("network", range(first, first + 10), 2, JUST)
    assert not found
    assert right > 10


@pytest.mark.parametrize("first", range(0, 46, 23))
def test_families(first):
    found, right = failures("family", range(first, first + 23), 2, JUST)
    assert not found
    assert right > 20


def test_expressions():
    found, right = failures("expression", range(60), 0, "UnsupportedLayerError")
    assert not found
    assert right > 200
