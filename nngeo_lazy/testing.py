"""Checks for operators: every member against the dense matrix, and a spy on large tensors."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .errors import EstimateWarning, NNGeoError, NotPositiveDefiniteError, UnsupportedLayerError
from .operators import BaseLinearOperator

__all__ = ["LargestTensor", "check_operator"]


class LargestTensor(TorchDispatchMode):
    """Records the largest tensor that any operation makes while it is active.

    Attributes:
        numel: how many numbers the largest storage held.
        operation: which operation made it.

    Example:
        >>> with LargestTensor() as spy:
        ...     _ = torch.ones(3, 1) * torch.ones(1, 4)
        >>> spy.numel, spy.operation
        (12, 'aten.mul.Tensor')
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.numel = 0
        self.operation = ""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        before = {_storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(out):
            if not isinstance(tensor, Tensor) or _storage(tensor) in (None, *before):
                continue  # a view, an update in place, or a wrapper of a tensor seen by itself
            numel = tensor.untyped_storage().nbytes() // tensor.element_size()
            if numel > self.numel:
                self.numel, self.operation = numel, str(func)
        return out


def _storage(tensor: Tensor) -> int | None:
    """The address of a tensor's memory, None for a wrapper of torch.func that has none."""
    try:
        return tensor.untyped_storage().data_ptr()
    except RuntimeError:
        return None


def check_operator(
    op: BaseLinearOperator,
    dense: Tensor,
    *,
    rtol: float = 1e-8,
    symmetric: bool = True,
    positive_definite: bool | None = None,
) -> None:
    """Check every member of an operator against the matrix that it stands for.

    A member may have no closed form, and say so by `UnsupportedLayerError`; it must never be wrong.
    An estimate must lie within its own interval.

    Args:
        op: the operator (P, P).
        dense: the matrix (P, P), in any dtype; float64 leaves room for a small `rtol`.
        rtol: allowed error, relative to the largest number of each expected result.
        symmetric: whether the matrix is; without it only products, transposes, entries, trace and
            algebra are checked.
        positive_definite: whether the matrix is, well conditioned; None finds out.

    Raises:
        AssertionError: a member is wrong; the message says which, and by how much.

    Example:
        >>> from nngeo_lazy.operators import DiagonalLinearOperator
        >>> d = torch.tensor([1.0, 2.0], dtype=torch.float64)
        >>> check_operator(DiagonalLinearOperator(d), d.diag())
    """
    dense = dense.detach()
    check = _Check(op, dense, rtol)
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(dense.shape[-1], 3, generator=generator, dtype=torch.float64, device="cpu").to(
        dense
    )
    _check_products(check, v)
    _check_numbers(check, symmetric)
    _check_algebra(check, v)
    if not symmetric:
        return
    values = torch.linalg.eigvalsh(dense)
    if positive_definite is None:
        positive_definite = bool(values.min() > 1e-6 * values.abs().max())
    _check_spectrum(check, values)
    _check_parts(check, v)
    _check_damping(check, v, float(values.abs().max()), positive_definite)
    if positive_definite:
        _check_positive(check, v)


class _Check:
    """An operator, its matrix, and how to compare a member with what it must be."""

    def __init__(self, op: BaseLinearOperator, dense: Tensor, rtol: float) -> None:
        self.op, self.dense, self.rtol = op, dense, rtol

    def __call__(
        self,
        member: str,
        compute: Callable[[], Any],
        expected: Tensor | Callable[[], Tensor],
        *,
        optional: bool = False,
    ) -> None:
        try:
            got, slack = _with_slack(compute)
        except UnsupportedLayerError:
            if optional:
                return
            raise AssertionError(f"{self._where(member)} is unsupported") from None
        except NNGeoError as error:
            raise AssertionError(f"{self._where(member)} raised {error!r}") from error
        if isinstance(got, BaseLinearOperator):
            got = got.to_dense()
        want = expected() if callable(expected) else expected
        if got.shape != want.shape:
            raise AssertionError(
                f"{self._where(member)} has shape {tuple(got.shape)}, not {tuple(want.shape)}"
            )
        got, want = got.detach().double(), want.double()
        scale = float(want.abs().max()) if want.numel() else 0.0
        error_ = float((got - want).abs().max()) if want.numel() else 0.0
        if not error_ <= self.rtol * scale + slack:
            raise AssertionError(
                f"{self._where(member)} is off by {error_:.3g}, where the largest number is "
                f"{scale:.3g} (rtol={self.rtol:g})"
            )

    def _where(self, member: str) -> str:
        return f"{type(self.op).__name__}.{member}"


def _with_slack(compute: Callable[[], Any]) -> tuple[Any, float]:
    """What is computed, and how far off an estimate in it says that it may be."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", EstimateWarning)
        got = compute()
    slack = 0.0
    for entry in caught:
        if isinstance(entry.message, EstimateWarning):
            estimate = entry.message.estimate
            low, high = estimate.interval(1 - 1e-6)
            slack = max(slack, float((high - low).max()) / 2 + estimate.bias)
        else:
            warnings.warn_explicit(entry.message, entry.category, entry.filename, entry.lineno)
    return got, slack


def _check_products(check: _Check, v: Tensor) -> None:
    op, dense = check.op, check.dense
    check("to_dense()", op.to_dense, dense)
    check("matmul(columns)", lambda: op @ v, dense @ v)
    check("matmul(vector)", lambda: op @ v[:, 0], dense @ v[:, 0])
    batch = torch.stack([v, 2 * v])
    check("matmul(batch)", lambda: op @ batch, dense @ batch)
    left = torch.ones_like(dense[:, :2]).mT
    check("rmatmul", lambda: left @ op, left @ dense)
    check("mT", lambda: op.mT @ (dense @ v), dense.mT @ (dense @ v))
    if op.is_square:
        check("vTMv(vector)", lambda: op.vTMv(v[:, 0]), v[:, 0] @ dense @ v[:, 0])
        check("vTMv(columns)", lambda: op.vTMv(v), (v * (dense @ v)).sum(0))
    if op.space is not None:
        space = op.space

        def product() -> Tensor:
            result: Any = op @ space.unravel(v.mT)
            return space.ravel(result) if op.maps_to_parameters else result

        check("matmul(dict)", product, (dense @ v).mT)
    if op.space is not None and op.is_square:
        check("vTMv(dict)", lambda: op.vTMv(space.unravel(v.mT)), (v * (dense @ v)).sum(0))


def _check_numbers(check: _Check, symmetric: bool) -> None:
    op, dense = check.op, check.dense
    check("norm('fro')", lambda: op.norm("fro"), dense.norm())
    rows = torch.tensor([0, dense.shape[0] - 1, 0], device=dense.device)
    cols = torch.tensor([0, 0, dense.shape[1] - 1], device=dense.device)
    check("getitem(tensors)", lambda: op[rows, cols], dense[rows, cols])
    check("getitem(int)", lambda: op[1], dense[1])
    check("getitem(slices)", lambda: op[1:, :2], dense[1:, :2])
    if op.is_square:
        check("diagonal()", op.diagonal, dense.diagonal())
        check("trace()", op.trace, dense.trace())


def _check_algebra(check: _Check, v: Tensor) -> None:
    op, dense = check.op, check.dense
    check("2 * F", lambda: 2 * op, 2 * dense)
    check("-F", lambda: -op, -dense)
    check("F / 4", lambda: op / 4, dense / 4)
    check("F + F", lambda: op + op, 2 * dense)
    check("F - 3 F", lambda: op - 3 * op, -2 * dense)
    check("F @ F.mT", lambda: op @ op.mT, dense @ dense.mT)
    if op.is_square:
        check("F + tensor", lambda: op + dense, 2 * dense)


def _check_spectrum(check: _Check, values: Tensor) -> None:
    op = check.op
    check("eigvalsh", lambda: op.eigvalsh().sort().values, values, optional=True)

    def rebuilt() -> Any:
        own, basis = op.eigh()
        q = basis.to_dense()
        return q @ own.diag_embed() @ q.mT

    def rebuilt_svd() -> Any:
        u, s, v = op.svd()
        return u.to_dense() @ s.diag_embed() @ v.to_dense().mT

    check("eigh", rebuilt, check.dense, optional=True)
    check("svd", rebuilt_svd, check.dense, optional=True)
    sizes = values.abs()
    check("norm(2)", lambda: op.norm(2), sizes.max(), optional=True)
    check("norm('nuc')", lambda: op.norm("nuc"), sizes.sum(), optional=True)
    if float(sizes.min()) > 1e-6 * float(sizes.max()):
        check("norm(-2)", lambda: op.norm(-2), sizes.min(), optional=True)
        check("pinv()", op.pinv, lambda: torch.linalg.inv(check.dense), optional=True)
    check("power(2)", lambda: op.power(2), lambda: check.dense @ check.dense, optional=True)


def _check_parts(check: _Check, v: Tensor) -> None:
    op, dense = check.op, check.dense
    scipy_op = op.to_scipy()
    check("to_scipy()", lambda: torch.from_numpy(scipy_op @ v.cpu().numpy()), (dense @ v).cpu())
    if op.space is None:
        return
    space = op.space
    owners: dict[str, list[Tensor]] = {}
    for name in space.names:
        where = space.slices[name]
        index = torch.arange(where.start, where.stop, device=dense.device)
        owners.setdefault(space.owner(name), []).append(index)
        check(f"block({name!r})", partial(op.block, name), dense[index][:, index])
    blocks = op.blocks
    if list(blocks) != list(owners):
        raise AssertionError(f"blocks are {list(blocks)}, not {list(owners)}")
    for owner, indices in owners.items():
        joint = torch.cat(indices)
        check(f"blocks[{owner!r}]", partial(blocks.get, owner), dense[joint][:, joint])
    if [row.parameter for row in op.report()] != list(space.names):
        raise AssertionError("report() does not have one row for each parameter, in order")


def _check_damping(check: _Check, v: Tensor, scale: float, positive_definite: bool) -> None:
    op, dense = check.op, check.dense
    n = dense.shape[0]
    eye = torch.eye(n, dtype=dense.dtype, device=dense.device)
    d = 1.5 * scale
    check("damped(d)", lambda: op.damped(d), dense + d * eye)
    check("damped(0-d)", lambda: op.damped(eye[0, 0] * d), dense + d * eye)
    check("add_diagonal(d)", lambda: op.add_diagonal(eye[0, 0] * d), dense + d * eye)
    vector = torch.linspace(1, 2, n, dtype=dense.dtype, device=dense.device) * d
    check("damped(vector)", lambda: op.damped(vector), dense + vector.diag())
    regular = torch.linalg.inv(dense + d * eye)
    check("solve(damping=d)", lambda: op.solve(v, damping=d), regular @ v)
    check("damped(d).solve", lambda: op.damped(d).solve(v[:, 0]), regular @ v[:, 0])
    check(
        "solve(damping=vector)",
        lambda: op.solve(v, damping=vector),
        torch.linalg.solve(dense + vector.diag(), v),
    )
    check("inverse(damping=d)", lambda: op.inverse(damping=d), regular)
    check(
        "damped(d).logdet()",
        lambda: op.damped(d).logdet(),
        lambda: torch.logdet(dense + d * eye),
        optional=True,
    )
    if op.space is not None:
        names = op.space.names
        chosen = {names[0]: d, **({names[-1]: 2 * d} if len(names) > 1 else {})}
        by_name = torch.zeros(n, dtype=dense.dtype, device=dense.device)
        for name, value in chosen.items():
            by_name[op.space.slices[name]] = value
        check("damped(dict)", lambda: op.damped(chosen), dense + by_name.diag())


def _check_positive(check: _Check, v: Tensor) -> None:
    op, dense = check.op, check.dense
    inverse = torch.linalg.inv(dense)
    check("solve(columns)", lambda: op.solve(v), inverse @ v)
    check("solve(vector)", lambda: op.solve(v[:, 0]), inverse @ v[:, 0])
    check("solve(left)", lambda: op.solve(v, v.mT), v.mT @ inverse @ v)
    batch = torch.stack([v, 2 * v])
    check("solve(batch)", lambda: op.solve(batch), inverse @ batch)
    if op.space is not None:
        space = op.space
        check(
            "solve(dict)",
            lambda: space.ravel(op.solve(space.unravel(v.mT))),
            (inverse @ v).mT,
        )
    check("inverse()", op.inverse, inverse)
    check("inverse() @ v", lambda: op.inverse() @ v, inverse @ v)
    check("logdet()", op.logdet, lambda: torch.logdet(dense), optional=True)
    check("inv_quad", lambda: op.inv_quad(v), (v * (inverse @ v)).sum())
    values, vectors = torch.linalg.eigh(dense)
    root = (vectors * values.sqrt()) @ vectors.mT
    check("power(0.5)", lambda: op.power(0.5), root, optional=True)
    check("root_decomposition", lambda: op.root_decomposition().to_dense(), dense, optional=True)
    check(
        "sqrt_inv_matmul", lambda: op.sqrt_inv_matmul(v), torch.linalg.inv(root) @ v, optional=True
    )
    check("cholesky", lambda: op.cholesky().to_dense(), torch.linalg.cholesky(dense))
    _check_samples(op, dense)


def _check_samples(op: BaseLinearOperator, dense: Tensor, n: int = 4000) -> None:
    """Draws are whitened by the true matrix; their second moment is then near the identity."""
    try:
        draws = op.sample(n, seed=0)
    except UnsupportedLayerError:
        return
    except NotPositiveDefiniteError as error:
        raise AssertionError(f"{type(op).__name__}.sample raised {error!r}") from error
    if draws.shape != (n, dense.shape[0]):
        raise AssertionError(f"sample(n) has shape {tuple(draws.shape)}")
    if not torch.equal(draws, op.sample(n, seed=0)):
        raise AssertionError("sample(n, seed=0) is not repeatable")
    factor = torch.linalg.cholesky(dense)
    white = torch.linalg.solve_triangular(factor, draws.detach().to(dense).mT, upper=False)
    moment = white @ white.mT / n
    error_ = float((moment - torch.eye(len(moment), device="cpu").to(moment)).abs().max())
    if error_ > 7 / n**0.5:  # of a normal of standard deviation sqrt(2 / n): about 5 sigma
        raise AssertionError(f"{type(op).__name__}.sample has a covariance off by {error_:.3g}")
