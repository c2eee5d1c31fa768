"""The photos that `pysal explain` is given: files, folders and globs, and a name for what is found of each."""

import glob
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import click

from pysal._folders import files_below
from pysal._spelling import counted
from pysal.cli.terminal import BadInput


@dataclass(frozen=True)
class Photos:
    """What the arguments name.

    Attributes:
        paths: of the photos, in the order of the arguments; those of a folder or a glob sorted, without what is there already.
        missing: those of them that are not there, and folders and globs without a photo -> why.
        left_out: endings of the files of folders that are no photos by their names -> how many.
    """

    paths: list[Path]
    missing: dict[Path, str] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)


def note(left_out: Counter[str]) -> str:
    """Return how many files were left out and why, ending -> how many; "" where none was."""
    if not left_out:
        return ""
    number = sum(left_out.values())
    return f"left out: {number} file{'s' * (number > 1)} whose names do not end as a photo's ({counted(left_out)})"


def find(given: Sequence[Path], suffixes: Iterable[str], results: Path | None = None, command: str = "pysal explain") -> Photos:
    """Return the photos that arguments name: files as they are, folders with all below them, and globs.

    Args:
        given: the arguments.
        suffixes: how names of photos end.
        results: where results are written. What is in it already is no photo of a folder above it, and a picture beside numbers
            of the same name is none anywhere: the same command twice explains the same photos.
        command: what errors name.

    Raises:
        BadInput: a single file that is not there, or a folder or a glob without a photo.
    """
    endings = frozenset(suffixes)
    found = Photos([])

    def nothing(one: Path, why: str) -> None:
        """Refuse what is asked for alone; among others it is one that cannot be read."""
        if len(given) == 1:
            raise _refused(command, one, why)
        found.paths.append(one)
        found.missing[one] = why

    for one in given:
        if os.path.isdir(one):
            inside = sorted(_below(one, results))
            photos = [path for path in inside if path.suffix.lower() in endings]
            others = Counter(path.suffix.lower() for path in inside if path.suffix.lower() not in endings)
            found.left_out.update(others)
            if not photos:
                # of bands there are so few kinds of files that they are named
                wanted = "is a photo by its name" if len(endings) > 5 else f"ends in {' or '.join(sorted(endings))}"
                kinds = f": {counted(others)}" if others else ""
                number = f"{len(inside)} file{'s' * (len(inside) > 1)}, none of which {wanted}{kinds}" if inside else "no files"
                nothing(one, f"a folder with {number}")
            found.paths.extend(path for path in photos if path not in found.paths)
        elif not os.path.lexists(one) and glob.has_magic(os.fspath(one)):
            matches = sorted(Path(match) for match in glob.glob(os.fspath(one), recursive=True) if not os.path.isdir(match))
            if not matches:
                nothing(one, "which matches no file")
            found.paths.extend(path for path in matches if path not in found.paths)
        else:
            if os.path.lexists(one):
                found.paths.append(one)
            else:
                nothing(one, "no such file")
    return found


def _below(folder: Path, results: Path | None) -> Iterator[Path]:
    """Yield the files of a folder and of those below that are no results."""
    files = list(files_below(folder, skipped=results))
    numbers = {path.with_suffix("") for path in files if path.suffix == ".npz"}
    for path in files:
        if path.suffix != ".npz" and not (path.suffix == ".png" and path.with_suffix("") in numbers):
            yield path


def _refused(command: str, photo: Path, why: str) -> BadInput:
    name = click.format_filename(photo)
    return BadInput(f"{command}: PHOTO must be an image file, a folder or a glob, got {name} ({why})")


def stems(photos: Sequence[Path], folder: Path, endings: Sequence[str] = ("",)) -> list[str]:
    """Return a file name for each photo's results, different from each other even where letters' case does not count.

    Args:
        photos: whose results are written.
        folder: where they are written. A result never takes the place of one of the photos.
        endings: what a stem is followed by, in the names of a photo's results.
    """
    sources = {os.path.realpath(photo).casefold() for photo in photos}
    taken: set[str] = set()
    found: list[str] = []
    for photo in photos:
        stem, number = photo.stem, 1
        while True:
            names = {f"{stem}{ending}".casefold() for ending in endings}
            files = {os.path.realpath(folder / f"{name}{kind}").casefold() for name in names for kind in (".png", ".npz")}
            if not names & taken and not files & sources:
                break
            number += 1
            stem = f"{photo.stem}-{number}"
        taken |= names
        found.append(stem)
    return found
