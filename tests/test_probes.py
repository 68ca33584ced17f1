"""The options of estimates: one object, or the same keywords; errors name what is wrong."""

import dataclasses

import pytest
import torch
from test_spectra import products_only, symmetric

import nngeo_lazy as ng
from nngeo_lazy.errors import DataError

pytestmark = pytest.mark.usefixtures("float64")

ESTIMATES = {
    "trace": ng.trace,
    "diagonal": ng.diagonal,
    "logdet": ng.logdet,
    "effective_dimension": lambda A, **options: ng.effective_dimension(A, 1.0, **options),
    "spectral_density": ng.spectral_density,
}
OPTIONS = {
    "trace": {"tol": 0.5, "max_matvecs": 300},
    "diagonal": {"tol": 0.5, "max_matvecs": 300},
    "logdet": {"steps": 35, "tol": 0.5},
    "effective_dimension": {"steps": 35, "tol": 0.5},
    "spectral_density": {"steps": 35},
}
EACH = pytest.mark.parametrize("name", ESTIMATES)


@pytest.fixture
def A():
    return products_only(symmetric(torch.linspace(1, 4, 400)))


@EACH
def test_an_object_is_the_same_as_keywords(name, A):
    options = {"probes": 4, "seed": 3, **OPTIONS[name]}
    call = ESTIMATES[name]
    by_keywords, by_object = call(A, **options), call(A, probes=ng.Probes(**options))
    assert by_object == by_keywords
    assert by_object.probes == by_keywords.probes == 4
    assert by_object.matvecs == by_keywords.matvecs > 0
    assert call(A, **{**options, "seed": 4}) != by_keywords


@pytest.mark.parametrize(
    ("name", "probes", "products"),
    [
        ("trace", 30, 60),
        ("diagonal", 30, 60),
        ("logdet", 10, 300),
        ("effective_dimension", 10, 300),
        ("spectral_density", 10, 900),
    ],
)
def test_defaults(name, probes, products, A):
    found = ESTIMATES[name](A, seed=0)
    assert (found.probes, found.matvecs) == (probes, products)
    assert ESTIMATES[name](A, probes=ng.Probes(seed=0)) == found


def test_a_function_of_a_matrix_has_the_defaults_of_a_quadrature(A):
    found = ng.trace(A, torch.exp, method="slq", steps=20, seed=0)
    assert (found.probes, found.matvecs) == (10, 200)


@EACH
def test_an_object_shows_a_bar(name, A, capsys):
    ESTIMATES[name](A, probes=ng.Probes(2, progress=True))
    assert "products" in capsys.readouterr().err


@EACH
def test_an_object_beside_keywords(name, A):
    for extra in ({"seed": 0}, {"progress": True}):
        with pytest.raises(DataError, match=rf"{name} takes a Probes object or keywords, got both"):
            ESTIMATES[name](A, probes=ng.Probes(4), **extra)
    with pytest.raises(DataError, match=r"write \['seed'\] into the object"):
        ESTIMATES[name](A, probes=ng.Probes(4), seed=0)


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("diagonal", {"steps": 5}),
        ("spectral_density", {"tol": 0.1}),
        ("spectral_density", {"max_matvecs": 5}),
    ],
)
def test_an_object_with_an_option_that_the_function_does_not_take(name, option, A):
    (field,) = option
    with pytest.raises(DataError, match=f"{name} takes no {field}=: leave it out of the Probes"):
        ESTIMATES[name](A, probes=ng.Probes(4, **option))


@pytest.mark.parametrize("name", ["trace", "diagonal", "logdet", "effective_dimension"])
def test_unknown_keywords(name, A):
    with pytest.raises(TypeError, match=rf"{name} takes no samples=: its options are \['probes'"):
        ESTIMATES[name](A, samples=3)


def test_a_keyword_of_another_function(A):
    with pytest.raises(TypeError, match="diagonal takes no steps=: its options are"):
        ng.diagonal(A, steps=3)


@EACH
@pytest.mark.parametrize("wrong", [0, -3, 2.5, True, "many"])
def test_counts_out_of_range(name, wrong, A):
    with pytest.raises(DataError, match=f"probes= to be a whole number from 1 on, got {wrong!r}"):
        ESTIMATES[name](A, probes=wrong)
    for field in ("steps", "max_matvecs"):
        with pytest.raises(DataError, match=f"{field}= to be a whole number from 1 on, got"):
            ng.Probes(**{field: wrong})


@pytest.mark.parametrize("wrong", [0.0, -1.0, float("nan")])
def test_tolerances_out_of_range(wrong, A):
    with pytest.raises(DataError, match="expected tol= to be a relative error above 0, got"):
        ng.trace(A, tol=wrong)


def test_no_tolerance_for_hutch_plus_plus(A):
    with pytest.raises(ValueError, match=r"'hutch\+\+' takes no tol=: take 'xtrace'"):
        ng.trace(A, method="hutch++", tol=0.1)


@pytest.mark.parametrize("name", ["logdet", "effective_dimension"])
def test_too_few_probes_for_an_error(name, A):
    with pytest.raises(ValueError, match="at least 2 probes= for a standard error, got 1"):
        ESTIMATES[name](A, probes=1)


def test_an_object_is_a_value():
    options = ng.Probes(4, seed=1)
    assert options == ng.Probes(probes=4, seed=1)
    assert hash(options) == hash(ng.Probes(probes=4, seed=1))
    assert dataclasses.replace(options, seed=2) == ng.Probes(4, seed=2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.seed = 2
