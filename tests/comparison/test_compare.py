"""A comparison of a tiny classifier: its rows are what the functions return, and it goes on where it stopped."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import pysal
from pysal import annotations, metrics
from pysal.comparison import Comparison, compare, experiment
from pysal.comparison.report import page
from pysal.models import Classifier, read_image
from tests.audit.tiny import NotANumber, classifier


class _Balanced(HTMLParser):
    """Notes tags that are closed in another order than they were opened."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.problems: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.problems.append(f"</{tag}>")


def problems_of_html(page: str) -> list[str]:
    parser = _Balanced()
    parser.feed(page)
    return parser.problems + parser.open


METHODS = ["gradient", "grad_cam", "leave_one_out"]
OPTIONS: dict[str, Any] = {
    "methods": METHODS,
    "method_options": {"leave_one_out": {"segments": pysal.Grid(2, 2)}},
    "metrics": ["insertion", "deletion", "road", "pointing_game", "mass_in_mask", "max_sensitivity"],
    "metric_options": {"road": {"shares": [0.3]}, "max_sensitivity": {"samples": 2}, "insertion": {"steps": 3}},
    "few": 1,
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six photos, and masks of all but the first."""
    folder = tmp_path_factory.mktemp("data")
    for name in ("photos", "masks"):
        (folder / name).mkdir()
    for number in range(6):
        random = np.random.default_rng(number)
        pixels = random.integers(0, 255, (5, 6, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((15, 18), Image.Resampling.BICUBIC).save(folder / f"photos/{number}.png")
        if number:
            Image.fromarray(random.integers(0, 2, (18, 15), dtype=np.uint8)).save(folder / f"masks/{number}.png")
    return folder


@pytest.fixture(scope="module")
def whole(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Comparison, Path]:
    out = tmp_path_factory.mktemp("whole") / "out"
    return compare(classifier(), photos / "photos", out=out, annotations=photos / "masks", **OPTIONS), out


def test_rows_are_what_the_functions_return(photos: Path, whole: tuple[Comparison, Path]) -> None:
    found, _ = whole
    model = classifier()
    assert [Path(row["photo"]).name for row in found.rows] == [f"{n}.png" for n in range(6)]
    for number, row in enumerate(found.rows):
        image = read_image(row["photo"], model)
        assert row["target"] == int(model(image).argmax())
        mask = annotations.read(photos / "masks").mask(row["photo"], model)
        for name in METHODS:
            own = row["methods"][name]
            options = OPTIONS["method_options"].get(name, {})
            map = pysal.explain(model, image, row["target"], methods=name, method_options={name: options}).maps[name]
            given = {"method": name, "method_options": options, "image_ids": [number]}
            for metric in OPTIONS["metrics"]:
                if metric == "max_sensitivity" and number >= 1:
                    assert metric not in own, "measured on a few images only"
                    continue
                if metric in ("pointing_game", "mass_in_mask") and mask is None:
                    assert metric not in own
                    continue
                own_options = OPTIONS["metric_options"].get(metric)
                expected = metrics.per_image(metric, model, image, map, row["target"], masks=mask, options=own_options, **given)
                if expected.isnan():
                    assert own[metric] is None
                else:
                    assert own[metric] == pytest.approx(float(expected), abs=2e-4)
            assert ("randomisation" in own) == (number == 0)
    assert "mass_in_mask" not in found.rows[0]["methods"]["gradient"]
    assert found.agreement["gradient"]["gradient"] == pytest.approx(1.0)


def test_it_goes_on_where_it_stopped(
    photos: Path, whole: tuple[Comparison, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, out = whole
    half = tmp_path / "half"
    half.mkdir()
    lines = (out / "images.jsonl").read_text().splitlines()
    (half / "images.jsonl").write_text("\n".join(lines[:5]) + "\n" + lines[5][:50])  # killed while it wrote the fourth
    measured = []
    before = experiment._Bench.measure

    def watched(self: Any, file: Path, number: int, **more: Any) -> dict[str, Any]:
        measured.append(number)
        return before(self, file, number, **more)

    monkeypatch.setattr(experiment._Bench, "measure", watched)
    again = compare(classifier(), photos / "photos", out=half, annotations=photos / "masks", **OPTIONS)
    assert measured == [3, 4, 5]
    for old, new in zip(found.rows, again.rows, strict=True):
        for name in METHODS:
            timeless: list[dict[str, float]] = [
                {key: value for key, value in row["methods"][name].items() if "seconds" not in key} for row in (old, new)
            ]
            # it was prepared anew, which may choose another way to the same numbers
            assert timeless[0] == pytest.approx(timeless[1], abs=2e-4)
    measured.clear()
    compare(classifier(), photos / "photos", out=half, annotations=photos / "masks", **OPTIONS)
    assert measured == []


def test_a_folder_of_another_comparison_is_refused(photos: Path, whole: tuple[Comparison, Path], tmp_path: Path) -> None:
    _, out = whole
    with pytest.raises(
        ValueError, match=r"out must be a new folder, or that of the same comparison, got .*, where seed was 0, not 1"
    ):
        compare(classifier(), photos / "photos", out=out, annotations=photos / "masks", **OPTIONS, seed=1)
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"out must be a new folder, .*, which holds other files"):
        compare(classifier(), photos / "photos", out=tmp_path, **OPTIONS)


def test_the_files(whole: tuple[Comparison, Path]) -> None:
    found, out = whole
    stored = json.loads((out / "comparison.json").read_text(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert stored["settings"]["methods"] == METHODS
    assert stored["reasons"] == found.reasons
    assert set(stored["estimates"]["road"]) == set(METHODS)
    page = (out / "report.html").read_text()
    assert problems_of_html(page) == []
    for text in (*found.reasons, "Grad-CAM", "Mass in mask", "Do methods agree?"):
        assert text.replace("'", "&#x27;") in page
    assert not re.search(r"(src|href)=.(?!data:|#)", page), "it needs no network"
    assert "prefers-color-scheme: dark" in page
    assert "width=device-width" in page


def test_names_are_text_in_the_report(photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "<b>photos<b>"
    folder.mkdir()
    Image.open(photos / "photos/0.png").save(folder / "<script>alert(1)<script>.png")
    (folder / "broken.png").write_bytes(b"<i>")
    (folder / "gone.png").symlink_to(tmp_path / "nowhere.png")
    compare(classifier(), folder, out=tmp_path / "out", methods="gradient", metrics=["road"], few=0)
    page = (tmp_path / "out/report.html").read_text()
    assert "<script" not in page
    assert "<b>photos" not in page
    assert problems_of_html(page) == []
    assert "broken.png was not read: " in page
    assert "gone.png was not read: " in page, "a link to nothing is one of a folder's photos"


def test_limit_spreads_over_the_photos(photos: Path) -> None:
    found = compare(classifier(), photos / "photos", methods="gradient", metrics=["deletion"], few=0, limit=3)
    assert [Path(row["photo"]).name for row in found.rows] == ["0.png", "2.png", "5.png"]


def test_what_does_not_apply_is_left_out_of_all(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = classifier()
    model.network[1] = torch.nn.Sigmoid()
    model.network[3] = torch.nn.Sigmoid()
    found = compare(
        model, photos / "photos", metrics=["deletion"], few=0, limit=1, method_options={"smooth_grad": {"samples": 2}}
    )
    assert "guided_backprop" in found.skipped
    assert "guided_backprop" not in found.methods
    assert "grad_cam" in found.methods
    with pytest.raises(pysal.NotApplicable):
        compare(model, photos / "photos", methods=["guided_backprop"], metrics=["deletion"], few=0, limit=1)


@pytest.mark.parametrize("flat", [False, True], ids=["(N, 1)", "(N,)"])
def test_a_number_for_each_photo(photos: Path, flat: bool) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 1)]
    model = Classifier(nn.Sequential(*layers, *[nn.Flatten(0)] * flat), name="age", class_names=(), input_size=(12, 10)).eval()
    options: dict[str, Any] = {"methods": ["gradient", "leave_one_out"], "metrics": ["deletion", "pic", "average_drop"]}
    found = compare(model, photos / "photos", few=1, **options)
    assert found.skipped.keys() == {"pic", "average_drop"}
    assert {"class": "output", "target": 0}.items() <= found.rows[0].items()
    assert "probability" not in found.rows[0]
    image = read_image(found.rows[0]["photo"], model)
    map = pysal.gradient(model, image, score="raw")
    expected = metrics.per_image("deletion", model, image, map, method="gradient", score="raw")
    figures = found.rows[0]["methods"]["gradient"]
    assert figures["deletion"] == pytest.approx(float(expected[0]), rel=1e-5)
    assert figures.keys() == {"wall_seconds", "seconds", "deletion", "randomisation"}
    assert "The model&#x27;s number is explained." in page(found)
    # the binary logit of a class: how sure the model is has a meaning
    sure = compare(model, photos / "photos", few=1, limit=1, score="sigmoid", **options)
    assert not sure.skipped
    with torch.no_grad():
        assert sure.rows[0]["probability"] == pytest.approx(float(model(image).sigmoid()), rel=1e-5)


def test_an_output_without_classes_is_refused(photos: Path) -> None:
    maps = Classifier(nn.Conv2d(3, 4, 1), name="maps", class_names=(), input_size=(12, 10)).eval()
    message = r"model must answer with a table of classes or a number for each image, got \(1, 4, 12, 10\)"
    with pytest.raises(ValueError, match=message):
        compare(maps, photos / "photos", limit=1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"photos": "nowhere"}, r"photos must be there, got nowhere \(no such file or folder\)"),
        ({"photos": []}, "photos must hold at least one photo, got "),
        ({"photos": 3}, "photos must be a folder or a list of files, got 3"),
        ({"metrics": ["rise"]}, "metrics must be names out of deletion, .*, got 'rise'"),
        ({"metrics": "road"}, "metrics must be a sequence of names, got 'road'"),
        ({"metric_options": {"pic": {}}}, r"metric_options must be for the metrics asked for \(deletion\), got 'pic'"),
        (
            {"methods": "gradient", "method_options": {"xrai": {}}},
            r"method_options must be for the methods asked for \(gradient\), got 'xrai'",
        ),
        ({"limit": 0}, "limit must be "),
        ({"few": -1}, "few must be "),
        (
            {"model": torch.nn.ReLU()},
            r"model must be a name or a file, or know how it wants photos \(pysal.models.wrap\), got ReLU",
        ),
        ({"methods": "lime"}, "methods must be 'all' or names out of "),
    ],
)
def test_errors(photos: Path, given: dict[str, Any], message: str) -> None:
    arguments = {"model": classifier(), "photos": photos / "photos", "metrics": ["deletion"], "few": 0, **given}
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=f"^pysal.comparison.compare: {message}"):
        compare(arguments.pop("model"), arguments.pop("photos"), **arguments)


def test_masks_beside_the_photos_are_no_photos(photos: Path, tmp_path: Path) -> None:
    for number in (1, 2):
        Image.open(photos / f"photos/{number}.png").convert("RGB").save(tmp_path / f"{number}.bmp")
        Image.open(photos / f"masks/{number}.png").save(tmp_path / f"{number}.png")
    found = compare(classifier(), tmp_path, annotations=tmp_path, methods="gradient", metrics=["mass_in_mask"], few=0)
    assert [Path(row["photo"]).name for row in found.rows] == ["1.bmp", "2.bmp"]
    assert found.estimates["mass_in_mask"]["gradient"].images == 2


def test_annotations_of_other_photos_are_refused(photos: Path, tmp_path: Path) -> None:
    Image.new("L", (4, 4), 1).save(tmp_path / "z.png")
    with pytest.raises(ValueError, match=r"annotations must be of the photos, by name, got 'z' ... for "):
        compare(classifier(), photos / "photos", annotations=tmp_path, metrics=["deletion"], few=0)


def test_photos_none_of_which_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"photos must hold at least one that can be read, got pysal.read_image: "):
        compare(classifier(), tmp_path, metrics=["deletion"], few=0)


def test_a_photo_given_twice_is_one_image(photos: Path) -> None:
    file = photos / "photos/0.png"
    found = compare(classifier(), [file, photos / "photos/1.png", str(file)], methods="gradient", metrics=["deletion"], few=0)
    assert [Path(row["photo"]).name for row in found.rows] == ["0.png", "1.png"]


class MeanColour(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return 5 * images.mean((2, 3))


def test_a_model_without_weights_has_none_that_are_random(photos: Path) -> None:
    model = pysal.models.wrap(MeanColour().eval(), size=(12, 10), normalize="none")
    found = compare(model, photos / "photos", methods=["gradient", "leave_one_out"], metrics=["deletion"], few=2, limit=2)
    assert "randomisation" not in found.estimates
    assert found.estimates["deletion"]["gradient"].images == 2


def test_a_model_in_another_precision(photos: Path) -> None:
    options: dict[str, Any] = {"methods": "gradient", "metrics": ["deletion", "road"], "few": 1, "limit": 4}
    found, same = (compare(model, photos / "photos", **options) for model in (classifier().double(), classifier()))
    for name in ("deletion", "road"):
        assert found.estimates[name]["gradient"].mean == pytest.approx(same.estimates[name]["gradient"].mean, abs=2e-4)


def test_a_model_that_says_nan(photos: Path) -> None:
    model = classifier()
    broken = pysal.models.Classifier(NotANumber(), name="x", class_names=["a", "b", "c"], input_size=model.input_size).eval()
    found = compare(broken, photos / "photos", methods="gradient", metrics=["deletion"], few=0)
    assert len(found.rows) + len(found.unread) == 6


class Brightness(torch.nn.Module):
    """Logits of two classes, which of a dark photo lie in [0, 1]."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        light = images.mean((1, 2, 3))
        return torch.stack([1.2 * light, 1.2 - 2.4 * light], 1)


def test_what_the_output_is_does_not_depend_on_the_photo(tmp_path: Path) -> None:
    for number, light in enumerate((60, 100, 250)):
        pixels = np.random.default_rng(number).integers(light - 50, light + 5, (12, 10, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    model = pysal.models.wrap(Brightness().eval(), size=(12, 10), normalize="none")
    options: dict[str, Any] = {"methods": "gradient", "metrics": ["deletion", "infidelity", "average_drop"], "few": 0}
    found = compare(model, tmp_path, **options)
    inside = 0
    for number, row in enumerate(found.rows):
        image = read_image(row["photo"], model)
        table = model(image)
        inside += bool(((table >= 0) & (table <= 1)).all())
        assert row["probability"] == pytest.approx(float(table.softmax(1).amax()), abs=1e-6)
        map = pysal.gradient(model, image, row["target"])
        for metric in options["metrics"]:
            given = {"method": "gradient", "image_ids": [number], "score": "softmax"}
            expected = metrics.per_image(metric, model, image, map, row["target"], **given)
            assert row["methods"]["gradient"][metric] == pytest.approx(float(expected), abs=2e-5), metric
    assert 0 < inside < 3, "of some photos alone the output would be taken for probabilities"
    said = compare(model, tmp_path, **options, score="sigmoid", limit=1)
    assert said.rows[0]["probability"] == pytest.approx(float(model(read_image(tmp_path / "0.png", model)).sigmoid().amax()))
    with pytest.raises(ValueError, match=r"^pysal.comparison.compare: score must be one of 'auto', .*, got 'odds'"):
        compare(model, tmp_path, **options, score="odds")  # type: ignore[arg-type]


@pytest.mark.parametrize("changed", ["photos", "masks"])
def test_a_file_that_was_changed_is_noticed(photos: Path, tmp_path: Path, changed: str) -> None:
    for name in ("photos", "masks"):
        shutil.copytree(photos / name, tmp_path / name)
    options: dict[str, Any] = {"methods": "gradient", "metrics": ["mass_in_mask"], "few": 0, "limit": 2}

    def again() -> Comparison:
        return compare(classifier(), tmp_path / "photos", out=tmp_path / "out", annotations=tmp_path / "masks", **options)

    again()
    again()
    file = tmp_path / changed / "5.png"
    Image.fromarray(255 - np.asarray(Image.open(file))).save(file)
    name = {"photos": "photos_sha256", "masks": "annotations_sha256"}[changed]
    with pytest.raises(ValueError, match=f"out must be a new folder, .* where {name} was "):
        again()


def test_options_are_looked_at_before_any_work(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment._Bench, "look", lambda *_: pytest.fail("it began"))
    for options, sentence in (
        (
            {"metric_options": {"road": {"share": [0.1]}}},
            r"metric_options\['road'\] must hold options of road: shares, .*, got 'share'",
        ),
        ({"method_options": {"gradient": {"steps": 3}}}, r"method_options\['gradient'\] must hold options out of "),
    ):
        with pytest.raises(ValueError, match=f"^pysal.comparison.compare: {sentence}"):
            compare(classifier(), photos / "photos", methods="gradient", metrics=["road"], **options)


@pytest.mark.parametrize(
    ("methods", "metrics", "number", "pays"), [(["gradient"], ["deletion"], 1, False), (None, None, 6, True)]
)
def test_preparing_has_to_pay(
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
    methods: list[str] | None,
    metrics: list[str] | None,
    number: int,
    pays: bool,
) -> None:
    seen = []
    prepare = experiment.prepare
    monkeypatch.setattr(experiment, "prepare", lambda *given, **options: seen.append(given) or prepare(*given, **options))
    options = OPTIONS if methods is None else {"methods": methods, "metrics": metrics, "few": 0}
    found = compare(classifier(), photos / "photos", limit=number, **options)
    assert len(found.rows) == number
    assert bool(seen) == pays
