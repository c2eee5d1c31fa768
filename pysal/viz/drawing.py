"""The picture that shows several maps of one photo, each with its name and its own colour bar."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from pysal.viz.colours import DIM, LIGHT, Array, check_colours, colours_of, overlay, photo, reduce_channels, without_photo
from pysal.viz.page import GREY, INK, MARGIN, Page
from pysal.viz.panel import Panel
from pysal.viz.segments import draw_segments
from pysal.viz.style import Seen, Style, seen
from pysal.viz.words import number, percent

WARNING = "#b3261e"
TILE, GAP = 2.3, 0.24  # inches, as are all lengths below
HEADER, TITLE, BAR = 0.74, 0.42, 0.56


def draw(
    image: Tensor,
    panels: Sequence[Panel],
    *,
    title: str = "",
    subtitle: str = "",
    probability: float | None = None,
    style: Style | None = None,
) -> Figure:
    """Return a figure: the photo, and every map on the grey photo with its name and its own colour bar.

    Args:
        image: (C, H, W), see `photo`.
        panels: the maps, in the order they are shown.
        title: what the image was taken for.
        subtitle: one line under the title.
        probability: of the target, in [0, 1]; drawn as a bar under the photo.
        style: how the maps are drawn; None = each as its method means it.

    Returns:
        A figure with an Agg canvas, on white, not known to pyplot.

    Raises:
        TypeError, ValueError: see `Style`, `reduce_channels` and `overlay`.
    """
    style = (style or Style()).checked("pysal.viz.draw")
    height, width = image.shape[-2:]
    tall = TILE * min(max(height / max(width, 1), 0.3), 2.5)
    columns = {2: 2, 3: 3, 4: 4, 5: 3, 6: 3, 7: 4, 8: 4, 9: 3}.get(len(panels) + 1, min(len(panels) + 1, 5))
    rows = math.ceil((len(panels) + 1) / columns)
    size = (
        2 * MARGIN + columns * TILE + (columns - 1) * GAP,
        HEADER + rows * (TITLE + tall + BAR) + (rows - 1) * 0.1 + 0.6 * MARGIN,
    )
    page = Page(size)
    likely = "" if probability is None else percent(probability)
    room = size[0] - 2 * MARGIN - page.width(likely, 14) - 0.15
    used = page.text(title, MARGIN, 0.37, 14, weight="bold", room=room)
    page.text(likely, MARGIN + used + 0.12, 0.37, 14, GREY)
    page.text(subtitle, MARGIN, 0.59, 8.5, GREY, room=size[0] - 2 * MARGIN)
    for place, panel in enumerate([None, *panels]):
        row, column = divmod(place, columns)
        left, top = MARGIN + column * (TILE + GAP), HEADER + row * (TITLE + tall + BAR + 0.1)
        if panel is None:
            _photo_tile(page, image, left, top, tall, probability)
        else:
            _map_tile(page, image, panel, left, top, tall, style)
    return page.figure


def _photo_tile(page: Page, image: Tensor, left: float, top: float, tall: float, probability: float | None) -> None:
    page.text("Photo", left, top + 0.17, 9.5, weight="bold")
    page.text(f"{image.shape[-1]} \N{MULTIPLICATION SIGN} {image.shape[-2]} pixels", left, top + 0.33, 7, GREY)
    _picture(page, photo(image), left, top, tall)
    if probability is None or not math.isfinite(probability):
        return
    under = top + TITLE + tall
    axes = page.axes(left, under + 0.08, TILE, 0.09)
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.add_patch(Rectangle((0, 0), 1, 1, facecolor="#dfe1e5", linewidth=0))
    axes.add_patch(Rectangle((0, 0), probability, 1, facecolor=INK, linewidth=0))
    page.text("0", left, under + 0.29, 6.5, INK)
    page.text("100 %", left + TILE, under + 0.29, 6.5, INK, align="right")
    page.text(f"probability {percent(probability)}", left, under + 0.43, 6.5, GREY)


def _picture(page: Page, picture: Array, left: float, top: float, tall: float) -> Axes:
    axes = page.axes(left, top + TITLE, TILE, tall)
    axes.imshow(picture, interpolation="antialiased", aspect="equal")
    return axes


def _map_tile(page: Page, image: Tensor, panel: Panel, left: float, top: float, tall: float, style: Style) -> None:
    drawn = seen(panel, style)
    page.text(panel.title, left, top + 0.17, 9.5, weight="bold", room=TILE)
    finite = torch.isfinite(reduce_channels(panel.map, "sum_abs"))
    warning = "" if finite.all() else f"{int((~finite).sum())} of {finite.numel()} pixels not finite"
    used = page.text(warning, left, top + 0.33, 7, WARNING, weight="bold", room=TILE)
    indent = used + 0.08 if used else 0.0
    page.text(panel.small_print, left + indent, top + 0.33, 7, GREY, room=TILE - indent)
    picture = _picture(page, painted(image, drawn, style), left, top, tall)
    draw_segments(page, picture, panel, drawn.map.shape, drawn.signed or not style.photo)
    empty = "zero everywhere" if finite.any() else "no finite value"
    _colour_bar(page, drawn, style, left, top + TITLE + tall, empty)


def painted(image: Tensor, drawn: Seen, style: Style) -> Array:
    """Return the map of one panel in colours, (H, W, 3) in [0, 1]."""
    return overlay(image, drawn.map, signed=drawn.signed, bounds=drawn.bounds, colours=style.colours, photo=style.photo)


def _colour_bar(page: Page, drawn: Seen, style: Style, left: float, under: float, empty: str) -> None:
    low, high = drawn.bounds
    ramp = np.linspace(low, high, 512)[None]
    colours, opacity = colours_of(ramp, drawn.bounds, drawn.signed, check_colours("pysal.viz.draw", style.colours))
    dark, more = LIGHT if drawn.signed else DIM
    backdrop = dark + 0.5 * more  # middle grey of the photo, so that the bar has the colours of the picture
    bar = backdrop + 0.95 * opacity[..., None] * (colours - backdrop)
    if not style.photo:
        bar = without_photo(np.concatenate([colours, opacity[..., None]], -1), drawn.signed, style.colours)
    page.axes(left, under + 0.08, TILE, 0.09).imshow(bar, aspect="auto", interpolation="nearest")
    if low == high:
        page.text(empty, left, under + 0.29, 6.5, GREY)
        return
    page.text(number(low), left, under + 0.29, 6.5)
    if low < 0 < high:
        page.text("0", left + TILE * -low / (high - low), under + 0.29, 6.5, align="center")
    page.text(number(high), left + TILE, under + 0.29, 6.5, align="right")
    share = f"limits: {style.percentile:g} % of |map|"
    page.text(drawn.unit, left, under + 0.43, 6.5, GREY, room=TILE - page.width(share, 6.5) - 0.1)
    page.text(share, left + TILE, under + 0.43, 6.5, GREY, align="right")
