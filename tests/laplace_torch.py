"""The package laplace-torch, which imports some that it does not call: they have stand-ins here."""

import importlib.machinery
import importlib.util
import sys
import types

import pytest

IMPORTED = {
    "torchmetrics": (),
    "asdfghjkl": ("gradient", "hessian"),
    "asdl": ("fisher", "grad_maker", "gradient", "hessian", "matrices"),
}


class _StandIn(types.ModuleType):
    """A module that has any class one asks for, each without anything in it."""

    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (), {})
        setattr(self, name, made)
        return made


def peer():
    """The package; the test is skipped if it is missing."""
    if importlib.util.find_spec("laplace") is None:
        pytest.skip("laplace-torch is not installed")
    for package, parts in IMPORTED.items():
        for name in (package, *(f"{package}.{part}" for part in parts)):
            stand_in = _StandIn(name)
            stand_in.__spec__ = importlib.machinery.ModuleSpec(name, None)
            sys.modules.setdefault(name, stand_in)
    import laplace

    return laplace
