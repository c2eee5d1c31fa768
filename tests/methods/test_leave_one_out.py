"""Leave-one-out: drops worked out by hand on linear scorers, black boxes, fills, and captum's Occlusion and FeatureAblation."""

from typing import Any, get_args

import numpy as np
import pytest
import torch
from captum.attr import FeatureAblation, Occlusion
from scipy import ndimage
from skimage.segmentation import slic
from torch import Tensor

import pysal
from pysal import Grid, Slic, Window
from pysal.methods.leave_one_out import Mode
from pysal.methods.traits import MODES
from tests.methods.networks import Counting, assert_rounding, images, linear, rectified, weights

SHAPES = [(2, 3, 6, 8), (3, 1, 7, 5), (1, 4, 5, 5)]


def details(model: Any, inputs: Tensor, target: Any = 0, score: str = "logit", **options: Any) -> tuple[Tensor, dict[str, Any]]:
    found = pysal.explain(
        model, inputs, target, methods=["leave_one_out"], score=score, method_options={"leave_one_out": options}
    )["leave_one_out"]
    return found.map, found.details


def drops_by_hand(w: Tensor, inputs: Tensor, fill: Tensor, masks: Tensor) -> Tensor:
    """(B, S) drops of f(x) = <w, x>: the segment's own share of the sum, for masks (S, H, W) or (B, S, H, W)."""
    return torch.einsum("chw,bchw,bshw->bs", w, inputs - fill, masks.to(inputs).expand(len(inputs), -1, -1, -1))


def map_by_hand(drops: Tensor, masks: Tensor) -> Tensor:
    """(B, 1, H, W): at each pixel the mean of the drops of the masks (S, H, W) or (B, S, H, W) over it."""
    masks = masks.to(drops).expand(len(drops), -1, -1, -1)
    total, count = torch.einsum("bs,bshw->bhw", drops, masks), masks.sum(1)
    return torch.where(count > 0, total / count.clamp_min(1), 0.0)[:, None]


def box_masks(boxes: list[tuple[int, int, int, int]], height: int, width: int) -> Tensor:
    masks = torch.zeros(len(boxes), height, width, dtype=torch.bool)
    for mask, (top, left, bottom, right) in zip(masks, boxes, strict=True):
        mask[top:bottom, left:right] = True
    return masks


def roundings(w: Tensor) -> tuple[int, float]:
    """The score sums numel products, twice for a drop, and no partial sum exceeds sum |w| for pixels in [0, 1]."""
    return 2 * w[0].numel(), float(w.abs().flatten(1).sum(1).max())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_grid_on_a_linear_scorer(shape: tuple[int, ...]) -> None:
    inputs, model = images(*shape), linear(*shape[1:])
    w = weights(model, inputs)
    height, width = shape[2:]
    rows, cols = [0, height // 3, 2 * height // 3, height], [0, width // 2, width]
    boxes = [(rows[i], cols[j], rows[i + 1], cols[j + 1]) for i in range(3) for j in range(2)]
    masks = box_masks(boxes, height, width)
    assert torch.equal(masks.sum(0), torch.ones(height, width, dtype=torch.int64)), "the grid tiles the image"

    found, more = details(model, inputs, 2, segments=Grid(3, 2), fill=0.25)
    expected = drops_by_hand(w[2], inputs, torch.full_like(inputs, 0.25), masks)
    assert more["boxes"].tolist() == [list(box) for box in boxes]
    assert_rounding(torch.stack(more["drops"]), expected, *roundings(w))
    assert_rounding(found, map_by_hand(expected, masks), *roundings(w))
    # the segments share the score out: a linear model has no interactions
    total = (model(inputs) - model(torch.full_like(inputs, 0.25)))[:, 2].detach()
    assert_rounding(torch.stack(more["drops"]).sum(1), total, *roundings(w))


@pytest.mark.parametrize(
    ("window", "tops", "lefts"),
    [
        (Window(3, 2), [0, 2, 4], [0, 2, 4, 6]),  # 7 x 8: the last column 6..9 is cut at 8
        (Window((4, 3), (3, 1)), [0, 3], [0, 1, 2, 3, 4, 5]),
        (Window(2), [0, 2, 4, 6], [0, 2, 4, 6]),  # the last row is cut to one line
        (Window((7, 20), (1, 5)), [0], [0]),
    ],
    ids=str,
)
def test_overlapping_windows_on_a_linear_scorer(window: Window, tops: list[int], lefts: list[int]) -> None:
    inputs, model = images(2, 3, 7, 8), linear(3, 7, 8)
    w = weights(model, inputs)
    size = window.size if isinstance(window.size, tuple) else (window.size, window.size)
    boxes = [(top, left, min(top + size[0], 7), min(left + size[1], 8)) for top in tops for left in lefts]
    masks = box_masks(boxes, 7, 8)
    assert masks.any(0).all(), "the windows cover the image"

    found, more = details(model, inputs, 1, segments=window)
    expected = drops_by_hand(w[1], inputs, torch.zeros_like(inputs), masks)
    assert more["boxes"].tolist() == [list(box) for box in boxes]
    assert_rounding(torch.stack(more["drops"]), expected, *roundings(w))
    assert_rounding(found, map_by_hand(expected, masks), *roundings(w))


def test_ragged_label_maps_on_a_linear_scorer() -> None:
    inputs, model = images(3, 2, 4, 5), linear(2, 4, 5)
    w = weights(model, inputs)
    few = torch.zeros(4, 5, dtype=torch.int64)
    few[:, 2:] = 1
    gaps = torch.full((4, 5), -1)  # pixels of no segment, and labels that skip numbers
    gaps[1, 1:4], gaps[2:, 0], gaps[3, 4] = 7, 3, 40
    every = torch.arange(20).view(4, 5)
    found, more = details(model, inputs, 3, segments=[few, gaps, every])

    for image, (labels, numbers) in enumerate([(few, [0, 1]), (gaps, [3, 7, 40]), (every, list(range(20)))]):
        masks = torch.stack([labels == number for number in numbers])
        own = inputs[image : image + 1]
        expected = drops_by_hand(w[3], own, torch.zeros_like(own), masks)
        assert more["drops"][image].shape == (len(numbers),)
        assert_rounding(more["drops"][image], expected[0], *roundings(w))
        assert_rounding(found[image : image + 1], map_by_hand(expected, masks), *roundings(w))
    assert (found[1, 0][gaps < 0] == 0).all()


def test_one_label_map_serves_all_images_as_tensor_or_array() -> None:
    inputs, model = images(2, 3, 4, 6), rectified()
    labels = torch.arange(6).repeat(4, 1) // 2
    both = pysal.leave_one_out(model, inputs, 0, segments=labels)
    assert torch.equal(both, pysal.leave_one_out(model, inputs, 0, segments=labels.numpy()))
    assert torch.equal(both, pysal.leave_one_out(model, inputs, 0, segments=torch.stack([labels, labels])))


@pytest.mark.usefixtures("independence_is_known")
def test_one_run_gives_the_drops_of_every_class() -> None:
    inputs, model = images(2, 3, 6, 7), Counting(rectified(classes=5))
    _, more = details(model, inputs, [0, 3], score="probability", segments=Grid(2, 3))
    assert sum(model.passes) == 2 + 2 * 6
    for image, table in enumerate(more["class_drops"]):
        assert table.shape == (5, 6)
        assert_rounding(table.sum(0), torch.zeros(6, dtype=torch.float64), 10, scale=1.0)  # probabilities sum to 1
        for target in range(5):
            own = inputs[image : image + 1]
            _, alone = details(model, own, target, score="probability", segments=Grid(2, 3))
            assert_rounding(table[target], alone["drops"][0], 4 * 54, scale=1.0)
    assert torch.equal(more["class_drops"][0][0], more["drops"][0])
    assert torch.equal(more["class_drops"][1][3], more["drops"][1])


@pytest.mark.parametrize("score", ["logit", "probability", "log_probability"])
def test_drop_is_in_units_of_the_score(score: str) -> None:
    inputs, model = images(2, 3, 6, 7), rectified()
    kind = {"logit": lambda z: z, "probability": lambda z: z.softmax(1), "log_probability": lambda z: z.log_softmax(1)}[score]
    filled = inputs.clone()
    filled[:, :, 3:, :3] = 0
    with torch.no_grad():
        expected = (kind(model(inputs)) - kind(model(filled)))[:, 1]
    found = pysal.leave_one_out(model, inputs, 1, segments=Grid(2, 2), score=score)
    scale = float(model(inputs).detach().abs().max()) + 1
    assert_rounding(found[:, 0, 5, 0], expected, 4 * 54, scale=scale)
    if score == "probability":
        assert torch.equal(found, pysal.leave_one_out(model, inputs, 1, segments=Grid(2, 2))), "the default"


def test_callable_target() -> None:
    inputs, model = images(2, 3, 6, 7), linear(3, 6, 7)
    w = weights(model, inputs)
    _, more = details(model, inputs, lambda output: output[:, 3] - output[:, 0], score=None, segments=Grid(2, 1))
    masks = box_masks([(0, 0, 3, 7), (3, 0, 6, 7)], 6, 7)
    expected = drops_by_hand(w[3] - w[0], inputs, torch.zeros_like(inputs), masks)
    assert_rounding(torch.stack(more["drops"]), expected, 2 * roundings(w)[0], roundings(w)[1])
    assert "class_drops" not in more


@pytest.mark.parametrize("segments", [Grid(2, 3), Window(4, 3)], ids=str)
def test_numpy_black_box_gives_the_same_answers(segments: Grid | Window) -> None:
    inputs, model = images(2, 3, 6, 7), rectified()

    def function(array: np.ndarray) -> np.ndarray:
        assert type(array) is np.ndarray
        with torch.no_grad():
            return model(torch.from_numpy(array)).numpy()

    expected, more = details(model, inputs, None, score="probability", segments=segments)
    found, theirs = details(pysal.numpy_model(function), inputs, None, score="probability", segments=segments)
    assert torch.equal(found, expected)
    assert torch.equal(torch.stack(theirs["class_drops"]), torch.stack(more["class_drops"]))


def test_numpy_black_box_may_answer_into_one_buffer() -> None:
    # as runtimes with bound outputs do: the array of the last call is overwritten by the next
    inputs = images(3, 2, 4, 4)
    buffer = np.empty((2, 2))

    def function(array: np.ndarray) -> np.ndarray:
        buffer[: len(array), 0] = array.sum((1, 2, 3))
        buffer[: len(array), 1] = array[:, 0].sum((1, 2))
        return buffer[: len(array)]

    found = pysal.leave_one_out(pysal.numpy_model(function), inputs, 0, segments=Grid(2, 1), score="logit", batch_size=2)
    expected = inputs.sum(1, keepdim=True).unflatten(2, (2, 2)).sum((3, 4), keepdim=True)
    assert_rounding(found, expected.expand(3, 1, 2, 2, 4).flatten(2, 3), 4 * 32, scale=32.0)


@pytest.mark.usefixtures("independence_is_known")
def test_segments_equal_to_the_fill_drop_nothing_and_cost_nothing() -> None:
    inputs = images(2, 3, 6, 6)
    inputs[0, :, :3, :3] = 0.5  # image 0: box 0 is equal; image 1: boxes 1 and 3
    inputs[1, :, :, 3:] = 0.5
    inputs[1, 2, 5, 5] = 0.25  # ... but for one channel of one pixel of box 3
    model = Counting(rectified())
    found, more = details(model, inputs, 0, segments=Grid(2, 2), fill=0.5)
    assert sum(model.passes) == 2 + (3 + 3)
    assert more["drops"][0][0] == 0
    assert more["drops"][1][1] == 0
    assert all(drop != 0 for drop in (*more["drops"][0][1:], *more["drops"][1][[0, 2, 3]]))
    assert (found[0, 0, :3, :3] == 0).all()

    model.passes.clear()
    labels = [torch.tensor([[0, 1], [2, 3]]).repeat_interleave(3, 0).repeat_interleave(3, 1), torch.ones(6, 6, dtype=int)]
    _, more = details(model, inputs, 0, segments=labels, fill=0.5)
    assert sum(model.passes) == 2 + (3 + 1)
    assert more["drops"][0][0] == 0

    model.passes.clear()
    black = pysal.leave_one_out(model, torch.zeros_like(inputs), 0, segments=Grid(2, 2))
    assert sum(model.passes) == 2
    assert (black == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.usefixtures("independence_is_known")
def test_fills(dtype: torch.dtype) -> None:
    inputs = images(2, 3, 6, 8, dtype=dtype)
    picture, stack = images(3, 6, 8, seed=1, dtype=dtype), images(2, 3, 6, 8, seed=2, dtype=dtype)
    colour = torch.tensor([0.1, 0.2, 0.3], dtype=dtype)[:, None, None]
    means = inputs.mean((2, 3), keepdim=True)
    expected: list[tuple[Any, Tensor]] = [
        (0.1, torch.full_like(inputs, 0.1)),
        (1, torch.ones_like(inputs)),
        ((0.1, 0.2, 0.3), colour.expand_as(inputs)),
        (colour.flatten(), colour.expand_as(inputs)),
        ("black", torch.zeros_like(inputs)),
        ("white", torch.ones_like(inputs)),
        ("mean", means.expand_as(inputs)),
        (picture, picture.expand_as(inputs)),
        (picture[None], picture.expand_as(inputs)),
        (stack, stack),
    ]
    for fill, meant in expected:
        seen: list[Tensor] = []

        def model(batch: Tensor, seen: list[Tensor] = seen) -> Tensor:
            seen.append(batch.clone())
            return batch.mean((1, 2, 3))

        pysal.leave_one_out(model, inputs, 0, segments=Grid(1, 2), fill=fill, score="logit", batch_size=4)
        _, filled = seen
        for image in range(2):
            for side, columns in enumerate((slice(0, 4), slice(4, 8))):
                row = inputs[image].clone()
                row[..., columns] = meant[image, ..., columns]
                assert torch.equal(filled[2 * image + side], row), (fill, image, side)


def test_blurred_fill_is_scipys() -> None:
    inputs, model = images(2, 3, 20, 32), linear(3, 20, 32)  # sigma is a sixteenth of the longer side
    blurred = torch.from_numpy(ndimage.gaussian_filter(inputs.numpy(), (0, 0, 2.0, 2.0), mode="reflect", truncate=4.0))
    found = pysal.leave_one_out(model, inputs, 1, segments=Grid(4, 4), fill="blur", score="logit")
    expected = pysal.leave_one_out(model, inputs, 1, segments=Grid(4, 4), fill=blurred, score="logit")
    operations, scale = roundings(weights(model, inputs))
    assert_rounding(found, expected, operations + 2 * 17, scale)  # two sums of 17 taps make a blur


def test_fills_of_more_images_than_there_are_do_not_go_unnoticed() -> None:
    sentence = r"fill must be a number, a colour of 3 channels or an image of shape \(3, 4, 5\), got shape \(3, 3, 4, 5\)"
    with pytest.raises(ValueError, match=f"^pysal.leave_one_out: {sentence}$"):
        pysal.leave_one_out(linear(3, 4, 5), images(2, 3, 4, 5), segments=Grid(2, 2), fill=images(3, 3, 4, 5))


def superpixels(pixels: np.ndarray, compactness: float) -> np.ndarray:
    """Return scikit-image's six superpixels of an image (C, H, W): of a colour or grey photo, or of channels in [0, 1] each."""
    if len(pixels) in (1, 3):
        pixels = np.repeat(pixels, 3 // len(pixels), 0)
    else:
        pixels = pixels - pixels.min((1, 2), keepdims=True)
        pixels = pixels / pixels.max((1, 2), keepdims=True)
        rows = pixels.reshape(len(pixels), -1).T
        along = rows @ np.linalg.svd(rows - rows.mean(0))[2][0]  # the direction in which it varies most
        compactness *= (along.max() - along.min()) / 100  # of black and white in Lab
    options = {"n_segments": 6, "compactness": compactness, "sigma": 0.5, "start_label": 0, "channel_axis": -1}
    return slic(pixels.transpose(1, 2, 0), **options)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_slic_is_scikit_images(shape: tuple[int, ...]) -> None:
    inputs, model = images(*shape), linear(*shape[1:])
    _, more = details(model, inputs, segments=Slic(6, compactness=3.0, sigma=0.5))
    counts = []
    for image, pixels in enumerate(inputs.numpy()):
        labels = superpixels(pixels, 3.0)
        distinct = np.unique(labels)
        counts.append(len(distinct))
        assert np.array_equal(distinct[more["labels"][image].numpy()], labels)
        masks = torch.from_numpy(np.stack([labels == label for label in distinct]))
        w, own = weights(model, inputs), inputs[image : image + 1]
        expected = drops_by_hand(w[0], own, torch.zeros_like(own), masks)[0]
        assert_rounding(more["drops"][image], expected, *roundings(w))
    assert [len(drops) for drops in more["drops"]] == counts


@pytest.mark.parametrize(("size", "stride"), [((3, 3), (2, 2)), ((2, 3), (2, 3)), ((4, 2), (1, 2))], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 7, 8), (1, 1, 6, 6)], ids=str)
def test_equals_captum_occlusion(shape: tuple[int, ...], size: tuple[int, int], stride: tuple[int, int]) -> None:
    inputs, model = images(*shape), rectified(shape[1])
    theirs = Occlusion(model).attribute(
        inputs, sliding_window_shapes=(shape[1], *size), strides=(shape[1], *stride), baselines=0.3, target=2
    )
    ours = pysal.leave_one_out(model, inputs, 2, segments=Window(size, stride), fill=0.3, score="logit")
    # their map repeats over channels, and adds up the drops of the at most 4 windows over a pixel in float32
    assert_rounding(ours.expand_as(theirs), theirs, 8, scale=4 * float(theirs.abs().max()))


def test_equals_captum_feature_ablation() -> None:
    inputs, model = images(3, 3, 6, 7), rectified()
    labels = torch.randint(0, 5, (3, 1, 6, 7), generator=torch.Generator().manual_seed(1))
    theirs = FeatureAblation(model).attribute(inputs, feature_mask=labels.expand_as(inputs), target=1, baselines=1.0)
    ours = pysal.leave_one_out(model, inputs, 1, segments=labels[:, 0], fill="white", score="logit")
    assert_rounding(ours.expand_as(theirs), theirs, 4 * 54, scale=float(model(inputs).detach().abs().max()))


def alone(inputs: Tensor, fill: float, masks: Tensor, model: Any) -> Tensor:
    """(B, S, K) gains, each from its own picture: one segment of the image, masks (S, H, W), and fill for all else."""
    pictures = torch.where(masks[:, None], inputs[:, None], fill)
    with torch.no_grad():
        return model(pictures.flatten(0, 1)).unflatten(0, pictures.shape[:2]) - model(torch.full_like(inputs, fill))[:, None]


@pytest.mark.parametrize(("a", "b"), [("or", 0.0), ("and", 1.0)])
def test_both_modes_see_segments_that_stand_in_for_each_other_or_need_each_other(a: str, b: float) -> None:
    """The halves are worth: either is enough, or both are needed; the Shapley values of both games are a half each."""

    def game(batch: Tensor) -> Tensor:
        left, right = batch[:, 0, :, :2].amax((1, 2)), batch[:, 0, :, 2:].amax((1, 2))
        return torch.maximum(left, right) if a == "or" else left * right

    inputs = torch.ones(1, 1, 3, 4, dtype=torch.float64)
    for mode, value in (("out", b), ("in", 1 - b), ("both", 0.5)):
        found = pysal.leave_one_out(game, inputs, 0, segments=Grid(1, 2), mode=mode, score="raw")
        assert torch.equal(found, torch.full_like(inputs, value)), mode


@pytest.mark.parametrize("segments", [Grid(2, 3), Window(4, 3), Slic(6), "map"], ids=str)
@pytest.mark.parametrize("batch_size", [None, 1, 3])
def test_gains_are_those_of_segments_alone(segments: Any, batch_size: int | None) -> None:
    inputs, model = images(2, 3, 6, 7), rectified()
    if segments == "map":
        segments = torch.arange(42).view(6, 7) // 9 - 1  # the first nine pixels are of no segment, and always fill
    options = {"segments": segments, "fill": 0.25}

    def run(**more: Any) -> Any:
        given = {"leave_one_out": {**options, **more}}
        return pysal.explain(
            model, inputs, 1, methods="leave_one_out", score="raw", method_options=given, batch_size=batch_size
        )["leave_one_out"]

    out, alone_in, both = run(), run(mode="in"), run(mode="both")
    assert "drops" not in alone_in.details
    assert both.details["mode"] == "both"
    rounding = 4 * 54
    for image in range(2):
        if "boxes" in out.details:
            masks = box_masks([tuple(box) for box in out.details["boxes"].tolist()], 6, 7)
        else:
            labels = out.details["labels"][image]
            masks = torch.stack([labels == number for number in range(int(labels.max()) + 1)])
        own = inputs[image : image + 1]
        expected, scale = alone(own, 0.25, masks, model)[0], float(model(inputs).detach().abs().max())
        assert_rounding(alone_in.details["gains"][image], expected[:, 1], rounding, scale=scale)
        assert_rounding(alone_in.details["class_gains"][image], expected.T, rounding, scale=scale)
        assert_rounding(alone_in.map[image], map_by_hand(expected[None, :, 1], masks)[0], rounding, scale=scale)
        assert torch.equal(both.details["drops"][image], out.details["drops"][image])
        assert torch.equal(both.details["gains"][image], alone_in.details["gains"][image])
        mean = (out.details["drops"][image] + expected[:, 1]) / 2
        assert_rounding(both.details["means"][image], mean, rounding, scale=scale)
        assert_rounding(both.map[image], map_by_hand(mean[None], masks)[0], rounding, scale=scale)


def test_of_two_segments_the_means_are_shapley_values_and_add_up() -> None:
    inputs, model = images(3, 3, 6, 7), rectified()
    _, more = details(model, inputs, 2, segments=Grid(1, 2), fill=0.5, mode="both")
    with torch.no_grad():
        change = (model(inputs) - model(torch.full_like(inputs, 0.5)))[:, 2]
    assert_rounding(torch.stack(more["means"]).sum(1), change, 4 * 54, scale=float(model(inputs).detach().abs().max()))


@pytest.mark.usefixtures("independence_is_known")
def test_gains_cost_one_pass_for_the_fill_and_one_for_each_segment_that_is_no_fill() -> None:
    inputs, model = images(2, 3, 6, 6), Counting(rectified())
    inputs[0, :, :3, :3] = 0.5
    _, more = details(model, inputs, 0, segments=Grid(2, 2), fill=0.5, mode="in")
    assert sum(model.passes) == 2 + 2 + (3 + 4)
    assert more["gains"][0][0] == 0


def test_gains_of_a_model_whose_rows_depend_on_each_other_are_those_of_whole_batches() -> None:
    inputs = images(2, 3, 6, 7)

    def coupled(batch: Tensor) -> Tensor:
        return batch.sum((1, 2, 3))[:, None] * batch.amax()

    inputs[1, 0, 5, 6] = 2.0
    _, more = details(coupled, inputs, 0, score="raw", segments=Grid(1, 1), mode="in", fill=0.5)
    with pytest.raises(ValueError, match="answer for each row of a pass as if it were alone"):
        pysal.leave_one_out(coupled, inputs, 0, segments=Grid(2, 2), mode="in", fill=0.5, score="raw")
    found = pysal.leave_one_out(coupled, inputs, 0, segments=Grid(1, 1), mode="in", fill=0.5, score="raw", batch_size=2)
    expected = coupled(inputs) - coupled(torch.full_like(inputs, 0.5))
    assert_rounding(found[:, 0, 0, 0], expected[:, 0], 4 * 126, scale=4 * 126.0)
    assert_rounding(torch.stack(more["gains"]), expected, 4 * 126, scale=4 * 126.0)


def test_words_for_every_mode() -> None:
    assert get_args(Mode) == tuple(MODES)


@pytest.mark.parametrize("mode", ["in", "both"])
def test_an_explanation_says_the_mode_and_draws_no_falls_of_the_score(mode: str) -> None:
    inputs = images(1, 3, 6, 7)
    given = {"leave_one_out": {"segments": Grid(2, 2), "mode": mode}}
    found = pysal.explain(rectified(), inputs, 1, methods="leave_one_out", method_options=given)
    panel = found.panel("leave_one_out")
    assert (panel.title, panel.unit) == (MODES[mode].title, MODES[mode].unit.format(score="probability"))
    assert panel.drops is None, "which would be written on the map as the score before and after"
    assert "4 segments" in panel.small_print
    with pytest.raises(ValueError, match="kind='drops' can show"):
        found.plot(kind="drops")
    given = {"smooth_grad": {"base": "leave_one_out", "samples": 2, "method_options": {"segments": Grid(2, 2), "mode": mode}}}
    smooth = pysal.explain(rectified(), inputs, 1, methods="smooth_grad", method_options=given)
    assert smooth.panel("smooth_grad").unit.startswith(MODES[mode].unit.format(score=""))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"mode": "inn"}, "mode must be one of 'out', 'in', 'both' (did you mean 'in'?), got 'inn'"),
        ({"mode": None}, "mode must be one of 'out', 'in', 'both', got None"),
        ({"mode": "in", "approximate": 0.5}, "approximate must be None with mode='in', got 0.5"),
        ({"mode": "both", "approximate": 0.5}, "approximate must be None with mode='both', got 0.5"),
    ],
    ids=str,
)
def test_refuses_modes(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match="must") as raised:
        pysal.leave_one_out(rectified(), images(1, 3, 6, 7), 0, segments=Grid(2, 2), **options)
    assert str(raised.value).startswith(f"pysal.leave_one_out: {sentence}")
