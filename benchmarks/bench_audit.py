"""Measures images per second of `pysal audit` and how it grows with the dataset: `python -m benchmarks.bench_audit --help`.

What is found goes to benchmarks/results/<version>/audit--<device>.json, case by case, and the tables of docs/auditing.md are
written from that by `python -m benchmarks.tables`. About half an hour on two quiet cores with the usual numbers.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import nn

import pysal
from benchmarks.common import ROOT, device_name, memory_now, metadata
from pysal.audit import Job
from pysal.audit.engines import keep_freed_memory
from pysal.audit.job import IMAGES_TOGETHER
from pysal.engine.running.chunks import CPU_ROWS
from pysal.methods.registry import METHODS
from pysal.metrics import METRICS

MODEL = "efficientnet-lite0"
SHARDS = 6  # per worker: enough for the time between them to count
METRIC_IMAGES = 4
GROWTH = (1000, 10_000)


def small() -> pysal.models.Classifier:
    """Return a classifier of ten classes that takes no time, for what grows with the number of images alone."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    names = [f"class {n}" for n in range(10)]
    return pysal.models.Classifier(nn.Sequential(*layers), name="small", class_names=names, input_size=(32, 32)).eval()


def table_of(folder: Path, photos: Sequence[Path], images: int) -> Path:
    """Return a table that names the photos again and again."""
    path = folder / f"{images}.csv"
    path.write_text("path\n" + "".join(f"{photos[n % len(photos)]}\n" for n in range(images)))
    return path


# --- the engine's own rate: the methods on images in memory, in a process with nothing else to do


def bare(method: str, images: int) -> None:
    """Be a process that explains images when it is told to, and prints how long that took."""
    keep_freed_memory()
    torch.set_num_threads(1)
    model = pysal.models.load(MODEL)
    photos = pysal.read_images(sorted((ROOT / "pysal/data/photos").glob("*.jpg")), model)
    prepared = pysal.prepare(model, photos[:1], batch_size=CPU_ROWS)
    pysal.explain(prepared, photos[:1], methods=method)
    print("ready", flush=True)
    sys.stdin.readline()
    started, processor = time.perf_counter(), time.process_time()
    together = IMAGES_TOGETHER["cpu"]
    for start in range(0, images, together):
        rows = torch.arange(start, min(start + together, images)) % len(photos)
        pysal.explain(prepared, photos[rows], methods=method)
    print(json.dumps([time.perf_counter() - started, time.process_time() - processor]), flush=True)


def bare_rate(method: str, images: int, at_once: int) -> tuple[float, float]:
    """Return images per second of processes that run at the same time, all together, and per second of a processor."""
    command = [sys.executable, "-m", "benchmarks.bench_audit", "--bare", method, "--images", str(images)]
    running = [subprocess.Popen(command, cwd=ROOT, env=environment(), stdin=-1, stdout=-1, text=True) for _ in range(at_once)]
    for process in running:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in running:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    taken = [json.loads(process.communicate()[0]) for process in running]
    return sum(images / wall for wall, _ in taken), images * len(taken) / sum(processor for _, processor in taken)


def environment() -> dict[str, str]:
    """Return what the processes are started with."""
    return os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT)}


# --- the rate of an audit


def audit_rate(out: Path) -> tuple[float, float, dict[str, float]]:
    """Return what the timings of a finished audit say.

    Returns:
        Images per second, the rates of the workers added up: each from when its first shard was begun to when its last was
        ready, whatever lay between, so that starting and preparing do not count; images per second of a processor; and for
        each stage the seconds of a processor per image.
    """
    frame = pq.read_table(out / "timings").to_pandas()
    shards = frame.groupby(["host", "process", "shard"]).agg(
        started=("started", "first"), seconds=("seconds", "sum"), images=("images", "max")
    )
    shards["ended"] = shards.started.astype("int64") / 1e6 + shards.seconds
    rate = 0.0
    for _, own in shards.groupby(level=["host", "process"]):
        rate += own.images.sum() / (own.ended.max() - own.started.min().timestamp())
    stages = frame.groupby("stage").agg(seconds=("cpu_seconds", "sum"), images=("images", "sum"))
    per_image = {name: float(row.seconds / row.images) for name, row in stages.iterrows() if row.images}
    return float(rate), float(shards.images.sum() / frame.cpu_seconds.sum()), per_image


def run(source: Path, out: Path, engine: str, workers: int, shard_size: int, **options: Any) -> Job:
    """Run an audit to its end."""
    job = Job(source, model=MODEL, out=out, shard_size=shard_size, **options)
    assert job.run(engine=engine, workers=workers).complete  # type: ignore[arg-type]
    return job


def methods(names: Sequence[str], seconds: float, workers: int, folder: Path, save: Any) -> None:
    """Measure each method: bare in one process and in several at once, in a pool of one and of several, and on Ray."""
    photos = sorted((ROOT / "pysal/data/photos").glob("*.jpg"))
    for name in names:
        _, alone = bare_rate(name, 4, 1)
        shard_size = max(2, round(seconds * alone / SHARDS))
        images = shard_size * SHARDS
        rates: dict[str, float] = {}
        processor: dict[str, float] = {}
        for count in dict.fromkeys((1, workers)):
            rates[f"bare {count}"], processor[f"bare {count}"] = bare_rate(name, images, count)
            for engine in ("pool",) if count == 1 else ("pool", "ray"):
                out = folder / f"{name}-{engine}-{count}"
                run(table_of(folder, photos, images * count), out, engine, count, shard_size, methods=[name])
                rates[f"{engine} {count}"], processor[f"{engine} {count}"], stages = audit_rate(out)
        run(table_of(folder, photos, len(photos)), folder / name, "inline", 1, len(photos), methods=[name])  # each photo once
        stored = (folder / name / "shards" / "00000.parquet").stat().st_size / len(photos)
        save(
            "methods",
            {
                "method": name,
                "images_per_worker": images,
                "workers": workers,
                "images_per_second": rates,
                "images_per_processor_second": processor,
                "seconds_of_a_processor_per_image": stages,
                "bytes_per_image": stored,
            },
        )


def metrics(folder: Path, save: Any) -> None:
    """Measure each figure of a gradient's map: seconds of a processor per image, without the method itself."""
    names = [name for name, metric in METRICS.items() if metric.needs != "masks"]
    photos = sorted((ROOT / "pysal/data/photos").glob("*.jpg"))
    out = folder / "metrics"
    run(table_of(folder, photos, METRIC_IMAGES), out, "pool", 1, METRIC_IMAGES, methods=["gradient"], metrics=names)
    stages = audit_rate(out)[2]
    for name in names:
        save("metrics", {"metric": name, "images": METRIC_IMAGES, "seconds": stages[f"metric:{name}"]})


# --- growth


def grow(images: int, workers: int, folder: Path) -> None:
    """Be a process that audits a number of small images with a small model, and prints what that took."""
    table = folder / f"{images}.csv"
    started = time.perf_counter()
    job = Job(table, model="benchmarks.bench_audit:small", methods=["gradient"], maps="none", out=folder / f"out{images}")
    planned = time.perf_counter() - started
    most_of_a_worker = 0

    def look(_done: int, _total: int) -> None:
        nonlocal most_of_a_worker
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        for child in children:
            status = Path(f"/proc/{child}/status")
            text = status.read_text() if status.exists() else ""
            found = [int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("VmHWM")]
            most_of_a_worker = max(most_of_a_worker, *found, 0)

    started = time.perf_counter()
    job.run(workers=workers, progress=look)
    found = {
        "images": images,
        "workers": workers,
        "plan_seconds": planned,
        "run_seconds": time.perf_counter() - started,
        "images_per_second": audit_rate(job.out)[0],
        "peak_bytes": memory_now("VmHWM"),
        "worker_peak_bytes": most_of_a_worker,
        "stored_bytes": sum(path.stat().st_size for path in job.out.rglob("*") if path.is_file()),
    }
    print(json.dumps(found))


def growth(sizes: Sequence[int], workers: int, folder: Path, save: Any) -> None:
    """Measure audits of more and more images, which repeat a hundred small ones."""
    photos = []
    for n in range(100):
        photos.append(folder / f"{n:02d}.png")
        pixels = np.random.default_rng(n).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(photos[-1])
    for images in sizes:
        table_of(folder, photos, images)
        command = [sys.executable, "-m", "benchmarks.bench_audit", "--grow", str(images), "--workers", str(workers)]
        done = subprocess.run(
            [*command, "--folder", str(folder)], cwd=ROOT, env=environment(), capture_output=True, text=True, check=True
        )
        save("growth", json.loads(done.stdout.splitlines()[-1]))


def saver(path: Path) -> Any:
    """Return a function that puts one more row into the results, in the place of an older one of the same case."""
    path.parent.mkdir(parents=True, exist_ok=True)

    def save(kind: str, row: Mapping[str, Any]) -> None:
        found = json.loads(path.read_text()) if path.exists() else {}
        found["metadata"] = metadata(torch.device("cpu"), 0.0) | {"command": " ".join(["python -m", *sys.orig_argv[2:]])}
        case = next(iter(row))
        others = [old for old in found.get(kind, []) if old[case] != row[case]]
        found[kind] = [*others, {**row, "commit": found["metadata"]["commit"], "date": found["metadata"]["date"]}]
        path.write_text(json.dumps(found, indent=1) + "\n")
        print(kind, json.dumps(row), flush=True)

    return save


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_audit", description=__doc__.splitlines()[0])
    parser.add_argument("--methods", default=",".join(METHODS), help="names, separated by commas; none for none")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each method in each of its five runs")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--growth", default=",".join(map(str, GROWTH)), help="numbers of images, or none")
    parser.add_argument("--no-metrics", action="store_true")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results" / pysal.__version__)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--bare", help=argparse.SUPPRESS)
    parser.add_argument("--images", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--grow", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bare:
        bare(options.bare, options.images)
    elif options.grow:
        grow(options.grow, options.workers, options.folder)
    else:
        os.environ |= {"RAY_worker_niceness": "0"}  # as the pool's
        torch.set_num_threads(1)
        save = saver(options.results / f"audit--{device_name(torch.device('cpu'))}.json")
        with tempfile.TemporaryDirectory() as folder:
            if options.methods != "none":
                methods(options.methods.split(","), options.seconds, options.workers, Path(folder), save)
            if not options.no_metrics:
                metrics(Path(folder), save)
            if options.growth != "none":
                growth([int(size) for size in options.growth.split(",")], options.workers, Path(folder), save)


if __name__ == "__main__":
    main()
