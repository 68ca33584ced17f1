"""Each call of docs/from_other_packages.md, theirs and ours, is evaluated from the page itself."""

import re
import warnings
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]  # theirs have many
PAGE = (Path(__file__).parents[1] / "docs" / "from_other_packages.md").read_text()


def section(name):
    """The setup and the rows of a section."""
    text = PAGE.split(f"## {name}, call by call")[1].split("\n## ")[0]
    (setup,) = re.findall(r"```py\n(.*?)```", text, re.DOTALL)
    rows = re.findall(r"^\| `(.+?)` \| `(.+?)` \|$", text, re.MULTILINE)
    assert len(rows) == len(re.findall(r"^\| `", text, re.MULTILINE)) > 3
    return setup, rows


def names_of(package):
    pytest.importorskip(package)
    torch.manual_seed(0)
    names = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(section(package)[0], names)
    return names


@pytest.fixture(scope="module")
def curvlinops():
    return names_of("curvlinops")


@pytest.fixture(scope="module")
def kronfluence():
    return names_of("kronfluence")


@pytest.mark.parametrize(("theirs", "ours"), section("curvlinops")[1])
def test_curvlinops(curvlinops, theirs, ours):
    found, want = (torch.as_tensor(eval(code, curvlinops)) for code in (ours, theirs))
    assert found.shape == want.shape
    assert float((found - want).norm()) <= 1e-5 * float(want.norm())


@pytest.mark.parametrize(("theirs", "ours"), section("kronfluence")[1])
def test_kronfluence(kronfluence, theirs, ours):
    found, want = (eval(code, kronfluence).double() for code in (ours, theirs))
    assert found.shape == want.shape
    both = torch.stack([found.flatten(), want.flatten()])
    assert float(torch.corrcoef(both)[0, 1]) > 0.999
    slope = float((found * want).sum() / want.square().sum())
    assert slope == pytest.approx(1, abs=0.05)
