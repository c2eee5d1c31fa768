"""The files of a folder and of those below it: one walk, so that every command finds the same photos."""

import os
from collections.abc import Iterator
from pathlib import Path


def files_below(folder: Path, skipped: Path | None = None) -> Iterator[Path]:
    """Yield the files of a folder and of those below, in no promised order.

    Each folder is entered once, however many links lead to it, so links that lead in circles end. Hidden files and folders are
    left out.

    Args:
        folder: where to look.
        skipped: a folder that is not entered, by whatever path it is met.
    """
    entered = {_identity(folder)}
    if skipped is not None:
        entered.add(_identity(skipped))
    for place, folders, names in os.walk(folder, followlinks=True):
        below = []
        for name in sorted(folders):
            identity = _identity(Path(place, name))
            if not name.startswith(".") and identity not in entered:
                entered.add(identity)
                below.append(name)
        folders[:] = below
        yield from (Path(place, name) for name in names if not name.startswith("."))


def _identity(folder: Path) -> tuple[int, int] | Path:
    """Return what two paths of one folder share; a folder that cannot be asked is its path."""
    try:
        found = folder.stat()
    except OSError:
        return folder
    return found.st_dev, found.st_ino
