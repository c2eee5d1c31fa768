"""Deletion and insertion: the score while important pixels are replaced, or shown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from pysal._checks import refuse
from pysal.plots.axes import (
    HEADER,
    LOOKS,
    OTHER,
    RANDOM,
    dashes,
    draw_key,
    frame,
    ticks,
    title_of,
    titled_page,
    x_ticks,
    y_ticks,
)
from pysal.viz import GREY, MARGIN, Page, number


@dataclass(frozen=True)
class Side:
    """One of the plots of `curves`.

    Attributes:
        heading: "Deletion".
        small_print: what is done to the image, and what is better.
        shares: (T,) in [0, 1], the share of the pixels.
        scores: method -> (T,) the score at each share.
        areas: method -> the area under its curve.
        falling: whether a smaller area is better.
    """

    heading: str
    small_print: str
    shares: Tensor
    scores: Mapping[str, Tensor]
    areas: Mapping[str, float]
    falling: bool


def curves(
    sides: Sequence[Side], *, title: str = "Deletion and insertion", subtitle: str = "", percent: bool = False
) -> Figure:
    """Return the score over the share of pixels replaced or shown, a plot for each side, and a table of the areas.

    Args:
        sides: what to draw, all with the same methods; `RANDOM` among them is drawn grey and dashed. The best area of each
            side is written in bold.
        title: what the plot shows.
        subtitle: one line under the title.
        percent: whether the score is a probability, shown in per cent.

    Returns:
        A figure with an Agg canvas, on white, not known to pyplot.

    Raises:
        ValueError: nothing to draw, or sides with different methods.
    """
    names = list(sides[0].scores) if sides else []
    if not names or any(list(side.scores) != names or list(side.areas) != names for side in sides):
        kept = [list(side.scores) for side in sides]
        refuse("pysal.plots.curves", "sides", "hold the same methods, at least one", kept)
    wide, tall, left, between, column, line = 3.1, 2.9, 0.75, 0.75, 0.85, 0.24
    ruler = Page((1, 1))
    table = left + len(sides) * (wide + between) - between + 0.5
    columns = table + 0.4 + max(ruler.width(title_of(name), 8.5) for name in names) + 0.15
    page = titled_page((columns + len(sides) * column + MARGIN, HEADER + 0.35 + tall + 0.7), title, subtitle)
    values = np.concatenate([scores.detach().cpu().double().numpy() for side in sides for scores in side.scores.values()])
    values = values[np.isfinite(values)]
    low, high = (min(float(values.min()), 0.0), max(float(values.max()), 0.0)) if len(values) else (0.0, 1.0)
    air, factor = 0.04 * ((high - low) or 1.0), 100.0 if percent else 1.0

    def word(value: float) -> str:
        return f"{number(100 * value)} %" if percent else number(value)

    for place, side in enumerate(sides):
        corner = left + place * (wide + between)
        page.text(side.heading, corner, HEADER + 0.02, 9.5, weight="bold")
        page.text(side.small_print, corner, HEADER + 0.2, 7.5, GREY, room=wide + between - 0.1)
        axes = frame(page, corner, HEADER + 0.35, wide, tall, (-0.02, 1.02), (low - air, high + air))
        x_ticks(page, axes, [0, 0.25, 0.5, 0.75, 1], lambda share: f"{100 * share:.0f} %")
        y_ticks(page, axes, ticks(low, high + air, 5, factor), word)
        shares = side.shares.detach().cpu().double().numpy()
        for name in names:
            colour, marker = LOOKS.get(name, OTHER)
            line_of = side.scores[name].detach().cpu().double().numpy()
            axes.plot(shares, line_of, color=colour, linewidth=1.5, marker="None", linestyle=dashes(name))
            if name != RANDOM:
                axes.plot(shares[::4], line_of[::4], color=colour, marker=marker, markersize=4, linestyle="none")
        page.text("share of the pixels", corner + wide / 2, HEADER + 0.35 + tall + 0.42, 8, GREY, align="center")
        right = columns + (place + 1) * column - 0.1
        page.text(side.heading.lower(), right, HEADER + 0.47, 7.5, GREY, align="right", room=column)
        areas = {name: area for name, area in side.areas.items() if math.isfinite(area)}
        best = (min if side.falling else max)(areas.values(), default=math.nan)
        for row, name in enumerate(names):
            area = side.areas[name]
            # per cents of a column have as many digits in each row
            shown = f"{100 * area:.1f} %" if percent else number(area)
            text = shown if math.isfinite(area) else "\N{EN DASH}"
            weight: Literal["normal", "bold"] = "bold" if area == best else "normal"
            page.text(text, right, HEADER + 0.74 + row * line, 8.5, align="right", weight=weight)
    page.text("mean height of the curve", columns + len(sides) * column - 0.1, HEADER + 0.2, 7.5, GREY, align="right")
    for row, name in enumerate(names):
        draw_key(page, name, table, HEADER + 0.74 + row * line)
    return page.figure
