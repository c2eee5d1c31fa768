"""Ways to cut an image: what covers what, and in which order."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pysal.segments import Boxes, Grid, Labels, Slic, Window, cut, parse
from tests.methods.networks import images


def coverage(boxes: Tensor, height: int, width: int) -> Tensor:
    """How many boxes cover each pixel."""
    count = torch.zeros(height, width, dtype=torch.int64)
    for top, left, bottom, right in boxes.tolist():
        assert 0 <= top < bottom <= height
        assert 0 <= left < right <= width
        count[top:bottom, left:right] += 1
    return count


def boxes_of(segments: Grid | Window, height: int, width: int) -> Tensor:
    found = segments.cut(torch.zeros(2, 3, height, width))
    assert isinstance(found, Boxes)
    assert found.boxes.dtype == torch.int32
    return found.boxes


@pytest.mark.parametrize(("height", "width"), [(1, 2), (7, 5), (12, 12), (224, 97)])
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (1, 2), (3, 5), (7, 4), (12, 12)])
def test_grid_tiles_the_image(rows: int, cols: int, height: int, width: int) -> None:
    if rows > height or cols > width:
        with pytest.raises(ValueError, match=f"must be at most {height} x {width} pixels, got {rows} x {cols}$"):
            boxes_of(Grid(rows, cols), height, width)
        return
    boxes = boxes_of(Grid(rows, cols), height, width)
    assert len(boxes) == rows * cols
    assert (coverage(boxes, height, width) == 1).all()
    sides = boxes[:, 2:] - boxes[:, :2]
    assert (sides.amax(0) - sides.amin(0) <= 1).all(), "not of nearly equal size"
    assert boxes.tolist() == sorted(boxes.tolist()), "not row by row"


@pytest.mark.parametrize(("height", "width"), [(1, 2), (8, 8), (11, 10), (13, 30)])
@pytest.mark.parametrize("size", [1, 3, 4, 8, 100])
@pytest.mark.parametrize("stride", [None, 1, 2, 3])
def test_window_covers_the_image(size: int, stride: int | None, height: int, width: int) -> None:
    if (stride or size) > size:
        return
    boxes = boxes_of(Window(size, stride), height, width)
    covered = coverage(boxes, height, width)
    step = stride or size
    assert (covered >= 1).all()
    if step == size:
        assert (covered == 1).all()
    assert boxes.tolist() == sorted(boxes.tolist()), "not row by row"
    for side, (low, high), extent in ((0, (0, 2), height), (1, (1, 3), width)):
        starts = boxes[:, low].unique()
        assert starts.tolist() == list(range(0, int(starts[-1]) + 1, step)), side
        ends = boxes[:, high]
        assert torch.equal(ends, (boxes[:, low] + size).clamp_max(extent)), "only the last window is cut at the border"
        assert len(starts) == 1 or starts[-2] + size < extent, "a window too many"


def test_window_of_two_sizes() -> None:
    assert boxes_of(Window((2, 4), (1, 3)), 3, 8).tolist() == [
        [0, 0, 2, 4], [0, 3, 2, 7], [0, 6, 2, 8], [1, 0, 3, 4], [1, 3, 3, 7], [1, 6, 3, 8],
    ]  # fmt: skip
    assert Window((2, 4)) == Window((2, 4), None)
    assert torch.equal(boxes_of(Window((2, 4)), 4, 8), boxes_of(Window((2, 4), (2, 4)), 4, 8))


def wheel(size: int) -> Tensor:
    """Six sectors, bright and dark by turns (H, W): their borders cross every superpixel that does not look."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, size), torch.linspace(-1, 1, size), indexing="ij")
    return (torch.atan2(y, x) * 6 / (2 * torch.pi)).floor().remainder(2)


def astray(image: Tensor, drawn: Tensor) -> float:
    """The share of pixels whose superpixel belongs mostly to the other side of what is drawn."""
    found = Slic(60).cut(image[None])
    ids, bright = found.labels.flatten().long(), drawn.flatten().double()
    counts = torch.zeros(found.counts[0], dtype=torch.float64).index_add_(0, ids, torch.ones_like(bright))
    sums = torch.zeros_like(counts).index_add_(0, ids, bright)
    return float(torch.minimum(sums, counts - sums).sum() / len(bright))


DRAWN = wheel(96)
RAMP = torch.linspace(0, 1, 96).expand(96, -1)
PICTURES: dict[str, Tensor] = {
    "one channel": DRAWN[None],
    "two channels": DRAWN.expand(2, -1, -1),
    "a mask beside nothing": torch.stack([torch.ones_like(DRAWN), DRAWN]),
    "four channels": torch.stack([DRAWN, 1 - DRAWN, 0.2 + 0.1 * DRAWN, torch.ones_like(DRAWN)]),
    "channels of other units": torch.stack([0.01 * DRAWN, 1000 + 300 * RAMP]),
    "many channels": torch.linspace(1, 2, 30)[:, None, None] * DRAWN,
    "normalised": (DRAWN.expand(3, -1, -1) - 0.45) / 0.225,
    "of 16 bits": 40000 * DRAWN[None],
    "dim": 0.001 * DRAWN.expand(3, -1, -1),
    "dim and negative": -5 + 0.001 * DRAWN.expand(4, -1, -1),
}


@pytest.mark.parametrize("picture", PICTURES)
def test_superpixels_follow_the_image(picture: str) -> None:
    crossing = astray(torch.full((3, 96, 96), 0.5), DRAWN)
    assert crossing > 0.05, "superpixels that do not look must be seen to cross the borders"
    assert astray(PICTURES[picture], DRAWN) < crossing / 3


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("factor", "shift"), [(2.0, 0.0), (0.25, -4.0), (256.0, 0.0)])
def test_superpixels_do_not_depend_on_the_unit(channels: int, factor: float, shift: float) -> None:
    image = (images(1, 3, 24, 24)[:, :channels] * 256).round() / 256
    assert torch.equal(Slic(9).cut(image * factor + shift).labels, Slic(9).cut(image).labels)
    grey = image[:, :1]
    assert torch.equal(Slic(9).cut(grey).labels, Slic(9).cut(grey.expand(-1, 3, -1, -1)).labels)


WHOLE = "be a whole number of at least 1"
BAD: list[tuple[Callable[[], object], str]] = [
    (lambda: Grid(0, 1), f"Grid: rows must {WHOLE}, got 0"),
    (lambda: Grid(1, -1), f"Grid: cols must {WHOLE}, got -1"),
    (lambda: Grid(1.5, 1), f"Grid: rows must {WHOLE}, got 1.5"),
    (lambda: Grid(True, 1), f"Grid: rows must {WHOLE}, got True"),
    (lambda: Window(0), f"Window: size must {WHOLE}, got 0"),
    (lambda: Window(3, 0), f"Window: stride must {WHOLE}, got 0"),
    (lambda: Window(3, 4), "Window: stride must be at most the size 3, got 4"),
    (lambda: Window((3, 5), 4), "Window: stride must be at most the size 3, got 4"),
    (lambda: Window((5, 3), (5, 4)), "Window: stride must be at most the size 3, got 4"),
    (lambda: Window((3, 3, 3)), "Window: size must be one number of pixels or a tuple of two, got (3, 3, 3)"),
    (lambda: Window([4, 4]), "Window: size must be one number of pixels or a tuple of two, got [4, 4]"),
    (lambda: Window(3, (1,)), "Window: stride must be one number of pixels or a tuple of two, got (1,)"),
    (lambda: Window("3"), f"Window: size must {WHOLE}, got '3'"),
    (lambda: Slic(0), f"Slic: n_segments must {WHOLE}, got 0"),
    (lambda: Slic(10, 0.0), "Slic: compactness must be a finite number above 0, got 0.0"),
    (lambda: Slic(10, float("nan")), "Slic: compactness must be a finite number above 0, got nan"),
    (lambda: Slic(10, "ten"), "Slic: compactness must be a finite number above 0, got 'ten'"),
    (lambda: Slic(10, sigma=-1.0), "Slic: sigma must be a finite number of at least 0, got -1.0"),
    (lambda: Slic(10, sigma=float("inf")), "Slic: sigma must be a finite number of at least 0, got inf"),
    (lambda: Slic(10, sigma=None), "Slic: sigma must be a finite number of at least 0, got None"),
]


@pytest.mark.parametrize(("make", "sentence"), BAD, ids=[sentence for _, sentence in BAD])
def test_refusals(make: Callable[[], object], sentence: str) -> None:
    with pytest.raises(ValueError) as error:
        make()
    assert str(error.value) == f"pysal.segments.{sentence}"


def test_slic_segments_may_differ_in_number() -> None:
    flat, busy = torch.full((3, 24, 30), 0.3), images(1, 3, 24, 30)[0].float()
    batch = torch.stack([flat, busy, busy.flip(2)])
    found = Slic(12).cut(batch)
    assert found.labels.shape == (3, 24, 30)
    assert found.labels.dtype == torch.int32
    assert len(set(found.counts)) > 1, "the images shall have different numbers of segments"
    for image, labels, count in zip(batch, found.labels, found.counts, strict=True):
        assert labels.unique().tolist() == list(range(count)), "every number has a pixel"
        alone = Slic(12).cut(image[None])
        assert torch.equal(alone.labels[0], labels), "the company an image is in matters"


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_slic_of_any_channels_and_range(channels: int) -> None:
    batch = torch.zeros(1, channels, 20, 16, dtype=torch.float64)
    batch[:, :, 10:, :8], batch[:, :, :10, 8:], batch[:, :, 10:, 8:] = 1 / 3, 2 / 3, 1.0
    slic = Slic(4, compactness=0.1, sigma=0)
    found = slic.cut(batch)
    quarters = found.labels[0, ::10, ::8].flatten()
    assert found.counts == (4,)
    assert torch.equal(found.labels[0], quarters.reshape(2, 2).repeat_interleave(10, 0).repeat_interleave(8, 1))
    assert torch.equal(slic.cut(batch * 4 - 2).labels, found.labels), "values outside [0, 1] are rescaled to it"
    assert torch.equal(slic.cut(batch.clone().requires_grad_()).labels, found.labels)


IMAGES = torch.zeros(3, 3, 4, 5)
MAP = np.arange(20).reshape(4, 5) // 7


@pytest.mark.parametrize(
    "given",
    [
        MAP,
        torch.from_numpy(MAP),
        MAP.astype(np.uint8),
        MAP[None],
        torch.from_numpy(MAP)[None],
        [MAP],
        [torch.from_numpy(MAP)] * 3,
        np.stack([MAP] * 3),
        (MAP, torch.from_numpy(MAP), MAP.tolist()),
        7 * MAP + 2,
        MAP.astype(np.int64) * 2**40,
    ],
    ids=str,
)
def test_one_map_in_every_form(given: Any) -> None:
    found = cut("pysal.leave_one_out", given, IMAGES)
    assert isinstance(found, Labels)
    assert torch.equal(found.labels, torch.from_numpy(MAP).int().expand(3, 4, 5))
    assert found.counts == (3, 3, 3)


def test_maps_of_their_own() -> None:
    second = np.full((4, 5), 9)
    third = MAP - 1  # the first seven pixels belong to no segment
    found = cut("pysal.leave_one_out", [MAP, second, third], IMAGES)
    assert found.counts == (3, 1, 2)
    assert torch.equal(found.labels[1], torch.zeros(4, 5, dtype=torch.int32))
    assert torch.equal(found.labels[2], torch.from_numpy(third).int())
    gaps = cut("pysal.leave_one_out", np.where(MAP == 1, -7, np.where(MAP == 0, -2, 40)), IMAGES)
    assert gaps.counts == (1, 1, 1)
    assert gaps.labels.unique().tolist() == [-1, 0], "negative labels are one outside"


def test_grid_and_window_serve_every_image() -> None:
    for segments in (Grid(2, 2), Window(2)):
        assert torch.equal(cut("pysal.leave_one_out", segments, IMAGES).boxes, segments.cut(IMAGES[:1]).boxes)


@pytest.mark.parametrize(
    ("text", "segments"),
    [
        ("grid:3x4", Grid(3, 4)),
        ("window:16/8", Window(16, 8)),
        ("window:16", Window(16)),
        ("slic:70", Slic(70)),
    ],
)
def test_parse(text: str, segments: Any) -> None:
    assert parse(text) == segments


@pytest.mark.parametrize(
    "text",
    ["", "grid", "grid:3", "grid:3x", "grid:-1x2", "window:", "window:8/", "slic", "slic:1.5", "SLIC:3", "slic:3 ", "a:3"],
)
def test_parse_refuses(text: str) -> None:
    with pytest.raises(ValueError) as error:
        parse(text)
    assert str(error.value) == f"pysal: segments must be like grid:3x3, window:16/8 or slic:100, got {text!r}"
    with pytest.raises(ValueError, match=r"^pysal.segments.Grid: rows must be a whole number of at least 1, got 0$"):
        parse("grid:0x2")
    with pytest.raises(ValueError, match=r"^pysal.segments.Window: stride must be at most the size 8, got 9$"):
        parse("window:8/9")


@pytest.mark.parametrize("text", ["grid:3", "window:", "slic:-1", "slic:1e3", "grid:٣x٣", "slic:" + "9" * 5000, ""])
def test_texts_that_are_no_segments(text: str) -> None:
    with pytest.raises(ValueError, match=r"^pysal: segments must be like grid:3x3, window:16/8 or slic:100, got "):
        parse(text)


def test_segments_that_have_no_values() -> None:
    requirement = "pysal.leave_one_out: segments must be a dense tensor with values, got one that is"
    labels = torch.ones(4, 4, dtype=torch.int64)
    for map, kind in ((labels.to_sparse(), "of layout sparse_coo"), (labels.to("meta"), "on the meta device")):
        with pytest.raises(TypeError) as caught:
            cut("pysal.leave_one_out", map, torch.zeros(1, 3, 4, 4))
        assert str(caught.value) == f"{requirement} {kind}"
    with pytest.raises(TypeError, match=r"segments must be like grid:3x3, window:16/8 or slic:100, got None$"):
        parse(None)  # type: ignore[arg-type]
