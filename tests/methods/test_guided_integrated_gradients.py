"""Guided Integrated Gradients: its path written out in NumPy, closed forms, and what any batch size must not change."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import pysal
from tests.methods.guided_path import guided_path
from tests.methods.networks import images, linear, rectified, smooth, weights

EXACT = 1e-9  # of the largest value, float64: distances of a step are summed in another order


def by_hand(model: Any, inputs: Tensor, target: int, baseline: float, **given: Any) -> Tensor:
    """The map of each image, alone."""
    maps = []
    for one in inputs:
        path = guided_path(np.full(one.shape, baseline), one.numpy(), **given)
        place = next(path)
        for _ in range(given["steps"]):
            leaf = torch.from_numpy(place)[None].requires_grad_()
            place = path.send(torch.autograd.grad(model(leaf)[0, target], leaf)[0][0].numpy())
        maps.append(torch.from_numpy(place))
    return torch.stack(maps)


@pytest.mark.parametrize("baseline", [0.0, 0.7])
@pytest.mark.parametrize(
    ("fraction", "max_distance"), [(0.25, 0.02), (0.1, 0.3), (0.5, 1.0), (0.0, 0.5), (1.0, 0.1), (0.3, 0.0)], ids=str
)
@pytest.mark.parametrize("network", [smooth, rectified])
def test_is_the_authors_path(network: Callable[[], Any], fraction: float, max_distance: float, baseline: float) -> None:
    model, inputs = network(), images(2, 3, 7, 6)
    given = {"steps": 9, "fraction": fraction, "max_distance": max_distance}
    expected = by_hand(model, inputs, 2, baseline, **given)
    found = pysal.guided_integrated_gradients(model, inputs, 2, baseline=baseline, **given)
    assert float((found - expected).abs().max()) <= EXACT * float(expected.abs().max())


@pytest.mark.parametrize("fraction", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("max_distance", [0.0, 0.1, 1.0])
def test_every_path_is_the_same_under_a_linear_model(fraction: float, max_distance: float) -> None:
    """Gradients do not change on the way, so that each value has its weight times its way."""
    inputs, model = images(2, 3, 4, 5), linear(3, 4, 5)
    found = pysal.guided_integrated_gradients(
        model, inputs, 1, baseline="white", steps=6, fraction=fraction, max_distance=max_distance
    )
    expected = weights(model, inputs)[1] * (inputs - 1)
    assert float((found - expected).abs().max()) <= EXACT


def test_no_distance_and_the_whole_fraction_are_the_straight_path() -> None:
    inputs, model = images(2, 3, 7, 6), smooth()
    straight = pysal.integrated_gradients(model, inputs, 1, steps=8, quadrature="left", placement="uniform")
    for given in ({"fraction": 0.2, "max_distance": 0.0}, {"fraction": 1.0, "max_distance": 0.0}):
        found = pysal.guided_integrated_gradients(model, inputs, 1, steps=8, **given)
        assert float((found - straight).abs().max()) <= EXACT


def test_the_path_goes_along_the_small_gradient_first() -> None:
    """f = (2 a + b)^2 between 0 and (3, 3): b alone first, 9, and then a, 81 - 9; within 162 / steps, the sum's own error."""
    square = lambda x: (2 * x[:, 0, 0, 0] + x[:, 0, 0, 1])[:, None] ** 2  # noqa: E731
    image = torch.full((1, 1, 1, 2), 3.0, dtype=torch.float64)
    steps = 500
    found = pysal.guided_integrated_gradients(square, image, 0, steps=steps, fraction=0.1, max_distance=1.0)
    assert found.flatten().tolist() == pytest.approx([72, 9], abs=2 * 162 / steps)


@pytest.mark.parametrize("steps", [10, 300])
@pytest.mark.parametrize("max_distance", [0.02, 1.0])
def test_complete_within_the_error_of_its_sum(steps: int, max_distance: float) -> None:
    """f = |W x|^2 / 2: a step of length d is off by at most |W|^2 d^2 / 2, and no step is longer than its share of sum |x|."""
    inputs, matrix = images(2, 3, 4, 5), images(1, 1, 7, 60, seed=1)[0, 0] - 0.5
    bent = lambda x: ((x.flatten(1) @ matrix.T) ** 2).sum(1, keepdim=True) / 2  # noqa: E731
    found = pysal.guided_integrated_gradients(bent, inputs, 0, steps=steps, max_distance=max_distance)
    residual = (found.flatten(1).sum(1) - bent(inputs)[:, 0]).abs()
    bound = torch.linalg.matrix_norm(matrix, 2) ** 2 * inputs.flatten(1).sum(1) ** 2 / (2 * steps)
    assert bool((residual <= bound).all())
    assert float(residual.max()) > 0


@pytest.mark.parametrize("baseline", [0.0, ["black", "mean"]], ids=str)
def test_any_batch_size_and_any_company_give_the_same(baseline: Any) -> None:
    inputs, model = images(4, 3, 7, 6), rectified()
    options = {"steps": 7, "baseline": baseline, "fraction": 0.3, "max_distance": 0.2}
    alone = torch.cat([pysal.guided_integrated_gradients(model, one[None], 3, batch_size=1, **options) for one in inputs])
    for batch_size in (1, 2, 3, 4, 1000, None):
        found = pysal.guided_integrated_gradients(model, inputs, 3, batch_size=batch_size, **options)
        assert float((found - alone).abs().max()) <= EXACT * float(alone.abs().max())
    mixed = pysal.guided_integrated_gradients(model, inputs.contiguous(memory_format=torch.channels_last), [3] * 4, **options)
    assert float((mixed - alone).abs().max()) <= EXACT * float(alone.abs().max())


def test_several_baselines_are_averaged() -> None:
    inputs, model = images(2, 3, 6, 6), smooth()
    both = pysal.guided_integrated_gradients(model, inputs, 0, steps=5, baseline=["black", "white"])
    each = [pysal.guided_integrated_gradients(model, inputs, 0, steps=5, baseline=one) for one in ("black", "white")]
    assert torch.allclose(both, (each[0] + each[1]) / 2, rtol=0, atol=EXACT)


def test_an_image_that_is_its_baseline_has_no_share_and_a_gradient_of_nan_is_seen() -> None:
    inputs, model = images(1, 3, 6, 6), smooth()
    assert not pysal.guided_integrated_gradients(model, inputs, 0, steps=3, baseline=inputs).any()
    found = pysal.guided_integrated_gradients(lambda x: (x.flatten(1) - x.flatten(1)).sqrt(), inputs, 0, steps=2)
    assert found.isnan().any()


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"steps": 0}, "steps must be a whole number of at least 1, got 0"),
        ({"fraction": 1.5}, "fraction must be a number from 0 to 1, got 1.5"),
        ({"fraction": True}, "fraction must be a number from 0 to 1, got True"),
        ({"max_distance": -0.1}, "max_distance must be a number from 0 to 1, got -0.1"),
        ({"max_distance": math.nan}, "max_distance must be a number from 0 to 1, got nan"),
        ({"baseline": []}, "baseline must hold at least one baseline, got an empty list"),
    ],
    ids=str,
)
def test_refuses(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=r"^pysal\.guided_integrated_gradients: ") as raised:
        pysal.guided_integrated_gradients(smooth(), images(1, 3, 6, 6), 0, **given)
    assert str(raised.value) == f"pysal.guided_integrated_gradients: {sentence}"
