"""Products with matrices that are only known as derivatives, summed over batches.

One column takes a pass over the data: J v in forward direction, the metric in the outputs, J^T u
back. Graphs of the batches are kept for later products as long as they fit into a budget.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..collectives import digest
from ..errors import DataError, UnsupportedLayerError
from ..switches import whole_transforms
from .engines import (
    MODES,
    HessianOf,
    JacobianOf,
    NotDifferentiableError,
    hessian_of,
    jacobian_of,
    kept_bytes,
)
from .opaque import Map
from .proofs import prove_hessian, prove_jacobian
from .source import BatchFunction, Memory, Middle, Source

__all__ = [
    "CACHE_BYTES",
    "GaussNewtonMap",
    "HessianMap",
    "JacobianMap",
    "TransposedMap",
]

CACHE_BYTES = 2**31  # kept graphs take at most this much, with cache="auto"
SMALL_GRAPH = {"cpu": 2**22}  # bytes of a batch's graph up to which columns pay beside others
SMALL_GRAPH_ELSEWHERE = 2**26
BATCHED_BYTES = {"cpu": 2**26}  # graphs of columns that go at once take at most this
BATCHED_BYTES_ELSEWHERE = 2**30

T = TypeVar("T")


class _SourceMap(Map):
    """A product (v, w) with a matrix at the parameters w; columns v."""

    def __init__(self, source: Source, memory: Memory) -> None:
        self._source, self._memory = source, memory

    def __call__(self, *tensors: Tensor) -> Tensor:
        v, w = tensors
        rows = v.mT.contiguous()  # one column after the other
        return self._try(lambda mode: self._run(rows, w, mode, False)).mT

    def traced(self, *tensors: Tensor) -> Tensor:
        v, w = tensors
        self._require_differentiable(w)
        return self._try(lambda mode: self._run(v.mT, w, mode, True)).mT

    def pushforward(self, k: int) -> Map:
        return _Along(self) if k == 0 else super().pushforward(k)

    def columns(self, k: int) -> bool:
        return k == 0

    def _require_differentiable(self, w: Tensor) -> None:
        """Nothing is drawn, or nobody asks how."""

    @abstractmethod
    def _run(self, rows: Tensor, w: Tensor, mode: str, taped: bool) -> Tensor:
        """The product with rows (K, n), as rows."""

    @abstractmethod
    def _linearise(
        self, batch: BatchFunction, parameters: Sequence[Tensor], mode: str, keep: bool, taped: bool
    ) -> tuple[Any, Any]:
        """A batch's derivative, and its metric."""

    # --- modes -----------------------------------------------------------------------------------

    def _try(self, run: Callable[[str], T]) -> T:
        """Run in the wanted mode; "auto" goes on to the next one if a function lacks it."""
        memory, wanted = self._memory, self._source.mode
        while True:
            mode = self._mode()
            try:
                with whole_transforms(), self._source.scope():
                    return run(mode)
            except NotDifferentiableError as error:
                memory.forget()
                memory.failed[mode] = str(error).split("\n")[0]
                if wanted == "auto" and len(memory.failed) < len(MODES):
                    continue
                raise self._impossible() from error

    def _mode(self) -> str:
        if self._source.mode != "auto":
            return self._source.mode
        order = list(MODES) if self._prefers_double_vjp() else list(reversed(MODES))
        return next((mode for mode in order if mode not in self._memory.failed), order[0])

    def _prefers_double_vjp(self) -> bool:
        """Where graphs are kept, which forward mode cannot do without tracing."""
        return self._keeps()

    def _keeps(self) -> bool:
        """Whether graphs are kept, or still wait to be measured."""
        memory = self._memory
        return self._source.cache is not False and (not memory.too_large or memory.partial)

    def _keepable(self, mode: str) -> bool:
        return mode == "double_vjp" or self._source.cache is True

    def _impossible(self) -> UnsupportedLayerError:
        failed = self._memory.failed
        reasons = "; ".join(f"{mode}: {reason}" for mode, reason in failed.items())
        others = [mode for mode in MODES if mode not in failed]
        self._memory.failed = {}  # another call may differentiate less
        if others:
            return UnsupportedLayerError(
                f"a function of the model cannot be differentiated so ({reasons}): take "
                f"Implicit(mode={others[0]!r})"
            )
        return UnsupportedLayerError(
            f"a function of the model cannot be differentiated as a product with this matrix needs "
            f"({reasons}): replace it, or take a structured representation such as 'kfac'"
        )

    # --- batches ---------------------------------------------------------------------------------

    def _linearised(self, w: Tensor, mode: str, taped: bool) -> Iterator[tuple[Any, Any]]:
        """The derivative of each batch, from memory where it is kept."""
        source, memory = self._source, self._memory
        if taped:
            parameters = self._split(w if w.requires_grad else w.detach().requires_grad_())
            for batch in source.batches():
                yield self._linearise(batch, parameters, mode, False, True)
            return
        kept = memory.kept(w) if self._keeps() and self._keepable(mode) else None
        yield from kept or ()
        if kept is not None and memory.complete:
            return
        fits = kept is not None and not memory.too_large
        parameters = [p.detach().requires_grad_() for p in self._split(w)]
        growing: list[tuple[Any, Any]] = []
        held_bytes = 0
        for batch in source.batches(len(kept or ())):
            with kept_bytes() as alive:
                made = self._linearise(batch, parameters, mode, fits, False)
                memory.graph_bytes = max(memory.graph_bytes, alive())
                held_bytes += alive()
            if fits and source.cache == "auto" and held_bytes > CACHE_BYTES:
                fits = False  # a loader of its own may have another order: all or nothing
                growing = growing if source.held else []
            if fits:
                growing.append(made)
            yield made
            del made
        memory.proved = True  # on every batch
        if kept is not None:
            kept += growing
            memory.complete, memory.too_large = fits, not fits

    def _split(self, w: Tensor) -> list[Tensor]:
        """A flat vector (P,) by parameter."""
        shapes = self._source.space.shapes
        parts = w.split([shape.numel() for shape in shapes])
        return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]

    # --- columns ---------------------------------------------------------------------------------

    def _each(self, function: Callable[[Tensor], Tensor], rows: Tensor, taped: bool) -> Tensor:
        """A linear function of every row (K, ...): several at once if that is faster."""
        k = rows.shape[0]
        if k == 1:
            return function(rows[0]).unsqueeze(0)
        size = self._batched(rows)
        if size > 1 and not taped:
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("error", message=".*performance drop.*")
                    out: Tensor = torch.func.vmap(function, chunk_size=size)(rows)
                    return out
            except (RuntimeError, NotImplementedError, UserWarning):
                self._memory.batched = False  # vmap cannot follow
        return torch.stack([function(row) for row in rows])

    def _batched(self, rows: Tensor) -> int:
        """How many columns to take at once."""
        if not self._memory.batched:
            return 1
        if self._source.chunk_size is not None:
            return self._source.chunk_size
        device, size = rows.device.type, self._memory.graph_bytes
        if size > SMALL_GRAPH.get(device, SMALL_GRAPH_ELSEWHERE):
            return 1
        return max(1, BATCHED_BYTES.get(device, BATCHED_BYTES_ELSEWHERE) // max(1, size))


class _JacobianSourceMap(_SourceMap):
    def _linearise(
        self, batch: BatchFunction, parameters: Sequence[Tensor], mode: str, keep: bool, taped: bool
    ) -> tuple[JacobianOf, Middle]:
        made = jacobian_of(mode, batch.values, parameters, keep=keep, taped=taped)
        values = made.values if taped else made.values.detach()
        if not taped and not self._memory.proved:
            prove_jacobian(made, batch, parameters, mode)
        return made, batch.metric(values)


class GaussNewtonMap(_JacobianSourceMap):
    """sum_n J_n^T S_n S_n^T J_n v / total; symmetric."""

    def pullback(self, k: int) -> Map:
        """(g, *tensors) to the gradient of <g, value> in tensor k."""
        return _Along(self) if k == 0 else super().pullback(k)

    def _require_differentiable(self, w: Tensor) -> None:
        if self._source.random and w.requires_grad:
            raise UnsupportedLayerError(
                "an 'mc' matrix has no derivative in the parameters, since its labels are drawn "
                "from them, nor has 'empirical_positions', which holds its scores fixed: take "
                "estimator='exact' or 'empirical', or F.at(w.detach())"
            )

    def _run(self, rows: Tensor, w: Tensor, mode: str, taped: bool) -> Tensor:
        total: Tensor | None = None
        inner, ones = _zero(rows), _zero(rows)
        scale = 1 / self._source.total  # in the outputs, which are fewer
        for jacobian, metric in self._linearised(w, mode, taped):

            def product(
                row: Tensor, jacobian: JacobianOf = jacobian, metric: Middle = metric
            ) -> Tensor:
                along = metric.product(jacobian.jvp(self._split(row)))
                return _flat(jacobian.vjp(along * scale))

            total = _sum(total, self._each(product, rows, taped), taped)
            if self._source.center:

                def along_ones(row: Tensor, jacobian: JacobianOf = jacobian) -> Tensor:
                    return jacobian.jvp(self._split(row)).sum()

                inner = inner + self._each(along_ones, rows, taped)
                ones = ones + _flat(jacobian.vjp(torch.ones_like(jacobian.values)))
        if self._source.center:  # every value is an example's loss
            mean = ones * (scale / self._source.num_examples)
            total = _some(total, rows) - inner.unsqueeze(-1) * mean
        return _some(total, rows)

    def draw(self, n: int, w: Tensor, generator: torch.Generator | None) -> Tensor:
        """Rows (n, P) of N(0, the matrix): J^T S z for standard normal z."""
        group, device = self._source.group, w.device if generator is None else generator.device
        seed = int(torch.randint(2**62, (), generator=generator, device=device))
        seed = seed if generator is not None else group.same(seed)

        def run(mode: str) -> Tensor:  # the same draws in another mode
            own = torch.Generator(device=device).manual_seed(seed)
            total = torch.zeros(n, len(self._source.space), dtype=w.dtype, device=w.device)
            inner, ones = _zero(total), _zero(total)
            for jacobian, metric in self._linearised(w, mode, False):
                z = metric.sample(n, own)

                def pulled(u: Tensor, jacobian: JacobianOf = jacobian) -> Tensor:
                    return _flat(jacobian.vjp(u))

                total += self._each(pulled, z, False)
                if self._source.center:
                    inner = inner + z.flatten(1).sum(1)
                    ones = ones + _flat(jacobian.vjp(torch.ones_like(jacobian.values)))
            if self._source.center:
                total -= inner.unsqueeze(-1) * (ones / self._source.num_examples)
            drawn: Tensor = total / self._source.total**0.5
            return drawn

        with group.together("draws", n, seed, digest(w)):
            drawn = self._try(run)
        group.sum_([drawn])
        return drawn


class HessianMap(_SourceMap):
    """sum_n H_n v / total; symmetric."""

    def pullback(self, k: int) -> Map:
        """(g, *tensors) to the gradient of <g, value> in tensor k."""
        return _Along(self) if k == 0 else super().pullback(k)

    def _prefers_double_vjp(self) -> bool:
        return True  # forward over reverse is no faster, kept or not

    def _linearise(
        self, batch: BatchFunction, parameters: Sequence[Tensor], mode: str, keep: bool, taped: bool
    ) -> tuple[HessianOf, None]:
        made = hessian_of(mode, batch.values, parameters, keep=keep, taped=taped)
        if not taped and not self._memory.proved:
            prove_hessian(made, batch, parameters, mode)
        return made, None

    def _run(self, rows: Tensor, w: Tensor, mode: str, taped: bool) -> Tensor:
        total: Tensor | None = None
        for hessian, _ in self._linearised(w, mode, taped):

            def product(row: Tensor, hessian: HessianOf = hessian) -> Tensor:
                return _flat(hessian.product(self._split(row)))

            total = _sum(total, self._each(product, rows, taped), taped)
        return _some(total, rows) / self._source.total


class JacobianMap(_JacobianSourceMap):
    """J v (K, N C), less its mean over examples if it is centered."""

    def pullback(self, k: int) -> Map:
        """(g, *tensors) to the gradient of <g, value> in tensor k."""
        if k == 0:
            return _Along(TransposedMap(self._source, self._memory))
        return super().pullback(k)

    def _run(self, rows: Tensor, w: Tensor, mode: str, taped: bool) -> Tensor:
        parts = []
        for jacobian, _ in self._linearised(w, mode, taped):

            def product(row: Tensor, jacobian: JacobianOf = jacobian) -> Tensor:
                return jacobian.jvp(self._split(row)).flatten()

            parts.append(self._each(product, rows, taped))
        return _centered(torch.cat(parts, 1), self._source)


class TransposedMap(_JacobianSourceMap):
    """J^T u (K, P)."""

    def pullback(self, k: int) -> Map:
        """(g, *tensors) to the gradient of <g, value> in tensor k."""
        if k == 0:
            return _Along(JacobianMap(self._source, self._memory))
        return super().pullback(k)

    def _run(self, rows: Tensor, w: Tensor, mode: str, taped: bool) -> Tensor:
        rows = _centered(rows, self._source)
        total: Tensor | None = None
        start = 0
        for jacobian, _ in self._linearised(w, mode, taped):
            values = jacobian.values
            own = rows[:, start : start + values.numel()].unflatten(1, values.shape)
            start += values.numel()

            def product(u: Tensor, jacobian: JacobianOf = jacobian) -> Tensor:
                return _flat(jacobian.vjp(u))

            total = _sum(total, self._each(product, own, taped), taped)
        if start != rows.shape[1]:
            raise DataError(
                f"expected the same {rows.shape[1]} outputs on every pass, but the loader gave "
                f"{start}: it must have a fixed length and order"
            )
        return _some(total, rows)


class _Along(Map):
    """(g, v, w) to the product of g at w: a derivative in v, of which v is no part."""

    def __init__(self, product: Map) -> None:
        self._product = product

    def __call__(self, *tensors: Tensor) -> Tensor:
        return self._product(tensors[0], tensors[2])

    def traced(self, *tensors: Tensor) -> Tensor:
        return self._product.traced(tensors[0], tensors[2])

    def pullback(self, k: int) -> Map:
        return _Dropped(self._product.pullback(0 if k == 0 else 1), k)

    def columns(self, k: int) -> bool:
        return k == 0


class _Dropped(Map):
    """(h, g, v, w): the pullback of a product (g, w), which v is no part of."""

    def __init__(self, inner: Map, k: int) -> None:
        self._inner, self._k = inner, k

    def __call__(self, *tensors: Tensor) -> Tensor:
        h, g, v, w = tensors
        return torch.zeros_like(v) if self._k == 1 else self._inner(h, g, w)

    def traced(self, *tensors: Tensor) -> Tensor:
        h, g, v, w = tensors
        return torch.zeros_like(v) if self._k == 1 else self._inner.traced(h, g, w)


def _flat(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([p.reshape(-1) for p in parts])


def _sum(total: Tensor | None, added: Tensor, taped: bool) -> Tensor:
    if total is None:
        return added
    return total + added if taped else total.add_(added)


def _some(total: Tensor | None, like: Tensor) -> Tensor:
    """What was summed, of at least one batch."""
    return torch.zeros_like(like) if total is None else total


def _zero(like: Tensor) -> Tensor:
    return torch.zeros((), dtype=like.dtype, device=like.device)


def _centered(rows: Tensor, source: Source) -> Tensor:
    """Rows (K, N C), less their mean over the N examples."""
    if not source.center:
        return rows
    by_example = rows.unflatten(1, (source.num_examples, -1))
    centered: Tensor = (by_example - by_example.mean(1, keepdim=True)).flatten(1)
    return centered
