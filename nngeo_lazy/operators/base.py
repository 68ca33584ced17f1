"""The base of every operator: linear_operator's contract and ours, from a handful of primitives."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from numbers import Number
from typing import Any, cast

import torch
from linear_operator.operators import (
    LinearOperator,
    RootLinearOperator,
    TriangularLinearOperator,
    ZeroLinearOperator,
)
from linear_operator.utils.getitem import _is_noop_index
from torch import Tensor

from ..errors import (
    NotPositiveDefiniteError,
    SpaceMismatchError,
    TooLargeError,
    UnsupportedLayerError,
)
from ..selectors import Selector, select
from ..space import ParamSpace
from ._autograd import implicit_solve
from .damping import Damping, DampingLike, is_zero, resolve_damping
from .info import Info
from .report import Report, make_report
from .scipy import ScipyOperator
from .torch_functions import TORCH_FUNCTIONS
from .vectors import VectorLike, columns, require_vector

__all__ = ["DENSE_LIMIT", "BaseLinearOperator", "Krylov"]

DENSE_LIMIT = 2**33  # bytes; `to_dense` refuses more unless told otherwise


@dataclass(frozen=True)
class Krylov:
    """Options of an iterative solve; closed forms read only `check`.

    Attributes:
        tol: relative residual to reach.
        max_iter: at most so many products.
        preconditioner: an operator that approximates the one to be solved.
        x0: where to start (..., n, k).
        check: whether to test a closed form for singularity, which reads from the device.
    """

    tol: float | None = None
    max_iter: int | None = None
    preconditioner: BaseLinearOperator | None = None
    x0: Tensor | None = None
    check: bool = True

    def restarted(self) -> Krylov:
        """The same from zero: for another right-hand side."""
        return replace(self, x0=None)


class BaseLinearOperator(LinearOperator):
    """A symmetric matrix over parameters (or a bare one), never formed unless asked for.

    Everything public here is final and derived from the primitives at the end of the class, which
    each family (spectral, blockwise, lazy) implements. Members inherited from linear_operator keep
    their argument names and order; ours are keyword-only.

    Args:
        *args: the tensors and operators that it is made of; the first gives dtype and device.
        info: what is known besides the numbers.
    """

    # Whether the tensors it is made of get their gradient of a solve by implicit differentiation,
    # and whether the gradient in the vector needs it as well (an iteration must not be taped).
    _implicit_in_tensors = False
    _implicit_in_vector = False

    def __init__(self, *args: Any, info: Info | None = None) -> None:
        super().__init__(*args, info=Info() if info is None else info)

    # --- what it knows --------------------------------------------------------------------------

    @property
    def info(self) -> Info:
        """What is known besides the numbers."""
        return cast(Info, self._nondifferentiable_kwargs["info"])

    @property
    def space(self) -> ParamSpace | None:
        """The parameters and their order; None for a bare matrix."""
        return self.info.space

    @property
    def num_examples(self) -> int | None:
        """How many examples the matrix is a mean over: `F.num_examples * F` is the sum."""
        return self.info.num_examples

    @property
    def num_terms(self) -> int | None:
        """How many unmasked terms of the loss were seen."""
        return self.info.num_terms

    def report(self) -> Report:
        """One row for each parameter, which print as a table.

        Parameter, layer, form of its Jacobian, kind of its block, sizes, bytes, and why a fallback
        was taken.
        """
        return make_report(self)

    # --- products -------------------------------------------------------------------------------

    def matmul(self, other: Any) -> Any:
        """The product with a vector, columns, a dict by parameter name, or another operator.

        Args:
            other: (n,), (..., n, k), {name: (..., *shape)}, or a linear operator.

        Returns:
            The product, of the same form as `other`; for an operator, an operator.

        Raises:
            SpaceMismatchError: a wrong length, dtype or device, or missing or unknown names.
        """
        if isinstance(other, LinearOperator):
            from .algebra import multiply

            return multiply(self, other)
        v, restore = columns(self, other)
        return restore(self._apply(v))

    def rmatmul(self, other: Any) -> Any:
        """The product with something on the left."""
        if isinstance(other, LinearOperator):
            from .algebra import multiply, ours

            return multiply(ours(other), self)
        transposed = self._transpose_nonbatch()
        if other.ndim == 1:
            return transposed.matmul(other)
        return transposed.matmul(other.mT).mT

    def _matmul(self, rhs: Tensor) -> Tensor:
        if rhs.dim() == 1:
            return self._apply(rhs.unsqueeze(-1)).squeeze(-1)
        return self._apply(rhs)

    def _t_matmul(self, rhs: Tensor) -> Tensor:
        return cast(Tensor, self._transpose_nonbatch()._matmul(rhs))

    def vTMv(self, v: VectorLike) -> Tensor:
        """The quadratic form v.Fv, differentiable in v.

        Args:
            v: (n,) gives a 0-d tensor, columns (..., n, k) give (..., k), and a dict
                {name: (..., *shape)} gives the leading dimensions.
        """
        flat, _ = columns(self, v)
        form = (flat * self._apply(flat)).sum(-2)
        if isinstance(v, Mapping):
            first, shape = next(iter(v.values())), cast(ParamSpace, self.space).shapes[0]
            return form.reshape(first.shape[: first.dim() - len(shape)])
        return form.squeeze(-1) if v.dim() == 1 else form

    # --- solves ---------------------------------------------------------------------------------

    def solve(
        self,
        right_tensor: Any,
        left_tensor: Tensor | None = None,
        *,
        damping: DampingLike = 0.0,
        tol: float | None = None,
        max_iter: int | None = None,
        preconditioner: BaseLinearOperator | None = None,
        x0: VectorLike | None = None,
    ) -> Any:
        """(F + damping)^-1 v, in closed form where the structure has one, at any size.

        Elsewhere by conjugate gradients to a relative residual `tol`. Differentiable in v, in the
        damping and in F's tensors, any number of times.

        Args:
            right_tensor: v, flat, with columns, or a dict by parameter name.
            left_tensor: L (..., m, n), for L (F + damping)^-1 v.
            damping: a float, a 0-d or (P,) tensor, or {selector: either}.
            tol: relative residual to reach; by default 1e-6, in float64 1e-10.
            max_iter: at most so many products with F.
            preconditioner: an operator that approximates F (not its inverse); it is damped alike.
            x0: where an iteration starts, like v.

        Raises:
            NotPositiveDefiniteError: F is singular and not damped, or negative damping.
            NonFiniteError: NaN or infinity in F or, where it iterates, in v.
            SpaceMismatchError: v does not fit.
        """
        if not self.is_square:
            raise RuntimeError(f"solve needs a square operator, got {tuple(self.shape)}")
        v, restore = columns(self, right_tensor)
        krylov = Krylov(tol, max_iter, preconditioner)
        if x0 is not None:
            krylov = replace(krylov, x0=columns(self, x0)[0])
        operator: BaseLinearOperator = self
        if not is_zero(damping):
            resolved = resolve_damping(self, damping)
            operator = self._damp(resolved, "exact")
            known_positive = isinstance(damping, (int, float))
            krylov = replace(krylov, check=not known_positive)
            if preconditioner is not None:
                krylov = replace(krylov, preconditioner=preconditioner.damped(damping))
        x = operator._solve_any(v, krylov)
        if left_tensor is not None:
            product = left_tensor @ x
            is_vector = isinstance(right_tensor, Tensor) and right_tensor.dim() == 1
            return product.squeeze(-1) if is_vector else product
        return restore(x)

    def _solve(
        self, rhs: Tensor, preconditioner: Any = None, num_tridiag: int | None = 0
    ) -> Tensor:
        return self._solve_any(rhs, Krylov())

    def _solve_any(self, v: Tensor, krylov: Krylov) -> Tensor:
        taped = torch.is_grad_enabled()
        if self._implicit_in_vector or (
            taped and self._implicit_in_tensors and any(t.requires_grad for t in _tensors(self))
        ):
            return implicit_solve(self, v, krylov)
        return self._solve_columns(v, krylov)

    def inv_quad(self, inv_quad_rhs: Tensor, reduce_inv_quad: bool = True) -> Tensor:
        return cast(Tensor, self.inv_quad_logdet(inv_quad_rhs, False, reduce_inv_quad)[0])

    def inv_quad_logdet(
        self,
        inv_quad_rhs: Tensor | None = None,
        logdet: bool | None = False,
        reduce_inv_quad: bool | None = True,
    ) -> tuple[Tensor, Tensor]:
        zero = torch.zeros(self.batch_shape, dtype=self.dtype, device=self.device)
        quadratic, determinant = zero, zero
        if inv_quad_rhs is not None:
            v, _ = columns(self, inv_quad_rhs)
            quadratic = (v * self._solve_any(v, Krylov())).sum(-2)
            if reduce_inv_quad or inv_quad_rhs.dim() == 1:
                quadratic = quadratic.sum(-1)
        if logdet:
            determinant = self._logdet()
        return quadratic, determinant

    def inverse(self, *, damping: DampingLike = 0.0) -> BaseLinearOperator:
        """(F + damping)^-1 as an operator, structure kept.

        Raises:
            NotPositiveDefiniteError: F is singular and not damped, or negative damping.
        """
        operator = self if is_zero(damping) else self.damped(damping)
        return operator._inverse()

    # --- damping --------------------------------------------------------------------------------

    def damped(self, damping: DampingLike, method: str = "exact") -> BaseLinearOperator:
        """F + diag(damping), structure kept; differentiable in the damping.

        Args:
            damping: a float, a 0-d or (P,) tensor, or {selector: either}. A vector keeps a closed
                form where it is constant in a block, and elsewhere gives a lazy sum.
            method: "exact", or "factored" for Kronecker blocks: (left + sqrt(d)/pi I) kron
                (right + pi sqrt(d) I) with pi^2 = (tr(right)/dim right) / (tr(left)/dim left)
                (Martens and Grosse 2015, section 6.3). Other blocks are damped exactly.

        Raises:
            NotPositiveDefiniteError: negative damping.
            SpaceMismatchError: a wrong length, or selectors that match nothing or overlap.
        """
        if method not in ("exact", "factored"):
            raise ValueError(f"expected method 'exact' or 'factored', got {method!r}")
        self._require_square("damped")
        return self._damp(resolve_damping(self, damping), method)

    def add_diagonal(self, diag: Any) -> Any:
        """F + diag(diag), of any sign: a float, (), (1,) or (P,), or batched (..., P)."""
        self._require_square("add_diagonal")
        if isinstance(diag, Mapping):
            return self.damped(diag)
        if not isinstance(diag, Tensor):
            diag = torch.full((), float(diag), dtype=self.dtype, device=self.device)
        if diag.dim() > 1:
            return super().add_diagonal(diag)
        value = diag.squeeze(-1) if diag.shape == (1,) else diag
        if value.dim() == 1:
            value = require_vector(self, value, vector=True)
        return self._damp(Damping(value.to(self.dtype)), "exact")

    def add_jitter(self, jitter_val: float = 1e-3) -> Any:
        return self.add_diagonal(jitter_val)

    # --- numbers --------------------------------------------------------------------------------

    def trace(self) -> Tensor:
        """The sum of the diagonal."""
        self._require_square("trace")
        return self._trace()

    def logdet(self) -> Tensor:
        """The logarithm of the determinant; -inf where F is singular.

        Raises:
            NotPositiveDefiniteError: F has a negative eigenvalue.
            UnsupportedLayerError: the structure has no closed form.
        """
        self._require_square("logdet")
        return self._logdet()

    def norm(self, ord: Any = "fro") -> Tensor:
        """A norm of the matrix: "fro", 2 (spectral), -2 (smallest singular value) or "nuc"."""
        if ord not in ("fro", 2, -2, "nuc"):
            raise ValueError(f"expected ord 'fro', 2, -2 or 'nuc', got {ord!r}")
        return self._norm(ord)

    # --- functions of the matrix ----------------------------------------------------------------

    def power(self, p: float) -> BaseLinearOperator:
        """F^p, structure kept.

        Raises:
            NotPositiveDefiniteError: F has eigenvalues of which there is no such power.
            UnsupportedLayerError: the structure has no closed form.
        """
        self._require_square("power")
        return self._power(float(p))

    def pinv(self, rcond: float | None = None) -> BaseLinearOperator:
        """The pseudo-inverse; eigenvalues up to `rcond` times the largest count as zero.

        By default those that are zero up to rounding.
        """
        self._require_square("pinv")
        return self._pinv(rcond)

    def sample(self, n: int, *, seed: int | None = None) -> Tensor:
        """Draws (n, P) from N(0, F).

        A posterior N(0, (F + d)^-1) is `F.inverse(damping=d).sample(n)`.

        Args:
            n: how many.
            seed: for draws of their own; by default from torch's global generator.

        Raises:
            NotPositiveDefiniteError: F has a negative eigenvalue.
        """
        generator = None
        if seed is not None:
            generator = torch.Generator(device=self.device).manual_seed(seed)
        return self._draw(n, generator).mT

    def zero_mean_mvn_samples(self, num_samples: int) -> Tensor:
        return self.sample(num_samples)

    def root_decomposition(self, method: str | None = None) -> Any:
        return RootLinearOperator(self.power(0.5))

    def root_inv_decomposition(
        self, initial_vectors: Any = None, test_vectors: Any = None, method: str | None = None
    ) -> Any:
        return RootLinearOperator(self.power(-0.5))

    def sqrt_inv_matmul(self, rhs: Tensor, lhs: Tensor | None = None) -> Any:
        root = self.power(-0.5)
        x = root @ rhs
        if lhs is None:
            return x
        return lhs @ x, (root @ lhs.mT).square().sum(-2)

    def diagonalization(self, method: str | None = None) -> tuple[Tensor, Any]:
        return self._symeig(eigenvectors=True)

    def _symeig(
        self, eigenvectors: bool = False, return_evals_as_lazy: bool | None = False
    ) -> tuple[Tensor, Any]:
        values, basis = self._eigensystem()
        return values, basis if eigenvectors else None

    def _svd(self) -> tuple[Any, Tensor, Any]:
        from .diagonal import DiagonalLinearOperator

        values, basis = self._eigensystem()
        return basis, values.abs(), basis @ DiagonalLinearOperator(values.sign())

    def _cholesky(self, upper: bool | None = False) -> Any:
        factor, failed = torch.linalg.cholesky_ex(self.to_dense())
        if bool(failed.any()):
            raise NotPositiveDefiniteError(
                "no Cholesky factor: the matrix is not positive definite; add damping="
            )
        return TriangularLinearOperator(factor.mT if upper else factor, upper=bool(upper))

    # --- algebra --------------------------------------------------------------------------------

    def __add__(self, other: Any) -> Any:
        if isinstance(other, ZeroLinearOperator) or (isinstance(other, Number) and other == 0):
            return self
        if isinstance(other, (Tensor, LinearOperator)):
            if other.dim() == 2 and self.dim() == 2:
                from .algebra import add, ours

                return add(self, ours(other))
            return super().__add__(other)
        if isinstance(other, Number):
            raise TypeError(
                f"cannot add the number {other} to a matrix: write F.add_diagonal({other}) to add "
                "it to the diagonal"
            )
        return NotImplemented

    def __radd__(self, other: Any) -> Any:
        return self + other

    def __neg__(self) -> BaseLinearOperator:
        return self._scale(-1.0)

    def __sub__(self, other: Any) -> Any:
        if isinstance(other, Number):
            return self + (-other)  # type: ignore[operator]
        return self + other * -1.0

    def __rsub__(self, other: Any) -> Any:
        return -self + other

    def _mul_constant(self, other: Any) -> Any:
        if isinstance(other, Tensor) and other.dim() > 0:
            return super()._mul_constant(other)
        return self._scale(other)

    # --- parts ----------------------------------------------------------------------------------

    def block(self, selector: Selector) -> BaseLinearOperator:
        """The principal block of the selected parameters, in flat order.

        Raises:
            SpaceMismatchError: there is no space, or nothing is selected.
        """
        if self.space is None:
            raise SpaceMismatchError("block(...) needs an operator with a parameter space")
        return self._restrict(select(self.space, selector))

    @property
    def blocks(self) -> dict[str, BaseLinearOperator]:
        """The principal block of each layer, by the path of its module, in parameter order."""
        if self.space is None:
            raise SpaceMismatchError("blocks need an operator with a parameter space")
        owners: dict[str, list[str]] = {}
        for name in self.space.names:
            owners.setdefault(self.space.owner(name), []).append(name)
        return {owner: self._restrict(tuple(names)) for owner, names in owners.items()}

    def to_dense(self, limit: int | None = None) -> Tensor:
        """The matrix itself.

        Args:
            limit: how many bytes it may take; 8 GiB by default.

        Raises:
            TooLargeError: it would take more.
        """
        limit = DENSE_LIMIT if limit is None else limit
        size = self.shape.numel() * torch.finfo(self.dtype).bits // 8
        if size > limit:
            raise TooLargeError(
                f"the {self.shape[-2]} x {self.shape[-1]} matrix takes {size:,} bytes, more than "
                f"the limit of {limit:,}: work with products, blocks or the diagonal, or pass "
                f"limit={size}"
            )
        return self._dense()

    def to_scipy(self, dtype: Any = None) -> ScipyOperator:
        """A `scipy.sparse.linalg.LinearOperator`, for its Krylov methods.

        Args:
            dtype: the numpy dtype that scipy sees; by default this one's (half: float32).
        """
        return ScipyOperator(self, dtype)

    def _getitem(self, row_index: Any, col_index: Any, *batch_indices: Any) -> Any:
        if _is_noop_index(row_index) and _is_noop_index(col_index):
            return self
        from .views import RestrictedLinearOperator

        return RestrictedLinearOperator(
            self,
            _positions(row_index, self.shape[-2], self.device),
            _positions(col_index, self.shape[-1], self.device),
        )

    def _get_indices(self, row_index: Any, col_index: Any, *batch_indices: Any) -> Tensor:
        from .views import entries

        return entries(self, row_index, col_index)

    # --- batches --------------------------------------------------------------------------------

    def _expand_batch(self, batch_shape: Any) -> Any:
        from .views import BroadcastLinearOperator

        if len(batch_shape) == 0:
            return self
        return BroadcastLinearOperator.of(self, torch.Size(batch_shape))

    def _unsqueeze_batch(self, dim: int) -> Any:
        return self._expand_batch(torch.Size([1]))

    # --- dtype and device -----------------------------------------------------------------------

    def to(self, *args: Any, **kwargs: Any) -> BaseLinearOperator:
        """The same operator in another dtype or on another device; arguments as `Tensor.to`."""
        probe = torch.empty(0, dtype=self.dtype, device=self.device).to(*args, **kwargs)
        return self._moved(probe.dtype, probe.device)

    def type(self, dtype: torch.dtype) -> BaseLinearOperator:
        return self._moved(dtype, self.device)

    def cpu(self) -> BaseLinearOperator:
        return self.to("cpu")

    def cuda(self, device_id: Any = None) -> BaseLinearOperator:
        return self.to("cuda" if device_id is None else torch.device("cuda", device_id))

    def bfloat16(self) -> BaseLinearOperator:
        return self.type(torch.bfloat16)

    def _moved(self, dtype: torch.dtype, device: torch.device) -> BaseLinearOperator:
        args = [
            arg.to(device=device, dtype=dtype)
            if isinstance(arg, LinearOperator) or arg.is_floating_point()
            else arg.to(device=device)  # indices stay integers
            for arg in self._args
        ]
        return self.__class__(*args, info=self.info.moved(dtype, device))

    def _set_requires_grad(self, val: bool) -> None:
        for tensor in _tensors(self):
            if tensor.is_floating_point():
                tensor.requires_grad_(val)

    # --- torch functions ------------------------------------------------------------------------

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in TORCH_FUNCTIONS and args and isinstance(args[0], BaseLinearOperator):
            return TORCH_FUNCTIONS[func](*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)

    def __repr__(self) -> str:
        known = "" if self.space is None else f", {len(self.space.names)} parameters"
        shape = " x ".join(map(str, self.shape))
        return f"{type(self).__name__}({shape}, {self.dtype}{known})"

    # --- helpers --------------------------------------------------------------------------------

    def _with_info(self, info: Info) -> Any:
        """The same numbers with other knowledge about them."""
        return self.__class__(*self._args, info=info)

    def _require_square(self, what: str) -> None:
        if not self.is_square:
            raise RuntimeError(f"{what} needs a square operator, got {tuple(self.shape)}")

    def _unsupported(self, what: str) -> UnsupportedLayerError:
        return UnsupportedLayerError(
            f"{what} has no closed form for {type(self).__name__}: dense, diagonal, Kronecker and "
            "block-diagonal operators have one. Where it fits, take "
            f"DenseLinearOperator(F.to_dense()).{what}"
        )

    # --- the primitives that a family implements --------------------------------------------------

    @abstractmethod
    def _apply(self, v: Tensor) -> Tensor:
        """The product with columns (..., n, k)."""

    @abstractmethod
    def _solve_columns(self, v: Tensor, krylov: Krylov) -> Tensor:
        """The solution for columns (..., n, k)."""

    @abstractmethod
    def _damp(self, damping: Damping, method: str) -> BaseLinearOperator:
        """The sum with a diagonal of any sign."""

    @abstractmethod
    def _scale(self, c: float | Tensor) -> BaseLinearOperator:
        """The multiple by a number or a 0-d tensor."""

    @abstractmethod
    def _diagonal(self) -> Tensor:
        """The diagonal (n,)."""

    @abstractmethod
    def _trace(self) -> Tensor: ...

    @abstractmethod
    def _logdet(self) -> Tensor: ...

    @abstractmethod
    def _norm(self, ord: Any) -> Tensor:
        ...

    @abstractmethod
    def _inverse(self) -> BaseLinearOperator: ...

    @abstractmethod
    def _power(self, p: float) -> BaseLinearOperator: ...

    @abstractmethod
    def _pinv(self, rcond: float | None) -> BaseLinearOperator: ...

    @abstractmethod
    def _draw(self, n: int, generator: torch.Generator | None) -> Tensor:
        """Samples of N(0, F) as columns (n, k)."""

    @abstractmethod
    def _eigensystem(self) -> tuple[Tensor, BaseLinearOperator]:
        """Eigenvalues (n,), signed, in any order, and the orthogonal matrix of eigenvectors."""

    @abstractmethod
    def _dense(self) -> Tensor:
        """The matrix."""

    @abstractmethod
    def _restrict(self, names: tuple[str, ...]) -> BaseLinearOperator:
        """The principal block of some parameters."""

    @abstractmethod
    def _principal(self, index: Tensor, columns: Tensor | None, info: Info) -> BaseLinearOperator:
        """The principal block at an index; `columns` are those of a Kronecker grid, if it is so."""

    @abstractmethod
    def _kind(self) -> str:
        """How a report names this representation."""


def _tensors(operator: LinearOperator) -> tuple[Tensor, ...]:
    return cast("tuple[Tensor, ...]", operator.representation())


def _positions(index: Any, size: int, device: torch.device) -> Tensor:
    """A slice or a tensor index, as positions."""
    if isinstance(index, slice):
        return torch.arange(*index.indices(size), device=device)
    positions = torch.as_tensor(index, device=device)
    return torch.where(positions < 0, positions + size, positions)


def flat_positions(space: ParamSpace, names: tuple[str, ...], device: Any) -> Tensor:
    """Where some parameters lie in the flat vector."""
    chosen = [space.slices[name] for name in names]
    return torch.cat([torch.arange(s.start, s.stop, device=device) for s in chosen])
