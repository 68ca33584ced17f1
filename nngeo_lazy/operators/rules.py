"""Operations whose answer depends on the classes of their operands.

A leaf: it imports no operator. The base calls a rule, and each family registers its answers beside
its class, so that families meet without importing each other:

    @rules.sums.register(DiagonalLinearOperator, DiagonalLinearOperator)
    def _(A, B, info):
        return DiagonalLinearOperator(A.diag + B.diag, info=info)

`functools.singledispatch` looks at one operand; sums and products need both.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any, TypeVar

from ..errors import RuleError

__all__ = [
    "Rule",
    "as_operator",
    "broadcast",
    "complete",
    "hadamard",
    "inverses",
    "multiples",
    "orthogonal",
    "plus_diagonal",
    "products",
    "selections",
    "stacks",
    "states",
    "sums",
]

Answer = TypeVar("Answer", bound=Callable[..., Any])
Classes = tuple[type, ...]
_RULES: list[Rule] = []


class Rule:
    """A function that each class, or each pair of classes, may answer in its own way.

    The most specific classes answer first, by their method resolution orders. An answer of
    `NotImplemented` passes the operands on to the next one.

    Args:
        name: of the variable that holds it.
        what: what it computes, for messages.
        arity: how many of the leading arguments are looked at.
    """

    def __init__(self, name: str, what: str, arity: int) -> None:
        self.name, self.what, self.arity = name, what, arity
        self._answers: dict[Classes, Callable[..., Any]] = {}
        self._found: dict[Classes, list[Callable[..., Any]]] = {}
        self._complete = False
        _RULES.append(self)

    def register(self, *classes: type, symmetric: bool = False) -> Callable[[Answer], Answer]:
        """A decorator for the answer of some classes, one class for each operand.

        Args:
            *classes: of the operands; subclasses are answered alike.
            symmetric: for two classes, whether the answer holds for the exchanged operands too.

        Raises:
            RuleError: the classes are answered already, or two answers now fit some operands
                equally well.
        """

        def registered(answer: Answer) -> Answer:
            self._add(classes, answer)
            if symmetric:
                exchanged = classes[::-1]
                self._add(exchanged, lambda A, B, *more, **named: answer(B, A, *more, **named))
            if self._complete:
                self.check()
            return answer

        return registered

    def _add(self, classes: Classes, answer: Callable[..., Any]) -> None:
        if len(classes) != self.arity:
            raise RuleError(
                f"expected {self.arity} classes for a rule of {self.what}, got {len(classes)}"
            )
        if classes in self._answers:
            raise RuleError(f"{self.what} has a rule for {_listed(classes)} already: remove one")
        self._answers[classes] = answer
        self._found.clear()

    def __call__(self, *operands: Any, **named: Any) -> Any:
        """The answer of the most specific classes.

        Raises:
            RuleError: no rule fits the operands.
        """
        classes = tuple(map(type, operands[: self.arity]))
        found = self._found.get(classes)
        if found is None:
            found = self._found[classes] = self._fitting(classes)
        for answer in found:
            made = answer(*operands, **named)
            if made is not NotImplemented:
                return made
        raise RuleError(
            f"{self.what} has no rule for {_listed(classes)}: register one with "
            f"@rules.{self.name}.register({_listed(classes)}) beside the class"
        )

    def _fitting(self, classes: Classes) -> list[Callable[..., Any]]:
        """The answers for some classes, the most specific first."""

        def distance(registered: Classes) -> int:
            pairs = zip(classes, registered, strict=True)
            return sum(own.__mro__.index(base) for own, base in pairs)

        fitting = [known for known in self._answers if _fits(classes, known)]
        return [self._answers[known] for known in sorted(fitting, key=distance)]

    def check(self) -> None:
        """Look for operands that two answers fit equally well.

        Raises:
            RuleError: there are some; it names the rule to add.
        """
        self._complete = True
        for one, other in combinations(self._answers, 2):
            if _fits(one, other) or _fits(other, one):
                continue  # the more specific one is taken
            pairs = list(zip(one, other, strict=True))
            if not all(issubclass(a, b) or issubclass(b, a) for a, b in pairs):
                continue  # no pair of operands fits both
            both = tuple(a if issubclass(a, b) else b for a, b in pairs)
            if both not in self._answers:
                raise RuleError(
                    f"{self.what} is ambiguous for {_listed(both)}: the rules for {_listed(one)} "
                    f"and for {_listed(other)} fit equally well. Register one for {_listed(both)}"
                )


def _fits(classes: Classes, registered: Classes) -> bool:
    return all(issubclass(own, base) for own, base in zip(classes, registered, strict=True))


def _listed(classes: Classes) -> str:
    return ", ".join(each.__name__ for each in classes)


def complete() -> None:
    """Check all rules, when every family has registered its own; later ones are checked at once.

    Raises:
        RuleError: some rule is ambiguous.
    """
    for rule in _RULES:
        rule.check()


sums = Rule("sums", "A + B", 2)  # (A, B, info)
products = Rule("products", "A @ B", 2)  # (A, B, info)
hadamard = Rule("hadamard", "A * B", 2)  # (A, B, info)
as_operator = Rule("as_operator", "the operator of a matrix", 1)  # (anything that is a matrix)
selections = Rule("selections", "A[rows, columns]", 1)  # (A, rows, columns or None for rows, info)
stacks = Rule("stacks", "matrices as one batch", 1)  # (a list of operators of one shape)
broadcast = Rule("broadcast", "A with batch dimensions", 1)  # (A, batch_shape)
multiples = Rule("multiples", "c A", 1)  # (A, c)
orthogonal = Rule("orthogonal", "A as a matrix of eigenvectors", 1)  # (A)
inverses = Rule("inverses", "the lazy inverse of A", 1)  # (A)
# (A, d), of an A that has no closed form for this d
plus_diagonal = Rule("plus_diagonal", "A + diag(d)", 1)
states = Rule("states", "the state of A", 1)  # (A), for files
