"""Performance information curves of batches against PAIR's, one image at a time."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pysal import metrics, ops
from pysal.metrics.information_curves import NoInformation
from pysal.pair.metrics import pic as pair
from tests.methods.networks import assert_rounding, images, rectified

SHARES = [0.05, 0.2, 0.6]
OPERATIONS = 3 * 400 + 200


def photos(count: int, channels: int, seed: int = 0) -> Tensor:
    """Blotches under noise, in 256 levels."""
    blotches = images(count, channels, 4, 5, seed=seed).repeat_interleave(5, 2).repeat_interleave(4, 3)
    return ((blotches / 2 + images(count, channels, 20, 20, seed=seed + 1) / 2) * 255).round() / 255


def mask_of(seed: int, image_id: int, share: float) -> np.ndarray:
    """The pixels with the smallest numbers of the generator."""
    zero = torch.zeros(1, dtype=torch.int64)
    drawn = ops.gaussian_noise_bits(seed, zero + image_id, zero, 400)[0].tolist()
    mask = np.zeros(400, dtype=bool)
    mask[sorted(range(400), key=lambda place: drawn[place])[: int(400 * share)]] = True
    return mask.reshape(20, 20)


@pytest.mark.parametrize("channels", [1, 3])
def test_curves_are_those_of_pair(channels: int) -> None:
    model, inputs, maps = rectified(channels), photos(6, channels), images(6, 1, 20, 20, seed=4)
    found = metrics.pic(model, inputs, maps, 1, shares=SHARES, seen=0.05, points=40, seed=3, image_ids=[7, 0, 2, 9, 4, 5])
    usable = 0
    for row, number in enumerate([7, 0, 2, 9, 4, 5]):

        def predict(batch: np.ndarray) -> list[float]:
            pixels = torch.from_numpy(batch.reshape(1, 20, 20, channels)).permute(0, 3, 1, 2).double() / 255
            return [float(model(pixels).detach().softmax(1)[0, 1])]

        levels = (inputs[row] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        levels = levels[:, :, 0] if channels == 1 else levels
        given: dict[str, Any] = {"saliency_thresholds": SHARES, "min_pred_value": 0.0, "num_data_points": 40}
        try:
            expected = pair.compute_pic_metric(levels, maps[row, 0].numpy(), mask_of(3, number, 0.05), predict, **given)
        except NoInformation:
            assert found.scores[row].isnan().all()
            continue
        usable += 1
        assert_rounding(found.scores[row], torch.as_tensor(np.array(expected.curve_y)), 100 * OPERATIONS)
        assert_rounding(found.shares, torch.as_tensor(np.array(expected.curve_x)), 4)
        assert_rounding(found.auc[row : row + 1], torch.tensor([expected.auc], dtype=torch.float64), 100 * OPERATIONS)
    assert usable >= 2


@pytest.mark.usefixtures("independence_is_known")
@pytest.mark.parametrize("batch_size", [1, 2, 7, 100])
def test_chunks_and_company_change_nothing(batch_size: int) -> None:
    model, inputs, maps = rectified(), photos(3, 3), images(3, 1, 20, 20, seed=4)
    given: dict[str, Any] = {"shares": SHARES, "points": 20}
    whole = metrics.pic(model, inputs, maps, 1, **given).scores.nan_to_num(-1.0)
    parts = metrics.pic(model, inputs, maps, 1, **given, batch_size=batch_size).scores.nan_to_num(-1.0)
    assert_rounding(parts, whole, 100 * OPERATIONS)
    alone = metrics.pic(model, inputs[2:], maps[2:], 1, **given, image_ids=[2]).scores.nan_to_num(-1.0)
    assert_rounding(alone, whole[2:], 100 * OPERATIONS)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"inputs": 1.5 * photos(1, 3)}, "inputs must be in [0, 1], got values from "),
        ({"inputs": photos(1, 2)}, "inputs must have 1 or 3 channels and at least 2 pixels a side, got shape (1, 2, 20, 20)"),
        ({"seen": 0}, "seen must be a sequence of numbers above 0 and below 1, got [0]"),
        ({"points": 0}, "points must be "),
    ],
)
def test_errors(given: dict[str, Any], message: str) -> None:
    inputs = given.pop("inputs", photos(1, 3))
    with pytest.raises(ValueError) as caught:
        metrics.pic(rectified(inputs.shape[1]), inputs, images(1, 1, 20, 20), 1, **given)
    assert str(caught.value).startswith(f"pysal.metrics.pic: {message}")
