"""Agreement against scipy.stats.spearmanr, two maps at a time."""

import pytest
import torch
from scipy.stats import spearmanr

from pysal import metrics
from tests.methods.networks import assert_rounding, images

MAPS = {
    "leave_one_out": (images(3, 1, 7, 8, seed=1) * 5).floor() - 2,  # signed, many ties
    "gradient": images(3, 3, 7, 8, seed=2) - 0.5,
    "integrated_gradients": images(3, 3, 7, 8, seed=3) - 0.5,
    "somebody's": images(3, 3, 7, 8, seed=4) - 0.5,
}
PICTURES = {
    "leave_one_out": MAPS["leave_one_out"][:, 0],
    "gradient": MAPS["gradient"].abs().amax(1),
    "integrated_gradients": MAPS["integrated_gradients"].sum(1),
    "somebody's": MAPS["somebody's"].sum(1),
}


@pytest.mark.parametrize("absolute", [False, True])
def test_is_scipys(absolute: bool) -> None:
    found = metrics.agreement(MAPS, absolute=absolute)
    expected = torch.empty(3, 4, 4, dtype=torch.float64)
    for image in range(3):
        for i, one in enumerate(PICTURES.values()):
            for j, other in enumerate(PICTURES.values()):
                pair = [(v[image].abs() if absolute else v[image]).flatten().numpy() for v in (one, other)]
                expected[image, i, j] = float(spearmanr(*pair).statistic)
    assert_rounding(found, expected, 4 * 56)
    assert torch.equal(found, found.mT)


def test_only_ranks_count() -> None:
    maps = {"a": MAPS["somebody's"][:, :1], "b": (5 * MAPS["somebody's"][:, :1]).exp(), "c": -MAPS["somebody's"][:, :1]}
    found = metrics.agreement(maps)
    sign = torch.tensor([[1.0, 1, -1], [1, 1, -1], [-1, -1, 1]], dtype=torch.float64)
    assert_rounding(found, sign.expand(3, 3, 3), 4 * 56)


def test_what_has_no_ranks_is_nan() -> None:
    maps = {"a": MAPS["leave_one_out"].clone(), "b": MAPS["leave_one_out"].clone()}
    maps["a"][0] = 3.0
    maps["b"][1, 0, 0, 0] = torch.inf
    found = metrics.agreement(maps).isnan()
    assert found[0].tolist() == [[True, True], [True, False]]
    assert found[1].tolist() == [[False, True], [True, True]]
    assert not found[2].any()


def test_errors() -> None:
    def refused(maps: object, error: type[Exception] = ValueError) -> str:
        with pytest.raises(error) as caught:
            metrics.agreement(maps)  # type: ignore[arg-type]
        return str(caught.value).removeprefix("pysal.metrics.agreement: ")

    one = MAPS["gradient"]
    assert refused([one], TypeError) == "maps must be a mapping of names to maps, got list"
    assert refused({}) == "maps must hold at least one map, got none"
    assert refused({"a": one[0]}) == "maps['a'] must have 4 dimensions, got shape (3, 7, 8)"
    assert (
        refused({"a": one, "b": one[:2]}) == "maps['b'] must have the images and size of the others, (3, 7, 8), got (2, 7, 8)"
    )
