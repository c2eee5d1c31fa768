"""TorchScript files: `classifier.pt`, written by torch.jit.save."""

import warnings
import zipfile
from pathlib import Path

import torch

from pysal._checks import refuse
from pysal.models.classifier import Classifier
from pysal.models.request import WHERE, Request, first_line, from_file, refuse_file


def load(request: Request) -> Classifier:
    """Return the classifier in a TorchScript file.

    A file of weights, or a pickled module, is refused: the first needs its architecture, the second could run any code.

    Raises:
        ValueError: no such file, or none of TorchScript; its size or normalisation is not given.
    """
    path = Path(request.name)
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        refuse_file("source", path, error)
    if not _is_script(path):
        requirement = "be a TorchScript file (weights alone are loaded into an architecture: weights=, --weights)"
        refuse(WHERE, "source", requirement, path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of TorchScript as a whole
            network = torch.jit.load(path, map_location="cpu")
    except (RuntimeError, ValueError) as error:
        refuse(WHERE, "source", "be a TorchScript file", f"{path} ({first_line(error)})")
    return from_file(request, network)


def _is_script(path: Path) -> bool:
    """Whether a file is a zip archive that holds code of TorchScript."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.split("/", 1)[-1].startswith("code/") for name in archive.namelist())
    except zipfile.BadZipFile:
        return False
