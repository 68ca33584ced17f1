"""The choice of a prior: by the evidence, or by held-out labels."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from scipy import optimize
from torch import Tensor, nn

from .. import tree
from ..data import Batches
from ..errors import (
    ConvergenceWarning,
    DataError,
    EstimateWarning,
    NotPositiveDefiniteError,
    UnsupportedLayerError,
    wrong_option,
)
from ..likelihoods import Likelihood
from ..likelihoods.names import reading_of
from ..operators import BaseLinearOperator
from ..operators.damping import DampingLike
from ..prediction import nll
from ..space import ParamSpace
from ..switches import outside_inference
from .checks import positive
from .outputs import labelled
from .variance import scaled

__all__ = ["chosen", "maximised"]

STRUCTURES = ("scalar", "layer", "diagonal")
GRID = 21
TOO_FAR = 100.0  # nats below the least evidence so far, of a step that is taken back


class Posterior(Protocol):
    """What is fitted."""

    space: ParamSpace
    operator: BaseLinearOperator
    prior_precision: DampingLike
    likelihood: Likelihood | None
    _noise: float | Tensor

    def _evidence(self, given: DampingLike, noise: float | Tensor) -> Tensor: ...
    def with_prior(self, prior_precision: DampingLike) -> Any: ...
    def _require_likelihood(self, what: str) -> Likelihood: ...


P = TypeVar("P", bound=Posterior)


def maximised(
    la: Posterior, structure: str, noise: bool, bounds: tuple[float, float], max_iter: int
) -> tuple[DampingLike, float]:
    """The prior precision and the noise of most evidence; see `Laplace.fit_prior_precision`."""
    if structure not in STRUCTURES:
        raise ValueError(wrong_option("structure", structure, STRUCTURES, "laplace"))
    if noise:
        scaled(la._require_likelihood("a noise"), 1.0)
    groups = _groups(la.space, structure)
    start = positive(la.operator, la.prior_precision).detach().double()
    means = [float(start[index.to(start.device)].log().mean()) for index in groups.values()]
    x0 = start.log().cpu().numpy() if structure == "diagonal" else np.array(means)
    limits = [(math.log(bounds[0]), math.log(bounds[1]))] * len(x0)
    x0 = np.clip(x0, *limits[0])
    if noise:
        x0 = np.append(x0, math.log(float(la._noise)))
        limits.append((math.log(1e-12), math.log(1e12)))
    device = start.device

    def read(logs: Tensor) -> tuple[DampingLike, float | Tensor]:
        values = logs[:-1].exp() if noise else logs.exp()
        return _prior(values, structure, groups), logs[-1].exp() if noise else la._noise

    found_so_far: list[float] = []

    def negative(x: Any) -> tuple[float, Any]:
        logs = torch.tensor(x, dtype=torch.float64, device=device, requires_grad=True)
        try:
            with torch.enable_grad():
                evidence = la._evidence(*read(logs))
                evidence.backward()
        except NotPositiveDefiniteError:  # a prior below the rounding of F: the step is too long
            if not found_so_far:
                raise
            return max(found_so_far) + TOO_FAR, np.zeros_like(x)
        found_so_far.append(-float(evidence.detach()))
        slope = torch.zeros_like(logs) if logs.grad is None else logs.grad
        return found_so_far[-1], -slope.cpu().numpy()

    with warnings.catch_warnings(), outside_inference():
        warnings.simplefilter("error", EstimateWarning)
        try:
            found = optimize.minimize(
                negative,
                x0,
                jac=True,
                method="L-BFGS-B",
                bounds=limits,
                options={"maxiter": max_iter},
            )
        except EstimateWarning as estimate:
            raise UnsupportedLayerError(
                f"the evidence with a {structure} prior precision needs the exact "
                "log-determinant of F, of which this representation knows an estimate only "
                f"({estimate}): a scalar or one for each layer is closed for 'kfac' and the "
                "other stored representations, a diagonal for those but 'kfac' and 'ekfac'"
            ) from None
    if not found.success:
        slope = float(np.abs(found.jac).max())
        words = (
            f"the search for a prior precision ended early ({found.message}): its gradient is "
            f"still {slope:.2g}; raise max_iter"
        )
        warnings.warn(ConvergenceWarning(words, slope, int(found.nit)), stacklevel=4)
    prior, multiple = read(torch.tensor(found.x, dtype=torch.float64, device=device))
    return prior, float(multiple)


def chosen(
    la: P,
    loader: Any,
    grid: Iterable[DampingLike] | None,
    metric: Callable[[Any, Tensor], Any] | None,
    method: str,
    target: Callable[[Any], Tensor] | None,
    forward: Callable[[nn.Module, Any], Tensor] | None,
) -> P:
    """The posterior that predicts held-out labels best; see `Laplace.grid_search`."""
    likelihood = la._require_likelihood("a grid search")
    reading = reading_of(likelihood)
    batches = Batches(loader, device=la.space.device, forward=forward, target=target, **reading)
    data, targets = labelled(batches, "a grid search compares with held-out")
    labels = _joined(targets)
    best: tuple[float, P] | None = None
    for prior in torch.logspace(-4, 4, GRID, device="cpu").tolist() if grid is None else grid:
        candidate = la.with_prior(prior)
        predicted = candidate.predictive(data, method)
        if metric is None:
            score = float(nll(likelihood, predicted, labels).mean())
        else:
            score = float(metric(predicted, labels))
        if math.isfinite(score) and (best is None or score < best[0]):
            best = score, candidate
    if best is None:
        raise DataError(
            "expected the metric to be a finite number for some prior precision of the grid, but "
            "there is none: check the metric, and that the grid is not empty"
        )
    return best[1]


def _joined(targets: list[Any]) -> Any:
    """The targets of all batches as one."""
    leaves = zip(*[tree.leaves(each) for each in targets], strict=True)
    whole = {k: torch.cat(parts) for k, parts in enumerate(leaves) if isinstance(parts[0], Tensor)}
    return tree.replaced(targets[0], whole)


def _groups(space: ParamSpace, structure: str) -> dict[tuple[str, ...], Tensor]:
    """The parameters that share a number, with their places in the flat vector."""
    if structure == "scalar":
        return {space.names: torch.arange(len(space), device="cpu")}
    owners: dict[str, list[str]] = {}
    for name in space.names:
        owners.setdefault(space.owner(name), []).append(name)
    places = torch.arange(len(space), device="cpu")
    return {
        tuple(names): torch.cat([places[space.slices[name]] for name in names])
        for names in owners.values()
    }


def _prior(values: Tensor, structure: str, groups: Mapping[tuple[str, ...], Tensor]) -> DampingLike:
    """A prior precision of a structure from its free numbers."""
    if structure == "scalar":
        return values[0]
    return values if structure == "diagonal" else dict(zip(groups, values, strict=True))
