"""Losses that are no likelihood by name: any function, and the modules of torch.nn."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from .. import tree
from ..arguments import check_fields, name_of, require_takes
from ..errors import DataError
from ..precision import widened, widest
from .categorical import Categorical
from .differentiated import Differentiated
from .elementwise import Bernoulli, Poisson
from .gaussian import Gaussian
from .likelihood import NOT_FINITE, Likelihood, broadcasts, check_outputs, wide
from .names import NAMES, resolve

__all__ = ["CallableLoss", "Reduction", "resolve_loss"]

Count: TypeAlias = Callable[[Tensor, Tensor | None], Tensor | int]


@dataclass(frozen=True)
class CallableLoss(Differentiated):
    r"""Any loss that is convex in the outputs, from a function of a batch.

    .. math:: S_n S_n^T = \nabla^2_f \ell(f_n, y_n)

    with the Hessian of each example, D x D for D outputs, by automatic differentiation in the
    outputs alone, and its root from an eigendecomposition in float64. An exact quantity has D
    directions.

    Args:
        function: `(outputs (N, ...), target) -> losses (N,)`, summed over positions; the loss of
            an example depends on that example alone. It is called with outputs that are at least
            float32, and with target None if batches have none; a target may be nested tensors.

    Raises:
        DataError: it is no function of (outputs, target).

    Example:
        >>> loss = CallableLoss(lambda f, y: (f - y).cosh().log().sum(1))
        >>> loss.hessian_product(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([[3.0, 4.0]]))
        tensor([[3., 4.]])

    Source:
        Schraudolph (2002), Fast curvature matrix-vector products for second-order gradient descent.
    """

    function: Callable[..., Tensor]

    def __post_init__(self) -> None:
        check_fields(self)
        require_takes("function", self.function, "outputs", "target")

    def position_dims(self, outputs: Tensor, target: Any) -> tuple[int, ...]:
        """Refused: a function of an example says nothing of its positions."""
        raise DataError(
            "estimator='empirical_positions' needs a loss that is a sum over positions, and a "
            "function of whole examples does not say so: take a likelihood, or 'empirical'"
        )

    def __repr__(self) -> str:
        """A function that has a name by it, so that it is the same one in another process."""
        return f"CallableLoss({name_of(self.function)})"

    @property
    def reweighted(self) -> str:
        """Why the loss is no likelihood, as in "class weights"; empty if it is one."""
        return "a function in place of a density"

    def require_likelihood(self, estimator: str) -> None:
        """Raise DataError if the estimator draws labels that this loss does not define."""
        if estimator in ("exact", "mc"):
            raise DataError(
                f"the {estimator} Fisher is an expectation over the model's own labels, and a "
                "function of outputs and target does not say how they are distributed: take "
                "GGN(..., loss=...), estimator='empirical', or a likelihood"
            )

    def check(self, outputs: Tensor, target: Any) -> None:
        """Raise DataError if outputs or target cannot be this likelihood's."""
        check_outputs(outputs)
        with torch.no_grad():
            losses = self._each(wide(outputs.detach()), target)
        if not isinstance(losses, Tensor) or losses.shape != outputs.shape[:1]:
            got = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else repr(losses)
            raise DataError(
                f"expected per-example losses ({outputs.shape[0]},), got {got}: use "
                "reduction='none' and sum over positions"
            )

    def require_curved(self, outputs: Tensor, target: Any) -> None:
        """Raise DataError if the loss is piecewise linear in the outputs: its Hessian is zero.

        It is looked at in the outputs, near them, and in the target if it is like them, which is
        where robust losses such as Huber's are curved.
        """
        outputs = wide(outputs.detach())
        generator = torch.Generator(outputs.device).manual_seed(0)
        noise = torch.empty_like(outputs).normal_(generator=generator)
        places = [outputs, outputs + noise]
        if isinstance(target, Tensor) and target.is_floating_point():
            places += [wide(target)] if target.shape == outputs.shape else []
        try:
            curved = any(self._product(f, target)(noise).count_nonzero() for f in places)
            masked = not self._observed(outputs, target).count_nonzero()
        except (RuntimeError, ValueError):  # undefined near the outputs; the build tells the rest
            return
        if curved or masked:
            return
        raise DataError(
            "the loss is linear in the outputs, so its Gauss-Newton matrix is zero: let the model "
            "return what is before the logarithm (logits, with nn.CrossEntropyLoss in place of "
            "NLLLoss), or take Hessian, or FIM(..., estimator='empirical')"
        )

    def loss(self, outputs: Tensor, target: Any) -> Tensor:
        """-log p(y | f) up to a constant, summed over positions: (N,). Differentiable."""
        return self._each(wide(outputs), target).to(outputs.dtype)

    def num_terms(self, outputs: Tensor, target: Any) -> Tensor:
        """How many scalar labels are scored, a 0-d integer tensor."""
        return torch.tensor(outputs.shape[0], device=outputs.device)

    def flags(self, outputs: Tensor, target: Any) -> dict[str, Tensor]:
        """What is wrong in a way that only the device knows: message -> 0-d bool tensor."""
        outputs = outputs.detach()
        flags: dict[str, Tensor] = {NOT_FINITE: ~outputs.isfinite().all()}
        if outputs.shape[0] > 1:
            flags[
                "expected the loss of an example to depend on that example alone, but in a batch "
                "it is another than without the others: divide by no batch size, and draw nothing "
                "at random"
            ] = self._mixes(wide(outputs), target)
        return flags

    def _mixes(self, outputs: Tensor, target: Any) -> Tensor:
        """Whether the largest loss is another without the other examples, past rounding."""
        with torch.no_grad():
            every = self._each(outputs, target)
            k = every.detach().abs().argmax().reshape(1)  # a small loss would hide a small change
            together, outputs = every[k], outputs[k]
            alone = self._each(outputs, tree.map_leaves(partial(_of_example, k), target))
            if alone.shape != together.shape:
                return torch.ones((), dtype=torch.bool, device=outputs.device)
            # The terms of a loss are of the size of the outputs, or of the sum.
            size = together.abs() + outputs.abs().amax() + 1
            apart: Tensor = (together - alone).abs() > torch.finfo(outputs.dtype).eps ** 0.5 * size
            return apart.any()

    def _each(self, outputs: Tensor, target: Any) -> Tensor:
        """The losses, of targets that are as wide as the outputs."""
        losses: Tensor = self.function(outputs, tree.map_leaves(_widened, target))
        return losses

    def _curved(self, outputs: Tensor, target: Any) -> Callable[[Tensor], Tensor]:
        return lambda g: self._each(g, target)

    def _draws(
        self,
        outputs: Tensor,
        target: Any,
        generator: torch.Generator | None,
        samples: int,
    ) -> Iterator[Tensor]:
        """S z with random signs z: the mean of z z^T is the identity."""
        roots = self._roots(outputs, target)
        shape = (*roots.shape[:2], 1)
        for _ in range(samples):
            bits = torch.randint(2, shape, device=roots.device, generator=generator)
            yield (roots @ (2 * bits - 1).to(roots)).view(outputs.shape)

    def _sampled(self, outputs: Tensor, target: Any, generator: torch.Generator | None) -> Tensor:
        return next(self._draws(outputs, target, generator, 1))

    def _observed(self, outputs: Tensor, target: Any) -> Tensor:
        score: Tensor = torch.func.grad(lambda f: self._each(f, target).sum())(outputs)
        return score


def _of_example(k: Tensor, leaf: Any) -> Any:
    return leaf[k] if isinstance(leaf, Tensor) else leaf


def _widened(leaf: Any) -> Any:
    return wide(leaf) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


@dataclass(frozen=True)
class Reduction:
    """What a sum over examples is divided by, over a whole loader.

    The matrix is sum_n H_n / total(sum over batches of denominator).

    Args:
        kind: "examples" (their number), "mean" (the number or weight of single losses, as a
            torch.nn module counts them) or "sum" (nothing).
        count: that number in a batch, for "mean".

    Example:
        >>> Reduction("examples").denominator(torch.zeros(4, 2), None)
        tensor(4., dtype=torch.float64)
        >>> Reduction("sum").total(0.0)
        1.0
    """

    kind: str
    count: Count | None = field(default=None, repr=False, compare=False)

    def denominator(self, outputs: Tensor, target: Tensor | None) -> Tensor:
        """A batch's part, 0-d float64, to be added over batches; zero for "sum"."""
        part: Tensor | int = outputs.shape[0] if self.kind == "examples" else 0
        if self.count is not None:
            part = self.count(outputs, target)
        return torch.as_tensor(part, dtype=widest(outputs.device), device=outputs.device).detach()

    def total(self, denominators: float) -> float:
        """What to divide by, from the sum of the batches' parts.

        Raises:
            DataError: the mean of no loss at all.
        """
        if self.kind == "sum":
            return 1.0
        if not denominators > 0:
            raise DataError(
                "expected at least one scored label, but all are masked or have weight zero, so "
                "that their mean is not defined: check ignore_index and weight, or take "
                "reduction='sum'"
            )
        return denominators


# how a matrix says that it is a mean over examples
PER_EXAMPLE = repr(Reduction("examples"))


def resolve_loss(loss: Any, outputs: Tensor, target: Tensor | None) -> tuple[Likelihood, Reduction]:
    """A loss as output directions, and what their sum over examples is divided by.

    Args:
        loss: a likelihood or its name; a function `(outputs, target) -> losses (N,)`; or a
            torch.nn loss module, which keeps its own reduction, over the whole loader as one batch.
        outputs: (N, ...), the first batch's.
        target: its target: whole numbers and probabilities are different losses in
            `nn.CrossEntropyLoss`.

    Returns:
        The loss of each example as a likelihood, and what the sum of all is divided by.

    Raises:
        DataError: none of these.

    Example:
        >>> f, y = torch.zeros(4, 3), torch.zeros(4, 3)
        >>> resolve_loss(torch.nn.MSELoss(), f, y)
        (Gaussian(variance=0.5), Reduction(kind='mean'))
    """
    if isinstance(loss, str) and loss == "output":
        raise DataError(
            "the outputs are the losses: their Gauss-Newton matrix is zero; take Hessian"
        )
    if isinstance(loss, Likelihood) or (isinstance(loss, str) and loss in NAMES):
        return resolve(loss, outputs, target), Reduction("examples")
    if isinstance(loss, nn.Module):
        return _of_module(loss, outputs, target)
    if callable(loss) and not isinstance(loss, type):
        return CallableLoss(loss), Reduction("examples")
    raise DataError(
        f"unknown loss {loss!r}: expected one of {sorted(NAMES)}, an object from "
        "nngeo_lazy.likelihoods, a torch.nn loss module such as nn.CrossEntropyLoss(), or a "
        "function (outputs, target) -> per-example losses (N,)"
    )


class _PerExample:
    """A torch.nn loss without its reduction, summed over all dimensions but that of examples."""

    def __init__(self, module: nn.Module) -> None:
        self._given = module  # held, since it is told from others by its id
        self._module = copy.copy(module)  # buffers are shared, `reduction` is not
        self._module.reduction = "none"  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{self._given!r} at {id(self._given):#x}"

    def each(self, outputs: Tensor, target: Tensor | None) -> Tensor:
        """The single losses, as the module makes them."""
        losses: Tensor = self._module(outputs, target)
        return losses

    def count(self, outputs: Tensor, target: Tensor | None) -> int:
        with torch.no_grad():
            return self.each(wide(outputs), target).numel()

    def __call__(self, outputs: Tensor, target: Tensor | None) -> Tensor:
        losses = self.each(outputs, target)
        return losses.flatten(1).sum(1) if losses.dim() > 1 else losses


def _of_module(
    module: nn.Module, outputs: Tensor, target: Tensor | None
) -> tuple[Likelihood, Reduction]:
    reduction = getattr(module, "reduction", None)
    kinds = {"none": "examples", "batchmean": "examples", "mean": "mean", "sum": "sum"}
    arguments = [
        name
        for name, each in inspect.signature(module.forward).parameters.items()
        if each.default is each.empty
    ]
    if not isinstance(reduction, str) or reduction not in kinds or len(arguments) != 2:
        raise DataError(
            f"expected a torch.nn loss of two arguments with a reduction in {sorted(kinds)}, got "
            f"{module!r} with reduction {reduction!r} and arguments {arguments}: wrap it in a "
            "function (outputs, target) -> per-example losses (N,)"
        )
    likelihood, count = _parts(module, outputs, target)
    kind = kinds[reduction]
    return likelihood, Reduction(kind, count if kind == "mean" else None)


def _parts(module: nn.Module, outputs: Tensor, target: Tensor | None) -> tuple[Likelihood, Count]:
    """The loss of each example, and how its module counts losses.

    In closed form if it is known; types are compared exactly, since a subclass may compute
    something else.
    """
    kind = type(module)
    labels = target is None or not target.is_floating_point()
    if isinstance(module, nn.CrossEntropyLoss | nn.NLLLoss) and labels:
        classes = Categorical(1, ignore_index=module.ignore_index, weight=module.weight)
        if isinstance(module, nn.CrossEntropyLoss) and kind is nn.CrossEntropyLoss:
            return replace(classes, label_smoothing=module.label_smoothing), _weights(classes)
        return CallableLoss(_PerExample(module)), _weights(classes)
    if kind is nn.MSELoss:
        return Gaussian(0.5), _elements
    if kind is nn.PoissonNLLLoss and module.log_input:
        return Poisson(), _elements
    if isinstance(module, nn.BCEWithLogitsLoss) and kind is nn.BCEWithLogitsLoss:
        weight = module.pos_weight
        fits = weight is None or broadcasts(weight.shape, outputs.shape[1:])
        if module.weight is None and fits:
            return Bernoulli(weight), _elements
    per_example = _PerExample(module)
    return CallableLoss(per_example), per_example.count


def _elements(outputs: Tensor, target: Tensor | None) -> int:
    return outputs.numel()


def _weights(classes: Categorical) -> Count:
    """The weight of the labels that are not ignored."""
    return lambda outputs, target: widened(classes.label_weights(outputs, target)).sum()
