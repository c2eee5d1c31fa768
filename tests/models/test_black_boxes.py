"""Models that nothing flows back through: scikit-learn and ONNX Runtime, asked for their answers alone."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import sklearn.ensemble
import sklearn.linear_model
import torch

import pysal
from pysal import targets
from tests.models.networks import Small, drawn
from tests.models.onnx_file import write

GRID = pysal.Grid(2, 2)
RANDOM = np.random.default_rng(0)
PICTURES = RANDOM.random((40, 1, 8, 8)).astype(np.float32)
# 1 where the upper left corner is bright
LABELS = (PICTURES[:, 0, :4, :4].mean((1, 2)) > 0.5).astype(int)


def flat(images: Any) -> Any:
    return images.reshape(len(images), -1)


def drops_of(predict: Any, image: torch.Tensor, column: int) -> torch.Tensor:
    """Leave-one-out by hand: a black quarter after the other."""
    before, drops = predict(image.numpy())[0, column], []
    for top in (0, 4):
        for left in (0, 4):
            hidden = image.clone()
            hidden[..., top : top + 4, left : left + 4] = 0
            drops.append(before - predict(hidden.numpy())[0, column])
    return torch.tensor(np.array(drops), dtype=torch.float32)


@pytest.mark.parametrize("kind", ["forest", "logistic"])
def test_scikit_learn(kind: str) -> None:
    made = {
        "forest": lambda: sklearn.ensemble.RandomForestClassifier(20, random_state=0),
        "logistic": sklearn.linear_model.LogisticRegression,
    }
    fitted = made[kind]().fit(flat(PICTURES), LABELS)

    def predict(images: Any) -> Any:
        return fitted.predict_proba(flat(images))

    image = torch.from_numpy(PICTURES[:1].copy())
    model = pysal.numpy_model(predict)
    model.class_names = ["dark", "bright"]  # type: ignore[attr-defined]
    found = pysal.explain(model, image, "bright", score="probability")
    assert list(found.results) == ["leave_one_out"]
    assert len(found.skipped) == 7
    maps = pysal.leave_one_out(model, image, "bright", segments=GRID, fill="black", score="probability")
    expected = drops_of(predict, image, 1)
    torch.testing.assert_close(maps[0, 0, ::4, ::4].flatten(), expected, rtol=1e-5, atol=1e-6)
    again = pysal.leave_one_out(model, image, targets.Output(1), segments=GRID, fill="black")
    torch.testing.assert_close(again, maps)


def test_onnx_runtime(tmp_path: Path) -> None:
    """What the file's network answers is what its session answers; a session of several outputs is told by place."""
    network = drawn(lambda: Small(3))
    write(network, tmp_path / "small.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "small.onnx")
    name = session.get_inputs()[0].name
    shape = session.get_inputs()[0].shape

    def run(images: Any) -> Any:
        if isinstance(shape[0], int):
            return np.concatenate([session.run(None, {name: one[None]})[0] for one in images])
        return session.run(None, {name: images})[0]

    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    maps = pysal.leave_one_out(pysal.numpy_model(run), image, 1, segments=GRID, score="logit")
    torch.testing.assert_close(maps, pysal.leave_one_out(network, image, 1, segments=GRID, score="logit"), rtol=1e-3, atol=1e-5)

    def detector(images: Any) -> Any:  # a list of what was found, as a service has it
        scores = torch.from_numpy(run(images.numpy())).softmax(1)
        boxes = torch.tensor([[0.0, 0.0, 32.0, 32.0], [32.0, 32.0, 64.0, 64.0], [0.0, 32.0, 32.0, 64.0]])
        labels = torch.arange(3)
        return [{"boxes": boxes, "labels": labels, "scores": one} for one in scores]

    best = int(torch.from_numpy(run(image.numpy())).argmax())
    by_box = pysal.leave_one_out(detector, image, targets.Box(0), segments=GRID)
    by_class = pysal.leave_one_out(network, image, best, segments=GRID, score="probability")
    torch.testing.assert_close(by_box, by_class, rtol=1e-3, atol=1e-5)
