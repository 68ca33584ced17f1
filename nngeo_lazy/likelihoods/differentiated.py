"""Likelihoods and losses whose Hessians are made by automatic differentiation."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..errors import NNGeoError, NonFiniteError, NotPositiveDefiniteError, UnsupportedLayerError
from ..precision import widened
from .likelihood import Likelihood, standard_normal, wide

__all__ = ["Differentiated"]

TILE_BYTES = 2**26  # of Hessians that are decomposed in float64 at a time


class Differentiated(Likelihood):
    """A function of the outputs whose Hessian at them is that of the loss, or its expectation.

    The Hessian of each example is D x D for D outputs, by automatic differentiation in the outputs
    alone. Its root is from an eigendecomposition in float64. An exact quantity has D directions.
    """

    @abstractmethod
    def _curved(self, outputs: Tensor, target: Tensor | None) -> Callable[[Tensor], Tensor]:
        """From outputs g to (N,), with the wanted Hessian at g = outputs."""

    def hessian_product(self, outputs: Tensor, target: Tensor | None, vectors: Tensor) -> Tensor:
        """Reverse over reverse, one vector at a time: a loss may have no forward mode or vmap."""
        product = self._product(wide(outputs), target)
        flat = wide(vectors).reshape(-1, *outputs.shape)
        return torch.stack([product(v) for v in flat]).view(vectors.shape).to(vectors.dtype)

    def _num_exact(self, outputs: Tensor, target: Tensor | None) -> int:
        return math.prod(outputs.shape[1:])

    def _exact(self, outputs: Tensor, target: Tensor | None) -> Iterator[Tensor]:
        roots = self._roots(outputs, target)
        for j in range(roots.shape[-1]):
            yield roots[..., j].reshape(outputs.shape)

    def _normal(
        self, outputs: Tensor, target: Tensor | None, n: int, generator: torch.Generator | None
    ) -> Tensor:
        roots = self._roots(outputs, target)
        z = standard_normal(n, (*roots.shape[:2], 1), roots, generator)
        return (roots @ z).view(n, *outputs.shape)

    def _product(self, outputs: Tensor, target: Tensor | None) -> Callable[[Tensor], Tensor]:
        """H v, with the Hessian H at the outputs."""
        with _deriving():
            pullback: Callable[[Tensor], tuple[Tensor, ...]]
            curved = self._curved(outputs, target)
            gradient = torch.func.grad(lambda g: curved(g).sum())
            pullback = torch.func.vjp(gradient, outputs)[1]

        def product(vector: Tensor) -> Tensor:
            with _deriving():
                found: Tensor = pullback(vector)[0]
            return found

        return product

    def _roots(self, outputs: Tensor, target: Tensor | None) -> Tensor:
        """S (N, D, D) with S S^T the Hessian of each example.

        Raises:
            NotPositiveDefiniteError: an eigenvalue is negative beyond rounding.
            NonFiniteError: the Hessian is not finite though the outputs are.
        """
        n, size = outputs.shape[0], math.prod(outputs.shape[1:])
        product = self._product(outputs, target)
        hessians = outputs.new_zeros(n, size, size)
        for j in range(size):  # each is far cheaper than direction j's pass through the model
            unit = torch.zeros_like(outputs).reshape(n, size)
            unit[:, j] = 1
            hessians[..., j] = product(unit.view(outputs.shape)).reshape(n, size)
        finite = hessians.isfinite().all() | ~outputs.isfinite().all()
        hessians.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)  # outputs that are not are flagged
        convex = torch.ones_like(finite)
        # Entries cancel: their errors are of the size of their terms, which may be of order one
        # even if all entries are small.
        rounding = 10 * math.sqrt(size) * torch.finfo(outputs.dtype).eps
        for tile in hessians.split(max(1, TILE_BYTES // max(8 * size * size, 1))):
            values, vectors = torch.linalg.eigh(widened(tile))
            floor = -rounding * values.abs().amax(-1, keepdim=True).clamp(min=1)
            convex &= (values >= floor).all()
            tile.copy_(vectors * values.clamp(min=0).sqrt().unsqueeze(-2))
        # One wait for the device in each batch: a negative curvature must not be dropped, and
        # flags, which are read without the Hessian, cannot tell.
        is_finite, is_convex = torch.stack([finite, convex]).tolist()
        if not is_finite:
            raise NonFiniteError(
                "expected a loss with a finite Hessian in the outputs, but on some batch it is NaN "
                "or infinite though the outputs are finite: check the loss there (a root or a norm "
                "at zero?)"
            )
        if not is_convex:
            raise NotPositiveDefiniteError(
                "the loss is not convex in the outputs (its Hessian has a negative eigenvalue), so "
                "its Gauss-Newton matrix is not positive semidefinite: take Hessian, or a convex "
                "loss"
            )
        return hessians


@contextmanager
def _deriving() -> Iterator[None]:
    """Inside, a loss that is known to have values is differentiated: an error is about that."""
    try:
        yield
    except (NNGeoError, RecursionError, torch.OutOfMemoryError):
        raise
    except RuntimeError as error:
        reason = str(error).split("\n")[0]
        raise UnsupportedLayerError(
            f"the loss cannot be differentiated twice in the outputs ({reason}): write it with "
            "other functions of torch"
        ) from error
