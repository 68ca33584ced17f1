"""Traces and diagonals from products with random vectors, each with its error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from .krylov import Matvec
from .lanczos import Lanczos, evaluated
from .probes import Probes
from .products import Products
from .results import Estimate
from .subspace import orthogonalised, orthonormal

__all__ = [
    "MIN_STEPS",
    "PROBES",
    "QUADRATURES",
    "hutchinson",
    "hutchpp",
    "quadrature_trace",
    "signs",
    "xdiag",
    "xtrace",
]

PROBES = 30  # of a trace or a diagonal, by default
QUADRATURES = 10  # probes of a function of a matrix, by default
STEPS = 100  # of Lanczos, by default
MIN_STEPS = 30  # of a quadrature, before it may stop early
_AT_ONCE = 10  # probes in one product: an interrupt loses no more than these


def signs(n: int, k: int, like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Random signs (n, k).

    Args:
        n: rows.
        k: columns.
        like: an empty tensor of their dtype and device.
        generator: of the signs; None for torch's global one.

    Returns:
        A tensor (n, k) of 1 and -1.

    Example:
        >>> import torch
        >>> signs(3, 2, torch.empty(0), None).square()
        tensor([[1., 1.],
                [1., 1.],
                [1., 1.]])
    """
    drawn = torch.randint(0, 2, (n, k), device=like.device, generator=generator)
    return drawn.to(like) * 2 - 1


def hutchinson(
    matvec: Matvec,
    n: int,
    like: Tensor,
    options: Probes,
    *,
    diagonal: bool = False,
) -> Estimate:
    """The mean over random signs z of z.Az, or of z * Az for the diagonal; 1 product a probe.

    Args:
        matvec: v (n, k) to A v.
        n: the size of A.
        like: an empty tensor of A's dtype and device.
        options: probes, tol, max_matvecs, seed, progress.
        diagonal: whether the diagonal (n,) is wanted.

    Returns:
        The estimate, with its standard error and the number of products.

    Raises:
        ValueError: fewer than 2 probes.
        NonFiniteError: NaN or infinity in a product.

    Example:
        >>> import torch
        >>> A = torch.diag(torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64))
        >>> found = hutchinson(lambda v: A @ v, 3, A.new_empty(0), Probes(2, seed=0))
        >>> found.value.shape, found.matvecs
        (torch.Size([]), 2)

    Source: Hutchinson (1990), A stochastic estimator of the trace; Bekas, Kokiopoulou and Saad
        (2007), An estimator for the diagonal of a matrix.
    """
    samples: list[Tensor] = []
    generator = options.generator(like.device)

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

    with Products(matvec, "hutchinson", progress=options.progress) as products:
        return _refined(more, products, options.probes or PROBES, 1, _within(options, n), like)


def hutchpp(matvec: Matvec, n: int, like: Tensor, options: Probes) -> Estimate:
    """tr(Q^T A Q) for a random range Q of A, plus Hutchinson's estimate on the complement of Q.

    Q has as many columns as there are probes, and the complement as many probes: 3 products each.

    Args:
        matvec: v (n, k) to A v.
        n: the size of A.
        like: an empty tensor of A's dtype and device.
        options: probes, seed, progress.

    Returns:
        The estimate, with its standard error and the number of products.

    Raises:
        ValueError: fewer than 2 probes.
        NonFiniteError: NaN or infinity in a product.

    Example:
        >>> import torch
        >>> A = torch.diag(torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64))
        >>> found = hutchpp(lambda v: A @ v, 3, A.new_empty(0), Probes(2, seed=0))
        >>> found.value.shape, found.matvecs
        (torch.Size([]), 6)

    Source: Meyer, Musco, Musco and Woodruff (2021), Hutch++: optimal stochastic trace estimation.
    """
    probes, generator = options.probes or PROBES, options.generator(like.device)
    _require_probes(probes)
    with Products(matvec, "hutch++", progress=options.progress) as products:
        Q = orthonormal(products(signs(n, probes, like, generator)))
        inside = (Q * products(Q)).double().sum()
        z = orthogonalised(signs(n, probes, like, generator), Q)[0]
        rest = (z * products(z)).double().sum(0)
        error = rest.std() / probes**0.5
        value = inside + rest.mean()
        return Estimate(value.to(like), error.to(like), products.count, probes)


def xtrace(matvec: Matvec, n: int, like: Tensor, options: Probes) -> Estimate:
    r"""The mean over probes of the trace on the range of the others, plus a sample of the rest.

    .. math:: \frac1m \sum_i \operatorname{tr} Q_i^T A Q_i + \tilde\omega_i^T A \tilde\omega_i,
        \quad \tilde\omega_i \propto (I - Q_i Q_i^T)\,\omega_i

    Q_i is an orthonormal basis of the A omega_j with j other than i. Each product serves both in a
    basis and in a sample. A probe takes 2 products, and there are at most n / 2 probes.

    Args:
        matvec: v (n, k) to A v.
        n: the size of A.
        like: an empty tensor of A's dtype and device.
        options: probes, tol, max_matvecs, seed, progress.

    Returns:
        The estimate, with its standard error and the number of products.

    Raises:
        ValueError: fewer than 2 probes.
        NonFiniteError: NaN or infinity in a product.

    Example:
        >>> import torch
        >>> A = torch.diag(torch.arange(6.0))
        >>> found = xtrace(lambda v: A @ v, 6, A.new_empty(0), Probes(2, seed=0))
        >>> found.value.shape, found.matvecs
        (torch.Size([]), 4)

    Source: Epperly, Tropp and Webber (2024), XTrace: making the most of every sample in stochastic
        trace estimation.
    """
    with Products(matvec, "xtrace", progress=options.progress) as products:
        sketch = _Sketch(products, n, like, options.generator(like.device), gaussian=True)

        def more(k: int) -> tuple[Tensor, Tensor]:
            sketch.grow(k)
            return _mean(_xtrace_samples(sketch).unsqueeze(0), False)

        probes = min(options.probes or PROBES, n // 2)
        return _refined(more, products, probes, 2, _within(options, n), like)


def xdiag(matvec: Matvec, n: int, like: Tensor, options: Probes) -> Estimate:
    """The diagonal (n,) of a symmetric A: exact on a random range, plus samples of the rest.

    A probe takes 2 products, and there are at most n / 2 probes.

    Args:
        matvec: v (n, k) to A v.
        n: the size of A.
        like: an empty tensor of A's dtype and device.
        options: probes, tol (of the whole diagonal in the 2-norm), max_matvecs, seed, progress.

    Returns:
        The estimate, with its standard error and the number of products.

    Raises:
        ValueError: fewer than 2 probes.
        NonFiniteError: NaN or infinity in a product.

    Example:
        >>> import torch
        >>> A = torch.diag(torch.arange(6.0))
        >>> found = xdiag(lambda v: A @ v, 6, A.new_empty(0), Probes(2, seed=0))
        >>> found.value.shape, found.matvecs
        (torch.Size([6]), 4)

    Source: Epperly, Tropp and Webber (2024), XTrace, section 3.
    """
    with Products(matvec, "xdiag", progress=options.progress) as products:
        sketch = _Sketch(products, n, like, options.generator(like.device), gaussian=False)

        def more(k: int) -> tuple[Tensor, Tensor]:
            sketch.grow(k)
            Q, Z, S, R = sketch.Q, sketch.Z, sketch.S.to(sketch.Q), sketch.R.to(sketch.Q)
            fixed = (Q * Z).sum(1)
            left = Q @ S  # the direction that only probe i has found
            samples = left * (sketch.probes * (S * R).sum(0) - Z @ S)
            mean, error = _mean(samples, True)
            return fixed + mean, error

        probes = min(options.probes or PROBES, n // 2)
        return _refined(more, products, probes, 2, _within(options, n), like)


def quadrature_trace(
    matvec: Matvec,
    f: Callable[[Tensor], Tensor],
    n: int,
    like: Tensor,
    options: Probes,
    *,
    what: str = "tr f(A)",
) -> Estimate:
    """tr f(A) of a symmetric A by stochastic Lanczos quadrature.

    The value is the mean over random signs z of the Gauss quadrature of z.f(A) z. Its bias is
    extrapolated from the quadratures after a third, two thirds and all of the steps, which cost no
    further product. A probe stops early if its bias is below a tenth of the standard error.

    Args:
        matvec: v (n, k) to A v.
        f: eigenvalues to their function, elementwise.
        n: the size of A.
        like: an empty tensor of A's dtype and device.
        options: probes, steps, tol, max_matvecs, seed, progress.
        what: the name of the estimated quantity, for messages.

    Returns:
        The estimate, with its standard error and the number of products.

    Raises:
        ValueError: fewer than 2 probes, or a matrix that is not symmetric.
        NotPositiveDefiniteError: f is not finite on the spectrum.
        NonFiniteError: NaN or infinity in a product.

    Example:
        >>> import torch
        >>> A = torch.diag(torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64))
        >>> options = Probes(2, steps=3, seed=0)
        >>> found = quadrature_trace(lambda v: A @ v, torch.log, 3, A.new_empty(0), options)
        >>> round(float(found.value), 4)  # log 10: signs are exact for a diagonal A
        2.3026

    Source: Ubaru, Chen and Saad (2017), Fast estimation of tr(f(A)) via stochastic Lanczos
        quadrature.
    """
    samples: list[Tensor] = []
    biases: list[float] = []
    steps, generator = options.steps or STEPS, options.generator(like.device)

    def more(k: int) -> tuple[Tensor, Tensor]:
        z = signs(n, k, like, generator)
        run = Lanczos(products, z, steps, reorthogonalize=True, method=what)
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

    with Products(matvec, what, progress=options.progress) as products:
        found = _refined(more, products, options.probes or QUADRATURES, steps, options, like)
    return replace(found, bias=max(biases))


def _quadratures(run: Lanczos, f: Callable[[Tensor], Tensor], what: str) -> tuple[Tensor, float]:
    """z.f(A) z / |z|^2 of each probe, and the bias of their mean."""
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
    options: Probes,
    like: Tensor,
) -> Estimate:
    """Double the probes until the standard error is small enough. An interrupt ends it early.

    Args:
        more: draws so many further probes; the mean over all probes, and its standard error.
        products: counts the products.
        probes: how many to draw first.
        cost: products of one probe.
        options: tol and max_matvecs.
        like: an empty tensor of the dtype and device of the value.
    """
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
        tol = options.tol
        short = tol is not None and float(error.norm()) > tol * float(mean.norm())
        if not short or products.count + cost * more_probes > options.max_matvecs:
            return found


def _within(options: Probes, n: int) -> Probes:
    """At most n products: these give the exact value."""
    return replace(options, max_matvecs=min(options.max_matvecs, n))


def _require_probes(probes: int) -> None:
    if probes < 2:
        raise ValueError(f"expected at least 2 probes= for a standard error, got {probes}")


class _Sketch:
    """Probes W, an orthonormal basis Q of A W, and Z = A Q; `grow` repeats no product.

    Attributes:
        probes: W (n, m).
        Q: (n, m).
        Z: A Q (n, m).
        R: Q^T A W (m, m), float64.
        S: (m, m), float64. Column i is a unit vector in Q's coordinates; it is orthogonal to A w_j
            for all j other than i.
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
        """Add k probes: 2 k products."""
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
