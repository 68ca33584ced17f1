"""One recorded forward: every torch function in which data meet weights, and its gradient edge.

Module hooks are the wrong tool: they are wrong after in-place operations, miss modules whose
function is never called through them, and do not fire in compiled models. A torch function mode
sees them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .. import tree
from ..errors import StochasticModelError
from .calls import Call, arranged, edge_of
from .contractions import CONTRACTIONS
from .elementwise import ELEMENTWISE, TOGETHER, copied
from .functions import differentiable, held_by, in_place, kept, tensors_in
from .layers import BATCH_STATISTICS
from .local import results_apart
from .lookups import Lookup, by_number, chosen, grouped, lookup_of, table
from .meetings import Meeting
from .registry import Known, find
from .repeats import VIEWS, View, repeats_of, same
from .scopes import in_build, refuse_renormalisation
from .uses import Use
from .weights import Weight, derived, sources_of

__all__ = ["Made", "Recorder"]

# A constant that a pass made: by which function, and whether it was taken for data, None if a
# pass of one example cannot tell.
Made = tuple[str, bool | None]
CLOSED = {*ELEMENTWISE, *TOGETHER, *CONTRACTIONS}  # functions that may know a repeated weight


class Recorder(TorchFunctionMode):
    """Records where data meet weights: the calls that have a form, and why others have none.

    A tensor is a *weight* if it is a selected parameter, or made of some by functions that receive
    no data. It is a *constant* if it is a buffer, or made of constants. All else is data. A
    constant with as many entries in front as there are examples is taken for data: it will meet
    them one by one.

    Args:
        model: the network.
        parameters: the selected parameters by name.
        raw: the batch.
        training: whether the pass is one of a training loop: batch normalisation may use the
            statistics of the batch, which count as constants, and passes of a build inside of it
            are not recorded. Otherwise such a model is refused, since it mixes examples.
        through: whether the forms may use the pass's graph, to go from weights to parameters.
        examples: of each constant that another pass made, whether it was taken for data.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, Tensor],
        raw: Any,
        *,
        training: bool = False,
        through: bool = True,
        examples: Sequence[Made] = (),
    ) -> None:
        super().__init__()
        self._training, self._through = training, through
        self._weights = {id(p): Weight.of(name, p) for name, p in parameters.items()}
        self._constants = {id(t): t for t in held_by(model) if id(t) not in self._weights}
        self._own = frozenset(self._constants)  # what the model holds, not what a pass makes
        self._cuts: dict[int, Weight] = {}
        self._picks: dict[tuple[int, int], Tensor] = {}
        self._lookups: dict[int, Lookup] = {}
        self._pending: dict[int, str] = {}  # weights repeated for each example, and by what
        self._copies: dict[int, Tensor] = {}  # those of them that are data now
        self._sizes = {t.shape[0] for t in tree.tensors(raw) if t.dim()}
        self._given = examples
        self.examples: list[Made] = []
        self.calls: list[Call] = []
        self.formless: dict[str, str] = {}  # parameter -> why it has no form

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        refuse_renormalisation(func, args, kwargs)
        if self._training and in_build():
            return func(*args, **kwargs)
        weights: list[Weight] = []
        data = self._sort(args, weights) | self._sort(tuple(kwargs.values()), weights)
        if data and func is torch.Tensor.__getitem__ and by_number(args[1]):
            data = self._sort(args[:1], [])  # the number is a fact of the pass: an expert's, say
        if self._pending and weights:
            closed = func in CLOSED if data else getattr(func, "__name__", "") in VIEWS
            weights, data = (weights, data) if closed else self._settled(weights, data)
        given = [*tensors_in(args), *tensors_in(tuple(kwargs.values()))] if self._lookups else []
        if not weights:
            if func is F.batch_norm and not self._training:
                self._refuse_statistics(func, args, kwargs, data)
            output = func(*args, **kwargs)
            self._made_without_weights(func, args, output, data)
        elif not data:
            output = func(*args, **kwargs)
            self._derive(func, args, kwargs, output, weights)
        else:
            output = self._meet(func, args, kwargs, weights)
        for lookup in [self._lookups[id(t)] for t in given if id(t) in self._lookups]:
            self._enter(func, args, kwargs, output, lookup)
        return output

    def __exit__(self, *exception: Any) -> None:
        """Record what was read and has not entered a product."""
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        for lookup in self._lookups.values():
            if not lookup.used:
                lookup.itself()

    def _sort(self, values: Sequence[Any], weights: list[Weight]) -> bool:
        """Collect the weights among some values; whether there are data."""
        data = False
        for value in values:
            if isinstance(value, Tensor):
                key = id(value)
                if key not in self._weights and value.grad_fn is not None:
                    self._see_function(value)
                if key in self._copies:
                    data = True
                elif key in self._weights:
                    weights.append(self._weights[key])
                elif key not in self._constants:
                    data = True
            elif isinstance(value, (list, tuple)):
                data |= self._sort(value, weights)
            elif isinstance(value, dict):
                data |= self._sort(tuple(value.values()), weights)
            elif isinstance(value, nn.Module):  # the call of a registered one
                self._sort(list(value.parameters()), weights)
        return data

    def _see_function(self, tensor: Tensor) -> None:
        """Tell a weight that a function of the user's own makes, which no mode sees, from data."""
        sources = sources_of(tensor, self._weights)
        if sources is not None:
            self._constants.pop(id(tensor), None)  # inside of the function it had no gradient
            if sources and not set(tensor.shape[:1]) & self._sizes:
                self._weights[id(tensor)] = derived(tensor, "", sources)

    def _refuse_statistics(
        self, func: Callable[..., Any], args: Any, kwargs: Any, data: bool
    ) -> None:
        known = find(func, args)
        if data and known is not None and known.bind(args, kwargs).get("training"):
            raise StochasticModelError(BATCH_STATISTICS)  # before it changes running statistics

    def _made_without_weights(
        self, func: Callable[..., Any], args: Sequence[Any], output: Any, data: bool
    ) -> None:
        if data:
            if args and isinstance(args[0], Tensor) and in_place(func):
                self._constants.pop(id(args[0]), None)
            return
        for tensor in tensors_in(output):
            shared = not tensor.dim() or not self._for_examples(func, tensor.shape[0])
            if id(tensor) not in self._constants and shared:
                self._constants[id(tensor)] = tensor

    def _for_examples(self, func: Callable[..., Any], size: int) -> bool:
        """Whether a size is that of the batch: now, and in the pass before."""
        name, k = getattr(func, "__name__", ""), len(self.examples)
        before, known = self._given[k] if k < len(self._given) else ("", None)
        known = known if before == name else None  # else the passes went other ways
        alike = size in self._sizes
        mine = alike and (size > 1 if known is None else known)
        self.examples.append((name, None if alike and size == 1 and known is None else mine))
        return mine

    def _derive(
        self,
        func: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        output: Any,
        sources: Sequence[Weight],
    ) -> None:
        name = getattr(func, "__name__", "")
        if self._repeated(func, args, kwargs, output, sources):
            return
        made = tensors_in(output)
        if not made and in_place(func) and args and isinstance(args[0], Tensor):
            made = [args[0]]
        for tensor in made:
            if tensor.requires_grad:
                self._constants.pop(id(tensor), None)
                if id(sources[0].tensor) in self._pending and tensor._is_view():
                    self._pending[id(tensor)] = self._pending[id(sources[0].tensor)]
                if id(tensor) not in self._weights or in_place(func):
                    self._weights[id(tensor)] = derived(tensor, name, sources)
            elif id(tensor) not in self._weights:
                self._constants[id(tensor)] = tensor

    def _repeated(
        self,
        func: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        output: Any,
        sources: Sequence[Weight],
    ) -> bool:
        """Whether a function repeats a weight for each example, which is a use of it."""
        found = list(repeats_of(func, args, kwargs, output))
        if not found:
            return False
        repeat = next((one for one in found if one.times in self._sizes), found[0])
        if not self._for_examples(func, repeat.times):
            return False
        if repeat.shares:
            self._pending[id(output)] = func.__name__
            return False
        once = derived(repeat.once(), func.__name__, sources)
        self._settle(once, func.__name__, repeat.view, output)
        return True

    def _settle(self, once: Weight, function: str, view: View, output: Tensor) -> None:
        """Record that copies of a weight are entries of an output, which is data from now on."""
        self._weights[id(once.tensor)] = once
        self._add(function, copied(self._cut(once), view, output), output, set())
        self._copies[id(output)] = output

    def _settled(self, weights: Sequence[Weight], data: bool) -> tuple[list[Weight], bool]:
        """The weights of a call but for those that are repeated, which are data from now on."""
        repeated = [w for w in weights if id(w.tensor) in self._pending]
        for weight in {id(w): w for w in repeated}.values():
            self._settle(weight, self._pending[id(weight.tensor)], same, weight.tensor)
        return [w for w in weights if id(w.tensor) not in self._copies], data or bool(repeated)

    def _meet(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        weights: Sequence[Weight],
    ) -> Any:
        """Run a function of data and weights, and record its uses."""
        known = find(func, args)
        call = {} if known is None else known.bind(args, kwargs)
        if not self._training and func is F.batch_norm and call.get("training"):
            raise StochasticModelError(BATCH_STATISTICS)
        names = {name for weight in weights for name in weight.names}
        alone = "" if known is None else self._composite(known, call, names)
        if not isinstance(alone, str):
            return alone
        before = kept(func, args)
        output = results_apart(func(*args, **kwargs)) if known is None else func(*args, **kwargs)
        meant = args[0] if output is None and before is not args else output
        if not differentiable(meant):
            return output
        name = getattr(func, "__name__", str(func)) if known is None else known.name
        reason = f"{name} has no form"
        if known is not None:
            use = known.use(call, output)
            if isinstance(use, Use):
                self._add(name, use, output, names)
                return output
            if known.own:
                self.formless.update(dict.fromkeys(names, use))
                return output
            reason = alone or use
        tell = self._weight_of, self._cut, lambda value: id(value) in self._own
        meeting = Meeting(func, before, kwargs, meant, *tell)
        if self._pending and func in CONTRACTIONS and not meeting.product():
            weights, _ = self._settled(weights, True)
            names = {name for weight in weights for name in weight.names}
        if self._looked_up(meeting, names):
            return output
        apart = [(use, meant) for use in grouped(func, before, kwargs, meant, self._pick)]
        self._uses(name, names, reason, known, apart or meeting.uses())
        return output

    def _uses(
        self,
        name: str,
        names: set[str],
        reason: str,
        known: Known | None,
        found: Iterable[tuple[Use, Tensor] | str],
    ) -> None:
        """Record the uses that were found of some parameters."""
        rest = set(names)
        for one in found:
            if isinstance(one, str):
                reason = one
                break
            use, made = one
            self._add(name.strip("_"), use, made, set(), "" if known is None else reason)
            rest -= {n for w in self._role_weights(use).values() for n in w.names}
        self.formless.update(dict.fromkeys(rest, reason))

    # --- rows of a weight that the data choose ----------------------------------------------------

    def _looked_up(self, meeting: Meeting, names: set[str]) -> bool:
        """Whether a call reads rows of a weight: a table's, or matrices that await a product."""
        found, output = lookup_of(*meeting[:3]), meeting.output
        if found is None or self._weight_of(found[0]) is None or not isinstance(output, Tensor):
            return False
        (weight, ids), name = found, "lookup"
        if weight.dim() == 2:
            self._uses(name, names, "", None, [(table(weight, ids, output), output)])
            return True
        if weight.dim() != 3 or ids.dim() != 1:
            return False

        def itself() -> None:
            self._uses(name, names, f"{name} has no form", None, meeting.uses())

        self._lookups[id(output)] = Lookup(weight, ids, output, names, itself)
        return True

    def _enter(
        self,
        func: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        output: Any,
        lookup: Lookup,
    ) -> None:
        """Record the product that looked up matrices enter, or the reading itself."""
        if not differentiable(output):
            return
        name = getattr(func, "__name__", str(func)).strip("_")
        uses = chosen(func, args, kwargs, output, lookup, self._pick)
        lookup.used |= bool(uses)
        for use in uses:
            self._add(name, use, output, set())
        if uses:
            return
        del self._lookups[id(lookup.output)]
        if lookup.used or in_place(func):
            reason = f"matrices that the data choose enter {name}, too"
            self.formless.update(dict.fromkeys(lookup.names, reason))
        else:
            lookup.itself()

    def _pick(self, whole: Tensor, k: int) -> Tensor:
        """One matrix of a weight, as a weight."""
        if (id(whole), k) not in self._picks:
            self._picks[id(whole), k] = whole.select(0, k)
        picked = self._picks[id(whole), k]
        self._weights[id(picked)] = derived(picked, "select", [self._weights[id(whole)]])
        return picked

    def _weight_of(self, tensor: Any) -> Weight | None:
        known = isinstance(tensor, Tensor) and id(tensor) not in self._copies
        return self._weights.get(id(tensor)) if known else None

    def _cut(self, weight: Weight) -> Tensor:
        """A weight with size 1 along the dimensions in which it is only repeated."""
        if id(weight.tensor) not in self._cuts:
            tensor = weight.tensor
            for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
                if size > 1 and stride == 0:
                    tensor = tensor.narrow(dim, 0, 1)
            cut = weight if tensor is weight.tensor else derived(tensor, "narrow", [weight])
            self._cuts[id(weight.tensor)] = cut
            self._weights[id(tensor)] = cut
        return self._cuts[id(weight.tensor)].tensor

    def _composite(self, known: Known, call: Mapping[str, Any], names: set[str]) -> Any:
        """Run a composite; a string says why it cannot, an empty one that it is none."""
        rest = set(names)
        if known.composite is None:
            return ""

        def record(use: Use, output: Tensor) -> None:
            own = {name for w in self._role_weights(use).values() for name in w.names}
            rest.difference_update(own)
            if own and differentiable(output):
                self._add(known.name, use, output, own)

        output = known.composite(call, record)
        if not isinstance(output, str):
            self.formless.update(dict.fromkeys(rest, f"{known.name} has no form for it"))
        return output

    def _role_weights(self, use: Use) -> dict[str, Weight]:
        given = ((role, self._weights.get(id(tensor))) for role, tensor in use.roles.items())
        return {role: weight for role, weight in given if weight is not None}

    def _add(self, function: str, use: Use, output: Any, names: set[str], note: str = "") -> None:
        """Record one use by the selected parameters that the call received."""
        weights = self._role_weights(use)
        own = {name for weight in weights.values() for name in weight.names}
        complex_ = isinstance(output, Tensor) and output.is_complex()
        if reason := use.mismatch() or (f"{function} of complex numbers has no form" * complex_):
            self.formless.update(dict.fromkeys(names | own, reason))
            return
        for other in names - own:
            self.formless[other] = f"{function} has no form for it"
        if not self._through:
            made = {n for w in weights.values() if w.selection is None for n in w.names}
            self.formless.update(dict.fromkeys(made, f"{function} with a weight made of others"))
            weights = {role: w for role, w in weights.items() if w.selection is not None}
        if weights:
            edge, shape = edge_of(output), arranged(use, output.shape)
            call = Call(function, weights, use, edge, output.shape, shape, note)
            whole = use.weight
            if use.matrices and whole is not None and id(whole) in self._weights:
                call = replace(call, split=lambda: self._split(call, whole))
            self.calls.append(call)

    def _split(self, call: Call, whole: Tensor) -> list[Call]:
        made = []
        for k in range(call.use.matrices):
            use = call.use.one(k, self._pick(whole, k))
            shape = arranged(use, call.output)
            weights = self._role_weights(use)
            made.append(replace(call, weights=weights, use=use, shape=shape, split=None))
        return made
