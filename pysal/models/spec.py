"""What a loader is asked for, and what all loaders share: permissions, weights, class names, one sentence for every failure."""

import contextlib
import importlib
import os
import pickle
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NoReturn, TypeAlias

import torch
from torch import Tensor, nn

from pysal._checks import first_line, refuse
from pysal.models.classifier import DATA, Classifier, Normalized, Resample, first_channels

WHERE = "pysal.models.load"

Normalization: TypeAlias = Literal["imagenet", "none"] | tuple[Sequence[float], Sequence[float]]
"""How a network wants its images: by ImageNet's mean and standard deviation, in [0, 1] as they are, or (mean, std)."""

# torchvision.models: the mean and standard deviation of ImageNet's training images, which most networks were trained with.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
IMAGENET_CLASSES = 1000


@dataclass(frozen=True)
class ModelSpec:
    """What `load` was asked for; None = as the source says.

    Attributes:
        source: as it was given, for errors.
        name: the part of it that names the model or file to its loader.
        weights: a file, "random", or what the source calls its published weights.
        download: whether the network may be asked for what is not on this machine.
        allow_code: whether code that comes with the model may run.
        size: (height, width) of its images.
        mean: per channel, or one for any number of them.
        std: the same.
        class_names: its classes.
    """

    source: str
    name: str
    weights: str | None = None
    download: bool = False
    allow_code: bool = False
    size: tuple[int, int] | None = None
    mean: tuple[float, ...] | None = None  # of one number: the same for any number of channels
    std: tuple[float, ...] | None = None
    class_names: tuple[str, ...] | Literal["imagenet"] | None = None

    @property
    def random(self) -> bool:
        """Whether untrained weights are wanted."""
        return self.weights == "random"

    @property
    def classes(self) -> int | None:
        """How many classes were named."""
        return (
            None if self.class_names is None else len(self.class_names) if self.class_names != "imagenet" else IMAGENET_CLASSES
        )


def classifier(
    spec: ModelSpec,
    network: nn.Module,
    *,
    name: str | None = None,
    size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    crop_fraction: float = 1.0,
    resample: Resample = "bicubic",
    class_names: Sequence[str] | Literal["imagenet"] | None = None,
    classes: int,
) -> Classifier:
    """Return the network as a classifier, in eval mode, with what was asked for in place of what the source says.

    Args:
        spec: what was asked for.
        network: takes normalised images, returns logits.
        name: of the model; None = the source.
        size: (height, width) of its images, pixels.
        mean: one number per channel of its images, in units of [0, 1] pixels.
        std: the same.
        crop_fraction: the share of a photo's short side that it sees.
        resample: the filter that its photos are resized with.
        class_names: its classes, "imagenet" for the 1000 of the challenge; None = these where it has 1000 and is
            normalised as they are, else numbers.
        classes: how many it has.

    Raises:
        ValueError: class names for another number of classes, or a normalisation for another number of channels.
    """
    channels = len(mean)
    mean, std = (_as_many(given or own, channels) for given, own in ((spec.mean, mean), (spec.std, std)))
    if len(mean) != channels:
        refuse_channels(WHERE, channels, len(mean))
    wanted = spec.class_names or class_names
    if wanted is None and classes == IMAGENET_CLASSES and tuple(mean) == IMAGENET_MEAN:
        wanted = "imagenet"
    names, synonyms = imagenet_names() if isinstance(wanted, str) else (wanted, None)
    if names is None:
        names = [f"class {index}" for index in range(classes)]
    if len(names) != classes:
        refuse(WHERE, "class_names", f"have one name for each of the model's {classes} classes", f"{len(names)} names")
    return Classifier(
        Normalized(network, mean, std),
        name=name or spec.source,
        class_names=names if spec.class_names else distinct(names),
        input_size=spec.size or size,
        crop_fraction=crop_fraction,
        resample=resample,
        synonyms=synonyms,
        rows_per_pass=network.rows if isinstance(network, FixedBatch) else None,
        channels=channels,
    ).eval()


def _as_many(values: Sequence[float], channels: int) -> Sequence[float]:
    return tuple(values) * channels if len(values) == 1 else values


def refuse_channels(where: str, channels: int, numbers: int) -> NoReturn:
    """Refuse a normalisation of images of other channels than a network takes."""
    requirement = f"be 'none', a number or one for each of the {channels} channel{'s' * (channels > 1)} that the network takes"
    refuse(where, "normalize", requirement, f"{numbers} numbers")


def channels_refused(error: Exception, given: int) -> int | None:
    """Return how many channels a convolution wanted that was given images of another number; None of other errors."""
    found = re.search(r"expected input.* to have (\d+) channels, but got (\d+) channels", str(error))
    return int(found[1]) if found is not None and int(found[2]) == given else None


def from_file(
    spec: ModelSpec,
    network: nn.Module,
    *,
    size: tuple[int, int] | None = None,
    channels: int | None = None,
    any_output: bool = False,
) -> Classifier:
    """Return a network whose file does not say how its images are prepared as a classifier, once it was seen to be one.

    Args:
        spec: says what the file does not.
        network: takes normalised images.
        size: (height, width) where the file says it.
        channels: of its images, where the file says it; None = as many as the normalisation has numbers, or its first
            convolution takes.
        any_output: whether it may answer with something else than logits of classes: boxes, pixels, an embedding.

    Raises:
        ValueError: nothing says the size or the normalisation; the network fails on an image, or returns no logits.
    """
    size = spec.size or size
    if size is None:
        refuse(WHERE, "size", "be given for a file that does not say which images it takes (224, say)", None)
    if spec.mean is None or spec.std is None:
        requirement = (
            "be given for a file, which does not say how its images were normalised ('imagenet', 'none' for images in [0, 1], "
            "or (mean, std))"
        )
        refuse(WHERE, "normalize", requirement, None)
    network.eval()
    numbers = max(len(spec.mean), len(spec.std))
    if channels is not None and numbers not in (1, channels):
        refuse_channels(WHERE, channels, numbers)
    channels = channels or (numbers if numbers > 1 else first_channels(network) or 3)
    classes = _count_classes(spec, network, (2, channels, *size), any_output)
    mean, std = (_as_many(values, channels) for values in (spec.mean, spec.std))
    if classes is None:
        names = imagenet_names()[0] if isinstance(spec.class_names, str) else spec.class_names or ()
        normalized = Normalized(network, mean, std)
        return Classifier(normalized, name=spec.source, class_names=names, input_size=size, channels=channels).eval()
    return classifier(spec, network, size=size, mean=mean, std=std, classes=classes)


def _count_classes(spec: ModelSpec, network: nn.Module, shape: tuple[int, ...], any_output: bool) -> int | None:
    """Return how many logits a network answers with; None where it may answer with something else, and does."""
    argument = f"source {spec.source!r}"
    try:
        with torch.no_grad():
            output = network(torch.zeros(shape))
    except Exception as error:  # the network's own code, which may fail in any way
        if wanted := channels_refused(error, shape[1]):
            refuse_channels(WHERE, wanted, shape[1])
        refuse(WHERE, argument, f"be a classifier of images {shape}", f"{type(error).__name__}: {first_line(error)}")
    if not isinstance(output, Tensor) or output.ndim != 2 or output.shape[0] != shape[0] or output.shape[1] < 1:
        if any_output:
            return None
        got = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        refuse(WHERE, argument, f"return logits ({shape[0]}, classes) for images {shape}", got)
    return output.shape[1]


class Logits(nn.Module):
    """A network that answers with an object or a tuple, whose logits alone are wanted."""

    def __init__(self, model: nn.Module, key: str | int) -> None:
        super().__init__()
        self.model, self.key = model, key

    def forward(self, images: Tensor) -> Any:
        """Return the logits (N, K) of images (N, C, H, W)."""
        output = self.model(images)
        return output[self.key] if isinstance(self.key, int) else getattr(output, self.key)


class FixedBatch(nn.Module):
    """A network that takes `rows` images at a time, no more and no fewer: others are handed to it in parts, filled up."""

    def __init__(self, model: nn.Module, rows: int) -> None:
        super().__init__()
        self.model, self.rows = model, rows

    def forward(self, images: Tensor) -> Tensor:
        """Return the outputs of images (N, C, H, W)."""
        parts = []
        for part in images.split(self.rows):
            missing = self.rows - len(part)
            filled = part if missing == 0 else torch.cat([part, part[-1:].expand(missing, *part.shape[1:])])
            parts.append(self.model(filled)[: len(part)])
        return torch.cat(parts)


def imagenet_names() -> tuple[list[str], list[list[str]]]:
    """Return the 1000 classes of ImageNet's challenge and the other words each is known by."""
    words = [line.split(", ") for line in (DATA / "imagenet_classes.txt").read_text("utf-8").splitlines()]
    return [first for first, *_ in words], [rest for _, *rest in words]


def distinct(names: Sequence[str]) -> list[str]:
    """Return the names, those that several classes have with their index: "crane (134)"."""
    folded = [name.casefold() for name in names]
    several = {name for name in folded if folded.count(name) > 1} if len(set(folded)) < len(folded) else set()
    return [f"{name} ({index})" if name.casefold() in several else name for index, name in enumerate(names)]


def needed(spec: ModelSpec, package: str, extra: str) -> ModuleType:
    """Return a package that an extra installs.

    Raises:
        ModuleNotFoundError: it is not installed; the sentence has the pip command.
        ImportError: it is, but does not go with what else is.
    """
    argument, command = f"source {spec.source!r}", f'pip install "pysal-saliency[{extra}]"'
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        missing = f"no {error.name} (run: {command})"
        refuse(WHERE, argument, f"be of a library that is installed, {package}", missing, ModuleNotFoundError)
    except (ImportError, RuntimeError, OSError) as error:
        refuse(WHERE, argument, f"be of a library that can be imported, {package}", first_line(error), ImportError)


@contextlib.contextmanager
def tensors_only() -> Iterator[None]:
    """Let torch.load read tensors alone, whatever a library asks it for: a pickle could run any code."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextlib.contextmanager
def offline_unless_permitted(spec: ModelSpec) -> Iterator[None]:
    """Keep huggingface_hub from asking the network, which it does on its own account even for files that are here."""
    constants: Any = importlib.import_module("huggingface_hub.constants")
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not spec.download
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@contextlib.contextmanager
def quietly_seeded() -> Iterator[None]:
    """Draw untrained weights from seed 0 and leave the random state as it was; show no warnings about initialisation."""
    generator = torch.default_generator
    before = generator.get_state()
    try:
        generator.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        generator.set_state(before)


def load_weights(spec: ModelSpec, network: nn.Module) -> None:
    """Give a network the weights of a file: a state dict, as tensors (.pth, .pt, .bin: `weights_only=True`) or safetensors.

    Raises:
        ValueError: no such file, no state dict in it, or one of another network.
    """
    path = Path(spec.weights or "")
    try:
        if path.suffix == ".safetensors":
            state = needed(spec, "safetensors.torch", "transformers").load_file(path)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of pickles it will refuse
                state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        refuse_file("weights", path, error)
    except ImportError:
        raise
    except pickle.UnpicklingError:  # in words of torch's, which say how to load the file all the same
        refuse(WHERE, "weights", "be a file of tensors", f"{path} (no pickle, or one of more than tensors)")
    except Exception as error:  # zip and safetensors each have their own
        refuse(WHERE, "weights", "be a file of tensors", f"{path} ({first_line(error)})")
    for key in ("state_dict", "model"):  # where training scripts put it
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        refuse(WHERE, "weights", "be a state dict", f"{type(state).__name__} in {path}")
    state = {name.removeprefix("module."): value for name, value in state.items()}  # of DataParallel
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        reason = reason if len(reason) <= 200 else f"{reason[:200]}..."
        refuse(WHERE, "weights", f"be those of {spec.source} (class_names= says how many classes)", f"{path} ({reason})")


def read_file(argument: str, path: Path) -> bytes:
    """Return the content of a file."""
    try:
        return path.read_bytes()
    except OSError as error:
        refuse_file(argument, path, error)


def refuse_file(argument: str, path: Path, error: OSError) -> NoReturn:
    """Refuse a file that cannot be opened."""
    kinds = (FileNotFoundError, IsADirectoryError, PermissionError)
    kind = next((kind for kind in kinds if isinstance(error, kind)), ValueError)
    refuse(WHERE, argument, "be a readable file", f"{path} ({error.strerror or first_line(error)})", kind)
