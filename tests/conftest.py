"""Tests start from one seed; parallel workers use one thread each; slow tests are marked."""

import os
from collections import defaultdict
from pathlib import Path

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


LINES = (Path(__file__).parent / "slow.txt").read_text(encoding="utf-8").splitlines()
SLOW = {line for line in LINES if not line.startswith("#")}
SLOW_ROOMS = tuple(line for line in SLOW if line.endswith("/"))  # all tests below them
STRIDE = 16  # of a slow test with more parameters than that, the fast half has every sixteenth


def pytest_collection_modifyitems(items):
    """Mark the tests of slow.txt as slow."""
    listed = defaultdict(list)
    for item in items:
        name = item.nodeid.split("[")[0]
        if name.startswith(SLOW_ROOMS):
            item.add_marker(pytest.mark.slow)
        elif name in SLOW:
            listed[name].append(item)
    for each in listed.values():
        for k, item in enumerate(each):
            if len(each) <= STRIDE or k % STRIDE:
                item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def float64():
    """Double precision for what is made without a dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
