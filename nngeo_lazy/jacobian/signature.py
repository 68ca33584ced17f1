"""What a pass did, read off its graph: which functions, in which order, of which parameters.

Two passes of one signature differ in numbers alone. Most functions do the same to every example
whatever the numbers are, so that what was proved on one such pass holds for the others. What reads
positions from data, or reaches across the example axis, does not: such a pass is proved by itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Signature", "signature_of"]


class _Reach(NamedTuple):
    """Attributes of a node: the sizes of what it was given, and the dimensions that it joins."""

    sizes: str | None  # None: the sizes of its result
    dims: str | None  # None: all dimensions


_SIZES = "_saved_self_sym_sizes"

# These treat each example alone only if they act along another axis than that of the examples.
_ALONG = {
    "SelectBackward0": _Reach(_SIZES, "_saved_dim"),
    "SliceBackward0": _Reach(_SIZES, "_saved_dim"),
    "SplitBackward0": _Reach(_SIZES, "_saved_dim"),
    "SplitWithSizesBackward0": _Reach(_SIZES, "_saved_dim"),
    "SumBackward0": _Reach(_SIZES, None),
    "SumBackward1": _Reach(_SIZES, "_saved_dim"),
    "MeanBackward0": _Reach(_SIZES, None),
    "MeanBackward1": _Reach(_SIZES, "_saved_dim"),
    "RollBackward0": _Reach(None, "_saved_dims"),
}

# For these, the shapes tell which example meets which.
_NAMES = """
Abs Acos Acosh AdaptiveAvgPool2D AdaptiveAvgPool3D AdaptiveMaxPool2D AdaptiveMaxPool3D Add
Addcdiv Addcmul Addmm Addmv Alias Amax Amin Asin Asinh Atan Atan2 Atanh AvgPool2D AvgPool3D
Baddbmm Bmm Cat Ceil Celu Clamp ClampMax ClampMin Clone Complex ConstantPadNd Convolution Cos
Cosh CudnnBatchNorm CudnnConvolution CudnnRnn Cumsum Detach Diagonal Div Dot Elu Embedding Erf
Erfc Exp Exp2 Expand Expm1 Fill Floor FusedRmsNorm Gelu Glu Hardsigmoid Hardswish Hardtanh Hypot
Im2Col LeakyRelu Lerp LinalgVectorNorm Linear Log Log10 Log1p Log2 LogSigmoid LogSigmoidForward
LogSoftmax Logaddexp Logaddexp2 Logsumexp MaskedFill Matmul Max MaxPool1D MaxPool2DWithIndices
MaxPool3DWithIndices Maximum Mean Min Minimum MiopenBatchNorm Mish MkldnnConvolution
MkldnnMaxPool2D MkldnnRnnLayer Mm Mul Mv NativeBatchNorm NativeGroupNorm NativeLayerNorm Neg
Norm Permute PixelShuffle PixelUnshuffle Polar Pow Prelu PreluKernel Prod Real Reciprocal
ReflectionPad1D ReflectionPad2D Relu Relu6 Repeat ReplicationPad1D ReplicationPad2D ReshapeAlias
Round Rsqrt Rsub SafeSoftmax ScaledDotProductAttentionMath ScaledDotProductCudnnAttention
ScaledDotProductEfficientAttention ScaledDotProductFlashAttention
ScaledDotProductFlashAttentionForCpu Selu Sgn Sigmoid Sign Silu Sin Sinc Sinh SlowConv2D Softmax
Softplus Softshrink Sqrt Squeeze Stack Std StdMean Sub Sum T Tan Tanh ThnnFusedGruCell
ThnnFusedLstmCell Threshold ToCopy Transpose Tril Triu Trunc Unbind Unfold UnsafeView Unsqueeze
UpsampleBicubic2D UpsampleBilinear2D UpsampleLinear1D UpsampleNearest1D UpsampleNearest2D
UpsampleNearest3D UpsampleTrilinear3D Var VarMean View ViewAsComplex ViewAsReal Where Xlogy Zero
"""
_ALIKE = frozenset(_NAMES.split())


@dataclass(frozen=True)
class Signature:
    """The functions between the parameters and the outputs.

    Attributes:
        nodes: the graph from the outputs on, depth first: names of functions and of parameters,
            and numbers of nodes that came before.
        leaves: the parameters that the outputs are made of.
        alike: whether all of them treat every example alike, whatever the numbers are.
        precision: the coarsest rounding, relative, of the numbers that they made.
    """

    nodes: tuple[str | int, ...]
    leaves: frozenset[str]
    alike: bool
    precision: float


def signature_of(outputs: Tensor, parameters: Mapping[str, Tensor]) -> Signature:
    """The signature of the pass that made these outputs, (N, ...)."""
    n = outputs.shape[0]
    named = {id(p): name for name, p in parameters.items()}
    seen: dict[Any, int] = {}
    nodes: list[str | int] = []
    leaves: set[str] = set()
    alike = True
    dtypes: set[torch.dtype] = {outputs.dtype}
    stack: list[Any] = [outputs.grad_fn]
    while stack:
        node = stack.pop()
        if node is None:
            nodes.append(-1)
            continue
        if node in seen:
            nodes.append(seen[node])
            continue
        seen[node] = len(seen)
        variable = getattr(node, "variable", None)
        if variable is not None:
            name = named.get(id(variable), "")
            leaves.add(name)
            nodes.append("= " + name)
            continue
        name = node.name()
        nodes.append(name)
        dtypes.update(made.dtype for made in node._input_metadata)
        alike = alike and _alike(node, name, n)
        stack.extend(below for below, _ in node.next_functions)
    precision = max(torch.finfo(d).eps for d in dtypes if d.is_floating_point or d.is_complex)
    return Signature(tuple(nodes), frozenset(leaves), alike, precision)


def _alike(node: Any, name: str, n: int) -> bool:
    """Whether a node does the same to each of n examples."""
    function = name.partition("Backward")[0]
    reach = _ALONG.get(name)
    if reach is None:
        special = _SPECIAL.get(function)
        return function in _ALIKE if special is None else special(node)
    sizes = node._input_metadata[0].shape if reach.sizes is None else getattr(node, reach.sizes)
    if n == 1 or not sizes:
        return True
    given = range(len(sizes)) if reach.dims is None else getattr(node, reach.dims)
    given = [given] if isinstance(given, int) else given or range(len(sizes))
    dims = [_signed(dim) % len(sizes) for dim in given]
    if sizes[0] % n == 0:  # the examples, most likely; other sizes may be multiples by chance
        return 0 not in dims
    return all(sizes[dim] % n != 0 for dim in dims)


def _slabs(node: Any) -> bool:
    """Whether a strided view takes all numbers that it was given, one example after the other."""
    (below, at), *_ = node.next_functions
    (first, *others), (step, *steps) = node._saved_size or (1,), node._saved_stride or (1,)
    one = math.prod(others)
    if below is None or math.prod(below._input_metadata[at].shape) != first * one:
        return False
    reach = sum((size - 1) * stride for size, stride in zip(others, steps, strict=True))
    return not node._saved_storage_offset and step == one and reach < one


def _looked_up(node: Any) -> bool:
    """Whether a parameter is read at given places, as an embedding does."""
    below = node.next_functions[0][0]
    indices = [index for index in node._saved_indices if index is not None]
    return hasattr(below, "variable") and all(index.dtype != torch.bool for index in indices)


def _of_parameters(node: Any) -> bool:
    """Whether a function receives parameters alone, and so no example."""
    return all(hasattr(below, "variable") for below, _ in node.next_functions)


_SPECIAL = {"AsStrided": _slabs, "Index": _looked_up, "WeightNormInterface": _of_parameters}


def _signed(dim: int) -> int:
    """A negative dimension comes as an unsigned number."""
    return dim - 2**64 if dim >= 2**63 else dim
