"""Images that are read in threads beside the model: the same batches in the same order, no more of them than are said."""

import threading
import warnings
from collections import Counter, deque
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pysal import read_image
from pysal.audit import engines
from pysal.audit.data import NO_MEMORY, Item, Unreadable
from pysal.audit.engines import Shard
from pysal.audit.job import IMAGES_TOGETHER, images_together
from pysal.audit.reading import AHEAD, Reader
from tests.audit.conftest import contents, write_photo

BAD = {3, 8, 9}


def items_of(numbers: range) -> list[Item]:
    return [Item(n, f"{n}.png", None, None, None, 0) for n in numbers]


def read(item: Item) -> tuple[torch.Tensor, str]:
    if item.id in BAD:
        raise Unreadable("damaged", f"the {item.id}th")
    return torch.full((1, 3, 2, 2), float(item.id)), f"hash of {item.id}"


@pytest.mark.parametrize("threads", [0, 1, 5])
def test_batches_are_the_same_for_any_number_of_threads(threads) -> None:
    reader = Reader(read, (3, 2, 2), 4, threads=threads, pinned=False)
    found = list(reader.batches(items_of(range(10)), items_of(range(10, 15))))
    found += list(reader.batches(items_of(range(10, 15))))
    reader.close()
    assert [[item.id for item in batch.items] for batch in found] == [[0, 1, 2], [4, 5, 6, 7], [], [10, 11, 12, 13], [14]]
    for batch in found:
        ids = [item.id for item in batch.items]
        assert batch.hashes == [f"hash of {n}" for n in ids]
        assert torch.equal(batch.images, torch.tensor(ids).float()[:, None, None, None].expand(-1, 3, 2, 2))
    faults = [(item.id, why.reason, why.detail) for batch in found for item, why in batch.unreadable]
    assert faults == [(n, "damaged", f"the {n}th") for n in sorted(BAD)]


def test_so_many_batches_are_read_ahead_and_no_more() -> None:
    begun, full = Counter(), threading.Event()

    def noted(item: Item) -> tuple[torch.Tensor, str]:
        begun[item.id] += 1
        if sum(begun.values()) == 2 * (1 + AHEAD):
            full.set()
        return torch.zeros(1, 3, 2, 2), ""

    reader = Reader(noted, (3, 2, 2), 2, threads=4, pinned=False)
    batches = reader.batches(items_of(range(4)), items_of(range(4, 12)))
    next(batches)
    assert full.wait(60)  # beyond the end of the shard
    assert len(reader._pending) == AHEAD
    assert set(begun) == set(range(2 * (1 + AHEAD)))
    list(batches)
    list(reader.batches(items_of(range(4, 12))))
    assert begun == Counter(range(12))  # nothing was read again
    reader.close()
    assert not reader._pending


def test_another_shard_than_the_one_announced_is_read_from_its_beginning() -> None:
    reader = Reader(read, (3, 2, 2), 2, threads=2, pinned=False)
    list(reader.batches(items_of(range(2)), items_of(range(4, 8))))
    found = [item.id for batch in reader.batches(items_of(range(10, 14))) for item in batch.items]
    reader.close()
    assert found == [10, 11, 12, 13]


def test_a_photo_that_did_not_fit_beside_others_is_read_again() -> None:
    calls: list[str] = []

    def full(item: Item) -> tuple[torch.Tensor, str]:
        calls.append(threading.current_thread().name)
        if threading.current_thread() is not threading.main_thread():
            raise Unreadable(NO_MEMORY)
        return torch.ones(1, 3, 2, 2), "hash"

    reader = Reader(full, (3, 2, 2), 1, threads=1, pinned=False)
    (batch,) = reader.batches(items_of(range(1)))
    reader.close()
    assert len(calls) == 2
    assert batch.hashes == ["hash"]
    assert torch.equal(batch.images, torch.ones(1, 3, 2, 2))


def test_any_other_error_of_a_thread_is_that_of_the_call() -> None:
    def broken(item: Item) -> tuple[torch.Tensor, str]:
        raise ZeroDivisionError(item.id)

    reader = Reader(broken, (3, 2, 2), 2, threads=2, pinned=False)
    with pytest.raises(ZeroDivisionError):
        next(reader.batches(items_of(range(2))))
    reader.close()


def test_an_audit_that_reads_ahead_leaves_the_same_files(job, tmp_path, monkeypatch) -> None:
    for n in range(9):
        write_photo(tmp_path / "photos" / f"{n}.png", n)
    (tmp_path / "photos" / "4.png").write_bytes(b"nothing")
    expected = None
    for threads in (0, 3):
        monkeypatch.setattr(engines, "readers", lambda *_, threads=threads: threads)
        planned = job(tmp_path / "photos", out=f"out{threads}", methods=["gradient"], method_options={}, shard_size=4)
        assert planned.run(engine="inline").failed == 1
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("pysal-read")]
        expected = expected or contents(planned.out)
        assert contents(planned.out) == expected


def test_who_takes_which_shard_next() -> None:
    first, second, third = (Shard(n, []) for n in range(3))
    one, other = (engines._Hand("cpu", None, None) for _ in range(2))
    one.ahead = second
    assert engines._next(one, [one, other], deque([third])) is second
    assert one.ahead is None
    assert engines._next(one, [one, other], deque([third])) is third
    other.ahead = first
    assert engines._next(one, [one, other], deque()) is first  # whose images the other has read, and nothing else
    assert other.ahead is None
    assert engines._next(one, [one, other], deque()) is None


def test_threads_for_reading(monkeypatch) -> None:
    monkeypatch.setattr(engines.os, "sched_getaffinity", lambda _: range(16))
    assert [engines.readers("cpu", workers) for workers in (1, 15, 16, 40)] == [1, 1, 0, 0]
    assert [engines.readers("cuda:1", workers) for workers in (1, 2, 8, 40)] == [16, 8, 2, 1]


@pytest.mark.parametrize(
    ("device", "rows", "shard", "together"), [("cpu", 4, 256, 16), ("cpu", 196, 256, 196), ("cuda", 64, 256, 64)]
)
def test_images_of_one_pass_are_handed_over_together(device, rows, shard, together) -> None:
    assert images_together(device, rows, shard) == together
    assert images_together(device, 10**6, shard) == shard
    assert images_together(device, 10**6, 1) == IMAGES_TOGETHER[device]


def test_photos_read_in_threads_leave_the_filters_of_warnings_as_they_were(tmp_path: Path, monkeypatch) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (30, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "good.png")
    Image.fromarray(pixels.repeat(2, 0)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow warns of 1,800, and refuses 2,001
    filters, found, init = warnings.filters, {}, Image.init
    inside = {name: threading.Event() for name in ("good.png", "large.png")}

    def read_one(name: str) -> None:
        try:
            found[name] = read_image(tmp_path / name).shape
        except ValueError as error:
            found[name] = str(error).split(", got ")[0]

    first, second = (threading.Thread(target=read_one, args=(name,), name=name) for name in inside)

    def in_turn() -> None:
        """The first begins and ends before the second, and each begins before the other ends."""
        inside[threading.current_thread().name].set()
        if threading.current_thread() is first:
            second.start()
            assert inside["large.png"].wait(60)
        else:
            first.join()
        init()

    monkeypatch.setattr(Image, "init", in_turn)
    first.start()
    first.join()
    second.join()
    assert warnings.filters is filters
    limit = "pysal.read_image: source must be an image of at most 1000 pixels (PIL.Image.MAX_IMAGE_PIXELS)"
    assert found == {"good.png": (1, 3, 30, 30), "large.png": limit}
