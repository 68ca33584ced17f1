"""Models whose parameters `fully_shard` cut into pieces, one on each process (FSDP2).

A process works on a copy with whole parameters, which is its own, so that passes exchange nothing.
The copy is smaller than the factors of the model: for a language model about a fifth of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from .collectives import ALONE, Group, cut_like, refuse_sharded
from .errors import DataError
from .skeleton import skeleton

__all__ = ["fully_sharded", "gathered", "processes_of", "whole_vectors"]


def gathered(model: nn.Module, group: Group | None) -> nn.Module:
    """A copy with whole parameters of a model that is cut into pieces; any other model as it is.

    All processes of the group make the call together. The model itself is not touched.

    Args:
        model: the network.
        group: the processes that share the data; None if the data say nothing of processes.

    Raises:
        DataError: the data say nothing of processes, or name others than have the pieces, or the
            model is cut in other ways, too.
    """
    if not fully_sharded(model):
        return model
    known = ALONE if group is None else group
    with known.together("a model in pieces"):
        pieces = _pieces(model, group)
    whole: dict[int, Tensor] = {
        id(p): nn.Parameter(p.full_tensor().detach(), p.requires_grad) for p in pieces
    }
    made = skeleton(model, whole)
    for module in made.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if _of_torch(hook, "fsdp")]:
                del hooks[key]
        if _in_pieces(module):
            module.__class__ = type(module).__mro__[2]  # FSDPLinear, FSDPModule, Linear
    return made


def fully_sharded(model: Any) -> bool:
    """Whether `fully_shard` was called on a model, or on a part of it."""
    return isinstance(model, nn.Module) and any(_in_pieces(module) for module in model.modules())


def processes_of(model: nn.Module) -> Group:
    """The processes that have the pieces of a model."""
    meshes: list[Any] = [p.device_mesh for p in model.parameters() if hasattr(p, "device_mesh")]
    return Group.of(meshes[0].get_group() if meshes and meshes[0].ndim == 1 else None)


def whole_vectors(
    vectors: Mapping[str, Tensor],
) -> tuple[Mapping[str, Tensor], Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]]:
    """Vectors by name without pieces, and the way back to the pieces that they came in."""
    cut: dict[str, Any] = {name: v for name, v in vectors.items() if hasattr(v, "full_tensor")}
    if not cut:
        return vectors, lambda found: found

    def back(found: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {name: cut_like(x, cut[name]) if name in cut else x for name, x in found.items()}

    whole = {name: v.full_tensor() for name, v in cut.items()}
    return {**vectors, **whole}, back


def _in_pieces(module: nn.Module) -> bool:
    """Whether `fully_shard` was called on a module; its class says so, without a slow import."""
    return any(
        kind.__name__ == "FSDPModule" and kind.__module__.startswith("torch.distributed.fsdp")
        for kind in type(module).__mro__
    )


def _pieces(model: nn.Module, group: Group | None) -> list[Any]:
    """The parameters that lie in pieces on the processes of a group."""
    if group is None:
        raise DataError(
            "the parameters lie in pieces on several processes (fully_shard), but the data are a "
            "plain loader: pass ng.Distributed(loader), which sums over the data of all ranks"
        )
    for module in model.modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if any(_of_torch(hook, "tensor") for hook in hooks):
            refuse_sharded(model)
    pieces: list[Any] = [p for p in model.parameters() if hasattr(p, "full_tensor")]
    for p in pieces:
        ranks = sorted(p.device_mesh.mesh.flatten().tolist())
        if ranks != group.members:
            raise DataError(
                f"the parameters lie in pieces on the ranks {ranks}, but the data are shared by "
                f"the ranks {group.members}: pass ng.Distributed(loader, group=...) with the "
                "processes of the mesh that the model is sharded over"
            )
    return pieces


def _of_torch(hook: Any, room: str) -> bool:
    """Whether a hook belongs to a package of torch.distributed."""
    return str(getattr(hook, "__module__", "")).startswith(f"torch.distributed.{room}")
