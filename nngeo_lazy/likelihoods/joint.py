"""Several heads of a network, with a likelihood each."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..arguments import check_fields
from ..errors import DataError
from .heads import Heads, joint
from .likelihood import Likelihood, check_outputs

__all__ = ["Joint"]

Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Joint(Likelihood):
    r"""Independent labels of several heads, whose outputs are a mapping or a sequence of tensors.

    .. math:: \ell = \sum_h \ell_h(f_h, y_h), \qquad F = \sum_h F_h

    A target is a mapping of the same keys, or a sequence in the order of the heads. In the batch
    `(inputs, target, target)`, it is all that comes behind the inputs. The outputs of the network
    are one tensor (N, D) of all heads, in their order. The empirical Fisher has the score of all
    labels of an example together.

    Args:
        heads: a likelihood for each head: a mapping by the key or attribute of what the network
            returns, or a sequence if it returns one.

    Raises:
        DataError: no heads, or one without a likelihood; outputs or targets that do not have them.

    Example:
        >>> import nngeo_lazy as ng
        >>> from nngeo_lazy.likelihoods import Categorical, Gaussian
        >>> both = Joint({"class": Categorical(), "size": Gaussian()})
        >>> f = both.outputs({"class": torch.zeros(4, 3), "size": torch.zeros(4, 1)})
        >>> f.shape, both.loss(f, {"class": torch.tensor([0, 1, 2, 0]), "size": torch.ones(4, 1)})
        (torch.Size([4, 4]), tensor([1.5986, 1.5986, 1.5986, 1.5986]))

    Source: Kendall, Gal and Cipolla (2018), Multi-task learning using uncertainty to weigh losses.
    """

    heads: Mapping[str, Likelihood] | Sequence[Likelihood]

    def __post_init__(self) -> None:
        check_fields(self)
        held: Any
        held = dict(self.heads) if isinstance(self.heads, Mapping) else tuple(self.heads)
        object.__setattr__(self, "heads", held)
        for name, each in self._named():
            if not isinstance(each, Likelihood) or isinstance(each, Joint):
                raise DataError(
                    f"expected a likelihood for each of several heads, got {each!r} for "
                    f"{name!r}: pass an object from nngeo_lazy.likelihoods, or its name"
                )
        if not held:
            raise DataError(
                "expected a likelihood for each of several heads, got none: name at least one"
            )
        object.__setattr__(self, "_pick", Heads.of(held, None))
        object.__setattr__(self, "_shapes", {})  # of heads by D: outputs do not say it

    def __hash__(self) -> int:
        return hash(repr(self))

    # --- outputs and targets ---------------------------------------------------------------------

    def outputs(self, result: Any) -> Tensor:
        """All outputs (N, D) in one tensor, from what the network returned."""
        heads: list[Tensor] = self._pick(result)  # type: ignore[attr-defined]
        made = joint([head.flatten(1) if head.dim() > 1 else head[:, None] for head in heads])
        shapes = tuple(tuple(head.shape[1:]) for head in heads)
        if self._known.setdefault(made.shape[1], shapes) != shapes:
            raise DataError(
                f"expected heads of the shapes {self._known[made.shape[1]]}, as before, got "
                f"{shapes}, which have as many outputs together: pad them alike"
            )
        return made

    def split(self, outputs: Tensor) -> Mapping[str, Tensor] | Sequence[Tensor]:
        """The outputs of each head, from one tensor (..., N, D) of all: by name, or in order."""
        parts: Mapping[str, Tensor] | Sequence[Tensor] = self.like(self._split(outputs))
        return parts

    def places(self, count: int) -> list[slice]:
        """Where the outputs of each head lie among D."""
        sizes = [torch.Size(shape).numel() for shape in self._shapes_of(count)]
        ends = list(itertools.accumulate(sizes))
        return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]

    def shapes(self, count: int) -> list[torch.Size]:
        """The shape of an example's outputs in each head."""
        return [torch.Size(shape) for shape in self._shapes_of(count)]

    def like(self, values: Sequence[Any]) -> Any:
        """One value for each head, as the likelihoods are given: by name, or in order."""
        if isinstance(self.heads, Mapping):
            return dict(zip(self.heads, values, strict=True))
        return tuple(values)

    def targets(self, target: Any) -> list[Any]:
        """The target of each head.

        Raises:
            DataError: it is no mapping of the heads' names, and no sequence of their number.
        """
        names = [name for name, _ in self._named()]
        if target is None:
            return [None] * len(names)
        if isinstance(target, Mapping) and all(name in target for name in names):
            return [target[name] for name in names]
        if isinstance(target, Sequence) and len(target) == len(names):
            return list(target)
        got = list(target) if isinstance(target, Mapping) else type(target).__name__
        if isinstance(target, Sequence):
            got = f"{len(target)} entries"
        raise DataError(
            f"expected a target for each of the heads {names}, by name or in their order, got "
            f"{got}: pass target=lambda batch: {{...}}"
        )

    @property
    def members(self) -> list[Likelihood]:
        """The likelihoods, in order."""
        return [each for _, each in self._named()]

    def _named(self) -> list[tuple[str | int, Likelihood]]:
        held = self.heads
        return list(held.items() if isinstance(held, Mapping) else enumerate(held))

    @property
    def _known(self) -> dict[int, Shapes]:
        known: dict[int, Shapes] = self._shapes  # type: ignore[attr-defined]
        return known

    def _shapes_of(self, count: int) -> Shapes:
        if count not in self._known:
            raise DataError(
                f"expected the outputs of heads, joined by outputs(), got {count} numbers of an "
                f"example: the heads of {self} had {sorted(self._known)}"
            )
        return self._known[count]

    def _split(self, outputs: Tensor) -> list[Tensor]:
        places, shapes = self.places(outputs.shape[-1]), self.shapes(outputs.shape[-1])
        lead = outputs.shape[:-1]
        return [
            outputs[..., place].reshape(*lead, *shape)
            for place, shape in zip(places, shapes, strict=True)
        ]

    def _parts(self, outputs: Tensor, target: Any) -> list[tuple[Likelihood, Tensor, Any]]:
        """The likelihood, the outputs and the target of each head."""
        targets = self.targets(target)
        known = [each for _, each in self._named()]
        return list(zip(known, self._split(outputs), targets, strict=True))

    # --- what a likelihood does ------------------------------------------------------------------

    @property
    def masks(self) -> bool:
        """Whether the target can mask terms, so that it is read even if labels are drawn."""
        return any(each.masks for _, each in self._named())

    @property
    def reweighted(self) -> str:
        """Why the loss is no likelihood, as in "class weights"; empty if it is one."""
        return " and ".join({each.reweighted: 1 for _, each in self._named() if each.reweighted})

    def position_dims(self, outputs: Tensor, target: Any) -> tuple[int, ...]:
        """Refused: heads may have other positions."""
        raise DataError(
            "estimator='empirical_positions' needs the positions of one head, and several heads "
            "have no positions in common: take estimator='empirical'"
        )

    def missing(self, target: Any) -> Tensor | None:
        """Whether labels are NaN that must not be, 0-d; None if there can be none."""
        pairs = zip(self._named(), self.targets(target), strict=True)
        found = [each.missing(own) for (_, each), own in pairs]
        some = [flag for flag in found if flag is not None]
        return torch.stack(some).any() if some else None

    def require_likelihood(self, estimator: str) -> None:
        """Raise DataError if the estimator draws labels that this loss does not define."""
        for name, each in self._named():
            with _of_head(name):
                each.require_likelihood(estimator)

    def check(self, outputs: Tensor, target: Any) -> None:
        """Raise DataError if outputs or target cannot be this likelihood's."""
        check_outputs(outputs)
        for (name, each), (_, f, y) in zip(
            self._named(), self._parts(outputs, target), strict=True
        ):
            with _of_head(name):
                each.check(f, y)

    def loss(self, outputs: Tensor, target: Any) -> Tensor:
        """-log p(y | f) up to a constant, summed over heads and positions: (N,)."""
        return _sum(each.loss(f, y) for each, f, y in self._parts(outputs, target))

    def log_prob(self, outputs: Tensor, target: Any) -> Tensor:
        """log p(y | f) itself, normalised over y, summed over heads and positions: (N,)."""
        return _sum(each.log_prob(f, y) for each, f, y in self._parts(outputs, target))

    def hessian_product(self, outputs: Tensor, target: Any, vectors: Tensor) -> Tensor:
        """H_n v_n with H_n the Hessian of the loss in the outputs, shaped like vectors."""
        pairs = zip(self._parts(outputs, target), self._split(vectors), strict=True)
        return self._joined(vectors, [each.hessian_product(f, y, v) for (each, f, y), v in pairs])

    def num_terms(self, outputs: Tensor, target: Any) -> Tensor:
        """How many scalar labels are scored, a 0-d integer tensor."""
        return _sum(each.num_terms(f, y) for each, f, y in self._parts(outputs, target))

    def scored(self, outputs: Tensor, target: Any) -> Tensor | None:
        """Which positions any head scores, if all heads have the same ones; None if not."""
        masks = [each.scored(f, y) for each, f, y in self._parts(outputs, target)]
        known = [mask for mask in masks if mask is not None]
        if len(known) < len(masks) or len({mask.shape for mask in known}) > 1:
            return None
        return torch.stack(known).any(0)

    def flags(self, outputs: Tensor, target: Any) -> dict[str, Tensor]:
        """What is wrong in a way that only the device knows: message -> 0-d bool tensor."""
        flags = {}
        parts = self._parts(outputs, target)
        for (name, _), (each, f, y) in zip(self._named(), parts, strict=True):
            for message, wrong in each.flags(f, y).items():
                flags[type(message)(f"head {name!r}: {message}")] = wrong
        return flags

    def _num_exact(self, outputs: Tensor, target: Any) -> int:
        return sum(each._num_exact(f, y) for each, f, y in self._parts(outputs, target))

    def _exact(self, outputs: Tensor, target: Any) -> Iterator[Tensor]:
        places = self.places(outputs.shape[1])
        for (each, f, y), place in zip(self._parts(outputs, target), places, strict=True):
            for column in each._exact(f, y):
                whole = torch.zeros_like(outputs, dtype=column.dtype)
                whole[:, place] = column.reshape(len(outputs), -1)
                yield whole

    def _draws(
        self, outputs: Tensor, target: Any, generator: torch.Generator | None, samples: int
    ) -> Iterator[Tensor]:
        parts = self._parts(outputs, target)
        drawn = [each._draws(f, y, generator, samples) for each, f, y in parts]
        for scores in zip(*drawn, strict=True):
            yield self._joined(outputs, scores)

    def _sampled(self, outputs: Tensor, target: Any, generator: torch.Generator | None) -> Tensor:
        return next(self._draws(outputs, target, generator, 1))

    def _normal(
        self, outputs: Tensor, target: Any, n: int, generator: torch.Generator | None
    ) -> Tensor:
        parts = self._parts(outputs, target)
        drawn = [each._normal(f, y, n, generator) for each, f, y in parts]
        return self._joined(outputs.expand(n, *outputs.shape), drawn)

    def _observed(self, outputs: Tensor, target: Any) -> Tensor:
        parts = self._parts(outputs, target)
        return self._joined(outputs, [each._observed(f, y) for each, f, y in parts])

    def _joined(self, like: Tensor, parts: Sequence[Tensor]) -> Tensor:
        """Vectors of the heads (..., N, *shape) as those of all outputs (..., N, D)."""
        return torch.cat([part.reshape(*like.shape[:-1], -1) for part in parts], -1)


def _sum(parts: Iterator[Tensor] | Any) -> Tensor:
    first, *others = parts
    total: Tensor = first
    for other in others:
        total = total + other
    return total


@contextmanager
def _of_head(name: str | int) -> Iterator[None]:
    """Inside, a DataError says which head it is about."""
    try:
        yield
    except DataError as error:
        raise type(error)(f"head {name!r}: {error}") from error
