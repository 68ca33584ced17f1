"""The contract of linear_operator, dealt with once.

What a subclass inherits is often inaccurate (the solve stops at a tolerance of 1, eigenvalues are
clamped at 0) or forms the matrix. Everything that may be called is therefore derived here from the
primitives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from numbers import Number
from operator import mul
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from linear_operator.operators import (
    LinearOperator,
    RootLinearOperator,
    TriangularLinearOperator,
    ZeroLinearOperator,
)
from torch import Tensor

from ..arguments import PositiveInt, checked, described
from ..errors import (
    DataError,
    NotPositiveDefiniteError,
    SpaceMismatchError,
    UnsupportedLayerError,
)
from . import rules
from .info import joint
from .primitives import PrimitiveLinearOperator, roots_by_products, tensors_of, within
from .report import operator_html
from .torch_functions import TORCH_FUNCTIONS
from .vectors import columns, is_symmetric, require_left, require_tensor

if TYPE_CHECKING:
    from .base import BaseLinearOperator

__all__ = ["ContractLinearOperator", "combined"]


class ContractLinearOperator(PrimitiveLinearOperator):
    """Every member that linear_operator has or calls; final."""

    # --- products, solves, decompositions --------------------------------------------------------

    def rmatmul(self, other: Any) -> Any:
        """The product with something on the left."""
        if isinstance(other, LinearOperator):
            return combined(rules.products, rules.as_operator(other), self._this())
        transposed = self._transpose_nonbatch()
        require_tensor(transposed, other)
        if other.ndim <= 1:
            return transposed.matmul(other)
        return transposed.matmul(other.mT).mT

    def _matmul(self, rhs: Tensor) -> Tensor:
        if rhs.dim() == 1:
            return self._apply(rhs.unsqueeze(-1)).squeeze(-1)
        return self._apply(rhs)

    def _t_matmul(self, rhs: Tensor) -> Tensor:
        product: Tensor = self._transpose_nonbatch()._matmul(rhs)
        return product

    @checked
    def inv_quad(self, inv_quad_rhs: Tensor, reduce_inv_quad: bool = True) -> Tensor:
        """v^T F^-1 v, summed over the columns of v unless told otherwise."""
        return self.inv_quad_logdet(inv_quad_rhs, False, reduce_inv_quad)[0]

    @checked
    def inv_quad_logdet(
        self,
        inv_quad_rhs: Tensor | None = None,
        logdet: bool | None = False,
        reduce_inv_quad: bool | None = True,
    ) -> tuple[Tensor, Tensor]:
        """v^T F^-1 v as `inv_quad` gives it, and log det F; zero for what is not asked."""
        zero = torch.zeros(self.batch_shape, dtype=self.dtype, device=self.device)
        quadratic, determinant = zero, zero
        if inv_quad_rhs is not None:
            v, _ = columns(self._this(), inv_quad_rhs)
            quadratic = (v * (self._solve(v) if v.numel() else v)).sum(-2)
            if reduce_inv_quad or inv_quad_rhs.dim() == 1:
                quadratic = quadratic.sum(-1)
        if logdet:
            determinant = self._logdet()
        return quadratic, determinant

    @checked
    def add_jitter(self, jitter_val: float = 1e-3) -> Any:
        """F + jitter_val I."""
        return self.add_diagonal(jitter_val)

    @checked
    def zero_mean_mvn_samples(self, num_samples: PositiveInt) -> Tensor:
        """Draws (num_samples, n) from N(0, F); `sample` takes a seed."""
        return self._draw(num_samples, None).movedim(-1, 0)

    def root_decomposition(self, method: str | None = None) -> Any:
        """F as R R^T, with R = F^1/2.

        Without a closed form the root is made from products: of the whole matrix, or of some
        directions. These give R R^T to a relative 1e-8 (1e-4 in float32), which is checked.
        """
        with roots_by_products():
            return RootLinearOperator(self._power(0.5))

    def root_inv_decomposition(
        self, initial_vectors: Any = None, test_vectors: Any = None, method: str | None = None
    ) -> Any:
        """F^-1 as R R^T, with R = F^-1/2."""
        with roots_by_products():
            return RootLinearOperator(self._power(-0.5))

    @checked
    def sqrt_inv_matmul(self, rhs: Tensor, lhs: Tensor | None = None) -> Any:
        """F^-1/2 rhs; with lhs, lhs F^-1/2 rhs and the diagonal of lhs F^-1 lhs^T."""
        if lhs is not None:
            require_left(self._this(), lhs, 2)
        with roots_by_products():
            root = self._power(-0.5)
        x = root @ rhs
        if lhs is None:
            return x
        return lhs @ x, (root @ lhs.mT).square().sum(-2)

    def diagonalization(self, method: str | None = None) -> tuple[Tensor, Any]:
        """Eigenvalues (n,), in any order, and the orthogonal operator of eigenvectors."""
        return self._symeig(eigenvectors=True)

    def _symeig(
        self, eigenvectors: bool = False, return_evals_as_lazy: bool | None = False
    ) -> tuple[Tensor, Any]:
        values, basis = self._eigensystem()
        return values, rules.orthogonal(basis) if eigenvectors else None

    def _cholesky(self, upper: bool | None = False) -> Any:
        dense = self.to_dense()
        if not self.known_symmetric and not is_symmetric(dense):
            raise UnsupportedLayerError(
                "cholesky needs a symmetric matrix, and this one is not: take A.mT @ A"
            )
        factor, failed = torch.linalg.cholesky_ex(dense)
        if bool(failed.any()):
            raise NotPositiveDefiniteError(
                "no Cholesky factor: the matrix is not positive definite; add damping="
            )
        return TriangularLinearOperator(factor.mT if upper else factor, upper=bool(upper))

    # --- algebra ---------------------------------------------------------------------------------

    def __add__(self, other: Any) -> Any:
        zero = isinstance(other, ZeroLinearOperator) and other.shape == self.shape
        if zero or (isinstance(other, (int, float)) and other == 0):
            return self
        if isinstance(other, (Tensor, LinearOperator)):
            if other.dim() < 2:
                raise SpaceMismatchError(
                    f"expected a matrix of shape {tuple(self.shape)}, got a tensor of shape "
                    f"{tuple(other.shape)}: write F.add_diagonal(...) to add to the diagonal"
                )
            return combined(rules.sums, self._this(), rules.as_operator(other))
        if isinstance(other, Number):
            raise TypeError(
                f"cannot add the number {other} to a matrix: write F.add_diagonal({other}) to add "
                "it to the diagonal"
            )
        if hasattr(type(other), "__radd__") and type(other).__module__ != "numpy":
            return NotImplemented  # it may know more
        raise TypeError(
            f"expected a matrix to add, an operator or a tensor, got {described(other)}: convert "
            "it with torch.as_tensor(...)"
        )

    def __radd__(self, other: Any) -> Any:
        return self.__add__(other)

    def __neg__(self) -> BaseLinearOperator:
        return self._altered(self._scale(-1.0))

    def __sub__(self, other: Any) -> Any:
        if isinstance(other, Number):
            return self + (-other)  # type: ignore[operator]
        return self + (other * -1.0 if isinstance(other, (Tensor, LinearOperator)) else other)

    def __rsub__(self, other: Any) -> Any:
        return -self + other

    def mul(self, other: Any) -> Any:
        """A multiple, or the elementwise product with a matrix.

        Raises:
            TypeError: neither a number nor a matrix.
            SpaceMismatchError: a tensor of another shape.
        """
        if not isinstance(other, (Tensor, LinearOperator)):
            if not isinstance(other, (int, float)) or isinstance(other, bool):
                raise TypeError(
                    "expected a number or a matrix, an operator or a tensor, got "
                    f"{described(other)}: convert it with torch.as_tensor(...)"
                )
            return self._altered(self._scale(other))
        self._require_broadcast(other, "*")
        if isinstance(other, Tensor):
            if other.numel() == 1:
                return self._altered(self._scale(other.reshape(())))
            if other.shape[-2:].numel() == 1:  # a multiple for each matrix of a batch
                return in_batches(mul, self._this(), other)
            other = other.expand(*other.shape[:-2], *self.shape[-2:])
        return combined(rules.hadamard, self._this(), rules.as_operator(other))

    def div(self, other: Any) -> Any:
        """The operator divided by a number, or by a tensor elementwise.

        Raises:
            TypeError: neither a number nor a tensor.
            ValueError: the number 0.
        """
        if isinstance(other, bool) or not isinstance(other, (int, float, Tensor)):
            raise TypeError(
                f"expected a number or a tensor to divide by, got {described(other)}: for F^-1 "
                "take F.solve or F.inverse"
            )
        if not isinstance(other, Tensor) and other == 0:
            raise ValueError("expected a number other than 0 to divide by, got 0")
        return self.mul(1.0 / other)

    def _require_broadcast(self, other: Any, sign: str) -> None:
        try:
            fits = other.dim() != 1 or other.shape[0] == 1
            torch.broadcast_shapes(self.shape, other.shape)
        except RuntimeError:
            fits = False
        if not fits:
            raise SpaceMismatchError(
                f"expected matrices that fit, got {tuple(self.shape)} {sign} {tuple(other.shape)}"
            )

    # --- batches ---------------------------------------------------------------------------------

    def repeat(self, *sizes: Any) -> Any:
        """The batch repeated along its dimensions, without copies; the last two sizes are 1."""
        wanted = super().repeat(*sizes).batch_shape  # which refuses what has no meaning
        own = self.batch_shape
        if not own:
            return self._expand_batch(wanted)
        padded = (*(1,) * (len(wanted) - len(own)), *own)
        first, *rest = (m // n for m, n in zip(wanted, padded, strict=True))
        each = self._along(0) if len(padded) == len(own) else [self]
        return rules.stacks([m.repeat(*rest, 1, 1) if rest else m for m in each] * first)

    def cat_rows(self, cross_mat: Tensor, new_mat: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The matrix with more rows and columns, [[A, B^T], [B, D]], multiplied out."""
        theirs = super().cat_rows(cross_mat, new_mat, *args, **kwargs)
        lead = torch.broadcast_shapes(self.batch_shape, cross_mat.shape[:-2], new_mat.shape[:-2])
        A, B, D = (
            part.expand(*lead, *part.shape[-2:]) for part in (self.to_dense(), cross_mat, new_mat)
        )
        whole = torch.cat([torch.cat([A, B.mT], -1), torch.cat([B, D], -1)], -2)
        made = rules.as_operator(whole)
        made._memoize_cache = getattr(theirs, "_memoize_cache", {})  # roots, which GPyTorch reads
        return made

    def __getitem__(self, index: Any) -> Any:
        """A[index] as torch has it; a boolean mask selects where it is true.

        Raises:
            IndexError: a mask of another length, or a position outside of the matrix.
        """
        given = index if isinstance(index, tuple) else (index,)
        skipped = self.dim() - sum(1 for each in given if each is not Ellipsis)
        checked, dim = [], 0
        for each in given:
            if each is Ellipsis:
                dim += skipped
            elif dim < self.dim():
                each, dim = within(each, self.shape[dim], self.device), dim + 1
            checked.append(each)
        return super().__getitem__(tuple(checked))

    # --- dtype, device, torch functions ----------------------------------------------------------

    def to(self, *args: Any, **kwargs: Any) -> BaseLinearOperator:
        """The same operator in another dtype or on another device; arguments as `Tensor.to`."""
        try:
            probe = torch.empty(0, dtype=self.dtype, device=self.device).to(*args, **kwargs)
        except (TypeError, RuntimeError, AssertionError) as error:  # the last one without CUDA
            raise DataError(
                f"expected a dtype or a device, as Tensor.to takes them, got "
                f"{', '.join(map(described, (*args, *kwargs.values())))} ({error}): write "
                "F.to(torch.float64) or F.to('cpu')"
            ) from error
        if not probe.is_floating_point():
            raise DataError(
                f"expected a floating-point dtype, got {probe.dtype}: write F.to(torch.float64)"
            )
        return self._moved(probe.dtype, probe.device)

    @checked
    def type(self, dtype: torch.dtype) -> BaseLinearOperator:
        """The same operator in another dtype."""
        return self.to(dtype)

    def cpu(self) -> BaseLinearOperator:
        """The same operator on the CPU."""
        return self.to("cpu")

    def cuda(self, device_id: Any = None) -> BaseLinearOperator:
        """The same operator on a GPU, the current one by default."""
        return self.to("cuda" if device_id is None else torch.device("cuda", device_id))

    def bfloat16(self) -> BaseLinearOperator:
        """The same operator in bfloat16."""
        return self.type(torch.bfloat16)

    def _moved(self, dtype: torch.dtype, device: torch.device) -> BaseLinearOperator:
        args = [
            arg.to(device=device, dtype=dtype)
            if isinstance(arg, LinearOperator) or arg.is_floating_point()
            else arg.to(device=device)  # indices stay integers
            for arg in self._args
        ]
        return self.__class__(*args, **self._moved_fields(dtype, device))

    @checked
    def _set_requires_grad(self, val: bool) -> None:
        for tensor in tensors_of(self):
            if tensor.is_floating_point():
                tensor.requires_grad_(val)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in TORCH_FUNCTIONS and args and isinstance(args[0], ContractLinearOperator):
            return TORCH_FUNCTIONS[func](*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)

    def __array__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(
            f"{self.__class__.__name__} is no numpy array: take F.to_scipy() for its products, or "
            "F.to_dense().numpy() if it fits"
        )

    def __repr__(self) -> str:
        known = "" if self.space is None else f", {len(self.space.names)} parameters"
        shape = " x ".join(map(str, self.shape))
        return f"{type(self).__name__}({shape}, {self.dtype}{known})"

    def _repr_html_(self) -> str:
        """In a notebook: what it is, and its blocks with a bar of bytes."""
        return operator_html(self._this())


def combined(rule: rules.Rule, A: BaseLinearOperator, B: BaseLinearOperator) -> Any:
    """A + B, A @ B or A * B: structured if the structures fit, lazy otherwise.

    Raises:
        SpaceMismatchError: other shapes, dtypes, devices or parameters.
    """
    is_product, sign = rule is rules.products, rule.what[2]
    if A.shape[-1] != B.shape[-2] if is_product else A.shape[-2:] != B.shape[-2:]:
        wanted = "matrices that fit" if is_product else "two matrices of one shape"
        raise SpaceMismatchError(f"expected {wanted}, got {tuple(A.shape)} {sign} {tuple(B.shape)}")
    if A.dtype != B.dtype or A.device != B.device:
        raise SpaceMismatchError(
            f"expected two operators of one dtype and device, got {A.dtype} on {A.device} and "
            f"{B.dtype} on {B.device}: convert one with .to(...)"
        )
    if A.dim() > 2 or B.dim() > 2:
        return in_batches(lambda a, b: combined(rule, a, b), A, B, sign)
    info = joint(A.info, B.info)
    if is_product and B.space is None and not (B.is_square and B.maps_to_parameters):
        info = replace(info, space=None)  # the product takes no parameters
    return rule(A, B, info)


def in_batches(make: Callable[[Any, Any], Any], A: Any, B: Any, sign: str = "*") -> Any:
    """What is made of each pair of matrices of two batches, as one batch.

    What linear_operator makes of batches is solved to a loose tolerance if it is large.

    Raises:
        SpaceMismatchError: the batch shapes do not fit.
    """
    try:
        lead = torch.broadcast_shapes(A.shape[:-2], B.shape[:-2])
    except RuntimeError:
        raise SpaceMismatchError(
            f"expected batches that fit, got {tuple(A.shape)} {sign} {tuple(B.shape)}"
        ) from None
    first, second = (each.expand(*lead, *each.shape[-2:]) for each in (A, B))
    pairs = [(first[k], second[k]) for k in range(lead[0])]
    distinct = {(id(a), id(b)): (a, b) for a, b in pairs}  # a repeated matrix is taken once
    made = {ids: make(*pair) for ids, pair in distinct.items()}
    return rules.stacks([made[id(a), id(b)] for a, b in pairs])
