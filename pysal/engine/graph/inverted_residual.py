"""Inverted residual blocks in one pass over memory: 1 x 1 convolution, ReLU, depthwise convolution, ReLU, 1 x 1 convolution.

Of MobileNetV2 (Sandler et al. 2018, arXiv:1801.04381) and its descendants. The maps in between have several times the channels
of the block's input and output; csrc/cpu/simd/inverted_residual.cpp keeps a few rows of them in a cache and writes down their
gates only.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from pysal.engine.graph.fold import Convolution
from pysal.engine.graph.fused_convolution import FusedConvolution
from pysal.engine.graph.matrix_unit import work
from pysal.engine.model.relu_rules import ReluRule
from pysal.ops.guided_relu import RULES

# Pixels of the block's input from which it gains: on smaller maps, images one by one read the weights too often.
LEAST_PIXELS = 9
# Multiplications per number that its first 1 x 1 convolution moves, from which the matrix unit is faster, one by one.
MOST_WORK = 100
PANEL = 16  # columns of a matrix that lie together
MOST_TAPS = 128  # of a depthwise kernel


class InvertedResidual:
    """The weights of a block, arranged for the kernel.

    Args:
        expand: the first convolution; None where the block begins with the depthwise one.
        depthwise: the second.
        project: the last, to which the shortcut is added.
    """

    def __init__(self, expand: FusedConvolution | None, depthwise: FusedConvolution, project: FusedConvolution) -> None:
        assert depthwise.upper is not None
        middle, last = depthwise.convolution, project.convolution
        self._uppers = (float("inf") if expand is None or expand.upper is None else expand.upper, depthwise.upper)
        self._depthwise = middle.weight[:, 0].permute(1, 2, 0).contiguous()
        self._stride, (left, right, top, bottom) = middle.stride, middle.padding
        self._padding = (top, bottom, left, right)
        self._project, self._project_transposed = panels(matrix_of(project).t()), panels(matrix_of(project))
        self._biases = (bias_of(middle.bias, middle.weight), bias_of(last.bias, last.weight))
        self._expand = self._expand_bias = self._expand_transposed = None
        if expand is not None:
            self._expand, self._expand_transposed = panels(matrix_of(expand).t()), panels(matrix_of(expand))
            self._expand_bias = bias_of(expand.convolution.bias, expand.convolution.weight)

    @classmethod
    def suited(cls, expand: FusedConvolution | None, depthwise: FusedConvolution, project: FusedConvolution) -> bool:
        """Say whether two or three convolutions are such a block, and gain by it (docs/inside/inverted_residual.md)."""
        if not available() or not cls.fits(expand, depthwise, project):
            return False
        return large_enough(depthwise) and not faster_alone(expand or project)

    @staticmethod
    def fits(expand: FusedConvolution | None, depthwise: FusedConvolution, project: FusedConvolution) -> bool:
        """Say whether three convolutions, or two, are such a block, of float32 and channels that fill vectors."""
        if not _is_depthwise(depthwise) or depthwise.upper is None:
            return False
        if not _is_pointwise(project) or project.upper is not None:
            return False
        return expand is None or (expand.upper is not None and _is_pointwise(expand))

    def run(self, input: Tensor, shortcut: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """Return the block's output and the gates of its ReLUs, (N H W C / 8,) and (N h w C / 8,) uint8 in channels_last order.

        Args:
            input: (N, C, H, W), float32.
            shortcut: like the output.
        """
        depthwise_bias, project_bias = self._biases
        output, expand_gates, depthwise_gates = torch.ops.pysal_blocks.inverted_residual(
            input,
            self._expand,
            self._expand_bias,
            self._depthwise,
            depthwise_bias,
            self._project,
            project_bias,
            shortcut,
            *self._uppers,
            *self._stride,
            *self._padding,
        )
        return output, [depthwise_gates] if self._expand is None else [expand_gates, depthwise_gates]

    def input_gradient(
        self,
        grad: Tensor,
        gates: Sequence[Tensor],
        input_shape: Sequence[int],
        rule: ReluRule,
        added: Tensor | None = None,
    ) -> Tensor:
        """Return the gradient of the block's input from that of its output.

        Args:
            grad: (T N, K, h, w), float32; row t N + n is one of image n.
            gates: of the block's ReLUs, as `run` returned them.
            input_shape: (N, C, H, W).
            rule: of both ReLUs.
            added: (T N, C, H, W), added to the result.
        """
        top, _, left, _ = self._padding
        result: Tensor = torch.ops.pysal_blocks.inverted_residual_backward(
            grad,
            None if self._expand is None else gates[0],
            gates[-1],
            self._expand_transposed,
            self._depthwise,
            self._project_transposed,
            added,
            *input_shape,
            *self._stride,
            top,
            left,
            RULES[rule],
        )
        return result


@dataclass(frozen=True)
class Block:
    """A block of a graph.

    Attributes:
        kernel: its weights.
        inputs: the block's input, and the shortcut if there is one.
        members: its two or three convolutions, in order.
    """

    kernel: InvertedResidual
    inputs: Sequence[fx.Node]
    members: Sequence[fx.Node]


def large_enough(depthwise: FusedConvolution) -> bool:
    """Say whether a depthwise convolution's input has as many pixels as a block needs to gain."""
    height, width = depthwise.input_shape[1:]
    return height * width >= LEAST_PIXELS


def faster_alone(first: FusedConvolution) -> bool:
    """Say whether a block's first 1 x 1 convolution is one that the matrix unit makes faster, node by node."""
    return first.matrix is not None and work(first.convolution.weight) >= MOST_WORK


def available() -> bool:
    """Say whether the kernel is compiled."""
    return hasattr(torch.ops.pysal_blocks, "inverted_residual")


def panels(matrix: Tensor) -> Tensor:
    """Return a matrix in panels of 16 columns, of which the last holds the last 16, also where the one before has some of them.

    Args:
        matrix: (depth, columns), at least 16 columns.

    Returns:
        (panels, depth, 16).
    """
    columns = matrix.shape[1]
    starts = [min(start, columns - PANEL) for start in range(0, columns, PANEL)]
    return torch.stack([matrix[:, start : start + PANEL] for start in starts]).contiguous()


def matrix_of(module: FusedConvolution) -> Tensor:
    """Return the weights of a 1 x 1 convolution, (K, C)."""
    return module.convolution.weight[:, :, 0, 0]


def bias_of(bias: Tensor | None, weight: Tensor) -> Tensor:
    """Return the bias of weights, zeros where there is none."""
    return weight.new_zeros(len(weight)) if bias is None else bias.contiguous()


def is_float(module: FusedConvolution) -> bool:
    """Say whether a convolution and its gradient are of float32 on a CPU."""
    weight = module.convolution.weight
    return weight.dtype == module.backward_dtype == torch.float32 and weight.device.type == "cpu"


def _is_pointwise(module: FusedConvolution) -> bool:
    convolution = module.convolution
    outputs, inputs, *kernel = convolution.weight.shape
    plain = convolution.groups == 1 and convolution.stride == (1, 1) and not any(convolution.padding)
    return plain and kernel == [1, 1] and is_float(module) and min(outputs, inputs) >= PANEL and not outputs % 8 + inputs % 8


def _is_depthwise(module: FusedConvolution) -> bool:
    convolution = module.convolution
    channels, inputs, height, width = convolution.weight.shape
    if not channels == convolution.groups or inputs != 1 or channels % PANEL or convolution.dilation != (1, 1):
        return False
    return covers(convolution) and height * width <= MOST_TAPS and is_float(module)


def covers(convolution: Convolution) -> bool:
    """Say whether strides leave out nothing between windows, and every window sees some of the map's side it lies on."""
    height, width = convolution.weight.shape[2:]
    left, right, top, bottom = convolution.padding
    steps = convolution.stride[0] <= height and convolution.stride[1] <= width
    return steps and max(left, right) < width and max(top, bottom) < height and min(convolution.padding) >= 0
