"""The code of docs/models.md runs, from top to bottom, where the files are that it names."""

import re
import warnings
from pathlib import Path

import pytest
import torch
import transformers

import pysal
from tests.models.networks import Small, drawn
from tests.models.onnx_file import write
from tests.models.test_default_layers import ARCHITECTURES

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "models.md").read_text()
BLOCKS = re.findall(r"^<!-- run by tests/models/test_page.py -->\n```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    small = drawn(lambda: Small(3))
    images = torch.rand(1, 3, 64, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(small), tmp_path / "classifier.pt")
        torch.export.save(torch.export.export(small, (images,)), tmp_path / "classifier.pt2")
    write(small, tmp_path / "classifier.onnx")
    (tmp_path / "networks.py").write_text(
        "from tests.models.networks import Small, drawn\n\ndef classifier():\n    return drawn(Small)\n"
    )
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=2)
    drawn(lambda: transformers.ResNetForImageClassification(config)).save_pretrained(tmp_path / "folder")
    transformers.ViTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path / "folder")
    names = ["cat", "dog", "bird"]
    network = pysal.models.load("torchvision:squeezenet1_1", weights="random", class_names=names).network.model
    torch.save(network.state_dict(), tmp_path / "own.pth")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_page_runs(folder) -> None:
    assert len(BLOCKS) == 8
    names: dict[str, object] = {}
    for number, block in enumerate(BLOCKS):
        exec(compile(block, f"docs/models.md, block {number}", "exec"), names)
        assert isinstance(names["model"], pysal.models.Classifier)


def test_the_layers_of_the_page_are_those_of_the_tests() -> None:
    """But for the number of a transformer's blocks, which is smaller in the tests."""
    table = PAGE.split("## The layer of Grad-CAM")[1]
    named = {
        re.sub(r"\d+\.(?=norm1|layernorm)", "N.", name)
        for name in re.findall(r"`([\w.\[\]]+)`", " ".join(re.findall(r"^\| .*$", table, re.MULTILINE)))
    }
    tested = {
        re.sub(r"^model\.", "", re.sub(r"\d+\.(?=norm1|layernorm)", "N.", layer)) for _, _, layer, _ in ARCHITECTURES.values()
    }
    assert len(named) > 10
    assert named <= tested
