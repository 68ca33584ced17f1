"""Thousands of random cases, each against the truth; what fails is cut down and printed as code.

    python -m tests.fuzz.run --networks 3000 --expressions 1500 --families 2000 --minutes 10
    python -m tests.fuzz.run --only family:17 --checks 100

Outcomes: right; refused by a named error (counted by kind, with the reason why it is just; without
such a reason it is a failure); foreign (an exception that is not the
package's); wrong (a result that is not the truth, or a model that is changed); unfit (left out: the
oracle says that the generated network is not what it should be).
"""

import argparse
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from . import expressions, oracle
from .networks import Family, Recipe
from .outcomes import Outcome, outcome
from .refusals import reason_of, table


@dataclass
class Network:
    """A random network or family with one likelihood and some checks."""

    recipe: Recipe | Family
    checks: int

    @property
    def code(self) -> str:
        """What the network says."""
        return self.recipe.program().code

    @property
    def group(self) -> str:
        """Failures of one group are thought to be of one kind."""
        r = self.recipe
        return f"family {r.name}" if isinstance(r, Family) else f"network {r.seed}"

    def run(self) -> Iterator[tuple[str, Outcome]]:
        found: list[oracle.Truth] = []
        made = outcome(lambda: found.append(truth_of(self.recipe)))
        if made.kind != "right":
            yield "making it", Outcome("unfit", made.text)
            return
        if found[0].program.fixed:
            made = outcome(lambda: found[0].jacobian)
            if made.kind != "right":
                yield "the oracle", Outcome("unfit", made.text)
                return
        for check in oracle.choose(found[0], self.checks):
            yield check, outcome(lambda check=check: oracle.run(found[0], check))

    def shrunk(self, check: str, failed: Outcome, seconds: float = 20.0) -> tuple[str, Outcome]:
        """The simplest network that fails alike, as code."""
        best, end = self.recipe, time.monotonic() + seconds
        progress = True
        while progress and time.monotonic() < end:
            progress = False
            for smaller in best.smaller():
                now = outcome(lambda r=smaller: oracle.run(truth_of(r), check))
                if now.signature == failed.signature:
                    best, failed, progress = smaller, now, True
                    break
                if time.monotonic() > end:
                    break
        return reproduction(best, check), failed


def truth_of(recipe: Recipe | Family) -> oracle.Truth:
    program = recipe.program()
    name = oracle.LIKELIHOODS[recipe.seed // 7 % len(oracle.LIKELIHOODS)]
    return oracle.Truth(program, name)


def reproduction(recipe: Recipe | Family, check: str) -> str:
    """What runs by itself and shows the fault."""
    truth = truth_of(recipe)
    p = truth.program
    rest = ", ".join(
        f"{name}={getattr(p, name)!r}"
        for name in ("seed", "positions", "classes", "fixed", "train")
    )
    call = f'oracle.run(oracle.Truth(program, "{truth.likelihood}"), "{check}")'
    return (
        f"from tests.fuzz import oracle, writer\n"
        f'program = writer.Program("""\n{p.source}""", {p.data!r}, {rest})\n{call}'
    )


@dataclass
class Tally:
    """Counts of outcomes, of refusals by message and by reason, and what failed."""

    counts: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    just: Counter[str] = field(default_factory=Counter)
    failures: dict[str, list[str]] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, case: str, group: str, check: str, found: Outcome) -> bool:
        """Count an outcome; whether it is the first failure of its kind in its group."""
        self.counts[found.kind] += 1
        reason = reason_of(found.text) if found.kind == "refused" else None
        if reason is not None:
            self.just[reason.kind] += 1
        if reason is not None or found.kind == "unfit":
            key = f"{found.kind}: {found.summary}"
            self.refusals[key] += 1
            self.examples.setdefault(key, f"{case} {check}: {found.text[:400]}")
            return False
        if found.kind == "right":
            return False
        key = f"{found.kind}: {(group or check) if found.kind == 'wrong' else found.summary}"
        self.failures.setdefault(key, []).append(f"{case} {check}: {found.text[:300]}")
        return len(self.failures[key]) == 1

    def report(self) -> str:
        lines = ["", "outcomes: " + ", ".join(f"{n} {k}" for k, n in sorted(self.counts.items()))]
        for key, n in self.refusals.most_common():
            lines += [f"  {n:6d} {key}", f"         e.g. {self.examples[key]}"]
        lines += [table(self.just)] if self.just else []
        for key, cases in self.failures.items():
            lines.append(f"FAILED {len(cases)} times, {key}")
            lines += [f"    {case}" for case in cases[:3]]
        return "\n".join(lines)


def cases(kind: str, seed: int, checks: int) -> Network | expressions.Case:
    if kind == "network":
        return Network(Recipe.random(seed), checks)
    if kind == "family":
        return Network(Family.random(seed), checks)
    return expressions.Case.random(seed)


def run(
    counts: dict[str, int],
    seed: int,
    minutes: float = 1e9,
    checks: int = 5,
    shrink: bool = True,
    without: str = "",
    say: Callable[[str], None] = lambda text: print(text, flush=True),
) -> dict[str, Tally]:
    """Run so many cases of each kind; one tally for each."""
    tallies, end = {}, time.monotonic() + 60 * minutes
    for kind, count in counts.items():
        tally = tallies[kind] = Tally()
        done = 0
        for k in range(seed, seed + count):
            if time.monotonic() > end:
                break
            case = cases(kind, k, checks)
            if without and re.search(without, case.code):
                continue
            for check, found in case.run():
                if without and re.search(without, check):
                    continue
                if tally.add(f"{kind}:{k}", case.group, check, found) and shrink:
                    code, last = case.shrunk(check, found)
                    say(f"\n--- {kind}:{k} {check}\n{found.kind}: {last.text[:600]}\n{code}")
            done += 1
        seeds = f"seeds {seed}..{seed + done - 1}"
        say(f"\n=== {kind}: {done} of {count} cases, {seeds}{tally.report()}")
    return tallies


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--networks", type=int, default=0)
    parser.add_argument("--families", type=int, default=0)
    parser.add_argument("--expressions", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=1e9)
    parser.add_argument("--checks", type=int, default=5, help="how many for each network")
    parser.add_argument("--no-shrink", action="store_true")
    parser.add_argument("--without", default="", help="what is known: a pattern of code or checks")
    parser.add_argument("--only", help="one case, as `family:17`")
    given = parser.parse_args()
    torch.set_num_threads(1)
    counts = {
        "network": given.networks,
        "family": given.families,
        "expression": given.expressions,
    }
    seed = given.seed
    if given.only:
        kind, _, number = given.only.partition(":")
        counts, seed = {kind: 1}, int(number)
    tallies = run(counts, seed, given.minutes, given.checks, not given.no_shrink, given.without)
    return int(any(tally.failures for tally in tallies.values()))


if __name__ == "__main__":
    sys.exit(main())
