"""An inverted residual block in one pass is its convolutions one by one, forward and backward, and keeps the same gates."""

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import pysal
from pysal import ops
from pysal.engine.boxes import groups
from pysal.engine.graph.fold import Convolution
from pysal.engine.graph.fused_convolution import FusedConvolution
from pysal.engine.graph.inverted_residual import InvertedResidual, available, panels
from pysal.engine.model.relu_rules import ReluRule
from pysal.engine.prepared.gains import Gains
from pysal.engine.tape.tape import Program
from pysal.testing import assert_no_worse, required, sample
from tests.engine.blocks import (
    Geometry,
    assert_forward_is_the_models,
    assert_layers_are_those_node_by_node,
    parts_of,
    without_blocks,
)

RULES: tuple[ReluRule, ...] = ("plain", "guided", "deconvnet")
compiled = pytest.mark.skipif(not available() and "cpu" not in required(), reason="the CPU kernels are not compiled")

GEOMETRIES: dict[str, Geometry] = {
    "padding on one side": (2, 16, 96, 24, (12, 12), (3, 3), (2, 2), (0, 1, 0, 1)),
    "odd sizes": (1, 24, 48, 40, (9, 11), (5, 5), (1, 1), (2, 2, 2, 2)),
    "tiles of every size": (1, 16, 16, 24, (4, 29), (3, 3), (1, 1), (1, 1, 1, 1)),
    "7 x 7": (3, 40, 32, 16, (13, 7), (7, 7), (2, 1), (3, 3, 3, 3)),
    "rows that no window reaches": (1, 16, 16, 16, (8, 10), (3, 3), (2, 2), (0, 0, 0, 0)),
    "uneven kernel and strides": (5, 16, 64, 56, (5, 20), (3, 5), (1, 2), (2, 2, 1, 1)),
    "windows side by side": (2, 16, 16, 16, (7, 9), (2, 3), (2, 3), (0, 0, 0, 0)),
    "one pixel": (4, 16, 16, 16, (1, 1), (3, 3), (1, 1), (1, 1, 1, 1)),
    "stride over one pixel": (1, 16, 32, 16, (5, 1), (3, 3), (2, 2), (1, 1, 1, 1)),
}
geometries = pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
expands = pytest.mark.parametrize("expands", [True, False], ids=["expanding", "depthwise first"])


class Block:
    """Convolutions with random weights, their block, and what both should give."""

    def __init__(self, geometry: Geometry, expands: bool = True, uppers: tuple[float, float] = (6.0, 6.0)) -> None:
        self.images, inputs, channels, outputs, self.size, kernel, stride, padding = geometry
        self.inputs = inputs if expands else channels
        expand = sample(channels, inputs, 1, 1, seed=1), sample(channels, seed=2)
        depthwise, project = sample(channels, 1, *kernel, seed=3), sample(outputs, channels, 1, 1, seed=5)
        still, none = (1, 1), (0, 0, 0, 0)
        self.convolutions = [
            *([Convolution(*expand, still, none, still, 1)] if expands else []),
            Convolution(depthwise, sample(channels, seed=4), stride, padding, still, channels),
            Convolution(project, sample(outputs, seed=6), still, none, still, 1),
        ]
        self.uppers: list[float | None] = [*uppers[0 if expands else 1 :], None]
        size, fused = self.size, []
        for convolution, upper in zip(self.convolutions, self.uppers, strict=True):
            shape = (convolution.weight.shape[1] * convolution.groups, *size)
            fused.append(FusedConvolution(convolution, upper, shape, torch.float32))
            size = tuple(convolution(torch.zeros(1, *shape)).shape[2:])
        self.out_shape = (self.images, outputs, *size)
        first = fused[0] if expands else None
        assert InvertedResidual.fits(first, *fused[-2:])
        self.block = InvertedResidual(first, *fused[-2:])

    def sample(self, seed: int = 0) -> Tensor:
        return sample(self.images, self.inputs, *self.size, seed=seed).contiguous(memory_format=torch.channels_last)

    def expected(self, x: Tensor, shortcut: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """Return the output and what the ReLUs are given, in the dtype of x."""
        before: list[Tensor] = []
        for convolution, upper in zip(self.convolutions, self.uppers, strict=True):
            x = copy.deepcopy(convolution).to(x.dtype)(x)
            if upper is not None:
                before.append(x)
                x = x.clamp(0, upper)
        return x if shortcut is None else x + shortcut.to(x.dtype), before

    def expected_gradient(self, grad: Tensor, gates: list[Tensor], rule: ReluRule, added: Tensor | None) -> Tensor:
        """Return the input's gradient, in the dtype of grad, from gates (N, C, H, W)."""
        for position in reversed(range(len(self.convolutions))):
            convolution = copy.deepcopy(self.convolutions[position]).to(grad.dtype)
            channels = convolution.weight.shape[1] * convolution.groups
            size = gates[position - 1].shape[2:] if position else self.size
            leaf = grad.new_zeros(len(grad), channels, *size).requires_grad_()
            (grad,) = torch.autograd.grad(convolution(leaf), leaf, grad)
            if position:
                open_ = gates[position - 1].repeat(len(grad) // self.images, 1, 1, 1)
                passes = {"plain": open_, "guided": open_ & (grad > 0), "deconvnet": grad > 0}[rule]
                grad = grad * passes
        return grad if added is None else grad + added.to(grad.dtype)


def unpacked(bits: Tensor, like: Tensor) -> Tensor:
    images, channels, height, width = like.shape
    each = (bits[:, None] >> torch.arange(8)) & 1
    return each.view(images, height, width, channels).permute(0, 3, 1, 2).bool()


def assert_block_is_its_convolutions(made: Block, with_shortcut: bool, rule: ReluRule, gradients: int) -> None:
    x = made.sample()
    shortcut = sample(*made.out_shape, seed=7) if with_shortcut else None
    truth, before64 = made.expected(x.double(), shortcut)
    plain, before = made.expected(x, shortcut)
    output, bits = made.block.run(x, shortcut)
    assert output.is_contiguous(memory_format=torch.channels_last)
    assert_no_worse(output, truth, plain)
    assert len(bits) == len(before)
    for some, inner64, inner, upper in zip(bits, before64, before, made.uppers, strict=False):
        assert upper is not None
        error = 2 * (inner - inner64).abs().max() + 4 * torch.finfo(torch.float32).eps * inner64.abs().max()
        clear = (inner64.abs() > error) & ((inner64 - upper).abs() > error)
        relu = inner64.clamp(0, upper).contiguous(memory_format=torch.channels_last)
        assert torch.equal(unpacked(some, relu)[clear], unpacked(ops.guided_relu_gates(relu, upper), relu)[clear])
    gates = [unpacked(some, inner) for some, inner in zip(bits, before, strict=True)]
    grad = sample(gradients * made.images, *made.out_shape[1:], seed=8)
    added = sample(len(grad), made.inputs, *made.size, seed=9) if with_shortcut else None
    got = made.block.input_gradient(grad, bits, x.shape, rule, added)
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert_no_worse(
        got,
        made.expected_gradient(grad.double(), gates, rule, added),
        made.expected_gradient(grad, gates, rule, added),
    )


@compiled
@geometries
@expands
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("with_shortcut", [False, True], ids=["alone", "shortcut"])
def test_block_is_its_convolutions(geometry: Geometry, expands: bool, rule: ReluRule, with_shortcut: bool) -> None:
    assert_block_is_its_convolutions(Block(geometry, expands), with_shortcut, rule, 1 + 2 * with_shortcut)


@compiled
@pytest.mark.parametrize("uppers", [(torch.inf, 6.0), (1.0, torch.inf), (torch.inf, torch.inf)], ids=str)
def test_each_relu_has_its_own_bound(uppers: tuple[float, float]) -> None:
    assert_block_is_its_convolutions(Block(GEOMETRIES["odd sizes"], uppers=uppers), False, "plain", 2)


@st.composite
def shapes(draw: st.DrawFn) -> Geometry:
    kernel = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    padding = [draw(st.integers(0, kernel[axis] - 1)) for axis in (1, 1, 0, 0)]
    size = [draw(st.integers(max(kernel[axis] - sum(padding[2 - 2 * axis :][:2]), 1), 20)) for axis in (0, 1)]
    return (
        draw(st.integers(1, 3)),
        8 * draw(st.integers(2, 7)),
        16 * draw(st.integers(1, 4)),
        8 * draw(st.integers(2, 7)),
        (size[0], size[1]),
        kernel,
        (draw(st.integers(1, kernel[0])), draw(st.integers(1, kernel[1]))),
        (padding[0], padding[1], padding[2], padding[3]),
    )


@compiled
@settings(max_examples=60, deadline=None)
@given(shapes(), st.booleans(), st.booleans(), st.sampled_from(RULES), st.integers(1, 3))
def test_any_shape(geometry: Geometry, expands: bool, with_shortcut: bool, rule: ReluRule, gradients: int) -> None:
    assert_block_is_its_convolutions(Block(geometry, expands), with_shortcut, rule, gradients)


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
    found: list[list[Tensor]] = []
    for count in (1, 3):
        torch.set_num_threads(count)
        made = Block((1, *geometry[1:]), expands)
        output, bits = made.block.run(made.sample(), None)
        grad = made.block.input_gradient(sample(*output.shape, seed=8), bits, made.sample().shape, "guided")
        found.append([output, *bits, grad])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@compiled
def test_nan_comes_through() -> None:
    made = Block(GEOMETRIES["odd sizes"])
    x = made.sample()
    x[0, 3, 4, 5] = torch.nan
    output, _ = made.block.run(x, None)
    assert torch.equal(output.isnan(), made.expected(x, None)[0].isnan())


@compiled
def test_what_memory_safety_needs_is_refused() -> None:
    made = Block(GEOMETRIES["odd sizes"])
    x = made.sample()
    for wrong, shortcut in ((x[:, :16], None), (x.double(), None), (x[0], None), (x, x), (x[:, :, :0], None)):
        with pytest.raises(RuntimeError, match="pysal_blocks::inverted_residual: "):
            made.block.run(wrong, shortcut)
    output, bits = made.block.run(x, None)
    for grad, gates, shape, added in (
        (output[:, :16], bits, x.shape, None),
        (output.double(), bits, x.shape, None),
        (output, [bits[1], bits[0][:-1]], x.shape, None),
        (output, bits, (1, 24, 9, 12), None),
        (output, bits, (2, *x.shape[1:]), None),
        (output, bits, x.shape, output),
    ):
        with pytest.raises(RuntimeError, match="pysal_blocks::inverted_residual_backward: "):
            made.block.input_gradient(grad, gates, shape, "plain", added)


@pytest.mark.parametrize("columns", [16, 24, 32, 40])
def test_panels_hold_every_column(columns: int) -> None:
    matrix = sample(3, columns)
    found = panels(matrix)
    assert found.shape == (-(-columns // 16), 3, 16)
    for number, panel in enumerate(found):
        start = min(16 * number, columns - 16)
        assert torch.equal(panel, matrix[:, start : start + 16])


class Residual(nn.Module):
    """What MobileNetV2 is made of."""

    def __init__(self, inputs: int, outputs: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        channels = inputs * expansion
        parts: list[nn.Module] = []
        if expansion > 1:
            parts += [nn.Conv2d(inputs, channels, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU6()]
        parts += [nn.Conv2d(channels, channels, kernel, stride, kernel // 2, groups=channels, bias=False)]
        parts += [nn.BatchNorm2d(channels), nn.ReLU6(), nn.Conv2d(channels, outputs, 1, bias=False), nn.BatchNorm2d(outputs)]
        self.parts = nn.Sequential(*parts)
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.parts(x)
        return x + found if self.adds else found


def network() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU6())
    blocks = [Residual(32, 16, 1, 3, 1), Residual(16, 24, 6, 3, 2), Residual(24, 24, 4, 5, 1), Residual(24, 32, 2, 3, 1)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5)]
    model = nn.Sequential(stem, *blocks, *head)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return model.eval(), sample(2, 3, 56, 56)


def programs() -> tuple[nn.Module, Tensor, Program]:
    """Return a model, images, and its program."""
    model, x = network()
    program = pysal.prepare(model, x, batch_size=2).program
    assert program is not None
    assert len(program.blocks) == 4
    return model, x, program


@compiled
def test_methods_on_a_model_of_such_blocks() -> None:
    model, x = network()
    prepared = pysal.prepare(model, x, batch_size=2)
    assert "4 inverted residual blocks run in one pass over memory" in prepared.report()
    double = copy.deepcopy(model).double()
    for method in (pysal.gradient, pysal.guided_backprop):
        assert_no_worse(method(prepared, x, 1), method(double, x.double(), 1), method(model, x, 1))
    drops = pysal.leave_one_out(model, x, 1, segments=pysal.Window(14), score="logit")
    found = pysal.leave_one_out(prepared, x, 1, segments=pysal.Window(14), score="logit")
    assert (found - drops).abs().max() <= 1e-4 * drops.abs().max()


@compiled
@pytest.mark.parametrize("size", [14, 40, 56])
def test_leave_one_out_runs_blocks_whose_maps_are_whole(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Small windows leave every map a box, larger ones reach all of the last maps, those of the image all of each."""
    model, x = network()
    prepared = pysal.prepare(model, x, batch_size=2, gains=Gains(2.0, 2.0, 2.0))
    options: dict[str, Any] = {"segments": pysal.Window(size, 14), "score": "logit"}
    pysal.leave_one_out(prepared, x[:1], 1, **options)  # also looks whether rows depend on each other, on whole images
    whole: list[int] = []
    run = InvertedResidual.run
    monkeypatch.setattr(InvertedResidual, "run", lambda self, *args: whole.append(len(args[0])) or run(self, *args))
    monkeypatch.setattr(groups, "PAYING_SHARE", math.inf)  # all in boxes, whatever they cost
    found = pysal.leave_one_out(prepared, x[:1], 1, **options)
    assert bool(whole) == (size > 14)
    double = copy.deepcopy(model).double()
    assert_no_worse(
        found, pysal.leave_one_out(double, x[:1].double(), 1, **options), pysal.leave_one_out(model, x[:1], 1, **options)
    )


@compiled
def test_passes_without_gradients_run_blocks_at_once() -> None:
    assert assert_forward_is_the_models(*network()) == 4


@compiled
@pytest.mark.parametrize("rule", RULES)
def test_sweeps_are_those_node_by_node(rule: ReluRule) -> None:
    _, x, program = programs()
    tape, other = program.record(x), without_blocks(program).record(x)
    assert (tape.relus, tape.bytes) == (other.relus, other.bytes)
    assert len(list(tape.others())) == len(list(other.others()))
    grad = sample(3 * len(x), 5)
    (got, _), (expected, _) = tape.sweep(grad, rule), other.sweep(grad, rule)
    assert got is not None
    assert expected is not None
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@compiled
def test_layers_of_blocks_can_be_asked_for() -> None:
    assert assert_layers_are_those_node_by_node(*programs()) > 20


@compiled
def test_other_precisions_run_node_by_node() -> None:
    model, x = network()
    for prepared in (
        pysal.prepare(model, x, batch_size=2, precision="mixed"),
        pysal.prepare(model.double(), x.double(), batch_size=2),
    ):
        assert prepared.program is not None
        assert prepared.program.blocks == {}
        assert "inverted residual" not in prepared.report()


def test_what_is_no_such_block_is_left_alone() -> None:
    fitting: Geometry = (1, 16, 32, 24, (12, 12), (3, 3), (1, 1), (1, 1, 1, 1))
    relus = 6.0, torch.inf, None
    assert InvertedResidual.fits(*parts_of(fitting, relus))
    assert InvertedResidual.suited(*parts_of(fitting, relus)) == available()
    assert not InvertedResidual.suited(*parts_of((*fitting[:4], (2, 4), *fitting[5:]), relus))  # 8 pixels
    for uppers in ((None, 6.0, None), (6.0, None, None), (6.0, 6.0, 6.0)):
        assert not InvertedResidual.fits(*parts_of(fitting, uppers))
    for wrong in (
        (1, 20, 32, 24, *fitting[4:]),  # channels that do not fill vectors
        (1, 16, 40, 24, *fitting[4:]),
        (1, 16, 32, 12, *fitting[4:]),
        (*fitting[:5], (3, 3), (4, 1), (1, 1, 1, 1)),  # pixels that no window reaches, in between
        (*fitting[:5], (3, 3), (1, 4), (1, 1, 1, 1)),
        (*fitting[:5], (3, 3), (1, 1), (3, 0, 0, 0)),  # windows of nothing but padding
    ):
        assert not InvertedResidual.fits(*parts_of(wrong, relus))
    expand, depthwise, project = parts_of(fitting, relus)
    assert not InvertedResidual.fits(depthwise, depthwise, project)
    assert not InvertedResidual.fits(expand, expand, project)
