"""The outputs of a linearised network under a normal distribution of its parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..builders import Jacobian
from ..data import Batches
from ..errors import DataError, NonFiniteError, TooLargeError
from ..jacobian.forms import Form
from ..network import Network
from ..operators import BaseLinearOperator
from ..operators.kernel import kernel_of
from ..prediction import Prediction
from ..quantities import Outputs
from ..representations.form_stack import joined, stored
from ..rowwise import Piece, as_outputs, quadratics
from ..space import ParamSpace
from ..sweep import make_sweep
from ..switches import own_arithmetic

__all__ = ["Held", "Linearised", "labelled"]

MAX_BYTES = 2**33  # of covariances
UNBOUNDED = 2**62  # directions: the last layer's cost no backward pass


class Held:
    """Batches of any kind, also bare tensors, as a loader."""

    def __init__(self, batches: list[Any]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self._batches)


def labelled(batches: Batches, what: str) -> tuple[Held, list[Any]]:
    """All batches, and the target of each.

    Raises:
        DataError: a batch has none, and `what` ("the noise is fitted to") needs it.
    """
    held, targets = [], []
    with closing(iter(batches)) as each:
        for batch in each:
            if batch.target is None:
                raise DataError(
                    f"{what} labels, but the batch has no target: pass (inputs, target) batches, "
                    "or target="
                )
            held.append(batch.raw)
            targets.append(batch.target)
    return Held(held), targets


@dataclass(frozen=True)
class Linearised:
    """A network as a linear function of its parameters around a point.

    Attributes:
        network: the function.
        space: its parameters.
        mean: the point (P,).
        forward: as it was given.
    """

    network: Network
    space: ParamSpace
    mean: Tensor
    forward: Callable[[nn.Module, Any], Tensor] | None

    def under(
        self, M: BaseLinearOperator, x: Any, covariance: str, joint: bool, most: int
    ) -> tuple[Prediction, torch.Size]:
        """The distribution of outputs under parameters N(mean, M), and the shape of an example's.

        Args:
            M: P x P.
            x: whatever a loader may be.
            covariance: "full" or "diagonal".
            joint: whether inputs are correlated.
            most: outputs of an example, each of which is a backward pass.
        """
        if isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled():
            return self._taped(M, x, covariance, joint)
        with own_arithmetic(), torch.no_grad():
            if joint:
                return self._joint(M, x)
            return self._apart(M, x, covariance == "full", most)

    def _model(self) -> nn.Module:
        with self.network.scope():  # which refuses parameters that changed
            return self.network.at(self.mean)

    def _apart(
        self, M: BaseLinearOperator, x: Any, full: bool, most: int
    ) -> tuple[Prediction, torch.Size]:
        sweep = make_sweep(
            Outputs(held=full),
            self._model(),
            x,
            params=list(self.space.names),
            forward=self.forward,
            max_directions=UNBOUNDED,
        )
        means, spreads, size = [], [], 0
        with closing(sweep.pieces()) as pieces:
            for piece in pieces:
                with torch.no_grad():
                    outputs, count = piece.recorded.outputs, piece.count
                    size += len(outputs) * count * (count if full else 1) * M.dtype.itemsize
                    _require_room(size, count)
                    means.append(outputs)
                    found = as_outputs(piece, M, full=full)
                    if found is None:
                        _require_few(count, most)
                        found = _passed_back(piece, M, full)
                    spreads.append(found.to(outputs.dtype))
        mean, spread = torch.cat(means), torch.cat(spreads)
        _require_finite(spread)
        kind = "full" if full else "diagonal"
        return Prediction(mean.reshape(len(mean), -1), spread, kind), mean.shape[1:]

    def _joint(self, M: BaseLinearOperator, x: Any) -> tuple[Prediction, torch.Size]:
        model, names = self._model(), list(self.space.names)
        batches = Batches(x, device=self.space.device, forward=self.forward)
        held = Held([batch.raw for batch in batches])  # one order for both passes
        mean = torch.cat([batches.forward(model, raw).detach() for raw in held])
        _require_room(mean.numel() ** 2 * M.dtype.itemsize, mean[0].numel())
        J = Jacobian(
            model, held, "factored", params=names, forward=self.forward, max_directions=UNBOUNDED
        )
        dense = kernel_of(J, J, M).to_dense()
        return Prediction(mean.reshape(len(mean), -1), dense, "joint"), mean.shape[1:]

    def _taped(
        self, M: BaseLinearOperator, x: Tensor, covariance: str, joint: bool
    ) -> tuple[Prediction, torch.Size]:
        """With a graph to the inputs: an example at a time, all of whose rows are held."""
        mean, J = self.network.taped_rows(self.mean, x)
        with torch.enable_grad():
            products = (M @ J.mT).mT
            if joint:
                return Prediction(mean.flatten(1), J @ products.mT, "joint"), mean.shape[1:]
            if covariance == "diagonal":
                spread = (J * products).sum(1).unflatten(0, (len(mean), -1))
            else:
                one, other = (each.unflatten(0, (len(mean), -1)) for each in (J, products))
                spread = one @ other.mT
        return Prediction(mean.reshape(len(mean), -1), spread, covariance), mean.shape[1:]


def _passed_back(piece: Piece, M: BaseLinearOperator, full: bool) -> Tensor:
    """From a backward pass for each output; only for all pairs are their forms held."""
    if not full:
        return torch.cat([quadratics(f, piece.parts, M, full=False) for f in piece.forms()], 1)
    chunks = [[stored(form) for form in forms] for forms in piece.forms()]
    forms: list[Form | None] = [joined(each) for each in zip(*chunks, strict=True)]
    return quadratics(forms, piece.parts, M, full=True)


def _require_room(size: int, count: int) -> None:
    if size > MAX_BYTES:
        raise TooLargeError(
            f"the covariances of {count} outputs of an example take more than the limit of "
            f"{MAX_BYTES / 2**30:.0f} GiB: take covariance='diagonal', or fewer inputs at a time"
        )


def _require_few(count: int, most: int) -> None:
    if count > most:
        raise TooLargeError(
            f"variances of {count} outputs of an example take a backward pass for each, more than "
            f"max_directions={most}: raise max_directions, or take a posterior over the last layer "
            "(F with params=), whose variances need no pass"
        )


def _require_finite(spread: Tensor) -> None:
    if not bool(spread.isfinite().all()):
        raise NonFiniteError(
            "the variances of the outputs contain NaN or infinity: gradients overflow. Check the "
            "inputs and the parameters, or take a wider dtype (model.float())"
        )
