"""Pictures of what was computed: predictions, influences, spectra of kernels, solves."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import ConvergenceWarning, DataError
from ..numerics.results import Solution
from ..numerics.spectra import require_symmetric_operator
from .axes import axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["bands", "convergence", "influence", "reliability", "spectra"]

_FLOOR = 1e-16  # relative: below it all is rounding


def influence(
    scores: Any,
    examples: Any,
    *,
    query: int = 0,
    k: int = 8,
    labels: Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """The training examples of the largest and the smallest scores, as pictures or text.

    Each is a bar of its score, the largest at the top. Beside it stands the example.

    Args:
        scores: (queries, training examples) from `ng.influences`, or its `Top` with `top=`.
        examples: all training examples, by number: pictures (N, H, W), (N, 1 or 3, H, W) from 0 to
            1, or texts.
        query: the row of the scores.
        k: how many are drawn, half of them from each end; of a `Top` its first ones.
        labels: a word for each training example, such as its class; drawn beside it.
        ax: to draw on; by default a new one.

    Raises:
        DataError: k is below one, or there is no example for a score.
        ImportError: matplotlib is missing.
    """
    if k < 1:
        raise DataError(f"expected k to be at least 1, got {k}")
    values, numbers = _chosen(scores, query, k)
    if max(numbers, default=0) >= len(examples):
        raise DataError(
            f"expected an example for each score, but there are {len(examples)}, and one of the "
            f"scores is of example {max(numbers)}: pass all training examples in their order"
        )
    ax = axes(ax)
    colours = ["C0" if value >= 0 else "C3" for value in values]
    ax.barh(range(len(values)), values, color=colours)
    ax.axvline(0, color="grey", linewidth=0.5)
    ax.set_ylim(len(values) - 0.5, -0.5)  # the first one is at the top
    words = []
    for at, number in enumerate(numbers):
        one, name = examples[number], "" if labels is None else str(labels[number])
        if isinstance(one, Tensor):
            _picture(ax, one, name, at, len(numbers))
            words.append("")
        else:
            words.append(f"{name}: {one}" if name else str(one))
    ax.set_yticks(range(len(values)), words)
    ax.set_xlabel("influence: the loss of the query rises so much without it")
    return ax


def _chosen(scores: Any, query: int, k: int) -> tuple[list[float], list[int]]:
    """The scores to draw, falling, and which examples they are of."""
    if hasattr(scores, "indices") and hasattr(scores, "values") and not isinstance(scores, Tensor):
        values, numbers = scores.values[query][:k], scores.indices[query][:k]
        return values.tolist(), numbers.tolist()
    row = torch.as_tensor(scores)
    row = row if row.dim() == 1 else row[query]
    order = row.argsort(descending=True)
    if len(order) > k:
        order = torch.cat([order[: -(-k // 2)], order[len(order) - k // 2 :]])
    return row[order].tolist(), order.tolist()


def _picture(ax: Axes, one: Tensor, name: str, at: int, count: int) -> None:
    """A picture left of a bar, and its name left of that."""
    pixels = one.detach().float().cpu()
    pixels = pixels.movedim(0, -1).squeeze(-1) if pixels.dim() == 3 else pixels
    inside = ax.inset_axes((-0.12, 1 - (at + 0.95) / count, 0.1, 0.9 / count))
    inside.imshow(pixels.numpy(), cmap="gray_r" if pixels.dim() == 2 else None)
    inside.text(-0.2, 0.5, name, transform=inside.transAxes, ha="right", va="center")
    inside.set_axis_off()


def bands(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    *,
    levels: Sequence[float] = (0.5, 0.9),
    data: tuple[Tensor, Tensor] | None = None,
    label: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """The predictive mean of one input, and the central intervals of a normal distribution.

    Args:
        x: inputs (N,), in any order.
        mean: (N,), as of `Laplace.functional(x).mean`.
        variance: (N,), with the noise if the bands are to hold labels.
        levels: the probability of each band.
        data: points (x, y) to draw on top.
        label: in the legend.
        ax: to draw on; by default a new one.

    Raises:
        DataError: sizes that differ, or a level that is no probability.
        ImportError: matplotlib is missing.
    """
    flat = [torch.as_tensor(each).detach().double().cpu().flatten() for each in (x, mean, variance)]
    if len({len(each) for each in flat}) > 1:
        raise DataError(
            f"expected x, mean and variance of one size, got {[len(each) for each in flat]}: pass "
            "one output's"
        )
    if not all(0 < level < 1 for level in levels):
        raise DataError(f"expected levels between 0 and 1, got {list(levels)}")
    at, centre, spread = (each[flat[0].argsort()] for each in flat)
    spread = spread.clamp_min(0).sqrt()
    ax = axes(ax)
    (line,) = ax.plot(at.numpy(), centre.numpy(), label=label)
    for level in sorted(levels, reverse=True):
        width = spread * NormalDist().inv_cdf((1 + level) / 2)
        low, high = (centre - width).numpy(), (centre + width).numpy()
        ax.fill_between(
            at.numpy(), low, high, color=line.get_color(), alpha=0.2, linewidth=0,
            label=f"{level:.0%}",
        )  # fmt: skip
    if data is not None:
        points = [torch.as_tensor(each).detach().cpu().flatten().numpy() for each in data]
        ax.plot(*points, ".", color="black", markersize=4, label="data")
    ax.legend()
    return ax


def reliability(
    probabilities: Tensor | Mapping[str, Tensor],
    labels: Tensor,
    *,
    bins: int = 10,
    ax: Axes | None = None,
) -> Axes:
    r"""How often a prediction is right, against how sure it is.

    The diagonal is a calibrated model. The legend has the expected calibration error,

    .. math:: \sum_b \frac{n_b}{N} \left| \mathrm{accuracy}_b - \mathrm{confidence}_b \right|

    over bins of equal width of the largest probability. Empty bins have no point.

    Args:
        probabilities: (N, C), such as `Laplace.predictive(x)`; or several by label.
        labels: (N,), integers.
        bins: how many.
        ax: to draw on; by default a new one.

    Raises:
        DataError: no probabilities (N, C), or not as many labels.
        ImportError: matplotlib is missing.

    Source: Guo et al. (2017), On calibration of modern neural networks, eq. 3.
    """
    several = probabilities if isinstance(probabilities, Mapping) else {"": probabilities}
    for p in several.values():
        if p.dim() != 2 or len(p) != len(labels) or bool((p < 0).any() | (p.sum(1) > 1.01).any()):
            raise DataError(
                f"expected probabilities (N, C) of {len(labels)} examples, got {tuple(p.shape)} "
                f"from {float(p.min()):.3g} to {float(p.max()):.3g}: take a softmax of logits"
            )
    ax = axes(ax)
    ax.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
    for name, p in several.items():
        confidence, guess = p.detach().double().cpu().max(1)
        right = (guess == labels.cpu()).double()
        where = (confidence * bins).long().clamp_max(bins - 1)
        counts = where.bincount(minlength=bins).double()
        used = counts > 0
        sure, often = (
            where.bincount(each, minlength=bins)[used] / counts[used]
            for each in (confidence, right)
        )
        error = float((counts[used] / len(labels) * (often - sure).abs()).sum())
        text = f"{name}: " if name else ""
        ax.plot(sure.numpy(), often.numpy(), "o-", label=f"{text}calibration error {error:.3f}")
    ax.set_xlim(0, 1)
    ax.set_ylim(0, 1)
    ax.set_xlabel("confidence: the largest probability")
    ax.set_ylabel("accuracy")
    ax.legend()
    return ax


def spectra(
    kernels: Any, *, relative: bool = True, limit: int | None = None, ax: Axes | None = None
) -> Axes:
    """The eigenvalues of kernels, falling, on two log scales.

    Args:
        kernels: a symmetric operator or tensor, such as `ng.NTK(model, x)`, or several by label.
        relative: whether each is divided by its largest eigenvalue.
        limit: how many bytes a matrix may take; by default that of `to_dense`.
        ax: to draw on; by default a new one.

    Raises:
        ValueError: one is not symmetric.
        TooLargeError: one is too large to be formed.
        ImportError: matplotlib is missing.
    """
    several = kernels if isinstance(kernels, Mapping) else {"": kernels}
    found = {}
    for name, kernel in several.items():
        operator = require_symmetric_operator(kernel, "spectra")
        found[name] = torch.linalg.eigvalsh(operator.to_dense(limit).detach().double()).flip(0)
    ax = axes(ax)
    for name, values in found.items():
        largest = float(values[0])
        kept = values[values > max(largest, 0.0) * _FLOOR].cpu()
        shown = kept / largest if relative else kept
        ax.plot(range(1, len(kept) + 1), shown.numpy(), label=name or None)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("rank")
    ax.set_ylabel("eigenvalue, relative to the largest" if relative else "eigenvalue")
    if any(several):
        ax.legend()
    return ax


def convergence(
    solves: Mapping[str, Callable[[int], Solution]], *, most: int = 100, ax: Axes | None = None
) -> Axes:
    """The true residual of solves against their iterations, on a log scale.

    Each is run anew for 1, 2, 3, 4, 6, 8, 12, ... iterations, until it has converged. So residuals
    are those of solutions, and not of a recurrence. It costs about three times the last run.

    Args:
        solves: by label, functions of the number of iterations: `lambda n: ng.solve(F, b,
            damping=1e-3, max_iter=n, preconditioner=K)`.
        most: how many iterations at most.
        ax: to draw on; by default a new one.

    Raises:
        DataError: most is below one.
        ImportError: matplotlib is missing.
    """
    if most < 1:
        raise DataError(f"expected most to be at least 1, got {most}")
    ax = axes(ax)
    budgets = sorted({n for k in range(most.bit_length()) for n in (2**k, 3 * 2**k) if n < most})
    for name, solve in solves.items():
        points: list[tuple[int, float]] = []
        for n in [*budgets, most]:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                found = solve(n)
            points.append((found.iterations, max(float(found.residual.max()), _FLOOR)))
            if found.converged or found.iterations < n:
                break
        iterations, residuals = zip(*points, strict=True)
        ax.plot(iterations, residuals, "o-", markersize=3, label=name)
    ax.set_yscale("log")
    ax.set_xlabel("iterations")
    ax.set_ylabel("relative residual")
    ax.legend()
    return ax
