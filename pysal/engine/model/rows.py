"""Rows of what models take and return: tensors of one row per image, in whatever containers."""

import copy
import dataclasses
import types
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def rows_exported(model: object) -> int | None:
    """Return 1 of a program of torch.export that was exported for one image at a time; None of all else."""
    if not isinstance(model, torch.fx.GraphModule):
        return None
    first = next((node.meta.get("val") for node in model.graph.nodes if node.op == "placeholder"), None)
    fixed = isinstance(first, Tensor) and first.ndim > 0 and isinstance(first.shape[0], int) and first.shape[0] == 1
    return 1 if fixed else None


def map_entries(value: Any, change: Callable[[Any, Any], Any]) -> Any:
    """Return a copy of a container with `change(key, entry)` in place of each entry; anything else as it is.

    Containers are mappings, tuples, lists, dataclasses and namespaces.
    """
    if isinstance(value, Mapping):
        changed = {key: change(key, entry) for key, entry in value.items()}
        if type(value) is dict:
            return changed
        mapping = copy.copy(value)
        for key, entry in changed.items():
            mapping[key] = entry  # type: ignore[index]
        return mapping
    if isinstance(value, (list, tuple)):
        parts = [change(number, entry) for number, entry in enumerate(value)]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if isinstance(value, types.SimpleNamespace) or (dataclasses.is_dataclass(value) and not isinstance(value, type)):
        instance = copy.copy(value)
        for name, entry in vars(value).items():
            object.__setattr__(instance, name, change(name, entry))
        return instance
    return value


def map_rows(value: Any, count: int, change: Callable[[Any], Any]) -> Any:
    """Return a value in which `change` has been made to every tensor or array whose first dimension is `count`.

    Containers, and objects of classes of their own, are copied, not changed, one inside the other. A list of `count`
    mappings, as detectors return them, is one entry per row, which `change` gets as an array of objects.
    """
    if isinstance(value, (Tensor, np.ndarray)):
        return change(value) if value.ndim > 0 and len(value) == count else value
    if isinstance(value, (list, tuple)) and len(value) == count and all(isinstance(entry, Mapping) for entry in value):
        entries = np.empty(count, dtype=object)
        entries[:] = value
        return type(value)(change(entries))
    if _is_plain(value):
        instance = copy.copy(value)
        for name, entry in vars(value).items():
            if not _is_plain(entry):  # which may lead back to where it came from
                object.__setattr__(instance, name, map_rows(entry, count, change))
        return instance
    return map_entries(value, lambda _, entry: map_rows(entry, count, change))


def _is_plain(value: Any) -> bool:
    """Say whether a value is an object of a model's own class; torch's own hold more than their attributes say."""
    kind = type(value)
    own = not kind.__module__.startswith(("builtins", "torch.", "numpy")) and "__reduce_ex__" not in vars(kind)
    known = isinstance(value, (Mapping, list, tuple, nn.Module, types.SimpleNamespace)) or dataclasses.is_dataclass(value)
    return own and not known and not callable(value) and hasattr(value, "__dict__")


def row_tensors(value: Any, count: int) -> list[Tensor]:
    """Return the tensors and arrays in which `map_rows` finds `count` rows."""
    found: list[Tensor] = []

    def note(one: Any) -> Any:
        found.append(one)
        return one

    map_rows(value, count, note)
    return found


def take_rows(value: Any, rows: Tensor, count: int) -> Any:
    """Return a value with `rows` (n,) in place of the `count` rows it has; a row may be taken several times, or never."""

    def change(found: Any) -> Any:
        return found[rows.to(found.device)] if isinstance(found, Tensor) else found[rows.cpu().numpy()]

    return map_rows(value, count, change)
