"""Public results are tuples: they unpack, index and slice as scipy's, with attributes beside."""

import copy
import dataclasses
import pickle

import pytest
import torch
from torch import nn

import nngeo_lazy as ng
from nngeo_lazy.linalg import Result

pytestmark = pytest.mark.usefixtures("float64")

MATRIX = torch.diag(torch.arange(1.0, 13.0, dtype=torch.float64))

# name: (call, class, the names of the tuple's items, the names beside)
RESULTS = {
    "eigsh": (
        lambda A: ng.eigsh(A, 3),
        ng.Spectrum,
        ("eigenvalues", "eigenvectors"),
        ("residuals", "matvecs", "converged", "space"),
    ),
    "svds": (
        lambda A: ng.svds(A, 3),
        ng.SingularValues,
        ("U", "S", "Vh"),
        ("residuals", "matvecs", "converged", "space"),
    ),
    "spectral_density": (
        lambda A: ng.spectral_density(A, probes=2, steps=4, seed=0),
        ng.SpectralDensity,
        ("nodes", "weights"),
        ("probe", "size", "matvecs", "interrupted"),
    ),
    "solve": (
        lambda A: ng.solve(A, torch.ones(A.shape[0])),
        ng.Solution,
        ("x", "residual", "iterations", "converged"),
        ("method",),
    ),
    "eigenfunctions": (
        lambda A: ng.eigenfunctions(A, 3),
        ng.Eigenfunctions,
        ("eigenvalues", "values"),
        (),
    ),
}
for name, call in {
    "trace": ng.trace,
    "diagonal": ng.diagonal,
    "logdet": ng.logdet,
    "effective_dimension": lambda A: ng.effective_dimension(A, 0.5),
}.items():
    items = ("value", "standard_error", "matvecs")
    RESULTS[name] = (call, ng.Estimate, items, ("probes", "bias", "interrupted"))

EVERY = pytest.mark.parametrize("name", RESULTS)


def fisher():
    net = nn.Linear(3, 4)
    return ng.FIM(net, torch.randn(9, 3), likelihood="gaussian").damped(0.1)


@EVERY
@pytest.mark.parametrize("make", [lambda: MATRIX, fisher], ids=["tensor", "operator"])
def test_a_result_is_a_tuple_with_attributes_beside(name, make):
    call, kind, items, beside = RESULTS[name]
    found = call(make())
    assert type(found) is kind
    assert isinstance(found, tuple)
    assert len(found) == len(items)
    for position, item in enumerate(items):
        assert found[position] is found[position - len(items)] is getattr(found, item)
    for unpacked, item in zip(found, items, strict=True):
        assert unpacked is getattr(found, item)
    assert type(found[:1]) is type(found[::-1]) is tuple
    assert found[:1] == (found[0],)
    assert [field.name for field in dataclasses.fields(found)] == [*items, *beside]


@EVERY
@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), dataclasses.replace],
    ids=["copy", "deepcopy", "pickle", "replace"],
)
def test_a_copied_result_is_equal_and_whole(name, copied):
    found = RESULTS[name][0](fisher())
    again = copied(found)
    assert type(again) is type(found)
    assert again is not found
    assert again == found
    assert tuple(again) == again == tuple(found)
    for field in dataclasses.fields(found):
        mine, other = getattr(found, field.name), getattr(again, field.name)
        assert torch.equal(mine, other) if isinstance(mine, torch.Tensor) else mine == other
    assert again[0] is getattr(again, dataclasses.fields(again)[0].name)


@EVERY
def test_a_result_cannot_be_changed_and_has_no_hash(name):
    found = RESULTS[name][0](MATRIX)
    for field in dataclasses.fields(found):
        with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign to field"):
            setattr(found, field.name, 0)
    with pytest.raises(TypeError, match="does not support item assignment"):
        found[0] = 0
    with pytest.raises(TypeError, match=f"unhashable type '{type(found).__name__}': its tensors"):
        hash(found)


@EVERY
def test_a_result_prints_in_one_readable_line(name):
    call, kind, items, _ = RESULTS[name]
    shown = repr(call(fisher()))
    assert shown.startswith(f"{kind.__name__}({items[0]}=")
    assert "\n" not in shown
    assert len(shown) < 180
    assert all(f"{item}=" in shown for item in items)


def test_what_a_result_prints():
    found = ng.eigsh(MATRIX, 2)
    assert repr(found) == (
        "Spectrum(eigenvalues=[11, 12], eigenvectors=Tensor(12, 2), residuals=[0, 0], matvecs=0, "
        "converged=True)"
    )
    F = fisher()
    named = ng.solve(F, F.space.unravel(F.space.zeros()))
    assert "x={weight: Tensor(4, 3), bias: [0, 0, 0, 0]}" in repr(named)


def test_results_are_equal_as_tuples():
    found = ng.trace(MATRIX)
    value, error, matvecs = found
    assert found == (value.clone(), error.clone(), matvecs)
    assert (value.clone(), error.clone(), matvecs) == found
    assert found != (value + 1, error, matvecs)
    assert found != (value.float(), error, matvecs)  # another dtype
    assert found != (float(value), error, matvecs)  # a number is no tensor
    assert found != (value, error)
    assert found != float(value)
    assert found != ng.trace(2 * MATRIX)
    F = fisher()
    named = ng.solve(F, F.space.unravel(torch.ones(F.shape[0])))
    assert named == ng.solve(F, F.space.unravel(torch.ones(F.shape[0])))
    assert named != ng.solve(F, F.space.unravel(torch.full((F.shape[0],), 2.0)))


def test_a_result_names_what_is_missing():
    with pytest.raises(TypeError, match="missing 2 required positional arguments: 'standard_error"):
        ng.Estimate(torch.tensor(1.0))
    by_name = ng.Estimate(matvecs=3, standard_error=torch.zeros(()), value=torch.ones(()))
    assert by_name == (torch.ones(()), torch.zeros(()), 3)


def test_every_public_result_is_one():
    kinds = {kind for _, kind, _, _ in RESULTS.values()}
    public = {getattr(ng, name) for name in ng.__all__}
    results = {x for x in public if isinstance(x, type) and issubclass(x, Result)}
    assert results == kinds


def test_estimates_are_numbers():
    found = ng.trace(MATRIX)
    assert float(found) == 78.0
    assert f"{float(found):.1f}" == "78.0"
    with pytest.raises(ValueError, match=r"of one number, got one of shape \(12,\): take its .val"):
        float(ng.diagonal(MATRIX))
    for confidence in (0.0, 1.0, float("nan")):
        with pytest.raises(ValueError, match="expected a confidence between 0 and 1, got"):
            found.interval(confidence)


def test_a_plain_tuple_of_pairs_deflates():
    values, vectors = torch.linalg.eigh(MATRIX)
    pairs = values[-2:], vectors[:, -2:]
    found = ng.spectral_density(MATRIX, deflate=pairs, seed=0)
    assert torch.equal(found.outliers, torch.tensor([11.0, 12.0]))
