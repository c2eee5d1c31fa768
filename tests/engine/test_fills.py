"""What "black" means for images that are not in [0, 1] is said: once, where it matters, and to whoever called."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

import pysal
from pysal import metrics
from tests.methods.calls import CALLS, row_by_row
from tests.methods.networks import images

UNIT = images(2, 3, 8, 8)
NORMALISED = (UNIT - 0.5) / 0.25
RANGE = f"the images range from {float(NORMALISED.min()):.3g} to {float(NORMALISED.max()):.3g}"
INSTEAD = "give images in [0, 1] to a pysal.Normalized model, or a colour (a tuple) or an image in that range"
MODEL = row_by_row()


def said(call: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    assert all(one.filename == __file__ for one in caught), "the line shown is the caller's"
    return [str(one.message) for one in caught]


def sentence(where: str, asked: str, number: str, named: str) -> str:
    return f"pysal.{where}: {RANGE}, so {asked} puts in the number {number} of that range, which need not be {named}; {INSTEAD}"


@pytest.mark.parametrize(
    ("method", "options", "asked", "number", "named"),
    [
        ("leave_one_out", {}, "fill=0.0", "0", "black"),
        ("leave_one_out", {"fill": "black"}, "fill='black'", "0", "black"),
        ("leave_one_out", {"fill": "white"}, "fill='white'", "1", "white"),
        ("leave_one_out", {"fill": 0.5}, "fill=0.5", "0.5", "that grey"),
        ("integrated_gradients", {}, "baseline=0.0", "0", "black"),
        ("integrated_gradients", {"baseline": ["mean", "white", "black"]}, "baseline='white'", "1", "white"),
        ("blur_integrated_gradients", {}, "boundary='constant'", "0", "black"),
    ],
)
def test_what_a_number_means_is_said_once(method: str, options: dict[str, Any], asked: str, number: str, named: str) -> None:
    assert said(lambda: CALLS[method](MODEL, NORMALISED, 0, **options)) == [sentence(method, asked, number, named)]
    assert said(lambda: CALLS[method](MODEL, NORMALISED, 0, batch_size=1, **options)) == [
        sentence(method, asked, number, named)
    ]
    assert said(lambda: CALLS[method](MODEL, UNIT, 0, **options)) == []
    assert said(lambda: CALLS[method](MODEL, UNIT * 1.01 - 0.005, 0, **options)) == [], "resizing leaves as much"


@pytest.mark.parametrize(
    ("method", "options"),
    [
        *((method, {}) for method in ("gradient", "guided_backprop", "grad_cam", "guided_grad_cam", "smooth_grad")),
        ("leave_one_out", {"fill": (0.0, 0.0, 0.0)}),
        ("leave_one_out", {"fill": torch.zeros(3, 8, 8)}),
        ("leave_one_out", {"fill": "mean"}),
        ("leave_one_out", {"fill": "blur"}),
        ("leave_one_out", {"fill": -2.0}),
        ("integrated_gradients", {"baseline": "blur"}),
        ("blur_integrated_gradients", {"boundary": "reflect"}),
    ],
)
def test_nothing_is_said_where_the_range_is_that_of_the_images(method: str, options: dict[str, Any]) -> None:
    assert said(lambda: CALLS[method](MODEL, NORMALISED, 0, **options)) == []


def test_an_explanation_says_it_once_for_all_methods() -> None:
    options = {"leave_one_out": {"segments": pysal.Grid(2, 2)}, "integrated_gradients": {"steps": 2}}
    methods = ["gradient", "leave_one_out", "integrated_gradients"]
    found = said(lambda: pysal.explain(MODEL, NORMALISED, 0, methods=methods, method_options=options))
    assert found == [sentence("leave_one_out", "fill=0.0", "0", "black")]
    smoothed = {"base": "integrated_gradients", "method_options": {"steps": 2}}
    assert said(lambda: pysal.smooth_grad(MODEL, NORMALISED, 0, samples=3, batch_size=2, **smoothed)) == [
        sentence("smooth_grad", "baseline=0.0", "0", "black")
    ]


def test_figures_say_it() -> None:
    maps = torch.rand(2, 1, 8, 8, dtype=torch.float64)
    assert said(lambda: metrics.deletion(MODEL, NORMALISED, maps, 0, steps=2)) == [
        sentence("metrics.deletion", "substrate='zero'", "0", "black")
    ]
    assert said(lambda: metrics.insertion(MODEL, NORMALISED, maps, 0, steps=2)) == []
    assert said(lambda: metrics.infidelity(MODEL, NORMALISED, maps, 0, samples=2)) == [
        sentence("metrics.infidelity", "fill=0.0", "0", "black")
    ]
