"""Means, intervals and votes: by hand, in closed form, and where the evidence must not decide."""

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from pysal.comparison import statistics
from pysal.comparison.statistics import FIGURES, agreement, estimate, recommended, tabulated, vote

ROAD, DROP = FIGURES["road"], FIGURES["infidelity"]
TITLES = {"a": "A", "b": "B", "c": "C"}


def rows(**methods: dict[str, list[float | None]]) -> list[dict[str, Any]]:
    count = len(next(iter(next(iter(methods.values())).values())))
    return [
        {"methods": {name: {figure: values[n] for figure, values in own.items()} for name, own in methods.items()}}
        for n in range(count)
    ]


def test_every_metric_is_a_figure() -> None:
    from pysal.metrics import METRICS

    assert set(METRICS) < set(FIGURES)
    assert all(FIGURES[name].better == metric.better for name, metric in METRICS.items())
    assert all(figure.why_not if not figure.votes else not figure.why_not for figure in FIGURES.values())


def test_the_interval_of_many_images_is_that_of_the_normal_distribution() -> None:
    values = np.random.default_rng(1).exponential(size=400)
    found = estimate(values, seed=0)
    assert found.mean == values.mean()
    assert found.images == 400
    half = stats.norm.ppf(0.975) * values.std() / 20
    # the quantiles of 5000 samples are off by their own error, and the skewness moves them by its share of 1 / sqrt(400)
    error = 4 * half / math.sqrt(statistics.RESAMPLES * 0.025) + half * stats.skew(values) / 20
    assert abs(found.low - (values.mean() - half)) < error
    assert abs(found.high - (values.mean() + half)) < error
    assert found == estimate(values, seed=0)
    assert found != estimate(values, seed=1)


def test_few_images() -> None:
    assert estimate(np.array([np.nan, 3.0]), 0).mean == 3.0
    assert math.isnan(estimate(np.array([np.nan, 3.0]), 0).low)
    assert estimate(np.array([np.nan]), 0).images == 0
    assert estimate(np.array([2.0, 2.0, 2.0]), 0).low == 2.0


def test_methods_are_compared_image_by_image() -> None:
    # images differ far more than methods do: unpaired intervals overlap, the differences are all the same
    images = 100 * np.random.default_rng(0).random(20)
    noise = np.random.default_rng(1).normal(size=20)
    found = vote(ROAD, {"a": images, "b": images + 1 + 0.1 * noise, "c": images + 1 + 0.1 * noise[::-1]})
    assert found.order[-1] == "a"
    assert set(found.leaders) == {"b", "c"}
    assert found.decided
    lower = vote(DROP, {"a": images, "b": images + 1, "c": images + 2})
    assert (lower.order, lower.leaders) == (["a", "b", "c"], ["a"])


def test_the_evidence_does_not_decide_by_chance() -> None:
    # of methods that are equal, at most one drawing in 20 may call any of them behind
    random = np.random.default_rng(2)
    for images in (5, 12):
        wrong = sum(vote(ROAD, {name: random.normal(size=images) for name in "abcdefgh"}).decided for _ in range(300))
        assert wrong <= stats.binom.ppf(0.999, 300, 0.05)


def test_images_that_a_method_has_no_figure_of_do_not_count() -> None:
    table = {"a": np.array([1.0, 1, 1, 1, 1, np.nan]), "b": np.array([0.0, 0, 0, 0, 0, 9.0])}
    found = vote(ROAD, table)
    assert (found.images, found.leaders, found.decided) == (5, ["a"], True)
    assert not vote(ROAD, {name: values[:4] for name, values in table.items()}).decided
    assert not vote(ROAD, {"a": np.ones(9)}).decided


def test_tables() -> None:
    found = tabulated(
        rows(a={"insertion": [0.9, 0.5], "deletion": [0.1, None], "seconds": [1.0, 2.0]}, b={"insertion": [None, None]}),
        ["a", "b"],
    )
    assert set(found) == {"insertion_minus_deletion", "insertion", "deletion", "seconds"}
    np.testing.assert_equal(found["insertion_minus_deletion"]["a"], [0.9 - 0.1, np.nan])
    np.testing.assert_equal(found["insertion"]["b"], [np.nan, np.nan])


def test_agreement_is_the_mean_over_images_that_have_it() -> None:
    some: list[dict[str, Any]] = [
        {"agreement": {"a": {"b": 0.2}}},
        {"agreement": {"a": {"b": 0.6}}},
        {"agreement": {"a": {"b": None}}},
        {},
    ]
    found = agreement(some, ["a", "b"])
    assert found["a"]["b"] == pytest.approx(0.4)
    assert math.isnan(found["b"]["a"])


def advice(**methods: dict[str, list[float | None]]) -> tuple[list[str], str]:
    best, said, _ = recommended(tabulated(rows(**methods), list(methods)), list(methods), TITLES)
    return best, " ".join(said)


LOW, HIGH = [0.1, 0.11, 0.12, 0.1, 0.13, 0.11], [0.9, 0.91, 0.88, 0.92, 0.9, 0.93]


def test_one_that_leads_everywhere_is_recommended() -> None:
    best, said = advice(a={"road": HIGH, "mass_in_mask": HIGH}, b={"road": LOW, "mass_in_mask": LOW})
    assert best == ["a"]
    assert said.startswith(
        "To be preferred: A. By ROAD (6 images) the lead is with A; the best is 0.8 (0.77 to 0.82) ahead of the nearest that "
        "is behind. By mass in mask (6 images) the lead is with A; the best is 0.8 (0.77 to 0.82) ahead of the nearest that"
    )


def test_equals_are_both_recommended_the_fastest_first() -> None:
    best, said = advice(
        a={"road": HIGH, "seconds": [3.0] * 6}, b={"road": HIGH, "seconds": [1.0] * 6}, c={"road": LOW, "seconds": [0.1] * 6}
    )
    assert best == ["b", "a"]
    assert "To be preferred: B and A. The evidence does not decide between them." in said
    assert "The least time of these: B, 1 s an image. The most: A, 3 s." in said


def test_figures_that_contradict_each_other_are_said() -> None:
    best, said = advice(a={"road": HIGH, "mass_in_mask": LOW}, b={"road": LOW, "mass_in_mask": HIGH})
    assert set(best) == {"a", "b"}
    assert "The figures contradict each other: by mass in mask others are clearly ahead of A." in said


def test_a_map_of_the_image_is_not_recommended() -> None:
    best, said = advice(a={"road": HIGH, "randomisation": [0.9] * 6}, b={"road": LOW, "randomisation": [0.1] * 6})
    assert best == ["b"]
    against = (
        "Not recommended: A, whose maps of the model with random weights are much the same (rank correlation 0.9 (0.9 to 0.9)"
    )
    assert said.startswith(f"To be preferred: B. {against}"), "what is recommended comes first"
    best, said = advice(a={"road": HIGH, "randomisation": [0.9] * 6})
    assert best == []
    assert said.startswith(f"No method is recommended: all of them show the image more than the model. {against}")
    said = advice(a={"road": LOW, "randomisation": [0.9] * 6}, b={"road": LOW, "randomisation": [0.1] * 6})[1]
    assert said.startswith(f"The evidence decides nothing: no figure separates the methods on these images. {against}")


def test_a_map_of_the_image_is_open_where_its_interval_does_not_decide() -> None:
    few: list[float | None] = [0.4, 0.9, None, None, None, None]
    best, said = advice(a={"road": HIGH, "randomisation": few}, b={"road": LOW, "randomisation": [0.1] * 6})
    assert best == ["a"]
    # Student's t of one degree at 97.5 %: 12.706; 0.65 +- 12.706 * 0.25, of a correlation
    measured = "rank correlation 0.65 (-1 to 1) over 2 images"
    assert (
        f"Open: whether A shows the image more than the model. Its maps of the model with random weights are alike ({measured})"
        in said
    )
    assert "Not recommended" not in said
    assert (
        "rank correlation 0.9 over 1 image), and one image decides nothing."
        in advice(a={"road": HIGH, "randomisation": [0.9, *[None] * 5]}, b={"road": LOW})[1]
    )


def test_nothing_is_recommended_where_nothing_is_known() -> None:
    best, said = advice(a={"road": HIGH[:3]}, b={"road": LOW[:3]})
    assert (best, said) == ([], "The evidence decides nothing: there are 3 images, and 5 are the fewest that can.")
    assert "there is 1 image, and 5 are" in advice(a={"road": HIGH[:1]}, b={"road": LOW[:1]})[1]
    best, said = advice(a={"road": HIGH}, b={"road": HIGH})
    assert (best, said) == ([], "The evidence decides nothing: no figure separates the methods on these images.")
    # what favours maps that are bright all over has no vote
    best, said = advice(a={"average_drop": LOW}, b={"average_drop": HIGH})
    assert (best, said) == ([], "The evidence decides nothing: none of the figures that were measured has a vote.")
    assert advice(a={"road": HIGH})[1] == "The evidence decides nothing: there is nothing to compare one method with."
