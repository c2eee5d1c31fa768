"""PAIR's XRAI and pysal.pair's side by side: with given attributions and segments, and end to end."""

import inspect
from typing import Any

import numpy as np
import pytest
import saliency.core as theirs
import torch

import pysal
import pysal.pair as ours
from pysal.methods.xrai import regions
from tests.pair.test_against_pair import IMAGE, MODEL, call_model

RANDOM = np.random.default_rng(8)
SEGMENTS = [RANDOM.random((30, 26)) < share for share in RANDOM.random(40)]
SCENE = RANDOM.random((30, 26, 3)) * 0.2
SCENE[8:20, 5:15] += 0.7


def parameters(one: Any, **given: Any) -> Any:
    least = given.pop("least", 50)
    made = one.XRAIParameters(return_xrai_segments=True, return_ig_attributions=True, **given)
    made.experimental_params["min_pixel_diff"] = least
    return made


@pytest.mark.parametrize("name", ["XRAI.GetMask", "XRAI.GetMaskWithDetails", "XRAIParameters"])
def test_signatures(name: str) -> None:
    found, expected = (eval(f"one.{name}", {"one": one}) for one in (ours, theirs))
    arguments = [[(p.name, p.default) for p in inspect.signature(f).parameters.values()] for f in (found, expected)]
    assert arguments[0] == arguments[1]


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("algorithm", ["full", "fast"])
@pytest.mark.parametrize("given", [{}, {"least": 1}, {"area_threshold": 0.4}, {"least": 400}], ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_given_attributions_and_segments_give_the_same_bits(dtype: Any, given: Any, algorithm: str, flat: bool) -> None:
    attribution = RANDOM.normal(size=SCENE.shape).astype(dtype)
    results = [
        one.XRAI().GetMaskWithDetails(
            SCENE, None, segments=SEGMENTS, base_attribution=attribution,
            extra_parameters=parameters(one, algorithm=algorithm, flatten_xrai_segments=flat, **given),
        )
        for one in (theirs, ours)
    ]  # fmt: skip
    expected, found = results
    assert np.array_equal(found.attribution_mask, expected.attribution_mask)
    assert np.array_equal(found.segments, expected.segments)
    assert found.baselines is expected.baselines is None
    assert np.array_equal(found.ig_attribution, expected.ig_attribution)


@pytest.mark.parametrize("image", [SCENE, IMAGE, np.round(SCENE * 255).astype(np.float32)], ids=["scene", "noise", "0 to 255"])
def test_regions_are_pairs(image: np.ndarray) -> None:
    expected = vars(theirs.xrai)["_get_segments_felzenszwalb"](image)
    found = regions(image)
    assert [mask for mask in found if not any(np.array_equal(mask, one) for one in expected)] == []
    assert np.array_equal(found, [mask for mask in expected if mask.any()])


@pytest.mark.parametrize("algorithm", ["full", "fast"])
@pytest.mark.parametrize("baselines", [None, [np.zeros_like(IMAGE), IMAGE[::-1].copy(), np.ones_like(IMAGE)]])
def test_end_to_end(baselines: Any, algorithm: str) -> None:
    """PAIR adds up integrated gradients in float32."""
    results = [
        one.XRAI().GetMaskWithDetails(
            IMAGE, call_model, {"target": 2}, baselines=baselines, batch_size=4,
            extra_parameters=parameters(one, algorithm=algorithm, steps=5),
        )
        for one in (theirs, ours)
    ]  # fmt: skip
    expected, found = results
    scale = np.abs(expected.ig_attribution).max()
    np.testing.assert_allclose(found.ig_attribution, expected.ig_attribution, rtol=0, atol=8 * 2**-23 * scale)
    np.testing.assert_allclose(found.attribution_mask, expected.attribution_mask, rtol=0, atol=8 * 2**-23 * scale)
    assert np.array_equal(found.segments, expected.segments)
    assert all(np.array_equal(*pair) for pair in zip(found.baselines, expected.baselines, strict=True))


def test_native() -> None:
    """On a ReLU network with the same segments and attribution; and the whole on its device."""
    images = torch.from_numpy(np.moveaxis(SCENE, -1, 0)[None].copy())
    ends = [images.amin(), images.amax()]
    shares = pysal.integrated_gradients(MODEL, images, 1, baseline=[float(end) for end in ends], steps=7)
    expected = ours.XRAI().GetMask(SCENE, None, base_attribution=shares[0].movedim(0, -1).numpy(), extra_parameters=_one(ours))
    found = pysal.xrai(MODEL, images, 1, steps=7, min_area=1 / (30 * 26))
    np.testing.assert_allclose(found[0, 0].numpy(), expected, rtol=0, atol=1e-12)
    assert ours.XRAI().GetMask(SCENE, ours.torch_model(MODEL, 1), extra_parameters=ours.XRAIParameters(3)).shape == (30, 26)


def _one(one: Any) -> Any:
    return parameters(one, least=1)


def test_refuses() -> None:
    with pytest.raises(ValueError, match=r"^pysal.pair: algorithm must be 'full' or 'fast', got 'slow'$"):
        ours.XRAI().GetMask(SCENE, call_model, extra_parameters=ours.XRAIParameters(algorithm="slow"))
    with pytest.raises(ValueError, match=r"baselines must have the shape of x_value, \(30, 26, 3\), got \(2,\)$"):
        ours.XRAI().GetMask(SCENE, call_model, baselines=[np.zeros(2)])
    with pytest.raises(ValueError, match=r"segments must be masks of shape \(30, 26\), got \(3,\)$"):
        ours.XRAI().GetMask(SCENE, call_model, segments=[np.zeros(3)])
    with pytest.raises(ValueError, match=r"^pysal.pair: x_value must be an image \(H, W, C\), or be given with its segments"):
        ours.XRAI().GetMask(SCENE[..., 0], call_model)
