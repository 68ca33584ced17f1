"""What a pass counts besides its statistics, and what it finds wrong."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import DataError, NonFiniteError
from .likelihoods.likelihood import NonFinite
from .precision import widest
from .quantities import Quantity

__all__ = ["Counts", "Totals"]


class Counts(NamedTuple):
    """The numbers of a pass that add up over processes; no log-likelihood is NaN."""

    examples: int
    terms: int
    denominator: float
    log_likelihood: float


class Totals:
    """Counts and complaints of a pass, kept on the device and read once at its end."""

    def __init__(self, quantity: Quantity, device: torch.device) -> None:
        self.quantity = quantity
        self._examples = 0
        self._terms = torch.zeros((), dtype=torch.int64, device=device)
        self._denominator = torch.zeros((), dtype=widest(device), device=device)
        self._flags: dict[str, Tensor] = {}
        self._log_likelihood: Tensor | None = torch.zeros_like(self._denominator)

    def add(self, outputs: Tensor, target: Tensor | None) -> None:
        """Check a batch and count it."""
        self.check(outputs, target)
        self._examples += outputs.shape[0]
        self._terms += self.quantity.num_terms(outputs, target)
        self._denominator += self.quantity.denominator(outputs, target)
        if self._log_likelihood is not None:
            added = self.quantity.log_likelihood(outputs, target)
            self._log_likelihood = None if added is None else self._log_likelihood + added

    def check(self, outputs: Tensor, target: Tensor | None) -> None:
        """Look for what is wrong with a batch."""
        for message, wrong in self.quantity.flags(outputs, target).items():
            before = self._flags.get(message)
            self._flags[message] = wrong if before is None else before | wrong

    def require_sound(self) -> None:
        """Raise NonFiniteError or DataError if something was wrong on some batch."""
        if not self._flags:
            return
        wrong = torch.stack([flag.reshape(()) for flag in self._flags.values()]).tolist()
        messages = [message for message, bad in zip(self._flags, wrong, strict=True) if bad]
        if messages:
            finite = any(isinstance(message, NonFinite) for message in messages)
            raise (NonFiniteError if finite else DataError)("; ".join(messages))

    def counts(self) -> Counts:
        """What was counted, read from the device."""
        likelihood = math.nan if self._log_likelihood is None else float(self._log_likelihood)
        return Counts(self._examples, int(self._terms), float(self._denominator), likelihood)

    def finish(self, counts: Counts) -> dict[str, Any]:
        """The fields of `Facts` that a pass finds.

        Raises:
            DataError: there is nothing to divide by.
        """
        likelihood = counts.log_likelihood
        return {
            "num_examples": counts.examples,
            "num_terms": counts.terms,
            "denominator": self.quantity.total(counts.denominator),
            "log_likelihood": likelihood if math.isfinite(likelihood) else None,
        }
