"""Inverted residual blocks with smooth activations, with and without squeeze-and-excitation, in two passes over memory.

Of MobileNetV3 (Howard et al. 2019, arXiv:1905.02244), EfficientNet (Tan and Le 2019, arXiv:1905.11946) and their descendants.
csrc/cpu/simd/smooth_residual.cpp keeps rows of the maps in between in a cache. What reaches memory is what the
depthwise convolution gives, and the derivative of the activation before it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pysal.engine.graph.activations import Activation
from pysal.engine.graph.fused_convolution import FusedConvolution
from pysal.engine.graph.inverted_residual import (
    MOST_TAPS,
    PANEL,
    bias_of,
    covers,
    faster_alone,
    is_float,
    large_enough,
    matrix_of,
    panels,
)


@dataclass(frozen=True)
class Entered:
    """What a block computes before its gates. K' are the channels in between and zeros up to a multiple of 16.

    Attributes:
        middle: what the depthwise convolution gives, (N, K', h, w).
        sums: of the second activation over each map, (N, K); empty where nobody asked.
        slopes: the derivative of the first activation, (N, K', H, W); None where there is none.
    """

    middle: Tensor
    sums: Tensor
    slopes: Tensor | None


class SmoothResidual:
    """The weights of a block, arranged for the kernels.

    Args:
        expand: the first convolution; None where the block begins with the depthwise one.
        first: the activation between them.
        depthwise: the second convolution.
        second: the activation after it.
        project: the last convolution, to which the shortcut is added.
    """

    def __init__(
        self,
        expand: FusedConvolution | None,
        first: Activation,
        depthwise: FusedConvolution,
        second: Activation,
        project: FusedConvolution,
    ) -> None:
        middle, last = depthwise.convolution, project.convolution
        self.channels = len(middle.weight)
        self._beyond = -self.channels % PANEL  # zeros after the channels of a pixel in between
        self._first, self._second = first.kind, second.kind
        self._depthwise = F.pad(middle.weight[:, 0].permute(1, 2, 0), (0, self._beyond)).contiguous()
        self._depthwise_bias = self._padded(bias_of(middle.bias, middle.weight))
        self._stride, (left, right, top, bottom) = middle.stride, middle.padding
        self._padding = (top, bottom, left, right)
        self._project, self._project_transposed = panels(matrix_of(project).t()), panels(matrix_of(project))
        self._project_bias = bias_of(last.bias, last.weight)
        self._expand = self._expand_bias = self._expand_transposed = None
        if expand is not None:
            self._expand, self._expand_transposed = panels(matrix_of(expand).t()), panels(matrix_of(expand))
            self._expand_bias = bias_of(expand.convolution.bias, expand.convolution.weight)

    @classmethod
    def suited(cls, expand: FusedConvolution | None, depthwise: FusedConvolution, project: FusedConvolution) -> bool:
        """Say whether two or three convolutions are such a block, and gain by it (docs/inside/inverted_residual.md)."""
        return (
            available()
            and cls.fits(expand, depthwise, project)
            and large_enough(depthwise)
            and not faster_alone(expand or project)
        )

    @staticmethod
    def fits(expand: FusedConvolution | None, depthwise: FusedConvolution, project: FusedConvolution) -> bool:
        """Say whether three convolutions, or two, are such a block, of float32 and channels that fill vectors."""
        if not _is_depthwise(depthwise) or not _is_pointwise(project) or len(project.convolution.weight) < PANEL:
            return False
        if expand is None:
            return not len(depthwise.convolution.weight) % PANEL
        return _is_pointwise(expand) and expand.convolution.weight.shape[1] >= PANEL

    def enter(self, input: Tensor, *, squeezes: bool) -> Entered:
        """Return what the block computes up to the depthwise convolution.

        Args:
            input: (N, C, H, W), float32.
            squeezes: whether the sums are asked for.
        """
        middle, sums, slopes = torch.ops.pysal_blocks.smooth_residual_enter(
            input,
            self._expand,
            self._expand_bias,
            self._depthwise,
            self._depthwise_bias,
            self.channels,
            *self._first,
            *self._second,
            squeezes,
            *self._stride,
            *self._padding,
        )
        return Entered(middle, sums, None if self._expand is None else slopes)

    def leave(self, middle: Tensor, gate: Tensor | None, shortcut: Tensor | None) -> Tensor:
        """Return the block's output.

        Args:
            middle: as `enter` returned it.
            gate: (N, K), which the second activation is multiplied by.
            shortcut: like the output.
        """
        result: Tensor = torch.ops.pysal_blocks.smooth_residual_leave(
            middle, self._padded(gate), self._project, self._project_bias, shortcut, self.channels, *self._second
        )
        return result

    def gate_gradient(self, grad: Tensor, middle: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of the gates (T N, K) and of their product (T N, K', h, w) from the output's (T N, L, h, w)."""
        result: tuple[Tensor, Tensor] = torch.ops.pysal_blocks.smooth_residual_gate_gradient(
            grad, middle, self._project_transposed, self.channels, *self._second
        )
        return result

    def input_gradient(
        self,
        grad: Tensor,
        entered: Entered,
        input_shape: Sequence[int],
        *,
        passed: Tensor | None = None,
        gate: Tensor | None = None,
        added: Tensor | None = None,
        onto: Tensor | None = None,
    ) -> Tensor:
        """Return the gradient of the block's input from that of its output.

        Args:
            grad: (T N, L, h, w), float32; row t N + n is one of image n.
            entered: as `enter` returned it.
            input_shape: (N, C, H, W).
            passed: what `gate_gradient` returned beside; None where there are no gates.
            gate: (N, K), see `leave`.
            added: (T N, K), to the gradient of the second activation.
            onto: (T N, C, H, W), added to the result.
        """
        top, _, left, _ = self._padding
        result: Tensor = torch.ops.pysal_blocks.smooth_residual_backward(
            grad,
            passed,
            entered.middle,
            entered.slopes,
            self._padded(gate),
            self._padded(added),
            self._project_transposed,
            self._depthwise,
            self._expand_transposed,
            onto,
            self.channels,
            *self._second,
            *input_shape[1:],
            *self._stride,
            top,
            left,
        )
        return result

    def _padded(self, by_channel: Tensor | None) -> Tensor | None:
        if by_channel is None:
            return None
        return (F.pad(by_channel, (0, self._beyond)) if self._beyond else by_channel).contiguous()


def available() -> bool:
    """Say whether the kernels are compiled."""
    return hasattr(torch.ops.pysal_blocks, "smooth_residual_enter")


def _is_pointwise(module: FusedConvolution) -> bool:
    convolution = module.convolution
    plain = convolution.groups == 1 and convolution.stride == (1, 1) and not any(convolution.padding)
    return plain and convolution.weight.shape[2:] == (1, 1) and module.upper is None and is_float(module)


def _is_depthwise(module: FusedConvolution) -> bool:
    convolution = module.convolution
    channels, inputs, height, width = convolution.weight.shape
    if not channels == convolution.groups or inputs != 1 or channels < PANEL or convolution.dilation != (1, 1):
        return False
    return covers(convolution) and height * width <= MOST_TAPS and module.upper is None and is_float(module)
