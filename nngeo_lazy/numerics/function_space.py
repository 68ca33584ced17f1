"""What kernels say of a network's functions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..arguments import checked, require_options
from ..errors import SpaceMismatchError, UnsupportedLayerError
from ..linalg import Result
from ..operators.base import BaseLinearOperator
from ..operators.convert import aslinearoperator
from ..operators.factored import FactoredGaussNewtonLinearOperator
from ..operators.kernel import KernelLinearOperator, kernel_of
from .spectra import eigsh, require_symmetric_operator

__all__ = ["Eigenfunctions", "alignment", "eigenfunctions", "sample_space"]


@checked
def alignment(K: Any, y: Tensor, *, center: bool = False) -> Tensor:
    r"""The cosine between a kernel and the kernel Y Y^T of the labels, from -1 to 1.

    .. math:: \frac{\langle K, Y Y^T \rangle_F}{\|K\|_F \, \|Y Y^T\|_F}

    Args:
        K: a symmetric kernel (N x N), or a full one (N C x N C): any operator or tensor.
        y: labels (N,) or (N, k); whole numbers are classes, and Y their indicators. For a full
            kernel, Y (N, C) is one vector.
        center: whether to center K and Y over the examples first. Otherwise a large constant in the
            kernel hides the rest.

    Returns:
        A 0-d tensor, without unit.

    Raises:
        SpaceMismatchError: y has another number of examples than K.
        ValueError: K is not symmetric.

    Example:
        >>> y = torch.tensor([1.0, -1.0])
        >>> alignment(torch.outer(y, y), y)
        tensor(1.)

    Source: Cristianini et al. (2001), On kernel-target alignment; Cortes, Mohri and Rostamizadeh
        (2012), eq. 2, centered.
    """
    operator = require_symmetric_operator(K, "alignment", look=True)
    Y = _indicators(operator, y)
    n, outputs = operator.shape[0], operator.shape[0] // len(Y)
    if n % len(Y) or outputs not in (1, Y.shape[1]):
        raise SpaceMismatchError(
            f"expected labels of {n} examples, or of the examples of a kernel with {n} rows, got "
            f"{tuple(y.shape)}"
        )
    if center:
        Y = Y - Y.mean(0)
        if isinstance(operator, KernelLinearOperator):
            operator = operator.center()
        else:
            dense = operator._dense().unflatten(0, (-1, outputs)).unflatten(2, (-1, outputs))
            dense = dense - dense.mean(0, keepdim=True)
            dense = (dense - dense.mean(2, keepdim=True)).flatten(2).flatten(0, 1)
            operator = aslinearoperator(dense)
    if outputs > 1:
        Y = Y.reshape(n, 1)
    inner = (Y * operator._apply(Y)).sum()
    found: Tensor = inner / (operator._norm("fro") * torch.linalg.matrix_norm(Y.mT @ Y))
    return found


@dataclass(frozen=True, eq=False, repr=False)
class Eigenfunctions(Result, tuple[Tensor, Tensor], items=2):
    """The leading eigenfunctions of a kernel, known from N inputs: `(eigenvalues, values)`.

    Attributes:
        eigenvalues: those of the kernel's integral operator (k,), falling. They are those of the
            matrix K divided by N.
        values: the functions at the inputs (N, k). The mean of the squares of each is 1.

    Example:
        >>> x = torch.tensor([[1.0], [-1.0]])
        >>> values, functions = eigenfunctions(x @ x.mT, 1)
        >>> values, functions.shape
        (tensor([1.]), torch.Size([2, 1]))

    Source: Williams and Seeger (2001), Using the Nystrom method to speed up kernel machines.
    """

    eigenvalues: Tensor
    values: Tensor

    def __call__(self, cross: Any) -> Tensor:
        """The eigenfunctions at other inputs.

        Args:
            cross: the kernel (M x N) between the other inputs and the N known ones, such as
                `ng.NTK(model, other, known)`.

        Returns:
            Their values (M, k).

        Raises:
            SpaceMismatchError: the kernel does not have N columns.
        """
        operator = aslinearoperator(cross)
        n = len(self.values)
        if operator.shape[-1] != n:
            raise SpaceMismatchError(
                f"expected a kernel (M x {n}) of other inputs with the {n} known ones, got "
                f"{tuple(operator.shape)}"
            )
        return operator._apply(self.values) / (n * self.eigenvalues)


@checked
def eigenfunctions(K: Any, k: int, **options: Any) -> Eigenfunctions:
    r"""The k leading eigenfunctions of a positive semidefinite kernel, at any inputs.

    .. math:: \psi_i(x) = \frac{\sqrt N}{\lambda_i} \sum_n K(x, x_n)\, u_{ni}, \qquad
        K u_i = \lambda_i u_i

    Args:
        K: the kernel (N x N): any operator or tensor.
        k: how many, at most the rank of K.
        **options: keywords of `eigsh`.

    Returns:
        The tuple (eigenvalues, values), which is also a function of other inputs.

    Raises:
        ValueError: K has fewer than k positive eigenvalues, or is not symmetric.

    Example:
        >>> x = torch.tensor([[1.0], [-1.0], [2.0]])
        >>> found = eigenfunctions(x @ x.mT, 1)
        >>> ratio = found(torch.tensor([[4.0]]) @ x.mT) / found.values[0]
        >>> round(float(ratio), 3)
        4.0

    Source: Williams and Seeger (2001), Using the Nystrom method to speed up kernel machines.
    """
    require_options(options, eigsh)
    found = eigsh(K, k, "LA", **options)
    values = found.eigenvalues.flip(0)
    vectors = found.eigenvectors.flip(1)
    n = len(vectors)
    floor = n * torch.finfo(values.dtype).eps * values.abs().max()
    if not bool((values > floor).all()):
        raise ValueError(
            f"expected a kernel with {k} positive eigenvalues, got one with "
            f"{int((values > floor).sum())}: ask for fewer"
        )
    return Eigenfunctions(values / n, n**0.5 * vectors)


@checked
def sample_space(F: BaseLinearOperator) -> BaseLinearOperator:
    r"""The matrix B B^T of a Fisher or Gauss-Newton matrix B^T B, over examples and directions.

    Both have the same eigenvalues except zeros. B B^T is the smaller one if examples are few.

    Args:
        F: built with the representation "factored", and not damped.

    Returns:
        A kernel (N R x N R) with the scale of F, the mean over N examples; rows are ordered
        (example, direction), example slowest.

    Raises:
        UnsupportedLayerError: F has another representation, or is damped.

    Example:
        >>> import nngeo_lazy as ng
        >>> F = ng.FIM(torch.nn.Linear(3, 2), torch.randn(5, 3), "factored", likelihood="gaussian")
        >>> sample_space(F).shape
        torch.Size([10, 10])

    Source: Dangel et al. (2022), ViViT, section 3.
    """
    if not isinstance(F, FactoredGaussNewtonLinearOperator) or F.shift is not None:
        raise UnsupportedLayerError(
            f"sample_space needs a matrix B^T B with a known B, got {type(F).__name__}: build it "
            "with the representation 'factored', without damping"
        )
    return kernel_of(F.root, F.root)


def _indicators(operator: BaseLinearOperator, y: Tensor) -> Tensor:
    """Labels (N, k) in the kernel's dtype; classes as indicators."""
    classes = y.dim() == 1 and not y.is_floating_point()
    if (
        y.dim() not in (1, 2)
        or y.shape[0] == 0
        or y.is_complex()
        or (classes and bool((y < 0).any()))
    ):
        raise SpaceMismatchError(
            f"expected labels (N,) or (N, k), whole numbers from 0 on as classes, got {y.dtype} of "
            f"shape {tuple(y.shape)}: pass one row for each example"
        )
    if classes:
        y = torch.nn.functional.one_hot(y.long())
    return (y if y.dim() == 2 else y.unsqueeze(1)).to(operator.device, operator.dtype)
