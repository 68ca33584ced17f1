"""A network and a loader in, a matrix out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .data import Batches
from .errors import DataError, NonFiniteError, TooLargeError
from .jacobian.capture import Capture, Recorded
from .jacobian.forms import Form, Outer
from .jacobian.plan import Part
from .jacobian.record import recording, refuse_training_mode
from .likelihoods import Likelihood, check_estimator
from .likelihoods import resolve as resolve_likelihood
from .operators import BaseLinearOperator
from .representations import Representation
from .representations import resolve as resolve_representation
from .selectors import Selector, space_of
from .space import ParamSpace
from .statistics import Make, Statistic, all_finite

__all__ = ["FIM"]


def FIM(
    model: nn.Module,
    loader: Any,
    representation: str | Representation = "kfac",
    *,
    likelihood: str | Likelihood | None = None,
    estimator: str = "exact",
    samples: int = 1,
    seed: int | None = None,
    params: Selector | None = None,
    forward: Callable[[nn.Module, Any], Tensor] | None = None,
    target: Callable[[Any], Tensor] | None = None,
    max_directions: int = 1000,
    progress: bool = False,
) -> BaseLinearOperator:
    r"""The Fisher information matrix of a network, as a lazy linear operator.

    .. math:: F = \frac1N \sum_n J_n^T \, \mathbb{E}_{y \sim p(y|f_n)}
        [\nabla_f \log p \, \nabla_f \log p^T] \, J_n

    with J_n the Jacobian of the outputs of example n in the parameters. The mean is over all N
    examples of the loader, of a loss that sums over the positions of an example; masked terms
    contribute zero. `F.num_examples * F` is the sum.

    Args:
        model: the network, in the mode in which it is to be differentiated (`model.eval()` where it
            has dropout or batch normalisation). It is left as it was.
        loader: a `DataLoader`, another re-iterable of batches, or one batch.
        representation: "kfac", "ekfac", "diagonal", "block_diagonal", "dense", or an options object
            from `nngeo_lazy.representations`.
        likelihood: "categorical", "bernoulli", "gaussian", or an object from
            `nngeo_lazy.likelihoods`; None is categorical where the first batch proves it.
        estimator: "exact" (expectation over the model's labels), "mc" (sampled labels) or
            "empirical" (observed labels).
        samples: label draws for each example, for "mc".
        seed: of the draws; a two-pass build re-uses each example's draws.
        params: which parameters; by default those that require a gradient.
        forward: `(model, batch) -> outputs` in place of the default call.
        target: `batch -> target` in place of the default; read only for observed labels and masks.
        max_directions: the most output directions of one example in an exact computation.
        progress: whether to show a progress bar.

    Returns:
        The operator, P x P in the order of `model.named_parameters()`; see `nngeo_lazy.operators`.

    Raises:
        DataError: the loader, its batches, the targets or an option do not fit.
        StochasticModelError: the model is random, or mixes examples.
        NonFiniteError: NaN or infinity in the parameters, the outputs or the statistics.
        TooLargeError: more than `max_directions`, or a dense block past its limit.
        UnsupportedLayerError: a layer whose gradient is no derivative.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(3, 2)
        >>> x, y = torch.randn(8, 3), torch.tensor([0, 1] * 4)
        >>> F = FIM(model, (x, y), "kfac")
        >>> F.shape, F.num_examples
        (torch.Size([8, 8]), 8)
        >>> step = F.solve(F.space.zeros(), damping=1e-3)

    Source:
        Martens (2020), New insights and perspectives on the natural gradient method, eq. 1;
        Kunstner et al. (2019) on the empirical Fisher.
    """
    check_estimator(estimator)
    if not isinstance(samples, int) or samples < 1:
        raise DataError(f"expected samples to be a positive integer, got {samples!r}")
    wanted = resolve_representation(representation)
    with torch.inference_mode(False):  # tensors made in inference mode could not be used outside
        space = space_of(model, params)
        _require_finite_parameters(model, space)
        refuse_training_mode(model)
        batches = Batches(
            loader, device=space.device, forward=forward, target=target, progress=progress
        )
        if seed is None and estimator == "mc":
            seed = int(torch.randint(2**62, ()))
        sweep = _FisherSweep(
            model, space, batches, likelihood, estimator, samples, seed, max_directions
        )
        return wanted.build(sweep)


Chunk = tuple[list[Form | None], bool, bool]
KEPT_BYTES = 2**27  # the forms of a whole pass are kept for a second one up to this size


class _FisherSweep:
    """Passes over the data that feed the Fisher's directions to statistics."""

    def __init__(
        self,
        model: nn.Module,
        space: ParamSpace,
        batches: Batches,
        likelihood: str | Likelihood | None,
        estimator: str,
        samples: int,
        seed: int | None,
        max_directions: int,
    ) -> None:
        self.space = space
        self._model = model
        self._batches = batches
        self._likelihood = likelihood
        self._estimator = estimator
        self._samples = samples
        self._seed = seed
        self._max_directions = max_directions
        self._capture = Capture(model, space, batches.forward)
        self.dtype = torch.promote_types(space.dtype, torch.float32)
        self._kept: list[Chunk] | None = None
        self.num_examples = 0
        self.num_terms = 0

    @property
    def parts(self) -> Sequence[Part]:
        return self._capture.parts

    def __call__(self, make: Make, keep: bool = False) -> Sequence[Statistic]:
        if self._kept is not None:
            return self._replay(make, self._kept)
        statistics: Sequence[Statistic] | None = None
        kept: list[Chunk] | None = [] if keep else None
        examples, terms = 0, torch.zeros((), dtype=torch.int64, device=self.space.device)
        flags: dict[str, Tensor] = {}
        with (
            _seeded(self._seed, self.space.device) as generator,
            recording(self._model, self.space.parameters(self._model)),
        ):
            for batch in self._batches:
                for recorded, target in self._capture(batch.raw, batch.target):
                    outputs = recorded.outputs
                    likelihood = self._fit(outputs, target)
                    for message, wrong in likelihood.flags(outputs, target).items():
                        flags[message] = flags[message] | wrong if message in flags else wrong
                    examples += outputs.shape[0]
                    terms += likelihood.num_terms(outputs, target)
                    if statistics is None:
                        statistics = make(self._capture.parts)
                    for chunk in self._chunks(recorded, likelihood, target, generator):
                        _update(statistics, chunk)
                        kept = _keep(kept, chunk)
        _raise_flags(flags)
        self.num_examples, self.num_terms, self._kept = examples, int(terms), kept
        return statistics or ()

    def _replay(self, make: Make, kept: list[Chunk]) -> Sequence[Statistic]:
        statistics = make(self.parts)
        for chunk in kept:
            _update(statistics, chunk)
        self._kept = None
        return statistics

    def _chunks(
        self,
        recorded: Recorded,
        likelihood: Likelihood,
        target: Tensor | None,
        generator: torch.Generator | None,
    ) -> Iterator[Chunk]:
        outputs = recorded.outputs
        count = self._count(likelihood, outputs, target)
        directions = likelihood.directions(
            outputs, target, self._estimator, samples=self._samples, generator=generator
        )
        return recorded.chunks(directions, count)

    def _fit(self, outputs: Tensor, target: Tensor | None) -> Likelihood:
        if not isinstance(self._likelihood, Likelihood):
            self._likelihood = resolve_likelihood(self._likelihood, outputs, target)
        self._likelihood.check(outputs, target)
        return self._likelihood

    def _count(self, likelihood: Likelihood, outputs: Tensor, target: Tensor | None) -> int:
        count = likelihood.num_directions(outputs, target, self._estimator, self._samples)
        if self._estimator == "exact" and count > self._max_directions:
            raise TooLargeError(
                f"an exact Fisher of outputs {tuple(outputs.shape)} takes {count} backward passes "
                f"for each batch, one for each output direction of an example, more than "
                f"max_directions={self._max_directions}: take estimator='mc' (one for each "
                "sample), or raise max_directions"
            )
        return count


def _update(statistics: Sequence[Statistic], chunk: Chunk) -> None:
    forms, first, last = chunk
    for each in statistics:
        each.update([forms[k] for k in each.indices], first, last)


def _keep(kept: list[Chunk] | None, chunk: Chunk) -> list[Chunk] | None:
    """All chunks so far, or None once they are too large: the next pass then sees the data again.

    Rows are not kept: what they hold may be a whole batch with its graph.
    """
    if kept is None:
        return None
    forms = [form if isinstance(form, Outer) else None for form in chunk[0]]
    kept.append((list(forms), *chunk[1:]))
    size = sum(form.bytes for held, _, _ in kept for form in held if isinstance(form, Outer))
    return kept if size <= KEPT_BYTES else None


@contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[torch.Generator | None]:
    """The same label draws, and the same order of a shuffling loader, in every pass."""
    if seed is None:
        yield None
        return
    # What draws on the default generator is the order of a shuffling loader; on the CPU alone.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield torch.Generator(device=device).manual_seed(seed)


def _require_finite_parameters(model: nn.Module, space: ParamSpace) -> None:
    parameters = space.parameters(model)
    finite = torch.stack([all_finite(p.detach()) for p in parameters.values()]).tolist()
    if bad := [name for name, ok in zip(parameters, finite, strict=True) if not ok]:
        raise NonFiniteError(
            f"expected finite parameters, but {bad} hold NaN or infinity: the training that led "
            "here diverged"
        )


def _raise_flags(flags: dict[str, Tensor]) -> None:
    """What a pass noted on the device, read once at its end."""
    if not flags:
        return
    wrong = torch.stack([flag.reshape(()) for flag in flags.values()]).tolist()
    if messages := [message for message, bad in zip(flags, wrong, strict=True) if bad]:
        kind = NonFiniteError if any("finite" in message for message in messages) else DataError
        raise kind("; ".join(messages))
