"""Plots of the numbers around maps: drops per segment, convergence with steps, deletion and insertion, agreement.

Each plot is a function from numbers to a figure, in the style of `viz`: its page, its font, its colours, neither pyplot nor
the user's settings. `Explanation.plot(kind=...)` finds the numbers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from pysal._checks import check_tensor, refuse
from pysal.engine.request.attribution import check_options
from pysal.engine.request.extra_inputs import ExtraInputs
from pysal.engine.request.plan import Model, Plan
from pysal.engine.request.score import ScoreKind
from pysal.engine.request.target import Target
from pysal.methods.registry import METHODS
from pysal.methods.traits import PATHS
from pysal.viz import (
    FAMILY,
    GREY,
    INK,
    MARGIN,
    MINUS,
    Page,
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
OTHER = (GREY, "o")
GRID, GUIDE = "#e3e5e9", "#9a9da5"
HEADER = 0.86  # inches, as are all lengths below: the title, the line under it, and air


# Drops per segment ---------------------------------------------------------------------------------------------------

PHOTO = 3.0
BAR, GAP = 0.2, 0.05
MOST_BARS = 20


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
    page = _page((plot_left + plot_width + 1.35, HEADER + plot_height + 0.75), title, subtitle)

    map = reduce_channels(panel.map, panel.reduction)
    picture = page.axes(MARGIN, HEADER, PHOTO, tall)
    bounds = limits(map, signed=panel.signed)
    picture.imshow(overlay(image, map, signed=panel.signed, bounds=bounds), interpolation="antialiased")
    low, high = min(float(found[shown[-1]]), 0.0), max(float(found[shown[0]]), 0.0)
    air = 0.01 * ((high - low) or 1.0)
    axes = _frame(page, plot_left, HEADER, plot_width, plot_height, (low - air, high + air), (len(rows), 0))
    points = 100.0 if panel.percent else 1.0
    _x_ticks(page, axes, _ticks(low, high, 6, points), lambda tick: number(tick * points))
    unit = f"{panel.unit}, percentage points" if panel.percent else panel.unit
    page.text(unit, plot_left + plot_width / 2, HEADER + plot_height + 0.42, 8, GREY, align="center", room=plot_width + 1)
    axes.axvline(0, color=INK, linewidth=0.8, marker="None")

    thick = BAR / (BAR + GAP)
    for row, segment in enumerate(rows):
        middle = row + 0.5
        if segment is None:
            most = number(points * float(np.abs(found[hidden]).max())) + (" points" if panel.percent else "")
            _words(page, axes, 0, middle, f"{len(hidden)} more segments: at most {most} either way", 7.5, GREY, shift=0.08)
            continue
        name = str(shown.index(segment) + 1)
        drop = float(found[segment])
        colour = palette(True)[510 if drop > 0 else 0]
        axes.add_patch(Rectangle((0, middle - thick / 2), drop, thick, facecolor=colour, linewidth=0))
        _words(page, axes, low, middle, name, 7.5, INK, align="right", shift=-0.12)
        words = change(panel.score, panel.score - drop, panel.percent) if panel.score is not None else None
        words = words or number(points * drop) + (" points" if panel.percent else "")
        _words(page, axes, max(drop, 0.0), middle, words, 7.5, INK, shift=0.08)
        mask = segment_mask(panel, segment, map.shape)
        if mask is not None and mask.any():
            picture.add_collection(LineCollection(borders(np.pad(mask, 1), offset=1), colors=(1, 1, 1, 0.75), linewidths=0.7))
            _on_picture(picture, mask, name)
    return page.figure


def _on_picture(picture: Axes, mask: Any, word: str) -> None:
    """Write a word on the pixel of the segment that is nearest to its middle."""
    points = np.argwhere(mask)
    y, x = points[np.argmin(((points - points.mean(0)) ** 2).sum(1))].tolist()
    font = FontProperties(family=FAMILY, size=6.5, weight="bold")
    label = Text(x, y, word, color="white", fontproperties=font, parse_math=False, usetex=False, zorder=5)
    label.set(horizontalalignment="center", verticalalignment="center_baseline")
    label.set_bbox({"boxstyle": "round,pad=0.2", "facecolor": (0, 0, 0, 0.75), "edgecolor": "none"})
    picture.add_artist(label)


# Convergence ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Convergence:
    """How a path method's map of one image approaches the map of many more steps.

    Attributes:
        method: "integrated_gradients" or "blur_integrated_gradients".
        steps: gradients per map, rising.
        errors: of each number of steps: the l2 norm of the map's difference from the reference, over that of the reference.
        residuals: of each number of steps: by how much the map's sum misses the change of the score, signed.
        reference: steps of the reference.
        change: of the score from the path's beginning to the image, what the map should add up to.
    """

    method: str
    steps: tuple[int, ...]
    errors: tuple[float, ...]
    residuals: tuple[float, ...]
    reference: int
    change: float


def converge(
    model: Model,
    image: Tensor,
    method: str = "integrated_gradients",
    target: Target = None,
    *,
    steps: Sequence[int] = (8, 16, 32, 64, 128),
    reference: int = 512,
    method_options: Mapping[str, Any] | None = None,
    score: ScoreKind = "logit",
    extra_inputs: ExtraInputs = (),
    batch_size: int | None = None,
) -> Convergence:
    """Return how far the maps of few steps are from that of many, and from adding up.

    It takes `sum(steps) + reference` gradients of the model, 760 by default.

    Args:
        model: see `pysal.integrated_gradients`; a prepared one saves most of the time.
        image: (1, C, H, W).
        method: "integrated_gradients" or "blur_integrated_gradients".
        target: see `pysal.gradient`.
        steps: numbers of gradients, rising, each at least 1.
        reference: more than the most of `steps`; four times as many leave the reference an error well below theirs.
        method_options: the method's own options but the number of steps: {"baseline": "blur"}.
        score: which number of the target's column is explained. "logit" or "raw": the output as it is. "auto": the target's
            probability if the output tells one, else the output as it is. "probability" and "log_probability": the same, but
            one number per image outside [0, 1] is refused. "softmax", "log_softmax" (classes exclude each other), "sigmoid",
            "log_sigmoid" (independent labels, or a binary logit): that function, whatever the output is. What the output is
            (numbers, probabilities, logits) is found out from all images of the call together.
        extra_inputs: see `pysal.gradient`.
        batch_size: see `pysal.gradient`.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: another method, steps that do not rise to the reference, an unknown option, several images, or what the
            method refuses.
    """
    where = "pysal.plots.converge"
    if method not in PATHS:
        refuse(where, "method", f"be {' or '.join(map(repr, PATHS))}", repr(method))
    ladder = [*steps, reference]
    whole = all(isinstance(step, int) and not isinstance(step, bool) and step > 0 for step in ladder)
    if len(ladder) < 2 or not whole or any(b <= a for a, b in itertools.pairwise(ladder)):
        refuse(where, "steps", "be whole numbers above 0 that rise towards the reference", f"{list(steps)} and {reference}")
    if len(check_tensor(where, "image", image, ndim=4)) != 1:
        refuse(where, "image", "be one image (1, C, H, W)", f"shape {tuple(image.shape)}")
    options = dict(method_options or {})
    check_options(where, "method_options", METHODS[method].prepare, options)
    for name in ("steps", "tolerance", "max_steps"):
        if name in options:
            refuse(where, "method_options", "leave the number of steps to this function", repr(name))
    plan = Plan(
        where,
        model,
        image,
        target,
        score=score,
        extra_inputs=extra_inputs,
        batch_size=batch_size,
        precision="float32",
        dtype=None,
    )
    found = {count: METHODS[method].attribute(plan.renamed(where, score), steps=count, **options) for count in ladder}
    maps = {count: one.map.cpu().double() for count, one in found.items()}
    residuals = {count: float(one.details["residual"][0]) for count, one in found.items()}
    size = float(maps[reference].norm())
    return Convergence(
        method=method,
        steps=tuple(steps),
        errors=tuple(float((maps[count] - maps[reference]).norm()) / size if size else math.nan for count in steps),
        residuals=tuple(residuals[count] for count in steps),
        reference=reference,
        change=float(maps[reference].sum()) - residuals[reference],
    )


def convergence(
    found: Sequence[Convergence], *, title: str = "Convergence with steps", subtitle: str = "", unit: str = "score"
) -> Figure:
    """Return two plots over the number of steps: the error of the map, and by how much it misses the change of the score.

    Args:
        found: one per method, from `converge`.
        title: what the plot shows.
        subtitle: one line under the title.
        unit: what the score is called, "logit".

    Returns:
        A figure with an Agg canvas, on white, not known to pyplot.

    Raises:
        ValueError: nothing to draw.
    """
    if not found:
        refuse("pysal.plots.convergence", "found", "hold at least one method", "none")
    wide, tall, left, between = 3.4, 2.7, 0.85, 1.05
    page = _page((left + 2 * wide + between + 0.45, HEADER + 0.5 + tall + 0.95), title, subtitle)
    steps = sorted({count for one in found for count in one.steps})
    spread = (steps[0] / 1.25, steps[-1] * 1.25)
    reference = ", ".join(str(count) for count in sorted({one.reference for one in found}))
    for side, heading in enumerate(("Error of the map", "Completeness residual")):
        corner = left + side * (wide + between)
        page.text(heading, corner, HEADER + 0.02, 9.5, weight="bold")
        if side == 0:
            small = f"relative l2 difference from {reference} steps"
            lines = [one.errors for one in found]
        else:
            small = f"|residual|, {unit}; dashed: the change to be explained"
            lines = [tuple(abs(value) for value in one.residuals) for one in found]
        page.text(small, corner, HEADER + 0.2, 7.5, GREY, room=wide + 0.4)
        changes = [abs(one.change) for one in found] if side else []
        shown = [value for value in itertools.chain(*lines, changes) if _drawable(value)]
        span = (min(shown) / 1.4, max(shown) * 1.4) if shown else (0.3, 3.0)
        axes = _frame(page, corner, HEADER + 0.35, wide, tall, spread, span, log=True)
        _x_ticks(page, axes, steps, lambda step: str(int(step)))
        _y_ticks(page, axes, _log_ticks(*span), number if side else lambda value: f"{number(100 * value)} %")
        page.text("gradients per map", corner + wide / 2, HEADER + 0.35 + tall + 0.42, 8, GREY, align="center")
        for one, line in zip(found, lines, strict=True):
            colour, marker = LOOKS.get(one.method, OTHER)
            kept = [(step, value) for step, value in zip(one.steps, line, strict=True) if _drawable(value)]
            if kept:
                axes.plot(*zip(*kept, strict=True), color=colour, marker=marker, markersize=5, linewidth=1.6)
            if side and _drawable(abs(one.change)):
                axes.axhline(abs(one.change), color=colour, linewidth=1, marker="None", linestyle=(0, (4, 3)))
    place = left
    for one in found:
        place += _key(page, one.method, place, HEADER + 0.35 + tall + 0.72) + 0.3
    return page.figure


# Deletion and insertion ----------------------------------------------------------------------------------------------

RANDOM = "random order"


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
    columns = table + 0.4 + max(ruler.width(_title(name), 8.5) for name in names) + 0.15
    page = _page((columns + len(sides) * column + MARGIN, HEADER + 0.35 + tall + 0.7), title, subtitle)
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
        axes = _frame(page, corner, HEADER + 0.35, wide, tall, (-0.02, 1.02), (low - air, high + air))
        _x_ticks(page, axes, [0, 0.25, 0.5, 0.75, 1], lambda share: f"{100 * share:.0f} %")
        _y_ticks(page, axes, _ticks(low, high + air, 5, factor), word)
        shares = side.shares.detach().cpu().double().numpy()
        for name in names:
            colour, marker = LOOKS.get(name, OTHER)
            line_of = side.scores[name].detach().cpu().double().numpy()
            axes.plot(shares, line_of, color=colour, linewidth=1.5, marker="None", linestyle=_dashes(name))
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
        _key(page, name, table, HEADER + 0.74 + row * line)
    return page.figure


# Agreement -----------------------------------------------------------------------------------------------------------

CELL = 0.62


def agreement(
    matrix: Tensor, names: Sequence[str], *, title: str = "Agreement of methods", subtitle: str = "", unit: str = ""
) -> Figure:
    """Return a table of coloured cells: how alike the maps of each two methods are.

    Args:
        matrix: (M, M), symmetric, in [-1, 1]; NaN is shown as "-".
        names: M methods as a reader calls them.
        title: what the plot shows.
        subtitle: one line under the title.
        unit: what a number is, "rank correlation of the pixels".

    Returns:
        A figure with an Agg canvas, on white, not known to pyplot.

    Raises:
        TypeError: `matrix` is no tensor.
        ValueError: it is not (M, M) for M names, or a value lies outside [-1, 1].
    """
    where = "pysal.plots.agreement"
    values = check_tensor(where, "matrix", matrix, ndim=2).detach().cpu().double().numpy()
    count = len(names)
    if values.shape != (count, count) or not count:
        refuse(where, "matrix", f"have shape ({count}, {count}), one row and column per name", f"shape {values.shape}")
    if (np.abs(values) > 1 + 1e-6).any():
        refuse(where, "matrix", "lie in [-1, 1]", float(np.nanmax(np.abs(values))))
    size = (1, 1)
    page = Page(size)
    names = [name.replace(" ", "\u00a0") for name in names]
    side = max(page.width(name, 8.5) for name in names)
    left = MARGIN + side + 0.15
    # column names are written at 40 degrees, so that they need no more width than their cell
    above = HEADER + side * math.sin(math.radians(40)) + 0.1
    slant = side * math.cos(math.radians(40))
    bottom = above + count * CELL
    page = _page((left + count * CELL + max(slant - 0.5 * CELL, 0.0) + 0.2, bottom + 0.72), title, subtitle)
    colours = palette(True)
    cells = _frame(page, left, above, count * CELL, count * CELL, (0, count), (count, 0))
    for row in range(count):
        middle = above + (row + 0.5) * CELL
        page.text(names[row], left - 0.12, middle + 0.045, 8.5, align="right")
        page.text(names[row], left + (row + 0.5) * CELL - 0.05, above - 0.08, 8.5, angle=40)
        for column in range(count):
            value = float(values[row, column])
            colour = colours[round(255 * (1 + min(max(value, -1.0), 1.0)))] if math.isfinite(value) else (0.8, 0.8, 0.8)
            if row == column:
                colour = (0.93, 0.93, 0.94)
            cells.add_patch(Rectangle((column, row), 0.96, 0.96, facecolor=colour, linewidth=0))
            word = f"{round(value, 2) + 0.0:.2f}".replace("-", MINUS) if math.isfinite(value) else "\N{EN DASH}"
            word = "" if row == column else word
            ink = "white" if sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), colour, strict=True)) < 0.5 else INK
            page.text(word, left + (column + 0.5) * CELL - 0.015, middle + 0.03, 8.5, ink, align="center", weight="bold")
    ramp = page.axes(left, bottom + 0.14, count * CELL - 0.03, 0.1)
    ramp.imshow(colours[None], aspect="auto", interpolation="nearest")
    wide = count * CELL - 0.03
    for value in (-1, 0, 1):
        width = page.width(number(value), 7)
        page.text(number(value), left + (wide - width) * (value + 1) / 2, bottom + 0.38, 7)
    page.text(unit, left + wide / 2, bottom + 0.55, 7.5, GREY, align="center", room=left + wide)
    return page.figure


# What all plots are made of ------------------------------------------------------------------------------------------


def _page(size: tuple[float, float], title: str, subtitle: str) -> Page:
    page = Page(size)
    room = size[0] - 2 * MARGIN
    page.text(title, MARGIN, 0.37, 14, weight="bold", room=room)
    page.text(subtitle, MARGIN, 0.59, 8.5, GREY, room=room)
    return page


def _frame(
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
    """Return axes with limits and no frame: `_x_ticks` and `_y_ticks` draw their grid and write on it."""
    axes = page.axes(left, top, width, height)
    axes.set(xscale="log" if log else "linear", yscale="log" if log else "linear", xlim=across, ylim=up)
    return axes


def _words(
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


def _x_ticks(page: Page, axes: Axes, values: Sequence[float], word: Callable[[float], str]) -> None:
    low = axes.get_ylim()[0]
    for value in values:
        axes.axvline(value, color=GRID, linewidth=0.7, marker="None", zorder=0)
        across, up = (axes.transData.transform((value, low)) / page.figure.dpi).tolist()
        page.text(word(value), across, page.size[1] - up + 0.18, 7.5, align="center")


def _y_ticks(page: Page, axes: Axes, values: Sequence[float], word: Callable[[float], str]) -> None:
    for value in values:
        axes.axhline(value, color=GRID, linewidth=0.7, marker="None", zorder=0)
        _words(page, axes, axes.get_xlim()[0], value, word(value), 7.5, INK, align="right", shift=-0.08)


def _drawable(value: float) -> bool:
    return value > 0 and math.isfinite(value)


def _ticks(low: float, high: float, most: int, factor: float = 1.0) -> list[float]:
    """Return values between the limits that are round numbers once multiplied by the factor."""
    values = np.asarray(MaxNLocator(most).tick_values(low * factor, high * factor)) / factor
    return [float(value) for value in values if low <= value <= high]


def _log_ticks(low: float, high: float) -> list[float]:
    """Return 1, 2, 5, 10 ... between the limits; of many decades the powers of ten alone."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    steps = (1, 2, 5) if math.log10(high / low) < 2.5 else (1,)
    ticks = [step * 10.0**power for power in range(first, last + 1) for step in steps]
    return [tick for tick in ticks if low <= tick <= high]


def _key(page: Page, method: str, left: float, base: float) -> float:
    """Draw a method's line, marker and title; return how long it is."""
    colour, marker = LOOKS.get(method, OTHER)
    key = page.axes(left, base - 0.11, 0.32, 0.14)
    key.set(xlim=(0, 1), ylim=(0, 1))
    key.plot([0, 1], [0.5, 0.5], color=colour, linewidth=1.6, marker="None", linestyle=_dashes(method))
    if method != RANDOM:
        key.plot([0.5], [0.5], color=colour, marker=marker, markersize=5)
    return 0.4 + page.text(_title(method), left + 0.4, base, 8.5)


def _title(method: str) -> str:
    return METHODS[method].title if method in METHODS else method


def _dashes(method: str) -> Any:
    return (0, (3, 2)) if method == RANDOM else "solid"
