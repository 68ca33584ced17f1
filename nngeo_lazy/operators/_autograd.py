"""A linear solve that is differentiated implicitly: no iteration and no eigenvector is taped."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .base import BaseLinearOperator, Krylov

__all__ = ["implicit_solve"]


def implicit_solve(operator: BaseLinearOperator, v: Tensor, krylov: Krylov) -> Tensor:
    """x = A^-1 v for a symmetric A, differentiable any number of times in v and in A's tensors.

    With y = A^-1 g, the gradient in v is y, and the one in A's tensors is that of -y.Ax at fixed
    x and y. Degenerate eigenvalues therefore cause no NaN.

    Args:
        operator: A, symmetric.
        v: (..., n, k).
        krylov: options of an iterative solve.
    """
    x: Tensor = _ImplicitSolve.apply(  # type: ignore[no-untyped-call]
        operator, krylov, v, *operator.representation()
    )
    return x


def _same_or_rebuilt(operator: BaseLinearOperator, args: tuple[Tensor, ...]) -> BaseLinearOperator:
    """The operator with these tensors: itself, with its caches, where they are its own."""
    own = operator.representation()
    if all(a is b for a, b in zip(own, args, strict=True)):
        return operator
    rebuilt: BaseLinearOperator = operator.representation_tree()(*args)
    return rebuilt


class _ImplicitSolve(torch.autograd.Function):
    @staticmethod
    def forward(
        operator: BaseLinearOperator, krylov: Krylov, v: Tensor, *args: Tensor
    ) -> Tensor:
        with torch.no_grad():
            return _same_or_rebuilt(operator, args)._solve_columns(v, krylov).clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        operator, krylov, _, *args = inputs
        ctx.operator, ctx.krylov = operator, krylov.restarted()
        ctx.save_for_backward(output, *args)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = grads
        x, *args = ctx.saved_tensors
        operator, krylov = ctx.operator, ctx.krylov
        y = _ImplicitSolve.apply(operator, krylov, g, *args)  # type: ignore[no-untyped-call]
        need = [i for i, wanted in enumerate(ctx.needs_input_grad[3:]) if wanted]
        arg_grads: list[Tensor | None] = [None] * len(args)
        if need:
            pair_shape = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2])
            x_, y_ = (t.expand(*pair_shape, *t.shape[-2:]) for t in (x, y))

            def product(*chosen: Tensor) -> Tensor:
                full = list(args)
                for i, t in zip(need, chosen, strict=True):
                    full[i] = t
                rebuilt: BaseLinearOperator = operator.representation_tree()(*full)
                return rebuilt._apply(torch.cat([x_, y_], -1))

            _, vjp = torch.func.vjp(product, *(args[i] for i in need))
            # A is symmetric, so half of each order: the gradient is then symmetric, too
            for i, t in zip(need, vjp(torch.cat([y_, x_], -1) / -2), strict=True):
                arg_grads[i] = t
        return (None, None, y, *arg_grads)

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        operator: BaseLinearOperator,
        krylov: Krylov,
        v: Tensor,
        *args: Tensor,
    ) -> tuple[Tensor, int]:
        _, _, v_dim, *arg_dims = in_dims
        solve = _ImplicitSolve.apply
        if all(dim is None for dim in arg_dims):  # a batch of vectors is more columns
            axis = 0 if v_dim is None else v_dim
            wide = v.movedim(axis, -1)  # (..., n, k, B)
            x = solve(operator, krylov, wide.flatten(-2), *args)  # type: ignore[no-untyped-call]
            x = x.unflatten(-1, wide.shape[-2:])
            return x, x.dim() - 1

        def pick(t: Tensor, dim: int | None, b: int) -> Tensor:
            return t if dim is None else t.select(dim, b)

        each = [
            solve(  # type: ignore[no-untyped-call]
                operator,
                krylov,
                pick(v, v_dim, b),
                *(pick(t, dim, b) for t, dim in zip(args, arg_dims, strict=True)),
            )
            for b in range(info.batch_size)
        ]
        return torch.stack(each), 0
