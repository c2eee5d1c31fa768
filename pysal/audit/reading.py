"""Reads the images of a shard, and those of the next one, while the model works on the ones before."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pysal.audit.data import NO_MEMORY, Item, Unreadable

# Batches that are read while one is computed: of two, the threads that are done with the first go on with the second.
AHEAD = 2
# Threads of one worker: more would wait for each other, because Python itself runs in one of them at a time.
MOST_THREADS = 16

Read = Callable[[Item], tuple[Tensor, str]]
"""Returns an image (1, C, H, W) and the hash of its file; raises Unreadable."""


class Batch(NamedTuple):
    """Images that are explained together.

    Attributes:
        images: (B, C, H, W), on the CPU; in pinned memory for a GPU, if every image of the batch can be read.
        items: theirs, of those that can be read.
        hashes: of their files.
        unreadable: the other items of the batch, and why.
        cpu_seconds: what other threads spent on it.
    """

    images: Tensor
    items: list[Item]
    hashes: list[str]
    unreadable: list[tuple[Item, Unreadable]]
    cpu_seconds: float


class _Found(NamedTuple):
    """What came of reading one image: the hash of its file, or why there is no image."""

    digest: str | None
    why: Unreadable | None
    cpu_seconds: float


@dataclass
class _Pending:
    items: Sequence[Item]
    images: Tensor
    found: list[Future[_Found]]


class Reader:
    """Reads batches in order; with threads, `AHEAD` of them at most before they are wanted. The images are the same either way.

    Args:
        read: what reads an image; called in several threads at once if there are any.
        shape: (C, H, W) of every image.
        together: images of a batch.
        threads: that read; 0 = the caller's own.
        pinned: whether a GPU copies the batches.
    """

    def __init__(self, read: Read, shape: tuple[int, int, int], together: int, *, threads: int, pinned: bool) -> None:
        self._read, self._shape, self.together, self._pinned = read, shape, together, pinned
        self._pool = ThreadPoolExecutor(threads, "pysal-read") if threads else None
        self._pending: deque[_Pending] = deque()

    def batches(self, items: Sequence[Item], following: Sequence[Item] = ()) -> Iterator[Batch]:
        """Yield the batches of a shard.

        Args:
            items: the shard's images.
            following: images that will probably be asked for next, which are begun while the last batches are computed.
        """
        wanted, later = self._cut(items), self._cut(following)
        begun = [pending.items for pending in self._pending]
        if begun != [*wanted, *later][: len(begun)]:  # another shard came, or the last one was broken off
            self._drop()
        for n in range(len(wanted)):
            upcoming = [*wanted[n:], *later][: 1 + (AHEAD if self._pool is not None else 0)]
            for batch in islice(upcoming, len(self._pending), None):
                self._begin(batch)
            yield self._finished(self._pending.popleft())

    def close(self) -> None:
        """End the threads once each has finished its image."""
        self._drop()
        if self._pool is not None:
            self._pool.shutdown()

    def _cut(self, items: Sequence[Item]) -> list[Sequence[Item]]:
        return [items[start : start + self.together] for start in range(0, len(items), self.together)]

    def _drop(self) -> None:
        while self._pending:
            for one in self._pending.popleft().found:
                one.cancel()

    def _begin(self, items: Sequence[Item]) -> None:
        images = torch.empty(len(items), *self._shape, dtype=torch.float32, device="cpu", pin_memory=self._pinned)
        places = images.numpy()  # torch's own copy would start threads of its own
        found: list[Future[_Found]] = []
        if self._pool is not None:
            found = [self._pool.submit(self._timed, item, places[n]) for n, item in enumerate(items)]
        self._pending.append(_Pending(items, images, found))

    def _timed(self, item: Item, place: NDArray[np.float32]) -> _Found:
        before = time.thread_time()
        found = self._into(item, place)
        return found._replace(cpu_seconds=time.thread_time() - before)

    def _into(self, item: Item, place: NDArray[np.float32]) -> _Found:
        try:
            image, digest = self._read(item)
        except Unreadable as why:
            return _Found(None, Unreadable(why.reason, why.detail), 0.0)  # a new one: the traceback holds the file's content
        place[...] = image[0].numpy()
        return _Found(digest, None, 0.0)

    def _finished(self, pending: _Pending) -> Batch:
        rows: list[int] = []
        hashes: list[str] = []
        unreadable: list[tuple[Item, Unreadable]] = []
        cpu_seconds = 0.0
        places = pending.images.numpy()
        for n, item in enumerate(pending.items):
            found = pending.found[n].result() if pending.found else self._into(item, places[n])
            cpu_seconds += found.cpu_seconds
            if pending.found and found.why is not None and found.why.reason == NO_MEMORY:
                found = self._into(item, places[n])  # beside others it did not fit
            if found.digest is not None:
                rows.append(n)
                hashes.append(found.digest)
            elif found.why is not None:
                unreadable.append((item, found.why))
        images = pending.images if not unreadable else pending.images[rows]
        return Batch(images, [pending.items[n] for n in rows], hashes, unreadable, cpu_seconds)
