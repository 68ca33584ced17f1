"""The numbers of a device: the widest, products of narrow ones, whether they are finite."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["HALF", "all_finite", "narrow", "widened", "widest"]

HALF = (torch.float16, torch.bfloat16)


def widest(device: torch.device | None = None) -> torch.dtype:
    """float64, or float32 on a device that has none.

    Args:
        device: where, by default the CPU.
    """
    try:
        return torch.empty((), dtype=torch.float64, device=device).dtype
    except (TypeError, RuntimeError):  # TypeError on MPS
        return torch.float32


def widened(x: Tensor) -> Tensor:
    """A tensor in the widest dtype of its device, and in no narrower one than its own."""
    return x.to(torch.promote_types(x.dtype, widest(x.device)))


def narrow(x: Tensor) -> torch.dtype | None:
    """The half precision of x, if its device adds up products of such numbers in float32.

    Products of two such numbers are exact in float32, so that nothing is lost by not widening them.
    """
    return x.dtype if x.dtype in HALF and _mixes(x.device) else None


def _mixes(device: torch.device) -> bool:
    """Whether `torch.mm` takes half precision to float32 (`out_dtype`): on CUDA, from torch 2.8."""
    known = "dtype" in torch.ops.aten.mm.overloads()
    return known and device.type == "cuda" and torch.version.cuda is not None


def all_finite(tensor: Tensor) -> Tensor:
    """Whether all numbers are finite, as a 0-d tensor; in one pass, without a mask in memory."""
    if tensor.numel() == 0:
        return torch.ones((), dtype=torch.bool, device=tensor.device)
    return torch.stack(torch.aminmax(tensor)).isfinite().all()
