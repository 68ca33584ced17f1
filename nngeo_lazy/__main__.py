"""`python -m nngeo_lazy`: versions, devices, and which extras are installed."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import torch

from . import __version__

NEEDED = ("torch", "linear_operator", "numpy", "scipy", "tqdm")
EXTRAS = {
    "plot": ("matplotlib",),
    "gp": ("gpytorch",),
    "examples": ("scikit-learn", "matplotlib"),
    "docs": ("mkdocs-material", "mkdocstrings"),
    "bench": ("nngeometry", "curvlinops-for-pytorch"),
}


def found(package: str) -> str:
    """The version of a package, or that it is missing."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def lines() -> Iterator[str]:
    """What is printed, line by line."""
    yield f"nngeo_lazy {__version__}"
    yield f"{'python':<24}{platform.python_version()} on {platform.platform()}"
    for name in NEEDED:
        yield f"{name:<24}{found(name)}"
    yield ""
    yield f"{'processor':<24}{torch.get_num_threads()} threads"
    for index in range(torch.cuda.device_count()):
        known = torch.cuda.get_device_properties(index)
        yield f"{f'cuda:{index}':<24}{known.name}, {known.total_memory / 2**30:.0f} GiB"
    if not torch.cuda.is_available():
        yield f"{'cuda':<24}not available"
    if torch.backends.mps.is_available():
        yield f"{'mps':<24}available"
    yield ""
    for extra, packages in EXTRAS.items():
        each = ", ".join(f"{name} {found(name)}" for name in packages)
        yield f"{f'extra {extra}':<24}{each}"


if __name__ == "__main__":
    sys.stdout.write("\n".join(lines()) + "\n")
