"""The base of every operator: our members, from a handful of primitives."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from linear_operator.operators import DiagLinearOperator, LinearOperator
from torch import Tensor, nn

from ..arguments import NonNegative, NonNegativeInt, PositiveInt, checked, described, named
from ..errors import DataError, SpaceMismatchError, TooLargeError
from ..selectors import Selector, select
from ..space import ParamSpace
from . import rules
from .contract import ContractLinearOperator, combined
from .damping import Damping, DampingLike, is_zero, resolve_damping
from .primitives import Krylov, flat_positions, seeded
from .report import Report, make_report
from .scipy import ScipyOperator
from .vectors import VectorLike, columns, require_fitting, require_left, require_vector, start_of

__all__ = ["DENSE_LIMIT", "BaseLinearOperator", "Krylov", "flat_positions"]

DENSE_LIMIT = 2**33  # bytes; `to_dense` refuses more unless told otherwise


@named("an operator, as FIM returns it", "FIM(...)")
class BaseLinearOperator(ContractLinearOperator):
    """A symmetric matrix over parameters (or a bare one), never formed unless asked for.

    Everything public here is final and derived from the primitives of `PrimitiveLinearOperator`,
    which each family (spectral, blockwise, lazy) implements. Members inherited from linear_operator
    keep their argument names and order; ours are keyword-only.

    Args:
        *args: the tensors and operators that it is made of; the first gives dtype and device.
        info: what is known besides the numbers.
    """

    # --- what it knows ---------------------------------------------------------------------------

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

    @checked
    def at(self, w: nn.Module | VectorLike) -> BaseLinearOperator:
        """The same matrix at other parameters, for matrix-free operators; differentiable in w.

        Args:
            w: a module (its parameters, attached to their graph), a flat vector (P,), or a dict
                {name: shape}.

        Raises:
            UnsupportedLayerError: the operator holds statistics of one point.
            SpaceMismatchError: w does not fit.
        """
        if isinstance(w, nn.Module):
            if self.space is None:
                raise SpaceMismatchError("at(module) needs an operator with a parameter space")
            w = self.space.values(w)
        flat = cast(ParamSpace, self.space).ravel(w) if isinstance(w, Mapping) else w
        return self._at(require_vector(self, flat, vector=True))

    # --- products and solves ---------------------------------------------------------------------

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
            return combined(rules.products, self, rules.as_operator(other))
        v, restore = columns(self, other)
        return restore(self._apply(v) if v.numel() else self._empty(v))

    @checked
    def vTMv(self, v: VectorLike) -> Tensor:
        """The quadratic form v.Fv, differentiable in v.

        Args:
            v: (n,) gives a 0-d tensor, columns (..., n, k) give (..., k), and a dict
                {name: (..., *shape)} gives the leading dimensions.
        """
        self._require_square("vTMv")
        flat, _ = columns(self, v)
        form = (flat * (self._apply(flat) if flat.numel() else self._empty(flat))).sum(-2)
        if isinstance(v, Mapping):
            first, shape = next(iter(v.values())), cast(ParamSpace, self.space).shapes[0]
            return form.reshape(first.shape[: first.dim() - len(shape)])
        return form.squeeze(-1) if v.dim() == 1 else form

    @checked
    def solve(
        self,
        right_tensor: Any,
        left_tensor: Tensor | None = None,
        *,
        damping: DampingLike = 0.0,
        tol: float | None = None,
        max_iter: NonNegativeInt | None = None,
        preconditioner: BaseLinearOperator | None = None,
        x0: VectorLike | None = None,
    ) -> Any:
        """(F + damping)^-1 v, in closed form if the structure has one, at any size.

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
            NonFiniteError: NaN or infinity in F or, if it iterates, in v.
            SpaceMismatchError: v does not fit.
        """
        if not self.is_square:
            raise RuntimeError(f"solve needs a square operator, got {tuple(self.shape)}")
        if left_tensor is not None:
            require_left(self, left_tensor)
        v, restore = columns(self, right_tensor)
        if preconditioner is not None:
            require_fitting(preconditioner, self)
        krylov = Krylov(tol, max_iter, preconditioner)
        if x0 is not None:
            krylov = replace(krylov, x0=start_of(self, x0, v))
        operator: BaseLinearOperator = self
        if not is_zero(damping):
            resolved = resolve_damping(self, damping)
            operator = self._damp(resolved, "exact")
            known_positive = isinstance(damping, (int, float))
            krylov = replace(krylov, check=not known_positive)
            if preconditioner is not None:
                krylov = replace(krylov, preconditioner=preconditioner.damped(damping))
        x = operator._solve(v, krylov=krylov) if v.numel() else self._empty(v)
        if left_tensor is not None:
            product = left_tensor @ x
            is_vector = isinstance(right_tensor, Tensor) and right_tensor.dim() == 1
            return product.squeeze(-1) if is_vector else product
        return restore(x)

    def _empty(self, v: Tensor) -> Tensor:
        """The product with no columns, or with none of the rows that it sums over."""
        lead = torch.broadcast_shapes(self.batch_shape, v.shape[:-2])
        return v.new_zeros(*lead, self.shape[-2], v.shape[-1])

    @checked
    def inverse(self, *, damping: DampingLike = 0.0) -> BaseLinearOperator:
        """(F + damping)^-1 as an operator, structure kept.

        Raises:
            NotPositiveDefiniteError: F is singular and not damped, or negative damping.
        """
        self._require_square("inverse")
        operator = self if is_zero(damping) else self.damped(damping)
        return self._altered(operator._inverse())

    # --- damping ---------------------------------------------------------------------------------

    @checked
    def damped(
        self,
        damping: DampingLike,
        method: str = "exact",
        *,
        use_pi: bool = True,
        minimum: NonNegative = 0.0,
    ) -> BaseLinearOperator:
        """F + diag(damping), structure kept; differentiable in the damping.

        Args:
            damping: a float, a 0-d or (P,) tensor, or {selector: either}. A vector keeps the
                closed form of a block if it is constant there; other blocks become lazy sums.
            method: "exact", or "factored" for Kronecker blocks: (left + sqrt(d)/pi I) kron
                (right + pi sqrt(d) I) with pi^2 = (tr(right)/dim right) / (tr(left)/dim left)
                (Martens and Grosse 2015, section 6.3). Other blocks are damped exactly.
            use_pi: whether factored damping has that pi; else it is 1.
            minimum: the least that factored damping adds to a factor.

        Raises:
            NotPositiveDefiniteError: negative damping.
            SpaceMismatchError: a wrong length, or selectors that match nothing or overlap.
        """
        if method not in ("exact", "factored"):
            raise ValueError(
                f"expected method 'exact' or 'factored', got {method!r}; "
                "docs/representations.md explains them"
            )
        self._require_square("damped")
        given = replace(resolve_damping(self, damping), use_pi=use_pi, minimum=minimum)
        return self._altered(self._damp(given, method))

    def add_diagonal(self, diag: Any) -> Any:
        """F + diag(diag), of any sign: a float, (), (1,) or (P,), or batched (..., P)."""
        self._require_square("add_diagonal")
        if isinstance(diag, Mapping):
            return self.damped(diag)
        if not isinstance(diag, (Tensor, float, int)) or isinstance(diag, bool):
            raise DataError(
                f"expected diag to be a number or a tensor, got {described(diag)}: pass a float, "
                "or torch.as_tensor(...)"
            )
        if not isinstance(diag, Tensor):
            diag = torch.full((), float(diag), dtype=self.dtype, device=self.device)
        if diag.dim() > 1:
            if diag.shape[-1] not in (1, self.shape[-1]):
                require_vector(self, diag, vector=True)
            each = DiagLinearOperator(diag.expand(*diag.shape[:-1], self.shape[-1]))
            return self + rules.as_operator(each)
        value = diag.squeeze(-1) if diag.shape == (1,) else diag
        if value.dim() == 1:
            value = require_vector(self, value, vector=True)
            if value.numel() and value.stride(0) == 0:  # one number repeated, such as a prior's
                value = value[0]
        return self._altered(self._damp(Damping(value.to(self.dtype)), "exact"))

    # --- numbers ---------------------------------------------------------------------------------

    def trace(self) -> Tensor:
        """The sum of the diagonal."""
        self._require_square("trace")
        return self._trace()

    def logdet(self) -> Tensor:
        """The logarithm of the determinant; -inf if F is singular.

        Raises:
            NotPositiveDefiniteError: F has a negative eigenvalue.
            UnsupportedLayerError: the structure has no closed form.
        """
        self._require_square("logdet")
        return self._logdet()

    def norm(self, ord: Any = "fro") -> Tensor:
        """A norm of the matrix: "fro", 2 (spectral), -2 (smallest singular value) or "nuc"."""
        if not isinstance(ord, (str, int)) or ord not in ("fro", 2, -2, "nuc"):
            raise ValueError(
                f"expected ord 'fro', 2, -2 or 'nuc', got {ord!r}; "
                "docs/support_matrix.md says which have a closed form"
            )
        return self._norm(ord)

    @checked
    def lerp(self, other: BaseLinearOperator, weight: float | Tensor) -> BaseLinearOperator:
        """(1 - weight) F + weight G: a running average of matrices.

        Structured as sums are: KFACs give lazy sums (`merge` pools their factors instead), EKFACs
        that share a basis (`update_diag`) an EKFAC.
        """
        if isinstance(weight, Tensor) and weight.dim() > 0:
            raise DataError(
                f"expected weight to be one number, got {described(weight)}: pass a float, or a "
                "0-d tensor"
            )
        return cast(BaseLinearOperator, self._scale(1 - weight) + other._scale(weight))

    # --- functions of the matrix -----------------------------------------------------------------

    @checked
    def power(self, p: float) -> BaseLinearOperator:
        """F^p, structure kept.

        Raises:
            NotPositiveDefiniteError: an eigenvalue of F has no such power.
            UnsupportedLayerError: the structure has no closed form.
        """
        self._require_square("power")
        if not math.isfinite(p):
            raise DataError(f"expected a finite power, got {p}: pass p=0.5 for a square root")
        return self._altered(self._power(float(p)))

    @checked
    def pinv(
        self, rcond: NonNegative | None = None, *, atol: NonNegative | None = None
    ) -> BaseLinearOperator:
        """The pseudo-inverse; eigenvalues up to a cut-off count as zero.

        Args:
            rcond: relative to the largest. By default what is zero up to rounding.
            atol: absolute; with both, the larger one of the two cut-offs holds.
        """
        self._require_square("pinv")
        if atol is not None:
            with torch.no_grad():
                largest = float(self._norm(2).max())
            # past the largest one nothing is left
            relative = atol / largest if largest > 0 else 1.0
            rcond = relative if rcond is None else max(rcond, relative)
        return self._altered(self._pinv(rcond))

    @checked
    def sample(self, n: PositiveInt, *, seed: int | None = None) -> Tensor:
        """Draws (n, P) from N(0, F).

        A posterior N(0, (F + d)^-1) is `F.inverse(damping=d).sample(n)`.

        Args:
            n: how many.
            seed: for draws of their own; by default from torch's global generator.

        Raises:
            NotPositiveDefiniteError: F has a negative eigenvalue.
        """
        return self._draw(n, seeded(seed, self.device)).movedim(-1, 0)

    # --- parts -----------------------------------------------------------------------------------

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

    @checked
    def to_dense(self, limit: NonNegativeInt | None = None) -> Tensor:
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

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain data, from which `load` makes the operator again.

        Version, representation, conventions and parameter names stand beside the tensors.

        Raises:
            UnsupportedLayerError: the operator is not made of tensors alone.
        """
        state: dict[str, Any] = rules.states(self)
        return state

    def to_scipy(self, dtype: Any = None) -> ScipyOperator:
        """A `scipy.sparse.linalg.LinearOperator`, for its Krylov methods.

        Args:
            dtype: the numpy dtype that scipy sees; by default this one's (half: float32).
        """
        return ScipyOperator(self, dtype)
