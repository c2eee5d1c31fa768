"""Further arguments of a model: what goes with its image, and what belongs to all of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor

from pysal._checks import refuse
from pysal.engine.model.rows import map_entries, row_tensors, take_rows
from pysal.engine.running.states import outside_inference


@dataclass(frozen=True, eq=False)
class PerImage:
    """An extra input that has a row for each image: an age, a question, the tokens of a caption.

    Rows go with their image wherever a pass holds several steps or changed versions of it.

    Attributes:
        value: a tensor or array (B, ...), a list of B entries, or a container (mapping, list, dataclass) of tensors (B, ...),
            whose other entries are handed over as they are.

    Example:
        >>> import pysal
        >>> def brightness(images, age):
        ...     return (images.mean((1, 2, 3)) * age)[:, None]
        >>> images, age = torch.rand(2, 3, 8, 8), torch.tensor([30.0, 60.0])
        >>> pysal.gradient(brightness, images, extra_inputs=[pysal.PerImage(age)]).shape
        torch.Size([2, 3, 8, 8])
    """

    value: Any


@dataclass(frozen=True, eq=False)
class Shared:
    """An extra input that is the same for all images: a table of text embeddings, a bank of prototypes.

    Attributes:
        value: anything; it is handed to the model as it is, however many rows a pass has.
    """

    value: Any


ExtraInputs: TypeAlias = Sequence[Any] | Mapping[str, Any] | PerImage | Shared
Pick: TypeAlias = Callable[[Tensor], Any]


class ExtraArguments:
    """The extra inputs of a call, for any rows of its images.

    Numbers, texts and whatever is not as long as there are images belong to all. What is as long could be either, also
    where there is one image, and must be said: `PerImage` or `Shared`, around a value or around all of them.

    Args:
        where: the public name of the method, for errors.
        given: arguments by position or by name.
        images: number of images B.

    Raises:
        TypeError: no sequence or mapping.
        ValueError: a value as long as there are images without a word whose it is, or one that is said to have a row for
            each image and has not.
    """

    def __init__(self, where: str, given: ExtraInputs, images: int) -> None:
        self._by_name, self._picks = False, dict[Any, Pick]()
        if given == () and isinstance(given, tuple):
            return  # as in most calls
        values, word = (given.value, type(given)) if isinstance(given, (PerImage, Shared)) else (given, None)
        if isinstance(values, (str, bytes, Tensor)) or not isinstance(values, (Sequence, Mapping)):
            refuse(where, "extra_inputs", "be a sequence or a mapping", type(values).__name__, TypeError)
        named = values.items() if isinstance(values, Mapping) else enumerate(values)
        self._by_name = isinstance(values, Mapping)
        for name, value in named:
            said = value if word is None or isinstance(value, (PerImage, Shared)) else word(value)
            self._picks[name] = _pick(where, f"extra_inputs[{name!r}]", said, images)

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._picks)

    def of(self, rows: Tensor) -> tuple[Sequence[Any], Mapping[str, Any]]:
        """Return the arguments by position and by name of rows (N,) of the images."""
        found = {name: pick(rows) for name, pick in self._picks.items()}
        return ((), found) if self._by_name else (list(found.values()), {})


def ordinary(tensor: Tensor) -> Tensor:
    """Return a tensor that autograd and in-place operations accept, also where the caller is in torch.inference_mode."""
    return tensor.clone() if tensor.is_inference() else tensor


def _pick(where: str, argument: str, value: Any, images: int) -> Pick:
    """Return what hands over a value for the rows of a pass."""
    if isinstance(value, Shared):
        return _whole(value.value)
    if isinstance(value, PerImage):
        return _per_image(where, argument, value.value, images)
    if _is_rows(value, images) or (isinstance(value, (list, tuple)) and len(value) == images):
        requirement = "be pysal.PerImage(...) or pysal.Shared(...) where it is as long as there are images"
        shape = f"shape {tuple(value.shape)}" if isinstance(value, (Tensor, np.ndarray)) else f"{len(value)} entries"
        refuse(where, argument, requirement, f"{shape} for {images} image{'s' * (images != 1)}")
    parts: dict[Any, Pick] = {}

    def part(key: Any, entry: Any) -> Any:
        parts[key] = _pick(where, f"{argument}[{key!r}]", entry, images)
        return entry

    map_entries(value, part)
    if not parts:
        return _whole(value)
    return lambda rows: map_entries(value, lambda key, _: parts[key](rows))


def _per_image(where: str, argument: str, value: Any, images: int) -> Pick:
    listed = isinstance(value, (list, tuple))
    inside = row_tensors(value, images)
    if listed and len(value) == images:
        if inside:
            requirement = "be one tensor, or a list of something else, where a list of tensors is as long as they are"
            refuse(where, argument, requirement, f"{images} entries of {images} rows")
        return lambda rows: type(value)(value[row] for row in rows.tolist())
    if not inside:
        got = f"shape {tuple(value.shape)}" if isinstance(value, (Tensor, np.ndarray)) else type(value).__name__
        got = f"{len(value)} entries" if listed else got
        refuse(where, argument, f"have a row for each of the {images} images where it is pysal.PerImage", got)
    others = [tuple(one.shape) for one in _tensors(value) if one.ndim and not _is_rows(one, images)]
    if others:
        requirement = f"hold tensors with a row for each of the {images} images alone where it is pysal.PerImage"
        refuse(where, argument, requirement, f"shape {others[0]}")
    return lambda rows: take_rows(value, rows, images)


def _whole(value: Any) -> Pick:
    kept = outside_inference(lambda: _ordinary_inside(value))
    return lambda rows: kept


def _ordinary_inside(value: Any) -> Any:
    if isinstance(value, Tensor):
        return ordinary(value)
    if not any(isinstance(one, Tensor) and one.is_inference() for one in _tensors(value)):
        return value  # as it is, not a copy of it
    return map_entries(value, lambda _, entry: _ordinary_inside(entry))


def _is_rows(value: Any, images: int) -> bool:
    return isinstance(value, (Tensor, np.ndarray)) and value.ndim > 0 and len(value) == images


def _tensors(value: Any) -> list[Any]:
    """Return the tensors and arrays in a value."""
    if isinstance(value, (Tensor, np.ndarray)):
        return [value]
    found: list[Any] = []

    def note(_: Any, entry: Any) -> Any:
        found.extend(_tensors(entry))
        return entry

    map_entries(value, note)
    return found
