"""Winograd's convolutions are as close to the truth as their formula in float32, and zeros stay zeros."""

from typing import Any, TypeAlias

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pysal
from pysal import ops
from pysal.engine.graph.fold import Convolution
from pysal.engine.graph.fused_convolution import FusedConvolution
from pysal.engine.graph.input_gradient import FlippedWithGates, input_gradient
from pysal.engine.graph.winograd import WinogradConvolution, arranged, available
from pysal.engine.model.relu_rules import ReluRule
from pysal.engine.prepared.gains import Gains
from pysal.testing import assert_no_worse, required, sample
from tests.engine.test_incremental import (
    RELATIVE,
    ROUNDINGS,
    WHOLE_SHARES,
    changed_images,
    engine_of,
    outputs_of,
    seeded,
    whole_share,
)

compiled = pytest.mark.skipif(not available() and "cpu" not in required(), reason="the CPU kernels are not compiled")

# images, C, H, W, K, (left, right, top, bottom)
Geometry: TypeAlias = tuple[int, int, int, int, int, tuple[int, int, int, int]]
GEOMETRIES: dict[str, Geometry] = {
    "whole tiles": (1, 16, 8, 8, 32, (1, 1, 1, 1)),
    "tiles that reach beyond": (2, 48, 9, 14, 16, (1, 1, 1, 1)),
    "no padding": (3, 32, 7, 11, 48, (0, 0, 0, 0)),
    "two rows of padding": (1, 16, 5, 6, 16, (2, 2, 2, 2)),
    "padding on one side": (2, 16, 10, 7, 16, (0, 2, 1, 0)),
    "one pixel": (5, 16, 1, 1, 16, (1, 1, 1, 1)),
    "a row": (1, 32, 1, 23, 16, (1, 1, 1, 1)),
    "several tasks": (9, 160, 12, 12, 64, (1, 1, 1, 1)),
}
geometries = pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
POINTS = (0.0, 11 / 16, -11 / 16, 1.5, -1.5)


def transforms(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return what takes 6 numbers to the points, and the products at the points to 4 numbers, (6, 6) and (4, 6)."""
    to_points = torch.zeros(6, 6, dtype=torch.float64)
    for row, roots in enumerate([[q for q in POINTS if q != p] for p in POINTS] + [list(POINTS)]):
        polynomial = torch.ones(1, dtype=torch.float64)
        for root in roots:
            polynomial = F.pad(polynomial, (1, 0)) - root * F.pad(polynomial, (0, 1))
        to_points[row, : len(polynomial)] = polynomial
    from_points = torch.tensor([[p**i for p in POINTS] + [float(i == 3)] for i in range(4)], dtype=torch.float64)
    return to_points.to(dtype), from_points.to(dtype)


def formula(x: Tensor, weight: Tensor, bias: Tensor, padding: tuple[int, int, int, int]) -> Tensor:
    """Return the convolution by plain torch, in the dtype of x and by Winograd's algorithm."""
    left, right, top, bottom = padding
    height, width = x.shape[2] + top + bottom - 2, x.shape[3] + left + right - 2
    padded = F.pad(x, (left, -width % 4 + right, top, -height % 4 + bottom))
    windows = padded.unfold(2, 6, 4).unfold(3, 6, 4)
    to_points, from_points = transforms(x.dtype)
    values = torch.einsum("jb,ncyxib->ijncyx", to_points, torch.einsum("ia,ncyxab->ncyxib", to_points, windows))
    outputs, inputs = weight.shape[:2]
    at_points = arranged(weight).transpose(1, 2).reshape(6, 6, inputs, outputs)
    products = torch.einsum("ijncyx,ijck->ijnkyx", values, at_points)
    result = torch.einsum("qj,pjnkyx->nkypxq", from_points, torch.einsum("pi,ijnkyx->pjnkyx", from_points, products))
    return result.flatten(4, 5).flatten(2, 3)[:, :, :height, :width] + bias[:, None, None]


def made(geometry: Geometry) -> tuple[Tensor, Convolution, Tensor, Tensor]:
    """Return images, a convolution of them, the truth in float64, and what the formula gives in float32."""
    images, inputs, height, width, outputs, padding = geometry
    x, weight, bias = sample(images, inputs, height, width), sample(outputs, inputs, 3, 3, seed=1), sample(outputs, seed=2)
    truth = F.conv2d(F.pad(x.double(), padding), weight.double(), bias.double())
    return x, Convolution(weight, bias, (1, 1), padding, (1, 1), 1), truth, formula(x, weight, bias, padding)


@compiled
@geometries
@pytest.mark.parametrize("limits", [(-torch.inf, torch.inf), (0.0, 6.0)], ids=["all", "ReLU6"])
@pytest.mark.parametrize("how", ["alone", "shortcut", "over the shortcut"])
def test_as_close_as_the_formula(geometry: Geometry, limits: tuple[float, float], how: str) -> None:
    x, plain, truth, baseline = made(geometry)
    assert WinogradConvolution.fits(plain)
    shortcut = None if how == "alone" else sample(*truth.shape, seed=3).contiguous(memory_format=torch.channels_last)
    if shortcut is not None:
        truth, baseline = truth + shortcut, baseline + shortcut
    over = how == "over the shortcut"
    unit = WinogradConvolution(plain.weight, plain.bias)
    got = unit.run(x, padding=plain.padding, shortcut=shortcut, over=over, limits=limits)
    assert (got is shortcut) == over
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert_no_worse(got, truth.clamp(*limits), baseline.clamp(*limits))


def test_the_formula_is_the_convolution() -> None:
    images, inputs, height, width, outputs, padding = GEOMETRIES["padding on one side"]
    x, weight = sample(images, inputs, height, width).double(), sample(outputs, inputs, 3, 3, seed=1).double()
    found = formula(x, weight, torch.zeros(outputs, dtype=torch.float64), padding)
    torch.testing.assert_close(found, F.conv2d(F.pad(x, padding), weight), rtol=1e-12, atol=1e-12)


@compiled
@geometries
@pytest.mark.parametrize("upper", [torch.inf, 1.0])
def test_gates_are_those_of_the_result(geometry: Geometry, upper: float) -> None:
    x, plain, truth, _ = made(geometry)
    unit, gates = WinogradConvolution(plain.weight, plain.bias), torch.full((truth.numel() // 8,), 170, dtype=torch.uint8)
    got = unit.run(x, padding=plain.padding, limits=(0.0, upper), gates=gates)
    assert torch.equal(gates, ops.guided_relu_gates(got, upper))


@compiled
@geometries
@pytest.mark.parametrize("rule", ["plain", "guided", "deconvnet"])
def test_a_rule_lets_through_what_it_does_elsewhere(geometry: Geometry, rule: ReluRule) -> None:
    x, plain, truth, _ = made(geometry)
    unit = WinogradConvolution(plain.weight, None)
    whole = unit.run(x, padding=plain.padding)
    mask = ops.guided_relu_gates(sample(*truth.shape, seed=4).contiguous(memory_format=torch.channels_last), torch.inf)
    expected = whole.clone(memory_format=torch.channels_last)
    ops.guided_relu_backward_(expected, mask, rule, channels_last=expected.shape[2:] != (1, 1))
    assert torch.equal(unit.run(x, padding=plain.padding, mask=mask, rule=rule), expected)


@compiled
def test_a_mask_of_fewer_images_comes_again() -> None:
    x, plain, truth, _ = made(GEOMETRIES["tiles that reach beyond"])
    unit = WinogradConvolution(plain.weight, None)
    mask = ops.guided_relu_gates(sample(*truth.shape, seed=4).contiguous(memory_format=torch.channels_last), torch.inf)
    once = unit.run(x, padding=plain.padding, mask=mask, rule="guided")
    again = unit.run(torch.cat([x, x, x]), padding=plain.padding, mask=mask, rule="guided")
    assert torch.equal(again, torch.cat([once, once, once]))


@compiled
def test_an_image_is_the_same_alone_and_in_every_number_of_threads() -> None:
    x, plain, _, _ = made(GEOMETRIES["several tasks"])
    unit, threads = WinogradConvolution(plain.weight, plain.bias), torch.get_num_threads()
    whole = unit.run(x, padding=plain.padding)
    assert torch.equal(unit.run(x[3:4], padding=plain.padding), whole[3:4])
    try:
        torch.set_num_threads(3)
        assert torch.equal(unit.run(x, padding=plain.padding), whole)
    finally:
        torch.set_num_threads(threads)


@compiled
@pytest.mark.parametrize("fill", [0.0, -0.0])
def test_where_a_window_sees_zeros_alone_the_result_is_the_bias(fill: float) -> None:
    """Rounding errors of a tile would open gates of ReLUs there, in half of the channels."""
    x, plain, _, _ = made((2, 32, 15, 17, 16, (1, 1, 1, 1)))
    x[:, :, 3:9, 5:] = fill
    x[1, :, 10:, :6] = fill
    x[0, 31, 5, 8] = 1.0  # in the last channel alone
    expected = F.conv2d((x != 0).double(), torch.ones(16, 32, 3, 3, dtype=torch.float64), padding=1) == 0
    assert expected.any()
    got = WinogradConvolution(plain.weight, None).run(x, padding=plain.padding)
    assert torch.equal(got == 0, expected)
    assert plain.bias is not None
    shifted = WinogradConvolution(plain.weight, plain.bias).run(x, padding=plain.padding)
    assert torch.equal(shifted[expected], plain.bias[:, None, None].expand_as(shifted)[expected])


@compiled
def test_nan_comes_through() -> None:
    x, plain, _, _ = made(GEOMETRIES["tiles that reach beyond"])
    x[1, 47, 4, 5] = torch.nan
    got = WinogradConvolution(plain.weight, plain.bias).run(x, padding=plain.padding, limits=(0.0, 6.0))
    expected = F.conv2d(x, plain.weight, padding=1).isnan()
    assert got.isnan()[expected].all()
    assert not got[0].isnan().any()


@compiled
def test_what_memory_safety_needs_is_refused() -> None:
    x, plain, truth, _ = made(GEOMETRIES["whole tiles"])
    unit = WinogradConvolution(plain.weight, plain.bias)
    bits = torch.zeros(truth.numel() // 8, dtype=torch.uint8)
    wrong: list[tuple[Tensor, dict[str, Any]]] = [
        (x[:, :15], {}),
        (x.double(), {}),
        (x, {"shortcut": x}),
        (x, {"gates": bits[1:]}),
        (x, {"rule": "guided"}),
        (x, {"rule": "plain", "mask": bits[1:]}),
        (x, {"rule": "plain", "mask": bits.bool()}),
        (x, {"rule": "plain", "mask": bits.repeat(3)}),
        (x, {"padding": (3, 1, 1, 1)}),
        (x, {"padding": (1, 1, -1, 1)}),
        (x, {"padding": (0, 9, 0, 0)}),
    ]
    for images, arguments in wrong:
        with pytest.raises(RuntimeError, match="pysal_winograd::convolution_: "):
            unit.run(images, **({"padding": plain.padding} | arguments))
    with pytest.raises(RuntimeError, match="channels must be multiples of 16, got 24 and 32"):
        unit.run(sample(1, 24, 8, 8))
    output = torch.empty(1, 32, 8, 8)
    with pytest.raises(RuntimeError, match="output must be channels_last"):
        torch.ops.pysal_winograd.convolution_(
            output, x, arranged(plain.weight), None, None, 1, 1, -torch.inf, torch.inf, None, None, -1
        )


@pytest.mark.parametrize(
    "changed",
    [
        {"stride": (2, 1)},
        {"dilation": (1, 2)},
        {"groups": 2},
        {"padding": (3, 1, 1, 1)},
        {"kernel": (3, 1)},
        {"kernel": (5, 5)},
        {"outputs": 40},
        {"size": (9, 9)},
        {"dtype": torch.float64},
    ],
    ids=str,
)
def test_other_convolutions_run_as_before(changed: dict[str, Any]) -> None:
    kinds = {"stride": (1, 1), "dilation": (1, 1), "groups": 1, "padding": (1, 1, 1, 1), "kernel": (3, 3), "outputs": 32}
    kinds = kinds | {"size": (14, 14), "dtype": torch.float32} | changed
    weight = sample(kinds["outputs"], 32 // kinds["groups"], *kinds["kernel"], dtype=kinds["dtype"])  # type: ignore[operator]
    convolution = Convolution(weight, None, kinds["stride"], kinds["padding"], kinds["dilation"], kinds["groups"])  # type: ignore[arg-type]
    assert not WinogradConvolution.suited(convolution, kinds["size"])  # type: ignore[arg-type]


@compiled
@pytest.mark.parametrize("padding", [(1, 1, 1, 1), (0, 0, 0, 0), (0, 1, 2, 1)], ids=str)
def test_the_gradient_is_that_of_the_convolution(padding: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pysal.engine.graph.matrix_unit.MatrixConvolution.suited", lambda *_, **__: False)
    convolution = Convolution(sample(32, 48, 3, 3, seed=1), None, (1, 1), padding, (1, 1), 1)
    way = input_gradient(convolution, convolution, (48, 13, 17), torch.float32)
    assert isinstance(way, FlippedWithGates)
    leaf = torch.zeros(2, 48, 13, 17, dtype=torch.float64, requires_grad=True)
    output = F.conv2d(F.pad(leaf, padding), convolution.weight.double())
    grad = sample(*output.shape, seed=2)
    (truth,) = torch.autograd.grad(output, leaf, grad.double())
    flipped = convolution.weight.flip(2, 3).transpose(0, 1).contiguous()
    left, right, top, bottom = padding
    baseline = formula(grad, flipped, torch.zeros(48), (2 - left, 2 - right, 2 - top, 2 - bottom))
    assert_no_worse(way.run(grad, (13, 17), None), truth, baseline)


@compiled
def test_a_prepared_network_runs_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pysal.engine.graph.matrix_unit.MatrixConvolution.suited", lambda *_, **__: False)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.Conv2d(32, 32, 3, padding=1)
            self.norm = nn.BatchNorm2d(32)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x + self.second(F.relu(self.norm(self.first(x)))))

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), Block(), Block(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    x = sample(2, 3, 18, 18)
    x[:, :, :, 9:] = 0
    fast = pysal.prepare(model, x[:1], batch_size=2, gains=Gains(2.0, 2.0))
    assert "4 of them by Winograd's algorithm" in fast.report()
    fused = [module for module in fast._graph.modules() if isinstance(module, FusedConvolution)]  # type: ignore[union-attr]
    assert [module.winograd is not None for module in fused] == [False, True, True, True, True]
    for method in (pysal.gradient, pysal.guided_backprop):
        torch.testing.assert_close(method(fast, x, 3), method(model, x, 3), rtol=1e-4, atol=1e-6)


@compiled
@pytest.mark.parametrize(
    "pool", [nn.MaxPool2d(2), nn.AdaptiveMaxPool2d(10), nn.Softmax(1)], ids=lambda pool: type(pool).__name__
)
def test_ties_before_max_pooling_stay_ties(pool: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an even area all windows see the same: rounding errors that differ within a tile would send gradients elsewhere."""
    monkeypatch.setattr("pysal.engine.graph.matrix_unit.MatrixConvolution.suited", lambda *_, **__: False)
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), pool]
    model = nn.Sequential(*layers, nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    x = torch.full((1, 3, 26, 26), 0.5)
    fast = pysal.prepare(model, sample(1, 3, 26, 26), batch_size=1, gains=Gains(2.0, 2.0))
    assert fast.program is not None, fast.report()
    fused = [module for module in fast._graph.modules() if isinstance(module, FusedConvolution)]  # type: ignore[union-attr]
    ties = not isinstance(pool, nn.Softmax)
    assert [module.winograd is not None for module in fused] == [False, not ties, not ties, True]
    assert all(isinstance(module.gradient, FlippedWithGates) for module in fused[1:])
    torch.testing.assert_close(pysal.gradient(fast, x, 3), pysal.gradient(model, x, 3), rtol=1e-4, atol=1e-7)


@compiled
@pytest.mark.parametrize("share", WHOLE_SHARES)
def test_boxes_run_so(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also layers that max pooling follows, which no gradient goes through here, and maps too small for it alone."""
    monkeypatch.setattr("pysal.engine.graph.matrix_unit.MatrixConvolution.suited", lambda *_, **__: False)

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x + self.second(F.relu6(self.first(x))))

    def layers() -> nn.Module:
        head = [nn.Conv2d(16, 32, 3, padding=(0, 2)), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), Residual(), nn.MaxPool2d(3, 3), Residual(), *head)

    exact, image = seeded(layers, 3, 31, 26)
    boxes = [(0, 0, 7, 7), (12, 9, 20, 16), (24, 18, 31, 26), (13, 0, 14, 1), (5, 20, 9, 26)]
    fast, seen = engine_of(exact.float(), image.float()), list[tuple[int, ...]]()
    run = WinogradConvolution.run

    def watched(self: WinogradConvolution, input: Tensor, *args: Any, **options: Any) -> Tensor:
        seen.append(tuple(input.shape))
        return run(self, input, *args, **options)

    images = changed_images(image, boxes)
    with torch.no_grad():
        expected = exact.double()(images)
        drop = float((expected - exact(image)).abs().max())
    with whole_share(share):
        monkeypatch.setattr(WinogradConvolution, "run", watched)
        got = outputs_of(fast, image.float(), images.float(), boxes)
    assert all(module.winograd is None for module in fast.graph.modules() if isinstance(module, FusedConvolution))
    assert [shape[0] for shape in seen] == [len(boxes)] * 5
    allowed = RELATIVE[torch.float32] * drop + ROUNDINGS * torch.finfo(torch.float32).eps * float(expected.abs().max())
    assert float((got - expected).abs().max()) <= allowed


@compiled
def test_it_is_taken_where_tiles_are_full_and_weights_are_not_most_of_the_work() -> None:
    few, many = (WinogradConvolution(torch.zeros(k, c, 3, 3), None) for c, k in ((32, 16), (512, 512)))
    of = lambda images, side, channels: torch.empty(images, channels, side + 2, side + 2, device="meta")  # noqa: E731
    assert [few.gains(of(1, side, 32)) for side in (1, 2, 3, 4, 5, 8)] == [False, False, True, True, True, True]
    assert [many.gains(of(images, 7, 512)) for images in (1, 2, 16)] == [False, True, True]
    assert [many.gains(of(1, side, 512)) for side in (4, 14)] == [False, True]
    assert few.gains(torch.empty(1, 32, 2, 1, device="meta"), (1, 1)) is False
    assert few.gains(torch.empty(1, 32, 4, 3, device="meta"), (1, 1)) is True
    assert few.gains(torch.empty(1, 32, 2, 9, device="meta")) is False  # nothing is left of two rows
