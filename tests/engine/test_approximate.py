"""Boxes limited to a share of each map: the definition by masks on whole images, what stays exact, and the error reported."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pysal
from pysal import Grid, Slic, Window
from pysal.engine.boxes import groups
from pysal.methods import leave_one_out
from tests.engine.test_incremental import (
    ROUNDINGS,
    Block,
    changed_images,
    engine_of,
    outputs_of,
    prepared_network,
    ragged,
    seeded,
    tail,
)

SHARES = (0.2, 0.35, 0.5, 0.8)
Box = tuple[int, int, int, int]


@pytest.fixture(autouse=True)
def small_maps_are_limited_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "SMALL_SIDE", 1)


# ---- the definition, on whole images


class ByHand:
    """A map of two images that differ inside a box, and where its pixels' windows are centred in the image.

    A pixel i of the map has its centre at `start + step i` of the image's rows or columns, where pixels are centred on whole
    numbers: (start, step) for rows and columns. What lies outside the box is replaced by what the unchanged image has there.
    """

    def __init__(
        self, clean: Tensor, changed: Tensor, box: Box, origin: Box, share: float, grid: Any = ((0.0, 1.0),) * 2
    ) -> None:
        self.clean, self.changed, self.box, self.origin, self.share, self.grid = clean, changed, box, origin, share, grid

    def after(self, layer: Callable[[Tensor], Tensor], box: Box, grid: Any) -> "ByHand":
        """Return the map that a layer makes of this one, `box` of which it can change."""
        return self.joined([self], lambda parts: layer(parts[0]), box, grid)

    def joined(self, parts: list["ByHand"], layer: Callable[[list[Tensor]], Tensor], box: Box, grid: Any) -> "ByHand":
        clean, changed = layer([part.clean for part in parts]), layer([part.changed for part in parts])
        limited = []
        for axis in range(2):
            low, high, side = box[axis], box[axis + 2], clean.shape[2 + axis]
            start, step = grid[axis]
            first, last = ((edge - 0.5 - start) / step + 0.5 for edge in (self.origin[axis], self.origin[axis + 2]))
            most = max(1, int(self.share * side + 1e-9), math.ceil(last - first - 1e-9))
            if high - low > most:
                places = [place for place in range(low, high - most + 1)]
                # the nearest to the footprint's middle; of two the later
                low = min(reversed(places), key=lambda place: round(abs(2 * place + most - first - last), 9))
                high = low + most
            limited.append((low, high))
        (top, bottom), (left, right) = limited
        inside = torch.zeros(clean.shape[2:], dtype=torch.bool)
        inside[top:bottom, left:right] = True
        kept = torch.where(inside, changed, clean)
        return ByHand(clean, kept, (top, left, bottom, right), self.origin, self.share, grid)

    def windows(self, layer: nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d) -> "ByHand":
        sizes = [value if isinstance(value, tuple) else (value, value) for value in (layer.kernel_size, layer.stride)]
        paddings = layer.padding if isinstance(layer.padding, tuple) else (layer.padding, layer.padding)
        dilations = layer.dilation if isinstance(layer, nn.Conv2d) else (1, 1)
        ends, grid = [], []
        for axis in range(2):
            kernel, stride, padding, dilation = sizes[0][axis], sizes[1][axis], paddings[axis], dilations[axis]
            read = {i: {i * stride - padding + tap * dilation for tap in range(kernel)} for i in range(100)}
            low, high = self.box[axis], self.box[axis + 2]
            side = (self.clean.shape[2 + axis] + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            # without dilation's gaps, as boxes have none
            reached = [i for i in range(side) if max(read[i]) >= low and min(read[i]) < high]
            ends.append((reached[0], reached[-1] + 1))
            start, step = self.grid[axis]
            grid.append((start + step * (dilation * (kernel - 1) / 2 - padding), step * stride))
        (top, bottom), (left, right) = ends
        return self.after(layer, (top, left, bottom, right), tuple(grid))

    def union(self, *others: "ByHand") -> Box:
        boxes = [each.box for each in (self, *others)]
        return tuple(min(sides) if n < 2 else max(sides) for n, sides in enumerate(zip(*boxes, strict=True)))  # type: ignore[return-value]


def sequential(parts: nn.Sequential, start: ByHand) -> ByHand:
    found = start
    for part in parts:
        if isinstance(part, (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)):
            found = found.windows(part)
        else:
            found = found.after(part, found.box, found.grid)
    return found


def plain() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, 1, 1),
        nn.ReLU(),
        nn.Conv2d(6, 6, 5, 2, 2, groups=6),
        nn.SiLU(),
        nn.Conv2d(6, 5, (3, 1), padding=(1, 0)),
        nn.MaxPool2d(3, 2, 1),
        nn.Conv2d(5, 5, 3, padding=2, dilation=2),
        nn.AvgPool2d(3, 1, 1),
        nn.Conv2d(5, 4, 3),
    )


class Residual(nn.Module):
    """A sum of two branches, one of which has grown, then a join of three."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, 2, 1)
        self.wide, self.narrow = nn.Conv2d(6, 6, 5, padding=2, groups=6), nn.Conv2d(6, 6, 1)
        self.left, self.right = nn.Conv2d(6, 3, 3, padding=1), nn.Conv2d(6, 2, 7, padding=3)
        self.last = nn.Conv2d(11, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(self.narrow(self.wide(x)) + x)
        x = torch.cat([self.left(x), x, self.right(x)], 1)
        return self.last(x).sigmoid()

    def by_hand(self, start: ByHand) -> ByHand:
        stem = start.windows(self.stem)
        wide = stem.windows(self.wide)
        box = wide.union(stem)
        added = wide.joined([wide, stem], lambda parts: F.relu(self.narrow(parts[0]) + parts[1]), box, stem.grid)
        left, right = added.windows(self.left), added.windows(self.right)
        joined = left.joined([left, added, right], lambda parts: torch.cat(parts, 1), left.union(added, right), added.grid)
        return joined.windows(self.last).after(torch.sigmoid, joined.windows(self.last).box, added.grid)


BOXES: list[Box] = [
    *[(y, x, y + 4, x + 4) for y in (0, 12, 28) for x in (0, 11, 22)],
    *[(7, 5, 8, 6), (0, 0, 3, 20), (4, 3, 25, 17), (20, 1, 31, 14)],  # some larger than what they may grow to
]


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("make", [plain, Residual])
def test_boxes_are_limited_as_defined(make: Callable[[], nn.Module], share: float) -> None:
    model, image = seeded(lambda: nn.Sequential(make(), *tail()), 3, 32, 28)
    images = changed_images(image, BOXES)
    engine = engine_of(model, image).limited(share)
    body, head = model[0], model[1:]
    with torch.no_grad():
        exact = model(images)
        expected = []
        for changed, box in zip(images, BOXES, strict=True):
            start = ByHand(image, changed[None], box, box, share)
            expected.append(head((sequential(body, start) if isinstance(body, nn.Sequential) else body.by_hand(start)).changed))
    together = outputs_of(engine, image, images, BOXES)
    alone = [outputs_of(engine, image, each[None], [box]) for each, box in zip(images, BOXES, strict=True)]
    rounding = ROUNDINGS * torch.finfo(torch.float64).eps * float(exact.abs().max())
    assert float((together - torch.cat(expected)).abs().max()) <= rounding
    assert float((torch.cat(alone) - together).abs().max()) <= rounding, "whoever an image runs with"
    assert float((together - exact).abs().max()) > 1e6 * rounding, "there is something to approximate"


def test_boxes_grow_to_the_share_and_stay_on_the_footprint() -> None:
    engine = engine_of(*seeded(lambda: nn.Sequential(*[nn.Conv2d(3, 3, 3, padding=1) for _ in range(4)], *tail()), 3, 20, 40))
    boxes = np.array([[10, 20, 11, 21], [0, 0, 1, 1], [19, 39, 20, 40], [4, 5, 10, 16]])
    found = engine.limited(0.25).groups.extents(boxes)  # 5 rows and 10 columns
    assert found[:, 0].tolist() == [[10, 20, 11, 21], [9, 19, 12, 22], [8, 18, 13, 23], [8, 17, 13, 24], [8, 16, 13, 25]]
    assert found[:, 1].tolist() == [[0, 0, n, n] for n in range(1, 6)]
    assert found[:, 2].tolist() == [[20 - n, 40 - n, 20, 40] for n in range(1, 6)]
    assert found[:, 3].tolist() == [[4, 5, 10, 16]] * 5, "larger than the share: it does not grow, and nothing of it is lost"
    assert np.array_equal(engine.limited(None).groups.extents(boxes), engine.groups.extents(boxes))
    sizes = engine.limited(0.25).groups.geometry(boxes[:3], torch.device("cpu")).sizes
    assert sizes.tolist() == [[1, 1], [3, 3], [5, 5], [5, 7], [5, 9]]


def test_small_maps_are_not_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "SMALL_SIDE", 8)
    layers = [nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, 2, 1), nn.Conv2d(3, 3, 5, padding=2)]
    engine = engine_of(*seeded(lambda: nn.Sequential(*layers, *tail()), 3, 18, 16))  # 9 x 8 after the stride
    found = engine.limited(0.2).groups.extents(np.array([[8, 8, 9, 9]]))[:, 0]
    assert found.tolist() == [[8, 8, 9, 9], [7, 7, 10, 10], [4, 3, 5, 6], [4, 1, 5, 8]]


@pytest.mark.parametrize("share", SHARES)
def test_no_box_exceeds_the_share_but_by_its_footprint(share: float) -> None:
    engine = engine_of(*seeded(lambda: nn.Sequential(plain(), *tail()), 3, 48, 64))
    boxes = np.array([[y, x, y + 3, x + 3] for y in range(0, 45, 5) for x in range(0, 60, 7)])
    sizes = engine.limited(share).groups.geometry(boxes, torch.device("cpu")).sizes
    maps = np.array(engine._program.maps)
    assert (sizes <= np.maximum(np.floor(share * maps), [3, 3])).all()
    assert (sizes < engine.groups.geometry(boxes, torch.device("cpu")).sizes).any()
    assert engine.limited(share).groups.cost(boxes) < engine.groups.cost(boxes)


def test_large_boxes_on_limited_maps_do_not_become_whole_maps() -> None:
    engine = engine_of(*seeded(lambda: nn.Sequential(*[nn.Conv2d(3, 3, 3, padding=1) for _ in range(4)], *tail()), 3, 40, 40))
    box = np.array([[4, 4, 36, 36]])
    assert engine.groups.geometry(box, torch.device("cpu")).sizes[-1].tolist() == [40, 40]
    assert engine.limited(0.95).groups.geometry(box, torch.device("cpu")).sizes[:, 0].tolist() == [32, 34, 36, 38, 38]
    assert engine.limited(1.0).groups.geometry(box, torch.device("cpu")).sizes[-1].tolist() == [40, 40]


# ---- leave-one-out


def found(model: Any, images: Tensor, **options: Any) -> dict[str, Any]:
    given = {"leave_one_out": options}
    result = pysal.explain(model, images, 1, methods=["leave_one_out"], score="logit", method_options=given)["leave_one_out"]
    return {**result.details, "map": result.map, "passes": result.passes}


def assert_same(got: dict[str, Any], expected: dict[str, Any]) -> None:
    for name in ("drops", "class_drops"):
        for a, b in zip(got[name], expected[name], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(got["map"], expected["map"], rtol=1e-9, atol=1e-12)


CUTS: list[Any] = [Window(5, 3), Grid(6, 5), Slic(20), ragged]


@pytest.mark.parametrize("segments", CUTS, ids=lambda cut: str(cut).split(" at 0x")[0])
def test_the_whole_side_is_exact(segments: Any) -> None:
    _, prepared, images = prepared_network()
    cut = segments(images) if callable(segments) else segments
    exact, got = (found(prepared, images, segments=cut, fill="mean", approximate=share) for share in (None, 1.0))
    assert_same(got, exact)
    assert torch.equal(got["approximation_error"], torch.zeros(3, dtype=torch.float64))
    assert abs(got["passes"] - exact["passes"]) <= 1, "nothing is left out twice, and an image is kept or not"
    assert "approximation_error" not in exact


def test_what_reaches_less_than_the_share_is_exact() -> None:
    model, image = seeded(
        lambda: nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 3), *tail()), 3, 32, 32
    )
    prepared = pysal.prepare(model, image, batch_size=2)
    # windows of 4 reach 8 of 30: more than a quarter, less than .3
    exact, enough, less = (found(prepared, image, segments=Window(4), approximate=share) for share in (None, 0.3, 0.25))
    assert_same(enough, exact)
    assert enough["approximation_error"].tolist() == [0.0]
    assert less["approximation_error"].item() > 1e-3


@pytest.mark.parametrize("segments", CUTS, ids=lambda cut: str(cut).split(" at 0x")[0])
def test_the_error_is_that_of_the_sample(segments: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, prepared, images = prepared_network()
    cut = segments(images) if callable(segments) else segments
    exact = found(prepared, images, segments=cut)["drops"]

    def approximate(sample: int) -> dict[str, Any]:
        monkeypatch.setattr(leave_one_out, "SAMPLE", sample)
        return found(prepared, images, segments=cut, approximate=0.25)

    nothing, some, every = (approximate(sample) for sample in (0, 8, 1000))
    assert nothing["approximation_error"].tolist() == [0.0] * 3
    for image in range(3):
        torch.testing.assert_close(every["drops"][image], exact[image], rtol=1e-9, atol=1e-12)
        differences = (nothing["drops"][image] - exact[image]).abs()
        largest = exact[image].abs().max()
        torch.testing.assert_close(every["approximation_error"][image], differences.max() / largest, rtol=1e-8, atol=0.0)
        assert differences.max() > 1e-3 * largest, "there is something to report"

        # half of the sample are the largest approximate drops; all of it, and nothing else, is exact
        changed = (some["drops"][image] != nothing["drops"][image]).nonzero().flatten().tolist()
        concerned = (differences > 1e-9 * largest).nonzero().flatten()
        assert len(changed) == min(8, len(concerned))
        order = concerned[nothing["drops"][image][concerned].abs().argsort(descending=True)].tolist()
        assert set(order[:4]) <= set(changed)
        assert some["approximation_error"][image] <= differences.max() / some["drops"][image].abs().max() * (1 + 1e-9)
        assert some["approximation_error"][image] >= differences[changed].max() / some["drops"][image].abs().max() * (1 - 1e-9)
        torch.testing.assert_close(some["drops"][image][changed], exact[image][changed], rtol=1e-9, atol=1e-12)
        assert torch.equal(some["class_drops"][image][1], some["drops"][image])


@pytest.mark.parametrize("segments", CUTS, ids=lambda cut: str(cut).split(" at 0x")[0])
def test_batch_size_does_not_change_the_result(segments: Any) -> None:
    _, prepared, images = prepared_network()
    cut = segments(images) if callable(segments) else segments
    expected = found(prepared, images, segments=cut, approximate=0.25)
    for batch_size in (1, 3, 1000):
        given = {"leave_one_out": {"segments": cut, "approximate": 0.25}}
        results = pysal.explain(
            prepared, images, 1, methods=["leave_one_out"], score="logit", method_options=given, batch_size=batch_size
        )["leave_one_out"]
        assert_same({**results.details, "map": results.map}, expected)
        torch.testing.assert_close(results.details["approximation_error"], expected["approximation_error"])
    public = pysal.leave_one_out(prepared, images, 1, segments=cut, approximate=0.25, score="logit")
    assert torch.equal(public.cpu(), expected["map"])


def test_images_do_not_change_each_other() -> None:
    _, prepared, images = prepared_network()
    together = found(prepared, images, segments=Slic(20), approximate=0.25)
    for image in range(3):
        alone = found(prepared, images[image : image + 1], segments=Slic(20), approximate=0.25)
        torch.testing.assert_close(alone["drops"][0], together["drops"][image], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(alone["approximation_error"][0], together["approximation_error"][image])


def test_what_runs_whole_is_exact_and_no_part_of_the_sample() -> None:
    _, prepared, images = prepared_network()
    nearly_all = torch.full((32, 28), -1)
    nearly_all[:30] = 0
    engine = prepared.incremental(images).limited(0.25)
    assert engine.groups.follow(np.array([[0, 0, 30, 28]]))[1].any(), "its boxes are limited"
    got = found(prepared, images, segments=nearly_all, approximate=0.25)
    assert_same(got, found(prepared, images, segments=nearly_all))
    assert got["approximation_error"].tolist() == [0.0] * 3
    assert got["passes"] == 1 + 1


def test_passes_count_the_sample() -> None:
    _, prepared, images = prepared_network()
    assert found(prepared, images[:1], segments=Window(4), approximate=0.25)["passes"] == 1 + 56 + 8 + 1
    # the activations of each of several images are made once more for the sample
    assert found(prepared, images, segments=Window(4), approximate=0.25)["passes"] == 1 + 56 + 8 + 2


def test_smooth_grad_reports_the_largest_error_of_its_copies() -> None:
    _, prepared, images = prepared_network()
    options = {"samples": 3, "seed": 1, "base": "leave_one_out"}

    def smooth(**method_options: Any) -> dict[str, Any]:
        given = {"smooth_grad": {**options, "method_options": {"segments": Window(8), **method_options}}}
        return pysal.explain(prepared, images[:2], 1, methods=["smooth_grad"], method_options=given)["smooth_grad"].details

    assert "approximation_error" not in smooth()
    error = smooth(approximate=0.25)["approximation_error"]
    assert error.shape == (2,)
    still = {
        "smooth_grad": {**options, "noise": 0.0, "samples": 2, "method_options": {"segments": Window(8), "approximate": 0.25}}
    }
    copies = pysal.explain(prepared, images[:2], 1, methods=["smooth_grad"], score="logit", method_options=still)["smooth_grad"]
    one = found(prepared, images[:2], segments=Window(8), approximate=0.25)["approximation_error"]
    torch.testing.assert_close(copies.details["approximation_error"], one)


def test_the_error_is_shown() -> None:
    _, prepared, images = prepared_network()
    given = {"leave_one_out": {"segments": Window(4), "approximate": 0.25}}
    shown = pysal.explain(prepared, images[:1], 1, methods=["leave_one_out"], score="softmax", method_options=given)
    error = float(shown["leave_one_out"].details["approximation_error"])
    assert f"approximation error {error:.3g}; 56 segments" in shown.table()
    assert "approximation error " in shown.panel("leave_one_out").small_print


# ---- refusals


@pytest.mark.parametrize(
    ("share", "error"),
    [
        *((share, ValueError) for share in (0, 0.0, -0.5, 1.5, math.nan, math.inf)),
        *((share, TypeError) for share in ("0.5", True, [0.5])),
    ],
    ids=str,
)
def test_what_is_no_share_is_refused(share: Any, error: type[Exception]) -> None:
    _, prepared, images = prepared_network()
    with pytest.raises(error) as raised:
        pysal.leave_one_out(prepared, images, 1, segments=Window(8), approximate=share)
    assert str(raised.value) == f"pysal.leave_one_out: approximate must be None or a number in (0, 1], got {share!r}"


def test_models_that_run_whole_images_are_refused_before_any_work() -> None:
    model, prepared, images = prepared_network()
    ends_at_once = pysal.prepare(
        nn.Sequential(Block(lambda x: x.flip(3)), nn.Flatten(), nn.Linear(3 * 32 * 28, 3)).double().eval(),
        images[:1],
        batch_size=2,
    )
    whole = (
        "be None where the prepared model runs whole images (its report() says why, or they have another shape than it was "
        "prepared for), got 0.5"
    )
    cases: list[tuple[Any, Tensor, tuple[Any, ...], str]] = [
        (model, images, (), "be None for a model that pysal.prepare has not prepared, got 0.5"),
        (prepared, images, (1.0,), "be None for a model with extra_inputs, which runs whole images, got 0.5"),
        (prepared, F.interpolate(images, size=(40, 40)), (), whole),
        (ends_at_once, images, (), whole),
    ]
    seen: list[str] = []
    for each, inputs, extra, sentence in cases:
        with pysal.progress(lambda label, *_: seen.append(label)), pytest.raises(ValueError) as raised:
            pysal.leave_one_out(each, inputs, 1, segments=Window(8), approximate=0.5, extra_inputs=extra)
        assert str(raised.value) == f"pysal.leave_one_out: approximate must {sentence}"
    assert seen == []
