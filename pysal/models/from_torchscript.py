"""TorchScript files: `classifier.pt`, written by torch.jit.save."""

import io
import warnings
from pathlib import Path

import torch

from pysal._checks import first_line, refuse
from pysal.models import contents
from pysal.models.classifier import Classifier
from pysal.models.spec import WHERE, ModelSpec, from_file, read_file


def load(spec: ModelSpec) -> Classifier:
    """Return the classifier in a TorchScript file.

    A file of weights, or a pickled module, is refused: the first needs its architecture, the second could run any code.

    Raises:
        PermissionError: its code does more than compute, and running code was not permitted.
        ValueError: no such file, or none of TorchScript; its size or normalisation is not given.
    """
    path = Path(spec.name)
    content = read_file("source", path)
    if not any(name.startswith("code/") for name in contents.records(content)):
        requirement = "be a TorchScript file (weights alone are loaded into an architecture: weights=, --weights)"
        refuse(WHERE, "source", requirement, path)
    contents.check_script(spec, content)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of TorchScript as a whole
            network = torch.jit.load(io.BytesIO(content), map_location="cpu")
    except (RuntimeError, ValueError) as error:
        refuse(WHERE, "source", "be a TorchScript file", f"{path} ({first_line(error)})")
    return from_file(spec, network)
