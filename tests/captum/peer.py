"""Runs the peer and ours side by side and keeps the largest difference of each class."""

from typing import Any

import captum.attr
import torch
from torch import Tensor

import pysal.captum

# class -> (cases compared, largest relative difference)
FOUND: dict[str, tuple[int, float]] = {}


# What captum says on every call, and what its users know.
IGNORED = [
    "ignore:Setting backward hooks on ReLU activations",
    "ignore:Input Tensor . did not already require gradients",
    "ignore:Input Tensor . has a dtype of",
    "ignore:Internal batch size cannot be less",
]


def peers(name: str, *arguments: Any, **ours: Any) -> tuple[Any, Any]:
    """captum's object and ours, ours with further keywords."""
    return getattr(captum.attr, name)(*arguments), getattr(pysal.captum, name)(*arguments, **ours)


def tensors(answer: Any) -> list[Tensor]:
    """The tensors of an answer, also of (attributions, delta)."""
    return [part for one in answer for part in tensors(one)] if isinstance(answer, tuple) else [answer.detach()]


def shape(answer: Any) -> Any:
    """An answer's tuples, shapes and dtypes."""
    return tuple(map(shape, answer)) if isinstance(answer, tuple) else (tuple(answer.shape), answer.dtype)


def difference(expected: Any, found: Any) -> float:
    """Largest difference of two answers relative to the largest value of the first."""
    assert shape(found) == shape(expected)
    largest = max(_largest(one) for one in tensors(expected)) or 1.0
    pairs = zip(tensors(expected), tensors(found), strict=True)
    return max(_largest(_wide(one) - _wide(other)) for one, other in pairs) / largest


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.complex128 if values.is_complex() else torch.float64)


def _largest(values: Tensor) -> float:
    return float(_wide(values).abs().max()) if values.numel() else 0.0


def agree(name: str, expected: Any, found: Any, tolerance: float) -> None:
    """Hold an answer against the peer's and note the difference."""
    error = difference(expected, found)
    count, worst = FOUND.get(name, (0, 0.0))
    FOUND[name] = (count + 1, max(worst, error))
    assert error <= tolerance, f"{name}: off by {error:.2e} of the largest value"


def both(name: str, pair: tuple[Any, Any], tolerance: float, *args: Any, **kwargs: Any) -> Any:
    """Call both `attribute`s, the random state the same, and compare; return our answer."""
    answers = []
    for one in pair:
        torch.manual_seed(0)
        answers.append(one.attribute(*args, **kwargs))
    agree(name, *answers, tolerance)
    return answers[1]
