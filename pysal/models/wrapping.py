"""`wrap`: a network of the user's own with what it was trained on: photos, their size, and the names of its classes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from pysal._checks import check_tensor, first_line, refuse
from pysal.engine.model.class_names import Names, names_of
from pysal.models.classifier import Classifier, Normalized, Resample, first_channels
from pysal.models.from_timm import preprocessing_of as timm_preprocessing
from pysal.models.from_transformers import preprocessing_of as transformers_preprocessing
from pysal.models.loading import checked_names, checked_normalize
from pysal.models.photos import checked_size, read_images
from pysal.models.spec import Normalization, channels_refused, distinct, imagenet_names, refuse_channels

WHERE = "pysal.models.wrap"
# Words in the names of transformers' architectures whose `id2label` names what they answer with; others carry it unused.
_WITH_LABELS = ("Classification", "Detection", "Segmentation")


class Pixels(nn.Module):
    """A network of transformers, whose images come by name: others of its arguments may stand before them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, *extra_inputs: Any, **named: Any) -> Any:
        """Return `model(*extra_inputs, pixel_values=images, **named)`."""
        return self.model(*extra_inputs, pixel_values=images, **named)


class Wrapped(Classifier):
    """A classifier, or another network, that takes further arguments beside its images."""

    def forward(self, images: Tensor, *extra_inputs: Any, **named: Any) -> Any:
        """Return what the network answers to images (B, C, H, W) in [0, 1]."""
        return self.network(images, *extra_inputs, **named)


def wrap(
    model: nn.Module,
    processor: Any = None,
    *,
    size: int | tuple[int, int] | None = None,
    normalize: Normalization | None = None,
    class_names: Names | Literal["imagenet"] | None = None,
) -> Classifier:
    """Return a network as one that takes images in [0, 1] and knows which photos it wants and what its classes are called.

    `pysal.explain(pysal.models.wrap(model), "cat.jpg")` is then enough. The network itself is neither copied nor changed.

    ===================================  ====================================================================================
    model                                what is found
    ===================================  ====================================================================================
    of timm                              size, normalisation and classes of its pretrained configuration
    of transformers, with its processor  the same, of the image processor and `id2label`; any task: detectors, CLIP, captioners
    any other                            nothing: `size` and `normalize` are required
    a `Classifier`                       all: it is returned as it is
    ===================================  ====================================================================================

    Args:
        model: the network, as it is called with normalised images.
        processor: the image processor of a model of transformers, or one that has it; None = that of its repository or
            folder, if it is on this machine.
        size: (height, width) of the images, or a number for a square, instead of what is found.
        normalize: "imagenet", "none" for a network of images in [0, 1], or (mean, std), each a number or one per channel,
            instead.
        class_names: K names, in order or by index ({0: "cat", 1: "dog"}), or "imagenet", instead; a model that has none is
            explained by index.

    Raises:
        TypeError: no module.
        ValueError: a size or normalisation that nobody says, or options for a `Classifier`.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).eval()
        >>> model = wrap(network, size=32, normalize="imagenet", class_names=["cat", "dog"])
        >>> model.class_index("dog"), model.input_size
        (1, (32, 32))
    """
    if not isinstance(model, nn.Module):
        requirement = "be a torch.nn.Module, before it is prepared"
        refuse(WHERE, "model", requirement, type(model).__name__, TypeError)
    given = {"processor": processor, "size": size, "normalize": normalize, "class_names": class_names}
    if isinstance(model, Classifier):
        for name, value in given.items():
            if value is not None:
                refuse(WHERE, name, "be None for a model that knows it already", type(value).__name__)
        return model
    mean, std = checked_normalize(WHERE, normalize)
    channels = None if mean is None or len(mean) > 1 else first_channels(model)
    wanted, names = checked_size(WHERE, size), checked_names(WHERE, class_names)
    fraction = 1.0
    resample: Resample = "bicubic"
    found: Sequence[str] | Literal["imagenet"] | None = None
    network: nn.Module = model
    kind = _library_of(model)
    if processor is not None and kind != "transformers":
        refuse(WHERE, "processor", "be None for a model that is not of transformers", type(processor).__name__)
    if kind == "timm":
        own = timm_preprocessing(model)
        found, fraction, resample = own.class_names, own.crop_fraction, own.resample
        wanted = wanted or own.size
        if mean is None and len(own.mean) == own.channels:  # of other channels nobody has published one
            mean, std = own.mean, own.std
    elif kind == "transformers":
        network = Pixels(model)
        if wanted is None or mean is None or processor is not None:
            size_found, mean_found, std_found, fraction, resample = transformers_preprocessing(_processor_of(model, processor))
            wanted, mean, std = wanted or size_found, mean or mean_found, std or std_found
        found = _labels(model)
    for name, value, example in (("size", wanted, "224"), ("normalize", mean, "'imagenet', 'none' or (mean, std)")):
        if value is None:
            refuse(WHERE, name, f"be given for a model that does not say it ({example})", "None")
    assert wanted is not None
    assert mean is not None
    assert std is not None
    if found is None:
        carried = names_of(model) if kind != "transformers" else None
        found = () if carried is None else carried.names
    chosen, synonyms = imagenet_names() if "imagenet" in (names, found if names is None else names) else (names or found, None)
    wrapped = Wrapped(
        Normalized(network, mean, std),
        name=type(model).__name__,
        class_names=distinct(list(chosen)) if names is None else chosen,
        input_size=wanted,
        crop_fraction=fraction,
        resample=resample,
        synonyms=synonyms,
        channels=channels,
    )
    if len(mean) > 1 and first_channels(model) not in (None, len(mean)):
        _check_channels(model, network, (1, len(mean), *wanted))
    for module in (wrapped, wrapped.network, network):
        if module is not model:  # whose modes are its owner's
            module.training = False
    return wrapped


def _check_channels(model: nn.Module, network: nn.Module, shape: tuple[int, ...]) -> None:
    """Refuse a normalisation of other channels than a network takes, whose first convolution looks as if it did."""
    first = next((one for one in model.parameters() if one.is_floating_point()), None)
    if model.training or first is None:
        return  # a pass would change what it is
    try:
        with torch.no_grad():
            network(torch.zeros(shape, dtype=first.dtype, device=first.device))
    except Exception as error:  # of a network that takes more than images, for one
        if wanted := channels_refused(error, shape[1]):
            refuse_channels(WHERE, wanted, shape[1])


def _library_of(model: nn.Module) -> str:
    """Return "timm", "transformers" or "": whose a network is, without importing either."""
    bases = {base.__module__.split(".")[0] for base in type(model).__mro__}
    if "transformers" in bases and hasattr(model, "config"):
        return "transformers"
    return "timm" if hasattr(model, "pretrained_cfg") else ""


def _labels(model: Any) -> tuple[str, ...] | None:
    labels = getattr(model.config, "id2label", None)
    if not labels or not any(word in type(model).__name__ for word in _WITH_LABELS):
        return ()
    return tuple(str(labels[index]) for index in sorted(labels))


def _processor_of(model: Any, processor: Any) -> Any:
    """Return the image processor of a model of transformers."""
    if processor is not None:
        own = getattr(processor, "image_processor", processor)
        if not callable(own):
            refuse(WHERE, "processor", "be an image processor, or hold one", type(processor).__name__, TypeError)
        return own
    source = str(getattr(model.config, "_name_or_path", "") or "")
    requirement = "be given for a model whose own is not on this machine, or size and normalize"
    if not source:
        refuse(WHERE, "processor", requirement, "None")
    import transformers

    try:
        automatic: Any = transformers.AutoImageProcessor
        return automatic.from_pretrained(source, local_files_only=True)
    except Exception as error:  # no file, no such folder, an architecture without one
        refuse(WHERE, "processor", requirement, f"none in {source!r} ({first_line(error)})")


def photos_for(where: str, model: object, images: object) -> Tensor:
    """Return images as the tensor (B, C, H, W) they are, or photos as the model wants them, where it lies.

    Args:
        where: the public name that was called, for errors.
        model: what explains photos itself is a `Classifier`.
        images: a tensor, or a photo or several: files, their content, PIL images or arrays.

    Raises:
        TypeError: photos for a model that does not say how it wants them.
        OSError, ValueError: see `read_image`.
    """
    if isinstance(images, Tensor):
        return images
    sources: list[Any] = list(images) if isinstance(images, (list, tuple)) else [images]
    if not sources or not all(isinstance(one, (str, Path, bytes, Image.Image, np.ndarray)) for one in sources):
        return check_tensor(where, "inputs", images)
    if not isinstance(model, Classifier):
        requirement = "be a tensor (B, C, H, W) for a model that does not say how it wants photos (see pysal.models.wrap)"
        refuse(where, "inputs", requirement, type(sources[0]).__name__, TypeError)
    read = read_images(sources, model)
    first = next((one for one in model.network.parameters() if one.is_floating_point()), None)
    return read if first is None else read.to(first.device, first.dtype)


__all__ = ["photos_for", "wrap"]
