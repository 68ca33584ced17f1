"""One pool of processes for all tests here, in one place if tests run in parallel."""

import pytest

from .workers import Pool


@pytest.fixture(scope="session")
def pool():
    made = Pool()
    yield made
    made.end()


def pytest_collection_modifyitems(items):
    for item in items:
        if "distributed" in item.path.parts:
            item.add_marker(pytest.mark.xdist_group("processes"))
