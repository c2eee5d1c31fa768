"""occlusion_masks: copies are exact, maps no worse than plain torch, derivatives those of a selection and a mean."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

import pysal.ops as ops
from pysal.reference import occlusion_masks as reference
from pysal.testing import (
    DTYPES,
    Backend,
    assert_no_worse,
    assert_same_layout,
    backends,
    layouts,
    require_native,
    sample,
    with_last_row,
)

NATIVE = pytest.mark.parametrize("backend", backends(native_only=True), ids=str)
ALL = pytest.mark.parametrize("backend", backends(), ids=str)
# odd, one pixel, one channel, one line, more than a band of lines and more rows than a task takes
SHAPES = [(2, 3, 7, 9), (1, 1, 1, 1), (3, 1, 5, 4), (1, 4, 1, 70), (2, 3, 65, 130), (2, 5, 40, 33)]


def index(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def segmented(shape: tuple[int, ...], rows: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Return images, fills, labels with runs of equal ones, rows and ids, some of which no pixel has."""
    batch, _, height, width = shape
    generator = torch.Generator().manual_seed(rows)
    blocks = torch.randint(-1, 6, (batch, height // 3 + 1, width // 5 + 1), generator=generator, dtype=torch.int32)
    labels = blocks.repeat_interleave(3, 1).repeat_interleave(5, 2)[:, :height, :width].contiguous()
    return (
        sample(*shape, dtype=dtype, seed=1),
        sample(*shape, dtype=dtype, seed=2),
        labels,
        torch.randint(batch, (rows,), generator=generator, dtype=torch.int32),
        torch.randint(-2, 8, (rows,), generator=generator, dtype=torch.int32),
    )


def normalisation(channels: int) -> tuple[Tensor, Tensor]:
    """Return a mean and a std for each channel."""
    return sample(channels, dtype=torch.float64, seed=8), sample(channels, dtype=torch.float64, seed=9, low=0.2)


def boxed(count: int, height: int, width: int) -> Tensor:
    """Return boxes inside the image: any, among them an empty one and the whole image."""
    generator = torch.Generator().manual_seed(count)
    y = torch.randint(height + 1, (count, 2), generator=generator, dtype=torch.int32).sort(1).values
    x = torch.randint(width + 1, (count, 2), generator=generator, dtype=torch.int32).sort(1).values
    boxes = torch.stack([y[:, 0], x[:, 0], y[:, 1], x[:, 1]], dim=1)
    boxes[:1] = index(0, 0, height, width)
    boxes[1:2] = index(0, 0, 0, width)
    return boxes


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("target", DTYPES, ids=str)
@pytest.mark.parametrize("source", DTYPES, ids=str)
@NATIVE
def test_matches_reference(backend: Backend, source: torch.dtype, target: torch.dtype, channels_last: bool) -> None:
    for shape in SHAPES if source == torch.float32 else SHAPES[:1]:
        for rows in (1, 37):
            images, fills, labels, of, ids = segmented(shape, rows, source)
            boxes = boxed(rows, *shape[2:])
            for name, arguments in (
                ("occlusion_masks", (images, fills, labels, of, ids)),
                ("occlusion_masks_boxes", (images, fills, boxes, of)),
            ):
                on_device = [argument.to(backend.device) for argument in arguments]
                for factors in ((None, None), normalisation(shape[1])):
                    given = [factor if factor is None else factor.to(backend.device) for factor in factors]
                    out = backend.op(name)(*on_device, target, channels_last, *given).cpu()
                    expected = getattr(reference, name)(*arguments, target, channels_last, *factors)
                    assert_same_layout(out, expected)
                    assert torch.equal(out, expected)


@ALL
def test_normalisation_is_that_of_torchvision(backend: Backend) -> None:
    """Normalising what is written is normalising what was written, up to the rounding of 1 / std."""
    images, fills, labels, rows, ids = (value.to(backend.device) for value in segmented((2, 3, 7, 9), 6))
    mean, std = torch.tensor([0.485, 0.456, 0.406]).double(), torch.tensor([0.229, 0.224, 0.225]).double()
    plain = backend.op("occlusion_masks")(images, fills, labels, rows, ids, torch.float64, True)
    factors = (mean.to(backend.device), std.to(backend.device))
    out = backend.op("occlusion_masks")(images, fills, labels, rows, ids, torch.float32, True, *factors).cpu()
    expected = (plain.cpu() - mean[:, None, None]) / std[:, None, None]
    once = (plain.cpu().float() - mean.float()[:, None, None]) / std.float()[:, None, None]
    assert_no_worse(out, expected, once)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@NATIVE
def test_map_matches_reference(backend: Backend, dtype: torch.dtype) -> None:
    for batch, classes, segments, height, width in (
        (2, 3, 5, 7, 9),
        (1, 1, 1, 1, 1),
        (1, 2, 40, 65, 130),
        (1, 1, 0, 3, 3),
    ):
        scores = sample(batch, classes, segments, dtype=dtype)
        generator = torch.Generator().manual_seed(0)
        labels = torch.randint(-1, segments + 2, (batch, height, width), generator=generator, dtype=torch.int32)
        out = backend.op("occlusion_masks_map")(scores.to(backend.device), labels.to(backend.device)).cpu()
        assert_same_layout(out, reference.occlusion_masks_map(scores, labels))
        assert torch.equal(out, reference.occlusion_masks_map(scores, labels))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@NATIVE
def test_boxes_map_matches_reference(backend: Backend, dtype: torch.dtype) -> None:
    for batch, classes, segments, height, width in (
        (2, 3, 6, 7, 9),
        (1, 1, 1, 1, 1),
        (1, 2, 30, 65, 130),
        (2, 1, 0, 3, 3),
    ):
        scores, boxes = sample(batch, classes, segments, dtype=dtype), boxed(segments, height, width)
        op = backend.op("occlusion_masks_boxes_map")
        out = op(scores.to(backend.device), boxes.to(backend.device), height, width).cpu()
        baseline = reference.occlusion_masks_boxes_map(scores, boxes, height, width)
        assert_same_layout(out, baseline)
        assert_no_worse(out, reference.occlusion_masks_boxes_map(scores.double(), boxes, height, width), baseline)


@NATIVE
def test_boxes_map_of_sliding_windows(backend: Backend) -> None:
    edges = [(start, min(start + 32, 224)) for start in range(0, 224, 8)]
    boxes = torch.tensor([[t, le, b, r] for t, b in edges for le, r in edges], dtype=torch.int32)
    scores = sample(1, 1, len(boxes))
    op = backend.op("occlusion_masks_boxes_map")
    out = op(scores.to(backend.device), boxes.to(backend.device), 224, 224).cpu()
    truth = reference.occlusion_masks_boxes_map(scores.double(), boxes, 224, 224)
    assert_no_worse(out, truth, reference.occlusion_masks_boxes_map(scores, boxes, 224, 224))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@ALL
def test_backward_matches_reference(backend: Backend, dtype: torch.dtype) -> None:
    images, fills, labels, rows, ids = segmented((2, 3, 7, 9), 6, dtype)
    boxes, scores = boxed(6, 7, 9), sample(2, 3, 6, dtype=dtype, seed=3)
    map_labels = labels.clamp(min=-1)
    for name, differentiable, rest in (
        ("occlusion_masks", (images, fills), (labels, rows, ids, torch.float32, True)),
        ("occlusion_masks_boxes", (images, fills), (boxes, rows, torch.float32, False)),
        ("occlusion_masks_map", (scores,), (map_labels,)),
        ("occlusion_masks_boxes_map", (scores,), (boxes, 7, 9)),
    ):
        if backend.name == "emulated":
            pytest.skip("derivatives belong to the pysal namespace")
        require_native(name, "cpu" if backend.name == "reference" else backend.name)
        rest = tuple(value.to(backend.device) if isinstance(value, Tensor) else value for value in rest)

        def gradients(
            call: Callable[..., Tensor], dtype: torch.dtype, inputs: tuple[Tensor, ...], rest: tuple[Any, ...]
        ) -> list[Tensor]:
            leaves = [value.detach().to(device=backend.device, dtype=dtype).requires_grad_() for value in inputs]
            out = call(*leaves, *rest)
            return [g.cpu() for g in torch.autograd.grad(out, leaves, sample(*out.shape, seed=4).to(out))]

        truth_rest = tuple(torch.float64 if value is torch.float32 else value for value in rest)
        oracle = getattr(reference, name)
        kernel = gradients(getattr(torch.ops.pysal, name), dtype, differentiable, rest)
        truth = gradients(oracle, torch.float64, differentiable, truth_rest)
        baseline = gradients(oracle, dtype, differentiable, rest)
        for k, r, b in zip(kernel, truth, baseline, strict=True):
            assert_no_worse(k, r, b)


def test_gradcheck() -> None:
    images, fills, labels, rows, ids = segmented((2, 2, 4, 3), 4, torch.float64)
    leaves, (mean, std) = [images.requires_grad_(), fills.requires_grad_()], normalisation(2)
    boxes, scores = boxed(4, 4, 3), sample(2, 2, 4, dtype=torch.float64, seed=3).requires_grad_()
    for call, inputs in (
        (lambda x, f: ops.occlusion_masks(x, f, labels, rows, ids, channels_last=True), leaves),
        (lambda x, f: ops.occlusion_masks(x, f, labels, rows, ids, mean=mean, std=std), leaves),
        (lambda x, f: ops.occlusion_masks_boxes(x, f, boxes, rows), leaves),
        (lambda x, f: ops.occlusion_masks_boxes(x, f, boxes, rows, mean=mean, std=std), leaves),
        (lambda s: ops.occlusion_masks_map(s, labels), [scores]),
        (lambda s: ops.occlusion_masks_boxes_map(s, boxes, 4, 3), [scores]),
    ):
        assert gradcheck(call, inputs)
        assert gradgradcheck(call, inputs)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_opcheck(shape: tuple[int, ...], requires_grad: bool) -> None:
    images, fills, labels, rows, ids = segmented(shape, 4)
    boxes, scores = boxed(4, *shape[2:]), sample(shape[0], 2, 4).requires_grad_(requires_grad)
    images.requires_grad_(requires_grad)
    fills.requires_grad_(requires_grad)
    opcheck(torch.ops.pysal.occlusion_masks.default, (images, fills, labels, rows, ids, torch.float32, False))
    opcheck(torch.ops.pysal.occlusion_masks.default, (images, fills, labels, rows, ids, torch.float64, True))
    opcheck(torch.ops.pysal.occlusion_masks_boxes.default, (images, fills, boxes, rows, torch.float32, True))
    opcheck(torch.ops.pysal.occlusion_masks_boxes.default, (images, fills, boxes, rows, torch.float64, False))
    factors = normalisation(shape[1])
    opcheck(torch.ops.pysal.occlusion_masks.default, (images, fills, labels, rows, ids, torch.float32, True, *factors))
    opcheck(torch.ops.pysal.occlusion_masks_boxes.default, (images, fills, boxes, rows, torch.float64, False, *factors))
    opcheck(torch.ops.pysal.occlusion_masks_map.default, (scores, labels))
    opcheck(torch.ops.pysal.occlusion_masks_boxes_map.default, (scores, boxes, *shape[2:]))


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@NATIVE
def test_layouts(backend: Backend, channels_last: bool) -> None:
    images, fills, labels, rows, ids = (value.to(backend.device) for value in segmented((2, 3, 7, 9), 5))
    boxes, scores = boxed(5, 7, 9).to(backend.device), sample(2, 3, 5).to(backend.device)
    expected = reference.occlusion_masks(images, fills, labels, rows, ids, torch.float32, channels_last)
    expected_boxes = reference.occlusion_masks_boxes(images, fills, boxes, rows, torch.float32, channels_last)
    masks, of_boxes = backend.op("occlusion_masks"), backend.op("occlusion_masks_boxes")
    for name, image in layouts(images):
        assert torch.equal(masks(image, fills, labels, rows, ids, torch.float32, channels_last), expected), name
        assert torch.equal(of_boxes(image, fills, boxes, rows, torch.float32, channels_last), expected_boxes), name
    for name, fill in layouts(fills):
        assert torch.equal(masks(images, fill, labels, rows, ids, torch.float32, channels_last), expected), name
    for name, label in layouts(labels):
        assert torch.equal(masks(images, fills, label, rows, ids, torch.float32, channels_last), expected), name
        by_label = backend.op("occlusion_masks_map")(scores, label)
        assert torch.equal(by_label, reference.occlusion_masks_map(scores, labels)), name
    factors = [factor.to(backend.device) for factor in normalisation(3)]
    normal = reference.occlusion_masks(images, fills, labels, rows, ids, torch.float32, channels_last, *factors)
    for (name, image), (_, mean), (_, std) in zip(layouts(images), layouts(factors[0]), layouts(factors[1]), strict=False):
        assert torch.equal(masks(image, fills, labels, rows, ids, torch.float32, channels_last, mean, std), normal), name
    constant = torch.full((1, 3, 1, 1), 0.5, device=backend.device).expand_as(images)
    with_constant = reference.occlusion_masks(images, constant, labels, rows, ids, torch.float32, channels_last)
    assert torch.equal(masks(images, constant, labels, rows, ids, torch.float32, channels_last), with_constant)
    mean = backend.op("occlusion_masks_boxes_map")
    for (name, score), (_, box) in zip(layouts(scores), layouts(boxes), strict=True):
        assert torch.equal(mean(score, box, 7, 9), mean(scores, boxes, 7, 9)), name


@ALL
def test_empty_and_extremes(backend: Backend) -> None:
    images, fills, labels, rows, ids = (value.to(backend.device) for value in segmented((2, 3, 4, 5), 3))
    masks, of_boxes = backend.op("occlusion_masks"), backend.op("occlusion_masks_boxes")
    none, no_boxes = rows[:0], torch.empty(0, 4, dtype=torch.int32, device=backend.device)
    assert masks(images, fills, labels, none, none, torch.float16, True).shape == (0, 3, 4, 5)
    assert of_boxes(images, fills, no_boxes, none, torch.float32, False).shape == (0, 3, 4, 5)
    flat = images[:, :, :0]
    assert masks(flat, flat, labels[:, :0], rows, ids, torch.float32, False).shape == (3, 3, 0, 5)
    factors = [factor.to(backend.device) for factor in normalisation(3)]
    assert masks(flat, flat, labels[:, :0], rows, ids, torch.float32, False, *factors).shape == (3, 3, 0, 5)
    assert of_boxes(images, fills, no_boxes, none, torch.float32, True, *factors).shape == (0, 3, 4, 5)
    assert backend.op("occlusion_masks_map")(images[:, :, 0], labels[:, :0]).shape == (2, 3, 0, 5)
    assert backend.op("occlusion_masks_boxes_map")(images[:, :, 0, :0], no_boxes, 0, 4).shape == (2, 3, 0, 4)

    # what is not finite is copied like anything else, and in means stays inside its box
    images[:], fills[:] = torch.nan, -torch.inf
    out = masks(images, fills, labels, rows, ids, torch.bfloat16, False)
    hidden = (labels[rows.long()] == ids[:, None, None])[:, None].expand_as(out)
    assert torch.equal(out == -torch.inf, hidden)
    assert torch.equal(out.isnan(), ~hidden)
    scores = torch.tensor([[[torch.inf, 1.0, -torch.inf]]], device=backend.device)
    boxes = torch.tensor([[0, 0, 1, 2], [0, 1, 1, 4], [0, 3, 1, 4]], dtype=torch.int32, device=backend.device)
    line = backend.op("occlusion_masks_boxes_map")(scores, boxes, 1, 5).flatten().tolist()
    assert line == [torch.inf, torch.inf, 1.0, -torch.inf, 0.0]


@NATIVE
def test_rows_beyond_an_int32(backend: Backend) -> None:
    """The last of more images than 2^31 elements hold, is found, and its fill."""
    image = sample(3, 5, 7, dtype=torch.float16).to(backend.device)
    images, fills = with_last_row(image, backend.device), with_last_row(-image, backend.device)
    row, box = index(len(images) - 1).to(backend.device), index(1, 2, 4, 6)[None].to(backend.device)
    out = backend.op("occlusion_masks_boxes")(images, fills, box, row, torch.float16, False)
    expected = image.clone()
    expected[:, 1:4, 2:6] *= -1
    assert torch.equal(out[0], expected)


@NATIVE
def test_float16_is_rounded_as_torch_rounds_it(backend: Backend) -> None:
    def cast(values: Tensor, dtype: torch.dtype) -> Tensor:
        image, nothing = values.reshape(1, 1, 64, -1).to(backend.device), index(0, 0, 0, 0)[None].to(backend.device)
        masks, rows = backend.op("occlusion_masks_boxes"), index(0).to(backend.device)
        return masks(image, image, nothing, rows, dtype, False).cpu().reshape(values.shape)

    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)
    assert torch.equal(cast(every, torch.float32).nan_to_num(9.0), every.float().nan_to_num(9.0))
    # around every float16, halfway to the next, and beyond: its bits as the top of a float32, with ties broken either way
    top = torch.arange(-(2**18), 2**18, dtype=torch.int64) << 13
    for rest in (0, 1, 0xFFF, 0x1000, 0x1001, 0x1FFF):
        values = (top | rest).to(torch.int32).view(torch.float32)
        assert torch.equal(cast(values, torch.float16).nan_to_num(9.0), values.half().nan_to_num(9.0))


def test_indices_outside_are_refused_by_the_kernel_and_boxes_outside_cut() -> None:
    require_native("occlusion_masks")
    images, fills, labels, rows, ids = segmented((2, 3, 4, 5), 3)
    for bad in (-1, 2, 2**31 - 1):
        rows[1] = bad
        with pytest.raises((RuntimeError, IndexError)):
            torch.ops.pysal.occlusion_masks(images, fills, labels, rows, ids, torch.float32, False)
    rows[1], three = 0, torch.ones(3, dtype=torch.float64)
    for mean, std in ((three, None), (three, three[:2]), (three.float(), three.float())):
        with pytest.raises(RuntimeError, match=r"mean and std must be"):
            torch.ops.pysal.occlusion_masks(images, fills, labels, rows, ids, torch.float32, False, mean, std)
    box = index(-(2**31), -3, 2**31 - 1, 2)[None]
    out = torch.ops.pysal.occlusion_masks_boxes(images, fills, box, index(0), torch.float32, False)
    assert torch.equal(out[0, :, :, :2], fills[0, :, :, :2])
    assert torch.equal(out[0, :, :, 2:], images[0, :, :, 2:])
    upside_down = torch.cat([box, index(3, 4, 1, 1)[None]])
    mean = torch.ops.pysal.occlusion_masks_boxes_map(torch.ones(1, 1, 2), upside_down, 4, 5)
    assert torch.equal(mean[0, 0], torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0]).expand(4, 5))


def test_determinism() -> None:
    images, fills, labels, rows, ids = segmented((2, 3, 65, 130), 70)
    boxes, scores, (mean, std) = boxed(70, 65, 130), sample(2, 3, 70), normalisation(3)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(
                (
                    ops.occlusion_masks(images, fills, labels, rows, ids, channels_last=True),
                    ops.occlusion_masks_boxes(images, fills, boxes, rows, mean=mean, std=std),
                    ops.occlusion_masks_map(scores, labels),
                    ops.occlusion_masks_boxes_map(scores, boxes, 65, 130),
                )
            )
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


IMAGES, LABELS, ROWS = torch.zeros(2, 3, 4, 5), torch.zeros(2, 4, 5, dtype=torch.int32), index(0, 1)
BOXES, SCORES, THREE = torch.zeros(2, 4, dtype=torch.int32), torch.zeros(2, 3, 2), torch.ones(3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: ops.occlusion_masks([1.0], IMAGES, LABELS, ROWS, ROWS),
            TypeError,
            "pysal::occlusion_masks: images must be a torch.Tensor, got list",
        ),
        (
            lambda: ops.occlusion_masks(IMAGES.int(), IMAGES, LABELS, ROWS, ROWS),
            TypeError,
            "pysal::occlusion_masks: images must have dtype float32 or float64 or float16 or bfloat16, got int32",
        ),
        (
            lambda: ops.occlusion_masks(IMAGES[0], IMAGES[0], LABELS, ROWS, ROWS),
            ValueError,
            "pysal::occlusion_masks: images must have 4 dimensions, got shape (3, 4, 5)",
        ),
        (
            lambda: ops.occlusion_masks(IMAGES, IMAGES.double(), LABELS, ROWS, ROWS),
            TypeError,
            "pysal::occlusion_masks: fills must have dtype float32, got float64",
        ),
        (
            lambda: ops.occlusion_masks(IMAGES, IMAGES[:1], LABELS, ROWS, ROWS),
            ValueError,
            "pysal::occlusion_masks: fills must have the shape of images, (2, 3, 4, 5), got shape (1, 3, 4, 5)",
        ),
        (
            lambda: ops.occlusion_masks(IMAGES, IMAGES.to("meta"), LABELS, ROWS, ROWS),
            ValueError,
            "pysal::occlusion_masks: fills must be on the device of images, cpu, got meta",
        ),
        (
            lambda: ops.occlusion_masks(IMAGES, IMAGES, LABELS, ROWS, ROWS, mean=THREE),
            ValueError,
            "pysal::occlusion_masks: std must be given where the other is, got None",
        ),
        (
            lambda: ops.occlusion_masks_boxes(IMAGES, IMAGES, BOXES, ROWS, std=THREE),
            ValueError,
            "pysal::occlusion_masks_boxes: mean must be given where the other is, got None",
        ),
        (
            lambda: ops.occlusion_masks(IMAGES, IMAGES, LABELS, ROWS, ROWS, mean=THREE, std=THREE[:2]),
            ValueError,
            "pysal::occlusion_masks: std must have shape (3,), got shape (2,)",
        ),
        (
            lambda: ops.occlusion_masks(IMAGES, IMAGES, LABELS, ROWS, ROWS, mean=THREE, std=THREE - 1),
            ValueError,
            "pysal::occlusion_masks: std must be positive, got [0.0, 0.0, 0.0]",
        ),
        (
            lambda: ops.occlusion_masks_boxes(IMAGES, IMAGES, BOXES, ROWS, mean=THREE.int(), std=THREE),
            TypeError,
            "pysal::occlusion_masks_boxes: mean must have dtype float32 or float64 or float16 or bfloat16, got int32",
        ),
        (
            lambda: ops.occlusion_masks(IMAGES, IMAGES, LABELS.float(), ROWS, ROWS),
            TypeError,
            "pysal::occlusion_masks: labels must have dtype int32 or int64 or int16 or int8 or uint8, got float32",
        ),
        (
            lambda: ops.occlusion_masks(IMAGES, IMAGES, LABELS[:, :3], ROWS, ROWS),
            ValueError,
            "pysal::occlusion_masks: labels must have the shape of images without channels, (2, 4, 5), got shape (2, 3, 5)",
        ),
        (
            lambda: ops.occlusion_masks(IMAGES, IMAGES, LABELS, index(0, 2), ROWS),
            ValueError,
            "pysal::occlusion_masks: rows must be in [0, 2), got 2",
        ),
        (
            lambda: ops.occlusion_masks(IMAGES, IMAGES, LABELS, ROWS, index(1)),
            ValueError,
            "pysal::occlusion_masks: ids must have the shape of rows, (2,), got shape (1,)",
        ),
        (
            lambda: ops.occlusion_masks(IMAGES, IMAGES, LABELS, ROWS, ROWS, dtype=torch.int32),
            TypeError,
            "pysal::occlusion_masks: dtype must be float32, float64, float16 or bfloat16, got torch.int32",
        ),
        (
            lambda: ops.occlusion_masks_boxes(IMAGES, IMAGES, BOXES[:1], ROWS),
            ValueError,
            "pysal::occlusion_masks_boxes: boxes must have shape (2, 4), got shape (1, 4)",
        ),
        (
            lambda: ops.occlusion_masks_boxes(IMAGES, IMAGES, BOXES + index(0, 0, 5, 5), ROWS),
            ValueError,
            "pysal::occlusion_masks_boxes: boxes must be (top, left, bottom, right) inside 4 x 5 pixels, got (0, 0, 5, 5)",
        ),
        (
            lambda: ops.occlusion_masks_boxes(IMAGES, IMAGES, BOXES, index(-1, 0)),
            ValueError,
            "pysal::occlusion_masks_boxes: rows must be in [0, 2), got -1",
        ),
        (
            lambda: ops.occlusion_masks_map(SCORES[0], LABELS),
            ValueError,
            "pysal::occlusion_masks_map: scores must have 3 dimensions, got shape (3, 2)",
        ),
        (
            lambda: ops.occlusion_masks_map(SCORES, LABELS[:1]),
            ValueError,
            "pysal::occlusion_masks_map: labels must have the batch of scores, 2, got shape (1, 4, 5)",
        ),
        (
            lambda: ops.occlusion_masks_boxes_map(SCORES, BOXES, -1, 5),
            ValueError,
            "pysal::occlusion_masks_boxes_map: height must be at least 0, got -1",
        ),
        (
            lambda: ops.occlusion_masks_boxes_map(SCORES, BOXES[:, :3], 4, 5),
            ValueError,
            "pysal::occlusion_masks_boxes_map: boxes must have shape (2, 4), got shape (2, 3)",
        ),
    ],
)
def test_errors(call: Callable[[], Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        call()
    assert str(raised.value) == message


def test_defaults_and_index_dtypes() -> None:
    images, fills, labels, rows, ids = segmented((2, 3, 4, 5), 3, torch.float64)
    out = ops.occlusion_masks(images, fills, labels.long(), rows.long(), ids.to(torch.int8))
    assert torch.equal(out, reference.occlusion_masks(images, fills, labels, rows, ids, torch.float64, False))
    assert_same_layout(out, torch.empty(3, 3, 4, 5, dtype=torch.float64))
    boxes = boxed(3, 4, 5)
    by_box = ops.occlusion_masks_boxes(images, fills, boxes.long(), rows, dtype=torch.float32, channels_last=True)
    assert torch.equal(by_box, reference.occlusion_masks_boxes(images, fills, boxes, rows, torch.float32, True))
