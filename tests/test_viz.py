"""Pictures: numbers become the colours that are promised, and nothing written on a panel covers anything else."""

import itertools
import math
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from skimage.color import deltaE_ciede2000, rgb2lab

from pysal import viz
from pysal.viz import Panel, draw, fall, limits, number, overlay, palette, percent, photo, reduce_channels

NAN, INF = math.nan, math.inf


# Numbers


def test_reduce_channels_keeps_the_largest_magnitude_or_the_sum():
    map = torch.tensor([[[1.0, -2.0]], [[-3.0, 0.5]], [[0.0, 1.0]]], dtype=torch.float64)
    assert reduce_channels(map, "max_abs").tolist() == [[3.0, 2.0]]
    assert reduce_channels(map, "sum").tolist() == [[-2.0, -0.5]]
    assert reduce_channels(map[1:2], "none").tolist() == [[-3.0, 0.5]]
    assert reduce_channels(map, "sum").dtype == torch.float64
    assert reduce_channels(torch.stack([map, -map]), "sum").shape == (2, 1, 2)
    assert reduce_channels(map.int(), "sum").tolist() == [[-2.0, -1.0]]


@pytest.mark.parametrize("reduction", ["max_abs", "sum"])
def test_reduce_channels_shows_a_nan_of_any_channel(reduction):
    map = torch.zeros(3, 1, 2)
    map[1, 0, 1] = NAN
    assert reduce_channels(map, reduction).isnan().tolist() == [[False, True]]


def test_limits_hold_the_percentile():
    map = torch.linspace(-1, 0.5, 1501)
    low, high = limits(map, 90)
    assert low == -high
    assert (map.abs() <= high).double().mean() == pytest.approx(0.9, abs=1 / len(map))
    assert limits(map, 100) == (-1.0, 1.0)


def test_limits_of_an_unsigned_map_start_at_zero():
    assert limits(torch.tensor([0.0, 1.0, 2.0]), 100, signed=False) == (0.0, 2.0)
    assert limits(torch.tensor([-1.0, 2.0]), 100, signed=False) == (-2.0, 2.0)
    assert limits(torch.tensor([-1.0, -2.0]), 100, signed=False) == (-2.0, 0.0)


def test_limits_of_a_sparse_map_are_its_largest_value():
    map = torch.zeros(10000)
    map[7] = -0.25
    assert limits(map) == (-0.25, 0.25)


@pytest.mark.parametrize("map", [torch.zeros(4), torch.empty(0), torch.full((3,), NAN), torch.tensor([INF, -INF])])
@pytest.mark.parametrize("signed", [True, False])
def test_limits_without_values_are_zero(map, signed):
    assert limits(map, signed=signed) == (0.0, 0.0)


def test_limits_leave_out_what_is_not_finite():
    assert limits(torch.tensor([1.0, NAN, INF, -2.0]), 100) == (-2.0, 2.0)


# Colours


def oklab(srgb):
    """Ottosson's published sRGB -> OKLab, the other direction of the one in the package."""
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    return from_linear(linear)


def from_linear(linear):
    to_lms = np.array(
        [
            [0.4122214708, 0.5363325363, 0.0514459929],
            [0.2119034982, 0.6806995451, 0.1073969566],
            [0.0883024619, 0.2817188376, 0.6299787005],
        ]
    )
    to_lab = np.array(
        [
            [0.2104542553, 0.7936177850, -0.0040720468],
            [1.9779984951, -2.4285922050, 0.4505937099],
            [0.0259040371, 0.7827717662, -0.8086757660],
        ]
    )
    return np.cbrt(linear @ to_lms.T) @ to_lab.T


def test_signed_palette_is_uniform_and_symmetric():
    colours = oklab(palette(True))
    steps = np.linalg.norm(np.diff(colours, axis=0), axis=1)
    # a straight line in OKLab on each side: all steps of a side have one length, up to the rounding of the constants
    for side in (steps[:255], steps[255:]):
        assert np.ptp(side) < 1e-3 * side.mean()
    assert colours[:, 0] == pytest.approx(colours[::-1, 0], abs=1e-6)
    assert colours[255, 1:] == pytest.approx([0, 0], abs=1e-6)
    assert colours[255, 0] == pytest.approx(1)  # white, as paper is


def test_unsigned_palette_rises_in_lightness():
    lightness = oklab(palette(False))[:, 0]
    assert (np.diff(lightness) >= 0).all()
    assert len(np.unique(lightness)) > 200


# Machado, Oliveira, Fernandes 2009, severity 1, on linear RGB.
DEFICIENCIES = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


SIGHTS = {"normal": np.eye(3).tolist(), **DEFICIENCIES}


def cielab(srgb, sight):
    """CIELAB, by scikit-image, of what an eye with this sight sees."""
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ np.array(SIGHTS[sight]).T, 0, 1)
    return rgb2lab(np.where(seen <= 0.0031308, 12.92 * seen, 1.055 * seen ** (1 / 2.4) - 0.055))


@pytest.mark.parametrize("sight", SIGHTS)
@pytest.mark.parametrize("side", ["unsigned", "for", "against"])
def test_larger_is_lighter_or_darker_for_every_eye(side, sight):
    colours = {"unsigned": palette(False), "for": palette(True)[255:], "against": palette(True)[255::-1]}[side]
    lightness = cielab(colours, sight)[:, 0] * (1 if side == "unsigned" else -1)
    # matplotlib's inferno is tabled in 256 steps of 8 bits: half a step of one channel is what it may fall by
    assert np.diff(lightness).min() > -100 / 255 / 2
    assert np.diff(lightness[:: len(lightness) // 32]).min() > 0.5
    assert np.ptp(lightness) > 40


@pytest.mark.parametrize("sight", SIGHTS)
def test_the_sign_is_seen_by_every_eye_from_a_tenth_of_the_limit_on(sight):
    colours = cielab(palette(True), sight)
    for distance in range(26, 256):
        # 1 is about the smallest difference that an eye sees
        assert deltaE_ciede2000(colours[255 - distance], colours[255 + distance]) > 3


@pytest.mark.parametrize("deficiency", DEFICIENCIES)
def test_for_and_against_differ_for_colour_blind_eyes(deficiency):
    ends = palette(True)[[0, 510]]
    linear = np.where(ends <= 0.04045, ends / 12.92, ((ends + 0.055) / 1.055) ** 2.4)
    seen = from_linear(np.clip(linear @ np.array(DEFICIENCIES[deficiency]).T, 0, 1))
    # 0.02 is about the smallest difference in OKLab that an eye sees: ten times that cannot be missed
    assert np.linalg.norm(seen[0] - seen[1]) > 0.2


def test_photo_shows_any_range_and_number_of_channels():
    ramp = torch.linspace(0, 1, 12).reshape(3, 2, 2)
    expected = ramp.double().permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(photo(ramp), expected)
    np.testing.assert_array_equal(photo(ramp.double()), photo(ramp.double()).clip(0, 1))
    np.testing.assert_allclose(photo(ramp * 4 - 2), expected, atol=1e-6)
    np.testing.assert_array_equal(photo((ramp * 255).to(torch.uint8)), (ramp * 255).byte().permute(1, 2, 0).numpy() / 255)
    slightly_outside = torch.tensor([-0.005, 0.25, 1.005]).expand(3, 1, 3)
    np.testing.assert_array_equal(photo(slightly_outside)[0, :, 0], [0.0, 0.25, 1.0])
    for channels in (1, 2, 4):
        grey = photo(torch.rand(channels, 2, 5))
        assert grey.shape == (2, 5, 3)
        assert (grey == grey[..., :1]).all()
    assert photo(torch.full((3, 1, 1), 7.0)).tolist() == [[[0.0, 0.0, 0.0]]]
    assert photo(torch.full((3, 1, 1), NAN)).tolist() == [[[0.5, 0.5, 0.5]]]


@pytest.mark.parametrize("signed", [True, False])
def test_overlay_is_the_grey_photo_where_nothing_was_found(signed):
    image = torch.rand(3, 6, 7)
    for map in (torch.zeros(6, 7), torch.zeros(6, 7).index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(1.0))):
        picture = overlay(image, map, signed=signed)
        nothing = (map == 0).numpy()
        assert picture.shape == (6, 7, 3)
        assert (np.ptp(picture, axis=-1)[nothing] < 1e-12).all()
        low, high = (0.6, 1.0) if signed else (0.0, 0.5)  # pale under ink, dim under light
        assert low < picture[nothing].min()
        assert picture[nothing].max() < high
        luminance = (image.double().permute(1, 2, 0).numpy() @ [0.2126, 0.7152, 0.0722])[nothing]
        assert (np.argsort(picture[nothing][:, 0]) == np.argsort(luminance)).all()


def test_overlay_reaches_the_colours_at_the_limits():
    image = torch.rand(3, 1, 5)
    map = torch.tensor([[-2.0, -1.0, 0.0, 1.0, 5.0]])
    picture = overlay(image, map, signed=True, alpha=1.0, bounds=(-1.0, 1.0))
    np.testing.assert_allclose(picture[0, [0, 1]], palette(True)[[0, 0]], atol=1e-12)
    np.testing.assert_allclose(picture[0, [3, 4]], palette(True)[[510, 510]], atol=1e-12)
    unsigned = overlay(image, map.abs(), signed=False, alpha=1.0, bounds=(0.0, 1.0))
    np.testing.assert_allclose(unsigned[0, 4], palette(False)[510], atol=1e-12)
    np.testing.assert_array_equal(overlay(image, map, signed=True, alpha=0.0), overlay(image, map * 0, signed=True))


def test_overlay_does_not_depend_on_the_scale_of_the_map():
    image, map = torch.rand(3, 8, 8), torch.randn(8, 8, dtype=torch.float64)
    np.testing.assert_allclose(overlay(image, map * 2.0**-40, signed=True), overlay(image, map, signed=True), atol=1e-12)


@pytest.mark.parametrize("broken", [NAN, INF, -INF])
def test_overlay_hatches_what_is_not_finite(broken):
    image, map = torch.rand(3, 8, 8), torch.randn(8, 8)
    spoilt = map.clone()
    spoilt[2:6, 2:6] = broken
    picture = overlay(image, spoilt, signed=True, bounds=(-1, 1))
    hatch = picture[2:6, 2:6].reshape(-1, 3)
    assert (np.ptp(hatch, axis=1) == 0).all()
    assert len(np.unique(hatch)) == 2
    whole = overlay(image, map, signed=True, bounds=(-1, 1))
    outside = torch.isfinite(spoilt).numpy()
    np.testing.assert_array_equal(picture[outside], whole[outside])


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_a_layer_over_the_backdrop_is_the_overlay(signed, alpha):
    image, map = torch.rand(3, 8, 8), torch.randn(8, 8)
    light, behind = viz.layer(map, signed=signed), viz.backdrop(image, signed=signed)[..., None]
    opacity = alpha * light[..., 3:]
    picture = overlay(image, map, signed=signed, alpha=alpha)
    np.testing.assert_allclose(behind * (1 - opacity) + opacity * light[..., :3], picture, atol=1e-12)


def test_a_layer_is_transparent_where_the_map_is_zero_and_opaque_where_it_is_no_number():
    light = viz.layer(torch.tensor([[0.0, float("nan"), 2.0]]), signed=True)
    assert light[0, :, 3].tolist() == [0.0, 1.0, 1.0]


def test_overlay_in_other_colours_and_without_the_photo():
    image, map = torch.rand(3, 1, 3), torch.tensor([[-1.0, 0.0, 1.0]])
    plain = overlay(image, map, signed=True, bounds=(-1.0, 1.0), photo=False)
    np.testing.assert_allclose(plain[0], palette(True)[[0, 255, 510]], atol=1e-6)
    grey = overlay(image, map.abs(), signed=False, bounds=(0.0, 1.0), colours="gray", photo=False)
    np.testing.assert_array_equal(grey[0], [[1.0] * 3, [0.0] * 3, [1.0] * 3])
    own = overlay(image, map, signed=True, alpha=1.0, bounds=(-1.0, 1.0), colours=matplotlib.colormaps["RdBu_r"])
    np.testing.assert_allclose(own[0, [0, 2]], matplotlib.colormaps["RdBu_r"]([0.0, 1.0])[:, :3])
    np.testing.assert_allclose(own[0, 1], viz.backdrop(image, signed=True)[0, 1])


# How fine


@given(
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(1, 14),
    st.integers(0, 2**32 - 1),
)
def test_sums_over_cells_are_exact(height, width, cells, seed):
    # whole numbers add up without rounding, so nothing may be lost or counted twice
    map = torch.randint(-9, 10, (3, height, width), generator=torch.Generator().manual_seed(seed)).float()
    sums = viz.pooled(map, cells)
    assert sums.shape == (3, -(-height // cells), -(-width // cells))
    assert sums.dtype == torch.float64
    for row in range(sums.shape[1]):
        for column in range(sums.shape[2]):
            cell = map[:, row * cells : (row + 1) * cells, column * cells : (column + 1) * cells]
            assert sums[:, row, column].tolist() == cell.double().sum((1, 2)).tolist()


def test_a_value_that_is_no_number_spoils_its_cell_only():
    map = torch.ones(4, 4)
    map[0, 0] = NAN
    sums = viz.pooled(map, 2)
    assert sums.isnan().tolist() == [[True, False], [False, False]]
    assert sums[1].tolist() == [4.0, 4.0]


def additive(shape=(3, 56, 60), **changes):
    map = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return Panel("Integrated Gradients", map, "sum", True, **{"unit": "logit per pixel", **changes})


def test_a_style_of_numbers_of_numpy_is_one_of_numbers():
    given = viz.Style(cells=np.int64(4), percentile=np.float32(99), photo=np.bool_(False)).checked("here")
    assert given == viz.Style(cells=4, percentile=99.0, photo=False)
    assert type(given.cells) is int
    assert viz.Style(smooth=np.float64(2)).checked("here").smooth == 2
    with pytest.raises(TypeError, match=r"^here: cells must be a whole number of pixels, got float$"):
        viz.Style(cells=np.float64(4)).checked("here")


def test_shares_of_the_score_are_drawn_as_sums_over_cells():
    panel = additive()
    seen = viz.seen(panel)
    assert seen.values.shape == (28, 30)  # 28 cells along the shorter side
    assert seen.unit == "logit per 2 x 2 cell"
    assert float(seen.values.sum()) == pytest.approx(float(panel.map.sum()), abs=1e-9)
    assert torch.equal(seen.map[::2, ::2], seen.values)
    assert torch.equal(seen.map[1::2, 1::2], seen.values)
    assert seen.bounds == limits(seen.values)
    assert "logit per 2 x 2 cell" in [text.get_text() for text in texts(draw(torch.rand(3, 56, 60), [panel]))]


def test_the_fine_grain_and_a_gaussian_are_drawn_on_request():
    panel = additive()
    fine = viz.seen(panel, viz.Style(cells=1))
    assert torch.equal(fine.map, panel.map.sum(0))
    assert fine.unit == "logit per pixel"
    smooth = viz.seen(panel, viz.Style(smooth=3.0))
    assert smooth.map.shape == (56, 60)
    # a Gaussian between mirrors takes from each pixel what it gives to others
    assert float(smooth.map.sum()) == pytest.approx(float(panel.map.sum()), rel=1e-9)
    assert smooth.map.abs().max() < fine.map.abs().max() / 4
    assert smooth.unit == "logit per pixel, smoothed"


def test_magnitude_is_the_sum_of_the_channels_magnitudes():
    strong = viz.seen(additive(), viz.Style(view="magnitude", cells=1))
    assert torch.equal(strong.map, additive().map.abs().sum(0))
    assert (strong.signed, strong.unit) == (False, "|logit per pixel|")
    slopes = Panel("Gradient", additive().map, "max_abs", False, unit="|d logit / d value|")
    with_sign = viz.seen(slopes, viz.Style(view="signed"))
    assert torch.equal(with_sign.map, additive().map.sum(0))
    assert (with_sign.signed, with_sign.unit) == (True, "d logit / d value")
    assert torch.equal(viz.seen(slopes).map, additive().map.abs().amax(0))


def test_maps_of_segments_and_layers_are_never_summed():
    panel = Panel("Leave-one-out", torch.randn(1, 56, 56), "none", True, unit="drop of probability")
    for style in (viz.Style(), viz.Style(cells=7), viz.Style(smooth=5.0)):
        assert torch.equal(viz.seen(panel, style).map, panel.map[0].double())
        assert viz.seen(panel, style).unit == "drop of probability"


@pytest.mark.parametrize(
    ("style", "error", "message"),
    [
        ({"view": "sign"}, ValueError, "view must be 'signed' or 'magnitude' (did you mean 'signed'?), got 'sign'"),
        ({"cells": 0}, ValueError, "cells must be 1 or more, got 0"),
        ({"cells": 2.5}, TypeError, "cells must be a whole number of pixels, got float"),
        ({"smooth": -1}, ValueError, "smooth must be a finite number of pixels above 0, got -1"),
        ({"smooth": NAN}, ValueError, "smooth must be a finite number of pixels above 0, got nan"),
        ({"smooth": True}, TypeError, "smooth must be a number of pixels, got bool"),
        ({"smooth": 2, "cells": 4}, ValueError, "smooth must be left out where cells are given, got 2"),
        ({"percentile": 0}, ValueError, "percentile must be in (0, 100], got 0"),
        ({"percentile": "99"}, TypeError, "percentile must be a number in (0, 100], got str"),
        (
            {"colours": "virdis"},
            ValueError,
            "colours must be the name of a matplotlib colour map ('gray', 'viridis', 'RdBu_r') (did you mean 'viridis'?), "
            "got 'virdis'",
        ),
        ({"colours": 3}, TypeError, "colours must be the name of a matplotlib colour map, or one, got int"),
        ({"photo": "no"}, TypeError, "photo must be True or False, got str"),
    ],
)
def test_a_style_that_cannot_be_drawn_is_refused(style, error, message):
    with pytest.raises(error) as caught:
        draw(torch.rand(3, 8, 8), [additive((3, 8, 8))], style=viz.Style(**style))
    assert str(caught.value) == f"pysal.viz.draw: {message}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int64])
def test_any_dtype_is_drawn(dtype):
    map = torch.randn(1, 4, 4).mul(10).to(dtype)
    picture = overlay(torch.rand(3, 4, 4).to(dtype), reduce_channels(map, "none"), signed=True)
    assert np.isfinite(picture).all()
    assert picture.min() >= 0
    assert picture.max() <= 1


ERRORS = [
    (lambda: reduce_channels([1], "sum"), TypeError, "pysal.viz.reduce_channels: map must be a torch.Tensor, got list"),
    (
        lambda: reduce_channels(torch.zeros(2, 2), "sum"),
        ValueError,
        "pysal.viz.reduce_channels: map must have at least 3 dimensions (C, H, W), got shape (2, 2)",
    ),
    (
        lambda: reduce_channels(torch.zeros(1, 2, 2), "mean"),
        ValueError,
        "pysal.viz.reduce_channels: reduction must be one of 'max_abs', 'sum', 'sum_abs', 'none', got 'mean'",
    ),
    (
        lambda: reduce_channels(torch.zeros(3, 2, 2), "none"),
        ValueError,
        "pysal.viz.reduce_channels: map must have 1 channel where reduction is 'none', got shape (3, 2, 2)",
    ),
    (lambda: limits(torch.zeros(1), 0), ValueError, "pysal.viz.limits: percentile must be in (0, 100], got 0"),
    (lambda: limits(torch.zeros(1), NAN), ValueError, "pysal.viz.limits: percentile must be in (0, 100], got nan"),
    (lambda: photo(torch.zeros(2, 2)), ValueError, "pysal.viz.photo: image must have 3 dimensions, got shape (2, 2)"),
    (
        lambda: overlay(torch.zeros(3, 2, 2), torch.zeros(2, 3), signed=True),
        ValueError,
        "pysal.viz.overlay: map must have the size of the image, (2, 2), got shape (2, 3)",
    ),
    (
        lambda: overlay(torch.zeros(3, 2, 2), torch.zeros(2, 2), signed=True, alpha=1.5),
        ValueError,
        "pysal.viz.overlay: alpha must be in [0, 1], got 1.5",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS)
def test_errors(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message


# Words


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (-0.0, "0"),
        (1.0, "1"),
        (0.1014, "0.101"),
        (-0.0031, "-0.0031"),
        (9990.0, "9990"),
        (100.0, "100"),
        (9999.9, "1.0·10⁴"),
        (-4.21e-5, "-4.2·10⁻⁵"),
        (1.5e300, "1.5·10³⁰⁰"),
        (-INF, "-inf"),
        (NAN, "nan"),
    ],
)
def test_number(value, text):
    assert number(value) == text.replace("-", viz.MINUS)


@pytest.mark.parametrize(
    ("probability", "text"),
    [(0, "0 %"), (1, "100 %"), (0.67, "67 %"), (0.979, "97.9 %"), (0.9996, "99.96 %"), (0.003, "0.3 %"), (1e-9, "<0.0001 %")],
)
def test_percent(probability, text):
    assert percent(probability) == text


@pytest.mark.parametrize(
    ("score", "drops", "as_percent", "texts"),
    [
        (0.9998, [0.38, 0.07, 0.0], True, ["99.98 % → 61.98 %", "99.98 % → 92.98 %", None]),
        (0.83, [0.02, 0.01, -0.3], True, ["83 % → 81 %", "83 % → 82 %", None]),
        (0.984, [0.019, 0.9837, 0.001], True, ["98.4 % → 96.5 %", "98.4 % → <0.1 %", "98.4 % → 98.3 %"]),
        (8.312, [2.292, 0.3, 9.0], False, ["8.31 → 6.02", "8.31 → 8.01", "8.31 → -0.69"]),
        (2e-7, [1e-7], True, [None]),
    ],
)
def test_the_numbers_of_a_picture_are_rounded_alike(score, drops, as_percent, texts):
    expected = [text and text.replace("-", viz.MINUS) for text in texts]
    assert viz.falls(score, drops, as_percent) == expected


@given(st.floats(0, 1, exclude_min=True, exclude_max=True))
def test_percent_never_rounds_to_certainty(probability):
    assert percent(probability).strip("<> %") not in ("0", "100")
    shown = float(percent(probability).strip("<> %"))
    assert 0 < shown < 100


@pytest.mark.parametrize(
    ("score", "drop", "as_percent", "text"),
    [
        (0.95, 0.28, True, "95 % → 67 %"),
        (0.979, 0.029, True, "97.9 % → 95.0 %"),
        (0.5, 0.5, True, "50 % → 0 %"),
        (8.3123, 2.0, False, "8.31 → 6.31"),
        (-3.0, 2.0, False, "-3 → -5"),
        (0.95, 1e-6, True, None),
        (0.95, -0.1, True, None),
        (0.95, NAN, True, None),
        (NAN, 0.1, False, None),
    ],
)
def test_fall(score, drop, as_percent, text):
    assert fall(score, drop, as_percent) == (text and text.replace("-", viz.MINUS))


def test_printable_keeps_to_one_line_and_the_font():
    assert viz.printable("a\n b\t猫 é → $x$") == "a b □ é → $x$"


# The panel


def labels(rows=4, columns=5, size=40):
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    return y * rows // size * columns + x * columns // size


def full_panel(title="Leave-one-out", **changes):
    cut = labels()
    drops = torch.linspace(-0.2, 0.5, 20)
    keys = {
        "small_print": "residual -0.012 · layer features.denseblock4.denselayer16.conv2 · 100 steps",
        "unit": "drop of log probability, in a unit with a very long name",
        "labels": cut,
        "drops": drops,
        "score": 0.95,
        "percent": True,
    }
    return Panel(title, drops[cut][None], "none", True, **{**keys, **changes})


def texts(figure: Figure) -> list[Text]:
    found = [*figure.texts, *(child for axes in figure.axes for child in axes.get_children() if isinstance(child, Text))]
    return [text for text in [*found, *figure.findobj(Text)] if text.get_text()]


def unique(items):
    return list({id(item): item for item in items}.values())


def boxes_of(figure: Figure, leave_out=()):
    renderer = FigureCanvasAgg(figure).get_renderer()
    shown = [text for text in unique(texts(figure)) if id(text) not in leave_out]
    return [(text.get_text(), text.get_window_extent(renderer)) for text in shown]


LONG = "Staffordshire bullterrier, Staffordshire bull terrier, and a name that has no end"


@pytest.mark.parametrize("count", [1, 2, 4, 7, 9])
def test_no_text_covers_another_or_leaves_the_page(count):
    spoilt = full_panel("Blur Integrated Gradients with a long title")
    spoilt.map[0, 0, 0] = NAN
    panels = [full_panel(), spoilt, *[full_panel("Integrated Gradients") for _ in range(7)]][:count]
    figure = draw(torch.rand(3, 40, 40), panels, title=LONG, subtitle=LONG, probability=0.95)
    placed = boxes_of(figure)
    assert len(placed) > 8 * count
    for (first, one), (second, other) in itertools.combinations(placed, 2):
        assert not one.overlaps(other), (first, second)
    width, height = figure.canvas.get_width_height()
    for text, box in placed:
        assert box.x0 >= 0, text
        assert box.y0 >= 0, text
        assert box.x1 <= width, text
        assert box.y1 <= height, text


def test_panel_says_what_it_shows():
    figure = draw(torch.rand(3, 40, 40), [full_panel(unit="drop")], title="Egyptian cat", probability=0.95)
    words = [text.get_text() for text in texts(figure)]
    for expected in (
        "Egyptian cat",
        "95 %",
        "probability 95 %",
        "Leave-one-out",
        "drop",
        "limits: 99.5 % of |map|",
        f"{viz.MINUS}0.5",
        "0.5",
    ):
        assert expected in words, expected
    # linspace(-0.2, 0.5, 20): the last three drops are the largest
    falls = [fall(0.95, -0.2 + 0.7 * index / 19, True) for index in (19, 18, 17)]
    assert [word for word in dict.fromkeys(words) if "→" in word] == falls


def test_drops_are_labelled_on_their_segments():
    drops = torch.tensor([0.1, NAN, INF, 0.2])
    boxes = torch.tensor([[0, 0, 20, 20], [0, 20, 20, 40], [20, 0, 40, 20], [20, 20, 40, 40]])
    panel = full_panel(labels=None, boxes=boxes, drops=drops)
    figure = draw(torch.rand(3, 40, 40), [panel])
    places = {text.get_text(): text.get_position() for text in texts(figure) if "→" in text.get_text()}
    assert list(places) == ["95 % → 75 %", "95 % → 85 %"]
    x, y = places["95 % → 75 %"]
    assert x > 20
    assert y > 20
    x, y = places["95 % → 85 %"]
    assert x < 20
    assert y < 20


def test_borders_run_between_different_labels():
    cut = torch.zeros(4, 4, dtype=torch.int64)
    cut[1:3, 1:3] = 1
    lines = viz.borders(cut.numpy())
    assert len(lines) == 8
    ends = {point for line in lines for point in line}
    assert ends == {(x, y) for x in (0.5, 1.5, 2.5) for y in (0.5, 1.5, 2.5)} - {(1.5, 1.5)}
    whole = viz.borders(np.pad(np.ones((2, 3), bool), 1), offset=1)
    assert len(whole) == 10
    assert {x for line in whole for x, _ in line} == {-0.5, 0.5, 1.5, 2.5}
    assert {y for line in whole for _, y in line} == {-0.5, 0.5, 1.5}


def test_broken_and_empty_maps_are_named():
    zero, broken = torch.zeros(1, 6, 6), torch.zeros(1, 6, 6)
    broken[0, 0, :2] = NAN
    panels = [Panel("a", zero, "none", True), Panel("b", broken, "none", False), Panel("c", zero * NAN, "none", True)]
    words = [text.get_text() for text in texts(draw(torch.rand(3, 6, 6), panels))]
    for expected in ("zero everywhere", "2 of 36 pixels not finite", "36 of 36 pixels not finite", "no finite value"):
        assert expected in words


@pytest.mark.parametrize("shape", [(3, 1, 1), (1, 5, 60), (3, 60, 5), (4, 9, 9), (2, 8, 8)])
def test_odd_images_are_drawn(shape):
    map = torch.randn(1, *shape[1:])
    panel = Panel("m", map, "none", True, labels=torch.zeros(shape[1:]), drops=torch.tensor([0.5]), score=3.0)
    draw(torch.rand(shape) * 9 - 4, [panel]).canvas.draw()


def test_names_are_text_and_never_markup():
    # "$" would start mathtext, an unknown character would warn, and warnings are errors here
    panel = Panel("$\\frac$ 猫", torch.rand(1, 8, 8), "none", False, small_print="$a_{$", unit="$^")
    figure = draw(torch.rand(3, 8, 8), [panel], title="$x_ 猫\n\x00")
    figure.canvas.draw()
    assert "$\\frac$ □" in [text.get_text() for text in texts(figure)]


def test_drawing_is_repeatable_and_changes_nothing():
    image, panel = torch.rand(3, 40, 40), full_panel()
    kept = image.clone(), panel.map.clone(), dict(matplotlib.rcParams)
    pictures = []
    for _ in range(2):
        figure = draw(image, [panel], title="a")
        figure.canvas.draw()
        pictures.append(np.asarray(figure.canvas.buffer_rgba()).copy())
    np.testing.assert_array_equal(*pictures)
    assert torch.equal(image, kept[0])
    assert torch.equal(panel.map, kept[1])
    assert dict(matplotlib.rcParams) == kept[2]


def test_drawing_needs_neither_pyplot_nor_the_user_settings():
    """A user's rcParams (TeX, another font, a backend with windows) must not reach the picture."""
    script = """
import sys, matplotlib, torch
matplotlib.rcParams.update({"text.usetex": True, "font.family": "no such font", "image.cmap": "jet", "text.color": "red"})
from pysal.viz import Panel, draw
panel = Panel("a", torch.rand(1, 8, 8), "none", True, "b", "c", torch.zeros(8, 8), None, torch.tensor([0.3]), 0.9, True)
draw(torch.rand(3, 8, 8), [panel], title="t", probability=0.5).canvas.draw()
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-W", "error::UserWarning:matplotlib", "-c", script], check=True, timeout=600)
