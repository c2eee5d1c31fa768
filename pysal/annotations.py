"""Boxes and masks that people have drawn, as masks of what the model sees: PASCAL VOC's XML, COCO's JSON, masks as PNG."""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn
from xml.etree import ElementTree
from xml.parsers import expat

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from skimage.draw import polygon
from torch import Tensor

from pysal._checks import first_line, refuse
from pysal._folders import files_below
from pysal.models.classifier import Classifier
from pysal.models.photos import Source, read_image, size_of_photo

__all__ = ["Annotations", "read"]

_READ = "pysal.annotations.read"
_MASK = "pysal.annotations.Annotations.mask"
Mask = NDArray[np.bool_]
Pair = tuple[int, int]

# No file of boxes of one photo is larger; one of all photos may be, and is read by Python's own JSON.
LARGEST_XML = 2**24
# What VOC writes at the borders of objects in its masks of palette colours: neither object nor background.
VOID = 255
# No photo has as many pixels a side, so a coordinate beyond it is a mistake.
FARTHEST = 2**31


@dataclass(frozen=True)
class _Object:
    """One object of a photo, in pixels from its left and upper edge.

    Attributes:
        label: the class, as the file says it.
        box: left, top, right, bottom.
        outlines: polygons (x, y, x, y, ...), of which the object is the union.
        runs: lengths of pixels outside and inside by turns, column after column, and the size (height, width) they are for.
    """

    label: str
    box: tuple[float, float, float, float] | None = None
    outlines: tuple[tuple[float, ...], ...] = ()
    runs: tuple[tuple[int, ...], Pair] | None = None


@dataclass(frozen=True)
class _Entry:
    """What is known of one photo: a mask's file, or its size where that was written down, and its objects."""

    file: Path
    size: Pair | None = None
    objects: tuple[_Object, ...] | None = None


@dataclass(frozen=True)
class Annotations:
    """The objects of photos, found by the names of the photos.

    Attributes:
        source: the file or folder they were read from.
        kind: "voc", "coco" or "masks".
    """

    source: Path
    kind: str
    _entries: Mapping[str, _Entry] = field(repr=False)
    _by_stem: Mapping[str, list[str]] = field(repr=False)

    @property
    def names(self) -> list[str]:
        """Of the photos, without their endings, as paths with slashes."""
        return list(self._entries)

    def has(self, photo: str | Path) -> bool:
        """Return whether there is an annotation of a photo of this name."""
        _check_path("has", photo)
        return self._find(photo) is not None

    def holds(self, file: str | Path) -> bool:
        """Return whether a file is one of these annotations, as a mask beside the photos is, and so no photo."""
        _check_path("holds", file, "file")
        return os.path.realpath(file) in self._files

    @cached_property
    def _files(self) -> frozenset[str]:
        return frozenset(os.path.realpath(entry.file) for entry in self._entries.values())

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what the files of these annotations hold, so that a changed one is noticed."""
        digest = hashlib.sha256()
        for file in sorted({entry.file for entry in self._entries.values()}):
            try:
                content = hashlib.sha256(file.read_bytes()).hexdigest()
            except OSError:  # refused where its mask is asked for
                content = "cannot be read"
            digest.update(repr((file.name, content)).encode())
        return digest.hexdigest()

    def mask(
        self,
        photo: str | Path,
        model: Classifier | None = None,
        *,
        label: str | None = None,
        size: int | tuple[int, int] | None = None,
        content: Source | None = None,
    ) -> Tensor | None:
        """Return the object as the model sees it, cropped and resized with the photo.

        Args:
            photo: the photo's file, whose name finds the annotation: `a/b.jpg` that of `a/b` or of `b`.
            model: the classifier that the photo is read for, as in `pysal.read_image`.
            label: a class. Where objects of just this name are there (in any case), they alone are meant, else all objects.
            size: as in `pysal.read_image`.
            content: the photo itself, where it is not in that file.

        Returns:
            (1, H, W), bool; None where there is no annotation of this photo, or no object in it.

        Raises:
            TypeError: a photo that is no path, or a label that is no text.
            ValueError: the mask cannot be read, or has another size than the photo.
        """
        _check_path("mask", photo)
        if label is not None and not isinstance(label, str):
            refuse(_MASK, "label", "be the name of a class, or None", repr(label), TypeError)
        found = self._find(photo)
        if found is None:
            return None
        entry = self._entries[found]
        shape = size_of_photo(Path(photo) if content is None else content)
        whole = _mask_of_file(entry.file) if entry.objects is None else None
        known = entry.size if whole is None else (whole.shape[0], whole.shape[1])
        if known is not None and known != shape:
            requirement = f"have the size of {photo}, {shape[0]} x {shape[1]} (height x width)"
            refuse(_MASK, "photo's annotation", requirement, f"{known[0]} x {known[1]} in {entry.file}")
        if whole is None:
            assert entry.objects is not None
            meant = [one for one in entry.objects if label is not None and one.label.casefold() == label.casefold()]
            whole = np.zeros(shape, dtype=bool)
            for one in meant or entry.objects:
                _draw(one, whole, entry.file)
        if not whole.any():
            return None
        seen = read_image(np.where(whole, np.uint8(255), np.uint8(0)), model, size=size, channels=1)
        return seen[:, 0] >= 0.5

    def _find(self, photo: str | Path) -> str | None:
        parts = Path(photo).with_suffix("").parts
        candidates = [name for name in self._by_stem.get(parts[-1] if parts else "", []) if _same_end(parts, name.split("/"))]
        if len(candidates) > 1:
            longest = max(_common(parts, name.split("/")) for name in candidates)
            candidates = [name for name in candidates if _common(parts, name.split("/")) == longest]
        if len(candidates) > 1:
            shown = " and ".join(str(self._entries[name].file) for name in candidates[:2])
            refuse(_MASK, "photo", "have one annotation", f"{photo} with {shown}")
        return candidates[0] if candidates else None


def read(source: str | Path) -> Annotations:
    """Return the boxes or masks of photos.

    Args:
        source: a COCO file (.json); a PASCAL VOC file (.xml) or a folder of them; or a folder of masks (.png), each with the
            name of its photo, whose pixels other than 0 are the object. In a mask of palette colours 255 is a border that
            belongs to nothing, as in VOC's; in one with transparency the object is what is not transparent.

    Raises:
        TypeError: no path.
        FileNotFoundError: there is no such file.
        ValueError: the source is nothing of this, or a file is damaged or says what cannot be.

    Source:
        Everingham et al. 2010, https://doi.org/10.1007/s11263-009-0275-4 (VOC: pixels are counted from 1, and the last one is
        inside); Lin et al. 2014, arXiv:1405.0312 (COCO: edges from 0; outlines and run lengths where there are, else boxes).
    """
    if not isinstance(source, str | os.PathLike):
        refuse(_READ, "source", "be a path", type(source).__name__, TypeError)
    path = Path(source)
    if not path.exists():
        refuse(_READ, "source", "be there", f"{path} (no such file or folder)", FileNotFoundError)
    files = sorted(files_below(path)) if path.is_dir() else [path]
    root = path if path.is_dir() else path.parent
    by_ending = {ending: [one for one in files if one.suffix.lower() == ending] for ending in (".xml", ".png", ".json")}
    kinds = [ending for ending, some in by_ending.items() if some]
    if len(kinds) > 1:
        shown = " and ".join(f"{len(by_ending[kind])} {kind}" for kind in kinds)
        refuse(_READ, "source", "hold one kind of annotation, .xml, .png or .json", f"{path} with {shown}")
    if not kinds or (kinds == [".json"] and len(files) > 1 and path.is_dir() and len(by_ending[".json"]) > 1):
        requirement = "be a COCO file (.json), VOC's files (.xml) or masks (.png)"
        refuse(_READ, "source", requirement, f"{path} with {len(by_ending['.json'])} .json files" if kinds else str(path))
    if kinds == [".json"]:
        return _gathered(path, "coco", _coco(by_ending[".json"][0]))
    if kinds == [".xml"]:
        return _gathered(path, "voc", ((_name(root, one), _voc(one)) for one in by_ending[".xml"]))
    return _gathered(path, "masks", ((_name(root, one), _Entry(one)) for one in by_ending[".png"]))


def _check_path(method: str, given: object, argument: str = "photo") -> None:
    if not isinstance(given, str | os.PathLike):
        refuse(f"pysal.annotations.Annotations.{method}", argument, "be a path", repr(given)[:60], TypeError)


def _gathered(source: Path, kind: str, found: Iterator[tuple[str, _Entry]] | Sequence[tuple[str, _Entry]]) -> Annotations:
    entries: dict[str, _Entry] = {}
    stems: dict[str, list[str]] = {}
    for name, entry in found:
        if name in entries:
            refuse(_READ, "source", "name each photo once", f"{name!r} twice in {source}")
        entries[name] = entry
        stems.setdefault(name.rpartition("/")[2], []).append(name)
    return Annotations(source, kind, entries, stems)


def _name(root: Path, file: Path) -> str:
    return file.relative_to(root).with_suffix("").as_posix()


def _common(first: Sequence[str], second: Sequence[str]) -> int:
    """Return how many parts two paths share at their ends."""
    pairs = zip(reversed(first), reversed(second), strict=False)
    return next((count for count, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def _same_end(first: Sequence[str], second: Sequence[str]) -> bool:
    return _common(first, second) == min(len(first), len(second))


def _damaged(file: Path, why: str) -> NoReturn:
    refuse(_READ, "source", "be a readable annotation", f"{file} ({why})")


# PASCAL VOC ----------------------------------------------------------------------------------------------------------------


def _voc(file: Path) -> _Entry:
    """Return the boxes of a VOC file."""
    root = _tree(file)
    if root.tag != "annotation":
        _damaged(file, f"its root is <{root.tag[:40]}>, not <annotation>")
    size = root.find("size")
    shape = None
    if size is not None:
        sides = [_number(file, size, name) for name in ("height", "width")]
        shape = (int(sides[0]), int(sides[1])) if min(sides) >= 1 else None  # some tools write 0 where they know nothing
    objects = []
    for one in root.iter("object"):
        box = one.find("bndbox")
        if box is None:
            _damaged(file, "an object without <bndbox>")
        left, top, right, bottom = (_number(file, box, name) for name in ("xmin", "ymin", "xmax", "ymax"))
        if left > right or top > bottom:
            _damaged(file, f"a box from ({left:g}, {top:g}) to ({right:g}, {bottom:g})")
        objects.append(_Object((one.findtext("name") or "").strip(), (left - 1, top - 1, right, bottom)))
    return _Entry(file, shape, tuple(objects))


def _tree(file: Path) -> ElementTree.Element:
    """Return the root of an XML file that declares no entities: what they stand for may be a billion times as long."""

    def declared(*_: object) -> NoReturn:
        _damaged(file, "it declares a document type, which no annotation needs")

    try:
        if file.stat().st_size > LARGEST_XML:
            _damaged(file, f"more than {LARGEST_XML} bytes")
        content = file.read_bytes()
        parser = expat.ParserCreate()
        parser.StartDoctypeDeclHandler = declared
        parser.Parse(content, True)
        return ElementTree.fromstring(content)
    except (expat.ExpatError, ElementTree.ParseError, OSError, LookupError) as error:
        _damaged(file, getattr(error, "strerror", None) or first_line(error))


def _number(file: Path, element: ElementTree.Element, name: str) -> float:
    text = (element.findtext(name) or "").strip()
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        _damaged(file, f"<{name}> is {text[:40]!r}, no number")
    return value


# COCO ----------------------------------------------------------------------------------------------------------------------


def _coco(file: Path) -> list[tuple[str, _Entry]]:
    """Return the objects of the images that a COCO file lists."""
    try:
        content = json.loads(file.read_text("utf-8-sig"))  # programs on Windows begin with a mark
    except OSError as error:
        _damaged(file, error.strerror or type(error).__name__)
    except (ValueError, RecursionError) as error:
        _damaged(file, first_line(error))
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        _damaged(file, "no object with a list 'images'")
    known = content.get("categories") or []
    names = {
        one["id"]: str(one.get("name", ""))
        for one in (known if isinstance(known, list) else [])
        if isinstance(one, dict) and isinstance(one.get("id"), int | str)
    }
    objects: dict[Any, list[_Object]] = {}
    images: dict[Any, tuple[str, Pair | None]] = {}
    for number, one in enumerate(content["images"]):
        name = one.get("file_name") if isinstance(one, dict) else None
        if not isinstance(name, str) or not name or not isinstance(one.get("id"), int | str):
            _damaged(file, f"image {number} has no id or file_name")
        if not Path(name).name:
            _damaged(file, f"image {number} has the file_name {name[:40]!r}")
        if one["id"] in images:
            _damaged(file, f"image {number} has the id {one['id']!r} of another")
        sides = one.get("height"), one.get("width")
        whole = all(type(side) is int and side > 0 for side in sides)
        images[one["id"]] = (Path(name).with_suffix("").as_posix(), sides if whole else None)
        objects[one["id"]] = []
    listed = content.get("annotations")
    if not isinstance(listed, list):
        _damaged(file, "no list 'annotations'")
    for number, one in enumerate(listed):
        image = one.get("image_id") if isinstance(one, dict) else None
        if not isinstance(image, int | str) or image not in objects:
            _damaged(file, f"annotation {number} is of image {image!r}, which is not listed")
        category = one.get("category_id")
        label = names.get(category, "") if isinstance(category, int | str) else ""
        objects[image].append(_coco_object(file, number, one, label))
    return [(name, _Entry(file, shape, tuple(objects[image]))) for image, (name, shape) in images.items()]


def _coco_object(file: Path, number: int, one: Mapping[str, Any], label: str) -> _Object:
    shape, box = one.get("segmentation"), one.get("bbox")
    if isinstance(shape, list) and shape:
        if not all(_numbers(outline) and len(outline) >= 6 and len(outline) % 2 == 0 for outline in shape):
            _damaged(file, f"annotation {number} has an outline that is not x, y of at least three corners")
        return _Object(label, outlines=tuple(tuple(outline) for outline in shape))
    if isinstance(shape, dict):
        size, counts = shape.get("size"), shape.get("counts")
        if isinstance(counts, str):
            counts = _unpacked(counts)
        whole = isinstance(counts, list) and all(isinstance(count, int) and count >= 0 for count in counts)
        sides = isinstance(size, list) and len(size) == 2 and all(isinstance(side, int) and side > 0 for side in size)
        if not whole or not sides or sum(counts) != size[0] * size[1]:  # type: ignore[arg-type, index]
            _damaged(file, f"annotation {number} has run lengths that do not add up to its size")
        return _Object(label, runs=(tuple(counts), (size[0], size[1])))  # type: ignore[arg-type, index]
    if not _numbers(box) or len(box) != 4 or min(box[2:]) < 0:  # type: ignore[arg-type, index]
        _damaged(file, f"annotation {number} has no bbox of x, y, width, height")
    left, top, width, height = box  # type: ignore[misc]
    return _Object(label, (left, top, left + width, top + height))


def _numbers(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(one, int | float) and not isinstance(one, bool) and -FARTHEST < one < FARTHEST for one in value
    )


def _unpacked(text: str) -> list[int] | None:
    """Return COCO's run lengths of their text: 5 bits a letter, each from the third on less the one before the last."""
    counts: list[int] = []
    value, shift = 0, 0
    for letter in text.encode("ascii", "replace"):
        bits = letter - 48
        if not 0 <= bits < 64 or shift > 60:
            return None
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        counts.append(value + counts[-2] if len(counts) > 2 else value)
        value, shift = 0, 0
    return counts if shift == 0 else None


# Pixels --------------------------------------------------------------------------------------------------------------------


def _draw(one: _Object, mask: Mask, file: Path) -> None:
    """Add the pixels of an object to a mask (H, W): those whose centres are inside."""
    if one.box is not None:
        left, top, right, bottom = (max(0, math.ceil(edge - 0.5)) for edge in one.box)
        mask[top:bottom, left:right] = True
    for outline in one.outlines:
        rows, columns = polygon(np.array(outline[1::2]) - 0.5, np.array(outline[::2]) - 0.5, mask.shape)  # type: ignore[no-untyped-call]
        mask[rows, columns] = True
    if one.runs is not None:
        counts, size = one.runs
        if size != mask.shape:
            requirement = f"be for the photo's size, {mask.shape[0]} x {mask.shape[1]} (height x width)"
            refuse(_MASK, "run lengths", requirement, f"{size[0]} x {size[1]} in {file}")
        inside = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
        mask |= inside.reshape(size[1], size[0]).T


def _mask_of_file(file: Path) -> Mask:
    try:
        with Image.open(file, formats=("PNG",)) as picture:
            picture.load()
            if picture.mode == "P" and "transparency" not in picture.info:
                numbers = np.asarray(picture)
                return np.asarray((numbers != 0) & (numbers != VOID))
            if picture.has_transparency_data:
                return np.asarray(picture.convert("RGBA"))[:, :, 3] >= 128
            values = np.asarray(picture)
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        refuse(_MASK, "mask", "be a readable PNG file", f"{file} ({first_line(error)})")
    return np.asarray((values != 0).any(axis=2) if values.ndim == 3 else values != 0)
