"""The grid pointing game against a loop over grids, and where its answer is known."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pysal
from pysal import metrics
from tests.methods.networks import assert_rounding, images, rectified, seeded

OPERATIONS = 32 * 54 + 64


def in_loops(model: Any, inputs: Tensor, classes: list[int], grid: int, method: Any) -> Tensor:
    """Put the images beside each other, explain each one's class, and add up what lies on it."""
    _, _, height, width = inputs.shape
    found = []
    for first in range(0, len(inputs), grid * grid):
        rows = [torch.cat(list(inputs[first + r * grid : first + (r + 1) * grid]), dim=2) for r in range(grid)]
        mosaic = torch.cat(rows, dim=1)[None]
        for place in range(grid * grid):
            map = method(model, mosaic, classes[first + place])
            map = map.abs().amax(1) if method is pysal.gradient else map.sum(1)
            map = map[0].clamp(min=0)
            row, column = divmod(place, grid)
            own = map[row * height : (row + 1) * height, column * width : (column + 1) * width]
            found.append(float(own.sum() / map.sum()))
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("method", ["gradient", "integrated_gradients", "grad_cam"])
@pytest.mark.parametrize(("grid", "count"), [(2, 8), (3, 9)])
def test_is_that_of_the_loop(method: str, grid: int, count: int) -> None:
    model, inputs = rectified(classes=9), images(count, 3, 9, 8)
    classes = [(4 * image) % 9 for image in range(count)]
    found = metrics.grid_pointing_game(model, inputs, classes, method=method, grid=grid)
    expected = in_loops(model, inputs, classes, grid, getattr(pysal, method))
    known = expected.isfinite()  # Grad-CAM has nothing positive for some classes
    assert known.sum() > count / 2
    assert torch.equal(found.isfinite(), known)
    assert_rounding(found[known], expected[known], 8 * OPERATIONS)
    parts = metrics.grid_pointing_game(model, inputs, classes, method=method, grid=grid, batch_size=1)
    assert_rounding(parts[known], found[known], 8 * OPERATIONS)


class Colours(nn.Module):
    """Class k is how much of colour k there is, so that its gradient times the image lies where the colour is."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.square().mean((2, 3))


def coloured(*colours: int) -> Tensor:
    photos = torch.zeros(len(colours), 4, 6, 6, dtype=torch.float64)
    for row, colour in enumerate(colours):
        photos[row, colour] = 0.5
    return photos


def test_a_model_that_sees_one_cell_only() -> None:
    inputs = coloured(2, 0, 3, 1)
    for cells in ("whole", "shrunk"):
        for target in (None, [2, 0, 3, 1]):  # the class with the highest answer is the colour
            found = metrics.grid_pointing_game(Colours().eval(), inputs, target, method="integrated_gradients", cells=cells)
            assert_rounding(found, torch.ones(4, dtype=torch.float64), OPERATIONS)
    # asked for its neighbour's colour, nothing lies on the cell itself
    wrong = metrics.grid_pointing_game(Colours().eval(), inputs, [0, 3, 1, 2], method="integrated_gradients")
    assert wrong.tolist() == [0.0] * 4


def test_a_map_of_nothing_has_no_figure() -> None:
    found = metrics.grid_pointing_game(Colours().eval(), torch.zeros(4, 4, 6, 6), [0, 1, 2, 3], method="integrated_gradients")
    assert found.isnan().all()


def test_prepared_models_answer_alike() -> None:
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten())).float()
    inputs = images(4, 3, 8, 8, dtype=torch.float32)
    prepared = pysal.prepare(model, inputs)
    expected = metrics.grid_pointing_game(model, inputs, [0, 1, 2, 3])
    assert torch.allclose(metrics.grid_pointing_game(prepared, inputs, [0, 1, 2, 3]), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"count": 6}, "inputs must hold a multiple of 4 images for a grid of 2 x 2, got 6"),
        ({"grid": 1}, "grid must be "),
        ({"cells": "half"}, "cells must be "),
        ({"cells": "shrunk"}, "inputs must have sides that 2 divides where cells are shrunk, got 9 x 8"),
        ({"target": [0, 1, 2, 1]}, "target must be 4 different classes for images 0 to 3, which are put "
         "together, got class 1 twice"),
        ({"target": pysal.Margin(0, 1)}, "target must be classes, one of each image, got Margin"),
        ({"method": "lime"}, "method must be one of "),
    ],
)  # fmt: skip
def test_errors(given: dict[str, Any], message: str) -> None:
    count, target = given.pop("count", 4), given.pop("target", [0, 1, 2, 3])
    target = [0, 1, 2, 3, 0, 1] if count == 6 else target
    with pytest.raises((ValueError, TypeError)) as caught:
        metrics.grid_pointing_game(rectified(), images(count, 3, 9, 8), target, **given)
    assert str(caught.value).startswith(f"pysal.metrics.grid_pointing_game: {message}")


def test_a_model_of_one_size_is_told_to_shrink() -> None:
    single = nn.Sequential(nn.Flatten(), nn.Linear(3 * 6 * 8, 4)).eval()
    given = images(4, 3, 6, 8).float()
    sentence = (
        "^pysal.metrics.grid_pointing_game: cells must be 'shrunk' for a model that does not take the 12 x 16 pixels of images "
        r"put together, got 'whole' \(mat1 and mat2 shapes cannot be multiplied .*\)$"
    )
    with pytest.raises(ValueError, match=sentence):
        metrics.grid_pointing_game(single, given, [0, 1, 2, 3])
    assert metrics.grid_pointing_game(single, given, [0, 1, 2, 3], cells="shrunk").shape == (4,)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):  # which no size would help
        metrics.grid_pointing_game(nn.Linear(3, 4).eval(), given, [0, 1, 2, 3])
