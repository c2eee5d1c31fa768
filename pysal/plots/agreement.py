"""Agreement: how alike the maps of each two methods are."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from pysal._checks import check_tensor, refuse
from pysal.plots.axes import HEADER, frame, titled_page
from pysal.viz import GREY, INK, MARGIN, MINUS, Page, number, palette

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
    page = titled_page((left + count * CELL + max(slant - 0.5 * CELL, 0.0) + 0.2, bottom + 0.72), title, subtitle)
    colours = palette(True)
    cells = frame(page, left, above, count * CELL, count * CELL, (0, count), (count, 0))
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
