"""Lets torchvision be imported beside a torch without CUDA.

PyPI has torchvision for Linux only with CUDA. Beside a torch without CUDA its compiled library cannot be loaded; torchvision
goes on without it, and stops where it registers fake kernels of two ops that nobody has defined. No classifier calls them:
they are for detection. Defined here by their signatures alone, without a kernel, they let the import go on; who called one
would be told that it has none. Only where torchvision's own library cannot be loaded is anything done.
"""

import ctypes
import importlib.util
from pathlib import Path

import torch

OPS = ("nms", "qnms")
SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"

_library: torch.library.Library | None = None


def loads() -> bool:
    """Whether torchvision's own library can be loaded, which defines the ops itself."""
    spec = importlib.util.find_spec("torchvision")
    assert spec is not None, "torchvision is missing: make setup installs it"
    assert spec.origin is not None
    for path in Path(spec.origin).parent.glob("_C*.so"):
        try:
            ctypes.CDLL(str(path))
        except OSError:
            return False
        return True
    return False


def define() -> None:
    """Define the missing ops, once, where torchvision's own library cannot be loaded."""
    global _library
    if _library is None and not loads():
        _library = torch.library.Library("torchvision", "FRAGMENT")
        for name in OPS:
            _library.define(name + SIGNATURE)
