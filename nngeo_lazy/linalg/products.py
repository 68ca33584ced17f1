"""Products with a matrix, counted, checked and shown."""

from __future__ import annotations

from torch import Tensor

from ..bars import bar
from ..errors import NonFiniteError
from .krylov import Matvec, norms

__all__ = ["Products"]


class Products:
    """A matvec that counts its columns, refuses NaN, and moves a progress bar.

    Args:
        matvec: v (n, k) to A v.
        method: the method that uses it, for messages.
        progress: whether to show a progress bar.

    Attributes:
        count: how many columns have been multiplied.
        interrupted: whether the user has stopped the method, which then returns what it has.
    """

    def __init__(self, matvec: Matvec, method: str, *, progress: bool = False) -> None:
        self._matvec, self._method = matvec, method
        self.count, self.interrupted = 0, False
        self._bar = bar(progress, desc=method, unit=" products", leave=False)

    def __call__(self, v: Tensor) -> Tensor:
        """A v (n, k).

        Raises:
            NonFiniteError: NaN or infinity in it.
        """
        return self.through(self._matvec, v)

    def through(self, matvec: Matvec, v: Tensor) -> Tensor:
        """A product with another matrix, such as the transpose. It counts as one with A.

        Args:
            matvec: v (n, k) to B v.
            v: the vectors (n, k).

        Raises:
            NonFiniteError: NaN or infinity in the product.
        """
        product = matvec(v)
        self.count += v.shape[1]
        if not bool(norms(product).isfinite().all()):
            raise NonFiniteError(
                f"{self._method}: NaN or infinity in product {self.count}: look for NaN in the "
                "parameters, the data and the matrix"
            )
        self._bar.update(v.shape[1])
        return product

    def __enter__(self) -> Products:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
