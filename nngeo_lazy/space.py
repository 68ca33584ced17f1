"""The space of parameter vectors: names, shapes, and the one order that every operator uses."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .arguments import PositiveInt, checked, described, named
from .errors import DataError, SpaceMismatchError

__all__ = ["Lineage", "ParamSpace", "canonical_name"]

_WRAPPERS = frozenset({"module", "_orig_mod"})  # DataParallel and torch.compile


def canonical_name(name: str) -> str:
    """The parameter's name without the path components that wrappers add.

    >>> canonical_name("_orig_mod.module.fc.weight")
    'fc.weight'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


@dataclass(frozen=True)
class Lineage:
    """Where a parameter sits in its model: the modules from the root down to its owner.

    Modules and the parameter are held weakly: a space never keeps a model alive.

    Attributes:
        modules: (path, class, module) of each.
        parameter: the parameter.
        raw: whether its owner has modules of its own, so that it is no layer's parameter.
    """

    modules: tuple[tuple[str, type[nn.Module], weakref.ref[nn.Module] | None], ...]
    parameter: weakref.ref[Tensor] | None
    raw: bool = False

    def __reduce__(self) -> tuple[Any, ...]:
        # Weak references do not pickle: names and types do.
        return Lineage, (
            tuple((name, kind, None) for name, kind, _ in self.modules),
            None,
            self.raw,
        )


@named("a ParamSpace", "F.space")
class ParamSpace:
    """Names and shapes of parameters, in the order of the flat vector.

    The flat vector of length P is the concatenation of the parameters in the order of
    `model.named_parameters()`, each row-major. Two spaces are equal when names and shapes are,
    ignoring the prefixes `module.` and `_orig_mod.` of wrapped models.

    Args:
        shapes: the shape of each parameter by name, in order.
        dtype: of the vectors that `zeros`, `randn` and `eye` make.
        device: likewise.
        lineages: where each parameter sits in its model; selectors by module need it.

    Raises:
        DataError: shapes is no dict of shapes by name.

    Example:
        >>> space = ParamSpace({"fc.weight": (2, 3), "fc.bias": (2,)})
        >>> len(space), space.slices["fc.bias"]
        (8, slice(6, 8, None))
        >>> {name: tuple(v.shape) for name, v in space.unravel(space.zeros()).items()}
        {'fc.weight': (2, 3), 'fc.bias': (2,)}
    """

    @checked
    def __init__(
        self,
        shapes: Mapping[str, Sequence[int]],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        lineages: Mapping[str, Lineage] | None = None,
    ) -> None:
        self.names: tuple[str, ...] = tuple(shapes)
        self.shapes: tuple[torch.Size, ...] = tuple(torch.Size(s) for s in shapes.values())
        self.dtype = dtype
        try:
            self.device = torch.device(device)
        except (TypeError, RuntimeError) as error:
            raise DataError(
                f"expected a device, got {described(device)}: pass device='cpu'"
            ) from error
        self.lineages: dict[str, Lineage] = dict(lineages or {})
        self.slices: dict[str, slice] = {}
        start = 0
        for name, shape in zip(self.names, self.shapes, strict=True):
            self.slices[name] = slice(start, start + math.prod(shape))
            start += math.prod(shape)
        self._size = start
        self._by_canonical = {canonical_name(name): name for name in self.names}

    @classmethod
    @checked
    def of(cls, model: nn.Module, names: Iterable[str] | None = None) -> ParamSpace:
        """The space of a model's parameters, by default of those that require a gradient.

        Parameters without entries are left out.

        Args:
            model: the network.
            names: which parameters; their order is the model's in any case.

        Raises:
            DataError: no parameter is left, or devices or dtypes are mixed.
            SpaceMismatchError: a name that the model does not have.
        """
        parameters = dict(model.named_parameters())
        if names is None:
            chosen = {name for name, p in parameters.items() if p.requires_grad}
        else:
            chosen = set(names)
            if unknown := chosen - parameters.keys():
                raise SpaceMismatchError(
                    f"the model has no parameter {sorted(unknown)}; it has {list(parameters)}"
                )
        # a parameter without entries, as of Linear(0, 3), has no part in any matrix
        picked = {name: p for name, p in parameters.items() if name in chosen and p.numel()}
        if not picked:
            raise DataError(
                "expected at least one trainable parameter, but none of the model's "
                f"{len(parameters)} parameters requires a gradient: call requires_grad_() on "
                "some, or select them with params="
            )
        if others := [name for name, p in picked.items() if not p.is_floating_point()]:
            paired = any(picked[name].is_complex() for name in others)
            remedy = (
                ": keep complex numbers as pairs, with torch.view_as_complex(parameter) in the "
                "forward pass, or leave them out with params="
            )
            raise DataError(
                f"expected floating-point parameters, but {others} are not{remedy * paired}"
            )
        for what in ("dtype", "device"):
            kinds: dict[Any, str] = {}
            for name, p in picked.items():
                kinds.setdefault(getattr(p, what), name)
            if len(kinds) > 1:
                listed = ", ".join(f"{name} on {kind}" for kind, name in kinds.items())
                raise DataError(
                    f"expected parameters of one {what}, but got {listed}: convert the model "
                    "with .to(...), or select parameters of one kind with params="
                )
        first = next(iter(picked.values()))
        return cls(
            {name: p.shape for name, p in picked.items()},
            dtype=first.dtype,
            device=first.device,
            lineages=_lineages(model, picked),
        )

    @classmethod
    @checked
    def everything(cls, model: nn.Module) -> ParamSpace:
        """All parameters of a model, whatever their kind: what selectors choose from."""
        named = dict(model.named_parameters())
        return cls({n: p.shape for n, p in named.items()}, lineages=_lineages(model, named))

    @checked
    def subspace(self, names: Iterable[str]) -> ParamSpace:
        """The space of some of the parameters, in this space's order."""
        chosen = {self.resolve(name) for name in names}
        return ParamSpace(
            {n: s for n, s in zip(self.names, self.shapes, strict=True) if n in chosen},
            dtype=self.dtype,
            device=self.device,
            lineages={n: line for n, line in self.lineages.items() if n in chosen},
        )

    @checked
    def common(self, other: ParamSpace) -> ParamSpace:
        """The space of the parameters that both have, by name and shape, in this space's order.

        A model with a grown head shares all but the head with the one before:
        `F.block(list(F.space.common(new).names))` is the Fisher of what they share.

        Raises:
            SpaceMismatchError: there is none.

        Example:
            >>> old = ParamSpace({"a": (2,), "head": (3,)})
            >>> old.common(ParamSpace({"a": (2,), "head": (5,)})).names
            ('a',)
        """
        theirs = dict(zip(map(canonical_name, other.names), other.shapes, strict=True))
        own = zip(self.names, self.shapes, strict=True)
        names = [name for name, shape in own if theirs.get(canonical_name(name)) == shape]
        if not names:
            raise SpaceMismatchError(
                f"expected parameters of the same name and shape in both spaces, but none of "
                f"{list(self.names)} is in the other, which has {list(other.names)}"
            )
        return self.subspace(names)

    @checked
    def to(self, dtype: torch.dtype | None = None, device: Any = None) -> ParamSpace:
        """The same space for vectors of another dtype or device."""
        return ParamSpace(
            dict(zip(self.names, self.shapes, strict=True)),
            dtype=dtype or self.dtype,
            device=self.device if device is None else device,
            lineages=self.lineages,
        )

    @checked
    def resolve(self, name: str) -> str:
        """This space's spelling of a parameter name (wrapper prefixes are ignored)."""
        if name in self.slices:
            return name
        try:
            return self._by_canonical[canonical_name(name)]
        except KeyError:
            raise SpaceMismatchError(
                f"no parameter {name!r} in this space, which has {list(self.names)}"
            ) from None

    def holding(self, position: int) -> str:
        """The parameter that a position of the flat vector belongs to."""
        return next(n for n, where in self.slices.items() if where.start <= position < where.stop)

    @checked
    def owner(self, name: str) -> str:
        """The path of the module that owns a parameter; a raw parameter owns itself."""
        raw = self.lineages[name].raw if name in self.lineages else "." not in name
        return name if raw else name.rpartition(".")[0]

    @checked
    def ravel(self, vectors: Mapping[str, Tensor]) -> Tensor:
        """{name: (..., *shape)} to (..., P). Every name must be there, and no other.

        Raises:
            SpaceMismatchError: missing or unknown names, or a wrong shape.
        """
        given = {self._by_canonical.get(canonical_name(n), n): v for n, v in vectors.items()}
        missing = [n for n in self.names if n not in given]
        unknown = [n for n in given if n not in self.slices]
        if missing or unknown:
            raise SpaceMismatchError(
                f"expected one tensor for each of the {len(self.names)} parameters; "
                f"missing: {missing}; unknown: {unknown}"
            )
        flat = []
        for name, shape in zip(self.names, self.shapes, strict=True):
            v = given[name]
            lead = v.shape[: v.dim() - len(shape)]
            if v.shape != (*lead, *shape):
                raise SpaceMismatchError(
                    f"expected {name} of shape (..., {', '.join(map(str, shape))}), "
                    f"got {tuple(v.shape)}"
                )
            flat.append(v.reshape(*lead, -1))
        lead = torch.broadcast_shapes(*(v.shape[:-1] for v in flat))
        return torch.cat([v.expand(*lead, v.shape[-1]) for v in flat], -1)

    @checked
    def unravel(self, vector: Tensor) -> dict[str, Tensor]:
        """(..., P) to {name: (..., *shape)}."""
        if vector.dim() == 0 or vector.shape[-1] != len(self):
            raise SpaceMismatchError(
                f"expected a last dimension of {len(self)} parameters, got shape "
                f"{tuple(vector.shape)}"
            )
        lead = vector.shape[:-1]
        return {
            name: vector[..., self.slices[name]].reshape((*lead, *shape))
            for name, shape in zip(self.names, self.shapes, strict=True)
        }

    @checked
    def values(self, model: nn.Module) -> Tensor:
        """The model's parameters as one flat vector (P,), attached to the graph."""
        return self.ravel(self.parameters(model))

    @checked
    def grad(self, model: nn.Module) -> Tensor:
        """The model's `.grad` as one flat vector (P,); zeros if it is None."""
        parameters = self.parameters(model)
        return self.ravel(
            {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in parameters.items()}
        )

    @torch.no_grad()
    @checked
    def assign_(self, model: nn.Module, vector: Tensor | Mapping[str, Tensor]) -> None:
        """Write a vector (flat, or a dict by name) into the model's parameters."""
        for p, v in self._pairs(model, vector):
            p.copy_(v)

    @torch.no_grad()
    @checked
    def add_(
        self, model: nn.Module, vector: Tensor | Mapping[str, Tensor], alpha: float = 1.0
    ) -> None:
        """Add `alpha` times a vector to the model's parameters."""
        for p, v in self._pairs(model, vector):
            p.add_(v.to(p), alpha=alpha)

    @torch.no_grad()
    @checked
    def assign_grad_(self, model: nn.Module, vector: Tensor | Mapping[str, Tensor]) -> None:
        """Write a vector into the `.grad` of the model's parameters."""
        for p, v in self._pairs(model, vector):
            p.grad = v.detach().to(p, copy=True)

    def zeros(self) -> Tensor:
        """The zero vector (P,)."""
        return torch.zeros(len(self), dtype=self.dtype, device=self.device)

    @checked
    def randn(self, n: PositiveInt | None = None) -> Tensor:
        """A standard normal vector (P,), or n of them as columns (P, n)."""
        shape = (len(self),) if n is None else (len(self), n)
        return torch.randn(shape, dtype=self.dtype, device=self.device)

    def eye(self) -> Tensor:
        """The identity (P, P)."""
        return torch.eye(len(self), dtype=self.dtype, device=self.device)

    @checked
    def parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The model's parameters of this space, by this space's names, in order."""
        own = {canonical_name(n): p for n, p in model.named_parameters()}
        found = {name: own.get(canonical_name(name)) for name in self.names}
        if missing := [name for name, p in found.items() if p is None]:
            raise SpaceMismatchError(f"the model has no parameter {missing}; it has {list(own)}")
        return {name: p for name, p in found.items() if p is not None}

    def _pairs(
        self, model: nn.Module, vector: Tensor | Mapping[str, Tensor]
    ) -> list[tuple[nn.Parameter, Tensor]]:
        flat = vector if isinstance(vector, Tensor) else self.ravel(vector)
        if flat.dim() != 1:
            raise SpaceMismatchError(f"expected one vector ({len(self)},), got {tuple(flat.shape)}")
        parts = self.unravel(flat)
        return [(p, parts[name]) for name, p in self.parameters(model).items()]

    def __len__(self) -> int:
        return self._size

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ParamSpace) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        return f"ParamSpace({len(self.names)} parameters, P={len(self)})"

    def _key(self) -> tuple[Any, ...]:
        return tuple(canonical_name(n) for n in self.names), self.shapes


def _lineages(model: nn.Module, parameters: Mapping[str, Tensor]) -> dict[str, Lineage]:
    modules = dict(model.named_modules(remove_duplicate=False))
    lines = {}
    for name, parameter in parameters.items():
        parts = name.split(".")[:-1]
        paths = [".".join(parts[:depth]) for depth in range(len(parts) + 1)]
        chain = tuple((path, type(modules[path]), weakref.ref(modules[path])) for path in paths)
        owner = modules[paths[-1]]
        # an attention's projections are one layer, though its output projection is a child
        layer = isinstance(owner, nn.MultiheadAttention)
        raw = not layer and next(owner.children(), None) is not None
        lines[name] = Lineage(chain, weakref.ref(parameter), raw)
    return lines
