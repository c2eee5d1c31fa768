"""A function of an app as a model: what it is given is what the app's image component hands over, and every answer is read."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import pysal
from pysal.gradio.function import Function, labels_of, pixels_of
from pysal.gradio.piece import _by_function

ARRAY = np.arange(8 * 6 * 3, dtype=np.uint8).reshape(8, 6, 3)


def examples(folder: Path) -> dict[str, Any]:
    picture = Image.fromarray(ARRAY)
    picture.save(folder / "photo.png")
    return {
        "array": ARRAY,
        "grey array": ARRAY[..., 0],
        "transparent array": np.dstack([ARRAY, np.full((8, 6), 255, np.uint8)]),
        "picture": picture,
        "grey picture": picture.convert("L"),
        "transparent picture": picture.convert("RGBA"),
        "file": str(folder / "photo.png"),
        "path": folder / "photo.png",
        "editor": {"background": ARRAY, "layers": [ARRAY], "composite": ARRAY},
    }


KINDS = ("array", "grey array", "transparent array", "picture", "grey picture", "transparent picture", "file", "path", "editor")


@pytest.mark.parametrize("kind", KINDS)
def test_the_function_is_given_what_it_expects(kind: str, tmp_path: Path) -> None:
    """The unchanged image comes back to the bit, as the same kind of value."""
    example = examples(tmp_path)[kind]
    seen: list[Any] = []

    def function(before: int, value: Any, after: str) -> dict[str, float]:
        assert (before, after) == (3, "x")
        seen.append((type(value), pixels_of(value)))
        return {"a": 0.25, "b": 0.75}

    model = Function(function, example, [3, "x"], 1, None)
    pixels = pixels_of(example)
    answers = model(pixels.repeat(2, 1, 1, 1))
    assert model.class_names == ["a", "b"]
    assert torch.equal(answers, torch.tensor([[0.25, 0.75]] * 2))
    assert len(seen) == 3
    for found, value in seen:
        assert found is type(example)
        assert torch.equal(value, pixels)


@pytest.mark.parametrize(
    ("answer", "labels"),
    [
        ({"cat": 0.9, "dog": 0.1}, {"cat": 0.9, "dog": 0.1}),
        ({1: 2, "b": np.float32(1)}, {"1": 2.0, "b": 1.0}),
        ({"label": "cat", "confidences": [{"label": "cat", "confidence": 0.5}]}, {"cat": 0.5}),
        ("cat", {"cat": 1.0}),
        (3.5, {"output": 3.5}),
        (np.float64(2), {"output": 2.0}),
    ],
)
def test_answers(answer: Any, labels: dict[str, float]) -> None:
    assert labels_of(answer) == labels


@pytest.mark.parametrize("answer", [None, "", {}, {"a": "b"}, [1, 2], float("nan"), True])
def test_answers_that_are_none(answer: Any) -> None:
    with pytest.raises(
        TypeError, match=r"^pysal.gradio: the function must answer with {label: score}, a label or a number, got "
    ):
        labels_of(answer)


def brightness(value: Any) -> dict[str, float]:
    left = float(value[:, : value.shape[1] // 2].mean() / 255)
    return {"left": left, "not": 1 - left}


def test_leave_one_out_of_a_function() -> None:
    """The drop of each part's label is what the function itself loses without it."""
    image = np.zeros((8, 8, 3), np.uint8)
    image[:, :4] = 255
    found = _by_function(brightness, image, (), 0, None, pysal.Slic(2))
    assert found.target_names == ["left"]
    assert found.model_name == "brightness"
    (drops,) = found.results["leave_one_out"].details["drops"]
    assert float(drops.sum()) == 1.0  # black in place of all that is bright

    def label(value: Any) -> tuple[int, str]:
        return 7, "bright" if value.mean() > 100 else "dark"

    said = _by_function(label, image, (), 0, 1, pysal.Slic(2))
    assert said.target_names == ["bright"]


def test_functions_that_answer_step_by_step_or_later() -> None:
    def steps(value: Any) -> Any:
        yield {"left": 0.5}
        yield brightness(value)

    async def later(value: Any) -> Any:
        return brightness(value)

    async def both(value: Any) -> Any:
        yield {"left": 0.5}
        yield brightness(value)

    for function in (steps, later, both):
        assert Function(function, ARRAY, (), 0, None).scores == list(brightness(ARRAY).values())


def test_an_image_that_was_not_chosen() -> None:
    with pytest.raises(ValueError, match=r"^pysal.gradio: the image must be chosen first, got none$"):
        pixels_of(None)
