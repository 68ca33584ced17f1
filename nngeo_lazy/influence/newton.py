"""Leaving out with the curvature of the example that is left out: a Newton step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..builders import Jacobian
from ..data import Batches
from ..fingerprints import refuse_shuffling
from ..likelihoods import Likelihood, of_heads, resolve_loss
from ..likelihoods.names import reading_of
from ..operators import BaseLinearOperator
from ..operators.kernel import kernel_of
from ..quantities import LossLike
from ..skeleton import skeleton

__all__ = ["newton_influences"]


def newton_influences(
    model: nn.Module,
    inverse: BaseLinearOperator,
    n: int,
    names: list[str],
    train: Any,
    test: Any,
    loss: LossLike,
    forward: Callable[[nn.Module, Any], Tensor] | None,
    target: Callable[[Any], Tensor] | None,
) -> Tensor:
    """See `influences`; (test examples, training examples)."""
    loss = of_heads(loss)
    device, reading = next(model.parameters()).device, reading_of(loss)
    batches = Batches(train, device=device, forward=forward, target=target, **reading)
    joined = batches.forward if reading else forward  # the outputs of heads in one tensor
    options: dict[str, Any] = {"params": names, "target": target}
    gradients = Jacobian(model, test, "factored", loss=loss, forward=forward, **options)
    rows = Jacobian(model, train, "factored", forward=joined, **options)
    own = kernel_of(rows, rows, inverse, outputs="per_example").to_dense() / n
    across = rows @ (inverse @ gradients.mT.to_dense())  # (N C, tests)
    scores, hessians = _of_outputs(model, train, batches, loss)
    # g~_i = J_i^T (I - H_i K_ii)^-1 r_i, by Woodbury's identity
    eye = torch.eye(own.shape[-1], dtype=own.dtype, device=own.device)
    weights = torch.linalg.solve(eye - hessians @ own, scores.unsqueeze(-1)).squeeze(-1)
    by_example = across.unflatten(0, (-1, own.shape[-1]))
    return torch.einsum("nct,nc->tn", by_example, weights) / n


def _of_outputs(
    model: nn.Module,
    train: Any,
    batches: Batches,
    loss: LossLike,
) -> tuple[Tensor, Tensor]:
    """Gradients (N, C) and Hessians (N, C, C) of the losses in the outputs."""
    refuse_shuffling(train, "influences")
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
