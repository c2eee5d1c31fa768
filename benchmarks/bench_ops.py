"""Each op against its eager reference, at the sizes EfficientNet-Lite0 at 224 x 224 gives it. Run by `make bench`."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.common import alternate, as_rows, peak_memory
from benchmarks.conftest import Report
from pysal import _library
from pysal.testing import assert_no_worse, require_native

F32, BF16 = torch.float32, torch.bfloat16


@dataclass(frozen=True)
class Case:
    """One op at one size: `build(device)` returns its arguments in the schema's order."""

    op: str
    shape: str
    dtype: torch.dtype
    build: Callable[[torch.device], tuple[Any, ...]]

    def __str__(self) -> str:
        return f"{self.op}-{self.shape}-{str(self.dtype).removeprefix('torch.')}"


def rows_of(chunk: int, images: int, device: torch.device) -> Tensor:
    """A chunk that mixes images: 0, 0, ..., 1, 1, ..."""
    return (torch.arange(chunk, device=device) * images // chunk).to(torch.int32)


def grid_labels(images: int, cells: int, device: torch.device) -> Tensor:
    """(B, 224, 224) labels of a cells x cells grid."""
    line = torch.arange(224, device=device) * cells // 224
    return (line[:, None] * cells + line).to(torch.int32).expand(images, 224, 224).contiguous()


def windows(size: int, stride: int, device: torch.device) -> Tensor:
    """(S, 4) sliding windows of a 224 x 224 image."""
    starts = torch.arange(0, 224 - size + 1, stride, dtype=torch.int32, device=device)
    top, left = (values.flatten() for values in torch.meshgrid(starts, starts, indexing="ij"))
    return torch.stack([top, left, top + size, left + size], 1)


def occlusion(dtype: torch.dtype, channels_last: bool) -> Callable[[torch.device], tuple[Any, ...]]:
    """32 occluded images of 2, by a 14 x 14 grid."""

    def build(device: torch.device) -> tuple[Any, ...]:
        images, fills = torch.rand(2, 3, 224, 224, device=device), torch.zeros(2, 3, 224, 224, device=device)
        ids = torch.arange(32, dtype=torch.int32, device=device)
        return images, fills, grid_labels(2, 14, device), rows_of(32, 2, device), ids, dtype, channels_last, None, None

    return build


def occlusion_boxes(device: torch.device) -> tuple[Any, ...]:
    """32 occluded images of 2, by sliding windows."""
    images, fills = torch.rand(2, 3, 224, 224, device=device), torch.zeros(2, 3, 224, 224, device=device)
    return images, fills, windows(32, 8, device)[:32].contiguous(), rows_of(32, 2, device), F32, False, None, None


def activation(channels_last: bool, device: torch.device) -> Tensor:
    """An early activation of 8 images."""
    values = torch.randn(8, 96, 112, 112, device=device)
    return values.contiguous(memory_format=torch.channels_last) if channels_last else values


def guided(channels_last: bool) -> Callable[[torch.device], tuple[Any, ...]]:
    """ReLU6 under the guided rule."""
    return lambda device: (activation(channels_last, device), 6.0, 1)


def guided_backward(channels_last: bool) -> Callable[[torch.device], tuple[Any, ...]]:
    """Its backward, with the gates that the reference gives."""

    def build(device: torch.device) -> tuple[Any, ...]:
        gates = _library.REFERENCES["guided_relu"](activation(channels_last, device), 6.0, 1)[1]
        return activation(channels_last, device), gates, 1, channels_last

    return build


def epilogue(device: torch.device) -> tuple[Any, ...]:
    """Bias, shortcut and ReLU of a convolution's result, with gates."""
    return activation(True, device), torch.rand(96, device=device), activation(True, device), 1, 6.0, True


def epilogue_backward(device: torch.device) -> tuple[Any, ...]:
    """Its backward: the sum of two gradients through the gates."""
    grad, gates, rule, channels_last = guided_backward(True)(device)
    return grad, activation(True, device), gates, 1, 6.0, rule, 8, channels_last


def scale_space(*more: Any) -> Callable[[torch.device], tuple[Any, ...]]:
    """16 scales, 0 to 50 pixels, of one image."""
    sigmas = [50.0 * step / 15 for step in range(16)]
    return lambda device: (torch.rand(1, 3, 224, 224, device=device).expand(16, -1, -1, -1).contiguous(), sigmas, *more)


def path_points(dtype: torch.dtype, channels_last: bool) -> Callable[[torch.device], tuple[Any, ...]]:
    """16 points on the paths of 2 images."""

    def build(device: torch.device) -> tuple[Any, ...]:
        alphas = torch.linspace(0, 1, 16, dtype=torch.float64, device=device)
        images = torch.rand(2, 2, 3, 224, 224, device=device)
        return images[0], images[1], rows_of(16, 2, device), alphas, dtype, channels_last

    return build


def path_accumulate(device: torch.device) -> tuple[Any, ...]:
    """16 weighted gradients of 2 images, each with its own factor, as in Blur IG."""
    gradients, factors = torch.randn(2, 16, 3, 224, 224, device=device)
    weights = torch.full((16,), 1 / 16, dtype=torch.float64, device=device)
    return torch.zeros(2, 3, 224, 224, device=device), gradients, factors, rows_of(16, 2, device), weights


def path_moments(device: torch.device) -> tuple[Any, ...]:
    """16 samples of 2 images into running moments."""
    mean, squares = torch.zeros(2, 2, 3, 224, 224, device=device)
    counts = torch.zeros(2, dtype=torch.int64, device=device)
    return mean, squares, counts, torch.randn(16, 3, 224, 224, device=device), rows_of(16, 2, device)


def noise(dtype: torch.dtype) -> Callable[[torch.device], tuple[Any, ...]]:
    """16 noisy copies of 2 images."""

    def build(device: torch.device) -> tuple[Any, ...]:
        scales = torch.full((2,), 0.15, dtype=torch.float64, device=device)
        samples = torch.arange(16, device=device)
        rows = rows_of(16, 2, device)
        return torch.rand(2, 3, 224, 224, device=device), scales, 7, rows, rows.long(), samples, dtype, False

    return build


def boxes_in_a_map(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """24 boxes of 10 x 10 in an activation of 480 x 14 x 14, and corners of the regions that a 5 x 5 convolution reads."""
    map = torch.randn(1, 480, 14, 14, device=device).contiguous(memory_format=torch.channels_last)
    boxes = torch.randn(24, 480, 10, 10, device=device).contiguous(memory_format=torch.channels_last)
    origins = torch.tensor([[n % 5, n // 5] for n in range(24)], dtype=torch.int32, device=device)
    return map, boxes, origins, (origins - 2).clamp(-2, 0)


def box_depthwise(device: torch.device) -> tuple[Any, ...]:
    """That convolution, with ReLU6."""
    weight, bias = torch.randn(5, 5, 480, device=device), torch.zeros(480, device=device)
    return *boxes_in_a_map(device), 14, 14, weight, bias, 1, 1, 1, 1, 0.0, 6.0


CASES = [
    Case(
        "box_regions", "24 x 480 x 10 x 10 -> 18 x 18", F32, lambda device: (*boxes_in_a_map(device), 18, 18, 1, 1, 0.0),
    ),
    Case("box_regions_depthwise", "24 x 480 x 10 x 10 -> 14 x 14, 5 x 5", F32, box_depthwise),
    Case("box_regions_sums", "24 x 480 x 10 x 10", F32, lambda device: boxes_in_a_map(device)[:3]),
    Case("occlusion_masks", "2 -> 32 x 3 x 224 x 224", F32, occlusion(F32, False)),
    Case("occlusion_masks", "2 -> 32 x 3 x 224 x 224 channels_last", F32, occlusion(F32, True)),
    Case("occlusion_masks", "2 -> 32 x 3 x 224 x 224 channels_last", BF16, occlusion(BF16, True)),
    Case("occlusion_masks_boxes", "2 -> 32 x 3 x 224 x 224", F32, occlusion_boxes),
    Case(
        "occlusion_masks_map", "4 x 10 x 196 -> 224 x 224", F32,
        lambda device: (torch.rand(4, 10, 196, device=device), grid_labels(4, 14, device)),
    ),
    Case(
        "occlusion_masks_boxes_map", "4 x 10 x 169 -> 224 x 224", F32,
        lambda device: (torch.rand(4, 10, 169, device=device), windows(32, 16, device), 224, 224),
    ),
    Case("guided_relu", "8 x 96 x 112 x 112", F32, guided(False)),
    Case("guided_relu", "8 x 96 x 112 x 112 channels_last", F32, guided(True)),
    Case("guided_relu_backward", "8 x 96 x 112 x 112", F32, guided_backward(False)),
    Case("guided_relu_backward", "8 x 96 x 112 x 112 channels_last", F32, guided_backward(True)),
    Case("guided_relu_gates", "8 x 96 x 112 x 112", F32, lambda device: (activation(False, device), 6.0)),
    Case("guided_relu_gates", "8 x 96 x 112 x 112 channels_last", F32, lambda device: (activation(True, device), 6.0)),
    Case("guided_relu_backward_", "8 x 96 x 112 x 112", F32, guided_backward(False)),
    Case("guided_relu_backward_", "8 x 96 x 112 x 112 channels_last", F32, guided_backward(True)),
    Case("epilogue_", "8 x 96 x 112 x 112 channels_last", F32, epilogue),
    Case("epilogue_backward_", "8 x 96 x 112 x 112 channels_last", F32, epilogue_backward),
    Case("gaussian_scale_space", "16 x 3 x 224 x 224, sigma 0 to 50", F32, scale_space(0)),
    Case("gaussian_scale_space_derivative", "16 x 3 x 224 x 224, sigma 0 to 50", F32, scale_space(0.01, 0)),
    Case("path_integral_points", "2 -> 16 x 3 x 224 x 224", F32, path_points(F32, False)),
    Case("path_integral_points", "2 -> 16 x 3 x 224 x 224 channels_last", BF16, path_points(BF16, True)),
    Case("path_integral_accumulate_", "16 -> 2 x 3 x 224 x 224", F32, path_accumulate),
    Case("path_integral_moments_", "16 -> 2 x 3 x 224 x 224", F32, path_moments),
    Case(
        "path_integral_product", "8 x 3 x 224 x 224", F32,
        lambda device: tuple(torch.rand(3, 8, 3, 224, 224, device=device)),
    ),
    Case("gaussian_noise", "2 -> 16 x 3 x 224 x 224", F32, noise(F32)),
    Case(
        "gaussian_noise_bits", "16 x 150528", torch.int64,
        lambda device: (7, torch.zeros(16, dtype=torch.int64, device=device), torch.arange(16, device=device), 150528),
    ),
    Case(
        "grad_cam", "8 x 1280 x 7 x 7 -> 224 x 224", F32,
        lambda device: (*torch.randn(2, 8, 1280, 7, 7, device=device), 224, 224, True),
    ),
]  # fmt: skip


def written(op: str, arguments: tuple[Any, ...]) -> list[Tensor]:
    """The arguments that the op writes, by its schema."""
    schema = torch._C.parse_schema(f"pysal::{op}{_library.SCHEMAS[op]}")
    pairs = zip(schema.arguments, arguments, strict=True)
    return [value for argument, value in pairs if argument.alias_info is not None and argument.alias_info.is_write]


def results(op: str, call: Callable[..., Any], arguments: tuple[Any, ...]) -> list[Tensor]:
    """What a call gives: the tensors it returns and those it writes, computed on copies of the arguments."""
    copies = tuple(value.clone() if isinstance(value, Tensor) else value for value in arguments)
    returned = call(*copies)
    if isinstance(returned, Tensor):
        returned = [returned]
    return [*(returned or ()), *written(op, copies)]


def in_float64(value: Any) -> Any:
    """The same argument for the oracle."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.double()
    return torch.float64 if isinstance(value, torch.dtype) else value


def check(op: str, call: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """Hold a candidate against the float64 oracle by the rule of the tests."""
    reference = _library.REFERENCES[op]
    truth = results(op, reference, tuple(in_float64(value) for value in arguments))
    plain = results(op, reference, arguments)
    for ours, exact, baseline in zip(results(op, call, arguments), truth, plain, strict=True):
        if ours.is_floating_point():
            assert_no_worse(ours, exact, baseline)
        else:
            assert torch.equal(ours, exact)


def traffic(op: str, arguments: tuple[Any, ...], call: Callable[..., Any]) -> int:
    """The bytes that must move: every argument read once, every result written once."""
    tensors = [value for value in arguments if isinstance(value, Tensor)]
    return sum(tensor.nbytes for tensor in [*tensors, *results(op, call, arguments)])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_op(case: Case, report: Report, benchmark: Any, request: pytest.FixtureRequest) -> None:
    """Check, then time, one op."""
    device, reference = report.device, _library.REFERENCES[case.op]
    require_native(case.op, device.type)
    native = getattr(torch.ops.pysal, case.op).default
    candidates: dict[str, Callable[..., Any]] = {"reference": reference}
    failed: dict[str, str] = {}
    arguments = case.build(device)
    check(case.op, native, arguments)
    if request.config.getoption("--with-compile"):
        compiled = torch.compile(reference, dynamic=False)
        try:
            check(case.op, compiled, arguments)
            candidates["compiled"] = compiled
        except Exception as error:  # a peer that cannot run is a row of its own
            failed["compiled"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    candidates["pysal"] = native

    bytes_moved = traffic(case.op, arguments, native)
    sets = [arguments]
    if device.type == "cuda":
        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        sets += [case.build(device) for _ in range(math.ceil(2 * l2_bytes / bytes_moved))]
    with torch.no_grad():
        peaks = {name: peak_memory(lambda call=call: call(*arguments), device) for name, call in candidates.items()}
        samples, calls, replayed = alternate(benchmark, candidates, sets, device)
    report.rows += as_rows(
        samples, failed, calls, report.bandwidth, peaks, replayed,
        op=case.op, case=case.shape, dtype=str(case.dtype).removeprefix("torch."), device=str(device),
        bytes_moved=bytes_moved,
    )  # fmt: skip
