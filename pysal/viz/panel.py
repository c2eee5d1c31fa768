"""One map of a picture, and what is said about it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


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
