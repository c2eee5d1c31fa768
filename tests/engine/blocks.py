"""What holds of inverted residual blocks of either kind: that they are their layers one by one, whatever is asked of them."""

import copy
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

import pysal
from pysal.engine.graph.fold import Convolution
from pysal.engine.graph.fused_convolution import FusedConvolution
from pysal.engine.layers.features import Layer
from pysal.engine.prepared.gains import Gains
from pysal.engine.tape.forward import AtOnce
from pysal.engine.tape.tape import Program
from pysal.testing import assert_no_worse, sample

# images, C of input, between and output, (H, W), kernel, stride, (left, right, top, bottom)
Geometry: TypeAlias = tuple[int, int, int, int, tuple[int, int], tuple[int, int], tuple[int, int], tuple[int, int, int, int]]


def parts_of(geometry: Geometry, uppers: Sequence[float | None], groups: int | None = None) -> list[FusedConvolution]:
    """Return the three convolutions of a block with the bounds of their ReLUs; the second depthwise, or of so many groups."""
    _, inputs, channels, outputs, size, kernel, stride, padding = geometry
    still, none = (1, 1), (0, 0, 0, 0)
    groups = channels if groups is None else groups
    convolutions = [
        Convolution(sample(channels, inputs, 1, 1), None, still, none, still, 1),
        Convolution(sample(channels, channels // groups, *kernel), None, stride, padding, still, groups),
        Convolution(sample(outputs, channels, 1, 1), None, still, none, still, 1),
    ]
    shapes = [(inputs, *size), (channels, *size), (channels, *size)]
    return [FusedConvolution(*each, torch.float32) for each in zip(convolutions, uppers, shapes, strict=True)]


def without_blocks(program: Program) -> Program:
    """Return a program that runs node by node."""
    single = copy.copy(program)
    single.blocks = {}
    return single


def assert_layers_are_those_node_by_node(model: nn.Module, x: Tensor, program: Program) -> int:
    """Hold every layer's activation and gradient to those of a program without blocks; return how many layers there are."""
    single, runs = without_blocks(program), 0
    for path, module in model.named_modules():
        place = program.layer(Layer(path, module, 0))
        if place is None:
            continue
        tape, other = program.record(x, [place]), single.record(x, [place])
        runs += 1
        torch.testing.assert_close(tape.values[place], other.values[place])
        grad = sample(len(x), 5)
        (found, parts), (expected, others) = tape.sweep(grad, layers=[place]), other.sweep(grad, layers=[place])
        for one, two in ((found, expected), (parts[place], others[place])):
            assert one is not None
            assert two is not None
            torch.testing.assert_close(one, two, rtol=0, atol=1e-5 * float(two.abs().max()))
    return runs


def assert_forward_is_the_models(model: nn.Module, x: Tensor) -> int:
    """Hold passes without gradients of a prepared model to float64; return how many blocks run at once in them."""
    prepared = pysal.prepare(model, x, batch_size=2, gains=Gains(2.0, 2.0))
    double = copy.deepcopy(model).double()
    for images in (x, x[:1], x[:1].contiguous(memory_format=torch.channels_last)):
        before = images.clone()
        with torch.no_grad():
            assert_no_worse(prepared(images), double(images.double()), model(images))
        assert torch.equal(images, before)
    assert not prepared(x).requires_grad
    assert prepared._graph is not None
    return sum(isinstance(part, AtOnce) for part in prepared._graph.modules())
