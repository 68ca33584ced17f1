"""The README: short, with the two commands that `.ci/run` reads."""

from pathlib import Path

import pytest

import nngeo_lazy as ng

ROOT = Path(__file__).parent.parent
LINES = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()


def test_it_is_short():
    assert len(LINES) < 150


@pytest.mark.parametrize("name", ["quickstart", "tests"])
def test_it_has_the_two_commands(name):
    """A mark, and below it one line that begins with python3 and sets up everything."""
    mark = LINES.index(f"<!-- ci: {name} -->")
    command = next(line for line in LINES[mark:] if line.startswith("python3 "))
    assert LINES.index(command) == mark + 2
    assert "-m venv .venv && .venv/bin/pip install -q torch==" in command


def test_the_citation_has_the_version():
    text = (ROOT / "docs/CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {ng.__version__}\n" in text
