"""Models of timm: `timm:resnet50.a1_in1k`."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from pysal._checks import first_line, refuse
from pysal._spelling import close_to, did_you_mean
from pysal.models.classifier import Classifier, first_channels
from pysal.models.spec import (
    IMAGENET_CLASSES,
    WHERE,
    ModelSpec,
    classifier,
    load_weights,
    needed,
    offline_unless_permitted,
    quietly_seeded,
    tensors_only,
)

# What timm calls its filters, where Pillow has another name; "random" is for training.
_FILTERS = {"random": "bicubic", "lanczos3": "lanczos"}


def load(spec: ModelSpec) -> Classifier:
    """Return a classifier of timm, with the preprocessing of its pretrained configuration.

    Its weights are those that timm publishes under this name, from the cache of the Hugging Face hub; or a file's, or
    random.

    Raises:
        ImportError: timm is not installed, or does not fit the torch that is.
        ValueError: no such classifier, or no weights of it on this machine and no permission to download them.
    """
    timm = needed(spec, "timm", "timm")
    models = needed(spec, "timm.models", "timm")
    needed(spec, "timm.data", "timm")
    if not models.is_model(spec.name):
        close = [repr(f"timm:{name}") for name in close_to(spec.name.split(".")[0], timm.list_models())]
        refuse(WHERE, "source", f"be a model of timm{did_you_mean(close)}", repr(spec.source))
    try:
        config = models.get_pretrained_cfg(spec.name)
    except RuntimeError:  # the architecture is known, the tag is not
        tags = [f"timm:{name}" for name in timm.list_pretrained(f"{spec.name.split('.')[0]}.*")]
        refuse(WHERE, "source", f"be a model of timm ({', '.join(tags[:5])})", repr(spec.source))
    arguments: dict[str, Any] = {"pretrained": False}
    if spec.weights is None:
        path = _published(spec, config)
        arguments = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path)} if path else {}}
    elif spec.classes is not None:
        arguments["num_classes"] = spec.classes
    with offline_unless_permitted(spec), quietly_seeded(), tensors_only():
        try:
            network = timm.create_model(spec.name, **arguments)
        except Exception as error:  # no connection, a damaged file, a configuration it does not like
            refuse(WHERE, f"source {spec.source!r}", "be a model that timm can make", first_line(error))
    if spec.weights is not None and not spec.random:
        load_weights(spec, network)
    if int(network.num_classes) < 1:
        refuse(WHERE, f"source {spec.source!r}", "be a classifier", "a model without a head")
    own = preprocessing_of(network)
    return classifier(
        spec,
        network,
        name=spec.name,
        size=own.size,
        mean=own.mean,
        std=own.std,
        crop_fraction=own.crop_fraction,
        resample=own.resample,
        class_names=own.class_names,
        classes=int(network.num_classes),
    )


@dataclass(frozen=True)
class Preprocessing:
    """What a model of timm was trained on: see `pysal.models.classifier.Classifier`; `channels` are those it takes."""

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_fraction: float
    resample: Any
    class_names: Sequence[str] | Literal["imagenet"] | None
    channels: int


def preprocessing_of(network: Any) -> Preprocessing:
    """Return what a model of timm says of its images and classes."""
    data = importlib.import_module("timm.data")
    settings = data.resolve_model_data_config(network)
    return Preprocessing(
        size=tuple(settings["input_size"][1:]),
        mean=tuple(settings["mean"]),
        std=tuple(settings["std"]),
        crop_fraction=min(1.0, settings["crop_pct"]),
        resample=_FILTERS.get(settings["interpolation"], settings["interpolation"]),
        class_names=_names(data, network, int(network.num_classes)),
        channels=first_channels(network) or int(settings["input_size"][0]),
    )


def _published(spec: ModelSpec, config: Any) -> Path | None:
    """Return the file of timm's weights on this machine, None where it may be fetched."""
    if config is None or not config.has_weights:
        refuse(WHERE, "weights", "be given ('random' or a file)", f"{spec.source!r}, of which timm publishes none")
    if spec.download:
        return None
    if config.hf_hub_id:
        hub = needed(spec, "huggingface_hub", "timm")
        for name in [config.hf_hub_filename] if config.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]:
            found = hub.try_to_load_from_cache(config.hf_hub_id, name)
            if isinstance(found, str):
                return Path(found)
        shown = config.hf_hub_id
    else:
        shown = str(config.file or config.url)
        found = Path(config.file or Path(torch.hub.get_dir()) / "checkpoints" / Path(str(config.url)).name)
        if found.exists():
            return found
    requirement = "be on this machine, or be fetched (download=True, --download)"
    refuse(WHERE, "weights", requirement, f"{shown} (not in the cache)", FileNotFoundError)


def _names(data: Any, network: Any, classes: int) -> Sequence[str] | Literal["imagenet"] | None:
    subset = data.infer_imagenet_subset(network)
    if subset == "imagenet-1k" and classes == IMAGENET_CLASSES:
        return "imagenet"
    if subset is None:
        return None
    labels = data.ImageNetInfo(subset)
    return [str(labels.index_to_description(index)) for index in range(classes)]
