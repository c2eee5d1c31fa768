"""How a map is drawn: what is shown of it, how fine, in which colours; and the numbers that are drawn then."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from pysal import ops
from pysal._checks import check_choice, check_tensor, refuse
from pysal.viz.colours import PERCENTILE, Colours, check_colours, limits, reduce_channels
from pysal.viz.panel import Panel

Shown = Literal["signed", "magnitude"]
CELLS_ACROSS = 28
"""Cells along the shorter side of an additive map: as many as a tile of a picture shows apart."""


@dataclass(frozen=True)
class Style:
    """How maps are drawn. The defaults show each map as its method means it.

    Attributes:
        view: "signed", what speaks for and against (the channels' sum), or "magnitude", how much there is of either (the sum
            of |value| over the channels, PAIR's way); None = as the method means it.
        cells: side of the squares, in pixels, over which a map is summed. 1 shows every pixel. None = for maps whose values
            are shares of the score, 1/28 of the shorter side of the image; for other maps 1.
        smooth: width sigma, in pixels, of a Gaussian that is used in place of cells. None = none.
        percentile: of |value| inside the colour limits, in (0, 100].
        colours: a matplotlib colour map, or its name; None = pysal's own.
        photo: whether the photo lies below the map.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a value out of its range, `cells` together with `smooth`, or an unknown view or colour map.
    """

    view: Shown | None = None
    cells: int | None = None
    smooth: float | None = None
    percentile: float = PERCENTILE
    colours: Colours | None = None
    photo: bool = True

    def checked(self, where: str) -> Style:
        """Return the style, refusing in the name of `where` what cannot be drawn; numbers of NumPy become Python's."""
        plain = {name: value.item() for name, value in vars(self).items() if isinstance(value, np.generic)}
        if plain:
            return replace(self, **plain).checked(where)
        if self.view is not None:
            check_choice(where, "view", self.view, get_args(Shown))
        if self.cells is not None:
            _check_cells(where, self.cells)
        if self.smooth is not None:
            if isinstance(self.smooth, bool) or not isinstance(self.smooth, (int, float)):
                refuse(where, "smooth", "be a number of pixels", type(self.smooth).__name__, TypeError)
            if not 0 < self.smooth < math.inf:
                refuse(where, "smooth", "be a finite number of pixels above 0", self.smooth)
            if self.cells is not None:
                refuse(where, "smooth", "be left out where cells are given", self.smooth)
        if isinstance(self.percentile, bool) or not isinstance(self.percentile, (int, float)):
            refuse(where, "percentile", "be a number in (0, 100]", type(self.percentile).__name__, TypeError)
        if not 0 < self.percentile <= 100:
            refuse(where, "percentile", "be in (0, 100]", self.percentile)
        check_colours(where, self.colours)
        if not isinstance(self.photo, bool):
            refuse(where, "photo", "be True or False", type(self.photo).__name__, TypeError)
        return self


@dataclass(frozen=True, eq=False)
class Seen:
    """The numbers of a map that are drawn.

    Attributes:
        map: (H, W), one number per pixel; all pixels of a cell have the cell's.
        values: the same once for each cell.
        signed: diverging or sequential colours.
        bounds: the numbers that get the outermost colours.
        unit: what a number means.
    """

    map: Tensor
    values: Tensor
    signed: bool
    bounds: tuple[float, float]
    unit: str


def seen(panel: Panel, style: Style | None = None) -> Seen:
    """Return the numbers that are drawn of a panel's map, by default as its method means it."""
    style = style or Style()
    coarse = panel.reduction == "none"  # of segments or of a layer, which has nothing finer to sum or to smooth
    additive = panel.reduction == "sum"
    signed = panel.signed if style.view is None else style.view == "signed"
    reduction = panel.reduction
    if style.view is not None and not coarse:
        reduction = "sum" if signed else "sum_abs"
    map = reduce_channels(panel.map, reduction)
    if coarse and not signed and panel.signed:
        map = map.abs()
    unit = panel.unit
    if signed and not panel.signed:
        unit = unit.strip("|")
    elif panel.signed and not signed and unit:
        unit = f"|{unit}|"
    values = map = map.detach().cpu().double()
    if not coarse and style.smooth is not None:
        values = map = _smoothed(map, style.smooth)
        unit = f"{unit}, smoothed" if unit else ""
    elif not coarse:
        side = style.cells or (cells_of(map.shape) if additive else 1)
        if side > 1:
            values = pooled(map, side)
            map = values.repeat_interleave(side, 0).repeat_interleave(side, 1)[: map.shape[0], : map.shape[1]]
            cell = f"per {side} x {side} cell"
            unit = unit.replace("per pixel", cell) if "per pixel" in unit else f"{unit} {cell}".strip()
    return Seen(map, values, signed, limits(values, style.percentile, signed=signed), unit)


def cells_of(shape: tuple[int, ...] | torch.Size) -> int:
    """Return the side of the cells that an additive map (H, W) is drawn in by default, in pixels."""
    return max(1, round(min(shape) / CELLS_ACROSS))


def pooled(map: Tensor, cells: int) -> Tensor:
    """Return the sums of a map over square cells.

    The sums are exact: those of Integrated Gradients' map still add up to the change of the score. Cells at the right and the
    lower edge are smaller where the side does not divide the map's.

    Args:
        map: (..., H, W), any real dtype.
        cells: side of a cell in pixels, 1 or more.

    Returns:
        (..., ceil(H / cells), ceil(W / cells)), float64, on the map's device. A value that is not finite spoils its cell only.

    Raises:
        TypeError: `map` is no tensor, or `cells` no whole number.
        ValueError: `map` has fewer than 2 dimensions, or `cells` is below 1.

    Example:
        >>> pooled(torch.ones(3, 4), 2).tolist()
        [[4.0, 4.0], [2.0, 2.0]]
    """
    where = "pysal.viz.pooled"
    map = check_tensor(where, "map", map)
    if map.ndim < 2:
        refuse(where, "map", "have at least 2 dimensions (H, W)", f"shape {tuple(map.shape)}")
    _check_cells(where, cells)
    height, width = map.shape[-2:]
    whole = torch.nn.functional.pad(map.detach().double(), (0, -width % cells, 0, -height % cells))
    *batch, tall, wide = whole.shape
    return whole.reshape(*batch, tall // cells, cells, wide // cells, cells).sum((-3, -1))


def _smoothed(map: Tensor, sigma: float) -> Tensor:
    """Return a map blurred by a Gaussian; what is not finite counts as zero for its neighbours and stays what it is."""
    finite = torch.isfinite(map)
    blurred = ops.gaussian_scale_space(torch.where(finite, map, 0.0)[None, None], [float(sigma)], boundary="reflect")
    return torch.where(finite, blurred.reshape(map.shape), map)


def _check_cells(where: str, cells: object) -> None:
    if isinstance(cells, bool) or not isinstance(cells, int):
        refuse(where, "cells", "be a whole number of pixels", type(cells).__name__, TypeError)
    if cells < 1:
        refuse(where, "cells", "be 1 or more", cells)
