"""The images of an audit: found in a folder, a table or tars, sorted, numbered, cut into shards, and read one by one."""

import fnmatch
import glob
import hashlib
import os
import posixpath
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from pysal._checks import first_line, refuse
from pysal._folders import files_below
from pysal._spelling import counted
from pysal.models import Classifier, read_image
from pysal.models.photos import suffixes_of

Labels = Literal["auto", "folder", "none"]

# No image under Pillow's limit of pixels has more bytes than this, and a worker must not read a file that fills its memory.
LARGEST_FILE = 2**30
DAMAGED = "damaged or cut off"
NO_MEMORY = "does not fit into memory"

IMAGES = pa.schema(
    [
        pa.field("id", pa.int64(), nullable=False),
        pa.field("path", pa.string(), nullable=False),
        pa.field("label", pa.int32()),
        pa.field("shard", pa.int32(), nullable=False),
        pa.field("archive", pa.string()),
        pa.field("offset", pa.int64()),
        pa.field("size", pa.int64(), nullable=False),
    ]
)


class Item(NamedTuple):
    """An image of an audit: see plan.parquet in docs/auditing.md."""

    id: int
    path: str
    label: int | None
    archive: str | None
    offset: int | None
    size: int


class _Found(NamedTuple):
    path: str
    label: str | int | None
    archive: str | None
    offset: int | None
    size: int


class Unreadable(Exception):
    """An image cannot be read.

    Attributes:
        reason: why, in words that all files of the kind share, so that they can be counted.
        detail: what is of this file alone; None where the reason says all.
    """

    def __init__(self, reason: str, detail: str | None = None) -> None:
        super().__init__(reason if detail is None else f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Data:
    """The images of an audit.

    Attributes:
        kind: "folder", "glob", "table" or "tars".
        root: the folder that paths are relative to.
        images: a table with the schema `IMAGES`, which is plan.parquet.
        sha256: of its columns.
    """

    kind: str
    root: Path
    images: pa.Table
    sha256: str

    @property
    def shards(self) -> int:
        """Number of shards."""
        return int(self.images["shard"][-1].as_py()) + 1

    def items(self, shard: int, shard_size: int) -> list[Item]:
        """Return the images of a shard."""
        rows = self.images.slice(shard * shard_size, shard_size).drop_columns(["shard"]).to_pylist()
        return [Item(**row) for row in rows]


def find(
    where: str,
    source: str,
    labels: Labels,
    shard_size: int,
    class_index: Callable[[str], int] | None,
    classes: int | None,
    channels: int = 3,
) -> Data:
    """Return the images of a source, sorted by path.

    Args:
        where: the public name that was called, for errors.
        source: a folder (its images, also in folders below), a glob, a table (.csv, .tsv or .parquet with the columns path
            and, if wanted, label), or WebDataset tars (one, a folder of them or a glob).
        labels: "auto" takes a table's column label and a tar's .cls files, "folder" the name of each image's folder,
            "none" none.
        shard_size: images per shard.
        class_index: from a class name to its index; None where the model has no names.
        classes: number of classes, which labels must be below; None = not checked.
        channels: of the model's images, which say how the names of a folder's files end.

    Raises:
        ValueError: there is no image, a table lacks the column path, a tar cannot be read, or a label is no class.
    """
    kind, root, found = _look(where, source, labels, suffixes_of(channels))
    items = sorted(found, key=lambda item: (item.path, str(item.label)))
    if not items:
        others = left_out(source, channels)
        wanted = "whose name ends as a photo's" if channels in (1, 3) else f"({' or '.join(sorted(suffixes_of(channels)))})"
        requirement = f"hold at least one image {wanted}" if others else "hold at least one image"
        refuse(where, "data", requirement, f"{source} ({counted(others)})" if others else source)
    known: dict[str | int | None, int | None] = {None: None}
    for item in items:
        if item.label not in known:
            known[item.label] = _label(where, item, class_index, classes)
    images = pa.table(
        [
            pa.array(range(len(items)), pa.int64()),
            pa.array([item.path for item in items], pa.string()),
            pa.array([known[item.label] for item in items], pa.int32()),
            pa.array([n // shard_size for n in range(len(items))], pa.int32()),
            pa.array([item.archive for item in items], pa.string()),
            pa.array([item.offset for item in items], pa.int64()),
            pa.array([item.size for item in items], pa.int64()),
        ],
        schema=IMAGES,
    )
    return Data(kind, root, images, fingerprint(images))


def fingerprint(images: pa.Table) -> str:
    """Return the SHA-256 of what a table of images says, whatever file it is in."""
    digest = hashlib.sha256()
    for batch in images.to_batches(max_chunksize=65536):
        for row in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            digest.update(repr(row).encode())
    return digest.hexdigest()


def first_difference(before: pa.Table, now: pa.Table) -> str:
    """Return in words where two plans part."""
    if len(before) != len(now):
        return f"{len(before)} images then, {len(now)} now"
    for name in ("path", "label", "size", "offset", "shard"):
        then, there = before[name].to_pylist(), now[name].to_pylist()
        for n, (old, new) in enumerate(zip(then, there, strict=True)):
            if old != new:
                return f"{name} of image {n} ({before['path'][n]}) was {old}, is {new}"
    return "another order"


def _look(where: str, source: str, labels: Labels, suffixes: frozenset[str]) -> tuple[str, Path, Iterable[_Found]]:
    path = Path(source)
    if path.is_dir():
        tars = sorted(path.glob("*.tar"))
        loose = next(_photos(path, suffixes), None)
        if tars and loose is not None:
            got = f"{len(tars)} tar{'s' * (len(tars) > 1)} beside {loose.name} in {path}"
            refuse(where, "data", "be photos or tars, not both (name one kind by a glob, as in 'DIR/*.tar')", got)
        if tars:
            return "tars", path.absolute(), _in_tars(where, path, tars, suffixes)
        return "folder", path.absolute(), _files(path, _photos(path, suffixes), labels)
    if path.is_file():
        if path.suffix == ".tar":
            return "tars", path.parent.absolute(), _in_tars(where, path.parent, [path], suffixes)
        if path.suffix in (".csv", ".tsv", ".parquet"):
            return "table", path.parent.absolute(), _in_table(where, path, labels)
        refuse(where, "data", "be a folder, a glob, a .csv, .tsv or .parquet table or .tar archives", source)
    if not glob.has_magic(source):
        refuse(where, "data", "be there", f"{source} (no such file or folder)")
    parts = path.parts
    fixed = next(n for n, part in enumerate(parts) if glob.has_magic(part))
    root = Path(*parts[:fixed])
    matches = list(_matches(root, parts[fixed:]))
    if matches and all(match.suffix == ".tar" for match in matches):
        return "tars", root.absolute(), _in_tars(where, root, sorted(matches), suffixes)
    return "glob", root.absolute(), _files(root, (match for match in matches if not match.is_dir()), labels)


def _photos(folder: Path, suffixes: frozenset[str]) -> Iterator[Path]:
    """Yield the photos of a folder and of those below, by the ends of their names; hidden ones are left out."""
    for path in files_below(folder):
        if path.suffix.lower() in suffixes:
            yield path


def left_out(source: str, channels: int = 3) -> Counter[str]:
    """Return the endings of the files of a folder that no audit reads -> how many; hidden ones are not counted."""
    path = Path(source)
    if not path.is_dir():
        return Counter()
    endings = Counter(file.suffix.lower() for file in files_below(path))
    read = {".tar"} if endings[".tar"] else suffixes_of(channels)
    return Counter({ending: count for ending, count in endings.items() if ending not in read})


def _matches(root: Path, parts: Sequence[str]) -> Iterator[Path]:
    """Yield the files below a folder whose paths match a glob's parts; links that lead in circles end."""
    if "**" not in parts:
        yield from (Path(match) for match in glob.iglob(str(Path(root, *parts))))
        return
    yield from (path for path in files_below(root) if _fits(path.relative_to(root).parts, parts))


def _fits(names: Sequence[str], parts: Sequence[str]) -> bool:
    """Say whether the names of a path match the parts of a glob, of which ** stands for any number of folders."""
    if not parts:
        return not names
    if parts[0] == "**":
        return _fits(names, parts[1:]) or (bool(names) and _fits(names[1:], parts))
    return bool(names) and fnmatch.fnmatchcase(names[0], parts[0]) and _fits(names[1:], parts[1:])


def _files(root: Path, paths: Iterable[Path], labels: Labels) -> Iterator[_Found]:
    for path in paths:
        label = _shown(path.absolute().parent.name) if labels == "folder" else None
        yield _Found(_shown(path.relative_to(root).as_posix()), label, None, None, _size(path))


def _shown(name: str) -> str:
    """Return a file's name as text; `_place` turns the escapes back in which bytes that are not UTF-8 stand."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _place(root: Path, name: str) -> Path:
    """Return the file of a name in the table of images."""
    place = root / name
    if "\\x" not in name or place.exists():
        return place
    return root / os.fsdecode(re.sub(rb"\\x([89a-f][0-9a-f])", lambda match: bytes.fromhex(match[1].decode()), name.encode()))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _in_table(where: str, path: Path, labels: Labels) -> Iterator[_Found]:
    try:
        if path.suffix == ".parquet":
            table = pq.read_table(path)
        else:
            from pyarrow import csv

            delimiter = "\t" if path.suffix == ".tsv" else ","
            convert = csv.ConvertOptions(column_types={"path": pa.string(), "label": pa.string()}, strings_can_be_null=True)
            table = csv.read_csv(path, parse_options=csv.ParseOptions(delimiter=delimiter), convert_options=convert)
        names = table.column_names  # decoded only now
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        refuse(where, "data", "be a readable table", f"{path} ({first_line(error)})")
    for name in ("path", "label"):
        if names.count(name) > 1:
            refuse(where, "data", f"have one column {name!r}", f"{names.count(name)} in {path}")
    if "path" not in names:
        refuse(where, "data", "have a column 'path'", f"{path} with {', '.join(names)}")
    paths = table["path"].to_pylist()
    given = table["label"].to_pylist() if "label" in names and labels == "auto" else [None] * len(paths)
    for n, (name, label) in enumerate(zip(paths, given, strict=True)):
        if not isinstance(name, str) or not name:
            refuse(where, "data", "have a path in each row", f"{name!r} in row {n} of {path}")
        if "\0" in name:
            refuse(where, "data", "have paths without a zero byte", f"{name[:80]!r} in row {n} of {path}")
        place = path.parent / name
        yield _Found(name, place.absolute().parent.name if labels == "folder" else label, None, None, _size(place))


def _in_tars(where: str, root: Path, tars: Sequence[Path], suffixes: frozenset[str]) -> Iterator[_Found]:
    """Yield the images of WebDataset tars: members that share a name up to its first dot are one sample."""
    for tar in tars:
        archive = _shown(tar.relative_to(root).as_posix())
        images: list[tuple[str, tarfile.TarInfo]] = []
        classes: dict[str, str] = {}
        places: dict[str, tarfile.TarInfo] = {}
        try:
            with tarfile.open(tar, "r:") as members:
                for member in members:
                    folder, _, name = member.name.rpartition("/")
                    stem, _, ending = name.partition(".")
                    key = f"{folder}/{stem}"
                    if member.isreg():
                        places[posixpath.normpath(member.name)] = member
                    if not (member.isreg() or member.islnk() or member.issym()) or name.startswith("."):
                        continue
                    if ending == "cls" and member.isreg():
                        content = members.extractfile(member)
                        classes[key] = content.read(1000).decode("utf-8", "replace").strip() if content else ""
                    elif os.path.splitext(name)[1].lower() in suffixes:
                        images.append((key, member))
        except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
            refuse(where, "data", "be readable, uncompressed tars", f"{tar} ({str(error) or type(error).__name__})")
        for key, member in images:
            # a link stands for the member it leads to; one that leads nowhere has its row among the errors
            target = member.linkname if member.islnk() else posixpath.join(posixpath.dirname(member.name), member.linkname)
            data = member if member.isreg() else places.get(posixpath.normpath(target))
            name = member.name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
            offset, size = (data.offset_data, data.size) if data is not None else (0, -1)
            yield _Found(f"{archive}/{name}", classes.get(key), archive, offset, size)


def _label(where: str, item: _Found, class_index: Callable[[str], int] | None, classes: int | None) -> int | None:
    text = str(item.label).strip()
    if not text:
        return None
    if re.fullmatch(r"\d{19,}", text):  # Python itself refuses to read thousands of digits
        refuse(where, "labels", "be class indices", f"{text[:20]}... of {len(text)} digits of {item.path}")
    if re.fullmatch(r"\d+", text):
        index = int(text)
    elif class_index is None:
        refuse(where, "labels", "be class indices where the model has no class names", f"{text!r} of {item.path}")
    else:
        try:
            index = class_index(text)
        except ValueError as error:
            requirement, _, got = str(error).partition(" must ")[2].partition(", got ")
            refuse(where, "labels", requirement, f"{got} of {item.path}")
    if classes is not None and index >= classes:
        refuse(where, "labels", f"be below the model's {classes} classes", f"{index} of {item.path}")
    return index


def read_bytes(root: Path, item: Item) -> bytes:
    """Return the bytes of an image's file.

    Raises:
        Unreadable: it cannot be read, or is too large to be an image.
    """
    place = _place(root, item.path if item.archive is None else item.archive)
    try:
        if item.archive is not None and item.size < 0:
            raise Unreadable("not a whole member of its tar")
        if item.archive is None and place.is_file():
            item = item._replace(size=place.stat().st_size)
        if item.archive is None and place.exists() and not place.is_file():
            raise Unreadable("not a regular file")
        if item.size > LARGEST_FILE:
            raise Unreadable(f"more than {LARGEST_FILE} bytes")
        with place.open("rb") as file:
            file.seek(item.offset or 0)
            content = file.read(item.size)
    except OSError as error:
        raise Unreadable((error.strerror or type(error).__name__).lower()) from error
    if len(content) < item.size:
        raise Unreadable(DAMAGED, f"{len(content)} of {item.size} bytes are there")
    return content


def decode(content: bytes, model: Any, size: tuple[int, int], channels: int) -> Tensor:
    """Return an image (1, channels, H, W) in [0, 1] as the model wants it, or of a size.

    Raises:
        Unreadable: it is no image.
    """
    try:
        if isinstance(model, Classifier):
            return read_image(content, model, channels=channels)
        return read_image(content, size=size, channels=channels)
    except ValueError as error:
        raise _unreadable(str(error)) from error
    except MemoryError as error:
        raise Unreadable(NO_MEMORY) from error


def _unreadable(sentence: str) -> Unreadable:
    """Return a refusal of `read_image` as the reason that many files share and the detail of this one."""
    requirement, _, got = sentence.partition(" must ")[2].partition(", got ")
    inner = re.search(r"\((.*)\)$", got)
    detail = inner[1] if inner else None
    if requirement != "be a readable image file" or detail is None:
        if not requirement:  # of no sentence of ours: a decoder's own
            return Unreadable(DAMAGED, without_addresses(sentence))
        return Unreadable(f"must {requirement}", detail)
    if detail in ("not an image that Pillow can read", "the file is empty"):
        return Unreadable(detail)
    return Unreadable(DAMAGED, without_addresses(detail.removeprefix(f"{DAMAGED}: ")))


def without_addresses(text: str) -> str:
    """Return a library's message without the addresses of objects, which differ from process to process."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)
