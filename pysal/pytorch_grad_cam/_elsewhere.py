"""What only the peer has: it is the peer's where that is installed, and says so in a sentence where it is not."""

import importlib
from collections.abc import Callable
from typing import Any

PEER = "pytorch_grad_cam"


def falling_through(module: str) -> Callable[[str], Any]:
    """Return a module's `__getattr__` that gives the names of the peer's module of the same path."""

    def get(name: str) -> Any:
        path = ".".join(part for part in (PEER, module) if part)
        here = ".".join(part for part in ("pysal.pytorch_grad_cam", module) if part)
        if name.startswith("__"):
            raise AttributeError(f"module {here!r} has no attribute {name!r}")
        try:
            found = importlib.import_module(path)
        except ImportError as error:
            sentence = f"{here}: {name} is {path}'s own, which must be installed for it (pip install grad-cam==1.5.7)"
            raise AttributeError(f"{sentence}, got {error}") from error
        if not hasattr(found, name):
            raise AttributeError(f"module {here!r} has no attribute {name!r}, nor has {path!r}")
        return getattr(found, name)

    return get
