"""What all plots are made of: a page with its title, axes without a frame, ticks, and each method's colour and marker."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from pysal.methods.registry import EVERY
from pysal.viz import GREY, INK, MARGIN, Page

# Colour and marker of each method. The colours were found by climbing on the smallest CIEDE2000 difference between any two of
# them under normal vision, protanopia, deuteranopia and tritanopia, with a contrast of 3 on white (tests/test_plots.py
# measures both); the markers tell the lines apart where there is no colour at all.
LOOKS: dict[str, tuple[str, str]] = {
    "leave_one_out": ("#3d3336", "s"),
    "gradient": ("#948fbe", "o"),
    "guided_backprop": ("#62a182", "^"),
    "grad_cam": ("#d87d11", "D"),
    "guided_grad_cam": ("#885c77", "v"),
    "smooth_grad": ("#2a2489", "P"),
    "integrated_gradients": ("#8342e2", "X"),
    "blur_integrated_gradients": ("#276530", "<"),
}
"""Method name -> its colour and its marker (of matplotlib) in all plots."""
OTHER = (GREY, "o")
GRID, GUIDE = "#e3e5e9", "#9a9da5"
HEADER = 0.86  # inches, as are all lengths below: the title, the line under it, and air
RANDOM = "random order"
"""The name of the curve that replaces pixels in random order."""


def titled_page(size: tuple[float, float], title: str, subtitle: str) -> Page:
    """Return a page with its title, and one line under it."""
    page = Page(size)
    room = size[0] - 2 * MARGIN
    page.text(title, MARGIN, 0.37, 14, weight="bold", room=room)
    page.text(subtitle, MARGIN, 0.59, 8.5, GREY, room=room)
    return page


def frame(
    page: Page,
    left: float,
    top: float,
    width: float,
    height: float,
    across: tuple[float, float],
    up: tuple[float, float],
    *,
    log: bool = False,
) -> Axes:
    """Return axes with limits and no frame: `x_ticks` and `y_ticks` draw their grid and write on it."""
    axes = page.axes(left, top, width, height)
    axes.set(xscale="log" if log else "linear", yscale="log" if log else "linear", xlim=across, ylim=up)
    return axes


def write(
    page: Page,
    axes: Axes,
    x: float,
    y: float,
    words: str,
    points: float,
    colour: str,
    *,
    align: Literal["left", "center", "right"] = "left",
    shift: float = 0.0,
) -> None:
    """Write at a place of the axes, its vertical middle on y, `shift` inches to the right."""
    across, up = (axes.transData.transform((x, y)) / page.figure.dpi).tolist()
    page.text(words, across + shift, page.size[1] - up + 0.35 * points / 72, points, colour, align=align)


def x_ticks(page: Page, axes: Axes, values: Sequence[float], word: Callable[[float], str]) -> None:
    """Draw a grid line at each value of x, and its word below the axes."""
    low = axes.get_ylim()[0]
    for value in values:
        axes.axvline(value, color=GRID, linewidth=0.7, marker="None", zorder=0)
        across, up = (axes.transData.transform((value, low)) / page.figure.dpi).tolist()
        page.text(word(value), across, page.size[1] - up + 0.18, 7.5, align="center")


def y_ticks(page: Page, axes: Axes, values: Sequence[float], word: Callable[[float], str]) -> None:
    """Draw a grid line at each value of y, and its word left of the axes."""
    for value in values:
        axes.axhline(value, color=GRID, linewidth=0.7, marker="None", zorder=0)
        write(page, axes, axes.get_xlim()[0], value, word(value), 7.5, INK, align="right", shift=-0.08)


def drawable(value: float) -> bool:
    """Tell whether a value has a place on a logarithmic axis."""
    return value > 0 and math.isfinite(value)


def ticks(low: float, high: float, most: int, factor: float = 1.0) -> list[float]:
    """Return values between the limits that are round numbers once multiplied by the factor."""
    values = np.asarray(MaxNLocator(most).tick_values(low * factor, high * factor)) / factor
    return [float(value) for value in values if low <= value <= high]


def log_ticks(low: float, high: float) -> list[float]:
    """Return 1, 2, 5, 10 ... between the limits; of many decades the powers of ten alone."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    steps = (1, 2, 5) if math.log10(high / low) < 2.5 else (1,)
    ticks = [step * 10.0**power for power in range(first, last + 1) for step in steps]
    return [tick for tick in ticks if low <= tick <= high]


def draw_key(page: Page, method: str, left: float, base: float) -> float:
    """Draw a method's line, marker and title; return how long it is."""
    colour, marker = LOOKS.get(method, OTHER)
    key = page.axes(left, base - 0.11, 0.32, 0.14)
    key.set(xlim=(0, 1), ylim=(0, 1))
    key.plot([0, 1], [0.5, 0.5], color=colour, linewidth=1.6, marker="None", linestyle=dashes(method))
    if method != RANDOM:
        key.plot([0.5], [0.5], color=colour, marker=marker, markersize=5)
    return 0.4 + page.text(title_of(method), left + 0.4, base, 8.5)


def title_of(method: str) -> str:
    """Return what a reader calls a method."""
    return EVERY[method].title if method in EVERY else method


def dashes(method: str) -> Any:
    """Return the line style of a method's curve."""
    return (0, (3, 2)) if method == RANDOM else "solid"
