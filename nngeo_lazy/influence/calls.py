"""Influences of training examples on test losses, and on their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..arguments import PositiveInt, checked
from ..collectives import digest
from ..data import Batches
from ..distributed import Distributed
from ..errors import wrong_option
from ..fingerprints import refuse_shuffling
from ..operators import BaseLinearOperator
from ..operators.damping import DampingLike
from ..quantities import LossLike
from ..rowwise import Piece, quadratics
from ..switches import untraced
from .newton import newton_influences
from .queries import Measure, Queries, fitting, loss_of
from .shares import of_shares
from .streams import Chunks, Top, batches_of, largest, whole

__all__ = ["influences", "self_influence"]

METHODS = ("gradient", "newton")
PER = ("example", "token", "layer")


@untraced
@checked
def influences(
    model: nn.Module,
    F: BaseLinearOperator,
    train: Any,
    test: Any,
    *,
    loss: LossLike | None = None,
    measure: Measure | None = None,
    damping: DampingLike = 0.0,
    method: str = "gradient",
    per: str = "example",
    top: PositiveInt | None = None,
    path: str | Path | None = None,
    forward: Callable[[nn.Module, Any], Tensor] | None = None,
    target: Callable[[Any], Tensor] | None = None,
    progress: bool = False,
) -> Tensor | dict[str, Tensor] | Top:
    r"""The predicted change of each test loss when a training example is left out.

    .. math:: \ell_t(w_{-i}) - \ell_t(w) \approx g_t^T (F + d)^{-1} \tilde g_i / N

    with g the gradients of single losses at parameters w that minimise the mean training loss plus
    d/2 |w|^2, and N the number of examples of F. Large and positive: leaving it out hurts.

    The test gradients are multiplied by the inverse once, and kept. The training batches pass by:
    memory is queries times parameters (see `Queries` for less), one batch, and the scores.

    Args:
        model: the network, at w.
        F: its Fisher, Gauss-Newton matrix or Hessian over the training examples, in any
            representation and over any of its parameters.
        train: training examples (inputs, target), all or some, in an order that does not change.
            `ng.Distributed(train)` shares them out: each process computes the columns of its own,
            and has all of them in the end. F and test are then the same in all processes.
        test: the examples whose losses are predicted, or `Queries`.
        loss: as in `GGN`; its reduction is ignored. By default that of F's likelihood.
        measure: `(outputs, batch) -> (N,)`, asked about in place of the test losses.
        damping: d, the weight decay of the training, if it had any.
        method: "gradient": g_i itself, the influence function; "newton": g_i from the curvature
            without example i, a Newton step on the loss without it. That is exact for a linear
            model with squared errors, and has C columns to solve for each example, all of which
            are held.
        per: "example"; "token": what each position of a training example adds, zero where a batch
            is shorter, for layers that multiply each position by a weight; "layer": what each
            layer adds.
        top: keep only so many examples of the largest scores for each query.
        path: a folder, to which the scores of each batch are written when it is done. The same call
            goes on there after an interruption.
        forward: `(model, batch) -> outputs` in place of the default call.
        target: `batch -> target` in place of the default.
        progress: whether to show a progress bar.

    Returns:
        (test examples, training examples); (test, training, tokens) per token; a dict of the first
        by layer, whose sum it is; with `top` the `values` and `indices`, both (test examples, k).

    Raises:
        DataError: a shuffling loader, no targets, F is no mean over examples; a path that holds the
            scores of another run or of other data, or that cannot be written.
        SpaceMismatchError: F is not over parameters of the model.
        NotPositiveDefiniteError: F is singular and not damped.
        UnsupportedLayerError: a layer without scores per token.

    Example:
        >>> import nngeo_lazy as ng
        >>> model, x, y = nn.Linear(3, 2), torch.randn(20, 3), torch.randint(2, (20,))
        >>> F = ng.FIM(model, (x, y), "ekfac")
        >>> influences(model, F, (x, y), (x[:4], y[:4]), damping=1e-2).shape
        torch.Size([4, 20])

    Source: Koh and Liang (2017), Understanding black-box predictions via influence functions, eq.
        2; Grosse et al. (2023), Studying large language model generalization with influence
        functions, section 2; Cook and Weisberg (1982), section 2.2, on leaving out exactly.
    """
    if method not in METHODS:
        raise ValueError(wrong_option("method", method, METHODS, "influence"))
    if per not in PER:
        raise ValueError(wrong_option("per", per, PER, "influence"))
    plain = per == "example" and top is None and path is None
    if top is not None and per != "example":
        raise ValueError(f"the largest scores are those of whole examples, not per {per!r}")
    newton = method == "newton"
    if newton and (not plain or measure is not None or isinstance(test, Queries)):
        raise ValueError(
            "method='newton' has scores of whole examples on test losses alone: leave out per, "
            "top, path and measure, and pass the test data themselves"
        )
    n, names = fitting(model, F)
    data: dict[str, Any] = {"forward": forward, "target": target}
    if isinstance(train, Distributed) and train.group.size > 1:
        if not plain:
            raise ValueError("with ng.Distributed scores are whole: leave out per, top and path")
        share = Batches(train, device=next(model.parameters()).device, **data)
        options: dict[str, Any] = {"loss": loss, "measure": measure, "damping": damping, **data}
        options["method"] = method
        return of_shares(
            share, lambda own: cast(Tensor, influences(model, F, own, test, **options))
        )
    loss = loss_of(F, loss)
    if newton:
        inverse = F.inverse(damping=damping)
        return newton_influences(model, inverse, n, names, train, test, loss, forward, target)
    refuse_shuffling(train, "influences")
    queries = test
    if not isinstance(test, Queries):
        queries = Queries(model, F, test, loss=loss, measure=measure, damping=damping, **data)

    def score(piece: Piece) -> Tensor:
        return _scores(queries, piece, per) / n

    chunks = None
    if path is not None:
        run = {"queries": queries.checksum(), "per": per, "loss": repr(loss), "examples": n}
        run["parameters"] = [digest(p) for p in model.parameters()]
        chunks = Chunks(path, run)
    stream = batches_of(model, names, train, loss, score, chunks, progress=progress, **data)
    if top is not None:
        return largest(stream, top)
    found = whole(stream)
    if per == "example":
        return found.mT
    if per == "token":
        return found.permute(2, 0, 1)
    return dict(zip(queries.layers, found.permute(1, 2, 0), strict=True))


def _scores(queries: Queries, piece: Piece, per: str) -> Tensor:
    """(n, Q), (n, T, Q) or (n, L, Q) of a piece."""
    (forms,) = piece.forms()
    present = [(form, part) for form, part in zip(forms, piece.parts, strict=True) if form]
    if per == "token":
        return torch.stack([queries.position_scores(*each) for each in present]).sum(0)
    outputs = piece.recorded.outputs
    zero = torch.zeros(
        len(outputs), queries.num_queries, dtype=queries.dtype, device=outputs.device
    )
    by_layer = {name: zero.clone() for name in queries.layers}
    for form, part in present:
        by_layer[queries.layer_of(part)] += queries.scores(form, part)
    stacked = torch.stack(list(by_layer.values()), 1)
    return stacked if per == "layer" else stacked.sum(1)


@untraced
@checked
def self_influence(
    model: nn.Module,
    F: BaseLinearOperator,
    train: Any,
    *,
    loss: LossLike | None = None,
    damping: DampingLike = 0.0,
    path: str | Path | None = None,
    forward: Callable[[nn.Module, Any], Tensor] | None = None,
    target: Callable[[Any], Tensor] | None = None,
    progress: bool = False,
) -> Tensor:
    r"""The influence of each training example on its own loss, streamed over the data.

    .. math:: g_i^T (F + d)^{-1} g_i / N

    Large for examples that are memorised, such as wrong labels. Nothing is held but a batch.

    Args:
        model: the network.
        F: as in `influences`.
        train: training examples.
        loss: as in `influences`.
        damping: d.
        path: a folder, as in `influences`.
        forward: `(model, batch) -> outputs` in place of the default call.
        target: `batch -> target` in place of the default.
        progress: whether to show a progress bar.

    Returns:
        (N,), of the examples of `train`.

    Raises:
        DataError: as `influences`.

    Example:
        >>> import nngeo_lazy as ng
        >>> model, x, y = nn.Linear(3, 2), torch.randn(20, 3), torch.randint(2, (20,))
        >>> self_influence(model, ng.FIM(model, (x, y), "ekfac"), (x, y), damping=1e-2).shape
        torch.Size([20])

    Source: Feldman and Zhang (2020), What neural networks memorize and why.
    """
    n, names = fitting(model, F)
    refuse_shuffling(train, "self_influence")
    inverse = F.inverse(damping=damping)
    loss = loss_of(F, loss)

    def score(piece: Piece) -> Tensor:
        (forms,) = piece.forms()
        return quadratics(forms, piece.parts, inverse, full=False) / n

    chunks = None
    if path is not None:
        matrix = [digest(t) for t in inverse.representation()]
        run = {"self": repr(damping), "matrix": matrix, "loss": repr(loss), "examples": n}
        run["parameters"] = [digest(p) for p in model.parameters()]
        chunks = Chunks(path, run)
    data: dict[str, Any] = {"forward": forward, "target": target, "progress": progress}
    return whole(batches_of(model, names, train, loss, score, chunks, **data)).squeeze(1)
