"""Pointing game and mass in mask against loops over pixels."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pysal import metrics
from tests.methods.networks import assert_rounding, images

MAPS = images(6, 2, 9, 11, seed=1) - 0.4
MASKS = images(6, 1, 9, 11, seed=2)[:, 0] > 0.93


def hit(map: Tensor, mask: Tensor, tolerance: float) -> float:
    """The share of the highest pixels within `tolerance` of a pixel of the mask."""
    height, width = map.shape
    best = float(map.max())
    places = [(y, x) for y in range(height) for x in range(width) if float(map[y, x]) == best]
    objects = [(y, x) for y in range(height) for x in range(width) if mask[y, x]]
    near = [any(math.hypot(y - v, x - u) <= tolerance for v, u in objects) for y, x in places]
    return sum(near) / len(places)


@pytest.mark.parametrize("tolerance", [0, 1, 1.5, 3.0])
@pytest.mark.parametrize("levels", [1000, 3])
def test_pointing_game_is_that_of_the_loops(tolerance: float, levels: int) -> None:
    maps = (MAPS[:, :1] * levels).floor()
    found = metrics.pointing_game(maps, MASKS, tolerance=tolerance)
    expected = [hit(map[0], mask, tolerance) for map, mask in zip(maps, MASKS, strict=True)]
    assert_rounding(found, torch.tensor(expected, dtype=torch.float64), 1)


def test_the_usual_tolerance_is_15_pixels() -> None:
    map = torch.zeros(1, 1, 40, 40)
    map[0, 0, 5, 5] = 1
    for row, column, expected in ((5, 20, 1.0), (5, 21, 0.0), (14, 17, 1.0), (16, 16, 0.0)):
        mask = torch.zeros(1, 40, 40, dtype=torch.bool)
        mask[0, row, column] = True
        assert metrics.pointing_game(map, mask).item() == expected


def test_mass_in_mask_is_that_of_the_loops() -> None:
    found = metrics.mass_in_mask(MAPS, MASKS[:, None])
    for image, figure in enumerate(found):
        pixels = MAPS[image].sum(0)
        inside = outside = 0.0
        for value, on in zip(pixels.flatten().tolist(), MASKS[image].flatten().tolist(), strict=True):
            inside, outside = inside + max(value, 0) * on, outside + max(value, 0) * (not on)
        assert math.isclose(figure, inside / (inside + outside), rel_tol=99 * 2.3e-16)
    everywhere = torch.ones_like(MASKS)
    assert_rounding(metrics.mass_in_mask(MAPS, everywhere), torch.ones(6, dtype=torch.float64), 99)
    # what is in a mask and what is beside it make up the whole
    assert_rounding(found + metrics.mass_in_mask(MAPS, ~MASKS), torch.ones(6, dtype=torch.float64), 2 * 99)


def test_channels() -> None:
    map = torch.tensor([[[[1.0, 2.0]], [[1.0, -4.0]]]])  # sums 2, -2; largest sizes 1, 4
    mask = torch.tensor([[[True, False]]])
    assert metrics.mass_in_mask(map, mask).tolist() == [1.0]
    assert metrics.mass_in_mask(map, mask, reduction="max_abs").tolist() == [0.2]
    assert metrics.pointing_game(map, mask, tolerance=0).tolist() == [1.0]
    assert metrics.pointing_game(map, mask, tolerance=0, reduction="max_abs").tolist() == [0.0]


def test_what_has_no_figure_is_nan() -> None:
    maps, masks = MAPS[:4, :1].clone(), MASKS[:4].clone()
    maps[0, 0, 0, 0] = torch.nan
    masks[1] = False
    maps[2] = -1.0
    assert metrics.pointing_game(maps, masks).isnan().tolist() == [True, True, False, False]
    assert metrics.mass_in_mask(maps, masks).isnan().tolist() == [True, True, True, False]


@pytest.mark.parametrize("name", ["pointing_game", "mass_in_mask"])
@pytest.mark.parametrize(
    ("maps", "masks", "error", "message"),
    [
        (MAPS[0], MASKS, ValueError, "maps must have 4 dimensions, got shape (2, 9, 11)"),
        (MAPS[:0], MASKS, ValueError, "maps must hold at least one pixel, got shape (0, 2, 9, 11)"),
        (MAPS, MASKS.double(), TypeError, "masks must have dtype bool, got float64"),
        (MAPS, MASKS[:, 1:], ValueError, "masks must have shape (6, 9, 11), got shape (6, 8, 11)"),
        (MAPS, None, TypeError, "masks must be a torch.Tensor, got NoneType"),
    ],
)  # fmt: skip
def test_errors(name: str, maps: Any, masks: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        getattr(metrics, name)(maps, masks)
    assert str(caught.value) == f"pysal.metrics.{name}: {message}"


def test_tolerance_is_a_distance() -> None:
    for value in (-1, math.nan, math.inf, True, "15"):
        with pytest.raises(
            ValueError, match=r"^pysal.metrics.pointing_game: tolerance must be a finite number of pixels of at least 0"
        ):
            metrics.pointing_game(MAPS, MASKS, tolerance=value)  # type: ignore[arg-type]
