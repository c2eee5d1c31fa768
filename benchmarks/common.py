"""How everything here is timed: alternating runs, medians, rows and metadata. README.md is the contract."""

import contextlib
import ctypes
import datetime
import gc
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pysal

ROOT = Path(__file__).resolve().parents[1]
WARM_UP_SECONDS = 0.2
SAMPLING_SECONDS = 1.0
MIN_SAMPLES, MAX_SAMPLES = 5, 301
COPY_BYTES = 256 * 2**20
# Methods take seconds, not microseconds: rounds instead of samples.
METHOD_ROUNDS, METHOD_SECONDS = 3, 12.0
# A third round of a long method is run where the second and the third fit into this.
LONG_SECONDS = 60.0
MOST_METHOD_ROUNDS = 15


@dataclass(frozen=True)
class Row:
    """One candidate on one case, as it is written to the results."""

    op: str
    backend: str
    case: str
    dtype: str
    device: str
    samples: int
    calls_per_sample: int
    median_us: float | None
    iqr_us: float | None
    times_faster_than_reference: float | None
    bytes_moved: int
    pct_of_copy_bandwidth: float | None
    peak_mem_bytes: int | None
    failed: str | None = None
    replayed: bool = False  # on a GPU: from a graph; else small cases are the time of a launch


@dataclass(frozen=True)
class MethodRow:
    """One way to a method's map on one network, as it is written to the results."""

    method: str
    network: str
    candidate: str
    setting: str
    samples: int
    median_s: float | None
    iqr_s: float | None
    times_as_long_as_ours: float | None  # median over the rounds of candidate / ours in the same round
    times_as_long_as_ours_iqr: float | None
    peak_mem_bytes: int | None
    difference: float | None
    bound: float | None
    agrees: bool | None
    commit: str  # methods are measured one by one, and the rest of the file may be of another day
    date: str
    failed: str | None = None


@dataclass(frozen=True)
class DeviceRow(MethodRow):
    """One way to the maps of a batch on a GPU, in one arithmetic; times, ratios and peaks are those of the whole batch.

    Attributes:
        images: in the batch.
        precision: of the model's passes; `times_as_long_as_ours` is against ours in the same one.
        error: relative l2 distance from ours in float64; None where noise is everybody's own.
        outside_model: share of the time that is not forward and input gradient of the bare engine in the same chunks.
    """

    images: int = 1
    precision: str = "float32"
    error: float | None = None
    outside_model: float | None = None


def clock(device: torch.device) -> Callable[[], float]:
    """Return a clock in seconds that waits until the device has done what it was given."""
    if device.type != "cuda":
        return time.perf_counter

    def synchronised() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return synchronised


def median_and_iqr(samples: Sequence[float]) -> tuple[float, float]:
    """Return the median and the interquartile range; of one sample that sample and 0."""
    if len(samples) == 1:
        return samples[0], 0.0
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return middle, high - low


def seconds_per_call(call: Callable[[], object], now: Callable[[], float]) -> float:
    """Return the mean duration of a call while warming up for WARM_UP_SECONDS."""
    call()  # allocations and lazy set-up are not part of the estimate
    calls, start = 0, now()
    while (elapsed := now() - start) < WARM_UP_SECONDS:
        call()
        calls += 1
    return elapsed / calls


def rotating(call: Callable[..., object], argument_sets: Sequence[tuple[Any, ...]], calls: int) -> Callable[[], None]:
    """Return a sample: `calls` calls, each with the next set of arguments."""
    position = 0

    def sample() -> None:
        nonlocal position
        for _ in range(calls):
            call(*argument_sets[position])
            position = (position + 1) % len(argument_sets)

    return sample


def alternate(
    benchmark: Any,
    candidates: Mapping[str, Callable[..., object]],
    argument_sets: Sequence[tuple[Any, ...]],
    device: torch.device,
) -> tuple[dict[str, list[float]], int, set[str]]:
    """Time candidates in turn, A B C A B C; on a GPU samples that were recorded, so that no call waits for its launch.

    Args:
        benchmark: pytest-benchmark's fixture; its table shows the last candidate.
        candidates: name -> function of one set of arguments.
        argument_sets: equal work in different memory.
        device: where the work is done.

    Returns:
        name -> seconds per call, one number per sample; the calls that each sample is the mean of; and who was recorded.
    """
    now = clock(device)
    estimates = {name: seconds_per_call(rotating(call, argument_sets, 1), now) for name, call in candidates.items()}
    # A launch takes microseconds that a GPU would spend waiting: let a sample there last a millisecond.
    calls = max(1, round(1e-3 / min(estimates.values()))) if device.type == "cuda" else 1
    rounds = round(SAMPLING_SECONDS / (calls * sum(estimates.values())))
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    runs: dict[str, Callable[[], object]] = {name: rotating(call, argument_sets, calls) for name, call in candidates.items()}
    recorded = {name: replay for name, run in runs.items() if (replay := recording(run, device)) is not None}
    runs |= recorded
    for run in recorded.values():
        run()  # the first replay uploads the graph
    *others, last = candidates

    def time_the_others() -> None:
        for name in others:
            start = now()
            runs[name]()
            samples[name].append((now() - start) / calls)
        now()

    def timed_last() -> None:
        start = now()
        runs[last]()
        samples[last].append((now() - start) / calls)

    benchmark.pedantic(timed_last, setup=time_the_others, rounds=min(max(rounds, MIN_SAMPLES), MAX_SAMPLES))
    return samples, calls, set(recorded)


def recording(run: Callable[[], object], device: torch.device) -> Callable[[], None] | None:
    """Return what replays a run as a CUDA graph; None on another device, and of what asks a GPU for a number."""
    if device.type != "cuda":
        return None
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError as reason:
        print(f"  not recorded: {str(reason).splitlines()[0]}", flush=True)
        return None
    return graph.replay


def copy_bandwidth(device: torch.device) -> float:
    """Return the bytes per second, read and written, of a large copy on the device."""
    source = torch.ones(COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    now = clock(device)
    samples = []
    for _ in range(11):
        start = now()
        target.copy_(source)
        samples.append(now() - start)
    return 2 * COPY_BYTES / statistics.median(samples[2:])


def peak_memory(call: Callable[[], object], device: torch.device) -> int | None:
    """Return the bytes that a call holds at its peak above what was there before; None where torch does not count."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def host_clock() -> float:
    """Return seconds: with one thread those the process worked, which a busy machine disturbs less, else those on the wall."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def seconds_of(call: Callable[[], object], now: Callable[[], float] = host_clock, *, collect: bool = True) -> float:
    """Return how long one call takes by a clock, after what earlier ones left behind was collected."""
    if collect:
        gc.collect()
    start = now()
    call()
    return now() - start


def memory_now(name: str) -> int:
    """Return a line of /proc/self/status in bytes: VmRSS, what the process holds, or VmHWM, the most it held."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def return_free_memory() -> None:
    """Give the C library's free memory back to the kernel, so that the next peak counts from what is in use."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def first_run(call: Callable[[], Tensor]) -> tuple[Tensor, float, int]:
    """Return what a call gives, its seconds, and the bytes the process held at its peak above what it held before."""
    return_free_memory()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    before = memory_now("VmRSS")
    start = host_clock()
    result = call()
    seconds = host_clock() - start
    peak = memory_now("VmHWM") - before
    return_free_memory()
    return result, seconds, peak


def alternate_methods(
    benchmark: Any,
    runs: Mapping[str, Callable[[], object]],
    firsts: Mapping[str, float],
    always: Sequence[str],
    rounds: int | None,
) -> dict[str, list[float]]:
    """Time methods in turn, A B C A B C.

    The first runs, which were checked, count where a round is long, and are the warm-up where it is short. Where all candidates
    would take too long, those not in `always` have their first run only.

    Args:
        benchmark: pytest-benchmark's fixture; its table shows the first candidate.
        runs: name -> the work; the first is ours.
        firsts: name -> seconds of its first run.
        always: names that are in every round.
        rounds: how many; None = by the time that the first runs took.

    Returns:
        name -> seconds, one number per round.
    """
    long = METHOD_ROUNDS * sum(firsts.values()) > METHOD_SECONDS
    if rounds is None and long:
        rounds = METHOD_ROUNDS if 2 * sum(firsts[name] for name in always if name in firsts) < LONG_SECONDS else 2
    elif rounds is None:
        rounds = min(MOST_METHOD_ROUNDS, int(METHOD_SECONDS / sum(firsts.values())))
    samples = {name: [firsts[name]] if long else [] for name in runs}
    ours, *others = [name for name in runs if name in always or not long]

    def time_the_others() -> None:
        for name in others:
            samples[name].append(seconds_of(runs[name]))
        gc.collect()

    def timed_ours() -> None:
        samples[ours].append(seconds_of(runs[ours]))

    benchmark.pedantic(timed_ours, setup=time_the_others, rounds=max(rounds - long, 1))
    return samples


def processor() -> str:
    """Return the processor's name."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """Return what the results call the device: "cpu" with the processor's name, or the GPU's name."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu {processor()}"
    return "-".join("".join(c if c.isalnum() else " " for c in name).lower().split())


def git(*arguments: str) -> str:
    """Return what a git command prints; outside a repository the packed commit, or "unknown"."""
    packed = ROOT / "commit"  # of tests/short_gpu_run.sh
    if packed.exists() and arguments == ("rev-parse", "HEAD"):
        return packed.read_text().strip()
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def metadata(device: torch.device, bandwidth: float) -> dict[str, Any]:
    """Return where and with what the numbers were made."""
    cuda = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        cuda = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "runtime": torch.version.cuda,
        }
    return {
        "commit": git("rev-parse", "HEAD"),
        "clean": git("status", "--porcelain", "--untracked-files=no") == "",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": os.environ.get("BENCHMARK_COMMAND") or " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pysal": pysal.__version__,
        "build": {key: value for key, value in pysal.build_info().items() if key not in {"kernels", "fell_back"}},
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "clock": "process_time" if torch.get_num_threads() == 1 else "perf_counter",
        "malloc": {name: value for name, value in sorted(os.environ.items()) if name.startswith("MALLOC_")},
        "load_average": [round(load, 2) for load in os.getloadavg()],
        **({"copy_bytes_per_second": round(bandwidth)} if bandwidth else {}),
        "cuda": cuda,
    }


def as_rows(
    samples: Mapping[str, Sequence[float]],
    failed: Mapping[str, str],
    calls: int,
    bandwidth: float,
    peaks: Mapping[str, int | None],
    replayed: Collection[str] = (),
    **same: Any,
) -> list[Row]:
    """Return one row per candidate; "reference" is what the others are held against.

    Args:
        samples: name -> seconds per call.
        failed: name -> why it has no samples.
        calls: calls per sample.
        bandwidth: bytes per second of a large copy.
        peaks: name -> bytes at the peak.
        replayed: names of those timed as graphs.
        **same: the fields that all rows share.
    """
    rows = []
    reference = statistics.median(samples["reference"])
    for name in samples:
        median, iqr = median_and_iqr(samples[name])
        rows.append(
            Row(
                backend=name,
                samples=len(samples[name]),
                calls_per_sample=calls,
                median_us=round(median * 1e6, 3),
                iqr_us=round(iqr * 1e6, 3),
                times_faster_than_reference=round(reference / median, 3),
                pct_of_copy_bandwidth=round(100 * same["bytes_moved"] / median / bandwidth, 2),
                peak_mem_bytes=peaks.get(name),
                replayed=name in replayed,
                **same,
            )
        )
    for name, reason in failed.items():
        rows.append(Row(backend=name, samples=0, calls_per_sample=calls, median_us=None, iqr_us=None,
                        times_faster_than_reference=None, pct_of_copy_bandwidth=None, peak_mem_bytes=None,
                        failed=reason, **same))  # fmt: skip
    return rows


def as_table(rows: Sequence[Row]) -> str:
    """Return the rows as a table for people."""
    lines = [f"{'op':34} {'case':44} {'dtype':9} {'backend':10} {'median us':>11} {'IQR us':>9} {'x ref':>7} {'% copy':>7}"]
    for row in rows:
        if row.failed is None:
            numbers = f"{row.median_us:11.1f} {row.iqr_us:9.1f} {row.times_faster_than_reference:7.2f}"
            numbers += f" {row.pct_of_copy_bandwidth:7.1f}"
        else:
            numbers = row.failed
        lines.append(f"{row.op:34} {row.case:44} {row.dtype:9} {row.backend:10} {numbers}")
    return "\n".join(lines)


def methods_table(rows: Sequence[MethodRow]) -> str:
    """Return the rows of methods as a table for people."""
    heads = f"{'n':>2} {'median s':>9} {'IQR':>7} {'/ ours':>7} {'IQR':>6} {'MiB':>6} {'differs':>8}"
    lines = [f"{'method':26} {'candidate':26} {'setting':28} {heads}"]
    for row in rows:
        numbers = str(row.failed)
        if row.median_s is not None:
            ratio = f"{row.times_as_long_as_ours:7.2f} {row.times_as_long_as_ours_iqr:6.2f}"
            numbers = f"{row.samples:2} {row.median_s:9.3f} {row.iqr_s:7.3f} {ratio}"
            numbers += f" {(row.peak_mem_bytes or 0) / 2**20:6.0f} {row.difference:8.1e}" + ("" if row.agrees else "  WRONG")
        lines.append(f"{row.method:26} {row.candidate:26} {row.setting:28} {numbers}")
    return "\n".join(lines)


def as_json(rows: Sequence[Row | MethodRow], about: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a results file holds."""
    return {"metadata": dict(about), "rows": [asdict(row) for row in rows]}
