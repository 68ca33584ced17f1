"""Likelihoods from distributions of torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Laplace, kl_divergence

from ..arguments import check_fields, name_of, require_takes
from ..errors import DataError, NonFiniteError
from ..precision import widened
from .differentiated import Differentiated
from .likelihood import NOT_FINITE, PerLabel, check_outputs, summed, wide

__all__ = ["FromDistribution"]


@dataclass(frozen=True)
class FromDistribution(Differentiated, PerLabel):
    r"""Labels of any distribution of torch, from a function of the outputs.

    .. math:: \ell = -\log p(y | f), \qquad
        \mathbb{E}[\nabla^2 \ell] = \nabla^2_g \, \mathrm{KL}(p_f \,\|\, p_g) \big|_{g = f}

    The Fisher information is in closed form if `torch.distributions.kl_divergence` is, with D
    directions for D outputs. In all other cases take estimator "mc", which draws labels. `GGN`
    takes the same expectation; `Hessian` has the Hessian at the observed labels.

    Args:
        function: from outputs (N, ...) to the `Distribution` of all labels, whose batch shape
            begins with N and whose parameters are differentiable in the outputs. It is called with
            outputs that are at least float32.

    Raises:
        DataError: it is no function of outputs, or gives no distribution of N examples; labels that
            the distribution does not have; "exact" if torch does not know the divergence.

    Example:
        >>> from torch.distributions import Gamma
        >>> gamma = FromDistribution(lambda f: Gamma(2.0, (-f).exp()))  # outputs: log scales
        >>> gamma.log_prob(torch.zeros(1, 1), torch.ones(1, 1))
        tensor([-1.])
        >>> gamma.hessian_product(torch.zeros(1, 1), None, torch.ones(1, 1))
        tensor([[2.]])

    Source: Kullback (1959), Information theory and statistics, section 2.6.
    """

    function: Callable[..., Distribution]

    def __post_init__(self) -> None:
        check_fields(self)
        require_takes("function", self.function, "outputs")

    def __repr__(self) -> str:
        """A function that has a name by it, so that it is the same one in another process."""
        return f"FromDistribution({name_of(self.function)})"

    def check(self, outputs: Tensor, target: Tensor | None) -> None:
        """Raise DataError if outputs or target cannot be this likelihood's."""
        check_outputs(outputs, target)
        work = wide(outputs.detach())
        with torch.no_grad():
            try:
                p = self._of(work, validated=True)
            except torch.OutOfMemoryError:
                raise
            except (TypeError, RuntimeError, LookupError, AttributeError) as error:
                said = next(iter(str(error).splitlines()), "")
                raise DataError(
                    "expected function to map outputs of shape "
                    f"{tuple(outputs.shape)} to the distribution of their labels, but it raised "
                    f"{type(error).__name__} ({said}): change the function, "
                    "or let forward= return the outputs that it takes"
                ) from error
            if not isinstance(p, Distribution) or p.batch_shape[:1] != outputs.shape[:1]:
                got = f"batch shape {tuple(p.batch_shape)}" if isinstance(p, Distribution) else p
                raise DataError(
                    "expected the function to return a torch.distributions.Distribution with batch "
                    f"shape ({outputs.shape[0]}, ...) for outputs {tuple(outputs.shape)}, got {got}"
                )
            if target is None:
                return
            self._require_shape(work, target)
            labels = target
            if target.is_floating_point():  # NaN is flagged, or masked
                labels = self.filled(target, target.isnan(), outputs)
            try:
                p.log_prob(_like(labels, work))
            except ValueError as error:
                raise DataError(
                    f"expected labels that the distribution {type(p).__name__} has, but it says: "
                    f"{str(error).splitlines()[0]}; check the target"
                ) from error

    def grid(self, outputs: Tensor, target: Tensor | None) -> torch.Size:
        """The batch shape of the labels if the outputs have it in front; else (N,)."""
        shape = self._of(wide(outputs.detach())).batch_shape
        return shape if outputs.shape[: len(shape)] == shape else shape[:1]

    def size(self, outputs: Tensor) -> int:
        """How many numbers one label is."""
        return self._numel(outputs) // self.grid(outputs, None).numel()

    def spread(self, numbers: Tensor, outputs: Tensor, target: Tensor | None) -> Tensor:
        """Numbers of the labels at the outputs that they belong to; broadcasts to the outputs.

        Raises:
            DataError: a label depends on the outputs of another one.
        """
        if not self._apart(wide(outputs.detach())):
            raise DataError(
                "expected the distribution of each label to depend on the outputs at its own place "
                f"alone, as masks and weights of {tuple(numbers.shape)} labels need, but it does "
                "not: mask or weight whole examples (N,)"
            )
        return numbers.reshape(*numbers.shape, *(1,) * (outputs.dim() - numbers.dim()))

    def position_dims(self, outputs: Tensor, target: Tensor | None) -> tuple[int, ...]:
        """Which dimensions of the outputs are positions, whose losses are summed."""
        if not self._apart(wide(outputs.detach())):
            raise DataError(
                "estimator='empirical_positions' needs labels that depend on the outputs at their "
                "own place alone, but the distribution of each does not: take 'empirical'"
            )
        return super().position_dims(outputs, target)

    def places(self, terms: Tensor, outputs: Tensor, target: Tensor | None) -> Tensor | None:
        """Which positions of the outputs have a label of a mask: (N, *positions), or None."""
        apart = self._apart(wide(outputs.detach()))
        return super().places(terms, outputs, target) if apart else None

    def filled(self, labels: Tensor, where: Tensor, outputs: Tensor) -> Tensor:
        """Labels with others, which the distribution has, where a mask says so."""
        work = wide(outputs.detach())
        self._require_shape(work, labels)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            return torch.where(where, self._of(work).sample().to(labels), labels)

    def each(self, outputs: Tensor, target: Tensor) -> Tensor:
        """-log p of each label, shaped like the grid. Differentiable."""
        work, labels = wide(outputs), target
        lost = target.isnan()
        if any_lost := bool(lost.any()):  # the distribution would refuse them
            labels = self.filled(target, lost, outputs)
        logs: Tensor = self._of(work).log_prob(_like(labels, work))
        if any_lost:
            logs = logs.masked_fill(lost.reshape(*logs.shape, -1).any(-1), math.nan)
        return -self._on_grid(logs, outputs)

    def num_terms(self, outputs: Tensor, target: Tensor | None) -> Tensor:
        """How many scalar labels are scored, a 0-d integer tensor."""
        return torch.tensor(self._numel(outputs), device=outputs.device)

    def flags(self, outputs: Tensor, target: Tensor | None) -> dict[str, Tensor]:
        """What is wrong in a way that only the device knows: message -> 0-d bool tensor."""
        return {NOT_FINITE: ~outputs.detach().isfinite().all()}

    def _of(self, outputs: Tensor, validated: bool = False) -> Distribution:
        """The distribution of the labels."""
        try:
            p = self.function(outputs)
            if validated:
                _validate(p)
            return p
        except ValueError as error:
            if not bool(outputs.isfinite().all()):
                raise NonFiniteError(NOT_FINITE) from error
            raise DataError(
                "expected outputs that the distribution of the labels can be made from, but it "
                f"says: {str(error).splitlines()[0]}; let the function map them, as exp or softplus"
            ) from error

    def _numel(self, outputs: Tensor) -> int:
        p = self._of(wide(outputs.detach()))
        return p.batch_shape.numel() * p.event_shape.numel()

    def _require_shape(self, outputs: Tensor, target: Tensor) -> None:
        p = self._of(outputs)
        wanted = (*p.batch_shape, *p.event_shape)
        if tuple(target.shape) != wanted:
            raise DataError(
                f"expected a target of shape {wanted}, as the distribution of the labels has, got "
                f"{tuple(target.shape)}"
            )

    def _on_grid(self, numbers: Tensor, outputs: Tensor) -> Tensor:
        return numbers if len(self.grid(outputs, None)) > 1 else summed(numbers)

    def _apart(self, outputs: Tensor) -> bool:
        """Whether the first label of each example depends on the outputs at its place alone."""

        def first(f: Tensor) -> Tensor:
            p = self._of(f)
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                drawn = p.sample()
            logs: Tensor = p.log_prob(drawn)
            return logs.flatten(1)[:, 0].sum()

        moved: Tensor = torch.func.grad(first)(outputs)
        labels = self.grid(outputs, None)[1:].numel()
        return not bool(moved.reshape(len(outputs), labels, -1)[:, 1:].any())

    def _curved(self, outputs: Tensor, target: Tensor | None) -> Callable[[Tensor], Tensor]:
        p = self._of(outputs)

        def divergence(g: Tensor) -> Tensor:
            return summed(_divergence(p, self._of(g)))

        if not torch._C._functorch.is_batchedtensor(outputs):
            self._require_smooth(outputs.detach())
        return divergence

    def _require_smooth(self, outputs: Tensor) -> None:
        """Raise DataError if the divergence's second derivatives are not what it does near by."""
        f = widened(outputs)
        with torch.no_grad():
            p, h = self._of(f), torch.finfo(f.dtype).eps ** 0.25
            generator = torch.Generator(f.device).manual_seed(0)
            z = torch.randn(f.shape, dtype=f.dtype, device=f.device, generator=generator)
            near = sum(_divergence(p, self._of(f + step * z)) for step in (h, -h)) / h**2

        def slope(g: Tensor) -> Tensor:
            gradient = torch.func.grad(lambda each: summed(_divergence(p, self._of(each))).sum())
            along: Tensor = (gradient(g) * z).sum()
            return along

        bend: Tensor = (torch.func.grad(slope)(f) * z).reshape(len(f), -1).sum(1)
        apart = (bend - summed(near)).abs() > 0.01 * (1 + bend.abs())
        if bool((apart & bend.isfinite()).any()):
            raise _no_closed_form(p, "has a kink at zero")

    def _sampled(
        self, outputs: Tensor, target: Tensor | None, generator: torch.Generator | None
    ) -> Tensor:
        devices = [] if outputs.device.type == "cpu" else [outputs.device]
        if generator is None:
            return self._observed(outputs, self._of(outputs).sample())
        seed = torch.randint(2**62, (), device=generator.device, generator=generator)
        with torch.random.fork_rng(devices, device_type=outputs.device.type if devices else "cuda"):
            torch.manual_seed(int(seed))  # distributions take no generator
            drawn = self._of(outputs).sample()
        return self._observed(outputs, drawn)

    def _observed(self, outputs: Tensor, target: Tensor) -> Tensor:
        score: Tensor = torch.func.grad(lambda f: self.each(f, target).sum())(outputs)
        return score


def _validate(p: Any) -> None:
    """Check parameters, and labels from now on; torch.compile ends torch's own checks for good."""
    if isinstance(p, Distribution):
        Distribution.__init__(p, p.batch_shape, p.event_shape, validate_args=True)
        _validate(getattr(p, "base_dist", None))


def _divergence(p: Distribution, q: Distribution) -> Tensor:
    """What has the Hessian of KL(p || q) in q's parameters, at q = p."""
    if isinstance(p, Laplace) and isinstance(q, Laplace):  # the divergence itself has a kink
        return ((q.loc - p.loc).square() + (q.scale - p.scale).square()) / (2 * p.scale.square())
    if isinstance(p, Independent) and isinstance(q, Independent):
        apart = _divergence(p.base_dist, q.base_dist)
        return apart.flatten(len(p.batch_shape)).sum(-1) if p.reinterpreted_batch_ndims else apart
    try:
        return kl_divergence(p, q)
    except NotImplementedError as error:
        raise _no_closed_form(p, "is not known to torch") from error


def _no_closed_form(p: Distribution, why: str) -> DataError:
    return DataError(
        f"the divergence of {type(p).__name__} from itself {why}, so that its Fisher information "
        "has no closed form here: take estimator='mc', which draws labels"
    )


def _like(target: Tensor, outputs: Tensor) -> Tensor:
    """Real labels as wide as the outputs; whole numbers as they are."""
    return target.to(outputs) if target.is_floating_point() else target.to(outputs.device)
