"""What a loader may be, and how a batch is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import data as torch_data
from tqdm.auto import tqdm

from .errors import DataError

__all__ = ["Batch", "Batches"]

LABELS = ("labels", "label")
FORMS = (
    "a DataLoader or another re-iterable of batches, a tensor of inputs, one batch (inputs, "
    "target), or a mapping with 'labels'"
)


@dataclass(frozen=True)
class Batch:
    """One batch: how the model is called, and its labels.

    Attributes:
        args, kwargs: of the default call.
        target: observed labels, or None.
        raw: the batch as it was given, moved to the device; what `forward` and `target` receive.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Tensor | None
    raw: Any


class Batches:
    """A loader as an iterable of `Batch`, as often as wanted.

    Args:
        loader: a `DataLoader`, another re-iterable of batches, or one batch. A tensor is a batch of
            inputs; a sequence of tensors one batch (inputs, target, ...); a mapping one batch whose
            target is "labels" (or "label"); a sequence of sequences or mappings is batches.
        device: where tensors are moved.
        forward: `(model, raw batch) -> outputs` in place of the default call.
        target: `raw batch -> target` in place of the default.
        progress: whether to show a progress bar.

    Raises:
        DataError: a one-shot iterator, a bare Dataset, or something that is no data.
    """

    def __init__(
        self,
        loader: Any,
        *,
        device: torch.device | str,
        forward: Callable[[nn.Module, Any], Tensor] | None = None,
        target: Callable[[Any], Tensor] | None = None,
        progress: bool = False,
    ) -> None:
        self._loader = _as_batches(loader)
        self._device = torch.device(device)
        self._forward = forward
        self._target = target
        self._progress = progress
        self._passes = 0

    def __iter__(self) -> Iterator[Batch]:
        total = len(self._loader) if isinstance(self._loader, Sized) else None
        structure: Any = None
        with tqdm(total=total, disable=not self._progress, unit="batch") as bar:
            for raw in self._loader:
                moved = _move(raw, self._device)
                shape = _structure(moved)
                if structure is not None and shape != structure:
                    raise DataError(
                        f"expected batches of one structure, but a batch holds {shape} where the "
                        f"first holds {structure}"
                    )
                structure = shape
                yield self.read(moved)
                bar.update()
        if structure is None:
            again = " the second time: it must give the same batches on every pass"
            raise DataError(f"the loader gave no batch{again if self._passes else ': it is empty'}")
        self._passes += 1

    def read(self, raw: Any) -> Batch:
        """How one batch is called."""
        args, kwargs, target = _parse(raw)
        if self._target is not None:
            target = self._target(raw)
            if target is not None:
                target = torch.as_tensor(target).to(self._device)
        return Batch(args, kwargs, target, raw)

    def forward(self, model: nn.Module, raw: Any) -> Tensor:
        """The model's outputs for one batch, dimension 0 its examples."""
        outputs: Any
        if self._forward is not None:
            outputs = self._forward(model, raw)
        else:
            args, kwargs, _ = _parse(raw)
            outputs = model(*args, **kwargs)
        if isinstance(outputs, Mapping) and "logits" in outputs:
            outputs = outputs["logits"]
        elif not isinstance(outputs, Tensor) and hasattr(outputs, "logits"):
            outputs = outputs.logits
        if not isinstance(outputs, Tensor):
            raise DataError(
                "expected the model's outputs to be a tensor, or to have .logits, got "
                f"{type(outputs).__name__}: pass forward=lambda model, batch: ..."
            )
        if outputs.dim() == 0 or not outputs.is_floating_point():
            raise DataError(
                "expected floating-point outputs (N, ...) with the examples in dimension 0, got "
                f"{outputs.dtype} of shape {tuple(outputs.shape)}"
            )
        return outputs


def _as_batches(loader: Any) -> Iterable[Any]:
    if isinstance(loader, (Tensor, Mapping)):
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
        raise DataError(f"expected {FORMS}, got {type(loader).__name__}")
    if isinstance(loader, Sequence):
        if not len(loader):
            raise DataError("the loader gave no batch: it is empty")
        kinds = {_kind(entry) for entry in loader}
        if "tensor" in kinds and kinds <= {"tensor", "none"}:
            return [loader]
        if kinds <= {"sequence", "mapping"}:
            return loader
        # (inputs, target) with several inputs: one batch, since a batch is never a bare tensor here
        if _kind(loader[0]) in ("sequence", "mapping") and kinds <= {
            "sequence",
            "mapping",
            "tensor",
        }:
            return [loader]
        raise DataError(f"expected {FORMS}, got a sequence of {sorted(kinds)}")
    return loader  # type: ignore[no-any-return]


def _kind(entry: Any) -> str:
    if entry is None:
        return "none"
    if isinstance(entry, Tensor):
        return "tensor"
    if isinstance(entry, Mapping):
        return "mapping"
    if isinstance(entry, Sequence) and not isinstance(entry, (str, bytes)):
        return "sequence"
    return type(entry).__name__


def _parse(raw: Any) -> tuple[tuple[Any, ...], dict[str, Any], Tensor | None]:
    """args, kwargs and target of one batch."""
    if isinstance(raw, Tensor):
        return (raw,), {}, None
    if isinstance(raw, Mapping):
        label = next((name for name in LABELS if name in raw), None)
        kwargs = {name: value for name, value in raw.items() if name != label}
        return (), kwargs, None if label is None else raw[label]
    if not isinstance(raw, Sequence) or isinstance(raw, (str, bytes)) or not len(raw):
        raise DataError(
            "expected a batch to be a tensor, a sequence (inputs, target, ...) or a mapping, got "
            f"{type(raw).__name__}"
        )
    inputs, target = raw[0], raw[1] if len(raw) > 1 else None
    if target is not None and not isinstance(target, Tensor):
        raise DataError(
            "expected the second entry of a batch to be the target, a tensor, got "
            f"{type(target).__name__}: pass target=lambda batch: ..."
        )
    if isinstance(inputs, Mapping):
        return (), dict(inputs), target
    if isinstance(inputs, Sequence) and not isinstance(inputs, (str, bytes)):
        return tuple(inputs), {}, target
    return (inputs,), {}, target


def _move(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {name: _move(entry, device) for name, entry in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_move(entry, device) for entry in value))
    if isinstance(value, (list, tuple)):
        return type(value)(_move(entry, device) for entry in value)
    return value


def _structure(value: Any) -> Any:
    """What must be the same in every batch: keys and lengths, not sizes."""
    if isinstance(value, Mapping):
        return {name: _structure(entry) for name, entry in sorted(value.items())}
    if isinstance(value, (list, tuple)):
        return [_structure(entry) for entry in value]
    return _kind(value)
