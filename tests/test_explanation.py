"""What explain found: files that come back as they were, tables and pictures that say it, damage that is refused."""

import base64
import dataclasses
import errno
import io
import json
import math
import re
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.text import Text

from pysal.explanation import RESERVED, Explanation, MethodResult

NAN, INF = math.nan, math.inf


def explanation(count=2, channels=3, size=6, dtype=torch.float32, **changes):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)

    cut = (torch.arange(size)[:, None] // 3 * 2 + torch.arange(size)[None] // 3).expand(count, size, size).contiguous()
    drops = [random(4 - image % 2) - 0.4 for image in range(count)]  # ragged: 4, 3, 4 ... segments
    results = [
        MethodResult(
            "leave_one_out",
            "Leave-one-out",
            random(count, 1, size, size) - 0.5,
            "none",
            True,
            0.52,
            5,
            {"drops": drops, "labels": cut.to(torch.int32)},
            "probability",
        ),
        MethodResult("gradient", "Gradient", random(count, channels, size, size) - 0.5, "max_abs", False, 0.01, 1),
        MethodResult("grad_cam", "Grad-CAM", random(count, 1, size, size), "none", False, 0.02, 1, {"layer": "features.8"}),
        MethodResult(
            "integrated_gradients",
            "Integrated Gradients",
            random(count, channels, size, size) - 0.5,
            "sum",
            True,
            0.81,
            50,
            {
                "residual": torch.linspace(-0.25, 0.5, count),
                "steps": torch.full((count,), 50),
                "standard_error": random(count, 1, size, size),
                "rate": 0.125,
                "worst": NAN,
                "range": -INF,
                "ok": True,
            },
            "logit",
        ),
    ]
    fields = {
        "images": random(count, channels, size, size),
        "target": torch.arange(281, 281 + count),
        "target_names": [f"cat {image}" for image in range(count)],
        "scores": torch.linspace(0.25, 0.95, count),
        "score_kind": "probability",
        "probabilities": torch.linspace(0.25, 0.95, count),
        "results": {result.name: result for result in results},
        "skipped": {"guided_backprop": "pysal.guided_backprop: the model has no ReLU"},
        "model_name": "lite0",
        "seconds": 1.5,
        "build": {"compiled": True, "cuda": None, "archs": ("8.0",), "weird": NAN},
    }
    return Explanation(**{**fields, **changes})


def same(one, other):
    """Equality of what explanations hold: tensors with dtype and NaN, floats with NaN, the rest by ==."""
    if isinstance(one, torch.Tensor):
        return (
            isinstance(other, torch.Tensor)
            and (one.dtype, one.shape) == (other.dtype, other.shape)
            and torch.equal(torch.nan_to_num(one.double(), 7.0), torch.nan_to_num(other.double(), 7.0))
            and torch.equal(one.isnan(), other.isnan())
        )
    if dataclasses.is_dataclass(one):
        fields = [field.name for field in dataclasses.fields(one)]
        return type(one) is type(other) and all(same(getattr(one, name), getattr(other, name)) for name in fields)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and (one == other or (one != one and other != other))


def written(tmp_path, **changes):
    return explanation(**changes).save(tmp_path, pictures=False)[0]


# Files


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("count", "channels"), [(1, 3), (2, 1), (3, 4)])
def test_round_trip(tmp_path, dtype, count, channels):
    before = explanation(count, channels, dtype=dtype, build={"compiled": True, "cuda": None, "level": {"simd": "avx2"}})
    before["gradient"].map[0, 0, 0, 0] = NAN
    after = Explanation.load(before.save(tmp_path, pictures=False)[0])
    assert same(before, after)
    assert str(after) == str(before)


def test_round_trip_without_a_class(tmp_path):
    before = explanation(
        target=torch.full((2,), -1), probabilities=None, score_kind="callable", target_names=["margin 猫"] * 2, build={}
    )
    assert same(before, Explanation.load(before.save(tmp_path, "other name", pictures=False)[0]))


def test_round_trip_of_views_and_gradients(tmp_path):
    map = torch.randn(2, 6, 6, 1, requires_grad=True).permute(0, 3, 1, 2)
    result = MethodResult("gradient", "Gradient", map, "none", True, 0.1)
    before = explanation(results={"gradient": result})
    after = Explanation.load(before.save(tmp_path, pictures=False)[0])
    assert torch.equal(after.maps["gradient"], map.detach())
    assert not after.maps["gradient"].requires_grad


def test_the_file_has_the_documented_keys(tmp_path):
    with np.load(written(tmp_path), allow_pickle=False) as arrays:
        assert set(arrays) == {
            *("images", "target", "scores", "probabilities", "metadata"),
            *("leave_one_out", "leave_one_out.drops.0", "leave_one_out.drops.1", "leave_one_out.labels"),
            *("gradient", "grad_cam"),
            *("integrated_gradients", "integrated_gradients.residual", "integrated_gradients.steps"),
            "integrated_gradients.standard_error",
        }
        np.testing.assert_array_equal(arrays["gradient"], explanation()["gradient"].map.numpy())

        def never(constant):
            raise AssertionError(f"{constant} is not JSON")

        metadata = json.loads(str(arrays["metadata"]), parse_constant=never)
        assert metadata["model_name"] == "lite0"


def test_files_of_one_image_and_of_several(tmp_path):
    assert [path.name for path in explanation(1).save(tmp_path / "new" / "folder", "a")] == ["a.npz", "a.png"]
    assert [path.name for path in explanation(2).save(str(tmp_path), "b")] == ["b.npz", "b-0.png", "b-1.png"]
    names = sorted(path.name for path in tmp_path.rglob("*.*"))
    assert names == ["a.npz", "a.png", "b-0.png", "b-1.png", "b.npz"]
    for path in tmp_path.rglob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.read_bytes().endswith(b"IEND\xaeB`\x82")


def test_a_file_name_is_a_file(tmp_path):
    found = explanation(1, results={})
    assert found.save(tmp_path / "cat.png") == (tmp_path / "cat.png",)
    assert (tmp_path / "cat.png").read_bytes().startswith(b"\x89PNG")
    assert explanation(2, results={}).save(tmp_path / "cats.pdf") == (tmp_path / "cats-0.pdf", tmp_path / "cats-1.pdf")
    assert (tmp_path / "cats-1.pdf").read_bytes().startswith(b"%PDF")
    assert found.save(str(tmp_path / "cat.npz")) == (tmp_path / "cat.npz",)
    assert torch.equal(Explanation.load(tmp_path / "cat.npz").images, found.images)
    (tmp_path / "folder.png").mkdir()
    assert found.save(tmp_path / "folder.png")[0] == tmp_path / "folder.png" / "explanation.npz"
    assert found.save(tmp_path / "v1.2")[0] == tmp_path / "v1.2" / "explanation.npz"
    assert found.save(f"{tmp_path}/x.foo/")[0] == tmp_path / "x.foo" / "explanation.npz"
    with pytest.raises(
        ValueError, match=r"directory must be a folder \(.*jgp/\), or end in \.npz, .* \(did you mean .*\.jpg.*, got"
    ):
        found.save(tmp_path / "cat.jgp")
    with pytest.raises(ValueError, match=r"^pysal.Explanation.save: directory must name a folder or a file, got ''$"):
        found.save("")


def test_the_names_of_many_images_sort_as_they_do(tmp_path):
    names = [path.name for path in explanation(11, 1, 2, results={}).save(tmp_path)]
    assert names[1:] == sorted(names[1:])
    assert names[1] == "explanation-00.png"


def test_what_is_no_name_of_a_file_is_refused(tmp_path):
    found, unread = explanation(1), tmp_path / "unread"
    unread.write_text("whole")
    for value in (None, 3, io.BytesIO()):
        sentence = f"must be the name of a file or folder, a str or os.PathLike, got {type(value).__name__}$"
        with pytest.raises(TypeError, match=f"^pysal.Explanation.save: directory {sentence}"):
            found.save(value)
        with pytest.raises(TypeError, match=f"^pysal.Explanation.load: path {sentence}"):
            Explanation.load(value)
        if value is not None:
            with pytest.raises(TypeError, match=f"^pysal.Explanation.plot: path {sentence}"):
                found.plot(path=value)
    with unread.open() as file:  # a number of one that is open is neither read nor closed
        with pytest.raises(TypeError, match=r"got int$"):
            Explanation.load(file.fileno())
        assert file.read() == "whole"


def test_load_takes_what_save_wrote(tmp_path):
    found = explanation(1)
    found.save(tmp_path / "out", pictures=False)
    assert torch.equal(Explanation.load(tmp_path / "out").images, found.images)
    found.save(tmp_path / "named", "cat", pictures=False)
    assert Explanation.load(str(tmp_path / "named")).model_name == "lite0"
    found.save(tmp_path / "named", "dog", pictures=False)
    with pytest.raises(ValueError) as caught:
        Explanation.load(tmp_path / "named")
    several = f"be one of the files of a folder that has several (cat.npz, dog.npz), got {tmp_path / 'named'}"
    assert str(caught.value) == f"pysal.Explanation.load: path must {several}"
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"path must be an npz file, or a folder with one, got .*, which has none$"):
        Explanation.load(tmp_path / "empty")


@pytest.mark.parametrize("broken", ["npz", "second picture", "rename"])
def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch, broken):
    explanation(results={}).save(tmp_path)
    (tmp_path / "explanation-1.png").unlink()
    kept = {path: path.read_bytes() for path in tmp_path.iterdir()}
    full = OSError(errno.ENOSPC, "No space left on device")

    def write(file, **arrays):
        file.write(b"half")
        raise full

    def draw(self, image, file):
        file.write(b"half")
        if image:
            raise full

    def rename(source, target):
        raise full

    if broken == "npz":
        monkeypatch.setattr(np, "savez", write)
        name = "explanation.npz"
    elif broken == "rename":
        monkeypatch.setattr("os.replace", rename)
        name = "explanation.npz"
    else:
        monkeypatch.setattr(Explanation, "_write_png", draw)
        name = "explanation-1.png"
    with pytest.raises(OSError, match="must be writable") as caught:
        explanation(model_name="other", results={}).save(tmp_path)
    sentence = f"pysal.Explanation.save: {tmp_path / name} must be writable, got No space left on device"
    assert str(caught.value) == sentence
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == kept


def test_an_interrupted_save_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(self, image, file):
        raise KeyboardInterrupt

    monkeypatch.setattr(Explanation, "_write_png", interrupt)
    with pytest.raises(KeyboardInterrupt):
        explanation().save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_is_a_file_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=re.escape(f"{tmp_path / 'file' / 'explanation.npz'} must be writable, got ")):
        explanation().save(tmp_path / "file")


@pytest.mark.parametrize("stem", ["", ".", "..", "a/b", "/a", "a\0b"])
def test_a_stem_is_a_file_name(tmp_path, stem):
    with pytest.raises(ValueError) as caught:
        explanation().save(tmp_path, stem)
    message = f"pysal.Explanation.save: stem must be a file name without directories, got {stem!r}"
    assert str(caught.value) == message


def test_a_missing_file_is_named(tmp_path):
    path = tmp_path / "none.npz"
    with pytest.raises(FileNotFoundError) as caught:
        Explanation.load(path)
    message = f"pysal.Explanation.load: path must be a file that can be read, got {path} (No such file or directory)"
    assert str(caught.value) == message


def rewritten(path, **changes):
    with np.load(path) as arrays:
        kept = {key: arrays[key] for key in arrays}
    for key, value in changes.items():
        if value is None:
            kept.pop(key)
        else:
            kept[key] = value
    with open(path, "wb") as file:
        np.savez(file, **kept)


def changed_metadata(path, change):
    with np.load(path) as arrays:
        metadata = json.loads(str(arrays["metadata"]))
    change(metadata)
    rewritten(path, metadata=np.array(json.dumps(metadata)))


class Trap:
    """An object whose unpickling would be seen."""

    def __reduce__(self):
        return (pytest.fail, ("the file was unpickled",))


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("not a zip file"),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "an array": lambda path: np.save(path.open("wb"), np.zeros(3)),
    "another npz": lambda path: np.savez(path.open("wb"), a=np.zeros(3)),
    "pickled": lambda path: np.savez(path.open("wb"), metadata=np.array(Trap(), dtype=object)),
    "no json": lambda path: rewritten(path, metadata=np.array("{")),
    "no images": lambda path: rewritten(path, images=None),
    "no probabilities": lambda path: rewritten(path, probabilities=None),
    "no map": lambda path: rewritten(path, gradient=None),
    "wrong shape": lambda path: rewritten(path, gradient=np.zeros((2, 3, 5, 6))),
    "strings": lambda path: rewritten(path, gradient=np.array(["a"])),
    "other version": lambda path: changed_metadata(path, lambda metadata: metadata.update(format="pysal.explanation.9")),
    "no results": lambda path: changed_metadata(path, lambda metadata: metadata.pop("results")),
    "unknown field": lambda path: changed_metadata(path, lambda metadata: metadata["results"][0].update(size=1)),
    "results of text": lambda path: changed_metadata(path, lambda metadata: metadata.update(results="abc")),
    "an attribute of torch": lambda path: changed_metadata(path, lambda metadata: metadata["dtypes"].update(images="nn")),
    "a list": lambda path: rewritten(path, metadata=np.array("[]")),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_damage_is_refused_with_the_file_named(tmp_path, damage):
    path = written(tmp_path)
    DAMAGES[damage](path)
    with pytest.raises(ValueError) as caught:
        Explanation.load(path)
    start = f"pysal.Explanation.load: path must be an npz file written by Explanation.save, whole, got {path} ("
    assert str(caught.value).startswith(start)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return written(tmp_path_factory.mktemp("whole"), count=1, size=3)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(place=st.floats(0, 1, exclude_max=True), bits=st.integers(1, 255))
def test_a_flipped_byte_is_refused_or_harmless(whole, place, bits):
    """zip checks every array by its CRC; a byte that no reader looks at (a time stamp) may change."""
    damaged = bytearray(whole.read_bytes())
    damaged[int(place * len(damaged))] ^= bits
    path = whole.with_name("damaged.npz")
    path.write_bytes(damaged)
    try:
        after = Explanation.load(path)
    except ValueError:
        return
    assert same(after, Explanation.load(whole))


@settings(max_examples=60, deadline=None)
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_refused(whole, share):
    content = whole.read_bytes()
    path = whole.with_name("short.npz")
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=re.escape(str(path))):
        Explanation.load(path)


def test_the_file_is_a_plain_zip_of_npy(tmp_path):
    with zipfile.ZipFile(written(tmp_path)) as archive:
        assert archive.testzip() is None
        assert all(name.endswith(".npy") for name in archive.namelist())


# Tables


def test_table(tmp_path):
    found = explanation(scores=torch.tensor([0.25, 0.95]), probabilities=torch.tensor([0.25, 0.95]))
    drops = [torch.tensor([0.05, -0.1, NAN]), torch.tensor([0.1, 0.28])]
    found["leave_one_out"].details["drops"] = drops
    found["gradient"].map[1, 0, 0, :2] = NAN
    found["integrated_gradients"].details["standard_error"] = torch.full((2, 1, 6, 6), 0.125)
    found["integrated_gradients"].map[:] = 1.0  # adds up to 108, of which the residuals are a small share
    assert found.table() == str(found)
    assert found.table() == (
        "lite0: 2 images, 4 methods, 1.5 s\n"
        "\n"
        "image 0: cat 0 (class 281), 25 %\n"
        "  method                seconds  passes  residual  largest drop  notes\n"
        "  Leave-one-out            0.52       5            25 % -> 20 %  3 segments\n"
        "  Gradient                 0.01       1\n"
        "  Grad-CAM                 0.02       1                          layer features.8\n"
        "  Integrated Gradients     0.81      50     -0.25                50 steps; mean standard error 0.125\n"
        "\n"
        "image 1: cat 1 (class 282), 95 %\n"
        "  method                seconds  passes  residual  largest drop  notes\n"
        "  Leave-one-out            0.52       5            95 % -> 67 %  2 segments\n"
        "  Gradient                 0.01       1                          2 values not finite\n"
        "  Grad-CAM                 0.02       1                          layer features.8\n"
        "  Integrated Gradients     0.81      50       0.5                50 steps; mean standard error 0.125\n"
        "\n"
        "left out: guided_backprop: pysal.guided_backprop: the model has no ReLU"
    )


def test_drops_of_another_score_than_the_shown_one():
    logits = explanation(score_kind="logit", scores=torch.tensor([2.5, 8.0]))
    assert "image 1: cat 1 (class 282), 95 %, logit 8\n" in logits.table()
    assert re.findall(r"(\S+) % ->", logits.table()) == ["25", "95"]  # leave-one-out explains the probability, which is known
    unknown = explanation(score_kind="callable", probabilities=None, target=torch.tensor([-1, -1]))
    assert "->" not in unknown.table()
    assert "image 1: cat 1, score 0.95\n" in unknown.table()
    unknown["leave_one_out"].details["drops"] = torch.tensor([[0.5, 0.0], [0.5, -1.0]])
    own = dataclasses.replace(unknown["leave_one_out"], score_kind="")
    shown = dataclasses.replace(unknown, results={"leave_one_out": own})
    assert "0.95 -> 0.45" in shown.table()


def test_names_stay_on_their_line():
    found = explanation(target_names=["a\nb\tc", "x  y"], model_name="m\nn")
    assert "image 0: a b c (class 281), " in found.table()
    assert found.table().startswith("m n: ")


def test_maps_items_and_repr():
    found = explanation()
    assert list(found.maps) == ["leave_one_out", "gradient", "grad_cam", "integrated_gradients"]
    assert found.maps["gradient"] is found["gradient"].map
    assert len(found) == 2
    assert repr(found) == "Explanation('lite0', 2 images: leave_one_out, gradient, grad_cam, integrated_gradients)"
    assert repr(found["gradient"]) == "MethodResult('gradient', map (2, 3, 6, 6), 0.01 s)"
    with pytest.raises(KeyError):
        found["deep_dream"]


def test_html_is_escaped():
    nasty = "<script>alert('&\"')</script>"
    found = explanation(
        1,
        target_names=[nasty],
        model_name=nasty,
        skipped={"smooth_grad": nasty},
        results={"gradient": dataclasses.replace(explanation(1)["gradient"], title=nasty, details={"layer": nasty})},
    )
    page = found._repr_html_()
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(&#x27;&amp;&quot;&#x27;)&lt;/script&gt;") == 7
    assert set(re.findall(r"</?(\w+)", page)) == {"div", "p", "h4", "img", "table", "thead", "tbody", "tr", "th", "td"}
    (picture,) = re.findall(r'src="data:image/jpeg;base64,([^"]*)"', page)
    assert base64.b64decode(picture).startswith(b"\xff\xd8")


def test_html_of_a_large_batch_has_all_tables_and_few_pictures(monkeypatch):
    drawn = []
    monkeypatch.setattr(Explanation, "plot", lambda self, image: drawn.append(image) or Figure())
    page = explanation(9)._repr_html_()
    assert page.count("<table>") == 9
    assert drawn == [0, 1, 2, 3]
    page = explanation(900, 1, 6, results={"gradient": explanation(900, 1, 6)["gradient"]})._repr_html_()
    shown = page.count("<table>")
    assert f"<p>and {900 - shown} images more: print(found) lists them all</p>" in page
    assert len(page) < 300_000


@pytest.mark.parametrize("count", [1, 4])
def test_what_a_notebook_keeps_is_small(count):
    # noise is what compresses worst
    found = explanation(count, 3, 224)
    assert len(found._repr_html_()) < 300_000


def test_a_picture_in_a_notebook_is_a_small_jpeg():
    picture = explanation(1, 3, 224).plot()._repr_jpeg_()
    assert picture.startswith(b"\xff\xd8")
    assert len(base64.b64encode(picture)) < 300_000


# Numbers


def test_no_method_seems_to_take_no_time_or_to_have_no_drop():
    found = explanation(1)
    found["leave_one_out"].details["drops"] = [torch.tensor([-0.1, -0.2])]
    quick = dataclasses.replace(found["gradient"], seconds=0.00432)
    lines = dataclasses.replace(found, results={**found.results, "gradient": quick}).table().splitlines()
    assert "none lowers it" in lines[4]
    assert "0.0043" in lines[5]
    found["leave_one_out"].details["drops"] = [torch.tensor([1e-9, -0.2])]
    assert "too small to show" in found.table()


@pytest.mark.parametrize(("residual", "said"), [(-0.5, "20 % of the change is missing"), (0.1, ""), (0.0, ""), (NAN, "")])
def test_a_large_residual_says_what_helps(residual, said):
    map = torch.full((1, 3, 2, 2), 1 / 6)  # adds up to 2, where the score changed by 2 - residual
    details = {"residual": torch.tensor([residual])}
    path = MethodResult("integrated_gradients", "Integrated Gradients", map, "sum", True, 0.1, 50, details)
    table = explanation(1, size=2, results={"integrated_gradients": path}).table()
    assert (f"{said}: more steps, or tolerance=" in table) == bool(said)
    assert ("missing" in table) == bool(said)


@pytest.mark.parametrize(
    ("name", "details", "said"),
    [
        ("gradient", {}, "zero: no gradient arrives"),
        ("integrated_gradients", {}, "zero: nothing to share, or no gradient"),
        ("leave_one_out", {"drops": torch.zeros(1, 4)}, "zero: no segment changes the score"),
        (
            "grad_cam",
            {"native": torch.zeros(1, 1, 2, 2), "moving": torch.tensor([True])},
            "zero: all of it was negative, and is cut off",
        ),
        (
            "grad_cam",
            {"native": torch.zeros(1, 1, 2, 2), "moving": torch.tensor([False])},
            "zero: no gradient arrives at the layer",
        ),
    ],
)
def test_maps_that_are_zero_are_told_apart(name, details, said):
    zero = MethodResult(name, name, torch.zeros(1, 1, 6, 6), "none", True, 0.1, 1, details)
    found = explanation(1, results={name: zero})
    assert said in found.table()
    assert said in " ".join(words(found.plot()))


# Pictures


def words(figure):
    return [text.get_text() for text in figure.findobj(Text)]


def test_plot_shows_the_methods_asked_for_in_their_order():
    found = explanation()
    shown = words(found.plot(1, methods=["integrated_gradients", "gradient"]))
    titles = {result.title for result in found.results.values()}
    assert [word for word in shown if word in titles] == ["Integrated Gradients", "Gradient"]
    for expected in (
        "cat 1",
        "95 %",
        "lite0 · image 1 of 2",
        "residual 0.5 · 15 % of the change is missing:…",
        "logit per pixel",
        "|d probability / d value|",
    ):
        assert expected in shown, expected
    assert "Grad-CAM" in words(found.plot(methods="grad_cam"))
    assert titles <= set(words(found.plot()))


def test_plot_names_the_score_of_a_callable():
    found = explanation(1, score_kind="callable", probabilities=None, target=torch.tensor([-1]), scores=torch.tensor([8.25]))
    shown = words(found.plot())
    assert "lite0 · score 8.25" in shown
    # no probability: what stands in percent are the limits of maps and a residual's share of the change
    assert not any("%" in word and "|map|" not in word and "residual" not in word for word in shown)


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_plot_of_other_images(channels):
    explanation(1, channels, dtype=torch.float64, images=torch.randn(1, channels, 6, 6) * 50).plot().canvas.draw()


def test_plot_writes_the_file_its_ending_asks_for(tmp_path):
    found = explanation(1)
    figure = found.plot(path=tmp_path / "new" / "a.pdf")
    found.plot(path=str(tmp_path / "a.PNG"))
    assert (tmp_path / "new" / "a.pdf").read_bytes().startswith(b"%PDF")
    assert (tmp_path / "a.PNG").read_bytes().startswith(b"\x89PNG")
    assert figure.get_size_inches()[0] > figure.get_size_inches()[1]
    assert len(list(tmp_path.rglob("*.*"))) == 2


PLOT_ERRORS = [
    ({"image": 2}, "pysal.Explanation.plot: image must be an index in [0, 2), got 2"),
    ({"image": -1}, "pysal.Explanation.plot: image must be an index in [0, 2), got -1"),
    (
        {"methods": ["gradient", "deep_dream"]},
        "pysal.Explanation.plot: methods must be out of leave_one_out, gradient, grad_cam, integrated_gradients, "
        "got 'deep_dream'",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), PLOT_ERRORS)
def test_plot_errors(arguments, message):
    with pytest.raises(ValueError) as caught:
        explanation().plot(**arguments)
    assert str(caught.value) == message


@pytest.mark.parametrize("name", ["a.xyz", "a", "a."])
def test_plot_refuses_unknown_endings(tmp_path, name):
    with pytest.raises(ValueError, match=re.escape("path must end in one of .")):
        explanation().plot(path=tmp_path / name)
    assert list(tmp_path.iterdir()) == []


# What an explanation may hold


def with_result(**changes):
    result = dataclasses.replace(explanation()["gradient"], **changes)
    return {"results": {"gradient": result}}


ERRORS = [
    (lambda: {"images": [1]}, TypeError, "images must be a torch.Tensor, got list"),
    (lambda: {"images": torch.zeros(3, 6, 6)}, ValueError, "images must have 4 dimensions, got shape (3, 6, 6)"),
    (lambda: {"scores": torch.zeros(3)}, ValueError, "scores must have shape (2,), one per image, got shape (3,)"),
    (lambda: {"target": torch.zeros(2, 1)}, ValueError, "target must have shape (2,), one per image, got shape (2, 1)"),
    (
        lambda: {"probabilities": torch.zeros(1)},
        ValueError,
        "probabilities must have shape (2,), one per image, got shape (1,)",
    ),
    (lambda: {"target_names": ["a"]}, ValueError, "target_names must have 2 names, one per image, got 1"),
    (
        lambda: with_result(map=torch.zeros(2, 3, 6, 5)),
        ValueError,
        "results['gradient'].map must have shape (2, C, 6, 6), got shape (2, 3, 6, 5)",
    ),
    (
        lambda: with_result(map=torch.zeros(1, 3, 6, 6)),
        ValueError,
        "results['gradient'].map must have shape (2, C, 6, 6), got shape (1, 3, 6, 6)",
    ),
    (
        lambda: with_result(reduction="none"),
        ValueError,
        "results['gradient'].reduction must be 'max_abs' or 'sum', or 'none' for a map of one channel, got 'none'",
    ),
    (
        lambda: with_result(name="grad_cam"),
        ValueError,
        "results['gradient'] must be filed under its name, a word that is no other key of the file, got 'grad_cam'",
    ),
    (
        lambda: with_result(details={"a.b": 1}),
        ValueError,
        "results['gradient'].details must have words as keys, got 'a.b'",
    ),
]


@pytest.mark.parametrize(("changes", "error", "message"), ERRORS)
def test_errors(changes, error, message):
    with pytest.raises(error) as caught:
        explanation(**changes())
    assert str(caught.value) == f"pysal.Explanation: {message}"


@pytest.mark.parametrize("name", [*RESERVED, "a/b", "", "a.b", "../x"])
def test_names_that_cannot_be_keys_are_refused(name):
    with pytest.raises(ValueError, match="no other key of the file"):
        explanation(results={name: dataclasses.replace(explanation()["gradient"], name=name)})
