"""Pictures of maps: channels to one number, numbers to colours, and the panel that shows several maps of one photo."""

from pysal.viz.colours import (
    PERCENTILE,
    Array,
    backdrop,
    layer,
    limits,
    overlay,
    palette,
    photo,
    reduce_channels,
)
from pysal.viz.drawing import draw
from pysal.viz.page import FAMILY, GREY, INK, MARGIN, Page, printable
from pysal.viz.panel import Panel
from pysal.viz.segments import borders, segment_mask
from pysal.viz.words import MINUS, change, fall, number, percent

__all__ = [
    "FAMILY",
    "GREY",
    "INK",
    "MARGIN",
    "MINUS",
    "PERCENTILE",
    "Array",
    "Page",
    "Panel",
    "backdrop",
    "borders",
    "change",
    "draw",
    "fall",
    "layer",
    "limits",
    "number",
    "overlay",
    "palette",
    "percent",
    "photo",
    "printable",
    "reduce_channels",
    "segment_mask",
]
