"""The model of an audit: by name, by a function that makes it, or as an object; loaded in each worker, told apart by hashes."""

import hashlib
import importlib
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from pysal import models
from pysal._checks import refuse

# Arguments of `pysal.models.load` that let a model do more than compute: ask the network, run code.
PERMISSIONS = ("download", "allow_code")


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from; small enough to be sent to each worker.

    Attributes:
        spec: what `pysal.models.load` knows, or "module:function" of a module that can be imported; None for an object.
        options: further arguments of `pysal.models.load`.
        content: the object, pickled; None for a spec.
        permissions: those of `options` that permit something; they stand in no manifest, for whoever goes on with a folder
            that somebody else wrote has permitted nothing.
    """

    spec: str | None
    options: dict[str, Any] = field(default_factory=dict)
    content: bytes | None = None
    permissions: dict[str, bool] = field(default_factory=dict)

    @classmethod
    def of(cls, where: str, model: object, options: Mapping[str, Any]) -> "ModelSource":
        """Return the source of what a caller gave.

        Raises:
            TypeError: neither text nor a module that can be sent to other processes, or options of what is not loaded.
        """
        if isinstance(model, str):
            if options and function_of(model):
                refuse(where, "model_options", "be left out for 'module:function'", ", ".join(options), TypeError)
            given = {name: value for name, value in options.items() if name not in PERMISSIONS}
            return cls(model, given, permissions={name: bool(options[name]) for name in PERMISSIONS if name in options})
        if not isinstance(model, nn.Module):
            refuse(where, "model", "be a name, 'module:function' or an nn.Module", type(model).__name__, TypeError)
        if options:
            refuse(where, "model_options", "be left out for a model object", ", ".join(options), TypeError)
        try:
            return cls(None, {}, pickle.dumps(model))
        except (pickle.PicklingError, AttributeError, TypeError, RuntimeError) as error:
            got = f"{type(model).__name__} ({error}); give 'module:function' instead"
            refuse(where, "model", "be sent to other processes by pickle", got, TypeError)

    def load(self, where: str, device: str) -> nn.Module:
        """Return the model on a device.

        Raises:
            TypeError, ValueError, OSError, ImportError: see `pysal.models.load`; or there is no such module or function.
        """
        if self.content is not None:
            module: object = pickle.loads(self.content)
        elif self.spec is not None and (parts := function_of(self.spec)):
            module = _make(where, self.spec, *parts)
        else:
            return models.load(str(self.spec), **{**self.options, **self.permissions}, device=device)
        if not isinstance(module, nn.Module):
            refuse(where, "model", "return an nn.Module", type(module).__name__, TypeError)
        return module.to(device)


def function_of(spec: str) -> tuple[str, str] | None:
    """Return module and function of "module:function", None for what `pysal.models.load` knows."""
    found = re.fullmatch(r"([A-Za-z_][\w.]*):(\w+)", spec)
    if found is None or found[1] in models.LIBRARIES or found[1].endswith(".py"):
        return None
    return found[1], found[2]


def is_code(spec: str) -> bool:
    """Whether a model is named by code that makes it."""
    return function_of(spec) is not None or re.fullmatch(r".+\.py:\w+", spec) is not None


def _make(where: str, spec: str, place: str, name: str) -> Any:
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
