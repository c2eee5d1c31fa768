"""A page to draw on: a figure of matplotlib's object interface, addressed in inches, with text that fits its room.

It touches no global state, needs no display and may be drawn in any thread.
"""

from __future__ import annotations

import base64
import importlib
import io
import math
from functools import cache
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.text import Text

INK = "#1c1c1e"
"""The colour of titles and numbers."""
GREY = "#5c5f66"
"""The colour of small print."""
MARGIN = 0.26
"""Margin of a page, in inches, as are all lengths."""
DPI = 160
FAMILY = "DejaVu Sans"
"""The font. It comes with matplotlib, so a picture is the same on every machine."""


class Picture(Figure):
    """A figure that shows itself at the end of a notebook's cell, though pyplot does not know of it."""

    def _repr_jpeg_(self) -> bytes:
        return compact(self, NOTEBOOK_BYTES)

    def _ipython_display_(self) -> None:
        """Show the JPEG alone: once a notebook has imported pyplot, IPython would add a PNG of a megabyte to it."""
        display: Any = importlib.import_module("IPython.display").display
        jpeg = base64.b64encode(self._repr_jpeg_()).decode("ascii")
        display({"image/jpeg": jpeg, "text/plain": repr(self)}, raw=True)


NOTEBOOK_BYTES = 200_000
"""Most bytes of the pictures of a notebook's cell; a notebook keeps them as text, which is a third longer."""


def compact(figure: Figure, most: int) -> bytes:
    """Return a figure as a JPEG of at most `most` bytes, as fine as they allow; the coarsest where none is as small."""
    data = b""
    for dpi in (110, 90, 72, 56, 40):
        with io.BytesIO() as file:
            figure.savefig(file, format="jpeg", dpi=dpi, pil_kwargs={"quality": 82, "optimize": True})
            data = file.getvalue()
        if len(data) <= most:
            break
    return data


class Page:
    """A figure on white, unknown to pyplot, addressed in inches from its top left corner."""

    def __init__(self, size: tuple[float, float]) -> None:
        self.size = size
        self.figure = Picture(figsize=size, dpi=DPI, facecolor="white")
        self.renderer: RendererAgg = FigureCanvasAgg(self.figure).get_renderer()  # type: ignore[no-untyped-call]

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        """Return axes without frame, ticks and labels."""
        full_width, full_height = self.size
        box = (left / full_width, 1 - (top + height) / full_height, width / full_width, height / full_height)
        axes = self.figure.add_axes(box)
        axes.set_axis_off()
        return axes

    def width(self, text: str, points: float, weight: str = "normal") -> float:
        """Return how long a line of text is."""
        font = FontProperties(family=FAMILY, size=points, weight=weight)
        extent = self.renderer.get_text_width_height_descent(text, font, False)  # type: ignore[no-untyped-call]
        return float(extent[0]) / DPI

    def text(
        self,
        text: str,
        left: float,
        base: float,
        points: float,
        colour: str = INK,
        *,
        weight: Literal["normal", "bold"] = "normal",
        align: Literal["left", "center", "right"] = "left",
        room: float = math.inf,
        angle: float = 0.0,
    ) -> float:
        """Write one line, shortened to `room`, turned by `angle` degrees about its start; return its length."""
        text = printable(text)
        shown, keep = text, len(text)
        while keep > 1 and self.width(shown, points, weight) > room:
            keep -= 1
            shown = text[:keep].rstrip() + "…"
        x, y = left / self.size[0], 1 - base / self.size[1]
        font = FontProperties(family=FAMILY, size=points, weight=weight)
        line = Text(x, y, shown, color=colour, fontproperties=font, parse_math=False, usetex=False)
        line.set(horizontalalignment=align, rotation=angle, rotation_mode="anchor")
        self.figure.add_artist(line)
        return self.width(shown, points, weight)


@cache
def _glyphs() -> frozenset[int]:
    return frozenset(get_font(findfont(FontProperties(family=FAMILY))).get_charmap())


def printable(text: str) -> str:
    """Return one line that the font of the pictures can draw: blanks merged, unknown characters as white squares."""
    return "".join(c if ord(c) in _glyphs() else "□" for c in " ".join(text.split()))
