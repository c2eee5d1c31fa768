"""Models of torchvision: `torchvision:resnet50`."""

import hashlib
import re
from pathlib import Path
from typing import Any

import torch

from pysal._checks import first_line, refuse, refuse_unknown
from pysal._spelling import close_to, did_you_mean
from pysal.models.classifier import Classifier
from pysal.models.spec import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    WHERE,
    ModelSpec,
    classifier,
    load_weights,
    needed,
    quietly_seeded,
    refuse_file,
    tensors_only,
)


def load(spec: ModelSpec) -> Classifier:
    """Return a classifier of torchvision, with the preprocessing its published weights come with.

    Its weights are the default ones of torchvision, or those that `weights` names ("IMAGENET1K_V1"), from torch.hub's
    cache; or a file's, or random.

    Raises:
        ImportError: torchvision is not installed, or does not fit the torch that is.
        ValueError: no such classifier, or no such weights on this machine and no permission to download them.
    """
    models = needed(spec, "torchvision.models", "torchvision")
    known = models.list_models(module=models)
    if spec.name not in known:
        close = [repr(f"torchvision:{name}") for name in close_to(spec.name, known)]
        refuse(WHERE, "source", f"be a classifier of torchvision{did_you_mean(close)}", repr(spec.source))
    published = list(models.get_model_weights(spec.name))
    default = models.get_model_weights(spec.name).DEFAULT
    entry = next((entry for entry in published if entry.name == spec.weights), default)
    if spec.weights is None or entry.name == spec.weights:
        _check_published(spec, entry)
        with quietly_seeded(), tensors_only():
            try:
                network = models.get_model(spec.name, weights=entry)
            except Exception as error:  # no connection, a damaged file
                refuse(WHERE, "weights", "be readable", f"{entry.url} ({first_line(error)})")
        classes = len(entry.meta["categories"])
    else:
        if not spec.random and not Path(spec.weights).exists() and Path(spec.weights).suffix == "":
            names = [entry.name for entry in published]
            requirement = f"be a file, 'random' or one of {', '.join(names)}"
            refuse_unknown(WHERE, "weights", requirement, spec.weights, ["random", *names])
        classes = spec.classes or len(entry.meta["categories"])
        with quietly_seeded():
            network = models.get_model(spec.name, weights=None, num_classes=classes)
        if not spec.random:
            load_weights(spec, network)
    transforms: Any = entry.transforms()
    crop, resize = transforms.crop_size[0], transforms.resize_size[0]
    return classifier(
        spec,
        network,
        name=spec.name,
        size=(crop, crop),
        mean=tuple(getattr(transforms, "mean", IMAGENET_MEAN)),
        std=tuple(getattr(transforms, "std", IMAGENET_STD)),
        crop_fraction=min(1.0, crop / resize),
        resample=transforms.interpolation.value,
        class_names="imagenet" if list(entry.meta["categories"])[:1] == ["tench"] and classes == 1000 else None,
        classes=classes,
    )


def _check_published(spec: ModelSpec, entry: Any) -> None:
    """Refuse weights that are not on this machine, unless they may be fetched, or that are not the published ones."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(entry.url).name
    if not path.exists():
        if not spec.download:
            requirement = "be on this machine, or be fetched (download=True, --download)"
            refuse(WHERE, "weights", requirement, f"{entry} ({path} does not exist)", FileNotFoundError)
        return
    prefix = re.search(r"-([0-9a-f]{8,64})$", path.stem)
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        refuse_file("weights", path, error)
    if prefix is not None and not digest.startswith(prefix[1]):
        refuse(WHERE, "weights", f"have a SHA-256 that starts with {prefix[1]}", f"{digest[:16]}... in {path}")
