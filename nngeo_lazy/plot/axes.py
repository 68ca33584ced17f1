"""The Axes to draw on."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["axes"]


def axes(ax: Axes | None) -> Axes:
    """The given one, or a new one.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(
            "nngeo_lazy.plot needs matplotlib: pip install 'nngeo_lazy[plot]'"
        ) from error
    return pyplot.subplots(layout="constrained")[1] if ax is None else ax
