"""Depthwise convolutions of float64 on a CPU, where torch runs channel by channel, which takes most of a network's time.

Each tap of the kernel is one multiplication of the whole map instead: the same arithmetic, in another order.
"""

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from pysal.engine.graph.fold import pair
from pysal.engine.running.states import FunctionMode

Pair: TypeAlias = Sequence[int]


def by_taps(input: Tensor, weight: Tensor, groups: int) -> bool:
    """Say whether a convolution of (N, C, H, W) with weights (K, C / groups, kh, kw) is one that is faster tap by tap."""
    slow = input.dtype == torch.float64 and input.device.type == "cpu" and input.ndim == 4
    return slow and 1 < groups == input.shape[1] == len(weight)


def depthwise(input: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
    """Return the depthwise convolution of (N, C, H, W) with weights (C, 1, kh, kw)."""
    padded = F.pad(input, (padding[1], padding[1], padding[0], padding[0]))
    sizes = [(padded.shape[2 + i] - dilation[i] * (weight.shape[2 + i] - 1) - 1) // stride[i] + 1 for i in range(2)]
    total = input.new_zeros(*input.shape[:2], *sizes)
    for place, tap in _taps(padded, weight, sizes, stride, dilation):
        total.addcmul_(place, tap)
    return total if bias is None else total.add_(bias.view(-1, 1, 1))


def depthwise_transposed(
    grad: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair, size: Sequence[int]
) -> Tensor:
    """Return the gradient of such a convolution's input, whose map has a size (H, W), from that of its output."""
    padded = grad.new_zeros(*grad.shape[:2], size[0] + 2 * padding[0], size[1] + 2 * padding[1])
    for place, tap in _taps(padded, weight, grad.shape[2:], stride, dilation):
        place.addcmul_(grad, tap)
    return padded[:, :, padding[0] : padding[0] + size[0], padding[1] : padding[1] + size[1]]


def _taps(
    padded: Tensor, weight: Tensor, sizes: Sequence[int], stride: Pair, dilation: Pair
) -> Iterator[tuple[Tensor, Tensor]]:
    """Return what each tap meets of a padded map, and the tap, (C, 1, 1)."""
    for row in range(weight.shape[2]):
        for column in range(weight.shape[3]):
            top, left = row * dilation[0], column * dilation[1]
            down = slice(top, top + stride[0] * (sizes[0] - 1) + 1, stride[0])
            across = slice(left, left + stride[1] * (sizes[1] - 1) + 1, stride[1])
            yield padded[:, :, down, across], weight[:, :, row, column, None]


class DepthwiseByTaps(FunctionMode):
    """Runs those of a model whose weights get no gradient; nothing else is changed."""

    def replaced(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Return what a function of torch returns."""
        if func is torch.conv2d:
            names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
            given: dict[str, Any] = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
            given |= dict(zip(names, args, strict=False)) | kwargs
            input, weight, bias = given["input"], given["weight"], given["bias"]
            constant = not weight.requires_grad and (bias is None or not bias.requires_grad)
            if constant and not isinstance(given["padding"], str) and by_taps(input, weight, given["groups"]):
                geometry = [pair(given[name]) for name in ("stride", "padding", "dilation")]
                return _Depthwise.apply(input, weight, bias, *geometry)  # type: ignore[no-untyped-call]
        return func(*args, **kwargs)


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Pair) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.geometry = (*geometry, input.shape[2:])
        return depthwise(input, weight, bias, *geometry)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (weight,) = ctx.saved_tensors
        return depthwise_transposed(grads[0], weight, *ctx.geometry), None, None, None, None, None
