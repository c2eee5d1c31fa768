"""ROAD against a loop that removes pixel after pixel and solves the equations as a dense system."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import pysal
from pysal import metrics
from tests.methods.networks import assert_rounding, images, rectified

HEIGHT, WIDTH = 9, 8
# a dense solution of 72 equations, a network of some hundred products, a softmax
OPERATIONS = 72 * 72 + 3 * 72 + 64
DIRECT = ((0, 1), (0, -1), (1, 0), (-1, 0))
OBLIQUE = ((1, 1), (-1, 1), (1, -1), (-1, -1))


def filled_in(image: Tensor, removed: list[int]) -> Tensor:
    """Section 4 of Rong et al.: each removed pixel is the mean of its neighbours, those beside it counting twice."""
    number = {place: row for row, place in enumerate(removed)}
    left, right = np.zeros((len(removed), len(removed))), np.zeros((len(removed), image.shape[0]))
    for place, row in number.items():
        down, across = divmod(place, WIDTH)
        for steps, weight in ((DIRECT, 1 / 6), (OBLIQUE, 1 / 12)):
            for vertical, horizontal in steps:
                other = down + vertical, across + horizontal
                if not (0 <= other[0] < HEIGHT and 0 <= other[1] < WIDTH):
                    continue
                left[row, row] += weight
                there = other[0] * WIDTH + other[1]
                if there in number:
                    left[row, number[there]] -= weight
                else:
                    right[row] += weight * image[:, other[0], other[1]].numpy()
    changed = image.clone()
    changed.view(len(image), -1)[:, removed] = torch.from_numpy(np.linalg.solve(left, right).T)
    return changed


def in_loops(model: Any, inputs: Tensor, maps: Tensor, target: Tensor, shares: list[float], noise: float) -> Tensor:
    """Scores (B, S, 2) without the most and without the least important pixels."""
    rows = []
    for row, (image, map) in enumerate(zip(inputs, maps.sum(1), strict=True)):
        ranked = sorted(range(HEIGHT * WIDTH), key=lambda place: -float(map.flatten()[place]))  # sorted() keeps ties in order
        for step, share in enumerate(shares):
            count = int(share * HEIGHT * WIDTH)
            for draw, removed in enumerate((ranked[:count], ranked[-count:])):
                changed = filled_in(image, removed)
                number = torch.tensor([0])
                deviation = torch.tensor([noise], dtype=torch.float64)
                drawn = pysal.ops.gaussian_noise(
                    torch.zeros_like(image)[None], deviation, 5, number, number + row, number + 2 * step + draw
                )[0]
                changed.view(len(image), -1)[:, removed] += drawn.view(len(image), -1)[:, removed]
                rows.append(model(changed[None]).detach().softmax(1)[0, target[row]])
    return torch.stack(rows).view(len(inputs), len(shares), 2)


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_scores_are_those_of_the_loop(noise: float) -> None:
    model, inputs, target = rectified(), images(3, 3, HEIGHT, WIDTH), torch.tensor([2, 0, 1])
    maps = (images(3, 3, HEIGHT, WIDTH, seed=1) * 4).floor()  # with ties
    shares = [0.05, 0.4, 0.9]
    found = metrics.road(model, inputs, maps, target, shares=shares, noise=noise, seed=5)
    expected = in_loops(model, inputs, maps, target, shares, noise)
    assert_rounding(found.most, expected[:, :, 0], OPERATIONS)
    assert_rounding(found.least, expected[:, :, 1], OPERATIONS)
    assert_rounding(found.difference, (expected[:, :, 1] - expected[:, :, 0]).mean(1), OPERATIONS)
    assert found.shares.tolist() == shares


@pytest.mark.usefixtures("independence_is_known")
@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 100])
def test_chunks_and_company_change_nothing(batch_size: int) -> None:
    model, inputs, maps = rectified(), images(3, 3, HEIGHT, WIDTH), images(3, 1, HEIGHT, WIDTH, seed=1)
    whole = metrics.road(model, inputs, maps, 1)
    parts = metrics.road(model, inputs, maps, 1, batch_size=batch_size)
    assert_rounding(parts.most, whole.most, OPERATIONS)
    assert_rounding(parts.least, whole.least, OPERATIONS)
    alone = metrics.road(model, inputs[2:], maps[2:], 1, image_ids=[2], batch_size=batch_size)
    assert_rounding(alone.most, whole.most[2:], OPERATIONS)


def test_a_plain_image_loses_nothing() -> None:
    model, plain = rectified(), torch.full((1, 3, HEIGHT, WIDTH), 0.3, dtype=torch.float64)
    found = metrics.road(model, plain, images(1, 1, HEIGHT, WIDTH), 2, noise=0.0)
    before = model(plain).detach().softmax(1)[:, 2:3].expand(1, 5)
    assert_rounding(found.most, before, OPERATIONS)
    assert_rounding(found.least, before, OPERATIONS)


def test_a_map_and_its_opposite_exchange_the_two() -> None:
    model, inputs, maps = rectified(), images(2, 3, HEIGHT, WIDTH), images(2, 1, HEIGHT, WIDTH, seed=1)
    found, other = (metrics.road(model, inputs, one, 1, noise=0.0) for one in (maps, -maps))
    assert_rounding(found.most, other.least, OPERATIONS)
    assert_rounding(found.difference, -other.difference, OPERATIONS)


def test_a_map_that_is_not_finite_has_no_figure() -> None:
    maps = images(2, 1, HEIGHT, WIDTH, seed=1)
    maps[0, 0, 3, 3] = torch.nan
    found = metrics.road(rectified(), images(2, 3, HEIGHT, WIDTH), maps, 1)
    assert found.difference.isnan().tolist() == [True, False]


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"shares": []}, ValueError, "shares must be a sequence of numbers above 0 and below 1, got []"),
        ({"shares": [0.5, 1.0]}, ValueError, "shares must be a sequence of numbers above 0 and below 1, got [0.5, 1.0]"),
        ({"shares": "half"}, ValueError, "shares must be a sequence of numbers above 0 and below 1, got 'half'"),
        ({"noise": -0.1}, ValueError, "noise must be a finite number of at least 0, got -0.1"),
        ({"noise": True}, ValueError, "noise must be a finite number of at least 0, got True"),
        ({"seed": 0.5}, ValueError, "seed must be a whole number in [-2^63, 2^63), got 0.5"),
        ({"image_ids": [0]}, ValueError, "image_ids must have one id for each of the 2 images, got shape (1,)"),
        ({"reduction": "mean"}, ValueError, "reduction must be 'sum' or 'max_abs', got 'mean'"),
    ],
)
def test_errors(given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        metrics.road(rectified(), images(2, 3, HEIGHT, WIDTH), images(2, 3, HEIGHT, WIDTH), 1, **given)
    assert str(caught.value).startswith(f"pysal.metrics.road: {message}")
