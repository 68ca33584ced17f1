"""What the spectral functions and `solve` return: tuples with named attributes beside."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..errors import SpaceMismatchError
from ..linalg import Result
from ..space import ParamSpace

__all__ = ["SingularValues", "Solution", "Spectrum"]


@dataclass(frozen=True, eq=False, repr=False)
class Spectrum(Result, tuple[Tensor, Tensor], items=2):
    """Eigenpairs: the tuple `(eigenvalues, eigenvectors)`, with the other attributes beside.

    Attributes:
        eigenvalues: (k,), ascending.
        eigenvectors: (P, k), orthonormal columns.
        residuals: |A v - value v| of each pair (k,), in the units of the eigenvalues. They come
            from the products of the iteration; if these are not symmetric to within the
            tolerance, from further products.
        matvecs: how many products were made; 0 for a closed form.
        converged: whether all residuals are within the tolerance.
        space: the parameters of the eigenvectors, or None.

    Example:
        >>> import torch, nngeo_lazy as ng
        >>> found = ng.eigsh(torch.diag(torch.tensor([1.0, 2.0, 3.0])), 2)
        >>> values, vectors = found
        >>> values, found[1].shape, found.matvecs
        (tensor([2., 3.]), torch.Size([3, 2]), 0)
    """

    eigenvalues: Tensor
    eigenvectors: Tensor
    residuals: Tensor
    matvecs: int
    converged: bool
    space: ParamSpace | None = field(default=None, repr=False)

    def by_name(self) -> dict[str, Tensor]:
        """The eigenvectors as {name: (k, *shape)}.

        Raises:
            SpaceMismatchError: the operator has no parameter space.

        Example:
            >>> import torch, nngeo_lazy as ng
            >>> F = ng.FIM(torch.nn.Linear(3, 2), torch.randn(5, 3), likelihood="gaussian")
            >>> {name: tuple(v.shape) for name, v in ng.eigsh(F, 4).by_name().items()}
            {'weight': (4, 2, 3), 'bias': (4, 2)}
        """
        return _by_name(self.space, self.eigenvectors.mT)


@dataclass(frozen=True, eq=False, repr=False)
class SingularValues(Result, tuple[Tensor, Tensor, Tensor], items=3):
    """Singular triplets: the tuple `(U, S, Vh)`, with the other attributes beside.

    Attributes:
        U: left vectors as columns (m, k).
        S: singular values (k,), ascending, as of `scipy.sparse.linalg.svds`.
        Vh: right vectors as rows (k, n).
        residuals: (|A v - s u|^2 + |A^T u - s v|^2)^(1/2) of each triplet (k,), in the units of
            the singular values, from further products.
        matvecs: how many products with A and A^T were made; 0 for a closed form.
        converged: whether all residuals are within the tolerance.
        space: the parameters of the right vectors, or None.

    Example:
        >>> import torch, nngeo_lazy as ng
        >>> U, S, Vh = ng.svds(torch.tensor([[3.0, 0.0, 0.0], [0.0, -4.0, 0.0]]), 1)
        >>> U.shape, S, Vh.shape
        (torch.Size([2, 1]), tensor([4.]), torch.Size([1, 3]))
    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    residuals: Tensor
    matvecs: int
    converged: bool
    space: ParamSpace | None = field(default=None, repr=False)

    def by_name(self) -> dict[str, Tensor]:
        """The right vectors as {name: (k, *shape)}.

        Raises:
            SpaceMismatchError: the operator has no parameter space.

        Example:
            >>> import torch, nngeo_lazy as ng
            >>> J = ng.Jacobian(torch.nn.Linear(3, 2), torch.randn(5, 3), "dense")
            >>> {name: tuple(v.shape) for name, v in ng.svds(J, 4).by_name().items()}
            {'weight': (4, 2, 3), 'bias': (4, 2)}
        """
        return _by_name(self.space, self.Vh)


@dataclass(frozen=True, eq=False, repr=False)
class Solution(Result, tuple[Any, Tensor, int, bool], items=4):
    """A solution: the tuple `(x, residual, iterations, converged)`, with its method beside.

    Attributes:
        x: the solution, of the same form as b.
        residual: |b - (A + damping) x| / |b| of each column (k,), computed from x; for "lsmr" that
            of the normal equations.
        iterations: how many iterations were done; 0 for a closed form.
        converged: whether every column has reached the tolerance.
        method: the method that found it.

    Example:
        >>> import torch, nngeo_lazy as ng
        >>> x, residual, iterations, converged = ng.solve(2 * torch.eye(2), torch.ones(2))
        >>> x, iterations, converged
        (tensor([0.5000, 0.5000]), 0, True)
    """

    x: Any
    residual: Tensor
    iterations: int
    converged: bool
    method: str


def _by_name(space: ParamSpace | None, rows: Tensor) -> dict[str, Tensor]:
    if space is None:
        raise SpaceMismatchError(
            "expected an operator with a parameter space, and this one has none: take the vectors"
        )
    return space.unravel(rows)
