"""Results that are tuples, as scipy's are, with named attributes beside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import scipy.stats
import torch
from torch import Tensor

from ..html import page, table

__all__ = ["Estimate", "Result"]

_SHOWN = 6  # a vector that is longer prints its shape


class Result:
    """What makes a frozen dataclass a tuple of its first fields; the other fields are beside it.

    A subclass is `@dataclass(frozen=True, eq=False, repr=False)`, derives from `Result` and from
    `tuple[...]` with the types of those first fields, and names their number: `items=2`. A slice is
    a plain tuple. Two results are equal if they are equal as tuples, with `torch.equal` for
    tensors; so a result equals a plain tuple of the same tensors, and it has no hash.

    Args:
        *args: the fields, in order, or by name.

    Example:
        >>> from nngeo_lazy import Estimate
        >>> isinstance(Estimate(3.0, 0.1, 30), Result)
        True
        >>> value, error, _ = Estimate(3.0, 0.1, 30)
        >>> value, error
        (3.0, 0.1)
    """

    __match_args__: ClassVar[tuple[str, ...]]  # the names of the fields, which dataclass sets
    _items: ClassVar[int]

    def __init_subclass__(cls, items: int, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls._items = items

    def __new__(cls, *args: Any, **named: Any) -> Any:
        """The tuple. `__init__` sets the attributes, and names a field that is missing."""
        rest = [named[name] for name in cls.__match_args__[len(args) : cls._items] if name in named]
        return tuple.__new__(cls, (*args[: cls._items], *rest))  # type: ignore[type-var]

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return type(self), tuple(getattr(self, name) for name in self.__match_args__)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, tuple) and _same(self, other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        raise TypeError(f"unhashable type {type(self).__name__!r}: its tensors compare by value")

    def __repr__(self) -> str:
        names = [each.name for each in fields(self) if each.repr]  # type: ignore[arg-type]
        shown = (f"{name}={_brief(getattr(self, name))}" for name in names)
        return f"{type(self).__name__}({', '.join(shown)})"

    def _repr_html_(self) -> str:
        """In a notebook: one row for each attribute."""
        names = [each.name for each in fields(self) if each.repr]  # type: ignore[arg-type]
        rows = [(name, _brief(getattr(self, name))) for name in names]
        return page(type(self).__name__, table(("", ""), rows))


@dataclass(frozen=True, eq=False, repr=False)
class Estimate(Result, tuple[Tensor, Tensor, int], items=3):
    """A number, or one for each entry, and how sure it is.

    It is the tuple `(value, standard_error, matvecs)`, with the other attributes beside.
    `float(estimate)` is its value.

    Attributes:
        value: the estimate: a 0-d tensor, or (P,) for a diagonal.
        standard_error: of the value, in its shape and units; 0 if the value is exact.
        matvecs: how many products were made.
        probes: how many random vectors the value is a mean over; 0 if it is exact.
        bias: how far off the mean itself may be, in the units of the value. It is the error of the
            quadrature in a function of a matrix; more probes do not reduce it.
        interrupted: whether the user stopped it.

    Example:
        >>> found = Estimate(torch.tensor(7.0), torch.tensor(0.5), matvecs=20, probes=10)
        >>> value, error, matvecs = found
        >>> float(found), float(error), matvecs
        (7.0, 0.5, 20)
        >>> found
        Estimate(value=7, standard_error=0.5, matvecs=20, probes=10, bias=0, interrupted=False)
    """

    value: Tensor
    standard_error: Tensor
    matvecs: int
    probes: int = 0
    bias: float = 0.0
    interrupted: bool = False

    def interval(self, confidence: float = 0.9973) -> tuple[Tensor, Tensor]:
        """The lower and upper end of a confidence interval of the value, by Student's t.

        Args:
            confidence: between 0 and 1; the default is that of three sigma of a normal number.

        Returns:
            Two tensors in the shape of the value. The bias is not in them.

        Raises:
            ValueError: the confidence is not between 0 and 1.

        Example:
            >>> Estimate(torch.tensor(7.0), torch.tensor(0.5), 20, probes=10).interval(0.95)
            (tensor(5.8689), tensor(8.1311))

        Source: Student (1908), The probable error of a mean.
        """
        if not 0 < confidence < 1:
            raise ValueError(f"expected a confidence between 0 and 1, got {confidence}")
        if self.probes == 0:
            return self.value, self.value
        t = float(scipy.stats.t.ppf((1 + confidence) / 2, self.probes - 1))
        half = t * self.standard_error
        return self.value - half, self.value + half

    def __float__(self) -> float:
        if self.value.numel() != 1:
            raise ValueError(
                f"expected an estimate of one number, got one of shape {tuple(self.value.shape)}: "
                "take its .value"
            )
        return float(self.value)


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        alike = a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
        return alike and torch.equal(a, b)
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return False
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(a[name], b[name]) for name in a)
    return bool(a == b)


def _brief(value: Any) -> str:
    """Numbers with four digits; long tensors by their shape."""
    if isinstance(value, Tensor):
        if value.dim() == 0:
            return f"{value.item():.4g}"
        if value.dim() == 1 and len(value) <= _SHOWN:
            return f"[{', '.join(f'{x:.4g}' for x in value.tolist())}]"
        return f"Tensor{tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{name}: {_brief(v)}' for name, v in value.items())}}}"
    return f"{value:.4g}" if isinstance(value, float) else repr(value)
