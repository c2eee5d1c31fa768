"""The methods on a GPU: batches of 1 and 32 images, in every arithmetic. Run by `python -m benchmarks --device cuda`."""

import contextlib
import copy
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import lru_cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pysal
from benchmarks import bench_methods, by_hand
from benchmarks.bench_methods import BLUR_STEPS, METHODS, OURS, SAMPLES, STEPS, Candidate, Settings, Subject, ends, relative
from benchmarks.common import DeviceRow, clock, git, median_and_iqr, peak_memory, seconds_of
from benchmarks.conftest import DeviceReport
from benchmarks.networks import NETWORKS, PHOTOS, photo
from pysal.engine.prepared.model import PreparedModel
from pysal.engine.running.chunks import chunk_rows
from pysal.engine.running.precision import PRECISIONS, precision_mode

BATCHES = (1, 32)
# What the peers run in: the flags of torch.backends that allow TF32 are set alike for them and for ours.
PEERS_PRECISIONS = ("float32", "tf32")
# Outside float32, rounding moves ReLU gates, and how far that moves a map is what is measured. What is further away than this
# is called wrong: a map that has nothing to do with the method's is at 1 or more.
LOW_PRECISION = 0.5
# Runs before the clock counts: a pass is captured as a CUDA graph when it comes for the second time, its sweep in the next.
WARM_UPS, PEERS_WARM_UPS = 5, 1
# What takes longer than this is warm by itself; a peer's checked run counts, and it is not run again.
LONG_SECONDS = 2.0
# Of a case: seconds for each candidate, and rounds.
SAMPLING_SECONDS, FEWEST_ROUNDS, MOST_ROUNDS = 0.6, 3, 15

# Passes per image, and whether the method makes its images channels_last for a prepared model.
PASSES = {
    "integrated_gradients": (STEPS, True),
    "smooth_grad": (SAMPLES, True),
    "blur_integrated_gradients": (BLUR_STEPS, False),
    "gradient": (1, False),
}
# By hand with the model compiled, which takes from half a minute to minutes: with --with-compile only.
COMPILED = "by hand, torch.compile"
BY_HAND: dict[str, Callable[[nn.Module, "DeviceSubject"], Tensor]] = {
    "gradient": lambda model, subject: by_hand.gradient(model, subject.image, subject.target),
    "integrated_gradients": lambda model, subject: subject.each(
        lambda one: by_hand.integrated_gradients(model, one, subject.target, bench_methods.STEPS)
    ),
}
Key = tuple[str, str]  # candidate and precision


class DeviceSubject(Subject):
    """A network on a device, prepared in every arithmetic."""

    def __init__(self, network: str, device: torch.device) -> None:
        super().__init__(network, device)
        self.now = clock(device)
        self.prepared: dict[str, PreparedModel] = {"float32": self.fast}
        for precision in PRECISIONS:
            if precision not in self.prepared:
                self.prepared[precision] = pysal.prepare(self.model, self.image, precision=precision)  # type: ignore[arg-type]
        self.settings = Settings(single=(1, 10, 50), steps=50, batch=(10, 25, 50), forward=(16, 64, 196), windows=16)
        self._of: dict[int, DeviceSubject] = {1: self}

    def of(self, images: int) -> "DeviceSubject":
        """Return the same network with a batch of images."""
        if images in self._of:
            return self._of[images]
        self._of[images] = other = copy.copy(self)
        other.image = batch_like(self.image, images)
        # 8 steps of 32 images are the largest batch once
        other.settings = Settings(single=(1, 10, 50), steps=8, batch=(32, 64, 128, 256), forward=(1, 4, 8), windows=56)
        return other

    @contextlib.contextmanager
    def arithmetic(self, precision: str) -> Iterator[None]:
        """Explain in one arithmetic: ours by its prepared model, the peers by the flags that ours sets for itself."""
        self.fast = self.prepared[precision]
        flags = precision if precision in PEERS_PRECISIONS else "float32"
        with precision_mode(flags, self.device, backward=True):  # type: ignore[arg-type]
            yield


def batch_like(first: Tensor, images: int) -> Tensor:
    """Return a batch that begins with an image (1, C, H, W), of other photos in its range, which scales everybody's noise."""
    low, high = first.min(), first.max()
    found = [first]
    names = sorted(path.stem for path in PHOTOS.glob("*.jpg"))
    for number in range(1, images):
        one = photo(names[number % len(names)]).to(first).roll(7 * (number // len(names)), 3)
        found.append(low + (one - one.min()) / (one.max() - one.min()) * (high - low))
    return torch.cat(found)


@lru_cache(maxsize=1)
def device_subject(network: str, device: torch.device) -> DeviceSubject:
    return DeviceSubject(network, device)


def bare_passes(subject: DeviceSubject, method: str, precision: str) -> Callable[[], None]:
    """Return what runs forward and input gradient of the engine alone, in the chunks that the method runs."""
    fast, (passes, channels_last) = subject.prepared[precision], PASSES[method]
    total = passes * subject.images
    size = chunk_rows(total, fast.rows or 1, subject.device)
    order = torch.channels_last if channels_last and fast.fused else torch.contiguous_format
    rows = torch.arange(min(size, total), device=subject.device) % subject.images
    batch = subject.image[rows].contiguous(memory_format=order)

    def one_pass(images: Tensor) -> None:
        if fast.program is None:
            leaf = images.detach().requires_grad_()
            torch.autograd.grad(fast(leaf)[:, subject.target].sum(), leaf)
            return
        recorded = (
            contextlib.nullcontext(fast.program.record(images)) if fast.replays is None else fast.replays.recording(images)
        )
        with recorded as tape:
            seed = torch.zeros_like(tape.output)
            seed[:, subject.target] = 1
            tape.sweep(seed)

    def run() -> None:
        with torch.inference_mode(False), torch.enable_grad(), precision_mode(fast.precision, subject.device, backward=True):
            for start in range(0, total, size):
                one_pass(batch[: total - start])

    return run


def warmed(
    run: Callable[[], Tensor], device: torch.device, now: Callable[[], float], times: int
) -> tuple[Tensor, float, int | None]:
    """Run until nothing is done for the first time; return the first map, the last run's seconds and the bytes at the peak."""
    found: list[Tensor] = []
    seconds: list[float] = []

    def checked() -> None:
        found.append(run())

    def all_runs() -> None:
        seconds.append(seconds_of(checked, now, collect=False))
        for _ in range(times if seconds[0] < LONG_SECONDS else 0):
            seconds.append(seconds_of(run, now, collect=False))

    peak = peak_memory(all_runs, device)
    if device.type != "cuda":
        all_runs()
    return found[0], seconds[-1], peak


def setting_of(candidate: Candidate, subject: DeviceSubject, precision: str) -> str:
    """Say how a candidate ran; ours, in how large passes, and whether they were replayed."""
    if candidate.name != OURS:
        return candidate.setting
    fast = subject.prepared[precision]
    graphs = (
        "" if fast.replays is None else ", graphs" if fast.replays.refused is None else f", no graphs: {fast.replays.refused}"
    )
    return f"prepared, {fast.rows} images a pass{graphs}"


def measure(method: str, subject: DeviceSubject, report: DeviceReport, benchmark: Any, *, compiled: bool = False) -> None:
    """Hold every candidate's maps against ours in float64, time the candidates in turn, and report both.

    Raises:
        AssertionError: our map is wrong in float32, or could not be made; the rows are in the report all the same.
    """
    device, now = subject.device, subject.now
    gc.collect()
    gc.freeze()  # what is there stays, and is not looked through again: a collection took a tenth of a second
    for fast in subject.prepared.values():
        if fast.replays is not None:
            fast.replays.clear()  # of earlier cases: four models' graphs and a peer's largest batch fill a GPU
    with subject.arithmetic("float32"):
        comparison = METHODS[method](subject)
    if compiled and method in BY_HAND:
        model = torch.compile(subject.model, dynamic=False)
        run = partial(BY_HAND[method], model, subject)
        comparison.candidates.append(Candidate(COMPILED, run, "torch.compile(model)"))
    distance = comparison.distance or relative
    assert comparison.method is not None
    expected = ends(comparison.method(subject.double, ends(subject.image).double()))
    candidates: dict[Key, Candidate] = {}
    for candidate in comparison.candidates:
        several = PRECISIONS if candidate.name == OURS else PEERS_PRECISIONS
        for precision in ("float32",) if candidate.name.startswith(f"{OURS},") else several:
            candidates[candidate.name, precision] = candidate

    def in_arithmetic(run: Callable[[], Any], precision: str) -> Any:
        with subject.arithmetic(precision):
            return run()

    runs: dict[Key, Callable[[], Any]] = {}
    seconds: dict[Key, float] = {}
    peaks: dict[Key, int | None] = {}
    failed: dict[Key, str] = {(name, ""): why for name, why in comparison.missing.items()}
    compared: dict[Key, tuple[float, float, float | None]] = {}  # difference, bound, error
    for key, candidate in candidates.items():
        name, precision = key
        run = partial(in_arithmetic, candidate.run, precision)
        try:
            found, seconds[key], peaks[key] = warmed(run, device, now, WARM_UPS if name == OURS else PEERS_WARM_UPS)
            found = ends(found.to(expected.device))
            of_its_own = candidate.difference
            difference = distance(found, expected) if of_its_own is None else in_arithmetic(of_its_own, precision)
        except Exception as error:  # a peer may fail in any way, ours too on a device it has not met: the row says so
            failed[key] = (f"{type(error).__name__}: {error}".splitlines() or [""])[0]
            print(f"  {name}, {precision}: {failed[key]}", flush=True)
        else:
            runs[key] = run
            bound = comparison.bound if precision == "float32" else max(comparison.bound, LOW_PRECISION)
            exact = name.startswith(OURS) or (comparison.distance in (None, relative) and of_its_own is None)
            compared[key] = difference, bound, relative(found, expected) if exact else None
            print(f"  {name}, {precision}: {seconds[key]:.4f} s, differs by {difference:.1e}", flush=True)
            del found
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()  # of a peer's batch, and of what failed
    for precision in PRECISIONS if method in PASSES else ():
        if (OURS, precision) in runs:
            key = f"bare {OURS}", precision
            runs[key] = bare_passes(subject, method, precision)
            seconds[key] = warmed(runs[key], device, now, WARM_UPS)[1]  # type: ignore[arg-type]
    samples = alternate(runs, seconds, now, benchmark)
    report.add(rows_of(method, subject, candidates, samples, compared, peaks, failed))
    ours = [key for key in candidates if key[0].startswith(OURS)]
    assert not [key for key in ours if key in failed], f"{method}: {failed}"
    wrong = [key for key in ours if key[1] == "float32" and not compared[key][0] <= compared[key][1]]
    assert not wrong, f"{method}: {wrong} differs by {[compared[key][0] for key in wrong]}"


def alternate(
    runs: dict[Key, Callable[[], Any]], seconds: dict[Key, float], now: Callable[[], float], benchmark: Any
) -> dict[Key, list[float]]:
    """Time candidates in turn, the slower ones in fewer rounds, and return what each round took."""
    counts = {}
    for key in runs:
        ours = key[0] in (OURS, f"bare {OURS}")
        rounds = min(MOST_ROUNDS, max(FEWEST_ROUNDS if ours else 1, int(SAMPLING_SECONDS / max(seconds[key], 1e-9))))
        counts[key] = 0 if seconds[key] > LONG_SECONDS and not ours else rounds
    samples: dict[Key, list[float]] = {key: [] if counts[key] else [seconds[key]] for key in runs}
    done = 0

    def one_round() -> None:
        nonlocal done
        gc.collect()
        for key, run in runs.items():
            if done < counts[key]:
                samples[key].append(seconds_of(run, now, collect=False))
        done += 1

    benchmark.pedantic(one_round, rounds=max(counts.values(), default=0) or 1)
    return samples


def rows_of(
    method: str,
    subject: DeviceSubject,
    candidates: dict[Key, Candidate],
    samples: dict[Key, list[float]],
    compared: dict[Key, tuple[float, float, float | None]],
    peaks: dict[Key, int | None],
    failed: dict[Key, str],
) -> list[DeviceRow]:
    """Return one row per candidate and arithmetic."""
    commit, date = git("rev-parse", "HEAD"), datetime.now(UTC).isoformat(timespec="seconds")
    rows = []
    for key, candidate in candidates.items():
        if key not in compared:
            continue
        name, precision = key
        median, iqr = median_and_iqr(samples[key])
        ratio = ratio_iqr = outside = None
        if ours := samples.get((OURS, precision)):
            ratio, ratio_iqr = median_and_iqr([one / our for one, our in zip(samples[key], ours, strict=False)])
        if name == OURS and (bare := samples.get((f"bare {OURS}", precision))):
            outside = statistics.median(1 - one / our for one, our in zip(bare, samples[key], strict=False))
        difference, bound, error = compared[key]
        rows.append(
            DeviceRow(
                method=method,
                network=subject.network,
                candidate=name,
                setting=setting_of(candidate, subject, precision),
                samples=len(samples[key]),
                median_s=significant(median),
                iqr_s=significant(iqr),
                times_as_long_as_ours=significant(ratio),
                times_as_long_as_ours_iqr=significant(ratio_iqr),
                peak_mem_bytes=peaks[key],
                difference=significant(difference),
                bound=bound,
                agrees=difference <= bound,
                commit=commit,
                date=date,
                images=subject.images,
                precision=precision,
                error=significant(error),
                outside_model=significant(outside),
            )
        )
    for (name, precision), reason in failed.items():
        rows.append(
            DeviceRow(
                method,
                subject.network,
                name,
                "",
                0,
                *[None] * 8,
                commit,
                date,
                reason,
                images=subject.images,
                precision=precision,
            )
        )
    return rows


def significant(value: float | None) -> float | None:
    """Return a number to four digits; JSON has none that is not finite."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.4g}")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("images", BATCHES)
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.filterwarnings("ignore")  # the peers'
def test_method_on_device(
    method: str, images: int, network: str, benchmark: Any, device_report: DeviceReport, request: pytest.FixtureRequest
) -> None:
    until = request.config.getoption("--until")
    if until is not None and time.time() > until:
        pytest.skip(f"out of time: python -m benchmarks --device cuda --network {network} --images {images} --method {method}")
    print(f"\n{network}, {images} images, {method}", flush=True)
    measure(
        method,
        device_subject(network, device_report.device).of(images),
        device_report,
        benchmark,
        compiled=request.config.getoption("--with-compile"),
    )
