"""Finds the parts of a model whose result depends on its being in training mode."""

import functools
import inspect
import weakref
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

# Methods that set or show the flag, and are not run in a pass.
_NO_PASS = {"__init__", "__repr__", "__setstate__", "__getstate__", "extra_repr", "train", "eval"}
# Which of two ways to the same numbers torch's transformers go is all that they read the flag for.
_SAME_EITHER_WAY = (nn.TransformerEncoder, nn.TransformerEncoderLayer)

_reading: "weakref.WeakKeyDictionary[type, bool]" = weakref.WeakKeyDictionary()


def training_part(model: nn.Module) -> tuple[str, nn.Module] | None:
    """Return the first part, and its name, that is in training mode and may therefore compute something else.

    The flag of most modules means nothing: that of a container built around a model in eval mode, of a convolution, of an
    exported graph. A part counts if the flag can reach its result, which takes code that reads it: its own, or that of a module
    around it, which may read the flags of what it holds. Torch's own modules read theirs alone, and some of them only where
    they have a dropout rate or running statistics.
    """
    if not any_training(model):
        return None
    pending: list[tuple[str, nn.Module, bool]] = [("", model, False)]
    seen: set[tuple[int, bool]] = set()
    while pending:
        name, module, read_from_outside = pending.pop()
        if (id(module), read_from_outside) in seen:
            continue
        seen.add((id(module), read_from_outside))
        if getattr(module, "training", False) and (read_from_outside or _depends(module)):
            return name, module
        inside = read_from_outside or (bool(module._modules) and not _is_torchs(type(module)) and _reads(module))
        prefix = f"{name}." if name else ""
        held = [(f"{prefix}{key}", child, inside) for key, child in module._modules.items() if child is not None]
        pending.extend(reversed(held))
    return None


def check_eval(where: str, model: nn.Module) -> None:
    """Refuse a model of which a part computes something else because it is in training mode.

    Raises:
        ValueError: names the part.
    """
    found = training_part(model)
    if found is not None:
        name, module = found
        part = f"module {name!r} ({type(module).__name__})" if name else type(module).__name__
        raise ValueError(f"{where}: model must be in eval mode, got {part} in training mode: call model.eval() first")


def any_training(model: nn.Module) -> bool:
    """Whether any part is in training mode; `modules()` of a deep model would take a millisecond of every call."""
    pending, seen = [model], {model}
    for module in pending:
        if getattr(module, "training", False):
            return True
        for child in module._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                pending.append(child)
    return False


def _depends(module: nn.Module) -> bool:
    """Whether a module's own result depends on its flag."""
    if _is_torchs(type(module)):
        if isinstance(module, _DropoutNd):
            return module.p > 0
        if isinstance(module, _NormBase):  # without running statistics it takes those of the batch in either mode
            return module.running_mean is not None or module.running_var is not None
        if isinstance(module, (nn.RNNBase, nn.MultiheadAttention)):
            return module.dropout > 0
        if type(module) in _SAME_EITHER_WAY:
            return False
    return _reads(module)


def _is_torchs(kind: type) -> bool:
    return kind.__module__.startswith("torch.nn.")


def _reads(module: nn.Module) -> bool:
    """Whether the code of a module says `training` anywhere; code that is not Python's may read it without saying so."""
    if isinstance(module, torch.jit.ScriptModule):
        return True
    kind = type(module)
    if kind not in _reading:
        _reading[kind] = any(_mentions(method, set()) for method in _methods(kind))
    return _reading[kind] or any(_mentions(value, set()) for value in module.__dict__.values())


def _methods(kind: type) -> Iterator[object]:
    for base in kind.__mro__:
        if base is not nn.Module and issubclass(base, nn.Module):
            yield from (value for name, value in vars(base).items() if name not in _NO_PASS)


def _mentions(value: object, seen: set[CodeType]) -> bool:
    """Whether a function, or a function of the user's that it calls by name, says `training`."""
    if isinstance(value, property):
        return any(_mentions(one, seen) for one in (value.fget, value.fset))
    if isinstance(value, functools.partial):
        return _mentions(value.func, seen)
    function: Any = inspect.unwrap(getattr(value, "__func__", value)) if callable(value) else None
    if not isinstance(function, FunctionType) or function.__code__ in seen:
        return False
    names: set[str] = set()
    pending = [function.__code__]
    while pending:
        code = pending.pop()
        seen.add(code)
        names.update(code.co_names)
        names.update(one for one in code.co_consts if isinstance(one, str))
        pending.extend(one for one in code.co_consts if isinstance(one, CodeType))
    if "training" in names:
        return True
    return any(_mentions(called, seen) for called in _called(function, names))


def _called(function: FunctionType, names: set[str]) -> Iterator[Callable[..., Any]]:
    """Return the functions that a function may call by these names, but for those of torch, which take the flag as a number."""
    spaces = [function.__globals__, inspect.getclosurevars(function).nonlocals]
    found = [space[name] for space in spaces for name in names if name in space]
    for value in found:
        for one in [value, *(getattr(value, name, None) for name in names if isinstance(value, ModuleType))]:
            if isinstance(one, FunctionType) and not one.__module__.startswith("torch."):
                yield one
