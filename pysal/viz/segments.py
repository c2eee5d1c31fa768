"""Segments on a picture: their borders, and the largest drops written where they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.font_manager import FontProperties
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from numpy.typing import NDArray
from torch import Tensor

from pysal.viz.colours import as_numpy
from pysal.viz.page import FAMILY, Page
from pysal.viz.panel import Panel
from pysal.viz.words import falls

LABELLED, LABEL = 3, 6.5  # how many drops are written on the picture, and how large (points)
Mask = NDArray[np.bool_]
Line = tuple[tuple[float, float], tuple[float, float]]


def draw_segments(page: Page, axes: Axes, panel: Panel, shape: Sequence[int], pale: bool) -> None:
    """Draw the segment borders, and the largest drops as "95 % → 67 %"; dark lines on a pale picture."""
    line = "black" if pale else "white"
    if panel.labels is not None:
        labels = panel.labels.detach().cpu().numpy()
        axes.add_collection(LineCollection(borders(labels), colors=line, alpha=0.25, linewidths=0.5))
    elif panel.boxes is not None and _tile(panel.boxes, shape):
        axes.add_collection(LineCollection(_outlines(panel.boxes), colors=line, alpha=0.25, linewidths=0.5))
    if panel.drops is None or panel.score is None:
        return
    drops = as_numpy(panel.drops)
    named: list[tuple[str, Mask]] = []
    texts = falls(panel.score, drops.tolist(), panel.percent)
    for segment in np.argsort(np.where(np.isfinite(drops), -drops, np.inf), kind="stable").tolist():
        text = texts[segment]
        if text is None or len(named) == LABELLED:
            break
        mask = segment_mask(panel, segment, shape)
        if mask is not None and mask.any():
            named.append((text, mask))
    taken: list[Bbox] = []
    for text, mask in named:
        outline = borders(np.pad(mask, 1), offset=1)
        axes.add_collection(LineCollection(outline, colors=line, linewidths=1.1, capstyle="round"))
        others = np.any([other for _, other in named if other is not mask] or [np.zeros_like(mask)], axis=0)
        taken.append(_label(page, axes, text, mask, others, taken, line))


def _tile(boxes: Tensor, shape: Sequence[int]) -> bool:
    """Tell whether the boxes leave the picture legible when all are outlined: they cover it at most once."""
    top, left, bottom, right = boxes.detach().cpu().to(torch.int64).unbind(1)
    return int(((bottom - top) * (right - left)).sum()) <= shape[0] * shape[1]


def _outlines(boxes: Tensor) -> list[list[tuple[float, float]]]:
    corners = []
    for top, left, bottom, right in (boxes.detach().cpu().double() - 0.5).tolist():
        corners.append([(left, top), (right, top), (right, bottom), (left, bottom), (left, top)])
    return corners


def segment_mask(panel: Panel, segment: int, shape: Sequence[int]) -> Mask | None:
    """Return where a segment of the panel lies, (H, W); None where the panel does not say."""
    if panel.labels is not None:
        return cast(Mask, panel.labels.detach().cpu().numpy() == segment)
    if panel.boxes is None or segment >= len(panel.boxes):
        return None
    top, left, bottom, right = (int(edge) for edge in panel.boxes[segment])
    mask = np.zeros(tuple(shape), np.bool_)
    mask[top:bottom, left:right] = True
    return mask


def borders(labels: NDArray[Any], offset: int = 0) -> list[Line]:
    """Return the pixel edges between different labels, in image coordinates (pixel centres at whole numbers)."""
    lines: list[Line] = []
    shift = 0.5 - offset
    for y, x in np.argwhere(labels[:, 1:] != labels[:, :-1]).tolist():
        lines.append(((x + shift, y + shift - 1), (x + shift, y + shift)))
    for y, x in np.argwhere(labels[1:] != labels[:-1]).tolist():
        lines.append(((x + shift - 1, y + shift), (x + shift, y + shift)))
    return lines


def _label(page: Page, axes: Axes, text: str, mask: Mask, others: Mask, taken: Sequence[Bbox], line: str) -> Bbox:
    """Write `text` near the segment's middle, off the `taken` places and the `others` where it can be."""
    height, width = mask.shape
    across, down = np.multiply(axes.get_position().size, page.size).tolist()
    scale = max(width / across, height / down)  # pixels per inch
    wide, high = (page.width(text, LABEL, "bold") + 0.1) * scale, 0.17 * scale
    points = np.argwhere(mask)
    y, x = points[np.argmin(((points - points.mean(0)) ** 2).sum(1))].tolist()
    room_x, room_y = max(width - wide, 0.0), max(height - high, 0.0)

    def cost(at: Bbox) -> float:
        middle_x, middle_y = (at.x0 + at.x1) / 2, (at.y0 + at.y1) / 2
        inside = (slice(max(round(at.y0), 0), round(at.y1) + 1), slice(max(round(at.x0), 0), round(at.x1) + 1))
        leader = (
            np.linspace(y, middle_y, 12).astype(int).clip(0, height - 1),
            np.linspace(x, middle_x, 12).astype(int).clip(0, width - 1),
        )
        distance = math.hypot(middle_x - x, 3 * (middle_y - y)) / wide
        own = mask[inside].sum() / len(points)
        clash = sum(at.padded(0.03 * scale).overlaps(other) for other in taken)
        return float(distance + 1.5 * own + 2.0 * others[inside].mean() + 2.0 * others[leader].mean() + 100.0 * clash)

    places = [Bbox.from_bounds(room_x * i / 16 - 0.5, room_y * j / 16 - 0.5, wide, high) for i in range(17) for j in range(17)]
    at = min(places, key=cost)
    centre = ((at.x0 + at.x1) / 2, (at.y0 + at.y1) / 2)
    if not at.contains(x, y):
        axes.plot([x, centre[0]], [y, centre[1]], color=line, linewidth=0.9)
        axes.plot([x], [y], color=line, marker="o", markersize=2.4)
    font = FontProperties(family=FAMILY, size=LABEL, weight="bold")
    label = Text(*centre, text, color="white", fontproperties=font, parse_math=False, usetex=False, zorder=5)
    label.set(horizontalalignment="center", verticalalignment="center_baseline")
    label.set_bbox({"boxstyle": "round,pad=0.25", "facecolor": (0, 0, 0, 0.8), "edgecolor": "none"})
    axes.add_artist(label)
    return at
