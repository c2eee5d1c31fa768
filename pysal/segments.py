"""Ways to cut an image into segments for leave-one-out."""

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from pysal._checks import check_count, check_dense, check_number, refuse
from pysal._interrupts import held_back

__all__ = ["Grid", "Slic", "Window", "parse"]


@dataclass(frozen=True)
class Boxes:
    """The same boxes (S, 4) for every image: top, left, bottom, right, half open, int32; they may overlap."""

    boxes: Tensor

    @functools.cached_property
    def on_host(self) -> Any:
        """The boxes in NumPy, int64: copied once, however many images are looked at."""
        return self.boxes.cpu().numpy().astype(np.int64)


@dataclass(frozen=True)
class Labels:
    """A label map of each image (B, H, W), int32: pixel of segment s has label s; counts[b] segments in image b.

    Pixels with a negative label belong to no segment.
    """

    labels: Tensor
    counts: tuple[int, ...]

    @functools.cached_property
    def on_host(self) -> Any:
        """The label maps in NumPy: copied once, however many images are looked at."""
        return self.labels.cpu().numpy()


@dataclass(frozen=True)
class Grid:
    """A grid of `rows` x `cols` boxes of (nearly) equal size.

    Raises:
        ValueError: fewer than one row or column.
    """

    rows: int
    cols: int

    def __post_init__(self) -> None:
        check_count("pysal.segments.Grid", "rows", self.rows)
        check_count("pysal.segments.Grid", "cols", self.cols)

    def cut(self, images: Tensor) -> Boxes:
        """Return the boxes for images (B, C, H, W)."""
        height, width = images.shape[2:]
        if self.rows > height or self.cols > width:
            refuse(
                "pysal.segments.Grid",
                "rows and cols",
                f"be at most {height} x {width} pixels",
                f"{self.rows} x {self.cols}",
            )
        tops = [i * height // self.rows for i in range(self.rows + 1)]
        lefts = [i * width // self.cols for i in range(self.cols + 1)]
        boxes = [(tops[i], lefts[j], tops[i + 1], lefts[j + 1]) for i in range(self.rows) for j in range(self.cols)]
        return Boxes(torch.tensor(boxes, dtype=torch.int32, device=images.device))


@dataclass(frozen=True)
class Window:
    """A sliding window; the last one of a row or column is cut at the border.

    Args:
        size: side in pixels, or (height, width).
        stride: step in pixels, or (down, right); None = the size, so that windows tile the image.

    Raises:
        ValueError: a size or stride below 1, or a stride above the size, which would leave pixels uncovered.
    """

    size: int | tuple[int, int]
    stride: int | tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for name, value in (("size", self.size), ("stride", self.stride)):
            if isinstance(value, list) or (isinstance(value, tuple) and len(value) != 2):
                refuse("pysal.segments.Window", name, "be one number of pixels or a tuple of two", value)
        for size, stride in zip(self.sizes, self.strides, strict=True):
            check_count("pysal.segments.Window", "size", size)
            check_count("pysal.segments.Window", "stride", stride)
            if stride > size:
                refuse("pysal.segments.Window", "stride", f"be at most the size {size}", stride)

    @property
    def sizes(self) -> tuple[int, int]:
        """Height and width."""
        return self.size if isinstance(self.size, tuple) else (self.size, self.size)

    @property
    def strides(self) -> tuple[int, int]:
        """Step down and to the right."""
        stride = self.size if self.stride is None else self.stride
        return stride if isinstance(stride, tuple) else (stride, stride)

    def cut(self, images: Tensor) -> Boxes:
        """Return the boxes for images (B, C, H, W), row by row."""
        extent = tuple(images.shape[2:])
        starts = [range(0, max(extent[i] - self.sizes[i] + self.strides[i], 1), self.strides[i]) for i in range(2)]
        boxes = [
            (top, left, min(top + self.sizes[0], extent[0]), min(left + self.sizes[1], extent[1]))
            for top in starts[0]
            for left in starts[1]
        ]
        return Boxes(torch.tensor(boxes, dtype=torch.int32, device=images.device))


@dataclass(frozen=True)
class Slic:
    """Superpixels of each image by SLIC; images may have different numbers of them.

    Args:
        n_segments: approximate number of segments.
        compactness: weight of distance in space against distance in colour. Colour is measured so that the ends of an image's
            range of values are about 100 apart, as black and white are in Lab.
        sigma: width of the Gaussian that smooths the image first, in pixels.

    Source:
        Achanta et al. 2012, "SLIC superpixels compared to state-of-the-art superpixel methods"; scikit-image's implementation.
    """

    n_segments: int = 100
    compactness: float = 10.0
    sigma: float = 1.0

    def __post_init__(self) -> None:
        check_count("pysal.segments.Slic", "n_segments", self.n_segments)
        check_number("pysal.segments.Slic", "compactness", self.compactness, above=True)
        check_number("pysal.segments.Slic", "sigma", self.sigma)

    def cut(self, images: Tensor) -> Labels:
        """Return the label maps for images (B, C, H, W), whatever their range of values and their number of channels."""
        with held_back():
            from skimage.segmentation import slic

        maps = []
        for image in images.detach().cpu().double().numpy():
            pixels, black_to_white = _colours(image)
            maps.append(
                slic(
                    pixels,
                    n_segments=self.n_segments,
                    compactness=self.compactness * black_to_white / LAB_BLACK_TO_WHITE,
                    sigma=self.sigma,
                    start_label=0,
                    channel_axis=-1,
                )
            )
        return relabelled("pysal.segments.Slic", maps, images)


# How far white is from black in Lab, the unit that compactness is said in.
LAB_BLACK_TO_WHITE = 100.0


def _colours(image: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], float]:
    """Return an image (C, H, W) as pixels (H, W, D) in [0, 1], and how far its two ends of colour will be apart.

    Three channels are colours, and one is grey: scikit-image measures distances between those in Lab, where white is 100
    from black. What other channels are nobody knows. Each is brought to [0, 1], for their units may differ, and the image's
    extent along the direction in which it varies most is taken for black to white.
    """
    low, high = image.min(), image.max()
    if len(image) in (1, 3):
        pixels = (image - low) / (high - low) if high > low else np.zeros_like(image)
        return np.broadcast_to(pixels, (3, *image.shape[1:])).transpose(1, 2, 0), LAB_BLACK_TO_WHITE
    lows, highs = image.min((1, 2), keepdims=True), image.max((1, 2), keepdims=True)
    stretched = (image - lows) / np.where(highs > lows, highs - lows, 1.0)
    flat = stretched.reshape(len(image), -1)
    direction = np.linalg.eigh(np.cov(flat))[1][:, -1]
    along = direction @ flat
    return stretched.transpose(1, 2, 0), float(along.max() - along.min()) or 1.0


Segments: TypeAlias = Grid | Window | Slic | Tensor | np.ndarray[Any, Any] | Sequence[Any]


def cut(where: str, segments: Segments, images: Tensor) -> Boxes | Labels:
    """Return the segments of images (B, C, H, W).

    Args:
        where: the public name of the method, for errors.
        segments: a Grid, Window or Slic, a label map (H, W) for all images, or one per image (B, H, W) or a list of them.
        images: (B, C, H, W).
    """
    if isinstance(segments, (Grid, Window, Slic)):
        return segments.cut(images)
    if isinstance(segments, (Tensor, np.ndarray)):
        maps: Sequence[Any] = list(segments) if segments.ndim == 3 else [segments]
    elif isinstance(segments, Sequence) and not isinstance(segments, (str, bytes)):
        maps = segments
    else:
        requirement = "be a Grid, Window, Slic or a map of whole-number labels"
        refuse(where, "segments", requirement, repr(segments), TypeError)
    if len(maps) == 1:
        maps = [maps[0]] * len(images)
    if len(maps) != len(images):
        refuse(where, "segments", f"be one label map or one for each of {len(images)} images", len(maps))
    return relabelled(where, maps, images)


def relabelled(where: str, maps: Sequence[Any], images: Tensor) -> Labels:
    """Number the labels of each map 0, 1, ... in their own order; negative ones stay outside."""
    shape = tuple(images.shape[2:])
    labels, counts = [], []
    for found in maps:
        if isinstance(found, Tensor):
            found = check_dense(where, "segments", found).detach().cpu()
        array = np.asarray(found)
        if not np.issubdtype(array.dtype, np.integer):
            refuse(where, "segments", "hold whole-number labels", array.dtype, TypeError)
        if array.shape != shape:
            refuse(where, "segments", f"have the images' height and width {shape}", array.shape)
        distinct, numbered = np.unique(array, return_inverse=True)
        outside = int((distinct < 0).sum())
        if len(distinct) == outside:
            refuse(where, "segments", "have at least one label of 0 or more", "only negative labels")
        labels.append(numbered.reshape(shape).astype(np.int32) - outside)
        counts.append(len(distinct) - outside)
    stacked = torch.from_numpy(np.stack(labels)).to(images.device)
    return Labels(stacked.clamp_min(-1), tuple(counts))


def parse(specification: str) -> Grid | Window | Slic:
    """Return the segments a short text stands for: `grid:3x3`, `window:16/8`, `window:16`, `slic:100`.

    Raises:
        TypeError: no text.
        ValueError: none of these.

    Example:
        >>> parse("window:16/8")
        Window(size=16, stride=8)
    """
    if not isinstance(specification, str):
        refuse("pysal", "segments", "be like grid:3x3, window:16/8 or slic:100", repr(specification), TypeError)
    if match := re.fullmatch(r"grid:(\d{1,9})x(\d{1,9})", specification, re.ASCII):
        return Grid(int(match[1]), int(match[2]))
    if match := re.fullmatch(r"window:(\d{1,9})(?:/(\d{1,9}))?", specification, re.ASCII):
        return Window(int(match[1]), int(match[2]) if match[2] else None)
    if match := re.fullmatch(r"slic:(\d{1,9})", specification, re.ASCII):
        return Slic(int(match[1]))
    refuse("pysal", "segments", "be like grid:3x3, window:16/8 or slic:100", repr(specification))
