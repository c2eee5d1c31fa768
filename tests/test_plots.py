"""Plots: what is drawn is what was found, convergence is the closed form, nothing written covers anything else."""

import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from skimage.color import deltaE_ciede2000, rgb2lab

import pysal
from pysal import plots
from pysal.explanation import Explanation
from pysal.methods.registry import METHODS
from pysal.plots import RANDOM, Convergence, Side, agreement, converge, convergence, curves, drops
from pysal.viz import MINUS, Panel
from tests.test_viz import DEFICIENCIES, boxes_of, texts

NAN = math.nan


def words(figure):
    return [text.get_text() for text in texts(figure)]


def panel_of(found, size=40, **changes):
    """Leave-one-out with one column of the image per segment."""
    labels = (torch.arange(size) * len(found) // size).expand(size, size)
    keys = {"unit": "drop of probability", "labels": labels, "drops": found, "score": 0.9, "percent": True}
    return Panel("Leave-one-out", found[labels][None], "none", True, **{**keys, **changes})


def bars(figure):
    """The lengths of the bars, from the top."""
    found = [patch for axes in figure.axes for patch in axes.patches if isinstance(patch, Rectangle)]
    return [patch.get_width() for patch in sorted(found, key=lambda patch: patch.get_y())]


def lines(figure):
    """(x, y) of the lines that methods have in the plots: no grid, no key."""
    found = [line for axes in figure.axes for line in axes.get_lines() if axes.get_position().height > 0.2]
    found = [line for line in found if line.get_linestyle() != "None" and len(line.get_xdata()) > 2]
    return [(np.asarray(line.get_xdata()).tolist(), np.asarray(line.get_ydata()).tolist()) for line in found]


CONVERGED = [
    Convergence("integrated_gradients", (10, 20, 40), (0.5, 0.25, 0.01), (-3.0, 0.5, -0.125), 200, 9.5),
    Convergence("blur_integrated_gradients", (10, 20, 40), (1.2, 0.6, 0.3), (2.0, 1.0, 0.25), 200, 9.75),
]


def sides(names=(*METHODS, RANDOM)):
    shares = torch.linspace(0, 1, 29, dtype=torch.float64)
    scores = {name: (1 - shares) ** (place + 1) for place, name in enumerate(names)}
    areas = {name: float(torch.trapezoid(line, shares)) for name, line in scores.items()}
    rising = {name: line.flip(0) for name, line in scores.items()}
    return [
        Side("Deletion", "important pixels made black first: lower is better", shares, scores, areas, True),
        Side("Insertion", "important pixels shown first: higher is better", shares, rising, areas, False),
    ]


def figure_of(name):
    """One of the plots, with much to write."""
    if name == "drops":
        blocks = torch.arange(40)[:, None] // 8 * 6 + torch.arange(40) * 6 // 40
        many = torch.linspace(-0.3, 0.5, 30, dtype=torch.float64)
        return drops(torch.rand(3, 40, 40), panel_of(many, labels=blocks), subtitle="Egyptian cat 90 % " * 9)
    if name == "convergence":
        return convergence(CONVERGED, subtitle="Egyptian cat 90 % " * 9, unit="log probability")
    if name == "curves":
        return curves(sides(), subtitle="Egyptian cat 90 % " * 9, percent=True)
    matrix = torch.eye(8) * 1.2 - 0.2
    return agreement(matrix, [method.title for method in METHODS.values()], unit="rank correlation of the pixels")


PLOTS = ("drops", "convergence", "curves", "agreement")


# Drops


def test_bars_are_the_drops_from_the_largest_down():
    found = torch.tensor([0.1, NAN, -0.2, 0.4, 0.0001], dtype=torch.float64)
    figure = drops(torch.rand(3, 40, 40), panel_of(found))
    assert bars(figure) == pytest.approx([0.4, 0.1, 0.0001, -0.2])
    shown = words(figure)
    for expected in ("90 % → 50 %", "90 % → 80 %", "90 % → 110 %", "0.01 points", "drop of probability, percentage points"):
        assert expected in shown, expected
    places = {text.get_text(): text.get_position()[0] for axes in figure.axes for text in axes.texts or axes.artists}
    assert {name: round(x) // 8 for name, x in places.items()} == {"1": 3, "2": 0, "3": 4, "4": 2}


def test_of_many_segments_the_largest_are_shown_and_the_others_counted():
    found = torch.linspace(-0.1, 0.5, 61, dtype=torch.float64)[torch.randperm(61)]
    figure = drops(torch.rand(3, 122, 122), panel_of(found, size=122))
    largest = sorted(found.tolist(), key=abs)[-plots.MOST_BARS :]
    assert bars(figure) == pytest.approx(sorted(largest, reverse=True))
    assert "41 more segments: at most 30 points either way" in words(figure)


def test_drops_of_a_logit_have_no_per_cent():
    found = torch.tensor([2.5, -0.5], dtype=torch.float64)
    shown = words(drops(torch.rand(3, 40, 40), panel_of(found, unit="drop of logit", score=8.0, percent=False)))
    assert {"8 → 5.5", "8 → 8.5", "drop of logit"} <= set(shown)
    assert not any("%" in word or "point" in word for word in shown)


# Convergence


def square(images):
    return images.square().flatten(1).sum(1)


def test_convergence_is_the_closed_form_on_a_square():
    # the gradient of sum x^2 at a x is 2 a x: the left rule with n steps gives x^2 (n - 1) / n
    image = torch.rand(1, 3, 4, 5, dtype=torch.float64)
    options = {"quadrature": "left", "placement": "uniform"}
    found = converge(square, image, target=lambda y: y, steps=(1, 2, 4, 5), reference=10, method_options=options)
    total = float(square(image))
    ratios = [(n - 1) / n / 0.9 for n in (1, 2, 4, 5)]
    assert found.errors == pytest.approx([1 - ratio for ratio in ratios], rel=1e-12)
    assert found.residuals == pytest.approx([-total / n for n in (1, 2, 4, 5)], rel=1e-12)
    assert found.change == pytest.approx(total, rel=1e-12)
    assert (found.method, found.steps, found.reference) == ("integrated_gradients", (1, 2, 4, 5), 10)


def test_convergence_draws_what_was_found():
    figure = convergence(CONVERGED, unit="logit")
    expected = [([10, 20, 40], list(one.errors)) for one in CONVERGED]
    expected += [([10, 20, 40], [abs(value) for value in one.residuals]) for one in CONVERGED]
    assert lines(figure) == expected
    shown = words(figure)
    for word in ("Integrated Gradients", "Blur Integrated Gradients", "|residual|, logit; dashed: the change to be explained"):
        assert word in shown, word
    assert "relative l2 difference from 200 steps" in shown
    assert {"50 %", "10", "20", "40"} <= set(shown)


@pytest.mark.parametrize("value", [0.0, NAN, math.inf])
def test_convergence_leaves_out_what_no_logarithm_has(value):
    one = Convergence("integrated_gradients", (1, 2, 3, 4), (0.5, value, 0.25, 0.1), (value,) * 4, 9, value)
    figure = convergence([one])
    figure.canvas.draw()
    assert lines(figure) == [([1, 3, 4], [0.5, 0.25, 0.1])]


IMAGE = torch.rand(1, 3, 4, 4)
CONVERGE_ERRORS = [
    ({"method": "gradient"}, "method must be 'integrated_gradients' or 'blur_integrated_gradients', got 'gradient'"),
    ({"steps": (8, 8)}, "steps must be whole numbers above 0 that rise towards the reference, got [8, 8] and 512"),
    (
        {"reference": 128},
        "steps must be whole numbers above 0 that rise towards the reference, got [8, 16, 32, 64, 128] and 128",
    ),
    ({"steps": ()}, "steps must be whole numbers above 0 that rise towards the reference, got [] and 512"),
    ({"image": torch.rand(2, 3, 4, 4)}, "image must be one image (1, C, H, W), got shape (2, 3, 4, 4)"),
    ({"method_options": {"steps": 9}}, "method_options must leave the number of steps to this function, got 'steps'"),
    ({"method_options": {"tolerance": 0.1}}, "method_options must leave the number of steps to this function, got 'tolerance'"),
]


@pytest.mark.parametrize(("changes", "message"), CONVERGE_ERRORS)
def test_converge_errors(changes, message):
    with pytest.raises(ValueError) as caught:
        converge(square, **{"image": IMAGE, **changes})
    assert str(caught.value) == f"pysal.plots.converge: {message}"


# Deletion and insertion


def test_curves_draw_the_scores_and_mark_the_best_area():
    given = sides(("gradient", "grad_cam", RANDOM))
    figure = curves(given, percent=True)
    assert lines(figure) == [(side.shares.tolist(), line.tolist()) for side in given for line in side.scores.values()]
    bold = [text.get_text() for text in texts(figure) if text.get_weight() == "bold" and "%" in text.get_text()]
    # the areas of (1 - s)^1, ^2, ^3: a third is the least of them, a half the most
    assert bold == ["25.0 %", "50.0 %"]
    assert {"Gradient", "Grad-CAM", RANDOM, "deletion", "insertion"} <= set(words(figure))


def test_a_curve_without_numbers_is_named_and_not_drawn():
    shares = torch.linspace(0, 1, 5, dtype=torch.float64)
    scores = {"gradient": shares, "grad_cam": shares * NAN}
    figure = curves([Side("Deletion", "", shares, scores, {"gradient": 0.5, "grad_cam": NAN}, True)])
    figure.canvas.draw()
    assert {"Grad-CAM", "\N{EN DASH}", "0.5"} <= set(words(figure))


def test_curves_of_different_methods_are_refused():
    one, other = sides(("gradient",))[0], sides(("grad_cam",))[1]
    with pytest.raises(ValueError) as caught:
        curves([one, other])
    message = "pysal.plots.curves: sides must hold the same methods, at least one, got [['gradient'], ['grad_cam']]"
    assert str(caught.value) == message


# Agreement


def test_agreement_writes_each_correlation_in_its_cell():
    matrix = torch.tensor([[1.0, -0.256, NAN], [-0.256, 1.0, 0.7], [NAN, 0.7, 1.0]])
    assert "0.00" in words(agreement(torch.tensor([[1.0, -0.001], [-0.001, 1.0]]), ["a", "b"]))
    shown = words(agreement(matrix, ["Gradient", "Grad-CAM", "Leave-one-out"], unit="rank correlation"))
    assert [word for word in shown if word in ("\N{EN DASH}", f"{MINUS}0.26", "0.70")] == (
        [f"{MINUS}0.26", "\N{EN DASH}", f"{MINUS}0.26", "0.70", "\N{EN DASH}", "0.70"]
    )
    assert shown.count("Gradient") == 2
    assert "rank correlation" in shown


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (torch.eye(3), "have shape (2, 2), one row and column per name, got shape (3, 3)"),
        (torch.full((2, 2), 1.5), "lie in [-1, 1], got 1.5"),
    ],
)
def test_agreement_errors(matrix, message):
    with pytest.raises(ValueError) as caught:
        agreement(matrix, ["a", "b"])
    assert str(caught.value) == f"pysal.plots.agreement: matrix must {message}"


# The style


def test_methods_are_told_apart_by_colour_also_by_colour_blind_eyes():
    assert set(plots.LOOKS) == set(METHODS)
    colours = np.array([to_rgb(colour) for colour, _ in plots.LOOKS.values()])
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    luminance = linear @ [0.2126, 0.7152, 0.0722]
    assert (1.05 / (luminance + 0.05)).min() >= 3  # WCAG 2.1, 1.4.11: graphics on white
    for deficiency in (np.eye(3), *map(np.array, DEFICIENCIES.values())):
        seen = np.clip(linear @ deficiency.T, 0, 1)
        seen = rgb2lab(np.where(seen <= 0.0031308, 12.92 * seen, 1.055 * seen ** (1 / 2.4) - 0.055))
        # 1 is about the smallest difference an eye sees side by side; ten times that is another colour
        assert min(deltaE_ciede2000(one, other) for one, other in itertools.combinations(seen, 2)) > 10


def test_methods_are_told_apart_by_marker():
    assert len({marker for _, marker in plots.LOOKS.values()}) == len(METHODS)


@pytest.mark.parametrize("name", PLOTS)
def test_no_text_covers_another_or_leaves_the_page(name):
    figure = figure_of(name)
    width, height = figure.canvas.get_width_height()
    turned = {id(text) for text in texts(figure) if text.get_rotation() % 90}
    assert bool(turned) == (name == "agreement")
    placed = boxes_of(figure)
    level = boxes_of(figure, leave_out=turned)
    assert len(level) > 15
    for (first, one), (second, other) in itertools.combinations(level, 2):
        assert not one.overlaps(other), (first, second)
    for text, box in placed:
        assert box.x0 >= 0, text
        assert box.y0 >= 0, text
        assert box.x1 <= width, text
        assert box.y1 <= height, text


def test_plots_need_neither_pyplot_nor_the_user_settings():
    """The same pixels whatever the user's rcParams say."""
    script = """
import sys, matplotlib, numpy as np, torch
from tests.test_plots import PLOTS, figure_of
def pixels():
    torch.manual_seed(0)
    found = []
    for name in PLOTS:
        figure = figure_of(name)
        figure.canvas.draw()
        found.append(np.asarray(figure.canvas.buffer_rgba()).copy())
    return found
plain = pixels()
matplotlib.rcParams.update({"text.usetex": True, "font.family": "no such font", "text.color": "red", "lines.linewidth": 9,
    "axes.facecolor": "black", "axes.grid": True, "lines.marker": "x", "figure.facecolor": "green", "image.cmap": "jet"})
for name, before, after in zip(PLOTS, plain, pixels()):
    assert (before == after).all(), name
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-W", "error::UserWarning:matplotlib", "-c", script], check=True, timeout=600)


# From an explanation


@pytest.fixture(scope="module")
def found():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 5)).eval()
    images = torch.rand(2, 3, 8, 8)
    methods = ["leave_one_out", "gradient", "integrated_gradients", "blur_integrated_gradients"]
    options = {"leave_one_out": {"segments": pysal.Grid(2, 2)}}
    return model, pysal.explain(model, images, [1, 3], methods=methods, method_options=options)


def test_drops_of_an_explanation(found):
    _, explanation = found
    expected = sorted(explanation["leave_one_out"].details["drops"][1].tolist(), reverse=True)
    assert bars(explanation.plot(1, kind="drops")) == pytest.approx(expected)


def test_convergence_of_an_explanation_explains_the_same_score(found, tmp_path):
    model, explanation = found
    options = {"steps": (2, 4, 8), "reference": 16}
    figure = explanation.plot(1, kind="convergence", model=model, options=options, path=tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    one = converge(model, explanation.images[1:], 3, method="blur_integrated_gradients", score="logit", **options)
    assert ([2, 4, 8], list(one.errors)) in lines(figure)
    assert len(lines(figure)) == 4
    figure = explanation.plot(1, kind="convergence", methods="blur_integrated_gradients", model=model, options=options)
    assert len(lines(figure)) == 2


def test_a_function_that_was_explained_is_asked_for():
    explanation = pysal.explain(square, IMAGE, lambda y: y, methods=["integrated_gradients"])
    with pytest.raises(ValueError) as caught:
        explanation.plot(kind="convergence", model=square)
    message = "pysal.Explanation.plot: target must be what was explained, which is not kept where it is no class, got None"
    assert str(caught.value) == message
    options = {"steps": (1, 2, 4), "reference": 5}
    figure = explanation.plot(kind="convergence", model=square, target=lambda y: y, options=options)
    one = converge(square, IMAGE, target=lambda y: y, **options)
    assert lines(figure)[0] == ([1, 2, 4], list(one.errors))


def test_agreement_of_an_explanation_is_that_of_the_metric(found):
    _, explanation = found
    maps = {name: map[1:] for name, map in explanation.maps.items()}
    for options in ({}, {"absolute": True}):
        matrix = pysal.metrics.agreement(maps, **options)[0]
        shown = words(explanation.plot(1, kind="agreement", options=options))
        expected = [f"{round(float(matrix[i, j]), 2) + 0.0:.2f}" for i in range(4) for j in range(4) if i != j]
        assert [word.replace(MINUS, "-") for word in shown if word[-3:-2] == "."] == expected
    assert "Spearman's rank correlation of the pixels, by magnitude" in shown
    assert "Grad-CAM" not in shown


@pytest.mark.parametrize("options", [None, {"substrate": 0.5, "steps": 4}])
def test_deletion_and_insertion_of_an_explanation_are_those_of_the_metrics(found, options):
    model, explanation = found
    figure = explanation.plot(1, kind="deletion_insertion", methods="integrated_gradients", model=model, options=options)
    drawn = lines(figure)
    assert len(drawn) == 4  # the method and the random order, twice
    image, map = explanation.images[1:], explanation["integrated_gradients"].map[1:]
    for place, metric in ((0, pysal.metrics.deletion), (2, pysal.metrics.insertion)):
        curve = metric(model, image, map, 3, **(options or {}))
        assert drawn[place] == (curve.shares.tolist(), curve.scores[0].tolist())
    shown = words(figure)
    assert {"random order", "deletion", "insertion", "0 %"} <= set(shown)
    behind = "zero" if options is None else "0.5"
    assert f"most important first replaced by {behind}: lower is better" in shown


PLOT_ERRORS = [
    (
        {"kind": "pie"},
        "kind must be one of 'maps', 'drops', 'interactions', 'agreement', 'convergence', 'deletion_insertion', got 'pie'",
    ),
    ({"kind": "drops", "methods": "gradient"}, "methods must be out of leave_one_out, got 'gradient'"),
    (
        {"kind": "convergence", "methods": ["gradient"], "model": square},
        "methods must be out of integrated_gradients, blur_integrated_gradients, got 'gradient'",
    ),
    ({"kind": "convergence"}, "model must be the model that was explained, for kind='convergence' runs it again, got None"),
    ({"kind": "drops", "model": square}, "model must be left out for kind='drops', which has no use for it, got function"),
    ({"kind": "agreement", "cells": 4}, "cells must be left out for kind='agreement', which has no use for it, got int"),
    ({"cells": -1}, "cells must be 1 or more, got -1"),
    ({"view": "both"}, "view must be 'signed' or 'magnitude', got 'both'"),
    ({"options": {}}, "options must be left out for kind='maps', which has no use for it, got dict"),
    ({"kind": "agreement", "options": {"sign": 1}}, "options must hold options out of absolute, got 'sign'"),
    (
        {"kind": "deletion_insertion"},
        "model must be the model that was explained, for kind='deletion_insertion' runs it again, got None",
    ),
    (
        {"kind": "convergence", "model": square, "options": {"stairs": 3}},
        "options must hold options out of method, steps, reference, method_options, score, extra_inputs, batch_size, "
        "precision, got 'stairs'",
    ),
    (
        {"kind": "convergence", "model": square, "options": {"method": "gradient"}},
        "options must leave the method to methods=, got 'gradient'",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), PLOT_ERRORS)
def test_plot_errors(found, arguments, message):
    with pytest.raises(ValueError) as caught:
        found[1].plot(**arguments)
    assert str(caught.value) == f"pysal.Explanation.plot: {message}"


def test_maps_are_drawn_as_they_are_asked_for(found):
    _, explanation = found
    assert "logit per pixel" in words(explanation.plot(methods="integrated_gradients"))  # 8 pixels across: none to sum
    figure = explanation.plot(methods="integrated_gradients", cells=4, percentile=90)
    assert {"logit per 4 x 4 cell", "limits: 90 % of |map|"} <= set(words(figure))
    strong = explanation.plot(methods="integrated_gradients", view="magnitude", colours="gray", photo=False)
    assert "|logit per pixel|" in words(strong)


def test_an_overlay_is_a_picture_of_bytes(found):
    _, explanation = found
    picture = explanation.overlay("integrated_gradients", 1, cells=2)
    assert (picture.shape, picture.dtype) == ((8, 8, 3), np.dtype(np.uint8))
    squares = picture.reshape(4, 2, 4, 2, 3)
    plain = explanation.overlay("integrated_gradients", 1, cells=2, photo=False).reshape(4, 2, 4, 2, 3)
    assert (plain == plain[:, :1, :, :1]).all()  # one colour in each cell
    assert not (squares == squares[:, :1, :, :1]).all()  # the photo shows through
    shares = pysal.viz.pooled(explanation["integrated_gradients"].map[1].sum(0), 2)
    signs = np.sign(plain[:, 0, :, 0, 0].astype(int) - plain[:, 0, :, 0, 2])  # orange has more red, blue more blue
    assert (signs == np.sign(shares.numpy()))[np.abs(signs) > 0].all()
    values = pysal.viz.overlay(explanation.images[1], explanation["gradient"].map[1].abs().amax(0).double(), signed=False)
    np.testing.assert_array_equal(explanation.overlay("gradient", 1), np.rint(255 * values))


def test_maps_are_drawn_on_axes_of_the_callers(found):
    figure = Figure()
    axes = figure.subplots(1, 2)
    names = ["gradient", "integrated_gradients"]
    assert found[1].plot(1, methods=names, ax=axes) is figure
    assert [each.get_title() for each in axes] == ["Gradient", "Integrated Gradients"]
    for each, name in zip(axes, names, strict=True):
        shown = np.rint(255 * each.get_images()[0].get_array())
        np.testing.assert_array_equal(shown, found[1].overlay(name, 1))
    with pytest.raises(ValueError, match=r"ax must be one for each method to show \(.*; methods= chooses\), got 2$"):
        found[1].plot(ax=axes)
    with pytest.raises(TypeError, match=r"ax must be matplotlib axes, one for each method, got str$"):
        found[1].plot(methods="gradient", ax="left")
    with pytest.raises(TypeError, match=r"ax must be matplotlib axes, one for each method, got Figure$"):
        found[1].plot(methods="gradient", ax=figure)


def test_methods_and_images_that_are_not_there_are_named(found):
    _, explanation = found
    methods = "leave_one_out, gradient, integrated_gradients, blur_integrated_gradients"
    close = "'gradient', 'integrated_gradients', 'blur_integrated_gradients'"
    cases = [
        (
            lambda: explanation["gradients"],
            f": name must be a method out of {methods} (did you mean {close}?), got 'gradients'",
        ),
        (lambda: explanation[0], f": name must be a method out of {methods}, got 0"),
        (lambda: explanation.overlay("grad-cam"), f".overlay: name must be a method out of {methods}, got 'grad-cam'"),
        (lambda: explanation.overlay("gradient", 2), ".overlay: image must be an index in [0, 2), got 2"),
        (lambda: explanation.plot(1.0), ".plot: image must be an index in [0, 2), got 1.0"),
        (
            lambda: explanation.plot("maps"),
            ".plot: image must be an index in [0, 2); a kind is given as kind='maps', got 'maps'",
        ),
    ]
    for call, message in cases:
        with pytest.raises((ValueError, TypeError)) as caught:
            call()
        assert str(caught.value) == f"pysal.Explanation{message}"
    with pytest.raises(KeyError):
        explanation["grad_cam"]
    assert "gradient" in explanation
    assert "grad_cam" not in explanation


def test_nothing_to_show_is_refused(found):
    model, _ = found
    explanation: Explanation = pysal.explain(model, torch.rand(1, 3, 8, 8), methods=["gradient"])
    with pytest.raises(ValueError) as caught:
        explanation.plot(kind="drops")
    assert str(caught.value) == "pysal.Explanation.plot: methods must hold one that kind='drops' can show, got gradient"


def test_a_panel_that_is_not_there_is_refused(found):
    with pytest.raises(ValueError, match=r"^pysal.Explanation.panel: image must be an index in \[0, 2\), got 2$"):
        found[1].panel("gradient", 2)
    with pytest.raises(
        ValueError, match=r"^pysal.Explanation.panel: name must be a method out of leave_one_out, gradient, .*, got 'x'$"
    ):
        found[1].panel("x")
