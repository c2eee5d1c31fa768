"""Apps of somebody else's, with explanations added: the first argument says which is served."""

import sys
from typing import Any

import gradio
import numpy as np

import pysal
from tests.demo.small import classifier


def classify(picture: np.ndarray[Any, Any]) -> dict[str, float]:
    """How bright the left and the right half are: a classifier that knows nothing of explanations."""
    left, right = (float(half.mean()) / 255 + 0.01 for half in np.split(picture[:, : picture.shape[1] // 2 * 2], 2, axis=1))
    return {"left": left / (left + right), "right": right / (left + right)}


def interface() -> gradio.Blocks:
    """An Interface of a function."""
    return pysal.gradio.add_explanations(gradio.Interface(classify, gradio.Image(), gradio.Label()), segments=12)


def blocks() -> gradio.Blocks:
    """A page of one's own, of a torch model that is explained by all methods."""
    model = classifier()

    def answer(path: str) -> str:
        scores = model(pysal.read_image(path, model))
        return model.class_names[int(scores.argmax())]

    with gradio.Blocks() as page:
        picture, said = gradio.Image(type="filepath"), gradio.Textbox(label="Answer")
        picture.change(answer, picture, said)
        pysal.gradio.explanations(answer, picture, model=model, methods=["gradient", "grad_cam"], label="Why?")
    return page


if __name__ == "__main__":
    _, address, _ = {"interface": interface, "blocks": blocks}[sys.argv[1]]().launch(prevent_thread_lock=True, quiet=True)
    print(address, flush=True)
    sys.stdin.read()
