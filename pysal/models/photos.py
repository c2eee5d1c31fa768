"""Photos as tensors in [0, 1], cropped and resized as a classifier wants them."""

import contextlib
import importlib.util
import io
import math
import operator
import re
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from pysal._checks import check_count, first_line, refuse
from pysal.models.classifier import DATA, Classifier

_READ = "pysal.read_image"
# Pixels a side that a photo is resized to: more than any model takes, and fewer than Pillow counts in 32 bits.
LARGEST_SIDE = 65_535
# Of red, green and blue in grey: ITU-R BT.601, as Pillow has them.
LUMA = (0.299, 0.587, 0.114)

Read = TypeVar("Read")
Source = str | Path | bytes | Image.Image | NDArray[Any]
"""What a photo is read from: a file, a file's content, a PIL image or an array (H, W) or (H, W, C)."""


def example_photo() -> Path:
    """Return the photo that comes with the package: a cat, 451 x 300 pixels, CC0."""
    return DATA / "photos/chelsea.jpg"


# Formats that photos come in. Pillow knows some forty: of the others one starts a program that runs what the file says (EPS),
# and most have decoders that nobody has tried damaged files on.
PHOTO_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "HEIF", "GIF", "BMP", "DIB", "TIFF", "JPEG2000", "PPM", "TGA", "ICO")
PHOTO_SUFFIXES = frozenset(
    f".{suffix}"
    for suffix in (
        *("jpg", "jpeg", "jpe", "jfif", "mpo", "png", "apng", "webp", "avif", "avifs", "heif", "heic", "gif", "bmp", "dib"),
        *("tif", "tiff", "jp2", "j2k", "jpc", "jpf", "jpx", "j2c", "ppm", "pgm", "pbm", "pnm", "pfm", "tga", "ico"),
    )
)


# Files of bands, of which photos have three, and files of arrays, which hold grey images as well. Of colours they are mostly
# something else that lies beside photos: masks, features.
BAND_SUFFIXES = frozenset({".npy", ".tif", ".tiff"})


def suffixes_of(channels: int) -> frozenset[str]:
    """Return how names of files end that a model of so many channels is shown."""
    if channels in (1, 3):
        return PHOTO_SUFFIXES | {".npy"} if channels == 1 else PHOTO_SUFFIXES
    return BAND_SUFFIXES


def read_image(
    source: Source,
    model: Classifier | None = None,
    *,
    size: int | tuple[int, int] | None = None,
    channels: int | None = None,
) -> Tensor:
    """Return a photo as (1, C, H, W), float32 in [0, 1], on the CPU: as `model` wants it, or at its own size.

    If there is a size, the photo is cropped around its centre to the wanted shape, so nothing is stretched. It is then resized
    with the model's filter, else Pillow's bicubic one, which average what they shrink: in 8 bits if the photo has 8, else
    in float32, clamped to [0, 1].

    Of channels other than 1 and 3 the source is an array (H, W, C) or (C, H, W) with as many, or a file of one, in [0, 1] or
    integers: .npy, or .tif, whose bands lie in its pixels, in planes or on pages (install tifffile for more than Pillow reads).
    Of 3 channels, grey photos give three equal ones; of 1, for models of grey images, colours become their luma (ITU-R BT.601).
    Transparent photos are put on white, and EXIF rotation is applied. 16-bit values are divided by 65535 (Pillow reads the
    upper 8 bits of 16-bit colour files). Of an animation or a multi-page file the first picture is read.

    Args:
        source: a file, .npy too, its content, a PIL image, or an array (H, W) or (H, W, C), where C = 1 is grey, 2 grey and
            alpha, 3 RGB and 4 RGB and alpha, of uint8, uint16 or floating values in [0, 1].
        model: sets the size (`model.input_size`), how much of the photo to keep (`model.crop_fraction`), how to resize it and
            the channels (`model.channels`).
        size: (height, width) in pixels, or a number for a square; instead of the model's.
        channels: 1 or 3, instead of the model's, or another number of bands; None = the model's, 3 without one.

    Raises:
        TypeError: another kind of source or model, or an array of another dtype.
        FileNotFoundError, IsADirectoryError, PermissionError: the file cannot be opened.
        ValueError: not an image, damaged or cut off, a file of numbers of another dtype, more pixels than Pillow's limit
            (`PIL.Image.MAX_IMAGE_PIXELS`), fewer than 2 x 2, an array of another shape or with values outside [0, 1], a size
            below 1, or no number of channels.
    """
    if channels is not None:
        check_count(_READ, "channels", channels)
    if model is not None and not isinstance(model, Classifier):
        refuse(_READ, "model", "be a pysal.models.Classifier", type(model).__name__, TypeError)
    target = model.input_size if model is not None and size is None else checked_size(_READ, size)
    fraction = model.crop_fraction if model is not None else 1.0
    channels = channels or (3 if model is None else model.channels)
    pixels, shown = _decode(source) if channels in (1, 3) else _bands(source, channels)
    height, width = (pixels.height, pixels.width) if isinstance(pixels, Image.Image) else pixels.shape[:2]
    if min(height, width) < 2:
        refuse(_READ, "source", "be an image of at least 2 x 2 pixels", f"{shown} ({width} x {height} pixels)")
    values_of = _colours if channels in (1, 3) else _in_unit
    if target is None:
        return _to_tensor(np.asarray(_on_white(pixels)) if isinstance(pixels, Image.Image) else values_of(pixels), channels)
    top, left, bottom, right = _centre_box((height, width), target, fraction)
    resample = Image.Resampling[(model.resample if model is not None else "bicubic").upper()]
    if not isinstance(pixels, Image.Image):
        return _to_tensor(_resize(values_of(pixels[top:bottom, left:right]), target, resample), channels)
    if (bottom - top, right - left) != (height, width):
        pixels = pixels.crop((left, top, right, bottom))
    return _to_tensor(np.asarray(_on_white(pixels).resize((target[1], target[0]), resample)), channels)


def size_of_photo(source: Source) -> tuple[int, int]:
    """Return (height, width) of a photo as `read_image` takes it, turned as its EXIF says.

    Raises:
        TypeError, OSError, ValueError: as `read_image`.
    """
    pixels, _ = _decode(source)
    if isinstance(pixels, Image.Image):
        return pixels.height, pixels.width
    return int(pixels.shape[0]), int(pixels.shape[1])


def read_images(
    sources: Sequence[Source],
    model: Classifier | None = None,
    *,
    size: int | tuple[int, int] | None = None,
    channels: int | None = None,
) -> Tensor:
    """Return several photos as one batch (B, C, H, W), float32 in [0, 1]: `read_image` of each.

    Raises:
        TypeError, OSError, ValueError: as `read_image`; also no photo at all, or photos of different sizes where
            neither `model` nor `size` sets one.
    """
    where = "pysal.read_images"
    if isinstance(sources, str | Path | bytes | Image.Image | np.ndarray) or not isinstance(sources, Sequence):
        refuse(where, "sources", "be a list of photos", type(sources).__name__, TypeError)
    if not sources:
        refuse(where, "sources", "hold at least one photo", "none")
    images = [read_image(source, model, size=size, channels=channels) for source in sources]
    for source, image in zip(sources, images, strict=True):
        if image.shape != images[0].shape:
            sizes = [f"{tuple(each.shape[2:])}" for each in (images[0], image)]
            refuse(where, "sources", "have one size (or give size=)", f"{sizes[0]} and {sizes[1]} ({_describe(source)})")
    return torch.cat(images)


def checked_size(where: str, size: object) -> tuple[int, int] | None:
    """Return (height, width) of a number of pixels or a pair.

    Raises:
        ValueError: neither, or below 1 pixel.
    """
    if size is None:
        return None
    try:
        height, width = map(operator.index, size if isinstance(size, tuple | list) else (size, size))
    except (TypeError, ValueError):
        refuse(where, "size", "be a number of pixels or (height, width)", repr(size))
    if min(height, width) < 1:
        refuse(where, "size", "be at least 1 pixel", repr(size))
    if max(height, width) > LARGEST_SIDE:
        refuse(where, "size", f"be at most {LARGEST_SIDE} pixels a side", repr(size))
    return height, width


def _centre_box(shape: tuple[int, int], target: tuple[int, int], fraction: float) -> tuple[int, int, int, int]:
    """Return the centred (top, left, bottom, right) with the target's proportions and `fraction` of what would fit."""
    scale = fraction * min(shape[0] / target[0], shape[1] / target[1])
    # The small addend: 400 / 224 * 0.875 * 224 must be 350 pixels however it rounds.
    height, width = (max(1, int(scale * side + 1e-6)) for side in target)
    top, left = (shape[0] - height) // 2, (shape[1] - width) // 2
    return top, left, top + height, left + width


def _decode(source: Source) -> tuple[NDArray[Any] | Image.Image, str]:
    """Return the pixels and what to call the source in a message.

    Pixels of 8 bits are a picture of mode L, LA, RGB or RGBA, as Pillow holds them: a copy of a large photo for each step
    would take gigabytes. Others are an array (H, W, 1 to 4) of uint16 or floats in [0, 1].
    """
    shown = _describe(source)
    if isinstance(source, str | Path):
        return _opened(Path(source), shown, _decode_content), shown
    if isinstance(source, bytes):
        try:
            return _decode_content(io.BytesIO(source), shown), shown
        except OSError as error:  # of a decoder: nothing is read from a disk here
            _refuse_file(shown, first_line(error).lower())
    if isinstance(source, Image.Image):
        return _decode_picture(source, shown), shown
    if isinstance(source, np.ndarray):
        return _checked_array(source, shown), shown
    refuse(_READ, "source", "be a path, bytes, a PIL image or a NumPy array", type(source).__name__, TypeError)


def _bands(source: Source, channels: int) -> tuple[NDArray[Any], str]:
    """Return the bands (H, W, channels) of an array or of a file of one, and what to call it in a message."""
    shown = _describe(source)
    found: object = source
    if isinstance(source, str | Path):
        found = _opened(Path(source), shown, _band_file)
    elif isinstance(source, bytes):
        found = _band_file(io.BytesIO(source), shown)
    elif isinstance(source, Image.Image):
        found = np.asarray(source)
    if not isinstance(found, np.ndarray):
        refuse(_READ, "source", f"be {_wanted_bands(channels)}", shown, TypeError)
    if found.ndim == 3 and found.shape[0] == channels != found.shape[2]:
        found = found.transpose(1, 2, 0)
    if found is not source and (found.ndim != 3 or found.shape[2] != channels):
        more = (
            "" if isinstance(source, Image.Image) or importlib.util.find_spec("tifffile") else "; pip install tifffile for more"
        )
        refuse(_READ, "source", f"be {_wanted_bands(channels)}", f"{shown} (an array {found.shape}{more})")
    return _checked_array(found, shown, channels, file=found is not source), shown


def _wanted_bands(channels: int) -> str:
    return f"an array (H, W, {channels}), or a file .npy or .tif of one, for {channels} channels"


def _band_file(file: BinaryIO, shown: str) -> NDArray[Any]:
    """Return the numbers in a file of bands: NumPy's, a TIFF of any number of them, or a picture that Pillow reads."""
    start = file.read(8)
    file.seek(0)
    if start.startswith(NUMPY):
        return _numpy_file(file, shown)
    if start[:4] in TIFF:
        with contextlib.suppress(ImportError):
            return _tiff(importlib.import_module("tifffile"), file, shown)
        file.seek(0)
    pixels = _decode_content(file, shown)
    return np.asarray(pixels)


def _tiff(tifffile: Any, file: BinaryIO, shown: str) -> NDArray[Any]:
    """Return the bands (H, W, C) of a TIFF, which lie beside each other, one after the other or on a page each."""
    try:
        with tifffile.TiffFile(file) as opened:
            series = opened.series[0]
            most = 64 * (Image.MAX_IMAGE_PIXELS or 2**31)
            if math.prod(series.shape) > most:
                refuse(_READ, "source", f"be an image of at most {most} numbers", f"{shown} {series.shape}")
            values, axes = np.asarray(series.asarray()), str(series.axes)
    except MemoryError:
        raise
    except Exception as error:
        if str(error).startswith(_READ):
            raise
        _refuse_file(shown, f"damaged, or of a kind that tifffile does not read: {first_line(error)}")
    if "Y" in axes and "X" in axes and values.ndim == len(axes):
        values = np.moveaxis(values, (axes.index("Y"), axes.index("X")), (0, 1))
    return values.reshape(*values.shape[:2], -1)


def _numpy_file(file: BinaryIO, shown: str) -> NDArray[Any]:
    try:
        return np.asarray(np.load(file, allow_pickle=False))
    except MemoryError:
        raise
    except Exception as error:  # a header that is cut off or says what is not so
        _refuse_file(shown, first_line(error))


def _describe(source: object) -> str:
    if isinstance(source, str | Path):
        return str(source) or "''"
    if isinstance(source, bytes):
        return f"{len(source)} bytes"
    if isinstance(source, Image.Image):
        return str(getattr(source, "filename", "")) or "a PIL image"
    return f"an array {source.shape} of {source.dtype}" if isinstance(source, np.ndarray) else type(source).__name__


def _opened(path: Path, shown: str, read: Callable[[BinaryIO, str], Read]) -> Read:
    """Return what is read of a file."""
    try:
        if path.is_dir():
            raise IsADirectoryError(0, "a directory")
        if path.exists() and not path.is_file():
            _refuse_file(shown, "not a regular file")
        with path.open("rb") as file:
            return read(file, shown)
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError) and str(error).startswith(_READ):
            raise
        kinds = (FileNotFoundError, IsADirectoryError, PermissionError)
        kind = next((kind for kind in kinds if isinstance(error, kind)), ValueError)
        reason = getattr(error, "strerror", None) or first_line(error)
        _refuse_file(shown, "no such file" if kind is FileNotFoundError else reason.lower(), kind)


# How NumPy's files begin, and TIFF's of either order of bytes, also those of more than 4 GB.
NUMPY, TIFF = b"\x93NUMPY", frozenset({b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"})
# How HEIC files begin, after four bytes: those of telephones, which Pillow reads with a plugin that has to be registered.
HEIC = frozenset(b"ftyp" + brand for brand in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx"))


def _decode_content(file: BinaryIO, shown: str) -> NDArray[Any] | Image.Image:
    start = file.read(12)
    if not start:
        _refuse_file(shown, "the file is empty")
    file.seek(0)
    if start.startswith(NUMPY):
        return _checked_array(_numpy_file(file, shown), shown, file=True)
    if start[4:] in HEIC and "HEIF" not in Image.ID:
        try:
            import pillow_heif  # type: ignore[import-not-found, unused-ignore]
        except ImportError:
            _refuse_file(shown, "a HEIC photo, for which Pillow needs: pip install pillow-heif")
        pillow_heif.register_heif_opener()
    try:
        with _quiet:
            Image.init()  # which also finds the formats of plugins, HEIF's for one
            with Image.open(file, formats=[kind for kind in PHOTO_FORMATS if kind in Image.ID]) as picture:
                _check_pixels(picture, shown)
                decoded = _decode_picture(picture, shown)
                _check_pixels(picture, shown)  # what an icon holds is known only now
                return decoded
    except Image.DecompressionBombError as error:
        found = re.search(r"\d+ pixels", str(error))
        _refuse_pixels(shown, found[0] if found else "more than that")
    except UnidentifiedImageError:
        _refuse_file(shown, "not an image that Pillow can read")
    except MemoryError:
        raise
    except Exception as error:
        if str(error).startswith(_READ):  # what is refused further down, in its own words
            raise
        # a decoder that trips while it looks at the file's head raises anything at all
        _refuse_file(shown, f"damaged or cut off: {first_line(error)}")


def _check_pixels(picture: Image.Image, shown: str) -> None:
    """Refuse pixels beyond Pillow's limit, of which it warns, and refuses only twice as many."""
    if Image.MAX_IMAGE_PIXELS is not None and picture.width * picture.height > Image.MAX_IMAGE_PIXELS:
        _refuse_pixels(shown, f"{picture.width * picture.height} pixels")


def _refuse_pixels(shown: str, found: str) -> NoReturn:
    limit = f"be an image of at most {Image.MAX_IMAGE_PIXELS} pixels (PIL.Image.MAX_IMAGE_PIXELS)"
    refuse(_READ, "source", limit, f"{shown} ({found})")


class _Quiet:
    """Shows no warnings, which are about metadata that is not used, while any thread is inside.

    The filters belong to the process. Threads that each put back what they had found would leave those of another behind.
    """

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._filters: warnings.catch_warnings[None] | None = None

    def __enter__(self) -> None:
        with self._lock:
            if self._filters is None:
                self._filters = warnings.catch_warnings()
                self._filters.__enter__()
                warnings.simplefilter("ignore")
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0 and self._filters is not None:
                filters, self._filters = self._filters, None
                filters.__exit__(None, None, None)


_quiet = _Quiet()


def _decode_picture(picture: Image.Image, shown: str) -> NDArray[Any] | Image.Image:
    try:
        picture.load()
    except MemoryError:
        raise
    except Exception as error:  # the decoders of some thirty formats raise whatever they trip over
        _refuse_file(shown, f"damaged or cut off: {first_line(error)}")
    with _quiet, contextlib.suppress(Exception):  # an orientation nobody can read turns nothing
        if picture.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I;16"):
        return np.asarray(picture)[..., None].astype(np.uint16)
    if picture.mode == "I":
        return _sixteen_bits(np.asarray(picture), shown)
    if picture.mode == "F":
        return _checked_array(np.asarray(picture), shown)
    wanted = {"1": "L", "L": "L", "LA": "LA", "La": "LA", "RGBA": "RGBA", "RGBa": "RGBA"}.get(picture.mode, "RGB")
    if picture.has_transparency_data and wanted in ("L", "RGB"):
        wanted = "LA" if wanted == "L" else "RGBA"
    try:
        return picture if picture.mode == wanted else picture.convert(wanted)
    except (ValueError, OSError) as error:
        _refuse_file(shown, f"mode {picture.mode}: {first_line(error)}")


def _sixteen_bits(values: NDArray[Any], shown: str) -> NDArray[Any]:
    """Return 32-bit integers, Pillow's form of some 16-bit files, as uint16 (H, W, 1)."""
    if values.size and (values.min() < 0 or values.max() > 65535):
        refuse(_READ, "source", "have values in [0, 65535]", f"[{values.min()}, {values.max()}] in {shown}")
    return values[..., None].astype(np.uint16)


def _checked_array(given: NDArray[Any], shown: str, channels: int | None = None, *, file: bool = False) -> NDArray[Any]:
    """Return an array that was given, or is what a `file` holds, (H, W, C)."""
    whole = f"{shown} (an array {given.shape} of {given.dtype})" if file else shown
    if np.ma.is_masked(given):
        refuse(_READ, "source", "have no masked values", shown)
    array = np.asarray(given)  # no subclass, whose indexing may mean something else, as that of np.matrix does
    if array.dtype.newbyteorder("=") not in (np.uint8, np.uint16) and not np.issubdtype(array.dtype, np.floating):
        # a file of such numbers is one that cannot be read, among others that can
        refuse(_READ, "source", "have dtype uint8, uint16 or floating", whole, ValueError if file else TypeError)
    pixels = array[..., None] if array.ndim == 2 else array
    if channels is not None and (pixels.ndim != 3 or pixels.shape[2] != channels):
        refuse(_READ, "source", f"have shape (H, W, {channels})", shown)
    if channels is None and (pixels.ndim != 3 or not 1 <= pixels.shape[2] <= 4):
        refuse(_READ, "source", "have shape (H, W) or (H, W, C) with C from 1 to 4", whole)
    if pixels.size and np.issubdtype(array.dtype, np.floating):
        low, high = pixels.min(), pixels.max()  # NaN if there is one
        if not np.isfinite([low, high]).all():
            refuse(_READ, "source", "have finite values", f"NaN or infinity in {shown}")
        if low < 0 or high > 1:
            refuse(_READ, "source", "have values in [0, 1] (or be uint8)", f"[{low:g}, {high:g}] in {shown}")
    return pixels


def _in_unit(pixels: NDArray[Any]) -> NDArray[Any]:
    """Return the same values as float32 in [0, 1]."""
    values = pixels.astype(np.float32)
    return values / np.float32(np.iinfo(pixels.dtype).max) if np.issubdtype(pixels.dtype, np.integer) else values


def _colours(pixels: NDArray[Any]) -> NDArray[Any]:
    """Return (H, W, 1 or 3), uint8 as it came or else float32 in [0, 1], for (H, W, 1 to 4): transparency put on white."""
    if pixels.dtype == np.uint8:
        if pixels.shape[2] in (1, 3):
            return pixels
        blended = np.asarray(_on_white(Image.fromarray(np.ascontiguousarray(pixels))))
        return blended if blended.ndim == 3 else blended[..., None]
    values = _in_unit(pixels)
    if values.shape[2] in (2, 4):
        alpha = values[..., -1:]
        values = values[..., :-1] * alpha + (1 - alpha)
    return values


def _on_white(picture: Image.Image) -> Image.Image:
    """Return a picture without transparency: 255 - a + x a / 255, rounded to the nearest, in one more copy."""
    if picture.mode not in ("LA", "RGBA"):
        return picture
    white = Image.new(picture.mode.removesuffix("A"), picture.size, "white")
    white.paste(picture, mask=picture)
    return white


def _resize(colours: NDArray[Any], target: tuple[int, int], resample: Image.Resampling) -> NDArray[Any]:
    size = (target[1], target[0])
    if colours.dtype == np.uint8 and colours.shape[2] == 3:
        return np.asarray(Image.fromarray(np.ascontiguousarray(colours)).resize(size, resample))
    planes = [Image.fromarray(np.ascontiguousarray(plane)).resize(size, resample) for plane in colours.transpose(2, 0, 1)]
    stacked = np.stack([np.asarray(plane) for plane in planes], axis=-1)
    return stacked if colours.dtype == np.uint8 else stacked.clip(0, 1)


def _to_tensor(colours: NDArray[Any], channels: int) -> Tensor:
    """Return (1, channels, H, W) in [0, 1] of (H, W, 1 or 3) or (H, W); grey is resized once, and repeated here."""
    if colours.ndim == 2:
        colours = colours[..., None]
    numbers = colours.transpose(2, 0, 1)[None].astype(np.float32, order="C")
    if colours.dtype == np.uint8:
        numbers /= 255
    values = torch.from_numpy(numbers)
    if channels == 1 and values.shape[1] == 3:
        return (values * torch.tensor(LUMA, dtype=values.dtype, device="cpu").view(3, 1, 1)).sum(1, keepdim=True).clamp(0, 1)
    return values.expand(-1, channels, -1, -1).contiguous()


def _refuse_file(shown: str, reason: str, error: type[Exception] = ValueError) -> NoReturn:
    refuse(_READ, "source", "be a readable image file", f"{shown} ({reason})", error)
