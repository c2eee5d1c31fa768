"""PAIR's performance information curves and pysal.pair's side by side, and the tests of PAIR's wheel."""

import importlib.util
import unittest
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import saliency
from PIL import Image
from saliency.metrics import pic as theirs

from pysal.models import example_photo
from pysal.pair.metrics import pic as ours

RANDOM = np.random.default_rng(2)
SIZE = (40, 36)


@pytest.fixture(autouse=True)
def trapz_of_older_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    numpy = {name: getattr(np, name) for name in dir(np)}
    monkeypatch.setattr(theirs, "np", SimpleNamespace(**{**numpy, "trapz": np.trapezoid}))


def picture(channels: int | None) -> np.ndarray:
    """Blotches under noise, which takes more bytes than what is interpolated between its pixels; (H, W, C) or (H, W)."""
    random = np.random.default_rng(channels or 0)
    blotches = np.kron(random.integers(0, 127, (5, 4)), np.ones((8, 9)))[..., None]
    planes = (blotches + random.integers(0, 128, (*SIZE, channels or 1))).astype(np.uint8)
    return planes if channels else planes[..., 0]


@pytest.mark.parametrize("method", ["linear", "nearest"])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
@pytest.mark.parametrize("channels", [None, 3])
def test_blurred_images_are_pairs(channels: int | None, dtype: Any, method: str) -> None:
    image = picture(channels).astype(dtype)
    for share in (0, 0.05, 0.5, 1):
        mask = RANDOM.random(SIZE) < share
        expected, found = (one.create_blurred_image(image, mask, method) for one in (theirs, ours))
        assert found.dtype == image.dtype
        assert np.array_equal(found.reshape(image.shape), expected.reshape(image.shape))


@pytest.mark.parametrize("monotonous", [True, False])
@pytest.mark.parametrize("channels", [None, 3])
def test_curves_are_pairs(channels: int | None, monotonous: bool) -> None:
    image, map = picture(channels), RANDOM.random(SIZE)
    np.random.seed(3)
    mask = theirs.generate_random_mask(*SIZE, fraction=0.05)
    np.random.seed(3)
    assert np.array_equal(ours.generate_random_mask(*SIZE, fraction=0.05), mask)
    difference = lambda batch: [1 - np.abs(batch[0].astype(float) - image).mean() / 100]  # noqa: E731
    given = {"keep_monotonous": monotonous, "num_data_points": 50, "saliency_thresholds": [0.01, 0.1, 0.3, 0.7]}
    expected, found = (one.compute_pic_metric(image, map, mask, difference, **given) for one in (theirs, ours))
    for name in ("curve_x", "curve_y", "predictions", "thresholds", "auc"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=0, atol=1e-12)
    assert all(np.array_equal(*pair) for pair in zip(found.blurred_images, expected.blurred_images, strict=True))
    for method in ("mean", "median"):
        both = [one.aggregate_individual_pic_results([expected, expected], method=method) for one in (theirs, ours)]
        np.testing.assert_allclose(both[1].curve_y, both[0].curve_y, rtol=0, atol=1e-12)
        assert both[1].auc == pytest.approx(both[0].auc, abs=1e-12)


def test_images_without_a_curve() -> None:
    image, mask = picture(3), np.zeros(SIZE, bool)
    given = (image, RANDOM.random(SIZE), mask)
    with pytest.raises(ours.ComputePicMetricError, match=r"must be at least min_pred_value, 0\.8, got 0\.5; skip the image$"):
        ours.compute_pic_metric(*given, lambda _: [0.5], [0.1])
    with pytest.raises(ours.ComputePicMetricError, match=r"must be below that on the image, 0\.9, got 0\.9; skip it$"):
        ours.compute_pic_metric(*given, lambda _: [0.9], [0.1])
    flat = np.full((*SIZE, 3), 9, np.uint8)
    with pytest.raises(ours.ComputePicMetricError, match="must take fewer bytes than the image"):
        ours.compute_pic_metric(flat, RANDOM.random(SIZE), mask, lambda _: [0.9], [0.1])


def test_refuses() -> None:
    image, mask = picture(3), np.zeros(SIZE, bool)
    with pytest.raises(ValueError, match=r"pic: img must be of type uint8, got float64$"):
        ours.compute_pic_metric(image / 255, mask, mask, len, [0.1])
    with pytest.raises(
        ValueError, match=r"pic: saliency_map must have the image's height and width, \(40, 36\), got \(36, 40\)$"
    ):
        ours.compute_pic_metric(image, mask.T, mask, len, [0.1])
    with pytest.raises(ValueError, match="must have at least one element, got none"):
        ours.aggregate_individual_pic_results([])
    with pytest.raises(ValueError, match=r"fraction must be a number from 0 to 1, got 2$"):
        ours.generate_random_mask(4, 4, 2)


@pytest.mark.filterwarnings("ignore:__package__ != __spec__.parent")
def test_pairs_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They read a photo of a dog that the wheel does not hold."""
    path = Path(saliency.__file__).parent / "metrics" / "pic_test.py"
    spec = importlib.util.spec_from_file_location("pysal.pair.metrics.pic_test", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.pic is ours
    with Image.open(example_photo()) as opened:
        opened.convert("RGB").resize((96, 80)).save(tmp_path / "doberman.png")
    monkeypatch.setattr(module, "__file__", str(tmp_path / "saliency" / "metrics" / "pic_test.py"))
    suite = unittest.defaultTestLoader.loadTestsFromModule(module)
    assert suite.countTestCases() > 0
    result = unittest.TestResult()
    suite.run(result)
    assert [text for _case, text in result.failures + result.errors] == []
