"""What a loader may be, and how a batch is read."""

from __future__ import annotations

import inspect
from collections.abc import (
    Callable,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import data as torch_data

from . import tree
from .arguments import applied, require_takes
from .bars import bar
from .collectives import ALONE
from .distributed import Distributed
from .errors import DataError
from .fingerprints import Passes, Streams
from .skeleton import localised
from .switches import callers_autocast, under_autocast

__all__ = ["Batch", "Batches", "outputs_of"]

LABELS = ("labels", "label")
Outputs: TypeAlias = Callable[[Any], Tensor]
FORMS = (
    "a DataLoader or another re-iterable of batches, a tensor of inputs, one batch "
    "(inputs, target), or a mapping with 'labels'"
)


@dataclass(frozen=True)
class Batch:
    """One batch: how the model is called, and its labels.

    Attributes:
        args: positional arguments of the default call.
        kwargs: keyword arguments of the default call.
        target: observed labels, or None; nested tensors, if the likelihood takes several.
        raw: the batch as it was given, moved to the device; what `forward` and `target` receive.
        key: which batch of all processes it is; random draws are made from it.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Any
    raw: Any
    key: tuple[int, ...] = (0,)


class Batches:
    """A loader as an iterable of `Batch`, as often as wanted.

    Args:
        loader: a `DataLoader`, another re-iterable of batches, a `Distributed` of it, or one batch:
            a tensor of inputs, a sequence of tensors (inputs, target, ...), a mapping with "labels"
            (or "label"). A sequence of sequences or mappings is batches. A sequence or mapping of
            inputs in front of a target is called as arguments.
        device: where tensors are moved, also those nested in sequences and mappings.
        forward: `(model, raw batch) -> outputs` in place of the default call, of any object.
        target: `raw batch -> target` in place of the default; it may return None.
        positions: `raw batch -> mask (N, T)` of the positions that exist, in place of a mapping's
            "attention_mask"; it may return None.
        outputs: from what the model returned to its outputs (N, ...).
        labels: how many entries behind the inputs are labels, if a batch has just these.
        progress: whether to show a progress bar.

    Raises:
        DataError: a one-shot iterator, a bare Dataset, or something that is no data; while
            iterating, an empty loader, one that is empty the second time, or unequal batches.

    Example:
        >>> batches = Batches((torch.zeros(4, 2), torch.ones(4)), device="cpu")
        >>> [(batch.args[0].shape, batch.target.shape) for batch in batches]
        [(torch.Size([4, 2]), torch.Size([4]))]
    """

    def __init__(
        self,
        loader: Any,
        *,
        device: torch.device | str,
        forward: Callable[[nn.Module, Any], Any] | None = None,
        target: Callable[[Any], Any] | None = None,
        positions: Callable[[Any], Any] | None = None,
        outputs: Outputs | None = None,
        labels: int = 1,
        progress: bool = False,
    ) -> None:
        require_takes("forward", forward, "model", "batch")
        require_takes("target", target, "batch")
        require_takes("positions", positions, "batch")
        self._share = loader if isinstance(loader, Distributed) else None
        self.group = ALONE if self._share is None else self._share.group
        self._loader = _as_batches(loader if self._share is None else self._share.loader)
        self.described: dict[str, Any] = {}  # what all processes of the group must agree on
        if self._share is not None and self.group.size > 1:
            self.described = self._share.described(self._loader)
            self._loader = self._share.share(self._loader)
        self._device = torch.device(device)
        self._forward, self._autocast = forward, callers_autocast()
        self._target = target
        self._positions = positions
        self._outputs, self._labels = outputs or outputs_of, labels
        self._progress = progress
        self._gave = False  # a batch, on any pass so far
        self._streams = Streams(self.generators)
        self._passes = Passes()

    def __iter__(self) -> Generator[Batch, None, None]:
        first: Any = None
        empty, count = True, 0
        shown = self._progress and self.group.rank == 0
        with bar(shown, total=_length(self._loader), unit="batch") as progress:
            for k, raw in enumerate(self._once()):
                structure = _structure(raw, self._forward is not None)
                if empty:
                    first, empty, self._gave = structure, False, True
                elif structure != first:
                    raise DataError(
                        f"expected batches of one structure, but a batch holds {structure} where "
                        f"the first holds {first}: make the loader collate every batch alike"
                    )
                if not self.held:
                    self._passes.compare(k, raw)
                count = k + 1
                key = (k,) if self._share is None else self._share.key(k)
                yield replace(self.read(_move(raw, self._device)), key=key)
                progress.update()
        if empty and self._gave:
            raise DataError(
                "expected the same batches on every pass, but the loader gave none the second "
                "time: pass the DataLoader itself, or list(...) of the batches"
            )
        if empty and self.group.size == 1:  # another process may have some
            raise DataError(
                "expected at least one batch, but the loader is empty: check the length of the "
                "data set, and drop_last"
            )
        if not self.held:
            self._passes.finish(count)

    def drawn_from(self, seed: int) -> None:
        """From now on, the order of a shuffling loader is drawn from this seed."""
        self._streams = Streams(self.generators, seed)

    def _once(self) -> Iterator[Any]:
        """One pass over what was given."""
        return iter(self._loader) if self.held else self._streams.over(self._loader)

    @property
    def generators(self) -> list[torch.Generator]:
        """The generators of its own from which a loader draws the order of its examples."""
        holders = (self._loader, getattr(self._loader, "sampler", None))
        found = [getattr(holder, "generator", None) for holder in holders]
        return [g for g in dict.fromkeys(found) if isinstance(g, torch.Generator)]

    @property
    def held(self) -> bool:
        """Whether all batches lie in memory, in one order."""
        return isinstance(self._loader, (list, tuple))

    @property
    def device(self) -> torch.device:
        """Where its tensors are moved."""
        return self._device

    @property
    def loader(self) -> Any:
        """What was given, as batches."""
        return self._loader

    @property
    def count(self) -> int | None:
        """How many batches there are, None if the loader does not say."""
        return _length(self._loader)

    def num_examples(self, batch: int) -> int:
        """How many examples there are, as far as it is known, with so many in the first batch."""
        try:
            return len(self._loader.dataset)  # type: ignore[attr-defined]
        except (AttributeError, TypeError):
            return batch * (self.count or 1)

    def read(self, raw: Any) -> Batch:
        """How one batch, already on the device, is called."""
        args, kwargs = self._call(raw) if self._forward is None else ((), {})
        if self._target is None:
            found = _labels(raw, self._labels, strict=self._forward is None)
            return Batch(args, kwargs, found, raw)
        target = applied(self._target, raw, "target")
        if target is not None and not tree.tensors(target):
            try:
                target = torch.as_tensor(target)
            except (TypeError, ValueError, RuntimeError) as error:
                raise DataError(
                    "expected target= to return a tensor, numbers or None, got "
                    f"{type(target).__name__}: pass target=lambda batch: batch[1]"
                ) from error
        return Batch(args, kwargs, _move(target, self._device), raw)

    def positions(self, raw: Any) -> Tensor | None:
        """Which positions of a batch exist, a mask (N, ...); None if all do, or nothing says.

        Raises:
            DataError: `positions` gives no mask of two dimensions or more.
        """
        if self._positions is not None:
            mask = applied(self._positions, raw, "positions")
            if mask is not None and not (isinstance(mask, Tensor) and mask.dim() > 1):
                raise DataError(
                    "expected positions= to return a mask (N, T) of the positions that exist, or "
                    f"None, got {_shape_or_type(mask)}"
                )
            return mask
        raw = tree.by_field(raw)
        mask = raw.get("attention_mask") if isinstance(raw, Mapping) else None
        return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None

    def forward(self, model: nn.Module, raw: Any) -> Tensor:
        """The model's outputs (N, ...) for one batch, dimension 0 its examples.

        Outputs with `.logits`, or a mapping with "logits", give their logits.

        Raises:
            DataError: the outputs are no floating-point tensor (N, ...).
        """
        try:
            with under_autocast(self._autocast):
                if self._forward is not None:
                    outputs = localised(self._forward, model)(model, raw)
                else:
                    args, kwargs = self._call(raw)
                    outputs = model(*args, **kwargs)
        except TypeError:
            if self._forward is None:
                _require_inputs(model, *self._call(raw))
            raise
        except RuntimeError as error:
            if type(error) is not RuntimeError or torch._C._functorch.maybe_current_level():
                raise  # under a transform it may be about the derivative
            raise _ForwardError(
                "expected batches that the model takes, but its forward pass raised "
                f"{str(error).splitlines()[0]!r} for {_sizes(raw)}: check shapes and dtypes of the "
                "inputs, or pass forward=lambda model, batch: ..."
            ) from error
        return self._outputs(outputs)

    def _call(self, raw: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments of the default call."""
        _require_batch(raw)
        raw = tree.by_field(raw)
        if _kind(raw) == "tensor":
            return (raw,), {}
        if isinstance(raw, Mapping):
            label = _label(raw)
            return (), {name: value for name, value in raw.items() if name != label}
        inputs = raw[0]
        if isinstance(inputs, Mapping):
            return (), dict(inputs)
        return (tuple(inputs), {}) if _kind(inputs) == "sequence" else ((inputs,), {})


class _ForwardError(DataError, RuntimeError):
    """A forward pass failed; also what it raised itself."""


def _require_inputs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise DataError if the model cannot be called with the inputs of a batch."""
    try:
        inspect.signature(getattr(model, "forward", model)).bind(*args, **kwargs)
    except TypeError as error:
        names = f"the keywords {sorted(map(str, kwargs))}" if kwargs else f"{len(args)} inputs"
        first = "" if kwargs else "((inputs, mask), target) if it takes several inputs, or "
        raise DataError(
            f"expected batches that the model takes, but {type(model).__name__} was given "
            f"{names}: {error}; pass {first}forward=lambda model, batch: ..."
        ) from error
    except ValueError:  # a compiled one does not say what it takes
        return


def _sizes(raw: Any) -> str:
    tensors = [leaf for leaf in tree.leaves(raw) if isinstance(leaf, Tensor)]
    return ", ".join(f"{t.dtype} {tuple(t.shape)}" for t in tensors[:4]) or type(raw).__name__


def outputs_of(result: Any, remedy: str = "pass forward=lambda model, batch: ...") -> Tensor:
    """The outputs (N, ...) in what a model returned: a tensor, or its logits.

    Raises:
        DataError: there are none; the message ends with the remedy.
    """
    if isinstance(result, Mapping) and "logits" in result:
        result = result["logits"]
    elif not isinstance(result, Tensor) and hasattr(result, "logits"):
        result = result.logits
    if not isinstance(result, Tensor):
        got = type(result).__name__
        raise DataError(
            f"expected the model's outputs to be a tensor, or to have .logits, got {got}: {remedy}"
        )
    if result.dim() == 0 or not result.is_floating_point():
        raise DataError(
            "expected floating-point outputs (N, ...) with the examples in dimension 0, got "
            f"{result.dtype} of shape {tuple(result.shape)}: {remedy}"
        )
    return result


def _as_batches(loader: Any) -> Iterable[Any]:
    if _kind(loader) in ("tensor", "mapping"):
        return [loader]
    if isinstance(loader, torch_data.Dataset):
        raise DataError(
            f"expected {FORMS}, got a bare Dataset ({type(loader).__name__}): wrap it in a "
            "torch.utils.data.DataLoader"
        )
    if isinstance(loader, Iterator):
        raise DataError(
            f"expected {FORMS}, got a one-shot iterator ({type(loader).__name__}), which a second "
            "pass would find empty: pass the DataLoader itself, or list(...)"
        )
    if isinstance(loader, (str, bytes)) or not hasattr(loader, "__iter__"):
        raise DataError(
            f"expected {FORMS}, got {type(loader).__name__}: convert it to tensors, or wrap it in "
            "a torch.utils.data.DataLoader"
        )
    return _from_sequence(loader) if isinstance(loader, Sequence) else loader


def _from_sequence(loader: Sequence[Any]) -> Sequence[Any]:
    """One batch, or batches."""
    if not len(loader):
        raise DataError(f"expected {FORMS}, but the loader is empty: check how it was made")
    kinds = {_kind(entry) for entry in loader}
    # (inputs, target), each of which may hold several: a bare tensor here is no batch
    if "tensor" in kinds and kinds <= {"tensor", "none", "sequence", "mapping"}:
        return [loader]
    if kinds <= {"sequence", "mapping"}:
        return loader
    raise DataError(
        f"expected {FORMS}, got a sequence of {sorted(kinds)}: convert its entries to tensors"
    )


def _length(loader: Iterable[Any]) -> int | None:
    try:
        return len(loader)  # type: ignore[arg-type]
    except TypeError:  # none, or a DataLoader over an IterableDataset
        return None


def _shape_or_type(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def _kind(entry: Any) -> str:
    entry = tree.by_field(entry)
    if entry is None:
        return "none"
    if isinstance(entry, (Tensor, PackedSequence)):
        return "tensor"
    if isinstance(entry, Mapping):
        return "mapping"
    if isinstance(entry, Sequence) and not isinstance(entry, (str, bytes)):
        return "sequence"
    return type(entry).__name__


def _require_batch(raw: Any) -> None:
    holds = any(_kind(leaf) == "tensor" for leaf in tree.leaves(raw))
    if _kind(raw) not in ("tensor", "sequence", "mapping") or not holds:
        raise DataError(
            "expected a batch to be a tensor, a sequence (inputs, target, ...) or a mapping of "
            f"tensors, got {_structure(raw, False)}: convert it, or pass "
            "forward=lambda model, batch: ..."
        )


def _label(raw: Mapping[Any, Any]) -> str | None:
    return next((name for name in LABELS if name in raw), None)


def _labels(raw: Any, count: int, strict: bool) -> Any:
    """The default target; not strict: None if the batch has none that can be read."""
    raw, found = tree.by_field(raw), None
    if isinstance(raw, Mapping):
        label = _label(raw)
        found = None if label is None else raw[label]
    elif _kind(raw) == "sequence" and len(raw) > 1:
        found = tuple(raw[1:]) if len(raw) == 1 + count > 2 else raw[1]
    if found is None or (tree.tensors(found) and not _for_each_example(found)):
        return found
    if strict:
        raise DataError(
            "expected the target of a batch (its second entry, or 'labels') to be a tensor, or to "
            f"hold some, got {type(found).__name__}: pass target=lambda batch: ..."
        )
    return None


def _for_each_example(value: Any) -> bool:
    """Whether it is a sequence without tensors of its own: names, or targets of a detector."""
    kinds = _kind(value) == "sequence" and {_kind(entry) for entry in value}
    return bool(kinds and not kinds & {"tensor", "sequence", "none"})


def _move(value: Any, device: torch.device) -> Any:
    def moved(leaf: Any) -> Any:
        if isinstance(leaf, PackedSequence):
            return leaf.to(device=device)  # type: ignore[call-arg]
        if isinstance(leaf, Tensor):
            # towards the CPU, a copy that is not waited for could be read before it is complete
            return leaf.to(device, non_blocking=device.type != "cpu")
        return leaf

    return tree.map_leaves(moved, value)


def _structure(value: Any, free: bool, inside: bool = False) -> Any:
    """What must be the same in every batch: keys and lengths, not sizes.

    The length of a sequence with an entry for each example is a size. So is that of any sequence
    that is passed to a forward of the user's (free).
    """
    value = tree.by_field(value)
    if isinstance(value, Mapping):
        return {str(name): _structure(value[name], free, True) for name in sorted(value, key=str)}
    if _for_each_example(value):
        return "a list of " + " and ".join(sorted({_kind(entry) for entry in value}))
    if _kind(value) == "sequence":
        entries = [_structure(entry, free, True) for entry in value]
        if inside and free:
            return [entry for k, entry in enumerate(entries) if entry not in entries[:k]]
        return entries
    return _kind(value)
