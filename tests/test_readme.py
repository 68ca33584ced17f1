"""The examples of the README and of the pages run as they stand."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "docs/matrix_free.md",
        "docs/spectra.md",
        "docs/kernels.md",
        "docs/laplace.md",
        "docs/optimizers.md",
        "docs/clients.md",
    ],
)
def test_examples_run(page, tmp_path, monkeypatch):
    """One after the other, as a reader would run them."""
    text = (ROOT / page).read_text(encoding="utf-8")
    examples = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert examples
    monkeypatch.chdir(tmp_path)
    names = {}
    for code in examples:
        exec(compile(code, page, "exec"), names)
