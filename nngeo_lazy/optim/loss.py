"""What is known of a loop's loss: its scale, and what its gradients show of the curvature."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..likelihoods.likelihood import wide

__all__ = ["Loss", "Units"]

KEPT = 0.95  # of averages, on each refresh


class Units(NamedTuple):
    """What a refresh tells of the loop's loss.

    Attributes:
        scale: c, with the loop's loss c times the mean loss of a label.
        curvature: F times this is the curvature of that mean.
        dispersion: of a Gaussian's labels; None for other likelihoods.
    """

    scale: Tensor
    curvature: Tensor
    dispersion: Tensor | None


@dataclass
class Loss:
    """The latest of what is known of a loop's loss.

    Attributes:
        scale: what gradients are divided by.
        unit: what the curvature is multiplied by.
        dispersion: of a Gaussian's labels.
        squares: running averages of the mean square of each parameter's gradient, and of 1 ("").
        sizes: of those parameters.
    """

    scale: Tensor | None = None
    unit: Tensor | float = 1.0
    dispersion: Tensor | None = None
    squares: dict[str, Tensor] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)

    def take(self, found: Units, ratio: Tensor | None, gradients: Mapping[str, Tensor]) -> None:
        """Take over what a refresh found.

        Gradients that were multiplied since (unscaled, clipped) are those of a loss that was. So
        that a clip shrinks a step, the largest multiple of late is what counts.

        Args:
            found: by the refresh.
            ratio: what gradients were multiplied by.
            gradients: as they are now.
        """
        scale = found.scale
        if ratio is not None:
            multiplied = scale * ratio
            before = multiplied if self.scale is None else self.scale
            most = torch.maximum(multiplied, before.lerp(multiplied, 0.02))
            scale = torch.where((ratio - 1).abs() < 1e-3, scale, most)
        self.scale, self.unit, self.dispersion = scale, found.curvature, found.dispersion
        self._see(gradients)

    def _see(self, gradients: Mapping[str, Tensor]) -> None:
        """Take gradients into the averages of their squares, in the units of the curvature."""
        if self.scale is None:
            return
        unit = wide(self.scale).square() * (1.0 if self.dispersion is None else self.dispersion)
        found = {n: wide(g).square().mean() / unit for n, g in gradients.items()}
        found[""] = torch.ones_like(unit)
        if bool(torch.stack(list(found.values())).isfinite().all()):
            held, none = self.squares, torch.zeros_like(unit)
            self.sizes = self.sizes | {n: g.numel() for n, g in gradients.items()}
            self.squares = {  # no gradient is a zero one: of a layer that was dropped
                n: (1 - KEPT) * found.get(n, none) + KEPT * held.get(n, none) for n in held | found
            }

    @property
    def least(self) -> dict[str, Tensor]:
        """What a mean eigenvalue cannot be below, by parameter, times the unit.

        The squared mean of gradients is at most the mean of their squares, the trace of the
        curvature if the model fits its labels. That of a model that is certain, and wrong, is zero.
        """
        return {n: x / self.squares[""] for n, x in self.squares.items() if n}

    def floors(self) -> dict[str, float]:
        """The same without the unit, as numbers, which may wait for the device."""
        return {name: float(x / self.unit) for name, x in self.least.items()}

    def floor(self, rank: int, names: Collection[str] | None = None) -> float:
        """The same for the mean of the eigenvalues that are not zero.

        Args:
            rank: at the most so many are not zero.
            names: of the parameters; by default all.
        """
        known = {n: x for n, x in self.floors().items() if names is None or n in names}
        trace = sum(x * self.sizes[name] for name, x in known.items())
        return trace / max(1, min(rank, sum(self.sizes[name] for name in known)))

    def state(self) -> dict[str, Any]:
        """All of it."""
        return copy.deepcopy(vars(self))

    @classmethod
    def of(cls, state: Mapping[str, Any], device: torch.device) -> Loss:
        """From a state."""
        return cls(**pytree.tree_map_only(Tensor, lambda x: x.to(device).clone(), dict(state)))
