"""3 x 3 convolutions of stride 1 with a quarter of the multiplications: Winograd's F(4 x 4, 3 x 3), float32, on a CPU.

Winograd 1980, "Arithmetic complexity of computations"; Lavin and Gray 2015, arXiv:1509.09308. csrc/cpu/simd/winograd.cpp has
the loops. Its rounding errors are about twice those of a plain float32 convolution of channels_last maps.
"""

import math

import torch
from torch import Tensor

from pysal import ops  # noqa: F401  loads the kernels
from pysal.engine.graph.fold import Convolution
from pysal.engine.model.relu_rules import ReluRule
from pysal.ops.guided_relu import RULES

# Pixels of the output from which it gains for any number of images: on smaller maps, reading four times the weights takes the
# time of the multiplications.
LEAST_PIXELS = 100
# The least share of its tiles' pixels that an output has, and the most multiplications of a pixel for each tile, for it to
# gain: else tiles are mostly empty, or it takes longer to read the weights than to multiply by them.
LEAST_FILL, PER_TILE = 0.35, 2**15
_TILE = 4  # numbers of the output that are made together, down and across
_PANEL = 16  # columns of a matrix that lie together
# The finite points of an axis, in the order of csrc/cpu/simd/winograd.cpp; infinity comes last.
_POINTS = (0.0, 11 / 16, -11 / 16, 3 / 2, -3 / 2)


class WinogradConvolution:
    """The weights of a convolution, arranged for the kernel.

    Args:
        weight: (K, C, 3, 3), float32.
        bias: (K,) or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight, self._bias = arranged(weight), None if bias is None else bias.contiguous()
        self._outputs = len(weight)

    @classmethod
    def suited(cls, convolution: Convolution, size: tuple[int, ...]) -> bool:
        """Say whether a convolution of maps of a size, (H, W), can run so and gains by it."""
        left, right, top, bottom = convolution.padding
        height, width = size[0] + top + bottom - 2, size[1] + left + right - 2
        return min(height, width) >= 1 and height * width >= LEAST_PIXELS and cls.fits(convolution)

    @staticmethod
    def fits(convolution: Convolution) -> bool:
        """Say whether the kernel takes a convolution."""
        weight, still = convolution.weight, (1, 1)
        plain = convolution.groups == 1 and convolution.stride == convolution.dilation == still
        even = not any(channels % _PANEL for channels in weight.shape[:2])
        padded = 0 <= min(convolution.padding) and max(convolution.padding) <= 2
        floats = weight.dtype == torch.float32 and weight.device.type == "cpu" and available()
        return plain and even and padded and floats and tuple(weight.shape[2:]) == (3, 3)

    def gains(self, input: Tensor, padding: tuple[int, int] = (0, 0)) -> bool:
        """Say whether it is faster than oneDNN on an input (N, C, H, W) with so many zeros above and below, left and right."""
        height, width = (input.shape[2 + axis] + 2 * padding[axis] - 2 for axis in range(2))
        if min(height, width) < 1:
            return False
        tiles = math.ceil(height / _TILE) * math.ceil(width / _TILE)
        multiplications = input.shape[1] * self._outputs
        return height * width >= LEAST_FILL * _TILE**2 * tiles and len(input) * tiles * PER_TILE >= multiplications

    def shape(self, input: Tensor, stride: tuple[int, int], padding: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
        """Return the shape of what `run` returns."""
        left, right, top, bottom = padding
        return len(input), self._outputs, input.shape[2] + top + bottom - 2, input.shape[3] + left + right - 2

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
            stride: (1, 1).
            padding: zeros (left, right, top, bottom), at most 2 each.
            shortcut: like the result.
            over: whether to write the result over the shortcut.
            limits: lower and upper.
            gates: (numel / 8,) uint8, overwritten with where 0 < result < upper, as `ops.guided_relu_gates` returns it.
            mask: the gates of a map like the result, or of one of fewer images that follow each other again and again.
            rule: what of the result they let through, as `ops.guided_relu_backward` does; None is all.
        """
        assert stride == (1, 1)
        left, _, top, _ = padding
        if shortcut is not None and over and shortcut.is_contiguous(memory_format=torch.channels_last):
            output = shortcut
        else:
            shape = self.shape(input, stride, padding)
            output = torch.empty(shape, dtype=torch.float32, memory_format=torch.channels_last, device="cpu")
        through = None if rule == "deconvnet" else mask
        number = -1 if rule is None else RULES[rule]
        torch.ops.pysal_winograd.convolution_(
            output, input, self._weight, self._bias, shortcut, top, left, *limits, gates, through, number
        )
        return output


def available() -> bool:
    """Say whether the kernel is compiled."""
    return hasattr(torch.ops.pysal_winograd, "convolution_")


def arranged(weight: Tensor) -> Tensor:
    """Return the weights of a convolution (K, C, 3, 3) at the points, in the order the kernel reads them.

    Returns:
        (36, K / 16, C, 16).
    """
    rows = []
    for point in _POINTS:
        scale = math.prod(point - other for other in _POINTS if other != point)
        rows.append([1 / scale, point / scale, point * point / scale])
    rows.append([0.0, 0.0, 1.0])
    at = torch.tensor(rows, dtype=torch.float64, device="cpu")
    products = torch.einsum("ia,jb->ijab", at, at).reshape(len(rows) ** 2, -1)
    outputs, inputs = weight.shape[:2]
    panels = outputs // _PANEL
    found = torch.empty(len(products), panels, inputs, _PANEL, dtype=weight.dtype, device="cpu")
    for panel in range(panels):  # what is moved about stays in the caches: a fifth of the time of all at once
        own = weight.detach()[panel * _PANEL : (panel + 1) * _PANEL].double()
        found[:, panel] = (products @ own.permute(2, 3, 1, 0).reshape(products.shape[1], -1)).view(-1, inputs, _PANEL)
    return found
