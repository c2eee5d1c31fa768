"""torch's fused convolutions of oneDNN: a convolution, a shortcut and a ReLU in one pass over memory, on a CPU in float32."""

import math

import torch
from torch import Tensor

from pysal.engine.graph.fold import Convolution

# Images per pass for which oneDNN arranges the weights; other numbers run too.
PACKED_FOR = 8

# padding, stride, dilation, groups
Geometry = tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]


def runs_on_onednn(weight: Tensor) -> bool:
    """Say whether a convolution with these weights runs through oneDNN."""
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()


def packed(
    convolution: Convolution, weight: Tensor, padding: tuple[int, int], stride: tuple[int, int], input_shape: list[int]
) -> Tensor:
    """Return weights in the order in which oneDNN reads them for inputs of a shape.

    Args:
        convolution: whose dilation and groups the weights have.
        weight: (K, C / groups, kh, kw).
        padding: of the convolution that will run.
        stride: of that convolution.
        input_shape: (N, C, H, W); other shapes run too.
    """
    result: Tensor = torch.ops.mkldnn._reorder_convolution_weight(
        weight.contiguous(memory_format=torch.channels_last),
        list(padding),
        list(stride),
        list(convolution.dilation),
        convolution.groups,
        input_shape,
    )
    return result


def convolved(
    input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, upper: float | None, shortcut: Tensor | None = None
) -> Tensor:
    """Return min(max(convolution(input) + shortcut, 0), upper), without the limits where `upper` is None."""
    mkldnn = torch.ops.mkldnn
    result: Tensor
    if shortcut is None:
        name, limits = ("none", []) if upper is None else ("relu", [])
        if upper is not None and upper < math.inf:
            name, limits = "hardtanh", [0.0, upper]
        result = mkldnn._convolution_pointwise(input, weight, bias, *geometry, name, limits, None)
        return result
    relu = None if upper is None else "relu"
    result = mkldnn._convolution_pointwise.binary(input, shortcut, weight, bias, *geometry, "add", 1.0, relu, [], None)
    return _clamped(result, upper)


def convolved_onto(
    onto: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, upper: float | None
) -> Tensor:
    """Return what `convolved` returns with `onto` as the shortcut, which is overwritten with it."""
    relu = None if upper is None else "relu"
    result: Tensor = torch.ops.mkldnn._convolution_pointwise_.binary(
        onto, input, weight, bias, *geometry, "add", 1.0, relu, [], None
    )
    return _clamped(result, upper)


def _clamped(result: Tensor, upper: float | None) -> Tensor:
    return result if upper is None or upper == math.inf else result.clamp_(max=upper)


def packed_linear(weight: Tensor) -> Tensor:
    """Return the weights (K, C) of a linear layer in the order in which oneDNN reads them.

    Unlike those of a convolution they are arranged for no number of rows: for another number than that, oneDNN may choose a way
    that is six times slower.
    """
    result: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
    return result


def linear(input: Tensor, weight: Tensor, bias: Tensor | None, gelu: str | None = None) -> Tensor:
    """Return (..., K) of (..., C) for arranged weights, or GELU of it: "none" or "tanh", what `F.gelu` calls `approximate`."""
    how: tuple[str, list[float], str] = ("none", [], "") if gelu is None else ("gelu", [], gelu)
    result: Tensor = torch.ops.mkldnn._linear_pointwise(input, weight, bias, *how)
    return result
