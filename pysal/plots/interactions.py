"""Interactions of segments: lines between those that need each other, or stand in for each other."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from torch import Tensor

from pysal._checks import check_tensor, refuse
from pysal.plots.axes import HEADER, frame, ticks, titled_page, write, x_ticks
from pysal.plots.drops import BAR, GAP, PHOTO, on_picture
from pysal.viz import GREY, INK, MARGIN, borders, number, palette, photo

MOST_PAIRS = 12
"""Most pairs that have a line and a bar; the others are counted."""
BEND = 0.16  # of a line, in its length
THICK, THIN = 4.0, 0.8  # lines of the largest interaction and of one near 0, in points


def interactions(
    image: Tensor,
    pairs: Tensor,
    values: Tensor,
    labels: Tensor,
    *,
    unit: str = "interaction",
    percent: bool = False,
    title: str = "Interactions of segments",
    subtitle: str = "",
) -> Figure:
    """Return lines between the segments that interact most, over the photo, and a bar for each.

    An orange line joins two segments that need each other, a blue one two that stand in for each other; the thicker, the more.
    Segments are numbered in the order of the bars, which are sorted. Of more than 12 pairs those with the largest |value| are
    shown; a line where the others would be says how many they are and what none of them exceeds.

    Args:
        image: (C, H, W), see `viz.photo`.
        pairs: (P, 2), whole numbers: segments.
        values: (P,), the interaction of each pair.
        labels: (H, W), whole numbers: the segment of each pixel, negative for none.
        unit: what the values are: "interaction of probability".
        percent: whether they are of a probability, and shown in percentage points.
        title: what the plot shows.
        subtitle: one line under the title.

    Returns:
        A figure with an Agg canvas, on white, not known to pyplot.

    Raises:
        TypeError: an argument is no tensor.
        ValueError: shapes that do not fit, a pair with a segment that has no pixel, or no finite value.
    """
    where = "pysal.plots.interactions"
    segments = check_tensor(where, "labels", labels, ndim=2).detach().cpu().numpy()
    of_pairs = check_tensor(where, "pairs", pairs, ndim=2).detach().cpu().numpy()
    found = check_tensor(where, "values", values, ndim=1).detach().cpu().double().numpy()
    height, width = check_tensor(where, "image", image, ndim=3).shape[1:]
    if segments.shape != (height, width):
        refuse(where, "labels", f"have the image's height and width {(height, width)}", f"shape {segments.shape}")
    if of_pairs.shape != (len(found), 2):
        refuse(where, "pairs", f"have shape ({len(found)}, 2), one for each value", f"shape {of_pairs.shape}")
    unknown = np.setdiff1d(of_pairs, segments[segments >= 0])
    if len(unknown):
        refuse(where, "pairs", "be of segments that labels has", int(unknown[0]))
    ranked = [int(pair) for pair in np.argsort(-np.abs(found), kind="stable") if math.isfinite(found[pair])]
    if not ranked:
        refuse(where, "values", "have a finite value", f"{len(found)} without one")
    shown = sorted(ranked[:MOST_PAIRS], key=lambda pair: -found[pair])
    hidden = ranked[MOST_PAIRS:]
    above_zero = sum(found[pair] > 0 for pair in shown)
    rows: list[int | None] = [*shown[:above_zero], *([None] if hidden else []), *shown[above_zero:]]
    names = {segment: place + 1 for place, segment in enumerate(dict.fromkeys(of_pairs[shown].flatten().tolist()))}

    tall = PHOTO * min(max(height / max(width, 1), 0.3), 2.5)
    plot_left, plot_width = MARGIN + PHOTO + 0.95, 4.1
    plot_height = max(len(rows) * (BAR + GAP), tall)
    page = titled_page((plot_left + plot_width + 1.35, HEADER + plot_height + 0.75), title, subtitle)

    picture = page.axes(MARGIN, HEADER, PHOTO, tall)
    picture.imshow(0.45 + 0.55 * photo(image), interpolation="antialiased")
    picture.add_collection(LineCollection(borders(segments), colors="black", alpha=0.2, linewidths=0.4))
    largest = float(np.abs(found[ranked[0]])) or 1.0
    middles = {segment: _middle(segments == segment) for segment in names}
    for pair in reversed(ranked[:MOST_PAIRS]):  # the strongest last, over the others
        share = abs(float(found[pair])) / largest
        x, y = _bow(*(middles[segment] for segment in of_pairs[pair].tolist()))
        thick = THIN + (THICK - THIN) * share
        picture.plot(x, y, color="white", linewidth=thick + 1.2, alpha=0.7, marker="None", solid_capstyle="round")
        picture.plot(x, y, color=_colour(float(found[pair])), linewidth=thick, marker="None", solid_capstyle="round")
    picture.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    for segment, name in names.items():
        on_picture(picture, segments == segment, str(name))

    low, high = min(float(found[shown[-1]]), 0.0), max(float(found[shown[0]]), 0.0)
    air = 0.01 * ((high - low) or 1.0)
    axes = frame(page, plot_left, HEADER, plot_width, plot_height, (low - air, high + air), (len(rows), 0))
    points = 100.0 if percent else 1.0
    x_ticks(page, axes, ticks(low, high, 6, points), lambda tick: number(tick * points))
    words = f"{unit}, percentage points" if percent else unit
    page.text(words, plot_left + plot_width / 2, HEADER + plot_height + 0.42, 8, GREY, align="center", room=plot_width + 1)
    axes.axvline(0, color=INK, linewidth=0.8, marker="None")
    tall_bar = BAR / (BAR + GAP)
    for row, one in enumerate(rows):
        middle = row + 0.5
        if one is None:
            most = number(points * float(np.abs(found[hidden]).max())) + (" points" if percent else "")
            write(page, axes, 0, middle, f"{len(hidden)} more pairs: at most {most} either way", 7.5, GREY, shift=0.08)
            continue
        value = float(found[one])
        axes.add_patch(Rectangle((0, middle - tall_bar / 2), value, tall_bar, facecolor=_colour(value), linewidth=0))
        first, second = (names[segment] for segment in of_pairs[one].tolist())
        write(page, axes, low, middle, f"{min(first, second)} and {max(first, second)}", 7.5, INK, align="right", shift=-0.12)
        told = number(points * value) + (" points" if percent else "")
        write(page, axes, max(value, 0.0), middle, told, 7.5, INK, shift=0.08)
    return page.figure


def _colour(value: float) -> Any:
    return palette(True)[510 if value > 0 else 0]


def _bow(start: tuple[float, float], end: tuple[float, float]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return x and y of a line between two places (y, x), bent so that three in a row are not taken for two."""
    (y0, x0), (y1, x1) = start, end
    along = np.linspace(0.0, 1.0, 25)
    bulge = 2 * BEND * along * (1 - along)
    return x0 + along * (x1 - x0) - bulge * (y1 - y0), y0 + along * (y1 - y0) + bulge * (x1 - x0)


def _middle(mask: NDArray[np.bool_]) -> tuple[float, float]:
    """Return the pixel (y, x) of a segment that is nearest to its middle."""
    points = np.argwhere(mask)
    y, x = points[np.argmin(((points - points.mean(0)) ** 2).sum(1))].tolist()
    return y, x
