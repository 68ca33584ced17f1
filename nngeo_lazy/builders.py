"""A network and a loader in, a matrix out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .arguments import PositiveInt, checked
from .costs import BuildCost, cost_of
from .distributed import refuse_processes
from .errors import DataError
from .fingerprints import refuse_shuffling
from .likelihoods import Estimator, Gaussian, LikelihoodLike
from .operators import BaseLinearOperator
from .quantities import (
    Fisher,
    GaussNewton,
    LossGradients,
    LossHessian,
    LossLike,
    MatrixKind,
    Outputs,
)
from .representations import Implicit, Representation, RepresentationLike
from .representations import resolve as resolve_representation
from .selectors import Selector
from .sweep import Sweep, make_sweep
from .switches import own_arithmetic, untraced

__all__ = ["FIM", "GGN", "Hessian", "Jacobian", "plan"]

Prepared = tuple[Representation, Sweep]


@untraced
@checked
def FIM(
    model: nn.Module,
    loader: Any,
    representation: RepresentationLike = "kfac",
    *,
    likelihood: LikelihoodLike | None = None,
    estimator: Estimator = "exact",
    samples: PositiveInt = 1,
    seed: int | None = None,
    params: Selector | None = None,
    forward: Callable[[nn.Module, Any], Tensor] | None = None,
    target: Callable[[Any], Tensor] | None = None,
    positions: Callable[[Any], Tensor | None] | None = None,
    center: bool = False,
    max_directions: PositiveInt = 1000,
    progress: bool = False,
) -> BaseLinearOperator:
    r"""The Fisher information matrix of a network, as a lazy linear operator.

    .. math:: F = \frac1N \sum_n J_n^T \, \mathbb{E}_{y \sim p(y|f_n)}
        [\nabla_f \log p \, \nabla_f \log p^T] \, J_n

    with J_n the Jacobian of the outputs of example n in the parameters. The mean is over all N
    examples of the loader, of a loss that sums over the positions of an example; masked terms
    contribute zero. `F.num_examples * F` is the sum.

    Args:
        model: the network, in the mode (`model.eval()`) in which it is differentiated; not changed.
        loader: a `DataLoader`, another re-iterable of batches, or one batch.
        representation: "kfac", "ekfac", "diagonal", "quasi_diagonal", "block_diagonal", "low_rank",
            "dense", or an options object from `nngeo_lazy.representations`.
        likelihood: "categorical", "bernoulli", "gaussian", "poisson", or an object from
            `nngeo_lazy.likelihoods`; None means categorical, and the first batch must show it. One
            for each of several heads, by name or in a sequence, if the model returns several.
        estimator: "exact" (expectation over the model's labels), "mc" (sampled labels),
            "empirical" (observed labels, one score of each example), or "empirical_positions" (one
            score of each position: T directions, as if positions were examples of their own).
        samples: label draws for each example, for "mc".
        seed: of the draws; a two-pass build re-uses each example's draws.
        params: which parameters; by default those that require a gradient.
        forward: `(model, batch) -> outputs` in place of the default call.
        target: `batch -> target` in place of the default; read only for observed labels and masks.
        positions: `batch -> mask (N, T)` of those that exist, in place of "attention_mask".
        center: for "empirical", whether the mean gradient is subtracted (their covariance). For an
            exact Fisher of a Gaussian likelihood, whether the mean Jacobian of each output is: the
            covariance of the outputs' gradients, divided by the variance.
        max_directions: the most output directions of one example in an exact computation.
        progress: whether to show a progress bar.

    Returns:
        The operator, P x P in the order of `model.named_parameters()`; see `nngeo_lazy.operators`.

    Raises:
        DataError: the loader, its batches, the targets or an option do not fit the matrix.
        StochasticModelError: the model is random, or mixes examples.
        NonFiniteError: NaN or infinity in the parameters, the outputs or the statistics.
        TooLargeError: more than `max_directions`, or a dense block past its limit.
        UnsupportedLayerError: a layer whose gradient is no derivative.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(3, 2)
        >>> x, y = torch.randn(8, 3), torch.tensor([0, 1] * 4)
        >>> F = FIM(model, (x, y), "kfac")
        >>> F.shape, F.num_examples
        (torch.Size([8, 8]), 8)
        >>> step = F.solve(F.space.zeros(), damping=1e-3)

    Source:
        Martens (2020), New insights and perspectives on the natural gradient method, eq. 1;
        Kunstner et al. (2019) on the empirical Fisher.
    """
    return _build(
        *_fisher(
            model,
            loader,
            representation,
            likelihood=likelihood,
            estimator=estimator,
            samples=samples,
            seed=seed,
            params=params,
            forward=forward,
            target=target,
            positions=positions,
            center=center,
            max_directions=max_directions,
            progress=progress,
        )
    )


@untraced
@checked
def GGN(
    model: nn.Module,
    loader: Any,
    representation: RepresentationLike = "implicit",
    *,
    loss: LossLike,
    estimator: Estimator = "exact",
    samples: PositiveInt = 1,
    seed: int | None = None,
    params: Selector | None = None,
    forward: Callable[[nn.Module, Any], Tensor] | None = None,
    target: Callable[[Any], Tensor] | None = None,
    positions: Callable[[Any], Tensor | None] | None = None,
    max_directions: PositiveInt = 1000,
    progress: bool = False,
) -> BaseLinearOperator:
    r"""The generalised Gauss-Newton matrix of a loss that is convex in the outputs.

    .. math:: G = \frac1N \sum_n J_n^T \, \nabla^2_f \ell(f_n, y_n) \, J_n

    with J_n the Jacobian of the outputs of example n in the parameters. For a likelihood without
    weights it is the Fisher information. Arguments that are not listed are those of `FIM`.

    Args:
        model: the network.
        loader: a `DataLoader`, another re-iterable of batches, or one batch.
        representation: as in `FIM`.
        loss: a likelihood (class weights, label smoothing and `pos_weight` are honoured); a
            callable `(outputs, target) -> per-example losses (N,)`, which sums over positions; or
            a `torch.nn` loss module, which keeps its own reduction, taken over the whole loader
            as one batch.
        estimator: "exact", or "mc": one random direction of the loss's Hessian for each sample.
        samples: for "mc".
        seed: of the draws.
        params: which parameters.
        forward: in place of the default call.
        target: in place of the default target.
        positions: in place of the default mask.
        max_directions: the most output directions of one example in an exact computation.
        progress: whether to show a progress bar.

    Returns:
        The operator, P x P.

    Raises:
        DataError: the loss, the loader or an option do not fit.
        NotPositiveDefiniteError: the loss is not convex in the outputs.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(3, 2)
        >>> x, y = torch.randn(8, 3), torch.randn(8, 2)
        >>> G = GGN(model, (x, y), "kfac", loss=lambda f, y: (f - y).cosh().log().sum(1))
        >>> G.solve(G.space.zeros(), damping=1e-3).shape
        torch.Size([8])

    Source:
        Schraudolph (2002), Fast curvature matrix-vector products for second-order gradient descent.
    """
    return _build(
        *_gauss_newton(
            model,
            loader,
            representation,
            loss=loss,
            estimator=estimator,
            samples=samples,
            seed=seed,
            params=params,
            forward=forward,
            target=target,
            positions=positions,
            max_directions=max_directions,
            progress=progress,
        )
    )


@untraced
@checked
def Hessian(
    model: nn.Module,
    loader: Any,
    representation: RepresentationLike = "implicit",
    *,
    loss: LossLike,
    params: Selector | None = None,
    forward: Callable[[nn.Module, Any], Tensor] | None = None,
    target: Callable[[Any], Tensor] | None = None,
    progress: bool = False,
) -> BaseLinearOperator:
    r"""The Hessian of a loss in the parameters: symmetric, and in general indefinite.

    .. math:: H = \frac1N \sum_n \nabla^2_w \ell(f_w(x_n), y_n)

    Arguments that are not listed are those of `FIM`.

    Args:
        model: the network.
        loader: a `DataLoader`, another re-iterable of batches, or one batch.
        representation: "implicit" or "dense", or `representations.Implicit(...)`.
        loss: as in `GGN`, convex in the outputs or not; "output" if the outputs are the losses.
        params: which parameters.
        forward: in place of the default call; it may call autograd itself.
        target: in place of the default target.
        progress: whether to show a progress bar.

    Returns:
        The operator, P x P. `H.solve` is conjugate gradients, which an indefinite matrix fails:
        take `ng.solve(H, b, method="minres")`.

    Raises:
        DataError: the loss, the loader or an option do not fit.
        StochasticModelError: the model is random.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh())
        >>> x, y = torch.randn(8, 3), torch.randint(4, (8,))
        >>> H = Hessian(model, (x, y), loss="categorical")
        >>> (H @ H.space.randn(2)).shape
        torch.Size([16, 2])

    Source:
        Pearlmutter (1994), Fast exact multiplication by the Hessian.
    """
    wanted = resolve_representation(representation, MatrixKind.HESSIAN)
    with own_arithmetic():
        sweep = make_sweep(
            LossHessian(loss),
            model,
            loader,
            params=params,
            forward=forward,
            target=target,
            progress=progress,
        )
    return _build(wanted, sweep)


@untraced
@checked
def Jacobian(
    model: nn.Module,
    loader: Any,
    representation: RepresentationLike = "implicit",
    *,
    loss: LossLike | None = None,
    center: bool = False,
    params: Selector | None = None,
    forward: Callable[[nn.Module, Any], Tensor] | None = None,
    target: Callable[[Any], Tensor] | None = None,
    max_directions: PositiveInt = 1000,
    progress: bool = False,
) -> BaseLinearOperator:
    r"""The Jacobian of the outputs in the parameters, (N C) x P, example slowest.

    .. math:: J_{(n, c), i} = \partial f_c(x_n) / \partial w_i

    With a loss, N x P: row n is the gradient of example n's loss at its target. Arguments that are
    not listed are those of `FIM`.

    Args:
        model: the network.
        loader: its order is that of the rows, so that it must not shuffle.
        representation: "implicit", "factored" (layers' inputs and output gradients) or "dense".
        loss: as in `GGN`; its reduction is ignored, since the rows are single examples.
        center: whether the mean over examples is subtracted from every output's rows.
        params: which parameters.
        forward: in place of the default call.
        target: in place of the default target.
        max_directions: the most outputs of one example if rows are stored.
        progress: whether to show a progress bar.

    Returns:
        A rectangular operator: `J @ v` with v flat, with columns or a dict by name; `J.mT @ u`.

    Raises:
        DataError: a shuffling loader, another representation.
        TooLargeError: more outputs than `max_directions`, or rows past 8 GiB.

    Example:
        >>> import torch
        >>> J = Jacobian(torch.nn.Linear(3, 2), torch.randn(5, 3))
        >>> J.shape, J.mT.shape
        (torch.Size([10, 8]), torch.Size([8, 10]))
    """
    wanted = resolve_representation(representation, MatrixKind.JACOBIAN)
    refuse_shuffling(loader, "Jacobian")
    refuse_processes(loader, "Jacobian", "pass this process's own batches, or build a FIM or GGN")
    quantity = Outputs() if loss is None else LossGradients(loss)
    with own_arithmetic():
        sweep = make_sweep(
            quantity,
            model,
            loader,
            params=params,
            forward=forward,
            target=target,
            max_directions=max_directions,
            progress=progress,
            center=center,
        )
    return _build(wanted, sweep)


def plan(builder: Callable[..., BaseLinearOperator], *args: Any, **options: Any) -> BuildCost:
    """What a build will cost: passes, flops and bytes by parameter, from its first batch.

    One forward and one backward pass of the first batch; nothing is built.

    Args:
        builder: `FIM` or `GGN`.
        *args: the builder's arguments: the model, the loader, the representation.
        **options: its options. `max_directions` is not enforced.

    Returns:
        Rows that print as a table, with totals.

    Raises:
        DataError: another builder, and what the builder itself would raise at once.

    Example:
        >>> import torch
        >>> model, x = torch.nn.Linear(3, 2), torch.randn(8, 3)
        >>> plan(FIM, model, x, "kfac", likelihood="gaussian")
        parameter  form           block                    size  flops  bytes
        weight     linear: outer  Kronecker (2x2) x (4x4)  6     48     80
        bias       linear: outer  Kronecker (2x2) x (4x4)  2     0      0
        1 pass over 1 batch, 1 forward and 2 backward for each batch
        48 flops for each example, 80 bytes
    """
    prepare = _fisher if builder is FIM else _gauss_newton if builder is GGN else None
    if prepare is None:
        raise DataError(f"expected the builder to be ng.FIM or ng.GGN, got {builder!r}")
    with own_arithmetic():
        representation, sweep = prepare(*args, **options)
        sweep.problem.require_agreement(representation.described())
        return cost_of(representation, sweep)


@checked
def _fisher(
    model: nn.Module,
    loader: Any,
    representation: str | Representation = "kfac",
    *,
    likelihood: LikelihoodLike | None = None,
    estimator: str = "exact",
    samples: PositiveInt = 1,
    center: bool = False,
    **data: Any,
) -> Prepared:
    quantity = Fisher(likelihood, estimator, samples)
    gaussian = isinstance(likelihood, Gaussian) or (
        isinstance(likelihood, str) and likelihood == "gaussian"
    )
    of_outputs = gaussian and estimator == "exact"
    if center and estimator != "empirical" and not of_outputs:
        raise DataError(
            f"center=True subtracts the mean gradient, which an {estimator!r} Fisher does not have "
            "(its scores have mean zero): take estimator='empirical', or likelihood='gaussian' "
            "for the covariance of the outputs' gradients"
        )
    wanted = resolve_representation(representation)
    if center and of_outputs and isinstance(wanted, Implicit):
        raise DataError(
            "'implicit' does not center the gradients of outputs: take a stored representation, "
            "such as 'low_rank'"
        )
    return wanted, make_sweep(quantity, model, loader, center=center, **data)


@checked
def _gauss_newton(
    model: nn.Module,
    loader: Any,
    representation: str | Representation = "implicit",
    *,
    loss: LossLike,
    estimator: str = "exact",
    samples: PositiveInt = 1,
    **data: Any,
) -> Prepared:
    wanted = resolve_representation(representation)
    return wanted, make_sweep(GaussNewton(loss, estimator, samples), model, loader, **data)


def _build(representation: Representation, sweep: Sweep) -> BaseLinearOperator:
    with own_arithmetic():  # tensors made in inference mode could not be used outside
        sweep.problem.require_agreement(representation.described())
        return representation.build(sweep)
