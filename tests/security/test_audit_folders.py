"""Folders, tables, tars and images of somebody else, generated: a row, a reason or a sentence for each, and an end."""

import contextlib
import io
import json
import os
import random
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import pysal
from pysal.audit import Job, data, manifest, report, resume, status, verify
from tests.audit.conftest import write_photo

SOME = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
GRADIENT: dict[str, Any] = {"model": "tests.audit.tiny:classifier", "methods": ["gradient"], "shard_size": 3}


def found(source: Path | str, labels: data.Labels = "none") -> list[str]:
    """Return the paths of what an audit of a source would explain."""
    return data.find("pysal.audit.Job", str(source), labels, 100, None, 3).images["path"].to_pylist()


def refusal(source: Path | str, labels: data.Labels = "auto") -> str:
    with pytest.raises(ValueError) as refused:
        found(source, labels)
    assert "\n" not in str(refused.value)
    return str(refused.value).removeprefix("pysal.audit.Job: ")


def png(seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 200, (24, 24, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


# Damaged images ------------------------------------------------------------------------------------------------------


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(1).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


# Also formats that are tried by nobody here, under the names of photos.
WHOLE = {
    kind: encoded(kind)
    for kind in ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM", "TGA", "DDS", "JPEG2000", "ICO")
}
HEADS = [
    b"\1\0\0\0" + b"\0" * 36 + b" EMF" + b"\0" * 60,
    b"FTEX" + b"\0" * 60,
    b"DDS " + b"\0" * 124,
    b"\xff\xd8\xff",
    b"II*\0\xff\xff\xff\xff",
]


@given(st.sampled_from(sorted(WHOLE)), st.integers(0, 2**32), st.integers(1, 12), st.booleans())
@SOME
def test_a_damaged_image_is_read_or_has_a_reason(kind, seed, changes, cut) -> None:
    generator = random.Random(seed)
    content = bytearray(WHOLE[kind])
    for _ in range(changes):
        content[generator.randrange(min(len(content), 400))] = generator.randrange(256)
    check_image(bytes(content[: generator.randrange(len(content))] if cut else content))


@pytest.mark.parametrize("content", HEADS)
def test_heads_of_images_that_are_nothing_else(content) -> None:
    check_image(content)


def check_image(content: bytes) -> None:
    """Read an image as an audit does: it is one, or the reason is one of those that are counted."""
    reason, image = data.DAMAGED, None
    try:
        image = data.decode(content, None, (8, 8), 3)
    except data.Unreadable as why:
        reason = why.reason
    counted = {data.DAMAGED, "not an image that Pillow can read", "the file is empty"}
    assert reason in counted or reason.startswith("must be an image of at ")
    assert image is None or (image.shape == (1, 3, 8, 8) and bool(((image >= 0) & (image <= 1)).all()))


def test_formats_that_photos_do_not_come_in_are_not_tried() -> None:
    with pytest.raises(ValueError, match=r"not an image that Pillow can read"):
        pysal.read_image(WHOLE["DDS"])


# Folders -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loops", [1, 2, 5])
def test_links_that_lead_in_circles_end(loops, tmp_path) -> None:
    write_photo(tmp_path / "photos" / "a" / "b" / "ok.png", 0)
    for n in range(loops):
        (tmp_path / "photos" / "a" / f"up{n}").symlink_to("..")
        (tmp_path / "photos" / "a" / "b" / f"top{n}").symlink_to(tmp_path / "photos")
    assert found(tmp_path / "photos") == ["a/b/ok.png"]
    assert found(f"{tmp_path}/photos/**/*.png") == ["a/b/ok.png"]


def test_a_folder_that_a_link_leads_to_is_looked_into(tmp_path) -> None:
    write_photo(tmp_path / "elsewhere" / "ok.png", 0)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos" / "broken.png").symlink_to("nowhere.png")
    assert found(tmp_path / "photos") == ["broken.png", "linked/ok.png"]


@pytest.mark.parametrize("pattern", ["**/*.png", "*/*.png", "**/c?t.png", "a/**", "**/[ab]*.png", "*.png", "a/b/*"])
def test_globs_are_those_of_python(pattern, tmp_path) -> None:
    import glob

    for name in ("cat.png", "a/cat.png", "a/b/cot.png", "a/b/x.png", "b/ab.png", ".hidden/x.png", "a/.x.png"):
        write_photo(tmp_path / name, 0)
    expected = [path for path in glob.glob(pattern, root_dir=tmp_path, recursive=True) if (tmp_path / path).is_file()]
    fixed = tmp_path / pattern[: pattern.index("*")].rpartition("/")[0]  # paths are relative to where the pattern begins
    assert [str((fixed / path).relative_to(tmp_path)) for path in found(f"{tmp_path}/{pattern}")] == sorted(expected)


@pytest.mark.parametrize(
    "name", [b"caf\xe9.png", b"\xff\xfe.png", b"caf\\xe9.png", "日本 ü.png".encode(), b"new\nline.png", b"a'\"<b>.png"]
)
def test_any_name_of_a_file_is_explained(name, tmp_path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / os.fsdecode(name)).write_bytes(png())
    job = Job(photos, out=tmp_path / "out", **GRADIENT)
    assert job.run(engine="inline").explained == 1
    assert verify(tmp_path / "out", images=True) == []
    assert report(tmp_path / "out").read_text("utf-8")


def test_tars_beside_photos_are_not_lost_without_a_word(tmp_path) -> None:
    write_photo(tmp_path / "ok.png", 0)
    with tarfile.open(tmp_path / "a.tar", "w"):
        pass
    assert refusal(tmp_path) == (
        "data must be photos or tars, not both (name one kind by a glob, as in 'DIR/*.tar'), "
        f"got 1 tar beside ok.png in {tmp_path}"
    )
    assert found(f"{tmp_path}/*.png") == ["ok.png"]


# Tables --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"path\na\0b.png\n", "data must have paths without a zero byte, got 'a\\x00b.png' in row 0 of {path}"),
        (b"path,path\na,b\n", "data must have one column 'path', got 2 in {path}"),
        (b"path,label,label\na,1,2\n", "data must have one column 'label', got 2 in {path}"),
        (
            b"path,label\nok.png," + b"9" * 6000 + b"\n",
            "labels must be class indices, got 99999999999999999999... of 6000 digits of ok.png",
        ),
        (b"path,label\nok.png,7\n", "labels must be below the model's 3 classes, got 7 of ok.png"),
        (b"path\n\n", "data must hold at least one image, got {path}"),
    ],
)
def test_tables_that_cannot_be(content, sentence, tmp_path) -> None:
    (tmp_path / "table.csv").write_bytes(content)
    assert refusal(tmp_path / "table.csv") == sentence.format(path=tmp_path / "table.csv")


@given(st.binary(max_size=200), st.sampled_from(["csv", "tsv", "parquet"]))
@SOME
def test_tables_of_anything_are_a_plan_or_a_sentence(tmp_path, content, ending) -> None:
    path = tmp_path / f"table.{ending}"
    path.write_bytes(b"path,label\n" + content if ending == "csv" else content)
    said = "pysal.audit.Job: "
    try:
        found(path, "auto")
    except ValueError as error:
        said = str(error)
    assert said.startswith("pysal.audit.Job: ")
    assert len(said.splitlines()) == 1


# Tars ----------------------------------------------------------------------------------------------------------------


def tar_of(path: Path, *members: tuple[str, bytes | str, bytes]) -> Path:
    """Write members (name, content or where a link leads, type)."""
    with tarfile.open(path, "w") as archive:
        for name, content, kind in members:
            member = tarfile.TarInfo(name)
            member.type = kind
            if isinstance(content, bytes):
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
            else:
                member.linkname = content
                archive.addfile(member)
    return path


def test_links_in_tars_stand_for_what_they_lead_to(tmp_path) -> None:
    tar_of(
        tmp_path / "a.tar",
        ("x/a.png", png(), tarfile.REGTYPE),
        ("x/b.png", "x/a.png", tarfile.LNKTYPE),
        ("x/c.png", "a.png", tarfile.SYMTYPE),
        ("x/d.png", "../../../etc/passwd", tarfile.SYMTYPE),
        ("x/e.png", "x/e.png", tarfile.LNKTYPE),
    )
    job = Job(tmp_path / "a.tar", out=tmp_path / "out", **GRADIENT)
    done = job.run(engine="inline")
    assert (done.explained, done.failed) == (3, 2)
    errors = {row["path"]: row["reason"] for row in pq.read_table(tmp_path / "out" / "errors").to_pylist()}
    assert errors == dict.fromkeys(["a.tar/x/d.png", "a.tar/x/e.png"], "not a whole member of its tar")


@given(st.integers(0, 2**32))
@SOME
def test_damaged_tars_are_rows_reasons_or_a_sentence(tmp_path, seed) -> None:
    generator = random.Random(seed)
    content = bytearray(
        tar_of(tmp_path / "good.tar", ("a.png", png(), tarfile.REGTYPE), ("b.png", "a.png", tarfile.LNKTYPE)).read_bytes()
    )
    for _ in range(generator.randrange(1, 6)):
        content[generator.randrange(512)] = generator.randrange(256)
    if generator.random() < 0.5:  # a checksum that is right all the same
        content[148:156] = b" " * 8
        content[148:156] = b"%06o\0 " % sum(content[:512])
    path = tmp_path / "damaged.tar"
    path.write_bytes(content)
    said, plan = "pysal.audit.Job: ", None
    try:
        plan = data.find("pysal.audit.Job", str(path), "none", 3, None, 3)
    except ValueError as error:
        said = str(error)
    assert said.startswith("pysal.audit.Job: ")
    for item in plan.items(0, 3) if plan is not None else ():
        with contextlib.suppress(data.Unreadable):
            data.read_bytes(plan.root, item)


def test_a_member_of_negative_size_is_a_reason(tmp_path) -> None:
    head = bytearray(512)
    head[:5], head[156:157], head[257:263] = b"a.png", b"0", b"ustar\0"
    head[124:136] = b"\xff" * 10 + (-512 + 65536).to_bytes(2, "big")
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    (tmp_path / "negative.tar").write_bytes(bytes(head) + png() + bytes(2048))
    try:
        plan = data.find("pysal.audit.Job", str(tmp_path / "negative.tar"), "none", 3, None, 3)
    except ValueError as error:
        said = str(error)
        assert "data must " in said
        return
    with pytest.raises(data.Unreadable, match="not a whole member of its tar"):
        data.read_bytes(plan.root, plan.items(0, 3)[0])


# Folders of results --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def audited(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("audited")
    for n in range(4):
        write_photo(folder / "photos" / f"{n}.png", n)
    Job(folder / "photos", out=folder / "out", **GRADIENT).run(engine="inline")
    return folder / "out"


@pytest.fixture
def kept(audited) -> Iterator[Path]:
    """The folder, whose manifest is put back afterwards."""
    before = (audited / "manifest.json").read_bytes()
    yield audited
    (audited / "manifest.json").write_bytes(before)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    for key, one in value.items() if isinstance(value, dict) else ():
        yield (*path, key)
        yield from places(one, (*path, key))


@given(st.data())
@SOME
def test_a_manifest_with_anything_missing_or_of_another_kind_is_a_sentence(audited, data) -> None:
    whole = (audited / "manifest.json").read_bytes()
    about = json.loads(whole)
    *path, last = data.draw(st.sampled_from([place for place in places(about) if place[0] not in ("versions",)]))
    parent = about
    for key in path:
        parent = parent[key]
    if data.draw(st.booleans()):
        del parent[last]
    else:
        parent[last] = data.draw(st.sampled_from([None, [], {}, "x", -1, 1.5, True, [None], {"a": 1}, "9" * 50]))
    (audited / "manifest.json").write_text(json.dumps(about))
    try:
        for ask in (status, verify, report, lambda out: resume(out, allow_code=True)):
            said = "pysal"
            try:
                ask(audited)
            except (ValueError, TypeError, FileNotFoundError) as error:
                said = str(error)
            assert said.startswith("pysal"), (path, last)
            assert "\n" not in said
    finally:
        (audited / "manifest.json").write_bytes(whole)


def test_a_missing_key_is_named(kept) -> None:
    about = json.loads((kept / "manifest.json").read_text())
    del about["data"]["sha256"]
    (kept / "manifest.json").write_text(json.dumps(about))
    with pytest.raises(ValueError) as refused:
        manifest.read("pysal.audit.status", kept)
    assert str(refused.value) == (
        "pysal.audit.status: out must have a whole manifest.json (from a copy of the folder, or run the audit anew), "
        f"got {kept}, without 'data.sha256'"
    )


def test_a_lost_plan_is_written_again(kept) -> None:
    plan = (kept / "plan.parquet").read_bytes()
    (kept / "plan.parquet").unlink()
    with pytest.raises(ValueError, match=r"have a readable plan.parquet \(pysal audit resume writes a lost one\)"):
        report(kept)
    resume(kept, allow_code=True).run(engine="inline")
    assert (kept / "plan.parquet").read_bytes() == plan
    assert verify(kept) == []
