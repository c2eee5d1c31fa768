"""A convolution, a shortcut added to it and the ReLU that follows as one module, which knows the gradient of its input."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pysal import _library, ops
from pysal.engine.graph import onednn
from pysal.engine.graph.depthwise import by_taps, depthwise
from pysal.engine.graph.fold import Convolution
from pysal.engine.graph.input_gradient import FlippedWithGates, input_gradient, phases_on_gpu
from pysal.engine.graph.matrix_unit import GATED_CHANNELS, MatrixConvolution
from pysal.engine.graph.winograd import WinogradConvolution
from pysal.engine.model.relu_rules import ReluRule

# Taps of zero that replace padding on one side may make a kernel this many times larger: 3 x 3 becomes 4 x 4.
MOST_TAPS = 2


@dataclass(frozen=True)
class Way:
    """How a GPU runs the convolutions of a graph; which is fastest is measured.

    Attributes:
        name: in words.
        channels_last: the order of maps and weights; else contiguous, for which cuDNN has other kernels.
        cudnn: whether cuDNN's convolutions with ReLU are used where a ReLU without an upper bound follows.
        phases: whether the gradient of a convolution of few channels and a larger stride, a network's first, is by phases.
    """

    name: str
    channels_last: bool = True
    cudnn: bool = False
    phases: bool = False


# The first is what is taken where nothing was measured.
WAYS = (
    Way("one kernel after each convolution, channels_last"),
    Way("one kernel after each convolution, contiguous", channels_last=False),
    Way("one kernel after each convolution, channels_last, the first gradient by phases", phases=True),
    Way("cuDNN's convolutions with ReLU, channels_last", cudnn=True),
)


class FusedConvolution(nn.Module):
    """min(max(convolution(input) + shortcut, 0), upper), each part but the convolution optional.

    Args:
        convolution: the folded convolution.
        upper: where the ReLU saturates: infinity, 6 for ReLU6; None without ReLU.
        input_shape: (C, H, W) of the input, for which the weights are arranged.
        backward_dtype: dtype of the input gradient's convolution, unless that is a grouped one.
        compared: whether something that follows compares values, as max pooling does: then windows that see the same must
            give the same, or ties of even areas would be broken by rounding, and gradients sent elsewhere.
    """

    def __init__(
        self,
        convolution: Convolution,
        upper: float | None,
        input_shape: tuple[int, ...],
        backward_dtype: torch.dtype,
        *,
        compared: bool = False,
    ) -> None:
        super().__init__()
        self.convolution, self.upper, self.input_shape = convolution, upper, input_shape
        # oneDNN has no fast grouped convolution in bf16
        self.backward_dtype = backward_dtype if convolution.groups == 1 else convolution.weight.dtype
        self.onednn = onednn.runs_on_onednn(convolution.weight)
        self.matrix: MatrixConvolution | None = None
        if MatrixConvolution.suited(convolution):
            self.matrix = MatrixConvolution(convolution.weight, convolution.bias, convolution.dilation)
        self.winograd: WinogradConvolution | None = None
        if self.matrix is None and not compared and WinogradConvolution.suited(convolution, input_shape[1:]):
            self.winograd = WinogradConvolution(convolution.weight, convolution.bias)
        self._evened = even = _evened(convolution)
        self._geometry = (even.symmetric or (0, 0), even.stride, even.dilation, even.groups)
        self._weight = even.weight
        if self._weight.is_cuda:  # the layout of the images: cuDNN would make it so in every pass
            self._weight = self._weight.contiguous(memory_format=torch.channels_last)
        self.way = WAYS[0]
        if self.onednn and self._with_gates is None:
            channels, height, width = input_shape
            if even.symmetric is None:
                left, right, top, bottom = even.padding
                height, width = height + top + bottom, width + left + right
            shape = [onednn.PACKED_FOR, channels, height, width]
            self._weight = onednn.packed(even, self._weight, *self._geometry[:2], shape)
        self.gradient = input_gradient(convolution, even, input_shape, self.backward_dtype)
        # what follows the convolution adds in float32, also to 16 bits
        self._bias = even.bias if even.bias is None or self.onednn else even.bias.to(_wide(even.bias.dtype))

    def arrange(self, way: Way) -> None:
        """Run another way from now on, on a GPU."""
        order = torch.channels_last if way.channels_last else torch.contiguous_format
        self.way, self._weight = way, self._weight.contiguous(memory_format=order)
        given = (self.convolution, self._evened, self.input_shape, self.backward_dtype)
        self.gradient = (phases_on_gpu(*given) if way.phases else None) or input_gradient(*given, order)

    @property
    def has_phases(self) -> bool:
        """Whether its gradient can be arranged by phases."""
        return phases_on_gpu(self.convolution, self._evened, self.input_shape, self.backward_dtype) is not None

    @property
    def _with_gates(self) -> MatrixConvolution | WinogradConvolution | None:
        """What writes the gates of its ReLU in the same pass."""
        return self.winograd if self.matrix is None else self.matrix

    @property
    def masks_gradient(self) -> bool:
        """Whether `input_gradient` can let it through the gates of the convolution's input."""
        if isinstance(self.gradient, FlippedWithGates):
            return self.gradient.takes_gates
        return has_epilogue(self._weight)

    def run(self, input: Tensor, shortcut: Tensor | None) -> Tensor:
        """Return the result; nothing is kept for a backward pass."""
        return self._run(input, shortcut, self.upper)

    def run_with_gates(self, input: Tensor, shortcut: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the result and the gates of its ReLU, as `ops.guided_relu_gates` does."""
        assert self.upper is not None
        unit = self._with_gates
        if unit is None and has_epilogue(self._weight):
            even = self._evened
            if even.symmetric is None:
                input = F.pad(input, even.padding)
            given = (input, self._weight, self._bias, self._geometry, self.upper, shortcut)
            return _with_epilogue(*given, keep=True, way=self.way)
        if unit is None or len(self.convolution.weight) % GATED_CHANNELS:
            output = self._run(input, shortcut, self.upper)
            return output, ops.guided_relu_gates(output, self.upper)
        shape = unit.shape(input, self.convolution.stride, self.convolution.padding)
        gates = torch.empty(math.prod(shape) // 8, dtype=torch.uint8, device="cpu")
        return self._run(input, shortcut, self.upper, gates), gates

    def _run(self, input: Tensor, shortcut: Tensor | None, upper: float | None, gates: Tensor | None = None) -> Tensor:
        unit = self._with_gates
        if unit is not None:
            between = (-math.inf, math.inf) if upper is None else (0.0, upper)
            at = (self.convolution.stride, self.convolution.padding)
            return unit.run(input, *at, shortcut=shortcut, limits=between, gates=gates)
        even = self._evened
        if even.symmetric is None:
            input = F.pad(input, even.padding)
        if not self.onednn:
            return convolved_by_torch(input, self._weight, self._bias, self._geometry, upper, shortcut, self.way)
        input = input.contiguous(memory_format=torch.channels_last)
        if shortcut is not None:
            shortcut = shortcut.contiguous(memory_format=torch.channels_last)
        return onednn.convolved(input, self._weight, even.bias, self._geometry, upper, shortcut)

    def parts(self, input: Tensor, shortcut: Tensor | None) -> dict[str, Tensor]:
        """Return what `run` fuses, one tensor for each: "convolution", "sum" and "output"."""
        found = self._run(input, None, None)
        total = found if shortcut is None else found + shortcut
        return {"convolution": found, "sum": total, "output": total if self.upper is None else total.clamp(0, self.upper)}

    def input_gradient(
        self,
        grad: Tensor,
        input_shape: Sequence[int],
        onto: Tensor | None = None,
        gates: Tensor | None = None,
        rule: ReluRule | None = None,
        *,
        images: int | None = None,
        channels_last: bool = True,
    ) -> Tensor:
        """Return the gradient of the convolution's input from that of its output, in `backward_dtype`.

        Args:
            grad: (N, K, h, w), gradient of the output.
            input_shape: (N, C, H, W).
            onto: (N, C, H, W): overwritten by its sum with the gradient, which is returned.
            gates: those of the ReLU whose output the input is, of N images or of fewer that follow each other again and again;
                only where `masks_gradient`.
            rule: what they let through of the gradient, the sum with `onto` if there is one; None is all.
            images: whose gates they are.
            channels_last: whether that is the gates' order.
        """
        grad, size = grad.to(self.backward_dtype), input_shape[2:]
        if rule is None or gates is None:
            return self.gradient.run(grad, size, onto)
        if isinstance(self.gradient, FlippedWithGates):
            return self.gradient.run(grad, size, onto, gates, rule)
        result = self.gradient.run(grad, size, None)
        onto = None if onto is None else onto.to(result.dtype)
        images = len(result) if images is None else images
        ops.epilogue_backward_(
            result, gates, "relu", added=onto, rule=rule, images=images, channels_last=channels_last and result.ndim == 4
        )
        return result

    def forward(self, input: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """Return the result, which autograd does not follow."""
        return self.run(input, shortcut)


def convolved_by_torch(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: onednn.Geometry,
    upper: float | None,
    shortcut: Tensor | None,
    way: Way = WAYS[0],
) -> Tensor:
    """Return what `onednn.convolved` returns, for every dtype and device.

    Args:
        input: see there.
        weight: see there.
        bias: in the dtype of the weights, or float32 where that has 16 bits.
        geometry: see there.
        upper: see there.
        shortcut: see there; it is left as it is.
        way: of a GPU.
    """
    if has_epilogue(weight):
        return _with_epilogue(input, weight, bias, geometry, upper, shortcut, keep=False, way=way)[0]
    padding, stride, dilation, groups = geometry
    bias = None if bias is None else bias.to(weight.dtype)
    if by_taps(input, weight, groups):
        output = depthwise(input, weight, bias, stride, padding, dilation)
    else:
        output = F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    output = output if shortcut is None else output.add_(shortcut)
    return output if upper is None else output.clamp_(0, upper)


def has_epilogue(weight: Tensor) -> bool:
    """Say whether what follows a convolution with these weights runs in one kernel, as on a GPU."""
    return weight.device.type == "cuda" and weight.is_floating_point() and _library.has_kernel("epilogue_", "cuda")


def _with_epilogue(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: onednn.Geometry,
    upper: float | None,
    shortcut: Tensor | None,
    *,
    keep: bool,
    way: Way,
) -> tuple[Tensor, Tensor]:
    """Return what `convolved_by_torch` does and, where they are to be kept, the gates of its ReLU.

    With a bias, torch's convolution would start a kernel of its own for it.
    """
    padding, stride, dilation, groups = geometry
    order = torch.channels_last if way.channels_last else torch.contiguous_format
    if input.ndim == 4:
        input = input.contiguous(memory_format=order)
    if way.cudnn and upper == math.inf:
        rest = (None if bias is None else bias.to(weight.dtype), stride, padding, dilation, groups)
        if shortcut is None:
            output = torch.cudnn_convolution_relu(input, weight, *rest)
        else:
            output = torch.cudnn_convolution_add_relu(input, weight, shortcut.contiguous(memory_format=order), 1.0, *rest)
        return output, ops.guided_relu_gates(output) if keep else output.new_empty(0, dtype=torch.uint8)
    output = F.conv2d(input, weight, None, stride, padding, dilation, groups)
    bias = None if bias is None else bias.to(_wide(output.dtype))
    if upper is None:
        if bias is None and shortcut is None:
            return output, output.new_empty(0, dtype=torch.uint8)
        return output, ops.epilogue_(output, bias, shortcut)
    return output, ops.epilogue_(output, bias, shortcut, "relu", upper, keep)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that sums are formed in."""
    return torch.promote_types(dtype, torch.float32)


def _evened(convolution: Convolution) -> Convolution:
    """Return the same convolution with equal padding on opposite sides, by taps of zero, where that costs less than padding.

    Padding one side alone copies the whole map: a depthwise convolution of 112 x 112 takes 4 times as long with it.
    """
    left, right, top, bottom = convolution.padding
    rows, columns = max(top, bottom), max(left, right)
    missing = [(columns - left, 1), (columns - right, 1), (rows - top, 0), (rows - bottom, 0)]
    if any(zeros % convolution.dilation[axis] for zeros, axis in missing):
        return convolution
    weight = F.pad(convolution.weight, [zeros // convolution.dilation[axis] for zeros, axis in missing])
    if weight.numel() > MOST_TAPS * convolution.weight.numel():
        return convolution
    padding = (columns, columns, rows, rows)
    return Convolution(weight, convolution.bias, convolution.stride, padding, convolution.dilation, convolution.groups)
