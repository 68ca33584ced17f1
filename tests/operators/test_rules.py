"""Rules: the most specific classes answer, and what is missing or ambiguous has a name."""

import inspect
import subprocess
import sys

import pytest
import torch

from nngeo_lazy.errors import RuleError, SpaceMismatchError
from nngeo_lazy.operators import BaseLinearOperator, DiagonalLinearOperator, rules
from nngeo_lazy.operators.base import BaseLinearOperator as Base
from nngeo_lazy.operators.contract import ContractLinearOperator

from operators import examples


class Top: ...


class Left(Top): ...


class Right(Top): ...


class Leaf(Left): ...


@pytest.fixture
def rule():
    made = rules.Rule("both", "A & B", 2)
    yield made
    rules._RULES.remove(made)


def answers(text):
    return lambda A, B: text


def test_the_most_specific_classes_answer(rule):
    rule.register(Top, Top)(answers("any"))
    rule.register(Left, Top, symmetric=True)(lambda A, B: f"left and {type(B).__name__}")
    rule.register(Left, Left)(answers("two lefts"))
    assert rule(Right(), Right()) == "any"
    assert rule(Leaf(), Right()) == "left and Right"
    assert rule(Right(), Leaf()) == "left and Right"  # the operands come exchanged
    assert rule(Leaf(), Left()) == "two lefts"
    rule.register(Leaf, Left)(lambda A, B: NotImplemented)  # passes on
    assert rule(Leaf(), Left()) == "two lefts"


def test_a_missing_rule_says_which_to_add(rule):
    rule.register(Left, Left)(answers("two lefts"))
    with pytest.raises(
        RuleError, match=r"A & B has no rule for Left, Right: .*@rules.both.register\(Left"
    ):
        rule(Left(), Right())
    rule.register(Left, Right)(lambda A, B: NotImplemented)
    with pytest.raises(RuleError, match=r"no rule for Left, Right"):
        rule(Left(), Right())


def test_an_ambiguous_rule_is_refused_when_all_are_complete(rule):
    rule.register(Left, Top)(answers("one"))
    rule.register(Top, Left)(answers("other"))
    message = (
        r"A & B is ambiguous for Left, Left.*Left, Top.*Top, Left.*Register one for Left, Left"
    )
    with pytest.raises(RuleError, match=message):
        rule.check()
    rule.register(Left, Left)(answers("both"))
    rule.check()
    with pytest.raises(RuleError, match="ambiguous for Leaf, Left"):  # from now on at once
        rule.register(Leaf, Top)(answers("late"))


def test_a_family_that_makes_a_rule_ambiguous_is_refused_when_it_is_imported():
    code = (
        "from nngeo_lazy.operators import BaseLinearOperator, BlockDiagonalLinearOperator, rules\n"
        "both = (BlockDiagonalLinearOperator, BaseLinearOperator)\n"
        "rules.sums.register(*both)(lambda A, B, info: A)\n"
    )
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 1
    assert "ambiguous for BlockDiagonalLinearOperator, DiagonalLinearOperator" in found.stderr
    assert "Register one for BlockDiagonalLinearOperator, DiagonalLinearOperator" in found.stderr


def test_a_rule_is_registered_once_and_for_its_number_of_operands(rule):
    rule.register(Left, Left)(answers("two lefts"))
    with pytest.raises(RuleError, match="has a rule for Left, Left already"):
        rule.register(Left, Left)(answers("again"))
    with pytest.raises(RuleError, match="expected 2 classes for a rule of A & B, got 1"):
        rule.register(Left)(answers("one"))


def test_strangers_are_refused_by_name():
    F = examples.diagonal()
    for stranger in ([1.0], "matrix", None, {"a": 1}):
        with pytest.raises(TypeError, match="expected a tensor or a linear operator"):
            rules.as_operator(stranger)
    with pytest.raises(SpaceMismatchError, match="two matrices of one shape"):
        F + DiagonalLinearOperator(torch.ones(3, dtype=torch.float64))
    with pytest.raises(SpaceMismatchError, match="matrices that fit"):
        F @ DiagonalLinearOperator(torch.ones(3, dtype=torch.float64))


def every_class(base=BaseLinearOperator):
    for kind in base.__subclasses__():
        yield kind
        yield from every_class(kind)


@pytest.mark.parametrize("kind", sorted(set(every_class()), key=lambda c: c.__name__))
def test_no_family_overrides_what_is_final(kind):
    """A member of the contract or of the base is defined there alone: families have primitives."""
    final = {
        name: owner
        for owner in (ContractLinearOperator, Base)
        for name, value in vars(owner).items()
        if inspect.isfunction(value) or isinstance(value, property)
    }
    own = [name for name in vars(kind) if name in final and name != "__init__"]
    assert not own, f"{kind.__name__} overrides {own}"
