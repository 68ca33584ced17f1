"""Krylov spaces of several vectors side by side, and the quadrature that they give."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import NotPositiveDefiniteError
from .krylov import Matvec, norms
from .subspace import orthogonalised, require_symmetric, rounding_of

__all__ = ["Lanczos", "evaluated"]


class Lanczos:
    """For each column v of a start, orthonormal V_m with V_m e_1 = v / |v| and V_m^T A V_m = T_m.

    Columns are independent, and multiplied together. A column that has found an invariant subspace
    stays as it is. With reorthogonalisation every vector is held. Otherwise three are held; then
    eigenvalues may come several times, with weights that add up, and the quadrature is as good
    (Greenbaum 1989).

    Args:
        matvec: v (n, k) to A v, A symmetric.
        start: (n, k).
        steps: at most so many.
        reorthogonalize: whether to hold every vector.
        method: the method that uses it, for messages.

    Attributes:
        steps: how many were done.
        sizes: |v| of each column (k,).
        live: which columns have not found an invariant subspace (k,).

    Example:
        >>> import torch
        >>> A = torch.diag(torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64))
        >>> v = torch.ones(3, 1, dtype=torch.float64)
        >>> Lanczos(lambda v: A @ v, v, 3, reorthogonalize=True, method="").sizes
        tensor([1.7321], dtype=torch.float64)

    Source: Golub and Meurant (2010), Matrices, moments and quadrature with applications.
    """

    def __init__(
        self, matvec: Matvec, start: Tensor, steps: int, *, reorthogonalize: bool, method: str
    ) -> None:
        self._matvec, self._method = matvec, method
        n, k = start.shape
        self.capacity = min(steps, n)
        held = self.capacity if reorthogonalize else 2
        self._basis = start.new_zeros(k, held, n)
        self._full = reorthogonalize
        self.sizes = norms(start).squeeze(0)
        self._v = start / torch.where(self.sizes == 0, 1.0, self.sizes)
        self.live = self.sizes > 0
        self._alphas: list[Tensor] = []
        self._betas: list[Tensor] = []
        self._norm = torch.zeros_like(self.sizes)
        self._floor: float | None = None  # what is all rounding, once it is asked for
        self.steps = 0

    @property
    def finished(self) -> bool:
        """Whether another step would bring nothing."""
        return self.steps >= self.capacity or not bool(self.live.any())

    def step(self) -> None:
        """Make one product, and with it one more row of every T.

        Raises:
            ValueError: A is not symmetric.
        """
        j, v = self.steps, self._v
        w = self._matvec(v)
        alpha = (v * w).sum(0)
        previous = self._basis[:, (j - 1) % self._basis.shape[1]].mT if j else torch.zeros_like(v)
        beta = self._betas[-1] if j else torch.zeros_like(alpha)
        self._norm = torch.maximum(self._norm, torch.maximum(alpha.abs(), beta))
        largest = float(self._norm.max())
        seen, expected = (previous * w).sum(0)[None], torch.where(self.live, beta, 0.0)[None]
        corner = alpha[None, :1]
        require_symmetric(seen, expected, corner, largest, w.dtype, self._method, self._rounding)
        self._basis[:, j % self._basis.shape[1]] = v.mT
        w = w - alpha * v - beta * previous
        if self._full:
            bases = self._basis[:, : j + 1].mT.unbind()  # k of (n, j)
            each = zip(w.split(1, dim=1), bases, strict=True)
            w = torch.cat([orthogonalised(column, basis)[0] for column, basis in each], 1)
        beta = norms(w).squeeze(0)
        limit = 10 * torch.finfo(w.dtype).eps * torch.maximum(self._norm, beta)
        # a column that has ended gets a diagonal that is apart from its T
        self._alphas.append(torch.where(self.live, alpha, self._alphas[0] if j else alpha))
        self.live = self.live & (beta > limit)
        beta = torch.where(self.live, beta, 0.0)
        self._betas.append(beta)
        self._v = torch.where(self.live, w / torch.where(self.live, beta, 1.0), 0.0)
        self.steps = j + 1

    def _rounding(self) -> float:
        """See `rounding_of`."""
        if self._floor is None:
            self._floor = rounding_of(self._matvec, len(self._v), self._v)
        return self._floor

    def tridiagonal(self, steps: int | None = None) -> Tensor:
        """T (k, m, m) after so many steps, by default all; in float64, on the CPU."""
        m = self.steps if steps is None else steps
        alphas = torch.stack(self._alphas[:m]).double().cpu()  # (m, k)
        T = torch.diag_embed(alphas.mT)
        if m > 1:
            betas = torch.stack(self._betas[: m - 1]).double().cpu().mT
            T = T + torch.diag_embed(betas, 1) + torch.diag_embed(betas, -1)
        return T

    def quadrature(self, steps: int | None = None) -> tuple[Tensor, Tensor]:
        """Nodes and weights (k, m) with v.f(A) v / |v|^2 = sum weights f(nodes); weights sum to 1.

        Exact for polynomials f of degree 2 m - 1.
        """
        nodes, vectors = torch.linalg.eigh(self.tridiagonal(steps))
        return nodes, vectors[:, 0].square()

    def coefficients(self, f: Callable[[Tensor], Tensor]) -> Tensor:
        """f(T) e_1 |v| (k, m): f(A) v is V times this."""
        nodes, vectors = torch.linalg.eigh(self.tridiagonal())
        first = vectors[:, 0]
        values = evaluated(f, nodes, first.square(), nodes.abs().max(), self._basis.dtype, "f(A) v")
        sizes = self.sizes.double().cpu().unsqueeze(-1)
        y: Tensor = (vectors @ (values * first).unsqueeze(-1)).squeeze(-1) * sizes
        return y

    def combined(self, y: Tensor) -> Tensor:
        """V y (n, k) for coefficients (k, m)."""
        basis = self._basis[:, : y.shape[1]]
        return (basis.mT @ y.to(basis).unsqueeze(-1)).squeeze(-1).mT


def evaluated(
    f: Callable[[Tensor], Tensor],
    nodes: Tensor,
    weights: Tensor,
    norm: Tensor,
    dtype: torch.dtype,
    what: str,
) -> Tensor:
    """f at the nodes that have a weight. A node that is zero up to rounding counts as zero.

    Args:
        f: eigenvalues to their function, elementwise.
        nodes: eigenvalues.
        weights: their weights, in the same shape; f is not read at a weight of 0.
        norm: |A|; rounding is 100 eps |A|.
        dtype: the dtype of the products, which eps is of.
        what: the name of the quantity, for messages.

    Returns:
        f(nodes), in their shape; 0 if the weight is 0.

    Raises:
        NotPositiveDefiniteError: f is not finite at an eigenvalue.

    Example:
        >>> x = torch.tensor([1.0, 4.0])
        >>> evaluated(torch.sqrt, x, torch.ones(2), x.max(), x.dtype, "the root")
        tensor([1., 2.])
    """
    rounding = 100 * torch.finfo(dtype).eps * norm
    nodes = torch.where(nodes.abs() <= rounding, 0.0, nodes)
    values = torch.where(weights > 0, f(nodes), 0.0)
    if not bool(values.isfinite().all()):
        worst = float(nodes[~values.isfinite()].min())
        near = " (up to rounding)" if worst == 0 else ""
        raise NotPositiveDefiniteError(
            f"{what}: the function is not finite at {worst:.3g}{near}, an eigenvalue of A: "
            "add damping with F.damped(...)"
        )
    return values
