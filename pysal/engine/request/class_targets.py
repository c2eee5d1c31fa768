"""Targets that are classes: the index of each image's class, out of an index, a name, or one of them per image."""

import reprlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from pysal._checks import check_dense, refuse
from pysal.engine.model.class_names import ClassNames
from pysal.engine.request.target import Margin


class Finder:
    """Finds classes by name, and remembers that it was asked."""

    def __init__(self, where: str, names: Callable[[], ClassNames | None]) -> None:
        self._where, self._names, self._asked = where, names, False

    def __call__(self, argument: str, name: str) -> int:
        """Return the index of the class of a name."""
        known = self._names()
        if known is None:
            refuse(self._where, argument, "be a class index for a model that carries no class names", shown(name))
        self._asked = True
        return known.find(self._where, argument, name)

    @property
    def named(self) -> int | None:
        """How many classes have names, None where the model carries none."""
        known = self._names()
        return None if known is None else len(known)

    def check(self, classes: int) -> None:
        """Refuse names that are not those of the model's answers."""
        if self._asked and classes != len(self._names() or ()):
            requirement = f"be a class index where the model names {len(self._names() or ())} classes and answers {classes}"
            refuse(self._where, "target", requirement, "a name")


def shown(value: object) -> str:
    """Return a value as an error shows it: in one line, and cut where it is long."""
    return " ".join(reprlib.repr(value).split())


def classes_of(where: str, target: object, images: int, find: Callable[[str, str], int]) -> tuple[list[int], list[int] | None]:
    """Return the class of each image, and the class whose score is taken away from its."""
    if isinstance(target, Sequence) and target and all(isinstance(one, Margin) for one in target):
        target = Margin([one.a for one in target], [one.b for one in target])
    if not isinstance(target, Margin):
        return class_indices(where, "target", target, images, find), None
    first = class_indices(where, "target.a", target.a, images, find)
    second = class_indices(where, "target.b", target.b, images, find)
    for one, other in zip(first, second, strict=True):
        if one == other:
            refuse(where, "target", "be a Margin of two different classes", f"class {one} twice")
    return first, second


def class_indices(where: str, argument: str, target: object, images: int, find: Callable[[str, str], int]) -> list[int]:
    """Return the class of each image: B indices out of an index, a name, or one of them per image."""
    requirement = "be None, a class index or name, one per image, or a callable"
    if isinstance(target, Tensor):
        check_dense(where, argument, target)
        if target.dtype.is_floating_point or target.dtype.is_complex or target.dtype == torch.bool:
            refuse(where, argument, requirement, f"a tensor of dtype {str(target.dtype).removeprefix('torch.')}", TypeError)
    elif not isinstance(target, (int, float, str, bytes, Sequence, Mapping)) and hasattr(target, "__array__"):
        array = np.asarray(target)
        if array.dtype.kind not in "iuUO" and array.ndim:
            refuse(where, argument, requirement, f"an array of dtype {array.dtype}", TypeError)
        target = array if array.ndim else array.item() if array.dtype.kind in "iuUO" else target
    if isinstance(target, (Tensor, np.ndarray)):
        if target.ndim > 1:
            refuse(where, argument, f"have shape ({images},)", tuple(target.shape))
        target = target.tolist()
    if isinstance(target, str) or (isinstance(target, (int, np.integer)) and not isinstance(target, bool)):
        return [_class_index(where, argument, target, find)] * images
    if not isinstance(target, Sequence) or isinstance(target, (bytes, bytearray, memoryview)):
        refuse(where, argument, requirement, shown(target), TypeError)
    if len(target) != images:
        refuse(where, argument, f"have one index for each of the {images} images", len(target))
    return [_class_index(where, argument, value, find) for value in target]


def _class_index(where: str, argument: str, value: object, find: Callable[[str, str], int]) -> int:
    """Return the index of one class."""
    if isinstance(value, str):
        return find(argument, value)
    if isinstance(value, (Tensor, np.ndarray)) and value.ndim == 0 and not getattr(value, "is_meta", False):
        value = value.item()
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        refuse(where, argument, "hold class indices", shown(value), TypeError)
    index = int(value)
    if index < 0:
        refuse(where, argument, "be a class index of 0 or more", shown(index))
    if index >= 2**63:
        refuse(where, argument, "be a class index below 2^63", shown(index))
    return index
