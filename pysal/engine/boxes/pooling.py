"""Pooling of regions, which hold what lies beyond the edge of a map too."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from pysal.engine.boxes.reach import Integers, Reach
from pysal.engine.graph.fold import pair


@dataclass(frozen=True)
class Pooling:
    """Pools regions that hold what lies beyond the edge too."""

    reach: tuple[Reach, Reach]
    outside: float
    divisors: tuple[NDArray[np.float64], NDArray[np.float64]] | None  # of a mean: by output row and column; None = maximum

    def __call__(self, regions: Tensor, corners: Integers, size: tuple[int, int]) -> Tensor:
        """Return (N, C, *size)."""
        kernel, stride = [reach.taps for reach in self.reach], [reach.stride for reach in self.reach]
        if self.divisors is None:
            return F.max_pool2d(regions, kernel, stride, 0, [reach.dilation for reach in self.reach])
        sums = F.avg_pool2d(regions, kernel, stride, divisor_override=1)
        shares = []
        for axis, reach in enumerate(self.reach):
            first = (corners[:, axis] + reach.before) // reach.stride
            shares.append(1 / self.divisors[axis][first[:, None] + np.arange(size[axis])])
        down, across = (torch.from_numpy(share).to(sums) for share in shares)
        return sums.mul_(down[:, None, :, None]).mul_(across[:, None, None, :])


def pooling_of(node: fx.Node, module: nn.Module | None, clean: dict[fx.Node, Any]) -> Pooling | None:
    """Return how a node pools, or None where it does not or not in a known way."""
    if not node.args or not isinstance(node.args[0], fx.Node) or not isinstance(clean[node.args[0]], Tensor):
        return None
    given: dict[str, Any]
    names: tuple[str, ...]
    if type(module) in (nn.MaxPool2d, nn.AvgPool2d):
        mean = type(module) is nn.AvgPool2d
        names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
        names += ("count_include_pad", "divisor_override")
        given = {name: getattr(module, name) for name in names if hasattr(module, name)}
    elif node.op == "call_function" and node.target in (F.max_pool2d, torch.max_pool2d, F.avg_pool2d):
        mean = node.target is F.avg_pool2d
        names = ("input", "kernel_size", "stride", "padding")
        names += ("ceil_mode", "count_include_pad", "divisor_override") if mean else ("dilation", "ceil_mode", "return_indices")
        given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    else:
        return None
    kernel = pair(given["kernel_size"])
    stride = pair(given.get("stride") or kernel)
    padding, dilation = pair(given.get("padding", 0)), pair(given.get("dilation", 1))
    sizes = [*kernel, *stride, *padding, *dilation]
    if given.get("return_indices") or not all(isinstance(size, int) for size in sizes):
        return None
    down, across = (Reach(kernel[i], stride[i], padding[i], dilation[i]) for i in range(2))
    if not mean:
        return Pooling((down, across), -math.inf, None)
    before, after = clean[node.args[0]].shape[2:], clean[node].shape[2:]
    divisors = []
    for i in range(2):
        start = np.arange(after[i]) * stride[i] - padding[i]
        # windows of ceil_mode that reach beyond the padding count what is inside it
        end = np.minimum(start + kernel[i], before[i] + padding[i])
        if not given.get("count_include_pad", True):
            start, end = np.maximum(start, 0), np.minimum(end, before[i])
        divisors.append((end - start).astype(np.float64))
    divisor: Any = given.get("divisor_override")
    if divisor:
        divisors = [np.full(after[0], float(divisor)), np.ones(after[1])]
    return Pooling((down, across), 0.0, (divisors[0], divisors[1]))
