"""Neural tangent kernels from a network and inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from .arguments import PositiveInt, checked
from .data import Batches
from .distributed import refuse_processes
from .errors import DataError, TooLargeError, wrong_option
from .fingerprints import refuse_shuffling
from .matrix_files import written
from .operators import BaseLinearOperator
from .operators.kernel import KINDS, KernelLinearOperator, kernel_of
from .operators.panels import rows_of_an_example
from .quantities import Outputs
from .representations import Implicit
from .representations.form_stack import factored_rows
from .selectors import Selector
from .sweep import Sweep, make_sweep
from .switches import own_arithmetic, untraced

__all__ = ["NTK"]

WAYS = {"auto": "auto", "structured": "pairs", "contraction": "rows", "matrix-free": "auto"}
FACTORED_BYTES = 2**31  # of layers' inputs and output gradients that a kernel keeps by default


@untraced
@checked
def NTK(
    model: nn.Module,
    x1: Any,
    x2: Any = None,
    *,
    outputs: str = "full",
    method: str = "auto",
    params: Selector | None = None,
    forward: Callable[[nn.Module, Any], Tensor] | None = None,
    max_directions: PositiveInt = 1000,
    path: str | Path | None = None,
    progress: bool = False,
) -> BaseLinearOperator:
    r"""The neural tangent kernel of a network of finite width, J(x1) J(x2)^T, as a lazy operator.

    .. math:: K_{(n,c),(m,d)} = \langle \nabla_w f_c(x_n), \nabla_w f_d(x'_m) \rangle

    Arguments that are not listed are those of `FIM`.

    Args:
        model: the network.
        x1: inputs: a tensor, or whatever a loader may be; its order is that of the rows.
        x2: the inputs of the columns; those of the rows by default.
        outputs: "full" (N C x N' C, example slowest), "mean" (N x N', the trace over outputs
            divided by C), "per_output" (C, N, N') or "per_example" (N, C, C).
        method: "structured": from the inputs x and output gradients g of every layer, by (x x'^T) *
            (g g'^T) at pairs of positions; "contraction": from the rows of J, a tile at a time;
            "auto": for each layer the cheaper one, and "matrix-free" if keeping x and g would
            take more than 2 GiB: each product differentiates the network.
        params: which parameters.
        forward: in place of the default call.
        max_directions: the most outputs of one example, unless matrix-free.
        path: a folder, to which the kernel is written as `kernel.npy`, in panels of examples. Each
            example is differentiated once, and the layers' inputs and output gradients lie in the
            folder until the end. After an interruption the same call goes on behind the last
            panel. The result is mapped from the file, not read.
        progress: whether to show a progress bar.

    Returns:
        The kernel: products, `K[a:b, c:d]`, `diagonal()`, `to_dense(limit)`, `center()`,
        `outputs(kind)`, solves, and sums and products with any other linear operator.

    Raises:
        DataError: a shuffling loader, no examples, inputs that do not fit each other; a path that
            holds another kernel, or has no room.
        StochasticModelError: the model is random, or mixes examples.
        NonFiniteError: NaN or infinity in the parameters or the layers.
        TooLargeError: more outputs than `max_directions`, or a dense matrix past its limit.

    Example:
        >>> import torch
        >>> model, x = torch.nn.Linear(3, 2), torch.ones(5, 3)
        >>> NTK(model, x, outputs="mean").to_dense()[0]  # x.x' + 1
        tensor([4., 4., 4., 4., 4.])

    Source: Jacot, Gabriel and Hongler (2018), Neural tangent kernel; Novak, Sohl-Dickstein and
        Schoenholz (2022), Fast finite width neural tangent kernel, on the ways of computing it.
    """
    if method not in WAYS:
        raise ValueError(wrong_option("method", method, WAYS, "kernels"))
    if outputs not in KINDS:
        raise ValueError(wrong_option("outputs", outputs, KINDS, "kernels"))
    sweeps = []
    with own_arithmetic():
        for x in (x1,) if x2 is None else (x1, x2):
            refuse_shuffling(x, "NTK")
            refuse_processes(x, "NTK", "pass rows of this process as x1, and all columns as x2")
            sweep = make_sweep(
                Outputs(),
                model,
                x,
                params=params,
                forward=forward,
                max_directions=max_directions,
                progress=progress,
            )
            sweeps.append(sweep)
        _require_one_kind([sweep.problem.batches for sweep in sweeps])
        if path is not None:
            return _on_disk(sweeps, path, outputs, method)
        jacobians = _jacobians(sweeps, method)
        return kernel_of(jacobians[0], jacobians[-1], outputs=outputs, way=WAYS[method])


def _on_disk(
    sweeps: Sequence[Sweep], path: str | Path, outputs: str, method: str
) -> BaseLinearOperator:
    """The kernel in a folder."""
    if outputs not in ("full", "mean"):
        raise ValueError(
            f"path= holds one matrix, and outputs={outputs!r} are several: take 'full' or 'mean'"
        )
    jacobians = _jacobians(sweeps, "matrix-free")
    kernel = kernel_of(jacobians[0], jacobians[-1], outputs=outputs, way=WAYS[method])
    most, count = sweeps[0].problem.max_directions, rows_of_an_example(jacobians[0])
    if count > most:
        raise TooLargeError(
            f"the rows of {count} outputs take as many backward passes for each batch, more than "
            f"max_directions={most}: raise max_directions, or leave out path and take products"
        )
    inputs = [sweep.problem.batches for sweep in sweeps]
    held = sweeps[0].problem.model.state_dict().values()
    state = [value for value in held if isinstance(value, Tensor)]
    return written(cast(KernelLinearOperator, kernel), path, state, inputs)


def _jacobians(sweeps: Sequence[Sweep], method: str) -> list[BaseLinearOperator]:
    """The Jacobians of a kernel: factored, or matrix-free."""
    if method != "matrix-free":
        limit = FACTORED_BYTES // len(sweeps) if method == "auto" else None
        try:
            return [factored_rows(sweep, limit) for sweep in sweeps]
        except TooLargeError:
            if method != "auto":
                raise
    for sweep in sweeps:
        sweep.sampled()  # which proves that the model treats each example on its own
    return [Implicit().build(sweep) for sweep in sweeps]


def _require_one_kind(inputs: Sequence[Batches]) -> None:
    """Raise DataError if the inputs of two loaders cannot be arguments of one function."""
    kinds = []
    for batches in inputs:
        with closing(iter(batches)) as each:
            batch = next(each)
        leaves, structure = tree_flatten((batch.args, batch.kwargs) if batch.args else batch.raw)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        kinds.append((str(structure), [f"{t.dtype} of {t.dim()} dimensions" for t in tensors]))
    if kinds[0] != kinds[-1]:
        (_, first), (_, second) = kinds
        raise DataError(
            f"expected x1 and x2 of one kind, but x1 holds {first} and x2 holds {second}"
            + ("" if first != second else ", arranged in another way")
        )
