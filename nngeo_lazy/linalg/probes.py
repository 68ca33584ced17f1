"""The options of an estimate from random vectors."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields
from numbers import Integral
from typing import Any

import torch

from ..arguments import check_fields
from ..errors import DataError
from .krylov import seeded

__all__ = ["Probes"]


@dataclass(frozen=True)
class Probes:
    """How an estimate from random vectors is made.

    `trace`, `diagonal`, `logdet`, `effective_dimension` and `spectral_density` take its fields as
    keywords, or the object as `probes=`: `trace(A, probes=30, seed=0)` is
    `trace(A, probes=Probes(30, seed=0))`.

    Args:
        probes: how many random vectors, at least 2 for a standard error. The default is 30 for a
            trace or a diagonal, and 10 for functions of a matrix and for densities.
        steps: at most so many Lanczos steps, each of one product, for each random vector. The
            default is 100, for densities 90. Plain traces and diagonals do not read it.
        tol: relative standard error to reach, |standard error| / |value| in the 2-norm, by doubling
            the probes. By default the given probes are all.
        max_matvecs: at most so many products, if `tol` is given.
        seed: of the random vectors; by default they come from torch's global generator.
        progress: whether to show a progress bar.

    Raises:
        DataError: a number is out of range.

    Example:
        >>> import nngeo_lazy as ng
        >>> options = ng.Probes(20, tol=0.01, seed=0)
        >>> float(ng.trace(torch.eye(3), probes=options))
        3.0
    """

    probes: int | None = None
    steps: int | None = None
    tol: float | None = None
    max_matvecs: int = 10_000
    seed: int | None = None
    progress: bool = False

    def __post_init__(self) -> None:
        for name in ("probes", "steps", "max_matvecs"):
            value = getattr(self, name)
            if value is None and name != "max_matvecs":
                continue
            if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
                raise DataError(f"expected {name}= to be a whole number from 1 on, got {value!r}")
        check_fields(self)
        if self.tol is not None and not self.tol > 0:
            raise DataError(
                f"expected tol= to be a relative error above 0, got {self.tol!r}: an exact value "
                "comes from method='exact'"
            )

    @classmethod
    def of(
        cls, caller: str, probes: int | Probes | None, without: Collection[str] = (), **given: Any
    ) -> Probes:
        """The options of a public call: an object as `probes`, or keywords. None is not given.

        Args:
            caller: the name of the public function, for messages.
            probes: their number, or the object.
            without: the fields that this function does not take.
            **given: the other fields.

        Raises:
            TypeError: the function has no such keyword.
            DataError: an object and a keyword are both given, the object has a field that the
                function does not take, or a number is out of range.
        """
        known = [field.name for field in fields(cls) if field.name not in without]
        for name in given:
            if name not in known:
                raise TypeError(f"{caller} takes no {name}=: its options are {known}")
        given = {name: value for name, value in given.items() if value is not None}
        if not isinstance(probes, Probes):
            return cls(probes, **given)
        if given:
            raise DataError(
                f"{caller} takes a Probes object or keywords, got both: write {sorted(given)} into "
                "the object, with dataclasses.replace(probes, ...)"
            )
        plain = cls()
        for name in without:
            if getattr(probes, name) != getattr(plain, name):
                raise DataError(f"{caller} takes no {name}=: leave it out of the Probes object")
        return probes

    def generator(self, device: torch.device) -> torch.Generator | None:
        """A new generator with the seed; None, torch's global one, without a seed."""
        return seeded(self.seed, device)
