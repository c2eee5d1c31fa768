"""The figures by name: the same numbers as their functions, whatever the company of an image."""

from typing import Any

import pytest
import torch
from torch import Tensor

import pysal
from pysal import metrics
from tests.methods.networks import assert_rounding, images, rectified

MODEL, INPUTS, TARGET = rectified(), images(4, 3, 9, 8), torch.tensor([1, 0, 3, 2])
MASKS = images(4, 1, 9, 8, seed=6)[:, 0] > 0.9
GRADIENT = pysal.gradient(MODEL, INPUTS, TARGET)
SHARES = pysal.integrated_gradients(MODEL, INPUTS, TARGET, steps=6)
OPERATIONS = 32 * 54 + 64

DIRECT: dict[str, Any] = {
    "deletion": lambda m, r: metrics.deletion(MODEL, INPUTS, m, TARGET, reduction=r).auc,
    "insertion": lambda m, r: metrics.insertion(MODEL, INPUTS, m, TARGET, reduction=r).auc,
    "deletion_blur": lambda m, r: metrics.deletion(MODEL, INPUTS, m, TARGET, reduction=r, substrate="blur").auc,
    "insertion_zero": lambda m, r: metrics.insertion(MODEL, INPUTS, m, TARGET, reduction=r, substrate="zero").auc,
    "road": lambda m, r: metrics.road(MODEL, INPUTS, m, TARGET, seed=4, image_ids=[3, 1, 8, 0], reduction=r).difference,
    "pic": lambda m, r: metrics.pic(MODEL, INPUTS, m, TARGET, seed=4, image_ids=[3, 1, 8, 0], reduction=r).auc,
    "average_drop": lambda m, r: metrics.average_drop(MODEL, INPUTS, m, TARGET, reduction=r),
    "increase_in_confidence": lambda m, r: metrics.increase_in_confidence(MODEL, INPUTS, m, TARGET, reduction=r),
    "infidelity": lambda m, r: metrics.infidelity(
        MODEL, INPUTS, m, TARGET, seed=4, image_ids=[3, 1, 8, 0], meaning="slopes" if r == "max_abs" else "shares"
    ),
    "max_sensitivity": lambda m, r: metrics.max_sensitivity(
        MODEL,
        INPUTS,
        TARGET,
        seed=4,
        image_ids=[3, 1, 8, 0],
        method="gradient" if r == "max_abs" else "integrated_gradients",
        method_options={} if r == "max_abs" else {"steps": 6},
    ),
    "pointing_game": lambda m, r: metrics.pointing_game(m, MASKS, reduction=r, tolerance=1.5),
    "mass_in_mask": lambda m, r: metrics.mass_in_mask(m, MASKS, reduction=r),
}


def figure(name: str, rows: list[int], maps: Tensor = GRADIENT, **options: Any) -> Tensor:
    ids = torch.tensor([3, 1, 8, 0])[rows]
    if name == "pointing_game":  # 15 pixels are wider than these images
        options = {"options": {"tolerance": 1.5}, **options}
    given = {"method": "gradient", "masks": MASKS[rows], "seed": 4, "image_ids": ids, **options}
    return metrics.per_image(name, MODEL, INPUTS[rows], maps[rows], TARGET[rows], **given)


def known(found: Tensor) -> Tensor:
    """The figures with -7 where an image has none, as of a picture from which blurring takes nothing; not all are like that."""
    assert found.isfinite().any()
    return found.nan_to_num(-7.0)


def test_every_figure_is_described_and_checked_here() -> None:
    assert tuple(metrics.METRICS) == metrics.PER_IMAGE == tuple(DIRECT)
    assert [metric.name for metric in metrics.METRICS.values()] == list(metrics.METRICS)


@pytest.mark.parametrize("name", metrics.PER_IMAGE)
def test_is_what_its_function_returns(name: str) -> None:
    rows = [0, 1, 2, 3]
    found = figure(name, rows)
    assert found.dtype == torch.float64
    assert found.shape == (4,)
    assert torch.equal(known(found), known(DIRECT[name](GRADIENT, "max_abs")))
    shares = figure(name, rows, SHARES, method="integrated_gradients", method_options={"steps": 6})
    assert torch.equal(known(shares), known(DIRECT[name](SHARES, "sum")))
    assert not torch.equal(found, shares)
    if metrics.METRICS[name].needs != "method":
        assert torch.equal(known(figure(name, rows, SHARES, method=None)), known(shares))


@pytest.mark.parametrize("name", metrics.PER_IMAGE)
def test_company_changes_nothing(name: str) -> None:
    whole = known(figure(name, [0, 1, 2, 3]))
    some, one = (figure(name, [2, 0], batch_size=3).nan_to_num(-7.0), figure(name, [3]).nan_to_num(-7.0))
    assert_rounding(some, whole[[2, 0]], OPERATIONS, scale=max(1.0, float(whole.max())))
    assert_rounding(one, whole[[3]], OPERATIONS, scale=max(1.0, float(whole.max())))


@pytest.mark.parametrize("name", metrics.PER_IMAGE)
def test_stays_in_its_range(name: str) -> None:
    metric = metrics.METRICS[name]
    for seed in range(3):
        maps = images(4, 3, 9, 8, seed=seed) - 0.5
        found = figure(name, [0, 1, 2, 3], maps, score=None)
        found = found[found.isfinite()]
        assert len(found)
        assert float(found.min()) >= metric.low
        assert metric.high is None or float(found.max()) <= metric.high


def test_the_figures_own_options() -> None:
    found = figure("deletion", [0, 1], options={"steps": 3, "substrate": 0.5}, score="logit")
    expected = metrics.deletion(
        MODEL, INPUTS[:2], GRADIENT[:2], TARGET[:2], steps=3, substrate=0.5, score="logit", reduction="max_abs"
    )
    assert torch.equal(found, expected.auc)


def test_nothing_is_left_behind() -> None:
    before = {name: value.clone() for name, value in MODEL.state_dict().items()}
    inputs, maps, random = INPUTS.clone(), GRADIENT.clone(), torch.get_rng_state()
    for name in metrics.PER_IMAGE:
        figure(name, [0, 1, 2, 3])
    assert all(torch.equal(value, before[name]) for name, value in MODEL.state_dict().items())
    assert torch.equal(INPUTS, inputs)
    assert torch.equal(GRADIENT, maps)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in MODEL.parameters())


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("rise", {}, ValueError, "name must be one of " + ", ".join(metrics.PER_IMAGE) + ", got 'rise'"),
        ("deletion", {"method": "lime"}, ValueError, "method must be one of "),
        ("max_sensitivity", {"method": None}, ValueError, "method must be given for max_sensitivity, got None"),
        ("pointing_game", {"masks": None}, ValueError, "masks must be given for pointing_game, got None"),
        ("deletion", {"options": {"samples": 3}}, ValueError,
         "options must hold options of deletion: steps, substrate, reduction, got 'samples'"),
        ("deletion", {"options": [3]}, TypeError, "options must be a mapping of option names to values, got [3]"),
    ],
)  # fmt: skip
def test_errors(name: str, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        figure(name, [0, 1], **options)
    assert str(caught.value).startswith(f"pysal.metrics.per_image: {message}")


def test_errors_of_a_figure_name_it() -> None:
    with pytest.raises(ValueError, match=r"^pysal.metrics.deletion_blur: maps must have shape \(2, 1 or 3, 9, 8\), got shape"):
        metrics.per_image("deletion_blur", MODEL, INPUTS[:2], GRADIENT, TARGET[:2])
