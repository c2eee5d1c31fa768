"""Where images come from: the same photos are found, sorted and labelled the same way in every kind of source."""

import io
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pysal.audit.data import Item, Unreadable, decode, find, first_difference, read_bytes
from tests.audit import tiny
from tests.audit.conftest import PHOTOS, write_photo

WHERE = "pysal.audit.Job"
CLASS_INDEX = tiny.classifier().class_index


def look(source: object, labels: str = "auto", shard_size: int = 4, classes: int | None = 3):
    return find(WHERE, str(source), labels, shard_size, CLASS_INDEX, classes)


def refused(source: object, labels: str = "auto", index=CLASS_INDEX) -> str:
    with pytest.raises(ValueError, match=r"^pysal.audit.Job: ") as caught:
        find(WHERE, str(source), labels, 4, index, 3)
    return str(caught.value).removeprefix("pysal.audit.Job: ")


def pixels_of(data) -> list[torch.Tensor]:
    items = [item for shard in range(data.shards) for item in data.items(shard, 4)]
    assert [item.id for item in items] == list(range(len(items)))
    return [decode(read_bytes(data.root, item), None, tiny.SIZE, 3) for item in items]


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def tars(photos, tmp_path) -> Path:
    """The photos in two tars as WebDataset lays them out: a photo, its class, something else."""
    folder = tmp_path / "tars"
    folder.mkdir()
    names = sorted(photos.rglob("*.png"))
    for n, part in enumerate((names[:6], names[6:])):
        members: dict[str, bytes] = {}
        for path in part:
            key = f"{path.parent.name}/{path.stem}"
            members |= {f"{key}.cls": b" 1\n" if path.parent.name == "dog" else b"cat", f"{key}.png": path.read_bytes()}
            members |= {f"{key}.json": b"{}"}
        write_tar(folder / f"{n:03d}.tar", members)
    return folder


def test_every_source_finds_the_same_photos(photos, tars, tmp_path) -> None:
    names = sorted(photos.rglob("*.png"))
    (tmp_path / "list.csv").write_text("label,path\n" + "".join(f"{path.parent.name},{path}\n" for path in reversed(names)))
    (tmp_path / "list.tsv").write_text("path\tlabel\n" + "".join(f"{path}\t{path.parent.name}\n" for path in names))
    labels = pa.array([path.parent.name for path in names]).dictionary_encode()
    pq.write_table(pa.table({"path": [str(path) for path in names], "label": labels}), tmp_path / "list.parquet")
    folder = look(photos, "folder")
    expected, labels = pixels_of(folder), folder.images["label"].to_pylist()
    assert labels == [0] * 5 + [1] * 6
    assert folder.images["shard"].to_pylist() == [0] * 4 + [1] * 4 + [2] * 3
    sources = {
        "glob": (f"{photos}/**/*.png", "folder"),
        "table": (tmp_path / "list.csv", "auto"),
        "tars": (tars, "auto"),
    }
    for kind, (source, how) in sources.items():
        found = look(source, how)
        assert found.kind == kind
        assert found.images["label"].to_pylist() == labels
        assert all(map(torch.equal, pixels_of(found), expected)), kind
        assert found.images["size"].to_pylist() == folder.images["size"].to_pylist()
    for other in ("list.tsv", "list.parquet"):
        assert look(tmp_path / other).images.equals(look(tmp_path / "list.csv").images)
    assert look(f"{tars}/*.tar").images.equals(look(tars).images)
    assert look(tars / "000.tar").images["path"].to_pylist() == look(tars).images["path"].to_pylist()[:6]
    assert look(photos).images["label"].null_count == PHOTOS
    assert look(tmp_path / "list.csv", "none").images["label"].null_count == PHOTOS


def test_hidden_files_and_other_files_are_not_in_a_folder(tmp_path) -> None:
    write_photo(tmp_path / "b.png", 0)
    write_photo(tmp_path / "a" / "c.JPG.png", 1)
    for name in ("notes.txt", ".hidden.png", "a/list.csv"):
        (tmp_path / name).write_text("x")
    (tmp_path / ".git").mkdir()
    write_photo(tmp_path / ".git" / "d.png", 0)
    assert look(tmp_path).images["path"].to_pylist() == ["a/c.JPG.png", "b.png"]
    assert look(f"{tmp_path}/*").images["path"].to_pylist() == ["b.png", "notes.txt"]


def test_files_may_repeat_in_a_table(photos, tmp_path) -> None:
    path = next(photos.rglob("*.png"))
    (tmp_path / "list.csv").write_text("path,label\n" + f"{path},2\n" * 5 + f"{path},\n")
    found = look(tmp_path / "list.csv")
    assert found.images["label"].to_pylist() == [2, 2, 2, 2, 2, None]


def test_what_is_no_source(tmp_path) -> None:
    (tmp_path / "list.csv").write_text("file\nx.png\n")
    assert refused(tmp_path / "list.csv") == f"data must have a column 'path', got {tmp_path}/list.csv with file"
    (tmp_path / "list.csv").write_text("path,label\nx.png,cow\n")
    assert refused(tmp_path / "list.csv") == "labels must name a class, got 'cow' of x.png"
    assert refused(tmp_path / "list.csv", index=None) == (
        "labels must be class indices where the model has no class names, got 'cow' of x.png"
    )
    (tmp_path / "list.csv").write_text("path,label\nx.png,3\n")
    assert refused(tmp_path / "list.csv") == "labels must be below the model's 3 classes, got 3 of x.png"
    (tmp_path / "list.csv").write_text("path,label\n,3\n")
    assert refused(tmp_path / "list.csv") == f"data must have a path in each row, got None in row 0 of {tmp_path}/list.csv"
    (tmp_path / "list.parquet").write_text("not parquet")
    assert refused(tmp_path / "list.parquet").startswith(f"data must be a readable table, got {tmp_path}/list.parquet (")
    (tmp_path / "photo.png").touch()
    assert refused(tmp_path / "photo.png") == (
        f"data must be a folder, a glob, a .csv, .tsv or .parquet table or .tar archives, got {tmp_path}/photo.png"
    )
    (tmp_path / "cut.tar").write_bytes(b"no tar" * 1000)
    assert refused(tmp_path / "cut.tar").startswith(f"data must be readable, uncompressed tars, got {tmp_path}/cut.tar (")
    with tarfile.open(tmp_path / "packed.tar", "w:gz"):
        pass
    assert refused(tmp_path / "packed.tar").startswith(f"data must be readable, uncompressed tars, got {tmp_path}/packed.tar (")
    assert refused(f"{tmp_path}/*.gif") == f"data must hold at least one image, got {tmp_path}/*.gif"


def test_a_photo_that_a_tar_has_lost_its_end_of_is_unreadable(tars) -> None:
    items = look(tars).items(0, 4)
    (tars / "000.tar").write_bytes((tars / "000.tar").read_bytes()[: items[1].offset + 10])
    assert read_bytes(tars, items[0])
    with pytest.raises(Unreadable, match=rf"^damaged or cut off: 10 of {items[1].size} bytes are there$"):
        read_bytes(tars, items[1])


def test_the_fingerprint_is_that_of_the_data(photos, tmp_path) -> None:
    assert look(photos).sha256 == look(f"{photos}/**/*.png").sha256
    assert look(photos).sha256 != look(photos, "folder").sha256
    assert look(photos).sha256 != look(photos, shard_size=5).sha256
    unlabelled, labelled = look(photos).images, look(photos, "folder").images
    assert first_difference(unlabelled, labelled) == ("label of image 0 (cat/01.png) was None, is 0")
    assert read_bytes(photos, Item(0, "cat/01.png", None, None, None, -1)) == (photos / "cat/01.png").read_bytes()
