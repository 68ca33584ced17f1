"""A quick share of the fuzz: fixed seeds, nothing silently wrong, no foreign exception.

`python -m tests.fuzz.run` runs thousands, and cuts down what fails.
"""

import warnings

import pytest

from nngeo_lazy.errors import LikelihoodWarning

from . import arguments, run, training
from .refusals import reason_of


def failures(kind, seeds, checks):
    """What is wrong, foreign, or refused without a known reason, and how many were right."""
    found, right = [], 0
    for seed in seeds:
        for check, result in run.cases(kind, seed, checks).run():
            right += result.kind == "right"
            refused = result.kind == "refused" and reason_of(result.text) is None
            if result.kind in ("wrong", "foreign") or refused:
                found.append(f"{kind}:{seed} {check}: {result.kind}: {result.text}")
    return found, right


@pytest.mark.parametrize("first", range(0, 60, 10))
def test_networks(first):
    found, right = failures("network", range(first, first + 10), 2)
    assert not found
    assert right > 10


@pytest.mark.parametrize("first", range(0, 48, 24))
def test_families(first):
    found, right = failures("family", range(first, first + 24), 2)
    assert not found
    assert right > 20


def test_expressions():
    found, right = failures("expression", range(60), 0)
    assert not found
    assert right > 200


def test_wrong_arguments():
    """Each has a named error, or a meaning, and leaves the model as it was."""
    found = list(arguments.run(8))
    assert not [r for r in found if r.kind in ("foreign", "harmed")]
    kinds = [r.kind for r in found]
    assert kinds.count("named") > 1200
    assert kinds.count("accepted") < len(kinds) / 5


@pytest.mark.parametrize("first", range(100, 130, 10))
def test_training(first):
    """Tiny float32 networks on defaults: nothing is raised, nothing diverges."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LikelihoodWarning)
        found = [training.outcome(seed) for seed in range(first, first + 10)]
    assert [each for each in found if each[0] != "fine"] == []
