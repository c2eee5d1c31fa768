"""XRAI: its ranking of regions written out, what it must not depend on, and what it refuses."""

from typing import Any

import numpy as np
import pytest
import torch

import pysal
from pysal.methods.xrai import ranked
from tests.methods.networks import images, linear, smooth

RANDOM = np.random.default_rng(5)


def by_hand(attribution: np.ndarray, masks: np.ndarray, least: int) -> np.ndarray:
    """At each turn the region whose new pixels have the highest mean, each mean taken afresh."""
    taken, found = np.zeros(attribution.shape, bool), np.full(attribution.shape, np.nan)
    left = list(masks)
    while left := [mask for mask in left if np.count_nonzero(mask & ~taken) >= least]:
        means = [attribution[mask & ~taken].mean() for mask in left]
        new = left.pop(int(np.argmax(means))) & ~taken
        found[new], taken = max(means), taken | new
    if not taken.all():
        found[~taken] = attribution[~taken].mean()
    return found


def blobs(count: int, height: int, width: int) -> np.ndarray:
    """Boxes that overlap, some of them twice or empty."""
    masks = np.zeros((count, height, width), bool)
    for mask in masks:
        top, left = RANDOM.integers(0, height), RANDOM.integers(0, width)
        mask[top : top + RANDOM.integers(0, height // 2), left : left + RANDOM.integers(0, width // 2)] = True
    return np.concatenate([masks, masks[: count // 3]])


@pytest.mark.parametrize("least", [1, 9])
@pytest.mark.parametrize("kind", ["normal", "whole numbers", "equal"])
def test_regions_are_taken_by_the_mean_of_what_they_add(kind: str, least: int) -> None:
    """Whole numbers make ties, between which the first region wins."""
    for _ in range(5):
        normal = RANDOM.normal(size=(20, 17))
        attribution = {"normal": normal, "whole numbers": np.round(normal), "equal": np.ones_like(normal)}[kind]
        masks = blobs(30, 20, 17)
        found, added = ranked(attribution, masks, algorithm="full", area=1.0, least=least)
        assert np.array_equal(found, by_hand(attribution, masks, least))
        assert np.array_equal(sum(mask.astype(int) for mask in added), np.ones(attribution.shape))


@pytest.mark.parametrize("algorithm", ["full", "fast"])
def test_the_map_has_the_sum_of_the_attribution(algorithm: Any) -> None:
    attribution = RANDOM.normal(size=(20, 17))
    found, added = ranked(attribution, blobs(30, 20, 17), algorithm=algorithm, area=1.0, least=3)
    assert found.sum() == pytest.approx(attribution.sum(), abs=1e-10)
    means = [attribution[mask].mean() for mask in added if mask.any()]
    assert all(np.array_equal(found[mask], np.full(mask.sum(), mean)) for mask, mean in zip(added, means, strict=True))


def test_no_more_regions_than_the_area() -> None:
    attribution = np.arange(16.0).reshape(4, 4)
    rows = np.array([np.arange(4)[:, None].repeat(4, 1) == row for row in range(4)])
    found, added = ranked(attribution, rows, algorithm="full", area=0.3, least=1)
    assert found[:, 0].tolist() == [3.5, 3.5, 9.5, 13.5]
    assert len(added) == 3


def test_segments_of_a_grid_have_the_means_of_integrated_gradients() -> None:
    inputs, model = images(2, 3, 8, 6), linear(3, 8, 6)
    given = {"baseline": ["black", "white"], "steps": 3}
    shares = pysal.integrated_gradients(model, inputs, 1, **given).amax(1, keepdim=True)
    means = torch.nn.functional.avg_pool2d(shares, (4, 3)).repeat_interleave(4, 2).repeat_interleave(3, 3)
    labels = torch.arange(8)[:, None] // 4 * 2 + torch.arange(6) // 3
    for segments in (pysal.Grid(2, 2), labels, labels.numpy(), labels.expand(2, -1, -1)):
        for algorithm in ("full", "fast"):
            found = pysal.xrai(model, inputs, 1, segments=segments, algorithm=algorithm, **given)
            assert float((found - means).abs().max()) <= 1e-12


@pytest.mark.parametrize("shape", [(3, 40, 30), (1, 33, 41), (5, 25, 25)], ids=str)
def test_any_batch_size_any_company_any_number_of_channels(shape: tuple[int, ...]) -> None:
    inputs, model = images(3, *shape), smooth(shape[0])
    inputs[:, :, 10:20, 8:18] += 1
    alone = torch.cat([pysal.xrai(model, one[None], 1, steps=4, batch_size=1) for one in inputs])
    assert alone.shape == (3, 1, *shape[1:])
    assert len(alone.unique()) > 3
    for batch_size in (2, 3, 1000, None):
        found = pysal.xrai(model, inputs, 1, steps=4, batch_size=batch_size)
        assert float((found - alone).abs().max()) <= 1e-9 * float(alone.abs().max())


def test_an_image_of_one_value_has_no_share() -> None:
    assert not pysal.xrai(smooth(), torch.full((1, 3, 20, 20), 0.3, dtype=torch.float64), 0, steps=2).any()


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"algorithm": "quick"}, "algorithm must be 'full' or 'fast', got 'quick'"),
        ({"min_area": 1.5}, "min_area must be a number from 0 to 1, got 1.5"),
        ({"min_area": float("nan")}, "min_area must be a number from 0 to 1, got nan"),
        ({"steps": 0}, "steps must be a whole number of at least 1, got 0"),
        ({"segments": pysal.Grid(9, 1)}, None),
    ],
    ids=str,
)
def test_refuses(given: dict[str, Any], sentence: str | None) -> None:
    with pytest.raises(ValueError, match="must") as raised:
        pysal.xrai(smooth(), images(1, 3, 8, 8), 0, **given)
    assert sentence is None or str(raised.value) == f"pysal.xrai: {sentence}"
