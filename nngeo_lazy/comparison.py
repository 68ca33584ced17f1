"""How far each representation is from the exact matrix, in what users need of it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .arguments import NonNegative, checked
from .builders import FIM, plan
from .errors import DataError, NNGeoError
from .likelihoods import Estimator, LikelihoodLike, described
from .numerics.estimation import logdet, trace
from .numerics.spectra import eigsh
from .operators import BaseLinearOperator
from .operators.report import nbytes
from .quantities import LossGradients
from .representations import RepresentationLike, resolve
from .selectors import Selector
from .sweep import make_sweep
from .switches import outside_inference, untraced
from .table import Table

__all__ = ["Compared", "compare"]

DEFAULT: tuple[RepresentationLike, ...] = (
    "diagonal",
    "quasi_diagonal",
    "kfac",
    "ekfac",
    "block_diagonal",
    "low_rank",
)
DENSE_BYTES = 2**27  # up to this size the exact matrix is dense


@dataclass(frozen=True)
class Compared:
    """One representation beside the exact matrix F; errors are relative.

    Attributes:
        representation: which.
        direction: |x - x*| / |x*| of the natural gradient x = (F + d)^-1 g.
        cosine: between x and x*, in the norm of F + d.
        quadratic: of g^T F g.
        largest: of the largest eigenvalue.
        trace: of the trace.
        logdet: the difference of logdet(F + d) for each parameter, in nats.
        seconds: to build it, and to solve once.
        bytes: that it holds.
        note: why it was left out; empty if it was not.
    """

    representation: str
    direction: str
    cosine: str
    quadratic: str
    largest: str
    trace: str
    logdet: str
    seconds: str
    bytes: int
    note: str = ""


@untraced
@checked
def compare(
    model: nn.Module,
    loader: Any,
    representations: Sequence[RepresentationLike] = DEFAULT,
    *,
    likelihood: LikelihoodLike | None = None,
    estimator: Estimator = "exact",
    damping: NonNegative | None = None,
    seconds: NonNegative | None = None,
    max_bytes: NonNegative | None = None,
    seed: int = 0,
    params: Selector | None = None,
    forward: Callable[[nn.Module, Any], Tensor] | None = None,
    target: Callable[[Any], Tensor] | None = None,
    progress: bool = False,
) -> Table[Compared]:
    """How far each representation of the Fisher is from the exact one, so that one can choose.

    The exact matrix is dense if it takes at most 128 MiB, and matrix-free otherwise: its solves are
    then conjugate gradients, its trace and log-determinant estimates, which are marked by ~.

    Args:
        model: the network.
        loader: some of the data; a few hundred examples tell.
        representations: names or options objects.
        likelihood: as in `FIM`.
        estimator: as in `FIM`, of all of them.
        damping: d; by default a tenth of the mean eigenvalue of F.
        seconds: for all representations; what comes later is left out, and the table says so.
        max_bytes: what takes more is left out, as `ng.plan` says before it is built.
        seed: of drawn labels, the same for all, and of estimates.
        params: which parameters.
        forward: as in `FIM`.
        target: as in `FIM`.
        progress: whether to show a progress bar.

    Returns:
        A row for each representation, which prints as a table; `nngeo_lazy.plot.compared` draws it.

    Raises:
        DataError: no representation; what `FIM` raises of the exact matrix.

    Example:
        >>> import torch
        >>> model, x, y = nn.Linear(3, 2), torch.randn(40, 3), torch.randint(2, (40,))
        >>> found = compare(model, (x, y), ["diagonal", "dense"])
        >>> [row.representation for row in found], found[1].direction
        (['diagonal', 'dense'], '0')
    """
    if not representations:
        raise DataError("expected at least one representation to compare, got none")
    options: dict[str, Any] = {"likelihood": likelihood, "estimator": estimator, "params": params}
    options.update(forward=forward, target=target, progress=progress)
    if estimator == "mc":
        options["seed"] = seed
    start = time.perf_counter()
    exact = _exact(model, loader, options)
    spent = time.perf_counter() - start
    scale = trace(exact, seed=seed)
    size = int(exact.shape[-1])
    d = 0.1 * float(scale.value) / size if damping is None else float(damping)
    if not d > 0:
        raise DataError("expected a Fisher that is not zero: check the model and the data")
    truth = _Truth.of(exact, _gradient(model, loader, exact, params, forward, target), d, seed)
    rows = [
        _row(model, loader, each, options, truth, start, seconds, max_bytes)
        for each in representations
    ]
    kind = "dense" if exact.is_explicit else "matrix-free"
    summary = [f"the exact matrix ({kind}) took {spent:.2g} s; damping {d:.3g}, P={size:,}"]
    return Table(rows, summary)


@dataclass(frozen=True)
class _Truth:
    """The exact matrix, and what is asked of it."""

    exact: BaseLinearOperator
    gradient: Tensor
    damping: float
    solution: Tensor
    quadratic: float
    largest: float
    trace: float
    logdet: float
    estimated: tuple[bool, bool]  # the last two
    seed: int

    @classmethod
    def of(cls, F: BaseLinearOperator, g: Tensor, d: float, seed: int) -> _Truth:
        """Of a matrix at a gradient."""
        traced, volume = trace(F, seed=seed), logdet(F.damped(d), seed=seed)
        return cls(
            F,
            g,
            d,
            F.solve(g, damping=d),
            float(F.vTMv(g)),
            float(eigsh(F, 1)[0][0]),
            float(traced.value),
            float(volume.value),
            (float(traced.standard_error) > 0, float(volume.standard_error) > 0),
            seed,
        )


def _exact(model: nn.Module, loader: Any, options: dict[str, Any]) -> BaseLinearOperator:
    implicit = FIM(model, loader, "implicit", **options)
    size = implicit.shape[-1]
    small = size * size * implicit.dtype.itemsize <= DENSE_BYTES
    return FIM(model, loader, "dense", **options) if small else implicit


def _gradient(
    model: nn.Module,
    loader: Any,
    F: BaseLinearOperator,
    params: Selector | None,
    forward: Callable[[nn.Module, Any], Tensor] | None,
    target: Callable[[Any], Tensor] | None,
) -> Tensor:
    """The mean gradient of the likelihood's loss at the observed labels."""
    loss = described(str(F.info.quantity.get("loss")))
    space = F.space
    if loss is None or space is None:
        raise DataError("expected a likelihood whose loss is known: pass one of the package's")
    options: dict[str, Any] = {"params": params, "forward": forward, "target": target}
    sweep = make_sweep(LossGradients(loss), model, loader, **options)
    total, count = space.zeros(), 0
    with outside_inference(), closing(sweep.pieces()) as pieces:
        for piece in pieces:
            count += len(piece.recorded.outputs)
            for forms in piece.forms():
                for form, part in zip(forms, piece.parts, strict=True):
                    if form is None:
                        continue
                    for at, values in part.layout.scatter(form.total().unsqueeze(-1)):
                        total[at : at + len(values)] += values.squeeze(-1).to(total)
    return total / count


def _row(
    model: nn.Module,
    loader: Any,
    wanted: RepresentationLike,
    options: dict[str, Any],
    truth: _Truth,
    start: float,
    seconds: float | None,
    max_bytes: float | None,
) -> Compared:
    name = wanted if isinstance(wanted, str) else resolve(wanted).described()
    if seconds is not None and time.perf_counter() - start > seconds:
        return _left_out(name, 0, f"past {seconds:g} s")
    try:
        if max_bytes is not None:
            takes = plan(FIM, model, loader, wanted, **{**options, "progress": False}).bytes
            if takes > max_bytes:
                return _left_out(name, takes, f"past {max_bytes:g} bytes")
        begun = time.perf_counter()
        F = FIM(model, loader, wanted, **options)
        x = F.solve(truth.gradient, damping=truth.damping)
        took = time.perf_counter() - begun
    except NNGeoError as error:
        return _left_out(name, 0, str(error).split(":")[0])
    damped, best = truth.exact.damped(truth.damping), truth.solution
    inner = float(x @ (damped @ best))
    norms = math.sqrt(max(float(damped.vTMv(x)) * float(damped.vTMv(best)), 1e-300))
    volume = logdet(F.damped(truth.damping), seed=truth.seed)
    traced = trace(F, seed=truth.seed)
    marks = [
        "~" if known or float(own.standard_error) > 0 else ""
        for known, own in zip(truth.estimated, (traced, volume), strict=True)
    ]
    apart = (float(volume.value) - truth.logdet) / len(best)
    return Compared(
        name,
        _number(float((x - best).norm() / best.norm())),
        f"{inner / norms:.4f}",
        _relative(float(F.vTMv(truth.gradient)), truth.quadratic),
        _relative(float(eigsh(F, 1)[0][0]), truth.largest),
        marks[0] + _relative(float(traced.value), truth.trace),
        marks[1] + _number(apart),
        f"{took:.2g}",
        nbytes(F),
    )


def _left_out(name: str, size: int, why: str) -> Compared:
    return Compared(name, "", "", "", "", "", "", "", size, f"left out: {why}")


def _relative(found: float, known: float) -> str:
    return _number(abs(found - known) / max(abs(known), 1e-300))


def _number(value: float) -> str:
    """Two digits; what is rounding is 0."""
    return "0" if abs(value) < 1e-5 else f"{value:.2g}"
