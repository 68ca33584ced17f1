"""Influence functions: what the test losses would be without single training examples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .arguments import checked
from .builders import Jacobian
from .data import Batch, Batches
from .distributed import Distributed
from .errors import DataError, SpaceMismatchError, wrong_option
from .fingerprints import refuse_shuffling
from .likelihoods import Likelihood, resolve_loss
from .operators import BaseLinearOperator
from .operators.damping import DampingLike
from .operators.kernel import kernel_of
from .quantities import LossLike
from .selectors import space_of
from .skeleton import skeleton

__all__ = ["influences"]

METHODS = ("gradient", "newton")


@checked
def influences(
    model: nn.Module,
    F: BaseLinearOperator,
    train: Any,
    test: Any,
    *,
    loss: LossLike,
    damping: DampingLike = 0.0,
    method: str = "gradient",
    forward: Callable[[nn.Module, Any], Tensor] | None = None,
    target: Callable[[Any], Tensor] | None = None,
) -> Tensor:
    r"""The predicted change of each test loss when a training example is left out.

    .. math:: \ell_t(w_{-i}) - \ell_t(w) \approx g_t^T (F + d)^{-1} \tilde g_i / N

    with g the gradients of single losses at parameters w that minimise the mean training loss plus
    d/2 |w|^2, and N the number of examples of F. Large and positive: leaving it out hurts.

    Args:
        model: the network, at w.
        F: its Fisher, Gauss-Newton matrix or Hessian over the training examples, in any
            representation and over any of its parameters.
        train: training examples (inputs, target), all or some, in an order that does not change.
            `ng.Distributed(train)` shares them out: each process computes the columns of its own,
            and has all of them in the end. F and test are then the same in all processes.
        test: the examples whose losses are predicted.
        loss: as in `GGN`; its reduction is ignored.
        damping: d, the weight decay of the training, if it had any.
        method: "gradient": g_i itself, the influence function; "newton": g_i from the curvature
            without example i, a Newton step on the loss without it. That is exact for a linear
            model with squared errors, and has C columns to solve for each example.
        forward: `(model, batch) -> outputs` in place of the default call.
        target: `batch -> target` in place of the default.

    Returns:
        (test examples, training examples).

    Raises:
        DataError: a shuffling loader, no targets, F is no mean over examples.
        SpaceMismatchError: F is not over parameters of the model.
        NotPositiveDefiniteError: F is singular and not damped.

    Example:
        >>> import nngeo_lazy as ng
        >>> model, x, y = nn.Linear(3, 2), torch.randn(20, 3), torch.randint(2, (20,))
        >>> F = ng.FIM(model, (x, y), "ekfac")
        >>> influences(model, F, (x, y), (x[:4], y[:4]), loss="categorical", damping=1e-2).shape
        torch.Size([4, 20])

    Source: Koh and Liang (2017), Understanding black-box predictions via influence functions, eq.
        2; Grosse et al. (2023), Studying large language model generalization with influence
        functions, section 2; Cook and Weisberg (1982), section 2.2, on leaving out exactly.
    """
    if method not in METHODS:
        raise ValueError(wrong_option("method", method, METHODS, "influence"))
    if isinstance(train, Distributed) and train.group.size > 1:
        where = next(model.parameters()).device
        share = Batches(train, device=where, forward=forward, target=target)
        options: dict[str, Any] = {"loss": loss, "damping": damping, "method": method}
        options.update(forward=forward, target=target)
        return _of_shares(share, lambda data: influences(model, F, data, test, **options))
    n, names = _fitting(model, F)

    def rows_of(data: Any, loss: LossLike | None) -> BaseLinearOperator:
        return Jacobian(
            model, data, "factored", loss=loss, params=names, forward=forward, target=target
        )

    inverse = F.inverse(damping=damping)
    gradients = rows_of(test, loss)
    if method == "gradient":
        return kernel_of(gradients, rows_of(train, loss), inverse).to_dense() / n
    rows = rows_of(train, None)
    own = kernel_of(rows, rows, inverse, outputs="per_example").to_dense() / n
    across = rows @ (inverse @ gradients.mT.to_dense())  # (N C, tests)
    scores, hessians = _of_outputs(model, train, loss, forward, target)
    # g~_i = J_i^T (I - H_i K_ii)^-1 r_i, by Woodbury's identity
    eye = torch.eye(own.shape[-1], dtype=own.dtype, device=own.device)
    weights = torch.linalg.solve(eye - hessians @ own, scores.unsqueeze(-1)).squeeze(-1)
    by_example = across.unflatten(0, (-1, own.shape[-1]))
    return torch.einsum("nct,nc->tn", by_example, weights) / n


def _of_shares(own: Batches, columns: Callable[[Any], Tensor]) -> Tensor:
    """The columns of all processes, in the order of the batches, from those of each one's share."""
    with own.group.together("influences"):
        sizes = {batch.key: _num_examples(batch) for batch in own}
        mine = columns(own.loader).mT if sizes else torch.empty(0, device=own.device)
        if sizes and len(mine) != sum(sizes.values()):
            raise DataError(
                f"expected {sum(sizes.values())} examples in this process's share, as its labels "
                f"say, but it has {len(mine)}"
            )
    parts: dict[tuple[int, ...], Tensor] = {}
    for known, rows in zip(own.group.gather(sizes), own.group.collect(mine), strict=True):
        if known:
            parts.update(zip(known, rows.split(list(known.values())), strict=True))
    return torch.cat([parts[key] for key in sorted(parts)]).mT


def _num_examples(batch: Batch) -> int:
    """Of a batch that has not been passed through the model."""
    leaves = [batch.target, *tree_leaves(batch.raw)]
    return next(len(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim() > 0)


def _fitting(model: nn.Module, F: Any) -> tuple[int, list[str]]:
    """How many examples F is a mean over, and the names of its parameters."""
    if not isinstance(F, BaseLinearOperator) or F.space is None or F.num_examples is None:
        raise DataError(
            "expected a Fisher, Gauss-Newton matrix or Hessian that knows its parameters and how "
            f"many examples it is a mean over, as FIM returns it, got {type(F).__name__}"
        )
    if space_of(model, list(F.space.names)) != F.space:
        raise SpaceMismatchError(f"expected F over parameters of the model, got one over {F.space}")
    return F.num_examples, list(F.space.names)


def _of_outputs(
    model: nn.Module,
    train: Any,
    loss: LossLike,
    forward: Callable[[nn.Module, Any], Tensor] | None,
    target: Callable[[Any], Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """Gradients (N, C) and Hessians (N, C, C) of the losses in the outputs."""
    refuse_shuffling(train, "influences")
    batches = Batches(train, device=next(model.parameters()).device, forward=forward, target=target)
    known: Likelihood | None = None
    model = skeleton(model)
    scores, hessians = [], []
    for batch in batches:
        outputs = batches.forward(model, batch.raw).detach()  # a forward may need autograd
        if known is None:
            known, _ = resolve_loss(loss, outputs, batch.target)
        (score,) = known.directions(outputs, batch.target, "empirical")
        flat = outputs.flatten(1) if outputs.dim() > 1 else outputs.unsqueeze(1)
        units = torch.eye(flat.shape[1], dtype=flat.dtype, device=flat.device)
        vectors = units.unsqueeze(1).expand(-1, len(flat), -1).reshape(-1, *outputs.shape)
        product = known.hessian_product(outputs, batch.target, vectors)
        scores.append(score.reshape(flat.shape))
        hessians.append(product.reshape(-1, *flat.shape).transpose(0, 1))
    return torch.cat(scores), torch.cat(hessians)
