"""What the algebra makes: the class of every result as in `table.json`, and its values."""

import inspect
import sys

import pytest

from nngeo_lazy.operators import BaseLinearOperator
from nngeo_lazy.operators.sharded import AbsentLinearOperator

from . import table


def _final(kind):
    below = kind.__subclasses__()
    return [each for one in below for each in _final(one)] if below else [kind]


def _is_ours(kind):
    """Whether a module of the package has it; a class that a doctest defined is in none."""
    module = kind.__module__
    return module.startswith("nngeo_lazy.") and hasattr(sys.modules[module], kind.__name__)


def test_every_class_has_a_row():
    have = {type(op) for op in table.operators().values()}
    known = {one for one in _final(BaseLinearOperator) if _is_ours(one)}
    known.remove(AbsentLinearOperator)  # stands for numbers of another process, and has none
    missing = sorted(one.__name__ for one in known - have if not inspect.isabstract(one))
    assert not missing, f"add an operator of each to table.operators(): {missing}"


@pytest.mark.parametrize("name", [*table.operators(), *table.foreigners()])
def test_results_are_of_the_pinned_classes_and_right(name):
    before, wrong = table.pinned(name), []
    for operation, other, make, expected in table.cells(name):
        found, value = table.cell(make)
        where = f"{operation} with A = {name}" + (f", B = {other}" if other else "")
        was = before.pop((operation, other), "nothing")
        if found != was:
            wrong.append(f"{where}: was {was}, is {found}")
        if value is not None and expected is not None:
            wanted = expected()
            error = (value - wanted).norm() / wanted.norm().clamp_min(1.0)
            if not error <= 1e-9:
                wrong.append(f"{where}: {found} is off by {error:.1e}")
    wrong += [f"{key}: was {was}, and is not made any more" for key, was in before.items()]
    assert not wrong, "\n".join(wrong)
