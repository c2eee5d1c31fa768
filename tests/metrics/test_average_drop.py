"""Average drop and increase in confidence against loops, and in closed form."""

from typing import Any

import pytest
import torch
from torch import Tensor

from pysal import metrics
from tests.methods.networks import assert_rounding, images, linear, rectified, smooth

OPERATIONS = 3 * 72 + 64


def in_loops(model: Any, inputs: Tensor, maps: Tensor, target: int) -> tuple[Tensor, Tensor]:
    """Chattopadhay et al., section 4.1, one image and one pixel at a time."""
    drops, rises = [], []
    for image, map in zip(inputs, maps.sum(1), strict=True):
        highest = float(map.max())
        seen = torch.zeros_like(image)
        for row in range(map.shape[0]):
            for column in range(map.shape[1]):
                seen[:, row, column] = image[:, row, column] * max(float(map[row, column]), 0.0) / highest
        before, after = (float(model(one[None]).detach().softmax(1)[0, target]) for one in (image, seen))
        drops.append(max(0.0, before - after) / before)
        rises.append(float(after > before))
    return torch.tensor(drops, dtype=torch.float64), torch.tensor(rises, dtype=torch.float64)


@pytest.mark.parametrize("network", [rectified, smooth])
def test_figures_are_those_of_the_loops(network: Any) -> None:
    model, inputs, maps = network(), images(6, 3, 9, 8), images(6, 3, 9, 8, seed=1) - 0.4
    found = [
        (metrics.average_drop(model, inputs, maps, k), metrics.increase_in_confidence(model, inputs, maps, k)) for k in range(4)
    ]
    for k, (drops, rises) in enumerate(found):
        expected = in_loops(model, inputs, maps, k)
        assert_rounding(drops, expected[0], OPERATIONS)
        assert torch.equal(rises, expected[1])
    rises = torch.stack([rise for _, rise in found])
    assert 0 < float(rises.mean()) < 1, "both happen"


def test_what_a_linear_model_loses() -> None:
    # f = <w, x> without its constant: seen through a map, f(m x) = <w, m x>
    model, inputs = linear(2, 5, 6), images(3, 2, 5, 6)
    with torch.no_grad():
        model[1].weight.abs_()
        model[1].bias.zero_()
    maps = torch.full((3, 1, 5, 6), 3.0, dtype=torch.float64)
    maps[:, :, :, :3] = 1.5  # half as bright on the left
    found = metrics.average_drop(model, inputs, maps, 1, score="logit")
    contributions = model[1].weight.detach()[1].view(2, 5, 6) * inputs
    expected = contributions[..., :3].sum((1, 2, 3)) / 2 / contributions.sum((1, 2, 3))
    assert_rounding(found, expected, OPERATIONS)
    assert metrics.increase_in_confidence(model, inputs, maps, 1, score="logit").tolist() == [0.0, 0.0, 0.0]


def test_the_maps_unit_does_not_count_and_a_full_map_changes_nothing() -> None:
    model, inputs, maps = rectified(), images(3, 3, 9, 8), images(3, 1, 9, 8, seed=1)
    assert_rounding(
        metrics.average_drop(model, inputs, 1e6 * maps, 1), metrics.average_drop(model, inputs, maps, 1), 4 * OPERATIONS
    )
    ones = torch.ones_like(maps)
    assert metrics.average_drop(model, inputs, ones, 1).tolist() == [0.0] * 3
    assert metrics.increase_in_confidence(model, inputs, ones, 1).tolist() == [0.0] * 3


@pytest.mark.usefixtures("independence_is_known")
@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_chunks_change_nothing(batch_size: int) -> None:
    model, inputs, maps = rectified(), images(3, 3, 9, 8), images(3, 1, 9, 8, seed=1)
    for figure in (metrics.average_drop, metrics.increase_in_confidence):
        parts, whole = figure(model, inputs, maps, 1, batch_size=batch_size), figure(model, inputs, maps, 1)
        assert_rounding(parts, whole, OPERATIONS)


@pytest.mark.parametrize("height", [49.0, 1e-310, 5e-324, 1e300])  # 49 * (1 / 49) < 1, and 1 / 1e-310 is infinite
def test_a_map_of_one_value_shows_the_image_as_it_is(height: float) -> None:
    inputs, maps = images(2, 3, 9, 8), torch.full((2, 1, 9, 8), height, dtype=torch.float64)
    for sign in (1.0, -1.0):
        brightness = lambda x, sign=sign: sign * x.mean((1, 2, 3))  # noqa: E731
        assert metrics.increase_in_confidence(brightness, inputs, maps, lambda output: output).tolist() == [0.0, 0.0]
    assert metrics.average_drop(lambda x: x.mean((1, 2, 3)), inputs, maps, lambda output: output).tolist() == [0.0, 0.0]


def test_images_without_a_figure() -> None:
    model, inputs, maps = rectified(), images(4, 3, 9, 8), images(4, 1, 9, 8, seed=1)
    maps[0] = 0.0
    maps[1] *= -1
    for endless in (torch.inf, -torch.inf, torch.nan):
        maps[2, 0, 0, 0] = endless
        assert metrics.average_drop(model, inputs, maps, 1).isnan().tolist() == [True, True, True, False]
        assert metrics.increase_in_confidence(model, inputs, maps, 1).isnan().tolist() == [True, True, True, False]
    # a score that is not above 0 has no share of itself
    below = lambda x: -x.mean((1, 2, 3))  # noqa: E731
    assert metrics.average_drop(below, inputs[3:], maps[3:], lambda output: output).isnan().all()
    assert metrics.increase_in_confidence(below, inputs[3:], maps[3:], lambda output: output).tolist() == [1.0]
