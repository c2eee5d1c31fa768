"""Image classifiers of Hugging Face transformers: `transformers:microsoft/resnet-50`, or a local folder."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from PIL import Image

from pysal._checks import first_line, refuse
from pysal.models.classifier import Classifier
from pysal.models.spec import (
    WHERE,
    Logits,
    ModelSpec,
    classifier,
    load_weights,
    needed,
    offline_unless_permitted,
    quietly_seeded,
    tensors_only,
)


def load(spec: ModelSpec) -> Classifier:
    """Return an image classifier of transformers, with its processor's preprocessing and its configuration's labels.

    It is read from a folder, or from the cache of the Hugging Face hub, and fetched only where that was permitted.

    Raises:
        ImportError: transformers is not installed, or does not fit the torch that is.
        ValueError: no such model on this machine and no permission to fetch it, no image classifier, one whose head was
            not trained, or one without a processor where size and normalisation were not given.
    """
    transformers = needed(spec, "transformers", "transformers")
    where = {"local_files_only": not spec.download, "trust_remote_code": spec.allow_code}
    argument = f"source {spec.source!r}"
    with _quiet(transformers), offline_unless_permitted(spec), quietly_seeded(), tensors_only():
        try:
            config = transformers.AutoConfig.from_pretrained(spec.name, **where)
        except Exception as error:  # no such folder or repository, no connection, no configuration in it
            _refuse_absent(spec, error)
        auto = transformers.AutoModelForImageClassification
        try:
            if spec.weights is None:
                found = auto.from_pretrained(spec.name, config=config, dtype=torch.float32, output_loading_info=True, **where)
                network, missing = found[0], sorted(found[1]["missing_keys"])
            else:
                network, missing = auto.from_config(config, trust_remote_code=spec.allow_code), []
        except ImportError as error:  # transformers imports an architecture, and what it needs, when it is asked for
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            refuse(WHERE, argument, "be of a library that can be imported, transformers", first_line(cause), ImportError)
        except Exception as error:
            refuse(WHERE, argument, "be an image classifier", first_line(error))
    if missing:
        refuse(WHERE, argument, "have trained weights for all of it", f"none for {', '.join(missing[:3])}")
    if spec.weights is not None and not spec.random:
        load_weights(spec, network)
    size, mean, std, fraction, resample = _preprocessing(spec, transformers, where)
    labels = [str(config.id2label[index]) for index in range(config.num_labels)]
    return classifier(
        spec,
        Logits(network, "logits"),
        name=Path(spec.name).name,
        size=size,
        mean=mean,
        std=std,
        crop_fraction=fraction,
        resample=resample,
        class_names="imagenet" if len(labels) == 1000 and labels[0].casefold().startswith("tench") else labels,
        classes=len(labels),
    )


def _preprocessing(
    spec: ModelSpec, transformers: Any, where: dict[str, bool]
) -> tuple[tuple[int, int], tuple[float, ...], tuple[float, ...], float, Any]:
    """Return size, mean, std, crop fraction and filter of a model's image processor.

    What a processor does to values is seen in what it makes of a black and a white image: its settings do not say it
    all (EfficientNet's divides by the deviation twice, or not at all).
    """
    with _quiet(transformers), offline_unless_permitted(spec):
        try:
            processor = transformers.AutoImageProcessor.from_pretrained(spec.name, **where)
        except Exception as error:  # no file of its settings
            if spec.size is None or spec.mean is None or spec.std is None:
                requirement = "come with an image processor, or be given size and normalize"
                refuse(WHERE, f"source {spec.source!r}", requirement, first_line(error))
            return spec.size, spec.mean, spec.std, 1.0, "bicubic"
        return preprocessing_of(processor)


def preprocessing_of(processor: Any) -> tuple[tuple[int, int], tuple[float, ...], tuple[float, ...], float, Any]:
    """Return size, mean, std, crop fraction and filter of an image processor, by what it makes of a black and a white image."""
    levels = []
    for level in (0, 255):
        picture = Image.fromarray(np.full((512, 512, 3), level, dtype=np.uint8))
        levels.append(processor(picture, return_tensors="pt")["pixel_values"].double())
    black, white = levels
    height, width = (int(side) for side in black.shape[-2:])
    centre = (0, slice(None), height // 2, width // 2)
    std = 1 / (white - black)[centre]
    mean = -black[centre] * std
    # (x - 0.485) / 0.229 in float32 and back: what is within its rounding of a number of four digits was that number
    rounded = [tuple(_written(float(value)) for value in values) for values in (mean, std)]
    return (height, width), rounded[0], rounded[1], _fraction(processor, (height, width)), _filter(processor)


def _written(value: float) -> float:
    """Return the number of at most 8 digits that somebody wrote into a file, and float32 arithmetic blurred."""
    short = round(value, 6)
    return short if abs(short - value) < 1e-6 else value


def _fraction(processor: Any, size: tuple[int, int]) -> float:
    """Return the share of a photo's short side that a processor keeps."""
    if getattr(processor, "crop_pct", None):  # ConvNeXt's: small images are cropped, those of 384 and more are squeezed
        return float(processor.crop_pct) if min(size) < 384 else 1.0
    if not getattr(processor, "do_center_crop", False) or not getattr(processor, "do_resize", True):
        return 1.0
    resized = processor.size
    short = resized.get("shortest_edge") or min(resized.get("height") or min(size), resized.get("width") or min(size))
    return min(1.0, min(size) / int(short))


def _filter(processor: Any) -> Any:
    """Return the name of a processor's filter."""
    number = getattr(processor, "resample", None)
    try:
        return Image.Resampling(int(number)).name.lower() if number is not None else "bicubic"
    except (TypeError, ValueError):
        return str(getattr(number, "value", "bicubic"))


def _refuse_absent(spec: ModelSpec, error: Exception) -> NoReturn:
    if isinstance(error, OSError) and not spec.download and not Path(spec.name).is_dir():
        requirement = "be a folder, or a model on this machine, or be fetched (download=True, --download)"
        refuse(WHERE, f"source {spec.source!r}", requirement, "none in the cache of the Hugging Face hub", FileNotFoundError)
    refuse(WHERE, f"source {spec.source!r}", "be a folder or repository with an image classifier", first_line(error))


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Keep the library from writing bars and advice between our lines."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
