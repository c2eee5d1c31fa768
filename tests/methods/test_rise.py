"""RISE: masks by torch's own interpolation, the mean over them by hand, its expectation by enumeration, and its error."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import pysal
from pysal.methods.rise import BLOCK, Masks
from tests.engine.test_incremental import prepared_network
from tests.methods.networks import Counting, assert_rounding, images, linear, rectified

CPU = torch.device("cpu")


def by_torch(size: tuple[int, int], cells: tuple[int, int], grid: Any, shift: Any) -> Tensor:
    """A mask as the paper makes it: enlarge by one cell more than the image has, and cut out the image's size."""
    steps = [math.ceil(side / count) for side, count in zip(size, cells, strict=True)]
    canvas = [(count + 1) * step for count, step in zip(cells, steps, strict=True)]
    enlarged = F.interpolate(torch.as_tensor(grid)[None, None].double(), canvas, mode="bilinear", align_corners=False)[0, 0]
    down, across = (int(one) for one in shift)
    return enlarged[down : down + size[0], across : across + size[1]]


@pytest.mark.parametrize(
    ("size", "cells"), [((8, 8), (4, 4)), ((9, 14), (2, 5)), ((5, 4), (5, 4)), ((3, 20), (1, 7)), ((224, 224), (7, 7))], ids=str
)
def test_masks_are_those_of_torchs_interpolation(size: tuple[int, int], cells: tuple[int, int]) -> None:
    masks = Masks(size, cells, 0.5, 3)
    numbers = np.arange(5, 5 + 2 * BLOCK, 7)
    ids = [4] * len(numbers)
    found = masks.at(ids, numbers, CPU, torch.float64)
    grids, shifts = masks.draws(ids, numbers)
    expected = torch.stack([by_torch(size, cells, grid, shift) for grid, shift in zip(grids, shifts, strict=True)])
    assert found.shape == (len(numbers), 1, *size)
    # torch rounds its scale, so that a place on the grid is off by a few roundings of the grid's length
    assert float((found[:, 0] - expected).abs().max()) <= 64 * torch.finfo(torch.float64).eps * max(cells)
    assert 0 <= float(found.min()) <= float(found.max()) <= 1


def test_the_map_is_the_mean_of_scores_and_masks() -> None:
    inputs, model, samples = images(2, 3, 9, 10), rectified(), 70
    options: dict[str, Any] = {"samples": samples, "cells": (3, 4), "shown": 0.3, "seed": 5, "image_ids": [8, 2]}
    given = {"rise": {**options, "fill": 0.2}}
    found = pysal.explain(model, inputs, 1, methods="rise", score="raw", method_options=given)["rise"]
    masks = Masks((9, 10), (3, 4), 0.3, 5)
    scale = float(model(inputs).detach().abs().max())
    for image, id in enumerate((8, 2)):
        mask = masks.at([id] * samples, np.arange(samples), CPU, torch.float64)
        with torch.no_grad():
            scores = model(mask * inputs[image] + (1 - mask) * 0.2)[:, 1]
        terms = scores[:, None, None] * mask[:, 0] / 0.3
        assert_rounding(found.map[image, 0].double(), terms.mean(0), 400, scale=4 * scale)
        error = terms.std(0) / samples**0.5
        assert_rounding(found.details["standard_error"][image, 0].double(), error, 4000, scale=4 * scale)
        assert float(found.details["mean_scores"][image]) == pytest.approx(float(scores.mean()), rel=1e-12)
    assert found.passes == samples
    assert found.details["samples"] == samples


def test_the_mean_over_all_masks_lies_within_the_error_that_is_said() -> None:
    """Of a linear score of two cells all 4 masks and 2 shifts are written out; 5 standard errors, as the map says them."""
    inputs, model = images(1, 3, 1, 4), linear(3, 1, 4)
    with torch.no_grad():
        total = torch.zeros(1, 4, dtype=torch.float64)
        for grid, shift in itertools.product(itertools.product((0.0, 1.0), repeat=2), (0, 1)):
            mask = by_torch((1, 4), (1, 2), torch.tensor([grid]), (0, shift))
            total += model(mask * inputs)[0, 2] * mask / 0.5 / 8
    found = pysal.explain(
        model, inputs, 2, methods="rise", score="raw", method_options={"rise": {"samples": 3000, "cells": (1, 2)}}
    )["rise"]
    error = found.details["standard_error"]
    assert (error > 0).all()
    assert ((found.map - total).abs() <= 5 * error).all()
    assert float(error.max()) <= 0.05 * float(total.abs().max()) + 0.05


@pytest.mark.parametrize("samples", [1, 130])
def test_any_batch_size_any_company_the_same_map(samples: int) -> None:
    inputs, model = images(3, 3, 8, 10), rectified()
    options: dict[str, Any] = {"samples": samples, "cells": 3, "fill": "mean", "score": "raw", "seed": -3}
    expected = pysal.rise(model, inputs, 1, **options)
    scale = 2 * float(model(inputs).detach().abs().max())
    for batch_size in (1, 2, 3, 1000):
        found = pysal.rise(model, inputs, 1, batch_size=batch_size, **options)
        assert_rounding(found, expected, 64 * samples, scale=scale)
    for image in range(3):
        alone = pysal.rise(model, inputs[image : image + 1], 1, image_ids=[image], **options)
        assert_rounding(alone, expected[image : image + 1], 64 * samples, scale=scale)


@pytest.mark.parametrize("batch_size", [None, 1, 7])
def test_centred_maps_are_covariances_of_scores_and_masks(batch_size: int | None) -> None:
    inputs, model, samples = images(2, 3, 9, 10), rectified(), 40
    options = {"samples": samples, "cells": 3, "seed": 2, "centred": True}
    found = pysal.explain(
        model, inputs, 1, methods="rise", score="raw", method_options={"rise": options}, batch_size=batch_size
    )
    result = found["rise"]
    scale = float(model(inputs).detach().abs().max())
    for image in range(2):
        mask = Masks((9, 10), (3, 3), 0.5, 2).at([image] * samples, np.arange(samples), CPU, torch.float64)
        with torch.no_grad():
            scores = model(mask * inputs[image])[:, 1]
        terms = (scores - scores.mean())[:, None, None] * mask[:, 0] / 0.5
        assert_rounding(result.map[image, 0].double(), terms.sum(0) / (samples - 1), 400, scale=4 * scale)
        error = terms.std(0) / samples**0.5 * samples / (samples - 1)
        assert_rounding(result.details["standard_error"][image, 0].double(), error, 4000, scale=4 * scale)
    assert result.signed
    assert found.panel("rise").unit == "change of output"
    assert found.panel("rise").title == "RISE, centred"


def test_of_a_score_that_never_changes_a_centred_map_is_zero() -> None:
    constant = lambda batch: batch.mean((1, 2, 3)) * 0 + 7  # noqa: E731
    centred, plain = (pysal.rise(constant, images(1, 3, 8, 8), samples=20, centred=one, score="raw") for one in (True, False))
    assert not centred.any()
    assert float((plain - 7).abs().max()) > 0.1


def test_the_seed_and_the_id_pick_the_masks() -> None:
    inputs, model = images(1, 3, 8, 8).expand(2, -1, -1, -1), rectified()
    options: dict[str, Any] = {"samples": 8, "cells": 3, "score": "raw"}
    first, again, other = (pysal.rise(model, inputs, 1, seed=seed, **options) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])
    same = pysal.rise(model, inputs, 1, seed=1, image_ids=[1, 1], **options)
    assert torch.equal(same[0], same[1])
    more = pysal.rise(Counting(model), inputs, 1, **{**options, "samples": BLOCK + 3})
    assert more.shape == (2, 1, 8, 8)


def test_whole_batches_for_a_model_whose_rows_depend_on_each_other() -> None:
    inputs = images(2, 3, 4, 4)

    def coupled(batch: Tensor) -> Tensor:
        return batch.mean((1, 2, 3))[:, None] * len(batch)

    options: dict[str, Any] = {"samples": 30, "cells": 2, "score": "raw"}
    found = pysal.rise(coupled, inputs, 0, batch_size=2, **options)
    expected = pysal.rise(lambda batch: 2 * batch.mean((1, 2, 3)), inputs, **options)
    assert_rounding(found, expected, 64 * 48, scale=4.0)


def test_a_prepared_model_has_the_same_map() -> None:
    model, prepared, inputs = prepared_network()
    one, other = (pysal.rise(each, inputs, 1, samples=20, score="raw") for each in (model, prepared))
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_explain_runs_it_where_it_is_named_and_with_its_seed() -> None:
    inputs, model = images(1, 3, 8, 8), rectified()
    assert "rise" not in pysal.explain(model, inputs, 1).results
    found = pysal.explain(model, inputs, 1, methods="rise", method_options={"rise": {"samples": 9}}, seed=4)
    assert found["rise"].title == "RISE"
    assert found.panel("rise").unit == "probability where shown"
    assert "9 samples" in found.panel("rise").small_print
    assert_rounding(found.maps["rise"].double(), pysal.rise(model, inputs, 1, samples=9, seed=4), 16, scale=2.0)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"samples": 0}, "samples must be a whole number of at least 1"),
        ({"cells": 0}, "cells must be a whole number of at least 1, got 0"),
        ({"cells": (3, 2.5)}, "cells must be a whole number of at least 1, got 2.5"),
        ({"cells": (3, 4, 5)}, "cells must be one whole number or a tuple of two, got (3, 4, 5)"),
        ({"cells": [7, 7]}, "cells must be one whole number or a tuple of two, got [7, 7]"),
        ({"cells": 7}, "cells must be at most the image's height and width (6, 8), got 7"),
        ({"shown": 1}, "shown must be a probability in (0, 1), got 1"),
        ({"shown": "half"}, "shown must be a probability in (0, 1), got 'half'"),
        (
            {"fill": "drop"},
            "fill must be another than 'drop', for a mask shows most pixels in part, and patches go as a whole, got 'drop'",
        ),
        ({"fill": "blac"}, "fill must be one of 'black', 'white', 'mean', 'blur', a number, a colour or an image"),
        ({"samples": 1, "centred": True}, "samples must be at least 2 with centred=True, for one mask is its own mean, got 1"),
        ({"seed": 0.5}, "seed must be a whole number in [-2^63, 2^63), got 0.5"),
    ],
    ids=str,
)
def test_refuses(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match="must") as raised:
        pysal.rise(rectified(), images(1, 3, 6, 8), 0, **{"cells": 3, **given})
    assert str(raised.value).startswith(f"pysal.rise: {sentence}")
