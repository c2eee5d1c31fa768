"""An inverted residual block with smooth activations in two passes is its layers one by one, forward and backward."""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import pysal
from pysal.engine.graph.activations import Activation
from pysal.engine.graph.fold import Convolution
from pysal.engine.graph.fused_convolution import FusedConvolution
from pysal.engine.graph.smooth_residual import SmoothResidual, available
from pysal.engine.tape.smooth import SmoothBlockOperator
from pysal.engine.tape.tape import Program
from pysal.testing import assert_no_worse, required, sample
from tests.engine.blocks import (
    Geometry,
    assert_forward_is_the_models,
    assert_layers_are_those_node_by_node,
    parts_of,
    without_blocks,
)
from tests.engine.test_activations import FUNCTIONS as OF_ACTIVATIONS

compiled = pytest.mark.skipif(not available() and "cpu" not in required(), reason="the CPU kernels are not compiled")

FUNCTIONS = {**OF_ACTIVATIONS, "leaky_relu": lambda x: F.leaky_relu(x, 0.2)}

GEOMETRIES: dict[str, Geometry] = {
    "padding on one side": (2, 16, 96, 24, (12, 12), (3, 3), (2, 2), (0, 1, 0, 1)),
    "half a panel": (1, 24, 40, 40, (9, 11), (5, 5), (1, 1), (2, 2, 2, 2)),
    "channels of no vector": (2, 19, 21, 17, (6, 5), (3, 3), (1, 1), (1, 1, 1, 1)),
    "wide rows": (1, 16, 16, 24, (4, 70), (3, 3), (1, 1), (1, 1, 1, 1)),
    "7 x 7": (3, 40, 32, 16, (13, 7), (7, 7), (2, 1), (3, 3, 3, 3)),
    "rows that no window reaches": (1, 16, 16, 16, (8, 10), (3, 3), (2, 2), (0, 0, 0, 0)),
    "uneven kernel and strides": (5, 16, 72, 56, (5, 20), (3, 5), (1, 2), (2, 2, 1, 1)),
    "windows side by side": (2, 16, 16, 16, (7, 9), (2, 3), (2, 3), (0, 0, 0, 0)),
    "one pixel": (4, 16, 16, 16, (1, 1), (3, 3), (1, 1), (1, 1, 1, 1)),
    "stride over one pixel": (1, 16, 32, 16, (5, 1), (3, 3), (2, 2), (1, 1, 1, 1)),
}
geometries = pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
expands = pytest.mark.parametrize("expands", [True, False], ids=["expanding", "depthwise first"])


@dataclass
class Found:
    """What a block gives, in one dtype."""

    output: Tensor
    sums: Tensor
    gate_gradient: Tensor
    input_gradient: Tensor


class Block:
    """Convolutions with random weights, their block, and what both should give."""

    def __init__(self, geometry: Geometry, expands: bool = True, kinds: tuple[str, str] = ("silu", "silu")) -> None:
        self.images, inputs, channels, outputs, self.size, kernel, stride, padding = geometry
        if not expands:
            channels = -(-channels // 16) * 16
        self.inputs, self.channels = inputs if expands else channels, channels
        still, none = (1, 1), (0, 0, 0, 0)
        self.convolutions = [
            Convolution(sample(channels, 1, *kernel, seed=3), sample(channels, seed=4), stride, padding, still, channels),
            Convolution(sample(outputs, channels, 1, 1, seed=5), sample(outputs, seed=6), still, none, still, 1),
        ]
        self.functions = [FUNCTIONS[kind] for kind in kinds]
        if expands:
            expand = Convolution(sample(channels, inputs, 1, 1, seed=1), sample(channels, seed=2), still, none, still, 1)
            self.convolutions.insert(0, expand)
        else:
            del self.functions[0]
        size, fused = self.size, []
        for convolution in self.convolutions:
            shape = (convolution.weight.shape[1] * convolution.groups, *size)
            fused.append(FusedConvolution(convolution, None, shape, torch.float32))
            size = tuple(convolution(torch.zeros(1, *shape)).shape[2:])
        self.out_shape = (self.images, outputs, *size)
        first, second = (Activation(kind, 0.2) for kind in kinds)
        expanding = fused[0] if expands else None
        assert SmoothResidual.fits(expanding, *fused[-2:])
        self.block = SmoothResidual(expanding, first, fused[-2], second, fused[-1])

    def sample(self, seed: int = 0) -> Tensor:
        return sample(self.images, self.inputs, *self.size, seed=seed).contiguous(memory_format=torch.channels_last)

    def expected(
        self, x: Tensor, gate: Tensor | None, added: Tensor | None, shortcut: Tensor | None, grad: Tensor, onto: Tensor | None
    ) -> Found:
        """Return what autograd finds, in the dtype of x. What is added goes to the gradient of the second activation."""
        dtype, times = x.dtype, len(grad) // self.images
        x = x.repeat(times, 1, 1, 1).requires_grad_()
        value = x
        for function, convolution in zip(self.functions, self.convolutions, strict=False):
            value = function(copy.deepcopy(convolution).to(dtype)(value))
        gates = torch.ones(len(x), self.channels, dtype=dtype)
        gates = (gates if gate is None else gate.repeat(times, 1).to(dtype)).requires_grad_()
        result = copy.deepcopy(self.convolutions[-1]).to(dtype)(value * gates[:, :, None, None])
        result = result if shortcut is None else result + shortcut.repeat(times, 1, 1, 1).to(dtype)
        whole = (result * grad.to(dtype)).sum()
        whole = whole if added is None else whole + (value.sum((2, 3)) * added.to(dtype)).sum()
        to_input, to_gate = torch.autograd.grad(whole, (x, gates))
        to_input = to_input if onto is None else to_input + onto.to(dtype)
        return Found(*(each.detach() for each in (result[: self.images], value[: self.images].sum((2, 3)), to_gate, to_input)))

    def found(
        self, x: Tensor, gate: Tensor | None, added: Tensor | None, shortcut: Tensor | None, grad: Tensor, onto: Tensor | None
    ) -> Found:
        entered = self.block.enter(x, squeezes=gate is not None)
        output = self.block.leave(entered.middle, gate, shortcut)
        to_gate, passed = self.block.gate_gradient(grad, entered.middle)
        rest = {"passed": None if gate is None else passed, "gate": gate, "added": added, "onto": onto}
        return Found(output, entered.sums, to_gate, self.block.input_gradient(grad, entered, x.shape, **rest))


def assert_block_is_its_layers(made: Block, gated: bool, with_shortcut: bool, times: int) -> None:
    x, rows = made.sample(), times * made.images
    gate = sample(made.images, made.channels, seed=10) if gated else None
    added = sample(rows, made.channels, seed=11) if gated else None
    shortcut = sample(*made.out_shape, seed=7) if with_shortcut else None
    onto = sample(rows, made.inputs, *made.size, seed=9) if with_shortcut else None
    grad = sample(rows, *made.out_shape[1:], seed=8)
    given = (gate, added, shortcut, grad, onto)
    exact, base, got = made.expected(x.double(), *given), made.expected(x, *given), made.found(x, *given)
    assert got.output.is_contiguous(memory_format=torch.channels_last)
    assert got.input_gradient.is_contiguous(memory_format=torch.channels_last)
    assert_no_worse(got.output, exact.output, base.output)
    assert_no_worse(got.input_gradient, exact.input_gradient, base.input_gradient)
    assert_no_worse(got.gate_gradient, exact.gate_gradient, base.gate_gradient)
    if gated:
        assert_no_worse(got.sums, exact.sums, base.sums)


@compiled
@geometries
@expands
@pytest.mark.parametrize("gated", [True, False], ids=["gates", "no gates"])
@pytest.mark.parametrize("with_shortcut", [False, True], ids=["alone", "shortcut"])
def test_block_is_its_layers(geometry: Geometry, expands: bool, gated: bool, with_shortcut: bool) -> None:
    assert_block_is_its_layers(Block(geometry, expands), gated, with_shortcut, 1 + 2 * with_shortcut)


@compiled
@pytest.mark.parametrize("kind", FUNCTIONS)
@pytest.mark.parametrize("where", ["first", "second"])
def test_every_activation(kind: str, where: str) -> None:
    kinds = (kind, "silu") if where == "first" else ("hardswish", kind)
    assert_block_is_its_layers(Block(GEOMETRIES["half a panel"], kinds=kinds), True, True, 2)


@st.composite
def shapes(draw: st.DrawFn) -> Geometry:
    kernel = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    padding = [draw(st.integers(0, kernel[axis] - 1)) for axis in (1, 1, 0, 0)]
    size = [draw(st.integers(max(kernel[axis] - sum(padding[2 - 2 * axis :][:2]), 1), 20)) for axis in (0, 1)]
    return (
        draw(st.integers(1, 3)),
        draw(st.integers(16, 50)),
        draw(st.integers(16, 70)),
        draw(st.integers(16, 50)),
        (size[0], size[1]),
        kernel,
        (draw(st.integers(1, kernel[0])), draw(st.integers(1, kernel[1]))),
        (padding[0], padding[1], padding[2], padding[3]),
    )


@compiled
@settings(max_examples=60, deadline=None)
@given(shapes(), st.booleans(), st.booleans(), st.booleans(), st.integers(1, 3))
def test_any_shape(geometry: Geometry, expands: bool, gated: bool, with_shortcut: bool, times: int) -> None:
    assert_block_is_its_layers(Block(geometry, expands), gated, with_shortcut, times)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@compiled
@geometries
@expands
@pytest.mark.usefixtures("threads")
def test_results_do_not_depend_on_threads(geometry: Geometry, expands: bool) -> None:
    found: list[Found] = []
    made = Block((1, *geometry[1:]), expands)
    gate, added = sample(1, made.channels, seed=10), sample(1, made.channels, seed=11)
    for count in (1, 3):
        torch.set_num_threads(count)
        found.append(made.found(made.sample(), gate, added, None, sample(*made.out_shape, seed=8), None))
    one, other = (list(vars(each).values()) for each in found)
    assert all(torch.equal(first, second) for first, second in zip(one, other, strict=True))


@compiled
@expands
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", ["silu", "hardswish"])
def test_what_is_not_finite_comes_through(expands: bool, value: float, kind: str) -> None:
    made = Block(GEOMETRIES["half a panel"], expands, (kind, kind))
    x = made.sample()
    x[0, 3, 4, 5] = value
    gate = sample(1, made.channels, seed=10).abs() + 0.1
    entered = made.block.enter(x, squeezes=True)
    output = made.block.leave(entered.middle, gate, None)
    expected = made.expected(x, gate, None, None, torch.zeros(made.out_shape), None)
    assert torch.equal(output.isnan(), expected.output.isnan())
    assert torch.equal(output.isfinite(), expected.output.isfinite())
    assert torch.equal(entered.sums.isnan(), expected.sums.isnan())


@compiled
def test_inputs_of_any_strides_are_taken_and_left_as_they_are() -> None:
    made = Block(GEOMETRIES["half a panel"])
    x, grad = made.sample(), sample(*made.out_shape, seed=8)
    gate = sample(1, made.channels, seed=10)
    expected = made.found(x, gate, None, None, grad, None)
    wide = sample(1, made.inputs, made.size[0], 2 * made.size[1], seed=1)
    strided = wide[:, :, :, ::2].copy_(x)
    for each in (x.contiguous(), strided):
        before = each.clone()
        found = made.found(each, gate, None, None, grad.contiguous(), None)
        assert all(torch.equal(a, b) for a, b in zip(vars(found).values(), vars(expected).values(), strict=True))
        assert torch.equal(each, before)


@compiled
def test_what_memory_safety_needs_is_refused() -> None:
    made = Block(GEOMETRIES["half a panel"])
    x, grad, gate = made.sample(), sample(*made.out_shape, seed=8), sample(1, made.channels, seed=10)
    for wrong in (x[:, :16], x.double(), x[0], x[:, :, :0]):
        with pytest.raises(RuntimeError, match="pysal_blocks::smooth_residual_enter: "):
            made.block.enter(wrong, squeezes=True)
    entered = made.block.enter(x, squeezes=True)
    middle = entered.middle
    for wrong, own, shortcut in ((middle[:, :16], gate, None), (middle, gate[:, :16], None), (middle, gate, x)):
        with pytest.raises(RuntimeError, match="pysal_blocks::smooth_residual_leave: "):
            made.block.leave(wrong, own, shortcut)
    for wrong in (grad[:, :16], grad.double(), grad[:, :, 1:]):
        with pytest.raises(RuntimeError, match="pysal_blocks::smooth_residual_gate_gradient: "):
            made.block.gate_gradient(wrong, middle)
    shape, rest = x.shape, {"gate": gate}
    for wrong, of, size, more in (
        (grad[:, :16], entered, shape, rest),
        (grad.double(), entered, shape, rest),
        (grad, entered, (1, 24, 9, 12), rest),
        (grad, entered, shape, {"gate": gate[:, :16]}),
        (grad, entered, shape, {"added": gate.repeat(2, 1)}),
        (grad, entered, shape, {"passed": grad}),
        (grad, entered, shape, {"onto": grad}),
        (grad, copy.copy(entered), shape, rest),
    ):
        if of is not entered:
            object.__setattr__(of, "slopes", None)
        with pytest.raises(RuntimeError, match="pysal_blocks::smooth_residual_backward: "):
            made.block.input_gradient(wrong, of, size, **more)


class Residual(nn.Module):
    """What MobileNetV3 and EfficientNet are made of."""

    def __init__(self, inputs: int, outputs: int, expansion: int, kernel: int, stride: int, *, squeezes: bool) -> None:
        super().__init__()
        channels = inputs * expansion
        parts: list[nn.Module] = []
        if expansion > 1:
            parts += [nn.Conv2d(inputs, channels, 1, bias=False), nn.BatchNorm2d(channels), nn.SiLU()]
        parts += [nn.Conv2d(channels, channels, kernel, stride, kernel // 2, groups=channels, bias=False)]
        parts += [nn.BatchNorm2d(channels), nn.Hardswish(), *([Squeeze(channels)] if squeezes else [])]
        self.parts = nn.Sequential(*parts, nn.Conv2d(channels, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.parts(x)
        return x + found if self.adds else found


class Squeeze(nn.Module):
    """Squeeze-and-excitation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.parts = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, 8, 1), nn.ReLU(), nn.Conv2d(8, channels, 1), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.parts(x)


def network() -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        blocks = [
            Residual(32, 16, 1, 3, 1, squeezes=True),
            Residual(16, 24, 3, 3, 2, squeezes=False),
            Residual(24, 24, 4, 5, 1, squeezes=True),
            Residual(24, 24, 2, 3, 1, squeezes=False),
        ]
        head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 5)]
        model = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1), nn.SiLU(), *blocks, *head)
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, -0.5, 0.5)
    return model.eval(), sample(2, 3, 33, 30)


def programs() -> tuple[nn.Module, Tensor, Program]:
    """Return a model, images, and its program."""
    model, x = network()
    program = pysal.prepare(model, x, batch_size=2).program
    assert program is not None
    assert sum(isinstance(block, SmoothBlockOperator) for block in program.blocks.values()) == 4
    return model, x, program


@compiled
def test_methods_on_a_model_of_such_blocks() -> None:
    model, x = network()
    prepared, double = pysal.prepare(model, x, batch_size=2), copy.deepcopy(model).double()
    assert "4 inverted residual blocks run in two passes over memory" in prepared.report()
    assert_no_worse(pysal.gradient(prepared, x, 1), pysal.gradient(double, x.double(), 1), pysal.gradient(model, x, 1))
    guided = [pysal.guided_backprop(each, x, 1, other_activations="plain") for each in (prepared, model)]
    torch.testing.assert_close(*guided, rtol=0, atol=1e-4 * float(guided[1].abs().max()))
    drops = pysal.leave_one_out(model, x, 1, segments=pysal.Window(11), score="logit")
    found = pysal.leave_one_out(prepared, x, 1, segments=pysal.Window(11), score="logit")
    assert (found - drops).abs().max() <= 1e-4 * drops.abs().max()


@compiled
def test_passes_without_gradients_run_blocks_at_once() -> None:
    assert assert_forward_is_the_models(*network()) == 4


@compiled
def test_sweeps_are_those_node_by_node() -> None:
    _, x, program = programs()
    tape, other = program.record(x), without_blocks(program).record(x)
    assert tape.relus == other.relus == 2
    gates = 2 * (32 + 96) * 4  # which one by one are what a node returns; the derivative of an activation replaces its input
    assert tape.bytes == other.bytes + gates
    grad = sample(3 * len(x), 5)
    (got, _), (expected, _) = tape.sweep(grad), other.sweep(grad)
    again, _ = tape.sweep(grad)
    assert got is not None
    assert expected is not None
    assert again is not None
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert torch.equal(got, again)


@compiled
def test_layers_of_blocks_can_be_asked_for() -> None:
    assert assert_layers_are_those_node_by_node(*programs()) > 25


@compiled
def test_other_precisions_run_node_by_node() -> None:
    model, x = network()
    prepared = pysal.prepare(model.double(), x.double(), batch_size=2)
    assert "in two passes" not in prepared.report()
    assert prepared.program is not None
    tape = prepared.program.record(x.double())
    assert not any(isinstance(operator, SmoothBlockOperator) for _, operator, _ in tape._saved)


@compiled
def test_what_is_no_such_block_does_not_fit() -> None:
    fitting: Geometry = (1, 16, 24, 16, (9, 9), (3, 3), (1, 1), (1, 1, 1, 1))
    smooth = (None, None, None)
    expand, depthwise, project = parts_of(fitting, smooth)
    assert SmoothResidual.fits(expand, depthwise, project)
    assert SmoothResidual.suited(expand, depthwise, project) == available()
    assert not SmoothResidual.suited(*parts_of((*fitting[:4], (2, 4), *fitting[5:]), smooth))  # 8 pixels
    assert not SmoothResidual.fits(None, depthwise, project)  # 24 channels are no whole panels
    assert not SmoothResidual.fits(depthwise, depthwise, project)
    assert not SmoothResidual.fits(expand, expand, project)
    assert not SmoothResidual.fits(*parts_of(fitting, smooth, groups=12))
    assert not SmoothResidual.fits(*parts_of(fitting, (math.inf, None, None)))
    for wrong in (
        (1, 8, 24, 16, *fitting[4:]),
        (1, 16, 8, 16, *fitting[4:]),
        (1, 16, 24, 8, *fitting[4:]),
        (*fitting[:6], (4, 4), (1, 1, 1, 1)),
        (*fitting[:7], (3, 3, 3, 3)),
        (*fitting[:5], (13, 11), (1, 1), (5, 5, 6, 6)),
    ):
        assert not SmoothResidual.fits(*parts_of(wrong, smooth))  # type: ignore[arg-type]


@compiled
@pytest.mark.parametrize("seen", ["expanded", "first activation", "middle", "second activation", "gated"])
def test_blocks_of_which_others_see_a_part_run_node_by_node(seen: str) -> None:
    class Seen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.expand = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 1)
            self.depthwise, self.squeeze = nn.Conv2d(32, 32, 3, padding=1, groups=32), Squeeze(32)
            self.project = nn.Conv2d(32, 32, 1)

        def forward(self, x: Tensor) -> Tensor:
            values = {"expanded": self.expand(self.stem(x))}
            values["first activation"] = F.silu(values["expanded"])
            values["middle"] = self.depthwise(values["first activation"])
            values["second activation"] = F.silu(values["middle"])
            values["gated"] = self.squeeze(values["second activation"])
            return (self.project(values["gated"]) + values[seen]).mean((2, 3))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Seen().eval()
    x = sample(2, 3, 12, 12)
    prepared, exact = pysal.prepare(model, x, batch_size=2), copy.deepcopy(model).double()
    program = prepared.program
    assert program is not None
    blocks = [block for block in program.blocks.values() if isinstance(block, SmoothBlockOperator)]
    # what is seen before the depthwise convolution leaves a block that begins with it
    assert len(blocks) == (1 if seen in ("expanded", "first activation") else 0)
    assert_no_worse(pysal.gradient(prepared, x, 1), pysal.gradient(exact, x.double(), 1), pysal.gradient(model, x, 1))


@compiled
def test_blocks_that_follow_each_other_share_no_layer() -> None:
    def separable(inputs: int, outputs: int) -> list[nn.Module]:
        depthwise = nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs)
        return [depthwise, nn.Hardswish(), nn.Conv2d(inputs, outputs, 1), nn.Hardswish()]

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts = [nn.Conv2d(3, 16, 3, 2), nn.Hardswish(), *separable(16, 32), *separable(32, 32), *separable(32, 16)]
        model = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    x = sample(2, 3, 21, 19)
    prepared, exact = pysal.prepare(model, x, batch_size=2), copy.deepcopy(model).double()
    program = prepared.program
    assert program is not None
    blocks = [operator for _, operator, _ in program.record(x)._saved if isinstance(operator, SmoothBlockOperator)]
    assert len(blocks) == 3  # each begins with its depthwise convolution: the layer before is the last of another
    assert_no_worse(pysal.gradient(prepared, x, 1), pysal.gradient(exact, x.double(), 1), pysal.gradient(model, x, 1))
