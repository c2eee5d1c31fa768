"""A function of a Gradio app as a model: it takes what an image component hands over, and answers with labels."""

import asyncio
import inspect
import math
import numbers
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pysal._checks import refuse
from pysal.models import read_image

WHERE = "pysal.gradio"


def pixels_of(value: Any) -> Tensor:
    """Return the image (1, 1 or 3, H, W) in [0, 1] that an image component handed over: an array, a PIL image or a file.

    Raises:
        ValueError: no image.
    """
    if value is None:
        refuse(WHERE, "the image", "be chosen first", "none")
    if isinstance(value, Mapping):  # of an editor: what was drawn over the image counts too
        value = value.get("composite", value.get("background"))
    picture = value if isinstance(value, Image.Image) else None
    grey = picture.mode in ("1", "L") if picture is not None else getattr(value, "ndim", 3) == 2
    return read_image(Path(value) if isinstance(value, str) else value, channels=1 if grey else 3)


def labels_of(answer: Any) -> dict[str, float]:
    """Return the score of each label in what a function of an app answers.

    A mapping of labels to scores; the label alone, which scores 1; or a number.

    Raises:
        TypeError: none of these.
    """
    if isinstance(answer, Mapping) and answer and all(isinstance(one, numbers.Real) for one in answer.values()):
        return {str(label): float(score) for label, score in answer.items()}
    if isinstance(answer, Mapping) and isinstance(answer.get("confidences"), Sequence):  # as gr.Label has it
        return {str(one["label"]): float(one["confidence"]) for one in answer["confidences"]}
    if isinstance(answer, str) and answer.strip():
        return {answer: 1.0}
    if isinstance(answer, (numbers.Real, np.number)) and not isinstance(answer, bool) and math.isfinite(float(answer)):
        return {"output": float(answer)}
    got = " ".join(repr(answer).split())[:60]
    refuse(WHERE, "the function", "answer with {label: score}, a label or a number", got, TypeError)


def answer_of(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a function of an app answers: its last step, where it has several, awaited where it must be."""
    answer = function(*arguments)
    if inspect.isasyncgen(answer):
        answer = _last_of(answer)
    if inspect.isawaitable(answer):
        with ThreadPoolExecutor(1) as thread:  # of its own: in a notebook a loop runs in this one
            answer = thread.submit(asyncio.run, _awaited(answer)).result()
    if inspect.isgenerator(answer):
        last = None
        for last in answer:  # noqa: B007
            pass
        return last
    return answer


async def _awaited(answer: Awaitable[Any]) -> Any:
    return await answer


async def _last_of(answers: AsyncIterator[Any]) -> Any:
    last = None
    async for last in answers:  # noqa: B007
        pass
    return last


class Function:
    """A model that asks a function of an app about one image after the other.

    Args:
        function: what the app calls.
        example: what it was called with: the same kind of value is made of every changed image.
        others: its other arguments, before and after the image.
        place: where the image stands among its arguments.
        output: which of its outputs holds the labels.

    Attributes:
        class_names: the labels of the unchanged image.
        scores: of these.
    """

    def __init__(
        self, function: Callable[..., Any], example: Any, others: Sequence[Any], place: int, output: int | None
    ) -> None:
        self.function, self.example, self.others, self.place, self.output = function, example, list(others), place, output
        self.name = str(getattr(function, "__name__", type(function).__name__))
        clean = self._ask(example)
        self.class_names, self.scores = list(clean), list(clean.values())
        self._other = "another label"
        if len(clean) == 1 and self.scores == [1.0]:  # a label alone: what is explained is whether it stays
            self.class_names, self.scores = [*self.class_names, self._other], [1.0, 0.0]

    def _ask(self, value: Any) -> dict[str, float]:
        arguments = [*self.others[: self.place], value, *self.others[self.place :]]
        answer = answer_of(self.function, *arguments)
        if self.output is not None and isinstance(answer, (tuple, list)):
            answer = answer[self.output]
        return labels_of(answer)

    def __call__(self, images: Tensor) -> Tensor:
        """Return (N, K) the scores of images (N, C, H, W) in [0, 1]."""
        rows = []
        with tempfile.TemporaryDirectory(prefix="pysal-gradio-") as folder:
            for number, image in enumerate(images.cpu()):
                found = self._ask(self._like_the_example(image, Path(folder) / f"{number}.png"))
                if self._other in self.class_names and self.class_names[0] not in found:
                    found = {self._other: 1.0}
                rows.append([found.get(label, 0.0) for label in self.class_names])
        return torch.tensor(rows, dtype=torch.float32, device=images.device)

    def _like_the_example(self, image: Tensor, path: Path) -> Any:
        """Return an image (C, H, W) as the kind of value that the app's image component hands over."""
        array = (image * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
        picture = Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)
        if isinstance(self.example, Image.Image):
            return picture if picture.mode == self.example.mode else picture.convert(self.example.mode)
        if isinstance(self.example, np.ndarray):
            grey = self.example.ndim == 2
            array = array[..., 0] if grey else array
            if not grey and self.example.shape[2] == 4:
                array = np.asarray(picture.convert("RGBA"))
            return array if self.example.dtype == np.uint8 else (array / 255).astype(self.example.dtype)
        if isinstance(self.example, Mapping):
            made = {**self.example, "layers": []}
            whole = self.example.get("composite", self.example.get("background"))
            inner = Function.__new__(Function)
            inner.example = whole
            made["composite"] = made["background"] = inner._like_the_example(image, path)
            return made
        picture.save(path)
        return path if isinstance(self.example, Path) else str(path)
