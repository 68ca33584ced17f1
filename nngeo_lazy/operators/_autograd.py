"""A linear solve that is differentiated implicitly: no iteration and no eigenvector is taped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

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
    x: Tensor = _apply_solve(_Problem(operator, krylov), v, *operator.representation())
    return x


@dataclass(frozen=True)
class _Problem:
    """An operator to be solved: hidden, for torch would dispatch on an operator among arguments."""

    operator: BaseLinearOperator
    krylov: Krylov


def _same_or_rebuilt(operator: BaseLinearOperator, args: tuple[Tensor, ...]) -> BaseLinearOperator:
    """The operator with these tensors: itself, with its caches, if they are its own."""
    own = operator.representation()
    if all(a is b for a, b in zip(own, args, strict=True)):
        return operator
    rebuilt: BaseLinearOperator = operator.representation_tree()(*args)
    return rebuilt


class _ImplicitSolve(torch.autograd.Function):
    @staticmethod
    def forward(problem: _Problem, v: Tensor, *args: Tensor) -> Tensor:
        with torch.no_grad():
            operator = _same_or_rebuilt(problem.operator, args)
            return operator._solve_columns(v, problem.krylov).clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        problem, _, *args = inputs
        ctx.problem = _Problem(problem.operator, problem.krylov.restarted())
        ctx.save_for_backward(output, *args)
        ctx.save_for_forward(output, *args)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = grads
        x, *args = ctx.saved_tensors
        problem = ctx.problem
        y = _apply_solve(problem, g, *args)
        need = [i for i, wanted in enumerate(ctx.needs_input_grad[2:]) if wanted]
        arg_grads: list[Tensor | None] = [None] * len(args)
        if need:
            pair_shape = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2])
            x_, y_ = (t.expand(*pair_shape, *t.shape[-2:]) for t in (x, y))

            def product(*chosen: Tensor) -> Tensor:
                full = list(args)
                for i, t in zip(need, chosen, strict=True):
                    full[i] = t
                rebuilt: BaseLinearOperator = problem.operator.representation_tree()(*full)
                return rebuilt._apply(torch.cat([x_, y_], -1))

            vjp = torch.func.vjp(product, *(args[i] for i in need))[1]
            # A is symmetric, so half of each order: the gradient is then symmetric, too
            for i, t in zip(need, vjp(torch.cat([y_, x_], -1) / -2), strict=True):
                arg_grads[i] = t
        return (None, y, *arg_grads)

    @staticmethod
    def jvp(ctx: Any, _: None, dv: Tensor | None, *dargs: Tensor | None) -> Tensor:
        x, *args = ctx.saved_tensors
        problem = ctx.problem
        rhs = torch.zeros_like(x) if dv is None else dv
        moved = [i for i, d in enumerate(dargs) if d is not None]
        if moved:  # A dx = dv - dA x

            def product(*chosen: Tensor) -> Tensor:
                full = list(args)
                for i, t in zip(moved, chosen, strict=True):
                    full[i] = t
                rebuilt: BaseLinearOperator = problem.operator.representation_tree()(*full)
                return rebuilt._apply(x)

            tangents = tuple(d for d in dargs if d is not None)
            rhs = rhs - torch.func.jvp(product, tuple(args[i] for i in moved), tangents)[1]
        dx: Tensor = _apply_solve(problem, rhs, *args)
        return dx

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        problem: _Problem,
        v: Tensor,
        *args: Tensor,
    ) -> tuple[Tensor, int]:
        _, v_dim, *arg_dims = in_dims
        solve = _apply_solve
        if all(dim is None for dim in arg_dims):  # a batch of vectors is more columns
            axis = 0 if v_dim is None else v_dim
            wide = v.movedim(axis, -1)  # (..., n, k, B)
            x = solve(problem, wide.flatten(-2), *args)
            x = x.unflatten(-1, wide.shape[-2:])
            return x, x.dim() - 1

        def pick(t: Tensor, dim: int | None, b: int) -> Tensor:
            return t if dim is None else t.select(dim, b)

        each = [
            solve(
                problem,
                pick(v, v_dim, b),
                *(pick(t, dim, b) for t, dim in zip(args, arg_dims, strict=True)),
            )
            for b in range(info.batch_size)
        ]
        return torch.stack(each), 0


def _apply_solve(problem: _Problem, v: Tensor, *args: Tensor) -> Tensor:
    return cast(Tensor, cast(Any, _ImplicitSolve).apply(problem, v, *args))
