"""Whether what was made of a model computes the model's function and gradient.

Two comparisons, because rounding moves gates of ReLUs, and each that moves changes a gradient by more than a wrong graph may.
The traced graph calls the very ops of the model, in its dtype, so that both round alike. What folding, fusing and the tape make
of it is compared in float64, where rounding moves nothing, on an image of noise. In the model's dtype the example is in a batch
with it.
"""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from pysal._interrupts import import_whole
from pysal.engine.graph.distance import distance
from pysal.engine.layers.lineage import SEEDS
from pysal.engine.model.gradient_layouts import lay_out

# The same ops in the same order give the same bits on a CPU; a GPU may add in another order, which moves no gate before it.
TRACED = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
# Float64 rounds to 1e-16, a network multiplies that; a model that makes float32 of its values keeps 1e-7.
EXACT = 1e-6
_SINGLE = (torch.float32, torch.float16, torch.bfloat16)
_WIDER = {"float": "double", "half": "double", "bfloat16": "double"}


@dataclass(frozen=True)
class Pass:
    """What a function gives for some images: its output, and the gradient of the images, None where there is none."""

    output: Any
    gradient: Tensor | None

    def apart(self, expected: "Pass") -> tuple[float, float]:
        """Return how far output, relative to its largest, and gradient, in l2, are from those expected."""
        if expected.gradient is None or self.gradient is None:
            gradient = 0.0 if self.gradient is expected.gradient else float("inf")
        else:
            gradient = distance(self.gradient, expected.gradient)
        return distance(self.output, expected.output, float("inf")), gradient


def seed_of(output: Tensor) -> Tensor:
    """Return a gradient of an output in which every class has its part."""
    normal = torch.randn(
        output.shape, generator=torch.Generator(device="cpu").manual_seed(0), dtype=torch.float64, device="cpu"
    )
    return normal.to(output)


def run(function: Callable[[Tensor], Any], images: Tensor) -> Pass:
    """Run a function under autograd."""
    with torch.enable_grad():
        leaf = images.detach().clone().requires_grad_()
        output = function(leaf.clone())
        if not isinstance(output, Tensor) or not output.requires_grad or not output.is_floating_point():
            return Pass(output, None)
        lay_out(output, len(images))
        import_whole(SEEDS)
        (gradient,) = torch.autograd.grad(output, leaf, seed_of(output), allow_unused=True)
        return Pass(output.detach(), gradient)


def batches(example: Tensor, rows: int | None) -> Iterator[Tensor]:
    """Return an image of noise in the range of an example's values, and a batch of it and the example.

    Args:
        example: (1, C, H, W).
        rows: images in each batch, of a model that takes so many at a time; None for any number.
    """
    low, high = (float(bound) for bound in example.float().aminmax())
    noise = torch.rand(example.shape, generator=torch.Generator(device="cpu").manual_seed(0), dtype=torch.float64, device="cpu")
    noise = (low + noise * ((high - low) or 1.0)).to(example)
    if rows is None:
        yield noise
    yield torch.cat([noise, example] * math.ceil((rows or 2) / 2))[: rows or 2]


def in_bfloat16(graph: fx.GraphModule) -> fx.GraphModule:
    """Return a copy of a graph whose weights are of bfloat16."""
    narrow = copy.deepcopy(graph)
    nn.Module._apply(narrow, lambda tensor: tensor.bfloat16() if tensor.is_floating_point() else tensor)
    return narrow


def in_float64(graph: fx.GraphModule) -> fx.GraphModule:
    """Return a copy of a graph whose weights, and the numbers that it converts values to, are of float64."""
    wide = copy.deepcopy(graph)

    def widen(tensor: Tensor) -> Tensor:
        return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64) if _inexact(tensor) else tensor

    nn.Module._apply(wide, widen)
    for node in wide.graph.nodes:
        node.args, node.kwargs = (_widened(part) for part in (node.args, node.kwargs))
        if node.op == "call_method":
            node.target = _WIDER.get(node.target, node.target)
    wide.recompile()
    return wide


def _inexact(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _widened(value: Any) -> Any:
    return fx.node.map_aggregate(value, lambda each: torch.float64 if each in _SINGLE else each)
