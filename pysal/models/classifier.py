"""What every loaded model is: a classifier of images in [0, 1] that knows its classes by name and the photos it wants."""

import math
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor, nn

from pysal._checks import check_count, refuse, refuse_unknown
from pysal.engine.model.class_names import ClassNames, Names, checked

DATA = Path(__file__).parents[1] / "data"
"""The folder of the photos and class names that come with the package."""

Resample: TypeAlias = Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]
"""Pillow's filters, by which photos are resized."""


Channels: TypeAlias = float | Sequence[float] | Tensor | np.ndarray[Any, Any]


class Normalized(nn.Module):
    """A model that takes images in [0, 1]: the first layer brings them to the range the network was trained on.

    With normalisation inside the model, "black", "blurred" and noise levels refer to pixels, as in the papers.

    Args:
        model: the network, called with (image - mean) / std.
        mean: one number per channel, or one for all, in the units of [0, 1] pixels.
        std: one number per channel, or one for all, > 0, same units.

    Raises:
        TypeError: `mean` or `std` are not numbers.
        ValueError: `mean` and `std` differ in length, are empty, not finite, or `std` is not positive.

    Example:
        >>> model = Normalized(nn.Identity(), mean=[0.5], std=[0.25])
        >>> model(torch.tensor([[[[0.5, 1.0]]]]))
        tensor([[[[0., 2.]]]])
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: Channels, std: Channels) -> None:
        super().__init__()
        where = "pysal.Normalized"
        mean, std = per_channel(where, "mean", mean), per_channel(where, "std", std)
        longest = max(len(mean), len(std))
        mean, std = (one * longest if len(one) == 1 else one for one in (mean, std))
        if not mean or not all(math.isfinite(value) for value in mean):
            refuse(where, "mean", "be one finite number per channel", mean)
        if len(std) != len(mean) or not all(math.isfinite(value) and value > 0 for value in std):
            refuse(where, "std", f"be {len(mean)} finite numbers above 0, one per channel", std)
        self.model = model
        # Where the network lies, and of 16 bits for one of 16 bits, which takes no others; in float32 for all else.
        parameters = model.parameters() if isinstance(model, nn.Module) else ()
        first = next((one for one in parameters if one.dtype.is_floating_point), None)
        dtype = first.dtype if first is not None and first.dtype.itemsize == 2 else torch.float32
        device = None if first is None else first.device
        self.register_buffer("mean", torch.tensor(mean, dtype=dtype, device=device).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=dtype, device=device).view(-1, 1, 1))

    def forward(self, images: Tensor, *extra_inputs: Any, **named: Any) -> Any:
        """Return `model((images - mean) / std, *extra_inputs, **named)` for images (B, C, H, W) in [0, 1]."""
        try:
            normalised = (images - self.mean) / self.std
        except RuntimeError:
            if images.ndim == 4 and images.shape[1] != len(self.mean):
                refuse("pysal.Normalized", "images", f"have {len(self.mean)} channels, as mean and std", images.shape[1])
            raise
        return self.model(normalised, *extra_inputs, **named)


def per_channel(where: str, argument: str, value: object) -> list[float]:
    """Return one number per channel; a single number, or one in any shape of one number per channel, is as good as a list."""
    try:
        found = torch.as_tensor(value, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        refuse(where, argument, "be a number or one per channel", " ".join(repr(value).split()), TypeError)
    if found.numel() and found.numel() != max(found.shape, default=1):
        refuse(where, argument, "be one finite number per channel", f"shape {tuple(found.shape)}")
    numbers: list[float] = found.reshape(-1).tolist()
    return numbers


def first_channels(network: nn.Module) -> int | None:
    """Return how many channels the first convolution takes, of a TorchScript file too; None where there is none."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            return module.in_channels
        if getattr(module, "original_name", "") == "Conv2d":
            weight: Any = module.weight
            return int(weight.shape[1]) * int(getattr(module, "groups", 1))
    return None


def channels_of(network: nn.Module) -> int:
    """Return whether a network takes grey images, 1, colours, 3, or as many bands as its normalisation has numbers."""
    if isinstance(network, Normalized) and len(network.mean) > 1:
        return len(network.mean)
    return 1 if first_channels(network) == 1 else 3


class Classifier(nn.Module):
    """A classifier of [0, 1] images that knows its classes by name and the photos it wants.

    Args:
        network: images (B, C, H, W) in [0, 1] -> logits (B, K); usually a `Normalized`.
        name: what the model is called.
        class_names: K names, in order or by index ({0: "cat", 1: "dog"}), different from each other even in lower case; none
            for a network that has no classes.
        input_size: (height, width) of the images the network was trained on, pixels.
        crop_fraction: the share of a photo's short side that the centre crop keeps, in (0, 1].
        resample: the filter that photos are resized with.
        synonyms: for each class the other words `class_index` knows it by; none by default.
        rows_per_pass: images that the network takes at a time; None = any number.
        channels: C of its images: 3, colours, or 1, grey, to which `read_image` brings photos, or another number of bands,
            which it takes from arrays. None = as many as the normalisation has numbers or, of one number for all, as its
            first convolution takes, if that is 1; else 3.

    Raises:
        TypeError: no names of classes.
        ValueError: names that repeat, sizes below 1, a crop fraction outside (0, 1], an unknown filter, synonyms for
            another number of classes, or channels that are no number of at least 1.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        name: str,
        class_names: Names,
        input_size: tuple[int, int],
        crop_fraction: float = 1.0,
        resample: Resample = "bicubic",
        synonyms: Sequence[Sequence[str]] | None = None,
        rows_per_pass: int | None = None,
        channels: int | None = None,
    ) -> None:
        super().__init__()
        where = "pysal.models.Classifier"
        names = checked(where, class_names, empty=True)
        folded = [entry.casefold() for entry in names]
        if len(set(folded)) != len(folded):
            repeated = next(entry for entry in folded if folded.count(entry) > 1)
            refuse(where, "class_names", "differ from each other", f"{repeated!r} twice")
        if len(input_size) != 2 or min(input_size) < 1:
            refuse(where, "input_size", "be (height, width) in pixels", input_size)
        if not 0 < crop_fraction <= 1:
            refuse(where, "crop_fraction", "be above 0 and at most 1", crop_fraction)
        if resample not in get_args(Resample):
            refuse_unknown(where, "resample", f"be one of {', '.join(get_args(Resample))}", resample, get_args(Resample))
        if synonyms is not None and len(synonyms) != len(folded):
            refuse(where, "synonyms", f"have one entry for each of the {len(folded)} classes", f"{len(synonyms)} entries")
        if channels is not None:
            check_count(where, "channels", channels)
        self.network = network
        self.channels: int = channels_of(network) if channels is None else channels
        self.name = name
        self.class_names = names
        self.input_size = (int(input_size[0]), int(input_size[1]))
        self.crop_fraction, self.resample = float(crop_fraction), resample
        self.rows_per_pass = rows_per_pass
        self.classes = ClassNames(self.class_names, synonyms)

    def forward(self, images: Tensor) -> Any:
        """Return the logits (B, K) of images (B, C, H, W) in [0, 1]."""
        return self.network(images)

    def class_index(self, name_or_index: str | int) -> int:
        """Return the index of the class that a name or an index means.

        A name is looked for, whatever its case, among the class names, then among their synonyms, then as a word of
        either, then as any part of either; the first of these that finds something decides. Digits that are no class name
        are an index.

        Args:
            name_or_index: "Siamese cat", "espresso", 281 or "281".

        Raises:
            TypeError: neither a string nor an integer.
            ValueError: an index outside [0, K), a name of no class (close names are listed) or of several (listed too).
        """
        where = "pysal.models.Classifier.class_index"
        if isinstance(name_or_index, str):
            return self.classes.find(where, "name_or_index", name_or_index)
        try:
            if isinstance(name_or_index, bool):
                raise TypeError
            index = operator.index(name_or_index)
        except TypeError:
            refuse(where, "name_or_index", "be a class name or an index", type(name_or_index).__name__, TypeError)
        if not 0 <= index < len(self.class_names):
            refuse(where, "name_or_index", f"be in [0, {len(self.class_names)})", index)
        return index
