"""`pysal explain --model` for each kind of source, in process."""

import warnings
from pathlib import Path

import pytest
import torch
import transformers
from click.testing import CliRunner

from pysal.cli import METHOD_NAMES, main
from pysal.explanation import Explanation
from tests.models.networks import Small, drawn
from tests.models.onnx_file import write

PHOTO = Path(__file__).parents[2] / "pysal/data/photos" / "chelsea.jpg"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    small = drawn(Small)
    images = torch.rand(2, 3, 32, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(small), folder / "small.pt")
        torch.export.save(torch.export.export(small, (images[:1],)), folder / "small.pt2")
    write(small, folder / "small.onnx")
    (folder / "small.py").write_text(
        "from tests.models.networks import Small, drawn\n\ndef small():\n    return drawn(Small)\n"
    )
    (folder / "names.txt").write_text("ant\nbee\ncat\ndog\nelk\n")
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], id2label=dict(enumerate("abcde")))
    drawn(lambda: transformers.ResNetForImageClassification(config)).save_pretrained(folder / "resnet")
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / "resnet")
    return folder


ABOUT = ["--size", "32", "--normalize", "imagenet", "--classes", "names.txt"]
SOURCES = {
    "small.pt": ABOUT,
    "small.pt2": ABOUT[2:],
    "small.onnx": ["--size", "32x32", "--normalize", "0.5/0.25,0.25,0.25", "--classes", "names.txt"],
    "small.py:small": [*ABOUT, "--allow-code"],
    "transformers:resnet": ["--normalize", "none"],
    "torchvision:squeezenet1_1": ["--weights", "random", "--size", "64"],
    "timm:mobilenetv3_small_050": ["--weights", "random", "--size", "64"],
}


# TorchScript runs no hooks; the network of timm has Hardswish
SKIPPED = {
    "small.pt": {"grad_cam", "guided_grad_cam"},
    "timm:mobilenetv3_small_050": {"guided_backprop", "guided_grad_cam"},
}


@pytest.mark.parametrize(("target", "name"), [("pixel:3,4/dog", "dog at (3, 4)"), ("mask:", "class where it is predicted")])
def test_a_segmenter_of_a_python_file(target, name, tmp_path, monkeypatch) -> None:
    """What answers with something else than classes is explained by a target, and asks for one without."""
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(
        "import torch\n\nclass Net(torch.nn.Module):\n"
        "    def forward(self, images):\n        return {'out': 2 * images}\n\ndef make():\n    return Net()\n"
    )
    Path("names.txt").write_text("cat\ndog\ncow\n")
    given = ["explain", str(PHOTO), "--model", "net.py:make", "--allow-code", "--size", "16", "--normalize", "none"]
    given += ["--classes", "names.txt", "--method", "gradient", "--out", "out"]
    result = CliRunner().invoke(main, [*given, "--target", target])
    assert result.exit_code == 0, result.output
    found = Explanation.load("out")
    assert found.target_names == [name]
    torch.testing.assert_close(found.maps["gradient"].sum(), torch.tensor(2.0))  # of a mean over pixels, or of one
    refused = CliRunner().invoke(main, given)
    assert refused.exit_code == 2
    assert "pysal.targets.Pixel(...)" in refused.stderr


@pytest.mark.parametrize("source", SOURCES)
def test_explain(source, folder, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    few = ["--segments", "grid:2x2", "--steps", "2", "--samples", "2"]
    result = CliRunner().invoke(
        main, ["explain", str(PHOTO), "--model", source, *SOURCES[source], *few, "--out", str(tmp_path)]
    )
    assert result.exit_code == 0, result.output
    found = Explanation.load(tmp_path / "chelsea.npz")
    side = 64 if "--weights" in SOURCES[source] else 32
    assert found.images.shape == (1, 3, side, side)
    if source.startswith("small"):
        assert found.target_names[0] in ["ant", "bee", "cat", "dog", "elk"]
    skipped = SKIPPED.get(source, set())
    assert set(found.skipped) == skipped
    assert set(found.results) == set(METHOD_NAMES) - skipped


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--model", "small.pt", "--size", "big"],
         "pysal: --size must be pixels, as in 224 or 224x320 (height x width), got 'big'"),
        (["--model", "small.pt", "--size", "32", "--normalize", "a/b"],
         "pysal: --normalize must be imagenet, none or MEAN/STD, as in 0.5,0.5,0.5/0.5,0.5,0.5, got 'a/b'"),
        (["--model", "small.pt", *ABOUT[:4], "--classes", "no.txt"],
         "pysal: --classes must be imagenet or a text file, got no.txt (No such file or directory)"),
        (["--model", "small.py:small", *ABOUT], "pysal.models.load: allow_code must be True (--allow-code) for a Python file, "
         "which will be run, got False for small.py:small"),
        (["--model", "small.pt"],
         "pysal.models.load: size must be given for a file that does not say which images it takes (224, say), got None"),
        (["--model", "transformers:somebody/else"],
         "pysal.models.load: source 'transformers:somebody/else' must be a folder, or a model on this machine, "
         "or be fetched (download=True, --download), got none in the cache of the Hugging Face hub"),
        (["--model", "gone.onnx", *ABOUT],
         "pysal.models.load: source must be a readable file, got gone.onnx (No such file or directory)"),
    ],
)  # fmt: skip
def test_sentences(arguments, sentence, folder, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    result = CliRunner().invoke(main, ["explain", str(PHOTO), *arguments, "--out", str(tmp_path / "out")])
    assert (result.exit_code, result.output) == (2, f"{sentence}\n")
    assert not (tmp_path / "out").exists()
