"""Matrix-free representations: nothing is stored but the parameters."""

from __future__ import annotations

from dataclasses import dataclass

from ..derivatives.engines import MODES
from ..errors import DataError

__all__ = ["Implicit"]


@dataclass(frozen=True)
class Implicit:
    """The exact matrix as products: each passes over the data and differentiates the network.

    The operator holds the loader, a copy of the selected parameters and of all buffers. Memory P,
    and the graph of one batch; with a cache the graphs of all, so that a product costs a forward-
    mode and a reverse-mode pass, without a forward pass.

    Args:
        mode: "double_vjp" (reverse mode alone, which every architecture has),
            "forward_over_reverse", or "auto": double_vjp where graphs are kept and for Hessians,
            forward_over_reverse elsewhere; and the other one where a function of the model lacks a
            derivative.
        cache: True keeps the graphs of all batches, False none, "auto" keeps them up to 2 GiB: all
            or none, unless the batches are held in a list.
        chunk_size: so many columns go at once, by vmap; by default as many as pay, one after the
            other where they are large.
        check: whether the first batch is evaluated twice, to refuse a random model.

    Raises:
        DataError: an unknown mode or cache, a chunk_size below one.

    Source:
        Pearlmutter (1994), Fast exact multiplication by the Hessian; Schraudolph (2002), Fast
        curvature matrix-vector products for second-order gradient descent.
    """

    mode: str = "auto"
    cache: str | bool = "auto"
    chunk_size: int | None = None
    check: bool = True

    def __post_init__(self) -> None:
        if self.mode not in ("auto", *MODES):
            raise DataError(f"expected mode 'auto' or one of {list(MODES)}, got {self.mode!r}")
        if self.cache not in ("auto", True, False):
            raise DataError(f"expected cache 'auto', True or False, got {self.cache!r}")
        size = self.chunk_size
        if size is not None and (not isinstance(size, int) or size < 1):
            raise DataError(f"expected chunk_size to be a positive integer or None, got {size!r}")
