"""What may be refused, and why that is just. Any other refusal is a fault."""

import re
from typing import NamedTuple

__all__ = ["REASONS", "reason_of", "table"]


class Reason(NamedTuple):
    """Why refusals of one kind are just.

    Attributes:
        kind: in words.
        pattern: of the error's class and message.
        why: the reason.
    """

    kind: str
    pattern: str
    why: str


REASONS = (
    Reason(
        "examples that are mixed",
        r"StochasticModelError: .*(treats each example on its own|belong to each example)",
        "the outputs of an example depend on the others in its batch, so that it has no gradient "
        "of its own; the network was made so",
    ),
    Reason(
        "a random model",
        r"StochasticModelError: .*(one fixed function|at random)",
        "two passes of one batch differ, so that there is no one matrix; the network was made so",
    ),
    Reason(
        "a derivative that torch does not have",
        r"UnsupportedLayerError: a function of the model cannot be differentiated",
        "a product needs a second derivative, or one in forward mode, which torch lacks or has "
        "wrong (cdist, weight norm, an embedding's padding); the message names a way that works",
    ),
    Reason(
        "a closed form that a structure does not have",
        r"UnsupportedLayerError: .* has no closed form for ",
        "eigenvalues, powers, pseudo-inverses and nuclear norms of lazy sums, products, parts and "
        "matrix-free operators would need the dense matrix; the message says how to ask for it",
    ),
)


def reason_of(text: str) -> Reason | None:
    """Why a refusal is just, from its error's class and message; None if it may not be."""
    return next((reason for reason in REASONS if re.match(reason.pattern, text, re.DOTALL)), None)


def table(counts: dict[str, int]) -> str:
    """How often refusals of each kind came, and why each is just, as rows of Markdown."""
    rows = ["| refused | kind | why it is just |", "|---|---|---|"]
    known = {reason.kind: reason.why for reason in REASONS}
    rows += [f"| {n} | {kind} | {known[kind]} |" for kind, n in sorted(counts.items())]
    return "\n".join(rows)
