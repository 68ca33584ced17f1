"""Writes the source of a random network, statement by statement, and runs it.

A network is text: what fails is then printed as it stands, and steps can be left out of it, since
each step adapts to the shape that comes.
"""

import random
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

HEADER = """\
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, parametrizations, rnn
from torch.utils.checkpoint import checkpoint
torch.set_default_dtype(torch.float64)"""


class UnfitError(Exception):
    """A step, a network or an expression has no meaning: it is left out."""


@dataclass(frozen=True)
class Program:
    """A network as text: its class, its data, and the likelihood that fits its outputs.

    Attributes:
        source: the lines that define the class `M`.
        data: one expression for each batch of inputs, the examples first.
        seed: of the parameters and the data.
        positions: whether the outputs are (N, T, C), not (N, C).
        classes: C.
        fixed: whether an example's outputs depend on it alone, and are the same at every call.
        train: whether the model stays in training mode.
    """

    source: str
    data: tuple[str, ...]
    seed: int
    positions: bool
    classes: int
    fixed: bool = True
    train: bool = False

    @property
    def code(self) -> str:
        """What runs by itself: the model `m` and the batches `data`."""
        mode = "" if self.train else ".eval()"
        batches = "".join(f"    {line},\n" for line in self.data)
        return (
            f"{HEADER}\ntorch.manual_seed({self.seed})\n{self.source}\nm = M(){mode}\n"
            f"data = [\n{batches}]"
        )

    @cached_property
    def made(self) -> tuple[nn.Module, list[Tensor]]:
        """The model and its batches of inputs; the default dtype is what it was."""
        before = torch.get_default_dtype()
        names: dict[str, Any] = {}
        try:
            exec(self.code, names)
        finally:
            torch.set_default_dtype(before)
        return names["m"], names["data"]


class Writer:
    """Collects statements, and knows the shape of `h` without the examples.

    Attributes:
        shape: of one example's `h`.
        rng: of the step that is written.
        linears: the linear layers so far, (name, inputs, outputs).
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self.rng = random.Random(0)
        self.linears: list[tuple[str, int, int]] = []
        self._init: list[str] = []
        self._body: list[str] = []
        self._count = 0

    @property
    def width(self) -> int:
        return self.shape[-1]

    def need(self, fits: bool) -> None:
        if not fits:
            raise UnfitError

    def name(self, prefix: str) -> str:
        self._count += 1
        return f"{prefix}{self._count}"

    def module(self, code: str) -> str:
        """A submodule; its name with `self`."""
        name = f"self.{self.name('m')}"
        self._init.append(f"{name} = {code}")
        return name

    def parameter(self, *shape: int, scale: str = "0.5", offset: str = "") -> str:
        """A raw parameter; its name with `self`."""
        sizes = ", ".join(map(str, shape))
        value = f"torch.randn({sizes})" if shape else "torch.randn(())"
        return self.module(f"nn.Parameter({offset}{scale} * {value})")

    def linear(self, inputs: int, outputs: int, bias: bool | None = None) -> str:
        with_bias = self.rng.random() < 0.7 if bias is None else bias
        name = self.module(f"nn.Linear({inputs}, {outputs}{'' if with_bias else ', bias=False'})")
        self.linears.append((name, inputs, outputs))
        return name

    def setup(self, line: str) -> None:
        self._init.append(line)

    def line(self, text: str) -> None:
        self._body.append(text)

    def small(self, low: int = 1, high: int = 4) -> int:
        return self.rng.randint(low, high)

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def pick(self, *options: Any) -> Any:
        return self.rng.choice(options)

    def mark(self) -> tuple[int, int, tuple[int, ...], int]:
        return len(self._init), len(self._body), self.shape, len(self.linears)

    def rewind(self, mark: tuple[int, int, tuple[int, ...], int]) -> None:
        """Forget what an unfit step wrote."""
        setup, body, self.shape, linears = mark
        del self._init[setup:], self._body[body:], self.linears[linears:]

    def source(self) -> str:
        setup = "".join(f"        {line}\n" for line in self._init)
        body = "".join(f"        {line}\n" for text in self._body for line in text.split("\n"))
        return (
            "class M(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
            f"{setup}    def forward(self, x):\n        h = x\n{body}        return h\n"
        )
