"""Drops per segment: how far the score falls when each is hidden."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from torch import Tensor

from pysal._checks import check_tensor, refuse
from pysal.plots.axes import HEADER, frame, ticks, titled_page, write, x_ticks
from pysal.viz import (
    FAMILY,
    GREY,
    INK,
    MARGIN,
    Panel,
    borders,
    change,
    limits,
    number,
    overlay,
    palette,
    reduce_channels,
    segment_mask,
)

PHOTO = 3.0
BAR, GAP = 0.2, 0.05
MOST_BARS = 20
"""Most segments that have a bar of their own; the others are counted."""


def drops(image: Tensor, panel: Panel, *, title: str = "Drop per segment", subtitle: str = "") -> Figure:
    """Return bars of how far the score falls when each segment is hidden, beside the map that says where they are.

    The bars are sorted, and numbered on the map. Of more than 20 segments those with the largest |drop| are shown; a line where
    the others would be says how many they are and what none of them exceeds.

    Args:
        image: (C, H, W), see `viz.photo`.
        panel: of leave-one-out: its map, `drops` (S,), `score`, `percent`, and `labels` or `boxes` for the places.
        title: what the plot shows.
        subtitle: one line under the title.

    Returns:
        A figure with an Agg canvas, on white, not known to pyplot.

    Raises:
        TypeError: `image` is no tensor, or the panel has no drops.
        ValueError: no drop is finite.
    """
    where = "pysal.plots.drops"
    found = check_tensor(where, "panel.drops", panel.drops, ndim=1).detach().cpu().double().numpy()
    ranked = [int(segment) for segment in np.argsort(-np.abs(found), kind="stable") if math.isfinite(found[segment])]
    if not ranked:
        refuse(where, "panel.drops", "have a finite value", f"{len(found)} without one")
    shown = sorted(ranked[:MOST_BARS], key=lambda segment: -found[segment])
    hidden = ranked[MOST_BARS:]
    above_zero = sum(found[segment] > 0 for segment in shown)
    rows: list[int | None] = [*shown[:above_zero], *([None] if hidden else []), *shown[above_zero:]]

    height, width = image.shape[-2:]
    tall = PHOTO * min(max(height / max(width, 1), 0.3), 2.5)
    plot_left, plot_width = MARGIN + PHOTO + 0.75, 4.1
    plot_height = max(len(rows) * (BAR + GAP), tall)
    page = titled_page((plot_left + plot_width + 1.35, HEADER + plot_height + 0.75), title, subtitle)

    map = reduce_channels(panel.map, panel.reduction)
    picture = page.axes(MARGIN, HEADER, PHOTO, tall)
    bounds = limits(map, signed=panel.signed)
    picture.imshow(overlay(image, map, signed=panel.signed, bounds=bounds), interpolation="antialiased")
    low, high = min(float(found[shown[-1]]), 0.0), max(float(found[shown[0]]), 0.0)
    air = 0.01 * ((high - low) or 1.0)
    axes = frame(page, plot_left, HEADER, plot_width, plot_height, (low - air, high + air), (len(rows), 0))
    points = 100.0 if panel.percent else 1.0
    x_ticks(page, axes, ticks(low, high, 6, points), lambda tick: number(tick * points))
    unit = f"{panel.unit}, percentage points" if panel.percent else panel.unit
    page.text(unit, plot_left + plot_width / 2, HEADER + plot_height + 0.42, 8, GREY, align="center", room=plot_width + 1)
    axes.axvline(0, color=INK, linewidth=0.8, marker="None")

    thick = BAR / (BAR + GAP)
    for row, segment in enumerate(rows):
        middle = row + 0.5
        if segment is None:
            most = number(points * float(np.abs(found[hidden]).max())) + (" points" if panel.percent else "")
            write(page, axes, 0, middle, f"{len(hidden)} more segments: at most {most} either way", 7.5, GREY, shift=0.08)
            continue
        name = str(shown.index(segment) + 1)
        drop = float(found[segment])
        colour = palette(True)[510 if drop > 0 else 0]
        axes.add_patch(Rectangle((0, middle - thick / 2), drop, thick, facecolor=colour, linewidth=0))
        write(page, axes, low, middle, name, 7.5, INK, align="right", shift=-0.12)
        words = change(panel.score, panel.score - drop, panel.percent) if panel.score is not None else None
        words = words or number(points * drop) + (" points" if panel.percent else "")
        write(page, axes, max(drop, 0.0), middle, words, 7.5, INK, shift=0.08)
        mask = segment_mask(panel, segment, map.shape)
        if mask is not None and mask.any():
            picture.add_collection(LineCollection(borders(np.pad(mask, 1), offset=1), colors=(0, 0, 0, 0.75), linewidths=0.7))
            on_picture(picture, mask, name)
    return page.figure


def on_picture(picture: Axes, mask: Any, word: str) -> None:
    """Write a word on the pixel of the segment that is nearest to its middle."""
    points = np.argwhere(mask)
    y, x = points[np.argmin(((points - points.mean(0)) ** 2).sum(1))].tolist()
    font = FontProperties(family=FAMILY, size=6.5, weight="bold")
    label = Text(x, y, word, color="white", fontproperties=font, parse_math=False, usetex=False, zorder=5)
    label.set(horizontalalignment="center", verticalalignment="center_baseline")
    label.set_bbox({"boxstyle": "round,pad=0.2", "facecolor": (0, 0, 0, 0.75), "edgecolor": "none"})
    picture.add_artist(label)
