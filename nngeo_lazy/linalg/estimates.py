"""Traces and diagonals from products with random vectors, each with its error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import scipy.stats
import torch
from torch import Tensor

from .krylov import Matvec
from .lanczos import Lanczos, evaluated
from .products import Products
from .subspace import orthogonalised, orthonormal

__all__ = [
    "MIN_STEPS",
    "Estimate",
    "hutchinson",
    "hutchpp",
    "quadrature_trace",
    "signs",
    "xdiag",
    "xtrace",
]

MIN_STEPS = 30  # of a quadrature, before it may stop early
_AT_ONCE = 10  # probes in one product, between which an interrupt loses nothing


@dataclass(frozen=True)
class Estimate:
    """A number, or one for each entry, and how sure it is.

    Attributes:
        value: the estimate.
        standard_error: of the value; 0 where it is exact.
        matvecs: how many products were made.
        probes: how many random vectors it is a mean over; 0 where it is exact.
        bias: how far off the mean itself may be, which more probes do not mend: the error of the
            quadrature in a function of a matrix.
        interrupted: whether the user stopped it.
    """

    value: Tensor
    standard_error: Tensor
    matvecs: int
    probes: int = 0
    bias: float = 0.0
    interrupted: bool = False

    def interval(self, confidence: float = 0.9973) -> tuple[Tensor, Tensor]:
        """Where the number lies with this confidence, by Student's t; 0.9973 is three sigma."""
        if self.probes == 0:
            return self.value, self.value
        t = float(scipy.stats.t.ppf((1 + confidence) / 2, self.probes - 1))
        half = t * self.standard_error
        return self.value - half, self.value + half

    def __float__(self) -> float:
        return float(self.value)


def signs(n: int, k: int, like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Random signs (n, k)."""
    drawn = torch.randint(0, 2, (n, k), device=like.device, generator=generator)
    return drawn.to(like) * 2 - 1


def hutchinson(
    matvec: Matvec,
    n: int,
    probes: int,
    like: Tensor,
    *,
    diagonal: bool = False,
    tol: float | None = None,
    max_matvecs: int = 10_000,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Estimate:
    """The mean over random signs z of z.Az, or of z * Az for the diagonal.

    Args:
        matvec: v (n, k) to A v.
        n: the size of A.
        probes: how many, at least 2.
        like: an empty tensor of A's dtype and device.
        diagonal: whether the diagonal is wanted, (n,).
        tol: relative standard error to reach, by doubling the probes.
        max_matvecs: at most so many products, with tol.
        generator: of the probes.
        progress: whether to show a bar.

    Source: Hutchinson (1990); Bekas, Kokiopoulou and Saad (2007) for the diagonal.
    """
    samples: list[Tensor] = []

    def more(k: int) -> tuple[Tensor, Tensor]:
        for width in [_AT_ONCE] * (k // _AT_ONCE) + [k % _AT_ONCE] * (k % _AT_ONCE > 0):
            z = signs(n, width, like, generator)
            try:
                terms = z * products(z)
            except KeyboardInterrupt:
                if not samples:
                    raise
                products.interrupted = True
                break
            samples.append(terms if diagonal else terms.double().sum(0, keepdim=True))
        return _mean(torch.cat(samples, 1), diagonal)

    with Products(matvec, "hutchinson", progress=progress) as products:
        return _refined(more, products, probes, 1, tol, min(max_matvecs, n), like)


def hutchpp(
    matvec: Matvec,
    n: int,
    probes: int,
    like: Tensor,
    *,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Estimate:
    """tr(Q^T A Q) for a random range Q of A, and Hutchinson's estimate on what it leaves.

    Args:
        matvec: v (n, k) to A v.
        n: the size of A.
        probes: columns of Q, and as many probes of the rest, at least 2: 3 products each.
        like: an empty tensor of A's dtype and device.
        generator: of the probes.
        progress: whether to show a bar.

    Source: Meyer, Musco, Musco and Woodruff (2021), Hutch++.
    """
    _require_probes(probes)
    with Products(matvec, "hutch++", progress=progress) as products:
        Q = orthonormal(products(signs(n, probes, like, generator)))
        inside = (Q * products(Q)).double().sum()
        z = orthogonalised(signs(n, probes, like, generator), Q)[0]
        rest = (z * products(z)).double().sum(0)
        error = rest.std() / probes**0.5
        value = inside + rest.mean()
        return Estimate(value.to(like), error.to(like), products.count, probes)


def xtrace(
    matvec: Matvec,
    n: int,
    probes: int,
    like: Tensor,
    *,
    tol: float | None = None,
    max_matvecs: int = 10_000,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Estimate:
    r"""The mean over probes of the trace on the range of the others, and a sample of the rest.

    .. math:: \frac1m \sum_i \operatorname{tr} Q_i^T A Q_i + \tilde\omega_i^T A \tilde\omega_i,
        \quad \tilde\omega_i \propto (I - Q_i Q_i^T)\,\omega_i

    with an orthonormal basis Q_i of the A omega_j, j other than i: every product serves both ends.

    Args:
        matvec: v (n, k) to A v.
        n: the size of A.
        probes: how many, from 2 to n / 2; 2 products each.
        like: an empty tensor of A's dtype and device.
        tol: relative standard error to reach, by doubling the probes.
        max_matvecs: at most so many products, with tol.
        generator: of the probes.
        progress: whether to show a bar.

    Source: Epperly, Tropp and Webber (2024), XTrace: making the most of every sample in stochastic
        trace estimation.
    """
    with Products(matvec, "xtrace", progress=progress) as products:
        sketch = _Sketch(products, n, like, generator, gaussian=True)

        def more(k: int) -> tuple[Tensor, Tensor]:
            sketch.grow(k)
            return _mean(_xtrace_samples(sketch).unsqueeze(0), False)

        return _refined(more, products, min(probes, n // 2), 2, tol, min(max_matvecs, n), like)


def xdiag(
    matvec: Matvec,
    n: int,
    probes: int,
    like: Tensor,
    *,
    tol: float | None = None,
    max_matvecs: int = 10_000,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Estimate:
    """The diagonal (n,) of a symmetric A: the exact one on a random range, and samples of the rest.

    Args:
        matvec: v (n, k) to A v.
        n: the size of A.
        probes: how many, from 2 to n / 2; 2 products each.
        like: an empty tensor of A's dtype and device.
        tol: relative standard error to reach, of the whole diagonal in the 2-norm.
        max_matvecs: at most so many products, with tol.
        generator: of the probes.
        progress: whether to show a bar.

    Source: Epperly, Tropp and Webber (2024), section 3.
    """
    with Products(matvec, "xdiag", progress=progress) as products:
        sketch = _Sketch(products, n, like, generator, gaussian=False)

        def more(k: int) -> tuple[Tensor, Tensor]:
            sketch.grow(k)
            Q, Z, S, R = sketch.Q, sketch.Z, sketch.S.to(sketch.Q), sketch.R.to(sketch.Q)
            fixed = (Q * Z).sum(1)
            left = Q @ S  # the direction that only probe i has found
            samples = left * (sketch.probes * (S * R).sum(0) - Z @ S)
            mean, error = _mean(samples, True)
            return fixed + mean, error

        return _refined(more, products, min(probes, n // 2), 2, tol, min(max_matvecs, n), like)


def quadrature_trace(
    matvec: Matvec,
    f: Callable[[Tensor], Tensor],
    n: int,
    probes: int,
    steps: int,
    like: Tensor,
    *,
    what: str = "tr f(A)",
    tol: float | None = None,
    max_matvecs: int = 10_000,
    reorthogonalize: bool = True,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Estimate:
    """tr f(A) of a symmetric A by stochastic Lanczos quadrature.

    The mean over random signs z of the Gauss quadrature of z.f(A) z. How far the quadrature is from
    its limit is extrapolated from its values after a third, two thirds and all of the steps, which
    are free; it stops early once that is below a tenth of the standard error.

    Args:
        matvec: v (n, k) to A v.
        f: eigenvalues to their function, elementwise.
        n: the size of A.
        probes: how many, at least 2.
        steps: at most so many products for each.
        like: an empty tensor of A's dtype and device.
        what: is estimated, for messages.
        tol: relative standard error to reach, by doubling the probes.
        max_matvecs: at most so many products, with tol.
        reorthogonalize: whether every vector is held.
        generator: of the probes.
        progress: whether to show a bar.

    Raises:
        NotPositiveDefiniteError: f is not finite on the spectrum.

    Source: Ubaru, Chen and Saad (2017), Fast estimation of tr(f(A)) via stochastic Lanczos
        quadrature.
    """
    samples: list[Tensor] = []
    biases: list[float] = []

    def more(k: int) -> tuple[Tensor, Tensor]:
        z = signs(n, k, like, generator)
        run = Lanczos(products, z, steps, reorthogonalize=reorthogonalize, method=what)
        try:
            while not run.finished:
                run.step()
                if run.steps >= MIN_STEPS and run.steps % 10 == 0:
                    values, bias = _quadratures(run, f, what)
                    if bias <= 0.1 * float(values.std()) / k**0.5:
                        break
        except KeyboardInterrupt:
            if run.steps == 0:
                raise
            products.interrupted = True
        values, bias = _quadratures(run, f, what)
        samples.append(n * values)
        biases.append(n * bias)
        return _mean(torch.cat(samples).unsqueeze(0), False)

    with Products(matvec, what, progress=progress) as products:
        found = _refined(more, products, probes, steps, tol, max_matvecs, like)
    return replace(found, bias=max(biases))


def _quadratures(run: Lanczos, f: Callable[[Tensor], Tensor], what: str) -> tuple[Tensor, float]:
    """z.f(A) z / |z|^2 of each probe, and how far off their mean may be."""
    means = []
    for steps in sorted({-(-run.steps // 3), -(-2 * run.steps // 3), run.steps}):
        nodes, weights = run.quadrature(steps)
        dtype = run.sizes.dtype
        each = (weights * evaluated(f, nodes, weights, nodes.abs().max(), dtype, what)).sum(1)
        means.append(float(each.mean()))
    if len(means) < 3:
        return each, abs(means[-1] - means[0])
    before, last = abs(means[1] - means[0]), abs(means[2] - means[1])
    rate = min(last / before, 0.99) if before > 0 else 0.0  # a geometric series
    return each, last * rate / (1 - rate)


def _mean(samples: Tensor, each: bool) -> tuple[Tensor, Tensor]:
    """The mean over the last dimension and its standard error, in float64."""
    mean = samples.mean(-1)
    error = samples.std(-1) / samples.shape[-1] ** 0.5
    return (mean, error) if each else (mean.squeeze(0), error.squeeze(0))


def _refined(
    more: Callable[[int], tuple[Tensor, Tensor]],
    products: Products,
    probes: int,
    cost: int,
    tol: float | None,
    max_matvecs: int,
    like: Tensor,
) -> Estimate:
    """Double the probes until the standard error is small enough; keep what an interrupt leaves."""
    _require_probes(probes)
    done, more_probes = 0, probes
    found: Estimate | None = None
    while True:
        try:
            mean, error = more(more_probes)
        except KeyboardInterrupt:
            if found is None:
                raise
            return replace(found, matvecs=products.count, interrupted=True)
        done += more_probes
        found = Estimate(mean.to(like), error.to(like), products.count, done)
        if products.interrupted:
            return replace(found, interrupted=True)
        more_probes = done
        short = tol is not None and float(error.norm()) > tol * float(mean.norm())
        if not short or products.count + cost * more_probes > max_matvecs:
            return found


def _require_probes(probes: int) -> None:
    if probes < 2:
        raise ValueError(f"expected at least 2 probes, which a standard error needs, got {probes}")


class _Sketch:
    """Probes W, an orthonormal basis Q of A W, and Z = A Q, growing without repeating products.

    Attributes:
        probes: W (n, m).
        Q: (n, m).
        Z: A Q (n, m).
        R: Q^T A W (m, m), float64.
        S: (m, m), float64: column i is the unit vector in Q's coordinates orthogonal to A w_j for
            all j other than i.
    """

    def __init__(
        self,
        products: Products,
        n: int,
        like: Tensor,
        generator: torch.Generator | None,
        *,
        gaussian: bool,
    ) -> None:
        self._products, self._generator, self._gaussian = products, generator, gaussian
        empty = like.new_empty(n, 0)
        self.probes, self.Q, self.Z = empty, empty, empty
        self._images = empty

    def grow(self, k: int) -> None:
        n = len(self.probes)
        if self._gaussian:
            like = self.probes
            probes = torch.randn(
                n, k, dtype=like.dtype, device=like.device, generator=self._generator
            )
        else:
            probes = signs(n, k, self.probes, self._generator)
        images = self._products(probes)
        Q = orthonormal(orthogonalised(images, self.Q)[0])
        Q = orthonormal(orthogonalised(Q, self.Q)[0])  # images may lie in the old range
        Z = self._products(Q)
        self.probes = torch.cat([self.probes, probes], 1)
        self._images = torch.cat([self._images, images], 1)
        self.Q, self.Z = torch.cat([self.Q, Q], 1), torch.cat([self.Z, Z], 1)
        self.R = (self.Q.mT @ self._images).double()
        left, sizes, right = torch.linalg.svd(self.R)
        floor = torch.finfo(torch.float64).eps * sizes[0]
        sizes = sizes.clamp_min(floor) if bool(floor > 0) else torch.ones_like(sizes)
        S = (left / sizes) @ right  # R^-T
        self.S = S / torch.linalg.vector_norm(S, dim=0)


def _xtrace_samples(sketch: _Sketch) -> Tensor:
    """The estimate of each probe (m,), in float64."""
    n, m = sketch.probes.shape
    S, R = sketch.S, sketch.R
    H = (sketch.Q.mT @ sketch.Z).double()
    W = (sketch.Q.mT @ sketch.probes).double()
    T = (sketch.Z.mT @ sketch.probes).double()
    inside = H.trace() - (S * (H @ S)).sum(0)  # tr Q_i^T A Q_i
    X = W - S * (S * W).sum(0)  # Q_i Q_i^T w_i = Q x_i
    # (w - Q x).A (w - Q x)
    rest = (W * R).sum(0) - (X * R).sum(0) - (T * X).sum(0) + (X * (H @ X)).sum(0)
    size = sketch.probes.double().square().sum(0) - X.square().sum(0)
    samples: Tensor = inside + rest * (n - m + 1) / size
    return samples
