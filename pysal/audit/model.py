"""The model of an audit: by name, by a function that makes it, or as an object; loaded in each worker, told apart by hashes."""

import hashlib
import importlib
import importlib.util
import pickle
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pysal import models
from pysal._checks import refuse


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from; small enough to be sent to each worker.

    Attributes:
        spec: a name that `pysal.models.load` knows, or "module:function", "file.py:function"; None for an object.
        content: the object, pickled; None for a spec.
    """

    spec: str | None
    content: bytes | None = None

    @classmethod
    def of(cls, where: str, model: object) -> "ModelSource":
        """Return the source of what a caller gave.

        Raises:
            TypeError: neither text nor a module that can be sent to other processes.
        """
        if isinstance(model, str):
            return cls(model)
        if not isinstance(model, nn.Module):
            refuse(where, "model", "be a name, 'module:function' or an nn.Module", type(model).__name__, TypeError)
        try:
            return cls(None, pickle.dumps(model))
        except (pickle.PicklingError, AttributeError, TypeError, RuntimeError) as error:
            got = f"{type(model).__name__} ({error}); give 'module:function' instead"
            refuse(where, "model", "be sent to other processes by pickle", got, TypeError)

    def load(self, where: str, device: str) -> nn.Module:
        """Return the model on a device.

        Raises:
            ValueError, ModuleNotFoundError: there is no such model, module or function.
            TypeError: the function does not return an nn.Module.
        """
        if self.content is not None:
            module: object = pickle.loads(self.content)
        elif self.spec is not None and ":" in self.spec and self.spec.partition(":")[0] not in models.LIBRARIES:
            module = _make(where, self.spec)
        else:
            module = models.load(str(self.spec))
        if not isinstance(module, nn.Module):
            refuse(where, "model", "return an nn.Module", type(module).__name__, TypeError)
        return module.to(device)


def _make(where: str, spec: str) -> Any:
    place, _, name = spec.rpartition(":")
    if place.endswith(".py"):
        path = Path(place)
        if not path.is_file():
            refuse(where, "model", "name a file that is there", f"{place}")
        found = importlib.util.spec_from_file_location(path.stem, path)
        assert found is not None
        assert found.loader is not None
        module = importlib.util.module_from_spec(found)
        sys.modules.setdefault(path.stem, module)  # where classes of the model are looked up
        found.loader.exec_module(module)
    else:
        try:
            module = importlib.import_module(place)
        except ModuleNotFoundError as error:
            refuse(where, "model", "name a module that can be imported", f"{spec!r} ({error})")
    function = getattr(module, name, None)
    if not callable(function):
        refuse(where, "model", "name a function of that module", repr(spec))
    return function()


def architecture_sha256(model: nn.Module) -> str:
    """Return a hash of what a model is made of, as it shows itself; addresses in memory do not count."""
    return hashlib.sha256(re.sub(r"0x[0-9a-f]+", "", repr(model)).encode()).hexdigest()


def weights_sha256(model: nn.Module) -> str:
    """Return a hash of the names, kinds, shapes and values of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted({**dict(model.named_parameters()), **dict(model.named_buffers())}.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
