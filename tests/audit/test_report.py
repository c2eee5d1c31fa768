"""The report of an audit: its numbers are those of the Parquet files, and a browser shows it without asking for anything."""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.request import url2pathname
from xml.etree import ElementTree

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pysal.audit import Job, report
from pysal.audit.plots import confidences, distributions
from pysal.audit.words import moment, number, percent
from tests.audit.conftest import write_photo
from tests.browser import PATIENCE

NOTHING = "\N{EN DASH}"
METHODS = ["leave_one_out", "gradient", "grad_cam", "integrated_gradients"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    """Twenty-two photos of two classes in folders, and two files that are none; a name that HTML must not take for its own."""
    folder = tmp_path_factory.mktemp("data")
    for n in range(22):
        write_photo(folder / ("cat" if n % 2 else "dog") / f"{n:02d}.png", n)
    write_photo(folder / "cat" / "22.png", 22)
    (folder / "cat" / "<img src=x onerror=alert(1)>.jpg").write_bytes(b"\xff\xd8\xff\xe0 no more")
    (folder / "dog" / "empty.png").write_bytes(b"")
    return folder


def run(dataset: Path, out: Path, **options: Any) -> Path:
    given: dict[str, Any] = {
        "model": "tests.audit.tiny:classifier",
        "methods": METHODS,
        "metrics": ["deletion", "insertion", "infidelity"],
        "method_options": {"leave_one_out": {"segments": "grid:3x2"}, "integrated_gradients": {"steps": 4}},
        "labels": "folder",
        "shard_size": 8,
        "device": "cpu",
    }
    Job(dataset, out=out, **(given | options)).run(engine="inline")
    return out


@pytest.fixture(scope="module")
def audited(dataset, tmp_path_factory) -> Path:
    return run(dataset, tmp_path_factory.mktemp("audit"))


@pytest.fixture(scope="module")
def page(audited) -> str:
    return report(audited, images=3).read_text("utf-8")


class _Tables(HTMLParser):
    """The text of a page's tables by the id of their section, and of its tiles in order."""

    def __init__(self) -> None:
        super().__init__()
        self.section = ""
        self.tables: dict[str, list[list[list[str]]]] = {}
        self.text: dict[str, str] = {}
        self._cell: list[str] | None = None

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        if tag == "section":
            self.section = dict(attributes)["id"]
        if tag == "table":
            self.tables.setdefault(self.section, []).append([])
        if tag == "tr":
            self.tables[self.section][-1].append([])
        if tag in ("td", "th"):
            self._cell = []

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th") and self._cell is not None:
            self.tables[self.section][-1][-1].append(" ".join(self._cell))
            self._cell = None

    def handle_data(self, data: str) -> None:
        text = " ".join(data.split())
        if text and self._cell is not None:
            self._cell.append(text)
        self.text[self.section] = f"{self.text.get(self.section, '')} {text}".strip()


def read(page: str) -> _Tables:
    parser = _Tables()
    parser.feed(page)
    return parser


def rows_of(audited: Path) -> dict[str, dict[str, np.ndarray]]:
    """The shards' columns by method."""
    table = pq.read_table(audited / "shards")
    found = {}
    for method in METHODS:
        own = table.filter(np.array([name == method for name in table["method"].to_pylist()])).sort_by("id")
        found[method] = {name: own[name].to_numpy(zero_copy_only=False) for name in own.column_names if "map" not in name}
    return found


def test_methods_table_holds_the_medians_of_the_shards(audited, page) -> None:
    (head, *body) = read(page).tables["methods"][0]
    assert [cell.split(" higher")[0].split(" lower")[0] for cell in head] == [
        "Method", "Images", "Insertion \N{MINUS SIGN} deletion", "Deletion", "Insertion", "Infidelity", "Best on",
        "Residual median size",
    ]  # fmt: skip
    rows = rows_of(audited)
    differences = np.stack([own["insertion"] - own["deletion"] for own in rows.values()], 1)
    wins = (differences == differences.max(1, keepdims=True)).mean(0)
    for line, (own, win) in zip(body, zip(rows.values(), wins, strict=True), strict=True):
        assert line[1] == "23"
        columns = [own["insertion"] - own["deletion"], own["deletion"], own["insertion"], own["infidelity"]]
        for cell, column in zip(line[2:6], columns, strict=True):
            low, middle, high = np.percentile(column, [25, 50, 75])
            assert cell == f"{number(middle)} {number(low)} to {number(high)}"
        assert line[6] == percent(win)
    residuals = np.abs(rows["integrated_gradients"]["residual"].astype(float))
    assert [line[7] for line in body] == [NOTHING, NOTHING, NOTHING, number(np.median(residuals))]
    marked = re.findall(r'<td class="best">([^<]*)<small>', page)
    medians = [np.median(differences, 0).max()]
    medians += [np.median([own[name] for own in rows.values()], 1).min() for name in ("deletion", "infidelity")]
    medians.insert(2, np.median([own["insertion"] for own in rows.values()], 1).max())
    assert sorted(marked) == sorted(number(value) for value in medians)


def test_class_table_and_wrong_predictions(audited, page) -> None:
    found = read(page)
    own = rows_of(audited)["gradient"]
    label, predicted = own["label"].astype(int), own["predicted"].astype(int)
    names = ["cat", "dog", "tree frog"]
    shares = {names[index]: float((predicted[label == index] == index).mean()) for index in set(label.tolist())}
    (_, *body) = found.tables["classes"][0]
    assert {line[0]: line[2] for line in body} == {name: percent(share) for name, share in shares.items()}
    assert [line[0] for line in body] == sorted(
        shares, key=lambda name: (shares[name], -int((label == names.index(name)).sum()))
    )
    for line in body:
        members = label == names.index(line[0])
        assert line[1] == str(members.sum())
        for cell, rows in zip(line[4:], rows_of(audited).values(), strict=True):
            assert cell == number(np.median((rows["insertion"] - rows["deletion"])[members]))
    wrong = label != predicted
    assert wrong.any()
    assert found.text["wrong"].startswith(f"Wrong predictions {wrong.sum()} image")
    (_, *pairs) = found.tables["wrong"][0]
    assert sum(int(line[2]) for line in pairs) == wrong.sum()
    right = f"{(~wrong).sum()} of 23 labelled images right ({percent((~wrong).mean())})"
    assert right in page
    surest = own["path"][wrong][np.argsort(-own["predicted_probability"][wrong], kind="stable")][:6]
    section = page[page.index('<section id="wrong">') : page.index("<h3>Which classes")]
    shown = re.findall(r'<span class="path">([^<]*)</span>', section)
    assert shown == [path.replace("<", "&lt;").replace(">", "&gt;") for path in surest]


def test_contact_sheets_are_the_best_and_the_worst(audited, page) -> None:
    section = page[page.index('<section id="sheets">') : page.index('<section id="agreement">')]
    sheets = re.split(r"<h3>", section)[1:]
    assert len(sheets) == 2 * len(METHODS)
    for place, own in enumerate(rows_of(audited).values()):
        figure = own["insertion"] - own["deletion"]
        ordered = np.argsort(-figure, kind="stable")
        for sheet, chosen in ((sheets[2 * place], ordered[:3]), (sheets[2 * place + 1], ordered[::-1][:3])):
            values = re.findall(r"<b>Insertion . deletion ([^<]*)</b>", sheet)
            assert values == [number(value) for value in figure[chosen]]
            assert sheet.count("<img ") == 2 * 3  # a photo and an overlay each


def test_disputed_images_are_those_with_the_widest_spread(audited, page) -> None:
    rows = rows_of(audited)
    figures = np.stack([own["insertion"] - own["deletion"] for own in rows.values()], 1)
    widest = np.argsort(-(figures.max(1) - figures.min(1)), kind="stable")[:3]
    section = page[page.index('<section id="disputed">') : page.index('<section id="sheets">')]
    strips = section.split('<div class="tile wide">')[1:]
    for strip, image in zip(strips, widest, strict=True):
        assert re.findall(r"<b>([^<]*)</b></span>", strip) == [number(value) for value in figures[image]]


def test_errors_and_reproducibility(audited, page) -> None:
    found = read(page)
    (_, *reasons) = found.tables["errors"][0]
    assert sum(int(line[1]) for line in reasons) == 2
    told = pq.read_table(audited / "errors").to_pylist()
    assert {line[2] for line in reasons} == {row["path"] + (f" : {row['detail']}" if row["detail"] else "") for row in told}
    assert {row["path"] for row in told} == {"cat/<img src=x onerror=alert(1)>.jpg", "dog/empty.png"}
    manifest = (audited / "manifest.json").read_text("utf-8")
    for digest in re.findall(r'"[0-9a-f]{64}"', manifest):
        assert digest.strip('"') in found.text["reproduce"]
    assert "segments = grid:3x2" in found.text["reproduce"]
    stages = {line[0]: line for line in found.tables["reproduce"][1][1:]}
    assert stages["Deletion"][1] == str(23 * len(METHODS))
    assert "This audit is not finished" not in page


def test_nothing_of_a_path_is_taken_for_html(page) -> None:
    assert "<img src=x" not in page
    assert "cat/&lt;img src=x onerror=alert(1)&gt;.jpg" in page


def test_one_file_without_addresses(page) -> None:
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert sources
    assert all(source.startswith(("data:image/jpeg;base64,", "#")) or source == "data:," for source in sources)
    without_names = re.sub(r'xmlns(:xlink)?="http://[^"]*"', "", page)
    assert "http:" not in without_names
    assert "https:" not in without_names
    assert "@import" not in page
    assert "url(" not in page.replace("url(#", "")
    assert "<script" not in page


def test_the_same_audit_gives_the_same_report(audited, page, tmp_path) -> None:
    assert report(audited, to=tmp_path / "again.html", images=3).read_text("utf-8") == page


def test_what_is_not_there_is_said(dataset, audited, tmp_path) -> None:
    out = run(dataset, tmp_path / "out", labels="none", metrics=[], methods=["gradient"], maps="none", method_options={})
    (out / "shards" / "00001.parquet").unlink()
    photos = tmp_path / "photos"
    manifest = out / "manifest.json"
    manifest.write_text(manifest.read_text().replace(str(dataset), str(photos)))
    text = " ".join(report(out).read_text("utf-8").split())
    assert "This audit is not finished." in text
    assert "3 of 4 shards are there, 17 of 25 images" in text
    assert "The images have no labels, so nothing is said about right and wrong." in text
    assert "No figures were asked for" in text
    assert 'id="wrong"' not in text
    assert 'id="sheets"' not in text
    assert 'id="agreement"' not in text


def test_photos_that_are_gone_are_left_out(dataset, tmp_path) -> None:
    out = run(dataset, tmp_path / "out", methods=["gradient"], method_options={}, metrics=["deletion"])
    manifest = out / "manifest.json"
    manifest.write_text(manifest.read_text().replace(str(dataset), str(tmp_path / "nowhere")))
    page = report(out, images=1).read_text("utf-8")
    shown = set(re.findall(r'alt="Gradient of ([^"]*)"', page))
    assert f"{len(shown)} photo" in page
    assert 'alt="photo of' not in page


def test_what_is_not_finite_is_listed_and_left_out(tmp_path) -> None:
    folder = tmp_path / "data"
    for n in range(6):
        write_photo(folder / "cat" / f"{n}.png", n)
    Image.new("RGB", (10, 12), "white").save(folder / "cat" / "white.png")
    out = run(folder, tmp_path / "out", model="tests.audit.tiny:not_a_number", methods=["gradient"], method_options={})
    page = report(out).read_text("utf-8")
    found = read(page)
    assert found.tables["errors"][0][1:] == [["Gradient", "the model's output", "1", "cat/white.png"]]
    assert "1 result is not finite." in page
    assert "nan" not in found.text["methods"].lower()


def test_overlays_of_every_kind_of_map_are_where_the_map_is(tmp_path) -> None:
    """The brightest part of an overlay is where the stored map is largest."""
    import base64
    import io

    folder = tmp_path / "data"
    for n in range(4):
        write_photo(folder / "cat" / f"{n}.png", n)
    for kind, segments in (("uint8", "grid:3x2"), ("float16", "slic:6")):
        out = run(folder, tmp_path / kind, maps=kind, method_options={"leave_one_out": {"segments": segments}})
        page = report(out, images=1).read_text("utf-8")
        for title in ("Leave-one-out", "Gradient", "Grad-CAM", "Integrated Gradients"):
            shown = re.findall(rf'src="data:image/jpeg;base64,([^"]*)" alt="{title} of', page)
            assert shown, title
            for picture in shown:
                with Image.open(io.BytesIO(base64.b64decode(picture))) as image:
                    assert image.size == (10, 12)
                    pixels = np.asarray(image.convert("RGB"), np.float64)
                assert pixels.std() > 1, "the overlay is one colour"


@pytest.mark.parametrize(("images", "value"), [(0, "0"), (25, "25"), (True, "True"), (2.5, "2.5")])
def test_numbers_of_images(audited, images, value) -> None:
    with pytest.raises(ValueError) as caught:
        report(audited, images=images)
    assert str(caught.value) == f"pysal.audit.report: images must be a whole number from 1 to 24, got {value}"


def test_errors(tmp_path, audited) -> None:
    with pytest.raises(ValueError) as caught:
        report(tmp_path)
    assert (
        str(caught.value) == f"pysal.audit.report: out must be the folder of an audit, got {tmp_path} (no manifest.json in it)"
    )
    for name in ("manifest.json", "plan.parquet"):
        (tmp_path / name).write_bytes((audited / name).read_bytes())
    (tmp_path / "shards").mkdir()
    with pytest.raises(ValueError) as caught:
        report(tmp_path)
    assert str(caught.value) == (f"pysal.audit.report: out must hold at least one finished shard, got {tmp_path} (none of 4)")


def test_plots_are_well_formed_and_take_the_pages_colours() -> None:
    values = {"one & <two>": np.linspace(0, 1, 100), "three": np.array([0.5, np.nan]), "none": np.array([np.nan])}
    for svg in (distributions(values, "Deletion (lower is better)"), confidences(np.array([0.9, 0.95]), np.array([]))):
        root = ElementTree.fromstring(svg)
        assert root.get("role") == "img"
        assert "currentColor" in svg
        assert "var(--accent)" in svg
        assert not re.search(r"#0[1-4]0[1-4]0[1-4]", svg)
        names = re.findall(r' id="([^"]*)"', svg)
        assert len(names) == len(set(names))
    assert distributions({"none": np.array([np.nan])}, "Deletion") == ""


def test_words() -> None:
    assert [percent(value) for value in (0.0, 0.123, 0.9996, 1.0, float("nan"), None)] == [
        "0.0 %", "12.3 %", ">99.9 %", "100.0 %", NOTHING, NOTHING,
    ]  # fmt: skip
    assert [number(value) for value in (0.5, -0.25, 12.34, 0.0, 1e-5, None)] == [
        "0.500", "\N{MINUS SIGN}0.250", "12.3", "0.000", "1.0e\N{MINUS SIGN}05", NOTHING,
    ]  # fmt: skip
    assert moment("2026-01-02T03:04:05+00:00") == "2 January 2026, 03:04 UTC"


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser(audited, page, browser, tmp_path, scheme) -> None:
    del page  # it is written
    requests: list[str] = []
    messages: list[str] = []
    with browser.new_context(viewport={"width": 1280, "height": 900}, color_scheme=scheme) as context:
        context.set_default_timeout(PATIENCE)
        tab = context.new_page()
        tab.on("request", lambda request: requests.append(request.url))
        tab.on("console", lambda message: messages.append(message.text))
        tab.on("pageerror", lambda error: messages.append(str(error)))
        tab.goto((audited / "report.html").as_uri())
        sizes = tab.evaluate("async () => { for (const i of document.images) await i.decode();"
                             " return [...document.images].map(i => [i.naturalWidth, i.naturalHeight]) }")  # fmt: skip
        assert len(sizes) > 4 * 6
        assert all(size == [10, 12] for size in sizes)
        assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "the page is wider than the window"
        page_colour, text = (tab.evaluate(f"getComputedStyle(document.body).{name}") for name in ("backgroundColor", "color"))
        light, dark = (sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (page_colour, text))
        assert (light > dark) == (scheme == "light")
        rows = "[...document.querySelectorAll('.strip')].map(s => new Set([...s.children].map(c => c.offsetTop)).size)"
        assert set(tab.evaluate(rows)) == {1}, "photo and maps of an image stand side by side"
        tab.set_viewport_size({"width": 690, "height": 900})  # a sheet of A4 without its margins
        cut = "[...document.querySelectorAll('.scroll')].filter(s => s.scrollWidth > s.clientWidth)"
        cut += ".map(s => s.closest('section').id)"
        tab.emulate_media(media="print")
        assert tab.evaluate(cut) == [], "a table is wider than the sheet"
        tab.emulate_media(media="screen")
        tab.set_viewport_size({"width": 1280, "height": 900})
        assert tab.evaluate(cut) == [], "a table is wider than the window"
        for chart in tab.query_selector_all("svg"):
            box = chart.bounding_box()
            assert box is not None
            assert box["width"] > 200
            assert box["height"] > 60
        for link in tab.query_selector_all("nav a"):
            assert tab.query_selector(link.get_attribute("href")) is not None
        picture = tab.screenshot(path=tmp_path / "report.png", full_page=True)
        tab.set_viewport_size({"width": 400, "height": 800})
        assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "the page is too wide for a phone"
    assert len(picture) > 50_000
    with Image.open(tmp_path / "report.png") as image:
        assert len(image.getcolors(2**24) or ()) > 500  # photos, maps and text, not an empty page
    fetched = [url for url in requests if not url.startswith("data:")]
    assert [url2pathname(url.removeprefix("file://")) for url in fetched] == [str(audited / "report.html")]
    assert messages == []
