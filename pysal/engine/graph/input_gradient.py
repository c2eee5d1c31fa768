"""The gradient of a convolution's input from that of its output: a class for each way to compute it, and which one is taken."""

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from pysal.engine.graph.depthwise import by_taps, depthwise_transposed
from pysal.engine.graph.fold import Convolution
from pysal.engine.graph.fused_linear import Product
from pysal.engine.graph.matrix_unit import GATED_CHANNELS, MatrixConvolution
from pysal.engine.graph.onednn import PACKED_FOR, convolved, convolved_onto, packed, runs_on_onednn
from pysal.engine.graph.winograd import WinogradConvolution
from pysal.engine.model.relu_rules import ReluRule

# Input channels times phases up to which the input gradient is arranged by phases.
FEW_CHANNELS = 32

Padding = tuple[int, int, int, int]  # zeros left, right, above and below


class InputGradient(Protocol):
    """One way to compute the gradient of a convolution's input."""

    def run(self, grad: Tensor, size: Sequence[int], onto: Tensor | None) -> Tensor:
        """Return the gradient of the input.

        Args:
            grad: (N, K, h, w), gradient of the output.
            size: (H, W) of the input.
            onto: (N, C, H, W): overwritten by its sum with the gradient, which is returned.
        """
        ...


class FlippedWithGates:
    """A convolution of stride 1 with the flipped kernel by what can also apply a ReLU's gates to the result.

    Args:
        unit: that convolution.
        padding: of the gradient of the output.
        channels: of the input.
    """

    def __init__(self, unit: MatrixConvolution | WinogradConvolution, padding: Padding, channels: int) -> None:
        self._unit, self._padding = unit, padding
        self.takes_gates = channels % GATED_CHANNELS == 0

    def run(
        self,
        grad: Tensor,
        size: Sequence[int],
        onto: Tensor | None,
        gates: Tensor | None = None,
        rule: ReluRule | None = None,
    ) -> Tensor:
        """See `InputGradient` and, for gates and rule, `FusedConvolution.input_gradient`."""
        return self._unit.run(grad, padding=self._padding, shortcut=onto, over=True, mask=gates, rule=rule)


class OnMatrixUnitByPhases:
    """A convolution of stride 1 on the matrix unit for each phase of a larger stride.

    A phase are the rows y and columns x of the input with the same remainders y % stride and x % stride: they see the same part
    of the kernel.

    Args:
        phases: row and column of each phase that sees any of the kernel, its convolution, and zeros around the gradient.
        stride: of the convolution.
        channels: of the input.
    """

    def __init__(
        self, phases: Sequence[tuple[int, int, MatrixConvolution, Padding]], stride: tuple[int, int], channels: int
    ) -> None:
        self._phases, self._stride, self._channels = phases, stride, channels

    def run(self, grad: Tensor, size: Sequence[int], onto: Tensor | None) -> Tensor:
        """See `InputGradient`."""
        rows, columns = self._stride
        result = onto
        if result is None:
            shape = (len(grad), self._channels, *size)
            full = len(self._phases) == rows * columns
            result = torch.empty(shape, dtype=grad.dtype, memory_format=torch.channels_last, device="cpu")
            result = result if full else result.zero_()
        for a, b, unit, padding in self._phases:
            place, part = result[:, :, a::rows, b::columns], unit.run(grad, padding=padding)
            place.copy_(part) if onto is None else place.add_(part)
        return result


class Flipped:
    """A convolution of stride 1 with the flipped kernel, by oneDNN.

    Args:
        convolution: of stride 1.
        weight: of the convolution, in the gradient's dtype.
        padding: of the gradient of the output, down and across.
        grad_size: (h, w) of the output, for which the weights are arranged.
    """

    def __init__(self, convolution: Convolution, weight: Tensor, padding: tuple[int, int], grad_size: Sequence[int]) -> None:
        flipped = weight.flip(2, 3).unflatten(0, (convolution.groups, -1)).transpose(1, 2).flatten(0, 1)
        self._weight = packed(convolution, flipped, padding, (1, 1), [PACKED_FOR, weight.shape[0], *grad_size])
        self._geometry = (padding, (1, 1), convolution.dilation, convolution.groups)

    def run(self, grad: Tensor, size: Sequence[int], onto: Tensor | None) -> Tensor:
        """See `InputGradient`."""
        grad = grad.contiguous(memory_format=torch.channels_last)
        if onto is not None and onto.is_contiguous(memory_format=torch.channels_last) and onto.dtype == grad.dtype:
            return convolved_onto(onto, grad, self._weight, None, self._geometry, None)
        result = convolved(grad, self._weight, None, self._geometry, None)
        return result if onto is None else onto.add_(result)


class ByPhases:
    """One convolution of stride 1 whose channels are the phases of all input channels, which are few.

    Args:
        phases: how the phases make one convolution, and how its result makes the gradient.
        convolve: runs that convolution on a channels_last gradient.
    """

    def __init__(self, phases: "Phases", convolve: Callable[[Tensor], Tensor]) -> None:
        self._phases, self._convolve = phases, convolve

    def run(self, grad: Tensor, size: Sequence[int], onto: Tensor | None) -> Tensor:
        """See `InputGradient`."""
        result = self._convolve(grad.contiguous(memory_format=torch.channels_last))
        result = self._phases.join(result, size[0], size[1])
        return result if onto is None else onto.add_(result)


class Patches:
    """A multiplication for each window of a convolution whose windows lie side by side, as where images are cut into patches.

    Args:
        weight: of the convolution (K, C, kh, kw), in the gradient's dtype.
    """

    def __init__(self, weight: Tensor) -> None:
        _, self._channels, *self._kernel = weight.shape
        # a window's numbers in the order of a channels_last map
        self._product = Product(weight.permute(2, 3, 1, 0).flatten(0, 2), None)

    def run(self, grad: Tensor, size: Sequence[int], onto: Tensor | None) -> Tensor:
        """See `InputGradient`."""
        (rows, columns), (high, wide) = grad.shape[2:], self._kernel
        windows = self._product(grad.permute(0, 2, 3, 1)).view(len(grad), rows, columns, high, wide, self._channels)
        joined = windows.transpose(2, 3).reshape(len(grad), rows * high, columns * wide, self._channels)
        # what is left over at the right and below is in no window
        beyond = (0, 0, 0, size[1] - columns * wide, 0, size[0] - rows * high)
        result = (F.pad(joined, beyond) if any(beyond) else joined).permute(0, 3, 1, 2)
        return result if onto is None else onto.add_(result)


class Transposed:
    """torch's transposed convolution, which takes every geometry.

    Args:
        convolution: with equal padding on opposite sides, or with all of its padding outside of the convolution.
        weight: of the convolution, in the gradient's dtype.
        order: of maps and weights.
    """

    def __init__(self, convolution: Convolution, weight: Tensor, order: torch.memory_format = torch.channels_last) -> None:
        self._convolution = convolution
        self._weight = weight.contiguous(memory_format=order)

    def run(self, grad: Tensor, size: Sequence[int], onto: Tensor | None) -> Tensor:
        """See `InputGradient`."""
        convolution = self._convolution
        height, width = size
        stride, padding, reach = convolution.stride, convolution.symmetric or (0, 0), reach_of(convolution)
        left, right, top, bottom = (0, 0, 0, 0) if convolution.symmetric is not None else convolution.padding
        padded = (height + top + bottom, width + left + right)
        # what the last window of the convolution did not reach
        beyond = [padded[i] + 2 * padding[i] - (grad.shape[2 + i] - 1) * stride[i] - reach[i] - 1 for i in range(2)]
        if by_taps(grad, self._weight, convolution.groups):
            result = depthwise_transposed(grad, self._weight, stride, padding, convolution.dilation, padded)
        else:
            rest = (beyond, convolution.groups, convolution.dilation)
            result = F.conv_transpose2d(grad, self._weight, None, stride, padding, *rest)
        if convolution.symmetric is None:
            result = result[:, :, top : top + height, left : left + width]
        return result if onto is None else onto.add_(result)


def phases_on_gpu(
    convolution: Convolution, evened: Convolution, input_shape: tuple[int, ...], dtype: torch.dtype
) -> ByPhases | None:
    """Return the way by phases with torch's own convolution, None where that does not take the convolution.

    Args:
        convolution: see `input_gradient`.
        evened: see there.
        input_shape: see there.
        dtype: see there.
    """
    few = input_shape[0] * evened.stride[0] * evened.stride[1] <= FEW_CHANNELS
    if evened.symmetric is None or evened.stride == (1, 1) or evened.groups != 1 or evened.dilation != (1, 1) or not few:
        return None
    padding, reach = evened.symmetric, reach_of(evened)
    grad_size = [(input_shape[1 + i] + 2 * padding[i] - reach[i] - 1) // evened.stride[i] + 1 for i in range(2)]
    left, _, top, _ = convolution.padding
    phases = Phases(
        convolution.weight.to(dtype), convolution.stride, (top, left), input_shape[1:], (grad_size[0], grad_size[1])
    )
    weight = phases.weight.contiguous(memory_format=torch.channels_last)
    return ByPhases(phases, lambda grad: F.conv2d(grad, weight, None, 1, phases.padding))


def input_gradient(
    convolution: Convolution,
    evened: Convolution,
    input_shape: tuple[int, ...],
    dtype: torch.dtype,
    order: torch.memory_format = torch.channels_last,
) -> InputGradient:
    """Return the fastest way that takes the convolution.

    Args:
        convolution: whose input's gradient is wanted.
        evened: the same with equal padding on opposite sides, where that can be had.
        input_shape: (C, H, W) of its input, for which weights are arranged.
        dtype: of the gradient.
        order: of maps and weights, on a GPU.
    """
    if (on_unit := _on_matrix_unit(convolution, input_shape, dtype)) is not None:
        return on_unit
    if dtype == torch.float32 and (by_winograd := _by_winograd(convolution, input_shape[1:])) is not None:
        return by_winograd
    weight = evened.weight.to(dtype)
    if not runs_on_onednn(evened.weight) or evened.symmetric is None:
        return Transposed(evened, weight, order)
    apart = evened.stride == tuple(weight.shape[2:]) != (1, 1) and evened.dilation == (1, 1)
    if apart and evened.groups == 1 and not any(evened.padding):
        return Patches(weight)
    padding, reach = evened.symmetric, reach_of(evened)
    grad_size = [(input_shape[1 + i] + 2 * padding[i] - reach[i] - 1) // evened.stride[i] + 1 for i in range(2)]
    if evened.stride == (1, 1):
        around = (reach[0] - padding[0], reach[1] - padding[1])
        return Flipped(evened, weight, around, grad_size) if min(around) >= 0 else Transposed(evened, weight)
    few = input_shape[0] * evened.stride[0] * evened.stride[1] <= FEW_CHANNELS
    if evened.groups == 1 and evened.dilation == (1, 1) and few:
        return _by_phases(convolution, input_shape, (grad_size[0], grad_size[1]), dtype)
    return Transposed(evened, weight)


def _on_matrix_unit(
    convolution: Convolution, input_shape: tuple[int, ...], dtype: torch.dtype
) -> FlippedWithGates | OnMatrixUnitByPhases | None:
    """Return the way on the matrix unit, None where that does not gain or cannot take the convolution."""
    weight, (rows, columns) = convolution.weight, convolution.stride
    left, right, top, bottom = convolution.padding
    channels, *size = input_shape
    if not MatrixConvolution.suited(convolution) or dtype != torch.float32:
        return None
    if convolution.dilation != (1, 1) and convolution.stride != (1, 1):
        return None
    reach = reach_of(convolution)
    height = (size[0] + top + bottom - reach[0] - 1) // rows + 1
    width = (size[1] + left + right - reach[1] - 1) // columns + 1
    phases: list[tuple[int, int, MatrixConvolution, Padding]] = []
    for a, (first_y, taps_y, shift_y) in enumerate(_phases_of_axis(weight.shape[2], rows, top)):
        for b, (first_x, taps_x, shift_x) in enumerate(_phases_of_axis(weight.shape[3], columns, left)):
            reach_y, reach_x = convolution.dilation[0] * (taps_y - 1), convolution.dilation[1] * (taps_x - 1)
            above, before = reach_y - shift_y, reach_x - shift_x
            below = len(range(a, size[0], rows)) - height - above + reach_y
            after = len(range(b, size[1], columns)) - width - before + reach_x
            if taps_y and taps_x:
                part = weight[:, :, first_y::rows, first_x::columns].flip(2, 3).transpose(0, 1).contiguous()
                unit = MatrixConvolution(part, None, convolution.dilation)
                phases.append((a, b, unit, (before, after, above, below)))
    if not phases or any(min(padding) < 0 for *_, padding in phases):
        return None
    if (rows, columns) == (1, 1):
        ((_, _, unit, padding),) = phases
        return FlippedWithGates(unit, padding, channels)
    return OnMatrixUnitByPhases(phases, (rows, columns), channels)


def _by_winograd(convolution: Convolution, size: tuple[int, ...]) -> FlippedWithGates | None:
    """Return Winograd's way, None where that does not gain or cannot take the convolution."""
    left, right, top, bottom = convolution.padding
    around = (2 - left, 2 - right, 2 - top, 2 - bottom)
    flipped = convolution.weight.flip(2, 3).transpose(0, 1)
    turned = Convolution(flipped, None, convolution.stride, around, convolution.dilation, convolution.groups)
    if not WinogradConvolution.suited(turned, (size[0] + top + bottom - 2, size[1] + left + right - 2)):
        return None
    return FlippedWithGates(WinogradConvolution(flipped, None), around, flipped.shape[0])


def _by_phases(
    convolution: Convolution, input_shape: tuple[int, ...], grad_size: tuple[int, int], dtype: torch.dtype
) -> ByPhases:
    """Return a convolution of few channels and a larger stride, such as the first of a network, by phases."""
    left, _, top, _ = convolution.padding  # as it was: taps of zero would widen what the phases see
    phases = Phases(convolution.weight.to(dtype), convolution.stride, (top, left), input_shape[1:], grad_size)
    rows, columns = phases.padding
    sides = (columns, columns, rows, rows)
    joint = Convolution(phases.weight, None, (1, 1), sides, (1, 1), 1)
    if MatrixConvolution.suited(joint, least_outputs=1):
        unit = MatrixConvolution(joint.weight, None)
        return ByPhases(phases, lambda grad: unit.run(grad, padding=sides))
    shape = [PACKED_FOR, convolution.weight.shape[0], *grad_size]
    weight = packed(convolution, joint.weight, phases.padding, (1, 1), shape)
    geometry = (phases.padding, (1, 1), (1, 1), 1)
    return ByPhases(phases, lambda grad: convolved(grad, weight, None, geometry, None))


class Phases:
    """The input gradient of a convolution as a convolution of stride 1 with a channel per input channel and phase.

    For an axis with stride s, padding p and a kernel w of k taps, row y = s i + a of the gradient is the sum over t of
    w[c + s t] g[i + o - t], c = (a + p) % s and o = (a + p - c) / s: what depends on a alone is its phase.

    Args:
        weight: (K, C, kh, kw) of the convolution.
        stride: of the convolution.
        padding: of the convolution.
        size: (H, W) of its input.
        grad_size: (h, w) of its output.
    """

    def __init__(
        self,
        weight: Tensor,
        stride: tuple[int, int],
        padding: tuple[int, int],
        size: tuple[int, ...],
        grad_size: tuple[int, int],
    ) -> None:
        axes = [_phases_of_axis(weight.shape[2 + i], stride[i], padding[i]) for i in range(2)]
        # gradient rows i + low ... i + high are seen by some phase
        low = [min(shift - taps + 1 for _, taps, shift in axis) for axis in axes]
        high = [max(shift for _, _, shift in axis) for axis in axes]
        spans = [high[i] - low[i] + 1 for i in range(2)]
        channels, (rows, columns) = weight.shape[1], stride
        joint = weight.new_zeros(channels, rows, columns, weight.shape[0], *spans)
        for a, (first_y, taps_y, shift_y) in enumerate(axes[0]):
            for b, (first_x, taps_x, shift_x) in enumerate(axes[1]):
                part = weight[:, :, first_y::rows, first_x::columns].flip(2, 3).transpose(0, 1)
                top, left = shift_y - taps_y + 1 - low[0], shift_x - taps_x + 1 - low[1]
                joint[:, a, b, :, top : top + taps_y, left : left + taps_x] = part
        self.weight, self.stride = joint.flatten(0, 2), stride
        self._counts = [math.ceil(size[i] / stride[i]) for i in range(2)]
        after = [self._counts[i] + high[i] - grad_size[i] for i in range(2)]
        self.padding = (max(-low[0], after[0], 0), max(-low[1], after[1], 0))
        self._first = [self.padding[i] + low[i] for i in range(2)]

    def join(self, result: Tensor, height: int, width: int) -> Tensor:
        """Return (N, C, height, width) from the convolution's (N, C * phases, h, w)."""
        (rows, columns), (top, left) = self._counts, self._first
        parts = result[:, :, top : top + rows, left : left + columns].unflatten(1, (-1, *self.stride))
        size = (rows * self.stride[0], columns * self.stride[1])
        joined: Tensor = parts.permute(0, 1, 4, 2, 5, 3).reshape(len(result), -1, *size)
        return joined[:, :, :height, :width]


def _phases_of_axis(taps: int, stride: int, padding: int) -> list[tuple[int, int, int]]:
    """Return for each phase its first tap, its number of taps and the gradient's row its first tap meets at i = 0."""
    found = []
    for phase in range(stride):
        first = (phase + padding) % stride
        found.append((first, len(range(first, taps, stride)), (phase + padding - first) // stride))
    return found


def reach_of(convolution: Convolution) -> tuple[int, int]:
    """Return the rows and columns between the first and the last input a window sees."""
    height, width = convolution.weight.shape[2:]
    return convolution.dilation[0] * (height - 1), convolution.dilation[1] * (width - 1)
