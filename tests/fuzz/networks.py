"""Random networks from a seed, as recipes that can be cut down."""

import random
from dataclasses import dataclass, replace

from . import flow  # noqa: F401 - registers its steps
from .families import FAMILIES
from .steps import STEPS
from .writer import Program, UnfitError, Writer

INPUTS = ("flat", "sequence", "tokens", "image", "volume")
SHAPES = {
    "flat": lambda r: (r.randint(2, 4),),
    "sequence": lambda r: (r.randint(1, 4), r.randint(2, 3)),
    "tokens": lambda r: (r.randint(1, 4),),
    "image": lambda r: (r.randint(1, 2), r.randint(2, 4), r.randint(2, 4)),
    "volume": lambda r: (r.randint(1, 2), 2, r.randint(2, 3), r.randint(1, 2)),
}
LARGEST = 150  # parameters: the oracles take a gradient for each


@dataclass(frozen=True)
class Recipe:
    """What a network is made of: an input, steps with their own seeds, and batches.

    Attributes:
        seed: of the parameters, the data and the sizes of the input.
        input: a kind of input.
        steps: (kind, seed) of each step.
        sizes: examples of each batch.
        positions: whether the outputs keep their positions, if there are any.
    """

    seed: int
    input: str
    steps: tuple[tuple[str, int], ...]
    sizes: tuple[int, ...]
    positions: bool = False

    @classmethod
    def random(cls, seed: int) -> "Recipe":
        r = random.Random(seed)
        kinds = sorted(STEPS)
        steps = tuple((r.choice(kinds), r.randrange(10**6)) for _ in range(r.randint(2, 7)))
        sizes = tuple(r.choice((1, 2, 3, 3, 4, 5)) for _ in range(r.choice((1, 1, 2, 3))))
        kind = r.choices(INPUTS, (4, 4, 2, 3, 1))[0]
        return cls(seed, kind, steps, sizes, r.random() < 0.3)

    def program(self) -> Program:
        """The text of the network; steps that do not fit are left out."""
        r = random.Random(self.seed)
        shape = SHAPES[self.input](r)
        w = Writer(shape)
        w.rng = r
        if self.input == "tokens":
            width = r.randint(2, 3)
            name = w.module(f"nn.Embedding(5, {width}{r.choice(('', ', padding_idx=0'))})")
            w.line(f"h = {name}(x)")
            w.shape = (*shape, width)
        for kind, seed in self.steps:
            mark, w.rng = w.mark(), random.Random(seed)
            try:
                STEPS[kind](w)
            except UnfitError:
                w.rewind(mark)
        w.rng = random.Random(self.seed + 1)
        positions = self.positions and len(w.shape) == 2
        if not positions and len(w.shape) > 1:
            w.line(w.pick("h = h.flatten(1)[:, :4]", "h = h.flatten(1, -2).mean(1)"))
            size = 1
            for s in w.shape:
                size *= s
            w.shape = (min(size, 4),) if "[:, :4]" in w._body[-1] else (w.width,)
        classes = w.small(2, 3)
        w.line(f"h = {w.linear(w.width, classes)}(h)")
        return Program(w.source(), self._data(shape), self.seed, positions, classes)

    def _data(self, shape: tuple[int, ...]) -> tuple[str, ...]:
        sizes = ", ".join(map(str, shape))
        if self.input == "tokens":
            return tuple(f"torch.randint(5, ({n}, {sizes}))" for n in self.sizes)
        shifts = random.Random(self.seed + 2)
        return tuple(
            f"torch.randn({n}, {sizes}){shifts.choice(('', '', ' + 1', ' - 1', ' * 2'))}"
            for n in self.sizes
        )

    def smaller(self) -> list["Recipe"]:
        """Simpler recipes, the most simple first."""
        found = [replace(self, sizes=(n,)) for n in self.sizes if len(self.sizes) > 1]
        steps = range(len(self.steps))
        found += [replace(self, steps=self.steps[:k] + self.steps[k + 1 :]) for k in steps]
        for k, n in enumerate(self.sizes):
            if n > 1:
                sizes = (*self.sizes[:k], n - 1, *self.sizes[k + 1 :])
                found.append(replace(self, sizes=sizes))
        if len(self.sizes) > 2:
            batches = range(len(self.sizes))
            found += [replace(self, sizes=self.sizes[:k] + self.sizes[k + 1 :]) for k in batches]
        if self.positions:
            found.append(replace(self, positions=False))
        return found


@dataclass(frozen=True)
class Family:
    """A realistic kind of network, with its own data.

    Attributes:
        name: which family.
        seed: of everything.
        sizes: examples of each batch.
    """

    name: str
    seed: int
    sizes: tuple[int, ...]

    @classmethod
    def random(cls, seed: int) -> "Family":
        r = random.Random(seed)
        sizes = tuple(r.choice((1, 2, 3, 4, 6)) for _ in range(r.choice((1, 2, 2, 3))))
        return cls(sorted(FAMILIES)[seed % len(FAMILIES)], seed, sizes)

    def program(self) -> Program:
        return FAMILIES[self.name](random.Random(self.seed), self.seed, self.sizes)

    def smaller(self) -> list["Family"]:
        found = [replace(self, sizes=(n,)) for n in self.sizes if len(self.sizes) > 1]
        for k, n in enumerate(self.sizes):
            if len(self.sizes) > 2:
                found.append(replace(self, sizes=self.sizes[:k] + self.sizes[k + 1 :]))
            if n > 1:
                found.append(replace(self, sizes=(*self.sizes[:k], n - 1, *self.sizes[k + 1 :])))
        return found
