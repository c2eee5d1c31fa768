"""Every ready-made target by every way to ask: each method, explain, prepare, the command line and audits agree."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import Tensor, nn

import pysal
from pysal import models, targets
from pysal.audit import Job
from pysal.cli import main
from tests.methods.calls import CALLS

SIZE = (8, 8)
NAMES = ["cat", "dog", "tree frog", "newt"]
TEXT = torch.tensor([0, 3, 1, 2])


class Network(nn.Module):
    """Convolutions under a head: what a classifier, a segmenter, a detector, a captioner and an encoder answer with."""

    def __init__(self, head: str) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())
        self.last, self.each = nn.Linear(64, 4), nn.Linear(4, 4)
        self.head = head
        generator = torch.Generator().manual_seed(0)
        for name, parameter in self.named_parameters():
            values = torch.rand(parameter.shape, generator=generator) - 0.3
            parameter.data = values if "body" in name else values / 16  # so that no sigmoid saturates

    def forward(self, images: Tensor, tokens: Tensor | None = None) -> Any:
        maps = self.body(images)
        table = self.last(nn.functional.avg_pool2d(maps, 2).flatten(1))
        places = self.each(maps.flatten(2).transpose(1, 2)[:, ::9])
        if self.head == "tokens":
            return {"logits": places[:, : 4 if tokens is None else tokens.shape[1]]}
        boxes = torch.tensor([[0.1 + 0.1 * n, 0.5, 0.3, 0.6] for n in range(8)]).expand(len(images), 8, 4)
        return {
            "table": table,
            "number": table[:, :1],
            "two heads": (table.flip(1), table),
            "maps": {"out": maps, "aux": -maps},
            "boxes": [
                {"boxes": box * 8, "labels": torch.arange(8) % 4, "scores": one.amax(1).sigmoid()}
                for box, one in zip(torch.cat([boxes[..., :2], boxes[..., :2] + 0.4], 2), places, strict=True)
            ],
            "queries": type("DetrObjectDetectionOutput", (dict,), {})(logits=places, pred_boxes=boxes),
            "yolov8": torch.cat([boxes * 8, places.sigmoid()], 2).transpose(1, 2),
            "embedding": {"image_embeds": table, "text_embeds": torch.ones(3, 4)},
        }[self.head]


WRITER = {"extra_inputs": {"tokens": pysal.Shared(TEXT[None])}}
# what is explained -> the head, the target, how the command line spells it (None: it cannot), further arguments
TARGETS: dict[str, tuple[str, Any, str | None, dict[str, Any]]] = {
    "class by index": ("table", 1, "1", {}),
    "class by name": ("table", "tree frog", "frog", {}),
    "highest class": ("table", None, "", {}),
    "one per image": ("table", [1, "cat"], None, {}),
    "margin": ("table", pysal.Margin("dog", 3), "margin:dog/3", {}),
    "contrast": ("table", targets.Contrast("dog"), "contrast:dog", {}),
    "label": ("table", targets.Label("newt", score="sigmoid"), None, {}),
    "label as it is": ("table", targets.Label("newt"), "label:newt", {}),
    "label of one of two heads": ("two heads", targets.Label(2, field=1), None, {}),
    "regression": ("number", targets.Output(), "output:0", {}),
    "pixels of the predicted mask": ("maps", targets.Pixel(), "mask:", {}),
    "pixels of a given mask": ("maps", targets.Pixel(1, mask=np.eye(8)), None, {}),
    "pixel at a point": ("maps", targets.Pixel("tree frog", at=(3, 4)), "pixel:3,4/2", {}),
    "box of a list": ("boxes", targets.Box(0), "box:0", {}),
    "box that overlaps one": ("queries", targets.Box((1, 1, 4, 7), kind="iou", least=0.1), None, {}),
    "box of a class": ("queries", targets.Box(0, of="dog"), "box:0/dog", {}),
    "box of YOLOv8": ("yolov8", targets.Box(1, layout="yolov8"), None, {}),
    "next token": ("tokens", targets.Token(2), "token:2", {}),
    "word of a caption": ("tokens", targets.Caption(TEXT, first=2, last=3), None, WRITER),
    "caption": ("tokens", targets.Caption(TEXT), None, WRITER),
    "similarity": ("embedding", targets.Similarity(torch.tensor([1.0, 2, 0, -1])), None, {}),
    "norm of an embedding": ("embedding", targets.Norm(), "norm", {}),
}
SPELT = [name for name, (_, _, spelt, _) in TARGETS.items() if spelt is not None]
OPTIONS: dict[str, Any] = {
    "leave_one_out": {"segments": pysal.Grid(2, 2)},
    "smooth_grad": {"samples": 3},
    "integrated_gradients": {"steps": 5},
    "blur_integrated_gradients": {"steps": 4, "max_sigma": 2.0},
}


def model_of(name: str) -> models.Classifier:
    head = TARGETS[name][0]
    named = {"class_names": NAMES[:3] if head == "queries" else NAMES}  # the last query is "no object"
    return models.wrap(Network(head), size=SIZE, normalize="none", **named).eval()


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for name in ("a", "b"):
        pixels = np.random.default_rng(ord(name)).integers(0, 255, (*SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return folder


def images_in(photos: Path, model: models.Classifier) -> Tensor:
    return models.read_images([str(photos / "a.png"), str(photos / "b.png")], model)


@pytest.mark.parametrize("name", TARGETS)
def test_every_method_explain_and_prepare(name: str, photos: Path) -> None:
    """Nothing is left out; explain and a prepared model say what each method says of the model as it is."""
    _, target, _, more = TARGETS[name]
    model = model_of(name)
    images = images_in(photos, model)
    found = pysal.explain(model, images, target, method_options=OPTIONS, score="logit", **more)
    assert list(found.results) == list(CALLS)
    assert not found.skipped
    assert found.scores.isfinite().all()
    assert found.maps["gradient"].flatten(1).any(1).all()
    prepared = pysal.prepare(model, images)
    again = pysal.explain(prepared, images, target, method_options=OPTIONS, score="logit", **more)
    for method, call in CALLS.items():
        own = {"score": "logit"} if method == "leave_one_out" else {}
        torch.testing.assert_close(found.maps[method], call(model, images, target, **own, **more), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(again.maps[method], found.maps[method], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", SPELT)
def test_the_command_line(name: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, target, spelt, _ = TARGETS[name]
    model = model_of(name)
    monkeypatch.setattr(models, "load", lambda *_, **__: model)
    asked = ["--target", spelt] if spelt else []
    command = ["explain", str(photos), "--out", str(tmp_path), "--methods", "gradient,leave_one_out", "--segments", "grid:2x2"]
    run = CliRunner().invoke(main, [*command, *asked])
    assert run.exit_code == 0, run.output
    own = {"leave_one_out": OPTIONS["leave_one_out"]}
    for photo in ("a", "b"):
        image = str(photos / f"{photo}.png")
        expected = pysal.explain(model, image, target, methods=["gradient", "leave_one_out"], method_options=own)
        written = pysal.Explanation.load(tmp_path / f"{photo}.npz")
        assert written.target_names == expected.target_names
        for method, map in expected.maps.items():
            torch.testing.assert_close(written.maps[method], map, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", SPELT)
def test_audits(name: str, photos: Path, tmp_path: Path) -> None:
    _, target, spelt, _ = TARGETS[name]
    model = model_of(name)
    job = Job(photos, model=model, target=spelt or "predicted", methods=["gradient"], out=tmp_path / "out", labels="none")
    assert job.run(engine="inline").explained == 2
    expected = pysal.explain(model, images_in(photos, model), target, methods="gradient", score="logit")
    (shard,) = (tmp_path / "out/shards").iterdir()
    written = pq.read_table(shard)["score"].to_numpy()
    torch.testing.assert_close(torch.tensor(written.tolist()), expected.scores, rtol=1e-4, atol=1e-6)
