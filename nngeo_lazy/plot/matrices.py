"""Pictures of matrices and of their spectra."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import SpaceMismatchError, UnsupportedLayerError
from ..linalg import SpectralDensity
from ..numerics.spectra import require_symmetric_operator
from ..operators import BaseLinearOperator, BlockDiagonalLinearOperator, aslinearoperator
from ..operators.factors import factor_eigvalsh
from ..operators.kronecker import KroneckerLinearOperator
from ..operators.stored import opened, outlined
from .axes import axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["block_norms", "compare", "compared", "correlation", "density", "factor_spectra"]

_FLOOR = 1e-12  # of the largest entry: what a log colour scale shows at least


def density(
    found: SpectralDensity | Mapping[str, SpectralDensity],
    *,
    grid: Tensor | None = None,
    width: float | None = None,
    log: bool = False,
    ax: Axes | None = None,
) -> Axes:
    """The density of a spectrum on a log scale, with its outliers marked.

    The band is two standard errors over the probes. Outliers are the eigenvalues that were deflated
    (`ng.spectral_density(A, deflate=k)`); each is a tick at the bottom.

    Args:
        found: from `ng.spectral_density`, or several by label.
        grid: eigenvalues (g,); by default one that covers the nodes of each.
        width: of the Gaussians, as of `SpectralDensity.density`.
        log: whether the eigenvalues are on a log scale too: the positive ones.
        ax: to draw on; by default a new one.

    Raises:
        ImportError: matplotlib is missing.
    """
    ax = axes(ax)
    peak = 0.0
    several = found if isinstance(found, Mapping) else {"": found}
    for label, one in several.items():
        at = one.grid(1000, log=log) if grid is None else grid
        height = one.density(at, width, log=log)
        shown = at.cpu().numpy()
        (line,) = ax.plot(shown, height.cpu().numpy(), label=label or None)
        if one.probes > 1:
            error = 2 * one.standard_error(at, width, log=log)
            low = (height - error).clamp_min(float(height.max()) * 1e-9)
            band = (low.cpu().numpy(), (height + error).cpu().numpy())
            ax.fill_between(shown, *band, color=line.get_color(), alpha=0.2, linewidth=0)
        outliers = one.outliers.cpu().numpy()
        if len(outliers):
            (ticks,) = ax.plot(
                outliers, [0.02] * len(outliers), "|", color=line.get_color(), markersize=10
            )
            ticks.set_transform(ax.get_xaxis_transform())
        peak = max(peak, float(height.max()))
    ax.set_yscale("log")
    ax.set_ylim(peak * 1e-7, peak * 10)
    if log:
        ax.set_xscale("log")
    ax.set_xlabel("eigenvalue")
    ax.set_ylabel("density per decade" if log else "density")
    if any(several):
        ax.legend()
    return ax


def block_norms(
    F: Any, *, probes: int | None = None, seed: int | None = 0, ax: Axes | None = None
) -> Axes:
    r"""The Frobenius norm of each pair of layers' block, on a log colour scale.

    .. math:: \|F_{ab}\|_F = \left(\mathbb{E}_z |F_{ab} z|^2\right)^{1/2}

    Exact from as many products as there are parameters, or from some random signs z for each layer.

    Args:
        F: a symmetric operator over parameters.
        probes: random vectors for each layer; by default all columns, which is exact.
        seed: of the random vectors.
        ax: to draw on; by default a new one.

    Raises:
        SpaceMismatchError: F has no parameter space.
        ImportError: matplotlib is missing.
    """
    operator = require_symmetric_operator(F, "block_norms")
    space = operator.space
    if space is None:
        raise SpaceMismatchError("block_norms needs an operator with a parameter space")
    owners: dict[str, list[slice]] = {}
    for name in space.names:
        owners.setdefault(space.owner(name), []).append(space.slices[name])
    where = [
        torch.cat([torch.arange(s.start, s.stop, device="cpu") for s in each])
        for each in owners.values()
    ]
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    norms = torch.zeros(len(where), len(where), dtype=torch.float64, device="cpu")
    with torch.no_grad():
        for b, columns in enumerate(where):
            k = len(columns)
            if probes is None:
                inside = torch.eye(k, dtype=torch.float64, device="cpu")
            else:
                inside = (
                    torch.randint(0, 2, (k, probes), generator=generator, device="cpu").double() * 2
                    - 1
                )
            total = torch.zeros(len(where), dtype=torch.float64, device="cpu")
            for part in inside.split(64, 1):
                z = torch.zeros(len(space), part.shape[1], dtype=torch.float64, device="cpu")
                z[columns] = part
                product = (operator @ z.to(operator.device, operator.dtype)).double().cpu()
                total += torch.stack([product[rows].square().sum() for rows in where])
            norms[:, b] = total if probes is None else total / probes
    norms = ((norms + norms.mT) / 2).sqrt()  # two estimates of each
    ax = _image(norms, ax, "norm of the block")
    ticks = range(len(owners))
    ax.set_xticks(ticks, list(owners), rotation=90)
    ax.set_yticks(ticks, list(owners))
    return ax


def factor_spectra(F: Any, *, ax: Axes | None = None) -> Axes:
    """The eigenvalues of the two factors of each Kronecker block, falling, relative to the largest.

    Input factors are solid lines, output factors dashed ones.

    Args:
        F: a KFAC operator, or a Kronecker block.
        ax: to draw on; by default a new one.

    Raises:
        UnsupportedLayerError: F has no Kronecker block.
        ImportError: matplotlib is missing.
    """
    operator = aslinearoperator(F)
    named = (
        dict(zip(operator.names, operator.members, strict=True))
        if isinstance(operator, BlockDiagonalLinearOperator)
        else {"": operator}
    )
    kronecker = [n for n, b in named.items() if isinstance(outlined(b), KroneckerLinearOperator)]
    blocks = {name: opened(named[name]) for name in kronecker}
    if not blocks:
        kinds = sorted({type(block).__name__ for block in named.values()})
        raise UnsupportedLayerError(
            f"factor_spectra needs Kronecker blocks with two factors, got {', '.join(kinds)}: "
            "build it with the representation 'kfac'"
        )
    ax = axes(ax)
    for k, (name, block) in enumerate(blocks.items()):
        for factor, style, side in ((block.right, "-", "input"), (block.left, "--", "output")):
            values = factor_eigvalsh(factor.detach().double()).flatten()
            values = values.sort(descending=True).values
            shares = torch.arange(len(values), device="cpu") / max(1, len(values) - 1)
            shown = (values / values.max()).clamp_min(_FLOOR)
            label = f"{name}: {side} ({factor.shape[1]})"
            ax.plot(shares.numpy(), shown.cpu().numpy(), style, color=f"C{k % 10}", label=label)
    ax.set_yscale("log")
    ax.set_xlabel("rank, as a share of the size")
    ax.set_ylabel("eigenvalue, relative to the largest")
    ax.legend(fontsize="small")
    return ax


def compare(A: Any, B: Any, *, limit: int | None = None, ax: Axes | None = None) -> Axes:
    """Two matrices in one image: |A| below the diagonal, |B| above it, on one log colour scale.

    Args:
        A: a square operator or tensor.
        B: one of the same size.
        limit: how many bytes each matrix may take; by default that of `to_dense`.
        ax: to draw on; by default a new one.

    Raises:
        SpaceMismatchError: they differ in size.
        TooLargeError: they are too large to be formed.
        ImportError: matplotlib is missing.
    """
    first, second = aslinearoperator(A), aslinearoperator(B)
    if first.shape != second.shape or not first.is_square:
        raise SpaceMismatchError(
            f"expected two square matrices of one size, got {tuple(first.shape)} and "
            f"{tuple(second.shape)}"
        )
    below = first.to_dense(limit).detach().double().cpu().tril()
    above = second.to_dense(limit).detach().double().cpu().triu(1)
    return _layers(_image((below + above).abs(), ax, "|entry|"), first)


def compared(table: Any, *, ax: Axes | None = None) -> Axes:
    """The errors of representations beside the exact matrix, as `ng.compare` found them.

    One group of bars for each representation, on a log scale; what was left out has none.

    Args:
        table: from `ng.compare`.
        ax: to draw on; by default a new one.

    Raises:
        ImportError: matplotlib is missing.
    """
    ax = axes(ax)
    rows = [row for row in table if row.direction]
    kinds = ("direction", "quadratic", "largest", "trace", "logdet")
    for k, kind in enumerate(kinds):
        heights = [max(abs(float(getattr(row, kind).lstrip("~"))), 1e-5) for row in rows]
        at = [n + (k - 2) * 0.16 for n in range(len(rows))]
        ax.bar(at, heights, 0.15, bottom=0, label=kind)
    ax.set_yscale("log")
    ax.set_ylim(bottom=1e-5)
    ax.set_xticks(range(len(rows)), [row.representation for row in rows])
    ax.set_ylabel("error (log-determinant: nats for each parameter)")
    ax.legend()
    return ax


def correlation(F: Any, *, limit: int | None = None, ax: Axes | None = None) -> Axes:
    """The matrix scaled to a diagonal of ones: F_ij / (F_ii F_jj)^(1/2), from -1 to 1.

    Args:
        F: a square operator or tensor, such as a Fisher or a posterior covariance.
        limit: how many bytes the matrix may take; by default that of `to_dense`.
        ax: to draw on; by default a new one.

    Raises:
        TooLargeError: it is too large to be formed.
        ImportError: matplotlib is missing.
    """
    operator = aslinearoperator(F)
    dense = operator.to_dense(limit).detach().double().cpu()
    size = dense.diagonal().clamp_min(0).sqrt()
    scale = torch.where(size > 0, size.reciprocal(), 0.0)
    ax = axes(ax)
    image = ax.imshow((dense * scale * scale.unsqueeze(1)).numpy(), cmap="RdBu_r", vmin=-1, vmax=1)
    ax.figure.colorbar(image, ax=ax, label="correlation", shrink=0.8)
    return _layers(ax, operator)


def _image(entries: Tensor, ax: Axes | None, label: str) -> Axes:
    from_axes = axes(ax)
    from matplotlib.colors import LogNorm

    largest = float(entries.max())
    high = largest if largest > 0 else 1.0
    positive = entries[entries > 0]
    low = max(float(positive.min()) if len(positive) else high * _FLOOR, high * _FLOOR)
    low = min(low, high / 10)
    norm = LogNorm(low, high)
    shown = entries.clamp_min(low).numpy()  # a zero has the lowest colour
    image = from_axes.imshow(shown, norm=norm, cmap="viridis")
    from_axes.figure.colorbar(image, ax=from_axes, label=label, shrink=0.8)
    return from_axes


def _layers(ax: Axes, operator: BaseLinearOperator) -> Axes:
    """Lines between layers, and their names, if the matrix is over parameters."""
    space = operator.space
    if space is None:
        ax.set_xlabel("column")
        ax.set_ylabel("row")
        return ax
    ends: dict[str, int] = {}
    for name in space.names:
        ends[space.owner(name)] = space.slices[name].stop
    starts = [0, *list(ends.values())[:-1]]
    for stop in list(ends.values())[:-1]:
        ax.axhline(stop - 0.5, color="grey", linewidth=0.5)
        ax.axvline(stop - 0.5, color="grey", linewidth=0.5)
    middles = [(a + b - 1) / 2 for a, b in zip(starts, ends.values(), strict=True)]
    ax.set_xticks(middles, list(ends), rotation=90)
    ax.set_yticks(middles, list(ends))
    return ax
