"""The density of a spectrum, by stochastic Lanczos quadrature."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .krylov import Matvec
from .lanczos import Lanczos
from .probes import Probes
from .products import Products
from .results import Result
from .subspace import orthogonalised

__all__ = ["SpectralDensity", "spectral_density"]

PROBES, STEPS = 10, 90  # by default
_DEFLATED = -1  # in place of a probe


@dataclass(frozen=True, eq=False, repr=False)
class SpectralDensity(Result, tuple[Tensor, Tensor], items=2):
    r"""A discrete approximation of the distribution of eigenvalues.

    .. math:: \frac1n \sum_i \delta(t - \lambda_i) \approx \sum_j w_j\, \delta(t - \theta_j)

    It is the tuple `(nodes, weights)`, with the other attributes beside.

    Attributes:
        nodes: theta (K,), the nodes of all probes, in the units of the eigenvalues.
        weights: w (K,), which sum to 1.
        probe: (K,), the probe that a node comes from; -1 for a deflated eigenvalue, whose weight is
            1 / n.
        size: n, the size of the matrix.
        matvecs: how many products were made.
        interrupted: whether the user stopped it.

    Example:
        >>> import nngeo_lazy as ng
        >>> found = ng.spectral_density(torch.diag(torch.tensor([1.0, 3.0])), deflate=2, seed=0)
        >>> nodes, weights = found
        >>> nodes, weights, found.expectation(torch.square)  # (1 + 9) / 2
        (tensor([1., 3.]), tensor([0.5000, 0.5000]), tensor(5.))

    Source: Lin, Saad and Yang (2016), Approximating spectral densities of large matrices.
    """

    nodes: Tensor
    weights: Tensor
    probe: Tensor = field(repr=False)
    size: int
    matvecs: int
    interrupted: bool = False

    @property
    def outliers(self) -> Tensor:
        """The eigenvalues that were known and deflated, ascending."""
        return self.nodes[self.probe == _DEFLATED]

    @property
    def probes(self) -> int:
        """How many probes there were."""
        return int(self.probe.max()) + 1

    def density(self, grid: Tensor, width: float | None = None, *, log: bool = False) -> Tensor:
        """The density on a grid. Each node is a Gaussian.

        Args:
            grid: eigenvalues (g,).
            width: standard deviation of the Gaussians, in the units of the eigenvalues; by default
                a hundredth of the span of the nodes.
            log: whether to give the density of log10 |eigenvalue| instead. Then the width is in
                decades, by default a tenth, and a grid value sees the eigenvalues of its sign.

        Returns:
            (g,). Its integral is 1; with `log`, over both signs.

        Raises:
            ValueError: the width is not positive.
        """
        return self.samples(grid, width, log=log).mean(0)

    def standard_error(
        self, grid: Tensor, width: float | None = None, *, log: bool = False
    ) -> Tensor:
        """The standard error (g,) of `density`, from its spread over the probes.

        Args:
            grid: eigenvalues (g,).
            width: as of `density`.
            log: as of `density`.

        Raises:
            ValueError: there was only one probe, or the width is not positive.
        """
        if self.probes < 2:
            raise ValueError("a standard error needs at least 2 probes=, got 1")
        spread: Tensor = self.samples(grid, width, log=log).std(0) / self.probes**0.5
        return spread

    def samples(self, grid: Tensor, width: float | None = None, *, log: bool = False) -> Tensor:
        """The density that each probe gives (probes, g); `density` is their mean.

        Args:
            grid: eigenvalues (g,).
            width: as of `density`.
            log: as of `density`.

        Raises:
            ValueError: the width is not positive.
        """
        grid = grid.to(self.nodes)
        width = self._width(log) if width is None else width
        if not width > 0:
            raise ValueError(f"expected a positive width, got {width}")
        at, nodes = grid.unsqueeze(0), self.nodes.unsqueeze(1)
        if log:
            same = at.sign() == nodes.sign()
            at, nodes = at.abs().log10(), nodes.abs().log10()
        bumps = torch.exp(-0.5 * ((at - nodes) / width).square()) / (width * (2 * torch.pi) ** 0.5)
        if log:
            bumps = torch.where(same & nodes.isfinite(), bumps, 0.0)
        return self._by_probe(self.weights.unsqueeze(1) * bumps)

    def expectation(self, f: Callable[[Tensor], Tensor]) -> Tensor:
        """The mean of f over the eigenvalues: tr f(A) / n = sum of weights times f(nodes).

        Args:
            f: eigenvalues to their function, elementwise.

        Returns:
            A 0-d tensor.
        """
        return (self.weights * f(self.nodes)).sum()

    def grid(self, points: int = 500, *, log: bool = False) -> Tensor:
        """A grid (points,) that covers the nodes.

        Args:
            points: how many.
            log: whether the spacing is even on a log scale. Then the grid covers the positive
                nodes, down to 1e-8 times the largest.

        Raises:
            ValueError: no node is positive, with `log`.
        """
        low, high = float(self.nodes.min()), float(self.nodes.max())
        if log:
            if not high > 0:
                raise ValueError(
                    f"a log grid needs positive eigenvalues, the largest is {high:.3g}"
                )
            low = max(low, 1e-8 * high)
            low, high = math.log10(low / 2), math.log10(2 * high)
            return torch.logspace(low, high, points, dtype=torch.float64, device="cpu").to(
                self.nodes
            )
        margin = 6 * self._width(False)  # there a Gaussian is below 1e-7 of its height
        grid = torch.linspace(
            low - margin, high + margin, points, dtype=torch.float64, device="cpu"
        )
        return grid.to(self.nodes)

    def _width(self, log: bool) -> float:
        if log:
            return 0.1
        span = float(self.nodes.max() - self.nodes.min())
        largest = float(self.nodes.abs().max())
        return max(span / 100, largest / 1e5) or 1.0  # rounding may be all of the span

    def _by_probe(self, terms: Tensor) -> Tensor:
        own = self.probe != _DEFLATED
        each = terms.new_zeros(self.probes, terms.shape[1])
        each = each.index_add(0, self.probe[own], terms[own]) * self.probes
        return each + terms[~own].sum(0)


def spectral_density(
    matvec: Matvec,
    n: int,
    like: Tensor,
    options: Probes,
    *,
    known: tuple[Tensor, Tensor] | None = None,
    reorthogonalize: bool = True,
    at_once: int | None = None,
) -> SpectralDensity:
    """The density of the spectrum of a symmetric A.

    Args:
        matvec: v (n, k) to A v.
        n: the size of A.
        like: an empty tensor of A's dtype and device.
        options: probes, steps, seed, progress.
        known: eigenvalues (k,) and orthonormal eigenvectors (n, k), which are counted exactly; the
            probes are orthogonal to them.
        reorthogonalize: whether every Lanczos vector is held.
        at_once: how many probes one product has; all by default.

    Returns:
        The nodes and weights of a probability measure.

    Raises:
        ValueError: a matrix that is not symmetric.
        NonFiniteError: NaN or infinity in a product.

    Example:
        >>> import torch
        >>> A = torch.diag(torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64))
        >>> options = Probes(2, steps=3, seed=0)
        >>> found = spectral_density(lambda v: A @ v, 3, A.new_empty(0), options)
        >>> round(float(found.weights.sum()), 6)
        1.0

    Source: Lin, Saad and Yang (2016), Approximating spectral densities of large matrices; Ghorbani,
        Krishnan and Xiao (2019) for networks.
    """
    probes, steps = options.probes or PROBES, options.steps or STEPS
    generator = options.generator(like.device)
    found = 0 if known is None else len(known[0])
    nodes, weights, probe = [], [], []
    if known is not None:
        nodes.append(known[0].double().cpu())
        weights.append(torch.full((found,), 1 / n, dtype=torch.float64, device="cpu"))
        probe.append(torch.full((found,), _DEFLATED, device="cpu"))

    def product(v: Tensor) -> Tensor:
        w = products(v)
        return w if known is None else orthogonalised(w, known[1])[0]

    done = 0
    with Products(matvec, "spectral density", progress=options.progress) as products:
        while done < probes and found < n and not products.interrupted:
            k = min(probes - done, probes if at_once is None else at_once)
            z = torch.randn(n, k, dtype=like.dtype, device=like.device, generator=generator)
            z = z if known is None else orthogonalised(z, known[1])[0]
            run = Lanczos(
                product,
                z,
                min(steps, n - found),
                reorthogonalize=reorthogonalize,
                method="spectral density",
            )
            try:
                while not run.finished:
                    run.step()
            except KeyboardInterrupt:
                if run.steps == 0 and done == 0:
                    raise
                products.interrupted = True
            if run.steps:
                theta, w = run.quadrature()
                nodes.append(theta.flatten())
                weights.append(w.flatten() * (n - found) / n)
                probe.append(
                    torch.arange(done, done + k, device="cpu").repeat_interleave(run.steps)
                )
                done += k
    of, each = torch.cat(probe), torch.cat(weights)
    each[of != _DEFLATED] /= max(done, 1)
    at = torch.cat(nodes).to(like)
    of = of.to(like.device)
    return SpectralDensity(at, each.to(like), of, n, products.count, products.interrupted)
