"""Scores while the training data pass by: by batch, on disk, or only the largest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..data import Batches
from ..disk import require_same_run, write_whole
from ..errors import DataError, UnsupportedLayerError
from ..fingerprints import fingerprint
from ..quantities import LossGradients, LossLike
from ..rowwise import Piece
from ..sweep import make_sweep
from ..switches import outside_inference

__all__ = ["Chunks", "Score", "Top", "batches_of", "largest", "whole"]

Score = Callable[[Piece], Tensor]  # of a piece's examples, (n, ...)


class Top(NamedTuple):
    """The training examples of the largest scores.

    Attributes:
        values: (queries, k), descending.
        indices: (queries, k), which examples of the training data they are.
    """

    values: Tensor
    indices: Tensor


class Chunks:
    """The scores of finished batches in a folder, so that a run can go on where it ended.

    Args:
        path: the folder; made if it is not there.
        run: what the scores are made of, in plain words and checksums.
    """

    def __init__(self, path: str | Path, run: dict[str, Any]) -> None:
        self._folder = Path(path)
        require_same_run(self._folder, run, "scores", "the same model, queries and options")

    def read(self, number: int, raw: Any) -> Tensor | None:
        """The scores of a batch; None if they are not there.

        Raises:
            DataError: they are of another batch.
        """
        path = self._path(number)
        if not path.exists():
            return None
        held = torch.load(path, weights_only=True)
        if held["batch"] != _checksums(raw):
            raise DataError(
                f"expected batch {number} to be the one whose scores are in {path}, but its data "
                "differ: pass the same training data in the same batches, or another path"
            )
        scores: Tensor = held["scores"]
        return scores

    def keep(self, number: int, raw: Any, scores: Tensor) -> None:
        """Write the scores of a batch; the file is whole, or not there."""
        held = {"batch": _checksums(raw), "scores": scores.cpu()}
        write_whole(self._path(number), partial(torch.save, held), "the scores")

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:08d}.pt"


def _checksums(raw: Any) -> dict[str, int]:
    return {str(key): int(value) for key, value in fingerprint(raw).items()}


class _Rest:
    """The batches whose scores are not known yet, as a loader."""

    def __init__(self, loader: Any, chunks: Chunks | None) -> None:
        self._loader, self._chunks = loader, chunks
        self.known: dict[int, Tensor] = {}
        self.numbers: list[int] = []  # how many examples each batch so far has
        self.raw: list[Any] = []  # the last batch

    def __iter__(self) -> Iterator[Any]:
        self.numbers = []
        for number, raw in enumerate(self._loader):
            if self._chunks is not None:
                found = self._chunks.read(number, raw)
                if found is not None:
                    self.known[number] = found
                    continue
            self.numbers.append(number)
            self.raw = [*self.raw, raw][-2:]
            yield raw


def batches_of(
    model: nn.Module,
    names: list[str],
    train: Any,
    loss: LossLike,
    score: Score,
    chunks: Chunks | None,
    **data: Any,
) -> Iterator[tuple[int, Tensor]]:
    """The scores (n, ...) of each batch in order, with its first example's number."""
    progress = data.pop("progress", False)
    loader = Batches(train, device=next(model.parameters()).device, **data).loader
    rest = _Rest(loader, chunks)
    sweep = make_sweep(LossGradients(loss), model, rest, params=names, progress=progress, **data)
    start, done = 0, 0

    def ready(until: int | None) -> Iterator[tuple[int, Tensor]]:
        """What is known already of the batches from the last one on."""
        nonlocal start, done
        while done in rest.known and (until is None or done < until):
            scores = rest.known.pop(done)
            yield start, scores
            start, done = start + len(scores), done + 1

    def finished(number: int, raw: Any, parts: list[Tensor]) -> Iterator[tuple[int, Tensor]]:
        nonlocal start, done
        scores = torch.cat(parts)
        if not bool(scores.isfinite().all()):
            raise DataError(
                f"expected finite scores, but those of batch {number} hold NaN or infinity: check "
                "its data, and the gradients there"
            )
        if chunks is not None:
            chunks.keep(number, raw, scores)
        yield from ready(number)
        yield start, scores
        start, done = start + len(scores), number + 1

    held: list[Tensor] = []
    current: tuple[int, Any] | None = None
    try:
        with outside_inference(), closing(sweep.pieces()) as pieces:
            for piece in pieces:
                number = rest.numbers[piece.batch]
                if current is not None and number != current[0]:
                    yield from finished(*current, held)
                    held = []
                current = number, rest.raw[-1]
                with torch.no_grad():
                    held.append(score(piece))
    except DataError:
        if rest.numbers or not rest.known:
            raise  # all scores are known, and the rest is empty
    if current is not None:
        yield from finished(*current, held)
    yield from ready(None)


def whole(stream: Iterator[tuple[int, Tensor]]) -> Tensor:
    """All scores (N, ...); positions that a batch does not have are zero."""
    parts = [scores for _, scores in stream]
    if len({part.shape[1:] for part in parts}) > 1:
        if parts[0].dim() < 3:
            raise UnsupportedLayerError("expected the same scores of every batch")
        longest = max(part.shape[1] for part in parts)
        parts = [
            torch.cat([part, part.new_zeros(len(part), longest - part.shape[1], part.shape[2])], 1)
            for part in parts
        ]
    return torch.cat(parts)


def largest(stream: Iterator[tuple[int, Tensor]], k: int) -> Top:
    """The k largest scores of each query, of scores (n, Q): no more are ever held."""
    values: Tensor | None = None
    indices: Tensor | None = None
    for start, scores in stream:
        own = torch.arange(start, start + len(scores), device=scores.device)
        own = own.unsqueeze(1).expand_as(scores)
        both = scores if values is None else torch.cat([values, scores])
        where = own if indices is None else torch.cat([indices, own])
        values, order = both.topk(min(k, len(both)), 0)
        indices = where.gather(0, order)
    if values is None or indices is None:
        raise DataError("expected at least one training example")
    return Top(values.mT, indices.mT)
