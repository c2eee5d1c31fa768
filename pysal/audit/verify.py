"""Reads a whole audit again and says what is wrong with it."""

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from torch import nn

from pysal._checks import check_count, first_line
from pysal.audit import data, files, manifest, table
from pysal.audit.data import Item, Unreadable, read_bytes
from pysal.audit.job import Job, resume
from pysal.methods.traits import stores_drops


def verify(
    out: str | Path,
    *,
    images: bool = False,
    recompute: int = 0,
    model: nn.Module | None = None,
    download: bool = False,
    allow_code: bool = False,
) -> list[str]:
    """Return what is wrong with the audit of a folder, one sentence each; an empty list if nothing is.

    It checks that

    - every page of every file can be read and has the right checksum,
    - plan.parquet has the hash that the manifest names,
    - each image of a finished shard has its row for each method, in order, or one reason why it has none,
    - no number is NaN or infinite, and none is missing unless a fault is named or the method has no such number.

    Args:
        out: the folder.
        images: also read the images again, and compare their SHA-256 with that of what was explained.
        recompute: also compute this many of the finished shards again, spread evenly, and compare them byte by byte. Another
            kind of processor may round differently.
        model: the model, to recompute a job that was given an nn.Module.
        download: see `pysal.audit.resume`, for recomputing.
        allow_code: see `pysal.audit.resume`, for recomputing.

    Raises:
        PermissionError: as `pysal.audit.resume`.
        ValueError: the folder holds no audit; or, with `recompute`, the model, data or versions have changed.
    """
    check_count("pysal.audit.verify", "recompute", recompute, least=0)
    out = Path(out)
    found = list(_problems(out, images))
    if not recompute:
        return found
    job = resume(out, model=model, download=download, allow_code=allow_code)
    return found + _computed_otherwise(job, recompute)


def _computed_otherwise(job: Job, number: int) -> list[str]:
    """Return which of some shards are computed otherwise now."""
    done = sorted(files.finished(job.out))
    chosen = [done[n * len(done) // number] for n in range(number)] if number < len(done) else done
    return [f"shard {shard} is computed otherwise now" for shard in chosen if not job.is_what_it_was(shard)]


def _problems(out: Path, images: bool) -> Iterator[str]:
    stored = manifest.read("pysal.audit.verify", out)
    try:
        listed = pq.read_table(out / "plan.parquet", schema=data.IMAGES)
    except (OSError, pa.ArrowException) as error:
        yield f"plan.parquet cannot be read ({first_line(error)})"
        return
    if data.fingerprint(listed) != stored["data"]["sha256"]:
        yield "plan.parquet is not the one that manifest.json names"
        return
    found = data.Data(stored["data"]["kind"], Path(stored["data"]["root"]), listed, stored["data"]["sha256"])
    done = files.finished(out)
    for number in range(found.shards):
        if number not in done:
            yield f"shard {number} is missing"
            continue
        items = found.items(number, stored["data"]["shard_size"])
        try:
            yield from (f"shard {number}: {problem}" for problem in _of_shard(out, stored, number, items))
            if images:
                yield from (f"shard {number}: {problem}" for problem in _of_images(out, found.root, number, items))
        except (OSError, pa.ArrowException) as error:
            yield f"shard {number} cannot be read ({first_line(error)})"
    for number in sorted(done - set(range(found.shards))):
        yield f"shard {number} is not in plan.parquet"


def _read(out: Path, folder: str, number: int) -> pa.Table:
    with pq.ParquetFile(files.shard_path(out, folder, number), page_checksum_verification=True) as file:
        return file.read()


def _of_shard(out: Path, stored: dict[str, Any], number: int, items: list[Item]) -> Iterator[str]:
    rows, errors, timings = (_read(out, folder, number) for folder in ("shards", "errors", "timings"))
    for name, found, expected in (
        ("shards", rows, table.schema(stored)),
        ("errors", errors, table.ERRORS),
        ("timings", timings, table.TIMINGS),
    ):
        if not found.schema.equals(expected):
            yield f"the columns in {name} are not those of the manifest"
            return
    failed = errors["id"].to_pylist()
    by_id = {item.id: item for item in items}
    if len(set(failed)) != len(failed) or not set(failed) <= set(by_id):
        yield "errors name an image twice, or one of another shard"
        return
    explained = [item for item in items if item.id not in set(failed)]
    methods = list(stored["methods"]) if explained else []
    expected_ids = [item.id for _ in methods for item in explained]
    expected_methods = [name for name in methods for _ in explained]
    if rows["id"].to_pylist() != expected_ids or rows["method"].to_pylist() != expected_methods:
        yield "there is not one row, in order, for each method and image without an error"
        return
    for folder, found in (("shards", rows), ("errors", errors)):
        for n, (id, path, label) in enumerate(zip(*(found[name].to_pylist() for name in ("id", "path", "label")), strict=True)):
            if (path, label) != (by_id[id].path, by_id[id].label):
                yield f"row {n} of {folder} has another path or label than plan.parquet"
    sound = pc.is_null(rows["fault"])
    for field in rows.schema:
        if pa.types.is_floating(field.type):
            values = rows[field.name].to_numpy()
            present = np.asarray(pc.is_valid(rows[field.name]))
            if not np.isfinite(values[present]).all():
                yield f"{field.name} holds NaN or infinity"
    # numbers have no class and no probability; what is explained beside classes has no class either
    output = stored["model"]["output"]
    of_classes = () if output is None else ("target",) if output == "numbers" else table.OF_CLASSES
    always = [*of_classes, "score", *stored["metrics"]]
    for name in always:
        if pc.any(pc.and_(sound, pc.is_null(rows[name]))).as_py():
            yield f"{name} is missing where no fault is named"
    for name, method in stored["methods"].items():
        column = "drops" if stores_drops(name) else f"map_{name}" if method["map_shape"] else None
        if column is not None and methods:
            own = pc.equal(rows["method"], name)
            if pc.any(pc.and_(pc.and_(own, sound), pc.is_null(rows[column]))).as_py():
                yield f"{column} is missing where no fault is named"
    scales = [value for value in rows["map_scale"].to_pylist() if value is not None] if "map_scale" in rows.column_names else []
    if not all(value > 0 and math.isfinite(value) for value in scales):
        yield "map_scale is not a positive number"


def _of_images(out: Path, root: Path, number: int, items: list[Item]) -> Iterator[str]:
    rows = _read(out, "shards", number)
    hashes = dict(zip(rows["id"].to_pylist(), rows["sha256"].to_pylist(), strict=True))
    for item in items:
        if item.id in hashes:
            try:
                now = hashlib.sha256(read_bytes(root, item)).hexdigest()
            except Unreadable as reason:
                yield f"{item.path} can no longer be read ({reason})"
                continue
            if now != hashes[item.id]:
                yield f"{item.path} has changed since it was explained"
