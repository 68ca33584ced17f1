"""Which likelihood a loss has, from its gradient at the outputs."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..likelihoods import Bernoulli, Categorical, Likelihood
from ..precision import widened

__all__ = ["placed", "recognised"]

CLOSE = 1e-3  # relative, of gradients that pass through half precision or a softmax


def placed(given: Likelihood | None, outputs: Tensor, gradient: Tensor) -> Likelihood | None:
    """The likelihood; one with classes in a dimension that is not given, if the loss proves it.

    Along the right dimension the gradient is a multiple of p - e_y, or of p - q with labels q that
    are smoothed, mixed or weighted.
    """
    ambiguous = isinstance(given, Categorical) and given.class_dim is None and outputs.dim() > 2
    if given is not None and not ambiguous:
        return given
    start = given if isinstance(given, Categorical) else Categorical()
    if not bool(gradient.any()):
        return None
    for proves in (_hard, _soft):
        for dim in dict.fromkeys((outputs.dim() - 1, 1)):
            if outputs.dim() >= 2 and outputs.shape[dim] >= 2:
                candidate = replace(start, class_dim=dim)
                if proves(candidate, outputs, gradient):
                    return candidate
    return None


def recognised(outputs: Tensor, gradient: Tensor) -> Likelihood | None:
    """The likelihood of a softmax or a logistic cross-entropy, if the gradient proves it."""
    found = placed(None, outputs, gradient)
    if found is None and _logistic(outputs, gradient):
        found = Bernoulli()
    return found


def _hard(candidate: Categorical, outputs: Tensor, gradient: Tensor) -> bool:
    """Labels are classes, and each counts the same."""
    labels = candidate.target_of(outputs, gradient)
    (score,) = candidate.directions(outputs, labels, "empirical")
    along = (score * gradient).sum() / score.square().sum()
    rest = torch.linalg.vector_norm(gradient - along * score)
    eps = torch.finfo(gradient.dtype).eps
    return bool((along > 0) & (rest <= eps**0.5 * torch.linalg.vector_norm(gradient)))


def _soft(candidate: Categorical, outputs: Tensor, gradient: Tensor) -> bool:
    """The gradient sums to zero, and is c p - b but for the two likeliest labels of a row."""
    dim = candidate.class_dim or 0
    classes = outputs.shape[dim]
    p = widened(outputs.detach()).movedim(dim, -1).reshape(-1, classes).softmax(-1)
    g = widened(gradient).movedim(dim, -1).reshape(-1, classes)
    sums = g.sum(-1).abs().sum() / g.abs().sum()
    if classes < 5 or bool(sums > CLOSE):
        return False
    kept = g.argsort(-1)[:, 2:]
    g, p = g.gather(1, kept), p.gather(1, kept)
    g, p = g - g.mean(-1, keepdim=True), p - p.mean(-1, keepdim=True)
    slope = (g * p).sum(-1, keepdim=True) / p.square().sum(-1, keepdim=True).clamp_min(1e-30)
    rest = torch.linalg.vector_norm(g - slope * p)
    return bool(((slope >= 0).all()) & (rest <= CLOSE * torch.linalg.vector_norm(g)))


def _logistic(outputs: Tensor, gradient: Tensor) -> bool:
    """Labels are 0 or 1, and each counts the same."""
    up, g = widened(outputs.detach()).sigmoid(), widened(gradient)
    most = torch.where(g > 0, up, 1 - up)
    seen = most > CLOSE
    ratios = (g.abs() / most)[seen]
    if ratios.numel() < 2:
        return False
    middle = ratios.median()
    return bool((middle > 0) & ((ratios - middle).abs() <= CLOSE * middle).all())
