"""Files that are there whole or not at all, and the lock that keeps two jobs out of one folder."""

import contextlib
import fcntl
import os
import re
import socket
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from pysal._checks import refuse

FOLDERS = ("shards", "errors", "timings")


class DiskFault(RuntimeError):
    """A file of the output folder could not be written. No part of it is left on the disk."""


def write(path: Path, content: bytes) -> None:
    """Write a file under another name, make sure that it is on the disk, and rename it to `path`.

    Raises:
        DiskFault: the disk is full, or something else is wrong with it; what was written is removed.
    """
    unfinished = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    try:
        try:
            with unfinished.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
            _sync_folder(path.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                unfinished.unlink()
            raise
    except OSError as error:
        raise DiskFault(f"pysal.audit: {path} cannot be written ({(error.strerror or str(error)).lower()})") from error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folders(out: Path) -> None:
    """Make the output folder and the folders in it.

    Raises:
        DiskFault: one cannot be made.
    """
    try:
        for folder in FOLDERS:
            (out / folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DiskFault(f"pysal.audit: {out} cannot be made a folder of results ({(error.strerror or '').lower()})") from error


def remove_unfinished(out: Path) -> None:
    """Remove what jobs that were killed left half written; only for whoever holds the lock."""
    for folder in (out, *(out / name for name in FOLDERS)):
        for path in folder.glob(".*"):
            if re.fullmatch(r"\.(manifest\.json|(plan|\d+)\.parquet)\..+", path.name):
                path.unlink(missing_ok=True)


def shard_path(out: Path, folder: str, shard: int) -> Path:
    """Return where a shard's file is in "shards", "errors" or "timings"."""
    return out / folder / f"{shard:05d}.parquet"


def finished(out: Path) -> set[int]:
    """Return the numbers of the shards that are there."""
    return {int(path.stem) for path in (out / "shards").glob("*.parquet") if path.stem.isdecimal()}


@contextlib.contextmanager
def locked(where: str, out: Path) -> Iterator[None]:
    """Hold the folder's lock, which the system takes back when this process ends, however it ends.

    Raises:
        ValueError: another job holds it, or the file system has no locks.
    """
    with (out / "lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            refuse(where, "out", "be the folder of one job at a time", f"{out} ({_holder(out) or 'in use'})")
        except OSError as error:
            refuse(where, "out", "be on a file system with locks", f"{out} ({(error.strerror or '').lower()})")
        with contextlib.suppress(OSError):  # a full disk: the lock itself holds
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()} since {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC")
            file.flush()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                file.truncate(0)


def running(out: Path) -> str:
    """Return which job holds the folder's lock, "" where none does."""
    try:
        with (out / "lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _holder(out) or "a job"
    except OSError:
        return ""
    return ""


def _holder(out: Path) -> str:
    with contextlib.suppress(OSError):
        return (out / "lock").read_text()
    return ""
