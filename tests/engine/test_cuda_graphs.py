"""A pass that is replayed gives what the pass itself gives, image after image, and steps back where that cannot be.

Without a GPU the graph is played by `again`, which computes anew into the tensors it returned first: everything around the
graph, what is copied when and what is kept, is the same. With one, the same tests run on real graphs.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pysal
from pysal.engine.layers.features import Layer
from pysal.engine.prepared import trial
from pysal.engine.prepared.gains import Budget
from pysal.engine.prepared.model import PreparedModel
from pysal.engine.running.chunks import run_chunks
from pysal.engine.tape.cuda_graphs import MOST_SEEN, MOST_SHAPES, MOST_SWEEPS, PASSES_BEFORE_ANOTHER_TRY, Pool, Replays
from pysal.engine.tape.tape import Program, Tape
from pysal.testing import required

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=pytest.mark.skipif(
            not torch.cuda.is_available() and "cuda" not in required(), reason="no CUDA device: graphs run on one only"
        ),
    ),
]
on_devices = pytest.mark.parametrize("device", DEVICES)


def again(function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
    """Play a CUDA graph on the CPU."""
    found = function()

    def replay() -> None:
        for held, new in zip(held_by(found), held_by(function()), strict=True):
            held.copy_(new)

    return found, replay


def held_by(found: Any) -> list[Tensor]:
    if isinstance(found, Tape):
        kept = [getattr(part, "bits", part) for part in found._parts()]
        return [found.output, *found.values.values(), *(part for part in kept if isinstance(part, Tensor))]
    result, values = found
    return [value for value in (result, *values.values()) if value is not None]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        x = self.pool(torch.relu(self.second(x) + x))
        return self.head(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))


def prepared(device: str, play: Any = None) -> PreparedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Net().eval().double().to(device)
    fast = pysal.prepare(model, photos(1, device), batch_size=2)
    assert fast.program is not None
    if device == "cpu":
        assert fast.replays is None  # there is nothing to gain
        fast.replays = Replays(fast.program, play or again)
    elif play is not None:
        fast.replays = Replays(fast.program, play)
    return fast


def parts_of(fast: PreparedModel) -> tuple[Program, Replays]:
    assert fast.program is not None
    assert fast.replays is not None
    return fast.program, fast.replays


def photos(number: int, device: str = "cpu", seed: int = 0) -> Tensor:
    return torch.rand(number, 3, 16, 20, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device)


def plain(fast: PreparedModel) -> PreparedModel:
    """The same snapshot without graphs."""
    other = pysal.prepare(fast.original, photos(1, str(next(fast.original.parameters()).device)), batch_size=2)
    other.replays = None
    return other


# a few hundred float64 roundings; another pass's numbers differ in the first digit
def assert_same(got: Tensor | None, expected: Tensor | None) -> None:
    assert got is not None
    assert expected is not None
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= 1e-12 * expected.abs().max()


METHODS: dict[str, Callable[..., Tensor]] = {
    "gradient": lambda model, x: pysal.gradient(model, x, 1),
    "integrated_gradients": lambda model, x: pysal.integrated_gradients(model, x, 1, steps=7),
    "blur_integrated_gradients": lambda model, x: pysal.blur_integrated_gradients(model, x, 1, steps=5),
    "smooth_grad": lambda model, x: pysal.smooth_grad(model, x, 1, samples=5),
    "grad_cam": lambda model, x: pysal.grad_cam(model, x, 1, layer="second"),
    "class_gradients": lambda model, x: pysal.class_gradients(model, x, [0, 3, 4]),
    "guided_backprop": lambda model, x: pysal.guided_backprop(model, x, 1),
}


@on_devices
@pytest.mark.parametrize("method", METHODS)
def test_maps_are_those_without_graphs(device: str, method: str) -> None:
    fast = prepared(device)
    expect = plain(fast)
    found = [METHODS[method](fast, photos(4, device, seed)) for seed in range(4)]
    expected = [METHODS[method](expect, photos(4, device, seed)) for seed in range(4)]
    for got, want in zip(found, expected, strict=True):
        assert_same(got, want)
    assert fast.replays is not None
    assert fast.replays.refused is None
    replayed = list(fast.replays._held.values())
    assert bool(replayed) == (method != "guided_backprop")  # whose hooks belong to one call
    assert all(replay._sweeps for replay in replayed)


@on_devices
def test_what_a_replay_returned_stays(device: str) -> None:
    fast = prepared(device)
    program, replays = parts_of(fast)
    place = program.layer(Layer("second", fast.original.second))
    assert place is not None
    seed = torch.eye(5, dtype=torch.float64, device=device)[:2]
    results = []
    for n in range(6):  # the third captures a sweep, the fourth is the first that replays it
        with replays.recording(photos(2, device, n), [place]) as tape:
            results.append((tape.output, tape.values[place], *tape.sweep(seed, layers=[place])))
    for n, (output, value, grad, grads) in enumerate(results):
        tape = program.record(photos(2, device, n), [place])
        want, wants = tape.sweep(seed, layers=[place])
        assert_same(output, tape.output)
        assert_same(value, tape.values[place])
        assert_same(grad, want)
        assert_same(grads[place], wants[place])


def test_the_images_are_not_written_to() -> None:
    fast = prepared("cpu")
    x = photos(2)
    kept = x.clone()
    for _ in range(4):
        pysal.gradient(fast, x, 1)
    assert torch.equal(x, kept)


def test_a_shape_is_captured_when_it_comes_again_and_only_so_many_are_kept() -> None:
    captured: list[Any] = []

    def counted(function: Callable[[], Any]) -> Any:
        captured.append(function)
        return again(function)

    fast = prepared("cpu", counted)
    program, replays = parts_of(fast)

    def come(number: int) -> int:
        """Record a pass of so many images, and return how many shapes have been captured."""
        images = photos(number, seed=len(captured))
        with replays.recording(images) as tape:
            assert_same(tape.output, program.record(images).output)
        assert len(replays._held) <= MOST_SHAPES
        return len(captured)

    shapes = range(1, MOST_SHAPES + 1)
    assert [come(number) for number in shapes] == [0] * MOST_SHAPES  # others come in between
    assert [come(number) for number in shapes] == list(shapes)
    assert [come(number) for number in shapes] == [MOST_SHAPES] * MOST_SHAPES
    come(1)
    assert come(MOST_SHAPES + 1) == MOST_SHAPES
    assert come(MOST_SHAPES + 1) == MOST_SHAPES + 1  # for which 2, not used for longest, makes room
    assert come(1) == MOST_SHAPES + 1
    assert come(2) == MOST_SHAPES + 1  # forgotten: as if it came for the first time
    assert come(2) == MOST_SHAPES + 2


def test_shapes_that_never_come_again_are_forgotten() -> None:
    _, replays = parts_of(prepared("cpu"))
    for number in range(1, MOST_SEEN + 3):
        with replays.recording(torch.zeros(1, 3, 16, number + 20, dtype=torch.float64)):
            pass
    assert len(replays._seen) == MOST_SEEN
    assert not replays._held


def test_of_sweeps_only_so_many_are_kept() -> None:
    fast = prepared("cpu")
    program, replays = parts_of(fast)
    for times in range(1, MOST_SWEEPS + 3):
        seed = torch.eye(5, dtype=torch.float64)[:1].repeat(2 * times, 1)
        for n in range(4):
            with replays.recording(photos(2, seed=n)) as tape:
                assert_same(tape.sweep(seed)[0], program.record(photos(2, seed=n)).sweep(seed)[0])
    (replay,) = replays._held.values()
    assert len(replay._sweeps) == MOST_SWEEPS


def test_the_images_per_pass_are_chosen_by_replays_and_their_graphs_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[tuple[str, int]] = []

    def counted(function: Callable[[], Any]) -> Any:
        found, replay = again(function)
        rows = len(found.output) if isinstance(found, Tape) else len(found[0])

        def run() -> None:
            order.append(("graph" if isinstance(found, Tape) else "sweep", rows))
            replay()

        return found, run

    fast = prepared("cpu", counted)
    monkeypatch.setattr(trial, "CPU_CHUNKS", (8, 16))  # as on a GPU: nobody tries one image
    monkeypatch.setattr(trial, "fast_rows", lambda device, row_bytes: 4)
    assert trial.fastest_rows(fast, photos(1), Budget(torch.device("cpu"))) in (8, 16)
    rows = [number for _, number in order]
    assert rows == sorted(rows)  # one after the other
    for number in (8, 16):
        assert order.count(("sweep", number)) >= 3  # the first of which is its check
    _, replays = parts_of(fast)
    assert not replays._held
    assert not replays._seen
    assert replays.refused is None


def test_out_of_memory_ends_the_trial_of_larger_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def seconds(_budget: Budget, name: str, way: Any) -> float:
        tried.append(int(name.removesuffix(" rows")))
        if tried[-1] > 8:
            raise torch.OutOfMemoryError
        return 1.0

    monkeypatch.setattr(trial, "CPU_CHUNKS", (4, 8, 16, 32))
    monkeypatch.setattr(trial, "fast_rows", lambda device, row_bytes: 4)
    fast = prepared("cpu")
    monkeypatch.setattr(Budget, "seconds", seconds)
    monkeypatch.setattr(Budget, "left", 1e9)
    budget = Budget(torch.device("cpu"))
    assert trial.fastest_rows(fast, photos(1), budget) == 8  # half the time per image of 4
    assert tried.count(16) == 1
    assert 32 not in tried
    fast.replays = None
    tried.clear()
    assert trial.fastest_rows(fast, photos(1), budget) == 8
    assert tried == [4, 8, 16] + [4, 8] * (trial.TRIALS - 1)


def failing(_function: Callable[[], Any]) -> Any:
    raise RuntimeError("operation not permitted when stream is capturing\nmore lines")


def failing_at_sweeps(function: Callable[[], Any]) -> Any:
    found, replay = again(function)
    return (found, replay) if isinstance(found, Tape) else failing(function)


def stale(function: Callable[[], Any]) -> Any:
    """A graph that does not see the new images."""
    found = function()
    for held in held_by(found):
        held.zero_()
    return found, lambda: None


def stale_sweeps(function: Callable[[], Any]) -> Any:
    found, replay = again(function)
    return (found, replay) if isinstance(found, Tape) else stale(function)


@pytest.mark.parametrize(
    ("play", "reason"),
    [
        (failing, "operation not permitted when stream is capturing"),
        (failing_at_sweeps, "operation not permitted when stream is capturing"),
        (stale, "a replay was 1.0e+00 away from the pass"),
        (stale_sweeps, "a replayed sweep was 1.0e+00 away from the sweep"),
    ],
)
def test_what_cannot_be_replayed_runs_as_it_is(play: Any, reason: str) -> None:
    fast = prepared("cpu", play)
    expect = plain(fast)
    for seed in range(4):
        assert_same(pysal.gradient(fast, photos(2, seed=seed), 1), pysal.gradient(expect, photos(2, seed=seed), 1))
    assert fast.replays is not None
    assert fast.replays.refused == reason
    assert not fast.replays._held
    assert fast.report().splitlines()[-1] == f"no pass is replayed as a CUDA graph: {reason}"


def test_the_report_says_that_passes_are_replayed() -> None:
    line = "passes that come again with the same shape are replayed as CUDA graphs"
    assert prepared("cpu").report().splitlines()[-1] == line
    assert line not in plain(prepared("cpu")).report()
    assert "oneDNN" not in prepared("cpu").report()  # which has no float64, and no GPU


def test_two_at_once_do_not_share_memory() -> None:
    fast = prepared("cpu")
    program, replays = parts_of(fast)
    seed = torch.eye(5, dtype=torch.float64)[:2]
    for n in range(3):
        pysal.gradient(fast, photos(2, seed=n), 1)
    with replays.recording(photos(2, seed=7)) as tape:
        found: list[Tensor] = []
        other = threading.Thread(target=lambda: found.append(pysal.gradient(fast, photos(2, seed=8), 1)))
        other.start()
        other.join()
        mine, _ = tape.sweep(seed)
    assert_same(mine, program.record(photos(2, seed=7)).sweep(seed)[0])
    assert_same(found[0], pysal.gradient(plain(fast), photos(2, seed=8), 1))


def test_a_capture_that_ran_out_of_memory_is_tried_again() -> None:
    full = True

    def play(function: Callable[[], Any]) -> Any:
        if full:
            raise RuntimeError("CUDA error: out of memory")
        return again(function)

    fast = prepared("cpu", play)
    expect = plain(fast)
    _, replays = parts_of(fast)
    for seed in range(3):
        assert_same(pysal.gradient(fast, photos(2, seed=seed), 1), pysal.gradient(expect, photos(2, seed=seed), 1))
    assert replays.refused is None
    assert not replays._held
    full = False
    for seed in range(PASSES_BEFORE_ANOTHER_TRY + 2):
        pysal.gradient(fast, photos(2, seed=seed), 1)
    assert replays._held
    assert_same(pysal.gradient(fast, photos(2, seed=99), 1), pysal.gradient(expect, photos(2, seed=99), 1))


def test_graphs_give_their_memory_back_before_a_chunk_is_halved() -> None:
    fast = prepared("cpu")
    _, replays = parts_of(fast)
    for seed in range(3):
        pysal.gradient(fast, photos(2, seed=seed), 1)
    assert replays._held
    seen: list[tuple[int, bool]] = []

    def body(start: int, stop: int) -> None:
        seen.append((stop - start, bool(replays._held)))
        if len(seen) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    run_chunks(4, body, label="a test", batch_size=4, device=torch.device("cpu"), row_bytes=1)
    assert seen == [(4, True), (2, False), (2, False)]
    assert replays.refused is None


def test_graphs_in_use_are_not_given_back() -> None:
    fast = prepared("cpu")
    _, replays = parts_of(fast)
    for seed in range(3):
        pysal.gradient(fast, photos(2, seed=seed), 1)
    with replays.recording(photos(2)):
        held = dict(replays._held)
        replays.give_back()
        assert replays._held == held != {}


class Capturing:
    """Stands for torch.cuda, with two devices: what it is asked for, and the stream that is current on each device."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[dict[str, Any]] = []
        self.device, self.under_way, self.breaks = 0, 0, False
        self.current = {device: SimpleNamespace(device=device, wait_stream=lambda _: None) for device in range(2)}
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace(device=device, wait_stream=lambda _: None))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: self.device)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: self.current[self.device])
        monkeypatch.setattr(torch.cuda, "stream", self.on)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
        monkeypatch.setattr(torch.cuda, "graph", self.graph)

    @contextlib.contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        before = self.device, self.current[stream.device]
        self.device, self.current[stream.device] = stream.device, stream
        try:
            yield
        finally:
            self.device, self.current[stream.device] = before

    @contextlib.contextmanager
    def graph(self, _: Any, **options: Any) -> Iterator[None]:
        """As torch's: where the capture fails, the stream stays."""
        self.asked.append(options)
        stream = options["stream"]
        before, self.current[stream.device] = self.current[stream.device], stream
        self.under_way += 1
        assert self.under_way == 1, "torch allows one capture at a time"
        try:
            yield
        finally:
            self.under_way -= 1
        self.current[stream.device] = before


def test_a_graph_is_recorded_in_the_pool_of_its_model_and_in_its_own_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: what torch is asked for."""
    torch_cuda = Capturing(monkeypatch)
    pool = Pool()
    pool.capture(lambda: None)
    pool.capture(lambda: None)
    pool.renew()
    pool.capture(lambda: None)
    assert {options["capture_error_mode"] for options in torch_cuda.asked} == {"thread_local"}
    first, second, third = (options["pool"] for options in torch_cuda.asked)
    assert first is second is not third


def test_a_graph_is_recorded_on_the_current_device_whichever_recorded_first(monkeypatch: pytest.MonkeyPatch) -> None:
    torch_cuda = Capturing(monkeypatch)
    ran: list[Any] = []
    pools = Pool(), Pool()
    for device in (0, 1, 0, 1):
        torch_cuda.device = device
        pools[device].capture(lambda: ran.append(torch_cuda.current[torch_cuda.device]))
        assert ran[-1] is ran[-2] is torch_cuda.asked[-1]["stream"], "what is made for a stream is made before its graph"
        assert ran[-1].device == device == torch_cuda.device
    streams = [options["stream"] for options in torch_cuda.asked]
    assert streams[0] is streams[2]
    assert streams[1] is streams[3]  # memory of a pool is shared within one stream


def test_a_capture_that_fails_leaves_the_stream_of_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    torch_cuda = Capturing(monkeypatch)
    before = torch_cuda.current[0]
    runs: list[None] = []

    def fails_in_the_graph() -> None:
        runs.append(None)
        if len(runs) == 2:
            raise RuntimeError("operation not permitted when stream is capturing")

    pool = Pool()
    with pytest.raises(RuntimeError, match="not permitted"):
        pool.capture(fails_in_the_graph)
    assert torch_cuda.current[0] is before
    pool.capture(lambda: None)  # another can begin


def test_one_capture_at_a_time_whatever_threads_prepare(monkeypatch: pytest.MonkeyPatch) -> None:
    torch_cuda = Capturing(monkeypatch)
    inside, go_on = threading.Event(), threading.Event()

    def slow() -> None:
        inside.set()
        assert go_on.wait(30)

    order: list[str] = []
    first = threading.Thread(target=lambda: (Pool().capture(slow), order.append("first")))
    second = threading.Thread(target=lambda: (Pool().capture(lambda: order.append("within second")), order.append("second")))
    first.start()
    assert inside.wait(30)
    second.start()
    second.join(0.1)
    assert order == []
    go_on.set()
    first.join(30)
    second.join(30)
    assert order.count("within second") == 2
    assert {"first", "second"} <= set(order)
    assert len(torch_cuda.asked) == 2


@pytest.mark.skipif(not torch.cuda.is_available() and "cuda" not in required(), reason="no CUDA device: graphs run on one only")
def test_a_capture_is_a_graph() -> None:
    held = torch.zeros(3, device="cuda")
    found, replay = Pool().capture(lambda: held + 1)
    held.fill_(4)
    replay()
    torch.cuda.synchronize()
    assert found.tolist() == [5.0] * 3
    _, replays = parts_of(prepared("cuda"))
    assert replays.capture == replays._pool.capture
