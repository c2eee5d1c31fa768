"""The oracle of occlusion_masks against loops over pixels."""

import numpy as np
import pytest
import torch

from pysal.reference import occlusion_masks as reference


def stack(seed: int, batch: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images, fills = torch.rand(2, batch, 2, 5, 4, generator=generator, dtype=torch.float64)
    return images, fills


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_labels_are_looked_up_pixel_by_pixel(dtype: torch.dtype, channels_last: bool) -> None:
    images, fills = stack(0)
    labels = torch.randint(-1, 3, (3, 5, 4), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    rows = torch.tensor([2, 0, 0, 1, 2], dtype=torch.int32)
    ids = torch.tensor([0, 1, -1, 2, 7], dtype=torch.int32)
    out = reference.occlusion_masks(images, fills, labels, rows, ids, dtype, channels_last)

    expected = np.empty((5, 2, 5, 4))
    for n, row in enumerate(rows.tolist()):
        for c, y, x in np.ndindex(2, 5, 4):
            source = fills if labels[row, y, x] == ids[n] else images
            expected[n, c, y, x] = source[row, c, y, x]
    assert torch.equal(out, torch.from_numpy(expected).to(dtype))
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


@pytest.mark.parametrize("channels_last", [False, True])
def test_boxes_are_half_open(channels_last: bool) -> None:
    images, fills = stack(2)
    boxes = torch.tensor([[0, 0, 5, 4], [1, 2, 3, 3], [2, 1, 2, 3], [4, 3, 5, 4]], dtype=torch.int32)
    rows = torch.tensor([0, 2, 1, 1], dtype=torch.int32)
    out = reference.occlusion_masks_boxes(images, fills, boxes, rows, torch.float64, channels_last)

    expected = images[rows].clone()
    for n, (top, left, bottom, right) in enumerate(boxes.tolist()):
        expected[n, :, top:bottom, left:right] = fills[rows[n], :, top:bottom, left:right]
    assert torch.equal(out, expected)
    assert torch.equal(out[0], fills[0])
    assert torch.equal(out[2], images[1]), "an empty box hides nothing"


def test_boxes_equal_the_label_map_they_draw() -> None:
    images, fills = stack(3)
    boxes = torch.tensor([[0, 0, 2, 4], [2, 0, 5, 1], [2, 1, 5, 4]], dtype=torch.int32)
    labels = torch.empty(3, 5, 4, dtype=torch.int32)
    for segment, (top, left, bottom, right) in enumerate(boxes.tolist()):
        labels[:, top:bottom, left:right] = segment
    rows, ids = torch.tensor([1, 1, 1], dtype=torch.int32), torch.arange(3, dtype=torch.int32)
    by_box = reference.occlusion_masks_boxes(images, fills, boxes, rows, torch.float64, False)
    by_label = reference.occlusion_masks(images, fills, labels, rows, ids, torch.float64, False)
    assert torch.equal(by_box, by_label)


def test_map_looks_each_label_up_and_is_zero_outside() -> None:
    generator = torch.Generator().manual_seed(4)
    scores = torch.rand(2, 3, 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(-2, 6, (2, 5, 3), generator=generator, dtype=torch.int32)
    out = reference.occlusion_masks_map(scores, labels)

    for b, k, y, x in np.ndindex(2, 3, 5, 3):
        label = int(labels[b, y, x])
        assert out[b, k, y, x] == (scores[b, k, label] if 0 <= label < 4 else 0)


def test_boxes_map_averages_over_the_boxes_that_cover_a_pixel() -> None:
    generator = torch.Generator().manual_seed(5)
    scores = torch.rand(2, 3, 6, generator=generator, dtype=torch.float64)
    boxes = torch.tensor([[0, 0, 3, 3], [1, 1, 5, 4], [2, 0, 6, 2], [1, 1, 5, 4], [3, 3, 3, 5], [0, 4, 2, 5]])
    out = reference.occlusion_masks_boxes_map(scores, boxes.int(), 7, 5)

    for b, k, y, x in np.ndindex(2, 3, 7, 5):
        covering = [float(scores[b, k, s]) for s, (t, le, bo, r) in enumerate(boxes.tolist()) if t <= y < bo and le <= x < r]
        assert float(out[b, k, y, x]) == pytest.approx(np.mean(covering) if covering else 0.0, rel=1e-15)
    assert torch.all(out[:, :, 6] == 0), "nothing covers the last line"


def test_boxes_map_of_equal_scores_is_that_score_where_covered() -> None:
    boxes = torch.tensor([[y, x, y + 3, x + 3] for y in range(4) for x in range(4)], dtype=torch.int32)
    out = reference.occlusion_masks_boxes_map(torch.full((1, 1, 16), 0.5), boxes, 7, 7)
    assert torch.equal(out[0, 0, :6, :6], torch.full((6, 6), 0.5))
    assert torch.all(out[0, 0, 6] == 0)
    assert torch.all(out[0, 0, :, 6] == 0)


def test_a_score_that_is_not_finite_stays_inside_its_box() -> None:
    boxes = torch.tensor([[0, 0, 4, 2], [0, 1, 4, 3]], dtype=torch.int32)
    out = reference.occlusion_masks_boxes_map(torch.tensor([[[torch.nan, 1.0]]]), boxes, 4, 4)[0, 0, 0]
    assert out[:2].isnan().all()
    assert out[2:].tolist() == [1.0, 0.0]
