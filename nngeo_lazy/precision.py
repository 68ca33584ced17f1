"""The widest floating-point numbers that a device has."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["widened", "widest"]


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
