"""The benchmarks on a GPU, run on the CPU: the same code with a small network and a clock of its own."""

import gc
import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pysal
from benchmarks import __main__, bench_gpu, bench_methods, by_hand, networks, peers, tables
from benchmarks.bench_gpu import DeviceSubject
from benchmarks.bench_methods import Candidate, Comparison, TooLong, tried
from benchmarks.conftest import DeviceReport
from pysal.engine.tape.cuda_graphs import Replays
from pysal.engine.tape.tape import Program
from tests.engine.test_cuda_graphs import again

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore")  # the peers'


class Ticks:
    """A clock on which every run takes a second."""

    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        self.time += 1
        return self.time


class Rounds:
    """What is used of pytest-benchmark's fixture."""

    def pedantic(self, call: Callable[[], None], rounds: int) -> None:
        for _ in range(rounds):
            call()


def small() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.ReLU()]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 120)).eval()


@pytest.fixture
def subject(monkeypatch: pytest.MonkeyPatch) -> DeviceSubject:
    full = bench_methods.photo

    def photo(name: str) -> Tensor:
        return nn.functional.interpolate(full(name), (32, 32), mode="bilinear", antialias=True)

    monkeypatch.setattr(bench_methods, "photo", photo)
    monkeypatch.setattr(bench_gpu, "photo", photo)
    monkeypatch.setitem(bench_methods.NETWORKS, "resnet50", small)
    monkeypatch.setitem(bench_methods.LAYERS, "resnet50", "2")
    # which would look through everything that the other tests left, before each run
    monkeypatch.setattr(gc, "collect", lambda: 0)
    monkeypatch.setattr(gc, "freeze", lambda: None)
    for name in ("STEPS", "SAMPLES", "BLUR_STEPS"):
        monkeypatch.setattr(bench_methods, name, 10)
    passes = {method: (min(number, 10), last) for method, (number, last) in bench_gpu.PASSES.items()}
    monkeypatch.setattr(bench_gpu, "PASSES", passes)
    monkeypatch.setattr(bench_methods, "SEGMENTS", 16)
    found = DeviceSubject("resnet50", CPU)
    found.now = Ticks()
    return found


def rows_in(report: DeviceReport) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row.candidate, row.precision): asdict(row) for row in report.rows}


@pytest.mark.parametrize(
    ("method", "images"), [*((method, 3) for method in bench_methods.METHODS), ("integrated_gradients", 1), ("grad_cam", 1)]
)
def test_every_case_runs_and_is_written_down(method: str, images: int, subject: DeviceSubject, tmp_path: Path) -> None:
    report = DeviceReport("resnet50", CPU, tmp_path)
    bench_gpu.measure(method, subject.of(images), report, Rounds())
    rows = rows_in(report)
    assert {precision for name, precision in rows if name == "pysal"} == {"float32", "tf32", "mixed", "bf16"}
    assert ("by hand", "float32") in rows
    assert ("by hand", "tf32") in rows
    for (name, precision), row in rows.items():
        assert row["images"] == images
        if row["failed"] is not None:
            continue
        assert row["median_s"] == 1
        assert row["times_as_long_as_ours"] == 1
        timed = name == "pysal" and method in bench_gpu.PASSES
        assert (row["outside_model"] is not None) == timed
        if name.startswith("pysal") and precision == "float32":
            assert row["agrees"]
            assert row["error"] < 1e-3  # float32 against float64: rounding, of drops that are small differences
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("gpu-resnet50--cpu-")
    assert len(json.loads(path.read_text())["rows"]) == len(report.rows)


def test_a_compiled_peer_is_timed_where_asked_for(subject: DeviceSubject, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []

    def standing_for(model: nn.Module, *, dynamic: bool) -> nn.Module:
        compiled.append(model)
        return model

    monkeypatch.setattr(torch, "compile", standing_for)
    for method, asked in (("gradient", False), ("grad_cam", True), ("gradient", True), ("integrated_gradients", True)):
        report = DeviceReport("resnet50", CPU, None)
        compiled.clear()
        bench_gpu.measure(method, subject.of(3), report, Rounds(), compiled=asked)
        there = asked and method in bench_gpu.BY_HAND
        assert compiled == ([subject.model] if there else [])
        rows = rows_in(report)
        for precision in ("float32", "tf32"):
            assert ((bench_gpu.COMPILED, precision) in rows) == there
        if there:
            assert rows[bench_gpu.COMPILED, "float32"]["agrees"]


@pytest.mark.parametrize("method", ["grad_cam", "integrated_gradients", "leave_one_out_windows"])
def test_a_transformer_is_a_network_like_others(
    method: str, subject: DeviceSubject, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def small_transformer() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            tiny = networks.VisionTransformer(width=12, heads=2, depth=2, side=2, classes=120)
            return nn.Sequential(pysal.Normalized(tiny, networks.MEAN, networks.STD)).eval()

    monkeypatch.setitem(networks.NETWORKS, "vit_small", small_transformer)
    own = DeviceSubject("vit_small", CPU)
    own.now = Ticks()
    report = DeviceReport("vit_small", CPU, tmp_path)
    bench_gpu.measure(method, own.of(2), report, Rounds())
    rows = rows_in(report)
    assert rows["pysal", "float32"]["agrees"]
    assert rows["by hand", "float32"]["failed"] is None
    assert rows["by hand", "float32"]["agrees"]


def test_what_else_was_measured_stays(subject: DeviceSubject, tmp_path: Path) -> None:
    for method, images in (("gradient", 1), ("gradient", 3), ("grad_cam", 1), ("gradient", 1)):
        bench_gpu.measure(method, subject.of(images), DeviceReport("resnet50", CPU, tmp_path), Rounds())
    (path,) = tmp_path.iterdir()
    rows = json.loads(path.read_text())["rows"]
    cases = [(row["method"], row["images"], row["candidate"], row["precision"]) for row in rows]
    assert len(set(cases)) == len(cases)
    assert {case[:2] for case in cases} == {("gradient", 1), ("gradient", 3), ("grad_cam", 1)}


def comparison(subject: DeviceSubject, ours: float, peer: float) -> Comparison:
    """The gradient, times a factor each; in float64 always as it is."""

    def method(model: Any, image: Tensor) -> Tensor:
        return pysal.gradient(model, image, subject.target) * (1 if image.dtype == torch.float64 else ours)

    candidates = bench_methods.ours(method, subject)
    candidates.append(Candidate("by hand", lambda: by_hand.gradient(subject.model, subject.image, subject.target) * peer))
    return Comparison(candidates, method)


def test_a_wrong_map_of_ours_is_refused(subject: DeviceSubject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench_methods.METHODS, "gradient", partial(comparison, ours=1.1, peer=1))
    report = DeviceReport("resnet50", CPU, None)
    with pytest.raises(AssertionError, match=r"^gradient: .*'pysal', 'float32'.* differs by \[0\.1"):
        bench_gpu.measure("gradient", subject, report, Rounds())
    rows = rows_in(report)
    assert not rows["pysal", "float32"]["agrees"]
    assert rows["pysal", "tf32"]["agrees"]  # a tenth off is what low precisions are allowed
    assert rows["by hand", "float32"]["agrees"]


def test_a_wrong_map_of_a_peer_is_said(subject: DeviceSubject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench_methods.METHODS, "gradient", partial(comparison, ours=1, peer=-1))
    report = DeviceReport("resnet50", CPU, None)
    bench_gpu.measure("gradient", subject, report, Rounds())
    assert not rows_in(report)["by hand", "float32"]["agrees"]
    assert not rows_in(report)["by hand", "tf32"]["agrees"]


@pytest.mark.parametrize("method", bench_gpu.PASSES)
def test_the_bare_engine_makes_the_passes_of_the_method(
    method: str, subject: DeviceSubject, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = subject.of(3)
    made = bench_methods.METHODS[method](batch)
    passes: list[tuple[torch.Size, tuple[int, ...]]] = []
    record = Program.record

    def watched(program: Program, images: Tensor, *layers: Any) -> Any:
        passes.append((images.shape, images.stride()))
        return record(program, images, *layers)

    monkeypatch.setattr(Program, "record", watched)
    made.method(batch.prepared["float32"], batch.image)
    of_method = passes.copy()
    passes.clear()
    bench_gpu.bare_passes(batch, method, "float32")()
    assert passes == of_method
    assert sum(shape[0] for shape, _ in passes) == 3 * bench_gpu.PASSES[method][0]


def test_with_graphs_maps_are_the_same_and_those_of_earlier_cases_are_let_go(subject: DeviceSubject) -> None:
    fast = subject.prepared["float32"]
    assert fast.program is not None
    fast.rows, fast.replays = 4, Replays(fast.program, again)
    for images in (1, 3):
        report = DeviceReport("resnet50", CPU, None)
        bench_gpu.measure("gradient", subject.of(images), report, Rounds())
        ours = rows_in(report)["pysal", "float32"]
        assert ours["setting"] == "prepared, 4 images a pass, graphs"
        assert ours["error"] < 1e-5
        held = list(fast.replays._held.values())
        # the bare engine's passes are the same graph, not one more
        assert [len(replay.tape.output) for replay in held] == [images]
        assert all(len(replay._sweeps) == 1 for replay in held)
    fast.replays.refuse("no such device")
    report = DeviceReport("resnet50", CPU, None)
    fast.replays.clear = lambda: None  # type: ignore[method-assign]
    bench_gpu.measure("gradient", subject, report, Rounds())
    assert rows_in(report)["pysal", "float32"]["setting"].endswith(", no graphs: no such device")


def test_a_peer_that_is_not_installed_is_a_row_with_the_reason(subject: DeviceSubject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "attr", peers.imported("no_such_peer"))
    report = DeviceReport("resnet50", CPU, None)
    bench_gpu.measure("integrated_gradients", subject, report, Rounds())
    rows = rows_in(report)
    for name in ("captum, default", "captum, best"):
        for precision in ("float32", "tf32"):
            assert rows[name, precision]["failed"] == "ModuleNotFoundError: No module named 'no_such_peer'"
    assert rows["PAIR, best", "float32"]["agrees"]
    assert rows["pysal", "float32"]["agrees"]


def script(durations: dict[int, list[float]]) -> tuple[Callable[[int], None], Callable[[], float], list[int]]:
    """A trial whose runs take what is written down, its clock, and the order of the runs; nothing left to take: it fails."""
    ran: list[int] = []
    time = 0.0

    def trial(batch: int) -> None:
        nonlocal time
        ran.append(batch)
        time += durations[batch].pop(0)

    return trial, lambda: time, ran


def test_a_disturbed_trial_does_not_decide() -> None:
    # 4 is the fastest, but its first and its last run were disturbed
    trial, now, ran = script({1: [9.0, 1.2, 1.2, 1.2], 4: [3.0, 1.0, 5.0], 8: [1.1, 1.1, 1.1]})
    trials = tried(trial, (1, 4, 8), now)
    assert trials.best == 4
    assert trials.seconds == {1: pytest.approx(1.2), 4: pytest.approx(1.0), 8: pytest.approx(1.1)}
    assert ran == [1, 1, 4, 8, 1, 4, 8, 1, 4, 8]


def test_a_hopeless_setting_is_given_up_and_a_failing_one_is_never_the_best() -> None:
    trial, now, ran = script({1: [9.0, 4.0, 4.0], 4: [1.0, 1.0, 1.0], 8: []})
    trials = tried(trial, (1, 4, 8), now)
    assert trials.best == 4
    assert trials.seconds[8] == float("inf")
    assert ran == [1, 1, 4, 8, 1, 4, 4]


def test_who_takes_one_image_at_a_time_is_not_waited_for(subject: DeviceSubject, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = subject.of(3)
    assert batch.each(lambda image: 2 * image).equal(2 * batch.image)
    monkeypatch.setattr(bench_methods, "PATIENCE_SECONDS", 0.0)
    with pytest.raises(TooLong, match=r"^explains one image at a time, \S+ s each$"):
        batch.each(lambda image: image)
    assert subject.each(lambda image: image).equal(subject.image)


def row(candidate: str, precision: str, median: float | None, **more: Any) -> dict[str, Any]:
    return {
        "method": "gradient", "network": "resnet50", "candidate": candidate, "setting": "", "samples": 3, "median_s": median,
        "times_as_long_as_ours": 1.0, "times_as_long_as_ours_iqr": 0.01, "peak_mem_bytes": 2**20, "difference": 0.0,
        "agrees": True, "failed": None, "commit": "0123456", "date": "2026-01-01", "images": 32, "precision": precision,
        "error": 1e-3, "outside_model": None,
    } | more  # fmt: skip


ABOUT = {"processor": "P", "threads": 1, "torch": "2", "cuda": {"name": "GPU", "runtime": "13.0"}}


def test_the_tables_show_every_arithmetic_and_losses() -> None:
    rows = [
        row("pysal", "float32", 0.2, outside_model=0.031),
        row("pysal", "bf16", 0.1, agrees=False, error=0.6),
        row("captum", "float32", 0.1, times_as_long_as_ours=0.5),
        row("captum", "bf16", None, failed="OutOfMemoryError: x"),
    ]
    page = tables.docs_section([], [{"metadata": ABOUT, "rows": rows}])
    assert "### ResNet-50, 32 images, GPU" in page
    assert "GPU, torch 2, 2026-01-01, commit 0123456, CUDA 13.0." in page
    assert "| gradient | float32 | 200 ms | **0.50** | **0.50** | - | - | - |" in page
    assert "| gradient | bf16 | 100 ms ✗ | - | - | - | - | - |" in page
    assert "| gradient | pysal | float32 |  | 3 | 200 ms | 1.00 (0.01) | 3.1 % | 1e-03 | 1 MiB |" in page
    assert "| gradient | pysal | bf16 |  | 3 | 100 ms | 1.00 (0.01) |  | 6e-01 ✗ | 1 MiB |" in page
    assert "| gradient | captum | bf16 | not run: OutOfMemoryError: x |" in page
    one = [row("pysal", "float32", 0.5, images=1)]
    front = tables.readme_section([], [{"metadata": ABOUT, "rows": rows + one}])
    assert "**ResNet-50**, 32 images, GPU (torch 2):" in front
    assert "| gradient | float32 | 200 ms | **0.50** |" in front
    assert "500 ms" not in front


def test_only_what_ran_on_a_gpu_is_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.latest_on_gpu() == []
    assert "Nothing has been measured on a GPU yet" in tables.docs_section([], tables.latest_on_gpu())
    for version, name, cuda in (("0.9.0", "old", ABOUT["cuda"]), ("0.10.0", "gpu", ABOUT["cuda"]), ("0.11.0", "cpu", None)):
        path = tmp_path / version / f"gpu-resnet50--{name}.json"
        path.parent.mkdir()
        path.write_text(json.dumps({"metadata": ABOUT | {"cuda": cuda}, "rows": [row(name, "float32", 1.0)]}))
    assert [result["rows"][0]["candidate"] for result in tables.latest_on_gpu()] == ["gpu"]


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--device", "cuda"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert __main__.main() == 2
    message = f"python -m benchmarks: --device cuda needs a CUDA device, torch {torch.__version__} sees none\n"
    assert capsys.readouterr().err == message


def test_each_network_has_its_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> Any:
        commands.append(command)
        return SimpleNamespace(returncode=len(commands) - 1)

    monkeypatch.setattr(sys, "argv", ["benchmarks", "--device", "cuda", "--images", "32", "--minutes", "8"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(__main__.subprocess, "run", run)
    monkeypatch.setattr(__main__.time, "time", lambda: 1000.0)
    assert __main__.main() == 1  # the second one failed
    ends = [dict(itertools.pairwise(command)) for command in commands]
    assert [(end["--network"], end["--until"]) for end in ends] == [
        ("efficientnet_lite0", "1160.0"),
        ("resnet50", "1320.0"),
        ("vit_small", "1480.0"),
    ]
    assert all((end["--device"], end["--images"]) == ("cuda", "32") for end in ends)
