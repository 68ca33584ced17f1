"""Neural tangent kernels inside GPyTorch (the extra `gp`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

try:
    import gpytorch
    from gpytorch.kernels import Kernel
except ImportError as error:
    raise ImportError("nngeo_lazy.gp needs GPyTorch: pip install 'nngeo_lazy[gp]'") from error

from .arguments import checked
from .data import Batches
from .errors import wrong_option
from .kernels import NTK
from .network import Network
from .operators import BaseLinearOperator, aslinearoperator
from .operators.kernel import kernel_of
from .selectors import Selector, space_of

__all__ = ["NTKKernel", "wrap"]

_HELD = 4  # sets of inputs whose Jacobians are kept: training and test inputs, and their parts
_OUTPUTS = ("mean", "full")


@dataclass(frozen=True)
class _Known:
    """The Jacobian at some inputs, and the parameters that it is of."""

    inputs: Tensor
    state: tuple[Any, ...]
    jacobian: BaseLinearOperator


class NTKKernel(Kernel):  # type: ignore[misc]
    """The neural tangent kernel of a network as a GPyTorch kernel: `ng.NTK` at the inputs.

    By default the network is not a submodule: its parameters are not among the kernel's, not
    trained with the Gaussian process and not in its `state_dict`. A later change of them is seen.
    Scales, noises and other kernels are trained around it. Jacobians of the last inputs are kept,
    so that a training loop differentiates the network once. Inputs that require gradients give a
    dense kernel that has them, an example at a time, as an acquisition function needs.

    With `train_network` it is a deep kernel: the network is a submodule, and the kernel is dense
    and has gradients in its parameters, by second derivatives of the network.

    Args:
        model: the network, whose inputs are rows of the inputs (N, D).
        outputs: "mean" (N x N, the trace over outputs divided by C), or "full" (N C x N C, for
            multitask models: the tasks of an example lie side by side).
        params: which parameters.
        forward: `(model, inputs) -> outputs` in place of the call; the place to reshape rows.
        active_dims: which columns of the inputs the network takes; all by default.
        train_network: whether gradients in the network's parameters are made, and the network's
            parameters are among the kernel's.

    Raises:
        ValueError: other outputs than these; a deep kernel of a network without any parameter
            that requires a gradient.

    Example:
        >>> kernel = gpytorch.kernels.ScaleKernel(NTKKernel(nn.Linear(3, 1)))
        >>> kernel(torch.ones(4, 3)).shape
        torch.Size([4, 4])

    Source: Jacot, Gabriel and Hongler (2018), Neural tangent kernel.
    """

    has_lengthscale = False

    @checked
    def __init__(
        self,
        model: nn.Module,
        *,
        outputs: str = "mean",
        params: Selector | None = None,
        forward: Callable[[nn.Module, Any], Tensor] | None = None,
        active_dims: tuple[int, ...] | None = None,
        train_network: bool = False,
    ) -> None:
        super().__init__(active_dims=active_dims)
        if outputs not in _OUTPUTS:
            raise ValueError(wrong_option("outputs", outputs, _OUTPUTS, "kernels"))
        if train_network:
            if not any(p.requires_grad for p in model.parameters()):
                raise ValueError(
                    "train_network=True needs parameters with gradients, but none of the network's "
                    "requires one: call model.requires_grad_(True), or leave out train_network"
                )
            self.network = model
        self._network = (model,)  # in a tuple, so that it is no submodule by itself
        self._deep = train_network
        self._outputs, self._params, self._forward = outputs, params, forward
        self._known: list[_Known] = []

    def forward(
        self,
        x1: Tensor,
        x2: Tensor,
        diag: bool = False,
        last_dim_is_batch: bool = False,
        **params: Any,
    ) -> Any:
        """The kernel between x1 (..., N, D) and x2 (..., M, D), or its diagonal.

        Raises:
            ValueError: `last_dim_is_batch`, which would feed single features to the network.
        """
        if last_dim_is_batch:
            raise ValueError("an NTKKernel takes whole rows: last_dim_is_batch has no meaning here")
        if x1.dim() > 2 or x2.dim() > 2:
            lead = torch.broadcast_shapes(x1.shape[:-2], x2.shape[:-2])
            pairs = zip(
                x1.expand(*lead, *x1.shape[-2:]).flatten(0, -3),
                x2.expand(*lead, *x2.shape[-2:]).flatten(0, -3),
                strict=True,
            )
            each = torch.stack([self._between(*pair, diag=diag, dense=True) for pair in pairs])
            return each.unflatten(0, lead)
        return self._between(x1, x2, diag=diag, dense=False)

    def num_outputs_per_input(self, x1: Tensor, x2: Tensor) -> int:
        """Rows of the kernel for each example: C with outputs "full"."""
        if self._outputs == "mean":
            return 1
        jacobian = self._jacobian(x1[..., :1, :].reshape(1, -1))
        return int(kernel_of(jacobian, jacobian).shape[0])

    def _between(self, x1: Tensor, x2: Tensor, *, diag: bool, dense: bool) -> Any:
        if torch.is_grad_enabled() and (self._deep or x1.requires_grad or x2.requires_grad):
            taped = self._taped(x1, x2)
            if diag:
                return taped.diagonal()
            return taped if dense else aslinearoperator(taped)
        first, second = self._jacobian(x1), self._jacobian(x2)
        kernel = kernel_of(first, second, outputs=self._outputs)
        if diag:
            return kernel.diagonal()
        return kernel.to_dense() if dense else kernel

    def _taped(self, x1: Tensor, x2: Tensor) -> Tensor:
        """The dense kernel with a graph to the inputs, and to the network if it is trained."""
        (model,) = self._network
        names = space_of(model, self._params).names
        others = [name for name, p in model.named_parameters() if p.requires_grad]
        space = space_of(model, [*names, *others])  # all that the kernel depends on
        batches = Batches(x1.detach(), device=space.device, forward=self._forward)
        network = Network(model, space, batches.forward)
        point = space.values(model)
        point = point if self._deep else point.detach()
        outputs, first = network.taped_rows(point, x1, names)
        second = first if x1 is x2 else network.taped_rows(point, x2, names)[1]
        full = first @ second.mT
        if self._outputs == "full":
            return full
        count = outputs[0].numel()
        pairs = full.unflatten(1, (-1, count)).unflatten(0, (-1, count))
        return torch.einsum("ncmc->nm", pairs) / count

    def _jacobian(self, x: Tensor) -> BaseLinearOperator:
        (model,) = self._network
        tensors = [*model.parameters(), *model.buffers()]
        state = (*((id(t), t._version) for t in tensors), model.training)
        for known in self._known:
            same = known.inputs.shape == x.shape and known.inputs.dtype == x.dtype
            if same and known.state == state and torch.equal(known.inputs, x):
                return known.jacobian
        x = x.detach()
        kernel: Any = NTK(model, x, params=self._params, forward=self._forward)
        made = _Known(x.clone(), state, kernel.left)
        self._known = [made, *self._known][:_HELD]
        return made.jacobian


class _WrappedKernel(Kernel):  # type: ignore[misc]
    """See `wrap`."""

    def __init__(self, base_kernel: Kernel) -> None:
        super().__init__()
        self.base_kernel = base_kernel

    @property
    def batch_shape(self) -> torch.Size:
        shape: torch.Size = self.base_kernel.batch_shape
        return shape

    def __call__(
        self, x1: Tensor, x2: Tensor | None = None, diag: bool = False, **params: Any
    ) -> Any:
        if diag:
            return self.base_kernel(x1, x2, diag=True, **params)
        with gpytorch.settings.lazily_evaluate_kernels(False):
            return aslinearoperator(self.base_kernel(x1, x2, **params))

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **params: Any) -> Any:
        """What a kernel around this one asks for, such as a `ScaleKernel`."""
        return self(x1, x2, diag, **params)

    def num_outputs_per_input(self, x1: Tensor, x2: Tensor) -> int:
        count: int = self.base_kernel.num_outputs_per_input(x1, x2)
        return count


def wrap(kernel: Kernel) -> Kernel:
    """A kernel whose matrices are operators of this package, whatever it is made of.

    GPyTorch solves systems of more than 800 rows by conjugate gradients to a loose tolerance. A
    wrapped kernel is solved in closed form if its parts are held or made from forms, and otherwise
    to a true relative residual. So is a sum, a product or a multiple.

    Args:
        kernel: any GPyTorch kernel; its hyperparameters are trained as before.

    Returns:
        A kernel; what it returns are operators of this package.

    Example:
        >>> ntk = NTKKernel(nn.Linear(3, 1))
        >>> kernel = wrap(gpytorch.kernels.RBFKernel() + ntk)
        >>> type(kernel(torch.ones(4, 3)).add_diagonal(1.0)).__name__
        'DenseLinearOperator'
    """
    return _WrappedKernel(kernel)
