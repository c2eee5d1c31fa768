"""Deletion and insertion against loops that replace pixels one by one, and in closed form on linear models."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import convolve, gaussian_filter
from torch import Tensor

import pysal
from pysal import metrics
from pysal.engine.request.score import SCORE_KINDS
from tests.methods.networks import Counting, assert_rounding, images, linear, rectified, smooth, weights

# sums of 3 * 9 * 8 products, a softmax, and the sum of a curve
OPERATIONS = 3 * 72 + 64


def curve_in_loops(model: Any, inputs: Tensor, maps: Tensor, target: int, steps: int, nothing: Tensor, insert: bool) -> Tensor:
    """The protocol of Petsiuk et al., one image and one pixel at a time: probabilities (B, steps + 1)."""
    result = []
    height, width = inputs.shape[2:]
    for image, map, empty in zip(inputs, maps.sum(1), nothing, strict=True):
        ranked = sorted(range(height * width), key=lambda place: -float(map.flatten()[place]))  # sorted() keeps ties in order
        now, then = (empty.clone(), image) if insert else (image.clone(), empty)
        scores = [float(model(now[None]).detach().softmax(1)[0, target])]
        done = 0
        for step in range(1, steps + 1):
            while done < height * width * step // steps:
                row, column = divmod(ranked[done], width)
                now[:, row, column] = then[:, row, column]
                done += 1
            scores.append(float(model(now[None]).detach().softmax(1)[0, target]))
        result.append(scores)
    return torch.tensor(result, dtype=torch.float64)


@pytest.mark.parametrize("network", [rectified, smooth])
@pytest.mark.parametrize("steps", [1, 5, 7, 72])
def test_curves_are_those_of_the_loops(network: Any, steps: int) -> None:
    model, inputs, maps = network(), images(3, 3, 9, 8), images(3, 3, 9, 8, seed=1)
    found = metrics.deletion(model, inputs, maps, 2, steps=steps)
    assert_rounding(found.scores, curve_in_loops(model, inputs, maps, 2, steps, torch.zeros_like(inputs), False), OPERATIONS)
    other = images(3, 3, 9, 8, seed=2)
    found = metrics.insertion(model, inputs, maps, 2, steps=steps, substrate=other)
    assert_rounding(found.scores, curve_in_loops(model, inputs, maps, 2, steps, other, True), OPERATIONS)


def test_equal_pixels_go_in_reading_order() -> None:
    model, inputs = rectified(), images(2, 3, 9, 8)
    maps = (images(2, 1, 9, 8, seed=3) * 4).floor()
    found = metrics.deletion(model, inputs, maps, 1, steps=9)
    assert_rounding(found.scores, curve_in_loops(model, inputs, maps, 1, 9, torch.zeros_like(inputs), False), OPERATIONS)


def test_a_linear_model_loses_exactly_what_the_map_says() -> None:
    # f = <w, x> + c: deleting the pixels with the largest w x leaves f(0) + the sum of the smaller ones, so no other order of
    # single pixels has a smaller area, and the curve is the running sum of the sorted contributions
    inputs = images(4, 2, 5, 6)
    model = linear(2, 5, 6)
    contributions = (weights(model, inputs)[3] * inputs).sum(1, keepdim=True)
    found = metrics.deletion(model, inputs, contributions, 3, steps=30, score="logit")
    ordered = contributions.flatten(1).sort(dim=1, descending=True).values
    left = torch.cat([ordered.sum(1, keepdim=True), ordered.sum(1, keepdim=True) - ordered.cumsum(1)], 1)
    assert_rounding(found.scores, left + model[1].bias.detach()[3], 4 * OPERATIONS, scale=float(ordered.abs().sum(1).max()) + 1)
    expected = (found.scores[:, 1:] + found.scores[:, :-1]).sum(1) / 60
    assert_rounding(found.auc, expected, OPERATIONS)
    for seed in range(5):
        worse = metrics.deletion(model, inputs, images(4, 1, 5, 6, seed=seed), 3, steps=30, score="logit")
        assert (worse.auc > found.auc).all()
    # what is deleted first is inserted first: the two curves of a linear model add up to f(x) + f(0)
    shown = metrics.insertion(model, inputs, contributions, 3, steps=30, score="logit", substrate="zero")
    total = found.scores[:, :1] + found.scores[:, -1:]
    assert_rounding(shown.scores + found.scores, total.expand(4, 31), 4 * OPERATIONS, scale=30.0)


def test_area_is_that_of_the_authors_where_the_steps_are_equal() -> None:
    model, inputs = rectified(), images(2, 3, 8, 8)
    curve = metrics.deletion(model, inputs, images(2, 1, 8, 8, seed=1), 0, steps=16)
    authors = (curve.scores.sum(1) - curve.scores[:, 0] / 2 - curve.scores[:, -1] / 2) / 16
    assert_rounding(curve.auc, authors, 40)
    assert curve.shares.tolist() == [step / 16 for step in range(17)]


def test_steps_that_do_not_divide_the_pixels_are_weighed_by_their_pixels() -> None:
    model, inputs = rectified(), images(1, 3, 3, 3)
    curve = metrics.deletion(model, inputs, images(1, 1, 3, 3, seed=1), 0, steps=4)
    assert_rounding(curve.shares, torch.tensor([0, 2 / 9, 4 / 9, 6 / 9, 1], dtype=torch.float64), 2)
    y = curve.scores[0]
    by_hand = (2 * (y[0] + y[1]) + 2 * (y[1] + y[2]) + 2 * (y[2] + y[3]) + 3 * (y[3] + y[4])) / 18
    assert_rounding(curve.auc, by_hand[None], 20)


def test_blur_is_the_authors_kernel_with_the_edge_repeated() -> None:
    impulse = np.zeros((11, 11))
    impulse[5, 5] = 1
    kernel = gaussian_filter(impulse, 5)
    image = images(1, 2, 17, 14)
    expected = np.stack([convolve(channel, kernel, mode="nearest") for channel in image[0].numpy()])
    model = linear(2, 17, 14)
    curve = metrics.insertion(model, image, images(1, 1, 17, 14, seed=1), 1, score="logit", steps=3)
    start = model(torch.from_numpy(expected)[None])[0, 1].detach()
    assert_rounding(curve.scores[:, 0], start[None], 121 + 2 * 17 * 14, scale=20.0)
    flat = torch.full((1, 2, 17, 14), 0.25, dtype=torch.float64)
    curve = metrics.deletion(model, flat, images(1, 1, 17, 14, seed=1), 1, score="logit", steps=3, substrate="blur")
    assert_rounding(curve.scores, curve.scores[:, :1].expand(1, 4), 121 + 2 * 17 * 14, scale=20.0)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 5, 100])
@pytest.mark.parametrize("name", ["deletion", "insertion"])
@pytest.mark.usefixtures("independence_is_known")
def test_chunks_change_nothing(name: str, batch_size: int) -> None:
    model, inputs, maps = rectified(), images(3, 3, 9, 8), images(3, 1, 9, 8, seed=1)
    target = torch.tensor([0, 3, 1])
    whole = getattr(metrics, name)(model, inputs, maps, target, steps=6)
    counting = Counting(model)
    parts = getattr(metrics, name)(counting, inputs, maps, target, steps=6, batch_size=batch_size)
    assert_rounding(parts.scores, whole.scores, OPERATIONS)
    assert sum(counting.passes) == 3 * 7
    assert max(counting.passes) == min(batch_size, 18)


def test_a_chunk_that_ran_out_of_memory_is_run_again() -> None:
    model, inputs, maps = rectified(), images(3, 3, 9, 8), images(3, 1, 9, 8, seed=1)
    refused: list[int] = []

    def short_of_memory(batch: Tensor) -> Tensor:
        if len(batch) > 2:
            refused.append(len(batch))
            raise torch.OutOfMemoryError("no")
        return model(batch)

    found = metrics.insertion(short_of_memory, inputs, maps, 0, steps=6)
    assert refused
    assert_rounding(found.scores, metrics.insertion(model, inputs, maps, 0, steps=6).scores, OPERATIONS)


def test_nobody_sees_what_the_model_does_to_its_batch() -> None:
    model, inputs, maps = rectified(), images(2, 3, 9, 8), images(2, 1, 9, 8, seed=1)
    before = inputs.clone(), maps.clone()

    def spoils(batch: Tensor) -> Tensor:
        output = model(batch)
        batch.fill_(torch.nan)
        return output

    for name in ("deletion", "insertion"):
        found = getattr(metrics, name)(spoils, inputs, maps, 1, steps=5, batch_size=2)
        assert_rounding(found.scores, getattr(metrics, name)(model, inputs, maps, 1, steps=5).scores, OPERATIONS)
    assert torch.equal(inputs, before[0])
    assert torch.equal(maps, before[1])


def test_layouts_and_prepared_models() -> None:
    model = rectified().float()
    inputs, maps = images(2, 3, 12, 10, dtype=torch.float32), images(2, 1, 12, 10, seed=1, dtype=torch.float32)
    expected = metrics.deletion(model, inputs, maps, 1, steps=6).scores
    prepared = pysal.prepare(model, inputs[:1])
    for found in (
        metrics.deletion(model, inputs.contiguous(memory_format=torch.channels_last), maps, 1, steps=6).scores,
        metrics.deletion(prepared, inputs, maps, 1, steps=6).scores,
    ):
        # two float32 convolutions, of at most 54 products, in another order
        assert float((found - expected).abs().max()) <= 2 * 54 * 8 * torch.finfo(torch.float32).eps


def test_none_is_the_class_of_the_whole_image() -> None:
    model, inputs, maps = rectified(), images(4, 3, 9, 8), images(4, 1, 9, 8, seed=1)
    best = model(inputs).argmax(1)
    for name in ("deletion", "insertion"):
        found = getattr(metrics, name)(model, inputs, maps, steps=4)
        assert torch.equal(found.scores, getattr(metrics, name)(model, inputs, maps, best, steps=4).scores)


def test_nan_stays_with_its_image() -> None:
    model, inputs, maps = rectified(), images(3, 3, 9, 8), images(3, 1, 9, 8, seed=1)
    whole = metrics.deletion(model, inputs, maps, 1, steps=4).auc
    spoilt = maps.clone()
    spoilt[1, 0, 4, 4] = torch.nan
    found = metrics.deletion(model, inputs, spoilt, 1, steps=4).auc
    assert found.isnan().tolist() == [False, True, False]
    assert_rounding(found[[0, 2]], whole[[0, 2]], OPERATIONS)

    def fails_on_black(batch: Tensor) -> Tensor:
        black = (batch == 0).flatten(1).all(1)
        return torch.where(black[:, None], torch.nan, model(batch))

    curve = metrics.deletion(fails_on_black, inputs, maps, 1, steps=4)
    assert curve.scores.isnan().sum(1).tolist() == [1, 1, 1]
    assert curve.auc.isnan().all()


IMAGE, MAP = images(2, 3, 9, 8), images(2, 1, 9, 8, seed=1)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"maps": MAP[:1]}, ValueError, "maps must have shape (2, 1 or 3, 9, 8), got shape (1, 1, 9, 8)"),
        ({"maps": MAP.expand(2, 2, 9, 8)}, ValueError, "maps must have shape (2, 1 or 3, 9, 8), got shape (2, 2, 9, 8)"),
        ({"maps": MAP.long()}, TypeError, "maps must have dtype float32 or float64 or float16 or bfloat16, got int64"),
        ({"maps": [1.0]}, TypeError, "maps must be a torch.Tensor, got list"),
        ({"steps": 0}, ValueError, "steps must be a whole number of at least 1, got 0"),
        ({"steps": 1.5}, ValueError, "steps must be a whole number of at least 1, got 1.5"),
        ({"steps": 73}, ValueError, "steps must be at most the 72 pixels of an image, got 73"),
        (
            {"substrate": "grey"},
            ValueError,
            "substrate must be 'zero', 'blur', 'drop', a number, a colour or an image, got 'grey'",
        ),
        ({"reduction": "mean"}, ValueError, "reduction must be 'sum' or 'max_abs', got 'mean'"),
        ({"score": "odds"}, ValueError, f"score must be one of {', '.join(map(repr, SCORE_KINDS))}, got 'odds'"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["deletion", "insertion"])
def test_errors(name: str, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    def never(batch: Tensor) -> Tensor:
        raise AssertionError("the model was run")

    given = {"maps": MAP, **arguments}
    with pytest.raises(error) as caught:
        getattr(metrics, name)(never, IMAGE, given.pop("maps"), 0, **given)
    assert str(caught.value) == f"pysal.metrics.{name}: {message}"
