"""Checks of arguments: each says what was expected, what came, and what to do.

What a public function takes stands in its annotations, which `checked` reads as types.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import numbers
import os
import sys
import types
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import (
    Annotated,
    Any,
    NamedTuple,
    TypeAlias,
    TypeVar,
    Union,
    get_args,
    get_origin,
)

import torch
from torch import Tensor, nn

from .errors import DataError
from .switches import whole_transforms

__all__ = [
    "RULES",
    "NonNegative",
    "NonNegativeInt",
    "PositiveInt",
    "Rule",
    "applied",
    "as_numbers",
    "check_fields",
    "checked",
    "described",
    "name_of",
    "named",
    "require_options",
    "require_sequence",
    "require_takes",
]

Kind = TypeVar("Kind", bound=type)
Function = TypeVar("Function", bound=Callable[..., Any])


class Rule(NamedTuple):
    """What may stand in an argument: the words for it, a test, and an example.

    Each type in `RULES` has one. `Annotated[T, Rule(...)]` has its own in place of that of T.
    """

    words: str
    test: Callable[[Any], bool]
    example: str


def _is_integer(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.dim() == 0 and not value.is_complex() and not bool(value.isnan())
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return real and not math.isnan(value)


def _is_vectors(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(name, str) and isinstance(v, Tensor) for name, v in value.items()
    )


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _is_numbers(value: Any) -> bool:
    """A list, or an array of numpy."""
    return _is_list(value) or (type(value).__module__ == "numpy" and value.ndim > 0)


def _is_shapes(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(name, str) and isinstance(shape, Iterable) and all(map(_is_integer, shape))
        for name, shape in value.items()
    )


def _is_names(value: Any) -> bool:
    names = isinstance(value, (Sequence, Set, Mapping)) and not isinstance(value, (str, bytes))
    return names and all(isinstance(v, str) for v in value)


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(map(_is_number, value))


def _instance(kind: type, words: str, example: str) -> Rule:
    return Rule(words, lambda value: isinstance(value, kind), example)


_MODULE = _instance(nn.Module, "a torch.nn.Module", "model")
_PATH = _instance(os.PathLike, "a path", "'...'")
_TENSOR = _instance(Tensor, "a tensor", "torch.as_tensor(...)")
# What a part of an annotation means. If a part is not here, the argument is not looked at.
RULES: dict[Any, Rule] = {
    types.NoneType: _instance(types.NoneType, "None", "None"),
    int: Rule("an integer", _is_integer, "1"),
    float: Rule("a number", _is_number, "0.1"),
    bool: _instance(bool, "True or False", "True"),
    str: _instance(str, "a string", "'...'"),
    Tensor: _TENSOR,
    nn.Module: _MODULE,
    torch.dtype: _instance(torch.dtype, "a torch.dtype", "torch.float64"),
    Callable: Rule(
        "a function", lambda v: callable(v) and not isinstance(v, type), "lambda ...: ..."
    ),
    Mapping: _instance(Mapping, "a dict", "{...}"),
    Mapping[str, Tensor]: Rule(
        "a dict of tensors by parameter name", _is_vectors, "F.space.unravel(...)"
    ),
    Mapping[str, Sequence[int]]: Rule("a dict of shapes", _is_shapes, "{'weight': (2, 3)}"),
    Sequence: Rule("a list", _is_list, "[...]"),
    Sequence[Any]: Rule("a list of numbers", _is_numbers, "[1.0, 1.0]"),
    Sequence[float]: Rule(
        "a list of numbers", lambda v: _is_numbers(v) and all(map(_is_number, v)), "[1.0, 1.0]"
    ),
    Path: _PATH,
    os.PathLike: _PATH,
    tuple[int, ...]: Rule(
        "a tuple of integers", lambda v: isinstance(v, tuple) and all(map(_is_integer, v)), "(0, 1)"
    ),
    tuple[float, float]: Rule("two numbers", _is_pair, "(1e-6, 1e6)"),
    Iterable[str]: Rule("a list of names", _is_names, "['...']"),
}
PositiveInt: TypeAlias = Annotated[
    int, Rule("an integer from 1 on", lambda v: _is_integer(v) and v >= 1, "1")
]
NonNegativeInt: TypeAlias = Annotated[
    int, Rule("an integer from 0 on", lambda v: _is_integer(v) and v >= 0, "1")
]
NonNegative: TypeAlias = Annotated[
    float, Rule("a number from 0 on", lambda v: _is_number(v) and v >= 0, "0.1")
]


def named(words: str, example: str) -> Callable[[Kind], Kind]:
    """A class whose instances are arguments, with the words for them in messages."""

    def known(kind: Kind) -> Kind:
        RULES[kind] = _instance(kind, words, example)
        return kind

    return known


def _rules(hint: Any) -> tuple[Rule, ...]:
    """What an annotation allows; () if it has a part that is not known here."""
    kind = get_origin(hint)
    if kind in (Union, types.UnionType):
        found = [_rules(part) for part in get_args(hint)]
        return tuple(rule for each in found for rule in each) if all(found) else ()
    if kind is Annotated:
        return tuple(note for note in hint.__metadata__ if isinstance(note, Rule))
    rule = RULES.get(hint, RULES.get(kind))
    return () if rule is None else (rule,)


class _Parameter(NamedTuple):
    """A parameter: its place, its rules, and the order of all, if that may be wrong."""

    place: int
    name: str
    rules: tuple[Rule, ...]
    default: Any
    order: str

    def require(self, value: Any) -> None:
        """Raise DataError if a value breaks all rules."""
        if value is self.default or any(rule.test(value) for rule in self.rules):
            return
        example = self.rules[0].example
        if type(value).__module__ == "numpy" and _TENSOR in self.rules:
            example = _TENSOR.example
        elif self.order:
            example = ""
        remedy = f"pass {self.name}={example}" if example else f"the order is {self.order}"
        subject = f"{self.name} to be {' or '.join(rule.words for rule in self.rules)}"
        if self.rules == (_MODULE,):
            subject = f"the model, {_MODULE.words}"
            if isinstance(value, types.GeneratorType):
                remedy += "; pass the model itself, and select parameters with params="
        raise DataError(f"expected {subject}, got {described(value)}: {remedy}")


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """The annotations of a function or of a class and its bases, as types."""
    hints = {}
    for owner in reversed(inspect.getmro(function) if isinstance(function, type) else [function]):
        names = vars(sys.modules[owner.__module__])
        for name, text in inspect.get_annotations(owner).items():
            with contextlib.suppress(NameError):  # only for type checkers: it is not looked at
                hints[name] = eval(text, names) if isinstance(text, str) else text
    return hints


@functools.cache
def _parameters(function: Callable[..., Any]) -> tuple[_Parameter, ...]:
    """The parameters that have rules, read at the first call, when all names are defined."""
    given, hints = inspect.signature(function).parameters, _hints(function)
    plain = [n for n, p in given.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    ahead = [n for n in plain if n not in ("self", "cls")]
    order = f"({', '.join(ahead)})" if len(ahead) > 1 else ""
    found = []
    for n, p in given.items():
        if p.kind is not p.VAR_KEYWORD and (rules := _rules(hints.get(n))):
            place = plain.index(n) if n in plain else -1
            found.append(_Parameter(place, n, rules, p.default, order if n in ahead else ""))
    return tuple(found)


def checked(function: Function) -> Function:
    """The function, which raises DataError if an argument does not fit its annotation.

    Example:
        >>> @checked
        ... def repeat(text: str, n: PositiveInt = 1) -> str:
        ...     return n * text
        >>> repeat("a", n=2)
        'aa'
        >>> repeat(2, "a")
        Traceback (most recent call last):
        nngeo_lazy.errors.DataError: expected text to be a string, got 2: the order is (text, n)
    """
    parameters, scope, compiling = _parameters, whole_transforms, torch.compiler.is_compiling

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if compiling():  # torch would trace how annotations are read, and the scope
            return function(*args, **kwargs)
        for parameter in parameters(function):
            place, name = parameter[:2]
            if 0 <= place < len(args):
                parameter.require(args[place])
            elif name in kwargs:
                parameter.require(kwargs[name])
        with scope():  # what an interrupt leaves open is ended
            return function(*args, **kwargs)

    # of the function's own module, where those who look for doctests look for it
    made = types.FunctionType(
        wrapper.__code__, function.__globals__, function.__name__, None, wrapper.__closure__
    )
    return functools.update_wrapper(made, function)  # type: ignore[return-value]


def applied(function: Callable[[Any], Any], batch: Any, name: str) -> Any:
    """A function of the user's own of a batch; it may be a network that takes something else.

    Raises:
        DataError: it is such a network. All other functions raise what they raise.
    """
    try:
        return function(batch)
    except (TypeError, RuntimeError) as error:
        if not isinstance(function, nn.Module):
            raise
        raise DataError(
            f"expected {name} to be a function of a batch, got {described(function)}, which does "
            f"not take one: pass {name}=lambda batch: ..."
        ) from error


def check_fields(instance: Any) -> None:
    """Raise DataError if a field of a dataclass does not fit its annotation."""
    kind: Callable[..., Any] = type(instance)
    for parameter in () if torch.compiler.is_compiling() else _parameters(kind):
        value = getattr(instance, parameter.name)
        number = any(rule.test(0.5) for rule in parameter.rules)  # the ranges of its own refuse NaN
        if not (number and isinstance(value, float) and math.isnan(value)):
            parameter.require(value)


def require_options(given: Mapping[str, Any], function: Callable[..., Any]) -> None:
    """Raise DataError if one of the options that are handed on is no keyword of a function."""
    known = [
        p.name for p in inspect.signature(function).parameters.values() if p.kind == p.KEYWORD_ONLY
    ]
    if unknown := [name for name in given if name not in known]:
        raise DataError(
            f"expected options of {function.__name__}, got {unknown}: it takes {sorted(known)}"
        )


def require_takes(name: str, function: Any, *given: str) -> None:
    """Raise DataError unless it is None, or a function that can be called with such arguments."""
    if function is None:
        return
    try:
        called = function.forward if isinstance(function, nn.Module) else function
        inspect.signature(called).bind(*given)
    except TypeError as error:
        raise DataError(
            f"expected {name} to be a function of ({', '.join(given)}), but {error}: pass "
            f"{name}=lambda {', '.join(given)}: ..."
        ) from error
    except ValueError:  # it does not say what it takes
        return


def as_numbers(name: str, value: Any) -> Tensor:
    """Numbers in lists, an array or a tensor, as float64.

    Raises:
        DataError: they are none, or of unequal lengths.
    """
    try:
        return torch.as_tensor(value, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"expected {name} to be a number, a tensor or lists of numbers of one length, got "
            f"{described(value)}: pass {name}=torch.tensor(...)"
        ) from error


def require_sequence(name: str, values: Any) -> None:
    """Raise DataError unless it is a list or another collection of things."""
    if not isinstance(values, Iterable) or hasattr(values, "shape"):
        raise DataError(
            f"expected a list of {name}, got {type(values).__name__}: put it into a list"
        )


def name_of(function: Callable[..., Any]) -> str:
    """Where a function that has a name is defined; any other one by its repr."""
    name = getattr(function, "__qualname__", "<")
    return repr(function) if "<" in name else f"{getattr(function, '__module__', '')}.{name}"


def described(value: Any) -> str:
    """A value in a message: itself if it is short, else what it is."""
    if isinstance(value, Tensor):
        return f"Tensor of shape {tuple(value.shape)}"
    if isinstance(value, (numbers.Number, str)) and len(repr(value)) < 40:
        return repr(value)
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return type(value).__name__
