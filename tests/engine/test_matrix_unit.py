"""float32 convolutions on the matrix unit are as close to the truth as float32 arithmetic, whatever their geometry."""

import copy
from typing import Any, Literal, TypeAlias

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pysal
from pysal import ops
from pysal.engine.graph.fold import Convolution
from pysal.engine.graph.fused_convolution import FusedConvolution
from pysal.engine.graph.input_gradient import FlippedWithGates, OnMatrixUnitByPhases
from pysal.engine.graph.matrix_unit import MatrixConvolution, arranged, available
from pysal.engine.model.relu_rules import ReluRule
from pysal.testing import assert_no_worse, sample

with_unit = pytest.mark.skipif(not available(), reason="this CPU or build has no matrix unit")
# the op is there, to refuse, on every machine whose compiler knows the unit
with_kernel = pytest.mark.skipif(
    not hasattr(torch.ops.pysal_amx, "bf16x6_convolution_"), reason="this build has no kernel for the unit"
)

# (images, C, H, W, K, kernel, stride, (left, right, top, bottom), dilation): blocks that are full, begun and a single
# number; more pixels than one task has, more channels than one slab has, padding on one side
Geometry: TypeAlias = tuple[Any, ...]
GEOMETRIES: dict[str, Geometry] = {
    "full blocks": (1, 64, 8, 8, 32, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1)),
    "one of each": (1, 1, 1, 1, 1, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1)),
    "begun blocks": (3, 33, 9, 11, 17, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1)),
    "everything uneven": (2, 50, 13, 12, 70, (3, 2), (2, 1), (0, 1, 2, 1), (1, 2)),
    "several slabs and groups of images": (9, 400, 12, 12, 48, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1)),
    "groups of rows": (2, 33, 40, 60, 17, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1)),
    "groups of rows of a phase": (2, 33, 80, 120, 17, (3, 3), (2, 2), (1, 1, 1, 1), (1, 1)),
    "a row wider than a task": (1, 16, 2, 1100, 16, (1, 3), (1, 1), (1, 1, 0, 0), (1, 1)),
    "zeros beyond the kernel": (2, 32, 5, 11, 16, (1, 1), (2, 1), (2, 2, 4, 1), (1, 1)),
    "dilation against stride": (1, 40, 12, 30, 20, (3, 3), (2, 3), (3, 0, 0, 4), (2, 3)),
    "stride beyond the kernel": (2, 96, 9, 9, 40, (1, 1), (3, 2), (0, 0, 0, 0), (1, 1)),
}
geometries = pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)


def convolution(geometry: Geometry) -> tuple[Tensor, Convolution]:
    images, inputs, height, width, outputs, kernel, stride, padding, dilation = geometry
    weight = sample(outputs, inputs, *kernel, seed=1)
    bias = sample(outputs, seed=2)
    return sample(images, inputs, height, width), Convolution(weight, bias, stride, padding, dilation, 1)


@with_unit
@geometries
@pytest.mark.parametrize("limits", [(-torch.inf, torch.inf), (0.0, 6.0)], ids=["all", "ReLU6"])
@pytest.mark.parametrize("how", ["alone", "shortcut", "over the shortcut"])
def test_as_close_as_float32(geometry: Geometry, limits: tuple[float, float], how: str) -> None:
    x, plain = convolution(geometry)
    assert plain.bias is not None
    baseline = plain(x)
    expected = F.conv2d(
        F.pad(x.double(), plain.padding), plain.weight.double(), plain.bias.double(), plain.stride, 0, plain.dilation
    )
    shortcut = None if how == "alone" else sample(*baseline.shape, seed=3).contiguous(memory_format=torch.channels_last)
    if shortcut is not None:
        baseline, expected = baseline + shortcut, expected + shortcut.double()
    unit = MatrixConvolution(plain.weight, plain.bias, plain.dilation)
    over = how == "over the shortcut"
    got = unit.run(x, plain.stride, plain.padding, shortcut=shortcut, over=over, limits=limits)
    assert (got is shortcut) == over
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert_no_worse(got, expected.clamp(*limits), baseline.clamp(*limits))


@with_unit
def test_nan_comes_through() -> None:
    x, plain = convolution(GEOMETRIES["begun blocks"])
    x[1, 2, 4, 5] = torch.nan
    got = MatrixConvolution(plain.weight, plain.bias).run(x, padding=plain.padding, limits=(0.0, 6.0))
    assert torch.equal(got.isnan(), plain(x).isnan())


@with_kernel
def test_what_memory_safety_needs_is_refused() -> None:
    x, plain = convolution(GEOMETRIES["full blocks"])
    unit = MatrixConvolution(plain.weight, plain.bias)
    for given, shortcut in ((x[:, :32], None), (x.double(), None), (x, x)):
        with pytest.raises(RuntimeError, match="pysal_amx::bf16x6_convolution_: "):
            unit.run(given, shortcut=shortcut)
    wrong_bits: list[dict[str, Any]] = [{"gates": BITS[1:]}, {"rule": "guided"}]
    wrong_bits += [{"mask": mask, "rule": "plain"} for mask in (BITS[1:], BITS.bool(), BITS.repeat(3))]
    for wrong in wrong_bits:
        with pytest.raises(RuntimeError, match=r"pysal_amx::bf16x6_convolution_: (gates|mask) must be"):
            unit.run(x, **wrong)
    with pytest.raises(RuntimeError, match="its channels a multiple of 16"):
        MatrixConvolution(plain.weight[:24], None).run(x, gates=BITS[: 8 * 8 * 24 // 8])
    with pytest.raises(ValueError, match=r"a kernel of \(3, 3\) does not fit into \(2, 8\)"):
        MatrixConvolution(sample(8, 64, 3, 3), None).run(x[:, :, :2])


@with_kernel
@pytest.mark.parametrize(
    "place", range(6), ids=["row_stride", "column_stride", "top", "left", "row_dilation", "column_dilation"]
)
@pytest.mark.parametrize("number", [-(2**63), -1, 513, 2**31, 2**40, 2**62, 2**63 - 1])
def test_numbers_are_bounded_before_anything_is_made_of_them(place: int, number: int) -> None:
    x, plain = convolution(GEOMETRIES["begun blocks"])
    weight, bias = arranged(plain.weight), sample(plain.weight.shape[0])
    numbers = [1, 1, 0, 0, 1, 1]
    numbers[place] = number
    output = torch.empty(3, 17, 7, 9).contiguous(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match=r"pysal_amx::bf16x6_convolution_: (strides and|kernel, strides)"):
        torch.ops.pysal_amx.bf16x6_convolution_(output, x, weight, bias, None, *numbers, 0.0, 6.0, None, None, -1)


# of the result of "full blocks"
BITS = torch.zeros(8 * 8 * 32 // 8, dtype=torch.uint8)


@with_unit
@pytest.mark.parametrize("upper", [torch.inf, 6.0])
@pytest.mark.parametrize("over", [False, True], ids=["apart", "over the shortcut"])
def test_gates_are_those_of_the_result(upper: float, over: bool) -> None:
    x, plain = convolution((3, 70, 9, 30, 48, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1)))
    x[1, 2, 4, 5] = torch.nan
    shortcut = 10 * sample(3, 48, 9, 30, seed=3).contiguous(memory_format=torch.channels_last)
    gates = torch.full((3 * 48 * 9 * 30 // 8,), 255, dtype=torch.uint8)
    unit = MatrixConvolution(plain.weight, plain.bias)
    got = unit.run(x, padding=plain.padding, shortcut=shortcut, over=over, limits=(0.0, upper), gates=gates)
    assert torch.equal(gates, ops.guided_relu_gates(got, upper))
    assert 0 < gates.float().mean() < 255


@with_unit
@pytest.mark.parametrize("rule", ["plain", "guided", "deconvnet"])
@pytest.mark.parametrize("images", [1, 3, 6], ids="gates of {} images".format)
@pytest.mark.parametrize("over", [False, True], ids=["alone", "over a sum"])
def test_what_gates_let_through(rule: ReluRule, images: int, over: bool) -> None:
    x, plain = convolution((6, 70, 9, 30, 48, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1)))
    x[1, 2, 4, 5] = torch.nan
    _, mask = ops.guided_relu(sample(images, 48, 9, 30, seed=3).contiguous(memory_format=torch.channels_last))
    before = sample(6, 48, 9, 30, seed=4).contiguous(memory_format=torch.channels_last) if over else None
    unit = MatrixConvolution(plain.weight, plain.bias)
    whole = unit.run(x, padding=plain.padding, shortcut=before)
    got = unit.run(x, padding=plain.padding, shortcut=before, over=over, mask=mask, rule=rule)
    expected = [ops.guided_relu_backward(part, mask, rule, channels_last=True) for part in whole.split(images)]
    assert torch.equal(got.nan_to_num(1e9), torch.cat(expected).nan_to_num(1e9))


def test_three_parts_are_the_weight() -> None:
    weight = sample(20, 40, 3, 2)
    parts = arranged(weight)
    assert parts.shape == (2, 3, 2, 2, 3, 16, 32)
    total = parts.double().sum(4).unflatten(-1, (16, 2))  # (K / 16, kh, kw, C / 32, pairs of C, 16 of K, 2)
    found = total.permute(0, 5, 3, 4, 6, 1, 2).reshape(32, 64, 3, 2)
    assert ((found[:20, :40] - weight).abs() <= 2**-24 * weight.abs()).all()
    assert not found[20:].any()
    assert not found[:, 40:].any()


@with_unit
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("padding", [(0, 0, 0, 0), (1, 1, 1, 1), (0, 1, 1, 0)], ids=["none", "all sides", "one side"])
@pytest.mark.parametrize("onto", [False, True], ids=["alone", "onto"])
def test_gradients_are_as_close_as_float32(stride: int, kernel: int, padding: tuple[int, ...], onto: bool) -> None:
    x, plain = convolution((2, 224, 9, 10, 256, (kernel, kernel), (stride, stride), padding, (1, 1)))
    fused = FusedConvolution(plain, None, tuple(x.shape[1:]), torch.float32)
    assert fused.matrix is not None
    # zeros around a single tap that come to lie beyond what it reads are left to oneDNN
    on_unit = isinstance(fused.gradient, (FlippedWithGates, OnMatrixUnitByPhases))
    assert on_unit == (kernel == 3 or padding == (0, 0, 0, 0))
    results: list[Tensor] = []
    before = sample(*x.shape, seed=4).contiguous(memory_format=torch.channels_last)
    for dtype in (torch.float64, torch.float32):
        leaf = x.to(dtype).requires_grad_()
        output = F.conv2d(F.pad(leaf, padding), plain.weight.to(dtype), None, stride)
        grad = sample(*output.shape, seed=5)
        (result,) = torch.autograd.grad(output, leaf, grad.to(dtype))
        results.append(result + before.to(dtype) if onto else result)
    got = fused.input_gradient(grad, x.shape, before.clone(memory_format=torch.preserve_format) if onto else None)
    assert_no_worse(got, *results)


@with_unit
def test_methods_on_a_model_that_runs_there() -> None:
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Conv2d(3, 128, 3, padding=1), nn.ReLU(), nn.Conv2d(128, 160, 3, padding=1), nn.ReLU6())
    model = nn.Sequential(wide, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(160, 5)).eval()
    x = sample(1, 3, 20, 20)
    prepared = pysal.prepare(model, x, batch_size=4)
    assert "1 of them on the matrix unit" in prepared.report()
    exact = pysal.gradient(copy.deepcopy(model).double(), x.double(), 1)
    assert_no_worse(pysal.gradient(prepared, x, 1), exact, pysal.gradient(model, x, 1))
    drops = pysal.leave_one_out(model, x, 1, segments=pysal.Window(4), score="logit")
    found = pysal.leave_one_out(prepared, x, 1, segments=pysal.Window(4), score="logit")
    assert (found - drops).abs().max() <= 1e-4 * drops.abs().max()


class Residual(nn.Module):
    """A strided first layer, three blocks with shortcuts and a head: gradients with one user, with two, and asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 64, 7, 2, 3), nn.ReLU())
        self.first = nn.ModuleList(nn.Conv2d(64, 64, 3, padding=1) for _ in range(5))
        self.second = nn.ModuleList([nn.Conv2d(64, 96, 3, 2, 1), nn.Conv2d(96, 96, 3, padding=1), nn.Conv2d(64, 96, 1, 2)])
        self.relu = nn.ReLU6()
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.relu(self.first[1](self.relu(self.first[0](x))) + x)
        x = self.relu(self.first[3](self.relu(self.first[2](x))) + self.first[4](x))
        x = self.relu(self.second[1](self.relu(self.second[0](x))) + self.second[2](x))
        logits: Tensor = self.head(x)
        return logits


@with_unit
@pytest.mark.parametrize("rule", ["plain", "guided", "deconvnet"])
def test_sweeps_of_a_residual_network_that_runs_there(rule: Literal["plain", "guided", "deconvnet"]) -> None:
    torch.manual_seed(0)
    model = Residual().eval()
    x = sample(3, 3, 20, 20)
    prepared = pysal.prepare(model, x, batch_size=3)
    assert "7 of them on the matrix unit" in prepared.report()

    def sweep(of: nn.Module | pysal.PreparedModel, images: Tensor) -> Tensor:
        if rule == "plain":  # of several classes, which share the images' gates
            return pysal.class_gradients(of, images, [1, 4, 0, 2])
        return pysal.guided_backprop(of, images, 1, rule=rule)

    assert_no_worse(sweep(prepared, x), sweep(copy.deepcopy(model).double(), x.double()), sweep(model, x))


@with_unit
@pytest.mark.parametrize("layer", ["stem", "first.0", "second.1"])
def test_grad_cam_of_a_residual_network_that_runs_there(layer: str) -> None:
    torch.manual_seed(0)
    model = Residual().eval()
    x = sample(3, 3, 20, 20)
    prepared = pysal.prepare(model, x, batch_size=3)
    for method in (pysal.grad_cam, pysal.guided_grad_cam):
        exact = method(copy.deepcopy(model).double(), x.double(), 1, layer=layer)
        assert_no_worse(method(prepared, x, 1, layer=layer), exact, method(model, x, 1, layer=layer))
