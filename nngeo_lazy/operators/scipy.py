"""A view of an operator for scipy's Krylov methods."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse.linalg
import torch
from torch import Tensor

from ..arguments import described
from ..errors import DataError
from ..precision import HALF

if TYPE_CHECKING:
    from .base import BaseLinearOperator

__all__ = ["ScipyOperator"]


class ScipyOperator(scipy.sparse.linalg.LinearOperator):
    """A symmetric operator as scipy sees it: numpy arrays in and out, no gradient.

    Args:
        operator: the operator; it keeps its own dtype and device.
        dtype: the numpy dtype of vectors and results; by default the operator's (half: float32).
    """

    def __init__(self, operator: BaseLinearOperator, dtype: Any = None) -> None:
        self.operator = operator
        native = np.float64 if operator.dtype == torch.float64 else np.float32
        try:
            seen = np.dtype(native if dtype is None else dtype)
        except (TypeError, ValueError) as error:
            seen = None
            reason: Exception | None = error
        else:
            reason = None
        if seen is None or seen.kind != "f":
            raise DataError(
                f"expected a floating-point numpy dtype, got {described(dtype)}: pass "
                "dtype=numpy.float64"
            ) from reason
        super().__init__(seen, tuple(operator.shape))

    def _product(self, x: np.ndarray[Any, Any], transposed: bool) -> np.ndarray[Any, Any]:
        work = np.array(x, dtype=self.dtype, order="C")  # torch shares no memory with scipy
        v: Tensor = torch.from_numpy(work).to(self.operator.device, self.operator.dtype)
        with torch.no_grad():
            y = self.operator._t_matmul(v) if transposed else self.operator._matmul(v)
        if y.dtype in HALF:
            y = y.float()
        return np.asarray(y.cpu().numpy(), dtype=self.dtype)

    def _matvec(self, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return self._product(x.reshape(-1), False)

    def _matmat(self, X: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return self._product(X, False)

    def _rmatvec(self, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return self._product(x.reshape(-1), True)

    def _rmatmat(self, X: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return self._product(X, True)
