"""What earlier releases saved is read as it was meant."""

import json

import pytest
import torch

import nngeo_lazy as ng

import old_files

EXPECTED = {
    (path.parent.name, name): known
    for path in sorted(old_files.FIXTURES.glob("*/expected.json"))
    for name, known in json.loads(path.read_text()).items()
}


@pytest.mark.parametrize(("release", "name"), EXPECTED)
def test_an_old_file_holds_what_it_held(release, name):
    F = ng.load(old_files.FIXTURES / release / f"{name}.nngeo")
    known = dict(EXPECTED[release, name])
    expected = known.pop("numbers")
    assert old_files.facts(F) == known
    found = old_files.numbers(F, solved="trace" in expected)
    assert found.keys() == expected.keys()
    for what, values in expected.items():
        a, b = torch.tensor([found[what], values], dtype=torch.float64)
        assert (a - b).norm() <= 1e-10 * b.norm(), what


@pytest.mark.parametrize(("release", "name"), EXPECTED)
def test_an_old_file_goes_through_a_state_again(release, name):
    F = ng.load(old_files.FIXTURES / release / f"{name}.nngeo")
    state = F.state_dict()
    back = ng.load(state)
    assert type(back) is type(F)
    again = back.state_dict()
    tensors, same = state.pop("tensors"), again.pop("tensors")
    assert again == state
    assert same.keys() == tensors.keys()
    assert all(torch.equal(same[key], tensors[key]) for key in tensors)


def test_every_file_is_known():
    files = {(path.parent.name, path.stem) for path in old_files.FIXTURES.glob("*/*.nngeo")}
    assert files == set(EXPECTED)
