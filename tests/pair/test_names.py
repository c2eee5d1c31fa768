"""Names, modules, pictures and dtypes of PAIR, by which a program goes on when its import is changed."""

import importlib
import subprocess
import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import saliency.core as theirs

import pysal.pair as ours
from tests.pair.test_against_pair import quantile_of_older_numpy  # noqa: F401, used by every test

# What PAIR's modules imported from elsewhere, and `import *` of them handed on.
OF_OTHERS = {
    "EPSILON", "absolute_import", "dilation", "disk", "division", "l1_distance", "logging", "math", "ndimage", "np",
    "print_function", "resize", "segmentation", "translate_alpha_to_x", "translate_x_to_alpha",
}  # fmt: skip
NAMES = [name for name in dir(theirs) if not name.startswith("_") and name not in OF_OTHERS]
RANDOM = np.random.default_rng(0)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_of_pairs_is_here(name: str) -> None:
    assert isinstance(getattr(ours, name), ModuleType) == isinstance(getattr(theirs, name), ModuleType)
    assert name in dir(ours)


@pytest.mark.parametrize("name", [name for name in NAMES if isinstance(getattr(theirs, name), ModuleType)])
def test_modules_are_reached_before_any_class(name: str) -> None:
    source = f"import pysal.pair as saliency; print(saliency.{name}.__name__)"
    found = subprocess.run([sys.executable, "-c", source], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == f"pysal.pair.{name}"
    module = importlib.import_module(f"saliency.core.{name}")
    own = [key for key, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
    assert [key for key in own if key in NAMES and not hasattr(getattr(ours, name), key)] == []


def test_unknown_names_get_one_sentence() -> None:
    with pytest.raises(AttributeError, match=r"^module 'pysal.pair' has no attribute 'BlurIg' \(did you mean 'BlurIG'\?\)$"):
        _ = ours.BlurIg
    with pytest.raises(
        AttributeError, match=r"^pysal.pair has no tf1: it explains torch models and call_model_functions, not "
    ):
        _ = ours.tf1


@pytest.mark.parametrize("percentile", [0, 50, 99, 100])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(4, 5, 3), (7, 1, 1), (20, 20, 6)], ids=str)
@pytest.mark.parametrize("picture", ["VisualizeImageGrayscale", "VisualizeImageDiverging"])
def test_pictures_are_pairs(picture: str, shape: tuple[int, ...], dtype: type, percentile: float) -> None:
    mask = RANDOM.normal(size=shape).astype(dtype)
    with np.errstate(all="ignore"):
        expected = getattr(theirs, picture)(mask, percentile=percentile)
    found = getattr(ours, picture)(mask, percentile=percentile)
    assert found.dtype == expected.dtype
    known = np.isfinite(expected)
    assert np.array_equal(found[known], expected[known])
    assert np.isfinite(found).all()


def test_pictures_of_flat_masks_are_the_limit_of_their_neighbours() -> None:
    flat, spot = np.full((20, 20, 3), 2.0), np.zeros((20, 20, 1))
    spot[3, 4], spot[5, 6] = 7, -7
    with np.errstate(all="ignore"):
        assert np.isnan(theirs.VisualizeImageGrayscale(flat)).all()
    assert not ours.VisualizeImageGrayscale(flat).any()
    assert [ours.VisualizeImageGrayscale(spot)[at] for at in ((3, 4), (5, 6), (0, 0))] == [1, 1, 0]
    assert [ours.VisualizeImageDiverging(spot)[at] for at in ((3, 4), (5, 6), (0, 0))] == [1, -1, 0.5]


@pytest.mark.parametrize("picture", ["VisualizeImageGrayscale", "VisualizeImageDiverging"])
def test_pictures_refuse_what_is_no_mask(picture: str) -> None:
    with pytest.raises(ValueError, match=r"^pysal.pair: image_3d must be a mask \(H, W, C\), got shape \(4, 4\)$"):
        getattr(ours, picture)(np.zeros((4, 4)))
    with pytest.raises(ValueError, match=r"^pysal.pair: percentile must be 0 to 100, got 101$"):
        getattr(ours, picture)(np.zeros((4, 4, 3)), 101)


@pytest.mark.parametrize("baseline", [None, np.float32, np.float64])
@pytest.mark.parametrize("value", [np.float32, np.float64])
def test_dtype_of_integrated_gradients_is_pairs(value: type, baseline: type | None) -> None:
    """Whichever has more digits decides, and the model is asked in it."""
    asked: list[list[np.dtype[Any]]] = []

    def squares(batch: np.ndarray, call_model_args: Any = None, expected_keys: Any = ()) -> dict[str, Any]:
        asked[-1].append(batch.dtype)
        return {ours.INPUT_OUTPUT_GRADIENTS: 2 * batch}

    image = RANDOM.random((4, 4, 3)).astype(value)
    start = None if baseline is None else np.full((4, 4, 3), 0.1, baseline)
    found = []
    for one in (theirs, ours):
        asked.append([])
        found.append(one.IntegratedGradients().GetMask(image, squares, x_baseline=start, x_steps=5))
    assert found[0].dtype == found[1].dtype == np.result_type(value, baseline or value)
    assert asked[1][0] == found[1].dtype
    np.testing.assert_allclose(found[1], found[0], rtol=0, atol=8 * np.finfo(np.float32).eps * np.abs(found[0]).max())


@pytest.mark.parametrize("answer", [np.float32, np.float64])
@pytest.mark.parametrize("name", ["GradientSaliency", "GuidedIG", "BlurIG", "IntegratedGradients"])
def test_dtype_of_a_float64_image_is_pairs(name: str, answer: type) -> None:
    """A picture divided by 255 is float64, and most models answer in float32."""

    def squares(batch: np.ndarray, call_model_args: Any = None, expected_keys: Any = ()) -> dict[str, Any]:
        found = {ours.INPUT_OUTPUT_GRADIENTS: (2 * batch).astype(answer), ours.OUTPUT_LAYER_VALUES: (batch**2).sum((1, 2, 3))}
        return {key: found[key] for key in expected_keys}

    image = RANDOM.random((6, 6, 3))
    options = {"GuidedIG": {"x_steps": 5}, "BlurIG": {"steps": 5, "max_sigma": 3}}.get(name, {})
    expected, found = (getattr(one, name)().GetMask(image, squares, **options) for one in (theirs, ours))
    assert found.dtype == expected.dtype
    np.testing.assert_allclose(found, expected, rtol=0, atol=8 * np.finfo(np.float32).eps * np.abs(expected).max())


def test_a_float64_baseline_keeps_its_digits_on_the_device() -> None:
    image, start = np.ones((3, 3, 1), np.float32), np.full((3, 3, 1), 1 + 1e-9)
    found = ours.IntegratedGradients().GetMask(image, ours.torch_model(lambda x: x.flatten(1), 0), None, start)
    assert found.dtype == np.float64
    assert found[0, 0, 0] == pytest.approx(-1e-9, rel=1e-6)
