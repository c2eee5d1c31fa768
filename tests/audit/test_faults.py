"""What happens to jobs: kills, bad files, full disks, full memory, a second job, NaN, and changes between two runs."""

import errno
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from pysal.audit import DiskFault, Stopped, engines, files, job, manifest, resume, status, verify
from pysal.audit.data import LARGEST_FILE, Item, Unreadable, read_bytes
from pysal.audit.shard import Worker
from tests.audit import tiny
from tests.audit.conftest import PHOTOS, contents, write_photo

ROOT = Path(__file__).resolve().parents[2]


def rows_of(out: Path, method: str) -> list[dict]:
    return pq.read_table(out / "shards", filters=[("method", "=", method)]).sort_by("id").to_pylist()


def errors_of(out: Path) -> dict[str, str]:
    return {row["path"]: row["reason"] for row in pq.read_table(out / "errors").to_pylist()}


def details_of(out: Path) -> dict[str, str | None]:
    return {row["path"]: row["detail"] for row in pq.read_table(out / "errors").to_pylist()}


# --- kills: 40 of a job, 6 of workers, 4 of a job with workers


def run_in_fork(planned: job.Job) -> multiprocessing.Process:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of threads, of which the child uses none
        process = multiprocessing.get_context("fork").Process(target=planned.run, kwargs={"engine": "inline"})
        process.start()
    return process


def check_so_far(out: Path) -> None:
    """What a killed job leaves: nothing, or a folder in which what is finished is right."""
    if (out / "manifest.json").exists():
        assert all(problem.endswith(" is missing") for problem in verify(out))
        assert status(out).running == ""


def test_a_job_killed_at_random_moments_ends_with_the_same_bytes(job) -> None:
    undisturbed = job(out="undisturbed")
    undisturbed.run(engine="inline")
    expected = contents(undisturbed.out)
    planned, tries, kills, finished = job(out="killed0"), random.Random(0), 0, 0
    began = time.perf_counter()
    process = run_in_fork(planned)
    process.join()
    takes = time.perf_counter() - began
    shutil.rmtree(planned.out)
    while kills < 40:
        process = run_in_fork(planned)
        process.join(tries.uniform(0, takes))
        process.kill()
        process.join()
        if process.exitcode == 0:
            assert contents(planned.out) == expected
            finished += 1
            planned.out = planned.out.with_name(f"killed{finished}")
        else:
            assert process.exitcode == -signal.SIGKILL
            kills += 1
            check_so_far(planned.out)
    planned.run(engine="inline")
    assert contents(planned.out) == expected
    assert not list(planned.out.rglob(".*"))


@pytest.mark.slow
def test_workers_killed_at_random_moments_are_replaced(job) -> None:
    slow = {"model": "tests.audit.tiny:slow", "shard_size": 1, "method_options": {"leave_one_out": {"segments": "grid:4x4"}}}
    undisturbed, planned, tries = job(out="undisturbed", **slow), job(out="killed", **slow), random.Random(1)
    undisturbed.run(engine="inline")
    killed: list[int] = []

    def kill(done: int, total: int) -> None:
        """Kill one of the workers some time after a shard was finished."""
        time.sleep(tries.uniform(0, 0.3))
        ready = [child.pid for child in multiprocessing.active_children() if child.name == "pysal-audit"]
        if ready and len(killed) < 6:
            killed.append(tries.choice(ready))
            os.kill(killed[-1], signal.SIGKILL)

    while len(killed) < 6:
        if planned.out.exists():
            shutil.rmtree(planned.out)
        try:
            assert planned.run(workers=2, progress=kill).complete
        except Stopped as stopped:  # the same shard twice, by chance
            assert "killed its worker 2 times (signal SIGKILL" in str(stopped)  # noqa: PT017
            planned.run(workers=1)
        assert contents(planned.out) == contents(undisturbed.out)


@pytest.mark.slow
def test_a_job_with_workers_killed_at_random_moments_goes_on(job) -> None:
    slow = {"model": "tests.audit.tiny:slow", "shard_size": 1}
    undisturbed, planned, tries = job(out="undisturbed", **slow), job(out="killed", **slow), random.Random(2)
    undisturbed.run(engine="inline")
    call = f"resume({str(planned.out)!r}, allow_code=True).run(workers=2)"
    code = f"from pysal.audit import resume\nif __name__ == '__main__':\n    {call}"
    script = planned.out.with_name("run.py")
    script.write_text(code)
    files.make_folders(planned.out)
    planned._begin()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    kills = 0
    while kills < 4:
        before = len(files.finished(planned.out))
        running = subprocess.Popen([sys.executable, str(script)], env=environment)
        while running.poll() is None and len(files.finished(planned.out)) <= before:
            time.sleep(0.01)
        time.sleep(tries.uniform(0, 0.3))
        children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
        running.kill()
        running.wait()
        kills += 1
        check_so_far(planned.out)
        for child in children:  # workers die with the job
            deadline = time.monotonic() + 600
            while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            assert not Path(f"/proc/{child}").exists()
        if len(files.finished(planned.out)) == PHOTOS:
            assert contents(planned.out) == contents(undisturbed.out)
            (planned.out / "shards" / "00000.parquet").unlink()
    planned.run(engine="inline")
    assert contents(planned.out) == contents(undisturbed.out)


@pytest.mark.slow
def test_a_shard_that_kills_its_workers_is_set_aside_and_the_rest_is_done(job, photos, tmp_path) -> None:
    green(photos_with(photos, tmp_path) / "cat" / "03.png")  # the deadly classifier dies of it
    planned = job(source=tmp_path / "photos", model="tests.audit.tiny:deadly", prepared=False)
    with pytest.raises(Stopped) as caught:
        planned.run(workers=1)
    assert str(caught.value) == (
        "pysal.audit: shard 0 (images 0 to 2, cat/01.png to cat/05.png) killed its worker 2 times (signal SIGKILL, which is "
        "what a full memory looks like: fewer workers or a smaller batch size may help), the others are done; "
        "going on with the job tries again"
    )
    assert files.finished(planned.out) == {1, 2, 3}
    write_photo(tmp_path / "photos" / "cat" / "03.png", 3)
    assert planned.run(engine="inline").complete


@pytest.mark.slow
def test_a_shard_that_hangs_its_workers_is_set_aside(job, photos, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(engines, "PATIENCE", 3.0)
    green(photos_with(photos, tmp_path) / "cat" / "03.png")
    planned = job(source=tmp_path / "photos", model="tests.audit.tiny:hanging", prepared=False)
    with pytest.raises(Stopped) as caught:
        planned.run(workers=1)
    assert str(caught.value) == (
        "pysal.audit: shard 0 (images 0 to 2, cat/01.png to cat/05.png) hung its worker 2 times (no pass of its model ended "
        "within 3 s), the others are done; going on with the job tries again"
    )
    assert files.finished(planned.out) == {1, 2, 3}


def test_images_that_were_taken_away_have_reasons_and_the_job_goes_on(job, photos, tmp_path) -> None:
    folder = photos_with(photos, tmp_path)
    planned = job(source=folder)
    planned.run(engine="inline")
    (planned.out / "shards" / "00000.parquet").unlink()
    (folder / "cat" / "03.png").unlink()
    assert resume(planned.out, allow_code=True).run(engine="inline").failed == 1
    (reason,) = pq.read_table(planned.out / "errors" / "00000.parquet").to_pylist()
    assert (reason["path"], reason["reason"]) == ("cat/03.png", "no such file or directory")
    assert verify(planned.out) == []


def photos_with(photos: Path, tmp_path: Path) -> Path:
    """Return a copy of the photos, to be changed."""
    return Path(shutil.copytree(photos, tmp_path / "photos"))


def green(path: Path) -> None:
    """Write what two classifiers of `tiny` cannot bear."""
    Image.new("RGB", (24, 24), (0, 255, 0)).save(path)


# --- bad files


def test_bad_files_have_reasons_and_stop_nothing(tmp_path, job) -> None:
    folder = tmp_path / "bad"
    for n in range(3):
        write_photo(folder / f"good{n}.png", n)
    write_photo(folder / "whole.jpg", 0)
    whole = (folder / "whole.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) * 9 // 10])
    (folder / "stump.jpg").write_bytes(whole[: len(whole) * 6 // 10])
    png = bytearray((folder / "good0.png").read_bytes())
    png[60:80] = bytes(20)
    (folder / "corrupt.png").write_bytes(png)
    (folder / "empty.png").touch()
    (folder / "text.jpg").write_text("this is not a photo")
    Image.new("RGB", (1, 1)).save(folder / "dot.png")
    Image.new("1", (20000, 20000)).save(folder / "bomb.png")
    with (folder / "huge.png").open("wb") as file:
        file.truncate(LARGEST_FILE + 1)
    os.mkfifo(folder / "pipe.png")
    (folder / "loop.png").symlink_to("loop.png")
    planned = job(folder, shard_size=5)
    found = planned.run(engine="inline")
    assert found.complete
    assert (found.explained, found.failed) == (4, 10)
    assert errors_of(planned.out) == {
        "truncated.jpg": "damaged or cut off",
        "stump.jpg": "damaged or cut off",
        "corrupt.png": "damaged or cut off",
        "bomb.png": f"must be an image of at most {Image.MAX_IMAGE_PIXELS} pixels (PIL.Image.MAX_IMAGE_PIXELS)",
        "dot.png": "must be an image of at least 2 x 2 pixels",
        "empty.png": "the file is empty",
        "huge.png": f"more than {LARGEST_FILE} bytes",
        "loop.png": "too many levels of symbolic links",
        "pipe.png": "not a regular file",
        "text.jpg": "not an image that Pillow can read",
    }
    details = details_of(planned.out)
    assert details["truncated.jpg"].startswith("image file is truncated (")
    assert details["truncated.jpg"] != details["stump.jpg"]
    assert (details["bomb.png"], details["dot.png"], details["empty.png"]) == ("400000000 pixels", "1 x 1 pixels", None)
    assert verify(planned.out, images=True) == []
    assert [row["path"] for row in rows_of(planned.out, "gradient")] == ["good0.png", "good1.png", "good2.png", "whole.jpg"]


def test_a_table_may_name_what_is_not_there(tmp_path, job) -> None:
    write_photo(tmp_path / "data" / "there.png", 0)
    (tmp_path / "data" / "list.csv").write_text("path,label\nthere.png,2\ngone.png,1\nthere.png/below.png,\n")
    planned = job(tmp_path / "data" / "list.csv")
    planned.run(engine="inline")
    assert errors_of(planned.out) == {"gone.png": "no such file or directory", "there.png/below.png": "not a directory"}
    assert [(row["path"], row["label"]) for row in rows_of(planned.out, "gradient")] == [("there.png", 2)]


def test_a_folder_of_nothing_but_bad_files_is_audited(tmp_path, job) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "empty.png").touch()
    planned = job(tmp_path / "bad")
    assert planned.run(engine="inline").failed == 1
    assert verify(planned.out) == []


def test_a_file_without_permission(tmp_path) -> None:
    path = tmp_path / "secret.png"
    write_photo(path, 0)
    path.chmod(0)
    root = os.geteuid() == 0
    if root:  # whom nothing is forbidden
        os.seteuid(65534)
    try:
        with pytest.raises(Unreadable, match=r"^permission denied$"):
            read_bytes(tmp_path, Item(0, "secret.png", None, None, None, 1))
    finally:
        if root:
            os.seteuid(0)


def test_an_image_that_a_method_cannot_explain_goes_to_the_errors(job, monkeypatch) -> None:
    planned = job()
    whole = Worker.batch

    def batch(self, images, items, clock):
        if any(item.id == 4 for item in items):
            raise ValueError(f"not {object()}\nthis one")
        return whole(self, images, items, clock)

    monkeypatch.setattr(Worker, "batch", batch)
    found = planned.run(engine="inline")
    assert (found.explained, found.failed) == (PHOTOS - 1, 1)
    assert list(errors_of(planned.out).values()) == ["explaining it failed with ValueError"]
    assert list(details_of(planned.out).values()) == ["not <object object>"]  # an address would be other bytes each time
    assert verify(planned.out) == []


# --- a full disk


class FullDisk:
    """Lets a number of writes succeed, and then has no room for one."""

    def __init__(self, monkeypatch, room: int) -> None:
        self.room, self.full = room, False
        for holder, name in ((os, "fsync"), (os, "replace"), (Path, "mkdir"), (Path, "open")):
            monkeypatch.setattr(holder, name, self._limited(getattr(holder, name)))

    def _use(self) -> None:
        self.room -= 1
        if self.room == -1:
            self.full = True
            raise OSError(errno.ENOSPC, "No space left on device")

    def _limited(self, function):
        def call(*arguments, **options):
            reading = function.__name__ == "open" and (len(arguments) < 2 or arguments[1] != "wb")
            if not reading:
                self._use()
            result = function(*arguments, **options)
            if function.__name__ == "open" and not reading:
                write = result.write

                def limited_write(content: bytes) -> int:
                    write(content[: len(content) // 2])
                    self._use()
                    return write(content[len(content) // 2 :])

                return _File(result, limited_write)
            return result

        call.__name__ = function.__name__
        return call


class _File:
    """A file whose `write` is another."""

    def __init__(self, file, write) -> None:
        self._file, self.write = file, write

    def __getattr__(self, name: str):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


def test_a_disk_that_fills_at_any_moment_stops_the_job_cleanly(job, tmp_path) -> None:
    planned = job(shard_size=6, together=6, methods=["gradient"], method_options={})
    planned.run(engine="inline")
    expected = contents(planned.out)
    room = 0
    while True:
        planned.out = tmp_path / f"full{room}"
        with pytest.MonkeyPatch.context() as monkeypatch:
            disk = FullDisk(monkeypatch, room)
            try:
                planned.run(engine="inline")
            except DiskFault as fault:
                assert str(fault).endswith("(no space left on device)")  # noqa: PT017
                assert disk.full
            else:
                assert not disk.full
                break
        assert not list(planned.out.rglob(".*"))
        check_so_far(planned.out)
        planned.run(engine="inline")
        assert contents(planned.out) == expected
        room += 1
    # two files of the job and three of each of two shards, each of them opened, written, synchronised, renamed and its folder
    # synchronised; and at least three folders
    assert room >= 8 * 5 + 3


def test_what_kills_left_half_written_is_removed_and_nothing_else(job) -> None:
    planned = job()
    files.make_folders(planned.out)
    left = [".manifest.json.host.1", ".plan.parquet.host.1", "shards/.00003.parquet.host.12", "errors/.00000.parquet.h.2"]
    others = [".hidden", "shards/.00003.parquet", "notes.txt"]
    for name in left + others:
        (planned.out / name).touch()
    planned.run(engine="inline")
    assert not any((planned.out / name).exists() for name in left)
    assert all((planned.out / name).exists() for name in others)


def test_a_worker_that_cannot_write_stops_the_job(job) -> None:
    planned = job()
    (planned.out / "errors" / "00001.parquet").mkdir(parents=True)
    with pytest.raises(DiskFault) as caught:
        planned.run(workers=1)
    assert str(caught.value) == f"pysal.audit: {planned.out}/errors/00001.parquet cannot be written (is a directory)"
    (planned.out / "errors" / "00001.parquet").rmdir()
    assert planned.run(engine="inline").complete


# --- a full memory


def test_a_full_memory_halves_the_batch(job, monkeypatch) -> None:
    small = job(out="small", shard_size=8)
    small.run(engine="inline")
    planned = job(shard_size=8)
    planned.manifest["images_together"] = 8
    whole = Worker.batch

    def batch(self, images, items, clock):
        if len(items) > 2:
            raise MemoryError("too many")
        return whole(self, images, items, clock)

    monkeypatch.setattr(Worker, "batch", batch)
    planned.run(engine="inline")
    assert contents(planned.out) == contents(small.out)
    assert set(pq.read_table(planned.out / "timings")["images_together"].to_pylist()) == {2}


def test_a_model_with_little_memory_runs_fewer_rows(job) -> None:
    given = {"model": "tests.audit.tiny:hungry", "batch_size": 4, "together": 4}
    planned, roomy = job(**given), job(**given, out="roomy", prepared=False)
    planned.run(engine="inline")
    roomy.run(engine="inline")
    found, expected = ([row["score"] for row in rows_of(out, "gradient")] for out in (planned.out, roomy.out))
    assert np.abs(np.subtract(found, expected)).max() <= 64 * np.finfo(np.float32).eps * np.abs(expected).max()


def test_shards_with_an_image_that_does_not_fit_are_set_aside(job, monkeypatch) -> None:
    planned = job()
    monkeypatch.setattr(Worker, "batch", lambda *_: (_ for _ in ()).throw(MemoryError("full")))
    with pytest.raises(Stopped) as stopped:
        planned.run(engine="inline")
    assert str(stopped.value) == (
        "pysal.audit: shard 0 (images 0 to 2, cat/01.png to cat/05.png) went wrong (cat/01.png alone does not fit into the "
        "memory of cpu); shard 1 (images 3 to 5, cat/07.png to dog/00.png) went wrong (cat/07.png alone does not fit into the "
        "memory of cpu); shard 2 (images 6 to 8, dog/02.png to dog/06.png) went wrong (dog/02.png alone does not fit into the "
        "memory of cpu); and 1 more; going on with the job tries again"
    )


# --- two jobs


def test_a_second_job_in_the_folder_is_refused(job) -> None:
    planned = job()

    def second(done: int, total: int) -> None:
        assert status(planned.out).running.startswith(f"process {os.getpid()} on ")
        with pytest.raises(
            ValueError, match=r"^pysal.audit.Job: out must be the folder of one job at a time, got .*/out"
        ) as caught:
            job().run(engine="inline")
        assert f"(process {os.getpid()} on " in str(caught.value)

    planned.run(engine="inline", progress=second)
    assert status(planned.out).running == ""


# --- NaN


def test_nan_is_recorded_and_not_averaged(tmp_path, job) -> None:
    for n in range(4):
        write_photo(tmp_path / "photos" / f"{n}.png", n)
    Image.new("RGB", (20, 20), "white").save(tmp_path / "photos" / "white.png")
    planned = job(tmp_path / "photos", model="tests.audit.tiny:not_a_number", metrics=["deletion"], together=5, shard_size=5)
    assert planned.run(engine="inline").explained == 5
    for method in planned.manifest["methods"]:
        *sound, unsound = rows_of(planned.out, method)
        assert [row["fault"] for row in sound] == [None] * 4
        assert all(np.isfinite(row["score"]) and np.isfinite(row["deletion"]) for row in sound)
        assert unsound["fault"] == "the model's output"
        nothing = set(unsound) - {"id", "path", "sha256", "method", "fault"}
        assert {unsound[name] for name in nothing} == {None}
    assert verify(planned.out) == []


def test_a_map_of_nan_is_recorded(tmp_path, job) -> None:
    write_photo(tmp_path / "photos" / "0.png", 0)
    Image.new("RGB", (20, 20), "black").save(tmp_path / "photos" / "black.png")
    planned = job(tmp_path / "photos", model="tests.audit.tiny:not_a_gradient", metrics=["deletion"], prepared=False)
    planned.run(engine="inline")
    sound, unsound = rows_of(planned.out, "gradient")
    assert (sound["fault"], unsound["fault"]) == (None, "the map")
    assert np.isfinite(unsound["score"])
    assert (unsound["deletion"], unsound["map_gradient"], unsound["map_scale"]) == (None, None, None)
    assert [row["fault"] for row in rows_of(planned.out, "leave_one_out")] == [None, None]
    assert verify(planned.out) == []


# --- changes between two runs


def refused(make) -> str:
    with pytest.raises(ValueError, match=r"^pysal.audit.Job: out must be a new folder or that of the same job, got ") as caught:
        make()
    return str(caught.value).partition(", where ")[2]


def test_resuming_with_anything_changed_is_refused_with_the_difference(job, photos, tmp_path, monkeypatch) -> None:
    shutil.copytree(photos, tmp_path / "photos")
    model = tiny.classifier()
    planned = job(tmp_path / "photos", model=model)
    planned.run(engine="inline")
    again = {"source": tmp_path / "photos", "model": model}
    assert job(**again).run(engine="inline").complete
    assert refused(lambda: job(**again, seed=1)) == "seed was 0, is 1"
    assert refused(lambda: job(**again, maps="none", batch_size=3)).startswith(
        "methods.gradient.map_shape was [12, 10], is null; maps was"
    )
    assert refused(lambda: job(**again, method_options={"leave_one_out": {"segments": "grid:3x2"}})).startswith(
        'methods.leave_one_out.options.segments was "grid:2x2", is "grid:3x2"; boxes was'
    )
    assert refused(lambda: job(**again, methods=["leave_one_out", "gradient"])) == (
        "methods were gradient, leave_one_out, are leave_one_out, gradient"
    )
    assert refused(lambda: job(**again, methods=["gradient", "grad_cam"], method_options={})).startswith(
        "methods were gradient, leave_one_out, are gradient, grad_cam; boxes was [["
    )
    with torch.no_grad():
        model.network[0].bias += 1
    hashes = r"model.weights_sha256 was [0-9a-f]{12}\.\.\., is [0-9a-f]{12}\.\.\."
    assert re.fullmatch(hashes, refused(lambda: resume(planned.out, model=model)))
    with torch.no_grad():
        model.network[0].bias.copy_(tiny.classifier().network[0].bias)
    monkeypatch.setattr(manifest, "versions", lambda before=manifest.versions: {**before(), "numpy": "0.1"})
    assert refused(lambda: resume(planned.out, model=model)).startswith("versions.numpy was ")
    monkeypatch.undo()
    write_photo(tmp_path / "photos" / "cat" / "01.png", 5)
    sizes = [(folder / "cat" / "01.png").stat().st_size for folder in (photos, tmp_path / "photos")]
    assert refused(lambda: resume(planned.out, model=model)) == (
        f"data: size of image 0 (cat/01.png) was {sizes[0]}, is {sizes[1]}"
    )
    write_photo(tmp_path / "photos" / "new.png", 1)
    assert refused(lambda: resume(planned.out, model=model)) == "data: 11 images then, 12 now"


def test_verify_sees_what_was_changed_afterwards(job, photos, tmp_path) -> None:
    shutil.copytree(photos, tmp_path / "photos")
    planned = job(tmp_path / "photos")
    planned.run(engine="inline")
    path = tmp_path / "photos" / "cat" / "01.png"
    pixels = np.asarray(Image.open(path)).copy()
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    assert verify(planned.out) == []
    assert verify(planned.out, images=True) == ["shard 0: cat/01.png has changed since it was explained"]
    path.unlink()
    assert verify(planned.out, images=True) == ["shard 0: cat/01.png can no longer be read (no such file or directory)"]
    Image.fromarray(pixels).save(path)
    shard = planned.out / "shards" / "00001.parquet"
    content = bytearray(shard.read_bytes())
    for n in range(4, len(content) // 2, 50):  # the pages come first
        content[n] ^= 255
    shard.write_bytes(content)
    (found,) = verify(planned.out)
    assert found.startswith("shard 1 cannot be read (")
    shutil.copy(planned.out / "shards" / "00002.parquet", shard)
    assert verify(planned.out) == ["shard 1: there is not one row, in order, for each method and image without an error"]
    table = pq.read_table(planned.out / "shards" / "00000.parquet")
    pq.write_table(table.set_column(table.schema.get_field_index("score"), "score", [[float("nan")] * len(table)]), shard)
    pq.write_table(table.drop_columns(["score"]), planned.out / "shards" / "00000.parquet")
    assert "shard 0: the columns in shards are not those of the manifest" in verify(planned.out)
    plan = pq.read_table(planned.out / "plan.parquet")
    pq.write_table(plan.slice(1), planned.out / "plan.parquet")
    assert verify(planned.out) == ["plan.parquet is not the one that manifest.json names"]


def test_shards_that_are_computed_otherwise_are_seen(job) -> None:
    planned = job()
    planned.run(engine="inline")
    assert verify(planned.out, recompute=4, allow_code=True) == []
    shard = planned.out / "shards" / "00001.parquet"
    table = pq.read_table(shard)
    scores = [value + 1e-9 for value in table["score"].to_pylist()]
    forged = table.set_column(table.schema.get_field_index("score"), table.schema.field("score"), [scores])
    pq.write_table(forged, shard)
    assert verify(planned.out) == []
    assert verify(planned.out, recompute=1, allow_code=True) == []  # the first
    assert verify(planned.out, recompute=9, allow_code=True) == ["shard 1 is computed otherwise now"]
    with pytest.raises(ValueError, match=r"^pysal.audit.verify: recompute must be a whole number of at least 0, got -1$"):
        verify(planned.out, recompute=-1)


def test_devices(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert engines.devices("cuda", None) == ["cuda:0", "cuda:1", "cuda:2"]
    assert engines.devices("cuda", 5) == ["cuda:0", "cuda:1", "cuda:2", "cuda:0", "cuda:1"]
    assert engines.devices("cpu", 2) == ["cpu", "cpu"]
    assert engines.devices("cpu", None) == ["cpu"] * len(os.sched_getaffinity(0))
