"""Named errors and warnings. A message says what was expected, what came, and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

__all__ = [
    "ConvergenceWarning",
    "DataError",
    "DistributedError",
    "EstimateWarning",
    "LikelihoodWarning",
    "MissingFileError",
    "NNGeoError",
    "NonFiniteError",
    "NonFiniteWarning",
    "NotPositiveDefiniteError",
    "RuleError",
    "SelfCheckWarning",
    "SpaceMismatchError",
    "StochasticModelError",
    "TooLargeError",
    "UnsupportedLayerError",
]


class NNGeoError(Exception):
    """Base class of every error that this package raises on purpose."""


class SpaceMismatchError(NNGeoError, ValueError):
    """A vector, name or selector does not fit the parameter space."""


class UnsupportedLayerError(NNGeoError, NotImplementedError):
    """A layer or an operation that has no exact form here."""


class NotPositiveDefiniteError(NNGeoError, ArithmeticError):
    """A matrix is singular or indefinite, and must be positive definite."""


class NonFiniteError(NNGeoError, ArithmeticError):
    """NaN or infinity, and a finite number is needed."""


class StochasticModelError(NNGeoError, RuntimeError):
    """The model is not one fixed function of one example at a time."""


class DataError(NNGeoError, ValueError):
    """The loader, its batches, the targets or an option do not fit."""


class DistributedError(NNGeoError, RuntimeError):
    """Another process of the group raised, died, or makes another call.

    Attributes:
        kind: the name of the error's class there; empty if the process raised none.
    """

    def __init__(self, message: str, kind: str = "") -> None:
        super().__init__(message)
        self.kind = kind


class MissingFileError(DataError, FileNotFoundError):
    """There is no file at a path."""


class RuleError(NNGeoError, TypeError):
    """No rule, or no single best rule, says how some classes of operators combine."""


class TooLargeError(NNGeoError, MemoryError):
    """The computation asked for is larger than its stated limit."""


class ConvergenceWarning(UserWarning):
    """An iterative method stopped before its tolerance.

    Attributes:
        residual: the largest relative residual over the columns.
        iterations: how many iterations were done.
    """

    def __init__(self, message: str, residual: float, iterations: int) -> None:
        super().__init__(message)
        self.residual = residual
        self.iterations = iterations


class EstimateWarning(UserWarning):
    """A number is an estimate and not the exact one asked for, or a worse estimate than asked for.

    Attributes:
        estimate: the `Estimate`, with its standard error.
    """

    def __init__(self, message: str, estimate: Any) -> None:
        super().__init__(message)
        self.estimate = estimate


class LikelihoodWarning(UserWarning):
    """The gradient of a training loss is not that of the likelihood that was given or assumed."""


class SelfCheckWarning(UserWarning):
    """The forms of a later training batch differ from autograd's gradients: taken for rounding.

    The batch calls the layers whose forms passed the self-check on batches before.
    """


class NonFiniteWarning(UserWarning):
    """NaN or infinity was met in training, and what it touched was left out.

    Attributes:
        steps: how many steps were left out since the last warning.
    """

    def __init__(self, message: str, steps: int) -> None:
        super().__init__(message)
        self.steps = steps


def wrong_option(option: str, value: object, known: Iterable[object], page: str) -> str:
    """What the error of an unknown option says: the options, and the page that explains them.

    Args:
        option: its name.
        value: what was given.
        known: what may be given.
        page: of the documentation, without its ending.

    Example:
        >>> wrong_option("method", "lu", ["cg", "minres"], "matrix_free")
        "expected method to be one of ['cg', 'minres'], got 'lu'; docs/matrix_free.md explains them"
    """
    options = f"expected {option} to be one of {list(known)}, got {value!r}"
    return f"{options}; docs/{page}.md explains them"
