"""The quantity axis: likelihoods, as output directions and loss-Hessian products.

The outputs of N examples are a tensor (N, ...). A *direction* is a cotangent shaped like it whose
n-th row is a column of S_n, with S_n S_n^T the Fisher information of example n's outputs; the loss
of an example sums over its positions. Exact roots have as few columns as possible.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import DataError

__all__ = [
    "ESTIMATORS",
    "Bernoulli",
    "Categorical",
    "Gaussian",
    "Likelihood",
    "check_estimator",
    "resolve",
]

ESTIMATORS = ("exact", "mc", "empirical")
NOT_FINITE = (
    "expected finite outputs, but the model gives NaN or infinity on some batch: check the inputs, "
    "and the training that led to these parameters"
)


class Likelihood(ABC):
    """p(y | f) of an example's outputs f, independent over positions and examples."""

    @abstractmethod
    def check(self, outputs: Tensor, target: Tensor | None) -> None:
        """Raise DataError where outputs or target cannot be this likelihood's."""

    @abstractmethod
    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        """-log p(y | f) up to a constant, summed over positions: (N,). Differentiable."""

    @abstractmethod
    def hessian_product(self, outputs: Tensor, target: Tensor | None, vectors: Tensor) -> Tensor:
        """H_n v_n with H_n the Hessian of the loss in the outputs, shaped like vectors.

        In closed form, without a C x C matrix; differentiable in outputs and vectors.

        Args:
            outputs: (N, ...).
            target: read only for masks.
            vectors: (..., N, ...) shaped like the outputs, with any leading dimensions.
        """

    @abstractmethod
    def num_terms(self, outputs: Tensor, target: Tensor | None) -> Tensor:
        """How many scalar labels are scored, a 0-d integer tensor."""

    @abstractmethod
    def flags(self, outputs: Tensor, target: Tensor | None) -> dict[str, Tensor]:
        """What is wrong in a way that only the device knows: message -> 0-d bool tensor."""

    @abstractmethod
    def _num_exact(self, outputs: Tensor, target: Tensor | None) -> int: ...

    @abstractmethod
    def _exact(self, outputs: Tensor, target: Tensor | None) -> Iterator[Tensor]: ...

    @abstractmethod
    def _sampled(
        self, outputs: Tensor, target: Tensor | None, generator: torch.Generator | None
    ) -> Tensor:
        """The gradient of the loss in the outputs at labels drawn from the model."""

    @abstractmethod
    def _observed(self, outputs: Tensor, target: Tensor) -> Tensor:
        """The gradient of the loss in the outputs at the observed labels."""

    def num_directions(
        self, outputs: Tensor, target: Tensor | None, estimator: str, samples: int = 1
    ) -> int:
        """How many directions there are: the columns of S_n."""
        counts = {"mc": samples, "empirical": 1}
        return counts[estimator] if estimator in counts else self._num_exact(outputs, target)

    def directions(
        self,
        outputs: Tensor,
        target: Tensor | None,
        estimator: str,
        *,
        samples: int = 1,
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """The directions, one at a time, shaped like the outputs and detached.

        Args:
            outputs: (N, ...).
            target: the observed labels; needed by "empirical", otherwise read only for masks.
            estimator: "exact", "mc" or "empirical".
            samples: label draws for "mc", each scaled by 1/sqrt(samples).
            generator: of the draws, on the outputs' device.

        Raises:
            DataError: an unknown estimator, or "empirical" without a target.
        """
        check_estimator(estimator)
        outputs = outputs.detach()
        wide = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        if estimator == "exact":
            made = self._exact(wide, target)
        elif estimator == "mc":
            scale = 1 / math.sqrt(samples)
            made = (self._sampled(wide, target, generator) * scale for _ in range(samples))
        elif target is None:
            raise DataError(
                "estimator='empirical' needs observed labels, but the batch has no target: pass "
                "(inputs, target) batches, or target="
            )
        else:
            made = iter([self._observed(wide, target)])
        while True:
            with torch.no_grad():
                direction = next(made, None)
            if direction is None:
                return
            yield direction.to(outputs.dtype)


@dataclass(frozen=True)
class Categorical(Likelihood):
    """Softmax over classes: the loss is cross-entropy, outputs are logits.

    Args:
        class_dim: the dimension of the classes. None: the only one of 2-d outputs, otherwise the
        one whose removal gives the target's shape. shift: 1 scores outputs[:, :-1] against
        target[:, 1:], as for the next token. ignore_index: a label that masks its position.

    Over T positions an exact quantity has T (C - 1) directions: each position and class needs its
    own.
    """

    class_dim: int | None = None
    shift: int = 0
    ignore_index: int = -100

    def check(self, outputs: Tensor, target: Tensor | None) -> None:
        _check_outputs(outputs)
        dim = self._class_dim(outputs, target)
        classes = outputs.shape[dim]
        if classes < 2:
            raise DataError(
                f"expected at least two classes in dimension {dim} of the outputs, got shape "
                f"{tuple(outputs.shape)}: for one logit take 'bernoulli'"
            )
        positions = [s for k, s in enumerate(outputs.shape) if k != dim]
        if self.shift and (len(positions) < 2 or positions[1] <= self.shift or dim == 1):
            raise DataError(
                f"shift={self.shift} needs outputs with more than {self.shift} positions in "
                f"dimension 1, got shape {tuple(outputs.shape)}"
            )
        if target is None:
            return
        if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
            raise DataError(
                f"expected integer class labels, got a target of {target.dtype}: convert it with "
                ".long(), or take another likelihood"
            )
        if list(target.shape) != positions:
            raise DataError(
                f"expected a target of shape {tuple(positions)} for outputs {tuple(outputs.shape)} "
                f"with the classes in dimension {dim}, got {tuple(target.shape)}"
            )

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        logits, labels, mask = self._canonical(outputs, target)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        picked = wide.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        return -(picked * mask).sum(1).to(outputs.dtype)

    def hessian_product(self, outputs: Tensor, target: Tensor | None, vectors: Tensor) -> Tensor:
        logits, _, mask = self._canonical(outputs, target)
        dim = self._class_dim(outputs, target)
        v = self._positions(vectors, dim - outputs.dim(), vectors.dim() - outputs.dim())
        p = logits.softmax(-1)
        product = p * v
        product = product - p * product.sum(-1, keepdim=True)
        return self._embed(product * mask.unsqueeze(-1), outputs, target)

    def num_terms(self, outputs: Tensor, target: Tensor | None) -> Tensor:
        _, _, mask = self._canonical(outputs, target)
        return mask.sum().to(torch.int64)

    def flags(self, outputs: Tensor, target: Tensor | None) -> dict[str, Tensor]:
        flags = {NOT_FINITE: ~outputs.detach().isfinite().all()}
        if target is not None:
            classes = outputs.shape[self._class_dim(outputs, target)]
            valid = ((target >= 0) & (target < classes)) | (target == self.ignore_index)
            flags[
                f"expected labels from 0 to {classes - 1}, or {self.ignore_index} to ignore a "
                "position, but some are out of range: check the labels and the number of outputs"
            ] = ~valid.all()
        return flags

    def _num_exact(self, outputs: Tensor, target: Tensor | None) -> int:
        logits, _, _ = self._canonical(outputs, target)
        _, positions, classes = logits.shape
        return positions * (classes - 1)

    def _exact(self, outputs: Tensor, target: Tensor | None) -> Iterator[Tensor]:
        """Tanabe and Sagae (1992): column j is a_j (e_j - p_{>j} / t_{j+1}), t_j = sum_{k>=j} p_k.

        a_j^2 = p_j t_{j+1} / t_j. Tails are sums: one minus a cumulative sum would cancel.
        """
        logits, _, mask = self._canonical(outputs, target)
        p = logits.softmax(-1)  # (N,T,C)
        tail = p.flip(-1).cumsum(-1).flip(-1)
        after = tail[..., 1:]
        scale = (p[..., :-1] * _ratio(after, tail[..., :-1])).sqrt() * mask.unsqueeze(-1)
        for position in range(p.shape[1]):
            for j in range(p.shape[2] - 1):
                a, rest = scale[:, position, j], after[:, position, j, None]
                column = torch.zeros_like(p)
                column[:, position, j] = a
                column[:, position, j + 1 :] = -a[:, None] * _ratio(p[:, position, j + 1 :], rest)
                yield self._embed(column, outputs, target)

    def _sampled(
        self, outputs: Tensor, target: Tensor | None, generator: torch.Generator | None
    ) -> Tensor:
        logits, _, mask = self._canonical(outputs, target)
        p = logits.softmax(-1)
        finite = p.nan_to_num(nan=1.0)  # NaN is flagged, and must not crash the draw
        drawn = torch.multinomial(finite.flatten(0, 1), 1, generator=generator)
        return self._score(p, drawn.view(p.shape[:2]), mask, outputs, target)

    def _observed(self, outputs: Tensor, target: Tensor) -> Tensor:
        logits, labels, mask = self._canonical(outputs, target)
        return self._score(logits.softmax(-1), labels, mask, outputs, target)

    def _score(
        self, p: Tensor, labels: Tensor, mask: Tensor, outputs: Tensor, target: Tensor | None
    ) -> Tensor:
        score = p.scatter_add(-1, labels.unsqueeze(-1), -torch.ones_like(p[..., :1]))
        return self._embed(score * mask.unsqueeze(-1), outputs, target)

    def _class_dim(self, outputs: Tensor, target: Tensor | None) -> int:
        """The dimension of the classes, counted from the front."""
        shape = outputs.shape
        if self.class_dim is not None:
            dim = self.class_dim + outputs.dim() if self.class_dim < 0 else self.class_dim
            if not 0 < dim < outputs.dim():
                raise DataError(
                    f"class_dim={self.class_dim} is not a dimension of outputs {tuple(shape)} "
                    "behind the examples"
                )
            return dim
        if outputs.dim() == 2:
            return 1
        if outputs.dim() < 2:
            raise DataError(
                f"expected outputs with a dimension of classes, got shape {tuple(shape)}: for one "
                "logit take 'bernoulli', for a real number 'gaussian'"
            )
        fitting = (
            []
            if target is None
            else [
                k
                for k in range(1, outputs.dim())
                if (*shape[:k], *shape[k + 1 :]) == tuple(target.shape)
            ]
        )
        if len(fitting) != 1:
            got = "no target" if target is None else f"a target of shape {tuple(target.shape)}"
            why = "more than one dimension fits" if fitting else "no dimension fits"
            raise DataError(
                f"cannot tell which dimension of outputs {tuple(shape)} holds the classes from "
                f"{got} ({why}): pass likelihoods.Categorical(class_dim=...)"
            )
        return fitting[0]

    def _positions(self, tensor: Tensor, dim: int, lead: int) -> Tensor:
        """(*lead, N, ...) with classes in `dim` (from the end) to (*lead, N, T, C), shifted."""
        moved = tensor.movedim(dim, -1)
        if self.shift:
            moved = moved.narrow(lead + 1, 0, moved.shape[lead + 1] - self.shift)
        if moved.dim() == lead + 2:
            return moved.unsqueeze(-2)
        return moved.flatten(lead + 1, -2)

    def _canonical(self, outputs: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (N, T, C), labels (N, T) that are safe to gather with, and the mask (N, T)."""
        dim = self._class_dim(outputs, target)
        logits = self._positions(outputs, dim - outputs.dim(), 0)
        if target is None:
            ones = torch.ones(logits.shape[:2], dtype=logits.dtype, device=logits.device)
            return logits, torch.zeros_like(ones, dtype=torch.int64), ones
        labels = target.long()
        if self.shift:
            labels = labels[:, self.shift :]
        labels = labels.reshape(labels.shape[0], -1)
        mask = labels != self.ignore_index
        return logits, labels.clamp(0, logits.shape[-1] - 1), mask.to(logits.dtype)

    def _embed(self, canonical: Tensor, outputs: Tensor, target: Tensor | None) -> Tensor:
        """(*lead, N, T, C) back to (*lead, *outputs.shape), zero where the shift leaves out."""
        dim = self._class_dim(outputs, target)
        lead = canonical.dim() - 3
        shape = list(outputs.shape)
        classes = shape.pop(dim)
        if self.shift:
            shape[1] -= self.shift
        grid = canonical.reshape(*canonical.shape[:lead], *shape, classes)
        if self.shift:
            after = [0, 0] * (grid.dim() - lead - 2)
            grid = F.pad(grid, [*after, 0, self.shift])
        return grid.movedim(-1, lead + dim)


class _Elementwise(Likelihood):
    """Every output of an example has a label of its own; the loss-Hessian is diagonal."""

    @abstractmethod
    def _curvature(self, outputs: Tensor) -> Tensor:
        """The diagonal of the loss-Hessian, shaped like (or broadcast to) the outputs."""

    def check(self, outputs: Tensor, target: Tensor | None) -> None:
        _check_outputs(outputs)
        if target is not None and target.shape != outputs.shape:
            raise DataError(
                f"expected a target shaped like the outputs {tuple(outputs.shape)}, got "
                f"{tuple(target.shape)}"
            )

    def hessian_product(self, outputs: Tensor, target: Tensor | None, vectors: Tensor) -> Tensor:
        return self._curvature(outputs) * vectors

    def num_terms(self, outputs: Tensor, target: Tensor | None) -> Tensor:
        return torch.tensor(outputs.numel(), device=outputs.device)

    def flags(self, outputs: Tensor, target: Tensor | None) -> dict[str, Tensor]:
        return {NOT_FINITE: ~outputs.detach().isfinite().all()}

    def _num_exact(self, outputs: Tensor, target: Tensor | None) -> int:
        return math.prod(outputs.shape[1:])

    def _exact(self, outputs: Tensor, target: Tensor | None) -> Iterator[Tensor]:
        root = (
            self._curvature(outputs)
            .sqrt()
            .expand_as(outputs)
            .flatten(1 if outputs.dim() > 1 else 0)
        )
        root = root.reshape(outputs.shape[0], -1)
        for j in range(root.shape[1]):
            column = torch.zeros_like(root)
            column[:, j] = root[:, j]
            yield column.view(outputs.shape)


@dataclass(frozen=True)
class Bernoulli(_Elementwise):
    """Each output is the logit of a label in {0, 1}; the loss is binary cross-entropy."""

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        each = F.binary_cross_entropy_with_logits(outputs, target.to(outputs), reduction="none")
        return each.reshape(outputs.shape[0], -1).sum(1)

    def flags(self, outputs: Tensor, target: Tensor | None) -> dict[str, Tensor]:
        flags = super().flags(outputs, target)
        if target is not None:
            flags["expected labels 0 or 1, but some are neither"] = ~(
                (target == 0) | (target == 1)
            ).all()
        return flags

    def _curvature(self, outputs: Tensor) -> Tensor:
        return outputs.sigmoid() * (-outputs).sigmoid()

    def _sampled(
        self, outputs: Tensor, target: Tensor | None, generator: torch.Generator | None
    ) -> Tensor:
        p = outputs.sigmoid()
        uniform = torch.rand(p.shape, dtype=p.dtype, device=p.device, generator=generator)
        return p - (uniform < p).to(p)

    def _observed(self, outputs: Tensor, target: Tensor) -> Tensor:
        return outputs.sigmoid() - target.to(outputs)


@dataclass(frozen=True, eq=False)
class Gaussian(_Elementwise):
    """The loss is |y - f|^2 / (2 variance).

    Args:
        variance: one for all outputs, or a tensor that broadcasts to those of an example.
    """

    variance: float | Tensor = 1.0

    def __post_init__(self) -> None:
        variance = torch.as_tensor(self.variance)
        if not bool(((variance > 0) & variance.isfinite()).all()):
            raise DataError(f"expected a positive, finite variance, got {self.variance}")

    def check(self, outputs: Tensor, target: Tensor | None) -> None:
        super().check(outputs, target)
        shape, example = torch.as_tensor(self.variance).shape, outputs.shape[1:]
        try:
            fits = torch.broadcast_shapes(shape, example) == example
        except RuntimeError:
            fits = False
        if not fits:
            raise DataError(
                f"expected a variance that broadcasts to the outputs of an example "
                f"{tuple(example)}, got shape {tuple(shape)}"
            )

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        each = (target - outputs).square() * self._curvature(outputs) / 2
        return each.reshape(outputs.shape[0], -1).sum(1)

    def _curvature(self, outputs: Tensor) -> Tensor:
        return (1 / torch.as_tensor(self.variance).to(outputs)).expand(outputs.shape)

    def _sampled(
        self, outputs: Tensor, target: Tensor | None, generator: torch.Generator | None
    ) -> Tensor:
        noise = torch.randn(
            outputs.shape, dtype=outputs.dtype, device=outputs.device, generator=generator
        )
        return noise * self._curvature(outputs).sqrt()

    def _observed(self, outputs: Tensor, target: Tensor) -> Tensor:
        return (outputs - target) * self._curvature(outputs)


NAMES: dict[str, Callable[[], Likelihood]] = {
    "categorical": Categorical,
    "bernoulli": Bernoulli,
    "gaussian": Gaussian,
}


def resolve(
    likelihood: str | Likelihood | None, outputs: Tensor, target: Tensor | None
) -> Likelihood:
    """A likelihood from itself, its name, or None where the first batch proves it categorical.

    Raises:
        DataError: an unknown name, or None where nothing is proved.
    """
    if isinstance(likelihood, Likelihood):
        return likelihood
    if isinstance(likelihood, str) and likelihood in NAMES:
        return NAMES[likelihood]()
    if likelihood is not None:
        raise DataError(
            f"unknown likelihood {likelihood!r}: expected one of {sorted(NAMES)}, or an object "
            "from nngeo_lazy.likelihoods"
        )
    guess = Categorical()
    try:
        if target is None:
            raise DataError("there is no target")
        guess.check(outputs, target)
    except DataError as error:
        raise DataError(
            f"cannot tell the likelihood from outputs {tuple(outputs.shape)} ({error}): pass "
            f"likelihood= with one of {sorted(NAMES)}, or an object from nngeo_lazy.likelihoods"
        ) from None
    return guess


def check_estimator(estimator: str) -> None:
    """Raise DataError where the estimator is not one of `ESTIMATORS`."""
    if estimator not in ESTIMATORS:
        raise DataError(f"unknown estimator {estimator!r}: expected one of {list(ESTIMATORS)}")


def _check_outputs(outputs: Tensor) -> None:
    if outputs.dim() < 1 or not outputs.is_floating_point():
        raise DataError(
            "expected floating-point outputs (N, ...) with the examples in dimension 0, got "
            f"{outputs.dtype} of shape {tuple(outputs.shape)}"
        )
    if outputs.shape[0] < 1:
        raise DataError(
            f"expected at least one example in each batch, got outputs {tuple(outputs.shape)}: "
            "drop empty batches from the loader"
        )


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b with 0 / 0 = 0."""
    return torch.where(b > 0, a / torch.where(b > 0, b, torch.ones_like(b)), torch.zeros_like(a))
