"""The oracle of box_regions against the definition written as loops."""

import numpy as np
import pytest
import torch
from torch import Tensor

from pysal.reference import box_regions as reference


def pixel(map: Tensor, boxes: Tensor, origins: Tensor, n: int, y: int, x: int, outside: float) -> Tensor:
    """Return the channels of pixel (y, x) of image n."""
    if not (0 <= y < map.shape[2] and 0 <= x < map.shape[3]):
        return torch.full(map.shape[1:2], outside, dtype=map.dtype)
    i, j = y - int(origins[n, 0]), x - int(origins[n, 1])
    if 0 <= i < boxes.shape[2] and 0 <= j < boxes.shape[3]:
        return boxes[n, :, i, j]
    return map[0, :, y, x]


def given(box: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return a map 5 x 4, three boxes, one of them partly beyond it, and corners of regions."""
    generator = torch.Generator().manual_seed(0)
    map = torch.randn(1, 2, 5, 4, generator=generator, dtype=torch.float64)
    boxes = torch.randn(3, 2, *box, generator=generator, dtype=torch.float64)
    return map, boxes, torch.tensor([[0, 1], [3, 2], [-1, 3]]), torch.tensor([[-2, 0], [1, -1], [0, 2]])


@pytest.mark.parametrize("box", [(2, 3), (1, 1), (0, 2), (6, 6)], ids=str)
@pytest.mark.parametrize("steps", [(1, 1), (2, 3)], ids=str)
def test_is_the_pixel_of_the_box_the_map_or_the_outside(box: tuple[int, int], steps: tuple[int, int]) -> None:
    map, boxes, origins, corners = given(box)
    out = reference.box_regions(map, boxes, origins, corners, 4, 3, *steps, 0.5)
    assert out.shape == (3, 2, 4, 3)
    for n, i, j in np.ndindex(3, 4, 3):
        y, x = int(corners[n, 0]) + i * steps[0], int(corners[n, 1]) + j * steps[1]
        assert torch.equal(out[n, :, i, j], pixel(map, boxes, origins, n, y, x, 0.5))


@pytest.mark.parametrize("box", [(2, 3), (0, 0)], ids=str)
def test_depthwise_is_the_clamped_sum_over_taps(box: tuple[int, int]) -> None:
    map, boxes, origins, corners = given(box)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(3, 2, 2, generator=generator, dtype=torch.float64)
    bias = torch.randn(2, generator=generator, dtype=torch.float64)
    out = reference.box_regions_depthwise(map, boxes, origins, corners, 3, 2, weight, bias, 2, 1, 1, 3, -0.5, 1.5)
    for n, i, j in np.ndindex(3, 3, 2):
        expected = bias.clone()
        for p, q in np.ndindex(3, 2):
            y, x = int(corners[n, 0]) + 2 * i + p, int(corners[n, 1]) + j + 3 * q
            expected += weight[p, q] * pixel(map, boxes, origins, n, y, x, 0.0)
        torch.testing.assert_close(out[n, :, i, j], expected.clamp(-0.5, 1.5), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("box", [(2, 3), (0, 2)], ids=str)
def test_sums_count_what_lies_inside_the_map(box: tuple[int, int]) -> None:
    map, boxes, origins, _ = given(box)
    out = reference.box_regions_sums(map, boxes, origins)
    expected = torch.zeros(3, 2, dtype=torch.float64)
    for n, y, x in np.ndindex(3, 5, 4):
        expected[n] += pixel(map, boxes, origins, n, y, x, 0.0) - map[0, :, y, x]
    torch.testing.assert_close(out, expected, rtol=1e-13, atol=1e-14)
