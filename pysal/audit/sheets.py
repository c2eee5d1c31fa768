"""The contact sheets of a report: photos of an audit with their maps, chosen by a figure."""

import base64
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pysal.audit.results import Figure, Results
from pysal.audit.words import percent, signed
from pysal.methods.traits import stores_drops
from pysal.viz import overlay, photo

THUMBNAIL = 208  # pixels of the longer side
QUALITY = 82  # of JPEG: a photo and its overlay take about 20 kB


@dataclass(frozen=True)
class Tile:
    """A photo on a contact sheet.

    Attributes:
        path: of the image.
        caption: what to say of it, a line each.
        pictures: data URI ("" where there is none), what it shows, and the figure of the map or "".
    """

    path: str
    caption: list[str]
    pictures: list[tuple[str, str, str]]


class Sheets:
    """Chooses images of an audit and makes tiles of them.

    Args:
        results: of the audit.
        first: the figure that images are ranked by, if there is one.
        most: tiles on one sheet.

    Attributes:
        missing_photos: the images whose photos are gone.
    """

    def __init__(self, results: Results, first: Figure | None, most: int) -> None:
        self._results, self._first, self._most = results, first, most
        self._photos: dict[int, Tensor | None] = {}
        self._maps: dict[tuple[str, int], Tensor] = {}
        self.missing_photos: set[int] = set()

    def best_and_worst(self) -> list[dict[str, Any]]:
        """Return the best and the worst images of each method."""
        found: list[dict[str, Any]] = []
        if self._first is None:
            return found
        for method, rows in self._results.rows.items():
            values = self._first.sign * rows.columns[self._first.name]
            known = np.flatnonzero(np.isfinite(values))
            most = min(self._most, len(known) // 2)
            if not most:
                continue
            ordered = known[np.argsort(-values[known], kind="stable")]
            best, worst = ordered[:most], ordered[::-1][:most]
            self._load_maps(method, rows.ids[np.concatenate([best, worst])].tolist())
            found.append(
                {
                    "title": self._results.methods[method]["title"],
                    "best": [self._ranked(method, int(row)) for row in best],
                    "worst": [self._ranked(method, int(row)) for row in worst],
                }
            )
        return found

    def _ranked(self, method: str, row: int) -> Tile:
        rows = self._results.rows[method]
        assert self._first is not None
        image = int(rows.ids[row])
        value = rows.columns[self._first.name][row]
        caption = [f"{self._first.title} {signed(value)}", self._answer(rows.columns, row)]
        return self._tile(image, caption, [method])

    def disputed(self, ids: np.ndarray[Any, Any], values: np.ndarray[Any, Any]) -> list[Tile]:
        """Return the images on which methods differ most in the first figure.

        Args:
            ids: (N,) of the images that every method explained.
            values: (N, methods), the figure, of which more is better.
        """
        assert self._first is not None  # by which `values` are
        spread = values.max(1) - values.min(1)
        ordered = np.argsort(-spread, kind="stable")[: self._most]
        names = list(self._results.rows)
        for method in names:
            self._load_maps(method, ids[ordered].tolist())
        found = []
        for place in ordered.tolist():
            image = int(ids[place])
            row = int(np.searchsorted(self._results.images.ids, image))
            own = {name: signed(self._first.sign * values[place, n]) for n, name in enumerate(names)}
            found.append(self._tile(image, [self._answer(self._results.images.columns, row)], names, own))
        return found

    def wrong(self) -> dict[str, Any]:
        """Return the wrong predictions, the surest first, with the overlay of the method that ranks highest."""
        images = self._results.images
        label, predicted = images.columns["label"], images.columns["predicted"]
        sure = images.columns["predicted_probability"]
        wrong = np.flatnonzero(np.isfinite(label) & np.isfinite(predicted) & (label != predicted))
        ordered = wrong[np.argsort(-np.nan_to_num(sure[wrong], nan=-1.0), kind="stable")][: 2 * self._most]
        method = self._shown_method()
        if method is not None:
            self._load_maps(method, images.ids[ordered].tolist())
        tiles = []
        for row in ordered.tolist():
            caption = [
                f"taken for {self._results.class_name(predicted[row])} ({percent(sure[row])})",
                f"is {self._results.class_name(label[row])}",
            ]
            tiles.append(self._tile(int(images.ids[row]), caption, [method] if method is not None else []))
        title = self._results.methods[method]["title"] if method is not None else None
        return {"images": len(wrong), "tiles": tiles, "method": title, "target": self._results.manifest["target"]}

    def _shown_method(self) -> str | None:
        """Return the method with maps whose first figure has the best median."""
        kept = [name for name in self._results.rows if self.has_maps(name)]
        if self._first is None or not kept:
            return kept[0] if kept else None

        def rank(name: str) -> float:
            assert self._first is not None
            values = finite(self._results.rows[name].columns[self._first.name])
            return self._first.sign * float(np.median(values)) if len(values) else -np.inf

        return max(kept, key=rank)

    def has_maps(self, method: str) -> bool:
        """Say whether maps of a method are stored."""
        manifest = self._results.manifest
        if stores_drops(method):
            return bool(manifest["boxes"]) or manifest["maps"] != "none"
        return bool(manifest["maps"] != "none")

    def _answer(self, columns: Mapping[str, Any], row: int) -> str:
        """Return what the class explained is, how sure the model is of it, and whether it is right."""
        target, label = columns["target"][row], columns["label"][row]
        if not np.isfinite(target):  # no class: a box, a mask, a text
            return f"{self._results.manifest['target']} {signed(columns['score'][row])}"
        sure = columns["probability"][row]
        text = self._results.class_name(target) + (f" {percent(sure)}" if np.isfinite(sure) else "")
        if np.isfinite(label) and label != target:
            return f"{text}, labelled {self._results.class_name(label)}"
        return text

    def _tile(self, image: int, caption: list[str], methods: Sequence[str], notes: Mapping[str, str] | None = None) -> Tile:
        seen = self._photo(image)
        pictures = []
        if seen is not None:
            pictures.append((_picture(photo(seen)), "photo", ""))
        for method in methods:
            title, value = self._results.methods[method]["title"], notes[method] if notes else ""
            map = self._maps.get((method, image))
            if map is not None:
                behind = seen if seen is not None else torch.full((3, *map.shape), 0.2, device="cpu")
                light = _averaged(map)
                shown = overlay(behind, light, signed=self._results.methods[method]["signed"])
                pictures.append((_picture(shown), title, value))
            elif notes:
                pictures.append(("", title, value))
        return Tile(self._results.path(image), caption, pictures)

    def _photo(self, image: int) -> Tensor | None:
        if image not in self._photos:
            self._photos[image] = self._results.photo(image)
            if self._photos[image] is None:
                self.missing_photos.add(image)
        return self._photos[image]

    def _load_maps(self, method: str, images: Iterable[int]) -> None:
        missing = [image for image in images if (method, image) not in self._maps]
        self._maps |= {(method, image): map for image, map in self._results.maps(method, missing).items()}


def finite(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the values that are finite."""
    kept: np.ndarray[Any, Any] = values[np.isfinite(values)]
    return kept


def _averaged(map: Tensor) -> Tensor:
    """Return a map (H, W) as the means of small squares, all that a thumbnail can show where every pixel is different."""
    size = tuple(min(length, math.ceil(length * THUMBNAIL / (2 * max(map.shape)))) for length in map.shape)
    small = torch.nn.functional.interpolate(map[None, None], size, mode="area")
    return torch.nn.functional.interpolate(small, tuple(map.shape), mode="bilinear", align_corners=False)[0, 0]


def _picture(pixels: np.ndarray[Any, Any]) -> str:
    """Return colours (H, W, 3) in [0, 1] as a small JPEG in a data URI."""
    image = Image.fromarray((pixels * 255 + 0.5).astype(np.uint8))
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
