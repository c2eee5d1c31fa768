"""How far an audit is."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from pysal.audit import files, manifest

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Status:
    """How far an audit is.

    Attributes:
        out: its folder.
        images: number of images in all.
        shards: number of shards in all.
        shards_done: number of shards that are finished.
        explained: number of images in them that have rows.
        failed: number of images in them that have no rows; the reasons are in errors/.
        seconds: processor time of the finished shards, of all workers together.
        running: the job that holds the folder now, "" if there is none.
    """

    out: Path
    images: int
    shards: int
    shards_done: int
    explained: int
    failed: int
    seconds: float
    running: str

    @property
    def complete(self) -> bool:
        """Whether every shard is finished."""
        return self.shards_done == self.shards

    def __str__(self) -> str:
        lines = [f"{self.shards_done} of {self.shards} shards, {self.explained + self.failed} of {self.images} images"]
        lines.append(f"{self.explained} explained, {self.failed} could not be")
        if self.explained and self.seconds:
            lines.append(f"{self.seconds / self.explained:.3g} s of a processor per image")
        lines.append(f"running: {self.running}" if self.running else "complete" if self.complete else "not running")
        return "\n".join(lines)


def status(out: str | Path) -> Status:
    """Return how far the audit of a folder is. It may still be running.

    Raises:
        ValueError: the folder holds no audit.
    """
    out = Path(out)
    stored = manifest.read("pysal.audit.status", out)
    images, size = stored["data"]["images"], stored["data"]["shard_size"]
    done = sorted(files.finished(out))
    failed = sum(pq.read_metadata(files.shard_path(out, "errors", n)).num_rows for n in done)
    seconds = 0.0
    for n in done:
        seconds += sum(pq.read_table(files.shard_path(out, "timings", n), columns=["cpu_seconds"])["cpu_seconds"].to_pylist())
    covered = sum(min(size, images - n * size) for n in done)
    return Status(out, images, stored["data"]["shards"], len(done), covered - failed, failed, seconds, files.running(out))


@contextlib.contextmanager
def reporting(progress: bool | Progress, images: int, finished: int) -> Iterator[Progress]:
    """Give what is to be called with the images done and the images in all; True shows a tqdm bar."""
    if callable(progress):
        yield progress
    elif not progress:
        yield lambda done, total: None
    else:
        from tqdm import tqdm

        with tqdm(total=images, initial=finished, unit="image", file=sys.stderr, smoothing=0.05) as bar:
            yield lambda done, total: bar.update(done - bar.n)
