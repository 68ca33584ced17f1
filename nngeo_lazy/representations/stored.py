"""A build whose passes are kept on disk, so that it goes on after an interruption."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..arguments import check_fields
from ..collectives import digest
from ..disk import replacing
from ..errors import DataError
from ..facts import Facts
from ..files import load, save
from ..folders import BEGUN, INDEX
from ..operators import BaseLinearOperator, ShardedBlockDiagonalLinearOperator
from ..statistics import Statistic
from ..sweep import Make, Sweep
from .around import Around
from .mixed import resolve
from .representation import Streamed

__all__ = ["Stored"]

_PASS = f"{BEGUN}pass-"
_KNOWN = ("num_examples", "num_terms", "denominator", "log_likelihood")


@dataclass(frozen=True)
class Stored(Around):
    """A matrix that is built to a folder, and whose blocks are read when they are needed.

    The sums of each pass are written when the pass ends. The same call goes on after the last pass
    that was finished, and returns what the folder holds if all were. The result is that of
    `ng.load(folder, lazy=True)`. In many processes all of them need the folder.

    Args:
        representation: what is built, such as "ekfac" or `Sharded("ekfac")`.
        folder: where it is built; a new one, or one that the same call has begun.

    Raises:
        DataError: the folder holds another build; draws without a seed; a statistic that keeps
            single examples.
        ImportError: safetensors is not installed (the extra `folders`).

    Example:
        >>> import nngeo_lazy as ng
        >>> F = ng.FIM(model, loader, Stored("ekfac", "fisher/"))  # doctest: +SKIP
    """

    folder: str | os.PathLike[str] = field(default="", repr=False)

    def __post_init__(self) -> None:
        check_fields(self)
        known = resolve(self.representation)
        if not isinstance(known, Streamed) or isinstance(known, Stored):
            raise DataError(
                f"expected a representation that is made of sums over the data, got {known!r}: "
                "take 'kfac', 'ekfac', 'diagonal', 'block_diagonal' or a Mixed of them"
            )
        if not os.fspath(self.folder):
            raise DataError("expected a folder to build in: pass Stored('ekfac', 'fisher/')")

    @property
    def shares_blocks(self) -> bool:
        """As the representation."""
        return self._inner.shares_blocks

    def build(self, sweep: Sweep) -> BaseLinearOperator:
        """The operator, from the passes that are left to make."""
        problem = sweep.problem
        if problem.drawn_seed is not None and problem.seed is None:
            raise DataError(
                "a build that can go on draws the same labels again: pass seed= to an 'mc' estimate"
            )
        self._inner.require_fit(sweep.facts)
        folder = os.path.join(os.fspath(self.folder), "")
        checkpoints = _Checkpoints(folder, sweep, self.described())
        if not checkpoints.whole:
            checkpoints.finish(self._inner.build_by(sweep, checkpoints.run))
        return load(checkpoints.folder, lazy=True, map_location=problem.space.device)


class _Checkpoints:
    """The passes of one build in a folder; the first process of a group writes them.

    Args:
        folder: of the build.
        sweep: of its data.
        representation: in words.
    """

    def __init__(self, folder: str, sweep: Sweep, representation: str) -> None:
        self.folder, self._sweep, self._number = folder, sweep, 0
        self._group = sweep.problem.group
        key = _key(sweep, representation)
        with self._group.together("a build in a folder"):
            if self._group.rank == 0:
                self._begin(key)
        files = os.listdir(folder) if self._group.rank == 0 else []
        done = self._group.same([INDEX in files, sum(n.startswith(_PASS) for n in files)])
        self.whole: bool = bool(done[0])
        self._done = int(done[1])

    def _begin(self, key: dict[str, Any]) -> None:
        os.makedirs(self.folder, exist_ok=True)
        path = os.path.join(self.folder, f"{BEGUN}build.json")
        try:
            with open(path, encoding="utf-8") as file:
                known = json.load(file)
        except FileNotFoundError:
            if others := sorted(os.listdir(self.folder)):
                raise DataError(
                    f"expected a new folder to build in, or one that the same call has begun, but "
                    f"{self.folder!r} holds {others[:4]}: pass another folder"
                ) from None
            with replacing(path) as out:
                out.write(json.dumps(key).encode())
            return
        except ValueError as error:
            raise DataError(f"{path!r} is damaged ({error}): pass another folder") from None
        if differing := [name for name in key if known.get(name) != key[name]]:
            raise DataError(
                f"the folder {self.folder!r} holds a build of another {differing[0]}: pass another "
                "folder, or the model, the data and the options with which it was begun"
            )

    def run(self, make: Make, keep: bool) -> tuple[Facts, Sequence[Statistic]]:
        """A pass, from the disk if it was made before."""
        self._number += 1
        path = os.path.join(self.folder, f"{_PASS}{self._number}.pt")
        if self._number <= self._done:
            with self._group.together("the sums of a pass"):
                state = _read(path)
            seen = self._number > 1
            facts = self._sweep.facts if seen else self._sweep.resume()
            if state["parts"] == _parts(facts):
                statistics = make(facts)
                for each, values in zip(statistics, state["sums"], strict=True):
                    for name, value in values.items():
                        moved = isinstance(value, torch.Tensor)
                        setattr(each, name, value.to(facts.space.device) if moved else value)
                return replace(facts, **state["known"]), statistics
            self._done = 0  # a later batch uses other layers: the passes are made again
        facts, statistics = self._sweep.run(make, keep)
        with self._group.together("the sums of a pass"):
            sums = [_sums(each) for each in statistics]
            if self._group.rank == 0:
                known = {name: getattr(facts, name) for name in _KNOWN}
                with replacing(path) as file:
                    torch.save({"parts": _parts(facts), "known": known, "sums": sums}, file)
        return facts, statistics

    def finish(self, operator: BaseLinearOperator) -> None:
        """Write the operator, a sharded one by all processes; then remove the sums."""
        first = self._group.rank == 0
        if isinstance(operator, ShardedBlockDiagonalLinearOperator):
            save(operator, self.folder)
        else:
            with self._group.together("a save to a folder"):
                if first:
                    save(operator, self.folder)
        if first:
            for name in os.listdir(self.folder):
                if name.startswith(_PASS):
                    with suppress(FileNotFoundError):
                        os.remove(os.path.join(self.folder, name))


def _key(sweep: Sweep, representation: str) -> dict[str, Any]:
    """What must be the same in a call that goes on."""
    problem = sweep.problem
    parameters = problem.space.parameters(problem.model)
    return {
        "representation": representation,
        "matrix": type(problem.quantity).__name__,
        "estimator": problem.quantity.estimator,
        "seed": problem.seed,
        "parameters": [f"{name} {tuple(p.shape)} {p.dtype}" for name, p in parameters.items()],
        "values of parameters": [digest(p) for p in parameters.values()],
        "center": problem.center,
        "number of batches": problem.batches.count,
    }


def _parts(facts: Facts) -> list[str]:
    return [f"{part.names} {part.layout} {part.kind.value}" for part in facts.parts]


def _sums(statistic: Statistic) -> dict[str, Any]:
    if statistic.sums is None:
        raise DataError(
            f"{type(statistic).__name__} keeps single examples, and is not stored pass by pass: "
            "take a representation that is made of sums, such as 'kfac' or 'ekfac'"
        )
    return {name: getattr(statistic, name) for name in statistic.sums}


def _read(path: str) -> Any:
    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # noqa: BLE001 - whatever damaged files lead to
        raise DataError(
            f"the file {path!r} is damaged ({type(error).__name__}): remove it, and its pass is "
            "made again"
        ) from None
