"""float32 convolutions on the matrix unit of x86 CPUs (AMX), which multiplies bf16 numbers only.

Each float32 number is split into three bf16 numbers whose sum it is, and six of the nine products are added up in float32: as
close to the truth as float32 arithmetic, and on 16 times as many multipliers (Henry, Tang and Heinecke 2019, arXiv:1904.06376).
"""

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from pysal import _library
from pysal.engine.graph.fold import Convolution
from pysal.engine.model.relu_rules import ReluRule
from pysal.ops.guided_relu import RULES

# Below these input and output channels a convolution is bound by memory, and splitting its input costs more than is gained.
LEAST_CHANNELS = 64
# Multiplications per number moved from which the unit gains.
LEAST_WORK = 50
# The largest kernel, stride, dilation and padding that the kernel takes.
MOST_STEP = 512
# Gates are written and read for so many channels at a time.
GATED_CHANNELS = 16


@cache
def available() -> bool:
    """Say whether this machine has the unit, this build the kernel, and PYSAL_SIMD lets it run."""
    return bool(_library.build_info().get("matrix_unit", False))


class MatrixConvolution:
    """The weights of a convolution, arranged for the unit.

    Args:
        weight: (K, C, kh, kw), float32.
        bias: (K,) or None.
        dilation: between taps, down and across.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dilation: tuple[int, int] = (1, 1)) -> None:
        self._bias = weight.new_zeros(len(weight)) if bias is None else bias.contiguous()
        self._weight, self._dilation = arranged(weight), dilation

    @classmethod
    def suited(cls, convolution: Convolution, least_outputs: int = LEAST_CHANNELS) -> bool:
        """Say whether a convolution gains, with at least so many output channels."""
        weight = convolution.weight
        if convolution.groups != 1 or weight.dtype != torch.float32 or weight.device.type != "cpu" or not available():
            return False
        reach = [side * dilation for side, dilation in zip(weight.shape[2:], convolution.dilation, strict=True)]
        if max(*reach, *convolution.stride, *convolution.padding) > MOST_STEP:
            return False
        outputs, inputs = weight.shape[:2]
        return outputs >= least_outputs and inputs >= LEAST_CHANNELS and work(weight) >= LEAST_WORK

    def shape(self, input: Tensor, stride: tuple[int, int], padding: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
        """Return the shape of what `run` returns."""
        left, right, top, bottom = padding
        height, width = (
            (input.shape[2 + i] + zeros - self._dilation[i] * (self._weight.shape[1 + i] - 1) - 1) // stride[i] + 1
            for i, zeros in enumerate((top + bottom, left + right))
        )
        if min(height, width) < 1:
            raise ValueError(f"a kernel of {tuple(self._weight.shape[1:3])} does not fit into {tuple(input.shape[2:])}")
        return len(input), len(self._bias), height, width

    def run(
        self,
        input: Tensor,
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int, int, int] = (0, 0, 0, 0),
        *,
        shortcut: Tensor | None = None,
        over: bool = False,
        limits: tuple[float, float] = (-math.inf, math.inf),
        gates: Tensor | None = None,
        mask: Tensor | None = None,
        rule: ReluRule | None = None,
    ) -> Tensor:
        """Return min(max(convolution(input) + shortcut, lower), upper), channels_last.

        Args:
            input: (N, C, H, W).
            stride: of the windows, down and across.
            padding: zeros (left, right, top, bottom).
            shortcut: like the result.
            over: whether to write the result over the shortcut.
            limits: lower and upper.
            gates: (numel / 8,) uint8, overwritten with where 0 < result < upper, as `ops.guided_relu_gates` returns it; K must
                be a multiple of `GATED_CHANNELS`.
            mask: the gates of a map like the result, or of one of fewer images that follow each other again and again.
            rule: what of the result they let through, as `ops.guided_relu_backward` does; None is all.
        """
        left, _, top, _ = padding
        if shortcut is not None and over and shortcut.is_contiguous(memory_format=torch.channels_last):
            output = shortcut
        else:
            shape = self.shape(input, stride, padding)
            output = torch.empty(shape, dtype=torch.float32, memory_format=torch.channels_last, device="cpu")
        torch.ops.pysal_amx.bf16x6_convolution_(
            output,
            input,
            self._weight,
            self._bias,
            shortcut,
            *stride,
            top,
            left,
            *self._dilation,
            *limits,
            gates,
            None if rule == "deconvnet" else mask,
            -1 if rule is None else RULES[rule],
        )
        return output


def work(weight: Tensor) -> float:
    """Return how often a convolution with these weights multiplies for each number it reads or writes."""
    outputs, inputs = weight.shape[:2]
    return weight.numel() / (outputs + inputs)


def arranged(weight: Tensor) -> Tensor:
    """Return the weights of a convolution (K, C, kh, kw) in three bf16 parts and in the order the kernel reads them.

    Returns:
        (blocks of 16 of K, kh, kw, blocks of 32 of C, 3 parts, 16 pairs of C, 32: 16 of K and 2 of a pair).
    """
    outputs, inputs, height, width = weight.shape
    padded = F.pad(weight, (0, 0, 0, 0, 0, -inputs % 32, 0, -outputs % 16))
    parts: list[Tensor] = []
    rest = padded
    for _ in range(3):
        parts.append(rest.bfloat16())
        rest = rest - parts[-1].float()
    stacked = torch.stack(parts).reshape(3, math.ceil(outputs / 16), 16, math.ceil(inputs / 32), 16, 2, height, width)
    # part, block of K, of K, block of C, pair, of a pair, row, column
    return stacked.permute(1, 6, 7, 3, 0, 4, 2, 5).contiguous().flatten(6)
