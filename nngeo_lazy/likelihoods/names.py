"""Likelihoods by name."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

from torch import Tensor

from ..errors import DataError
from .categorical import Categorical
from .dispersed import NegativeBinomial, StudentT
from .elementwise import Bernoulli, Poisson
from .gaussian import Gaussian
from .heteroscedastic import HeteroscedasticGaussian
from .joint import Joint
from .likelihood import Likelihood
from .preferences import BradleyTerry
from .weighted import Weighted

__all__ = ["NAMES", "Heads", "LikelihoodLike", "described", "of_heads", "reading_of", "resolve"]

Name: TypeAlias = Literal["categorical", "bernoulli", "gaussian", "poisson"]
Heads: TypeAlias = Mapping[str, str | Likelihood] | Sequence[str | Likelihood]
LikelihoodLike: TypeAlias = Name | Likelihood | Heads

NAMES: dict[str, Callable[[], Likelihood]] = {
    "categorical": Categorical,
    "bernoulli": Bernoulli,
    "gaussian": Gaussian,
    "poisson": Poisson,
}

KINDS = (
    Bernoulli,
    BradleyTerry,
    Categorical,
    Gaussian,
    HeteroscedasticGaussian,
    Joint,
    NegativeBinomial,
    Poisson,
    StudentT,
    Weighted,
)


def of_heads(given: Any) -> Any:
    """A mapping or a sequence of likelihoods as one likelihood of several heads; else as it is.

    Args:
        given: what a user gave as likelihood or loss.

    Returns:
        A `Joint`, or what was given.

    Raises:
        DataError: a head without a likelihood.

    Example:
        >>> of_heads(("poisson", Gaussian(0.5)))
        Joint(heads=(Poisson(), Gaussian(variance=0.5)))
        >>> of_heads("poisson")
        'poisson'
    """
    if isinstance(given, Mapping):
        return Joint({name: _named(each) for name, each in given.items()})
    if isinstance(given, Sequence) and not isinstance(given, str):
        return Joint([_named(each) for each in given])
    return given


def reading_of(likelihood: Any) -> dict[str, Any]:
    """How batches are read for a likelihood, as options of `Batches`."""
    if not isinstance(likelihood, Joint):
        return {}
    return {"outputs": likelihood.outputs, "labels": len(likelihood.heads)}


def _named(given: Any) -> Any:
    return NAMES[given]() if isinstance(given, str) and given in NAMES else given


def resolve(
    likelihood: str | Likelihood | None, outputs: Tensor, target: Tensor | None
) -> Likelihood:
    """A likelihood from itself, its name, or None if the first batch proves it categorical.

    Args:
        likelihood: what a user gave.
        outputs: (N, ...), the first batch's; read if nothing is given.
        target: its labels, or None.

    Returns:
        The likelihood.

    Raises:
        DataError: an unknown name, or None if nothing is proved.

    Example:
        >>> import torch
        >>> resolve("poisson", torch.zeros(2, 3), None)
        Poisson()
        >>> resolve(None, torch.zeros(4, 3), torch.tensor([0, 2, 1, 1]))
        Categorical(class_dim=None, ...)
    """
    if isinstance(likelihood, Likelihood):
        return likelihood
    if isinstance(likelihood, str) and likelihood in NAMES:
        return NAMES[likelihood]()
    if likelihood is not None:
        raise DataError(
            f"unknown likelihood {likelihood!r}: expected one of {sorted(NAMES)}, or an object "
            "from nngeo_lazy.likelihoods; docs/data.md explains them"
        )
    guess = Categorical()
    try:
        if target is None:
            raise DataError("there is no target")
        guess.check(outputs, target)
    except DataError as error:
        raise DataError(
            f"cannot tell the likelihood from outputs {tuple(outputs.shape)} ({error}): pass "
            f"likelihood= with one of {sorted(NAMES)}, or an object from nngeo_lazy.likelihoods"
        ) from None
    return guess


def described(text: str) -> Likelihood | None:
    """The likelihood that prints as a text; None if the text is that of another loss.

    Args:
        text: the `repr` of a likelihood, as files hold it.

    Returns:
        The likelihood, or None.

    Example:
        >>> described("Categorical(shift=1)").shift
        1
    """
    try:
        call = ast.parse(text, mode="eval").body
    except SyntaxError:
        return None
    made = _made(call)
    return made if isinstance(made, Likelihood) else None


def _made(node: ast.expr) -> Any:
    """What an expression stands for; None if it holds more than literals and likelihoods."""
    if isinstance(node, ast.Dict):
        keys = [None if key is None else _made(key) for key in node.keys]
        return dict(zip(keys, map(_made, node.values), strict=True))
    if isinstance(node, ast.Tuple | ast.List):
        made = [_made(each) for each in node.elts]
        return made if isinstance(node, ast.List) else tuple(made)
    if not isinstance(node, ast.Call):
        try:
            return ast.literal_eval(node)
        except ValueError:
            return None
    kinds = {kind.__name__: kind for kind in KINDS}
    name = node.func.id if isinstance(node.func, ast.Name) else ""
    options = {str(given.arg): _made(given.value) for given in node.keywords}
    if name not in kinds or node.args:
        return None
    try:
        return kinds[name](**options)
    except DataError:  # it holds a loss that is not known by its text
        return None
