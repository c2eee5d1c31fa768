"""Pictures of maps: channels to one number, numbers to colours, and the panel that shows several maps of one photo.

Nothing here changes a map: limits, clipping and desaturation belong to drawing. The panel uses matplotlib's object
interface only, so it touches no global state, needs no display and may be drawn in any thread.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, cast

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from numpy.typing import NDArray
from torch import Tensor

from pysal._checks import check_tensor, refuse

Array = NDArray[np.float64]
PERCENTILE = 99.5
"""Per cent of the pixels whose |map| lies inside the colour limits: a few outliers must not make a picture pale."""


# Numbers -------------------------------------------------------------------------------------------------------------


def reduce_channels(map: Tensor, reduction: str) -> Tensor:
    """Return one number per pixel.

    Args:
        map: (..., C, H, W), any real dtype.
        reduction: "max_abs" (largest |value| of the channels), "sum" (keeps the sign and the total) or "none" (C is 1).

    Returns:
        (..., H, W), floating dtype and device of `map`. NaN in any channel gives NaN.

    Raises:
        TypeError: `map` is no tensor.
        ValueError: fewer than 3 dimensions, an unknown reduction, or "none" with several channels.

    Source:
        max |.| over channels for gradients: Simonyan, Vedaldi, Zisserman 2013, arXiv:1312.6034, section 3.1.

    Example:
        >>> reduce_channels(torch.tensor([[[1.0]], [[-3.0]]]), "max_abs")
        tensor([[3.]])
    """
    where = "pysal.viz.reduce_channels"
    map = check_tensor(where, "map", map)
    if map.ndim < 3:
        refuse(where, "map", "have at least 3 dimensions (C, H, W)", f"shape {tuple(map.shape)}")
    if not map.is_floating_point():
        map = map.to(torch.float32)
    if reduction == "max_abs":
        return map.abs().amax(-3)
    if reduction == "sum":
        return map.sum(-3)
    if reduction != "none":
        refuse(where, "reduction", "be 'max_abs', 'sum' or 'none'", repr(reduction))
    if map.shape[-3] != 1:
        refuse(where, "map", "have 1 channel where reduction is 'none'", f"shape {tuple(map.shape)}")
    return map.squeeze(-3)


def limits(map: Tensor, percentile: float = PERCENTILE, *, signed: bool = True) -> tuple[float, float]:
    """Return the numbers that get the outermost colours.

    Args:
        map: any shape. Values that are not finite are left out.
        percentile: in (0, 100]; per cent of the finite values with |value| inside the limits. Where that many are zero,
            the largest |value| is taken instead, so that a sparse map does not vanish.
        signed: limits symmetric about 0; otherwise from 0 (or the mirrored percentile, where values are negative).

    Returns:
        (low, high), low <= 0 <= high; (0, 0) for a map that is zero, empty or nowhere finite.

    Raises:
        TypeError: `map` is no tensor.
        ValueError: `percentile` outside (0, 100].

    Example:
        >>> limits(torch.tensor([-2.0, 1.0]), 100)
        (-2.0, 2.0)
    """
    where = "pysal.viz.limits"
    map = check_tensor(where, "map", map)
    if not 0 < percentile <= 100:
        refuse(where, "percentile", "be in (0, 100]", percentile)
    values = _numpy(map)
    values = values[np.isfinite(values)]
    if values.size == 0:
        return 0.0, 0.0
    magnitude = np.abs(values)
    bound = float(np.percentile(magnitude, percentile)) or float(magnitude.max())
    if signed:
        return -bound, bound
    return (-bound if values.min() < 0 else 0.0), (bound if values.max() > 0 else 0.0)


# Colours -------------------------------------------------------------------------------------------------------------

DIM = (0.04, 0.44)  # grey of the dimmed photo where the photo is black, and what white adds to it


@cache
def palette(signed: bool) -> Array:
    """Return the colours of a map, from its low limit to its high one.

    Both are perceptually uniform and dark where the map is near zero, since they glow on a dimmed photo. The signed one
    is two straight lines in OKLab, from blue (against the target) over dark grey to orange (for it), equally light on
    both sides; blue against orange is the axis that the common colour vision deficiencies keep. The unsigned one is
    matplotlib's inferno without its black end.

    Returns:
        (511, 3) sRGB in [0, 1].

    Source:
        Björn Ottosson, "A perceptual color space for image processing", 2020 (OKLab).
    """
    if not signed:
        return np.asarray(colormaps["inferno"](np.linspace(0.15, 1.0, 511)), np.float64)[:, :3]
    blue, grey, orange = (0.78, -0.066, -0.094), (0.28, 0.0, 0.0), (0.78, 0.066, 0.112)
    t = np.linspace(0.0, 2.0, 511)
    oklab = np.stack([np.interp(t, [0.0, 1.0, 2.0], knots) for knots in zip(blue, grey, orange, strict=True)], -1)
    to_lms = [[1, 0.3963377774, 0.2158037573], [1, -0.1055613458, -0.0638541728], [1, -0.0894841775, -1.2914855480]]
    to_linear = [
        [4.0767416621, -3.3077115913, 0.2309699292],
        [-1.2684380046, 2.6097574011, -0.3413193965],
        [-0.0041960863, -0.7034186147, 1.7076147010],
    ]
    linear = (oklab @ np.array(to_lms).T) ** 3 @ np.array(to_linear).T
    linear = np.clip(linear, 0.0, 1.0)
    return cast(Array, np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055))


def photo(image: Tensor) -> Array:
    """Return an image as colours that can be shown.

    Args:
        image: (C, H, W). Three channels are red, green, blue; any other number is shown as their mean in grey. Values
            in [0, 1] are shown as they are, bytes are divided by 255, any other range is stretched to
            [0, 1]; a hundredth outside [0, 1], as resizing leaves, is cut. Values that are not finite are shown grey.

    Returns:
        (H, W, 3) in [0, 1].

    Raises:
        TypeError: `image` is no tensor.
        ValueError: `image` is not 3-D.
    """
    image = check_tensor("pysal.viz.photo", "image", image, ndim=3)
    values = _numpy(image)
    finite = np.isfinite(values)
    low, high = (float(values[finite].min()), float(values[finite].max())) if finite.any() else (0.0, 1.0)
    if image.dtype == torch.uint8:
        low, high = 0.0, 255.0
    elif low >= -0.01 and high <= 1.01:
        low, high = 0.0, 1.0
    values = np.where(finite, (values - low) / ((high - low) or 1.0), 0.5).clip(0.0, 1.0)
    if values.shape[0] != 3:
        values = np.broadcast_to(values.mean(0, keepdims=True), (3, *values.shape[1:]))
    return np.ascontiguousarray(values.transpose(1, 2, 0))


def overlay(
    image: Tensor,
    map: Tensor,
    *,
    signed: bool,
    alpha: float = 0.95,
    bounds: tuple[float, float] | None = None,
) -> Array:
    """Return a map as light on the desaturated, dimmed photo.

    The colour tells the value, `palette` between the bounds; opacity rises from 0 at zero, so that the photo shows
    where nothing was found. Pixels that are not finite are hatched in grey.

    Args:
        image: (C, H, W), see `photo`.
        map: (H, W), one number per pixel.
        signed: diverging colours, or sequential ones.
        alpha: opacity at the bounds, in [0, 1].
        bounds: (low, high) of the colours; `limits(map)` by default.

    Returns:
        (H, W, 3) in [0, 1].

    Raises:
        TypeError: `image` or `map` is no tensor.
        ValueError: another number of dimensions or size, or `alpha` outside [0, 1].
    """
    where = "pysal.viz.overlay"
    map = check_tensor(where, "map", map, ndim=2)
    image = check_tensor(where, "image", image, ndim=3)
    if image.shape[1:] != map.shape:
        refuse(where, "map", f"have the size of the image, {tuple(image.shape[1:])}", f"shape {tuple(map.shape)}")
    if not 0 <= alpha <= 1:
        refuse(where, "alpha", "be in [0, 1]", alpha)
    light = layer(map, signed=signed, bounds=bounds)
    behind = backdrop(image)[..., None]
    finite = torch.isfinite(map).cpu().numpy()
    opacity = np.where(finite, alpha * light[..., 3], 1.0)[..., None]
    return opacity * light[..., :3] + (1 - opacity) * behind


def backdrop(image: Tensor) -> Array:
    """Return the photo as `overlay` shows it under a map, grey and dim: (H, W) in [0, 1] for an image (C, H, W)."""
    return cast(Array, DIM[0] + DIM[1] * (photo(image) @ np.array([0.2126, 0.7152, 0.0722])))


def layer(map: Tensor, *, signed: bool, bounds: tuple[float, float] | None = None) -> Array:
    """Return the light that `overlay` puts on the backdrop, its opacity as fourth channel.

    Args:
        map: (H, W), one number per pixel. Pixels that are not finite are hatched in grey, opaque.
        signed: diverging colours, or sequential ones.
        bounds: (low, high) of the colours; `limits(map)` by default.

    Returns:
        (H, W, 4) in [0, 1], colours not multiplied by the opacity.

    Raises:
        TypeError: `map` is no tensor.
        ValueError: `map` is not 2-D.
    """
    values = _numpy(check_tensor("pysal.viz.layer", "map", map, ndim=2))
    finite = np.isfinite(values)
    colours, opacity = _colours(np.where(finite, values, 0.0), bounds or limits(map, signed=signed), signed)
    rows, columns = np.indices(values.shape)
    stripe = (rows + columns) // max(2, min(values.shape) // 50) % 2
    colours = np.where(finite[..., None], colours, np.where(stripe, 0.78, 0.45)[..., None])
    return np.concatenate([colours, np.where(finite, opacity, 1.0)[..., None]], -1)


def _colours(values: Array, bounds: tuple[float, float], signed: bool) -> tuple[Array, Array]:
    """Return colour (..., 3) and opacity (...) of values."""
    low, high = bounds
    size = max(-low, high)
    if size == 0:
        return np.zeros((*values.shape, 3)), np.zeros(values.shape)
    fraction = (values - low) / (high - low)
    index = np.rint(fraction.clip(0.0, 1.0) * 510).astype(np.int64)
    strength = np.abs(values / size) if signed else fraction
    return palette(signed)[index], strength.clip(0.0, 1.0) ** (0.45 if signed else 0.65)  # weak values stay visible


def _numpy(tensor: Tensor) -> Array:
    return cast(Array, tensor.detach().cpu().double().numpy())


# The panel -----------------------------------------------------------------------------------------------------------

INK, GREY, WARNING = "#1c1c1e", "#5c5f66", "#b3261e"
TILE, GAP, MARGIN = 2.3, 0.24, 0.26  # inches, as are all lengths below
HEADER, TITLE, BAR = 0.74, 0.42, 0.56
DPI = 160


@dataclass(frozen=True, eq=False)
class Panel:
    """One map of a picture.

    Attributes:
        title: the method's name.
        map: (C, H, W), unnormalised.
        reduction: see `reduce_channels`.
        signed: diverging or sequential colours.
        small_print: one line under the title.
        unit: what a value of the map means, "probability per pixel".
        labels: (H, W) segment of each pixel, or None.
        boxes: (S, 4) windows (top, left, bottom, right), half open, or None.
        drops: (S,) fall of the score when segment s is hidden, or None.
        score: the score on the clean image; the largest drops are labelled "before -> after" where it is given.
        percent: whether the score is a probability, shown in per cent.
    """

    title: str
    map: Tensor
    reduction: str
    signed: bool
    small_print: str = ""
    unit: str = ""
    labels: Tensor | None = None
    boxes: Tensor | None = None
    drops: Tensor | None = None
    score: float | None = None
    percent: bool = False


def draw(
    image: Tensor,
    panels: Sequence[Panel],
    *,
    title: str = "",
    subtitle: str = "",
    probability: float | None = None,
    percentile: float = PERCENTILE,
) -> Figure:
    """Return a figure: the photo, and every map on the dimmed photo with its name and its own colour bar.

    Args:
        image: (C, H, W), see `photo`.
        panels: the maps, in the order they are shown.
        title: what the image was taken for.
        subtitle: one line under the title.
        probability: of the target, in [0, 1]; drawn as a bar under the photo.
        percentile: of |map| inside the colour limits, see `limits`; stated under each colour bar.

    Returns:
        A figure with an Agg canvas, on white, not known to pyplot.

    Raises:
        TypeError, ValueError: see `reduce_channels`, `limits` and `overlay`.
    """
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
            _map_tile(page, image, panel, left, top, tall, percentile)
    return page.figure


class Page:
    """A figure on white, unknown to pyplot, addressed in inches from its top left corner."""

    def __init__(self, size: tuple[float, float]) -> None:
        self.size = size
        self.figure = Figure(figsize=size, dpi=DPI, facecolor="white")
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


FAMILY = "DejaVu Sans"  # comes with matplotlib: the same picture on every machine


@cache
def _glyphs() -> frozenset[int]:
    return frozenset(get_font(findfont(FontProperties(family=FAMILY))).get_charmap())


def printable(text: str) -> str:
    """Return one line that the font of the pictures can draw: blanks merged, unknown characters as white squares."""
    return "".join(c if ord(c) in _glyphs() else "□" for c in " ".join(text.split()))


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


def _map_tile(page: Page, image: Tensor, panel: Panel, left: float, top: float, tall: float, percentile: float) -> None:
    map = reduce_channels(panel.map, panel.reduction)
    bounds = limits(map, percentile, signed=panel.signed)
    page.text(panel.title, left, top + 0.17, 9.5, weight="bold", room=TILE)
    finite = torch.isfinite(map)
    warning = "" if finite.all() else f"{int((~finite).sum())} of {map.numel()} pixels not finite"
    used = page.text(warning, left, top + 0.33, 7, WARNING, weight="bold", room=TILE)
    indent = used + 0.08 if used else 0.0
    page.text(panel.small_print, left + indent, top + 0.33, 7, GREY, room=TILE - indent)
    axes = _picture(page, overlay(image, map, signed=panel.signed, bounds=bounds), left, top, tall)
    _segments(page, axes, panel, map.shape)
    empty = "zero everywhere" if finite.any() else "no finite value"
    _colour_bar(page, panel, bounds, left, top + TITLE + tall, percentile, empty)


def _colour_bar(
    page: Page, panel: Panel, bounds: tuple[float, float], left: float, under: float, percentile: float, empty: str
) -> None:
    low, high = bounds
    ramp = np.linspace(low, high, 512)[None]
    colours, opacity = _colours(ramp, bounds, panel.signed)
    backdrop = DIM[0] + 0.5 * DIM[1]  # middle grey of the photo, so that the bar has the colours of the picture
    bar = backdrop + 0.95 * opacity[..., None] * (colours - backdrop)
    page.axes(left, under + 0.08, TILE, 0.09).imshow(bar, aspect="auto", interpolation="nearest")
    if low == high:
        page.text(empty, left, under + 0.29, 6.5, GREY)
        return
    page.text(number(low), left, under + 0.29, 6.5)
    if low < 0 < high:
        page.text("0", left + TILE * -low / (high - low), under + 0.29, 6.5, align="center")
    page.text(number(high), left + TILE, under + 0.29, 6.5, align="right")
    share = f"limits: {percentile:g} % of |map|"
    page.text(panel.unit, left, under + 0.43, 6.5, GREY, room=TILE - page.width(share, 6.5) - 0.1)
    page.text(share, left + TILE, under + 0.43, 6.5, GREY, align="right")


# Segments ------------------------------------------------------------------------------------------------------------

LABELLED, LABEL = 3, 6.5  # how many drops are written on the picture, and how large (points)
Mask = NDArray[np.bool_]
Line = tuple[tuple[float, float], tuple[float, float]]


def _segments(page: Page, axes: Axes, panel: Panel, shape: Sequence[int]) -> None:
    """Draw the segment borders, and the largest drops as "95 % → 67 %"."""
    if panel.labels is not None:
        labels = panel.labels.detach().cpu().numpy()
        axes.add_collection(LineCollection(borders(labels), colors=(1, 1, 1, 0.3), linewidths=0.5))
    elif panel.boxes is not None and _tile(panel.boxes, shape):
        axes.add_collection(LineCollection(_outlines(panel.boxes), colors=(1, 1, 1, 0.3), linewidths=0.5))
    if panel.drops is None or panel.score is None:
        return
    drops = _numpy(panel.drops)
    named: list[tuple[str, Mask]] = []
    for segment in np.argsort(np.where(np.isfinite(drops), -drops, np.inf), kind="stable").tolist():
        text = fall(panel.score, float(drops[segment]), panel.percent)
        if text is None or len(named) == LABELLED:
            break
        mask = segment_mask(panel, segment, shape)
        if mask is not None and mask.any():
            named.append((text, mask))
    taken: list[Bbox] = []
    for text, mask in named:
        outline = borders(np.pad(mask, 1), offset=1)
        axes.add_collection(LineCollection(outline, colors="white", linewidths=1.1, capstyle="round"))
        others = np.any([other for _, other in named if other is not mask] or [np.zeros_like(mask)], axis=0)
        taken.append(_label(page, axes, text, mask, others, taken))


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


def _label(page: Page, axes: Axes, text: str, mask: Mask, others: Mask, taken: Sequence[Bbox]) -> Bbox:
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
        axes.plot([x, centre[0]], [y, centre[1]], color="white", linewidth=0.9)
        axes.plot([x], [y], color="white", marker="o", markersize=2.4)
    font = FontProperties(family=FAMILY, size=LABEL, weight="bold")
    label = Text(*centre, text, color="white", fontproperties=font, parse_math=False, usetex=False, zorder=5)
    label.set(horizontalalignment="center", verticalalignment="center_baseline")
    label.set_bbox({"boxstyle": "round,pad=0.25", "facecolor": (0, 0, 0, 0.8), "edgecolor": "none"})
    axes.add_artist(label)
    return at


# Words for numbers ---------------------------------------------------------------------------------------------------


MINUS = "\N{MINUS SIGN}"


def number(value: float) -> str:
    """Return a number in two or three digits: "0.31", "−4.2·10⁻⁵"."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}".replace("-", MINUS) if value else "0"
    rounded = float(f"{value:.2e}")
    if 1e-3 <= abs(rounded) < 1e4:
        digits = max(2 - math.floor(math.log10(abs(rounded))), 0)
        text = f"{rounded:.{digits}f}"
        return (text.rstrip("0").rstrip(".") if digits else text).replace("-", MINUS)
    mantissa, power = f"{value:.1e}".split("e")
    superscript = str(int(power)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{mantissa}·10{superscript}".replace("-", MINUS)


def percent(probability: float, digits: int | None = None) -> str:
    """Return a probability in per cent with as many digits as tell it from 0 and 100: "67 %", "99.2 %", "0.03 %"."""
    if digits is None:
        digits = _digits(probability)
        if digits > 4:
            return "<0.0001 %" if probability < 0.5 else ">99.9999 %"
    return f"{100 * probability:.{digits}f} %"


def _digits(probability: float) -> int:
    edge = 100 * min(probability, 1 - probability)
    if edge >= 5 or not edge > 0:
        return 0
    return max(-math.floor(math.log10(edge)), 1)


def fall(score: float, drop: float, as_percent: bool) -> str | None:
    """Return "95 % → 67 %" (or "8.31 → 6.02"), None where nothing visible fell."""
    return None if not drop > 0 else change(score, score - drop, as_percent)


def change(before: float, after: float, as_percent: bool) -> str | None:
    """Return "95 % → 67 %" (or "8.31 → 6.02"), None where no change is visible."""
    if not (math.isfinite(before) and math.isfinite(after)):
        return None
    old, new = number(before), number(after)
    if as_percent:
        digits = max(_digits(before), _digits(after))
        same = digits if digits <= 1 or 1e-4 < abs(before - after) < 0.05 else None  # as many on both sides, within reason
        old, new = percent(before, same), percent(after, same)
    return None if old == new else f"{old} → {new}"
