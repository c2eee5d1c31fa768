"""Pictures of maps: channels to one number, numbers to colours, and the panel that shows several maps of one photo."""

from pysal.viz.colours import (
    PERCENTILE,
    Array,
    Colours,
    backdrop,
    layer,
    limits,
    overlay,
    palette,
    photo,
    reduce_channels,
)
from pysal.viz.drawing import draw, painted
from pysal.viz.page import FAMILY, GREY, INK, MARGIN, NOTEBOOK_BYTES, Page, compact, printable
from pysal.viz.panel import Panel
from pysal.viz.segments import borders, segment_mask
from pysal.viz.style import Seen, Shown, Style, pooled, seen
from pysal.viz.words import MINUS, change, fall, falls, number, percent

__all__ = [
    "FAMILY",
    "GREY",
    "INK",
    "MARGIN",
    "MINUS",
    "NOTEBOOK_BYTES",
    "PERCENTILE",
    "Array",
    "Colours",
    "Page",
    "Panel",
    "Seen",
    "Shown",
    "Style",
    "backdrop",
    "borders",
    "change",
    "compact",
    "draw",
    "fall",
    "falls",
    "layer",
    "limits",
    "number",
    "overlay",
    "painted",
    "palette",
    "percent",
    "photo",
    "pooled",
    "printable",
    "reduce_channels",
    "seen",
    "segment_mask",
]
