"""Max-sensitivity against captum's, given the same images around each one."""

from typing import Any

import pytest
import torch
from captum.metrics import sensitivity_max
from torch import Tensor

import pysal
from pysal import metrics
from pysal.metrics._maps import uniform
from tests.methods.networks import assert_rounding, images, linear, rectified, smooth

SAMPLES = 5
OPERATIONS = 32 * 54 + 216


def around(inputs: Tensor, radius: float, ids: list[int], seed: int) -> Tensor:
    """The images drawn around each image, (B, samples, C, H, W)."""
    copies = torch.empty(len(inputs), SAMPLES, *inputs.shape[1:], dtype=inputs.dtype)
    for image, own in enumerate(inputs):
        for sample in range(SAMPLES):
            numbers = uniform(seed, torch.tensor([ids[image]]), torch.tensor([sample]), own.numel())
            copies[image, sample] = own + radius * (2 * numbers.view(own.shape) - 1)
    return copies


# name, its options, and the map of images (n, C, H, W) that stand for images `rows` of the call
METHODS: dict[str, tuple[str, dict[str, Any], Any]] = {
    "gradient": ("gradient", {}, lambda m, x, t, rows: pysal.gradient(m, x, t)),
    "grad_cam": ("grad_cam", {"layer": "3"}, lambda m, x, t, rows: pysal.grad_cam(m, x, t, layer="3")),
    "integrated_gradients": (
        "integrated_gradients",
        {"steps": 5},
        lambda m, x, t, rows: pysal.integrated_gradients(m, x, t, steps=5),
    ),
    "leave_one_out": (
        "leave_one_out",
        {"segments": pysal.Grid(3, 2)},
        lambda m, x, t, rows: pysal.leave_one_out(m, x, t, segments=pysal.Grid(3, 2)),
    ),
    "xrai": (
        "xrai",
        {"steps": 3, "segments": pysal.Grid(3, 2)},
        lambda m, x, t, rows: pysal.xrai(m, x, t, steps=3, segments=pysal.Grid(3, 2)),
    ),
    "guided_integrated_gradients": (
        "guided_integrated_gradients",
        {"steps": 3},
        lambda m, x, t, rows: pysal.guided_integrated_gradients(m, x, t, steps=3),
    ),
    "shapley": (
        "shapley",
        {"segments": pysal.Grid(3, 2)},
        lambda m, x, t, rows: pysal.shapley(m, x, t, segments=pysal.Grid(3, 2)),
    ),
    "rise": (
        "rise",
        {"samples": 5, "cells": 3, "seed": 5},
        lambda m, x, t, rows: pysal.rise(m, x, t, samples=5, cells=3, seed=5, image_ids=torch.tensor([4, 9, 2])[rows]),
    ),
    "smooth_grad": (
        "smooth_grad",
        {"samples": 3, "seed": 5},
        lambda m, x, t, rows: pysal.smooth_grad(m, x, t, samples=3, seed=5, image_ids=torch.tensor([4, 9, 2])[rows]),
    ),
}


@pytest.mark.parametrize("case", METHODS)
@pytest.mark.parametrize("batch_size", [None, 2])
def test_is_captums(case: str, batch_size: int | None) -> None:
    method, options, explain = METHODS[case]
    model, inputs, ids = rectified(), images(3, 3, 9, 8), [4, 9, 2]
    target = model(inputs).argmax(1)
    found = metrics.max_sensitivity(
        model,
        inputs,
        method=method,
        method_options=options,
        radius=0.1,
        samples=SAMPLES,
        seed=2,
        image_ids=ids,
        batch_size=batch_size,
    )
    copies = around(inputs, 0.1, ids, 2)

    def maps(batch: tuple[Tensor, ...] | Tensor) -> tuple[Tensor, ...]:
        batch = batch[0] if isinstance(batch, tuple) else batch
        rows = torch.arange(3).repeat_interleave(len(batch) // 3)
        return (explain(model, batch, target[rows], rows),)

    expected = sensitivity_max(maps, inputs, lambda x, r: copies.flatten(0, 1), n_perturb_samples=SAMPLES)
    assert (found > 0).all()
    assert_rounding(found, expected, OPERATIONS, scale=max(1.0, float(expected.max())) * 10)


def test_superpixels_stay_those_of_the_unchanged_image() -> None:
    model, inputs = smooth(), images(2, 3, 12, 12)
    labels = pysal.Slic(6).cut(inputs).labels
    found = metrics.max_sensitivity(
        model, inputs, 1, method="leave_one_out", method_options={"segments": pysal.Slic(6)}, samples=4, radius=0.3
    )
    expected = metrics.max_sensitivity(
        model, inputs, 1, method="leave_one_out", method_options={"segments": labels}, samples=4, radius=0.3
    )
    assert_rounding(found, expected, OPERATIONS)


def test_a_linear_model_has_one_gradient_and_its_shares_move_with_the_image() -> None:
    model, inputs = linear(3, 9, 8), images(2, 3, 9, 8)
    assert metrics.max_sensitivity(model, inputs, 1).tolist() == [0.0, 0.0]
    # Integrated Gradients of a linear model is w x, so its change is w u, and |w u| <= radius |w|
    found = metrics.max_sensitivity(model, inputs, 1, method="integrated_gradients", samples=SAMPLES, seed=1, radius=0.1)
    copies = around(inputs, 0.1, [0, 1], 1)
    w = model[1].weight.detach()[1].view(3, 9, 8)
    expected = (w * (copies - inputs[:, None])).flatten(2).norm(dim=2).amax(1) / (w * inputs).flatten(1).norm(dim=1)
    assert_rounding(found, expected, OPERATIONS)


def test_a_map_of_zeros_has_no_relative_change() -> None:
    model = linear(3, 9, 8)
    with torch.no_grad():
        model[1].weight[1] = 0
    assert metrics.max_sensitivity(model, images(2, 3, 9, 8), 1).isnan().all()


def test_errors() -> None:
    model, inputs = rectified(), images(2, 3, 9, 8)

    def refused(error: type[Exception] = ValueError, **options: Any) -> str:
        with pytest.raises(error) as caught:
            metrics.max_sensitivity(model, inputs, 0, **options)
        return str(caught.value).removeprefix("pysal.metrics.max_sensitivity: ")

    assert refused(method="lime").startswith("method must be one of leave_one_out, gradient, ")
    assert refused(radius=0) == "radius must be a finite number above 0, got 0"
    assert refused(samples=True) == "samples must be a whole number of at least 1, got True"
    assert refused(seed="a") == "seed must be a whole number in [-2^63, 2^63), got 'a'"
    assert refused(image_ids=[1, 2, 3]) == "image_ids must have one id for each of the 2 images, got shape (3,)"
    assert refused(method_options={"steps": 3}) == "method_options must hold options out of none, got 'steps'"
    said = "method_options must be a mapping of option names to values, got ['steps']"
    assert refused(TypeError, method_options=["steps"]) == said
