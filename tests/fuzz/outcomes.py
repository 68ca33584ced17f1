"""What came of a case."""

import re
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass

from nngeo_lazy.errors import NNGeoError

from .writer import UnfitError


class WrongError(AssertionError):
    """A result that is not the truth; the message says which, and by how much."""


TRUTH = {"truth_of", "singles", "jacobian", "scores", "fisher", "empirical", "hessian"}  # oracle's


@dataclass(frozen=True)
class Outcome:
    """What came of one check.

    Attributes:
        kind: "right", "refused", "foreign", "wrong" or "unfit".
        text: the message.
    """

    kind: str
    text: str = ""

    @property
    def signature(self) -> str:
        """What stays the same while a case is cut down."""
        head = self.text.split("\n")[0]
        if self.kind == "wrong":
            return self.kind
        return f"{self.kind} {head.split(':')[0]}"

    @property
    def summary(self) -> str:
        """The message without what differs from case to case."""
        text = re.sub(r"'[^']*'|\[[^]]*\]|\([^)]*\)", "..", self.text.split("\n")[0])
        return re.sub(r"[-+]?\d[\d.e+-]*|\bself\.\w+|\bm\d+\S*", "#", text)[:150]


def outcome(case: Callable[[], None]) -> Outcome:
    """Run a case."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            case()
        except WrongError as error:
            return Outcome("wrong", str(error))
        except UnfitError as error:
            return Outcome("unfit", str(error))
        except NNGeoError as error:
            return Outcome("refused", f"{type(error).__name__}: {error}")
        except Exception as error:  # noqa: BLE001 - what any code may raise is what is looked for
            frames = traceback.extract_tb(error.__traceback__)
            ours = [f for f in frames if "/nngeo_lazy/" in f.filename] or frames
            at = f"{ours[-1].filename.split('/nngeo_lazy/')[-1]}:{ours[-1].lineno}"
            truth = any("/fuzz/" in f.filename and f.name in TRUTH for f in frames)
            kind = "unfit" if truth else "foreign"
            return Outcome(kind, f"{type(error).__name__}: {error} [{at}]")
    return Outcome("right")
