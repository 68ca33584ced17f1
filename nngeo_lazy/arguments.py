"""Checks of arguments: each says what was expected, what came, and what to do.

What a public function takes stands in its annotations; `checked` compares. A parameter of one name
means the same everywhere in the package, so that its range stands in one table here.
"""

from __future__ import annotations

import functools
import inspect
import math
import numbers
import os
import types
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .errors import DataError

__all__ = [
    "as_numbers",
    "check_fields",
    "checked",
    "described",
    "require_options",
    "require_sequence",
    "require_takes",
]

Function = TypeVar("Function", bound=Callable[..., Any])


class _Kind(NamedTuple):
    """What may stand in an argument: the words for it, a test, and an example."""

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
    """{name: tensor}, with names of parameters."""
    return isinstance(value, Mapping) and all(
        isinstance(name, str) and isinstance(v, Tensor) for name, v in value.items()
    )


def _is_damping(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(_is_damping(v) and not isinstance(v, Mapping) for v in value.values())
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return isinstance(value, Tensor) or real  # what is below 0, or NaN, has an error of its own


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _is_numbers(value: Any) -> bool:
    """A list, or an array of numpy."""
    return _is_sequence(value) or (type(value).__module__ == "numpy" and value.ndim > 0)


def _is_shapes(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(name, str) and isinstance(shape, Iterable) and all(map(_is_integer, shape))
        for name, shape in value.items()
    )


def _is_function(value: Any) -> bool:
    return callable(value) and not isinstance(value, type)


def _is_names(value: Any) -> bool:
    names = isinstance(value, Iterable) and isinstance(value, (Sequence, Set, Mapping))
    return names and not isinstance(value, (str, bytes)) and all(isinstance(v, str) for v in value)


def _called(name: str) -> Callable[[Any], bool]:
    """Whether a value is of a class, which this leaf cannot import."""
    return lambda value: any(base.__name__ == name for base in type(value).__mro__)


_OPERATOR = "an operator, as FIM returns it"
_VECTOR = "a tensor"
# what a word of an annotation means; an annotation with another word is not looked at here
_KINDS: dict[str, _Kind] = {
    "None": _Kind("None", lambda v: v is None, "None"),
    "int": _Kind("an integer", _is_integer, "1"),
    "float": _Kind("a number", _is_number, "0.1"),
    "bool": _Kind("True or False", lambda v: isinstance(v, bool), "True"),
    "str": _Kind("a string", lambda v: isinstance(v, str), "'...'"),
    "Tensor": _Kind(_VECTOR, lambda v: isinstance(v, Tensor), "torch.as_tensor(...)"),
    "nn.Module": _Kind("a torch.nn.Module", lambda v: isinstance(v, nn.Module), "model"),
    "torch.dtype": _Kind("a torch.dtype", lambda v: isinstance(v, torch.dtype), "torch.float64"),
    "VectorLike": _Kind(
        "a tensor or a dict of tensors by parameter name",
        lambda v: isinstance(v, Tensor) or _is_vectors(v),
        "torch.as_tensor(...)",
    ),
    "DampingLike": _Kind("a number, a tensor, or a dict of these by selector", _is_damping, "1e-3"),
    "BaseLinearOperator": _Kind(_OPERATOR, _called("BaseLinearOperator"), "FIM(...)"),
    "ParamSpace": _Kind("a ParamSpace", _called("ParamSpace"), "F.space"),
    "Probes": _Kind("a Probes object", _called("Probes"), "Probes(30)"),
    "HessianFree": _Kind("a HessianFree object", _called("HessianFree"), "HessianFree()"),
    "Function": _Kind("a function", _is_function, "torch.exp"),
    "Callable": _Kind("a function", _is_function, "lambda ...: ..."),
    "Mapping[str, Tensor]": _Kind(
        "a dict of tensors by parameter name", _is_vectors, "F.space.unravel(...)"
    ),
    "Mapping": _Kind("a dict", lambda v: isinstance(v, Mapping), "{...}"),
    "Sequence": _Kind("a list", _is_sequence, "[...]"),
    "Sequence[float]": _Kind(
        "a list of numbers", lambda v: _is_numbers(v) and all(map(_is_number, v)), "[1.0, 1.0]"
    ),
    "Sequence[Any]": _Kind("a list of numbers", _is_numbers, "[1.0, 1.0]"),
    "Mapping[str, Sequence[int]]": _Kind("a dict of shapes", _is_shapes, "{'weight': (2, 3)}"),
    "tuple[float, float]": _Kind(
        "two numbers",
        lambda v: isinstance(v, tuple) and len(v) == 2 and all(map(_is_number, v)),
        "(1e-6, 1e6)",
    ),
    "Iterable[str]": _Kind("a list of names", _is_names, "['...']"),
    "os.PathLike[str]": _Kind("a path", lambda v: isinstance(v, os.PathLike), "'F.pt'"),
    "IO[bytes]": _Kind(
        "an open binary file", lambda v: hasattr(v, "write") and hasattr(v, "read"), "'F.pt'"
    ),
}
# the lowest value that an option of a name may have, and whether it may have it
_LOWEST: dict[str, tuple[float, bool]] = {
    **dict.fromkeys(("samples", "max_directions", "n", "num_samples"), (1, True)),
    **dict.fromkeys(("max_steps", "subspace", "block_size", "probes_at_once"), (1, True)),
    **dict.fromkeys(("max_iter", "rcond", "limit"), (0, True)),
}


# options whose numbers the functions check themselves, with what else must hold
_OWN = frozenset({"probes", "steps", "max_matvecs", "tol"})


class _Parameter(NamedTuple):
    """A parameter: its place, its kinds, and what else is known."""

    place: int
    name: str
    kinds: tuple[_Kind, ...]
    default: Any
    order: str


def _parts(annotation: str) -> list[str]:
    """The parts of a union, outside of brackets."""
    found, depth, last = [""], 0, annotation.strip("'\"")
    for letter in last:
        depth += (letter == "[") - (letter == "]")
        if letter == "|" and depth == 0:
            found.append("")
        else:
            found[-1] += letter
    return [part.strip() for part in found]


def _kinds(annotation: Any) -> tuple[_Kind, ...]:
    """What an annotation allows; () if it has a part that is not known here."""
    if not isinstance(annotation, str):
        return ()
    found = [_KINDS.get(part, _KINDS.get(part.split("[")[0])) for part in _parts(annotation)]
    return tuple(kind for kind in found if kind is not None) if all(found) else ()


def _parameters(function: Callable[..., Any]) -> tuple[_Parameter, ...]:
    given = list(inspect.signature(function).parameters.values())
    ahead = [p.name for p in given if p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "self"]
    ahead = [name for name in ahead if name != "cls"]
    return tuple(
        _Parameter(
            index if p.kind is p.POSITIONAL_OR_KEYWORD else -1,
            p.name,
            kinds,
            p.default,
            f"({', '.join(ahead)})" if p.name in ahead and len(ahead) > 1 else "",
        )
        for index, p in enumerate(given)
        if (kinds := _kinds(p.annotation))
    )


def checked(function: Function) -> Function:
    """The function, which raises DataError if an argument does not fit its annotation.

    Example:
        >>> @checked
        ... def repeat(text: "str", n: "int" = 1) -> "str":
        ...     return n * text
        >>> repeat("a", n=2)
        'aa'
        >>> repeat(2, "a")
        Traceback (most recent call last):
        nngeo_lazy.errors.DataError: expected text to be a string, got 2: the order is (text, n)
    """
    parameters, require = _parameters(function), _require

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        for parameter in parameters:
            index, name = parameter[:2]
            if 0 <= index < len(args):
                require(parameter, args[index])
            elif name in kwargs:
                require(parameter, kwargs[name])
        return function(*args, **kwargs)

    # of the function's own module, where those who look for doctests look for it
    made = types.FunctionType(
        wrapper.__code__, function.__globals__, function.__name__, None, wrapper.__closure__
    )
    return functools.update_wrapper(made, function)  # type: ignore[return-value]


def check_fields(instance: Any) -> None:
    """Raise DataError if a field of a dataclass does not fit its annotation."""
    for parameter in _fields(instance.__class__):
        value = getattr(instance, parameter.name)
        if not (isinstance(value, float) and math.isnan(value)):  # the ranges of its own refuse it
            _require(parameter, value)


@functools.cache
def _fields(kind: Any) -> tuple[_Parameter, ...]:
    return _parameters(kind)


def _require(parameter: _Parameter, value: Any) -> None:
    name, kinds = parameter.name, parameter.kinds
    if value is parameter.default or (name == "damping" and _is_damping(value)):
        return
    if isinstance(value, numbers.Real) and name in _OWN:
        return
    if isinstance(value, str) and name in _OWN - {"tol"}:
        return
    if not any(kind.test(value) for kind in kinds):
        words = " or ".join(kind.words for kind in kinds)
        remedy = f"pass {name}={kinds[0].example}"
        if type(value).__module__ == "numpy" and any(kind.words == _VECTOR for kind in kinds):
            remedy = f"pass {name}=torch.as_tensor(...)"
        elif parameter.order:
            remedy = f"the order is {parameter.order}"
        subject = (
            f"the model, {words}" if words == _KINDS["nn.Module"].words else f"{name} to be {words}"
        )
        if subject.startswith("the model") and isinstance(value, types.GeneratorType):
            remedy += "; pass the model itself, and select parameters with params="
        raise DataError(f"expected {subject}, got {described(value)}: {remedy}")
    low = _LOWEST.get(name)
    if low is not None and isinstance(value, numbers.Real) and value < low[0]:
        raise DataError(f"expected {name} >= {low[0]}, got {value!r}: pass {name}={max(low[0], 1)}")


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


def described(value: Any) -> str:
    """A value in a message: itself if it is short, else what it is."""
    if isinstance(value, Tensor):
        return f"Tensor of shape {tuple(value.shape)}"
    if isinstance(value, (numbers.Number, str)) and len(repr(value)) < 40:
        return repr(value)
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return type(value).__name__
