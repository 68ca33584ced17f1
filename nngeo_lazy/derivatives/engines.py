"""Derivatives of one batch in the parameters, at one point: J v, J^T u and H v.

Two ways, which give the same numbers. *double_vjp*: with u -> J^T u taped, J v is its derivative in
u: reverse mode alone, which every model has, and whose graph can be kept for many products.
*forward_over_reverse*: J v in forward mode, which keeps nothing, or keeps a linearisation.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..errors import NNGeoError
from .smooth_layers import NotDifferentiableError, composed, frozen, without_padding

__all__ = [
    "MODES",
    "Function",
    "HessianOf",
    "JacobianOf",
    "NotDifferentiableError",
    "hessian_of",
    "jacobian_of",
    "kept_bytes",
    "lowest_precision",
]

Function: TypeAlias = Callable[[Sequence[Tensor]], Tensor]
MODES = ("double_vjp", "forward_over_reverse")


@contextmanager
def _deriving() -> Iterator[None]:
    """Inside, a function that has a value is differentiated: an error is about that."""
    try:
        yield
    except (NNGeoError, NotDifferentiableError, RecursionError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, NotImplementedError) as error:
        raise NotDifferentiableError(str(error).split("\n")[0]) from error


_ONCE = "a function's backward pass cannot be differentiated twice"


class JacobianOf(ABC):
    """The Jacobian of a function of the parameters at one point, as products.

    Attributes:
        values: of the function there, with the graph if it is differentiable.
    """

    values: Tensor

    @abstractmethod
    def jvp(self, tangents: Sequence[Tensor]) -> Tensor:
        """J v, shaped like the values; v by parameter."""

    @abstractmethod
    def vjp(self, cotangent: Tensor) -> list[Tensor]:
        """J^T u by parameter; u is shaped like the values."""


class HessianOf(ABC):
    """The Hessian of a scalar function of the parameters at one point, as products."""

    @abstractmethod
    def product(self, tangents: Sequence[Tensor]) -> list[Tensor]:
        """H v by parameter."""


def jacobian_of(
    mode: str, function: Function, parameters: Sequence[Tensor], *, keep: bool, taped: bool
) -> JacobianOf:
    """The Jacobian at `parameters`.

    Args:
        mode: one of `MODES`.
        function: parameters to values.
        parameters: leaves that require a gradient, or, taped, any tensors.
        keep: whether many products are to come, so that forward mode is linearised once.
        taped: whether products are to be differentiable in the parameters.
    """
    function = composed(function, taped)
    if mode == "double_vjp":
        return _DoubleVJP(function, parameters, taped)
    return _Forward(without_padding(function), parameters, keep, taped)


def hessian_of(
    mode: str, function: Function, parameters: Sequence[Tensor], *, keep: bool, taped: bool
) -> HessianOf:
    """The Hessian at `parameters`; arguments as `jacobian_of`."""
    function = composed(function, taped)
    if mode == "double_vjp":
        return _DoubleBackward(function, parameters, taped)
    return _ForwardOverReverse(without_padding(function), parameters, keep, taped)


class _DoubleVJP(JacobianOf):
    def __init__(self, function: Function, parameters: Sequence[Tensor], taped: bool) -> None:
        self._parameters, self._taped = list(parameters), taped
        with torch.enable_grad():
            # without a tape, the graph of u -> J^T u alone: cheaper, and linear in u
            self.values = function(parameters) if taped else frozen(function)(parameters)
            # Products do not depend on u: one number, whatever the size of the outputs.
            zero = torch.zeros((), dtype=self.values.dtype, device=self.values.device)
            self._u = zero.expand(self.values.shape).detach().requires_grad_()
            pulled = _grad(self.values, self._parameters, self._u, True)
        self._linear = [(k, g) for k, g in enumerate(pulled) if g is not None and g.requires_grad]

    def jvp(self, tangents: Sequence[Tensor]) -> Tensor:
        if not self._linear:
            return torch.zeros_like(self.values)
        outputs = [g for _, g in self._linear]
        weights = [tangents[k] for k, _ in self._linear]
        (out,) = _grad(outputs, [self._u], weights, self._taped)
        if out is None:
            raise NotDifferentiableError(_ONCE)
        return out

    def vjp(self, cotangent: Tensor) -> list[Tensor]:
        found = _grad(self.values, self._parameters, cotangent, self._taped)
        return _filled(found, self._parameters)


class _Forward(JacobianOf):
    def __init__(
        self, function: Function, parameters: Sequence[Tensor], keep: bool, taped: bool
    ) -> None:
        self._function, self._parameters, self._taped = function, tuple(parameters), taped
        with torch.enable_grad():
            self.values = function(parameters)
        self._linear: Callable[..., Any] | None = None
        if keep:
            self._linear = _linearised(lambda *p: function(p), parameters)

    def jvp(self, tangents: Sequence[Tensor]) -> Tensor:
        out: Tensor
        if self._linear is not None:
            with torch.no_grad(), _deriving():
                out = self._linear(*tangents)
            return out
        with torch.set_grad_enabled(self._taped):
            out = _jvp(lambda *p: self._function(p), self._parameters, tangents)
        return out

    def vjp(self, cotangent: Tensor) -> list[Tensor]:
        found = _grad(self.values, self._parameters, cotangent, self._taped)
        return _filled(found, self._parameters)


class _DoubleBackward(HessianOf):
    def __init__(self, function: Function, parameters: Sequence[Tensor], taped: bool) -> None:
        self._parameters, self._taped = list(parameters), taped
        with torch.enable_grad():
            found = _grad(function(parameters), self._parameters, None, True)
        self._gradients = [(k, g) for k, g in enumerate(found) if g is not None and g.requires_grad]

    def product(self, tangents: Sequence[Tensor]) -> list[Tensor]:
        found: Sequence[Tensor | None] = [None] * len(self._parameters)
        if self._gradients:
            outputs = [g for _, g in self._gradients]
            weights = [tangents[k] for k, _ in self._gradients]
            found = _grad(outputs, self._parameters, weights, self._taped)
            if all(g is None for g in found):
                raise NotDifferentiableError(_ONCE)
        return _filled(found, self._parameters)


class _ForwardOverReverse(HessianOf):
    def __init__(
        self, function: Function, parameters: Sequence[Tensor], keep: bool, taped: bool
    ) -> None:
        self._parameters, self._taped = tuple(parameters), taped
        every = tuple(range(len(self._parameters)))
        self._gradient = torch.func.grad(lambda *p: function(p), argnums=every)
        self._linear: Callable[..., Any] | None = None
        if keep:
            self._linear = _linearised(self._gradient, parameters)

    def product(self, tangents: Sequence[Tensor]) -> list[Tensor]:
        if self._linear is not None:
            with torch.no_grad(), _deriving():
                return list(self._linear(*tangents))
        with torch.set_grad_enabled(self._taped):
            out = _jvp(self._gradient, self._parameters, tangents)
        return list(out)


def _jvp(function: Callable[..., Any], parameters: Any, tangents: Sequence[Tensor]) -> Any:
    with _deriving():
        return torch.func.jvp(function, tuple(parameters), tuple(tangents))[1]


def _grad(
    outputs: Any, inputs: Sequence[Tensor], weights: Any, create_graph: bool
) -> Sequence[Tensor | None]:
    """Reverse mode, whose graph stays for the next product; None if nothing depends."""
    several = outputs if isinstance(outputs, list) else [outputs]
    if not any(t.requires_grad for t in several):
        return [None] * len(inputs)
    with _deriving():
        return torch.autograd.grad(
            outputs,
            list(inputs),
            weights,
            create_graph=create_graph,
            retain_graph=True,
            allow_unused=True,
        )


def _linearised(function: Callable[..., Any], parameters: Sequence[Tensor]) -> Callable[..., Any]:
    """The forward-mode derivative as a traced function of the tangents alone."""
    detached = tuple(p.detach() for p in parameters)
    with torch.no_grad(), warnings.catch_warnings(), _deriving():
        warnings.filterwarnings("ignore", message="Attempted to insert a get_attr Node")
        _, linear = torch.func.linearize(function, *detached)
        # A trace of functions that work in place changes its own constants with each product.
        probes = tuple(torch.ones_like(p) for p in detached)
        first, second = (tree_leaves(linear(*probes)) for _ in range(2))
    if all(_repeats(a, b) for a, b in zip(first, second, strict=True)):
        return linear
    return lambda *tangents: torch.func.jvp(function, detached, tangents)[1]


def _repeats(first: Tensor, second: Tensor) -> bool:
    limit = torch.finfo(first.dtype).eps ** 0.75 * first.norm()
    return bool((first - second).norm() <= limit)


def _filled(found: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, like, strict=True)]


class _Lowest(TorchDispatchMode):
    """The coarsest floating-point dtype that an operation returns while it is active."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtype = dtype

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                self.dtype = max(self.dtype, tensor.dtype, key=lambda d: torch.finfo(d).eps)
        return out


def lowest_precision(function: Function, parameters: Sequence[Tensor]) -> torch.dtype:
    """The coarsest floating-point dtype in which a function computes."""
    lowest = _Lowest(parameters[0].dtype)
    with lowest, torch.enable_grad():
        function(parameters)
    return lowest.dtype


class _Reference(StorageWeakRef):
    """A reference that may go away half made, when an interrupt comes in between."""

    def __del__(self) -> None:
        if hasattr(self, "_free_weak_ref"):
            super().__del__()  # type: ignore[no-untyped-call]


SPARSE = {
    torch.sparse_coo: ("_indices", "_values"),
    **dict.fromkeys(
        (torch.sparse_csr, torch.sparse_bsr), ("crow_indices", "col_indices", "values")
    ),
    **dict.fromkeys(
        (torch.sparse_csc, torch.sparse_bsc), ("ccol_indices", "row_indices", "values")
    ),
}


def _dense_parts(tensor: Tensor) -> list[Tensor]:
    """The tensors that hold its memory; none of a layout that tells nobody."""
    if tensor.layout is torch.strided:
        return [tensor]
    return [getattr(tensor, name)() for name in SPARSE.get(tensor.layout, ())]


class _Made(TorchDispatchMode):
    """Weak references to the memory that operations make while it is active."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.storages: dict[int, tuple[Any, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            for part in _dense_parts(tensor) if isinstance(tensor, Tensor) else ():
                storage = part.untyped_storage()
                reference = _Reference(storage)  # type: ignore[no-untyped-call]
                self.storages[reference.cdata] = (reference, storage.nbytes())
        return out

    @property
    def alive(self) -> int:
        return sum(size for reference, size in self.storages.values() if not reference.expired())


@contextmanager
def kept_bytes() -> Iterator[Callable[[], int]]:
    """How many bytes of what is made inside are still alive when asked: what a graph holds."""
    made = _Made()
    with made:
        yield lambda: made.alive
